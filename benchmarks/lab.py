"""The section of docs/results.md on over-optimisation, from a finished run of `make lab`.

    python benchmarks/lab.py             # takes over runs/lab/results.json, then writes the section
    python benchmarks/lab.py --report    # the section only, from docs/results/lab.json
"""

import argparse
import json

from results_page import ROOT, write_section

from grm_hf.lab.report import section


RUN = ROOT / "runs" / "lab" / "results.json"
RESULTS = ROOT / "docs" / "results" / "lab.json"


def kept(results: dict) -> dict:
    """What the section is a function of: all but the curves of single proxies, which the run's CSV files hold."""
    rows = [{name: value for name, value in row.items() if not name.endswith("_curve")} for row in results["rows"]]
    return results | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--report", action="store_true", help="only write the section in docs/results.md")
    if not parser.parse_args().report:
        results = json.loads(RUN.read_text(encoding="utf-8"))
        if missing := {"grpo", "ppo"} - set(results["policy_trl"]):
            raise SystemExit(f"The run lacks {sorted(missing)}: finish it with `make lab`.")
        RESULTS.write_text(json.dumps(kept(results)) + "\n", encoding="utf-8")
    write_section("lab", section(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
