"""A preference example as tokens. One `Encoder` renders and tokenises for training, evaluation, scoring and serving,
so that a text has one sequence of ids everywhere; `prepare_pairs` runs it over a dataset of preference pairs, refuses
bad rows by index, and counts what was cut or dropped.

A sequence is `(BOS) prompt + response + terminator`. The reward is read at the terminator: the end of turn that the
chat template writes, or EOS where it writes none. `start` is the index of the first response token: the text loss
covers `ids[start:]`, which is the assistant's final turn and its terminator.
"""

import json
import math
import os.path
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from .configuration_grm import GRMConfig


# A private-use character: no response contains it, so two renderings that differ by it part exactly there.
_PROBE = "\uf8ff"
# The unfinished word at the end of a text. In scripts written without spaces a character counts as a word.
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+$")
_KEPT, _TRUNCATED, _RESPONSE_CUT, _DROPPED = range(4)


class OverlengthError(ValueError):
    """A sequence is longer than `max_length` and the policy is not to cut it."""


@dataclass(frozen=True)
class Encoded:
    """
    One sequence as token ids.

    Attributes:
        ids (`list[int]`): The whole sequence.
        start (`int`): Index of the first response token, between 0 and `len(ids) - 1`. A token that holds the end of
            the prompt and the beginning of the response counts as response.
        cut (`int`): Number of tokens that truncation took away.
        response_cut (`bool`): Whether some of those belonged to the response (then nothing is left of the prompt).
    """

    ids: list[int]
    start: int
    cut: int = 0
    response_cut: bool = False

    @property
    def truncated(self) -> bool:
        return self.cut > 0


@dataclass(frozen=True)
class Encoder:
    """
    Turns a prompt and a response into token ids.

    The ids are those that TRL's `RewardTrainer` gives to a model, with three differences: BOS and EOS are never
    doubled, a conversation whose template writes no end of turn gets an EOS, and an over-long sequence is cut from the
    left.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with an EOS token, and with a chat template if conversations are to be encoded.
        max_length (`int`, *optional*):
            Most tokens a sequence may have, at least 2. `None`: no limit.
        overlength (`str`, *optional*, defaults to `"truncate_left"`):
            What happens to a longer one: `"truncate_left"` (a leading BOS and the end of the sequence stay), `"drop"`
            (`prepare_pairs` leaves the pair out and counts it) or `"error"`.
        bos (`str`, *optional*, defaults to `"single"`):
            `"single"`: BOS at most once. `"double"`: as in the code of the GRM authors, a conversation is rendered to
            text and tokenised with special tokens, which gives two BOS where the template already writes one.

    Raises:
        `ValueError`: for a tokenizer without EOS, or a setting out of range.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    overlength: str = "truncate_left"
    bos: str = "single"
    _special_ids: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _ends: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        tokenizer = self.tokenizer
        if self.overlength not in ("truncate_left", "drop", "error"):
            raise ValueError(f"`overlength` is {self.overlength!r}; it must be 'truncate_left', 'drop' or 'error'.")
        if self.bos not in ("single", "double"):
            raise ValueError(f"`bos` is {self.bos!r}; it must be 'single' or 'double'.")
        if self.max_length is not None and (not _is_int(self.max_length) or self.max_length < 2):
            raise ValueError(
                f"`max_length` is {self.max_length!r}; it must be a whole number of at least 2 (a token and its "
                "terminator), or None for no limit."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no EOS token, and the reward is read at the end of a finished sequence. Set "
                "`tokenizer.eos_token` to the token that ends a text or a turn in this model's vocabulary."
            )
        if "strftime_now" in str(tokenizer.chat_template or ""):
            warnings.warn(
                "The tokenizer's chat template writes today's date into the conversation, so the same chat gets "
                "another score on another day. Put a fixed date into `tokenizer.chat_template` before training.",
                stacklevel=3,
            )
        added = tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
            special.discard(tokenizer.unk_token_id)  # stands for a word of the response
        # Plain tuples: they pickle the same way every time, which is what caches of `datasets.map` are found by.
        object.__setattr__(self, "_special_ids", tuple(sorted(special)))
        object.__setattr__(self, "_ends", tuple(sorted(str(token) for token in added.values() if str(token).strip())))

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: "GRMConfig") -> "Encoder":
        """The encoder a reward model was trained with: the policies frozen in its configuration."""
        return cls(tokenizer, config.max_sequence_length, config.overlength, config.bos_policy)

    def encode(
        self,
        prompt: str | list[dict],
        response: str | dict | list[dict],
        tools: str | list | None = None,
        **template_kwargs: Any,
    ) -> Encoded:
        """
        Encodes a response to a prompt.

        Args:
            prompt (`str` or `list[dict]`):
                Text, or the messages of a conversation.
            response (`str`, `dict` or `list[dict]`):
                Text, which after a list of messages is the assistant's answer, or the message or messages that follow
                the prompt. If there are several, all but the last (which must be the assistant's) count as prompt.
            tools (`list` or `str`, *optional*):
                Tools for the chat template: a list, or the same as JSON.
            **template_kwargs:
                Further arguments of the chat template.

        Raises:
            `ValueError`: for an empty response, one the template drops, malformed messages or wrong roles;
                [`OverlengthError`] for too many tokens where these are not to be cut.
        """
        if isinstance(prompt, str) and isinstance(response, str):
            if not response.strip():
                raise ValueError("the response has no text. Remove the row, or give the response.")
            text, eos = prompt + response, str(self.tokenizer.eos_token)
            ids, start = self._tokenize(text if text.endswith(eos) else text + eos, len(prompt), special_tokens=True)
        else:
            ids, start = self._encode_messages(_conversation(prompt, response), _tools(tools), template_kwargs)
        # Templates may write a line break or two behind the terminator: a handful of blank tokens is no response.
        words = list(islice((index for index in ids[start:] if index not in self._special_ids), 8))
        if len(words) < 8 and not str(self.tokenizer.decode(words)).strip():
            raise ValueError(
                "nothing of the response is left after rendering and tokenising it. Check what the chat template and "
                "the tokenizer do to it, or remove the row."
            )
        return self.fit(ids, start)

    def encode_chat(
        self, chat: str | list[dict] | dict, tools: str | list | None = None, **template_kwargs: Any
    ) -> Encoded:
        """
        Encodes something to be scored: messages that end with the assistant's, a plain text (all of it counts as
        response), or a row: `{"prompt", "response"}`, `{"prompt", "completion"}` or `{"messages"}`, with `tools` and
        `chat_template_kwargs` if it has them. Errors as in [`~Encoder.encode`].
        """
        if isinstance(chat, dict):
            tools = tools or chat.get("tools")
            template_kwargs = {**_template_kwargs(chat), **template_kwargs}
            response = chat.get("response", chat.get("completion"))
            if chat.get("messages") is not None:
                chat = chat["messages"]
            elif chat.get("prompt") is None or response is None:
                raise ValueError(
                    f"a row with keys {sorted(chat)} cannot be scored: it needs `prompt` and `response` (or "
                    "`completion`), or `messages`."
                )
            else:
                return self.encode(chat["prompt"], response, tools, **template_kwargs)
        if isinstance(chat, str):
            return self.encode("", chat)
        return self.encode([], chat, tools, **template_kwargs)

    def fit(self, ids: list[int], start: int) -> Encoded:
        """Applies `max_length` to a sequence. The end stays, and with it the terminator; so does a leading BOS."""
        if self.max_length is None or len(ids) <= self.max_length:
            return Encoded(ids, start)
        if self.overlength != "truncate_left":
            raise OverlengthError(
                f"the sequence has {len(ids)} tokens, more than max_length={self.max_length}. Raise `max_length`, or "
                "choose overlength='truncate_left' (cuts the beginning) or 'drop' (leaves the pair out of a dataset)."
            )
        head, cut = min(self._leading_bos(ids), self.max_length - 1), len(ids) - self.max_length
        return Encoded(ids[:head] + ids[head + cut :], max(start - cut, head), cut, response_cut=head + cut > start)

    def _encode_messages(
        self, messages: list[dict], tools: list | None, template_kwargs: dict
    ) -> tuple[list[int], int]:
        render = partial(self._render, tools=tools, template_kwargs=template_kwargs)
        *prompt, final = messages
        text = render(messages)
        before = render(prompt, add_generation_prompt=True)
        # Some templates write earlier turns, or the opening of the assistant's, differently once an answer follows,
        # and some know no generation prompt. Then the response begins where another answer would change the text.
        if not text.startswith(before) or before == render(prompt):
            content = [{"type": "text", "text": _PROBE}] if isinstance(final.get("content"), list) else _PROBE
            before = os.path.commonprefix([text, render([*prompt, {"role": "assistant", "content": content}])])

        end, own = text.rstrip(), _text(final).rstrip()
        # The end of turn is the template's, not a token that the response itself happens to end with.
        quoted = own.endswith(self._ends) and end.endswith(own)
        if quoted or not end.endswith(self._ends):
            text += str(self.tokenizer.eos_token)
        return self._tokenize(text, len(before), special_tokens=self.bos == "double")

    def _render(
        self, messages: list[dict], tools: list | None, template_kwargs: dict, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        tokenizer: Any = self.tokenizer
        if tokenizer.chat_template is None and "chat_template" not in template_kwargs:
            raise ValueError(
                "these are messages, but the tokenizer has no chat template. Set `tokenizer.chat_template`, use the "
                "tokenizer of an instruction-tuned model, or give plain text."
            )
        try:
            return tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _tokenize(self, text: str, boundary: int, special_tokens: bool) -> tuple[list[int], int]:
        """Token ids of a text, and the index of the first token that reaches beyond the character `boundary`."""
        tokenizer: Any = self.tokenizer
        call = partial(tokenizer, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        encoding = call(text, return_offsets_mapping=tokenizer.is_fast)
        ids = list(encoding["input_ids"])
        if tokenizer.is_fast:
            start = next((i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > boundary), len(ids))
        else:
            start = len(os.path.commonprefix([ids, list(call(text[:boundary])["input_ids"])]))

        # What the text already says, a tokenizer may add once more.
        if ids[-2:] == [tokenizer.eos_token_id] * 2:
            ids.pop()
        extra = max(0, self._leading_bos(ids) - 1) if special_tokens and self.bos == "single" else 0
        ids = ids[extra:]
        return ids, max(start - extra, self._leading_bos(ids))

    def _leading_bos(self, ids: list[int]) -> int:
        return next((i for i, index in enumerate(ids) if index != self.tokenizer.bos_token_id), len(ids))


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
            f"no {' and no '.join(f'`{field}`' for field in missing)}; found {_found(row)}. A preference pair has "
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
    raise ValueError(f"`{field}` is {_describe(value)}; it must be a string or a list of messages.")


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
        tools, template_kwargs = row.get("tools"), _template_kwargs(row)

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
    if not isinstance(ids, list) or not ids or not all(_is_int(i) and 0 <= i < vocabulary for i in ids):
        raise ValueError(
            f"found {_describe(ids)}; it must be a non-empty list of token ids from 0 to {vocabulary - 1}."
        )
    if start is None:
        if starts_required:
            raise ValueError(
                f"there is no `{side}_start`, so the tokens that the text loss needs are unknown. Add the columns "
                "`chosen_start` and `rejected_start` (index of the first response token), or give the texts instead."
            )
        start = 0
    if not _is_int(start) or not 0 <= start < len(ids):
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


def _conversation(prompt: Any, response: Any) -> list[dict]:
    """Prompt and response as one checked list of messages; the last one is the response."""
    if isinstance(response, (str, dict)):
        response = [{"role": "assistant", "content": response} if isinstance(response, str) else response]
    if not isinstance(prompt, list) or not isinstance(response, list):
        raise ValueError(
            f"the prompt is {_describe(prompt)} and the response is {_describe(response)}. Give two strings, or a list"
            " of messages and then a string, a message or a list of messages."
        )
    if not response:
        raise ValueError("the response holds no message. Remove the row, or give the assistant's message.")
    messages = [_message(i, message) for i, message in enumerate([*prompt, *response])]
    final = messages[-1]
    if final["role"] != "assistant":
        raise ValueError(
            f"the last message has role {final['role']!r}. A response is a message of the role 'assistant': rename "
            "the role, or remove the messages behind the answer."
        )
    if prompt and messages[len(prompt)]["role"] != "assistant":
        raise ValueError(
            f"its first message has role {messages[len(prompt)]['role']!r}, though there is a prompt. If the messages "
            "repeat the prompt, remove the prompt (the column `prompt`)."
        )
    if not _text(final).strip() and not final.get("tool_calls"):
        raise ValueError("the response has no text and no tool calls. Remove the row, or give the response.")
    if len(messages) == 1:
        raise ValueError("there is no message before the response. Give the prompt that it answers.")
    if messages[-2]["role"] == "assistant":
        raise ValueError(
            "two turns of the assistant follow each other, so the prompt ends in an answer. Join the two messages, or "
            "end the prompt with the user's turn."
        )
    return messages


def _message(index: int, message: Any) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        found = _found(message) if isinstance(message, dict) else _describe(message)
        raise ValueError(
            f'message {index} has no role: found {found}. A message is {{"role": ..., "content": ...}}; rename the '
            'keys of other conventions ("from", "value").'
        )
    # Arrow fills in the keys that other rows have, and templates ask whether a key is there, not whether it is null.
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)
    if not texts and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"message {index} ({message['role']}) has content that is not text: found {_describe(content)}. Give a "
            "string or a list of text parts."
        )
    return message


def _text(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _tools(tools: str | list | None) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is not JSON ({error}). Give a list of tools, or that list as JSON.") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` is {_describe(tools)}. Give a list of tools, or that list as JSON.")
    return tools or None  # with an empty list some templates announce tools all the same


def _template_kwargs(row: dict) -> dict:
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise ValueError(f"`chat_template_kwargs` is {_describe(given)}; it must be a dictionary.")
    return {key: value for key, value in given.items() if value is not None}  # Arrow fills in other rows' keys


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a finite number. Correct it, or remove the row.")
    return float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _found(row: dict) -> str:
    return ", ".join(f"`{key}`" if value is not None else f"`{key}` (null)" for key, value in row.items()) or "nothing"


def _describe(value: Any) -> str:
    if value is None or value == []:
        return "empty"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
