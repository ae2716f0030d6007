"""The findings of a finished run: combined curves, differences from the baseline with intervals, and computed
sentences."""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..metrics import best_of_n_kl, seed_interval, t_central_probability
from .policies import ALGORITHMS, PPO_NEEDS, policy_name
from .proxies import BASELINE, LABELS, METHODS, NAMES, proxy_name
from .settings import SET_NAMES, Settings, read_unit, unit_file, within


LEVEL = 0.95
SAME = "no difference shown"
GRM = [method for method, (_, options) in METHODS.items() if options["regularizer"] != "none"]
# Compared quantities: name in the tables, and the better direction.
QUANTITIES = {"gold": ("gold at the largest n", 1), "drop": ("peak minus gold at the largest n", -1)}
INITIAL = "initial policy"


def collect(output: Path, settings: Settings) -> dict:
    """
    All content of the report, from the files of the units.

    Returns:
        `dict`: `rows`, one for each proxy and set, with its curves; `policies`, one for each policy and set; `wins`;
        `comparisons`; `findings`. Rewards are differences from n = 1, or from the initial policy, in standard
        deviations within prompts of the candidates: gold in those of gold, a proxy in its own.
    """
    sets = {}
    for key in settings.sets:
        unit = read_unit(output, f"candidates-{key}")
        names = ("distinct", "unfinished")
        sets[key] = {"prompts": len(unit["prompts"]), "samples": settings.samples, **{n: unit[n] for n in names}}
        sets[key] |= {"gold_mean": float(np.mean(unit["gold"])), "gold_std": within(unit["gold"])}
    results: dict = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "ns": settings.ns,
        "kl": [best_of_n_kl(n) for n in settings.ns],
        "parameters": read_unit(output, "base")["parameters"],
        "sets": sets,
        "skipped_pairs": sum(read_unit(output, f"pairs-{seed}")["skipped"] for seed in range(settings.seeds)),
        "rows": _proxy_rows(output, settings, sets),
        **_policy_rows(output, settings, sets),
        **_costs(output),
    }
    results["comparisons"] = compare(results)
    results["policy_comparisons"] = compare_policies(results)
    results["findings"] = findings(results)
    return _rounded(results)


def _rounded(value):
    """Floats with five significant digits, to keep files small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _proxy_rows(output, settings, sets):
    rows = []
    for labels, size, method, seed in itertools.product(LABELS, settings.sizes, NAMES, range(settings.seeds)):
        unit = json.loads(unit_file(output, proxy_name(labels, size, method, seed)).read_text(encoding="utf-8"))
        for key, scored in unit["sets"].items():
            gold = (np.array(scored["gold"]) - scored["gold"][0]) / sets[key]["gold_std"]
            proxy = (np.array(scored["proxy"]) - scored["proxy"][0]) / scored["proxy_std"]
            rows.append(
                {
                    **{"labels": labels, "size": size, "method": method, "seed": seed, "set": key},
                    **{"accuracy": scored["accuracy"], "gold": float(gold[-1]), "drop": float(gold.max() - gold[-1])},
                    **{"gold_curve": gold.tolist(), "proxy_curve": proxy.tolist()},
                }
            )
    return rows


def _policy_rows(output, settings, sets):
    """Policies, and how often the answers of one beat those of another: every answer of the one against every answer
    of the other to the same prompt, within a seed."""
    rows, wins, trl = [], [], {}
    for algorithm in ALGORITHMS:
        names = [policy_name(algorithm, proxy, seed) for proxy, seed in _policies(settings)]
        there = [unit_file(output, name).is_file() for name in names]
        if not all(there):
            continue
        last: dict = {}
        for name, (proxy, seed) in zip(names, _policies(settings), strict=True):
            unit = json.loads(unit_file(output, name).read_text(encoding="utf-8"))
            trl.setdefault(algorithm, set()).add(unit["versions"]["trl"])
            for key, measured in unit["sets"].items():
                first, std = measured["points"][0], sets[key]["gold_std"]
                points = [[s, kl, p - first[2], (g - first[3]) / std, n] for s, kl, p, g, n in measured["points"]]
                rows.append({"algorithm": algorithm, "proxy": proxy, "seed": seed, "set": key, "points": points})
                last[proxy, seed, key] = measured["gold"]
        for key, seed in itertools.product(settings.sets, range(settings.seeds)):
            initial = [row[: settings.policy_samples] for row in read_unit(output, f"candidates-{key}")["gold"]]
            last[INITIAL, seed, key] = initial
            for a, b in itertools.combinations([*settings.policy_proxies, INITIAL], 2):
                signs = np.concatenate(
                    [
                        np.sign(np.subtract.outer(x, y)).ravel()
                        for x, y in zip(last[a, seed, key], last[b, seed, key], strict=True)
                    ]
                )
                shares = {n: float((signs == v).mean()) for n, v in (("win", 1), ("tie", 0), ("loss", -1))}
                wins.append({"algorithm": algorithm, "set": key, "a": a, "b": b, "seed": seed, **shares})
    return {"policies": rows, "wins": wins, "policy_trl": {name: sorted(versions) for name, versions in trl.items()}}


def _policies(settings):
    return list(itertools.product(settings.policy_proxies, range(settings.seeds)))


def _costs(output):
    """Seconds of the units by kind, and of the calls that ran them."""
    seconds: dict[str, float] = {}
    cpu = 0.0
    for file in sorted((output / "units").glob("*.json")):
        unit = json.loads(file.read_text(encoding="utf-8"))
        stage = file.stem.split("-")[0]
        seconds[stage] = seconds.get(stage, 0.0) + unit["seconds"]
        cpu += unit["cpu_seconds"]
    calls = output / "calls.jsonl"
    lines = calls.read_text(encoding="utf-8").splitlines() if calls.is_file() else []
    return {"seconds": seconds, "cpu_seconds": cpu, "calls": [json.loads(line) for line in lines]}


# --------------------------------------------------------------------------------------------------------- comparisons


def difference(ours: list[float], theirs: list[float], sign: int) -> dict:
    """
    A paired comparison over seeds.

    Returns:
        `dict`: mean `difference`, `low`, `high` (95 %, Student's t), `p` (two-sided) and `verdict`. If the differences
        are equal in all seeds, there is no interval to judge by, and no difference is shown.
    """
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    ci = seed_interval(paired, LEVEL)
    if ci["std"] < 1e-12:
        return {"difference": ci["mean"], "low": ci["mean"], "high": ci["mean"], "p": 1.0, "verdict": SAME}
    df = len(paired) - 1
    t = abs(ci["mean"]) / (ci["std"] / math.sqrt(len(paired)))
    verdict = SAME
    if ci["low"] > 0 or ci["high"] < 0:
        verdict = "better" if ci["mean"] * sign > 0 else "worse"
    p = 1 - t_central_probability(math.atan(t / math.sqrt(df)), df)
    return {"difference": ci["mean"], "low": ci["low"], "high": ci["high"], "p": p, "verdict": verdict}


def holm(rows: list[dict]) -> None:
    """Marks, in `holm`, the comparisons of a family that stay below 5 % by Holm's step-down rule (Holm, 1979)."""
    going = True
    for place, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        going = going and row["p"] <= (1 - LEVEL) / (len(rows) - place)
        row["holm"] = going


def compare(results: dict) -> list[dict]:
    """Every method against Bradley-Terry, seed by seed: in each cell of labels, size and set, and averaged over the
    sizes (`size` is `"all"`)."""
    settings, by_run = results["settings"], {}
    seeds, sizes = range(settings["seeds"]), settings["sizes"]
    for row in results["rows"]:
        by_run[row["set"], row["labels"], row["size"], row["method"], row["seed"]] = row
    comparisons = []
    for quantity, (_, sign) in QUANTITIES.items():
        for named in ({size: [size] for size in sizes}, {"all": sizes}):
            family = []
            for key, labels, (size, over), method in itertools.product(results["sets"], LABELS, named.items(), NAMES):
                if method == BASELINE:
                    continue
                ours, theirs = (
                    [float(np.mean([by_run[key, labels, z, m, s][quantity] for z in over])) for s in seeds]
                    for m in (method, BASELINE)
                )
                cell = {"quantity": quantity, "set": key, "labels": labels, "size": size, "method": method}
                family.append(cell | difference(ours, theirs, sign))
            holm(family)
            comparisons += family
    return comparisons


def compare_policies(results: dict) -> list[dict]:
    """The gold reward of each last policy against that of the one trained on Bradley-Terry, seed by seed."""
    last = {(r["algorithm"], r["set"], r["proxy"], r["seed"]): r["points"][-1][3] for r in results["policies"]}
    seeds, proxies = range(results["settings"]["seeds"]), results["settings"]["policy_proxies"]
    family = []
    for algorithm, key in itertools.product(results["policy_trl"], results["sets"]):
        for proxy in proxies if BASELINE in proxies else ():
            if proxy != BASELINE:
                ours, theirs = ([last[algorithm, key, p, s] for s in seeds] for p in (proxy, BASELINE))
                cell = {"algorithm": algorithm, "set": key, "proxy": proxy}
                family.append(cell | difference(ours, theirs, sign=1))
    holm(family)
    return family


def _counted(rows: list[dict]) -> str:
    """The number of comparisons of a family for each verdict, before and after the correction."""
    counts = [f"{sum(row['verdict'] == name for row in rows)} {name}" for name in ("better", "worse", SAME)]
    kept = [f"{sum(row['verdict'] == name and row['holm'] for row in rows)} {name}" for name in ("better", "worse")]
    return f"{', '.join(counts)} by uncorrected 95 % intervals; after Holm's correction {' and '.join(kept)}"


# ----------------------------------------------------------------------------------------------------------- sentences


def summary(results: dict, quantity: str, **where) -> dict:
    """Mean over seeds, with its interval, of the rows that fit `where`, averaged within a seed."""
    by_seed: dict[int, list[float]] = {}
    for row in results["rows"]:
        if all(row[name] == value for name, value in where.items()):
            by_seed.setdefault(row["seed"], []).append(row[quantity])
    return seed_interval([float(np.mean(values)) for values in by_seed.values()], LEVEL)


def span(interval: dict, digits: int = 2, name: str = "mean") -> str:
    return f"{interval[name]:+.{digits}f} ({interval['low']:+.{digits}f} to {interval['high']:+.{digits}f})"


def findings(results: dict) -> list[str]:
    """The outcome in sentences (Markdown)."""
    n, cells = results["ns"][-1], [c for c in results["comparisons"] if c["size"] != "all"]
    averages = [c for c in results["comparisons"] if c["size"] == "all"]
    lines = []
    for key, labels in itertools.product(results["sets"], LABELS):
        parts = []
        for size in results["settings"]["sizes"]:
            where = {"set": key, "labels": labels, "size": size, "method": BASELINE}
            gold, drop = summary(results, "gold", **where), summary(results, "drop", **where)
            parts.append(f"{size} pairs: gold {span(gold)}, {drop['mean']:.2f} below its peak")
        lines.append(f"Bradley-Terry, best of {n}, {SET_NAMES[key]}, {LABELS[labels]}: {'; '.join(parts)}.")
    for quantity, (label, _) in QUANTITIES.items():
        parts = []
        for rows, what in ((cells, "in single cells of labels, size and set"), (averages, "averaged over the sizes")):
            family = [row for row in rows if row["quantity"] == quantity]
            parts.append(f"{len(family)} {what}: {_counted(family)}")
        lines.append(f"{label[0].upper() + label[1:]} ({n}), compared with Bradley-Terry, {'; '.join(parts)}.")
    widths = [
        f"{float(np.median([(r['high'] - r['low']) / 2 for r in rows if r['quantity'] == 'gold'])):.2f} {what}"
        for rows, what in ((cells, "in single cells"), (averages, "averaged over the sizes"))
    ]
    lines.append(
        f"The median half width of an interval for the difference in gold is {' and '.join(widths)}: smaller "
        "differences could hardly be shown."
    )
    for verdict in ("better", "worse"):
        named = [
            f"{NAMES[row['method']]}, {SET_NAMES[row['set']]}, {LABELS[row['labels']]}, {span(row, name='difference')}"
            for row in averages
            if row["quantity"] == "gold" and row["verdict"] == verdict
        ]
        what = f"Gold at {n}, averaged over the sizes, is {verdict} than Bradley-Terry's (uncorrected) for"
        lines.append(f"{what} {'; '.join(named) if named else 'no method'}.")
    lines += _where_grm_does_not_help(cells, n)
    lines += _policy_findings(results)
    return lines


def _where_grm_does_not_help(cells, n):
    gold = [row for row in cells if row["method"] in GRM and row["quantity"] == "gold"]

    def named(rows):
        return "; ".join(
            f"{NAMES[r['method']]}, {SET_NAMES[r['set']]}, {LABELS[r['labels']]}, {r['size']}" for r in rows
        )

    worse = [row for row in gold if row["verdict"] == "worse"]
    same = sum(row["verdict"] == SAME for row in gold)
    lines = [
        f"Where GRM does not help: of {len(gold)} cells of a GRM method, {same} show no difference in gold at {n} "
        f"from Bradley-Terry, and {len(worse)} are worse{f' ({named(worse)})' if worse else ''}."
    ]
    groups: dict[tuple, list[str]] = {}
    for row in gold:
        groups.setdefault((row["set"], row["labels"], row["size"]), []).append(row["verdict"])
    none = [where for where, verdicts in groups.items() if "better" not in verdicts]
    if none:
        text = "; ".join(f"{SET_NAMES[key]}, {LABELS[labels]}, {size}" for key, labels, size in none)
        lines.append(f"No GRM method is better than Bradley-Terry at {n} with: {text}.")
    return lines


def _policy_findings(results):
    lines = []
    for algorithm, label in ALGORITHMS.items():
        if algorithm not in results["policy_trl"]:
            lines.append(f"{label} was not run: this environment's TRL does not have it. It needs {PPO_NEEDS}.")
            continue
        for key in results["sets"]:
            parts = []
            for proxy in results["settings"]["policy_proxies"]:
                points = [
                    row["points"]
                    for row in results["policies"]
                    if (row["algorithm"], row["set"], row["proxy"]) == (algorithm, key, proxy)
                ]
                gold = seed_interval([p[-1][3] for p in points], LEVEL)
                drop = float(np.mean([max(x[3] for x in p) - p[-1][3] for p in points]))
                kl = float(np.mean([p[-1][1] for p in points]))
                parts.append(f"{NAMES[proxy]} {span(gold)}, {drop:.2f} below its peak, at KL {kl:.1f}")
            lines.append(f"{label}, {SET_NAMES[key]}, change of gold at the end: {'; '.join(parts)}.")
    if family := results["policy_comparisons"]:
        lines.append(
            f"Gold of the last policies, {len(family)} comparisons with the one trained on Bradley-Terry: "
            f"{_counted(family)}."
        )
    return lines
