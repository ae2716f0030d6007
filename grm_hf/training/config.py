"""Settings of a GRM training run: TRL's reward settings and those of the text loss."""

import math
import re
import warnings
from dataclasses import dataclass, field

from trl import RewardConfig

from ..layouts import LAYOUTS
from ..losses import PAIR_LOSSES, TEXT_LOSSES


REGULARIZERS = ("none", *TEXT_LOSSES)
# transformers 5.24 calls gradient checkpointing activation checkpointing, and warns of the old name.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in RewardConfig.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
OVERLENGTH = ("truncate_left", "drop", "error")
LESS_IS_BETTER = r"(^|_)(mse_.+|perplexity)$"  # of the metrics that are logged
REFERENCES = ("adapter_off", "precompute", "model")


def _formulas(table):
    return "; ".join(f"{name}: {loss.formula}" for name, loss in table.items())


@dataclass
class GRMRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`GRMRewardTrainer`].

    This class includes only the parameters that are specific to GRM. For the others, see [`~trl.RewardConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the loss, `(1 - alpha) * pair_loss + alpha * text_loss`

        regularizer (`str`, *optional*, defaults to `"sft"`):
            Text loss on the LM head: `"none"` (a Bradley-Terry reward model with the same head) or one
            of [`~grm_hf.losses.TEXT_LOSSES`], which holds the formulas: `"sft"` (the paper's default), `"sft_nll"`,
            `"sft_token_mean"`, `"dpo_noref"` or `"dpo"`.
        alpha (`float`, *optional*, defaults to `0.01`):
            Weight of the text loss, in `[0, 1]`. The paper found 0.005 to 0.05 best. 0 is the same as `"none"`.
        beta (`float`, *optional*, defaults to `0.1`):
            Inverse temperature of the text losses whose formula has it.
        pair_loss (`str`, *optional*):
            Loss on the rewards, one of [`~grm_hf.losses.PAIR_LOSSES`]: `"bt"`, `"margin"` or `"scaled"`. If `None`,
            `"margin"` if the training data has a `margin` column (as in TRL), else `"bt"`. An evaluation set without
            margins is measured with `"bt"`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Assumed share of wrong labels, in `[0, 0.5)`.
        batch_sum_to_zero (`float`, *optional*, defaults to `0.0`):
            Weight `c` of `c * m^2`, where `m` is the mean reward of all responses of an optimiser step (2505.07271).
            It keeps the rewards of a step around zero. `center_rewards_coefficient` does so for each pair. The mean is
            exact over ranks. With gradient accumulation or `max_tokens_per_batch` it costs one more forward of the
            step, without gradients. Evaluation leaves the term out. The paper's code uses 0.001 times the batch size.
        attribute_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight `gamma` of the squared error of the attributes, if the model has `attribute_names`: the mean over
            the ratings that a row has. It is added to the loss of a pair, and is the whole loss of a rated completion.
        kl_weight (`float`, *optional*, defaults to `1e-5`):
            With `head_type="bnrm"`: weight of the divergence of its factors and weights from their prior, which is
            added to the whole loss (2602.10623). A pair has the mean of its two responses, so the term is a mean over
            the responses of a step, and once that of the weights. Evaluation leaves it out.
        reference (`str`, *optional*):
            Source of the reference log-probabilities of `"dpo"`: `"adapter_off"` (the same model with its adapter
            switched off), `"precompute"` (one pass before training, cached in `output_dir`) or `"model"` (a frozen
            second copy). If `None`, `"adapter_off"` with an adapter that changes nothing at the start, else
            `"precompute"`. The reference is always the model at the start of training.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Train the reward head alone. Requires `regularizer="none"`.

        > Parameters that control the data

        overlength (`str`, *optional*, defaults to `"truncate_left"`):
            What happens to a pair longer than `max_length`: `"truncate_left"` (the prompt loses its beginning; the
            terminator always stays), `"drop"` (as TRL) or `"error"`. Cut and dropped pairs are counted in
            `trainer.data_counts` and reported.
        layout (`str`, *optional*, defaults to `"auto"`):
            How pairs are laid out in a batch: `"padded"`, `"packed"` (no padding), `"shared_prefix"` (no padding, and
            the common beginning of chosen and rejected is computed once), or `"auto"`: the cheapest layout that is
            exact for the model. All give the same numbers up to rounding. Without a text loss `"auto"` is `"padded"`,
            whose numbers are TRL's to the last bit; and so it is with `neftune_noise_alpha`, whose noise depends on
            the length of a row.
        max_tokens_per_batch (`int`, *optional*):
            Largest number of tokens that go through the model at once, in training and evaluation: the tokens that the
            layout computes, padding included. The `per_device_train_batch_size` pairs of a step are split into as many
            batches as this needs. Each batch counts by its share of the pairs, so the loss and the gradient of a step
            stay the same: the pairs decide what is learned, the tokens decide the memory. A longer pair is a batch by
            itself. Not with FSDP and DeepSpeed.

        > Parameters that control the evaluation

        eval_suites (`list[str]`, *optional*):
            Benchmarks of `grm_hf.evaluation` that run at each evaluation, such as `["hhh"]`; `"hhh=PATH"` reads the
            files at `PATH`. The figure is logged as `eval_hhh/score`, and `metric_for_best_model` can name it.
        eval_suite_limit (`int`, *optional*):
            Largest number of examples of each suite, spread over the suite. Default: all.
    """

    regularizer: str = field(
        default="sft",
        metadata={
            "help": "Text-generation loss on the kept LM head. none: no text loss; " + _formulas(TEXT_LOSSES),
            "choices": list(REGULARIZERS),
        },
    )
    alpha: float = field(default=0.01, metadata={"help": "Weight of the text loss, in [0, 1]."})
    beta: float = field(default=0.1, metadata={"help": "Inverse temperature of the text loss."})
    pair_loss: str | None = field(
        default=None,
        metadata={
            "help": f"Loss on the rewards. {_formulas(PAIR_LOSSES)}. Default: margin if the data has a margin column, "
            "else bt."
        },
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed share of wrong labels, in [0, 0.5)."})
    batch_sum_to_zero: float = field(
        default=0.0, metadata={"help": "Weight of the squared mean reward of all responses of an optimiser step."}
    )
    attribute_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the squared error of the attributes, if the model has some."}
    )
    kl_weight: float = field(
        default=1e-5, metadata={"help": "Weight of the divergence from the prior, for head_type bnrm."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Reference log-probabilities for dpo: adapter_off, precompute or model. Default: adapter_off with "
            "an adapter, else precompute."
        },
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the reward head alone."})
    overlength: str = field(
        default="truncate_left",
        metadata={"help": "What happens to a pair longer than max_length.", "choices": list(OVERLENGTH)},
    )
    layout: str = field(
        default="auto", metadata={"help": "How pairs lie in a batch.", "choices": ["auto", *LAYOUTS]}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Most tokens that go through the model at once. Default: no limit."}
    )
    eval_suites: list[str] | None = field(
        default=None,
        metadata={"help": "Benchmarks that run at each evaluation: names, or name=PATH. Logged as eval_NAME/score."},
    )
    eval_suite_limit: int | None = field(
        default=None, metadata={"help": "Most examples of each of eval_suites. Default: all."}
    )

    def __post_init__(self):
        if CHECKPOINTING != "gradient_checkpointing":  # TRL's default has the old name
            for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
                if getattr(self, new := old.replace("gradient", "activation")) is None:
                    setattr(self, new, getattr(self, old))
        if self.greater_is_better is None and re.search(LESS_IS_BETTER, self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers would choose the worst checkpoint
        super().__post_init__()
        for name, choices in {
            "regularizer": REGULARIZERS,
            "pair_loss": (None, *PAIR_LOSSES),
            "reference": (None, *REFERENCES),
            "overlength": OVERLENGTH,
            "layout": ("auto", *LAYOUTS),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {choices}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` is {self.alpha}; it weighs two losses and must be in [0, 1].")
        if self.beta <= 0:
            raise ValueError(f"`beta` is {self.beta}; it must be above 0. To switch the text loss off, set alpha=0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` is {self.label_smoothing}; it must be in [0, 0.5).")
        for name in ("batch_sum_to_zero", "attribute_loss_weight", "kl_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is a weight and must be at least 0.")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(
                f"`max_tokens_per_batch` is {self.max_tokens_per_batch}; it must be at least 1, or None for no limit."
            )
        if self.eval_suites:
            from ..evaluation import SUITES

            unknown = [suite for suite in self.eval_suites if suite.partition("=")[0] not in SUITES]
            if unknown:
                raise ValueError(f"`eval_suites` has {unknown}; there are {', '.join(SUITES)}.")
            if self.eval_strategy == "no":
                raise ValueError("`eval_suites` run at evaluations, but eval_strategy is 'no'. Set it to 'steps'.")
        elif self.eval_suite_limit is not None:
            warnings.warn("`eval_suite_limit` is ignored: there are no `eval_suites`.", stacklevel=2)
        if self.freeze_backbone and self.text_loss != "none":
            raise ValueError(
                f"`freeze_backbone=True` leaves nothing for the text loss {self.regularizer!r} to train. Set "
                "regularizer='none', or train the backbone."
            )
        if self.reference is not None and not self.needs_reference:
            warnings.warn(
                f"`reference={self.reference!r}` is ignored: no reference is needed by regularizer="
                f"{self.regularizer!r} with alpha={self.alpha}.",
                stacklevel=2,
            )
        defaults = type(self).__dataclass_fields__
        for name, read in {
            "alpha": self.regularizer != "none",
            "beta": self.text_loss != "none" and "beta" in TEXT_LOSSES[self.text_loss].formula,
        }.items():
            if not read and getattr(self, name) not in (0, defaults[name].default):
                warnings.warn(
                    f"`{name}={getattr(self, name)}` is ignored: regularizer={self.regularizer!r} with "
                    f"alpha={self.alpha} does not use it.",
                    stacklevel=2,
                )
        if self.text_loss != "none" and self.alpha == 1:
            warnings.warn(
                "alpha=1 leaves the loss on the rewards out: the reward head is not trained to prefer `chosen`.",
                stacklevel=2,
            )
        if self.label_smoothing_factor:
            warnings.warn(
                f"`label_smoothing_factor={self.label_smoothing_factor}` is ignored: it smooths the labels of a "
                "classifier. For preference pairs set `label_smoothing`.",
                stacklevel=2,
            )

    @property
    def text_loss(self) -> str:
        """The text loss that is computed: `regularizer`, or `"none"` if `alpha` is 0."""
        return "none" if self.alpha == 0 else self.regularizer

    @property
    def text_side(self) -> str:
        """The responses whose log-probability the text loss needs: `"none"`, `"chosen"` or `"both"`."""
        return "none" if self.text_loss == "none" else TEXT_LOSSES[self.text_loss].sides

    @property
    def needs_reference(self) -> bool:
        """Whether the computed text loss needs the log-probabilities of a reference model."""
        return self.text_loss != "none" and TEXT_LOSSES[self.text_loss].reference
