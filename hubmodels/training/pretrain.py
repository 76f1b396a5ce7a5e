"""Pretrain a small BERT from scratch: masked words and next sentences, on one machine.

    python -m hubmodels.training.pretrain --text books.txt.xz --hold-out "Treasure Island" --out runs/nano --steps 5000

makes a vocabulary, trains, evaluates on the books held out, and leaves config.json, model.safetensors, tokenizer.json
and metrics.json in --out, the weights in half precision. Stopped at any point, the same command goes on from the last
checkpoint.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..families.bert import BertConfig, BertForPreTraining
from ..heads import IGNORED
from ..layers import initialise
from ..loading import export
from ..tokenizers import WordPieceTokenizer, train_word_piece
from .data import Corpus, PretrainingBatches, read_books


@torch.no_grad()
def look_at_neighbours(model: BertForPreTraining, layers: int = 2, sharpness: float = 8.0, size: float = 0.06) -> None:
    """Start with heads that look at the neighbouring words, one or two to the left or right.

    A BERT that starts from noise spends millions of words at the loss of a unigram model, until some heads have found
    out that neighbours matter. So positions start as sinusoids in the first K dimensions, where turning by an angle is
    a step to the side (Vaswani 2017 §3.5), and in the first layers queries and keys start as the identity there, keys
    turned by each head's offset. Everything is trained on from there; mimetic initialisation (Trockman and Kolter 2023,
    arXiv 2305.09828) is the same thought. sharpness: the score of the offset before the softmax; size: of a position.
    """
    table, heads = model.encoder.embeddings.position.weight, model.config.num_attention_heads
    positions, width = table.shape
    head = width // heads  # K
    frequencies = math.pi * 30.0 ** (-torch.arange(head // 2) / (head // 2))
    angles = torch.arange(positions)[:, None] * frequencies
    table.zero_()
    table[:, :head] = torch.cat([angles.sin(), angles.cos()], 1) * size * math.sqrt(2)
    word = width * model.config.initializer_range**2  # squared length of a word's vector, before the norm
    share = head * size**2 / (head * size**2 + word)  # of a position in the squared length of a state, D
    scale = math.sqrt(sharpness * math.sqrt(head) / (share * width))
    for layer in model.encoder.layers[:layers]:
        query, key, _ = layer.get_parameter("attention.qkv.weight").chunk(3)
        for number in range(heads):
            offset = (-1, 1, -2, 2)[number % 4]
            cos, sin = (offset * frequencies).cos().diag(), (offset * frequencies).sin().diag()
            rows = slice(number * head, (number + 1) * head)
            query[rows, :head] += scale * torch.eye(head)
            key[rows, :head] += scale * torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


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


@torch.no_grad()
def evaluate(model: BertForPreTraining, batches: PretrainingBatches) -> dict[str, float]:
    """Held-out figures over one epoch of `batches`, whose masks its seed fixes. Means are over words, or pairs."""
    model.eval()
    totals = dict.fromkeys(("words", "right", "loss", "pairs", "pairs_right"), 0.0)
    answers = torch.zeros(batches.tokenizer.vocab_size, dtype=torch.long)
    for number in range(len(batches)):
        batch = batches.batch(number)
        follows = batch.pop("next_sentence_label")
        output = model(**batch)
        labels = batch["labels"][batch["labels"] != IGNORED]  # [M]
        answers += labels.bincount(minlength=len(answers))
        totals["words"] += len(labels)
        totals["right"] += (output.prediction_logits.argmax(-1) == labels).sum().item()
        totals["loss"] += output.loss.item() * len(labels)
        totals["pairs"] += len(follows)
        totals["pairs_right"] += (output.seq_relationship_logits.argmax(-1) == follows).sum().item()
    model.train()
    return {
        "masked_accuracy": totals["right"] / totals["words"],
        "masked_loss": totals["loss"] / totals["words"],
        "next_sentence_accuracy": totals["pairs_right"] / totals["pairs"],
        "commonest_token_accuracy": answers.max().item() / totals["words"],
        "masked_words": int(totals["words"]),
        "pairs": int(totals["pairs"]),
    }


def save_atomically(content: object, path: Path) -> None:
    """torch.save to `path`, or leave what was there."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def train(
    model: BertForPreTraining, batches: PretrainingBatches, options: argparse.Namespace, checkpoint: Path
) -> dict[str, float]:
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
        spent["tokens"] += int(batch["attention_mask"].sum())
        spent["step"], spent["seconds"] = step + 1, before + time.monotonic() - begun
        if (step + 1) % 50 == 0:
            speed = spent["tokens"] / spent["seconds"]
            print(f"step {step + 1}/{options.steps}  loss {loss:.3f}  lr {rate:.2e}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            states = [optimiser.state_dict() for optimiser in optimisers]
            save_atomically({"model": model.state_dict(), "optimisers": states, "spent": spent}, checkpoint)
    return spent


def train_step(
    model: BertForPreTraining, batch: dict[str, Tensor], optimisers: list[torch.optim.Optimizer], rate: float
) -> float:
    """One update. Returns the loss, masked words and next sentence together."""
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


def main(arguments: list[str] | None = None) -> None:
    """The whole run: vocabulary, training, evaluation, export."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    books = list(read_books(options.text))
    held_out = [text for title, text in books if any(name in title for name in options.hold_out)]
    training = [text for title, text in books if not any(name in title for name in options.hold_out)]
    print(f"{len(training)} documents to train on, {len(held_out)} held out", flush=True)

    vocabulary = options.out / "tokenizer.json"
    if vocabulary.exists():
        tokenizer = WordPieceTokenizer.from_json(vocabulary)
    elif options.vocabulary:
        tokenizer = WordPieceTokenizer.from_vocab(options.vocabulary)
    else:
        tokenizer = train_word_piece((sentence for book in training for sentence in book), options.vocab_size)
        tokenizer.save(vocabulary)
    shape = {"rows": options.rows, "length": options.length}
    corpus, unseen = Corpus.build(training, tokenizer), Corpus.build(held_out, tokenizer)
    batches = PretrainingBatches(corpus, tokenizer, **shape, mask_rate=options.mask_rate, seed=options.seed)
    exam = PretrainingBatches(unseen, tokenizer, **shape, mask_rate=0.15, seed=0)
    print(
        f"{len(corpus.ids)} tokens, {len(batches)} batches in an epoch; held out: {len(unseen.ids)} tokens", flush=True
    )

    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden_size,
        hidden_dropout_prob=0.0,  # one pass over the text: nothing to overfit
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=options.length,
        layer_norm_eps=1e-6,  # 1e-12 is lost in half precision
    )
    model = BertForPreTraining(config)
    initialise(model, config.initializer_range, torch.Generator().manual_seed(options.seed))
    look_at_neighbours(model)
    spent = train(model, batches, options, options.out / "checkpoint.pt")
    model.half().float()  # what is shipped is measured
    figures = {**evaluate(model, exam), **spent, "epochs": options.steps / len(batches)}
    export(model.half(), options.out, tokenizer)
    (options.out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hubmodels.training.pretrain", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", type=Path, required=True, help="books, one after another, .txt or .txt.xz")
    add("--hold-out", action="append", default=[], metavar="TITLE", help="a book to evaluate on; may be repeated")
    add("--out", type=Path, required=True, help="directory of the run")
    add("--steps", type=int, required=True)
    add("--rows", type=int, default=32, help="rows in a batch")
    add("--length", type=int, default=128, help="tokens in a row")
    add("--mask-rate", type=float, default=0.3)
    add("--lr", type=float, default=2e-3)
    add("--warmup", type=int, default=200, help="steps")
    add("--weight-decay", type=float, default=0.05)
    add("--vocabulary", type=Path, help="a vocab.txt; if not given one is made from the text")
    add("--vocab-size", type=int, default=8192)
    add("--hidden-size", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
