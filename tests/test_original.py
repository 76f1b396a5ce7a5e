"""The names that PyTorch Hub once had: code written for pytorch-pretrained-bert 0.6 runs, and gets what it got."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from gpt_reference import pair
from reference import distance

import hubmodels
from hubmodels.hub.original import OriginalGpt, OriginalGpt2

TEXT = "Who was Jim Henson ? Jim Henson was a puppeteer"


@pytest.fixture(scope="module")
def tokens():
    """As the examples on the hub's page made them."""
    tokenizer = hubmodels.openAIGPTTokenizer("gpt-nano")
    return torch.tensor([tokenizer.convert_tokens_to_ids(tokenizer.tokenize(TEXT))])


def test_the_models_states_are_a_tensor(tokens):
    with torch.no_grad():
        states = hubmodels.openAIGPTModel("gpt-nano")(tokens)
        assert torch.equal(states, hubmodels.gptModel("gpt-nano")(tokens).last_hidden_state)


def test_the_published_example_of_the_language_model(tokens):
    tokenizer, model = hubmodels.openAIGPTTokenizer("gpt-nano"), hubmodels.openAIGPTLMHeadModel("gpt-nano")
    model.eval()
    with torch.no_grad():
        predictions = model(tokens)
        assert torch.equal(predictions, hubmodels.gpt("gpt-nano")(tokens).logits)
    predicted_index = torch.argmax(predictions[0, -1, :]).item()
    (predicted_token,) = tokenizer.convert_ids_to_tokens([predicted_index])
    assert tokenizer.convert_tokens_to_ids(predicted_token) == predicted_index


def test_labels_of_minus_one_count_for_nothing_and_give_the_loss_alone(tokens):
    labels = tokens.masked_fill(torch.arange(tokens.shape[1]) % 3 == 0, -1)
    model = hubmodels.openAIGPTLMHeadModel("gpt-nano")
    with torch.no_grad():
        loss, logits = model(tokens, lm_labels=labels), model(tokens)
    assert loss.dim() == 0
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-1))


def test_positions_and_token_types_stand_where_they_stood(tokens):
    positions = torch.arange(tokens.shape[1]).flip(0)[None]
    types = torch.full_like(tokens, 7)
    with torch.no_grad():
        got = hubmodels.openAIGPTLMHeadModel("gpt-nano")(tokens, positions, types)
        expected = hubmodels.gpt("gpt-nano")(tokens, token_type_ids=types, position_ids=positions).logits
    assert torch.equal(got, expected)


def test_double_heads_give_both_logits_or_both_losses(tokens):
    model = hubmodels.openAIGPTDoubleHeadsModel("gpt-nano", head_seed=3)
    ids = torch.stack([tokens, tokens.flip(1)], 1)  # [1, 2, S]
    deciding = torch.tensor([[4, 2]])
    with torch.no_grad():
        lm_logits, mc_logits = model(ids, deciding)
        lm_loss, mc_loss = model(ids, deciding, ids.masked_fill(ids == ids[0, 0, 1], -1), torch.tensor([1]))
        (alone,) = model(ids, deciding, mc_labels=torch.tensor([1]))
        expected = hubmodels.gptDoubleHeads("gpt-nano", head_seed=3)(ids, mc_token_ids=deciding)
    assert torch.equal(lm_logits, expected.logits)
    assert torch.equal(mc_logits, expected.mc_logits)
    assert torch.equal(mc_loss, alone)
    torch.testing.assert_close(mc_loss, F.cross_entropy(mc_logits, torch.tensor([1])))
    assert lm_loss.isfinite()


@pytest.fixture(scope="module")
def gpt2():
    plain = pair("GPT2LMHeadModel")[0]
    model = OriginalGpt2(plain.config).double().eval()
    model.load_state_dict(plain.state_dict())
    return model, plain


def test_gpt2_goes_on_from_the_past_that_it_gave(gpt2):
    model, plain = gpt2
    ids = torch.randint(0, plain.config.vocab_size, (3, 9))
    with torch.no_grad():
        first, past = model(ids[:, :4])
        second, past = model(ids[:, 4:8], past=past)
        third, _ = model(ids[:, 8:], past=past)
        assert distance(torch.cat([first, second, third], 1), plain(ids).logits) <= 1e-10
        assert distance(model(ids, lm_labels=ids), plain(ids, labels=ids).loss) <= 1e-12


def test_they_are_the_same_models_otherwise(tokens):
    model = hubmodels.openAIGPTLMHeadModel("gpt-nano")
    expected = hubmodels.gpt("gpt-nano").generate(tokens, max_new_tokens=5)
    assert model.generate(tokens, max_new_tokens=5) == expected
    assert isinstance(pickle.loads(pickle.dumps(model)), OriginalGpt)


def test_an_export_is_that_of_the_plain_model(tmp_path):
    for entry in ("gpt", "openAIGPTLMHeadModel"):
        hubmodels.export(getattr(hubmodels, entry)("gpt-nano"), tmp_path / entry)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "gpt" / name).read_bytes() == (tmp_path / "openAIGPTLMHeadModel" / name).read_bytes()
