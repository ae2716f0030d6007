"""A suite: the source of its rows, their conversion to examples, and the figures of its scores. `aggregate` gives the
suite's own figures first, then those of every suite: an interval, ties, length, calibration."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..metrics import pair_wins, pairwise_metrics, strata_interval, wilson_interval
from .examples import Example, Row, Skipped, Source


class Part(NamedTuple):
    """
    A part of a headline. The headline is the weighted mean of its parts' means. A paired comparison of two models and
    every interval come from the same parts, so they belong exactly to the headline.

    Attributes:
        weight: Weight of the part's mean in the headline; weights are divided by their sum.
        values: The values to average.
        owners: Index of the example that each value belongs to.
    """

    weight: float
    values: list[float]
    owners: list[int]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


Figures = tuple[dict[str, float], dict[str, Part]]


@dataclass(frozen=True)
class Suite:
    """
    A suite of the table `SUITES`.

    Attributes:
        name: Name on the command line.
        measures: What it measures.
        headline: The meaning of `score`.
        ties: The rule for two equal scores.
        rows: Official numbers of rows, one for each official variant. Empty: not known here.
        licence: Licence of the data.
        url: Address of code and data.
        fields: Names of fields that each row has; one set for each kind of row.
        load: From rows to examples. A row that the suite's own rules leave out becomes `Skipped`.
        figures: Official figures of examples and scores, and the parts of the headline.
        parts: Parts without which the headline is not the official one.
        hub: The rows on the Hub. Empty: the files are at `url` only.
    """

    name: str
    measures: str
    headline: str
    ties: str
    rows: tuple[int, ...]
    licence: str
    url: str
    fields: tuple[frozenset[str], ...]
    load: Callable[[Iterable[Row]], Iterator[Example | Skipped]]
    figures: Callable[[Sequence[Example], Sequence[Sequence[float]]], Figures]
    parts: tuple[str, ...] = ()
    hub: tuple[Source, ...] = ()


def check_scores(examples: Sequence[Example], scores: Iterable) -> list[list[float]]:
    """Scores as lists of finite floats, one for each response."""
    scores = [[float(score) for score in row] for row in scores]
    if not examples:
        raise ValueError("there are no examples to aggregate.")
    if len(scores) != len(examples):
        raise ValueError(f"there are {len(examples)} examples and {len(scores)} lists of scores; one each is needed.")
    for number, (example, row) in enumerate(zip(examples, scores, strict=True)):
        check_row(number, example, row)
    return scores


def check_row(number: int, example: Example, scores: Sequence[float]) -> None:
    """Refuse scores of an example that are not finite, or not one for each response."""
    name = f"example {number} ({example.id!r})"
    if len(scores) != len(example.responses):
        raise ValueError(f"{name}: {len(example.responses)} responses and {len(scores)} scores; one each is needed.")
    if broken := [j for j, score in enumerate(scores) if not math.isfinite(score)]:
        raise ValueError(
            f"{name}: the score of response {broken[0]} is {scores[broken[0]]}, no finite number. The model's weights "
            "are broken, or overflow in its dtype."
        )


def headline(parts: dict[str, Part]) -> float:
    """The weighted mean of the parts' means."""
    return sum(part.weight * part.mean for part in parts.values()) / sum(part.weight for part in parts.values())


def interval(examples: Sequence[Example], parts: dict[str, Part]) -> tuple[float, float] | None:
    """95 % interval of the headline, from groups of examples (prompts) drawn with replacement; `None` for one
    group."""
    groups = [examples[owner].group for part in parts.values() for owner in part.owners]
    if len(set(groups)) < 2:
        return None
    strata = [name for name, part in parts.items() for _ in part.values]
    values = [value for part in parts.values() for value in part.values]
    weights = {name: part.weight for name, part in parts.items()}
    low, high = strata_interval(values, strata, weights, groups)
    score = headline(parts)
    if set(values) in ({0.0}, {1.0}):  # drawing again from equal values shows no spread: Wilson's, for as many prompts
        low, high = wilson_interval(score * len(set(groups)), len(set(groups)))
    return min(low, score), max(high, score)  # rounding must not push the interval off the score


def aggregate_with(suite: Suite, examples: Sequence[Example], scores: Iterable) -> dict[str, float]:
    """See [`grm_hf.evaluation.aggregate`]."""
    scores = check_scores(examples, scores)
    figures, parts = suite.figures(examples, scores)
    result = {"score": headline(parts)}
    if ends := interval(examples, parts):
        result["score_low"], result["score_high"] = ends
    result |= figures
    result["n"] = float(len(examples))
    complete = set(suite.parts) <= set(parts) and (not suite.rows or len(examples) in suite.rows)
    result["complete"] = float(complete)
    return result | _pairs(examples, scores)


def _pairs(examples, scores):
    """Ties, accuracy by difference of length, and calibration, over the pairs of all examples."""
    better, worse, lengths = [], [], []
    for example, row in zip(examples, scores, strict=True):
        characters = [example.length(j) for j in range(len(row))]
        for i, j in example.pairs:
            better.append(row[i])
            worse.append(row[j])
            lengths.append((characters[i], characters[j]))
    if not better:
        raise ValueError("no example has a right and a wrong response, so there is nothing to compare.")
    first, second = zip(*lengths, strict=True)
    measured = pairwise_metrics(better, worse, ties=0, chosen_lengths=first, rejected_lengths=second)
    measured["ties"] = float(round(measured.pop("tie_rate") * len(better)))
    return {f"pairs/{name}": x for name, x in measured.items() if not name.startswith("accuracy_ci")}


# ------------------------------------------------------------------------------------------- what several families use


def wins_of(examples: Sequence[Example], scores: Sequence[Sequence[float]]) -> list[float]:
    """1 for each example in which a right response is above every wrong one; a tie counts as wrong."""
    margins = [
        max(row[i] for i in example.correct) - max(row[j] for j in example.wrong)
        for example, row in zip(examples, scores, strict=True)
    ]
    return pair_wins(margins, ties=0).tolist()


def parts_by(names: Iterable[str], values: Iterable[float], weight: float | None = None) -> dict[str, Part]:
    """A part for each name, with a value for each example. Without a weight, a part weighs by its number of examples:
    the headline is the mean over all examples."""
    parts: dict[str, Part] = {}
    for owner, (name, value) in enumerate(zip(names, values, strict=True)):
        part = parts.setdefault(name, Part(weight or 0.0, [], []))
        part.values.append(value)
        part.owners.append(owner)
    return {name: part._replace(weight=weight or len(part.values)) for name, part in parts.items()}


def subset_figures(parts: dict[str, Part]) -> dict[str, float]:
    return {f"subset/{name}": part.mean for name, part in parts.items()}
