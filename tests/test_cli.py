"""The `grm` command: what it prints and writes, how it ends, and that a user's mistake is one line."""

import io
import json
import math
import subprocess
import sys

import pytest
import torch
from tiny import chatml_tokenizer


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402
from test_trainer import TOKENIZER, base, grm, rows  # noqa: E402

from grm_hf import GRMForSequenceClassification, __version__  # noqa: E402
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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


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
    assert "accuracy of the reward head" in out and "accuracy of the language-model head" in out
    load = next(line for line in out.splitlines() if line.startswith("load:"))
    assert load == f"load:  AutoModelForSequenceClassification.from_pretrained({folder!r}, trust_remote_code=True)"
    model = GRMForSequenceClassification.from_pretrained(folder)
    assert model.config.max_sequence_length == 64
    assert GRMScorer(folder).score([CHATS[0]["messages"]])[0] == pytest.approx(
        GRMScorer(model, TOKENIZER).score([CHATS[0]["messages"]])[0]
    )


def test_train_with_an_adapter_then_merge(tmp_path, base_folder, capsys):
    data = write(tmp_path / "pairs.jsonl", rows(8))
    config = yaml(
        tmp_path, base_folder, data, use_peft=True, lora_r=4, lora_task_type="SEQ_CLS", lora_target_modules="all-linear"
    )
    assert main(["train", "--config", config]) == 0
    merged = str(tmp_path / "merged")
    assert main(["merge", str(tmp_path / "out"), merged]) == 0
    assert f"merged model: {merged}" in capsys.readouterr().out
    chat = [CHATS[0]["messages"]]
    assert GRMScorer(merged).score(chat)[0] == pytest.approx(GRMScorer(str(tmp_path / "out")).score(chat)[0], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset_name": "nowhere.parquet"}, "no such file: nowhere.parquet"),
        ({"dataset_train_split": "train", "eval_strategy": "steps", "eval_steps": 1}, "the data has no split 'test'"),
        ({"regularizer": "kl"}, "must be one of"),
        ({"alpha": 2.0}, "must be in [0, 1]"),
        ({"model_name_or_path": None}, "no model"),
    ],
)
def test_train_mistakes_are_one_line(tmp_path, base_folder, capsys, change, words):
    data = write(tmp_path / "pairs.jsonl", rows(8))
    config = yaml(tmp_path, base_folder, data, **change)
    assert main(["train", "--config", config]) == 1
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and err.strip().splitlines()[-1].startswith("grm train: ")


def test_an_unknown_setting_is_named(tmp_path, base_folder, capsys):
    config = yaml(tmp_path, base_folder, write(tmp_path / "pairs.jsonl", rows(8)))
    assert main(["train", "--config", config, "--alhpa", "0.1"]) == 1
    assert "--alhpa" in capsys.readouterr().err
    config = yaml(tmp_path, base_folder, write(tmp_path / "pairs.jsonl", rows(8)), alhpa=0.1)
    assert main(["train", "--config", config]) == 1
    assert "alhpa" in capsys.readouterr().err


def test_a_bad_row_is_named_before_training(tmp_path, base_folder, capsys):
    data = rows(8)
    data[5]["rejected"] = data[5]["chosen"]
    config = yaml(tmp_path, base_folder, write(tmp_path / "pairs.jsonl", data))
    assert main(["train", "--config", config]) == 1
    assert "row 5" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


# --------------------------------------------------------------------------------------------------------------- score


def expected(model_folder):
    scorer = GRMScorer(model_folder)
    chats = [CHATS[0]["messages"], *CHATS[1:2], CHATS[2]["text"], CHATS[3]]
    return [scorer.score([chat])[0] for chat in chats]


def test_score_writes_one_line_a_row(tmp_path, model_folder, capsys):
    path = write(tmp_path / "chats.jsonl", CHATS)
    assert main(["score", path, "--model", model_folder]) == 0
    captured = capsys.readouterr()
    found = lines(captured.out)
    assert [row["row"] for row in found] == [0, 1, 2, 3] and found[0]["id"] == "a"
    assert [row["score"] for row in found] == pytest.approx(expected(model_folder), rel=1e-5)
    assert [row["truncated"] for row in found] == [False, False, False, True]
    assert found[3]["tokens"] == 64
    assert "4 rows scored, 1 truncated" in captured.err


def test_score_reads_standard_input(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(json.dumps(row) for row in CHATS[:2])))
    assert main(["score", "-", "--model", model_folder]) == 0
    assert len(lines(capsys.readouterr().out)) == 2


def test_score_resumes_where_it_stopped(tmp_path, model_folder, capsys):
    path, output = write(tmp_path / "chats.jsonl", CHATS), tmp_path / "scores.jsonl"
    assert main(["score", path, "--model", model_folder, "--output", str(output)]) == 0
    whole = output.read_text()
    for kept in ("\n".join(whole.splitlines()[:2]) + "\n", whole[: len(whole) // 2], "", whole[:7]):
        output.write_text(kept)
        assert main(["score", path, "--model", model_folder, "--output", str(output)]) == 0
        again = lines(output.read_text())
        assert [row["row"] for row in again] == [0, 1, 2, 3]
        assert [row["score"] for row in again] == pytest.approx([row["score"] for row in lines(whole)], rel=1e-5)
    capsys.readouterr()


@pytest.mark.parametrize("change", ["other model", "other file", "longer", "not JSON"])
def test_score_never_mixes_two_runs(tmp_path, model_folder, capsys, change):
    path, output = write(tmp_path / "chats.jsonl", CHATS), tmp_path / "scores.jsonl"
    assert main(["score", path, "--model", model_folder, "--output", str(output)]) == 0
    model = model_folder
    if change == "other model":
        model = str(tmp_path / "other")
        grm(seed=3).save_pretrained(model)
        TOKENIZER.save_pretrained(model)
    elif change == "other file":
        write(tmp_path / "chats.jsonl", CHATS[::-1])
    elif change == "longer":
        write(tmp_path / "chats.jsonl", CHATS[:2])
    else:
        output.write_text("notes of mine\n")
    before = output.read_bytes()
    assert main(["score", path, "--model", model, "--output", str(output)]) == 1
    assert "holds other scores" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n', "line 1 needs"),
        ("{broken\n", "line 1 is not JSON"),
        ('{"text": "a"}\n\n[1]\n', "line 3 needs"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "chat 0"),
        ('{"text": ""}\n', "chat 0"),
    ],
)
def test_score_names_the_bad_line(tmp_path, model_folder, capsys, content, words):
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    assert main(["score", str(path), "--model", model_folder]) == 1
    assert words in capsys.readouterr().err


def test_missing_file_and_wrong_model(tmp_path, model_folder, base_folder, capsys):
    assert main(["score", str(tmp_path / "none.jsonl"), "--model", model_folder]) == 1
    assert "no such file" in capsys.readouterr().err
    path = write(tmp_path / "chats.jsonl", CHATS)
    assert main(["score", path, "--model", base_folder]) == 1
    assert "from_base" in capsys.readouterr().err


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


# ------------------------------------------------------------------------------------------------------------ the rest


def test_usage_errors_end_with_two():
    for wrong in ([], ["fly"], ["score"], ["compare", "--model", "x", "a"], ["merge", "a", "b", "c"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and __version__ in capsys.readouterr().out


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "grm_hf.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("train", "score", "compare", "merge", "demo"):
        assert command in done.stdout


# -------------------------------------------------------------------------------------------------------------- scorer


def test_scores_do_not_depend_on_the_batch_or_the_order(model_folder):
    chats = [[*row["prompt"], *row["chosen"]] for row in rows(20, seed=8)]
    one_by_one = GRMScorer(model_folder, max_tokens_per_batch=1).score(chats)
    assert GRMScorer(model_folder).score(chats) == pytest.approx(one_by_one, rel=1e-5, abs=1e-6)
    assert GRMScorer(model_folder).score(chats[::-1]) == pytest.approx(one_by_one[::-1], rel=1e-5, abs=1e-6)
    details = list(GRMScorer(model_folder).stream(iter(chats), window=3))
    assert [detail.score for detail in details] == pytest.approx(one_by_one, rel=1e-5, abs=1e-6)
    assert GRMScorer(model_folder).score([]) == []


def test_pairs_and_best_of_n(model_folder):
    scorer = GRMScorer(model_folder)
    data = rows(4)
    for (chosen, rejected), row in zip(scorer.score_pairs(data), data, strict=True):
        assert chosen == pytest.approx(scorer.score([[*row["prompt"], *row["chosen"]]])[0], rel=1e-5)
        assert rejected == pytest.approx(scorer.score([[*row["prompt"], *row["rejected"]]])[0], rel=1e-5)
    answers = ["one", "two three", "four", "one"]
    result = scorer.best_of_n([{"role": "user", "content": "which?"}], answers)
    assert result.best == answers[max(range(4), key=lambda i: result.scores[i])]
    assert sorted(result.order) == [0, 1, 2, 3]
    assert [result.scores[i] for i in result.order] == sorted(result.scores, reverse=True)
    assert result.order.index(0) < result.order.index(3)  # equal answers keep the order given
    with pytest.raises(ValueError, match="nothing to rank"):
        scorer.best_of_n("which?", [])


def test_probability_is_symmetric_and_does_not_overflow(model_folder):
    scorer = GRMScorer(model_folder)
    assert scorer.probability(1e6, 0.0) == 1.0 and scorer.probability(-1e6, 0.0) == 0.0
    assert scorer.probability(0.3, 0.1) + scorer.probability(0.1, 0.3) == pytest.approx(1)
    scorer.model.config.reward_temperature = 2.0
    assert scorer.probability(0.3, 0.1) == pytest.approx(torch.sigmoid(torch.tensor(0.1)).item(), rel=1e-6)


def test_a_model_in_memory_needs_its_tokenizer():
    with pytest.raises(ValueError, match="Pass `tokenizer`"):
        GRMScorer(grm())
    assert len(GRMScorer(grm(), chatml_tokenizer()).score(["one"])) == 1


# -------------------------------------------------------------------------------------------- transformed and combined


def saved(folder, seed):
    model = grm(seed)
    model.config.reward_mean, model.config.reward_std = 0.1 * seed, 0.5
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_score_transforms_and_resumes(tmp_path, capsys):
    model, output = saved(tmp_path / "model", 1), tmp_path / "out.jsonl"
    source = write(tmp_path / "chats.jsonl", CHATS[:3])
    raw = GRMScorer(model).score([CHATS[0]["messages"], CHATS[1], CHATS[2]["text"]])
    arguments = ["score", source, "--model", model, "--output", str(output), "--transform", "log_sigmoid"]
    arguments += ["--reference", "0.25"]
    assert main(arguments) == 0
    by_hand = [-math.log1p(math.exp(0.25 - reward)) for reward in raw]
    assert [line["score"] for line in lines(output.read_text())] == pytest.approx(by_hand, abs=1e-6)

    output.write_text("".join(output.read_text().splitlines(keepends=True)[:2]))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "2 of 3 rows are done already" in capsys.readouterr().err
    assert main([*arguments[:-3], "standardize"]) == 1  # another transformation: other scores
    assert "holds other scores" in capsys.readouterr().err
    assert main(["score", source, "--model", model, "--transform", "length_residual"]) == 1
    assert "all rewards at once" in capsys.readouterr().err


def test_score_takes_an_ensemble(tmp_path, capsys):
    models = [saved(tmp_path / str(seed), seed) for seed in (1, 2)]
    source = write(tmp_path / "chats.jsonl", CHATS[:3])
    chats = [CHATS[0]["messages"], CHATS[1], CHATS[2]["text"]]
    apart = [[(r - 0.1 * seed) / 0.5 for r in GRMScorer(m).score(chats)] for seed, m in enumerate(models, 1)]
    output = str(tmp_path / "out.jsonl")
    options = [option for model in models for option in ("--model", model)]
    for _ in range(2):  # the second time everything is done
        assert main(["score", source, *options, "--ensemble", "min", "--output", output]) == 0
        found = [line["score"] for line in lines((tmp_path / "out.jsonl").read_text())]
        assert found == pytest.approx([min(pair) for pair in zip(*apart, strict=True)], abs=1e-5)
    assert main(["score", source, "--model", models[0], "--model", models[0]]) == 1
    assert "identical" in capsys.readouterr().err
