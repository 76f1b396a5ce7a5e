"""How much of a machine a run makes use of: the products that a model needs, beside what its device multiplies at best.

Source: Kaplan 2020 §2.1 (forwards 2, backwards 4 for each weight and token); Chowdhery 2022, appendix B (utilisation).
"""

import time
from statistics import median
from typing import Any

import torch

from ..layers import Linear


def flops_per_token(model: Any, length: int, labelled: float) -> float:
    """Of a training step, for each token of rows of `length`; `labelled`: the share of the tokens that a word is
    guessed for. What is computed twice to save memory does not count.
    """
    transformer, config = model.transformer, model.config
    layers: float = _weights(transformer.layers)
    head = _weights(model.head) if hasattr(model, "head") else 0
    if not transformer.causal and len(transformer.layers):  # the last block is finished for these tokens alone
        last = transformer.layers[-1]
        layers -= (1 - labelled) * (_weights(last.attention.output) + _weights(last.feed_forward))
    words = transformer.embeddings.word.weight.numel()
    seen = length / 2 if transformer.causal else length
    attention = 2 * config.num_hidden_layers * config.hidden_size * seen  # scores and sums, for each a product
    return 6.0 * (layers + attention + labelled * (head + words))


def _weights(module: Any) -> int:
    """Of the linear maps in it"""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, Linear))


def matrix_peak(device: torch.device, precision: str) -> float:
    """Multiplications and additions a second in the best of this device's large products, measured now."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median(_seconds(a, b) for _ in range(5))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    begun = time.perf_counter()
    product = a @ b
    if product.is_cuda:
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - begun
