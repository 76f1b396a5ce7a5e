"""The loop: a run that is stopped anywhere goes on as if nothing had been; phases, budgets, averages, bad numbers."""

import functools
import itertools
import math
import os
import re
import signal
import threading
from functools import partial

import pytest
import torch
from torch import nn
from training_case import (
    WORDS,
    Case,
    Died,
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

from hubmodels.errors import HubModelsError, InputError
from hubmodels.families.bert import BertForMaskedLM
from hubmodels.layers import Block, initialise
from hubmodels.training import engine as engines
from hubmodels.training import loop
from hubmodels.training.distributed import World
from hubmodels.training.engine import Engine
from hubmodels.training.loop import Interrupted, Phase, fit
from hubmodels.training.optimisers import learning_rate
from hubmodels.training.settings import Settings, Spent

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def kept_steps(case):
    return sorted(int(path.name[5:]) for path in (case.directory / "checkpoints").glob("step-*"))


# A run that goes on

# Everything at once: dropout, an average, several micro-batches a step, two phases, a warm-up, an epoch's shorter end.
EVERYTHING = Case(
    None,
    Settings(steps=9, warmup=3, learning_rate=1e-2, ema=0.8, save_every=2, log_every=1),
    phases=((12, 0.6), (16, 0.4)),
    dropout=0.2,
)


class Crash(Exception):
    pass


def crashes_in(step, progress):
    if progress.step == step:
        raise Crash


def stopped(case, step):
    """The run, up to the step in whose middle SIGTERM comes."""
    with pytest.raises(Interrupted) as error:
        train(case.but(hook=partial(signals_in, step, signal.SIGTERM)))
    return str(error.value)


def test_the_case_has_everything(tmp_path):
    batches = make_batches(EVERYTHING, 12, ALONE)
    assert [len(step) for step in batches.epoch(0)] == [2, 2, 3, 1]
    weights = [train(EVERYTHING.but(directory=tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    assert distance(*weights) > 1e-4  # what the seed decides is dropout alone
    assert {(progress.phase, progress.epoch) for progress in weights[0].seen} == {(0, 0), (0, 1), (1, 0)}


@pytest.mark.parametrize("optimiser", ["adamw", "google", "muon"])
@pytest.mark.parametrize("step", [2, 6, 7])
def test_a_run_that_is_stopped_and_goes_on_is_bit_equal_to_one_that_is_not(tmp_path, optimiser, step):
    case = EVERYTHING.but(directory=tmp_path / "parts", optimiser=optimiser)
    whole = train(case.but(directory=tmp_path / "whole"))
    told = stopped(case, step)
    assert f"stopped by SIGTERM after step {step}, which is saved in {tmp_path / 'parts' / 'checkpoints'}" in told
    rest = train(case)
    assert [progress.step for progress in rest.seen] == list(range(step + 1, 10))
    assert rest.losses == whole.losses[step:]
    assert [(p.norm, p.rate, p.epoch, p.phase, p.tokens) for p in rest.seen] == [
        (p.norm, p.rate, p.epoch, p.phase, p.tokens) for p in whole.seen[step:]
    ]
    assert is_same(rest, whole)


def test_twice_n_steps_are_n_steps_and_n_more(tmp_path):
    """The budget is no fact: a run may be made longer."""
    case = EVERYTHING.but(schedule="constant", phases=((12, 1.0),))
    whole = train(case.but(directory=tmp_path / "whole", steps=8))
    train(case.but(directory=tmp_path / "parts", steps=4))
    rest = train(case.but(directory=tmp_path / "parts", steps=8))
    assert rest.losses == whole.losses[4:]
    assert is_same(rest, whole)


def test_what_crashes_goes_on_from_its_last_checkpoint(tmp_path):
    case = EVERYTHING.but(directory=tmp_path / "parts")
    whole = train(case.but(directory=tmp_path / "whole"))
    with pytest.raises(Crash):
        train(case.but(hook=partial(crashes_in, 5)))
    assert kept_steps(case) == [2, 4]
    rest = train(case)
    assert rest.losses == whole.losses[4:]
    assert is_same(rest, whole)


def is_killed_in(forward, model):
    """A fault: kill -9 in the middle of the forward pass of that number."""
    seen = itertools.count(1)

    def count(*_):
        if next(seen) == forward:
            os.kill(os.getpid(), signal.SIGKILL)

    model.head.register_forward_pre_hook(count)


def test_a_process_that_is_killed_in_a_step_goes_on(tmp_path):
    case = EVERYTHING.but(directory=tmp_path / "parts")
    whole = train(case.but(directory=tmp_path / "whole"))
    for forward, last in ((6, 2), (7, 4), (3, 4)):  # steps 3, then 5 or 6, then the same again
        (died,) = spawn(1, case.but(fault=partial(is_killed_in, forward)))
        assert died == Died(-signal.SIGKILL)
        assert kept_steps(case)[-1] == last
    rest = train(case)
    assert rest.losses == whole.losses[4:]
    assert is_same(rest, whole)


def test_means_go_on_too(tmp_path):
    """A Progress over steps before and after a stop is that of a run which was not stopped."""
    case = EVERYTHING.but(directory=tmp_path / "parts", log_every=3, hook=lambda _: None)
    whole = train(case.but(directory=tmp_path / "whole"))
    with pytest.raises(Crash):
        train(case.but(hook=partial(crashes_in, 6)))  # after the checkpoint of step 4
    rest = train(case)
    assert [progress.losses for progress in rest.seen] == [progress.losses for progress in whole.seen[1:]]


def test_a_run_that_is_over_says_so_again(tmp_path):
    case = EVERYTHING.but(directory=tmp_path, evaluate=size_of)
    first, again = train(case), train(case)
    assert again.end == first.end == first.seen[-1]
    assert (again.seen, again.figures) == ([], [])
    assert is_same(first, again)
    shorter = train(case.but(steps=4))  # than what is there
    assert shorter.end.step == 9
    assert is_same(first, shorter)


def test_workers_change_nothing(tmp_path):
    case = EVERYTHING.but(steps=4)
    alone = train(case.but(directory=tmp_path / "alone"))
    helped = train(case.but(directory=tmp_path / "helped", workers=1))
    assert helped.losses == alone.losses
    assert is_same(helped, alone)


def test_whoever_draws_numbers_in_between_changes_nothing(tmp_path):
    case = EVERYTHING.but(steps=5)
    left = train(case.but(directory=tmp_path / "left"))
    right = train(case.but(directory=tmp_path / "right", hook=lambda _: torch.rand(1000)))
    assert is_same(left, right)


# Facts


def test_facts_that_differ_are_listed(tmp_path):
    case = EVERYTHING.but(directory=tmp_path, facts={"text": "d1", "lengths": (12, 16), "words": 61, "old": 1})
    train(case.but(steps=2))
    train(case.but(steps=3))  # a tuple is a list to JSON, and no difference
    with pytest.raises(InputError) as error:
        train(case.but(facts={"text": "d2", "lengths": [12, 16], "words": 61, "new": True}, seed=4))
    told = str(error.value)
    assert f"{tmp_path / 'checkpoints' / 'step-00000003'} is of another run" in told
    assert "new was None, is True; old was 1, is None; seed was 0, is 4; text was 'd1', is 'd2';" in told
    assert "words" not in told
    assert "lengths" not in told


@pytest.mark.parametrize(("change", "told"), [({"optimiser": "muon"}, "optimiser was 'adamw', is 'muon'"),
                                              ({"ema": 0.0}, "ema was True, is False")])  # fmt: skip
def test_an_optimiser_or_an_average_that_was_not_saved_is_a_fact(tmp_path, change, told):
    train(EVERYTHING.but(directory=tmp_path, steps=1))
    with pytest.raises(InputError, match=told):
        train(EVERYTHING.but(directory=tmp_path, **change))


def test_a_directory_is_for_one_run_at_a_time(tmp_path):
    case = EVERYTHING.but(directory=tmp_path, steps=1)
    with pytest.raises(InputError, match="another run is writing there; end it, or take another directory"):
        train(case.but(hook=lambda _: train(case)))


def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path):
    case = EVERYTHING.but(directory=tmp_path / "parts", log_every=4)
    whole = train(case.but(directory=tmp_path / "whole"))
    stopped(case.but(log_every=1), 6)
    newest = tmp_path / "parts" / "checkpoints" / "step-00000006"
    (newest / "__0_0.distcp").write_bytes(b"")
    rest = train(case)
    assert rest.seen[0].step == 8
    assert len(rest.seen[0].notes) == 1
    assert re.search(r"step-00000006 is damaged: __0_0\.distcp: expected \d+ bytes, got 0", rest.seen[0].notes[0])
    assert [progress.notes for progress in rest.seen[1:]] == [()]
    assert is_same(rest, whole)


# Gradients


def gradients(case, batches):
    """Of one step, and the sums of its losses."""
    model = make_model(case)
    counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
    sums = Engine(model, case.settings, ALONE).backward(0, batches, counts)
    return {name: p.grad for name, p in model.named_parameters()}, sums


def test_accumulated_gradients_are_those_of_the_big_batch():
    case = Case(None, dtype=torch.float64, rows=20)
    (big,) = next(make_batches(case.but(most=10**6), 12, ALONE).epoch(0))
    parts = next(make_batches(case, 12, ALONE).epoch(0))
    assert len(parts) > 4
    assert len({part.counts["words"] for part in parts}) > 2
    (once, sums), (piece_by_piece, sums_again) = gradients(case, [big]), gradients(case, parts)
    for name, gradient in once.items():
        assert float((gradient - piece_by_piece[name]).abs().max()) <= 1e-12
    assert sums["words"] == pytest.approx(sums_again["words"], rel=1e-12)
    assert sums["pairs"] == pytest.approx(sums_again["pairs"], rel=1e-6)  # computed in float32
    model, mean = make_model(case), torch.zeros((), dtype=torch.float64)
    for part in parts:  # the mean of means, which is what this is not
        mean = mean + model.train()(**part.inputs).loss / len(parts)
    mean.backward()
    assert max(float((p.grad - once[name]).abs().max()) for name, p in model.named_parameters()) > 1e-4


def test_micro_batches_change_no_step(tmp_path):
    case = Case(None, Settings(steps=6, learning_rate=1e-2, log_every=1), dtype=torch.float64)
    once = train(case.but(directory=tmp_path / "once", most=10**6))
    parts = train(case.but(directory=tmp_path / "parts", most=13))
    assert parts.losses == pytest.approx(once.losses, rel=1e-7)  # the loss of pairs is computed in float32
    assert distance(once, parts) <= 1e-10  # Adam divides by the size of a gradient, also of a tiny one


def test_every_parameter_is_trained_but_for_places_that_no_row_reaches(tmp_path):
    case = Case(tmp_path, Settings(steps=4, learning_rate=1e-2, weight_decay=0.0), dropout=0.1)
    before, after = make_model(case).state_dict(), train(case).weights
    for name, weights in before.items():
        moved = (after[name] != weights).flatten(1).any(1) if weights.dim() > 1 else after[name] != weights
        if name == "transformer.embeddings.position.weight":
            assert moved.tolist() == [True] * 12 + [False] * 4  # rows are of 12 tokens at most
        else:
            assert moved.any(), name
            assert moved.float().mean() > 0.9, name


def fitted(model, case, samples=None):
    batches = make_batches(case, 12, ALONE)
    batches.samples = samples or batches.samples
    return fit(model, [Phase(batches)], case.settings, case.directory, world=ALONE, facts={})


def test_a_parameter_that_no_loss_depends_on_is_named(tmp_path):
    case = Case(tmp_path)
    with pytest.raises(InputError) as error:
        fitted(make_model(case), case, Unpaired(20, 12))
    told = str(error.value)
    assert "no loss depends on transformer.pooler.weight, transformer.pooler.bias, next_sentence.weight" in told
    assert "take a model without them, or freeze them with requires_grad_(False)" in told
    masked = BertForMaskedLM(make_model(case).config)
    initialise(masked, 0.1, torch.Generator().manual_seed(0))
    assert fitted(masked, case, Unpaired(20, 12)).losses.keys() == {"words"}


def test_frozen_parameters_stay_bit_equal(tmp_path):
    case = Case(tmp_path, Settings(steps=3, learning_rate=1e-2, ema=0.5, save_every=1))
    model = make_model(case)
    model.transformer.requires_grad_(False)
    fitted(model, case)
    for name, weights in make_model(case).state_dict().items():
        assert torch.equal(model.state_dict()[name], weights) == name.startswith("transformer."), name
    with pytest.raises(InputError, match="no parameter that is trained: all are frozen"):
        fitted(model.requires_grad_(False), case)


def test_weights_in_half_precision_are_refused(tmp_path):
    case = Case(tmp_path)
    with pytest.raises(InputError, match=r"embeddings.word.weight is torch.bfloat16: .* train model.float\(\)"):
        fitted(make_model(case).bfloat16(), case)


def test_the_gradient_is_clipped(tmp_path):
    """Of the first step of plain AdamW nothing would be seen: its size is divided out."""
    case = Case(None, Settings(steps=1, clip=0.25, log_every=1))
    model = make_model(case)
    engine = Engine(model, case.settings, ALONE)
    batches = next(make_batches(case, 12, ALONE).epoch(0))
    seen = {}
    engine._move = lambda rate: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    engine.backward(0, batches, {"words": 5, "pairs": 5})
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = engine.update(0.1)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in before.values())), rel=1e-5)
    assert norm > 0.25
    for name, gradient in before.items():
        assert torch.allclose(seen[name], gradient * 0.25 / norm, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


# What is said


def test_losses_are_means_over_what_they_are_counted_over(tmp_path):
    case = Case(None, Settings(steps=6, log_every=1, learning_rate=1e-2))
    each = train(case.but(directory=tmp_path / "each"))
    together = train(case.but(directory=tmp_path / "together", log_every=4))
    batches = make_batches(case, 12, ALONE)
    steps = [*batches.epoch(0), *batches.epoch(1)][:6]
    counts = {name: [sum(batch.counts[name] for batch in step) for step in steps] for name in ("words", "pairs")}
    assert len(set(counts["pairs"])) > 1  # the last step of the epoch is smaller
    assert [progress.step for progress in together.seen] == [4, 6]
    for name, numbers in counts.items():
        found = [progress.losses[name] for progress in each.seen]
        for part, progress in ((slice(0, 4), together.seen[0]), (slice(4, 6), together.seen[1])):
            sums = sum(n * x for n, x in zip(numbers[part], found[part], strict=True))
            assert progress.losses[name] == pytest.approx(sums / sum(numbers[part]), rel=1e-6)
    for progress in each.seen + together.seen:
        assert progress.loss == progress.losses["words"] + progress.losses["pairs"]
        assert progress.tokens == sum(batch.tokens for step in steps[: progress.step] for batch in step)
        assert progress.fraction == progress.step / 6
        assert progress.tokens_per_second > 0
    assert each.losses[0] == pytest.approx(math.log(WORDS) + math.log(2), abs=1.0)
    assert [progress.epoch for progress in each.seen] == [0, 0, 0, 0, 1, 1]
    assert each.end == each.seen[-1]


def test_the_rate_that_is_said_is_the_schedule_s(tmp_path):
    case = Case(tmp_path, Settings(steps=6, warmup=2, log_every=1, schedule="cosine", learning_rate=0.01))
    expected = [learning_rate(case.settings, Spent(step), Spent(2)) for step in range(6)]
    assert [progress.rate for progress in train(case).seen] == expected


# Phases and budgets


def shapes_of(model, seen):
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)


def test_phases_follow_one_another_and_only_the_second_reaches_far_places(tmp_path):
    case = Case(tmp_path, Settings(steps=10, log_every=1, weight_decay=0.0), phases=((8, 0.7), (16, 0.3)), most=10**6)
    lengths, places = [], []
    table = {}

    def fault(model):
        shapes_of(model, lengths)
        table["now"] = model.transformer.embeddings.position.weight

    outcome = train(case.but(fault=fault, hook=lambda _: places.append(table["now"].detach().clone())))
    assert [progress.phase for progress in outcome.seen] == [0] * 7 + [1] * 3
    assert [progress.epoch for progress in outcome.seen] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert max(lengths[:7]) == 8
    assert max(lengths[7:]) == 16
    before = make_model(case).transformer.embeddings.position.weight
    assert torch.equal(places[6][8:], before[8:])
    assert (places[9][8:] != before[8:]).any(1).all()


def test_shares_that_are_not_one_together_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"phases: expected shares that are 1 together, got \[0.9, 0.2\]"):
        train(Case(tmp_path, phases=((8, 0.9), (16, 0.2))))


def test_an_epoch_without_a_step_is_an_error_not_a_loop(tmp_path):
    with pytest.raises(InputError, match="phase 0: there is not one step in epoch 0"):
        train(Case(tmp_path, count=0))


def test_a_budget_of_tokens(tmp_path):
    case = Case(tmp_path, Settings(tokens=250, warmup=2, log_every=1, learning_rate=1.0))
    seen = train(case).seen
    assert seen[-2].tokens < 250 <= seen[-1].tokens
    assert [progress.fraction for progress in seen] == [progress.tokens / 250 for progress in seen]
    assert [progress.rate for progress in seen[:3]] == [0.5, 1.0, 1.0]
    warm = seen[1].tokens
    for before, progress in itertools.pairwise(seen[1:]):
        assert progress.rate == pytest.approx((250 - before.tokens) / (250 - warm))


def test_a_budget_of_tokens_goes_on(tmp_path):
    """Where the warm-up ended is part of what is saved."""
    case = EVERYTHING.but(directory=tmp_path / "parts", steps=None, tokens=400)
    whole = train(case.but(directory=tmp_path / "whole"))
    stopped(case, 5)
    rest = train(case)
    assert [progress.rate for progress in rest.seen] == [progress.rate for progress in whole.seen[5:]]
    assert is_same(rest, whole)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns."""
    now = [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    return now


def test_a_budget_of_seconds_is_over_all_times_that_the_run_went_on(tmp_path, clock):
    case = Case(tmp_path, Settings(seconds=10, log_every=1, learning_rate=1.0))

    def turn(progress):
        clock[0] += 2.0
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 4"):
        train(case.but(hook=turn))
    clock[0] += 1e6  # nobody trained
    seen = train(case.but(hook=turn)).seen
    assert [(progress.step, progress.seconds) for progress in seen] == [(5, 6.0), (6, 8.0), (7, 10.0)]
    assert [progress.rate for progress in seen] == pytest.approx([0.4, 0.4, 0.2])
    assert seen[-1].fraction == 1.0


def test_checkpoints_by_the_clock(tmp_path, clock):
    case = Case(tmp_path, Settings(steps=9, log_every=1, save_minutes=1, keep=9))

    def turn(progress):
        clock[0] += 25.0

    train(case.but(hook=turn))
    assert kept_steps(case) == [4, 7, 9]


def test_speed_is_told_without_evaluations(tmp_path, clock, monkeypatch):
    case = Case(tmp_path, Settings(steps=6, log_every=2, evaluate_every=1), evaluate=size_of)
    backward = Engine.backward

    def slow(*arguments):
        clock[0] += 2.0
        return backward(*arguments)

    examine = loop._Run.examine

    def slower(run, evaluate):
        clock[0] += 100.0
        return examine(run, evaluate)

    monkeypatch.setattr(Engine, "backward", slow)
    monkeypatch.setattr(loop._Run, "examine", slower)
    seen = train(case).seen
    tokens = [0, *(progress.tokens for progress in seen)]
    for (before, after), progress in zip(itertools.pairwise(tokens), seen, strict=True):
        assert progress.tokens_per_second == pytest.approx((after - before) / 4.0)
    assert seen[-1].seconds == 512.0


# Evaluations, and what is kept


def test_the_last_and_the_best_are_kept(tmp_path):
    case = Case(tmp_path, Settings(steps=9, save_every=2, evaluate_every=3, keep=2))
    losses = iter([5.0, 4.0, 6.0])
    found = []
    fit(
        make_model(case),
        [Phase(make_batches(case, 12, ALONE))],
        case.settings,
        case.directory,
        world=ALONE,
        facts={},
        evaluate=lambda model: {"loss": next(losses), "words": 3},
        observe_evaluation=lambda step, figures: found.append((step, figures["loss"], kept_steps(case))),
    )
    # After an evaluation that is the best so far there is a checkpoint, whatever save_every says.
    assert found == [(3, 5.0, [2]), (6, 4.0, [3, 4]), (9, 6.0, [6, 8])]
    assert kept_steps(case) == [6, 8, 9]


def test_the_best_outlives_a_stop(tmp_path):
    case = Case(tmp_path, Settings(steps=8, save_every=1, evaluate_every=2, keep=1, log_every=1))
    losses = {2: 1.0, 4: 2.0, 6: math.nan, 8: 3.0}
    step = [0]

    def run(hook):
        def observe(progress):
            step[0] = progress.step
            hook(progress)

        batches = [Phase(make_batches(case, 12, ALONE))]
        evaluate = lambda model: {"loss": losses[step[0]]}  # noqa: E731
        fit(
            make_model(case),
            batches,
            case.settings,
            tmp_path,
            world=ALONE,
            facts={},
            evaluate=evaluate,
            observe=observe,
        )

    with pytest.raises(Interrupted):
        run(partial(signals_in, 5, signal.SIGTERM))
    assert kept_steps(case) == [2, 5]
    run(lambda _: None)
    assert kept_steps(case) == [2, 8]


def test_an_evaluation_sees_the_average_and_disturbs_nothing(tmp_path):
    case = EVERYTHING.but(evaluate=size_of, evaluate_every=2, hook=lambda _: None)
    weights, model = [], []

    def keep(progress):
        weights.append({name: p.detach().clone() for name, p in model[-1].named_parameters()})

    looked = train(case.but(directory=tmp_path / "a", fault=model.append, hook=keep))
    alone = train(case.but(directory=tmp_path / "b", evaluate=None))
    assert is_same(looked, alone)
    average = {name: p.detach().clone() for name, p in make_model(case).named_parameters()}
    figures = dict(looked.figures)
    assert sorted(figures) == [2, 4, 6, 8, 9]
    for step, seen in enumerate(weights, 1):
        average = {name: 0.8 * average[name] + 0.2 * seen[name] for name in average}
        if step in figures:
            size = float(sum(tensor.double().square().sum() for tensor in average.values()))
            assert figures[step]["loss"] == pytest.approx(size, rel=1e-5)
    for name, tensor in average.items():
        assert torch.allclose(looked.weights[name], tensor, atol=1e-6)
        assert not torch.equal(looked.weights[name], weights[-1][name])


def test_without_an_average_the_last_weights_come_back(tmp_path):
    case = Case(tmp_path, Settings(steps=3, log_every=1))
    last, model = [], []
    outcome = train(case.but(fault=model.append, hook=lambda _: last.append(size_of(model[-1].eval()))))
    assert size_of(model[-1]) == last[-1]
    assert not model[-1].training
    assert outcome.end.step == 3


# Numbers that are none


def is_spoilt(step, value, model):
    """A fault: from step `step` on, each of one micro-batch, the head's bias gets a bad gradient."""
    seen = itertools.count(1)
    model.head.bias.register_hook(lambda gradient: gradient * (value if next(seen) >= step else 1.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_ends_the_run(tmp_path, precision, value):
    case = Case(tmp_path, Settings(steps=9, save_every=2, precision=precision), most=10**6)
    model = []
    with pytest.raises(HubModelsError) as error:
        train(case.but(fault=lambda m: (model.append(m), is_spoilt(5, value, m))))
    told = str(error.value)
    assert re.search(
        r"step 5: the loss \(words 4\.\d+, pairs 0\.\d+\) or its gradient \((nan|inf)\) is not a finite", told
    )
    assert f"no weight was moved, and the checkpoints in {tmp_path / 'checkpoints'} are as they were" in told
    assert "A lower learning rate, a longer warm-up" in told
    assert kept_steps(case) == [2, 4]
    again = train(case.but(steps=4))
    assert all(torch.equal(p, again.weights[name]) for name, p in model[0].state_dict().items())


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    case = Case(tmp_path, most=10**6)

    def fault(model):
        with torch.no_grad():
            model.next_sentence.bias[0] = math.nan

    with pytest.raises(HubModelsError, match=r"step 1: the loss \(words 4\.\d+, pairs nan\)"):
        train(case.but(fault=fault))


@pytest.fixture
def large_scale(monkeypatch):
    """A scale of losses at which float16 overflows, at first."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**28, growth_interval=100)
    monkeypatch.setattr(engines.torch.amp, "GradScaler", scaler)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_fp16_skips_steps_that_overflow_and_goes_on_with_its_scale(tmp_path, large_scale, optimiser):
    case = Case(
        None, Settings(steps=20, log_every=1, precision="fp16", learning_rate=1e-2, optimiser=optimiser, ema=0.5)
    )
    sizes, model = [], []
    keep = lambda _: sizes.append(size_of(model[-1].eval()))  # noqa: E731
    whole = train(case.but(directory=tmp_path / "whole", fault=model.append, hook=keep))
    skipped = [progress.skipped for progress in whole.seen]
    assert 3 < skipped[-1] < 17
    begun = size_of(make_model(case).eval())
    for (a, b), (before, after) in zip(
        itertools.pairwise([0, *skipped]), itertools.pairwise([begun, *sizes]), strict=True
    ):
        assert (a + 1 == b) == (before == after)  # either it is counted, or weights have moved
    assert math.isfinite(whole.losses[-1])
    for step in (2, 12):  # before any weight has moved, and after
        stopped(case.but(directory=tmp_path / "parts"), step)
    rest = train(case.but(directory=tmp_path / "parts"))
    assert is_same(rest, whole)
    assert rest.end.skipped == skipped[-1]


def test_fp16_does_not_skip_for_ever(tmp_path, large_scale):
    case = Case(tmp_path, Settings(steps=200, precision="fp16"))
    with pytest.raises(HubModelsError, match=r"step 2\d: the loss .* is not a finite number"):
        train(case.but(fault=partial(is_spoilt, 1, math.nan)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_of_products_alone(tmp_path, precision):
    case = Case(None, Settings(steps=6, learning_rate=1e-2, log_every=1))
    plain = train(case.but(directory=tmp_path / "plain"))
    half = train(case.but(directory=tmp_path / "half", precision=precision))
    assert {tensor.dtype for tensor in half.weights.values()} == {torch.float32}
    assert half.losses == pytest.approx(plain.losses, rel=0.02)
    assert half.losses[0] != plain.losses[0]


# Being asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_leaves(tmp_path, number):
    case = EVERYTHING.but(directory=tmp_path, save_every=100, log_every=1)
    before = signal.getsignal(number)
    seen = []
    with pytest.raises(
        Interrupted, match=f"stopped by {number.name} after step 3, .* the same call goes on from there"
    ):
        train(case.but(hook=lambda progress: (seen.append(progress.step), signals_in(3, number, progress))))
    assert seen == [1, 2, 3]
    assert kept_steps(case) == [3]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait(tmp_path):
    def hook(progress):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(EVERYTHING.but(directory=tmp_path, hook=hook))
    assert kept_steps(EVERYTHING.but(directory=tmp_path)) == []


def test_signals_are_left_alone_in_another_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(EVERYTHING.but(directory=tmp_path, steps=2))))
    thread.start()
    thread.join()
    assert found[0].end.step == 2


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    outcome = train(EVERYTHING.but(directory=tmp_path, steps=3, hook=partial(signals_in, 3, signal.SIGTERM)))
    assert outcome.end.step == 3


# torch.compile


def loss_of(model):
    """An evaluation that runs the model."""
    (batch,) = next(make_batches(Case(None, most=10**6), 12, ALONE).epoch(0))
    with torch.inference_mode():
        return {"loss": float(model(**batch.inputs).loss)}


def test_each_block_is_compiled_and_given_back(tmp_path, monkeypatch):
    calls, graphs, model = [], [], []

    def backend(graph, _):
        graphs.append(model[0].training)
        return graph.forward

    torch_compile = torch.compile
    monkeypatch.setattr(
        engines.torch,
        "compile",
        lambda function, dynamic: (calls.append(dynamic), torch_compile(function, dynamic=dynamic, backend=backend))[1],
    )
    case = Case(None, Settings(steps=2, learning_rate=1e-2, log_every=1, evaluate_every=1), evaluate=loss_of)
    plain = train(case.but(directory=tmp_path / "plain"))
    fast = train(case.but(directory=tmp_path / "fast", compiled=True, fault=model.append))
    torch._dynamo.reset()
    assert calls == [True] * 2
    assert set(graphs) == {True}  # of an evaluation none is made
    assert fast.losses == pytest.approx(plain.losses, rel=1e-4)
    assert fast.figures[1][1]["loss"] == pytest.approx(plain.figures[1][1]["loss"], rel=1e-4)
    assert all("forward" not in vars(block) for block in model[0].modules() if isinstance(block, Block))


def test_a_model_without_blocks_is_compiled_whole():
    assert engines.blocks_of(model := nn.Linear(2, 2)) == [model]
