"""A name or a path -> record -> files -> tensors -> model or tokenizer, with an account of what was done.

`saving.export` goes the same way back.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from typing_extensions import TypedDict, Unpack

from . import store
from .catalog import File, Record, lookup
from .checkpoint.config import Family, FamilyConfig
from .checkpoint.dialects import translate
from .checkpoint.keymap import KeyMap, Match
from .checkpoint.readers import read_checkpoint
from .checkpoint.report import Entry, Origin, Report, Total
from .checkpoint.tensors import LazyTensor
from .errors import CatalogError, InputError
from .heads import Model
from .layers import initialise
from .local import files_of, has_tokenizer, local_checkpoint, local_path, local_tokenizer, unpacked, what_to_read
from .tokenizers import Tokenizer, read_tokenizer
from .transformer import Transformer

AnyModel = Transformer | Model
M = TypeVar("M", bound=AnyModel)
T = TypeVar("T", bound=Tokenizer)


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of every model entry point. See `load_model`."""

    pretrained: bool
    device: str | torch.device | None
    dtype: torch.dtype | None
    progress: bool
    cache_dir: str | Path | None
    num_labels: int | None
    head_seed: int | None


class ModelOptions(LoadOptions, total=False):
    """And those that set a field of the config, for families that have it: see their ADJUSTABLE."""

    hidden_act: str
    hidden_dropout_prob: float
    embedding_dropout_prob: float
    attention_probs_dropout_prob: float
    classifier_dropout: float | None
    summary_dropout_prob: float
    layer_norm_eps: float
    initializer_range: float


@dataclass(frozen=True)
class UsedFile:
    """A file that a model was loaded from. source and revision: where it is published; None for a local file.

    how: what the store did to have it.
    """

    path: Path
    source: str | None = None
    revision: str | None = None
    pinned: str | None = None
    how: str | None = None

    @cached_property
    def digest(self) -> str:
        """What pins the file, verified at loading; of a local file the SHA-256 of its bytes now."""
        return self.pinned or f"SHA-256 {self.sha256}"

    @cached_property
    def sha256(self) -> str:
        """64 hex digits"""
        kind, _, digits = (self.pinned or "").rpartition(" ")
        return digits if kind == "SHA-256" else store.sha256_of(self.path)


_NEW = ", not pretrained"


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from. `print(model.provenance)` tells; `print(model.provenance.report)` has every tensor.

    published: what its config.json said, of which the model's config holds what its forward pass needs.
    """

    weights: str
    files: tuple[UsedFile, ...]
    dialect: str | None
    report: Report
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def checkpoint(self) -> str:
        """The name or path that leads to what lies beside the weights, though none of them may have been read."""
        return self.weights.removesuffix(_NEW)

    @property
    def revision(self) -> str | None:
        """The commit that pins the weights, 40 hex digits; None for local files and for this repository's own."""
        return self.files[0].revision if self.files else None

    def __str__(self) -> str:
        lines = [f"{self.weights}: {self.report.summary}"]
        for file in self.files:
            where = " at ".join(filter(None, (file.source, file.revision))) or str(file.path)
            lines.append(f"  {where}\n  {file.path.name} {file.digest}, {self.dialect}")
            lines += [f"  {file.how}"] if file.how else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """What a name or path stands for. published: config.json's content, read from `config_source`.

    origin: the manifest's record, or where the weights are on this machine. archive: what was unpacked there.
    root: of the copy of this repository whose manifest the record is from, if not this one.
    """

    weights: str
    published: Mapping[str, Any]
    config_source: str
    origin: Record | Path
    archive: Path | None = None
    root: Path | None = None

    def fetch(self, cache_dir: str | Path | None, progress: bool) -> tuple[Path, tuple[UsedFile, ...]]:
        """What `read_checkpoint` is to be given, and the files that hold the tensors."""
        if isinstance(self.origin, Path):
            files = files_of(self.origin)
            used = (UsedFile(self.archive),) if self.archive else tuple(map(UsedFile, files))
            return what_to_read(files), used
        found = {file: self._fetched(file, cache_dir, progress) for file in self.origin.weights}
        used = tuple(
            UsedFile(path, None if file.is_embedded else file.source, file.revision, file.digest, how)
            for file, (path, how) in found.items()
        )
        return what_to_read([file.path for file in used]), used

    def tokenizer(self, cache_dir: str | Path | None, progress: bool) -> Tokenizer | None:
        """The one that is published with the weights, or stands beside them; None if there is none."""
        if isinstance(self.origin, Path):
            directory = self.origin if self.origin.is_dir() else self.origin.parent
            return local_tokenizer(directory) if has_tokenizer(directory) else None
        paths = [self._fetched(file, cache_dir, progress).path for file in self.origin.vocabulary]
        options = {key: value for key, value in self.origin.tokenizer.items() if key not in ("file", "merges")}
        return read_tokenizer(*paths, **options)

    def _fetched(self, file: File, cache_dir: str | Path | None, progress: bool) -> store.Fetched:
        if not (file.is_embedded and self.root):
            return store.fetch(file, cache_dir=cache_dir, progress=progress)
        store.verify(self.root / file.filename, file)
        return store.Fetched(self.root / file.filename, f"in {self.root}, hashed now")


def load_model(cls: type[M], family: Family, weights: str | Path, **options: Unpack[ModelOptions]) -> M:
    """A model of class `cls` in eval mode, on its checkpoint's parameters, with `provenance`.

    weights: a name of the manifest, or the path of a directory (config.json and model.safetensors or
        pytorch_model.bin; Google's bert_config.json and bert_model.ckpt.*; OpenAI's params_shapes.json and
        params_*.npy) or of a weights file beside its config.json.
        A name wins over a path; ./name is a path.
    pretrained: False gives that architecture with new parameters, drawn from torch's global generator.
    device, dtype: of the parameters; default CPU, float32.
    progress: show a bar while downloading. cache_dir: where files are kept, instead of torch.hub's directory.
    num_labels: width of a classifier; default what the checkpoint's config says, else 2.
    head_seed: the head starts anew, from this seed, even if the checkpoint has one. A head that the checkpoint lacks
        starts anew from seed 0, with a warning.
    Other options set fields of the config that change no shape: see the family config's ADJUSTABLE.
    Raises a HubModelsError that says what to do.
    """
    known = {*LoadOptions.__optional_keys__, *family.config.ADJUSTABLE}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; options are {', '.join(sorted(known))}")
    dtype = options.get("dtype") or torch.float32
    check_dtype(dtype)
    with find_checkpoint(weights, family) as checkpoint:
        model: M = _build(cls, family, checkpoint, options)
        device = options.get("device")
        if options.get("pretrained", True):
            path, used = checkpoint.fetch(options.get("cache_dir"), options.get("progress", True))
            dialect, report = _fill(model, family, path, options.get("head_seed"), device, dtype)
            origin = Provenance(checkpoint.weights, used, dialect, report, checkpoint.published)
        else:
            seed = options.get("head_seed")
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            initialise(model, model.config.initializer_range, generator)
            model.to(device=device, dtype=dtype)
            shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            new = [Entry(name, None, "new", shape, "", "pretrained=False") for name, shape in shapes.items()]
            report = Report(tuple(new), Total(0, 0), Total.of(shapes.values()))
            origin = Provenance(checkpoint.weights + _NEW, (), None, report, checkpoint.published)
    model.provenance = origin
    model.eval()
    return model


def check_dtype(dtype: Any) -> None:
    """Raises InputError unless parameters can be of it."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype = {dtype!r}: expected a floating point type, such as torch.bfloat16")


def load_tokenizer(
    cls: type[T], weights: str | Path, *, progress: bool = True, cache_dir: str | Path | None = None
) -> T:
    """The tokenizer of a checkpoint: a name of the manifest, a directory with its files, or its (first) file.

    Files are tokenizer.json, or vocab.txt, or vocab.json and merges.txt, which OpenAI calls by other names. A
    directory's tokenizer_config.json decides how vocab.txt is used.
    Raises CatalogError if it is not of class `cls`; StoreError, CheckpointError.
    """
    local = local_path(weights)
    if local is not None:
        with unpacked(local, texts_only=True) as path:
            tokenizer = local_tokenizer(path)
    else:
        tokenizer = _of_record(lookup(str(weights))).tokenizer(cache_dir, progress)  # type: ignore[assignment]
    if not isinstance(tokenizer, cls):
        raise CatalogError(
            f"{weights} has a {type(tokenizer).__name__}, but this entry point makes a {cls.__name__}; "
            "take the entry point of its own family"
        )
    return tokenizer


def model_type_of(weights: str | Path) -> str:
    """The family's name in the manifest, or, of a local checkpoint, what its config.json calls it ("openai-gpt")."""
    local = local_path(weights)
    if local is None:
        return lookup(str(weights)).family
    with unpacked(local, texts_only=True) as path:
        return str(local_checkpoint(path).published.get("model_type", "openai-gpt"))


@contextmanager
def find_checkpoint(weights: str | Path, family: Family | None = None) -> Iterator[Checkpoint]:
    """What `weights` stands for, of `family` if one is given; nothing is fetched. An archive is open for as long.

    Raises CatalogError, ConfigError, CheckpointError.
    """
    local = local_path(weights)
    if local is not None:
        with unpacked(local) as path:
            found = local_checkpoint(path)
            named = str(weights) if path != local else str(found.path)
            yield Checkpoint(named, found.published, found.config_source, found.path, None if path == local else local)
        return
    record = lookup(str(weights))
    if family and record.family != family.name:
        raise CatalogError(
            f"{record.name} is a {record.family} checkpoint; this entry point loads {family.name}; "
            f"take an entry point of that family, as {record.family}Model is"
        )
    yield _of_record(record)


def _of_record(record: Record) -> Checkpoint:
    return Checkpoint(record.name, record.config, f"manifest entry {record.name}", record)


def _build(cls: Any, family: Family, checkpoint: Checkpoint, options: ModelOptions) -> Any:
    """The model, its parameters without values."""
    adjusted = {key: value for key, value in options.items() if key in family.config.ADJUSTABLE}
    config = family.config.from_published(checkpoint.published, checkpoint.config_source)
    config = dataclasses.replace(config, **adjusted)
    num_labels = options.get("num_labels")
    if num_labels is not None and not takes_num_labels(cls):
        raise InputError(f"num_labels = {num_labels}: {cls.__name__} has no labels to number")
    published = checkpoint.published.get("num_labels") or len(checkpoint.published.get("id2label") or ()) or 2
    count = published if num_labels is None else num_labels
    if not isinstance(count, int) or count < 1:
        raise InputError(f"num_labels = {count!r}: expected a positive number")
    return new_model(cls, config, count)


def new_model(cls: Any, config: FamilyConfig, num_labels: int) -> Any:
    """num_labels: for a class that has them"""
    return cls(config, num_labels=num_labels) if takes_num_labels(cls) else cls(config)


def takes_num_labels(cls: type) -> bool:
    return "num_labels" in inspect.signature(cls).parameters


class FileContent(NamedTuple):
    """A checkpoint's tensors under Hugging Face's names, or ours; the table that knows them; what else there is."""

    tensors: Mapping[str, LazyTensor]
    origins: Mapping[str, Origin]
    keys: KeyMap
    dialect: str
    dropped: tuple[Entry, ...]
    total: Total

    def report(self, match: Match, wanted: Mapping[str, tuple[int, ...]]) -> Report:
        return Report((*match.entries, *self.dropped), self.total, Total.of(wanted.values()))


def read_content(path: Path, family: Family) -> FileContent:
    """What the file or files at `path` hold; the tensors stay there. Raises CheckpointError."""
    found = read_checkpoint(path)
    tensors, origins, dialect, dropped = translate(found, str(path))
    keys = family.keys.of_file(tensors)
    dialect = "native" if keys is not family.keys else dialect
    return FileContent(tensors, origins, keys, dialect, dropped, Total.of(tuple(t.shape) for t in found.values()))


def _fill(model: AnyModel, family: Family, path: Path, head_seed: int | None, device, dtype) -> tuple[str, Report]:
    """Put the tensors at `path` into the model. Returns their dialect and the account."""
    content = read_content(path, family)
    parameters = dict(model.named_parameters())
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    declared = set() if head_seed is None else set(model.own_parts) - {"pooler"}
    if head_seed is not None and not declared:
        raise InputError(f"head_seed = {head_seed}: {type(model).__name__} has no head to start anew")
    match = content.keys.match(content.tensors, wanted, str(path), model.own_parts, declared, content.origins)
    match.check_repeats()
    fresh = [name for name in wanted if name not in match]
    generator = torch.Generator().manual_seed(head_seed or 0)
    for part in dict.fromkeys(_part(name) for name in fresh):
        initialise(model.get_submodule(part), model.config.initializer_range, generator)
    if fresh and head_seed is None:
        parts = ", ".join(dict.fromkeys(_part(name) for name in fresh))
        warnings.warn(
            f"{path} has no {parts} for {type(model).__name__}: it starts anew from seed 0 and has to be trained",
            stacklevel=4,
        )

    def tensor(name: str) -> torch.Tensor:
        return (match.read(name, dtype) if name in match else parameters[name].data).to(device=device, dtype=dtype)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # what is not mapped is read side by side
        model.load_state_dict(dict(zip(wanted, pool.map(tensor, wanted), strict=True)), strict=True, assign=True)
    return content.dialect, content.report(match, wanted)


def _part(name: str) -> str:
    """transformer.pooler.weight -> transformer.pooler, classifier.bias -> classifier"""
    first, second = name.split(".")[:2]
    return f"{first}.{second}" if first == "transformer" else first
