"""A case: a tiny BERT, rows of random words, and a run of the loop; in this process or in one for each rank."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hubmodels.families.bert import BertConfig, BertForPreTraining
from hubmodels.heads import IGNORED
from hubmodels.layers import initialise
from hubmodels.training.batches import Batches
from hubmodels.training.chance import generator
from hubmodels.training.distributed import World, started
from hubmodels.training.loop import Phase, Progress, fit
from hubmodels.training.samples import Sample
from hubmodels.training.settings import Settings

WORDS, PADDING, LONGEST = 61, 0, 16
SECONDS = 60  # that a process may take


class Rows:
    """Samples: `count` rows of 4 to `length` words, of which some are hidden, others in every epoch."""

    def __init__(self, count: int, length: int):
        self.count, self.length, self.dropped = count, length, {}

    def epoch(self, number: int) -> "Rows._Epoch":
        return self._Epoch(self, number)

    class _Epoch:
        def __init__(self, rows: "Rows", number: int):
            self.rows, self.number = rows, number
            self.sizes = generator(1, 0, purpose=rows.length).integers(4, rows.length + 1, rows.count, np.int32)
            self.sizes[:1] = rows.length

        def sample(self, index: int) -> Sample:
            rng, size = generator(1, self.number, index), int(self.sizes[index])
            ids = rng.integers(1, WORDS, size)
            hidden = rng.random(size) < 0.3
            hidden[rng.integers(size)] = True
            labels = np.where(hidden, ids, IGNORED)
            types = (np.arange(size) >= size // 2).astype(np.int64)
            return Sample(np.where(hidden, 3, ids), labels, types, int(rng.integers(2)))


class Unpaired(Rows):
    """Rows without a second sentence."""

    class _Epoch(Rows._Epoch):
        def sample(self, index):
            return super().sample(index)._replace(next_sentence=None)


def nothing(_: Any) -> None:
    """No fault, no hook."""


@dataclass(frozen=True)
class Case:
    """What is trained, on what, how.

    fault: called with the model in each process before it is trained; hook: called with every Progress.
    """

    directory: Path
    settings: Settings = field(default_factory=lambda: Settings(steps=6))
    rows: int = 6
    most: int = 30
    count: int = 20
    phases: tuple[tuple[int, float], ...] = ((12, 1.0),)
    dropout: float = 0.0
    layers: int = 2
    dtype: torch.dtype = torch.float32
    facts: dict[str, Any] = field(default_factory=lambda: {"text": "some"})
    evaluate: Callable[[Any], dict[str, float]] | None = None
    workers: int = 0
    fault: Callable[[Any], None] = nothing
    hook: Callable[[Progress], None] = nothing

    def but(self, **changes: Any) -> "Case":
        """This one, changed; also in a field of its settings."""
        own = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        others = {name: value for name, value in changes.items() if name not in own}
        return replace(self, **{"settings": replace(self.settings, **others), **own})


class Outcome(NamedTuple):
    """weights: of the model that comes back; seen, figures: what rank 0 was told; end: what fit returned."""

    weights: dict[str, torch.Tensor]
    seen: list[Progress]
    figures: list[tuple[int, dict[str, float]]]
    end: Progress

    @property
    def losses(self) -> list[float]:
        return [progress.loss for progress in self.seen]


def make_model(case: Case) -> BertForPreTraining:
    """The same weights every time."""
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=case.layers,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=case.dropout,
        attention_probs_dropout_prob=case.dropout,
        max_position_embeddings=LONGEST,
    )
    model = BertForPreTraining(config).to(case.dtype)
    initialise(model, 0.1, torch.Generator().manual_seed(0))
    return model


def make_batches(case: Case, length: int, world: World) -> Batches:
    return Batches(
        Rows(case.count, length),
        PADDING,
        rows=case.rows,
        most=case.most,
        seed=2,
        rank=world.rank,
        ranks=world.ranks,
        workers=case.workers,
    )


def train(case: Case, world: World | None = None) -> Outcome:
    """The run, in this process."""
    world = world or World(0, 1, torch.device("cpu"))
    model = make_model(case)
    seen, figures = [], []
    case.fault(model)

    def observe(progress: Progress) -> None:
        seen.append(progress)
        case.hook(progress)

    end = fit(
        model,
        [Phase(make_batches(case, length, world), share) for length, share in case.phases],
        case.settings,
        case.directory,
        world=world,
        facts=case.facts,
        evaluate=case.evaluate,
        observe=observe,
        observe_evaluation=lambda step, found: figures.append((step, found)),
    )
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Outcome(weights, seen, figures, end)


def size_of(model: torch.nn.Module) -> dict[str, float]:
    """Some figure of the weights."""
    assert not model.training
    return {"loss": float(sum(tensor.double().square().sum() for tensor in model.state_dict().values()))}


def distance(left: Outcome, right: Outcome) -> float:
    """The greatest between two weights."""
    assert left.weights.keys() == right.weights.keys()
    return max(float((left.weights[name] - right.weights[name]).abs().max()) for name in left.weights)


def is_same(left: Outcome, right: Outcome) -> bool:
    """Whether all weights are bit-equal."""
    return left.weights.keys() == right.weights.keys() and all(
        torch.equal(left.weights[name], right.weights[name]) for name in left.weights
    )


# --- Processes


class Died(NamedTuple):
    """A process that gave no answer. code: minus the number of the signal that ended it. text: its traceback."""

    code: int
    text: str = ""


@cache
def processes() -> Any:
    """Starts processes that have imported everything: they are forked by one that has, and that has no threads."""
    context = multiprocessing.get_context("forkserver")
    late = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"]
    context.set_forkserver_preload(["training_case", *late])  # what torch itself imports when it is first needed
    before = dict(os.environ)
    tests = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), before.get("PYTHONPATH", "")])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Ranks:
    """Processes that run `function(argument, world)` as torchrun would start them."""

    def __init__(self, ranks: int, function: Callable[[Any, World], Any], argument: Any):
        context = processes()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            pipe, theirs = context.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = context.Process(target=_obey, args=(theirs, environment, function, argument))
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def answers(self) -> list[Any]:
        """What each returned, or how it died."""
        found = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                answer = pickle.loads(pipe.recv_bytes()) if pipe.poll(SECONDS) else Died(0, "it hangs")
            except EOFError:
                answer = None
            if isinstance(answer, Died):
                process.kill()
            process.join()
            found.append(Died(process.exitcode) if answer is None else answer)
        return found


def spawn(ranks: int, argument: Any, function: Callable[[Any, World], Any] = train) -> list[Any]:
    """What `function(argument, world)` returns on each rank, or how it died."""
    return Ranks(ranks, function, argument).answers()


def _obey(pipe: Any, environment: dict[str, str], function: Callable[[Any, World], Any], argument: Any) -> None:
    """The child."""
    os.environ.update(environment)
    os.fsync = lambda descriptor: None  # nobody pulls the plug, and a disk may be busy
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process that no server has made
    try:
        with started("cpu") as world:
            answer = function(argument, world)
    except BaseException:
        answer = Died(1, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))  # tensors by value: the process ends


def signals_in(step: int, number: int, progress: Progress) -> None:
    """A hook (partial) that sends this process a signal, which comes in the middle of step `step`, from 2 on."""
    if progress.step == step - 1:
        os.kill(os.getpid(), number)
