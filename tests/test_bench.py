"""The benchmark: what is measured, who is, whether that is honest, and how it is told."""

import json
import re
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import randomise

import hubmodels
from hubmodels import prepack
from hubmodels.bench import measure, report, systems
from hubmodels.bench import run as runner
from hubmodels.bench.measure import Found, Timing, checked, likeness_of_states, likeness_of_words, time_in_turn
from hubmodels.bench.peers import DECODERS, ENCODERS, PeerError
from hubmodels.bench.run import Plan, bench
from hubmodels.bench.systems import FLOOR, peer_runs, products_alone, sorted_buckets
from hubmodels.bench.workloads import AXES, CELLS, Cell, cells_of, curves, ragged_lengths
from hubmodels.cli import main
from hubmodels.errors import HubModelsError, InputError
from hubmodels.families import bert as berts
from hubmodels.families import gpt as gpts
from hubmodels.families import gpt2 as gpt2s
from hubmodels.maps import Int8RowLinear, PackedLinear, RowLinear
from hubmodels.prepack import accelerate

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS, POSITIONS, D, LAYERS = 67, 160, 32, 2
SIZES = {"vocab_size": WORDS, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
KINDS = {
    "bert": (berts.BertModel, berts.BertConfig),
    "gpt": (gpts.Gpt, gpts.GptConfig),
    "gpt2": (gpt2s.Gpt2, gpt2s.Gpt2Config),
}
FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")
INT8 = pytest.mark.skipif(not FBGEMM, reason="torch has no FBGEMM for this CPU")
PACKS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = ["float32", "bfloat16", pytest.param("int8", marks=INT8)]
OURS = {"float32": ["hubmodels", "accelerated"], "bfloat16": ["hubmodels", "accelerated"], "int8": ["accelerated"]}


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    """A program takes too long for each of these; `test_steps.py` has those."""

    def none():
        raise InputError("no compiler")

    monkeypatch.setattr(prepack, "check_compiler", none)


def tiny(kind: str) -> torch.nn.Module:
    cls, config = KINDS[kind]
    more = {"intermediate_size": 48} if kind == "bert" else {}
    model = cls(config(**SIZES, **more, max_position_embeddings=POSITIONS))
    randomise(model, 1, 0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: str(hubmodels.export(tiny(kind), root / kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    return tiny("bert")


@pytest.fixture(scope="module")
def gpt2() -> torch.nn.Module:
    return tiny("gpt2")


def cell_of(*lengths: int, new: int = 0) -> Cell:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    draw = torch.Generator().manual_seed(3)
    return Cell("some", torch.randint(1, WORDS, mask.shape, generator=draw) * mask, mask, new)


def plan_of(*models: str, **changes) -> Plan:
    plan = {"models": models, "dtypes": ("float32",), "cells": ("1x16",), "peers": (), "rounds": 1}
    return Plan(**{**plan, **changes})


# Workloads


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (512, ["1x16", "1x128", "1x512", "32x128", "ragged"]),
        (511, ["1x16", "1x128", "32x128", "ragged"]),
        (128, ["1x16", "1x128", "32x128", "ragged"]),
        (127, ["1x16", "ragged"]),
        (16, ["1x16", "ragged"]),
        (15, ["ragged"]),
    ],
)
def test_an_encoder_gets_the_batches_that_fit(longest, expected):
    assert names(cells_of(CELLS, WORDS, longest, decodes=False)) == expected


@pytest.mark.parametrize(("longest", "expected"), [(160, ["decode-1", "decode-8"]), (159, [])])
def test_a_decoder_gets_the_prompts_that_fit(longest, expected):
    assert names(cells_of(CELLS, WORDS, longest, decodes=True)) == expected


def test_cells_come_as_they_are_named():
    assert names(cells_of(("ragged", "1x16"), WORDS, 512, decodes=False)) == ["ragged", "1x16"]
    assert cells_of((), WORDS, 512, decodes=False) == []


def test_cells_have_the_shape_of_their_name():
    shapes = {cell.name: tuple(cell.input_ids.shape) for cell in cells_of(CELLS, WORDS, 512, decodes=False)}
    ragged = {"ragged": (64, 512)}
    assert shapes == {"1x16": (1, 16), "1x128": (1, 128), "1x512": (1, 512), "32x128": (32, 128), **ragged}
    one, eight = cells_of(CELLS, WORDS, 160, decodes=True)
    assert [tuple(cell.input_ids.shape) for cell in (one, eight)] == [(1, 32), (8, 32)]
    assert (one.new, eight.new) == (128, 128)


def test_tokens_are_those_that_somebody_asked_for():
    assert {cell.name: cell.tokens for cell in cells_of(CELLS, WORDS, 512, decodes=False)} == {
        "1x16": 16,
        "1x128": 128,
        "1x512": 512,
        "32x128": 4096,
        "ragged": sum(ragged_lengths(64, 512)),
    }
    assert [cell.tokens for cell in cells_of(CELLS, WORDS, 160, decodes=True)] == [128, 8 * 128]
    assert cell_of(2, 5).tokens == 7
    assert cell_of(2, 5, new=3).tokens == 6


def test_most_of_the_ragged_batch_is_padding():
    [cell] = cells_of(("ragged",), WORDS, 512, decodes=False)
    assert 0.68 <= 1 - cell.tokens / cell.input_ids.numel() <= 0.72
    assert len(set(cell.attention_mask.sum(1).tolist())) > 30


@pytest.mark.parametrize("longest", [1, 7, 8, 40, 512, 2000])
def test_ragged_lengths_stay_in_bounds(longest):
    lengths = ragged_lengths(64, longest)
    assert len(lengths) == 64
    assert min(8, longest) <= min(lengths)
    assert max(lengths) <= longest
    assert ragged_lengths(64, longest) == lengths


def batches(longest: int) -> list[Cell]:
    cells = [cell for decodes in (False, True) for cell in cells_of(CELLS, WORDS, longest, decodes)]
    return cells + [cell for points in curves(WORDS, longest).values() for _, cell in points]


@pytest.mark.parametrize("longest", [16, 40, 512])
def test_batches_are_padded_on_the_right(longest):
    for cell in batches(longest):
        mask = cell.attention_mask
        assert mask.shape == cell.input_ids.shape
        assert mask.shape[1] <= longest
        assert set(mask.unique().tolist()) <= {0, 1}
        assert (mask.diff(dim=1) <= 0).all(), cell.name
        assert mask[:, 0].all(), cell.name
        assert mask.sum(1).max() == mask.shape[1], cell.name


@pytest.mark.parametrize("longest", [16, 512])
def test_ids_are_words_and_0_at_padding(longest):
    for cell in batches(longest):
        assert cell.input_ids.dtype == torch.long
        assert (cell.input_ids[cell.attention_mask == 0] == 0).all()
        real = cell.input_ids[cell.attention_mask == 1]
        assert real.min() >= 1
        assert real.max() < WORDS


def test_two_words_are_enough():
    [cell] = cells_of(("1x16",), 2, 512, decodes=False)
    assert (cell.input_ids == 1).all()


def test_batches_do_not_depend_on_the_callers_seed():
    torch.manual_seed(1)
    first, state = batches(160), torch.get_rng_state()
    torch.manual_seed(2)
    for one, other in zip(first, batches(160), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.attention_mask, other.attention_mask)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_curves_vary_what_they_say():
    found = curves(WORDS, 512)
    assert list(found) == ["length", "batch", "padding"]
    assert [(x, tuple(c.input_ids.shape)) for x, c in found["length"]] == [
        (n, (8, n)) for n in (16, 32, 64, 128, 256, 512)
    ]
    assert [(x, tuple(c.input_ids.shape)) for x, c in found["batch"]] == [(n, (n, 128)) for n in (1, 2, 4, 8, 16, 32)]
    assert [x for x, _ in found["padding"]] == [n / 10 for n in range(10)]
    assert all(c.new == 0 for points in found.values() for _, c in points)


@pytest.mark.parametrize("longest", [64, 128, 512, 2048])
def test_padding_varies_and_the_tokens_do_not(longest):
    tokens = 8 * min(512, longest)
    for share, cell in curves(WORDS, longest)["padding"]:
        assert cell.tokens == pytest.approx(tokens, rel=0.06)
        assert 1 - cell.tokens / cell.input_ids.numel() == pytest.approx(share, abs=0.04)
        assert cell.input_ids.shape[1] == min(512, longest)
        assert cell.name == f"{share:.0%} padding"


@pytest.mark.parametrize("longest", [2, 8, 16, 100])
def test_curves_fit_small_position_tables(longest):
    found = curves(WORDS, longest)
    assert [x for x, _ in found["length"]] == [n for n in (16, 32, 64) if n <= longest]
    assert all(c.input_ids.shape[1] <= longest for points in found.values() for _, c in points)
    assert len(found["batch"]) == 6
    assert len(found["padding"]) == 10


# Systems


@pytest.mark.parametrize("lengths", [(3,), (4, 9), (9, 1, 7, 7, 2, 9, 3, 5, 8), (5, 5, 5, 5)])
def test_sorted_buckets_give_the_same_states(bert, lengths):
    cell = cell_of(*lengths)
    plain = systems.our_runs(bert, "float32", False)[0]["hubmodels"]
    with torch.inference_mode():
        expected, found = plain(cell), sorted_buckets(plain)(cell)
    assert found.shape == expected.shape == (*cell.input_ids.shape, D)
    assert found.dtype == expected.dtype
    real = cell.attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)
    assert torch.isfinite(found).all()


def test_sorted_buckets_are_four_and_no_longer_than_their_rows():
    cell, shapes = cell_of(9, 1, 7, 6, 2, 9, 3, 5), []

    def run(part: Cell) -> torch.Tensor:
        shapes.append(tuple(part.input_ids.shape))
        assert torch.equal(part.input_ids == 0, part.attention_mask == 0)
        return part.input_ids[..., None].to(torch.bfloat16)

    found = sorted_buckets(run)(cell)
    assert shapes == [(2, 2), (2, 5), (2, 7), (2, 9)]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[..., 0].long(), cell.input_ids)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, int]]:
    """(rows, width) of each packed product as it is computed"""
    seen, forward = [], PackedLinear.forward

    def spy(self, x):
        seen.append(tuple(x.shape))
        return forward(self, x)

    monkeypatch.setattr(PackedLinear, "forward", spy)
    return seen


def test_products_alone_are_all_of_an_encoders_layers(bert, products):
    cell = cell_of(3, 9, 5)
    run = products_alone(bert, accelerate(bert), cell, decodes=False)
    assert products == []
    with torch.inference_mode():
        run()
    assert products == [(17, D), (17, D), (17, D), (17, 48)] * LAYERS


def test_products_alone_are_a_decoders_of_each_step(gpt2, products):
    run = products_alone(gpt2, accelerate(gpt2), cell_of(4, 4, 4, new=5), decodes=True)
    with torch.inference_mode():
        run()
    assert len(products) == 5 * (4 * LAYERS + 1)
    assert {rows for rows, _ in products} == {3}
    assert products.count((3, 4 * D)) == 5 * LAYERS


@pytest.mark.skipif(not PACKS_BF16, reason="this CPU has no products of bfloat16")
def test_products_alone_are_of_the_models_dtype(monkeypatch):
    half, given, real = tiny("bert").to(torch.bfloat16), [], PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: given.append(x.dtype) or real(self, x))
    with torch.inference_mode():
        products_alone(half, accelerate(half), cell_of(4), decodes=False)()
    assert given == [torch.bfloat16] * 4 * LAYERS


@INT8
@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_products_alone_of_a_single_row_are_those_that_take_one(gpt2, dtype, monkeypatch):
    seen = []
    kind = RowLinear if dtype is None else Int8RowLinear
    real = kind.summed
    monkeypatch.setattr(kind, "summed", lambda self, given: seen.append(1) or real(self, given))
    with torch.inference_mode():
        products_alone(gpt2, accelerate(gpt2, dtype), cell_of(4, new=5), decodes=True)()
    assert len(seen) == 5 * (4 * LAYERS + 1)


def test_there_is_no_floor_where_nothing_is_packed(bert, gpt2):
    for model, decodes in ((bert, False), (gpt2, True)):
        assert products_alone(model, model, cell_of(4, 4, new=2), decodes) is None


def breaks(error: Exception):
    def build(directory, dtype):
        raise error

    return build


@pytest.mark.parametrize(("family", "builders"), [("bert", ENCODERS), ("gpt2", DECODERS)])
def test_what_another_library_raises_is_a_reason(monkeypatch, tmp_path, family, builders):
    monkeypatch.setitem(builders, "onnxruntime", breaks(KeyError("layer 3")))
    monkeypatch.setitem(builders, "openvino", breaks(PeerError("openvino: not today")))
    monkeypatch.setitem(builders, "ctranslate2", lambda directory, dtype: lambda *inputs: (directory, dtype, inputs))
    runs, missing = peer_runs(("onnxruntime", "openvino", "ctranslate2"), family, tmp_path, "float32")
    assert missing == {"onnxruntime": "KeyError: 'layer 3'", "openvino": "openvino: not today"}
    cell = cell_of(3, new=4)
    second = cell.attention_mask if family == "bert" else 4
    assert runs["ctranslate2"](cell) == (tmp_path, "float32", (cell.input_ids, second))


def test_an_interruption_is_no_reason(monkeypatch, tmp_path):
    monkeypatch.setitem(ENCODERS, "openvino", breaks(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        peer_runs(("openvino",), "bert", tmp_path, "float32")


def test_peers_of_another_family_are_left_out(tmp_path):
    assert peer_runs(systems.PEERS, "gpt", tmp_path, "float32") == ({}, {})
    assert peer_runs(("transformers static",), "bert", tmp_path, "float32") == ({}, {})
    assert peer_runs(("transformer encoder",), "gpt2", tmp_path, "float32") == ({}, {})


# Measuring


def test_contestants_are_timed_in_turn():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = time_in_turn(runs, 3)
    assert order == list("abc") * 3
    order.clear()
    time_in_turn(runs, 2, warm=True)
    assert order == list("aabbcc") * 2
    assert list(seconds) == list("abc")
    assert all(len(each) == 3 for each in seconds.values())


def test_each_has_its_own_seconds_of_each_round(monkeypatch):
    now = [0.0]
    costs = {"a": iter([1.0, 2.0]), "b": iter([3.0, 4.0])}
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda _: None))

    def spend(name: str) -> None:
        now[0] += next(costs[name])

    found = time_in_turn({name: lambda name=name: spend(name) for name in costs}, 2)
    assert found == {"a": (1.0, 2.0), "b": (3.0, 4.0)}


def test_nobody_is_timed_where_nobody_is():
    assert time_in_turn({}, 2) == {}


def test_likeness_of_states():
    states = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert likeness_of_states(states, states, mask) == pytest.approx(1.0)
    assert likeness_of_states(states.bfloat16(), states, mask) == pytest.approx(1.0, abs=1e-3)
    assert likeness_of_states(3 * states, states, mask) == pytest.approx(1.0)
    wrong = states.clone()
    wrong[1, 1] *= -1
    assert likeness_of_states(wrong, states, mask) == pytest.approx(-1.0)
    padding = states.clone()
    padding[1, 2], padding[2, 3] = float("nan"), -1.0
    assert likeness_of_states(padding, states, mask) == pytest.approx(1.0)
    assert likeness_of_states(states, states, torch.zeros_like(mask)) == 1.0


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_states_that_are_nothing_are_not_alike(value):
    states, mask = torch.ones(2, 3, 4), torch.ones(2, 3)
    wrong = states.clone()
    wrong[1, 2] = value
    assert not likeness_of_states(wrong, states, mask) >= 0.5


def successor(ids: torch.Tensor, mask: torch.Tensor | None = None) -> SimpleNamespace:
    """A judge that would always choose the next id."""
    return SimpleNamespace(logits=torch.nn.functional.one_hot((ids + 1) % 50, 50).float())


def test_likeness_of_words_is_a_share():
    prompts = torch.tensor([[7, 1], [3, 4]])
    assert likeness_of_words(torch.tensor([[2, 3, 4], [5, 6, 7]]), successor, prompts) == 1.0
    assert likeness_of_words(torch.tensor([[2, 3, 9], [5, 6, 7]]), successor, prompts) == pytest.approx(5 / 6)
    # after a wrong word it is the right one for what stands there
    assert likeness_of_words(torch.tensor([[2, 9, 10], [5, 6, 7]]), successor, prompts) == pytest.approx(5 / 6)
    assert likeness_of_words(torch.tensor([[8, 1, 1], [9, 9, 9]]), successor, prompts) == 0.0


def test_likeness_of_words_is_1_for_the_judge(gpt2):
    cell = cell_of(5, 5, new=9)
    with torch.inference_mode():
        new = torch.tensor([row.ids for row in gpt2.generate(cell.input_ids, max_new_tokens=9)])
        assert likeness_of_words(new, gpt2, cell.input_ids) == 1.0


def fails(cell: Cell):
    raise RuntimeError("out of luck\nand more")


def states_of(bert):
    return lambda cell: bert(cell.input_ids, cell.attention_mask).last_hidden_state


@torch.inference_mode()
def test_a_contestant_that_raises_does_not_stop_the_others(bert):
    runs = {"first": fails, "right": states_of(bert), "wrong": lambda cell: -states_of(bert)(cell)}
    alike, errors = checked(runs, cell_of(3, 5), bert)
    assert alike == {"right": pytest.approx(1.0), "wrong": pytest.approx(-1.0)}
    assert errors == {"first": "RuntimeError: out of luck\nand more"}


@torch.inference_mode()
def test_states_of_another_shape_are_an_error_of_their_contestant(bert):
    shapes = {"flat": (8,), "rows": (1, 5, D), "long": (2, 9, D), "wide": (2, 5, D + 1)}
    runs = {name: lambda cell, shape=shape: torch.ones(shape) for name, shape in shapes.items()}
    alike, errors = checked({**runs, "none": lambda cell: None, "right": states_of(bert)}, cell_of(3, 5), bert)
    assert alike == {"right": pytest.approx(1.0)}
    assert set(errors) == {*shapes, "none"}


@torch.inference_mode()
def test_words_that_are_none_are_an_error_of_their_contestant(gpt2):
    cell = cell_of(4, new=3)
    right = torch.tensor([row.ids for row in gpt2.generate(cell.input_ids, max_new_tokens=3)])
    alike, errors = checked({"beyond": lambda cell: right + WORDS, "right": lambda cell: right}, cell, gpt2)
    assert alike == {"right": 1.0}
    assert set(errors) == {"beyond"}


@torch.inference_mode()
@pytest.mark.parametrize("kept", [0, 2])
def test_fewer_words_than_asked_for_are_an_error(gpt2, kept):
    """Right as they are: who stops early is not to look fast."""
    cell = cell_of(4, new=3)
    few = torch.tensor([row.ids for row in gpt2.generate(cell.input_ids, max_new_tokens=3)])[:, :kept]
    alike, errors = checked({"early": lambda cell: few}, cell, gpt2)
    assert "early" in errors
    assert "early" not in alike


def test_the_machine_is_told():
    found = measure.machine()
    assert set(found) == {"processor", "processors", "threads", "torch", "python", "read GB/s"}
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]
    assert found["read GB/s"] > 0
    assert json.loads(json.dumps(found)) == found


# The whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtypes": ("float32", "float16")}, "dtype float16: expected some of float32, bfloat16, int8"),
        ({"cells": ("1x17", "ragged", "")}, f"cell 1x17, : expected some of {', '.join(CELLS)}"),
        ({"peers": ("transformer",)}, f"peer transformer: expected some of {', '.join(systems.PEERS)}"),
        ({"curves": ("width",)}, "curve width: expected some of length, batch, padding"),
        ({"rounds": 0}, "rounds = 0: expected at least 1"),
        ({"rounds": -1}, "rounds = -1: expected at least 1"),
    ],
    ids=str,
)
def test_a_plan_with_what_is_unknown_is_refused(changes, message):
    with pytest.raises(InputError) as error:
        bench(plan_of("no such model", **changes))
    assert str(error.value) == message


def test_a_model_of_no_family_of_ours_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError) as error:
        bench(plan_of(str(tmp_path)))
    assert str(error.value) == f"{tmp_path}: expected a model of one of bert, gpt, gpt2, got t5"


def test_models_are_looked_up_before_any_is_measured(directories):
    lines = []
    with pytest.raises(HubModelsError, match="bert-bse-uncased"):
        bench(plan_of(directories["bert"], "bert-bse-uncased"), lines.append)
    assert lines == []


def by_system(timings: list[Timing]) -> dict[str, Timing]:
    found = {timing.system: timing for timing in timings}
    assert len(found) == len(timings)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_ours_are_timed_in_every_dtype(monkeypatch, tmp_path, directories, kind, dtype):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines, name = [], directories[kind]
    cell, tokens = ("1x16", 16) if kind == "bert" else ("decode-1", 128)
    found = bench(plan_of(name, dtypes=(dtype,), cells=(cell,), rounds=2), lines.append)
    timings = by_system(found.timings)
    assert found.curves == []
    assert [system for system in timings if system != FLOOR] == OURS[dtype]
    assert FLOOR in timings
    for timing in timings.values():
        assert (timing.model, timing.dtype, timing.cell, timing.tokens) == (name, dtype, cell, tokens)
        assert timing.error is None
        assert len(timing.seconds) == len(timing.ratios) == 2
        assert timing.speed > 0
        assert (timing.alike is None) == (timing.system == FLOOR)
    base = timings[OURS[dtype][0]]
    assert base.ratios == (1.0, 1.0)
    for timing in timings.values():
        assert timing.ratios == tuple(a / b for a, b in zip(base.seconds, timing.seconds, strict=True))
    [line] = lines
    assert line.startswith(f"{name}, {dtype}, {cell}, tokens/s: {OURS[dtype][0]} ")
    assert list(tmp_path.iterdir()) == []


def test_models_dtypes_and_cells_follow_each_other(directories):
    models = directories["bert"], directories["gpt2"]
    plan = plan_of(*models, dtypes=("float32", "bfloat16"), cells=("1x16", "1x128", "1x512", "decode-1"))
    found = [(t.model, t.dtype, t.cell) for t in bench(plan).timings if t.system == "hubmodels"]
    half = [(models[0], dtype, cell) for dtype in plan.dtypes for cell in ("1x16", "1x128")]
    assert found == [*half, *((models[1], dtype, "decode-1") for dtype in plan.dtypes)]


@pytest.mark.parametrize("peers", [("transformers",), ("transformers eager", "transformers")], ids=", ".join)
def test_ratios_are_to_transformers(directories, peers):
    plan = plan_of(directories["bert"], cells=("ragged",), peers=peers)
    timings = by_system(bench(plan).timings)
    assert set(timings) == {*peers, "hubmodels", "accelerated", "transformers, sorted", FLOOR}
    assert all(timing.error is None for timing in timings.values())
    assert timings["transformers"].ratios == (1.0,)


def test_only_the_ragged_batch_is_sorted(directories):
    found = bench(plan_of(directories["bert"], cells=("1x16", "ragged")))
    assert [t.cell for t in found.timings if t.system == "hubmodels, sorted"] == ["ragged"]


@INT8
@pytest.mark.parametrize(("kind", "cell"), [("bert", "1x16"), ("gpt2", "decode-1")])
def test_int8_is_beside_transformers_in_float32(directories, kind, cell):
    plan = plan_of(directories[kind], dtypes=("int8",), cells=(cell,), peers=("transformers",))
    timings = by_system(bench(plan).timings)
    assert list(timings) == ["transformers, float32", "accelerated", "transformers", FLOOR]
    assert timings["transformers, float32"].ratios == (1.0,)
    assert "int8" in timings["transformers"].error
    assert timings["transformers"].seconds == ()


def test_where_int8_cannot_be_had_the_others_are_measured(monkeypatch, directories):
    monkeypatch.setattr(prepack, "_FBGEMM", ())
    found = bench(plan_of(directories["bert"], dtypes=("int8", "float32")))
    assert {t.system for t in found.timings if t.dtype == "float32" and t.seconds} >= {"hubmodels", "accelerated"}
    assert not any(t.seconds for t in found.timings if t.dtype == "int8")


def test_who_is_wrong_is_not_timed(monkeypatch, directories):
    calls = []

    def build(directory, dtype):
        model = hubmodels.bertModel(str(directory))

        def run(input_ids, attention_mask):
            calls.append("wrong")
            return -model(input_ids, attention_mask).last_hidden_state

        return run

    monkeypatch.setitem(ENCODERS, "openvino", build)
    monkeypatch.setitem(ENCODERS, "onnxruntime", breaks(PeerError("onnxruntime: not installed")))
    lines = []
    plan = plan_of(directories["bert"], peers=("transformers", "openvino", "onnxruntime"), rounds=3)
    timings = by_system(bench(plan, lines.append).timings)
    wrong, absent = timings["openvino"], timings["onnxruntime"]
    assert wrong.error == "its output is not the model's: likeness -1.0000, expected at least 0.9999"
    assert wrong.alike == pytest.approx(-1.0)
    assert (wrong.seconds, wrong.ratios) == ((), ())
    assert calls == ["wrong"]
    assert (absent.error, absent.seconds, absent.alike) == ("onnxruntime: not installed", (), None)
    assert timings["hubmodels"].error is None
    assert lines[0] == f"{directories['bert']}, float32: without onnxruntime: onnxruntime: not installed"
    assert "openvino" not in lines[1]


def test_everybody_is_checked_and_warms_up_and_that_is_not_counted(monkeypatch, directories, products):
    calls, ours = [], hubmodels.bertModel(directories["bert"])

    def run(input_ids, attention_mask):
        calls.append(len(products))
        return ours(input_ids, attention_mask).last_hidden_state

    monkeypatch.setitem(ENCODERS, "openvino", lambda directory, dtype: run)
    found = by_system(bench(plan_of(directories["bert"], peers=("openvino",), rounds=3)).timings)
    assert len(found["openvino"].seconds) == len(found[FLOOR].seconds) == 3
    assert len(calls) == 1 + 2 * 3


def test_output_that_is_not_a_number_is_not_timed(monkeypatch, directories):
    monkeypatch.setitem(
        ENCODERS, "openvino", lambda directory, dtype: lambda ids, mask: torch.full((1, 16, D), torch.nan)
    )
    timings = by_system(bench(plan_of(directories["bert"], peers=("transformers", "openvino"))).timings)
    assert timings["openvino"].seconds == ()
    assert "likeness nan" in timings["openvino"].error


def test_a_wrong_base_leaves_figures_without_ratios(monkeypatch, directories):
    monkeypatch.setitem(ENCODERS, "transformers", lambda directory, dtype: lambda ids, mask: -torch.ones(1, 16, D))
    found = bench(plan_of(directories["bert"], peers=("transformers",)))
    timings = by_system(found.timings)
    assert timings["transformers"].seconds == ()
    assert len(timings["hubmodels"].seconds) == 1
    assert re.search(r"^\| hubmodels \| [^|]+ \|$", report.to_markdown(found.timings), re.MULTILINE)


@pytest.fixture
def judges(monkeypatch) -> list[tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """The models that others are held against, and their weights at first"""
    seen = []

    def spy(model, directory):
        seen.append((model, {key: value.clone() for key, value in model.state_dict().items()}))
        return hubmodels.export(model, directory)

    monkeypatch.setattr(runner, "export", spy)
    return seen


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_judge_stays_as_it_was(judges, directories, kind):
    dtypes = ("bfloat16", "int8", "float32") if FBGEMM else ("bfloat16", "float32")
    cells = {"bert": ("1x16", "ragged"), "gpt2": ("decode-1",)}[kind]
    bench(plan_of(directories[kind], dtypes=dtypes, cells=cells))
    [(judge, before)] = judges
    assert not any(module.training for module in judge.modules())
    assert type(judge) is KINDS[kind][0]
    assert not any(isinstance(module, PackedLinear) for module in judge.modules())
    after = judge.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) and value.dtype == torch.float32 for key, value in before.items())


def test_a_path_is_measured_with_its_own_weights(judges, directories):
    bench(plan_of(directories["bert"]))
    [(_, weights)] = judges
    expected = hubmodels.bertModel(directories["bert"]).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_a_name_is_measured_with_random_weights(judges, tmp_path):
    found = bench(plan_of("bert-nano", "bert-tiny"))  # bert-tiny would be downloaded
    (nano, weights), (bert_tiny, _) = judges
    assert nano.config == hubmodels.bertModel("bert-nano").config
    published = hubmodels.bertModel("bert-nano").state_dict()
    assert not torch.equal(weights["embeddings.word.weight"], published["embeddings.word.weight"])
    assert not bert_tiny.training
    assert not (tmp_path / "hf").exists()
    assert [t.model for t in found.timings if t.system == "hubmodels"] == ["bert-nano", "bert-tiny"]
    bench(plan_of("bert-nano"))
    assert all(torch.equal(weights[key], value) for key, value in judges[-1][1].items())


def test_what_a_plan_raises_leaves_no_files(monkeypatch, tmp_path, directories):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runner, "time_in_turn", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(plan_of(directories["bert"]))
    assert list(tmp_path.iterdir()) == []


def test_curves_are_measured_if_asked_for(directories):
    found = bench(plan_of(directories["bert"], directories["gpt2"], cells=(), curves=AXES))
    assert found.timings == []
    points = [(axis, x) for axis, x, timing in found.curves if timing.system == "hubmodels"]
    assert points == [(axis, x) for axis, each in curves(WORDS, POSITIONS).items() for x, _ in each]
    assert {timing.model for _, _, timing in found.curves} == {directories["bert"]}
    assert all(timing.error is None for _, _, timing in found.curves)
    alone = bench(plan_of(directories["bert"], cells=(), curves=("batch",)))
    assert {axis for axis, _, _ in alone.curves} == {"batch"}


# On a GPU: by a CPU under another name


@pytest.fixture
def elsewhere(monkeypatch) -> str:
    monkeypatch.setattr(runner, "DEVICES", ("cpu", "cpu:0"))
    monkeypatch.setattr(measure, "matrix_peak", lambda device, dtype: 1e15)
    return "cpu:0"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_on_another_device_torchs_peers_are_there_and_the_others_say_why_not(elsewhere, directories, kind):
    builders = {"bert": ENCODERS, "gpt2": DECODERS}[kind]
    peers = [name for name in builders if name != "transformers compiled"]
    plan = plan_of(directories[kind], cells=("1x16", "decode-1"), peers=peers, device=elsewhere)
    timings = by_system(bench(plan).timings)
    for name in peers:
        if name in ("onnxruntime", "openvino", "ctranslate2"):
            assert timings[name].error == f"{name}: it is set up for a CPU here, not for cpu:0"
            assert timings[name].share is None
        else:
            assert timings[name].error is None
            assert len(timings[name].seconds) == 1


def test_encoders_tell_their_share_of_the_matrix_peak(elsewhere, directories, bert):
    cell = cells_of(("ragged",), WORDS, POSITIONS, decodes=False)[0]
    found = by_system(bench(plan_of(directories["bert"], cells=("ragged",), device=elsewhere)).timings)
    timing = found["hubmodels"]
    assert timing.share == pytest.approx(measure.flops(bert, cell) / timing.seconds[0] / 1e15)
    assert all(t.share is None for t in bench(plan_of(directories["gpt2"], cells=("decode-1",))).timings)
    assert all(t.share is None for t in bench(plan_of(directories["bert"])).timings)


def test_flops_are_those_of_the_real_tokens(bert):
    maps = LAYERS * (4 * D * D + 2 * D * 48)
    assert measure.flops(bert, cell_of(5, 3)) == 2 * maps * 8 + 4 * LAYERS * D * (25 + 9)


def test_the_matrix_peak_is_that_of_the_best_size(monkeypatch):
    seconds = iter([(2.0, 1.0), (0.5, 0.5)])
    monkeypatch.setattr(measure, "time_in_turn", lambda *_: {"": next(seconds)})
    assert measure.matrix_peak("cpu", torch.float32, (10, 20)) == 2 * 20**3 / 0.5


def test_a_gpu_is_waited_for_before_and_after(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(device))
    time_in_turn({"a": lambda: order.append("run")}, 1, warm=True, device="cuda")
    assert order == ["run", "cuda", "run", "cuda"]
    order.clear()
    time_in_turn({"a": lambda: None}, 1)
    assert order == []


def test_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the first of {device}")
    monkeypatch.setattr(measure, "_read_bandwidth", lambda device: 3e12 if device == "cuda" else 0.0)
    found = measure.machine("cuda")
    assert (found["GPU"], found["read GB/s"]) == ("the first of cuda", 3000)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in {
        "cuda": "device cuda: torch sees no GPU here",
        "mps": "device mps: expected one of cpu, cuda",
    }.items():
        with pytest.raises(InputError) as error:
            bench(plan_of("no such model", device=device))
        assert str(error.value) == message


# What is told of it

BASE = Timing("m", "float32", "1x16", "transformers", 16, (0.004, 0.006, 0.005), (1.0, 1.0, 1.0), 1.0)
FAST = replace(BASE, system="accelerated", seconds=(0.002, 0.002, 0.002), ratios=(2.0, 3.0, 2.5))
GONE = replace(BASE, system="openvino", seconds=(), ratios=(), alike=None, error="not installed")
TIMINGS = [
    *(BASE, FAST, GONE),
    *(replace(BASE, cell="ragged"), replace(GONE, cell="ragged")),
    replace(FAST, cell="ragged", seconds=(), ratios=(), alike=0.1, error="not alike"),
    replace(BASE, cell="ragged", system="transformers, sorted", ratios=(0.5, 0.5, 0.5)),
    replace(BASE, dtype="bfloat16"),
]
FOUND = Found(TIMINGS, [("padding", 0.5, FAST), ("length", 16, BASE), ("length", 16, GONE)])


def test_the_table():
    assert report.to_markdown(TIMINGS) == (
        "**m, float32**\n"
        "\n"
        "| | 1x16 | ragged |\n"
        "|---|---|---|\n"
        "| transformers | 5 ms | 5 ms |\n"
        "| accelerated | 2.50 (2.00-3.00) | - |\n"
        "| transformers, sorted |  | 0.50 (0.50-0.50) |\n"
        "\n"
        "- openvino: not installed\n"
        "- accelerated: not alike\n"
        "\n"
        "**m, bfloat16**\n"
        "\n"
        "| | 1x16 |\n"
        "|---|---|\n"
        "| transformers | 5 ms |\n"
    )


def test_a_share_of_the_peak_stands_behind_a_figure():
    table = report.to_markdown([replace(BASE, share=0.314), replace(FAST, share=0.628)])
    assert table.splitlines()[-2:] == ["| transformers | 5 ms, 31% |", "| accelerated | 2.50 (2.00-3.00), 63% |"]


def test_a_reason_stays_on_its_line():
    table = report.to_markdown([BASE, replace(GONE, error="ImportError: no\n\n# libfoo\n| gone")])
    assert table.splitlines()[-1].startswith("- openvino: ImportError: no")


def test_all_of_it_is_in_the_json():
    told = json.loads(report.to_json({"threads": 2}, Plan()._asdict(), FOUND))
    assert list(told) == ["machine", "settings", "timings", "curves"]
    assert told["machine"] == {"threads": 2}
    assert told["settings"]["rounds"] == 5
    assert [each["seconds"] for each in told["timings"]] == [list(t.seconds) for t in TIMINGS]
    assert [each["ratios"] for each in told["timings"]] == [list(t.ratios) for t in TIMINGS]
    keys = {"model", "dtype", "cell", "system", "tokens", "seconds", "ratios", "alike", "error", "share"}
    assert all(set(each) == keys for each in told["timings"])
    assert all(set(each) == {*keys, "axis", "value"} for each in told["curves"])
    assert [(each["axis"], each["value"]) for each in told["curves"]] == [
        ("padding", 0.5),
        ("length", 16),
        ("length", 16),
    ]


def without_matplotlib(monkeypatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    without_matplotlib(monkeypatch)
    with pytest.raises(HubModelsError) as error:
        report.draw(FOUND, tmp_path / "a.png")
    assert str(error.value) == f"{tmp_path / 'a.png'}: the picture needs matplotlib: pip install matplotlib"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "found",
    [FOUND, Found([], []), Found([GONE], [("length", 16, GONE)]), Found([replace(FAST, ratios=())], [])],
    ids=["all", "nothing", "nothing timed", "no base"],
)
def test_a_picture(tmp_path, found):
    pytest.importorskip("matplotlib")
    report.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# The command


@pytest.fixture
def command(monkeypatch, run, directories):
    """more arguments -> exit code, standard output, standard error of `hubmodels bench` on the tiny BERT"""
    monkeypatch.setattr(measure, "_read_bandwidth", lambda device: 1e9)
    fixed = ("bench", "--models", directories["bert"], "--dtypes", "float32", "--cells", "1x16", "--peers")
    return lambda *more: run(*fixed, "--rounds", 1, *more)


def test_bench_prints_the_table(command, directories):
    code, out, err = command()
    assert code == 0
    lines = out.splitlines()
    assert lines[:4] == [f"**{directories['bert']}, float32**", "", "| | 1x16 |", "|---|---|"]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| hubmodels", "| accelerated", f"| {FLOOR}"]
    assert err.startswith(f"{directories['bert']}, float32, 1x16, tokens/s: hubmodels ")
    assert err.count("\n") == 1


def test_bench_as_json_is_all_there_is_on_standard_output(command, directories):
    code, out, err = command("--json")
    assert code == 0
    told = json.loads(out)
    assert told["settings"] == {
        **{"models": [directories["bert"]], "dtypes": ["float32"], "cells": ["1x16"], "peers": []},
        **{"rounds": 1, "curves": [], "device": "cpu", "command": "hubmodels bench"},
    }
    assert told["machine"]["read GB/s"] == 1.0
    assert [each["system"] for each in told["timings"]] == ["hubmodels", "accelerated", FLOOR]
    assert "tokens/s" in err


def test_bench_writes_figures_before_it_misses_matplotlib(monkeypatch, command, tmp_path):
    without_matplotlib(monkeypatch)
    output = tmp_path / "new" / "place"
    code, out, err = command("--output", output)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"hubmodels: error: {output / 'bench.png'}: the picture needs matplotlib")
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.md"]
    assert (output / "bench.md").read_text(encoding="utf-8") == out
    assert len(json.loads((output / "bench.json").read_text(encoding="utf-8"))["timings"]) == 3


def test_bench_writes_a_picture(command, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = command("--output", tmp_path, "--json", "--curves")
    assert code == 0
    assert (tmp_path / "bench.json").read_text(encoding="utf-8") == out
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert json.loads(out)["curves"]


def test_bench_tells_where_it_cannot_write(command, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command("--output", tmp_path / "file")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"hubmodels: error: {tmp_path / 'file'}: cannot be written: ")


def test_bench_sets_the_threads(command):
    code, out, _ = command("--threads", 2, "--json")
    assert code == 0
    assert json.loads(out)["machine"]["threads"] == torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", 0), "--threads 0: expected at least 1"),
        (("--threads", -2), "--threads -2: expected at least 1"),
        (("--rounds", 0), "rounds = 0: expected at least 1"),
    ],
    ids=str,
)
def test_bench_refuses_before_it_measures(command, arguments, message):
    before = torch.get_num_threads()
    assert command(*arguments) == (2, "", f"hubmodels: error: {message}\n")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("option", "value"), [("--cells", "1x17"), ("--dtypes", "float16"), ("--peers", "keras"), ("--threads", "many")]
)
def test_bench_with_an_unknown_choice_exits_with_2(capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", option, value])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: hubmodels bench ")
    assert f"argument {option}: invalid " in err
    assert repr(value) in err
