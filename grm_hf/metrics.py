"""Measures of a reward model from its rewards: accuracy, calibration, intervals, benchmark scores, best-of-n, rank
correlations, length bias, and the distance between two rewards.

The *margin* of a preference pair is the reward of the chosen response minus that of the rejected one, in the units of
the reward model. `sigmoid(margin / temperature)` is the probability that the model gives to the human's choice. Every
function is pure, needs numpy only and returns Python floats. It refuses invalid input (an empty input, unequal
lengths, NaN, infinity) and names the index. `pairwise_metrics`, `one_to_many_metrics` and `graded_metrics` combine the
small functions into one flat dictionary. They leave out a number that is not defined for the data.

Random numbers come from a seeded generator: equal inputs give equal intervals.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal

import numpy as np


Ties = float | Literal["drop"]
Sections = Literal["rewardbench"] | Mapping[str, Mapping[str, float] | Sequence[str]]

# The fitted temperature stays within this factor of the mean absolute margin.
TEMPERATURE_BOUND = 1000.0

# RewardBench 1 (arXiv 2403.13787): the subsets of each section and their weights. A weight is the number of pairs,
# except for `math-prm`: its 447 pairs count as 984, as many as the six code subsets together.
REWARDBENCH: dict[str, dict[str, float]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}


# -------------------------------------------------------------------------------------------------------------- inputs


def _numbers(name: str, values: Any) -> np.ndarray:
    """`values` (a list, a Series, an array or a tensor of any type and device, of shape `(n,)` or `(n, 1)`) as checked
    float64 of shape `(n,)`."""
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not isinstance(values, Iterable):
        raise ValueError(f"`{name}` is a {type(values).__name__}; numbers in an order, such as a list, are required.")
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(np.float64), math.nan)
    if not isinstance(values, np.ndarray):
        values = values.tolist() if hasattr(values, "tolist") else list(values)
    elif values.dtype.kind in "cmM":  # their cast to floats loses what they are
        raise ValueError(f"`{name}` has dtype {values.dtype}; real numbers are required.")
    try:
        array = np.asarray(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        array = np.array([_number_or_nan(value) for value in values])
    if array.ndim == 2 and array.shape[1] == 1:  # as a reward model gives them
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"`{name}` has shape {array.shape}; (n,) or (n, 1) is required.")
    if not array.size:
        raise ValueError(f"`{name}` is empty; at least one value is required.")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(f"`{name}[{bad[0]}]` is {values[bad[0]]}; a finite number is required.")
    return array


def _number_or_nan(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _require_equal_lengths(**columns: Sequence | np.ndarray) -> None:
    (first, length), *others = ((name, len(column)) for name, column in columns.items())
    for name, other in others:
        if other != length:
            longer = first if length > other else name
            raise ValueError(
                f"`{first}` has {length} values and `{name}` has {other}; equal lengths are required. "
                f"`{longer}[{min(length, other)}]` is the first without a partner."
            )


def _codes(name: str, labels: Iterable[Hashable] | None, n: int) -> tuple[np.ndarray, list]:
    """Labels as integers in the order of first appearance, and the labels; without labels each row has its own."""
    if labels is None:
        return np.arange(n), list(range(n))
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(labels) != n:
        raise ValueError(
            f"`{name}` has {len(labels)} labels for {n} rows; one a row is required. Index {min(n, len(labels))} is "
            "the first without a partner."
        )
    index: dict = {}
    codes = np.array([index.setdefault(_key(label), len(index)) for label in labels])
    return codes, [labels[i] for i in np.unique(codes, return_index=True)[1]]


def _key(label: Any) -> Hashable:
    """A hashable key that equal labels share, also for lists such as the messages of a prompt."""
    if isinstance(label, dict):
        return (dict, *sorted((key, _key(value)) for key, value in label.items()))
    return (list, *map(_key, label)) if isinstance(label, (list, tuple)) else label


def _check_weights(name: str, weights: Iterable[float]) -> None:
    weights = list(weights)
    if not (weights and all(0 <= weight < math.inf for weight in weights) and any(weights)):
        raise ValueError(f"the weights of {name} are {weights}; finite ones from 0 on are required, and not all 0.")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}; a confidence level is between 0 and 1, for example 0.95.")


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"`temperature` is {temperature}; a positive number is required.")


# --------------------------------------------------------------------------------------------------------------- pairs


def pair_margins(chosen: Any, rejected: Any) -> np.ndarray:
    """
    Reward of the chosen response minus reward of the rejected one, for each pair: `(n,)`, in reward units.

    >>> pair_margins([2.0, 0.5], [1.0, 1.0]).tolist()
    [1.0, -0.5]
    """
    chosen, rejected = _numbers("chosen", chosen), _numbers("rejected", rejected)
    _require_equal_lengths(chosen=chosen, rejected=rejected)
    with np.errstate(over="ignore"):
        return _numbers("chosen - rejected", chosen - rejected)


def pair_wins(margins: Any, ties: Ties = 0.5) -> np.ndarray:
    """
    The win of each pair: 1 for a positive margin, 0 for a negative one, `ties` for a margin of exactly zero: 0 (as in
    RewardBench 1), 0.5 (a fair coin), 1, or `"drop"`, which gives NaN.

    >>> pair_wins([1.0, 0.0, -1.0], ties=0.5).tolist()
    [1.0, 0.5, 0.0]
    """
    margins = _numbers("margins", margins)
    if ties not in (0, 0.5, 1, "drop"):
        raise ValueError(f"`ties` is {ties!r}; 0, 0.5, 1 or 'drop' is required.")
    tie = math.nan if ties == "drop" else float(ties)
    return np.where(margins > 0, 1.0, np.where(margins == 0, tie, 0.0))


def _kept(wins: np.ndarray) -> np.ndarray:
    """Which pairs count. Dropping ties must leave some."""
    kept = ~np.isnan(wins)
    if not kept.any():
        raise ValueError("Every pair is a tie, and ties='drop' leaves none. Use ties=0.5, or look at the rewards.")
    return kept


def accuracy(margins: Any, ties: Ties = 0.5) -> float:
    """
    Share of pairs in which the chosen response has the higher reward; ties as in [`pair_wins`].

    >>> accuracy([1.0, 0.0, -1.0, 2.0]), accuracy([1.0, 0.0, -1.0, 2.0], ties=0)
    (0.625, 0.5)
    """
    wins = pair_wins(margins, ties)
    return float(wins[_kept(wins)].mean())


def tie_rate(margins: Any) -> float:
    """
    Share of pairs with two equal rewards.

    >>> tie_rate([1.0, 0.0, -1.0, 2.0])
    0.25
    """
    return float((_numbers("margins", margins) == 0).mean())


# --------------------------------------------------------------------------------------------------------- calibration


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def log_loss(margins: Any, temperature: float = 1.0) -> float:
    """
    Mean of `-log sigmoid(margin / temperature)`, in nats; `log(2)` is a coin. The Bradley-Terry loss. Does not
    overflow.

    >>> round(log_loss([0.0]), 4), log_loss([-1e6])
    (0.6931, 1000000.0)
    """
    _check_temperature(temperature)
    return float(np.logaddexp(0.0, -_numbers("margins", margins) / temperature).mean())


def brier(margins: Any, temperature: float = 1.0) -> float:
    """
    Mean squared distance of `sigmoid(margin / temperature)` from 1: 0 is perfect, 0.25 is a coin (Brier, 1950).

    >>> brier([0.0])
    0.25
    """
    _check_temperature(temperature)
    return float((_sigmoid(-_numbers("margins", margins) / temperature) ** 2).mean())


def reliability(margins: Any, temperature: float = 1.0, bins: int = 10) -> list[dict[str, float]]:
    """
    The bars of a reliability diagram.

    The confidence of a prediction is `max(p, 1 - p)`, between 1/2 and 1. The prediction is right if the chosen
    response has the higher reward; a tie is half right. (The chosen response always comes first, so all labels are 1,
    and the calibration of `p` itself would measure nothing.)

    Args:
        margins (`Sequence[float]`):
            One for each pair.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the margins.
        bins (`int`, *optional*, defaults to `10`):
            Number of bins of equal width between 1/2 and 1.

    Returns:
        `list[dict[str, float]]`: for each bin that is not empty `low`, `high`, the mean `confidence`, the `accuracy`
        and the number of pairs `n`.

    >>> reliability([3.0, 3.0, -3.0, 0.0], bins=2)[0]
    {'low': 0.5, 'high': 0.75, 'confidence': 0.5, 'accuracy': 0.5, 'n': 1.0}
    """
    _check_temperature(temperature)
    if bins < 1 or bins != int(bins):
        raise ValueError(f"`bins` is {bins}; a whole number of at least 1 is required.")
    margins = _numbers("margins", margins)
    confidence, right = _sigmoid(np.abs(margins) / temperature), pair_wins(margins)
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for b in np.unique(bin_of):
        here = bin_of == b
        rows.append(
            {
                "low": float(0.5 + b / (2 * bins)),
                "high": float(0.5 + (b + 1) / (2 * bins)),
                "confidence": float(confidence[here].mean()),
                "accuracy": float(right[here].mean()),
                "n": float(here.sum()),
            }
        )
    return rows


def expected_calibration_error(margins: Any, temperature: float = 1.0, bins: int = 10) -> float:
    """
    Mean distance between confidence and accuracy over the bins of [`reliability`], weighted by their sizes: 0 is
    calibrated, 1/2 is the worst for a model that is never unsure. Biased upwards when pairs are few.

    >>> round(expected_calibration_error([100.0, -100.0]), 4)
    0.5
    """
    rows = reliability(margins, temperature, bins)
    n = sum(row["n"] for row in rows)
    return sum(row["n"] / n * abs(row["accuracy"] - row["confidence"]) for row in rows)


def fit_temperature(margins: Any) -> tuple[float, bool]:
    """
    The temperature with the lowest [`log_loss`] on these pairs (temperature scaling, arXiv 1706.04599), and whether it
    hit its bound.

    The loss is convex in `1 / temperature`, so the minimum is unique. It lies at infinity if the margins are not
    positive on average (a coin is then better), and at zero if no margin is negative (separable pairs give no scale).
    The result is then `TEMPERATURE_BOUND` times, or one part in `TEMPERATURE_BOUND` of, the mean absolute margin, and
    the second value is `True`. Margins that are all zero fit every temperature: `(1.0, True)`. Scaling the margins
    scales the result.

    >>> temperature, at_bound = fit_temperature([1.0, 1.0, 1.0, -1.0])  # right 3 times in 4: sigmoid(1 / T) = 3 / 4
    >>> round(temperature * math.log(3), 6), at_bound
    (1.0, False)
    >>> fit_temperature([1.0, 3.0])
    (0.002, True)
    """
    margins = _numbers("margins", margins)
    scale = float(np.abs(margins).mean())
    if scale == 0:
        return 1.0, True
    margins = margins / scale

    def falls(log_inverse: float) -> bool:
        """Whether the loss still falls as the inverse temperature grows."""
        return float((margins * _sigmoid(-math.exp(log_inverse) * margins)).mean()) > 0

    low, high = -math.log(TEMPERATURE_BOUND), math.log(TEMPERATURE_BOUND)
    if not falls(low):
        return scale * TEMPERATURE_BOUND, True
    if margins.min() >= 0 or falls(high):
        return scale / TEMPERATURE_BOUND, True
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) else (low, middle)
    return scale * math.exp(-low), False


# ----------------------------------------------------------------------------------------------------------- intervals


def wilson_interval(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """
    Interval for a share, from the score test (Wilson, 1927). It assumes independent trials: for several pairs of one
    prompt see [`bootstrap_interval`]. `successes` may be half-integer. A half win varies less than a whole one, so the
    interval is then a little wide.

    >>> [round(x, 4) for x in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    _check_level(level)
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"{successes} successes in {n} trials; 0 <= successes <= n and n > 0 are required.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = successes / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # Rounding must not push the interval off the observed share.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def _bootstrap_sums(columns: np.ndarray, clusters: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of the columns `(n, k)` over clusters drawn with replacement: `(resamples, k)`."""
    count = int(clusters.max()) + 1
    if count < 2:
        raise ValueError("All rows belong to one group; a clustered bootstrap needs at least two groups.")
    if resamples < 1:
        raise ValueError(f"`resamples` is {resamples}; at least 1 is required.")
    sums = np.stack([np.bincount(clusters, weights=column, minlength=count) for column in columns.T], axis=1)
    rng = np.random.default_rng(seed)
    rows = max(1, 2_000_000 // count)  # resamples drawn at once: bounds the memory
    drawn = [
        sums[rng.integers(count, size=(min(rows, resamples - start), count))].sum(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(drawn)


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: Any, groups: Iterable[Hashable] | None = None, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile interval for the mean of `values`, from whole groups drawn with replacement.

    Pairs of one prompt succeed and fail together, so prompts are drawn, each with all its pairs.

    Args:
        values (`Sequence[float]`):
            For example the output of [`pair_wins`].
        groups (`Iterable[Hashable]`, *optional*):
            The prompt of each value. By default each value is its own group.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end.

    >>> bootstrap_interval([1.0, 1.0, 0.0, 0.0], groups=["a", "a", "b", "b"])
    (0.0, 1.0)
    """
    values = _numbers("values", values)
    clusters, _ = _codes("groups", groups, len(values))
    total, n = _bootstrap_sums(np.stack([values, np.ones_like(values)], axis=1), clusters, resamples, seed).T
    return _percentiles(total / n, level)


def strata_interval(
    values: Any,
    strata: Iterable[Hashable],
    weights: Mapping[Any, float],
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Percentile interval for a weighted mean of the strata's means, such as a benchmark's score over its subsets.

    Whole groups are drawn with replacement, each with all its values in all strata. The sizes of the strata stay
    fixed, and the sum of `weight / size * (value - mean of the stratum)` varies. With few groups an end may lie beyond
    the least or the greatest value; it is then moved to that value.

    Args:
        values (`Sequence[float]`):
            For example the output of [`pair_wins`].
        strata (`Iterable[Hashable]`):
            The stratum of each value.
        weights (`Mapping[Hashable, float]`):
            Weight of each stratum. Weights are divided by their sum.
        groups, level, resamples, seed:
            As in [`bootstrap_interval`].

    Returns:
        `tuple[float, float]`: lower and upper end.

    >>> strata_interval([1.0, 0.0] * 50 + [1.0] * 100, ["a"] * 100 + ["b"] * 100, {"a": 1, "b": 3})
    (0.85, 0.89875)
    """
    values = _numbers("values", values)
    codes, names = _codes("strata", strata, len(values))
    clusters, _ = _codes("groups", groups, len(values))
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"`weights` has no weight for {missing}; it has {sorted(map(str, weights))}.")
    sizes = np.bincount(codes)
    means = np.bincount(codes, weights=values) / sizes
    shares = np.array([float(weights[name]) for name in names])
    _check_weights("the strata", shares.tolist())
    shares /= shares.sum()
    moves = (shares / sizes)[codes] * (values - means[codes])
    drawn = _bootstrap_sums(moves[:, None], clusters, resamples, seed)[:, 0]
    drawn = np.clip(float(shares @ means) + drawn, values.min(), values.max())
    return _percentiles(drawn, level)


def t_central_probability(angle: float, df: int) -> float:
    """
    `P(|T| <= sqrt(df) * tan(angle))` for Student's t: for whole `df` a finite series in the angle.

    >>> round(t_central_probability(math.atan(12.7062), df=1), 4)
    0.95
    """
    odd, cosine = df % 2, math.cos(angle)
    term, total = cosine**odd, 0.0
    for j in range(df // 2):
        if j:
            term *= cosine**2 * (2 * j - 1 + odd) / (2 * j + odd)
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def seed_interval(values: Any, level: float = 0.95) -> dict[str, float]:
    """
    Mean over training runs that differ by their seed, with Student's t interval.

    Args:
        values (`Sequence[float]`):
            One result a seed; at least two.
        level (`float`, *optional*, defaults to `0.95`):
            Confidence level.

    Returns:
        `dict[str, float]`: `mean`, `std` (of single runs, with `n - 1` in the denominator), `low`, `high`.

    >>> {name: round(x, 3) for name, x in seed_interval([0.70, 0.72, 0.74]).items()}
    {'mean': 0.72, 'std': 0.02, 'low': 0.67, 'high': 0.77}
    """
    _check_level(level)
    values = _numbers("values", values)
    n = len(values)
    if n < 2:
        raise ValueError("One run shows no spread; an interval over seeds needs at least two.")
    low_angle, high_angle = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low_angle + high_angle) / 2
        if t_central_probability(middle, n - 1) < level:
            low_angle = middle
        else:
            high_angle = middle
    mean, std = float(values.mean()), float(values.std(ddof=1))
    half = math.sqrt(n - 1) * math.tan(low_angle) * std / math.sqrt(n)
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half}


# --------------------------------------------------------------------------------------------------- selective answers


def risk_coverage(margins: Any, confidences: Any, ties: Ties = 0) -> dict[str, Any]:
    """
    Risk-coverage curve: the share of wrong pairs among those one is most confident of.

    Args:
        margins (`Sequence[float]`):
            Reward of the chosen response minus that of the rejected one.
        confidences (`Sequence[float]`):
            Pairs are answered from the largest on; equal ones together.
        ties:
            As in [`pair_wins`].

    Returns:
        `dict`: `area`, the mean risk over 1, 2, ..., n answered pairs (0 is best; equal confidences count as in
        random order), and the curve, `coverage` and `risk`, a point for each distinct confidence.

    >>> risk_coverage([1.0, 1.0, -1.0, 1.0], [0.9, 0.9, 0.2, 0.5])["risk"]
    [0.0, 0.0, 0.25]
    """
    wrong, confidences = 1 - pair_wins(margins, ties), _numbers("confidences", confidences)
    _require_equal_lengths(margins=wrong, confidences=confidences)
    kept = _kept(wrong)
    return _risk_coverage(wrong[kept], confidences[kept])


def _risk_coverage(wrong: np.ndarray, confidences: np.ndarray) -> dict[str, Any]:
    _, place, sizes = np.unique(-confidences, return_inverse=True, return_counts=True)
    mean = np.bincount(place, weights=wrong) / sizes
    errors, ends = np.repeat(mean, sizes).cumsum(), sizes.cumsum()
    risk = errors / np.arange(1, len(wrong) + 1)
    return {
        "area": float(risk.mean()),
        "coverage": (ends / len(wrong)).tolist(),
        "risk": np.round(risk[ends - 1], 12).tolist(),
    }


def compare_confidences(
    margins: Any,
    confidences_a: Any,
    confidences_b: Any,
    groups: Iterable[Hashable] | None = None,
    ties: Ties = 0,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """
    Which of two confidences tells better when the answer is right: the difference of their [`risk_coverage`] areas
    (`area_a - area_b`, negative where `a` is better) with its paired bootstrap interval over groups: `difference`,
    `difference_low`, `difference_high`.

    >>> compare_confidences([1.0, 1.0, -1.0, -1.0], [4, 3, 2, 1], [1, 1, 1, 1])["difference"]
    -0.2916666666666667
    """
    wrong = 1 - pair_wins(margins, ties)
    both = [_numbers("confidences", confidences) for confidences in (confidences_a, confidences_b)]
    _require_equal_lengths(margins=wrong, confidences_a=both[0], confidences_b=both[1])
    clusters, _ = _codes("groups", groups, len(wrong))
    rows = np.flatnonzero(_kept(wrong))

    def difference(rows):
        a, b = (_risk_coverage(wrong[rows], confidences[rows])["area"] for confidences in both)
        return a - b

    members = [rows[clusters[rows] == code] for code in np.unique(clusters[rows])]
    if len(members) < 2:
        raise ValueError(f"there are {len(members)} groups; an interval needs at least 2.")
    if resamples < 1:
        raise ValueError(f"`resamples` is {resamples}; at least 1 is required.")
    rng = np.random.default_rng(seed)
    drawn = [
        difference(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
        for _ in range(resamples)
    ]
    low, high = _percentiles(np.array(drawn), level)
    return {"difference": difference(rows), "difference_low": low, "difference_high": high}


FEWEST_GROUPS = 10  # with an answered pair, for an interval of their accuracy


def selective_accuracy(
    margins: Any,
    confidences: Any,
    threshold: float,
    groups: Iterable[Hashable] | None = None,
    ties: Ties = 0,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """
    Accuracy on the pairs whose confidence reaches a threshold.

    Returns:
        `dict[str, float]`: `coverage` (their share), `accuracy` (NaN where there are none), its `difference` to the
        accuracy on all pairs, and the paired bootstrap interval of this over groups, `difference_low` and
        `difference_high` (NaN where fewer than ten groups have such a pair: so few say nothing of others).

    >>> selective_accuracy([1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 0.0], 0.5)["coverage"]
    0.75
    """
    wins, confidences = pair_wins(margins, ties), _numbers("confidences", confidences)
    _require_equal_lengths(margins=wins, confidences=confidences)
    clusters, _ = _codes("groups", groups, len(wins))
    kept = _kept(wins)
    wins, reached = wins[kept], (confidences[kept] >= threshold).astype(float)
    _, clusters = np.unique(clusters[kept], return_inverse=True)
    columns = np.stack([wins * reached, reached, wins, np.ones_like(wins)], 1)
    right, answered, right_all, n = columns.sum(0)
    accuracy = right / answered if answered else math.nan
    found = {"coverage": answered / n, "accuracy": accuracy, "difference": accuracy - right_all / n}
    drawn = _bootstrap_sums(columns, clusters, resamples, seed)
    drawn = drawn[drawn[:, 1] > 0]
    low = high = math.nan
    if len(np.unique(clusters[reached > 0])) >= FEWEST_GROUPS:
        low, high = _percentiles(drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3], level)
    return {name: float(value) for name, value in (found | {"difference_low": low, "difference_high": high}).items()}


# ---------------------------------------------------------------------------------------------- subsets and benchmarks


def subset_means(values: Any, subsets: Iterable[Hashable]) -> dict[Hashable, float]:
    """
    Mean of `values` (for example wins) in each subset, in the order of first appearance.

    >>> subset_means([1.0, 0.0, 1.0], ["chat", "chat", "code"])
    {'chat': 0.5, 'code': 1.0}
    """
    values = _numbers("values", values)
    codes, names = _codes("subsets", subsets, len(values))
    means = np.bincount(codes, weights=values) / np.bincount(codes)
    return dict(zip(names, means.tolist(), strict=True))


def section_means(scores: Mapping[Any, float], sections: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """
    Score of each section: the mean of its subsets' scores, weighted. The benchmark's score is the plain mean of the
    sections.

    With [`REWARDBENCH`] these are the sections of RewardBench 1; the scores must come from `ties=0`, as in its
    scripts. (The older test sets in the average of its leaderboard are left out.)

    Args:
        scores (`Mapping[str, float]`):
            Score of each subset, for example from [`subset_means`].
        sections (`Mapping[str, Mapping[str, float]]`):
            For each section the weights of its subsets. Every subset must be in `scores`, and the other way round.

    Returns:
        `dict[str, float]`: one score a section.

    >>> section_means({"easy": 1.0, "hard": 0.5, "code": 0.7}, {"Chat": {"easy": 30, "hard": 10}, "Code": {"code": 1}})
    {'Chat': 0.875, 'Code': 0.7}
    """
    listed = {subset for members in sections.values() for subset in members}
    if listed != set(scores):
        raise ValueError(
            f"Sections and data have different subsets: not in the data {sorted(map(str, listed - set(scores)))}, in "
            f"no section {sorted(map(str, set(scores) - listed))}. A section score needs all of its subsets."
        )
    for name, members in sections.items():
        _check_weights(f"the section {name!r}", members.values())
    return {
        name: float(sum(weight * scores[s] for s, weight in members.items()) / sum(members.values()))
        for name, members in sections.items()
    }


def one_to_many(chosen: Any, rejected: Iterable[Any], ties: Ties | Literal["share"] = 0) -> np.ndarray:
    """
    One correct response against several wrong ones, as in RewardMATH (arXiv 2410.01729) and RewardBench 2.

    Args:
        chosen (`Sequence[float]` of length n):
            Reward of each correct response.
        rejected (`Iterable[Sequence[float]]` of length n):
            Rewards of the wrong responses to the same prompt; their number may differ.
        ties (*optional*, defaults to `0`):
            The win of a prompt whose correct response shares the highest reward with wrong ones: as in [`pair_wins`],
            or `"share"`: 1/k with k responses at the top, as in RewardBench 2.

    Returns:
        `np.ndarray` of shape `(n, 3)`: for each prompt its win; the reciprocal rank of the correct response, which
        ranks behind every wrong response with the same reward; and the reward of the correct response minus that of
        the best wrong one.

    >>> one_to_many([2.0, 1.0], [[1.0, 0.0, -1.0], [1.0, 3.0, 0.0]]).round(4).tolist()
    [[1.0, 1.0, 1.0], [0.0, 0.3333, -2.0]]
    >>> one_to_many([1.0], [[1.0, 1.0]], ties="share").round(4).tolist()
    [[0.3333, 0.3333, 0.0]]
    """
    chosen, rejected = _numbers("chosen", chosen), list(rejected)
    _require_equal_lengths(chosen=chosen, rejected=rejected)
    others = [_numbers(f"rejected[{i}]", row) for i, row in enumerate(rejected)]
    margins = _numbers("chosen - best rejected", [c - row.max() for c, row in zip(chosen, others, strict=True)])
    if ties == "share":
        counts = np.array([1 / (1 + (row == c).sum()) for c, row in zip(chosen, others, strict=True)])
        wins = np.where(margins < 0, 0.0, counts)
    else:
        wins = pair_wins(margins, ties)
    ranks = np.array([1 + (row >= c).sum() for c, row in zip(chosen, others, strict=True)])
    return np.stack([wins, 1 / ranks, margins], axis=1)


def rewardbench2_ties(ids: Sequence[str], scores: Sequence[Any], num_correct: Sequence[int]) -> float:
    """
    Score of the `Ties` subset of RewardBench 2 (arXiv 2506.01937), by the formula of its `run_v2.py`.

    A prompt comes twice: with one correct response (`"ref:<number>"`) and with several (`"tied:<number>"`). A row is
    accurate if its worst correct response is above its best wrong one. Its *gap* is the distance of these two. Its
    *spread* is the distance of the best and the worst correct response. The score is the sum of

    - 0.30 times the share of tied rows, and 0.30 times the share of ref rows, that are accurate;
    - 0.20 times the share of prompts whose tied gap is larger than their spread, and 0.20 times the share of prompts
      whose smaller gap (ref or tied) is larger;
    - 0.01 times the mean of `tanh(smaller gap / spread - 1)` over the prompts with a spread above 0.

    The score of RewardBench 2 is the plain mean of this and of the accuracies of the other five subsets, by
    [`one_to_many`] with `ties="share"`.

    Args:
        ids (`Sequence[str]`):
            `"ref:<number>"` or `"tied:<number>"`, each once.
        scores (`Sequence[Sequence[float]]`):
            Rewards of the responses of each row, the correct ones first.
        num_correct (`Sequence[int]`):
            How many of them are correct.

    Returns:
        `float`: up to 1.01.

    >>> round(rewardbench2_ties(["ref:1", "tied:1"], [[3.0, 0.0], [3.0, 2.5, 0.0]], [1, 2]), 6)
    1.009993
    """
    return float(rewardbench2_tie_shares(ids, scores, num_correct).sum())


def rewardbench2_tie_shares(ids: Sequence[str], scores: Sequence[Any], num_correct: Sequence[int]) -> np.ndarray:
    """
    The part that each row adds to [`rewardbench2_ties`], `(n,)`; arguments as there. The tied row adds what depends on
    both rows of a prompt.

    >>> rewardbench2_tie_shares(["ref:1", "tied:1"], [[3.0, 0.0], [3.0, 2.5, 0.0]], [1, 2]).round(6).tolist()
    [0.3, 0.709993]
    """
    _require_equal_lengths(ids=ids, scores=scores, num_correct=num_correct)
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    rows: list[tuple[str, str]] = []
    for i, (name, row, correct) in enumerate(zip(ids, scores, num_correct, strict=True)):
        kind, _, prompt = name.partition(":")
        if kind not in gaps or not prompt or prompt in gaps[kind]:
            raise ValueError(f"`ids[{i}]` is {name!r}; 'ref:<number>' or 'tied:<number>' is required, each once.")
        row = _numbers(f"scores[{i}]", row)
        if not 0 < correct < len(row):
            raise ValueError(f"`num_correct[{i}]` is {correct} of {len(row)}; both kinds of response are required.")
        right, wrong = row[:correct], row[correct:]
        gaps[kind][prompt] = right.min() - wrong.max()
        if kind == "tied" and correct > 1:
            spreads[prompt] = right.max() - right.min()
        rows.append((kind, prompt))
    for kind, by_prompt in gaps.items():
        if not by_prompt:
            raise ValueError(f"No '{kind}' row; the score needs prompts with rows of both kinds.")
    # (tied gap, smaller gap, spread) of the prompts that have both rows
    both = {
        p: (gaps["tied"][p], min(gaps["ref"][p], gaps["tied"][p]), spread)
        for p, spread in spreads.items()
        if p in gaps["ref"]
    }
    ratios = {p: smaller / spread for p, (_, smaller, spread) in both.items() if spread > 0}
    shares = [0.3 * (gaps[kind][prompt] > 0) / len(gaps[kind]) for kind, prompt in rows]
    for i, (kind, prompt) in enumerate(rows):
        if kind == "tied" and prompt in both:
            tied, smaller, spread = both[prompt]
            shares[i] += (0.2 * (tied > spread) + 0.2 * (smaller > spread)) / len(both)
        if kind == "tied" and prompt in ratios:
            shares[i] += 0.01 * math.tanh(ratios[prompt] - 1) / len(ratios)
    return np.array(shares)


# --------------------------------------------------------------------------------------- rewards against a gold reward


def best_of_n(rewards: Any, gold: Any, n: int) -> float:
    """
    Expected gold reward of the response that `rewards` picks among n, drawn without replacement from one prompt's
    samples.

    This is the mean over all subsets of size n, in closed form: the sample of rank i by reward (from below) is the
    best of its subset with probability `C(i - 1, n - 1) / C(N, n)`. It is unbiased for n fresh samples. Among equal
    rewards it picks at random.

    Args:
        rewards, gold (`Sequence[float]` of length N):
            Both rewards of the N sampled responses to one prompt.
        n (`int`):
            Between 1 and N.

    Returns:
        `float`: in units of the gold reward.

    >>> best_of_n([1.0, 2.0, 3.0], [0.0, 1.0, 0.5], n=1), round(best_of_n([1.0, 2.0, 3.0], [0.0, 1.0, 0.5], n=2), 4)
    (0.5, 0.6667)
    """
    rewards, gold = _numbers("rewards", rewards), _numbers("gold", gold)
    _require_equal_lengths(rewards=rewards, gold=gold)
    total = len(rewards)
    if not 1 <= n <= total or n != int(n):
        raise ValueError(f"n is {n} and the prompt has {total} samples; a whole number from 1 to {total} is required.")
    _, tied = np.unique(rewards, return_inverse=True)  # codes in the order of the rewards
    gold = (np.bincount(tied, weights=gold) / np.bincount(tied))[np.sort(tied)]  # ascending in the reward
    # From the top: C(N-1, n-1) / C(N, n) = n / N; one rank down multiplies by (i - n) / (i - 1), i the rank it leaves.
    ranks = np.arange(total, 1, -1)
    weights = n / total * np.concatenate([[1.0], np.cumprod(np.maximum(ranks - n, 0) / (ranks - 1))])
    return float((weights * gold[::-1]).sum())


def best_of_n_kl(n: int) -> float:
    """
    `log n - (n - 1) / n`: an upper bound, in nats, on the divergence of the best-of-n policy from the policy that was
    sampled; the horizontal axis of over-optimisation curves.

    >>> best_of_n_kl(1), round(best_of_n_kl(16), 4)
    (0.0, 1.8351)
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 is required.")
    return math.log(n) - (n - 1) / n


def _two(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = _numbers("x", x), _numbers("y", y)
    _require_equal_lengths(x=x, y=y)
    for name, values in (("x", x), ("y", y)):
        if (values == values[0]).all():
            raise ValueError(f"Every value of `{name}` is {values[0]}; a correlation needs values that differ.")
    return x, y


def pearson(x: Any, y: Any) -> float:
    """
    Linear correlation.

    >>> round(pearson([1.0, 2.0, 3.0], [1.0, 2.0, 6.0]), 4)
    0.9449
    """
    x, y = _two(x, y)
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares neither overflow nor vanish
    return float(np.clip((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()), -1, 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def spearman(x: Any, y: Any) -> float:
    """
    Rank correlation: [`pearson`] of the ranks, equal values sharing their mean rank.

    >>> spearman([1.0, 2.0, 30.0], [-1.0, 0.0, 0.5])
    1.0
    """
    x, y = _two(x, y)
    return pearson(_ranks(x), _ranks(y))


def kendall(x: Any, y: Any) -> float:
    """
    Rank correlation tau-b: pairs in the same order minus pairs in the opposite order, over the geometric mean of the
    numbers of pairs that are not tied in `x` and in `y`. Time grows with the square of the length.

    >>> round(kendall([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]), 4)
    0.6667
    """
    x, y = _two(x, y)
    same_order = untied_x = untied_y = 0.0
    for i in range(len(x) - 1):
        sign_x, sign_y = np.sign(x[i + 1 :] - x[i]), np.sign(y[i + 1 :] - y[i])
        same_order += (sign_x * sign_y).sum()
        untied_x += np.abs(sign_x).sum()
        untied_y += np.abs(sign_y).sum()
    return float(same_order / math.sqrt(untied_x * untied_y))


def preference_graph(margins: Any) -> dict[str, float]:
    """
    Agreement of scores with a graph of preferences, as IF-RewardBench counts (arXiv 2603.04738).

    Args:
        margins (`Sequence[float]`):
            For each edge the score of the preferred response minus that of the other.

    Returns:
        `dict[str, float]`: `accuracy` (an edge whose scores are equal is wrong) and `tau_b`, `(C - D) / sqrt((C + D) *
        (C + D + T))` for C edges in the graph's order, D in the opposite one and T tied; 0 when all are tied. On the
        graph of a whole order this is [`kendall`].

    >>> result = preference_graph([1.0, 2.0, -1.0, 0.0])
    >>> result["accuracy"], round(result["tau_b"], 4)
    (0.5, 0.2887)
    """
    margins = _numbers("margins", margins)
    right, wrong = int((margins > 0).sum()), int((margins < 0).sum())
    tau = (right - wrong) / math.sqrt((right + wrong) * len(margins)) if right + wrong else 0.0
    return {"accuracy": accuracy(margins, ties=0), "tau_b": tau}


def roc_auc(scores: Any, labels: Any) -> float:
    """
    Share of pairs of a right and a wrong response in which the right one scores higher; equal scores count half.

    Args:
        scores (`Sequence[float]`):
            Rewards.
        labels (`Sequence[float]`):
            1 for right and 0 for wrong responses; both are required.

    >>> roc_auc([3.0, 1.0, 2.0, 1.0], [1, 1, 0, 0])
    0.625
    """
    scores, labels = _numbers("scores", scores), _numbers("labels", labels)
    _require_equal_lengths(scores=scores, labels=labels)
    right = labels == 1
    if not np.isin(labels, (0, 1)).all() or right.all() or not right.any():
        raise ValueError("`labels` must be 1 and 0, and hold both: the AUC compares right with wrong responses.")
    count = int(right.sum())
    return float((_ranks(scores)[right].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def _centred(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Rewards minus the mean reward of their prompt, scaled so that their squares sum to 1 (or 0: no preference)."""
    values = values / (np.abs(values).max() or 1.0)  # squares neither overflow nor vanish
    # First minus one of the prompt's own rewards: a prompt of equal rewards then gives zeros and no rounding errors.
    values = values - values[np.unique(prompts, return_index=True)[1]][prompts]
    values = values - (np.bincount(prompts, weights=values) / np.bincount(prompts))[prompts]
    norm = math.sqrt((values * values).sum())
    return values / norm if norm else values


def _starc_inputs(a: Any, b: Any, groups: Iterable[Hashable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = _numbers("a", a), _numbers("b", b)
    _require_equal_lengths(a=a, b=b)
    prompts, names = _codes("groups", groups, len(a))
    if len(names) == len(a):
        raise ValueError("Every prompt has one response; a reward shows its preferences on two or more of one prompt.")
    return _centred(a, prompts), _centred(b, prompts), prompts


def starc_distance(a: Any, b: Any, groups: Iterable[Hashable]) -> float:
    """
    How different the preferences of two rewards are (STARC, Skalse et al., arXiv 2309.15257), for responses that end
    an episode. Each reward is centred on each prompt and scaled to length 1; the result is the distance of the two
    vectors.

    It equals `sqrt(2 - 2 * rho)`, where rho is the correlation of the centred rewards: 0 for rewards that are equal up
    to a positive factor and a shift for each prompt, sqrt(2) for unrelated ones, 2 for opposite ones, and 1 when one
    of them is constant on every prompt. It depends on the policy that wrote the responses. Few responses a prompt
    inflate it. It does not say which reward is right.

    Args:
        a, b (`Sequence[float]`):
            Both rewards of each response.
        groups (`Iterable[Hashable]`):
            The prompt of each response. Prompts with a single response do not count.

    Returns:
        `float` between 0 and 2.

    >>> round(starc_distance([0.0, 1.0, 5.0, 7.0], [3.0, 5.0, 0.0, 4.0], groups=["p", "p", "q", "q"]), 6)
    0.0
    >>> round(starc_distance([0.0, 1.0], [1.0, 0.0], groups=["p", "p"]), 6)
    2.0
    """
    a, b, _ = _starc_inputs(a, b, groups)
    return float(min(2.0, math.sqrt(((a - b) ** 2).sum())))


def starc_interval(
    a: Any, b: Any, groups: Iterable[Hashable], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile interval of [`starc_distance`], from prompts drawn with replacement.

    >>> low, high = starc_interval([0.0, 1.0, 5.0, 7.0], [3.0, 5.0, 4.0, 0.0], groups=["p", "p", "q", "q"])
    >>> round(low, 6), round(high, 6)
    (0.0, 2.0)
    """
    a, b, prompts = _starc_inputs(a, b, groups)
    aa, bb, ab = _bootstrap_sums(np.stack([a * a, b * b, a * b], axis=1), prompts, resamples, seed).T
    # A reward without preferences on the drawn prompts has the vector 0, here as in the distance itself.
    norms = np.sqrt(aa * bb)
    rho = np.divide(ab, norms, out=np.zeros_like(ab), where=norms > 0)
    squares = (aa > 0).astype(float) + (bb > 0) - 2 * rho
    return _percentiles(np.sqrt(np.clip(squares, 0.0, 4.0)), level)


def cohen_kappa(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """
    Agreement of two lists of labels beyond chance (Cohen, 1960): 1 is equal, 0 is independent.

    >>> cohen_kappa(["x", "x", "y", "y"], ["x", "y", "y", "y"])
    0.5
    """
    a, b = list(a), list(b)
    _require_equal_lengths(a=a, b=b)
    if not a:
        raise ValueError("`a` is empty; at least one label is required.")
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    expected = sum(a.count(label) * b.count(label) for label in set(a)) / len(a) ** 2
    if expected == 1:
        raise ValueError("Both lists hold one and the same label; agreement beyond chance is not defined.")
    return (observed - expected) / (1 - expected)


def length_bias(
    chosen: Any, rejected: Any, chosen_lengths: Any, rejected_lengths: Any, ties: Ties = 0.5
) -> dict[str, float]:
    """
    How much the reward follows length.

    Args:
        chosen, rejected (`Sequence[float]`):
            Rewards.
        chosen_lengths, rejected_lengths (`Sequence[float]`):
            Lengths of the responses, in any unit, for example tokens.
        ties (*optional*, defaults to `0.5`):
            As in [`pair_wins`].

    Returns:
        `dict[str, float]`:
        - `chosen_longer_rate`, of the pairs with two different lengths; the accuracy of the rule "the longer one";
        - `accuracy_chosen_longer`, `accuracy_chosen_shorter`: accuracy on either kind of pair; a large difference is a
          sign of bias;
        - `length_pearson`, `length_spearman`: correlation of reward and length over all responses;
        - `length_pearson_within`: the same with both centred on each pair, so easy prompts with long answers do not
          count. A shift of a prompt's rewards changes the other two, but not this one.

        A number that is not defined for the data (no chosen response is longer; all lengths are equal) is left out.

    >>> length_bias([2.0, 1.0], [1.0, 0.0], [20, 10], [10, 20])["length_pearson_within"]
    0.0
    """
    chosen, rejected = _numbers("chosen", chosen), _numbers("rejected", rejected)
    margins, rewards = pair_margins(chosen, rejected), np.concatenate([chosen, rejected])
    first, second = _numbers("chosen_lengths", chosen_lengths), _numbers("rejected_lengths", rejected_lengths)
    _require_equal_lengths(chosen=margins, chosen_lengths=first, rejected_lengths=second)
    wins, extra, lengths = pair_wins(margins, ties), first - second, np.concatenate([first, second])
    result = {}
    if (extra != 0).any():
        result["chosen_longer_rate"] = float((extra[extra != 0] > 0).mean())
    for name, rows in (("longer", extra > 0), ("shorter", extra < 0)):
        rows = rows & ~np.isnan(wins)
        if rows.any():
            result[f"accuracy_chosen_{name}"] = float(wins[rows].mean())
    if (lengths != lengths[0]).any() and (rewards != rewards[0]).any():
        result["length_pearson"] = pearson(rewards, lengths)
        result["length_spearman"] = spearman(rewards, lengths)
    if extra.any() and margins.any():
        # Centred on a pair, the two responses hold plus and minus half the difference.
        result["length_pearson_within"] = pearson(np.append(margins, -margins), np.append(extra, -extra))
    return result


# ------------------------------------------------------------------------------------------------------- all in one go


def _subset_report(wins: np.ndarray, subsets: Iterable[Hashable], sections: Sections | None) -> dict[str, float]:
    """`accuracy/<subset>`, `subset_mean`, and with sections `section/<section>`, `section_mean`."""
    codes, names = _codes("subsets", subsets, len(wins))
    if len({str(name) for name in names}) < len(names):
        raise ValueError(f"two of the subsets {names} have one name as text, and results are named by it. Rename one.")
    kept = _kept(wins)
    labels = [names[code] for code in codes[kept]]
    scores = subset_means(wins[kept], labels)
    if len(scores) < len(names):
        lost = sorted(str(name) for name in names if name not in scores)
        raise ValueError(f"Every pair of {lost} is a tie, and ties='drop' leaves none. Use another rule for ties.")
    result = {f"accuracy/{name}": scores[name] for name in names}
    result["subset_mean"] = float(np.mean(list(scores.values())))
    if sections == "rewardbench":
        sections = REWARDBENCH
    if sections is not None:
        if not isinstance(sections, Mapping):
            raise ValueError(f"`sections` is {sections!r}; 'rewardbench' or a mapping to subsets is required.")
        weights = {
            name: dict(members) if isinstance(members, Mapping) else {s: float(labels.count(s)) for s in members}
            for name, members in sections.items()
        }
        by_section = section_means(scores, weights)
        result |= {f"section/{name}": score for name, score in by_section.items()}
        result["section_mean"] = float(np.mean(list(by_section.values())))
    return result


def pairwise_metrics(
    chosen: Any,
    rejected: Any,
    *,
    ties: Ties = 0.5,
    temperature: float = 1.0,
    groups: Iterable[Hashable] | None = None,
    subsets: Iterable[Hashable] | None = None,
    sections: Sections | None = None,
    chosen_lengths: Any = None,
    rejected_lengths: Any = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """
    All metrics of preference pairs in one flat dictionary.

    Args:
        chosen, rejected (`Sequence[float]` of length n):
            Rewards.
        ties (*optional*, defaults to `0.5`):
            The win of a pair with two equal rewards: 0, 0.5, 1 or `"drop"`. RewardBench 1 counts 0.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the margins before `log_loss`, `brier` and `ece` are computed.
        groups (`Iterable[Hashable]`, *optional*):
            The prompt of each pair. Adds the clustered interval, which is valid for prompts with several pairs.
        subsets (`Iterable[Hashable]`, *optional*):
            The subset of each pair.
        sections (*optional*):
            `"rewardbench"`, or for each section its subsets: a list (weighted by their numbers of pairs) or a mapping
            to weights. Needs `subsets`.
        chosen_lengths, rejected_lengths (`Sequence[float]`, *optional*):
            Lengths of the responses; both or neither.
        level, resamples, seed (*optional*, default to `0.95`, `2000`, `0`):
            Settings of the intervals.

    Returns:
        `dict[str, float]`: `n`, `accuracy`, `accuracy_ci_low`, `accuracy_ci_high` (Wilson: assumes independent pairs),
        `tie_rate`, `mean_margin`, `median_margin`, `log_loss`, `brier`, `ece`, `temperature` (fitted to these pairs)
        and `temperature_at_bound` (1 when the fit hit its bound: see [`fit_temperature`]);
        with `groups`: `n_groups`, `accuracy_bootstrap_low`, `accuracy_bootstrap_high`;
        with `subsets`: `accuracy/<subset>`, `subset_mean`; with `sections`: `section/<section>`, `section_mean`;
        with lengths: see [`length_bias`].

    >>> result = pairwise_metrics([2.0, 1.0, 0.0], [1.0, 1.0, 1.0])
    >>> result["accuracy"], result["mean_margin"], round(result["log_loss"], 4)
    (0.5, 0.0, 0.7732)
    """
    chosen, rejected = _numbers("chosen", chosen), _numbers("rejected", rejected)
    margins = pair_margins(chosen, rejected)
    wins = pair_wins(margins, ties)
    kept = _kept(wins)
    low, high = wilson_interval(float(wins[kept].sum()), int(kept.sum()), level)
    fitted, at_bound = fit_temperature(margins)
    result = {
        "n": float(len(margins)),
        "accuracy": accuracy(margins, ties),
        "accuracy_ci_low": low,
        "accuracy_ci_high": high,
        "tie_rate": tie_rate(margins),
        "mean_margin": float(margins.mean()),
        "median_margin": float(np.median(margins)),
        "log_loss": log_loss(margins, temperature),
        "brier": brier(margins, temperature),
        "ece": expected_calibration_error(margins, temperature),
        "temperature": fitted,
        "temperature_at_bound": float(at_bound),
    }
    if groups is not None:
        clusters, names = _codes("groups", groups, len(margins))
        result["n_groups"] = float(len(names))
        result["accuracy_bootstrap_low"], result["accuracy_bootstrap_high"] = bootstrap_interval(
            wins[kept], np.unique(clusters[kept], return_inverse=True)[1], level, resamples, seed
        )
    if subsets is not None:
        result |= _subset_report(wins, subsets, sections)
    elif sections is not None:
        raise ValueError("`sections` is given without `subsets`: name the subset of each pair.")
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("One of `chosen_lengths` and `rejected_lengths` is given; both are required.")
    if chosen_lengths is not None:
        result |= length_bias(chosen, rejected, chosen_lengths, rejected_lengths, ties)
    return result


def one_to_many_metrics(
    chosen: Any,
    rejected: Iterable[Any],
    *,
    ties: Ties | Literal["share"] = 0,
    subsets: Iterable[Hashable] | None = None,
    sections: Sections | None = None,
    level: float = 0.95,
) -> dict[str, float]:
    """
    One correct response against several, in one flat dictionary; arguments as in [`one_to_many`] and
    [`pairwise_metrics`].

    Returns:
        `dict[str, float]`: `n`, `accuracy`, `accuracy_ci_low`, `accuracy_ci_high` (Wilson), `mrr`, `tie_rate` (the
        correct response shares the highest reward), `mean_margin` and `median_margin` (to the best wrong response);
        with `subsets` and `sections` what [`pairwise_metrics`] gives for them.

    >>> result = one_to_many_metrics([2.0, 1.0], [[1.0, 0.0, -1.0], [1.0, 3.0, 0.0]])
    >>> result["accuracy"], round(result["mrr"], 4), result["mean_margin"]
    (0.5, 0.6667, -0.5)
    """
    wins, reciprocal_ranks, margins = one_to_many(chosen, rejected, ties).T
    kept = _kept(wins)
    low, high = wilson_interval(float(wins[kept].sum()), int(kept.sum()), level)
    result = {
        "n": float(len(wins)),
        "accuracy": float(wins[kept].mean()),
        "accuracy_ci_low": low,
        "accuracy_ci_high": high,
        "mrr": float(reciprocal_ranks.mean()),
        "tie_rate": tie_rate(margins),
        "mean_margin": float(margins.mean()),
        "median_margin": float(np.median(margins)),
    }
    if subsets is not None:
        result |= _subset_report(wins, subsets, sections)
    elif sections is not None:
        raise ValueError("`sections` is given without `subsets`: name the subset of each row.")
    return result


def graded_metrics(
    rewards: Iterable[Any], gold: Iterable[Any], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """
    A reward against a gold reward on several responses to each prompt, in one flat dictionary.

    Args:
        rewards, gold (`Iterable[Sequence[float]]`):
            For each prompt, both rewards of its responses.
        level, resamples, seed (*optional*, default to `0.95`, `2000`, `0`):
            Settings of the interval.

    Returns:
        `dict[str, float]`: `n_prompts`; `best_of_1`, `best_of_2`, `best_of_4`, .. up to the smallest number of
        responses (see [`best_of_n`]; means over prompts); `kendall`, `spearman` (means over the `n_ranked` prompts on
        which both rewards vary; left out when there is none); `starc`, `starc_low`, `starc_high` (see
        [`starc_distance`]; the interval needs two prompts).

    >>> result = graded_metrics([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [[0.0, 1.0, 0.5], [0.0, 1.0, 2.0]])
    >>> result["best_of_1"], round(result["best_of_2"], 4), round(result["kendall"], 4)
    (0.75, 1.1667, 0.6667)
    """
    rewards, gold = list(rewards), list(gold)
    _require_equal_lengths(rewards=rewards, gold=gold)
    if not rewards:
        raise ValueError("`rewards` is empty; at least one prompt is required.")
    rows = []
    for i, (x, y) in enumerate(zip(rewards, gold, strict=True)):
        x, y = _numbers(f"rewards[{i}]", x), _numbers(f"gold[{i}]", y)
        _require_equal_lengths(**{f"rewards[{i}]": x, f"gold[{i}]": y})
        rows.append((x, y))
    result = {"n_prompts": float(len(rows))}
    n = 1
    while n <= min(len(x) for x, _ in rows):
        result[f"best_of_{n}"] = float(np.mean([best_of_n(x, y, n) for x, y in rows]))
        n *= 2
    ranked = [(x, y) for x, y in rows if (x != x[0]).any() and (y != y[0]).any()]
    result["n_ranked"] = float(len(ranked))
    if ranked:
        result["kendall"] = float(np.mean([kendall(x, y) for x, y in ranked]))
        result["spearman"] = float(np.mean([spearman(x, y) for x, y in ranked]))
    a, b = np.concatenate([x for x, _ in rows]), np.concatenate([y for _, y in rows])
    prompts = np.repeat(np.arange(len(rows)), [len(x) for x, _ in rows])
    result["starc"] = starc_distance(a, b, prompts)
    if len(rows) > 1:
        result["starc_low"], result["starc_high"] = starc_interval(a, b, prompts, level, resamples, seed)
    return result


def compute_metrics(eval_prediction: Any, ties: Ties = 0) -> dict[str, float]:
    """
    [`pairwise_metrics`] as the `compute_metrics` of a trainer whose predictions, like those of [`GRMRewardTrainer`],
    are the rewards of the chosen and of the rejected responses, `(n, 2)`.

    Args:
        eval_prediction ([`~transformers.EvalPrediction`]):
            Its `predictions` are used.
        ties (*optional*, defaults to `0`):
            As in [`pair_wins`]; the trainer's own accuracy uses the default.

    Returns:
        `dict[str, float]`.

    >>> from types import SimpleNamespace
    >>> compute_metrics(SimpleNamespace(predictions=np.array([[1.0, 0.0], [0.5, 0.5]])))["accuracy"]
    0.5
    """
    rewards = np.asarray(eval_prediction.predictions)
    if rewards.ndim != 2 or rewards.shape[1] != 2:
        raise ValueError(
            f"Predictions have shape {rewards.shape}; (n, 2) is required: the rewards of the chosen and of the "
            "rejected response of each pair."
        )
    return pairwise_metrics(rewards[:, 0], rewards[:, 1], ties=ties)
