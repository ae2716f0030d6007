"""PPE (lmarena): human preferences, and five benchmarks of correctness with 32 answers to each question."""

from ..metrics import best_of_n, roc_auc
from .examples import NAME, NUMBERS, TEXT, Example, Skipped, Source
from .suite import Part, Suite, subset_figures, wins_of


NAMES = {"human": "Human", "mmlu-pro": "MMLU-Pro", "math": "MATH", "gpqa": "GPQA", "ifeval": "IFEval",
         "mbpp-plus": "MBPP-Plus"}


def load(rows):
    for row in rows:
        if "winner" in row:
            example = _human(row)
        else:
            example = _correctness(row)
        yield example


def _human(row):
    winner = row("winner", TEXT)
    if winner not in ("model_a", "model_b"):
        if "tie" not in winner:
            raise row.error(f"`winner` is {winner!r}; 'model_a', 'model_b' or a tie is required")
        return Skipped("human preference is a tie")
    pair = [row("response_1", TEXT), row("response_2", TEXT)]
    return Example(
        row("prompt", TEXT), pair, [0 if winner == "model_a" else 1], "human", f"human/{row('question_id', NAME)}"
    )


def _correctness(row):
    file = row.file.lower().replace("_", "-")
    names = [name for name, title in NAMES.items() if title.lower() in file and name != "human"]
    if len(names) != 1:
        raise row.error(f"the file is called {row.file!r}; one of {[n for n in NAMES if n != 'human']} must be in it")
    (subset,) = names
    truth = row("scores", NUMBERS)
    responses = [row(f"response_{number}", TEXT) for number in range(1, len(truth) + 1)]
    conflicts = row.values.get("sampled_conflict_pairs")
    if not isinstance(conflicts, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in conflicts):
        raise row.error("`sampled_conflict_pairs` is missing, or is no list of pairs of indices")
    for pair in conflicts:
        if not all(isinstance(i, int) and 0 <= i < len(truth) for i in pair) or truth[pair[0]] == truth[pair[1]]:
            raise row.error(f"conflict pair {pair} does not name a right and a wrong response")
    if not conflicts:
        return Skipped("no conflict pair")
    meta = {
        "conflicts": conflicts,
        "pairs": [sorted(pair, key=lambda i: -truth[i]) for pair in conflicts],
        "truth": truth,
        "group": f"{subset}/{row('question_id', NAME)}",
    }
    model = f"/{row.values['model_name']}" if "model_name" in row else ""
    correct = [i for i, score in enumerate(truth) if score == max(truth)]
    return Example(row("prompt", TEXT), responses, correct, subset, meta["group"] + model, meta)


def figures(examples, scores):
    parts: dict[str, Part] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    for owner, (example, row) in enumerate(zip(examples, scores, strict=True)):
        part = parts.setdefault(example.subset, Part(1.0, [], []))
        if example.subset == "human":
            values = wins_of([example], [row])
        else:
            truth = example.meta["truth"]
            # As in the official code the prediction is "first above second", so a tie means that the second is better.
            values = [float((row[i] > row[j]) == (truth[i] > truth[j])) for i, j in example.meta["conflicts"]]
            curve = curves.setdefault(example.subset, {})
            if set(truth) == {0, 1}:
                curve.setdefault("auc", []).append(roc_auc(row, truth))
            n = 1
            while n <= len(row):
                curve.setdefault(f"best_of_{n}", []).append(best_of_n(row, truth, n))
                n *= 2
        part.values.extend(values)
        part.owners.extend([owner] * len(values))
    extra = {
        f"{name}/{subset}": sum(values) / len(values)
        for subset, curve in curves.items()
        for name, values in curve.items()
    }
    return subset_figures(parts) | extra, parts


SUITES = (
    Suite(
        name="ppe",
        measures="agreement with people and with checked answers, as it predicts RLHF",
        headline="mean of 6: accuracy of human preference and of the conflict pairs of 5 benchmarks; AUC and "
        "best-of-k beside it",
        ties="human: wrong; conflict pairs: the second response, as the official code has it",
        rows=(),
        licence="see the data's cards",
        url="https://github.com/lmarena/PPE",
        fields=(
            frozenset({"prompt", "winner", "response_1", "response_2", "question_id"}),
            frozenset({"prompt", "scores", "sampled_conflict_pairs", "response_1", "question_id"}),
        ),
        load=load,
        figures=figures,
        parts=tuple(NAMES),
        hub=(
            Source("lmarena-ai/PPE-Human-Preference-V1", None, "test", "human"),
            *(
                Source(f"lmarena-ai/PPE-{title}-Best-of-K", None, "train", title.lower())
                for name, title in NAMES.items()
                if name != "human"
            ),
        ),
    ),
)
