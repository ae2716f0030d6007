"""Several reward models as one. An ensemble is harder to exploit than one model, but errors that all members share can
still be exploited (arXiv 2312.09244, which also finds that seeds of pretraining help more than seeds of fine-tuning).

Members are whole models, adapters on one model, or heads on one body. The Bradley-Terry loss does not fix a member's
zero and, in practice, its scale. Members are therefore standardised before they are combined.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import count, islice

import torch
from torch import Tensor, nn

from ..chats import rows_of
from ..configuration_grm import take_policies
from ..devices import alone
from ..modeling_grm import GRMForSequenceClassification
from ..scoring import Score
from .adapters import PolicyScorer, policy_scorer
from .transforms import as_tensor


COMBINATIONS = ("mean", "median", "min", "mean_minus_std", "nominal_min")


def combine(rewards, how: str = "mean", k: float = 1.0, weight: float = 0.5, nominal: int | Tensor = 0) -> Tensor:
    """
    One reward from those of several members.

    Args:
        rewards (`torch.Tensor` of shape `(num_members, ...)`):
            Rewards by member.
        how (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"median"` (of an even number: the mean of the two in the middle), `"min"`, `"mean_minus_std"`
            (mean minus `k` population standard deviations) or `"nominal_min"` (`weight` times the nominal member plus
            `1 - weight` times the minimum, after BRME, arXiv 2409.15360).
        k (`float`, *optional*, defaults to `1.0`):
            For `"mean_minus_std"`.
        weight (`float`, *optional*, defaults to `0.5`):
            For `"nominal_min"`, between 0 (minimum) and 1 (nominal).
        nominal (`int` or `torch.Tensor` of shape `(...)`, *optional*, defaults to `0`):
            For `"nominal_min"`: the trusted member, one for all rewards or one for each. BRME takes the member with
            the smallest predicted standard deviation (`sigmas.argmin(0)`).

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    _check_combination(how, k, weight)
    rewards = as_tensor(rewards)
    if how == "mean":
        return rewards.mean(0)
    if how == "median":
        return torch.quantile(rewards, 0.5, dim=0)
    if how == "min":
        return rewards.amin(0)
    if how == "mean_minus_std":
        return rewards.mean(0) - k * rewards.std(0, correction=0)
    index = torch.as_tensor(nominal, device=rewards.device).expand(rewards.shape[1:])
    return weight * rewards.gather(0, index[None])[0] + (1 - weight) * rewards.amin(0)


class RewardEnsemble:
    r"""
    An ensemble that scores like a [`GRMScorer`] and can take the place of a reward model in [`grm_reward_func`],
    [`ppo_reward_model`], `grm score`.

    Args:
        members (`Sequence`):
            At least two different reward models: Hub ids, folders (of models or adapters) or live ones.
        tokenizers (`Sequence`, *optional*):
            One for each live model that was made in memory. Default: each member's own.
        how (`str`, *optional*, defaults to `"mean"`):
            See [`combine`], also for `k` and `weight`; the nominal member is the first.
        statistics (`str`, `None` or `list[tuple[float, float]]`, *optional*, defaults to `"stored"`):
            Mean and standard deviation for standardising each member's reward: those in its configuration, a list of
            them, or `None` to combine raw rewards.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            See [`GRMScorer`].

    Attributes:
        settings (`dict`): How members are combined: `how`, `k`, `weight`, `statistics`.

    Raises:
        `ValueError`: for fewer than two members, for identical ones (the ensemble would pretend to agree), and for
            members without stored statistics.
    """

    def __init__(
        self,
        members: Sequence,
        tokenizers: Sequence | None = None,
        how: str = "mean",
        k: float = 1.0,
        weight: float = 0.5,
        statistics="stored",
        max_tokens_per_batch: int = 8192,
    ):
        _check_members(len(members), how, k, weight)
        tokenizers = tokenizers or [None] * len(members)
        if len(tokenizers) != len(members):
            raise ValueError(f"{len(tokenizers)} tokenizers for {len(members)} members; give one each, or none.")
        scorers = [policy_scorer(m, t, max_tokens_per_batch) for m, t in zip(members, tokenizers, strict=True)]
        _refuse_identical([dict(scorer.model.state_dict(keep_vars=True)) for scorer in scorers])
        configs = [scorer.model.config for scorer in scorers]
        self._setup(scorers, [None] * len(scorers), (how, k, weight), statistics, configs)
        self.model: nn.Module = nn.ModuleList(scorer.model for scorer in scorers)

    @classmethod
    def from_adapters(
        cls,
        model: GRMForSequenceClassification,
        adapters: Sequence[str],
        tokenizer=None,
        how: str = "mean",
        k: float = 1.0,
        weight: float = 0.5,
        statistics="stored",
        max_tokens_per_batch: int = 8192,
    ) -> "RewardEnsemble":
        """
        An ensemble of adapters on one reward model, each with its own head. It needs the memory of one model.

        Args:
            model ([`GRMForSequenceClassification`]):
                The reward model that the adapters were trained on. It is changed: the adapters are put into it.
            adapters (`Sequence[str]`):
                At least two folders or Hub ids.
            tokenizer, how, k, weight, statistics, max_tokens_per_batch:
                As for [`RewardEnsemble`].
        """
        from peft import PeftModel

        _check_members(len(adapters), how, k, weight)
        names = [f"member_{index}" for index in range(len(adapters))]
        wrapped = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            wrapped.load_adapter(adapter, adapter_name=name)
        weights: list[dict] = [{} for _ in names]
        for key, parameter in wrapped.named_parameters():
            for name, own in zip(names, weights, strict=True):
                if name in key.split("."):
                    own[key.replace(f".{name}", "")] = parameter
        _refuse_identical(weights)

        configs = [copy.deepcopy(model.config) for _ in names]
        for config, adapter in zip(configs, adapters, strict=True):
            take_policies(config, adapter)
        for name in ("bos_policy", "max_sequence_length", "overlength"):
            if len(found := {getattr(config, name) for config in configs}) > 1:
                raise ValueError(
                    f"The adapters read texts in different ways: `{name}` is one of {sorted(found, key=str)}. Merge "
                    "them (`grm merge`), and pass the models to `RewardEnsemble`."
                )
            setattr(model.config, name, *found)
        scorer = PolicyScorer(model, tokenizer, max_tokens_per_batch=max_tokens_per_batch)
        ensemble = cls.__new__(cls)
        activations = [_Activate(wrapped, name) for name in names]
        ensemble._setup([scorer] * len(names), activations, (how, k, weight), statistics, configs)
        ensemble.model = model
        return ensemble

    def _setup(self, scorers, activations, combination, statistics, configs):
        self._scorers, self._activations, self._combination = scorers, activations, combination
        self._statistics = _statistics(statistics, configs)
        how, k, weight = combination
        self.settings = {"how": how, "k": k, "weight": weight, "statistics": self._statistics}
        first = scorers[0].tokenizer
        same = all(scorer.tokenizer.get_vocab() == first.get_vocab() for scorer in scorers)
        self.tokenizer = first if same else None  # rendered token ids need members that read them alike

    def score(self, chats: Iterable) -> list[float]:
        """As [`GRMScorer.score`]."""
        return [result.score for result in self.stream(chats)]

    @property
    def members(self) -> list[PolicyScorer]:
        """The members' scorers; for adapters on one model, the same scorer several times."""
        return self._scorers

    def check(self, chats: Iterable, names: Iterable[str] | None = None) -> None:
        """As [`GRMScorer.check`], by every member."""
        chats, names = list(rows_of(chats)), None if names is None else list(names)
        for scorer in dict.fromkeys(self._scorers):
            scorer.check(chats, names)

    def stream(self, chats: Iterable, window: int = 1024, names: Iterable[str] | None = None) -> Iterator[Score]:
        """As [`GRMScorer.stream`]; `tokens` are the first member's, `truncated` says whether any member cut."""
        how, k, weight = self._combination
        named = zip((f"chat {i}" for i in count()) if names is None else names, rows_of(chats), strict=False)
        while group := list(islice(named, window)):
            results = self._results([chat for _, chat in group], [name for name, _ in group])
            rewards = combine(self._standardised(results), how, k, weight).tolist()
            for reward, scores in zip(rewards, zip(*results, strict=True), strict=True):
                yield Score(reward, scores[0].tokens, any(score.truncated for score in scores))

    def member_scores(self, chats: Iterable) -> Tensor:
        """Standardised rewards by member, `(num_members, n)`. If they differ, the ensemble is uncertain."""
        return self._standardised(self._results(list(rows_of(chats))))

    def _results(self, chats, names=None):
        results = []
        for scorer, activate in zip(self._scorers, self._activations, strict=True):
            # Which adapter is on is a state of the model: nobody else may use it meanwhile.
            with nullcontext() if activate is None else alone(scorer.model):
                if activate is not None:
                    activate()
                results.append(list(scorer.stream(chats, None, names)))
        return results

    def _standardised(self, results):
        rewards = torch.tensor([[score.score for score in scores] for scores in results], dtype=torch.float64)
        means, stds = torch.tensor(self._statistics, dtype=torch.float64).T
        return (rewards - means[:, None]) / stds[:, None]


def ensemble_heads(
    model: GRMForSequenceClassification,
    heads: Sequence[nn.Module],
    how: str = "mean",
    k: float = 1.0,
    weight: float = 0.5,
    statistics: list[tuple[float, float]] | None = None,
) -> GRMForSequenceClassification:
    """
    Give a reward model several heads on its one body. It needs one forward, and still works everywhere as a reward
    model. It exists in memory only: to keep it, save the heads' weights and combine them again.

    Args:
        model ([`GRMForSequenceClassification`]):
            The body, which the heads were trained on (`freeze_backbone=True`). It is changed.
        heads (`Sequence[nn.Module]`):
            At least two different heads, `(..., hidden_size)` to `(..., 1)`; such as the `score` of several models.
        how, k, weight:
            See [`combine`]; the nominal head is the first.
        statistics (`list[tuple[float, float]]`, *optional*):
            Mean and standard deviation of each head's reward, to standardise by. Default: raw rewards are combined.

    Returns:
        `model`.
    """
    _check_members(len(heads), how, k, weight)
    _refuse_identical([dict(head.state_dict(keep_vars=True)) for head in heads])
    model.score = EnsembleHead(heads, (how, k, weight), statistics).to(model.device)
    model.config.attribute_names = model.config.attribute_weights = None  # an ensemble has a reward alone
    model.config.attribute_combiner = "sum"
    model.config.forget_rewards()
    return model


class EnsembleHead(nn.Module):
    """Several heads as one: `(..., hidden_size)` to `(..., 1)`."""

    def __init__(self, heads, combination, statistics):
        super().__init__()
        self.heads, self.combination = nn.ModuleList(heads), combination
        pairs = [(0.0, 1.0)] * len(heads) if statistics is None else _statistics(statistics, heads)
        means, stds = torch.tensor(pairs, dtype=torch.float32).T
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    def forward(self, hidden_states):
        rewards = torch.stack([head(hidden_states) for head in self.heads], dim=-1)
        how, k, weight = self.combination
        return combine(((rewards - self.means) / self.stds).movedim(-1, 0), how, k, weight)


class _Activate:
    """Switches one adapter on, without making it trainable."""

    def __init__(self, wrapped, name):
        self.wrapped, self.name = wrapped, name

    def __call__(self):
        self.wrapped.set_adapter(self.name, inference_mode=True)


def _statistics(statistics, members):
    """Mean and standard deviation of each member; `members` are the configurations that may store them."""
    if statistics is None:
        return [(0.0, 1.0)] * len(members)
    if statistics == "stored":
        pairs = [(config.reward_mean, config.reward_std) for config in members]
        if without := [index for index, pair in enumerate(pairs) if pair == (0.0, 1.0)]:
            raise ValueError(
                f"Members {without} store no mean and standard deviation of their reward, without which their rewards "
                "cannot be compared. Training with an evaluation set stores them; else pass `statistics` (a pair for "
                "each member, measured on the same answers), or `statistics=None` to combine raw rewards."
            )
    else:
        pairs = [tuple(map(float, pair)) for pair in statistics]
        if len(pairs) != len(members) or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"`statistics` must hold (mean, std) for each of {len(members)} members; found {pairs}.")
    for mean, std in pairs:
        if not (std > 0 and math.isfinite(mean)):
            raise ValueError(f"`statistics` has mean {mean} and standard deviation {std}, which must be above 0.")
    return pairs


def _check_combination(how, k, weight):
    if how not in COMBINATIONS:
        raise ValueError(f"`how` is {how!r}; it must be one of {COMBINATIONS}.")
    if not 0 <= weight <= 1:
        raise ValueError(f"`weight` is {weight}; it must be between 0 and 1.")
    if not 0 <= k < math.inf:
        raise ValueError(f"`k` is {k}; it must be a finite number, 0 or more.")


def _check_members(number, how, k, weight):
    _check_combination(how, k, weight)
    if number < 2:
        raise ValueError(f"An ensemble needs at least two members, found {number}.")


def _refuse_identical(members):
    for second, other in enumerate(members):
        for first, one in enumerate(members[:second]):
            if one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in reversed(one)):
                raise ValueError(
                    f"Members {first} and {second} are identical: together they say no more than one of them, and "
                    "their agreement would look like certainty. Give members that were trained apart."
                )


def _equal(one, other):
    return one is other or (one.shape == other.shape and torch.equal(one.detach().cpu(), other.detach().cpu()))
