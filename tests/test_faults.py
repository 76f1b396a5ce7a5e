"""Every row of the fault table, in both modes; and that the judge of the table is one.

docs/faults.py does the same at more random points, and writes the table down.
"""

import re
from dataclasses import replace

import pytest
from conftest import REPOSITORY
from fault_case import Outcome
from faults import FAULTS, complaints_on, points, run

POINTS = 3
# What the table was asked for: each begins the name of a row.
ASKED = [
    "truncated body",
    "flipped byte",
    "wrong length header",
    "reset mid-stream",
    "silence",
    "429 with Retry-After",
    "500 then fine",
    "404",
    "redirect loop",
    "HTML instead of bytes",
    "slow drip",
    "gzip'd body",
    "disk full",
    "read-only cache",
    "SIGKILL mid-stream, then restart",
    "8 processes at once",
    "clock skew",
    "partial from another version",
    "poisoned cache hit",
]


@pytest.mark.parametrize(
    ("fault", "mode"),
    [pytest.param(fault, mode, id=f"{fault.name}-{mode}") for fault in FAULTS for mode in fault.modes],
)
def test_a_fault_ends_in_the_file_or_a_clear_error(fault, mode, tmp_path):
    for number, point in enumerate(points(fault, mode, POINTS)):
        try:
            result = run(fault, mode, tmp_path / str(number), point)
        except PermissionError as error:
            pytest.skip(f"the kernel does not let this process mount a disk of its own: {error}")
        assert result.complaints == (), f"at {point:.3f} of the file"
        assert result.wrong_loads == 0


@pytest.mark.parametrize("name", ASKED)
def test_the_table_has_every_fault_that_was_asked_for_in_both_modes(name):
    assert {mode for fault in FAULTS if fault.name.startswith(name) for mode in fault.modes} == {"plain", "hub"}


LOADED = Outcome("loaded", "downloaded", right=True, final="the file")
REFUSED = Outcome("refused", "HTTP 404. Fetch it by hand: curl -L ...")


@pytest.mark.parametrize("outcome", [LOADED, replace(LOADED, final="nothing")], ids=["in the store", "in place"])
def test_the_judge_accepts_the_file(outcome):
    assert complaints_on(outcome, None) == []


def test_the_judge_accepts_a_clear_error():
    assert complaints_on(REFUSED, ("404",)) == []


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (replace(LOADED, right=False), None),
        (replace(LOADED, final="WRONG BYTES"), None),
        (replace(REFUSED, final="WRONG BYTES"), ("404",)),
        (LOADED, ("404",)),
        (REFUSED, None),
        (REFUSED, ("500",)),
        (replace(REFUSED, text="HTTP 404"), ("404",)),
        (Outcome("raised", "ValueError: 404 curl"), ("404",)),
        (Outcome("hung", "404 curl"), ("404",)),
        (Outcome("died", "404 curl"), ("404",)),
    ],
)
def test_the_judge_accepts_nothing_else(outcome, words):
    assert complaints_on(outcome, words) != []


def test_the_written_table_is_this_one():
    text = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (plain|hub) \|", text, re.MULTILINE)
    assert rows == [(fault.name, mode) for fault in FAULTS for mode in fault.modes]
    assert "FAILED" not in text
    assert "Wrong loads: 0." in text
    assert "Eight processes at once: one download." in text
