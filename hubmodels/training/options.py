"""What a pretraining run is told: every option, its default and its meaning, for the command and for Python alike."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .settings import OPTIMISERS, PRECISIONS, SCHEDULES
from .text import FORMS

CHOICES: dict[str, tuple[str, ...]] = {
    "form": FORMS,
    "objective": ("mlm", "causal"),
    "nsp": ("strict", "google", "sop", "none"),
    "optimiser": OPTIMISERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "start": ("noise", "neighbours"),
}
_POSITIVE = ("batch_size", "batch_tokens", "micro_tokens", "lr", "ngram", "keep", "save_every", "log_every")
_SHARES = ("eval_share", "mlm_probability", "short_rows", "dropout", "ema", "adam_beta1", "adam_beta2")
_BUDGETS = ("epochs", "steps", "tokens", "hours")


def told(default: Any, *help: str) -> Any:
    """A field with its line of help, which may be told in parts."""
    return dataclasses.field(default=default, metadata={"help": " ".join(help)})


@dataclass(frozen=True)
class Options:
    """A pretraining run. What is None is decided by the rest, as its help says.

    Raises InputError for what cannot be.
    """

    out: Path = told(Path(), "directory of the run and of what it leaves; a run that is there goes on")
    train: tuple[str, ...] = told((), "text to learn from: files or globs, .txt or .jsonl, also .gz and .xz")
    eval: tuple[str, ...] = told((), "held-out text of the same kind")
    general: tuple[str, ...] = told((), "held-out text of another kind, to see what is forgotten")
    eval_share: float = told(0.0, "without --eval: hold out this share of the documents of --train (0)")
    form: str = told(
        "sentences",
        "sentences: one a line, a blank line between documents; paragraphs: one a line; lines: each a document;",
        "running: wrapped lines, a blank line between paragraphs (sentences)",
    )
    text_key: str = told("text", "of the objects in a .jsonl (text)")
    document_end: str | None = told(None, "a regular expression: a line that has it parts two documents, and goes")
    cache: Path | None = told(None, "where tokens are kept (beside downloaded weights)")
    overwrite_cache: bool = told(False, "make the tokens anew")

    config: Path | None = told(None, "a config.json, whole or in part: a new model of that shape")
    weights: str | None = told(None, "a weights name or path, whose training goes on")
    tokenizer: str | None = told(None, "a weights name or path (that of --weights)")
    train_tokenizer: int | None = told(None, "make a vocabulary of so many entries from the text")
    cased: bool = told(False, "of --train-tokenizer: capitals are letters of their own")
    add_tokens: Path | None = told(None, "a word a line: more words for the vocabulary, each the mean of its pieces")
    dropout: float | None = told(None, "in the whole model (as the config says)")
    start: str = told("noise", "of a new model; neighbours: the first heads look at the words beside (noise)")

    objective: str | None = told(None, "mlm: hidden words; causal: the next one (as the model's family has it)")
    nsp: str | None = told(
        None,
        "strict: half of the second sentences come from another document; google: the published procedure; sop: half",
        "of the pairs are swapped; none (strict, where the text has documents and the model has the head)",
    )
    mlm_probability: float = told(0.15, "share of the words that is hidden (0.15)")
    whole_word_mask: bool = told(False, "hide all pieces of a word")
    ngram: int = told(1, "hide up to so many neighbouring words together (1)")
    word_list: Path | None = told(None, "a word a line: what --whole-word-mask hides whole where no blank parts words")
    length: tuple[tuple[int, float], ...] = told(
        ((128, 1.0),), "tokens in a row, as 128; or one after the other, each for a share, as 128:0.9 512:0.1 (128)"
    )
    short_rows: float = told(0.1, "share of the pairs that are cut shorter (0.1)")

    epochs: float | None = told(None, "times over the text (3, if there is no other budget)")
    steps: int | None = told(None, "steps of the optimiser")
    tokens: int | None = told(None, "tokens to read")
    hours: float | None = told(None, "time to take")
    batch_size: int | None = told(None, "rows in a step, over all ranks (32)")
    batch_tokens: int | None = told(None, "tokens in a step instead: short rows fill it as long ones do")
    micro_tokens: int = told(16384, "tokens that a rank takes at once: of a larger step in parts (16384)")
    lr: float | None = told(None, "the highest learning rate (1e-4; with --weights 2e-5)")
    schedule: str = told("linear", "of the learning rate after the warm-up (linear)")
    warmup: int = told(0, "steps of rising learning rate (0)")
    optimiser: str = told("adamw", "google: without bias correction, as published; muon: for the matrices (adamw)")
    weight_decay: float = told(0.01, "not of biases and norms (0.01)")
    adam_beta1: float = told(0.9, "of the mean of gradients (0.9)")
    adam_beta2: float = told(0.999, "of the mean of their squares (0.999)")
    adam_epsilon: float | None = told(None, "what is added to its root (1e-8; google: 1e-6)")
    clip: float = told(1.0, "the greatest norm of a step's gradient; 0: any (1)")
    precision: str = told("fp32", "of the products (fp32)")
    ema: float = told(0.0, "decay of an average of the weights, which is then what is left; 0: none (0)")
    gradient_checkpointing: bool = told(False, "compute twice, remember less")
    compile: bool = told(False, "torch.compile the blocks")
    shard: bool = told(False, "FSDP: weights and optimiser are parted among the ranks")
    device: str | None = told(None, "cpu or cuda (a GPU, if there is one)")
    workers: int = told(0, "processes that make batches ahead (0)")
    seed: int = told(0, "of everything that is drawn (0)")

    save_every: int = told(500, "steps between checkpoints (500)")
    save_minutes: float = told(0.0, "minutes between checkpoints, as well; 0: steps alone (0)")
    keep: int = told(2, "checkpoints to keep, beside the best (2)")
    eval_every: int = told(0, "steps between evaluations; 0: before and after alone (0)")
    pseudo_perplexity: int = told(0, "at the end also of so many held-out rows, each word hidden alone (0)")
    log_every: int = told(50, "steps between lines of the log (50)")
    tensorboard: bool = told(False, "a log for TensorBoard, too")
    half: bool = told(False, "leave the weights in half precision; the last figures are theirs")
    overwrite: bool = told(False, "begin anew, whatever the run in --out has")

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise InputError(f"{flag(name)} {value}: expected {', '.join(allowed[:-1])} or {allowed[-1]}")
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        for name in (*_BUDGETS, *_POSITIVE):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{flag(name)} {value}: expected more than 0")
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{flag(name)} {value}: expected 0 or more, and less than 1")
        for length, share in self.length:
            if length < 8 or not 0 < share <= 1:
                raise InputError(f"--length {length}:{share:g}: expected 8 tokens or more, and a share up to 1")
        if not math.isclose(total := sum(share for _, share in self.length), 1.0, abs_tol=1e-6):
            raise InputError(f"--length: expected shares that are 1 together, got {total:g}")

    def _check_together(self) -> None:
        if not self.train:
            raise InputError("--train: expected at least one file or glob of text")
        budgets = [f"{flag(name)} {getattr(self, name)}" for name in _BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise InputError(f"expected one budget, got {', '.join(budgets)}")
        if self.batch_size is not None and self.batch_tokens is not None:
            raise InputError("expected --batch-size or --batch-tokens, got both")
        if (self.config is None) == (self.weights is None):
            raise InputError("expected --config FILE for a new model, or --weights NAME for one whose training goes on")
        if self.weights is None and (self.tokenizer is None) == (self.train_tokenizer is None):
            raise InputError("a new model needs --tokenizer NAME or --train-tokenizer N, one of the two")
        if self.weights is not None and self.train_tokenizer is not None:
            raise InputError("--train-tokenizer: --weights has a vocabulary; --add-tokens gives it more words")
        if self.eval and self.eval_share:
            raise InputError("--eval-share: --eval has the held-out text already")
        if self.word_list is not None and not self.whole_word_mask:
            raise InputError("--word-list: it is for --whole-word-mask, which is off")


def flag(name: str) -> str:
    """A field's name as the command spells it."""
    return "--" + name.replace("_", "-")
