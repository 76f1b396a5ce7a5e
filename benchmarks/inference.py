"""BERT-base inference on a CPU: hubmodels, plain and accelerated, against transformers and against the products alone.

    python benchmarks/inference.py [--rounds N] [--threads N] [--layers N] [--dtypes float32 bfloat16] [--json FILE]

Cells: one text of 16, 128 and 512 tokens; 32 texts of 128; `ragged`, 64 texts of log-normal lengths between 8 and 512,
about 70 % of the batch padding. Systems, in one process, in turn within a round, all on the same random weights:

    transformers         sdpa attention, the padded batch
    sorted               the same on the ragged texts in four batches of 16, sorted by length: what a careful user does
    hubmodels            the model as it is loaded
    accelerated          hubmodels.accelerate(model)
    floor                the model's products with packed weights for the real tokens, and nothing else

Before anything is timed each output is compared with transformers': the largest difference of last_hidden_state at real
tokens. A figure is the median over the rounds of (transformers' seconds / the system's seconds) in that round, with its
least and greatest; the last column is the floor's share of the accelerated model's time. Nothing is asserted.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ragged import make_batch, make_models

import hubmodels
from hubmodels.prepack import PackedLinear

Batch = dict[str, Tensor]
UNIFORM = {"1 x 16": (1, 16), "1 x 128": (1, 128), "1 x 512": (1, 512), "32 x 128": (32, 128)}
BUCKETS = 4


def make_cells(words: int) -> dict[str, Batch]:
    generator = torch.Generator().manual_seed(0)
    uniform = {name: torch.randint(1, words, shape, generator=generator) for name, shape in UNIFORM.items()}
    cells = {name: {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for name, ids in uniform.items()}
    return {**cells, "ragged": make_batch(words)}


def buckets(batch: Batch) -> list[Batch]:
    """The rows sorted by length, in equal parts, each padded to its own longest"""
    lengths = batch["attention_mask"].sum(1)
    parts = lengths.argsort().chunk(BUCKETS)
    return [{name: t[rows, : int(lengths[rows].max())] for name, t in batch.items()} for rows in parts]


def make_floor(config: Any, dtype: torch.dtype, tokens: int) -> Callable[[], None]:
    size, inner = config.hidden_size, config.intermediate_size
    shapes = [(3 * size, size), (size, size), (inner, size), (size, inner)]
    maps = [PackedLinear(torch.randn(shape, dtype=dtype), torch.zeros(shape[0], dtype=dtype), 128) for shape in shapes]
    inputs = [torch.randn(tokens, shape[1], dtype=dtype) for shape in shapes]

    def run() -> None:
        for _ in range(config.num_hidden_layers):
            for packed, x in zip(maps, inputs, strict=True):
                packed(x)

    return run


def seconds_of(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(models: dict[str, Any], batch: Batch, dtype: torch.dtype, rounds: int, name: str) -> dict[str, Any]:
    real = batch["attention_mask"].bool()
    given = batch if name == "ragged" else {"input_ids": batch["input_ids"]}
    runs = {system: (lambda model=model: model(**given).last_hidden_state) for system, model in models.items()}
    states = {system: run() for system, run in runs.items()}
    differences = {s: float((x - states["transformers"])[real].abs().max()) for s, x in states.items()}
    del states
    if name == "ragged":
        parts = buckets(batch)
        runs["sorted"] = lambda: [models["transformers"](**part) for part in parts]
    runs["floor"] = make_floor(models["transformers"].config, dtype, int(real.sum()))
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {system: [] for system in runs}
    for _ in range(rounds):
        for system, run in runs.items():
            seconds[system].append(seconds_of(run))
    ratios = {s: [a / b for a, b in zip(seconds["transformers"], each, strict=True)] for s, each in seconds.items()}
    share = median(a / b for a, b in zip(seconds["floor"], seconds["accelerated"], strict=True))
    return {"seconds": seconds, "ratios": ratios, "differences": differences, "floor": share, "tokens": int(real.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models: dict[str, Any] = make_models(options.layers)
    cells = make_cells(models["transformers"].config.vocab_size)
    found: dict[str, dict[str, Any]] = {}
    systems = ("sorted", "hubmodels", "accelerated")
    print(
        "| dtype, cell | transformers | "
        + " | ".join(systems)
        + " | floor | of the floor |\n|---|---|---|---|---|---|---|"
    )
    for name in options.dtypes:
        dtype = getattr(torch, name)
        of_dtype = {system: model.to(dtype) for system, model in models.items()}
        of_dtype["accelerated"] = hubmodels.accelerate(of_dtype["hubmodels"])
        for cell, batch in cells.items():
            few = cell in ("ragged", "32 x 128")
            with torch.inference_mode():
                result = measure(of_dtype, batch, dtype, options.rounds if few else 5 * options.rounds, cell)
            found.setdefault(name, {})[cell] = result
            ratios = {s: f"{median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for s, r in result["ratios"].items()}
            base = f"{1000 * median(result['seconds']['transformers']):.0f} ms"
            columns = [base, *(ratios.get(system, "") for system in systems), ratios["floor"], f"{result['floor']:.0%}"]
            print(f"| {name}, {cell} | " + " | ".join(columns) + " |", flush=True)
    worst = {n: max(max(r["differences"].values()) for r in each.values()) for n, each in found.items()}
    print(f"largest difference of any output: {', '.join(f'{n} {d:.1e}' for n, d in worst.items())}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
