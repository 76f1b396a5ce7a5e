"""Tiny random GPTs and GPT-2s, ours and transformers', with the same values in every parameter.

What the reference cannot be asked for is done to its inputs or outputs here: it takes no mask, positions or vectors of
several candidates, it rounds its loss to float32, and it lets padding foresee words.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
import transformers
from held import HeldTensor
from reference import CHOICES, INNER, LAYERS, POSITIONS, B, D, H, S, V, generator, mask_of
from torch import Tensor

from hubmodels.families import gpt, gpt2

GPT_NAMES = ("OpenAIGPTModel", "OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel")
GPT2_NAMES = ("GPT2Model", "GPT2LMHeadModel")
NAMES = GPT_NAMES + GPT2_NAMES
LANGUAGE_MODELS = ("OpenAIGPTLMHeadModel", "GPT2LMHeadModel")
DOUBLE = "OpenAIGPTDoubleHeadsModel"
OURS = {
    "OpenAIGPTModel": gpt.GptModel,
    "OpenAIGPTLMHeadModel": gpt.Gpt,
    "OpenAIGPTDoubleHeadsModel": gpt.GptDoubleHeads,
    "GPT2Model": gpt2.Gpt2Model,
    "GPT2LMHeadModel": gpt2.Gpt2,
}
# Published names; the sizes of `reference`, so pairwise distinct.
SIZES = {"vocab_size": V, "n_positions": POSITIONS, "n_embd": D, "n_layer": LAYERS, "n_head": H}
# What GPT-2's config can say and openai-gpt's cannot.
VARIANTS = (
    {},
    {"n_inner": INNER},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": INNER},
)


def is_gpt2(name: str) -> bool:
    return name in GPT2_NAMES


def family_of(name: str):
    return gpt2.FAMILY if is_gpt2(name) else gpt.FAMILY


def rows_of(name: str) -> tuple[int, ...]:
    return (B, CHOICES) if name == DOUBLE else (B,)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int, std: float = 0.3) -> None:
    """Every parameter, theirs or ours: norms around 1, all else around 0."""
    draw = generator(seed)
    norms = {parameter for m in module.modules() if isinstance(m, torch.nn.LayerNorm) for parameter in [m.weight]}
    for parameter in module.parameters():
        parameter.normal_(0.0, std, generator=draw)
        if parameter in norms:
            parameter.add_(1.0)


def their_config(name: str, **changes):
    if is_gpt2(name):
        return transformers.GPT2Config(**{**SIZES, **changes}, attn_implementation="eager")
    return transformers.OpenAIGPTConfig(**{**SIZES, **changes})


def ours_as(theirs: torch.nn.Module, name: str, **changes) -> torch.nn.Module:
    """Our class holding the values of `theirs`, by its config and through the key map; eval mode.

    changes: of our config, to see that they matter.
    """
    family = family_of(name)
    published = {**theirs.config.to_dict(), **changes}
    model = OURS[name](family.config.from_published(published, f"a tiny {name}"))
    wanted = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    held = {key: HeldTensor(tensor.clone()) for key, tensor in theirs.state_dict().items()}
    loaded = family.keys.match(held, wanted, f"a tiny {name}")
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval().requires_grad_(True)


def pair(name: str, dtype: torch.dtype = torch.float64, seed: int = 1, std: float = 0.3, **changes):
    """(ours, theirs) of transformers' class `name`, eval mode, equal in every parameter. changes: of the config."""
    theirs = getattr(transformers, name)(their_config(name, **changes)).eval()
    randomise(theirs, seed, std)
    theirs = theirs.to(dtype)
    return ours_as(theirs, name), theirs


def inputs_of(name: str, pattern: str, seed: int = 2) -> dict[str, Tensor]:
    """input_ids, attention_mask; ids at padding are words like any other."""
    rows = rows_of(name)
    mask = mask_of(pattern, torch.Size(rows).numel())
    ids = torch.randint(0, V, (*rows, S), generator=generator(seed))
    return {"input_ids": ids, "attention_mask": mask.view(*rows, S)}


def labels_of(name: str, seed: int = 4) -> dict[str, Tensor]:
    """Labels for every class that has a loss, some of them -100, some of them at padding or at a row's beginning."""
    draw = generator(seed)
    rows = rows_of(name)
    words = torch.randint(0, V, (*rows, S), generator=draw)
    words = words.masked_fill(torch.rand(*rows, S, generator=draw) < 0.3, -100)
    if name == DOUBLE:
        return {"labels": words, "mc_labels": torch.randint(0, CHOICES, (B,), generator=draw)}
    return {"labels": words} if name in LANGUAGE_MODELS else {}


def last_tokens(mask: Tensor) -> Tensor:
    """[..., S] -> [...], the column of each row's last token"""
    return mask.shape[-1] - 1 - mask.flip(-1).argmax(-1)


def call(theirs: torch.nn.Module, name: str, **inputs):
    """What the reference says. Only the ids, and which token decides, may have a dimension of candidates there."""
    if name == DOUBLE:
        mask = inputs["attention_mask"]
        inputs.setdefault("mc_token_ids", last_tokens(mask))
        for key in ("attention_mask", "position_ids"):
            if key in inputs:
                inputs[key] = inputs[key].flatten(0, 1)
    if is_gpt2(name):
        inputs["use_cache"] = False
    return theirs(**inputs)


def next_word_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Each token's label and what the token before it in its row says, padding skipped, written out."""
    logprobs = logits.log_softmax(-1).flatten(0, -3)  # [rows, S, V]
    losses = []
    for row, (wanted, real) in enumerate(zip(labels.flatten(0, -2).tolist(), mask.flatten(0, -2), strict=True)):
        for before, after in pairwise(real.nonzero().flatten().tolist()):
            if wanted[after] != -100:
                losses.append((row, before, wanted[after]))
    return -logprobs[tuple(torch.tensor(losses).T)].mean() if losses else logits.sum() * 0.0


def choice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of theirs, by name. No gradient is one of zeros: where no row has two tokens, nothing is foreseen."""
    return {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}


def gradients_as_theirs(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """Of ours, carried to their names by the key map, as an export carries the parameters."""
    return family_of(name).keys.dump(gradients(model), prefixed=hasattr(model, "transformer"))
