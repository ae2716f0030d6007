"""docs/results.md, its figure and the pages behind it are what the stored files give. A section of docs/benchmarks.md
is written between its markers, and nothing else changes."""

import json
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from sections import HEADER, write_section  # noqa: E402


@pytest.fixture
def results():
    pytest.importorskip("trl", reason="training extra")
    import results

    return results


def test_the_pages_are_what_the_stored_files_give(results):
    for path, text in results.pages().items():
        assert path.read_text(encoding="utf-8") == text, path
        assert "python benchmarks/results.py" in text, path


def test_the_figure_is_what_the_stored_files_give(results):
    drawn = results.panels()
    assert results.digest(drawn).encode() in results.FIGURE.read_bytes()
    world = next(panel for panel in drawn if "known" in panel["title"])
    stored = json.loads((ROOT / "docs" / "results" / "world.json").read_text(encoding="utf-8"))
    entry = stored["comparison"]["accuracy"]["ood"]["GRM sft, alpha 0.1"]
    mean, low, high = world["rows"]["out-of-distribution"]["GRM sft, alpha 0.1"]
    assert mean == pytest.approx(100 * entry["difference"])
    assert high - low == pytest.approx(200 * entry["difference_half_width"])


def test_the_front_page_is_one_screen_and_leads_to_every_study(results):
    text = results.front()
    assert len(text.splitlines()) <= 25 and len(text) < 4000
    links = re.findall(r"\]\((results/\w+\.md)\)", text)
    assert {f"results/{path.name}" for path in (ROOT / "docs" / "results").glob("*.md")} == set(links)
    assert links[0] == "results/real_base.md"


def test_a_figure_can_be_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    results.draw(results.panels(), tmp_path / "figure.png")
    data = (tmp_path / "figure.png").read_bytes()
    assert data.startswith(b"\x89PNG") and results.digest(results.panels()).encode() in data


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    page = tmp_path / "benchmarks.md"
    write_section("one", "## One\n\nfirst", page)
    write_section("two", "## Two\n\nother", page)
    before = page.read_text(encoding="utf-8")
    assert before.startswith(HEADER) and before.index("## One") < before.index("## Two")
    write_section("one", "## One\n\nsecond", page)
    assert page.read_text(encoding="utf-8") == before.replace("first", "second")
    write_section("one", "## One\n\nfirst", page)
    assert page.read_text(encoding="utf-8") == before
