"""The demo: the whole of it at toy size, and what it says of its numbers."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import chatml_tokenizer, tiny_lm


pytest.importorskip("trl", reason="training extra")
pytest.importorskip("matplotlib", reason="demo extra")

from grm_hf import GRMScorer, base  # noqa: E402
from grm_hf.demo import language  # noqa: E402
from grm_hf.demo import run as demo  # noqa: E402
from grm_hf.metrics import wilson_interval  # noqa: E402


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chatml_tokenizer()
    lm = tiny_lm("llama_tied", vocab_size=len(tokenizer), max_position_embeddings=1024)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.base, "folder", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'grm-hf\[demo\]'"):
        demo.run(tmp_path)


def test_methods_differ_in_the_text_loss_alone():
    assert {key for settings in demo.METHODS.values() for key in settings} == {"regularizer", "alpha"}
    assert demo.METHODS["Bradley-Terry"] == {"regularizer": "none"}


@pytest.mark.parametrize("processors, memory, runs", [(8, 24, 2), (8, 11.9, 1), (8, 3, 1), (1, 24, 1), (None, 24, 1)])
def test_runs_at_a_time(monkeypatch, processors, memory, runs):
    monkeypatch.setattr(demo.os, "cpu_count", lambda: processors)
    assert demo.at_a_time(memory) == runs


@pytest.mark.parametrize("workers, minutes", [(2, 4), (1, 7)])
def test_the_forecast_is_made_of_the_first_steps(monkeypatch, capsys, workers, minutes):
    """Three steps took 18 s; the one before them is not counted. 96 test pairs are as long as 4 steps, and a minute is
    for the rest."""
    clock = iter([0.0, 100.0, 118.0])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    for method in ("GRM", "Bradley-Terry"):  # one of them says it
        forecast = demo._Forecast(method, 96, workers)
        args, state = SimpleNamespace(per_device_train_batch_size=8), SimpleNamespace(max_steps=26, global_step=0)
        while state.global_step < 10:
            forecast.on_step_begin(args, state, None)
            state.global_step += 1
            forecast.on_step_end(args, state, None)
    # (26 + 96 / 24) * 6 s = 3 minutes a run
    assert capsys.readouterr().out == f"this machine takes 6.0 s a step: about {minutes} minutes in all\n"


def test_answers_stand_under_whose_they_are(tmp_path):
    entry = {"accuracy": 0.5, "interval": [0.4, 0.6], "log_loss": 0.6}
    test = {"pairs": 9, "longer": 0.5, "difference": {"accuracy": 0.0, "interval": [-0.1, 0.1]}}
    runs = {name: {"perplexity": p, "answers": [f"{name} | {i}" for i in range(5)], "peak": 2e9}
            for name, p in zip(demo.METHODS, (15.0, 14.5), strict=True)}  # fmt: skip
    results = {
        "base": "a base", "pairs": 8, "precision": "bf16", "seconds": 60.0, "workers": 2, "runs": runs,
        "before": {"perplexity": 14.0, "answers": [f"base {i}" for i in range(5)]},
        "comparison": {name: test | dict.fromkeys(demo.METHODS, entry) for name in demo.TESTS},
        "reloaded": [{"question": "Why?", "answer": "So.", "here": 0.5, "clean_process": 0.5}],
    }  # fmt: skip
    text = demo.report(results, tmp_path)
    assert "base 14.00, Bradley-Terry 15.00, GRM 14.50." in text
    for i, prompt in enumerate(demo.PROMPTS):
        assert f"| {prompt} | base {i} | Bradley-Terry \\| {i} | GRM \\| {i} |" in text
    assert "-10.0 to +10.0), no difference shown" in text


def test_answers_are_greedy():
    tokenizer = chatml_tokenizer()
    lm = tiny_lm("llama_tied", vocab_size=len(tokenizer), max_position_embeddings=256).eval()
    chat = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids
    written = []
    while len(written) < 7 and tokenizer.eos_token_id not in written:
        with torch.no_grad():
            written.append(int(lm(torch.tensor([ids + written])).logits[0, -1].argmax()))
    expected = tokenizer.decode(written, skip_special_tokens=True).strip()
    assert language.answers(lm, tokenizer, ["Hi", "Hi"], max_new_tokens=7) == [expected] * 2


@pytest.mark.slow
@pytest.mark.trainer
def test_the_whole_demo_at_toy_size(tmp_path, tiny_base, capfd):
    results = demo.run(tmp_path, pairs=40, tests=6, folder=tiny_base)
    assert results == json.loads((tmp_path / "results.json").read_text())
    runs = results["runs"]
    assert list(runs) == ["Bradley-Terry", "GRM"]
    for run in runs.values():
        assert [step for step, *_ in run["curve"]] == [1, 2, 3, 4, 5]
        assert run["peak"] > 1e8 and run["seconds"] > 0
    first, second = (run["curve"][0] for run in runs.values())
    assert first[1:] == pytest.approx(second[1:], rel=1e-3)  # one start: the same head, the same first pairs
    assert runs["Bradley-Terry"]["rewards"] != runs["GRM"]["rewards"]

    # what is saved is what was measured
    scorer = GRMScorer(str(tmp_path / "model"))
    rows = demo._test_pairs("pandalm", 6).to_list()
    assert np.array(scorer.score_pairs(rows)) == pytest.approx(np.array(runs["GRM"]["rewards"]["pandalm"]), abs=0.05)
    for row in results["reloaded"]:
        assert row["here"] == pytest.approx(row["clean_process"], abs=0.05)

    text, said = (tmp_path / "report.md").read_text(), capfd.readouterr().out
    assert text in said and "each trained on once by Bradley-Terry and by GRM" in said
    assert re.search(r"this machine takes \d+\.\d s a step: about \d+ minutes in all", said)
    entry = results["comparison"]["HHH"]
    accuracies = [entry[method]["accuracy"] for method in demo.METHODS]
    assert entry["difference"]["accuracy"] == pytest.approx(accuracies[1] - accuracies[0])
    assert f"| HHH | 6 | {100 * accuracies[0]:.1f} (" in text
    assert all(prompt in text for prompt in demo.PROMPTS)
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pandalm: accuracy" in card and "hhh: accuracy" in card and str(tmp_path) not in card


def test_what_is_compared(monkeypatch):
    """Rewards that are right on known rows: accuracies, their difference, and an interval about each."""
    count = 20
    right = {"Bradley-Terry": 10, "GRM": 16}
    runs = {
        method: {"rewards": {source: [[1.0, 0.0]] * n + [[0.0, 1.0]] * (count - n) for source in demo.TESTS.values()}}
        for method, n in right.items()
    }
    for name, entry in demo.compare(runs, count).items():
        assert entry["pairs"] == count, name
        for method, n in right.items():
            assert entry[method]["accuracy"] == n / count
            low, high = entry[method]["interval"]
            close_to = wilson_interval(n, count)  # of independent prompts; some have several pairs here
            assert low < n / count < high and low == pytest.approx(close_to[0], abs=0.2)
        assert entry["difference"]["accuracy"] == pytest.approx(0.3)
        assert entry["difference"]["interval"][0] > 0
        assert 0 < entry["longer"] < 1


def test_perplexity_is_that_of_the_tokens_one_by_one():
    tokenizer = chatml_tokenizer()
    lm = tiny_lm("llama_tied", vocab_size=len(tokenizer), max_position_embeddings=1024)
    rows = base.load_pairs("test", ("hhh",)).select(range(3)).to_list()
    total = tokens = 0
    for row in rows:
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], return_dict=True).input_ids
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True).input_ids
        ids = torch.tensor([whole])
        logps = lm(input_ids=ids).logits.double().log_softmax(-1)
        for i in range(len(prompt), len(whole)):
            total -= logps[0, i - 1, whole[i]].item()
            tokens += 1
    assert language.perplexity(lm, tokenizer, rows, max_length=1024) == pytest.approx(np.exp(total / tokens), rel=1e-4)
