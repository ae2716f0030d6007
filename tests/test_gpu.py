"""The script for a GPU, at toy size on this processor: every side runs, what has a file is not done again, and MFU is
what the formula says."""

import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("trl.kernels.chunked_logprob", reason="needs the newest TRL")
psutil = pytest.importorskip("psutil", reason="demo extra")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu  # noqa: E402


@pytest.mark.slow
@pytest.mark.trainer
def test_toy_size_and_again(tmp_path, monkeypatch):
    results = gpu.run_all(True, tmp_path, time.monotonic() + 600)
    assert [(r["settings"]["kind"], r["settings"].get("side")) for r in results] == [
        *(("train", side) for _ in ("hh", "ultrafeedback") for side in gpu.SIDES), ("score", None)
    ]
    work = {(r["settings"]["data"], r["settings"].get("side")): r.get("work") for r in results}
    for data in ("hh", "ultrafeedback"):
        assert work[data, gpu.SHARED]["tokens"] < work[data, gpu.PACKED]["tokens"] <= work[data, gpu.PADDED]["tokens"]
    monkeypatch.setattr(gpu, "do", None)
    assert gpu.run_all(True, tmp_path, 0) == results
    text = gpu.section(results)
    assert all(f"| hh | {side} |" in text for side in gpu.SIDES) and "tokens a second" in text


def test_no_time_left(tmp_path, capsys):
    assert gpu.run_all(True, tmp_path, time.monotonic() - 1) == []
    assert capsys.readouterr().out.count("no time left") == len(gpu.units(True))


def test_candidate_and_study_go_on_while_there_is_time(tmp_path, monkeypatch, capsys):
    ran = []

    def finished(command, until):
        ran.append([Path(command[1]).name, *command[2:]])
        return until > time.monotonic()

    monkeypatch.setattr(gpu, "finished", finished)
    monkeypatch.setattr(gpu.published_model, "RESULTS", tmp_path)
    candidates = [["published_model.py", name] for name in ("broad", "broad_bt")]
    everything = [*candidates, ["real_base.py", "--workers", "3"]]
    assert gpu.CANDIDATE in gpu.published_model.CANDIDATES
    gpu.go_on(time.monotonic() + 100, 3)
    assert ran == everything and capsys.readouterr().out == ""
    ran.clear()
    (tmp_path / "broad.json").write_text("{}")
    gpu.go_on(time.monotonic() - 1, 3)
    assert ran == everything[1:]
    assert capsys.readouterr().out.splitlines() == [
        "no time left for published_model.py broad_bt; run this again",
        "no time left for real_base.py --workers 3; run this again",
    ]


def test_what_is_cut_off_ends_with_the_units_it_started(tmp_path, capsys):
    """`real_base.py` computes each unit in a process of its own."""
    sleeper = "import time, pathlib, sys; pathlib.Path(sys.argv[1]).touch(); time.sleep({0})"
    unit = [sys.executable, "-c", sleeper.format(60), str(tmp_path / "started")]
    parent = f"import subprocess; subprocess.Popen({unit!r}).wait()"
    assert not gpu.finished([sys.executable, "-c", parent], time.monotonic() + 3)
    assert (tmp_path / "started").exists()
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(tmp_path / "started") in command for command in commands)
    assert gpu.finished([sys.executable, "-c", "raise SystemExit(3)"], time.monotonic() + 60)
    assert "ended with 3" in capsys.readouterr().out


def test_mfu_is_flops_over_time_and_peak():
    settings = {**gpu.units(True)[0], "pairs": 4}
    result = {
        "settings": settings, "seconds": [0.5, 0.5], "tokens": 100, "peak_bytes": 2e9, "peak_flops": 1e9,
        "work": {"tokens": 100, "read": 100, "attended": 0, "logits": 0},
    }
    shape = settings["shape"]
    weights = 2 * shape["hidden"] * (shape["keys"] + shape["hidden"]) + 3 * shape["hidden"] * shape["intermediate"]
    expected = 6 * shape["layers"] * weights * 100 / 1.0 / 1e9
    assert gpu._figures(result) == ["8.0", "100", f"{expected:.3f}", "2.0"]
