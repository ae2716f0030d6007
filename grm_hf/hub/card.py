"""Model cards, written from a run or a folder and merged with a person's edits of an earlier card.

A card is made of blocks, `<!-- grm_hf NAME DIGEST -->` to `<!-- /grm_hf -->`. The digest of the text between them
shows a later card whether somebody has edited the block. An edited block stays, an untouched one is replaced, and a
deleted one does not come back. Text outside the blocks is left alone. The first line after the metadata keeps a digest
of each metadata field for the same purpose.
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
from ..encoding import Encoder
from ..heads_grm import COMBINERS
from ..version import __version__


logger = logging.get_logger(__name__)

TAGS = ["reward-model", "grm", "generated_from_trainer"]
BLOCK = re.compile(r"<!-- grm_hf (\w+)(?: (\w+))? -->\n(.*?)<!-- /grm_hf -->", re.DOTALL)
RECORD = re.compile(r"<!-- grm_hf of (\S+): (.*?) -->\n")
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
CODE_LINE = f"The code files of this model are those of grm_hf {__version__}."
QUESTION, ANSWERS = "What is the capital of France?", ["Paris.", "I like trains."]
BENCHMARKS = ".eval_results/grm_eval.yaml"


# ------------------------------------------------------------------------------------------------------------- writing


def card_of_folder(folder: str | Path, name: str, tags: list[str] | None = None) -> str:
    """The card of a saved model without a run, from its configuration and its tokenizer."""
    config = GRMConfig.from_pretrained(folder)
    facts = facts_of_model(config, _tokenizer(folder), name)
    return write_card(metadata_of(config, name, [*TAGS[:2], *(tags or [])], [], False), facts)


def add_results(folder: str | Path, rows: list[dict[str, Any]]) -> list[str]:
    """
    Put results of benchmarks on the card of a model's folder: into `model-index` of its README.md, and for data sets
    of the Hub into `.eval_results/grm_eval.yaml`. Entries by a person stay, also those of the same suite.

    Args:
        folder (`str` or `Path`):
            Folder of the model. If it has no card, one is written first.
        rows (`list[dict]`):
            For each suite its name (`suite`), its data set on the Hub (`dataset`, or `None`), the `value` and its
            description (`headline`).

    Returns:
        `list[str]`: the suites for which `model-index` has another result, which a person wrote.
    """
    folder = Path(folder)
    readme, results = folder / "README.md", folder / BENCHMARKS
    text = readme.read_text(encoding="utf-8") if readme.is_file() else card_of_folder(folder, folder.resolve().name)
    data, record, name, body = _read(text)
    index = data.get("model-index") or []
    new: list[dict[str, Any]] = [
        {
            "task": {"type": "text-classification", "name": "preference"},
            "dataset": {"name": row["suite"], "type": row["dataset"] or row["suite"]},
            "metrics": [{"type": "accuracy", "value": row["value"], "name": row["headline"]}],
        }
        for row in rows
    ]
    ours = bool(name) and (not index or record.get("model-index") == _digest(_dump(index)))
    index = index or [{"name": (name or folder.resolve().name).split("/")[-1], "results": []}]
    index[0]["results"] = _joined(index[0].get("results", []), new, lambda entry: entry["dataset"].get("name"), ours)
    data["model-index"] = index
    if ours:
        record["model-index"] = _digest(_dump(index))
    readme.write_text(_join(data, record, name, body), encoding="utf-8")

    date = datetime.now(UTC).strftime("%Y-%m-%d")
    published = [
        {
            "dataset": {"id": row["dataset"], "task_id": row["suite"]},
            "value": row["value"],
            "date": date,
            "notes": row["headline"],
        }
        for row in rows
        if row["dataset"]
    ]
    if published:
        old = results.read_text(encoding="utf-8") if results.is_file() else ""
        first, _, rest = old.partition("\n")
        # After a person has written in the file, it stays theirs: it gets no mark, and nothing in it is replaced.
        untouched = not old or first == f"# grm_hf {_digest(rest)}"
        text = _dump(_joined(yaml.safe_load(old) or [], published, lambda entry: entry["dataset"], untouched))
        results.parent.mkdir(exist_ok=True)
        results.write_text(f"# grm_hf {_digest(text)}\n{text}" if untouched else text, encoding="utf-8")
    return [entry["dataset"]["name"] for entry in new if entry not in index[0]["results"]]


def _joined(old: list, new: list, key, replace: bool) -> list:
    """`old` with the entries of `new` whose key it lacks; with `replace`, new entries replace old ones."""
    keys = [key(entry) for entry in new]
    kept = [new[keys.index(key(entry))] if replace and key(entry) in keys else entry for entry in old]
    return kept + [entry for entry, name in zip(new, keys, strict=True) if name not in [key(e) for e in old]]


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
    """The text of a README.md, from the facts of [`facts_of_run`]."""
    body = BLOCK.sub(lambda block: _block(block[1], block[3].strip("\n")), _template().render(facts))
    return _join(metadata, {key: _digest(_dump(value)) for key, value in metadata.items()}, facts["name"], body)


def _block(name, text):
    text = f"{text}\n" if text else ""
    return f"<!-- grm_hf {name} {_digest(text)} -->\n{text}<!-- /grm_hf -->"


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _dump(value):
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


# --------------------------------------------------------------------------------------------------------------- facts


def facts_of_model(config, tokenizer, name, model=None, step=None, example=(QUESTION, ANSWERS)):
    snippet = _snippet(config, tokenizer, *example)
    load = (
        "import torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f'model = AutoModelForSequenceClassification.from_pretrained("{name}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)'
    )
    head = {
        "linear": "linear",
        "mlp": f"MLP, {config.head_num_layers} x {config.head_hidden_size}",
        "bnrm": f"BNRM (2602.10623), {config.head_num_layers} x {config.head_hidden_size} before "
        f"{config.head_hidden_size} non-negative factors",
    }[config.head_type]
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
            *_attributes(config),
            ("chat template", template.replace("\n", " ")),
            ("maximum length", f"{limit} tokens; longer texts: {config.overlength}" if limit else "not limited"),
            ("read at", "the last token of the text, its end of turn or EOS"),
        ],
        "code": CODE_LINE,
        "versions": ", ".join(_versions()),
    }


def _attributes(config):
    """The row of a model with attributes."""
    names, weights = config.attribute_names, config.attribute_weights
    if names is None:
        return []
    combined = COMBINERS[config.attribute_combiner]
    if weights is None:
        how = "beside the reward"
    elif weights == "gate":
        how = f"the reward is `{combined.formula}`, the weights those of a gate"
    else:
        shares = weights if combined.negative else [weight / sum(weights) for weight in weights]
        how = f"the reward is `{combined.formula}` with weights {', '.join(f'{share:g}' for share in shares)}"
    return [("attributes", f"{', '.join(names)}; {how}")]


def _rendered(tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return f"`{json.dumps(tokenizer.apply_chat_template(chat, tokenize=False), ensure_ascii=False)}`"


def _snippet(config, tokenizer, question, answers):
    """Code that scores two answers, with transformers alone if it reads the tokens of training."""
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
    """The output of the snippet with this model, which does not change. `None`, with a warning, if it fails."""
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
    yield f"grm-hf {__version__}"
    for package in ("transformers", "trl", "peft", "torch", "datasets", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"


def _tokenizer(folder):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------------------ metadata


def metadata_of(config, name, tags, datasets, adapter):
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if config.base_model:
        data["base_model"] = config.base_model
        data["base_model_relation"] = "merge" if adapter else "finetune"
    if datasets:
        data["datasets"] = datasets
    data["metrics"] = ["accuracy"]
    data["tags"] = list(dict.fromkeys(tags))
    return data


# ------------------------------------------------------------------------------------------------------------- merging


def merge_cards(theirs: str, ours: str) -> str:
    """
    Our new card with all edits that a person made in `theirs`: edited and deleted blocks, text outside of blocks,
    changed and deleted metadata. A card that we did not write keeps its whole text, and ours follows it.
    """
    data, their_record, _, their_body = _read(theirs)
    our_data, our_record, name, our_body = _read(ours)
    if name is None:
        return theirs  # neither is of our making: there is nothing to add
    merged = {key: value for key, value in our_data.items() if key in data or key not in their_record}
    for key, value in data.items():
        if their_record.get(key) == _digest(_dump(value)):
            continue  # unedited: ours is newer, or no longer has it
        both = merged.get(key)
        if isinstance(value, list) and isinstance(both, list) and all(isinstance(item, str) for item in value + both):
            merged[key] = list(dict.fromkeys([*value, *both]))
        else:
            merged[key] = value
    blocks = {block[1]: block[0] for block in BLOCK.finditer(our_body)}
    body = our_body
    if their_record or BLOCK.search(their_body):
        body = BLOCK.sub(lambda f: blocks.get(f[1], "") if f[2] == _digest(f[3]) else f[0], their_body)
    elif their_body.strip():
        blocks.pop("title", None)
        body = "\n\n".join([their_body.rstrip(), *blocks.values()]) + "\n"
    return _join(merged, our_record, name, body)


def edited_lines(card: str) -> set[str]:
    """Lines of a card that a person wrote: outside of blocks, in edited blocks, and changed metadata."""
    data, record, _, body = _read(card)
    rest = BLOCK.sub(lambda f: "" if f[2] == _digest(f[3]) else f[3], body)
    changed = {f"{key}: {value}" for key, value in data.items() if record.get(key) != _digest(_dump(value))}
    return changed | {line.strip() for line in rest.splitlines() if line.strip()}


def metadata(card: str) -> dict[str, Any]:
    """The metadata of a card."""
    return _read(card)[0]


def without_paths(card: str) -> str:
    """The card without a base model that is a path on this machine; PEFT's own card has such a path."""
    data, record, name, body = _read(card)
    base = data.get("base_model")
    if not isinstance(base, str) or not (Path(base).is_absolute() or Path(base).exists()):
        return card
    del data["base_model"]
    if isinstance(data.get("tags"), list):
        data["tags"] = [tag for tag in data["tags"] if base not in tag]
    return _join(data, record, name, body.replace(base, "its base"))


def set_field(card: str, key: str, value) -> str:
    """The card with one more field of metadata, as if it had been written with it. An existing field stays."""
    data, record, name, body = _read(card)
    if key in data or key in record:
        return card
    return _join({**data, key: value}, {**record, key: _digest(_dump(value))} if name else {}, name, body)


def with_code(card: str) -> str:
    """Our card with this version as the version of the model's code. An edited line stays, and so does a card that is
    not ours."""
    data, record, name, body = _read(card)
    if name is None:
        return card
    code = next((block for block in BLOCK.finditer(body) if block[1] == "code"), None)
    if code is None:  # cards before version 0.2.0 have no such block
        last = list(BLOCK.finditer(body))[-1:]
        at = last[0].end() if last else len(body)
        body = f"{body[:at].rstrip()}\n\n{_block('code', CODE_LINE)}{body[at:]}"
    elif code[2] == _digest(code[3]):
        body = body[: code.start()] + _block("code", CODE_LINE) + body[code.end() :]
    return _join(data, record, name, body)


def rename(card: str, name: str) -> str:
    """Our card with another name of the model, in the metadata and in unedited blocks."""
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
    """Metadata, digests of the metadata as written, the model's name as written, and the text after them."""
    card = card.replace("\r\n", "\n")
    front = FRONT.match(card)
    data = (yaml.safe_load(front[1]) or {}) if front else {}
    body = card[front.end() :] if front else card
    line = RECORD.search(body)
    record = dict(item.split("=", 1) for item in line[2].split()) if line else {}
    return data, record, line and line[1], RECORD.sub("", body, count=1).lstrip("\n")


def _join(data, record, name, body):
    front = f"---\n{_dump(data)}---\n\n" if data else ""
    fields = " ".join(f"{key}={digest}" for key, digest in record.items())
    return front + (f"<!-- grm_hf of {name}: {fields} -->\n" if name else "") + body
