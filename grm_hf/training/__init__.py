"""Training of Generalizable Reward Models on TRL (extra `train`)."""

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError("Training needs TRL: pip install 'grm-hf[train]'.") from error

from ..hub.merge import merge_adapter
from .config import CHECKPOINTING, GRMRewardConfig
from .trainer import GRMRewardTrainer


__all__ = ["CHECKPOINTING", "GRMRewardConfig", "GRMRewardTrainer", "merge_adapter"]
