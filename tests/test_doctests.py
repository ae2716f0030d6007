"""Every example in a docstring of the package, and every one in a page of docs/, gives what stands below it. (Those of
a Space run in its own folder: test_reward_accuracy_space.py.)"""

import doctest
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted((ROOT / "grm_hf").rglob("*.py")), *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = [
    path.relative_to(ROOT)
    for path in FILES
    if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("path", SHOWN, ids=str)
def test_examples_give_what_they_show(path):
    if path.suffix == ".md":
        results = doctest.testfile(str(ROOT / path), module_relative=False)
    else:
        results = doctest.testmod(pytest.importorskip(".".join(path.with_suffix("").parts), reason="needs an extra"))
    assert results.attempted and not results.failed
