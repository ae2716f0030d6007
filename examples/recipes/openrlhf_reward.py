"""A Generalizable Reward Model as OpenRLHF's custom reward function. OpenRLHF loads this file in each of its actors:

    GRM_MODEL=runs/grm python -m openrlhf.cli.train_ppo_ray --reward.remote_url examples/recipes/openrlhf_reward.py ...

(`--remote_rm_url` in versions without dotted options). `GRM_MODEL` is the Hub id or folder, `GRM_TRANSFORM` one of the
transformations of `grm_hf.rewards` (`standardize`, ...). The policy must use the chat template of the reward model
(`--data.apply_chat_template`), because OpenRLHF passes rendered text, one text at a time.
"""

import os
from threading import Lock

import torch

from grm_hf.rewards import grm_reward_func


if not os.environ.get("GRM_MODEL"):
    raise ValueError("set the environment variable GRM_MODEL to the Hub id or folder of the reward model")
# Loaded at once: OpenRLHF stops when this file raises, but only logs what `reward_func` raises.
REWARD = grm_reward_func(os.environ["GRM_MODEL"], transform=os.environ.get("GRM_TRANSFORM"))
LOCK = Lock()  # OpenRLHF calls from several threads


def reward_func(queries: list[str], prompts: list[str], labels: list, **kwargs) -> dict:
    """
    Args:
        queries: Prompt and answer as one rendered text, special tokens included.
        prompts: The rendered prompts alone; part of the queries, so not used.
        labels: Labels of the dataset; not used.

    Returns:
        `rewards` (for the advantage), `scores` between 0 and 1 (for dynamic filtering) and `extra_logs`.
    """
    opening = REWARD.scorer.opening
    for query in queries:
        if opening not in query:
            raise ValueError(
                f"the policy's chat template is not the reward model's: no {opening!r} in {query[:200]!r}. Use the "
                "reward model's template for the policy."
            )
    with LOCK:
        rewards = torch.tensor(REWARD.rendered(queries))
    return {"rewards": rewards, "scores": torch.sigmoid(rewards), "extra_logs": {"grm_reward": rewards}}
