"""Reads the input of visitors, with a sentence for every mistake, and writes tables for download.

Conversations: turns that begin with their role at the beginning of a line, or JSON messages.
Tables of pairs: CSV with columns `prompt`, `chosen`, `rejected`, or JSON lines with these keys, text or messages.
"""

import csv
import io
import json
import re

from checks import called, check_text
from encoding import THINKING_KEYS


MAX_ROWS = 200
MAX_BYTES = 2_000_000
MAX_TURNS = 20
MAX_ANSWERS = 32
COLDEST, HOTTEST = 0.1, 10
ROLES = ("system", "user", "assistant")
MORE = ("tool_calls", "name", *THINKING_KEYS)  # that a template may read
ROLE = re.compile(r"^(system|user|assistant):[ \t]*", re.MULTILINE | re.IGNORECASE)
LINE = re.compile(r"\r\n|\r|\n")
SIDES = ("chosen", "rejected")
SCORES = ("chosen_reward", "rejected_reward", "margin", "probability", "cut_tokens")


def check_temperature(value, name: str = "The temperature") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not COLDEST <= value <= HOTTEST:
        shown = f"“{value[:40]}”" if isinstance(value, str) else value if type(value) is float else called(value)
        shown = value if type(value) is int and abs(value) < 1e9 else shown
        raise ValueError(f"{name} is {shown}; a number from {COLDEST} to {HOTTEST} is required.")
    return value


def check_answers(value) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"`answers` is {called(value)}; a list of 2 to {MAX_ANSWERS} texts is required.")
    if not 2 <= len(value) <= MAX_ANSWERS:
        count = "1 answer" if len(value) == 1 else f"{len(value)} answers"
        raise ValueError(f"There {'is' if len(value) == 1 else 'are'} {count}; 2 to {MAX_ANSWERS} are required.")
    return [check_text(answer, f"Answer {number}") for number, answer in enumerate(value, 1)]


def read_json(text: str, name: str):
    def refuse(constant):
        raise ValueError(f"{constant} is no number")

    def named_once(fields):
        found = dict(fields)
        if len(found) < len(fields):
            names = [name for name, _ in fields]
            raise ValueError(f"“{next(n for n in names if names.count(n) > 1)[:40]}” is there twice")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=named_once)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}.") from None


def read_prompt(kind: str, text: str | None) -> str | list[dict]:
    """The prompt as text, or as messages if `kind` is "conversation"."""
    text = check_text("" if text is None else text, "The prompt")
    if not text.strip():
        raise ValueError("The prompt is empty.")
    if kind != "conversation":
        return text
    if text.lstrip().startswith("["):
        return check_prompt(read_json(text, "The conversation begins like JSON and"), "The conversation")
    parts = ROLE.split("\n".join(LINE.split(text)))
    if parts[0].strip():
        raise ValueError(
            "The conversation must begin with a role: “user:”, “assistant:” or “system:” at the beginning of a line. "
            f"It begins with “{parts[0].strip()[:40]}”."
        )
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return check_prompt([{"role": r.lower(), "content": text.strip()} for r, text in turns], "The conversation")


def check_messages(messages, name: str) -> list[dict]:
    """Checks a list of messages: each has a role and a text, in the order of a conversation."""
    if not isinstance(messages, list):
        raise ValueError(f"{name} is {called(messages)}; a list of 1 to {MAX_TURNS} messages is required.")
    if not 1 <= len(messages) <= MAX_TURNS:
        raise ValueError(f"{name} has {len(messages)} messages; 1 to {MAX_TURNS} are required.")
    before = None
    for number, message in enumerate(messages, 1):
        where = f"{name}, turn {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f'{where}: a message is {{"role": ..., "content": ...}}, both text.')
        role = check_text(message["role"], f"{where}: its role")
        if role not in ROLES:
            raise ValueError(f"{where}: its role is “{role[:20]}”; “system”, “user” or “assistant” is required.")
        if not check_text(message["content"], f"{where} ({role})").strip():
            raise ValueError(f"{where} ({role}) is empty.")
        if role == before:
            said = {"system": "system messages", "user": "turns of the user", "assistant": "turns of the assistant"}
            raise ValueError(f"{where}: two {said[role]} follow each other. Join them, or put a turn between.")
        if role == "system" and before:
            raise ValueError(f"{where}: a system message stands at the beginning only.")
        before = role
    keys = ("role", "content", *MORE)
    return [{key: message[key] for key in keys if message.get(key) is not None} for message in messages]


def check_prompt(messages, name: str) -> list[dict]:
    """Checks messages that an answer must follow."""
    messages = check_messages(messages, name)
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"{name} ends with a turn of the role “{messages[-1]['role']}”. It must end with the user's: the answers "
            "follow it."
        )
    return messages


def read_answers(text: str | None) -> list[str]:
    """Answers divided by lines of three or more dashes; without such lines, one answer a line."""
    text = check_text("" if text is None else text, "The list of answers")
    parts = re.split(r"^-{3,}[ \t\r]*$", text, flags=re.MULTILINE)
    answers = [part.strip() for part in (parts if len(parts) > 1 else LINE.split(text))]
    return check_answers([answer for answer in answers if answer])


def read_pairs(text: str | None, upload: bytes | None) -> tuple[list[dict], str]:
    """Rows with `prompt` (text, messages, or none if the sides are whole conversations), `chosen`, `rejected`, and
    further columns as text; and the format, "csv" or "jsonl"."""
    what = "The table" if upload is None else "The file"
    if upload is None:
        upload = check_text(text or "", what).encode()
    if len(upload) > MAX_BYTES:
        raise ValueError(f"{what} is larger than {MAX_BYTES // 1_000_000} MB. Score it with `grm score`.")
    try:
        text = upload.decode("utf-8-sig").strip("\r\n ")  # a tab may be an empty cell
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not text in UTF-8.") from error
    if not text.strip():
        raise ValueError("There is nothing to score yet: paste a table or upload a file.")
    form = "jsonl" if text[0] in "{[" else "csv"
    rows = []
    for row in _json_rows(text) if form == "jsonl" else _csv_rows(text):
        if len(rows) == MAX_ROWS:
            raise ValueError(f"The table has more than {MAX_ROWS} pairs. Score it with `grm score`.")
        rows.append(row)
    if not rows:
        raise ValueError("The table has a first line and no pairs below it.")
    return rows, form


def _csv_rows(text):
    header_line = LINE.split(text, 1)[0].strip()
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader)]
        for name in ("prompt", "chosen", "rejected"):
            if header.count(name) != 1:
                raise ValueError(
                    f"The first line must name the columns, with one called “{name}”. It is: {header_line[:200]}"
                )
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"The first line names the column “{twice[0][:40]}” more than once.")
        _check_names(header, "The first line")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"Line {reader.line_num}"
            if len(cells) != len(header):
                raise ValueError(f"{where} has {len(cells)} cells; the first line has {len(header)}.")
            row = dict(zip(header, cells, strict=True))
            for name in ("prompt", "chosen", "rejected"):
                if not row[name].strip():
                    raise ValueError(f"{where}: “{name}” is empty.")
                if _holds_messages(row[name]):
                    raise ValueError(f"{where}: “{name}” holds messages as JSON, and a cell is text. Give JSON lines.")
            yield row
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} is no CSV: {error}.") from error


def _holds_messages(cell):
    if cell.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        value = read_json(cell, "")
    except ValueError:
        return False
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and "role" in item for item in items)


def _check_names(names, where):
    """A table with all names of `SCORES` comes from this page and is scored anew. A table with some of them is
    refused."""
    taken = [name for name in SCORES if name in names]
    if taken and len(taken) < len(SCORES):
        raise ValueError(
            f"{where} has {', '.join(f'“{name}”' for name in taken)}, which this page writes itself: another name is "
            "required."
        )


def _json_rows(text):
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip():
            continue
        where = f"Line {number}"
        row = read_json(line, where)
        if isinstance(row, list):
            raise ValueError(f"{where} is a list. Each line is one pair, an object without brackets around them all.")
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {called(row)}; an object with “prompt”, “chosen”, “rejected” is required.")
        if missing := [name for name in SIDES if row.get(name) is None]:
            raise ValueError(f"{where} needs “prompt”, “chosen” and “rejected”; “{missing[0]}” is not there.")
        if unread := [name for name in ("tools", "chat_template_kwargs") if row.get(name)]:
            raise ValueError(f"{where} has “{unread[0]}”, which this page does not read. Score it with `grm score`.")
        check_text(json.dumps(row, ensure_ascii=False), where)
        _check_names(row, where)
        sides = [row[name] for name in SIDES]
        whole = all(isinstance(side, list) for side in sides) and not row.get("prompt")
        if not whole and row.get("prompt") is None:
            raise ValueError(f"{where} needs a “prompt”, unless both answers are whole conversations.")
        if not whole and (isinstance(row.get("prompt"), str) and not all(isinstance(side, str) for side in sides)):
            kinds = ", ".join(f"“{n}” is {called(s)}" for n, s in zip(SIDES, sides, strict=True))
            raise ValueError(f"{where}: “prompt” is text, so both answers must be text: {kinds}.")
        prompt = [] if whole else row.get("prompt")
        if isinstance(prompt, list):
            if not whole:
                prompt = check_prompt(prompt, f"{where}, “prompt”")
            for name, side in zip(SIDES, sides, strict=True):
                if not isinstance(side, str):
                    _check_answered(prompt, side, f"{where}, “{name}”")
        for name in SIDES if whole else ("prompt", *SIDES):
            if not isinstance(row.get(name), list) and not check_text(row.get(name), f"{where}: “{name}”").strip():
                raise ValueError(f"{where}: “{name}” is empty.")
        yield row


def _check_answered(prompt, side, name):
    if check_messages(side, name)[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with a turn of the role “{side[-1]['role']}”; the assistant's is required.")
    if prompt:
        check_messages([*prompt, *side], f"{name}, after the prompt")
    elif len(side) < 2:
        raise ValueError(f"{name} has no turn before the answer. Give the prompt that it answers.")


def shorten(value, length: int = 80) -> str:
    """Text, or the last message of several, in a table's cell."""
    text = value if isinstance(value, str) else str(value[-1]["content"]) if value else ""
    text = " ".join(text[: 20 * length].split())
    return text if len(text) <= length else text[: length - 1] + "…"


def write_pairs(rows: list[dict], scores: list[dict], form: str) -> str:
    """The rows with the values of `SCORES`, in their own format."""
    merged = [{**row, **score} for row, score in zip(rows, scores, strict=True)]
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in merged)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(merged[0]), lineterminator="\r\n")  # as RFC 4180; either sign is quoted in cells
    writer.writeheader()
    writer.writerows(merged)
    return out.getvalue()
