"""The training benchmark: its page is what its results file gives, byte for byte; its arithmetic is what is counted;
and FLOPs and bytes of a step, which are the same on every machine, stay within their goals on a small model."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flops import flops


pytest.importorskip("trl.kernels.chunked_logprob", reason="needs the newest TRL")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import training  # noqa: E402
from sections import PAGE, write_section  # noqa: E402
from training import CACHED, DPO, LIVE, MIX, NONE, ORIGINAL, OURS, TRL, Shape, Sides  # noqa: E402


@pytest.fixture(autouse=True)
def denormals():
    """A measurement rounds them to zero for its whole process."""
    yield
    torch.set_flush_denormal(False)

from grm_hf import logprobs  # noqa: E402


# The proportions of the benchmark's model: the LM head is about 0.7 of the layers.
SMALL = Shape(layers=2, hidden=64, intermediate=176, keys=32, vocabulary=1024)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    torch.set_num_threads(1)
    return Sides(SMALL, str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def batches():
    """hh lengths, a quarter of them."""
    return training.batches_of(training.load("hh", SMALL.vocabulary, shrink=4), 8, "random")


def test_the_page_is_what_the_results_file_gives(tmp_path):
    page = shutil.copy(PAGE, tmp_path / "benchmarks.md")
    results = json.loads(training.RESULTS.read_text(encoding="utf-8"))
    write_section("training", training.section(results), page)
    assert page.read_bytes() == PAGE.read_bytes()
    assert results["shape"] == vars(training.BENCH) and results["lengths"] == "real"


def test_a_quick_run_gives_every_figure():
    results = json.loads(json.dumps(training.run_all(quick=True)))
    rows = training.table_of_goals(results)
    goals = "0.27 0.3 0.2 0.65/0.6 0.15/0.12 0.58/1.0 0.62/0.62 1.15/1.3 1.0/1.1 1.05/1.45".split()
    assert ["/".join(map(str, row.goals)) for row in rows] == goals
    assert all(0 < reached < 100 for row in rows for reached in row.reached)
    text = training.section(results)
    assert all(str(row) in text for row in rows)
    assert all(f"| {side} |" in text for side in MIX)


def test_a_goal_is_met_or_not():
    row = training.Row("figure", "1.00", (0.2, 0.301), (0.2, 0.3))
    assert row.met == (True, False)
    assert str(row) == "| figure | 1.00 | 0.200 / 0.301 | <= 0.20 / 0.30 | yes / no |"


def test_all_sides_compute_the_same_loss(sides, batches):
    """TRL's loss is that of `none`; the original's is that of `sft` in every layout."""
    batch = batches[0]
    losses = {name: sides(name)(batch).item() for name in MIX}
    assert losses[NONE] == pytest.approx(losses[TRL], rel=1e-5)
    for name in ("sft, padded", "sft, packed", OURS):
        assert losses[name] == pytest.approx(losses[ORIGINAL], rel=1e-5)


@pytest.mark.parametrize("name", MIX)
def test_the_formula_is_what_is_counted(sides, batches, name):
    batch = batches[0]
    work = training.work(batch, name)
    if name in (TRL, ORIGINAL, "sft, padded"):  # the formula grants them causal attention, which padding precludes
        work = replace(work, attended=2 * work.attended)
    run = sides(name)
    counted = flops(lambda: run(batch))
    assert sum(work.flops(SMALL).values()) == pytest.approx(counted, rel=0.01)


def test_flops_stay_within_their_goals(sides, batches):
    steps = {name: sides(name) for name in (TRL, ORIGINAL, OURS, DPO, CACHED, LIVE)}
    counted = {name: sum(flops(lambda run=run, b=b: run(b)) for b in batches[:4]) for name, run in steps.items()}
    assert counted[OURS] <= 0.27 * counted[TRL]
    assert counted[OURS] <= 0.15 * counted[ORIGINAL]
    assert counted[CACHED] <= 1.001 * counted[DPO]
    assert 1.2 * counted[DPO] <= counted[LIVE] <= 1.45 * counted[DPO]


def test_bytes_stay_within_their_goals(sides, batches, monkeypatch):
    """Against TRL they follow the tokens, which the batches decide; the last layer takes off some more."""
    monkeypatch.setattr(logprobs, "ROWS", 64)  # a quarter, as the lengths
    peaks = {name: [] for name in (TRL, ORIGINAL, OURS, DPO, CACHED)}
    for batch in batches[:4]:
        for name, found in peaks.items():
            run = sides(name)
            run(batch)
            found.append(training.cost(sides.grm, lambda run=run, batch=batch: run(batch))["peak_bytes"])
        tokens = training.work(batch, OURS).tokens / training.work(batch, TRL).tokens
        assert peaks[OURS][-1] <= 0.8 * tokens * peaks[TRL][-1]
    assert sum(peaks[OURS]) <= 0.12 * sum(peaks[ORIGINAL])
    assert sum(peaks[CACHED]) <= 1.01 * sum(peaks[DPO])
