""".ci/release.py 0.1.0: check what a release promises, then tag it. Nothing is pushed; on a problem nothing is done.

`make release VERSION=0.1.0` runs this. All problems are listed at once; the tests run last, when there is no other.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("make", "test")


def main(arguments: Sequence[str], root: Path = ROOT, tests: Sequence[str] = TESTS) -> int:
    """0: the tag is made. 1: it is not, for the reasons printed."""
    version = arguments[0] if len(arguments) == 1 else ""
    if not re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", version):
        return refuse(
            [f"expected one version x.y.z, as in make release VERSION=0.1.0, got {' '.join(arguments) or 'none'}"]
        )
    checks = (dirty_tree, tag_exists, other_package_version, missing_changes, other_one_liners, invalid_manifest)
    problems = [problem for check in checks for problem in check(root, version)] or failing_tests(root, tests)
    if problems:
        return refuse(problems)
    git(root, "tag", "-a", f"v{version}", "-m", f"hubmodels {version}")
    print(f"v{version} is tagged. To publish it: git push origin v{version}")
    return 0


def refuse(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    return 1


def dirty_tree(root: Path, version: str) -> list[str]:
    changed = git(root, "status", "--porcelain").splitlines()
    return (
        [f"the tree is not clean; commit or remove first: {', '.join(line[3:] for line in changed)}"] if changed else []
    )


def tag_exists(root: Path, version: str) -> list[str]:
    return [f"the tag v{version} exists; a tag never moves"] if git(root, "tag", "--list", f"v{version}") else []


def other_package_version(root: Path, version: str) -> list[str]:
    path = root / "hubmodels" / "__init__.py"
    found = re.search(r'^__version__ = "(.*)"', read(path), re.MULTILINE)
    ours = found and found[1]
    return [] if ours == version else [f"{path}: expected __version__ {version}, got {ours}"]


def missing_changes(root: Path, version: str) -> list[str]:
    path = root / "CHANGELOG.md"
    found = re.search(rf"^## \[{re.escape(version)}\] - (\S+)\s*$", read(path), re.MULTILINE)
    try:
        date.fromisoformat(found[1] if found and len(found[1]) == 10 else "")
    except ValueError:
        return [f"{path}: expected a section '## [{version}] - YYYY-MM-DD'"]
    return []


def other_one_liners(root: Path, version: str) -> list[str]:
    """README.md's "OWNER/hubmodels:TAG", as torch.hub takes it. A line with source="local" names a directory."""
    path = root / "README.md"
    lines = [(number, line) for number, line in enumerate(read(path).splitlines(), 1) if "local" not in line]
    named = [(n, ref) for n, line in lines for ref in re.findall(r"""["'][\w-]+/hubmodels(?::([^"']*))?["']""", line)]
    if not named:
        return [f'{path}: expected a torch.hub line that names "OWNER/hubmodels:v{version}"']
    wrong = [(number, ref or "no tag") for number, ref in named if ref != f"v{version}"]
    return [f"{path}:{number}: expected hubmodels:v{version}, got {ref}" for number, ref in wrong]


def invalid_manifest(root: Path, version: str) -> list[str]:
    """By the schema, by the package's reader, and by the bytes of the files that the tag will hold."""
    import jsonschema

    from hubmodels.catalog import manifest
    from hubmodels.errors import HubModelsError
    from hubmodels.store import verify

    path, schema = root / "weights_manifest.json", root / "docs" / "manifest.schema.json"
    try:
        content, rules = json.loads(read(path)), json.loads(read(schema))
        found = jsonschema.validators.validator_for(rules)(rules).iter_errors(content)
        problems = [f"{path}: {error.json_path}: {error.message}" for error in found]
        records = [] if problems else manifest(path).values()
        for file in {file for record in records for file in record.files if file.is_embedded}:
            if not git(root, "ls-files", "--", file.filename):
                problems.append(f"{file.filename}: git does not track it, so the tag would not hold it")
            verify(root / file.filename, file)
    except ValueError as error:
        return [f"{path} or {schema}: not JSON, or missing: {error}"]
    except HubModelsError as error:
        return [*problems, str(error)]
    return problems


def failing_tests(root: Path, tests: Sequence[str]) -> list[str]:
    code = subprocess.run(tests, cwd=root, check=False).returncode
    return [f"the tests fail: {' '.join(tests)} ended with {code}"] if code else []


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip(
        "\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
