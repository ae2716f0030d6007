"""A prompt and a response as token ids. One `Encoder` renders and tokenises for training, evaluation, scoring and
serving, so a text has the same ids everywhere.

A sequence is `(BOS) prompt + response + terminator`. The reward is read at the terminator: the end of turn that the
chat template writes, or EOS where it writes none. `start` is the index of the first response token: the text loss
covers `ids[start:]`, which is the assistant's final turn and its terminator.
"""

import json
import os.path
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    from .configuration_grm import GRMConfig


# A private-use character: no response contains it, so two renderings that differ by it part exactly there.
_PROBE = "\uf8ff"
# Keys of a message for the thinking before an answer; `<think>` blocks in the content are the other form.
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")


class OverlengthError(ValueError):
    """A sequence is longer than `max_length`, and the policy forbids cutting it."""


@dataclass(frozen=True)
class Encoded:
    """
    One sequence as token ids.

    Attributes:
        ids (`list[int]`): The whole sequence.
        start (`int`): Index of the first response token, between 0 and `len(ids) - 1`. A token that holds the end of
            the prompt and the beginning of the response counts as response.
        cut (`int`): Number of tokens that truncation removed.
        response_cut (`bool`): Whether some of them belonged to the response (then nothing is left of the prompt).
        unread (`tuple[str, ...]`): The parts of this conversation that the chat template omits by design:
            `"thinking"` (`<think>` blocks, `reasoning_content`), `"tools"`.
    """

    ids: list[int]
    start: int
    cut: int = 0
    response_cut: bool = False
    unread: tuple[str, ...] = ()

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
            Largest number of tokens of a sequence, at least 2. `None`: no limit.
        overlength (`str`, *optional*, defaults to `"truncate_left"`):
            What happens to a longer one: `"truncate_left"` (a leading BOS and the end of the sequence stay), `"drop"`
            (`prepare_pairs` leaves the pair out and counts it) or `"error"`.
        bos (`str`, *optional*, defaults to `"single"`):
            `"single"`: at most one BOS. `"double"`: as in the code of the GRM authors, a conversation is rendered to
            text and tokenised with special tokens. This gives two BOS if the template writes one.

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
        if self.max_length is not None and (not is_int(self.max_length) or self.max_length < 2):
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
        # Plain tuples: they always pickle alike, and `datasets.map` finds its cache by the pickle.
        object.__setattr__(self, "_special_ids", tuple(sorted(special)))
        object.__setattr__(self, "_ends", tuple(sorted(str(token) for token in added.values() if str(token).strip())))

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: "GRMConfig") -> "Encoder":
        """The encoder that a reward model was trained with, from the policies in its configuration."""
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
                Text (after a list of messages: the assistant's answer), or the message or messages that follow the
                prompt. The last message must be the assistant's; those before it count as prompt.
            tools (`list` or `str`, *optional*):
                Tools for the chat template: a list, or a list as JSON.
            **template_kwargs:
                Further arguments of the chat template.

        Raises:
            `ValueError`: for an empty response, a message whose text the template drops, malformed messages or wrong
                roles; [`OverlengthError`] for too many tokens that may not be cut.
        """
        unread: tuple[str, ...] = ()
        if isinstance(prompt, str) and isinstance(response, str):
            if not response.strip():
                raise ValueError("the response has no text. Remove the row, or give the response.")
            text, eos = prompt + response, str(self.tokenizer.eos_token)
            ids, start = self.tokenize(text if text.endswith(eos) else text + eos, len(prompt), special_tokens=True)
        else:
            messages, tools = _conversation(prompt, response), tools_of(tools)
            ids, start, unread = self.encode_messages(messages, tools, without_nulls(template_kwargs))
        # Templates may write a line break or two behind the terminator: a handful of blank tokens is no response.
        words = list(islice((index for index in ids[start:] if index not in self._special_ids), 8))
        if len(words) < 8 and not str(self.tokenizer.decode(words)).strip():
            raise ValueError(
                "nothing of the response is left after rendering and tokenising it. Check what the chat template and "
                "the tokenizer do to it, or remove the row."
            )
        return replace(self.fit(ids, start), unread=unread)

    def encode_chat(
        self, chat: str | list[dict] | dict, tools: str | list | None = None, **template_kwargs: Any
    ) -> Encoded:
        """
        Encodes a chat to score: messages that end with the assistant's, a plain text (all of it counts as response),
        or a row (`{"prompt", "response"}`, `{"prompt", "completion"}` or `{"messages"}`), which may have `tools` and
        `chat_template_kwargs`. Errors as in [`~Encoder.encode`].
        """
        if isinstance(chat, dict):
            tools = tools or chat.get("tools")
            template_kwargs = {**template_kwargs_of(chat), **template_kwargs}
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

    def encode_messages(
        self, messages: list[dict], tools: list | None, template_kwargs: dict
    ) -> tuple[list[int], int, tuple[str, ...]]:
        """Ids of a conversation, index of the first token of its last message, and the parts that the template
        omits."""
        render = partial(self.render, tools=tools, template_kwargs=template_kwargs)
        messages = self._in_its_form(messages, render)
        *prompt, final = messages
        text = render(messages)
        unread = _unread(text, messages, tools, render)
        before = render(prompt, add_generation_prompt=True)
        # Some templates write earlier turns, or the opening of the assistant's, differently once an answer follows,
        # and some know no generation prompt. Then the response begins where another answer would change the text.
        if not text.startswith(before) or before == render(prompt):
            before = os.path.commonprefix([text, render([*prompt, _probing({"role": "assistant"}, final)])])

        end, own = text.rstrip(), text_of(final).rstrip()
        # The end of turn is the template's, not a token that the response itself happens to end with.
        quoted = own.endswith(self._ends) and end.endswith(own)
        if quoted or not end.endswith(self._ends):
            text += str(self.tokenizer.eos_token)
        return *self.tokenize(text, len(before), special_tokens=self.bos == "double"), unread

    def encode_open(self, messages: list[dict], tools: str | list | None = None, **template_kwargs: Any) -> Encoded:
        """
        A conversation up to the end of its last message's text, whoever says that: for the probability of this text,
        not for a reward. `start` is its first token; no end of turn follows.

        Raises:
            `ValueError`: the text is empty, or the chat template does not write it as it is.
        """
        render = partial(self.render, tools=tools_of(tools), template_kwargs=without_nulls(template_kwargs))
        messages = self._in_its_form([_message(i, message) for i, message in enumerate(messages)], render)
        final = messages[-1]
        own, text = text_of(final), render(messages)
        begin = len(os.path.commonprefix([text, render([*messages[:-1], _probing(final, final)])]))
        if not own.strip() or not text.startswith(own, begin):
            raise ValueError(
                f"the chat template does not write the text {describe(own)} of the role {final['role']!r} as it is. "
                "Give a text without white space around it, or a template that writes it."
            )
        special = self.bos == "double"
        ids, start = self.tokenize(text[: begin + len(own)], begin, special_tokens=special)
        if special and ids[-1] == self.tokenizer.eos_token_id:  # put there by the tokenizer, not said
            ids.pop()
        return self.fit(ids, start)

    def encode_prompt(
        self, messages: list[dict], tools: str | list | None = None, **template_kwargs: Any
    ) -> list[int]:
        """Ids of a conversation and the opening of the assistant's next turn, for the LM head to go on."""
        kwargs = without_nulls(template_kwargs)
        text = self.render(messages, tools_of(tools), kwargs, add_generation_prompt=True)
        ids, _ = self.tokenize(text, len(text), special_tokens=self.bos == "double")
        return self.fit(ids, len(ids) - 1).ids

    def _in_its_form(self, messages: list[dict], render: Callable) -> list[dict]:
        """The same messages. If the template reads strings only, lists of text parts are joined to strings: it would
        write a Python list into the prompt, or nothing."""
        in_parts = [isinstance(message.get("content"), list) for message in messages]
        if not any(in_parts):
            return messages
        strings = [
            {**message, "content": text_of(message)} if parts else message
            for message, parts in zip(messages, in_parts, strict=True)
        ]
        probed = _rendered([_probing(m, m) if p else m for m, p in zip(messages, in_parts, strict=True)], render)
        # In quotes: the list itself, as JSON.
        reads_parts = probed is not None and probed.count(_PROBE) >= sum(in_parts) and f'"{_PROBE}"' not in probed
        return messages if reads_parts else strings

    def render(
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

    def tokenize(self, text: str, boundary: int, special_tokens: bool) -> tuple[list[int], int]:
        """Token ids of a text, and the index of the first token that reaches beyond the character `boundary`."""
        tokenizer: Any = self.tokenizer
        require_whole(text)
        call = partial(tokenizer, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        encoding = call(text, return_offsets_mapping=tokenizer.is_fast)
        ids = list(encoding["input_ids"])
        if tokenizer.is_fast:
            start = next((i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > boundary), len(ids))
        else:
            start = len(os.path.commonprefix([ids, list(call(text[:boundary])["input_ids"])]))

        # A tokenizer may add a special token that the text already has.
        if ids[-2:] == [tokenizer.eos_token_id] * 2:
            ids.pop()
        extra = max(0, self._leading_bos(ids) - 1) if special_tokens and self.bos == "single" else 0
        ids = ids[extra:]
        return ids, max(start - extra, self._leading_bos(ids))

    def _leading_bos(self, ids: list[int]) -> int:
        return next((i for i, index in enumerate(ids) if index != self.tokenizer.bos_token_id), len(ids))


def _conversation(prompt: Any, response: Any) -> list[dict]:
    """Prompt and response as one checked list of messages; the last one is the response."""
    if isinstance(response, (str, dict)):
        response = [{"role": "assistant", "content": response} if isinstance(response, str) else response]
    if not isinstance(prompt, list) or not isinstance(response, list):
        raise ValueError(
            f"the prompt is {describe(prompt)} and the response is {describe(response)}. Give two strings, or a list"
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
    if not text_of(final).strip() and not final.get("tool_calls"):
        raise ValueError("the response has no text and no tool calls. Remove the row, or give the response.")
    if len(messages) == 1:
        raise ValueError("there is no message before the response. Give the prompt that it answers.")
    if messages[-2]["role"] == "assistant":
        raise ValueError(
            "two turns of the assistant follow each other, so the prompt ends in an answer. Join the two messages, or "
            "end the prompt with the user's turn."
        )
    return messages


def _probing(message: dict, like: dict, text: str = _PROBE) -> dict:
    """`message` with the content `text`, as a string or in parts as `like` has it."""
    parts = isinstance(like.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


def _unread(text: str, messages: list[dict], tools: list | None, render: Callable) -> tuple[str, ...]:
    """The parts of the messages that the rendered conversation omits by design; `ValueError` if it drops what was
    said."""
    written, thinking = _letters(text), False
    for i, message in enumerate(messages):
        for own in _texts(message):
            if not _stands_in(own, written):
                if message["role"] != "assistant" or not _stands_in(_without_thinking(own), written):
                    raise _dropped(i, message)
                thinking = True
        thinking = thinking or any(not _stands_in(str(message.get(key, "")), written) for key in THINKING_KEYS)
        if message.get("tool_calls"):
            without = {key: value for key, value in message.items() if key != "tool_calls"}
            if _rendered([*messages[:i], without, *messages[i + 1 :]], render) == text:
                raise ValueError(
                    f"message {i} ({message['role']}) has tool calls, and the chat template leaves them out. Use a "
                    "template that writes tool calls, or remove the row."
                )
    # A short text may be there by chance: a mark at the end of a message shows whether the template reads it.
    marks = [chr(ord(_PROBE) - 1 - i % 6000) if text_of(message).strip() else "" for i, message in enumerate(messages)]
    marked = [_probing(m, m, text_of(m) + mark) if mark else m for m, mark in zip(messages, marks, strict=True)]
    probed = _rendered(marked, render)
    for i, mark in enumerate(marks):
        if probed is not None and mark not in probed:
            raise _dropped(i, messages[i])
    unread = ("thinking",) if thinking else ()
    return (*unread, "tools") if tools and _rendered(messages, render, tools=None) == text else unread


def _rendered(messages: list[dict], render: Callable, **kwargs) -> str | None:
    """A probing conversation as text; `None` if the template refuses it."""
    try:
        return render(messages, **kwargs)
    except ValueError:
        return None


def _dropped(index: int, message: dict) -> ValueError:
    return ValueError(
        f"message {index} ({message['role']}) has the text {describe(text_of(message))}, and the chat template leaves "
        "it out or changes it, so the model would not see what was written. Use a template that writes the messages "
        "of this role as they are, change the message, or remove the row."
    )


def _without_thinking(text: str) -> str:
    """The text outside of `<think>` blocks. A template may open the first block by itself."""
    *blocks, answer = text.split("</think>")
    return "".join(block.split("<think>")[0] for block in blocks if "<think>" in block) + answer


def _letters(text: str) -> str:
    """Without white space, which templates strip and add."""
    return "".join(text.split())


def _stands_in(text: str, written: str) -> bool:
    """Whether a text was written out, as it is or as a JSON string; `written` is without white space."""
    if _letters(text) in written:
        return True
    return any(_letters(json.dumps(text, ensure_ascii=escape)[1:-1]) in written for escape in (False, True))


def _message(index: int, message: Any) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        given = keys_found(message) if isinstance(message, dict) else describe(message)
        raise ValueError(
            f'message {index} has no role: found {given}. A message is {{"role": ..., "content": ...}}; rename the '
            'keys of other conventions ("from", "value").'
        )
    message = without_nulls(message)
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)
    if not texts and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"message {index} ({message['role']}) has content that is not text: found {describe(content)}. Give a "
            "string or a list of text parts."
        )
    return message


def _texts(message: dict) -> list[str]:
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def text_of(message: dict) -> str:
    """The text of a message, whose content is a string, a list of text parts, or nothing."""
    return "".join(_texts(message))


def tools_of(tools: str | list | None) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is not JSON ({error}). Give a list of tools, or that list as JSON.") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` is {describe(tools)}. Give a list of tools, or that list as JSON.")
    return without_nulls(tools) or None  # with an empty list some templates announce tools all the same


def template_kwargs_of(row: dict) -> dict:
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise ValueError(f"`chat_template_kwargs` is {describe(given)}; it must be a dictionary.")
    if taken := sorted(given.keys() & {"self", "prompt", "response", "chat", "tools"}):
        raise ValueError(f"`chat_template_kwargs` has {taken[0]!r}, which belongs beside it in the row.")
    return without_nulls(given)


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is null, at any depth. Arrow gives every row the keys of all rows, and
    templates test whether a key is there."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def require_whole(text: str) -> None:
    """Refuse a text with half of a character, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"the text has {half!r}, half of a character (a lone surrogate). Read it as UTF-8.") from None


def require_embedded(ids: Sequence[int], embeddings: int | None, positions: int | None, tokenizer: Any) -> None:
    """Refuse token ids without an embedding. `embeddings` and `positions` are the numbers of embeddings that the model
    has. `None`: not known, or positions are not embedded."""
    if embeddings is not None and (largest := max(ids)) >= embeddings:
        raise ValueError(
            f"it has the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's embedding "
            f"has {embeddings} rows. Use the model's own tokenizer, or give the model a row for each token: "
            "`model.resize_token_embeddings(len(tokenizer))`."
        )
    if positions is not None and len(ids) > positions:
        raise ValueError(
            f"it has {len(ids)} tokens, and the model has an embedding for {positions} positions. Set `max_length` "
            f"(`max_sequence_length` in the configuration of a reward model) to {positions} or less."
        )


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def left_out(what: str) -> str:
    """How everybody says what [`Encoded`]`.unread` names."""
    return f"whose {what} the chat template leaves out"


def keys_found(row: dict) -> str:
    return ", ".join(f"`{key}`" if value is not None else f"`{key}` (null)" for key, value in row.items()) or "nothing"


def describe(value: Any) -> str:
    if value is None or value == []:
        return "empty"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
