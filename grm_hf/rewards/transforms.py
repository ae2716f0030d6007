"""Transforms of rewards for the training of a policy: pure functions on tensors (or lists of numbers), and
[`Transform`], which applies one of them by name with the statistics that the reward model stores.

A transform that rises with the reward keeps rankings. It changes how much one answer counts against another.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


if TYPE_CHECKING:
    from ..configuration_grm import GRMConfig

TRANSFORMS = ("center", "standardize", "log_sigmoid", "clip", "length_residual")


def as_tensor(values: Any) -> Tensor:
    """Numbers as a tensor: a tensor unchanged, anything else in float64."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)


def center(rewards, mean: float) -> Tensor:
    """Rewards minus a mean, of the same shape: 0 is then an average answer."""
    return as_tensor(rewards) - mean


def standardize(rewards, mean: float, std: float) -> Tensor:
    """Rewards minus a mean, over a standard deviation, of the same shape. Raises `ValueError` unless `std` > 0."""
    if not std > 0:
        raise ValueError(f"`std` is {std}; a standard deviation to divide by must be greater than 0.")
    return (as_tensor(rewards) - mean) / std


def reference_reward(samples, quantile: float = 0.85) -> Tensor:
    """
    The reward that an answer has to beat: a quantile of the rewards of a reference policy's answers (arXiv
    2402.00742).

    Args:
        samples (`torch.Tensor` of shape `(..., num_samples)`):
            Rewards of those answers: one row per prompt, or all in one for a pooled reference.
        quantile (`float`, *optional*, defaults to `0.85`):
            Between 0 and 1.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return torch.quantile(as_tensor(samples), quantile, dim=-1)


def log_sigmoid(rewards, reference) -> Tensor:
    """
    `log sigmoid(reward - reference)`: under the Bradley-Terry model, the log-probability of beating the reference
    answer (arXiv 2402.00742). It gains little above the reference, where rewards are hacked, and falls linearly below
    it.

    Args:
        rewards (`torch.Tensor` of any shape):
            Rewards.
        reference (`float` or `torch.Tensor`):
            Reference reward, one for all or one per reward; see [`reference_reward`].

    Returns:
        `torch.Tensor` of that shape, at most 0; `-log 2` at the reference.
    """
    return logsigmoid(as_tensor(rewards) - as_tensor(reference))


def logical_and(rewards, references) -> Tensor:
    """
    Sum of the log-sigmoids of several properties: the log-probability that an answer beats the reference in all of
    them, if they are independent (arXiv 2402.00742). A property that is far above its reference cannot
    make up for one that is far below.

    Args:
        rewards (`torch.Tensor` of shape `(num_properties, n)`):
            Rewards by property.
        references (`torch.Tensor` of shape `(num_properties,)` or `(num_properties, n)`):
            Their references.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    rewards, references = as_tensor(rewards), as_tensor(references)
    if rewards.dim() != 2 or references.shape not in (rewards.shape, rewards.shape[:1]):
        raise ValueError(
            f"`rewards` are {tuple(rewards.shape)} and `references` {tuple(references.shape)}; they must be "
            "(properties, n) and (properties,) or (properties, n)."
        )
    return log_sigmoid(rewards, references.reshape(len(rewards), -1)).sum(0)


def clip(rewards, threshold: float) -> Tensor:
    """`min(reward - threshold, 0)`, of the same shape: nothing is earned above the threshold. The Clip mechanism for
    step rewards (arXiv 2410.15115), where the threshold is chosen so that most steps get 0."""
    return (as_tensor(rewards) - threshold).clamp(max=0)


def delta(rewards) -> Tensor:
    """
    The Delta mechanism for step rewards (arXiv 2410.15115): each step earns its reward minus that of the next step,
    the last but one its own reward, the last nothing (the answer's success is rewarded there). The sum from any step
    on is that step's reward, so repeating good steps earns nothing.

    Args:
        rewards (`torch.Tensor` of shape `(..., num_steps)`):
            Rewards of the steps of one solution, in order.

    Returns:
        `torch.Tensor` of that shape.
    """
    rewards = as_tensor(rewards)
    changed = torch.zeros_like(rewards)
    changed[..., :-1] = rewards[..., :-1]
    changed[..., :-2] -= rewards[..., 1:-1]
    return changed


def length_residual(rewards, lengths, groups: Sequence | None = None) -> Tensor:
    """
    Rewards without the part that a line through the lengths explains: `reward - slope * (length - mean length)`. The
    slope is fitted by least squares within groups. The result is uncorrelated with length in these rewards and keeps
    the mean of each group. Few rewards give an accidental slope: use it on large batches.

    Args:
        rewards (`torch.Tensor` of shape `(n,)`):
            Rewards.
        lengths (`torch.Tensor` of shape `(n,)`):
            Lengths, in any unit. If all are equal, the rewards do not change.
        groups (`Sequence` of length `n`, *optional*):
            The group of each reward, such as its prompt: only differences within a group count. Default: one group.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    rewards = as_tensor(rewards)
    lengths = as_tensor(lengths).to(rewards)
    if rewards.dim() != 1 or lengths.shape != rewards.shape:
        raise ValueError(f"{tuple(rewards.shape)} rewards and {tuple(lengths.shape)} lengths; both must be (n,).")
    groups = [0] * len(rewards) if groups is None else groups
    if len(groups) != len(rewards):
        raise ValueError(f"{len(groups)} groups for {len(rewards)} rewards; there must be one each.")
    numbers: dict = {}
    index = torch.tensor([numbers.setdefault(repr(group), len(numbers)) for group in groups])
    index = index.long().to(rewards.device)
    size = torch.bincount(index, minlength=len(numbers)).to(rewards)

    def centred(values):
        return values - (torch.zeros_like(size).index_add_(0, index, values) / size)[index]

    x, y = centred(lengths), centred(rewards)
    variance = x @ x
    slope = (x @ y) / variance if variance > 0 else variance
    return rewards - slope * x


class Transform:
    """
    A transform by name, or the user's function. It is checked when it is made, and applied to batches of rewards.

    Args:
        how (`str`, `Callable` or `None`):
            `"center"` and `"standardize"` (by the mean and standard deviation that the model stores), `"log_sigmoid"`
            (against `reference`; the stored mean if left out), `"clip"` (at `reference`), `"length_residual"` (fitted
            on each batch), a function from rewards `(n,)` to rewards `(n,)`, or `None` for raw rewards.
        config ([`GRMConfig`], *optional*):
            Where `reward_mean` and `reward_std` are stored.
        reference (`float`, *optional*):
            Reference reward of `"log_sigmoid"`, threshold of `"clip"`.

    Raises:
        `ValueError`: for a name that is not known, for statistics that no training or evaluation has stored, or for a
            reference that is missing or would be ignored.
    """

    def __init__(self, how: str | Callable | None, config: "GRMConfig | None" = None, reference: float | None = None):
        self.how, self.reference = how, reference
        if how is not None and not callable(how) and how not in TRANSFORMS:
            raise ValueError(f"`transform` is {how!r}; it must be one of {TRANSFORMS} or a function.")
        if reference is not None and how not in ("log_sigmoid", "clip"):
            raise ValueError(f"`reference` belongs to 'log_sigmoid' and 'clip'; with transform={how!r} leave it out.")
        if reference is not None and not math.isfinite(reference):
            raise ValueError(f"`reference` is {reference}; it must be a finite number.")
        self.mean: float = getattr(config, "reward_mean", 0.0)
        self.std: float = getattr(config, "reward_std", 1.0)
        stored = (self.mean, self.std) != (0.0, 1.0)
        if how in ("center", "standardize") and not stored:
            raise ValueError(
                f"transform={how!r} needs the mean and standard deviation of the reward, and the model stores none. "
                "Training with an evaluation set stores them; else set `model.config.reward_mean` and `.reward_std`, "
                "measured over answers of your policy."
            )
        if how == "clip" and reference is None:
            raise ValueError("transform='clip' needs `reference`, the reward above which nothing more is earned.")
        if how == "log_sigmoid" and reference is None:
            if not stored:
                raise ValueError(
                    "transform='log_sigmoid' needs `reference`, the reward to beat (`reference_reward` computes it "
                    "from answers of your first policy); the model stores no mean reward to use instead."
                )
            self.reference = self.mean

    def __call__(self, rewards, lengths=None, groups: Sequence | None = None, reference=None) -> Tensor:
        """Rewards `(n,)` to rewards `(n,)`. `lengths` and `groups` are for `"length_residual"`; `reference` `(n,)` is
        one reference per reward, in place of the one for all."""
        rewards = as_tensor(rewards)
        if self.how is None:
            return rewards
        if callable(self.how):
            changed = as_tensor(self.how(rewards))
            if changed.shape != rewards.shape:
                raise ValueError(
                    f"the function given as `transform` made {tuple(changed.shape)} out of {tuple(rewards.shape)} "
                    "rewards; it must keep their number."
                )
            if bad := (~changed.isfinite()).nonzero().flatten().tolist():
                raise ValueError(
                    f"the function given as `transform` made {changed[bad[0]].item()} of the reward "
                    f"{rewards[bad[0]].item()}; it must give finite numbers (TRL counts NaN as no opinion)."
                )
            return changed
        if self.how == "center":
            return center(rewards, self.mean)
        if self.how == "standardize":
            return standardize(rewards, self.mean, self.std)
        if self.how == "length_residual":
            if len(rewards) == 1:
                warnings.warn("length_residual changes nothing of one reward: it needs a batch of them.", stacklevel=2)
            return length_residual(rewards, lengths, groups)
        reference = self.reference if reference is None else as_tensor(reference).to(rewards)
        return log_sigmoid(rewards, reference) if self.how == "log_sigmoid" else clip(rewards, reference)
