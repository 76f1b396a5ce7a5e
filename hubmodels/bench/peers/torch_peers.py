"""transformers, and torch.nn.TransformerEncoder with its weights."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .common import DTYPES, DecoderRun, EncoderRun, check_dtype, need, quiet
from .plain import Embeddings


def from_transformers(
    cls: str, directory: Path, dtype: str = "float32", attention: str = "sdpa", device: str = "cpu"
) -> Any:
    """A model of transformers in eval mode."""
    reason = "int8 is not in transformers itself on a CPU"
    check_dtype("transformers", dtype, ("float32", "bfloat16"), reason)
    transformers = need("transformers")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet():
            model = getattr(transformers, cls).from_pretrained(
                directory, dtype=DTYPES[dtype], attn_implementation=attention
            )
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return model.eval().requires_grad_(False).to(device)


def bert_of_transformers(directory: Path, dtype: str = "float32", attention: str = "sdpa", device: str = "cpu") -> Any:
    """transformers' BertModel without its pooler, of which nobody asks."""
    model = from_transformers("BertModel", directory, dtype, attention, device)
    model.pooler = None
    return model


def transformers_encoder(directory: Path, dtype: str, device: str = "cpu") -> EncoderRun:
    return _run_bert(bert_of_transformers(directory, dtype, device=device))


def transformers_eager(directory: Path, dtype: str, device: str = "cpu") -> EncoderRun:
    return _run_bert(bert_of_transformers(directory, dtype, "eager", device))


def transformers_compiled(directory: Path, dtype: str, device: str = "cpu") -> EncoderRun:
    return _run_bert(torch.compile(bert_of_transformers(directory, dtype, device=device)))


def _run_bert(model: Any) -> EncoderRun:
    @torch.inference_mode()
    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # transformers looks itself whether there is padding, but not in what is compiled.
        mask = None if attention_mask.all() else attention_mask
        return model(input_ids, attention_mask=mask).last_hidden_state

    return run


def transformer_encoder(directory: Path, dtype: str, device: str = "cpu") -> EncoderRun:
    """torch.nn.TransformerEncoder: its fast path, on nested tensors where there is padding."""
    check_dtype("transformer encoder", dtype, ("float32", "bfloat16"), "torch.nn.TransformerEncoder has no int8")
    bert = bert_of_transformers(directory)
    embeddings, model = (part.to(device, DTYPES[dtype]) for part in (Embeddings(bert), _torch_encoder(bert)))

    @torch.inference_mode()
    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        padding = None if attention_mask.all() else ~attention_mask.bool()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
            return model(embeddings(input_ids), src_key_padding_mask=padding)

    return run


def _torch_encoder(bert: Any) -> nn.TransformerEncoder:
    """The weights of transformers' BertModel in torch's own modules."""
    config = bert.config
    known = config.hidden_act in ("gelu", "relu")  # those of the fast path; by name, else the layer takes the slow one
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        activation=config.hidden_act if known else bert.encoder.layer[0].intermediate.intermediate_act_fn,
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
    )
    encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True)
    for ours, theirs in zip(encoder.layers, bert.encoder.layer, strict=True):
        ours.load_state_dict(_torch_names(theirs))
    return encoder.eval().requires_grad_(False)


def _torch_names(layer: Any) -> dict[str, Tensor]:
    """A layer of transformers' BertModel -> the state of torch.nn.TransformerEncoderLayer"""
    attention = layer.attention.self
    parts = [attention.query, attention.key, attention.value]
    maps = {
        "self_attn.out_proj": layer.attention.output.dense,
        "norm1": layer.attention.output.LayerNorm,
        "linear1": layer.intermediate.dense,
        "linear2": layer.output.dense,
        "norm2": layer.output.LayerNorm,
    }
    state = {f"{name}.{key}": tensor for name, part in maps.items() for key, tensor in part.state_dict().items()}
    state["self_attn.in_proj_weight"] = torch.cat([part.weight for part in parts])
    state["self_attn.in_proj_bias"] = torch.cat([part.bias for part in parts])
    return state


def transformers_decoder(directory: Path, dtype: str, device: str = "cpu", **cache: Any) -> DecoderRun:
    """`generate`, greedy; cache: which one, as it takes it."""
    model = from_transformers("GPT2LMHeadModel", directory, dtype, device=device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def run(input_ids: Tensor, n: int) -> Tensor:
        mask = torch.ones_like(input_ids)
        found = model.generate(input_ids, attention_mask=mask, max_new_tokens=n, do_sample=False, **cache)
        return found[:, input_ids.shape[1] :]

    return run


def transformers_static(directory: Path, dtype: str, device: str = "cpu") -> DecoderRun:
    return transformers_decoder(directory, dtype, device, cache_implementation="static", disable_compile=True)
