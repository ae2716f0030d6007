"""Makes the preference pairs of the package, `grm_hf/base/pairs/*.parquet`, from `shared/data` beside the repository.

    python benchmarks/shipped_pairs.py [--output grm_hf/base/pairs]

Only sources whose licence allows it (grm_hf/base/pairs/NOTICE names them), only short pairs (prompt and response have
at most 1,000 characters), and none whose prompt or responses match `OFFENSIVE`. No prompt is in two splits. The test
split holds prompts that the study of `benchmarks/real_base.py` tests on, and no others; it trains on none of them.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from real_base import ROOT, first_user_turn, short_rows, split, test_rows


OUTPUT = ROOT / "grm_hf" / "base" / "pairs"
# Coarse on purpose: it is better to leave out one pair too many than one too few.
OFFENSIVE = re.compile(
    r"kill|murder|suicid|weapon|bomb|shoot|stab|rape|\bsex|porn|nude|naked|fuck|shit|bitch|cunt|slut|whore|racis|nazi"
    r"|hitler|\bdrugs?\b|cocaine|heroin|abus|terror|poison|steal|rob\b|robb|hack|illegal|crimin|torture|slave|genocid"
    r"|kidnap|molest|blackmail|stalk|corpse|\bdamn|\bass\b|asshole|dick\b|nigg|fag|retard|drunk|bully|scam|shoplift"
    r"|home address|smuggl|suffocat|strangl|arson|meth\b|ransom|insult|hatred|penis|vagina|devil|counterfeit|dirty"
    r"|decapitat|\bblacks\b|\bjewish\b|immigra|despise|credit card number|cheating on|impersonat",
    re.IGNORECASE,
)
SOURCES = {"pandalm": "pandalm_testset", "gsm8k": "gsm8k_solutions", "ultrafeedback": "ultrafeedback_train"}
VALIDATION = {"pandalm": 100, "gsm8k": 60, "ultrafeedback": 20}  # pairs, whole prompts


def is_offensive(row: dict) -> bool:
    messages = (*row["prompt"], *row["chosen"], *row["rejected"])
    return any(OFFENSIVE.search(message["content"]) for message in messages)


def without(rows: list[dict], turns: set[str]) -> list[dict]:
    return [row for row in rows if first_user_turn(row) not in turns]


def kept(source: str, rows: list[dict]) -> list[dict]:
    names = ("id", "prompt", "chosen", "rejected", "subset")
    return [{name: row[name] for name in names} | {"source": source} for row in rows if not is_offensive(row)]


def splits() -> dict[str, list[dict]]:
    result: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    tests = {name: test_rows(name) for name in ("pandalm", "gsm8k", "hhh")}
    tested = {first_user_turn(row) for name in tests for row in tests[name]}
    for source, file in SOURCES.items():
        rows = without(split("pandalm")[0] if source == "pandalm" else short_rows(file), tested)
        held = {first_user_turn(row) for row in rows[: VALIDATION[source]]}
        result["validation"] += kept(source, [row for row in rows if first_user_turn(row) in held])
        result["train"] += kept(source, without(rows, held))
    for source, rows in tests.items():
        result["test"] += kept(source, rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pairs that come with the package.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    for name, rows in splits().items():
        path = args.output / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
        print(f"{path}: {dict(Counter(row['source'] for row in rows))}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
