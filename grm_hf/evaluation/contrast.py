"""Contrast Instructions (arXiv 2309.16155): two similar instructions, each with its own answer."""

from .examples import TEXT, Example
from .suite import Suite, parts_by


# The official code writes this in front of the instruction, by the task in the file's name.
PREFIXES = {
    "stack": "Question: ",
    "wmt": "",
    "para": "Paraphrase the following sentence: ",
    "sum": "Summarize the paragraph: ",
}
OWN = [0, 2]  # the answers to their own instruction; 1 and 3 are the other instruction's


def load(rows):
    for row in rows:
        task = row.file.split("/")[-1].split("_")[0]
        if task not in PREFIXES:
            raise row.error(
                f"the file is called {row.file!r}; <task>_contrast.json is required, with one of {list(PREFIXES)}"
            )
        (query, own), (other, others) = (
            (row(side, TEXT), row(f"{side}_response_k", TEXT)) for side in ("query", "retrieval")
        )
        chats = [
            [{"role": "user", "content": PREFIXES[task] + instruction}, {"role": "assistant", "content": answer}]
            for instruction, answer in ((query, own), (query, others), (other, others), (other, own))
        ]
        # Where the instructions are equal (some official rows), `c_ins` compares a text with itself: a tie, so wrong.
        # Right against wrong answer to one instruction, then the answer at its own against the other instruction.
        pairs = [[0, 1], [2, 3], [0, 3], [2, 1]]
        yield Example([], chats, OWN, task, f"{task}/{row.number}", {"pairs": pairs, "group": f"{task}/{row.number}"})


def figures(examples, scores):
    wins = [[float(row[i] > row[j]) for i, j in e.pairs] for e, row in zip(examples, scores, strict=True)]
    tasks = [example.subset for example in examples]
    kinds = {
        "c_res": parts_by(tasks, (sum(row[:2]) / 2 for row in wins)),
        "c_ins": parts_by(tasks, (sum(row[2:]) / 2 for row in wins)),
    }
    values = {}
    for kind, parts in kinds.items():
        values[kind] = sum(part.mean for part in parts.values()) / len(parts)
        values |= {f"{kind}/{task}": part.mean for task, part in parts.items()}
    return values, parts_by(tasks, (sum(row) / 4 for row in wins), weight=1.0)


SUITES = (
    Suite(
        name="contrast",
        measures="consistency: an answer belongs to its own instruction and not to one that is like it",
        headline="mean of `c_res` and `c_ins`, each the mean over the tasks (the paper gives no single number)",
        ties="wrong",
        rows=(2125,),
        licence="none stated",
        url="https://github.com/shadowkiller33/Contrast-Instruction",
        fields=(frozenset({"query", "retrieval", "query_response_k", "retrieval_response_k"}),),
        load=load,
        figures=figures,
        parts=tuple(PREFIXES),
    ),
)
