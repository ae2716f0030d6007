"""What visitors type and upload, read into Python with a sentence for every mistake; and tables written for download.

Conversations: one turn after another, each begun by its role at the beginning of a line, or JSON messages.
Tables of pairs: CSV with columns `prompt`, `chosen`, `rejected`, or JSON lines with these keys, text or messages.
"""

import csv
import io
import json
import re


MAX_ROWS = 200
MAX_BYTES = 2_000_000
MAX_TURNS = 20
ROLE = re.compile(r"^(system|user|assistant):[ \t]*", re.MULTILINE | re.IGNORECASE)
SIDES = ("chosen", "rejected")
SCORES = ("chosen_reward", "rejected_reward", "margin", "probability", "cut_tokens")


def read_prompt(kind: str, text: str | None) -> str | list[dict]:
    """The prompt as text, or as messages if `kind` is "conversation"."""
    text = text or ""
    if not text.strip():
        raise ValueError("The prompt is empty.")
    if kind != "conversation":
        return text
    if text.lstrip().startswith("["):
        try:
            messages = json.loads(text)
        except ValueError as error:
            raise ValueError(f"The conversation begins like JSON and is none: {error}.") from None
        return check_messages(messages, "The conversation")
    parts = ROLE.split(text)
    if parts[0].strip():
        raise ValueError(
            "The conversation must begin with a role: “user:”, “assistant:” or “system:” at the beginning of a line. "
            f"It begins with “{parts[0].strip()[:40]}”."
        )
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return check_messages([{"role": r.lower(), "content": text.strip()} for r, text in turns], "The conversation")


def check_messages(messages, name: str) -> list[dict]:
    if not isinstance(messages, list) or not messages or len(messages) > MAX_TURNS:
        raise ValueError(f"{name} must be a list of 1 to {MAX_TURNS} messages.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f'{name}, turn {number}: a message is {{"role": ..., "content": ...}}, both text.')
        if not message["content"].strip():
            raise ValueError(f"{name}, turn {number} ({message['role'][:20]}) is empty.")
    return messages


def read_answers(text: str | None) -> list[str]:
    """Answers divided by lines of three or more dashes; without any, one a line."""
    text = text or ""
    parts = re.split(r"^-{3,}[ \t\r]*$", text, flags=re.MULTILINE)
    answers = [part.strip() for part in (parts if len(parts) > 1 else text.split("\n"))]
    return [answer for answer in answers if answer]


def read_pairs(text: str | None, upload: bytes | None) -> tuple[list[dict], str]:
    """Rows with `prompt` (text, messages, or none where the sides are whole conversations), `chosen`, `rejected`, and
    whatever else they have, as text; and the format, "csv" or "jsonl"."""
    if upload is not None:
        if len(upload) > MAX_BYTES:
            raise ValueError(f"The file is larger than {MAX_BYTES // 1_000_000} MB. Score it with `grm score`.")
        try:
            text = upload.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError("The file is not text in UTF-8.") from error
    text = (text or "").lstrip("\ufeff").strip()
    if not text:
        raise ValueError("There is nothing to score yet: paste a table or upload a file.")
    form = "jsonl" if text[0] in "{[" else "csv"
    rows = _json_rows(text) if form == "jsonl" else _csv_rows(text)
    if not rows:
        raise ValueError("The table has a first line and no pairs below it.")
    if len(rows) > MAX_ROWS:
        raise ValueError(f"The table has {len(rows)} pairs; this page takes {MAX_ROWS}. Score it with `grm score`.")
    return rows, form


def _csv_rows(text):
    header_line = text.split("\n")[0].strip()
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows = []
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
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} is no CSV: {error}.") from error
    return rows


def _check_names(names, where):
    """All names of `SCORES` are those of a table from here, which is scored anew; some of them are another's."""
    taken = [name for name in SCORES if name in names]
    if taken and len(taken) < len(SCORES):
        raise ValueError(
            f"{where} has {', '.join(f'“{name}”' for name in taken)}, which this page writes itself: another name is "
            "required."
        )


def _json_rows(text):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"Line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}. Each line is one pair.") from None
        if not isinstance(row, dict) or not row.get("chosen") or not row.get("rejected"):
            raise ValueError(f"{where} needs “prompt”, “chosen” and “rejected”.")
        _check_names(row, where)
        whole = isinstance(row["chosen"], list) and isinstance(row["rejected"], list) and not row.get("prompt")
        for name in ("chosen", "rejected") if whole else ("prompt", "chosen", "rejected"):
            if isinstance(row.get(name), list):
                check_messages(row[name], f"{where}, “{name}”")
            elif not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{where}: “{name}” must be text or a list of messages, and not empty.")
        if not whole and isinstance(row["prompt"], str) and not all(isinstance(row[n], str) for n in SIDES):
            raise ValueError(f"{where}: text and messages are mixed. Write prompt and answers the same way.")
        rows.append(row)
    return rows


def shorten(value, length: int = 80) -> str:
    """Text, or the last message of several, in a table's cell."""
    text = value if isinstance(value, str) else str(value[-1]["content"]) if value else ""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def write_pairs(rows: list[dict], scores: list[dict], form: str) -> str:
    """The rows with what `SCORES` names, in the format they came in."""
    merged = [{**row, **score} for row, score in zip(rows, scores, strict=True)]
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in merged)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(merged[0]), lineterminator="\r\n")  # as RFC 4180; either sign is quoted in cells
    writer.writeheader()
    writer.writerows(merged)
    return out.getvalue()
