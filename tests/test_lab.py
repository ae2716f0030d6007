"""The over-optimisation laboratory: its statistics against other computations, its gold rewards and their errors, and
the whole of it at toy size, also killed and resumed, and continued where PPO is."""

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import chatml_tokenizer, tiny_lm


pytest.importorskip("trl", reason="needs the extra `train`")

from transformers import LlamaConfig, LlamaForSequenceClassification  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMScorer, cli  # noqa: E402
from grm_hf.lab import answers as lab_answers  # noqa: E402
from grm_hf.lab import findings, policies, proxies, report, run  # noqa: E402
from grm_hf.lab import gold as lab_gold  # noqa: E402
from grm_hf.lab import settings as lab_settings  # noqa: E402
from grm_hf.lab.settings import Settings  # noqa: E402
from grm_hf.metrics import best_of_n  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
TOY = {
    "pretrain_steps": 5,
    "sizes": [8],
    "seeds": 2,
    "members": 2,
    "eval_limit": 2,
    "samples": 12,
    "max_n": 10,
    "max_new_tokens": 12,
    "epochs": 1,
    "batch_size": 8,
    "policy_size": 8,
    "policy_proxies": ["bt", "ensemble_min"],
    "policy_steps": 2,
    "policy_batch": 4,
    "generations": 2,
    "evaluations": 1,
    "policy_samples": 2,
}
GOLD = "overoptimization:gold"  # of the example


# ---------------------------------------------------------------------------------------------------------- statistics


def test_difference_is_the_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [0.5, 0.75, 0.25, 1.0, 0.5], [0.25, 0.5, 0.125, 0.5, 0.375]
    found = findings.difference(ours, theirs, sign=1)
    test = stats.ttest_rel(ours, theirs)
    assert found["p"] == pytest.approx(test.pvalue, rel=1e-6)
    assert (found["low"], found["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-6)
    assert found["verdict"] == "better" and findings.difference(ours, theirs, sign=-1)["verdict"] == "worse"
    assert findings.difference(theirs, ours, sign=1)["verdict"] == "worse"
    assert findings.difference([0.5, 0.0, 0.75], [0.25, 0.5, 0.5], sign=1)["verdict"] == findings.SAME
    assert findings.difference([1.0, 2.0], [0.5, 1.5], sign=1)["verdict"] == findings.SAME  # no spread, no interval


def test_holm_steps_down_and_stops():
    rows = [{"p": p} for p in (0.04, 0.012, 0.001, 0.03)]
    findings.holm(rows)  # against 0.0125, 0.0167, 0.025 (0.03 fails), and nothing after that
    assert [row["holm"] for row in rows] == [False, True, True, False]


def results_of(gold):
    """Results in which gold at the largest n is `gold(method, seed, set, labels, size)`, and all else equal."""
    settings = {"seeds": 3, "sizes": [10, 20], "policy_proxies": ["bt", "sft"], "max_n": 4}
    rows = []
    for key, labels, size, method, seed in itertools.product(
        ("id", "ood"), proxies.LABELS, settings["sizes"], proxies.NAMES, range(3)
    ):
        value = gold(method, seed, key, labels, size)
        row = {"set": key, "labels": labels, "size": size, "method": method, "seed": seed}
        rows.append(row | {"accuracy": 0.75, "gold": value, "drop": 0.25})
    results = {"settings": settings, "ns": [1, 4], "sets": {"id": {}, "ood": {}}, "rows": rows}
    results |= {"policies": [], "wins": [], "policy_trl": {}}
    results["comparisons"] = findings.compare(results)
    results["policy_comparisons"] = findings.compare_policies(results)
    return results


def test_comparisons_are_paired_by_seed_and_counted():
    noise = [0.5, 5.0, -3.0]  # alike for all methods of a seed: pairing removes it
    extra = {"sft": [1.0, 1.25, 1.5], "dpo": [-1.0, -1.25, -1.5]}
    results = results_of(
        lambda method, seed, key, labels, size: noise[seed] + (key == "ood") * extra.get(method, [0.0] * 3)[seed]
    )
    found = {
        (c["set"], c["method"], c["size"]): c["verdict"]
        for c in results["comparisons"]
        if c["quantity"] == "gold" and c["labels"] == "clean"
    }
    assert found["ood", "sft", 10] == found["ood", "sft", "all"] == "better" and found["ood", "dpo", 20] == "worse"
    assert {v for (key, method, _), v in found.items() if key == "id" or method == "margin"} == {findings.SAME}
    text = "\n".join(findings.findings(results))
    # 9 methods, 2 sets, 2 labels: 36 comparisons of averages and, with 2 sizes, 72 of cells.
    assert "72 in single cells of labels, size and set: 4 better, 4 worse, 64 no difference shown by uncorr" in text
    assert "36 averaged over the sizes: 2 better, 2 worse, 32 no difference shown by uncorrected" in text
    assert "is better than Bradley-Terry's (uncorrected) for GRM sft, out-of-distribution, clean labels, +1.25" in text
    assert "is worse than Bradley-Terry's (uncorrected) for GRM dpo, out-of-distribution, clean labels, -1.25" in text
    # With 3 seeds an interval is 4.303 * 0.25 / sqrt(3) to either side for sft and dpo, and 0 for all others.
    assert "gold is 0.00 in single cells and 0.00 averaged over the sizes" in text
    # GRM: 5 methods in 8 cells.
    assert "of 40 cells of a GRM method" in text
    assert "32 show no difference in gold at 4 from Bradley-Terry, and 4 are worse" in text
    assert "No GRM method is better than Bradley-Terry at 4 with: in-distribution, clean labels, 10" in text
    assert "PPO was not run" in text and "grm-hf[ppo]" in text


def test_policies_are_compared_by_every_pair_of_answers(tmp_path):
    settings = Settings(
        seeds=2, policy_proxies=("bt", "sft"), policy_samples=2, policy_steps=1, evaluations=1, prompts="p", gold="g:g"
    )
    (tmp_path / "units").mkdir()

    def put(name, **found):
        lab_settings.unit_file(tmp_path, name).write_text(json.dumps(found | {"versions": {"trl": "1.16.0"}}))

    put("candidates-test", gold=[[0.0, 0.0, 9.0], [1.0, 1.0, 9.0]])  # the first two are the initial policy's
    for seed in range(2):
        for proxy, gold in (("bt", [[0.0, 1.0], [1.0, 2.0]]), ("sft", [[1.0, 2.0], [1.0, 1.0]])):
            points = [[0, 0.0, 1.0, 0.5, 3.0], [1, 0.25, 3.0, 1.5, 3.0]]
            put(policies.policy_name("grpo", proxy, seed), sets={"test": {"points": points, "gold": gold}})
    found = findings._policy_rows(tmp_path, settings, {"test": {"gold_std": 2.0}})
    assert found["policy_trl"] == {"grpo": ["1.16.0"]}
    assert found["policies"][0]["points"] == [[0, 0.0, 0.0, 0.0, 3.0], [1, 0.25, 2.0, 0.5, 3.0]]
    wins = {(w["a"], w["b"]): (w["win"], w["tie"], w["loss"]) for w in found["wins"] if w["seed"] == 0}
    # First prompt: 0 and 1 against 1 and 2, the second: 1 and 2 against 1 and 1.
    assert wins["bt", "sft"] == (2 / 8, 3 / 8, 3 / 8)
    assert wins["sft", findings.INITIAL] == (4 / 8, 4 / 8, 0.0)


# ----------------------------------------------------------------------------------------------- policies and answers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a hardly trained base and what is drawn from it, in the demo world."""
    folder = tmp_path_factory.mktemp("world")
    settings = run.make_settings(**TOY)
    run._check_folder(folder, settings)
    for unit in [unit for stage in run.plan(settings, [])[:2] for unit in stage]:
        run.finish(unit, folder, settings)
    return folder, settings


def test_answers_and_their_gold(world):
    folder, settings = world
    model, tokenizer = lab_answers.load_base(folder, settings)
    found = lab_settings.read_unit(folder, "candidates-ood")
    assert np.shape(found["gold"]) == (2, 12)
    text = tokenizer.decode(found["answers"][1][3], skip_special_tokens=True)
    assert found["gold"][1][3] == lab_settings.WORLD.gold(found["prompts"][1], text)
    for answers in found["answers"]:
        for ids in answers:
            assert len(ids) <= 12 and tokenizer.eos_token_id not in ids[:-1]
    assert found["prompt_ids"][0] == tokenizer.apply_chat_template(
        [{"role": "user", "content": found["prompts"][0]}], add_generation_prompt=True, return_dict=False
    )
    assert lab_answers.sample(model, tokenizer, ["hello"], 3, 12, seed=1) == lab_answers.sample(
        model, tokenizer, ["hello"], 3, 12, seed=1
    )
    train, sets = lab_settings.prompts_of(settings)
    assert not set(train) & {prompt for prompts in sets.values() for prompt in prompts}


def test_pairs_are_ordered_by_gold_and_of_a_seed(world):
    folder, settings = world
    one, other = (lab_settings.read_unit(folder, f"pairs-{seed}")["rows"] for seed in range(2))
    assert len(one) == 8 and one != other
    for row in one:
        better, worse = (lab_settings.WORLD.gold(row["prompt"], row[side]) for side in ("better", "worse"))
        assert better - worse == pytest.approx(row["gap"]) and row["gap"] > 0


def test_sampling_follows_the_policy(world):
    model, tokenizer = lab_answers.load_base(*world)
    ids = torch.tensor([lab_answers.prompt_ids(tokenizer, "hello")])
    expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    first = torch.tensor([answer[0] for answer in lab_answers.sample(model, tokenizer, ["hello"], 4000, 1, seed=0)[0]])
    found = torch.bincount(first, minlength=len(expected)) / 4000
    assert (found - expected).abs().sum() < 3 * math.sqrt(len(expected) / 4000)  # neither top-k nor a temperature
    assert (found > 0).sum() > 50  # generate's own default would keep 50 tokens


def test_divergence_is_that_of_the_distributions_of_answers(world):
    initial, tokenizer = lab_answers.load_base(*world)
    prompt = lab_answers.prompt_ids(tokenizer, "hello")
    policy = type(initial)(initial.config).eval()
    answers = [[7, 8, tokenizer.eos_token_id], [9], [7, 10, 11, 12]]
    expected = []
    for answer in answers:  # each answer alone, unpadded, in float64
        ids = torch.tensor([[*prompt, *answer]])
        ours, theirs = (
            m.double()(input_ids=ids).logits[0, len(prompt) - 1 : -1].softmax(-1) for m in (policy, initial)
        )
        expected.append((ours * (ours / theirs).log()).sum().item())
    policy.float(), initial.float()
    assert lab_answers.divergences(policy, initial, prompt, answers) == pytest.approx(expected, rel=1e-4)
    assert lab_answers.divergences(initial, initial, prompt, answers) == [0.0] * 3


# ------------------------------------------------------------------------------------------------------------- proxies


def test_a_quarter_of_the_labels_is_turned_around(world):
    folder, settings = world
    pairs = lab_settings.read_unit(folder, "pairs-0")["rows"]
    clean, flipped = (proxies.training_rows(settings, pairs, labels, 8, 0) for labels in proxies.LABELS)
    content = [[row[side][0]["content"] for side in ("chosen", "rejected")] for row in clean]
    assert content == [[row["better"], row["worse"]] for row in pairs]
    both = list(zip(clean, flipped, strict=True))
    assert sum(a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] for a, b in both) == 2
    assert sum(a == b for a, b in both) == 6
    assert [row["margin"] for row in clean] == [row["margin"] for row in flipped]
    assert np.mean([row["margin"] for row in clean]) == pytest.approx(1.0)


def test_curves_of_a_proxy_that_knows_gold_and_of_one_that_hates_it(world):
    folder, settings = world
    gold = {key: np.array(lab_settings.read_unit(folder, f"candidates-{key}")["gold"]) for key in settings.sets}
    found = proxies.measure(gold, folder, settings)["sets"]["id"]
    assert found["proxy"] == found["gold"] and found["accuracy"] == 1.0
    assert found["gold"][0] == pytest.approx(gold["id"].mean()) and (np.diff(found["gold"]) >= 0).all()
    assert found["gold"][-1] == pytest.approx(np.mean([best_of_n(row, row, 10) for row in gold["id"]]))
    worst = proxies.measure({key: -values for key, values in gold.items()}, folder, settings)["sets"]["id"]
    assert worst["accuracy"] == 0.0 and worst["gold"][-1] < worst["gold"][0]


# -------------------------------------------------------------------------------------------------------------- errors


def nan(prompt, response):
    return math.nan


def broken(prompt, response):
    raise KeyError("no such word")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("test_lab:nan", r"gave nan for the prompt 'why' and the response 'so'"),
        ("test_lab:broken", r"raised KeyError .* for the prompt 'why' and the response 'so'"),
        ("test_lab:missing", "was not found"),
        ("no_such_module:gold", "was not found"),
        ("test_lab:ROOT", "not a function"),
    ],
)
def test_a_gold_reward_that_cannot_be_used(source, message):
    with pytest.raises(ValueError, match=message):
        lab_gold.load_gold(source)([("why", "so")])


def test_a_reward_model_as_gold(tmp_path):
    tokenizer = chatml_tokenizer()
    base = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    model = GRMForSequenceClassification.from_base(base)
    plain, several = (
        LlamaForSequenceClassification(LlamaConfig(**base.config.to_dict() | {"num_labels": n})) for n in (1, 3)
    )
    for name, saved in (("grm", model), ("plain", plain), ("several", several)):
        saved.config.pad_token_id = tokenizer.pad_token_id
        saved.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [("why", "so"), ("why", "because"), ("why", "")]
    found = lab_gold.load_gold(str(tmp_path / "grm"))(rows)
    assert found[:2] == GRMScorer(str(tmp_path / "grm")).score([{"prompt": p, "response": r} for p, r in rows[:2]])
    assert math.isfinite(found[2])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}], return_dict=False
    )
    with torch.no_grad():
        expected = plain.eval()(input_ids=torch.tensor([ids])).logits.item()
    assert lab_gold.load_gold(str(tmp_path / "plain"))(rows)[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="3 outputs; a reward model has one"):
        lab_gold.load_gold(str(tmp_path / "several"))


def test_a_gold_reward_that_tells_nothing_apart(world, monkeypatch):
    folder, settings = world
    monkeypatch.setattr(lab_gold, "load_gold", lambda source: lambda rows: [0.0] * len(rows))
    with pytest.raises(ValueError, match="8 pairs are required, .* pairs .* equal gold rewards, were identical"):
        lab_answers.draw_pairs(folder, settings, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 1}, "at least 2"),
        ({"members": 1}, "at least 2"),
        ({"samples": 100}, "`samples` is 100 and `max_n` 405"),
        ({"policy_size": 77}, "one of `sizes`"),
        ({"flipped": 0.5}, "below 0.5"),
        ({"policy_samples": 9999}, "above `samples`"),
        ({"evaluations": 7}, "must divide"),
        ({"model": "m", "learning_rate": 1e-5, "policy_learning_rate": 1e-6}, "needs `prompts` and `gold`"),
        ({"model": "m"}, "learning_rate and policy_learning_rate in --settings"),
        ({"eval_prompts": str(ROOT / "README.md")}, "needs `prompts`"),
        ({"prompts": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
    ],
)
def test_settings_without_meaning(given, message):
    with pytest.raises(ValueError, match=message):
        run.make_settings(**given)


def test_prompts_of_ones_own(tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    train = write("train.jsonl", *({"prompt": f"question {i % 8}"} for i in range(9)))
    settings = run.make_settings(prompts=train, gold=GOLD)
    found, sets = lab_settings.prompts_of(settings)
    assert found == [f"question {i}" for i in range(6)] and sets == {"test": ["question 6", "question 7"]}
    assert settings.sets == ["test"]
    own = write("test.jsonl", {"prompt": "other"}, {"prompt": "question 1"})
    with pytest.raises(ValueError, match="1 prompts of .* are in .* 'question 1'"):
        lab_settings.prompts_of(replace(settings, eval_prompts=own))
    bad = write("bad.jsonl", {"prompt": "a"}, {"question": "b"})
    with pytest.raises(ValueError, match="bad.jsonl, line 2"):
        lab_settings.prompts_of(replace(settings, prompts=bad))


@pytest.mark.trainer
def test_a_policy_and_prompts_of_ones_own(tmp_path, monkeypatch):
    """A model with another template and more parts to a word, from its folder to a policy trained with GRPO."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    tokenizer = chatml_tokenizer()
    tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(8)))
    own = tmp_path / "own.json"
    own.write_text(json.dumps(TOY | {"learning_rate": 1e-3, "policy_learning_rate": 1e-3}))
    settings = run.make_settings(file=str(own), model=str(tmp_path / "model"), prompts=str(prompts), gold=GOLD)
    output = tmp_path / "out"
    run._check_folder(output, settings)
    work = {unit.name: unit for stage in run.plan(settings, ["grpo"]) for unit in stage}
    for name in ["base", "candidates-test", "pairs-0", proxies.proxy_name("flipped", 8, "bt", 0), "grpo-bt-0"]:
        run.finish(work[name], output, settings)
    candidates = lab_settings.read_unit(output, "candidates-test")
    assert candidates["prompts"] == ["question 6?", "question 7?"]
    points = lab_settings.read_unit(output, "grpo-bt-0")["sets"]["test"]["points"]
    assert [point[0] for point in points] == [0, 2] and points[0][1] == 0.0 < points[1][1]


def test_a_tokenizer_that_ppo_would_misread(tmp_path):
    tokenizer = chatml_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="no padding token besides EOS"):
        lab_answers._check_tokenizer(tokenizer, "m")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        lab_answers._check_tokenizer(tokenizer, "m")


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    assert cli.main(["lab", "--output", str(tmp_path / "out"), "--quick", "--gold", "no_such_module:gold"]) == 1
    assert "was not found" in capsys.readouterr().err
    (tmp_path / "own.json").write_text('{"seedz": 3}')
    assert cli.main(["lab", "--settings", str(tmp_path / "own.json")]) == 1
    assert "has ['seedz']; the settings are" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the run


def command(folder, *more, python=sys.executable):
    """The example, in a process of its own: workers are spawned from it."""
    settings = folder.parent / "toy.json"
    settings.write_text(json.dumps(TOY))
    words = [python, str(ROOT / "examples" / "overoptimization.py"), "--output", str(folder), *more]
    return [*words, "--settings", str(settings)]


def completed(folder, *more, **options):
    done = subprocess.run(command(folder, *more, **options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def units(folder):
    """What was found, without what it cost."""
    found = {}
    for file in sorted((folder / "units").glob("*.json")):
        unit = json.loads(file.read_text())
        found[file.stem] = {name: unit[name] for name in unit if name not in ("seconds", "cpu_seconds")}
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was killed while proxies were trained, and then went on to its end: its folder, what it had at the
    kill (files and their times), and what it printed at its end."""
    folder = tmp_path_factory.mktemp("lab") / "run"
    process = subprocess.Popen(command(folder), stderr=subprocess.PIPE, start_new_session=True)
    while not list((folder / "units").glob("proxy-*-sft-*.json")):
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = times(folder)
    (folder / "units" / "pairs-0.99.tmp").write_text('{"half')  # what a kill in the middle of a write leaves
    return folder, before, completed(folder)


def times(folder):
    return {file.stem: file.stat().st_mtime_ns for file in (folder / "units").glob("*.json")}


@pytest.mark.slow
@pytest.mark.trainer
def test_a_run_and_what_it_writes(finished):
    folder, _, said = finished
    settings = run.make_settings(file=str(folder.parent / "toy.json"), gold=GOLD)
    expected = {unit.name for stage in run.plan(settings, policies.available()) for unit in stage}
    found = units(folder)
    assert set(found) == expected
    results = json.loads((folder / "results.json").read_text())
    compared = 0
    # 10 methods, 2 labels, 1 size, 2 seeds, 2 sets.
    assert len(results["rows"]) == 80 and set(results["policy_trl"]) == set(policies.available())
    for row in results["rows"]:
        assert row["gold_curve"][0] == row["proxy_curve"][0] == 0.0
        assert (np.diff(row["proxy_curve"]) >= -1e-5).all()
    for row in results["policies"]:
        assert row["points"][0][:4] == [0, 0.0, 0.0, 0.0] and row["points"][-1][0] == 2 and row["points"][-1][1] > 0
    for row in results["wins"]:
        assert row["win"] + row["tie"] + row["loss"] == pytest.approx(1.0, abs=1e-4)
    for name, rows in report.tables(results).items():
        assert len((folder / f"{name}.csv").read_text().splitlines()) == len(rows) + 1
    ensemble, member = (found[proxies.proxy_name("clean", 8, name, 0)] for name in ("ensemble_mean", "bt"))
    assert ensemble["sets"] != member["sets"]
    # What best-of-n chose by are the rewards of the texts, under the model that policies are trained against.
    proxy = GRMScorer(str(folder / "models" / proxies.proxy_name("flipped", 8, "bt", 0)))
    scores = np.load(folder / "scores" / f"{proxies.proxy_name('flipped', 8, 'bt', 0)}.npy").reshape(2, 2, 12)
    for row, key in zip(scores, ("id", "ood"), strict=True):
        drawn = found[f"candidates-{key}"]
        for ids, reward in zip(drawn["answers"][1], row[1], strict=True):
            text = proxy.tokenizer.decode(ids, skip_special_tokens=True)
            if proxy.tokenizer(text).input_ids == [i for i in ids if i != proxy.tokenizer.eos_token_id]:
                expected = proxy.score([{"prompt": drawn["prompts"][1], "response": text}])[0]
                assert reward == pytest.approx(expected, abs=1e-5)
                compared += 1
    assert compared > 5
    if (folder / "report.html").is_file():
        page = (folder / "report.html").read_text()
        assert page.count("<svg") == 6 and all(f">{name}<" in page for name in proxies.NAMES.values())
        assert not any(word in page for word in ("src=", 'href="http', "href='http", "@import", report.INK))
        assert "report.html" in said
    else:
        assert "where matplotlib is installed" in said
    assert report.markdown(results).startswith("# Over-optimisation in the world whose")


@pytest.mark.slow
@pytest.mark.trainer
def test_a_killed_run_goes_on_to_the_numbers_of_one_that_was_not(finished, tmp_path):
    folder, before, _ = finished
    after = times(folder)
    assert 0 < len(before) < len(after) and before.items() <= after.items()
    # Some units from the beginning, in this process, in another order.
    settings = run.make_settings(file=str(folder.parent / "toy.json"), gold=GOLD)
    shutil.copytree(folder / "base", tmp_path / "base")
    sys.path.insert(0, str(ROOT / "examples"))
    run._check_folder(tmp_path, settings)
    work = {unit.name: unit for stage in run.plan(settings, policies.available()) for unit in stage}
    names = ["candidates-ood", "candidates-id", "pairs-1"]
    names += [proxies.proxy_name("flipped", 8, "bt", 1, member) for member in (1, 0)]
    names += [proxies.proxy_name("flipped", 8, "ensemble_min", 1), policies.policy_name("grpo", "ensemble_min", 1)]
    for name in names:
        run.finish(work[name], tmp_path, settings)
    found = units(tmp_path)
    assert found == {name: unit for name, unit in units(folder).items() if name in names}


@pytest.mark.slow
@pytest.mark.trainer
def test_other_settings_are_refused_and_a_finished_run_is_not_repeated(finished, tmp_path, capsys):
    folder = finished[0]
    before = times(folder)
    own = tmp_path / "own.json"
    own.write_text(json.dumps(TOY | {"learning_rate": 0.5, "gold": GOLD}))
    assert cli.main(["lab", "--output", str(folder), "--settings", str(own)]) == 1
    assert "learning_rate: 0.001 there, 0.5 here" in capsys.readouterr().err
    own.write_text(json.dumps(TOY | {"gold": GOLD}))
    assert cli.main(["lab", "--output", str(folder), "--settings", str(own)]) == 0
    assert times(folder) == before


@pytest.mark.slow
@pytest.mark.skipif("GRM_OLDEST_PYTHON" not in os.environ, reason="no interpreter with the last TRL that has PPO")
def test_the_environment_that_has_ppo_adds_what_is_missing(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = units(folder)
    assert not any(name.startswith("ppo") for name in before)
    completed(folder, python=os.environ["GRM_OLDEST_PYTHON"])
    after = units(folder)
    assert before.items() <= after.items()
    assert sum(name.startswith("ppo") for name in after) == 4
    assert set(json.loads((folder / "results.json").read_text())["policy_trl"]) == {"grpo", "ppo"}
    completed(folder)  # and the report is written here
    assert "PPO: rewards over KL" in (folder / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------- documentation


def test_the_commands_of_the_page_are_understood():
    text = (ROOT / "docs" / "overoptimization.md").read_text(encoding="utf-8")
    lines = [line.split("#")[0] for line in text.splitlines() if line.startswith("grm ")]
    for line in lines:
        assert cli.command_line().parse_args(shlex.split(line)[1:]).run is cli._lab
    assert len(lines) == 3 and "\nlab:" in (ROOT / "Makefile").read_text()


def test_the_page_names_every_method_and_setting_as_it_is():
    text = (ROOT / "docs" / "overoptimization.md").read_text(encoding="utf-8")
    for label, options in proxies.METHODS.values():
        if "alpha" in options:
            assert f"| {label} | {options['alpha']} |" in text
    assert all(f"`{name}`" in text for name in ("learning_rate", "policy_learning_rate", "sizes", "seeds"))
