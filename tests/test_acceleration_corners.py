"""Corners of what is accelerated: hooks, modes, threads, memory that nobody wrote, gradients, copies and files."""

import copy
import pickle
import threading
import time

import pytest
import torch
from reference import B, D, S, distance, inputs_of, pair
from test_cache import build, ids_of
from test_generation import pair as language_pair
from test_generation import prompts_of, ragged
from test_graphs import Recorder, generated, graphed_encoder
from torch import nn

import hubmodels
from hubmodels import cache, generation, transformer
from hubmodels.errors import InputError
from hubmodels.graphs import GraphedBlocks, GraphedSteps
from hubmodels.maps import Int8Linear, PackedLinear
from hubmodels.prepack import accelerate, graphed

FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")
WHOLE = pytest.mark.skipif(not FBGEMM, reason="torch has no FBGEMM for this CPU")
DTYPES = [None, pytest.param(torch.int8, marks=WHOLE)]
EXACT = 1e-10  # float64


def encoder(dtype=torch.float32, name="BertModel", **changes):
    return pair(name, dtype, **changes)[0]


def states(model, pattern="right", **options):
    with torch.no_grad():
        return model(**inputs_of("BertModel", pattern), **options)[0]


# What stays as it is: hooks, adapters, the model itself


@pytest.mark.parametrize("dtype", DTYPES)
def test_accelerating_changes_no_part_with_hooks(dtype):
    model = encoder(torch.bfloat16 if dtype is None else torch.float32)
    model.layers[0].feed_forward.inner.register_forward_hook(lambda *_: None)
    before = {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    accelerate(model, dtype)
    assert {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before


def test_a_model_with_a_hook_of_its_own_is_not_given_back_as_its_copy():
    model = encoder().train()
    model.register_forward_hook(lambda *_: None)
    fast = accelerate(model)
    assert fast is not model
    assert "acceleration" not in vars(model)
    assert not fast.training


def test_graphs_are_no_business_of_a_model_with_a_hook_of_its_own():
    model, _ = language_pair("gpt2")
    model.register_forward_hook(lambda *_: None)
    graphed(model, Recorder())
    assert model.steps is None


def test_a_hook_on_the_copy_is_none_on_the_model():
    model, seen = encoder(), []
    accelerate(model).layers[0].register_forward_hook(lambda *_: seen.append("fast"))
    states(model)
    assert seen == []


def test_a_hook_on_a_blocks_dropout_still_runs():
    model, seen = encoder(), []
    model.layers[0].dropout.register_forward_hook(lambda *_: seen.append("dropout"))
    states(accelerate(model))
    assert seen == ["dropout"] * 2


def test_what_was_put_in_the_place_of_a_dropout_still_runs():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = encoder()
    model.layers[0].dropout = Doubled()
    assert distance(states(accelerate(model)), states(model)) <= 1e-4


@pytest.mark.parametrize("part", ["feed_forward.inner", "feed_forward"])
def test_a_forward_that_was_put_on_one_part_still_runs(part):
    """Some libraries of adapters wrap `module.forward`."""
    model = encoder()
    wrapped = model.layers[0].get_submodule(part)
    before = wrapped.forward
    wrapped.forward = lambda x: 2 * before(x)  # a norm would take a constant away
    assert distance(states(accelerate(model)), states(model)) <= 1e-4


# Dtypes


@WHOLE
@pytest.mark.parametrize("name", ["BertModel", "gpt2"])
def test_whole_numbers_of_a_model_in_float64(name):
    model = encoder(torch.float64) if name == "BertModel" else language_pair(name)[0]
    fast = accelerate(model, torch.int8)
    with torch.no_grad():
        found, expected = (each(input_ids=prompts_of()) for each in (fast, model))
    place = 0 if name == "BertModel" else 1
    assert float((found[place] - expected[place]).norm() / expected[place].norm()) <= 0.2


@WHOLE
def test_whole_numbers_of_a_packed_model_are_refused_or_made():
    """A dtype that was asked for is not left out in silence."""
    packed = accelerate(encoder())
    try:
        fast = accelerate(packed, torch.int8)
    except InputError:
        return
    assert any(isinstance(part, Int8Linear) for part in fast.modules())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["none", "right"])
def test_an_accelerated_model_under_autocast(pattern, dtype):
    model = encoder()
    fast = accelerate(model, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = states(fast, pattern)
    assert float((found - states(model, pattern)).norm() / states(model, pattern).norm()) <= 0.1


@WHOLE
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_no_number_spoils_itself_alone(bad):
    packed, x = Int8Linear(torch.randn(5, 8), None), torch.randn(3, 8)
    expected = packed(x)
    x[1, 3] = bad
    found = packed(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", [PackedLinear, pytest.param(Int8Linear, marks=WHOLE)])
def test_maps_take_what_is_not_contiguous(kind):
    weight, x, residual = torch.randn(8, 5).T, torch.randn(4, 16)[:, ::2], torch.randn(5, 4).T
    packed, same = kind(weight, None), kind(weight.contiguous(), None)
    with torch.no_grad():
        assert torch.equal(packed(x), same(x.contiguous()))
        assert distance(packed.plus(x, residual), packed(x) + residual) <= 1e-5


# Gradients


@pytest.mark.parametrize("name", ["BertModel", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_have_gradients_gives_no_wrong_ones(name):
    """Vectors that take gradients: they are right, or the result takes part in none."""
    model = encoder() if name == "BertModel" else language_pair(name, torch.float32)[0]
    vectors = torch.randn(2, 3, D, requires_grad=True)
    place = 0 if name == "BertModel" else 1
    out = accelerate(model)(inputs_embeds=vectors)[place]
    if not out.requires_grad:
        return
    found = torch.autograd.grad(out.square().sum(), vectors, allow_unused=True)[0]
    expected = torch.autograd.grad(model(inputs_embeds=vectors)[place].square().sum(), vectors)[0]
    assert found is not None, "takes part in gradients, and gives none"
    assert float((found - expected).norm() / expected.norm()) <= 0.3


def test_parts_of_a_batch_give_the_gradients_of_the_whole(monkeypatch):
    """Embeddings are frozen, what comes later is trained."""
    model, found = encoder(torch.float64), []
    model.embeddings.requires_grad_(False)
    for most in (1, 2**25):
        monkeypatch.setattr(transformer, "_AT_ONCE", most)
        model.zero_grad()
        model(**inputs_of("BertModel", "right")).last_hidden_state.square().sum().backward()
        found.append(model.layers[1].attention.qkv.weight.grad.clone())
    assert distance(*found) <= EXACT * float(found[1].abs().max())


def test_a_hook_on_gradients_sees_the_whole_batch(monkeypatch):
    monkeypatch.setattr(transformer, "_AT_ONCE", 1)
    model, seen = encoder(torch.float64), []
    model.embeddings.requires_grad_(False)
    model.layers[1].register_full_backward_hook(lambda module, into, out: seen.append(len(out[0])))
    model(**inputs_of("BertModel", "none")).last_hidden_state.sum().backward()
    assert seen == [B * S]


# Batches


@pytest.mark.parametrize("kind", ["plain", None, pytest.param(torch.int8, marks=WHOLE)])
def test_parts_of_rows_without_tokens(kind, monkeypatch):
    model = encoder() if kind == "plain" else accelerate(encoder(), kind)
    inputs = inputs_of("BertModel", "right")
    inputs["attention_mask"][[0, 3]] = 0
    found = []
    for most in (1, 2**25):
        monkeypatch.setattr(transformer, "_AT_ONCE", most)
        with torch.no_grad():
            found.append(model(**inputs))
    assert distance(found[0].last_hidden_state, found[1].last_hidden_state) <= 1e-5
    assert distance(found[0].pooler_output, found[1].pooler_output) <= 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(0, S), (B, 0)])
def test_a_batch_of_no_row_or_no_column(rows, columns):
    with torch.no_grad():
        found = encoder()(torch.zeros(rows, columns, dtype=torch.long))
    assert found.last_hidden_state.shape == (rows, columns, D)
    assert found.pooler_output.shape == (rows, D)


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_that_are_all_ignored(dtype):
    inputs = inputs_of("BertForMaskedLM", "right")
    fast = accelerate(encoder(name="BertForMaskedLM"), dtype)
    output = fast(**inputs, labels=torch.full_like(inputs["input_ids"], -100))
    assert (float(output.loss), len(output.logits)) == (0.0, 0)


# Copies and files


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.filterwarnings("ignore")
def test_an_accelerated_model_is_copied_whole(way, dtype):
    fast = accelerate(encoder(), dtype)
    again = copy.deepcopy(fast) if way == "deepcopy" else pickle.loads(pickle.dumps(fast))
    assert torch.equal(states(again), states(fast))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accelerated_model_is_not_saved_without_its_weights(dtype, tmp_path):
    """Its maps are packed, and in no state_dict: what is written must be whole or refused."""
    with pytest.raises(InputError):
        hubmodels.export(accelerate(encoder(), dtype), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Graphs


@pytest.mark.parametrize("order", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_graphs_of_one_mode_serve_the_other(order):
    model, fast = graphed_encoder(Recorder())
    for mode in order:
        with mode():
            found = fast(**inputs_of("BertModel", "right"))
        assert distance(found.last_hidden_state, states(model)) <= EXACT


def test_graphs_end_with_any_of_the_weights_they_were_of():
    recorder = Recorder()
    model, fast = graphed_encoder(recorder)
    states(fast)
    inner = model.layers[2].feed_forward.inner
    inner.weight = nn.Parameter(torch.randn_like(inner.weight))
    states(fast)
    assert recorder.recorded == 2


def test_a_model_that_is_trained_runs_no_graph():
    recorder = Recorder()
    model = encoder(torch.float64, attention_probs_dropout_prob=1e-9, hidden_dropout_prob=0.0)
    expected, fast = states(model), copy.copy(model)
    fast.shortcut = GraphedBlocks(model.layers, recorder)
    fast.train()
    assert distance(states(fast), expected) <= 1e-6
    assert recorder.recorded == 0


def test_two_threads_on_one_graph():
    class Slow(Recorder):
        def __call__(self, run, pool):
            replay = super().__call__(run, pool)

            def slowly():
                time.sleep(0.02)
                replay()

            return slowly

    model, fast = graphed_encoder(Slow())
    batches = [torch.full((2, S), 7), torch.full((2, S), 8)]
    with torch.no_grad():
        expected = [model(ids).last_hidden_state for ids in batches]
        fast(batches[0])
    wrong = []

    def work(ids, right):
        with torch.no_grad():
            wrong.extend(distance(fast(ids).last_hidden_state, right) for _ in range(3))

    threads = [threading.Thread(target=work, args=each) for each in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 6
    assert max(wrong) <= EXACT


@pytest.fixture
def nothing_is_zero_by_chance():
    """torch fills memory that nobody has written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nothing_is_zero_by_chance")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_step_as_a_graph_looks_at_nothing_that_nobody_wrote(padding, monkeypatch):
    monkeypatch.setattr(GraphedSteps, "least", 4)
    model, _ = language_pair("gpt2")
    inputs = (prompts_of(),) if padding == "none" else ragged(padding)[1:]
    fast = graphed(model, Recorder())
    assert generated(fast, *inputs, max_new_tokens=6) == generated(model, *inputs, max_new_tokens=6)


# Generation and its cache


def test_dropout_is_on_in_long_texts_as_in_short_ones(monkeypatch):
    """As `generate` says of train mode."""
    monkeypatch.setattr(generation, "_WORTH_PACKING", 4)
    model, _ = language_pair("gpt2", torch.float32, resid_pdrop=0.5, attn_pdrop=0.0, embd_pdrop=0.0)
    model.train()
    for new in (3, 5):
        assert len({tuple(generated(model, prompts_of(1), max_new_tokens=new)[0]) for _ in range(8)}) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_beams_of_padded_prompts_are_those_of_each_alone(dtype):
    fast = accelerate(language_pair("gpt2", torch.float32)[0], dtype)
    prompts, ids, mask = ragged("left")
    copies = 1 if dtype is None else 2  # of one prompt the last token would be alone, and not be rounded to 8 bits
    alone = [generated(fast, prompt.expand(copies, -1), num_beams=3, max_new_tokens=6)[0] for prompt in prompts]
    assert generated(fast, ids, mask, num_beams=3, max_new_tokens=6) == alone


def mostly_padding():
    mask = torch.ones(4, 13, dtype=torch.long)
    for row, count in enumerate((8, 6, 7, 5)):
        mask[row, :count] = 0
    return ids_of(4), mask


@torch.no_grad()
def test_rows_that_are_selected_after_steps_on_much_padding():
    model, (ids, mask), rows = build("gpt2"), mostly_padding(), torch.tensor([2, 2, 0])
    held = model.transformer.new_cache(4, 13)
    model(ids[:, :9], mask[:, :9], cache=held)
    model(ids[:, 9:10], cache=held)
    assert held.begins == [8, 6, 7, 5]
    held.select(rows)
    found = [model(ids[rows, k : k + 1], cache=held).logits for k in range(10, 13)]
    assert held.begins == [7, 7, 8]
    assert distance(torch.cat(found, 1), model(ids[rows], mask[rows]).logits[:, 10:]) <= EXACT


def test_one_token_on_much_padding_has_the_gradients_of_the_masked_call(monkeypatch):
    model, (ids, mask), found = build("gpt2"), mostly_padding(), []
    for dense in (1.0, -1.0):
        monkeypatch.setattr(cache, "_DENSE", dense)
        held = model.transformer.new_cache(4, 13)
        with torch.no_grad():
            model(ids[:, :12], mask[:, :12], cache=held)
        model.zero_grad()
        model(ids[:, 12:], cache=held).logits.square().sum().backward()
        assert (held.begins is None) == (dense < 0)
        found.append(model.transformer.layers[0].attention.qkv.weight.grad.clone())
    assert distance(*found) <= EXACT * float(found[1].abs().max())


# Texts


@pytest.mark.parametrize("entry", ["bertForMaskedLM", "gptModel", "gpt"])
def test_what_embeds_no_texts_is_told(entry):
    model = getattr(hubmodels, entry)("bert-nano" if entry.startswith("bert") else "gpt-nano")
    with pytest.raises(InputError):
        hubmodels.embed(model, ["The ship sailed."])


def test_half_of_a_model_in_whole_numbers_is_refused():
    model = encoder(torch.bfloat16)
    model.layers[0].feed_forward.inner.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError) as error:
        accelerate(model, torch.int8)
    assert str(error.value) == (
        "accelerate: dtype = torch.int8: parts with hooks or of other classes go on as they are, the rest would be "
        "float32: expected a model in float32, got one in torch.bfloat16"
    )
