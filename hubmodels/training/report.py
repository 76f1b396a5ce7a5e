"""What a run leaves to read: its course as CSV, as a picture and, if asked for, for TensorBoard; and its card."""

import csv
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import HubModelsError
from .loop import Progress
from .objectives import PAIRS, WORDS

COURSE, EXAMS, PLOT, CARD, METRICS = "training.csv", "evaluation.csv", "loss.png", "README.md", "metrics.json"
_COURSE = (
    *("step", "tokens", "seconds", "epoch", "phase", "word_loss", "pair_loss"),
    *("learning_rate", "gradient_norm", "tokens_per_second", "utilisation"),
)
_BAR = 1000  # parts that the budget is shown in
# An evaluation's figures, and what the card calls them.
FIGURES = {
    "word_loss": "loss on words, nats",
    "perplexity": "perplexity",
    "word_accuracy": "words guessed right",
    "commonest_accuracy": "always guessing the commonest",
    "pair_accuracy": "pairs told right",
    "pseudo_perplexity": "pseudo-perplexity",
    "words": "words asked for",
    "pairs": "pairs asked for",
}


class Report:
    """The course of a run as it goes, and what is left of it in the end.

    use: the share of what the devices multiply at best that one token a second makes use of. Rows of steps that a run
    does again, since it stopped after its last checkpoint, are overwritten.
    """

    def __init__(self, directory: Path, *, use: float, tensorboard: bool, progress: bool):
        self.directory, self.use = directory, use
        self.course = _Table(directory / COURSE, _COURSE)
        self.exams = _Table(directory / EXAMS, ("step", "tokens", "text", *FIGURES))
        self.board: Any = _board(directory / "tensorboard") if tensorboard else None
        self.bar = _bar(progress)
        self.tokens = 0

    @property
    def is_new(self) -> bool:
        """Whether nothing was looked at yet."""
        return not read_table(self.exams.path)

    def progress(self, found: Progress) -> None:
        """A line of the log."""
        self.tokens = found.tokens
        use = found.tokens_per_second * self.use
        row = {
            **{name: getattr(found, name) for name in ("step", "tokens", "seconds", "epoch", "phase")},
            "word_loss": found.losses.get(WORDS),
            "pair_loss": found.losses.get(PAIRS),
            "learning_rate": found.rate,
            "gradient_norm": found.norm,
            "tokens_per_second": found.tokens_per_second,
            "utilisation": use,
        }
        self.course.add(row)
        self._draw_on_board("training", {name: row[name] for name in _COURSE[5:]}, found.step)
        told = (
            f"step {found.step}, loss {found.loss:.3f}, {found.tokens_per_second:,.0f} tokens/s, {use:.0%} of the peak"
        )
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(round(_BAR * found.fraction) - self.bar.n)

    def evaluation(self, step: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """The figures of each held-out text."""
        for text, found in figures.items():
            self.exams.add({"step": step, "tokens": self.tokens, "text": text, **found})
            self._draw_on_board(text, found, step)

    def _draw_on_board(self, title: str, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items() if self.board else ():
            if value is not None:
                self.board.add_scalar(f"{title}/{name}", value, step)

    def close(self) -> None:
        """End the bar and the log of TensorBoard."""
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def leave(self, metrics: Mapping[str, Any], facts: Mapping[str, str], command: Sequence[str]) -> None:
        """metrics.json, the picture where matplotlib is, and README.md: facts, a line each, and the figures."""
        (self.directory / METRICS).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        with suppress(ModuleNotFoundError):
            draw(self.directory)
        pictured = f"![the loss]({PLOT})" if (self.directory / PLOT).is_file() else ""
        exams = read_table(self.exams.path)
        lines = [
            f"# {self.directory.resolve().name}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {told} |" for name, told in facts.items()),
            "",
            *(["    " + shlex.join(command), ""] if command else []),
            *(["## Figures", "", *_figures(exams), ""] if exams else []),
            f"The course of the run is in `{COURSE}` and `{EXAMS}`, the figures are in `{METRICS}`.",
            pictured,
        ]
        (self.directory / CARD).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _bar(progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=_BAR,
        disable=not progress,
        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        miniters=1,
    )


def _board(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise HubModelsError("--tensorboard: it needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(directory)


class _Table:
    """A CSV file that grows by a row at a time. The first row that is added overwrites those of its step and later."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns
        self.is_cut = False
        if not path.exists():
            self._write([])

    def add(self, row: Mapping[str, Any]) -> None:
        """Columns that it lacks stay empty."""
        if not self.is_cut:
            self._write([old for old in read_table(self.path) if int(old["step"]) < row["step"]])
            self.is_cut = True
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            self._writer(file).writerow(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            )

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)

    def _writer(self, file: Any) -> Any:
        return csv.DictWriter(file, self.columns, extrasaction="ignore")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names of its columns."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(directory: Path) -> None:
    """The losses against the tokens read: loss.png, of what the two tables hold. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    course, exams = read_table(directory / COURSE), read_table(directory / EXAMS)
    axes.plot(*_points(course, "word_loss"), linewidth=1, label="words, training")
    if any(row["pair_loss"] for row in course):
        axes.plot(*_points(course, "pair_loss"), linewidth=1, label="pairs, training")
    for text in dict.fromkeys(row["text"] for row in exams):
        points = _points([row for row in exams if row["text"] == text], "word_loss")
        axes.plot(*points, marker="o", label=f"words, {text}")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("loss, nats")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / PLOT, dpi=110)


def _points(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[float], list[float]]:
    given = [row for row in rows if row[column]]
    return [float(row["tokens"]) for row in given], [float(row[column]) for row in given]


def _figures(exams: Sequence[Mapping[str, str]]) -> list[str]:
    """Markdown: for each held-out text its figures before the first step and after the last."""
    lines = ["| text | figure | before | after |", "|---|---|---|---|"]
    for text in dict.fromkeys(row["text"] for row in exams):
        rows = [row for row in exams if row["text"] == text]
        for column, name in FIGURES.items():
            if rows[-1][column]:
                before = rows[0][column] if len(rows) > 1 else ""
                lines.append(f"| {text} | {name} | {before} | {rows[-1][column]} |")
    return lines
