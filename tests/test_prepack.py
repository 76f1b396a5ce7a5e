"""The packed copy of a language model: equal to it, apart from it where weights are packed, and only where possible."""

import copy

import pytest
import torch
from reference import distance
from test_generation import D, V, pair, prompts_of, ragged
from torch import nn

import hubmodels
from hubmodels import generation, maps, prepack
from hubmodels.errors import InputError
from hubmodels.fused import FusedPostNormBlock
from hubmodels.layers import Linear, WordScores
from hubmodels.maps import HalfLinear, Int8Linear, Int8RowLinear, PackedLinear, PackedWordScores, RowLinear
from hubmodels.prepack import accelerate, prepacked

NAMES = ("gpt", "gpt2")
LINEARS = 3 * 4  # qkv, output, inner, output of each layer


FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")
WHOLE = pytest.mark.skipif(not FBGEMM, reason="torch has no FBGEMM for this CPU")


def kinds(model, packed: type = PackedLinear) -> dict[type, int]:
    return {kind: sum(type(m) is kind for m in model.modules()) for kind in (Linear, packed, PackedWordScores)}


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_plain(name, rows):
    model, _ = pair(name, torch.float32, std=0.2)
    _, ids, mask = ragged("interleaved")
    with torch.inference_mode():
        packed = prepacked(model, rows)
        kind = RowLinear if rows == 1 and FBGEMM else PackedLinear
        assert kinds(packed, kind) == {Linear: 0, kind: LINEARS + 1, PackedWordScores: 1}
        for inputs in ((ids, mask), (ids,), (ids[:1, :1],)):
            assert distance(packed(*inputs).logits, model(*inputs).logits) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_plain_in_bfloat16(name):
    model, _ = pair(name, torch.bfloat16, std=0.2)
    with torch.inference_mode():
        expected, packed = model(prompts_of()).logits, prepacked(model, 4)
        found = packed(prompts_of()).logits
    assert found.dtype == torch.bfloat16
    assert distance(found, expected) <= 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_cannot_be_packed_comes_back_as_it_is(dtype):
    model, _ = pair("gpt2", dtype)
    assert prepacked(model, 1) is model


def test_without_mkldnn_the_model_comes_back(monkeypatch):
    model, _ = pair("gpt2", torch.float32)
    assert prepacked(model, 1) is not model
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert prepacked(model, 1) is model


@pytest.mark.parametrize("name", NAMES)
def test_packing_changes_nothing_of_the_model(name):
    model, _ = pair(name, torch.float32)
    modules = {key: id(module) for key, module in model.named_modules()}
    parameters = {key: (id(p), p._version, p.requires_grad) for key, p in model.named_parameters()}
    prepacked(model, 2)
    assert {key: id(module) for key, module in model.named_modules()} == modules
    assert {key: (id(p), p._version, p.requires_grad) for key, p in model.named_parameters()} == parameters
    assert kinds(model) == {Linear: LINEARS, PackedLinear: 0, PackedWordScores: 0}
    ids = prompts_of()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_all_but_the_maps_is_shared(name):
    model, _ = pair(name, torch.float32)
    packed = prepacked(model, 2)
    theirs = dict(packed.named_parameters())
    mine = dict(model.named_parameters())
    gone = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, Linear)}
    assert set(mine) - set(theirs) == gone
    assert all(parameter is mine[key] for key, parameter in theirs.items())
    assert packed.config is model.config
    assert type(packed) is type(model)
    assert packed.training is model.training is False


def test_the_copy_does_not_see_what_becomes_of_the_weights():
    model, _ = pair("gpt2", torch.float32)
    ids = prompts_of()
    with torch.inference_mode():
        packed = prepacked(model, 2)
        before, plain = packed(ids).logits, model(ids).logits
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Linear):
                module.weight.mul_(0.5)
    with torch.inference_mode():
        assert torch.equal(packed(ids).logits, before)
        assert distance(model(ids).logits, plain) > 1e-2


def test_packing_twice_packs_no_more():
    model, _ = pair("gpt2", torch.float32, std=0.2)
    with torch.inference_mode():
        twice = prepacked(prepacked(model, 1), 1)
        assert distance(twice(prompts_of()).logits, model(prompts_of()).logits) <= 1e-5


def test_a_map_without_bias():
    linear = Linear(D, 7, bias=False)
    nn.init.normal_(linear.weight)
    x = torch.randn(5, D)
    with torch.inference_mode():
        assert distance(PackedLinear(linear.weight, None, 5)(x), linear(x)) <= 1e-5


def test_the_table_is_packed_for_the_scores():
    table, states = torch.randn(V, D), torch.randn(5, D)
    with torch.inference_mode():
        found = PackedWordScores(PackedLinear(table, None, 5))(states, table)
        assert distance(found, WordScores()(states, table)) <= 1e-5


def test_a_whole_number_of_rows_of_none_is_no_crash():
    model, _ = pair("gpt2", torch.float32)
    with torch.inference_mode():
        assert prepacked(model, 1)(torch.zeros(0, 3, dtype=torch.long)).logits.shape == (0, 3, V)


@pytest.fixture
def packed_at_once(monkeypatch):
    """Short texts go the way of long ones."""
    monkeypatch.setattr(generation, "_WORTH_PACKING", 1)


@pytest.mark.usefixtures("packed_at_once")
def test_hooks_of_the_parts_that_are_copied_still_run():
    """A hook on a block sees what it makes in generation too."""
    model, _ = pair("gpt2", torch.float32)
    seen = []
    model.transformer.layers[1].feed_forward.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    model.generate(prompts_of(2), max_new_tokens=3)
    assert seen == [2 * prompts_of(2).shape[1], 2, 2]


@pytest.mark.usefixtures("packed_at_once")
def test_a_hook_on_a_linear_map_still_runs():
    """Adapters and probes hang on linear maps: one must not be left out in silence."""
    model, _ = pair("gpt2", torch.float32)
    seen = []
    model.transformer.layers[1].feed_forward.inner.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    model.generate(prompts_of(2), max_new_tokens=3)
    assert seen == [2 * prompts_of(2).shape[1], 2, 2]


def test_a_map_of_the_users_own_keeps_its_forward():
    """An adapter that extends Linear is no Linear: packed as one, what it adds would be lost in silence."""

    class Adapted(Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    model, _ = pair("gpt2", torch.float32, std=0.2)
    plain = model.transformer.layers[0].feed_forward.inner
    adapted = Adapted(plain.in_features, plain.out_features)
    adapted.weight, adapted.bias = plain.weight, plain.bias
    model.transformer.layers[0].feed_forward.inner = adapted
    with torch.inference_mode():
        assert distance(prepacked(model, 1)(prompts_of()).logits, model(prompts_of()).logits) <= 1e-5


def test_generation_packs_for_its_rows_where_it_is_worth_it(monkeypatch):
    rows, pack = [], prepack.prepacked
    monkeypatch.setattr(generation, "prepacked", lambda model, n: rows.append(n) or pack(model, n))
    monkeypatch.setattr(generation, "_WORTH_PACKING", 3)
    model, _ = pair("gpt2", torch.float32)
    model.generate(prompts_of(3), max_new_tokens=2)
    assert rows == []
    model.generate(prompts_of(3), max_new_tokens=3)
    model.generate(prompts_of(3), max_new_tokens=3, num_beams=4)
    model.generate(prompts_of(3), max_new_tokens=3, temperature=1.0, num_return_sequences=5)
    assert rows == [3, 12, 15]


@pytest.mark.parametrize("name", NAMES)
def test_packed_or_not_the_same_words_come_out(monkeypatch, name):
    model, _ = pair(name, torch.float32)
    monkeypatch.setattr(generation, "_WORTH_PACKING", 1000)
    plain = model.generate(*ragged("left")[1:], max_new_tokens=11)
    monkeypatch.setattr(generation, "_WORTH_PACKING", 1)
    assert model.generate(*ragged("left")[1:], max_new_tokens=11) == plain


# Packed once, to keep

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", NAMES)
def test_an_accelerated_model_equals_the_plain_one(name):
    model, _ = pair(name, torch.float32, std=0.2)
    fast = accelerate(model)
    _, ids, mask = ragged("left")
    with torch.inference_mode():
        assert kinds(fast)[Linear] == 0
        assert distance(fast(ids, mask).logits, model(ids, mask).logits) <= 1e-5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32_on_the_same_weights(name, dtype):
    """Nearer to float32 than the model itself is: only what float16 cannot hold of a weight is lost."""
    model, _ = pair(name, dtype, std=0.2)
    fast, ids = accelerate(model), prompts_of()
    with torch.inference_mode():
        exact = model.float()(ids).logits
        model.to(dtype)
        found, own = fast(ids).logits, model(ids).logits
    assert {type(part) for part in fast.modules()} >= {HalfLinear, PackedWordScores}
    assert (found.dtype, own.dtype) == (torch.float32, dtype)
    assert distance(found, exact) <= 1e-5
    assert distance(found, exact) < distance(own, exact) / 10


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", NAMES)
def test_an_accelerated_model_goes_on_as_the_float32_one(name, dtype):
    model, _ = pair(name, dtype, std=0.2)
    fast, (_, ids, mask) = accelerate(model), ragged("right")
    options = {"max_new_tokens": 6, "repetition_penalty": 1.3}
    found = [fast.generate(ids, mask, **options), fast.generate(ids, mask, num_beams=3, max_new_tokens=4)]
    model.float()
    assert [row.ids for row in found[0]] == [row.ids for row in model.generate(ids, mask, **options)]
    expected = model.generate(ids, mask, num_beams=3, max_new_tokens=4)
    assert [row.ids for row in found[1]] == [row.ids for row in expected]


@pytest.mark.parametrize("dtype", HALF)
def test_accelerating_changes_nothing_of_the_model(dtype):
    model, _ = pair("gpt2", dtype)
    before = {key: (id(p), p.dtype, p._version) for key, p in model.named_parameters()}
    fast = accelerate(model)
    assert {key: (id(p), p.dtype, p._version) for key, p in model.named_parameters()} == before
    tables = [each.transformer.embeddings.word.weight for each in (fast, model)]
    assert tables[0].data_ptr() == tables[1].data_ptr()
    assert fast.config is model.config


def test_generation_packs_an_accelerated_model_no_more(monkeypatch):
    fast = accelerate(pair("gpt2", torch.float32)[0])
    monkeypatch.setattr(prepack, "PackedLinear", lambda *_: pytest.fail("packed again"))
    assert len(fast.generate(prompts_of(), max_new_tokens=5)[0].ids) == 5


@pytest.mark.parametrize("change", ["hook", "adapter", "range", "engine"])
def test_half_precision_that_cannot_be_held_so_is_packed_the_other_way(monkeypatch, change):
    model, _ = pair("gpt2", torch.bfloat16)
    output = model.transformer.layers[0].attention.output
    if change == "hook":
        output.register_forward_hook(lambda *_: None)
    elif change == "adapter":
        output.__class__ = type("Adapter", (Linear,), {})
    elif change == "range":
        output.weight.data[0, 0] = 1e5  # float16 ends at 65504
    else:
        monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    fast = accelerate(model)
    assert not any(isinstance(part, HalfLinear) for part in fast.modules())
    with torch.inference_mode():
        assert fast(prompts_of()).logits.dtype == torch.bfloat16


# Encoders

ENCODERS = {
    "bertModel": {},
    "bertForPreTraining": {},
    "bertForMaskedLM": {},
    "bertForNextSentencePrediction": {},
    "bertForSequenceClassification": {"num_labels": 3, "head_seed": 0},
    "bertForTokenClassification": {"num_labels": 3, "head_seed": 0},
    "bertForQuestionAnswering": {"head_seed": 0},
    "bertForMultipleChoice": {"head_seed": 0},
}


def encoder_inputs(name: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 8000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:], mask[1, :6] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids % 2)}
    return {key: tensor[None] for key, tensor in inputs.items()} if name == "bertForMultipleChoice" else inputs


def tensors_in(output) -> list[torch.Tensor]:
    return [t for part in output if part is not None for t in (part if isinstance(part, tuple) else (part,))]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_accelerated_encoder_equals_the_plain_one(name, padded, dtype, allowed):
    model = getattr(hubmodels, name)("bert-nano", dtype=dtype, **ENCODERS[name])
    fast, inputs = accelerate(model), encoder_inputs(name)
    own = torch.float32 if "computed in float32" in fast.acceleration else dtype  # where the CPU has no other products
    if not padded:
        del inputs["attention_mask"]
    with torch.inference_mode():
        for options in ({}, {"output_hidden_states": True, "output_attentions": True}):
            found, expected = (tensors_in(each(**inputs, **options)) for each in (fast, model))
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert (a.dtype, b.dtype, a.shape) == (own, dtype, b.shape)
                assert distance(a, b) <= allowed * max(1.0, float(b.abs().max()))
    packs = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported() or FBGEMM
    assert sum(isinstance(part, FusedPostNormBlock) for part in fast.modules()) == (4 if packs else 0)
    assert any(type(part) is Linear for part in fast.modules()) != packs
    assert packs or fast.acceleration == "nothing: torch has no packed layout of bfloat16 here"


def test_a_batch_of_no_tokens_at_all():
    model, inputs = hubmodels.bertForMaskedLM("bert-nano"), encoder_inputs("")
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    with torch.inference_mode():
        assert torch.equal(accelerate(model)(**inputs).logits, model(**inputs).logits)


def test_labels_of_an_accelerated_model():
    model = hubmodels.bertForMaskedLM("bert-nano")
    inputs = encoder_inputs("bertForMaskedLM")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 3 > 0, -100)
    with torch.inference_mode():
        found, expected = (each(**inputs, labels=labels) for each in (accelerate(model), model))
    assert abs(float(found.loss) - float(expected.loss)) <= 1e-5
    assert distance(found.logits, expected.logits) <= 1e-4


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_every_activation_is_computed_with_the_product(activation):
    model = hubmodels.bertModel("bert-nano", hidden_act=activation)
    with torch.inference_mode():
        found, expected = (each(**encoder_inputs("")).last_hidden_state for each in (accelerate(model), model))
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("tokens", [2, 3, 40])
def test_tokens_in_parts_are_multiplied_as_all_at_once(tokens, monkeypatch):
    draw = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(12, 20, generator=draw), torch.randn(12, generator=draw)
    x, residual = torch.randn(tokens, 20, generator=draw), torch.randn(tokens, 12, generator=draw)
    part = PackedLinear(weight, bias)
    for count in (1, 2, 3):
        monkeypatch.setattr(maps, "parts_for", lambda *_: count)  # noqa: B023
        found = part(x), part.bent(x, "gelu"), part.plus(x, residual)
        if count == 1:
            expected = found
        assert all(distance(a, b) <= 1e-6 * float(b.abs().max()) for a, b in zip(found, expected, strict=True))


def test_two_threads_get_parts_of_a_third_of_the_outputs(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    narrow = torch.empty(768, 0, dtype=torch.bfloat16)
    numbers = (0, 1, 16, 460, 461, 512, 513, 768, 1024, 1025, 4096)
    assert [maps.parts_for(tokens, narrow) for tokens in numbers] == [1, 1, 1, 1, 2, 2, 3, 3, 4, 1, 1]
    assert maps.parts_for(512, torch.empty(3072, 0, dtype=torch.bfloat16)) == 1
    assert maps.parts_for(512, narrow.float()) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert maps.parts_for(512, narrow) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert maps.parts_for(512, narrow) == 1


@WHOLE
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_in_a_dtype_without_products_here_is_computed_in_float32(name, dtype, monkeypatch):
    monkeypatch.setattr(prepack, "multiplies", lambda dtype: dtype not in HALF)
    model = getattr(hubmodels, name)("bert-nano", dtype=dtype, **ENCODERS[name])
    fast, inputs = accelerate(model), encoder_inputs(name)
    with torch.inference_mode():
        found, exact = tensors_in(fast(**inputs)), tensors_in(model.float()(**inputs))
    assert all(tensor.dtype == torch.float32 for tensor in found)
    for ours, theirs in zip(found, exact, strict=True):
        assert distance(ours, theirs) <= 1e-4 * max(1.0, float(theirs.abs().max()))
    assert fast.acceleration.endswith(f"packed by FBGEMM from {str(dtype)[6:]}, computed in float32")


@WHOLE
def test_half_precision_without_a_token():
    model = hubmodels.bertModel("bert-nano", dtype=torch.float16)
    ids = torch.ones(2, 3, dtype=torch.long)
    with torch.inference_mode():
        assert not accelerate(model)(ids, torch.zeros_like(ids)).last_hidden_state.any()


def test_what_was_done_is_said():
    said = "17 linear maps packed by oneDNN in float32, 4 blocks fused"
    assert accelerate(hubmodels.bertModel("bert-nano")).acceleration == said
    said = "nothing: torch has no packed layout of float64 here"
    assert accelerate(hubmodels.bertModel("bert-nano", dtype=torch.float64)).acceleration == said
    fast = accelerate(pair("gpt2", torch.bfloat16)[0])
    assert fast.acceleration == f"{LINEARS + 1} linear maps packed by FBGEMM from bfloat16, computed in float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_accelerated_model_is_for_inference(dtype):
    """oneDNN's maps have no gradient: without this a backward pass would leave theirs out in silence."""
    model = hubmodels.bertForMaskedLM("bert-nano", dtype=dtype, hidden_dropout_prob=0.5).train()
    fast, inputs = accelerate(model), encoder_inputs("")
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not fast.training
    assert torch.equal(fast(**inputs).logits, fast(**inputs).logits)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("part", ["attention", "feed_forward", "feed_forward.inner", "attention.output"])
def test_hooks_within_a_block_still_run(part):
    model, seen = hubmodels.bertModel("bert-nano").train(), []
    model.layers[1].get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    fast = accelerate(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.inference_mode():
        found, expected = (each(**encoder_inputs("")).last_hidden_state for each in (fast, model))
    assert distance(found, expected) <= 1e-5
    assert len(seen) == 2
    assert sum(isinstance(each, FusedPostNormBlock) for each in fast.modules()) == 3


def test_a_block_of_the_users_own_is_not_fused():
    class Doubled(type(hubmodels.bertModel("bert-nano").layers[0])):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    model = hubmodels.bertModel("bert-nano")
    model.layers[2].__class__ = Doubled
    with torch.inference_mode():
        found, expected = (each(**encoder_inputs("")).last_hidden_state for each in (accelerate(model), model))
    assert distance(found, expected) <= 1e-5


def test_what_is_no_model_of_ours_is_refused():
    with pytest.raises(InputError, match="accelerate: expected a model of this library, got a Linear"):
        hubmodels.accelerate(nn.Linear(2, 3))
    with pytest.raises(InputError, match="accelerate: expected a model on a CPU or a GPU, got one on meta"):
        hubmodels.accelerate(pair("gpt2", torch.float32)[0].to("meta"))


# Whole numbers of 8 bits


def rounded(x: torch.Tensor, steps: int = 127) -> torch.Tensor:
    """[..., N] as it is when each row is held in steps of a 127th of its largest number"""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / steps
    return (x / step).round() * step


@WHOLE
@pytest.mark.filterwarnings("ignore:.*deprecated")  # `accelerate` silences it
@pytest.mark.parametrize("rows", [1, 2, 31])
@pytest.mark.parametrize("bias", [True, False])
def test_a_map_of_whole_numbers_is_the_product_of_what_was_rounded(rows, bias):
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 40, generator=draw) * torch.logspace(-3, 3, 48)[:, None]
    weight[5] = 0
    offset = torch.randn(48, generator=draw) if bias else None
    x = torch.randn(rows, 40, generator=draw) * torch.logspace(-2, 2, rows)[:, None]
    x[0] = 0 if rows > 1 else x[0]
    packed = Int8Linear(weight, offset)
    expected = rounded(x, packed.steps).double() @ rounded(weight).double().T + (0 if offset is None else offset)
    size = x.norm(dim=1, keepdim=True) * weight.norm(dim=1) + (1e-6 if offset is None else offset.abs())
    assert float(((packed(x) - expected).abs() / size).max()) <= 1e-3  # a tie may be rounded the other way
    residual = torch.randn(rows, 48, generator=draw)
    assert torch.equal(packed.plus(x, residual.clone()), packed(x) + residual)
    assert torch.equal(packed.bent(x, "gelu"), torch.nn.functional.gelu(packed(x)))
    together = torch.cat([x, 1000 * torch.randn(3, 40, generator=draw)])
    assert distance(packed(together)[:rows] / size, packed(x) / size) <= 1e-6


@WHOLE
@pytest.mark.filterwarnings("ignore:.*deprecated")  # `accelerate` silences it
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_that_there_are_do_not_overflow(sign):
    """Without VNNI two products are added up in 16 bits: of 8 bits each, 768 times 1 would come out as 6."""
    packed = Int8Linear(torch.ones(32, 768), None)
    assert distance(packed(torch.full((4, 768), float(sign))), torch.full((4, 32), 768.0 * sign)) <= 1e-3


@WHOLE
@pytest.mark.filterwarnings("ignore:.*deprecated")  # `accelerate` silences it
@pytest.mark.parametrize(("vnni", "steps"), [(True, 127), (False, 63)])
def test_a_token_has_as_many_steps_as_the_cpu_adds_up(vnni, steps, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    assert Int8Linear(torch.ones(5, 4), None).steps == steps


@WHOLE
@pytest.mark.filterwarnings("ignore:.*deprecated")  # `accelerate` silences it
def test_a_map_of_whole_numbers_takes_no_row_at_all():
    packed = Int8Linear(torch.randn(5, 4), None)
    assert packed(torch.empty(0, 4)).shape == (0, 5)


@WHOLE
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_in_whole_numbers_is_near_the_plain_one(name, padded, dtype):
    plain, model = (getattr(hubmodels, name)("bert-nano", dtype=d, **ENCODERS[name]) for d in (torch.float32, dtype))
    inputs = encoder_inputs(name)
    if not padded:
        del inputs["attention_mask"]
    fast = accelerate(model, torch.int8)
    with torch.inference_mode():
        found, expected = tensors_in(fast(**inputs)), tensors_in(plain(**inputs))
    assert all(tensor.dtype == torch.float32 for tensor in found)
    for ours, theirs in zip(found, expected, strict=True):
        real = theirs.abs() < 1e30  # not the padding of question answering
        assert distance(ours[real], theirs[real]) <= 0.15 * max(1.0, float(theirs[real].abs().max()))
    assert "in int8" in fast.acceleration


@WHOLE
@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_in_whole_numbers_generates_for_each_row_the_same_beside_any_others(name):
    model, _ = pair(name, torch.float32, std=0.2)
    fast = accelerate(model, torch.int8)
    prompts, ids, mask = ragged("left")
    together = fast.generate(ids, mask, max_new_tokens=6)
    alone = [fast.generate(prompt.expand(2, -1), max_new_tokens=6)[0] for prompt in prompts]
    assert [row.ids for row in together] == [row.ids for row in alone]
    with torch.inference_mode():
        logits, expected = (each(prompts_of()).logits for each in (fast, model))
    assert float((logits - expected).norm() / expected.norm()) <= 0.1


# A single token


@WHOLE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "out"), [(1, 1), (5, 7), (40, 96), (64, 97), (96, 300), (3072, 768)])
def test_a_single_token_is_multiplied_as_several_are(size, out, bias):
    draw = torch.Generator().manual_seed(2)
    weight, x = torch.randn(out, size, generator=draw), torch.randn(1, size, generator=draw)
    offset, residual = (torch.randn(out, generator=draw) if bias else None), torch.randn(1, out, generator=draw)
    rows = RowLinear(weight, offset, lambda _: pytest.fail("it was one token"))
    right = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert distance(rows(x), right) <= 1e-6 * size**0.5 * float(weight.abs().max() * x.abs().max())
    assert torch.equal(rows.plus(x, residual), rows(x) + residual)
    assert torch.equal(rows.bent(x, "silu"), torch.nn.functional.silu(rows(x)))
    assert torch.equal(rows(x.clone().requires_grad_()), rows(x))


@WHOLE
@pytest.mark.parametrize("tokens", [0, 2, 9])
def test_any_other_number_of_tokens_goes_the_other_way(tokens):
    x, weight = torch.randn(tokens, 6), torch.randn(10, 6)
    assert torch.equal(RowLinear(weight, None, lambda x: x + 1)(x), x + 1)
    rows, residual = Int8RowLinear(weight, None), torch.randn(tokens, 10)
    assert rows(x).shape == (tokens, 10)
    assert torch.equal(rows.bent(x, "relu"), rows.many(x).relu())
    assert torch.equal(rows.plus(x, residual), rows.many(x) + residual)


@WHOLE
@pytest.mark.filterwarnings("ignore:.*deprecated")  # `accelerate` silences it
@pytest.mark.parametrize("bias", [True, False])
def test_of_a_single_token_in_whole_numbers_the_weights_alone_are_rounded(bias):
    """To 255 steps between the least and the greatest of the numbers that an input has in a bag."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 64, generator=draw) * torch.logspace(-2, 2, 64)  # of inputs that differ by far
    x, offset = torch.randn(1, 64, generator=draw), (torch.randn(300, generator=draw) if bias else None)
    bags = nn.functional.pad(weight, (0, 0, 0, 84)).unflatten(0, (-1, 96))  # [4, 96, 64]
    step = (bags.amax(1) - bags.amin(1)) / 255  # [4, 64]
    bound = (x.abs() * step * 0.51).sum(1).repeat_interleave(96)[:300]  # half a step for each product
    right = torch.nn.functional.linear(x, weight, offset)
    rows = Int8RowLinear(weight, offset)
    assert ((rows(x) - right).abs()[0] <= bound).all()
    finer = {63: 3, 127: 2}[rows.many.steps]  # without VNNI several tokens are rounded to half as many steps
    assert float((rows(x) - right).norm()) < float((rows.many(x) - right).norm()) / finer


@WHOLE
@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_takes_single_tokens_by_rows(name, dtype, monkeypatch):
    model, _ = pair(name, torch.float32, std=0.2)
    fast, seen, kind = accelerate(model, dtype), [], RowLinear if dtype is None else Int8RowLinear
    assert kinds(fast, kind) == {Linear: 0, kind: LINEARS + 1, PackedWordScores: 1}
    summed = kind.summed
    monkeypatch.setattr(kind, "summed", lambda self, given: seen.append(1) or summed(self, given))
    found = fast.generate(prompts_of(1), max_new_tokens=5)
    assert len(seen) == 4 * (LINEARS + 1) + 1  # each step, and the scores of the prompt's last
    if dtype is None:
        assert found == model.generate(prompts_of(1), max_new_tokens=5)


@WHOLE
def test_several_tokens_go_by_the_models_own_weights_where_it_was_packed_for_one():
    model, _ = pair("gpt2", torch.float32, std=0.2)
    packed = prepacked(model, 1)
    held = {p.data_ptr() for p in model.parameters()}
    many = [part.many.weight.data_ptr() for part in packed.modules() if isinstance(part, RowLinear)]
    assert len(many) == LINEARS + 1
    assert set(many) <= held
    with torch.inference_mode():
        assert distance(packed(prompts_of()).logits, model(prompts_of()).logits) <= 1e-6


@WHOLE
@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_what_is_packed_is_not_copied_again(dtype, monkeypatch):
    """Generation makes a twin of a model that is accelerated already."""
    fast = accelerate(pair("gpt2", torch.float32)[0], dtype)
    monkeypatch.setattr(PackedLinear, "__getstate__", lambda self: pytest.fail("copied"))
    again = prepacked(fast, 1)
    assert {part for part in fast.modules() if isinstance(part, RowLinear)} <= set(again.modules())


@WHOLE
def test_an_accelerated_language_model_can_be_copied():
    model, _ = pair("gpt2", torch.float32, std=0.2)
    fast = accelerate(model)
    with torch.inference_mode():
        for ids in (prompts_of(), prompts_of(1)[:, :1]):
            assert torch.equal(copy.deepcopy(fast)(ids).logits, fast(ids).logits)


def test_other_dtypes_than_int8_are_refused(monkeypatch):
    model, _ = pair("gpt2", torch.float32)
    with pytest.raises(InputError) as error:
        accelerate(model, torch.float16)
    assert str(error.value) == "accelerate: dtype = torch.float16: expected None, the model's own, or torch.int8"
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    with pytest.raises(InputError) as error:
        accelerate(model, torch.int8)
    assert str(error.value) == (
        "accelerate: dtype = torch.int8: expected torch.backends.quantized.engine to be x86 or fbgemm, "
        "which this CPU may not have; it is qnnpack"
    )
