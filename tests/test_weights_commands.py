"""The commands about weights: what they print, for people and for machines, and the code they end with."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import REPOSITORY
from servers import REVISION, FakeHub, fail
from test_kit import clean_environment, write_code
from test_upkeep import HOLD
from test_verification import (
    NO_CHECK,
    Small,
    catalog,
    pinned_at,
    small_repository,
    spoil,
    tiny_bert,
    tiny_check,
    tiny_entry,
)

import hubmodels
from hubmodels import hub, store
from hubmodels.catalog import lookup, manifest

BERT = tiny_bert()
TOTAL = sum(len(BERT[name]) for name in ("model.safetensors", "vocab.txt"))


@pytest.fixture
def refused(run):
    """arguments -> what is said on standard error by a command that has done nothing"""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("hubmodels: error: ")
        return err.removeprefix("hubmodels: error: ")

    return call


@pytest.fixture
def small(monkeypatch, tmp_path) -> Iterator[Small]:
    with small_repository(monkeypatch, tmp_path / "repository") as small:
        write_code(small.root)
        yield small


def rows_of(table: str) -> list[list[str]]:
    """The cells of the lines under the head."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()[1:]]


def everything(root: Path) -> dict[str, object]:
    """Each path below, and what would tell that somebody wrote there."""
    return {str(p.relative_to(root)): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*")}


# --- list and show


def test_list_names_all_weights(answer):
    lines = answer("list").splitlines()
    assert lines[0].split() == ["NAME", "FAMILY", "PARAMETERS", "MB", "LICENCE"]
    assert [line.split()[0] for line in lines[1:]] == list(manifest())


def test_list_as_json_is_the_catalog(answer):
    assert json.loads(answer("list", "--json")) == hub.catalog()


def test_list_tells_the_sizes_of_what_was_published_without_them(answer):
    """OpenAI's shards have no published sizes: four bytes a parameter."""
    [line] = [line for line in answer("list").splitlines() if line.startswith("openai-gpt ")]
    assert line.split()[1:4] == ["gpt", "116,534,784", "466.1"]


def test_show_tells_what_is_known(answer):
    record = lookup("bert-base-uncased")
    text = answer("show", record.name)
    for fact in (record.name, record.licence, record.homepage, record.weights[0].sha256, record.revision):
        assert fact in text
    assert all(key in text for key in record.config)


def test_show_as_json_is_complete(answer):
    record = lookup("bert-base-uncased")
    files = [{**vars(file), "mirrors": list(file.mirrors)} for file in record.files]
    assert json.loads(answer("show", "bert-base-uncased", "--json")) == {**vars(record), "files": files}


@pytest.mark.parametrize("name", list(manifest()))
def test_show_works_for_every_name(answer, name):
    assert name in answer("show", name)


def test_show_tells_git_digests_and_no_size_that_nobody_knows(answer):
    record = lookup("openai-gpt")
    text = answer("show", record.name)
    assert all(file.filename in text for file in record.files)
    digests = [file.git_sha1 for file in record.files if file.git_sha1]
    assert len(digests) >= 10
    assert all(digest in text for digest in digests)
    shown = json.loads(answer("show", record.name, "--json"))
    assert shown["files"] == [{**vars(file), "mirrors": list(file.mirrors)} for file in record.files]


def test_show_tells_mirrors_when_there_are_some(small, answer):
    """A line that says () tells nobody anything."""
    assert "mirrors" not in answer("show", "some-bert")
    entry = small.entry("some-bert")
    entry["files"][0]["mirrors"] = ["https://example.org/model.safetensors"]
    small.change(some_bert=entry)
    assert "https://example.org/model.safetensors" in answer("show", "some-bert")


# --- fetch


def test_fetch_prints_where_each_file_is_and_how_it_came(small, answer):
    lines = answer("fetch", "some-bert", "tiny").splitlines()
    assert lines[0].split() == ["NAME", "FILE", "PATH", "HOW"]
    paths = [small.place(number=number).path for number in range(2)]
    how = f"downloaded: hf_hub_download from {small.hub.url}"
    assert rows_of("\n".join(lines))[:2] == [
        ["some-bert", name, str(path), how]
        for name, path in zip(("model.safetensors", "vocab.txt"), paths, strict=True)
    ]
    assert [row[0] for row in rows_of("\n".join(lines))] == ["some-bert", "some-bert", "tiny", "tiny"]
    assert [path.read_bytes() for path in paths] == [BERT["model.safetensors"], BERT["vocab.txt"]]


def test_fetch_as_json_is_complete(small, answer):
    first = json.loads(answer("fetch", "some-bert", "--json"))
    paths = [str(small.place(number=number).path) for number in range(2)]
    assert [(row["name"], row["file"], row["path"]) for row in first] == [
        ("some-bert", "model.safetensors", paths[0]),
        ("some-bert", "vocab.txt", paths[1]),
    ]
    assert all(row["how"].startswith("downloaded: ") for row in first)
    small.hub.stop()
    assert {row["how"] for row in json.loads(answer("fetch", "some-bert", "--json"))} == {
        "in the store, unchanged since it was hashed"
    }


def test_fetch_all(small, answer):
    small.change(twin=tiny_entry(pinned_at(small.hub, "someone/twin", seed=1), check=NO_CHECK))
    rows = json.loads(answer("fetch", "--all", "--json"))
    assert [row["name"] for row in rows] == ["tiny", "tiny", "some-bert", "some-bert", "twin", "twin"]
    assert (small.place("twin").path.read_bytes()) == tiny_bert(1)["model.safetensors"]


def test_fetch_needs_a_name(small, refused):
    assert refused("fetch") == "no weights: name some, or give --all; hubmodels list shows them\n"
    assert "did you mean some-bert" in refused("fetch", "tiny", "some-brt")
    assert small.hub.requests == []


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_one_failure_does_not_stop_the_others(small, run, form):
    """Each file that cannot be had is told, with how to fetch it by hand, and the rest is fetched."""
    small.change(gone=tiny_entry(pinned_at(small.hub, "someone/gone", seed=1), check=NO_CHECK))
    del small.hub.files[f"someone/gone/resolve/{REVISION}/model.safetensors"]
    code, out, err = run("fetch", "gone", "some-bert", *form)
    assert code == 2
    assert err.startswith("hubmodels: error: gone: model.safetensors (SHA-256")
    assert err.count("hubmodels: error: ") == 1
    assert "curl -L" in err
    rows = json.loads(out) if form else rows_of(out)
    names = [(row["name"], row["file"]) if form else tuple(row[:2]) for row in rows]
    assert names == [("gone", "vocab.txt"), ("some-bert", "model.safetensors"), ("some-bert", "vocab.txt")]
    assert small.place().path.is_file()


def test_fetch_of_nothing_that_can_be_had_prints_no_table(small, run):
    small.hub.answer = fail(404)
    code, out, err = run("fetch", "some-bert")
    assert (code, out) == (2, "")
    assert err.count("hubmodels: error: some-bert: ") == 2


# --- fetch --to


@pytest.fixture
def mirror(small, answer, tmp_path) -> Path:
    """What fetch --to has made; the hub it came from is gone."""
    rows = json.loads(answer("fetch", "some-bert", "--to", tmp_path / "mirror", "--json"))
    assert all(Path(row["path"]).is_relative_to(tmp_path / "mirror") for row in rows)
    small.hub.stop()
    return tmp_path / "mirror"


def whole_files(root: Path) -> dict[str, bytes]:
    found = [path for path in root.rglob("*") if not path.is_dir() and ".hubmodels" not in path.parts]
    assert not any(path.is_symlink() for path in found)
    return {path.name: path.read_bytes() for path in found}


def test_to_a_directory_come_whole_files(small, mirror):
    assert whole_files(mirror) == {name: BERT[name] for name in ("model.safetensors", "vocab.txt")}
    assert not store.root_of(None).exists()


def test_to_a_directory_files_of_other_caches_are_copied(small, answer, tmp_path):
    """From the store, and from behind a link in the directory itself: it is to be carried away."""
    small.fetch()
    small.hub.stop()
    small.fetch(cache_dir=tmp_path / "mirror")
    assert small.place(cache_dir=tmp_path / "mirror").path.is_symlink()
    rows = rows_of(answer("fetch", "some-bert", "--to", tmp_path / "mirror"))
    assert [row[3] for row in rows] == [f"copied from {small.place(number=number).path}" for number in range(2)]
    assert whole_files(tmp_path / "mirror") == {name: BERT[name] for name in ("model.safetensors", "vocab.txt")}
    small.fetch()[0].unlink()
    assert rows_of(answer("fetch", "some-bert", "--to", tmp_path / "mirror"))[0][3].startswith("in the store")


def test_to_a_relative_directory(small, answer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    answer("fetch", "some-bert", "--to", "mirror")
    assert len(whole_files(tmp_path / "mirror")) == 2


def test_such_a_directory_is_a_cache_dir(small, mirror):
    model = hubmodels.bertModel("some-bert", cache_dir=mirror)
    assert model.provenance.files[0].path.is_relative_to(mirror)
    assert hubmodels.verify("some-bert", cache_dir=mirror).difference < 1e-5
    assert not store.root_of(None).exists()


def test_such_a_directory_is_a_mirror(small, mirror, monkeypatch, answer):
    monkeypatch.setenv("HUBMODELS_MIRROR", f"/nowhere {mirror}")
    assert [row[3] for row in rows_of(answer("fetch", "some-bert"))] == [
        f"adopted from {small.place(number=number, cache_dir=mirror).path}" for number in range(2)
    ]
    assert hubmodels.verify("some-bert").difference < 1e-5


def test_such_a_directory_served_by_any_web_server_is_a_mirror(small, mirror, monkeypatch, run):
    """When the hub cannot be reached, which is said."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=mirror)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HUBMODELS_MIRROR", f"{base}/")
        code, out, _ = run("fetch", "some-bert")
        server.shutdown()
        thread.join()
    inside = small.place().path.relative_to(small.place().root)
    assert code == 0
    assert rows_of(out)[0][3] == f"downloaded: {base}/{inside}"
    assert not small.place().path.is_symlink()
    assert hubmodels.verify("some-bert").difference < 1e-5


# --- bundle and unbundle


def arrive(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """From now on this is another machine, with nothing on it."""
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


def test_bundle_says_what_to_do_on_the_other_machine(small, answer, tmp_path):
    path = tmp_path / "my kit.tar"
    first, second, third, line = answer("bundle", "some-bert", "tiny", "-o", path).splitlines()
    sha256 = store.sha256_of(path)
    assert first == f"{path}: some-bert, tiny; {path.stat().st_size / 1e6:,.1f} MB"
    assert second == f"SHA-256 {sha256}"
    assert third == "On the other machine, with torch installed:"
    words = shlex.split(line)
    assert words[:4] == ["tar", "-xf", "my kit.tar", "repository"]
    assert words[4:6] == ["&&", "PYTHONPATH=repository"]
    assert words[6:] == ["python", "-m", "hubmodels", "unbundle", "my kit.tar", "--sha256", sha256]


def test_bundle_as_json_is_complete(small, answer, tmp_path):
    told = json.loads(answer("bundle", "--all", "-o", tmp_path / "kit.tar", "--json"))
    size, sha256 = (tmp_path / "kit.tar").stat().st_size, store.sha256_of(tmp_path / "kit.tar")
    assert told == {"kit": str(tmp_path / "kit.tar"), "size": size, "sha256": sha256, "names": ["tiny", "some-bert"]}


def test_bundle_takes_files_from_another_store(small, answer, tmp_path):
    small.fetch(cache_dir=tmp_path / "mine")
    small.hub.stop()
    answer("bundle", "some-bert", "-o", tmp_path / "kit.tar", "--cache-dir", tmp_path / "mine")


def test_bundle_refuses(small, refused, tmp_path):
    assert "no weights" in refused("bundle", "-o", tmp_path / "kit.tar")
    assert "did you mean some-bert" in refused("bundle", "some-brt", "-o", tmp_path / "kit.tar")
    assert str(tmp_path / "gone" / "kit.tar") in refused("bundle", "tiny", "-o", tmp_path / "gone" / "kit.tar")
    small.hub.answer = fail(404)
    assert "model.safetensors" in refused("bundle", "some-bert", "-o", tmp_path / "kit.tar")
    (small.root / "hubconf.py").unlink()
    assert "hubconf.py" in refused("bundle", "tiny", "-o", tmp_path / "kit.tar")
    assert not list(tmp_path.glob("kit.tar*"))


def test_unbundle_says_how_to_load(small, answer, monkeypatch, tmp_path):
    answer("bundle", "some-bert", "tiny", "-o", tmp_path / "kit.tar")
    small.hub.stop()
    arrive(monkeypatch, tmp_path / "other")
    directory = tmp_path / "other" / "hub" / f"hubmodels_v{hubmodels.__version__}"
    assert answer("unbundle", tmp_path / "kit.tar").splitlines() == [
        f"2 files of some-bert, tiny are in the store; the code is in {directory}",
        f'  torch.hub.load("{directory}", ENTRY_POINT, "some-bert", source="local")',
        f'  torch.hub.load("{directory}", ENTRY_POINT, "tiny", source="local")',
    ]
    lines = answer("unbundle", tmp_path / "kit.tar", "--owner", "me").splitlines()
    where = f"me/hubmodels:v{hubmodels.__version__}"
    assert lines[1] == f'  torch.hub.load("{where}", ENTRY_POINT, "some-bert", trust_repo=True)'


def test_unbundle_as_json_is_complete(small, answer, monkeypatch, tmp_path):
    answer("bundle", "some-bert", "-o", tmp_path / "kit.tar")
    arrive(monkeypatch, tmp_path / "other")
    told = json.loads(answer("unbundle", tmp_path / "kit.tar", "--json", "--cache-dir", tmp_path / "mine"))
    files = [str(small.place(number=number, cache_dir=tmp_path / "mine").path) for number in range(2)]
    directory = tmp_path / "other" / "hub" / f"hubmodels_v{hubmodels.__version__}"
    assert told == {"names": ["some-bert"], "repository": str(directory), "files": files}


def test_unbundle_compares_the_kit_with_the_digest_that_came_another_way(small, answer, refused, monkeypatch, tmp_path):
    path = tmp_path / "kit.tar"
    sha256 = json.loads(answer("bundle", "some-bert", "-o", path, "--json"))["sha256"]
    arrive(monkeypatch, tmp_path / "other")
    wrong = "0" * 64
    text = refused("unbundle", path, "--sha256", wrong)
    assert text == f"{path}: expected SHA-256 {wrong}, got {sha256}; copy the kit again\n"
    assert not (tmp_path / "other").exists()
    answer("unbundle", path, "--sha256", sha256.upper())


def test_unbundle_refuses(small, answer, refused, monkeypatch, tmp_path):
    path = tmp_path / "kit.tar"
    answer("bundle", "some-bert", "-o", path)
    arrive(monkeypatch, tmp_path / "other")
    assert "expected the name of a GitHub account" in refused("unbundle", path, "--owner", "me/hubmodels")
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in refused("unbundle", path)
    for more in ((), ("--sha256", "0" * 64)):
        assert str(tmp_path / "gone.tar") in refused("unbundle", tmp_path / "gone.tar", *more)
        assert str(tmp_path) in refused("unbundle", tmp_path, *more)
    assert not any((tmp_path / "other").rglob("*.py"))


# --- verify


def test_verify_prints_a_row_for_each(small, answer):
    small.fetch()
    lines = answer("verify", "some-bert", "tiny").splitlines()
    assert lines[0].split() == ["NAME", "MB", "TENSORS", "OUTPUT"]
    found = hubmodels.verify("some-bert")
    first, second = rows_of("\n".join(lines))
    assert first == ["some-bert", "right", f"{TOTAL / 1e6:,.1f}", str(found.tensors), found.output]
    assert second[:2] == ["tiny", "right"]


def test_verify_as_json_is_complete(small, answer, run):
    small.fetch()
    found = hubmodels.verify("some-bert")
    row = {"name": "some-bert", "right": True, "bytes": TOTAL, "tensors": found.tensors, "output": found.output}
    assert json.loads(answer("verify", "some-bert", "--json")) == [row]
    spoil(small.place())
    code, out, err = run("verify", "tiny", "some-bert", "--json")
    right, wrong = json.loads(out)
    assert (code, err) == (1, "")
    assert (right["name"], right["right"]) == ("tiny", True)
    assert (wrong["name"], wrong["right"]) == ("some-bert", False)
    assert small.place().file.sha256 in wrong["error"]


def test_verify_without_names_does_what_is_here(small, answer):
    """Also what another cache has."""
    assert [row[0] for row in rows_of(answer("verify"))] == ["tiny"]
    small.fetch()
    assert [row[0] for row in rows_of(answer("verify"))] == ["tiny", "some-bert"]
    asked = len(small.hub.requests)
    small.place(number=1).remove()
    assert [row[0] for row in rows_of(answer("verify"))] == ["tiny"]
    assert len(small.hub.requests) == asked


def test_verify_of_another_store(small, answer, run, tmp_path):
    small.fetch(cache_dir=tmp_path / "mine")
    assert [row[0] for row in rows_of(answer("verify", "--cache-dir", tmp_path / "mine"))] == ["tiny", "some-bert"]
    assert run("verify", "some-bert")[0] == 1


def test_verify_tells_what_is_wrong_after_what_is_right(small, run):
    small.fetch()
    spoil(small.place())
    code, out, err = run("verify", "some-bert", "tiny")
    assert code == 1
    assert [row[:2] for row in rows_of(out)] == [["tiny", "right"], ["some-bert", "WRONG"]]
    assert err.startswith(f"hubmodels: error: some-bert: {small.place().path}: expected SHA-256")
    assert run("fetch", "some-bert")[0] == 0
    assert run("verify", "some-bert")[0] == 0


def test_verify_downloads_nothing(small, run):
    code, out, err = run("verify", "some-bert")
    assert code == 1
    assert rows_of(out) == [["some-bert", "MISSING"]]
    assert "curl -L" in err
    assert small.hub.requests == []


def test_verify_tells_another_output(small, run):
    small.fetch()
    expected = tiny_check()["expected"]
    expected[0][0][0] += 0.5
    small.change(some_bert={**small.entry("some-bert"), "check": tiny_check(expected=expected)})
    code, out, err = run("verify", "some-bert")
    assert code == 1
    assert rows_of(out) == [["some-bert", "WRONG"]]
    assert "last_hidden_state differs by 5.0e-01" in err
    assert err.count("some-bert") == 1  # the name once, not before each part of the message


def test_verify_tells_that_there_is_nothing_to_compare_with(small, answer):
    small.fetch()
    small.change(some_bert={**small.entry("some-bert"), "check": NO_CHECK})
    assert rows_of(answer("verify", "some-bert"))[0][4] == f"nothing to compare with: {NO_CHECK['none']}"


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_verify_refuses_an_unknown_name_before_it_begins(small, refused, monkeypatch, form):
    """A slip of the pen; nothing was found wrong, and the minutes of the others would be lost."""
    monkeypatch.setattr(store, "rehash", lambda *_, **__: pytest.fail("something was hashed"))
    assert "did you mean some-bert" in refused("verify", "tiny", "some-brt", *form)


# --- where


def state_of(answer, name: str, *more: object) -> list[str]:
    """The words for each file; the table and JSON say the same."""
    told = json.loads(answer("where", name, "--json", *more))
    table = answer("where", name, *more)
    assert table.splitlines()[0].split() == ["FILE", "STATE", "PATH"]
    assert rows_of(table) == [[row["file"], row["state"], row["path"]] for row in told]
    assert all(row.keys() == {"file", "path", "state", "size", "source"} for row in told)
    return [row["state"] for row in told]


@pytest.fixture
def asks_nothing(small, answer, tmp_path):
    """`where`, which writes nothing, asks nobody and hashes nothing"""

    def call(name: str = "some-bert", *more: object) -> list[str]:
        before, asked = everything(tmp_path), len(small.hub.requests)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file was hashed"))
            states = state_of(answer, name, *more)
        assert everything(tmp_path) == before
        assert len(small.hub.requests) == asked
        return states

    return call


def test_where_a_file_of_this_repository_is(small, answer, asks_nothing):
    assert asks_nothing("tiny") == ["in this repository"] * 2
    [row, _] = json.loads(answer("where", "tiny", "--json"))
    path = small.root / "hubmodels" / "weights" / "tiny" / "model.safetensors"
    size = len(tiny_bert(7)["model.safetensors"])
    assert (row["path"], row["size"], row["source"]) == (str(path), size, "this repository")
    path.unlink()
    assert asks_nothing("tiny") == ["missing", "in this repository"]


def test_where_nothing_is(small, answer, asks_nothing):
    assert asks_nothing() == ["not here"] * 2
    [row, _] = json.loads(answer("where", "some-bert", "--json"))
    url = f"https://huggingface.co/someone/some-bert/resolve/{REVISION}/model.safetensors"
    assert (row["path"], row["source"]) == (str(small.place().path), url)
    assert row["size"] == len(BERT["model.safetensors"])


def test_where_a_file_is_that_was_hashed(small, asks_nothing):
    [path, _] = small.fetch()
    assert asks_nothing() == ["verified"] * 2
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert asks_nothing() == ["here, to be hashed when it is used", "verified"]


def test_where_a_file_is_that_somebody_put_there(small, asks_nothing):
    """As the error of a failed download says how."""
    small.place().path.parent.mkdir(parents=True)
    small.place().path.write_bytes(BERT["model.safetensors"])
    assert asks_nothing() == ["here, to be hashed when it is used", "not here"]


def test_where_a_link_leads(small, asks_nothing, monkeypatch, tmp_path):
    theirs = small.fetch(cache_dir=tmp_path / "mirror")
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "mirror"))
    assert asks_nothing() == ["in another cache, to be hashed when it is used"] * 2
    small.fetch()
    assert asks_nothing() == [f"verified, a link to {path}" for path in theirs]
    os.utime(theirs[0], (1_000_000_000, 1_000_000_000))
    assert asks_nothing()[0] == f"here, to be hashed when it is used, a link to {theirs[0]}"
    theirs[0].unlink()
    assert asks_nothing()[0] == "not here"


def test_where_another_cache_is(small, answer, asks_nothing, tmp_path):
    """The Hugging Face cache; a file of another size is not the one."""
    snapshot = Path(hubs_cache(), "models--someone--some-bert", "snapshots", REVISION)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(BERT["model.safetensors"])
    (snapshot / "vocab.txt").write_bytes(b"other")
    assert asks_nothing() == ["in another cache, to be hashed when it is used", "not here"]
    [row, _] = json.loads(answer("where", "some-bert", "--json"))
    assert row["path"] == str(snapshot / "model.safetensors")


def hubs_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def test_where_a_part_is(small, asks_nothing):
    place = small.place()
    place.state.mkdir(parents=True)
    place.part.write_bytes(BERT["model.safetensors"][:1234])
    assert asks_nothing() == ["not here; 1,234 bytes have come", "not here"]


def test_where_in_another_store(small, asks_nothing, tmp_path):
    small.fetch(cache_dir=tmp_path / "mine")
    assert asks_nothing("some-bert", "--cache-dir", tmp_path / "mine") == ["verified"] * 2
    assert asks_nothing() == ["not here"] * 2


def test_where_torch_hubs_downloads_hold_a_broken_link(small, asks_nothing, answer):
    """What lies there is the user's; one file that cannot be looked at is not the one, and that is all."""
    checkpoints = Path(torch.hub.get_dir(), "checkpoints")
    checkpoints.mkdir(parents=True)
    (checkpoints / "gone.pt").symlink_to(checkpoints / "nowhere.pt")
    assert asks_nothing() == ["not here"] * 2
    assert len(rows_of(answer("fetch", "some-bert"))) == 2


def test_where_refuses_an_unknown_name(small, refused):
    assert "did you mean some-bert" in refused("where", "some-brt")


# --- clean


def told(text: str) -> tuple[dict[str, tuple[str, str]], str]:
    """path -> its megabytes and why it may go; and the line below the table"""
    *rows, last = text.splitlines()
    assert rows[0].split() == ["PATH", "MB", "WHY"]
    return {path: (size, why) for path, size, why in rows_of("\n".join(rows))}, last


def interrupted(small: Small, name: str = "some-bert") -> Path:
    """What has come of a download that was interrupted: 3 MB"""
    place = small.place(name)
    place.state.mkdir(parents=True, exist_ok=True)
    (place.state / "lock").touch()
    place.part.write_bytes(b"0" * 3_000_000)
    return place.part


def test_clean_has_nothing_to_do(small, answer):
    nothing = f"{store.root_of(None)}: nothing to remove\n"
    assert answer("clean") == nothing
    small.fetch()
    assert answer("clean") == nothing
    assert answer("clean", "--yes") == nothing
    assert json.loads(answer("clean", "--json")) == []
    assert small.place().is_stamped()


def test_clean_says_first(small, answer):
    part = interrupted(small)
    before = everything(store.root_of(None))
    rows, last = told(answer("clean"))
    assert rows == {str(part): ("3.0", "a download that did not finish")}
    assert last == "3.0 MB; to remove it, add --yes"
    assert everything(store.root_of(None)) == before
    rows, last = told(answer("clean", "--yes"))
    assert rows == {str(part): ("3.0", "a download that did not finish")}
    assert last == "3.0 MB removed"
    assert everything(store.root_of(None)) == {}


def test_clean_as_json_is_complete(small, answer):
    part = interrupted(small)
    row = {"path": str(part), "bytes": 3_000_000, "why": "a download that did not finish"}
    assert json.loads(answer("clean", "--json")) == [{**row, "removed": False}]
    assert part.is_file()
    assert json.loads(answer("clean", "--yes", "--json")) == [{**row, "removed": True}]
    assert not part.exists()


def test_clean_removes_what_this_version_does_not_pin(small, answer):
    """Its last version did, perhaps."""
    small.fetch()
    small.change(twin=tiny_entry(pinned_at(small.hub, "someone/twin", seed=1), check=NO_CHECK))
    gone = small.fetch("twin")
    content = small.content
    del content["weights"]["twin"]
    (small.root / "weights_manifest.json").write_text(json.dumps(content))
    catalog.manifest.cache_clear()
    assert set(told(answer("clean"))[0]) == {str(path) for path in gone}
    answer("clean", "--yes")
    assert [path.exists() for path in gone] == [False, False]
    assert small.place().is_stamped()


def test_clean_removes_weights_by_name(small, answer):
    """But not a file that another name needs too."""
    files = pinned_at(small.hub, "someone/twin", seed=1)
    small.change(twin=tiny_entry([files[0], small.entry("some-bert")["files"][1]], check=NO_CHECK))
    paths, [own, _] = small.fetch(), small.fetch("twin")
    assert set(told(answer("clean", "twin"))[0]) == {str(own)}
    answer("clean", "twin", "--yes")
    assert [path.exists() for path in (own, *paths)] == [False, True, True]
    assert set(told(answer("clean", "--all"))[0]) == {str(path) for path in paths}
    answer("clean", "--all", "--yes")
    assert everything(store.root_of(None)) == {}


def test_clean_leaves_this_repository_alone(small, answer):
    before = everything(small.root)
    assert answer("clean", "tiny", "--yes") == f"{store.root_of(None)}: nothing to remove\n"
    assert everything(small.root) == before


def test_clean_of_another_store(small, answer, tmp_path):
    here, there = small.fetch(), small.fetch(cache_dir=tmp_path / "mine")
    answer("clean", "--all", "--yes", "--cache-dir", tmp_path / "mine")
    assert everything(tmp_path / "mine") == {}
    assert [path.is_file() for path in here] == [True, True]
    assert not any(path.exists() for path in there)


def test_clean_lets_a_download_run(small, run):
    part = interrupted(small)
    command = [sys.executable, "-c", HOLD, str(part.parent / "lock")]
    for form in ([], ["--json"]):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            code, out, err = run("clean", "--yes", *form)
            other.stdin.close()
        assert code == 0
        if form:
            assert [row["removed"] for row in json.loads(out)] == [False]
        else:
            assert err == f"hubmodels: {part} stays: a download uses it\n"
            assert told(out)[1] == "0.0 MB removed"
    assert part.stat().st_size == 3_000_000


def test_clean_refuses_an_unknown_name(small, refused):
    small.fetch()
    assert "did you mean some-bert" in refused("clean", "some-brt", "--yes")
    assert small.place().is_stamped()


def test_clean_that_may_not_is_told(small, refused, monkeypatch):
    """A read-only file system, say."""

    def denied(self, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", os.fspath(self))

    part = interrupted(small)
    monkeypatch.setattr(Path, "unlink", denied)
    assert str(part) in refused("clean", "--yes")


# --- As processes


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Iterator[tuple[Path, FakeHub]]:
    """A copy of this repository with tiny weights, and the hub that has them."""
    root, hub = tmp_path_factory.mktemp("tree"), FakeHub()
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(REPOSITORY / "hubmodels", root / "hubmodels", ignore=ignored)
    weights = {"some-bert": tiny_entry(pinned_at(hub))}
    (root / "weights_manifest.json").write_text(json.dumps({"schema": 1, "weights": weights}))
    with hub.listening():
        yield root, hub


def process(root: Path, home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hubmodels", *map(str, arguments)]
    own = clean_environment(home, **environment)
    return subprocess.run(command, cwd=root, env=own, capture_output=True, text=True, timeout=120)


def test_fetch_and_verify_as_processes(tree, tmp_path):
    root, hub = tree
    fetched = process(root, tmp_path, "fetch", "some-bert", HF_ENDPOINT=hub.url)
    assert (fetched.returncode, fetched.stderr) == (0, "")
    assert [row[1] for row in rows_of(fetched.stdout)] == ["model.safetensors", "vocab.txt"]
    verified = process(root, tmp_path, "verify", HF_HUB_OFFLINE="1")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert rows_of(verified.stdout)[0][:2] == ["some-bert", "right"]
    path = tmp_path / "hub" / "hubmodels" / "huggingface.co" / "someone" / "some-bert" / REVISION / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    wrong = process(root, tmp_path, "verify", "some-bert", HF_HUB_OFFLINE="1")
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr


def test_an_error_of_a_process_is_told_on_standard_error(tree, tmp_path):
    root, hub = tree
    failed = process(root, tmp_path, "fetch", "some-bert", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("hubmodels: error: some-bert: model.safetensors")
    assert "HF_HUB_OFFLINE is set" in failed.stderr
    assert "Traceback" not in failed.stderr
