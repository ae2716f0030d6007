"""docs/evaluation.md: its table is what `SUITES` gives, and every command and block of it is run."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from official_files import FILES, write
from tiny import chat_grm, chatml_tokenizer

from grm_hf import cli
from grm_hf.evaluation import SUITES
from grm_hf.evaluation.examples import read_rows
from grm_hf.evaluation.report import suites_table


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
PYTHON = [code for language, code in BLOCKS if language == "python"]
OF_THE_TABLE = re.findall(r"`(grm eval MODEL [^`]*)`", PAGE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    tokenizer = chatml_tokenizer()
    for seed, name in enumerate(("runs/demo/model", "other/model")):
        chat_grm(tokenizer, seed=seed, max_position_embeddings=8192).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for suite, files in FILES.items():
        write(folder / "data" / suite, files())
    write(folder, FILES["own"]())
    return folder


@pytest.fixture
def hub(place, monkeypatch):
    """The Hub, whose data sets are the files here."""

    def download(sources, revisions):
        suite = next(name for name, suite in SUITES.items() if suite.hub == tuple(sources))
        return read_rows(place / "data" / suite)

    monkeypatch.setattr("grm_hf.evaluation.run.download_rows", download)
    monkeypatch.setattr("grm_hf.evaluation.run.commits_of", lambda sources, revision: {})
    monkeypatch.chdir(place)


def test_the_table_is_that_of_the_suites():
    assert PAGE.split("<!-- suites: begin -->\n")[1].split("\n<!-- suites: end -->")[0] == suites_table()
    assert set(SUITES) == set(FILES) and len(OF_THE_TABLE) == len(SUITES)


@pytest.mark.parametrize("command", [*COMMANDS, *OF_THE_TABLE])
def test_commands_run(hub, command, capsys):
    if "--compare" in command:
        assert cli.main(shlex.split(COMMANDS[COMMANDS.index(command) - 1])[1:]) == 0
    words = shlex.split(command.replace("MODEL", "runs/demo/model"))
    assert words[0] == "grm"
    assert cli.main(words[1:]) == 0, capsys.readouterr().err
    assert "95 % interval" in capsys.readouterr().out


@pytest.mark.parametrize("code", [code for code in PYTHON if "GRMRewardConfig" not in code])
def test_python_blocks_run(hub, code, capsys):
    exec(code, {})
    assert capsys.readouterr().out


def test_the_figures_of_the_table_of_figures_exist(hub):
    from grm_hf.evaluation import evaluate

    found = set()
    for suite in ("rewardbench", "rm-bench", "m-rewardbench", "hhh"):
        found |= set(evaluate("runs/demo/model", suite, f"data/{suite}").summary)
    names = re.findall(r"^\| (`.*?) \|", PAGE.split("## Figures")[1], re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", " ".join(names)):
        assert any(figure.startswith(name.removesuffix("...")) for figure in found), name


def test_what_is_said_of_the_hub_is_so():
    off = {name for name, suite in SUITES.items() if not suite.hub and suite.url}
    assert off == {"rmb", "if-rewardbench", "contrast"}
    assert all(dataclasses.asdict(suite)["licence"] for suite in SUITES.values())
