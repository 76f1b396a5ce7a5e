"""A step of BERT's pretraining on masked words, on a CPU: hubmodels beside transformers' Trainer and a plain loop.

    python benchmarks/training.py [--cells full,lines,paragraphs] [--layers N] [--dtype float32|bfloat16]
                                  [--dropout P] [--rounds N] [--data DIRECTORY]

    full        8 rows of 128 tokens of running text
    lines       64 lines of English books as they stand in the file, hard-wrapped, in random order
    paragraphs  16 paragraphs of the same books, each of which most corpora keep on one line, cut at 128 tokens

    Trainer     transformers' Trainer.train(), fused AdamW, gradients clipped, its batches padded to the longest row
    plain loop  the same model in five lines of torch
    hubmodels   what `hubmodels pretrain` does with a batch, in a process that keeps freed memory, as it has
    products    the matrix products of hubmodels' linear maps, forwards and backwards, and nothing else: its floor

All start from the same weights and see the same batches, collated from lists within what is timed. Each is a process of
its own, and they take turns, step by step, so that a busy machine slows all alike; of the Trainer, a step is all that
its loop does from the end of one step to the end of the next. The first step warms up. Without dropout, losses must be
equal step by step, or nothing is told. Useful tokens are those that are no padding; a ratio is the median of each
round's ratio, with the least and the most; peak MB is the most resident memory (VmHWM).
"""

import argparse
import lzma
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hubmodels
from hubmodels.heads import IGNORED
from hubmodels.layers import Linear
from hubmodels.products import linear, multiplies
from hubmodels.tokenizers import WordPieceTokenizer
from hubmodels.training.allocator import keep_freed_memory
from hubmodels.training.batches import MicroBatch
from hubmodels.training.distributed import World
from hubmodels.training.engine import Engine
from hubmodels.training.objectives import WORDS
from hubmodels.training.settings import Settings as TrainingSettings

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
ROWS = {"full": 8, "lines": 64, "paragraphs": 16}
LENGTH = 128
TRAINER, PLAIN, OURS, PRODUCTS = "Trainer", "plain loop", "hubmodels", "products"
RATE, DECAY, CLIP = 1e-4, 0.01, 1.0
ALIKE = {"float32": 1e-4, "bfloat16": 2e-2}  # the most that two losses may differ, as a part of the loss
REST = 0.25  # seconds: OpenMP's threads of one process wait busily for a while, and the next one needs the processors
Row = dict[str, list[int]]
Done = Callable[[float], None]


class Settings(NamedTuple):
    cell: str
    layers: int
    dtype: str
    dropout: float
    steps: int
    data: Path

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def multiplied(self) -> torch.dtype:
        """In what this CPU computes products of `dtype` fastest"""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype if multiplies(dtype) else torch.float32


def make_rows(settings: Settings) -> list[Row]:
    """All samples of all steps, in order: ids and labels, 15 % of the words masked."""
    draw = random.Random(0)
    tokenizer = WordPieceTokenizer.from_vocab(settings.data / "vocab" / "bert-base-uncased" / "vocab.txt")
    with lzma.open(settings.data / "text" / "english_books.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(2**24)
    count = ROWS[settings.cell] * settings.steps
    texts = [" ".join(part.split()) for part in text.split("\n" if settings.cell == "lines" else "\n\n")]
    texts = draw.sample([part for part in texts if part], count)
    rows = tokenizer.rows(texts, LENGTH)
    if settings.cell == "full":
        words = [i for row in tokenizer.rows(" ".join(text[: 8 * LENGTH * count].split())) for i in row[1:-1]]
        cuts = range(0, count * (LENGTH - 2), LENGTH - 2)
        rows = [[tokenizer.cls_token_id, *words[cut : cut + LENGTH - 2], tokenizer.sep_token_id] for cut in cuts]
    return [_masked(row, tokenizer.mask_token_id, draw) for row in rows]


def _masked(row: list[int], mask: int, draw: random.Random) -> Row:
    words = range(1, len(row) - 1)
    chosen = set(draw.sample(words, max(1, round(0.15 * len(words)))))
    return {
        "input_ids": [mask if place in chosen else i for place, i in enumerate(row)],
        "labels": [i if place in chosen else IGNORED for place, i in enumerate(row)],
    }


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Padded to the longest row"""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    ids, labels = padded("input_ids", 0), padded("labels", IGNORED)
    mask = torch.tensor([[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_checkpoint(settings: Settings, directory: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": settings.layers, "hidden_dropout_prob": settings.dropout}
    BertForMaskedLM(BertConfig(**shape, attention_probs_dropout_prob=settings.dropout)).save_pretrained(directory)


def load(system: str, directory: Path) -> nn.Module:
    if system == OURS:
        return hubmodels.bertForMaskedLM(directory).train()
    from transformers import BertForMaskedLM

    return BertForMaskedLM.from_pretrained(directory).train()


def make_step(model: nn.Module, settings: Settings) -> Callable[[list[Row]], None]:
    """Forwards, backwards, clip, fused AdamW; as the Trainer has it, no weight decay on biases and norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=RATE, fused=True)

    def step(rows: list[Row]) -> None:
        with settings.autocast():
            loss = model(**collate(rows)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()

    return step


def engine_step(model: nn.Module, settings: Settings) -> Callable[[list[Row]], None]:
    """What `hubmodels pretrain` does with a batch"""
    precision = "bf16" if settings.dtype == "bfloat16" else "fp32"
    chosen = TrainingSettings(steps=settings.steps, weight_decay=DECAY, clip=CLIP, precision=precision)
    engine = Engine(model, chosen, World(0, 1, torch.device("cpu")))

    def step(rows: list[Row]) -> None:
        counts = {WORDS: count_labels(rows)}
        engine.backward(0, [MicroBatch(collate(rows), counts, count_tokens(rows))], counts)
        engine.update(RATE)

    return step


def run_trainer(model: nn.Module, rows: list[Row], settings: Settings, wait: Callable[[], None], done: Done) -> None:
    """As `contend`"""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Turn(TrainerCallback):
        begun = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.begun = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            done(time.perf_counter() - self.begun)
            if state.global_step < settings.steps:
                self.on_train_begin()

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=ROWS[settings.cell],
            max_steps=settings.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            bf16=settings.dtype == "bfloat16",
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Turn()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class Maps(NamedTuple):
    """Inputs of each linear map of hubmodels, gradients of its outputs, and its weight."""

    parts: list[tuple[Tensor, Tensor, Tensor]]

    @property
    def operations(self) -> int:
        return sum(6 * len(x) * weight.numel() for x, _, weight in self.parts)

    def multiply(self) -> None:
        for x, _, weight in self.parts:
            linear(x, weight)  # as in training: the weight waits for a gradient
        for x, grad, weight in reversed(self.parts):
            grad @ weight.detach()
            grad.mT @ x


def maps_of(model: Any, rows: list[Row], settings: Settings) -> Maps:
    tokens, labels = count_tokens(rows), count_labels(rows)
    *_, last = model.transformer.layers  # which is finished for the labels and each row's first token
    fewer = {id(part) for side in (last.attention.output, last.feed_forward) for part in side.modules()}
    parts = [part for part in model.transformer.layers.modules() if isinstance(part, Linear)]
    weights = [(labels + len(rows) if id(part) in fewer else tokens, part.weight) for part in parts]
    weights += [(labels, model.head.dense.weight), (labels, model.transformer.embeddings.word.weight)]
    dtype = settings.multiplied()
    made = [(count, weight.detach().to(dtype).requires_grad_()) for count, weight in weights]
    return Maps([(torch.randn(n, w.shape[1]).to(dtype), torch.randn(n, len(w)).to(dtype), w) for n, w in made])


def count_tokens(rows: list[Row]) -> int:
    return sum(len(row["labels"]) for row in rows)


def count_labels(rows: list[Row]) -> int:
    return sum(i != IGNORED for row in rows for i in row["labels"])


def contend(system: str, settings: Settings, directory: Path, pipe: Any) -> None:
    """A contestant's process. Each step waits for a word, and answers with its seconds and loss, of the products with
    their operations a second; at the end comes the peak of the process's memory, in MB."""
    rows, size, losses = make_rows(settings), ROWS[settings.cell], [0.0]
    batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    if system in (OURS, PRODUCTS):
        keep_freed_memory()
    model = load(OURS if system == PRODUCTS else system, directory)
    model.register_forward_hook(lambda _, __, output: losses.append(float(output[0].detach())))

    def done(seconds: float) -> None:
        pipe.send((seconds, losses[-1]))

    if system == TRAINER:
        run_trainer(model, rows, settings, pipe.recv, done)
    else:
        step = engine_step(model, settings) if system == OURS else make_step(model, settings)
        for batch in batches:
            maps = maps_of(model, batch, settings) if system == PRODUCTS else None
            pipe.recv()
            begun = time.perf_counter()
            step(batch) if maps is None else maps.multiply()
            spent = time.perf_counter() - begun
            if maps is not None:
                losses = [maps.operations / spent]
            done(spent)
    with open("/proc/self/status", encoding="utf-8") as lines:
        pipe.send(next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")))


class Found(NamedTuple):
    """seconds and losses of each step, the first left out of the seconds; peak in MB"""

    seconds: list[float]
    losses: list[float]
    peak: float


def contest(settings: Settings, directory: Path) -> dict[str, Found]:
    context = multiprocessing.get_context("spawn")
    pipes = {name: context.Pipe() for name in (TRAINER, PLAIN, OURS, PRODUCTS)}
    processes = [
        context.Process(target=contend, args=(name, settings, directory, there), daemon=True)
        for name, (_, there) in pipes.items()
    ]
    for process in processes:
        process.start()
    answers: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
    for _ in range(settings.steps):
        for name, (here, _) in pipes.items():
            here.send(None)
            answers[name].append(here.recv())
            time.sleep(REST)
    peaks = {name: here.recv() for name, (here, _) in pipes.items()}
    for process in processes:
        process.join()
    return {
        name: Found([s for s, _ in each[1:]], [loss for _, loss in each], peaks[name]) for name, each in answers.items()
    }


def compare_losses(found: dict[str, Found], settings: Settings) -> str:
    """Raises SystemExit if they differ."""
    losses = {name: each.losses for name, each in found.items() if name != PRODUCTS}
    if settings.dropout:
        return "not compared, for the dropout"
    pairs = [pair for name in (PLAIN, OURS) for pair in zip(losses[name], losses[TRAINER], strict=True)]
    worst = max(abs(mine - right) / right for mine, right in pairs)
    if not worst <= ALIKE[settings.dtype]:
        raise SystemExit(f"losses differ by {worst:.1e} of their value, step by step: {losses}")
    first, last = losses[TRAINER][0], losses[TRAINER][-1]
    return f"from {first:.4f} to {last:.4f}, equal to {worst:.0e} of their value in {len(losses[OURS])} steps"


def tell(settings: Settings, directory: Path) -> None:
    found = contest(settings, directory)
    rows, size = make_rows(settings), ROWS[settings.cell]
    batches = [rows[begin : begin + size] for begin in range(size, len(rows), size)]
    tokens = [count_tokens(batch) for batch in batches]
    wastes = [size * max(len(row["labels"]) for row in batch) / count_tokens(batch) for batch in batches]
    print(f"{settings.cell}: {size} rows, {median(tokens):.0f} tokens, {median(wastes):.2f} times as many with padding")
    print(f"  losses {compare_losses(found, settings)}")
    print(f"{'':12}{'seconds':>9}{'tokens/s':>10}{'x Trainer':>24}{'peak MB':>10}{'/ Trainer':>11}")
    base = found[TRAINER]
    for name, (seconds, _, peak) in found.items():
        speed = median(count / spent for count, spent in zip(tokens, seconds, strict=True))
        ratios = [theirs / mine for theirs, mine in zip(base.seconds, seconds, strict=True)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = "" if name == PRODUCTS else f"{peak:10.0f}{peak / base.peak:11.2f}"
        print(f"{name:12}{median(seconds):9.2f}{speed:10.0f}{ratio:>24}{memory}", flush=True)
    share = [floor / mine for floor, mine in zip(found[PRODUCTS].seconds, found[OURS].seconds, strict=True)]
    speed = median(found[PRODUCTS].losses[1:])
    print(f"  the products are {median(share):.0%} of hubmodels' step ({min(share):.0%}-{max(share):.0%}),")
    print(f"  at {speed / 1e9:.0f} GFLOP/s; 2048 x 2048 x 2048 alone has {peak_speed(settings) / 1e9:.0f}")


def peak_speed(settings: Settings) -> float:
    """Operations a second of a product that is as easy as they come"""
    x = torch.randn(2048, 2048).to(settings.multiplied())
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - begun)
    return 2 * len(x) ** 3 / median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(ROWS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=ALIKE, default="float32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    print(f"BERT-base, {options.layers} layers, {options.dtype}, dropout {options.dropout}, torch {torch.__version__}")
    for cell in options.cells.split(","):
        settings = Settings(
            cell, options.layers, options.dtype, options.dropout, options.rounds + 1, options.data.resolve()
        )
        with tempfile.TemporaryDirectory() as directory:
            make_checkpoint(settings, Path(directory))
            tell(settings, Path(directory))


if __name__ == "__main__":
    main()
