"""Weights of attributes from preferences: logistic regression of pairs on the differences of their attributes."""

import warnings
from collections.abc import Iterable

import torch
from torch.nn.functional import logsigmoid

from ..chats import rows_of
from ..pairs import labels_of
from .scorer import GRMScorer


STEPS = 25


def fit_attribute_weights(scorer: GRMScorer, pairs: Iterable[dict]) -> dict[str, float]:
    r"""
    Fit the weights with which attributes explain preferences, and make their sum the model's reward.

    The weights `w` maximise `sum log sigmoid(w (a_c - a_r))` over the pairs, without an intercept and without a
    penalty; a pair with a soft `label` counts for both sides. The reward's scale is then that of Bradley-Terry. A
    reward head of its own, or a gate, is dropped, and so is what the configuration says of the rewards before (mean,
    standard deviation, temperature, signals). The change is in memory: save the model and its golden rows afterwards.

    Args:
        scorer ([`GRMScorer`]):
            Of a model with attributes.
        pairs (`Iterable[dict]`):
            As for [`GRMScorer.score_pairs`]; and `label`, the share of annotators who preferred `chosen`.

    Returns:
        `dict[str, float]`: the weight of each attribute. They are in `scorer.model.config` too.

    Raises:
        `ValueError`: the model has no attributes, or combines them otherwise than by a sum; there are no pairs, or
        ties alone; a `label` is not from 0 to 1; or the attributes do not differ in any of them.
    """
    if (combiner := getattr(scorer.model.config, "attribute_combiner", "sum")) != "sum":
        raise ValueError(
            "Weights are fitted for attribute_combiner='sum', in which a difference of rewards is a sum of "
            f"differences; this model has {combiner!r}."
        )
    pairs = list(rows_of(pairs, "row"))
    labels = labels_of(pairs, "fitting")
    attributes = scorer.attributes_of_pairs(pairs)
    if not attributes:
        raise ValueError("There are no pairs to fit the weights on.")
    if all(label == 0.5 for label in labels):
        raise ValueError("Every pair is a tie (its label is 0.5), so all weights would be 0 and all rewards equal.")
    names = scorer.model.config.attribute_names
    x = torch.tensor([[a[name] - b[name] for name in names] for a, b in attributes], dtype=torch.float64)
    scale = x.square().mean(0).sqrt()
    if not scale.any():
        raise ValueError("The attributes of chosen and rejected are the same in every pair: nothing can be fitted.")
    scale = torch.where(scale > 0, scale, 1.0)
    share = torch.tensor(labels, dtype=torch.float64)
    weights, settled = _newton(x / scale, share, 0.0)
    if not settled:
        warnings.warn(
            "The attributes separate chosen from rejected without an error (or nearly): no finite weights are best. "
            "Those of a penalty of half their squared length, with attributes scaled to their mean square, are taken. "
            "Give more pairs.",
            stacklevel=2,
        )
        weights, _ = _newton(x / scale, share, 1.0)
    fitted = (weights / scale).tolist()
    scorer.model.fix_attribute_weights(fitted)
    return dict(zip(names, fitted, strict=True))


def _newton(x: torch.Tensor, share: torch.Tensor, penalty: float) -> tuple[torch.Tensor, bool]:
    """The minimum of the cross-entropy plus `penalty / 2 * w^2`, and whether the steps came to rest there."""

    def loss(weights):
        z = x @ weights
        return -(share * logsigmoid(z) + (1 - share) * logsigmoid(-z)).sum() + penalty / 2 * weights @ weights

    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(STEPS):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - share) + penalty * weights
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
        step = torch.linalg.pinv(hessian, hermitian=True) @ gradient
        size, here = 1.0, loss(weights)
        while loss(weights - size * step) > here and size > 1e-8:
            size /= 2
        weights = weights - size * step
        if step.abs().max() < 1e-8:
            return weights, True
    return weights, False
