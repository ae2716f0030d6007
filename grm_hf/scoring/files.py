"""Reads rows from files in the common formats, and writes results to a JSONL file that continues where an interrupted
run stopped.

A file is read as bytes, line by line, so it may end anywhere. A digest in each result names its row and its model.
Only the digest tells a later run whether the result is still valid.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch


class Row(NamedTuple):
    """A row of a file: its place, for messages (`rows.jsonl, line 3`), and its keys that are not null."""

    place: str
    content: dict


# ------------------------------------------------------------------------------------------------------------- reading


def read_file(path: str | Path) -> list[Row]:
    """
    The rows of a file.

    Args:
        path (`str` or `Path`):
            JSONL (`.jsonl`, and any other name), JSON (`.json`, one array of objects or as JSONL), CSV (`.csv`: see
            [`csv_rows`]; an empty cell is null) or parquet (`.parquet`), each also as `.gz`; a named pipe; or `-` for
            standard input. Text is UTF-8 whatever the locale, with or without BOM.

    Raises:
        `ValueError`: there is no such file, or a row cannot be read, with file and line.
    """
    name = "standard input" if str(path) == "-" else str(path)
    data = _bytes(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(f"{name} is no whole gzip file: {error}") from None
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    if data[:4] == b"PAR1":
        return list(_parquet(data, name))
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name} is a git-lfs pointer, not the file that it stands for. Fetch it: `git lfs pull`.")
    text = _text(data, name)
    if suffixes[-1:] == [".csv"]:
        return list(_csv(text, name))
    if suffixes[-1:] == [".json"] and text.lstrip().startswith("["):
        return list(_json(text, name))
    return list(_jsonl(text, name))


def lines_of(path: str | Path) -> list[str]:
    """The lines of a text file (or of standard input, `-`), as UTF-8, without their ends and without blank ones."""
    name = "standard input" if str(path) == "-" else str(path)
    return [line.removesuffix("\r") for line in _text(_bytes(path), name).split("\n") if line.strip()]


def _bytes(path: str | Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read()  # not its text, which is decoded by the locale
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give a file.")
    if not os.path.exists(path):
        raise ValueError(f"There is no file {path}.")
    return Path(path).read_bytes()  # a pipe, too


def _text(data: bytes, name: str) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: it is not UTF-8 ({error.reason}). Convert the file.") from None


def _checked(content: Any, place: str) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f"{place}: this is {type(content).__name__}, and a row is an object with keys.")
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{place}: it holds {half}, half of a pair of surrogates, which is no character.") from None
    if any(isinstance(value, float) and math.isinf(value) for value in content.values()):
        raise ValueError(f"{place}: it holds Infinity, which JSON has no number for.")
    # NaN is how pandas, and Python's JSON, write null.
    return Row(place, {key: value for key, value in content.items() if value is not None and value == value})


def parsed_json(text: str, place: str) -> Any:
    """
    Raises:
        `ValueError`: it is not JSON, or a name is there twice in an object (of which Python keeps the last).
    """
    try:
        return json.loads(text, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: it is not JSON: {error}") from None


def _named_once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        raise ValueError(f"an object has the name {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _jsonl(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # not `splitlines`, which also splits at U+2028
        if line.strip():
            yield _checked(parsed_json(line, f"{name}, line {number}"), f"{name}, line {number}")


def _json(text: str, name: str) -> Iterator[Row]:
    for number, content in enumerate(parsed_json(text, name), 1):
        yield _checked(content, f"{name}, item {number}")


def _csv(text: str, name: str) -> Iterator[Row]:
    for line, cells in csv_rows(text, name):
        yield _checked({key: cell for key, cell in cells.items() if cell != ""}, f"{name}, line {line}")


def csv_rows(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    The rows of a CSV text with a line of names: the line that each ends in, and its cells. Cells are text; but
    messages as JSON are read as messages, and in the columns `tools` and `chat_template_kwargs` any list or object is.

    Raises:
        `ValueError`: a name is there twice, a row has more cells than there are names, or a quote is not closed.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    usual = csv.field_size_limit(2**31 - 1)  # 128 KiB is less than a long answer; the limit is the whole process's
    try:
        names = [column for column in reader.fieldnames or () if column]
        rows = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(usual)
    if twice := next((column for column in names if names.count(column) > 1), None):
        raise ValueError(f"{name}, line 1: there are two columns {twice!r}. Rename or remove one of them.")
    for line, cells in rows:
        if None in cells:
            raise ValueError(f"{name}, line {line}: the row has more cells than the first line has names.")
        yield line, {key: _cell(key, cell) for key, cell in cells.items() if cell is not None}


def _cell(column: str, cell: str) -> Any:
    if cell[:1] in ("[", "{"):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        items = value if isinstance(value, list) else [value]
        if column in ("tools", "chat_template_kwargs") or (
            items and all(isinstance(item, dict) and "role" in item for item in items)
        ):
            return value
    return cell  # an answer may be JSON


def _parquet(data: bytes, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name} is a parquet file: to read it, `pip install pyarrow`.") from None
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name} is no whole parquet file: {error}") from None
    for number, content in enumerate(rows, 1):
        yield _checked(content, f"{name}, row {number}")


# ------------------------------------------------------------------------------------------------------------- digests


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that stand for `parts`, any values that JSON can hold; the order of keys does not
    matter."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


@torch.no_grad()
def model_digest(scorer) -> str:
    """
    [`digest`] of all that a reward depends on: weights, dtype, policies of the configuration, vocabulary and chat
    template. For a [`GRMScorer`], or an ensemble of them.

    Weights count by exact sums of their bytes and by samples, in one pass over them. Offloaded weights count by name
    and shape only.
    """
    parts: list = []
    for name, tensor in sorted(scorer.model.state_dict().items()):
        parts.append([name, str(tensor.dtype), list(tensor.shape)])
        if tensor.device.type != "meta" and tensor.numel():
            data = tensor.detach().contiguous().flatten().view(torch.uint8)
            sample = data[:: max(1, len(data) // 4096)].cpu().numpy().tobytes()
            parts.append([int(data.sum(dtype=torch.int64)), hashlib.sha256(sample).hexdigest()])
    for member in getattr(scorer, "members", [scorer]):
        encoder, tokenizer = member.encoder, member.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts.append([encoder.max_length, encoder.overlength, encoder.bos])
        parts.append([str(tokenizer.chat_template), str(tokenizer.special_tokens_map)])
        parts.append(sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str())
    return digest(parts)


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    r"""
    A JSONL file with a result for each row, `{"row": 0, ..., "digest": ...}`, in the order of the rows. Results are
    appended one by one; after an interruption at any byte, the same call continues.

    With a `header`, the first line says what all results depend on, and a line needs no digest: `{"row": 0, ...}`.

    Args:
        path (`str` or `Path`):
            File to write.
        digests (`Sequence[str]`):
            [`digest`] of each row together with all that its result depends on (see [`model_digest`]). With a
            `header`, only their number counts.
        write (`bool`, *optional*, defaults to `True`):
            Whether this process writes; only one of several processes does.
        header (`dict`, *optional*):
            The first line. The caller compares it with the one that is there (see [`read_header`]).
        fits (`Callable[[dict], bool]`, *optional*):
            With a `header`: whether a line is a result of its row.

    Attributes:
        kept (`dict[int, dict]`): Results by row that the file holds already and that are still valid.
        missing (`list[int]`): The rows that must be computed.

    Raises:
        `ValueError`: the file holds something, and nothing of it belongs to these rows and this model; or, with a
            `header`, a line that does not. It is left as it is.

    ```python
    results = Results("scores.jsonl", [digest(row, model) for row in rows])
    with results:
        for i in results.missing:
            results.add(i, {"score": score(rows[i])})
    results.kept  # now of all rows
    ```
    """

    def __init__(
        self,
        path: str | Path,
        digests: Sequence[str],
        write: bool = True,
        header: dict | None = None,
        fits: Callable[[dict], bool] = lambda result: True,
    ):
        self.path, self.digests, self.write, self.header = Path(path), list(digests), write, header
        if self.path.is_dir():
            raise ValueError(f"{path} is a folder; give a file.")
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        if header and len(lines) == 1 and not line_of(header).encode().startswith(content):
            raise ValueError(f"{path} exists and is no file of results. Choose another `output`.")
        self.kept = self._by_row(lines[1:], fits) if header else self._by_digest(lines)
        self.missing = [row for row in range(len(self.digests)) if row not in self.kept]
        self._file: BinaryIO | None = None

    def _by_row(self, lines: list[bytes], fits: Callable[[dict], bool]) -> dict[int, dict]:
        """The results below a header. Only the last line may be half a one."""
        kept: dict[int, dict] = {}
        for place, line in enumerate(lines, 2):
            result = _object(line)
            if result is not None and result.get("row") in range(len(self.digests)) and fits(result):
                kept[result["row"]] = result
            elif place < len(lines) + 1:
                raise ValueError(
                    f"{self.path}, line {place} is not the row that belongs there. Choose another `output`."
                )
        return kept

    def _by_digest(self, lines: list[bytes]) -> dict[int, dict]:
        """The results of these rows, wherever they stand among results of others."""
        valid: dict[str, dict] = {}
        foreign = False
        for line in lines:
            result = _object(line)
            if result is not None and isinstance(result.get("digest"), str) and "row" in result:
                valid[result["digest"]] = result
            elif line.strip() and not (line is lines[-1] and _BEGIN.startswith(line[: len(_BEGIN)])):
                foreign = True  # and no line that an interruption cut
        kept = {row: {**valid[key], "row": row} for row, key in enumerate(self.digests) if key in valid}
        if (foreign or valid) and not kept:
            raise ValueError(
                f"{self.path} exists and holds other results than those of these rows and this model. Choose another "
                "file, or remove it."
            )
        return kept

    def __enter__(self) -> "Results":
        if self.write:
            self._rewrite()
            self._file = open(self.path, "ab")
        return self

    def add(self, row: int, result: dict) -> None:
        """Adds the result of a row. It is in the file when this returns."""
        self.kept[row] = {"row": row, **result, **({} if self.header else {"digest": self.digests[row]})}
        if self._file is not None:
            self._file.write(line_of(self.kept[row]).encode("utf-8"))
            self._file.flush()

    def __exit__(self, error, *_) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            if error is None:
                self._rewrite()

    def _rewrite(self) -> None:
        """Writes the kept results in order: the file has either its old content or all of them."""
        first = [self.header] if self.header else []
        whole = "".join(line_of(line) for line in [*first, *(self.kept[row] for row in sorted(self.kept))]).encode()
        if self.path.exists() and self.path.read_bytes() == whole:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        target = self.path.resolve()
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.chmod(file.name, target.stat().st_mode if target.exists() else 0o666 & ~_umask())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


_BEGIN = b'{"row": '


def line_of(result: dict) -> str:
    """A result as a line of JSONL; what JSON has no form for (a date of parquet, as `id`) is text. `ValueError` for
    numbers that JSON does not have, such as NaN."""
    return json.dumps(result, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def read_header(path: str | Path) -> tuple[dict | None, list[bytes]]:
    """
    The first line of a file of [`Results`] with a header, and the whole lines below it. `None` where there is no file,
    or one without a whole line.

    Raises:
        `ValueError`: the first line is no header.
    """
    first, *lines = (Path(path).read_bytes() if Path(path).is_file() else b"").split(b"\n")
    if not lines:
        return None, []
    if (header := _object(first)) is None:
        raise ValueError(f"{path} exists and is no file of results. Choose another `output`.")
    return header, lines[:-1]


def _object(line: bytes) -> dict | None:
    """The JSON object in a line; `None` for anything else, such as the beginning of one."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

