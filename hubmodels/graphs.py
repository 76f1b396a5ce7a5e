"""An encoder's blocks and a step of decoding as CUDA graphs: launched whole, not kernel by kernel.

A graph runs on tensors of one shape at one place. Packed tokens come in any number, so they are copied into room for
some more: the next of a few sizes, of which each has its graph. What stands behind the last token belongs to no row,
is computed with the others, and looked at by none. A step of decoding attends to the cache's whole room under a mask.
Shape letters: see `layers.py`.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .cache import Cache, LayerCache, Seen
from .layers import has_hooks
from .packing import Packing

_MOST = 16  # graphs of an encoder; the one that was not used for the longest time goes


class Pool:
    """Memory that graphs share, each for what lies between its first tensor and its last; made when one asks for it.

    They are to run one after the other. What a graph is given and what it leaves were made before it was recorded, and
    lie elsewhere, so it does not matter which runs next.
    """

    @cached_property
    def handle(self) -> Any:
        return torch.cuda.graph_pool_handle()


Record = Callable[[Callable[[], None], Pool], Callable[[], None]]  # what is to be run -> what runs it again, at once


def record_on_cuda(run: Callable[[], None], pool: Pool) -> Callable[[], None]:
    """Run it a few times on a stream of its own, as torch asks, then capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.handle):
        run()
    return graph.replay


def room_for(tokens: int) -> int:
    """The next number of tokens that has a graph: at most an eighth more than asked for, and a multiple of 16."""
    step = max(16, 2 ** (tokens.bit_length() - 4))
    return -(-tokens // step) * step


class _Recorded(NamedTuple):
    x: Tensor  # [room, D]
    offsets: Tensor  # [rows + 1]
    out: Tensor  # [room, D]
    replay: Callable[[], None]


class GraphedBlocks:
    """`Shortcut` through all blocks of an encoder."""

    def __init__(self, blocks: nn.ModuleList, record: Record = record_on_cuda):
        self.blocks, self.record = blocks, record
        self.graphs: OrderedDict[tuple[int, ...], _Recorded] = OrderedDict()
        self._at: tuple[int, ...] = ()  # the weights' addresses: graphs are theirs
        self._pool = Pool()
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.blocks, self.record  # a copy's weights are elsewhere

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, x: Tensor, packing: Packing) -> Tensor | None:
        """None: these tokens are not for graphs."""
        if len(x) == 0 or packing.pairwise is not None or any(has_hooks(part) for part in self.blocks.modules()):
            return None
        if self.blocks.training or (x.is_cuda and x.itemsize != 2):  # no variable-length attention
            return None
        with self._lock, torch.no_grad():
            return self._replayed(x, packing)

    def _replayed(self, x: Tensor, packing: Packing) -> Tensor:
        at = tuple(parameter.data_ptr() for parameter in self.blocks.parameters())
        if at != self._at:
            self.graphs.clear()
            self._at, self._pool = at, Pool()
        offsets, longest = packing.offsets, packing.longest
        if offsets is None:
            longest = packing.length
            offsets = torch.arange(0, len(x) + 1, longest, dtype=torch.int32, device=x.device)
        key = (room_for(len(x)), 1 << (packing.batch - 1).bit_length(), 1 << (longest - 1).bit_length())
        if key not in self.graphs:
            self.graphs[key] = self._recorded(x, *key)
        self.graphs.move_to_end(key)
        if len(self.graphs) > _MOST:
            self.graphs.popitem(last=False)
        graph = self.graphs[key]
        graph.x[: len(x)] = x
        graph.offsets[: len(offsets)] = offsets
        graph.offsets[len(offsets) :] = len(x)  # rows without tokens
        graph.replay()
        return graph.out[: len(x)].clone()

    def _recorded(self, like: Tensor, tokens: int, rows: int, longest: int) -> _Recorded:
        with torch.inference_mode(False):  # they outlive the mode that the first batch came in
            x, out = (torch.zeros(tokens, like.shape[1], dtype=like.dtype, device=like.device) for _ in range(2))
            offsets = torch.zeros(rows + 1, dtype=torch.int32, device=like.device)
        packing = Packing(rows, longest, torch.arange(tokens, device=like.device), offsets, longest)

        def run() -> None:
            y = x
            for block in self.blocks:
                y = block(y, packing)
            out.copy_(y)

        return _Recorded(x, offsets, out, self.record(run, self._pool))


class _StaticLayerCache(LayerCache):
    """Writes at a column that a tensor names, and shows the whole room."""

    def __init__(self, cache: "_StaticCache", kept: Tensor):
        super().__init__(cache, kept)
        self.static = cache

    def extend(self, new: Tensor, packing: Packing) -> Seen:
        columns = packing.unpack(new).permute(2, 0, 3, 1, 4)  # [2, B, H, 1, K]
        self.kept.index_copy_(3, self.static.column, columns.to(self.kept.dtype))
        keys, values = self.kept.unbind()
        return Seen(keys, values, self.static.seen)


class _StaticCache(Cache):
    """Another's tensors. column: [1], where the next token goes; seen: [B, 1, 1, M] bool, what it looks at."""

    def __init__(self, cache: Cache):
        self.batch, self.room, self.length = cache.batch, cache.room, 0
        device = cache.layers[0].kept.device
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.seen = torch.zeros(cache.batch, 1, 1, cache.room, dtype=torch.bool, device=device)
        self.layers = [_StaticLayerCache(self, layer.kept) for layer in cache.layers]

    def begin(self, packing: Packing) -> None:
        """Whether there is room is known to the other."""


class GraphedStep:
    """The next word's scores after one more token a row, on a cache that goes on to hold all that was seen."""

    def __init__(self, model: Any, cache: Cache, record: Record):
        self.cache, self.static = cache, _StaticCache(cache)
        self.static.seen[..., : cache.length] = cache.real[:, None, None] if cache.real is not None else True
        for layer in cache.layers:  # what is masked has weight 0, which makes no number of one that is none
            layer.kept[:, :, :, cache.length :] = 0
        device = self.static.column.device
        self.tokens = torch.zeros(cache.batch, dtype=torch.long, device=device)
        self.positions = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        words = model.transformer.embeddings.word.num_embeddings
        self.scores = torch.zeros(cache.batch, words, device=device)
        self.static.column.fill_(cache.length)

        def run() -> None:
            self.static.length = 0  # `encode` counts; where the token stands is said
            self.scores.copy_(model.next_scores(self.tokens, self.positions, self.static))

        self.replay = record(run, Pool())

    def __call__(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """As `Step`; what it gives is overwritten by the next call."""
        column = self.cache.length
        self.tokens.copy_(tokens)
        self.positions.copy_(positions if positions is not None else torch.full_like(self.positions, column))
        self.static.column.fill_(column)
        self.static.seen[..., column] = True
        self.replay()
        self.cache.grow()
        return self.scores

    def goes_on(self, rows: int) -> bool:
        """It cannot: it was of other rows, and the next end soon."""
        return False


class GraphedSteps:
    """`Steps` as a graph for each generation."""

    least: ClassVar[int] = 64  # to record one takes as long as some of them save

    def __init__(self, record: Record = record_on_cuda):
        self.record = record

    def __call__(self, model: Any, cache: Cache) -> GraphedStep:
        """As `Steps`"""
        return GraphedStep(model, cache, self.record)
