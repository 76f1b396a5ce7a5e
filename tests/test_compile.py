"""torch.compile and torch.export: the number of graphs, and the same numbers."""

import pytest
import torch
from reference import POSITIONS, D, H, V, distance, generator, pair
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from hubmodels.families import gpt, gpt2
from hubmodels.packing import packing_of

DECODERS = pytest.mark.parametrize("family", ["gpt", "gpt2"])
SHAPES = ((5, 9), (3, 7))
MORE_SHAPES = ((4, 11), (2, 16))


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(rows, length, padded=True):
    ids = torch.randint(0, V, (rows, length), generator=generator(rows * length))
    mask = torch.ones(rows, length, dtype=torch.long)
    if padded:
        for row in range(rows):
            mask[row, length - row % 3 :] = 0
    return ids, mask


def decoder(family, layers=2):
    """A tiny language model with every parameter random."""
    module, cls = (gpt, gpt.Gpt) if family == "gpt" else (gpt2, gpt2.Gpt2)
    sizes = {"vocab_size": V, "n_positions": POSITIONS, "n_embd": D, "n_layer": layers, "n_head": H}
    model, draw = cls(module.FAMILY.config.from_published(sizes, "here")), generator(41)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=draw)
            parameter.add_("norm" in name and name.endswith("weight"))
    return model.double().eval()


def graphs_over_shapes(layers, family="bert"):
    """(graphs, operations) after the first shapes and after all; asserts that every output equals eager's."""
    if family == "bert":
        model, _ = pair("BertForSequenceClassification", num_hidden_layers=layers)
    else:
        model = decoder(family, layers)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    counts = []
    with torch.no_grad():
        for shape in SHAPES + MORE_SHAPES:
            ids, mask = batch(*shape)
            assert distance(compiled(ids, mask).logits, model(ids, mask).logits) <= 1e-12
            counts.append((counter.frame_count, counter.op_count))
    return counts[len(SHAPES) - 1], counts[-1]


@pytest.mark.parametrize("family", ["bert", "gpt", "gpt2"])
def test_graphs_grow_neither_with_layers_nor_with_further_shapes(family):
    warm, last = graphs_over_shapes(2, family)
    assert len(counters["graph_break"]) == 1  # where padding is found, before the first layer
    deep_warm, deep_last = graphs_over_shapes(4, family)
    assert warm == last
    assert deep_warm == deep_last
    assert last[0] == deep_last[0]
    assert last[1] < deep_last[1]  # the deeper model's blocks are in those graphs


@pytest.mark.parametrize("method", ["pack", "unpack", "first", "last"])
def test_what_is_done_with_a_packing_breaks_no_graph(method):
    compiled = torch.compile(lambda packing, x: getattr(packing, method)(x), backend="eager", fullgraph=True)
    _, mask = batch(5, 9)
    packing = packing_of(5, 9, mask)
    x = torch.randn(5, 9, 24) if method == "pack" else torch.randn(int(mask.sum()), 24)
    assert torch.equal(compiled(packing, x), getattr(packing, method)(x))


@pytest.mark.parametrize("causal", [False, True])
def test_the_masks_of_a_packing_break_no_graph(causal):
    def masks(packing):
        return packing.real(), packing.mask(torch.device("cpu"))

    _, mask = batch(5, 9)
    packing = packing_of(5, 9, mask, causal)
    compiled = torch.compile(masks, backend="eager", fullgraph=True)
    assert all(torch.equal(got, expected) for got, expected in zip(compiled(packing), masks(packing), strict=True))


def test_padded_and_full_batches_in_turn_settle_too():
    model, _ = pair("BertModel", num_hidden_layers=1)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    counts = []
    with torch.no_grad():
        for padded, shape in zip((True, False, True, False), SHAPES + MORE_SHAPES, strict=True):
            ids, mask = batch(*shape, padded)
            assert distance(compiled(ids, mask)[0], model(ids, mask)[0]) <= 1e-12
            counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


def test_a_batch_without_mask_is_one_full_graph():
    model, _ = pair("BertModel")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for shape in SHAPES + MORE_SHAPES:
            ids, _ = batch(*shape)
            got, expected = compiled(ids), model(ids)
            assert distance(got.last_hidden_state, expected.last_hidden_state) <= 1e-12
            assert distance(got.pooler_output, expected.pooler_output) <= 1e-12
    assert counter.frame_count == 1


def test_the_operator_is_one_node_per_layer():
    nodes = []

    def backend(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if "ragged_attention" in str(node.target))
        return graph.forward

    model, _ = pair("BertModel", num_hidden_layers=2)
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(*batch(5, 9))
    assert len(nodes) == 2


@DECODERS
def test_a_decoders_batch_without_mask_is_one_full_graph(family):
    model = decoder(family)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for shape in SHAPES + MORE_SHAPES:
            ids, _ = batch(*shape)
            assert distance(compiled(ids).logits, model(ids).logits) <= 1e-12
    assert counter.frame_count == 1


@DECODERS
def test_a_decoders_operator_is_causal_in_the_graph(family):
    given = []

    def backend(graph, _):
        given.extend(node.args for node in graph.graph.nodes if "ragged_attention" in str(node.target))
        return graph.forward

    with torch.no_grad():
        torch.compile(decoder(family), backend=backend, dynamic=True)(*batch(5, 9))
    assert [arguments[4] for arguments in given] == [True, True]


@DECODERS
def test_a_decoders_padded_and_full_batches_in_turn_settle_too(family):
    model = decoder(family, layers=1)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    counts = []
    with torch.no_grad():
        for padded, shape in zip((True, False, True, False), SHAPES + MORE_SHAPES, strict=True):
            ids, mask = batch(*shape, padded)
            assert distance(compiled(ids, mask).logits, model(ids, mask).logits) <= 1e-12
            counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


@DECODERS
def test_a_decoders_training_step_through_aot_equals_eager(family):
    model = decoder(family, layers=1)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for shape in SHAPES[:2]:
        ids, mask = batch(*shape)
        results = []
        for step in (model, compiled):
            model.zero_grad()
            loss = step(ids, mask, labels=ids).loss
            loss.backward()
            results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
        (loss, expected), (compiled_loss, got) = results
        assert distance(compiled_loss, loss) <= 1e-12
        assert max(map(distance, got, expected)) <= 1e-11
        assert min(g.abs().max() for g in expected) > 0


@DECODERS
def test_a_compiled_decoder_takes_a_cache(family):
    """Not in one graph, but with the same numbers, and not compiled anew for every token."""
    model, counter = decoder(family), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    ids, mask = batch(3, 16)
    mask[:, 5:] = 1
    cache, counts, parts = model.transformer.new_cache(3, 16), [], []
    with torch.no_grad():
        parts.append(compiled(ids[:, :5], mask[:, :5], cache=cache).logits)
        for column in range(5, 16):
            parts.append(compiled(ids[:, column : column + 1], cache=cache).logits)
            counts.append(counter.frame_count)
        assert distance(torch.cat(parts, 1), model(ids, mask).logits) <= 1e-12
    assert cache.length == 16
    assert counts[5] == counts[-1]


@DECODERS
def test_export_of_a_decoder_with_dynamic_batch_and_length(family):
    model = decoder(family)
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=POSITIONS)
    program = torch.export.export(model, (batch(5, 9)[0],), dynamic_shapes={"input_ids": {0: rows, 1: length}})
    with torch.no_grad():
        for shape in MORE_SHAPES:
            ids, _ = batch(*shape)
            assert distance(program.module()(ids).logits, model(ids).logits) <= 1e-12


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_training_step_through_aot_equals_eager(name):
    model, _ = pair(name, num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for shape in SHAPES[:2]:
        ids, mask = batch(*shape)
        labels = ids if name == "BertForMaskedLM" else torch.arange(shape[0])
        results = []
        for step in (model, compiled):
            model.zero_grad()
            loss = step(ids, mask, labels=labels).loss
            loss.backward()
            results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
        (loss, expected), (compiled_loss, got) = results
        assert distance(compiled_loss, loss) <= 1e-12
        assert max(map(distance, got, expected)) <= 1e-11
        assert min(g.abs().max() for g in expected) > 0


def test_export_with_dynamic_batch_and_length_equals_eager_on_another_shape():
    model, _ = pair("BertModel")
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=POSITIONS)
    ids, _ = batch(5, 9)
    program = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": {0: rows, 1: length}})
    with torch.no_grad():
        for shape in MORE_SHAPES:
            ids, _ = batch(*shape)
            got, expected = program.module()(ids), model(ids)
            assert distance(got.last_hidden_state, expected.last_hidden_state) <= 1e-12
            assert distance(got.pooler_output, expected.pooler_output) <= 1e-12
