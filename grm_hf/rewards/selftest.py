"""Tests before the first step whether a reward model, as it is plugged into this process, still is the trained one.
Its golden rows (`grm_hf.scoring.golden`) show another template or tokenizer, a random head, live dropout, and a reward
that is read before the end of turn.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..chats import as_messages
from ..scoring import GoldenError
from ..scoring.golden import FILE, differs, read_rows, scale_of


logger = logging.get_logger(__name__)

LOADED = (
    "The tokenizer, its chat template, the weights or their precision are not those that were saved: load all from "
    "one place. If precision is lost on purpose, pass `check=False`."
)
GROUP = (
    "TRL renders and tokenises for a module by itself: pass `reward_funcs=grm_reward_func(...)`, which does it as in "
    "training, or see to its tokenizer (`reward_processing_classes`), dtype and evaluation mode."
)
PPO = (
    "PPO never calls a model's `forward` and reads where the policy stops: pass `reward_model=ppo_reward_model(...)`."
)


def self_test(trainer) -> list[str]:
    """
    Score the golden rows of every reward model of a TRL trainer, each in the trainer's own way: `reward_funcs` of
    GRPO, RLOO and Online DPO (modules, ids and [`grm_reward_func`]), `reward_model` of PPO.

    ```python
    self_test(trainer)
    trainer.train()
    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            A trainer that has been made and has not started.

    Returns:
        `list[str]`: the sources of the tested reward models. A model without golden rows gives a warning. Not tested
        are other reward functions, models made in memory, live models with an adapter, and ensembles (whose members
        are tested when they are loaded).

    Raises:
        [`GoldenError`]: a reward differs by more than rounding. The message says what to do.
        `ValueError`: PPO's value model has no weight that learns.
    """
    ppo = hasattr(trainer, "reward_model")
    if ppo:
        if not any(weight.requires_grad for weight in trainer.value_model.parameters()):
            raise ValueError(
                "The value model is frozen, as an adapter is when its folder is loaded: it would never learn. Merge "
                "the adapter first (`grm merge ADAPTER FOLDER`) and load FOLDER."
            )
        rewards = [(trainer.reward_model, trainer.processing_class)]
    else:
        rewards = list(zip(trainer.reward_funcs, trainer.reward_processing_classes, strict=True))
    options = getattr(trainer, "chat_template_kwargs", None) or {}
    tested = []
    for reward, tokenizer in rewards:
        if hasattr(reward, "scorer"):
            tested += check_scorer(reward.scorer)
        elif getattr(getattr(reward, "config", None), "model_type", None) == "grm":
            read = partial(_as_ppo, reward, tokenizer) if ppo else partial(_as_trl, reward, tokenizer, options)
            tested += _check(reward, read, PPO if ppo else GROUP)
    return tested


def check_scorer(scorer) -> list[str]:
    """[`self_test`] of a scorer alone."""
    if not hasattr(scorer, "encoder"):  # an ensemble
        return []
    return _check(scorer.model, lambda chat: scorer.score([chat])[0], LOADED, scorer.source)


def _check(model, read: Callable[[Any], float], remedy: str, source=None) -> list[str]:
    path, revision = source or (getattr(model, "name_or_path", ""), None)
    adapted = getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")
    if not path or (source is None and adapted):
        return []  # made in memory; or with an adapter, and the model below only knows its own source
    try:
        file = cached_file(path, FILE, revision=revision)
    except OSError:
        logger.warning(
            f"'{path}' has no {FILE}, so it is not known whether its rewards are still those it was saved with. "
            "`grm_hf.scoring.save_golden` writes the file."
        )
        return []
    wrong, rows = [], read_rows(str(file))["rows"]
    scale = scale_of(row["score"] for row in rows)
    for row in rows:
        score, stored = read(row["chat"]), row["score"]
        if differs(score, stored, scale, model):
            wrong.append(f"{score:.6f} instead of {stored:.6f}")
    if wrong:
        raise GoldenError(
            f"The reward model '{path}' does not give here the rewards it was saved with: {', '.join(wrong)}. "
            f"{remedy} (If it was trained further since it was loaded, save it and load it again.)"
        )
    return [path]


def _plain(chat) -> tuple[str, str]:
    return ("", chat) if isinstance(chat, str) else (chat["prompt"], chat["response"])


@torch.no_grad()
def _as_trl(model, tokenizer, options, chat) -> float:
    """The rewards that TRL gets from a module in `reward_funcs`."""
    if tokenizer.chat_template and not isinstance(chat, str):
        text = tokenizer.apply_chat_template(as_messages(chat), tokenize=False, **options)
    else:
        text = "".join(_plain(chat))
    inputs = tokenizer(text=[text], return_tensors="pt", add_special_tokens=False).to(model.device)
    return model(**inputs).logits[0, 0].item() if _knows(model, inputs.input_ids) else math.nan


@torch.no_grad()
def _as_ppo(model, tokenizer, chat) -> float:
    """The reward that TRL's PPO gets from a plain model, if the policy gives this answer and stops with EOS."""
    if tokenizer.chat_template and not isinstance(chat, str):
        *prompt, final = as_messages(chat)
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        answer = final["content"]
    else:
        before, answer = _plain(chat)
    written = [i for text in (before, answer) for i in tokenizer(text, add_special_tokens=False).input_ids]
    ids = torch.tensor([[*written, tokenizer.eos_token_id]], device=model.device)
    if not _knows(model, ids):
        return math.nan
    body = getattr(model, model.base_model_prefix)
    out = body(input_ids=ids, attention_mask=torch.ones_like(ids).bool(), output_hidden_states=True, use_cache=False)
    return model.score(out.hidden_states[-1])[0, -1, 0].item()


def _knows(model, ids) -> bool:
    return int(ids.max()) < model.get_input_embeddings().weight.shape[0]
