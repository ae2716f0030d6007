"""Preference pairs from ratings by several factors in order of importance, as in HERON (arXiv 2309.02632)."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch


class RankedPair(NamedTuple):
    """Indices of the preferred and of the other answer, and the factor that decided."""

    chosen: int
    rejected: int
    factor: str


def factor_thresholds(
    ratings: Sequence[Mapping[str, float]], order: Sequence[str], multiplier: float = 0.5
) -> dict[str, float]:
    """
    The difference in a factor from which it decides between two answers: `multiplier` standard deviations of the
    factor over `ratings` (all answers to all prompts). The unit of a factor thus does not matter.

    Args:
        ratings (`Sequence[Mapping[str, float]]`):
            One number per factor for each answer.
        order (`Sequence[str]`):
            The factors.
        multiplier (`float`, *optional*, defaults to `0.5`):
            0 or more.
    """
    if multiplier < 0:
        raise ValueError(f"`multiplier` is {multiplier}; it must be 0 or more.")
    values = [_values(rating, order, index) for index, rating in enumerate(ratings)]
    if not values:
        raise ValueError("`ratings` is empty.")
    deviations = torch.tensor(values, dtype=torch.float64).std(0, correction=0)
    return {factor: multiplier * float(deviation) for factor, deviation in zip(order, deviations, strict=True)}


def hierarchical_pairs(
    ratings: Sequence[Mapping[str, float]], order: Sequence[str], thresholds: Mapping[str, float]
) -> tuple[list[RankedPair], list[tuple[int, int]]]:
    """
    Compare all answers to one prompt by ranked factors: the most important one decides if two answers differ in it by
    more than its threshold, else the next one, and so on.

    Args:
        ratings (`Sequence[Mapping[str, float]]`):
            One number per factor for each answer; more is better.
        order (`Sequence[str]`):
            The factors, the most important first.
        thresholds (`Mapping[str, float]`):
            Threshold of each factor, in its unit; see [`factor_thresholds`].

    Returns:
        `tuple[list[RankedPair], list[tuple[int, int]]]`: the pairs that a factor decides, and the pairs that no factor
        decides (HERON skips them).
    """
    values = [_values(rating, order, index) for index, rating in enumerate(ratings)]
    if missing := [factor for factor in order if factor not in thresholds]:
        raise ValueError(f"`thresholds` has none for {missing}; give one for each of {list(order)}.")
    if wrong := [factor for factor in order if not thresholds[factor] >= 0]:
        raise ValueError(f"the threshold of {wrong[0]!r} is {thresholds[wrong[0]]}; it must be 0 or more.")
    decided, skipped = [], []
    for a, b in combinations(range(len(values)), 2):
        for factor, first, second in zip(order, values[a], values[b], strict=True):
            if abs(first - second) > thresholds[factor]:
                decided.append(RankedPair(a, b, factor) if first > second else RankedPair(b, a, factor))
                break
        else:
            skipped.append((a, b))
    return decided, skipped


def _values(rating, order, index):
    values = [math.nan if rating.get(factor) is None else float(rating[factor]) for factor in order]
    if missing := [factor for factor, value in zip(order, values, strict=True) if not math.isfinite(value)]:
        raise ValueError(f"answer {index} has no rating for {missing} that is a finite number; found {dict(rating)}.")
    return values
