"""A name or a path -> record -> files -> tensors -> model or tokenizer, with an account of what was done.

`export` goes the same way back.
"""

import dataclasses
import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import escape
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
from .errors import CatalogError, CheckpointError, ConfigError, InputError
from .heads import Model
from .layers import initialise
from .tokenizers import Tokenizer, read_tokenizer
from .transformer import Transformer

AnyModel = Transformer | Model
M = TypeVar("M", bound=AnyModel)
T = TypeVar("T", bound=Tokenizer)
_LOCAL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TENSORFLOW_FILE = re.compile(r"(.+\.ckpt(-\d+)?)\.(index|data-\d{5}-of-\d{5})")
_CONFIGS = ("config.json", "bert_config.json")  # the second is Google's, beside TensorFlow's checkpoints
_OPENAI_SHAPES = "params_shapes.json"  # beside OpenAI's shards, which come without a config.json
_OPENAI_FILE = re.compile(r"params_(\d+\.npy|shapes\.json)")


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
            where = " at ".join(filter(None, (file.source, file.revision))) or str(file.path)
            lines.append(f"  {where}\n  {file.path.name} {file.digest}, {self.dialect}")
            lines += [f"  {file.how}"] if file.how else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """What a name or path stands for. published: config.json's content, read from `config_source`.

    origin: the manifest's record, or the local weights file or directory of OpenAI's shards, or one without either.
    """

    weights: str
    published: Mapping[str, Any]
    config_source: str
    origin: Record | Path

    def fetch(self, cache_dir: str | Path | None, progress: bool) -> tuple[UsedFile, ...]:
        """The files that hold the tensors; several are in one directory."""
        if isinstance(self.origin, Path):
            if shards := _shards_of(self.origin):
                return tuple(UsedFile(path) for path in (self.origin, *shards))
            if not self.origin.is_dir():
                return (UsedFile(self.origin),)
            if not (self.origin / _OPENAI_SHAPES).is_file():
                raise CheckpointError(
                    f"{self.origin}: expected model.safetensors or pytorch_model.bin beside config.json, or one "
                    "of them in parts with its .index.json, or bert_model.ckpt.index; found none of them"
                )
            return tuple(UsedFile(p) for p in sorted(self.origin.iterdir()) if _OPENAI_FILE.fullmatch(p.name))
        found = {file: store.fetch(file, cache_dir=cache_dir, progress=progress) for file in self.origin.weights}
        return tuple(
            UsedFile(path, None if file.is_embedded else file.source, file.revision, file.digest, how)
            for file, (path, how) in found.items()
        )


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
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype = {dtype!r}: expected a floating point type, such as torch.bfloat16")
    checkpoint = find_checkpoint(weights, family)
    model: M = _build(cls, family, checkpoint, options)
    device = options.get("device")
    if options.get("pretrained", True):
        used = checkpoint.fetch(options.get("cache_dir"), options.get("progress", True))
        alone = len(used) == 1 or bool(_shards_of(used[0].path))
        path = used[0].path if alone and used[0].path.name != _OPENAI_SHAPES else used[0].path.parent
        dialect, report = _fill(model, family, path, options.get("head_seed"), device, dtype)
        model.provenance = Provenance(checkpoint.weights, used, dialect, report)
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
    cls: type[T], weights: str | Path, *, progress: bool = True, cache_dir: str | Path | None = None
) -> T:
    """The tokenizer of a checkpoint: a name of the manifest, a directory with its files, or its (first) file.

    Files are tokenizer.json, or vocab.txt, or vocab.json and merges.txt, which OpenAI calls by other names. A
    directory's tokenizer_config.json decides how vocab.txt is used.
    Raises CatalogError if it is not of class `cls`; StoreError, CheckpointError.
    """
    local = _local_path(weights)
    if local is not None:
        tokenizer = _local_tokenizer(local)
    else:
        record = lookup(str(weights))
        paths = [store.fetch(file, cache_dir=cache_dir, progress=progress).path for file in record.vocabulary]
        options = {key: value for key, value in record.tokenizer.items() if key not in ("file", "merges")}
        tokenizer = read_tokenizer(*paths, **options)
    if not isinstance(tokenizer, cls):
        raise CatalogError(
            f"{weights} has a {type(tokenizer).__name__}, but this entry point makes a {cls.__name__}; "
            "take the entry point of its own family"
        )
    return tokenizer


def model_type_of(weights: str | Path) -> str:
    """The family's name in the manifest, or, of a local checkpoint, what its config.json calls it ("openai-gpt")."""
    local = _local_path(weights)
    if local is None:
        return lookup(str(weights)).family
    return str(_local_checkpoint(local).published.get("model_type", "openai-gpt"))


def find_checkpoint(weights: str | Path, family: Family) -> Checkpoint:
    """What `weights` stands for; nothing is fetched. Raises CatalogError, ConfigError, CheckpointError."""
    local = _local_path(weights)
    if local is not None:
        return _local_checkpoint(local)
    record = lookup(str(weights))
    if record.family != family.name:
        raise CatalogError(
            f"{record.name} is a {record.family} checkpoint; this entry point loads {family.name}; "
            f"take an entry point whose name begins with {record.family}"
        )
    return Checkpoint(record.name, record.config, f"manifest entry {record.name}", record)


def export(model: AnyModel, directory: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write config.json, model.safetensors and, if given, tokenizer.json, under Hugging Face's names.

    What is read back is bit-equal. Each file appears whole or not at all. Returns the directory.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [model.architecture or type(model).__name__], **model.config.to_published()}
    if _takes_num_labels(type(model)):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(len(model.get_parameter("classifier.bias")))}
    state = model.family.keys.dump(model.state_dict(), prefixed=isinstance(model, Model))
    tensors = {key: tensor.contiguous().cpu() for key, tensor in state.items()}
    _write(directory / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    if tokenizer is not None:
        _write(directory / "tokenizer.json", tokenizer.save)
    _write(directory / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
    return directory


def _shards_of(index: Path) -> list[Path]:
    """The files beside an index of TensorFlow's or transformers'; of anything else none."""
    if index.name.endswith(".index.json"):
        stem, end = index.name.removesuffix(".index.json").rsplit(".", 1)
        return sorted(index.parent.glob(f"{escape(stem)}-*-of-*.{end}"))
    return sorted(index.parent.glob(f"{escape(index.stem)}.data-*")) if index.suffix == ".index" else []


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


def _fill(model: AnyModel, family: Family, path: Path, head_seed: int | None, device, dtype) -> tuple[str, Report]:
    """Put the tensors at `path` into the model. Returns their dialect and the account."""
    found = read_checkpoint(path)
    tensors, dialect, dropped = translate(found, str(path))
    parameters = dict(model.named_parameters())
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    declared = set() if head_seed is None else set(model.own_parts) - {"pooler"}
    if head_seed is not None and not declared:
        raise InputError(f"head_seed = {head_seed}: {type(model).__name__} has no head to start anew")
    loaded, report = family.keys.load(tensors, wanted, str(path), model.own_parts, declared)
    fresh = [name for name in wanted if name not in loaded]
    generator = _generator(head_seed or 0)
    for part in dict.fromkeys(_part(name) for name in fresh):
        initialise(model.get_submodule(part), model.config.initializer_range, generator)
    if fresh and head_seed is None:
        parts = ", ".join(dict.fromkeys(_part(name) for name in fresh))
        warnings.warn(
            f"{path} has no {parts} for {type(model).__name__}: it starts anew from seed 0 and has to be trained",
            stacklevel=4,
        )
    state = {name: loaded.get(name, parameters[name].data).to(device=device, dtype=dtype) for name in wanted}
    model.load_state_dict(state, strict=True, assign=True)
    of_the_file = [
        Entry(None, key, "dropped", found[key].shape, str(found[key].dtype).removeprefix("torch."), because)
        for key, because in dropped.items()
    ]
    return dialect, Report((*report.entries, *of_the_file))


def _part(name: str) -> str:
    """transformer.pooler.weight -> transformer.pooler, classifier.bias -> classifier"""
    first, second = name.split(".")[:2]
    return f"{first}.{second}" if first == "transformer" else first


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
    if _OPENAI_FILE.fullmatch(path.name) and (directory / _OPENAI_SHAPES).is_file():
        path = directory  # a shard stands for all of them
    if part := _TENSORFLOW_FILE.fullmatch(path.name):
        path = directory / f"{part[1]}.index"  # a data file stands for all of them
    config = next((directory / name for name in _CONFIGS if (directory / name).is_file()), directory / _CONFIGS[0])
    if path.is_dir() and (path / _OPENAI_SHAPES).is_file() and not config.is_file():
        return Checkpoint(str(path), {}, f"{path} (no config.json: GPT as published)", path)
    published = read_json(config)
    if config.name == _CONFIGS[1]:
        published = {"model_type": "bert", **published}
    if path.is_dir():
        indices = sorted(path.glob("*.ckpt*.index"))
        found = [path / name for name in _LOCAL_WEIGHTS if (path / name).is_file()] or indices or [path]
        if found == indices and len(indices) > 1:
            raise CheckpointError(
                f"{path}: expected one checkpoint, got {', '.join(p.name for p in indices)}; name one"
            )
        path = found[0]
    return Checkpoint(str(path), published, str(config), path)


_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("encoder_bpe_40000.json", "vocab_40000.bpe"),
)


def tokenizer_options(directory: Path) -> dict[str, Any]:
    """What a directory's tokenizer_config.json, if there is one, says about the use of the vocabulary beside it."""
    settings = directory / "tokenizer_config.json"
    if not settings.is_file():
        return {}
    spelled = {
        "do_lower_case": "lower_case",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "split_chinese",
        "add_prefix_space": "add_prefix_space",
    }
    content = read_json(settings)
    found = {theirs: content[theirs] for theirs in spelled if theirs in content}
    for key, value in found.items():
        if not isinstance(value, bool) and (key, value) != ("strip_accents", None):  # null: as lower_case says
            raise ConfigError(f"{settings}: {key} = {value!r}: expected true or false")
    return {spelled[theirs]: value for theirs, value in found.items()}


def _local_tokenizer(path: Path) -> Tokenizer:
    if not path.is_dir():
        names = next((names for names in _VOCABULARIES if names[0] == path.name), (path.name,))
        return read_tokenizer(path, *(path.with_name(name) for name in names[1:]))
    options = tokenizer_options(path)
    for files in _VOCABULARIES:
        if (path / files[0]).is_file():
            return read_tokenizer(*(path / name for name in files), **options)
    expected = ", ".join(" and ".join(files) for files in _VOCABULARIES)
    raise CheckpointError(f"{path}: expected one of {expected}; found none")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if there is no such file, ConfigError if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint needs its config.json beside its weights") from None
    except (ValueError, RecursionError) as error:
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
