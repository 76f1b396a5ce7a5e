"""Processes that train together: who they are, what they tell one another, and how they share a model.

`torchrun` starts them and says by its environment who is who; a process without it is a world of one, and needs no
process group.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..layers import Block

_PATIENCE = timedelta(days=1)  # with a rank that prepares data for all; one that is dead is noticed at once

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `ranks`, of which it is number `rank`, and the device that it computes on.

    group: for numbers and objects, on the CPU; None: there is nobody else.
    """

    rank: int
    ranks: int
    device: torch.device
    group: Any = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and decides."""
        return self.rank == 0

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each number summed over the ranks, in float64. All give the same names."""
        names = sorted(numbers)
        summed = self._sum(torch.tensor([numbers[name] for name in names], dtype=torch.float64))
        return dict(zip(names, summed.tolist(), strict=True))

    def sum_array(self, numbers: np.ndarray) -> np.ndarray:
        """An array summed over the ranks. It may be longer on some: what others lack counts as 0."""
        length = max(self.gather(len(numbers)))
        return self._sum(torch.from_numpy(np.pad(numbers, (0, length - len(numbers))))).numpy()

    def _sum(self, numbers: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def broadcast(self, value: T) -> T:
        """Rank 0's: anything that pickles."""
        return self.gather(value if self.is_main else None)[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Each rank's, in their order, on all ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)


@contextmanager
def started(device: str | None = None) -> Iterator[World]:
    """The world of this process, as torchrun's environment describes it; it ends with the block.

    device: None: a GPU, if there is one, else the CPU. Of several GPUs a rank has that of its local number.
    Raises InputError if there are fewer GPUs than local ranks.
    """
    ranks = world_size()
    place = _place(device, int(os.environ.get("LOCAL_RANK", 0)) if ranks > 1 else None)
    if ranks == 1:
        yield World(0, 1, place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    yield World(dist.get_rank(), ranks, place, dist.new_group(backend="gloo", timeout=_PATIENCE))
    dist.destroy_process_group()  # after an error it would wait for ranks that are gone


def world_size() -> int:
    """How many processes torchrun says that there are; without it one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _place(device: str | None, local: int | None) -> torch.device:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type != "cuda" or local is None:
        return place
    if local >= torch.cuda.device_count():
        raise InputError(
            f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many processes, "
            "torchrun --nproc-per-node=gpu"
        )
    return torch.device("cuda", local)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is compiled and sharded piece by piece: the blocks, or the model itself if it has none."""
    return [part for part in model.modules() if isinstance(part, Block)] or [model]


def replicated(model: nn.Module, world: World) -> nn.Module:
    """Wrapped so that a backward pass ends with the mean of all ranks' gradients; weights become those of rank 0."""
    if world.ranks == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def sharded(model: nn.Module, world: World) -> nn.Module:
    """A copy of which each rank has a part (FSDP2): a block's weights are gathered while it computes.

    Gradients are the mean of all ranks'. Weights become those of rank 0.
    """
    from torch.distributed.fsdp import fully_shard  # a second of imports, for those who shard

    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    twin = copy.deepcopy(model)
    mesh = dist.init_device_mesh(world.device.type, (world.ranks,))
    for part in blocks_of(twin):
        fully_shard(part, mesh=mesh)
    if blocks_of(twin) != [twin]:
        fully_shard(twin, mesh=mesh)
    return twin


def exchanging(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of a micro-batch: whether the ranks exchange gradients after it, or only add up."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if now else model.no_sync()
    if sync := getattr(model, "set_requires_gradient_sync", None):  # FSDP2
        sync(now)
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on all ranks, which all have to ask for it; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor
