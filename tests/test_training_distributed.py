"""Many processes and one: the same losses, the same weights, checkpoints that either can read; and ranks that die."""

import itertools
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from training_case import (
    Case,
    Died,
    Outcome,
    Rows,
    Unpaired,
    distance,
    is_same,
    make_batches,
    make_model,
    signals_in,
    size_of,
    spawn,
    train,
)

from hubmodels.errors import InputError
from hubmodels.training import checkpoints, distributed
from hubmodels.training.distributed import World, started
from hubmodels.training.loop import Interrupted, Phase, fit
from hubmodels.training.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))
# An epoch of 14 rows in steps of 6: the last has 2, fewer than 4 ranks; some ranks fill up with rows of no label.
CASE = Case(
    None,
    Settings(steps=7, learning_rate=1e-2, warmup=2, ema=0.8, save_every=3, evaluate_every=4, log_every=1),
    count=14,
    phases=((12, 0.6), (16, 0.4)),
    dtype=torch.float64,
    evaluate=size_of,
)
MOST = 1e-9  # between two weights: Adam divides by the size of a gradient, also of a tiny one


def each(cases, world):
    """The runs of several cases, one after another."""
    return [train(case, world) for case in cases]


def spawned(ranks, function, argument):
    """What each rank found; none has died."""
    found = spawn(ranks, argument, function)
    for rank, answer in enumerate(found):
        assert not isinstance(answer, Died), f"rank {rank}: {answer.text or answer.code}"
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Outcome:
    """What one process makes of the case."""
    return train(CASE.but(directory=tmp_path_factory.mktemp("single")))


def assert_equal(found, expected):
    """Losses and figures to rounding, weights to `MOST`; everything counted exactly."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-7)  # the loss of pairs is computed in float32
    assert [p.norm for p in found.seen] == pytest.approx([p.norm for p in expected.seen], rel=1e-9)
    assert [step for step, _ in found.figures] == [step for step, _ in expected.figures]
    for (_, left), (_, right) in zip(found.figures, expected.figures, strict=True):
        assert left == pytest.approx(right, rel=1e-9)
    exact = ("step", "epoch", "phase", "fraction", "tokens", "rate", "skipped")
    for left, right in zip(found.seen, expected.seen, strict=True):
        assert all(getattr(left, name) == getattr(right, name) for name in exact)
    assert distance(found, expected) <= MOST


# The world


def speak(world):
    rank = world.rank
    return {
        "sum": world.sum({"b": rank + 0.5, "a": 2**52 + rank}),
        "array": world.sum_array(np.arange(rank + 1)),
        "broadcast": world.broadcast({"from": rank}),
        "gather": world.gather("abc"[rank]),
        "main": world.is_main,
        "ranks": (rank, world.ranks, world.device, distributed.world_size()),
    }


def test_a_world_of_one_needs_nobody():
    with started("cpu") as world:
        found = speak(world)
    assert found["sum"] == {"a": 2.0**52, "b": 0.5}
    assert (found["broadcast"], found["gather"], found["main"]) == ({"from": 0}, ["a"], True)
    assert found["ranks"] == (0, 1, torch.device("cpu"), 1)
    assert not torch.distributed.is_initialized()


def spoken(_, world):
    world.barrier()
    return speak(world)


def test_ranks_hear_one_another():
    found = spawned(3, spoken, None)
    for rank, heard in enumerate(found):
        assert heard["sum"] == {"a": 3 * 2.0**52 + 3, "b": 4.5}  # counts stay exact
        assert heard["array"].tolist() == [0, 2, 2]
        assert (heard["broadcast"], heard["gather"]) == ({"from": 0}, ["a", "b", "c"])
        assert heard["main"] == (rank == 0)
        assert heard["ranks"] == (rank, 3, torch.device("cpu"), 3)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"rank 2 of this machine has no GPU: there are 2; .* --nproc-per-node=gpu"):
        with started():
            pass


# Many are as one


def test_two_ranks_are_one(tmp_path, single):
    """Replicated, then sharded; with every optimiser. Muon multiplies in bfloat16, and adds up by shards."""
    muon = CASE.but(optimiser="muon", evaluate=None, steps=2)
    google = CASE.but(optimiser="google", evaluate=None, steps=2)
    cases = {
        "replicated": CASE,
        "sharded": CASE.but(sharded=True),
        "muon": muon,
        "muon sharded": muon.but(sharded=True),
        "google sharded": google.but(sharded=True),
    }
    first, second = spawned(2, each, [case.but(directory=tmp_path / name) for name, case in cases.items()])
    found = dict(zip(cases, first, strict=True))
    assert_equal(found["replicated"], single)
    assert_equal(found["sharded"], single)
    plain = train(muon.but(directory=tmp_path / "muon alone"))
    assert_equal(found["muon"], plain)
    assert found["muon sharded"].losses == pytest.approx(plain.losses, rel=1e-3)
    assert distance(found["muon sharded"], plain) < 1e-3
    assert_equal(found["google sharded"], train(google.but(directory=tmp_path / "google alone")))
    for left, right in zip(first, second, strict=True):
        assert is_same(left, right)  # every rank has all the weights in the end
        assert right.seen == right.figures == []  # and rank 0 alone speaks
        assert right.end._replace(tokens_per_second=0) == left.end._replace(tokens_per_second=0)


def test_four_ranks_are_one_although_data_are_uneven(tmp_path, single):
    steps = list(make_batches(CASE, 12, World(3, 4, torch.device("cpu"))).epoch(0))
    assert any(batch.tokens == 0 for step in steps for batch in step)
    (found, *_) = spawned(4, train, CASE.but(directory=tmp_path))
    assert_equal(found, single)


def test_dropout_differs_between_ranks(tmp_path):
    """Else two ranks would drop the same neurons."""
    found = spawned(2, dropped, Case(tmp_path, dropout=0.5))
    assert not torch.equal(*found)
    assert torch.equal(found[0], spawned(1, dropped, Case(tmp_path, dropout=0.5))[0])


def dropped(case, world):
    """What the first dropout of a rank leaves."""
    seen = []
    model = make_model(case)
    model.transformer.embeddings.dropout.register_forward_hook(lambda *arguments: seen.append(arguments[-1][:5] == 0))
    batches = make_batches(case, 12, ALONE)
    fit(model, [Phase(batches)], case.settings, case.directory / str(world.ranks), world=world, facts={})
    return seen[0]


def test_frozen_models_are_shared_too(tmp_path):
    cases = [CASE.but(directory=tmp_path / name, steps=3, evaluate=None, fault=freeze) for name in "ab"]
    cases[1] = cases[1].but(sharded=True)
    alone, before = train(cases[0].but(directory=tmp_path / "alone")), make_model(CASE).state_dict()
    for found in spawned(2, each, cases)[0]:
        assert_equal(found, alone)
        assert all(torch.equal(found.weights[name], p) for name, p in before.items() if ".embeddings." in name)


def freeze(model):
    model.transformer.embeddings.requires_grad_(False)


# Checkpoints that either can read


def halves(cases, world):
    """Runs of which rank 0 is asked to stop in step 3. Returns what each then says."""
    told = []
    for case in cases:
        with pytest.raises(Interrupted) as error:
            train(case.but(hook=partial(signals_in, 3, signal.SIGTERM)), world)
        told.append(str(error.value))
    return told


def test_a_run_goes_on_on_another_number_of_ranks(tmp_path, single):
    """2 -> 1, 2 sharded -> 1, 2 sharded -> 2 replicated, 1 -> 2 sharded; and nothing is written twice."""
    names = ("two", "sharded", "resharded", "one")
    at = {name: CASE.but(directory=tmp_path / name) for name in names}
    shard = {"sharded": True}
    sharded = [at[name].but(**shard) for name in ("sharded", "resharded")]
    first, second = spawned(2, halves, [at["two"], *sharded])
    assert f"stopped by SIGTERM after step 3, which is saved in {tmp_path / 'two' / 'checkpoints'}" in first[0]
    assert "stopped by another rank after step 3" in second[0]
    halves([at["one"]], ALONE)
    files = {name: tmp_path.glob(f"{name}/checkpoints/step-00000003/*.distcp") for name in names}
    sizes = {name: sum(file.stat().st_size for file in found) for name, found in files.items()}
    assert sizes["two"] < 1.1 * sizes["one"]
    assert sizes["sharded"] < 1.6 * sizes["one"]  # twice as many pieces, each with a header, of a tiny model
    found = {name: train(at[name]) for name in ("two", "sharded")}
    more = [at["resharded"], at["one"].but(**shard)]
    found |= dict(zip(("resharded", "one"), spawned(2, each, more)[0], strict=True))
    rest = single._replace(seen=single.seen[3:])
    for outcome in found.values():
        assert_equal(outcome, rest)


def test_a_run_on_two_ranks_goes_on_bit_equal(tmp_path):
    """With dropout, which differs between ranks; replicated and sharded."""
    case = CASE.but(dropout=0.2, dtype=torch.float32, steps=5, evaluate=None)
    for shard in (False, True):
        parts, whole = (case.but(directory=tmp_path / f"{name} {shard}", sharded=shard) for name in ("parts", "whole"))
        spawned(2, halves, [parts])
        left, right = spawned(2, each, [parts, whole])[0]
        assert left.losses == right.losses[3:]
        assert is_same(left, right)


# Ranks that die


def dies_in_step(rank, model):
    """A fault: kill -9 of one rank in the middle of its eighth forward pass, after the checkpoint of step 3."""
    seen = itertools.count(1)

    def count(*_):
        if next(seen) == 8 and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    model.next_sentence.register_forward_pre_hook(count)


def dies_in_save(rank, model):
    """A fault: kill -9 of one rank while it writes its part of the second checkpoint, after step 4."""
    import torch.distributed.checkpoint as dcp

    write, seen = dcp.FileSystemWriter.write_data, itertools.count(1)

    def written(*arguments):
        if next(seen) == 2 and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    dcp.FileSystemWriter.write_data = written


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", [dies_in_step, dies_in_save])
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path, single, rank, fault):
    case = CASE.but(directory=tmp_path)
    found = spawn(2, case.but(fault=partial(fault, rank)))
    assert found[rank] == Died(-signal.SIGKILL)
    assert isinstance(found[1 - rank], Died)
    assert found[1 - rank].code == 1  # it does not wait for ever
    done = max(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*"))
    assert 3 <= done < 7
    rest = train(case)
    assert_equal(rest, single._replace(seen=single.seen[done:], figures=[f for f in single.figures if f[0] > done]))


# What all ranks refuse alike


def refused(directory, world):
    """Errors that each rank raises, in turn."""
    told = []
    case = Case(directory / "facts", Settings(steps=1))
    train(case, world)
    for wrong in (case.but(facts={"text": "another"}), case.but(directory=directory / "unpaired")):
        samples = Unpaired(20, 12) if wrong.directory.name == "unpaired" else Rows(20, 12)
        batches = make_batches(wrong, 12, world)
        batches.samples = samples
        try:
            model = make_model(wrong)
            fit(model, [Phase(batches)], wrong.settings, wrong.directory, world=world, facts=wrong.facts)
        except InputError as error:
            told.append(str(error))
    return told


def test_every_rank_says_what_is_wrong(tmp_path):
    first, second = spawned(2, refused, tmp_path)
    assert first == second
    assert "text was 'some', is 'another'" in first[0]
    assert "no loss depends on transformer.pooler.weight" in first[1]


def test_a_directory_is_for_one_run_of_all_ranks(tmp_path):
    with checkpoints.locked(tmp_path / "checkpoints", ALONE):
        for answer in spawn(2, Case(tmp_path)):
            assert answer.code == 1
            assert "another run is writing there" in answer.text


def test_weights_become_those_of_rank_0(tmp_path):
    """Ranks that begin with other weights would never agree."""
    cases = [CASE.but(directory=tmp_path / name, steps=2, fault=spoil, sharded=name == "b") for name in "ab"]
    alone = train(cases[0].but(directory=tmp_path / "alone", fault=lambda model: None))
    for found in spawned(2, each, cases)[0]:
        assert_equal(found, alone)


def spoil(model):
    if os.environ.get("RANK") == "1":
        nn.init.normal_(model.head.dense.weight)


# A scheduler that asks a whole group of processes, as torchrun does


def leads_a_group(case, world):
    """A run with a worker that makes batches; SIGTERM comes to all processes of its group."""
    os.setsid()

    def hook(progress):
        if progress.step == 2:
            os.killpg(0, signal.SIGTERM)

    with pytest.raises(Interrupted) as error:
        train(case.but(hook=hook), world)
    return str(error.value)


def test_workers_leave_it_to_their_rank_to_stop(tmp_path):
    """A worker that dies of the signal takes the step with it, and the checkpoint."""
    (told,) = spawned(1, leads_a_group, Case(tmp_path, Settings(steps=40, log_every=1), workers=1))
    assert "stopped by SIGTERM after step 3" in told
