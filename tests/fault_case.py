"""A case: a server, a pin, an empty store, and processes in which the store fetches the file."""

import ctypes
import hashlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import urlsplit

from fault_server import DATA, MOST_SECONDS, REVISION, SIZE, Site, honest, serving

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point

REPO, SITE, NAME = "someone/some-bert", "/some/site", "model.safetensors"
SHA256 = hashlib.sha256(DATA).hexdigest()
SILENCE_SECONDS = 0.4  # what counts as silence here

# --- The processes that fetch

PRELOADED = ["fault_case", "hubmodels.store", "huggingface_hub.file_download", "requests", "filelock", "tqdm"]


@cache
def processes() -> Any:
    """Starts processes that have imported everything: they are forked by one that has, and that has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    tests = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


@dataclass(frozen=True)
class Outcome:
    """What came of a fetch.

    kind: loaded, refused (a StoreError), raised (another), hung or died. right: the loaded bytes are the pinned ones.
    final: what is under the final name. waits: seconds it asked to sleep.
    """

    kind: str
    text: str
    right: bool = False
    final: str = "nothing"
    waits: tuple[float, ...] = ()


def bytes_at(path: Path) -> str:
    """What is there: nothing, the pinned bytes, or something else."""
    if path.is_file():
        return "the file" if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256 else "WRONG BYTES"
    return "no file" if os.path.lexists(path) else "nothing"


def fetch(file: Any, root: Path, final: Path) -> Outcome:
    """In the child."""
    from hubmodels import store
    from hubmodels.errors import StoreError

    waits: list[float] = []
    sleep = time.sleep
    time.sleep = lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.01)))[1]
    right = False
    try:
        path, how = store.fetch(file, cache_dir=root, progress=False)
        kind, text, right = "loaded", how, bytes_at(path) == "the file"
    except StoreError as error:
        kind, text = "refused", str(error)
    except Exception as error:  # the outcome to be judged
        kind, text = "raised", f"{type(error).__name__}: {error}"
    finally:
        time.sleep = sleep
    return Outcome(kind, text, right, bytes_at(final), tuple(waits))


def _kernel(call: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def mount_disk(root: Path, size: int) -> None:
    """In the child, and for it alone: `root` becomes a disk of its own. Raises OSError where the kernel forbids it."""
    new_namespace, new_user, private = 0x20000, 0x10000000, 0x44000
    user, group = os.geteuid(), os.getegid()
    try:
        _kernel("unshare", new_namespace)
    except PermissionError:
        _kernel("unshare", new_namespace | new_user)  # in which whoever made it may mount
        for name, text in {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}.items():
            Path("/proc/self", name).write_text(text)
    root.mkdir(parents=True)
    _kernel("mount", b"none", b"/", None, private, None)
    _kernel("mount", b"tmpfs", bytes(root), b"tmpfs", 0, b"size=%d" % size)


def make_read_only(root: Path, read_only: bool = True) -> None:
    """In the child whose disk it is."""
    remount = 0x20
    _kernel("mount", b"none", bytes(root), None, remount | int(read_only), None)


def _obey(pipe: Any, environment: dict[str, str], endpoint: str) -> None:
    """The child: short limits on time, no cache of the user's, no network but this machine; then what it is told."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import logging
    from tqdm import tqdm

    from hubmodels.store import transfer

    os.environ.update(environment)
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = endpoint, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = environment["HF_HUB_CACHE"]
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # as small for this file as its own is for those that the hub has
    constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = SILENCE_SECONDS
    file_download._ETAG_RETRY_TIMEOUT = SILENCE_SECONDS
    transfer.CONNECT_SECONDS = transfer.SILENCE_SECONDS = SILENCE_SECONDS
    logging.set_verbosity_error()
    tqdm.set_lock(RLock())  # not one of multiprocessing's, which a process that is killed leaves behind
    connect = socket.socket.connect

    def near(self: socket.socket, address: Any) -> None:
        if not str(address[0]).startswith("127."):
            raise RuntimeError(f"the store tried to reach {address}")
        connect(self, address)

    socket.socket.connect = near
    while True:
        work, arguments = pipe.recv()
        try:
            pipe.send(work(*arguments))
        except OSError as error:
            pipe.send(error)


class Child:
    """A process in which one thing after the other is done."""

    def __init__(self, environment: dict[str, str], endpoint: str) -> None:
        self._pipe, theirs = processes().Pipe()
        self.process = processes().Process(target=_obey, args=(theirs, environment, endpoint), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._pipe.send((work, arguments))

    def result(self) -> Any:
        if not self._pipe.poll(MOST_SECONDS):
            self.process.kill()
            return Outcome("hung", f"not done after {MOST_SECONDS:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            return Outcome("died", "the process died")

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self.start(work, *arguments)
        result = self.result()
        if isinstance(result, OSError):
            raise result
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.join()


# --- A case


@dataclass
class Case:
    """One fault in one mode: a site, a pin, an empty store, and the processes that fetch.

    point: where in the file it happens, 0 to 1. child: the one that fetches, if not a new one each time.
    """

    mode: str
    folder: Path
    point: float = 0.5
    child: Child | None = None
    cure: list[Callable[[], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.site = Site()
        self.sites, self.children = [self.site], list[Child]()
        self.root, self.home = self.folder / "store", self.folder / "home"
        self.environment = {
            "HF_HUB_CACHE": str(self.home / "hub"),
            "TORCH_HOME": str(self.home / "torch"),
            "HF_TOKEN": "",
            "HUBMODELS_MIRROR": "",
            "NO_PROXY": "*",
        }
        self.file = self.pin_at(self.site)

    def __enter__(self) -> "Case":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.close()
        for site in self.sites:
            site.close()

    def pin_at(self, site: Site) -> Any:
        return catalog.File(REPO if self.mode == "hub" else site.url + SITE, REVISION, NAME, SIZE, SHA256)

    @property
    def final(self) -> Path:
        """By the contract of the store, not by its code."""
        address = urlsplit(self.file.source)
        place = ["huggingface.co", REPO] if self.mode == "hub" else [*address.netloc.split(":"), address.path[1:]]
        return self.root.joinpath(*place, REVISION, NAME)

    @property
    def offset(self) -> int:
        return max(1, int(self.point * SIZE))

    @property
    def requests(self) -> int:
        return sum(len(site.requests) for site in self.sites)

    @property
    def sent(self) -> float:
        """Times the file."""
        return sum(site.sent for site in self.sites) / SIZE

    def another_site(self, **options: Any) -> Site:
        self.sites.append(Site(**options))
        return self.sites[-1]

    def forget(self) -> None:
        """What was sent so far was preparation."""
        for site in self.sites:
            site.requests.clear()

    def process(self) -> Child:
        self.children.append(Child(self.environment, self.site.url))
        return self.children[-1]

    def fetch(self) -> Outcome:
        return (self.child or self.process()).do(fetch, self.file, self.root, self.final)

    def heal(self) -> None:
        """The fault is over."""
        for site in self.sites:
            site.data, site.answer, site.gap = DATA, honest, 0.0
            site.listen()
        for act in self.cure:
            act()

    def have(self) -> None:
        """The file is in the store."""
        assert self.fetch().final == "the file"
        self.forget()

    def have_part(self, data: bytes = DATA) -> None:
        """A part of the file, or of what the server had then, is in the store, of a fetch that failed."""
        self.site.data, self.site.answer = data, serving(data, stop=self.offset)
        assert self.fetch().kind == "refused"
        self.heal()
        self.forget()

    def parts(self) -> list[Path]:
        parts = list((self.root / ".hubmodels").rglob("part"))
        assert any(part.stat().st_size for part in parts)
        return parts

    def lay_out(self, data: bytes) -> Path:
        """What the user downloaded by other means: a Hugging Face cache, or torch.hub's."""
        if self.mode == "plain":
            path = self.home / "torch" / "hub" / "checkpoints" / NAME
        else:
            path = self.home / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / REVISION / NAME
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return path
