"""What is measured: batches of token ids in the shapes that people have."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UNIFORM = {"1x16": (1, 16), "1x128": (1, 128), "1x512": (1, 512), "32x128": (32, 128)}
PROMPTS = {"decode-1": 1, "decode-8": 8}
PROMPT, NEW = 32, 128  # tokens of each prompt, and tokens that are added to it
CELLS = (*UNIFORM, "ragged", *PROMPTS)
AXES = ("length", "batch", "padding")  # what curves vary


class Cell(NamedTuple):
    """A batch, padded on the right. new: tokens to add to each row; 0: the rows are read, by an encoder."""

    name: str
    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S]
    new: int = 0

    @property
    def tokens(self) -> int:
        """Those that somebody asked for: no padding, of a decoder those that it adds."""
        return len(self.input_ids) * self.new or int(self.attention_mask.sum())

    def to(self, device: str) -> "Cell":
        return self._replace(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


def cells_of(names: Sequence[str], words: int, longest: int, decodes: bool) -> list[Cell]:
    """Those of `names` that a model with so many words and positions can do."""
    found = []
    for name in names:
        if name in PROMPTS and decodes and longest >= PROMPT + NEW:
            found.append(_cell(name, [PROMPT] * PROMPTS[name], words)._replace(new=NEW))
        elif name == "ragged" and not decodes:
            found.append(_cell(name, ragged_lengths(64, min(512, longest)), words))
        elif name in UNIFORM and not decodes and longest >= UNIFORM[name][1]:
            rows, length = UNIFORM[name]
            found.append(_cell(name, [length] * rows, words))
    return found


def ragged_lengths(rows: int, longest: int) -> list[int]:
    """Log-normal: with 64 rows of at most 512 tokens 70 % of the batch is padding."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.empty(rows).log_normal_(4.8, 0.8, generator=draw).long()
    return lengths.clamp(min(8, longest), longest).tolist()


def curves(words: int, longest: int) -> dict[str, list[tuple[float, Cell]]]:
    """What is varied -> its values, each with a batch."""
    most = min(512, longest)
    lengths = [length for length in (16, 32, 64, 128, 256, 512) if length <= most]
    usual = min(128, longest)
    return {
        "length": [(n, _cell(f"8x{n}", [n] * 8, words)) for n in lengths],
        "batch": [(n, _cell(f"{n}x{usual}", [usual] * n, words)) for n in (1, 2, 4, 8, 16, 32)],
        "padding": [(share / 10, _padded(share / 10, most, words)) for share in range(10)],
    }


def _padded(share: float, longest: int, words: int) -> Cell:
    """About as many tokens whatever the share of padding: one row of `longest`, the others shorter, all alike."""
    rows = round(8 / (1 - share))
    others = max(1, round((8 * longest - longest) / max(1, rows - 1)))
    return _cell(f"{share:.0%} padding", [longest, *[others] * (rows - 1)], words)


def _cell(name: str, lengths: list[int], words: int) -> Cell:
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Cell(name, torch.randint(1, words, mask.shape, generator=draw) * mask, mask)
