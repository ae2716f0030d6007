"""A reward model as a reward function: what TRL's GRPO, RLOO and Online DPO call (`reward_funcs`), and the scorer
below it, which gives every text that a policy can write the number that the reward model was trained to give.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from ..devices import own_device
from ..encoding import Encoded
from ..folders import readable
from ..modeling_grm import GRMForSequenceClassification
from ..scoring import GRMScorer
from .remote import RemoteScorer, is_address
from .rollouts import Rendered, Rollout, RolloutEncoder
from .selftest import check_scorer
from .transforms import Transform


class PolicyScorer(GRMScorer):
    """
    A [`GRMScorer`] for what policies write. It takes [`Rollout`] and [`Rendered`] besides chats.

    Attributes:
        rollouts ([`RolloutEncoder`]): What turns them into token ids.
        source: Hub id or folder that a model or an adapter was loaded from, with the revision; `None` for a live one.
    """

    def __init__(self, model, tokenizer=None, source: tuple[str, str | None] | None = None, **kwargs):
        super().__init__(model, tokenizer, **kwargs)
        self.source = source
        self.rollouts = RolloutEncoder(self.encoder)

    @property
    def opening(self) -> str:
        """What the chat template writes in front of an answer; empty if it writes nothing, or there is none."""
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
    gives what the module itself in `reward_funcs` gives, in batches of bounded size. For plain strings the numbers
    differ: TRL tokenises `prompt + completion` without special tokens, this adds BOS and EOS as in training. Several
    functions with `transform="log_sigmoid"` add up to a logical AND (arXiv 2402.00742).

    Args:
        model (`str`, [`GRMForSequenceClassification`], [`GRMScorer`] or [`RewardEnsemble`]):
            Hub id or folder (of a model or an adapter), a live reward model, one with its tokenizer, or an ensemble. A
            model loaded here goes to this process's accelerator; a live one stays where it is. Or the address of a
            served one, `"http://host:8000"`, or several: see [`RemoteScorer`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The reward model's. Loaded from the same place if left out.
        transform (`str` or `Callable`, *optional*):
            See [`Transform`].
        reference (`float` or `str`, *optional*):
            For `"log_sigmoid"` and `"clip"`: a number, or the column of the dataset that holds one per prompt.
        name (`str`, *optional*):
            What TRL calls it in its logs. Defaults to the last part of the model's name.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            See [`GRMScorer`]; an ensemble has its own.
        check (`bool`, *optional*, defaults to `True`):
            Score the golden rows of a model that is loaded here, and refuse it if a reward is not the stored one.
        **load_kwargs:
            For `from_pretrained`: `dtype`, `revision`, `quantization_config`, ...; with an address for
            [`RemoteScorer`]: `api_key`, `timeout`, `retries`.

    Returns:
        [`GRMRewardFunction`].

    Raises:
        `ValueError`: for what is no reward model, settings that would be ignored, statistics that are not there;
            [`GoldenError`] for golden rows that do not hold.

    Example:

    ```python
    trainer = GRPOTrainer(model=policy, reward_funcs=grm_reward_func("my-grm"), train_dataset=prompts)
    ```
    """
    if is_address(model):
        scorer = RemoteScorer(model, tokenizer, **load_kwargs)
    else:
        scorer = policy_scorer(model, tokenizer, max_tokens_per_batch, check, load_kwargs)
    return GRMRewardFunction(scorer, transform, reference, name)


class GRMRewardFunction:
    """What [`grm_reward_func`] makes: called with prompts and completions, it returns one reward per completion."""

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
                Not used: they are the policy's tokens.
            **columns:
                The other columns of the dataset, of which `tools`, `chat_template_kwargs` and the one that `reference`
                names are used, and what else a trainer passes.

        Returns:
            `list[float]`: rewards, transformed if so asked.
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
            reference = columns[self.reference_column]
        nothing = [None] * len(prompts)
        rollouts = [
            Rollout(prompt, completion, tools, {k: v for k, v in (options or {}).items() if v is not None})
            for prompt, completion, tools, options in zip(
                prompts,
                completions,
                columns.get("tools") or nothing,
                columns.get("chat_template_kwargs") or nothing,
                strict=True,
            )
        ]
        return self._rewards(rollouts, prompts, reference)

    def rendered(self, texts: Sequence[str]) -> list[float]:
        """Rewards of whole texts, prompt and answer already rendered by the chat template that the reward model has
        too, special tokens included (what OpenRLHF passes as `queries`)."""
        encode = self.scorer.tokenizer
        return self._rewards([Rendered(encode(text, add_special_tokens=False).input_ids) for text in texts])

    def _rewards(self, rows, groups=None, reference=None):
        scores = list(self.scorer.stream(rows))
        rewards = torch.tensor([score.score for score in scores], dtype=torch.float64)
        return self.transform(rewards, [score.tokens for score in scores], groups, reference).tolist()


def policy_scorer(model, tokenizer=None, max_tokens_per_batch=8192, check=True, load_kwargs=None):
    """A scorer of rollouts for a Hub id, a folder or a live reward model; an ensemble is one already."""
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
