"""openvino, in float32 and bfloat16."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import DecoderRun, EncoderRun, PeerError, check_dtype, example, greedy, need, quiet
from .plain import PlainBert, PlainGpt2, split_heads
from .torch_peers import bert_of_transformers, from_transformers


def openvino_encoder(directory: Path, dtype: str) -> EncoderRun:
    """One request, compiled for latency."""
    _check_openvino(dtype)
    bert = bert_of_transformers(directory)
    ids, mask = example(bert.config.vocab_size)
    with quiet():
        model = need("openvino").convert_model(
            PlainBert(bert, fused=True).eval(), example_input={"input_ids": ids, "attention_mask": mask}
        )
    request = _openvino_compiled(model, dtype).create_infer_request()

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(request.infer(given, share_inputs=True)[0])

    return run


def _check_openvino(dtype: str) -> None:
    reason = "int8 needs a model that nncf has quantised, on texts of the task"
    check_dtype("openvino", dtype, ("float32", "bfloat16"), reason)
    able = need("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bfloat16" and "BF16" not in able:  # it would compute in float32 without a word
        raise PeerError(f"openvino: dtype = {dtype!r}: this CPU does not compute in that; its openvino does {able}")


def _openvino_compiled(model: Any, dtype: str) -> Any:
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": short,
        "KV_CACHE_PRECISION": short,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return need("openvino").Core().compile_model(model, "CPU", settings)


class _OpenvinoGpt2(PlainGpt2):
    """The cache of a layer is k and v [B, H, P, K].

    openvino keeps a cache inside its attention only if the rows can be reordered, as in a search with beams.
    """

    def forward(self, input_ids: Tensor, order: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """As `step`; order: [B], the row that each goes on from"""
        return self.step(input_ids, [cache.index_select(0, order) for cache in past])

    def attend(self, maps: Any, x: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, *new = split_heads(maps, x)
        k, v = (torch.cat(pair, 2) for pair in zip(past, new, strict=True))
        rows, length, before = *x.shape[:2], past[0].shape[2]
        seen = torch.arange(before + length) <= torch.arange(before, before + length).unsqueeze(1)  # [S, P + S]
        # One mask for all rows is what openvino 2026.4 gets wrong in bfloat16.
        mask = seen[None, None].expand(rows, 1, length, before + length)
        states = F.scaled_dot_product_attention(q, k, v, mask, scale=maps.scaling)
        return states.transpose(1, 2).reshape(x.shape), (k, v)


def openvino_decoder(directory: Path, dtype: str) -> DecoderRun:
    """One request, whose cache is its state."""
    _check_openvino(dtype)
    request = _openvino_compiled(_openvino_gpt2(directory), dtype).create_infer_request()

    def run(input_ids: Tensor, n: int) -> Tensor:
        order = torch.arange(len(input_ids), dtype=torch.int32).numpy()
        request.reset_state()

        def step(ids: Tensor) -> Tensor:
            return torch.from_numpy(request.infer({0: ids.numpy(), 1: order}, share_inputs=True)[0])

        return greedy(step, input_ids, n)

    return run


def _openvino_gpt2(directory: Path) -> Any:
    """input_ids [B, S], order [B] -> logits [B, V]; the caches are the model's state, at first without a token."""
    openvino = need("openvino")
    model = from_transformers("GPT2LMHeadModel", directory)
    config = model.config
    heads, head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    past = [torch.zeros(2, heads, 3, head) for _ in range(2 * config.num_hidden_layers)]
    shown = (example(config.vocab_size)[0], torch.arange(2, dtype=torch.int32), *past)
    with quiet():
        graph = openvino.convert_model(_OpenvinoGpt2(model).eval(), example_input=shown)
    graph.inputs[1].get_node().set_partial_shape(openvino.PartialShape([-1]))
    names = {f"past.{i}": f"present.{i}" for i in range(len(past))}
    for before, after, pair in zip(graph.inputs[2:], graph.outputs[1:], names.items(), strict=True):
        before.get_node().set_partial_shape(openvino.PartialShape([-1, heads, -1, head]))
        before.tensor.set_names({pair[0]})
        after.tensor.set_names({pair[1]})
    graph.validate_nodes_and_infer_types()
    need("openvino._offline_transformations").apply_make_stateful_transformation(graph, names)
    _begin_empty(graph, heads, head)
    return graph


def _begin_empty(graph: Any, heads: int, head: int) -> None:
    """Each cache begins as [B, H, 0, K]: without that openvino does not keep it inside its attention."""
    ops = need("openvino.opset13")
    rows = ops.gather(ops.shape_of(graph.inputs[0], output_type="i64"), [0], 0)
    sizes = [torch.tensor([size]).numpy() for size in (heads, 0, head)]
    empty = ops.broadcast(torch.tensor(0.0).numpy(), ops.concat([rows, *sizes], 0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()
