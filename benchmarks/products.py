"""A linear map by torch's own product and by another that hubmodels may take: which is faster here.

    python benchmarks/products.py [--dtype float32|bfloat16|float16] [--packed | --parts] [--rounds N]

In float32 that is oneDNN's beside MKL's, taken on AMD's CPUs; in half precision the product in float32 of the matrix
made wide, taken where a CPU has no products of half precision. With --packed, of a few tokens and in float32, oneDNN's
convolution beside its inner product, both on weights laid out for them, taken on AMD's CPUs without AVX512. With
--parts, in bfloat16, oneDNN's inner product of all tokens at once beside that of parts of them, taken by two threads
where a CPU has AMX.
Maps of BERT-base for 8 to 4,096 tokens (1,024 in half precision; 2 to 64; 384 to 1,536), in turn, each time over the
weights of twelve layers, so that they come from memory as in a model; a figure is the median over the rounds of (the
first's seconds / the other's seconds), with the least and the most, and the other's GFLOP/s. Both must agree with
float64 to 1e-5 of the greatest number, or to the dtype's rounding.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hubmodels.convolution import ConvolvedLinear
from hubmodels.maps import PackedLinear, PlainMap
from hubmodels.products import _product, multiplies

MAPS = ((768, 768), (768, 2304), (768, 3072), (3072, 768))
TOKENS = (8, 64, 128, 512, 1024, 4096)
FEW = (2, 4, 8, 12, 16, 24, 32, 64)
SPLIT = (384, 512, 640, 768, 896, 1024, 1536)
LAYERS = 12


Make = Callable[[Tensor], Callable[[Tensor], Tensor]]  # a weight -> a map


def by_torch(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return partial(F.linear, weight=weight)


def by_onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def in_float32(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: _product(x, weight, None, x.dtype)


def at_once(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return by_onednn(PackedLinear(weight, None).weight)


def packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return PackedLinear(weight, None)


def convolved(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return ConvolvedLinear(weight, None, PlainMap(weight, None))


def compare(tokens: int, width: int, height: int, dtype: torch.dtype, rounds: int, ways: tuple[Make, Make]) -> str:
    """One cell of the table: [tokens, width] -> [tokens, height]"""
    x = torch.randn(tokens, width, dtype=dtype)
    weights = [torch.randn(height, width, dtype=dtype) for _ in range(LAYERS)]
    right = F.linear(x.double(), weights[0].double())
    maps = [[way(weight) for weight in weights] for way in ways]
    for way, (first, *_) in zip(ways, maps, strict=True):
        error = float((first(x) - right).abs().max() / right.abs().max())
        if error > max(1e-5, torch.finfo(dtype).eps):
            raise SystemExit(f"{way.__name__}: differs from float64 by {error:.1e}")
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for each, found in zip(maps, seconds, strict=True):
            begun = time.perf_counter()
            for product in each:
                product(x)
            if turn:
                found.append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    speed = 2 * LAYERS * tokens * width * height / median(seconds[1]) / 1e9
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), {speed:.0f}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--packed", action="store_true", help="a few tokens on weights that are laid out for them")
    kind.add_argument("--parts", action="store_true", help="tokens at once and in parts, in bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.packed and options.dtype != "float32":
        parser.error(f"--packed: expected --dtype float32, got {options.dtype}")
    if options.parts:
        options.dtype = "bfloat16"
    dtype = getattr(torch, options.dtype)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    has = "multiplies" if multiplies(dtype) else "does not multiply"
    print(f"{name}, which {has} {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| tokens | " + " | ".join(f"{width} -> {height}" for width, height in MAPS) + " |")
    print("|" + "---|" * (1 + len(MAPS)))
    ways, sizes = (by_torch, in_float32), TOKENS[:-1]
    if options.parts:
        ways, sizes = (at_once, packed), SPLIT
    elif options.packed:
        ways, sizes = (packed, convolved), FEW
    elif dtype == torch.float32:
        ways, sizes = (by_torch, by_onednn), TOKENS
    for tokens in sizes:
        cells = [compare(tokens, width, height, dtype, options.rounds, ways) for width, height in MAPS]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
