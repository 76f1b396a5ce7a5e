"""Pretrain a small GPT from scratch: the next word, on one machine.

    python -m hubmodels.training.pretrain_gpt --text books.txt.xz --hold-out "Treasure Island" --out runs/nano --steps 9

makes a byte-level vocabulary, trains, evaluates on the books held out, and leaves config.json, model.safetensors,
vocab.json, merges.txt and metrics.json in --out, the weights in half precision. Stopped at any point, the same command
goes on from the last checkpoint.
"""

import argparse
import json
import math
import os

import torch

from ..errors import InputError
from ..families.gpt import Gpt, GptConfig
from ..layers import initialise
from ..saving import export
from ..tasks import perplexity
from ..tokenizers import BytePairTokenizer, train_byte_pair
from .data import LanguageModelBatches, read_books
from .loop import add_arguments, split_books, train


def main(arguments: list[str] | None = None) -> None:
    """The whole run: vocabulary, training, evaluation, export."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    training, held_out = split_books(list(read_books(options.text)), options.hold_out)
    if not held_out:
        raise InputError("hold-out: expected the title of at least one of the books, to evaluate on")
    vocab, merges = options.out / "vocab.json", options.out / "merges.txt"
    if not merges.exists():
        made = train_byte_pair((paragraph for book in training for paragraph in book), options.vocab_size)
        for partial, path in zip(made.inner.model.save(str(options.out), "partial"), (vocab, merges), strict=True):
            os.replace(partial, path)
    tokenizer = BytePairTokenizer.from_files(vocab, merges)
    documents = ["\n".join(book) for book in training]
    batches = LanguageModelBatches(documents, tokenizer, rows=options.rows, length=options.length, seed=options.seed)
    print(f"{len(batches.ids)} tokens, {len(batches)} batches in an epoch", flush=True)

    config = GptConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        hidden_dropout_prob=0.0,  # one pass over the text: nothing to overfit
        embedding_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=options.length,
    )
    model = Gpt(config)
    initialise(model, config.initializer_range, torch.Generator().manual_seed(options.seed))
    spent = train(model, batches, options, options.out / "checkpoint.pt")
    model.half().float().eval()  # what is shipped is measured
    figures = {**evaluate(model, tokenizer, held_out), **spent, "epochs": options.steps / len(batches)}
    export(model.half(), options.out)
    (options.out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def evaluate(model: Gpt, tokenizer: BytePairTokenizer, documents: list[list[str]]) -> dict[str, float]:
    """Held-out figures: over all the documents' tokens and bytes, each document read as `tasks.perplexity` reads it."""
    texts = ["\n".join(document) for document in documents]
    found = [perplexity(model, tokenizer, text) for text in texts]
    nats, tokens = math.fsum(f.nats for f in found), sum(f.tokens for f in found)
    size = sum(len(text.encode()) for text in texts)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / tokens),
        "held_out_tokens": tokens,
        "held_out_bytes": size,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hubmodels.training.pretrain_gpt", description=__doc__.splitlines()[0]
    )
    add_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
