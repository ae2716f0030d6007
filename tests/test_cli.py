"""The `grm` command: what it prints and writes, how it ends, and that a user's mistake is one line."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402
from tiny import read_rows, write_rows  # noqa: E402
from trainers import TOKENIZER, base, grm, rows  # noqa: E402

from grm_hf import GRMConfig, GRMForSequenceClassification, __version__  # noqa: E402
from grm_hf.cli import main  # noqa: E402
from grm_hf.scoring import GRMScorer  # noqa: E402


pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = grm()
    model.config.max_sequence_length = 64
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


CHATS = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], "id": "a"},
    {"prompt": "one two", "response": "three"},
    {"text": "four five"},
    {"prompt": "x" * 100, "response": "y"},
]


# --------------------------------------------------------------------------------------------------------------- train


def yaml(tmp_path, base_folder, data, **more):
    settings = {
        "model_name_or_path": base_folder,
        "dataset_name": data,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1.0e-3,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "max_length": 64,
        **more,
    }
    path = tmp_path / "reward.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    return str(path)


def test_train_from_a_trl_reward_yaml(tmp_path, base_folder, capsys):
    """The YAML holds only what `trl reward` knows; our settings come as options."""
    data = str(tmp_path / "pairs.parquet")
    Dataset.from_list(rows(12)).to_parquet(data)
    config = yaml(tmp_path, base_folder, data)
    from trl import DatasetMixtureConfig, ModelConfig, RewardConfig, ScriptArguments, TrlParser

    trl = TrlParser((ScriptArguments, RewardConfig, ModelConfig, DatasetMixtureConfig))
    assert trl.parse_args_and_config(["--config", config])[1].max_length == 64  # TRL itself takes it
    assert main(["train", "--config", config, "--regularizer", "dpo", "--alpha", "0.05"]) == 0
    out = capsys.readouterr().out
    folder = str(tmp_path / "out")
    assert "train: 12 rows, 0 dropped, " in out and "truncated" in out
    assert "accuracy of the reward head" in out and "accuracy of the LM head" in out
    load = next(line for line in out.splitlines() if line.startswith("load:"))
    assert load == f"load:  AutoModelForSequenceClassification.from_pretrained({folder!r}, trust_remote_code=True)"
    model = GRMForSequenceClassification.from_pretrained(folder)
    assert model.config.max_sequence_length == 64
    assert GRMScorer(folder).score([CHATS[0]["messages"]])[0] == pytest.approx(
        GRMScorer(model, TOKENIZER).score([CHATS[0]["messages"]])[0]
    )


@pytest.mark.parametrize("head_type", ["mlp", "bnrm"])
def test_train_with_an_adapter_then_merge(tmp_path, base_folder, capsys, head_type):
    data = write_rows(tmp_path / "pairs.jsonl", rows(8))
    lora = {"use_peft": True, "lora_r": 4, "lora_task_type": "SEQ_CLS", "lora_target_modules": "all-linear"}
    config = yaml(tmp_path, base_folder, data, model_init_kwargs={"head_type": head_type}, **lora)
    assert main(["train", "--config", config]) == 0
    merged = str(tmp_path / "merged")
    assert main(["merge", str(tmp_path / "out"), merged]) == 0
    assert f"merged model: {merged}" in capsys.readouterr().out
    assert GRMConfig.from_pretrained(merged).head_type == head_type
    chat = [CHATS[0]["messages"]]
    assert GRMScorer(merged).score(chat)[0] == pytest.approx(GRMScorer(str(tmp_path / "out")).score(chat)[0], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset_name": "nowhere.parquet"}, "There is no file nowhere.parquet."),
        ({"dataset_train_split": "train", "eval_strategy": "steps", "eval_steps": 1}, "the data has no split 'test'"),
        ({"regularizer": "kl"}, "must be one of"),
        ({"alpha": 2.0}, "must be in [0, 1]"),
        ({"model_name_or_path": None}, "no model"),
    ],
)
def test_train_mistakes_are_one_line(tmp_path, base_folder, capsys, change, words):
    data = write_rows(tmp_path / "pairs.jsonl", rows(8))
    config = yaml(tmp_path, base_folder, data, **change)
    assert main(["train", "--config", config]) == 1
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and err.strip().splitlines()[-1].startswith("grm train: ")


def test_an_unknown_setting_is_named(tmp_path, base_folder, capsys):
    config = yaml(tmp_path, base_folder, write_rows(tmp_path / "pairs.jsonl", rows(8)))
    assert main(["train", "--config", config, "--alhpa", "0.1"]) == 1
    assert "--alhpa" in capsys.readouterr().err
    config = yaml(tmp_path, base_folder, write_rows(tmp_path / "pairs.jsonl", rows(8)), alhpa=0.1)
    assert main(["train", "--config", config]) == 1
    assert "alhpa" in capsys.readouterr().err


def test_a_bad_row_is_named_before_training(tmp_path, base_folder, capsys):
    data = rows(8)
    data[5]["rejected"] = data[5]["chosen"]
    config = yaml(tmp_path, base_folder, write_rows(tmp_path / "pairs.jsonl", data))
    assert main(["train", "--config", config]) == 1
    assert "row 5" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------- compare


def test_compare_says_who_wins_with_what_probability(model_folder, capsys):
    scorer = GRMScorer(model_folder)
    a, b = (scorer.score([{"prompt": "one", "response": answer}])[0] for answer in ("two", "three four"))
    probability = 1 / (1 + math.exp(b - a))
    assert main(["compare", "--model", model_folder, "one", "two", "three four", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(
        {"reward_a": a, "reward_b": b, "probability_a": probability}, rel=1e-4
    )
    assert main(["compare", "--model", model_folder, "one", "two", "three four"]) == 0
    winner, chance = ("A", probability) if a > b else ("B", 1 - probability)
    assert capsys.readouterr().out.startswith(f"{winner} wins with probability {chance:.3f}")
    assert main(["compare", "--model", model_folder, "one", "two", "two"]) == 0
    assert capsys.readouterr().out.startswith("Tie")


def test_without_a_model_it_is_that_of_the_project(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("grm_hf.base.published", lambda: Path(model_folder))
    for command in (["compare", "one", "two", "three four"], ["best-of-n", "one", "two", "three four"]):
        assert main(command) == 0
        ours = capsys.readouterr().out
        assert main([*command, "--model", model_folder]) == 0
        assert capsys.readouterr().out == ours


# ------------------------------------------------------------------------------------------------------------ the rest


def test_usage_errors_end_with_two():
    compare, best = ["compare", "--model", "x", "a"], ["best-of-n"]
    for wrong in ([], ["fly"], ["score"], compare, best, ["verify"], ["merge", "a", "b", "c"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse of other versions wraps lines otherwise")
def test_the_page_of_the_command_line_is_what_help_says(monkeypatch):
    docs = Path(__file__).resolve().parents[1] / "docs"
    monkeypatch.setenv("COLUMNS", "")
    code = runpy.run_path(str(docs / "cli.py"))
    assert (docs / "cli.md").read_text(encoding="utf-8") == code["page"](), "run `python docs/cli.py`"


def test_an_error_in_training_has_its_traceback_and_the_checkpoint(tmp_path, base_folder, capsys, monkeypatch):
    from grm_hf import GRMRewardTrainer

    pairs = write_rows(tmp_path / "pairs.jsonl", rows(8))
    config = yaml(tmp_path, base_folder, pairs, save_strategy="steps", save_steps=1)
    monkeypatch.chdir(tmp_path)  # `make demo` leaves a runs/demo/model in the project's folder
    right = GRMRewardTrainer.training_step

    def fails(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise ValueError("deep inside")
        return right(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GRMRewardTrainer, "training_step", fails)
        assert main(["train", "--config", config]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ValueError: deep inside" in err
    more = err.strip().splitlines()[-1].removeprefix("grm train: To go on from the last checkpoint, add: ").split()
    assert more == ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    assert main(["train", "--config", config, *more]) == 0
    assert main(["train", "--config", config, "--model_name_or_path", "runs/demo/model"]) == 1
    assert "There is no folder 'runs/demo/model'." in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and __version__ in capsys.readouterr().out


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "grm_hf.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("train", "score", "compare", "best-of-n", "verify", "merge", "demo"):
        assert command in done.stdout


# -------------------------------------------------------------------------------------------- transformed and combined


def saved(folder, seed):
    model = grm(seed)
    model.config.reward_mean, model.config.reward_std = 0.1 * seed, 0.5
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_score_transforms_and_resumes(tmp_path, capsys):
    model, output = saved(tmp_path / "model", 1), tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "chats.jsonl", CHATS[:3])
    raw = GRMScorer(model).score([CHATS[0]["messages"], CHATS[1], CHATS[2]["text"]])
    arguments = ["score", source, "--model", model, "--output", str(output), "--transform", "log_sigmoid"]
    arguments += ["--reference", "0.25"]
    assert main(arguments) == 0
    by_hand = [-math.log1p(math.exp(0.25 - reward)) for reward in raw]
    assert [line["score"] for line in read_rows(output.read_text())] == pytest.approx(by_hand, abs=1e-6)

    output.write_text("".join(output.read_text().splitlines(keepends=True)[:2]))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "2 of 3 rows are done already" in capsys.readouterr().err
    assert main([*arguments[:-3], "standardize"]) == 1  # another transformation: other scores
    assert "holds other results" in capsys.readouterr().err
    assert main(["score", source, "--model", model, "--transform", "length_residual"]) == 1
    assert "all rewards at once" in capsys.readouterr().err


def test_score_takes_an_ensemble(tmp_path, capsys):
    models = [saved(tmp_path / str(seed), seed) for seed in (1, 2)]
    source = write_rows(tmp_path / "chats.jsonl", CHATS[:3])
    chats = [CHATS[0]["messages"], CHATS[1], CHATS[2]["text"]]
    apart = [[(r - 0.1 * seed) / 0.5 for r in GRMScorer(m).score(chats)] for seed, m in enumerate(models, 1)]
    output = str(tmp_path / "out.jsonl")
    options = [option for model in models for option in ("--model", model)]
    for _ in range(2):  # the second time everything is done
        assert main(["score", source, *options, "--ensemble", "min", "--output", output]) == 0
        found = [line["score"] for line in read_rows((tmp_path / "out.jsonl").read_text())]
        assert found == pytest.approx([min(pair) for pair in zip(*apart, strict=True)], abs=1e-5)
    assert main(["score", source, "--model", models[0], "--model", models[0]]) == 1
    assert "identical" in capsys.readouterr().err
    assert main(["score", source, *options[:2], "--ensemble", "min"]) == 1
    assert "--ensemble min combines several models, and there is one --model" in capsys.readouterr().err
