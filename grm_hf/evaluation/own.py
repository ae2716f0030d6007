"""Your own rows, in any of TRL's formats: pairs (explicit or implicit prompt, text or messages), lists with several
chosen or rejected responses, and unpaired rows with a label, which are grouped by their prompt."""

import json

from .examples import PROMPT, Example, Kind, split_conversations, turns
from .suite import Suite, parts_by, subset_figures, wins_of


LABEL = Kind("true or false", lambda value: value in (True, False, 0, 1))


def load(rows):
    unpaired: dict[str, dict] = {}
    for row in rows:
        meta = {key: row.values[key] for key in ("tools", "chat_template_kwargs") if key in row}
        subset, name = str(row.values.get("subset") or ""), str(row.values.get("id", f"{row.file}/{row.number}"))
        if "completion" in row or "label" in row:
            key = json.dumps(row.values.get("prompt"), ensure_ascii=False, default=str)
            group = unpaired.setdefault(key, {"row": row, "meta": meta, "subset": subset, "id": name, "texts": []})
            group["texts"].append((_response(row, "completion"), bool(row("label", LABEL))))
            continue
        sides = [_responses(row, side) for side in ("chosen", "rejected")]
        yield _example(row, sides, subset, name, meta)
    for group in unpaired.values():
        sides = [[text for text, label in group["texts"] if label is wanted] for wanted in (True, False)]
        if not all(sides):
            raise group["row"].error(
                f"its prompt has {len(sides[0])} right and {len(sides[1])} wrong completions; at least one of each is "
                "required"
            )
        yield _example(group["row"], sides, group["subset"], group["id"], group["meta"])


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
    if isinstance(responses[0], str) and (not prompt or isinstance(prompt, str)):
        # Text is text, as in training: it is not put into a chat template.
        meta = {**meta, "group": prompt or f"{row.file}/{row.number}"}
        return Example("", [(prompt or "") + response for response in responses], correct, subset, name, meta)
    if isinstance(prompt, str):
        raise row.error("`prompt` is text and the responses are messages; text for both, or messages, are required")
    if isinstance(responses[0], str):
        return Example(turns(prompt), responses, correct, subset, name, meta)
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
