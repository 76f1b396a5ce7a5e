"""The release script in small repositories: each promise broken by itself, then all at once, then kept."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

PASSING = (sys.executable, "-c", "")
FAILING = (sys.executable, "-c", "raise SystemExit(3)")
README = """# hubmodels
    model = torch.hub.load("OWNER/hubmodels:v1.2.3", "bertModel", "tiny", trust_repo=True)
    torch.hub.help('OWNER/hubmodels:v1.2.3', "bertModel")
    torch.hub.load("clones/hubmodels", "bertModel", "tiny", source="local")
"""
CHANGELOG = "# Changes\n\n## [1.2.3] - 2026-02-03\n- all\n\n## [1.2.2] - 2026-01-02\n- less\n"
SCHEMA = {"type": "object", "required": ["schema", "weights"], "properties": {"schema": {"const": 1}}}
WEIGHTS, VOCABULARY = "hubmodels/weights/tiny/model.safetensors", "hubmodels/weights/tiny/vocab.txt"


def manifest(weights: bytes = b"weights", **changes) -> dict:
    files = [
        {"source": ".", "revision": None, "filename": n, "size": len(c), "sha256": hashlib.sha256(c).hexdigest()}
        for n, c in ((WEIGHTS, weights), (VOCABULARY, b"[PAD]\n"))
    ]
    entry = {
        "family": "bert",
        "config": {},
        "tokenizer": {"file": VOCABULARY},
        "files": files,
        "dialect": "huggingface",
        "licence": "MIT",
        "homepage": "docs",
        "citation": "none",
        "parameters": 1,
        "check": {"none": "too small"},
    }
    return {"schema": 1, "weights": {"tiny": {**entry, **changes}}}


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")


def commit(root: Path, files: dict[str, str]) -> None:
    write(root, files)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "change")


@pytest.fixture
def release(monkeypatch):
    """The script as a module, in an environment that points git at no repository or settings but a test's own."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Someone")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "someone@example.org")
    spec = importlib.util.spec_from_file_location("release", REPOSITORY / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(release, tmp_path) -> Path:
    """A repository that is ready for release 1.2.3."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet")
    files = {
        "hubmodels/__init__.py": '"""Package."""\n\n__version__ = "1.2.3"\n',
        "README.md": README,
        "CHANGELOG.md": CHANGELOG,
        "docs/manifest.schema.json": json.dumps(SCHEMA),
        "weights_manifest.json": json.dumps(manifest()),
        WEIGHTS: "weights",
        VOCABULARY: "[PAD]\n",
    }
    commit(root, files)
    return root


def assert_refused(release, root, capsys, *words: str, arguments=("1.2.3",), tests=PASSING) -> None:
    state = git(root, "tag"), git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")
    assert release.main(arguments, root, tests) == 1
    assert (git(root, "tag"), git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")) == state
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == len(words), printed.err
    for line, word in zip(lines, words, strict=True):
        assert line.startswith("release: ")
        assert word in line


def test_a_repository_in_order_is_tagged_and_nothing_is_pushed(release, repository, capsys):
    assert release.main(["1.2.3"], repository, PASSING) == 0
    assert git(repository, "cat-file", "-t", "v1.2.3") == "tag"  # annotated
    assert git(repository, "rev-parse", "v1.2.3^{commit}") == git(repository, "rev-parse", "HEAD")
    assert "git push origin v1.2.3" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("",), ("1.2",), ("v1.2.3",), ("1.2.3rc1",), ("01.2.3",), ("1.2.3", "x")])
def test_an_odd_version_is_refused(arguments, release, repository, capsys):
    assert_refused(release, repository, capsys, "expected one version x.y.z", arguments=arguments)


def test_a_dirty_tree_is_refused_by_name(release, repository, capsys):
    write(repository, {"README.md": README + "more\n", "new.txt": ""})
    assert_refused(release, repository, capsys, "the tree is not clean; commit or remove first: README.md, new.txt")


def test_a_tag_that_exists_is_refused(release, repository, capsys):
    git(repository, "tag", "v1.2.3")
    assert_refused(release, repository, capsys, "the tag v1.2.3 exists")


@pytest.mark.parametrize(("content", "got"), [('__version__ = "1.2.2"\n', "got 1.2.2"), ("", "got None")])
def test_another_package_version_is_refused(content, got, release, repository, capsys):
    commit(repository, {"hubmodels/__init__.py": content})
    assert_refused(release, repository, capsys, f"expected __version__ 1.2.3, {got}")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "## [1.2.30] - 2026-02-03\n",
        "## [1.2.3]\n",
        "## [1.2.3] - unreleased\n",
        "## [1.2.3] - 2026-02-30\n",
        "## [1.2.3] - 20260203\n",
        "## 1.2.3 - 2026-02-03\n",
    ],
)
def test_a_version_without_a_dated_section_is_refused(content, release, repository, capsys):
    commit(repository, {"CHANGELOG.md": content})
    assert_refused(release, repository, capsys, "expected a section '## [1.2.3] - YYYY-MM-DD'")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("nothing\n", 'names "OWNER/hubmodels:v1.2.3"'),
        (README.replace('load("OWNER/hubmodels:v1.2.3', 'load("OWNER/hubmodels:v1.2.2'), "README.md:2: expected"),
        (README.replace("help('OWNER/hubmodels:v1.2.3", "help('OWNER/hubmodels"), "README.md:3: expected"),
        (README + 'repo = "OWNER/hubmodels:TAG"\n', "got TAG"),
    ],
)
def test_one_liners_with_another_tag_are_refused(content, word, release, repository, capsys):
    commit(repository, {"README.md": content})
    assert_refused(release, repository, capsys, word)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("weights_manifest.json", json.dumps({"schema": 1}), "'weights' is a required property"),
        ("weights_manifest.json", json.dumps({**manifest(), "schema": 2}), "$.schema: 1 was expected"),
        ("weights_manifest.json", json.dumps(manifest(surprise=1)), "the entry tiny is not valid"),
        ("weights_manifest.json", json.dumps(manifest(weights=b"longer weights")), "expected 14 bytes, got 7"),
        ("weights_manifest.json", json.dumps(manifest(weights=b"WEIGHTS")), "expected SHA-256"),
        ("weights_manifest.json", "{", "not JSON"),
        ("docs/manifest.schema.json", "", "not JSON, or missing"),
        (WEIGHTS, "altered", "expected SHA-256"),
    ],
)
def test_a_manifest_that_is_not_valid_is_refused(name, content, word, release, repository, capsys):
    commit(repository, {name: content})
    assert_refused(release, repository, capsys, word)


def test_weights_that_the_tag_would_lack_are_refused(release, repository, capsys):
    git(repository, "rm", "--quiet", "--cached", WEIGHTS)
    commit(repository, {".gitignore": "*.safetensors\n"})
    assert_refused(release, repository, capsys, "git does not track it")


def test_failing_tests_are_refused(release, repository, capsys):
    assert_refused(release, repository, capsys, "the tests fail", tests=FAILING)


def test_all_problems_are_listed_and_the_tests_wait(release, repository, capsys):
    git(repository, "tag", "v1.2.3")
    commit(repository, {"hubmodels/__init__.py": "", "CHANGELOG.md": "", "README.md": "", WEIGHTS: "altered"})
    write(repository, {"new.txt": ""})
    words = ("not clean", "exists", "__version__", "a section", "torch.hub line", "expected SHA-256")
    assert_refused(release, repository, capsys, *words, tests=FAILING)


def test_the_command_ends_with_1_and_a_reason(tmp_path):
    done = subprocess.run(
        [sys.executable, REPOSITORY / ".ci" / "release.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "expected one version x.y.z, as in make release VERSION=0.1.0, got none" in done.stderr
