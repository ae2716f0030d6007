"""docs/results/real_base.md, the study on a real base. Every number and every verdict is computed here from the files
that `benchmarks/real_base.py` left in docs/results/real_base, whether the study is complete or not.

    python benchmarks/results.py    # writes this page, its figure and all other results pages
"""

import json
import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import numpy as np
from real_base import HIGHER, METHODS, PROMPTS, RATES, RESULTS, ROOT, SELECTION, TESTS, best_rate, plan

from grm_hf.metrics import accuracy, pair_margins, pair_wins, seed_interval, strata_interval


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
# Differences in accuracy, sft - none, of three seeds run before the study. The power is computed from them alone.
PILOT = {
    "rmb": (1.6, 2.4, -0.8),
    "hhh": (0.6, 1.2, -2.3),
    "hh_harmless": (-0.6, 1.7, 1.1),
    "rm_bench": (1.2, 2.9, -0.8),
}
# The paper's own numbers: 400,000 and 40,000 pairs of Unified-Feedback, gemma-2b-it, LoRA; accuracy in %.
PAPER = {
    "400,000 pairs": {"none": (72.1, 73.4), "dpo": (73.8, 79.2), "dpo_noref": (73.9, 79.7), "sft": (73.2, 79.8)},
    "40,000 pairs": {"none": (68.8, 70.3), "dpo": (70.2, 71.6), "dpo_noref": (71.4, 76.6), "sft": (71.5, 78.7)},
}


# ----------------------------------------------------------------------------------------------------------- the units


def load(results: Path = RESULTS, methods=METHODS) -> tuple[dict, dict, dict | None, dict]:
    """Runs by (condition, method, seed); selection units by (method, rate); the base's unit; the tests. All but those
    of `methods` are passed over. Units that do not belong together are refused."""
    runs, selection, base = {}, {}, None
    seen: dict[str, Path] = {}
    for path in sorted(results.glob("*.json")):
        if path.name == "tests.json":
            continue
        unit = json.loads(path.read_text(encoding="utf-8"))
        settings = unit["settings"]
        shared = {name: settings[name] for name in ("base", "precision", "recipe", "short")}
        seen.setdefault(json.dumps(shared, sort_keys=True), path)
        if len(seen) > 1:
            one, other = (path.name for path in seen.values())
            raise ValueError(
                f"{one} and {other} in {results} differ in base, precision or recipe. A study has one of each: move "
                "the units of the other to a folder of their own."
            )
        if settings["kind"] == "base":
            base = unit
        elif settings["method"] not in methods or settings["kind"] == "gold":
            continue
        elif settings["kind"] == "select":
            selection[settings["method"], settings["learning_rate"]] = unit
        else:
            key = (settings["train"], settings["pairs"], settings["flipped"]), settings["method"], settings["seed"]
            if key in runs:
                raise ValueError(f"{results} has two runs of {key}, {path.name} is one. Remove that of an old rate.")
            runs[key] = unit
    return runs, selection, base, json.loads((results / "tests.json").read_text(encoding="utf-8"))


def gold(results: Path = RESULTS) -> dict | None:
    """The unit of the judge of over-optimisation."""
    units = (json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json"))
    return next((unit for unit in units if unit.get("settings", {}).get("kind") == "gold"), None)


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


def difference(
    runs: dict, about: dict, condition, method: str, tests: list[str], level: float, baseline: str = "none"
) -> dict | None:
    """Accuracy of a method minus that of a baseline, in points, averaged over `tests`: its mean, its interval over
    seeds (Student's t) and over prompts (bootstrap of the average over seeds); `None` with fewer than two seeds."""
    seeds = both(runs, condition, method, baseline)
    if len(seeds) < 2:
        return None
    tables = {  # of each test set: (seeds, rows)
        test: np.stack(
            [wins(runs[condition, method, s], test) - wins(runs[condition, baseline, s], test) for s in seeds]
        )
        for test in tests
    }
    each = np.mean([table.mean(1) for table in tables.values()], axis=0)
    spread = seed_interval(each, level)
    over_prompts = interval_over_prompts({test: table.mean(0) for test, table in tables.items()}, about, level)
    over_seeds = (spread["low"], spread["high"])
    return {
        "seeds": len(seeds),
        "each": each.tolist(),
        "mean": spread["mean"],
        "over_seeds": over_seeds,
        "over_prompts": over_prompts,
        "verdict": verdict(over_seeds, over_prompts),
    }


def interval_over_prompts(values: dict[str, np.ndarray], about: dict, level: float) -> tuple[float, float]:
    """Of the average over test sets, each of which counts the same."""
    rows = [(test, (test, prompt)) for test in values for prompt in about[test]["prompts"]]
    strata, groups = zip(*rows, strict=True)
    equal = dict.fromkeys(values, 1.0)
    return strata_interval(np.concatenate([*values.values()]), strata, equal, groups, level, resamples=20_000)


def verdict(*intervals: tuple[float, float]) -> str:
    """`better` or `worse` if every interval lies on that side of zero."""
    if all(low > 0 for low, _ in intervals):
        return "better"
    if all(high < 0 for _, high in intervals):
        return "worse"
    return "no difference shown"


def detectable(deviation: float, seeds: int, level: float, power: float = 0.8) -> float:
    """The true difference whose interval over this many seeds (Student's t) lies above zero with probability `power`,
    if single differences are normal with this standard deviation."""
    ramp = np.arange(seeds)
    spread = seed_interval(ramp / ramp.std(ddof=1), level)  # of any values whose standard deviation is 1
    half = (spread["high"] - spread["low"]) / 2
    found = np.linspace(0.001, 5, 5000)  # standard deviations as they may be estimated: a chi distribution
    density = np.exp((seeds - 2) * np.log(found) - (seeds - 1) * found**2 / 2)
    low, high = 0.0, half + 10.0
    for _ in range(50):
        middle = (low + high) / 2
        shown = [NormalDist().cdf(math.sqrt(seeds) * (middle - half * each)) for each in found.tolist()]
        low, high = (middle, high) if np.average(shown, weights=density) < power else (low, middle)
    return deviation * low


# ------------------------------------------------------------------------------------------------------------ the page


def findings(results: Path = RESULTS) -> list[str]:
    """What the study found, in sentences: how far it is, the accuracy on each side, the LM head, the power."""
    runs, _, base, about = load(results)
    planned = plan()
    done = sum((*_key(unit), unit[1]["seed"]) in runs for unit in planned)
    return _opening(runs, base, about, _level(), done, len(planned))


def _primary() -> list[tuple]:
    """The comparisons that the study was made for: (condition, test sets whose accuracy is averaged)."""
    return [(condition, tests) for condition in CONDITIONS for tests in _primary_tests(condition)]


def _level() -> float:
    """The level of an interval, by Bonferroni's correction for the primary comparisons."""
    return 1 - 0.05 / len(_primary())


def markdown(results: Path = RESULTS) -> str:
    """The page."""
    runs, selection, base, about = load(results)
    primary, level = _primary(), _level()
    lines = [
        "# Does GRM help on a real base?",
        "",
        "`python benchmarks/real_base.py` runs the study (it needs `shared/data` beside the repository). "
        "`python benchmarks/results.py` writes this page.",
        "",
        " ".join(findings(results)),
    ]
    if runs:
        lines += ["", f"![Differences in accuracy, GRM minus Bradley-Terry](../images/{FIGURE.name})"]
    lines += ["", "## What is compared", "", *_protocol(runs, selection, base, level, len(primary))]
    if not runs:  # tables without a number say nothing
        return "\n".join([*lines, "", *_paper(runs), ""])
    lines += [
        "",
        "## GRM (sft) minus Bradley-Terry (none), accuracy in points",
        "",
        f"All {len(primary)} intervals hold together with 95 %; each one alone holds with {100 * level:.2f} %.",
        "",
        "| trained on | tested on | seeds | difference | over seeds | over prompts | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for condition, tests in primary:
        where = NAMES[tests[0]] if len(tests) == 1 else f"the {len(tests)} other test sets, averaged"
        found = difference(runs, about, condition, "sft", tests, level)
        cells = difference_cells(found, len(both(runs, condition, "sft")))
        lines.append(f"| {CONDITIONS[condition]} | {where} {cells}")
    judge = _over_optimisation(runs, gold(results), about)
    for part in (_every_test(runs, about), _language(runs, base), _rm_bench(runs, about), judge, _paper(runs)):
        lines += ["", *part]
    return "\n".join([*lines, ""])


def _key(unit):
    method, data = unit
    return (data["train"], data["pairs"], data["flipped"]), method


def _primary_tests(condition) -> list[list[str]]:
    home = in_distribution(condition)
    return [[home], [test for test in TESTS if test != home]]


def _span(interval) -> str:
    return f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def difference_cells(found: dict | None, seeds: int) -> str:
    if found is None:
        return f"| {seeds} | | | | too few seeds yet |"
    return (
        f"| {found['seeds']} | {found['mean']:+.1f} | {_span(found['over_seeds'])} | {_span(found['over_prompts'])} | "
        f"{found['verdict']} |"
    )


def mean_over_seeds(runs, condition, method, value) -> str:
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
        "The study trains all weights of SmolLM2-135M-Instruct on real preference pairs, with or without a text "
        f"loss, in {planned} runs."
    ]
    if done < planned:
        rest = "; every number here is computed from these." if done else "."
        sentences.append(f"{done} of {planned} runs are done{rest}")
    if not done:
        return [*sentences, _power(level)]
    places = ("on held-out pairs of the training set", "on the other test sets")
    for tests, where in zip(_primary_tests(first), places, strict=True):
        found = difference(runs, about, first, "sft", tests, level)
        if found is None:
            sentences.append(f"The accuracy {where} is not known yet.")
        else:
            sentences.append(
                f"After {CONDITIONS[first]}, GRM's accuracy {where} differs from Bradley-Terry's by "
                f"{found['mean']:+.1f} points (over seeds {_span(found['over_seeds'])}, over prompts "
                f"{_span(found['over_prompts'])}): {found['verdict']}."
            )
    perplexities = [mean_over_seeds(runs, first, method, lambda run: run["perplexity"]) for method in ("none", "sft")]
    if base and all(perplexities):
        sentences.append(
            f"The LM head's perplexity on HHH's chosen answers is {base['perplexity']:.1f} before training, "
            f"{perplexities[0]} after Bradley-Terry and {perplexities[1]} after GRM."
        )
    return [*sentences, _power(level)]


def _power(level: float) -> str:
    return (
        f"With 8 seeds the interval over seeds has an 80 % chance of showing a true difference of "
        f"{detectable(_pilot_deviation(), 8, level):.1f} points; a verdict also needs the interval over prompts."
    )


def _pilot_deviation() -> float:
    return float(np.mean([np.std(each, ddof=1) for each in PILOT.values()]))


def _protocol(runs, selection, base, level, comparisons) -> list[str]:
    rates: dict[str, dict[float, float]] = {method: {} for method in METHODS}
    for (method, rate), unit in sorted(selection.items()):
        rates[method][rate] = unit["held_out"]["log_loss"]
    units = [*runs.values(), *selection.values()]
    lines = [
        "- `linear` and `none` are Bradley-Terry models: `linear` has a linear head, `none` has the paper's MLP head. "
        "`sft`, `dpo_noref` and `dpo` have the MLP head and add that text loss, with alpha 0.01 and beta 0.1.",
        "- A seed draws the pairs, the labels, their order and the head. Within a seed all methods share these; "
        "only `linear` has a head of its own.",
        "- Each method has its own learning rate, for all training sets. "
        f"Of {', '.join(f'{rate:g}' for rate in RATES)} (and {HIGHER:g}, where the last of these is the best) it has "
        f"the lowest log loss on {_held_out(selection)} held-out RMB training pairs after training on "
        f"{SELECTION['pairs']} others, with one seed that is not used again. "
        + "; ".join(
            f"{method} {best_rate(found):g} ("
            + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in found.items())
            + ")"
            for method, found in rates.items()
            if best_rate(found)
        )
        + _waiting(rates),
        "- All pairs are short: prompt and response have at most 1,000 characters. No prompt of a test set is in a "
        "training set. Each response is scored once, under the autocast of training.",
        "- Differences are paired by seed and by pair. The interval over seeds (Student's t) holds for these test "
        "pairs. The interval over prompts (bootstrap of the average over seeds; a prompt keeps all its pairs) holds "
        "for these runs. A verdict needs both intervals on one side of zero, after Bonferroni's correction for the "
        "comparisons of its table.",
        f"- The power was stated before the study, from three earlier seeds: their differences have a standard "
        f"deviation of {_pilot_deviation():.1f} points. Corrected for {comparisons} comparisons, 8 seeds show a true "
        f"difference of {detectable(_pilot_deviation(), 8, level):.1f} points with probability 0.8; 5 seeds show one "
        f"of {detectable(_pilot_deviation(), 5, level):.1f}. This is the power of the interval over seeds; that of "
        "the interval over prompts was not stated before.",
    ]
    if base:
        versions = {name: sorted({unit["versions"][name] for unit in [base, *units]}) for name in base["versions"]}
        named = ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in versions.items())
        lines.append(f"- Base: {base['settings']['base']}; {base['settings']['precision']}. {named}.")
    if units:
        seconds = sum(unit["processor_seconds"] for unit in units)
        each = seconds / len(units) / 60
        where = Counter(unit.get("device", "cpu") for unit in units)
        lines.append(
            f"- Cost so far: {seconds / 3600:.1f} hours of one core, {each:.0f} minutes a unit. Units by device: "
            + ", ".join(f"{device} {count}" for device, count in sorted(where.items()))
            + "."
        )
    return lines


def _held_out(selection) -> str:
    return str(next(iter(selection.values()))["held_out"]["pairs"]) if selection else "the"


def _waiting(rates) -> str:
    missing = [method for method, found in rates.items() if not best_rate(found)]
    chosen = ". " if len(missing) < len(rates) else ""
    return f"{chosen}Not chosen yet: {', '.join(missing)}." if missing else "."


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
        "## Every method on every test set, accuracy in %",
        "",
        f"Values are means over seeds. `length` is the accuracy of choosing the longer response. Differences from "
        f"`none` use the seeds that both have; their intervals are corrected for {len(compared)} comparisons.",
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
                cells = difference_cells(found, len(of_method)).split("|")
                lines.append(row + "|" + "|".join(cells[2:]))
    return [*lines, *_backwards(runs, about)]


def _backwards(runs, about) -> list[str]:
    """Why models may rank hh harmless backwards, if they do."""
    right = 100 * float(np.mean([run["tests"]["hh_harmless"]["accuracy"] for run in runs.values()]))
    if right >= 50:
        return []
    longer = {test: 100 * accuracy(pair_margins(about[test]["chosen"], about[test]["rejected"])) for test in about}
    return [
        "",
        f"On average the runs rank {right:.1f} % of hh harmless's pairs rightly, less than a coin. Its better "
        "response is often the one that declines to help, and the training sets prefer the one that helps: the longer "
        f"response is the better one in {longer['rmb']:.1f} % of RMB's and {longer['pandalm']:.1f} % of PandaLM's "
        f"pairs, and in {longer['hh_harmless']:.1f} % of hh harmless's.",
    ]


def _language(runs, base) -> list[str]:
    lines = [
        "## What the LM head still knows",
        "",
        "Perplexity of HHH's chosen answers"
        + (f"; the base has {base['perplexity']:.2f}" if base else "")
        + ". Values are means with half widths of 95 % intervals over seeds.",
        "",
        "| trained on | " + " | ".join(METHODS) + " |",
        "|---" * (1 + len(METHODS)) + "|",
    ]
    for condition, words in CONDITIONS.items():
        cells = (mean_over_seeds(runs, condition, method, lambda run: run["perplexity"]) for method in METHODS)
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    shown = [method for method in ("none", "sft") if (("rmb", 600, 0.0), method, 0) in runs]
    if base and shown:
        lines += [
            "",
            "Greedy answers of at most 40 tokens, after 600 RMB pairs with seed 0:",
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
    """Accuracy by domain and by style: a pair is easy if its right answer has the more elaborate style."""
    domains, styles = (np.array(about["rm_bench"][name]) for name in ("domains", "styles"))
    sign = np.array([int(style[0]) - int(style[1]) for style in styles])
    groups = {name: domains == name for name in dict.fromkeys(domains)}
    groups |= {"easy": sign > 0, "normal": sign == 0, "hard": sign < 0}
    lines = [
        "## RM-Bench by domain and style",
        "",
        "Accuracy in %, means over seeds. In an easy pair the right answer has the more elaborate style; in a normal "
        "pair both have the same style; in a hard pair the right answer has the plainer style. "
        f"The {len(styles)} pairs are of {len(set(about['rm_bench']['prompts']))} items, which have nine each in "
        "RM-Bench; here they have those that are short. Its domains code, whose answers are long, and math are not "
        "tested.",
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


def _over_optimisation(runs, gold, about) -> list[str]:
    """Whether the gold model judges better than its proxies, without which over-optimisation cannot be seen."""
    proxies = [run for (c, m, _), run in runs.items() if c == ("rmb", 600, 0.0) and m in ("none", "sft")]
    lines = [
        "## Over-optimisation",
        "",
        "An experiment on over-optimisation needs a judge (gold) that is better than the reward models that a policy "
        "is optimised against (proxies).",
    ]
    if gold is None or not proxies:
        return [lines[0], "", f"{lines[2]} The judge is not trained yet."]
    better = {test: wins(gold, test) - np.mean([wins(run, test) for run in proxies], axis=0) for test in TESTS}
    difference = float(np.mean([values.mean() for values in better.values()]))
    interval = interval_over_prompts(better, about, 0.95)
    accuracies = {test: [wins(gold, test).mean(), np.mean([wins(run, test) for run in proxies])] for test in TESTS}
    shown = (
        "It is better, so the experiment can be done."
        if interval[0] > 0
        else "It is not shown to be better, so the experiment cannot be done here and is left out."
    )
    return [
        lines[0],
        "",
        f"{lines[2]} The judge is a Bradley-Terry model that learned from {gold['pairs']} other pairs; the proxies "
        f"are the {len(proxies)} runs of `none` and `sft` on 600 RMB pairs. Averaged over the test sets, the judge is "
        f"more accurate by {difference:+.1f} points (95 % over prompts: {_span(interval)}). {shown}",
        "",
        "| tested on | judge | proxies |",
        "|---|---|---|",
        *(f"| {NAMES[test]} | {judge:.1f} | {theirs:.1f} |" for test, (judge, theirs) in accuracies.items()),
    ]


def _paper(runs) -> list[str]:
    lines = [
        "## Beside the paper",
        "",
        "Accuracy in %. The paper (Tables 1 and 2) trained gemma-2b-it by LoRA on Unified-Feedback. Here the base has "
        "135 million parameters instead of 2.5 billion, there are 33 to 667 times fewer pairs, all weights are "
        "trained, and RMB takes the place of Unified-Feedback.",
        "",
        "| | method | in distribution | HHH |",
        "|---|---|---|---|",
    ]
    for size, rows in PAPER.items():
        lines += [f"| paper, {size} | {method} | {home:.1f} | {hhh:.1f} |" for method, (home, hhh) in rows.items()]
    for condition in (("rmb", 600, 0.0), ("rmb", 1200, 0.0)):
        for method in METHODS:
            cells = [
                mean_over_seeds(runs, condition, method, lambda run, test=test: 100 * run["tests"][test]["accuracy"])
                for test in ("rmb", "hhh")
            ]
            if all(cells):
                lines.append(f"| here, {CONDITIONS[condition]} | {method} | {cells[0]} | {cells[1]} |")
    return lines


def verdicts(results: Path = RESULTS) -> list[str]:
    """The verdicts of the primary comparisons that have two seeds."""
    runs, _, _, about = load(results)
    found = [difference(runs, about, condition, "sft", tests, _level()) for condition, tests in _primary()]
    return [each["verdict"] for each in found if each is not None]


def forest(results: Path = RESULTS) -> dict[str, dict[str, list[float]]]:
    """The primary comparisons that have two seeds: row: method: mean, low and high of the difference over seeds."""
    runs, _, _, about = load(results)
    rows: dict = {}
    for condition, tests in _primary():
        found = difference(runs, about, condition, "sft", tests, _level())
        if found is not None:
            where = "in distribution" if tests == [in_distribution(condition)] else "other test sets"
            rows[f"{CONDITIONS[condition]},\n{where}"] = {"GRM sft": [found["mean"], *found["over_seeds"]]}
    return rows


def draw(results: Path = RESULTS, path: Path = FIGURE) -> None:
    """The difference sft - none in each training condition: every seed, the mean, the interval over seeds."""
    from matplotlib.figure import Figure

    runs, _, _, about = load(results)
    level = _level()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    ticks, widest = [], 8.0
    for condition, words in CONDITIONS.items():
        for tests, where in zip(_primary_tests(condition), ("in distribution", "other test sets"), strict=True):
            y = -len(ticks)
            ticks.append(f"{words}: {where}")
            found = difference(runs, about, condition, "sft", tests, level)
            if found is not None:
                axes.plot(found["each"], [y] * found["seeds"], "o", color="C0", alpha=0.4, markersize=4)
                axes.plot(found["over_seeds"], [y, y], color="C0")
                axes.plot(found["mean"], y, "D", color="C0")
                widest = max(widest, *(1.05 * abs(value) for value in (*found["each"], *found["over_seeds"])))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=[-i for i in range(len(ticks))], yticklabels=ticks)
    axes.set(xlabel="GRM (sft) minus Bradley-Terry (none), accuracy in points", xlim=(-widest, widest))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150, metadata={"Software": None})
