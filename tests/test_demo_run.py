"""The demo's run: its statistics against tables and a second computation, and the whole of it at toy size."""

import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest


pytest.importorskip("trl", reason="training extra")
pytest.importorskip("matplotlib", reason="demo extra")

from grm_hf.demo import run as demo  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
TINY = replace(demo.QUICK, pretrain_steps=5, train_pairs=16, test_pairs=20, batch_size=8)


@pytest.mark.parametrize(("df", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_interval_is_students(df, quantile):
    values = [0.7 + 0.01 * (i * i % 7) for i in range(df + 1)]
    mean, half = demo.interval(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert half == pytest.approx(quantile * statistics.stdev(values) / (df + 1) ** 0.5, rel=2e-3)


def _runs(quantity, baseline, other):
    """Runs in which the second method has the values `other` of one quantity and all else is equal."""
    methods = list(demo.METHODS)
    runs = []
    for seed, value in enumerate(baseline):
        for method in methods:
            own = other[seed] if method == methods[1] else value
            values = {"accuracy": 0.5, "perplexity": 2.0, quantity: own}
            measured = {name: dict.fromkeys(demo.DOMAINS, v) for name, v in values.items()}
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
    comparison = demo._compare(runs)
    for domain in demo.DOMAINS:
        entry = comparison[quantity][domain][method]
        assert entry["verdict"] == verdict
        assert entry["difference"] == pytest.approx(statistics.mean(change))
        assert "verdict" not in comparison[quantity][domain][demo.BASELINE]


def test_methods_differ_in_the_text_loss_alone():
    assert {key for settings in demo.METHODS.values() for key in settings} == {"regularizer", "alpha"}
    assert demo.METHODS[demo.BASELINE] == {"regularizer": "none"}


def test_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_pretrain", None)
    with pytest.raises(ValueError, match="at least 2"):
        demo.run(tmp_path, seeds=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'grm-hf\[demo\]'"):
        demo.run(tmp_path)


@pytest.mark.trainer
def test_a_run_repeats_and_its_seed_matters(tmp_path):
    demo._pretrain(tmp_path, TINY)
    first, again, other = (
        demo.train_one(demo.SAVED, seed, str(tmp_path), TINY, tmp_path / "model") for seed in (1, 1, 2)
    )
    for result in (first, again, other):
        result.pop("seconds")
    assert first == again
    assert first["perplexity"] != other["perplexity"]
    assert [step for step, _ in first["curve"]["ood"]] == [1, 2]
    assert not (tmp_path / "model").exists()  # kept for seed 0 only


@pytest.mark.slow
@pytest.mark.trainer
def test_the_whole_demo_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUICK", TINY)
    results = demo.run(tmp_path, seeds=2, quick=True)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [(m, s) for s in range(2) for m in demo.METHODS]
    for row in results["reloaded"]:
        assert row["here"] == pytest.approx(row["clean_process"], rel=1e-6)
    assert results["reloaded"][0]["gold"] > results["reloaded"][1]["gold"]
    ood = {r["method"]: [] for r in results["runs"]}
    for r in results["runs"]:
        ood[r["method"]].append(r["accuracy"]["ood"])
        assert r["accuracy"]["ood"] == r["curve"]["ood"][-1][1]
    entry = results["comparison"]["accuracy"]["ood"][demo.SAVED]
    assert entry["difference"] == pytest.approx(statistics.mean(ood[demo.SAVED]) - statistics.mean(ood[demo.BASELINE]))

    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert all(report.count(f"| {method} |") == 4 for method in demo.METHODS)  # accuracy, perplexity; two splits
    assert f"{results['perplexity_before']['id']:.2f}" in report and "A quick run" in report
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model" / "modeling_grm.py").is_file()

    card = (tmp_path / "model" / "README.md").read_text()
    assert card == demo.model_card(results)
    saved = next(r for r in results["runs"] if r["method"] == demo.SAVED and r["seed"] == 0)
    for domain in demo.DOMAINS:
        assert f"| {domain}: accuracy | {saved['accuracy'][domain]:.3f} (95% interval" in card
    assert [value for value in map(float, re.findall(r"^(-?\d+\.\d\d)  ", card, re.M))] == [
        pytest.approx(row["here"], abs=0.006) for row in results["reloaded"]
    ]


def test_the_published_card_and_section_are_made_from_the_published_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import demo_results

    results = json.loads(demo_results.RESULTS.read_text())
    assert not results["quick"] and results["comparison"] == demo._compare(results["runs"])
    assert demo_results.CARD.read_text() == demo.model_card(results)
    assert f"<!-- demo: begin -->\n{demo_results.section(results).strip()}\n<!-- demo: end -->" in (
        ROOT / "docs" / "results.md"
    ).read_text()
