"""A linear map in float32 by MKL, which is torch's, and by oneDNN: which of them is faster on this machine.

    python benchmarks/products.py [--rounds N]

`hubmodels.products.linear` takes oneDNN on AMD's CPUs. Maps of BERT-base for 8 to 4,096 tokens, in turn, each time over
the weights of twelve layers, so that they come from memory as in a model; a figure is the median over the rounds of
(MKL's seconds / oneDNN's seconds), with the least and the most, and oneDNN's operations a second. Both must agree with
float64 to 1e-5 of the greatest number.
"""

import argparse
import time
from statistics import median

import torch
import torch.nn.functional as F

MAPS = ((768, 768), (768, 2304), (768, 3072), (3072, 768))
TOKENS = (8, 64, 128, 512, 1024, 4096)
LAYERS = 12


def by_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def compare(tokens: int, width: int, height: int, rounds: int) -> str:
    """One cell of the table: [tokens, width] -> [tokens, height]"""
    x = torch.randn(tokens, width)
    weights = [torch.randn(height, width) for _ in range(LAYERS)]
    right = F.linear(x.double(), weights[0].double())
    for way in (F.linear, by_onednn):
        error = float((way(x, weights[0]) - right).abs().max() / right.abs().max())
        if error > 1e-5:
            raise SystemExit(f"{way.__name__}: differs from float64 by {error:.1e}")
    seconds: dict[str, list[float]] = {F.linear.__name__: [], by_onednn.__name__: []}
    for turn in range(rounds + 1):
        for way in (F.linear, by_onednn):
            begun = time.perf_counter()
            for weight in weights:
                way(x, weight)
            if turn:
                seconds[way.__name__].append(time.perf_counter() - begun)
    mkl, onednn = seconds.values()
    ratios = [a / b for a, b in zip(mkl, onednn, strict=True)]
    speed = 2 * LAYERS * tokens * width * height / median(onednn) / 1e9
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), {speed:.0f}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    print(
        f"MKL's time / oneDNN's, and oneDNN's GFLOP/s: {name}, {torch.get_num_threads()} threads, {torch.__version__}\n"
    )
    print("| tokens | " + " | ".join(f"{width} -> {height}" for width, height in MAPS) + " |")
    print("|" + "---|" * (1 + len(MAPS)))
    for tokens in TOKENS:
        cells = [compare(tokens, width, height, options.rounds) for width, height in MAPS]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
