"""Files: fetched once, verified always, found where they are; and what is said when they cannot be had."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest

from hubmodels import store
from hubmodels.errors import CatalogError, StoreError

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
REPO, REVISION, NAME = "someone/some-bert", "0123456789abcdef" * 2 + "01234567", "model.safetensors"
SITE, SHARD = "openai/some-gpt", "model/params_0.npy"
DATA = bytes(range(256)) * 40


class FakeHub:
    """A server on this machine that answers as the Hugging Face hub answers hf_hub_download.

    files: "repo/resolve/revision/name" -> bytes. requests: the method and path of every request for a file.
    answer: what to do instead of serving the file; it is given the handler and the file's bytes.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.answer: Callable[[BaseHTTPRequestHandler, bytes], None] = serve
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                if f"/{REVISION}/" in path:
                    hub.requests.append((self.command, path))
                if path in hub.files:
                    hub.answer(self, hub.files[path])
                else:
                    fail(404, "EntryNotFound")(self, b"")

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, data: bytes = DATA, filename: str = NAME, repo: str = REPO, served: bytes | None = None):
        """Publish `served` (default: data) under the pin of `data`; returns the pin."""
        self.files[f"{repo}/resolve/{REVISION}/{filename}"] = data if served is None else served
        return catalog.File(repo, REVISION, filename, len(data), hashlib.sha256(data).hexdigest())

    def publish(self, data: bytes = DATA, filename: str = SHARD, served: bytes | None = None):
        """As `add`, but as a plain file under an address, of which only git's own digest was ever published."""
        self.files[f"{SITE}/{REVISION}/{filename}"] = data if served is None else served
        digest = hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()
        return catalog.File(f"{self.url}/{SITE}", REVISION, filename, None, None, digest)

    @contextmanager
    def running(self, monkeypatch: pytest.MonkeyPatch) -> Iterator["FakeHub"]:
        """huggingface_hub talks to this server, and does not wait before it tries again."""
        import huggingface_hub
        from huggingface_hub import constants

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()
            huggingface_hub.close_session()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _head(handler: BaseHTTPRequestHandler, status: int, length: int, etag: str, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(length))
    handler.send_header("ETag", f'"{etag}"')
    handler.send_header("X-Repo-Commit", REVISION)
    handler.send_header("Accept-Ranges", "bytes")
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def serve(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    etag = hashlib.sha256(data).hexdigest()
    begin = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
    _head(handler, 206 if begin else 200, len(data) - begin, etag)
    if handler.command == "GET":
        handler.wfile.write(data[begin:])


def fail(status: int, code: str = "") -> Callable[[BaseHTTPRequestHandler, bytes], None]:
    def answer(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.send_response(status)
        handler.send_header("X-Repo-Commit", REVISION)
        if code:
            handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hang_up(times: int) -> Callable[[BaseHTTPRequestHandler, bytes], None]:
    """The connection ends in the middle of the file, `times` times; what is left comes when it is asked for."""
    left = [times]

    def answer(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        if handler.command == "HEAD" or left[0] == 0:
            return serve(handler, data)
        left[0] -= 1
        begin = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        _head(handler, 206 if begin else 200, len(data) - begin, hashlib.sha256(data).hexdigest())
        handler.wfile.write(data[begin : len(data) // 2])
        return None

    return answer


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    with FakeHub().running(monkeypatch) as hub:
        yield hub


def refusal(file, **options) -> str:
    with pytest.raises(StoreError) as caught:
        store.fetch(file, progress=False, **options)
    return str(caught.value)


def lay_out(root: Path, file, data: bytes) -> Path:
    """The file in a Hugging Face cache, as huggingface_hub lays it out: a blob, and a link to it."""
    folder = root / f"models--{file.source.replace('/', '--')}"
    blob = folder / "blobs" / file.sha256
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    path = folder / "snapshots" / file.revision / file.filename
    path.parent.mkdir(parents=True)
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


def cache_root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


# --- Had


def test_a_file_is_downloaded_once(hub):
    file = hub.add()
    path = store.fetch(file, progress=False)
    assert path.read_bytes() == DATA
    assert path.is_relative_to(cache_root())
    assert [method for method, _ in hub.requests] == ["HEAD", "GET"]
    assert {where for _, where in hub.requests} == {f"{REPO}/resolve/{REVISION}/{NAME}"}
    assert store.fetch(file, progress=False) == path
    assert len(hub.requests) == 2


def test_a_file_in_the_users_cache_makes_no_request(hub):
    file = hub.add()
    path = lay_out(cache_root(), file, DATA)
    assert store.fetch(file, progress=False) == path
    assert hub.requests == []


def test_a_cached_file_needs_no_server_at_all(hub):
    file = hub.add()
    path = lay_out(cache_root(), file, DATA)
    hub.stop()
    assert store.fetch(file, progress=False) == path


@pytest.mark.parametrize("kind", [str, Path])
def test_cache_dir_is_used(hub, kind, tmp_path):
    file = hub.add()
    path = store.fetch(file, cache_dir=kind(tmp_path / "mine"), progress=False)
    assert path.is_relative_to(tmp_path / "mine")
    assert not cache_root().exists()
    assert store.fetch(file, cache_dir=kind(tmp_path / "mine"), progress=False) == path
    assert len(hub.requests) == 2


def test_a_home_directory_in_cache_dir(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = hub.add()
    for _ in range(2):
        assert store.fetch(file, cache_dir="~/mine", progress=False).is_relative_to(tmp_path / "mine")
    assert len(hub.requests) == 2


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub):
    file = hub.add()
    hub.answer = hang_up(1)
    assert store.fetch(file, progress=False).read_bytes() == DATA
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET"]


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub):
    file = hub.add()
    answers = [fail(503), fail(429)]
    hub.answer = lambda handler, data: (answers.pop() if answers else serve)(handler, data)
    assert store.fetch(file, progress=False).read_bytes() == DATA


def test_a_file_of_this_repository_is_read_in_place(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "hubmodels")
    (tmp_path / "w.bin").write_bytes(DATA)
    file = catalog.File(".", None, "w.bin", len(DATA), hashlib.sha256(DATA).hexdigest())
    assert store.fetch(file) == tmp_path / "w.bin"
    assert hub.requests == []


# --- Not had


def other_bytes() -> bytes:
    return DATA[:-1] + b"!"


def assert_says_where(text: str, file) -> None:
    assert f"https://huggingface.co/{file.source}/resolve/{file.revision}/{file.filename}" in text
    assert "curl -L" in text


def test_wrong_bytes_of_the_right_size(hub):
    file = hub.add(served=other_bytes())
    text = refusal(file)
    path = Path(text.split(": expected")[0])
    assert path.read_bytes() == other_bytes()
    assert f"expected SHA-256 {file.sha256}, got {hashlib.sha256(other_bytes()).hexdigest()}." in text
    assert "It is not the file that was pinned, so it was not opened." in text
    assert Path(re.search("curl -L -o '(.+?)' ", text)[1]).resolve() == path.resolve()
    assert_says_where(text, file)


def test_wrong_bytes_in_the_cache(hub):
    file = hub.add()
    path = lay_out(cache_root(), file, other_bytes())
    text = refusal(file)
    assert text.startswith(f"{path}: expected SHA-256 {file.sha256}") or str(path.resolve()) in text
    assert hub.requests == []


def test_the_advice_for_wrong_bytes_works(hub):
    """The name in the snapshot is only a link: with the blob still there huggingface_hub would link it again."""
    file = hub.add(served=other_bytes())
    text = refusal(file)
    assert re.search("Delete .* and load again", text)
    named = re.search("Delete '(.+?)'", text)  # else "it": the path that the message begins with
    Path(named[1] if named else text.split(": expected")[0]).unlink()
    blobs = cache_root() / f"models--{REPO.replace('/', '--')}" / "blobs"
    etag = hashlib.sha256(other_bytes()).hexdigest()

    def serve_under_the_same_etag(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        _head(handler, 200, len(DATA), etag)
        if handler.command == "GET":
            handler.wfile.write(DATA)

    hub.answer = serve_under_the_same_etag
    assert store.fetch(file, progress=False).read_bytes() == DATA, sorted(blobs.iterdir())


def test_a_file_that_is_too_short(hub):
    file = hub.add(served=DATA[:-100])
    text = refusal(file)
    assert f"expected {len(DATA)} bytes, got {len(DATA) - 100}." in text
    assert_says_where(text, file)


def test_a_connection_that_always_breaks(hub):
    file = hub.add()
    hub.answer = hang_up(10**9)
    text = refusal(file)
    assert_cannot_be_had(text, file)
    snapshot = cache_root() / f"models--{REPO.replace('/', '--')}" / "snapshots" / REVISION / NAME
    assert not snapshot.exists()


def assert_cannot_be_had(text: str, file, root: Path | None = None) -> None:
    root = root or cache_root()
    path = root / f"models--{REPO.replace('/', '--')}" / "snapshots" / REVISION / file.filename
    assert text.startswith(f"{REPO} {file.filename} is not in {root} and could not be downloaded: ")
    assert f"hf download {REPO} {file.filename} --revision {REVISION}" in text
    assert f"curl -L --create-dirs -o '{path}' " in text
    assert_says_where(text, file)


def test_a_file_that_the_hub_does_not_have(hub):
    file = hub.add()
    hub.files.clear()
    text = refusal(file)
    assert_cannot_be_had(text, file)
    assert "404" in text


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_hub_that_refuses(hub, status):
    file = hub.add()
    hub.answer = fail(status)
    assert_cannot_be_had(refusal(file), file)
    assert len(hub.requests) < 20


def test_a_server_that_is_not_the_hub(hub):
    """A captive portal answers everything with a page of its own."""

    def portal(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "6")
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(b"<html>")

    file = hub.add()
    hub.answer = portal
    assert_cannot_be_had(refusal(file), file)


def test_nobody_answers(hub):
    file = hub.add()
    hub.stop()
    assert_cannot_be_had(refusal(file), file)


def test_offline_says_what_to_fetch(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = hub.add()
    assert_cannot_be_had(refusal(file), file)
    assert hub.requests == []


def test_what_is_to_be_fetched_goes_into_the_cache_that_was_asked_for(hub, tmp_path):
    file = hub.add()
    hub.files.clear()
    text = refusal(file, cache_dir=tmp_path / "mine")
    assert_cannot_be_had(text, file, tmp_path / "mine")
    assert f"--cache-dir {tmp_path / 'mine'}" in text.replace("'", "")


def test_what_curl_was_told_to_fetch_is_found(hub):
    """A person follows the message; then the file is there."""
    file = hub.add()
    hub.files.clear()
    path = Path(refusal(file).split("-o '")[1].split("'")[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert store.fetch(file, progress=False) == path


@pytest.mark.parametrize(
    ("data", "expected"),
    [(None, "missing from this copy"), (DATA[1:], f"expected {len(DATA)} bytes"), (other_bytes(), "expected SHA-256")],
    ids=["missing", "short", "altered"],
)
def test_a_file_of_this_repository_that_is_not_the_tags(monkeypatch, tmp_path, data, expected):
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "hubmodels")
    if data is not None:
        (tmp_path / "w.bin").write_bytes(data)
    text = refusal(catalog.File(".", None, "w.bin", len(DATA), hashlib.sha256(DATA).hexdigest()))
    assert text.startswith(f"{tmp_path / 'w.bin'}: {expected}")
    assert "check out its tag again" in text
    assert "huggingface.co" not in text


def test_a_store_error_is_an_os_error():
    assert issubclass(StoreError, OSError)


# --- Files under an address


def address_root() -> Path:
    return Path(os.environ["TORCH_HOME"]) / "hub" / "hubmodels"


def place_of(hub: FakeHub, root: Path | None = None) -> Path:
    """Where the file of `hub.publish` belongs."""
    host, port = hub.url.removeprefix("http://").split(":")
    return (root or address_root()) / host / port / SITE / REVISION / SHARD


def assert_left_nothing(root: Path) -> None:
    """Neither the file nor a part of it, under whatever name."""
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_an_address_is_downloaded_once_into_torchs_cache(hub):
    file = hub.publish()
    path = store.fetch(file, progress=False)
    assert path == place_of(hub)
    assert path.read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path]
    assert hub.requests == [("GET", f"{SITE}/{REVISION}/{SHARD}")]
    assert store.fetch(file, progress=False) == path
    assert len(hub.requests) == 1
    hub.stop()
    assert store.fetch(file, progress=False) == path


@pytest.mark.parametrize("kind", [str, Path])
def test_an_address_in_a_cache_dir(hub, kind, tmp_path):
    file = hub.publish()
    path = store.fetch(file, cache_dir=kind(tmp_path / "mine"), progress=False)
    assert path == place_of(hub, tmp_path / "mine" / "hubmodels")
    assert store.fetch(file, cache_dir=kind(tmp_path / "mine"), progress=False) == path
    assert len(hub.requests) == 1
    assert not address_root().exists()


def test_an_address_in_a_home_directory(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = hub.publish()
    for _ in range(2):
        path = store.fetch(file, cache_dir="~/mine", progress=False)
        assert path == place_of(hub, tmp_path / "mine" / "hubmodels")
    assert len(hub.requests) == 1


def test_an_address_in_the_directory_that_torch_was_told(hub, monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.hub.set_dir(str(tmp_path / "told"))
    assert store.fetch(hub.publish(), progress=False) == place_of(hub, tmp_path / "told" / "hubmodels")


def test_two_addresses_do_not_share_a_place(hub):
    first, second = hub.publish(), hub.publish(other_bytes(), "other/params_0.npy")
    assert store.fetch(first, progress=False) != store.fetch(second, progress=False)
    assert store.fetch(first, progress=False).read_bytes() == DATA
    assert store.fetch(second, progress=False).read_bytes() == other_bytes()


def test_wrong_bytes_of_an_address(hub):
    file = hub.publish(served=other_bytes())
    text = refusal(file)
    got = hashlib.sha1(b"blob 10240\0" + other_bytes()).hexdigest()
    assert len(other_bytes()) == 10240
    assert f"expected git blob SHA-1 {file.git_sha1}, got {got}." in text
    assert "It is not the file that was pinned, so it was not opened." in text
    assert_left_nothing(address_root())


def test_the_advice_for_wrong_bytes_of_an_address_works(hub):
    """What the message names is the place where the file is looked for, not that of a download that is gone."""
    file = hub.publish(served=other_bytes())
    text = refusal(file)
    assert ".partial" not in text
    assert f"curl -L --create-dirs -o '{place_of(hub)}' {hub.url}/{SITE}/{REVISION}/{SHARD}" in text.replace(
        "curl -L -o", "curl -L --create-dirs -o"
    )
    place_of(hub).parent.mkdir(parents=True, exist_ok=True)
    place_of(hub).write_bytes(DATA)
    assert store.fetch(file, progress=False) == place_of(hub)


def test_wrong_bytes_of_an_address_in_the_cache(hub):
    file = hub.publish()
    path = place_of(hub)
    path.parent.mkdir(parents=True)
    path.write_bytes(other_bytes())
    text = refusal(file)
    assert text.startswith(f"{path}: expected git blob SHA-1 {file.git_sha1}, got ")
    assert f"Delete '{path.resolve()}' and load again" in text
    assert hub.requests == []
    path.unlink()
    assert store.fetch(file, progress=False).read_bytes() == DATA


@pytest.mark.parametrize("pin", ["git_sha1", "sha256", "both"])
def test_what_pins_an_address_is_looked_at(hub, pin):
    """With a SHA-256 that decides, and the size with it."""
    by_git = hub.publish()
    sha256 = hashlib.sha256(DATA).hexdigest()
    pins = {
        "git_sha1": by_git,
        "sha256": catalog.File(by_git.source, REVISION, SHARD, len(DATA), sha256),
        "both": catalog.File(by_git.source, REVISION, SHARD, len(DATA), sha256, by_git.git_sha1),
    }
    path = store.fetch(pins[pin], progress=False)
    path.write_bytes(other_bytes())
    kind = "git blob SHA-1" if pin == "git_sha1" else "SHA-256"
    assert f"expected {kind} " in refusal(pins[pin])
    path.write_bytes(DATA[1:])
    expected = f"expected {kind} " if pin == "git_sha1" else f"expected {len(DATA)} bytes, got {len(DATA) - 1}"
    assert expected in refusal(pins[pin])


def assert_address_cannot_be_had(text: str, hub: FakeHub, root: Path | None = None) -> None:
    url = f"{hub.url}/{SITE}/{REVISION}/{SHARD}"
    root = root or address_root()
    assert text.startswith(f"{url} is not in {root} and could not be downloaded: ")
    assert f"Fetch it by hand: curl -L --create-dirs -o '{place_of(hub, root)}' {url}" in text
    assert_left_nothing(root)


def test_an_address_that_is_not_there(hub):
    file = hub.publish()
    hub.files.clear()
    text = refusal(file)
    assert_address_cannot_be_had(text, hub)
    assert "404" in text


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_site_that_refuses(hub, status):
    file = hub.publish()
    hub.answer = fail(status)
    text = refusal(file)
    assert_address_cannot_be_had(text, hub)
    assert str(status) in text


def test_an_address_where_nobody_answers(hub):
    file = hub.publish()
    hub.stop()
    assert_address_cannot_be_had(refusal(file), hub)


def test_an_address_into_another_cache_that_cannot_be_had(hub, tmp_path):
    file = hub.publish()
    hub.files.clear()
    text = refusal(file, cache_dir=tmp_path / "mine")
    assert_address_cannot_be_had(text, hub, tmp_path / "mine" / "hubmodels")


def test_a_body_that_ends_early(hub):
    """urllib gives what came as if it were all."""
    file = hub.publish()
    hub.answer = hang_up(10**9)
    text = refusal(file)
    assert "curl -L" in text
    assert place_of(hub).name in text
    assert_left_nothing(address_root())
    hub.answer = serve
    assert store.fetch(file, progress=False).read_bytes() == DATA


def test_a_page_instead_of_the_file(hub):
    """A captive portal."""
    file = hub.publish(served=b"<html>")
    assert f"expected git blob SHA-1 {file.git_sha1}, got " in refusal(file)
    assert_left_nothing(address_root())


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "mine").write_text("a file where the directory would be")
    with pytest.raises(StoreError, match="could not be downloaded"):
        store.fetch(hub.publish(), cache_dir=tmp_path / "mine", progress=False)


def test_a_download_that_is_interrupted_leaves_nothing(hub, monkeypatch):
    """Ctrl+C in the middle."""
    import torch

    def interrupted(url, path, **_):
        Path(path).write_bytes(DATA[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.fetch(hub.publish(), progress=False)
    assert_left_nothing(address_root())


def test_two_threads_fetch_one_address(hub, monkeypatch):
    """Both have downloaded before either puts the file in its place."""
    file = hub.publish()
    verify, both = store.verify, threading.Barrier(2, timeout=20)

    def verify_together(path: Path, *pinned) -> None:
        verify(path, *pinned)
        if path != place_of(hub):
            both.wait()

    monkeypatch.setattr(store, "verify", verify_together)
    outcomes: list[object] = []

    def fetch() -> None:
        try:
            outcomes.append(store.fetch(file, progress=False))
        except Exception as error:  # judged below, in the test's own thread
            outcomes.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [place_of(hub)] * 2
    assert list(place_of(hub).parent.iterdir()) == [place_of(hub)]


def test_an_address_with_progress_false_prints_nothing(hub, capfd):
    store.fetch(hub.publish(), progress=False)
    assert capfd.readouterr() == ("", "")


def test_an_address_with_progress_shows_a_bar(hub, capfd):
    store.fetch(hub.publish(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


# --- Which addresses a manifest may name


def manifest_with(tmp_path: Path, **changes):
    """The manifest of one record with one file; changes: of that file."""
    file = {"source": "https://example.org/gpt", "revision": REVISION, "filename": SHARD, "size": None}
    file = {**file, "git_sha1": "0" * 40, **changes}
    record = {
        "family": "gpt",
        "config": {},
        "tokenizer": {"file": SHARD},
        "files": [file],
        "dialect": "openai",
        "licence": "MIT",
        "homepage": "h",
        "citation": "c",
        "parameters": 1,
        "check": {},
    }
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"schema": 1, "weights": {"some-gpt": record}}))
    catalog.manifest.cache_clear()
    try:
        return catalog.manifest(path)["some-gpt"].files[0]
    finally:
        catalog.manifest.cache_clear()


@pytest.mark.parametrize(
    "source", ["https://example.org/gpt", "https://example.org:8443/gpt", "http://127.0.0.1:99/a", "http://localhost/a"]
)
def test_a_manifest_may_name_https_and_this_machine(tmp_path, source):
    file = manifest_with(tmp_path, source=source)
    assert file.is_url
    assert store.url_of(file) == f"{source}/{REVISION}/{SHARD}"


@pytest.mark.parametrize(
    "source",
    [
        "http://example.org/gpt",
        "http://127.0.0.1.example.org/gpt",
        "http://127.0.0.1@example.org/gpt",
        "ftp://example.org/gpt",
        "file:///tmp/gpt",
        "file://localhost/tmp/gpt",
        "ftp://127.0.0.1/gpt",
        "https:///gpt",
        "https://[example/gpt",
    ],
)
def test_a_manifest_may_name_no_other_address(tmp_path, source):
    with pytest.raises(CatalogError, match=re.escape(f"the entry some-gpt: {source}: expected an https address")):
        manifest_with(tmp_path, source=source)


@pytest.mark.parametrize("source", ["https://example.org/../../../gpt", "https://../gpt", "https://example.org/a/.."])
def test_an_address_cannot_lead_out_of_the_cache(tmp_path, source):
    with pytest.raises(CatalogError, match="the entry some-gpt"):
        manifest_with(tmp_path, source=source)


@pytest.mark.parametrize(
    "changes",
    [
        {"git_sha1": None},
        {"git_sha1": "0" * 39},
        {"git_sha1": "0" * 64},
        {"git_sha1": "A" * 40},
        {"git_sha1": None, "sha256": "0" * 64},
        {"sha256": "0" * 64},
        {"sha256": "", "size": 3},
        {"revision": "master"},
        {"revision": None},
        {"filename": "../params_0.npy"},
        {"filename": "/params_0.npy"},
    ],
    ids=str,
)
def test_a_file_that_is_not_pinned_is_refused(tmp_path, changes):
    """Without a size only git's digest will do, which counts the bytes itself."""
    with pytest.raises(CatalogError, match=r"pinned by a SHA-256 .* git blob's SHA-1 of 40 digits"):
        manifest_with(tmp_path, **changes)


def test_no_size_with_gits_digest_is_pinned(tmp_path):
    file = manifest_with(tmp_path)
    assert (file.size, file.sha256, file.digest) == (None, None, f"git blob SHA-1 {'0' * 40}")


# --- Bars


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize("shown", [False, True], ids=["hidden", "shown"])
@pytest.mark.parametrize("disabled", [False, True], ids=["enabled", "disabled"])
def test_the_librarys_switch_stays_as_it_was(hub, shown, disabled, fails):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    seen = []
    file = hub.add()
    if fails:
        hub.files.clear()
    hub.answer = lambda handler, data: (seen.append(are_progress_bars_disabled()), serve(handler, data))
    (disable_progress_bars if disabled else enable_progress_bars)()
    try:
        if fails:
            with pytest.raises(StoreError):
                store.fetch(file, progress=shown)
        else:
            store.fetch(file, progress=shown)
            assert set(seen) == {disabled or not shown}
        assert are_progress_bars_disabled() == disabled
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


def test_progress_false_prints_nothing(hub, capfd):
    store.fetch(hub.add(), progress=False)
    assert capfd.readouterr() == ("", "")


# --- Digests


def test_sha256_of(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert store.sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("data", [b"", b"abc", b"blob 3\0abc", DATA], ids=["empty", "abc", "a blob's", "bytes"])
def test_git_sha1_of(tmp_path, data):
    """The digests of the empty file and of "abc" are known to every git."""
    path = tmp_path / "f"
    path.write_bytes(data)
    digest = store.git_sha1_of(path)
    assert digest == hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    known = {b"": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", b"abc": "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"}
    assert digest == known.get(data, digest)
    if git := shutil.which("git"):
        hashed = subprocess.run([git, "hash-object", "--no-filters", path], capture_output=True, text=True, check=True)
        assert digest == hashed.stdout.strip()


def test_url_of():
    file = catalog.File("a/b", REVISION, "c/d.txt", 1, "0" * 64)
    assert store.url_of(file) == f"https://huggingface.co/a/b/resolve/{REVISION}/c/d.txt"
