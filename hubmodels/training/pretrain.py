"""Pretrain a small BERT from scratch: masked words and next sentences, on one machine.

    python -m hubmodels.training.pretrain --text books.txt.xz --hold-out "Treasure Island" --out runs/nano --steps 5000

makes a vocabulary, trains, evaluates on the books held out, and leaves config.json, model.safetensors, tokenizer.json
and metrics.json in --out, the weights in half precision. Stopped at any point, the same command goes on from the last
checkpoint.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from ..families.bert import BertConfig, BertForPreTraining
from ..heads import IGNORED
from ..layers import initialise
from ..saving import export
from ..tokenizers import WordPieceTokenizer, train_word_piece
from .data import Corpus, PretrainingBatches, read_books, sentences
from .loop import add_arguments, split_books, train


@torch.no_grad()
def look_at_neighbours(model: BertForPreTraining, layers: int = 2, sharpness: float = 8.0, size: float = 0.06) -> None:
    """Start with heads that look at the neighbouring words, one or two to the left or right.

    A BERT that starts from noise spends millions of words at the loss of a unigram model, until some heads have found
    out that neighbours matter. So positions start as sinusoids in the first K dimensions, where turning by an angle is
    a step to the side (Vaswani 2017 §3.5), and in the first layers queries and keys start as the identity there, keys
    turned by each head's offset. Everything is trained on from there; mimetic initialisation (Trockman and Kolter 2023,
    arXiv 2305.09828) is the same thought. sharpness: the score of the offset before the softmax; size: of a position.
    """
    table, heads = model.transformer.embeddings.position.weight, model.config.num_attention_heads
    positions, width = table.shape
    head = width // heads  # K
    frequencies = math.pi * 30.0 ** (-torch.arange(head // 2) / (head // 2))
    angles = torch.arange(positions)[:, None] * frequencies
    table.zero_()
    table[:, :head] = torch.cat([angles.sin(), angles.cos()], 1) * size * math.sqrt(2)
    word = width * model.config.initializer_range**2  # squared length of a word's vector, before the norm
    share = head * size**2 / (head * size**2 + word)  # of a position in the squared length of a state, D
    scale = math.sqrt(sharpness * math.sqrt(head) / (share * width))
    for layer in model.transformer.layers[:layers]:
        query, key, _ = layer.get_parameter("attention.qkv.weight").chunk(3)
        for number in range(heads):
            offset = (-1, 1, -2, 2)[number % 4]
            cos, sin = (offset * frequencies).cos().diag(), (offset * frequencies).sin().diag()
            rows = slice(number * head, (number + 1) * head)
            query[rows, :head] += scale * torch.eye(head)
            key[rows, :head] += scale * torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


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


def main(arguments: list[str] | None = None) -> None:
    """The whole run: vocabulary, training, evaluation, export."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    books = [(title, sentences(text)) for title, text in read_books(options.text)]
    training, held_out = split_books(books, options.hold_out)

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
    add_arguments(parser)
    parser.add_argument("--mask-rate", type=float, default=0.3)
    parser.add_argument("--vocabulary", type=Path, help="a vocab.txt; if not given one is made from the text")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
