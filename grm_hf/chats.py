"""The one place that says what a chat may look like and what a string prompt means. docs/scoring.md has the table.

In a request for the score of an answer, a string is the user's question and goes through the chat template. In a data
set it is text, and the response follows it directly, because TRL trains on it that way.
"""

from collections.abc import Iterable
from typing import Any


def user_turn(prompt: str | list[dict]) -> list[dict]:
    """A prompt as messages: a string is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_messages(chat: list[dict] | dict) -> list[dict]:
    """A chat as one list of messages that ends with the answer. Any form but plain text."""
    if isinstance(chat, list):
        return chat
    if chat.get("messages") is not None:
        return chat["messages"]
    answer = chat["response"]
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return [*user_turn(chat["prompt"]), *answer]


def to_score(chat: Any, has_template: bool) -> Any:
    """
    Turns a chat to score into the form that [`Encoder.encode_chat`] takes.

    Args:
        chat (`list[dict]`, `str` or `dict`):
            Messages, plain text, or a row with `messages`, with `prompt` and `response` (or `completion`), or with
            `text`. A null value counts as a missing key.
        has_template (`bool`):
            Whether the tokenizer has a chat template. If so, a prompt that is a string is one turn of the user.

    Raises:
        `ValueError`: it is one message instead of a list of them, holds two answers, or is no chat at all.
    """
    if isinstance(chat, dict):
        row = {key: value for key, value in chat.items() if value is not None}
        if "role" in row and not {"messages", "prompt", "text"} & set(row):
            raise ValueError("this is a single message. A chat is a list of messages; put them into one more list.")
        if "messages" in row and (second := {"response", "completion"} & set(row)):
            raise ValueError(f"the row has `messages` and `{second.pop()}`. One of them is meant; remove the other.")
        if "text" in row and not {"messages", "prompt"} & set(row):
            return row["text"]
        if has_template and isinstance(row.get("prompt"), str) and "messages" not in row:
            row["prompt"] = user_turn(row["prompt"])
        return row
    if not isinstance(chat, (str, list)):
        raise ValueError(
            f"{type(chat).__name__} is no chat. Give a list of messages, a row with `prompt` and `response`, or text."
        )
    return chat


def rows_of(chats: Any, one: str = "chat") -> Iterable:
    """
    Several chats (or rows) as an iterable: a list or any other iterable, or the rows of a pandas DataFrame or an Arrow
    table. A single chat is refused, because its elements are characters or keys.
    """
    table: Any = chats
    if hasattr(table, "to_pylist"):  # pyarrow
        return table.to_pylist()
    if hasattr(table, "itertuples"):  # pandas, whose word for null is NaN
        names = [str(name) for name in table.columns]
        return [
            {name: _listed(value) for name, value in zip(names, row, strict=True) if not _is_null(value)}
            for row in table.itertuples(index=False, name=None)
        ]
    if isinstance(chats, (set, frozenset)):
        raise ValueError(f"this takes {one}s in an order, and a set has none. Give a list.")
    if isinstance(chats, (str, bytes, dict)) or not isinstance(chats, Iterable):
        what = f"one {one}" if isinstance(chats, (str, bytes)) else f"a {type(chats).__name__}"
        splits = " Choose a split of it." if type(chats).__name__.endswith("DatasetDict") else ""
        raise ValueError(f"this takes {one}s and got {what}. Put a single {one} into a list: [{one}].{splits}")
    return chats


def _listed(value: Any) -> Any:
    """A list of messages in a cell, which pandas makes an array of where it reads parquet."""
    return value.tolist() if type(value).__name__ == "ndarray" else value


def _is_null(value: Any) -> bool:
    if isinstance(value, float):
        return value != value
    return value is None or type(value).__name__ in ("NAType", "NaTType")
