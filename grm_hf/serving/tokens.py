"""Whether an engine that renders and tokenises by itself gets the token ids of training."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..chats import as_messages
from ..encoding import Encoder
from ..scoring.golden import CHATS


if TYPE_CHECKING:
    from ..configuration_grm import GRMConfig


def inexact_forms(tokenizer: Any, config: "GRMConfig") -> list[str]:
    """Which of `"messages"`, rendered by the chat template alone, and `"text"`, a rendered chat without its first BOS,
    get other ids than the encoder of the reward model gives. The chats are those of the golden rows."""
    if not tokenizer.chat_template:
        return ["messages"]
    encoder = replace(Encoder.from_config(tokenizer, config), max_length=None)
    wrong = set()
    for chat in CHATS:
        messages = as_messages(chat)
        text = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(tokenizer.bos_token or "")
        made = {"messages": tokenizer.apply_chat_template(messages, return_dict=True), "text": tokenizer(text)}
        expected = list(encoder.encode_chat(messages).ids)
        wrong |= {form for form, encoding in made.items() if list(encoding["input_ids"]) != expected}
    return sorted(wrong)
