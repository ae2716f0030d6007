"""Scoring: one function from chats to rewards, for the command line, for reinforcement learning and for users; and
golden rows, which show whether a model still gives the same rewards."""

from .golden import GoldenError, save_golden, verify
from .scorer import BestOfN, GRMScorer, Score


__all__ = ["BestOfN", "GRMScorer", "GoldenError", "Score", "save_golden", "verify"]
