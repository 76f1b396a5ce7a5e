"""A model -> files that transformers, or this library, loads. Nothing that was there is lost if it fails."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint.config import Family, FamilyConfig
from .errors import HubModelsError, InputError, StoreError
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
    *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "pad_token_id"),
)
_WEIGHTS = re.compile(
    rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.json|{re.escape(NATIVE_WEIGHTS)}"
)


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
        ours = {"architectures": [self.cls.architecture or self.cls.__name__], **self.config.to_published()}
        fields = {field.name for field in dataclasses.fields(self.config)}
        kept = {key: self.published[key] for key in _KEPT if key in self.published and key not in fields}
        words = ours["vocab_size"]
        for key in [key for key in (*ours, *kept) if key.endswith("_token_id") and key not in fields]:
            value = kept.get(key, ours.get(key))
            kept[key] = value if value is None or value < words else None  # it was one of a larger vocabulary
        scores_choices = "classifier" in self.cls.own_parts and not takes_num_labels(self.cls)
        if "classifier.bias" not in self.tensors or scores_choices:  # there are no labels
            return {**ours, **{key: value for key, value in kept.items() if "label" not in key}}
        labels = len(self.tensors["classifier.bias"])
        if len(kept.get("id2label") or ()) != labels:
            kept["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            kept["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        return {**ours, **kept}


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
    What is read back is bit-equal. All files are written before the first takes its place, and what was there comes
    back on an error. Raises InputError, StoreError.
    """
    if hasattr(model, "acceleration"):
        raise InputError(
            "export: an accelerated copy's weights are packed for this machine; export what it was made of"
        )
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

    try:
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, path, {"format": "pt"})
    except ModuleNotFoundError as error:  # torch.hub installs nothing
        raise HubModelsError(
            f"{path.name}: safetensors needs {error.name} to write: pip install {error.name}"
        ) from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A directory in `directory`, whose files move up in the end, all written; on an error nothing has changed.

    Weights that were there in another form go: they would be taken for these.
    """
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]  # never raises
    stage: Path | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
        yield stage
        _move_up(stage, directory)
        shutil.rmtree(stage)
    except BaseException as error:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, HubModelsError):
            raise StoreError(f"{directory}: cannot be written: {error}; what was there before is unchanged") from error
        raise


def _move_up(stage: Path, directory: Path) -> None:
    """All files, the weights before what says how they are to be read; on an error what was there is put back."""
    new = sorted(stage.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
    mode = (stage / "config.json").stat().st_mode  # safetensors makes its files readable by their owner alone
    for path in new:
        path.chmod(mode)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    names = {path.name for path in new}
    old = [path for path in directory.iterdir() if path.name in names or _WEIGHTS.fullmatch(path.name)]
    aside = stage / "old"
    aside.mkdir()
    try:
        for path in old:
            os.replace(path, aside / path.name)
        for path in new:
            os.replace(path, directory / path.name)
    except BaseException:
        for path in new:
            if not path.exists():
                (directory / path.name).unlink()
        for path in aside.iterdir():
            os.replace(path, directory / path.name)
        raise


def _bytes(size: int | str) -> int:
    """5_000_000, "5000000" or "5MB" -> bytes"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)?", size, re.IGNORECASE) if isinstance(size, str) else None
    count = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else size
    if type(count) is not int or count < 1:
        raise InputError(f"max_file_size = {size!r}: expected a number of bytes, or such as 5GB")
    return count
