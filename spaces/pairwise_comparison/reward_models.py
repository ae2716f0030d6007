"""Reward models: the list of this page, loading, and reading token by token.

Models of the list are pinned to a revision and may bring their own code. Other ids are handled in a separate process
(`apart.py`), with functions of this file.

`encoding.py` is a copy of grm_hf's. It renders and tokenises by the policies in the model's configuration, so a reward
is the library's number. A decoder is causal: the head on the hidden state of token t gives the reward of the text that
ends there, and one forward pass gives the reward after each token.
"""

import json
import math
import re
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jobs
import signals
import torch
from checks import check_text
from encoding import Encoded, Encoder
from tables import SIDES, check_answers, check_temperature
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file


MAX_CHARACTERS = 20_000  # of one text
MAX_TOKENS = 4096  # of prompt and answer together
KEPT = 2  # models of the list in memory
SIGNALS = ("head", "likelihood", "endogenous", "judge", "follow_up", "dropout")  # that the page asks for
WORDING = signals.Wording(  # one sentence of each set: the page computes them one by one
    follow_ups={n: {side: texts[:1] for side, texts in both.items()} for n, both in signals.FOLLOW_UPS.items()}
)

COMMIT = re.compile(r"[0-9a-f]{40}")

torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: jobs.check())  # stops between layers

# ------------------------------------------------------------------------------------------------------------ the list


@dataclass(frozen=True)
class Listed:
    """
    A model of the list.

    Attributes:
        source: A folder, or a Hub id.
        revision: The commit that an id is pinned to.
        note: What a visitor should know of it, for the verdict and the About tab.
        trusted: Whether its code may run: a folder, or a pinned id. Another id is only a suggestion, and is loaded
            like an id that a visitor types.
    """

    source: str
    revision: str | None = None
    note: str = ""
    trusted: bool = True


def read_list(path: Path) -> tuple[dict[str, Listed], list[str]]:
    """The models in a JSON list (or the model in a folder) by name, and a sentence for each entry that is left out.
    Folders are relative to the file. If an entry has a folder and an id, the folder is used if it exists."""
    if path.is_dir():
        path = path.resolve()
        return {f"{path.parent.name} {path.name}" if path.name == "model" else path.name: Listed(str(path))}, []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"The list of models “{path.name}” cannot be read: {error}"]
    if not isinstance(entries, list):
        return {}, [f"“{path.name}” holds no JSON list of models."]
    models: dict[str, Listed] = {}
    problems = []
    for number, entry in enumerate(entries, 1):
        entry = entry if isinstance(entry, dict) else {}
        folder, repo, revision, note = (str(entry.get(key) or "") for key in ("folder", "id", "revision", "note"))
        name = str(entry.get("name") or repo or Path(folder).name)
        where = f"Entry {number} of “{path.name}” was left out:"
        if folder and (path.parent / folder / "config.json").is_file():
            listed = Listed(str((path.parent / folder).resolve()), None, note)
        elif repo and (not revision or COMMIT.fullmatch(revision)):
            listed = Listed(repo, revision or None, note, trusted=bool(revision))
        elif repo:
            problems.append(f"{where} its `revision` must have all 40 digits of a commit.")
            continue
        elif folder:
            problems.append(f"{where} there is no model in the folder “{folder}”.")
            continue
        else:
            problems.append(f"{where} it needs `id` and `revision`, or `folder`.")
            continue
        if name in models:
            problems.append(f"{where} another one is called “{name}”. Give it a `name`.")
            continue
        models[name] = listed
    return models, problems


# ------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Loaded:
    """A model ready to read: `kind` is "grm" (two heads) or "classifier" (the reward head alone)."""

    name: str
    revision: str | None
    kind: str
    model: Any
    tokenizer: Any
    encoder: Encoder

    @property
    def temperature(self) -> float:
        """The temperature by which the model itself divides differences of rewards."""
        return getattr(self.model.config, "reward_temperature", 1.0)

    def standardised(self, reward: float) -> float | None:
        """The reward in standard deviations from the mean over the model's last evaluation set, if it stores them."""
        config = self.model.config
        mean, std = getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
        return None if (mean, std) == (0.0, 1.0) or not std else (reward - mean) / std


class Models:
    """The models of this page's list. `load` keeps the last few in memory."""

    def __init__(self, path: Path):
        self.listed, self.problems = read_list(path)
        self._kept: dict[str, Loaded] = {}
        self._lock = threading.Lock()

    def trusts(self, name: str) -> bool:
        return name in self.listed and self.listed[name].trusted

    def load(self, name: str) -> Loaded:
        """
        A trusted model of the list.

        Raises:
            `ValueError`: with a sentence for the visitor.
        """
        with self._lock:
            if name not in self._kept:
                listed = self.listed[name]
                while len(self._kept) >= KEPT:
                    self._kept.pop(next(iter(self._kept)))
                check_code(name, listed.source, listed.revision)
                self._kept[name] = load(name, listed.source, listed.revision, trust_remote_code=True)
            self._kept[name] = self._kept.pop(name)  # the latest one last
            return self._kept[name]


def load(name: str, source: str, revision: str | None, trust_remote_code: bool) -> Loaded:
    """Loads a reward model and all that is needed to read it."""
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        where["revision"] = revision
    safe = None if trust_remote_code else True
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, output_loading_info=True, use_safetensors=safe, **where
        )
    except Exception as error:  # of the network, the files, or the model's own code
        traceback.print_exc()
        raise ValueError(
            f"The model “{name}” could not be loaded ({type(error).__name__}): the Hub cannot be reached, or the "
            "model's files do not fit. Try again later, or choose another model."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"“{name}” lacks {len(missing)} weights ({missing[0]}, ...): its reward would be random.")
    if other := sorted(key for key in info["unexpected_keys"] if "lm_head" not in key.split(".")):
        raise ValueError(
            f"“{name}” has {len(other)} weights that {type(model).__name__} does not use ({other[0]}, ...): its "
            "reward would not be the one it was trained for."
        )
    if model.config.num_labels != 1:
        raise ValueError(f"“{name}” is no reward model: it has {model.config.num_labels} labels; required is one.")
    model.eval()
    own = getattr(model.config, "reward_temperature", 1.0)
    if not isinstance(own, (int, float)) or not 1e-6 <= own <= 1e6:
        raise ValueError(f"“{name}” cannot be used: its `reward_temperature` is {own!r:.40}, no positive number.")
    if trust_remote_code and model.config.model_type == "grm":
        return Loaded(name, revision, "grm", model, tokenizer, Encoder.from_config(tokenizer, model.config))
    return Loaded(name, revision, "classifier", model, tokenizer, encoder_of_a_classifier(name, model, tokenizer))


def check_code(name: str, source: str, revision: str | None) -> None:
    """Refuses code from another repository. A revision pins the model's own files only, and of another repository the
    latest would be taken."""
    for file in ("adapter_config.json", "config.json", "tokenizer_config.json"):
        try:
            path = cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            values = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        except Exception as error:
            traceback.print_exc()
            raise ValueError(
                f"The model “{name}” could not be loaded: its {file} cannot be read ({type(error).__name__}). Try "
                "again later, or choose another model."
            ) from error
        if path and file == "adapter_config.json":
            raise ValueError(
                f"“{name}” is an adapter. Its base would be loaded with it, and no revision pins that one's code. "
                "Merge it into its base and push the model you get."
            )
        if "--" in json.dumps(values.get("auto_map")):
            raise ValueError(
                f"“{name}” takes its code from another repository (`--` in the `auto_map` of its {file}), which no "
                "revision pins. Push the model with its code in its own repository."
            )


def encoder_of_a_classifier(name, model, tokenizer) -> Encoder:
    """The encoder of a classifier, with the policies that `grm export` stores, or grm_hf's; the limit is at most the
    model's positions."""
    if not isinstance(getattr(model, "score", None), torch.nn.Module):
        raise ValueError(
            f"“{name}” ({model.config.model_type}) has no head `score` on a decoder. This page reads rewards at the "
            "last token of causal models; an encoder wants its texts prepared in its own way."
        )
    config = model.config
    limit = min(getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS, MAX_TOKENS)
    try:
        encoder = Encoder.from_config(tokenizer, config) if hasattr(config, "bos_policy") else Encoder(tokenizer)
        return replace(encoder, max_length=min(encoder.max_length or limit, limit))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"“{name}” cannot be used: {error}") from error


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reading:
    """
    The result of a model for one text.

    Attributes:
        reward: Read at token `read_at`.
        ids, pieces, special: The tokens: ids, the text each adds, whether each is a special token.
        start: Index of the first token of the answer.
        rewards: The reward of the text that ends with each token.
        logprobs: Log-probability of each token of the answer, by the LM head; `None` without an LM head. It is `None`
            for a token with nothing before it.
        cut, response_cut: Number of tokens that truncation removed, and whether some were the answer's.
        unknown: Tokens that stand for words the tokenizer does not know.
        unread: What the chat template leaves out.
    """

    reward: float
    ids: list[int]
    pieces: list[str]
    special: list[bool]
    start: int
    rewards: list[float]
    logprobs: list[float | None] | None
    cut: int
    response_cut: bool
    unknown: int
    unread: tuple[str, ...]
    read_at: int


def encode(
    loaded: Loaded, prompt: str | list[dict] | None, answer: str | list[dict], name: str = "The answer"
) -> Encoded:
    """Tokens of a prompt (a string is one user message if the model has a chat template) and an answer to it; without
    a prompt, of a whole conversation."""
    for what, text in (("The prompt", prompt), (name, answer)):
        if text is None:
            continue
        if not isinstance(text, list):
            check_text(text, what)
        characters = len(text) if isinstance(text, str) else sum(len(m["content"]) for m in text)
        if characters > MAX_CHARACTERS:
            raise ValueError(f"{what} has {characters:,} characters; this page takes {MAX_CHARACTERS:,}.")
        if not text or (isinstance(text, str) and not text.strip()):
            raise ValueError(f"{what} is empty.")
    if isinstance(prompt, str) and isinstance(answer, str) and loaded.tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    chat = {"messages": answer} if prompt is None else {"prompt": prompt, "response": answer}
    try:
        encoded = loaded.encoder.encode_chat(chat)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
    limit = min(positions, MAX_TOKENS)
    if len(encoded.ids) > limit:
        raise ValueError(
            f"{name} and the prompt have {len(encoded.ids):,} tokens; the limit is {limit:,}. Shorten one of them."
        )
    return encoded


def encode_both(loaded: Loaded, prompt: str | list[dict], answer_a: str, answer_b: str) -> dict[str, Encoded]:
    answers = {"A": answer_a, "B": answer_b}
    return {name: encode(loaded, prompt, answer, f"Answer {name}") for name, answer in answers.items()}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def read(loaded: Loaded, encoded: Encoded) -> Reading:
    """The reading of one text, in one forward pass."""
    model, tokenizer, ids = loaded.model.to(device()), loaded.tokenizer, encoded.ids
    inputs = {"input_ids": torch.tensor([ids], device=device()), "use_cache": False}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logprobs: list[float | None] | None = None
    read_at = len(ids) - 1
    if loaded.kind == "grm":
        first = max(encoded.start, 1)
        out = model(
            **inputs,
            return_lm_logits=True,
            logits_to_keep=len(ids) - first + 1,
            lm_fn=lambda hidden, model: model.score(hidden),
        )
        rewards = out.lm_output
        targets = inputs["input_ids"][0, first:, None]
        found = [
            (logits.gather(-1, target).squeeze(-1) - logits.logsumexp(-1)).tolist()
            for logits, target in zip(
                (part.float() for part in out.lm_logits[0, :-1].split(256)), targets.split(256), strict=True
            )
        ]
        logprobs = [None] * (first - encoded.start) + [value for part in found for value in part]
    else:
        heads: list[torch.Tensor] = []
        hook = model.score.register_forward_hook(lambda module, args, output: heads.append(output))
        try:
            out = model(**inputs)
        finally:
            hook.remove()
        rewards = heads[0]
        pad = model.config.get_text_config().pad_token_id
        read_at = max((i for i, index in enumerate(ids) if index != pad), default=read_at)
    reward, along = out.logits.item(), rewards.float().flatten().tolist()
    check_finite(loaded, [reward, *along, *(value for value in logprobs or () if value is not None)])
    known = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return Reading(
        reward=reward,
        ids=ids,
        pieces=pieces(tokenizer, ids),
        special=[index in known for index in ids],
        start=encoded.start,
        rewards=along,
        logprobs=logprobs,
        cut=encoded.cut,
        response_cut=encoded.response_cut,
        unread=encoded.unread,
        unknown=ids.count(unknown_id(tokenizer)),
        read_at=read_at,
    )


def unknown_id(tokenizer) -> int | None:
    """The token for unknown words, unless it also ends texts."""
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id


@torch.no_grad()
def reward_of(loaded: Loaded, encoded: Encoded) -> float:
    """Only the reward, of one text by itself."""
    model = loaded.model.to(device())
    ids = torch.tensor([encoded.ids], device=device())
    reward = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.item()
    check_finite(loaded, [reward])
    return reward


def check_finite(loaded: Loaded, values: list[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"The model “{loaded.name}” gives {value} for this text: its weights are broken.")


@torch.no_grad()
def rewards_together(loaded: Loaded, texts: list[Encoded]) -> list[float] | None:
    """The rewards of texts in one padded batch; `None` if the model cannot take a batch."""
    model = loaded.model.to(device())
    pad = model.config.get_text_config().pad_token_id
    if loaded.kind == "classifier" and pad is None:
        return None
    width = max(len(text.ids) for text in texts)
    rows = [text.ids + [pad or 0] * (width - len(text.ids)) for text in texts]
    mask = [[1] * len(text.ids) + [0] * (width - len(text.ids)) for text in texts]
    batch = {"input_ids": torch.tensor(rows, device=device()), "attention_mask": torch.tensor(mask, device=device())}
    return model(**batch, use_cache=False).logits.squeeze(-1).tolist()


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it; a character of several tokens belongs to the last of them."""

    def decode(part):
        return str(tokenizer.decode(part, clean_up_tokenization_spaces=False))

    found, begin, done = [], 0, 0
    for i in range(len(ids)):
        now = decode(ids[begin : i + 1])
        if now.endswith("\ufffd") and i - done < 16 and i + 1 < len(ids):  # 16 tokens can be bytes of one cluster
            found.append("")
            continue
        found.append(now[len(decode(ids[begin:done])) :])
        begin, done = done, i + 1
    return found


def control_words(tokenizer, text: str) -> list[str]:
    """Special tokens that a text spells out. The model reads them as special tokens, not as text."""
    return sorted(
        {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token) in text}
    )


# ----------------------------------------------------------------------------------------------------------- comparing


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def compare(
    loaded: Loaded, prompt: str | list[dict], answer_a: str, answer_b: str, temperature: float = 1.0
) -> dict[str, Any]:
    """
    Two answers to one prompt, as JSON.

    Args:
        temperature: Divides the difference of rewards, after the model's own temperature.
    """
    check_temperature(temperature)
    encoded = encode_both(loaded, prompt, answer_a, answer_b)
    typed = {"the prompt": prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)}
    typed |= {"answer A": answer_a, "answer B": answer_b}
    started = time.perf_counter()
    readings = {name: read(loaded, text) for name, text in encoded.items()}
    seconds = time.perf_counter() - started
    rewards = {name: reading.reward for name, reading in readings.items()}
    judged = judge(rewards, temperature, loaded.temperature)
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        **judged,
        "rewards": rewards,
        "heads": heads(judged["preferred"], readings),
        "answers": {name: describe(loaded, reading) for name, reading in readings.items()},
        "control_words": {
            name: words for name, text in typed.items() if (words := control_words(loaded.tokenizer, text))
        },
        "device": device(),
        "seconds": round(seconds, 3),
    }


def judge(rewards: dict[str, float], temperature: float, own: float) -> dict[str, Any]:
    """The verdict on two rewards at a temperature, which divides their difference after the model's own."""
    check_temperature(temperature)
    difference = rewards["A"] - rewards["B"]
    preferred = None if difference == 0 else "A" if difference > 0 else "B"
    probability = sigmoid(difference / (temperature * own))
    return {
        "preferred": preferred,
        "verdict": verdict(preferred, probability),
        "probability_a": probability,
        "temperature": temperature,
        "model_temperature": own,
    }


def verdict(preferred: str | None, probability: float) -> str:
    if preferred is None:
        return "The model gives both answers the same reward."
    confidence = max(probability, 1 - probability)
    steps = ((0.95, "clearly prefers"), (0.75, "prefers"), (0.6, "slightly prefers"), (0, "barely prefers"))
    return f"The model {next(how for least, how in steps if confidence >= least)} answer {preferred}."


def heads(preferred: str | None, readings: dict[str, Reading]) -> dict[str, Any] | None:
    """Whether the answer with the higher reward is also the likelier one; `None` without an LM head."""
    means = {name: mean_logprob(reading) for name, reading in readings.items()}
    if means["A"] is None or means["B"] is None:
        return None
    likelier = None if means["A"] == means["B"] else "A" if means["A"] > means["B"] else "B"
    return {"likelier": likelier, "agree": likelier == preferred}


def mean_logprob(reading: Reading) -> float | None:
    values = [value for value in reading.logprobs or () if value is not None]
    return sum(values) / len(values) if values else None


def describe(loaded: Loaded, reading: Reading) -> dict[str, Any]:
    """A reading as JSON."""
    mean, start = mean_logprob(reading), reading.start
    logprobs = reading.logprobs or [None] * (len(reading.ids) - start)
    tokens = [
        {"text": text, "special": special, "reward": reward, "logprob": logprob}
        for text, special, reward, logprob in zip(
            reading.pieces[start:], reading.special[start:], reading.rewards[start:], logprobs, strict=True
        )
    ]
    before = reading.rewards[start - 1] if start else None
    return {
        "reward": reading.reward,
        "standardised": loaded.standardised(reading.reward),
        "mean_logprob": mean,
        "perplexity": None if mean is None else math.exp(min(-mean, 700)),
        "reward_before": before,
        "tokens": tokens,
        "disagreements": disagreements(before, tokens),
        "seen": {
            "prompt": [
                {"text": text, "special": special}
                for text, special in zip(reading.pieces[:start], reading.special[:start], strict=True)
            ],
            "tokens": len(reading.ids),
            "answer_tokens": len(tokens),
            "max_tokens": loaded.encoder.max_length,
            "cut": reading.cut,
            "answer_cut": reading.response_cut,
            "unknown": reading.unknown,
            "unread": list(reading.unread),
            "end": next((t["text"] for t in reversed(tokens) if t["special"]), None),
            "read_at": reading.pieces[reading.read_at],
            "read_before_end": len(reading.ids) - 1 - reading.read_at,
        },
    }


def disagreements(before: float | None, tokens: list[dict], count: int = 3) -> list[dict]:
    """The tokens at which the heads disagree most: the reward falls where the LM head was less surprised than usual in
    this answer, or rises where it was more surprised. Both are measured in standard deviations over the answer."""
    steps, previous = [], before
    for token in tokens:
        if previous is not None and token["logprob"] is not None and not token["special"]:
            steps.append((token, token["reward"] - previous))
        previous = token["reward"]
    if len(steps) < 3:
        return []
    size = math.sqrt(sum(step**2 for _, step in steps) / len(steps))
    mean = sum(token["logprob"] for token, _ in steps) / len(steps)
    spread = math.sqrt(sum((token["logprob"] - mean) ** 2 for token, _ in steps) / len(steps))
    if not size or not spread:
        return []
    rated = [(-(step / size) * (token["logprob"] - mean) / spread, token, step) for token, step in steps]
    strongest = sorted((row for row in rated if row[0] > 0.5), key=lambda row: -row[0])[:count]
    return [{"text": t["text"], "step": step, "probability": math.exp(t["logprob"])} for _, t, step in strongest]


def swap_check(loaded: Loaded, prompt: str | list[dict], answer_a: str, answer_b: str) -> dict[str, Any]:
    """The rewards of both answers alone and in a batch in either order; `largest` is the largest difference."""
    encoded = encode_both(loaded, prompt, answer_a, answer_b)
    found = {"alone": {name: reward_of(loaded, text) for name, text in encoded.items()}}
    for order in ("AB", "BA"):
        together = rewards_together(loaded, [encoded[name] for name in order])
        if together is not None:
            found[order] = dict(zip(order, together, strict=True))
    largest = max(abs(row[name] - found["alone"][name]) for row in found.values() for name in "AB")
    return {"rewards": found, "largest": largest if len(found) == 3 else None}


def opinions(loaded: Loaded, prompt: str | list[dict], answer_a: str, answer_b: str) -> dict[str, Any]:
    """What both heads say about two answers, and how far they agree (`signals.py`, which is grm_hf's own), as JSON."""
    if loaded.kind != "grm":
        raise ValueError(f"The model “{loaded.name}” has no LM head that could be asked.")
    settings = signals.Settings(wording=WORDING)
    asked = []
    for name, encoded in encode_both(loaded, prompt, answer_a, answer_b).items():
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = answer_a if name == "A" else answer_b
        messages = [*messages, {"role": "assistant", "content": text}] if loaded.tokenizer.chat_template else None
        asked.append(signals.Asked(encoded, messages, text, {}, loaded.encoder, settings, f"Answer {name}"))
    rows = {name: signals.SIGNALS[name] for name in SIGNALS}
    if not loaded.tokenizer.chat_template:
        rows = {name: row for name, row in rows.items() if not row.needs}
    askings: dict = {(i, name): row.function(chat) for i, chat in enumerate(asked) for name, row in rows.items()}
    pairs = {("both", name): row.pair(*asked) for name, row in rows.items() if row.pair}

    def read_all(readings):
        return [answered(loaded, reading, settings) for reading in readings]

    found = signals.run(askings | pairs, read_all, list, lambda key: f"Signal {key[1]!r}", threading.Lock())
    records = [signals.record_of({name: found[i, name] for name in rows}) for i in range(2)]
    chosen = getattr(loaded.model.config, "signals", None) or {}
    scales = {name: loaded.temperature for name, row in rows.items() if row.is_reward} | chosen.get("scales", {})
    together = {name: found["both", name] for _, name in pairs}
    said = signals.compared(list(rows), *records, together, scales, None)
    return {
        "signals": [
            {
                "name": name,
                "sentence": row.sentence,
                "values": {"A": records[0][name], "B": records[1][name]},
                "probability_a": said.probabilities[name],
            }
            for name, row in rows.items()
        ],
        "preferred": None if said.winner == "tie" else said.winner.upper(),
        "agreeing": round(said.agreement * len(rows)),
        "divergence": said.divergence,
    }


@torch.no_grad()
def answered(loaded: Loaded, reading: signals.Reading, settings: signals.Settings) -> signals.Read:
    """What the model computes of one text that a signal asks for."""
    model, ids, first = loaded.model.to(device()), list(reading.ids), max(reading.start, 1)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or len(ids)
    if len(ids) > positions:
        raise ValueError(f"A question about the answers has {len(ids):,} tokens; the model reads {positions:,}.")
    inputs = torch.tensor([ids], device=device())
    masks = signals.dropout_masks(loaded.model.config, model.get_output_embeddings().weight.shape[-1], settings)

    def draw(hidden, model):
        return model.score(hidden[:, -1].float() * masks.to(hidden.device, torch.float))

    out = model(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        use_cache=False,
        return_lm_logits=True,
        logits_to_keep=len(ids) - first + 1,
        lm_fn=draw if reading.draws else None,
    )
    chosen, values = [], []
    for logits, targets in zip(out.lm_logits[0].split(256), [*inputs[0, first:].split(256), None], strict=False):
        values += logits.float().logsumexp(-1).tolist()
        if targets is not None:
            chosen += logits[: len(targets)].float().gather(-1, targets[:, None]).squeeze(-1).tolist()
    logp = sum(token - value for token, value in zip(chosen, values[:-1], strict=True))
    draws = tuple(out.lm_output.flatten().tolist()) if reading.draws else ()
    check_finite(loaded, [out.logits.item(), logp, values[0], values[-1], *draws])
    return signals.Read(out.logits.item(), len(chosen), logp, logp, values[0], values[-1], draws)


def rank(loaded: Loaded, prompt: str | list[dict], answers: list[str], temperature: float = 1.0) -> dict[str, Any]:
    """Answers to one prompt, as JSON in the order given; equal rewards keep that order."""
    check_temperature(temperature)
    check_answers(answers)
    encoded = [encode(loaded, prompt, text, f"Answer {number}") for number, text in enumerate(answers, 1)]
    rewards = [reward_of(loaded, text) for text in encoded]
    order = sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))
    scale = temperature * loaded.temperature
    weights = [math.exp((reward - max(rewards)) / scale) for reward in rewards]
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "rewards": rewards,
        "order": order,
        "best": answers[order[0]],
        "ties": sum(reward == max(rewards) for reward in rewards),
        "share": [weight / sum(weights) for weight in weights],
        "tokens": [len(text.ids) for text in encoded],
        "cut": [text.cut for text in encoded],
        "unknown": [text.ids.count(unknown_id(loaded.tokenizer)) for text in encoded],
        "temperature": temperature,
        "model_temperature": loaded.temperature,
    }


def encode_rows(loaded: Loaded, rows: list[dict], first: int = 1) -> list[list[Encoded]]:
    """Chosen and rejected of each row of a table. Errors call the first row by the number `first`."""
    return [
        [encode(loaded, row.get("prompt") or None, row[side], f"Pair {number}, “{side}”") for side in SIDES]
        for number, row in enumerate(rows, first)
    ]


def measure(loaded: Loaded, rows: list[dict]) -> dict[str, Any]:
    """The tokens of each pair of a table and the model's own temperature, before the table is scored."""
    tokens = [sum(len(text.ids) for text in pair) for pair in encode_rows(loaded, rows)]
    return {"tokens": tokens, "temperature": loaded.temperature}


def score(loaded: Loaded, rows: list[dict], first: int) -> list[list]:
    """The values that `tables.SCORES` names for each row, and the number of its unknown words. Texts are scored one at
    a time, so a score depends on no neighbour."""
    scores = []
    for pair in encode_rows(loaded, rows, first):
        chosen, rejected = (reward_of(loaded, text) for text in pair)
        probability = sigmoid((chosen - rejected) / loaded.temperature)
        unknown = sum(text.ids.count(unknown_id(loaded.tokenizer)) for text in pair)
        scores.append([chosen, rejected, chosen - rejected, probability, sum(text.cut for text in pair), unknown])
    return scores


def readable(loaded: Loaded, examples: list[tuple]) -> list[bool]:
    """Which examples (a prompt and two answers) a model reads whole, without words that it does not know."""
    found = []
    for prompt, *answers in examples:
        try:
            texts = encode_both(loaded, prompt, *answers).values()
        except ValueError:
            found.append(False)
            continue
        unknown = unknown_id(loaded.tokenizer)
        found.append(not any(text.cut or unknown in text.ids for text in texts))
    return found
