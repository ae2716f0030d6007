"""Texts of policies as the token ids that the reward model was trained on. This needs no weights of the reward model,
so a client and a server use it too.
"""

import copy
from dataclasses import dataclass, field, replace
from itertools import dropwhile, takewhile

from ..chats import to_score
from ..encoding import Encoded, Encoder, OverlengthError, require_whole, text_of, tools_of, without_nulls


@dataclass(frozen=True)
class Rollout:
    """
    A prompt and the policy's answer: both as messages, or both as text.

    Attributes:
        prompt (`str` or `list[dict]`): The prompt. A string is text, as in training, not a user's message.
        completion (`str` or `list[dict]`): The answer, without special tokens. It may be empty.
        tools, template_kwargs: For the chat template.
    """

    prompt: str | list[dict]
    completion: str | list[dict]
    tools: list | str | None = None
    template_kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """
    Prompt and answer of a policy, already rendered by the chat template, with special tokens.

    Attributes:
        ids (`list[int]`): Token ids of the reward model's vocabulary, with or without end of turn, without padding.
    """

    ids: list[int]


class RolloutEncoder:
    """
    Encodes [`Rollout`], [`Rendered`] and chats. Answers without text are encoded as well, because a learning policy
    writes some. The end of turn is always where the reward model was trained to read, even if the policy did not get
    that far.

    Args:
        encoder ([`Encoder`]):
            The reward model's.

    Attributes:
        opening: The text that the chat template writes in front of an answer; empty if there is none.
    """

    def __init__(self, encoder: Encoder):
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.opening, self._chat_bos, self._chat_end = "", [], []
        if self.tokenizer.chat_template:
            user = [{"role": "user", "content": "a"}]
            with_opening, without = (encoder.render(user, None, {}, add_generation_prompt=on) for on in (True, False))
            if with_opening.startswith(without):
                self.opening = with_opening.removeprefix(without).strip()
            # The common end of two conversations with different answers.
            one, other = (encoder.encode(user, answer).ids for answer in ("a", "b"))
            same = next(i for i, (x, y) in enumerate(zip(one[::-1], other[::-1], strict=False)) if x != y)
            self._chat_bos, self._chat_end = list(takewhile(self._is_bos, one)), one[len(one) - same :]

    def encode(self, chat) -> Encoded:
        """Token ids of a rollout, of rendered ids, or of a chat as [`GRMScorer.score`] takes it."""
        if isinstance(chat, Rendered):
            return self.encoder.fit(self._ended(chat.ids), 0)
        if not isinstance(chat, Rollout):
            return self.encoder.encode_chat(to_score(chat, bool(self.tokenizer.chat_template)))
        try:
            return self.encoder.encode(chat.prompt, chat.completion, chat.tools, **chat.template_kwargs)
        except OverlengthError:
            raise
        except ValueError:
            if not self._is_blank(chat.completion):
                raise
        encoder, prompt, kwargs = self.encoder, chat.prompt, without_nulls(chat.template_kwargs)
        # Before a last turn without text the policy may have called tools.
        turns = [{"content": chat.completion}] if isinstance(chat.completion, str) else chat.completion
        *called, last = [{"role": "assistant", **message} for message in turns]
        said = "a" if isinstance(chat.completion, str) else [*called, {**last, "content": "a"}]
        encoder.encode(prompt, said, chat.tools, **kwargs)  # refuses whatever else is wrong
        if isinstance(prompt, str):
            text = f"{prompt}{chat.completion}{self.tokenizer.eos_token}"
            return encoder.fit(*encoder.tokenize(text, len(prompt), special_tokens=True))
        messages = without_nulls([*prompt, *called, {**last, "content": text_of(last)}])
        ids, start, unread = encoder.encode_messages(messages, tools_of(chat.tools), kwargs)
        return replace(encoder.fit(ids, start), unread=unread)

    def with_max_length(self, max_length: int) -> "RolloutEncoder":
        """The same encoder with another limit."""
        other = copy.copy(self)
        other.encoder = replace(self.encoder, max_length=max_length)
        return other

    def rendered(self, text: str, special_tokens: bool = False) -> Rendered:
        """A text with its special tokens in it; with `special_tokens` it gets as many BOS as in training."""
        if special_tokens:
            ids, _ = self.encoder.tokenize(text, 0, special_tokens=True)
            if self._is_chat(text):  # the tokenizer may add no BOS where the chat template wrote one
                ids = [*self._chat_bos, *dropwhile(self._is_bos, ids)]
            return Rendered(ids)
        require_whole(text)
        return Rendered(list(self.tokenizer(text, add_special_tokens=False).input_ids))

    def _is_bos(self, index: int) -> bool:
        return index == self.tokenizer.bos_token_id

    def _is_chat(self, text: str) -> bool:
        """Whether the chat template wrote a text."""
        return bool(self._chat_end) and self.opening in text

    def _is_blank(self, completion) -> bool:
        """Whether an answer holds no text: nothing, white space, or nothing but special tokens."""
        if not isinstance(completion, str):
            message = completion[-1] if isinstance(completion, list) and completion else None
            if not isinstance(message, dict) or message.get("tool_calls"):
                return False
            try:
                completion = text_of(message)
            except (KeyError, TypeError):
                return False  # an image or the like
        require_whole(completion)
        ids = self.tokenizer(completion, add_special_tokens=False).input_ids
        return not str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` with the whole ending that the reward model expects behind an answer; they may hold its beginning
        already."""
        eos = self.tokenizer.eos_token_id
        end = self._chat_end if self._is_chat(str(self.tokenizer.decode(ids, skip_special_tokens=False))) else [eos]
        there = next(n for n in range(len(end), -1, -1) if n == 0 or ids[-n:] == end[:n])
        if there == 0 and ids[-1:] == [eos]:
            ids = ids[:-1]  # the policy ends with EOS, the reward model's turns with something else
        return [*ids, *end[there:]]
