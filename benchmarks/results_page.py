"""`docs/results.md`: one section per experiment, each written by its own script between two markers and left alone by
all others. A section is a function of a results file in `docs/results/`, so that a test can write it again."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
HEADER = (
    "# Results\n\nEvery section is written by the command it names, from a results file in `docs/results/`. "
    "Nothing here is typed by hand.\n"
)
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
HEADERS = {
    BENCHMARKS: "# Benchmarks\n\nEvery section is written by the command it names, from a results file in "
    "`docs/results/`. Every figure is a ratio of two sides measured in one process.\n"
}


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Put `text` (Markdown, beginning with its heading) into the section `name`, or behind the others if it is new."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    old = page.read_text(encoding="utf-8") if page.is_file() else HEADERS.get(page, HEADER)
    if begin in old:
        before, rest = old.split(begin)
        _, after = rest.split(end)
    else:
        before, after = old + "\n", ""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(before + begin + text.strip() + "\n" + end + after, encoding="utf-8")
