"""What a visitor sends, one value at a time, with a sentence for a mistake."""

import re


NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}


def called(value) -> str:
    """A value's type, as a visitor calls it."""
    return "null" if value is None else NAMES.get(type(value), type(value).__name__)


def check_text(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {called(value)}; text is required.")
    if half := re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} has half a character (U+{ord(half[0]):04X}), which no text has. Write it anew.")
    return value
