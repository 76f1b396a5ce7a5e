"""Text -> tensors, on the `tokenizers` library.

WordPiece as BERT uses it: Wu et al. 2016; google-research/bert, tokenization.py. Byte pairs as GPT and GPT-2 use them:
Sennrich et al. 2016; Radford et al. 2019 §2.2; openai/gpt-2, src/encoder.py. Ids equal those of transformers'
BertTokenizer, OpenAIGPTTokenizer and GPT2Tokenizer.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .errors import CheckpointError, HubModelsError, InputError

SPECIAL = PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_CAPITAL = re.compile("[A-Z]")
END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token


def _library():
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise HubModelsError("the tokenizers need the package 'tokenizers': pip install tokenizers") from error
    return tokenizers


class Tokenizer:
    """What the kinds share. `inner` is the `tokenizers.Tokenizer` that does the work."""

    kind: ClassVar[str]  # of `inner`'s model, as the library calls it
    skip_special_tokens: ClassVar[bool]  # by decode, if nothing is said

    def __init__(self, inner: Any, source: str = "tokenizer"):
        found = type(inner.model).__name__
        if found != self.kind:
            raise CheckpointError(f"{source}: expected a tokenizer of kind {self.kind}, got {found}")
        self.inner = inner
        inner.no_truncation()
        inner.no_padding()

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read tokenizer.json, the `tokenizers` library's own file."""
        return cls(_read_json(path), str(path))

    def decode(self, ids: Tensor | Iterable[int], skip_special_tokens: bool | None = None) -> str:
        """[S] -> text. skip_special_tokens None: WordPiece leaves them out; byte pairs give back what was encoded."""
        skip = self.skip_special_tokens if skip_special_tokens is None else skip_special_tokens
        return self.inner.decode(self._row_of_ids(ids), skip_special_tokens=skip)

    def tokens(self, ids: Tensor | Iterable[int]) -> list[str]:
        """[S] -> the vocabulary's entries, ## or </w> and all"""
        return [self.inner.id_to_token(i) for i in self._row_of_ids(ids)]

    def _row_of_ids(self, ids: Tensor | Iterable[int]) -> list[int]:
        """Ids as a list. Raises InputError unless they are one row of entries of the vocabulary."""
        found = ids.tolist() if isinstance(ids, Tensor) else list(ids) if isinstance(ids, Iterable) else None
        row = [int(i) for i in found] if isinstance(found, list) and all(_is_scalar(i) for i in found) else None
        if row is None or any(not 0 <= i < self.vocab_size for i in (min(row, default=0), max(row, default=0))):
            raise InputError(f"ids: expected one row of ids from 0 to {self.vocab_size - 1}, got {ids!r}")
        return row

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        self.inner.no_truncation()
        self.inner.save(str(path))

    def save_files(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the vocabulary, for transformers of any year."""
        directory = Path(directory)
        self.save(directory / "tokenizer.json")
        settings = json.dumps(self._settings(), indent=1, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        self.inner.model.save(str(directory))

    def _settings(self) -> dict[str, Any]:
        """tokenizer_config.json"""
        raise NotImplementedError

    # The names that these had in the original port, whose published examples use them.
    convert_ids_to_tokens = tokens

    def tokenize(self, text: str) -> list[str]:
        """One text -> the vocabulary's entries that it is made of, special tokens not added"""
        return self.inner.encode(check_text("text", text), add_special_tokens=False).tokens

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Entries of the vocabulary -> their ids, one -> its id. Raises InputError for one that is not in it."""
        if isinstance(tokens, str):
            return self.convert_tokens_to_ids([tokens])[0]  # type: ignore[index]
        ids = {token: self.inner.token_to_id(token) for token in tokens}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise InputError(f"tokens: not in the vocabulary: {', '.join(map(repr, missing[:9]))}")
        return [ids[token] for token in tokens]

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def __getstate__(self) -> dict[str, str]:
        return {"json": self.inner.to_str()}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__ = type(self)(_library().Tokenizer.from_str(state["json"])).__dict__

    def _encode(self, name: str, texts: str | Sequence[str], offsets: bool = False) -> list[Any]:
        """Each text as the library encodes it, without special tokens. Without offsets there are ids alone, sooner."""
        encode = self.inner.encode_batch if offsets else self.inner.encode_batch_fast
        return encode(check_texts(name, texts), add_special_tokens=False)


class WordPieceTokenizer(Tokenizer):
    """BERT's tokenizer: `tokenizer(texts, pairs) -> {"input_ids", "attention_mask", "token_type_ids"}`.

    Build it with `from_vocab` or `from_json`.
    """

    kind = "WordPiece"
    skip_special_tokens = True

    def __init__(self, inner: Any, source: str = "tokenizer"):
        _check_special(inner.token_to_id, source)
        super().__init__(inner, source)
        self.mask_token = MASK
        self.pad_token_id, self.unk_token_id, self.cls_token_id, self.sep_token_id, self.mask_token_id = (
            inner.token_to_id(token) for token in SPECIAL
        )

    @classmethod
    def from_vocab(
        cls,
        path: str | Path,
        *,
        lower_case: bool | None = None,
        strip_accents: bool | None = None,
        split_chinese: bool = True,
    ) -> "WordPieceTokenizer":
        """Read vocab.txt, one token a line; a token's id is its line, counted from 0.

        lower_case: as the vocabulary was made; None: unless it has capital letters, which no lower-cased text has.
        strip_accents: None follows lower_case. split_chinese: each Chinese character is a word.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: expected a vocab.txt, a token a line in UTF-8: {error}") from None
        vocab = {token.removesuffix("\r"): i for i, token in enumerate(lines)}
        _check_special(vocab.get, str(path))
        if lower_case is None:
            lower_case = not any(_CAPITAL.search(token) and token[0] not in "[<" for token in vocab)
        return cls(_word_piece(vocab, lower_case, strip_accents, split_chinese), str(path))

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        max_length: int | None = None,
        *,
        offsets: bool = False,
    ) -> dict[str, Tensor]:
        """One text or several -> ids, mask (1 = token, 0 = padding) and token types, each [B, S], padded on the right.

        pairs: the second text of each pair. max_length: tokens to keep of each row, [CLS] and [SEP] included, the
        longer text of a pair shortened first; None keeps all. offsets: add `offset_mapping` [B, S, 2], where each
        token stands in its text, in characters (0, 0 for special tokens).
        Raises InputError for anything but text.
        """
        # The library's own truncation makes every combination of what it cuts off: hours, for two long texts.
        encoded = [self._encode("texts", texts, offsets)]
        encoded += [] if pairs is None else [self._encode("pairs", pairs, offsets)]
        if len(encoded[0]) != len(encoded[-1]):
            raise InputError(f"pairs: expected {len(encoded[0])}, one for each text, got {len(encoded[-1])}")
        if not encoded[0]:
            raise InputError("texts: expected at least one text, got an empty list")
        if max_length is not None and max_length < (least := 1 + len(encoded)):
            raise InputError(f"max_length = {max_length}: expected at least {least}, the special tokens alone")
        ids, types, places = zip(*(self._row(p, max_length, offsets) for p in zip(*encoded, strict=True)), strict=True)
        tensors = {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "token_type_ids": _padded(types, 0),
        }
        if offsets:
            tensors["offset_mapping"] = _padded(places, (0, 0))
        return tensors

    def save_files(self, directory: str | Path) -> None:
        """As `Tokenizer.save_files`; who reads vocab.txt alone has the added words as entries like others."""
        super().save_files(directory)
        known, every = self.inner.get_vocab(with_added_tokens=False), self.inner.get_vocab()
        with open(Path(directory) / "vocab.txt", "a", encoding="utf-8") as file:
            file.writelines(f"{word}\n" for word in sorted(every.keys() - known.keys(), key=every.__getitem__))

    def with_words(self, words: Sequence[str]) -> tuple[Self, dict[int, list[int]]]:
        """A tokenizer that knows more whole words, after those it knows; and of each new id the ids the word had been.

        Texts without them are read as before, words that only begin like them too. Those that it knows are passed over.
        Raises InputError for one that it would part, or take for [UNK], before it looks it up.
        """
        normal = dict.fromkeys(map(self._word, check_texts("words", words)))
        fresh = [word for word in normal if self.inner.token_to_id(word) is None]
        pieces = [self.inner.encode(word, add_special_tokens=False).ids for word in fresh]
        inner = _library().Tokenizer.from_str(self.inner.to_str())
        inner.add_tokens([_library().AddedToken(word, single_word=True, normalized=True) for word in fresh])
        ids = [inner.token_to_id(word) for word in fresh]
        if ids and min(ids) <= max(self.inner.get_vocab().values()):
            raise InputError("words: the vocabulary's ids have a gap, as where a line stands twice: no id is free")
        return type(self)(inner), dict(zip(ids, pieces, strict=True))

    def _word(self, word: str) -> str:
        """As texts have it once they are normalised"""
        normal = self.inner.normalizer.normalize_str(word) if self.inner.normalizer else word
        parts = [part for part, _ in self.inner.pre_tokenizer.pre_tokenize_str(normal)]
        if len(parts) != 1:
            raise InputError(f"words: {word!r}: expected one word, but to this tokenizer it is {parts or 'nothing'}")
        if len(parts[0]) > (most := self.inner.model.max_input_chars_per_word):
            raise InputError(f"words: {word[:40]!r}…: expected at most {most} letters, got {len(parts[0])}")
        return parts[0]

    def _settings(self) -> dict[str, Any]:
        """A tokenizer.json may normalise in other ways than BERT's, which have no setting."""
        names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
        names |= {"tokenize_chinese_chars": "handle_chinese_chars"}
        normalizer = self.inner.normalizer
        found = {theirs: getattr(normalizer, ours) for theirs, ours in names.items() if hasattr(normalizer, ours)}
        tokens = zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)
        return {"tokenizer_class": "BertTokenizer", **found, **{f"{name}_token": token for name, token in tokens}}

    def rows(self, texts: str | Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """The ids of each text, [CLS] and [SEP] included, without padding. max_length: as in a call."""
        if max_length is not None and max_length < 2:
            raise InputError(f"max_length = {max_length}: expected at least 2, the special tokens alone")
        most = None if max_length is None else max_length - 2
        return [[self.cls_token_id, *e.ids[:most], self.sep_token_id] for e in self._encode("texts", texts)]

    def padded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Rows of ids -> input_ids and attention_mask [B, S], padded on the right."""
        ids = _padded(rows, self.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def _row(self, parts: Sequence[Any], max_length: int | None, offsets: bool) -> tuple[list[Any], ...]:
        """One text or two, as the library encodes them -> ids, types, any offsets of [CLS] first [SEP] second [SEP]."""
        ids, types, places = [self.cls_token_id], [0], [(0, 0)]
        for number, (part, keep) in enumerate(zip(parts, _keep([len(p) for p in parts], max_length), strict=True)):
            ids += [*part.ids[:keep], self.sep_token_id]
            types += [number] * (keep + 1)
            places += [*part.offsets[:keep], (0, 0)] if offsets else []
        return ids, types, places


class BytePairTokenizer(Tokenizer):
    """GPT's and GPT-2's tokenizer: `tokenizer(texts) -> {"input_ids", "attention_mask"}`.

    Build it with `from_files` or `from_json`. end_token_id: of <|endoftext|>, which parts texts and may begin one; None
    for GPT, whose vocabulary has no such token.
    """

    kind = "BPE"
    skip_special_tokens = False

    def __init__(self, inner: Any, source: str = "tokenizer"):
        super().__init__(inner, source)
        self.end_token_id: int | None = inner.token_to_id(END_OF_TEXT)
        self.pad_token_id = self.end_token_id or 0  # neither was made with padding; the mask says what it is

    @classmethod
    def from_files(cls, vocab: str | Path, merges: str | Path, *, add_prefix_space: bool = False) -> Self:
        """Read OpenAI's two files, encoder.json (vocab.json) and vocab.bpe (merges.txt).

        A vocabulary that has every byte is GPT-2's, byte-level: every text comes back from its ids. One whose words end
        in </w> is GPT's: lower-cased, words parted as BERT parts them. OpenAI's own code repairs text with ftfy and
        parts words with spaCy; this is what the original port does where those two are not installed, and what
        transformers does. add_prefix_space: byte-level, read every text as if a space came before it.
        """
        try:
            entries = json.loads(Path(vocab).read_text(encoding="utf-8"))
            if not isinstance(entries, dict) or not all(type(number) is int for number in entries.values()):
                raise ValueError("it is none")
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{vocab}: expected a JSON object, token -> id: {error}") from None
        try:
            lines = Path(merges).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{merges}: expected a pair of tokens a line, in UTF-8: {error}") from None
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        for pair in pairs:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= entries.keys():
                raise CheckpointError(
                    f"{merges}: {' '.join(pair)!r}: expected two entries of {vocab} which together are a third"
                )
        byte_level = set(_library().pre_tokenizers.ByteLevel.alphabet()) <= entries.keys()
        if not byte_level and not ("<unk>" in entries and any(token.endswith("</w>") for token in entries)):
            raise CheckpointError(
                f"{vocab}: expected GPT-2's kind of vocabulary, with an entry for each of the 256 bytes, or GPT's, "
                "with <unk> and words that end in </w>"
            )
        return cls(_byte_pair(entries, pairs, byte_level, add_prefix_space), f"{vocab}")

    def __call__(
        self, texts: str | Sequence[str], max_length: int | None = None, *, offsets: bool = False
    ) -> dict[str, Tensor]:
        """One text or several -> ids and mask (1 = token, 0 = padding), each [B, S], padded on the right.

        max_length: tokens to keep of each text; None keeps all. offsets: add `offset_mapping` [B, S, 2], where each
        token stands in its text, in characters.
        Raises InputError for anything but text, and for a text without any token: there would be nothing to go on from.
        """
        if max_length is not None and not (type(max_length) is int and max_length >= 1):
            raise InputError(f"max_length = {max_length!r}: expected a whole number, at least 1")
        encoded = self._encode("texts", texts, offsets)
        if not encoded:
            raise InputError("texts: expected at least one text, got an empty list")
        ids = [e.ids[:max_length] for e in encoded]
        for position, row in enumerate(ids):
            if not row:
                raise InputError(f"texts[{position}]: expected text of at least one token, got none")
        tensors = {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
        }
        if offsets:
            tensors["offset_mapping"] = _padded([e.offsets[:max_length] for e in encoded], (0, 0))
        return tensors

    def _settings(self) -> dict[str, Any]:
        if self.inner.model.end_of_word_suffix:
            return {"tokenizer_class": "OpenAIGPTTokenizer", "unk_token": "<unk>"}
        spaced = getattr(self.inner.pre_tokenizer, "add_prefix_space", False)
        names = () if self.end_token_id is None else ("bos_token", "eos_token", "unk_token")
        tokens = dict.fromkeys(names, END_OF_TEXT)
        return {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": spaced, **tokens}


def train_word_piece(texts: Iterable[str], size: int, *, lower_case: bool = True) -> WordPieceTokenizer:
    """A vocabulary of `size` tokens made from `texts`. The library breaks ties by chance: keep what it finds."""
    inner = _word_piece({token: i for i, token in enumerate(SPECIAL)}, lower_case, None, True)
    trainer = _library().trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), continuing_subword_prefix="##", show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    # The trainer leaves its own model behind: put the vocabulary it found into one with our limits.
    return WordPieceTokenizer(_word_piece(inner.get_vocab(), lower_case, None, True))


def train_byte_pair(texts: Iterable[str], size: int) -> BytePairTokenizer:
    """A byte-level vocabulary made from texts: <|endoftext|>, the 256 bytes, and merges up to `size` entries."""
    inner = _byte_pair({}, [], byte_level=True)
    trainer = _library().trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_library().pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return BytePairTokenizer(inner)


def _byte_pair(
    vocab: dict[str, int], merges: list[tuple[str, ...]], byte_level: bool, add_prefix_space: bool = False
) -> Any:
    library = _library()
    if byte_level:
        inner = library.Tokenizer(library.models.BPE(vocab, merges))
        inner.add_special_tokens([END_OF_TEXT] if END_OF_TEXT in vocab else [])
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        inner.decoder = library.decoders.ByteLevel()
        return inner
    inner = library.Tokenizer(library.models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token="<unk>"))
    inner.add_special_tokens(["<unk>"])
    inner.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    inner.decoder = library.decoders.BPEDecoder(suffix="</w>")
    return inner


def _word_piece(vocab: dict[str, int], lower_case: bool, strip_accents: bool | None, split_chinese: bool) -> Any:
    library = _library()
    inner = library.Tokenizer(library.models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100))
    inner.add_special_tokens(list(SPECIAL))
    inner.normalizer = library.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=split_chinese, strip_accents=strip_accents, lowercase=lower_case
    )
    inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    inner.post_processor = library.processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, vocab[CLS]), (SEP, vocab[SEP])],
    )
    inner.decoder = library.decoders.WordPiece(prefix="##")
    return inner


def _check_special(find: Callable[[str], int | None], source: str) -> None:
    missing = [token for token in SPECIAL if find(token) is None]
    if missing:
        raise CheckpointError(f"{source}: the vocabulary lacks {', '.join(missing)}; BERT needs {', '.join(SPECIAL)}")


def _keep(lengths: list[int], max_length: int | None) -> list[int]:
    """Tokens to keep of each text. Of a pair the longer one is cut first, then both (the library's longest_first)."""
    room = sum(lengths) if max_length is None else max_length - 1 - len(lengths)
    if sum(lengths) <= room or len(lengths) == 1:
        return [min(length, room) for length in lengths]
    short = min(*lengths, room // 2)
    return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


def _padded(rows: Sequence[list[Any]], fill: Any) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.long)


def check_texts(name: str, texts: str | Sequence[str]) -> list[str]:
    """One text or several -> a list of them. Raises InputError, naming the place, for what is no Unicode text."""
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise InputError(f"{name}: expected a str or a list of str, got {type(texts).__name__}")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}[{position}]: expected a str, got {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{name}[{position}]: expected Unicode text, but {error}") from None
    return list(texts)


def check_text(name: str, text: str) -> str:
    """One text and no list of them, or InputError."""
    if not isinstance(text, str):
        raise InputError(f"{name}: expected a str, got {type(text).__name__}")
    return check_texts(name, text)[0]


def read_tokenizer(path: Path, merges: Path | None = None, **options: Any) -> Tokenizer:
    """The tokenizer of a vocab.txt, of a vocabulary with its merges, or of a tokenizer.json, whichever kind that is.

    options: of `WordPieceTokenizer.from_vocab` or `BytePairTokenizer.from_files`; a tokenizer.json says everything.
    """
    if merges is not None:
        known = {key: value for key, value in options.items() if key == "add_prefix_space"}
        return BytePairTokenizer.from_files(path, merges, **known)
    if path.suffix != ".json":
        return WordPieceTokenizer.from_vocab(path, **{k: v for k, v in options.items() if k != "add_prefix_space"})
    inner = _read_json(path)
    kinds = {cls.kind: cls for cls in (WordPieceTokenizer, BytePairTokenizer)}
    kind = type(inner.model).__name__
    if kind not in kinds:
        raise CheckpointError(f"{path}: expected a tokenizer of kind {' or '.join(kinds)}, got {kind}")
    return kinds[kind](inner, str(path))


def _read_json(path: str | Path) -> Any:
    """tokenizer.json, as the library reads it"""
    try:
        return _library().Tokenizer.from_file(str(path))
    except HubModelsError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: expected a tokenizer.json of the tokenizers library: {error}") from error


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point())
