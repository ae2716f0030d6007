"""The reward heads turn a hidden state into one number, and, if the model has attributes, into one number for each of
them. They always compute in float32.

This file is shipped to the Hub as it is, so it imports only torch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class GRMLinear(nn.Linear):
    """A linear layer that computes in float32 or wider, whatever the dtype of its weights and autocast. Rewards differ
    by little, and bfloat16 would round the difference away."""

    def forward(self, x):
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class GRMLinearHead(GRMLinear):
    """One bias-free linear layer: `(..., hidden_size)` to `(..., outputs)`."""

    def __init__(self, hidden_size, dropout=0.0, outputs=1):
        super().__init__(hidden_size, outputs, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states):
        return super().forward(self.dropout(hidden_states))


class GRMMLPHead(nn.Module):
    """The paper's head: `num_layers` of Linear and ReLU, then Linear: `(..., hidden_size)` to `(..., outputs)`."""

    def __init__(self, hidden_size, width=1024, num_layers=1, dropout=0.0, outputs=1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        # Not named `mlp`, `gate` or `experts`: renaming rules for published checkpoints change such names.
        self.dense = nn.ModuleList(GRMLinear(hidden_size if i == 0 else width, width) for i in range(num_layers))
        self.out = GRMLinear(width, outputs)

    def forward(self, hidden_states):
        x = self.dropout(hidden_states)
        for layer in self.dense:
            x = torch.relu(layer(x))
        return self.out(x)


class Combiner(NamedTuple):
    """How attributes become one reward.

    Attributes:
        formula (`str`): The formula in docs and card; `a_i` are the attributes, `w_i` the weights.
        negative (`bool`): Whether a weight may be negative. Otherwise weights are divided by their sum.
        function (`Callable`): `(attributes, weights)`, `(..., K)` each, to `(..., 1)`.
        source (`str`): The publication it comes from, or follows in part.
    """

    formula: str
    negative: bool
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    source: str = ""


def _weighted_sum(attributes, weights):
    return (weights * attributes).sum(-1, keepdim=True)


def _signed_geometric_mean(attributes, weights):
    bounded, counts = torch.tanh(attributes), weights > 0
    size = torch.where(bounded == 0, 1.0, bounded.abs())  # the gradient of a root at 0 is infinite
    mean = (weights * size.log()).sum(-1, keepdim=True).exp()
    sign = torch.where(((bounded > 0) | ~counts).all(-1, keepdim=True), 1.0, -1.0)
    return torch.where(((bounded == 0) & counts).any(-1, keepdim=True), 0.0, sign * mean)


def _harmonic_mean(attributes, weights):
    # In logarithms, because 1 / softplus(a) overflows; far below 0, log softplus(a) is a.
    small = torch.nn.functional.softplus(attributes.clamp(min=-30)).log()
    logs = torch.where(attributes < -30, attributes, small)
    shares = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return torch.exp(-torch.logsumexp(shares - logs, dim=-1, keepdim=True))


# To add one: an entry here and its test. Configuration, docs and card read this table.
COMBINERS = {
    "sum": Combiner("sum_i w_i a_i", True, _weighted_sum, "HelpSteer2 (2406.08673), ArmoRM"),
    "geometric": Combiner(
        "s prod_i |tanh(a_i)|^w_i, s = 1 if all a_i > 0, else -1",
        False,
        _signed_geometric_mean,
        "after Lucy-SKG, which has no weights",
    ),
    "harmonic": Combiner("1 / sum_i (w_i / softplus(a_i))", False, _harmonic_mean, "after lambda-Harmonic"),
}


class GRMAttributeHead(nn.Module):
    """
    A head of K attributes. Its reward is another head's (`attribute_weights=None`), or a combination of the attributes
    by fixed weights, or by weights that a gate computes from the same hidden state.

    Args:
        build (`Callable`):
            Makes a head of a number of outputs.
        config ([`GRMConfig`]):
            With `attribute_names`, `attribute_weights` and `attribute_combiner`.
    """

    def __init__(self, build, config):
        super().__init__()
        outputs, weights = len(config.attribute_names), config.attribute_weights
        self.reward = build(1) if weights is None else None
        self.attributes = build(outputs)
        self.mixture = build(outputs) if weights == "gate" else None
        self.weights, self.combiner = weights, config.attribute_combiner

    def forward(self, hidden_states, return_attributes=False):
        """Rewards `(..., 1)`; with `return_attributes` the attributes `(..., K)` besides."""
        if self.reward is not None and not return_attributes:
            return self.reward(hidden_states)
        attributes = self.attributes(hidden_states)
        if self.reward is not None:
            rewards = self.reward(hidden_states)
        else:
            rewards = COMBINERS[self.combiner].function(attributes, self._weights(hidden_states, attributes))
        return (rewards, attributes) if return_attributes else rewards

    def _weights(self, hidden_states, attributes):
        if self.mixture is not None:
            return self.mixture(hidden_states).softmax(-1)
        weights = torch.tensor(self.weights, dtype=attributes.dtype, device=attributes.device)
        return weights if COMBINERS[self.combiner].negative else weights / weights.sum()

    def fix(self, weights):
        """Combine the attributes by these numbers from now on; another reward head or a gate is dropped."""
        self.reward = self.mixture = None
        self.weights, self.combiner = list(weights), "sum"


def build_head(config, hidden_size):
    """The head that a [`GRMConfig`] describes, for hidden states of `hidden_size`."""

    def build(outputs=1):
        if config.head_type == "linear":
            return GRMLinearHead(hidden_size, config.head_dropout, outputs)
        width, layers = config.head_hidden_size, config.head_num_layers
        return GRMMLPHead(hidden_size, width, layers, config.head_dropout, outputs)

    return build() if config.attribute_names is None else GRMAttributeHead(build, config)
