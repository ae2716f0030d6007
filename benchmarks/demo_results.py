"""The demo's outcome for the documentation: `docs/results/demo.json`, its section of `docs/results.md`, and the card
of its model in `model_cards/`.

    make demo && python benchmarks/demo_results.py [RESULTS]     # RESULTS: runs/demo/results.json
"""

import argparse
import json
from pathlib import Path

from results_page import ROOT, write_section

from grm_hf.demo.run import NAME, comparison_tables, model_card


RESULTS = ROOT / "docs" / "results" / "demo.json"
CARD = ROOT / "model_cards" / f"{NAME}.md"


def section(results: dict) -> str:
    """Markdown of the section."""
    versions = next(run["card"][1]["versions"] for run in results["runs"] if "card" in run)
    lines = [
        "## The demo world",
        "",
        "`make demo`, then `python benchmarks/demo_results.py`",
        "",
        "A small world whose true reward is known ([design](demo_world.md)); its model is described in "
        f"[its card](../model_cards/{NAME}.md). {versions}.",
        "",
        *comparison_tables(results, "###"),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's results into the documentation.")
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "runs" / "demo" / "results.json")
    results = json.loads(parser.parse_args().results.read_text(encoding="utf-8"))
    if results["quick"]:
        raise ValueError("These are results of a quick run, which shows nothing. Run `make demo`.")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    CARD.write_text(model_card(results), encoding="utf-8")
    write_section("demo", section(results))


if __name__ == "__main__":
    main()
