"""For maintainers: a repository on a Hugging Face endpoint -> an entry of the manifest."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import store
from .catalog import is_address, manifest, manifest_path
from .errors import CatalogError, CheckpointError, InputError, StoreError
from .hub.families import ENTRY_POINTS, family_of
from .local import read_json, tokenizer_options

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = (("vocab.txt",), ("vocab.json", "merges.txt"))
_SETTINGS = ("config.json", "tokenizer_config.json")
_SENTENCE = "The ship sailed across the sea, and the captain looked at the stars."
_SLICE = ((0, 1), (1, 4), (1, 4))  # of the last hidden state: three tokens, three numbers of each


def pin(
    repository: str,
    name: str,
    version: str,
    *,
    revision: str = "main",
    licence: str | None = None,
    citation: str | None = None,
    path: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the entry `name` for a repository, owner/name, at the commit that `revision` is now; returns it.

    Every file is downloaded from HF_ENDPOINT; digests and sizes are those of its bytes, and compared with what the
    endpoint says. The check is computed in float64 from them. path: of the manifest, ours if not given.
    Raises InputError, CatalogError, StoreError, CheckpointError, ConfigError; then nothing is written.
    """
    path = path or manifest_path()
    content = _read(path)
    if name in content["weights"]:
        raise InputError(f"{path}: {name} is there already, and an entry never changes; take another name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{name!r}: expected letters, digits and . _ - as a name")
    with TemporaryDirectory(prefix="hubmodels-pin-") as directory:
        commit, files, said = _download(repository, revision, Path(directory), progress)
        licence = licence or said
        if not isinstance(licence, str) or not licence.strip():
            named = f" that is a text, but {licence!r}" if licence else ""
            raise InputError(f"{repository}: its card names no licence{named}; give it with --licence")
        entry = _entry(Path(directory), name, version)
    entry["files"] = [{"source": repository, "revision": commit, **file} for file in files]
    homepage = f"https://huggingface.co/{repository}"
    entry |= {"licence": licence, "homepage": homepage, "citation": (citation or "").strip() or homepage}
    fields = "family config tokenizer files dialect licence homepage citation parameters check"
    content["weights"][name] = {key: entry[key] for key in fields.split()}
    _write(path, content)
    return dict(content["weights"][name])


def dump(content: Mapping[str, Any]) -> str:
    """The manifest as a file: a line for each field of an entry and each file, so that changes can be read."""
    entries = []
    for name, entry in content["weights"].items():
        fields = []
        for key, value in entry.items():
            text = json.dumps(value, ensure_ascii=False)
            if key == "files":
                rows = ",\n".join(f"        {json.dumps(file, ensure_ascii=False)}" for file in value)
                text = f"[\n{rows}\n      ]"
            fields.append(f'      "{key}": {text}')
        entries.append(f'    "{name}": {{\n' + ",\n".join(fields) + "\n    }")
    return f'{{\n  "schema": {content["schema"]},\n  "weights": {{\n' + ",\n".join(entries) + "\n  }\n}\n"


def _download(repository: str, revision: str, directory: Path, progress: bool) -> tuple[str, list[dict[str, Any]], Any]:
    """The commit, the files to pin, and the licence that the repository's card names."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    if not is_address(constants.ENDPOINT):
        raise InputError(f"HF_ENDPOINT = {constants.ENDPOINT}: expected an https address")
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        commit, there = str(info.sha), {file.rfilename: file for file in info.siblings or []}
        names = _names(f"{repository} at {commit}", there)
        with store.progress_bars(progress):
            for name in (*names, *_SETTINGS):
                if name in there:
                    hf_hub_download(repository, name, revision=commit, local_dir=directory, cache_dir=directory)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises errors of three HTTP stacks, of its own and of the system
        raise StoreError(f"{repository} at {revision}: {type(error).__name__}: {str(error).strip()}") from error
    for name in (*names, *_SETTINGS):
        if name in there:
            _compare(f"{repository} {name}", directory / name, there[name])
    files = [
        {"filename": n, "size": (directory / n).stat().st_size, "sha256": store.sha256_of(directory / n)} for n in names
    ]
    return commit, files, getattr(info.card_data, "license", None)


def _names(source: str, there: Mapping[str, Any]) -> tuple[str, ...]:
    """The weights and the vocabulary among a repository's files."""
    weights = next((name for name in _WEIGHTS if name in there), None)
    vocabulary = next((names for names in _VOCABULARIES if set(names) <= set(there)), None)
    if weights is None or vocabulary is None or "config.json" not in there:
        raise CheckpointError(
            f"{source}: expected config.json, {' or '.join(_WEIGHTS)}, and vocab.txt or vocab.json with merges.txt; "
            f"it has {', '.join(sorted(there)) or 'no files'}"
        )
    return weights, *vocabulary


def _compare(source: str, path: Path, said: Any) -> None:
    """With what the endpoint says of the file: its size, and the digest by which it stores it."""
    facts: list[tuple[str, Any, Any]] = [("size", said.size, path.stat().st_size)]
    if said.lfs:
        facts.append(("SHA-256", said.lfs.sha256, store.sha256_of(path)))
    elif said.blob_id:
        facts.append(("git blob SHA-1", said.blob_id, store.git_sha1_of(path)))
    for what, expected, got in facts:
        if expected not in (None, got):
            raise StoreError(f"{source}: expected {what} {expected}, as the endpoint says, got {got}")


def _entry(directory: Path, name: str, version: str) -> dict[str, Any]:
    """What the files say, once the model has been loaded from them."""
    published = read_json(directory / "config.json")
    if "model_type" not in published:
        raise CheckpointError(f"{name}: its config.json has no model_type; families are {', '.join(ENTRY_POINTS)}")
    family = family_of(directory)
    if family not in ENTRY_POINTS:
        raise CheckpointError(f"{name}: its config.json says {family}; families are {', '.join(ENTRY_POINTS)}")
    model = ENTRY_POINTS[family].model(directory, dtype=torch.float64)
    ids = ENTRY_POINTS[family].tokenizer(directory)(_SENTENCE)["input_ids"]
    with torch.no_grad():
        states = model(ids).last_hidden_state[tuple(slice(*bounds) for bounds in _SLICE)]
    if not states.isfinite().all():
        wrong = states[~states.isfinite()][0].item()
        raise CheckpointError(f"{name}: gives {wrong}; a check of that would say nothing")
    known = model.config.to_published()
    return {
        "family": family,
        "config": {key: value for key, value in published.items() if key in known},
        "tokenizer": _tokenizer(directory),
        "dialect": model.provenance.dialect,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "check": {
            "input_ids": ids.tolist(),
            "output": "last_hidden_state",
            "slice": [list(bounds) for bounds in _SLICE],
            "expected": [[[round(x, 6) for x in row] for row in rows] for rows in states.tolist()],
            "atol": 1e-4,
            "source": f"computed in float64 by hubmodels {version} from the pinned file",
        },
    }


def _tokenizer(directory: Path) -> dict[str, Any]:
    """The vocabulary's files, and those of the settings that say how such a one is used."""
    files = next(names for names in _VOCABULARIES if (directory / names[0]).is_file())
    options = tokenizer_options(directory)
    if len(files) == 1:
        options.pop("add_prefix_space", None)
    else:
        options = {"add_prefix_space": True} if options.get("add_prefix_space") else {}
    return {**dict(zip(("file", "merges"), files, strict=False)), **options}


def _read(path: Path) -> dict[str, Any]:
    """A manifest that is valid now: of one that is not, nothing would be known afterwards."""
    manifest.cache_clear()
    manifest(path)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """The new manifest takes the old one's place when the reader of manifests takes it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(dump(content), encoding="utf-8")
        _read(partial)
        os.replace(partial, path)
    except CatalogError as error:
        raise CatalogError(str(error).replace(str(partial), str(path))) from None
    except OSError as error:
        raise CatalogError(f"{path}: cannot be written: {error}") from error
    finally:
        manifest.cache_clear()
        with suppress(OSError):
            partial.unlink()
