"""The page of the metric: it reads rewards of preference pairs as CSV, and reports accuracy with intervals,
calibration and subsets.

    python app.py

`metrics.py` does the mathematics, `guard.py` refuses what is too much, `checks.py` reads a value, `calibration.py`
draws one figure; here a table is read, with errors that name the line, and a report is drawn as HTML. Whatever a
visitor typed is escaped before it is shown, and nothing of it is kept.
"""

import csv
import html
import io
import math
import os
import random
import re
import tempfile
import traceback
from pathlib import Path


os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="accuracy_uploads_"))
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # of the last events, which gradio keeps

import gradio as gr  # noqa: E402
import metrics  # noqa: E402
from calibration import pairs, reliability_plot  # noqa: E402
from checks import called, check_text  # noqa: E402
from guard import Guard, Page  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402


MAX_ROWS = 50_000
MAX_SUBSETS = 100
MAX_BYTES = 5_000_000
MAX_BODY = 6_000_000  # bytes: a table, and what JSON makes of it
COLDEST, HOTTEST = 0.001, 1000
NUMBERS = ("chosen", "rejected", "chosen_length", "rejected_length")
LABELS = ("prompt", "subset")
TIES = {"0.5": 0.5, "0": 0, "1": 1, "drop": "drop"}

CSS = """
.report { --mark: #1d4ed8; --quiet: #475569; color: var(--body-text-color); }
.dark .report { --mark: #60a5fa; --quiet: #b6c2d2; }
.report h2 { margin: 0 0 .4rem; font-size: 1.15rem; color: inherit; }
.report h2:focus { outline: 2px solid var(--mark); outline-offset: 4px; }
.report table { width: 100%; border-collapse: collapse; margin: .6rem 0 1rem; }
.report table, .report tr, .report td, .report th { border: 0; background: none; color: inherit; }
.report td, .report th { padding: .25rem .4rem .25rem 0; border-bottom: 1px solid var(--border-color-primary);
  vertical-align: top; text-align: left; overflow-wrap: anywhere; font-weight: 400; }
.report thead th { font-weight: 700; }
.report tbody th { min-width: 7.5rem; }
.report .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.report .quiet { color: var(--quiet); font-size: .9rem; }
.report svg { width: 100%; height: auto; max-width: 28rem; display: block; margin-bottom: .8rem; }
.report svg text { fill: currentColor; font-size: 15px; }
.report .mark { stroke: var(--mark); fill: var(--mark); }
.report .reliability .dot { fill: var(--mark); opacity: .8; }
.report summary { cursor: pointer; font-weight: 700; }
.report .problem { border-left: 4px solid #d9480f; padding: .5rem .8rem; overflow-wrap: anywhere; }
@media (forced-colors: active) { .report .mark, .report .dot { stroke: CanvasText; fill: CanvasText; } }
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
    """The checked columns of a CSV table, and the names of unused columns."""
    lines = text.lstrip("\ufeff").strip("\r\n ")  # a tab may be an empty cell
    if not lines.strip():
        raise ValueError("There is nothing to measure yet: paste a table or upload a file.")
    header_line = re.split(r"\r\n|\r|\n", lines, maxsplit=1)[0]
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(lines, newline=""), delimiter=delimiter, strict=True)
    try:
        return read_columns(reader, header_line)
    except csv.Error as error:  # a cell of more than 128 KiB
        raise ValueError(f"Line {reader.line_num} is no CSV: {error}.") from error


def read_columns(reader, header_line: str) -> tuple[dict[str, list], list[str]]:
    header = [name.strip().lower() for name in next(reader)]
    for name in ("chosen", "rejected"):
        if header.count(name) != 1:
            raise ValueError(
                f"The first line must name the columns, with one called “{name}”. It is: {header_line[:200]}"
            )
    for name in (*NUMBERS, *LABELS):
        if header.count(name) > 1:
            raise ValueError(f"The first line names the column “{name}” more than once.")
    columns: dict[str, list] = {name: [] for name in header if name in NUMBERS + LABELS}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"Line {reader.line_num}"
        if len(cells) != len(header):
            raise ValueError(f"{where} has {len(cells)} cells; the first line has {len(header)}.")
        if len(columns["chosen"]) == MAX_ROWS:
            raise ValueError(
                f"The table has more than {MAX_ROWS:,} pairs; this page stops there. Use the metric itself."
            )
        for name, cell in zip(header, cells, strict=True):
            if name in NUMBERS:
                columns[name].append(read_number(cell, f"{where}, column “{name}”", name.endswith("length")))
            elif name in LABELS:
                columns[name].append(cell.strip())
    if not columns["chosen"]:
        raise ValueError("The table has a first line and no pairs below it.")
    if ("chosen_length" in columns) != ("rejected_length" in columns):
        raise ValueError("One of the columns “chosen_length” and “rejected_length” is there; both are required.")
    return columns, [name for name in header if name not in columns]


def read_number(cell: str, where: str, positive: bool = False) -> float:
    try:
        number = float(cell.replace("_", "no digit"))  # Python reads 1_0 as 10
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: “{cell.strip()[:50]}” is not a finite number.")
    if positive and number < 0:
        raise ValueError(f"{where}: “{cell.strip()[:50]}” is negative; a length is not.")
    return number


def table_text(text: str, upload: bytes | None) -> str:
    data = check_text(text or "", "The table").encode() if upload is None else upload
    if len(data) > MAX_BYTES:
        what = "table" if upload is None else "file"
        raise ValueError(f"The {what} is larger than {MAX_BYTES // 1_000_000} MB. Use the metric itself.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("The file is not text in UTF-8. Save the table as CSV in UTF-8.") from None


def check_temperature(value, name: str = "The temperature") -> float:
    if value is None:
        raise ValueError(f"{name} is empty; a number from {COLDEST} to {HOTTEST} is required.")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not COLDEST <= value <= HOTTEST:
        shown = value if isinstance(value, float) or (type(value) is int and abs(value) < 1e9) else called(value)
        raise ValueError(f"{name} is {shown}; a number from {COLDEST} to {HOTTEST} is required.")
    return value


def check_column(values, name: str, of: str) -> list | None:
    """A checked list of numbers or of texts, from the API."""
    if not isinstance(values, list):
        raise ValueError(f"`{name}` is {called(values)}; a list of {of} is required.")
    if len(values) > MAX_ROWS:
        raise ValueError(f"There are more than {MAX_ROWS:,} pairs; this page stops there. Use the metric itself.")
    for i, value in enumerate(values):
        if of == "texts":
            check_text(value, f"`{name}[{i}]`")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            shown = value if type(value) is float else called(value)
            raise ValueError(f"`{name}[{i}]` is {shown}; a finite number is required.")
    return values


# ------------------------------------------------------------------------------------------------------------- drawing


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def percents(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def interval_plot(rows: list[tuple[str, float, tuple[float, float]]]) -> str:
    """Accuracies with their intervals, each on an axis from 0 to 1; the dashed mark is a coin."""
    left, right, step = 8, 412, 48
    parts = []
    for i, (name, value, interval) in enumerate(rows):
        y = 36 + step * i
        low, middle, high = (left + (right - left) * share for share in (interval[0], value, interval[1]))
        coin = (left + right) / 2
        text = f"{name if len(name) <= 24 else name[:23] + '…'}: {percent(value)} ({percents(interval)})"
        parts.append(
            f'<text x="{left}" y="{y - 13}">{escape(text)}</text>'
            f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".25"/>'
            f'<line x1="{coin}" x2="{coin}" y1="{y - 9}" y2="{y + 9}" stroke="currentColor" stroke-dasharray="3 3"/>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" class="mark" stroke-width="7"/>'
            f'<circle cx="{middle:.1f}" cy="{y}" r="6" fill="currentColor"/>'
        )
    height = step * len(rows) + 4
    told = "; ".join(f"{name} {percent(value)}, {percents(interval)}" for name, value, interval in rows)
    return (
        f'<svg viewBox="0 0 420 {height}" role="img" aria-label="Accuracy with 95 % interval: {escape(told)}">'
        f"{''.join(parts)}</svg>"
    )


def table_row(name: str, value: float, meaning: str) -> str:
    breakable = escape(name).replace("_", "_<wbr>")
    return (
        f'<tr><th scope="row">{breakable}</th><td class="number">{number(value)}</td>'
        f'<td class="quiet">{meaning}</td></tr>'
    )


def report(text: str, upload: bytes | None, ties: str, temperature: float) -> str:
    """The report on a table as HTML. If the table cannot be read, a sentence that says why."""
    try:
        if not isinstance(ties, str) or ties not in TIES:
            raise ValueError(f"A tie counts {', '.join(TIES)}; one of these is required.")
        columns, unused = read_table(table_text(text, upload))
        return measured(columns, unused, ties, check_temperature(temperature))
    except Exception as error:  # the old report must not stay, whatever happens
        said = str(error) if isinstance(error, ValueError) else ours(error)
        return f'<div class="report"><p class="problem" role="alert">{escape(said)}</p></div>'


def ours(error: Exception) -> str:
    traceback.print_exception(error)
    return f"This page failed ({type(error).__name__}); its log says where. Nothing you typed was wrong as such."


def escape(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())


def measured(columns: dict[str, list], unused: list[str], ties: str, temperature: float) -> str:
    notes = []
    if unused:
        notes.append(f"Columns that were not used: {', '.join(unused)}.")
    margins = metrics.pair_margins(columns["chosen"], columns["rejected"])
    prompts, subsets = columns.get("prompt"), columns.get("subset")
    if prompts is not None:
        if blank := prompts.count(""):
            notes.append(f"{pairs(blank)} without a prompt: each counts as a prompt of its own.")
        prompts = [prompt or i for i, prompt in enumerate(prompts)]
        counted = [not math.isnan(win) for win in metrics.pair_wins(margins, TIES[ties]).tolist()]
        if len({prompt for prompt, counts in zip(prompts, counted, strict=True) if counts}) == 1:
            notes.append("All pairs that count belong to one prompt: there is no interval over prompts.")
            prompts = None
    if subsets is not None:
        subsets = [subset or "(none)" for subset in subsets]
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
    calibration = reliability_plot(metrics.reliability(margins, temperature), len(margins))
    named = [(name, result[name], meaning) for name, meaning in MEANING.items() if name in result]
    named += [(name, value, "") for name, value in result.items() if name.startswith("section/")]
    parts = [
        f'<h2 tabindex="-1">Accuracy {percent(result["accuracy"])} on {pairs(result["n"])}</h2>',
        *(f'<p class="quiet">{escape(note)}</p>' for note in notes),
        interval_plot(intervals),
        '<p class="quiet">95 % intervals; the dashed mark is a coin. Wilson’s takes the pairs for independent: where '
        "prompts have several pairs, the one over prompts is right.</p>",
        '<table><thead><tr><th scope="col">metric</th><th scope="col" class="number">value</th><th scope="col">meaning'
        f"</th></tr></thead><tbody>{''.join(table_row(*row) for row in named)}</tbody></table>",
        f"<h2>Is the model as right as it is sure?</h2>{calibration}",
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
        ties: The value of a pair with two equal rewards: "0", "0.5", "1" or "drop".
        temperature: Divides the margins before log loss, Brier score and calibration error are computed.
        prompts: The prompt of each pair, for the interval over prompts.
        subsets: The subset of each pair.
    """
    try:
        if not isinstance(ties, str) or ties not in TIES:
            shown = f"“{ties[:40]}”" if isinstance(ties, str) else called(ties)
            raise ValueError(f"`ties` is {shown}; one of {', '.join(TIES)} is required, as text.")
        return metrics.pairwise_metrics(
            check_column(chosen, "chosen", "numbers"),
            check_column(rejected, "rejected", "numbers"),
            ties=TIES[ties],
            temperature=check_temperature(temperature, "`temperature`"),
            groups=None if prompts is None else check_column(prompts, "prompts", "texts"),
            subsets=None if subsets is None else check_subsets(subsets),
        )
    except ValueError as error:
        raise gr.Error(str(error).encode("utf-8", "replace").decode(), print_exception=False) from None
    except Exception as error:
        raise gr.Error(ours(error), print_exception=False) from None


def check_subsets(values) -> list[str]:
    values = check_column(values, "subsets", "texts")
    if (names := len(set(values))) > MAX_SUBSETS:
        raise ValueError(f"`subsets` names {names} subsets; this page takes {MAX_SUBSETS}.")
    return values


def example() -> str:
    """Sixty invented pairs, two for each prompt, from a model that is a little too sure."""
    rng = random.Random(0)
    lines = ["chosen,rejected,prompt,subset"]
    for i in range(60):
        rejected = rng.gauss(0, 2)
        lines.append(f"{rejected + rng.gauss(1.5, 2):.2f},{rejected:.2f},{i // 2},{'chat' if i % 3 else 'code'}")
    return "\n".join(lines)


# When a report is there, the page goes to it.
ARRIVED = """() => window.setTimeout(() => {
  const found = document.querySelector("#report h2, #report .problem");
  found.setAttribute("tabindex", "-1");
  found.focus({ preventScroll: true });
  if (found.getBoundingClientRect().bottom > window.innerHeight * 0.8) found.scrollIntoView();
}, 100)"""
# Reports are read aloud when they come; the button of an upload is named after what stands on it.
OPENED = """() => {
  document.getElementById("report").setAttribute("aria-live", "polite");
  const name = () => document.querySelectorAll("button.upload-container[aria-label]")
    .forEach((button) => button.removeAttribute("aria-label"));
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}"""
THEME = gr.themes.Default(primary_hue="blue", neutral_hue="slate").set(  # gradio's own are too faint to read for many
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
)

with Page(title="Reward accuracy", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.Markdown(
        "# Reward accuracy\nHow good is a reward model? Paste the rewards it gave to preference pairs, or upload "
        "them. The first line names the columns: `chosen` and `rejected` are required; `prompt`, `subset`, and "
        "`chosen_length` with `rejected_length`, add to the report. What stands here now is made up. What you "
        "paste is not written to disk; a file that you upload stays there for up to two hours."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            text = gr.Textbox(example(), label="Rewards, as CSV", lines=8, max_lines=8, elem_id="rewards")
            upload = gr.File(label="or a CSV file (used instead, while it is here)", type="binary", height=130)
            ties = gr.Radio(list(TIES), value="0.5", label="A tie counts")
            temperature = gr.Number(1.0, label="Temperature", info="Divides the rewards", elem_id="temperature")
            button = gr.Button("Measure", variant="primary", elem_id="measure-button")
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(report(example(), None, "0.5", 1.0), elem_id="report")
    private = {"api_visibility": "private", "concurrency_limit": 2}
    button.click(report, [text, upload, ties, temperature], shown, **private).then(None, js=ARRIVED)
    demo.load(None, js=OPENED)
    gr.api(measure, api_name="measure", concurrency_limit=2)


if __name__ == "__main__":
    demo.queue(max_size=32, api_open=False).launch(
        css=CSS,
        theme=THEME,
        max_file_size=MAX_BYTES,
        footer_links=["api", "settings"],
        run_history=False,
        enable_monitoring=False,
        state_session_capacity=1,  # no state: it would keep the visitors' input
        app_kwargs={
            "middleware": [
                Middleware(
                    Guard, most=MAX_BODY, values=4 * MAX_ROWS + 1000, uploads=Path(os.environ["GRADIO_TEMP_DIR"])
                )
            ]
        },
    )
