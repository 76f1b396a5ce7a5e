"""A model -> files that transformers, or this library, loads. Nothing that was there is lost if it fails."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint.config import Family, FamilyConfig
from .errors import InputError
from .heads import Model
from .loading import AnyModel, takes_num_labels
from .local import NATIVE_WEIGHTS
from .tokenizers import Tokenizer

FORMS = ("hf", "native")
LARGEST_FILE = "50GB"  # as transformers cuts
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# What a published config.json says beyond the forward pass that stays true of the same model in other files.
_KEPT = (
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "language", "directionality"),
    *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
)
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Contents:
    """What is saved: tensors under our names, and of which class of which family they are.

    published: what config.json said where they come from, which keeps its say on what is not of the forward pass.
    """

    family: Family
    cls: type[AnyModel]
    config: FamilyConfig
    tensors: Mapping[str, Tensor]
    published: Mapping[str, Any]

    def config_json(self) -> dict[str, Any]:
        found = {"architectures": [self.cls.architecture or self.cls.__name__], **self.config.to_published()}
        kept = {key: self.published[key] for key in _KEPT if key in self.published}
        if not takes_num_labels(self.cls):
            return {**found, **{key: value for key, value in kept.items() if "label" not in key}}
        labels = len(self.tensors["classifier.bias"])
        if len(kept.get("id2label") or ()) != labels:
            kept["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            kept["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        return {**found, **kept}


def export(
    model: AnyModel,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    form: str = "hf",
    max_file_size: int | str = LARGEST_FILE,
) -> Path:
    """Write config.json, model.safetensors and, if given, the tokenizer's files. Returns the directory.

    form: "hf", Hugging Face's names, which transformers loads; "native", ours, in hubmodels.safetensors: it is loaded
        as it is mapped, without a copy.
    max_file_size: weights above it are cut into several files with an index; bytes, or such as "5GB". Native weights
        are one file.
    What is read back is bit-equal. All files are written before the first takes its place. Raises InputError.
    """
    published = getattr(getattr(model, "provenance", None), "published", {})
    return save(
        Contents(model.family, type(model), model.config, model.state_dict(), published),
        Path(directory),
        tokenizer,
        form,
        max_file_size,
    )


def save(contents: Contents, directory: Path, tokenizer: Tokenizer | None, form: str, max_file_size: int | str) -> Path:
    """As `export`."""
    if form not in FORMS:
        raise InputError(f"form = {form!r}: expected {' or '.join(FORMS)}")
    most = _bytes(max_file_size)
    keys = contents.family.keys if form == "hf" else contents.family.keys.native
    tensors = keys.dump(contents.tensors, prefixed=issubclass(contents.cls, Model))
    with _staged(directory) as stage:
        if form == "native":
            _save_file(tensors, stage / NATIVE_WEIGHTS)
        else:
            _save_files(tensors, stage, most)
        if tokenizer is not None:
            tokenizer.save_files(stage)
        _write_json(stage / "config.json", contents.config_json())
    return directory


def _save_files(tensors: Mapping[str, Tensor], stage: Path, most: int) -> None:
    """Whole, or cut as transformers cuts: in order, a file as full as it may be."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        return _save_file(parts[0], stage / "model.safetensors")
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _save_file(part, stage / file)
        places |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(stage / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors makes its files readable by their owner alone


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A directory in `directory`, whose files move up in the end, all written; on an error nothing has changed.

    Weights that were there in another form go: they would be taken for these.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        yield stage
        for path in stage.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        names = sorted((path.name for path in stage.iterdir()), key=lambda name: (name.endswith(".json"), name))
        for name in names:  # the weights, then what says how they are to be read
            os.replace(stage / name, directory / name)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for path in made:
            path.rmdir()
        raise
    stage.rmdir()
    for path in directory.iterdir():
        if path.name not in names and (_OURS.fullmatch(path.name) or path.name == NATIVE_WEIGHTS):
            path.unlink()


def _bytes(size: int | str) -> int:
    """5_000_000 or "5MB" -> bytes"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)", size, re.IGNORECASE) if isinstance(size, str) else None
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else size
    if type(count) is not int or count < 1:
        raise InputError(f"max_file_size = {size!r}: expected a number of bytes, or such as 5GB")
    return count
