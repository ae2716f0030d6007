"""The reward heads turn a hidden state into one number, and, if the model has attributes, into one number for each of
them. They always compute in float32.

The head of a Bayesian non-negative reward model (2602.10623) draws from Weibull distributions in training, and takes
their means in use.

This file is shipped to the Hub as it is, so it imports only torch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


EULER = 0.5772156649015329  # the Euler-Mascheroni constant
SMALLEST_MEAN = 1e-6  # of a factor in its divergence, which is infinite for a factor that is exactly 0


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
        self.dense = _layers(hidden_size, width, num_layers)
        self.out = GRMLinear(width, outputs)

    def forward(self, hidden_states):
        x = self.dropout(hidden_states)
        for layer in self.dense:
            x = torch.relu(layer(x))
        return self.out(x)


class GRMFactorWeights(GRMLinear):
    """Non-negative weights of `width` factors, and a bias. The mean of a weight is the positive part of `weight`."""

    def __init__(self, width):
        super().__init__(width, 1)
        self.shapes = nn.Parameter(torch.empty(1, width))
        self.reset_parameters()

    def reset_parameters(self):
        if hasattr(self, "shapes"):  # torch's own constructor calls this too
            bound = self.in_features**-0.5
            nn.init.uniform_(self.weight, 0, bound)  # a weight that begins below 0 would stay 0
            nn.init.uniform_(self.bias, -bound, bound)
            nn.init.zeros_(self.shapes)

    def distribution(self):
        """Mean and shape of each weight, `(1, width)`."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.to(dtype).relu(), _shape(self.shapes.to(dtype))

    def forward(self, factors, weights=None):
        with torch.autocast(device_type=factors.device.type, enabled=False):
            weights = self.distribution()[0] if weights is None else weights
            return nn.functional.linear(factors, weights, self.bias.to(weights.dtype))


class GRMBNRMHead(GRMMLPHead):
    r"""
    The head of a Bayesian non-negative reward model (2602.10623): `(..., hidden_size)` to `(..., 1)`.

    The reward is `sum_j z_j w_j + bias`, with `width` factors `z_j >= 0` that depend on the hidden state, and weights
    `w_j >= 0` that do not. Each `z_j` and `w_j` has a Weibull distribution. In training one sample of each is drawn:
    of the factors for each hidden state, of the weights for each call. In use each is its mean. The head is then an
    MLP with one more hidden layer, whose last weights are the positive parts of `out.weight`.

    The mean of a factor is `relu(MLP(hidden))`, and its shape is `1 + softplus(MLP(hidden))`, of another MLP. Both
    have `num_layers` hidden layers. The bias of the authors' code is not negative. This one has any sign, so that the
    rewards can have mean 0. Their code makes the shape of a weight from its mean; here it is a parameter of its own.
    """

    def __init__(self, hidden_size, width=1024, num_layers=1, dropout=0.0):
        super().__init__(hidden_size, width, num_layers + 1, dropout)
        self.shapes = _layers(hidden_size, width, num_layers + 1)
        self.out = GRMFactorWeights(width)

    def forward(self, hidden_states, return_kl=False):
        """With `return_kl` also the divergence of each hidden state, `(...,)`: of its factors and of the weights from
        `Gamma(1, 1)`, summed over the factors."""
        if not self.training and not return_kl:
            return super().forward(hidden_states)
        hidden_states = self.dropout(hidden_states)
        mean = shape = hidden_states
        for layer in self.dense:
            mean = torch.relu(layer(mean))
        for i, layer in enumerate(self.shapes):
            shape = layer(shape if i == 0 else torch.relu(shape))
        shape = _shape(shape)
        of_weights = self.out.distribution()
        if self.training:
            rewards = self.out(weibull_sample(mean, shape), weibull_sample(*of_weights))
        else:
            rewards = self.out(mean)
        if not return_kl:
            return rewards
        return rewards, weibull_kl(mean, shape).sum(-1) + weibull_kl(*of_weights).sum()


def _layers(hidden_size, width, num_layers):
    return nn.ModuleList(GRMLinear(hidden_size if i == 0 else width, width) for i in range(num_layers))


def _shape(x):
    return 1 + nn.functional.softplus(x)  # at least 1: then a power 1 / shape of small numbers is safe


def weibull_sample(mean, shape):
    """A sample of Weibull distributions with these means and shapes; its gradient is that of the sample."""
    noise = torch.empty_like(mean).exponential_().clamp(min=torch.finfo(mean.dtype).tiny)
    return mean * torch.exp(noise.log() / shape - torch.lgamma(1 + 1 / shape))


def weibull_kl(mean, shape):
    r"""
    Kullback-Leibler divergence of Weibull distributions from `Gamma(1, 1)`, elementwise.

    The scale is `s = mean / Gamma(1 + 1/k)`. With Euler's constant `c`, `E[log x] = log s - c / k` and
    `E[(x / s)^k] = 1`, so `E[log q] = log k - log s - c (1 - 1/k) - 1` and `E[log p] = -mean`. The divergence is their
    difference. A mean below 1e-6 counts as 1e-6.
    """
    mean = mean.clamp(min=SMALLEST_MEAN)
    return (mean - 1 - mean.log()) + (torch.lgamma(1 + 1 / shape) + shape.log() + EULER * (1 / shape - 1))


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
    shares = weights.clamp(min=torch.finfo(weights.dtype).tiny).log() - logs
    shares = torch.where(weights > 0, shares, -torch.inf)  # without a weight it counts nothing, however small it is
    return torch.exp(-torch.logsumexp(shares, dim=-1, keepdim=True))


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
        settings = hidden_size, config.head_hidden_size, config.head_num_layers, config.head_dropout
        return GRMBNRMHead(*settings) if config.head_type == "bnrm" else GRMMLPHead(*settings, outputs)

    return build() if config.attribute_names is None else GRMAttributeHead(build, config)
