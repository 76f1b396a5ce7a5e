"""What is done with whole checkpoints, whatever model is in them: write in another form, average, compare, add words.

Nothing but the parameters' names and shapes is asked of a family, so every dialect and every head goes the same way.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .catalog import manifest, other_version
from .checkpoint.keymap import Match
from .checkpoint.report import Report
from .errors import CatalogError, CheckpointError, InputError
from .heads import Model
from .hub.families import ENTRY_POINTS, EntryPoints, family_named
from .loading import Checkpoint, FileContent, check_dtype, find_checkpoint, new_model, read_content
from .local import local_path
from .saving import LARGEST_FILE, Contents, save
from .tokenizers import Tokenizer, WordPieceTokenizer
from .vocabulary import resized


@dataclass(frozen=True)
class Opened:
    """A checkpoint as it is. tensors: `contents.tensors`, read when asked for."""

    weights: str
    contents: Contents
    tensors: Match
    report: Report
    _tokenizer: Callable[[], Tokenizer | None]

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None if it has none"""
        return self._tokenizer()


@contextmanager
def opened(weights: str | Path, *, cache_dir: str | Path | None = None, progress: bool = True) -> Iterator[Opened]:
    """Everything that the checkpoint `weights` holds: its transformer, and every head that it has all of.

    weights: as for an entry point; or NAME@VERSION, as another version of this repository has it, which torch.hub has
        loaded, or which is a directory.
    Raises a HubModelsError that says what to do.
    """
    with _find(weights) as checkpoint:
        path, _ = checkpoint.fetch(cache_dir, progress)
        entries, content = _family_and_content(checkpoint, path)
        config = entries.family.config.from_published(checkpoint.published, checkpoint.config_source)
        cls, wanted = _class_and_shapes(entries, config, content, checkpoint.published)
        match = content.keys.match(content.tensors, wanted, str(path), origins=content.origins)
        match.check_repeats()
        contents = Contents(entries.family, cls, config, match, checkpoint.published)
        report = content.report(match, wanted)
        yield Opened(checkpoint.weights, contents, match, report, lambda: checkpoint.tokenizer(cache_dir, progress))


def convert(
    weights: str | Path,
    directory: str | Path,
    *,
    form: str = "hf",
    max_file_size: int | str = LARGEST_FILE,
    dtype: torch.dtype | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Write a checkpoint of any dialect as `export` would, with every head and the tokenizer that it has.

    dtype: None keeps what the file has, bit for bit. Returns the account of what was read.
    """
    if dtype is not None:
        check_dtype(dtype)
    with opened(weights, cache_dir=cache_dir, progress=progress) as found:
        tensors = {name: found.tensors.read(name, dtype) for name in found.tensors}
        contents = dataclasses.replace(found.contents, tensors=tensors)
        save(contents, Path(directory), found.tokenizer, form, max_file_size)
        return found.report


def average(
    weights: Sequence[str | Path],
    directory: str | Path,
    *,
    shares: Sequence[float] | None = None,
    form: str = "hf",
    max_file_size: int | str = LARGEST_FILE,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Write the weighted mean of checkpoints of one model: each parameter, in float64, rounded once.

    shares: of each checkpoint; None: equal. They need not be between 0 and 1, but their sum must be 1. Config, dtype
        and tokenizer are the first's.
    Source: Izmailov 2018, Wortsman 2022 (model soups). Raises InputError if they are not of one shape.
    """
    parts = [1 / max(len(weights), 1)] * len(weights) if shares is None else list(shares)
    if not weights or len(parts) != len(weights) or not math.isclose(sum(parts), 1, abs_tol=1e-6):
        raise InputError(f"shares = {parts}: expected one for each of {len(weights)} checkpoints, together 1")
    with ExitStack() as stack:
        found = [stack.enter_context(opened(each, cache_dir=cache_dir, progress=progress)) for each in weights]
        first = found[0]
        for other in found[1:]:
            _check_same(first, other)
        sides = [_bare(each) for each in found]
        bare = {name: name.removeprefix(first.contents.family.keys.prefix[0]) for name in first.tensors}
        tensors = {name: _mean([_read(side[bare[name]]) for side in sides], parts) for name in first.tensors}
        contents = dataclasses.replace(first.contents, tensors=tensors)
        return save(contents, Path(directory), first.tokenizer, form, max_file_size)


def interpolate(one: str | Path, other: str | Path, at: float, directory: str | Path, **options: Any) -> Path:
    """Write the point between two checkpoints: at 0 the one, at 1 the other, beyond them what lies beyond.

    Options as for `average`.
    """
    return average([one, other], directory, shares=[1 - at, at], **options)


class Difference(NamedTuple):
    """Of one parameter. shapes: in either checkpoint, None where it has none.

    largest: of the numbers' absolute differences. relative: the difference's norm as a share of the first's.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    largest: float
    relative: float

    @property
    def is_equal(self) -> bool:
        return self.largest == 0


@dataclass(frozen=True)
class Comparison:
    """differences: a row for each parameter. config: fields that differ -> the two values."""

    differences: tuple[Difference, ...]
    config: Mapping[str, tuple[Any, Any]]

    @property
    def is_equal(self) -> bool:
        return not self.config and all(each.is_equal for each in self.differences)


def diff(
    one: str | Path, other: str | Path, *, cache_dir: str | Path | None = None, progress: bool = True
) -> Comparison:
    """Compare two checkpoints of one family, parameter by parameter, whatever forms they are in.

    Raises InputError for two families.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    with opened(one, **options) as first, opened(other, **options) as second:
        _check_family(first, second)
        configs = [each.contents.config.to_published() for each in (first, second)]
        keys = dict.fromkeys([*configs[0], *configs[1]])
        changed = {k: (configs[0].get(k), configs[1].get(k)) for k in keys if configs[0].get(k) != configs[1].get(k)}
        tensors = [_bare(each) for each in (first, second)]
        names = dict.fromkeys([*tensors[0], *tensors[1]])
        return Comparison(tuple(_difference(name, *(each.get(name) for each in tensors)) for name in names), changed)


def add_tokens(
    weights: str | Path,
    directory: str | Path,
    words: Sequence[str],
    *,
    seed: int | None = None,
    form: str = "hf",
    max_file_size: int | str = LARGEST_FILE,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> list[str]:
    """Write a checkpoint with more words in its vocabulary, each beginning as the mean of the pieces it had been.

    words: those that the vocabulary has already are passed over. seed: see `resize_vocabulary`.
    Returns the words that were added. Raises InputError if there is no tokenizer, or for a word that it would part.
    """
    with opened(weights, cache_dir=cache_dir, progress=progress) as found:
        if not isinstance(found.tokenizer, WordPieceTokenizer):
            kind = "none" if found.tokenizer is None else "byte pairs, which have no whole words"
            raise InputError(f"{weights}: expected a WordPiece tokenizer beside it, to add words to; got {kind}")
        tokenizer, pieces = found.tokenizer.with_words(words)
        config: Any = found.contents.config
        size = max([config.vocab_size, *(word + 1 for word in pieces)])
        tensors = resized(found.tensors, size, pieces, seed)
        config = dataclasses.replace(config, vocab_size=size)
        contents = dataclasses.replace(found.contents, config=config, tensors=tensors)
        save(contents, Path(directory), tokenizer, form, max_file_size)
        return tokenizer.tokens(sorted(pieces))


@contextmanager
def _find(weights: str | Path) -> Iterator[Checkpoint]:
    name, _, version = str(weights).rpartition("@")
    if not name or isinstance(weights, Path) or local_path(weights) is not None:
        with find_checkpoint(weights) as checkpoint:
            yield checkpoint
        return
    root = other_version(version, torch.hub.get_dir())
    records = manifest(root / "weights_manifest.json")
    if name not in records:
        raise CatalogError(f"{root}: its manifest has no {name}; there are {', '.join(records)}")
    record = records[name]
    yield Checkpoint(str(weights), record.config, f"manifest entry {name} of {root}", record, root=root)


def _family_and_content(checkpoint: Checkpoint, path: Path) -> tuple[EntryPoints, FileContent]:
    """What config.json says; of one from before it did, the family whose table knows the most of the file's names."""
    if not isinstance(checkpoint.origin, Path) or "model_type" in checkpoint.published:
        said = checkpoint.published.get("model_type")
        name = family_named(str(said)) if isinstance(checkpoint.origin, Path) else checkpoint.origin.family
        if name not in ENTRY_POINTS:
            families = ", ".join(ENTRY_POINTS)
            raise CheckpointError(f"{checkpoint.config_source}: it says {name}; families are {families}")
        return ENTRY_POINTS[name], read_content(path, ENTRY_POINTS[name].family)
    read = [(entries, read_content(path, entries.family)) for entries in ENTRY_POINTS.values()]
    return max(read, key=lambda each: sum(each[1].keys.find(key) is not None for key in each[1].tensors))


def _class_and_shapes(
    entries: EntryPoints, config: Any, content: FileContent, published: Mapping[str, Any]
) -> tuple[type, dict[str, tuple[int, ...]]]:
    """The class that the file is of, and the shapes of all that it should hold: each part that it has anything of."""
    keys, labels, parts = content.keys, 2, set()
    for key, tensor in content.tensors.items():
        if found := keys.find(key):
            ours = found[0].ours or ""
            parts |= {ours.split(".")[0]} & keys.optional
            labels = tensor.shape[0] if ours.startswith("classifier.") and tensor.shape else labels
    cls = _class_of(entries, parts, published)
    wanted: dict[str, tuple[int, ...]] = {}
    for each in entries.classes:
        model = new_model(each, config, labels)  # takes no memory: no parameter is written
        for name, parameter in model.named_parameters():
            bare = name.removeprefix(keys.prefix[0])
            prefix = keys.prefix[0] if issubclass(cls, Model) and keys.in_transformer(bare) else ""
            if bare.split(".")[0] in parts or bare.split(".")[0] not in keys.optional:
                wanted.setdefault(prefix + bare, tuple(parameter.shape))
    return cls, wanted


def _class_of(entries: EntryPoints, parts: set[str], published: Mapping[str, Any]) -> type:
    """Of those whose heads the file has, one with the most; of these the one that config.json names."""
    said = published.get("architectures") or ()
    heads = {cls: set(cls.own_parts) - {"pooler"} for cls in entries.classes}
    most = max(len(own) for own in heads.values() if own <= parts)
    fitting = [cls for cls, own in heads.items() if own <= parts and len(own) == most]
    named = [cls for cls in fitting if (cls.architecture or cls.__name__) in said]
    return max(named or fitting, key=lambda cls: ("pooler" in cls.own_parts) == ("pooler" in parts))


_Place = tuple[Match, str]  # where a tensor is, to be read


def _bare(found: Opened) -> dict[str, _Place]:
    """By their names without the prefix, which only says whether there is a head."""
    prefix = found.contents.family.keys.prefix[0]
    return {name.removeprefix(prefix): (found.tensors, name) for name in found.tensors}


def _read(place: _Place) -> Tensor:
    return place[0][place[1]]


def _shape(place: _Place) -> tuple[int, ...]:
    return place[0].shape(place[1])


def _difference(name: str, one: _Place | None, other: _Place | None) -> Difference:
    a, b = (None if place is None else _read(place).double() for place in (one, other))
    shapes = (None if a is None else tuple(a.shape), None if b is None else tuple(b.shape))
    if a is None or b is None or shapes[0] != shapes[1]:
        return Difference(name, shapes, math.inf, math.inf)
    gap = (a - b).masked_fill_(a == b, 0).masked_fill_(a.isnan() & b.isnan(), 0)  # infinities, and nan, may be equal
    largest = gap.abs().max().item() if gap.numel() else 0.0
    norm, whole = gap.norm().item(), a[~a.isnan()].norm().item()
    return Difference(name, shapes, largest, 0.0 if norm == 0 else norm / whole if whole else math.inf)


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    parts = (tensor.double() * share for tensor, share in zip(tensors, shares, strict=True) if share)
    return reduce(Tensor.add_, parts).to(tensors[0].dtype)  # a share of 0 keeps an infinity out


def _check_family(first: Opened, other: Opened) -> None:
    names = [each.contents.family.name for each in (first, other)]
    if names[0] != names[1]:
        raise InputError(f"{first.weights} is a {names[0]}, {other.weights} a {names[1]}: expected one family")


def _check_same(first: Opened, other: Opened) -> None:
    _check_family(first, other)
    sides = [set(_bare(each)) for each in (first, other)]
    lone = [f"{name} is only in {first.weights}" for name in sorted(sides[0] - sides[1])]
    lone += [f"{name} is only in {other.weights}" for name in sorted(sides[1] - sides[0])]
    configs = [each.contents.config for each in (first, other)]
    fixed = {field.name for field in dataclasses.fields(configs[0])} - set(configs[0].ADJUSTABLE)
    values = {name: [getattr(config, name) for config in configs] for name in sorted(fixed)}
    lone += [f"{name} = {a!r} and {b!r}" for name, (a, b) in values.items() if a != b]
    shapes = {name: [_shape(_bare(each)[name]) for each in (first, other)] for name in sorted(sides[0] & sides[1])}
    lone = lone or [f"{name} {list(a)} and {list(b)}" for name, (a, b) in shapes.items() if a != b]
    if lone:
        raise InputError(f"{first.weights} and {other.weights} are not of one model: {'; '.join(lone[:9])}")
