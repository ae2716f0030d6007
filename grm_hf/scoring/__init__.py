"""Scoring: one function from chats to rewards, used by the command line, by rewards for reinforcement learning and by
whoever wants a number; and golden rows, which say whether it is still the same number."""

from .golden import GoldenError, save_golden, verify
from .scorer import BestOfN, GRMScorer, Score


__all__ = ["BestOfN", "GRMScorer", "GoldenError", "Score", "save_golden", "verify"]
