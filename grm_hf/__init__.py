"""GRM, the Generalizable Reward Model, for the Hugging Face ecosystem.

Importing this package registers the model with transformers' Auto classes. What needs more than torch and
transformers (training, scoring of chats, rewards for reinforcement learning) is imported on first use.
"""

import importlib

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_grm import GRMConfig
from .modeling_grm import GRMForSequenceClassification


__version__ = "0.1.0"

AutoConfig.register(GRMConfig.model_type, GRMConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForSequenceClassification):
    _auto_class.register(GRMConfig, GRMForSequenceClassification, exist_ok=True)
# This is what makes `save_pretrained` copy the code files; `GRMConfig.auto_map` names every Auto class.
GRMConfig.register_for_auto_class()
GRMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

_LAZY = {
    "GRMRewardConfig": "training",
    "GRMRewardTrainer": "training",
    "GRMScorer": "scoring",
}

__all__ = ["GRMConfig", "GRMForSequenceClassification", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
