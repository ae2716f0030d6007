"""The study on a real base: which units there are and when they can be named, what a unit is trained and tested on,
one unit of each kind at toy size, and the page against results whose differences are known."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assistant, chatml_tokenizer, tiny_lm, user


pytest.importorskip("trl", reason="training extra")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import objectives  # noqa: E402
import publish  # noqa: E402
import published_model  # noqa: E402
import real_base  # noqa: E402
import real_base_page as page  # noqa: E402
import shipped_pairs  # noqa: E402
from datasets import Dataset  # noqa: E402

from grm_hf import GRMScorer, base  # noqa: E402
from grm_hf.configuration_grm import ADAPTER_POLICIES  # noqa: E402


ORIGIN = "a base"


def row(prompt, chosen, rejected, **more):
    return {
        "id": f"{prompt}/{chosen}/{rejected}",
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "subset": "chat",
        "meta": json.dumps({"chosen_style": 0, "rejected_style": 1}),
        **more,
    }


@pytest.fixture
def few_pairs(monkeypatch):
    """Ten prompts of each file with two pairs each, in the place of shared/data."""

    def rows(name, longest=0):
        return [row(f"{name} {i}?", f"yes {j}", f"no, no {j}") for i in range(10) for j in range(2)]

    monkeypatch.setattr(real_base, "short_rows", rows)
    monkeypatch.setattr(real_base, "TRAIN", {name: (file, 4) for name, (file, _) in real_base.TRAIN.items()})
    real_base.test_rows.cache_clear()
    yield rows
    real_base.test_rows.cache_clear()


def test_every_unit_has_a_file_of_its_own():
    plans = [*real_base.plan(), *real_base.objectives_plan()]
    units = [real_base.run_unit(method, data, 1e-5, ORIGIN) for method, data in plans]
    units += [unit for method in [*real_base.METHODS, "bnrm"] for unit in real_base.selection_units(method, ORIGIN)]
    units += [real_base.base_unit(ORIGIN), real_base.gold_unit(1e-5, ORIGIN)]
    assert len({real_base.digest(unit) for unit in units}) == len(units)
    seeds = {}
    for method, data in real_base.plan():
        seeds.setdefault((data["train"], data["pairs"], data["flipped"], method), set()).add(data["seed"])
    assert {method: len(seeds["rmb", 600, 0.0, method]) for method in real_base.METHODS} == {
        "none": 8, "sft": 8, "dpo_noref": 8, "linear": 5, "dpo": 5
    }
    assert len(seeds["rmb", 600, 0.25, "sft"]) == len(seeds["pandalm", 500, 0.0, "none"]) == 8
    assert len(seeds["rmb", 1200, 0.0, "sft"]) == 5


def test_a_method_waits_for_its_learning_rate(tmp_path):
    def kinds():
        return [unit["kind"] for unit in real_base.units(ORIGIN, tmp_path)]

    assert set(kinds()) == {"base", "select"}
    losses = dict(zip(real_base.RATES, (0.70, 0.65, 0.66), strict=True))
    for unit in real_base.selection_units("sft", ORIGIN):
        found = {"held_out": {"log_loss": losses[unit["learning_rate"]]}}
        real_base.write(real_base.file_of(unit, tmp_path), found)
    assert real_base.chosen_rate("sft", ORIGIN, tmp_path) == real_base.RATES[1]
    rising = dict(zip(real_base.RATES, (0.70, 0.65, 0.60), strict=True))  # the best may lie beyond the last
    assert real_base.candidate_rates(rising) == (*real_base.RATES, real_base.HIGHER)
    assert real_base.best_rate(rising) is None
    assert real_base.best_rate(rising | {real_base.HIGHER: 0.61}) == real_base.RATES[-1]
    assert real_base.best_rate(rising | {real_base.HIGHER: 0.59}) == real_base.HIGHER
    assert real_base.chosen_rate("none", ORIGIN, tmp_path) is None
    assert "gold" not in kinds()  # it waits for the rate of `none`
    named = [unit for unit in real_base.units(ORIGIN, tmp_path) if unit["kind"] == "run"]
    assert {unit["method"] for unit in named} == {"sft", "sft_zero"}  # a term has no rate of its own
    assert {unit["learning_rate"] for unit in named} == {real_base.RATES[1]}
    plans = [*real_base.plan(), *real_base.objectives_plan()]
    assert len(named) == sum(method in ("sft", "sft_zero") for method, _ in plans)
    objectives_of = {json.dumps(unit.get("objective")) for unit in named}
    assert objectives_of == {"null", json.dumps(real_base.OBJECTIVES["sft_zero"])}


def test_pairs_of_a_run(few_pairs):
    first = real_base.training_rows("rmb", 12, 0.0, 3)
    assert first == real_base.training_rows("rmb", 12, 0.0, 3) != real_base.training_rows("rmb", 12, 0.0, 4)
    flipped = real_base.training_rows("rmb", 12, 0.25, 3)
    both = list(zip(first, flipped, strict=True))
    turned = [a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] for a, b in both]
    assert sum(turned) == 3 and all(a == b for (a, b), t in zip(both, turned, strict=True) if not t)
    with pytest.raises(ValueError, match="16 pairs to train on, 100 wanted"):
        real_base.training_rows("rmb", 100, 0.0, 3)

    train, held = real_base.split("rmb")
    turns = [{real_base.first_user_turn(row) for row in rows} for rows in (train, held)]
    assert (len(train), len(held)) == (16, 4) and not turns[0] & turns[1]
    assert {real_base.first_user_turn(row) for row in real_base.test_rows("pandalm")} == {
        real_base.first_user_turn(row) for row in real_base.split("pandalm")[1]
    }


def test_no_test_prompt_is_trained_on(few_pairs, monkeypatch):
    monkeypatch.setattr(
        real_base, "short_rows", lambda name: [row(f"{i}?", "yes", "no") for i in range(len(name), len(name) + 30)]
    )
    trained = {real_base.first_user_turn(row) for train in real_base.TRAIN for row in real_base.split(train)[0]}
    for test in real_base.TESTS:
        assert not trained & {real_base.first_user_turn(row) for row in real_base.test_rows(test)}, test


def test_the_judge_learns_from_other_prompts(few_pairs):
    rows = real_base.gold_rows()
    turns = {real_base.first_user_turn(row).split(" ")[0] for row in rows}
    # All of RMB's training pairs are short here, so they are the proxies'; PandaLM's held-out prompts are a test set.
    assert turns == {"pandalm_testset", "ultrafeedback_train", "autoj_pairwise"} and len(rows) == 16 + 20 + 20


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chatml_tokenizer()
    tiny_lm("llama_tied", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.trainer
def test_units_at_toy_size(few_pairs, tiny_base, tmp_path):
    unit = real_base.do(real_base.base_unit(ORIGIN), tiny_base)
    assert unit["perplexity"] > 1 and len(unit["written"]) == len(real_base.PROMPTS)
    data = {"train": "rmb", "pairs": 16, "flipped": 0.25, "seed": 0}  # two steps; the first is one of warm-up
    found = {}
    for method in [*real_base.METHODS, *real_base.OBJECTIVES]:
        unit = real_base.run_unit(method, data, 1e-3, ORIGIN)
        found[method] = real_base.do(unit, tiny_base)
        path = real_base.file_of(unit, tmp_path)
        real_base.write(path, found[method])
        assert json.loads(path.read_text()) == json.loads(json.dumps(found[method])) and path.stat().st_size < 60_000
        for test, scores in found[method]["tests"].items():
            assert scores["pairs"] == len(scores["chosen"]) == len(real_base.test_rows(test)), test
            right = np.mean(np.sign(np.array(scores["chosen"]) - scores["rejected"]) / 2 + 0.5)
            assert scores["accuracy"] == pytest.approx(right, abs=0.05)
    rewards = {tuple(result["tests"]["rmb"]["chosen"]) for result in found.values()}
    assert len(rewards) == len(found)
    selected = real_base.do(
        {**real_base.selection_units("none", ORIGIN)[0], "pairs": 8, "learning_rate": 1e-3}, tiny_base
    )
    assert selected["held_out"]["pairs"] == 4 and "tests" not in selected


@pytest.mark.trainer
def test_a_seed_draws_head_and_order_alike_for_every_method(few_pairs, tiny_base, tmp_path, monkeypatch):
    seen = {}

    def begin(trainer):
        """In place of a training: the head as it was drawn, and the pairs in the order they come."""
        batches = [part for batch in trainer.get_train_dataloader() for part in batch["parts"]]
        head = next(trainer.model.score.parameters()).detach().clone()
        seen[unit["method"], unit["seed"]] = head, [batch["input_ids"].tolist() for batch in batches]

    monkeypatch.setattr(real_base.GRMRewardTrainer, "train", begin)
    methods = [*real_base.METHODS, *real_base.OBJECTIVES]
    for method, seed in [*((method, 0) for method in methods), ("none", 1)]:
        data = {"train": "rmb", "pairs": 12, "flipped": 0.25, "seed": seed}
        unit = real_base.run_unit(method, data, 1e-3, ORIGIN)
        real_base.trained(unit, tiny_base, str(tmp_path))
    for method in methods:
        head, order = seen[method, 0]
        assert order == seen["none", 0][1], method
        assert method in ("linear", "bnrm") or torch.equal(head, seen["none", 0][0]), method
    assert not torch.equal(seen["none", 0][0], seen["none", 1][0]) and seen["none", 0][1] != seen["none", 1][1]


# --------------------------------------------------------------------------------------------------- the shipped pairs


def test_no_shipped_pair_is_offensive():
    for name in base.shipped.SPLITS:
        assert not any(map(shipped_pairs.is_offensive, base.load_pairs(name).to_list())), name
    assert shipped_pairs.is_offensive(row("Are BLACKS lazy?", "no", "yes"))
    assert not shipped_pairs.is_offensive(row("Where is my jewelry?", "here", "there"))


def test_no_prompt_of_a_shipped_split_is_in_another_in_another_spelling():
    def turns(name):
        spelled = (real_base.first_user_turn(row) for row in base.load_pairs(name).to_list())
        return {" ".join(re.findall(r"\w+", text.casefold())) for text in spelled}

    train, validation, test = map(turns, base.shipped.SPLITS)
    assert not train & validation and not test & (train | validation)


@pytest.mark.skipif(not real_base.DATA.is_dir(), reason="needs the preference data beside the repository")
def test_the_shipped_pairs_are_what_the_script_makes():
    for name, rows in shipped_pairs.splits().items():
        assert base.load_pairs(name).to_list() == rows, name


# ------------------------------------------------------------------------------------------------------------ the page


def synthetic(folder, better, seeds=8, methods=("none", "sft")):
    """Results in which the last method wins `better` more rows of every test set than the others, in each of `seeds`
    seeds."""
    count = 60
    rows = {"prompts": list(range(count)), "chosen": [9] * count, "rejected": [5] * count}
    about = {test: dict(rows) for test in real_base.TESTS}
    prompts = [i // 3 for i in range(count)]  # each with two right and two wrong answers
    about["rm_bench"] |= {
        "prompts": prompts, "domains": ["chat"] * count, "styles": ["01", "10", "00"] * (count // 3)
    }  # fmt: skip
    folder.mkdir()
    real_base.write(folder / "tests.json", about)

    def save(unit, **result):
        made = {"settings": unit, "processor_seconds": 60, "versions": {"torch": "2"}}
        real_base.write(real_base.file_of(unit, folder), made | result)

    save(real_base.base_unit(ORIGIN), perplexity=14.0, written=["We are"] * 5, versions={"torch": "1"})
    for method in methods:
        for unit in real_base.selection_units(method, ORIGIN):
            save(unit, held_out={"log_loss": unit["learning_rate"], "pairs": 200})
        for seed in range(seeds):
            right = 36 + seed % 3 + (better if method == methods[-1] else 0)
            scores = {
                "pairs": count, "accuracy": right / count, "log_loss": 0.6, "length": 0.1,
                "chosen": [1.0] * right + [0.0] * (count - right), "rejected": [0.0] * right + [1.0] * (count - right),
            }
            data = {"train": "rmb", "pairs": 600, "flipped": 0.0, "seed": seed}
            unit = real_base.run_unit(method, data, real_base.RATES[0], ORIGIN)
            said = {"perplexity": 15.0 + seed, "written": [f"I | {method}"] * 5}
            save(unit, tests=dict.fromkeys(real_base.TESTS, scores), **said)
    return folder


def test_the_page_says_what_the_intervals_say(tmp_path):
    text = page.markdown(synthetic(tmp_path / "a", better=12))
    planned = len(real_base.plan())
    assert f"16 of {planned} runs are done" in text
    assert "| 600 RMB pairs | RMB | 8 | +20.0 | +20.0 to +20.0 |" in text and "| better |" in text
    assert "| 600 RMB pairs | the 6 other test sets, averaged | 8 | +20.0 |" in text
    assert "| 1,200 RMB pairs | RMB | 0 | | | | too few seeds yet |" in text
    assert "sft 3e-05 (0.0000 at 3e-05" in text and "Not chosen yet: linear, dpo_noref, dpo." in text
    assert "perplexity on HHH's chosen answers is 14.0 before training, 18.50 ± 2.05 after" in text
    assert "It has" not in text and "is the best) it has the lowest log loss on 200 held-out RMB" in text
    assert "Units by device: cpu 22." in text
    assert f"| {page.PROMPTS[0]} | We are | I \\| none | I \\| sft |" in text
    # The first rows are right: 36, 37 or 38 of 60, twelve more with sft; plain, elaborate and equal style in turn.
    right = {method: [36 + seed % 3 + more for seed in range(8)] for method, more in (("none", 0), ("sft", 12))}
    for method, counts in right.items():
        by_style = [np.mean([len(range(first, count, 3)) / 20 for count in counts]) for first in (1, 2, 0)]
        (line,) = re.findall(rf"600 RMB pairs \| {method} \| ([\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+) \|\n", text)
        expected = 100 * np.array([np.mean(counts) / 60, *by_style])
        assert [float(cell) for cell in line.split(" | ")] == pytest.approx(expected, abs=0.051)
    assert "The 60 pairs are of 20 items" in text
    rows = page.forest(tmp_path / "a")
    assert list(rows) == ["600 RMB pairs,\nin distribution", "600 RMB pairs,\nother test sets"]
    assert rows["600 RMB pairs,\nin distribution"]["GRM sft"] == pytest.approx([20.0, 20.0, 20.0])
    assert page.verdicts(tmp_path / "a") == ["better", "better"]
    text = page.markdown(synthetic(tmp_path / "b", better=0))
    assert "| 600 RMB pairs | RMB | 8 | +0.0 | +0.0 to +0.0 | +0.0 to +0.0 | no difference shown |" in text
    assert "less than a coin" not in text
    text = page.markdown(synthetic(tmp_path / "d", better=-36))  # 36.875 right of 60 for none, 0.875 for sft
    assert "On average the runs rank 31.5 % of hh harmless's pairs rightly, less than a coin." in text
    assert "in 100.0 % of RMB's and 100.0 % of PandaLM's pairs, and in 100.0 % of hh harmless's" in text


def test_the_page_opens_with_five_sentences(tmp_path, monkeypatch):
    folder = synthetic(tmp_path / "a", better=12)
    assert len(page.findings(folder)) == 6  # while runs are missing
    done = [(method, data) for method, data in page.plan() if method in ("none", "sft")]
    monkeypatch.setattr(page, "plan", lambda: [unit for unit in done if page._key(unit)[0] == ("rmb", 600, 0.0)])
    assert len(page.findings(folder)) == 5 and page.findings(folder)[0].endswith("in 16 runs.")


@pytest.mark.parametrize("other", [{"base": "another"}, {"precision": "float32"}, {"learning_rate": 1e-5}])
def test_runs_that_do_not_belong_together_are_refused(tmp_path, other):
    """The same run on the Hub's weights, on another processor, or at a rate that was chosen before."""
    folder = synthetic(tmp_path / "a", better=1)
    unit = real_base.run_unit("sft", real_base.plan()[0][1], real_base.RATES[0], ORIGIN)
    known = json.loads(real_base.file_of(unit, folder).read_text())
    known["settings"] = {**known["settings"], **other}
    real_base.write(real_base.file_of(known["settings"], folder), known)
    with pytest.raises(ValueError, match="two runs of" if "learning_rate" in other else "differ in base, precision"):
        page.markdown(folder)


def test_the_page_on_objectives_says_what_the_intervals_say(tmp_path):
    folder = synthetic(tmp_path / "a", better=12, seeds=5, methods=("none", "sft", "none_zero", "bnrm", "sft_zero"))
    text = objectives.markdown(folder)
    assert "15 of 25 runs with a sum-to-zero term" in text and "accuracy is better in 2 of 6 comparisons" in text
    assert "| 600 RMB pairs | GRM (sft), sum to zero | GRM (sft) | RMB | 5 | +20.0 | +20.0 to +20.0 |" in text
    assert "| Bradley-Terry, head bnrm | Bradley-Terry | the 6 others, averaged | 5 | +0.0 |" in text
    assert "0.0000 at 3e-05" in text
    # A prompt of RM-Bench has three pairs here, which are won from the first on: if some of them are, it is a tie.
    assert "of the 20 RM-Bench prompts of which at least three responses are short" in text
    assert "There n is 4 to 4, and chance gives 50.0 %." in text
    (line,) = [x for x in text.splitlines() if x.startswith("| 600 RMB pairs | GRM (sft), sum to zero | 8")]
    cells = [cell.strip().split(" ")[0] for cell in line.split("|")[3:-1]]
    right = np.mean([48, 49, 50, 48, 49]) / 60
    best = np.mean([16, 16.5, 16.5, 16, 16.5]) / 20
    expected = (100 * right, 100 * right, 0.5, 0.5, 0.0, 100 * best, 17.0)
    assert [float(cell) for cell in cells[:4]] == pytest.approx(expected[:4], abs=0.01)
    assert [float(cell) for cell in cells[5:]] == pytest.approx(expected[5:], abs=0.01)
    # The runs of both have the same seeds, and win the same rows more in each.
    same = " | ".join(["+20.00 ± 0.00"] * 2 + ["+0.00 ± 0.00"] * 2)
    assert f"| 600 RMB pairs | GRM (sft), sum to zero | GRM (sft) | {same} |" in text
    assert page.findings(folder)[1].startswith("10 of")  # the study's own page passes them over
    assert not objectives.has_runs(synthetic(tmp_path / "b", better=1, seeds=1))


@pytest.mark.parametrize("right, words", [(60, "It is better, so"), (38, "is left out"), (10, "is left out")])
def test_over_optimisation_needs_a_judge_that_is_better(tmp_path, right, words):
    folder = synthetic(tmp_path / "a", better=1)
    assert "The judge is not trained yet." in page.markdown(folder)
    runs = page.load(folder)[0]
    scores = {"chosen": [1.0 if i >= 60 - right else -1.0 for i in range(60)], "rejected": [0.0] * 60}
    unit = {"settings": real_base.gold_unit(1e-5, ORIGIN), "pairs": 1234, "tests": dict.fromkeys(page.TESTS, scores)}
    real_base.write(real_base.file_of(unit["settings"], folder), unit)
    text = page.markdown(folder)
    assert words in text and "learned from 1234 other pairs; the proxies are the 16 runs" in text
    assert f"| RMB | {100 * right / 60:.1f} | 62.3 |" in text  # 36, 37 or 38 of 60, one more with sft
    assert page.load(folder)[0].keys() == runs.keys()


def test_what_else_a_run_is_asked_for():
    scores = {"chosen": [3.0, 1.0, 0.0, 5.0], "rejected": [2.0, 4.0, -1.0, 6.0]}
    # Of prompt 0 two responses are short, which make a pair. Of prompt 1 the best is right, and of prompt 2 a tie.
    best = {"chosen": [0.0, 1.0, 3.0, 1.0, 1.0], "rejected": [9.0, 2.0, 2.0, 1.0, 0.0]}
    run = {"tests": {"rm_bench": best, "hhh": scores}}
    about = {
        "rm_bench": {"prompts": [0, 1, 1, 2, 2], "styles": ["01", "00", "10", "22", "21"]},
        "hhh": {"chosen": [3, 1, 0, 5], "rejected": [2, 4, -1, 6]},
    }
    assert objectives.items(about) == {1: (2, 1), 2: (1, 2)}
    assert objectives.best_of(run, about) == 75.0
    assert objectives.length_bias(run, about) == pytest.approx(1.0)


def test_the_page_with_hardly_any_results(tmp_path):
    text = page.markdown(synthetic(tmp_path / "a", better=3, seeds=1))
    assert "The accuracy on the other test sets is not known yet." in text and "| too few seeds yet |" in text
    assert "torch 1 and 2." in text  # every version that made a unit
    assert page.forest(tmp_path / "a") == {} and page.verdicts(tmp_path / "a") == []
    page.draw(tmp_path / "a", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_each_test_set_counts_the_same_in_an_average(tmp_path):
    folder = synthetic(tmp_path / "a", better=12)
    runs, _, _, about = page.load(folder)
    for run in runs.values():
        run["tests"] = dict(run["tests"])
        run["tests"]["hhh"] = {"chosen": [1.0, 1.0], "rejected": [0.0, 0.0]}
    about["hhh"] = {"prompts": [0, 1], "chosen": [1, 1], "rejected": [2, 2]}
    found = page.difference(runs, about, ("rmb", 600, 0.0), "sft", ["rmb", "hhh"], 0.95)
    assert found["mean"] == pytest.approx((20.0 + 0.0) / 2)


@pytest.mark.parametrize("deviation, seeds, level", [(1.0, 8, 0.95), (2.0, 5, 0.95), (1.6, 8, 0.99375), (1, 2, 0.95)])
def test_power_is_that_of_students_test(deviation, seeds, level):
    stats = pytest.importorskip("scipy.stats")
    found = page.detectable(deviation, seeds, level)
    beyond = stats.t.ppf((1 + level) / 2, seeds - 1)
    assert stats.nct.sf(beyond, seeds - 1, found / deviation * math.sqrt(seeds)) == pytest.approx(0.8, abs=2e-3)


def test_an_interval_over_prompts_is_that_of_each_test_set_by_itself():
    """Test sets whose differences are unlike do not widen it; a prompt keeps its pairs."""
    generator = np.random.default_rng(0)
    about = {"rmb": {"prompts": np.repeat(np.arange(100), 3).tolist()}, "hhh": {"prompts": list(range(80))}}
    values = {"rmb": 100 + generator.normal(0, 20, 100).repeat(3), "hhh": generator.normal(0, 20, 80)}
    low, high = page.interval_over_prompts(values, about, 0.95)
    means = np.array([each.mean() for each in values.values()])
    error = math.sqrt(values["rmb"][::3].var() / 100 + values["hhh"].var() / 80) / 2
    assert (low, high) == pytest.approx((means.mean() - 1.96 * error, means.mean() + 1.96 * error), abs=0.1 * error)


def test_log_likelihoods_are_those_of_each_text_alone():
    lm, tokenizer = tiny_lm("llama_tied", vocab_size=len(chatml_tokenizer())).double(), chatml_tokenizer()
    rows = [row("one", "two three", "x"), row("four five six", "seven", "y"), row("one", "two three", "z")]
    found = real_base.log_likelihoods(lm, tokenizer, rows, "chosen")
    assert found[0] == found[2]
    for one, (logp, count) in zip(rows, found, strict=True):
        text = real_base.Encoder(tokenizer, 512).encode(one["prompt"], one["chosen"])
        logits = lm(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        theirs = sum(logits[i - 1, text.ids[i]].item() for i in range(text.start, len(text.ids)))
        assert logp == pytest.approx(theirs, rel=1e-4) and count == len(text.ids) - text.start


# ------------------------------------------------------------------------------------------------- the published model


def test_the_card_of_the_published_model_is_made_from_what_was_measured():
    measured = json.loads((publish.RESULTS / publish.MEASURED).read_text(encoding="utf-8"))
    losses = publish.candidates()
    assert measured["candidate"] == min(losses, key=losses.__getitem__)
    card = (publish.MODEL / "README.md").read_text(encoding="utf-8")
    assert all(line in card for line in (*publish.table(measured), *publish.calibration(measured)))
    assert publish.length_sentence(measured) in card and publish.BASE in card and "PeftModel" not in card
    assert "chose this one: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) in card
    assert "All linear layers were trained; the adapter is their difference from the base, cut to rank 8." in card
    assert "averaged over their sources (pandalm, gsm8k, ultrafeedback, off_topic), " in card
    policies = json.loads((publish.MODEL / ADAPTER_POLICIES).read_text(encoding="utf-8"))
    assert policies["reward_temperature"] == publish._candidate(measured)["temperature"] != 1.0


def test_the_card_can_name_the_data_of_every_candidate():
    for candidate in publish.CANDIDATES.values():
        assert {*candidate["sources"], *candidate["files"]} <= set(publish.DATA)


def test_the_card_names_what_is_ranked_backwards():
    def measured(**margins):
        tests = {name: [[margins.get(name, 0.5), 0.0]] * 40 for name in publish.TITLES}
        return {"tests": {name: {"grm": pairs, "prompts": [*range(40)]} for name, pairs in tests.items()}}

    assert publish.backwards(measured()) == "No test set is shown to be ranked the wrong way round."
    assert publish.backwards(measured(gsm8k=-1.0)) == "It ranks the wrong way round: GSM8K solutions, held out."
    said = publish.backwards(measured(**{"rm_bench_safety-refuse": -1.0}))
    assert said.endswith("so it is no filter for safety.")


def test_candidates_are_compared_on_the_same_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    monkeypatch.setattr(publish, "CANDIDATES", dict.fromkeys(("one", "two", "two_bt", "three")))
    for name, losses in {"one": (0.6, 0.7), "two": (0.5, 0.7), "two_bt": (0.1, 0.1)}.items():
        found = {source: {"log_loss": loss} for source, loss in zip(("pandalm", "gsm8k"), losses, strict=True)}
        (tmp_path / f"{name}.json").write_text(json.dumps({"validation": found}))
    assert publish.candidates() == pytest.approx({"one": 0.65, "two": 0.6})
    found["off_topic"] = {"log_loss": 0.01}
    (tmp_path / "three.json").write_text(json.dumps({"validation": found}))
    with pytest.raises(ValueError, match="judged on other pairs"):
        publish.candidates()


def test_a_run_that_is_not_at_hand_does_not_cost_the_published_model(tmp_path, monkeypatch):
    folder, run = tmp_path / "published", tmp_path / "on_topic"
    shutil.copytree(publish.MODEL, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shutil.copytree(publish.MODEL, run)
    (run / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    (tmp_path / "on_topic.json").write_text('{"temperature": 2.5}')
    for missing in (run, tmp_path / "none"):
        with pytest.raises(FileNotFoundError):
            publish.write_folder(missing, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    shutil.copy(publish.MODEL / "adapter_model.safetensors", run)
    publish.write_folder(run, folder)
    assert json.loads((folder / ADAPTER_POLICIES).read_text())["reward_temperature"] == 2.5
    assert (folder / "base" / "config.json").is_file() and not (folder / "golden_rows.json").exists()


def test_the_published_model_stays_while_another_is_measured(tmp_path, monkeypatch):
    """A stop in between loses one test set, and the folder keeps to its card."""
    published, runs = tmp_path / "published", tmp_path / "runs"
    for folder in (published, runs / "new", runs / "new_bt"):
        shutil.copytree(publish.MODEL, folder)
    before = {path: path.read_bytes() for path in published.rglob("*") if path.is_file()}
    monkeypatch.setattr(publish, "MODEL", published)
    monkeypatch.setattr(publish, "RUNS", runs)
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    for name in ("new", "new_bt"):
        (tmp_path / f"{name}.json").write_text('{"temperature": 2.5}')
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    monkeypatch.setattr(publish, "tests", lambda: {"one": [row], "two": [row]})
    asked = []

    def rewards(scorer, rows):
        assert {path: path.read_bytes() for path in published.rglob("*") if path.is_file()} == before
        if len(asked) == 3:
            asked.append("stopped")
            raise KeyboardInterrupt
        asked.append(scorer)
        return [[1.0, 0.0]]

    monkeypatch.setattr(publish, "GRMScorer", lambda folder, layout: folder)
    monkeypatch.setattr(publish, "rewards", rewards)
    monkeypatch.setattr(publish, "likelihoods", lambda rows: ([[0.0, 0.0]], [[0.0, 0.0]]))
    with pytest.raises(KeyboardInterrupt):
        publish.measure("new")
    assert [*publish.measure("new")["tests"]] == ["one", "two"]
    assert len(asked) == 6  # two for the first set, two for the second and one stop


def test_pairs_off_topic_answer_another_prompt():
    texts = ["sure", "sure", "north", "blue", "42"]
    rows = [{"prompt": [user(f"{i}?")], "chosen": [assistant(text)], "rejected": []} for i, text in enumerate(texts)]
    made = published_model.off_topic(rows + rows, 12)
    chosen = {row["prompt"][0]["content"]: row["chosen"] for row in rows}
    assert len(made) == 12 and all(row["chosen"] == chosen[row["prompt"][0]["content"]] for row in made)
    assert all(row["rejected"] != row["chosen"] and row["rejected"] in chosen.values() for row in made)
    assert len({row["prompt"][0]["content"] for row in made[:5]}) == 5  # each prompt in turn
    assert len({(row["prompt"][0]["content"], row["rejected"][0]["content"]) for row in made[:10]}) > 5


@pytest.fixture
def few_shipped(tiny_base, few_pairs, monkeypatch, tmp_path):
    """A tiny base and a few pairs in the place of those that are shipped."""
    pairs = Dataset.from_list([{**row, "source": "pandalm"} for row in few_pairs("shipped")])
    monkeypatch.setattr(published_model.base, "folder", lambda source: tiny_base)
    monkeypatch.setattr(published_model.base, "load_pairs", lambda split, sources=None: pairs)
    monkeypatch.setattr(published_model, "RUNS", tmp_path)
    monkeypatch.setitem(published_model.CANDIDATES["on_topic"], "off_topic", 0)
    monkeypatch.setattr(published_model, "precision", lambda: "float32")


def test_a_candidate_trained_in_full_is_cut_to_its_best_approximation(few_shipped):
    """A difference of low rank is kept whole, and rewards with it."""
    trained = published_model.make_trainer("on_topic", full=True)
    layers = published_model.linear_layers(trained.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            rows, columns = layer.weight.shape
            left, right = (torch.randn(*size, generator=generator) for size in ((rows, 2), (2, columns)))
            layer.weight += 0.1 * left @ right
        trained.model.score.out.weight += 0.5
    trained.state.global_step = 7
    made = published_model.cut(trained, "on_topic")
    assert made.state.global_step == 7
    rows = published_model.base.load_pairs("validation").to_list()
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    one, two = (GRMScorer(t.model, t.processing_class).score_pairs(pairs) for t in (trained, made))
    assert torch.tensor(one).std() > 1
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-2, atol=1e-3)  # its base is bfloat16
