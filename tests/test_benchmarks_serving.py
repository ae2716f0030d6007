"""benchmarks/serving.py at toy size: its sides, its checks, and its page."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import serving  # noqa: E402


def results(ours, theirs, bf16):
    seconds = {"GRMScorer": ours, "vLLM": theirs, "vLLM, prefix caching": theirs + 1, "GRMScorer, bfloat16": bf16}
    return {
        "seconds": {case: seconds for case in serving.GOALS},
        "tokens": {case: 100 for case in serving.GOALS},
        "rounds": 5,
        "products": {"float32": 100.0, "bfloat16": 210.0},
        "versions": {"torch": "2.13.0", "vllm": "0.32.0"},
        "processor": "a processor",
    }


def test_verdicts_compare_with_the_faster_of_both():
    found = {what: (ratio, goal) for what, ratio, goal in serving.verdicts(results(2.0, 3.0, 0.5))}
    assert found["best of 16, speed over the faster vLLM"] == (1.5, 1.1)
    assert found["16 unrelated, bfloat16 over float32"] == (4.0, 2.0)
    page = serving.report(results(2.0, 1.0, 0.5))
    assert "| 16 unrelated | 100 | 2.00 | **1.00** | 2.00 | 0.50 |" in page
    assert "runs at 100 GFLOP/s in float32 and at 210 in bfloat16 on this processor, 2.1 times as fast." in page
    assert "| 16 unrelated, speed over the faster vLLM: at least 0.95 | 0.50 | **not met** |" in page


def test_rewards_that_differ_stop_it():
    good = {"case": {"rewards": [1.0, 2.0]}}
    serving.check_rewards([{"GRMScorer": good, "vLLM": {"case": {"rewards": [1.00009, 2.0]}}}])
    for wrong in (1.01, float("nan")):
        with pytest.raises(SystemExit, match="nothing is written"):
            serving.check_rewards([{"GRMScorer": good, "vLLM": {"case": {"rewards": [wrong, 2.0]}}}])


def test_texts_are_what_their_names_say():
    made = serving.cases(1000, small=False)
    assert len(made["16 unrelated"]) == 16 and len({ids[0] for ids in made["16 unrelated"]}) > 10
    for count in (16, 64):
        texts = made[f"best of {count}"]
        assert len(texts) == count and all(ids[:300] == texts[0][:300] for ids in texts)
        assert all(len(ids) > 300 for ids in texts)


@pytest.mark.slow
def test_it_runs():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/serving.py", "--small"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| best of 64 |" in done.stdout and "vLLM" not in done.stdout.split("\n| case")[1].split("\n")[0]
