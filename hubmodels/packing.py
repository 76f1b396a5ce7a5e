"""Padded batch <-> packed tokens.

An encoder does the same work for a padding position as for a word. So the real tokens of a batch are packed
into one list [T, ...] before the first layer and put back into their places after the last one; everything
between sees real tokens only. Shape letters: see `layers.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class Packing(NamedTuple):
    """Where the packed tokens of one batch stand.

    batch, length: B and S of the padded batch.
    indices: [T] position of each packed token in the flattened [B * S] batch; None: nothing is padding, T = B * S.
    offsets: [B + 1] where each row begins in the packed list (int32, as variable-length kernels take it); None
        exactly when `indices` is.
    longest: tokens in the longest row.
    pairwise: [B, S, S] bool, which token (row) may look at which (column); None: all real tokens of the row.
    causal: nothing looks at what comes after it, whatever else holds.
    kept: [M] the packed tokens of which a block makes states; these look at all, as ever. None: of all.
    """

    batch: int
    length: int
    indices: Tensor | None = None
    offsets: Tensor | None = None
    longest: int = 0
    pairwise: Tensor | None = None
    causal: bool = False
    kept: Tensor | None = None

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]"""
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat[self.indices]

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """[T, ...] -> [B, S, ...], padding positions hold `fill`."""
        shape = (self.batch, self.length, *packed.shape[1:])
        if self.indices is None:
            return packed.view(shape)
        flat = packed.new_full((self.batch * self.length, *packed.shape[1:]), fill)
        return flat.index_copy(0, self.indices, packed).view(shape)

    def ends(self, device: torch.device) -> Tensor:
        """[B + 1] where each row begins in the packed list and the last one ends, int32"""
        if self.offsets is not None:
            return self.offsets
        return torch.arange(self.batch + 1, dtype=torch.int32, device=device) * self.length

    def parts(self, most: int) -> list[tuple[slice, "Packing"]]:
        """Neighbouring rows of at most `most` tokens together, or one row of more: where they stand in [T], and their
        own packing. Of a mask of pairs only the whole.
        """
        if self.pairwise is not None or self.batch * self.length == 0:
            return [(slice(None), self)]
        ends: Sequence[int] = range(0, (self.batch + 1) * self.length, self.length)
        if self.offsets is not None:
            ends = self.offsets.tolist()
        cuts = [0]
        for row in range(1, self.batch):
            if ends[row + 1] - ends[cuts[-1]] > most:
                cuts.append(row)
        return [self._part(begin, end, ends) for begin, end in zip(cuts, [*cuts[1:], self.batch], strict=True)]

    def _part(self, begin: int, end: int, ends: Sequence[int]) -> tuple[slice, "Packing"]:
        """Of the rows from `begin` to before `end`"""
        where, part = slice(ends[begin], ends[end]), self._replace(batch=end - begin)
        if self.indices is None or self.offsets is None:
            return where, part
        indices, offsets = self.indices[where] - begin * self.length, self.offsets[begin : end + 1] - ends[begin]
        return where, part._replace(indices=indices, offsets=offsets)

    def first(self, packed: Tensor) -> Tensor:
        """[T, D] -> [B, D], each row's first real token ([CLS]); zeros for a row that is all padding."""
        if packed.shape[0] == 0:
            return packed.new_zeros(self.batch, packed.shape[1])
        if self.offsets is None:
            return packed.view(self.batch, self.length, -1)[:, 0]
        begins = self.offsets[:-1].clamp(max=packed.shape[0] - 1)
        return packed[begins].where(self.offsets.diff()[:, None] > 0, 0.0)

    def last(self, packed: Tensor) -> Tensor:
        """[T, D] -> [B, D], each row's last real token; zeros for a row that is all padding."""
        if packed.shape[0] == 0:
            return packed.new_zeros(self.batch, packed.shape[1])
        if self.offsets is None:
            return packed.view(self.batch, self.length, -1)[:, -1]
        ends = (self.offsets[1:] - 1).clamp(min=0)
        return packed[ends].where(self.offsets.diff()[:, None] > 0, 0.0)

    def keep(self, wanted: Tensor) -> tuple[Tensor, "Packing"]:
        """Of the tokens at [B, S], True, and of each row's first: where they stand in [T], and their own packing."""
        flags, ends = self.pack(wanted).clone(), self.ends(wanted.device)
        flags[ends[:-1][ends.diff() > 0]] = True
        return flags.nonzero().squeeze(1), find_padding(self.unpack(flags, fill=False))

    def kept_of(self, packed: Tensor) -> Tensor:
        """[T, D] -> [M, D], or as it is"""
        return packed if self.kept is None else packed.index_select(0, self.kept)

    def real(self) -> Tensor | None:
        """[B, S] bool, True for a token; None: nothing is padding"""
        if self.indices is None:
            return None
        flat = torch.zeros(self.batch * self.length, dtype=torch.bool, device=self.indices.device)
        return flat.index_fill(0, self.indices, True).view(self.batch, self.length)

    def mask(self, device: torch.device) -> Tensor | None:
        """Who may look at whom, broadcastable to [B, 1, S, S] bool; None: everybody at everybody.

        For kernels that want the padded batch. Who may look nowhere looks at everything, so that no softmax is empty.
        """
        seen = self.pairwise
        if seen is None and (real := self.real()) is not None:
            seen = real[:, None]
        if self.causal:
            before = torch.ones(self.length, self.length, dtype=torch.bool, device=device).tril()
            seen = before if seen is None else seen & before
        return None if seen is None else (seen | ~seen.any(-1, keepdim=True)).view(-1, 1, *seen.shape[-2:])


def find_padding(attention_mask: Tensor, causal: bool = False) -> Packing:
    """[B, S], non-zero for a real token -> the batch's packing.

    Padding may stand anywhere in a row. How many tokens are real is known only when it runs, so this stays outside
    of what torch.compile traces: one graph break before the first layer, none after it.
    """
    batch, length = attention_mask.shape
    real = attention_mask != 0
    lengths = real.sum(1, dtype=torch.int32)
    shortest, longest = (int(n) for n in lengths.aminmax()) if batch else (0, 0)
    if shortest == length:
        return Packing(batch, length, causal=causal)
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Packing(batch, length, real.flatten().nonzero().squeeze(1), offsets, longest, causal=causal)


# As torch.compiler.disable, which imports the whole compiler at once, as much again as torch; this waits for a call.
_find_padding_untraced = torch._disable_dynamo(find_padding)


def packing_of(batch: int, length: int, attention_mask: Tensor | None, causal: bool = False) -> Packing:
    """The packing of a [B, S] batch under no mask, a mask [B, S] of real tokens, or a mask [B, S, S] of pairs.

    Under a mask of pairs every position counts as a token: nothing is packed away.
    Raises InputError if the mask has another shape.
    """
    if attention_mask is None:
        return Packing(batch, length, causal=causal)
    shape = tuple(attention_mask.shape)
    if shape == (batch, length):
        find = _find_padding_untraced if torch.compiler.is_compiling() else find_padding
        return find(attention_mask, causal)
    if shape == (batch, length, length):
        return Packing(batch, length, pairwise=attention_mask != 0, causal=causal)
    raise InputError(
        f"attention_mask: expected shape {(batch, length)} (1 = token, 0 = padding) or {(batch, length, length)} "
        f"(1 = row may look at column), got {shape}"
    )
