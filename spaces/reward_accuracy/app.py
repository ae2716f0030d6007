"""The page of the metric: rewards of preference pairs in, as CSV; accuracy with intervals, calibration, subsets out.

    python app.py

`metrics.py` does the mathematics; here a table is read, with errors that name the line, and a report is drawn as HTML.
Whatever a visitor typed is escaped before it is shown.
"""

import csv
import html
import io
import math
import random

import gradio as gr
import metrics


MAX_ROWS = 50_000
MAX_SUBSETS = 100
MAX_BYTES = 5_000_000
NUMBERS = ("chosen", "rejected", "chosen_length", "rejected_length")
LABELS = ("prompt", "subset")
TIES = {"0.5": 0.5, "0": 0, "1": 1, "drop": "drop"}

CSS = """
.report { color: var(--body-text-color); }
.report h2 { margin: 0 0 .4rem; font-size: 1.15rem; }
.report table { width: 100%; border-collapse: collapse; margin: .6rem 0 1rem; }
.report table, .report tr, .report td { border: 0; }
.report td { padding: .25rem .4rem .25rem 0; border-bottom: 1px solid var(--border-color-primary); vertical-align: top;
  overflow-wrap: anywhere; }
.report td:first-child { min-width: 7.5rem; }
.report td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.report .quiet { opacity: .75; font-size: .9rem; }
.report svg { width: 100%; height: auto; max-width: 28rem; display: block; margin-bottom: .8rem; }
.report svg text { fill: currentColor; font-size: 15px; }
.report .problem { border-left: 4px solid #d9480f; padding: .5rem .8rem; }
"""

MEANING = {
    "accuracy": "share of pairs in which the chosen response has the higher reward",
    "tie_rate": "share of pairs with two equal rewards",
    "mean_margin": "chosen minus rejected, in reward units",
    "median_margin": "the same, less moved by a few large ones",
    "log_loss": "nats; a coin has 0.6931",
    "brier": "squared error of the probability; a coin has 0.25",
    "ece": "distance between confidence and accuracy; 0 is calibrated",
    "temperature": "divides the rewards so that the log loss is lowest on these pairs",
    "subset_mean": "plain mean of the subsets",
    "section_mean": "plain mean of the sections",
    "chosen_longer_rate": "accuracy of the rule “the longer one”",
    "accuracy_chosen_longer": "where the chosen response is the longer one",
    "accuracy_chosen_shorter": "where it is the shorter one",
    "length_pearson": "correlation of reward and length",
    "length_spearman": "the same, of ranks",
    "length_pearson_within": "the same, within each pair",
}


# ------------------------------------------------------------------------------------------------------------- reading


def read_table(text: str) -> tuple[dict[str, list], list[str]]:
    """Columns of a CSV table, checked, and the names of the columns that are not used."""
    lines = text.lstrip("\ufeff").strip()
    if not lines:
        raise ValueError("There is nothing to measure yet: paste a table or upload a file.")
    header_line = lines.splitlines()[0]
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(lines), delimiter=delimiter)
    header = [name.strip().lower() for name in next(reader)]
    for name in ("chosen", "rejected"):
        if header.count(name) != 1:
            raise ValueError(
                f"The first line must name the columns, with one called “{name}”. It is: {header_line[:200]}"
            )
    columns: dict[str, list] = {name: [] for name in header if name in NUMBERS + LABELS}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"Line {reader.line_num}"
        if len(cells) != len(header):
            raise ValueError(f"{where} has {len(cells)} cells; the first line has {len(header)}.")
        for name, cell in zip(header, cells, strict=True):
            if name in NUMBERS:
                columns[name].append(read_number(cell, f"{where}, column “{name}”"))
            elif name in LABELS:
                columns[name].append(cell.strip())
        if len(columns["chosen"]) > MAX_ROWS:
            raise ValueError(
                f"The table has more than {MAX_ROWS:,} pairs; this page stops there. Use the metric itself."
            )
    if not columns["chosen"]:
        raise ValueError("The table has a first line and no pairs below it.")
    if ("chosen_length" in columns) != ("rejected_length" in columns):
        raise ValueError("One of the columns “chosen_length” and “rejected_length” is there; both are required.")
    return columns, [name for name in header if name not in columns]


def read_number(cell: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: “{cell.strip()[:50]}” is not a finite number.")
    return number


def table_text(text: str, upload: bytes | None) -> str:
    if upload is None:
        return text
    if len(upload) > MAX_BYTES:
        raise ValueError(f"The file is larger than {MAX_BYTES // 1_000_000} MB. Use the metric itself.")
    try:
        return upload.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("The file is not text in UTF-8. Save the table as CSV in UTF-8.") from None


# ------------------------------------------------------------------------------------------------------------- drawing


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def percents(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def interval_plot(rows: list[tuple[str, float, tuple[float, float]]]) -> str:
    """Accuracies with their intervals on an axis from 0 to 1 each; the dashed mark is a coin."""
    left, right, step = 8, 412, 48
    parts = []
    for i, (name, value, interval) in enumerate(rows):
        y = 36 + step * i
        low, middle, high = (left + (right - left) * share for share in (interval[0], value, interval[1]))
        coin = (left + right) / 2
        text = f"{name if len(name) <= 24 else name[:23] + '…'}: {percent(value)} ({percents(interval)})"
        parts.append(
            f'<text x="{left}" y="{y - 13}">{html.escape(text)}</text>'
            f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".25"/>'
            f'<line x1="{coin}" x2="{coin}" y1="{y - 9}" y2="{y + 9}" stroke="currentColor" stroke-dasharray="3 3"/>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#3b82f6" stroke-width="7"/>'
            f'<circle cx="{middle:.1f}" cy="{y}" r="6" fill="currentColor"/>'
        )
    height = step * len(rows) + 4
    return f'<svg viewBox="0 0 420 {height}" role="img" aria-label="Accuracy with intervals">{"".join(parts)}</svg>'


def reliability_plot(margins, temperature: float) -> str:
    """Confidence against accuracy, a dot for each bin, its area the share of the pairs; the line is calibration."""
    left, right, top, bottom = 44, 408, 12, 300
    n = len(margins)

    def x_of(confidence: float) -> float:
        return left + (right - left) * (confidence - 0.5) * 2

    def y_of(share: float) -> float:
        return bottom - (bottom - top) * share

    parts = [
        f'<line x1="{left}" x2="{right}" y1="{y_of(share)}" y2="{y_of(share)}" stroke="currentColor" opacity=".2"/>'
        f'<text x="{left - 6}" y="{y_of(share) + 4}" text-anchor="end">{share:g}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts += [
        f'<text x="{x_of(c)}" y="{bottom + 18}" text-anchor="middle">{c:g}</text>'
        for c in (0.5, 0.6, 0.7, 0.8, 0.9, 1)
    ]
    parts.append(
        f'<line x1="{x_of(0.5)}" y1="{y_of(0.5)}" x2="{x_of(1)}" y2="{y_of(1)}" stroke="currentColor" '
        f'stroke-dasharray="5 4"/><text x="{(left + right) / 2}" y="{bottom + 38}" text-anchor="middle">confidence of '
        f'the model</text><text x="12" y="{(top + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(top + bottom) / 2})">accuracy</text>'
    )
    for row in metrics.reliability(margins, temperature):
        x, y = x_of(row["confidence"]), y_of(row["accuracy"])
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y_of(row["confidence"]):.1f}" stroke="#3b82f6"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 + 14 * math.sqrt(row["n"] / n):.1f}" fill="#3b82f6">'
            f"<title>{row['n']:.0f} pairs: confidence {row['confidence']:.3f}, accuracy {row['accuracy']:.3f}</title>"
            "</circle>"
        )
    return f'<svg viewBox="0 0 424 346" role="img" aria-label="Reliability diagram">{"".join(parts)}</svg>'


def table_row(name: str, value: float, meaning: str) -> str:
    breakable = html.escape(name).replace("_", "_<wbr>")
    return f'<tr><td>{breakable}</td><td class="number">{number(value)}</td><td class="quiet">{meaning}</td></tr>'


def report(text: str, upload: bytes | None, ties: str, temperature: float) -> str:
    """The report on a table, as HTML; for a table that cannot be read, a sentence that says why."""
    try:
        columns, unused = read_table(table_text(text, upload))
        if temperature is None:
            raise ValueError("The temperature is empty; a positive number is required.")
        return measured(columns, unused, ties, temperature)
    except ValueError as error:
        return f'<div class="report"><p class="problem" role="alert">{html.escape(str(error))}</p></div>'


def measured(columns: dict[str, list], unused: list[str], ties: str, temperature: float) -> str:
    notes = []
    if unused:
        notes.append(f"Columns that were not used: {', '.join(unused)}.")
    prompts, subsets = columns.get("prompt"), columns.get("subset")
    if prompts is not None and len(set(prompts)) < 2:
        notes.append("All pairs belong to one prompt: there is no interval over prompts.")
        prompts = None
    if subsets is not None and len(set(subsets)) > MAX_SUBSETS:
        raise ValueError(f"The table names {len(set(subsets))} subsets; this page shows up to {MAX_SUBSETS}.")
    of_rewardbench = {name for members in metrics.REWARDBENCH.values() for name in members}
    sections = "rewardbench" if subsets is not None and set(subsets) == of_rewardbench else None
    if sections:
        notes.append("The subsets are those of RewardBench 1, whose scripts count a tie as lost (ties: 0).")
    result = metrics.pairwise_metrics(
        columns["chosen"],
        columns["rejected"],
        ties=TIES[ties],
        temperature=temperature,
        groups=prompts,
        subsets=subsets,
        sections=sections,
        chosen_lengths=columns.get("chosen_length"),
        rejected_lengths=columns.get("rejected_length"),
    )
    if result["temperature_at_bound"]:
        notes.append("No temperature fits these pairs: the rewards make no error, or do no better than a coin.")
    intervals = [("Wilson", result["accuracy"], (result["accuracy_ci_low"], result["accuracy_ci_high"]))]
    if prompts is not None:
        interval = result["accuracy_bootstrap_low"], result["accuracy_bootstrap_high"]
        intervals.append((f"over {result['n_groups']:.0f} prompts", result["accuracy"], interval))
    margins = metrics.pair_margins(columns["chosen"], columns["rejected"])
    named = [(name, result[name], meaning) for name, meaning in MEANING.items() if name in result]
    named += [(name, value, "") for name, value in result.items() if name.startswith("section/")]
    parts = [
        f"<h2>Accuracy {percent(result['accuracy'])} on {result['n']:.0f} pairs</h2>",
        *(f'<p class="quiet">{html.escape(note)}</p>' for note in notes),
        interval_plot(intervals),
        '<p class="quiet">95 % intervals; the dashed mark is a coin. Wilson’s takes the pairs for independent: where '
        "prompts have several pairs, the one over prompts is right.</p>",
        f"<table>{''.join(table_row(*row) for row in named)}</table>",
        f"<h2>Is the model as right as it is sure?</h2>{reliability_plot(margins, temperature)}",
    ]
    if subsets is not None:
        parts.append(f"<h2>Subsets</h2>{interval_plot(subset_intervals(margins, subsets, TIES[ties]))}")
    return f'<div class="report">{"".join(parts)}</div>'


def subset_intervals(margins, subsets: list[str], ties: metrics.Ties) -> list[tuple[str, float, tuple[float, float]]]:
    wins: dict[str, list[float]] = {name: [] for name in subsets}
    for name, win in zip(subsets, metrics.pair_wins(margins, ties).tolist(), strict=True):
        if not math.isnan(win):  # a dropped tie
            wins[name].append(win)
    return [
        (f"{name}, n={len(won)}", sum(won) / len(won), metrics.wilson_interval(sum(won), len(won)))
        for name, won in wins.items()
    ]


def measure(
    chosen: list[float],
    rejected: list[float],
    ties: str = "0.5",
    temperature: float = 1.0,
    prompts: list[str] | None = None,
    subsets: list[str] | None = None,
) -> dict[str, float]:
    """
    Accuracy, calibration and intervals of a reward model on preference pairs.

    Args:
        chosen: Rewards of the chosen responses.
        rejected: Rewards of the rejected responses.
        ties: What a pair with two equal rewards counts: "0", "0.5", "1" or "drop".
        temperature: Divides the margins before log loss, Brier score and calibration error are computed.
        prompts: The prompt of each pair, for the interval over prompts.
        subsets: The subset of each pair.
    """
    try:
        if ties not in TIES:
            raise ValueError(f"`ties` is {ties!r}; one of {', '.join(TIES)} is required.")
        if len(chosen) > MAX_ROWS:
            raise ValueError(f"There are more than {MAX_ROWS:,} pairs; this page stops there. Use the metric itself.")
        return metrics.pairwise_metrics(
            chosen, rejected, ties=TIES[ties], temperature=temperature, groups=prompts, subsets=subsets
        )
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def example() -> str:
    """Sixty made-up pairs: two for each prompt, and a model that is a little too sure."""
    rng = random.Random(0)
    lines = ["chosen,rejected,prompt,subset"]
    for i in range(60):
        rejected = rng.gauss(0, 2)
        lines.append(f"{rejected + rng.gauss(1.5, 2):.2f},{rejected:.2f},{i // 2},{'chat' if i % 3 else 'code'}")
    return "\n".join(lines)


with gr.Blocks(title="Reward accuracy", analytics_enabled=False) as demo:
    gr.Markdown(
        "# Reward accuracy\nHow good is a reward model? Paste the rewards it gave to preference pairs, or upload "
        "them. The first line names the columns: `chosen` and `rejected` are required; `prompt`, `subset`, and "
        "`chosen_length` with `rejected_length`, add to the report. What stands here now is made up."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            text = gr.Textbox(example(), label="Rewards, as CSV", lines=12, max_lines=12)
            upload = gr.File(label="or a CSV file (used instead, while it is here)", type="binary", height=150)
            ties = gr.Radio(list(TIES), value="0.5", label="A tie counts")
            temperature = gr.Number(1.0, label="Temperature", info="Divides the rewards", minimum=1e-6)
            button = gr.Button("Measure", variant="primary")
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(report(example(), None, "0.5", 1.0))
    button.click(report, [text, upload, ties, temperature], shown, api_visibility="private", concurrency_limit=2)
    gr.api(measure, api_name="measure", concurrency_limit=2)


if __name__ == "__main__":
    demo.queue(max_size=32).launch(css=CSS, max_file_size=MAX_BYTES)
