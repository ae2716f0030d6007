"""Every code block and every command of the README is run, with ids and folders replaced by tiny ones made here."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402
from trainers import TOKENIZER, base, grm, rows, trainer  # noqa: E402

from grm_hf import cli  # noqa: E402
from grm_hf.scoring import save_golden  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
BASH = [code for language, code in BLOCKS if language == "bash"]
COMMANDS = [line.split("  #")[0].strip() for code in BASH for line in code.splitlines() if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the README's paths exist: a trained model, a base, data, and files to score."""
    folder = tmp_path_factory.mktemp("readme")
    model = grm()
    for name in ("runs/demo/model", "models/grm-smollm2-135m"):
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
        save_golden(model, TOKENIZER, folder / name)
    base().save_pretrained(folder / "Qwen/Qwen3-0.6B")
    TOKENIZER.save_pretrained(folder / "Qwen/Qwen3-0.6B")
    Dataset.from_list(rows(16)).to_parquet(folder / "trl-lib/ultrafeedback_binarized/train.parquet")
    (folder / "my_pairs.jsonl").write_text('{"prompt": "one", "chosen": " two", "rejected": " three"}\n' * 2)
    (folder / "chats.jsonl").write_text('{"prompt": "one", "response": "two"}\n')
    (folder / "reward.yaml").write_text(
        "model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: trl-lib/ultrafeedback_binarized\n"
        "output_dir: out\nmax_steps: 1\nbf16: false\nuse_cpu: true\nreport_to: none\n"
    )
    return folder


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(place, number):
    code = PYTHON[number]
    if "from grm_hf" not in code:  # "in a process that has never heard of this package"
        code = "import sys\nsys.modules['grm_hf'] = None\n" + code
    # One step on the CPU is enough to see that it works.
    code = code.replace("beta=0.1)", "beta=0.1, max_steps=1, bf16=False, use_cpu=True, report_to='none')")
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if "save_model" in code:
        assert (place / "qwen3-grm" / "model.safetensors").is_file()
    else:
        assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(place, command, monkeypatch, capsys):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    assert words[0] == "grm"
    monkeypatch.chdir(place)
    monkeypatch.setattr("grm_hf.base.published", lambda: Path("models/grm-smollm2-135m"))
    assert cli.main(words[1:]) == 0, capsys.readouterr().err


def test_the_two_commands_come_first_and_ci_runs_one_of_them():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci/run").read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {"index.md", *re.findall(r"\]\((\w+\.md)\)", index)}


def test_sections_stand_in_the_order_of_a_newcomer():
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    order = ["Install", "Score a model", "Train one", "Load anywhere", "Evaluate", "Serve", "Troubleshooting", "More"]
    assert titles == order


def test_loss_tables_are_those_of_the_code():
    from grm_hf.losses import PAIR_LOSSES, TEXT_LOSSES

    shown = re.findall(r'^\| `"(\w+)"` \| (?:`(.+)`)? ?\| (.*?) ?\|$', README, re.MULTILINE)
    assert shown[0][:2] == ("none", "")
    table = {**TEXT_LOSSES, **PAIR_LOSSES}
    assert shown[1:] == [(name, loss.formula, loss.source) for name, loss in table.items()]


def test_the_settings_of_training_are_those_of_the_code():
    from trl import RewardConfig

    from grm_hf import GRMRewardConfig

    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page.split("\n## ")[0], re.MULTILINE))
    fields = GRMRewardConfig.__dataclass_fields__
    added = [name for name in fields if name not in RewardConfig.__dataclass_fields__]
    assert list(shown) == added
    assert {name: ast.literal_eval(value) for name, value in shown.items()} == {n: fields[n].default for n in added}


def test_the_numbers_of_the_log_are_those_of_a_run(tmp_path):
    """One step with all parts of the loss: `dpo`, and a model with an attribute."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## What is logged")[1]
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = {name.replace("NAME", "help") for name in re.findall(r"`(\w+)`", " ".join(cells))}
    data = Dataset.from_list([{**row, "chosen_help": 1.0} for row in rows(8)])
    model = grm(attribute_names=["help"])
    run = trainer(tmp_path, model, data, regularizer="dpo", alpha=0.5, max_steps=1, logging_steps=1)
    run.train()
    logged = {name for line in run.state.log_history for name in line}
    assert named <= logged
    assert logged - named <= {
        *("epoch", "step", "loss", "grad_norm", "learning_rate", "total_flos", "train_loss", "train_runtime"),
        *("train_samples_per_second", "train_steps_per_second"),
    }


@pytest.mark.parametrize(
    ("symptom", "file"),
    [
        ("does not fit its config.json and was not loaded", "grm_hf/modeling_grm.py"),
        ("would be random", "grm_hf/modeling_grm.py"),
        ("not a reward model of type 'grm'", "grm_hf/configuration_grm.py"),
        ("rows without `attention_mask`", "grm_hf/modeling_grm.py"),
        ("Delete the file", "grm_hf/training/reference.py"),
        ("says that it was trained on", "grm_hf/modeling_grm.py"),
        ("says that it was trained on", "grm_hf/folders.py"),
        ("do not hold", "grm_hf/scoring/golden.py"),
        ("is not at hand", "grm_hf/base/smollm2.py"),
        ("using 'padded'", "grm_hf/layouts.py"),
    ],
)
def test_troubleshooting_quotes_what_the_code_says(symptom, file):
    assert symptom.replace("`", "") in README.replace("`", "")
    assert symptom in (ROOT / file).read_text(encoding="utf-8")


def test_versions_agree():
    from grm_hf import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text().split("# Changelog")[1].lstrip()
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
