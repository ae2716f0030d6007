"""The attributes in training: ratings beside pairs, rated completions between them, and the squared error of both.

A rated completion is in a batch as a pair whose rejected side is one token (`grm_hf.pairs`). It counts for the
attributes alone.
"""

import math
import warnings
from collections.abc import Callable

import torch
from datasets import IterableDataset

from .. import losses


COLUMNS = ("is_pair", "chosen_ratings", "rejected_ratings")


def check_ratings(dataset, config, weight) -> None:
    """
    Refuses training data that leave one of several attributes without any rating; warns if ratings are there and do
    not count, or if nothing at all trains the attributes.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prepared rows. Nothing is known of a stream.
        config ([`GRMConfig`]):
            Of the model, with its attributes.
        weight (`float`):
            That of their squared error.
    """
    names = config.attribute_names
    if names is None or isinstance(dataset, IterableDataset):
        return
    rated = [False] * len(names)
    for rows in dataset.select_columns(list(COLUMNS[1:])).iter(batch_size=1000):
        for ratings in (*rows["chosen_ratings"], *rows["rejected_ratings"]):
            rated = [found or not math.isnan(rating) for found, rating in zip(rated, ratings, strict=True)]
    if not any(rated):
        if config.attribute_weights is None:  # otherwise pairs train them, through the reward
            warnings.warn(
                f"Nothing trains the attributes {', '.join(names)}: no row of the train dataset rates them, and the "
                "reward is not made of them. A rated completion has columns of these names, a pair `chosen_` and "
                "`rejected_` before them.",
                stacklevel=2,
            )
        return
    if weight == 0:
        warnings.warn("The ratings in the data are ignored: attribute_loss_weight is 0.", stacklevel=2)
    if empty := [name for name, found in zip(names, rated, strict=True) if not found]:
        raise ValueError(
            f"No row of the train dataset, from row 0 to row {len(dataset) - 1}, rates {', '.join(empty)}, which the "
            "model has among its attributes. A rated completion has a column of this name, a pair `chosen_` and "
            "`rejected_` before it: rename the columns, or leave the name out of `attribute_names`."
        )


def only_pairs(values: torch.Tensor, inputs: dict) -> torch.Tensor:
    """The values `(B,)` of a batch, 0 for a rated completion."""
    return values * inputs["is_pair"].to(values.dtype) if "is_pair" in inputs else values


def of_pairs(values: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Of the values `(B,)` of a batch those of its pairs."""
    return values[inputs["is_pair"] > 0] if "is_pair" in inputs else values


def over_pairs(function: Callable, chosen: torch.Tensor, rejected: torch.Tensor, inputs: dict) -> torch.Tensor:
    """`function(chosen, rejected)` of the pairs of a batch, `(B,)`, 0 for a rated completion."""
    values = function(of_pairs(chosen, inputs), of_pairs(rejected, inputs))
    if "is_pair" not in inputs:
        return values
    return torch.zeros_like(chosen).masked_scatter(inputs["is_pair"] > 0, values.to(chosen.dtype))


def error(attributes: torch.Tensor, inputs: dict, names: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The squared error of a batch.

    Args:
        attributes (`torch.Tensor` of shape `(2B, K)`):
            What the model gives.
        inputs (`dict`):
            The batch; without `ratings` there is nothing to compare with.
        names (`list[str]`):
            The attributes.

    Returns:
        `tuple[torch.Tensor, dict]`: [`~grm_hf.losses.attribute_loss`], `(B,)`, and columns for the averages.
    """
    ratings = inputs.get("ratings")
    ratings = torch.full_like(attributes, torch.nan) if ratings is None else ratings.to(attributes.dtype)
    loss = losses.attribute_loss(attributes, ratings)
    columns = {"attribute_loss": loss}
    for i, name in enumerate(names):
        squares = (attributes[:, i] - ratings[:, i]).detach() ** 2
        columns[f"mse_{name}"] = squares.nan_to_num(0.0).view(2, -1).sum(0)
        columns[f"ratings_{name}"] = (~ratings[:, i].isnan()).to(squares.dtype).view(2, -1).sum(0)
    return loss, columns
