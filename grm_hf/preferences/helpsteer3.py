"""HelpSteer3-Preference (2505.11475): preferences of up to three people between two responses to a chat."""

from ..evaluation.examples import MAPPINGS, NUMBER, Kind, Skipped, Source
from .configuration import TEXT_OR_NULL, Configuration, DataSet, by_strength, by_votes, chat


REPO = "nvidia/HelpSteer3"
NO_USER = Skipped("rows whose context does not end with the user")
VOTES = Kind("a list of mappings with `score`", lambda value: value == [] or MAPPINGS.holds(value))


def preference(row):
    context, strength = chat(row, "context"), row("overall_preference", NUMBER)
    responses = row("response1", TEXT_OR_NULL), row("response2", TEXT_OR_NULL)
    yield by_strength(context, responses, strength) if context[-1]["role"] == "user" else NO_USER


def labels(row):
    context, responses = chat(row, "context"), (row("response1", TEXT_OR_NULL), row("response2", TEXT_OR_NULL))
    votes = [row.of(vote)("score", NUMBER) for vote in row("individual_preference", VOTES)]
    yield by_votes(context, responses, votes) if context[-1]["role"] == "user" else NO_USER


COMPARED = frozenset({"context", "response1", "response2"})
SPLITS = {name: Source(REPO, "preference", name, name) for name in ("train", "validation")}
DATA_SETS = (
    DataSet(
        repo=REPO,
        licence="CC-BY-4.0",
        configurations={
            "preference": Configuration(
                "pairs; `margin` is the strength of the overall preference, 1 to 3",
                preference,
                COMPARED | {"overall_preference"},
                ("margin",),
                SPLITS,
            ),
            "labels": Configuration(
                "pairs; `label` is the share of the individual votes",
                labels,
                COMPARED | {"individual_preference"},
                ("label",),
                SPLITS,
            ),
        },
    ),
)
