"""The device of a process, whether the process holds a whole model, which threads evaluate or train a model, and the
settings of a worker."""

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel


class _Turns:
    """Who uses a model: several threads in evaluation mode, or one thread alone."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.evaluating: Counter[int] = Counter()  # threads, and how deep each is in
        self.owner: int | None = None  # the thread that has the model to itself
        self.waiting = 0  # for that; nobody else begins to evaluate meanwhile
        self.training: list[nn.Module] = []  # modules that go back to training mode afterwards


_turns: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_making = threading.Lock()


def _shared(model: nn.Module) -> nn.Module:
    """What the wrappers of PEFT and DDP around a model have in common."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _turns_of(shared: nn.Module) -> _Turns:
    with _making:
        return _turns.setdefault(shared, _Turns())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context with the model in evaluation mode, for this thread and all others that evaluate. After the last of
    them every module has its earlier mode, or the one that `model.train()` or `model.eval()` asked for meanwhile.
    Waits while another thread has the model [`alone`]."""
    shared, me = _shared(model), threading.get_ident()
    turns = _turns_of(shared)

    def afterwards(mode: bool = True) -> nn.Module:
        with turns.changed:
            turns.training = [*turns.training, *shared.modules()] if mode else []
        return shared

    with turns.changed:
        nested = turns.evaluating[me] > 0 or turns.owner == me
        turns.changed.wait_for(lambda: nested or (turns.owner is None and not turns.waiting))
        for module in model.modules():
            if module.training:
                turns.training.append(module)
                module.training = False
        shared.train = afterwards  # type: ignore[method-assign]  # a trainer in another thread may call it any time
        turns.evaluating[me] += 1
    try:
        yield
    finally:
        with turns.changed:
            turns.evaluating -= Counter([me])
            if not turns.evaluating:
                del shared.train
                for module in turns.training:
                    module.training = True
                turns.training = []
            turns.changed.notify_all()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """A context for a training step, or for any other change of the state of `model`: meanwhile no other thread
    evaluates it, trains it or changes its mode. Waits until none does."""
    turns, me = _turns_of(_shared(model)), threading.get_ident()
    with turns.changed:
        turns.waiting += 1
        try:
            turns.changed.wait_for(lambda: turns.owner in (None, me) and not (set(turns.evaluating) - {me}))
        finally:
            turns.waiting -= 1
        outer, turns.owner = turns.owner, me
    try:
        yield
    finally:
        with turns.changed:
            turns.owner = outer
            turns.changed.notify_all()


def is_whole(model: nn.Module) -> bool:
    """Whether this process can run `model` alone. If parts are with other processes (FSDP, ZeRO-3, tensor
    parallelism), a forward waits until all processes run one."""
    split = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    offloaded = getattr(model, "hf_device_map", None) is not None  # its meta weights are brought in by hooks
    return not split and not any(
        parameter.numel() == 0 or (parameter.is_meta and not offloaded) or hasattr(parameter, "device_mesh")
        for parameter in model.parameters()
    )


def own_device() -> torch.device:
    """The accelerator of this process among those of its machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count())


def quiet() -> None:
    """The settings of a worker process before its first run."""
    import datasets
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
