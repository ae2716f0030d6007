"""Preference rows of a dataset as token ids: `prepare_pairs` runs the [`Encoder`] over them, refuses bad rows by
index, and counts what was cut or dropped.
"""

import json
import math
import os.path
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from .encoding import (
    Encoded,
    Encoder,
    OverlengthError,
    describe,
    is_int,
    keys_found,
    left_out,
    require_embedded,
    template_kwargs_of,
)


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


__all__ = ["Counts", "Encoded", "Encoder", "OverlengthError", "prepare_pairs"]

# The unfinished word at the end of a text. In scripts written without spaces a character counts as a word.
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+$")
# What became of a row; and, added to it, what the chat template left out of the row.
_KEPT, _TRUNCATED, _RESPONSE_CUT, _DROPPED, _BAD, _TOO_LONG = range(6)
_OUTCOME, _UNREAD, _SWAPPED, _RATED = 7, {"thinking": 8, "tools": 16}, 32, 64
LARGEST = 1e18  # of a margin or a rating: float32 holds its square
NAMED = 20  # bad rows that an error names
LOOKAHEAD = 1000  # rows of a stream among which the first pair and the first rated completion are looked for
_SLOTS = 257  # of counts: this process, and as many workers of a data loader


class Counts:
    """
    What happened to the rows of a dataset; `str()` is a sentence. The counts of a streaming dataset grow while it is
    read, also by workers of a data loader. They are those of its longest reading.

    Attributes:
        name (`str`): Name of the dataset.
        rows (`int`): Rows seen.
        dropped (`int`): Rows left out: too long, or the same on both sides once they were cut.
        truncated (`int`): Rows kept in which at least one sequence was cut.
        response_cut (`int`): Rows among those where the cut reached into a response.
        thinking, tools (`int`): Rows seen in which the chat template leaves out thinking or tools.
        swapped (`int`): Rows seen whose label says that rejected is the better one, and that were turned round.
        rated (`int`): Rows kept that have ratings of one completion, and are no pair.
    """

    FIELDS = ("rows", "dropped", "truncated", "response_cut", "thinking", "tools", "swapped", "rated")

    def __init__(self, name: str, **numbers: int):
        self.name = name
        # For each process that reads: its present reading, and its longest one before.
        self._table = torch.zeros(_SLOTS, 2, len(self.FIELDS), dtype=torch.int64).share_memory_()
        self._table[0, 0] = torch.tensor([numbers.pop(field, 0) for field in self.FIELDS])
        assert not numbers, numbers

    def __getattr__(self, field: str) -> int:
        if field.startswith("_") or field not in self.FIELDS:
            raise AttributeError(field)
        return self.numbers()[self.FIELDS.index(field)]

    def numbers(self) -> list[int]:
        """The counts, in the order of `FIELDS`."""
        fullest = self._table[:, :, 0].argmax(1)
        return self._table[torch.arange(_SLOTS), fullest].sum(0).tolist()

    @property
    def kept(self) -> int:
        return self.rows - self.dropped

    @property
    def pairs(self) -> int:
        """Pairs kept."""
        return self.kept - self.rated

    def add(self, outcome: int, rows: int = 1) -> None:
        what = outcome & _OUTCOME
        flags = [True, what == _DROPPED, what in (_TRUNCATED, _RESPONSE_CUT), what == _RESPONSE_CUT]
        flags += [bool(outcome & bit) for bit in (*_UNREAD.values(), _SWAPPED, _RATED)]
        self._table[_slot(), 0] += rows * torch.tensor(flags, dtype=torch.int64)

    def begin(self) -> None:
        """Another reading begins in this process."""
        now, before = self._table[_slot()]
        if now[0] > before[0]:
            before.copy_(now)
        now.zero_()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counts) and (self.name, self.numbers()) == (other.name, other.numbers())

    def __repr__(self) -> str:
        numbers = [f"{field}={n}" for field, n in zip(self.FIELDS, self.numbers(), strict=True)]
        return f"Counts({', '.join([repr(self.name), *numbers])})"

    def __str__(self) -> str:
        inside = f" ({self.response_cut} of them inside the response)" if self.truncated else ""
        text = f"{self.name}: {self.rows} rows, {self.dropped} dropped, {self.truncated} truncated{inside}"
        for what in _UNREAD:
            if count := getattr(self, what):
                text += f", {count} {left_out(what)}"
        if self.swapped:
            text += f", {self.swapped} with chosen and rejected exchanged, since their label is below 0.5"
        if self.rated:
            text += f", {self.rated} kept as rated completions"
        return text

    @property
    def changed(self) -> bool:
        """Whether any row was changed."""
        return any(
            number for field, number in zip(self.FIELDS[1:], self.numbers()[1:], strict=True) if field != "rated"
        )


def _slot() -> int:
    worker = get_worker_info()
    return 0 if worker is None else 1 + worker.id % (_SLOTS - 1)


def prepare_pairs(
    dataset: "Dataset | IterableDataset",
    encoder: Encoder,
    name: str = "train",
    num_proc: int | None = None,
    starts_required: bool = True,
    embeddings: int | None = None,
    positions: int | None = None,
    whole: bool = False,
    attributes: Sequence[str] | None = None,
) -> "tuple[Dataset | IterableDataset, Counts]":
    """
    Tokenises a dataset of preference pairs.

    Takes every preference format of TRL: text or messages, the prompt in a column of its own or as the beginning of
    both sides, with `tools` (list or JSON), `chat_template_kwargs`, `margin` (any finite number) and `label` (the
    share of annotators who preferred `chosen`; 0.5 is a tie; below 0.5 the two sides are exchanged). Rows that are
    already tokenised have `chosen_ids`, `rejected_ids` (with BOS and terminator), `chosen_start` and `rejected_start`.
    All rows must have the same format. Other columns are left out of the result.

    With `attributes` a pair may have ratings, `chosen_NAME` and `rejected_NAME`, and a row may be a rated completion
    in place of a pair: `prompt`, `completion`, and ratings `NAME`. A rating is a finite number, or `None` (NaN) for a
    gap. A rated completion becomes a pair whose rejected response is the first token of its text.

    If two texts have their prompt only as a common beginning, the response begins with the first word that differs (a
    character, in scripts written without spaces) and the white space before it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference pairs.
        encoder ([`Encoder`]):
            Tokenizer and policies.
        name (`str`, *optional*, defaults to `"train"`):
            The name of the dataset in errors and counts.
        num_proc (`int`, *optional*):
            Processes; only for a [`~datasets.Dataset`].
        starts_required (`bool`, *optional*, defaults to `True`):
            Whether rows that are already tokenised must say where their responses start. Pass `False` if there is no
            text loss; then the whole sequence counts as response.
        embeddings, positions (`int`, *optional*):
            Numbers of tokens and positions that the model has embeddings for: rows with others are refused.
        whole (`bool`, *optional*, defaults to `False`):
            Read a streaming dataset to its end now, which gives a [`~datasets.Dataset`] (in memory).
        attributes (`Sequence[str]`, *optional*):
            Names of the model's attributes.

    Returns:
        The dataset with columns `chosen_ids`, `rejected_ids` (lists of ints), `chosen_start`, `rejected_start` (see
        [`Encoded`]), where given `margin` and `label`, with `attributes` also `is_pair` and the lists `chosen_ratings`
        and `rejected_ratings` (NaN for a gap), and [`Counts`]. A streaming dataset is prepared while it
        is read: its counts grow with it, and a bad row raises when it is reached.

    Raises:
        `ValueError`: for bad rows, with the index of each, what was found and what to do; for a dataset without rows;
            if every row was dropped.
    """
    import datasets

    if getattr(dataset, "format", {}).get("type") != "custom":  # Python objects, but for a user's transform
        dataset = dataset.with_format(None)
    for side in ("chosen", "rejected"):  # TRL's earlier names
        if f"{side}_input_ids" in (columns := dataset.column_names or ()) and f"{side}_ids" not in columns:
            dataset = dataset.rename_column(f"{side}_input_ids", f"{side}_ids")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset has no rows.")
    formats = _formats(dataset, first, name, attributes)
    of_pairs = formats[True][1].numbers if True in formats else ()
    prepare = partial(
        _prepare_row,
        encoder=encoder,
        name=name,
        formats=formats,
        numbers=of_pairs,
        attributes=attributes,
        starts_required=starts_required,
        embeddings=embeddings,
        positions=positions,
    )

    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    columns = {"chosen_ids": ids, "rejected_ids": ids, "chosen_start": number, "rejected_start": number}
    columns |= {column: datasets.Value("float64") for column in of_pairs}
    if attributes is not None:
        ratings = datasets.List(datasets.Value("float64"))
        columns |= {"is_pair": datasets.Value("bool"), "chosen_ratings": ratings, "rejected_ratings": ratings}
    features = datasets.Features({**columns, "outcome": datasets.Value("int8")})
    counts = Counts(name)
    streaming = isinstance(dataset, datasets.IterableDataset)

    if streaming and not whole:
        prepare(first, 0)  # a mistake in settings or columns shows now, not in the first step
        stream = dataset.map(
            partial(_prepare_and_count, prepare=prepare, counts=counts),
            with_indices=True,
            remove_columns=dataset.column_names or list(first),
            features=features,
        )
        return stream.filter(_is_kept, input_columns="outcome").select_columns(list(columns)), counts

    features["error"] = datasets.Value("string")
    arguments = {
        "with_indices": True,
        "remove_columns": dataset.column_names or list(first),
        "features": features,
    }
    prepare_or_say = partial(_prepare_or_say, prepare=prepare, columns=tuple(columns))
    if streaming:
        prepared = _read(dataset.map(prepare_or_say, **arguments), features)
    else:
        prepared = dataset.map(prepare_or_say, num_proc=num_proc, desc=f"Tokenizing {name} dataset", **arguments)
    prepared = prepared.with_format(None)
    outcomes = prepared["outcome"][:]
    if bad := [i for i, outcome in enumerate(outcomes) if outcome in (_BAD, _TOO_LONG)]:
        errors = prepared.select(bad[:NAMED])["error"][:]
        if len(bad) > 1:
            which = f"the first {NAMED} of them" if len(bad) > NAMED else "namely"
            errors = [f"{len(bad)} rows of the {name} dataset cannot be used, {which}:", *errors]
        raise (OverlengthError if all(outcomes[i] == _TOO_LONG for i in bad) else ValueError)("\n".join(errors))
    for outcome, rows in Counter(outcomes).items():
        counts.add(outcome, rows)
    if not counts.kept:
        raise ValueError(
            f"Every row of the {name} dataset ({counts.rows}) was dropped: none fits into max_length="
            f"{encoder.max_length}. Raise `max_length`, or choose overlength='truncate_left'."
        )
    if counts.dropped:
        prepared = prepared.select([i for i, outcome in enumerate(outcomes) if _is_kept(outcome)])
    return prepared.select_columns(list(columns)), counts


def _formats(dataset, first: dict, name: str, attributes: Sequence[str] | None) -> "dict[bool, tuple]":
    """For pairs (`True`) and rated completions (`False`): the index of the first one, and the format that it gives."""
    import datasets

    kinds = {not _is_rated(first): (0, first)}
    other = "completion" if True in kinds else "chosen"
    columns = dataset.column_names
    if attributes is not None and (columns is None or {other, f"{other}_ids"} & set(columns)):
        rows = islice(dataset, LOOKAHEAD) if isinstance(dataset, datasets.IterableDataset) else dataset
        found = ((i, row) for i, row in enumerate(rows) if (not _is_rated(row)) not in kinds)
        if (pair := next(found, None)) is not None:
            kinds[not _is_rated(pair[1])] = pair
    formats = {}
    for is_pair, (index, row) in kinds.items():
        with _naming(name, index):
            formats[is_pair] = index, _format_of(row, attributes)
        _warn_of_first(row, formats[is_pair][1], name)
    if attributes is not None:
        _warn_of_ratings([row for _, row in kinds.values()], name, attributes)
    return formats


def _is_rated(row: dict) -> bool:
    """Whether a row is a completion with ratings, not a pair."""
    sides = ("chosen", "rejected", "chosen_ids", "rejected_ids")
    return row.get("completion") is not None and all(row.get(side) is None for side in sides)


def _warn_of_ratings(rows: list[dict], name: str, attributes: Sequence[str]) -> None:
    """Warns of columns that look like ratings and are not those of an attribute, judged by one row of each kind."""
    ignored = set()
    for row in rows:
        if _is_rated(row):
            ignored |= {column for column, value in row.items() if _is_number(value) and column not in attributes}
            continue
        for column, value in row.items():
            side, _, rest = column.partition("_")
            known = {*attributes, "ids", "start", "logps"}
            if side in ("chosen", "rejected") and _is_number(value) and rest not in known:
                ignored.add(column)
            elif column in attributes and column not in ("margin", "label") and _is_number(value):
                ignored.add(column)  # of which side?
    if ignored:
        warnings.warn(
            f"The {name} dataset has columns of numbers that are ignored: {', '.join(sorted(ignored))}. The model's "
            f"attributes are {', '.join(attributes)}; a rated completion has columns of these names, a pair `chosen_` "
            "and `rejected_` before them.",
            stacklevel=4,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)


def _read(stream: "IterableDataset", features) -> "Dataset":
    import datasets

    parts = [datasets.Dataset.from_dict(rows, features=features) for rows in stream.iter(batch_size=1000)]
    return datasets.concatenate_datasets(parts)


def _warn_of_first(first: dict, row_format: "_RowFormat", name: str) -> None:
    if row_format.form == "text":
        rated = _is_rated(first)
        sides = [first["completion"]] if rated else [first["chosen"], first["rejected"]]
        fields = "`completion`" if rated else "`chosen` and `rejected`"
        warn_of_texts(first["prompt"] if row_format.prompt else "", sides, fields, f"the {name} dataset")


def warn_of_texts(prompt: str, sides: Sequence[str], fields: str, where: str) -> None:
    """Warns of a probable mistake in rows of texts, judged by the first one: its prompt, and what follows it."""
    if any(map(_is_json_messages, [prompt, *sides])):
        warnings.warn(
            f"There are messages written as JSON text in {where}. They are read as that text, without the chat "
            "template. If messages are meant, read them first: "
            "`dataset.map(lambda row: {name: json.loads(row[name]) for name in ('chosen', 'rejected')})`.",
            stacklevel=5,
        )
    if prompt.strip() and all(side.startswith(prompt) for side in sides):
        warnings.warn(
            f"In {where}, {fields} begin{'' if ' and ' in fields else 's'} with the text of `prompt`, which is put "
            "before them once more. If they are whole texts, remove the column `prompt`.",
            stacklevel=5,
        )


def _is_json_messages(text: str) -> bool:
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    message = value[0] if isinstance(value, list) and value else value
    return isinstance(message, dict) and "role" in message


class _RowFormat(NamedTuple):
    """What all rows of a dataset have in common."""

    form: str  # "tokens", "text" or "messages"
    prompt: bool  # in a column of its own
    numbers: tuple[str, ...]  # columns of floats that are taken over

    def __str__(self) -> str:
        prompt = {"tokens": ""}.get(self.form, " with a prompt" if self.prompt else " without a prompt")
        return f"{self.form}{prompt}, {' and '.join(self.numbers) or 'no margin'}"


@contextmanager
def _naming(name: str, index: int, side: str = "") -> Iterator[None]:
    """Puts the dataset, the row and the field in front of a `ValueError` that is raised within."""
    try:
        yield
    except ValueError as error:
        where = f"{name} dataset, row {index}" + (f", `{side}`" if side else "")
        raise (OverlengthError if isinstance(error, OverlengthError) else ValueError)(f"{where}: {error}") from error


def _format_of(row: dict, attributes: Sequence[str] | None = None) -> _RowFormat:
    if _is_rated(row):
        return _format_of_rated(row, attributes)
    numbers = tuple(n for n in ("margin", "label") if row.get(n) is not None)
    if "chosen_ids" in row and "rejected_ids" in row:
        numbers += tuple(n for n in ("ref_chosen_logps", "ref_rejected_logps") if row.get(n) is not None)
        return _RowFormat("tokens", False, numbers)
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
    return _RowFormat(forms["chosen"], prompt is not None, numbers)


def _format_of_rated(row: dict, attributes: Sequence[str] | None) -> _RowFormat:
    if attributes is None:
        raise ValueError(
            "it has a `completion` and no `chosen` and `rejected`, so it is a rated one, and the model has no "
            "attributes. Make the model with `attribute_names`, the columns of the ratings, or give pairs."
        )
    if row.get("prompt") is None:
        raise ValueError(f"a rated `completion` needs its `prompt`; found {keys_found(row)}.")
    forms = {_form(field, row[field]) for field in ("prompt", "completion")}
    if len(forms) > 1:
        raise ValueError("text and messages are mixed in `prompt` and `completion`. Write both the same way.")
    return _RowFormat(forms.pop(), True, ())


def labels_of(rows: Sequence[dict], name: str) -> list[float]:
    """The soft label of each row of a dataset, 1 for a row without one."""
    labels = []
    for index, row in enumerate(rows):
        with _naming(name, index):
            labels.append(1.0 if (label := row.get("label")) is None else _number("label", label))
    return labels


def _form(field: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "messages"
    raise ValueError(f"`{field}` is {describe(value)}; it must be a string or a list of messages.")


def _prepare_row(
    row: dict,
    index: int,
    *,
    encoder: Encoder,
    name: str,
    formats: dict[bool, tuple[int, _RowFormat]],
    numbers: Sequence[str],
    attributes: Sequence[str] | None,
    starts_required: bool,
    embeddings: int | None,
    positions: int | None,
) -> dict:
    with _naming(name, index):
        own = _format_of(row, attributes)
        first, row_format = formats.get(not _is_rated(row), (index, own))
        if True not in formats and row_format.numbers:  # no columns were made for them
            raise ValueError(
                f"this pair has {' and '.join(row_format.numbers)}, and the first {LOOKAHEAD} rows of the stream are "
                "rated completions alone. Shuffle the stream, or put a pair among them."
            )
        if own != row_format:
            raise ValueError(
                f"this row is {own}; row {first} is {row_format}. All rows of a dataset must be of one kind: fill in "
                "what is missing, or remove the column or the rows."
            )
        if _is_rated(row):
            rated = _prepare_rated(row, encoder, row_format.form, attributes or (), embeddings, positions)
            return {**rated, **dict.fromkeys(numbers, 0.0)}
        output: dict[str, Any] = {number: _number(number, row[number]) for number in row_format.numbers}
        swapped = _is_swapped(**output)
        texts = row
        if row_format.form != "tokens":
            if row["chosen"] == row["rejected"]:
                raise ValueError("`chosen` and `rejected` are equal, so nothing is preferred. Remove the row.")
            if row_format.form == "text" and not row_format.prompt:
                texts = _split_texts(row["chosen"], row["rejected"])
        ratings = {}
        if attributes is not None:
            ratings = {
                f"{side}_ratings": [_rating(f"{side}_{attribute}", row) for attribute in attributes]
                for side in ("chosen", "rejected")
            }
        prompt = row["prompt"] if row_format.prompt else []
        tools, template_kwargs = row.get("tools"), template_kwargs_of(row)

    encoded: dict[str, Encoded] = {}
    for side in ("chosen", "rejected"):
        with _naming(name, index, f"{side}_ids" if row_format.form == "tokens" else side):
            try:
                if row_format.form == "tokens":
                    encoded[side] = encoder.fit(*_tokens(row, side, encoder.tokenizer, starts_required))
                elif row_format.form == "text":
                    encoded[side] = encoder.encode(texts.get("prompt") or "", texts[side])
                else:
                    encoded[side] = encoder.encode(prompt, row[side], tools, **template_kwargs)
            except OverlengthError:
                if encoder.overlength != "drop":
                    raise
                continue
            require_embedded(encoded[side].ids, embeddings, positions, encoder.tokenizer)
    if attributes is not None:
        output |= {"is_pair": True, **ratings}
    if len(encoded) < 2:
        empty = {"chosen_ids": [], "rejected_ids": [], "chosen_start": 0, "rejected_start": 0}
        return {**empty, **output, "outcome": _DROPPED}

    chosen, rejected = encoded["chosen"], encoded["rejected"]
    cut = chosen.truncated or rejected.truncated
    equal = chosen.ids == rejected.ids
    unread = {*chosen.unread, *rejected.unread}
    with _naming(name, index):
        if equal and not cut and "thinking" in unread:
            raise ValueError(
                "the two responses differ in their thinking only (`<think>`), which the chat template leaves out, so "
                "nothing is preferred. Use a template that writes it, or remove the row."
            )
        if equal and not cut:
            raise ValueError("the two responses are the same tokens, so nothing is preferred. Remove the row.")
        if cut and "ref_chosen_logps" in output:
            raise ValueError(
                f"it has reference log-probabilities, which belong to the uncut text, and is longer than max_length="
                f"{encoder.max_length}. Remove the columns `ref_chosen_logps` and `ref_rejected_logps`, or raise "
                "`max_length`."
            )
    if swapped:
        chosen, rejected = rejected, chosen
        output["label"] = 1 - output["label"]
        for names in (("ref_chosen_logps", "ref_rejected_logps"), ("chosen_ratings", "rejected_ratings")):
            if names[0] in output:
                output |= dict(zip(names, [output[name] for name in reversed(names)], strict=True))
    response_cut = chosen.response_cut or rejected.response_cut
    outcome = _DROPPED if equal else _RESPONSE_CUT if response_cut else _TRUNCATED if cut else _KEPT
    return {
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "chosen_start": chosen.start,
        "rejected_start": rejected.start,
        **output,
        "outcome": outcome + sum(_UNREAD[what] for what in unread) + _SWAPPED * swapped,
    }


def _prepare_rated(row, encoder, form, attributes, embeddings, positions) -> dict:
    """A rated completion as a pair whose rejected side is one token. Nothing of it is a response to the text loss."""
    ratings = [_rating(attribute, row) for attribute in attributes]
    if all(map(math.isnan, ratings)):
        raise ValueError(
            f"it has none of the ratings {', '.join(f'`{attribute}`' for attribute in attributes)}; found "
            f"{keys_found(row)}. Rename the columns, or remove the row."
        )
    gaps = [math.nan] * len(ratings)
    columns: dict[str, Any] = {"is_pair": False, "chosen_ratings": ratings, "rejected_ratings": gaps}
    prompt, completion = row["prompt"], row["completion"]
    try:
        if form == "text":
            text = encoder.encode(prompt, completion)
        else:
            text = encoder.encode(prompt, completion, row.get("tools"), **template_kwargs_of(row))
    except OverlengthError:
        if encoder.overlength != "drop":
            raise
        empty = {"chosen_ids": [], "rejected_ids": [], "chosen_start": 0, "rejected_start": 0}
        return {**empty, **columns, "outcome": _DROPPED}
    require_embedded(text.ids, embeddings, positions, encoder.tokenizer)
    outcome = _RESPONSE_CUT if text.response_cut else _TRUNCATED if text.truncated else _KEPT
    sides = {"chosen_ids": text.ids, "rejected_ids": text.ids[:1]}
    return {
        **sides,
        **{f"{side.removesuffix('_ids')}_start": len(ids) for side, ids in sides.items()},
        **columns,
        "outcome": outcome + sum(_UNREAD[what] for what in text.unread) + _RATED,
    }


def _rating(column: str, row: dict) -> float:
    """A number, or NaN for a gap."""
    value = row.get(column)
    return math.nan if value is None or value != value else _number(column, value)


def _prepare_or_say(row: dict, index: int, *, prepare, columns: tuple[str, ...]) -> dict:
    """The prepared row, or an empty row with the reason."""
    try:
        return {**prepare(row, index), "error": ""}
    except ValueError as error:
        empty: dict[str, Any] = {column: [] if column.endswith(("_ids", "_ratings")) else 0 for column in columns}
        outcome = _TOO_LONG if isinstance(error, OverlengthError) else _BAD
        return {**empty, "outcome": outcome, "error": str(error)}


def _prepare_and_count(row: dict, index: int, *, prepare, counts: Counts) -> dict:
    if index == 0:
        counts.begin()
    prepared = prepare(row, index)
    counts.add(prepared["outcome"])
    return prepared


def _is_kept(outcome: int) -> bool:
    return outcome & _OUTCOME != _DROPPED


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
    """The prompt that two different texts share, and the rest of each."""
    prompt = os.path.commonprefix([chosen, rejected])
    rests = chosen[len(prompt) :], rejected[len(prompt) :]
    if any(_WORD.match(rest[:1]) for rest in rests):
        prompt = _WORD.sub("", prompt)
    if not all(rest.strip() for rest in rests):  # one text is the beginning of the other
        prompt = re.sub(r"\S+\s*$", "", prompt)
    prompt = prompt.rstrip()
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _is_swapped(label: float = 1.0, margin: float | None = None, **_) -> bool:
    """Whether a row's label says that its rejected response is the better one."""
    if label < 0.5 and margin is not None:
        raise ValueError(
            f"`label` is {label:g}, so `rejected` is preferred, and `margin` says how much better `chosen` is. "
            "Exchange the two responses, or remove one of the columns."
        )
    return label < 0.5


def _number(name: str, value: Any) -> float:
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
    if name == "label" and not (finite and 0 <= value <= 1):
        raise ValueError(
            f"`label` is {value!r}; beside `chosen` and `rejected` it is the share of annotators who preferred "
            "`chosen`, from 0 to 1. Rename the column if it means something else."
        )
    if not finite:
        raise ValueError(
            f"`{name}` is {value!r}; it must be a finite number, of at most {LARGEST:g}. Correct it, or remove the "
            "row."
        )
    return float(value)
