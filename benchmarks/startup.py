"""Start-up: from the start of a process to the first answer of a BERT-base, and the memory that it takes.

    python benchmarks/startup.py [--rounds N]

Three kinds of process, run in turn so that a busy machine slows all alike:

    torch         import torch, nothing else: the floor of every program that uses it
    hubmodels     import, hubmodels.bertModel(path), one forward of 1 x 16 tokens
    transformers  import, BertModel.from_pretrained(path), the same forward

The checkpoint has random float32 weights under Hugging Face's names and is in the page cache; all packages have their
bytecode, as an installed one has. Seconds are of whole processes, medians over the rounds; ratios are medians of each
round's ratio; MB are medians of the peak of resident memory (the kernel's VmHWM). The last column, (peak - peak of
torch) / size of the file, is 1 for who holds every weight once. Targets: hubmodels <= 1.2 x torch, <= 0.4 x
transformers, last column <= 1.1. Nothing is asserted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parent.parent
_FORWARD = """
with torch.inference_mode():
    model(torch.arange(16)[None] + 1000)
"""
_REPORT = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
_TRANSFORMERS = """
import sys, torch
from transformers import BertModel, utils
utils.logging.disable_progress_bar()
model = BertModel.from_pretrained(sys.argv[1])
"""
PROGRAMS = {
    "torch": "import torch" + _REPORT,
    "hubmodels": "import sys, torch, hubmodels; model = hubmodels.bertModel(sys.argv[1])" + _FORWARD + _REPORT,
    "transformers": _TRANSFORMERS + _FORWARD + _REPORT,
}


def make_checkpoint(directory: Path) -> float:
    """Write a BERT-base of random weights, by a process of its own. Returns the size of the weights file, in MB."""
    program = (
        "import sys; from transformers import BertConfig, BertModel; "
        "BertModel(BertConfig()).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, directory], check=True, stderr=subprocess.DEVNULL)
    weights = directory / "model.safetensors"
    with open(weights, "rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    return weights.stat().st_size / 1e6


def measure(program: str, directory: Path) -> tuple[float, float]:
    """Seconds of the whole process, and its peak of resident memory in MB."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", program, directory]
    begun = time.perf_counter()
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - begun, int(done.stdout.split()[-1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as temporary:
        size = make_checkpoint(Path(temporary))
        for number in range(rounds + 1):
            for name, program in PROGRAMS.items():
                result = measure(program, Path(temporary))
                if number:  # the first round only warms up
                    results[name].append(result)
    print(f"BERT-base, float32, {size:.0f} MB, {rounds} rounds, {os.cpu_count()} processors")
    print(f"{'':14}{'seconds':>9}{'/ torch':>9}{'/ transformers':>16}{'peak MB':>9}{'(peak - torch) / file':>23}")
    floor = median(peak for _, peak in results["torch"])
    for name, found in results.items():
        ratios = [
            median(mine / theirs for (mine, _), (theirs, _) in zip(found, results[base], strict=True))
            for base in ("torch", "transformers")
        ]
        seconds, peak = (median(column) for column in zip(*found, strict=True))
        print(f"{name:14}{seconds:9.2f}{ratios[0]:9.2f}{ratios[1]:16.2f}{peak:9.0f}{(peak - floor) / size:23.2f}")


if __name__ == "__main__":
    main()
