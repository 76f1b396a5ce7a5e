"""Blocks of packed maps for inference: additions and activations come with the products, and nothing drops out.

Shape letters: see `layers.py`.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .cache import LayerCache
from .layers import Attention, FeedForward, LayerNorm, PostNormBlock, PreNormBlock, has_hooks, hooks_of, is_plain
from .maps import PackedLinear, PackedMap, parts_for
from .packing import Packing


class FusedPostNormBlock(PostNormBlock):
    """`PostNormBlock` of packed maps, without dropout."""

    def forward(
        self, x: Tensor, packing: Packing, probs: list[Tensor] | None = None, past: LayerCache | None = None
    ) -> Tensor:
        """As `Block` says."""
        x = self.attention_norm(self.attention(x, packing, probs, past, packing.kept_of(x)))
        return self.feed_forward_norm(_fed(self.feed_forward, x, x))


class FusedPreNormBlock(PreNormBlock):
    """`PreNormBlock` of packed maps, without dropout."""

    def forward(
        self, x: Tensor, packing: Packing, probs: list[Tensor] | None = None, past: LayerCache | None = None
    ) -> Tensor:
        """As `Block` says."""
        x = self.attention(self.attention_norm(x), packing, probs, past, packing.kept_of(x))
        return _fed(self.feed_forward, self.feed_forward_norm(x), x)


def _fed(feed_forward: Any, x: Tensor, residual: Tensor) -> Tensor:
    """[T, D] twice -> [T, D]"""
    return feed_forward.output.plus(feed_forward.inner.bent(x, feed_forward.activation), residual)


FUSED: dict[type, type] = {PostNormBlock: FusedPostNormBlock, PreNormBlock: FusedPreNormBlock}


def fuses(block: Any) -> bool:
    """Whether a block's parts are as its fused forward calls them: nothing of them replaced or hooked."""
    attention, feed = block.attention, block.feed_forward
    plain = (
        type(attention).forward is Attention.forward and not has_hooks(attention) and "forward" not in vars(attention)
    )
    plain = plain and is_plain(feed, FeedForward) and is_plain(block.dropout, nn.Dropout)
    return plain and all(isinstance(m, PackedMap) for m in (attention.output, feed.inner, feed.output))


class Parts:
    """All modules within some blocks, as they are now."""

    def __init__(self, blocks: nn.ModuleList):
        self.blocks = blocks
        self._held = [
            (owner._modules, name, part) for owner in blocks.modules() for name, part in owner.named_children()
        ]
        self._hooks = [hooks for _, _, part in self._held for hooks in hooks_of(part)]
        self._count = len(blocks)

    def may_be_passed_by(self) -> bool:
        """Whether nobody would see it if the blocks were not called themselves: no block has been added since, no part
        replaced, none has hooks, nothing trains, and neither autocast nor a compiler looks at them.
        """
        if self.blocks.training or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if any(self._hooks) or len(self.blocks) != self._count:
            return False
        return all(held.get(name) is part for held, name, part in self._held)


class FusedBlocks:
    """`Shortcut` of few tokens through an encoder's fused blocks: what these do, in one loop.

    Python runs slowly between products, which leave nothing of it in the CPU's cache: to go from module to module takes
    up to a tenth of the time of a short text (docs/performance.md). So the loop knows its blocks' weights beforehand.
    """

    most: ClassVar[int] = 1024  # tokens; of more, Python's time is not seen

    def __init__(self, blocks: nn.ModuleList):
        self.blocks, self._parts = blocks, Parts(blocks)
        self._steps = [_steps_of(block) for block in blocks]
        first: Any = blocks[0]
        self._dtype = first.attention_norm.weight.dtype
        self._weights = [part.weight for part in first.modules() if isinstance(part, PackedLinear)]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.blocks,)  # a copy's weights are its own

    def __call__(self, x: Tensor, packing: Packing) -> Tensor | None:
        """None: these tokens are not for the loop."""
        if not self._parts.may_be_passed_by():
            return None
        if not 0 < len(x) <= self.most or x.dtype != self._dtype or x.requires_grad:
            return None
        if any(parts_for(len(x), weight) > 1 for weight in self._weights):
            return None
        mixed = _mixed_whole if kernels.takes_padded(x.dtype, packing) else _mixed
        for attention, qkv, attended, norm, bent, fed, last in self._steps:
            x = torch.layer_norm(attended(mixed(attention, qkv(x), packing), x), *norm)
            x = torch.layer_norm(fed(bent(x), x), *last)
        return x


def fused_blocks(blocks: nn.ModuleList) -> FusedBlocks | None:
    """None: there are none, or not all are as its loop takes them."""
    return FusedBlocks(blocks) if len(blocks) > 0 and all(map(_loops, blocks)) else None


def _loops(block: Any) -> bool:
    if type(block) is not FusedPostNormBlock or not isinstance(block.attention.qkv, PackedMap):
        return False
    attention, norms = block.attention, (block.attention_norm, block.feed_forward_norm)
    if type(attention).attend is not Attention.attend or "attend" in vars(attention) or attention.scale != 1.0:
        return False
    weights: list[Any] = [part.weight for part in block.modules() if isinstance(part, (LayerNorm, PackedLinear))]
    return all(is_plain(norm, LayerNorm) for norm in norms) and len({weight.dtype for weight in weights}) == 1


def _steps_of(block: Any) -> tuple[Any, ...]:
    attention, feed = block.attention, block.feed_forward
    norm, last = (
        (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        for norm in (block.attention_norm, block.feed_forward_norm)
    )
    bent = feed.inner.bare_bent(feed.activation)
    qkv, attended, fed = attention.qkv.bare(), attention.output.bare_plus(), feed.output.bare_plus()
    return attention, qkv, attended, norm, bent, fed, last


def _mixed(attention: Any, qkv: Tensor, packing: Packing) -> Tensor:
    """[T, 3 * D] -> [T, D]: queries, keys and values -> what the output map takes"""
    q, k, v = qkv.view(len(qkv), 3, attention.heads, -1).unbind(1)  # [T, H, K]
    return attention.attend(q, k, v, packing, None).flatten(1)


def _mixed_whole(attention: Any, qkv: Tensor, packing: Packing) -> Tensor:
    """As `_mixed`, of a batch without padding."""
    split = qkv.view(packing.batch, packing.length, 3, attention.heads, -1)
    q, k, v = split.transpose(1, 3).unbind(2)  # [B, H, S, K]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=packing.causal)
    return out.transpose(1, 2).reshape(len(qkv), -1)
