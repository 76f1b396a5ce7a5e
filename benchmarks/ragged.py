"""Throughput on texts of very different lengths, padded into one batch: hubmodels against transformers, float32, CPU.

    python benchmarks/ragged.py [--rounds N] [--threads N] [--layers N]

64 rows of log-normal lengths between 8 and 512 tokens, about 70 % of the batch padding, through a BERT-base of random
weights. Both libraries hold the same weights, get the same input_ids and attention_mask, and run in one process, in
turn; transformers with its sdpa attention. Tokens/s counts real tokens, median over the rounds; the ratio is the median
of each round's ratio. The difference is the largest of last_hidden_state at real tokens. Nothing is asserted.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hubmodels

ROWS = 64


def make_batch(vocabulary: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S]"""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(ROWS).log_normal_(4.8, 0.8, generator=generator).long().clamp(8, 512)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(1, vocabulary, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def make_models(layers: int) -> dict[str, torch.nn.Module]:
    """One set of random weights, in both libraries."""
    from transformers import BertConfig, BertModel, utils

    utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(num_hidden_layers=layers, attn_implementation="sdpa")).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = hubmodels.bertModel(directory)
        # The parameters are views of the mapped file, which goes with the directory.
        for parameter in ours.parameters():
            parameter.data = parameter.data.clone()
    return {"transformers": theirs, "hubmodels": ours}


@torch.inference_mode()
def run(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Seconds, last_hidden_state [B, S, D]"""
    begun = time.perf_counter()
    states = model(**batch).last_hidden_state
    return time.perf_counter() - begun, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = make_models(options.layers)
    batch = make_batch(models["transformers"].config.vocab_size)
    real = batch["attention_mask"].bool()
    tokens, share = int(real.sum()), 1 - real.float().mean().item()
    print(f"{ROWS} rows, {real.shape[1]} columns, {tokens} tokens, {share:.0%} padding")
    print(f"{options.layers} layers of BERT-base, float32, {options.threads} threads, {options.rounds} rounds")

    states = {name: run(model, batch)[1] for name, model in models.items()}  # warms up, too
    difference = (states["hubmodels"] - states["transformers"])[real].abs().max().item()
    del states
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            seconds[name].append(run(model, batch)[0])
    for name, found in seconds.items():
        print(f"{name:14}{tokens / median(found):9.0f} tokens/s")
    ratio = median(t / o for t, o in zip(seconds["transformers"], seconds["hubmodels"], strict=True))
    print(f"hubmodels is {ratio:.2f} times as fast; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
