"""Reinforcement learning: reward functions and reward models for trainers, transforms and ensembles of rewards, and
labels from ranked factors."""

from .adapters import GRMRewardFunction, grm_reward_func
from .ensemble import RewardEnsemble, combine, ensemble_heads
from .labels import RankedPair, factor_thresholds, hierarchical_pairs
from .ppo import PPORewardModel, ppo_reward_model
from .selftest import self_test
from .transforms import (
    TRANSFORMS,
    Transform,
    center,
    clip,
    delta,
    length_residual,
    log_sigmoid,
    logical_and,
    reference_reward,
    standardize,
)


__all__ = [
    "TRANSFORMS",
    "GRMRewardFunction",
    "PPORewardModel",
    "RankedPair",
    "RewardEnsemble",
    "Transform",
    "center",
    "clip",
    "combine",
    "delta",
    "ensemble_heads",
    "factor_thresholds",
    "grm_reward_func",
    "hierarchical_pairs",
    "length_residual",
    "log_sigmoid",
    "logical_and",
    "ppo_reward_model",
    "reference_reward",
    "self_test",
    "standardize",
]
