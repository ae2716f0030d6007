"""Optimiser steps by hand: the settings under which a trainer does plain gradient descent, and its step."""

import numpy as np
import torch


CONSTANT = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0}


def descend(model, loss):
    """One step down the gradient of a loss."""
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= CONSTANT["learning_rate"] * parameter.grad


def consecutive(*sizes):
    """Indices of batches of these sizes, one behind the other."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [list(range(*ends[i : i + 2])) for i in range(len(sizes))]
