"""IF-RewardBench (thu-coai): answers to an instruction, and a graph that says which answer follows it better."""

from ..metrics import preference_graph
from .examples import COUNT, MAPPINGS, MESSAGES, NAME, Example, one_of, turns
from .suite import Suite, parts_by, subset_figures


TYPES = ("Single_Turn", "Multi_Turn", "System_Prompt")


def load(rows):
    for row in rows:
        answers = [answer.get("response") for answer in row("responses", MAPPINGS)]
        if not all(isinstance(answer, str) for answer in answers):
            raise row.error("a response has no text in the field `response`")
        edges = []
        for edge in row("preference_graph", MAPPINGS):
            ends = [edge.get(side, {}).get("response_id") for side in ("chosen", "rejected")]
            if not all(COUNT.holds(end) and 0 <= end < len(answers) for end in ends) or ends[0] == ends[1]:
                raise row.error(f"an edge of `preference_graph` names responses {ends} of {len(answers)}")
            edges.append(ends)
        task = row("instruction_type", one_of(*TYPES))
        best = sorted({i for i, _ in edges} - {j for _, j in edges})
        yield Example(
            turns(row("messages", MESSAGES)), answers, best, task, str(row("id", NAME)), {"pairs": edges}
        )


def figures(examples, scores):
    rankings = [
        preference_graph([row[i] - row[j] for i, j in example.pairs])
        for example, row in zip(examples, scores, strict=True)
    ]
    types = [example.subset for example in examples]
    parts = parts_by(types, (item["tau_b"] for item in rankings), weight=1.0)
    accuracies = parts_by(types, (item["accuracy"] for item in rankings))
    accuracy = sum(part.mean for part in accuracies.values()) / len(accuracies)
    more = {f"accuracy/{name}": part.mean for name, part in accuracies.items()}
    return {"accuracy": accuracy} | subset_figures(parts) | more, parts


SUITES = (
    Suite(
        name="if-rewardbench",
        measures="following of instructions, also over turns and system prompts: rankings of answers",
        headline="mean over the 3 kinds of instruction of the mean tau_b of their graphs; `accuracy` beside it",
        ties="wrong for `accuracy`; tau_b counts them in its denominator",
        rows=(),
        licence="none stated",
        url="https://github.com/thu-coai/IF-RewardBench",
        fields=(frozenset({"id", "instruction_type", "messages", "responses", "preference_graph"}),),
        load=load,
        figures=figures,
        parts=TYPES,
    ),
)
