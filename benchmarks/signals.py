"""What the signals of the LM head are worth on a real base: SmolLM2-135M-Instruct, trained as in `real_base.py` with
the text loss `sft`, and asked for every signal on pairs in and out of distribution.

    python benchmarks/signals.py                # trains and measures what has no result yet
    python benchmarks/signals.py --limit 50     # pairs of each test set, to see that it works
    python benchmarks/results.py                # writes the page, docs/results/signals.md

Signals and threshold are chosen on RMB pairs that were held out of training, and hold for every test set. The base
before training is the reference of `implicit`. Critiques are written for few pairs: each takes seconds. Needs
`shared/data` beside the repository, or GRM_DATA.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import real_base
import torch
from real_base import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from grm_hf import GRMScorer, base
from grm_hf.evaluation import Example, Results, SignalReport, signal_report
from grm_hf.evaluation.signals import TIE
from grm_hf.metrics import selective_accuracy
from grm_hf.scoring.reader import reference_scorer
from grm_hf.signals import SIGNALS


RESULTS = ROOT / "docs" / "results" / "signals.json"
VALIDATION = "validation"
GAIN = ("difference", "difference_low", "difference_high")
AGREED = 0.75  # the share of signals, the head among them, that makes an agreement on the page
TESTS = ("rmb", "hhh", "pandalm", "rm_bench")  # of the study's test sets
SEEDS = 3
LIMIT = 60  # pairs of each set
CRITIQUES = 20  # prompts of each set
RATE = 1e-4  # fixed before the study had chosen one
COUNTED = 8  # pairs whose FLOPs are counted
COSTS = {
    "head, likelihood, implicit_free, endogenous": ("likelihood", "implicit_free", "endogenous"),
    "head, likelihood, implicit, endogenous": ("likelihood", "implicit", "endogenous"),
    "head, judge": ("judge",),
    "head, follow_up": ("follow_up",),
    "head, dropout": ("dropout",),
}


def settings_of(seed: int, origin: str) -> dict:
    data = {"train": "rmb", "pairs": 600, "flipped": 0.0, "seed": seed}
    return real_base.run_unit("sft", data, RATE, origin) | {"kind": "signals"}


def examples_of(rows: list[dict]) -> list[Example]:
    return [
        Example(row["prompt"], [row["chosen"], row["rejected"]], [0], id=row["id"], meta={"group": group})
        for row in rows
        for group in [real_base.first_user_turn(row)]
    ]


def test_sets(limit: int | None) -> dict[str, list[dict]]:
    sets = {VALIDATION: real_base.split("rmb")[1], **{name: real_base.test_rows(name) for name in TESTS}}
    return {name: rows[:limit] for name, rows in sets.items()}


def flops(run: Callable) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # products that are counted
        run()
    return counter.get_total_flops()


def costs(scorer: GRMScorer, rows: list[dict], reference) -> dict[str, float]:
    """FLOPs of signals together with the reward, in those of the reward alone."""
    chats = [{"prompt": row["prompt"], "response": row[side]} for row in rows for side in ("chosen", "rejected")]
    alone = flops(lambda: scorer.score(chats))
    found = {}
    for label, names in COSTS.items():
        settings = {"reference": reference} if "implicit" in names else {}
        found[label] = flops(partial(scorer.signals, chats, ["head", *names], **settings)) / alone
    return found


def asked(scorer: GRMScorer, name: str, rows: list[dict], signals: list[str], **settings) -> dict:
    """What the signals say about a test set."""
    with real_base.autocast():
        report = signal_report(scorer, Results(name, "", {}, examples_of(rows), []), signals, **settings)
    groups = {group: number for number, group in enumerate(dict.fromkeys(report.groups))}
    print(f"{name}: {len(report.groups)} pairs", flush=True)
    return {
        "margins": {key: [float(f"{value:.6g}") for value in values] for key, values in report.margins.items()},
        "probabilities": {key: [round(p, 6) for p in ps] for key, ps in report.probabilities.items()},
        "groups": [groups[group] for group in report.groups],
    }


def measure(scorer: GRMScorer, sets: dict[str, list[dict]], reference) -> dict:
    """Margins and probabilities of every signal but `critique` on every test set."""
    names = [name for name, signal in SIGNALS.items() if signal.needs != "generate"]
    found: dict = {"tests": {}, "costs": costs(scorer, sets[VALIDATION][:COUNTED], reference)}
    for name, rows in sets.items():
        found["tests"][name] = asked(scorer, name, rows, names, reference=reference)
    return found


def critiques(scorer: GRMScorer, sets: dict[str, list[dict]]) -> dict:
    """The head and `critique`, of at most 64 tokens, on a pair of each of the first prompts of every test set."""
    found = {}
    for name, rows in sets.items():
        one = list({real_base.first_user_turn(row): row for row in reversed(rows)}.values())[::-1]
        found[name] = asked(scorer, name, one[:CRITIQUES], ["critique"], generate=True, max_new_tokens=64)
    return found


def run_all(seeds: int, limit: int, path: Path) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    folder = base.folder()
    origin = base.origin(folder)
    sets = test_sets(limit)
    for seed in range(seeds):
        settings = json.loads(json.dumps(settings_of(seed, origin) | {"limit": limit}))
        result = next((run for run in found["runs"] if run["settings"] == settings), {"settings": settings})
        if "critiques" in result:
            continue
        with tempfile.TemporaryDirectory() as work:
            trainer = real_base.trained(settings, folder, work)
        model, tokenizer = trainer.model.eval(), trainer.processing_class
        model.zero_grad()
        del trainer  # and the state of its optimizer, 1 GB
        scorer = GRMScorer(model, tokenizer, max_tokens_per_batch=2048)
        if "tests" not in result:
            reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device).eval()
            result |= measure(scorer, sets, reference_scorer(scorer, reference))
            result["versions"] = {name: version(name) for name in real_base.PACKAGES}
            found["runs"].append(result)
            real_base.write(path, found)
        result["critiques"] = critiques(scorer, test_sets(None))
        real_base.write(path, found)


# ---------------------------------------------------------------------------------------------------------------- page


def pooled(runs: list[dict], test: str, part: str = "tests") -> SignalReport:
    """The pairs of all runs; those of one prompt stay together, also over runs."""
    parts = [run[part][test] for run in runs]
    join = lambda kind: {  # noqa: E731
        name: [value for part in parts for value in part[kind][name]] for name in parts[0][kind]
    }
    groups = [str(group) for part in parts for group in part["groups"]]
    return SignalReport(test, join("margins"), join("probabilities"), groups, 0, {"reference": "the base"})


def points(value: float, low: float, high: float, signed: bool = False) -> str:
    form = "{:+.1f}" if signed else "{:.1f}"
    if math.isnan(value):
        return "none"
    if math.isnan(low):
        return f"{form.format(100 * value)} (too few for an interval)"
    return " ".join([form.format(100 * value), f"({form.format(100 * low)} to {form.format(100 * high)})"])


def latest(found: dict) -> list[dict]:
    """The runs with the settings of the last one, a run a seed."""
    settings = {**found["runs"][-1]["settings"], "seed": 0}
    return [run for run in found["runs"] if {**run["settings"], "seed": 0} == settings]


def _size(last: list[dict]) -> str:
    sizes = sorted({len(part["groups"]) for run in last for part in run["tests"].values()})
    return f"{sizes[0]} pairs of each set" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} pairs of each set"


def findings(found: dict) -> list[str]:
    """What the front page of the results says, in sentences."""
    last = latest(found)
    summaries = {test: pooled(last, test).summary(AGREED) for test in last[0]["tests"] if test != VALIDATION}
    sentences = [f"{len(last)} seeds, {len(summaries)} test sets."]
    for name in list(last[0]["tests"][VALIDATION]["margins"])[1:]:
        above = sum(summary["signals"][name]["verdict"] == "better than chance" for summary in summaries.values())
        sentences.append(f"`{name}` is better than chance on {above}.")
    gains = sum(summary["agreed"]["difference_low"] > 0 for summary in summaries.values())
    agreed = f"Where three quarters of the signals agree, the head is shown to be more accurate on {gains}."
    return [*sentences, agreed]


def accuracies(summaries: dict[str, dict], names: list[str]) -> list[str]:
    """Rows of a table: of each signal its accuracy on every test set."""
    lines = []
    for name in names:
        cells = []
        for summary in summaries.values():
            row = summary["signals"][name]
            chance = "" if row["verdict"] == "better than chance" else f", {row['verdict']}"
            cells.append(points(row["accuracy"], row["low"], row["high"]) + chance)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def choice_of(run: dict, tests: list[str]) -> str:
    """What a run chose on the validation pairs, and what the choice was worth on the test sets."""
    choice = pooled([run], VALIDATION).choice()
    if choice["threshold"] is None:
        return "chose no signal on the validation pairs."
    gains = []
    for test in tests:
        report = pooled([run], test)
        reached = report.agreement(choice["names"])
        gain = selective_accuracy(report.margins["head"], reached, choice["threshold"], report.groups, TIE)
        gains.append(f"{test} {points(*(gain[key] for key in GAIN), signed=True)}")
    names = " and ".join(f"`{name}`" for name in choice["names"])
    return (
        f"chose {names} on the validation pairs, from an agreement of {choice['threshold']:.2f} on. The head's "
        f"accuracy there, against all pairs: {', '.join(gains)}."
    )


def markdown(found: dict) -> str:
    """The page."""
    last = latest(found)
    tests = {test: pooled(last, test) for test in last[0]["tests"]}
    summaries = {test: report.summary(AGREED) for test, report in tests.items()}
    names = list(summaries[VALIDATION]["signals"])
    held = [test for test in tests if test != VALIDATION]
    lines = [
        "# What the LM head knows about its own reward",
        "",
        "`python benchmarks/signals.py`, then `python benchmarks/results.py` (needs `shared/data` beside the "
        "repository). Formulas: [signals.md](../signals.md).",
        "",
        f"{last[0]['settings']['base']}, trained as in [the study on the real base](real_base.md) with the text "
        f"loss `sft` on {last[0]['settings']['pairs']} RMB pairs; {len(last)} seeds, {_size(last)}. "
        "Accuracy in % with 95 % intervals over prompts, each with all its pairs and runs; they hold for these runs. "
        "A tie is half right. No correction for the number of comparisons.",
        "",
        "## Accuracy of each signal",
        "",
        "| signal | " + " | ".join(tests) + " |",
        "|---" * (len(tests) + 1) + "|",
    ]
    lines += accuracies(summaries, names)
    written = [run for run in last if "critiques" in run]
    if written:
        reports = {test: pooled(written, test, "critiques").summary() for test in tests}
        pairs = len(written[0]["critiques"][VALIDATION]["groups"])
        lines += [
            "",
            f"`critique` was asked on a pair of each of {pairs} prompts of each set, with {len(written)} seeds. The "
            "LM head wrote at most 64 tokens. On the same pairs:",
            "",
            "| signal | " + " | ".join(tests) + " |",
            "|---" * (len(tests) + 1) + "|",
            *accuracies(reports, ["head", "critique"]),
        ]
    lines += ["", "## Where signals agree", ""]
    for run in last:
        lines.append(f"- Seed {run['settings']['seed']} {choice_of(run, held)}")
    lines += [
        "",
        "Of the pairs on which at least three quarters of the signals, the head among them, are on its side: their "
        "share, and the head's accuracy there against all pairs. Then the area under the risk-coverage curve (smaller "
        "is better) by the head's margin, and that by agreement against it.",
        "",
        "| test set | share of pairs | accuracy against all pairs | area by margin | by agreement, difference |",
        "|---|---|---|---|---|",
    ]
    for test in held:
        agreed, areas = summaries[test]["agreed"], summaries[test]["risk_coverage"]
        gain = points(agreed["difference"], agreed["difference_low"], agreed["difference_high"], signed=True)
        other = areas["agreement"]
        against = points(other["difference"], other["difference_low"], other["difference_high"], signed=True)
        lines.append(
            f"| {test} | {100 * agreed['coverage']:.1f} | {gain} | {100 * areas['margin']['area']:.1f} | {against} |"
        )
    lines += ["", "## Cost", "", "| what | FLOPs, in those of the reward alone |", "|---|---|"]
    lines += [f"| {label} | {ratio:.2f} |" for label, ratio in last[0]["costs"].items()]
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs (default: {SEEDS})")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"most pairs of each test set (default: {LIMIT})")
    args = parser.parse_args(argv)
    run_all(args.seeds, args.limit, RESULTS)


if __name__ == "__main__":
    main()
