"""BERT and GPT-2 in the plain operations that exporters know, on the modules of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embeddings(nn.Module):
    """BERT's embeddings of texts that are all of the first segment."""

    def __init__(self, bert: Any):
        super().__init__()
        theirs = bert.embeddings
        self.word, self.norm = theirs.word_embeddings, theirs.LayerNorm
        self.places: Tensor
        self.register_buffer("places", theirs.position_embeddings.weight + theirs.token_type_embeddings.weight[0])

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]"""
        return self.norm(self.word(input_ids) + self.places[: input_ids.shape[1]])


class PlainBert(nn.Module):
    """transformers' BertModel in the plain operations that the exporters' optimisers know.

    fused: attention is torch's one operation; else products and a softmax.
    """

    def __init__(self, bert: Any, fused: bool):
        super().__init__()
        self.embeddings, self.layers = Embeddings(bert), bert.encoder.layer
        self.heads, self.fused = bert.config.num_attention_heads, fused

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, S] twice -> [B, S, D]"""
        x = self.embeddings(input_ids)
        real = attention_mask.unsqueeze(1).unsqueeze(2).to(x.dtype)
        mask = (1.0 - real) * torch.finfo(x.dtype).min  # [B, 1, 1, S]
        for layer in self.layers:
            inner, outer = layer.attention.output, layer.output
            x = inner.LayerNorm(inner.dense(self.attend(layer.attention.self, x, mask)) + x)
            x = outer.LayerNorm(outer.dense(layer.intermediate(x)) + x)
        return x

    def attend(self, maps: Any, x: Tensor, mask: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]"""
        rows, length, size = x.shape
        head = size // self.heads
        parts = (part(x).view(rows, length, self.heads, head) for part in (maps.query, maps.key, maps.value))
        q, k, v = (part.transpose(1, 2) for part in parts)  # [B, H, S, K]
        if self.fused:
            states = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            states = (q @ k.transpose(-1, -2) / head**0.5 + mask).softmax(-1) @ v
        return states.transpose(1, 2).reshape(rows, length, size)


class PlainGpt2(nn.Module):
    """A step of transformers' GPT2LMHeadModel on a cache, in plain operations; `attend` depends on the exporter."""

    def __init__(self, model: Any):
        super().__init__()
        body = model.transformer
        self.word, self.position, self.norm = body.wte, body.wpe, body.ln_f
        self.layers, self.head = body.h, model.lm_head

    def step(self, input_ids: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[B, S], caches with P tokens -> logits of the last token [B, V], caches with P + S"""
        each = len(past) // len(self.layers)
        before, length = past[0].shape[-2], input_ids.shape[1]
        x = self.word(input_ids) + self.position(torch.arange(before, before + length))
        present: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            added, caches = self.attend(layer.attn, layer.ln_1(x), past[number * each : (number + 1) * each])
            x = x + (added @ layer.attn.c_proj.weight + layer.attn.c_proj.bias)
            inner, outer = layer.mlp.c_fc, layer.mlp.c_proj
            bent = layer.mlp.act(layer.ln_2(x) @ inner.weight + inner.bias)
            x = x + (bent @ outer.weight + outer.bias)
            present.extend(caches)
        return self.head(self.norm(x[:, -1])), *present

    def attend(self, maps: Any, x: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, S, D] and the layer's caches -> [B, S, D], before the last map, and the longer caches"""
        raise NotImplementedError


def split_heads(maps: Any, x: Tensor) -> list[Tensor]:
    """[B, S, D] -> q, k, v [B, H, S, K]"""
    rows, length, _ = x.shape
    parts = (x @ maps.c_attn.weight + maps.c_attn.bias).chunk(3, -1)
    return [part.view(rows, length, maps.num_heads, maps.head_dim).transpose(1, 2) for part in parts]
