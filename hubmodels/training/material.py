"""What a run works on: the tokenizer, the texts as tokens, the samples of an objective, and the model."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import store
from ..conversion import opened
from ..errors import InputError
from ..families.bert import BertForMaskedLM, BertForPreTraining
from ..hub.families import ENTRY_POINTS, family_named, family_of
from ..layers import initialise
from ..loading import load_model, load_tokenizer
from ..local import read_json
from ..tokenizers import Tokenizer, WordPieceTokenizer, read_tokenizer, train_byte_pair, train_word_piece
from ..vocabulary import read_words, resize_vocabulary
from .corpus import Corpus, prepare
from .distributed import World
from .google_pairs import GooglePairs
from .masking import Masker, Masking
from .options import Options
from .samples import MaskedText, RunningText, Samples, SentencePairs
from .start import look_at_neighbours
from .text import TextOptions, find_files, read_sentences

HELD_OUT, GENERAL = "held-out", "general"
EXAM_RATE = 0.15  # of the words of a held-out text are hidden, whatever the training hides: runs can be compared
CAUSAL = ("gpt", "gpt2")  # families that say the next word


class Words(NamedTuple):
    """A tokenizer; and of the words that were added to it, what each was made of before."""

    tokenizer: Tokenizer
    pieces: Mapping[int, Sequence[int]]


class Texts(NamedTuple):
    """train: to learn from. exams: held-out texts by their names; the first decides which checkpoint is best."""

    train: Corpus
    exams: dict[str, Corpus]


def family_in(options: Options) -> str:
    """The manifest's name of the family that is trained. Raises InputError for one that has no such training."""
    if options.weights is not None:
        said = family_of(options.weights)
    else:
        said = family_named(read_json(options.config or Path()).get("model_type", "bert"))
    if said not in ENTRY_POINTS:
        raise InputError(f"{options.config or options.weights}: expected a {', '.join(ENTRY_POINTS)}, got a {said}")
    fits = "causal" if said in CAUSAL else "mlm"
    if options.objective not in (None, fits):
        raise InputError(f"--objective {options.objective}: a {said} learns by {fits}")
    return said


def words_in(options: Options, world: World) -> Words:
    """The tokenizer that is given, or made of the text by the first rank; with the words of --add-tokens."""
    if options.train_tokenizer is None:
        tokenizer = load_tokenizer(Tokenizer, options.tokenizer or options.weights or "")
    else:
        path = options.out / "tokenizer.json"
        if world.is_main and not path.exists():
            partial = path.with_name(path.name + ".partial")
            _made_of_text(options).save(partial)
            partial.replace(path)
        world.barrier()
        tokenizer = read_tokenizer(path)
    if options.add_tokens is None:
        return Words(tokenizer, {})
    if not isinstance(tokenizer, WordPieceTokenizer):
        raise InputError(
            "--add-tokens: whole words are for WordPiece vocabularies; byte pairs have a piece for every text"
        )
    return Words(*tokenizer.with_words(read_words(options.add_tokens)))


def _made_of_text(options: Options) -> Tokenizer:
    texts, size = _sentences(options), options.train_tokenizer or 0
    if family_in(options) in CAUSAL:
        return train_byte_pair((f"{sentence}\n" for sentence in texts), size)
    return train_word_piece(texts, size, lower_case=not options.cased)


def _sentences(options: Options) -> Iterator[str]:
    for path in find_files(options.train):
        yield from (sentence for sentence in read_sentences(path, _reading(options)) if sentence is not None)


def _reading(options: Options, held_out: bool = False) -> TextOptions:
    return TextOptions(options.form, options.text_key, options.document_end, options.eval_share, held_out)


def texts_in(options: Options, tokenizer: Tokenizer, progress: bool) -> Texts:
    """The texts as tokens, made if they are not there yet."""

    def tokens(patterns: Sequence[str], reading: TextOptions) -> Corpus:
        place, anew = cache_of(options) / "corpora", options.overwrite_cache
        return prepare(find_files(patterns), tokenizer, reading, place, overwrite=anew, progress=progress)

    plain = _reading(options)._replace(share=0.0)
    exams = {HELD_OUT: tokens(options.eval, plain)} if options.eval else {}
    if options.eval_share:
        exams[HELD_OUT] = tokens(options.train, _reading(options, held_out=True))
    if options.general:
        exams[GENERAL] = tokens(options.general, plain)
    return Texts(tokens(options.train, _reading(options)), exams)


def cache_of(options: Options) -> Path:
    """Where what is made of texts is kept."""
    return store.root_of(options.cache)


def pairs_in(options: Options, family: str, corpus: Corpus) -> str:
    """What is asked about two sentences: one of `options.NSP`.

    If nothing is said: strict, where the text has documents and a checkpoint that goes on has a head for the answer.
    """
    if family in CAUSAL:
        return "none"
    if options.nsp is not None:
        return options.nsp
    can = options.form != "lines" and len(corpus.documents) > 2
    return "strict" if can and (options.weights is None or _has_pairs(options.weights)) else "none"


def _has_pairs(weights: str) -> bool:
    with opened(weights) as found:
        return issubclass(found.contents.cls, BertForPreTraining)


def samples_in(corpus: Corpus, tokenizer: Tokenizer, length: int, options: Options, pairs: str) -> Samples:
    """What is learned from."""
    if not isinstance(tokenizer, WordPieceTokenizer):
        return RunningText(corpus, length, options.seed)
    rate, whole, short, seed = options.mlm_probability, options.whole_word_mask, options.short_rows, options.seed
    if pairs == "google":
        cache = cache_of(options) / "google"
        return GooglePairs(corpus, tokenizer, length, seed, rate=rate, short=short, whole_words=whole, cache_dir=cache)
    words = read_words(options.word_list) if options.word_list else None
    masker = Masker(tokenizer, Masking(rate, whole_words=whole, longest=options.ngram), words)
    if pairs == "none":
        return MaskedText(corpus, tokenizer, masker, length, seed)
    return SentencePairs(corpus, tokenizer, masker, length, seed, order=pairs == "sop", short=short)


def exam_in(corpus: Corpus, tokenizer: Tokenizer, length: int, pairs: str) -> Samples:
    """What a held-out text is asked, the same in all runs that read the same tokens. Pairs need two documents."""
    if not isinstance(tokenizer, WordPieceTokenizer):
        return RunningText(corpus, length, 0)
    masker = Masker(tokenizer, Masking(EXAM_RATE))
    if pairs == "none" or (pairs != "sop" and len(corpus.documents) < 3):
        return MaskedText(corpus, tokenizer, masker, length, 0)
    return SentencePairs(corpus, tokenizer, masker, length, 0, order=pairs == "sop", short=0.0)


def model_in(options: Options, family: str, words: Words, pairs: str) -> Any:
    """The model in train mode, in float32 on the CPU: the same on every rank."""
    model = (
        _new(options, family, words.tokenizer, pairs) if options.weights is None else _loaded(options, family, pairs)
    )
    longest = max(length for length, _ in options.length)
    if longest > (positions := model.config.max_position_embeddings):
        raise InputError(f"--length {longest}: the model has {positions} positions")
    if words.pieces:
        size = max(words.tokenizer.vocab_size, model.config.vocab_size)
        model = resize_vocabulary(model, size, words.pieces)
    if (size := model.config.vocab_size) < words.tokenizer.vocab_size:
        raise InputError(f"the model has {size} words, but the tokenizer {words.tokenizer.vocab_size}")
    if isinstance(model, BertForPreTraining) and pairs == "none":  # nothing teaches these: they stay as they are
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("transformer.pooler.", "next_sentence.")))
    model.gradient_checkpointing = options.gradient_checkpointing
    return model.train()


def _loaded(options: Options, family: str, pairs: str) -> Any:
    weights, entries = options.weights or "", ENTRY_POINTS[family]
    if family in CAUSAL:
        cls: Any = entries.classes[0]
    else:
        cls = BertForPreTraining if pairs != "none" or _has_pairs(weights) else BertForMaskedLM
    return load_model(cls, entries.family, weights, **_dropout(options, entries.family.config))


def _new(options: Options, family: str, tokenizer: Tokenizer, pairs: str) -> Any:
    entries, path = ENTRY_POINTS[family], options.config or Path()
    cls: Any = entries.classes[0]
    published = {"model_type": entries.family.config.MODEL_TYPE, "vocab_size": tokenizer.vocab_size, **read_json(path)}
    config: Any = entries.family.config.from_published(published, str(path))
    config = dataclasses.replace(config, **_dropout(options, entries.family.config))
    if family not in CAUSAL:
        cls = BertForMaskedLM if pairs == "none" else BertForPreTraining
    model = cls(config)
    initialise(model, config.initializer_range, torch.Generator().manual_seed(options.seed))
    if options.start == "neighbours":
        if family in CAUSAL:
            raise InputError("--start neighbours: it is for encoders")
        look_at_neighbours(model)
    return model


def _dropout(options: Options, config: Any) -> dict[str, Any]:
    """For every field of the config that is one, but a classifier's"""
    names = [name for name in config.ADJUSTABLE if name.endswith("dropout_prob") and "summary" not in name]
    return {} if options.dropout is None else dict.fromkeys(names, options.dropout)
