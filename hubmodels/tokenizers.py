"""Text -> tensors, on the `tokenizers` library.

WordPiece as BERT uses it: Wu et al. 2016; google-research/bert, tokenization.py. Ids equal those of transformers'
BertTokenizer.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, HubModelsError, InputError

SPECIAL = PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"


def _library():
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise HubModelsError("the tokenizers need the package 'tokenizers': pip install tokenizers") from error
    return tokenizers


class WordPieceTokenizer:
    """BERT's tokenizer: `tokenizer(texts, pairs) -> {"input_ids", "attention_mask", "token_type_ids"}`.

    Build it with `from_vocab` or `from_json`. `inner` is the `tokenizers.Tokenizer` that does the work.
    """

    def __init__(self, inner: Any, source: str = "tokenizer"):
        _check_special(inner.token_to_id, source)
        self.inner = inner
        self.mask_token = MASK
        self.pad_token_id, self.unk_token_id, self.cls_token_id, self.sep_token_id, self.mask_token_id = (
            inner.token_to_id(token) for token in SPECIAL
        )
        inner.no_truncation()
        inner.no_padding()

    @classmethod
    def from_vocab(
        cls, path: str | Path, *, lower_case: bool = True, strip_accents: bool | None = None, split_chinese: bool = True
    ) -> "WordPieceTokenizer":
        """Read vocab.txt, one token a line; a token's id is its line, counted from 0.

        lower_case: as the vocabulary was made. strip_accents: None follows lower_case. split_chinese: each Chinese
        character is a word.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: expected a vocab.txt, a token a line in UTF-8: {error}") from None
        vocab = {token.removesuffix("\r"): i for i, token in enumerate(lines)}
        _check_special(vocab.get, str(path))
        return cls(_word_piece(vocab, lower_case, strip_accents, split_chinese), str(path))

    @classmethod
    def from_json(cls, path: str | Path) -> "WordPieceTokenizer":
        """Read tokenizer.json, the `tokenizers` library's own file."""
        try:
            return cls(_library().Tokenizer.from_file(str(path)), str(path))
        except HubModelsError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: expected a tokenizer.json of the tokenizers library: {error}") from error

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
        columns = [check_texts("texts", texts)] + ([] if pairs is None else [check_texts("pairs", pairs)])
        if len(columns[0]) != len(columns[-1]):
            raise InputError(f"pairs: expected {len(columns[0])}, one for each text, got {len(columns[-1])}")
        if not columns[0]:
            raise InputError("texts: expected at least one text, got an empty list")
        if max_length is not None and max_length < 1 + len(columns):
            raise InputError(
                f"max_length = {max_length}: expected at least {1 + len(columns)}, the special tokens alone"
            )
        # The library's own truncation makes every combination of what it cuts off: hours, for two long texts.
        encoded = [self.inner.encode_batch(column, add_special_tokens=False) for column in columns]
        ids, types, places = zip(*(self._row(parts, max_length) for parts in zip(*encoded, strict=True)), strict=True)
        tensors = {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "token_type_ids": _padded(types, 0),
        }
        if offsets:
            tensors["offset_mapping"] = _padded(places, (0, 0))
        return tensors

    def _row(self, parts: Sequence[Any], max_length: int | None) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """One text or two, as the library encodes them -> ids, types and offsets of [CLS] first [SEP] second [SEP]."""
        ids, types, places = [self.cls_token_id], [0], [(0, 0)]
        for number, (part, keep) in enumerate(zip(parts, _keep([len(p) for p in parts], max_length), strict=True)):
            ids += [*part.ids[:keep], self.sep_token_id]
            types += [number] * (keep + 1)
            places += [*part.offsets[:keep], (0, 0)]
        return ids, types, places

    def decode(self, ids: Tensor | Iterable[int], skip_special_tokens: bool = True) -> str:
        """[S] -> text"""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def tokens(self, ids: Tensor | Iterable[int]) -> list[str]:
        """[S] -> the vocabulary's entries, ## and all"""
        return [self.inner.id_to_token(int(i)) for i in ids]

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        self.inner.no_truncation()
        self.inner.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def __getstate__(self) -> dict[str, str]:
        return {"json": self.inner.to_str()}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__ = WordPieceTokenizer(_library().Tokenizer.from_str(state["json"])).__dict__


def train_word_piece(texts: Iterable[str], size: int, *, lower_case: bool = True) -> WordPieceTokenizer:
    """A vocabulary of `size` tokens made from `texts`. The library breaks ties by chance: keep what it finds."""
    inner = _word_piece({token: i for i, token in enumerate(SPECIAL)}, lower_case, None, True)
    trainer = _library().trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), continuing_subword_prefix="##", show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    # The trainer leaves its own model behind: put the vocabulary it found into one with our limits.
    return WordPieceTokenizer(_word_piece(inner.get_vocab(), lower_case, None, True))


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
