"""The GRM trainer: TRL's `RewardTrainer` with a text loss on the LM head.

It differs from TRL in: the loss; the place where a long text is cut (`grm_hf.pairs`); metrics that are exact over
ranks, accumulation and uneven batches; predictions of shape (pairs, 2); adapters that always carry the reward head;
and checkpoints that load by themselves.
"""

import copy
import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from huggingface_hub import HfApi
from transformers import set_seed
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress
from trl import RewardTrainer

from .. import losses
from ..attention import serve_segments
from ..configuration_grm import ADAPTER_POLICIES, GRMConfig, save_policies
from ..devices import alone, evaluating
from ..encoding import Encoder
from ..hub import card, publish
from ..hub.tokenizer import spell_for_transformers_4
from ..layouts import (
    LAYOUTS,
    PairCollator,
    embedded_positions,
    model_kwargs,
    num_sequences,
    resolve_layout,
    sequence_lengths,
)
from ..logprobs import sequence_logps
from ..pairs import Counts, prepare_pairs
from ..scoring import golden
from . import adapters, attributes, loading, reference, run_card
from .averages import Averages
from .config import GRMRewardConfig
from .run_card import name_of_evaluation
from .suites import SuiteCallback


logger = logging.get_logger(__name__)

TEXT_KEYS = ("text_index", "text_targets", "text_owner")
EVAL_RESULTS = ".eval_results/grm_hf.yaml"


class GRMRewardTrainer(RewardTrainer):
    r"""
    Trainer for Generalizable Reward Models (Yang et al., arXiv 2406.10216).

    Arguments are those of [`~trl.RewardTrainer`], with these differences:

    Args:
        model (`str` or `Path` or [`GRMForSequenceClassification`] or [`~peft.PeftModel`]):
            A reward model, or one wrapped by PEFT; or the Hub id or folder of a reward model, of its adapter (which is
            trained further) or of a causal language model, from which a reward model is made (`args.model_init_kwargs`
            may hold the settings of its head: `head_type`, `head_hidden_size`, `head_num_layers`, `head_dropout`,
            `attribute_names`, `attribute_weights`, `attribute_combiner`; its `revision`, `subfolder`, `token`, ...
            hold for the tokenizer, too).
        args ([`GRMRewardConfig`], *optional*):
            Settings. If `None`, the defaults.
        train_dataset, eval_dataset:
            Preference data in any of TRL's formats: explicit or implicit prompt, text or messages, `tools`,
            `chat_template_kwargs`, `margin`; and a soft `label`. Rows are checked before training starts. For a model
            with attributes a row may have ratings, or be a rated completion: see [`~grm_hf.pairs.prepare_pairs`].
        compute_metrics (`Callable`, *optional*):
            Gets predictions of shape `(num_pairs, 2)`: the rewards of the chosen and of the rejected responses. A
            rated completion is a row whose second number is NaN.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Settings of an adapter. The reward head is always trained and saved in full with it
            (`modules_to_save=["score"]`). If targets are left out or name experts, they are those that peft knows for
            the body.

    Attributes:
        data_counts (`dict[str, Counts]`): rows seen, dropped and truncated, for each data set. Those of a streaming
            training set are complete when training ends.
        eval_pairs (`dict[tuple[str, int], np.ndarray]`): for each evaluation, by its prefix and step: rewards of the
            chosen and of the rejected responses, and lengths in tokens of the two texts, `(pairs, 4)`.

    Example:

    ```python
    from grm_hf import GRMRewardConfig, GRMRewardTrainer

    trainer = GRMRewardTrainer(
        model="Qwen/Qwen3-0.6B",
        args=GRMRewardConfig("qwen3-grm", regularizer="sft"),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "reward-trainer", "grm", "reward-model"]
    _name = "GRM"
    _paper = {
        "title": "Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs",
        "id": "2406.10216",
    }

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        quantization_config=None,
        peft_config=None,
        **kwargs,
    ):
        source = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        args, given_args, hub = _settings(args, model, source)
        if source is not None:
            set_seed(args.seed)  # the new head is drawn here
            model = loading.load_model(source, args, quantization_config)
            quantization_config = args.model_init_kwargs = None  # used up
        model = adapters.trainable(model)
        base = _reward_model(model)
        adapters.require_room(args.output_dir, has_adapter=peft_config is not None or is_peft_model(model))
        config: GRMConfig = base.config
        hub = hub or base.hub_arguments
        if processing_class is None:
            made_from = config._name_or_path or config.base_model or config.text_config._name_or_path
            processing_class = loading.load_tokenizer(source or made_from, args, hub)
        config.max_sequence_length = args.max_length
        if peft_config is not None and not is_peft_model(model):
            if args.freeze_backbone:
                raise ValueError("`freeze_backbone=True` trains the reward head alone: leave `peft_config` out.")
            peft_config = adapters.for_reward_model(peft_config, base)
            peft_config = adapters.clone_template(base, processing_class, args, peft_config)
            elsewhere = bool(hub) or given_args.chat_template_path is not None  # than the model's name says
            adapters.give_a_folder(base, args, processing_class, always=elsewhere)
        _freeze(base, args)
        if args.kl_weight != GRMRewardConfig.kl_weight and config.head_type != "bnrm":
            logger.warning(f"`kl_weight` is ignored: the reward head is {config.head_type!r}, not 'bnrm'.")
        if args.attribute_loss_weight != GRMRewardConfig.attribute_loss_weight and config.attribute_names is None:
            logger.warning("`attribute_loss_weight` is ignored: the model has no attributes (`attribute_names`).")
        _warn_of_dropout(config, peft_config, args)
        _require_what_the_text_loss_needs(base, args, has_adapter=bool(peft_config) or is_peft_model(model))
        reference_model = copy.deepcopy(base) if args.reference == "model" and args.needs_reference else None
        self.data_counts, self.eval_pairs, self._eval_rows = {}, {}, []
        self._suites = None
        self.own_optimizers = kwargs.get("optimizers") or (None, None)  # with schedule; those of the settings are none
        self._eval_name = "eval"  # of the data that `evaluate` or `predict` was given
        self._bos_policy, self._folder_was_loaded, self._has_results = config.bos_policy, False, False
        self._attribute_names = config.attribute_names
        self._given = base  # whose embedding grows with the tokens of `chat_template_path`

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )
        self.args.chat_template_path = given_args.chat_template_path  # may have been used up above
        if args.disable_dropout:
            _disable_functional_dropout(self.model)
        self._router_weight = base.router_aux_loss_coef if _has_routers(config) else 0.0
        self.layout = resolve_layout(self._wanted_layout(), self.model)
        self._make_batches(own_collator=data_collator is not None)
        self.pair_loss = self._choose_pair_loss()
        self._averages = {"train": Averages(), "eval": Averages()}
        self._mode = "train"  # or "eval". Not the mode of the model: a scorer in another thread may have set that
        self._moments: dict[int, tuple[float, float]] = {}  # mean and standard deviation of rewards at a step
        self._step, self._pairs_at_once = None, None  # for `batch_sum_to_zero`
        self._tokens_since, self._log_time = 0, time.perf_counter()
        if args.eval_suites:
            self._suites = SuiteCallback(self, args.eval_suites, args.eval_suite_limit)
            self.callback_handler.callbacks.insert(0, self._suites)  # a user's callback may read its figures
        self._make_reference(reference_model)

    # ----------------------------------------------------------------------------------------- what a run is made with

    def _wanted_layout(self):
        """The layout to try. Without a text loss the numbers are TRL's, to the last bit: a layout that rounds
        otherwise must be asked for."""
        wanted, routers = self.args.layout, _has_routers(_unwrapped(self.model).config)
        noise = self.args.neftune_noise_alpha is not None
        if wanted == "auto":
            if self.args.text_loss == "none" or noise:
                return "padded"
            # The auxiliary loss of experts is an average over tokens: a shared prefix would count once.
            return "packed" if routers else "auto"
        if routers and LAYOUTS[wanted].shares:
            logger.warning(
                f"layout={wanted!r} counts a shared prefix once in the auxiliary loss of the experts, so it "
                "is another number than with padded rows. layout='packed' gives the same."
            )
        if noise and LAYOUTS[wanted].segments:
            logger.warning(
                f"layout={wanted!r} makes one long row of a batch, and `neftune_noise_alpha` is less noise the longer "
                "a row is. layout='padded' gives the noise of TRL."
            )
        return wanted

    def _make_batches(self, own_collator):
        """Our collator, or that of the user, whose settings are then not ours."""
        args = self.args
        if not own_collator:
            self.data_collator = PairCollator(
                pad_token_id=self.processing_class.pad_token_id,
                layout=self.layout,
                text=args.text_side,
                pad_to_multiple_of=args.pad_to_multiple_of,
                max_tokens=args.max_tokens_per_batch,
            )
        else:
            given = {"layout": args.layout != "auto"}
            given |= {name: getattr(args, name) is not None for name in ("max_tokens_per_batch", "pad_to_multiple_of")}
            if ignored := [name for name in given if given[name]]:
                logger.warning(f"{', '.join(ignored)} is ignored: a `data_collator` of your own makes the batches.")
        if args.max_tokens_per_batch is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "max_tokens_per_batch makes different numbers of batches on different ranks, and ranks that share "
                "their weights (FSDP, DeepSpeed) would wait for each other forever. Use DDP, or a smaller "
                "per_device_train_batch_size with gradient_accumulation_steps."
            )

    def _choose_pair_loss(self):
        """The name of the loss on the rewards: that of the settings, or what the data has."""
        has_margin = "margin" in (self._columns(self.train_dataset) or ())
        chosen = self.args.pair_loss or ("margin" if has_margin else "bt")
        if chosen == "bt" and has_margin:
            logger.warning("The data has a `margin` column and pair_loss='bt' does not use it.")
        return chosen

    def _make_reference(self, reference_model):
        """What gives reference log-probabilities: columns of the data, a frozen copy, or the model without adapter."""
        self._reference, self._reference_model = None, None
        if self.args.needs_reference:
            self._reference = self._choose_reference(self.args.reference)
        if reference_model is not None:
            reference_model.requires_grad_(False)
            if LAYOUTS[self.layout].segments:
                serve_segments(reference_model)
            self._reference_model = self.accelerator.prepare_model(reference_model.eval(), evaluation_mode=True)
        if self._reference == "precompute":
            self.train_dataset = reference.precompute(self, self.train_dataset, "train")
            if isinstance(self.eval_dataset, dict):
                sets = self.eval_dataset.items()
                self.eval_dataset = {k: reference.precompute(self, d, name_of_evaluation(k)) for k, d in sets}
            elif self.eval_dataset is not None:
                self.eval_dataset = reference.precompute(self, self.eval_dataset, "eval")

    def _choose_reference(self, wanted):
        """`wanted`, or the reference that is exactly the model at the start of training."""
        if wanted in (None, "adapter_off") and is_peft_model(self.model):
            reason = reference.why_adapter_off_is_not_the_start(self)
            if reason is None:
                return "adapter_off"
            if wanted is not None:
                raise ValueError(
                    f"reference='adapter_off' is not this model at the start of training: {reason}. Leave `reference` "
                    "out, or use 'precompute' or 'model'."
                )
            logger.warning(f"The reference is computed beforehand, not by switching the adapter off: {reason}.")
        if wanted in (None, "precompute"):
            if isinstance(self.train_dataset, IterableDataset):
                raise ValueError(
                    "Reference log-probabilities of a streaming dataset cannot be computed beforehand. Set "
                    "reference='model' (a frozen copy), or train an adapter (reference='adapter_off')."
                )
            return "precompute"
        return wanted

    # ------------------------------------------------------------------------------------------------------------ data

    @staticmethod
    def _columns(dataset):
        return getattr(dataset, "column_names", None)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        prepared = self._attribute_names is not None and {*attributes.COLUMNS} <= {*(self._columns(dataset) or ())}
        if prepared and self.data_counts:  # a rated completion is no pair that could be prepared again
            return dataset
        if dataset_name == "eval":
            dataset_name = self._eval_name
        if self.data_counts:  # all but the first
            dataset_name = name_of_evaluation(dataset_name)
        encoder = Encoder(processing_class, args.max_length, args.overlength, self._bos_policy)
        with args.main_process_first(desc=f"tokenizing {dataset_name} dataset"):
            dataset, counts = prepare_pairs(
                dataset,
                encoder,
                dataset_name,
                args.dataset_num_proc,
                starts_required=args.text_loss != "none",
                embeddings=self._given.get_input_embeddings().weight.shape[0] or None,  # 0: sharded
                positions=embedded_positions(self._given),
                whole=bool(self.data_counts),  # all but the first: an evaluation has an end, each row counts once
                attributes=self._attribute_names,
            )
            if dataset_name == "train":
                attributes.check_ratings(dataset, self._given.config, args.attribute_loss_weight)
        self.data_counts[dataset_name] = counts
        if isinstance(dataset, IterableDataset):  # the counts of a stream are reported when it was read
            return dataset
        (logger.warning if counts.changed else logger.info)(str(counts))
        if _groups_by_length(args):  # an evaluation, too
            sides = (dataset[f"{side}_ids"] for side in ("chosen", "rejected"))
            lengths = [len(chosen) + len(rejected) for chosen, rejected in zip(*sides, strict=True)]
            dataset = dataset.add_column(args.length_column_name, lengths)
        return dataset

    def _say_what_was_read(self):
        """The counts of a streaming training set, over all processes; an error if it gave nothing."""
        if not isinstance(self.train_dataset, IterableDataset):
            return
        counts = self.data_counts["train"]
        numbers = torch.tensor(counts.numbers(), device=self.accelerator.device)[None]
        each = self.accelerator.gather(numbers)
        shared = self.train_dataset.num_shards >= self.accelerator.num_processes  # otherwise each process reads all
        numbers = (each.sum(0) if shared else each[each[:, 0].argmax()]).tolist()
        counts = self.data_counts["train"] = Counts("train", **dict(zip(Counts.FIELDS, numbers, strict=True)))
        (logger.warning if counts.changed else logger.info)(str(counts))

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*reference.COLUMNS, "margin", "label", "ref_chosen_logps", "ref_rejected_logps"]
            self._signature_columns += attributes.COLUMNS
            if _groups_by_length(self.args):
                self._signature_columns.append(self.args.length_column_name)

    # ------------------------------------------------------------------------------------------------------------ loss

    def response_logps(self, model, inputs):
        """Log-probabilities of the responses of a batch, summed over their tokens: chosen above rejected, `(2B,)`."""
        logps = [self._forward(model, part, self._lm_fn(part)).lm_output for part in _parts(inputs)]
        return torch.cat([sums.view(2, -1) for sums in logps], dim=1).flatten()

    def _forward(self, model, inputs, lm_fn):
        kwargs = model_kwargs(inputs)
        if self._router_weight:
            kwargs.pop("output_rows", None)  # the auxiliary loss is an average over all tokens of every layer
        return model(**kwargs, use_cache=False, lm_fn=lm_fn)

    def get_batch_samples(self, *args, **kwargs):
        batches, number = super().get_batch_samples(*args, **kwargs)
        args, self._step = self.args, None
        several = args.gradient_accumulation_steps > 1 or args.max_tokens_per_batch is not None  # on every rank alike
        if args.batch_sum_to_zero and several and batches:
            rewards = self._rewards_beforehand(batches)
            self._step = self._step_of(rewards, len(batches))
        return batches, number

    @torch.no_grad()
    def _rewards_beforehand(self, batches, training=True):
        """All rewards of an optimiser step, `(n,)`, with the dropout that its forwards will have (in `training`)."""
        device = self.accelerator.device
        here = [device] if device.type == "cuda" else []
        model, rewards = self.model_wrapped, []
        with alone(self.model), torch.random.fork_rng(here), self.compute_loss_context_manager():
            model.train(training)
            for batch in batches:
                for part in _parts(self._prepare_inputs(batch)):
                    sides = self._forward(model, part, None).logits.flatten().chunk(2)
                    rewards += [attributes.of_pairs(side, part) for side in sides]
        return torch.cat(rewards)

    def _step_of(self, rewards, batches):
        """Of an optimiser step on all ranks: its mean reward, its pairs, and the batches that its gradient is the mean
        of."""
        own = torch.stack([rewards.detach().sum(), rewards.new_tensor(len(rewards))])
        total, count = self.accelerator.gather(own[None]).sum(0)
        count = count.clamp(min=1)  # a step without pairs has no term
        return total / count, count / 2, batches * self.accelerator.num_processes

    def _sum_to_zero(self, chosen, rejected):
        """The term over an optimiser step, a share for each of these pairs, `(B,)`."""
        mean, pairs, batches = self._step or self._step_of(torch.cat([chosen, rejected]), 1)
        share = batches * self._pairs_at_once / pairs  # a batch of fewer pairs counts less in this mean
        return share * losses.sum_to_zero(chosen, rejected, mean)

    def training_step(self, model, inputs, *args, **kwargs):
        parts = _parts(inputs)
        pairs = sum(map(num_sequences, parts))
        loss = 0.0
        self._mode = "train"
        with alone(self.model):  # a scorer in another thread waits, and sets evaluation mode afterwards
            for i, part in enumerate(parts, 1):
                with nullcontext() if i == len(parts) else self.accelerator.no_sync(model):
                    share = num_sequences(part) / pairs
                    loss += super().training_step(model, part | {"share": share}, *args, **kwargs)
        return loss

    def _lm_fn(self, inputs, loss=None):
        """The function that the model runs on its hidden states inside its forward: log-probabilities summed for each
        response."""
        index, targets, owner = (inputs[key] for key in TEXT_KEYS)
        sequences = num_sequences(inputs)
        return lambda hidden, model: sequence_logps(hidden, model, index, targets, owner, sequences, loss)

    def _reference_logps(self, model, inputs):
        """Reference log-probabilities of a batch, `(2B,)`: from the data, or computed now."""
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        with torch.no_grad():
            if self._reference_model is not None:
                return self.response_logps(self._reference_model, inputs)
            if self._reference == "adapter_off":
                with evaluating(model), self.accelerator.unwrap_model(model).disable_adapter():
                    return self.response_logps(model, inputs)
        raise ValueError(
            "This data has no reference log-probabilities (columns `ref_chosen_logps`, `ref_rejected_logps`), which "
            "regularizer='dpo' needs. Pass it to the trainer as `eval_dataset`, or set reference='model'."
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = _parts(inputs)
        share = inputs.get("share")  # of the batch of a training step, in [0, 1]
        if share is None:  # called by hand, or in evaluation: this batch is the step
            ahead = self.args.batch_sum_to_zero and self._mode == "train" and len(parts) > 1
            self._step = self._step_of(self._rewards_beforehand([inputs], model.training), 1) if ahead else None
        self._pairs_at_once = sum(map(num_sequences, parts)) / 2 / (share or 1.0)
        parts = [self._loss_of_part(model, part) for part in parts]
        columns = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
        pairs = len(columns["chosen"])
        loss = sum(mean * (len(part["chosen"]) / pairs) for mean, part in parts) * (share or 1.0)
        rejected = columns["rejected"]
        if "is_pair" in columns:
            rejected = torch.where(columns["is_pair"] > 0, rejected, torch.nan)
        rewards = torch.stack([columns["chosen"], rejected], dim=1)
        with torch.no_grad():
            self._record(self._mode, columns)
        return (loss, {"logits": rewards}) if return_outputs else loss

    def _loss_of_part(self, model, inputs):
        """The mean loss of a batch, and the columns of its pairs, `(B,)` each."""
        args = self.args
        lm_fn, responses_of = None, self._responses_of(model, inputs)
        if responses_of is not None:
            text_loss = losses.TEXT_LOSSES[args.text_loss].function

            def text_of(sums):
                return attributes.only_pairs(text_loss(responses_of(sums), args.beta), inputs)

            lm_fn = self._lm_fn(inputs, lambda sums: args.alpha * text_of(sums).mean())
        outputs = self._forward(model, inputs, lm_fn)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)

        label = inputs.get("label")
        name = self._pair_loss(inputs)
        pair = losses.pair_loss(chosen, rejected, inputs.get("margin"), name, args.label_smoothing, label)
        pair = attributes.only_pairs(pair, inputs)
        loss = pair.mean()
        if args.center_rewards_coefficient is not None:
            centering = attributes.only_pairs(losses.centering(chosen, rejected), inputs)
            pair = pair + args.center_rewards_coefficient * centering
            loss = loss + args.center_rewards_coefficient * centering.mean()
        if args.batch_sum_to_zero and self._mode == "train":
            term = args.batch_sum_to_zero * attributes.over_pairs(self._sum_to_zero, chosen, rejected, inputs)
            pair, loss = pair + term, loss + term.mean()
        text, columns = None, {}
        if responses_of is not None:
            text = text_of(outputs.lm_output)
            columns = {"text_loss": text, **_text_columns(responses_of(outputs.lm_output))}
            loss = losses.total_loss(loss, text.mean(), args.alpha)
        total = losses.total_loss(pair, text, args.alpha)
        if outputs.attributes is not None:
            error, of_attributes = attributes.error(outputs.attributes, inputs, self._attribute_names)
            loss = loss + args.attribute_loss_weight * error.mean()
            total = total + args.attribute_loss_weight * error
            columns |= of_attributes
        if outputs.aux_loss is not None:  # of experts, if the configuration says `output_router_logits`
            aux = self._router_weight * outputs.aux_loss.to(loss.device)
            loss, total = loss + aux, total + aux
            columns["aux_loss"] = outputs.aux_loss.detach().expand_as(pair)
        if outputs.kl is not None:  # of a BNRM head, in training
            kl = columns["kl"] = outputs.kl.view(2, -1).mean(0)
            loss, total = loss + args.kl_weight * kl.mean(), total + args.kl_weight * kl

        chosen_tokens, rejected_tokens = sequence_lengths(inputs).chunk(2)
        columns |= {
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": attributes.only_pairs(rejected_tokens, inputs),
        }
        columns |= {"chosen": chosen, "rejected": rejected, "pair_loss": pair}
        columns |= {name: inputs[name] for name in ("label", "is_pair") if name in inputs}
        return loss, columns | {"loss": total}

    def _pair_loss(self, inputs):
        """Name of the loss on the rewards of this batch. An evaluation set without margins is measured without
        them."""
        if "margin" in inputs or self._mode == "train" or not losses.PAIR_LOSSES[self.pair_loss].reads_margin:
            return self.pair_loss
        logger.warning_once(f"The evaluation data has no `margin`: 'bt' is used, and {self.pair_loss!r} in training.")
        return "bt"

    def _responses_of(self, model, inputs):
        """A function from sums of log-probabilities `(2B,)` to the input of the text loss; `None` without a text
        loss."""
        if self.args.text_loss == "none":
            return None
        missing = [key for key in TEXT_KEYS if key not in inputs]
        if missing:
            raise ValueError(
                f"The batch lacks {missing}, which the text loss needs. A `data_collator` of your own must give what "
                "grm_hf.layouts.PairCollator gives."
            )
        tokens = torch.bincount(inputs["text_owner"], minlength=num_sequences(inputs)).chunk(2)[0]
        reference = self._reference_logps(model, inputs) if self.args.needs_reference else None

        def responses_of(sums):
            chosen, rejected = sums.chunk(2)
            ref_chosen, ref_rejected = (None, None) if reference is None else reference.to(sums.dtype).chunk(2)
            if self.args.text_side == "chosen":
                rejected = None
            label = inputs.get("label")
            return losses.Responses(chosen, tokens.to(sums.dtype), rejected, ref_chosen, ref_rejected, label)

        return responses_of

    def floating_point_ops(self, inputs):
        return sum(super(GRMRewardTrainer, self).floating_point_ops(part) for part in _parts(inputs))

    # --------------------------------------------------------------------------------------------------------- metrics

    def _record(self, mode, columns):
        """Add a batch to the averages. Evaluation gathers row by row, so rows that a sampler repeats count once."""
        lengths = [columns.pop(name) for name in ("chosen_tokens", "rejected_tokens")]
        gather = self.accelerator.gather_for_metrics if mode == "eval" else None
        self._averages[mode].add(columns, gather)
        if mode == "eval":
            label = columns.get("label", torch.ones_like(columns["chosen"]))
            label = torch.where(columns.get("is_pair", torch.ones_like(label)) > 0, label, 0.5)
            seen = torch.stack([columns["chosen"], columns["rejected"], *lengths, label], dim=1).double()
            seen = gather(seen).cpu()
            self._eval_rows.append(seen[seen[:, 4] != 0.5, :4])  # a tie is no pair to be right about
        else:
            self._tokens_since = self._tokens_since + sum(lengths).sum()

    def _take_averages(self, mode):
        """The numbers of a log line; for evaluation also the reward's mean and spread, which go into the
        configuration."""
        gather = None
        if mode == "train" and self.accelerator.num_processes > 1:
            gather = lambda sums: self.accelerator.gather(sums.to(self.accelerator.device))  # noqa: E731
        averages = self._averages[mode].take(gather)
        spread = averages.pop("std_reward", None)
        if mode == "train":
            averages.pop("loss", None)  # transformers logs its own
        elif "mean_reward" in averages:
            config = _unwrapped(self.model).config
            config.reward_mean, config.reward_std = averages["mean_reward"], spread
            self._moments[self.state.global_step] = averages["mean_reward"], spread
        return averages

    def prediction_step(self, *args, **kwargs):
        with alone(self.model):  # the reference may be this model with its adapter switched off
            return super().prediction_step(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        began, before = time.perf_counter(), self._eval_name
        self._eval_name = metric_key_prefix.removeprefix("eval_")
        if self._suites is not None and metric_key_prefix == "eval":
            self._suites.step = None  # they run again, also at this step: the best model may have been loaded
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_name = before
            self._log_time += time.perf_counter() - began  # `tokens_per_second` is of training

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As [`~transformers.Trainer.predict`], for pairs in any form that training takes."""
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _track_num_input_tokens(self, inputs):
        for part in _parts(inputs):  # the tokens of the texts, in every layout
            super()._track_num_input_tokens({**part, "attention_mask": sequence_lengths(part)})

    def evaluation_loop(self, *args, **kwargs):
        self._averages["eval"], self._eval_rows = Averages(), []  # left by `predict`, which logs nothing
        self._mode = "eval"
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs, start_time=None):
        mode = self._mode
        averages = self._take_averages(mode)
        if mode == "train":
            tokens = torch.as_tensor(self._tokens_since, device=self.accelerator.device, dtype=torch.float32)
            tokens = int(self.accelerator.gather(tokens.view(1)).sum().item()) // getattr(self, "_tp_size", 1)
            now = time.perf_counter()
            if averages:
                averages["tokens_per_second"] = round(tokens / (now - self._log_time), 1)
            self._total_train_tokens += tokens
            self._tokens_since, self._log_time = 0, now
        if averages:
            averages["num_tokens"] = self._total_train_tokens
        # `eval`, or `eval_<name>` where there are several evaluation sets.
        prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "eval")
        if self._eval_rows:
            self.eval_pairs[prefix, self.state.global_step] = torch.cat(self._eval_rows).numpy()
            self._eval_rows = []
        logs.update(averages if mode == "train" else {f"{prefix}_{name}": value for name, value in averages.items()})
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------ saving, resuming

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_complete_checkpoint(Path(self.args.output_dir))
        self._averages = {"train": Averages(), "eval": Averages()}
        self._tokens_since, self._log_time = 0, time.perf_counter()
        self._total_train_tokens = _tokens_of(resume_from_checkpoint) if resume_from_checkpoint else 0
        config = _unwrapped(self.model).config
        config.forget_rewards()  # of a model that is trained further
        if resume_from_checkpoint:
            _require_whole(Path(resume_from_checkpoint), is_peft_model(self.model))
            config.reward_mean, config.reward_std = _moments_of(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._say_what_was_read()
        if not self.state.global_step and self.state.max_steps:
            raise ValueError(
                f"Training made no step: the data gave no pair ({self.data_counts['train']}). Check the data, "
                "`max_length` and `overlength`."
            )
        return result

    def _load_best_model(self):
        super()._load_best_model()
        config, state = _unwrapped(self.model).config, self.state  # the configuration is of the last evaluation
        moments = self._moments.get(state.best_global_step) or _moments_of(state.best_model_checkpoint)
        config.reward_mean, config.reward_std = moments

    def _save(self, output_dir=None, state_dict=None):
        here, folder = Path(self.args.output_dir), Path(output_dir or self.args.output_dir)
        readme = folder / "README.md"
        written = readme.read_bytes() if readme.is_file() else None
        rows = folder / golden.FILE
        rows_before = rows.read_bytes() if rows.is_file() else None
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every rank comes here, and one writes
            return
        spell_for_transformers_4(folder)
        if is_peft_model(self.model):
            adapters.require_head(folder)
            save_policies(_unwrapped(self.model).config, folder)
            readme.unlink(missing_ok=True)  # PEFT has written its own, or has named the base by its path
            if written is not None:
                readme.write_bytes(written)
        if folder != here and (here / "README.md").is_file():  # TRL writes the card before it saves a checkpoint
            shutil.copy(here / "README.md", folder)
            if (here / EVAL_RESULTS).is_file():
                (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
                shutil.copy(here / EVAL_RESULTS, folder / EVAL_RESULTS)
        self._save_golden(folder)
        if rows_before is None or not rows.is_file() or rows.read_bytes() != rows_before:
            (folder / card.BENCHMARKS).unlink(missing_ok=True)  # of the weights before

    def _save_golden(self, folder):
        """Golden rows beside the weights. Only this rank runs the forward, so `save_golden` refuses a model that is
        split over ranks: it would wait for the others forever. An adapter's folder loads a quantised base unquantised,
        and that gives another number."""
        try:
            if getattr(_unwrapped(self.model), "hf_quantizer", None) is not None:
                raise ValueError("the model is quantised")
            golden.save_golden(self.model, self.processing_class, folder)
        except ValueError as error:
            (folder / golden.FILE).unlink(missing_ok=True)  # an earlier run's
            logger.warning_once(f"{folder} gets no golden rows for `grm verify`: {error}")
            return
        if not self._folder_was_loaded:  # once in a run, before it costs hours
            try:
                golden.verify(folder, device_map="cpu")
            except (ValueError, RuntimeError, OSError, KeyError, IndexError) as error:
                raise RuntimeError(
                    f"What was saved in '{folder}' does not load as the model that was trained, so training stops. "
                    f"The files were left there. {self._why_another()}{type(error).__name__}: {error}"
                ) from error
            self._folder_was_loaded = True

    def _why_another(self):
        if not is_peft_model(self.model):
            return ""
        name = _unwrapped(self.model).name_or_path
        return (
            f"An adapter is saved without its base '{name}': if the base was changed after it was loaded from there, "
            "save it (and its tokenizer) to a folder of its own, and load it from there. "
        )

    # --------------------------------------------------------------------------------------------------------- the Hub

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write `README.md` (and `.eval_results`) into the output folder. Edits by a person stay.

        Args:
            model_name (`str`, *optional*):
                Defaults to the Hub id, or the name of the output folder.
            dataset_name (`str`, *optional*):
                Hub id of the data. By default the id that the dataset itself names.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = self.hub_model_id or model_name or folder.name
        text = run_card.card_of_run(self, name, dataset_name, [tags] if isinstance(tags, str) else tags)
        path = folder / "README.md"
        if path.is_file():
            text = card.merge_cards(path.read_text(encoding="utf-8"), text)
        path.write_text(text, encoding="utf-8")
        results = run_card.eval_results(self, dataset_name)
        if results is not None:
            (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
            (folder / EVAL_RESULTS).write_text(results, encoding="utf-8")
            self._has_results = True
        elif not self._has_results:
            (folder / EVAL_RESULTS).unlink(missing_ok=True)  # an earlier run's

    def init_hf_repo(self, token=None, private=None):
        """As [`~transformers.Trainer.init_hf_repo`] of the newest transformers; errors say what to do."""
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        api = HfApi(token=args.hub_token if token is None else token)
        with publish.explaining(name):
            private = args.hub_private_repo if private is None else private
            self.hub_model_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        self.push_in_progress = None

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """As [`~transformers.Trainer.push_to_hub`], complete and in one commit: see [`~grm_hf.hub.push_folder`]."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        self.save_model(_internal_call=True)  # first: the Hub may be out of reach, and the model only in memory
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._push(self.args.output_dir, commit_message, blocking, token, revision or self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder):
        # transformers would push the output folder with the weights copied over: without code, an adapter without its
        # base.
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            logger.info(f"{checkpoint_folder} is not pushed: the push before it is still under way.")
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        self._finish_current_push()
        jobs = [self._push(checkpoint_folder, message, False, args.hub_token, args.hub_revision)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                HfApi(token=args.hub_token).upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                    commit_message=f"{message}, checkpoint",
                    ignore_patterns=["training_args.bin"],  # holds the token
                    revision=args.hub_revision,
                    run_as_future=True,
                )
            )
        self.push_in_progress = PushInProgress(jobs)

    def _push(self, folder, message, blocking, token, revision):
        """Stage a folder now and send it now, or in the background (a future)."""
        staged = publish.stage(folder, self.hub_model_id)

        def send():
            with staged:
                return publish.commit(
                    staged.name, self.hub_model_id, revision=revision, token=token, commit_message=message
                )

        return send() if blocking else HfApi().run_as_future(send)

    def _finish_current_push(self):
        super()._finish_current_push()
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", ()):
            if job.exception() is not None:
                logger.warning(f"A checkpoint was not pushed: {job.exception()}")
        self.push_in_progress = None


def _settings(args, model, source):
    """Our settings, which this trainer may change, those that were given, and what of them tells where on the Hub."""
    if args is None:
        name = source if source is not None else model.config._name_or_path
        args = GRMRewardConfig(f"{Path(name).name or 'model'}-GRM")
    if not isinstance(args, GRMRewardConfig):
        raise ValueError(f"`args` is a {type(args).__name__}; GRMRewardTrainer needs a GRMRewardConfig.")
    if "inputs" in args.include_for_metrics:
        raise ValueError(
            "`include_for_metrics` asks for the inputs. A batch of pairs has no row for each prediction, and "
            "transformers would cut it. Read the pairs in `trainer.eval_dataset`: they are in the order of the "
            "predictions."
        )
    given, args = args, copy.copy(args)
    if args.accelerator_config.dispatch_batches:
        logger.warning(
            "`dispatch_batches=True` is ignored: accelerate would cut every tensor of a batch to the number of "
            "its rows, and a batch of pairs holds tensors of several lengths. Each process reads its own batches."
        )
    if args.use_liger_kernel:
        logger.warning("`use_liger_kernel` is ignored: Liger knows models by their type, and 'grm' is none of those.")
        args.use_liger_kernel = False
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            logger.warning(
                f"`{name}` is ignored: it would round the weights of the model itself, the reward head with them, and "
                "they would be saved so. Evaluation has the precision of training; or load the model in another dtype."
            )
            setattr(args, name, False)
    args.accelerator_config = copy.copy(args.accelerator_config)
    args.accelerator_config.dispatch_batches = False
    return args, given, {} if source is None else loading.hub_arguments(args.model_init_kwargs)


def _reward_model(model):
    """The reward model inside PEFT's wrapper, if there is one; refused if it is none."""
    base = _unwrapped(model)
    if base.config.model_type != GRMConfig.model_type:
        raise ValueError(
            f"`model` is a {type(base).__name__}; GRM trains the reward head and the LM head of one model. Make "
            "it with GRMForSequenceClassification.from_base(...), or pass the id of a causal language model."
        )
    return base


def _freeze(base, args):
    """Parts that the settings do not train, or that get no gradient and would be waited for."""
    if args.text_loss == "none" and args.world_size > 1:
        base.freeze_lm_head()
    if args.freeze_backbone:
        base.lm.requires_grad_(False)


def _warn_of_dropout(config, peft_config, args):
    """Rates that the user gave and that TRL's default sets to 0."""
    if not args.disable_dropout:
        return
    for owner in (config, peft_config):
        for name, rate in list(vars(owner).items()) if owner is not None else ():
            if name.endswith("dropout") and rate:
                logger.warning(f"`{name}={rate}` is ignored: TRL sets every dropout to 0. Set disable_dropout=False.")


def _require_what_the_text_loss_needs(base, args, has_adapter):
    if args.text_loss != "none" and not base.lm_head_is_exact():
        raise ValueError(
            f"The LM head of {type(base.lm).__name__} does more than GRM knows of, so the text loss would not be "
            "that model's. Use regularizer='none', or report the model type."
        )
    if args.reference == "adapter_off" and args.needs_reference and not has_adapter:
        raise ValueError("reference='adapter_off' needs an adapter: pass `peft_config`, or use 'precompute'.")


def _has_routers(config):
    """Whether the configuration asks for the auxiliary loss of experts."""
    return bool(getattr(config.text_config, "output_router_logits", False))


def _groups_by_length(args):
    by_strategy = getattr(args, "train_sampling_strategy", None) in ("group_by_length", "batch_rebalance")
    return by_strategy or getattr(args, "group_by_length", False)


def _text_columns(responses):
    """Logged numbers of the text loss: the likelihood of the chosen responses, and which response the LM head prefers
    (by its own log-probability, or by its change against the reference)."""
    columns = {"nll": -responses.chosen, "nll_tokens": responses.chosen_tokens}
    if responses.rejected is not None:
        better, worse = responses.chosen, responses.rejected
        if responses.ref_chosen is not None:
            better, worse = better - responses.ref_chosen, worse - responses.ref_rejected
        columns["implicit_accuracy"] = (better > worse).to(better.dtype)
    return columns


def _parts(inputs):
    """The batches into which `max_tokens_per_batch` split a batch, or the batch itself."""
    return inputs.get("parts", [inputs])


def _unwrapped(model):
    """The reward model inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if is_peft_model(model) else model


def _disable_functional_dropout(model):
    """Set dropout rates to 0 that TRL does not reach. TRL sets `nn.Dropout` modules to 0; some families keep the rate
    in another module (OPT, Bloom, ...) or in the configuration (Falcon), some adapters by their names (LoHa, LoKr) or
    in a module of their own (BOFT)."""
    for owner in (*model.modules(), _unwrapped(model).config.text_config):
        own_kind = "Dropout" in type(owner).__name__
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in name or (own_kind and name == "p")):
                setattr(owner, name, 0.0)
            elif isinstance(value, dict) and name in ("rank_dropout", "module_dropout"):
                value.update(dict.fromkeys(value, 0.0))


def _moments_of(checkpoint):
    """Mean and standard deviation of the rewards at a checkpoint's evaluation."""
    files = [Path(checkpoint, name) for name in ("config.json", ADAPTER_POLICIES)]
    stored = next((json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()), {})
    return stored.get("reward_mean", 0.0), stored.get("reward_std", 1.0)


def _require_whole(checkpoint, has_adapter):
    """Refuse a checkpoint of another kind of run, or without what training goes on with: transformers would begin the
    optimiser and the schedule of the learning rate anew, and say nothing."""
    of_adapter = (checkpoint / "adapter_config.json").is_file()
    if of_adapter != has_adapter and (of_adapter or (checkpoint / "config.json").is_file()):
        raise ValueError(
            f"'{checkpoint}' is of a run {'with' if of_adapter else 'without'} an adapter, and this run has "
            f"{'none' if of_adapter else 'one'}. Resume with the model and the `peft_config` of that run."
        )
    if checkpoint.is_dir() and not any([*checkpoint.glob(name)] for name in ("optimizer*", "global_step*")):
        raise ValueError(
            f"'{checkpoint}' was saved without its optimiser (`save_only_model=True`), so training cannot go on from "
            "it. To begin a new run with its weights, pass it as `model`."
        )


def _tokens_of(checkpoint):
    """Tokens of a run until the last log line before a checkpoint."""
    file = Path(checkpoint, "trainer_state.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["log_history"] if file.is_file() else []
    return next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), 0)


def _last_complete_checkpoint(folder):
    """The newest checkpoint that was written to its end: `trainer_state.json` is written last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        except (OSError, json.JSONDecodeError):
            logger.warning(f"{path} was not written to its end and is passed over.")
    raise ValueError(
        f"There is no complete checkpoint in '{folder}' to resume from. Start without `resume_from_checkpoint`."
    )
