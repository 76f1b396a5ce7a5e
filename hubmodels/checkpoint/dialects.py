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

HUGGING_FACE = Dialect("huggingface", lambda key: False, lambda key: key)
DIALECTS = (
    Dialect(
        "huggingface-gamma-beta",
        lambda key: _GAMMA_BETA.fullmatch(key) is not None,
        lambda key: _GAMMA_BETA.sub(lambda m: f"{m[1]}.{_MODERN[m[2]]}", key),
    ),
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
