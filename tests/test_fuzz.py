"""The fuzzer: a bounded run of it, and that it notices what it is there for. The long run: `python tests/fuzz.py`."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import REPOSITORY
from fuzz import KINDS, Files, case, run, seeds
from held import HeldTensor

from hubmodels.checkpoint.readers import read_checkpoint
from hubmodels.errors import CheckpointError


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_give_an_error_of_ours_or_a_correct_load(kind):
    """The number of cases is bounded by time; the long run is the same with more."""
    result = run(kind, lambda number: case(kind, 0, number), 600)
    assert result.faults == []
    assert sum(result.counts.values()) == 600
    assert result.counts["refused"] > 100
    assert result.counts["loaded"] > 20


# --- Cases


def digest() -> str:
    """Of the first cases of every kind."""
    total = hashlib.sha256()
    for kind in KINDS:
        for number in range(40):
            total.update(repr(sorted(case(kind, 3, number).items())).encode())
    return total.hexdigest()


def test_a_case_is_the_same_in_another_process():
    """So a number is enough to tell of it: nothing depends on memory, hashes or what was made before."""
    program = "import sys; sys.path.insert(0, 'tests'); import test_fuzz; print(test_fuzz.digest())"
    other = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


def test_cases_differ():
    for kind in KINDS:
        assert len({repr(case(kind, seed, number)) for seed in (0, 1) for number in range(50)}) > 80


# --- What a reader could do


def valid(number: int) -> Files:
    return seeds("safetensors")[0][1]


def reads(change=lambda lazy: lazy):
    """A reader that is right but for what `change` makes of each tensor."""
    return lambda path: {name: change(lazy) for name, lazy in read_checkpoint(path).items()}


def crashes(path: Path):
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(path: Path):
    os._exit(0)


def hangs(path: Path):
    time.sleep(99)


def stumbles(path: Path):
    raise KeyError("dtype")


def takes_memory(path: Path):
    return {str(len(bytearray(b"x") * 2**28)): HeldTensor(torch.zeros(2))}


def asks_for_memory(path: Path):
    bytearray(2**40)


def hides_what_it_asked_for(path: Path):
    try:
        torch.empty(2**40)
    except RuntimeError:
        raise CheckpointError("damaged") from None


def refuses(path: Path):
    raise CheckpointError("no")


def runs_code(path: Path):
    os.mkdir("canary")
    return read_checkpoint(path)


class Huge:
    shape, dtype = (2**40,), torch.float32


class Unstable(HeldTensor):
    def read(self):
        self.tensor.add_(1)
        return self.tensor.clone()


class Other(HeldTensor):
    def read_into(self, target):
        target.zero_()


class Flat(HeldTensor):
    def read(self):
        return self.tensor.reshape(-1)


PLANTED = {
    "crash": [crashes, leaves],
    "hang": [hangs],
    "foreign exception": [stumbles],
    "memory": [takes_memory, asks_for_memory, hides_what_it_asked_for, lambda path: {"huge": Huge()}],
    "valid file refused": [refuses],
    "code ran": [runs_code],
    "wrong tensors": [
        reads(lambda lazy: HeldTensor(lazy.read() + 1)),
        reads(lambda lazy: HeldTensor(lazy.read().view(torch.int32))),
        reads(lambda lazy: HeldTensor(lazy.read()[None])),
        reads(lambda lazy: Unstable(lazy.read().clone())),
        reads(lambda lazy: Other(lazy.read() + 1)),
        reads(lambda lazy: Flat(lazy.read())),
        lambda path: dict(list(read_checkpoint(path).items())[1:]),
    ],
}


@pytest.mark.parametrize(("sort", "reader"), [(sort, reader) for sort, of in PLANTED.items() for reader in of])
def test_a_fault_is_noticed(sort, reader):
    result = run("safetensors", valid, 1, reader, seconds=1.0 if sort == "hang" else fuzz.SECONDS)
    assert [(number, found) for number, found, _ in result.faults] == [(0, sort)]


def test_a_right_reader_has_no_faults():
    assert run("safetensors", valid, 2, reads()).counts == {"loaded": 2}


def test_after_a_crash_the_next_case_is_read():
    """The case is known by its number; those before and after it are counted once."""

    def reader(path: Path):
        if path.stat().st_size % 3 == 0:
            crashes(path)
        return read_checkpoint(path)

    cases = [case("safetensors", 0, number) for number in range(30)]
    fatal = [number for number, files in enumerate(cases) if len(files["model.safetensors"]) % 3 == 0]
    result = run("safetensors", cases.__getitem__, 30, reader)
    assert [number for number, sort, _ in result.faults if sort == "crash"] == fatal
    assert len(fatal) in range(1, 30)
    assert sum(result.counts.values()) == 30


def test_too_many_faults_end_the_run(monkeypatch):
    monkeypatch.setattr(fuzz, "MOST_FAULTS", 3)
    assert run("safetensors", valid, 50, crashes).counts == {"crash": 3}


def with_torch(path: Path):
    """The .bin reader as it would be with torch.load."""
    return {name: HeldTensor(tensor) for name, tensor in torch.load(path, mmap=True, weights_only=True).items()}


@pytest.mark.parametrize(("kept", "how"), [(64, zipfile.ZIP_DEFLATED), (4, zipfile.ZIP_STORED)])
def test_bytes_that_are_not_the_tensors_own(kept, how):
    """The reference for .bin: a storage's numbers are those of its record, unpacked, and no more than it has."""
    held, whole = seeds("bin")[3]
    assert run("bin", lambda number: whole, 1, with_torch).counts == {"loaded": 1}
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole["pytorch_model.bin"])) as source, zipfile.ZipFile(file, "w") as archive:
        for path in source.namelist():
            numbers = path.endswith("data/0")
            archive.writestr(path, source.read(path)[: kept if numbers else None], how if numbers else None)
    files = {"pytorch_model.bin": file.getvalue()}
    (fault,) = run("bin", lambda number: files, 1, with_torch).faults
    assert fault[1] == "wrong tensors"
    assert next(iter(held)) in fault[2]
    assert run("bin", lambda number: files, 1).counts == {"refused": 1}


# --- The program


def test_a_fault_is_saved_and_replayed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "read_checkpoint", stumbles)
    assert fuzz.main(["--cases", "6", "--seed", "7", "--kind", "openai", "legacy"]) == 1
    text = capsys.readouterr().out
    assert "foreign exception: KeyError: 'dtype'" in text
    assert "python tests/fuzz.py --replay fuzz-legacy-7-2.json" in text
    assert json.loads(Path("fuzz-legacy-7-2.json").read_text())["kind"] == "legacy"
    assert fuzz.main(["--replay", "fuzz-legacy-7-2.json"]) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--replay", "fuzz-legacy-7-2.json"]) == 0


def test_a_run_without_faults_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--cases", "40", "--kind", "safetensors", "tensorflow"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["kind", "cases", "refused", "loaded", "faults", "seconds", "slowest", "MiB"]
    assert [row.split()[:2] for row in rows] == [["safetensors", "20"], ["tensorflow", "20"]]
    assert list(tmp_path.iterdir()) == []
