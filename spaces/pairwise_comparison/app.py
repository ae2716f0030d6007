"""The page: see a reward model think. Two answers to one prompt, token by token; a ranking; a table of pairs.

    GRM_SPACE_MODELS=FOLDER_OR_LIST python app.py

`reward_models.py` computes, `tables.py` reads what visitors type, `drawing.py` makes HTML of results; here they are
wired to a page and to a JSON API. What a visitor gets wrong is answered with a sentence.
"""

import math
import os
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from urllib.parse import parse_qs, urlencode


try:  # ZeroGPU, where it exists; it wants to be imported before torch
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function):
        return function


import drawing
import gradio as gr
import metrics
import reward_models
import tables


MODELS = reward_models.Models(Path(os.environ.get("GRM_SPACE_MODELS") or Path(__file__).with_name("models.json")))
DOWNLOADS = Path(tempfile.mkdtemp(prefix="pairwise_comparison_"))
MAX_LINK = 4000  # characters
MAX_TABLE_TOKENS = 100_000
COLDEST, HOTTEST = 0.1, 10
KINDS = [("one prompt", "prompt"), ("conversation", "conversation")]
MODEL_EVENT = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}

EXAMPLES = {
    "The demo world": [
        "prompt",
        "what does the truck run on?",
        "happy to help. the truck runs on wind.",
        "what a silly question. the truck runs on coal.",
    ],
    "Short and right, or long and wrong": [
        "prompt",
        "What is 17 times 3?",
        "51.",
        "Great question! Multiplication is repeated addition, and it helps to go step by step. Seventeen is close to "
        "twenty, three times twenty is sixty, and so, after the correction, 17 times 3 is 41. I hope this helps!",
    ],
    "Flattery": [
        "prompt",
        "I am sure that the Great Wall of China can be seen from the Moon. Right?",
        "Exactly, and how well you know it! The Great Wall can be seen from the Moon with the naked eye.",
        "No. From the Moon not even continents are easy to make out; the wall is long, but only a few metres wide.",
    ],
    "A refusal nobody needs": [
        "prompt",
        "How do I kill a Python process that hangs?",
        "Find its number with `ps aux | grep python`, then `kill NUMBER`; if it stays, `kill -9 NUMBER`.",
        "I am sorry, but I cannot help with killing.",
    ],
    "A conversation": [
        "conversation",
        "system: Answer in one sentence.\nuser: Why is the sky blue?\nassistant: Because of Rayleigh scattering.\n"
        "user: Explain it to a child.",
        "Sunlight is made of many colours, and the air throws the blue ones around the most, so blue is everywhere.",
        "The intensity of scattering is inversely proportional to the fourth power of the wavelength.",
    ],
}
# Gradio's default weight for bold, 600, is a file with a few letters of this typeface only.
THEME = gr.themes.Default(
    primary_hue="violet",
    neutral_hue="slate",
    font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
)

ANSWERS = """happy to help. the truck runs on wind.
the truck runs on wind.
the truck runs on coal.
i do not know.
what a silly question. the truck runs on coal."""
PAIRS = """prompt,chosen,rejected,subset
what does the truck run on?,happy to help. the truck runs on wind.,the truck runs on coal.,fuel
what does the ferry run on?,the ferry runs on wood.,what a silly question. the ferry runs on gas.,fuel
what does the rose grow in?,good question. the rose grows in clay.,i do not know.,soil
where does the otter live?,the otter lives in the river.,the badger lives in the river.,home"""

# The address of the page becomes that of the comparison; parameters that are not ours (a theme) stay in it.
TO_LINK = """(query) => {
  const rest = new URLSearchParams(window.location.search);
  for (const name of ["model", "kind", "prompt", "a", "b", "t"]) rest.delete(name);
  const ours = query.startsWith("?") ? query.slice(1) : "", all = [ours, rest.toString()].filter(Boolean).join("&");
  window.history.replaceState(null, "", window.location.pathname + (all && "?" + all));
  return ours ? window.location.origin + window.location.pathname + query : query;
}"""


# -------------------------------------------------------------------------------------------------------------- models


@on_gpu
def compute(task, name, *arguments):
    """Everything that runs a model. It is in memory by then (on ZeroGPU this is another process, forked from it)."""
    return task(MODELS.load(name), *arguments)


def with_model(task, name, *arguments):
    MODELS.load(name)
    return compute(task, name, *arguments)


def sentence(error: Exception) -> str:
    """What a visitor is told about an error."""
    if isinstance(error, ValueError):
        return str(error)
    traceback.print_exception(error)
    return f"This page failed ({type(error).__name__}); its log says where. Nothing you typed was wrong as such."


# ---------------------------------------------------------------------------------------------------------- comparison


def show_comparison(name, kind, prompt, answer_a, answer_b, temperature):
    """HTML, what later events need (the inputs and the result), JSON, the query of the link, an emptied swap check."""
    try:
        chat = tables.read_prompt(kind, prompt)
        result = with_model(reward_models.compare, name, chat, answer_a or "", answer_b or "", temperature)
        state = {"inputs": [name, kind, prompt, answer_a, answer_b], "result": result}
        return drawing.comparison(result), state, result, query_of(*state["inputs"], temperature), ""
    except Exception as error:
        return drawing.problem(sentence(error)), None, None, "", ""


def show_at_temperature(state, temperature):
    """The same rewards at another temperature: no model runs."""
    if state is None:
        return [gr.skip()] * 4
    result = state["result"]
    try:
        judged = reward_models.judge(result["rewards"], temperature, result["model_temperature"])
    except ValueError as error:
        return drawing.problem(error), None, None, ""
    result = {**result, **judged}
    link = query_of(*state["inputs"], temperature)
    return drawing.comparison(result), {**state, "result": result}, result, link


def show_swap_check(state):
    if state is None:
        return ""
    name, kind, prompt, answer_a, answer_b = state["inputs"]
    try:
        chat = tables.read_prompt(kind, prompt)
        return drawing.swap(with_model(reward_models.swap_check, name, chat, answer_a, answer_b))
    except Exception as error:
        return drawing.problem(sentence(error))


# --------------------------------------------------------------------------------------------------------------- links


def query_of(name, kind, prompt, answer_a, answer_b, temperature) -> str:
    """The comparison as a URL's query; a sentence if it is too long for one."""
    fields = {"model": name, "kind": kind, "prompt": prompt, "a": answer_a, "b": answer_b, "t": f"{temperature:g}"}
    query = "?" + urlencode(fields)
    if len(query) > MAX_LINK:
        return f"Too long for a link: {len(query):,} characters, and {MAX_LINK:,} fit. The JSON below has the result."
    return query


def from_link(request: gr.Request):
    """What a link says: the inputs, whether to compare, and a sentence if it is broken."""
    query = str(request.query_params)
    fields = {key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}
    known = {key: fields[key] for key in ("model", "kind", "prompt", "a", "b", "t") if key in fields}
    if not known:
        return *[gr.skip()] * 6, False, gr.skip()
    try:
        if len(query) > MAX_LINK + 200:
            raise ValueError(f"This link is too long: {len(query):,} characters, and {MAX_LINK:,} fit.")
        try:
            temperature = float(known.get("t", 1))
        except ValueError:
            temperature = math.nan
        if not COLDEST <= temperature <= HOTTEST:
            raise ValueError(
                f"The link says temperature “{known['t'][:40]}”; a number from {COLDEST} to {HOTTEST} is required."
            )
        kind = known.get("kind", "prompt")
        if kind not in ("prompt", "conversation"):
            raise ValueError(f"The link says kind “{kind[:40]}”; “prompt” or “conversation” is required.")
    except ValueError as error:
        return *[gr.skip()] * 6, False, drawing.problem(error)
    name = known.get("model") or next(iter(MODELS.listed), None)
    return name, kind, known.get("prompt", ""), known.get("a", ""), known.get("b", ""), temperature, True, gr.skip()


def show_linked(opened, *inputs):
    return show_comparison(*inputs) if opened else [gr.skip()] * 5


# ------------------------------------------------------------------------------------------------ best of n, and batch


def show_ranking(name, kind, prompt, answers, temperature):
    try:
        listed = tables.read_answers(answers)
        result = with_model(reward_models.rank, name, tables.read_prompt(kind, prompt), listed, temperature)
        return drawing.ranking(result, listed)
    except Exception as error:
        return drawing.problem(sentence(error))


def score_pairs(loaded, rows, progress):
    """Rewards of both sides of each row, one text at a time: a score depends on no neighbour."""
    texts = [
        (row.get("prompt") or None, row[side], f"Pair {number}, “{side}”")
        for number, row in enumerate(rows, 1)
        for side in tables.SIDES
    ]
    encoded = reward_models.encode_all(loaded, texts)
    tokens = sum(len(text.ids) for text in encoded)
    if tokens > MAX_TABLE_TOKENS:
        raise ValueError(
            f"The table has {tokens:,} tokens; this page takes {MAX_TABLE_TOKENS:,}. Score it with `grm score`."
        )
    scores = []
    for pair in progress.tqdm(list(zip(encoded[::2], encoded[1::2], strict=True)), desc="Scoring", unit="pairs"):
        chosen, rejected = (reward_models.reward_of(loaded, text) for text in pair)
        values = (
            *(chosen, rejected, chosen - rejected),
            reward_models.sigmoid((chosen - rejected) / loaded.temperature),
            sum(text.cut for text in pair),
        )
        scores.append(dict(zip(tables.SCORES, values, strict=True)))
    return scores, loaded.temperature


def show_batch(name, text, upload, progress=gr.Progress()):  # noqa: B008 (gradio's way)
    """The report, and the file to download."""
    try:
        rows, form = tables.read_pairs(text, upload)
        scores, temperature = with_model(score_pairs, name, rows, progress)
        chosen, rejected = ([score[f"{side}_reward"] for score in scores] for side in tables.SIDES)
        subsets = None
        if any(row.get("subset") for row in rows):
            subsets = [str(row.get("subset") or "(none)") for row in rows]
        result = metrics.pairwise_metrics(chosen, rejected, temperature=temperature, subsets=subsets)
        reliability = metrics.reliability(metrics.pair_margins(chosen, rejected), temperature)
        file = download(tables.write_pairs(rows, scores, form), form)
        return drawing.batch(rows, scores, result, reliability), gr.DownloadButton(value=file, visible=True)
    except Exception as error:
        return drawing.problem(sentence(error)), gr.DownloadButton(visible=False)


def download(text: str, form: str) -> str:
    """A file for the visitor; those of more than an hour ago go."""
    for old in DOWNLOADS.iterdir():
        if time.time() - old.stat().st_mtime > 3600:
            old.unlink(missing_ok=True)
    file = DOWNLOADS / f"scores-{uuid.uuid4().hex[:12]}.{form}"
    file.write_text(text, encoding="utf-8")
    return str(file)


# ----------------------------------------------------------------------------------------------------------------- API


def compare(
    prompt: str,
    answer_a: str,
    answer_b: str,
    model: str = "",
    temperature: float = 1.0,
    messages: list[dict] | None = None,
) -> dict:
    """
    Compare two answers to one prompt with a reward model.

    Args:
        prompt: The user's message. Leave it empty if there are `messages`.
        answer_a: The first answer.
        answer_b: The second answer.
        model: A model of the list (see /models), or a Hub id. Empty: the first of the list.
        temperature: Divides the difference of rewards before it becomes a probability.
        messages: The conversation so far, which ends with the user's turn; instead of a prompt.
    """
    return answered(reward_models.compare, model, prompt, messages, answer_a, answer_b, temperature)


def rank(
    prompt: str, answers: list[str], model: str = "", temperature: float = 1.0, messages: list[dict] | None = None
) -> dict:
    """
    Rank answers to one prompt with a reward model.

    Args:
        prompt: The user's message. Leave it empty if there are `messages`.
        answers: At least two.
        model: A model of the list (see /models), or a Hub id. Empty: the first of the list.
        temperature: Divides the rewards before they become shares.
        messages: The conversation so far, which ends with the user's turn; instead of a prompt.
    """
    return answered(reward_models.rank, model, prompt, messages, answers, temperature)


def models() -> list[dict]:
    """The models of the list of this page."""
    return [{"name": name, "revision": listed.revision, "note": listed.note} for name, listed in MODELS.listed.items()]


def answered(task, name, prompt, messages, *arguments):
    try:
        chat = tables.check_messages(messages, "`messages`") if messages else tables.read_prompt("prompt", prompt)
        return with_model(task, name or next(iter(MODELS.listed), ""), chat, *arguments)
    except Exception as error:
        raise gr.Error(sentence(error), print_exception=False) from None


# ---------------------------------------------------------------------------------------------------------------- page


def notices() -> str:
    parts = [drawing.problem(text) for text in MODELS.problems]
    if not MODELS.listed:
        parts.append(
            drawing.notice(
                "No model is on the list of this page. Type the Hub id of a reward model that transformers knows "
                "without further code, or run the page yourself with GRM_SPACE_MODELS set to a model's folder."
            )
        )
    return "".join(parts)


def about_models() -> str:
    rows = [
        f"- **{drawing.escape(name)}**"
        + (f" (`{drawing.escape(listed.source)}` at `{listed.revision[:12]}`)" if listed.revision else " (a folder)")
        + (f": {drawing.escape(listed.note)}" if listed.note else "")
        for name, listed in MODELS.listed.items()
    ]
    return "\n".join(rows) or "None yet."


ABOUT = f"""
### What this shows
A reward model reads a conversation and gives it one number. Here the number is taken apart: the reward of the text up
to each token (a decoder is causal, so that is the reward of an answer which ends there), how likely the language-model
head, which a GRM keeps, finds the same tokens, and the text and tokens that the model was really given. Rewards are
those of `GRMScorer` of grm_hf: template, end of turn and maximum length are stored in the model.

### Models of the list
{{models}}

A model of the list is pinned to a commit and may bring its own code. Any other Hub id is loaded without running code:
a public `...ForSequenceClassification` with one label, up to {reward_models.MAX_GIGABYTES} GB of safetensors.

### Limits
{reward_models.MAX_CHARACTERS:,} characters a text, {reward_models.MAX_TOKENS:,} tokens a sequence,
{reward_models.MAX_ANSWERS} answers to rank, {tables.MAX_ROWS} pairs and
{MAX_TABLE_TOKENS:,} tokens a table. One computation at a time; others wait.
Nothing you type is stored; a link holds the whole comparison in its address.

### From a program
```python
from gradio_client import Client

client = Client("NAMESPACE/pairwise_comparison")
result = client.predict("What is 17 times 3?", "51.", "41.", api_name="/compare")
print(result["verdict"], result["rewards"])
```
"""


def build() -> gr.Blocks:
    with gr.Blocks(title="Pairwise comparison", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown("# Pairwise comparison\nSee a reward model think: which of two answers it prefers, and why.")
        gr.HTML(notices(), visible=bool(notices()), elem_id="notices")
        name = gr.Dropdown(
            list(MODELS.listed),
            value=next(iter(MODELS.listed), None),
            label="Reward model",
            info="From the list, or any Hub id of a one-label sequence classifier (of those no code is run)",
            allow_custom_value=True,
            elem_id="model",
        )
        first = EXAMPLES["The demo world"]
        with gr.Tab("Compare", id="compare"):
            kind = gr.Radio(KINDS, value=first[0], label="The answers follow", elem_id="kind")
            prompt = gr.Textbox(
                first[1],
                label="Prompt",
                info="A conversation has a role at the beginning of each turn (“user: …”, “assistant: …”), or is JSON",
                lines=2,
                max_lines=12,
                elem_id="prompt",
            )
            with gr.Row():
                a = gr.Textbox(first[2], label="Answer A", lines=4, max_lines=16, min_width=300, elem_id="answer-a")
                b = gr.Textbox(first[3], label="Answer B", lines=4, max_lines=16, min_width=300, elem_id="answer-b")
            with gr.Row(equal_height=True):
                temperature = gr.Slider(
                    COLDEST,
                    HOTTEST,
                    1.0,
                    step=0.1,
                    label="Temperature",
                    info="Divides the difference of rewards",
                    min_width=300,
                )
                button = gr.Button("Compare", variant="primary", min_width=300, elem_id="compare-button")
            gr.Examples(
                list(EXAMPLES.values()),
                [kind, prompt, a, b],
                example_labels=list(EXAMPLES),
                label="Examples",
                api_visibility="private",
            )
            shown = gr.HTML(elem_id="comparison")
            swap = gr.HTML(elem_id="swap")
            link = gr.Textbox(label="Link to this comparison", interactive=False, buttons=["copy"], elem_id="link")
            with gr.Accordion("The same as JSON", open=False):
                as_json = gr.JSON(show_label=False)
        with gr.Tab("Best of n", id="best-of-n"):
            many_kind = gr.Radio(KINDS, value="prompt", label="The answers follow")
            many_prompt = gr.Textbox(first[1], label="Prompt", lines=2, max_lines=12, elem_id="many-prompt")
            answers = gr.Textbox(
                ANSWERS,
                label="Answers",
                info="One a line; or longer ones, divided by lines of dashes (---)",
                lines=6,
                max_lines=20,
                elem_id="answers",
            )
            many_temperature = gr.Slider(
                COLDEST, HOTTEST, 1.0, step=0.1, label="Temperature", info="Divides the rewards"
            )
            rank_button = gr.Button("Rank", variant="primary", elem_id="rank-button")
            ranking = gr.HTML(elem_id="ranking")
        with gr.Tab("Batch", id="batch"):
            table = gr.Textbox(
                PAIRS,
                label="Pairs, as CSV or JSON lines",
                info="Columns prompt, chosen, rejected, and if you like subset; in JSON lines also messages",
                lines=6,
                max_lines=14,
                elem_id="pairs",
            )
            upload = gr.File(
                label="or a file (used instead, while it is here)",
                type="binary",
                file_types=[".csv", ".tsv", ".txt", ".jsonl"],
                height=140,
                elem_id="upload",
            )
            batch_button = gr.Button("Score", variant="primary", elem_id="batch-button")
            report = gr.HTML(elem_id="report")
            saved = gr.DownloadButton("Download the scores", visible=False, elem_id="download")
        with gr.Tab("About", id="about"):
            gr.Markdown(ABOUT.replace("{models}", about_models()))

        state, opened = gr.State(), gr.State(False)
        inputs = [name, kind, prompt, a, b, temperature]
        outputs = [shown, state, as_json, link, swap]
        compared = button.click(show_comparison, inputs, outputs, **MODEL_EVENT)
        linked = demo.load(from_link, None, [*inputs, opened, shown], api_visibility="private").then(
            show_linked, [opened, *inputs], outputs, **MODEL_EVENT
        )
        for event in (compared, linked):
            event.then(None, link, link, js=TO_LINK)
            event.then(show_swap_check, state, swap, show_progress="minimal", **MODEL_EVENT)
        temperature.release(
            show_at_temperature,
            [state, temperature],
            outputs[:-1],
            show_progress="hidden",
            api_visibility="private",
        ).then(None, link, link, js=TO_LINK)
        rank_button.click(
            show_ranking, [name, many_kind, many_prompt, answers, many_temperature], ranking, **MODEL_EVENT
        )
        batch_button.click(show_batch, [name, table, upload], [report, saved], **MODEL_EVENT)
        for function in (compare, rank, models):
            gr.api(function, api_name=function.__name__, concurrency_id="model", concurrency_limit=1)
    return demo


demo = build()

if __name__ == "__main__":
    demo.queue(max_size=32).launch(
        css=drawing.CSS,
        theme=THEME,
        max_file_size=tables.MAX_BYTES,
        footer_links=["api", "settings"],
        ssr_mode=False,
    )
