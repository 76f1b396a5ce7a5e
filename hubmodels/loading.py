"""A name or a path -> record -> files -> tensors -> model or tokenizer, with an account of what was done.

`export` goes the same way back.
"""

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from typing_extensions import TypedDict, Unpack

from . import store
from .catalog import Record, lookup, manifest
from .checkpoint.config import Family
from .checkpoint.dialects import translate
from .checkpoint.keymap import Entry, Report
from .checkpoint.readers import read_checkpoint
from .encoder import Encoder
from .errors import CatalogError, CheckpointError, ConfigError, InputError
from .heads import Model
from .layers import initialise
from .tokenizers import WordPieceTokenizer

AnyModel = Encoder | Model
M = TypeVar("M", bound=AnyModel)
_LOCAL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class ModelOptions(TypedDict, total=False):
    """Keyword arguments of every model entry point. See `load_model`."""

    pretrained: bool
    device: str | torch.device | None
    dtype: torch.dtype | None
    progress: bool
    cache_dir: str | Path | None
    num_labels: int | None
    head_seed: int | None
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    classifier_dropout: float | None
    layer_norm_eps: float
    initializer_range: float


@dataclass(frozen=True)
class UsedFile:
    """A file that a model was loaded from. source and revision: where it is published; None for a local file."""

    path: Path
    source: str | None = None
    revision: str | None = None
    pinned: str | None = None

    @cached_property
    def sha256(self) -> str:
        """The pinned digest, verified at loading; of a local file the digest of its bytes now."""
        return self.pinned or store.sha256_of(self.path)


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from. `print(model.provenance)` tells; `report` has every tensor."""

    weights: str
    files: tuple[UsedFile, ...]
    dialect: str | None
    report: Report

    @property
    def revision(self) -> str | None:
        """The commit that pins the weights, 40 hex digits; None for local files and for this repository's own."""
        return self.files[0].revision if self.files else None

    def __str__(self) -> str:
        lines = [f"{self.weights}: {self.report}"]
        for file in self.files:
            where = f"{file.source} at {file.revision}" if file.revision else str(file.path)
            lines.append(f"  {where}\n  {file.path.name} sha256 {file.sha256}, {self.dialect}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """What a name or path stands for. published: config.json's content, read from `config_source`.

    origin: the manifest's record, or the local weights file, or a directory without one.
    """

    weights: str
    published: Mapping[str, Any]
    config_source: str
    origin: Record | Path

    def weights_file(self, cache_dir: str | Path | None, progress: bool) -> UsedFile:
        if isinstance(self.origin, Path):
            if self.origin.is_dir():
                names = " or ".join(_LOCAL_WEIGHTS)
                raise CheckpointError(f"{self.origin}: expected {names} beside config.json, found neither")
            return UsedFile(self.origin)
        file = self.origin.weights
        path = store.fetch(file, cache_dir=cache_dir, progress=progress)
        return UsedFile(path, None if file.is_embedded else file.source, file.revision, file.sha256)


def load_model(cls: type[M], family: Family, weights: str | Path, **options: Unpack[ModelOptions]) -> M:
    """A model of class `cls` in eval mode, on its checkpoint's parameters, with `provenance`.

    weights: a name of the manifest, or the path of a directory (config.json and model.safetensors or
        pytorch_model.bin) or of a weights file beside its config.json. A name wins over a path; ./name is a path.
    pretrained: False gives that architecture with new parameters, drawn from torch's global generator.
    device, dtype: of the parameters; default CPU, float32.
    progress: show a bar while downloading. cache_dir: another Hugging Face cache.
    num_labels: width of a classifier; default what the checkpoint's config says, else 2.
    head_seed: the head starts anew, from this seed, even if the checkpoint has one. A head that the checkpoint lacks
        starts anew from seed 0, with a warning.
    Other options set fields of the config that change no shape: see the family config's ADJUSTABLE.
    Raises a HubModelsError that says what to do.
    """
    unknown = sorted(set(options) - ModelOptions.__optional_keys__)
    if unknown:
        raise InputError(
            f"unknown option {', '.join(unknown)}; options are {', '.join(sorted(ModelOptions.__optional_keys__))}"
        )
    dtype = options.get("dtype") or torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype = {dtype!r}: expected a floating point type, such as torch.bfloat16")
    checkpoint = find_checkpoint(weights, family)
    model: M = _build(cls, family, checkpoint, options)
    device = options.get("device")
    if options.get("pretrained", True):
        used = checkpoint.weights_file(options.get("cache_dir"), options.get("progress", True))
        dialect, report = _fill(model, family, used, options.get("head_seed"), device, dtype)
        model.provenance = Provenance(checkpoint.weights, (used,), dialect, report)
    else:
        seed = options.get("head_seed")
        initialise(model, model.config.initializer_range, None if seed is None else _generator(seed))
        model.to(device=device, dtype=dtype)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        new = [Entry(name, None, "new", shape, "", "pretrained=False") for name, shape in shapes.items()]
        model.provenance = Provenance(f"{checkpoint.weights}, not pretrained", (), None, Report(tuple(new)))
    model.eval()
    return model


def load_tokenizer(
    weights: str | Path, *, progress: bool = True, cache_dir: str | Path | None = None
) -> WordPieceTokenizer:
    """The tokenizer of a checkpoint: a name of the manifest, a directory with vocab.txt or tokenizer.json, or the file.

    A directory's tokenizer_config.json decides how vocab.txt is used. Raises CatalogError, StoreError, CheckpointError.
    """
    local = _local_path(weights)
    if local is not None:
        return _local_tokenizer(local)
    record = lookup(str(weights))
    path = store.fetch(record.vocabulary, cache_dir=cache_dir, progress=progress)
    return _tokenizer(path, {key: value for key, value in record.tokenizer.items() if key != "file"})


def find_checkpoint(weights: str | Path, family: Family) -> Checkpoint:
    """What `weights` stands for; nothing is fetched. Raises CatalogError, ConfigError, CheckpointError."""
    local = _local_path(weights)
    if local is not None:
        return _local_checkpoint(local)
    record = lookup(str(weights))
    if record.family != family.name:
        raise CatalogError(f"{record.name} is a {record.family} checkpoint; this entry point loads {family.name}")
    return Checkpoint(record.name, record.config, f"manifest entry {record.name}", record)


def export(model: AnyModel, directory: str | Path, tokenizer: WordPieceTokenizer | None = None) -> Path:
    """Write config.json, model.safetensors and, if given, tokenizer.json, under Hugging Face's names.

    What is read back is bit-equal. Each file appears whole or not at all. Returns the directory.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = type(model).__name__
    config = {"architectures": [name], **model.config.to_published()}
    if _takes_num_labels(type(model)):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(len(model.get_parameter("classifier.bias")))}
    state = model.family.keys.dump(model.state_dict(), prefixed=isinstance(model, Model))
    tensors = {key: tensor.contiguous().cpu() for key, tensor in state.items()}
    _write(directory / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    if tokenizer is not None:
        _write(directory / "tokenizer.json", tokenizer.save)
    _write(directory / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
    return directory


def _build(cls: Any, family: Family, checkpoint: Checkpoint, options: ModelOptions) -> Any:
    """The model, its parameters without values."""
    adjusted = {key: value for key, value in options.items() if key in family.config.ADJUSTABLE}
    config = family.config.from_published(checkpoint.published, checkpoint.config_source)
    config = dataclasses.replace(config, **adjusted)
    num_labels = options.get("num_labels")
    if not _takes_num_labels(cls):
        if num_labels is not None:
            raise InputError(f"num_labels = {num_labels}: {cls.__name__} has no labels to number")
        return cls(config)
    published = checkpoint.published.get("num_labels") or len(checkpoint.published.get("id2label") or ()) or 2
    count = published if num_labels is None else num_labels
    if not isinstance(count, int) or count < 1:
        raise InputError(f"num_labels = {count!r}: expected a positive number")
    return cls(config, num_labels=count)


def _takes_num_labels(cls: type) -> bool:
    return "num_labels" in inspect.signature(cls).parameters


def _fill(model: AnyModel, family: Family, used: UsedFile, head_seed: int | None, device, dtype) -> tuple[str, Report]:
    """Put the file's tensors into the model. Returns the file's dialect and the account."""
    tensors, dialect = translate(read_checkpoint(used.path), str(used.path))
    parameters = dict(model.named_parameters())
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    declared = set() if head_seed is None else set(model.own_parts) - {"pooler"}
    if head_seed is not None and not declared:
        raise InputError(f"head_seed = {head_seed}: {type(model).__name__} has no head to start anew")
    loaded, report = family.keys.load(tensors, wanted, str(used.path), model.own_parts, declared)
    fresh = [name for name in wanted if name not in loaded]
    generator = _generator(head_seed or 0)
    for part in dict.fromkeys(_part(name) for name in fresh):
        initialise(model.get_submodule(part), model.config.initializer_range, generator)
    if fresh and head_seed is None:
        parts = ", ".join(dict.fromkeys(_part(name) for name in fresh))
        warnings.warn(
            f"{used.path} has no {parts} for {type(model).__name__}: it starts anew from seed 0 and has to be trained",
            stacklevel=4,
        )
    state = {name: loaded.get(name, parameters[name].data).to(device=device, dtype=dtype) for name in wanted}
    model.load_state_dict(state, strict=True, assign=True)
    return dialect, report


def _part(name: str) -> str:
    """encoder.pooler.weight -> encoder.pooler, classifier.bias -> classifier"""
    first, second = name.split(".")[:2]
    return f"{first}.{second}" if first == "encoder" else first


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _local_path(weights: str | Path) -> Path | None:
    """The path that `weights` means, if it means one. A string may be a name, a Path never is."""
    if not isinstance(weights, str | os.PathLike):
        raise InputError(f"weights: expected a name or a path, got {type(weights).__name__}")
    path = Path(weights)
    if isinstance(weights, os.PathLike) and not path.exists():
        raise CatalogError(f"{path}: no such file or directory; a name of the manifest is given as a str")
    is_name = not isinstance(weights, os.PathLike) and weights in manifest()
    return path if not is_name and path.exists() else None


def _local_checkpoint(path: Path) -> Checkpoint:
    directory = path if path.is_dir() else path.parent
    config = directory / "config.json"
    published = _read_json(config)
    if path.is_dir():
        path = next((path / name for name in _LOCAL_WEIGHTS if (path / name).is_file()), path)
    return Checkpoint(str(path), published, str(config), path)


def _local_tokenizer(path: Path) -> WordPieceTokenizer:
    if not path.is_dir():
        return _tokenizer(path, {})
    options = {}
    settings = path / "tokenizer_config.json"
    if settings.is_file():
        names = {
            "do_lower_case": "lower_case",
            "strip_accents": "strip_accents",
            "tokenize_chinese_chars": "split_chinese",
        }
        content = _read_json(settings)
        options = {ours: content[theirs] for theirs, ours in names.items() if theirs in content}
    for name in ("tokenizer.json", "vocab.txt"):
        if (path / name).is_file():
            return _tokenizer(path / name, options)
    raise CheckpointError(f"{path}: expected tokenizer.json or vocab.txt, found neither")


def _tokenizer(path: Path, options: dict[str, Any]) -> WordPieceTokenizer:
    if path.suffix == ".json":
        return WordPieceTokenizer.from_json(path)
    return WordPieceTokenizer.from_vocab(path, **options)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint needs its config.json beside its weights") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _write(path: Path, write) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.chmod(0o644)  # safetensors makes its files readable by their owner alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
