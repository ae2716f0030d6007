"""Scoring: one function from chats to rewards, used by the command line, by rewards for reinforcement learning and by
whoever wants a number."""

from .scorer import BestOfN, GRMScorer, Score


__all__ = ["BestOfN", "GRMScorer", "Score"]
