"""GRM, the Generalizable Reward Model, for the Hugging Face ecosystem.

Importing this package registers the model with transformers' Auto classes. Training, scoring of chats and rewards for
reinforcement learning need more than torch and transformers, so they are imported on first use.
"""

import importlib

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_grm import GRMConfig
from .modeling_grm import GRMForSequenceClassification
from .version import __version__


AutoConfig.register(GRMConfig.model_type, GRMConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForSequenceClassification):
    _auto_class.register(GRMConfig, GRMForSequenceClassification, exist_ok=True)
# This makes `save_pretrained` copy the code files; `GRMConfig.auto_map` names every Auto class.
GRMConfig.register_for_auto_class()
GRMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


def _push_to_hub(self, repo_id, **kwargs):
    r"""
    Push the model to the Hub, as a complete repository: see [`grm_hf.hub.push_model`]. Arguments are those of
    [`~transformers.PreTrainedModel.push_to_hub`], and `tokenizer` and `tag`.
    """
    from .hub import push_model

    return push_model(self, repo_id, **kwargs)


def _find_base(name, adapter):
    """Path or id of the base that an adapter names: see [`grm_hf.base.find_base`]."""
    from .base import find_base

    return find_base(name, adapter)


# Here and not in the class, because its file is shipped and does not know this package.
GRMForSequenceClassification.push_to_hub = _push_to_hub  # type: ignore[assignment,method-assign]
GRMForSequenceClassification.find_base = staticmethod(_find_base)  # type: ignore[assignment,method-assign]

_LAZY = {
    "GRMRewardConfig": "training",
    "GRMRewardTrainer": "training",
    "GRMScorer": "scoring",
}

__all__ = ["GRMConfig", "GRMForSequenceClassification", "__version__", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
