"""docs/results.md shows on one screen what the studies found, with a figure; each study has a page behind it. All of
it comes from the files that the studies left in docs/results.

    python benchmarks/results.py
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import lab
import objectives
import real_base_page
import signals
import world
from sections import ROOT

from grm_hf.lab import findings, report
from grm_hf.lab.proxies import LABELS, NAMES
from grm_hf.lab.settings import SET_NAMES


DOCS = ROOT / "docs"
FIGURE = DOCS / "images" / "results.png"
WORLD_COLOURS = {
    "GRM sft, alpha 0.01": report.COLOURS["sft_nll"],
    "GRM sft, alpha 0.1": report.COLOURS["sft"],
    "GRM dpo_noref, alpha 0.1": report.COLOURS["dpo_noref"],
}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def pages() -> dict[Path, str]:
    """Every page by its path."""
    return {
        DOCS / "results.md": front(),
        DOCS / "results" / "real_base.md": real_base_page.markdown(),
        DOCS / "results" / "world.md": world.markdown(read(world.RESULTS)),
        DOCS / "results" / "lab.md": report.markdown(read(lab.RESULTS)),
        **({objectives.PAGE: objectives.markdown()} if objectives.has_runs() else {}),
        **({signals.RESULTS.with_suffix(".md"): signals.markdown(read(signals.RESULTS))} if has_signals() else {}),
    }


def has_signals() -> bool:
    return signals.RESULTS.is_file()


def front() -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        "Is the reward better when training adds a text loss (GRM) than without one (Bradley-Terry)? Each study "
        f"trains both on the same pairs. {in_short()} Only the verdicts of the real base are corrected for the number "
        "of comparisons.",
        "",
        f"![Differences between GRM and Bradley-Terry, with intervals](images/{FIGURE.name})",
        "",
        "**[A real base](results/real_base.md).** " + " ".join(real_base_page.findings()),
        "",
        "**[A world whose true reward is known](results/world.md).** " + " ".join(world.findings(read(world.RESULTS))),
        "",
        "**[Over-optimisation in that world](results/lab.md).** " + " ".join(lab_findings(read(lab.RESULTS))),
        "",
        "`python benchmarks/results.py` writes this page, the figure and the pages behind it from the files in "
        "`docs/results/`.",
        "",
    ]
    if objectives.has_runs():
        said = " ".join(objectives.findings())
        lines[-3:-3] = ["", f"**[Terms and heads beyond the paper's](results/objectives.md).** {said}"]
    if has_signals():
        said = " ".join(signals.findings(read(signals.RESULTS)))
        lines[-3:-3] = ["", f"**[What the LM head knows about its own reward](results/signals.md).** {said}"]
    return "\n".join(lines)


def lab_findings(results: dict) -> list[str]:
    """What the laboratory found about GRM, in sentences."""
    best_of_n = [c["verdict"] for c in results["comparisons"] if _of_the_figure(c)]
    policies = [c["verdict"] for c in results["policy_comparisons"] if c["proxy"] in findings.GRM]
    return [
        f"{results['settings']['seeds']} seeds. The true (gold) reward of the best of {results['ns'][-1]} answers, "
        "chosen by GRM or by Bradley-Terry, averaged over the sizes of the training set: GRM is "
        f"{_counted(best_of_n)}.",
        "The true reward of policies that PPO or GRPO trained against these reward models: GRM is "
        f"{_counted(policies)}.",
    ]


def in_short() -> str:
    """The verdicts of all studies, in a sentence."""
    verdicts = [
        *real_base_page.verdicts(),
        *(entry["verdict"] for _, _, entry in world.against_baseline(read(world.RESULTS))),
        *(c["verdict"] for c in read(lab.RESULTS)["comparisons"] if _of_the_figure(c)),
    ]
    return f"In the comparisons of the figure GRM is {_counted(verdicts)}."


def _counted(verdicts: list[str]) -> str:
    counts = Counter(verdicts)
    return (
        f"better in {counts['better']} of {len(verdicts)}, worse in {counts['worse']}, and no difference is shown in "
        f"{counts[findings.SAME]}"
    )


def _of_the_figure(comparison: dict) -> bool:
    return comparison["quantity"] == "gold" and comparison["size"] == "all" and comparison["method"] in findings.GRM


# ---------------------------------------------------------------------------------------------------------- the figure


def panels() -> list[dict]:
    """What the figure draws: for each study its rows, and in a row each method's mean, low and high. A study without
    two seeds has no panel."""
    points = "accuracy,\nGRM minus Bradley-Terry, in points"
    found = [
        {"title": "A real base", "axis": points, "rows": real_base_page.forest()},
        {"title": "A world whose true reward is known", "axis": points, "rows": _world_rows(read(world.RESULTS))},
        {
            "title": "Over-optimisation in that world",
            "axis": "true reward of the best answer,\nGRM minus Bradley-Terry, in standard deviations",
            "rows": _lab_rows(read(lab.RESULTS)),
        },
    ]
    return [panel for panel in found if any(panel["rows"].values())]


def _world_rows(results: dict) -> dict:
    rows: dict = {name: {} for name in world.DOMAINS.values()}
    for domain, method, entry in world.against_baseline(results):
        mean, half = 100 * entry["difference"], 100 * entry["difference_half_width"]
        rows[world.DOMAINS[domain]][method] = [mean, mean - half, mean + half]
    return rows


def _lab_rows(results: dict) -> dict:
    rows: dict = {f"{SET_NAMES[key]},\n{labels}": {} for key in results["sets"] for labels in LABELS.values()}
    for c in filter(_of_the_figure, results["comparisons"]):
        row = rows[f"{SET_NAMES[c['set']]},\n{LABELS[c['labels']]}"]
        row[NAMES[c["method"]]] = [c["difference"], c["low"], c["high"]]
    return rows


def digest(drawn: list[dict]) -> str:
    """Names what a figure shows. The PNG file carries it, so a test sees a figure that is out of date."""
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def draw(drawn: list[dict], path: Path = FIGURE) -> None:
    from matplotlib.figure import Figure

    colours = {NAMES[method]: colour for method, colour in report.COLOURS.items()} | WORLD_COLOURS
    figure = Figure(figsize=(6 * len(drawn), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for place, marks in enumerate(panel["rows"].values()):
            for step, (method, (mean, low, high)) in enumerate(marks.items()):
                y = -place - 0.14 * (step - (len(marks) - 1) / 2)
                label = method if place == 0 else None
                axes.plot([low, high], [y, y], color=colours[method], linewidth=2)
                axes.plot(mean, y, "o", color=colours[method], markersize=6, label=label)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(yticks=[-i for i in range(len(panel["rows"]))], yticklabels=panel["rows"])
        axes.set(title=panel["title"], xlabel=panel["axis"], ylim=(0.5 - len(panel["rows"]), 0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": digest(drawn)})


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    draw(panels())
    if real_base_page.load()[0]:
        real_base_page.draw()


if __name__ == "__main__":
    main()
