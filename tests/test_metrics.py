"""The mathematics of `grm_hf/metrics.py`: worked by hand, computed a second time by plain loops, by brute force or by
simulation, compared with scipy and with the `rewardbench` package where they are installed, and held to the
invariances of a Bradley-Terry reward (no number may depend on a shift of one prompt's rewards)."""

import itertools
import math
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import rewardbench_package
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_hf import metrics


def draw(n, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, n)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_every_public_function_shows_an_example():
    public = [
        name
        for name, value in vars(metrics).items()
        if callable(value) and getattr(value, "__module__", None) == metrics.__name__ and not name.startswith("_")
    ]
    assert [name for name in public if ">>>" not in getattr(metrics, name).__doc__] == []


def test_needs_numpy_only():
    code = (
        "import importlib.util, sys\n"
        "for name in ('torch', 'transformers', 'evaluate', 'datasets', 'scipy'): sys.modules[name] = None\n"
        "spec = importlib.util.spec_from_file_location('metrics', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.pairwise_metrics([1.0], [0.0])['accuracy'])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, metrics.__file__], capture_output=True, text=True)
    assert (run.stdout.strip(), run.returncode) == ("1.0", 0), run.stderr


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        ([1.0, float("nan"), 2.0], [0.0, 0.0, 0.0], r"`chosen\[1\]` is nan; a finite number"),
        ([1.0, 2.0], [0.0, -float("inf")], r"`rejected\[1\]` is -inf"),
        ([1.0, None], [0.0, 0.0], r"`chosen\[1\]` is None"),
        ([1.0, 2.0, "x"], [0.0, 0.0, 0.0], r"`chosen\[2\]` is x"),
        ([1.0, 10**400], [0.0, 0.0], r"`chosen\[1\]` is 1000"),
        ([], [], "`chosen` is empty"),
        ([1.0, 2.0, 3.0], [0.0, 1.0], r"3 values and `rejected` has 2.*`chosen\[2\]` is the first without"),
        ([1.0], [0.0, 1.0], r"`rejected\[1\]` is the first without"),
        (np.ones((3, 2)), np.ones((3, 2)), r"shape \(3, 2\); \(n,\) or \(n, 1\) is required"),
        (torch.tensor(1.0), torch.tensor(0.0), r"shape \(\)"),
        ([1e308], [-1e308], r"`chosen - rejected\[0\]` is inf"),
    ],
)
def test_refuses_by_index(chosen, rejected, words):
    with pytest.raises(ValueError, match=words):
        metrics.pairwise_metrics(chosen, rejected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_takes_tensors(dtype):
    chosen = torch.tensor([1.5, 0.25, -2.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([1.0, 0.25, 1.0], dtype=dtype)
    assert metrics.pair_margins(chosen, rejected).tolist() == [0.5, 0.0, -3.0]
    assert metrics.pair_margins(list(chosen.detach()), tuple(rejected)).tolist() == [0.5, 0.0, -3.0]


def test_float32_does_not_make_ties():
    assert metrics.tie_rate(metrics.pair_margins([1.0 + 1e-12], [1.0])) == 0.0


def test_reports_are_flat_python_floats():
    result = metrics.pairwise_metrics(
        np.float32([1, 2, 3, 3]),
        torch.tensor([0, 3, 1, 3]),
        groups=["p", "p", "q", "q"],
        subsets=["a", "a", "b", "b"],
        sections={"all": ["a", "b"]},
        chosen_lengths=[1, 2, 3, 4],
        rejected_lengths=[4, 3, 1, 1],
    )
    others = [
        metrics.one_to_many_metrics([1], [[0, 2]], subsets=["a"], sections={"all": {"a": 1}}),
        metrics.graded_metrics([[1, 2], [1, 3]], [[0, 1], [1, 0]]),
        metrics.seed_interval([1, 2]),
    ]
    for report in (result, *others):
        assert {type(value) for value in report.values()} == {float}, report
        assert all(math.isfinite(value) for value in report.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ties": 0.3}, "`ties` is 0.3"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"level": 95}, "`level` is 95"),
        ({"groups": ["p"]}, "`groups` has 1 labels for 2 rows.*Index 1"),
        ({"groups": ["p", "p"]}, "one group"),
        ({"groups": ["p", "q"], "resamples": 0}, "`resamples` is 0"),
        ({"sections": {"a": ["b"]}}, "without `subsets`"),
        ({"subsets": ["b", "c"], "sections": {"a": ["b"]}}, r"in no section \['c'\]"),
        ({"subsets": ["b", "b"], "sections": {"a": ["b", "c"]}}, r"not in the data \['c'\]"),
        ({"subsets": ["b", "c"], "sections": "rewardbench2"}, "`sections` is 'rewardbench2'"),
        ({"chosen_lengths": [1, 2]}, "both are required"),
        ({"subsets": [1, "1"]}, "have one name as text"),
        ({"subsets": ["b", "b"], "sections": {"a": ["b"], "c": []}}, r"weights of the section 'c' are \[\]"),
        ({"subsets": ["b", "b"], "sections": {"a": {"b": 0}}}, r"weights of the section 'a' are \[0\]"),
        ({"subsets": ["b", "b"], "sections": {"a": {"b": math.nan}}}, "weights of the section 'a' are"),
        ({"subsets": ["b", "c"], "sections": {"a": {"b": -1, "c": 2}}}, "weights of the section 'a' are"),
    ],
)
def test_refuses_settings(arguments, words):
    with pytest.raises(ValueError, match=words):
        metrics.pairwise_metrics([1.0, 2.0], [0.0, 3.0], **arguments)


@pytest.mark.parametrize("values", ["12", b"12", {1.0: 2.0}, {1.0, -1.0}, 3.0])
def test_numbers_have_an_order(values):
    with pytest.raises(ValueError, match="`margins` is a .* numbers in an order"):
        metrics.accuracy(values)


def test_what_numpy_hides_is_no_number():
    with pytest.raises(ValueError, match=r"`margins\[1\]` is nan"):
        metrics.accuracy(np.ma.array([1, -2, 3], mask=[0, 1, 0]))
    assert metrics.accuracy(np.ma.array([1, -2])) == 0.5
    for values in (np.array([1 + 2j]), np.array(["2020"], dtype="datetime64")):
        with pytest.raises(ValueError, match="real numbers are required"):
            metrics.accuracy(values)


def test_generators_are_read_once():
    settings = {"chosen_lengths": [1, 2], "rejected_lengths": [2, 3]}
    expected = metrics.pairwise_metrics([1.0, 2.0], [0.0, 3.0], **settings)
    assert metrics.pairwise_metrics((x for x in [1.0, 2.0]), (x for x in [0.0, 3.0]), **settings) == expected
    lengths = metrics.length_bias([1.0, 2.0], [0.0, 3.0], [1, 2], [2, 3])
    assert metrics.length_bias(iter([1.0, 2.0]), iter([0.0, 3.0]), iter([1, 2]), iter([2, 3])) == lengths


def test_counts_are_whole_numbers():
    with pytest.raises(ValueError, match="n is 1.5"):
        metrics.best_of_n([1, 2, 3], [0, 1, 0.5], 1.5)
    with pytest.raises(ValueError, match="`bins` is 2.5"):
        metrics.reliability([1.0], bins=2.5)
    with pytest.raises(ValueError, match="`resamples` is 0"):
        metrics.compare_confidences([1.0, -1.0], [1, 2], [2, 1], resamples=0)
    with pytest.raises(ValueError, match="the weights of the strata are"):
        metrics.strata_interval([1, 0], ["a", "b"], {"a": 0, "b": 0})


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(("ties", "expected"), [(0, 2 / 5), (0.5, 3 / 5), (1, 4 / 5), ("drop", 2 / 3)])
def test_ties_rule(ties, expected):
    margins = [1.0, 2.0, 0.0, 0.0, -1.0]
    assert metrics.accuracy(margins, ties) == pytest.approx(expected)
    assert metrics.tie_rate(margins) == 2 / 5
    report = metrics.pairwise_metrics(margins, [0.0] * 5, ties=ties, groups="aabbc", subsets="xyxyx")
    assert report["accuracy"] == pytest.approx(expected)
    assert report["accuracy_ci_low"] < expected < report["accuracy_ci_high"]


def test_nothing_is_left_when_every_pair_is_a_tie():
    assert metrics.pairwise_metrics([1.0, 1.0], [1.0, 1.0])["accuracy"] == 0.5
    with pytest.raises(ValueError, match="Every pair is a tie"):
        metrics.pairwise_metrics([1.0, 1.0], [1.0, 1.0], ties="drop")
    with pytest.raises(ValueError, match=r"Every pair of \['b'\] is a tie"):
        metrics.pairwise_metrics([1.0, 1.0], [0.0, 1.0], ties="drop", subsets=["a", "b"])


def test_margins_log_loss_and_brier_by_hand():
    report = metrics.pairwise_metrics([2.0, 0.0, 1.0, 5.0], [1.0, 3.0, 1.0, 1.0], temperature=2.0)
    margins = [1.0, -3.0, 0.0, 4.0]
    assert report["mean_margin"] == 0.5
    assert report["median_margin"] == 0.5
    assert report["n"] == 4.0
    assert report["log_loss"] == pytest.approx(sum(-math.log(sigmoid(m / 2)) for m in margins) / 4, rel=1e-14)
    assert report["brier"] == pytest.approx(sum((1 - sigmoid(m / 2)) ** 2 for m in margins) / 4, rel=1e-14)


def test_log_loss_and_brier_do_not_overflow():
    assert metrics.log_loss([-1e300]) == 1e300
    assert metrics.log_loss([1e300]) == 0.0
    assert (metrics.brier([-1e300]), metrics.brier([1e300])) == (1.0, 0.0)


# --------------------------------------------------------------------------------------------------------- calibration


def their_ece(margins, bins=10):
    """Plain loops over pairs: confidence of the predicted winner against whether it is the right one."""
    cells = defaultdict(list)
    for margin in margins:
        p = sigmoid(margin)
        confidence = max(p, 1 - p)
        right = 0.5 if margin == 0 else float(margin > 0)
        cells[min(int((confidence - 0.5) / 0.5 * bins), bins - 1)].append((confidence, right))
    return sum(abs(sum(c for c, _ in cell) - sum(r for _, r in cell)) for cell in cells.values()) / len(margins)


def test_ece_equals_theirs():
    margins = np.append(draw(500, shift=0.5), [0.0, 0.0])
    assert metrics.expected_calibration_error(margins) == pytest.approx(their_ece(margins), rel=1e-9)
    rows = metrics.reliability(margins)
    assert sum(row["n"] for row in rows) == 502
    assert all(row["low"] <= row["confidence"] <= row["high"] for row in rows)


def test_ece_sees_calibration_where_the_chosen_response_always_comes_first():
    # True preferences: the winner of each pair is drawn with the probability the reward gives, then named "chosen".
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 2, 20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-differences)), differences, -differences)
    assert metrics.expected_calibration_error(margins) < 0.02
    assert metrics.expected_calibration_error(3 * margins) > 0.08
    # What it would be without looking at correctness: every label is 1, so it is far from 0 for a calibrated model.
    assert abs(1 - (1 / (1 + np.exp(-margins))).mean()) > 0.2
    temperature, at_bound = metrics.fit_temperature(5 * margins)
    assert (temperature, at_bound) == (pytest.approx(5.0, rel=0.05), False)


def test_fitted_temperature_is_the_minimum():
    margins = draw(300, shift=0.4) * 7
    temperature, at_bound = metrics.fit_temperature(margins)
    assert not at_bound
    best = metrics.log_loss(margins, temperature)
    for factor in (0.5, 0.999, 1.001, 2.0):
        assert metrics.log_loss(margins, temperature * factor) > best
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    theirs = optimize.minimize_scalar(
        lambda log_t: np.logaddexp(0, -margins / math.exp(log_t)).mean(), bounds=(-5, 5), method="bounded"
    )
    assert math.log(temperature) == pytest.approx(theirs.x, abs=1e-4)


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ([0.5, 1.5], 1.0 / metrics.TEMPERATURE_BOUND),  # separable: the surer the better
        ([1.0, 0.0, 2.0], 1.0 / metrics.TEMPERATURE_BOUND),  # a tie is never an error
        ([-1.0, -1.0], 1.0 * metrics.TEMPERATURE_BOUND),  # always wrong: a coin is better
        ([1.0, -1.0], 1.0 * metrics.TEMPERATURE_BOUND),  # no better than a coin
        ([0.0, 0.0], 1.0),
    ],
)
def test_fitted_temperature_says_when_there_is_no_minimum(margins, expected):
    assert metrics.fit_temperature(margins) == (pytest.approx(expected), True)
    report = metrics.pairwise_metrics(margins, [0.0] * len(margins))
    assert report["temperature_at_bound"] == 1.0


# ----------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 20), (7, 20), (20, 20), (813, 1000)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_wilson_equals_scipy(k, n, level):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    theirs = stats.binomtest(k, n).proportion_ci(confidence_level=level, method="wilson")
    assert metrics.wilson_interval(k, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_solves_the_score_test():
    # Its ends are the shares p with |k/n - p| = z * sqrt(p (1 - p) / n); half wins included.
    for end in metrics.wilson_interval(7.5, 20):
        assert abs(7.5 / 20 - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / 20), rel=1e-9)
    with pytest.raises(ValueError, match="21 successes in 20 trials"):
        metrics.wilson_interval(21, 20)


def test_bootstrap_equals_the_distribution_it_samples():
    # Two prompts, (1, 1, 0) and (0,): the mean is 2/3, 2/4 or 0 with probability 1/4, 1/2 and 1/4.
    values, groups = [1.0, 1.0, 0.0, 0.0], ["p", "p", "p", "q"]
    assert metrics.bootstrap_interval(values, groups, level=0.4) == (0.5, 0.5)
    assert metrics.bootstrap_interval(values, groups, level=0.6) == (0.0, pytest.approx(2 / 3))


def test_bootstrap_draws_whole_prompts():
    # Five pairs a prompt that stand and fall together: the variance is that of 200 prompts, not of 1000 pairs.
    wins = np.repeat((draw(200, shift=0.5) > 0).astype(float), 5)
    share = wins.mean()

    def half_width(groups):
        low, high = metrics.bootstrap_interval(wins, groups, resamples=4000)
        return (high - low) / 2

    assert half_width(np.repeat(np.arange(200), 5)) == pytest.approx(
        1.96 * math.sqrt(share * (1 - share) / 200), rel=0.1
    )
    assert half_width(None) == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 1000), rel=0.1)


def test_bootstrap_is_seeded_and_does_not_see_the_names_of_groups():
    values, groups = draw(40), [i // 3 for i in range(40)]
    first = metrics.bootstrap_interval(values, groups, seed=1)
    assert first == metrics.bootstrap_interval(values, [f"prompt {g}" for g in groups], seed=1)
    assert first != metrics.bootstrap_interval(values, groups, seed=2)


def test_seed_interval_by_table():
    # Student's t, 97.5 %, from printed tables.
    for n, t in ((2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)):
        values = draw(n, n)
        result = metrics.seed_interval(values)
        half = t * np.std(values, ddof=1) / math.sqrt(n)
        assert result["high"] - result["mean"] == pytest.approx(half, rel=2e-4)
        assert result["mean"] - result["low"] == pytest.approx(half, rel=2e-4)
    with pytest.raises(ValueError, match="at least two"):
        metrics.seed_interval([0.7])


def test_seed_interval_equals_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for n, level in itertools.product(range(2, 40), (0.5, 0.9, 0.999)):
        values = draw(n, n)
        theirs = stats.t.interval(level, n - 1, np.mean(values), stats.sem(values))
        ours = metrics.seed_interval(values, level)
        assert (ours["low"], ours["high"]) == pytest.approx(theirs, rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------------------------------------- subsets and benchmarks


def test_sections_by_hand():
    report = metrics.pairwise_metrics(
        [1.0, 1.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0, 0.0, 1.0],
        subsets=["easy", "easy", "easy", "hard", "code"],
        sections={"Chat": ["easy", "hard"], "Code": {"code": 984}},
    )
    assert report["accuracy/easy"] == pytest.approx(2 / 3)
    assert (report["accuracy/hard"], report["accuracy/code"]) == (1.0, 0.0)
    assert report["section/Chat"] == pytest.approx(3 / 4)  # weighted by pairs
    assert report["section/Code"] == 0.0
    assert report["section_mean"] == pytest.approx(3 / 8)
    assert report["subset_mean"] == pytest.approx(5 / 9)


def test_rewardbench_counts_mathematics_as_much_as_code():
    names = [subset for members in metrics.REWARDBENCH.values() for subset in members]
    assert len(names) == 23
    reasoning = metrics.REWARDBENCH["Reasoning"]
    assert reasoning["math-prm"] == sum(weight for name, weight in reasoning.items() if name != "math-prm") == 984
    # Right on mathematics alone: half of Reasoning, an eighth of the whole, however few its pairs are.
    margins = [1.0 if name == "math-prm" else -1.0 for name in names]
    report = metrics.pairwise_metrics(margins, [0.0] * 23, subsets=names, sections="rewardbench")
    assert report["section/Reasoning"] == 0.5
    assert report["section_mean"] == 0.125


def test_rewardbench_constants_and_arithmetic_equal_the_package():
    theirs = rewardbench_package.constants()
    (per_section,) = rewardbench_package.functions("calculate_scores_per_section")
    ours = {name: weight for members in metrics.REWARDBENCH.values() for name, weight in members.items()}
    assert {name: list(members) for name, members in metrics.REWARDBENCH.items()} == theirs["SUBSET_MAPPING"]
    assert ours == theirs["EXAMPLE_COUNTS"]
    scores = dict(zip(ours, np.random.default_rng(0).random(len(ours)).tolist(), strict=True))
    expected = per_section(theirs["EXAMPLE_COUNTS"], theirs["SUBSET_MAPPING"], scores)
    assert metrics.section_means(scores, metrics.REWARDBENCH) == pytest.approx(expected, rel=1e-12)


def ties_rows(seed, prompts=8):
    """Rows like those of the Ties subset: rewards rounded, so that equal ones happen."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for kind, correct in (("ref", 1), ("tied", int(rng.integers(1, 5)))):
            right, wrong = rng.normal(3, 1, correct), rng.normal(0, 1, int(rng.integers(1, 6)))
            if prompt != 3 or kind == "tied":  # a tied row without its ref row
                rows.append((f"{kind}:{prompt}", np.concatenate([right, wrong]).round(1).tolist(), correct))
    return rows


def test_rewardbench2_ties_by_hand():
    rows = [
        ("ref:1", [5.0, 1.0], 1),  # accurate; gap 4
        ("tied:1", [5.0, 4.0, 2.0], 2),  # accurate; gap 2, spread 1: preferred; min(4, 2) > 1: preferred too; tanh(1)
        ("ref:2", [0.0, 1.0], 1),  # not; gap -1
        ("tied:2", [3.0, 1.0, 0.0], 2),  # accurate; gap 1, spread 2: not preferred; tanh(-1/2 - 1)
        ("ref:3", [2.0, 0.0], 1),  # accurate; gap 2
        ("tied:3", [1.0, 1.0, 0.0], 2),  # accurate; gap 1, spread 0: preferred both ways, and no ratio
        ("ref:4", [2.0, 0.0], 1),  # accurate
        ("tied:4", [0.0, 1.0], 1),  # not; one correct response: no spread, no preference
        ("ref:5", [2.0, 0.0], 1),  # accurate; no tied row
    ]
    expected = 0.3 * 3 / 4 + 0.3 * 4 / 5 + 0.2 * 2 / 3 + 0.2 * 2 / 3 + 0.01 * (math.tanh(1) + math.tanh(-1.5)) / 2
    assert metrics.rewardbench2_ties(*zip(*rows, strict=True)) == pytest.approx(expected, rel=1e-12)
    # A reward may be shifted for a prompt, and scaled.
    moved = [(name, [7.0 * score + len(name) for score in scores], correct) for name, scores, correct in rows]
    assert metrics.rewardbench2_ties(*zip(*moved, strict=True)) == pytest.approx(expected, rel=1e-12)


def test_rewardbench2_ties_equals_the_package():
    data = SimpleNamespace(from_dict=lambda columns: columns)
    _, score = rewardbench_package.functions("sample_stats", "process_single_model", np=np, math=math, Dataset=data)
    for seed in range(20):
        rows = ties_rows(seed)
        _, expected = score(
            [{"id": name, "scores": scores, "num_correct": correct} for name, scores, correct in rows]
        )
        assert metrics.rewardbench2_ties(*zip(*rows, strict=True)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("ref:1", [1.0, 0.0], 1), ("ref:1", [1.0, 0.0], 1)], r"`ids\[1\]` is 'ref:1'"),
        ([("best:1", [1.0, 0.0], 1)], r"`ids\[0\]` is 'best:1'"),
        ([("ref:1", [1.0, 0.0], 2)], r"`num_correct\[0\]` is 2 of 2"),
        ([("ref:1", [1.0, 0.0], 1)], "No 'tied' row"),
    ],
)
def test_rewardbench2_ties_refuses(rows, words):
    with pytest.raises(ValueError, match=words):
        metrics.rewardbench2_ties(*zip(*rows, strict=True))


def test_strata_interval_is_the_interval_of_a_mean_and_follows_the_weights():
    values = (draw(400, 1) > 0).astype(float)
    groups = np.repeat(np.arange(200), 2)
    same = metrics.strata_interval(values, ["all"] * 400, {"all": 3.0}, groups)
    assert same == pytest.approx(metrics.bootstrap_interval(values, groups), abs=1e-12)
    # Two strata: against the ratio of sums over drawn groups, by a plain loop.
    strata = np.where(np.arange(400) < 100, "a", "b")
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        drawn = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(200, size=200)])
        means = {s: values[drawn][strata[drawn] == s].mean() for s in "ab"}
        found.append(0.8 * means["a"] + 0.2 * means["b"])
    expected = np.quantile(found, [0.025, 0.975])
    assert metrics.strata_interval(values, strata, {"a": 4, "b": 1}, groups) == pytest.approx(expected, abs=0.012)
    with pytest.raises(ValueError, match=r"no weight for \['b'\]"):
        metrics.strata_interval([1.0, 0.0], ["a", "b"], {"a": 1})


@settings(deadline=None)  # the first one imports scipy
@given(st.lists(st.integers(-2, 2), min_size=2, max_size=8))
def test_preference_graph_of_a_whole_order_is_tau_b_of_scipy(scores):
    """Kendall's tau-b of scipy, which knows ties; the accuracy by counting."""
    stats = pytest.importorskip("scipy.stats")
    margins = [a - b for a, b in itertools.combinations(scores, 2)]  # the first is preferred to all behind it
    result = metrics.preference_graph(margins)
    if len(set(scores)) > 1:
        expected = stats.kendalltau(range(len(scores), 0, -1), scores, variant="b").statistic
        assert result["tau_b"] == pytest.approx(expected, abs=1e-12)
    else:
        assert result["tau_b"] == 0
    assert result["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


def test_roc_auc_equals_scikit_learn_and_counts_ties_half():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.normal(size=30).round(1), rng.integers(0, 2, 30)
        labels[:2] = (0, 1)
        assert metrics.roc_auc(scores, labels) == pytest.approx(sklearn.roc_auc_score(labels, scores), rel=1e-12)
    assert metrics.roc_auc([1.0, 1.0], [1, 0]) == 0.5
    with pytest.raises(ValueError, match="hold both"):
        metrics.roc_auc([1.0, 2.0], [1, 1])


def test_one_to_many_by_hand():
    nine = [1.0] * 9
    report = metrics.one_to_many_metrics([1.0, 2.0, 0.5], [nine, nine, [0.0, 0.6, 0.7]])
    assert report["accuracy"] == pytest.approx(1 / 3)
    assert report["mrr"] == pytest.approx((1 / 10 + 1 + 1 / 3) / 3)  # ties rank before the correct one
    assert report["tie_rate"] == pytest.approx(1 / 3)
    assert report["mean_margin"] == pytest.approx((0 + 1 - 0.2) / 3)
    assert metrics.one_to_many([1.0], [nine], ties=0.5)[0, 0] == 0.5
    # RewardBench 2: as many parts as there are responses at the top
    shared = metrics.one_to_many_metrics([1.0, 1.0, 1.0], [[1.0, 1.0, 0.0], [0.0], [2.0, 1.0]], ties="share")
    assert shared["accuracy"] == pytest.approx((1 / 3 + 1 + 0) / 3)


def test_one_to_many_refuses_by_index():
    with pytest.raises(ValueError, match=r"`rejected\[1\]` is empty"):
        metrics.one_to_many_metrics([1.0, 1.0], [[0.0], []])
    with pytest.raises(ValueError, match=r"`rejected\[1\]\[2\]` is nan"):
        metrics.one_to_many_metrics([1.0, 1.0], [[0.0], [0.0, 0.0, math.nan]])


def test_one_to_one_is_a_pair():
    chosen, rejected = draw(50, 1).round(1), draw(50, 2).round(1)
    many = metrics.one_to_many_metrics(chosen, rejected[:, None], ties=0.5)
    pairs = metrics.pairwise_metrics(chosen, rejected)
    for name in ("n", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "tie_rate", "mean_margin", "median_margin"):
        assert many[name] == pairs[name]


# --------------------------------------------------------------------------------------- rewards against a gold reward


@pytest.mark.parametrize("rounding", [6, 0])
def test_best_of_n_equals_the_mean_over_all_subsets(rounding):
    rewards, gold = draw(8, 1).round(rounding), draw(8, 2)
    for n in range(1, 9):
        picked = []
        for subset in itertools.combinations(range(8), n):
            top = max(rewards[i] for i in subset)
            picked.append(np.mean([gold[i] for i in subset if rewards[i] == top]))
        assert metrics.best_of_n(rewards, gold, n) == pytest.approx(np.mean(picked), rel=1e-9)


def test_best_of_n_on_many_samples():
    rewards = draw(5000)
    assert metrics.best_of_n(rewards, np.ones(5000), 405) == pytest.approx(1.0, rel=1e-12)  # the weights sum to 1
    assert metrics.best_of_n(rewards, rewards, 5000) == rewards.max()
    assert metrics.best_of_n(rewards, rewards, 1) == pytest.approx(rewards.mean())
    with pytest.raises(ValueError, match="n is 3 and the prompt has 2 samples"):
        metrics.best_of_n([1.0, 2.0], [1.0, 2.0], 3)
    # The figures quoted with the protocol of over-optimisation curves: n from 1 to about 402 for a KL up to 5.
    assert metrics.best_of_n_kl(402) < 5 < metrics.best_of_n_kl(404)


def test_correlations_by_hand():
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 3.0, 2.0]
    # Kendall: pairs + + + 0 - -; 6 untied in x, 5 in y. Spearman: ranks of y are 1, 3.5, 3.5, 2.
    assert metrics.kendall(x, y) == pytest.approx(1 / math.sqrt(30))
    assert metrics.spearman(x, y) == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 3.5, 3.5, 2])[0, 1])
    assert metrics.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert metrics.pearson(np.array(x) * 1e200, np.array(y) * 1e-200) == pytest.approx(metrics.pearson(x, y))
    for correlation in (metrics.kendall, metrics.spearman, metrics.pearson):
        with pytest.raises(ValueError, match="Every value of `y` is 1.0"):
            correlation([1.0, 2.0], [1.0, 1.0])


def test_correlations_equal_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for seed, rounding in ((0, 8), (1, 0), (2, 1)):
        x, y = draw(60, seed).round(rounding), draw(60, seed + 10).round(rounding)
        assert metrics.kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


def test_graded_metrics_by_hand():
    report = metrics.graded_metrics([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0]], [[0.0, 3.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert report["n_prompts"] == 2.0
    assert report["n_ranked"] == 1.0  # on the second prompt the reward does not vary
    assert report["best_of_1"] == pytest.approx((1.5 + 1.0) / 2)
    assert report["best_of_2"] == pytest.approx(((3 * 2 + 2 * 1 + 1 * 3) / 6 + 1.0) / 2)
    assert "best_of_4" not in report
    assert report["kendall"] == pytest.approx(2 / 6)
    assert "starc_low" in report and report["starc_low"] <= report["starc"] <= report["starc_high"]
    constant = metrics.graded_metrics([[1.0, 1.0]], [[0.0, 1.0]])
    assert "kendall" not in constant and "starc_low" not in constant
    assert constant["starc"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"`gold\[1\]` has 2; .*`rewards\[1\]\[2\]` is the first"):
        metrics.graded_metrics([[1.0, 2.0], [1.0, 2.0, 3.0]], [[1.0, 2.0], [1.0, 2.0]])


# --------------------------------------------------------------------------------------------------------------- STARC


def prompts(n=60, each=4):
    return draw(n, 1), draw(n, 2), np.repeat(np.arange(n // each), each)


def test_starc_is_the_formula():
    a, b, groups = prompts()
    centred = [np.concatenate([x[groups == g] - x[groups == g].mean() for g in range(15)]) for x in (a, b)]
    rho = np.corrcoef(*centred)[0, 1]
    assert metrics.starc_distance(a, b, groups) == pytest.approx(math.sqrt(2 - 2 * rho), rel=1e-12)
    low, high = metrics.starc_interval(a, b, groups)
    assert low < math.sqrt(2 - 2 * rho) < high


def test_starc_values_that_are_known():
    a, b, groups = prompts()
    shift = draw(15, 3)[groups] * 100
    distance = metrics.starc_distance
    assert distance(a, 3 * a + shift, groups) == pytest.approx(0, abs=1e-12)
    assert distance(a, -a, groups) == pytest.approx(2)
    assert distance(a, shift, groups) == 1.0  # no preference on any prompt: the zero vector
    assert distance(shift, 2 * shift, groups) == 0.0
    thirds = np.arange(60) // 3
    assert distance(a, 0.1 + thirds / 7, thirds) == pytest.approx(1.0)  # also where a mean of equal numbers is rounded
    assert distance(a, b, groups) == distance(b, a, groups)
    independent = distance(*[draw(20_000, seed) for seed in (5, 6)], np.repeat(np.arange(5000), 4))
    assert independent == pytest.approx(math.sqrt(2), rel=0.02)
    with pytest.raises(ValueError, match="one response"):
        distance(a, b, range(60))


def test_starc_interval_of_known_distances():
    a, _, groups = prompts()
    assert metrics.starc_interval(a, -a, groups) == pytest.approx((2, 2))
    assert metrics.starc_interval(a, groups.astype(float), groups) == (1.0, 1.0)
    assert metrics.starc_interval(groups.astype(float), a, groups) == (1.0, 1.0)
    assert metrics.starc_interval(a, 2 * a + groups, groups) == pytest.approx((0, 0), abs=1e-6)


def test_kappa():
    # 20 of 50 both yes, 10 both no: observed 0.6; yes 0.5 and 0.7 of the time: expected 0.5 * 0.7 + 0.5 * 0.3.
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 15 + ["no"] * 10
    assert metrics.cohen_kappa(a, b) == pytest.approx((0.6 - 0.5) / (1 - 0.5))
    # yes 0.8 and 0.6 of the time, 0.5 both, 0.1 neither
    a, b = ["yes"] * 8 + ["no"] * 2, ["yes"] * 5 + ["no"] * 3 + ["yes", "no"]
    assert metrics.cohen_kappa(a, b) == pytest.approx((0.6 - 0.56) / (1 - 0.56))
    assert metrics.cohen_kappa(a, a) == 1.0
    assert metrics.cohen_kappa("xxyy", "xyxy") == 0.0
    with pytest.raises(ValueError, match="one and the same label"):
        metrics.cohen_kappa("xx", "xx")


# --------------------------------------------------------------------------------------------------------- length bias


def test_length_bias_by_hand():
    result = metrics.length_bias([3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 1.0, 0.0], [30, 10, 5, 9], [10, 20, 15, 9])
    assert result["chosen_longer_rate"] == pytest.approx(1 / 3)
    assert result["accuracy_chosen_longer"] == 1.0
    assert result["accuracy_chosen_shorter"] == 0.5
    rewards, lengths = [3, 1, 2, 0, 1, 2, 1, 0], [30, 10, 5, 9, 10, 20, 15, 9]
    assert result["length_pearson"] == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])
    # margins 2, -1, 1, 0 against length differences 20, -10, -10, 0
    assert result["length_pearson_within"] == pytest.approx((40 + 10 - 10) / math.sqrt(6 * 600))


def test_length_bias_of_a_reward_that_is_length():
    lengths = np.random.default_rng(0).integers(1, 400, (2, 50))
    result = metrics.length_bias(*lengths, *lengths)
    assert {name: round(value, 9) for name, value in result.items() if name.startswith("length")} == {
        "length_pearson": 1.0,
        "length_spearman": 1.0,
        "length_pearson_within": 1.0,
    }
    assert (result["accuracy_chosen_longer"], result["accuracy_chosen_shorter"]) == (1.0, 0.0)


def test_length_bias_leaves_out_what_is_not_defined():
    assert metrics.length_bias([1.0, 2.0], [0.0, 0.0], [5, 5], [5, 5]) == {}
    assert set(metrics.length_bias([1.0], [1.0], [6], [5])) == {"chosen_longer_rate", "accuracy_chosen_longer"}
    result = metrics.length_bias([1.0, 2.0, 1.0], [1.0, 1.0, 1.0], [6, 6, 4], [5, 5, 5], ties="drop")
    assert result["accuracy_chosen_longer"] == 1.0 and "accuracy_chosen_shorter" not in result


# --------------------------------------------------------------------------------------------------------- invariances

LEVELS = st.integers(-8, 8).map(lambda i: i / 4)
ROWS = st.lists(st.tuples(LEVELS, LEVELS, st.integers(0, 3)), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.lists(st.integers(-9, 9), min_size=4, max_size=4))
def test_a_shift_of_a_prompts_rewards_changes_nothing(rows, shifts):
    chosen, rejected, prompt = (np.array(column) for column in zip(*rows, strict=True))
    shift = np.array(shifts)[prompt]
    assert metrics.pairwise_metrics(chosen, rejected) == metrics.pairwise_metrics(chosen + shift, rejected + shift)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([0.125, 2.0, 64.0]))
def test_a_scale_moves_only_what_has_units(rows, scale):
    chosen, rejected, prompt = (np.array(column) for column in zip(*rows, strict=True))
    before = metrics.pairwise_metrics(chosen, rejected, subsets=prompt.tolist())
    after = metrics.pairwise_metrics(chosen * scale, rejected * scale, subsets=prompt.tolist(), temperature=scale)
    units = {"mean_margin", "median_margin"} | ({"temperature"} if (chosen != rejected).any() else set())
    expected = {name: value * (scale if name in units else 1) for name, value in before.items()}
    assert after == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_swapping_chosen_and_rejected_mirrors(rows):
    chosen, rejected, _ = (np.array(column) for column in zip(*rows, strict=True))
    one, other = metrics.pairwise_metrics(chosen, rejected), metrics.pairwise_metrics(rejected, chosen)
    assert one["accuracy"] == pytest.approx(1 - other["accuracy"])
    assert one["accuracy_ci_low"] == pytest.approx(1 - other["accuracy_ci_high"])
    assert one["mean_margin"] == -other["mean_margin"]
    # log s(-m) = log s(m) - m
    assert one["log_loss"] == pytest.approx(other["log_loss"] - one["mean_margin"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LEVELS, LEVELS, LEVELS), min_size=4, max_size=24))
def test_starc_is_a_distance(rows):
    a, b, c = (np.array(column) for column in zip(*rows, strict=True))
    groups = np.arange(len(a)) // 2
    ab, bc, ac = (metrics.starc_distance(x, y, groups) for x, y in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc + 1e-9
    assert 0 <= ab <= 2
    assert ab == pytest.approx(metrics.starc_distance(4 * b - groups, a + 2 * groups, groups), abs=1e-9)


# --------------------------------------------------------------------------------------------------------- the trainer


def test_compute_metrics_counts_as_the_trainer_does():
    rewards = np.float32([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0], [3.0, 1.0]])
    result = metrics.compute_metrics(SimpleNamespace(predictions=rewards))
    assert result["accuracy"] == 0.5  # a tie is not a win
    assert result == metrics.pairwise_metrics(rewards[:, 0], rewards[:, 1], ties=0)
    with pytest.raises(ValueError, match=r"shape \(4,\); \(n, 2\) is required"):
        metrics.compute_metrics(SimpleNamespace(predictions=rewards[:, 0]))


# ------------------------------------------------------------------------------------------- what rewards come as


def test_rewards_and_groups_as_people_have_them():
    """Columns of a reward model, Series with an index of their own, prompts that are messages."""
    pandas = pytest.importorskip("pandas")
    chosen, rejected, groups = [1.0, 2.0, 0.5, 3.0], [0.0, 1.0, 1.0, 2.0], ["a", "b", "a", "b"]
    right = metrics.pairwise_metrics(chosen, rejected, groups=groups)
    column = lambda values: np.array(values)[:, None]  # noqa: E731
    assert metrics.pairwise_metrics(column(chosen), column(rejected), groups=groups) == right
    assert metrics.pairwise_metrics([[x] for x in chosen], rejected, groups=groups) == right
    series = lambda values: pandas.Series(values, index=[7, 3, 9, 1])  # noqa: E731
    assert metrics.pairwise_metrics(series(chosen), series(rejected), groups=series(groups)) == right
    prompts = [[{"role": "user", "content": group, "n": [1]}] for group in groups]
    assert metrics.pairwise_metrics(chosen, rejected, groups=prompts) == right
    assert metrics.pairwise_metrics(chosen, rejected, groups=[dict(reversed(p[0].items())) for p in prompts]) == right
    with pytest.raises(ValueError, match=r"`chosen\[1\]` is nan"):
        metrics.pairwise_metrics(series([1.0, float("nan"), 1.0, 1.0]), rejected)
