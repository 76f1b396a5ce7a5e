"""A path -> the checkpoint there: its config, the files of its weights, its tokenizer. Archives are unpacked for it."""

import errno
import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .catalog import manifest
from .errors import CatalogError, CheckpointError, ConfigError, HubModelsError, InputError
from .tokenizers import Tokenizer, read_tokenizer

NATIVE_WEIGHTS = "hubmodels.safetensors"  # under our own names, which no other library would understand
_WEIGHTS = (
    NATIVE_WEIGHTS,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TENSORFLOW_FILE = re.compile(r"(.+\.ckpt(-\d+)?)\.(index|data-\d{5}-of-\d{5})")
_CONFIGS = ("config.json", "bert_config.json")  # the second is Google's, beside TensorFlow's checkpoints
_OPENAI_SHAPES = "params_shapes.json"  # beside OpenAI's shards, which come without a config.json
_OPENAI_FILE = re.compile(r"params_(\d+\.npy|shapes\.json)")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_MEMBER = re.compile(r"[^.\0][^\0]*\.(json|txt|bpe|safetensors|bin|npy|index|data-\d{5}-of-\d{5})", re.DOTALL)
_LONGEST_TEXT = 64 << 20  # bytes of a config or a vocabulary


class LocalCheckpoint(NamedTuple):
    """published: config.json's content, read from `config_source`. path: the weights, or the directory without any."""

    published: Mapping[str, Any]
    config_source: str
    path: Path


def local_path(weights: str | Path) -> Path | None:
    """The path that `weights` means, if it means one. A string may be a name, a Path never is.

    TensorFlow's own way to name a checkpoint, bert_model.ckpt, which is no file, means its .index.
    """
    if not isinstance(weights, str | os.PathLike):
        raise InputError(f"weights: expected a name or a path, got {type(weights).__name__}")
    if not isinstance(weights, os.PathLike) and weights in manifest():
        return None
    path = Path(weights)
    index = path.with_name(f"{path.name}.index") if path.name else path
    if not path.exists() and index.is_file():
        return index
    if isinstance(weights, os.PathLike) and not path.exists():
        raise CatalogError(f"{path}: no such file or directory; a name of the manifest is given as a str")
    return path if path.exists() else None


@contextmanager
def unpacked(path: Path, texts_only: bool = False) -> Iterator[Path]:
    """The path itself; of an archive, a directory with its files, which is removed in the end.

    texts_only: the weights are not needed. Raises CheckpointError for a damaged archive, and for one of several models.
    Errors of what is done with the files name the archive.
    """
    if not path.is_file() or not path.name.lower().endswith(_ARCHIVES) or _is_of_torch(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hubmodels-") as made:
        try:
            _unpack(path, Path(made), _LONGEST_TEXT if texts_only else None)
        except HubModelsError:
            raise
        except Exception as error:  # a damaged archive makes the libraries stumble in a dozen ways
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise _no_place(path, made, str(error)) from None
            raise CheckpointError(f"{path}: not an archive, or a damaged one: {error}. Fetch it again") from None
        try:
            yield Path(made)
        except HubModelsError as error:
            text = str(error).replace(f"{made}{os.sep}", f"{path}: ").replace(made, str(path))
            raise type(error)(text) from None


def _no_place(path: Path, directory: str | Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be unpacked into {directory}: {why}; TMPDIR names another place, or unpack it yourself"
    )


def _is_of_torch(path: Path) -> bool:
    """Whether torch.save wrote it, whose zip is no archive of files. Its tutorials call checkpoints .tar."""
    with open(path, "rb") as file:
        start = file.read(300)
    member = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    return start[:2] == b"\x80\x02" or (start[:4] == b"PK\3\4" and member.endswith(b"/data.pkl"))


def _unpack(path: Path, directory: Path, most: int | None) -> None:
    """Plain files of a checkpoint's kinds, by their last names: no name in an archive becomes a path."""
    archive: Any
    with open(path, "rb") as file:  # a tar may hold a zip, which zipfile would find
        is_zip = file.read(2) == b"PK"
    with zipfile.ZipFile(path) if is_zip else tarfile.open(path) as archive:
        if isinstance(archive, zipfile.ZipFile):
            found = [(i.filename, i.file_size, i) for i in archive.infolist() if not i.is_dir()]
        else:
            found = [(member.name, member.size, member) for member in archive if member.isfile()]
        chosen = [each for each in found if _MEMBER.fullmatch(PurePosixPath(each[0]).name)]
        chosen = [each for each in chosen if most is None or each[1] <= most]
        needed, free = sum(size for _, size, _ in chosen), shutil.disk_usage(directory).free
        if needed > free:
            raise _no_place(path, directory, f"it needs {needed} bytes, {free} are free")
        names: dict[str, str] = {}
        for member, _, entry in chosen:
            name = PurePosixPath(member).name
            if name in names:
                raise CheckpointError(
                    f"{path}: {names[name]} and {member} are of two checkpoints; unpack it and name one directory"
                )
            names[name] = member
            source = archive.open(entry) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(entry)
            with source, open(directory / name, "xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        if isinstance(archive, tarfile.TarFile):
            while archive.fileobj.read(1 << 20):  # a compressed one has its checksum at the end
                pass


def local_checkpoint(path: Path) -> LocalCheckpoint:
    """What a directory, or one of a checkpoint's files, stands for. Raises CheckpointError, ConfigError."""
    directory = path if path.is_dir() else path.parent
    if _OPENAI_FILE.fullmatch(path.name) and (directory / _OPENAI_SHAPES).is_file():
        path = directory  # a shard stands for all of them
    if part := _TENSORFLOW_FILE.fullmatch(path.name):
        path = directory / f"{part[1]}.index"  # a data file stands for all of them
    config = next((directory / name for name in _CONFIGS if (directory / name).is_file()), directory / _CONFIGS[0])
    if path.is_dir() and (path / _OPENAI_SHAPES).is_file() and not config.is_file():
        return LocalCheckpoint({}, f"{path} (no config.json: GPT as published)", path)
    published = read_json(config)
    if config.name == _CONFIGS[1]:
        published = {"model_type": "bert", **published}
    if path.is_dir():
        indices = sorted(path.glob("*.ckpt*.index"))
        found = [path / name for name in _WEIGHTS if (path / name).is_file()] or indices or [path]
        if found == indices and len(indices) > 1:
            raise CheckpointError(
                f"{path}: expected one checkpoint, got {', '.join(p.name for p in indices)}; name one"
            )
        path = found[0]
    return LocalCheckpoint(published, str(config), path)


def files_of(path: Path) -> list[Path]:
    """The files that hold the tensors: a file and its shards, or those of OpenAI's in a directory.

    Raises CheckpointError for a directory without any.
    """
    if path.name.endswith(".index.json"):
        stem, end = path.name.removesuffix(".index.json").rsplit(".", 1)
        return [path, *sorted(path.parent.glob(f"{escape(stem)}-*-of-*.{end}"))]
    if path.suffix == ".index":
        return [path, *sorted(path.parent.glob(f"{escape(path.stem)}.data-*"))]
    if not path.is_dir():
        return [path]
    if not (path / _OPENAI_SHAPES).is_file():
        raise CheckpointError(
            f"{path}: expected model.safetensors or pytorch_model.bin beside config.json, or one of them in parts with "
            "its .index.json, or bert_model.ckpt.index; found none of them"
        )
    return [each for each in sorted(path.iterdir()) if _OPENAI_FILE.fullmatch(each.name)]


def what_to_read(files: Sequence[Path]) -> Path:
    """Of the files that hold the tensors, the one that leads to the others; the directory of those that are equal."""
    index = next((path for path in files if path.name.endswith((".index", ".index.json"))), None)
    if index or (len(files) == 1 and files[0].name != _OPENAI_SHAPES):
        return index or files[0]
    return files[0].parent


_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("encoder_bpe_40000.json", "vocab_40000.bpe"),
)


def local_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a directory, or the one that a file, or the first of two, holds. Raises CheckpointError."""
    if not path.is_dir():
        names = next((names for names in _VOCABULARIES if names[0] == path.name), (path.name,))
        return read_tokenizer(path, *(path.with_name(name) for name in names[1:]))
    options = tokenizer_options(path)
    for files in _VOCABULARIES:
        if (path / files[0]).is_file():
            return read_tokenizer(*(path / name for name in files), **options)
    expected = ", ".join(" and ".join(files) for files in _VOCABULARIES)
    raise CheckpointError(f"{path}: expected one of {expected}; found none")


def has_tokenizer(directory: Path) -> bool:
    return any((directory / files[0]).is_file() for files in _VOCABULARIES)


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
