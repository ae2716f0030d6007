"""Which library computes the matrix products of a forward on a CPU."""

import math
import platform
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary


MIN_TOKENS = 256  # below this, the cost of a Python call is as large as the gain
DTYPES = torch.float32, torch.bfloat16
PACK_AFTER = 4096  # tokens
PACK_BYTES = 2**30  # of a model's weights, which are kept a second time


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, **kwargs):
        """Counted like the layer that it stands for."""
        return 2 * math.prod(x_shape) * weight_shape[0]


class PackedWeights:
    """
    Copies of the weights of a model's linear layers, in the order in which oneDNN multiplies them.

    A product packs its weight anew each time. For a model that computes again and again one copy is faster, and the
    numbers are the same. At most `PACK_BYTES` are kept, and none before `PACK_AFTER` tokens, so that a short call pays
    nothing. A weight that was trained, merged or moved since is packed again. Fused optimizers do not count their
    changes, so numbers from all its rows are compared. A single one that is written into `.data` may go unnoticed:
    this is for models that nobody else holds.
    """

    def __init__(self):
        self.tokens = 0  # that were computed
        self.bytes = 0  # that are kept
        self._copies = WeakTensorKeyDictionary()  # weight: (its version, numbers from all its rows, the copy)

    def of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The copy of `weight` `(out, in)`, or `None` if there is none."""
        if weight.is_inference():  # torch counts no versions of it
            return None
        version, sample, copy = self._copies.get(weight, (None, None, None))
        if copy is None and (self.tokens < PACK_AFTER or self.bytes + weight.nbytes > PACK_BYTES):
            return None
        diagonal = weight.detach().reshape(-1)[:: weight.shape[1] + 1]
        if version == weight._version and sample.dtype == weight.dtype and torch.equal(sample, diagonal):
            return copy
        self.bytes += weight.nbytes if copy is None else 0
        copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_AFTER)
        self._copies[weight] = weight._version, diagonal.clone(), copy
        return copy

    def __reduce__(self):  # copies cannot be pickled, and need not be
        return PackedWeights, ()


class _OneDNN(TorchFunctionMode):
    """Linear layers on oneDNN: those of float32, and those whose weight is packed. It applies to this thread only, and
    changes no model."""

    def __init__(self, packed: PackedWeights | None):
        super().__init__()
        self.packed = packed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not kwargs:
            x, weight, *bias = args
            if type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype == x.dtype in DTYPES:
                copy = self.packed.of(weight) if self.packed is not None else None
                if copy is not None or weight.dtype == torch.float32:
                    given = weight if copy is None else copy
                    return torch.ops.mkldnn._linear_pointwise(x, given, bias[0] if bias else None, "none", [], "")
        return func(*args, **(kwargs or {}))


@contextmanager
def quick_products(device: torch.device, tokens: int, packed: PackedWeights | None = None):
    """
    A context in which the linear layers of a batch are computed by the faster of torch's two libraries.

    torch gives float32 products to MKL, which takes a slower path on processors that are not Intel's. On these oneDNN
    is faster, and the result is equal up to rounding. On other processors, for a short batch, with gradients, and
    under autocast, which this would go around, nothing changes.

    Args:
        device (`torch.device`): Where the batch is.
        tokens (`int`): How many tokens it has.
        packed ([`PackedWeights`], *optional*): Of the model. Without it nothing is kept.
    """
    free = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if device.type == "cpu" and tokens >= MIN_TOKENS and free and mkl_is_slow():
        with _OneDNN(packed):
            yield
        if packed is not None:
            packed.tokens += tokens
    else:
        yield


@cache
def mkl_is_slow() -> bool:
    """Whether this is an AMD processor and torch has both MKL and oneDNN."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "AuthenticAMD" in platform.processor()
