"""How far a reward moves with its batch, and with bfloat16: measures, and writes docs/numerics.md.

python tests/numerics.py
"""

import platform
import tempfile
from pathlib import Path

import torch
import transformers
from tiny import BFLOAT16, FLOAT32, alone, pad, score, texts, tiny_lm

from grm_hf import GRMForSequenceClassification, GRMScorer
from grm_hf.base import load_pairs
from grm_hf.scoring.golden import FILE, HALF, TOLERANCES, _text_logp, read_rows, scale_of


SHAPES = {"tiny": {}, "small": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8)}
FAMILIES = ("llama", "gpt2", "bloom", "gemma2", "gemma3_text", "mixtral", "qwen3")
ROWS, LONGEST, BATCHES = 64, 48, (2, 8, 64)
TRAINED, PAIRS = Path(__file__).parent.parent / "models" / "grm-smollm2-135m", 50  # of the shipped test split
LAYOUTS = ("padded", "packed", "shared_prefix")

PAGE = """# How exact a score is

Written by `python tests/numerics.py`; do not edit by hand.

A reward is the same number for a text alone, in any batch, with any neighbours and any padding, up to the order in
which floating-point numbers are added. This page says how large that is. Differences are relative to
max(1, |reward|); each entry is the largest over {rows} texts of 1 to {longest} tokens, scored alone and in batches of
{batches}, padded left, right, and further than needed.

Measured with torch {torch}, transformers {transformers}, on one thread of a CPU ({machine}), on models with random
weights: "tiny" has hidden size 32 and 2 layers, "small" hidden size 256 and 8 layers. Nothing here was measured on a
GPU: kernels differ there. Rewards of these models have a standard deviation of {spread}.

## Random weights

| model | float32: batch against alone | bfloat16 body: batch against alone | bfloat16 against float32 body, alone |
|---|---|---|---|
{table}

## A trained model

`models/grm-smollm2-135m` on both answers of {pairs} pairs of the shipped test split: {texts} texts of {tokens} tokens.
Its rewards have a standard deviation of {trained[spread]:.2f}. A difference is relative to the largest reward,
{trained[scale]:.1f}, as `grm verify` counts it.

| what is compared | root mean square | largest |
|---|---|---|
{trained_table}

bfloat16 moves its golden rewards by at most {trained[golden]:.0e} of the largest of them, and the log-probability of a
response under the LM head by at most {trained[said]:.0e} of itself. In {trained[turned]} of {pairs} pairs it changes
which answer is better.

## What follows

- Tests hold the tiny models to {single:.0e} in float32 (twice that where a family rounds more often) and the tiny
  llama to {half:.0e} with a bfloat16 body, batch against alone. The small models show how both grow with width and
  depth.
- A mixture of experts moves most: a token that is close to two experts may be sent to the other one when a number
  before it is rounded differently. Score such a model in float32 if small differences matter.
- The reward head is float32 in every column: it keeps its dtype when the body is loaded in bfloat16, and it computes
  in float32 under autocast and after `.to(torch.bfloat16)`.
- `grm verify` allows {golden:.0e} with a float32 body and {golden_half:.0e} with one of half precision,
  relative to the largest stored reward, or to 1: a head with a larger range multiplies the rounding of every reward.
  It allows the same of the log-probability of a response, relative to itself.
- To compare scores across runs with different batches, load the body in float32 (`dtype=torch.float32`) or score one
  text at a time.
- Load with `dtype=torch.bfloat16`; do not load and then call `.to(torch.bfloat16)`. The latter also rounds the
  frequencies of rotary positions, which no file holds: on the {shape} llama it moves a reward by up to {cast:.0e} from
  what the same weights, saved and loaded again, give.
"""


def made(family, **overrides):
    torch.manual_seed(1)
    return GRMForSequenceClassification.from_base(
        tiny_lm(family, max_position_embeddings=128, **overrides), head_hidden_size=64
    )


def largest(found, wanted):
    return float(((found.double() - wanted.double()).abs() / wanted.abs().clamp(min=1)).max())


def moved_by_batching(model, rows, wanted):
    moved = 0.0
    for size in BATCHES:
        for left, extra in ((True, 0), (False, 0), (True, 16)):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                ids, mask = pad(part, left, width=max(map(len, part)) + extra)
                moved = max(moved, largest(score(model, ids, mask), wanted[start : start + size]))
    return moved


def measure(family, shape):
    rows = texts([1 + i * (LONGEST - 1) // (ROWS - 1) for i in range(ROWS)], seed=5)
    rows = [rows[i] for i in torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    with tempfile.TemporaryDirectory() as folder:
        made(family, **SHAPES[shape]).save_pretrained(folder)
        single, half = (
            GRMForSequenceClassification.from_pretrained(folder, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        cast = GRMForSequenceClassification.from_pretrained(folder).to(torch.bfloat16)
        cast.save_pretrained(folder)
        loaded = GRMForSequenceClassification.from_pretrained(folder)
    exact, rounded = alone(single, rows), alone(half, rows)
    return dict(
        spread=float(exact.std()),
        single=moved_by_batching(single, rows, exact),
        half=moved_by_batching(half, rows, rounded),
        dtype=largest(rounded, exact),
        cast=largest(alone(cast, rows), alone(loaded, rows)),
    )


def against(found, wanted, scale):
    """Root mean square and largest of the differences, relative to `scale`."""
    moved = (torch.tensor(found, dtype=torch.float64) - torch.tensor(wanted, dtype=torch.float64)) / scale
    return float(moved.square().mean().sqrt()), float(moved.abs().max())


def log_probabilities(scorer, rows):
    """Of each response under the LM head, as golden rows hold it."""
    encoded = [scorer.encoder.encode_chat(row) for row in rows]
    return [_text_logp(scorer.model, {"ids": list(text.ids), "start": text.start}) for text in encoded]


def measure_trained():
    pairs = load_pairs("test").shuffle(seed=0).select(range(PAIRS)).to_list()
    rows = [{"prompt": pair["prompt"], "response": pair[side]} for pair in pairs for side in ("chosen", "rejected")]
    alone_in, compared, golden, said = {}, {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        scorer = GRMScorer(str(TRAINED), dtype=dtype, deterministic=True)
        alone_in[dtype] = scorer.score(rows)
        golden[dtype] = scorer.score([row["chat"] for row in read_rows(TRAINED / FILE)["rows"]])
        said[dtype] = log_probabilities(scorer, rows)
        for layout in LAYOUTS:
            batched = GRMScorer(scorer.model, scorer.tokenizer, layout=layout, max_tokens_per_batch=2048)
            compared[f"{dtype}: batches, {layout}, against alone"] = batched.score(rows), alone_in[dtype]
    compared["bfloat16 against float32 body, alone"] = alone_in["bfloat16"], alone_in["float32"]
    scale = scale_of(alone_in["float32"])
    lengths = sorted(len(scorer.encoder.encode_chat(row).ids) for row in rows)
    better = [[a > b for a, b in zip(scores[::2], scores[1::2], strict=True)] for scores in alone_in.values()]
    return dict(
        texts=len(rows),
        tokens=f"{lengths[0]} to {lengths[-1]}",
        spread=float(torch.tensor(alone_in["float32"]).std()),
        scale=scale,
        golden=against(golden["bfloat16"], golden["float32"], scale_of(golden["float32"]))[1],
        said=max(abs(a - b) / abs(b) for a, b in zip(said["bfloat16"], said["float32"], strict=True)),
        turned=sum(a != b for a, b in zip(*better, strict=True)),
        differences={name: against(*both, scale) for name, both in compared.items()},
    )


def main():
    torch.set_num_threads(1)
    trained = measure_trained()
    found = {(family, shape): measure(family, shape) for shape in SHAPES for family in FAMILIES}
    table = "\n".join(
        f"| {family}, {shape} | {row['single']:.1e} | {row['half']:.1e} | {row['dtype']:.1e} |"
        for (family, shape), row in found.items()
    )
    spreads = [row["spread"] for row in found.values()]
    page = PAGE.format(
        rows=ROWS,
        longest=LONGEST,
        batches=" and ".join([", ".join(map(str, BATCHES[:-1])), str(BATCHES[-1])]),
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=platform.machine(),
        spread=f"{min(spreads):.2f} to {max(spreads):.2f}",
        table=table,
        pairs=PAIRS,
        texts=trained["texts"],
        tokens=trained["tokens"],
        trained=trained,
        trained_table="\n".join(
            f"| {name} | {rms:.1e} | {most:.1e} |" for name, (rms, most) in trained["differences"].items()
        ),
        single=FLOAT32,
        half=BFLOAT16,
        golden=TOLERANCES["float32"],
        golden_half=HALF,
        shape="small",
        cast=found["llama", "small"]["cast"],
    )
    (Path(__file__).parent.parent / "docs" / "numerics.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
