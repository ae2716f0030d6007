"""Scoring: one function from chats to rewards, for the command line, for reinforcement learning and for users; and
golden rows, which show whether a model still gives the same rewards."""

from .attributes import fit_attribute_weights
from .golden import GoldenError, save_golden, verify
from .scorer import BestOfN, GRMScorer, Score


__all__ = ["BestOfN", "GRMScorer", "GoldenError", "Score", "fit_attribute_weights", "save_golden", "verify"]
