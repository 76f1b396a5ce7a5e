"""The commands about weights: what there is, where it is, whether it is right."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .. import __version__, hub, kit, store
from ..catalog import Record, lookup, manifest
from ..errors import HubModelsError, InputError
from ..pinning import pin
from ..store.upkeep import removable, remove
from ..verification import Verification, verify
from .output import print_json, print_table


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """command: makes a parser from a name, the function that runs, and a line of help."""
    command("list", _list, "Every weights name.")
    command("show", _show, "What is known of one checkpoint.").add_argument("name", metavar="NAME")
    fetched = command("fetch", _fetch, "Download weights now, to load them later.")
    fetched.add_argument("--to", type=Path, metavar="DIR", help="here, whole: to carry away, to serve as a mirror")
    bundled = command("bundle", _bundle, "Put code, weights and manifest into one tar, for where there is no network.")
    bundled.add_argument("-o", "--output", type=Path, required=True, metavar="KIT.tar")
    unbundled = command("unbundle", _unbundle, "Verify such a tar and unpack it.")
    unbundled.add_argument("kit", type=Path, metavar="KIT.tar")
    unbundled.add_argument("--sha256", metavar="DIGITS", help="what bundle printed; the kit must have it")
    unbundled.add_argument("--owner", help='for torch.hub.load("OWNER/hubmodels:TAG", ...)')
    verified = command("verify", _verify, "Hash all bytes again, load the model, replay its stored output.")
    placed = command("where", _where, "Where the files of a checkpoint are, and what is known of them.")
    placed.add_argument("name", metavar="NAME")
    cleaned = command("clean", _clean, "Remove what is left of downloads, and weights: says what first.")
    cleaned.add_argument("--yes", action="store_true", help="remove it")
    for made, none in ((fetched, ""), (bundled, ""), (verified, "; none: all that are here"), (cleaned, "")):
        made.add_argument("names", nargs="*", metavar="NAME", help=f"weights{none}")
    for made in (fetched, bundled, cleaned):
        made.add_argument("--all", action="store_true", help="all weights")
    for made in (bundled, unbundled, verified, placed, cleaned):
        made.add_argument("--cache-dir", type=Path, metavar="DIR", help="the store, instead of torch.hub's directory")
    pinned = command("pin", _pin, "For maintainers: write the manifest's entry for a Hugging Face repository.")
    pinned.add_argument("repository", metavar="REPO_ID", help="owner/name, at HF_ENDPOINT")
    pinned.add_argument("name", metavar="NAME", help="of the weights in the manifest")
    pinned.add_argument("--revision", default="main", help="pin the commit that this is now (main)")
    pinned.add_argument("--licence", help="if the repository's card names none")
    pinned.add_argument("--citation", help="what to cite (the repository)")
    pinned.add_argument("--manifest", type=Path, metavar="FILE", help="another manifest than this version's")


def _list(options: argparse.Namespace) -> None:
    rows = hub.catalog()
    if options.json:
        return print_json(rows)
    lines = [(r["name"], r["family"], f"{r['parameters']:,}", f"{r['megabytes']:.1f}", r["licence"]) for r in rows]
    print_table(("NAME", "FAMILY", "PARAMETERS", "MB", "LICENCE"), lines, right=(2, 3))


def _show(options: argparse.Namespace) -> None:
    record = lookup(options.name)
    files = [{**vars(file)} for file in record.files]
    if options.json:
        return print_json({**vars(record), "files": files})
    facts = {
        "name": record.name,
        "family": record.family,
        "parameters": f"{record.parameters:,}",
        "licence": record.licence,
        "homepage": record.homepage,
        "citation": record.citation,
        "notes": record.notes or "none",
        "check": record.check.get("source") or f"none: {record.check.get('none')}",
    }
    print_table(("FACT", ""), facts.items())
    print()
    print_table(("CONFIG", ""), ((key, str(value)) for key, value in record.config.items()))
    for file in files:
        print()
        head = ("FILE", file.pop("filename"))
        print_table(head, ((key, str(value)) for key, value in file.items() if value not in (None, ())))


def _fetch(options: argparse.Namespace) -> int:
    rows, failed = [], []
    for record in _chosen(options):
        for file in record.files:
            try:
                path, how = store.fetch(file, cache_dir=options.to, own=options.to is not None)
                rows.append({"name": record.name, "file": file.filename, "path": str(path), "how": how})
            except HubModelsError as error:
                failed.append(f"hubmodels: error: {record.name}: {error}")
    if options.json:
        print_json(rows)
    elif rows:
        print_table(("NAME", "FILE", "PATH", "HOW"), (tuple(row.values()) for row in rows))
    for line in failed:
        print(line, file=sys.stderr)
    return 2 if failed else 0


def _bundle(options: argparse.Namespace) -> None:
    names = [record.name for record in _chosen(options)]
    sha256 = kit.bundle(names, options.output, __version__, cache_dir=options.cache_dir)
    size = options.output.stat().st_size
    if options.json:
        return print_json({"kit": str(options.output), "size": size, "sha256": sha256, "names": names})
    print(f"{options.output}: {', '.join(names)}; {size / 1e6:,.1f} MB")
    print(f"SHA-256 {sha256}")
    name = shlex.quote(options.output.name)
    print("On the other machine, with torch installed:")
    print(f"  tar -xf {name} repository && PYTHONPATH=repository python -m hubmodels unbundle {name} --sha256 {sha256}")


def _unbundle(options: argparse.Namespace) -> None:
    if not options.kit.is_file():
        raise InputError(f"{options.kit}: no such file")
    if options.sha256 and (got := store.sha256_of(options.kit)) != options.sha256.lower():
        raise InputError(f"{options.kit}: expected SHA-256 {options.sha256}, got {got}; copy the kit again")
    found = kit.unbundle(options.kit, owner=options.owner, cache_dir=options.cache_dir)
    if options.json:
        files = [str(path) for path in found.files]
        return print_json({"names": found.names, "repository": str(found.repository), "files": files})
    print(f"{len(found.files)} files of {', '.join(found.names)} are in the store; the code is in {found.repository}")
    where = f'"{options.owner}/hubmodels:v{found.version}"' if options.owner else f'"{found.repository}"'
    source = "trust_repo=True" if options.owner else 'source="local"'
    for name in found.names:
        print(f'  torch.hub.load({where}, ENTRY_POINT, "{name}", {source})')


def _verify(options: argparse.Namespace) -> int:
    """A row for each; 1 if one of them is not what was tagged."""
    names = [lookup(name).name for name in options.names] or [
        name for name in manifest() if _is_here(name, options.cache_dir)
    ]
    found: dict[str, Verification | HubModelsError] = {}
    for name in names:
        try:
            found[name] = verify(name, cache_dir=options.cache_dir)
        except HubModelsError as error:
            found[name] = error
    right = {name: each for name, each in found.items() if isinstance(each, Verification)}
    wrong = {name: str(each) for name, each in found.items() if name not in right}
    if options.json:
        print_json(
            [
                {"name": n, "right": True, "bytes": v.size, "tensors": v.tensors, "output": v.output}
                for n, v in right.items()
            ]
            + [{"name": name, "right": False, "error": error} for name, error in wrong.items()]
        )
    else:
        rows = [(n, "right", f"{v.size / 1e6:,.1f}", str(v.tensors), v.output) for n, v in right.items()]
        rows += [(name, "WRONG" if _is_here(name, options.cache_dir) else "MISSING", "", "", "") for name in wrong]
        print_table(("NAME", "", "MB", "TENSORS", "OUTPUT"), rows, right=(2, 3))
        for name, text in wrong.items():
            print(f"hubmodels: error: {'' if text.startswith(name) else name + ': '}{text}", file=sys.stderr)
    return 1 if wrong else 0


def _where(options: argparse.Namespace) -> None:
    record = lookup(options.name)
    rows: list[dict[str, str | int | None]] = []
    for file in record.files:
        path, state = store.state_of(file, cache_dir=options.cache_dir)
        source = "this repository" if file.is_embedded else store.url_of(file)
        rows.append({"file": file.filename, "path": str(path), "state": state, "size": file.size, "source": source})
    if options.json:
        return print_json(rows)
    print_table(("FILE", "STATE", "PATH"), (tuple(str(row[key]) for key in ("file", "state", "path")) for row in rows))


def _clean(options: argparse.Namespace) -> None:
    """Without names: what is left of downloads, and what this version's manifest does not pin."""
    chosen = {record.name for record in _chosen(options, anything=True)}
    keep = [file for record in manifest().values() if record.name not in chosen for file in record.files]
    root = store.root_of(options.cache_dir)
    found = removable(root, keep)
    used = remove(root, found) if options.yes else found
    if options.json:
        return print_json(
            [
                {"path": str(each.path), "bytes": each.size, "why": each.why, "removed": each not in used}
                for each in found
            ]
        )
    if not found:
        return print(f"{root}: nothing to remove")
    print_table(("PATH", "MB", "WHY"), ((str(each.path), f"{each.size / 1e6:,.1f}", each.why) for each in found), (1,))
    if not options.yes:
        return print(f"{sum(each.size for each in found) / 1e6:,.1f} MB; to remove it, add --yes")
    for each in used:
        print(f"hubmodels: {each.path} stays: a download uses it", file=sys.stderr)
    return print(f"{sum(each.size for each in found if each not in used) / 1e6:,.1f} MB removed")


def _pin(options: argparse.Namespace) -> None:
    entry = pin(
        options.repository,
        options.name,
        __version__,
        revision=options.revision,
        licence=options.licence,
        citation=options.citation,
        path=options.manifest,
    )
    print_json({options.name: entry})


def _chosen(options: argparse.Namespace, anything: bool = False) -> Iterable[Record]:
    if options.all:
        return list(manifest().values())
    if not options.names and not anything:
        raise InputError("no weights: name some, or give --all; hubmodels list shows them")
    return [lookup(name) for name in dict.fromkeys(options.names)]


def _is_here(name: str, cache_dir: Path | None) -> bool:
    return all(store.state_of(file, cache_dir=cache_dir)[0].is_file() for file in lookup(name).files)
