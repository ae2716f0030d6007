"""Writes docs/cli.md, what every command says for `--help`: `python docs/cli.py` (Python 3.11, whose argparse wraps
lines its own way)."""

import argparse
import os
from pathlib import Path

from grm_hf.cli import command_line


def page() -> str:
    os.environ["COLUMNS"] = "100"
    parser = command_line()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parsers = {"grm": parser, **{f"grm {name}": command for name, command in commands.choices.items()}}
    blocks = [f"## {name}\n\n```\n{command.format_help().rstrip()}\n```\n" for name, command in parsers.items()]
    return "\n".join(["# The command line\n\nWritten by `python docs/cli.py` from `grm COMMAND --help`.\n", *blocks])


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
