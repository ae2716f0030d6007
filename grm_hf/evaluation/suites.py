"""`SUITES`, the table of suites. To add one, write a file with a loader and an aggregation, and its line here."""

from . import contrast, ifrewardbench, judgebench, own, paper, ppe, rewardbench, rewardmath, rmb, rmbench
from .suite import Suite


_FAMILIES = (rewardbench, rmbench, ppe, judgebench, rmb, rewardmath, ifrewardbench, contrast, paper, own)

SUITES: dict[str, Suite] = {suite.name: suite for family in _FAMILIES for suite in family.SUITES}
