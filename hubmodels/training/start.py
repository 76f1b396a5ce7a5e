"""Where a new model starts from, if not from noise alone."""

import math
from typing import Any

import torch


@torch.no_grad()
def look_at_neighbours(model: Any, layers: int = 2, sharpness: float = 8.0, size: float = 0.06) -> None:
    """Start with heads that look at the neighbouring words, one or two to the left or right.

    A BERT that starts from noise spends millions of words at the loss of a unigram model, until some heads have found
    out that neighbours matter. So positions start as sinusoids in the first K dimensions, where turning by an angle is
    a step to the side (Vaswani 2017 §3.5), and in the first layers queries and keys start as the identity there, keys
    turned by each head's offset. Everything is trained on from there; mimetic initialisation (Trockman and Kolter 2023,
    arXiv 2305.09828) is the same thought. sharpness: the score of the offset before the softmax; size: of a position.
    """
    table, heads = model.transformer.embeddings.position.weight, model.config.num_attention_heads
    positions, width = table.shape
    head = width // heads  # K
    frequencies = math.pi * 30.0 ** (-torch.arange(head // 2) / (head // 2))
    angles = torch.arange(positions)[:, None] * frequencies
    table.zero_()
    table[:, :head] = torch.cat([angles.sin(), angles.cos()], 1) * size * math.sqrt(2)
    word = width * model.config.initializer_range**2  # squared length of a word's vector, before the norm
    share = head * size**2 / (head * size**2 + word)  # of a position in the squared length of a state, D
    scale = math.sqrt(sharpness * math.sqrt(head) / (share * width))
    for layer in model.transformer.layers[:layers]:
        query, key, _ = layer.get_parameter("attention.qkv.weight").chunk(3)
        for number in range(heads):
            offset = (-1, 1, -2, 2)[number % 4]
            cos, sin = (offset * frequencies).cos().diag(), (offset * frequencies).sin().diag()
            rows = slice(number * head, (number + 1) * head)
            query[rows, :head] += scale * torch.eye(head)
            key[rows, :head] += scale * torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
