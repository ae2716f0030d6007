"""RewardMATH: one right solution among ten."""

from ..metrics import one_to_many
from .examples import NAME, TEXT, TEXTS, Example, Kind, Source, one_of
from .suite import Suite, parts_by


SOLUTION = Kind("text or a list of steps", lambda value: TEXT.holds(value) or TEXTS.holds(value))


def load(rows):
    problems, seen = {}, {}
    for row in rows:
        steps = row("eval_solution", SOLUTION)
        text = steps if isinstance(steps, str) else "\n".join(steps)
        side = row("solution_type", one_of("chosen", "rejected"))
        name = (str(row("problem_id", NAME)), str(row("id", NAME)))
        if name in seen:
            raise row.error(f"`id` {name[1]!r} of problem {name[0]!r} is there twice, first in row {seen[name]}")
        seen[name] = row.number
        first = {"problem": row("problem", TEXT), "chosen": [], "rejected": [], "row": row}
        problem = problems.setdefault(name[0], first)
        if problem["problem"] != row.values.get("problem"):
            raise row.error(f"problem {name[0]!r} has another text than in row {problem['row'].number}")
        problem[side].append(text)
    for name, problem in problems.items():
        if len(problem["chosen"]) != 1 or not problem["rejected"]:
            raise problem["row"].error(
                f"problem {name!r} has {len(problem['chosen'])} chosen and {len(problem['rejected'])} rejected "
                "solutions; one chosen and at least one rejected are required"
            )
        yield Example(problem["problem"], [*problem["chosen"], *problem["rejected"]], [0], "", name)


def figures(examples, scores):
    chosen = [row[example.correct[0]] for example, row in zip(examples, scores, strict=True)]
    rejected = [[row[j] for j in example.wrong] for example, row in zip(examples, scores, strict=True)]
    wins, reciprocal_ranks, margins = one_to_many(chosen, rejected).T
    values = {
        "accuracy": float(wins.mean()),
        "mrr": float(reciprocal_ranks.mean()),
        "accuracy_ties_right": float((margins >= 0).mean()),
    }
    return values, parts_by(("problems" for _ in examples), wins.tolist())


SUITES = (
    Suite(
        name="rewardmath",
        measures="mathematics: the right solution among ten",
        headline="accuracy; `mrr` beside it",
        ties="wrong, and behind every equal solution in `mrr`",
        rows=(483,),
        licence="none stated",
        url="https://github.com/kimsh0507/RewardMATH_official",
        fields=(frozenset({"problem", "eval_solution", "solution_type", "problem_id", "id"}),),
        load=load,
        figures=figures,
        parts=("problems",),
        hub=(Source("RewardMATH/RewardMATH", None, "train", "train"),),
    ),
)
