"""Loading: memory and speed of every dialect, on a BERT-base (440 MB) and a GPT (466 MB) of random numbers.

    python benchmarks/formats.py [--rounds N]

A process for each: it loads a small checkpoint of the dialect first, so that nothing is imported later, then the large
one, whose files are in the page cache. Memory is the peak of what is resident beyond what stood before, as a share of
the parameters' bytes, all of them used: 1 is who holds every number once. Medians over the rounds. The bar is 1.15.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from dialects import BERT, GPT, Writer, memory_of, write_bundle  # noqa: E402

import hubmodels  # noqa: E402
from hubmodels.checkpoint.readers import read_checkpoint  # noqa: E402

SMALL = {
    "bert": {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 37},
    "gpt": {"n_embd": 12, "n_layer": 2, "n_head": 3, "vocab_size": 37, "n_positions": 16},
}
ENTRIES = {"bert": "bertForPreTraining", "gpt": "gpt"}
TYPES = {"bert": "bert", "gpt": "openai-gpt"}


def state_of(family: str, sizes: dict, directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json's content and a state dict under Hugging Face's names, of random numbers"""
    import safetensors.torch

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": TYPES[family], **sizes}))
    torch.manual_seed(0)
    model = getattr(hubmodels, ENTRIES[family])(directory, pretrained=False)
    hubmodels.export(model, directory)
    state = safetensors.torch.load_file(directory / "model.safetensors")
    return json.loads((directory / "config.json").read_text()), state


def written(write: Writer, config: dict, state: dict[str, torch.Tensor], directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    path = write(state, directory)
    for file in (f for f in directory.iterdir() if f.is_file()):  # into the page cache
        file.read_bytes()
    return path


def bundle_speed(rounds: int) -> float:
    """GB/s of TensorFlow's reader alone, with its checksums: 440 MB, each matrix into memory that is there"""
    with tempfile.TemporaryDirectory() as temporary:
        numbers = {f"bert/layer_{n}/kernel": np.random.rand(3072, 768).astype(np.float32) for n in range(47)}
        write_bundle(Path(temporary) / "model.ckpt", numbers)
        tensors, target, seconds = read_checkpoint(Path(temporary) / "model.ckpt.index"), torch.empty(3072, 768), []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            for tensor in tensors.values():
                tensor.read_into(target)
            seconds.append(time.perf_counter() - begun)
    return sum(array.nbytes for array in numbers.values()) / median(seconds[1:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"{'dialect':32} {'memory':>7} {'from':>6} {'to':>6} {'GB/s':>6}")
    for family, writers in (("bert", BERT), ("gpt", GPT)):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            states = {kind: state_of(family, sizes, root / kind) for kind, sizes in (("s", SMALL[family]), ("l", {}))}
            for number, (name, write) in enumerate(writers.items()):
                paths = [written(write, *states[kind], root / f"{kind}{number}") for kind in ("s", "l")]
                found = [memory_of(ENTRIES[family], *paths) for _ in range(rounds)]
                shares = [peak / size for peak, _, size in found]
                speed = median(size / seconds for _, seconds, size in found) / 1e9
                figures = f"{median(shares):7.2f} {min(shares):6.2f} {max(shares):6.2f} {speed:6.2f}"
                print(f"{family + ', ' + name:32} {figures}", flush=True)
                for file in paths[1].parent.rglob(f"l{number}*/*"):
                    file.unlink()
    print(f"TensorFlow's files alone, checksums compared: {bundle_speed(rounds):.1f} GB/s")


if __name__ == "__main__":
    main()
