"""`docs/benchmarks.md`: one section for each benchmark, between two markers. Its own script writes it; others leave it
alone. A section is a function of a results file in `docs/results/`, so a test can write it again."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
HEADER = (
    "# Benchmarks\n\nEach section names the command that writes it from a results file in `docs/results/`. "
    "Every figure is a ratio of two sides measured in one process.\n"
)


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Put `text` (Markdown, heading first) into the section `name`, or behind the others if it is new."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    old = page.read_text(encoding="utf-8") if page.is_file() else HEADER
    if begin in old:
        before, rest = old.split(begin)
        _, after = rest.split(end)
    else:
        before, after = old + "\n", ""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(before + begin + text.strip() + "\n" + end + after, encoding="utf-8")
