"""HelpSteer2 (2406.08673): responses rated by people on five attributes, and preferences between two responses to a
prompt (2410.01257)."""

import re

from ..evaluation.examples import MAPPINGS, NUMBER, TEXT, Kind, Skipped, Source, one_of
from .configuration import OPTIONAL, TEXT_OR_NULL, Configuration, DataSet, by_strength, by_votes, rated


REPO = "nvidia/HelpSteer2"
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
SPLITS = {"train": "train", "val": "validation", "validation": "validation"}
VOTES = Kind("a list of mappings with `strength`", lambda value: value == [] or MAPPINGS.holds(value))
NO_USER = Skipped("rows whose prompt does not alternate between user and assistant, or does not end with the user")


def messages(prompt: str) -> list[dict] | None:
    """The turns of a prompt: text of the user, then `<extra_id_1>Assistant` and `<extra_id_1>User` before a turn each.
    `None` if they do not alternate, or if the last is not the user's."""
    first, *rest = TURN.split(prompt)
    turns = [("user", first), *((role.lower(), text) for role, text in zip(rest[::2], rest[1::2], strict=True))]
    alternate = all(role == ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns))
    if not alternate or len(turns) % 2 == 0 or any("<extra_id_1>" in text for _, text in turns):
        return None
    return [{"role": role, "content": text} for role, text in turns]


def ratings(row):
    prompt = messages(row("prompt", TEXT))
    values = {name: row(name, OPTIONAL) for name in ATTRIBUTES}
    yield NO_USER if prompt is None else rated(prompt, row("response", TEXT_OR_NULL), values)


def preference(row):
    prompt, strength = messages(row("prompt", TEXT)), row("preference_strength", NUMBER)
    responses = row("response_1", TEXT_OR_NULL), row("response_2", TEXT_OR_NULL)
    yield NO_USER if prompt is None else by_strength(prompt, responses, strength)


def labels(row):
    prompt = messages(row("prompt", TEXT))
    votes = [row.of(vote)("strength", NUMBER) for vote in row("three_most_similar_preferences", VOTES)]
    responses = row("response_1", TEXT_OR_NULL), row("response_2", TEXT_OR_NULL)
    yield NO_USER if prompt is None else by_votes(prompt, responses, votes)


def split_of(row):
    return SPLITS[row("split", one_of(*SPLITS))]


COMPARED = frozenset({"prompt", "response_1", "response_2", "preference_strength"})
# Both splits lie in one file, and each row names its own.
PREFERENCES = {name: Source(REPO, None, "train", "preference", "preference") for name in ("train", "validation")}
DATA_SETS = (
    DataSet(
        repo=REPO,
        licence="CC-BY-4.0",
        revision="990b2711a36180dd19d9c94b8627844866f8982a",
        configurations={
            "preference": Configuration(
                "pairs; `margin` is the strength of the preference, 1 to 3",
                preference,
                COMPARED,
                ("margin",),
                PREFERENCES,
                split_of,
            ),
            "labels": Configuration(
                "pairs; `label` is the share of the three most similar votes",
                labels,
                COMPARED | {"three_most_similar_preferences"},
                ("label",),
                PREFERENCES,
                split_of,
            ),
            "ratings": Configuration(
                "rated rows; five attributes from 0 to 4",
                ratings,
                frozenset({"prompt", "response", *ATTRIBUTES}),
                ATTRIBUTES,
                {name: Source(REPO, None, name, name) for name in ("train", "validation")},
            ),
        },
    ),
)
