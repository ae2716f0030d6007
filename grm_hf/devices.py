"""What a process does with its device: which one is its own, whether it holds a whole model, evaluation mode for a
while, and the settings of a worker."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; outside, every module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_whole(model: nn.Module) -> bool:
    """Whether this process can run `model` alone: no part of it is with other processes (FSDP, ZeRO-3, tensor
    parallelism), where a forward waits until all of them run one."""
    split = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    offloaded = getattr(model, "hf_device_map", None) is not None  # its meta weights are brought in by hooks
    return not split and not any(
        parameter.numel() == 0 or (parameter.is_meta and not offloaded) or hasattr(parameter, "device_mesh")
        for parameter in model.parameters()
    )


def own_device() -> torch.device:
    """The accelerator of this process among those of its machine, or the CPU."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count())


def quiet() -> None:
    """What a worker process sets before its first run."""
    import datasets
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
