"""UltraFeedback (2310.01377): up to four completions of an instruction, each rated by GPT-4 in four aspects. A
completion was written under a system prompt of its own, which is left out, as is usual."""

from itertools import combinations

from ..evaluation.examples import MAPPING, MAPPINGS, TEXT, Kind, Skipped, Source
from .configuration import TEXT_OR_NULL, Configuration, DataSet, pair, rated


REPO = "openbmb/UltraFeedback"
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
COMPLETIONS = Kind("a list of mappings", lambda value: value == [] or MAPPINGS.holds(value))


def _is_rating(value):
    return value in (None, "N/A") or (isinstance(value, (str, int, float)) and str(value).strip() in set("12345"))


RATING = Kind('a rating from "1" to "5", "N/A" or null', _is_rating)


def _completions(row):
    """Prompt, response and ratings of each completion."""
    prompt = [{"role": "user", "content": row("instruction", TEXT)}]
    for values in row("completions", COMPLETIONS):
        completion = row.of(values)
        annotations = row.of(completion("annotations", MAPPING))
        given = {name: annotations(f"{name}.Rating", RATING) for name in ASPECTS}
        yield (
            prompt,
            completion("response", TEXT_OR_NULL),
            {name: None if value in (None, "N/A") else float(value) for name, value in given.items()},
        )


def ratings(row):
    found = list(_completions(row))
    if not found:
        yield Skipped("rows without a completion")
    for prompt, response, values in found:
        yield rated(prompt, response, values)


def preference(row):
    """Every pair of completions whose mean ratings differ."""
    whole = []
    for prompt, response, values in _completions(row):
        if None in values.values():
            yield Skipped("completions without all four ratings")
        else:
            whole.append((prompt, response, values))
    if len(whole) < 2:
        yield Skipped("rows with fewer than two rated completions")
    for first, second in combinations(whole, 2):
        margin = (sum(first[2].values()) - sum(second[2].values())) / len(ASPECTS)
        if margin == 0:
            yield Skipped("pairs whose mean ratings are equal")
            continue
        (prompt, chosen, good), (_, rejected, bad) = (first, second) if margin > 0 else (second, first)
        attributes = {f"{side}_{name}": of[name] for side, of in (("chosen", good), ("rejected", bad)) for name in of}
        yield pair(prompt, chosen, rejected, margin=abs(margin), **attributes)


FIELDS = frozenset({"instruction", "completions"})
SPLITS = {"train": Source(REPO, None, "train", "train")}
DATA_SETS = (
    DataSet(
        repo=REPO,
        licence="MIT",
        configurations={
            "preference": Configuration(
                "pairs of completions; `margin` is the difference of their mean ratings; four aspects of each side",
                preference,
                FIELDS,
                ("margin", *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ASPECTS)),
                SPLITS,
            ),
            "ratings": Configuration("rated rows; four aspects from 1 to 5", ratings, FIELDS, ASPECTS, SPLITS),
        },
    ),
)
