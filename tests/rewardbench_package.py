"""Functions of the installed `rewardbench` package, run as they are without importing it: importing needs engines and
formatters that arithmetic does not."""

import ast
import functools
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest


# An environment with rewardbench; `make test` builds it.
PYTHON = os.environ.get("GRM_REWARDBENCH_PYTHON")
FIND = "import importlib.util as u; print(u.find_spec('rewardbench').origin)"


@functools.cache
def _origin():
    spec = importlib.util.find_spec("rewardbench")
    if spec is not None:
        return spec.origin
    if PYTHON:
        return subprocess.run([PYTHON, "-c", FIND], capture_output=True, text=True, check=True).stdout.strip()
    return None


def folder():
    """Where the package lies; skips the test where it is not installed."""
    if _origin() is None:
        pytest.skip("rewardbench is not installed, and GRM_REWARDBENCH_PYTHON names no environment with it")
    return Path(_origin()).parent


def constants():
    found = {}
    exec((folder() / "constants.py").read_text(), found)
    return found


def functions(*names, **known):
    """Functions of its `utils.py`, which find `known` as their globals."""
    tree = ast.parse((folder() / "utils.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(found) == len(names)
    for node in found:  # annotations name what is not imported here
        node.args.args = [ast.arg(argument.arg) for argument in node.args.args]
        node.returns = None
    exec("\n".join(map(ast.unparse, found)), known)
    return [known[name] for name in names]
