"""What else loads a pushed reward model, unchanged: transformers 4, rewardbench, sentence-transformers, TRL's command
line. All of them must give the number that GRMScorer gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, chat_grm, chatml_tokenizer, llama_tokenizer, pad, score, texts, tiny_grm, tiny_lm
from transformers import AutoConfig

from grm_hf import GRMScorer
from grm_hf.configuration_grm import CHECKED_ON_4
from grm_hf.hub.publish import stage
from grm_hf.hub.tokenizer import spell_for_transformers_4


# An environment with rewardbench and the transformers that it pins (`make test` builds it), and a folder with the last
# release of transformers 4.
REWARDBENCH = os.environ.get("GRM_REWARDBENCH_PYTHON")
LAST_4 = os.environ.get("GRM_TRANSFORMERS_4")
needs_rewardbench = pytest.mark.skipif(
    not REWARDBENCH, reason="GRM_REWARDBENCH_PYTHON names no environment with rewardbench; `make test` does"
)


def rope(kind="default", **fields):
    """Never what transformers 4 would take by default."""
    return {"rope_theta": 500.0, "rope_type": kind, **fields}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "theta": ("llama", rope()),
    "qwen": ("qwen2", rope()),
    "linear": ("llama", rope("linear", factor=3.0)),
    "dynamic": ("llama", rope("dynamic", factor=4.0)),
    "llama3": ("llama", rope("llama3", factor=8.0, **LLAMA3)),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "partial": ("phi", rope(partial_rotary_factor=0.25)),
    "neox": ("gpt_neox", rope(partial_rotary_factor=1.0)),
    "nested": ("gemma3_text", {"full_attention": rope(), "sliding_attention": rope(rope_theta=100.0)}),
    "refused yarn": ("llama", rope("yarn", factor=4.0)),
    "refused truncation": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)),
    "refused longrope": (
        "phi3",
        rope("longrope", short_factor=[1.5] * 4, long_factor=[3.0] * 4, original_max_position_embeddings=16),
    ),
}
CHATS = [
    [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": answer}]
    for answer in ("Four.", "I think that it is five, or perhaps six: who could say?", "4", "No.")
]


def pushed(folder, tokenizer, family="llama", **overrides):
    """The folder that a push would send, as the Hub would hand it out."""
    model = chat_grm(tokenizer, family, head_hidden_size=16, **overrides)
    model.save_pretrained(folder / "trained")
    tokenizer.save_pretrained(folder / "trained")
    with stage(folder / "trained", "grm") as staged:
        shutil.copytree(staged, folder / "grm")
    return folder / "grm"


# ------------------------------------------------------------------------------------------------------ transformers 4

LOAD = """
import json, sys
import torch, transformers
from transformers import AutoModelForSequenceClassification
out = {"version": transformers.__version__}
for folder, (ids, mask) in json.load(open(sys.argv[1])).items():
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        assert not info["missing_keys"], info
        with torch.no_grad():
            logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        config = model.config
        out[folder] = [logits.squeeze(-1).tolist(), config.pad_token_id, config.eos_token_id, model.lm_head_is_exact()]
    except ValueError as error:
        out[folder] = str(error)
print("RESULT" + json.dumps(out))
"""


def under_transformers_4(tmp_path, path=None):
    """Every family, and every kind of rotary embedding, saved here and loaded there."""
    made = {}
    ids, mask = pad(texts(), left=[True, False, True, False])
    variants = {family: (family, {}) for family in FAMILIES} | {
        name: (family, {"rope_parameters": rope}) for name, (family, rope) in ROPES.items()
    }
    variants |= {
        "old names": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
        "gate": ("llama", {"attribute_names": ["a", "b"], "attribute_weights": "gate"}),
        "means": (
            "qwen2",
            {"attribute_names": ["a", "b"], "attribute_weights": [1, 2], "attribute_combiner": "harmonic"},
        ),
        "old gemma": ("gemma3_text", {"num_hidden_layers": 7}),
        "factors": ("gemma2", {"head_type": "bnrm"}),
        "refused layers": (
            "gemma3_text",
            {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
        ),
        "refused window": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    }
    for name, (family, overrides) in variants.items():
        model = tiny_grm(family, **overrides)
        model.save_pretrained(tmp_path / name)
        made[name] = score(model, ids, mask)
    job = tmp_path / "job.json"
    job.write_text(json.dumps({str(tmp_path / name): [ids.tolist(), mask.tolist()] for name in made}))
    result = run_there([REWARDBENCH, "-c", LOAD, str(job)], tmp_path, path)
    found = json.loads(result.split("RESULT")[1])
    return found.pop("version"), {Path(folder).name: value for folder, value in found.items()}, made


def run_there(command, cwd, path=None):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "HF_DATASETS_CACHE": str(cwd / "datasets"),
        "TRUST_REMOTE_CODE": "",
        "PYTHONPATH": str(path or ""),
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_checked_families_are_those_of_the_test_below():
    assert set(CHECKED_ON_4) == {model_type for model_type, _ in FAMILIES.values()} - {"qwen3_moe"}


@pytest.mark.slow
@needs_rewardbench
@pytest.mark.parametrize("which", ["rewardbench", "last"])
def test_transformers_4_gives_the_same_rewards_or_refuses(tmp_path, which):
    if which == "last" and not LAST_4:
        pytest.skip("GRM_TRANSFORMERS_4 names no folder with the last transformers 4; `make test` does")
    version, found, made = under_transformers_4(tmp_path, LAST_4 if which == "last" else None)
    assert version == {"rewardbench": "4.51.0", "last": "4.57.6"}[which]
    refused = {name: said for name, said in found.items() if isinstance(said, str)}
    assert set(refused) == {name for name in made if name.startswith("refused")} | {"qwen3_moe"}, refused
    assert all("Load it with transformers 5" in said for said in refused.values())
    for name in set(made) - set(refused):
        rewards, pad_token_id, eos_token_id, exact = found[name]
        torch.testing.assert_close(torch.tensor(rewards), made[name], rtol=1e-5, atol=1e-6, msg=name)
        assert (pad_token_id, eos_token_id, exact) == (0, 2, True), name


def test_the_tokenizer_files_are_rewritten_for_transformers_4_and_read_alike_here(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = chatml_tokenizer(special=["<|im_start|>", "<tool_call>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    assert b"TokenizersBackend" in before and b'"extra_special_tokens": [' in before
    os.link(tmp_path / "tokenizer_config.json", tmp_path / "elsewhere.json")
    spell_for_transformers_4(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in settings
    assert (tmp_path / "elsewhere.json").read_bytes() == before, "a linked file was written to"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.get_vocab() == tokenizer.get_vocab()
    text = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    assert again.apply_chat_template(CHATS[0], tokenize=False) == text
    assert again(text).input_ids == tokenizer(text).input_ids
    written = (tmp_path / "tokenizer_config.json").stat()
    spell_for_transformers_4(tmp_path)
    assert (tmp_path / "tokenizer_config.json").stat().st_mtime_ns == written.st_mtime_ns
    spell_for_transformers_4(tmp_path / "nothing here")


# --------------------------------------------------------------------------------------------------------- rewardbench

# Its command line as it is, but for the device, which it takes for granted.
WITHOUT_GPU = """
import sys
from transformers import BatchEncoding
to = BatchEncoding.to
BatchEncoding.to = lambda self, device, **kwargs: self if device == "cuda" else to(self, device, **kwargs)
from rewardbench.rewardbench import main
main()
"""


@pytest.mark.slow
@needs_rewardbench
@pytest.mark.parametrize("make", [chatml_tokenizer, llama_tokenizer])
def test_rewardbench_gives_our_numbers(tmp_path, make):
    """Left padding, a doubled BOS masked away (`llama_tokenizer`), `config.pad_token_id` read."""
    tokenizer = make()
    folder = pushed(tmp_path, tokenizer, rope_parameters=rope())
    ours = GRMScorer(str(folder)).score(CHATS)
    rows = [{"chosen": CHATS[i], "rejected": CHATS[j]} for i, j in ((0, 1), (2, 3), (1, 0))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--model grm --dataset pairs.jsonl --load_json --trust_remote_code --torch_dtype float32 --not_quantized"
    run_there(
        [REWARDBENCH, "-c", WITHOUT_GPU, *options.split(), "--max_length", "4096", "--batch_size", "8"], tmp_path
    )
    lines = (tmp_path / "results" / "grm_outputs.jsonl").read_text().splitlines()
    for line, (i, j) in zip(map(json.loads, lines), ((0, 1), (2, 3), (1, 0)), strict=True):
        assert line["scores_chosen"] == pytest.approx(ours[i], rel=1e-5, abs=1e-6)
        assert line["scores_rejected"] == pytest.approx(ours[j], rel=1e-5, abs=1e-6)
        assert line["results"] == int(ours[i] > ours[j])


# ----------------------------------------------------------------------------------------------- sentence-transformers


def test_cross_encoder_gives_raw_rewards(tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = pushed(tmp_path, chatml_tokenizer())
    encoder = sentence_transformers.CrossEncoder(str(folder), trust_remote_code=True, device="cpu")
    rewards = encoder.predict(CHATS, batch_size=len(CHATS))
    ours = GRMScorer(str(folder)).score(CHATS)
    assert rewards.tolist() == pytest.approx(ours, rel=1e-5, abs=1e-6)
    assert min(ours) < 0  # which no sigmoid would give


def test_a_configuration_saved_with_another_activation_keeps_it(tmp_path):
    model = tiny_grm()
    assert model.config.sentence_transformers == {"activation_fn": "torch.nn.modules.linear.Identity"}
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    model.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.sentence_transformers == {"activation_fn": "torch.nn.modules.activation.Sigmoid"}


# --------------------------------------------------------------------------------------------------- TRL, command line


@pytest.mark.slow
@pytest.mark.trainer
def test_trl_grpo_takes_a_reward_model_by_its_name(tmp_path):
    """`trl grpo --reward_model_name_or_path`, in a process that cannot import grm_hf."""
    tokenizer = chatml_tokenizer()
    folder = pushed(tmp_path, tokenizer)
    policy = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    data = tmp_path / "data"
    data.mkdir()
    row = {"prompt": [{"role": "user", "content": "Say something."}]}
    (data / "train.jsonl").write_text((json.dumps(row) + "\n") * 4)
    options = {
        "model_name_or_path": tmp_path / "policy",
        "reward_model_name_or_path": folder,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "trust_remote_code": True,
        "max_steps": 1,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }
    command = "import sys; sys.modules['grm_hf'] = None; from trl.scripts.grpo import *; "
    command += "main(*make_parser().parse_args_and_config(fail_with_unknown_args=True))"
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    out = run_there([sys.executable, "-c", command, *arguments], tmp_path)
    reward = f"rewards/{folder.name}/mean"
    assert reward in out, out[-2000:]
