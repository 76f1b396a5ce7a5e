"""Other ecosystems' spellings -> Hugging Face's of today. One entry per ecosystem, whatever the family."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from ..errors import CheckpointError

T = TypeVar("T")


class Dialect(NamedTuple):
    """name; is_spoken: whether a key shows that the file is of this dialect; rename: key -> Hugging Face's key."""

    name: str
    is_spoken: Callable[[str], bool]
    rename: Callable[[str], str]


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


HUGGING_FACE = Dialect("huggingface", lambda key: False, lambda key: key)
DIALECTS = (
    Dialect(
        "huggingface-gamma-beta",
        lambda key: _GAMMA_BETA.fullmatch(key) is not None,
        lambda key: _GAMMA_BETA.sub(lambda m: f"{m[1]}.{_MODERN[m[2]]}", key),
    ),
    Dialect("openai", lambda key: re.fullmatch(r"params\.\d+", key) is not None, _openai),
)


def translate(tensors: Mapping[str, T], source: str) -> tuple[dict[str, T], str]:
    """Tensors under Hugging Face names, and the dialect they were in. Raises CheckpointError if two become one."""
    dialect = next((d for d in DIALECTS if any(d.is_spoken(key) for key in tensors)), HUGGING_FACE)
    renamed: dict[str, T] = {}
    for key, tensor in tensors.items():
        name = dialect.rename(key)
        if name in renamed:
            raise CheckpointError(f"{source}: {key} and another of its keys both mean {name}")
        renamed[name] = tensor
    return renamed, dialect.name
