"""Whether an engine that renders messages by the chat template alone gets the token ids of training."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..chats import as_messages
from ..encoding import Encoder
from ..scoring.golden import CHATS


if TYPE_CHECKING:
    from ..configuration_grm import GRMConfig


def template_is_exact(tokenizer: Any, config: "GRMConfig") -> bool:
    """Compares `apply_chat_template` with the encoder of the reward model, on the chats of the golden rows. `False`
    without a chat template."""
    if not tokenizer.chat_template:
        return False
    encoder = replace(Encoder.from_config(tokenizer, config), max_length=None)
    for chat in CHATS:
        messages = as_messages(chat)
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        if list(ids) != list(encoder.encode_chat(messages).ids):
            return False
    return True
