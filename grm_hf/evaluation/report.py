"""Results as a table in the terminal, as `report.html` (one file, which loads nothing), CSV and JSON."""

import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics import reliability
from .examples import text_of
from .rmbench import STYLES
from .run import Results
from .signals import about, sentences
from .signals import table as signals_table
from .suites import SUITES


WORST = 10  # rows shown with their texts
CHARACTERS = 1200  # of a text that is shown
POINTS = 2000  # of a scatter
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _interval(summary: dict[str, float]) -> str:
    if "score_low" not in summary:
        return ""
    return f"{percent(summary['score_low'])} to {percent(summary['score_high'])}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _detail_names(results: Results) -> list[str]:
    """Figures of a suite for a short table."""
    elsewhere = {"score", "score_low", "score_high", "n", "complete"}
    long = ("pairs/", "cell/", "best_of_", "auc/")
    names = [name for name in results.summary if name not in elsewhere and not name.startswith(long)]
    return [name for name in names if name.count("/") < 2]


def terminal(
    runs: Sequence[Results], comparisons: Sequence[dict[str, Any]] = (), signals: Sequence[dict[str, Any]] = ()
) -> str:
    """The output of `grm eval`: for each suite the headline and its interval, then the suite's own figures, then what
    signals said ([`SignalReport.summary`])."""
    lines = [["suite", "model", "score", "95 % interval", "rows", "tied pairs", ""]]
    for results in runs:
        summary = results.summary
        lines.append(
            [
                results.suite,
                results.model,
                percent(summary["score"]),
                _interval(summary),
                f"{int(summary['n'])}",
                f"{int(summary['pairs/ties'])} of {int(summary['pairs/n'])}",
                "" if results.is_complete or not SUITES[results.suite].parts else "a part of the suite",
            ]
        )
    blocks = [_table(lines)]
    for results in runs:
        names = _detail_names(results)
        if names:
            rows = [[name, percent(results.summary[name])] for name in names if name != "human_ties"]
            blocks.append(f"{results.suite} ({results.model})\n" + _table(rows))
        for reason, count in results.skipped.items():
            blocks.append(f"{results.suite}: {count} rows left out by the suite's rules: {reason}")
        if results.truncated:
            blocks.append(f"{results.suite}: {results.truncated} responses were longer than {results.model} can read.")
    blocks += [sentence(comparison) for comparison in comparisons]
    return "\n\n".join([*blocks, *map(signals_text, signals)])


def signals_text(summary: dict[str, Any]) -> str:
    """A summary of signals ([`SignalReport.summary`]) in words."""
    return "\n".join([about(summary), _table(signals_table(summary)), *sentences(summary)])


def sentence(comparison: dict[str, Any]) -> str:
    """A comparison in words."""
    c = comparison
    return (
        f"{c['suite']}: {c['model_a']} {percent(c['score_a'])}, {c['model_b']} {percent(c['score_b'])}; difference "
        f"{100 * c['difference']:+.2f} (95 % interval {100 * c['low']:+.2f} to {100 * c['high']:+.2f}, paired): "
        f"{c['verdict']}"
    )


def suites_table() -> str:
    """The table of docs/evaluation.md."""
    head = ["suite", "measures", "rows", "headline", "two equal scores", "licence of the data", "command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, suite in SUITES.items():
        rows = " or ".join(f"{count:,}" for count in suite.rows)
        title = f"[{name}]({suite.url})" if suite.url else name
        data = f"--suite {name}" + ("" if suite.hub else f" --data data/{name}")
        if not suite.url:
            data = "--data my_pairs.jsonl"
        cells = [title, suite.measures, rows, suite.headline, suite.ties, suite.licence, f"`grm eval MODEL {data}`"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_csv(runs: Sequence[Results]) -> str:
    """One line for each figure: suite, model, name, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["suite", "model", "figure", "value"])
    for results in runs:
        writer.writerows([results.suite, results.model, name, value] for name, value in results.summary.items())
    return text.getvalue()


def write_report(
    folder: str | Path,
    runs: Sequence[Results],
    comparisons: Sequence[dict[str, Any]] = (),
    signals: Sequence[dict[str, Any]] = (),
) -> None:
    """Write `report.html`, `results.csv`, `results.json`, for each suite of the first model `<suite>.json`, and
    `signals.json` if there are any."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(as_csv(runs), encoding="utf-8")
    summaries = [{"suite": r.suite, "model": r.model, "summary": r.summary, "skipped": r.skipped} for r in runs]
    content = {"results": summaries, "comparisons": list(comparisons)}
    (folder / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(runs, comparisons, signals), encoding="utf-8")
    if signals:
        (folder / "signals.json").write_text(json.dumps(list(signals), indent=1) + "\n", encoding="utf-8")
    done: set[str] = set()
    for results in runs:
        if results.suite not in done:
            (folder / f"{results.suite}.json").write_text(results.to_json() + "\n", encoding="utf-8")
            done.add(results.suite)


def card_rows(runs: Sequence[Results]) -> tuple[list[dict[str, Any]], list[str]]:
    """Complete results for a model card ([`grm_hf.hub.card.add_results`]), and the suites that were run in part, whose
    figures do not go onto a card."""
    whole = [results for results in runs if results.is_complete and results.suite != "own"]
    rows = [
        {
            "suite": results.suite,
            "dataset": SUITES[results.suite].hub[-1].repo if SUITES[results.suite].hub else None,
            "value": round(results.summary["score"], 4),
            "headline": SUITES[results.suite].headline.replace("`", ""),
        }
        for results in whole
    ]
    return rows, [results.suite for results in runs if results not in whole]


# ---------------------------------------------------------------------------------------------------------------- html


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #e2e8f0 }
td { text-align: right } td:first-child, th:first-child, td.text { text-align: left } th { text-align: right }
svg { max-width: 100%; height: auto }
pre { white-space: pre-wrap; background: #f7fafc; padding: .6rem; margin: .3rem 0 }
details { margin: .5rem 0 } .right { border-left: 4px solid #2f855a } .wrong { border-left: 4px solid #c53030 }
figure { margin: 1rem 0 } figcaption { color: #4a5568 }
"""


def page(
    runs: Sequence[Results], comparisons: Sequence[dict[str, Any]] = (), signals: Sequence[dict[str, Any]] = ()
) -> str:
    """`report.html`."""
    models = list(dict.fromkeys(results.model for results in runs))
    body = [f"<h1>{_e(', '.join(models))}</h1>", bars(runs), _overview(runs)]
    if comparisons:
        body.append("<h2>Comparison</h2>" + "".join(f"<p>{_e(sentence(c))}.</p>" for c in comparisons))
    body += [_suite(results) for results in runs]
    if signals:
        body.append("<h2>What the LM head says</h2>" + "".join(map(_signals, signals)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation of reward models</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _e(value) -> str:
    return html.escape(str(value))


def _rows(lines: Sequence[Sequence[Any]]) -> str:
    head, *rest = lines
    cells = "".join(f"<th>{_e(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in line) + "</tr>" for line in rest)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _overview(runs):
    lines = [["suite", "model", "score", "95 % interval", "rows", "tied pairs"]]
    for results in runs:
        s = results.summary
        part = "" if results.is_complete or not SUITES[results.suite].parts else " (a part of the suite)"
        lines.append(
            [results.suite, results.model, percent(s["score"]), _interval(s), f"{int(s['n'])}{part}",
             f"{int(s['pairs/ties'])} of {int(s['pairs/n'])}"]
        )
    return _rows(lines)


def _suite(results: Results) -> str:
    of = SUITES[results.suite]
    details = [["figure", "value"], *([name, percent(results.summary[name])] for name in _detail_names(results))]
    parts = [
        f"<h2>{_e(results.suite)} <small>{_e(results.model)}</small></h2>",
        f"<p>{_e(of.measures)}. Headline: {_e(of.headline.replace('`', ''))}. Ties: {_e(of.ties)}.</p>",
        _rows(details) if len(details) > 1 else "",
        matrix(results) if "cell/0/0" in results.summary else "",
        curve(results),
        scatter(results),
        worst(results),
    ]
    return "\n".join(part for part in parts if part)


def _signals(summary: dict[str, Any]) -> str:
    """The signals on the pairs of a suite."""
    paragraphs = "".join(f"<p>{_e(line)}.</p>" for line in sentences(summary))
    curves = risk_coverage(summary) if "risk_coverage" in summary else ""
    return f"<p>{_e(about(summary))}.</p>{_rows(signals_table(summary))}{paragraphs}{curves}"


def _svg(width: int, height: int, parts: Sequence[str], caption: str) -> str:
    drawing = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{_e(caption)}" '
        f'font-size="12" font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )
    return f"<figure>{drawing}<figcaption>{_e(caption)}</figcaption></figure>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_e(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#718096", dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'


def bars(runs: Sequence[Results]) -> str:
    """A bar with its interval for each suite and model."""
    left, width, step = 330, 420, 22
    models = list(dict.fromkeys(results.model for results in runs))
    parts = []
    for tick in range(0, 101, 25):
        x = left + width * tick / 100
        parts += [_line(x, 0, x, step * len(runs), "#e2e8f0"), _text(x, step * len(runs) + 14, f"{tick} %", "middle")]
    for number, results in enumerate(runs):
        y, summary = step * number, results.summary
        colour = COLOURS[models.index(results.model) % len(COLOURS)]
        label = results.suite if len(models) == 1 else f"{results.suite}, {results.model}"
        size = width * min(1.0, max(0.0, summary["score"]))
        parts.append(_text(left - 8, y + 15, label[-48:], "end"))
        parts.append(f'<rect x="{left}" y="{y + 4}" width="{size:.1f}" height="14" fill="{colour}"/>')
        if "score_low" in summary:
            low, high = (left + width * min(1, max(0, summary[k])) for k in ("score_low", "score_high"))
            parts += [_line(low, y + 11, high, y + 11, "#1a202c")]
            parts += [_line(x, y + 7, x, y + 15, "#1a202c") for x in (low, high)]
        parts.append(_text(left + width + 10, y + 15, percent(summary["score"])))
    return _svg(left + width + 70, step * len(runs) + 20, parts, "Headline of each suite, with its 95 % interval")


def matrix(results: Results) -> str:
    """RM-Bench: how often a right answer in one style is above a wrong one in another."""
    names, size, left, top = ("concise", "detailed", "markdown"), 80, 100, 30
    parts = []
    for i in range(STYLES):
        parts.append(_text(left - 8, top + size * i + size / 2, f"right: {names[i]}"[-18:], "end"))
        parts.append(_text(left + size * i + size / 2, top - 8, f"wrong: {names[i]}"[-15:], "middle"))
        for j in range(STYLES):
            value = results.summary[f"cell/{i}/{j}"]
            x, y, shade = left + size * j, top + size * i, 60 - 40 * value
            colour = f"hsl(212, 65%, {35 + shade:.0f}%)"
            parts.append(f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{colour}"/>')
            parts.append(_text(x + size / 2, y + size / 2 + 4, percent(value), "middle"))
    width = left + size * STYLES + 10
    caption = "Accuracy by style, mean over the domains. Hard: upper right; easy: lower left"
    return _svg(width + 60, top + size * STYLES + 10, parts, caption)


def _pairs(results: Results) -> list[tuple[float, int]]:
    """Margin and difference of lengths (in characters) of each pair."""
    return [
        (row[i] - row[j], example.length(i) - example.length(j))
        for example, row in zip(results.examples, results.scores, strict=True)
        for i, j in example.pairs
    ]


def curve(results: Results) -> str:
    """Accuracy against confidence, over all pairs."""
    rows = reliability([margin for margin, _ in _pairs(results)])
    left, top, size = 50, 10, 240

    def place(x: float, y: float) -> tuple[float, float]:
        return left + size * (x - 0.5) * 2, top + size * (1 - y)

    corner, end = place(0.5, 0.5), place(1, 1)
    parts = [
        f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#718096"/>',
        _line(*corner, *end, dashed=True),
        _text(left, top + size + 16, "0.5"),
        _text(left + size, top + size + 16, "1", "end"),
        _text(left + size / 2, top + size + 16, "confidence", "middle"),
        _text(left - 6, top + 10, "1", "end"),
        _text(left - 6, top + size, "0", "end"),
    ]
    total = sum(row["n"] for row in rows)
    points = [(*place(row["confidence"], row["accuracy"]), 3 + 9 * (row["n"] / total) ** 0.5) for row in rows]
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{COLOURS[0]}"/>' for x, y, r in points]
    caption = (
        f"Calibration of pairs: expected calibration error {results.summary['pairs/ece']:.3f}. On the dashed line, "
        "confidence and accuracy are equal; a larger point stands for more pairs"
    )
    return _svg(left + size + 30, top + size + 24, parts, caption)


def risk_coverage(summary: dict[str, Any]) -> str:
    """The share of wrong pairs among the most certain ones, by each confidence."""
    left, top, width, height = 50, 10, 420, 240
    curves = summary["risk_coverage"]
    highest = max(0.01, *(risk for curve in curves.values() for risk in curve["risk"]))
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#718096"/>',
        _text(left + width / 2, top + height + 16, "pairs that are answered, the most certain first", "middle"),
        _text(left + width, top + height + 16, "all", "end"),
        _text(left - 6, top + 12, f"{100 * highest:.0f} %", "end"),
        _text(left - 6, top + height, "0", "end"),
    ]
    for number, (name, curve) in enumerate(curves.items()):
        points = " ".join(
            f"{left + width * coverage:.1f},{top + height * (1 - risk / highest):.1f}"
            for coverage, risk in zip(curve["coverage"], curve["risk"], strict=True)
        )
        colour, dash = COLOURS[number], "" if number == 0 else f' stroke-dasharray="{8 // number} 4"'
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        y = top + 14 + 18 * number
        line = f'<line x1="{left + width + 15}" y1="{y}" x2="{left + width + 45}" y2="{y}" stroke="{colour}"'
        parts += [f'{line} stroke-width="2"{dash}/>', _text(left + width + 52, y + 4, name)]
    return _svg(left + width + 140, top + height + 24, parts, "Wrong pairs among those answered, by each confidence")


def scatter(results: Results) -> str:
    """Margin against difference of length."""
    pairs = _pairs(results)
    pairs = pairs[:: -(-len(pairs) // POINTS)]
    left, top, width, height = 50, 10, 420, 240
    reach = max(max(abs(margin) for margin, _ in pairs), 1e-9)
    longest = max(max(abs(extra) for _, extra in pairs), 1)
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#718096"/>',
        _line(left, top + height / 2, left + width, top + height / 2, dashed=True),
        _line(left + width / 2, top, left + width / 2, top + height, dashed=True),
        _text(left + width / 2, top + height + 16, f"right response longer, in characters (to {longest})", "middle"),
        _text(left - 6, top + 12, f"{reach:.3g}", "end"),
        _text(left - 6, top + height, f"{-reach:.3g}", "end"),
    ]
    for margin, extra in pairs:
        x, y = left + width / 2 * (1 + extra / longest), top + height / 2 * (1 - margin / reach)
        colour = COLOURS[2] if margin > 0 else "#c53030"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}" fill-opacity="0.5"/>')
    bias = [
        f"{percent(results.summary[f'pairs/accuracy_chosen_{kind}'])} where the right response is {kind}"
        for kind in ("longer", "shorter")
        if f"pairs/accuracy_chosen_{kind}" in results.summary
    ]
    caption = "Margin and difference of length" + (f"; accuracy {', '.join(bias)}" if bias else "")
    return _svg(left + width + 20, top + height + 24, parts, caption)


def worst(results: Results) -> str:
    """The rows with the most negative margins, with their texts."""
    wrong = []
    for number, (example, row) in enumerate(zip(results.examples, results.scores, strict=True)):
        margin, i, j = min((row[i] - row[j], i, j) for i, j in example.pairs) if example.pairs else (1.0, 0, 0)
        if margin <= 0:
            wrong.append((margin, number, i, j))
    blocks = []
    for margin, number, i, j in sorted(wrong)[:WORST]:
        example = results.examples[number]
        scores = results.scores[number]
        prompt = f"<pre>{_shown(example.prompt)}</pre>" if example.prompt else ""
        blocks.append(
            f"<details><summary>{_e(example.id or number)} {_e(example.subset)}: margin {margin:.3f}</summary>{prompt}"
            f'<pre class="right">right, {scores[i]:.3f}\n{_shown(example.responses[i])}</pre>'
            f'<pre class="wrong">wrong, {scores[j]:.3f}\n{_shown(example.responses[j])}</pre></details>'
        )
    return f"<h3>Worst rows ({len(wrong)} in all)</h3>" + "".join(blocks) if blocks else ""


def _shown(text) -> str:
    """A prompt or a response, escaped; messages with their roles."""
    if not isinstance(text, str):
        text = "\n\n".join(f"{message.get('role')}: {text_of([message])}" for message in text)
    return _e(text if len(text) <= CHARACTERS else text[:CHARACTERS] + " ...")
