"""The losses of a Generalizable Reward Model, as pure functions of rewards and of log-probabilities.

Notation of Yang et al. (arXiv 2406.10216), here and nowhere else:

    d     = r(x, y_c) - r(x, y_r)              reward difference of the chosen and the rejected response
    s     = sum_t log pi(y_t | x, y_<t)        log-probability of a response: a sum over its tokens, not a mean
    total = (1 - alpha) * L_reward + alpha * L_text

Every function returns one value a pair, `(B,)`; the trainer takes the mean.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid


class PairLoss(NamedTuple):
    """A loss on the rewards of a pair.

    Attributes:
        formula (`str`): The formula in README, card and `--help`; `r_c` and `r_r` are the rewards.
        reads_margin (`bool`): Whether it needs the strength of each preference, `margin`.
        function (`Callable`): `(d, margin, target)` to `(B,)`; `d` is the difference of the rewards, `target` the
            probabilities that chosen and rejected are the better one.
        source (`str`): The publication or library it comes from.
    """

    formula: str
    reads_margin: bool
    function: Callable[[torch.Tensor, Any, tuple], torch.Tensor]
    source: str = ""


class Responses(NamedTuple):
    """The input of a text loss: tensors `(B,)` of summed log-probabilities, of the number of tokens in a sum, and of
    soft labels. `None` if the loss does not read it."""

    chosen: torch.Tensor
    chosen_tokens: Any = None
    rejected: Any = None
    ref_chosen: Any = None
    ref_rejected: Any = None
    label: Any = None


class TextLoss(NamedTuple):
    """A loss on the log-probabilities of a pair's responses.

    Attributes:
        formula (`str`): The formula in README, card and `--help`; `s_c` and `s_r` are the sums, `ref_c` and `ref_r`
            those of the reference.
        sides (`str`): The responses whose log-probability it reads, `"chosen"` or `"both"`.
        reference (`bool`): Whether it needs the log-probabilities under a reference model.
        function (`Callable`): `(responses, beta)` to `(B,)`.
        source (`str`): A remark for README and card.
    """

    formula: str
    sides: str
    reference: bool
    function: Callable[[Responses, float], torch.Tensor]
    source: str = ""


def _target(label: Any, label_smoothing: float = 0.0) -> tuple:
    """The probabilities that chosen and rejected are the better one."""
    if label is None:
        return 1 - label_smoothing, label_smoothing
    return (
        label * (1 - label_smoothing) + (1 - label) * label_smoothing,
        label * label_smoothing + (1 - label) * (1 - label_smoothing),
    )


def _bradley_terry(logits: torch.Tensor, target: tuple) -> torch.Tensor:
    right, wrong = target
    loss = -logsigmoid(logits)
    if not torch.is_tensor(wrong) and wrong == 0:
        return loss
    return right * loss - wrong * logsigmoid(-logits)


# To add a loss: one entry here and its test. README, cards, `--help` and the trainer read these tables.
PAIR_LOSSES = {
    "bt": PairLoss(
        "-log sigmoid(r_c - r_r)",
        False,
        lambda d, margin, target: _bradley_terry(d, target),
        "Bradley and Terry (2406.10216)",
    ),
    "margin": PairLoss(
        "-log sigmoid(r_c - r_r - margin)",
        True,
        lambda d, margin, target: _bradley_terry(d - margin, target),
        "as TRL",
    ),
    "scaled": PairLoss(
        "-margin * log sigmoid(r_c - r_r)",
        True,
        lambda d, margin, target: margin * _bradley_terry(d, target),
        "HelpSteer2-Preference (2410.01257)",
    ),
}
TEXT_LOSSES = {
    "sft": TextLoss(
        "-log sigmoid(beta * s_c)",
        "chosen",
        False,
        lambda s, beta: -logsigmoid(beta * s.chosen),
        "the paper's default",
    ),
    "sft_nll": TextLoss("-s_c", "chosen", False, lambda s, beta: -s.chosen),
    "sft_token_mean": TextLoss(
        "-s_c / tokens",
        "chosen",
        False,
        lambda s, beta: -s.chosen / s.chosen_tokens.clamp(min=1),
        "not in the paper: long responses do not weigh more",
    ),
    "dpo_noref": TextLoss(
        "-log sigmoid(beta * (s_c - s_r))",
        "both",
        False,
        lambda s, beta: _bradley_terry(beta * (s.chosen - s.rejected), _target(s.label)),
    ),
    "dpo": TextLoss(
        "-log sigmoid(beta * ((s_c - s_r) - (ref_c - ref_r)))",
        "both",
        True,
        lambda s, beta: _bradley_terry(
            beta * ((s.chosen - s.rejected) - (s.ref_chosen - s.ref_rejected)), _target(s.label)
        ),
        "reference: adapter off, precomputed, or a copy",
    ),
}


def pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | None = None,
    name: str = "bt",
    label_smoothing: float = 0.0,
    label: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Loss on the rewards of preference pairs: one of `PAIR_LOSSES`. With a soft label `p`, `-log s(z)` becomes
    `-p log s(z) - (1 - p) log s(-z)` (2605.11865). Label smoothing `e` replaces `p` by `p (1 - e) + (1 - p) e`.

    Args:
        chosen (`torch.Tensor` of shape `(B,)`):
            Rewards of the chosen responses.
        rejected (`torch.Tensor` of shape `(B,)`):
            Rewards of the rejected responses.
        margin (`torch.Tensor` of shape `(B,)`, *optional*):
            Strength of each preference. Required by `"margin"` and `"scaled"`.
        name (`str`, *optional*, defaults to `"bt"`):
            One of `PAIR_LOSSES`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a label is wrong, in `[0, 0.5)`.
        label (`torch.Tensor` of shape `(B,)`, *optional*):
            Probability that the chosen response is the better one, in `[0, 1]`: 1 without it, 0.5 for a tie.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Example:

    ```python
    >>> import torch
    >>> from grm_hf.losses import pair_loss

    >>> [round(x, 4) for x in pair_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])).tolist()]
    [0.3133, 0.6931]

    ```
    """
    loss = PAIR_LOSSES[name]
    if loss.reads_margin and margin is None:
        raise ValueError(
            f"pair_loss={name!r} needs the strength of each preference, and the data has no `margin` column. Add one "
            "(a number a row), or use pair_loss='bt'."
        )
    return loss.function(chosen - rejected, margin, _target(label, label_smoothing))


def text_loss(
    name: str,
    beta: float,
    chosen_logps: torch.Tensor,
    chosen_tokens: torch.Tensor | None = None,
    rejected_logps: torch.Tensor | None = None,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Text-generation loss on the responses of preference pairs (2406.10216, Sec. 3.2): one of `TEXT_LOSSES`.

    `"sft"` is, for a long response, close to `-beta * s_c`: it grows with the response's length. `"sft_token_mean"` is
    not in the paper; it does not weigh long responses more.

    Args:
        name (`str`):
            One of `TEXT_LOSSES`.
        beta (`float`):
            Inverse temperature. Not used by `"sft_nll"` and `"sft_token_mean"`.
        chosen_logps, rejected_logps (`torch.Tensor` of shape `(B,)`):
            Summed log-probabilities of the responses. `TEXT_LOSSES[name].sides` says which are needed.
        chosen_tokens (`torch.Tensor` of shape `(B,)`):
            Number of response tokens in each sum; for `"sft_token_mean"`. Where it is 0, the loss is 0.
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor` of shape `(B,)`):
            The same sums under the reference model, if `TEXT_LOSSES[name].reference`.
        label (`torch.Tensor` of shape `(B,)`, *optional*):
            Soft labels, as in [`pair_loss`]. A loss on the chosen response alone does not read them.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    responses = Responses(chosen_logps, chosen_tokens, rejected_logps, ref_chosen_logps, ref_rejected_logps, label)
    return TEXT_LOSSES[name].function(responses, beta)


def centering(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """`(r_c + r_r)^2`, which pulls the mean reward to zero (2312.09244, Eq. 2): `(B,)`, `(B,)` to `(B,)`."""
    return (chosen + rejected) ** 2


def sum_to_zero(chosen: torch.Tensor, rejected: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    `m^2`, where `m` is the mean reward of all responses of an optimiser step (batch-wise sum-to-zero regularisation,
    2505.07271). It pulls the mean of a batch to zero, and [`centering`] that of each pair.

    Args:
        chosen, rejected (`torch.Tensor` of shape `(B,)`):
            Rewards of a batch.
        mean (`torch.Tensor`, *optional*):
            `m`, if the step has further batches. Then the values are those of the tangent `2 m x - m^2` at `m`: their
            average over the pairs of the step is `m^2`, and has its gradient.

    Returns:
        `torch.Tensor` of shape `(B,)`: a share for each pair; only their average means something.
    """
    own = (chosen + rejected) / 2
    mean = own.mean().detach() if mean is None else mean
    return 2 * mean * own - mean**2


def attribute_loss(attributes: torch.Tensor, ratings: torch.Tensor) -> torch.Tensor:
    r"""
    Squared error of attributes, the mean over the ratings that a row has (2406.08673).

    Args:
        attributes (`torch.Tensor` of shape `(2B, K)`):
            Attributes of the chosen above those of the rejected responses.
        ratings (`torch.Tensor` of shape `(2B, K)`):
            What they should be; NaN where there is no rating.

    Returns:
        `torch.Tensor` of shape `(B,)`: over both responses of a row; 0 for a row without ratings.
    """
    rated = ~ratings.isnan()
    error = torch.where(rated, attributes - torch.where(rated, ratings, 0.0), 0.0) ** 2
    of_row, count = (values.unflatten(0, (2, -1)).sum((0, 2)) for values in (error, rated))
    return of_row / count.clamp(min=1)


def total_loss(pair: torch.Tensor, text: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """`(1 - alpha) * pair + alpha * text`; exactly `pair` if there is no text loss or alpha is 0."""
    if text is None or alpha == 0:
        return pair
    return (1 - alpha) * pair + alpha * text
