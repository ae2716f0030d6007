"""A reward model as a reward function (`reward_funcs` of TRL's GRPO, RLOO and Online DPO), and the scorer below it.
Every text that a policy can write gets the reward that the model was trained to give.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from ..devices import own_device
from ..encoding import Encoded, template_kwargs_of
from ..folders import readable
from ..modeling_grm import GRMForSequenceClassification
from ..scoring import GRMScorer
from .remote import RemoteScorer, is_address
from .rollouts import Rendered, Rollout, RolloutEncoder
from .selftest import check_scorer
from .transforms import Transform


class PolicyScorer(GRMScorer):
    """
    A [`GRMScorer`] for texts of policies. It takes [`Rollout`] and [`Rendered`] as well as chats.

    Attributes:
        rollouts ([`RolloutEncoder`]): Turns them into token ids.
        source: Hub id or folder that a model or an adapter was loaded from, with the revision; `None` for a live one.
    """

    def __init__(self, model, tokenizer=None, source: tuple[str, str | None] | None = None, **kwargs):
        super().__init__(model, tokenizer, **kwargs)
        self.source = source
        self.rollouts = RolloutEncoder(self.encoder)

    @property
    def opening(self) -> str:
        """The text that the chat template writes in front of an answer; empty if there is none."""
        return self.rollouts.opening

    def encode(self, chat) -> Encoded:
        return self.rollouts.encode(chat) if isinstance(chat, (Rollout, Rendered)) else super().encode(chat)


def grm_reward_func(
    model,
    tokenizer=None,
    *,
    transform=None,
    reference: float | str | None = None,
    name: str | None = None,
    max_tokens_per_batch: int = 8192,
    check: bool = True,
    **load_kwargs,
) -> "GRMRewardFunction":
    r"""
    A reward function for `reward_funcs` of TRL's `GRPOTrainer`, `RLOOTrainer` and `OnlineDPOTrainer`.

    It renders with the reward model's own tokenizer and template, so the policy may have others. For chat data it
    gives the same rewards as the module itself in `reward_funcs`, in batches of bounded size. For plain strings the
    rewards differ: TRL tokenises `prompt + completion` without special tokens, but this function adds BOS and EOS as
    in training. Several functions with `transform="log_sigmoid"` add up to a logical AND (arXiv 2402.00742).

    Args:
        model (`str`, [`GRMForSequenceClassification`], [`GRMScorer`] or [`RewardEnsemble`]):
            Hub id or folder (of a model or an adapter), a live reward model, a [`GRMScorer`], an ensemble, or the
            address of a served model, `"http://host:8000"`, or several addresses (see [`RemoteScorer`]). A model
            loaded here goes to this process's accelerator; a live model stays where it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The reward model's tokenizer. By default loaded from the same place.
        transform (`str` or `Callable`, *optional*):
            See [`Transform`].
        reference (`float` or `str`, *optional*):
            For `"log_sigmoid"` and `"clip"`: a number, or the column of the dataset that holds one per prompt.
        name (`str`, *optional*):
            Its name in TRL's logs. Defaults to the last part of the model's name.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            See [`GRMScorer`]; an ensemble has its own.
        check (`bool`, *optional*, defaults to `True`):
            Score the golden rows of a model that is loaded here, and refuse the model if a reward differs from the
            stored one.
        **load_kwargs:
            For `from_pretrained`: `dtype`, `revision`, `quantization_config`, ...; with an address for
            [`RemoteScorer`]: `api_key`, `timeout`, `retries`.

    Returns:
        [`GRMRewardFunction`].

    Raises:
        `ValueError`: for a model that is not a reward model, settings that would be ignored, and missing statistics;
            [`GoldenError`] for golden rows that do not hold.

    Example:

    ```python
    trainer = GRPOTrainer(model=policy, reward_funcs=grm_reward_func("my-grm"), train_dataset=prompts)
    ```
    """
    if is_address(model):
        if max_tokens_per_batch != 8192 or check is not True:
            raise ValueError(
                "`max_tokens_per_batch` and `check` are for a model that is loaded here; the server has its own (`grm "
                "serve --max-tokens-per-batch`, `grm verify --url`). Leave them out."
            )
        scorer = RemoteScorer(model, tokenizer, **load_kwargs)
    else:
        scorer = policy_scorer(model, tokenizer, max_tokens_per_batch, check, load_kwargs)
    return GRMRewardFunction(scorer, transform, reference, name)


class GRMRewardFunction:
    """A reward function, made by [`grm_reward_func`]: from prompts and completions to one reward per completion."""

    def __init__(self, scorer, transform=None, reference=None, name=None):
        self.scorer = scorer
        self.reference_column = reference if isinstance(reference, str) else None
        if self.reference_column and transform not in ("log_sigmoid", "clip"):
            raise ValueError(f"`reference` is the column {reference!r}, which transform={transform!r} does not use.")
        fixed = 0.0 if self.reference_column else reference
        self.transform = Transform(transform, getattr(scorer.model, "config", None), fixed)
        source = getattr(scorer, "source", None) or (getattr(scorer.model, "name_or_path", ""), None)
        self.__name__ = name or os.path.basename(source[0].rstrip("/")) or "grm"

    def __call__(self, prompts, completions, completion_ids=None, **columns: Any) -> list[float]:
        """
        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts, one per completion.
            completions (`list[str]` or `list[list[dict]]`):
                What the policy wrote.
            completion_ids (`list[list[int]]`, *optional*):
                Not used, because they are the policy's tokens.
            **columns:
                The other columns of the dataset and further arguments of a trainer. `tools`, `chat_template_kwargs`
                and the column that `reference` names are used.

        Returns:
            `list[float]`: rewards, after the transform if there is one.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions; there must be one each.")
        reference = None
        if self.reference_column is not None:
            if columns.get(self.reference_column) is None:
                raise ValueError(
                    f"the dataset has no column {self.reference_column!r}, which `reference` names; the columns are "
                    f"{sorted(columns)}. With TRL, keep it by `remove_unused_columns=False`."
                )
            reference = _references(self.reference_column, columns[self.reference_column], len(prompts))
        own = [columns.get(name) or [None] * len(prompts) for name in ("tools", "chat_template_kwargs")]
        if wrong := [len(column) for column in own if len(column) != len(prompts)]:
            raise ValueError(
                f"{len(prompts)} prompts, and `tools` or `chat_template_kwargs` of {wrong[0]}; there must be one for "
                "each prompt, as in a column of the dataset."
            )
        rollouts = [
            Rollout(prompt, completion, tools, template_kwargs_of({"chat_template_kwargs": options}))
            for prompt, completion, tools, options in zip(prompts, completions, *own, strict=True)
        ]
        return self._rewards(rollouts, prompts, reference)

    def rendered(self, texts: Sequence[str]) -> list[float]:
        """Rewards of whole texts: prompt and answer, already rendered with special tokens by the chat template of the
        reward model (the `queries` of OpenRLHF)."""
        encode = self.scorer.tokenizer
        return self._rewards([Rendered(encode(text, add_special_tokens=False).input_ids) for text in texts])

    def _rewards(self, rows, groups=None, reference=None):
        scores = list(self.scorer.stream(rows))
        rewards = torch.tensor([score.score for score in scores], dtype=torch.float64)
        return self.transform(rewards, [score.tokens for score in scores], groups, reference).tolist()


def _references(column: str, values, n: int) -> list[float]:
    """A number for each prompt. NaN would be no small thing: TRL takes it for a function that has no opinion."""
    if len(values) != n:
        raise ValueError(f"the column {column!r}, which `reference` names, has {len(values)} values for {n} prompts.")
    numbers = []
    for value in values:
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise ValueError(
                f"the column {column!r}, which `reference` names, holds {value!r}; a finite number is required for "
                "each prompt. Fill the gaps, or remove these rows."
            )
    return numbers


def policy_scorer(model, tokenizer=None, max_tokens_per_batch=8192, check=True, load_kwargs=None):
    """A scorer of rollouts for a Hub id, a folder or a live reward model. An ensemble is a scorer already."""
    source = None
    if isinstance(model, (str, os.PathLike)):
        load_kwargs = load_kwargs or {}
        source = os.fspath(model), load_kwargs.get("revision")
        with readable(source[0]) as place:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(place, revision=source[1] or "main")
            model = GRMForSequenceClassification.from_pretrained(place, **load_kwargs)
        if not hasattr(model, "hf_device_map"):
            model.to(own_device())
    else:
        if load_kwargs:
            raise ValueError(f"the model is a live one, so {sorted(load_kwargs)} cannot be applied.")
        if isinstance(model, GRMScorer):
            model, tokenizer = model.model, tokenizer or model.tokenizer
        elif not isinstance(model, torch.nn.Module):
            if not hasattr(model, "member_scores"):
                raise ValueError(
                    f"`model` is {type(model).__name__}; give a reward model, its id or folder, or an ensemble."
                )
            if tokenizer is not None:
                raise ValueError("the members of an ensemble have their tokenizers, so `tokenizer` cannot be applied.")
            return model
        if getattr(getattr(model, "config", None), "model_type", None) != "grm":
            raise ValueError(f"`model` is {type(model).__name__}, not a GRMForSequenceClassification.")
    scorer = PolicyScorer(model, tokenizer, source, max_tokens_per_batch=max_tokens_per_batch)
    if check and source:
        check_scorer(scorer)
    return scorer
