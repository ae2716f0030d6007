"""What signals (`grm_hf.signals`) are worth on a suite's pairs: the accuracy of each beside the head's, that of the
head on the pairs they agree on, and which of them help enough to be used from now on.

Whatever is said here is said of the pairs at hand: nothing is switched on that did not help there."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import (
    FEWEST_GROUPS,
    bootstrap_interval,
    compare_confidences,
    fit_temperature,
    pair_wins,
    risk_coverage,
    selective_accuracy,
    tie_rate,
    wilson_interval,
)
from ..scoring.reader import Reader, reference_scorer
from ..signals import SIGNALS, check_threshold, checked, divergence
from ..signals import Settings as SignalSettings
from .run import Results


WINDOW = 64  # pairs that are computed at a time
TIE = 0.5  # the win of a signal that prefers neither response: it then is at chance, and not wrong
ENDS = ("low", "high", "difference_low", "difference_high")


@dataclass
class SignalReport:
    """
    Signals on the pairs of a suite.

    Attributes:
        suite (`str`): Its name.
        margins (`dict[str, list[float]]`): Of each signal, how far it prefers the better response of each pair.
        probabilities (`dict[str, list[float]]`): The same as probabilities.
        groups (`list[str]`): The prompt of each pair.
        left_out (`int`): Pairs with a response without text, which no signal but the head's reads.
        settings (`dict`): What signals were computed with, besides their defaults.
    """

    suite: str
    margins: dict[str, list[float]]
    probabilities: dict[str, list[float]]
    groups: list[str]
    left_out: int
    settings: dict[str, Any]

    def agreement(self, names: Iterable[str] | None = None) -> list[float]:
        """Of each pair, the share of signals on the side of the head; 0 where the head has none."""
        sides = np.sign([self.margins[name] for name in dict.fromkeys(["head", *(names or self.margins)])])
        return np.where(sides[0] == 0, 0.0, (sides == sides[0]).mean(0)).tolist()

    def summary(self, threshold: float = 1.0) -> dict[str, Any]:
        """
        Args:
            threshold (`float`, *optional*, defaults to `1.0`): Of the agreement; 1 is all signals.

        Returns:
            `dict`: for each of the `signals` its `accuracy` (a signal that prefers neither response is half right)
            with a 95 % interval, its `ties`, its paired `difference` to the head's and a `verdict`; for the pairs they
            `agreed` on, what [`selective_accuracy`] gives; and the `risk_coverage` by three confidences: the head's
            margin, the agreement (equal ones by the margin), and the divergence. The ends of intervals are NaN for
            fewer than ten prompts.
        """
        check_threshold(threshold)
        margins, prompts = self.margins["head"], len(set(self.groups))
        signals: dict[str, dict[str, Any]] = {}
        for name, own in self.margins.items():
            wins = pair_wins(own, TIE)
            against = wins - pair_wins(margins, TIE)
            low, high = bootstrap_interval(wins, self.groups)
            if len(set(wins)) == 1:  # drawing again from equal values shows no spread: Wilson's, for as many prompts
                low, high = wilson_interval(wins[0] * prompts, prompts)
            difference_low, difference_high = bootstrap_interval(against, self.groups)
            signals[name] = {
                "accuracy": float(wins.mean()),
                "low": low,
                "high": high,
                "ties": tie_rate(own),
                "difference": float(against.mean()),
                "difference_low": difference_low,
                "difference_high": difference_high,
                "verdict": "better than chance" if low > 0.5 else "worse than chance" if high < 0.5 else "at chance",
            }
            if prompts < FEWEST_GROUPS:
                signals[name] |= {**dict.fromkeys(ENDS, math.nan), "verdict": "too few prompts"}
        agreement = self.agreement()
        found: dict[str, Any] = {
            "suite": self.suite,
            "pairs": len(margins),
            "prompts": prompts,
            "left_out": self.left_out,
            "signals": signals,
        }
        if len(self.margins) == 1:
            return found
        confidences = {
            "margin": np.abs(margins),
            "agreement": _by_rank(agreement, np.abs(margins)),
            "divergence": [-divergence(ps) for ps in zip(*self.probabilities.values(), strict=True)],
        }
        found["agreed"] = {"threshold": threshold, **self._agreed(agreement, threshold)}
        curves = {name: risk_coverage(margins, confidence, TIE) for name, confidence in confidences.items()}
        for name in ("agreement", "divergence"):
            curves[name] |= compare_confidences(
                margins, confidences[name], confidences["margin"], self.groups, TIE
            )
            if prompts < FEWEST_GROUPS:
                curves[name] |= dict.fromkeys(ENDS[2:], math.nan)
        return {**found, "risk_coverage": curves}

    def _agreed(self, agreement, threshold) -> dict[str, float]:
        return selective_accuracy(self.margins["head"], agreement, threshold, self.groups, TIE)

    def choice(self) -> dict[str, Any]:
        """
        What a model's configuration keeps: of the signals that are better than chance on these pairs by their 95 %
        interval, the scale of each, and the least agreement at which the head is shown to be more accurate than on all
        pairs (95 % interval, the share of answered pairs as large as possible). Where there is no such `threshold`,
        agreement with them is not shown to help, and `names` is empty: a copy of the head is better than chance, too.
        A signal that needs a second model or generation is not chosen: `compare` has to find it in the model.
        """
        verdicts = self.summary()["signals"]
        names = [
            name
            for name in self.margins
            if name != "head"
            and verdicts[name]["verdict"] == "better than chance"
            and SIGNALS[name].needs != "generate"
            and not (SIGNALS[name].needs == "reference" and self.settings.get("reference") is not None)
        ]
        scales = {name: fit_temperature(self.margins[name])[0] for name in names if SIGNALS[name].pair is None}
        agreement, threshold = self.agreement(names), None
        for least in sorted(set(agreement)) if names else []:
            if self._agreed(agreement, least)["difference_low"] > 0:
                threshold = least
                break
        helpful = names if threshold is not None else []
        return {"names": helpful, "scales": scales, "threshold": threshold, "pairs": len(agreement)}


def _by_rank(first, second) -> list[float]:
    """Numbers in the order of `first`, and of `second` where these are equal."""
    _, place = np.unique(np.stack([first, second], 1), axis=0, return_inverse=True)
    return place.reshape(-1).astype(float).tolist()


def ready(scorer, names: Iterable[str], settings: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and settings of signals, with the reference loaded, once for all pairs; a `ValueError` if the scorer
    cannot be asked for them."""
    if not hasattr(scorer, "comparisons"):
        raise ValueError(
            f"{type(scorer).__name__} has no LM head to ask: signals are those of a single GRM. Leave them out."
        )
    names = checked(["head", *names], SignalSettings.of(settings))
    if isinstance(settings.get("reference"), (list, tuple)):
        raise ValueError("`reference` is a list of log-probabilities; for a report give the language model itself.")
    if settings.get("reference") is not None:
        settings = {**settings, "reference": reference_scorer(scorer, settings["reference"])}
    Reader(scorer, names, settings)  # whether the model has what they need
    return names, settings


def signal_report(scorer, results: Results, names: Iterable[str], **settings) -> SignalReport:
    """
    Signals on the pairs of evaluated examples.

    Args:
        scorer ([`GRMScorer`]): The model.
        results ([`Results`]): What `evaluate` returned.
        names (`Iterable[str]`): Rows of `SIGNALS`; the head is always among them.
        **settings: As for [`GRMScorer.signals`].

    Raises:
        `ValueError`: the scorer is no GRM's, fewer than two prompts, or as [`GRMScorer.signals`].
    """
    names, settings = ready(scorer, names, settings)
    chats, groups, left_out = [], [], 0
    for example in results.examples:
        for better, worse in example.pairs:
            pair = example.chat(better), example.chat(worse)
            if any(_is_blank(chat) for chat in pair):
                left_out += 1
                continue
            chats.append(pair)
            groups.append(example.group)
    if len(set(groups)) < 2:
        raise ValueError(f"there are pairs of {len(set(groups))} prompts with text; intervals need at least 2.")
    margins: dict[str, list[float]] = {name: [] for name in names}
    probabilities: dict[str, list[float]] = {name: [] for name in names}
    rest = iter(chats)
    while window := list(islice(rest, WINDOW)):
        for found in scorer.comparisons(window, names, **settings):
            for name, probability in found.probabilities.items():
                margins[name].append(found.lean(name))
                probabilities[name].append(probability)
    kept = {name: value for name, value in settings.items() if name != "wording"}
    return SignalReport(results.suite, margins, probabilities, groups, left_out, kept)


def _is_blank(chat) -> bool:
    return isinstance(chat, dict) and isinstance(chat.get("response"), str) and not chat["response"].strip()


def store_choice(folder: str | os.PathLike, report: SignalReport, data: str | os.PathLike) -> dict[str, Any]:
    """
    Write what a validation file shows into a model's configuration, where [`GRMScorer.compare`] finds it.

    Args:
        folder (`str` or path): Of a whole model.
        report ([`SignalReport`]): On the pairs of the file.
        data (`str` or path): The file. Its SHA-256 is stored, and no name.
    """
    config, data = Path(folder) / "config.json", Path(data)
    for path in (config, data):
        if not path.is_file():
            raise ValueError(f"there is no file {path}. The choice is made on a file and stored in a model's folder.")
    values = json.loads(config.read_text(encoding="utf-8"))
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    values["signals"] = {**report.choice(), "suite": report.suite, "file_sha256": digest}
    partial = config.with_name("config.json.partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, config)  # whole or not at all
    return values["signals"]


def table(summary: dict[str, Any]) -> list[list[str]]:
    """The accuracy of each signal and its verdict, beneath a head line."""
    rows = [["signal", "accuracy", "95 % interval", "tied", "against the head", "95 % interval", ""]]
    for name, found in summary["signals"].items():
        few = math.isnan(found["low"])
        rows.append(
            [
                name,
                _percent(found["accuracy"]),
                "" if few else f"{_percent(found['low'])} to {_percent(found['high'])}",
                _percent(found["ties"]),
                "" if name == "head" else f"{100 * found['difference']:+.2f}",
                "" if few or name == "head" else _points(found),
                found["verdict"],
            ]
        )
    return rows


def about(summary: dict[str, Any]) -> str:
    """The pairs that a summary is of."""
    pairs = f"{summary['suite']}: {summary['pairs']} pairs of {summary['prompts']} prompts"
    if summary["left_out"]:
        pairs += f"; {summary['left_out']} pairs with an answer without text are left out"
    return pairs


def sentences(summary: dict[str, Any]) -> list[str]:
    """The pairs that signals agree on, and the areas under the risk-coverage curves."""
    lines = []
    if agreed := summary.get("agreed"):
        share = f"agreement of at least {agreed['threshold']:.2f}: {_percent(agreed['coverage'])} % of the pairs"
        if math.isnan(agreed["accuracy"]):
            lines.append(share)
        else:
            lines.append(
                f"{share}, where the head is right in {_percent(agreed['accuracy'])} % "
                f"({100 * agreed['difference']:+.2f} against all pairs, {_points(agreed)})"
            )
        for name, found in summary["risk_coverage"].items():
            against = "; smaller is better"
            if name != "margin":
                against = f" ({100 * found['difference']:+.2f} against the margin, {_points(found)})"
            lines.append(f"area under the risk-coverage curve by {name}: {_percent(found['area'])}{against}")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _points(found: dict[str, float]) -> str:
    if math.isnan(found["difference_low"]):
        return "too few for an interval"
    return f"{100 * found['difference_low']:+.2f} to {100 * found['difference_high']:+.2f}"
