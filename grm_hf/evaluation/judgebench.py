"""JudgeBench (ScalerLab): a right and a wrong answer to a hard question, in a fixed order."""

from .examples import NAME, TEXT, Example, Source, one_of
from .suite import Suite, parts_by, subset_figures


GROUPS = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")


def load(rows):
    for row in rows:
        source = row("source", TEXT)
        group = next((group for group in GROUPS if source.startswith(group)), None)
        if group is None:
            raise row.error(f"`source` is {source!r}; it must begin with one of {list(GROUPS)}")
        label = row("label", one_of("A>B", "B>A"))
        pair = [row("response_A", TEXT), row("response_B", TEXT)]
        yield Example(
            row("question", TEXT), pair, [0 if label == "A>B" else 1], group, str(row("pair_id", NAME)),
            {"source": source},
        )


def figures(examples, scores):
    """The decision is "A>B" if A is above B, otherwise "B>A"."""
    wins = [float((a > b) == (example.correct == [0])) for example, (a, b) in zip(examples, scores, strict=True)]
    parts = parts_by((example.subset for example in examples), wins)
    return subset_figures(parts), parts


SUITES = (
    Suite(
        name="judgebench",
        measures="knowledge, reasoning, mathematics and code: a right answer against a wrong one",
        headline="share of all pairs decided as labelled",
        ties="count as 'B>A'",
        rows=(350, 270),
        licence="none stated",
        url="https://github.com/ScalerLab/JudgeBench",
        fields=(frozenset({"pair_id", "source", "question", "response_A", "response_B", "label"}),),
        load=load,
        figures=figures,
        parts=GROUPS,
        hub=(Source("ScalerLab/JudgeBench", None, "gpt", "gpt"),),
    ),
)
