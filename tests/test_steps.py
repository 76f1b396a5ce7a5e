"""Steps of generation as a program of torch.compile's: equal to the model's own, whatever the rows."""

import copy
import pickle

import pytest
import torch
from reference import distance
from test_generation import pair, prompts_of, ragged
from test_prepack import WHOLE

from hubmodels import maps
from hubmodels.bench import systems
from hubmodels.compiled import CompiledSteps, check_compiler
from hubmodels.errors import InputError
from hubmodels.maps import Int8TracedLinear
from hubmodels.prepack import accelerate

try:
    check_compiler()
except InputError as error:
    pytestmark = pytest.mark.skip(reason=str(error))

EXACT = 1e-10  # float64


def words(model, *inputs, **options):
    return [(row.ids, row.ended) for row in model.generate(*inputs, **options)]


@pytest.fixture(scope="module", params=["gpt", "gpt2"])
def both(request):
    """A model in float64, and its copy; programs are made once."""
    model, _ = pair(request.param, n_layer=1)
    return model, accelerate(model, compiled=True)


def test_the_scores_are_the_models(both):
    model, fast = both
    with torch.inference_mode():
        for inputs in ((prompts_of(1),), ragged("left")[1:]):
            ids, mask = inputs if len(inputs) == 2 else (*inputs, None)
            scores = []
            for each in (model, fast):
                cache = each.transformer.new_cache(len(ids), 20)
                each.transformer.encode(ids, mask, cache=cache)
                step = fast.steps(fast, cache) if each is fast else None
                for column in range(ids.shape[1], ids.shape[1] + 3):
                    tokens, positions = torch.full((len(ids),), column), torch.full((len(ids), 1), column)
                    scores.append((step or (lambda *a: model.next_scores(*a, cache)))(tokens, positions))  # noqa: B023
            for expected, found in zip(scores[:3], scores[3:], strict=True):
                assert distance(found, expected) <= EXACT


@pytest.mark.parametrize("padding", ["none", "left", "interleaved"])
def test_the_words_are_the_models(both, padding):
    model, fast = both
    inputs = (prompts_of(),) if padding == "none" else ragged(padding)[1:]
    assert words(fast, *inputs, max_new_tokens=8) == words(model, *inputs, max_new_tokens=8)
    one = [each[:1] for each in inputs]
    assert words(fast, *one, max_new_tokens=8) == words(model, *one, max_new_tokens=8)


def test_rows_that_end_and_samples_and_beams_are_as_without(both):
    model, fast = both
    _, *inputs = ragged("left")
    firsts = [ids for ids, _ in words(model, *inputs, max_new_tokens=8)]
    for options in (
        {"stop_ids": [firsts[0][3]]},
        {"stop_ids": [ids[2] for ids in firsts[1:]]},  # one row goes on alone
        {"temperature": 1.0, "seed": 3, "num_return_sequences": 2},
        {"num_beams": 3},
        {"repetition_penalty": 1.5},
    ):
        expected = words(model, *inputs, max_new_tokens=8, **options)
        assert words(fast, *inputs, max_new_tokens=8, **options) == expected


def test_two_programs_serve_all(both, monkeypatch):
    """Of other rooms, lengths and numbers of rows none is made anew."""
    _, fast = both
    for inputs in ((prompts_of(1),), ragged("left")[1:]):
        words(fast, *inputs, max_new_tokens=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (2, 9, 20):
            words(fast, prompts_of(1)[:, :3], max_new_tokens=count)
            words(fast, prompts_of(3), max_new_tokens=count)
            words(fast, *ragged("interleaved")[1:], max_new_tokens=count)
        _, *inputs = ragged("left")
        firsts = [ids[0] for ids, _ in words(fast, *inputs, max_new_tokens=1)]
        assert firsts[0] not in firsts[1:]
        words(fast, *inputs, max_new_tokens=4, stop_ids=firsts[1:])  # the first row goes on alone, before any step


def test_a_program_holds_the_weights_it_was_made_of():
    model, _ = pair("gpt2", torch.float32, n_layer=1)
    fast = accelerate(model, compiled=True)
    before = words(fast, prompts_of(1), max_new_tokens=4)
    assert before == words(model, prompts_of(1), max_new_tokens=4)
    assert fast.acceleration == "steps of generation without beams are compiled, in float32"
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(other.steps, CompiledSteps)
        assert other.steps._model is None
    assert accelerate(fast).steps is None  # its maps are others


@WHOLE
def test_whole_numbers():
    model, _ = pair("gpt2", torch.float32, std=0.2, n_layer=1)
    fast = accelerate(model, torch.int8, compiled=True)
    assert fast.acceleration == (
        "5 linear maps packed by FBGEMM in int8 from float32, steps of generation without beams compiled, the rest in "
        "float32"
    )
    packed = accelerate(model, torch.int8)
    inputs = ragged("left")[1:]
    assert words(fast, *inputs, max_new_tokens=8) == words(packed, *inputs, max_new_tokens=8)
    with torch.inference_mode():
        for ids, limit in ((prompts_of(1), 0.03), (prompts_of(3), 0.05)):  # several tokens are rounded to 8 bits too
            cache = model.transformer.new_cache(len(ids), 20)
            model.transformer.encode(ids, cache=cache)
            twin, tokens = copy.deepcopy(cache), torch.arange(len(ids)) + 7
            expected, found = model.next_scores(tokens, None, cache), fast.steps(fast, twin)(tokens, None)
            assert float((found - expected).norm() / expected.norm()) <= limit


@WHOLE
def test_a_map_in_a_program_is_the_one_it_was():
    """A program names maps by numbers; a copy has numbers of its own, and what is gone is not kept."""
    linear = torch.nn.Linear(32, 16)
    first = Int8TracedLinear(linear.weight, linear.bias)
    second = copy.deepcopy(first)
    assert first.number != second.number
    x = torch.randn(3, 32)
    assert torch.equal(maps._int8_product(x, first.number, 16), first.product(x))
    assert torch.equal(maps._int8_product(x, second.number, 16), first.product(x))
    number = first.number
    del first
    assert number not in maps._traced


def test_in_training_nothing_compiled_runs(both, monkeypatch):
    _, fast = both
    monkeypatch.setattr(CompiledSteps, "__call__", lambda *_: pytest.fail("a program ran"))
    copy.copy(fast).train().generate(prompts_of(1), max_new_tokens=3)
    fast.eval()


def test_the_benchmark_has_it():
    model, _ = pair("gpt2", torch.float32, n_layer=1)
    runs, _ = systems.our_runs(model, "float32", decodes=True)
    assert list(runs) == ["hubmodels", "accelerated", "compiled"]


# What is told


def test_hooks_are_refused():
    model, _ = pair("gpt2", torch.float32, n_layer=1)
    model.transformer.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError) as error:
        accelerate(model, compiled=True)
    assert str(error.value) == (
        "accelerate: compiled = True: a part of the model has hooks, which may not run in a program"
    )


def test_a_machine_without_a_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    model, _ = pair("gpt2", torch.float32, n_layer=1)
    with pytest.raises(InputError) as error:
        accelerate(model, compiled=True)
    assert str(error.value) == (
        "accelerate: compiled = True: torch.compile finds no C++ compiler on this machine; install one, as g++, or "
        "name it in the environment variable CXX"
    )
    assert "compiled" not in systems.our_runs(model, "float32", decodes=True)[0]
