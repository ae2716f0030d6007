"""`Example`, the form of every suite's rows, and the reading of official files. Fields are checked row by row, so a
wrong file gives one sentence with the file, the row and what is expected."""

import gzip
import hashlib
import json
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..encoding import THINKING_KEYS, require_whole
from ..scoring.files import csv_rows, parsed_json


SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Example:
    """
    One prompt with its responses, and which of them are right.

    Attributes:
        prompt (`str` or `list[dict]`):
            One user message, or the messages before the response. Empty: each response is a whole text, or a whole
            conversation.
        responses (`list`):
            Each a text, or the messages that follow the prompt.
        correct (`list[int]`):
            Indices of the right responses.
        subset (`str`, *optional*):
            The subset of the suite.
        id (`str`, *optional*):
            The row's name in the suite.
        meta (`dict`, *optional*):
            Further input of the suite's aggregation: `pairs` (indices of better and worse responses, if these are not
            all right against all wrong ones), `group` (rows that are drawn together, by default those of one prompt),
            `tools` and `chat_template_kwargs` for the chat template.

    Raises:
        `ValueError`: there is no response, or `correct` names a missing one.
    """

    prompt: str | list[dict]
    responses: list
    correct: list[int]
    subset: str = ""
    id: str = ""
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        count = len(self.responses)
        named = [*self.correct, *(index for pair in self.meta.get("pairs", []) for index in pair)]
        if not count:
            raise ValueError(f"example {self.id!r} has no responses.")
        if wrong := [index for index in named if not 0 <= index < count]:
            raise ValueError(f"example {self.id!r} has {count} responses, and indices {wrong} name none of them.")

    @property
    def wrong(self) -> list[int]:
        """Indices of the responses that are not right."""
        return [i for i in range(len(self.responses)) if i not in self.correct]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices of a better and a worse response."""
        if "pairs" in self.meta:
            return [tuple(pair) for pair in self.meta["pairs"]]
        return [(i, j) for i in self.correct for j in self.wrong]

    @property
    def group(self) -> str:
        """The key of the rows that are drawn together."""
        return self.meta.get("group") or json.dumps(self.prompt, ensure_ascii=False)

    def chat(self, index: int) -> dict | str:
        """The prompt with one of the responses, as [`GRMScorer.score`] takes it."""
        response = self.responses[index]
        if not self.prompt and isinstance(response, str):
            return response
        extras = {key: self.meta[key] for key in ("tools", "chat_template_kwargs") if self.meta.get(key)}
        return {"prompt": self.prompt, "response": response, **extras}

    def length(self, index: int) -> int:
        """Characters of a response: the same for every model."""
        return len(text_of(self.responses[index]))


@dataclass(frozen=True)
class Skipped:
    """A row that the suite's own rules leave out, with the reason. Such rows are counted and reported."""

    reason: str


def text_of(response: str | list[dict]) -> str:
    """The text of a response that is a text, or messages."""
    if isinstance(response, str):
        return response
    return "\n\n".join(str(message.get("content") or "") for message in response)


def turns(conversation: list[dict]) -> list[dict]:
    """Messages with only the keys that a chat template reads: data sets add languages, ids, nulls."""
    keys = ("role", "content", "tool_calls", "tool_call_id", "name", *THINKING_KEYS)
    return [{key: m[key] for key in keys if m.get(key) is not None} for m in conversation]


def split_conversations(conversations: list[list[dict]]) -> tuple[list[dict], list]:
    """The messages that conversations share at their beginning, and the rest of each: a text if the rest is one
    message of the assistant, otherwise messages."""
    conversations = [turns(conversation) for conversation in conversations]
    shared = 0
    while all(len(c) > shared + 1 and c[shared] == conversations[0][shared] for c in conversations):
        shared += 1
    rests = [conversation[shared:] for conversation in conversations]
    single = all(len(rest) == 1 and set(rest[0]) == {"role", "content"} for rest in rests)
    single = single and all(isinstance(rest[0]["content"], str) and shared for rest in rests)
    return conversations[0][:shared], [rest[0]["content"] for rest in rests] if single else rests


def digest_of(examples: list[Example]) -> str:
    """A digest of the rows: equal for equal examples in an equal order."""
    digest = hashlib.sha256()
    for example in examples:
        text = json.dumps(asdict(example), ensure_ascii=False, sort_keys=True)
        try:
            require_whole(text)
        except ValueError as error:
            raise ValueError(f"example {example.id!r}: {error}") from None
        digest.update(text.encode())
    return digest.hexdigest()


def spread(examples: list[Example], limit: int) -> list[Example]:
    """About `limit` examples, spread over the suite and in its order. Whole groups are drawn by a hash of their
    content, so a smaller limit gives a subset of a larger one."""
    if limit < 1:
        raise ValueError(f"the limit is {limit}; at least one example is required.")
    sizes = Counter(example.group for example in examples)
    room, chosen = limit, set[str]()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).hexdigest()):
        if sizes[group] <= room or not chosen:
            chosen.add(group)
            room -= sizes[group]
        if room <= 0:
            break
    return [example for example in examples if example.group in chosen]


# -------------------------------------------------------------------------------------------------------------- fields


class Kind(NamedTuple):
    """The kind of value that a field may have."""

    name: str
    holds: Callable[[Any], bool]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_messages(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: _list_of(value, str))
NAME = Kind("text or a whole number", lambda value: isinstance(value, (str, int)) and not isinstance(value, bool))
COUNT = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
NUMBERS = Kind("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value)))
MESSAGES = Kind("messages with `role` and `content`", _are_messages)
PROMPT = Kind("text or messages", lambda value: isinstance(value, str) or _are_messages(value))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
MAPPINGS = Kind("a list of mappings", lambda value: _list_of(value, dict))


def _list_of(value, item_type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, item_type) for item in value)


def one_of(*choices: str) -> Kind:
    return Kind(f"one of {list(choices)}", lambda value: value in choices)


class Row:
    """A row of a file: its place, and its fields, which are checked when they are read."""

    def __init__(self, values: dict, file: str, number: int):
        self.values, self.file, self.number = values, file, number

    def __call__(self, name: str, kind: Kind):
        """The field `name`, which must exist and be a `kind`. `a.b` is the field `b` of the mapping `a`."""
        outer, _, inner = name.partition(".")
        if inner:
            return self.of(self(outer, MAPPING))(inner, kind)
        if name not in self.values:
            raise self.error(f"there is no field `{name}` ({kind.name}); it has {sorted(map(str, self.values))}")
        value = self.values[name]
        if not kind.holds(value):
            raise self.error(f"`{name}` is {_shown(value)}; {kind.name} is required")
        return value

    def of(self, values: dict) -> "Row":
        """Fields of a mapping within this row."""
        return Row(values, self.file, self.number)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.file}, row {self.number}: {what}.")


def _shown(value) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


# --------------------------------------------------------------------------------------------------------------- files


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """
    The rows of a file (`.json`: a list, `.jsonl`, `.csv`, each also `.gz`; `.parquet`), or of all such files below a
    folder, in the order of their names. Rows are numbered from 1, as an editor numbers lines.
    """
    path = Path(path)
    if path.is_dir():
        files = data_files(path)
        if not files:
            raise ValueError(f"{path} holds no file of data: {', '.join(SUFFIXES)} are read.")
    elif path.is_file():
        files = [path]
        if _suffix(path) not in SUFFIXES:
            raise ValueError(f"{path} is no file of data: {', '.join(SUFFIXES)} are read.")
    else:
        raise ValueError(f"no such file or folder: {path}")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        number = 0
        for number, values in enumerate(_values(file), 1):
            if not isinstance(values, dict):
                raise ValueError(f"{name}, row {number}: {_shown(values)} is no row; a mapping of fields is required.")
            yield Row(values, name, number)
        if not number:
            raise ValueError(f"{name} is empty; a file of rows is required.")


def data_files(folder: Path) -> list[Path]:
    """The files of data below a folder, in the order of their names."""
    return sorted(file for file in folder.rglob("*") if _suffix(file) in SUFFIXES and file.is_file())


def _suffix(file: Path) -> str:
    """The suffix of a file of data, without that of its compression. Parquet has its own."""
    inner = Path(file.stem).suffix
    return inner if file.suffix == ".gz" and inner != ".parquet" else file.suffix


def _values(file: Path) -> Iterable[Any]:
    suffix = _suffix(file)
    if suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError("Parquet files need pyarrow: pip install 'grm-hf[eval]'.") from error
        return parquet.read_table(file).to_pylist()
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 text: {error}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file.name} is no whole gzip file: {error}") from None
    if suffix == ".csv":
        return [cells for _, cells in csv_rows(text, file.name)]
    if suffix == ".jsonl":
        return _lines(text, file.name)
    content = parsed_json(text, file.name) if text.strip() else []
    if isinstance(content, list):
        return content
    raise ValueError(f"{file.name} holds {_shown(content)}; a list of rows is required.")


def _lines(text: str, name: str) -> Iterator[Any]:
    for number, line in enumerate((line for line in text.split("\n") if line.strip()), 1):
        yield parsed_json(line, f"{name}, row {number}")


class Source(NamedTuple):
    """A part of a suite on the Hub: repository, configuration and split, the name of its rows, and the folder of the
    repository, if the part is no configuration but a folder."""

    repo: str
    config: str | None
    split: str
    name: str
    folder: str | None = None


def commits_of(sources: Iterable[Source], revision: str | None = None) -> dict[str, str]:
    """The commit that a revision names now, for each repository of the parts."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    commits: dict[str, str] = {}
    for repo in dict.fromkeys(source.repo for source in sources):
        try:
            commits[repo] = str(HfApi().dataset_info(repo, revision=revision).sha)
        except HfHubHTTPError:
            raise
        except Exception as problem:  # each release of huggingface_hub has its own class for "offline"
            warnings.warn(
                f"The Hub cannot be asked for the commit of {repo} ({type(problem).__name__}): the results will not "
                "name the revision of their data.",
                stacklevel=2,
            )
    return commits


def download_rows(sources: Iterable[Source], revisions: Mapping[str, str | None]) -> Iterator[Row]:
    """The rows of parts on the Hub, each repository at its revision."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("Data from the Hub needs datasets: pip install 'grm-hf[eval]'.") from error
    for source in sources:
        folder = {} if source.folder is None else {"data_dir": source.folder}
        revision = revisions.get(source.repo)
        dataset = load_dataset(source.repo, source.config, split=source.split, revision=revision, **folder)
        for number, values in enumerate(dataset, 1):
            yield Row(values, source.name, number)


def is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()
