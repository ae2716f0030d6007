"""Reads a data set of the table, from the Hub or from files of its official form."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..evaluation.examples import Row, Skipped, commits_of, data_files, download_rows, read_rows
from .configuration import Configuration, DataSet
from .data_sets import DATA_SETS


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

MESSAGES = ("prompt", "chosen", "rejected", "completion")


def load_preferences(
    name: str,
    config: str | None = None,
    split: str = "train",
    path: str | os.PathLike | None = None,
    revision: str | None = None,
) -> "Dataset":
    """
    Published preference data as rows that [`GRMRewardTrainer`] takes: pairs (`prompt`, `chosen`, `rejected`, each
    messages) with `margin` or `label`, or rated rows (`prompt`, `completion`, and a column for each attribute, null
    where it is missing). What is left out is counted, by its reason, in a warning.

    Args:
        name (`str`):
            Hub id of the data, one of `DATA_SETS`.
        config (`str`, *optional*):
            `"preference"` (pairs with a margin), `"labels"` (pairs with a soft label; ties stay) or `"ratings"` (rated
            rows), if the data has it. By default the first that it has.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the data. Of a folder, the files are read whose name (or whose folder's) begins with it, or with
            its name on the Hub; if there are none, for `"train"` those of no other split. A file is `"train"`. Rows of
            HelpSteer2's preferences name their split themselves.
        path (`str`, *optional*):
            File, folder or copy of the repository, in the data's official form, in place of the Hub: JSON or JSONL
            (each also `.gz`) or parquet.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Defaults to the commit that `DATA_SETS` names, if it names one, else to
            the newest.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        `ValueError`: there is no such data, configuration or split; or a row has another form: the message names the
            file, the row, what was found and what is required.
    """
    data, config, reading = _chosen(name, config)
    if path is None:
        rows = _of_hub(data, reading, split, revision)
    else:
        if revision is not None:
            logger.warning(f"revision={revision!r} is ignored: the rows are those of {path}.")
        rows = chain.from_iterable(map(read_rows, _of_split(Path(path), reading, split)))
    kept: list[dict] = []
    left_out: Counter[str] = Counter()
    read, seen = 0, set[bytes]()
    for row in rows:
        _require_fields(row, data, config)
        if reading.split_of is not None and reading.split_of(row) != split:
            continue
        read += 1
        for made in reading.rows(row):
            if isinstance(made, Skipped):
                left_out[made.reason] += 1
                continue
            digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).digest()
            if digest in seen:
                left_out["repeated rows"] += 1
                continue
            seen.add(digest)
            kept.append(made)
    what = (
        f"{name} ({config}, {split}): {read} rows read, {len(kept)} {'rows' if config == 'ratings' else 'pairs'} kept"
    )
    if left_out:
        what += "; left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not kept:
        raise ValueError(f"{what}. There is nothing to train on.")
    (logger.warning if left_out else logger.info)(f"{what}.")
    return _table(kept, reading)


def _chosen(name: str, config: str | None) -> tuple[DataSet, str, Configuration]:
    if name not in DATA_SETS:
        raise ValueError(f"there is no reader for {name!r}; there are readers for {', '.join(DATA_SETS)}.")
    data = DATA_SETS[name]
    config = config or next(iter(data.configurations))
    if config not in data.configurations:
        raise ValueError(f"{name} has no configuration {config!r}; it has {', '.join(data.configurations)}.")
    return data, config, data.configurations[config]


def _of_hub(data: DataSet, reading: Configuration, split: str, revision: str | None) -> Iterator[Row]:
    if split not in reading.splits:
        raise ValueError(f"{data.repo} has no split {split!r}; it has {', '.join(reading.splits)}.")
    source = reading.splits[split]
    commit = revision or data.revision
    if commit is None:
        commit = commits_of([source]).get(data.repo)
        logger.warning(
            f"{data.repo}: no revision is pinned here, so the newest is read{f', {commit}' if commit else ''}."
        )
    return download_rows([source], {data.repo: commit})


def _of_split(path: Path, reading: Configuration, split: str) -> list[Path]:
    """The files of a split: all, if the rows name their own; else those named after it, by its name on the Hub if
    there are such; for `"train"` those that are named after no split. In a copy of the repository they lie in the
    folder that they have there."""
    source = next(iter(reading.splits.values()))
    inner = path / (source.folder or source.config or "")
    path = inner if inner.is_dir() else path
    files = data_files(path) if path.is_dir() else []
    if reading.split_of is not None or (split == "train" and not files):
        return [path]

    def named(start):
        return [file for file in files if any(part.startswith(start) for part in file.relative_to(path).parts)]

    of_hub = {name: named(of_name.split) for name, of_name in reading.splits.items()}
    found = of_hub.get(split) or named(split)
    if split == "train" and not found:
        others = {file for name in reading.splits for file in (*of_hub[name], *named(name))}
        found = [file for file in files if file not in others]
    if not found:
        raise ValueError(
            f"{path} has no split {split!r}: in a folder, the files of a split have names that begin with it, and a "
            "single file is 'train'."
        )
    return found


def _require_fields(row: Row, data: DataSet, config: str) -> None:
    missing = sorted(data.configurations[config].fields - set(row.values))
    if not missing:
        return
    others = [name for name, other in data.configurations.items() if other.fields <= set(row.values)]
    hint = f"; it is a row of the configuration {others[0]!r}" if others else ""
    raise row.error(
        f"there is no field {', '.join(f'`{name}`' for name in missing)}, which {data.repo} ({config}) has; the row "
        f"has {sorted(map(str, row.values))}{hint}"
    )


def _table(rows: list[dict], reading: Configuration) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    messages = List({"role": Value("string"), "content": Value("string")})
    columns: dict[str, Any] = {name: messages for name in MESSAGES if name in rows[0]}
    columns |= {name: Value("float64") for name in reading.numbers}
    return Dataset.from_list(rows, features=Features(columns))
