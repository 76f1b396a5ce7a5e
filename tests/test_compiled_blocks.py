"""An encoder's blocks for few tokens as a program of torch.compile's: equal to the blocks, and only where it may be."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from reference import PATTERNS, distance, inputs_of, pair
from test_bench import bert, cell_of, tiny  # noqa: F401
from test_generation import pair as language_pair

import hubmodels
from hubmodels.bench import run as bench
from hubmodels.compiled import CompiledBlocks, check_compiler
from hubmodels.errors import InputError
from hubmodels.fused import FusedBlocks
from hubmodels.packing import Packing
from hubmodels.prepack import accelerate

try:
    check_compiler()
except InputError as error:
    pytestmark = pytest.mark.skip(reason=str(error))

EXACT = 1e-10  # float64
BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no products of bfloat16"
)
INT8 = pytest.mark.skipif(torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="torch has no FBGEMM here")


def with_program(model):
    """A copy of an encoder in any dtype, which shares its blocks"""
    fast = copy.copy(model)
    fast.shortcut = CompiledBlocks(model.layers, model.layers)
    return fast


@pytest.fixture(scope="module")
def both():
    """An encoder in float64, and one with a program, which is made once."""
    model, _ = pair("BertModel")
    return model, with_program(model)


def took(fast) -> bool:
    """Whether there is a program; of one that may not be called none is made."""
    return fast.shortcut._program is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_states_are_the_models(both, pattern):
    model, fast = both
    inputs = inputs_of("BertModel", pattern)
    inputs = {name: value[:3] for name, value in inputs.items()}
    with torch.inference_mode():
        found, expected = fast(**inputs), model(**inputs)
        assert distance(found.last_hidden_state, expected.last_hidden_state) <= EXACT
        assert distance(found.pooler_output, expected.pooler_output) <= EXACT
    assert took(fast)


def test_one_program_serves_any_number_of_tokens_and_rows_in_any_mode(both):
    model, fast = both
    fast(torch.ones(1, 3, dtype=torch.long))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, length in ((1, 2), (1, 9), (2, 1), (4, 8), (16, 2), (1, 10)):
            ids = torch.arange(5, 5 + rows * length).view(rows, length) % 20
            for mode in (nullcontext, torch.no_grad, torch.inference_mode):
                with mode():
                    assert distance(fast(ids).last_hidden_state, model(ids).last_hidden_state) <= EXACT


def test_what_comes_out_is_an_ordinary_tensor(both):
    """It can be trained on, as a frozen encoder's features are; nothing else of it waits for a gradient."""
    _, fast = both
    head = torch.nn.Linear(fast.config.hidden_size, 2, dtype=torch.float64)
    features = fast.shortcut(torch.randn(5, fast.config.hidden_size, dtype=torch.float64), Packing(1, 5))
    head(features).sum().backward()
    assert not features.requires_grad
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    "case", ["one", "many", "none", "pairs", "hook", "added", "states", "attentions", "train", "autocast"]
)
def test_what_is_not_for_the_program_goes_through_the_blocks(case):
    model, _ = pair("BertModel")
    fast = with_program(model)
    ids = torch.arange(3 * 11).view(3, 11) % 15 + 3
    ids = {"one": ids[:1, :1], "many": ids}.get(case, ids[:2, :5])
    mask = {"none": torch.zeros_like(ids), "pairs": torch.ones(2, 5, 5)}.get(case)
    asked = {"states": {"output_hidden_states": True}, "attentions": {"output_attentions": True}}.get(case, {})
    seen = []
    if case == "hook":
        model.layers[0].attention.register_forward_hook(lambda *_: seen.append(1))
    elif case == "added":
        model.layers.append(model.layers[0])
    elif case == "train":
        model.train()
    with torch.autocast("cpu", enabled=case == "autocast"), torch.no_grad():
        fast(ids, mask, **asked)
    assert not took(fast)
    assert bool(seen) == (case == "hook")


@BF16
def test_an_accelerated_encoder_in_bfloat16():
    model = hubmodels.bertForMaskedLM("bert-nano", dtype=torch.bfloat16).train()
    fast = accelerate(model, compiled=True)
    assert fast.acceleration == (
        "18 linear maps packed by oneDNN in bfloat16, up to 32 tokens compiled, 4 blocks fused"
    )
    ids = torch.arange(2 * 12).view(2, 12) + 5
    exact = hubmodels.bertForMaskedLM("bert-nano")(ids).logits
    error = distance(accelerate(model)(ids).logits, exact)
    assert distance(fast(ids).logits, exact) <= 1.5 * error
    assert took(fast.transformer)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not took(other.transformer)
        assert other.transformer.shortcut.blocks is other.transformer.layers
    assert isinstance(accelerate(fast).transformer.shortcut, FusedBlocks)
    assert model.transformer.shortcut is None
    assert model.training


@INT8
def test_an_accelerated_encoder_in_whole_numbers():
    model = hubmodels.bertModel("bert-nano")
    fast = accelerate(model, torch.int8, compiled=True)
    assert fast.acceleration == (
        "17 linear maps packed by FBGEMM in int8 from float32, up to 32 tokens compiled, the rest in float32"
    )
    ids, mask = torch.arange(2 * 12).view(2, 12) + 5, torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    found, packed, exact = (each(ids, mask).last_hidden_state for each in (fast, accelerate(model, torch.int8), model))
    assert took(fast)
    assert distance(found, exact) <= 1.5 * distance(packed, exact)


def test_the_benchmark_has_it_where_tokens_are_few(bert):  # noqa: F811
    found = []
    contest = bench._Contest.__new__(bench._Contest)
    vars(contest).update(
        name="", dtype="float32", judge=bert, plain=bert, fast=bert, base="compiled", decodes=False, device="cpu"
    )
    vars(contest).update(missing={}, rounds=1, peak=None, tell=lambda line: None)
    contest.runs = {name: lambda cell: bert(cell.input_ids).last_hidden_state for name in ("compiled", "accelerated")}
    for cell in (cell_of(20), cell_of(20, 20)):
        found.append([timing.system for timing in contest.hold(cell)])
    assert found == [["compiled", "accelerated"], ["accelerated"]]


# What is told


def test_what_has_no_program_is_refused():
    causal, _ = language_pair("gpt2", torch.float32, n_layer=1)
    for model, name in ((tiny("bert"), "BertModel"), (causal.transformer, "Gpt2Model")):
        with pytest.raises(InputError) as error:
            accelerate(model, compiled=True)
        assert str(error.value) == (
            "accelerate: compiled = True: expected on a CPU a language model, or an encoder for torch.int8 or, if that "
            f"CPU multiplies it, in bfloat16, got a {name} in torch.float32 on cpu"
        )
