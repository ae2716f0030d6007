"""A reward model as a reward function: what TRL's GRPO, RLOO and Online DPO call (`reward_funcs`), and the scorer
below it, which gives every text that a policy can write the number that the reward model was trained to give.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from ..devices import own_device
from ..encoding import Encoded, OverlengthError
from ..folders import readable
from ..modeling_grm import GRMForSequenceClassification
from ..scoring import GRMScorer
from .selftest import check_scorer
from .transforms import Transform


@dataclass(frozen=True)
class Rollout:
    """
    What a policy wrote to a prompt: messages and messages, or text and text.

    Attributes:
        prompt (`str` or `list[dict]`): The prompt. Text is text, as in training, not a user's message.
        completion (`str` or `list[dict]`): The answer, without special tokens. It may be empty.
        tools, template_kwargs: For the chat template.
    """

    prompt: str | list[dict]
    completion: str | list[dict]
    tools: list | str | None = None
    template_kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """
    Prompt and answer as the policy saw and wrote them: already rendered by the chat template, special tokens included.

    Attributes:
        ids (`list[int]`): Token ids of the reward model's vocabulary, with or without end of turn, without padding.
    """

    ids: list[int]


class PolicyScorer(GRMScorer):
    """
    A [`GRMScorer`] for what policies write. It takes [`Rollout`] and [`Rendered`] besides chats, scores answers
    without text as well (a policy that learns will write some), and puts the end of turn where the reward model was
    trained to read, whether or not the policy got that far.

    Attributes:
        opening: What the chat template writes in front of an answer; empty if it writes nothing, or there is none.
        source: Hub id or folder that a model or an adapter was loaded from, with the revision; `None` for a live one.
    """

    def __init__(self, model, tokenizer=None, source: tuple[str, str | None] | None = None, **kwargs):
        super().__init__(model, tokenizer, **kwargs)
        self.source = source
        self.opening, self._chat_end = "", []
        if self.tokenizer.chat_template:
            user = [{"role": "user", "content": "a"}]
            render = self.encoder.render
            with_opening, without = (render(user, None, {}, add_generation_prompt=on) for on in (True, False))
            if with_opening.startswith(without):
                self.opening = with_opening.removeprefix(without).strip()
            # What two conversations with different answers have in common at their ends.
            one, other = (self.encoder.encode(user, answer).ids for answer in ("a", "b"))
            same = next(i for i, (x, y) in enumerate(zip(one[::-1], other[::-1], strict=False)) if x != y)
            self._chat_end = one[len(one) - same :]

    def encode(self, chat) -> Encoded:
        if isinstance(chat, Rendered):
            return self.encoder.fit(self._ended(chat.ids), 0)
        if not isinstance(chat, Rollout):
            return super().encode(chat)
        try:
            return self.encoder.encode(chat.prompt, chat.completion, chat.tools, **chat.template_kwargs)
        except OverlengthError:
            raise
        except ValueError:
            if not self._is_blank(chat.completion):
                raise
        encoder, prompt = self.encoder, chat.prompt
        if isinstance(prompt, str):
            text = f"{prompt}{chat.completion}{self.tokenizer.eos_token}"
            return encoder.fit(*encoder.tokenize(text, len(prompt), special_tokens=True))
        blank = chat.completion if isinstance(chat.completion, str) else _content(chat.completion[-1])
        messages = [*prompt, {"role": "assistant", "content": blank}]
        return encoder.fit(*encoder.encode_messages(messages, chat.tools, chat.template_kwargs))

    def _is_blank(self, completion) -> bool:
        """Whether an answer holds no text: nothing, white space, or nothing but special tokens."""
        if not isinstance(completion, str):
            if len(completion) != 1 or completion[0].get("tool_calls"):
                return False
            completion = _content(completion[0])
        ids = self.tokenizer(completion, add_special_tokens=False).input_ids
        return not self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` with all that the reward model expects behind an answer, of which they may hold the beginning."""
        eos = self.tokenizer.eos_token_id
        chat = self._chat_end and self.opening in self.tokenizer.decode(ids, skip_special_tokens=False)
        end = self._chat_end if chat else [eos]
        there = next(n for n in range(len(end), -1, -1) if n == 0 or ids[-n:] == end[:n])
        if there == 0 and ids[-1:] == [eos]:
            ids = ids[:-1]  # the policy ends with EOS, the reward model's turns with something else
        return [*ids, *end[there:]]


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
            model loaded here goes to this process's accelerator; a live one stays where it is.
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
            For `from_pretrained`: `dtype`, `revision`, `quantization_config`, ...

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


def _content(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
