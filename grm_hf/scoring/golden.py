"""Golden rows: a few texts with their token ids and rewards, stored beside the weights when these are saved. `grm
verify` shows, on any machine and with any versions, whether a folder still gives the same rewards.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from ..devices import evaluating, is_whole, own_device
from ..encoding import OverlengthError
from ..folders import readable
from ..modeling_grm import GRMForSequenceClassification
from ..native import load_export
from ..version import __version__
from .scorer import GRMScorer


FILE = "golden_rows.json"
# Digits, line breaks and indentation, several scripts, a second turn: tokenizers and templates differ in these.
CHATS: list[dict] = [
    {"prompt": "What is 2 + 2?", "response": "4"},
    {"prompt": "Write add(a, b) in Python.", "response": "def add(a, b):\n    return a + b\n\n# add(17, 25) == 42"},
    {"prompt": "¿Cómo se dice «gracias» en japonés?", "response": "ありがとう (arigatō) 🙏"},
    {
        "messages": [
            {"role": "user", "content": "Name a river."},
            {"role": "assistant", "content": "The Danube."},
            {"role": "user", "content": "And the sea it flows into?"},
            {"role": "assistant", "content": "The Black Sea."},
        ]
    },
]
# Tolerance of a reward by the dtype of the body, relative to the scale of the model's rewards (`scale_of`): a steep
# head multiplies the rounding of every reward, also of one near 0. The text is computed alone, so only rounding
# differs between machines and versions; docs/numerics.md says how large it gets. (float64: a cast live model has the
# rotary frequencies of float32, which no file holds.)
HALF = 1e-1
TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "bfloat16": HALF, "float16": HALF}
RELATIVE_TO = "relative to the largest reward of the rows, or to 1"


class GoldenError(ValueError):
    """Golden rows do not hold. The message has a table of all rows with the differences."""


def read_rows(file: str | Path) -> dict[str, Any]:
    """The content of a file of golden rows: `saved_with`, and `rows` of `chat`, `ids` and `score`."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        rows = [(row["chat"], row["ids"], row["score"]) for row in content["rows"]]
        assert rows and content["saved_with"]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"'{file}' is no whole file of golden rows ({error!r}). Save the model again.") from None
    return content


def tolerance(model) -> float:
    """How far rounding may move a reward of `model`, relative to the scale of its rewards."""
    return TOLERANCES.get(_dtype(model), HALF)


def scale_of(stored: Iterable[float]) -> float:
    """The largest of these numbers without their signs; at least 1. What is no finite number does not count."""
    return max([1.0, *(abs(number) for number in stored if math.isfinite(number))])


def differs(score: float, stored: float, scale: float, model) -> bool:
    """Whether a reward of `model` differs from the stored one by more than rounding, or is not a number."""
    return not abs(score - stored) / scale <= tolerance(model)


def save_golden(model, tokenizer, folder: str | Path, chats: list | None = None) -> Path:
    """
    Score a few chats with a live model and write them, with token ids and rewards, into the folder of its weights.

    Args:
        model ([`GRMForSequenceClassification`] or [`~peft.PeftModel`]):
            The model that was saved there. It is left as it was.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that was saved with it.
        folder (`str` or `Path`):
            Folder of the weights, or of the adapter.
        chats (`list`, *optional*):
            Chats as for [`GRMScorer.score`], in a form that JSON can hold. By default four short ones.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: a chat cannot be scored.
    """
    if not is_whole(model):
        raise ValueError(
            "The model is split over processes, and this one cannot score with it alone. Save it, load it whole "
            "(`GRMForSequenceClassification.from_pretrained(folder)`), and pass that."
        )
    given = chats is not None
    if chats is None:
        chats = CHATS if tokenizer.chat_template else [chat for chat in CHATS if "messages" not in chat]
    scorer = GRMScorer(model, tokenizer, deterministic=True)
    rows = []
    for number, chat in enumerate(chats):
        try:
            encoded = scorer.encode(chat)
            rows.append({"chat": chat, "ids": list(encoded.ids), "start": encoded.start})
        except OverlengthError as error:
            if given:
                raise ValueError(f"chat {number}: {error}") from error
        except ValueError as error:
            raise ValueError(f"chat {number}: {error}") from error
    if not rows:
        raise ValueError(f"no golden row fits into max_length={scorer.encoder.max_length}. Give shorter `chats`.")
    scorer.forward = _plain_forward(model)
    scores = scorer.rewards_of_ids([row["ids"] for row in rows], names=[f"chat {i}" for i in range(len(rows))])
    attributes = scorer.attributes_of_ids([row["ids"] for row in rows])
    for row, score, rated in zip(rows, scores, attributes, strict=True):
        row["score"] = score
        if rated:
            row["attributes"] = rated
        row["text_logp"] = _text_logp(model, row)
    path = Path(folder) / FILE
    content = {"saved_with": _environment(model), "rows": rows}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def verify(path: str | Path, **load_kwargs) -> str:
    """
    Load a reward model, tokenise and score its golden rows again, and compare.

    Args:
        path (`str` or `Path`):
            Hub id or folder of a reward model, an adapter or an export of `grm export`.
        **load_kwargs:
            Passed to [`~GRMForSequenceClassification.from_pretrained`], for instance `revision`. By default dtype and
            attention implementation are those that the rows were made with.

    Returns:
        `str`: a table of the rows.

    Raises:
        [`GoldenError`]: token ids differ, or a reward differs by more than rounding.
        `ValueError`: there are no golden rows.
    """
    hub = {key: load_kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in load_kwargs}
    with readable(path) as place:
        return _verify(place, hub, load_kwargs)


def _verify(path: str, hub: dict, load_kwargs: dict) -> str:
    file = cached_file(path, FILE, **hub, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ValueError(
            f"'{path}' has no {FILE}, so there is nothing to compare with. GRMRewardTrainer writes it; for a model "
            "that was saved otherwise, call `grm_hf.scoring.save_golden(model, tokenizer, folder)` while it is known "
            "to be right."
        )
    content = read_rows(file)
    saved = content["saved_with"]
    given = {"dtype": getattr(torch, saved["dtype"])}
    if saved["attn_implementation"] in ("eager", "sdpa"):  # others may not be here
        given["attn_implementation"] = saved["attn_implementation"]
    load: Any = GRMForSequenceClassification.from_pretrained
    if "exported_as" in content:
        load = load_export
    model = load(path, **{**given, **load_kwargs})
    if not hasattr(model, "hf_device_map"):
        model.to(own_device())
    scorer = GRMScorer(model, AutoTokenizer.from_pretrained(path, **hub), deterministic=True)

    vocabulary = model.get_input_embeddings().weight.shape[0]
    lines = ["row  tokens                                 stored         now  difference"]
    wrong = []
    scale = scale_of(row["score"] for row in content["rows"])
    for number, row in enumerate(content["rows"]):
        ids, expected = row["ids"], row["score"]
        try:
            tokens = _compare(ids, list(scorer.encode(row["chat"]).ids))
        except ValueError as error:
            tokens = f"cannot be encoded: {error}"
        # The reward of the stored ids: a change of the tokenizer does not look like a change of the weights.
        score = scorer.rewards_of_ids([ids])[0] if max(ids) < vocabulary else math.nan
        off = abs(score - expected) / scale
        holds = tokens == f"{len(ids)} equal" and not differs(score, expected, scale, model)
        mark = "" if holds else "  DIFFERS"
        if "text_logp" in row and hasattr(model, "lm_logits") and max(ids) < vocabulary:  # an export has no LM head
            now, stored = _text_logp(model, row), row["text_logp"]
            if differs(now, stored, scale_of([stored]), model):
                holds, mark = False, f"  DIFFERS: log-probability of the response was {stored:.6f}, is {now:.6f}"
        if "attributes" in row and hasattr(model, "lm_logits") and max(ids) < vocabulary:
            rated = scorer.attributes_of_ids([ids])[0]
            told = row["attributes"].items()
            moved = [n for n, old in told if differs(rated.get(n, math.nan), old, scale_of([old]), model)]
            if moved or len(rated) > len(row["attributes"]):
                holds, mark = False, f"{mark or '  DIFFERS'}: attributes {moved or [*rated]}"
        lines.append(f"{number:3}  {tokens:33} {expected:11.6f} {score:11.6f}     {off:.1e}{mark}")
        if not holds:
            wrong.append(number)
    here = _environment(model)
    for name, environment in (("saved", saved), ("here", here)):
        lines.append(f"{name}: {', '.join(f'{what} {value}' for what, value in environment.items())}")
    lines.append(f"a difference, {RELATIVE_TO}, may be {tolerance(model):.0e}")
    table = "\n".join(lines)
    if wrong:
        raise GoldenError(f"'{path}': golden rows {wrong} of {len(content['rows'])} do not hold.\n{table}")
    return table


def _compare(stored: list[int], now: list[int]) -> str:
    if stored == now:
        return f"{len(stored)} equal"
    at = next((i for i, pair in enumerate(zip(stored, now, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(stored)} stored, {len(now)} now"
    return f"token {at} was {stored[at]}, is {now[at]}"


def _dtype(model) -> str:
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def _environment(model) -> dict[str, str]:
    return {
        "grm_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": model.device.type,
        "dtype": _dtype(model),
        "attn_implementation": model.get_decoder().config._attn_implementation,
    }


@torch.no_grad()
def _text_logp(model, row: dict[str, Any]) -> float:
    """Log-probability of the row's response under the LM head, which the reward does not depend on."""
    ids = torch.tensor([row["ids"]], device=model.device)
    first = max(row["start"], 1)
    with evaluating(model):
        out = _plain_forward(model)(input_ids=ids, attention_mask=torch.ones_like(ids), return_lm_logits=True)
    logps = out.lm_logits[0, first - 1 : -1].double().log_softmax(-1)
    return float(logps.gather(1, ids[0, first:, None].to(logps.device)).sum())


def _plain_forward(model):
    """The forward without accelerate's mixed precision, as of a model that is loaded from its folder."""
    return model.__dict__.get("_original_forward", model)
