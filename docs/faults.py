"""Injects every fault of tests/faults.py and writes what came of it to docs/faults.md: `python docs/faults.py`.

It mounts disks of its own, in namespaces of its own: on Linux, as root or where users may make namespaces.
"""

import platform
import re
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from fault_case import SILENCE_SECONDS  # noqa: E402
from fault_server import SIZE  # noqa: E402
from faults import FAULTS, MODES, Fault, Result, points, run  # noqa: E402

POINTS = 20
HEAD = f"""# Faults

What goes wrong on the way to a file, and what the store makes of it. Each fault is really injected: by web servers on
this machine that misbehave, by the kernel, or by what lies in the cache beforehand. Then the file is judged by its
bytes, with no code of the store. The faults are in [tests/faults.py](../tests/faults.py), the servers in
[tests/fault_server.py](../tests/fault_server.py); `make test` asserts on every row.

- **Mode**: *plain* is an address; *hub* is a Hugging Face endpoint, asked through huggingface_hub, then directly.
- **Sent**: bytes of body that servers sent, as a multiple of the file ({SIZE:,} bytes): what is above 1.00 was sent
  again, 0.00 means that nothing was. Where a fault was injected {POINTS} times: the median, and the most. A partial or
  a cached file that the fault needs was fetched before and is not counted.
- **Final name**: what is there after the fault: *the file*, *nothing*, or the directory that the fault put there (*no
  file*); never other bytes.
- **Afterwards**: the file is fetched once more with the fault gone. What loaded must be a hit without a byte sent; what
  was refused must load, going on from the bytes that came and were kept.

Time is scaled: silence is {SILENCE_SECONDS} s instead of 30, waits are asked for but not waited.

| Fault | Mode | Outcome | Requests | Sent | Final name | Afterwards |
| --- | --- | --- | ---: | ---: | --- | --- |
"""


def spread(values: list[float], form: str) -> str:
    """One number if all are the same: else the median, and the most."""
    middle, most = (format(value, form) for value in (statistics.median(values), max(values)))
    return middle if middle == most else f"{middle}, at most {most}"


def gist(text: str) -> str:
    """The reasons in an error, without the addresses and directories of this run; digests by their first digits."""
    reasons = re.findall(r"^  (.*)$", text, re.MULTILINE) or text.splitlines()[:1]
    for pattern, short in (
        (r"https?://127\.0\.0\.1:\d+/\S*/(\w+\.\w+)", r"…/\1"),
        (r"(?<=127\.0\.0\.\d:)\d+|(?<=port=)\d+", "PORT"),
        (r"/tmp/\S*/(\w+\.\w+)", r"…/\1"),
        (r"/tmp/\S*/store", "CACHE"),
        (r"([0-9a-f]{8})[0-9a-f]{32,}", r"\1…"),
        (r"\bobject at 0x[0-9a-f]+", "object"),
    ):
        reasons = [re.sub(pattern, short, reason) for reason in reasons]
    return "; ".join(reason if len(reason) < 160 else f"{reason[:160]}…" for reason in reasons)


def row(fault: Fault, mode: str, results: list[Result]) -> str:
    first, count = results[0], len(results)
    outcome = first.outcome.kind if count == 1 else f"{first.outcome.kind}, {count} of {count}"
    if fault.waits[MODES.index(mode)][0]:
        outcome += f", waited {max(first.outcome.waits):.0f} s as told"
    if first.outcome.kind == "refused":
        outcome += f": {gist(first.outcome.text)}"
    if failed := [result for result in results if result.complaints]:
        outcome = f"**FAILED, {len(failed)} of {count}**: {gist(failed[0].complaints[0])}"
    cells = [
        fault.name,
        mode,
        outcome,
        spread([result.requests for result in results], ".0f"),
        spread([result.sent for result in results], ".2f"),
        ", ".join(sorted({result.outcome.final for result in results})),
        f"{first.again.kind}, {spread([result.sent_again for result in results], '.2f')} sent",
    ]
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |\n"


def main() -> None:
    rows, everything = [], dict[tuple[str, str], list[Result]]()
    for fault in FAULTS:
        for mode in fault.modes:
            with tempfile.TemporaryDirectory() as folder:
                places = enumerate(points(fault, mode, POINTS))
                results = [run(fault, mode, Path(folder, str(number)), point) for number, point in places]
            everything[fault.name, mode] = results
            rows.append(row(fault, mode, results))
            print(rows[-1], end="", flush=True)
    runs = [result for results in everything.values() for result in results]
    eight = {
        result.sent for (name, _), found in everything.items() if name == "8 processes at once" for result in found
    }
    packages = ", ".join(f"{name} {version(name)}" for name in ("huggingface_hub", "requests", "torch"))
    foot = f"""
Wrong loads: {sum(result.wrong_loads for result in runs)}. Faults injected: {len(runs)}, failures: \
{sum(bool(result.complaints) for result in runs)}.
Eight processes at once: {"one download" if eight == {1.0} else f"{max(eight):.2f} downloads"}.

Made by `python docs/faults.py` on {datetime.now(UTC):%Y-%m-%d}: {platform.system()} {platform.release()} \
{platform.machine()}, Python {platform.python_version()}, {packages}.
"""
    (HERE / "faults.md").write_text(HEAD + "".join(rows) + foot, encoding="utf-8")


if __name__ == "__main__":
    main()
