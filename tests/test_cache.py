"""A decoder's cache: what was computed in pieces equals what is computed at once, and what does not fit is refused."""

import copy

import pytest
import torch
from reference import LAYERS as DEPTH
from reference import POSITIONS, B, D, H, V, distance, generator, ours

from hubmodels import cache, kernels
from hubmodels.cache import Cache
from hubmodels.errors import InputError
from hubmodels.families import gpt, gpt2

K = D // H
COLUMNS = 13  # a row of all the pieces together; fewer than the model has positions
SIZES = {"vocab_size": V, "n_positions": POSITIONS, "n_embd": D, "n_layer": DEPTH, "n_head": H}
CLASSES = {"gpt": gpt.Gpt, "gpt2": gpt2.Gpt2}
BOTH = pytest.mark.parametrize("family", CLASSES)
PIECES = [(13,), (12, 1), (1, 12), (5, 4, 4), (6, 7), (1,) * 13, (4, 1, 6, 1, 1), (2, 11)]


def build(family: str, dtype: torch.dtype = torch.float64, **published):
    """A tiny language model with every parameter random, eval mode."""
    cls = CLASSES[family]
    config = (gpt if family == "gpt" else gpt2).FAMILY.config.from_published({**SIZES, **published}, "here")
    model, draw = cls(config), generator(31)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=draw)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype).eval()


def ids_of(rows: int = B, columns: int = COLUMNS, seed: int = 32) -> torch.Tensor:
    return torch.randint(0, V, (rows, columns), generator=generator(seed))


def padding_anywhere(seed: int = 33) -> torch.Tensor:
    """[B, COLUMNS], 1 = token: padding at both ends and between, a row without any, and one of nothing else."""
    mask = (torch.rand(B, COLUMNS, generator=generator(seed)) < 0.6).long()
    mask[0] = 1
    mask[1] = 0
    mask[2, :7] = 0  # nothing in the first pieces
    mask[2, 7] = 1
    mask[3, :6] = 1
    mask[3, 6:] = 0  # nothing in the last ones
    assert mask[4].unique().tolist() == [0, 1]
    return mask


@torch.no_grad()
def in_pieces(model, ids, pieces, mask=None, cache=None, **options):
    """The outputs of one forward for each piece, on one cache."""
    cache = model.transformer.new_cache(len(ids), COLUMNS) if cache is None else cache
    outputs, begin = [], cache.length
    for end in (torch.tensor(pieces).cumsum(0) + begin).tolist():
        columns = slice(begin, end)
        given = {name: tensor[:, columns] for name, tensor in options.items() if isinstance(tensor, torch.Tensor)}
        others = {name: value for name, value in options.items() if name not in given}
        part = None if mask is None else mask[:, columns]
        outputs.append(model(ids[:, columns], part, cache=cache, **given, **others))
        assert cache.length == end
        begin = end
    return outputs


def joined(outputs) -> torch.Tensor:
    return torch.cat([output.logits for output in outputs], 1)


# Equality


@BOTH
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_pieces_of_any_size_equal_one_forward(family, pieces):
    model, ids = build(family), ids_of()
    assert distance(joined(in_pieces(model, ids, pieces)), model(ids).logits) <= 1e-12


@BOTH
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_padding_in_every_piece_equals_one_forward(family, pieces):
    model, ids, mask = build(family), ids_of(), padding_anywhere()
    got = joined(in_pieces(model, ids, pieces, mask))
    assert distance(got, model(ids, mask).logits) <= 1e-12
    assert got[mask == 0].eq(0).all()
    assert got[mask == 1].abs().amin(-1).gt(0).any()


@BOTH
def test_a_piece_without_a_mask_after_one_with_padding(family):
    """What generation does: a padded prompt, then one token a row."""
    model, ids, mask = build(family), ids_of(), padding_anywhere()
    mask[:, 6:] = 1
    cache = model.transformer.new_cache(B, COLUMNS)
    first = in_pieces(model, ids, (6,), mask, cache)
    rest = in_pieces(model, ids, (1, 1, 4, 1), None, cache)
    assert distance(joined(first + rest), model(ids, mask).logits) <= 1e-12


@BOTH
def test_padding_after_pieces_without_any(family):
    model, ids, mask = build(family), ids_of(), padding_anywhere()
    mask[:, :6] = 1
    cache = model.transformer.new_cache(B, COLUMNS)
    outputs = in_pieces(model, ids, (5, 1), None, cache) + in_pieces(model, ids, (3, 1, 3), mask, cache)
    assert distance(joined(outputs), model(ids, mask).logits) <= 1e-12


@BOTH
def test_where_padding_stands_does_not_matter_if_positions_are_given(family):
    """A row is its tokens: alone and whole it is what it is among others, in pieces."""
    model, ids, mask = build(family), ids_of(), padding_anywhere()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = joined(in_pieces(model, ids, (4, 1, 8), mask, position_ids=positions))
    for row in (0, 2, 3, 4):
        real = mask[row] == 1
        assert distance(got[row, real], model(ids[row, real][None]).logits[0]) <= 1e-12


@BOTH
def test_positions_go_on_from_the_cache(family):
    model, ids = build(family), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    in_pieces(model, ids, (6,), cache=cache)
    with torch.no_grad():
        told = model(ids[:, 6:9], position_ids=torch.tensor([[6, 7, 8]]), cache=copy.deepcopy(cache)).logits
        counted = model(ids[:, 6:9], cache=copy.deepcopy(cache)).logits
        others = model(ids[:, 6:9], position_ids=torch.tensor([[0, 1, 2]]), cache=copy.deepcopy(cache)).logits
    assert torch.equal(told, counted)
    assert distance(others, counted) > 1e-2


@BOTH
@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches_and_one_layer(family, rows):
    model, ids = build(family, n_layer=1), ids_of(rows)
    assert distance(joined(in_pieces(model, ids, (1, 3, 9))), model(ids).logits) <= 1e-12


@pytest.mark.parametrize(
    "published", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}], ids=lambda p: next(iter(p))
)
@pytest.mark.parametrize("weights", [False, True])
def test_the_scale_of_the_scores_holds_in_the_cache_too(published, weights):
    model, ids = build("gpt2", **published), ids_of()
    got = joined(in_pieces(model, ids, (5, 1, 7), output_attentions=weights))
    assert distance(got, model(ids).logits) <= 1e-12
    assert distance(got, build("gpt2")(ids).logits) > 1e-3


@BOTH
def test_vectors_and_token_types_in_pieces(family):
    model, ids = build(family), ids_of()
    vectors = torch.randn(B, COLUMNS, D, generator=generator(34), dtype=torch.float64)
    types = ids_of(seed=35)
    cache = model.transformer.new_cache(B, COLUMNS)
    got = []
    with torch.no_grad():
        for columns in (slice(0, 5), slice(5, 6), slice(6, 13)):
            got.append(model(inputs_embeds=vectors[:, columns], token_type_ids=types[:, columns], cache=cache).logits)
    expected = model(inputs_embeds=vectors, token_type_ids=types).logits
    assert distance(torch.cat(got, 1), expected) <= 1e-12
    assert distance(expected, model(ids).logits) > 1e-2


# What comes with it


@BOTH
@pytest.mark.parametrize("padded", [False, True])
def test_attentions_look_at_all_columns_so_far(family, padded):
    model, ids = build(family), ids_of()
    mask = padding_anywhere() if padded else None
    outputs = in_pieces(model, ids, (4, 1, 6, 2), mask, output_attentions=True, output_hidden_states=True)
    whole = model(ids, mask, output_attentions=True, output_hidden_states=True)
    assert distance(joined(outputs), whole.logits) <= 1e-12
    begin = 0
    for output, count in zip(outputs, (4, 1, 6, 2), strict=True):
        end = begin + count
        assert len(output.attentions) == DEPTH
        for got, expected in zip(output.attentions, whole.attentions, strict=True):
            assert got.shape == (B, H, count, end)
            assert distance(got, expected[:, :, begin:end, :end]) <= 1e-12
            if padded:
                assert got.transpose(1, 2)[mask[:, begin:end] == 0].eq(0).all()
                real = (mask[:, None, begin:end, None] & mask[:, None, None, :end]).bool()
                assert got[~real.expand_as(got)].eq(0).all()
        assert len(output.hidden_states) == DEPTH + 1
        for got, expected in zip(output.hidden_states, whole.hidden_states, strict=True):
            assert distance(got, expected[:, begin:end]) <= 1e-12
        begin = end


@BOTH
def test_attentions_that_are_asked_for_later_change_nothing(family):
    model, ids, mask = build(family), ids_of(), padding_anywhere()
    cache = model.transformer.new_cache(B, COLUMNS)
    outputs = in_pieces(model, ids, (4, 2), mask, cache)
    outputs += in_pieces(model, ids, (1, 6), mask, cache, output_attentions=True)
    assert distance(joined(outputs), model(ids, mask).logits) <= 1e-12


def test_the_base_model_takes_a_cache_too():
    model, ids = build("gpt2"), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    with torch.no_grad():
        states = [model.transformer(ids[:, part], cache=cache).last_hidden_state for part in (slice(5), slice(5, 13))]
        assert distance(torch.cat(states, 1), model.transformer(ids).last_hidden_state) <= 1e-12


def test_double_heads_take_a_cache_of_a_row_a_candidate():
    config = gpt.FAMILY.config.from_published(SIZES, "here")
    model = gpt.GptDoubleHeads(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator(36))
    model, ids = model.double().eval(), ids_of(6).view(2, 3, COLUMNS)
    cache = model.transformer.new_cache(6, COLUMNS)
    with torch.no_grad():
        parts = [model(ids[..., part], cache=cache) for part in (slice(5), slice(5, 13))]
        whole = model(ids)
    assert distance(torch.cat([part.logits for part in parts], 2), whole.logits) <= 1e-12
    assert distance(parts[-1].mc_logits, whole.mc_logits) <= 1e-12


# Rows


@BOTH
@pytest.mark.parametrize("rows", [[4, 0, 0, 2, 4, 4, 3], [3], [2, 1, 0], [0, 1, 2, 3, 4], []], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_selected_rows_go_on_as_if_they_had_been_alone(family, rows, padded):
    model, ids = build(family), ids_of()
    mask = padding_anywhere() if padded else torch.ones(B, COLUMNS, dtype=torch.long)
    cache = model.transformer.new_cache(B, COLUMNS)
    in_pieces(model, ids, (3, 2), mask if padded else None, cache)
    cache.select(torch.tensor(rows, dtype=torch.long))
    assert (cache.length, cache.room) == (5, COLUMNS)
    assert all(part.shape == (len(rows), H, COLUMNS, K) for part in cache.keys + cache.values)
    new = ids_of(len(rows), seed=37)  # from here on rows that were the same differ
    got = joined(in_pieces(model, new, (1, 5, 2), mask[rows] if padded else None, cache))
    together = torch.cat([ids[rows, :5], new[:, 5:]], 1)
    assert distance(got, model(together, mask[rows]).logits[:, 5:]) <= 1e-12


def test_selecting_copies():
    """A row that is there twice is two rows."""
    model, ids = build("gpt"), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    in_pieces(model, ids, (5,), cache=cache)
    before = cache.keys[0]
    cache.select(torch.tensor([1, 1]))
    cache.keys[0][0, :, :5] = 7.0
    assert not cache.keys[0][1, :, :5].eq(7.0).any()
    assert not before[1, :, :5].eq(7.0).any()


def test_a_copy_of_a_cache_goes_its_own_way():
    model, ids = build("gpt"), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    in_pieces(model, ids, (5,), cache=cache)
    other = copy.deepcopy(cache)
    in_pieces(model, ids_of(seed=38), (8,), cache=other)
    assert (cache.length, other.length) == (5, 13)
    assert distance(joined(in_pieces(model, ids, (8,), cache=cache)), model(ids).logits[:, 5:]) <= 1e-12


# What is refused


@pytest.mark.parametrize(("held", "more"), [(0, 8), (3, 5), (7, 1)])
def test_more_than_there_is_room_for(held, more):
    model = build("gpt")
    cache = model.transformer.new_cache(B, 7)
    if held:
        in_pieces(model, ids_of(), (held,), cache=cache)
    with pytest.raises(InputError) as caught:
        model(ids_of()[:, :more], cache=cache)
    assert str(caught.value) == (
        f"cache: it has room for {B} rows of 7 tokens and holds {held}; expected as many rows, at most {7 - held} more "
        f"tokens and a mask [B, S], got {B} rows of {more}"
    )
    assert cache.length == held


@pytest.mark.parametrize("rows", [1, B - 1, B + 1])
@pytest.mark.parametrize("held", [0, 3])
def test_another_number_of_rows(rows, held):
    """One row too: it must not be spread over all."""
    model = build("gpt2")
    cache = model.transformer.new_cache(B, 7)
    if held:
        in_pieces(model, ids_of(), (held,), cache=cache)
    with pytest.raises(InputError, match=rf"^cache: it has room for {B} rows of 7 tokens .* got {rows} rows of 2$"):
        model(ids_of(rows)[:, :2], cache=cache)


def test_a_mask_of_pairs():
    model = build("gpt")
    cache = model.transformer.new_cache(B, 7)
    with pytest.raises(InputError, match=rf"and a mask \[B, S\], got {B} rows of 4 and a mask of pairs$"):
        model(ids_of()[:, :4], torch.ones(B, 4, 4), cache=cache)


def test_a_mask_of_all_columns_instead_of_the_new_ones():
    """transformers wants one; here what the cache holds is known already."""
    model = build("gpt")
    cache = model.transformer.new_cache(B, 7)
    in_pieces(model, ids_of(), (4,), cache=cache)
    with pytest.raises(InputError, match=rf"^attention_mask: expected shape \({B}, 1\) .*got \({B}, 5\)$"):
        model(ids_of()[:, 4:5], torch.ones(B, 5), cache=cache)


@BOTH
def test_more_than_the_model_has_positions_for(family):
    """A cache may have more room than the model has positions: the model is asked first."""
    model = build(family)
    cache = model.transformer.new_cache(B, POSITIONS + 9)
    in_pieces(model, ids_of(columns=POSITIONS), (POSITIONS - 2,), cache=cache)
    with pytest.raises(InputError) as caught:
        model(ids_of()[:, :3], cache=cache)
    said = (
        f"input: {POSITIONS + 1} tokens in a row, {POSITIONS - 2} of them in the cache, but this model has positions "
    )
    assert str(caught.value).startswith(said + f"for {POSITIONS}; ")
    in_pieces(model, ids_of(columns=POSITIONS), (2,), cache=cache)
    assert cache.length == POSITIONS


def test_an_encoder_has_nothing_to_keep():
    encoder = ours("BertModel")
    assert not hasattr(encoder, "new_cache")
    cache = Cache(DEPTH, B, H, 7, K, dtype=torch.float64)
    with pytest.raises(InputError) as caught:
        encoder(ids_of()[:, :4], cache=cache)
    assert str(caught.value) == (
        "cache: an encoder's tokens look at those after them too, so nothing of them can be kept"
    )
    assert cache.length == 0


def test_gradient_checkpointing_in_training_would_fill_it_twice():
    model = build("gpt").train()
    model.gradient_checkpointing = True
    cache = model.transformer.new_cache(B, 7)
    with pytest.raises(
        InputError, match=r"^cache: gradient_checkpointing would fill it twice; switch one of them off$"
    ):
        model(ids_of()[:, :4], cache=cache)
    model.eval()
    in_pieces(model, ids_of(), (4,), cache=cache)  # nothing is computed twice there
    assert cache.length == 4


@pytest.mark.parametrize(("layers", "heads", "head_size"), [(DEPTH - 1, H, K), (DEPTH, H - 1, K), (DEPTH, H, K + 1)])
def test_the_cache_of_another_model(layers, heads, head_size):
    cache = Cache(layers, B, heads, 7, head_size, dtype=torch.float64)
    with pytest.raises(InputError, match=r"^cache: "):
        build("gpt")(ids_of()[:, :4], cache=cache)


# After a failure


def failures():
    """Arguments that are refused, each in its own place of the way."""
    good = ids_of()[:, 5:8]
    return {
        "an id out of range": {"input_ids": torch.full((B, 3), V)},
        "a position out of range": {"input_ids": good, "position_ids": torch.full((B, 3), POSITIONS)},
        "too long": {"input_ids": ids_of(columns=POSITIONS)[:, :12]},
        "other rows": {"input_ids": good[:2]},
        "a mask of another shape": {"input_ids": good, "attention_mask": torch.ones(B, 2)},
        "a mask of pairs": {"input_ids": good, "attention_mask": torch.ones(B, 3, 3)},
        "ids of another shape": {"input_ids": good[0]},
    }


@BOTH
@pytest.mark.parametrize("what", failures())
@pytest.mark.parametrize("padded", [False, True])
def test_a_forward_that_is_refused_leaves_the_cache_as_it_was(family, what, padded):
    model, ids = build(family), ids_of()
    mask = padding_anywhere() if padded else None
    cache = model.transformer.new_cache(B, COLUMNS)
    outputs = in_pieces(model, ids, (5,), mask, cache)
    with pytest.raises(InputError):
        model(**failures()[what], cache=cache)
    outputs += in_pieces(model, ids, (1, 7), mask, cache)
    assert distance(joined(outputs), model(ids, mask).logits) <= 1e-12


@BOTH
@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("held", [0, 5])
def test_a_forward_that_breaks_off_inside_leaves_the_cache_as_it_was(family, layer, padded, held, monkeypatch):
    """Out of memory, say, in one of the layers; other tokens and another mask than those that come afterwards."""
    model, ids = build(family), ids_of()
    mask = padding_anywhere() if padded else None
    cache = model.transformer.new_cache(B, COLUMNS)
    outputs = in_pieces(model, ids, (held,), mask, cache) if held else []

    def broken(_):
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(model.transformer.layers[layer].feed_forward, "forward", broken)
        with pytest.raises(MemoryError), torch.no_grad():
            model(ids_of(seed=39)[:, :8], torch.ones(B, 8).tril(), cache=cache)
    assert cache.length == held
    outputs += in_pieces(model, ids, (1, COLUMNS - held - 1), mask, cache)
    assert distance(joined(outputs), model(ids, mask).logits) <= 1e-12


# Numbers and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_half_precision_is_kept_as_float32_on_a_cpu(dtype):
    model, ids, mask = build("gpt2", dtype), ids_of(), padding_anywhere()
    cache = model.transformer.new_cache(B, COLUMNS)
    assert {part.dtype for part in cache.keys + cache.values} == {
        torch.float64 if dtype.itemsize == 8 else torch.float32
    }
    outputs = in_pieces(model, ids, (5, 1, 7), mask, cache)
    assert {output.logits.dtype for output in outputs} == {dtype}
    exact = build("gpt2")(ids, mask).logits
    got, whole = joined(outputs), model(ids, mask).logits
    # Rounding in pieces is another rounding than at once, but not a worse one.
    assert distance(got, exact) <= 1.5 * distance(whole, exact) + 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attentions_have_the_models_dtype_in_every_piece(dtype):
    model, ids = build("gpt2", dtype), ids_of()
    outputs = in_pieces(model, ids, (5, 1, 7), output_attentions=True)
    assert {weights.dtype for output in outputs for weights in output.attentions} == {dtype}


def test_a_cache_is_one_block_a_layer_that_is_never_moved():
    model, ids = build("gpt"), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    places = [part.data_ptr() for part in cache.keys + cache.values]
    assert all(part.shape == (B, H, COLUMNS, K) for part in cache.keys + cache.values)
    assert len(cache.keys) == len(cache.values) == len(cache.layers) == DEPTH
    in_pieces(model, ids, (5, 1, 1, 6), cache=cache)
    assert [part.data_ptr() for part in cache.keys + cache.values] == places


def test_what_was_never_written_is_never_read():
    """The memory is not cleared: NaN in it must stay unseen, behind padding too."""
    model, ids, mask = build("gpt"), ids_of(), padding_anywhere()
    cache = model.transformer.new_cache(B, COLUMNS)
    for part in cache.keys + cache.values:
        part.fill_(torch.nan)
    assert distance(joined(in_pieces(model, ids, (4, 1, 1, 7), mask, cache)), model(ids, mask).logits) <= 1e-12


def test_a_cache_of_inference_mode_and_out_of_it():
    """Generation runs in inference mode; a cache made outside has to work there and afterwards."""
    model, ids = build("gpt"), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    with torch.inference_mode():
        first = model(ids[:, :5], cache=cache).logits
    rest = in_pieces(model, ids, (8,), cache=cache)
    assert distance(torch.cat([first, joined(rest)], 1), model(ids).logits) <= 1e-12


def test_training_through_one_piece_on_a_filled_cache():
    """The gradient of the new tokens' loss; those in the cache are given."""
    model, ids = build("gpt2"), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    in_pieces(model, ids, (5,), cache=cache)
    model(ids[:, 5:], cache=cache).logits.square().mean().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(gradient.isfinite().all() for gradient in got)
    assert all(gradient.abs().sum() > 0 for gradient in got)


def test_pieces_without_no_grad_hold_no_graph():
    """Whoever forgets torch.no_grad() must not keep every step of a long text in memory."""
    model, ids = build("gpt2"), ids_of()
    cache = model.transformer.new_cache(B, COLUMNS)
    for column in range(3):
        model(ids[:, column : column + 1], cache=cache)
    assert [part.requires_grad for part in cache.keys + cache.values] == [False] * 2 * DEPTH


@pytest.mark.parametrize("padding", ["left", "interleaved"])
def test_a_step_reads_no_padding_where_there_is_much_of_it(padding, monkeypatch):
    """Each row's own columns alone; where padding stands within a row, all of them under a mask."""
    model = build("gpt2")
    lengths = [9, 2, 1, 3]
    mask = torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 9 - length :] = 1
    if padding == "interleaved":
        mask[0, 4] = 0
    read, real = [], kernels._attention_of_last
    monkeypatch.setattr(kernels, "_attention_of_last", lambda *given: read.append(given[3]) or real(*given))
    logits = {}
    for dense in (0.75, 0.0):
        monkeypatch.setattr(cache, "_DENSE", dense)
        kept = model.transformer.new_cache(4, 12)
        with torch.inference_mode():
            model(ids_of(4, 9), mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), cache=kept)
            logits[dense] = model(ids_of(4, 1, 9), position_ids=mask.sum(1, keepdim=True), cache=kept).logits
    assert distance(logits[0.75], logits[0.0]) <= 1e-12
    layers = len(model.transformer.layers)
    assert read == ([[0, 7, 8, 6]] * layers if padding == "left" else [])
