"""The native BERT against transformers, all eight classes, and what a user does with the modules."""

import copy
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from reference import (
    INNER,
    LAYERS,
    NAMES,
    PATTERNS,
    POSITIONS,
    SIZES,
    B,
    D,
    H,
    S,
    V,
    distance,
    follow_labels,
    follow_padding,
    generator,
    gradients,
    gradients_as_theirs,
    inputs_of,
    labels_of,
    mask_of,
    ours_as,
    pair,
    randomise,
    rows_of,
    their_config,
)

import hubmodels
from hubmodels import kernels, transformer
from hubmodels.families import bert
from hubmodels.layers import ACTIVATIONS, Attention, PostNormBlock
from hubmodels.packing import packing_of

EXACT = 1e-10  # float64
PER_TOKEN = {"last_hidden_state", "prediction_logits", "start_logits", "end_logits"}


def is_per_token(name, field):
    return field in PER_TOKEN or (field == "logits" and name in ("BertForMaskedLM", "BertForTokenClassification"))


def assert_equal_outputs(name, got, expected, mask, tolerance):
    """Every field of `got`: equal where tokens are; at padding zeros, or the lowest number in question answering."""
    real = mask.flatten(0, -2).bool()
    checked = 0
    for field, ours in got._asdict().items():
        if ours is None or field in ("hidden_states", "attentions"):
            continue
        theirs = getattr(expected, field)
        if is_per_token(name, field):
            padding = torch.finfo(ours.dtype).min if field in ("start_logits", "end_logits") else 0.0
            assert bool((ours[~real] == padding).all()), field
            assert distance(ours[real], theirs[real]) <= tolerance, field
        else:
            assert distance(ours, theirs) <= tolerance, field
        checked += 1
    assert checked


def scalar_of(outputs, mask):
    """Something to differentiate: the loss, or for the bare encoder a random projection of all it gives."""
    if not hasattr(outputs, "last_hidden_state"):
        return outputs.loss
    states, pooled = outputs.last_hidden_state, outputs.pooler_output
    draw = generator(5)
    weights = torch.randn(states.shape, generator=draw, dtype=states.dtype) * mask[:, :, None]
    return (states * weights).sum() + (pooled * torch.randn(pooled.shape, generator=draw, dtype=pooled.dtype)).sum()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_transformers(name, pattern):
    ours, theirs = pair(name)
    inputs = inputs_of(name, pattern)
    mask = inputs["attention_mask"]
    with torch.no_grad(), follow_padding(theirs, mask):
        expected = theirs(**inputs, output_hidden_states=True, output_attentions=True)
        assert_equal_outputs(name, ours(**inputs), expected, mask, EXACT)
        got = ours(**inputs, output_hidden_states=True, output_attentions=True)
    assert_equal_outputs(name, got, expected, mask, EXACT)
    real = mask.flatten(0, -2).bool()
    assert len(got.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for ours_state, their_state in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert not ours_state[~real].any()
        assert distance(ours_state[real], their_state[real]) <= EXACT
    assert len(got.attentions) == len(expected.attentions) == LAYERS
    for ours_weights, their_weights in zip(got.attentions, expected.attentions, strict=True):
        assert ours_weights.shape == (len(real), H, S, S)
        by_row = ours_weights.transpose(1, 2)  # [B, S, H, S]
        assert not by_row[~real].any()
        assert not ours_weights.permute(0, 3, 1, 2)[~real].any()
        assert distance(by_row[real].sum(-1), torch.ones(int(real.sum()), H)) <= EXACT
        assert distance(by_row[real], their_weights.transpose(1, 2)[real]) <= EXACT


@pytest.mark.parametrize("attentions", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_transformers(name, pattern, attentions):
    ours, theirs = pair(name)
    inputs, labels = inputs_of(name, pattern), labels_of(name)
    mask = inputs["attention_mask"]
    loss = scalar_of(ours(**inputs, **labels, output_attentions=attentions), mask)
    loss.backward()
    with follow_padding(theirs, mask):
        expected = scalar_of(theirs(**inputs, **follow_labels(labels, mask)), mask)
        expected.backward()
    assert distance(loss, expected) <= EXACT
    their_gradients, our_gradients = gradients(theirs), gradients_as_theirs(ours)
    assert our_gradients.keys() == their_gradients.keys()
    for key, gradient in our_gradients.items():
        assert distance(gradient, their_gradients[key]) <= EXACT, key
    if (name, pattern) != ("BertForQuestionAnswering", "all_but_one"):  # where one token is the only possible answer
        assert max(g.abs().max() for g in their_gradients.values()) > 1e-3


@pytest.mark.parametrize("pattern", ["left", "interleaved"])
def test_pooled_token_is_the_first_real_one(pattern):
    ours, theirs = pair("BertModel")
    inputs = inputs_of("BertModel", pattern)
    with torch.no_grad():
        pooled = ours(**inputs).pooler_output
        states = theirs(**inputs).last_hidden_state
        first = inputs["attention_mask"].argmax(1)
        assert first.max() > 0
        by_hand = torch.tanh(states[torch.arange(B), first] @ theirs.pooler.dense.weight.T + theirs.pooler.dense.bias)
    assert distance(pooled, by_hand) <= EXACT


@pytest.mark.parametrize("pattern", ["none", "interleaved"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_transformers(name, pattern):
    ours, theirs = pair(name, torch.float32)
    inputs = inputs_of(name, pattern)
    with torch.no_grad(), follow_padding(theirs, inputs["attention_mask"]):
        expected = theirs(**inputs)
        largest = max([1.0, *(float(t.abs().max()) for t in expected.values() if t.abs().max() < 100)])
        assert_equal_outputs(name, ours(**inputs), expected, inputs["attention_mask"], 5e-6 * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float16, 0.03)])
@pytest.mark.parametrize("pattern", ["none", "right"])
def test_half_precision_is_near_float64_and_no_farther_than_transformers(dtype, tolerance, pattern):
    inputs = inputs_of("BertModel", pattern)
    real = inputs["attention_mask"].bool()
    ours, theirs = pair("BertModel", dtype)
    with torch.no_grad():
        exact = theirs.double()(**inputs).last_hidden_state[real]
        got = ours(**inputs).last_hidden_state
        rival = theirs.to(dtype)(**inputs).last_hidden_state
    assert got.dtype == dtype
    error, their_error = (got[real] - exact).abs(), (rival[real] - exact).abs()
    assert distance(got[real], exact) <= tolerance
    assert error.mean() <= 1.5 * their_error.mean()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_activations_equal_transformers(activation):
    ours, theirs = pair("BertForMaskedLM", hidden_act=activation)
    inputs = inputs_of("BertForMaskedLM", "right")
    with torch.no_grad():
        assert_equal_outputs("BertForMaskedLM", ours(**inputs), theirs(**inputs), inputs["attention_mask"], EXACT)
        for other in {"gelu", "gelu_new", "relu", "silu"} - {activation}:
            wrong = ours_as(theirs, "BertForMaskedLM", **SIZES, hidden_act=other)
            assert distance(wrong(**inputs).logits, ours(**inputs).logits) > 1e-4


def test_the_two_gelus_differ_most_at_2_70_by_4_73e_4():
    x = torch.linspace(-6, 6, 120001, dtype=torch.float64)
    difference = (ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_new"](x)).abs()
    assert float(difference.max()) == pytest.approx(4.73e-4, abs=5e-7)
    assert float(x[difference.argmax()].abs()) == pytest.approx(2.70, abs=0.01)


def test_a_wrong_layer_norm_eps_is_seen():
    ours, theirs = pair("BertModel", layer_norm_eps=1e-12)
    wrong = ours_as(theirs, "BertModel", **SIZES, layer_norm_eps=1e-5)
    inputs = inputs_of("BertModel", "none")
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state
        assert distance(ours(**inputs).last_hidden_state, expected) <= EXACT
        assert distance(wrong(**inputs).last_hidden_state, expected) > 1e-7


def pairs_mask():
    """[B, S, S] bool, not symmetric; every token looks at one at least."""
    mask = torch.rand(B, S, S, generator=generator(6)) < 0.5
    mask[torch.rand(B, S, generator=generator(7)).argsort(1) == 0] = True
    return mask | torch.eye(S, dtype=torch.bool).roll(2, 0)


def additive(mask):
    """[B, S, S] bool -> [B, 1, S, S], as the reference takes it ready made"""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)[:, None]


@pytest.mark.parametrize("attentions", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForQuestionAnswering"])
def test_mask_of_pairs_equals_transformers(name, attentions):
    ours, theirs = pair(name)
    inputs, labels, mask = inputs_of(name, "none"), labels_of(name), pairs_mask()
    everything = inputs.pop("attention_mask")
    got = ours(**inputs, **labels, attention_mask=mask.long(), output_attentions=attentions)
    expected = theirs(**inputs, **labels, attention_mask=additive(mask), output_attentions=True)
    if name == "BertForMaskedLM":
        assert distance(got.loss, expected.loss) <= EXACT
    else:
        assert_equal_outputs(name, got, expected, everything, EXACT)
    if attentions:
        assert not got.attentions[0].masked_select(~mask[:, None]).any()
        assert max(map(distance, got.attentions, expected.attentions)) <= EXACT
    scalar_of(got, everything).backward()
    scalar_of(expected, everything).backward()
    their_gradients = gradients(theirs)
    for key, gradient in gradients_as_theirs(ours).items():
        assert distance(gradient, their_gradients[key]) <= EXACT, key


def test_mask_of_pairs_that_hides_padding_equals_the_mask_of_tokens():
    ours, _ = pair("BertModel")
    inputs = inputs_of("BertModel", "right")
    mask = inputs.pop("attention_mask")
    with torch.no_grad():
        packed = ours(**inputs, attention_mask=mask).last_hidden_state
        pairwise = ours(**inputs, attention_mask=mask[:, None, :].expand(B, S, S)).last_hidden_state
    assert distance(packed[mask.bool()], pairwise[mask.bool()]) <= EXACT


def test_a_token_that_may_look_nowhere_gets_one_answer_from_both_paths():
    ours, _ = pair("BertModel")
    inputs, mask = inputs_of("BertModel", "none"), pairs_mask()
    mask[1, 3] = False
    inputs["attention_mask"] = mask
    kernel = ours(**inputs).last_hidden_state
    explicit = ours(**inputs, output_attentions=True).last_hidden_state
    assert kernel.isfinite().all()
    assert distance(kernel, explicit) <= EXACT


@pytest.mark.parametrize("rows", [B, 1], ids=["a row each", "one for all"])
@pytest.mark.parametrize("pattern", ["none", "interleaved"])
def test_position_ids_equal_transformers(pattern, rows):
    ours, theirs = pair("BertModel")
    inputs = inputs_of("BertModel", pattern)
    positions = torch.randint(0, POSITIONS, (rows, S), generator=generator(8))
    with torch.no_grad(), follow_padding(theirs, inputs["attention_mask"]):
        got = ours(**inputs, position_ids=positions)
        assert_equal_outputs(
            "BertModel", got, theirs(**inputs, position_ids=positions), inputs["attention_mask"], EXACT
        )
        assert distance(got.last_hidden_state, ours(**inputs).last_hidden_state) > 0.1


@pytest.mark.parametrize("pattern", ["none", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_embeds_equal_transformers(name, pattern):
    ours, theirs = pair(name)
    inputs = inputs_of(name, pattern)
    inputs["inputs_embeds"] = torch.randn(*inputs.pop("input_ids").shape, D, generator=generator(9)).double()
    with torch.no_grad(), follow_padding(theirs, inputs["attention_mask"]):
        assert_equal_outputs(name, ours(**inputs), theirs(**inputs), inputs["attention_mask"], EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_token_types_and_mask_may_be_left_out(name):
    ours, theirs = pair(name)
    ids = inputs_of(name, "none")["input_ids"]
    everything = torch.ones_like(ids)
    with torch.no_grad():
        assert_equal_outputs(name, ours(ids), theirs(ids), everything, EXACT)
        assert distance(ours(ids)[-3], ours(ids, everything, torch.zeros_like(ids))[-3]) == 0.0


def test_one_row_of_token_types_serves_all_as_in_transformers():
    ours, theirs = pair("BertModel")
    inputs = inputs_of("BertModel", "right")
    inputs["token_type_ids"] = inputs["token_type_ids"][:1]
    with torch.no_grad():
        assert_equal_outputs("BertModel", ours(**inputs), theirs(**inputs), inputs["attention_mask"], EXACT)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_mask_may_have_any_dtype(kind):
    ours, _ = pair("BertModel")
    inputs = inputs_of("BertModel", "interleaved")
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        inputs["attention_mask"] = inputs["attention_mask"].to(kind)
        assert torch.equal(ours(**inputs).last_hidden_state, expected)


def by_name_and_place(outputs, *fields):
    return outputs._fields == fields and all(outputs[i] is getattr(outputs, f) for i, f in enumerate(fields))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_named_tuples(name):
    ours, _ = pair(name)
    fields = {
        "BertModel": ("last_hidden_state", "pooler_output"),
        "BertForPreTraining": ("loss", "prediction_logits", "seq_relationship_logits"),
        "BertForQuestionAnswering": ("loss", "start_logits", "end_logits"),
    }.get(name, ("loss", "logits"))
    outputs = ours(**inputs_of(name, "right"))
    assert by_name_and_place(outputs, *fields, "hidden_states", "attentions")
    assert outputs.hidden_states is None
    assert outputs.attentions is None


# Training: dropout and gradient checkpointing.


def fresh(name, **changes):
    """Ours in training mode, and an argument list with labels."""
    ours, _ = pair(name, **changes)
    return ours.train(), {**inputs_of(name, "right"), **labels_of(name)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_number(name, dropout):
    ours, inputs = fresh(name, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    results = []
    for enabled in (False, True):
        ours.gradient_checkpointing = enabled
        ours.zero_grad()
        torch.manual_seed(10)
        loss = scalar_of(ours(**inputs), inputs["attention_mask"].view(-1, S))
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in ours.parameters()]))
    (loss, plain), (loss_again, again) = results
    assert distance(loss, loss_again) <= EXACT
    assert max(map(distance, plain, again)) <= EXACT


def test_gradient_checkpointing_saves_less_and_computes_blocks_twice():
    ours, inputs = fresh("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert ours.gradient_checkpointing is False
    calls = []
    ours.transformer.layers[0].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    saved, counts = [], []
    for enabled in (False, True):
        ours.gradient_checkpointing = enabled
        calls.clear()
        numbers = {}

        def keep(tensor, numbers=numbers):
            numbers[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = ours(**inputs).loss
        loss.backward()
        saved.append(sum(numbers.values()))
        counts.append(len(calls))
    assert counts == [1, 2]
    assert saved[1] < 0.5 * saved[0]


def test_gradient_checkpointing_rests_in_eval_mode():
    ours, inputs = fresh("BertForMaskedLM")
    ours.gradient_checkpointing = True
    calls = []
    ours.transformer.layers[0].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    ours.eval()(**inputs).loss.backward()
    assert len(calls) == 1


@pytest.mark.parametrize("attentions", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_active_in_training_and_not_in_eval(name, attentions):
    ours, inputs = fresh(name, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    inputs["output_attentions"] = attentions
    for key in labels_of(name):
        del inputs[key]
    draws = [ours(**inputs) for _ in range(2)]
    torch.manual_seed(11)
    seeded = ours(**inputs)
    torch.manual_seed(11)
    reseeded = ours(**inputs)
    ours.eval()
    calm = [ours(**inputs) for _ in range(2)]
    place = 0 if name == "BertModel" else 1
    assert distance(draws[0][place], draws[1][place]) > 1e-3
    assert torch.equal(seeded[place], reseeded[place])
    assert torch.equal(calm[0][place], calm[1][place])


@pytest.mark.parametrize(("field", "module"), [("hidden_dropout_prob", 0), ("attention_probs_dropout_prob", 1)])
def test_each_dropout_field_acts_alone(field, module):
    other = ("attention_probs_dropout_prob", "hidden_dropout_prob")[module]
    ours, inputs = fresh("BertModel", **{field: 0.4, other: 0.0})
    states = ours(**inputs).last_hidden_state
    hidden_states = ours(**inputs, output_hidden_states=True).hidden_states
    embeddings_drop = bool((hidden_states[0][inputs["attention_mask"].bool()] == 0).any())
    assert embeddings_drop == (field == "hidden_dropout_prob")
    assert distance(states, ours.eval()(**inputs).last_hidden_state) > 1e-2


@pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_attention_dropout_keeps_the_mean(padded, explicit):
    attention = Attention(D, H, dropout=0.3)
    randomise(attention, 12)
    copies, length = 2000, 5
    mask = torch.ones(copies, length)
    if padded:
        mask[:, 3] = 0
    packing = packing_of(copies, length, mask)
    row = torch.randn(int(mask[0].sum()), D, generator=generator(13))
    x = row.repeat(copies, 1)
    with torch.no_grad():
        calm = attention.eval()(x, packing, [] if explicit else None)[: len(row)]
        torch.manual_seed(14)
        drawn = attention.train()(x, packing, [] if explicit else None).view(copies, *row.shape)
    error = drawn.std(0) / copies**0.5
    assert drawn.std(0).min() > 0.01
    assert float(((drawn.mean(0) - calm) / error).abs().max()) < 5.0


@pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_training_with_dropout_on_padded_batches_gives_finite_gradients(name, pattern, explicit):
    ours, _ = pair(name, torch.float32, attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2)
    inputs = {**inputs_of(name, pattern), **labels_of(name)}
    mask = inputs["attention_mask"].view(-1, S)
    outputs = ours.train()(**inputs, output_attentions=explicit)
    scalar_of(outputs, mask).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


# Full size.


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        ("BertModel", {}, 109_482_240),
        ("BertForMaskedLM", {}, 109_514_298),
        ("BertForPreTraining", {}, 110_106_428),
        ("BertModel", {"vocab_size": 21128}, 102_267_648),
    ],
)
def test_parameter_counts_at_full_size(name, config, count):
    model = getattr(bert, name)(bert.BertConfig(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not list(model.buffers())


def test_bert_base_in_float32_equals_transformers():
    with torch.device("meta"):
        theirs = transformers.BertModel(their_config())
    theirs.to_empty(device="cpu")
    theirs.embeddings.position_ids = torch.arange(512)[None]
    theirs.embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.long)
    randomise(theirs.eval(), 15, std=0.04)
    ours = ours_as(theirs, "BertModel")
    ids = torch.randint(0, 30522, (2, 16), generator=generator(16))
    mask = mask_of("right", 4, 16)[[0, 3]]
    with torch.no_grad():
        expected, got = theirs(ids, mask), ours(ids, mask)
    assert expected.last_hidden_state[0].std() > 0.5
    assert distance(got.last_hidden_state[mask.bool()], expected.last_hidden_state[mask.bool()]) <= 2e-5
    assert distance(got.pooler_output, expected.pooler_output) <= 2e-5


# What a user does with a module.


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_pickle_give_an_equal_and_separate_model(name):
    ours, _ = pair(name)
    inputs = inputs_of(name, "right")
    place = 0 if name == "BertModel" else 1
    with torch.no_grad():
        before = ours(**inputs)[place]
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(twin(**inputs)[place], before)
            assert twin.config == ours.config
            randomise(twin, 17)
            assert distance(twin(**inputs)[place], before) > 1e-3
            assert torch.equal(ours(**inputs)[place], before)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip_is_strict(name):
    ours, _ = pair(name)
    other, _ = pair(name, seed=18)
    inputs = inputs_of(name, "left")
    place = 0 if name == "BertModel" else 1
    with torch.no_grad():
        assert distance(other(**inputs)[place], ours(**inputs)[place]) > 1e-3
        other.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(other(**inputs)[place], ours(**inputs)[place])
    state = ours.state_dict()
    assert state.keys() == dict(ours.named_parameters()).keys()
    state.pop("embeddings.norm.bias" if name == "BertModel" else "transformer.embeddings.norm.bias")
    with pytest.raises(RuntimeError, match=r"embeddings\.norm\.bias"):
        other.load_state_dict(state, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_to_dtype_moves_every_output(name, dtype):
    ours, _ = pair(name)
    ours.to(dtype)
    outputs = ours(**inputs_of(name, "right"), output_hidden_states=True, output_attentions=True)
    tensors = [t for t in outputs if isinstance(t, torch.Tensor)] + [*outputs.hidden_states, *outputs.attentions]
    assert {t.dtype for t in tensors} == {dtype}


def test_output_matrix_is_the_word_table_itself():
    ours, _ = pair("BertForMaskedLM")
    shapes = [tuple(p.shape) for p in ours.parameters()]
    assert shapes.count((V, D)) == 1
    with torch.no_grad():
        inputs = inputs_of("BertForMaskedLM", "none")
        before = ours(**inputs).logits
        unused = 5
        inputs["input_ids"][inputs["input_ids"] == unused] = 6
        before = ours(**inputs).logits
        ours.transformer.embeddings.word.weight[unused] += 1.0
        after = ours(**inputs).logits
    others = torch.arange(V) != unused
    assert torch.equal(after[:, :, others], before[:, :, others])
    assert distance(after[:, :, unused], before[:, :, unused]) > 1e-3


def frames_of_ours():
    """Code names of the stack's frames that stand in the package, innermost first."""
    root, found, frame = str(Path(hubmodels.__file__).parent), [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(root):
            found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


@pytest.mark.parametrize("pattern", ["none", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_at_most_six_frames_from_the_call_to_the_kernel(name, pattern, monkeypatch):
    ours, _ = pair(name)
    stacks = []

    def spied(kernel):
        def spy(*args, **kwargs):
            stacks.append(frames_of_ours())
            return kernel(*args, **kwargs)

        return spy

    monkeypatch.setattr(kernels, "_FLASH", spied(kernels._FLASH))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied(F.scaled_dot_product_attention))
    with torch.no_grad():
        ours(**inputs_of(name, pattern))
    assert len(stacks) >= LAYERS
    assert max(map(len, stacks)) <= 6, stacks[0]
    assert all("attend" in stack for stack in stacks)
    assert any("ragged_attention" in name for stack in stacks for name in stack) == (pattern == "right")


@pytest.mark.parametrize("name", NAMES)
def test_building_draws_no_random_number(name):
    before = torch.get_rng_state()
    getattr(bert, name)(bert.BertConfig(**SIZES))
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_of_the_tiny_models_are_pairwise_distinct():
    sizes = [B, S, D, H, D // H, V, INNER, LAYERS, POSITIONS, rows_of("BertForMultipleChoice")[1]]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("asked", [False, True])
def test_a_layers_states_live_on_only_if_they_are_asked_for(asked):
    """Otherwise a forward without gradients would hold every layer's [T, D] to its end."""
    ours, _ = pair("BertModel")
    first, alive = [], []
    hooks = [
        ours.layers[0].register_forward_hook(lambda _, __, states: first.append(weakref.ref(states))),
        ours.layers[-1].register_forward_hook(lambda *_: alive.append(first[0]() is not None)),
    ]
    with torch.no_grad():
        ours(**inputs_of("BertModel", "right"), output_hidden_states=asked)
    for hook in hooks:
        hook.remove()
    assert alive == [asked]


@pytest.mark.parametrize("case", ["inference", "gradients", "train", "hook", "states", "attentions"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_large_batch_goes_through_in_parts_if_nobody_sees_it(pattern, case, monkeypatch):
    ours, _ = pair("BertModel")
    ours.train(case == "train")
    given = inputs_of("BertModel", pattern)
    asked = {"states": {"output_hidden_states": True}, "attentions": {"output_attentions": True}}.get(case, {})
    with torch.no_grad():
        whole = ours(**given, **asked)
    tokens, real = [], PostNormBlock.forward
    monkeypatch.setattr(PostNormBlock, "forward", lambda self, x, *rest: tokens.append(len(x)) or real(self, x, *rest))
    monkeypatch.setattr(transformer, "_AT_ONCE", 2 * S * 4 * D * 8)  # bytes of two full rows in float64
    if case == "hook":
        ours.layers[0].feed_forward.register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(case == "gradients"):
        parted = ours(**given, **asked)
    total = int(given["attention_mask"].sum())
    assert sum(tokens) == LAYERS * total
    assert (len(tokens) > LAYERS) == (case == "inference" and total > 2 * S)
    assert max(tokens) <= (2 * S if case == "inference" else B * S)
    if case != "train":
        assert distance(parted.last_hidden_state, whole.last_hidden_state) <= EXACT
        assert distance(parted.pooler_output, whole.pooler_output) <= EXACT
