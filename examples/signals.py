# /// script
# requires-python = ">=3.11"
# dependencies = ["grm-hf"]
# ///
"""Ask both heads of a Generalizable Reward Model about pairs of answers, and answer only where they agree.

    python examples/signals.py --model grm --pairs pairs.jsonl --signals likelihood judge follow_up

A pair is a row of a file (JSONL, CSV, parquet) with `prompt`, `chosen` and `rejected`, each text or messages. The
prompts are cut in two, so that no half knows a prompt of the other: the first half says from which agreement on the
reward is more often right, the second half says whether that holds.
"""

import argparse

from grm_hf import GRMScorer
from grm_hf.evaluation import Example, Results, signal_report
from grm_hf.evaluation.report import signals_text
from grm_hf.evaluation.signals import TIE
from grm_hf.metrics import selective_accuracy
from grm_hf.scoring.files import read_file


def read(path: str) -> list[Example]:
    rows = [row.content for row in read_file(path)]
    return [Example(row["prompt"], [row["chosen"], row["rejected"]], [0], id=str(i)) for i, row in enumerate(rows)]


def halves(examples: list[Example]) -> list[list[Example]]:
    prompts = list(dict.fromkeys(example.group for example in examples))
    first = set(prompts[: len(prompts) // 2])
    return [[example for example in examples if (example.group in first) is wanted] for wanted in (True, False)]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id or folder of a reward model")
    parser.add_argument("--pairs", required=True, help="file of pairs")
    parser.add_argument("--signals", nargs="+", default=["likelihood", "judge"], help="rows of grm_hf.signals.SIGNALS")
    args = parser.parse_args(argv)

    scorer, parts = GRMScorer(args.model), halves(read(args.pairs))
    first, second = (
        signal_report(scorer, Results(name, args.model, {}, part, []), args.signals)
        for name, part in zip(("first half", "second half"), parts, strict=True)
    )
    choice = first.choice()
    print(signals_text(first.summary()))
    print(f"\nfrom the first half: signals {choice['names']}, threshold {choice['threshold']}")
    if choice["threshold"] is not None:
        agreement = second.agreement(choice["names"])
        held = selective_accuracy(second.margins["head"], agreement, choice["threshold"], second.groups, TIE)
        print(f"on the second half: {held}")
    return choice


if __name__ == "__main__":
    main()
