"""The study on a real base as a section of docs/results.md: every number and every verdict in it is computed here from
the files that `benchmarks/real_base.py` left in docs/results/real_base, complete or not.

    python benchmarks/real_base_page.py
"""

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
from real_base import METHODS, PROMPTS, RATES, RESULTS, ROOT, SELECTION, TESTS, plan
from results_page import write_section

from grm_hf.metrics import accuracy, bootstrap_interval, pair_margins, pair_wins, seed_interval


FIGURE = ROOT / "docs" / "images" / "real_base.png"
CONDITIONS = {  # (training set, pairs, share of labels turned around): words for it
    ("rmb", 600, 0.0): "600 RMB pairs",
    ("rmb", 600, 0.25): "600 RMB pairs, 25 % of the labels turned around",
    ("rmb", 1200, 0.0): "1,200 RMB pairs",
    ("pandalm", 500, 0.0): "500 PandaLM pairs",
}
NAMES = {
    "rmb": "RMB", "hhh": "HHH", "hh_harmless": "hh harmless", "hh_helpful": "hh helpful", "pandalm": "PandaLM",
    "rm_bench": "RM-Bench", "gsm8k": "GSM8K",
}
# Before the study, three runs a method: differences in accuracy sft - none, by seed (issue 12's table). Power is
# computed from them, and from nothing that the study found.
PILOT = {
    "rmb": (1.6, 2.4, -0.8),
    "hhh": (0.6, 1.2, -2.3),
    "hh_harmless": (-0.6, 1.7, 1.1),
    "rm_bench": (1.2, 2.9, -0.8),
}
# The paper's own (400,000 and 40,000 pairs of Unified-Feedback, gemma-2b-it, LoRA; accuracy in %).
PAPER = {
    "400,000 pairs": {"none": (72.1, 73.4), "dpo": (73.8, 79.2), "dpo_noref": (73.9, 79.7), "sft": (73.2, 79.8)},
    "40,000 pairs": {"none": (68.8, 70.3), "dpo": (70.2, 71.6), "dpo_noref": (71.4, 76.6), "sft": (71.5, 78.7)},
}


# ----------------------------------------------------------------------------------------------------------- the units


def load(results: Path = RESULTS) -> tuple[dict, dict, dict | None, dict]:
    """Runs by (condition, method, seed); selection units by (method, rate); the base's unit; the tests."""
    runs, selection, base = {}, {}, None
    for path in sorted(results.glob("*.json")):
        if path.name == "tests.json":
            continue
        unit = json.loads(path.read_text(encoding="utf-8"))
        settings = unit["settings"]
        if settings["kind"] == "base":
            base = unit
        elif settings["kind"] == "select":
            selection[settings["method"], settings["learning_rate"]] = unit
        else:
            condition = (settings["train"], settings["pairs"], settings["flipped"])
            runs[condition, settings["method"], settings["seed"]] = unit
    return runs, selection, base, json.loads((results / "tests.json").read_text(encoding="utf-8"))


def in_distribution(condition) -> str:
    return condition[0]


def margins(run: dict, test: str) -> np.ndarray:
    return pair_margins(run["tests"][test]["chosen"], run["tests"][test]["rejected"])


def wins(run: dict, test: str) -> np.ndarray:
    return 100 * pair_wins(margins(run, test))


def both(runs: dict, condition, method: str, baseline: str = "none") -> list[int]:
    """Seeds that a method and its baseline have."""
    seeds = {seed for c, m, seed in runs if c == condition and m == method}
    return sorted(seeds & {seed for c, m, seed in runs if c == condition and m == baseline})


def difference(runs: dict, about: dict, condition, method: str, tests: list[str], level: float) -> dict | None:
    """Accuracy of a method minus that of `none`, in points, averaged over `tests`: its mean, its interval over seeds
    (Student's t) and over prompts (bootstrap of the average over seeds); `None` with fewer than two seeds."""
    seeds = both(runs, condition, method)
    if len(seeds) < 2:
        return None
    size = sum(len(about[test]["prompts"]) for test in tests)
    values, groups = [], []
    for test in tests:
        weight = size / (len(tests) * len(about[test]["prompts"]))  # each test set counts the same
        each = [wins(runs[condition, method, s], test) - wins(runs[condition, "none", s], test) for s in seeds]
        values.append(weight * np.stack(each))
        groups += [(test, prompt) for prompt in about[test]["prompts"]]
    table = np.concatenate(values, axis=1)  # (seeds, rows)
    spread = seed_interval(table.mean(1), level)
    over_prompts = bootstrap_interval(table.mean(0), groups, level, resamples=20_000)
    over_seeds = (spread["low"], spread["high"])
    return {
        "seeds": len(seeds),
        "each": table.mean(1).tolist(),
        "mean": spread["mean"],
        "over_seeds": over_seeds,
        "over_prompts": over_prompts,
        "verdict": verdict(over_seeds, over_prompts),
    }


def verdict(*intervals: tuple[float, float]) -> str:
    """Better or worse where every interval is on that side of zero."""
    if all(low > 0 for low, _ in intervals):
        return "better"
    if all(high < 0 for _, high in intervals):
        return "worse"
    return "no difference shown"


def detectable(deviation: float, seeds: int, level: float, power: float = 0.8) -> float:
    """The true difference that an interval over so many seeds excludes zero for with probability `power`, if single
    differences have this standard deviation (normal approximation for the power, Student's t for the interval)."""
    ramp = np.arange(seeds)
    spread = seed_interval(ramp / ramp.std(ddof=1), level)  # of any values whose standard deviation is 1
    half = (spread["high"] - spread["low"]) / 2
    return deviation * (half + NormalDist().inv_cdf(power) / math.sqrt(seeds))


# ------------------------------------------------------------------------------------------------------------ the page


def section(results: Path = RESULTS) -> str:
    """Markdown of the section."""
    runs, selection, base, about = load(results)
    planned = plan()
    done = [unit for unit in planned if (*_key(unit), unit[1]["seed"]) in _keys(runs)]
    primary = [(c, tests) for c in CONDITIONS for tests in _primary_tests(c)]
    level = 1 - 0.05 / len(primary)
    lines = [
        "## Does GRM help on a real base?",
        "",
        "`python benchmarks/real_base.py`, then `python benchmarks/real_base_page.py` (needs `shared/data` beside the "
        "repository).",
        "",
        *_opening(runs, base, about, level, len(done), len(planned)),
    ]
    if runs:
        lines += ["", f"![Differences in accuracy, GRM minus Bradley-Terry]({FIGURE.relative_to(ROOT / 'docs')})"]
    lines += ["", "### What is compared", "", *_protocol(runs, selection, base, level, len(primary))]
    if not runs:  # tables without a number say nothing
        return "\n".join(lines)
    lines += [
        "",
        "### GRM (sft) minus Bradley-Terry (none), accuracy in points",
        "",
        f"Intervals hold together with 95 % for these {len(primary)} comparisons (each has {100 * level:.2f} %).",
        "",
        "| trained on | tested on | seeds | difference | over seeds | over prompts | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for condition, tests in primary:
        where = NAMES[tests[0]] if len(tests) == 1 else f"the {len(tests)} other test sets, averaged"
        found = difference(runs, about, condition, "sft", tests, level)
        cells = _difference_cells(found, len(both(runs, condition, "sft")))
        lines.append(f"| {CONDITIONS[condition]} | {where} {cells}")
    for part in (_every_test(runs, about), _language(runs, base), _rm_bench(runs, about), _paper(runs)):
        lines += ["", *part]
    return "\n".join(lines)


def _key(unit):
    method, data = unit
    return (data["train"], data["pairs"], data["flipped"]), method


def _keys(runs):
    return {(condition, method, seed) for condition, method, seed in runs}


def _primary_tests(condition) -> list[list[str]]:
    home = in_distribution(condition)
    return [[home], [test for test in TESTS if test != home]]


def _span(interval) -> str:
    return f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def _difference_cells(found: dict | None, seeds: int) -> str:
    if found is None:
        return f"| {seeds} | | | | too few seeds yet |"
    return (
        f"| {found['seeds']} | {found['mean']:+.1f} | {_span(found['over_seeds'])} | {_span(found['over_prompts'])} | "
        f"{found['verdict']} |"
    )


def _mean(runs, condition, method, value) -> str:
    values = [value(run) for (c, m, _), run in runs.items() if (c, m) == (condition, method)]
    if not values:
        return ""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    spread = seed_interval(values)
    return f"{spread['mean']:.2f} ± {(spread['high'] - spread['low']) / 2:.2f}"


def _opening(runs, base, about, level, done, planned) -> list[str]:
    first = ("rmb", 600, 0.0)
    sentences = [
        f"SmolLM2-135M-Instruct is fine-tuned in full on real preference pairs, with and without the text loss: "
        f"{done} of {planned} runs are done"
        + ("." if done in (0, planned) else ", and what follows is computed from these."),
    ]
    for tests, where in zip(_primary_tests(first), ("on held-out pairs of the same kind", "elsewhere"), strict=True):
        found = difference(runs, about, first, "sft", tests, level)
        if found is None:
            sentences.append(f"Nothing can be said yet of the accuracy {where}.")
        else:
            sentences.append(
                f"After {CONDITIONS[first]}, GRM's accuracy {where} differs from Bradley-Terry's by "
                f"{found['mean']:+.1f} points (over seeds {_span(found['over_seeds'])}): {found['verdict']}."
            )
    perplexities = [_mean(runs, first, method, lambda run: run["perplexity"]) for method in ("none", "sft")]
    if base and all(perplexities):
        sentences.append(
            f"The LM head's perplexity on HHH's chosen answers is {base['perplexity']:.1f} before training, "
            f"{perplexities[0]} after Bradley-Terry and {perplexities[1]} after GRM."
        )
    deviation = _pilot_deviation()
    sentences.append(
        f"With 8 seeds the study can show a difference of {detectable(deviation, 8, level):.1f} points or more; "
        "smaller ones stay open."
    )
    return [" ".join(sentences)]


def _pilot_deviation() -> float:
    return float(np.mean([np.std(each, ddof=1) for each in PILOT.values()]))


def _protocol(runs, selection, base, level, comparisons) -> list[str]:
    rates: dict[str, dict[float, float]] = {method: {} for method in METHODS}
    for (method, rate), unit in sorted(selection.items()):
        rates[method][rate] = unit["held_out"]["log_loss"]
    units = [*runs.values(), *selection.values()]
    lines = [
        "- Methods: `linear` and `none` are Bradley-Terry models with a linear and with the paper's MLP head; `sft`, "
        "`dpo_noref` and `dpo` add that text loss to the MLP head, with alpha 0.01 and beta 0.1. Within a seed all "
        "methods have the same pairs, labels, order, steps, and (but for `linear`) head; a seed draws all of these.",
        f"- Learning rates were chosen for each method by itself, by the log loss on {_held_out(selection)} held-out "
        f"RMB training pairs after training on {SELECTION['pairs']} others, with one seed that is not used again, and "
        "hold for every training set: "
        + "; ".join(
            f"{method} {min(found, key=found.__getitem__):g} ("
            + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in found.items())
            + ")"
            for method, found in rates.items()
            if len(found) == len(RATES)
        )
        + _waiting(rates),
        "- Only short pairs, prompt and response of at most 1,000 characters. No prompt of a test set is in a "
        "training set. Each response is scored once, under the autocast of training.",
        "- An interval over seeds (Student's t) holds for these test pairs, an interval over prompts (bootstrap, each "
        "prompt with all its pairs, of the average over seeds) for these runs. Differences are paired by seed and by "
        "pair. A verdict needs both on one side of zero, after Bonferroni's correction for the comparisons of its "
        "table.",
        f"- Power, stated before the study from three earlier runs a method: single differences have a standard "
        f"deviation of {_pilot_deviation():.1f} points. Corrected for {comparisons} comparisons, 8 seeds show a true "
        f"difference of {detectable(_pilot_deviation(), 8, level):.1f} points with probability 0.8, 5 seeds one of "
        f"{detectable(_pilot_deviation(), 5, level):.1f}.",
    ]
    if base:
        versions = ", ".join(f"{name} {number}" for name, number in base["versions"].items())
        lines.append(f"- Base: {base['settings']['base']}; {base['settings']['precision']}. {versions}.")
    if units:
        seconds = sum(unit["processor_seconds"] for unit in units)
        each = seconds / len(units) / 60
        lines.append(f"- Cost so far: {seconds / 3600:.1f} hours of one core, {each:.0f} minutes a unit.")
    return lines


def _held_out(selection) -> str:
    return str(next(iter(selection.values()))["held_out"]["pairs"]) if selection else "the"


def _waiting(rates) -> str:
    missing = [method for method, found in rates.items() if len(found) < len(RATES)]
    return f". Not chosen yet: {', '.join(missing)}." if missing else "."


def _every_test(runs, about) -> list[str]:
    compared = [
        (condition, method, test)
        for condition in CONDITIONS
        for method in METHODS
        if method != "none" and any((c, m) == (condition, method) for c, m in map(_key, plan()))
        for test in TESTS
    ]
    level = 1 - 0.05 / len(compared)
    lines = [
        "### Every method on every test set, accuracy in %",
        "",
        f"Means over seeds; `length` is the accuracy of choosing the longer response. Differences from `none` on the "
        f"seeds that both have, corrected for {len(compared)} comparisons.",
        "",
        "| trained on | tested on | method | seeds | accuracy | log loss | length correlation | minus `none` "
        "| over seeds | over prompts | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for condition in CONDITIONS:
        for test in TESTS:
            longer = 100 * accuracy(pair_margins(about[test]["chosen"], about[test]["rejected"]))
            lines.append(f"| {CONDITIONS[condition]} | {NAMES[test]} | length | | {longer:.1f} | | | | | | |")
            for method in METHODS:
                of_method = [run for (c, m, _), run in runs.items() if (c, m) == (condition, method)]
                if not of_method:
                    continue
                scores = [run["tests"][test] for run in of_method]
                row = f"| {CONDITIONS[condition]} | {NAMES[test]} | {method} | {len(of_method)} "
                row += f"| {100 * np.mean([score['accuracy'] for score in scores]):.1f} "
                row += f"| {np.mean([score['log_loss'] for score in scores]):.3f} "
                row += f"| {np.mean([score['length'] for score in scores]):.2f} "
                if method == "none":
                    lines.append(row + "| | | | baseline |")
                    continue
                found = difference(runs, about, condition, method, [test], level)
                cells = _difference_cells(found, len(of_method)).split("|")
                lines.append(row + "|" + "|".join(cells[2:]))
    return lines


def _language(runs, base) -> list[str]:
    lines = [
        "### What the LM head still knows and says",
        "",
        "Perplexity of HHH's chosen answers"
        + (f"; the base has {base['perplexity']:.2f}" if base else "")
        + ". Mean and half width of the 95 % interval over seeds.",
        "",
        "| trained on | " + " | ".join(METHODS) + " |",
        "|---" * (1 + len(METHODS)) + "|",
    ]
    for condition, words in CONDITIONS.items():
        cells = (_mean(runs, condition, method, lambda run: run["perplexity"]) for method in METHODS)
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    shown = [method for method in ("none", "sft") if (("rmb", 600, 0.0), method, 0) in runs]
    if base and shown:
        lines += [
            "",
            "What they write, greedily, at most 40 tokens (600 RMB pairs, seed 0):",
            "",
            "| prompt | base | " + " | ".join(shown) + " |",
            "|---|---" + "|---" * len(shown) + "|",
        ]
        columns = [base["written"], *(runs[("rmb", 600, 0.0), method, 0]["written"] for method in shown)]
        for prompt, *said in zip(PROMPTS, *columns, strict=True):
            cells = [" ".join(text.split()).replace("|", "\\|") for text in said]
            lines.append("| " + " | ".join([prompt, *cells]) + " |")
    return lines


def _rm_bench(runs, about) -> list[str]:
    """Accuracy by domain, and by the styles of the pair: easy where the right answer is the more elaborate one."""
    domains, styles = (np.array(about["rm_bench"][name]) for name in ("domains", "styles"))
    sign = np.array([int(style[0]) - int(style[1]) for style in styles])
    groups = {name: domains == name for name in dict.fromkeys(domains)}
    groups |= {"easy": sign > 0, "normal": sign == 0, "hard": sign < 0}
    lines = [
        "### RM-Bench by domain and style",
        "",
        "Accuracy in %, means over seeds. Easy, normal and hard: the right answer is written in a more elaborate, an "
        "equal, a plainer style than the wrong one.",
        "",
        "| trained on | method | " + " | ".join(f"{name} ({mask.sum()})" for name, mask in groups.items()) + " |",
        "|---|---" + "|---" * len(groups) + "|",
    ]
    for condition, words in CONDITIONS.items():
        for method in METHODS:
            found = [wins(run, "rm_bench") for (c, m, _), run in runs.items() if (c, m) == (condition, method)]
            if found:
                each = np.mean(found, axis=0)
                cells = " | ".join(f"{each[mask].mean():.1f}" for mask in groups.values())
                lines.append(f"| {words} | {method} | {cells} |")
    return lines


def _paper(runs) -> list[str]:
    lines = [
        "### Beside the paper",
        "",
        "Accuracy in %. The paper (Tables 1 and 2) trained gemma-2b-it by LoRA on Unified-Feedback; its baseline has "
        "the same data. Here the base has 135 million parameters instead of 2.5 billion, there are 33 to 667 times "
        "fewer pairs, and all weights are trained. RMB stands in the place of Unified-Feedback.",
        "",
        "| | method | in distribution | HHH |",
        "|---|---|---|---|",
    ]
    for size, rows in PAPER.items():
        lines += [f"| paper, {size} | {method} | {home:.1f} | {hhh:.1f} |" for method, (home, hhh) in rows.items()]
    for condition in (("rmb", 600, 0.0), ("rmb", 1200, 0.0)):
        for method in METHODS:
            cells = [
                _mean(runs, condition, method, lambda run, test=test: 100 * run["tests"][test]["accuracy"])
                for test in ("rmb", "hhh")
            ]
            if all(cells):
                lines.append(f"| here, {CONDITIONS[condition]} | {method} | {cells[0]} | {cells[1]} |")
    return lines


def draw(results: Path = RESULTS, path: Path = FIGURE) -> None:
    """The difference sft - none of each seed, its mean and interval over seeds, by training condition."""
    from matplotlib.figure import Figure

    runs, _, _, about = load(results)
    level = 1 - 0.05 / (2 * len(CONDITIONS))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    ticks = []
    for condition, words in CONDITIONS.items():
        for tests, where in zip(_primary_tests(condition), ("in distribution", "other test sets"), strict=True):
            y = -len(ticks)
            ticks.append(f"{words}: {where}")
            found = difference(runs, about, condition, "sft", tests, level)
            if found is not None:
                axes.plot(found["each"], [y] * found["seeds"], "o", color="C0", alpha=0.4, markersize=4)
                axes.plot(found["over_seeds"], [y, y], color="C0")
                axes.plot(found["mean"], y, "D", color="C0")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=[-i for i in range(len(ticks))], yticklabels=ticks)
    axes.set(xlabel="GRM (sft) minus Bradley-Terry (none), accuracy in points", xlim=(-8, 8))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    write_section("real_base", section())
    if load()[0]:
        draw()
