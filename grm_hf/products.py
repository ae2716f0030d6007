"""Which library computes the matrix products of a forward on a CPU."""

import math
import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula


MIN_TOKENS = 256  # below this, the cost of a Python call is as large as the gain


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, **kwargs):
        """Counted like the layer that it stands for."""
        return 2 * math.prod(x_shape) * weight_shape[0]


class _OneDNN(TorchFunctionMode):
    """Linear layers of float32 on oneDNN. It applies to this thread only, keeps nothing, and changes no model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not kwargs:
            x, weight, *bias = args
            if type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype == x.dtype == torch.float32:
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias[0] if bias else None, "none", [], "")
        return func(*args, **(kwargs or {}))


def quick_products(device: torch.device, tokens: int) -> AbstractContextManager:
    """
    A context in which the linear layers of a batch are computed by the faster of torch's two libraries.

    torch gives float32 products to MKL, which takes a slower path on processors that are not Intel's. On these oneDNN
    is faster, and the result is equal up to rounding. On other processors, for a short batch, and with gradients,
    nothing changes.

    Args:
        device (`torch.device`): Where the batch is.
        tokens (`int`): How many tokens it has.
    """
    fits = device.type == "cpu" and tokens >= MIN_TOKENS and not torch.is_grad_enabled() and mkl_is_slow()
    return _OneDNN() if fits else nullcontext()


@cache
def mkl_is_slow() -> bool:
    """Whether this is an AMD processor and torch has both MKL and oneDNN."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "AuthenticAMD" in platform.processor()
