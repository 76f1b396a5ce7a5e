"""Other ecosystems' spellings -> Hugging Face's of today. One entry per ecosystem, whatever the family."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ..errors import CheckpointError
from .report import Entry, Origin, dtype_of
from .tensors import LazyTensor, PartTensor, TurnedTensor
from .torch_file import OF_THE_TRAINING


class Dialect(NamedTuple):
    """name; is_spoken: whether a key shows that the file is of this dialect; rename: key -> Hugging Face's key, or the
    keys of the equal parts, along the first dimension, into which the tensor is cut.

    turned: matrices that are stored the other way round. dropped: keys that are no part of a model.
    """

    name: str
    is_spoken: Callable[[str], bool]
    rename: Callable[[str], str | tuple[str, ...]]
    turned: Callable[[str], bool] = lambda key: False
    dropped: Callable[[str], bool] = lambda key: False


class Translation(NamedTuple):
    """tensors: under Hugging Face's names. origins: where each is in the file. dropped: what is no part of a model."""

    tensors: dict[str, LazyTensor]
    origins: dict[str, Origin]
    dialect: str
    dropped: tuple[Entry, ...]


# pytorch-pretrained-bert kept TensorFlow's names for the two parameters of a LayerNorm. Only there: a parameter of
# another module that happens to be called gamma is left alone.
_GAMMA_BETA = re.compile(r"(.*LayerNorm)\.(gamma|beta)")
_MODERN = {"gamma": "weight", "beta": "bias"}

# OpenAI published GPT as one list of arrays without names, in the order in which its code made them: positions, words,
# then twelve for each layer. Source: openai/finetune-transformer-lm, train.py.
_OPENAI_LAYER = [
    f"{part}.{wb}"
    for part in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    for wb in ("weight", "bias")
]


def _openai(key: str) -> str:
    number = int(key.removeprefix("params."))
    if number < 2:
        return ("positions_embed.weight", "tokens_embed.weight")[number]
    layer, place = divmod(number - 2, len(_OPENAI_LAYER))
    return f"h.{layer}.{_OPENAI_LAYER[place]}"


# TensorFlow's names are paths. What is no path of layers there is the parameters of a head, which run_pretraining.py,
# run_classifier.py and run_squad.py of google-research/bert made by hand.
_TENSORFLOW_HEADS = {
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
    "cls/seq_relationship/output_bias": "cls.seq_relationship.bias",
    "cls/squad/output_weights": "qa_outputs.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
}
_TENSORFLOW_ENDS = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
_TRAINING = re.compile(
    r"(.*/)?(adam_[mv]|lamb_[mv]|AdamWeightDecayOptimizer(_1)?|(Adam|LAMB)(_1)?|beta[12]_power"
    r"|global_step|save_counter|current_loss_scale|good_steps)"
)


def _tensorflow(key: str) -> str:
    if key in _TENSORFLOW_HEADS:
        return _TENSORFLOW_HEADS[key]
    *path, last = re.sub(r"\blayer_(\d+)\b", r"layer/\1", key).split("/")
    return ".".join(
        [*path, *([last, "weight"] if last.endswith("_embeddings") else [_TENSORFLOW_ENDS.get(last, last)])]
    )


HUGGING_FACE = Dialect("huggingface", lambda key: False, lambda key: key)
DIALECTS = (
    Dialect(
        "huggingface-gamma-beta",
        lambda key: _GAMMA_BETA.fullmatch(key) is not None,
        lambda key: _GAMMA_BETA.sub(lambda m: f"{m[1]}.{_MODERN[m[2]]}", key),
    ),
    Dialect("openai", lambda key: re.fullmatch(r"params\.\d+", key) is not None, _openai),
    Dialect(
        "tensorflow",
        lambda key: "/" in key,
        _tensorflow,
        turned=lambda key: key.endswith("/kernel"),
        dropped=lambda key: _TRAINING.fullmatch(key) is not None,
    ),
)


# What stands before every name of a model that was saved inside something else: DataParallel and its successors,
# torch.compile, the attribute of a Lightning module, the dict of a training's checkpoint.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "model_state_dict.")
_MOST_WRAPPERS = 8
# What torch leaves within a name, of a part of the model that it wrapped.
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _unwrapped(keys: Iterable[str]) -> list[tuple[str, str]]:
    """The model's names, each with the file's. A few without the wrapper of the others are left for the error."""
    kept = [key for key in keys if not OF_THE_TRAINING.fullmatch(key)]
    names = kept
    for _ in range(_MOST_WRAPPERS):
        counts = {wrapper: sum(name.startswith(wrapper) for name in names) for wrapper in _WRAPPERS}
        wrapper = max(_WRAPPERS, key=counts.__getitem__)
        if 2 * counts[wrapper] <= len(names):
            break
        names = [name.removeprefix(wrapper) for name in names]
    return [(_INNER.sub("", name), key) for name, key in zip(names, kept, strict=True)]


def translate(tensors: Mapping[str, LazyTensor], source: str) -> Translation:
    """What the file holds, as Hugging Face would have saved it. Raises CheckpointError if two keys become one."""
    names = _unwrapped(tensors)
    dialect = next((d for d in DIALECTS if any(d.is_spoken(name) for name, _ in names)), HUGGING_FACE)
    found: dict[str, LazyTensor] = {}
    origins: dict[str, Origin] = {}
    for key, of_the_file in names:
        if dialect.dropped(key):
            continue
        renamed, turned = dialect.rename(key), dialect.turned(key)
        whole = TurnedTensor(tensors[of_the_file]) if turned else tensors[of_the_file]
        for name, tensor in _parts(whole, renamed, f"{source}: {of_the_file}"):
            if name in origins:
                raise CheckpointError(f"{source}: {of_the_file} and {origins[name].key} both mean {name}")
            shape = tuple(reversed(tensor.shape)) if turned else tuple(tensor.shape)
            found[name], origins[name] = tensor, Origin(of_the_file, shape, turned)
    used = {origin.key for origin in origins.values()}
    beside = [key for key in tensors if key not in used]
    because = "of the training, not of the model"
    dropped = (Entry(None, k, "dropped", tuple(tensors[k].shape), dtype_of(tensors[k]), because) for k in beside)
    return Translation(found, origins, dialect.name, tuple(dropped))


def _parts(tensor: LazyTensor, renamed: str | tuple[str, ...], source: str) -> list[tuple[str, LazyTensor]]:
    if isinstance(renamed, str):
        return [(renamed, tensor)]
    if not tensor.shape or tensor.shape[0] % len(renamed):
        raise CheckpointError(
            f"{source} {list(tensor.shape)}: expected {len(renamed)} equal parts: {', '.join(renamed)}"
        )
    return [(name, PartTensor(tensor, number, len(renamed))) for number, name in enumerate(renamed)]
