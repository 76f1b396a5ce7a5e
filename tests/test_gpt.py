"""The native GPT and GPT-2 against transformers, their files and configs, and what a user does with the modules."""

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from gpt_reference import (
    DOUBLE,
    GPT2_NAMES,
    LANGUAGE_MODELS,
    NAMES,
    OURS,
    SIZES,
    VARIANTS,
    call,
    choice_loss,
    family_of,
    gradients,
    gradients_as_theirs,
    inputs_of,
    is_gpt2,
    labels_of,
    last_tokens,
    next_word_loss,
    ours_as,
    pair,
    randomise,
    rows_of,
)
from held import HeldTensor
from reference import CHOICES, INNER, LAYERS, PATTERNS, POSITIONS, B, D, H, S, V, distance, generator, mask_of

import hubmodels
from hubmodels import kernels
from hubmodels.errors import CheckpointError, ConfigError, InputError
from hubmodels.families.gpt import Gpt, GptConfig, GptDoubleHeads, GptModel
from hubmodels.families.gpt2 import Gpt2, Gpt2Config, Gpt2Model

pytestmark = pytest.mark.usefixtures("one_thread")

transformers.logging.disable_progress_bar()
EXACT = 1e-10  # float64
BASES = ("OpenAIGPTModel", "GPT2Model")
EXPLICIT = pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "explicit"])
EVERY_VARIANT = [(name, {}) for name in NAMES] + [("GPT2LMHeadModel", variant) for variant in VARIANTS[1:]]


def variant_id(value):
    return "-".join(value) or "plain" if isinstance(value, dict) else None


def result_of(outputs):
    """[..., S, D or V], what the class is for"""
    return outputs.last_hidden_state if hasattr(outputs, "last_hidden_state") else outputs.logits


def assert_equal_outputs(got, expected, mask, tolerance):
    """Equal where tokens are, zeros at padding; the choice between candidates equal too."""
    ours, theirs = result_of(got), result_of(expected)
    assert ours.shape == theirs.shape
    assert not ours[mask == 0].any()
    assert distance(ours[mask != 0], theirs[mask != 0]) <= tolerance
    if hasattr(got, "mc_logits"):
        assert distance(got.mc_logits, expected.mc_logits) <= tolerance


def scalar_of(outputs, mask, labels):
    """The loss by hand from the logits; of a bare decoder a random projection of its states."""
    if not labels:
        states = outputs.last_hidden_state
        return (states * torch.randn(states.shape, generator=generator(5), dtype=states.dtype) * mask[..., None]).sum()
    loss = next_word_loss(outputs.logits, labels["labels"], mask)
    return loss + 0.5 * choice_loss(outputs.mc_logits, labels["mc_labels"]) if "mc_labels" in labels else loss


def our_scalar_of(outputs, mask, labels):
    """The same from the losses that our classes compute."""
    if not labels:
        return scalar_of(outputs, mask, labels)
    return outputs.loss + 0.5 * outputs.mc_loss if "mc_labels" in labels else outputs.loss


def assert_equal_gradients(ours, theirs, name):
    got, expected = gradients_as_theirs(ours, name), gradients(theirs)
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        assert distance(gradient, expected[key]) <= EXACT, key


# Equality with transformers


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("name", "variant"), EVERY_VARIANT, ids=variant_id)
def test_outputs_equal_transformers(name, variant, pattern):
    ours, theirs = pair(name, **variant)
    inputs = inputs_of(name, pattern)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = call(theirs, name, **inputs, output_hidden_states=True, output_attentions=True)
        assert_equal_outputs(ours(**inputs), expected, mask, EXACT)
        got = ours(**inputs, output_hidden_states=True, output_attentions=True)
    assert_equal_outputs(got, expected, mask, EXACT)
    real = mask.flatten(0, -2).bool()
    assert len(got.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for ours_state, their_state in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert not ours_state[~real].any()
        assert distance(ours_state[real], their_state.reshape(*real.shape, D)[real]) <= EXACT
    assert len(got.attentions) == len(expected.attentions) == LAYERS
    for ours_weights, their_weights in zip(got.attentions, expected.attentions, strict=True):
        assert ours_weights.shape == (len(real), H, S, S)
        assert not ours_weights.triu(1).any()
        by_row = ours_weights.transpose(1, 2)  # [B, S, H, S]
        assert not by_row[~real].any()
        assert not ours_weights.permute(0, 3, 1, 2)[~real].any()
        assert distance(by_row[real].sum(-1), torch.ones(int(real.sum()), H)) <= EXACT
        assert distance(by_row[real], their_weights.transpose(1, 2)[real]) <= EXACT


@EXPLICIT
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("name", "variant"), EVERY_VARIANT, ids=variant_id)
def test_loss_and_gradients_equal_transformers(name, variant, pattern, explicit):
    ours, theirs = pair(name, **variant)
    inputs, labels = inputs_of(name, pattern), labels_of(name)
    mask = inputs["attention_mask"]
    loss = our_scalar_of(ours(**inputs, **labels, output_attentions=explicit), mask, labels)
    loss.backward()
    expected = scalar_of(call(theirs, name, **inputs), mask, labels)
    expected.backward()
    assert distance(loss, expected) <= EXACT
    assert_equal_gradients(ours, theirs, name)
    if pattern != "all_but_one" or name not in LANGUAGE_MODELS:  # where nothing is left to foresee
        assert max(gradient.abs().max() for gradient in gradients(theirs).values()) > 1e-3


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_loss_without_padding_is_the_references_own(name):
    ours, theirs = pair(name)
    ids, labels = inputs_of(name, "none")["input_ids"], labels_of(name)["labels"]
    with torch.no_grad():
        expected = theirs(ids, labels=labels).loss
        assert distance(ours(ids, labels=labels).loss, expected) <= 1e-5  # it is float32's
        assert float(expected) > 1


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_label_at_padding_and_the_first_tokens_label_count_as_none(name):
    ours, _ = pair(name)
    inputs = inputs_of(name, "left")
    mask = inputs["attention_mask"].bool()
    labels = inputs["input_ids"]
    first = mask & (mask.cumsum(1) == 1)
    with torch.no_grad():
        loss = ours(**inputs, labels=labels).loss
        assert torch.equal(ours(**inputs, labels=labels.masked_fill(~mask | first, -100)).loss, loss)
        second = mask & (mask.cumsum(1) == 2)
        assert distance(ours(**inputs, labels=labels.masked_fill(second, -100)).loss, loss) > 1e-3


@pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "explicit"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_token_sees_only_what_stands_before_it(name, explicit):
    ours, _ = pair(name)
    ids = inputs_of(name, "none")["input_ids"]
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % V
    with torch.no_grad():
        before, after = (ours(x, output_attentions=explicit).logits for x in (ids, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("rows", [B, 1], ids=["a row each", "one for all"])
@pytest.mark.parametrize("pattern", ["none", "interleaved"])
@pytest.mark.parametrize("name", BASES + LANGUAGE_MODELS)
def test_position_ids_equal_transformers(name, pattern, rows):
    ours, theirs = pair(name)
    inputs = inputs_of(name, pattern)
    positions = torch.randint(0, POSITIONS, (rows, S), generator=generator(8))
    with torch.no_grad():
        got = ours(**inputs, position_ids=positions)
        expected = call(theirs, name, **inputs, position_ids=positions)
        assert_equal_outputs(got, expected, inputs["attention_mask"], EXACT)
        assert distance(result_of(got), result_of(ours(**inputs))) > 0.1


def test_position_ids_of_candidates_equal_transformers():
    ours, theirs = pair(DOUBLE)
    inputs = inputs_of(DOUBLE, "left")
    inputs["position_ids"] = torch.randint(0, POSITIONS, (B, CHOICES, S), generator=generator(8))
    with torch.no_grad():
        assert_equal_outputs(ours(**inputs), call(theirs, DOUBLE, **inputs), inputs["attention_mask"], EXACT)


@pytest.mark.parametrize("pattern", ["none", "right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_token_types_are_one_more_word(name, pattern):
    ours, theirs = pair(name)
    inputs = inputs_of(name, pattern)
    types = torch.randint(0, V, (*rows_of(name), S), generator=generator(9))
    mask = inputs["attention_mask"]
    got = ours(**inputs, token_type_ids=types)
    expected = call(theirs, name, **inputs, token_type_ids=types)
    assert_equal_outputs(got, expected, mask, EXACT)
    assert distance(result_of(got), result_of(ours(**inputs))) > 0.1
    (result_of(got) * mask[..., None]).square().sum().backward()
    (result_of(expected) * mask[..., None]).square().sum().backward()
    their_gradients = gradients(theirs)
    for key, gradient in gradients_as_theirs(ours, name).items():
        scale = max(1.0, float(their_gradients[key].abs().max()))
        assert distance(gradient, their_gradients[key]) <= EXACT * scale, key


@pytest.mark.parametrize("name", BASES + LANGUAGE_MODELS)
def test_one_row_of_token_types_serves_all_as_in_transformers(name):
    ours, theirs = pair(name)
    inputs = inputs_of(name, "right")
    inputs["token_type_ids"] = torch.randint(0, V, (1, S), generator=generator(9))
    with torch.no_grad():
        assert_equal_outputs(ours(**inputs), call(theirs, name, **inputs), inputs["attention_mask"], EXACT)


@pytest.mark.parametrize("pattern", ["none", "left"])
@pytest.mark.parametrize("name", BASES + LANGUAGE_MODELS)
def test_inputs_embeds_equal_transformers(name, pattern):
    ours, theirs = pair(name)
    inputs, labels = inputs_of(name, pattern), labels_of(name)
    del inputs["input_ids"]
    mask = inputs["attention_mask"]
    vectors = [torch.randn(B, S, D, generator=generator(10)).double().requires_grad_() for _ in range(2)]
    got = ours(**inputs, **labels, inputs_embeds=vectors[0])
    expected = call(theirs, name, **inputs, inputs_embeds=vectors[1])
    assert_equal_outputs(got, expected, mask, EXACT)
    our_scalar_of(got, mask, labels).backward()
    scalar_of(expected, mask, labels).backward()
    assert distance(vectors[0].grad, vectors[1].grad) <= EXACT
    assert vectors[0].grad.abs().max() > 1e-3


def test_inputs_embeds_of_candidates_equal_their_ids():
    ours, _ = pair(DOUBLE)
    inputs = inputs_of(DOUBLE, "right")
    with torch.no_grad():
        by_ids = ours(**inputs)
        vectors = ours.transformer.embeddings.word(inputs.pop("input_ids"))
        by_vectors = ours(**inputs, inputs_embeds=vectors)
    assert torch.equal(by_ids.logits, by_vectors.logits)
    assert torch.equal(by_ids.mc_logits, by_vectors.mc_logits)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "swish"])
def test_gpt_activations_equal_transformers(activation):
    ours, theirs = pair("OpenAIGPTLMHeadModel", afn=activation)
    inputs = inputs_of("OpenAIGPTLMHeadModel", "right")
    with torch.no_grad():
        assert_equal_outputs(ours(**inputs), theirs(**inputs), inputs["attention_mask"], EXACT)


def test_what_gpt_calls_gelu_is_the_tanh_form():
    ours, theirs = pair("OpenAIGPTLMHeadModel")
    assert theirs.config.afn == "gelu"
    assert ours.config.hidden_act == "gelu_new"
    inputs = inputs_of("OpenAIGPTLMHeadModel", "none")
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert distance(ours(**inputs).logits, expected) <= EXACT
        for layer in ours.transformer.layers:
            layer.feed_forward.activation = "gelu"  # erf
        assert 1e-5 < distance(ours(**inputs).logits, expected) < 0.1


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_gpt2_activations_equal_transformers(activation):
    ours, theirs = pair("GPT2LMHeadModel", activation_function=activation)
    inputs = inputs_of("GPT2LMHeadModel", "right")
    with torch.no_grad():
        assert_equal_outputs(ours(**inputs), theirs(**inputs), inputs["attention_mask"], EXACT)
        for other in {"gelu", "gelu_new", "relu", "silu"} - {activation}:
            wrong = ours_as(theirs, "GPT2LMHeadModel", activation_function=other)
            assert distance(wrong(**inputs).logits, ours(**inputs).logits) > 1e-5


@pytest.mark.parametrize("change", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_each_scale_option_changes_the_result(change):
    ours, theirs = pair("GPT2LMHeadModel")
    inputs = inputs_of("GPT2LMHeadModel", "none")
    with torch.no_grad():
        wrong = ours_as(theirs, "GPT2LMHeadModel", **change)
        assert distance(wrong(**inputs).logits, ours(**inputs).logits) > 1e-3


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_wrong_layer_norm_eps_is_seen(name):
    ours, theirs = pair(name, layer_norm_epsilon=1e-3)
    wrong = ours_as(theirs, name, layer_norm_epsilon=1e-5)
    inputs = inputs_of(name, "none")
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert distance(ours(**inputs).logits, expected) <= EXACT
        assert distance(wrong(**inputs).logits, expected) > 1e-6


@pytest.mark.parametrize("pattern", ["none", "interleaved"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_transformers(name, pattern):
    ours, theirs = pair(name, torch.float32)
    inputs = inputs_of(name, pattern)
    with torch.no_grad():
        expected = call(theirs, name, **inputs)
        assert_equal_outputs(ours(**inputs), expected, inputs["attention_mask"], 2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.4), (torch.float16, 0.05)])
@pytest.mark.parametrize("pattern", ["none", "right"])
@pytest.mark.parametrize("name", BASES)
def test_half_precision_is_near_float64_and_no_farther_than_transformers(name, dtype, tolerance, pattern):
    inputs = inputs_of(name, pattern)
    real = inputs["attention_mask"].bool()
    ours, theirs = pair(name, dtype)
    with torch.no_grad():
        exact = call(theirs.double(), name, **inputs).last_hidden_state[real]
        got = ours(**inputs).last_hidden_state
        rival = call(theirs.to(dtype), name, **inputs).last_hidden_state
    assert got.dtype == dtype
    assert distance(got[real], exact) <= tolerance * float(exact.abs().max())
    assert (got[real] - exact).abs().mean() <= 1.5 * (rival[real] - exact).abs().mean()


# Masks of pairs


def pairs_mask():
    """[B, S, S] bool, not symmetric; every token may look at itself."""
    return (torch.rand(B, S, S, generator=generator(6)) < 0.5) | torch.eye(S, dtype=torch.bool)


@EXPLICIT
def test_mask_of_pairs_equals_transformers_and_stays_causal(explicit):
    ours, theirs = pair("GPT2LMHeadModel")
    ids, mask = inputs_of("GPT2LMHeadModel", "none")["input_ids"], pairs_mask()
    seen = mask & torch.ones(S, S, dtype=torch.bool).tril()
    additive = torch.zeros(B, 1, S, S).double().masked_fill(~seen[:, None], torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=additive, output_attentions=True)
        got = ours(ids, mask.long(), output_attentions=explicit)
    assert distance(got.logits, expected.logits) <= EXACT
    if explicit:
        assert not got.attentions[0].masked_select(~seen[:, None]).any()
        assert max(map(distance, got.attentions, expected.attentions)) <= EXACT


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_mask_of_pairs_that_hides_padding_equals_the_mask_of_tokens(name):
    ours, _ = pair(name)
    inputs, labels = inputs_of(name, "right"), labels_of(name)["labels"]
    mask = inputs.pop("attention_mask")
    with torch.no_grad():
        packed = ours(**inputs, attention_mask=mask)
        pairwise = ours(**inputs, attention_mask=mask[:, None, :].expand(B, S, S))
        assert distance(packed.logits[mask.bool()], pairwise.logits[mask.bool()]) <= EXACT
        whole = ours(**inputs, attention_mask=torch.ones(B, S, S), labels=labels).loss
        assert distance(whole, ours(**inputs, labels=labels).loss) <= EXACT


# The cache

CHUNKS = ((0, 4), (4, 5), (5, 8), (8, 9))


def in_chunks(model, inputs, chunks=CHUNKS, **options):
    """What each chunk's forward gives, on one cache with room for all."""
    cache = model.transformer.new_cache(B, S) if hasattr(model, "transformer") else model.new_cache(B, S)
    given = {key: x for key, x in inputs.items() if x is not None}
    parts = [model(**{k: x[:, lo:hi] for k, x in given.items()}, cache=cache, **options) for lo, hi in chunks]
    assert cache.length == S
    return parts


@EXPLICIT
@pytest.mark.parametrize("pattern", [None, *PATTERNS])
@pytest.mark.parametrize(("name", "variant"), [*[(n, {}) for n in BASES + LANGUAGE_MODELS], EVERY_VARIANT[-1]])
def test_cached_in_chunks_equals_at_once_and_transformers(name, variant, pattern, explicit):
    ours, theirs = pair(name, **variant)
    inputs = inputs_of(name, pattern or "none")
    mask = inputs["attention_mask"]
    if pattern is None:
        del inputs["attention_mask"]
    options = {"output_hidden_states": True, "output_attentions": True} if explicit else {}
    with torch.no_grad():
        parts = in_chunks(ours, inputs, **options)
        at_once = ours(**inputs, **options)
        expected = call(theirs, name, **inputs)
    joined = torch.cat([result_of(part) for part in parts], 1)
    assert distance(joined, result_of(at_once)) <= EXACT
    real = mask.bool()
    assert distance(joined[real], result_of(expected)[real]) <= EXACT
    if not explicit:
        return
    for layer in range(LAYERS + 1):
        states = torch.cat([part.hidden_states[layer] for part in parts], 1)
        assert distance(states, at_once.hidden_states[layer]) <= EXACT
    for layer in range(LAYERS):
        for (low, high), part in zip(CHUNKS, parts, strict=True):
            weights = part.attentions[layer]
            assert weights.shape == (B, H, high - low, high)
            assert distance(weights, at_once.attentions[layer][:, :, low:high, :high]) <= EXACT


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_companions_of_a_chunk_go_with_it(name):
    """Positions, token types and vectors are those of the new columns, as the mask is."""
    ours, _ = pair(name)
    inputs = inputs_of(name, "left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs["token_type_ids"] = torch.randint(0, V, (B, S), generator=generator(9))
    with torch.no_grad():
        expected = ours(**inputs).logits
        assert distance(torch.cat([part.logits for part in in_chunks(ours, inputs)], 1), expected) <= EXACT
        inputs["inputs_embeds"] = ours.transformer.embeddings.word(inputs.pop("input_ids"))
        assert distance(torch.cat([part.logits for part in in_chunks(ours, inputs)], 1), expected) <= EXACT


@pytest.mark.parametrize("begins", ["without a mask", "with a mask"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_mask_may_be_given_for_some_chunks_only(name, begins):
    ours, _ = pair(name)
    ids, mask = inputs_of(name, "none")["input_ids"], torch.ones(B, S, dtype=torch.long)
    padded = slice(0, 4) if begins == "with a mask" else slice(4, 7)
    mask[1:3, padded] = 0
    mask[3, padded.start] = 0
    cache = ours.transformer.new_cache(B, S)
    parts = []
    with torch.no_grad():
        for low, high in ((0, 4), (4, 7), (7, 8), (8, 9)):
            part = mask[:, low:high] if low == padded.start else None
            parts.append(ours(ids[:, low:high], part, cache=cache).logits)
        assert distance(torch.cat(parts, 1), ours(ids, mask).logits) <= EXACT


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_float32_cached_equals_at_once_at_a_larger_size(name):
    ours, _ = pair(name, torch.float32, std=0.05, n_embd=192, n_head=6, n_layer=5, n_positions=80, vocab_size=503)
    ids = torch.randint(0, 503, (2, 70), generator=generator(11))
    mask = mask_of("left", 8, 70)[[0, 7]]
    for given in (None, mask):
        cache = ours.transformer.new_cache(2, 70)
        with torch.no_grad():
            parts = [ours(ids[:, :50], None if given is None else given[:, :50], cache=cache).logits]
            parts += [ours(ids[:, at : at + 1], cache=cache).logits for at in range(50, 70)]
            at_once = ours(ids, given).logits
        assert at_once.abs().max() > 0.5
        assert distance(torch.cat(parts, 1), at_once) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_half_precision_cached_is_near_at_once(name, dtype):
    ours, _ = pair(name, dtype)
    inputs = inputs_of(name, "left")
    cache = ours.transformer.new_cache(B, S)
    assert {part.dtype for part in cache.keys + cache.values} == {torch.float32}
    with torch.no_grad():
        joined = torch.cat([part.logits for part in in_chunks(ours, inputs)], 1)
        at_once = ours(**inputs).logits
    assert joined.dtype == dtype
    assert distance(joined, at_once) <= 0.05 * float(at_once.abs().max())


def test_rows_of_a_cache_can_be_taken_in_another_order():
    ours, _ = pair("GPT2LMHeadModel")
    inputs = inputs_of("GPT2LMHeadModel", "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = torch.tensor([4, 0, 0, 2])
    cache = ours.transformer.new_cache(B, S)
    with torch.no_grad():
        ours(ids[:, :6], mask[:, :6], cache=cache)
        cache.select(rows)
        got = ours(ids[rows, 6:], mask[rows, 6:], cache=cache).logits
        assert distance(got, ours(ids, mask).logits[rows, 6:]) <= EXACT


def test_a_failed_forward_leaves_the_cache_as_it_was():
    ours, _ = pair("GPT2LMHeadModel")
    inputs = inputs_of("GPT2LMHeadModel", "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = ours.transformer.new_cache(B, S)
    broken = ours.transformer.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            ours(ids[:, :4], 1 - mask[:, :4], cache=cache)
        broken.remove()
        with pytest.raises(InputError, match="input_ids: 67 is out of range"):
            ours(torch.full((B, 4), V), cache=cache)
        assert cache.length == 0
        ours(ids[:, :4], mask[:, :4], cache=cache)
        with pytest.raises(InputError, match="at most 5 more tokens"):
            ours(ids[:, :6], cache=cache)
        assert cache.length == 4
        got = ours(ids[:, 4:], mask[:, 4:], cache=cache).logits
        assert distance(got, ours(ids, mask).logits[:, 4:]) <= EXACT


def test_what_a_cache_cannot_take_is_refused():
    ours, _ = pair("OpenAIGPTLMHeadModel")
    ids = inputs_of("OpenAIGPTLMHeadModel", "none")["input_ids"]
    cache = ours.transformer.new_cache(B, 40)  # more room than there are positions
    for bad in ({"input_ids": ids[:2]}, {"input_ids": ids, "attention_mask": torch.ones(B, S, S)}):
        with pytest.raises(InputError, match="cache: it has room for 5 rows of 40 tokens and holds 0"):
            ours(**bad, cache=cache)
    ours(ids, cache=cache)
    with pytest.raises(InputError, match="18 tokens in a row, 9 of them in the cache, but this model has positions"):
        ours(ids, cache=cache)
    with pytest.raises(InputError, match=r"attention_mask: expected shape \(5, 2\)"):
        ours(ids[:, :2], torch.ones(B, S + 2), cache=cache)  # the new columns' mask, not the whole row's
    ours.train().gradient_checkpointing = True
    with pytest.raises(InputError, match="gradient_checkpointing would fill it twice"):
        ours(ids[:, :2], cache=cache)


# Two heads


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_deciding_token_may_be_given(pattern):
    ours, theirs = pair(DOUBLE)
    inputs, labels = inputs_of(DOUBLE, pattern), labels_of(DOUBLE)
    mask = inputs["attention_mask"]
    deciding = mask.argmax(-1)  # each candidate's first token
    if pattern == "none":
        deciding = torch.randint(0, S, (B, CHOICES), generator=generator(12))
    out = ours(**inputs, **labels, mc_token_ids=deciding)
    expected = call(theirs, DOUBLE, **inputs, mc_token_ids=deciding)
    assert distance(out.mc_logits, expected.mc_logits) <= EXACT
    assert distance(out.mc_loss, choice_loss(expected.mc_logits, labels["mc_labels"])) <= EXACT
    out.mc_loss.backward()
    choice_loss(expected.mc_logits, labels["mc_labels"]).backward()
    assert_equal_gradients(ours, theirs, DOUBLE)
    last = ours(**inputs, mc_token_ids=last_tokens(mask)).mc_logits
    assert distance(last, ours(**inputs).mc_logits) <= EXACT  # as not given
    if pattern != "all_but_one":
        assert distance(last, out.mc_logits) > 1e-2


def test_the_two_losses_come_apart():
    ours, _ = pair(DOUBLE)
    inputs, labels = inputs_of(DOUBLE, "right"), labels_of(DOUBLE)
    with torch.no_grad():
        both = ours(**inputs, **labels)
        words = ours(**inputs, labels=labels["labels"])
        choice = ours(**inputs, mc_labels=labels["mc_labels"])
        neither = ours(**inputs)
    assert (words.mc_loss, choice.loss, neither.loss, neither.mc_loss) == (None,) * 4
    assert torch.equal(both.loss, words.loss)
    assert torch.equal(both.mc_loss, choice.mc_loss)
    assert both.logits.shape == (B, CHOICES, S, V)
    assert both.mc_logits.shape == (B, CHOICES)


def test_a_candidate_is_a_row_of_its_own():
    ours, theirs = pair(DOUBLE)
    inputs = inputs_of(DOUBLE, "interleaved")
    words = ours_as(transplant(theirs), "OpenAIGPTLMHeadModel")
    with torch.no_grad():
        got = ours(**inputs, output_hidden_states=True, output_attentions=True)
        flat = words(*(inputs[key].flatten(0, 1) for key in ("input_ids", "attention_mask")), output_hidden_states=True)
    assert distance(got.logits.flatten(0, 1), flat.logits) <= EXACT
    assert max(map(distance, got.hidden_states, flat.hidden_states)) <= EXACT
    assert {weights.shape for weights in got.attentions} == {(B * CHOICES, H, S, S)}


def transplant(theirs):
    """A language model on the decoder of a model with two heads."""
    model = transformers.OpenAIGPTLMHeadModel(theirs.config).double().eval()
    model.transformer.load_state_dict(theirs.transformer.state_dict())
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(B, S, dtype=torch.long)}, r"expected ids \[batch, choices, length\]"),
        ({"mc_token_ids": torch.zeros(B, dtype=torch.long)}, r"mc_token_ids: expected shape \(5, 8\), got \(5,\)"),
        ({"mc_token_ids": torch.full((B, CHOICES), S)}, "mc_token_ids: 9 is out of range; a row has 9 entries"),
        ({"mc_token_ids": torch.full((B, CHOICES), -1)}, "mc_token_ids: -1 is out of range"),
        ({"labels": torch.zeros(B, S, dtype=torch.long)}, r"labels: expected shape \(5, 8, 9\), got \(5, 9\)"),
        ({"mc_labels": torch.zeros(B, CHOICES).long()}, r"mc_labels: expected shape \(5,\), got \(5, 8\)"),
        ({"mc_labels": torch.full((B,), CHOICES)}, "labels: 8 is out of range; the head has 8 entries"),
    ],
)
def test_what_two_heads_cannot_take_is_refused(change, message):
    ours, _ = pair(DOUBLE)
    inputs = {"input_ids": inputs_of(DOUBLE, "none")["input_ids"], **change}
    with pytest.raises(InputError, match=message):
        ours(**inputs)


# Rows


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbours(name, pattern):
    ours, _ = pair(name)
    inputs = inputs_of(name, pattern)
    with torch.no_grad():
        together = ours(**inputs)
        for row in range(B):
            alone = ours(**{key: x[row : row + 1] for key, x in inputs.items()})
            assert distance(result_of(alone)[0], result_of(together)[row]) <= EXACT
            if name == DOUBLE:
                assert distance(alone.mc_logits[0], together.mc_logits[row]) <= EXACT


@EXPLICIT
@pytest.mark.parametrize("pattern", PATTERNS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_padding_has_no_effect(name, pattern, explicit):
    ours, _ = pair(name)
    inputs, labels = inputs_of(name, pattern), labels_of(name)
    padding = inputs["attention_mask"] == 0
    results = []
    for shift in (0, 11):
        given = {**inputs, "input_ids": torch.where(padding, (inputs["input_ids"] + shift) % V, inputs["input_ids"])}
        out = ours(**given, **labels, output_attentions=explicit)
        results.append((result_of(out), our_scalar_of(out, inputs["attention_mask"], labels)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@EXPLICIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_padding_makes_no_nan(name, dtype, explicit):
    ours, _ = pair(name, dtype)
    inputs, labels = inputs_of(name, "right"), labels_of(name)
    inputs["attention_mask"][2] = 0
    outputs = ours(**inputs, **labels, output_attentions=explicit, output_hidden_states=True)
    assert result_of(outputs).isfinite().all()
    assert all(state.isfinite().all() for state in outputs.hidden_states)
    loss = our_scalar_of(outputs, inputs["attention_mask"], labels)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@EXPLICIT
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_nothing_but_padding_makes_no_nan(name, explicit):
    ours, _ = pair(name, torch.float32)
    inputs, labels = inputs_of(name, "right"), labels_of(name)
    mask = torch.zeros_like(inputs["attention_mask"])
    outputs = ours(inputs["input_ids"], mask, **labels, output_attentions=explicit)
    assert not result_of(outputs).any()
    loss = our_scalar_of(outputs, mask, labels)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize(("rows", "length"), [(0, S), (0, 1), (B, 0), (0, 0), (1, 1), (B, 1)])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_batch_in_which_nothing_is_foreseen_has_a_loss_of_zero(name, rows, length, masked):
    ours, _ = pair(name)
    ids = inputs_of(name, "none")["input_ids"][:rows, :length]
    outputs = ours(ids, torch.ones_like(ids) if masked else None, labels=ids)
    assert outputs.logits.shape == (rows, length, V)
    assert float(outputs.loss.detach()) == 0.0
    outputs.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_no_label_at_all_is_a_loss_of_zero(name):
    ours, _ = pair(name)
    loss = ours(**inputs_of(name, "right"), labels=torch.full((B, S), -100)).loss
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_one_layer_and_views_of_larger_tensors(name):
    ours, theirs = pair(name, n_layer=1)
    wide = torch.randint(0, V, (S, 2 * B), generator=generator(13))
    ids, mask = wide[:, ::2].T, mask_of("interleaved", B)
    assert not ids.is_contiguous()
    with torch.no_grad():
        expected = call(theirs, name, input_ids=ids.contiguous(), attention_mask=mask)
        assert_equal_outputs(ours(ids, mask.T.contiguous().T), expected, mask, EXACT)
        assert_equal_outputs(ours(ids.int(), mask.bool()), expected, mask, EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.full((B, S), V)}, "input_ids: 67 is out of range; the vocabulary has 67 entries, 0 to 66"),
        (
            {"input_ids": torch.zeros(B, POSITIONS + 1).long()},
            "17 tokens in a row, but this model has positions for 16",
        ),
        ({"input_ids": torch.zeros(S).long()}, r"expected ids \[B, S\] or vectors \[B, S, D\], got shape \(9,\)"),
        ({"token_type_ids": torch.full((B, S), V)}, "token_type_ids: 67 is out of range; the vocabulary"),
        ({"position_ids": torch.full((B, S), POSITIONS)}, "position_ids: 16 is out of range; the position table"),
        ({"labels": torch.full((B, S), V)}, "labels: 67 is out of range; the head has 67 entries"),
        ({"labels": torch.zeros(B, S - 1).long()}, r"labels: expected shape \(5, 9\), got \(5, 8\)"),
        ({"attention_mask": torch.ones(B, S - 1)}, r"attention_mask: expected shape \(5, 9\)"),
        ({"inputs_embeds": torch.zeros(B, S, D).double()}, "not both"),
    ],
)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_a_language_model_cannot_take_is_refused(name, change, message):
    ours, _ = pair(name)
    with pytest.raises(InputError, match=message):
        ours(**{"input_ids": inputs_of(name, "none")["input_ids"], **change})


# Training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_number(name, dropout):
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), dropout)
    ours, _ = pair(name, **rates)
    ours.train()
    inputs, labels = inputs_of(name, "right"), labels_of(name)
    results = []
    for enabled in (False, True):
        ours.gradient_checkpointing = enabled
        ours.zero_grad()
        torch.manual_seed(10)
        loss = our_scalar_of(ours(**inputs, **labels), inputs["attention_mask"], labels)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in ours.parameters()]))
    (loss, plain), (loss_again, again) = results
    assert distance(loss, loss_again) <= EXACT
    assert max(map(distance, plain, again)) <= EXACT


def test_gradient_checkpointing_computes_blocks_twice():
    ours, _ = pair("GPT2LMHeadModel")
    calls = []
    ours.transformer.layers[0].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    for enabled, count in ((False, 1), (True, 2)):
        ours.train().gradient_checkpointing = enabled
        calls.clear()
        ours(**inputs_of("GPT2LMHeadModel", "right"), **labels_of("GPT2LMHeadModel")).loss.backward()
        assert len(calls) == count


@EXPLICIT
@pytest.mark.parametrize("pattern", ["none", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_active_in_training_and_not_in_eval(name, pattern, explicit):
    ours, _ = pair(name, resid_pdrop=0.2, attn_pdrop=0.2, embd_pdrop=0.2)
    inputs = {**inputs_of(name, pattern), "output_attentions": explicit}
    ours.train()
    draws = [result_of(ours(**inputs)) for _ in range(2)]
    torch.manual_seed(11)
    seeded = result_of(ours(**inputs))
    torch.manual_seed(11)
    reseeded = result_of(ours(**inputs))
    ours.eval()
    calm = [result_of(ours(**inputs)) for _ in range(2)]
    assert distance(draws[0], draws[1]) > 1e-3
    assert torch.equal(seeded, reseeded)
    assert torch.equal(calm[0], calm[1])
    assert distance(calm[0], draws[0]) > 1e-3


@pytest.mark.parametrize("field", ["resid_pdrop", "attn_pdrop", "embd_pdrop", "summary_first_dropout"])
def test_each_dropout_field_acts_alone(field):
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    ours, _ = pair(DOUBLE, **{**off, field: 0.4})
    inputs = inputs_of(DOUBLE, "right")
    with torch.no_grad():
        calm = ours(**inputs, output_hidden_states=True)
        drawn = ours.train()(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].flatten(0, 1).bool()
    dropped = bool((drawn.hidden_states[0][real] == 0).any())
    assert dropped == (field == "embd_pdrop")
    assert (distance(calm.logits, drawn.logits) > 1e-3) == (field != "summary_first_dropout")
    assert distance(calm.mc_logits, drawn.mc_logits) > 1e-3


@EXPLICIT
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_training_with_dropout_gives_finite_gradients(name, pattern, explicit):
    ours, _ = pair(name, torch.float32)
    inputs, labels = inputs_of(name, pattern), labels_of(name)
    outputs = ours.train()(**inputs, **labels, output_attentions=explicit)
    our_scalar_of(outputs, inputs["attention_mask"], labels).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


# Full size


@pytest.mark.parametrize(
    ("cls", "config", "count"),
    [
        (GptModel, GptConfig(), 116_534_784),
        (Gpt, GptConfig(), 116_534_784),
        (GptDoubleHeads, GptConfig(), 116_534_784 + 769),
        (Gpt2Model, Gpt2Config(), 124_439_808),
        (Gpt2, Gpt2Config(), 124_439_808),
        (Gpt2, Gpt2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16), 354_823_168),
        (Gpt2, Gpt2Config(hidden_size=1280, num_hidden_layers=36, num_attention_heads=20), 774_030_080),
        (Gpt2, Gpt2Config(hidden_size=1600, num_hidden_layers=48, num_attention_heads=25), 1_557_611_200),
        (Gpt2, Gpt2Config(num_hidden_layers=6), 81_912_576),
    ],
)
def test_parameter_counts_at_full_size(cls, config, count):
    with torch.device("meta"):
        model = cls(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not list(model.buffers())


# config.json

OPENAI_GPT = {
    "afn": "gelu",
    "architectures": ["OpenAIGPTLMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "openai-gpt",
    "n_ctx": 512,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 512,
    "n_special": 0,
    "predict_special_tokens": True,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 40478,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
GPT2_MEDIUM = GPT2 | {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True}
GPT2_XL = GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True}
DISTILGPT2 = GPT2 | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 6}


@pytest.mark.parametrize(
    ("published", "config"),
    [
        (OPENAI_GPT, GptConfig()),
        (GPT2, Gpt2Config()),
        (GPT2_MEDIUM, Gpt2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)),
        (GPT2_XL, Gpt2Config(hidden_size=1600, num_hidden_layers=48, num_attention_heads=25)),
        (DISTILGPT2, Gpt2Config(num_hidden_layers=6)),
    ],
    ids=["openai-gpt", "gpt2", "gpt2-medium", "gpt2-xl", "distilgpt2"],
)
def test_published_configs_are_taken_as_they_are(published, config):
    got = type(config).from_published(published, "config.json")
    assert got == config
    written = json.loads(json.dumps(got.to_published()))
    assert {key: written[key] for key in written.keys() & published.keys()} == {
        key: published[key] for key in written.keys() & published.keys()
    }
    assert type(config).from_published(written, "config.json") == got


EVERY_FIELD = {
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 11,
    "vocab_size": 29,
    "resid_pdrop": 0.11,
    "embd_pdrop": 0.12,
    "attn_pdrop": 0.13,
    "summary_first_dropout": 0.14,
    "initializer_range": 0.15,
    "layer_norm_epsilon": 0.16,
}
EVERY_GPT2_FIELD = EVERY_FIELD | {
    "activation_function": "relu",
    "n_inner": 23,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
}


@pytest.mark.parametrize(
    ("theirs", "config", "fields"),
    [
        (transformers.OpenAIGPTConfig, GptConfig, EVERY_FIELD | {"afn": "silu"}),
        (transformers.GPT2Config, Gpt2Config, EVERY_GPT2_FIELD),
    ],
)
def test_every_field_goes_through_transformers_file_and_back(theirs, config, fields, tmp_path):
    theirs(**fields).save_pretrained(tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    ours = config.from_published(published, "config.json")
    written = ours.to_published()
    assert {key: written[key] for key in fields} == fields
    again = theirs(**written)
    assert {key: getattr(again, key) for key in fields} == fields
    assert config.from_published(again.to_dict(), "config.json") == ours


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_a_gpt_config_is_written_so_that_it_is_read_again(activation):
    config = GptConfig(hidden_act=activation)
    assert GptConfig.from_published(config.to_published(), "x") == config


def test_an_activation_that_gpts_config_cannot_say_is_refused():
    """Its "gelu" is the tanh form: a model with the other one would come back as another model."""
    with pytest.raises(ConfigError, match="hidden_act = 'gelu': implemented are"):
        GptConfig(hidden_act="gelu")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (GptConfig, {"summary_type": "last"}, r"summary_type = 'last' \(implemented: 'cls_index'\)"),
        (GptConfig, {"summary_use_proj": False}, r"summary_use_proj = False \(implemented: True\)"),
        (GptConfig, {"summary_activation": "tanh"}, r"summary_activation = 'tanh' \(implemented: None\)"),
        (GptConfig, {"afn": "erf"}, "hidden_act = 'erf': implemented are "),
        (GptConfig, {"afn": ["gelu"]}, r"hidden_act = \['gelu'\]: expected str"),
        (GptConfig, {"n_inner": 44}, r"n_inner = 44 \(unknown key\)"),
        (GptConfig, {"model_type": "gpt2"}, r"model_type = 'gpt2' \(expected 'openai-gpt'\)"),
        (Gpt2Config, {"add_cross_attention": True}, r"add_cross_attention = True \(implemented: False\)"),
        (
            Gpt2Config,
            {"rope_theta": 1e4},
            r"config.json: not implemented for gpt2: rope_theta = 10000.0 \(unknown",
        ),
        (Gpt2Config, {"afn": "gelu"}, r"afn = 'gelu' \(unknown key\)"),
        (Gpt2Config, {"activation_function": "gelu_fast"}, "hidden_act = 'gelu_fast': implemented are "),
        (Gpt2Config, {"model_type": "openai-gpt"}, r"model_type = 'openai-gpt' \(expected 'gpt2'\)"),
        (Gpt2Config, {"n_head": 7}, "hidden_size = 768: expected a multiple of num_attention_heads = 7"),
        (Gpt2Config, {"n_inner": -44}, "intermediate_size = -44: expected a positive number"),
        (Gpt2Config, {"n_inner": 0}, "intermediate_size = 0: expected a positive number"),
        (Gpt2Config, {"n_positions": 0}, "max_position_embeddings = 0: expected a positive number"),
        (Gpt2Config, {"resid_pdrop": 1.5}, "hidden_dropout_prob = 1.5: expected a probability"),
        (Gpt2Config, {"scale_attn_weights": 1}, "scale_attn_weights = 1: expected bool"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config, change, message):
    published = (OPENAI_GPT if config is GptConfig else GPT2) | change
    with pytest.raises(ConfigError, match=message):
        config.from_published(published, "config.json")


# Names


def wanted_of(model):
    return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def load(name, tensors):
    model = OURS[name](family_of(name).config.from_published(SIZES, "x"))
    held = {key: HeldTensor(tensor) for key, tensor in tensors.items()}
    match = family_of(name).keys.match(held, wanted_of(model), "some/file.bin", model.own_parts)
    match.check_repeats()
    return dict(match), match  # its entries are the account


def tensors_of(theirs):
    """What a state dict saved from `theirs` has, the repeated matrix included."""
    return {key: tensor.clone() for key, tensor in theirs.state_dict().items()}


def old_buffers(name):
    """What files written before transformers 4.30 have besides: the causal triangle, and a masked place's score."""
    triangle = torch.ones(POSITIONS, POSITIONS).tril()[None, None]
    buffers = {f"h.{i}.attn.bias": triangle.bool() if is_gpt2(name) else triangle for i in range(LAYERS)}
    return buffers | ({f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)} if is_gpt2(name) else {})


def assert_accounts(report, keys, wanted):
    """Every key of the file exactly once, every parameter of the model, and nothing else."""
    assert sorted(entry.theirs for entry in report.entries if entry.theirs) == sorted(keys)
    assert {entry.ours for entry in report.entries if entry.ours} == set(wanted)
    assert all(entry.because for entry in report.entries if entry.operation in ("dropped", "new", "tied"))


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["bare", "prefixed"])
@pytest.mark.parametrize("name", NAMES)
def test_names_with_and_without_prefix_and_old_buffers(name, prefix):
    ours, theirs = pair(name)
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors_of(theirs).items()}
    in_decoder = {key: tensor for key, tensor in bare.items() if "head" not in key} | old_buffers(name)
    file = {prefix + key: tensor for key, tensor in in_decoder.items()}
    file |= {key: tensor for key, tensor in bare.items() if "head" in key}
    loaded, report = load(name, file)
    assert loaded.keys() == ours.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in ours.state_dict().items())
    assert_accounts(report, file, loaded)
    operations = {entry.theirs: (entry.operation, entry.because) for entry in report.entries}
    assert operations[f"{prefix}h.1.attn.bias"] == (
        "dropped",
        "it is the triangle of the causal mask, which is computed",
    )
    assert operations[f"{prefix}h.2.attn.c_attn.weight"][0] == "transposed"
    if is_gpt2(name):
        because = "it is the score of a masked place, which is computed"
        assert operations[f"{prefix}h.0.attn.masked_bias"] == ("dropped", because)
    words = prefix + ("wte.weight" if is_gpt2(name) else "tokens_embed.weight")
    if "lm_head.weight" in file:
        assert operations["lm_head.weight"] == ("tied", f"repeats {words}")
        assert file["lm_head.weight"].data_ptr() != file[words].data_ptr()
    else:
        assert name in BASES


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, DOUBLE])
def test_an_output_matrix_of_its_own_is_refused(name):
    file = tensors_of(pair(name)[1])
    file["lm_head.weight"][3, 4] += 1e-3
    with pytest.raises(CheckpointError, match=r"lm_head\.weight should repeat transformer\..* but its values differ"):
        load(name, file)


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, DOUBLE])
def test_an_output_matrix_alone_stands_in_for_the_words(name):
    """transformers 5 saves a model with two heads so."""
    ours, theirs = pair(name)
    file = tensors_of(theirs)
    del file["transformer." + ("wte.weight" if is_gpt2(name) else "tokens_embed.weight")]
    loaded, report = load(name, file)
    assert_accounts(report, file, loaded)
    word = "transformer.embeddings.word.weight"
    assert torch.equal(loaded[word], ours.get_parameter(word))


def test_heads_that_a_model_lacks_are_dropped_with_the_reason():
    file = tensors_of(pair(DOUBLE)[1])
    for name in ("OpenAIGPTModel", "OpenAIGPTLMHeadModel"):
        loaded, report = load(name, file)
        assert_accounts(report, file, loaded)
        dropped = {entry.theirs: entry.because for entry in report.entries if entry.operation == "dropped"}
        assert dropped == {
            f"multiple_choice_head.summary.{part}": "this model has no choice" for part in ("weight", "bias")
        }


def test_what_no_row_knows_and_what_is_missing_is_refused():
    file = tensors_of(pair("GPT2LMHeadModel")[1])
    file["transformer.h.0.crossattention.q_attn.weight"] = torch.ones(2, 3)
    file["transformer.h.3.ln_1.weight"] = torch.ones(D)
    file["transformer.h.1.mlp.c_fc.weight"] = file["transformer.h.1.mlp.c_fc.weight"].T
    del file["transformer.ln_f.bias"]
    with pytest.raises(CheckpointError) as caught:
        load("GPT2LMHeadModel", file)
    text = str(caught.value)
    assert "some/file.bin: 4 of its tensors and the model do not fit" in text
    assert "transformer.h.0.crossattention.q_attn.weight [2, 3] is in the file, but no row knows it" in text
    assert "transformer.h.3.ln_1.weight would be layers.3.attention_norm.weight" in text
    assert "transformer.h.1.mlp.c_fc.weight: expected [96, 24]" in text
    assert "transformer.norm.bias [24] is in the model, but nothing in the file fills it" in text


# Files: an export, and what transformers and torch save

ENTRIES = {
    "OpenAIGPTModel": ("gptModel", "openAIGPTModel"),
    "OpenAIGPTLMHeadModel": ("gpt", "openAIGPTLMHeadModel"),
    "OpenAIGPTDoubleHeadsModel": ("gptDoubleHeads", "openAIGPTDoubleHeadsModel"),
    "GPT2Model": ("gpt2Model",),
    "GPT2LMHeadModel": ("gpt2", "gpt2LMHeadModel"),
}


def entry_of(name):
    return getattr(hubmodels, ENTRIES[name][0])


def assert_same_parameters(model, expected):
    assert isinstance(model, type(expected))
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())


def write_bin(theirs, name, directory, **more):
    directory.mkdir(exist_ok=True)
    torch.save(tensors_of(theirs) | more, directory / "pytorch_model.bin")
    theirs.config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("name", "variant"), EVERY_VARIANT, ids=variant_id)
def test_there_and_back_again_is_bit_equal(name, variant, kind, tmp_path):
    from safetensors.torch import load_file

    expected, theirs = pair(name, torch.float32, **variant)
    if kind == "bin":
        write_bin(theirs, name, tmp_path / "theirs")
    else:
        theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = entry_of(name)(tmp_path / "theirs")
    assert_same_parameters(ours, expected)
    assert ours.config == expected.config
    exported = load_file(hubmodels.export(ours, tmp_path / "ours") / "model.safetensors")
    parameters = dict(theirs.named_parameters())
    assert exported.keys() == parameters.keys()
    assert all(torch.equal(exported[key], parameter) for key, parameter in parameters.items())
    saved = load_file(tmp_path / "theirs" / "model.safetensors") if kind == "safetensors" else tensors_of(theirs)
    assert all(torch.equal(exported[key], saved[key]) for key in exported.keys() & saved.keys())
    again = entry_of(name)(tmp_path / "ours")
    assert_same_parameters(again, expected)
    assert again.config == ours.config


@pytest.mark.parametrize(("name", "variant"), EVERY_VARIANT, ids=variant_id)
def test_transformers_loads_an_export_with_equal_logits(name, variant, tmp_path):
    ours, theirs = pair(name, torch.float32, **variant)
    hubmodels.export(ours, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [name]
    options = {"attn_implementation": "eager"} if is_gpt2(name) else {}
    loaded, account = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(account.values()), account
    inputs = inputs_of(name, "right")
    with torch.no_grad():
        got, expected = (call(model.eval(), name, **inputs) for model in (loaded, theirs))
    assert torch.equal(result_of(got), result_of(expected))
    if name == DOUBLE:
        assert torch.equal(got.mc_logits, expected.mc_logits)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is type(theirs.config)


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name in NAMES for entry in ENTRIES[name]])
def test_every_entry_point_loads_a_path(name, entry, tmp_path):
    expected, theirs = pair(name, torch.float32)
    write_bin(theirs, name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(hubmodels, entry)(str(tmp_path))
    assert_same_parameters(model, expected)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert model.provenance.dialect == "huggingface"
    assert_accounts(model.provenance.report, tensors_of(theirs), model.state_dict())
    if "openAI" in entry or "LMHead" in entry:
        return  # the names of old have the calls of old: test_original.py
    inputs = inputs_of(name, "right")
    with torch.no_grad():
        assert_equal_outputs(model(**inputs), call(theirs, name, **inputs), inputs["attention_mask"], 2e-4)


@pytest.mark.parametrize("entry", ENTRIES[DOUBLE])
def test_a_checkpoint_without_the_second_head_starts_it_anew_with_a_warning(entry, tmp_path):
    expected, theirs = pair("OpenAIGPTLMHeadModel", torch.float32)
    write_bin(theirs, "OpenAIGPTLMHeadModel", tmp_path)
    with pytest.warns(UserWarning, match="has no choice for .*GptDoubleHeads: it starts anew from seed 0") as caught:
        model = getattr(hubmodels, entry)(tmp_path)
    assert caught[0].filename == __file__  # the line that the user wrote
    assert torch.equal(model.transformer.embeddings.word.weight, expected.transformer.embeddings.word.weight)
    assert 0.005 < model.choice.weight.std() < 0.05
    assert not model.choice.bias.any()
    new = {entry.ours: entry.because for entry in model.provenance.report.entries if entry.operation == "new"}
    assert new == dict.fromkeys(("choice.weight", "choice.bias"), "the checkpoint has none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seeded = getattr(hubmodels, entry)(tmp_path, head_seed=0)
        other = getattr(hubmodels, entry)(tmp_path, head_seed=1)
    assert torch.equal(seeded.choice.weight, model.choice.weight)
    assert not torch.equal(other.choice.weight, model.choice.weight)


def test_head_seed_replaces_the_head_of_the_file_and_needs_one(tmp_path):
    expected, theirs = pair(DOUBLE, torch.float32)
    write_bin(theirs, DOUBLE, tmp_path)
    kept, new = hubmodels.gptDoubleHeads(tmp_path), hubmodels.gptDoubleHeads(tmp_path, head_seed=0)
    assert torch.equal(kept.choice.weight, expected.choice.weight)
    assert not torch.equal(new.choice.weight, expected.choice.weight)
    with pytest.raises(InputError, match="head_seed = 0: Gpt has no head to start anew"):
        hubmodels.gpt(tmp_path, head_seed=0)


def test_options_adjust_the_config(tmp_path):
    _, theirs = pair(DOUBLE, torch.float32)
    write_bin(theirs, DOUBLE, tmp_path)
    options = {
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.2,
        "embedding_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.4,
        "summary_dropout_prob": 0.5,
        "layer_norm_eps": 1e-3,
        "initializer_range": 0.7,
    }
    assert set(options) == set(GptConfig.ADJUSTABLE)
    model = hubmodels.gptDoubleHeads(tmp_path, **options)
    assert {name: getattr(model.config, name) for name in options} == options
    block = model.transformer.layers[1]
    assert model.transformer.embeddings.dropout.p == 0.3
    assert (block.dropout.p, block.attention.dropout, model.dropout.p) == (0.2, 0.4, 0.5)
    assert (block.attention_norm.eps, block.feed_forward_norm.eps) == (1e-3, 1e-3)
    assert block.feed_forward.activation == "relu"


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_options_that_a_family_does_not_have_are_refused(name, tmp_path):
    _, theirs = pair(name, torch.float32)
    write_bin(theirs, name, tmp_path)
    entry = entry_of(name)
    with pytest.raises(InputError, match=r"unknown option classifier_dropout; options are .*embedding_dropout_prob"):
        entry(tmp_path, classifier_dropout=0.1)
    with pytest.raises(InputError, match=rf"num_labels = 3: {OURS[name].__name__} has no labels to number"):
        entry(tmp_path, num_labels=3)
    with pytest.raises(InputError, match="unknown option scale_attn_weights"):
        entry(tmp_path, scale_attn_weights=False)
    with pytest.raises(ConfigError, match=r"hidden_dropout_prob = 1\.5: expected a probability"):
        entry(tmp_path, hidden_dropout_prob=1.5)


def test_an_adjusted_activation_survives_the_export(tmp_path):
    _, theirs = pair("OpenAIGPTLMHeadModel", torch.float32)
    write_bin(theirs, "OpenAIGPTLMHeadModel", tmp_path / "theirs")
    for activation in ("gelu_new", "relu", "silu"):
        ours = hubmodels.gpt(tmp_path / "theirs", hidden_act=activation)
        hubmodels.export(ours, tmp_path / activation)
        assert hubmodels.gpt(tmp_path / activation).config == ours.config
        assert transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path / activation).config.afn in (
            {"gelu_new": "gelu"}.get(activation, activation),
        )


@pytest.mark.parametrize(("mine", "other"), [("gpt", "GPT2LMHeadModel"), ("gpt2", "OpenAIGPTLMHeadModel")])
def test_the_other_familys_checkpoint_is_refused(mine, other, tmp_path):
    _, theirs = pair(other, torch.float32)
    write_bin(theirs, other, tmp_path)
    with pytest.raises(ConfigError, match=r"model_type = .* \(expected "):
        getattr(hubmodels, mine)(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_dtype_option(name, dtype, tmp_path):
    expected, theirs = pair(name, torch.float32)
    write_bin(theirs, name, tmp_path)
    model = entry_of(name)(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = inputs_of(name, "left")
    with torch.no_grad():
        exact, got = expected(**inputs).logits, model(**inputs).logits
    assert got.dtype == dtype
    assert distance(got, exact) <= (1e-4 if dtype == torch.float64 else 0.1) * float(exact.abs().max())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_half_precision_file_gives_single_precision(name, tmp_path):
    expected, theirs = pair(name, torch.float32)
    theirs.half().save_pretrained(tmp_path)
    model = entry_of(name)(tmp_path)
    assert_same_parameters(model, expected.half().float())
    assert {entry.dtype for entry in model.provenance.report.entries} == {"float16"}


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, DOUBLE])
def test_not_pretrained_draws_new_parameters(name, tmp_path):
    _, theirs = pair(name, torch.float32)
    theirs.config.save_pretrained(tmp_path)  # no weights are needed
    torch.manual_seed(1)
    model = entry_of(name)(tmp_path, pretrained=False)
    torch.manual_seed(1)
    assert_same_parameters(entry_of(name)(tmp_path, pretrained=False), model)
    assert 0.015 < model.transformer.embeddings.word.weight.std() < 0.025
    assert not model.transformer.layers[0].attention.qkv.bias.any()
    assert model.transformer.layers[0].attention_norm.weight.eq(1).all()
    assert {entry.operation for entry in model.provenance.report.entries} == {"new"}


# What a user does with a module


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_pickle_give_an_equal_and_separate_model(name, tmp_path):
    _, theirs = pair(name, torch.float32)
    write_bin(theirs, name, tmp_path)
    ours = entry_of(name)(tmp_path)
    inputs = inputs_of(name, "right")
    with torch.no_grad():
        before = result_of(ours(**inputs))
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(result_of(twin(**inputs)), before)
            assert twin.config == ours.config
            assert str(twin.provenance) == str(ours.provenance)
            randomise(twin, 17)
            assert distance(result_of(twin(**inputs)), before) > 1e-3
            assert torch.equal(result_of(ours(**inputs)), before)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip_is_strict(name):
    ours, _ = pair(name)
    other, _ = pair(name, seed=18)
    inputs = inputs_of(name, "left")
    with torch.no_grad():
        assert distance(result_of(other(**inputs)), result_of(ours(**inputs))) > 1e-3
        other.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(result_of(other(**inputs)), result_of(ours(**inputs)))
    assert ours.state_dict().keys() == dict(ours.named_parameters()).keys()


def test_output_matrix_is_the_word_table_itself():
    for name in LANGUAGE_MODELS:
        ours, _ = pair(name)
        assert [tuple(p.shape) for p in ours.parameters()].count((V, D)) == 1
        ids, unused = inputs_of(name, "none")["input_ids"], 5
        ids[ids == unused] = 6
        with torch.no_grad():
            before = ours(ids).logits
            ours.transformer.embeddings.word.weight[unused] += 1.0
            after = ours(ids).logits
        others = torch.arange(V) != unused
        assert distance(after[:, :, others], before[:, :, others]) <= EXACT
        assert distance(after[:, :, unused], before[:, :, unused]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_named_tuples(name):
    ours, _ = pair(name)
    outputs = ours(**inputs_of(name, "right"))
    fields = ("last_hidden_state",) if name in BASES else ("loss", "logits")
    fields = ("loss", "mc_loss", "logits", "mc_logits") if name == DOUBLE else fields
    assert outputs._fields == (*fields, "hidden_states", "attentions")
    assert outputs.hidden_states is None
    assert outputs.attentions is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_to_dtype_moves_every_output(name, dtype):
    ours, _ = pair(name)
    ours.to(dtype)
    outputs = ours(**inputs_of(name, "right"), output_hidden_states=True, output_attentions=True)
    tensors = [t for t in outputs if isinstance(t, torch.Tensor)] + [*outputs.hidden_states, *outputs.attentions]
    assert {t.dtype for t in tensors} == {dtype}


def frames_of_ours():
    """Code names of the stack's frames that stand in the package, innermost first."""
    root, found, frame = str(Path(hubmodels.__file__).parent), [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(root):
            found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


@pytest.mark.parametrize("cached", [False, True], ids=["at once", "cached"])
@pytest.mark.parametrize("pattern", ["none", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_at_most_six_frames_from_the_call_to_the_kernel(name, pattern, cached, monkeypatch):
    ours, _ = pair(name)
    stacks = []

    def spied(kernel):
        def spy(*args, **kwargs):
            stacks.append(frames_of_ours())
            return kernel(*args, **kwargs)

        return spy

    inputs = inputs_of(name, pattern)
    if cached:
        decoder = getattr(ours, "transformer", ours)
        cache = decoder.new_cache(torch.Size(rows_of(name)).numel(), 2 * POSITIONS)
        with torch.no_grad():
            ours(**{key: x[..., :4] for key, x in inputs.items()}, cache=cache)
        inputs = {**{key: x[..., 4:] for key, x in inputs.items()}, "cache": cache}
    monkeypatch.setattr(kernels, "_FLASH", spied(kernels._FLASH))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied(F.scaled_dot_product_attention))
    with torch.no_grad():
        ours(**inputs)
    assert len(stacks) >= LAYERS
    assert max(map(len, stacks)) <= 6, stacks[0]
    assert all("attend" in stack for stack in stacks)
    ragged = any("ragged_attention" in frame for stack in stacks for frame in stack)
    assert ragged == (pattern == "right" and not cached)


@pytest.mark.parametrize("name", NAMES)
def test_building_draws_no_random_number(name):
    before = torch.get_rng_state()
    OURS[name](family_of(name).config.from_published(SIZES, "x"))
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_of_the_tiny_models_are_pairwise_distinct():
    sizes = [B, S, D, H, D // H, V, INNER, 4 * D, LAYERS, POSITIONS, CHOICES]
    assert len(set(sizes)) == len(sizes)
    assert {name for name in NAMES if is_gpt2(name)} == set(GPT2_NAMES)
