"""Generation against transformers, against a plain loop, and against trying everything; and what is refused."""

import itertools
import math
import re

import pytest
import torch
import transformers
from held import HeldTensor
from reference import distance, generator
from torch.nn.functional import cross_entropy
from transformers.generation import logits_process

from hubmodels import generation
from hubmodels.errors import InputError
from hubmodels.families import gpt, gpt2
from hubmodels.generation import Generated, GenerationOptions
from hubmodels.transformer import Decoder, Transformer

# Pairwise distinct, so that no swap of two sizes goes unseen. K = D / H = 6.
B, S, D, H, V, LAYERS, POSITIONS, INNER, NEW = 5, 9, 24, 4, 67, 3, 40, 44, 11
SIZES = {"vocab_size": V, "n_positions": POSITIONS, "n_embd": D, "n_layer": LAYERS, "n_head": H}
NAMES = ("gpt", "gpt2")
PADDINGS = ("right", "left", "interleaved")


# How far parameters are spread. Spread alike, a tied model says one word for ever: that of the last bias.
SPREAD = {"bias": 0.1, "ln_": 0.3, "attn": 2.0, "mlp": 0.6, "positions_embed": 3.0, "wpe": 3.0}


def pair(name, dtype=torch.float64, seed=1, std=0.4, **changes):
    """(ours, theirs), equal in every parameter, eval mode. changes: of the sizes."""
    sizes = {**SIZES, "bos_token_id": None, "eos_token_id": None, **changes}
    if name == "gpt":
        theirs = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))
        ours, config, family = gpt.Gpt, gpt.GptConfig, gpt.FAMILY
    else:
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_inner=INNER))
        ours, config, family = gpt2.Gpt2, gpt2.Gpt2Config, gpt2.FAMILY
    draw = generator(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            spread = next((value for part, value in SPREAD.items() if part in key), 1.0)
            parameter.normal_(0.0, std * spread, generator=draw)
            if "ln_" in key and key.endswith("weight"):
                parameter.add_(1.0)
    theirs = theirs.to(dtype).eval()
    model = ours(config.from_published(theirs.config.to_dict(), "a tiny one"))
    wanted = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    held = {key: HeldTensor(tensor.clone()) for key, tensor in theirs.state_dict().items()}
    loaded = family.keys.match(held, wanted, "a tiny one")
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval().requires_grad_(True), theirs


@pytest.fixture(autouse=True)
def packed_at_once(monkeypatch):
    """Short as these texts are, float32 and bfloat16 go the way of long ones."""
    monkeypatch.setattr(generation, "_WORTH_PACKING", 1)


@pytest.fixture(scope="module")
def pairs():
    return {name: pair(name) for name in NAMES}


@pytest.fixture(params=NAMES)
def both(request, pairs):
    return pairs[request.param]


@pytest.fixture
def model(both):
    return both[0]


def prompts_of(rows=B, length=S, words=V, seed=2):
    return torch.randint(0, words, (rows, length), generator=generator(seed))


def theirs_generate(theirs, ids, new, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)


def ids_of(found):
    return [each.ids for each in found]


def loop(model, ids, new, penalty=1.0):
    """One prompt, greedy, the whole text computed again for each token."""
    ids = list(ids)
    prompt = len(ids)
    for _ in range(new):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].tolist()
        for word in set(ids):
            scores[word] = scores[word] * penalty if scores[word] < 0 else scores[word] / penalty
        ids.append(max(range(len(scores)), key=scores.__getitem__))
    return ids[prompt:]


LENGTHS = (5, 9, 1, 3, 7)


def ragged(padding, seed=6):
    """Prompts of LENGTHS, as lists and as a padded batch; words like any other stand at the padding."""
    draw = generator(seed)
    rows = [torch.randint(0, V, (length,), generator=draw) for length in LENGTHS]
    width = max(LENGTHS) + 2
    ids, mask = torch.randint(0, V, (len(rows), width), generator=draw), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        if padding == "right":
            places = torch.arange(len(row))
        elif padding == "left":
            places = torch.arange(width - len(row), width)
        else:
            places = torch.randperm(width, generator=draw)[: len(row)].sort().values
        ids[number, places], mask[number, places] = row, 1
    return rows, ids, mask


# Greedy


def test_greedy_equals_transformers(both):
    ours, theirs = both
    ids = prompts_of()
    expected = theirs_generate(theirs, ids, NEW)[:, S:].tolist()
    assert len({tuple(row) for row in expected}) == B  # a model that says one thing for ever would tell little
    assert min(len(set(row)) for row in expected) > 1
    found = ours.generate(ids, max_new_tokens=NEW)
    assert found == [Generated(row, False, None) for row in expected]


@pytest.mark.parametrize("length", [1, 2, S])
def test_greedy_equals_a_loop_without_a_cache(model, length):
    for row in prompts_of(3, length):
        assert ids_of(model.generate(row[None], max_new_tokens=NEW)) == [loop(model, row.tolist(), NEW)]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "repetition_penalty": 1.4, "length_penalty": 0.3, "stop_ids": (15, 19, 26)},
    ],
    ids=["greedy", "penalty", "beams", "beams_penalty_stops"],
)
def test_prompts_of_different_lengths_together_equal_one_by_one(model, padding, options):
    rows, ids, mask = ragged(padding)
    together = model.generate(ids, mask, max_new_tokens=NEW, **options)
    alone = [found for row in rows for found in model.generate(row[None], max_new_tokens=NEW, **options)]
    assert [(f.ids, f.ended) for f in together] == [(f.ids, f.ended) for f in alone]
    for left, right in zip(together, alone, strict=True):
        assert left.score == pytest.approx(right.score, abs=1e-4)


@pytest.mark.parametrize("padding", PADDINGS)
def test_what_stands_in_padding_has_no_effect(model, padding):
    _, ids, mask = ragged(padding)
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.7}
    before = model.generate(ids, mask, **options)
    assert model.generate(torch.where(mask == 0, (ids + 11) % V, ids), mask, **options) == before


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_dtype_works(model, dtype):
    _, ids, mask = ragged("left")
    assert model.generate(ids, mask.to(dtype), max_new_tokens=3) == model.generate(ids, mask, max_new_tokens=3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_whole_numbers_work(model, dtype):
    ids, options = prompts_of(2), {"max_new_tokens": 3, "repetition_penalty": 1.3}
    assert model.generate(ids.to(dtype), **options) == model.generate(ids, **options)


def test_a_prompt_that_is_a_view_works(model):
    ids = prompts_of(S, B).t()
    assert not ids.is_contiguous()
    assert model.generate(ids, max_new_tokens=3) == model.generate(ids.contiguous(), max_new_tokens=3)


# Beams


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.5])
@pytest.mark.parametrize("stops", [False, True], ids=["no_stop", "stops"])
def test_beam_search_equals_transformers(both, length_penalty, stops):
    ours, theirs = both
    beams, ids = 4, prompts_of(3)
    free = ours.generate(ids, max_new_tokens=NEW, num_beams=beams)
    stop_ids = (free[0].ids[4], free[1].ids[2], free[2].ids[-1]) if stops else ()
    expected = theirs_generate(
        theirs,
        ids,
        NEW,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=length_penalty,
        early_stopping="never",
        eos_token_id=list(stop_ids) or None,
        pad_token_id=V - 1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = ours.generate(
        ids,
        max_new_tokens=NEW,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=length_penalty,
        stop_ids=stop_ids,
    )
    assert len(found) == 3 * beams
    rows = zip(found, expected.sequences[:, S:].tolist(), expected.sequences_scores.tolist(), strict=True)
    for each, ids, score in rows:
        assert each.ids == ids[: len(each.ids)]
        assert set(ids[len(each.ids) :]) <= {V - 1}
        assert each.score == pytest.approx(score, abs=1e-4)
        assert each.ended == (each.ids[-1] in stop_ids)
    if length_penalty <= 1:  # above it long texts win
        assert any(each.ended for each in found) == stops


@pytest.mark.parametrize("length_penalty", [1.0, 0.7, 0.0, -1.0])
@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search_with_many_stops_equals_transformers(both, beams, length_penalty):
    """Every third word ends a text."""
    ours, theirs = both
    ids, stop_ids = prompts_of(20, 4), list(range(0, V, 3))
    options = {"num_beams": beams, "length_penalty": length_penalty}
    expected = theirs_generate(
        theirs, ids, NEW, early_stopping="never", eos_token_id=stop_ids, pad_token_id=V - 2, **options
    )[:, 4:].tolist()
    found = ours.generate(ids, max_new_tokens=NEW, stop_ids=stop_ids, **options)
    assert len({len(each.ids) for each in found}) > 1
    for each, row in zip(found, expected, strict=True):
        assert each.ids == row[: len(each.ids)]
        assert set(row[len(each.ids) :]) <= {V - 2}


@pytest.mark.parametrize(
    ("length_penalty", "worst", "is_over"),
    [
        (1.0, -0.5, False),  # a beginning of -4 may end at -4 / 10
        (1.0, -0.3, True),
        (2.0, -0.05, False),  # or at -4 / 10 ** 2
        (2.0, -0.03, True),
        (0.0, -4.5, False),
        (0.0, -3.5, True),
        (-1.0, -13.0, False),  # the next word is the best place to end: -4 * 3
        (-1.0, -11.0, True),
    ],
)
def test_a_search_goes_on_while_a_beginning_may_still_win(length_penalty, worst, is_over):
    options = GenerationOptions(max_new_tokens=10, num_beams=2, length_penalty=length_penalty)
    search = generation._Beams(options, None)
    search.running = [(-4.0, [1, 2]), (-5.0, [1, 3])]
    search.over = [Generated([7], True, -0.001)]
    assert not search.is_over()  # fewer than beams
    search.over.append(Generated([8], True, worst))
    assert search.is_over() == is_over


def test_beam_search_with_a_repetition_penalty_equals_transformers(both):
    ours, theirs = both
    ids, beams = prompts_of(3), 3
    options = {"num_beams": beams, "num_return_sequences": beams, "repetition_penalty": 1.6}
    expected = theirs_generate(theirs, ids, NEW, early_stopping="never", **options)[:, S:].tolist()
    assert ids_of(ours.generate(ids, max_new_tokens=NEW, **options)) == expected


WORDS, STEPS = 5, 4


def every_text(model, prompt, stop_ids, length_penalty):
    """(score, ids, ended) of all texts of at most STEPS words, best first."""
    texts, found = list(itertools.product(range(WORDS), repeat=STEPS)), {}
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt, *words] for words in texts])).logits.log_softmax(-1)
    of_words = logprobs[:, len(prompt) - 1 : -1].gather(2, torch.tensor(texts)[:, :, None])[:, :, 0].tolist()
    for words, each in zip(texts, of_words, strict=True):
        ends = [place for place, word in enumerate(words) if word in stop_ids]
        kept = words[: ends[0] + 1] if ends else words
        found[kept] = (sum(each[: len(kept)]) / len(kept) ** length_penalty, list(kept), bool(ends))
    return sorted(found.values(), key=lambda each: -each[0])


@pytest.fixture(scope="module")
def tiny_vocabulary():
    return pair("gpt2", vocab_size=WORDS, n_positions=12, std=0.3)[0]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -2.0, 3.0])
@pytest.mark.parametrize("stop_ids", [(), (2,), (0, 4)])
def test_beams_enough_for_everything_find_the_best(tiny_vocabulary, length_penalty, stop_ids):
    prompt, beams = [1, 3, 0], WORDS ** (STEPS - 1)
    expected = every_text(tiny_vocabulary, prompt, stop_ids, length_penalty)[:20]
    found = tiny_vocabulary.generate(
        torch.tensor([prompt]),
        max_new_tokens=STEPS,
        num_beams=beams,
        num_return_sequences=20,
        length_penalty=length_penalty,
        stop_ids=stop_ids,
    )
    assert [(each.ids, each.ended) for each in found] == [(ids, ended) for _, ids, ended in expected]
    assert [each.score for each in found] == pytest.approx([score for score, _, _ in expected], abs=1e-4)


def test_length_penalty_favours_long_texts(tiny_vocabulary):
    def lengths(penalty):
        options = {"num_beams": 30, "num_return_sequences": 8, "stop_ids": (2,), "length_penalty": penalty}
        found = tiny_vocabulary.generate(torch.tensor([[1, 3, 0]]), max_new_tokens=STEPS, **options)
        return sum(len(each.ids) for each in found)

    assert lengths(-4.0) < lengths(4.0)


def test_beams_come_best_first_and_are_different(model):
    found = model.generate(prompts_of(), max_new_tokens=NEW, num_beams=6, num_return_sequences=6, stop_ids=(3, 40))
    for row in range(B):
        scores = [each.score for each in found[row * 6 : row * 6 + 6]]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(each.ids) for each in found[row * 6 : row * 6 + 6]}) == 6


def test_the_number_of_returned_beams_does_not_change_them(model):
    options = {"max_new_tokens": NEW, "num_beams": 5, "stop_ids": (3, 40)}
    most = model.generate(prompts_of(1), num_return_sequences=5, **options)
    for count in (1, 2, 4):
        assert model.generate(prompts_of(1), num_return_sequences=count, **options) == most[:count]


def test_a_beam_of_one_is_greedy(model):
    ids = prompts_of()
    assert model.generate(ids, max_new_tokens=NEW, num_beams=1) == model.generate(ids, max_new_tokens=NEW)


def test_a_callback_ends_beams(tiny_vocabulary):
    """The same as stop ids, where it says the same."""
    options = {"max_new_tokens": STEPS, "num_beams": 20, "num_return_sequences": 9}
    prompt = torch.tensor([[1, 3, 0]])
    found = tiny_vocabulary.generate(prompt, ending=lambda ids: ids[-1] == 2, **options)
    assert any(each.ended for each in found)
    assert found == tiny_vocabulary.generate(prompt, stop_ids=[2], **options)


def test_more_texts_than_there_are_cannot_be_returned(tiny_vocabulary):
    """One word of five: fewer results than asked for would belong to nobody knows which prompt."""
    prompts = torch.tensor([[1, 3, 0], [2, 2, 4]])
    with pytest.raises(InputError, match="num_return_sequences = 8: "):
        tiny_vocabulary.generate(prompts, max_new_tokens=1, num_beams=8, num_return_sequences=8)
    assert len(tiny_vocabulary.generate(prompts, max_new_tokens=1, num_beams=8, num_return_sequences=5)) == 10


# Cuts and draws


def scores_of(rows=40, seed=9):
    scores = torch.randn(rows, V, generator=generator(seed)) * 3
    scores[::4, 10:20] = scores[::4, :1]  # ties
    return scores


WARPERS = [
    ("top_k", 1, logits_process.TopKLogitsWarper),
    ("top_k", 7, logits_process.TopKLogitsWarper),
    ("top_k", V + 5, logits_process.TopKLogitsWarper),
    ("top_p", 0.01, logits_process.TopPLogitsWarper),
    ("top_p", 0.37, logits_process.TopPLogitsWarper),
    ("top_p", 0.9, logits_process.TopPLogitsWarper),
    ("top_p", 1.0, logits_process.TopPLogitsWarper),
    ("min_p", 0.0, logits_process.MinPLogitsWarper),
    ("min_p", 0.08, logits_process.MinPLogitsWarper),
    ("min_p", 1.0, logits_process.MinPLogitsWarper),
]


@pytest.mark.parametrize(("option", "value", "warper"), WARPERS)
def test_each_cut_equals_transformers(option, value, warper):
    scores = scores_of().double()
    if option == "top_p":  # of equally likely words at the border either side keeps others
        scores = torch.randn(40, V, generator=generator(10), dtype=torch.float64) * 3
    found = generation._cut(scores, GenerationOptions(temperature=1.0, **{option: value}))
    assert torch.equal(found, warper(value)(None, scores))
    assert found.isfinite().any(1).all()


def test_the_cuts_one_after_the_other_equal_transformers():
    scores = torch.randn(40, V, generator=generator(11), dtype=torch.float64) * 3
    expected = logits_process.TopKLogitsWarper(9)(None, scores)
    expected = logits_process.TopPLogitsWarper(0.8)(None, expected)
    expected = logits_process.MinPLogitsWarper(0.1)(None, expected)
    found = generation._cut(scores, GenerationOptions(temperature=1.0, top_k=9, top_p=0.8, min_p=0.1))
    assert torch.equal(found, expected)
    assert 1 < found.isfinite().sum(1).double().mean() < 9


@pytest.mark.parametrize("penalty", [0.4, 1.0, 1.7])
def test_the_repetition_penalty_equals_transformers(penalty):
    scores, seen = scores_of(), prompts_of(40, 8)
    assert (scores.gather(1, seen) > 0).any()
    assert (scores.gather(1, seen) < 0).any()
    found = generation._penalised(scores, seen, penalty)
    assert torch.equal(found, logits_process.RepetitionPenaltyLogitsProcessor(penalty)(seen, scores))


def test_greedy_with_a_repetition_penalty_equals_transformers_and_a_loop(both):
    ours, theirs = both
    ids = prompts_of(3)
    found = ids_of(ours.generate(ids, max_new_tokens=NEW, repetition_penalty=1.9))
    assert found != ids_of(ours.generate(ids, max_new_tokens=NEW))
    assert found == theirs_generate(theirs, ids, NEW, repetition_penalty=1.9)[:, S:].tolist()
    assert found == [loop(ours, row.tolist(), NEW, 1.9) for row in ids]


DRAWS = 20_000


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"temperature": 0.6, "repetition_penalty": 1.5},
        {"temperature": 1.5, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 1.5, "min_p": 0.1},
    ],
    ids=lambda options: "-".join(options),
)
def test_words_are_drawn_as_often_as_they_are_likely(options):
    model, _ = pair("gpt2", std=0.25)
    prompt = prompts_of(1)
    drawn = model.generate(prompt, max_new_tokens=1, num_return_sequences=DRAWS, seed=7, **options)
    counts = torch.bincount(torch.tensor([ids[0] for ids, _, _ in drawn]), minlength=V)
    with torch.no_grad():
        scores = model(prompt).logits[:, -1]
    penalty = logits_process.RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))
    scores = logits_process.TemperatureLogitsWarper(options["temperature"])(None, penalty(prompt, scores))
    for option, warper in {option: warper for option, _, warper in WARPERS}.items():
        if option in options:
            scores = warper(options[option])(None, scores)
    likely = scores.softmax(-1)[0]
    assert 1 < (counts > 0).sum() <= V
    assert not counts[likely == 0].any()
    tolerance = 5 * (DRAWS * likely * (1 - likely)).sqrt() + 2
    assert ((counts - DRAWS * likely).abs() <= tolerance).all()


def test_a_seed_draws_the_same_words_again_and_another_seed_others(model):
    ids, options = prompts_of(), {"temperature": 1.5, "max_new_tokens": NEW}
    first = model.generate(ids, seed=3, **options)
    assert model.generate(ids, seed=3, **options) == first
    assert model.generate(ids, seed=4, **options) != first
    assert model.generate(ids, seed=-1, **options) != first


def test_without_a_seed_draws_differ(model):
    ids, options = prompts_of(), {"temperature": 3.0, "max_new_tokens": NEW}
    torch.manual_seed(0)
    first = model.generate(ids, **options)
    torch.manual_seed(0)
    assert model.generate(ids, **options) != first


def test_drawing_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model.generate(prompts_of(), temperature=1.0, seed=3, max_new_tokens=3)
    model.generate(prompts_of(), temperature=1.0, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_of_a_prompt_differ_and_stand_together(model):
    ids = prompts_of(3)
    found = model.generate(ids, temperature=2.0, num_return_sequences=4, max_new_tokens=NEW, seed=1)
    assert len(found) == 12
    for row in range(3):
        assert len({tuple(each.ids) for each in found[row * 4 : row * 4 + 4]}) == 4
    # With one word to draw from, every sample is what greedy search says of its own prompt.
    certain = model.generate(ids, temperature=2.0, top_k=1, num_return_sequences=4, max_new_tokens=NEW)
    greedy = model.generate(ids, max_new_tokens=NEW)
    assert certain == [each for each in greedy for _ in range(4)]


def test_little_temperature_is_greedy(model):
    ids = prompts_of()
    assert model.generate(ids, temperature=1e-6, max_new_tokens=NEW) == model.generate(ids, max_new_tokens=NEW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e300])
def test_any_temperature_draws_something(temperature, dtype):
    model, _ = pair("gpt2", dtype)
    found = model.generate(prompts_of(), temperature=temperature, max_new_tokens=2, seed=0)
    assert all(len(each.ids) == 2 for each in found)


# Ends


def stops_of_some(rows):
    """Two words that some rows say, not as their first, and others do not."""
    first = {row[0] for row in rows}
    some = [word for word in range(V) if word not in first and any(word in row for row in rows)]
    found = next(
        pair
        for pair in itertools.combinations(some, 2)
        if len({min((row.index(word) for word in pair if word in row), default=None) for row in rows}) > 2
        and any(not set(pair) & set(row) for row in rows)
    )
    return list(found)


@pytest.mark.parametrize("padding", [None, *PADDINGS])
def test_rows_end_at_their_own_stop_and_leave_the_others_as_they_are(model, padding):
    ids, mask = (prompts_of(8), None) if padding is None else ragged(padding)[1:]
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.3}
    free = ids_of(model.generate(ids, mask, **options))
    stops = stops_of_some(free)
    found = model.generate(ids, mask, stop_ids=stops, **options)
    for each, whole in zip(found, free, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stops]
        assert each.ids == (whole[: ends[0] + 1] if ends else whole)
        assert each.ended == bool(ends)


def test_a_stop_in_the_last_place_ends_the_row(model):
    ids = prompts_of(1)
    free = ids_of(model.generate(ids, max_new_tokens=NEW))[0]
    length = next(n for n in range(2, NEW) if free[n - 1] not in free[: n - 1])
    found = model.generate(ids, max_new_tokens=length, stop_ids=[free[length - 1]])
    assert found == [Generated(free[:length], True)]


def test_a_stop_in_the_prompt_ends_nothing(model):
    ids = prompts_of(1)
    free = model.generate(ids, max_new_tokens=NEW)
    absent = next(token for token in ids[0].tolist() if token not in free[0].ids)
    assert model.generate(ids, max_new_tokens=NEW, stop_ids=[absent]) == free


def test_a_callback_is_given_a_rows_own_new_ids(model):
    ids, given = prompts_of(3), []

    def ending(new):
        given.append(list(new))
        return len(new) == 4 and new == free[1][:4]

    free = ids_of(model.generate(ids, max_new_tokens=NEW))
    found = model.generate(ids, max_new_tokens=NEW, ending=ending)
    assert found == [Generated(free[0], False), Generated(free[1][:4], True), Generated(free[2], False)]
    lengths = (NEW, 4, NEW)
    expected = [row[:n] for row, whole in zip(free, lengths, strict=True) for n in range(1, whole + 1)]
    assert sorted(given) == sorted(expected)


@pytest.mark.parametrize("new", [1, 2, NEW])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0}], ids=["greedy", "beams", "drawn"])
def test_as_many_tokens_as_asked_for(model, new, options):
    assert {len(each.ids) for each in model.generate(prompts_of(), max_new_tokens=new, **options)} == {new}


def test_fifty_tokens_if_nothing_is_said():
    model, _ = pair("gpt", n_positions=61)
    assert len(model.generate(prompts_of(1))[0].ids) == 50


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_position_table_can_be_used_to_the_end_and_no_further(both, options):
    ours, theirs = both
    ids = prompts_of(2)
    found = ids_of(ours.generate(ids, max_new_tokens=POSITIONS - S, **options))
    assert [len(row) for row in found] == [POSITIONS - S] * 2
    expected = theirs_generate(theirs, ids, POSITIONS - S, **options, early_stopping="never" if options else None)
    assert found == expected[:, S:].tolist()
    message = (
        f"prompt of {S} tokens and max_new_tokens = {POSITIONS - S + 1}: together {POSITIONS + 1}, but this model has "
        f"positions for {POSITIONS}; shorten the prompt or ask for at most {POSITIONS - S}"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        ours.generate(ids, max_new_tokens=POSITIONS - S + 1, **options)


def test_padding_takes_no_room(model):
    """Padded far beyond the table: the words alone count."""
    ids, mask = torch.zeros(2, 3 * POSITIONS, dtype=torch.long), torch.zeros(2, 3 * POSITIONS)
    ids[:, ::20], mask[:, ::20] = prompts_of(2, 6), 1
    found = model.generate(ids, mask, max_new_tokens=POSITIONS - 6)
    assert found == model.generate(prompts_of(2, 6), max_new_tokens=POSITIONS - 6)


# What is computed


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "num_return_sequences": 2}], ids=str)
def test_the_prompt_is_computed_once_and_then_a_token_a_row(model, monkeypatch, options):
    shapes, encode = [], Transformer.encode

    def counted(self, input_ids, *args, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return encode(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "encode", counted)
    model.generate(prompts_of(), max_new_tokens=NEW, **options)
    rows = B * options.get("num_beams", options.get("num_return_sequences", 1))
    assert shapes == [(B, S)] + [(rows, 1)] * (NEW - 1)  # nothing looks at what the last token leads to


def test_rows_that_are_over_are_computed_no_more(model, monkeypatch):
    ids = prompts_of()
    free = ids_of(model.generate(ids, max_new_tokens=NEW))
    rows, encode = [], Transformer.encode

    def counted(self, input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return encode(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "encode", counted)
    found = model.generate(ids, max_new_tokens=NEW, ending=lambda new: new in (free[0][:3], free[1][:5]))
    longest = [len(each.ids) for each in found]
    assert rows == [B] + [sum(length > step for length in longest) for step in range(1, NEW)]
    rows.clear()
    model.generate(ids, max_new_tokens=NEW, ending=lambda new: len(new) == 2)
    assert rows == [B, B]


def test_only_the_last_place_of_a_prompt_is_projected_on_the_vocabulary(model, monkeypatch):
    counts, word_scores = [], type(model).word_scores

    def counted(self, states):
        counts.append(len(states))
        return word_scores(self, states)

    monkeypatch.setattr(type(model), "word_scores", counted)
    model.generate(*ragged("left")[1:], max_new_tokens=4)
    assert counts == [len(LENGTHS)] * 4


def test_the_cache_stays_where_it_is(model, monkeypatch):
    caches, new_cache = [], Decoder.new_cache

    def kept(self, *args):
        caches.append(new_cache(self, *args))
        return caches[-1]

    monkeypatch.setattr(Decoder, "new_cache", kept)
    places, lengths = [], []
    for row, _, _ in model.stream(prompts_of(), max_new_tokens=NEW):
        if row == 0:
            places.append([part.data_ptr() for part in (*caches[0].keys, *caches[0].values)])
            lengths.append(caches[0].length)
    assert len(caches) == 1
    assert len(places) == NEW
    assert all(each == places[0] for each in places)
    assert lengths == list(range(S, S + NEW))
    assert caches[0].keys[0].shape == (B, H, S + NEW - 1, D // H)


# Streams


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.4}, {"temperature": 1.5, "seed": 3, "num_return_sequences": 2}],
    ids=["greedy", "penalty", "drawn"],
)
def test_a_stream_yields_the_tokens_of_generate(model, options):
    ids = prompts_of()
    free = ids_of(model.generate(ids, max_new_tokens=NEW, **options))
    options = {**options, "stop_ids": (free[0][4], free[1][2]), "max_new_tokens": NEW}
    found = model.generate(ids, **options)
    rows = [[] for _ in found]
    ended = [False] * len(found)
    for row, token, is_end in model.stream(ids, **options):
        assert not ended[row]
        rows[row].append(token)
        ended[row] = is_end
    assert [Generated(*each) for each in zip(rows, ended, strict=True)] == found
    assert any(ended)


def test_a_stream_computes_a_token_when_it_is_asked_for(model, monkeypatch):
    calls, encode = [], Transformer.encode
    monkeypatch.setattr(Transformer, "encode", lambda self, *a, **k: calls.append(1) or encode(self, *a, **k))
    tokens = model.stream(prompts_of(1), max_new_tokens=NEW)
    for number in range(1, 4):
        next(tokens)
        assert len(calls) == number


def test_a_stream_may_be_left(model):
    """Nothing of it lasts: no mode, no state in the model."""
    expected = model.generate(prompts_of(), max_new_tokens=NEW)
    left = [model.stream(prompts_of(), max_new_tokens=NEW) for _ in range(3)]
    next(left[0])
    next(left[1]), next(left[1])
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    left[1].close()
    del left
    assert model.generate(prompts_of(), max_new_tokens=NEW) == expected


def test_two_streams_at_once_do_not_mix(model):
    first, second = prompts_of(2, seed=2), prompts_of(2, seed=3)
    expected = [list(model.stream(ids, max_new_tokens=NEW)) for ids in (first, second)]
    assert expected[0] != expected[1]
    together = zip(*(model.stream(ids, max_new_tokens=NEW) for ids in (first, second)), strict=True)
    assert [list(tokens) for tokens in zip(*together, strict=True)] == expected


def test_whoever_reads_a_stream_may_train_between_two_tokens(model):
    """The mode of generation is its own: gradients work between its tokens."""
    for _ in model.stream(prompts_of(1), max_new_tokens=3):
        weight = torch.ones(2, requires_grad=True)
        (weight * 2).sum().backward()
        assert weight.grad.tolist() == [2, 2]


# The model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 0}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_generation_works_in_other_dtypes(name, dtype, options):
    model, _ = pair(name, dtype)
    _, ids, mask = ragged("left")
    found = model.generate(ids, mask, max_new_tokens=NEW, **options)
    assert [len(each.ids) for each in found] == [NEW] * len(LENGTHS)
    assert {token for each in found for token in each.ids} <= set(range(V))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_in_half_precision_the_first_word_is_among_the_likeliest(name, dtype):
    exact, _ = pair(name)
    rough, _ = pair(name, dtype)
    ids = prompts_of(20)
    with torch.no_grad():
        scores = exact(ids).logits[:, -1]
    chosen = torch.tensor(ids_of(rough.generate(ids, max_new_tokens=1)))
    lost = scores.amax(1) - scores.gather(1, chosen)[:, 0]
    assert lost.max() <= 0.1 * (scores.amax(1) - scores.amin(1)).min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_generation_changes_nothing_of_the_model(name, dtype):
    model, _ = pair(name, dtype)
    model.transformer.layers[1].requires_grad_(False)
    model.transformer.embeddings.word.weight.grad = torch.ones_like(model.transformer.embeddings.word.weight)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = {key: (id(p), p.requires_grad, p.grad is None) for key, p in model.named_parameters()}
    modules = [(key, id(module), module.training) for key, module in model.named_modules()]
    for options in ({}, {"num_beams": 2}, {"temperature": 1.0}):
        model.generate(prompts_of(), max_new_tokens=3, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {key: (id(p), p.requires_grad, p.grad is None) for key, p in model.named_parameters()} == flags
    assert [(key, id(module), module.training) for key, module in model.named_modules()] == modules


@pytest.mark.parametrize("name", NAMES)
def test_gradient_modes_do_not_matter(name):
    model, _ = pair(name, torch.float32)
    expected = model.generate(prompts_of(), max_new_tokens=NEW)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert model.generate(prompts_of(), max_new_tokens=NEW) == expected
    model.requires_grad_(False)
    assert model.generate(prompts_of(), max_new_tokens=NEW) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_model_can_be_trained_after_it_generated(name):
    model, _ = pair(name, torch.float32)
    ids = prompts_of()
    model.generate(ids, max_new_tokens=3)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_learned_is_used_at_once(name, dtype):
    model, _ = pair(name, dtype)
    ids, wanted = prompts_of(1), 13
    assert model.generate(ids, max_new_tokens=1)[0].ids != [wanted]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(50):
        loss = cross_entropy(model(ids).logits[:, -1], torch.tensor([wanted]))
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.1
    assert model.generate(ids, max_new_tokens=1)[0].ids == [wanted]


def test_a_double_heads_model_generates_as_a_language_model():
    plain, _ = pair("gpt", torch.float32)
    model = gpt.GptDoubleHeads(plain.config)
    model.load_state_dict({**plain.state_dict(), "choice.weight": torch.ones(1, D), "choice.bias": torch.ones(1)})
    ids = prompts_of()
    assert model.eval().generate(ids, max_new_tokens=NEW) == plain.generate(ids, max_new_tokens=NEW)


@pytest.mark.parametrize("name", NAMES)
def test_generation_works_under_autocast(name):
    model, _ = pair(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert [len(each.ids) for each in model.generate(prompts_of(), max_new_tokens=3)] == [3] * B


def test_one_layer_one_head_one_row_one_token():
    ours, theirs = pair("gpt2", n_layer=1, n_head=1)
    ids = prompts_of(1, 1)
    assert ids_of(ours.generate(ids, max_new_tokens=NEW)) == theirs_generate(theirs, ids, NEW)[:, 1:].tolist()


def test_beams_of_a_model_that_is_certain():
    """All probability on one word: the other beams' logarithms are minus infinity or near it, and no score is nan."""
    model, _ = pair("gpt2", torch.float32)
    with torch.no_grad():
        model.transformer.norm.weight.mul_(1e4)
    found = model.generate(prompts_of(2), max_new_tokens=4, num_beams=3, num_return_sequences=3)
    assert len(found) == 6
    assert all(math.isfinite(each.score) for each in found)


# What is refused


def test_a_list_of_stop_ids_may_be_any_collection(model):
    ids = prompts_of()
    stop = model.generate(ids, max_new_tokens=NEW)[0].ids[2]
    expected = model.generate(ids, max_new_tokens=NEW, stop_ids=[stop])
    for stop_ids in ((stop,), {stop}, range(stop, stop + 1)):
        assert model.generate(ids, max_new_tokens=NEW, stop_ids=stop_ids) == expected


WHOLE = "expected a whole number, at least 1"
BAD_OPTIONS = [
    *[({name: value}, f"{name} = {value!r}: {WHOLE}") for name in ("max_new_tokens", "num_beams") for value in (0, -1)],
    *[({"num_return_sequences": value}, f"num_return_sequences = {value!r}: {WHOLE}") for value in (0, True, 2.0, "2")],
    *[({"max_new_tokens": value}, f"max_new_tokens = {value!r}: {WHOLE}") for value in (True, 5.0, "5", None)],
    *[({"num_beams": value}, f"num_beams = {value!r}: {WHOLE}") for value in (True, 2.0, None)],
    *[
        ({"temperature": value}, f"temperature = {value!r}: expected 0 (greedy) or a number above it")
        for value in (-0.1, math.nan, math.inf, "1", None)
    ],
    *[
        ({"temperature": 1.0, "top_k": value}, f"top_k = {value!r}: expected a whole number above 0")
        for value in (0, -3, 2.0, True, "5")
    ],
    *[
        ({"temperature": 1.0, "top_p": value}, f"top_p = {value!r}: expected a probability, 0 < top_p <= 1")
        for value in (0, 0.0, 1.5, -0.5, math.nan, "0.5")
    ],
    *[
        ({"temperature": 1.0, "min_p": value}, f"min_p = {value!r}: expected a fraction, 0 <= min_p <= 1")
        for value in (-0.1, 1.1, math.nan, "0.5")
    ],
    *[
        (
            {"repetition_penalty": value},
            f"repetition_penalty = {value!r}: expected a number from 0.001 to 1000; 1 is none",
        )
        for value in (0, -1.0, math.nan, math.inf, None)
    ],
    *[
        ({"num_beams": 2, "length_penalty": value}, f"length_penalty = {value!r}: expected a number")
        for value in (math.nan, math.inf, -math.inf, None)
    ],
    *[({"seed": value}, f"seed = {value!r}: expected") for value in ("a", 1.5, 10**20)],
    *[({"stop_ids": value}, f"stop_ids = {value!r}: expected") for value in (5, None, "ab")],
    ({"top_k": 5}, "top_k: given without temperature; set temperature=1.0 to draw words"),
    ({"top_p": 0.5, "min_p": 0.1}, "top_p, min_p: given without temperature; set temperature=1.0 to draw words"),
    ({"num_beams": 2, "top_p": 0.5}, "top_p: given without temperature"),
    (
        {"num_beams": 3, "temperature": 0.7},
        "num_beams = 3 with temperature = 0.7: beams search for the likeliest text and draw nothing; set one of the",
    ),
    (
        {"num_return_sequences": 2},
        "num_return_sequences = 2: greedy search has one result and beam search num_beams, here 1; set temperature",
    ),
    ({"num_return_sequences": 4, "num_beams": 3}, "num_return_sequences = 4: greedy search has one result and beam"),
    ({"do_sample": True, "max_length": 5}, "unknown option do_sample, max_length; options are length_penalty, max_new"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_bad_options_are_refused(pairs, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        pairs["gpt2"][0].generate(prompts_of(), **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS[:4])
def test_bad_options_are_refused_by_a_stream_before_its_first_token(pairs, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        pairs["gpt2"][0].stream(prompts_of(), **options)


@pytest.mark.parametrize("length_penalty", [1e4, -1e4])
def test_an_absurd_length_penalty_is_refused(pairs, length_penalty):
    with pytest.raises(InputError, match=f"length_penalty = {length_penalty}"):
        pairs["gpt2"][0].generate(prompts_of(), max_new_tokens=3, num_beams=2, length_penalty=length_penalty)


BEGIN = "begin with one, such as tokenizer.end_token_id"
BAD_PROMPTS = [
    (torch.zeros(2, 0, dtype=torch.long), None, f"prompt: row 0 has no token to go on from; {BEGIN}"),
    (torch.zeros(0, 4, dtype=torch.long), None, f"prompt: there is no token to go on from; {BEGIN}"),
    (
        torch.ones(3, 4, dtype=torch.long),
        torch.tensor([[1] * 4, [0] * 4, [1] * 4]),
        f"prompt: row 1 has no token to go on from; {BEGIN}",
    ),
    (torch.tensor([[1, V]]), None, f"input_ids: {V} is out of range; the vocabulary has {V} entries, 0 to {V - 1}"),
    (torch.tensor([[-1, 2]]), None, "input_ids: -1 is out of range"),
    (torch.ones(2, 3), None, "input_ids: expected ids [B, S], got torch.float32 of shape (2, 3)"),
    (torch.ones(2, 3, D), None, f"input_ids: expected ids [B, S], got torch.float32 of shape (2, 3, {D})"),
    (torch.ones(2, 3, dtype=torch.bool), None, "input_ids: expected ids [B, S], got torch.bool of shape (2, 3)"),
    (torch.ones(4, dtype=torch.long), None, "input_ids: expected ids [B, S], got torch.int64 of shape (4,)"),
    ([[1, 2]], None, "input_ids: expected ids [B, S], got list"),
    (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4), "attention_mask: expected (2, 3), got (2, 4)"),
    (torch.ones(2, 3, dtype=torch.long), torch.ones(3), "attention_mask: expected (2, 3), got (3,)"),
    (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, 3), "attention_mask: expected (2, 3), got (2, 3, 3)"),
    (
        torch.ones(1, POSITIONS + 1, dtype=torch.long),
        None,
        f"prompt of {POSITIONS + 1} tokens and max_new_tokens = 3: together {POSITIONS + 4}, but this model has "
        f"positions for {POSITIONS}; shorten the prompt",
    ),
]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize(("ids", "mask", "message"), BAD_PROMPTS, ids=[message[:45] for _, _, message in BAD_PROMPTS])
def test_bad_prompts_are_refused(pairs, ids, mask, message, options):
    with pytest.raises(InputError, match=re.escape(message)):
        pairs["gpt2"][0].generate(ids, mask, max_new_tokens=3, **options)


def test_an_id_out_of_range_in_padding_is_no_matter(model):
    """What stands in padding is never looked at: -100 there is usual."""
    _, ids, mask = ragged("right")
    expected = model.generate(ids, mask, max_new_tokens=3, repetition_penalty=1.2)
    filled = ids.masked_fill(mask == 0, -100)
    assert model.generate(filled, mask, max_new_tokens=3, repetition_penalty=1.2) == expected


def test_a_stream_of_beams_is_refused(model):
    message = "num_beams = 2: beams are known only when the search is over; use generate"
    with pytest.raises(InputError, match=re.escape(message)):
        list(model.stream(prompts_of(), num_beams=2))


def test_a_bad_prompt_does_not_spoil_the_next(model):
    expected = model.generate(prompts_of(), max_new_tokens=3)
    with pytest.raises(InputError, match="out of range"):
        model.generate(prompts_of() + V, max_new_tokens=3)
    assert model.generate(prompts_of(), max_new_tokens=3) == expected


def test_the_scores_of_beams_are_log_probabilities(model):
    """Of one beam's text, computed at once: their sum over its length."""
    ids = prompts_of(1)
    [found] = model.generate(ids, max_new_tokens=NEW, num_beams=4)
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor([found.ids])], 1)).logits[0, S - 1 : -1]
    total = -cross_entropy(logits, torch.tensor(found.ids), reduction="sum")
    assert distance(torch.tensor(found.score), total / NEW) <= 1e-4
