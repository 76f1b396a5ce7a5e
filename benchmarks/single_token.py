"""One token, or a few, times all the matrices of GPT-2, by every product that torch has for it on a CPU.

    python benchmarks/single_token.py [--rounds N] [--tokens N]

It is what a step of generation is bound by: 498 MB of float32 are read, and each number is used once. The ways take
turns, each run once unseen just before. A row: milliseconds, the median over the rounds with the least and the most;
GB/s of weights as they are held; and which part that is of the rate at which torch reads the same float32 matrices only
to sum them up, round by round. Each must agree with float64 to what its weights are rounded to.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubmodels.maps import HalfLinear, Int8Linear, Int8RowLinear, PackedLinear, PlainMap, RowLinear

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
WORDS, LAYERS = (50257, 768), 12
READING, PROGRAM = "reading, summed up", "float32, in a program of torch.compile"
Product = Callable[[Tensor], Tensor]


def by_onednn(weight: Tensor) -> Product:
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def by_vector(weight: Tensor) -> Product:
    return lambda x: torch.mv(weight, x[0])[None]


# What makes a product of a matrix, bytes for each of its numbers, and the error allowed, as a part of the result's norm
WAYS: dict[str, tuple[Callable[[Tensor], Product], float, float]] = {
    "float32, as a bag of columns": (lambda w: RowLinear(w, None, PlainMap(w, None)), 4, 1e-6),
    "float32, oneDNN on the plain matrix": (by_onednn, 4, 1e-6),
    "float32, oneDNN packed": (lambda w: PackedLinear(w, None, 16), 4, 1e-6),
    "float32, MKL": (by_vector, 4, 1e-6),
    "float16, FBGEMM": (lambda w: HalfLinear(w, None), 2, 1e-3),
    "int8, as a bag of columns": (lambda w: Int8RowLinear(w, None), 104 / 96, 1e-2),
    "int8, FBGEMM": (lambda w: Int8Linear(w, None), 1, 3e-2),
}


class Products(nn.Module):
    """All of them as one program that holds the weights, as a compiled step of generation does."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)

    def forward(self, narrow: Tensor, wide: Tensor) -> list[Tensor]:
        return [F.linear(wide if weight.shape[1] == wide.shape[1] else narrow, weight) for weight in self.weights]


def program_of(weights: list[Tensor], narrow: Tensor, wide: Tensor) -> Callable[[], list[Tensor]]:
    options = {"max_autotune": True, "max_autotune_gemm_backends": "CPP"}
    compiled = torch.compile(Products(weights), options=options)

    def run() -> list[Tensor]:
        with torch._inductor.config.patch(freezing=True):
            return compiled(narrow, wide)

    compare(PROGRAM, run()[0], narrow, weights[0], 1e-6)
    return run


def check(name: str, make: Callable[[Tensor], Product], allowed: float, tokens: int) -> None:
    weight, x = torch.randn(SHAPES[0]), torch.randn(tokens, SHAPES[0][1])
    compare(name, make(weight)(x), x, weight, allowed)


def compare(name: str, found: Tensor, x: Tensor, weight: Tensor, allowed: float) -> None:
    right = F.linear(x.double(), weight.double())
    error = float((found - right).norm() / right.norm())
    if not error <= allowed:
        raise SystemExit(f"{name}: differs from float64 by {error:.1e} of its norm, expected at most {allowed:.0e}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*deprecated")
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in (*SHAPES * LAYERS, WORDS)]
    numbers = sum(weight.numel() for weight in weights)
    given = {size: torch.randn(options.tokens, size) for size in (768, 3072)}
    runs: dict[str, list[Callable[[], Any]]] = {READING: [weight.sum for weight in weights]}
    runs[PROGRAM] = [program_of(weights, given[768], given[3072])]
    for name, (make, _, allowed) in WAYS.items():
        if options.tokens > 1 and (" bag " in name or make is by_vector):
            continue  # these are of one token
        check(name, make, allowed, options.tokens)
        made = [(make(weight), given[weight.shape[1]]) for weight in weights]
        runs[name] = [lambda product=product, x=x: product(x) for product, x in made]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, each in runs.items():
            for _ in range(2):
                begun = time.perf_counter()
                for run in each:
                    run()
                spent = time.perf_counter() - begun
            seconds[name].append(spent)
    name = torch.cpu.get_capabilities().get("cpu_name", "")
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | ms | GB/s | of reading |\n|---|---|---|---|")
    for name, own in seconds.items():
        size = WAYS[name][1] if name in WAYS else 4
        shares = [size / 4 * reading / spent for reading, spent in zip(seconds[READING], own, strict=True)]
        spread = f"{median(own) * 1e3:.1f} ({min(own) * 1e3:.1f}-{max(own) * 1e3:.1f})"
        print(f"| {name} | {spread} | {numbers * size / median(own) / 1e9:.1f} | {median(shares):.0%} |")


if __name__ == "__main__":
    main()
