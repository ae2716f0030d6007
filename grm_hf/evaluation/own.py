"""Your own rows, in any of TRL's formats: pairs (explicit or implicit prompt, text or messages), lists with several
chosen or rejected responses, and unpaired rows with a label, which are grouped by their prompt."""

import json

from ..pairs import warn_of_texts
from .examples import PROMPT, Example, Kind, Skipped, split_conversations, turns
from .suite import Suite, parts_by, subset_figures, wins_of


WORDS = {"true": True, "false": False, "1": True, "0": False}  # in CSV
LABEL = Kind("true or false", lambda value: value in (True, False, 0, 1) or str(value).lower() in WORDS)


def load(rows):
    unpaired: dict[str, dict] = {}
    warned = False
    for row in rows:
        meta = {key: row.values[key] for key in ("tools", "chat_template_kwargs") if key in row}
        subset = str(row.values["subset"]) if "subset" in row else ""
        name = str(row.values["id"]) if "id" in row else f"{row.file}/{row.number}"
        if "chosen" not in row and ("completion" in row or "label" in row):
            # What else the model reads, or the figures go by, tells groups of one prompt apart.
            key = json.dumps([row.values.get("prompt"), meta, subset], ensure_ascii=False, default=str)
            group = unpaired.setdefault(key, {"row": row, "meta": meta, "subset": subset, "id": name, "texts": []})
            label = row("label", LABEL)
            label = WORDS[label.lower()] if isinstance(label, str) else bool(label)
            group["texts"].append((_response(row, "completion"), label))
            continue
        sides = [_responses(row, side) for side in ("chosen", "rejected")]
        share = _share(row)
        if share == 0.5:
            yield Skipped("their `label` is 0.5, so neither side is preferred")
            continue
        if share < 0.5:
            sides.reverse()
        texts = [response for side in sides for response in side]
        if not warned and all(isinstance(text, str) for text in texts):
            prompt = row.values.get("prompt")
            if prompt is None or isinstance(prompt, str):
                warn_of_texts(prompt or "", texts, "`chosen` and `rejected`", row.file)
                warned = True
        yield _example(row, sides, subset, name, meta)
    for group in unpaired.values():
        sides = [[text for text, label in group["texts"] if label is wanted] for wanted in (True, False)]
        if not all(sides):
            raise group["row"].error(
                f"its prompt has {len(sides[0])} right and {len(sides[1])} wrong completions; at least one of each is "
                "required"
            )
        yield _example(group["row"], sides, group["subset"], group["id"], group["meta"])


def _share(row) -> float:
    """The share of annotators who preferred `chosen`, as in training; 1 where there is no label."""
    label = row.values.get("label")
    try:
        share = 1.0 if label is None else float(label)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise row.error(f"`label` is {label!r}; beside `chosen` and `rejected` it is a share from 0 to 1")
    return share


def _responses(row, side):
    value = row.values.get(side)
    if isinstance(value, list) and value and not isinstance(value[0], dict):  # several responses
        return [_response(row, side, item) for item in value]
    return [_response(row, side)]


def _response(row, side, value=None):
    value = row(side, PROMPT) if value is None else value
    if not PROMPT.holds(value):
        raise row.error(f"`{side}` holds a response that is neither text nor messages")
    return value if isinstance(value, str) else turns(value)


def _example(row, sides, subset, name, meta):
    prompt = row.values.get("prompt")
    if prompt not in (None, ""):
        prompt = row("prompt", PROMPT)
    responses = [response for side in sides for response in side]
    if len({isinstance(response, str) for response in responses}) > 1:
        raise row.error("some responses are text and some are messages; one of the two is required")
    correct = list(range(len(sides[0])))
    if isinstance(prompt, str) and not any(isinstance(response, str) for response in responses):
        prompt = None  # as in training: the prompt once more, as text, beside whole conversations
    if isinstance(responses[0], str) and (not prompt or isinstance(prompt, str)):
        # Text is text, as in training: it is not put into a chat template.
        meta = {**meta, "group": prompt or f"{row.file}/{row.number}"}
        return Example("", [(prompt or "") + response for response in responses], correct, subset, name, meta)
    if isinstance(responses[0], str):
        return Example(turns(prompt), responses, correct, subset, name, meta)
    if prompt and any(response[0]["role"] != "assistant" for response in responses):
        raise row.error(
            f"there is a `prompt`, and a response begins with the role {responses[0][0]['role']!r}. If the messages "
            "repeat the prompt, remove the field `prompt`"
        )
    prompt, responses = split_conversations([[*(prompt or []), *response] for response in responses])
    return Example(prompt, responses, correct, subset, name, meta)


def figures(examples, scores):
    wins = wins_of(examples, scores)
    parts = parts_by((example.subset for example in examples), wins)
    return subset_figures(parts) if list(parts) != [""] else {}, parts


SUITES = (
    Suite(
        name="own",
        measures="your own pairs or lists (`--data`)",
        headline="share of rows whose best response is a right one",
        ties="wrong",
        rows=(),
        licence="yours",
        url="",
        fields=(frozenset({"chosen", "rejected"}), frozenset({"completion", "label"})),
        load=load,
        figures=figures,
    ),
)
