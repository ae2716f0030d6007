"""Policies trained against the proxies by GRPO and PPO, with gold and proxy reward along the way."""

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .answers import device, divergences, load_base, prompt_ids, sample, text_of
from .gold import gold_of
from .proxies import BASELINE, ENSEMBLES, machine, proxy_name
from .settings import Settings, prompts_of, read_unit


ALGORITHMS = {"grpo": "GRPO", "ppo": "PPO"}
PPO_NEEDS = "TRL up to 1.12: `pip install 'grm-hf[ppo]'` in an environment of its own, or `make lab`"


def available() -> list[str]:
    """The algorithms that this environment's TRL has."""
    spec = importlib.util.find_spec("trl.experimental")  # a look inside would import it, with a warning
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    ppo = any((Path(folder) / "ppo").is_dir() for folder in folders)
    return [name for name in ALGORITHMS if name != "ppo" or ppo]


def preload() -> None:
    """Imports the trainers."""
    from trl import GRPOTrainer  # noqa: F401

    from ..training import GRMRewardTrainer  # noqa: F401

    if "ppo" in available():
        importlib.import_module("trl.experimental.ppo")


def policy_name(algorithm: str, proxy: str, seed: int) -> str:
    return f"{algorithm}-{proxy}-{seed}"


def train_policy(output: Path, settings: Settings, algorithm: str, proxy: str, seed: int) -> dict:
    """
    Trains the initial policy against one proxy, without a penalty on its divergence, and measures it on the way.

    Returns:
        `dict`: for each set, `points` (`[step, KL, proxy, gold, tokens]`, means over prompts and answers; proxy
        standardised) and `gold`, the gold rewards of the last policy's answers, `(prompts, policy_samples)`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

    from ..rewards import RewardEnsemble

    tokenizer = AutoTokenizer.from_pretrained(output / "base", padding_side="left")
    policy: Any = AutoModelForCausalLM.from_pretrained(output / "base")
    members = settings.members if proxy in ENSEMBLES else 1
    method = BASELINE if proxy in ENSEMBLES else proxy
    folders = [
        str(output / "models" / proxy_name(settings.policy_labels, settings.policy_size, method, seed, member))
        for member in range(members)
    ]
    reward = RewardEnsemble(folders, how=ENSEMBLES[proxy][1]) if proxy in ENSEMBLES else folders[0]
    rewards = _reward_function(reward)
    points: dict[str, list] = {key: [] for key in settings.sets}
    last: dict[str, list] = {}

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % (settings.policy_steps // settings.evaluations) == 0:
                for key in settings.sets:
                    point, last[key] = _measure(
                        getattr(model, "policy", model), tokenizer, rewards, output, settings, key, seed
                    )
                    points[key].append([state.global_step, *point])

    for key in settings.sets:
        point, _ = _measure(policy.to(device(settings)), tokenizer, rewards, output, settings, key, seed)
        points[key].append([0, *point])
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        build = _grpo if algorithm == "grpo" else _ppo
        trainer = build(folder, output, settings, policy, tokenizer, reward, folders[0], seed)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Measure())
        trainer.train()
    assert all(rows[-1][0] == settings.policy_steps for rows in points.values()), points
    return {"sets": {key: {"points": points[key], "gold": last[key]} for key in settings.sets}}


def _reward_function(reward):
    """The standardised proxy. The members of an ensemble are standardised; another model by its stored statistics."""
    from ..rewards import grm_reward_func

    return grm_reward_func(reward, transform=None if not isinstance(reward, str) else "standardize")


def _measure(policy, tokenizer, rewards, output, settings, key, seed):
    """Mean divergence, proxy, gold and length of answers to a set's prompts, and each answer's gold reward."""
    candidates = read_unit(output, f"candidates-{key}")
    was_training = policy.training
    policy.eval()
    initial, _ = load_base(output, settings)
    drawn = sample(
        policy,
        tokenizer,
        candidates["prompts"],
        settings.policy_samples,
        settings.max_new_tokens,
        seed=3_000_000 + seed,
    )
    kl, proxy, gold = [], [], []
    for prompt, ids, answers in zip(candidates["prompts"], candidates["prompt_ids"], drawn, strict=True):
        texts = text_of(tokenizer, answers)
        kl += divergences(policy, initial, ids, answers)
        chat = [{"role": "user", "content": prompt}]
        proxy += rewards([chat] * len(texts), [[{"role": "assistant", "content": text}] for text in texts])
        gold.append(gold_of(settings, prompt, texts))
    policy.train(was_training)
    tokens = np.mean([len(answer) for answers in drawn for answer in answers])
    return [float(np.mean(kl)), float(np.mean(proxy)), float(np.mean(gold)), float(tokens)], gold


def _arguments(settings, seed):
    return {
        "per_device_train_batch_size": settings.policy_batch,
        "learning_rate": settings.policy_learning_rate,
        "temperature": 1.0,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **machine(settings),
    }


def _grpo(folder, output, settings, policy, tokenizer, reward, value_folder, seed):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts, _ = prompts_of(settings)
    args = GRPOConfig(
        folder,
        max_steps=settings.policy_steps,
        num_generations=settings.generations,
        max_completion_length=settings.max_new_tokens,
        beta=0.0,
        logging_strategy="no",
        **_arguments(settings, seed),
    )
    return GRPOTrainer(
        model=policy,
        reward_funcs=_reward_function(reward),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]),
        processing_class=tokenizer,
    )


def _ppo(folder, output, settings, policy, tokenizer, reward, value_folder, seed):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from ..modeling_grm import GRMForSequenceClassification
    from ..rewards import ppo_reward_model

    prompts, _ = prompts_of(settings)
    # PPO drops the last incomplete batch of an epoch, and needs at least one that is complete.
    repeated = prompts * -(-settings.policy_batch // len(prompts))
    args = PPOConfig(
        folder,
        total_episodes=settings.policy_steps * settings.policy_batch,
        num_mini_batches=1,
        num_ppo_epochs=2,
        local_rollout_forward_batch_size=settings.policy_batch,
        response_length=settings.max_new_tokens,
        stop_token="eos",
        missing_eos_penalty=1.0,
        kl_coef=0.0,
        num_sample_generations=0,
        **_arguments(settings, seed),
    )
    value = GRMForSequenceClassification.from_pretrained(value_folder)
    value.freeze_lm_head()
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=ppo_reward_model(
            reward, tokenizer, transform=None if not isinstance(reward, str) else "standardize"
        ),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": [prompt_ids(tokenizer, prompt) for prompt in repeated]}),
    )
