"""The cost of a reward here and in vLLM, on the same processor: `GRMScorer`, transformers one by one (the best setting
of its pipeline), and vLLM with this package's plugin, with and without prefix caching.

    python benchmarks/serving.py --vllm .venv-vllm/bin/python            # measures (a quiet machine), then the page
    python benchmarks/serving.py --report                                # the section only, from the results file
    python benchmarks/serving.py --small [--vllm PYTHON]                 # a tiny model, one round; writes nothing

Each side is a separate process. It loads the model once and scores the cases on request; the sides take turns in each
round. A figure is processor seconds of one thread, the median over the rounds. vLLM's cache is emptied before each
case, as for a trainer's new prompts. If rewards differ, nothing is written.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from sections import ROOT, write_section


RESULTS = ROOT / "docs" / "results" / "serving.json"
SIDES = {  # name: whether it is vLLM, dtype, settings
    "GRMScorer": (False, "float32", {}),
    "transformers, one by one": (False, "float32", {}),
    "vLLM": (True, "float32", {"enable_prefix_caching": False}),
    "vLLM, prefix caching": (True, "float32", {"enable_prefix_caching": True}),
    "GRMScorer, bfloat16": (False, "bfloat16", {}),
    "vLLM, bfloat16": (True, "bfloat16", {"enable_prefix_caching": True}),
}
# Case: the least ratio of GRMScorer's speed to the faster vLLM's, same dtype.
GOALS = {"16 unrelated": 0.95, "best of 16": 1.1, "best of 64": 1.1}
BF16_GOAL = 2.0  # speed of GRMScorer in bfloat16 over float32
AGREE = {"float32": 1e-4, "bfloat16": 5e-2}  # of rewards, relative to max(1, |reward|)


# --------------------------------------------------------------------------------------------------------------- texts


def cases(vocabulary: int, small: bool) -> dict[str, list[list[int]]]:
    """Token ids: unrelated texts of about 250 tokens, and answers of about 200 behind one prompt of 300."""
    rng = random.Random(0)
    unit = 1 if not small else 10

    def tokens(count: float) -> list[int]:
        return [rng.randrange(vocabulary // 2, vocabulary) for _ in range(max(4, round(count / unit)))]

    made = {"16 unrelated": [tokens(rng.uniform(100, 400)) for _ in range(16)]}
    for count in (16, 64):
        prompt = tokens(300)
        made[f"best of {count}"] = [prompt + tokens(rng.lognormvariate(5.15, 0.5)) for _ in range(count)]
    return made


# --------------------------------------------------------------------------------------------------------------- sides


def work(side: str, folder: str, texts: dict[str, list[list[int]]]) -> None:
    """Loads the model, then for each line of standard input scores every case and prints seconds and rewards."""
    engine, dtype, settings = SIDES[side]
    score = (vllm_scorer if engine else own_scorer)(side, folder, dtype, settings)
    for _ in sys.stdin:
        done = {}
        for case, ids in texts.items():
            prepare = getattr(score, "prepare", None)
            if prepare:
                prepare()
            start = time.process_time()
            rewards = score(ids)
            done[case] = {"seconds": time.process_time() - start, "rewards": rewards}
        print("DONE " + json.dumps(done), flush=True)


def own_scorer(side, folder, dtype, settings):
    import torch

    from grm_hf import GRMScorer

    torch.set_num_threads(1)
    scorer = GRMScorer(folder, dtype=dtype)
    if not side.startswith("transformers"):
        return scorer.rewards_of_ids

    def one_by_one(texts):  # the best setting of the pipeline on a CPU: a forward each, no padding
        with torch.inference_mode():
            return [scorer.model(input_ids=torch.tensor([ids])).logits.item() for ids in texts]

    return one_by_one


def vllm_scorer(side, folder, dtype, settings):
    from vllm import LLM

    llm = LLM(folder, runner="pooling", dtype=dtype, enforce_eager=True, disable_log_stats=True, **settings)

    def score(texts):
        prompts = [{"prompt_token_ids": ids} for ids in texts]
        return [output.outputs.probs[0] for output in llm.classify(prompts, use_tqdm=False)]

    score.prepare = llm.reset_prefix_cache
    return score


class Side:
    """The process of a side."""

    def __init__(self, name: str, python: str, folder: str, texts: Path, log: Path):
        from grm_hf.serving.server import MEMORY

        self.name = name
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            **{name: str(value) for _, name, value in MEMORY},
        }
        self.log = open(log, "w")
        self.process = subprocess.Popen(
            [python, __file__, "--work", name, "--folder", folder, "--texts", str(texts)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def go(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("DONE "):
                return json.loads(line.removeprefix("DONE "))
        raise SystemExit(f"{self.name} stopped; see {self.log.name}:\n{Path(self.log.name).read_text()[-2000:]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


# ------------------------------------------------------------------------------------------------------------- measure


def make_model(folder: Path, small: bool) -> int:
    """A reward model with a random head on the real base (or a tiny one); returns the size of its vocabulary."""
    import torch
    from transformers import AutoTokenizer

    from grm_hf import GRMForSequenceClassification

    torch.manual_seed(0)
    if small:
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny import llama_tokenizer, tiny_lm

        tokenizer = llama_tokenizer()
        base = tiny_lm(
            "llama", vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=2048,
        )  # fmt: skip
    else:
        from grm_hf.base import folder as smollm2

        base, tokenizer = str(smollm2()), AutoTokenizer.from_pretrained(smollm2())
    model = GRMForSequenceClassification.from_base(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.config.vocab_size


def measure(vllm: str | None, rounds: int, small: bool) -> dict:
    import torch
    import transformers

    names = [name for name, (engine, _, _) in SIDES.items() if vllm or not engine]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        texts = cases(make_model(folder, small), small)
        (Path(place) / "texts.json").write_text(json.dumps(texts))
        python = {name: str(vllm) if SIDES[name][0] else sys.executable for name in names}
        sides = []
        try:
            for name in names:
                log = Path(place) / f"{len(sides)}.log"
                sides.append(Side(name, python[name], str(folder), Path(place) / "texts.json", log))
            for side in sides:
                side.go()  # warm
            found = [{side.name: side.go() for side in sides} for _ in range(rounds)]
        finally:
            for side in sides:
                side.close()
    check_rewards(found)
    return {
        "seconds": {
            case: {name: median(one[name][case]["seconds"] for one in found) for name in names} for case in texts
        },
        "tokens": {case: sum(map(len, rows)) for case, rows in texts.items()},
        "rounds": rounds,
        "products": products(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "vllm": version_of(vllm)},
        "processor": processor(),
    }


def products() -> dict[str, float]:
    """GFLOP/s of one thread in a linear layer of the model, by the library that the scorer uses."""
    import torch

    from grm_hf.products import quick_products

    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for dtype in ("float32", "bfloat16"):
        x, weight = (torch.randn(*size, dtype=getattr(torch, dtype)) for size in ((1000, 576), (1536, 576)))
        seconds = []
        with torch.no_grad(), quick_products(x.device, len(x)):
            for _ in range(50):
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds.append(time.perf_counter() - start)
        found[dtype] = 2 * x.numel() * len(weight) / median(seconds) / 1e9
    torch.set_num_threads(threads)
    return found


def check_rewards(found: list[dict]) -> None:
    """Every side must give the rewards of the first one."""
    first = next(iter(found[0].values()))
    for one in found:
        for name, done in one.items():
            for case, result in done.items():
                for ours, theirs in zip(first[case]["rewards"], result["rewards"], strict=True):
                    if not abs(ours - theirs) <= AGREE[SIDES[name][1]] * max(1.0, abs(ours)):
                        raise SystemExit(f"{name} gives {theirs} for {ours} in '{case}': nothing is written.")


def version_of(python: str | None) -> str | None:
    if python is None:
        return None
    code = "import vllm; print(vllm.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


# -------------------------------------------------------------------------------------------------------------- report


def report(results: dict) -> str:
    """The section of the page."""
    names = list(next(iter(results["seconds"].values())))
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    lines = [
        "## Serving: here and in vLLM",
        "",
        "`python benchmarks/serving.py --vllm PYTHON`: processor seconds of one thread, median of "
        f"{results['rounds']} rounds in which the sides took turns. {results['processor']}; {versions}. "
        "SmolLM2-135M with a default MLP head. Every process keeps freed memory, as `grm serve` does. Rewards of all "
        "sides agree.",
        "",
        f"| case | tokens | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for case, seconds in results["seconds"].items():
        best = min(seconds[name] for name in names if SIDES[name][1] == "float32")
        cells = [f"**{seconds[n]:.2f}**" if seconds[n] == best else f"{seconds[n]:.2f}" for n in names]
        lines.append(f"| {case} | {results['tokens'][case]} | {' | '.join(cells)} |")
    single, half = (results["products"][dtype] for dtype in ("float32", "bfloat16"))
    lines += [
        "",
        f"The fastest in float32 is bold. A linear layer alone runs at {single:.0f} GFLOP/s in float32 and at "
        f"{half:.0f} in bfloat16 on this processor, {half / single:.1f} times as fast.",
        "",
        "| goal | measured | |",
        "|---|---|---|",
    ]
    for what, ratio, goal in verdicts(results):
        lines.append(f"| {what}: at least {goal} | {ratio:.2f} | {'met' if ratio >= goal else '**not met**'} |")
    return "\n".join(lines)


def verdicts(results: dict) -> list[tuple[str, float, float]]:
    """What is compared, the ratio of speeds, and the goal."""
    found = []
    for case, goal in GOALS.items():
        seconds = results["seconds"][case]
        theirs = [value for name, value in seconds.items() if SIDES[name][:2] == (True, "float32")]
        if theirs:
            found.append((f"{case}, speed over the faster vLLM", min(theirs) / seconds["GRMScorer"], goal))
        ratio = seconds["GRMScorer"] / seconds["GRMScorer, bfloat16"]
        found.append((f"{case}, bfloat16 over float32", ratio, BF16_GOAL))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="python of an environment with vLLM (`make vllm` builds .venv-vllm)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--report", action="store_true")
    for hidden in ("--work", "--folder", "--texts"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.folder, json.loads(Path(args.texts).read_text()))
        return
    if args.small:
        print(report(measure(args.vllm, 1, small=True)))
        return
    if not args.report:
        if not args.vllm:
            parser.error("the page compares with vLLM: --vllm PYTHON")
        results = measure(args.vllm, args.rounds, small=False)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_section("serving", report(results))
    print(report(results))


if __name__ == "__main__":
    main()
