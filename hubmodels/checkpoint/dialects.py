"""Other ecosystems' spellings -> Hugging Face's of today. One entry per ecosystem, whatever the family."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..errors import CheckpointError
from .tensors import LazyTensor, TurnedTensor


class Dialect(NamedTuple):
    """name; is_spoken: whether a key shows that the file is of this dialect; rename: key -> Hugging Face's key.

    turned: matrices that are stored the other way round. dropped: keys that are no part of a model -> what they are.
    """

    name: str
    is_spoken: Callable[[str], bool]
    rename: Callable[[str], str]
    turned: Callable[[str], bool] = lambda key: False
    dropped: Callable[[str], str | None] = lambda key: None


class Translation(NamedTuple):
    """tensors: under Hugging Face's names. dropped: what is no part of a model -> why."""

    tensors: dict[str, LazyTensor]
    dialect: str
    dropped: dict[str, str]


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
        dropped=lambda key: "of the training, not of the model" if _TRAINING.fullmatch(key) else None,
    ),
)


# What DataParallel and DistributedDataParallel, and torch.compile, put before every name of what they wrap.
_WRAPPERS = ("module.", "_orig_mod.")


def _unwrapped(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    for wrapper in _WRAPPERS * 2:  # either may be around the other
        if tensors and all(key.startswith(wrapper) for key in tensors):
            tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
    return tensors


def translate(tensors: Mapping[str, LazyTensor], source: str) -> Translation:
    """What the file holds, as Hugging Face would have saved it. Raises CheckpointError if two keys become one."""
    tensors = _unwrapped(tensors)
    dialect = next((d for d in DIALECTS if any(d.is_spoken(key) for key in tensors)), HUGGING_FACE)
    renamed: dict[str, LazyTensor] = {}
    dropped: dict[str, str] = {}
    for key, tensor in tensors.items():
        if because := dialect.dropped(key):
            dropped[key] = because
            continue
        name = dialect.rename(key)
        if name in renamed:
            raise CheckpointError(f"{source}: {key} and another of its keys both mean {name}")
        renamed[name] = TurnedTensor(tensor) if dialect.turned(key) else tensor
    return Translation(renamed, dialect.name, dropped)
