"""A reward model for TRL's `PPOTrainer` (`trl.experimental.ppo`, TRL up to 1.12; `pip install grm-hf[ppo]`).

PPO never calls a reward model's `forward`. It tells padding from text by comparing ids, calls the body that
`base_model_prefix` names, puts `score` on its last hidden state and reads the number at the last token before the
padding. [`PPORewardModel`] has these three names, with the whole path from text to reward (end of turn, truncation,
transformation) behind them.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import nn

from .adapters import policy_scorer
from .rollouts import Rendered, Rollout
from .transforms import Transform


def ppo_reward_model(
    model,
    policy_tokenizer,
    tokenizer=None,
    *,
    prompts=None,
    transform=None,
    reference: float | None = None,
    max_tokens_per_batch: int = 8192,
    check: bool = True,
    **load_kwargs,
) -> "PPORewardModel":
    r"""
    Make a `reward_model` for TRL's `PPOTrainer`.

    Args:
        model (`str`, [`GRMForSequenceClassification`] or [`RewardEnsemble`]):
            Hub id or folder (of a model or an adapter), a live reward model, or an ensemble.
        policy_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer, which PPO gets as `processing_class`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The reward model's tokenizer. By default loaded from the same place.
        prompts (`Iterable[dict]`, *optional*):
            For a reward model with another vocabulary or chat template than the policy's: rows with `prompt` (messages
            or text) and its `input_ids` as PPO gets them, of the training and the evaluation set. Rewards are then
            those of [`grm_reward_func`]: the answer is decoded, and rendered anew behind its prompt.
        transform (`str` or `Callable`, *optional*):
            See [`Transform`].
        reference (`float`, *optional*):
            See [`Transform`].
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            See [`GRMScorer`].
        check (`bool`, *optional*, defaults to `True`):
            Score the golden rows of a model that is loaded here, and refuse the model if a reward differs from the
            stored one.
        **load_kwargs:
            For `from_pretrained`: `dtype`, `revision`, `quantization_config`, ...

    Returns:
        [`PPORewardModel`].

    Raises:
        `ValueError`: for a policy tokenizer without a padding token or with EOS as padding; without `prompts`, also
            for a reward model with another vocabulary or with EOS as padding; [`GoldenError`] for golden rows that do
            not hold.

    Example:

    ```python
    reward_model = ppo_reward_model("my-grm", policy_tokenizer)
    value_model = GRMForSequenceClassification.from_pretrained("my-grm")  # its head goes on learning
    PPOTrainer(..., processing_class=policy_tokenizer, reward_model=reward_model, value_model=value_model)
    ```
    """
    _check_padding(policy_tokenizer, "policy's")
    scorer = policy_scorer(model, tokenizer, max_tokens_per_batch, check, load_kwargs)
    if prompts is None:
        if scorer.tokenizer is None:
            raise ValueError("The members of the ensemble have different tokenizers: pass `prompts`.")
        _check_padding(scorer.tokenizer, "reward model's")
        _check_vocabulary(policy_tokenizer, scorer.tokenizer)
    config = getattr(scorer.model, "config", None)
    return PPORewardModel(scorer, policy_tokenizer, prompts, Transform(transform, config, reference))


class PPORewardModel(nn.Module):
    """
    A reward model in the form that PPO reads, made by [`ppo_reward_model`].

    Attributes:
        model: the body: ids and mask to "hidden states" `(batch_size, sequence_length, 1)`, which hold each row's
            reward in every column.
        score: the head, which passes them through.
    """

    base_model_prefix = "model"

    def __init__(self, scorer, policy_tokenizer, prompts, transform):
        super().__init__()
        self.scorer = scorer
        self.model = _Body(scorer, policy_tokenizer, prompts, transform)
        self.score = nn.Identity()
        self.config = getattr(scorer.model, "config", None)  # DeepSpeed reads `hidden_size`


class _Body(nn.Module):
    def __init__(self, scorer, policy_tokenizer, prompts, transform):
        super().__init__()
        self.reward_model = scorer.model  # so that it moves with the module
        self.scorer, self.policy_tokenizer, self.transform = scorer, policy_tokenizer, transform
        self.prompts = None if prompts is None else _by_ids(prompts)
        self.prompt_lengths = sorted({len(ids) for ids in self.prompts or ()}, reverse=True)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, input_ids, attention_mask, **kwargs):
        # `kwargs` are a decoder's: positions, and which outputs to return. Only the mask matters here.
        rows = [ids[real.bool()].tolist() for ids, real in zip(input_ids, attention_mask, strict=True)]
        chats = [Rendered(row) if self.prompts is None else self._rollout(row) for row in rows]
        scores = list(self.scorer.stream(chats))
        groups = None if self.prompts is None else [chat.prompt for chat in chats]
        rewards = torch.tensor([score.score for score in scores], dtype=torch.float64)
        rewards = self.transform(rewards, [score.tokens for score in scores], groups)
        hidden = rewards.to(input_ids.device, torch.float32)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=(hidden,), last_hidden_state=hidden)

    def _rollout(self, row):
        for length in self.prompt_lengths:
            prompt = self.prompts.get(tuple(row[:length]))
            if prompt is not None and length <= len(row):
                answer = self.policy_tokenizer.decode(row[length:], skip_special_tokens=True)
                messages = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
                return Rollout(prompt, messages)
        start = self.policy_tokenizer.decode(row[:40])
        raise ValueError(
            f"PPO asks for the reward of a text whose prompt is none of `prompts`; it begins {start!r}. `prompts` "
            "must hold the rows of the training and of the evaluation set, with the `input_ids` that PPO gets."
        )


def _by_ids(prompts):
    known = {}
    for index, row in enumerate(prompts):
        if not isinstance(row, Mapping) or row.get("prompt") is None or row.get("input_ids") is None:
            has = f"has {sorted(row)}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
            raise ValueError(
                f"row {index} of `prompts` {has}; it needs `prompt` (messages or text) and `input_ids`, "
                "the same prompt as PPO gets it."
            )
        ids = tuple(int(i) for i in row["input_ids"])
        if known.setdefault(ids, row["prompt"]) != row["prompt"]:
            raise ValueError(
                f"row {index} of `prompts` has the `input_ids` of an earlier row and another `prompt`, so answers to "
                "the two cannot be told apart. Do not cut the `input_ids`, or remove one of the rows."
            )
    if not known:
        raise ValueError("`prompts` is empty.")
    return known


def _check_padding(tokenizer, whose):
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != eos:
        return
    fault = "has no padding token" if pad is None else f"uses its EOS token {tokenizer.eos_token!r} as padding"
    raise ValueError(
        f"The {whose} tokenizer {fault}. PPO tells padding from text by the token id, so a finished answer would be "
        "read one token before its end. Set `tokenizer.pad_token` to a token that no text holds: a reserved one of "
        "the vocabulary, or a new one (`tokenizer.add_special_tokens({'pad_token': '<|pad|>'})`, then "
        "`model.resize_token_embeddings(len(tokenizer))` for the policy and the value model)."
    )


def _check_vocabulary(policy_tokenizer, tokenizer):
    ours, theirs = tokenizer.get_vocab(), policy_tokenizer.get_vocab()
    # Padding is masked before the reward model sees it.
    differing = [t for t, index in theirs.items() if ours.get(t) != index and t != policy_tokenizer.pad_token]
    if differing:
        raise ValueError(
            f"The policy and the reward model have different vocabularies: {len(differing)} of {len(theirs)} tokens "
            "of the policy have another id, or none, in the reward model's tokenizer (such as "
            f"{sorted(differing)[:3]}). PPO hands the policy's ids to the reward model. Pass `prompts` (rows with "
            "`prompt` and `input_ids`), so that answers are decoded and rendered anew, and make the value model from "
            "the policy."
        )
