"""onnxruntime: exported, optimised by its own tool for transformers, and for int8 quantised."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .common import DecoderRun, EncoderRun, check_dtype, example, greedy, need, quiet
from .plain import PlainBert, PlainGpt2, split_heads
from .torch_peers import bert_of_transformers, from_transformers

_OPSET = 17


def onnx_encoder(directory: Path, dtype: str) -> EncoderRun:
    """A session on the optimised graph; padding becomes a length of each row."""
    _check_onnx(dtype)
    bert = bert_of_transformers(directory)
    model = PlainBert(bert, fused=False).eval()
    inputs = ["input_ids", "attention_mask"]
    dynamic = {name: {0: "rows", 1: "length"} for name in (*inputs, "states")}
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "model.onnx")
        _export_onnx(model, example(bert.config.vocab_size), file, inputs, ["states"], dynamic)
        session = _onnx_session(file, dtype, "bert", bert.config)

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(session.run(["states"], given)[0])

    return run


def _check_onnx(dtype: str) -> None:
    check_dtype("onnxruntime", dtype, ("float32", "int8"), "its CPU kernels do not compute in bfloat16")
    need("onnxruntime")


def _export_onnx(
    model: nn.Module, example: tuple[Tensor, ...], file: Path, inputs: list[str], outputs: list[str], dynamic: Any
) -> None:
    """By tracing: onnxruntime's optimiser finds no attention in what torch.export writes."""
    need("onnx")
    with quiet():
        torch.onnx.export(
            model,
            example,
            file,
            dynamo=False,
            opset_version=_OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=dynamic,
        )


def _onnx_session(file: Path, dtype: str, kind: str, config: Any) -> Any:
    """The exported graph optimised, for int8 quantised, and loaded. What it writes lies beside the file."""
    onnxruntime, optimizer = need("onnxruntime"), need("onnxruntime.transformers.optimizer")
    ready = file.with_name("optimised.onnx")
    with quiet():
        options = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        optimizer.optimize_model(str(file), kind, **options).save_model_to_file(str(ready))
        if dtype == "int8":
            whole, ready = ready, file.with_name("int8.onnx")
            floats = {"DefaultTensorType": need("onnx").TensorProto.FLOAT}  # it does not know onnxruntime's operators
            quantization = need("onnxruntime.quantization")
            less = not torch.cpu._is_vnni_supported()  # as its documentation advises: products of 8 bits overflow
            quantization.quantize_dynamic(whole, ready, per_channel=True, reduce_range=less, extra_options=floats)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(str(ready), settings, providers=["CPUExecutionProvider"])


class _OnnxGpt2(PlainGpt2):
    """The cache of a layer is [2, B, H, P, K], k and v."""

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """As `step`"""
        return self.step(input_ids, past)

    def attend(self, maps: Any, x: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        states, present = _OnnxAttention.apply(x, maps.c_attn.weight, maps.c_attn.bias, past[0], maps)
        return states, (present,)


class _OnnxAttention(torch.autograd.Function):
    """onnxruntime's Attention: the map to q, k and v in it. Its optimiser no longer finds it in GPT-2 by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, past: Tensor, maps: Any) -> tuple[Tensor, Tensor]:
        """Only its shapes and types are looked at."""
        _, k, v = split_heads(maps, x)
        return torch.zeros_like(x), torch.cat([past, torch.stack([k, v])], 3)

    @staticmethod
    def symbolic(graph: Any, x: Any, weight: Any, bias: Any, past: Any, maps: Any) -> Any:
        no_mask = graph.op("prim::Constant")
        no_mask.setType(torch._C.OptionalType.ofTensor())
        settings = {"num_heads_i": maps.num_heads, "unidirectional_i": 1, "scale_f": maps.scaling}
        states, present = graph.op("com.microsoft::Attention", x, weight, bias, no_mask, past, outputs=2, **settings)
        states.setType(x.type())
        present.setType(past.type())
        return states, present


def onnx_decoder(directory: Path, dtype: str) -> DecoderRun:
    """A step a session, the cache handed on as it is."""
    _check_onnx(dtype)
    model = from_transformers("GPT2LMHeadModel", directory)
    config = model.config
    heads, head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    past, present = ([f"{time}.{i}" for i in range(config.num_hidden_layers)] for time in ("past", "present"))
    shown = (example(config.vocab_size)[0], *(torch.zeros(2, 2, heads, 3, head) for _ in past))
    dynamic = {"input_ids": {0: "rows", 1: "length"}, "logits": {0: "rows"}}
    dynamic |= {name: {1: "rows", 3: time} for names, time in ((past, "before"), (present, "after")) for name in names}
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "model.onnx")
        _export_onnx(_OnnxGpt2(model).eval(), shown, file, ["input_ids", *past], ["logits", *present], dynamic)
        session = _onnx_session(file, dtype, "gpt2", config)

    def run(input_ids: Tensor, n: int) -> Tensor:
        empty = torch.zeros(2, len(input_ids), heads, 0, head).numpy()
        caches = [need("onnxruntime").OrtValue.ortvalue_from_numpy(empty)] * len(past)
        binding = session.io_binding()

        def step(ids: Tensor) -> Tensor:
            given = ids.numpy()
            binding.bind_cpu_input("input_ids", given)
            for name, cache in zip(past, caches, strict=True):
                binding.bind_ortvalue_input(name, cache)
            for name in ("logits", *present):
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            logits, *caches[:] = binding.get_outputs()
            return torch.from_numpy(logits.numpy())

        return greedy(step, input_ids, n)

    return run
