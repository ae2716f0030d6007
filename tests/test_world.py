"""The comparison in the world whose true reward is known: verdicts, a run at toy size, and the published numbers."""

import json
import statistics
import sys
from pathlib import Path

import pytest


pytest.importorskip("trl", reason="training extra")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import world  # noqa: E402


TINY = world.Size(pretrain_steps=5, train_pairs=16, test_pairs=20, epochs=1, batch_size=8, evaluations=2)


def _runs(quantity, baseline, other):
    """Runs in which the second method has the values `other` of one quantity and all else is equal."""
    methods = list(world.METHODS)
    runs = []
    for seed, value in enumerate(baseline):
        for method in methods:
            own = other[seed] if method == methods[1] else value
            values = {"accuracy": 0.5, "perplexity": 2.0, quantity: own}
            measured = {name: dict.fromkeys(world.DOMAINS, v) for name, v in values.items()}
            runs.append({"method": method, "seed": seed, **measured})
    return runs, methods[1]


@pytest.mark.parametrize(
    ("quantity", "change", "verdict"),
    [
        ("accuracy", (0.02, 0.03, 0.02), "better"),
        ("accuracy", (-0.02, -0.03, -0.02), "worse"),
        ("accuracy", (0.02, -0.03, 0.02), "no difference shown"),
        ("accuracy", (0.25, 0.25, 0.25), "no difference shown"),  # no spread, so no interval
        ("perplexity", (-0.2, -0.3, -0.2), "better"),
        ("perplexity", (0.2, 0.3, 0.2), "worse"),
    ],
)
def test_verdict_says_what_the_paired_interval_says(quantity, change, verdict):
    baseline = (0.5, 0.75, 0.625)  # a spread far above that of the differences: the pairing must remove it
    runs, method = _runs(quantity, baseline, [b + c for b, c in zip(baseline, change, strict=True)])
    comparison = world.compare(runs)
    for domain in world.DOMAINS:
        entry = comparison[quantity][domain][method]
        assert entry["verdict"] == verdict
        assert entry["difference"] == pytest.approx(statistics.mean(change))
        assert "verdict" not in comparison[quantity][domain][world.BASELINE]


@pytest.mark.slow
@pytest.mark.trainer
def test_a_run_repeats_and_its_seed_matters(tmp_path):
    world.pretrained(tmp_path, TINY)
    method = list(world.METHODS)[1]
    first, again, other = (world.train_one(method, seed, str(tmp_path), TINY) for seed in (1, 1, 2))
    for result in (first, again, other):
        result.pop("seconds")
    assert first == again
    assert first["perplexity"] != other["perplexity"]
    assert [step for step, _ in first["curve"]["ood"]] == [1, 2]


def test_the_published_comparison_is_that_of_the_published_runs():
    results = json.loads(world.RESULTS.read_text())
    assert results["comparison"] == world.compare(results["runs"])
