"""What verification costs: hashing, a hit in the store, and a download beside those of torch.hub and huggingface_hub.

    python benchmarks/store.py [--megabytes 440] [--rounds 5]

All of them fetch the same file from one server on this machine, so the network is the loopback and what is compared is
the work of the client: ours hashes every byte and waits for the disk, theirs do neither.
"""

import argparse
import hashlib
import importlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef" * 2 + "01234567"


def serve(path: Path) -> str:
    """The address of a server that gives the file for every path."""
    etag, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if self.command == "GET":
                with open(path, "rb") as file:
                    self.connection.sendfile(file)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=440, help="size of the file: BERT-base has 440")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), options.megabytes, options.rounds)


def run(directory: Path, megabytes: int, rounds: int) -> None:
    original = directory / "original"
    with open(original, "wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(10**6))
    url = serve(original)
    os.environ.update(HF_ENDPOINT=url, HF_HOME=str(directory / "hf"), HF_HUB_DISABLE_PROGRESS_BARS="1")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    from huggingface_hub import hf_hub_download

    from hubmodels import store

    pinned = importlib.import_module("hubmodels.catalog").File
    size, sha256 = original.stat().st_size, store.sha256_of(original)
    file = pinned(f"{url}/site", REVISION, "model.safetensors", size, sha256)
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        home = directory / str(number)

        def ours(home: Path = home) -> None:
            store.fetch(file, cache_dir=home / "ours", progress=False)

        def torchs(home: Path = home) -> None:
            home.mkdir(exist_ok=True)
            torch.hub.download_url_to_file(f"{url}/file", str(home / "torch"), progress=False)

        def hugging_face(home: Path = home) -> None:
            hf_hub_download("a/b", "model.safetensors", revision=REVISION, cache_dir=home / "hf")

        works = {"hubmodels": ours, "torch.hub": torchs, "huggingface_hub": hugging_face}
        for name, work in sorted(works.items(), reverse=number % 2 == 1):
            times.setdefault(name, []).append(seconds(work))
        start = time.process_time()  # of one core, however busy the machine is
        store.sha256_of(original)
        times.setdefault("hash", []).append(time.process_time() - start)
        times.setdefault("hit", []).append(min(seconds(ours) for _ in range(20)))
        for path in sorted(home.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    rates = {name: [size / 1e9 / each for each in those] for name, those in times.items()}
    print(f"{megabytes} MB, medians of {rounds} rounds (least to most)")
    for name in ("hash", "hubmodels", "huggingface_hub", "torch.hub"):
        low, middle, high = min(rates[name]), statistics.median(rates[name]), max(rates[name])
        what = "SHA-256 of a warm file, one core" if name == "hash" else f"download by {name}"
        print(f"{what:40} {middle:6.2f} GB/s ({low:.2f} to {high:.2f})")
    print(f"{'a hit in the store':40} {statistics.median(times['hit']) * 1e6:6.0f} µs")


if __name__ == "__main__":
    main()
