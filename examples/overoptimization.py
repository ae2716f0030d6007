# /// script
# requires-python = ">=3.11"
# dependencies = ["grm-hf[demo]"]
# ///
"""How far can a policy be pushed towards a learned reward before the true one falls? This runs the over-optimisation
laboratory with your own gold reward, a function of two strings. Here it favours short answers that repeat no word.

    python examples/overoptimization.py --output runs/overoptimization --quick

The report is `report.html` in the output folder. `grm lab` does the same from the command line, also with a reward
model as gold and with your own policy and prompts: see docs/overoptimization.md.
"""

import argparse

from grm_hf.lab.run import make_settings, run


def gold(prompt: str, response: str) -> float:
    """The share of words that are new, minus a little for each word."""
    words = response.lower().split()
    return (len(set(words)) / len(words) if words else 0.0) - 0.02 * len(words)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="runs/overoptimization", help="folder of the run")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--settings", help="JSON file with any of the settings in grm_hf/lab/settings.py")
    args = parser.parse_args(argv)
    return run(args.output, make_settings(args.quick, args.settings, gold="overoptimization:gold"))


if __name__ == "__main__":
    main()
