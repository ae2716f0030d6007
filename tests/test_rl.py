"""Reward models in TRL's trainers: the numbers that reach a trainer, one real step of every recipe, and the recipes
for other frameworks by their call signatures. PPO runs where TRL has it (up to 1.12), the rest everywhere."""

import importlib.util
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rollouts import ANSWERS, PROMPTS, completions, expected, grm
from tiny import OTHER_HEADS, chatml_tokenizer, llama_tokenizer, tiny_llama, with_head
from transformers import AutoModelForSequenceClassification


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from grm_hf import GRMForSequenceClassification  # noqa: E402
from grm_hf.rewards import grm_reward_func, ppo_reward_model, self_test  # noqa: E402
from grm_hf.scoring import GoldenError, save_golden  # noqa: E402


pytestmark = pytest.mark.trainer
needs_ppo = pytest.mark.skipif(
    importlib.util.find_spec("trl.experimental.ppo") is None, reason="TRL has no PPO trainer since 1.13"
)

ROOT = Path(__file__).parent.parent
TOKENIZER = chatml_tokenizer()
COMMON = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "0.01"]
COMMON += ["--gradient_checkpointing", "false", "--save_strategy", "no", "--logging_steps", "1"]


def policy(tokenizer=TOKENIZER):
    return tiny_llama(tokenizer, seed=5, num_hidden_layers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a reward model with its tokenizer, one with another tokenizer, and prompts."""
    root = tmp_path_factory.mktemp("rl")
    llama = llama_tokenizer()
    model = grm()
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    sibling = grm(seed=3)
    sibling.config.reward_mean, sibling.config.reward_std = -0.5, 1.5
    for name, saved, tokenizer in (
        ("policy", policy(), TOKENIZER),
        ("grm", model, TOKENIZER),
        ("other", grm(llama), llama),
        ("sibling", sibling, TOKENIZER),
    ):
        saved.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        if name != "policy":
            save_golden(saved, tokenizer, root / name)
    prompts = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[2]}] * 4
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return root


def load(path):
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def moved(before, after):
    return max((a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True))


# --------------------------------------------------------------------------------------------- numbers inside trainers


def group_trainer(folder, kind, reward, tmp_path, reward_tokenizer=None):
    import trl

    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    settings = dict(per_device_train_batch_size=2, num_generations=2, max_completion_length=4, max_steps=1)
    settings |= dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    return trainer(
        model=str(folder / "policy"),
        reward_funcs=reward,
        args=config(str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": PROMPTS[0]}] * 4),
        processing_class=TOKENIZER,
        reward_processing_classes=reward_tokenizer,
    )


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_module_folder_and_callable_give_the_same_numbers(kind, folders, tmp_path):
    """Everything that a trainer takes, asked by the trainer's own method for the rewards of the same completions."""
    module = AutoModelForSequenceClassification.from_pretrained(folders / "grm")
    rewards = [module, str(folders / "grm"), grm_reward_func(str(folders / "grm"), name="callable")]
    trainer = group_trainer(folders, kind, rewards, tmp_path)
    assert trainer.reward_func_names == ["grm", "grm", "callable"]
    trainer.model.eval()
    with torch.no_grad():
        found = trainer._calculate_rewards([{"prompt": p} for p in PROMPTS], PROMPTS, completions(), [[1]] * 3)
    by_hand = torch.tensor(expected(grm(), TOKENIZER))
    torch.testing.assert_close(found, by_hand[:, None].expand(3, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_every_head_gives_grpo_its_number(head, folders, tmp_path):
    model = with_head(head, TOKENIZER)
    by_hand = torch.tensor(expected(model, TOKENIZER))
    model.save_pretrained(tmp_path / "grm")
    TOKENIZER.save_pretrained(tmp_path / "grm")
    save_golden(model, TOKENIZER, tmp_path / "grm")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "grm")
    rewards = [module, str(tmp_path / "grm"), grm_reward_func(str(tmp_path / "grm"))]
    trainer = group_trainer(folders, "GRPO", rewards, tmp_path / "out")
    trainer.model.eval()
    with torch.no_grad():
        found = trainer._calculate_rewards([{"prompt": p} for p in PROMPTS], PROMPTS, completions(), [[1]] * 3)
    torch.testing.assert_close(found, by_hand[:, None].expand(3, 3), atol=1e-5, rtol=1e-5)


def test_online_dpo_gets_the_same_numbers(folders, tmp_path):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    module = AutoModelForSequenceClassification.from_pretrained(folders / "grm")
    settings = dict(max_new_tokens=4, max_length=64, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    sums = []
    for reward in (module, str(folders / "grm"), grm_reward_func(str(folders / "grm"))):
        trainer = OnlineDPOTrainer(
            model=policy(),
            reward_funcs=reward,
            args=OnlineDPOConfig(str(tmp_path), **settings),
            train_dataset=Dataset.from_list([{"prompt": PROMPTS[0]}] * 2),
            processing_class=TOKENIZER,
            reward_processing_classes=TOKENIZER,
        )
        sums.append(trainer._calculate_rewards_from_functions(PROMPTS, completions(), [[1]] * 3))
    for found in sums:
        torch.testing.assert_close(found, torch.tensor(expected(grm(), TOKENIZER)), atol=1e-5, rtol=1e-5)


@needs_ppo
def test_trl_get_reward_reads_the_same_numbers(folders):
    """TRL's own function, on the wrapper and on the plain model."""
    from rollouts import rollout
    from trl.experimental.utils import get_reward

    ids, context, rows = rollout(TOKENIZER)
    by_hand = expected(grm(), TOKENIZER)
    for prompts in (None, rows):
        wrapped = ppo_reward_model(str(folders / "grm"), TOKENIZER, prompts=prompts)
        logits, rewards, _ = get_reward(wrapped, ids, TOKENIZER.pad_token_id, context)
        assert logits.shape == (*ids.shape, 1)
        assert rewards.tolist() == pytest.approx(by_hand, abs=1e-5)
    # The plain model reads where PPO stops: at EOS, in front of the line break that ChatML puts behind it.
    model = grm()
    _, plain, _ = get_reward(model, ids, TOKENIZER.pad_token_id, context)
    mask = ids != TOKENIZER.pad_token_id
    with torch.no_grad():
        forward = [model(row[real][None]).logits.item() for row, real in zip(ids, mask, strict=True)]
    assert plain.tolist() == pytest.approx(forward, abs=1e-5)
    assert plain.tolist() != pytest.approx(by_hand, abs=1e-3)


# --------------------------------------------------------------------------------------------------- recipes, one step


@pytest.mark.parametrize("recipe", ["grpo", "rloo", "online_dpo"])
def test_recipe_takes_a_step(recipe, folders, tmp_path):
    """With the reward model that has another tokenizer, and a LoRA policy for one of them."""
    if recipe != "online_dpo":
        own = ["--num_generations", "2", "--max_completion_length", "4", "--transform", "length_residual"]
    else:
        own = ["--max_new_tokens", "4", "--max_length", "64", "--lora"]
    trainer = load(ROOT / "examples" / f"{recipe}.py").main(
        ["--model", str(folders / "policy"), "--reward_model", str(folders / "other")]
        + ["--train", str(folders / "prompts.jsonl"), "--output_dir", str(tmp_path), "--max_steps", "1"]
        + ["--per_device_train_batch_size", "4", *own, *COMMON]
    )
    assert trainer.state.global_step == 1
    weights = "adapter_model.safetensors" if recipe == "online_dpo" else "model.safetensors"
    assert (tmp_path / weights).exists()
    if recipe != "online_dpo":
        assert any("rewards/other/mean" in row for row in trainer.state.log_history)
        assert moved(policy(), trainer.model) > 0


@needs_ppo
@pytest.mark.parametrize("reward_model", ["grm", "other"])
def test_ppo_recipe_takes_a_step(reward_model, folders, tmp_path):
    """Full training with the value model from the reward model, LoRA with it from the policy."""
    own = ["--lora"] if reward_model == "other" else ["--transform", "standardize"]
    trainer = load(ROOT / "examples" / "ppo.py").main(
        ["--model", str(folders / "policy"), "--reward_model", str(folders / reward_model), "--samples", "2"]
        + ["--train", str(folders / "prompts.jsonl"), "--output_dir", str(tmp_path), "--total_episodes", "4"]
        + ["--per_device_train_batch_size", "4", "--num_mini_batches", "1", "--num_ppo_epochs", "1"]
        + ["--response_length", "4", "--num_sample_generations", "1", "--local_rollout_forward_batch_size", "2"]
        + ["--per_device_eval_batch_size", "2", *own, *COMMON]
    )
    logged = next(row for row in trainer.state.log_history if "objective/scores" in row)
    values = [float(value) for name, value in logged.items() if name.startswith(("objective/", "loss/"))]
    assert len(values) >= 6 and all(map(math.isfinite, values))
    value = trainer.model.value_model
    assert isinstance(value, GRMForSequenceClassification)
    if reward_model == "grm":
        assert moved(grm().score, value.score) > 0
        assert moved(policy(), trainer.model.policy) > 0
        assert (tmp_path / "model.safetensors").exists()
    else:
        assert (tmp_path / "adapter_model.safetensors").exists()
    # The reward model stays as it is.
    assert moved(GRMForSequenceClassification.from_pretrained(folders / reward_model), trainer.reward_model) == 0


@needs_ppo
def test_ppo_recipe_refuses_a_value_model_that_would_not_learn(folders, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
    path = str(tmp_path / "adapter")
    get_peft_model(GRMForSequenceClassification.from_pretrained(folders / "grm"), config).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    with pytest.raises(ValueError, match="grm merge"):
        load(ROOT / "examples" / "ppo.py").main(
            ["--model", str(folders / "policy"), "--reward_model", path, "--output_dir", str(tmp_path / "out")]
            + ["--train", str(folders / "prompts.jsonl"), "--samples", "2", "--num_mini_batches", "1"]
            + ["--total_episodes", "4", "--per_device_train_batch_size", "4", *COMMON]
        )


# ------------------------------------------------------------------------------------------------------- the self-test


def test_self_test_stops_what_a_group_trainer_would_misread(folders, tmp_path):
    path = str(folders / "grm")
    module = AutoModelForSequenceClassification.from_pretrained(path)
    trainer = group_trainer(folders, "GRPO", [module, path, grm_reward_func(path), lambda **_: [0.0]], tmp_path)
    assert self_test(trainer) == [path] * 3

    with torch.no_grad():
        module.score.out.bias += 1  # as a head drawn at random would be
    with pytest.raises(GoldenError, match=r"grm' does not give here .* instead of .*grm_reward_func"):
        self_test(trainer)
    with torch.no_grad():
        module.score.out.bias -= 1
    module.score.dropout.p = 0.5
    module.train()
    with pytest.raises(GoldenError, match="evaluation mode"):
        self_test(trainer)
    module.eval()
    trainer.reward_processing_classes[0] = llama_tokenizer()
    with pytest.raises(GoldenError, match="reward_processing_classes"):
        self_test(trainer)


@needs_ppo
def test_self_test_stops_what_ppo_would_misread(folders, tmp_path):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    path = str(folders / "grm")
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4})
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "total_episodes": 4, "num_mini_batches": 1}

    def trainer(reward_model):
        return PPOTrainer(
            args=PPOConfig(str(tmp_path), **settings),
            processing_class=TOKENIZER,
            model=policy(),
            ref_model=None,
            reward_model=reward_model,
            value_model=grm(),
            train_dataset=data,
            eval_dataset=data,
        )

    assert self_test(trainer(ppo_reward_model(path, TOKENIZER))) == [path]
    # PPO would read it at EOS, not at the end of turn as it was trained.
    with pytest.raises(GoldenError, match=r"reward_model=ppo_reward_model"):
        self_test(trainer(GRMForSequenceClassification.from_pretrained(path)))


def test_loading_tests_itself(folders, tmp_path):
    """A folder whose weights are not those its golden rows belong to."""
    path = tmp_path / "tampered"
    shutil.copytree(folders / "grm", path)
    changed = grm()
    with torch.no_grad():
        changed.score.out.bias += 1
    changed.save_pretrained(path)
    for make in (grm_reward_func, lambda p, **kw: ppo_reward_model(p, TOKENIZER, **kw)):
        with pytest.raises(GoldenError, match="not those that were saved"):
            make(str(path))
        make(str(path), check=False)


def test_an_adapter_is_tested_by_its_own_rows(folders, tmp_path, caplog):
    adapted = get_peft_model(
        GRMForSequenceClassification.from_pretrained(folders / "grm"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False),
    )
    path = tmp_path / "adapter"
    adapted.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    save_golden(adapted, TOKENIZER, path)
    reward = grm_reward_func(str(path))
    assert reward.__name__ == "adapter"
    assert reward(PROMPTS, completions()) == pytest.approx(expected(adapted.eval(), TOKENIZER), abs=1e-5)
    assert reward(PROMPTS, completions()) != pytest.approx(expected(grm(), TOKENIZER), abs=1e-3)
    rows = json.loads((path / "golden_rows.json").read_text())
    rows["rows"][0]["score"] += 1
    (path / "golden_rows.json").write_text(json.dumps(rows))
    with pytest.raises(GoldenError, match="adapter"):
        grm_reward_func(str(path))
    # The module that TRL would get knows only the model below it.
    assert self_test(group_trainer(folders, "GRPO", reward.scorer.model, tmp_path, TOKENIZER)) == []


# ------------------------------------------------------------------------------------------------------- documentation


PAGE = (ROOT / "docs" / "reinforcement_learning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!-- needs: ppo -->\n)?```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    "code", [pytest.param(code, marks=needs_ppo if mark else []) for mark, code in BLOCKS], ids=range(len(BLOCKS))
)
def test_documented_code_runs(code, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in (("grm", "grm"), ("other-grm", "sibling"), ("policy", "policy")):
        os.symlink(folders / source, name)
    small = "use_cpu=True, bf16=False, report_to='none', save_strategy='no'"
    code = code.replace('GRPOConfig("out"', f'GRPOConfig("out", max_steps=1, max_completion_length=4, {small}')
    code = code.replace('PPOConfig("out"', f'PPOConfig("out", total_episodes=1, num_mini_batches=1, {small}')
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS] * 4)
    names = {
        "prompts": prompts.select(range(3)) if "answers" in code else prompts,
        "answers": completions(),
        "policy": policy(),
        "policy_tokenizer": TOKENIZER,
        "tokenized_prompts": Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8}),
    }
    exec(compile(code, "reinforcement_learning.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step > 0
    else:
        assert len(names["careful"](PROMPTS, completions())) == 3


# ---------------------------------------------------------------------------------------------------- other frameworks


def test_openrlhf_recipe(folders, monkeypatch):
    """As OpenRLHF's agent does it: the file is executed, and asked for one text at a time, by position, in threads."""
    file = ROOT / "examples" / "recipes" / "openrlhf_reward.py"
    monkeypatch.delenv("GRM_MODEL", raising=False)
    with pytest.raises(ValueError, match="GRM_MODEL"):
        load(file)
    monkeypatch.setenv("GRM_MODEL", str(folders / "grm"))
    reward_func = load(file).reward_func
    rendered = [TOKENIZER.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in PROMPTS]
    queries = [text + answer + TOKENIZER.eos_token for text, answer in zip(rendered, ANSWERS, strict=True)]

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda q, p: reward_func([q], [p], [None]), queries, rendered))
    by_hand = expected(grm(), TOKENIZER)
    assert [result["rewards"].item() for result in results] == pytest.approx(by_hand, abs=1e-5)
    assert all(set(result) == {"rewards", "scores", "extra_logs"} for result in results)
    assert all(0 <= result["scores"].item() <= 1 for result in results)
    assert reward_func(queries, rendered, [None] * 3)["rewards"].tolist() == pytest.approx(by_hand, abs=1e-5)
    with pytest.raises(ValueError, match="not the reward model's"):
        reward_func(["[INST] other template [/INST] answer"], ["[INST] other template [/INST]"], [None])


def test_verl_recipe(folders):
    """As verl's batch and naive reward managers and its reward loop do it: by keyword, with `reward_kwargs` behind."""
    module = load(ROOT / "examples" / "recipes" / "verl_reward.py")
    kwargs = {"model": str(folders / "grm")}
    extra = [{"prompt": prompt, "index": i} for i, prompt in enumerate(PROMPTS)]
    by_hand = expected(grm(), TOKENIZER)
    found = module.compute_scores(
        data_sources=["chat"] * 3, solution_strs=ANSWERS, ground_truths=[None] * 3, extra_infos=extra, **kwargs
    )
    assert found == pytest.approx(by_hand, abs=1e-5)
    one = module.compute_score(
        data_source="chat",
        solution_str=ANSWERS[1],
        ground_truth=None,
        extra_info=extra[1],
        reward_router_address=None,
        reward_model_tokenizer=None,
        **kwargs,
        transform="standardize",
    )
    assert one == pytest.approx((by_hand[1] - 0.25) / 2, abs=1e-5)
    beats = module.compute_score("chat", ANSWERS[1], None, extra[1], **kwargs, transform="log_sigmoid", reference=1.5)
    assert beats == pytest.approx(-math.log1p(math.exp(1.5 - by_hand[1])), abs=1e-5)
    with pytest.raises(ValueError, match="answer 0: its `extra_info` has no `prompt`"):
        module.compute_score("chat", "a", None, None, **kwargs)
