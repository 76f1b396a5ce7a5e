"""Whether what is on this machine is what was tagged: its bytes, its tensors, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import store
from .catalog import File, lookup
from .errors import CheckpointError
from .hub.families import ENTRY_POINTS


@dataclass(frozen=True)
class Verification:
    """What was found right. difference: the largest from the check's numbers; None if there is no check."""

    name: str
    files: tuple[tuple[Path, File], ...]
    tensors: int
    difference: float | None
    allowed: float | None
    no_check: str | None

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path, _ in self.files)

    @property
    def output(self) -> str:
        if self.difference is None:
            return f"nothing to compare with: {self.no_check}"
        return f"as published, to {self.difference:.1e} of {self.allowed:.1e} allowed"

    def __str__(self) -> str:
        lines = [f"  {path}: {file.digest}" for path, file in self.files]
        return "\n".join([f"{self.name}: {self.tensors} tensors accounted for; output {self.output}", *lines])


def verify(name: str, *, cache_dir: str | Path | None = None) -> Verification:
    """Hash every byte of a checkpoint, load its model and tokenizer, and replay the manifest's check.

    Nothing is downloaded. cache_dir: the store, instead of the directory `hubmodels` in torch.hub's.
    Raises CatalogError for an unknown name, StoreError for files that are not here or not the pinned ones, and
    CheckpointError if something else comes out than was published.
    """
    record = lookup(name)
    files = tuple((store.rehash(file, cache_dir=cache_dir).path, file) for file in record.files)
    entry = ENTRY_POINTS[record.family]
    model = entry.model(name, cache_dir=cache_dir, progress=False)
    entry.tokenizer(name, cache_dir=cache_dir, progress=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != record.parameters:
        raise CheckpointError(f"{name}: expected {record.parameters:,} parameters, got {parameters:,}")
    check, tensors = record.check, len(model.provenance.report.entries)
    if "none" in check:
        return Verification(name, files, tensors, None, None, check["none"])
    return Verification(name, files, tensors, replay(model, check, name), check["atol"], None)


def replay(model: torch.nn.Module, check: Mapping[str, Any], name: str) -> float:
    """The largest difference between a check's numbers and what the model gives.

    Raises CheckpointError if it is more than the check allows.
    """
    given = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {key: torch.tensor(check[key]) for key in given if key in check}
    with torch.no_grad():
        output = getattr(model(**inputs), check["output"])
    found = output[tuple(slice(*bounds) for bounds in check["slice"])].double()
    expected = torch.tensor(check["expected"], dtype=torch.float64)
    if found.shape != expected.shape:
        raise CheckpointError(f"{name}: the check expects {list(expected.shape)} numbers, got {list(found.shape)}")
    difference = (found - expected).abs().max().item()
    if not difference <= check["atol"]:  # nor is nan
        raise CheckpointError(
            f"{name}: {check['output']} differs by {difference:.1e} from what was published ({check['source']}), "
            f"{check['atol']:.1e} is allowed; the files are the pinned ones, so this installation computes wrongly"
        )
    return difference
