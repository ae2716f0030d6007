"""The losses of a Generalizable Reward Model, as pure functions of rewards and of log-probabilities.

Notation of Yang et al. (arXiv 2406.10216), here and nowhere else:

    d     = r(x, y_c) - r(x, y_r)              reward difference of the chosen and the rejected response
    s     = sum_t log pi(y_t | x, y_<t)        log-probability of a response: a sum over its tokens, not a mean
    total = (1 - alpha) * L_reward + alpha * L_text

Every function returns one value a pair, `(B,)`; the trainer takes the mean.
"""

import torch
from torch.nn.functional import logsigmoid


PAIR_LOSSES = ("bt", "margin", "scaled")
TEXT_LOSSES = ("sft", "sft_nll", "sft_token_mean", "dpo_noref", "dpo")


def pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | None = None,
    kind: str = "bt",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""
    Loss on the rewards of preference pairs.

    - `"bt"`: `-log s(d)`, Bradley and Terry (2406.10216, Eq. 1);
    - `"margin"`: `-log s(d - m)`;
    - `"scaled"`: `-m log s(d)` (HelpSteer2-Preference, 2410.01257);

    with label smoothing `e`: `-(1 - e) log s(z) - e log s(-z)`, `z` being what stands in the sigmoid.

    Args:
        chosen (`torch.Tensor` of shape `(B,)`):
            Rewards of the chosen responses.
        rejected (`torch.Tensor` of shape `(B,)`):
            Rewards of the rejected responses.
        margin (`torch.Tensor` of shape `(B,)`, *optional*):
            Strength of each preference, `m`. Required by `"margin"` and `"scaled"`.
        kind (`str`, *optional*, defaults to `"bt"`):
            One of `PAIR_LOSSES`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a label is wrong, in `[0, 0.5)`.

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
    assert kind in PAIR_LOSSES, kind
    if kind != "bt" and margin is None:
        raise ValueError(
            f"pair_loss={kind!r} needs the strength of each preference, and the data has no `margin` column. Add one "
            "(a number a row), or use pair_loss='bt'."
        )
    logits = chosen - rejected
    if kind == "margin":
        assert margin is not None
        logits = logits - margin
    loss = -logsigmoid(logits)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-logits)
    if kind == "scaled":
        assert margin is not None
        loss = margin * loss
    return loss


def text_loss(
    kind: str,
    beta: float,
    chosen_logps: torch.Tensor,
    chosen_tokens: torch.Tensor | None = None,
    rejected_logps: torch.Tensor | None = None,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Text-generation loss on the responses of preference pairs (2406.10216, Sec. 3.2):

    - `"sft"`: `-log s(beta * s_c)`, the paper's default. For a long response it is close to `-beta * s_c`: it grows
      with the response's length;
    - `"sft_nll"`: `-s_c`, the plain negative log-likelihood;
    - `"sft_token_mean"`: `-s_c / n_c`, that per token: not in the paper, does not weigh long responses more;
    - `"dpo_noref"`: `-log s(beta * (s_c - s_r))`;
    - `"dpo"`: `-log s(beta * ((s_c - s_r) - (s_c_ref - s_r_ref)))`.

    Args:
        kind (`str`):
            One of `TEXT_LOSSES`.
        beta (`float`):
            Inverse temperature. Not used by `"sft_nll"` and `"sft_token_mean"`.
        chosen_logps, rejected_logps (`torch.Tensor` of shape `(B,)`):
            Summed log-probabilities of the responses.
        chosen_tokens (`torch.Tensor` of shape `(B,)`):
            Number of response tokens in each sum; for `"sft_token_mean"`. Where it is 0, the loss is 0.
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor` of shape `(B,)`):
            The same sums under the reference model; for `"dpo"`.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    assert kind in TEXT_LOSSES, kind
    if kind == "sft":
        return -logsigmoid(beta * chosen_logps)
    if kind == "sft_nll":
        return -chosen_logps
    if kind == "sft_token_mean":
        assert chosen_tokens is not None
        return -chosen_logps / chosen_tokens.clamp(min=1)
    assert rejected_logps is not None
    logits = chosen_logps - rejected_logps
    if kind == "dpo":
        assert ref_chosen_logps is not None and ref_rejected_logps is not None
        logits = logits - (ref_chosen_logps - ref_rejected_logps)
    return -logsigmoid(beta * logits)


def centering(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """`(r_c + r_r)^2`, which pulls the mean reward to zero (2312.09244, Eq. 2): `(B,)`, `(B,)` to `(B,)`."""
    return (chosen + rejected) ** 2


def total_loss(pair: torch.Tensor, text: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """`(1 - alpha) * pair + alpha * text`; the very same `pair` where there is no text loss or alpha is 0."""
    if text is None or alpha == 0:
        return pair
    return (1 - alpha) * pair + alpha * text
