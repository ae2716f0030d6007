"""The content of the card of a training run, read from the trainer. `grm_hf.hub.card` writes it."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ..devices import is_whole
from ..hub.card import ANSWERS, QUESTION, TAGS, facts_of_model, metadata_of, write_card
from ..losses import PAIR_LOSSES, TEXT_LOSSES
from ..metrics import brier, expected_calibration_error, fit_temperature, length_bias, pair_wins, wilson_interval


LOG_ROWS = 20


# ------------------------------------------------------------------------------------------------------------- writing


def card_of_run(trainer, name: str, dataset_name: str | None = None, tags: list[str] | None = None) -> str:
    """The card of a training run, at its present step: the text of a README.md. Arguments as [`facts_of_run`]."""
    return write_card(*facts_of_run(trainer, name, dataset_name, tags))


def facts_of_run(
    trainer,
    name: str,
    dataset_name: str | None = None,
    tags: list[str] | None = None,
    example: tuple[str, list[str]] = (QUESTION, ANSWERS),
) -> tuple[dict, dict]:
    """
    The content of the card of a training run, at its present step.

    Args:
        trainer ([`GRMRewardTrainer`]):
            Its settings, counts, log, and the rewards of its last evaluation are read; its model scores two answers.
        name (`str`):
            Hub id, or the name of the output folder.
        dataset_name (`str`, *optional*):
            Hub id of the training data. By default the id that the dataset itself names; a path is never named.
        tags (`list[str]`, *optional*):
            Further tags.
        example (`tuple[str, list[str]]`, *optional*):
            Question and answers of the usage example; the model scores them.

    Returns:
        `tuple[dict, dict]`: metadata and facts, in a form that JSON can store, for [`write_card`].
    """
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = hasattr(model, "peft_config")
    config = (model.get_base_model() if adapter else model).config
    datasets = [dataset_name] if dataset_name and _is_hub_id(dataset_name) else _hub_ids(trainer.train_dataset)
    evaluation = _evaluation(trainer)
    batch = state.train_batch_size or args.per_device_train_batch_size  # auto_find_batch_size may find another one
    batch *= args.gradient_accumulation_steps * args.world_size
    whole = model if is_whole(model) else None
    facts = facts_of_model(config, trainer.processing_class, name, whole, state.global_step, example)
    facts.update(
        datasets=datasets,
        adapter=adapter,
        adapter_load=_adapter_load(config, name) if adapter else None,
        formula=_formula(trainer, config),
        training=[
            ("regularizer", args.regularizer),
            ("alpha", args.alpha),
            ("beta", args.beta),
            ("pair loss", trainer.pair_loss),
            *([("label smoothing", args.label_smoothing)] if args.label_smoothing else []),
            *([("trained", "the reward head alone")] if args.freeze_backbone else []),
            *([("adapter", _adapter_settings(model))] if adapter else []),
            ("steps", f"{state.global_step} of {state.max_steps}"),
            ("pairs a step", batch),
            *_optimiser(trainer),
            ("precision", "bfloat16" if args.bf16 else "float16" if args.fp16 else str(config.dtype).split(".")[-1]),
            ("longer pairs", args.overlength),
            ("layout", trainer.layout),
            ("seed", args.seed),
        ],
        counts=[str(counts) for counts in trainer.data_counts.values()],
        log=_log_table(trainer),
        **evaluation,
    )
    metadata = metadata_of(config, name, [*trainer._tag_names, *TAGS, *(tags or [])], datasets, adapter)
    if "accuracy" in evaluation:
        metadata["model-index"] = _model_index(name, datasets, evaluation["accuracy"])
    return metadata, facts


def eval_results(trainer, dataset_name: str | None = None) -> str | None:
    """The content of `.eval_results/grm_hf.yaml`: the accuracy of the run on a data set of the Hub; `None` without
    one."""
    datasets = [dataset_name] if dataset_name and _is_hub_id(dataset_name) else _hub_ids(trainer.eval_dataset)
    accuracy = _evaluation(trainer).get("accuracy", {})
    if not datasets or len(accuracy) != 1:  # with several evaluation sets it is not known which one is the Hub's
        return None
    row = {
        "dataset": {"id": datasets[0], "task_id": "preference_accuracy"},
        "value": next(iter(accuracy.values())),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "notes": "pairwise accuracy on the evaluation split of the training run",
    }
    return yaml.safe_dump([row], sort_keys=False)


# ------------------------------------------------------------------------------------------------------------- results


def name_of_evaluation(key: str) -> str:
    """The name of an evaluation set among all data of a run, whose training data are `train`."""
    return "eval_train" if key == "train" else key


def _evaluation(trainer) -> dict[str, Any]:
    """Metrics of the saved weights on each evaluation set: those of the best evaluation if it is loaded at the end,
    otherwise those of the last one. `{}` before the first evaluation."""
    log, several = trainer.state.log_history, isinstance(trainer.eval_dataset, dict)
    best = _best_row(trainer, log) if trainer.args.load_best_model_at_end else None
    if trainer.state.global_step < trainer.state.max_steps:
        best = None
    metrics: list[tuple[str, str]] = []
    accuracy, sizes, bias = {}, [], []
    for name in trainer.eval_dataset if several else [None]:
        prefix, before = (f"eval_{name}", f"{name}: ") if several else ("eval", "")
        rows = [row for row in log if f"{prefix}_loss" in row]
        if not rows:
            continue
        row = next((row for row in rows if best and row["step"] == best["step"]), rows[-1])
        lines, sides = _metrics(row, prefix, trainer.eval_pairs.get((prefix, row["step"])))
        if f"{prefix}_accuracy" in row:  # not of rated completions and ties alone
            accuracy[name or ""] = round(row[f"{prefix}_accuracy"], 4)
        metrics += [(before + label, value) for label, value in lines]
        bias += [before + sides] if sides else []
        counts = trainer.data_counts.get(name_of_evaluation(name or "eval"))
        if counts:
            rated = f"{counts.rated} rated completions"
            sizes += [before + (rated if not counts.pairs else f"{counts.pairs} pairs")]
    if not metrics:
        return {}
    which = f"Evaluation set{'s' if several else ''} of the run"
    of = ", ".join([which, *sizes, f"at step {row['step']}."])
    result = {"metrics": metrics, "metrics_of": of} | ({"accuracy": accuracy} if accuracy else {})
    return result | ({"length_line": f"Here: accuracy {'; '.join(bias)}."} if bias else {})


def _metrics(row, prefix, pairs):
    """Label and value of each metric of one evaluation, and the accuracy by length."""
    metrics, sides = [], ""
    if f"{prefix}_accuracy" in row:
        metrics.append(("accuracy", f"{row[f'{prefix}_accuracy']:.3f}"))
    if metrics and pairs is not None:
        chosen, rejected, chosen_length, rejected_length = pairs.T
        margins = chosen - rejected
        low, high = wilson_interval(float(pair_wins(margins, 0).sum()), len(margins))
        metrics[0] = ("accuracy", f"{row[f'{prefix}_accuracy']:.3f} (95% interval {low:.3f} to {high:.3f})")
        bias = length_bias(chosen, rejected, chosen_length, rejected_length)
        sides = ", ".join(
            f"{bias[f'accuracy_chosen_{length}']:.3f} where the chosen answer is {length}"
            for length in ("longer", "shorter")
            if f"accuracy_chosen_{length}" in bias
        )
        if sides:
            metrics.append(("accuracy by length", sides))
        temperature, at_bound = fit_temperature(margins)
        calibration = f"error {expected_calibration_error(margins):.3f}, Brier score {brier(margins):.3f}"
        metrics.append(("calibration", calibration + ("" if at_bound else f", best temperature {temperature:.2f}")))
    squares = [key.removeprefix(f"{prefix}_") for key in row if key.startswith(f"{prefix}_mse_")]
    for key, label in (
        ("margin", "mean margin"),
        ("loss", "loss"),
        ("implicit_accuracy", "accuracy of the LM head"),
        *((key, f"squared error of {key.removeprefix('mse_')}") for key in squares),
        ("perplexity", "perplexity of the chosen responses"),
    ):
        if f"{prefix}_{key}" in row:
            metrics.append((label, f"{row[f'{prefix}_{key}']:.3f}"))
    return metrics, sides


def _best_row(trainer, rows):
    args = trainer.args
    key = args.metric_for_best_model or "eval_loss"
    key = key if key.startswith("eval_") else f"eval_{key}"
    rows = [row for row in rows if key in row]
    if not rows:
        return None
    greater = args.greater_is_better if args.metric_for_best_model else False
    return (max if greater else min)(rows, key=lambda row: row[key])


def _log_table(trainer):
    """Evaluations if there were any, else training lines: at most `LOG_ROWS`, evenly spread, the best one bold."""
    history = trainer.state.log_history
    rows = [row for row in history if "eval_loss" in row]
    best = _best_row(trainer, rows)
    names = ["step", "epoch", "eval_loss", "eval_accuracy", "eval_margin", "eval_perplexity"]
    if not rows:
        rows = [row for row in history if "loss" in row]
        names = ["step", "epoch", "loss", "accuracy", "margin", "perplexity"]
    names = [name for name in names if any(name in row for row in rows)]
    if not rows:
        return None
    every = -(-len(rows) // LOG_ROWS)
    kept = [row for i, row in enumerate(rows) if i % every == 0 or row is rows[-1] or row is best]
    lines = ["| " + " | ".join(name.removeprefix("eval_") for name in names) + " |", "|---" * len(names) + "|"]
    for row in kept:
        cells = [f"{row[n]:.4g}" if isinstance(row.get(n), float) else str(row.get(n, "")) for n in names]
        lines.append("| " + " | ".join(f"**{cell}**" if row is best and cell else cell for cell in cells) + " |")
    return "\n".join(lines)


def _model_index(name, datasets, accuracy):
    task = {"type": "text-classification", "name": "preference"}
    results = []
    for part, value in accuracy.items():
        of = f" ({part})" if part else ""
        dataset = {
            "name": f"evaluation set of the training run{of}",
            "type": datasets[0] if datasets else "preference-pairs",
        }
        metric = {"type": "accuracy", "value": value, "name": "pairwise accuracy"}
        results.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return [{"name": name.split("/")[-1], "results": results}]


# --------------------------------------------------------------------------------------------------------------- words


def _plain(setting):
    return getattr(setting, "value", setting)


def _optimiser(trainer):
    """Learning rate and optimiser: those of the settings, or the user's own."""
    args, (own, schedule) = trainer.args, trainer.own_optimizers
    schedule = _plain(args.lr_scheduler_type) if schedule is None else type(schedule).__name__
    rates, name = [args.learning_rate], _plain(args.optim)
    if own is not None:
        rates = sorted({group.get("initial_lr", group["lr"]) for group in own.param_groups})
        name = type(own).__name__
    elif trainer.optimizer_cls_and_kwargs is not None:
        kind, given = trainer.optimizer_cls_and_kwargs
        rates, name = [given.get("lr", args.learning_rate)], kind.__name__
    return [("learning rate", f"{', '.join(f'{rate:g}' for rate in rates)}, {schedule}"), ("optimiser", name)]


def _formula(trainer, config):
    args, train = trainer.args, trainer.data_counts["train"]
    of_attributes = f"{args.attribute_loss_weight:g} * mean_i (a_i - rating_i)^2"
    if train.rated and not train.pairs:  # rated completions count for nothing else
        return of_attributes
    label = "label" if "label" in (trainer._columns(trainer.train_dataset) or ()) else "1"
    pair = _of_labels(PAIR_LOSSES[trainer.pair_loss].formula, label, args.label_smoothing)
    if args.center_rewards_coefficient is not None:
        pair = f"{pair} + {args.center_rewards_coefficient:g} * (r_c + r_r)^2"
    if args.batch_sum_to_zero:
        pair += f" + {args.batch_sum_to_zero:g} * (mean reward of a step)^2"
    if args.text_loss != "none":
        pair = f"({pair})" if " + " in pair else pair
        text = TEXT_LOSSES[args.text_loss].formula
        text = _of_labels(text, label) if args.text_side == "both" else text
        pair = f"{1 - args.alpha:g} * {pair} + {args.alpha:g} * {text}"
    if trainer._attribute_names is not None:
        pair += f" + {of_attributes}"
    if config.head_type == "bnrm":
        pair += f" + {args.kl_weight:g} * KL(factors and weights || Gamma(1, 1))"
    return pair


def _of_labels(formula, label, smoothing=0.0):
    """The formula of a loss that compares two responses, with soft labels (or `"1"`) and label smoothing."""
    if label == "1" and not smoothing:
        return formula
    right, wrong = f"{label}", f"(1 - {label})"
    if smoothing:
        right, wrong = f"{1 - smoothing:g}", f"{smoothing:g}"
        if label != "1":
            slope = f"{1 - 2 * smoothing:g} * {label}"
            right, wrong = f"({smoothing:g} + {slope})", f"({1 - smoothing:g} - {slope})"
    before, _, z = formula.removesuffix(")").partition("log sigmoid(")
    return f"{before}({right} * log sigmoid({z}) + {wrong} * log sigmoid(-({z})))"


def _adapter_settings(model):
    config = next(iter(model.peft_config.values()))
    rank = f", rank {config.r}" if getattr(config, "r", None) else ""
    return f"{config.peft_type.value}{rank}; reward head in full"


def _adapter_load(config, name):
    if not config.base_model:
        return None
    defaults = {"head_type": "mlp", "head_hidden_size": 1024, "head_num_layers": 1}
    defaults |= {"attribute_names": None, "attribute_weights": None, "attribute_combiner": "sum"}
    head = "".join(f", {k}={getattr(config, k)!r}" for k, v in defaults.items() if getattr(config, k) != v)
    return (
        "from grm_hf import GRMForSequenceClassification\nfrom peft import PeftModel\n\n"
        f'base = GRMForSequenceClassification.from_base("{config.base_model}"{head})\n'
        f'model = PeftModel.from_pretrained(base, "{name}", subfolder="adapter")'
    )


def _is_hub_id(name):
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _hub_ids(dataset) -> list[str]:
    """Hub ids that a dataset says it was downloaded from."""
    if isinstance(dataset, dict):
        return sorted({id for part in dataset.values() for id in _hub_ids(part)})
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    matches = (re.match(r"hf://datasets/([\w.-]+/[\w.-]+?)@", url) for url in sources)
    return sorted({match[1] for match in matches if match})
