"""Their tensor names <-> ours: one table per family, read both ways, with an account of every key.

A table is a list of rows (ours, theirs). `{i}` stands for a number, `{wb}` for weight or bias. A plain name is copied
as it is; FUSE, TRANSPOSE and ALIAS say what else happens. A row (None, DROP(name, why)) is theirs alone.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from ..errors import CheckpointError
from .report import Entry, Origin, dtype_of, origins_of
from .tensors import LazyTensor, TurnedTensor, fill


@dataclass(frozen=True)
class Operation:
    """theirs: the name or names in the file; because: why it is dropped."""

    theirs: tuple[str, ...]
    because: str = ""
    verb = "loaded"

    def load(self, sources: list[LazyTensor], dtype: torch.dtype) -> Tensor:
        return _read(sources[0], dtype)

    def dump(self, ours: Tensor) -> list[Tensor]:
        return [ours]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[0]


class Fuse(Operation):
    verb = "fused"

    def load(self, sources: list[LazyTensor], dtype: torch.dtype) -> Tensor:
        """Read straight into the fused tensor: the parts are never in memory twice."""
        fused = torch.empty(self.shape([s.shape for s in sources]), dtype=dtype)
        for part, source in zip(fused.split([s.shape[0] for s in sources]), sources, strict=True):
            fill(part, source)
        return fused

    def dump(self, ours: Tensor) -> list[Tensor]:
        return [part.clone() for part in ours.chunk(len(self.theirs))]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        return (len(shapes) * shapes[0][0], *shapes[0][1:]) if shapes[0] else ()


class Transpose(Operation):
    verb = "transposed"

    def load(self, sources: list[LazyTensor], dtype: torch.dtype) -> Tensor:
        return _read(TurnedTensor(sources[0]), dtype)

    def dump(self, ours: Tensor) -> list[Tensor]:
        return [ours.t().contiguous()]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(reversed(shapes[0]))


class Alias(Operation):
    verb = "tied"


class Drop(Operation):
    verb = "dropped"


def KEEP(theirs: str) -> Operation:
    return Operation((theirs,))


def FUSE(*theirs: str) -> Operation:
    """Several of theirs, one after the other along the first dimension, are one of ours."""
    return Fuse(theirs)


def TRANSPOSE(theirs: str) -> Operation:
    return Transpose((theirs,))


def ALIAS(theirs: str) -> Operation:
    """Theirs repeats what another row loads. It may be absent; if it is there it must be equal. Never written."""
    return Alias((theirs,))


def DROP(theirs: str, because: str) -> Operation:
    return Drop((theirs,), because)


def _read(tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    """Mapped, where it is in its file as it is wanted."""
    if tensor.dtype == dtype:
        return tensor.read()
    target = torch.empty(tensor.shape, dtype=dtype)
    fill(target, tensor)
    return target


Row = tuple[str | None, str | Operation]
_WILD = {"{i}": r"(?P<i>\d+)", "{wb}": r"(?P<wb>weight|bias)"}


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", template)
    return re.compile("".join(_WILD[p] if p in _WILD else re.escape(p) for p in parts))


@dataclass(frozen=True)
class Rule:
    ours: str | None
    operation: Operation

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:  # compiled when a family is asked for, not when it is imported
        return tuple(_pattern(theirs) for theirs in self.operation.theirs)

    @cached_property
    def our_pattern(self) -> re.Pattern[str] | None:
        return _pattern(self.ours) if self.ours else None

    def find(self, key: str) -> dict[str, str] | None:
        """The wildcards' values if `key` is one of theirs in this rule."""
        return next((m.groupdict() for p in self.patterns if (m := p.fullmatch(key))), None)


class KeyMap:
    """One family's table.

    transformer: rows whose names stand bare in a base model and behind a prefix elsewhere: ("transformer.", "bert.").
    heads: rows of the parts that not every model has; their first name is the part's.
    """

    def __init__(self, transformer: Iterable[Row], heads: Iterable[Row], prefix: tuple[str, str]):
        self._rows = transformer, heads = list(transformer), list(heads)
        self.rules = [Rule(ours, op if isinstance(op, Operation) else KEEP(op)) for ours, op in (*transformer, *heads)]
        self.prefix = prefix
        self.optional = {str(ours).split(".")[0] for ours, op in heads if not isinstance(op, Operation)} | {"pooler"}

    @cached_property
    def native(self) -> "KeyMap":
        """The table of a file that has our own names."""
        kept = ([ours for ours, op in rows if ours and not isinstance(op, Alias)] for rows in self._rows)
        transformer, heads = ([(ours, ours) for ours in rows] for rows in kept)
        return KeyMap(transformer, heads, (self.prefix[0], self.prefix[0]))

    def of_file(self, keys: Iterable[str]) -> "KeyMap":
        """This table, or `native` if a key shows that the file has our own names."""
        ours = any(self.native.find(key) and not self.find(key) for key in keys)
        return self.native if ours else self

    def find(self, key: str) -> "tuple[Rule, dict[str, str]] | None":
        """The rule that knows a key of theirs, and its wildcards' values."""
        bare = key.removeprefix(self.prefix[1])
        found = ((rule, rule.find(bare)) for rule in self.rules)
        return next(((rule, values) for rule, values in found if values is not None), None)

    def match(
        self,
        theirs: Mapping[str, LazyTensor],
        wanted: Mapping[str, tuple[int, ...]],
        source: str,
        may_be_new: Iterable[str] = (),
        must_be_new: Iterable[str] = (),
        origins: Mapping[str, Origin] | None = None,
    ) -> "Match":
        """The file's tensors under our names, still in the file, and the account.

        theirs: the file's tensors, Hugging Face names, with or without the prefix.
        wanted: name -> shape of each parameter of the model.
        source: names the file in errors.
        may_be_new: parts of the model that start anew if the file has nothing at all for them.
        must_be_new: parts that start anew whatever the file has.
        origins: what the file itself calls its tensors, if not so.

        Raises CheckpointError listing every key that no row knows, every parameter that the file lacks, and every
        shape that differs.
        """
        account = _Account(self, theirs, wanted, source, set(must_be_new), origins or origins_of(theirs))
        for key in theirs:
            account.place(key)
        account.settle({*may_be_new, *must_be_new})
        return account.match()

    def dump(self, ours: Mapping[str, Tensor], prefixed: bool) -> dict[str, Tensor]:
        """The table backwards: our tensors under their names. prefixed: whether theirs carry the family's prefix."""
        theirs: dict[str, Tensor] = {}
        for name, tensor in ours.items():
            bare = name.removeprefix(self.prefix[0])
            for rule in self.rules:
                match = rule.our_pattern and rule.our_pattern.fullmatch(bare)
                if match and not isinstance(rule.operation, Alias):
                    break
            else:
                raise CheckpointError(f"export: no row of the key map writes {name}")
            prefix = self.prefix[1] if prefixed and self.in_transformer(bare) else ""
            for template, part in zip(rule.operation.theirs, rule.operation.dump(tensor), strict=True):
                theirs[prefix + _fill(template, match.groupdict())] = part
        return theirs

    def in_transformer(self, bare: str) -> bool:
        """Whether a parameter of ours, without prefix, is not a head's."""
        part = bare.split(".")[0]
        return part == "pooler" or part not in self.optional


def _fill(template: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template


class Match(Mapping[str, Tensor]):
    """A file's tensors under our names, each read when it is asked for. entries: the account."""

    def __init__(self, found, repeated, entries: Iterable[Entry], source: str):
        self._found: dict[str, tuple[Operation, list[LazyTensor]]] = found
        self._repeated: list[tuple[tuple[LazyTensor, str], tuple[LazyTensor, str]]] = repeated
        self.entries, self._source = tuple(entries), source

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._found

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """dtype None: the file's; of parts that differ in it, the one that holds them all."""
        operation, sources = self._found[name]
        return operation.load(sources, dtype or reduce(torch.promote_types, (source.dtype for source in sources)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor, without reading it"""
        operation, sources = self._found[name]
        return operation.shape([tuple(source.shape) for source in sources])

    def check_repeats(self) -> None:
        """Raises CheckpointError if a tensor that should repeat another differs from it."""
        for (one, key), (other, of) in self._repeated:
            repeated, original = one.read(), other.read()
            if original.data_ptr() != repeated.data_ptr() and not torch.equal(original, repeated):
                raise CheckpointError(
                    f"{self._source}: {key} should repeat {of}, but its values differ. This checkpoint was trained "
                    "with its output matrix untied, which this model cannot hold"
                )


class _Account:
    """The books of one load: first every key of theirs finds its row, then both sides are settled."""

    def __init__(self, keymap: KeyMap, theirs, wanted, source: str, must_be_new: set[str], origins):
        self.keymap, self.theirs, self.wanted, self.source = keymap, theirs, wanted, source
        self.must_be_new, self.origins = must_be_new, origins
        self.bare_wanted = {name.removeprefix(keymap.prefix[0]): name for name in wanted}
        self.found: dict[str, tuple[Operation, dict[str, str]]] = {}  # our bare name -> operation, template -> key
        self.entries: list[Entry] = []
        self.aliases: list[tuple[str, str]] = []
        self.problems: list[str] = []

    def place(self, key: str) -> None:
        if found := self.keymap.find(key):
            return self._apply(found[0], key, found[1])
        self.problems.append(
            f"{self._said(key)} {list(self.origins[key].shape)} is in the file, but no row knows it{self._near(key)}"
        )

    def _apply(self, rule: Rule, key: str, values: dict[str, str]) -> None:
        operation = rule.operation
        if rule.ours is None:
            return self._enter(None, key, "dropped", operation.because)
        name = _fill(rule.ours, values)
        if name.split(".")[0] in self.must_be_new:
            return self._enter(None, key, "dropped", "a new head was asked for")
        if name not in self.bare_wanted and name.split(".")[0] in self.keymap.optional:
            return self._enter(None, key, "dropped", f"this model has no {name.split('.')[0]}")
        if isinstance(operation, Alias):
            return self.aliases.append((name, key))
        filled = [_fill(template, values) for template in operation.theirs]
        bare = key.removeprefix(self.keymap.prefix[1])
        keys = self.found.setdefault(name, (operation, dict.fromkeys(filled, "")))[1]
        if keys[bare]:
            both = f"{self._said(keys[bare])} and {self._said(key)}"
            self.problems.append(f"{both} are both in the file and both mean {name}")
        keys[bare] = key
        self._enter(self.bare_wanted.get(name), key, operation.verb)

    def settle(self, may_be_new: set[str]) -> None:
        self._settle_aliases()
        parts_found = {name.split(".")[0] for name in self.found}
        for bare, name in self.bare_wanted.items():
            part = bare.split(".")[0]
            if bare in self.found:
                self._check_shape(bare, name)
            elif part in may_be_new and part not in parts_found:
                shape = tuple(self.wanted[name])
                because = "asked for" if part in self.must_be_new else "the checkpoint has none"
                self.entries.append(Entry(name, None, "new", shape, "", because))
            else:
                self.problems.append(
                    f"{name} {list(self.wanted[name])} is in the model, but nothing in the file fills it"
                )
        for bare in self.found.keys() - self.bare_wanted.keys():
            keys = ", ".join(self._said(key) for key in self.found[bare][1].values() if key)
            self.problems.append(f"{keys} would be {bare}, which this model's config has no place for")
        if self.problems:
            raise CheckpointError(
                f"{self.source}: {len(self.problems)} of its tensors and the model do not fit:\n  "
                + "\n  ".join(self.problems)
                + "\nCheck that config.json belongs to this file and that the entry point is the right family's"
            )

    def match(self) -> Match:
        found = {
            self.bare_wanted[bare]: (operation, [self.theirs[key] for key in keys.values()])
            for bare, (operation, keys) in self.found.items()
        }
        pairs = [(key, self._key_of(name)) for name, key in self.aliases]
        repeated = [tuple((self.theirs[key], self._said(key)) for key in pair) for pair in pairs]
        return Match(found, repeated, self.entries, self.source)

    def _settle_aliases(self) -> None:
        """A repeat without an original (decoder.weight with no word table) stands in for it."""
        for name, key in list(self.aliases):
            if name in self.found:
                self._enter(self.bare_wanted[name], key, "tied", f"repeats {self._said(self._key_of(name))}")
                got, want = tuple(self.theirs[key].shape), tuple(self.wanted[self.bare_wanted[name]])
                if got != want:
                    self.problems.append(
                        f"{self._said(key)}: expected {list(want)}, as {self._said(self._key_of(name))} which it "
                        f"repeats, got {list(got)}"
                    )
            else:
                self.aliases.remove((name, key))
                self.found[name] = (KEEP(key), {key: key})
                self._enter(self.bare_wanted.get(name), key, "loaded")

    def _check_shape(self, bare: str, name: str) -> None:
        operation, keys = self.found[bare]
        missing = [template for template, key in keys.items() if not key]
        if missing:
            self.problems.append(f"{', '.join(missing)} is not in the file, but {name} is made of it")
            return
        shapes = [tuple(self.theirs[key].shape) for key in keys.values()]
        want = tuple(self.wanted[name])
        if any(s != shapes[0] for s in shapes):
            parts = ", ".join(f"{self._said(key)} {list(s)}" for key, s in zip(keys.values(), shapes, strict=True))
            self.problems.append(f"{parts}: expected parts of one shape, together {list(want)}, for {name}")
        elif (got := operation.shape(shapes)) != want:
            is_head = bare.split(".")[0] in self.keymap.optional - {"pooler"}
            hint = " (head_seed=0 starts this head anew)" if is_head else ""
            said = ", ".join(map(self._said, keys.values()))
            self.problems.append(f"{said}: expected {list(want)} for {name}, got {list(got)}{hint}")
        for key in keys.values():
            if not (dtype := self.theirs[key].dtype).is_floating_point:
                self.problems.append(f"{self._said(key)}: expected floating point numbers for {name}, got {dtype}")

    def _key_of(self, name: str) -> str:
        return next(iter(self.found[name][1].values()))

    def _enter(self, ours: str | None, key: str, operation: str, because: str = "") -> None:
        origin = self.origins[key]
        if origin.turned and ours is not None:
            operation = "transposed" if operation == "loaded" else f"transposed and {operation}"
        self.entries.append(Entry(ours, origin.key, operation, origin.shape, dtype_of(self.theirs[key]), because))

    def _said(self, key: str) -> str:
        """A tensor as its file calls it, and as Hugging Face does."""
        theirs = self.origins[key].key
        return theirs if theirs == key else f"{theirs} ({key})"

    def _near(self, key: str) -> str:
        key = key.removeprefix(self.keymap.prefix[1])
        names = [theirs for rule in self.keymap.rules for theirs in rule.operation.theirs]
        near = difflib.get_close_matches(re.sub(r"\.\d+\.", ".{i}.", key), names, n=1)
        return f" (the nearest row is {near[0]})" if near else ""
