"""The gold reward of a laboratory run, its truth: the world's, a function, or a reward model."""

import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ..devices import own_device
from ..rewards import grm_reward_func
from .settings import WORLD, Settings


Gold = Callable[[Sequence[tuple[str, str]]], list[float]]  # pairs of prompt and response


@functools.lru_cache(maxsize=1)
def load_gold(source: str | None) -> Gold:
    """
    The gold reward, checked: every value is a finite number.

    Args:
        source (`str`, *optional*):
            `None` (the world's), `module:function`, or the folder or Hub id of a reward model with one output.

    Raises:
        `ValueError`: there is no such function or reward model. Later also for a value that is not finite or a
            function that raises, with the prompt and the response.
    """
    if source is None:
        reward: Gold = functools.partial(_each, WORLD.gold)
    elif ":" in source and not os.path.exists(source):
        reward = functools.partial(_each, _function(source))
    else:
        reward = _reward_model(source)

    def checked(rows):
        rewards = reward(rows)
        for (prompt, response), value in zip(rows, rewards, strict=True):
            if not (isinstance(value, (int, float, np.number)) and math.isfinite(value)):
                raise ValueError(
                    f"The gold reward {source} gave {value!r} for the prompt {prompt!r} and the response "
                    f"{response!r}; a finite number is required for any two strings."
                )
        return [float(value) for value in rewards]

    return checked


def _each(function, rows):
    values = []
    for prompt, response in rows:
        try:
            values.append(function(prompt, response))
        except Exception as error:
            raise ValueError(
                f"The gold reward raised {type(error).__name__} ({error}) for the prompt {prompt!r} and the response "
                f"{response!r}; it must give a number for any two strings."
            ) from error
    return values


def _function(source):
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The gold reward {source!r} was not found ({error}). `module:function` names a function of (prompt, "
            "response) in a module that can be imported here; a model is named by its folder or Hub id."
        ) from error
    if not callable(function):
        raise ValueError(f"The gold reward {source!r} is a {type(function).__name__}, not a function.")
    return function


def _reward_model(source):
    config = AutoConfig.from_pretrained(source)
    if config.model_type == "grm":
        own = grm_reward_func(source)  # scores answers without text too, because policies give some
        return lambda rows: own(
            [[{"role": "user", "content": prompt}] for prompt, _ in rows],
            [[{"role": "assistant", "content": response}] for _, response in rows],
        )
    model = AutoModelForSequenceClassification.from_pretrained(source).to(own_device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if model.config.num_labels != 1:
        raise ValueError(f"The gold model {source!r} has {model.config.num_labels} outputs; a reward model has one.")

    @torch.no_grad()
    def score(rows):
        values = []
        for prompt, response in rows:  # one by one: no padding to get wrong
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True).to(model.device)
            values.append(model(**ids).logits.item())
        return values

    return score


def gold_of(settings: Settings, prompt: str, texts: list[str]) -> list[float]:
    """Gold rewards of answers to one prompt; equal answers are computed once."""
    distinct = list(dict.fromkeys(texts))
    values = dict(zip(distinct, load_gold(settings.gold)([(prompt, text) for text in distinct]), strict=True))
    return [values[text] for text in texts]
