"""The keys and values of the tokens a decoder has seen: explicit data, made by the caller, filled by each forward.

Shape letters: see `layers.py`; M is the room in columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .packing import Packing

_DENSE = 0.75  # of the columns are tokens: from there on one call that also looks at padding is as fast


class Seen(NamedTuple):
    """What new tokens look at: keys, values [B, H, columns, K] of all so far, themselves included, and a mask.

    mask: [B, 1, S, columns] bool, which of the new may look at which; None: all at all.
    begins: of one new token a row, the column from which on all of the row are tokens; None: not known.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    begins: list[int] | None = None


class Cache:
    """Preallocated keys and values, [2, B, H, M, K] for each layer. `length`: columns in use.

    A forward with `cache=` computes only what is new and lets it look at what is in here; columns that were padding
    stay padding. M is `room`. After a forward that failed the cache holds what it held before.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, room: int, head_size: int, *, device=None, dtype=None
    ) -> None:
        self.batch, self.room, self.length = batch, room, 0
        shape = (2, batch, heads, room, head_size)
        self.layers = [LayerCache(self, torch.empty(shape, device=device, dtype=dtype)) for _ in range(layers)]
        self.mask: Tensor | None = None  # of the columns that are being added, as in `Seen`
        self.begins: list[int] | None = None  # as in `Seen`
        self._real: Tensor | None = None  # [B, M] bool, which columns are tokens; None: all

    @property
    def keys(self) -> list[Tensor]:
        """[B, H, M, K] for each layer"""
        return [layer.kept[0] for layer in self.layers]

    @property
    def values(self) -> list[Tensor]:
        """[B, H, M, K] for each layer"""
        return [layer.kept[1] for layer in self.layers]

    def begin(self, packing: Packing) -> None:
        """Make ready for the new columns of `packing`. Raises InputError if they do not fit."""
        end = self.length + packing.length
        if packing.batch != self.batch or end > self.room or packing.pairwise is not None:
            raise InputError(
                f"cache: it has room for {self.batch} rows of {self.room} tokens and holds {self.length}; expected as "
                f"many rows, at most {self.room - self.length} more tokens and a mask [B, S], got {packing.batch} rows "
                f"of {packing.length}{' and a mask of pairs' if packing.pairwise is not None else ''}"
            )
        real, device = packing.real(), self.layers[0].kept.device
        if real is not None:
            self.mark()
        if self._real is not None:
            self._real[:, self.length : end] = True if real is None else real
        self.mask = None if self._real is None else self._real[:, None, None, :end]
        one = packing.length == 1 and device.type == "cpu" and not torch.compiler.is_compiling()
        self.begins = self._begins_of_rows(end) if one else None
        if packing.length > 1 and self.length:  # an empty cache is looked at by none: see `extend`
            before = torch.ones(packing.length, end, dtype=torch.bool, device=device).tril(self.length)
            seen = before if self.mask is None else self.mask & before
            self.mask = seen | ~seen.any(-1, keepdim=True)  # what may see nothing sees all: no empty softmax

    def _begins_of_rows(self, end: int) -> list[int] | None:
        """The padding columns in front of each row, if there is enough of it to be worth a call for each row."""
        if self._real is None:
            return None
        real = self._real[:, :end]
        counts, begins = real.sum(1), real.int().argmax(1)
        left = bool((counts == end - begins).all()) and int(counts.sum()) < _DENSE * real.numel()
        return begins.tolist() if left else None

    @property
    def real(self) -> Tensor | None:
        """[B, columns in use] bool, which are tokens; None: all"""
        return None if self._real is None else self._real[:, : self.length]

    def mark(self) -> None:
        """Say of each column whether it is a token, even if all are."""
        if self._real is None:
            self._real = torch.ones(self.batch, self.room, dtype=torch.bool, device=self.layers[0].kept.device)

    def grow(self) -> None:
        """Count in one more column, of tokens, that somebody else has filled."""
        if self._real is not None:
            self._real[:, self.length] = True
        self.length += 1

    def select(self, rows: Tensor) -> None:
        """Go on with these rows [B'], in this order; a row may be taken several times, or not at all."""
        self.batch = len(rows)
        for layer in self.layers:
            layer.kept = layer.kept.index_select(1, rows)
        self._real = None if self._real is None else self._real[rows]


class LayerCache:
    """One layer's part of a `Cache`. kept: [2, B, H, M, K], keys and values."""

    def __init__(self, cache: Cache, kept: Tensor):
        self.cache, self.kept = cache, kept

    def extend(self, new: Tensor, packing: Packing) -> Seen | None:
        """Keep new keys and values, [T, 2, H, K]. None: nothing came before them, so they look at each other alone."""
        begin, end = self.cache.length, self.cache.length + packing.length
        columns = packing.unpack(new).permute(2, 0, 3, 1, 4)  # [2, B, H, S, K]
        self.kept[:, :, :, begin:end] = columns.detach()
        if begin == 0:
            return None
        seen = self.kept[:, :, :, :end]
        if torch.is_grad_enabled() and new.requires_grad:  # what is held counts as given, what is new does not
            seen = torch.cat([seen[:, :, :, :begin], columns.to(seen.dtype)], 3)
        keys, values = seen.unbind()
        return Seen(keys, values, self.cache.mask, self.cache.begins)
