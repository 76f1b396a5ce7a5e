"""Greedy decoding, one prompt, on a CPU: hubmodels against transformers' generate.

    python benchmarks/decoding.py [--rounds N] [--threads N] [--prompt N] [--new N]

A GPT-2 (124 M) of random weights, the same in both libraries, in float32 and in bfloat16. Every round runs hubmodels
and transformers, with its dynamic and with its static cache, in turn and in one process; the ratio is the median over
the rounds of tokens/s against the faster of the two caches in that round. hubmodels runs twice: as it is, its time
with the packing of the weights in it, and after hubmodels.accelerate, which has packed them before; transformers runs
without compilation. Share: bytes of weights that a token needs, times tokens/s, over the rate at which torch sums up
1 GB. Equal: leading tokens that are the accelerated model's. Right: tokens that the same weights choose in float32
after the same text; in bfloat16 rounding decides between near words. Nothing is asserted.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hubmodels


def make_models(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One set of random weights: ours, theirs."""
    from transformers import GPT2Config, GPT2LMHeadModel, utils

    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).eval().to(dtype)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = hubmodels.gpt2(directory, dtype=dtype)
        # Some parameters are views of the mapped file, which goes with the directory.
        for parameter in ours.parameters():
            parameter.data = parameter.data.clone()
    return ours, theirs


def read_bandwidth() -> float:
    """Bytes a second"""
    numbers, seconds = torch.ones(2**28), []
    for _ in range(7):
        begun = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begun)
    return numbers.nbytes / median(seconds)


@torch.inference_mode()
def judged(judge: torch.nn.Module, ids: torch.Tensor, tokens: list[int]) -> int:
    """How many of `tokens` the judge would have chosen after all before them."""
    whole = torch.cat([ids, torch.tensor([tokens])], 1)
    chosen = judge(whole).logits.argmax(-1)[0, ids.shape[1] - 1 : -1]
    return int((chosen == whole[0, ids.shape[1] :]).sum())


def measure(dtype: torch.dtype, rounds: int, prompt: int, new: int) -> None:
    """Print one dtype's table."""
    ours, theirs = make_models(dtype)
    fast = hubmodels.accelerate(ours)
    ids = torch.randint(0, ours.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))

    def transformers(**cache) -> list[int]:
        mask = torch.ones_like(ids)
        found = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **cache)
        return found[0, prompt:].tolist()

    systems = {
        "hubmodels": lambda: ours.generate(ids, max_new_tokens=new)[0].ids,
        "hubmodels, accelerated": lambda: fast.generate(ids, max_new_tokens=new)[0].ids,
        "transformers, dynamic cache": transformers,
        "transformers, static cache": lambda: transformers(cache_implementation="static", disable_compile=True),
    }
    tokens = {name: run() for name, run in systems.items()}  # warms up, too
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            begun = time.perf_counter()
            run()
            speeds[name].append(new / (time.perf_counter() - begun))
    judge = copy.deepcopy(ours).float()
    needed = sum(p.nbytes for p in ours.parameters()) - ours.transformer.embeddings.position.weight.nbytes
    bandwidth = read_bandwidth()
    print(f"\n{dtype}: {needed / 1e6:.0f} MB of weights a token, read at {bandwidth / 1e9:.1f} GB/s")
    for name, found in speeds.items():
        pairs = zip(tokens[name], tokens["hubmodels, accelerated"], strict=True)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), new)
        share = median(found) * needed / bandwidth
        right = judged(judge, ids, tokens[name])
        speed = f"{median(found):6.1f} tokens/s  share {share:.2f}"
        print(f"  {name:<28} {speed}  equal {equal}  right {right} of {new}")
    best = [max(pair) for pair in zip(*list(speeds.values())[2:], strict=True)]
    for name in list(systems)[:2]:
        ratios = [a / b for a, b in zip(speeds[name], best, strict=True)]
        print(f"  {name}: {median(ratios):.2f} times as fast (rounds: {' '.join(f'{ratio:.2f}' for ratio in ratios)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"GPT-2 124 M, prompt {options.prompt}, {options.new} new tokens, {options.threads} threads")
    for dtype in (torch.float32, torch.bfloat16):
        measure(dtype, options.rounds, options.prompt, options.new)


if __name__ == "__main__":
    main()
