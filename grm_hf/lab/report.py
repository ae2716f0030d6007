"""The report of a run: `results.json`, CSV files, one HTML page with its figures inside, and docs/results/lab.md."""

import csv
import html
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np

from ..metrics import seed_interval
from .findings import GRM, INITIAL, QUANTITIES, SAME, collect, findings, span, summary
from .policies import ALGORITHMS
from .proxies import BASELINE, ENSEMBLES, LABELS, NAMES
from .settings import SET_NAMES, Settings


INK = "#0a0b0c"  # colour of text and axes in the figures; the page replaces it by its own
COLOURS = {
    "bt": "#8a8a8a", "margin": "#d4a017", "smoothing": "#b5651d",
    "ensemble_mean": "#3fa34d", "ensemble_min": "#1f8a8a",
    "sft": "#d1495b", "sft_nll": "#e07a5f", "sft_token_mean": "#c77dff", "dpo_noref": "#4a7fd6", "dpo": "#7b5ea7",
}  # fmt: skip
FAMILIES = {
    "baselines": [BASELINE, "margin", "smoothing", *ENSEMBLES],
    "GRM": [BASELINE, *GRM],
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a9d5c; --bad: #d1495b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
svg { max-width: 100%; height: auto; display: block; margin: 1rem 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th { background: var(--soft) } li { margin: .35rem 0 } .better { color: var(--good) } .worse { color: var(--bad) }
.note { background: var(--soft); padding: .6rem 1rem; border-left: 4px solid var(--bad) }
summary { cursor: pointer; margin: .5rem 0 } code { font-size: .9em }
"""


def write(output: Path, settings: Settings) -> dict:
    """Writes the report into the folder of a run whose units are done; returns the content of `results.json`."""
    results = collect(output, settings)
    (output / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    for name, rows in tables(results).items():
        with open(output / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"])
            writer.writeheader()
            writer.writerows(rows)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(
            f"{output}: results and tables are written; for report.html run this again where matplotlib is installed."
        )
        return results
    (output / "report.html").write_text(page(results), encoding="utf-8")
    print("\n".join(results["findings"]))
    print(f"\nreport: {output / 'report.html'}")
    return results


def tables(results: dict) -> dict[str, list[dict]]:
    """The CSV files by name: one row a curve point, a comparison, a policy's point, a pair of policies."""
    curves = [
        {
            **{name: row[name] for name in ("set", "labels", "size", "method", "seed")},
            **{"n": n, "kl": kl, "proxy": proxy, "gold": gold},
        }
        for row in results["rows"]
        for n, kl, proxy, gold in zip(results["ns"], results["kl"], row["proxy_curve"], row["gold_curve"], strict=True)
    ]
    points = [
        {
            **{name: row[name] for name in ("algorithm", "set", "proxy", "seed")},
            **dict(zip(("step", "kl", "proxy_reward", "gold", "tokens"), point, strict=True)),
        }
        for row in results["policies"]
        for point in row["points"]
    ]
    return {
        "best_of_n": curves,
        "best_of_n_comparisons": results["comparisons"],
        "policies": points,
        "policies_comparisons": results["policy_comparisons"],
        "policies_wins": results["wins"],
    }


# -------------------------------------------------------------------------------------------------------------- tables


def best_of_n_table(results: dict, sizes: bool) -> list[list[str]]:
    """Accuracy, gold and drop of every method, against the baseline; one row for each size, or averaged over them."""
    comparisons = {(c["quantity"], c["set"], c["labels"], c["size"], c["method"]): c for c in results["comparisons"]}
    n = results["ns"][-1]
    head = ["prompts", "labels", "pairs", "proxy", "accuracy, %", f"gold at {n}", "minus BT", "verdict", "below peak"]
    rows = [[*head, "minus BT", "verdict"]]
    for key, labels, size, method in itertools.product(
        results["sets"], LABELS, results["settings"]["sizes"] if sizes else ["all"], NAMES
    ):
        where = {"set": key, "labels": labels, "method": method} | ({"size": size} if sizes else {})
        accuracy, gold, drop = (summary(results, name, **where) for name in ("accuracy", "gold", "drop"))
        row = [SET_NAMES[key], LABELS[labels], str(size), NAMES[method], f"{100 * accuracy['mean']:.1f}", span(gold)]
        for quantity in QUANTITIES:
            if quantity == "drop":
                row.append(f"{drop['mean']:.2f}")
            if method == BASELINE:
                row += ["", "baseline"]
            else:
                compared = comparisons[quantity, key, labels, size, method]
                row += [span(compared, name="difference"), _verdict(compared)]
        rows.append(row)
    return rows


def _verdict(compared):
    return compared["verdict"] + (" (Holm too)" if compared["holm"] else "")


def policy_table(results: dict) -> list[list[str]]:
    """The last policies: divergence, rewards, difference from the baseline."""
    comparisons = {(c["algorithm"], c["set"], c["proxy"]): c for c in results["policy_comparisons"]}
    rows = [["", "prompts", "proxy", "KL", "proxy reward", "gold", "below peak", "tokens", "gold minus BT", "verdict"]]
    for algorithm, key in itertools.product(results["policy_trl"], results["sets"]):
        for proxy in results["settings"]["policy_proxies"]:
            points = _points(results, algorithm, key, proxy)
            last = points[:, -1]
            kl, reward, gold = (seed_interval(last[:, i].tolist()) for i in (1, 2, 3))
            drop = points[:, :, 3].max(1) - last[:, 3]
            compared = comparisons.get((algorithm, key, proxy))
            rows.append(
                [ALGORITHMS[algorithm], SET_NAMES[key], NAMES[proxy], f"{kl['mean']:.2f}", span(reward), span(gold)]
                + [f"{drop.mean():.2f}", f"{last[:, 4].mean():.1f}"]
                + ([span(compared, name="difference"), _verdict(compared)] if compared else ["", "baseline"])
            )
    return rows


def wins_table(results: dict) -> list[list[str]]:
    """Win, tie and loss of one policy's answers against another's by gold, mean over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in results["wins"]:
        groups.setdefault((row["algorithm"], row["set"], row["a"], row["b"]), []).append(row)
    rows = [["", "prompts", "policy trained on", "against", "win, %", "tie, %", "loss, %", "win minus loss, points"]]
    for (algorithm, key, a, b), matches in groups.items():
        shares = [f"{100 * np.mean([row[name] for row in matches]):.1f}" for name in ("win", "tie", "loss")]
        net = seed_interval([100 * (row["win"] - row["loss"]) for row in matches])
        names = [NAMES.get(name, INITIAL) for name in (a, b)]
        rows.append([ALGORITHMS[algorithm], SET_NAMES[key], *names, *shares, span(net, 1)])
    return rows


def _points(results, algorithm, key, proxy) -> np.ndarray:
    """`(seeds, evaluations + 1, 5)`."""
    return np.array(
        [
            row["points"]
            for row in results["policies"]
            if (row["algorithm"], row["set"], row["proxy"]) == (algorithm, key, proxy)
        ]
    )


# ---------------------------------------------------------------------------------------------------------------- text


def about(results: dict) -> list[str]:
    """The measurements and their conditions (Markdown)."""
    s = results["settings"]
    own = [f"{name} `{s[name]}`" for name in ("model", "prompts", "eval_prompts", "gold") if s[name]]
    world = ", ".join(own)
    if not s["model"]:
        world = f"The world of docs/demo_world.md{' with ' if own else ''}{world}"
    units = ", ".join(f"{seconds:.0f} s {stage}" for stage, seconds in results["seconds"].items())
    calls = results["calls"]
    wall = sum(call["seconds"] for call in calls)
    versions = "; ".join(
        f"{ALGORITHMS[name]} with TRL {', '.join(trl)}" for name, trl in results["policy_trl"].items()
    )
    sets = "; ".join(
        f"{SET_NAMES[key]}: {chosen['prompts']} prompts, {chosen['samples']} answers each "
        f"({100 * chosen['distinct']:.0f} % distinct, {100 * chosen['unfinished']:.1f} % unfinished), "
        f"gold {chosen['gold_mean']:.2f} on average, standard deviation within prompts {chosen['gold_std']:.2f}"
        for key, chosen in results["sets"].items()
    )
    return [
        f"{world}. The policy is also the base of the proxies: {results['parameters']:,} parameters, sampled at "
        "temperature 1.",
        f"All proxies are measured on the same answers. {sets}.",
        "A pair for the proxies is two sampled answers to a prompt, ordered by gold (clean) or with "
        f"{100 * s['flipped']:.0f} % of the labels turned around. Training takes {', '.join(map(str, s['sizes']))} "
        f"pairs, {s['epochs']} epochs, learning rate {s['learning_rate']:g}, batches of {s['batch_size']}. "
        f"{results['skipped_pairs']} pairs of equal gold or without text were not used.",
        f"{s['seeds']} seeds. Each draws its own answers, pairs, labels, heads and orders. Seeds share only the base, "
        f"the prompts and the candidate answers. An ensemble has {s['members']} Bradley-Terry models of its seed's "
        "pairs, each with its own head and order.",
        "Rewards are differences from n = 1 (for policies: from the initial policy), in standard deviations within "
        "prompts: gold in those of gold, a best-of-n proxy in its own. Proxies of policies are standardised over all "
        "answers.",
        "Intervals are 95 % by Student's t over seeds; differences are paired by seed. They hold for this base, these "
        "prompts and these answers. A peak is chosen after the fact, so “below peak” is never negative, and chance "
        "alone makes it positive.",
        f"PPO and GRPO use proxies of {s['policy_size']} pairs with {LABELS[s['policy_labels']]}, "
        f"{s['policy_steps']} steps of {s['policy_batch']} answers, learning rate {s['policy_learning_rate']:g} and "
        f"no penalty on the divergence. They are measured with {s['policy_samples']} answers to each prompt. KL is "
        f"the divergence of the whole distributions at each token of the policy's answers, summed. {versions}.",
        f"Cost: {results['cpu_seconds'] / 60:.1f} minutes of processor time in the units, up to "
        f"{max((call['workers'] for call in calls), default=0)} at a time; {wall / 60:.1f} minutes of wall time "
        f"beside other work of the machine (by kind of unit: {units}).",
    ]


def markdown(results: dict) -> str:
    """docs/results/lab.md."""
    lines = [
        "# Over-optimisation in the world whose true reward is known",
        "",
        "`make lab` runs the study and `python benchmarks/lab.py` keeps its results. `python benchmarks/results.py` "
        "writes this page. [overoptimization.md](../overoptimization.md) says what is measured and why.",
        "",
        "## Findings",
        "",
        *(f"- {line}" for line in findings(results)),
        "",
        "## What was measured",
        "",
        *(f"- {line}" for line in about(results)),
        "",
        "## Best-of-n, averaged over the sizes",
        "",
        *_markdown(best_of_n_table(results, sizes=False)),
        "",
        "## Best-of-n, each size",
        "",
        *_markdown(best_of_n_table(results, sizes=True)),
    ]
    if results["policies"]:
        lines += ["", "## Policies", "", *_markdown(policy_table(results))]
        lines += ["", "## Policies against each other, by gold", "", *_markdown(wins_table(results))]
    return "\n".join([*lines, ""])


def _markdown(rows):
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


# ---------------------------------------------------------------------------------------------------------------- page


def page(results: dict) -> str:
    """The HTML report: findings, figures, tables."""
    s = results["settings"]
    quick = s["pretrain_steps"] < Settings().pretrain_steps and not s["model"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Over-optimisation</title><style>{STYLE}</style>",
        "<h1>Over-optimisation: proxies against a known gold reward</h1>",
        "<p class=note>A quick run: it shows that everything works, not which method is better.</p>" * quick,
        f"<h2>Findings</h2>{_list(results['findings'])}",
        f"<h2>What was measured</h2>{_list(about(results))}",
        "<p>Every number: <code>results.json</code>; tables beside this page: "
        + ", ".join(f"<a href='{name}.csv'>{name}.csv</a>" for name in tables(results))
        + ".</p>",
        "<h2>Best-of-n: differences from Bradley-Terry</h2>",
        f"<p>Gold at n = {results['ns'][-1]}, averaged over the sizes; 95 % intervals over seeds.</p>",
        _forest(results),
    ]
    for key, labels in itertools.product(results["sets"], LABELS):
        parts += [f"<h2>Best-of-n: {SET_NAMES[key]}, {LABELS[labels]}</h2>", _curves(results, key, labels)]
    parts += ["<h2>Best-of-n: tables</h2>", _table(best_of_n_table(results, sizes=False))]
    parts.append(f"<details><summary>Each size</summary>{_table(best_of_n_table(results, sizes=True))}</details>")
    for algorithm in results["policy_trl"]:
        parts += [f"<h2>{ALGORITHMS[algorithm]}: rewards over KL</h2>", _paths(results, algorithm)]
    if results["policies"]:
        parts += ["<h2>Policies: tables</h2>", _table(policy_table(results))]
        parts += ["<h3>Against each other, by gold</h3>", _table(wins_table(results))]
    return "\n".join(parts) + "\n"


def _list(lines):
    return "<ul>" + "".join(f"<li>{_code(line)}</li>" for line in lines) + "</ul>"


def _code(text):
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False))


def _table(rows):
    def cell(text):
        verdict = next((name for name in ("better", "worse") if text.startswith(name)), "")
        return f"<td class='{verdict}'>{html.escape(text)}</td>" if verdict else f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows[1:])
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


# ------------------------------------------------------------------------------------------------------------- figures


def _figure(size, rows, columns, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _svg(figure, axes, name):
    """The figure as SVG for the page, in the page's colour of text."""
    import matplotlib

    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.tick_params(colors=INK, labelsize=8)
        for part in (ax.title, ax.xaxis.label, ax.yaxis.label):
            part.set_color(INK)
            part.set_fontsize(9)
        for spine in ax.spines.values():
            spine.set_color(INK)
            spine.set_alpha(0.4)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(INK)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and its interval, at each point: `(points,)` each, from `(seeds, points)`."""
    intervals = [seed_interval(column.tolist()) for column in values.T]
    mean, low, high = (np.array([point[name] for point in intervals]) for name in ("mean", "low", "high"))
    return mean, low, high


def _curves(results, key, labels):
    sizes = results["settings"]["sizes"]
    figure, axes = _figure((12, 10.5), 4, len(sizes), sharex=True, sharey="row")
    grid = list(itertools.product(("gold", "proxy"), FAMILIES))
    for row, (what, family) in enumerate(grid):
        for ax, size in zip(axes[row], sizes, strict=True):
            for method in FAMILIES[family]:
                where = {"set": key, "labels": labels, "size": size, "method": method}
                curves = np.array(
                    [r[f"{what}_curve"] for r in results["rows"] if all(r[k] == v for k, v in where.items())]
                )
                mean, low, high = _band(curves)
                width = 2.4 if method == BASELINE else 1.6
                ax.plot(results["kl"], mean, color=COLOURS[method], lw=width, label=NAMES[method])
                ax.fill_between(results["kl"], low, high, color=COLOURS[method], alpha=0.12, lw=0)
            ax.axhline(0, color=INK, lw=0.6, alpha=0.5)
            if row == 0:
                ax.set_title(f"{size} pairs")
        axes[row, 0].set_ylabel(f"{what}, {family} (standard deviations)")
    for ax in axes[-1]:
        ax.set_xlabel("KL(n) = log n - (n - 1) / n")
    _legend(figure, axes, NAMES)
    return _svg(figure, axes, f"curves-{key}-{labels}")


def _legend(figure, axes, order):
    shown: dict = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    labels = [label for label in dict(order).values() if label in shown]
    figure.legend(
        [shown[label] for label in labels], labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9
    )


def _forest(results):
    sets = list(results["sets"])
    figure, axes = _figure((12, 3.2 * len(sets)), len(sets), len(LABELS), sharex=True, sharey=True)
    methods = [method for method in NAMES if method != BASELINE]
    for ax, (key, labels) in zip(axes.flat, itertools.product(sets, LABELS), strict=True):
        for place, method in enumerate(reversed(methods)):
            (row,) = (
                c
                for c in results["comparisons"]
                if (c["quantity"], c["size"], c["set"], c["labels"], c["method"])
                == ("gold", "all", key, labels, method)
            )
            shown = row["verdict"] != SAME
            ax.plot([row["low"], row["high"]], [place, place], color=COLOURS[method], lw=2)
            ax.plot(
                row["difference"], place, "o", color=COLOURS[method], ms=7, mfc=COLOURS[method] if shown else "none"
            )
        ax.axvline(0, color=INK, lw=0.8)
        ax.set_yticks(range(len(methods)), [NAMES[method] for method in reversed(methods)])
        ax.set_title(f"{SET_NAMES[key]}, {LABELS[labels]} (filled: interval without 0, uncorrected)")
        ax.set_xlabel("gold minus Bradley-Terry's (standard deviations)")
    return _svg(figure, axes, "forest")


def _paths(results, algorithm):
    sets = list(results["sets"])
    figure, axes = _figure((12, 8), 2, len(sets), sharex="col", sharey="row")
    for column, key in enumerate(sets):
        for row, (index, what) in enumerate(((3, "gold"), (2, "proxy reward"))):
            ax = axes[row, column]
            for proxy in results["settings"]["policy_proxies"]:
                points = _points(results, algorithm, key, proxy)
                for path in points:
                    ax.plot(path[:, 1], path[:, index], color=COLOURS[proxy], lw=0.7, alpha=0.4)
                mean, low, high = _band(points[:, :, index])
                kl = points[:, :, 1].mean(0)
                ax.plot(kl, mean, "o-", ms=3, color=COLOURS[proxy], lw=2, label=NAMES[proxy])
                ax.fill_between(kl, low, high, color=COLOURS[proxy], alpha=0.12, lw=0)
            ax.axhline(0, color=INK, lw=0.6, alpha=0.5)
            ax.set_ylabel(what if column == 0 else "")
        axes[0, column].set_title(
            f"{SET_NAMES[key]} (thin: seeds; thick: mean over seeds at equal steps, with its band)"
        )
        axes[1, column].set_xlabel("KL from the initial policy")
    _legend(figure, axes, NAMES)
    return _svg(figure, axes, f"paths-{algorithm}")
