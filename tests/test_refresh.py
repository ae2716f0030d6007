"""`grm refresh`: new code into an old model, and nothing else. The old model is one that version 0.1.0 wrote; the
three code files of that version are in `data/shipped-0.1.0`. (On a Hub: test_hub.py.)"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import chatml_tokenizer, score, texts, tiny_grm
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from grm_hf import __version__
from grm_hf.cli import main
from grm_hf.hub import refresh
from grm_hf.hub.card import card_of_folder, metadata, with_code
from grm_hf.scoring import save_golden, verify


OLD = Path(__file__).parent / "data" / "shipped-0.1.0"
NEW = Path(__file__).parents[1] / "grm_hf"
CODE = ("configuration_grm.py", "heads_grm.py", "modeling_grm.py")
BREAKS_OLD = "cache" in SequenceClassifierOutputWithPast.__dataclass_fields__  # transformers 5.24


def written_by_0_1_0(folder):
    tokenizer = chatml_tokenizer()
    model = tiny_grm(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_golden(model, tokenizer, folder)
    for name in CODE:
        shutil.copy(OLD / name, folder / name)
    text = card_of_folder(folder, "old").replace(f"grm_hf {__version__}", "grm_hf 0.1.0")
    start, end = text.index("<!-- grm_hf code"), text.index("<!-- /grm_hf -->", text.index("<!-- grm_hf code"))
    (folder / "README.md").write_text(text[:start].rstrip() + text[end + len("<!-- /grm_hf -->") :] + "\nMine.\n")
    return model


@pytest.fixture
def folder(tmp_path):
    """A folder of version 0.1.0, and a reward that it gave."""
    model = written_by_0_1_0(tmp_path / "old")
    return tmp_path / "old", score(model, texts()[0][None] % 100)


def stranger(folder, ids, tmp_path):
    code = (
        "import sys, json; sys.modules['grm_hf'] = None\n"
        "import torch; from transformers import AutoModelForSequenceClassification\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "print(model(ids, attention_mask=torch.ones_like(ids)).logits.item())\n"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = [sys.executable, "-P", "-c", code, str(folder), json.dumps(ids.tolist())]
    return subprocess.run(run, env=env, capture_output=True, text=True, cwd=tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_folder_of_0_1_0_scores_again(folder, tmp_path, capsys):
    path, reward = folder
    ids = texts()[0][None] % 100
    before = contents(path)
    old = stranger(path, ids, tmp_path)
    assert (old.returncode != 0) == BREAKS_OLD, "what this verb is for"
    assert main(["refresh", str(path)]) == 0
    printed = capsys.readouterr().out
    after = contents(path)
    newer = {name for name in CODE if (NEW / name).read_bytes() != (OLD / name).read_bytes()}
    assert {name for name in after if after[name] != before.get(name)} == {*newer, "README.md"}
    assert before.keys() <= after.keys() and not [name for name in after if name.startswith(".")]
    for name in CODE:
        assert after[name] == (NEW / name).read_bytes()
    assert "changed: modeling_grm.py (" in printed and "lines added" in printed and "DIFFERS" not in printed
    assert ("Its own code cannot score here" in printed) == BREAKS_OLD
    now = stranger(path, ids, tmp_path)
    assert float(now.stdout) == pytest.approx(reward.item(), abs=1e-6), now.stderr[-2000:]
    verify(path)
    text = after["README.md"].decode()
    assert f"The code files of this model are those of grm_hf {__version__}." in text and text.endswith("\nMine.\n")

    assert main(["refresh", str(path)]) == 0
    assert "those of this version already" in capsys.readouterr().out and contents(path) == after


@pytest.mark.slow
def test_other_rewards_stop_it(folder, capsys):
    path, _ = folder
    before = contents(path)
    golden = json.loads(before["golden_rows.json"])
    golden["rows"][1]["score"] += 0.01
    (path / "golden_rows.json").write_text(json.dumps(golden))
    if not BREAKS_OLD:  # then the rewards of the old code count: let it give others
        code = (path / "modeling_grm.py").read_text().replace("self.score(read)", "self.score(read) + 1")
        (path / "modeling_grm.py").write_text(code)
    kept = contents(path)
    assert main(["refresh", str(path)]) == 1
    said = capsys.readouterr()
    assert "DIFFERS" in said.out and "the new code changes golden rows" in said.err and "nothing was" in said.err
    assert contents(path) == kept


@pytest.mark.slow
def test_new_code_that_fails_stops_it(folder):
    """A weight is gone: the new code refuses the folder, in its own words."""
    path, _ = folder
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights.pop("score.out.bias")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    kept = contents(path)
    with pytest.raises(ValueError, match="reward head lacks .*score.out.bias"):
        refresh(path)
    assert contents(path) == kept


def test_what_cannot_be_refreshed(folder, tmp_path):
    path, _ = folder
    (path / "golden_rows.json").unlink()
    with pytest.raises(ValueError, match="no golden_rows.json.*save_golden"):
        refresh(path)
    with pytest.raises(ValueError, match="There is no folder"):
        refresh(tmp_path / "nowhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter, which carries no code"):
        refresh(tmp_path / "adapter")
    tiny_grm().lm.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="no reward head"):
        refresh(tmp_path / "base")


def test_a_card_says_the_version_of_its_code(folder):
    path, _ = folder
    text = card_of_folder(path, "name")
    assert f"grm_hf {__version__}" in text and with_code(text) == text
    old = text.replace(f"grm_hf {__version__}", "grm_hf 0.1.0")
    assert with_code(old) == old, "edited by hand: it stays"
    assert with_code("# My model\n") == "# My model\n"
    unsaid = (path / "README.md").read_text()
    assert metadata(with_code(unsaid)) == metadata(unsaid) and with_code(with_code(unsaid)) == with_code(unsaid)
    assert unsaid.replace("\nMine.\n", "") in with_code(unsaid) and "Mine." in with_code(unsaid)
