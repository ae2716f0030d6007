"""docs/results/objectives.md: what terms and heads beyond the paper's do on a real base. The runs are units of
`benchmarks/real_base.py`; every number is computed here from their files, whether all are there or not.

    python benchmarks/real_base.py    # runs what has no file yet, the study's own runs first
    python benchmarks/results.py      # writes the page
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from real_base import METHODS, OBJECTIVES, RESULTS, ROOT, TESTS, objectives_plan
from real_base_page import CONDITIONS, NAMES, both, difference, difference_cells, load, mean_over_seeds

from grm_hf.metrics import pearson, seed_interval


PAGE = ROOT / "docs" / "results" / "objectives.md"
CLEAN, FLIPPED = ("rmb", 600, 0.0), ("rmb", 600, 0.25)
# Condition, method, the method that it is compared with. Each on the pairs of its own kind, and on the others.
COMPARED = (
    (CLEAN, "none_zero", "none"),
    (CLEAN, "sft_zero", "sft"),
    (FLIPPED, "none_zero", "none"),
    (FLIPPED, "sft_zero", "sft"),
    (CLEAN, "bnrm", "none"),
)
WORDS = {
    "none": "Bradley-Terry",
    "sft": "GRM (sft)",
    "none_zero": "Bradley-Terry, sum to zero",
    "sft_zero": "GRM (sft), sum to zero",
    "bnrm": "Bradley-Terry, head bnrm",
}
HOME, AWAY = ["rmb"], [test for test in TESTS if test != "rmb"]


def has_runs(results: Path = RESULTS) -> bool:
    return any(key[1] in OBJECTIVES for key in load(results, OBJECTIVES)[0])


def rewards(run: dict, test: str) -> np.ndarray:
    return np.array([run["tests"][test]["chosen"], run["tests"][test]["rejected"]])


def items(about: dict) -> dict[int, tuple[int, int]]:
    """RM-Bench's prompts of which at least three responses are short: how many of these are right, and wrong."""
    styles: dict[int, tuple[set, set]] = {}
    for prompt, (right, wrong) in zip(about["rm_bench"]["prompts"], about["rm_bench"]["styles"], strict=True):
        for seen, style in zip(styles.setdefault(prompt, (set(), set())), (right, wrong), strict=True):
            seen.add(style)
    counts = {prompt: (len(right), len(wrong)) for prompt, (right, wrong) in styles.items()}
    return {prompt: sides for prompt, sides in counts.items() if sum(sides) > 2}


def best_of(run: dict, about: dict) -> float:
    """The share of `items` whose highest reward is a right answer's, in %. A tie is half."""
    best = {prompt: [-np.inf, -np.inf] for prompt in items(about)}
    for prompt, *pair in zip(about["rm_bench"]["prompts"], *rewards(run, "rm_bench"), strict=True):
        if prompt in best:
            best[prompt] = [max(known, reward) for known, reward in zip(best[prompt], pair, strict=True)]
    return 100 * float(np.mean([(right > wrong) + 0.5 * (right == wrong) for right, wrong in best.values()]))


def length_bias(run: dict, about: dict) -> float:
    """Correlation of a reward with the characters of its response, over HHH's responses."""
    lengths = np.array([about["hhh"][side] for side in ("chosen", "rejected")])
    return pearson(rewards(run, "hhh").ravel(), lengths.ravel())


def columns(about: dict) -> dict[str, Callable[[dict], float]]:
    """What the second table says of a run."""
    return {
        "RMB": lambda run: 100 * run["tests"]["rmb"]["accuracy"],
        "other test sets": lambda run: 100 * float(np.mean([run["tests"][test]["accuracy"] for test in AWAY])),
        "mean reward": lambda run: float(rewards(run, "rmb").mean()),
        "its deviation": lambda run: float(rewards(run, "rmb").std()),
        "correlation with length": lambda run: length_bias(run, about),
        "best of n": lambda run: best_of(run, about),
        "perplexity": lambda run: run["perplexity"],
    }


def change(runs: dict, condition, method: str, baseline: str, value: Callable[[dict], float]) -> str:
    """A value minus that of a baseline: the mean over the seeds that both have, and the half width of its interval."""
    seeds = both(runs, condition, method, baseline)
    if len(seeds) < 2:
        return ""
    of_seeds = [value(runs[condition, method, seed]) - value(runs[condition, baseline, seed]) for seed in seeds]
    spread = seed_interval(of_seeds)
    return f"{spread['mean']:+.2f} ± {(spread['high'] - spread['low']) / 2:.2f}"


def level() -> float:
    """The level of an interval, by Bonferroni's correction for the comparisons of the first table."""
    return 1 - 0.05 / (2 * len(COMPARED))


def compared(runs: dict, about: dict):
    """Condition, method, baseline and test sets of each comparison, with what is found."""
    for (condition, method, baseline), tests in product(COMPARED, (HOME, AWAY)):
        yield condition, method, baseline, tests, difference(runs, about, condition, method, tests, level(), baseline)


def findings(results: Path = RESULTS) -> list[str]:
    """What was found, in sentences."""
    runs, *_, about = load(results, METHODS | OBJECTIVES)
    planned = objectives_plan()
    done = sum(((d["train"], d["pairs"], d["flipped"]), m, d["seed"]) in runs for m, d in planned)
    sentences = [
        f"{done} of {len(planned)} runs with a sum-to-zero term or a head of non-negative factors (bnrm) are done, on "
        "the pairs of the study."
    ]
    verdicts = [found["verdict"] for *_, found in compared(runs, about) if found is not None]
    if verdicts:
        sentences.append(
            f"Against the same training without them, accuracy is better in {verdicts.count('better')} of "
            f"{len(verdicts)} comparisons, worse in {verdicts.count('worse')}, and no difference is shown in "
            f"{verdicts.count('no difference shown')}."
        )
    return sentences


def markdown(results: Path = RESULTS) -> str:
    """The page."""
    runs, selection, _, about = load(results, METHODS | OBJECTIVES)
    weight = OBJECTIVES["sft_zero"]["batch_sum_to_zero"]
    lines = [
        "# Terms and heads beyond the paper's, on a real base",
        "",
        "`python benchmarks/real_base.py` runs them (it needs `shared/data` beside the repository), after the runs of "
        "[the study](real_base.md). `python benchmarks/results.py` writes this page.",
        "",
        " ".join(findings(results)),
        "",
        "- Base, pairs, order, steps and test sets are those of the study. A method with a term has the learning rate "
        "of the method without it; `bnrm` has its own, chosen in the same way.",
        f"- Sum to zero: + {weight:g} * (mean reward of a step)^2 (2505.07271). Its authors' rule would give 0.008 "
        "here. bnrm: non-negative factors, drawn in training, + 1e-5 * KL (2602.10623).",
        f"- Intervals are those of the study, corrected for {2 * len(COMPARED)} comparisons. A verdict needs both on "
        "one side of zero.",
        "",
        "## Accuracy against the same training without it, in points",
        "",
        "| trained on | method | against | tested on | seeds | difference | over seeds | over prompts | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for condition, method, baseline, tests, found in compared(runs, about):
        where = NAMES[tests[0]] if len(tests) == 1 else f"the {len(tests)} others, averaged"
        cells = difference_cells(found, len(both(runs, condition, method, baseline)))
        lines.append(f"| {CONDITIONS[condition]} | {WORDS[method]} | {WORDS[baseline]} | {where} {cells}")
    parts, sides = columns(about), list(items(about).values())
    n = [right + wrong for right, wrong in sides]
    chance = 100 * float(np.mean([right / (right + wrong) for right, wrong in sides]))
    lines += [
        "",
        "## What else changes",
        "",
        "Means with half widths of 95 % intervals over seeds. Rewards are those of RMB's responses. Correlation of "
        f"reward and length: over HHH's responses. Best of n: of the {len(sides)} RM-Bench prompts of which at least "
        f"three responses are short, those whose highest reward is a right answer's, in %. There n is {min(n)} to "
        f"{max(n)}, and chance gives {chance:.1f} %. Perplexity: of HHH's chosen responses.",
        "",
        "| trained on | method | " + " | ".join(parts) + " |",
        "|---" * (2 + len(parts)) + "|",
    ]
    for condition, method in product((CLEAN, FLIPPED), WORDS):
        cells = [mean_over_seeds(runs, condition, method, value) for value in parts.values()]
        if all(cells):
            lines.append(f"| {CONDITIONS[condition]} | {WORDS[method]} | {' | '.join(cells)} |")
    lines += [
        "",
        "The same against the training without it: mean differences over the seeds that both have, and half widths of "
        "their 95 % intervals, which are corrected for nothing.",
        "",
        "| trained on | method | against | " + " | ".join(parts) + " |",
        "|---" * (3 + len(parts)) + "|",
    ]
    for condition, method, baseline in COMPARED:
        cells = [change(runs, condition, method, baseline, value) for value in parts.values()]
        if all(cells):
            lines.append(f"| {CONDITIONS[condition]} | {WORDS[method]} | {WORDS[baseline]} | {' | '.join(cells)} |")
    rates = {
        rate: unit["held_out"]["log_loss"] for (method, rate), unit in sorted(selection.items()) if method == "bnrm"
    }
    if rates:
        tried = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in rates.items())
        lines += ["", f"Log loss of `bnrm` on held-out training pairs, by learning rate: {tried}."]
    return "\n".join([*lines, ""])
