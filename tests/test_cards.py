"""Model cards: what they say against the run, the snippet run as printed, and how they merge with a person's edits."""

import contextlib
import importlib
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml


pytest.importorskip("trl", reason="needs the extra `train`")

from huggingface_hub import ModelCard  # noqa: E402
from tiny import bare_tokenizer, tiny_lm  # noqa: E402
from trainers import lora, pairs, trainer  # noqa: E402

from grm_hf import GRMForSequenceClassification  # noqa: E402
from grm_hf.hub.card import (  # noqa: E402
    BLOCK,
    card_of_folder,
    edited_lines,
    merge_cards,
    metadata,
    rename,
    set_field,
    without_paths,
)


pytestmark = pytest.mark.trainer

ROOT = Path(__file__).resolve().parents[1]


def run(folder, **options):
    options = {"alpha": 0.5, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2, **options}
    return trainer(folder, evaluation=pairs(9, seed=4), save_strategy="steps", **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose best step, which it loads at the end, is not its last; and its card."""
    folder = tmp_path_factory.mktemp("cards") / "my-run"
    best = {"load_best_model_at_end": True, "metric_for_best_model": "margin", "greater_is_better": False}
    loss = {"regularizer": "dpo_noref", "alpha": 0.25, "beta": 0.2}
    made = run(folder, save_steps=1, max_length=30, **best, **loss)
    made.model.config.base_model = "lab/base"
    made.train()
    made.create_model_card(dataset_name="lab/pairs", tags="mine")
    return made, (folder / "README.md").read_text()


def test_a_card_says_what_the_run_was(trained):
    made, text = trained
    assert "Loss: `0.75 * -log sigmoid(r_c - r_r) + 0.25 * -log sigmoid(beta * (s_c - s_r))`" in text
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", text, re.M))
    assert (rows["regularizer"], rows["alpha"], rows["beta"]) == ("dpo_noref", "0.25", "0.2")
    assert rows["reward head"] == "MLP, 1 x 8" and rows["maximum length"].startswith("30 tokens")
    assert "<|im_start|>user" in rows["chat template"] and rows["steps"] == "4 of 4"
    assert made.data_counts["train"].truncated
    for counts in made.data_counts.values():
        assert f"- {counts}" in text
    assert "rewardbench --model my-run --trust_remote_code --torch_dtype bfloat16 --not_quantized " in text
    assert "--max_length 30 " in text
    assert "2406.10216" in text and "vonwerra2020trl" in text and "transformers " in text
    assert "## Intended use and known failure modes" in text


def test_metrics_are_those_of_the_saved_weights(trained):
    made, text = trained
    evaluations = [row for row in made.state.log_history if "eval_loss" in row]
    best = min(evaluations, key=lambda row: row["eval_margin"])
    assert best is not evaluations[-1]
    assert f"Evaluation set of the run, 9 pairs, at step {best['step']}." in text
    # The rewards by a forward for each text, the interval by its formula solved anew.
    model = made.model.eval()
    rewards = np.array(
        [
            [model(torch_row(example[f"{side}_ids"])).logits.item() for side in ("chosen", "rejected")]
            for example in made.eval_dataset
        ]
    )
    kept = made.eval_pairs["eval", best["step"]]
    assert kept[:, :2] == pytest.approx(rewards, rel=1e-4, abs=1e-6)
    lengths = [[len(e["chosen_ids"]), len(e["rejected_ids"])] for e in made.eval_dataset]
    assert kept[:, 2:].tolist() == lengths
    n, share, z = 9, float((rewards[:, 0] > rewards[:, 1]).mean()), 1.959964
    roots = np.roots([n + z**2, -(2 * n * share + z**2), n * share**2])
    low, high = sorted(float(root) for root in roots.real)
    assert f"| accuracy | {share:.3f} (95% interval {low:.3f} to {high:.3f}) |" in text
    longer = np.array([chosen > rejected for chosen, rejected in lengths])
    right = rewards[:, 0] > rewards[:, 1]
    if longer.any():
        assert f"{right[longer].mean():.3f} where the chosen answer is longer" in text
    brier = np.mean((1 / (1 + np.exp(-(rewards[:, 1] - rewards[:, 0])))) ** 2)
    assert f"Brier score {brier:.3f}" in text
    data = metadata(text)
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == pytest.approx(share, abs=1e-4)
    log = [line for line in text.splitlines() if re.match(r"\| \**\d", line)]
    assert len(log) == len(evaluations)
    assert [line for line in log if line.startswith("| **")] == [next(x for x in log if f"**{best['step']}**" in x)]


def torch_row(ids):
    import torch

    return torch.tensor([ids])


def test_metadata_is_what_the_hub_reads(trained):
    made, text = trained
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-classification"
    assert card.data.base_model == "lab/base" and card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.datasets == ["lab/pairs"]
    assert {"trl", "grm", "reward-model", "reward-trainer", "mine"} <= set(card.data.tags)
    assert card.data.model_name == "my-run" and card.data.eval_results[0].metric_type == "accuracy"
    (row,) = yaml.safe_load((Path(made.args.output_dir) / ".eval_results" / "grm_hf.yaml").read_text())
    assert row["dataset"]["id"] == "lab/pairs"
    assert row["value"] == metadata(text)["model-index"][0]["results"][0]["metrics"][0]["value"]


def test_the_snippet_prints_what_the_card_says(trained, monkeypatch):
    """The two code blocks as they stand, with the folder's path for the name."""
    made, text = trained
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.S)
    load, score = [code for language, code in blocks if language == "python"][:2]
    shown = next(code for language, code in blocks if language == "text")
    made.save_model()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(load.replace('"my-run"', repr(made.args.output_dir)) + score, {})
    assert printed.getvalue() == shown
    assert len(set(re.findall(r"-?\d+\.\d\d", shown))) == 2


def test_a_tokenizer_without_end_of_turn_gets_the_scorer(tmp_path):
    """What transformers alone would read there is not what training read."""
    tokenizer = bare_tokenizer()
    model = GRMForSequenceClassification.from_base(tiny_lm(vocab_size=len(tokenizer)), head_hidden_size=8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = card_of_folder(tmp_path, "name")
    assert "GRMScorer(model, tokenizer)" in text
    assert "## Training" not in text and "## Results" not in text  # of a folder nothing is known of these
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.S)[:2])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace('"name"', repr(str(tmp_path))), {})
    assert re.fullmatch(r"(-?\d+\.\d\d  .+\n){2}", printed.getvalue())


def test_several_evaluation_sets_are_told_apart(tmp_path):
    made = trainer(
        tmp_path,
        evaluation={"near": pairs(9, seed=4), "far": pairs(7, seed=5)},
        save_strategy="no",
        alpha=0.5,
        eval_strategy="steps",
        eval_steps=1,
    )
    made.train()
    made.create_model_card(dataset_name="lab/pairs")
    text = (tmp_path / "README.md").read_text()
    assert f"Evaluation sets of the run, near: 9 pairs, far: 7 pairs, at step {made.state.global_step}." in text
    results = metadata(text)["model-index"][0]["results"]
    for name, result in zip(("near", "far"), results, strict=True):
        last = [row for row in made.state.log_history if f"eval_{name}_accuracy" in row][-1]
        assert f"| {name}: accuracy | {last[f'eval_{name}_accuracy']:.3f} (95% interval" in text
        assert f"| {name}: loss | {last[f'eval_{name}_loss']:.3f} |" in text
        assert result["dataset"]["name"].endswith(f"({name})")
        assert result["metrics"][0]["value"] == pytest.approx(last[f"eval_{name}_accuracy"], abs=1e-4)
    assert not (tmp_path / ".eval_results").exists()  # which of the two the Hub's data set is, nobody said


def test_writing_a_card_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    """The same bits with cards at every step and without any."""
    one = run(tmp_path / "one")
    one.train()
    monkeypatch.setattr("grm_hf.training.run_card.card_of_run", lambda *args: "")
    other = run(tmp_path / "other")
    other.train()
    assert "Printed when" in (tmp_path / "one" / "README.md").read_text()
    assert not (tmp_path / "other" / "README.md").read_text()
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert a.equal(b), name


def test_a_prediction_in_between_is_not_counted(tmp_path):
    made = run(tmp_path / "run")
    alone = made.evaluate()
    made.predict(made.train_dataset)
    again = made.evaluate()
    assert len(made.eval_pairs["eval", 0]) == 9
    for name in ("eval_accuracy", "eval_margin", "eval_loss"):
        assert again[name] == alone[name]


def test_adapter_cards_and_pefts_own(tmp_path):
    made = run(tmp_path / "run", peft_config=lora())
    made.train()
    made.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        text = (folder / "README.md").read_text()
        assert str(tmp_path) not in text and "library_name: transformers" in text and not edited_lines(text)
        assert "| adapter | LORA, rank 4; reward head in full |" in text and "`adapter/`" in text
    theirs = f"---\nbase_model: {tmp_path}\ntags:\n- base_model:adapter:{tmp_path}\n- lora\n---\nMade on {tmp_path}.\n"
    assert without_paths(theirs) == "---\ntags:\n- lora\n---\n\nMade on its base.\n"
    assert without_paths("---\nbase_model: lab/base\n---\nText\n") == "---\nbase_model: lab/base\n---\nText\n"


def test_a_failing_example_does_not_end_a_run(tmp_path, caplog):
    made = run(tmp_path / "run", max_steps=1)
    made.model.forward = None
    made.create_model_card()
    assert "could not be run" in caplog.text
    assert "Printed when this card was written" not in (tmp_path / "run" / "README.md").read_text()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    made = run(tmp_path / "run", max_steps=1)
    monkeypatch.setattr(made, "is_world_process_zero", lambda: False)
    made.create_model_card()
    assert not (tmp_path / "run" / "README.md").exists()


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.fixture(scope="module")
def two_cards(trained):
    """The same model's card at an early and at a later time."""
    text = trained[1]
    later = text.replace("lab/pairs", "lab/more")
    digests = importlib.import_module("grm_hf.hub.card")
    later = BLOCK.sub(lambda found: digests._block(found[1], found[3].strip("\n")), later)
    data, _, name, body = digests._read(later)
    record = {key: digests._digest(digests._dump(value)) for key, value in data.items()}
    return text, digests._join(data, record, name, body)


def test_an_untouched_card_follows_the_run(two_cards):
    early, later = two_cards
    assert not edited_lines(early) and not edited_lines(later)
    assert merge_cards(early, early) == early
    assert merge_cards(early, later) == later != early


def test_what_a_person_wrote_stays(two_cards):
    early, later = two_cards
    edited = early.replace("- Rewards of different prompts do not compare.", "- Do not compare across prompts.")
    edited = edited.replace("## Usage", "## How to use").replace(
        "<!-- grm_hf training", "My notes.\n\n<!-- grm_hf training"
    )
    edited = re.sub(r"<!-- grm_hf citation.*?<!-- /grm_hf -->", "", edited, flags=re.S)
    edited = edited.replace("pipeline_tag: text-classification\n", "license: mit\n").replace(
        "- mine\n", "- mine\n- ours\n"
    )
    assert {"My notes.", "## How to use", "license: mit"} <= edited_lines(edited)
    merged = merge_cards(edited, later)
    assert "- Do not compare across prompts." in merged and "- Rewards of different prompts" not in merged
    assert "My notes." in merged and "## How to use" in merged and "## Usage" not in merged
    assert "bibtex" not in merged  # a block that was deleted does not come back
    data = metadata(merged)
    assert data["license"] == "mit" and "pipeline_tag" not in data  # so with a field
    assert data["datasets"] == ["lab/more"]  # which nobody touched
    assert set(data["tags"]) == {*metadata(later)["tags"], "ours"}
    assert merge_cards(merged, later) == merged


def test_a_card_of_others_is_kept_whole(two_cards):
    theirs = "---\nlicense: mit\ntags:\n- theirs\n---\n# My model\n\nAll about it.\n"
    merged = merge_cards(theirs, two_cards[0])
    assert merged.index("All about it.") < merged.index("## Usage") and "# my-run" not in merged
    assert metadata(merged)["license"] == "mit" and {"theirs", "grm"} <= set(metadata(merged)["tags"])
    assert merge_cards(merged, two_cards[0]) == merged
    only_data = merge_cards("---\nlicense: mit\n---\n", two_cards[0])
    assert "# my-run" in only_data and metadata(only_data)["license"] == "mit"
    assert merge_cards("", two_cards[0]) == two_cards[0]
    assert merge_cards(theirs, "Mine, written by hand.\n") == theirs
    assert merge_cards(two_cards[0].replace("\n", "\r\n"), two_cards[1]) == two_cards[1]


def test_renaming_and_adding_a_field(two_cards):
    text = rename(two_cards[0], "ann/model")
    assert "my-run" not in text and not edited_lines(text)
    assert text.count("ann/model") >= 5 and metadata(text)["model-index"][0]["name"] == "model"
    assert rename(text, "ann/model") == text and rename("By hand.\n", "x") == "By hand.\n"
    licensed = set_field(text, "license", "mit")
    assert metadata(licensed)["license"] == "mit" and not edited_lines(licensed)
    assert set_field(licensed, "license", "other") == licensed
    deleted = licensed.replace("license: mit\n", "")
    assert set_field(deleted, "license", "mit") == deleted  # taken out by a person
    assert metadata(set_field("By hand.\n", "license", "mit")) == {"license": "mit"}


# ----------------------------------------------------------------------------------------------------------- packaging


def test_the_template_is_in_the_wheel(tmp_path):
    """Built as pip builds it, where the build tool is at hand."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(built).namelist()
    assert "grm_hf/model_cards/template.md" in names and "grm_hf/hub/card.py" in names
