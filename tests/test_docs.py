"""What the README says works: its Python, line by line as a reader would run it, in a process of its own."""

import os
import re
import subprocess
import sys

from conftest import REPOSITORY
from test_hub import copy_checkout

from hubmodels.catalog import manifest

OFFLINE = """
import socket

def refuse(*_):
    raise AssertionError("the README reached for the network")

socket.socket.connect = refuse
"""


def test_the_python_of_the_readme_runs(tmp_path):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r'"OWNER/hubmodels:(v[^"]+)"', text))
    assert len(blocks) >= 2
    assert len(named) == 1, named
    copy_checkout(tmp_path / "torch" / "hub" / f"OWNER_hubmodels_{named.pop()}")
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "torch"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", OFFLINE + "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bert-nano: ")
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_demo_prints_words_with_probabilities():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, REPOSITORY / "docs" / "demo.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.findall(r"^  \S+ +0\.\d{3}$", done.stdout, re.MULTILINE)
    assert done.stderr == ""
    said = done.stdout.partition("The captain looked at the sea, and")[2]
    assert len(said.split()) > 5


def test_the_cards_of_embedded_models_say_what_they_are():
    """Size and parameters as they are; figures filled in, one for each of its claims."""
    for name, record in manifest().items():
        if not record.weights[0].is_embedded:
            continue
        card = (REPOSITORY / record.homepage).read_text(encoding="utf-8")
        size = sum(file.size for file in record.files)
        assert f"{record.parameters:,}" in card, name
        assert f"{size / 1e6:.1f} MB" in card, name
        assert record.licence in card, name
        assert re.findall(r"@[A-Z]+@", card) == [], name
        if record.family == "gpt":
            assert size <= 8_000_000
            assert re.search(r"bits per byte \| \**\d\.\d+", card), name
            assert "held out" in card
