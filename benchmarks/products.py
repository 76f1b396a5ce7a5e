"""A linear map by torch's own product and by the other that `hubmodels.products.linear` may take: which is faster here.

    python benchmarks/products.py [--dtype float32|bfloat16|float16] [--rounds N]

In float32 that is oneDNN's beside MKL's, taken on AMD's CPUs; in half precision the product in float32 of the matrix
made wide, taken where a CPU has no products of half precision. Maps of BERT-base for 8 to 4,096 tokens (1,024 in half
precision), in turn, each time over the weights of twelve layers, so that they come from memory as in a model; a figure
is the median over the rounds of (torch's seconds / the other's seconds), with the least and the most, and the other's
GFLOP/s. Both must agree with float64 to 1e-5 of the greatest number, or to the dtype's rounding.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hubmodels.products import _product, multiplies

MAPS = ((768, 768), (768, 2304), (768, 3072), (3072, 768))
TOKENS = (8, 64, 128, 512, 1024, 4096)
LAYERS = 12


def by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def in_float32(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight, None, x.dtype)


def compare(tokens: int, width: int, height: int, dtype: torch.dtype, rounds: int) -> str:
    """One cell of the table: [tokens, width] -> [tokens, height]"""
    other = by_onednn if dtype == torch.float32 else in_float32
    x = torch.randn(tokens, width, dtype=dtype)
    weights = [torch.randn(height, width, dtype=dtype) for _ in range(LAYERS)]
    right = F.linear(x.double(), weights[0].double())
    for way in (F.linear, other):
        error = float((way(x, weights[0]) - right).abs().max() / right.abs().max())
        if error > max(1e-5, torch.finfo(dtype).eps):
            raise SystemExit(f"{way.__name__}: differs from float64 by {error:.1e}")
    seconds: dict[str, list[float]] = {F.linear.__name__: [], other.__name__: []}
    for turn in range(rounds + 1):
        for way in (F.linear, other):
            begun = time.perf_counter()
            for weight in weights:
                way(x, weight)
            if turn:
                seconds[way.__name__].append(time.perf_counter() - begun)
    torchs, others = seconds.values()
    ratios = [a / b for a, b in zip(torchs, others, strict=True)]
    speed = 2 * LAYERS * tokens * width * height / median(others) / 1e9
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), {speed:.0f}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    has = "multiplies" if multiplies(dtype) else "does not multiply"
    print(f"{name}, which {has} {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| tokens | " + " | ".join(f"{width} -> {height}" for width, height in MAPS) + " |")
    print("|" + "---|" * (1 + len(MAPS)))
    for tokens in TOKENS if dtype == torch.float32 else TOKENS[:-1]:
        cells = [compare(tokens, width, height, dtype, options.rounds) for width, height in MAPS]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
