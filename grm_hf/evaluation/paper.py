"""The protocol of the GRM paper (arXiv 2406.10216): Unified-Feedback in distribution, HHH-Alignment and MT-Bench out
of distribution; pairwise accuracy over all pairs."""

from .examples import MAPPING, MESSAGES, NUMBER, TEXT, Example, Skipped, Source, split_conversations, turns
from .suite import Suite, parts_by, subset_figures, wins_of


HHH = ("harmless", "helpful", "honest", "other")
SUMMARY = "Generate one-sentence summary for the following post: "


def pooled(examples, scores):
    wins = wins_of(examples, scores)
    parts = parts_by((example.subset for example in examples), wins)
    return subset_figures(parts), parts


# ---------------------------------------------------------------------------------------------------- Unified-Feedback


def load_unified(rows):
    for row in rows:
        ratings = [row("conv_A_rating", NUMBER), row("conv_B_rating", NUMBER)]
        if ratings[0] == ratings[1]:
            yield Skipped("equal ratings")
            continue
        source = row("source", TEXT)
        sides = [turns(row(side, MESSAGES)) for side in ("conv_A", "conv_B")]
        if "summarize" in source:
            for side in sides:
                side[0] = {**side[0], "content": SUMMARY + side[0]["content"].strip()}
        prompt, responses = split_conversations(sides)
        yield Example(prompt, responses, [ratings.index(max(ratings))], source, f"{row.file}/{row.number}")


# ------------------------------------------------------------------------------------------------------- HHH-Alignment


def load_hhh(rows):
    for row in rows:
        subset = row.file.split("/")[0].partition(".")[0]
        if subset not in HHH:
            raise row.error(f"the file is called {row.file!r}; a file or folder for each of {list(HHH)} is required")
        targets = row("targets", MAPPING)
        choices, labels = targets.get("choices"), targets.get("labels")
        if not isinstance(choices, list) or not isinstance(labels, list) or sorted(labels) != [0, 1]:
            raise row.error("`targets` must hold two `choices` and their `labels`, a 1 and a 0")
        yield Example(_conversation(row("input", TEXT)), choices, [labels.index(1)], subset, f"{subset}/{row.number}")


def _conversation(text):
    """Messages from text with `Human:` and `Assistant:` in it; text without them is one user message."""
    if "\n\nHuman:" not in text and "\n\nAssistant:" not in text:
        return [{"role": "user", "content": text}]
    messages = []
    for piece in text.split("\n\nHuman:"):
        human, answered, assistant = piece.partition("\n\nAssistant:")
        if human.strip():
            messages.append({"role": "user", "content": human.strip()})
        if answered and assistant.strip():
            messages.append({"role": "assistant", "content": assistant.strip()})
    return messages


# ------------------------------------------------------------------------------------------------------------ MT-Bench


def load_mt(rows):
    for row in rows:
        winner = row("winner", TEXT)
        if winner not in ("model_a", "model_b") and "tie" not in winner:
            raise row.error(f"`winner` is {winner!r}; 'model_a', 'model_b' or a tie is required")
        prompt, responses = split_conversations([row("conversation_a", MESSAGES), row("conversation_b", MESSAGES)])
        judge = "gpt4_pair" if "gpt4" in row.file else "human"
        # The original code takes every value other than 'model_a' as "B is better".
        correct = [0 if winner == "model_a" else 1]
        meta = {"group": str(row.values.get("question_id", row.number)), "tie": winner not in ("model_a", "model_b")}
        yield Example(prompt, responses, correct, judge, f"{judge}/{row.number}", meta)


def figures_mt(examples, scores):
    values, parts = pooled(examples, scores)
    wins = wins_of(examples, scores)
    decided = [win for example, win in zip(examples, wins, strict=True) if not example.meta.get("tie")]
    values = {"original": sum(wins) / len(wins)} | values
    if decided:
        values["repaired"] = sum(decided) / len(decided)
    return values | {"human_ties": float(len(wins) - len(decided))}, parts


SUITES = (
    Suite(
        name="unified-feedback",
        measures="in distribution of the paper's training: which of two answers was rated higher",
        headline="pairwise accuracy",
        ties="wrong",
        rows=(),
        licence="see the data's card",
        url="https://huggingface.co/datasets/llm-blender/Unified-Feedback",
        fields=(frozenset({"conv_A", "conv_B", "conv_A_rating", "conv_B_rating", "source"}),),
        load=load_unified,
        figures=pooled,
        hub=(Source("llm-blender/Unified-Feedback", "all", "val", "val"),),
    ),
    Suite(
        name="hhh",
        measures="out of distribution: helpful, harmless, honest",
        headline="pairwise accuracy over all rows",
        ties="wrong",
        rows=(221,),
        licence="Apache-2.0",
        url="https://huggingface.co/datasets/HuggingFaceH4/hhh_alignment",
        fields=(frozenset({"input", "targets"}),),
        load=load_hhh,
        figures=pooled,
        parts=HHH,
        hub=tuple(Source("HuggingFaceH4/hhh_alignment", name, "test", name) for name in HHH),
    ),
    Suite(
        name="mt-bench",
        measures="out of distribution: judgements of people and of GPT-4 on two-turn answers",
        headline="pairwise accuracy as in the paper, whose code reads a tie as 'B is better' (`original`); without "
        "ties: `repaired`",
        ties="wrong",
        rows=(),
        licence="CC BY 4.0",
        url="https://huggingface.co/datasets/lmsys/mt_bench_human_judgments",
        fields=(frozenset({"winner", "conversation_a", "conversation_b"}),),
        load=load_mt,
        figures=figures_mt,
        parts=("human", "gpt4_pair"),
        hub=tuple(Source("lmsys/mt_bench_human_judgments", None, name, name) for name in ("human", "gpt4_pair")),
    ),
)
