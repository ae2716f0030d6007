"""Keeps a finished run of `make lab` in docs/results/lab.json.

    python benchmarks/lab.py        # takes over runs/lab/results.json
    python benchmarks/results.py    # its page
"""

import json

from sections import ROOT


RUN = ROOT / "runs" / "lab" / "results.json"
RESULTS = ROOT / "docs" / "results" / "lab.json"


def kept(results: dict) -> dict:
    """The results without the curves of single proxies, which the run's CSV files hold."""
    rows = [{name: value for name, value in row.items() if not name.endswith("_curve")} for row in results["rows"]]
    return results | {"rows": rows}


def main() -> None:
    results = json.loads(RUN.read_text(encoding="utf-8"))
    if missing := {"grpo", "ppo"} - set(results["policy_trl"]):
        raise SystemExit(f"The run lacks {sorted(missing)}: finish it with `make lab`.")
    RESULTS.write_text(json.dumps(kept(results)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
