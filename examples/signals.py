# /// script
# requires-python = ">=3.11"
# dependencies = ["grm-hf"]
# ///
"""Ask both heads of a Generalizable Reward Model about pairs of answers, and answer only where they agree.

    python examples/signals.py --model grm --pairs pairs.jsonl --signals likelihood judge follow_up

A pair is a line with `prompt`, `chosen` and `rejected`, each text or messages. The pairs are cut in two: the first
half says from which agreement on the reward is more often right, the second half says whether that holds.
"""

import argparse
import json
from pathlib import Path

from grm_hf import GRMScorer
from grm_hf.evaluation import Example, Results, signal_report
from grm_hf.evaluation.report import signals_text
from grm_hf.metrics import selective_accuracy


def read(path: Path) -> list[Example]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Example(row["prompt"], [row["chosen"], row["rejected"]], [0], id=str(i)) for i, row in enumerate(rows)]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id or folder of a reward model")
    parser.add_argument("--pairs", required=True, type=Path, help="JSONL file")
    parser.add_argument("--signals", nargs="+", default=["likelihood", "judge"], help="rows of grm_hf.signals.SIGNALS")
    args = parser.parse_args(argv)

    scorer, examples = GRMScorer(args.model), read(args.pairs)
    half = len(examples) // 2
    first, second = (
        signal_report(scorer, Results(name, args.model, {}, part, []), args.signals)
        for name, part in (("first half", examples[:half]), ("second half", examples[half:]))
    )
    choice = first.choice()
    print(signals_text(first.summary()))
    print(f"\nfrom the first half: signals {choice['names']}, threshold {choice['threshold']}")
    if choice["threshold"] is not None:
        agreement = second.agreement(choice["names"])
        held = selective_accuracy(second.margins["head"], agreement, choice["threshold"], second.groups)
        print(f"on the second half: {held}")
    return choice


if __name__ == "__main__":
    main()
