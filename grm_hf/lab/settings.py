"""The settings of a laboratory run, its prompts, and the results of its units of work. The defaults are the world's; a
user may bring any part."""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .world import World


WORLD = World(0)
SET_NAMES = {"id": "in-distribution", "ood": "out-of-distribution", "test": "held-out prompts"}
# Settings of the world that would ruin a real model.
OWN_MODEL_NEEDS = ("learning_rate", "policy_learning_rate")


@dataclass(frozen=True)
class Settings:
    """All settings that a result depends on.

    Attributes:
        gold (`str`, *optional*): `module:function` of (prompt, response), or the folder or Hub id of a reward model;
            `None`: that of the world.
        model (`str`, *optional*): Folder or Hub id of the policy, from which proxies start too; `None`: the world's
            base, pretrained by the run.
        prompts (`str`, *optional*): JSONL file with a `prompt` in each row; `None`: the world's questions.
        eval_prompts (`str`, *optional*): The same, of prompts to measure on; `None`: the last quarter of `prompts`.
        sizes (`tuple[int, ...]`): Numbers of training pairs.
        flipped (`float`): Share of wrong labels if labels are `"flipped"`.
        seeds (`int`): Seeds; each draws its own answers, pairs, heads and orders.
        members (`int`): Bradley-Terry models in an ensemble.
        eval_limit (`int`): Largest number of prompts of a set to measure on.
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
                "A model of your own needs `prompts` and `gold` of your own: the world's questions and gold "
                "reward mean nothing to it."
            )
        if self.eval_prompts and not self.prompts:
            raise ValueError("`eval_prompts` needs `prompts`.")

    @property
    def ns(self) -> list[int]:
        """The n of best-of-n, about equally spaced on a logarithmic axis."""
        return sorted({round(float(n)) for n in np.geomspace(1, self.max_n, 20)})

    @property
    def sets(self) -> list[str]:
        return ["test"] if self.prompts else ["id", "ood"]


# ------------------------------------------------------------------------------------------------------------- prompts


def prompts_of(settings: Settings) -> tuple[list[str], dict[str, list[str]]]:
    """The prompts to train on, and for each set at most `eval_limit` prompts to measure on."""
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
    prompts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line) if line.strip() else {"prompt": ""}
            prompt = row.get("prompt") if isinstance(row, dict) else None
            if not isinstance(prompt, str):
                raise ValueError(f'{path}, line {number}: {{"prompt": "..."}} with a user\'s message is required.')
            prompts.append(prompt)
    return list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))


# ------------------------------------------------------------------------------------------------------------- results


def unit_file(output: Path, name: str) -> Path:
    return output / "units" / f"{name}.json"


@functools.lru_cache(maxsize=16)
def read_unit(output: Path, name: str) -> dict:
    """The result of a finished unit of work."""
    return json.loads(unit_file(output, name).read_text(encoding="utf-8"))


def within(values: Iterable[Sequence[float] | np.ndarray]) -> float:
    """Standard deviation of rewards around the mean of their prompt; 1 if all are equal."""
    spread = float(np.sqrt(np.mean([np.var(row) for row in values])))
    return spread or 1.0
