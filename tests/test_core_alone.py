"""What works with torch and transformers alone, and what without TRL: extras are blocked in a process of its own."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny import chat_grm, chatml_tokenizer


ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = chatml_tokenizer()
EXTRAS = "trl peft datasets pandas pyarrow accelerate evaluate gradio matplotlib scipy vllm sklearn"
CORE = "chats encoding folders devices attention layouts native losses logprobs scoring scoring.files scoring.golden"


def alone(code, blocked, *arguments):
    code = f"import sys\nfor name in {blocked.split()}: sys.modules[name] = None\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    chat_grm(TOKENIZER).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def test_the_core_is_imported_and_scores_without_extras(folder):
    code = f"""
import importlib
for name in {CORE.split()}: importlib.import_module(f"grm_hf.{{name}}")
from grm_hf import GRMScorer
scorer = GRMScorer(sys.argv[1])
print(scorer.best_of_n("one", ["two", "three"]).scores, scorer.score_pairs([{{"chosen": "a", "rejected": "b"}}]))
"""
    done = alone(code, EXTRAS, folder)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_entry_points_of_vllm_are_light():
    """It resolves them whenever it starts, in each of its processes."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        groups = tomllib.load(file)["project"]["entry-points"]
    targets = [*groups["vllm.general_plugins"].values(), *groups["vllm.endpoint_plugins"].values()]
    assert len(targets) == 6
    code = f"""
import importlib
for target in {targets}:
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
import torch
assert not torch.cuda.is_initialized()
print([name for name in sys.modules if name.startswith(("grm_hf.scoring", "grm_hf.serving.")) and sys.modules[name]])
"""
    done = alone(code, f"{EXTRAS} fastapi uvicorn")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "['grm_hf.serving.vllm_plugin']"


def test_an_adapter_is_staged_for_a_push_without_trl(folder, tmp_path):
    peft = pytest.importorskip("peft")
    from grm_hf import GRMForSequenceClassification, GRMScorer

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    peft.get_peft_model(GRMForSequenceClassification.from_pretrained(folder), config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    code = """
from grm_hf import GRMScorer
from grm_hf.cli import main
from grm_hf.hub import publish
publish.commit = lambda staged, *_, **__: print(GRMScorer(staged).score(["one two"])) or exit(0)
main(["push", sys.argv[1], "somebody/model"])
exit("nothing was pushed")
"""
    done = alone(code, "trl datasets pandas vllm gradio", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (score,) = GRMScorer(tmp_path).score(["one two"])
    assert float(done.stdout.strip().splitlines()[-1].strip("[]")) == pytest.approx(score, rel=1e-5)
