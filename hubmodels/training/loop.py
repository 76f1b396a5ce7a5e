"""The loop of pretraining: optimisers, learning rate, steps, checkpoints. On one machine, in bfloat16 autocast."""

import argparse
import os
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Batches(Protocol):
    """Batch number n, the arguments of a model's forward with its labels: a function of n and nothing else."""

    def batch(self, number: int) -> dict[str, Tensor]: ...


def optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for tables, norms and biases.

    Muon (Jordan 2024) orthogonalises a matrix's momentum; with steps scaled as Liu et al. 2025 (arXiv 2502.16982, §2.2)
    propose, both take one learning rate.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    inside = {id(p) for p in matrices}
    tables = [p for p in model.parameters() if p.dim() == 2 and id(p) not in inside]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True),
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear up over `warmup` steps, then linear down to 0 at `steps`."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def save_atomically(content: object, path: Path) -> None:
    """torch.save to `path`, or leave what was there."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def train(model: nn.Module, batches: Batches, options: argparse.Namespace, checkpoint: Path) -> dict[str, float]:
    """Run the steps that `checkpoint` has not seen yet. Returns what it took: tokens and seconds, over all runs."""
    optimisers = optimizers(model, options.lr, options.weight_decay)
    spent: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        spent = saved["spent"]
        print(f"going on from step {spent['step']}", flush=True)
    model.train()
    before, begun = spent["seconds"], time.monotonic()
    for step in range(spent["step"], options.steps):
        batch = batches.batch(step)
        rate = learning_rate(step, options.steps, options.lr, options.warmup)
        loss = train_step(model, batch, optimisers, rate)
        spent["tokens"] += (
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        )
        spent["step"], spent["seconds"] = step + 1, before + time.monotonic() - begun
        if (step + 1) % 50 == 0:
            speed = spent["tokens"] / spent["seconds"]
            print(f"step {step + 1}/{options.steps}  loss {loss:.3f}  lr {rate:.2e}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            states = [optimiser.state_dict() for optimiser in optimisers]
            save_atomically({"model": model.state_dict(), "optimisers": states, "spent": spent}, checkpoint)
    return spent


def train_step(
    model: nn.Module, batch: dict[str, Tensor], optimisers: list[torch.optim.Optimizer], rate: float
) -> float:
    """One update. Returns the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every run is told: text, shape of the model, length of the run."""
    add = parser.add_argument
    add("--text", type=Path, required=True, help="books, one after another, .txt or .txt.xz")
    add("--hold-out", action="append", default=[], metavar="TITLE", help="a book to evaluate on; may be repeated")
    add("--out", type=Path, required=True, help="directory of the run")
    add("--steps", type=int, required=True)
    add("--rows", type=int, default=32, help="rows in a batch")
    add("--length", type=int, default=128, help="tokens in a row")
    add("--lr", type=float, default=2e-3)
    add("--warmup", type=int, default=200, help="steps")
    add("--weight-decay", type=float, default=0.05)
    add("--vocab-size", type=int, default=8192)
    add("--hidden-size", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=250, help="steps between checkpoints")


def split_books(books: list[tuple[str, list[str]]], hold_out: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Books -> those to train on, those held out because their title has one of `hold_out` in it."""
    held_out = [text for title, text in books if any(name in title for name in hold_out)]
    training = [text for title, text in books if not any(name in title for name in hold_out)]
    print(f"{len(training)} documents to train on, {len(held_out)} held out", flush=True)
    return training, held_out
