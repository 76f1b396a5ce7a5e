"""What a person asks of a model gives what the model's own outputs say, in the order asked."""

import re

import pytest
import torch

from hubmodels import bertForMaskedLM, bertModel, bertTokenizer
from hubmodels.errors import InputError
from hubmodels.tasks import POOLINGS, embed, fill_mask

MASKED = [
    "The [MASK] sailed across the sea.",
    "[MASK]",
    "She [MASK] the door and [MASK] into the dark [MASK].",
    "It was a dark and stormy night, and the old man said nothing to the [MASK] for a long, long while.",
    "[MASK] [MASK]",
]
TEXTS = [
    "The ship sailed.",
    "",
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.",
    "No.",
    "She opened the door.",
    "The captain said nothing for a long while.",
    "Yes!",
]


@pytest.fixture(scope="module")
def tokenizer():
    return bertTokenizer("bert-nano")


@pytest.fixture(scope="module")
def masked_lm():
    return bertForMaskedLM("bert-nano")


@pytest.fixture(scope="module")
def encoder():
    return bertModel("bert-nano")


def long_text(encoder) -> str:
    return "the sea and the ship " * encoder.config.max_position_embeddings


# fill_mask


def test_fill_mask_answers_each_mask_of_each_text(masked_lm, tokenizer):
    results = fill_mask(masked_lm, tokenizer, MASKED, top_k=4)
    assert [len(masks) for masks in results] == [1, 1, 3, 1, 2]
    for guesses in (guesses for masks in results for guesses in masks):
        assert len(guesses) == 4
        assert len({guess.token_id for guess in guesses}) == 4
        probabilities = [guess.probability for guess in guesses]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1 + 1e-5
        assert [guess.token for guess in guesses] == tokenizer.tokens(guess.token_id for guess in guesses)


def test_fill_mask_equals_the_softmax_of_the_full_logits(masked_lm, tokenizer):
    results = fill_mask(masked_lm, tokenizer, MASKED, top_k=7)
    for text, masks in zip(MASKED, results, strict=True):
        inputs = tokenizer(text)
        with torch.no_grad():
            logits = masked_lm(**inputs).logits[0]  # [S, V]
        rows = logits[inputs["input_ids"][0] == tokenizer.mask_token_id].softmax(-1)
        for row, guesses in zip(rows, masks, strict=True):
            expected = row.topk(7)
            assert [guess.token_id for guess in guesses] == expected.indices.tolist()
            found = torch.tensor([guess.probability for guess in guesses])
            torch.testing.assert_close(found, expected.values, rtol=1e-4, atol=1e-6)


def test_fill_mask_over_the_whole_vocabulary_sums_to_one(masked_lm, tokenizer):
    [[guesses]] = fill_mask(masked_lm, tokenizer, MASKED[0], top_k=tokenizer.vocab_size)
    assert len(guesses) == tokenizer.vocab_size
    assert sum(guess.probability for guess in guesses) == pytest.approx(1, abs=1e-4)


def probabilities(results) -> list[float]:
    return [guess.probability for masks in results for guesses in masks for guess in guesses]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_fill_mask_does_not_depend_on_the_batch(masked_lm, tokenizer, batch_size):
    together = fill_mask(masked_lm, tokenizer, MASKED)
    apart = fill_mask(masked_lm, tokenizer, MASKED, batch_size=batch_size)
    assert [[[g.token for g in m] for m in masks] for masks in apart] == [
        [[g.token for g in m] for m in masks] for masks in together
    ]
    for left, right in zip(probabilities(apart), probabilities(together), strict=True):
        assert left == pytest.approx(right, abs=1e-5)


def test_fill_mask_takes_one_text_as_a_list_of_one(masked_lm, tokenizer):
    assert fill_mask(masked_lm, tokenizer, MASKED[0]) == fill_mask(masked_lm, tokenizer, [MASKED[0]])
    assert fill_mask(masked_lm, tokenizer, []) == []


@pytest.mark.parametrize("batch_size", [1, 32])
def test_fill_mask_names_the_text_without_a_mask(masked_lm, tokenizer, batch_size):
    message = "no [MASK] in 'The ship [mask].': write it where a word is to be filled in"
    with pytest.raises(InputError, match=re.escape(message)):
        fill_mask(masked_lm, tokenizer, [MASKED[0], "The ship [mask]."], batch_size=batch_size)


@pytest.mark.parametrize("top_k", [0, -1, 1_000_000])
def test_fill_mask_refuses_top_k_out_of_range(masked_lm, tokenizer, top_k):
    message = f"top_k = {top_k}: expected 1 to {tokenizer.vocab_size}, the size of the vocabulary"
    with pytest.raises(InputError, match=re.escape(message)):
        fill_mask(masked_lm, tokenizer, MASKED, top_k=top_k)


def test_fill_mask_refuses_a_text_longer_than_the_position_table(masked_lm, tokenizer, encoder):
    longest = encoder.config.max_position_embeddings
    with pytest.raises(InputError, match=f"this model has positions for {longest}; shorten the text"):
        fill_mask(masked_lm, tokenizer, "[MASK] " + long_text(encoder))


# embed


def states_of(encoder, tokenizer, text):
    """last_hidden_state [S, D] and pooler_output [D] of one text alone."""
    with torch.no_grad():
        output = encoder(**tokenizer(text, max_length=encoder.config.max_position_embeddings))
    return output.last_hidden_state[0], output.pooler_output[0]


BY_HAND = {
    "mean": lambda states, pooled: states.mean(0),
    "first": lambda states, pooled: states[0],
    "pooler": lambda states, pooled: pooled,
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalise", [True, False])
def test_embed_equals_pooling_by_hand_in_the_order_given(encoder, tokenizer, pooling, normalise):
    found = embed(encoder, tokenizer, TEXTS, pooling=pooling, normalise=normalise)
    expected = torch.stack([BY_HAND[pooling](*states_of(encoder, tokenizer, text)) for text in TEXTS])
    if normalise:
        expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_embed_gives_unit_vectors_by_the_mean_unless_told_otherwise(encoder, tokenizer):
    vectors = embed(encoder, tokenizer, TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.config.hidden_size)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)))
    assert torch.equal(vectors, embed(encoder, tokenizer, TEXTS, pooling="mean", normalise=True))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_embed_does_not_depend_on_the_batch(encoder, tokenizer, pooling, batch_size):
    together = embed(encoder, tokenizer, TEXTS, pooling=pooling)
    apart = embed(encoder, tokenizer, TEXTS, pooling=pooling, batch_size=batch_size)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def test_embed_takes_one_text_and_none(encoder, tokenizer):
    assert embed(encoder, tokenizer, TEXTS[0]).shape == (1, encoder.config.hidden_size)
    assert embed(encoder, tokenizer, []).shape == (0, encoder.config.hidden_size)


def test_embed_cuts_long_texts_to_the_position_table(encoder, tokenizer):
    longest = encoder.config.max_position_embeddings
    assert tokenizer(long_text(encoder))["input_ids"].shape[1] > longest
    vectors = embed(encoder, tokenizer, [TEXTS[0], long_text(encoder)], normalise=False)
    states, _ = states_of(encoder, tokenizer, long_text(encoder))
    assert states.shape[0] == longest
    torch.testing.assert_close(vectors[1], states.mean(0), rtol=1e-4, atol=1e-5)


def test_embed_refuses_an_unknown_pooling(encoder, tokenizer):
    message = "pooling = 'max': expected one of mean, first, pooler"
    with pytest.raises(InputError, match=re.escape(message)):
        embed(encoder, tokenizer, TEXTS, pooling="max")


def test_embed_gives_vectors_that_something_can_be_trained_on(encoder, tokenizer):
    """A probe on frozen vectors is what they are for: they must not be inference tensors, which autograd refuses."""
    probe = torch.nn.Linear(encoder.config.hidden_size, 2)
    probe(embed(encoder, tokenizer, TEXTS)).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


@pytest.fixture(params=["fill_mask", "embed"])
def task(request, masked_lm, encoder, tokenizer):
    """texts, batch_size -> either task's answer"""
    function, model = (fill_mask, masked_lm) if request.param == "fill_mask" else (embed, encoder)
    return lambda texts, batch_size: function(model, tokenizer, texts, batch_size=batch_size)


def test_tasks_name_the_place_of_what_is_no_text(task):
    with pytest.raises(InputError, match=re.escape("texts[2]: expected a str, got int")):
        task(["[MASK]", "[MASK]", 3], batch_size=2)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_tasks_refuse_an_empty_batch(task, batch_size):
    with pytest.raises(InputError, match=f"batch_size = {batch_size}"):
        task(["[MASK]"], batch_size=batch_size)
