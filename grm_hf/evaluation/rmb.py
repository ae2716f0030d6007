"""RMB (Zhou-Zoey): pairs and best-of-n lists over 49 scenarios, helpful and harmless."""

from .examples import MAPPING, MAPPINGS, MESSAGES, NAME, TEXT, Example, turns
from .suite import Suite, parts_by, wins_of


GOALS = ("Helpfulness", "Harmlessness")
KINDS = {"pair_uid": "Pairwise", "bon_uid": "BoN"}


def load(rows):
    for row in rows:
        path = row("category_path", TEXT).split("/")
        goal = next((goal for goal in GOALS if goal in path), None)
        if goal is None:
            raise row.error(f"`category_path` is {'/'.join(path)!r}; {' or '.join(GOALS)} must be in it")
        uid = "bon_uid" if "bon_uid" in row else "pair_uid"
        if uid == "pair_uid":
            best, losers = row("chosen", MAPPING), [row("reject", MAPPING)]
        else:
            best, losers = row("bon_best", MAPPING), row("loser_list", MAPPINGS)
        answers = [answer.get("answer") for answer in (best, *losers)]
        if not all(isinstance(answer, str) for answer in answers):
            raise row.error("an answer has no text in the field `answer`")
        prompt = turns(row("conversation_input", MESSAGES))
        rest = "/".join(path[path.index(goal) :])
        yield Example(prompt, answers, [0], f"{KINDS[uid]}/{rest}", f"{KINDS[uid]}/{row(uid, NAME)}")


def figures(examples, scores):
    wins = wins_of(examples, scores)
    parts = parts_by(("/".join(example.subset.split("/")[:2]) for example in examples), wins, weight=1.0)
    scenarios = parts_by((example.subset for example in examples), wins)
    return {f"subset/{name}": part.mean for name, part in (parts | scenarios).items()}, parts


SUITES = (
    Suite(
        name="rmb",
        measures="49 scenarios, helpful and harmless: pairs, and the best of a list",
        headline="mean of pairwise and best-of-n accuracy, each helpful and harmless",
        ties="wrong",
        rows=(),
        licence="none stated",
        url="https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark",
        fields=(
            frozenset({"pair_uid", "conversation_input", "chosen", "reject", "category_path"}),
            frozenset({"bon_uid", "conversation_input", "bon_best", "loser_list", "category_path"}),
        ),
        load=load,
        figures=figures,
        parts=tuple(f"{kind}/{goal}" for kind in KINDS.values() for goal in GOALS),
    ),
)
