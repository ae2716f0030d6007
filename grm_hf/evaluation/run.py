"""`evaluate` scores a suite with a model. Every text is computed once. Results are written row by row, and an
interrupted run continues from any byte, for the same model and the same rows only."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..chats import rows_of
from ..scoring import Score, files
from ..version import __version__
from . import scorers
from .examples import (
    Example,
    Row,
    Skipped,
    Source,
    commits_of,
    digest_of,
    download_rows,
    is_hub_id,
    read_rows,
    spread,
)
from .suite import Suite, aggregate_with, check_row, headline, interval
from .suites import SUITES


# For two equal models, so many differing prompts all favour the same one in less than 5 % of cases: 2 * 0.5**6.
FEWEST_DIFFERING = 6


@dataclass
class Results:
    """
    The results of a model on a suite.

    Attributes:
        suite (`str`): Name of the suite.
        model (`str`): Name of the model.
        summary (`dict[str, float]`): The figures of [`aggregate`]; `score` is the headline.
        examples (`list[Example]`): The rows of the suite.
        scores (`list[list[float]]`): Scores of each example's responses.
        rows (`list[dict]`): For each example its number, id and subset, and scores, tokens and truncation of each of
            its responses.
        model_digest (`str`): Digest of the model's weights, configuration and tokenizer. Empty: not computed.
        rows_digest (`str`): Digest of the rows.
        skipped (`dict[str, int]`): Rows that the suite's rules leave out, by reason.
        revisions (`dict[str, str]`): The commit of each repository of the Hub that the rows come from.
    """

    suite: str
    model: str
    summary: dict[str, float]
    examples: list[Example] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    model_digest: str = ""
    rows_digest: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    @property
    def scores(self) -> list[list[float]]:
        return [row["scores"] for row in self.rows]

    @property
    def truncated(self) -> int:
        """Texts that were longer than the model can read, counted once for each row."""
        return sum(sum(row["truncated"]) for row in self.rows)

    @property
    def is_complete(self) -> bool:
        """Whether these are all rows of the official suite."""
        return bool(self.summary["complete"])

    def to_json(self) -> str:
        """Everything but the texts, as JSON."""
        return json.dumps(
            {
                "suite": self.suite,
                "model": self.model,
                "model_digest": self.model_digest,
                "rows_digest": self.rows_digest,
                "revisions": self.revisions,
                "skipped": self.skipped,
                "versions": {"grm-hf": __version__} | {name: version(name) for name in ("torch", "transformers")},
                "summary": self.summary,
                "rows": self.rows,
            },
            indent=1,
            ensure_ascii=False,
        )

    def to_frame(self):
        """The rows as a `pandas.DataFrame`."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("`to_frame` needs pandas: pip install 'grm-hf[eval]'.") from error
        return pandas.DataFrame(self.rows)


def suite_of(name: str) -> Suite:
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; it must be one of {', '.join(SUITES)}.")
    return SUITES[name]


def aggregate(suite: str, examples: Sequence[Example], scores: Iterable) -> dict[str, float]:
    """
    The figures of a suite, from scores.

    Args:
        suite (`str`):
            A name in `SUITES`.
        examples (`Sequence[Example]`):
            Rows of the suite.
        scores (`Iterable[Sequence[float]]`):
            For each example the scores of its responses, in their order.

    Returns:
        `dict[str, float]`: shares between 0 and 1. `score` is the suite's headline by its official rules, `score_low`
        and `score_high` its 95 % interval (prompts drawn with replacement; left out for a single prompt), then the
        suite's other figures (`section/...`, `subset/...`, and so on), `n` (examples), `complete` (1 if no row of the
        official suite is missing; otherwise the headline is over the given rows), and `pairs/...`: the numbers of
        [`pairwise_metrics`] for all pairs of a right and a wrong response, with the number of `ties`.

    Raises:
        `ValueError`: numbers of examples, responses and scores differ, or a score is not finite.

    >>> example = Example("What is 2 + 2?", ["4", "5"], [0], "math-prm")
    >>> aggregate("rewardbench", [example], [[1.0, 0.0]])["section/Reasoning"]
    1.0
    """
    return aggregate_with(suite_of(suite), examples, scores)


def load_examples(
    suite: str,
    data: str | os.PathLike | Iterable[dict] | None = None,
    subset: Sequence[str] | None = None,
    limit: int | None = None,
    revision: str | Mapping[str, str] | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """
    The examples of a suite.

    Args:
        suite (`str`):
            A name in `SUITES`.
        data (`str`, path or rows, *optional*):
            File or folder in the official format, Hub id of a data set, or the rows themselves. Default: the suite's
            own place on the Hub.
        subset (`Sequence[str]`, *optional*):
            Names of subsets to keep, or beginnings of them that end before a `/`.
        limit (`int`, *optional*):
            Largest number of examples, spread over the suite: see [`spread`].
        revision (`str` or `dict[str, str]`, *optional*):
            Branch, tag or commit of the data on the Hub; or the commit of each repository.

    Returns:
        `tuple[list[Example], dict[str, int]]`: the examples, and the rows left out by the suite's rules, by reason.

    Raises:
        `ValueError`: a row does not have the suite's format; the message has the file, the row and what is expected.
    """
    of = suite_of(suite)
    last: dict[str, Row] = {}

    def checked(rows):
        for row in rows:
            if not last:
                _require_fields(of, row)
            last["row"] = row
            yield row

    examples: list[Example] = []
    skipped: dict[str, int] = {}
    seen: dict[str, int] = {}
    for loaded in of.load(checked(_rows(of, data, revision))):
        if isinstance(loaded, Skipped):
            skipped[loaded.reason] = skipped.get(loaded.reason, 0) + 1
            continue
        row = last["row"]
        if loaded.id in seen:
            raise row.error(f"`id` {loaded.id!r} is there twice, first in row {seen[loaded.id]}; ids must differ")
        seen[loaded.id] = row.number
        examples.append(loaded)
    if not examples:
        raise ValueError(f"the data holds no rows for the suite {suite!r}" + _said(skipped))
    if subset:
        subset = [subset] if isinstance(subset, str) else subset
        names = {example.subset for example in examples}
        for wanted in subset:
            if not any(_is_in(name, wanted) for name in names):
                raise ValueError(f"there is no subset {wanted!r}; there are {sorted(names)}.")
        examples = [example for example in examples if any(_is_in(example.subset, wanted) for wanted in subset)]
    if limit is not None:
        examples = spread(examples, limit)
    return examples, skipped


def _is_in(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(f"{wanted}/")


def _said(skipped: dict[str, int]) -> str:
    return "".join(f"; {count} rows left out: {reason}" for reason, count in skipped.items())


def _sources(suite: Suite, data) -> tuple[Source, ...]:
    """The parts on the Hub that the data is in; none if it is here."""
    if data is None:
        if not suite.hub:
            raise ValueError(
                f"the data of {suite.name} is not on the Hub. Get the files from {suite.url or 'where you have them'} "
                "and name their folder (`--data`)."
            )
        return suite.hub
    if not isinstance(data, str) or not is_hub_id(data):
        return ()
    if not suite.hub:
        raise ValueError(f"{data} is no file, and {suite.name} has no form on the Hub. Name a file or folder.")
    return tuple(source._replace(repo=data) for source in suite.hub)


def _rows(suite: Suite, data, revision) -> Iterable[Row]:
    if sources := _sources(suite, data):
        same = {source.repo: revision for source in sources}
        return download_rows(sources, revision if isinstance(revision, Mapping) else same)
    if revision:
        warnings.warn(f"revision={revision!r} is ignored: the rows are yours, and not on the Hub.", stacklevel=4)
    if isinstance(data, (str, os.PathLike)):
        return read_rows(data)
    if hasattr(data, "with_format"):  # Python objects, as in training
        data = data.with_format(None)
    return _own_rows(rows_of(data, "row"))


def _own_rows(rows: Iterable) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        if not isinstance(values, Mapping):
            raise ValueError(f"data, row {number}: it is a {type(values).__name__}; a mapping of fields is required.")
        yield Row(dict(values), "data", number)


def _require_fields(suite: Suite, row: Row) -> None:
    """Refuse a file of another schema by its first row, and say what it seems to be."""
    there = set(row.values)
    if any(fields <= there for fields in suite.fields):
        return
    like = [name for name, other in SUITES.items() if name != "own" and any(f <= there for f in other.fields)]
    wanted = " or ".join(str(sorted(fields)) for fields in suite.fields)
    raise row.error(
        f"a row of {suite.name} has the fields {wanted}; this one has {sorted(map(str, there))}"
        + (f", which are those of {' or '.join(like)}" if like else "")
    )


def evaluate(
    model,
    suite: str,
    data: str | os.PathLike | Iterable[dict] | None = None,
    *,
    tokenizer=None,
    subset: Sequence[str] | None = None,
    limit: int | None = None,
    output: str | os.PathLike | None = None,
    accelerator=None,
    progress: bool = False,
    window: int = 1024,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Results:
    """
    Score a suite with a model and compute its figures.

    Args:
        model:
            Hub id or folder (of a model, or of a GRM's adapter), a live model, a [`GRMScorer`], a [`RewardEnsemble`],
            or any `...ForSequenceClassification` with one label.
        suite (`str`):
            A name in `SUITES`.
        data, subset, limit, revision:
            See [`load_examples`]. A revision of the Hub is taken as the commit that it is at the start. An interrupted
            evaluation goes on with the commits that its file names.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of a live model that was made in memory.
        output (`str` or path, *optional*):
            Folder for the rows (`<suite>.jsonl`). An interrupted evaluation continues there, to the same bytes; rows
            of another model or of other data are refused.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            With several processes: each computes a part, the first one writes.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        window (`int`, *optional*, defaults to `1024`):
            Responses that are computed at a time and share their beginnings. An interruption loses at most this many.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that a model other than a GRM brings.

    Returns:
        [`Results`].

    Raises:
        `ValueError`: the data is not the suite's, the model is not a reward model, or `output` has other results.
    """
    if window < 1:
        raise ValueError(f"`window` is {window}; at least one response at a time is required.")
    revisions: dict[str, str] = {}
    if sources := _sources(suite_of(suite), data):
        before = _read(Path(output) / f"{suite}.jsonl")[0] if output is not None and revision is None else None
        revisions = (before or {}).get("revisions") or commits_of(sources, revision)
    examples, skipped = load_examples(suite, data, subset, limit, revisions or revision)
    scorer = scorers.as_scorer(model, tokenizer, accelerator, trust_remote_code)
    results = Results(suite, scorers.name_of(scorer), {}, examples, [], "", digest_of(examples), skipped, revisions)
    windows, shown = _windows(examples, window), progress and (accelerator is None or accelerator.is_main_process)
    rows: dict[int, dict] = {}
    if output is None:
        _score(scorer, examples, windows, rows, rows.__setitem__, shown)
    else:
        results.model_digest = scorers.digest_of(scorer)
        file = _file_of(Path(output) / f"{suite}.jsonl", results, accelerator)
        if accelerator is not None:
            accelerator.wait_for_everyone()  # all have read the file before it changes
        with file:
            _score(scorer, examples, windows, file.kept, file.add, shown)
        rows = file.kept
    results.rows = [rows[number] for number in range(len(examples))]
    results.summary = aggregate(suite, examples, results.scores)
    return results


def _windows(examples: list[Example], size: int) -> list[list[int]]:
    """The numbers of the examples, those of one prompt side by side, in parts of at most `size` responses where an
    example has no more."""
    first: dict[str, int] = {}
    for number, example in enumerate(examples):
        first.setdefault(example.group, number)
    windows: list[list[int]] = [[]]
    taken = 0
    for number in sorted(range(len(examples)), key=lambda number: (first[examples[number].group], number)):
        count = len(examples[number].responses)
        if taken and taken + count > size:
            windows.append([])
            taken = 0
        windows[-1].append(number)
        taken += count
    return windows


def _score(scorer, examples, windows, rows, add, shown) -> None:
    """Score what `rows` does not hold yet. A window that is not whole there is computed as it was at first, because
    texts of a window share what they have in common, and round by it."""
    known: dict[str, Score] = {}
    count = lambda numbers: sum(len(examples[number].responses) for number in numbers)  # noqa: E731
    whole = count(range(len(examples)))
    with tqdm(total=whole, initial=count(rows), desc="Scoring", unit="text", disable=not shown) as bar:
        for window in windows:
            missing = [number for number in window if number not in rows]
            if missing:
                known |= _computed(scorer, examples, window, known)
            for number in missing:
                example = examples[number]
                scores = [known[_key(example.chat(index))] for index in range(len(example.responses))]
                row = {
                    "row": number,
                    "id": example.id,
                    "subset": example.subset,
                    "scores": [score.score for score in scores],
                    "tokens": [score.tokens for score in scores],
                    "truncated": [score.truncated for score in scores],
                }
                check_row(number, example, row["scores"])
                add(number, row)
            for number in window:
                row = rows[number]
                for index, values in enumerate(zip(row["scores"], row["tokens"], row["truncated"], strict=True)):
                    known[_key(examples[number].chat(index))] = Score(*values)
            bar.update(count(missing))


def _computed(scorer, examples, window, known) -> dict[str, Score]:
    """Scores of the texts of a window that no window before held."""
    chats = {}
    for number in window:
        for index in range(len(examples[number].responses)):
            chat = examples[number].chat(index)
            if (key := _key(chat)) not in known:
                chats[key] = chat
    try:
        return dict(zip(chats, scorers.stream(scorer, list(chats.values())), strict=True))
    except ValueError as error:
        raise ValueError(f"rows {min(window)} to {max(window)} cannot be scored: {error}") from error


def _key(chat) -> str:
    return json.dumps(chat, ensure_ascii=False, sort_keys=True)


def _file_of(path: Path, results: Results, accelerator) -> files.Results:
    """The file of these results, with what it holds already; refused if it is of others."""
    header: dict[str, Any] = {
        "suite": results.suite,
        "model": results.model,
        "model_digest": results.model_digest,
        "rows_digest": results.rows_digest,
        "revisions": results.revisions,
    }
    kept, _ = _read(path)
    for name, what in (("suite", "another suite"), ("model_digest", "another model"), ("rows_digest", "other rows")):
        if kept is not None and kept.get(name) != header[name]:
            raise ValueError(
                f"{path} holds results of {what}: {name} is {str(kept.get(name))[:12]} there and {header[name][:12]} "
                "in this run. Choose another `output`."
            )

    def fits(row):
        scores = row.get("scores")
        return isinstance(scores, list) and len(scores) == len(results.examples[row["row"]].responses)

    writes = accelerator is None or accelerator.is_main_process
    return files.Results(path, [""] * len(results.examples), writes, kept or header, fits)


def _read(path: Path) -> tuple[dict | None, list[bytes]]:
    """The header of a file of results and its rows; no header where there is nothing yet."""
    header, lines = files.read_header(path)
    if header is not None and "rows_digest" not in header:
        raise ValueError(f"{path} exists and is no file of results. Choose another `output`.")
    return header, lines


# ---------------------------------------------------------------------------------------------------------- comparison


def read_results(path: str | os.PathLike, results: Results) -> Results:
    """
    Results of another model on the rows of `results`, from a folder (or a file).

    Raises:
        `ValueError`: there are none, they are not finished, or their rows differ.
    """
    path = Path(path)
    path = path / f"{results.suite}.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there are no results of {results.suite} in {path}.")
    header, lines = _read(path)
    if header is None or header["rows_digest"] != results.rows_digest:
        raise ValueError(f"{path} holds results of other rows, which cannot be compared one by one.")
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["row"])
    if [row["row"] for row in rows] != list(range(len(results.examples))):
        raise ValueError(f"{path} is not finished: {len(rows)} of {len(results.examples)} rows.")
    theirs = Results(
        results.suite, header["model"], {}, results.examples, rows, header["model_digest"], header["rows_digest"],
        results.skipped,
    )
    theirs.summary = aggregate(results.suite, results.examples, theirs.scores)
    return theirs


def compare(a: Results, b: Results) -> dict[str, Any]:
    """
    The difference of two models' headlines on the same rows. It is paired row by row; prompts are drawn for its
    interval.

    Returns:
        `dict`: `score_a`, `score_b`, `difference`, `low`, `high` (95 %; the difference itself for a single prompt),
        `differing` (prompts on which the two differ), and `verdict`: the better model, or "no difference shown". A
        difference is shown if its interval does not contain 0 and at least six prompts differ: fewer prompts that all
        favour one model are not rare among equals (sign test).
    """
    if a.suite != b.suite or a.rows_digest != b.rows_digest:
        raise ValueError(f"these are results of {a.suite} and {b.suite} on different rows; equal rows are required.")
    figures = suite_of(a.suite).figures
    (_, parts_a), (_, parts_b) = (figures(a.examples, results.scores) for results in (a, b))
    parts = {
        name: part._replace(values=np.subtract(part.values, parts_b[name].values).tolist())
        for name, part in parts_a.items()
    }
    difference = headline(parts)
    low, high = interval(a.examples, parts) or (difference, difference)
    if not difference:
        low, high = min(low, -high), max(high, -low)  # of equals
    differing = {
        a.examples[owner].group
        for part in parts.values()
        for value, owner in zip(part.values, part.owners, strict=True)
        if value
    }
    better = a.model if difference > 0 else b.model
    shown = (low > 0 or high < 0) and len(differing) >= FEWEST_DIFFERING
    return {
        "suite": a.suite,
        "model_a": a.model,
        "model_b": b.model,
        "score_a": a.summary["score"],
        "score_b": b.summary["score"],
        "difference": difference,
        "low": low,
        "high": high,
        "differing": len(differing),
        "verdict": f"{better} is better" if shown else "no difference shown",
    }
