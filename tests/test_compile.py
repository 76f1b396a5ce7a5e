"""torch.compile and torch.export: the number of graphs, and the same numbers."""

import pytest
import torch
from reference import POSITIONS, V, distance, generator, pair
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from hubmodels.packing import packing_of

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


def graphs_over_shapes(layers):
    """(graphs, operations) after the first shapes and after all; asserts that every output equals eager's."""
    model, _ = pair("BertForSequenceClassification", num_hidden_layers=layers)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    counts = []
    with torch.no_grad():
        for shape in SHAPES + MORE_SHAPES:
            ids, mask = batch(*shape)
            assert distance(compiled(ids, mask).logits, model(ids, mask).logits) <= 1e-12
            counts.append((counter.frame_count, counter.op_count))
    return counts[len(SHAPES) - 1], counts[-1]


def test_graphs_grow_neither_with_layers_nor_with_further_shapes():
    warm, last = graphs_over_shapes(2)
    assert len(counters["graph_break"]) == 1  # where padding is found, before the first layer
    deep_warm, deep_last = graphs_over_shapes(4)
    assert warm == last
    assert deep_warm == deep_last
    assert last[0] == deep_last[0]
    assert last[1] < deep_last[1]  # the deeper model's blocks are in those graphs


@pytest.mark.parametrize("method", ["pack", "unpack", "first"])
def test_what_is_done_with_a_packing_breaks_no_graph(method):
    compiled = torch.compile(lambda packing, x: getattr(packing, method)(x), backend="eager", fullgraph=True)
    _, mask = batch(5, 9)
    packing = packing_of(5, 9, mask)
    x = torch.randn(5, 9, 24) if method == "pack" else torch.randn(int(mask.sum()), 24)
    assert torch.equal(compiled(packing, x), getattr(packing, method)(x))


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
