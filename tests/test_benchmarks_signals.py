"""benchmarks/signals.py at toy size: one run of it, its page, and that it goes on where it stopped."""

import json
import sys
from pathlib import Path

import pytest
from tiny import assistant, chatml_tokenizer, tiny_lm, user


pytest.importorskip("trl", reason="training extra")
pytestmark = pytest.mark.trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import real_base  # noqa: E402
import signals as benchmark  # noqa: E402


def short_rows(name):
    """Ten prompts of each file with two pairs each, in the place of shared/data."""
    return [
        {
            "id": f"{name} {i} {j}",
            "prompt": [user(f"{name} {i}?")],
            "chosen": [assistant(f"yes {j}")],
            "rejected": [assistant(f"no, no {j}")],
        }
        for i in range(10)
        for j in range(2)
    ]


def test_a_run_at_toy_size(monkeypatch, tmp_path):
    monkeypatch.setattr(real_base, "short_rows", short_rows)
    monkeypatch.setattr(real_base, "TRAIN", {name: (file, 4) for name, (file, _) in real_base.TRAIN.items()})
    monkeypatch.setattr(real_base, "test_rows", real_base.test_rows.__wrapped__)  # without its cache
    tokenizer = chatml_tokenizer()
    tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(benchmark.base, "folder", lambda: tmp_path / "base")
    monkeypatch.setattr(benchmark.base, "origin", lambda folder: "a base")
    small = {**benchmark.settings_of(0, "a base"), "pairs": 8}
    monkeypatch.setattr(benchmark, "settings_of", lambda seed, origin: {**small, "seed": seed})
    tests = ("hhh", "gsm8k")
    monkeypatch.setattr(benchmark, "TESTS", tests)
    results = tmp_path / "signals.json"
    monkeypatch.setattr(benchmark, "CRITIQUES", 2)
    benchmark.run_all(1, 4, results)
    (run,) = json.loads(results.read_text())["runs"]
    assert list(run["tests"]) == ["validation", *tests] and run["settings"]["seed"] == 0
    for found in run["tests"].values():
        assert {*found["margins"], "critique"} == {*benchmark.SIGNALS}
        assert {len(margins) for margins in found["margins"].values()} == {4}
    for found in run["critiques"].values():
        assert {name: len(margins) for name, margins in found["margins"].items()} == {"head": 2, "critique": 2}
    assert list(run["costs"]) == list(benchmark.COSTS) and all(cost > 1 for cost in run["costs"].values())
    before = results.read_bytes()
    benchmark.run_all(1, 4, results)
    assert results.read_bytes() == before  # nothing is done twice
    del run["critiques"]
    results.write_text(json.dumps({"runs": [run]}))
    benchmark.run_all(1, 4, results)
    assert json.loads(results.read_bytes()) == json.loads(before)  # critiques alone are added, by the same model
    benchmark.run_all(2, 4, results)
    page = benchmark.markdown(json.loads(results.read_text()))
    assert "2 seeds" in page and "Seed 1 chose" in page
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == [name for name in benchmark.SIGNALS if name != "critique"] + ["head", "critique"]
    assert "on a pair of each of 2 prompts of each set, with 2 seeds" in page
    monkeypatch.setattr(benchmark, "RESULTS", results)
    import results as front

    assert front.pages()[results.with_suffix(".md")] == page and "python benchmarks/results.py" in page
    said = front.front()
    assert "(results/signals.md)" in said and "`judge` is better than chance on" in said
    assert len(said.splitlines()) <= 25 and said.count("`python benchmarks/results.py` writes this page") == 1


def test_the_page_says_whether_a_choice_held():
    """The judge is right on the validation pairs where the head is, and tells nothing on the test set."""
    head = [1.0] * 30 + [-1.0] * 10
    part = {"probabilities": {"head": [0.7] * 40, "judge": [0.7] * 40}}
    part["groups"] = list(range(40))
    part["margins"] = {"head": head, "judge": [1.0] * 40}
    other = {**part, "margins": {"head": head, "judge": [1.0, -1.0] * 20}}
    run = {"tests": {"validation": part, "hhh": other}}
    assert benchmark.choice_of(run, ["hhh"]).startswith(
        "chose `judge` on the validation pairs, from an agreement of 1.00 on. The head's accuracy there, against all "
        "pairs: hhh +0.0 ("
    )
    run["tests"]["validation"] = {**part, "margins": {"head": head, "judge": [1.0, -1.0] * 20}}
    assert benchmark.choice_of(run, ["hhh"]) == "chose no signal on the validation pairs."


def test_pooled_runs_keep_prompts_together_and_the_page_is_counted_from_them():
    margins, probabilities = {"head": [1.0, -1.0], "judge": [0.2, 0.3]}, {"head": [0.7, 0.3], "judge": [0.7, 0.8]}
    part = {"margins": margins, "probabilities": probabilities, "groups": [0, 1]}
    runs = [{"tests": {"hhh": part}}, {"tests": {"hhh": part}}]
    report = benchmark.pooled(runs, "hhh")
    assert report.groups == ["0", "1", "0", "1"] and report.margins["head"] == [1.0, -1.0, 1.0, -1.0]
    summary = report.summary()
    assert summary["prompts"] == 2 and summary["signals"]["judge"]["accuracy"] == 1.0
