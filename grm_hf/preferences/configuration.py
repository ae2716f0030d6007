"""A data set and its configurations, and what several of them make of a row: pairs, rated rows, shares of votes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..evaluation.examples import MESSAGES, NUMBER, TEXT, Kind, Row, Skipped, Source


STRENGTHS = range(-3, 4)  # of HelpSteer: below 0, the first response is the better one
TEXT_OR_NULL = Kind("text or null", lambda value: value is None or TEXT.holds(value))
OPTIONAL = Kind("a number or null", lambda value: value is None or NUMBER.holds(value))


@dataclass(frozen=True)
class Configuration:
    """
    One reading of a data set.

    Attributes:
        gives (`str`): What its rows are, for docs.
        rows (`Callable`): From an official row to rows of ours. What is left out becomes `Skipped`, with the reason.
        fields (`frozenset[str]`): Official fields that each row must have.
        numbers (`tuple[str, ...]`): Columns of numbers that the rows may have.
        splits (`dict[str, Source]`): Splits on the Hub.
        split_of (`Callable`, *optional*): The split that a row itself names.
    """

    gives: str
    rows: Callable[[Row], Iterator[dict | Skipped]]
    fields: frozenset[str]
    numbers: tuple[str, ...]
    splits: dict[str, Source]
    split_of: Callable[[Row], str] | None = None


@dataclass(frozen=True)
class DataSet:
    """
    A data set of the table `DATA_SETS`.

    Attributes:
        repo (`str`): Id on the Hub.
        licence (`str`): Licence of the data.
        configurations (`dict[str, Configuration]`): By name; the first is the default.
        revision (`str`, *optional*): The commit that is read. `None`: the newest one.
        trl_rows (`bool`): Whether the data on the Hub has TRL's columns already.
    """

    repo: str
    licence: str
    configurations: dict[str, Configuration]
    revision: str | None = None
    trl_rows: bool = False


def chat(row: Row, name: str) -> list[dict]:
    """The messages of a field, each a role and a text."""
    messages = [row.of(message) for message in row(name, MESSAGES)]
    return [{"role": message("role", TEXT), "content": message("content", TEXT)} for message in messages]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pair(prompt: list[dict], chosen: str | None, rejected: str | None, **numbers: float | None) -> dict | Skipped:
    """A pair, unless its responses are empty or equal."""
    if not (chosen and rejected and chosen.strip() and rejected.strip()):
        return Skipped("pairs with an empty response")
    if chosen == rejected:
        return Skipped("pairs of two equal responses")
    return {"prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected), **numbers}


def rated(prompt: list[dict], response: str | None, ratings: dict[str, float | None]) -> dict | Skipped:
    """A rated row, unless its response is empty or has no rating."""
    if not (response and response.strip()):
        return Skipped("responses without text")
    ratings = {name: None if value is None or math.isnan(value) else float(value) for name, value in ratings.items()}
    if all(value is None for value in ratings.values()):
        return Skipped("responses without a rating")
    return {"prompt": prompt, "completion": answer(response), **ratings}


def by_strength(prompt: list[dict], responses: tuple[str | None, str | None], strength: float) -> dict | Skipped:
    """The pair of a preference from -3 to 3, whose size is the margin."""
    if strength == 0:
        return Skipped("pairs whose preference is 0")
    if strength not in STRENGTHS:
        return Skipped("pairs whose preference is not from -3 to 3")
    chosen, rejected = responses if strength < 0 else responses[::-1]
    return pair(prompt, chosen, rejected, margin=float(abs(strength)))


def by_votes(prompt: list[dict], responses: tuple[str | None, str | None], votes: Sequence[float]) -> dict | Skipped:
    """The pair of several votes from -3 to 3. Its label is the share of votes for the response that more prefer; a
    vote of 0 is half a vote for each (2605.11865)."""
    if not votes:
        return Skipped("pairs without votes")
    if any(vote not in STRENGTHS for vote in votes):
        return Skipped("pairs with a vote that is not from -3 to 3")
    first = sum(1.0 if vote < 0 else 0.5 if vote == 0 else 0.0 for vote in votes) / len(votes)
    chosen, rejected = responses if first >= 0.5 else responses[::-1]
    return pair(prompt, chosen, rejected, label=max(first, 1 - first))
