"""The reward heads: a hidden state in, one number out, always computed in the head's own dtype (float32).

This file is shipped to the Hub as it is: it imports torch and nothing else.
"""

import torch
from torch import nn


def _in_own_dtype(hidden_states, weight, function):
    """Apply `function` to hidden states cast to the dtype of `weight`, outside autocast: rewards differ by little, and
    a bfloat16 head would round the difference away."""
    with torch.autocast(device_type=hidden_states.device.type, enabled=False):
        return function(hidden_states.to(weight.dtype))


class GRMLinearHead(nn.Linear):
    """One bias-free linear layer: `(..., hidden_size)` to `(..., 1)`."""

    def __init__(self, hidden_size, dropout=0.0):
        super().__init__(hidden_size, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states):
        return _in_own_dtype(hidden_states, self.weight, lambda x: super(GRMLinearHead, self).forward(self.dropout(x)))


class GRMMLPHead(nn.Module):
    """The paper's head: `num_layers` of Linear and ReLU, then Linear: `(..., hidden_size)` to `(..., 1)`."""

    def __init__(self, hidden_size, width=1024, num_layers=1, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        # Names such as `mlp`, `gate` or `experts` are targets of renaming rules for published checkpoints: not used.
        self.dense = nn.ModuleList(nn.Linear(hidden_size if i == 0 else width, width) for i in range(num_layers))
        self.out = nn.Linear(width, 1)

    def _layers(self, x):
        x = self.dropout(x)
        for layer in self.dense:
            x = torch.relu(layer(x))
        return self.out(x)

    def forward(self, hidden_states):
        return _in_own_dtype(hidden_states, self.out.weight, self._layers)


def build_head(config, hidden_size):
    """The head that a [`GRMConfig`] describes, for hidden states of `hidden_size`."""
    if config.head_type == "linear":
        return GRMLinearHead(hidden_size, config.head_dropout)
    return GRMMLPHead(hidden_size, config.head_hidden_size, config.head_num_layers, config.head_dropout)
