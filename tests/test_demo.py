"""The demo: the whole of it at toy size, and what it says of its numbers."""

import json
import re
import sys

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
