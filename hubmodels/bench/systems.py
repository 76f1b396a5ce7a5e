"""The contestants of one model and dtype, on the same weights: ours, other libraries, and the products alone."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import accelerate
from ..errors import InputError
from ..maps import PackedMap
from .peers import DECODERS, ENCODERS, ON_CPU, PeerError
from .workloads import Cell

BASE = "transformers"
PEERS = tuple(dict.fromkeys((*ENCODERS, *DECODERS)))
FLOOR = "floor"
COMPILED = "compiled"
_BUCKETS = 4
Run = Callable[[Cell], Tensor]  # an encoder's: states [B, S, D]; a decoder's: new ids [B, new]


def our_runs(model: Any, dtype: str, decodes: bool) -> tuple[dict[str, Run], Any]:
    """And the accelerated model. model: in the dtype; of int8, which `accelerate` makes, in float32."""
    run, packed = _generation if decodes else _states, torch.int8 if dtype == "int8" else None
    fast = accelerate(model, packed)
    runs = {"accelerated": run(fast)} if packed else {"hubmodels": run(model), "accelerated": run(fast)}
    with suppress(InputError):  # not on a GPU, of an encoder in float32, nor without a compiler
        runs[COMPILED] = run(accelerate(model, packed, compiled=True))
    return runs, fast


def peer_runs(
    names: Sequence[str], family: str, directory: Path, dtype: str, device: str = "cpu"
) -> tuple[dict[str, Run], dict[str, str]]:
    """Those of `names` that can be had of a family's checkpoint, and why the others cannot."""
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    elsewhere = () if device == "cpu" else (device,)
    for name in names:
        try:
            if elsewhere and name in ON_CPU:
                missing[name] = f"{name}: it is set up for a CPU here, not for {device}"
            elif family == "gpt2" and name in DECODERS:
                runs[name] = _of_decoder(DECODERS[name](directory, dtype, *elsewhere))
            elif family == "bert" and name in ENCODERS:
                runs[name] = _of_encoder(ENCODERS[name](directory, dtype, *elsewhere))
        except PeerError as error:
            missing[name] = str(error)
        except Exception as error:  # another library's, whatever it is: the others go on
            missing[name] = f"{type(error).__name__}: {error}"
    return runs, missing


def sorted_buckets(run: Run) -> Run:
    """The rows sorted by length, in four equal parts, each padded to its own longest: what a careful user does."""

    def parts(cell: Cell) -> Tensor:
        lengths = cell.attention_mask.sum(1)
        places = [(rows, slice(int(lengths[rows].max()))) for rows in lengths.argsort().chunk(_BUCKETS)]
        found = [run(Cell("", cell.input_ids[place], cell.attention_mask[place])) for place in places]
        states = found[0].new_zeros(*cell.input_ids.shape, found[0].shape[-1])
        for place, part in zip(places, found, strict=True):
            states[place] = part
        return states

    return parts


def products_alone(model: Any, fast: Any, cell: Cell, decodes: bool) -> Callable[[], None] | None:
    """The packed maps of an accelerated model on as many rows as the cell's tokens, and nothing else.

    Nothing that computes them all in torch can be faster on this machine. None: none are packed.
    """
    rows, steps = (len(cell.input_ids), cell.new) if decodes else (cell.tokens, 1)
    plain = dict(model.named_modules())
    table = model.transformer.embeddings.word.weight if decodes else None  # what the scores' map was packed of
    maps = []
    for name, part in fast.named_modules():
        if isinstance(part, PackedMap) and "pooler" not in name:
            like = table if name == "scores.linear" else getattr(plain.get(name), "weight", None)
            if like is not None:  # else it is a part of another map
                maps.append((part, torch.ones(rows, like.shape[1], dtype=like.dtype)))

    def run() -> None:
        for _ in range(steps):
            for part, x in maps:
                part(x)

    return run if maps else None


def _states(model: Any) -> Run:
    return lambda cell: model(cell.input_ids, cell.attention_mask).last_hidden_state


def _generation(model: Any) -> Run:
    return lambda cell: torch.tensor([row.ids for row in model.generate(cell.input_ids, max_new_tokens=cell.new)])


def _of_encoder(run: Callable[[Tensor, Tensor], Tensor]) -> Run:
    return lambda cell: run(cell.input_ids, cell.attention_mask)


def _of_decoder(run: Callable[[Tensor, int], Tensor]) -> Run:
    return lambda cell: run(cell.input_ids, cell.new)
