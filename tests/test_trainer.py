"""`GRMRewardTrainer`: the loss against an independent one, TRL's trainer to the last bit, adapters, checkpoints,
resume, reference log-probabilities, and what a step may hold in memory."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_lm
from trainers import CHATS, TOKENIZER, base, grm, logged, lora, pairs, rows, scores_here, settings, trainer


pytest.importorskip("trl", reason="needs the extra `train`")

import peft  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.utils import is_bitsandbytes_available  # noqa: E402
from trl import RewardConfig, RewardTrainer  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMRewardConfig, GRMRewardTrainer, losses  # noqa: E402
from grm_hf.scoring import GRMScorer, verify  # noqa: E402
from grm_hf.training import merge_adapter, reference  # noqa: E402
from grm_hf.training.trainer import _last_complete_checkpoint  # noqa: E402


pytestmark = pytest.mark.trainer

TEXT_LOSSES = list(losses.TEXT_LOSSES)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ------------------------------------------------------------------------------------------------ TRL, to the last bit


@pytest.mark.parametrize(
    "ours", [{"regularizer": "none"}, {"regularizer": "dpo_noref", "alpha": 0.0}], ids=["none", "alpha=0"]
)
@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"center_rewards_coefficient": 0.1},
        {"margin": True},
        {"bf16": True},
    ],
    ids=["plain", "checkpointing-accumulation", "centred", "margin", "bf16"],
)
def test_without_text_loss_it_is_trl_bit_for_bit(tmp_path, ours, shared):
    shared = dict(shared)
    columns = {"margin": np.linspace(0, 2, 16).tolist()} if shared.pop("margin", False) else {}
    data = pairs(**columns)
    run = trainer(tmp_path / "ours", grm(), data, **shared, **ours)
    theirs = RewardTrainer(
        model=grm(),
        args=settings(tmp_path / "theirs", RewardConfig, **shared),
        train_dataset=data,
        processing_class=TOKENIZER,
    )
    run.train()
    theirs.train()
    assert len(logged(run, "loss")) == 4
    assert logged(run, "loss") == logged(theirs, "loss")
    assert logged(run, "grad_norm") == logged(theirs, "grad_norm")
    assert same_weights(run.model, theirs.model)
    assert not same_weights(run.model, grm())


# --------------------------------------------------------------------------------------- the loss against a second one


def their_loss(model, frozen, batch, starts, kind, alpha, beta):
    """The official formula line by line: full logits of everything, log-softmax, labels of -100, sums."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rewards, logits, sums = [], [], []
    for network in (model, frozen):
        hidden = network.lm(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        if network is model:
            last = mask.sum(-1) - 1
            x = hidden[torch.arange(len(ids)), last]
            head = model.score
            rewards = (torch.relu(x @ head.dense[0].weight.T + head.dense[0].bias) @ head.out.weight.T).squeeze(
                -1
            ) + head.out.bias
        logits = hidden @ network.lm.lm_head.weight.T
        logps = logits.log_softmax(-1)
        per_row = []
        for row in range(len(ids)):
            positions = range(starts[row], int(mask[row].sum()))
            per_row.append(sum(logps[row, t - 1, ids[row, t]] for t in positions))
        sums.append(torch.stack(per_row))
    half = len(ids) // 2
    s, ref = sums
    c, r = s[:half], s[half:]
    log_sigmoid = torch.nn.functional.logsigmoid
    tokens = torch.tensor([int(mask[i].sum()) - starts[i] for i in range(half)])
    text = {
        "sft": lambda: -log_sigmoid(beta * c),
        "sft_nll": lambda: -c,
        "sft_token_mean": lambda: -c / tokens,
        "dpo_noref": lambda: -log_sigmoid(beta * (c - r)),
        "dpo": lambda: -log_sigmoid(beta * ((c - r) - (ref[:half] - ref[half:]))),
    }[kind]()
    bradley_terry = -log_sigmoid(rewards[:half] - rewards[half:]).mean()
    return (1 - alpha) * bradley_terry + alpha * text.mean()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("kind", TEXT_LOSSES)
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_loss_and_gradients_equal_theirs(tmp_path, kind, alpha, layout):
    model = grm().double()
    live = "model" if kind == "dpo" else None  # precomputed values are stored in float32
    run = trainer(tmp_path, model, regularizer=kind, alpha=alpha, layout=layout, max_steps=1, reference=live)
    examples = [run.train_dataset[i] for i in range(4)]
    batch = run.data_collator(examples)
    # The trained model has moved from its reference: otherwise the dpo term would be log 2 whatever is computed.
    frozen = grm().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    ours = run.compute_loss(model, dict(batch))
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    sequences = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
    width = max(map(len, sequences))
    padded = {
        "input_ids": torch.tensor([s + [0] * (width - len(s)) for s in sequences]),
        "attention_mask": torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences]),
    }
    starts = [e["chosen_start"] for e in examples] + [e["rejected_start"] for e in examples]
    theirs = their_loss(model, frozen, padded, starts, kind, alpha, 0.1)
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    # Where a prefix is shared its gradients are added before Llama's norms, which round to float32 in any model.
    tolerance = 1e-6 if layout == "shared_prefix" else 1e-10
    scale = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found = gradients.get(name, torch.zeros_like(parameter))
        assert (found - expected).norm() <= tolerance * max(expected.norm().item(), scale), name


@pytest.mark.parametrize("kind", ["none", *TEXT_LOSSES])
def test_every_parameter_moves(tmp_path, kind):
    model = grm()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, model, regularizer=kind, alpha=0.5)
    run.train()
    still = [name for name, p in run.model.named_parameters() if torch.equal(p, before[name])]
    assert still == (["lm.lm_head.weight"] if kind == "none" else [])
    assert all(math.isfinite(loss) for loss in logged(run, "loss"))
    both = kind != "none" and losses.TEXT_LOSSES[kind].sides == "both"
    assert ("implicit_accuracy" in run.state.log_history[0]) == both
    assert ("perplexity" in run.state.log_history[0]) == (kind != "none")


def test_freeze_backbone_trains_the_head_alone(tmp_path):
    model = grm()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path, model, regularizer="none", freeze_backbone=True).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "score.out.weight" in moved and all(name.startswith("score.") for name in moved)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_evaluation_is_exact_with_an_uneven_last_batch(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"mine": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    run = trainer(
        tmp_path, evaluation=pairs(7, seed=1), regularizer="sft", extra={"compute_metrics": compute_metrics}
    )
    metrics = run.evaluate()
    model = run.model.eval()
    rewards, losses, nll, tokens = [], [], 0.0, 0
    for example in run.eval_dataset:
        pair = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([example[f"{side}_ids"]])
            out = model(ids, attention_mask=torch.ones_like(ids), return_lm_logits=True)
            pair.append(out.logits.item())
            if side == "chosen":
                logps = out.lm_logits[0].log_softmax(-1)
                s = sum(logps[t - 1, ids[0, t]].item() for t in range(example["chosen_start"], ids.shape[1]))
                nll, tokens = nll - s, tokens + ids.shape[1] - example["chosen_start"]
        rewards.append(pair)
        sft = math.log1p(math.exp(-0.1 * s))
        losses.append(0.99 * math.log1p(math.exp(pair[1] - pair[0])) + 0.01 * sft)
    rewards = np.array(rewards)
    assert seen["shape"] == (7, 2)
    assert metrics["eval_mine"] == metrics["eval_accuracy"] == (rewards[:, 0] > rewards[:, 1]).mean()
    assert metrics["eval_margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4, abs=1e-6)
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert metrics["eval_min_reward"] == pytest.approx(rewards.min(), rel=1e-4, abs=1e-6)
    assert model.config.reward_mean == pytest.approx(rewards.mean(), rel=1e-4, abs=1e-6)
    assert model.config.reward_std == pytest.approx(rewards.std(), rel=1e-3)


def test_log_lines_average_over_uneven_accumulation(tmp_path):
    """Six rows, batches of four: one line over both batches counts every pair once."""
    run = trainer(tmp_path, data=pairs(6), max_steps=2, logging_steps=2, learning_rate=0.0, regularizer="none")
    run.train()
    whole = run.evaluate(pairs(6))
    assert logged(run, "margin")[0] == pytest.approx(whole["eval_margin"], rel=1e-4)
    assert logged(run, "accuracy")[0] == whole["eval_accuracy"]


def test_several_evaluation_sets_keep_their_names(tmp_path):
    run = trainer(tmp_path, evaluation={"a": pairs(4, seed=1), "b": pairs(4, seed=2)})
    metrics = run.evaluate()
    assert {"eval_a_accuracy", "eval_b_accuracy", "eval_a_loss", "eval_b_loss"} <= set(metrics)


def test_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(
        tmp_path,
        evaluation=pairs(8, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=5.0,  # gets worse: the best is not the last
    )
    run.train()
    losses = logged(run, "eval_loss")
    assert min(losses) != losses[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- ways of training


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_accumulation_equals_a_large_batch(tmp_path, kind):
    common = {"max_steps": 2, "optim": "sgd", "regularizer": kind, "alpha": 0.5, "lr_scheduler_type": "constant"}
    large = trainer(tmp_path / "a", grm().double(), per_device_train_batch_size=8, **common)
    small = trainer(
        tmp_path / "b",
        grm().double(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **common,
    )
    large.train()
    small.train()
    for (name, one), other in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("kind", ["none", "sft", "dpo"])
def test_a_token_budget_changes_memory_only(tmp_path, kind, layout, monkeypatch):
    """Batches of 8 pairs; at most 150 tokens of them at once; and that under accumulation."""
    monkeypatch.setattr(torch, "float32", torch.float64)  # norms round to float32 in any model
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    common = {"regularizer": kind, "alpha": 0.5, "layout": layout, "optim": "sgd", "lr_scheduler_type": "constant"}
    common |= {"max_steps": 3, "center_rewards_coefficient": 0.1}
    ways = {
        "whole": {"per_device_train_batch_size": 8},
        "budget": {"per_device_train_batch_size": 8, "max_tokens_per_batch": 150},
        "accumulated": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_tokens_per_batch": 150,
        },
        "alone": {"per_device_train_batch_size": 8, "max_tokens_per_batch": 1},
    }
    data, tested = pairs(16), pairs(7, seed=1)
    runs = {}
    for name, way in ways.items():
        run = runs[name] = trainer(tmp_path / name, grm().double(), data, tested, **common, **way)
        assert (name == "whole") == ("parts" not in batch_of(run))
        run.train()
    batch = runs["budget"].data_collator([runs["budget"].train_dataset[i] for i in range(8)])["parts"]
    assert len(batch) > 1 and len({part["input_ids"].shape for part in batch}) > 1
    assert len(runs["alone"].data_collator([runs["alone"].train_dataset[i] for i in range(8)])["parts"]) == 8
    right = runs.pop("whole")
    expected = right.evaluate()
    predicted = right.predict(right.eval_dataset).predictions
    for run in runs.values():
        for (name, one), other in zip(right.model.named_parameters(), run.model.named_parameters(), strict=True):
            torch.testing.assert_close(other[1], one, rtol=1e-10, atol=1e-12, msg=name)
        for line, other in zip(right.state.log_history[:3], run.state.log_history[:3], strict=True):
            for name in line.keys() - {"tokens_per_second"}:
                assert other[name] == pytest.approx(line[name], rel=1e-6, abs=1e-8), name
        found = run.evaluate()
        for name in ("loss", "accuracy", "margin", "min_reward", "max_reward", "pair_loss"):
            assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-9, abs=1e-12), name
        assert np.allclose(run.predict(run.eval_dataset).predictions, predicted, rtol=1e-9, atol=1e-12)
        assert run.state.total_flos > 0


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_adapter_and_head_only(tmp_path, target, checkpointing):
    config = LoraConfig(r=4, target_modules=target, task_type="SEQ_CLS")
    run = trainer(tmp_path, peft_config=config, gradient_checkpointing=checkpointing, alpha=0.5)
    assert config.modules_to_save in (None, [])  # the user's object is left alone
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in moved)
    rest = {name for name in moved if "lora_" not in name}
    assert rest and all("score.modules_to_save" in name for name in rest)
    assert not [name for name in before if "lora_" in name and ("lm_head" in name or "score" in name)]


def test_bf16_trains(tmp_path):
    run = trainer(tmp_path, bf16=True, alpha=0.5)
    run.train()
    assert run.model.score.out.weight.dtype == torch.float32
    assert all(math.isfinite(loss) for loss in logged(run, "loss"))


@pytest.mark.skipif(
    not (is_bitsandbytes_available() and torch.cuda.is_available()), reason="needs bitsandbytes and a CUDA device"
)
def test_qlora_trains(tmp_path):
    base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "lm")
    run = GRMRewardTrainer(
        model=str(tmp_path / "lm"),
        args=settings(tmp_path / "run", use_cpu=False, bf16=True),
        train_dataset=pairs(),
        processing_class=TOKENIZER,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        peft_config=lora(),
    )
    run.train()
    assert all(math.isfinite(loss) for loss in logged(run, "loss"))


@pytest.mark.parametrize("start", ["base", "grm"])
def test_a_model_by_its_folder(tmp_path, start):
    folder = tmp_path / "start"
    (base() if start == "base" else grm()).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    run = GRMRewardTrainer(
        model=str(folder),
        args=settings(tmp_path / "run", model_init_kwargs={"head_type": "linear"} if start == "base" else None),
        train_dataset=pairs(),
    )
    run.train()
    assert run.model.config.head_type == ("linear" if start == "base" else "mlp")
    assert run.model.dtype == torch.float32
    assert run.model.config.max_sequence_length == 1024


# ------------------------------------------------------------------------------------------ checkpoints in other hands


def scores_in_a_clean_process(folder, chats):
    """Rewards from a process that cannot import grm_hf, through the Auto class and remote code."""
    code = f"""
        import sys
        sys.modules["grm_hf"] = None
        import json, torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
        scores = []
        for chat in json.loads({json.dumps(chats)!r}):
            inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
            scores.append(model(**inputs).logits.item())
        print("SCORES", json.dumps(scores))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=folder.parent.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("SCORES", 1)[1])


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_every_checkpoint_loads_in_a_clean_process(tmp_path, adapter):
    run = trainer(
        tmp_path / "run", save_strategy="steps", save_steps=2, peft_config=lora() if adapter else None, alpha=0.5
    )
    run.train()
    run.save_model()
    first = tmp_path / "run" / "checkpoint-2"
    assert (first / "README.md").is_file()
    assert scores_in_a_clean_process(tmp_path / "run" / "checkpoint-4", CHATS) == pytest.approx(
        scores_here(run.model), rel=1e-5
    )
    assert scores_in_a_clean_process(first, CHATS) != pytest.approx(scores_here(run.model), rel=1e-3)
    assert scores_in_a_clean_process(tmp_path / "run", CHATS) == pytest.approx(scores_here(run.model), rel=1e-5)


def test_an_adapter_carries_its_head_and_merges(tmp_path):
    run = trainer(tmp_path / "run", peft_config=lora(), alpha=0.5)
    run.train()
    run.save_model()
    keys = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert {key for key in keys if ".score." in key}
    expected = scores_here(run.model)
    merged = merge_adapter(str(tmp_path / "run"), str(tmp_path / "merged" / "model"))
    assert scores_here(merged) == pytest.approx(expected, rel=1e-4)
    verify(str(tmp_path / "merged" / "model"))  # by the adapter's golden rows
    assert not (tmp_path / "merged" / "model" / "adapter_config.json").exists()
    assert scores_in_a_clean_process(tmp_path / "merged" / "model", CHATS) == pytest.approx(expected, rel=1e-4)


def test_merge_refuses_an_adapter_without_head(tmp_path):
    run = trainer(tmp_path / "run", peft_config=lora())
    run.save_model()
    config = tmp_path / "run" / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["modules_to_save"] = None
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="does not carry the reward head"):
        merge_adapter(str(tmp_path / "run"), str(tmp_path / "merged"))
    with pytest.raises(ValueError, match="not an adapter folder"):
        merge_adapter(str(tmp_path), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_base_folder_of_other_adapters_is_not_overwritten(tmp_path):
    trainer(tmp_path, peft_config=lora()).save_model()
    trainer(tmp_path, peft_config=lora())  # the same body again: kept
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another"):
        trainer(tmp_path, grm(seed=1), peft_config=lora())
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == weights


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_resumed_equals_uninterrupted(tmp_path, adapter, kind):
    def make(folder, steps):
        return trainer(
            tmp_path / folder,
            peft_config=lora() if adapter else None,
            regularizer=kind,
            alpha=0.5,
            max_steps=steps,
            save_strategy="steps",
            save_steps=3,
            lr_scheduler_type="constant",
        )

    straight = make("straight", 6)
    straight.train()
    make("cut", 3).train()
    resumed = make("cut", 6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same_weights(straight.model, resumed.model)
    assert logged(straight, "loss") == logged(resumed, "loss")


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """The process is killed while it trains; a new one finds the last complete checkpoint."""
    folder = tmp_path / "killed"
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from transformers import TrainerCallback
        import trainers as t

        class Slow(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                time.sleep(0.2)

        run = t.trainer({str(folder)!r}, alpha=0.5, max_steps=60, save_strategy="steps", save_steps=1,
                        lr_scheduler_type="constant", extra={{"callbacks": [Slow()]}})
        run.train()
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ})
    deadline = time.time() + 120
    while not (folder / "checkpoint-3" / "trainer_state.json").exists() and time.time() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = int(_last_complete_checkpoint(folder).split("-")[-1])
    assert 2 <= done < 60  # the third may have been killed while it was written
    torn = folder / f"checkpoint-{done + 1}"  # what a kill in the middle of saving leaves behind
    torn.mkdir(exist_ok=True)
    (torn / "model.safetensors").write_bytes(b"half")
    steps = done + 2
    common = {"alpha": 0.5, "max_steps": steps, "lr_scheduler_type": "constant"}
    resumed = trainer(folder, save_strategy="steps", save_steps=1, **common)
    resumed.train(resume_from_checkpoint=True)
    straight = trainer(tmp_path / "straight", **common)
    straight.train()
    assert same_weights(straight.model, resumed.model)


# ---------------------------------------------------------------------------------------------------- reference of dpo


def batch_of(run):
    return run.data_collator([run.train_dataset[i] for i in range(4)])


def test_adapter_off_equals_a_second_frozen_model(tmp_path):
    run = trainer(tmp_path, peft_config=lora(), regularizer="dpo", alpha=0.5)
    run.train()
    inputs = batch_of(run)
    ours = run._reference_logps(run.model, inputs)
    frozen = grm()  # never trained
    assert torch.allclose(ours, run.response_logps(frozen, inputs), atol=1e-4)
    assert not torch.allclose(ours, run.response_logps(run.model, inputs), atol=1e-2)


@pytest.mark.parametrize("kind", ["precompute", "model"])
def test_precomputed_equals_live(tmp_path, kind):
    run = trainer(tmp_path, regularizer="dpo", reference=kind, alpha=0.5)
    run.train()
    assert ("ref_chosen_logps" in run.train_dataset.column_names) == (kind == "precompute")
    inputs = batch_of(run)
    ours = run._reference_logps(run.model, inputs)
    assert torch.allclose(ours, run.response_logps(grm(), inputs), atol=1e-4)


def test_precomputed_values_are_reused_and_refused_when_stale(tmp_path, monkeypatch, caplog):
    computed = []
    original = reference._compute

    def counted(run, dataset, name):
        computed.append(len(dataset))
        return original(run, dataset, name)

    monkeypatch.setattr(reference, "_compute", counted)
    make = {"regularizer": "dpo", "alpha": 0.5}
    first = trainer(tmp_path, **make)
    assert computed == [16]
    again = trainer(tmp_path, **make)
    assert computed == [16, reference.LIVE_ROWS]  # the live check only
    assert again.train_dataset["ref_chosen_logps"][:] == first.train_dataset["ref_chosen_logps"][:]
    for other in (
        {"model": grm(seed=1)},
        {"data": pairs(seed=9)},
        {"max_length": 24},
    ):
        computed.clear()
        run = trainer(tmp_path, **make, **other)
        assert computed == [16]
        inputs = batch_of(run)
        assert torch.allclose(inputs.pop("ref_logps"), run.response_logps(run.model, inputs), atol=1e-4)
    # A file that says it fits but does not: the rows computed live show it.
    path = tmp_path / "reference_logps" / "train.safetensors"
    trainer(tmp_path, **make)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        mark, values = file.metadata(), file.get_tensor("logps")
    save_file({"logps": values + 1}, path, metadata=mark)
    with pytest.raises(ValueError, match="Delete the file"):
        trainer(tmp_path, **make)


# -------------------------------------------------------------------------------------------------------------- memory


class _Widest(TorchDispatchMode):
    """Rows of the largest tensor with as many columns as the vocabulary, of all that any operation returns."""

    def __init__(self, vocabulary, weights):
        super().__init__()
        self.vocabulary, self.weights, self.rows = vocabulary, weights, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("kind", TEXT_LOSSES)
def test_a_step_never_holds_logits_of_more_than_a_chunk(tmp_path, kind, monkeypatch):
    from grm_hf import logprobs

    monkeypatch.setattr(logprobs, "ROWS", 8)
    run = trainer(tmp_path, regularizer=kind, alpha=0.5, per_device_train_batch_size=8)
    batch = run.data_collator([run.train_dataset[i] for i in range(8)])
    assert len(batch["text_index"]) > 64
    with _Widest(len(TOKENIZER), run.model) as widest:
        run.compute_loss(run.model, dict(batch)).backward()
    assert 0 < widest.rows <= 8 or widest.rows == 16  # 16 = hidden size: the transposed head, not logits


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_memory_follows_the_token_budget(tmp_path, layout):
    from torch.profiler import ProfilerActivity, profile

    peaks = []
    for budget in (None, 100):
        run = trainer(tmp_path, regularizer="sft", layout=layout, max_tokens_per_batch=budget)
        run.current_gradient_accumulation_steps = 1
        batch = run.data_collator([run.train_dataset[i] for i in range(16)])
        run.training_step(run.model, batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run.training_step(run.model, batch)
        alive = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        peaks.append(np.cumsum(alive).max())
    assert peaks[1] < peaks[0] / 4


def test_prompt_tokens_never_reach_the_language_model_head(tmp_path):
    """Only positions that predict a response token have a gradient through the head."""
    run = trainer(tmp_path, regularizer="sft", alpha=1.0)
    example = run.train_dataset[0]
    batch = run.data_collator([example])
    starts, width = example["chosen_start"], len(example["chosen_ids"])
    assert len(batch["text_index"]) == width - starts
    assert batch["text_targets"].tolist() == example["chosen_ids"][starts:]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"regularizer": "kl"}, "must be one of"),
        ({"pair_loss": "hinge"}, "must be one of"),
        ({"overlength": "cut"}, "must be one of"),
        ({"layout": "tree"}, "must be one of"),
        ({"reference": "ema"}, "must be one of"),
        ({"alpha": 1.5}, r"must be in \[0, 1\]"),
        ({"beta": 0.0}, "must be above 0"),
        ({"label_smoothing": 0.5}, r"must be in \[0, 0.5\)"),
        ({"freeze_backbone": True}, "leaves nothing for the text loss"),
        ({"max_tokens_per_batch": 0}, "must be at least 1"),
    ],
)
def test_settings_are_checked(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        settings(tmp_path, **wrong)


def test_an_ignored_reference_is_said(tmp_path):
    with pytest.warns(UserWarning, match="is ignored"):
        settings(tmp_path, reference="model", regularizer="sft")


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="from_base"):
        trainer(tmp_path, base())
    with pytest.raises(ValueError, match="needs a GRMRewardConfig"):
        GRMRewardTrainer(model=grm(), args=settings(tmp_path, RewardConfig), train_dataset=pairs())
    with pytest.raises(ValueError, match="processing_class"):
        GRMRewardTrainer(model=grm(), args=settings(tmp_path), train_dataset=pairs())
    with pytest.raises(ValueError, match="streaming"):
        trainer(tmp_path, data=pairs().to_iterable_dataset(), regularizer="dpo")
    with pytest.raises(ValueError, match="needs an adapter"):
        trainer(tmp_path, regularizer="dpo", reference="adapter_off")
    with pytest.raises(ValueError, match="no `margin` column"):
        trainer(tmp_path, pair_loss="scaled").train()


def test_a_collator_that_gives_no_text_is_refused(tmp_path, caplog):
    from trl.trainer.reward_trainer import DataCollatorForPreference

    run = trainer(
        tmp_path, extra={"data_collator": DataCollatorForPreference(pad_token_id=0)}, max_tokens_per_batch=50
    )
    assert "max_tokens_per_batch is ignored" in caplog.text
    with pytest.raises(ValueError, match="PairCollator"):
        run.train()


def test_a_streaming_dataset_trains(tmp_path):
    run = trainer(tmp_path, data=pairs().to_iterable_dataset(), max_steps=3)
    run.train()
    assert run.state.global_step == 3
    assert run.data_counts["train"].rows > 0


def test_what_was_cut_or_dropped_is_counted(tmp_path):
    run = trainer(tmp_path / "a", evaluation=pairs(5, seed=3), max_length=24)
    assert run.data_counts["train"].truncated > 0 and run.data_counts["eval"].rows == 5
    whole = trainer(tmp_path / "b").train_dataset
    lengths = [max(len(c), len(r)) for c, r in zip(whole["chosen_ids"], whole["rejected_ids"], strict=True)]
    limit = sorted(lengths)[8]
    run = trainer(tmp_path / "c", max_length=limit, overlength="drop")
    assert run.data_counts["train"].dropped == sum(n > limit for n in lengths) > 0
    assert len(run.train_dataset) == sum(n <= limit for n in lengths)
    with pytest.raises(ValueError, match="row 0"):
        trainer(tmp_path / "d", max_length=24, overlength="error")


def test_a_peft_model_of_the_users_own(tmp_path):
    model = grm()
    model.save_pretrained(tmp_path / "start")
    start = GRMForSequenceClassification.from_pretrained(tmp_path / "start")
    from peft import get_peft_model

    run = trainer(tmp_path / "run", get_peft_model(start, lora(modules_to_save=["score"])), regularizer="dpo")
    run.train()
    run.save_model()
    again = PeftModel.from_pretrained(
        GRMForSequenceClassification.from_pretrained(tmp_path / "start"), tmp_path / "run"
    )
    assert scores_here(again) == pytest.approx(scores_here(run.model), rel=1e-5)


# --------------------------------------------------------------------------- what happened silently in version 0.1.0


@pytest.mark.parametrize("kind", ["none", "sft"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_auxiliary_loss_of_experts_is_the_familys_own(tmp_path, family, layout, kind):
    lm = tiny_lm(family, vocab_size=len(TOKENIZER), output_router_logits=True, router_aux_loss_coef=0.5)
    model = GRMForSequenceClassification.from_base(lm, head_hidden_size=8)
    run = trainer(tmp_path, model, regularizer=kind, alpha=0.5, layout=layout, max_steps=1, max_length=60)
    assert trainer(tmp_path, model, regularizer="sft", max_length=60).layout == "packed"
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    run.train_dataset = run.train_dataset.select(range(4))
    sequences = [run.train_dataset[i][f"{side}_ids"] for side in ("chosen", "rejected") for i in range(4)]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    theirs = lm(ids, attention_mask=mask).aux_loss
    with_aux = run.compute_loss(run.model, dict(batch))
    run._router_weight, weight = 0.0, run._router_weight
    without = run.compute_loss(run.model, dict(batch))
    run._router_weight = weight
    assert theirs > 0 and with_aux.item() == pytest.approx((without + 0.5 * theirs).item(), rel=1e-5)
    run._averages["train"].take()
    run.train()
    assert logged(run, "aux_loss") == [pytest.approx(theirs.item(), rel=1e-5)]
    assert logged(run, "loss")[0] == pytest.approx(with_aux.item(), rel=1e-5)


@pytest.mark.parametrize("layout", ["auto", "padded", "packed", "shared_prefix"])
def test_a_shared_prefix_beside_the_auxiliary_loss_is_said(tmp_path, layout, caplog):
    for routers in (False, True):
        lm = tiny_lm("mixtral", vocab_size=len(TOKENIZER), output_router_logits=routers)
        model = GRMForSequenceClassification.from_base(lm, head_hidden_size=8)
        caplog.clear()
        run = trainer(tmp_path, model, layout=layout, max_length=60)
        said = "counts a shared prefix once in the auxiliary loss" in caplog.text
        assert said == (routers and layout == "shared_prefix")
        assert layout == "auto" or run.layout == layout


@pytest.mark.parametrize("kind", ["none", "sft"])
def test_a_scorer_judges_the_layout_by_the_precision_of_the_forward(tmp_path, kind):
    """Autocast lies around the forward of a trained model: hidden states are float32, with the error of bfloat16."""
    run = trainer(tmp_path, bf16=True, regularizer=kind)
    run.train()
    assert run.model.dtype == torch.float32
    chats = [row["prompt"] + row["chosen"] for row in rows(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = GRMScorer(run.model, TOKENIZER)
    assert scorer.layout == "shared_prefix"
    padded = GRMScorer(run.model, TOKENIZER, layout="padded").score(chats)
    assert scorer.score(chats) == pytest.approx(padded, rel=5e-2, abs=5e-2)


@pytest.mark.parametrize("pair_loss", ["margin", "scaled"])
def test_an_evaluation_set_without_margins_is_measured_without(tmp_path, pair_loss, caplog):
    margins = np.linspace(0, 2, 16).tolist()
    run = trainer(
        tmp_path,
        data=pairs(margin=margins),
        evaluation={"plain": pairs(7, seed=1), "with": pairs(7, seed=1, margin=margins[:7])},
        eval_strategy="steps",
        eval_steps=2,
        pair_loss=pair_loss,
        regularizer="none",
    )
    run.train()
    plain, with_margin = logged(run, "eval_plain_loss")[-1], logged(run, "eval_with_loss")[-1]
    assert "evaluation data has no `margin`" in caplog.text
    found = run.predict(run.eval_dataset["plain"]).predictions
    differences = found[:, 0] - found[:, 1]
    assert plain == pytest.approx(np.log1p(np.exp(-differences)).mean(), rel=1e-5)
    assert with_margin != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("family", ["opt", "bloom", "falcon", "gpt2", "phi", "qwen3"])
def test_no_dropout_is_left(tmp_path, family):
    """TRL sets modules to 0; families drop by numbers, too."""
    noisy = {"opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}, "bloom": {"hidden_dropout": 0.5},
             "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5}, "gpt2": {"resid_pdrop": 0.5},
             "phi": {"attention_dropout": 0.5, "resid_pdrop": 0.5}, "qwen3": {"attention_dropout": 0.5}}  # fmt: skip
    lm = tiny_lm(family, vocab_size=len(TOKENIZER), max_position_embeddings=128, **noisy[family])
    model = GRMForSequenceClassification.from_base(lm, head_hidden_size=8, head_dropout=0.5)
    for disable in (False, True):
        run = trainer(tmp_path, model, alpha=0.5, max_length=100, disable_dropout=disable, layout="padded")
        batch = run.data_collator([run.train_dataset[i] for i in range(4)])
        run.model.train()
        found = [run.compute_loss(run.model, dict(batch)).item() for _ in range(3)]
        assert len(set(found)) == (1 if disable else 3)


NOISY_ADAPTERS = {
    "LoraConfig": {"r": 2, "lora_dropout": 0.5, "init_lora_weights": False},
    "LoHaConfig": {"r": 2, "rank_dropout": 0.5, "module_dropout": 0.5, "init_weights": False},
    "LoKrConfig": {"r": 2, "rank_dropout": 0.5, "module_dropout": 0.5, "init_weights": False},
    "BOFTConfig": {"boft_block_size": 4, "boft_dropout": 0.5, "init_weights": False},
}


@pytest.mark.parametrize("kind", NOISY_ADAPTERS)
def test_no_dropout_is_left_in_adapters(tmp_path, caplog, kind):
    for disable in (False, True):
        adapter = getattr(peft, kind)(target_modules=["q_proj", "v_proj"], **NOISY_ADAPTERS[kind])
        given = {"alpha": 0.5, "disable_dropout": disable, "layout": "padded"}
        run = trainer(tmp_path / str(disable), peft_config=adapter, **given)
        batch = run.data_collator([run.train_dataset[i] for i in range(4)])
        run.model.train()
        found = [run.compute_loss(run.model, dict(batch)).item() for _ in range(4)]
        assert (len(set(found)) == 1) == disable
    rates = [name for name in NOISY_ADAPTERS[kind] if name.endswith("dropout")]
    assert all(f"`{name}=0.5` is ignored" in caplog.text for name in rates)


def test_tokens_and_positions_outside_of_the_model_are_refused(tmp_path):
    small = GRMForSequenceClassification.from_base(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER) - 1, hidden_size=16, intermediate_size=32,
                                     num_hidden_layers=1, num_attention_heads=2)), head_hidden_size=8)  # fmt: skip
    with pytest.raises(ValueError, match=rf"16 rows of the train .*\n.*row 0, `chosen`: it has the token .* has {len(TOKENIZER) - 1} rows"):  # fmt: skip  # noqa: E501
        trainer(tmp_path, small)
    for family in ("gpt2", "opt"):
        lm = tiny_lm(family, vocab_size=len(TOKENIZER), max_position_embeddings=40)
        model = GRMForSequenceClassification.from_base(lm, head_hidden_size=8)
        for stream in (False, True):
            data = pairs(16, seed=3).to_iterable_dataset() if stream else pairs(16, seed=3)
            with pytest.raises(ValueError, match="it has .* tokens, and the model has an embedding for 40 positions"):
                trainer(tmp_path, model, data, max_steps=4).train()
        trainer(tmp_path, model, max_length=40, max_steps=1, alpha=0.5, layout="padded").train()


def test_settings_that_would_be_ignored_are_said_or_obeyed(tmp_path):
    with pytest.warns(UserWarning, match="`label_smoothing_factor=0.1` is ignored.*set `label_smoothing`"):
        settings(tmp_path, label_smoothing_factor=0.1)
    names = {field.name for field in __import__("dataclasses").fields(GRMRewardConfig)}
    group = {"train_sampling_strategy": "group_by_length"} if "train_sampling_strategy" in names else {
        "group_by_length": True}  # fmt: skip
    run = trainer(tmp_path, data=pairs(64), per_device_train_batch_size=2, **group)
    order = list(run._get_train_sampler(run.train_dataset))
    lengths = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in run.train_dataset]
    grouped = np.array([lengths[i] for i in order]).reshape(-1, 2)
    assert sorted(order) == list(range(64))
    assert grouped.std(1).mean() < np.std(lengths) / 3
    run.train()


def test_a_stream_of_which_nothing_is_left_is_an_error(tmp_path):
    run = trainer(tmp_path, data=pairs().to_iterable_dataset(), max_length=10, overlength="drop", max_steps=3)
    with pytest.raises(ValueError, match="Training made no step: .*16 rows, 16 dropped"):
        run.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_stream_lost_is_said_at_the_end(tmp_path, workers, caplog):
    expected = trainer(tmp_path / "a", max_length=24).data_counts["train"]
    data = pairs().to_iterable_dataset(num_shards=2)
    run = trainer(tmp_path / "b", data=data, max_length=24, max_steps=8, dataloader_num_workers=workers)
    run.train()
    assert run.data_counts["train"] == expected and expected.truncated > 0
    assert str(expected) in caplog.text


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_streams_and_dispatch_give_the_numbers_of_a_map(tmp_path, layout, caplog):
    common = {"regularizer": "dpo_noref", "alpha": 0.5, "layout": layout, "eval_strategy": "steps", "eval_steps": 2}
    tested = pairs(7, seed=1)
    right = trainer(tmp_path / "a", evaluation=tested, **common)
    right.train()
    stream = trainer(tmp_path / "b", evaluation=tested.to_iterable_dataset(), **common)
    dispatch = trainer(tmp_path / "c", evaluation=tested, accelerator_config={"dispatch_batches": True}, **common)
    assert "`dispatch_batches=True` is ignored" in caplog.text
    for run in (stream, dispatch):
        run.train()
        for name in ("loss", "eval_loss", "eval_accuracy", "eval_margin", "eval_text_loss", "eval_perplexity"):
            assert logged(run, name) == logged(right, name) != [], name
    assert stream.data_counts["eval"] == right.data_counts["eval"]
    again = right.evaluate(tested.to_iterable_dataset())
    assert again["eval_loss"] == logged(right, "eval_loss")[-1]


def test_a_saved_folder_is_loaded_before_training_is_called_done(tmp_path, monkeypatch):
    loaded = []
    from grm_hf.training import trainer as module

    original = module.golden.verify
    monkeypatch.setattr(module.golden, "verify", lambda *a, **k: (loaded.append(str(a[0])), original(*a, **k))[1])
    run = trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    run.train()
    run.save_model()
    assert loaded == [str(tmp_path / "a" / "checkpoint-2")]  # the first one, and once
    broken = trainer(tmp_path / "b", save_strategy="steps", save_steps=2)
    save = type(broken.model).save_pretrained

    def other_weights(self, folder, **kwargs):
        kwargs.pop("state_dict", None)
        save(grm(seed=5), folder, **kwargs)

    monkeypatch.setattr(type(broken.model), "save_pretrained", other_weights)
    with pytest.raises(RuntimeError, match="does not load as the model that was trained"):
        broken.train()
    assert broken.state.global_step == 2


# -------------------------------------------------------------------------------------------------------------- suites


@pytest.mark.parametrize("several", [False, True])
def test_suites_run_at_evaluations_and_choose_the_best_checkpoint(tmp_path, several):
    from official_files import FILES, write

    from grm_hf.evaluation import evaluate

    write(tmp_path / "hhh", FILES["hhh"]())
    sets = {"a": pairs(4, seed=1), "b": pairs(4, seed=2)} if several else pairs(4, seed=1)
    run = trainer(
        tmp_path / "out",
        grm(),
        pairs(16),
        sets,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        learning_rate=0.5,
        eval_suites=[f"hhh={tmp_path / 'hhh'}"],
        eval_suite_limit=6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_hhh/score",
    )
    run.train()
    logged = [(row["step"], row["eval_hhh/score"]) for row in run.state.log_history if "eval_hhh/score" in row]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert run.state.best_metric == max(score for _, score in logged)
    found = evaluate(run.model, "hhh", tmp_path / "hhh", tokenizer=TOKENIZER, limit=6)
    assert found.summary["score"] == run.state.best_metric  # the model that was loaded at the end
    step = int(run.state.best_model_checkpoint.split("-")[-1])
    assert dict(logged)[step] == run.state.best_metric


def test_suites_that_could_not_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`eval_suites` has \['hh'\]; there are rewardbench, "):
        settings(tmp_path, eval_suites=["hh"], eval_strategy="steps")
    with pytest.raises(ValueError, match="eval_strategy is 'no'"):
        settings(tmp_path, eval_suites=["hhh"])
    with pytest.warns(UserWarning, match="`eval_suite_limit` is ignored"):
        settings(tmp_path, eval_suite_limit=3)
