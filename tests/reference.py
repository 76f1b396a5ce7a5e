"""Tiny random BERTs, ours and transformers', with the same values in every parameter.

Where this package differs from the reference on purpose, the reference is bent here by hooks on its own modules, so
that its own code still computes everything after: `follow_padding`.
"""

from contextlib import contextmanager

import torch
import transformers
from held import HeldTensor
from torch import Tensor

from hubmodels.families import bert
from hubmodels.families.bert import FAMILY
from hubmodels.layers import Attention

# Pairwise distinct, so that no swap of two sizes goes unseen. K = D / H = 6.
B, S, D, H, V, LAYERS, POSITIONS, TYPES = 5, 9, 24, 4, 67, 3, 16, 2
INNER, LABELS, CHOICES = 44, 7, 8
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": TYPES,
}

NAMES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)
NUM_LABELS = {"BertForSequenceClassification": LABELS, "BertForTokenClassification": LABELS}
PATTERNS = ("none", "right", "left", "interleaved", "all_but_one")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int, std: float = 0.3) -> None:
    """Every parameter: norms around 1, all else around 0. Nothing keeps a value that would hide a wrong load."""
    draw = generator(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(0.0, std, generator=draw)
        if name.endswith("LayerNorm.weight"):
            parameter.add_(1.0)


def ours_as(theirs: torch.nn.Module, name: str, num_labels: int | None = None, **sizes) -> torch.nn.Module:
    """Our class of that name holding the values of `theirs`, through the family's key map; eval mode."""
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model = getattr(bert, name)(bert.BertConfig(**sizes), **labels)
    wanted = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    held = {key: HeldTensor(tensor.clone()) for key, tensor in theirs.state_dict().items()}
    loaded = FAMILY.keys.match(held, wanted, f"a tiny {name}")
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval().requires_grad_(True)


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Itself, in train mode"""
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(part, Attention):
            part.dropout = 0.0
    return model.train()


def their_config(num_labels: int = 2, **sizes) -> transformers.BertConfig:
    return transformers.BertConfig(attn_implementation="eager", num_labels=num_labels, **sizes)


def pair(name: str, dtype: torch.dtype = torch.float64, num_labels: int | None = None, seed: int = 1, **changes):
    """(ours, theirs) of class `name`, eval mode, equal in every parameter. changes: of the config."""
    num_labels = NUM_LABELS.get(name) if num_labels is None else num_labels
    sizes = {**SIZES, **changes}
    theirs = getattr(transformers, name)(their_config(num_labels or 2, **sizes)).eval()
    randomise(theirs, seed)
    theirs = theirs.to(dtype)
    return ours_as(theirs, name, num_labels, **sizes), theirs


def ours(name: str, dtype: torch.dtype = torch.float64, **changes) -> torch.nn.Module:
    return pair(name, dtype, **changes)[0]


def rows_of(name: str) -> tuple[int, ...]:
    return (B, CHOICES) if name == "BertForMultipleChoice" else (B,)


def mask_of(pattern: str, rows: int, length: int = S) -> Tensor:
    """[rows, length], 1 = token. Rows differ from each other; the first has no padding, except in all_but_one."""
    kept = torch.tensor([max(2, length - row) for row in range(rows)])[:, None]
    columns = torch.arange(length).expand(rows, length)
    if pattern == "none":
        mask = torch.ones(rows, length, dtype=torch.bool)
    elif pattern == "right":
        mask = columns < kept
    elif pattern == "left":
        mask = columns >= length - kept
    elif pattern == "interleaved":
        mask = torch.rand(rows, length, generator=generator(3)) < 0.6
        mask[0] = True
        mask[1:, 4] = True  # no row without any token
    elif pattern == "all_but_one":
        mask = columns == (torch.arange(rows) * 3 % length)[:, None]
    else:
        raise ValueError(pattern)
    return mask.long()


def inputs_of(name: str, pattern: str, seed: int = 2) -> dict[str, Tensor]:
    """input_ids, attention_mask, token_type_ids; ids at padding are words like any other."""
    draw, rows = generator(seed), rows_of(name)
    mask = mask_of(pattern, torch.Size(rows).numel())
    return {
        "input_ids": torch.randint(0, V, (*rows, S), generator=draw),
        "attention_mask": mask.view(*rows, S),
        "token_type_ids": torch.randint(0, TYPES, (*rows, S), generator=draw),
    }


def labels_of(name: str, seed: int = 4) -> dict[str, Tensor]:
    """Labels for every class that has a loss, some of them -100, some of them at padding."""
    draw = generator(seed)

    def classes(count: int, *shape: int) -> Tensor:
        return torch.randint(0, count, shape, generator=draw)

    def tokens(count: int) -> Tensor:
        unlabelled = torch.rand(B, S, generator=draw) < 0.3
        return classes(count, B, S).masked_fill(unlabelled, -100)

    match name:
        case "BertForMaskedLM":
            return {"labels": tokens(V)}
        case "BertForPreTraining":
            return {"labels": tokens(V), "next_sentence_label": classes(2, B)}
        case "BertForNextSentencePrediction":
            return {"labels": classes(2, B)}
        case "BertForSequenceClassification":
            return {"labels": classes(LABELS, B)}
        case "BertForTokenClassification":
            return {"labels": tokens(LABELS)}
        case "BertForQuestionAnswering":
            # Some stand at a token under every pattern, some at padding under some.
            return {"start_positions": torch.tensor([0, 3, 8, 4, 4]), "end_positions": torch.tensor([5, 8, 6, 4, 3])}
        case "BertForMultipleChoice":
            return {"labels": classes(CHOICES, B)}
    return {}


def follow_labels(labels: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """The same labels as the reference has to be given them: a label at padding is none."""
    length = mask.shape[-1]
    told = dict(labels)
    for key, value in labels.items():
        if key == "labels" and value.shape == mask.shape:
            told[key] = value.masked_fill(mask == 0, -100)
        if key in ("start_positions", "end_positions"):
            at_padding = mask.gather(1, value[:, None].clamp(0, length - 1))[:, 0] == 0
            told[key] = value.masked_fill(at_padding & (value < length), length)
    return told


@contextmanager
def follow_padding(theirs: torch.nn.Module, mask: Tensor):
    """Inside, `theirs` pools each row's first real token and gives padding the lowest score in question answering."""
    flat = mask.flatten(0, -2)
    first = flat.argmax(1)
    hooks = []
    for name, module in theirs.named_modules():
        if name.split(".")[-1] == "pooler" and module is not None:

            def move_first(_, args):
                return (args[0][torch.arange(len(first)), first][:, None],)

            hooks.append(module.register_forward_pre_hook(move_first))
        if name == "qa_outputs":

            def hide_padding(_, args, out):
                return out.masked_fill(flat[:, :, None] == 0, torch.finfo(out.dtype).min)

            hooks.append(module.register_forward_hook(hide_padding))
    try:
        yield theirs
    finally:
        for hook in hooks:
            hook.remove()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of theirs, by name."""
    return {key: parameter.grad for key, parameter in model.named_parameters()}


def gradients_as_theirs(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of ours, carried to their names by the key map, as an export carries the parameters."""
    return FAMILY.keys.dump(gradients(model), prefixed=hasattr(model, "transformer"))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The greatest absolute difference; shapes have to be the same."""
    assert ours.shape == theirs.shape
    return float((ours.detach().double() - theirs.detach().double()).abs().max()) if ours.numel() else 0.0
