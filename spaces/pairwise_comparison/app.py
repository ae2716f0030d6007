"""The page that shows what a reward model does: two answers to one prompt, token by token; a ranking; a table of
pairs.

    GRM_SPACE_MODELS=FOLDER_OR_LIST python app.py

`reward_models.py` computes; `apart.py` does so for unlisted models; `jobs.py` decides whose turn it is; `guard.py`
refuses requests that are too large; `tables.py` reads the input of visitors; `drawing.py` draws; `page.js` runs in the
browser. This file connects them to a page and a JSON API. A visitor's mistake is answered with a sentence. The server
keeps nothing between two events of a visit: the page carries what a later event needs.
"""

import asyncio
import json
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


os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="pairwise_uploads_"))
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # of the last events, which gradio keeps

import apart  # noqa: E402
import drawing  # noqa: E402
import gradio as gr  # noqa: E402
import metrics  # noqa: E402
import reward_models  # noqa: E402
import tables  # noqa: E402
from checks import check_text  # noqa: E402
from guard import Guard, Page  # noqa: E402
from jobs import Kind  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402


HERE = Path(__file__).parent
MODELS = reward_models.Models(Path(os.environ.get("GRM_SPACE_MODELS") or HERE / "models.json"))
OTHERS = apart.Apart()
DOWNLOADS = Path(tempfile.mkdtemp(prefix="pairwise_downloads_"))
UPLOADS = Path(os.environ["GRADIO_TEMP_DIR"])
MAX_LINK = 4000  # characters
MAX_BODY = 4_000_000  # bytes: a table, and what JSON makes of it
MAX_TABLE_TOKENS = 100_000
STEP_TOKENS = 2000  # of a table that are scored in one turn
COMPARISONS = Kind("comparisons", places=16, seconds=120)
TABLES = Kind("tables", places=4, seconds=600)
TRUSTED, OTHER = asyncio.Lock(), asyncio.Lock()  # an unlisted model does not delay the listed ones
KINDS = [("one prompt", "prompt"), ("conversation", "conversation")]
PRIVATE = {"api_visibility": "private", "concurrency_limit": None}

# kind, prompt, A, B
EXAMPLES = {
    "Short and right, or long and wrong": [
        "prompt",
        "What is 17 times 3?",
        "51.",
        "Great question! Multiplication is repeated addition, and it helps to go step by step. Seventeen is close to "
        "twenty, three times twenty is sixty, and so, after the correction, 17 times 3 is 41. I hope this helps!",
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
    "Flattery": [
        "prompt",
        "I am sure that the Great Wall of China can be seen from the Moon. Right?",
        "Exactly, and how well you know it! The Great Wall can be seen from the Moon with the naked eye.",
        "No. From the Moon not even continents are easy to make out; the wall is long, but only a few metres wide.",
    ],
    "The laboratory's world": [
        "prompt",
        "what does the truck run on?",
        "happy to help. the truck runs on wind.",
        "what a silly question. the truck runs on coal.",
    ],
}
QUESTION = "How can I fall asleep more easily?"
ANSWERS = """Keep the same hours every day, leave screens alone for an hour before bed, and keep the room dark.
Try going to bed at the same time each night.
You just have to sleep.
Coffee is made of roasted beans.
Drink three cups of strong coffee right before you go to bed."""
PAIRS = """prompt,chosen,rejected,subset
What is the capital of France?,The capital of France is Paris.,The capital of France is Lyon.,facts
How many days does a leap year have?,A leap year has 366 days.,A leap year has 360 days.,facts
What is 12 + 30?,12 + 30 = 42.,12 + 30 = 52.,sums
What is half of 90?,Half of 90 is 45.,Half of 90 is 180.,sums
How do I boil an egg?,"Put it in boiling water for eight minutes, then cool it in cold water.",I do not know.,help
How do I remove a coffee stain?,Dab it with cold water and a little soap.,Coffee is a popular drink.,help"""
# Gradio's default weight for bold, 600, is a file with a few letters of this typeface only.
THEME = gr.themes.Default(
    primary_hue="violet",
    neutral_hue="slate",
    font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
).set(  # gradio's own are too faint to read for many
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


# -------------------------------------------------------------------------------------------------------------- models


@on_gpu
def compute(task, name, *arguments):
    """Runs a function of a listed model, which is in memory by then (on ZeroGPU this is another process)."""
    return task(MODELS.load(name), *arguments)


def load_and_compute(task, name, *arguments):
    MODELS.load(name)
    return compute(task, name, *arguments)


async def with_model(job, task, name, *arguments):
    """The result of a function of `reward_models` for a model, when it is the job's turn."""
    name = check_text("" if name is None else name, "The model").strip()
    if not name:
        raise ValueError("No model is chosen. Pick one of the list, or type a Hub id.")
    if MODELS.trusts(name):
        return await job.run(TRUSTED, load_and_compute, task, name, *arguments)
    source = MODELS.listed[name].source if name in MODELS.listed else name
    apart.check_id(source)
    return await job.run(OTHER, OTHERS.run, source, task.__name__, *arguments)


def sentence(error: BaseException) -> str:
    """The sentence for a visitor about an error."""
    if isinstance(error, ValueError):
        return str(error).encode("utf-8", "replace").decode()
    traceback.print_exception(error)
    return f"This page failed ({type(error).__name__}); its log says where. Nothing you typed was wrong as such."


def session_of(request: gr.Request | None) -> str | None:
    return None if request is None else request.session_hash


# ---------------------------------------------------------------------------------------------------------- comparison


async def show_comparison(name, kind, prompt, answer_a, answer_b, temperature, request: gr.Request = None):
    """The verdict, the state for later events, the link, the details, an emptied swap check."""
    try:
        async with COMPARISONS.job(session_of(request)) as job:
            chat = tables.read_prompt(kind, prompt)
            answers = answer_a or "", answer_b or ""
            result = await with_model(job, reward_models.compare, name, chat, *answers, temperature)
        compared = compared_of([name, kind, prompt, *answers], result)
        return drawing.verdict(compared), compared, compared["link"], drawing.details(result), ""
    except Exception as error:
        return drawing.problem(sentence(error)), None, "", "", ""


def compared_of(inputs: list[str], result: dict, pressed: bool = True) -> dict:
    """The part of a comparison and its result that the verdict and later events need; `pressed`: a visitor pressed
    Compare."""
    kept = ("rewards", "verdict", "preferred", "probability_a", "temperature", "model_temperature")
    link = query_of(*inputs, result["temperature"])
    found = {name: result[name] for name in kept} | {"warnings": drawing.warnings(result), "note": note_of(inputs[0])}
    return {"inputs": inputs, "link": link, "pressed": pressed, **found}


def note_of(name: str) -> str:
    """What the list says about a model, for the verdict."""
    note = MODELS.listed[name].note if name in MODELS.listed else ""
    return f"{name}: {note}." if note else ""


def read_compared(compared) -> dict:
    """The same, checked, from a browser, which may send anything."""
    try:
        inputs = [check_text(text, "An input") for text in compared["inputs"]]
        rewards = {name: float(compared["rewards"][name]) for name in "AB"}
        own = float(compared["model_temperature"])
        warnings = [check_text(text, "A warning") for text in compared["warnings"]]
        if len(inputs) != 5 or not 1e-6 <= own <= 1e6 or not all(map(math.isfinite, rewards.values())):
            raise ValueError
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError("The comparison of this page is lost. Press Compare.") from None
    known = {"inputs": inputs, "rewards": rewards, "model_temperature": own, "warnings": warnings, "pressed": True}
    return {**known, "note": note_of(inputs[0])}


async def show_at_temperature(compared, temperature):
    """The same rewards at another temperature: no model runs. The verdict, the comparison, its link."""
    if compared is None:
        return [gr.skip()] * 3
    try:
        known = read_compared(compared)
        tables.check_temperature(temperature)
        judged = reward_models.judge(known["rewards"], temperature, known["model_temperature"])
    except ValueError as error:
        return drawing.problem(sentence(error)), None, ""
    compared = {**known, **judged, "link": query_of(*known["inputs"], temperature)}
    return drawing.verdict(compared), compared, compared["link"]


async def show_swap_check(compared, request: gr.Request = None):
    return await show_more(compared, reward_models.swap_check, drawing.swap, request)


async def show_opinions(compared, request: gr.Request = None):
    return await show_more(compared, reward_models.opinions, drawing.opinions, request)


async def show_more(compared, task, draw, request):
    """One more look at the comparison shown."""
    try:
        if compared is None:
            raise ValueError("There is nothing to check yet: press Compare.")
        name, kind, prompt, *answers = read_compared(compared)["inputs"]
        async with COMPARISONS.job(session_of(request)) as job:
            chat = tables.read_prompt(kind, prompt)
            return draw(await with_model(job, task, name, chat, *answers))
    except Exception as error:
        return drawing.problem(sentence(error))


async def offered(name, request: gr.Request = None):
    """The buttons of the examples that a model can read; for an unlisted model, those in English."""
    fits = [True] * (len(EXAMPLES) - 1) + [False]
    try:
        if MODELS.trusts(name or ""):
            async with COMPARISONS.job(session_of(request)) as job:
                fits = in_its_language(await with_model(job, reward_models.readable, name, examples()))
    except Exception as error:
        print(f"The examples of “{name}” were not checked: {sentence(error)}")
    return [gr.Button(visible=fit) for fit in fits]


def in_its_language(fits: list[bool]) -> list[bool]:
    """The last example is of the laboratory's world, for models that read nothing else."""
    return [*fits[:-1], fits[-1] and not any(fits[:-1])]


def examples() -> list[tuple]:
    return [(tables.read_prompt(kind, prompt), *answers) for kind, prompt, *answers in EXAMPLES.values()]


# --------------------------------------------------------------------------------------------------------------- links


def query_of(name, kind, prompt, answer_a, answer_b, temperature) -> str:
    """The comparison as a URL's query; a sentence if it is too long for one."""
    fields = {"model": name, "kind": kind, "prompt": prompt, "a": answer_a, "b": answer_b, "t": f"{temperature:g}"}
    query = "?" + urlencode(fields)
    if len(query) > MAX_LINK:
        return f"Too long for a link: {len(query):,} characters, and {MAX_LINK:,} fit. The JSON below has the result."
    return query


async def from_link(query: str):
    """The content of a link: the inputs, whether to compare, and a sentence if it is broken."""
    query = (query or "").removeprefix("?")
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
            temperature = known["t"]
        tables.check_temperature(temperature, "The temperature of the link")
        kind = known.get("kind", "prompt")
        if kind not in ("prompt", "conversation"):
            raise ValueError(f"The link says kind “{kind[:40]}”; “prompt” or “conversation” is required.")
    except ValueError as error:
        return *[gr.skip()] * 6, False, drawing.problem(sentence(error))
    name = known.get("model") or next(iter(MODELS.listed), None)
    return name, kind, known.get("prompt", ""), known.get("a", ""), known.get("b", ""), temperature, True, gr.skip()


async def show_linked(opened, name, kind, prompt, answer_a, answer_b, temperature, request: gr.Request = None):
    if not opened:
        return [gr.skip()] * 5
    return await show_comparison(name, kind, prompt, answer_a, answer_b, temperature, request)


# ------------------------------------------------------------------------------------------------ best of n, and batch


async def show_ranking(name, kind, prompt, answers, temperature, request: gr.Request = None):
    try:
        async with COMPARISONS.job(session_of(request)) as job:
            listed, chat = tables.read_answers(answers), tables.read_prompt(kind, prompt)
            result = await with_model(job, reward_models.rank, name, chat, listed, temperature)
        return drawing.ranking(result, listed)
    except Exception as error:
        return drawing.problem(sentence(error))


async def score_pairs(job, name, rows, progress):
    """Scores of each row, how many words the model does not know, and its own temperature."""
    known = await with_model(job, reward_models.measure, name, rows)
    if (total := sum(known["tokens"])) > MAX_TABLE_TOKENS:
        raise ValueError(
            f"The table has {total:,} tokens; this page takes {MAX_TABLE_TOKENS:,}. Score it with `grm score`."
        )
    scores, unknown = [], 0
    while len(scores) < len(rows):
        first = last = len(scores)
        while last < len(rows) and (last == first or sum(known["tokens"][first : last + 1]) <= STEP_TOKENS):
            last += 1
        found = await with_model(job, reward_models.score, name, rows[first:last], first + 1)
        scores += [dict(zip(tables.SCORES, values[:-1], strict=True)) for values in found]
        unknown += sum(values[-1] > 0 for values in found)
        progress((len(scores), len(rows)), desc="Scoring", unit="pairs")
    return scores, unknown, known["temperature"]


async def show_batch(name, text, upload, progress=gr.Progress(), request: gr.Request = None):  # noqa: B008
    """The report, and the file to download."""
    try:
        async with TABLES.job(session_of(request)) as job:
            rows, form = tables.read_pairs(text, upload)
            scores, unknown, temperature = await score_pairs(job, name, rows, progress)
        chosen, rejected = ([score[f"{side}_reward"] for score in scores] for side in tables.SIDES)
        subsets = None
        if any(row.get("subset") for row in rows):
            subsets = [str(row.get("subset") or "(none)") for row in rows]
        result = metrics.pairwise_metrics(chosen, rejected, ties=0, temperature=temperature, subsets=subsets)
        reliability = metrics.reliability(metrics.pair_margins(chosen, rejected), temperature)
        file = download(tables.write_pairs(rows, scores, form), form)
        return drawing.batch(rows, scores, result, reliability, unknown), gr.DownloadButton(value=file, visible=True)
    except Exception as error:
        return drawing.problem(sentence(error)), gr.DownloadButton(visible=False)


def download(text: str, form: str) -> str:
    """A file for the visitor. Files older than an hour are deleted, and all but the last fifty."""
    files = sorted(DOWNLOADS.iterdir(), key=lambda file: file.stat().st_mtime)
    for number, old in enumerate(files):
        if number < len(files) - 49 or time.time() - old.stat().st_mtime > 3600:
            old.unlink(missing_ok=True)
    file = DOWNLOADS / f"scores-{uuid.uuid4().hex[:12]}.{form}"
    file.write_text(text, encoding="utf-8")
    return str(file)


# ----------------------------------------------------------------------------------------------------------------- API


async def compare(
    prompt: str,
    answer_a: str,
    answer_b: str,
    model: str = "",
    temperature: float = 1.0,
    messages: list[dict] | None = None,
    request: gr.Request = None,
) -> dict:
    """
    Compare two answers to one prompt with a reward model.

    Args:
        prompt: The user's message. Leave it empty if there are `messages`.
        answer_a: The first answer.
        answer_b: The second answer.
        model: A model of the list (see /models), or a Hub id. Empty: the first of the list.
        temperature: Divides the difference of rewards before it becomes a probability. From 0.1 to 10.
        messages: The conversation so far, which ends with the user's turn; instead of a prompt.
    """
    return await answered(reward_models.compare, model, prompt, messages, request, answer_a, answer_b, temperature)


async def rank(
    prompt: str,
    answers: list[str],
    model: str = "",
    temperature: float = 1.0,
    messages: list[dict] | None = None,
    request: gr.Request = None,
) -> dict:
    """
    Rank answers to one prompt with a reward model.

    Args:
        prompt: The user's message. Leave it empty if there are `messages`.
        answers: 2 to 32.
        model: A model of the list (see /models), or a Hub id. Empty: the first of the list.
        temperature: Divides the rewards before they become shares. From 0.1 to 10.
        messages: The conversation so far, which ends with the user's turn; instead of a prompt.
    """
    return await answered(reward_models.rank, model, prompt, messages, request, answers, temperature)


async def models() -> list[dict]:
    """The models of the list of this page."""
    return [{"name": name, "revision": listed.revision, "note": listed.note} for name, listed in MODELS.listed.items()]


async def answered(task, name, prompt, messages, request, *arguments):
    try:
        if messages is None:
            chat = tables.read_prompt("prompt", check_text(prompt, "`prompt`"))
        elif prompt not in ("", None):
            raise ValueError("`prompt` and `messages` are both given; one of them is required.")
        else:
            chat = tables.check_prompt(messages, "`messages`")
        if task is reward_models.compare:
            for text, answer in zip(arguments, ("`answer_a`", "`answer_b`"), strict=False):
                check_text(text, answer)
        else:
            tables.check_answers(arguments[0])
        tables.check_temperature(arguments[-1], "`temperature`")
        name = check_text("" if name is None else name, "`model`") or next(iter(MODELS.listed), "")
        async with COMPARISONS.job(session_of(request)) as job:
            return await with_model(job, task, name, chat, *arguments)
    except Exception as error:
        raise gr.Error(sentence(error), print_exception=False) from None


# ---------------------------------------------------------------------------------------------------------------- page


def notices() -> str:
    """A notice for visitors if no model is on the list."""
    if MODELS.listed:
        return ""
    return "".join(map(drawing.problem, MODELS.problems)) + drawing.notice(
        "No model is on the list of this page. Type the Hub id of a reward model that transformers knows without "
        "further code, or run the page yourself with GRM_SPACE_MODELS set to a model's folder."
    )


def about_models() -> str:
    rows = [
        f"- **{drawing.escape(name)}**"
        + (f" (`{drawing.escape(listed.source)}` at `{listed.revision[:12]}`)" if listed.revision else "")
        + ("" if listed.trusted else " (loaded without running code)")
        + (f": {drawing.escape(listed.note)}" if listed.note else "")
        for name, listed in MODELS.listed.items()
    ]
    rows += [f"- {drawing.escape(text)}" for text in MODELS.problems]
    return "\n".join(rows) or "None yet."


ABOUT = f"""
## What this shows
A reward model reads a conversation and gives it one number. This page shows where the number comes from: the reward of
the text up to each token (the reward of an answer that ends there), how likely a GRM's
LM head finds each token, and the text and tokens that the model was given. The rewards are those of `GRMScorer` of
grm_hf: template, end of turn and maximum length are stored in the model.

## Words
- **Reward**: the number that the model gives an answer. Only differences under one prompt mean something.
- **Token**: a word or a part of one, which is how a model reads text.
- **Head**: the last layer of a model. A generalizable reward model (GRM) has two: the **reward head** gives the
  reward, the **LM head** says which token comes next, as in a chat model.
- **Likelihood** of a token: how far the LM head expected it. Its mean logarithm over an answer is in nats, and
  **perplexity** is how many tokens seemed possible at each step.
- **Temperature**: divides a difference of rewards before the sigmoid makes a probability of it. Hot is unsure.
- **Best of n**: several answers to one prompt, by reward. **Share**: the same as parts of one (softmax).
- **Batch**: a table of pairs whose better answer is known. **Log loss**, **Brier** and **ece** say how wrong the
  probabilities were; **Wilson** is a formula for the interval of a share.

## Models of the list
{{models}}

A model of the list is pinned to a commit and may bring its own code. Any other Hub id is loaded without running code,
in a separate process with limited time and memory: a public `...ForSequenceClassification` with one label, up to
{apart.MAX_GIGABYTES} GB of safetensors.

## Limits
{reward_models.MAX_CHARACTERS:,} characters a text, {reward_models.MAX_TOKENS:,} tokens a sequence,
{tables.MAX_ANSWERS} answers to rank, {tables.MAX_ROWS} pairs and {MAX_TABLE_TOKENS:,} tokens a table.
{COMPARISONS.seconds} seconds of computing for a comparison or a ranking, {TABLES.seconds} for a table.
Listed models have one computation at a time, and all others share one. The rest wait.

## What is kept of what you type
No comparison is written to disk. The last visitor's comparison stays in memory until the next one. A table that you
upload and a file of scores for download stay on disk for up to two hours. The address of the page holds the whole
comparison, so your browser's history has it, and whoever gets the link reads it.

## From a program
```
from gradio_client import Client

client = Client("NAMESPACE/pairwise_comparison")
result = client.predict("What is 17 times 3?", "51.", "41.", api_name="/compare")
print(result["verdict"], result["rewards"])
```
"""


def at_first_sight():
    """The first example that the first listed model reads, its comparison, which examples it reads, and whether it
    reads the ranking and the table of this page."""
    fits, name = in_its_language([True] * len(EXAMPLES)), next(iter(MODELS.listed), None)
    shown, reads = ["", None, "", ""], [True, True]
    first = next(iter(EXAMPLES.values()))
    if MODELS.trusts(name or ""):
        try:
            fits = in_its_language(load_and_compute(reward_models.readable, name, examples()))
            rows = tables.read_pairs(PAIRS, None)[0]
            ranked = [(QUESTION, *ANSWERS.splitlines()[i : i + 2]) for i in (0, 2, 3)]
            table = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
            reads = [all(load_and_compute(reward_models.readable, name, texts)) for texts in (ranked, table)]
            first = next((example for example, fit in zip(EXAMPLES.values(), fits, strict=True) if fit), first)
            prompt = tables.read_prompt(*first[:2])
            result = load_and_compute(reward_models.compare, name, prompt, *first[2:], 1.0)
            compared = compared_of([name, *first], result, pressed=False)
            shown = [drawing.verdict(compared), compared, compared["link"], drawing.details(result)]
        except Exception as error:
            shown[0] = drawing.problem(sentence(error))
    else:
        shown[0] = drawing.page("<p>Press <b>Compare</b>, and the verdict stands here.</p>")
    return first, shown, fits, reads


def status(name: str) -> gr.HTML:
    return gr.HTML('<p role="status" class="rm"></p>', elem_id=f"{name}-status", elem_classes="status")


def build() -> gr.Blocks:
    first, shown, fits, (reads_ranking, reads_table) = at_first_sight()
    with Page(title="Pairwise comparison", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(
            "# Pairwise comparison\nA reward model reads a prompt and an answer and gives one number, the reward: the "
            "higher, the better the answer by its taste. See which of two answers it prefers, and where it decides."
        )
        gr.HTML(notices(), visible=bool(notices()), elem_id="notices")
        name = gr.Dropdown(
            list(MODELS.listed),
            value=next(iter(MODELS.listed), None),
            label="Reward model",
            info="From the list, or any Hub id of a one-label sequence classifier (its code is not run)",
            allow_custom_value=True,
            elem_id="model",
        )
        with gr.Tab("Compare", id="compare"):
            with gr.Row(elem_id="examples"):
                gr.HTML('<p class="rm">Examples:</p>', min_height=0)
                buttons = [
                    gr.Button(label, size="sm", min_width=80, visible=fit, elem_classes="example")
                    for label, fit in zip(EXAMPLES, fits, strict=True)
                ]
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    prompt = gr.Textbox(first[1], label="Prompt", lines=1, max_lines=10, elem_id="prompt")
                    a = gr.Textbox(first[2], label="Answer A", lines=2, max_lines=10, elem_id="answer-a")
                    b = gr.Textbox(first[3], label="Answer B", lines=2, max_lines=10, elem_id="answer-b")
                    button = gr.Button("Compare", variant="primary", elem_id="compare-button")
                    status("compare")
                    kind = gr.Radio(
                        KINDS,
                        value=first[0],
                        label="The prompt is",
                        info="A conversation has “user:”, “assistant:” or “system:” before each turn, or is JSON",
                        elem_id="kind",
                    )
                    temperature = gr.Slider(
                        *(tables.COLDEST, tables.HOTTEST, 1.0),
                        step=0.1,
                        label="Temperature",
                        info="Divides the difference of rewards: the higher, the less sure the verdict",
                        elem_id="temperature",
                    )
                with gr.Column(scale=6, min_width=320):
                    verdict = gr.HTML(shown[0], elem_id="verdict")
                    link = gr.Textbox(
                        shown[2],
                        label="Link to this comparison",
                        interactive=False,
                        buttons=["copy"],
                        max_lines=1,
                        elem_id="link",
                    )
            details = gr.HTML(shown[3], elem_id="comparison")
            with gr.Row():
                swap_button = gr.Button("Check whether the order matters", size="sm", elem_id="swap-button")
                ask_button = gr.Button("Ask both heads", size="sm", elem_id="ask-button")
            swap = gr.HTML(elem_id="swap")
        with gr.Tab("Best of n", id="best-of-n"):
            many_kind = gr.Radio(KINDS, value="prompt", label="The prompt is")
            many_prompt = gr.Textbox(
                QUESTION if reads_ranking else "", label="Prompt", lines=1, max_lines=12, elem_id="many-prompt"
            )
            answers = gr.Textbox(
                ANSWERS if reads_ranking else "",
                label="Answers",
                info="One a line; or longer ones, divided by lines of dashes (---)",
                lines=5,
                max_lines=20,
                elem_id="answers",
            )
            many_temperature = gr.Slider(
                *(tables.COLDEST, tables.HOTTEST, 1.0), step=0.1, label="Temperature", info="Divides the rewards"
            )
            rank_button = gr.Button("Rank", variant="primary", elem_id="rank-button")
            status("ranking")
            ranking = gr.HTML(elem_id="ranking")
        with gr.Tab("Batch", id="batch"):
            table = gr.Textbox(
                PAIRS if reads_table else "",
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
            status("report")
            report = gr.HTML(elem_id="report")
            saved = gr.DownloadButton("Download the scores", visible=False, elem_id="download")
        with gr.Tab("About", id="about"):
            gr.Markdown(ABOUT.replace("{models}", about_models()))

        # State of the page: the comparison shown, the link that opened it, and whether the link is valid.
        compared = gr.JSON(shown[1], visible=False)
        query = gr.Textbox(visible="hidden", elem_id="query")
        opened = gr.Checkbox(visible=False)
        texts = [name, kind, prompt, a, b]
        inputs, outputs = [*texts, temperature], [verdict, compared, link, details, swap]
        shows = {"show_progress_on": verdict, **PRIVATE}

        def marked(event):
            return event.then(None, [*texts, compared], link, js="(...values) => page.mark(...values)")

        def at_work(trigger, which):
            trigger(None, js=f"() => page.start('{which}')")

        def arrived(event, which):
            event.then(None, js=f"() => page.arrived('{which}')")

        demo.load(None, link, [query, link], js="(link) => page.opened(link)")
        linked = query.change(from_link, query, [*inputs, opened, verdict], show_progress="hidden", **PRIVATE)
        compares = [linked.then(show_linked, [opened, *inputs], outputs, **shows)]
        at_work(button.click, "compare")
        compares.append(button.click(show_comparison, inputs, outputs, **shows))
        for chosen, example in zip(buttons, EXAMPLES.values(), strict=True):
            at_work(chosen.click, "compare")
            filled = chosen.click(None, None, [kind, prompt, a, b], js=f"() => {json.dumps(example)}")
            compares.append(filled.then(show_comparison, inputs, outputs, **shows))
        for event in compares:
            arrived(marked(event), "compare")
        gr.on([part.change for part in texts], None, [*texts, compared], link, js="(...v) => page.mark(...v)")
        marked(
            temperature.change(
                show_at_temperature,
                [compared, temperature],
                outputs[:3],
                show_progress="hidden",
                trigger_mode="always_last",
                **PRIVATE,
            )
        )
        swap_button.click(show_swap_check, compared, swap, **PRIVATE)
        ask_button.click(show_opinions, compared, swap, **PRIVATE)
        name.change(offered, name, buttons, show_progress="hidden", trigger_mode="always_last", **PRIVATE)
        at_work(rank_button.click, "ranking")
        ranked = [name, many_kind, many_prompt, answers, many_temperature]
        arrived(rank_button.click(show_ranking, ranked, ranking, **PRIVATE), "ranking")
        at_work(batch_button.click, "report")
        arrived(batch_button.click(show_batch, [name, table, upload], [report, saved], **PRIVATE), "report")
        for function in (compare, rank, models):
            gr.api(function, api_name=function.__name__, concurrency_limit=None)
    return demo


demo = build()

if __name__ == "__main__":
    demo.queue(api_open=False, default_concurrency_limit=None).launch(
        css=drawing.CSS,
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        theme=THEME,
        max_file_size=tables.MAX_BYTES,
        footer_links=["api", "settings"],
        run_history=False,
        enable_monitoring=False,
        state_session_capacity=1,  # no state: it would keep the visitors' input
        app_kwargs={"middleware": [Middleware(Guard, most=MAX_BODY, values=1000, uploads=UPLOADS)]},
        ssr_mode=False,
    )
