"""`examples/`: each file run at toy size, from the command that its own paragraph gives."""

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny import chatml_tokenizer, tiny_lm


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from grm_hf import GRMScorer  # noqa: E402


pytestmark = pytest.mark.trainer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import train_grm  # noqa: E402


TOY = (
    "--per_device_train_batch_size 4 --num_train_epochs 1 --learning_rate 1e-2 --report_to none --use_cpu True "
    "--bf16 False"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chatml_tokenizer()
    tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(count, **columns):
    chat = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
            "chosen": [{"role": "assistant", "content": f"It is {i + 1}."}],
            "rejected": [{"role": "assistant", "content": f"{i + 3}!"}],
        }
        for i in range(count)
    ]
    dataset = Dataset.from_list(chat)
    for name, value in columns.items():
        dataset = dataset.add_column(name, [value] * count)
    return dataset


@pytest.fixture(params=["parquet", "jsonl", "dataset"])
def source(request, tmp_path):
    """What `--train` accepts; a folder of splits is read as a Hub dataset is."""
    train, test = pairs(12, source="somewhere"), pairs(6, source="elsewhere")
    if request.param == "parquet":
        train.to_parquet(tmp_path / "train.parquet")
        return tmp_path / "train.parquet"
    if request.param == "jsonl":
        train.to_json(tmp_path / "train.jsonl")
        return tmp_path / "train.jsonl"
    (tmp_path / "hub").mkdir()
    train.to_parquet(tmp_path / "hub" / "train.parquet")
    test.to_parquet(tmp_path / "hub" / "test.parquet")
    return tmp_path / "hub"


def test_the_command_it_gives_leaves_a_model_that_loads_and_scores_the_same(base, source, tmp_path, capsys):
    text = (EXAMPLES / "train_grm.py").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (python .*)$", ast.get_docstring(ast.parse(text), clean=False), re.M)
    words = shlex.split(command)
    assert words[:2] == ["python", "examples/train_grm.py"]
    given = {"--model": str(base), "--train": str(source), "--output_dir": str(tmp_path / "out")}
    arguments = [given.get(words[i - 1], word) for i, word in enumerate(words)][2:]
    assert set(given) <= set(words)

    evaluated = ["--eval", str(source)]
    trainer = train_grm.main([*arguments, *shlex.split(TOY), *evaluated])
    assert trainer.data_counts["train"].rows == 12
    assert trainer.data_counts["eval"].rows == (6 if source.name == "hub" else 12)
    assert trainer.args.regularizer == "sft"
    accuracy = re.search(r"accuracy on .*: (\d\.\d{3})", capsys.readouterr().out)[1]
    chats = pairs(6).to_list()
    wins = [chosen > rejected for chosen, rejected in GRMScorer(str(tmp_path / "out")).score_pairs(chats)]
    if source.name == "hub":
        assert float(accuracy) == pytest.approx(sum(wins) / len(wins), abs=1e-3)

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    live = GRMScorer(trainer.model, trainer.processing_class).score_pairs(chats)
    again = GRMScorer(loaded, trainer.processing_class).score_pairs(chats)
    torch.testing.assert_close(torch.tensor(live), torch.tensor(again))
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert not torch.equal(before, loaded.get_input_embeddings().weight), "nothing was trained"


@pytest.mark.parametrize("regularizer", ["none", "dpo"])
def test_regularizer_rows_and_adapter_are_what_was_asked_for(base, tmp_path, regularizer):
    pairs(12).to_parquet(tmp_path / "train.parquet")
    options = f"--model {base} --train {tmp_path / 'train.parquet'} --output_dir {tmp_path / 'out'} --lora True"
    trainer = train_grm.main(shlex.split(f"{options} {TOY} --max_rows 8 --regularizer {regularizer}"))
    assert trainer.data_counts["train"].rows == 8
    assert trainer.args.text_loss == regularizer
    assert trainer.model.peft_config["default"].r == 32
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    logged = {name for row in trainer.state.log_history for name in row}
    assert ("text_loss" in logged) == (regularizer != "none")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_it_needs_and_what_it_does(path):
    text = path.read_text(encoding="utf-8")
    header = re.match(r"# /// script\n((?:#.*\n)+)# ///\n", text)
    script = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in header[1].splitlines(True)))
    assert any(needed.startswith("grm-hf") for needed in script["dependencies"])
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(text))
