"""Model cards: written from a run or a folder, and merged with what a person has made of an earlier one.

A card is made of blocks, `<!-- grm_hf NAME DIGEST -->` to `<!-- /grm_hf -->`. The digest is that of the text between,
so that a later card knows whether somebody has edited it: such a block stays as it is, an untouched one is replaced,
one that was deleted does not come back, and text outside of blocks is left alone. The first line after the metadata
keeps a digest of each metadata field for the same purpose.
"""

import contextlib
import hashlib
import io
import json
import re
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging

from ..configuration_grm import GRMConfig
from ..metrics import brier, expected_calibration_error, fit_temperature, length_bias, pair_wins, wilson_interval
from ..pairs import Encoder
from ..scoring.scorer import is_whole


logger = logging.get_logger(__name__)

TAGS = ["reward-model", "grm", "generated_from_trainer"]
BLOCK = re.compile(r"<!-- grm_hf (\w+)(?: (\w+))? -->\n(.*?)<!-- /grm_hf -->", re.DOTALL)
RECORD = re.compile(r"<!-- grm_hf of (\S+): (.*?) -->\n")
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
QUESTION, ANSWERS = "What is the capital of France?", ["Paris.", "I like trains."]
LOG_ROWS = 20
FORMULAS = {
    "none": "",
    "sft": "-log sigmoid(beta * s_c)",
    "sft_nll": "-s_c",
    "sft_token_mean": "-s_c / tokens",
    "dpo_noref": "-log sigmoid(beta * (s_c - s_r))",
    "dpo": "-log sigmoid(beta * ((s_c - s_r) - (ref_c - ref_r)))",
}


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
    What the card of a training run says, at its present step.

    Args:
        trainer ([`GRMRewardTrainer`]):
            Its settings, counts, log, and the rewards of its last evaluation are read; its model scores two answers.
        name (`str`):
            Hub id, or the name of the output folder.
        dataset_name (`str`, *optional*):
            Hub id of the training data. By default what the dataset says of itself; a path is never named.
        tags (`list[str]`, *optional*):
            Further tags.
        example (`tuple[str, list[str]]`, *optional*):
            Question and answers of the usage example, which the model scores.

    Returns:
        `tuple[dict, dict]`: metadata and facts, as JSON can store them, for [`write_card`].
    """
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = hasattr(model, "peft_config")
    config = (model.get_base_model() if adapter else model).config
    datasets = [dataset_name] if dataset_name and _is_hub_id(dataset_name) else _hub_ids(trainer.train_dataset)
    evaluation = _evaluation(trainer)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    whole = model if is_whole(model) else None
    facts = _facts(config, trainer.processing_class, name, whole, state.global_step, example)
    facts.update(
        datasets=datasets,
        adapter=adapter,
        adapter_load=_adapter_load(config, name) if adapter else None,
        formula=_formula(trainer),
        training=[
            ("regularizer", args.regularizer),
            ("alpha", args.alpha),
            ("beta", args.beta),
            ("pair loss", trainer._pair_loss),
            *([("label smoothing", args.label_smoothing)] if args.label_smoothing else []),
            *([("trained", "the reward head alone")] if args.freeze_backbone else []),
            *([("adapter", _adapter_settings(model))] if adapter else []),
            ("steps", f"{state.global_step} of {state.max_steps}"),
            ("pairs a step", batch),
            ("learning rate", f"{args.learning_rate:g}, {_plain(args.lr_scheduler_type)}"),
            ("optimiser", _plain(args.optim)),
            ("precision", "bfloat16" if args.bf16 else "float16" if args.fp16 else str(config.dtype).split(".")[-1]),
            ("longer pairs", args.overlength),
            ("layout", trainer.layout),
            ("seed", args.seed),
        ],
        counts=[str(counts) for counts in trainer.data_counts.values()],
        log=_log_table(trainer),
        **evaluation,
    )
    metadata = _metadata(config, name, [*trainer._tag_names, *TAGS, *(tags or [])], datasets, adapter)
    if evaluation:
        metadata["model-index"] = _model_index(name, datasets, evaluation["accuracy"])
    return metadata, facts


def card_of_folder(folder: str | Path, name: str, tags: list[str] | None = None) -> str:
    """The card of a saved model whose run is not known: what its configuration and its tokenizer say."""
    config = GRMConfig.from_pretrained(folder)
    facts = _facts(config, _tokenizer(folder), name)
    return write_card(_metadata(config, name, [*TAGS[:2], *(tags or [])], [], False), facts)


def eval_results(trainer, dataset_name: str | None = None) -> str | None:
    """What `.eval_results/grm_hf.yaml` holds: the accuracy of the run on a data set of the Hub; `None` without one."""
    datasets = [dataset_name] if dataset_name and _is_hub_id(dataset_name) else _hub_ids(trainer.eval_dataset)
    accuracy = _evaluation(trainer).get("accuracy", {})
    if not datasets or len(accuracy) != 1:  # of several evaluation sets it is not known which is the Hub's
        return None
    row = {
        "dataset": {"id": datasets[0], "task_id": "preference_accuracy"},
        "value": next(iter(accuracy.values())),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "notes": "pairwise accuracy on the evaluation split of the training run",
    }
    return yaml.safe_dump([row], sort_keys=False)


@cache
def _template():
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("Model cards need jinja2: pip install 'grm-hf[train]'.") from error
    here = Path(__file__).resolve()
    # In an installed package beside the code, in a checkout at its root.
    folder = next(f for f in (here.parents[1] / "model_cards", here.parents[2] / "model_cards") if f.is_dir())
    environment = jinja2.Environment(keep_trailing_newline=True)
    return environment.from_string((folder / "template.md").read_text(encoding="utf-8"))


def write_card(metadata: dict, facts: dict) -> str:
    """The text of a README.md that says what [`facts_of_run`] found."""
    body = BLOCK.sub(lambda found: _block(found[1], found[3].strip("\n")), _template().render(facts))
    return _join(metadata, {key: _digest(_dump(value)) for key, value in metadata.items()}, facts["name"], body)


def _block(name, text):
    text = f"{text}\n" if text else ""
    return f"<!-- grm_hf {name} {_digest(text)} -->\n{text}<!-- /grm_hf -->"


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _dump(value):
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


# --------------------------------------------------------------------------------------------------------------- facts


def _facts(config, tokenizer, name, model=None, step=None, example=(QUESTION, ANSWERS)):
    snippet = _snippet(config, tokenizer, *example)
    load = (
        "import torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f'model = AutoModelForSequenceClassification.from_pretrained("{name}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)'
    )
    head = "linear" if config.head_type == "linear" else f"MLP, {config.head_num_layers} x {config.head_hidden_size}"
    template = "none: texts are read as they are"
    if tokenizer is not None and tokenizer.chat_template:
        template = "its tokenizer's; a chat reads\n" + _rendered(tokenizer)
    limit, body = config.max_sequence_length, config.text_config
    return {
        "name": name,
        "base_model": config.base_model,
        "load": load,
        "snippet": snippet,
        "output": None if model is None else _executed(snippet, model, tokenizer),
        "when": f" (step {step})" if step else "",
        "temperature": f"{config.reward_temperature:g}",
        "rewardbench_length": min(limit or 4096, 4096),
        "model": [
            ("body", f"{body.model_type}, {body.num_hidden_layers} layers, width {body.hidden_size}"),
            ("reward head", head),
            ("chat template", template.replace("\n", " ")),
            ("maximum length", f"{limit} tokens; longer texts: {config.overlength}" if limit else "not limited"),
            ("read at", "the last token of the text, its end of turn or EOS"),
        ],
        "versions": ", ".join(_versions()),
    }


def _rendered(tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return f"`{json.dumps(tokenizer.apply_chat_template(chat, tokenize=False), ensure_ascii=False)}`"


def _snippet(config, tokenizer, question, answers):
    """Code that scores two answers with transformers alone where that reads the tokens that training saw."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
    question, answers = json.dumps(question), json.dumps(answers)
    if tokenizer is not None and tokenizer.chat_template:
        plain = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        if plain == Encoder.from_config(tokenizer, config).encode_chat(chat).ids:
            return (
                f"question = {question}\nfor answer in {answers}:\n"
                '    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]\n'
                '    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)\n'
                "    with torch.no_grad():\n"
                "        reward = model(**inputs.to(model.device)).logits.item()\n"
                '    print(f"{reward:.2f}  {answer}")'
            )
    return (
        "from grm_hf import GRMScorer  # writes the end of text as training did\n\n"
        "scorer = GRMScorer(model, tokenizer)\n"
        f'for answer in {answers}:\n    reward = scorer.score([{{"prompt": {question}, "response": answer}}])[0]\n'
        '    print(f"{reward:.2f}  {answer}")'
    )


def _executed(snippet, model, tokenizer):
    """What the snippet prints with this model; the model is left as it was. `None`, with a warning, if it fails."""
    training, printed = model.training, io.StringIO()
    scored = model.get_base_model() if hasattr(model, "peft_config") else model
    try:
        model.eval()
        with contextlib.redirect_stdout(printed), torch.no_grad():
            exec(snippet, {"model": scored, "tokenizer": tokenizer, "torch": torch})
    except Exception as error:  # a card must not end a run
        logger.warning(f"The usage example of the model card could not be run: {type(error).__name__}: {error}")
        return None
    finally:
        model.train(training)
    return printed.getvalue().rstrip("\n")


def _versions():
    for package in ("grm-hf", "transformers", "trl", "peft", "torch", "datasets", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"


def _tokenizer(folder):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return None


def _plain(setting):
    return getattr(setting, "value", setting)


def _formula(trainer):
    args = trainer.args
    pair = {
        "bt": "-log sigmoid(r_c - r_r)",
        "margin": "-log sigmoid(r_c - r_r - margin)",
        "scaled": "-margin * log sigmoid(r_c - r_r)",
    }[trainer._pair_loss]
    if args.center_rewards_coefficient is not None:
        pair = f"({pair} + {args.center_rewards_coefficient:g} * (r_c + r_r)^2)"
    text = FORMULAS[args.text_loss]
    return f"{1 - args.alpha:g} * {pair} + {args.alpha:g} * {text}" if text else pair


def _adapter_settings(model):
    config = next(iter(model.peft_config.values()))
    rank = f", rank {config.r}" if getattr(config, "r", None) else ""
    return f"{config.peft_type.value}{rank}; reward head in full"


def _adapter_load(config, name):
    if not config.base_model:
        return None
    defaults = {"head_type": "mlp", "head_hidden_size": 1024, "head_num_layers": 1}
    head = "".join(f", {k}={getattr(config, k)!r}" for k, v in defaults.items() if getattr(config, k) != v)
    return (
        "from grm_hf import GRMForSequenceClassification\nfrom peft import PeftModel\n\n"
        f'base = GRMForSequenceClassification.from_base("{config.base_model}"{head})\n'
        f'model = PeftModel.from_pretrained(base, "{name}", subfolder="adapter")'
    )


# ------------------------------------------------------------------------------------------------------------- results


def _evaluation(trainer) -> dict[str, Any]:
    """Metrics of the saved weights on each evaluation set: of the best evaluation where that is loaded at the end, of
    the last one otherwise. `{}` before the first evaluation."""
    log, several = trainer.state.log_history, isinstance(trainer.eval_dataset, dict)
    best = _best_row(trainer, log) if trainer.args.load_best_model_at_end else None
    if trainer.state.global_step < trainer.state.max_steps:
        best = None
    metrics: list[tuple[str, str]] = []
    accuracy, sizes, bias = {}, [], []
    for name in trainer.eval_dataset if several else [None]:
        prefix, before = (f"eval_{name}", f"{name}: ") if several else ("eval", "")
        rows = [row for row in log if f"{prefix}_accuracy" in row]
        if not rows:
            continue
        row = next((row for row in rows if best and row["step"] == best["step"]), rows[-1])
        lines, sides = _metrics(row, prefix, trainer.eval_pairs.get((prefix, row["step"])))
        accuracy[name or ""] = round(row[f"{prefix}_accuracy"], 4)
        metrics += [(before + label, value) for label, value in lines]
        bias += [before + sides] if sides else []
        counts = trainer.data_counts.get(name or "eval")
        sizes += [f"{before}{counts.kept} pairs"] if counts else []
    if not accuracy:
        return {}
    which = f"Evaluation set{'s' if several else ''} of the run"
    of = ", ".join([which, *sizes, f"at step {row['step']}."])
    result = {"accuracy": accuracy, "metrics": metrics, "metrics_of": of}
    return result | ({"length_line": f"Here: accuracy {'; '.join(bias)}."} if bias else {})


def _metrics(row, prefix, pairs):
    """Label and value of each metric of one evaluation, and how accuracy depends on length."""
    metrics, sides = [("accuracy", f"{row[f'{prefix}_accuracy']:.3f}")], ""
    if pairs is not None:
        chosen, rejected, chosen_length, rejected_length = pairs.T
        margins = chosen - rejected
        low, high = wilson_interval(float(pair_wins(margins, 0).sum()), len(margins))
        metrics[0] = ("accuracy", f"{row[f'{prefix}_accuracy']:.3f} (95% interval {low:.3f} to {high:.3f})")
        bias = length_bias(chosen, rejected, chosen_length, rejected_length)
        sides = ", ".join(
            f"{bias[f'accuracy_chosen_{kind}']:.3f} where the chosen answer is {kind}"
            for kind in ("longer", "shorter")
            if f"accuracy_chosen_{kind}" in bias
        )
        if sides:
            metrics.append(("accuracy by length", sides))
        temperature, at_bound = fit_temperature(margins)
        calibration = f"error {expected_calibration_error(margins):.3f}, Brier score {brier(margins):.3f}"
        metrics.append(("calibration", calibration + ("" if at_bound else f", best temperature {temperature:.2f}")))
    for key, label in (
        ("margin", "mean margin"),
        ("loss", "loss"),
        ("implicit_accuracy", "accuracy of the language-model head"),
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


# ------------------------------------------------------------------------------------------------------------ metadata


def _metadata(config, name, tags, datasets, adapter):
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if config.base_model:
        data["base_model"] = config.base_model
        data["base_model_relation"] = "merge" if adapter else "finetune"
    if datasets:
        data["datasets"] = datasets
    data["metrics"] = ["accuracy"]
    data["tags"] = list(dict.fromkeys(tags))
    return data


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


def _is_hub_id(name):
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _hub_ids(dataset) -> list[str]:
    """Hub ids that a dataset says it was downloaded from."""
    if isinstance(dataset, dict):
        return sorted({id for part in dataset.values() for id in _hub_ids(part)})
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = (re.match(r"hf://datasets/([\w.-]+/[\w.-]+?)@", url) for url in sources)
    return sorted({match[1] for match in found if match})


# ------------------------------------------------------------------------------------------------------------- merging


def merge_cards(theirs: str, ours: str) -> str:
    """
    Our new card with everything of `theirs` that a person wrote: edited blocks, text outside of blocks, changed or
    deleted metadata, deleted blocks. A card that we did not write keeps its whole text, and ours follows it.
    """
    data, their_record, _, their_body = _read(theirs)
    our_data, our_record, name, our_body = _read(ours)
    if name is None:
        return theirs  # neither is of our making: there is nothing to add
    merged = {key: value for key, value in our_data.items() if key in data or key not in their_record}
    for key, value in data.items():
        if their_record.get(key) == _digest(_dump(value)):
            continue  # as we wrote it: ours is newer, or says it no longer
        both = merged.get(key)
        if isinstance(value, list) and isinstance(both, list) and all(isinstance(item, str) for item in value + both):
            merged[key] = list(dict.fromkeys([*value, *both]))
        else:
            merged[key] = value
    blocks = {found[1]: found[0] for found in BLOCK.finditer(our_body)}
    body = our_body
    if their_record or BLOCK.search(their_body):
        body = BLOCK.sub(lambda f: blocks.get(f[1], "") if f[2] == _digest(f[3]) else f[0], their_body)
    elif their_body.strip():
        blocks.pop("title", None)
        body = "\n\n".join([their_body.rstrip(), *blocks.values()]) + "\n"
    return _join(merged, our_record, name, body)


def edited_lines(card: str) -> set[str]:
    """Lines of a card that are not as we wrote them: outside of blocks, in an edited one, and changed metadata."""
    data, record, _, body = _read(card)
    rest = BLOCK.sub(lambda f: "" if f[2] == _digest(f[3]) else f[3], body)
    changed = {f"{key}: {value}" for key, value in data.items() if record.get(key) != _digest(_dump(value))}
    return changed | {line.strip() for line in rest.splitlines() if line.strip()}


def metadata(card: str) -> dict[str, Any]:
    """The metadata of a card."""
    return _read(card)[0]


def without_paths(card: str) -> str:
    """The card without a base model that is a path of this machine, as PEFT's own card names it."""
    data, record, name, body = _read(card)
    base = data.get("base_model")
    if not isinstance(base, str) or not (Path(base).is_absolute() or Path(base).exists()):
        return card
    del data["base_model"]
    if isinstance(data.get("tags"), list):
        data["tags"] = [tag for tag in data["tags"] if base not in tag]
    return _join(data, record, name, body.replace(base, "its base"))


def set_field(card: str, key: str, value) -> str:
    """The card with one more field of metadata, as if it had been written with it; one that is there stays."""
    data, record, name, body = _read(card)
    if key in data or key in record:
        return card
    return _join({**data, key: value}, {**record, key: _digest(_dump(value))} if name else {}, name, body)


def rename(card: str, name: str) -> str:
    """A card of ours with another name of the model, in the metadata and the blocks that nobody edited."""
    data, record, old, body = _read(card)
    if old is None or old == name:
        return card

    def renamed(block):
        text = block[3]
        if block[2] != _digest(text):
            return block[0]
        for place in ("# {}\n", '"{}"', "--model {} "):
            text = text.replace(place.format(old), place.format(name))
        return _block(block[1], text.strip("\n"))

    if record.get("model-index") == _digest(_dump(data.get("model-index"))):
        data["model-index"][0]["name"] = name.split("/")[-1]
        record["model-index"] = _digest(_dump(data["model-index"]))
    return _join(data, record, name, BLOCK.sub(renamed, body))


def _read(card):
    """Metadata, digests of the metadata as we wrote it, the name we wrote it for, and the text after all that."""
    card = card.replace("\r\n", "\n")
    front = FRONT.match(card)
    data = (yaml.safe_load(front[1]) or {}) if front else {}
    body = card[front.end() :] if front else card
    found = RECORD.search(body)
    record = dict(item.split("=", 1) for item in found[2].split()) if found else {}
    return data, record, found and found[1], RECORD.sub("", body, count=1).lstrip("\n")


def _join(data, record, name, body):
    front = f"---\n{_dump(data)}---\n\n" if data else ""
    fields = " ".join(f"{key}={digest}" for key, digest in record.items())
    return front + (f"<!-- grm_hf of {name}: {fields} -->\n" if name else "") + body
