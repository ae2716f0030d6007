"""Preference rows of a dataset as token ids: `prepare_pairs` runs the [`Encoder`] over them, refuses bad rows by
index, and counts what was cut or dropped.
"""

import math
import os.path
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .encoding import Encoded, Encoder, OverlengthError, describe, is_int, keys_found, template_kwargs_of


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


__all__ = ["Counts", "Encoded", "Encoder", "OverlengthError", "prepare_pairs"]

# The unfinished word at the end of a text. In scripts written without spaces a character counts as a word.
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+$")
_KEPT, _TRUNCATED, _RESPONSE_CUT, _DROPPED = range(4)


@dataclass
class Counts:
    """
    What happened to the rows of a dataset. `str()` gives it as a sentence.

    Attributes:
        name (`str`): Name of the dataset.
        rows (`int`): Rows seen.
        dropped (`int`): Rows left out: too long, or the same on both sides once they were cut.
        truncated (`int`): Rows kept of which at least one sequence was cut.
        response_cut (`int`): Rows among those where the cut reached into a response.
    """

    name: str
    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    response_cut: int = 0

    @property
    def kept(self) -> int:
        return self.rows - self.dropped

    def add(self, outcome: int, rows: int = 1) -> None:
        self.rows += rows
        self.dropped += rows * (outcome == _DROPPED)
        self.truncated += rows * (outcome in (_TRUNCATED, _RESPONSE_CUT))
        self.response_cut += rows * (outcome == _RESPONSE_CUT)

    def __str__(self) -> str:
        inside = f" ({self.response_cut} of them inside the response)" if self.truncated else ""
        return f"{self.name}: {self.rows} rows, {self.dropped} dropped, {self.truncated} truncated{inside}"


def prepare_pairs(
    dataset: "Dataset | IterableDataset",
    encoder: Encoder,
    name: str = "train",
    num_proc: int | None = None,
    starts_required: bool = True,
) -> "tuple[Dataset | IterableDataset, Counts]":
    """
    Tokenises a dataset of preference pairs.

    Takes every preference format of TRL: text or messages, the prompt in a column of its own or as the beginning of
    both sides, with `tools` (list or JSON), `chat_template_kwargs` and `margin` (any finite number). Rows that are
    already tokenised have `chosen_ids`, `rejected_ids` (with BOS and terminator), `chosen_start` and `rejected_start`.
    All rows must be of one kind. Other columns are left out of the result.

    Where two texts hold their prompt only as a common beginning, the response begins with the word (a character, in
    scripts written without spaces) in which they first differ, and with the white space before it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference pairs.
        encoder ([`Encoder`]):
            Tokenizer and policies.
        name (`str`, *optional*, defaults to `"train"`):
            What errors and counts call the dataset.
        num_proc (`int`, *optional*):
            Processes; only for a [`~datasets.Dataset`].
        starts_required (`bool`, *optional*, defaults to `True`):
            Whether rows that are already tokenised must say where their responses start. Pass `False` if there is no
            text loss; then the whole sequence counts as response.

    Returns:
        The dataset with columns `chosen_ids`, `rejected_ids` (lists of ints), `chosen_start`, `rejected_start` (see
        [`Encoded`]) and, where given, `margin`, and [`Counts`]. A streaming dataset is prepared while it is read: its
        counts are those of the latest reading in this process, and a bad row raises when it is reached.

    Raises:
        `ValueError`: for a bad row, with its index, what was found and what to do; for a dataset without rows, or of
            which every row was dropped.
    """
    import datasets

    if getattr(dataset, "format", {}).get("type") != "custom":  # rows as Python objects, but by the user's transform
        dataset = dataset.with_format(None)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset has no rows.")
    with _naming(name, 0):
        kind = _kind(first)
    prepare = partial(_prepare_row, encoder=encoder, name=name, kind=kind, starts_required=starts_required)

    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    columns = {"chosen_ids": ids, "rejected_ids": ids, "chosen_start": number, "rejected_start": number}
    columns |= {column: datasets.Value("float64") for column in kind.numbers}
    features = datasets.Features({**columns, "outcome": datasets.Value("int8")})
    counts = Counts(name)

    if isinstance(dataset, datasets.IterableDataset):
        prepare(first, 0)  # a mistake in the settings or the columns shows now, not in the first step
        stream = dataset.map(
            partial(_prepare_and_count, prepare=prepare, counts=counts),
            with_indices=True,
            remove_columns=dataset.column_names or list(first),
            features=features,
        )
        return stream.filter(_is_kept, input_columns="outcome").select_columns(list(columns)), counts

    prepared = dataset.map(
        prepare,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    ).with_format(None)
    outcomes = prepared["outcome"][:]
    for outcome, rows in Counter(outcomes).items():
        counts.add(outcome, rows)
    if not counts.kept:
        raise ValueError(
            f"Every row of the {name} dataset ({counts.rows}) was dropped: none fits into max_length="
            f"{encoder.max_length}. Raise `max_length`, or choose overlength='truncate_left'."
        )
    if counts.dropped:
        prepared = prepared.select([i for i, outcome in enumerate(outcomes) if outcome != _DROPPED])
    return prepared.remove_columns("outcome"), counts


class _Kind(NamedTuple):
    """What all rows of a dataset have in common."""

    form: str  # "tokens", "text" or "messages"
    prompt: bool  # in a column of its own
    numbers: tuple[str, ...]  # columns of floats that are taken over

    def __str__(self) -> str:
        prompt = {"tokens": ""}.get(self.form, " with a prompt" if self.prompt else " without a prompt")
        return f"{self.form}{prompt}, {' and '.join(self.numbers) or 'no margin'}"


@contextmanager
def _naming(name: str, index: int, side: str = "") -> Iterator[None]:
    """Puts the dataset, the row and the field in front of a `ValueError` from inside."""
    try:
        yield
    except ValueError as error:
        where = f"{name} dataset, row {index}" + (f", `{side}`" if side else "")
        raise (OverlengthError if isinstance(error, OverlengthError) else ValueError)(f"{where}: {error}") from error


def _kind(row: dict) -> _Kind:
    numbers = tuple(n for n in ("margin",) if row.get(n) is not None)
    if "chosen_ids" in row and "rejected_ids" in row:
        numbers += tuple(n for n in ("ref_chosen_logps", "ref_rejected_logps") if row.get(n) is not None)
        return _Kind("tokens", False, numbers)
    missing = [field for field in ("chosen", "rejected") if row.get(field) is None]
    if missing:
        raise ValueError(
            f"no {' and no '.join(f'`{field}`' for field in missing)}; found {keys_found(row)}. A preference pair has "
            "`chosen` and `rejected`, and `prompt` if these do not contain it: rename the columns, or remove the row."
        )
    prompt = row.get("prompt")
    forms = {field: _form(field, row[field]) for field in ("chosen", "rejected")}
    if prompt is not None:
        forms["prompt"] = _form("prompt", prompt)
    if forms["chosen"] == forms["rejected"] == "messages" and isinstance(prompt, str):
        prompt = forms.pop("prompt") and None  # some datasets repeat the prompt as text beside whole conversations
    if len(set(forms.values())) > 1:
        raise ValueError(
            f"text and messages are mixed: {', '.join(f'`{field}` is {form}' for field, form in forms.items())}. "
            "Write all of them the same way."
        )
    return _Kind(forms["chosen"], prompt is not None, numbers)


def _form(field: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "messages"
    raise ValueError(f"`{field}` is {describe(value)}; it must be a string or a list of messages.")


def _prepare_row(row: dict, index: int, *, encoder: Encoder, name: str, kind: _Kind, starts_required: bool) -> dict:
    with _naming(name, index):
        own = _kind(row)
        if own != kind:
            raise ValueError(
                f"this row is {own}; row 0 is {kind}. All rows of a dataset must be of one kind: fill in what is "
                "missing, or remove the column or the rows."
            )
        output: dict[str, Any] = {number: _finite(number, row[number]) for number in kind.numbers}
        texts = row
        if kind.form != "tokens":
            if row["chosen"] == row["rejected"]:
                raise ValueError("`chosen` and `rejected` are equal, so nothing is preferred. Remove the row.")
            if kind.form == "text" and not kind.prompt:
                texts = _split_texts(row["chosen"], row["rejected"])
        prompt = row["prompt"] if kind.prompt else []
        tools, template_kwargs = row.get("tools"), template_kwargs_of(row)

    encoded: dict[str, Encoded] = {}
    for side in ("chosen", "rejected"):
        with _naming(name, index, f"{side}_ids" if kind.form == "tokens" else side):
            try:
                if kind.form == "tokens":
                    encoded[side] = encoder.fit(*_tokens(row, side, encoder.tokenizer, starts_required))
                elif kind.form == "text":
                    encoded[side] = encoder.encode(texts.get("prompt") or "", texts[side])
                else:
                    encoded[side] = encoder.encode(prompt, row[side], tools, **template_kwargs)
            except OverlengthError:
                if encoder.overlength != "drop":
                    raise
    if len(encoded) < 2:
        empty = {"chosen_ids": [], "rejected_ids": [], "chosen_start": 0, "rejected_start": 0}
        return {**empty, **output, "outcome": _DROPPED}

    chosen, rejected = encoded["chosen"], encoded["rejected"]
    cut = chosen.truncated or rejected.truncated
    equal = chosen.ids == rejected.ids
    with _naming(name, index):
        if equal and not cut:
            raise ValueError("the two responses are the same tokens, so nothing is preferred. Remove the row.")
        if cut and "ref_chosen_logps" in output:
            raise ValueError(
                f"it has reference log-probabilities, which belong to the uncut text, and is longer than max_length="
                f"{encoder.max_length}. Remove the columns `ref_chosen_logps` and `ref_rejected_logps`, or raise "
                "`max_length`."
            )
    response_cut = chosen.response_cut or rejected.response_cut
    outcome = _DROPPED if equal else _RESPONSE_CUT if response_cut else _TRUNCATED if cut else _KEPT
    return {
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "chosen_start": chosen.start,
        "rejected_start": rejected.start,
        **output,
        "outcome": outcome,
    }


def _prepare_and_count(row: dict, index: int, *, prepare, counts: Counts) -> dict:
    if index == 0:  # another reading begins
        counts.rows = counts.dropped = counts.truncated = counts.response_cut = 0
    prepared = prepare(row, index)
    counts.add(prepared["outcome"])
    return prepared


def _is_kept(outcome: int) -> bool:
    return outcome != _DROPPED


def _tokens(row: dict, side: str, tokenizer: PreTrainedTokenizerBase, starts_required: bool) -> tuple[list[int], int]:
    """Ids and start of a row that is already tokenised."""
    vocabulary = len(tokenizer)
    ids, start = row[f"{side}_ids"], row.get(f"{side}_start")
    if not isinstance(ids, list) or not ids or not all(is_int(i) and 0 <= i < vocabulary for i in ids):
        raise ValueError(
            f"found {describe(ids)}; it must be a non-empty list of token ids from 0 to {vocabulary - 1}."
        )
    if start is None:
        if starts_required:
            raise ValueError(
                f"there is no `{side}_start`, so the tokens that the text loss needs are unknown. Add the columns "
                "`chosen_start` and `rejected_start` (index of the first response token), or give the texts instead."
            )
        start = 0
    if not is_int(start) or not 0 <= start < len(ids):
        raise ValueError(f"`{side}_start` is {start!r}; it must be the index of one of the {len(ids)} tokens.")
    return ids, start


def _split_texts(chosen: str, rejected: str) -> dict[str, str]:
    """The prompt that two different texts have in common, and what each has behind it."""
    prompt = os.path.commonprefix([chosen, rejected])
    rests = chosen[len(prompt) :], rejected[len(prompt) :]
    if any(_WORD.match(rest[:1]) for rest in rests):
        prompt = _WORD.sub("", prompt)
    if not all(rest.strip() for rest in rests):  # one text is the beginning of the other
        prompt = re.sub(r"\S+\s*$", "", prompt)
    prompt = prompt.rstrip()
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a finite number. Correct it, or remove the row.")
    return float(value)
