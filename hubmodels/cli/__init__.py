"""The command `hubmodels`: a thin face on the rooms below it."""

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import HubModelsError
from . import bench, checkpoints, pretrain, tasks, weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 if something was found wrong, 2 for an error that is the user's to mend."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
    except HubModelsError as error:
        print(f"hubmodels: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hubmodels", description="BERT and GPT in plain PyTorch, with pinned weights."
    )
    parser.add_argument("--version", action="version", version=f"hubmodels {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.add_argument("--json", action="store_true", help="for machines")
        made.set_defaults(run=run)
        return made

    weights.add_commands(command)
    checkpoints.add_commands(command)
    tasks.add_commands(command)
    pretrain.add_commands(command)
    bench.add_commands(command)
    return parser
