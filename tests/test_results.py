"""`docs/results.md`: a section is written between its markers, and nothing else changes."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from results_page import HEADER, write_section  # noqa: E402


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    page = tmp_path / "results.md"
    write_section("one", "## One\n\nfirst", page)
    write_section("two", "## Two\n\nother", page)
    before = page.read_text(encoding="utf-8")
    assert before.startswith(HEADER) and before.index("## One") < before.index("## Two")
    write_section("one", "## One\n\nsecond", page)
    assert page.read_text(encoding="utf-8") == before.replace("first", "second")
    write_section("one", "## One\n\nfirst", page)
    assert page.read_text(encoding="utf-8") == before
