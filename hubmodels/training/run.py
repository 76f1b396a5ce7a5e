"""A pretraining run, from text to a directory that loads: `pretrain(Options(...))`."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import InputError
from ..saving import export
from ..tokenizers import Tokenizer, WordPieceTokenizer
from .batches import Batches
from .corpus import Corpus
from .distributed import World, started
from .evaluation import evaluate, pseudo_perplexity
from .flops import flops_per_token, matrix_peak
from .loop import Phase, Progress, fit
from .material import Texts, exam_in, family_in, model_in, pairs_in, samples_in, texts_in, words_in
from .options import Options
from .report import Report
from .samples import Samples
from .settings import Settings

RUN = "run.json"  # marks a directory as a run's, and says what it was told
# What a run that goes on may be told anew: where things are, how they are computed and looked at, and how long it is.
_FREE = set(
    """
    out train eval general cache overwrite_cache epochs steps tokens hours micro_tokens gradient_checkpointing compile
    shard device workers save_every save_minutes keep eval_every pseudo_perplexity log_every tensorboard half overwrite
    """.split()  # noqa: SIM905
)
Figures = dict[str, dict[str, float]]  # of each held-out text


def pretrain(
    options: Options,
    say: Callable[[str], None] = lambda line: None,
    *,
    progress: bool = False,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, or go on where the run in `options.out` stopped; leave a checkpoint that loads, and its card.

    Under torchrun every rank calls it. say: is told what is done, a line at a time. progress: show bars. command: how
    the card says that it was started.
    Returns what metrics.json holds. Raises a HubModelsError that says what to do; what was saved before stays.
    """
    with started(options.device) as world:
        if not world.is_main:
            say, progress = lambda line: None, False
        family = family_in(options)
        _enter(options, world)
        words = words_in(options, world)
        texts = texts_in(options, words.tokenizer, progress)
        for name, corpus in {"train": texts.train, **texts.exams}.items():
            say(f"{name}: {_told(corpus)}")
        pairs = pairs_in(options, family, texts.train)
        model = model_in(options, family, words, pairs)
        return _Run(options, world, model, words.tokenizer, texts, pairs, say).go(progress, command)


def _enter(options: Options, world: World) -> None:
    """Make the directory a run's. Raises InputError if it is something else's."""
    out = options.out
    if not world.is_main:
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: expected a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / RUN).is_file():
        raise InputError(
            f"--out {out}: something else is there; name a new directory, or one of a run that is to go on"
        )
    if options.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN).write_text(json.dumps(dataclasses.asdict(options), indent=1, default=str) + "\n", encoding="utf-8")


def _told(corpus: Corpus) -> str:
    about = corpus.about
    return f"{about['tokens']:,} tokens, {about['documents']:,} documents, {corpus.directory}"


class _Run:
    """What the stages of a run share."""

    def __init__(
        self,
        options: Options,
        world: World,
        model: Any,
        tokenizer: Tokenizer,
        texts: Texts,
        pairs: str,
        say: Callable[[str], None],
    ):
        self.options, self.world, self.say = options, world, say
        self.model, self.tokenizer, self.texts, self.pairs = model, tokenizer, texts, pairs
        longest = max(length for length, _ in options.length)
        self.exams = {name: exam_in(corpus, tokenizer, longest, pairs) for name, corpus in texts.exams.items()}
        self.phases = [self._phase(length, share) for length, share in options.length]
        self.figures: Figures = {}  # the last ones
        self.report: Report | None = None

    def go(self, progress: bool, command: Sequence[str]) -> dict[str, Any]:
        """Look, train, look again, and leave what was made."""
        options, world = self.options, self.world
        settings = _settings(options, self.texts.train, self.phases)
        if world.is_main:
            self.report = Report(options.out, use=self._use(), tensorboard=options.tensorboard, progress=progress)
        is_new: bool = world.broadcast(self.report is not None and self.report.is_new)
        if self.exams and is_new:
            self._examined(self.model.to(world.device))
            self._tell(0)
        end = fit(
            self.model,
            self.phases,
            settings,
            options.out,
            world=world,
            facts=self._facts(),
            evaluate=self._examined if self.exams else None,
            observe=self._observe,
            observe_evaluation=lambda step, _: self._tell(step),
        )
        if options.half:
            self.model.half().float()  # what is kept is what is measured
        if self.exams and (options.half or not self.figures):
            self._examined(self.model)
        return world.broadcast(self._leave(end, self.report, command) if self.report else {})

    def _phase(self, length: int, share: float) -> Phase:
        options, world = self.options, self.world
        batches = Batches(
            samples_in(self.texts.train, self.tokenizer, length, options, self.pairs),
            self.tokenizer.pad_token_id,  # type: ignore[attr-defined]
            rows=None if options.batch_tokens else options.batch_size or 32,
            tokens=options.batch_tokens,
            most=options.micro_tokens,
            seed=options.seed,
            rank=world.rank,
            ranks=world.ranks,
            workers=options.workers,
        )
        return Phase(batches, share)

    def _examined(self, model: Any) -> dict[str, float]:
        """The first text's figures, whose loss decides what is best; all are kept."""
        padding = self.tokenizer.pad_token_id  # type: ignore[attr-defined]
        most = self.options.micro_tokens
        self.figures = {
            name: evaluate(model, samples, padding, most=most, world=self.world) for name, samples in self.exams.items()
        }
        return next(iter(self.figures.values()))

    def _tell(self, step: int) -> None:
        if self.report:
            self.report.evaluation(step, self.figures)
        for name, figures in self.figures.items():
            self.say(f"step {step}, {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))

    def _observe(self, found: Progress) -> None:
        for note in found.notes:
            self.say(note)
        if self.report:
            self.report.progress(found)

    def _use(self) -> float:
        """The share of what all devices multiply at best that one token a second needs"""
        length, _ = self.options.length[0]
        labelled = 1.0 if self.model.transformer.causal else self.options.mlm_probability
        peak = matrix_peak(self.world.device, self.options.precision) * self.world.ranks
        return flops_per_token(self.model, length, labelled) / peak

    def _facts(self) -> dict[str, Any]:
        """What a run that goes on has to agree on"""
        told = {key: value for key, value in dataclasses.asdict(self.options).items() if key not in _FREE}
        digests = {"text": self.texts.train.about["digest"], "vocabulary": self._vocabulary(), "pairs": self.pairs}
        return json.loads(json.dumps({**told, **digests}, default=str))

    def _vocabulary(self) -> str:
        return hashlib.sha256(self.tokenizer.inner.to_str().encode()).hexdigest()

    def _leave(self, end: Progress, report: Report, command: Sequence[str]) -> dict[str, Any]:
        """The checkpoint; its course, figures and card."""
        options, model = self.options, self.model
        if options.pseudo_perplexity and not model.transformer.causal:
            for name, samples in self.exams.items():
                self.figures[name]["pseudo_perplexity"] = self._pseudo_perplexity(samples)
        if options.half or options.pseudo_perplexity:
            self._tell(end.step)
        report.close()
        export(model.half() if options.half else model, options.out, self.tokenizer)
        spent = {"steps": end.step, "tokens": end.tokens, "seconds": round(end.seconds, 1)}
        metrics = {**self.figures, **spent, "passes": end.tokens / max(1, self.texts.train.about["tokens"])}
        report.leave(metrics, self._card(end), command)
        self.say(f"{options.out}: {end.step} steps, {end.tokens:,} tokens in {end.seconds:,.0f} s")
        return metrics

    def _pseudo_perplexity(self, samples: Samples) -> float:
        options, tokenizer = self.options, self.tokenizer
        assert isinstance(tokenizer, WordPieceTokenizer)
        ids = tokenizer.pad_token_id, tokenizer.mask_token_id
        return pseudo_perplexity(self.model, samples, *ids, rows=options.pseudo_perplexity, most=options.micro_tokens)

    def _card(self, end: Progress) -> dict[str, str]:
        """What the card says in a line each"""
        options, texts, config = self.options, self.texts, self.model.config
        shape = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.vocab_size:,} words"
        size = sum(parameter.numel() for parameter in self.model.parameters())
        files = [f"`{Path(file['name']).name}` {file['sha256'][:16]}…" for file in texts.train.about["files"]]
        more = f" and {len(files) - 8} more" if len(files) > 8 else ""
        task = "the next word" if self.model.transformer.causal else f"hidden words ({options.mlm_probability:.0%})"
        pairs = "" if self.pairs == "none" else f", pairs of sentences ({self.pairs})"
        losses = ", ".join(f"{name} {value:.3f}" for name, value in end.losses.items())
        return {
            "model": f"{type(self.model).__name__}, {shape}, {size:,} parameters",
            "begun from": options.weights or f"{options.config}, {options.start}",
            "text": f"{texts.train.about['tokens']:,} tokens, digest {texts.train.about['digest']}",
            "files (SHA-256)": ", ".join(files[:8]) + more,
            "task": task + pairs,
            "run": f"{end.step:,} steps, {end.tokens:,} tokens, {end.seconds:,.0f} s on {self.world.ranks} x "
            f"{self.world.device.type}, {options.precision}, seed {options.seed}",
            "last training losses, nats": losses,
            "made by": f"hubmodels {__version__}, torch {torch.__version__}",
        }


def _settings(options: Options, corpus: Corpus, phases: Sequence[Phase]) -> Settings:
    """The loop's numbers; epochs become steps or, where rows change their length on the way, tokens."""
    budget: dict[str, Any] = {
        "steps": options.steps,
        "tokens": options.tokens,
        "seconds": options.hours and 3600 * options.hours,
    }
    if not any(budget.values()):
        epochs = options.epochs or 3.0
        if len(phases) == 1:
            whole, rest = divmod(epochs, 1)
            steps = [phases[0].batches.steps(number) for number in range(math.ceil(epochs))]
            budget["steps"] = max(1, sum(steps[: int(whole)]) + round(rest * steps[-1]))
        else:
            budget["tokens"] = max(1, round(epochs * corpus.about["tokens"]))
    return Settings(
        **budget,
        learning_rate=options.lr or (1e-4 if options.weights is None else 2e-5),
        schedule=options.schedule,
        warmup=options.warmup,
        optimiser=options.optimiser,
        weight_decay=options.weight_decay,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        clip=options.clip,
        precision=options.precision,
        ema=options.ema,
        compiled=options.compile,
        sharded=options.shard,
        save_every=options.save_every,
        save_minutes=options.save_minutes,
        keep=options.keep,
        evaluate_every=options.eval_every,
        log_every=options.log_every,
        seed=options.seed,
    )
