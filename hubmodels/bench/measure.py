"""Checked first, then timed in turn within a round, in one process: a busy machine slows all contestants alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .systems import Run
from .workloads import Cell

# How alike to the model in float32 an output must be to be timed: of states the least cosine, of words the share that
# it would have chosen after the same text. Rounding decides between near words, and random weights make many.
ALIKE = {"float32": (0.9999, 0.98), "bfloat16": (0.99, 0.5), "int8": (0.97, 0.3)}
_REST = 0.25  # seconds: OpenMP's threads, of which each library has its own, wait busily for up to 0.2


@dataclass(frozen=True)
class Timing:
    """One contestant in one cell. seconds: of each round. ratios: the base's seconds over its own, round by round.

    alike: to the model in float32, see `ALIKE`; None: not compared. error: why it was not timed.
    share: of the device's matrix peak, what the real tokens' products take of it; None: not known.
    """

    model: str
    dtype: str
    cell: str
    system: str
    tokens: int
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    alike: float | None = None
    error: str | None = None
    share: float | None = None

    @property
    def speed(self) -> float:
        """Tokens a second"""
        return self.tokens / median(self.seconds)


class Found(NamedTuple):
    """curves: what was varied, its value, and a timing there."""

    timings: list[Timing]
    curves: list[tuple[str, float, Timing]]


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warm: bool = False, device: str = "cpu"
) -> dict[str, tuple[float, ...]]:
    """Seconds of each, round by round, when the threads of the one before have gone to rest.

    warm: run each once more just before, so that its own threads and weights are awake: what is short needs it.
    device: what all of them wait for, before and after.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(_REST)
            if warm:
                run()
            _wait(device)
            begun = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - begun)
    return {name: tuple(each) for name, each in seconds.items()}


def _wait(device: str) -> None:
    """Until a GPU has done what it was given; a CPU has when the call returns"""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def likeness_of_states(states: Tensor, right: Tensor, mask: Tensor) -> float:
    """The least cosine of any real token's state [B, S, D]"""
    real = mask.bool()
    cosines = torch.nn.functional.cosine_similarity(states[real].double(), right[real].double(), dim=-1)
    return float(cosines.min()) if len(cosines) else 1.0


def likeness_of_words(new: Tensor, judge: Any, prompts: Tensor) -> float:
    """The share of the new ids [B, N] that the judge, a language model, would have chosen after all before them."""
    whole = torch.cat([prompts, new.to(prompts.device)], 1)
    chosen = judge(whole[:, :-1]).logits[:, prompts.shape[1] - 1 :].argmax(-1)
    return float((chosen == whole[:, prompts.shape[1] :]).double().mean())


def checked(runs: Mapping[str, Run], cell: Cell, judge: Any) -> tuple[dict[str, float], dict[str, str]]:
    """How alike to the judge, the model in float32, each contestant's output is; and what went wrong."""
    right = None if cell.new else judge(cell.input_ids, cell.attention_mask).last_hidden_state
    alike: dict[str, float] = {}
    errors: dict[str, str] = {}
    shape = (len(cell.input_ids), cell.new) if right is None else tuple(right.shape)
    for name, run in runs.items():
        try:
            output = run(cell)
            if tuple(output.shape) != shape:
                raise ValueError(f"expected an output of shape {shape}, got {tuple(output.shape)}")
            if right is None:
                alike[name] = likeness_of_words(output, judge, cell.input_ids)
            else:
                alike[name] = likeness_of_states(output, right, cell.attention_mask)
        except Exception as error:  # another library's, whatever it is: the others go on
            errors[name] = f"{type(error).__name__}: {error}"
    return alike, errors


def flops(encoder: Any, cell: Cell) -> float:
    """Of the products of an encoder's blocks on the cell's real tokens: 2 for each number of a matrix and each token,
    and 4 * D for each pair of tokens in a row and each block.
    """
    maps = sum(part.weight.numel() for part in encoder.layers.modules() if isinstance(part, torch.nn.Linear))
    pairs = float(cell.attention_mask.sum(1).double().square().sum())
    return 2.0 * maps * cell.tokens + 4.0 * len(encoder.layers) * encoder.config.hidden_size * pairs


def matrix_peak(device: str, dtype: torch.dtype, sizes: Sequence[int] = (2048, 4096, 8192)) -> float:
    """Floating point operations a second of torch's best product of two square matrices on the device"""
    peaks = []
    for size in sizes:
        square = torch.rand(size, size, dtype=dtype, device=device)
        peaks.append(2 * size**3 / min(time_in_turn({"": partial(torch.mm, square, square)}, 7, True, device)[""]))
    return max(peaks)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on: the CPU or GPU, threads, versions, and how fast torch reads there at best."""
    is_gpu = torch.device(device).type == "cuda"
    return {
        "processor": _processor(),
        **({"GPU": torch.cuda.get_device_name(device), "CUDA": torch.version.cuda} if is_gpu else {}),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read GB/s": round(_read_bandwidth(device) / 1e9, 1),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read_bandwidth(device: str) -> float:
    """Bytes a second at which torch sums up 256 MB"""
    numbers = torch.ones(2**26, device=device)
    return numbers.nbytes / median(time_in_turn({"": numbers.sum}, 7, device=device)[""])
