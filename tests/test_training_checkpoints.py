"""Checkpoints: whole or not there, whenever the process dies; checked; few; and torch's words kept from the user."""

import json
import logging
import os
import resource
import shutil
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from training_case import Died, spawn

from hubmodels.errors import CheckpointError, InputError
from hubmodels.training import checkpoints
from hubmodels.training.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


def tensors_of(step):
    """Nested, of several types, one shared under two names."""
    weights = torch.full((40, 50), float(step))
    return {
        "model": {"a.weight": weights, "b.weight": weights, "a.bias": torch.arange(7) * step},
        "optimiser": {
            "a.weight": {"step": torch.tensor(float(step)), "exp_avg": torch.full((5,), step, dtype=torch.double)}
        },
        "average": {},
    }


def save(directory, step, **about):
    return checkpoints.save(directory, step, tensors_of(step), {"step was": step, **about}, ALONE)


def loaded(path):
    tensors = tensors_of(0)
    checkpoints.load(path, tensors, ALONE)
    return tensors


def is_whole(directory, step):
    """Whether the newest checkpoint is that of `step`, with all its numbers."""
    found = checkpoints.newest(directory, ALONE)
    if found is None or (found.step, found.path.name, found.about["step was"]) != (step, f"step-{step:08d}", step):
        return False
    left, right = loaded(found.path), tensors_of(step)
    pairs = zip(torch.utils._pytree.tree_leaves(left), torch.utils._pytree.tree_leaves(right), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_comes_back_bit_equal(tmp_path):
    home = tmp_path / "not" / "there"
    assert checkpoints.newest(home, ALONE) is None
    path = save(home, 1000, lists=[1, None, {"x": 0.1 + 0.2}])
    assert path == home / "step-00001000"
    assert names(home) == ["step-00001000"]
    assert is_whole(home, 1000)
    found = checkpoints.newest(home, ALONE)
    assert found.about == {"step was": 1000, "lists": [1, None, {"x": 0.1 + 0.2}]}
    assert found.passed_over == ()


def test_loading_fills_the_tensors_that_are_there(tmp_path):
    path, tensors = save(tmp_path, 3), tensors_of(0)
    table = tensors["model"]["a.weight"]
    checkpoints.load(path, tensors, ALONE)
    assert table.unique().tolist() == [3.0]


def test_the_newest_is_by_number_and_only_a_step_is_one(tmp_path):
    for step in (9, 1000, 200):
        save(tmp_path, step)
    for name in (
        "model-2020",
        "step-2020",
        "step-00002020.old",
        "step-000020",
        "old-step-00002020",
        ".step-00002020.partial",
    ):
        shutil.copytree(tmp_path / "step-00001000", tmp_path / name)
    (tmp_path / "step-notes.txt").write_text("mine")
    assert is_whole(tmp_path, 1000)
    save(tmp_path, 123_456_789)  # more digits than there is room for
    assert is_whole(tmp_path, 123_456_789)
    checkpoints.prune(tmp_path, 123_456_789, 1, None)
    assert {"model-2020", "step-2020", "step-00002020.old", "step-000020", "step-notes.txt"} <= set(names(tmp_path))
    assert "step-00001000" not in names(tmp_path)


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5, 6):
        save(tmp_path, step)
    checkpoints.prune(tmp_path, 5, 2, 2)  # 6 was passed over, and the run went on from before
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    checkpoints.prune(tmp_path, 5, 1, None)
    assert names(tmp_path) == ["step-00000005"]


def test_a_step_that_is_there_is_replaced(tmp_path):
    path = save(tmp_path, 5)
    (path / "__0_0.distcp").write_bytes(b"damaged")
    save(tmp_path, 5)
    assert is_whole(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005"]


# Damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [cut, flip, longer, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    if damage is longer and name == "checkpoint.json":
        damage = lambda path: path.write_text(path.read_text().replace('"step was": 2', '"step was": 3'))  # noqa: E731
    damage(path / name)
    found = checkpoints.newest(tmp_path, ALONE)
    assert found.step == 1
    (told,) = found.passed_over
    assert told.startswith(f"{path} is damaged: ")
    assert is_whole(tmp_path, 1)
    expected = {
        cut: ("bytes, got", "checkpoint.json is not", "Expecting", "Unterminated"),
        longer: ("bytes, got",),
        flip: ("expected sha256", "checkpoint.json is not", "Expecting", "codec", "Invalid"),
        Path.unlink: ("No such file",),
    }
    assert any(text in told for text in expected.get(damage, ("checkpoint.json is not what was written",)))


@pytest.mark.parametrize("text", ["", "[]", '"text"', "null", "{}", '{"sha256": 1}', "\udcff"])
def test_a_json_of_something_else_is_damage(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "checkpoint.json").write_text(text, errors="surrogateescape")
    save(tmp_path, 2)
    shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="step-00000001 is damaged"):
        checkpoints.newest(tmp_path, ALONE)


def test_if_none_is_whole_the_error_names_them_all(tmp_path):
    """To begin anew in silence would write over days of work."""
    for step in (1, 2):
        cut(save(tmp_path, step) / ".metadata")
    with pytest.raises(CheckpointError) as error:
        checkpoints.newest(tmp_path, ALONE)
    first, *rest = str(error.value).split("\n")
    assert first == f"no checkpoint is whole; remove {tmp_path} to begin anew:"
    assert [line.split(" is damaged: .metadata: expected ")[0] for line in rest] == [
        str(tmp_path / "step-00000002"),
        str(tmp_path / "step-00000001"),
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors["model"].update({"c.weight": torch.zeros(1)}), "model.c.weight"),
        (lambda tensors: tensors["model"].update({"a.weight": torch.zeros(50, 40)}), "model.a.weight"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path, change, told):
    path, tensors = save(tmp_path, 1), tensors_of(0)
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(path, tensors, ALONE)
    assert str(error.value).startswith(f"{path}: it is of another model or optimiser: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# A process that dies


def dies_at(number, directory):
    """kill -9 before this process does to `directory` what it does to it for the number-th time."""
    seen = [0]
    touches = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree")

    def hook(event, arguments):
        if event in touches and str(directory) in str(arguments[0]):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_child(action):
    """How a fork of this process ended: minus a signal, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_and_prune(directory, step):
    save(directory, step)
    checkpoints.prune(directory, step, 2, None)


def full_at(size):
    """This process is killed in the middle of writing a file, before the byte of that number."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def sweep(directory, world):
    """Save step 3, and prune, killed at every touch of the directory and at many sizes of a file; then not killed."""
    torch.set_num_threads(1)
    begun = directory / "begun"
    for step in (1, 2):
        save(begun, step)
    found = {"touches": 0, "sizes": 0}

    def left_after(kill, name):
        """The newest after that; whatever it is, the next save finds nothing in its way."""
        home = directory / name
        shutil.copytree(begun, home)
        code = in_child(lambda: (kill(home), save_and_prune(home, 3)))
        newest = checkpoints.newest(home, world)
        if newest.passed_over or not is_whole(home, newest.step) or newest.step not in (2, 3):
            raise AssertionError(f"{name}: left is {newest}, of {names(home)}")
        save_and_prune(home, 4)
        if not is_whole(home, 4) or names(home) != [f"step-{step:08d}" for step in (newest.step, 4)]:
            raise AssertionError(f"{name}: in the end there is {names(home)}")
        return code

    while (code := left_after(partial(dies_at, found["touches"] + 1), f"touch {found['touches']}")) == -signal.SIGKILL:
        found["touches"] += 1
    largest = max(path.stat().st_size for path in (begun / "step-00000002").iterdir())
    for size in range(0, largest, largest // 12):
        if left_after(lambda home, size=size: full_at(size), f"size {size}") != -signal.SIGXFSZ:
            raise AssertionError(f"{size} bytes were enough")
        found["sizes"] += 1
    return {**found, "code": code}


def test_a_save_that_is_killed_anywhere_leaves_the_older_ones(tmp_path):
    (found,) = spawn(1, tmp_path / "home", sweep)
    assert not isinstance(found, Died), found.text
    assert found["touches"] > 15
    assert found["sizes"] > 10
    assert found["code"] == 0  # killed no more, for there was nothing left to touch


def test_a_full_disk_is_an_error_and_leaves_the_older_ones(tmp_path):
    save(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    told = f"{tmp_path / 'step-00000002'}: cannot be written, the older ones are as they were: "
    assert str(error.value).startswith(told)
    assert "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert is_whole(tmp_path, 1)
    save(tmp_path, 2)
    assert is_whole(tmp_path, 2)


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(CheckpointError, match="step-00000001: cannot be written"):
        save(tmp_path / "home", 1)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file, synced after its last byte; then the directory; and its name, after it has it."""
    done = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((path.name, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    def renamed(source, target):
        done.append(("renamed", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    path = save(tmp_path, 1)
    whole = {(file.name, file.stat().st_size) for file in path.iterdir()}
    at = done.index(("renamed", "step-00000001"))
    assert whole <= set(done[: at - 1])
    assert done[at - 1] == (".step-00000001.partial", None)
    assert done[at + 1 :] == [(tmp_path.name, None)]


# Only one, and in silence


def test_a_directory_is_locked(tmp_path):
    with checkpoints.locked(tmp_path / "home", ALONE):
        with pytest.raises(InputError) as error:
            with checkpoints.locked(tmp_path / "home", ALONE):
                pass
        told = f"{tmp_path / 'home'}: another run is writing there; end it, or take another directory"
        assert str(error.value) == told
    with checkpoints.locked(tmp_path / "home", ALONE):
        pass


def takes_the_lock_and_dies(directory, world):
    with checkpoints.locked(directory, world):
        os.kill(os.getpid(), signal.SIGKILL)


def test_one_that_is_killed_lets_go(tmp_path):
    assert spawn(1, tmp_path, takes_the_lock_and_dies) == [Died(-signal.SIGKILL)]
    with checkpoints.locked(tmp_path, ALONE):
        pass


def test_torch_says_nothing_to_the_user(tmp_path, capfd):
    """One process without a process group is how most people train: no warning that it is alone, no line of a log."""
    heard = []
    handler = logging.Handler(logging.INFO)
    handler.emit = heard.append
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = save(tmp_path, 1)
            checkpoints.newest(tmp_path, ALONE)
            loaded(path)
    finally:
        logging.getLogger().removeHandler(handler)
    assert ([str(warning.message) for warning in caught], heard) == ([], [])
    assert capfd.readouterr() == ("", "")


def test_the_json_can_be_read_by_a_person(tmp_path):
    path = save(tmp_path, 7)
    content = json.loads((path / "checkpoint.json").read_text())
    assert content["step"] == 7
    assert content["about"] == {"step was": 7}
    assert content["files"]["__0_0.distcp"][0] == (path / "__0_0.distcp").stat().st_size
    assert set(content["files"]) == {"__0_0.distcp", ".metadata"}
