"""`docs/results.md`: every section is what its results file gives, byte for byte; and what `benchmarks/real_data.py`
computes, against numbers worked out by hand."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import chatml_tokenizer, tiny_lm


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402

from grm_hf import GRMForSequenceClassification  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import real_data  # noqa: E402
from results_page import HEADER, PAGE, write_section  # noqa: E402


def chat(prompt, chosen, rejected):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def test_the_page_is_what_the_results_files_give(tmp_path):
    page = shutil.copy(PAGE, tmp_path / "results.md")
    write_section("real_data", real_data.section(json.loads(real_data.RESULTS.read_text(encoding="utf-8"))), page)
    assert page.read_bytes() == PAGE.read_bytes()


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    page = tmp_path / "results.md"
    write_section("one", "## One\n\nfirst", page)
    write_section("two", "## Two\n\nother", page)
    before = page.read_text(encoding="utf-8")
    assert before.startswith(HEADER) and before.index("## One") < before.index("## Two")
    write_section("one", "## One\n\nsecond", page)
    assert page.read_text(encoding="utf-8") == before.replace("first", "second")
    write_section("one", "## One\n\nfirst", page)
    assert page.read_text(encoding="utf-8") == before


def results(wins, length=0.25, perplexity=30.0):
    """A results file: `wins(regularizer, seed)` for the training file of hh_helpful, chance for the others."""
    names = {name for tested in real_data.FILES.values() for name in tested}
    about = {"prompts": [0, 0, 1, 1, *range(2, 38)], "longer": 0.6, "truncated": 3, "response_cut": 1}
    about["perplexity"] = 61.5
    runs = []
    for (train, tested), regularizer, seed in itertools.product(
        real_data.FILES.items(), real_data.REGULARIZERS, range(3)
    ):
        row = wins(regularizer, seed) if train == "hh_helpful_base_train" else "10" * 20
        scores = {"wins": row, "length": length, "perplexity": perplexity + (5 if regularizer == "dpo" else 0)}
        runs.append(
            {
                "train": train,
                "regularizer": regularizer,
                "seed": seed,
                "rows": [100, 90, 20, 10, 0],
                "loss": 0.6,
                "eval": {name: scores for name in tested},
                "wall": 60.0,
                "cpu": 30.0,
            }
        )
    settings = {**real_data.SETTINGS, "eval_rows": 40, "versions": {"torch": "2.13.0"}}
    return {"settings": settings, "selection": None, "evals": dict.fromkeys(sorted(names), about), "runs": runs}


def rows_of(text, start):
    lines = [line for line in text.split("\n") if line.startswith(start)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_means_intervals_and_verdicts():
    # Of 40 pairs: none wins 20, 21, 22 and sft ten more each time, so the difference has no spread over seeds.
    extra = {"none": 0, "sft": 10, "dpo_noref": 0, "dpo": -10}
    text = real_data.section(results(lambda r, seed: ("1" * (20 + seed + extra[r])).ljust(40, "0")))
    accuracy, length, perplexity = (
        {row[2]: row[3:] for row in rows_of(part, "| hh_helpful_base_train | hh_helpful_base_eval")}
        for part in text.split("### ")[2:]
    )
    # Student's t with 2 degrees of freedom: 4.3027; standard deviation of 50, 52.5, 55 is 2.5.
    half = 4.3027 * 2.5 / math.sqrt(3)
    assert accuracy["none"][:2] == ["52.5", f"{52.5 - half:.1f} to {52.5 + half:.1f}"]
    assert accuracy["none"][3:] == ["", "", "", "baseline"]
    assert accuracy["sft"][3:5] == ["+25.0", "25.0 to 25.0"] and accuracy["sft"][-1] == "higher"
    assert accuracy["dpo"][3:5] == ["-25.0", "-25.0 to -25.0"] and accuracy["dpo"][-1] == "lower"
    assert accuracy["dpo_noref"][3:] == ["+0.0", "0.0 to 0.0", "0.0 to 0.0", "no difference shown"]
    assert {name: row[-1] for name, row in length.items()} == {
        "none": "baseline", **dict.fromkeys(("sft", "dpo_noref", "dpo"), "no difference shown"),
    }  # fmt: skip
    assert perplexity["dpo"] == ["61.5", "35.0", "35.0 to 35.0", "+5.0", "5.0 to 5.0", "higher"]
    assert "18 comparisons with `none`: 2 higher, 2 lower, 14 no difference shown." in text  # two test files each
    assert "18 comparisons with `none`: 6 higher, 0 lower, 12 no difference shown." in text  # perplexity of dpo
    # To choose the longer response is right in 60 %, and only sft (77.5 %, on two files) does better.
    assert "2 of 24 are better than always choosing the longer response" in text
    assert "3 seeds, so 36 runs: 36 minutes of wall time on one thread of a shared machine, 18 of processor" in text


def test_a_difference_must_hold_over_seeds_and_over_prompts():
    assert real_data.verdict((0.1, 2.0), (0.5, 1.0)) == "higher"
    assert real_data.verdict((-2.0, -0.1), (-1.0, -0.5)) == "lower"
    for other in ((-0.1, 2.0), (-2.0, -0.1), (0.0, 1.0)):
        assert real_data.verdict((0.1, 2.0), other) == "no difference shown"
    # One pair more in every seed: certain over seeds, and nothing over prompts.
    text = real_data.section(results(lambda r, seed: ("1" * (20 + (r == "sft"))).ljust(40, "0")))
    (row,) = (row for row in rows_of(text, "| hh_helpful_base_train | hhh_alignment | sft") if row[3] == "52.5")
    assert row[6:8] == ["+2.5", "2.5 to 2.5"] and row[8].startswith("0.0 to") and row[9] == "no difference shown"


def test_a_seed_that_is_not_complete_does_not_count():
    complete = results(lambda r, seed: ("1" * (20 + seed)).ljust(40, "0"))
    runs = [run for run in complete["runs"] if (run["regularizer"], run["seed"]) != ("dpo", 2)]
    text = real_data.section({**complete, "runs": runs})
    assert "2 seeds, so 24 runs" in text
    assert rows_of(text, "| hh_helpful_base_train | hhh_alignment | none")[0][3] == "51.2"  # of 50 and 52.5
    with pytest.raises(ValueError, match="1 complete seeds"):
        real_data.section({**complete, "runs": [run for run in runs if run["seed"] != 1]})


def test_a_learning_rate_that_the_search_did_not_find_is_refused():
    rates = {str(rate): 0.7 for rate in real_data.RATES}
    best = {**rates, str(real_data.SETTINGS["learning_rate"]): 0.6, "pairs": 10, "drawn": 40}
    made = results(lambda r, seed: "10" * 20)
    text = real_data.section({**made, "selection": {"a": best, "b": best}})
    assert "10 of a after training on 40, 10 of b after training on 40" in text
    assert f"0.6000 at {real_data.SETTINGS['learning_rate']}" in text
    other = next(rate for rate in real_data.RATES if rate != real_data.SETTINGS["learning_rate"])
    with pytest.raises(ValueError, match="the search found"):
        real_data.section({**made, "selection": {"a": {**rates, str(other): 0.1, "pairs": 10}}})


def test_files_with_a_prompt_in_common_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(real_data, "DATA", tmp_path)
    Dataset.from_list([chat("a", "x", "y"), chat("b", "x", "y")]).to_parquet(tmp_path / "train.parquet")
    Dataset.from_list([chat("c", "x", "y")]).to_parquet(tmp_path / "apart.parquet")
    Dataset.from_list([chat("c", "x", "y"), chat("b", "v", "w")]).to_parquet(tmp_path / "same.parquet")
    real_data.check_apart("train", "apart")
    with pytest.raises(ValueError, match="train and same have 1 prompts in common"):
        real_data.check_apart("train", "same")


def test_evaluation_against_one_text_at_a_time():
    tokenizer = chatml_tokenizer()
    lm = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    model = GRMForSequenceClassification.from_base(lm)
    rows = [chat(f"{i}?", "yes" * (i + 1), "no, " * (5 - i) + "no") for i in range(5)]
    found = real_data.evaluate(model, tokenizer, rows)

    total = tokens = 0
    for row, win in zip(rows, found["wins"], strict=True):
        ids = {
            side: tokenizer.apply_chat_template(row["prompt"] + row[side], return_tensors="pt", return_dict=False)
            for side in ("chosen", "rejected")
        }
        with torch.no_grad():
            chosen, rejected = (model(input_ids=ids[side]).logits.item() for side in ("chosen", "rejected"))
            assert win == str(int(chosen > rejected))
            labels = ids["chosen"].clone()
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            labels[:, : len(prompt)] = -100
            count = int((labels != -100).sum())
            total += lm(input_ids=ids["chosen"], labels=labels).loss.item() * count
            tokens += count
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert "0" in found["wins"] or "1" in found["wins"]
    assert real_data.lengths(rows) == ([3, 6, 9, 12, 15], [22, 18, 14, 10, 6])


def test_a_seed_draws_head_and_order_alike_for_every_text_loss(tmp_path, monkeypatch):
    tokenizer = chatml_tokenizer()
    tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    Dataset.from_list([chat(f"{i}?", "yes", "no") for i in range(12)]).to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr(real_data, "WORK", tmp_path)
    seen = {}

    def begin(trainer):
        """In place of a training: the head as it was drawn, and the pairs in the order they come."""
        pairs = [batch["input_ids"].clone() for batch in trainer.get_train_dataloader()]
        run = trainer.args.regularizer, trainer.args.seed
        seen[run] = next(trainer.model.score.parameters()).detach().clone(), torch.cat([p.flatten() for p in pairs])

    monkeypatch.setattr(real_data.train_grm.GRMRewardTrainer, "train", begin)
    for regularizer, seed in [*itertools.product(real_data.REGULARIZERS, [0]), ("none", 1)]:
        real_data.train(tmp_path / "out", train=tmp_path / "train.parquet", regularizer=regularizer, seed=seed)
    for regularizer in real_data.REGULARIZERS:
        assert all(torch.equal(a, b) for a, b in zip(seen[regularizer, 0], seen["none", 0], strict=True)), regularizer
    assert not any(torch.equal(a, b) for a, b in zip(seen["none", 0], seen["none", 1], strict=True))
