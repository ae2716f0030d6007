"""What is optimised: a policy, its prompts, a gold reward, and answers sampled from the policy. By default all of it
is the demo world's; a user may bring any part of it."""

import functools
import importlib
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ..devices import own_device
from ..rewards import grm_reward_func
from .base_model import build_model, build_tokenizer, pretrain
from .world import World


WORLD = World(0)
SET_NAMES = {"id": "in-distribution", "ood": "out-of-distribution", "test": "held-out prompts"}
ROUNDS = 10  # of drawing pairs, before the answers are found to be too much alike
# What the demo's settings would ruin in a model that is worth something.
OWN_MODEL_NEEDS = ("learning_rate", "policy_learning_rate")

Gold = Callable[[Sequence[tuple[str, str]]], list[float]]  # pairs of prompt and response


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on.

    Attributes:
        gold (`str`, *optional*): `module:function` of (prompt, response), or the folder or Hub id of a reward model;
            `None`: that of the demo world.
        model (`str`, *optional*): Folder or Hub id of the policy, which proxies start from too; `None`: the demo's
            base, pretrained by the run.
        prompts (`str`, *optional*): JSONL file with a `prompt` in each row; `None`: the demo world's questions.
        eval_prompts (`str`, *optional*): The same, of prompts to measure on; `None`: the last quarter of `prompts`.
        sizes (`tuple[int, ...]`): Numbers of training pairs.
        flipped (`float`): Share of wrong labels where labels are `"flipped"`.
        seeds (`int`): Seeds; each draws its own answers, pairs, heads and orders.
        members (`int`): Bradley-Terry models in an ensemble.
        eval_limit (`int`): Most prompts of a set to measure on.
        samples (`int`): Answers to each of them.
        max_n (`int`): The largest n of best-of-n.
        policy_proxies, policy_labels, policy_size: The proxies that PPO and GRPO optimise.
        policy_steps, policy_batch, generations: Their steps, answers a step, and answers to a prompt (GRPO).
        evaluations (`int`): Points of their curves.
        policy_samples (`int`): Answers to each prompt at a point.
    """

    gold: str | None = None
    model: str | None = None
    prompts: str | None = None
    eval_prompts: str | None = None
    pretrain_steps: int = 700
    sizes: tuple[int, ...] = (80, 240, 720)
    flipped: float = 0.25
    seeds: int = 5
    members: int = 3
    eval_limit: int = 8
    samples: int = 405
    max_n: int = 405
    max_new_tokens: int = 40
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 1e-3
    policy_proxies: tuple[str, ...] = ("bt", "ensemble_min", "sft", "dpo_noref")
    policy_labels: str = "flipped"
    policy_size: int = 240
    policy_steps: int = 24
    policy_batch: int = 64
    generations: int = 8
    policy_learning_rate: float = 3e-4
    evaluations: int = 6
    policy_samples: int = 10

    def __post_init__(self):
        if self.seeds < 2:
            raise ValueError(f"`seeds` is {self.seeds}; intervals over seeds need at least 2.")
        if self.members < 2:
            raise ValueError(f"`members` is {self.members}; an ensemble needs at least 2.")
        if not 1 < self.max_n <= self.samples:
            raise ValueError(
                f"`samples` is {self.samples} and `max_n` {self.max_n}: best-of-n needs 1 < n <= samples of a prompt."
            )
        if self.policy_size not in self.sizes:
            raise ValueError(f"`policy_size` is {self.policy_size}; it must be one of `sizes`, {self.sizes}.")
        if not 0 < self.flipped < 0.5:
            raise ValueError(f"`flipped` is {self.flipped}; a share of wrong labels is above 0 and below 0.5.")
        if self.policy_samples > self.samples:
            raise ValueError(f"`policy_samples` is {self.policy_samples}, above `samples` ({self.samples}).")
        if self.policy_steps % self.evaluations or self.policy_batch % self.generations:
            raise ValueError(
                f"`evaluations` ({self.evaluations}) must divide `policy_steps` ({self.policy_steps}), and "
                f"`generations` ({self.generations}) `policy_batch` ({self.policy_batch})."
            )
        if self.model and not (self.prompts and self.gold):
            raise ValueError(
                "A model of your own needs `prompts` and `gold` of your own: the demo world's questions and gold "
                "reward mean nothing to it."
            )
        if self.eval_prompts and not self.prompts:
            raise ValueError("`eval_prompts` needs `prompts`.")

    @property
    def ns(self) -> list[int]:
        """The n of best-of-n: about equally far apart on a logarithmic axis."""
        return sorted({round(float(n)) for n in np.geomspace(1, self.max_n, 20)})

    @property
    def sets(self) -> list[str]:
        return ["test"] if self.prompts else ["id", "ood"]


# ------------------------------------------------------------------------------------------------------------- prompts


def prompts_of(settings: Settings) -> tuple[list[str], dict[str, list[str]]]:
    """The prompts to train on, and for each set those to measure on, at most `eval_limit` of a set."""
    if settings.prompts is None:  # of the three wordings of each question, the last is kept for measuring
        asked = {domain: WORLD.questions(domain) for domain in ("id", "ood")}
        train = [question for i, question in enumerate(asked["id"]) if i % 3 != 2]
        sets = {domain: questions[2::3] for domain, questions in asked.items()}
    else:
        train = _read(settings.prompts)
        if settings.eval_prompts:
            test = _read(settings.eval_prompts)
            if common := set(train) & set(test):
                raise ValueError(
                    f"{len(common)} prompts of {settings.eval_prompts} are in {settings.prompts} too (such as "
                    f"{min(common)!r}); measure on prompts that proxies were not trained on."
                )
        else:
            cut = len(train) - max(1, len(train) // 4)
            train, test = train[:cut], train[cut:]
        sets = {"test": test}
    if not train:
        raise ValueError("There is no prompt to train on: `prompts` needs at least two.")
    spread = {name: np.linspace(0, len(rows) - 1, min(len(rows), settings.eval_limit)) for name, rows in sets.items()}
    return train, {name: [rows[round(i)] for i in spread[name]] for name, rows in sets.items()}


def _read(path: str) -> list[str]:
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line) if line.strip() else {"prompt": ""}
            prompt = row.get("prompt") if isinstance(row, dict) else None
            if not isinstance(prompt, str):
                raise ValueError(f'{path}, line {number}: {{"prompt": "..."}} with a user\'s message is required.')
            found.append(prompt)
    return list(dict.fromkeys(prompt for prompt in found if prompt.strip()))


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """What the policy reads before it answers."""
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


# ---------------------------------------------------------------------------------------------------------------- gold


@functools.lru_cache(maxsize=1)
def load_gold(source: str | None) -> Gold:
    """
    The gold reward, checked: every value is a finite number.

    Args:
        source (`str`, *optional*):
            `None` (the demo world's), `module:function`, or the folder or Hub id of a reward model with one output.

    Raises:
        `ValueError`: there is no such function or it is no reward model; and later, for a value that is not finite or
            a function that raises, with the prompt and the response.
    """
    if source is None:
        reward: Gold = functools.partial(_each, WORLD.gold)
    elif ":" in source and not os.path.exists(source):
        reward = functools.partial(_each, _function(source))
    else:
        reward = _reward_model(source)

    def checked(rows):
        found = reward(rows)
        for (prompt, response), value in zip(rows, found, strict=True):
            if not (isinstance(value, (int, float, np.number)) and math.isfinite(value)):
                raise ValueError(
                    f"The gold reward {source} gave {value!r} for the prompt {prompt!r} and the response "
                    f"{response!r}; a finite number is required for any two strings."
                )
        return [float(value) for value in found]

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
        own = grm_reward_func(source)  # scores answers without text too, which policies give
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


# ----------------------------------------------------------------------------------------------------- policy, answers


def prepare_base(output: Path, settings: Settings) -> dict:
    """The policy and its tokenizer, in `output/base`."""
    model: Any
    if settings.model:
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        _check_tokenizer(tokenizer, settings.model)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    else:
        tokenizer = build_tokenizer(WORLD)
        model = pretrain(build_model(tokenizer), tokenizer, WORLD, settings.pretrain_steps)
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    return {"parameters": model.num_parameters()}


def _check_tokenizer(tokenizer, name):
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {name!r} has no chat template, which prompts are put into.")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"The tokenizer of {name!r} has no padding token besides EOS, and PPO tells padding from text by the id. "
            "Save the model with a tokenizer whose `pad_token` is a token that no text holds."
        )


def device(settings: Settings) -> torch.device:
    """The demo is made for one CPU thread; a model of one's own goes to the accelerator if there is one."""
    return own_device() if settings.model else torch.device("cpu")


@functools.lru_cache(maxsize=1)
def load_base(output: Path, settings: Settings):
    """The initial policy, in evaluation mode and where policies are trained, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(output / "base", padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(output / "base")
    return model.to(device(settings)).eval(), tokenizer


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], count: int, max_new_tokens: int, seed: int) -> list[list[list[int]]]:
    """
    Answers drawn from the policy itself: temperature 1, no token left out.

    Returns:
        `list[list[list[int]]]`: for each prompt `count` answers as token ids, with EOS where the policy ended.
    """
    rows = [ids for ids in (prompt_ids(tokenizer, prompt) for prompt in prompts) for _ in range(count)]
    answers: list[list[int]] = []
    eos = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(rows), 512):
            batch = tokenizer.pad({"input_ids": rows[start : start + 512]}, return_tensors="pt", padding_side="left")
            drawn = model.generate(
                **batch.to(model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            for ids in drawn[:, batch["input_ids"].shape[1] :].tolist():
                answers.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    return [answers[i : i + count] for i in range(0, len(answers), count)]


@torch.no_grad()
def divergences(policy, initial, prompt: list[int], answers: list[list[int]]) -> list[float]:
    """
    KL(policy || initial) along each answer: at every token of it, EOS included, the divergence of the two whole
    distributions of the next token. Their sum, averaged over answers of the policy, is an unbiased estimate of the
    divergence of the two distributions of answers, of lower variance than the log-ratio of the answer.
    """
    width = max(map(len, answers))
    ids = torch.tensor([[*prompt, *answer, *[0] * (width - len(answer))] for answer in answers], device=policy.device)
    result = []
    for rows, lengths in zip(ids.split(64), torch.tensor([*map(len, answers)]).split(64), strict=True):
        # The row ends are padding behind the text: causal attention does not see it.
        ours, theirs = (
            model(input_ids=rows).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
            for model in (policy, initial)
        )
        kl = (ours.exp() * (ours - theirs)).sum(-1).cpu()
        result.append((kl * (torch.arange(width) < lengths[:, None])).sum(1))
    return torch.cat(result).tolist()


def text_of(tokenizer, answers: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def draw_candidates(output: Path, settings: Settings, name: str) -> dict:
    """The answers of a set of prompts that every proxy chooses among, with their gold reward."""
    model, tokenizer = load_base(output, settings)
    prompts = prompts_of(settings)[1][name]
    drawn = sample(
        model,
        tokenizer,
        prompts,
        settings.samples,
        settings.max_new_tokens,
        seed=1_000_000 + settings.sets.index(name),
    )
    texts = [text_of(tokenizer, answers) for answers in drawn]
    gold = [gold_of(settings, prompt, answers) for prompt, answers in zip(prompts, texts, strict=True)]
    return {
        "prompts": prompts,
        "prompt_ids": [prompt_ids(tokenizer, prompt) for prompt in prompts],
        "answers": drawn,
        "gold": gold,
        "distinct": sum(len(set(answers)) for answers in texts) / sum(map(len, texts)),
        "unfinished": sum(a[-1] != tokenizer.eos_token_id for answers in drawn for a in answers)
        / sum(map(len, texts)),
    }


def gold_of(settings: Settings, prompt: str, texts: list[str]) -> list[float]:
    """Gold rewards of answers to one prompt; equal ones are asked for once."""
    distinct = list(dict.fromkeys(texts))
    values = dict(zip(distinct, load_gold(settings.gold)([(prompt, text) for text in distinct]), strict=True))
    return [values[text] for text in texts]


def draw_pairs(output: Path, settings: Settings, seed: int) -> dict:
    """A seed's training pairs: two answers of the policy to a prompt, sampled for this seed alone, `better` and
    `worse` by gold, `gap` apart. Pairs of equal gold, of equal answers or without text are left out and counted."""
    model, tokenizer = load_base(output, settings)
    train, _ = prompts_of(settings)
    rng = random.Random(f"pairs-{seed}")
    wanted, skipped = max(settings.sizes), 0
    rows: list[dict] = []
    for turn in range(ROUNDS):
        asked = rng.choices(train, k=(wanted - len(rows)) * 5 // 4 + 1)
        drawn = sample(model, tokenizer, asked, 2, settings.max_new_tokens, seed=2_000_000 + 1000 * seed + turn)
        for prompt, answers in zip(asked, drawn, strict=True):
            a, b = text_of(tokenizer, answers)
            if not a.strip() or not b.strip() or a == b:
                skipped += 1
                continue
            gold_a, gold_b = gold_of(settings, prompt, [a, b])
            if gold_a == gold_b:
                skipped += 1
                continue
            better, worse = (a, b) if gold_a > gold_b else (b, a)
            rows.append({"prompt": prompt, "better": better, "worse": worse, "gap": abs(gold_a - gold_b)})
        if len(rows) >= wanted:
            return {"rows": rows[:wanted], "skipped": skipped}
    raise ValueError(
        f"{wanted} pairs are required, and of {len(rows) + skipped} pairs of answers {skipped} had equal gold "
        "rewards, were identical or had no text. The gold reward tells too few answers of this policy apart."
    )


# ------------------------------------------------------------------------------------------------------------- results


def unit_file(output: Path, name: str) -> Path:
    return output / "units" / f"{name}.json"


@functools.lru_cache(maxsize=16)
def read_unit(output: Path, name: str) -> dict:
    """What a finished unit of work found."""
    return json.loads(unit_file(output, name).read_text(encoding="utf-8"))


def within(values: Iterable[Sequence[float] | np.ndarray]) -> float:
    """Standard deviation of rewards around the mean of their prompt; 1 where they are all equal."""
    spread = float(np.sqrt(np.mean([np.var(row) for row in values])))
    return spread or 1.0
