"""The reward heads turn a hidden state into one number. They always compute in float32.

This file is shipped to the Hub as it is, so it imports only torch.
"""

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
    """One bias-free linear layer: `(..., hidden_size)` to `(..., 1)`."""

    def __init__(self, hidden_size, dropout=0.0):
        super().__init__(hidden_size, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states):
        return super().forward(self.dropout(hidden_states))


class GRMMLPHead(nn.Module):
    """The paper's head: `num_layers` of Linear and ReLU, then Linear: `(..., hidden_size)` to `(..., 1)`."""

    def __init__(self, hidden_size, width=1024, num_layers=1, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        # Not named `mlp`, `gate` or `experts`: renaming rules for published checkpoints change such names.
        self.dense = nn.ModuleList(GRMLinear(hidden_size if i == 0 else width, width) for i in range(num_layers))
        self.out = GRMLinear(width, 1)

    def forward(self, hidden_states):
        x = self.dropout(hidden_states)
        for layer in self.dense:
            x = torch.relu(layer(x))
        return self.out(x)


def build_head(config, hidden_size):
    """The head that a [`GRMConfig`] describes, for hidden states of `hidden_size`."""
    if config.head_type == "linear":
        return GRMLinearHead(hidden_size, config.head_dropout)
    return GRMMLPHead(hidden_size, config.head_hidden_size, config.head_num_layers, config.head_dropout)
