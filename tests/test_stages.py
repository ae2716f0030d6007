"""Several trainings in one YAML, and extrapolated weights (ExPO)."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import chatml_tokenizer, llama_tokenizer, write_rows  # noqa: E402
from trainers import CHATS, TOKENIZER, base, grm, lora, pairs, rows, trainer  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMScorer  # noqa: E402
from grm_hf.cli import main  # noqa: E402
from grm_hf.hub import extrapolate  # noqa: E402
from grm_hf.preferences import load_preferences  # noqa: E402
from grm_hf.scoring import verify  # noqa: E402
from grm_hf.training import GRMRewardTrainer, merge_adapter  # noqa: E402
from grm_hf.training.stages import Stages  # noqa: E402


pytestmark = pytest.mark.trainer


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


# ---------------------------------------------------------------------------------------------------------------- ExPO


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folders of a model and of what a Bradley-Terry run made of it."""
    folder = tmp_path_factory.mktemp("run")
    ends = []
    for name, source, data in (("start", None, pairs(seed=1)), ("end", "start", pairs())):
        model = grm() if source is None else str(folder / source)
        done = trainer(folder / name, model, data, evaluation=pairs(8, seed=2), pair_loss="bt", eval_strategy="steps")
        done.train()
        done.save_model()
        done.create_model_card()
        ends.append(str(folder / name))
    return ends


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The same with an adapter, which the second run trains further."""
    folder = tmp_path_factory.mktemp("adapters")
    grm().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    for name, source in (("start", "base"), ("end", "start")):
        config = lora() if source == "base" else None
        done = trainer(folder / name, str(folder / source), peft_config=config)
        done.train()
        done.save_model()
    return [str(folder / "start"), str(folder / "end")]


def test_a_of_0_and_of_minus_1_are_the_two_models_to_the_last_bit(run, tmp_path):
    start, end = map(weights, run)
    assert not equal(start, end)
    extrapolate(*run, tmp_path / "end", 0)
    extrapolate(*run, tmp_path / "start", -1)
    assert equal(weights(tmp_path / "end"), end) and equal(weights(tmp_path / "start"), start)
    assert GRMScorer(tmp_path / "start").score(CHATS) == GRMScorer(run[0]).score(CHATS)


@pytest.mark.parametrize("a", [0.3, 1.5, -0.5])
def test_every_weight_is_extrapolated(run, tmp_path, a):
    start, end = ({name: value.double() for name, value in weights(folder).items()} for folder in run)
    done = extrapolate(*run, tmp_path / "out", a)
    assert (done.a, done.accuracies) == (a, {})
    for name, value in weights(tmp_path / "out").items():
        torch.testing.assert_close(value.double(), end[name] + a * (end[name] - start[name]), rtol=1e-6, atol=1e-7)
    assert equal(weights(tmp_path / "out"), {k: v for k, v in done.model.state_dict().items() if k in start})


def test_a_model_in_bfloat16_is_computed_in_float32(run, tmp_path):
    for name, folder in zip(("start", "end"), run, strict=True):
        model = GRMForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    start, end = weights(tmp_path / "start"), weights(tmp_path / "end")
    extrapolate(tmp_path / "start", tmp_path / "end", tmp_path / "out", 0.7)
    found = weights(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {torch.bfloat16, torch.float32}  # the head stays in float32
    for name, value in found.items():
        exact = end[name].double() + 0.7 * (end[name].double() - start[name].double())
        rounding = 2**-8 if value.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(value.double(), exact, rtol=rounding, atol=1e-7)
    verify(tmp_path / "out")


def test_tied_weights_are_extrapolated_once(tmp_path):
    ends = []
    for seed, name in enumerate(("start", "end")):
        model = grm(seed, tie_word_embeddings=True)
        assert model.lm.lm_head.weight is model.lm.get_input_embeddings().weight
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
        ends.append({name: value.detach().double() for name, value in model.state_dict().items()})
    found = extrapolate(tmp_path / "start", tmp_path / "end", tmp_path / "out", 0.5).model
    assert found.lm.lm_head.weight is found.lm.get_input_embeddings().weight
    for name, value in found.state_dict().items():
        exact = 1.5 * ends[1][name] - 0.5 * ends[0][name]
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7, msg=name)


def test_adapters_are_merged_first(adapters, tmp_path):
    whole = [tmp_path / "merged-start", tmp_path / "merged-end"]
    for adapter, folder in zip(adapters, whole, strict=True):
        merge_adapter(adapter, folder, dtype=torch.float32)
    extrapolate(*adapters, tmp_path / "end", 0.0)
    extrapolate(*adapters, tmp_path / "further", 0.5)
    extrapolate(*whole, tmp_path / "expected", 0.5)
    assert equal(weights(tmp_path / "end"), weights(whole[1]))
    assert equal(weights(tmp_path / "further"), weights(tmp_path / "expected"))
    start, end = map(weights, whole)
    delta = {name: end[name].double() + 0.5 * (end[name].double() - start[name].double()) for name in start}
    for name, value in weights(tmp_path / "further").items():
        torch.testing.assert_close(value.double(), delta[name], rtol=1e-6, atol=1e-7)
    verify(tmp_path / "further")


def test_the_folder_is_complete(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["expo", *run, out, "--a", "0.5"]) == 0
    assert capsys.readouterr().out == f"extrapolated with a = 0.5: {out}\n"
    assert main(["verify", out]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Weights: `theta_1 + 0.5 * (theta_1 - theta_0)` (ExPO" in card
    assert f"Loss: `{re.search('Loss: `(.*)`', Path(run[1], 'README.md').read_text())[1]}`" in card
    assert "| theta_0, where the run began | start |" in card and "expo" in card.split("---")[1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"]) == (0.0, 1.0)  # those of theta_1 say nothing of this model
    assert GRMForSequenceClassification.from_pretrained(run[1]).config.reward_mean != 0.0


def test_the_factor_is_chosen_on_validation_pairs(run, tmp_path, capsys):
    factors, data = [-1.0, -0.5, 0.0, 0.5, 3.0], rows(40, seed=7)
    expected = {}
    for i, a in enumerate(factors):
        done = extrapolate(*run, tmp_path / str(i), a)
        rewards = np.array(GRMScorer(done.model, TOKENIZER).score_pairs(data))
        margins = rewards[:, 0] - rewards[:, 1]
        expected[a] = float(np.mean((margins > 0) + 0.5 * (margins == 0)))
    assert len(set(expected.values())) > 1
    file = write_rows(tmp_path / "validation.jsonl", data)
    factor_arguments = ["--a", *map(str, factors), "--data", file]
    assert main(["expo", *run, str(tmp_path / "out"), *factor_arguments]) == 0
    best = min(factors, key=lambda a: (-expected[a], abs(a)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"a = {a:g}: accuracy {expected[a]:.4f}" for a in factors]
    assert lines[-1] == f"extrapolated with a = {best:g}: {tmp_path / 'out'}"
    assert equal(weights(tmp_path / "out"), weights(tmp_path / str(factors.index(best))))
    model = GRMForSequenceClassification.from_pretrained(tmp_path / "out")
    rewards = np.array(GRMScorer(model, TOKENIZER).score_pairs(data))
    assert model.config.reward_mean == pytest.approx(rewards.mean(), rel=1e-4)
    assert model.config.reward_std == pytest.approx(rewards.std(), rel=1e-4)
    assert f"| accuracy with a = 3 | {expected[3.0]:.4f} |" in (tmp_path / "out" / "README.md").read_text()


def test_labels_of_validation_pairs_say_which_response_is_better(run, tmp_path):
    data = rows(40, seed=7)
    expected = extrapolate(*run, tmp_path / "plain", -1.0, data).accuracies[-1.0]
    assert 0 < expected < 1
    turned = [
        {**row, "label": 0.2, "chosen": row["rejected"], "rejected": row["chosen"]} if i % 2 else {**row, "label": 0.9}
        for i, row in enumerate(data)
    ]
    ties = [{**row, "label": 0.5} for row in rows(5, seed=8)]
    assert extrapolate(*run, tmp_path / "labels", -1.0, turned + ties).accuracies[-1.0] == expected
    with pytest.raises(ValueError, match="every validation pair is a tie"):
        extrapolate(*run, tmp_path / "ties", 0.5, ties)
    with pytest.raises(ValueError, match="validation dataset, row 1: `label` is 2"):
        extrapolate(*run, tmp_path / "wrong", 0.5, [data[0], {**data[1], "label": 2}])


def test_a_split_without_data_is_refused(run, tmp_path, capsys):
    assert main(["expo", *run, str(tmp_path / "out"), "--a", "0.5", "--split", "test"]) == 1
    assert "--split is of --data, which is missing" in capsys.readouterr().err


def other_model(folder, **changes):
    bos_policy = changes.pop("bos_policy", "single")
    body = base(**changes.pop("base", {}))
    model = GRMForSequenceClassification.from_base(body, **{"head_hidden_size": 8, **changes})
    model.config.bos_policy = bos_policy
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_type": "linear"}, r"are no two models of one architecture: `head_type` is 'linear' and 'mlp'\."),
        ({"head_hidden_size": 16}, r"`head_hidden_size` is 16 and 8\."),
        ({"attribute_names": ["helpfulness"]}, r"`attribute_names` is \['helpfulness'\] and None\."),
        ({"bos_policy": "double"}, r"`bos_policy` is 'double' and 'single'\."),
        ({"base": {"num_hidden_layers": 3}}, r"`text_config.num_hidden_layers` is 3 and 2\."),
    ],
)
def test_models_of_two_architectures_are_refused(run, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        extrapolate(other_model(tmp_path / "other", **changes), run[1], tmp_path / "out", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_other_tokenizers_and_missing_ones_are_refused(run, tmp_path):
    for name, tokenizer in (("template", chatml_tokenizer()), ("other", llama_tokenizer())):
        shutil.copytree(run[0], tmp_path / name)
        if name == "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(tokenizer.chat_template)
        with pytest.raises(ValueError, match="the tokenizers of .* differ"):
            extrapolate(tmp_path / name, run[1], tmp_path / "out", 0.5)
    shutil.copytree(run[1], tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="bare' has no tokenizer"):
        extrapolate(run[0], tmp_path / "bare", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("a", "data", "words"),
    [
        ([], None, "must be a finite number"),
        (float("nan"), None, "must be a finite number"),
        ([0.1, 0.2], None, "give validation pairs"),
        (0.1, [], "there are no validation pairs"),
    ],
)
def test_wrong_factors_and_pairs(run, tmp_path, a, data, words):
    with pytest.raises(ValueError, match=words):
        extrapolate(*run, tmp_path / "out", a, data)


# -------------------------------------------------------------------------------------------------------------- stages


def write_recipe(folder, first=None, second=None, expo=None, **shared):
    """The YAML of two stages and ExPO at toy size; changes go to the place that their name says."""
    if not (folder / "base").is_dir():
        base().save_pretrained(folder / "base")
        TOKENIZER.save_pretrained(folder / "base")
        margins = [float(i % 3 + 1) for i in range(16)]
        Dataset.from_list(rows(16)).add_column("margin", margins).to_parquet(folder / "pairs.parquet")
        write_rows(folder / "validation.jsonl", rows(12, seed=3))
    content = {
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "dataset_name": str(folder / "pairs.parquet"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "max_length": 64,
        "save_steps": 1,
        **shared,
        "stages": [
            {"name": "first", "pair_loss": "bt", "regularizer": "none", **(first or {})},
            {"name": "second", "pair_loss": "scaled", **(second or {})},
        ],
        "expo": {"a": [0.0, 0.5, 1.0], "dataset_name": str(folder / "validation.jsonl"), **(expo or {})},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))  # JSON is YAML
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    return partial(write_recipe, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output folder of a recipe that was run at once."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", "--config", write_recipe(folder)]) == 0
    return folder / "out"


def test_a_recipe_from_start_to_end(recipe, tmp_path, capsys):
    assert main(["train", "--config", recipe()]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^stage .*", out, re.M) == [
        f"stage {name}: {tmp_path / 'out' / name}" for name in ("first", "second")
    ]
    assert re.search(rf"^extrapolated with a = \S+: {tmp_path / 'out' / 'expo'}$", out, re.M)
    for name in ("first", "second", "expo"):
        assert main(["verify", str(tmp_path / "out" / name)]) == 0
    assert "-margin * log sigmoid(r_c - r_r)" in (tmp_path / "out" / "expo" / "README.md").read_text()
    # Each stage's own YAML is one that `grm train` takes, and gives the same weights.
    expected = weights(tmp_path / "out" / "second")
    assert (
        main(["train", "--config", str(tmp_path / "out" / "second.yaml"), "--output_dir", str(tmp_path / "again")])
        == 0
    )
    assert equal(weights(tmp_path / "again"), expected)
    # Run again, it has nothing left to do.
    capsys.readouterr()
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert capsys.readouterr().out == f"all stages are done: {tmp_path / 'out'}\n"


def test_a_stage_begins_with_the_rewards_of_the_stage_before(recipe, tmp_path, monkeypatch):
    """And where no step changes anything, it ends with them: the head, too."""
    seen = {}
    train = GRMRewardTrainer.train

    def score_and_train(self, *args, **kwargs):
        seen[Path(self.args.output_dir).name] = GRMScorer(self.model, self.processing_class).score(CHATS)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(GRMRewardTrainer, "train", score_and_train)
    assert main(["train", "--config", recipe(second={"learning_rate": 0.0}, expo={"a": 0.5})]) == 0
    assert seen["second"] == GRMScorer(str(tmp_path / "out" / "first")).score(CHATS) != seen["first"]
    ends = [weights(tmp_path / "out" / name) for name in ("first", "second", "expo")]
    assert equal(*ends[:2]) and equal(*ends[1:])


LEFT = {
    "within the first": ["first", "second"],
    "before the second": ["second"],
    "within the second": ["second"],
    "before expo": [],
}


@pytest.mark.parametrize("at", LEFT)
def test_an_interrupted_recipe_goes_on(recipe, whole, tmp_path, monkeypatch, capsys, at):
    """Wherever it was interrupted: what is finished is not run again, and the weights are those of a whole run."""
    config = recipe()
    train, step = GRMRewardTrainer.train, GRMRewardTrainer.training_step

    def place(trainer):
        return Path(trainer.args.output_dir).name

    def interrupted_before(self, *args, **kwargs):
        if at == f"before the {place(self)}":
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    def interrupted_within(self, *args, **kwargs):
        if at == f"within the {place(self)}" and self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GRMRewardTrainer, "train", interrupted_before)
        patch.setattr(GRMRewardTrainer, "training_step", interrupted_within)
        if at == "before expo":
            patch.setattr("grm_hf.hub.extrapolate", interrupted)
        capsys.readouterr()
        assert main(["train", "--config", config]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            "grm train: interrupted. To go on where this stopped, run the same command again."
        )
    begun = []

    def train_and_note(self, resume_from_checkpoint=None, *args, **kwargs):
        begun.append((place(self), Path(resume_from_checkpoint or "").name))
        return train(self, resume_from_checkpoint, *args, **kwargs)

    monkeypatch.setattr(GRMRewardTrainer, "train", train_and_note)
    assert main(["train", "--config", config]) == 0
    assert [name for name, _ in begun] == LEFT[at]
    if at.startswith("within"):
        assert begun[0][1] == "checkpoint-1"
    assert list(json.loads((tmp_path / "out" / "stages.json").read_text())) == ["first", "second", "expo"]
    for name in ("first", "second", "expo"):
        assert equal(weights(tmp_path / "out" / name), weights(whole / name))


def test_the_adapter_of_a_stage_is_trained_further(recipe, tmp_path, capsys):
    adapter = {"use_peft": True, "lora_r": 4, "lora_task_type": "SEQ_CLS", "lora_target_modules": "all-linear"}
    assert main(["train", "--config", recipe(**adapter)]) == 0
    out = capsys.readouterr().out
    note = "the adapter of the stage before is trained further; `use_peft` and `lora_*` are its own"
    assert f"stage second: {tmp_path / 'out' / 'second'} ({note})" in out and out.count(note) == 1
    for name in ("first", "second"):
        assert (tmp_path / "out" / name / "adapter_config.json").is_file()
    merge_adapter(tmp_path / "out" / "second", tmp_path / "merged", dtype=torch.float32)
    extrapolate(tmp_path / "out" / "first", tmp_path / "out" / "second", tmp_path / "end", 0)
    assert equal(weights(tmp_path / "end"), weights(tmp_path / "merged"))
    assert main(["verify", str(tmp_path / "out" / "expo")]) == 0


def test_other_settings_than_those_of_the_folder_are_refused(recipe, tmp_path, monkeypatch, capsys):
    assert main(["train", "--config", recipe(expo={"a": 0.5})]) == 0
    for changes, words in (
        (
            {"first": {"pair_loss": "scaled"}},
            "stage 'first' was run in '{}/first' with pair_loss='bt', and the YAML now",
        ),
        (
            {"second": {"alpha": 0.5}},
            "stage 'second' was run in '{}/second' with alpha=None, and the YAML now has alpha=0.5.",
        ),
        ({"expo": {"a": 0.7}}, "stage 'expo' was run in '{}/expo' with a=0.5, and the YAML now has a=0.7."),
    ):
        capsys.readouterr()
        assert main(["train", "--config", recipe(**{"expo": {"a": 0.5}, **changes})]) == 1
        assert words.format(tmp_path / "out") in capsys.readouterr().err
    # Of an interrupted stage, too, once there is a checkpoint.
    (tmp_path / "out" / "stages.json").unlink()
    assert main(["train", "--config", recipe(first={"pair_loss": "scaled"})]) == 1
    assert "with pair_loss='bt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_dir": None}, "`output_dir` is missing"),
        ({"first": {"name": "second"}}, "two stages have the same name"),
        ({"first": {"name": "expo"}}, "a stage has the name 'expo'"),
        ({"first": {"name": "a/b"}}, "a stage has the name 'a/b'"),
        ({"first": {"name": "stages.json"}}, "a stage has the name 'stages.json'"),
        ({"first": {"name": "second.yaml"}}, "a stage has the name 'second.yaml'"),
        ({"push_to_hub": True}, "`push_to_hub` cannot be set in a recipe, whose folders are several models"),
        ({"resume_from_checkpoint": True}, "`resume_from_checkpoint` cannot be set: a recipe goes on by itself"),
        ({"first": {"output_dir": "x"}}, "stage 'first': `output_dir` cannot be set for a stage"),
        ({"expo": {"b": 1}}, "must be a mapping with `a`, and no keys but a, dataset_name"),
        ({"expo": {"a": "much"}}, "`a` of `expo` is 'much'; it must be one number, or a list."),
        ({"expo": {"a": 0.5, "dataset_name": None, "dataset_config": "labels"}}, "and no `dataset_name`, which it is"),
        ({"expo": {"dataset_name": None}}, "to choose one it needs `dataset_name`"),
        ({"first": {"learning_speed": 1}}, "learning_speed"),
        ({"model_name_or_path": None}, "no model"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(recipe, tmp_path, capsys, change, words):
    content = json.loads(Path(recipe(**change)).read_text())
    content["expo"] = {key: value for key, value in content["expo"].items() if value is not None}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 1
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and err.strip().splitlines()[-1].startswith("grm train: ")


def test_forms_of_a_recipe_that_are_none(recipe, tmp_path, capsys):
    path = tmp_path / "other.yaml"
    for stages, words in ((["first"], "must be a list of mappings"), ([], "must be a list of mappings")):
        path.write_text(json.dumps({"output_dir": "out", "stages": stages}))
        with pytest.raises(ValueError, match=words):
            Stages(str(path))
    path.write_text(json.dumps({"output_dir": "out", "stages": [{"name": "first"}], "expo": {"a": 1}}))
    with pytest.raises(ValueError, match="there is one stage"):
        Stages(str(path))
    path.write_text("{output_dir: out, stages: [{name: a}, {name: b}], expo: {a: .nan}}")
    with pytest.raises(ValueError, match="`a` of `expo` is nan; it must be one number, or a list"):
        Stages(str(path))
    path.write_text("stages: [\n")
    assert main(["train", "--config", str(path)]) == 1
    assert "other.yaml is no YAML: while parsing" in capsys.readouterr().err
    assert main(["train", "--config"]) == 1
    assert "--config needs a file" in capsys.readouterr().err
    path.write_text("{output_dir: out, stages: []}")
    assert main(["train", f"--config={path}"]) == 1
    assert "`stages` must be a list of mappings" in capsys.readouterr().err
    assert main(["train", "--config", recipe(), "--max_steps", "1"]) == 1
    assert "no option is taken beside --config" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- regression, then preference


def helpsteer2(folder):
    """A copy of the repository with toy rows: the ratings of both splits, and the preferences."""
    (folder / "preference").mkdir(parents=True)
    ratings = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
    preferences = []
    for split, count, seed in (("train", 12, 0), ("validation", 6, 1)):
        rated = []
        for i, row in enumerate(rows(count, seed)):
            prompt, *responses = (row[side][0]["content"] for side in ("prompt", "chosen", "rejected"))
            for response, helpfulness in zip(responses, (3 + i % 2, i % 3), strict=True):
                rated.append({"prompt": prompt, "response": response, "helpfulness": helpfulness, **ratings})
            compared = dict(zip(("response_1", "response_2"), responses, strict=True), preference_strength=-1 - i % 3)
            preferences.append({"split": split.replace("idation", ""), "prompt": prompt, **compared})
        write_rows(folder / f"{split}.jsonl", rated)
    write_rows(folder / "preference" / "preference.jsonl", preferences)
    return folder


def test_the_recipe_of_helpsteer2_preference(tmp_path, capsys):
    """The file in `examples/recipes`, on toy rows in the official fields."""
    file = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "helpsteer2_preference.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert "--config examples/recipes/helpsteer2_preference.yaml" in file.read_text(encoding="utf-8")
    base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    data = f"nvidia/HelpSteer2={helpsteer2(tmp_path / 'HelpSteer2')}"
    content |= {"model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "out")}
    content |= {
        "dataset_name": data,
        "max_steps": 3,
        "save_steps": 1,
        "eval_steps": 2,
        "warmup_steps": 0,
        "bf16": False,
    }
    content |= {"learning_rate": 1.0e-2, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
    content["expo"]["dataset_name"] = data
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert "24 kept as rated completions" in out and len(re.findall(r"^a = \S+: accuracy", out, re.M)) == 7
    for name in ("regression", "preference", "expo"):
        folder = str(tmp_path / "out" / name)
        assert main(["verify", folder]) == 0
        model = GRMForSequenceClassification.from_pretrained(folder)
        inputs = TOKENIZER.apply_chat_template(CHATS[0], return_tensors="pt", return_dict=True)
        with torch.no_grad():
            found = model(**inputs)
        assert torch.equal(found.logits, found.attributes)  # the reward is the helpfulness
    assert "helpfulness" in (tmp_path / "out" / "regression" / "README.md").read_text()
    card = (tmp_path / "out" / "expo" / "README.md").read_text()
    assert "datasets/nvidia/HelpSteer2" in card and "-margin * log sigmoid(r_c - r_r)" in card


def test_the_regression_is_least_squares_and_the_preference_begins_with_it(tmp_path):
    """One step of plain gradient descent on the head, against the gradient of the mean squared error by hand."""
    base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    data = f"nvidia/HelpSteer2={helpsteer2(tmp_path / 'HelpSteer2')}"
    content = {
        "model_name_or_path": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "out"),
        "dataset_name": data,
        "max_steps": 1,
        "per_device_train_batch_size": 24,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "regularizer": "none",
        "freeze_backbone": True,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "stages": [
            {
                "name": "regression",
                "dataset_config": "ratings",
                "model_init_kwargs": {
                    "head_type": "linear",
                    "attribute_names": ["helpfulness"],
                    "attribute_weights": [1.0],
                },
            },
            {"name": "preference", "dataset_config": "preference", "pair_loss": "scaled", "learning_rate": 0.0},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    begun = []
    save = GRMRewardTrainer.train

    def train(self, *args, **kwargs):
        begun.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRMRewardTrainer, "train", train)
        assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    model = GRMForSequenceClassification.from_pretrained(tmp_path / "out" / "regression")
    (name,) = (name for name in begun[0] if name.startswith("score."))
    after = model.state_dict()[name].clone()
    model.load_state_dict(begun[0])
    rated = load_preferences("nvidia/HelpSteer2", "ratings", path=tmp_path / "HelpSteer2")
    errors = []
    for row in rated:
        inputs = TOKENIZER.apply_chat_template(
            row["prompt"] + row["completion"], return_tensors="pt", return_dict=True
        )
        errors.append((model(**inputs).logits.squeeze() - row["helpfulness"]) ** 2)
    torch.stack(errors).mean().backward()
    weight = dict(model.named_parameters())[name]
    torch.testing.assert_close(after, begun[0][name] - 0.1 * weight.grad, rtol=1e-4, atol=1e-6)
    assert not torch.equal(after, begun[0][name])
    assert torch.equal(begun[1][name], after)
    assert equal(weights(tmp_path / "out" / "regression"), weights(tmp_path / "out" / "preference"))


def test_the_recipe_of_the_docs_is_that_of_the_file():
    """The page has the same stages, in fewer lines."""
    root = Path(__file__).resolve().parents[1]
    (text,) = re.findall(r"```yaml\n(.*?)```", (root / "docs" / "staged.md").read_text(encoding="utf-8"), re.DOTALL)
    page = yaml.safe_load(text)
    file = yaml.safe_load((root / "examples" / "recipes" / "helpsteer2_preference.yaml").read_text(encoding="utf-8"))
    assert page["stages"] == file["stages"]
    assert page["expo"] | {"a": None} == file["expo"] | {"a": None}
    assert {key: file[key] for key in page if key not in ("stages", "expo", "output_dir")} == {
        key: page[key] for key in page if key not in ("stages", "expo", "output_dir")
    }
