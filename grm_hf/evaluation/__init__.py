"""Evaluation on every reward benchmark, with its official figures. A suite is a loader of the official files and an
aggregation of scores; `evaluate` scores the rows with a model in between."""

from .examples import Example
from .run import Results, aggregate, compare, evaluate, load_examples, read_results
from .signals import SignalReport, signal_report, store_choice
from .suites import SUITES


__all__ = [
    "SUITES",
    "Example",
    "Results",
    "SignalReport",
    "aggregate",
    "compare",
    "evaluate",
    "load_examples",
    "read_results",
    "signal_report",
    "store_choice",
]
