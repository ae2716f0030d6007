"""What a visitor sends, one value at a time: a text, a number; a sentence for each mistake."""

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


def check_number(value, name: str, lowest: float, highest: float) -> float:
    if value is None:
        raise ValueError(f"{name} is empty; a number from {lowest} to {highest} is required.")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
        shown = f"“{value[:40]}”" if isinstance(value, str) else value if type(value) is float else called(value)
        shown = value if type(value) is int and abs(value) < 1e9 else shown
        raise ValueError(f"{name} is {shown}; a number from {lowest} to {highest} is required.")
    return value
