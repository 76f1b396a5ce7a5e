"""What a person asks of a model gives what the model's own outputs say, in the order asked."""

import copy
import inspect
import json
import math
import random
import re

import pytest
import torch
from conftest import SHARED

import hubmodels
from hubmodels import bertForMaskedLM, bertModel, bertTokenizer, generation, gpt, gptTokenizer, tasks
from hubmodels.errors import InputError
from hubmodels.families.gpt import Gpt, GptConfig
from hubmodels.layers import initialise
from hubmodels.tasks import POOLINGS, embed, fill_mask, generate, perplexity, score, stream, token_logprobs
from hubmodels.tokenizers import BytePairTokenizer, train_byte_pair

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


@pytest.mark.parametrize("batch_tokens", [1, 20, 64])
def test_fill_mask_does_not_depend_on_the_batch(masked_lm, tokenizer, batch_tokens):
    together = fill_mask(masked_lm, tokenizer, MASKED)
    apart = fill_mask(masked_lm, tokenizer, MASKED, batch_tokens=batch_tokens)
    assert [[[g.token for g in m] for m in masks] for masks in apart] == [
        [[g.token for g in m] for m in masks] for masks in together
    ]
    for left, right in zip(probabilities(apart), probabilities(together), strict=True):
        assert left == pytest.approx(right, abs=1e-5)


def test_fill_mask_takes_one_text_as_a_list_of_one(masked_lm, tokenizer):
    assert fill_mask(masked_lm, tokenizer, MASKED[0]) == fill_mask(masked_lm, tokenizer, [MASKED[0]])
    assert fill_mask(masked_lm, tokenizer, []) == []


@pytest.mark.parametrize("batch_tokens", [1, 32])
def test_fill_mask_names_the_text_without_a_mask(masked_lm, tokenizer, batch_tokens):
    message = "no [MASK] in 'The ship [mask].': write it where a word is to be filled in"
    with pytest.raises(InputError, match=re.escape(message)):
        fill_mask(masked_lm, tokenizer, [MASKED[0], "The ship [mask]."], batch_tokens=batch_tokens)


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
@pytest.mark.parametrize("batch_tokens", [1, 20, 64])
def test_embed_does_not_depend_on_the_batch(encoder, tokenizer, pooling, batch_tokens):
    together = embed(encoder, tokenizer, TEXTS, pooling=pooling)
    apart = embed(encoder, tokenizer, TEXTS, pooling=pooling, batch_tokens=batch_tokens)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def mixed_texts(count: int) -> list[str]:
    """Of very different lengths, in no order."""
    draw = random.Random(0)
    words = ["the", "sea", "and", "a", "ship", "sailed", "dark", "night", "captain", "looked", "at"]
    return [" ".join(draw.choices(words, k=draw.choice([1, 2, 7, 30, 90]))) for _ in range(count)]


def test_a_batch_has_no_more_tokens_than_it_may_and_little_padding(encoder, tokenizer):
    shapes, real = [], []

    def look(module, arguments, options):
        shapes.append(options["input_ids"].shape)
        real.append(int(options["attention_mask"].sum()))

    handle = encoder.register_forward_pre_hook(look, with_kwargs=True)
    texts = mixed_texts(300)
    found = embed(encoder, tokenizer, texts, batch_tokens=500)
    handle.remove()
    sizes = [rows * length for rows, length in shapes]
    assert max(sizes) <= 500
    assert sum(real) == sum(len(row) for row in tokenizer.rows(texts))
    assert sum(real) >= 0.9 * sum(sizes)
    assert len(shapes) < 60
    one = torch.cat([embed(encoder, tokenizer, text) for text in texts[:20]])
    torch.testing.assert_close(found[:20], one, rtol=0, atol=1e-5)


def test_a_text_longer_than_a_batch_may_be_is_a_batch(encoder, tokenizer):
    assert embed(encoder, tokenizer, ["the sea " * 20, "sea"], batch_tokens=4).shape[0] == 2


def test_embed_reads_texts_as_they_come(encoder, tokenizer, monkeypatch):
    """Of any number: never more than a chunk is in memory, and the order is kept."""
    monkeypatch.setattr(tasks, "_CHUNK", 16)
    texts, waiting, most = mixed_texts(50), [], []

    def read():
        for text in texts:
            waiting.append(text)
            yield text

    rows = type(tokenizer).rows
    monkeypatch.setattr(
        type(tokenizer), "rows", lambda *given: (most.append(len(waiting)), waiting.clear(), rows(*given))[2]
    )
    found = embed(encoder, tokenizer, read())
    assert (most, waiting) == ([16, 16, 16, 2], [])
    torch.testing.assert_close(found, embed(encoder, tokenizer, texts), rtol=0, atol=1e-5)


def test_windows_of_a_long_text_by_hand(encoder, tokenizer):
    room, text = encoder.config.max_position_embeddings - 2, long_text(encoder)
    (row,) = tokenizer.rows(text)
    first, last, body = row[0], row[-1], row[1:-1]
    for overlap in (0, 7, room - 1 if len(body) < 2 * room else room // 2):
        begins = range(0, len(body) - overlap, room - overlap)
        windows = [[first, *body[begin : begin + room], last] for begin in begins]
        assert windows[-1][-2] == body[-1]
        with torch.no_grad():
            states = [encoder(torch.tensor([ids])).last_hidden_state[0] for ids in windows]
        expected = torch.cat(states).mean(0)
        found = embed(encoder, tokenizer, ["sea", text], overlap=overlap, normalise=False)
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)
    exact = copy.deepcopy(encoder).double()  # in float32 sums round as the batch splits them
    both, alone = (embed(exact, tokenizer, texts, normalise=False) for texts in (["sea", text], ["sea"]))
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [-1, 1.0, "2", 10**6])
def test_an_overlap_that_is_none_is_refused(encoder, tokenizer, overlap):
    with pytest.raises(
        InputError, match=re.escape(f"overlap = {overlap!r}: expected None, or a number of tokens from 0")
    ):
        embed(encoder, tokenizer, TEXTS, overlap=overlap)


@pytest.mark.parametrize("batch_tokens", [0, -1, 2.5])
def test_a_batch_of_no_tokens_is_refused(encoder, tokenizer, batch_tokens):
    with pytest.raises(InputError, match=re.escape(f"batch_tokens = {batch_tokens}: expected a whole number")):
        embed(encoder, tokenizer, TEXTS, batch_tokens=batch_tokens)


def test_a_bar_counts_texts(encoder, tokenizer, capsys):
    embed(encoder, tokenizer, TEXTS)
    assert capsys.readouterr().err == ""
    embed(encoder, tokenizer, TEXTS, progress=True)
    assert f"{len(TEXTS):.2f}/{len(TEXTS):.2f}" in capsys.readouterr().err


def test_embed_with_an_accelerated_model(encoder, tokenizer):
    found = embed(hubmodels.accelerate(encoder), tokenizer, TEXTS)
    torch.testing.assert_close(found, embed(encoder, tokenizer, TEXTS), rtol=0, atol=1e-5)


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
    """texts, batch_tokens -> either task's answer"""
    function, model = (fill_mask, masked_lm) if request.param == "fill_mask" else (embed, encoder)
    return lambda texts, batch_tokens: function(model, tokenizer, texts, batch_tokens=batch_tokens)


def test_tasks_name_the_place_of_what_is_no_text(task):
    with pytest.raises(InputError, match=re.escape("texts[2]: expected a str, got int")):
        task(["[MASK]", "[MASK]", 3], batch_tokens=20)


@pytest.mark.parametrize("batch_tokens", [0, -1])
def test_tasks_refuse_an_empty_batch(task, batch_tokens):
    with pytest.raises(InputError, match=f"batch_tokens = {batch_tokens}"):
        task(["[MASK]"], batch_tokens=batch_tokens)


# Language models: what is added to a text

PROMPTS = ["The ship", "It was a dark and stormy", "She said"]
LETTERS = ["a", "b", "é", "中", "🙂", " ", "\n"]


@pytest.fixture(scope="module")
def pieces():
    return gptTokenizer("gpt-nano")


@pytest.fixture(scope="module")
def nano():
    return gpt("gpt-nano")


@pytest.fixture(scope="module")
def of_bytes():
    """Every byte a token of its own: most characters of LETTERS are split over several."""
    return train_byte_pair(["a"], 257)


def tiny(words: int, positions: int, seed: int = 1) -> Gpt:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Gpt(GptConfig(vocab_size=words, max_position_embeddings=positions, **sizes))
    initialise(model, 0.3, torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture
def saying(monkeypatch):
    """ids -> a model that goes on with exactly these from any one prompt, again and again."""
    models = {}

    def script(ids: list[int], tokenizer):
        begin = generation._State.__init__
        said = [0]

        def restart(self, *args):
            said[0] = 0
            begin(self, *args)

        def choose(scores, *_):
            said[0] += 1
            return torch.tensor(ids[said[0] - 1 : said[0]])

        monkeypatch.setattr(generation._State, "__init__", restart)
        monkeypatch.setattr(generation, "_choose", choose)
        if tokenizer.vocab_size not in models:
            models[tokenizer.vocab_size] = tiny(tokenizer.vocab_size, 200)
        return models[tokenizer.vocab_size]

    with monkeypatch.context():
        yield script


def cut_by_hand(text: str, stops: list[str]) -> str:
    """Up to the stop that is complete first, read character by character."""
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)]
    return text


def test_generate_goes_on_from_each_prompt(nano, pieces):
    found = generate(nano, pieces, PROMPTS, max_new_tokens=7)
    assert [each.prompt for each in found] == PROMPTS
    for each in found:
        ids = pieces(each.prompt)["input_ids"]
        [alone] = nano.generate(ids, max_new_tokens=7, stop_ids=[pieces.end_token_id])
        assert (each.ids, each.ended, each.score) == alone
        assert each.prompt + each.text == pieces.decode([*ids[0], *each.ids])
    assert generate(nano, pieces, PROMPTS[0], max_new_tokens=7) == found[:1]


def test_samples_stand_in_the_order_of_their_prompts(nano, pieces):
    found = generate(nano, pieces, PROMPTS, temperature=1.0, seed=2, num_return_sequences=3, max_new_tokens=5)
    assert [each.prompt for each in found] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({each.text for each in found}) > 6
    certain = generate(nano, pieces, PROMPTS, temperature=1.0, top_k=1, num_return_sequences=2, max_new_tokens=5)
    greedy = generate(nano, pieces, PROMPTS, max_new_tokens=5)
    assert certain == [each for each in greedy for _ in range(2)]


def test_beams_have_scores_best_first(nano, pieces):
    found = generate(nano, pieces, PROMPTS[:2], num_beams=3, num_return_sequences=3, max_new_tokens=5)
    assert [each.prompt for each in found] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert [each.score for each in found[:3]] == sorted((each.score for each in found[:3]), reverse=True)
    ids = pieces(PROMPTS[0])["input_ids"][0].tolist()
    by_hand = sum(token_logprobs(nano, ids + found[0].ids)[-5:]) / 5
    assert found[0].score == pytest.approx(by_hand, abs=1e-3)


def test_an_empty_prompt_stands_for_the_end_of_the_text_before(nano, pieces):
    [empty] = generate(nano, pieces, "", max_new_tokens=6)
    [named] = generate(nano, pieces, "<|endoftext|>", max_new_tokens=6)
    assert (empty.prompt, empty.text, empty.ids) == ("", named.text, named.ids)
    assert "<|endoftext|>" not in empty.text
    assert "".join(stream(nano, pieces, "", max_new_tokens=6)) == empty.text


def test_the_end_of_the_text_ends_it_and_is_no_part_of_it(saying, of_bytes):
    ids = [*of_bytes("né")["input_ids"][0].tolist(), of_bytes.end_token_id, 5, 6]
    model = saying(ids, of_bytes)
    [found] = generate(model, of_bytes, "a", max_new_tokens=5)
    assert (found.text, found.ids, found.ended) == ("né", ids[:4], True)
    assert "".join(stream(model, of_bytes, "a", max_new_tokens=5)) == "né"


def test_stop_ids_end_a_text_and_are_no_part_of_it(saying, of_bytes):
    ids = of_bytes("abc")["input_ids"][0].tolist()
    model = saying(ids, of_bytes)
    for stop_ids in ([ids[2]], (ids[2],), {ids[2]}):
        [found] = generate(model, of_bytes, "x", max_new_tokens=3, stop_ids=stop_ids)
        assert (found.text, found.ids, found.ended) == ("ab", ids, True)


CUTS = [
    ("One. Two.", ["."], "One", 4),
    ("One. Two.", ["Two"], "One. ", 8),
    ("One. Two.", [" Tw", "e."], "On", 4),
    ("One. Two.", ["One"], "", 3),
    ("ababac!", ["abac"], "ab", 6),  # begun twice
    ("ab. ac", ["ad", "b.x"], "ab. ac", 6),
    ("née 中国", ["é"], "n", 3),
    ("née 中国", ["国"], "née 中", 11),
    ("née 中国", ["né"], "", 3),
    ("a🙂b", ["🙂b"], "a", 6),
    ("a🙂b", ["a🙃"], "a🙂b", 6),  # three of the four bytes are the same
]


@pytest.mark.parametrize(("text", "stops", "kept", "tokens"), CUTS)
def test_a_stop_string_ends_the_text_before_it(saying, of_bytes, text, stops, kept, tokens):
    ids = of_bytes(text)["input_ids"][0].tolist()
    model = saying(ids, of_bytes)
    [found] = generate(model, of_bytes, "x", stop=stops, max_new_tokens=len(ids))
    assert (found.text, found.ids, found.ended) == (kept, ids[:tokens], kept != text)
    assert "".join(stream(model, of_bytes, "x", stop=stops, max_new_tokens=len(ids))) == kept


def test_a_stop_string_in_the_prompt_or_over_its_end_ends_nothing(saying, of_bytes):
    ids = of_bytes("cd")["input_ids"][0].tolist()
    model = saying(ids, of_bytes)
    [found] = generate(model, of_bytes, "abc ab", stop=["abc", "bc"], max_new_tokens=2)
    assert (found.text, found.ended) == ("cd", False)


def test_a_stop_string_within_a_token_cuts_the_token(saying, pieces):
    ids = pieces(" together again")["input_ids"][0].tolist()
    model = saying(ids, pieces)
    [found] = generate(model, pieces, "They were", stop="eth", max_new_tokens=len(ids))
    assert (found.text, found.ended) == (" tog", True)
    assert "".join(stream(model, pieces, "They were", stop="eth", max_new_tokens=len(ids))) == " tog"


def test_each_row_ends_at_its_own_stop_string(nano, pieces):
    free = generate(nano, pieces, PROMPTS, max_new_tokens=12)
    stop = free[0].text[3:6]
    for each, whole in zip(generate(nano, pieces, PROMPTS, max_new_tokens=12, stop=stop), free, strict=True):
        assert each.text == cut_by_hand(whole.text, [stop])
        assert each.ended == (stop in whole.text)


@pytest.mark.parametrize("seed", range(60))
def test_a_stream_joined_is_the_text_of_generate(saying, of_bytes, seed):
    draw = random.Random(seed)
    text = "".join(draw.choices(LETTERS, k=draw.randint(1, 25)))
    stops = ["".join(draw.choices(LETTERS, k=draw.randint(1, 3))) for _ in range(draw.randint(0, 3))]
    ids = of_bytes(text)["input_ids"][0].tolist()
    model, new = saying(ids, of_bytes), draw.randint(1, len(ids))  # it may break off within a character
    [found] = generate(model, of_bytes, "x", stop=stops, max_new_tokens=new)
    assert "".join(stream(model, of_bytes, "x", stop=stops, max_new_tokens=new)) == found.text
    if new == len(ids):
        assert found.text == cut_by_hand(text, stops)


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_joined_is_the_text_of_generate_for_random_tokens(of_bytes, seed):
    """A random model says bytes that are no characters, too."""
    options = {"temperature": 1.3, "seed": seed, "max_new_tokens": 40, "stop": ["ab", "\xa7", "~", "Q"][: seed % 5]}
    model = tiny(of_bytes.vocab_size, 50, seed)
    [found] = generate(model, of_bytes, "né", **options)
    assert "".join(stream(model, of_bytes, "né", **options)) == found.text


@pytest.mark.parametrize("stop", [(), "the", [" a", "\n", "er"]], ids=str)
@pytest.mark.parametrize("prompt", ["The ship", "", "Né"])
def test_a_stream_joined_is_the_text_of_generate_for_the_embedded_model(nano, pieces, prompt, stop):
    options = {"temperature": 0.9, "seed": 4, "max_new_tokens": 20, "stop": stop}
    [found] = generate(nano, pieces, prompt, **options)
    assert "".join(stream(nano, pieces, prompt, **options)) == found.text


def test_a_stream_holds_back_only_what_may_become_a_stop(saying, of_bytes):
    ids = of_bytes("a<b<!c")["input_ids"][0].tolist()
    assert list(stream(saying(ids, of_bytes), of_bytes, "x", stop="<!-", max_new_tokens=6)) == ["a", "<b", "<!c"]


def test_a_stream_never_gives_a_part_of_a_character(saying, of_bytes):
    ids = of_bytes("é🙂中a")["input_ids"][0].tolist()
    model = saying(ids, of_bytes)
    assert list(stream(model, of_bytes, "x", max_new_tokens=len(ids))) == ["é", "🙂", "中", "a"]
    assert list(stream(model, of_bytes, "x", max_new_tokens=4)) == ["é", "\ufffd"]
    assert generate(model, of_bytes, "x", max_new_tokens=4)[0].text == "é\ufffd"


def test_a_stream_is_lazy(saying, of_bytes, monkeypatch):
    ids = of_bytes("abcdef")["input_ids"][0].tolist()
    model, steps = saying(ids, of_bytes), []
    step = generation._State.step
    monkeypatch.setattr(generation._State, "step", lambda self, tokens: steps.append(1) or step(self, tokens))
    piece = stream(model, of_bytes, "x", max_new_tokens=6)
    assert [next(piece), next(piece), next(piece)] == ["a", "b", "c"]
    assert len(steps) == 2


# GPT's own tokenizer: lower-cased words that end in </w>


def words_tokenizer(directory) -> BytePairTokenizer:
    """One token a word of a few, letters else."""
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    entries = ["<unk>", *letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in ("the", "ship", "sailed", "on"):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            entries.append(parts[0])
    entries = list(dict.fromkeys(entries))
    vocab, pairs = directory / "encoder_bpe_40000.json", directory / "vocab_40000.bpe"
    vocab.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    pairs.write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    return BytePairTokenizer.from_files(vocab, pairs)


@pytest.fixture
def words(tmp_path):
    return words_tokenizer(tmp_path)


def test_words_are_parted_from_the_prompt_by_a_space(saying, words):
    ids = words("sailed on.")["input_ids"][0].tolist()
    model = saying(ids, words)
    [found] = generate(model, words, "The ship", max_new_tokens=3)
    assert (found.prompt, found.text, len(ids)) == ("The ship", " sailed on .", 3)
    assert "".join(stream(model, words, "The ship", max_new_tokens=3)) == found.text


def test_parts_of_a_word_are_joined(saying, words):
    ids = words("the shop on")["input_ids"][0].tolist()
    assert len(ids) > 3  # shop is no entry
    model = saying(ids, words)
    [found] = generate(model, words, "sailed", max_new_tokens=len(ids))
    assert found.text == " the shop on"
    assert "".join(stream(model, words, "sailed", max_new_tokens=len(ids))) == found.text


@pytest.mark.parametrize(
    ("stop", "kept", "tokens"), [(" on", " sailed", 2), ("ed on", " sail", 2), (" sail", "", 1), ("lost", None, 3)]
)
def test_stop_strings_know_the_space_in_front_of_a_word(saying, words, stop, kept, tokens):
    ids = words("sailed on.")["input_ids"][0].tolist()
    model = saying(ids, words)
    [found] = generate(model, words, "The ship", stop=stop, max_new_tokens=3)
    expected = " sailed on ." if kept is None else kept
    assert (found.text, len(found.ids), found.ended) == (expected, tokens, kept is not None)
    assert "".join(stream(model, words, "The ship", stop=stop, max_new_tokens=3)) == expected


def test_a_tokenizer_without_an_end_cannot_begin_a_text(words):
    model = tiny(words.vocab_size, 11)
    message = "prompts[1]: expected text to go on from, got none; this tokenizer cannot begin one"
    with pytest.raises(InputError, match=re.escape(message)):
        generate(model, words, ["the", ""], max_new_tokens=3)
    assert len(score(model, words, "the ship")[0].logprobs) == 1  # the first token has nothing before it


def test_the_published_tokenizer_gives_text_with_spaces(saying):
    directory = SHARED / "data" / "vocab" / "gpt1"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    tokenizer = gptTokenizer(directory)
    ids = tokenizer("of the united states, unfathomably so.")["input_ids"][0].tolist()
    model = saying(ids, tokenizer)
    [found] = generate(model, tokenizer, "The president", max_new_tokens=len(ids))
    assert found.text == " of the united states , unfathomably so ."
    assert "".join(stream(model, tokenizer, "The president", max_new_tokens=len(ids))) == found.text


# Refusals


def test_generate_refuses_what_is_no_text_and_no_stop(nano, pieces):
    for prompts, message in (
        ([], "expected at least one text, got an empty list"),
        (["a", 3], "prompts[1]: expected a str, got int"),
        (3, "prompts: expected a str or a list of str, got int"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            generate(nano, pieces, prompts, max_new_tokens=2)
    for stop, message in (
        ("", "stop: expected strings of at least one character"),
        (["a", ""], "stop: expected strings of at least one character"),
        (None, "stop: expected a str or a list of str, got NoneType"),
        ([5], "stop[0]: expected a str, got int"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            generate(nano, pieces, "a", stop=stop, max_new_tokens=2)


@pytest.mark.parametrize("stop_ids", [None, 5, "ab"])
def test_generate_refuses_stop_ids_that_are_none(nano, pieces, stop_ids):
    with pytest.raises(InputError, match="stop_ids"):
        generate(nano, pieces, "a", stop_ids=stop_ids, max_new_tokens=2)


def test_generate_names_an_unknown_option(nano, pieces):
    with pytest.raises(InputError, match="unknown option length; options are length_penalty"):
        generate(nano, pieces, "a", length=3)


BAD = [
    ({"top_p": 2.0, "temperature": 1.0}, "top_p = 2.0: expected a probability"),
    (
        {"max_new_tokens": 256},
        "prompt of 1 tokens and max_new_tokens = 256: together 257, but this model has positions",
    ),
    ({"num_beams": 2}, "beams are known only when the search is over; use generate"),
    ({"stop": ""}, "stop: expected strings of at least one character"),
    ({"num_return_sequences": 2, "temperature": 1.0}, "expected one prompt and num_return_sequences = 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_a_stream_refuses_bad_options(nano, pieces, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        list(stream(nano, pieces, "a", **options))


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_a_stream_refuses_bad_options_when_it_is_made(nano, pieces, options, message):
    """Not at its first piece: who prints the prompt first would print half of an answer."""
    with pytest.raises(InputError, match=re.escape(message)):
        stream(nano, pieces, "a", **options)


def test_a_stream_takes_one_prompt(nano, pieces):
    with pytest.raises(InputError, match="expected one prompt"):
        list(stream(nano, pieces, ["a", "b"]))
    assert list(stream(nano, pieces, ["a"], max_new_tokens=2)) == list(stream(nano, pieces, "a", max_new_tokens=2))


# Scores and perplexity


def logprobs_by_hand(model, ids, stride=None):
    """Of each token but the first, one at a time: windows as the docstring of perplexity says."""
    window = model.config.max_position_embeddings
    stride = window // 2 if stride is None else stride
    found = []
    for place in range(1, len(ids)):
        number = 0 if place <= window else math.ceil((place - window) / stride)
        context = ids[number * stride : place]
        assert len(context) >= min(place, window - stride)
        assert len(context) <= window
        with torch.no_grad():
            found.append(float(model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[ids[place]]))
    return found


def test_score_is_the_log_softmax_of_each_token(nano, pieces):
    texts = ["The ship sailed.", "", "Né"]
    found = score(nano, pieces, texts)
    for text, each in zip(texts, found, strict=True):
        ids = pieces(text)["input_ids"][0].tolist() if text else []
        assert each.token_ids == ids
        by_hand = logprobs_by_hand(nano, [pieces.end_token_id, *ids])
        assert each.logprobs == pytest.approx(by_hand, abs=1e-3)
        assert each.total == pytest.approx(sum(by_hand), abs=1e-3)
    assert score(nano, pieces, texts[0]) == found[:1]
    assert score(nano, pieces, []) == []


def test_scores_of_all_words_sum_to_one(of_bytes):
    model = tiny(of_bytes.vocab_size, 11)
    begun = of_bytes("ab")["input_ids"][0].tolist()
    last = [token_logprobs(model, [*begun, word])[-1] for word in range(of_bytes.vocab_size)]
    assert sum(map(math.exp, last)) == pytest.approx(1, abs=1e-4)


def test_perplexity_of_a_short_text_is_e_to_the_mean_loss(nano, pieces):
    text = "The ship sailed — far away."
    ids = [pieces.end_token_id, *pieces(text)["input_ids"][0].tolist()]
    losses = [-x for x in logprobs_by_hand(nano, ids)]
    found = perplexity(nano, pieces, text)
    assert found.tokens == len(losses) == len(ids) - 1
    assert found.nats == pytest.approx(sum(losses), abs=1e-3)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / len(text.encode()), rel=1e-4)
    assert found.nats == pytest.approx(-score(nano, pieces, text)[0].total, abs=1e-3)


WINDOW = 13


@pytest.mark.parametrize("stride", [1, 5, 6, WINDOW - 1, None])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 5, 2 * WINDOW, 71])
def test_each_token_of_a_long_text_is_scored_once_in_its_window(of_bytes, stride, batch_size, length):
    model = tiny(of_bytes.vocab_size, WINDOW)
    text = "".join(random.Random(length).choices("abcdefghij ", k=length))
    ids = [of_bytes.end_token_id, *of_bytes(text)["input_ids"][0].tolist()]
    assert len(ids) == length + 1
    by_hand = logprobs_by_hand(model, ids, stride)
    assert token_logprobs(model, ids, stride=stride, batch_size=batch_size) == pytest.approx(by_hand, abs=1e-4)
    found = perplexity(model, of_bytes, text, stride=stride, batch_size=batch_size)
    assert found.tokens == length
    assert found.nats == pytest.approx(-sum(by_hand), abs=1e-3)


def test_many_words_at_once_are_projected_in_parts(of_bytes):
    """More tokens in a batch than are projected together."""
    model, text = tiny(of_bytes.vocab_size, 61), "abc defg" * 200
    parts = perplexity(model, of_bytes, text, batch_size=1)
    assert perplexity(model, of_bytes, text, batch_size=64).nats == pytest.approx(parts.nats, rel=1e-5)


def test_a_smaller_stride_gives_more_context(nano, pieces):
    text = " ".join(TEXTS) * 12
    assert len(pieces(text)["input_ids"][0]) > 300
    assert perplexity(nano, pieces, text, stride=32).nats != perplexity(nano, pieces, text, stride=255).nats


def test_a_text_without_a_beginning_is_scored_from_its_second_token(words):
    """Bits for each byte of what was scored, as the tokenizer spells it."""
    model = tiny(words.vocab_size, 11)
    ids = words("The ship sailed on.")["input_ids"][0].tolist()
    losses = [-x for x in logprobs_by_hand(model, ids)]
    found = perplexity(model, words, "The ship sailed on.")
    assert found.tokens == 4
    assert found.nats == pytest.approx(sum(losses), abs=1e-4)
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / len("ship sailed on ."), rel=1e-4)


STRIDES = "expected 1 to 10, less than the model's 11 positions"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("ab", {"stride": 0}, f"stride = 0: {STRIDES}"),
        ("ab", {"stride": -3}, f"stride = -3: {STRIDES}"),
        ("ab", {"stride": 11}, f"stride = 11: {STRIDES}"),
        ("ab", {"stride": 2.5}, f"stride = 2.5: {STRIDES}"),
        ("ab", {"batch_size": 0}, "batch_size = 0: expected at least 1"),
        ("", {}, "text: expected at least one token to score after the first, got none"),
        (3, {}, "text: expected a str"),
        (["a", "b"], {}, "text: expected"),
        ([], {}, "text: expected"),
    ],
)
def test_perplexity_refuses_what_it_cannot_read(of_bytes, text, options, message):
    model = tiny(of_bytes.vocab_size, 11)
    with pytest.raises(InputError, match=re.escape(message)):
        perplexity(model, of_bytes, text, **options)


def test_texts_without_a_token_are_refused_by_their_name(words):
    """A tokenizer without an end: nothing but spaces is no token, and one token has none before it."""
    model = tiny(words.vocab_size, 11)
    for text in ("   ", "the", ""):
        with pytest.raises(InputError, match="text: expected at least one token to score after the first"):
            perplexity(model, words, text)
    assert [each.logprobs for each in score(model, words, ["", "the"])] == [[], []]
    assert score(model, words, ["   "])[0].logprobs == []


def test_tasks_need_no_gradients_and_leave_none(nano, pieces):
    nano.requires_grad_(True)
    generate(nano, pieces, "a", max_new_tokens=2)
    score(nano, pieces, "a b")
    assert all(parameter.grad is None for parameter in nano.parameters())
    assert inspect.isgenerator(nano.stream(pieces("a")["input_ids"], max_new_tokens=2))


@pytest.mark.parametrize("given", [False, True])
def test_texts_go_straight_to_their_vectors(given):
    model, tokenizer = hubmodels.bertModel("bert-nano"), hubmodels.bertTokenizer("bert-nano")
    texts = ["The ship sailed.", "A fair wind"]
    found = hubmodels.embed(hubmodels.accelerate(model), texts, tokenizer if given else None, pooling="first")
    assert float((found - tasks.embed(model, tokenizer, texts, pooling="first")).abs().max()) <= 1e-5


def test_the_tokenizer_of_a_model_is_its_checkpoints(tmp_path):
    masked = hubmodels.bertForMaskedLM("bert-nano")
    assert hubmodels.tokenizer_of(masked)("the ship")["input_ids"].tolist() == (
        hubmodels.bertTokenizer("bert-nano")("the ship")["input_ids"].tolist()
    )
    assert type(hubmodels.tokenizer_of(hubmodels.gpt("gpt-nano"))) is type(hubmodels.gptTokenizer("gpt-nano"))
    hubmodels.export(masked, tmp_path / "exported", tokenizer=hubmodels.bertTokenizer("bert-nano"))
    for weights in (tmp_path / "exported", tmp_path / "exported" / "model.safetensors"):
        for pretrained in (True, False):
            loaded = hubmodels.bertModel(weights, pretrained=pretrained)
            assert hubmodels.tokenizer_of(loaded).vocab_size == masked.config.vocab_size
    del masked.provenance
    with pytest.raises(InputError) as error:
        hubmodels.tokenizer_of(masked)
    assert str(error.value) == "tokenizer_of: this BertForMaskedLM is of no checkpoint with a tokenizer: give one"
