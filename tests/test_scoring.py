"""Scoring: every score against a forward of that text alone, what is computed counted token by token, state and order
kept, two processes, golden rows, and the commands `grm score`, `best-of-n` and `verify`."""

import io
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, assistant, chat_grm, chatml_tokenizer, read_rows, tiny_lm, user, write_rows
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from grm_hf import GRMForSequenceClassification
from grm_hf.cli import main
from grm_hf.devices import alone as owned
from grm_hf.devices import evaluating
from grm_hf.pairs import Encoder, prepare_pairs
from grm_hf.scoring import GoldenError, GRMScorer, golden, save_golden, verify


TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "benchmarks"))
import scoring as benchmark  # noqa: E402
from sections import PAGE, write_section  # noqa: E402


TOKENIZER = chatml_tokenizer()
SIGNALS = ("head", "likelihood", "endogenous", "judge", "dropout")  # of the LM head, in two processes
WORDS = "one two three four five six seven eight nine ten".split()
grm = partial(chat_grm, TOKENIZER)


def a_set_of_chats(seed=0, prompts=4, answers=4):
    """Histories that grow turn by turn, several answers to each, some of them twice, in random order."""
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    chats = []
    for number in range(prompts):
        history = [user(f"Question {number}: {words(1, 6)}")]
        for _ in range(rng.integers(1, 3)):
            chats += [[*history, assistant(words(1, 9))] for _ in range(rng.integers(1, answers + 1))]
            history = [*history, assistant(words(1, 5)), user(words(1, 5))]
    chats += [chats[i] for i in rng.integers(0, len(chats), 3)]
    return [chats[i] for i in rng.permutation(len(chats))]


def ids_of(chat):
    return Encoder(TOKENIZER).encode_chat(chat).ids


@torch.no_grad()
def alone(model, chats):
    """What the model gives for each chat by itself: no padding, no layout, no scorer."""
    return [model(input_ids=torch.tensor([ids_of(chat)])).logits.item() for chat in chats]


def close(expected, rel=2e-5):
    return pytest.approx(expected, rel=rel, abs=2e-6)


class Seen:
    """What goes into a model's embedding while it is open: the number of token positions of each forward."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __enter__(self):
        self.hook = self.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: self.rows.append(args[0].numel())
        )
        return self.rows

    def __exit__(self, *_):
        self.hook.remove()


# ----------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_text_alone(family):
    model = grm(family)
    chats = a_set_of_chats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scorer = GRMScorer(model, TOKENIZER)
        found = scorer.score(chats)
    assert found == close(alone(model, chats), rel=1e-4)
    assert len(set(np.round(found, 5))) > 3
    said = [str(w.message) for w in caught if "using 'padded'" in str(w.message)]
    assert len(said) == (scorer.layout == "padded")


def test_most_families_share_prefixes():
    for family in ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox", "phi3"):
        assert GRMScorer(grm(family), TOKENIZER).layout == "shared_prefix", family


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("budget", [1, 97, 300, 8192])
def test_order_and_duplicates_in_every_layout_and_batch_size(layout, budget):
    model, chats = grm(), a_set_of_chats(1)
    scorer = GRMScorer(model, TOKENIZER, max_tokens_per_batch=budget, layout=layout)
    expected = alone(model, chats)
    assert scorer.score(chats) == close(expected)
    assert scorer.score(chats[::-1]) == close(expected[::-1])
    for window in (1, 3, 1000):
        details = list(scorer.stream(iter(chats), window))
        assert [detail.score for detail in details] == close(expected)
        assert [detail.tokens for detail in details] == [len(ids_of(chat)) for chat in chats]
    assert scorer.score([]) == []


def test_a_bfloat16_body_and_a_cut_text():
    model = grm().to(torch.bfloat16)
    model.config.max_sequence_length = 48
    encoder = Encoder.from_config(TOKENIZER, model.config)
    chats = [[user("x" * 100), assistant("y" * n)] for n in range(1, 30)]
    details = list(GRMScorer(model, TOKENIZER).stream(chats))
    assert all(detail.truncated and detail.tokens == 48 for detail in details)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([encoder.encode_chat(c).ids])).logits.item() for c in chats]
    assert [detail.score for detail in details] == pytest.approx(expected, abs=1e-2)


# ------------------------------------------------------------------------------------------------ tokens computed once


def distinct_prefixes(sequences):
    """Number of nodes of the prefix tree of the sequences: what must be computed if nothing is computed twice."""
    return len({tuple(ids[: k + 1]) for ids in sequences for k in range(len(ids))})


def test_each_distinct_prompt_and_response_is_computed_once():
    model = grm()
    scorer, padded = GRMScorer(model, TOKENIZER), GRMScorer(model, TOKENIZER, layout="padded")
    pairs = [
        {"prompt": [user(f"Please tell me: {p}")], "chosen": [assistant(f"{c}")], "rejected": [assistant(f"{r}")]}
        for p in WORDS[:3]
        for c in ("A good answer", "Another good one")
        for r in ("Bad, very bad", "Worse than bad")
    ]
    texts = [ids_of([*row["prompt"], *row[side]]) for row in pairs for side in ("chosen", "rejected")]
    # The tree has a node at each token where texts part, even where that is within a word: so does the layout.
    with Seen(model) as rows:
        scorer.score_pairs(pairs)
    shortest = distinct_prefixes(texts)
    assert shortest <= sum(rows) <= shortest + 7 * 3  # fewer than 8 tokens in common are not shared
    assert sum(rows) < sum(map(len, texts)) / 3
    with Seen(model) as rows:
        padded.score_pairs(pairs)
    assert len(set(map(tuple, texts))) == 12 and sum(rows) == 12 * max(map(len, texts))


@pytest.mark.parametrize("answers", [1, 4, 16])
def test_best_of_n_computes_the_prompt_once_for_each_row(answers):
    model = grm()
    rng = np.random.default_rng(0)
    prompt = "Which? " + " ".join(rng.choice(WORDS, 20))
    candidates = [f"{WORDS[i % 10][::-1]}{i} " + " ".join(rng.choice(WORDS, 3 + i)) for i in range(answers)]
    texts = [ids_of([user(prompt), assistant(answer)]) for answer in candidates]
    scorer, small = GRMScorer(model, TOKENIZER), GRMScorer(model, TOKENIZER, max_tokens_per_batch=400)
    with Seen(model) as rows:
        result = scorer.best_of_n(prompt, candidates)
    assert len(rows) == 1 and distinct_prefixes(texts) <= rows[0] <= distinct_prefixes(texts) + 7 * answers
    assert result.scores == close(alone(model, [[user(prompt), assistant(answer)] for answer in candidates]))
    with Seen(model) as rows:
        small.best_of_n(prompt, candidates)
    assert len(rows) == -(-sum(rows) // 400) and all(row <= max(400, max(map(len, texts))) for row in rows)


# The benchmark's own texts and contenders, on two layers: what is counted does not depend on the machine.
GATES = [(f"n = {n}", n, False) for n in (1, 4, 16, 64)] + [("n = 16, equal", 16, True)]


@pytest.fixture(scope="module")
def bench():
    return benchmark.llama(layers=2, hidden=64), benchmark.word_tokenizer()


@pytest.mark.parametrize(("name", "n", "equal"), GATES)
def test_flops_and_tokens_against_the_pipeline(bench, name, n, equal):
    case = benchmark.best_of_n(n, equal)
    sides = benchmark.contenders(*bench, case)
    theirs, their_tokens, their_flops = benchmark.counted(bench[0], sides["pipeline, batch 8"])
    ours, our_tokens, our_flops = benchmark.counted(bench[0], sides["ours"])
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert their_tokens == round(case.padding * sum(case.lengths))
    answers = sum(case.lengths) - n * benchmark.PROMPT
    rows = -(-answers // (8192 - benchmark.PROMPT))  # the prompt once in each
    assert our_tokens == rows * benchmark.PROMPT + answers
    assert their_flops / our_flops >= benchmark.TARGETS[name]


def test_the_cache_contender_gives_the_same_scores(bench):
    sides = benchmark.contenders(*bench, benchmark.best_of_n(10))
    expected = sides.pop("ours")()
    assert len(sides) == 4
    for name, run in sides.items():
        assert run() == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_the_benchmark_page_is_what_the_results_file_gives(tmp_path):
    if not benchmark.RESULTS.is_file():
        pytest.skip("make bench has not been run")
    page = tmp_path / "benchmarks.md"
    page.write_bytes(PAGE.read_bytes())
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    write_section("scoring", benchmark.section(results), page)
    assert page.read_bytes() == PAGE.read_bytes()


# --------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_scores_have_the_same_bits_in_any_company(dtype):
    model, chats = grm(hidden_size=128, intermediate_size=256).to(dtype), a_set_of_chats(2, prompts=8)
    scorer = GRMScorer(model, TOKENIZER, deterministic=True)
    single = [scorer.score([chat])[0] for chat in chats]
    assert scorer.score(chats) == single
    assert scorer.score(chats[::-1]) == single[::-1]
    order = np.random.default_rng(0).permutation(len(chats))
    assert scorer.score([chats[i] for i in order]) == [single[i] for i in order]
    assert [s.score for s in scorer.stream(chats[3:], window=2)] == single[3:]
    assert GRMScorer(model, TOKENIZER, max_tokens_per_batch=1, deterministic=True).score(chats) == single
    # What the promise is worth: without it, neighbours do change bits.
    assert GRMScorer(model, TOKENIZER, layout="padded").score(chats) != single


def test_deterministic_refuses_a_layout_that_joins_texts():
    with pytest.raises(ValueError, match="computes each alone"):
        GRMScorer(grm(), TOKENIZER, deterministic=True, layout="packed")


# ------------------------------------------------------------------------------------------------------------- threads


def jobs(seed, count):
    """Calls of different kinds and sizes, as a server gets them."""
    rng = np.random.default_rng(seed)
    pool = a_set_of_chats(seed, prompts=6)
    return [[pool[i] for i in rng.integers(0, len(pool), rng.integers(1, 4))] for _ in range(count)]


@pytest.mark.parametrize(
    ("family", "calls"),  # sdpa, eager, and positions that are learned
    [pytest.param("llama", 2000, marks=pytest.mark.slow), ("llama", 160), ("gemma2", 160), ("gpt2", 160)],
)
def test_any_number_of_threads_get_the_numbers_of_one(family, calls):
    """8 threads on one model: three layouts, a scorer that computes each text alone, and scorers made meanwhile. All
    bits are those of a single thread."""
    model = grm(family, attention_dropout=0.3) if family != "gpt2" else grm(family)
    model.train()  # so that each of them has a mode to set and to set back
    scorers = [GRMScorer(model, TOKENIZER, layout=layout) for layout in ("shared_prefix", "packed", "padded")]
    scorers.append(GRMScorer(model, TOKENIZER, deterministic=True))
    work = jobs(0, 20)
    right = {(s, j): scorer.score(job) for s, scorer in enumerate(scorers) for j, job in enumerate(work)}
    schedule = np.random.default_rng(1).permutation(list(right) * (calls // len(right) + 1))[:calls]

    def call(at):
        s, j = int(at[0]), int(at[1])
        scorer = scorers[s]
        if j == 7:
            scorer = GRMScorer(model, TOKENIZER, deterministic=scorer.deterministic, layout=scorer.layout)
        return scorer.score(work[j]) == right[s, j]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, schedule))
    finally:
        sys.setswitchinterval(interval)
    assert all(module.training for module in model.modules())


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 3)), min_size=2, max_size=24))
def test_random_schedules(schedule):
    """Each thread starts after a random pause within a call of the others."""
    model = grm(attention_dropout=0.3).train()
    scorers = [GRMScorer(model, TOKENIZER, layout=layout) for layout in ("shared_prefix", "packed", "padded")]
    work = jobs(2, 10)
    right = [scorers[s].score(work[j]) for s, j, _ in schedule]

    def call(at):
        s, j, pause = at
        time.sleep(pause / 2000)
        return scorers[s].score(work[j])

    with ThreadPoolExecutor(len(schedule)) as pool:
        assert list(pool.map(call, schedule)) == right


def test_direct_forwards_beside_a_scorer():
    """Whoever calls the model itself gets what was there before."""
    model = grm()
    scorer = GRMScorer(model, TOKENIZER, layout="shared_prefix")
    chats = a_set_of_chats(3)
    right, expected = scorer.score(chats), alone(model, chats)
    with ThreadPoolExecutor(4) as pool:
        scored = [pool.submit(scorer.score, chats) for _ in range(20)]
        called = [pool.submit(alone, model, chats) for _ in range(20)]
        assert all(job.result() == right for job in scored) and all(job.result() == expected for job in called)


@pytest.mark.trainer
def test_scorers_beside_a_trainer(tmp_path):
    """Steps with dropout and scores without it take turns: each gives what it gives alone."""
    datasets, training = pytest.importorskip("datasets"), pytest.importorskip("grm_hf.training")
    rows = [
        {"prompt": [user(f"{w}?")], "chosen": [assistant(f"{w} {v}")], "rejected": [assistant(v)]}
        for w in WORDS[:4]
        for v in WORDS[4:8]
    ]

    def trainer(name):
        torch.manual_seed(0)
        args = training.GRMRewardConfig(
            str(tmp_path / name), regularizer="sft", layout="shared_prefix", learning_rate=0.0, weight_decay=0.0,
            per_device_train_batch_size=2, num_train_epochs=3, logging_steps=1, eval_strategy="steps", eval_steps=6,
            save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_dropout=False, seed=3,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        model = grm(attention_dropout=0.5)
        return training.GRMRewardTrainer(
            model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=TOKENIZER
        )

    quiet = trainer("alone")
    quiet.train()
    busy, work = trainer("beside"), jobs(4, 8)
    scorers = [GRMScorer(busy.model, TOKENIZER, layout=layout) for layout in ("shared_prefix", "padded")]
    right = [[scorer.score(job) for job in work] for scorer in scorers]
    over, wrong, calls = threading.Event(), [], [0, 0]

    def score(which):
        while not over.is_set():
            wrong.extend(j for j, job in enumerate(work) if scorers[which].score(job) != right[which][j])
            calls[which] += len(work)

    threads = [threading.Thread(target=score, args=[which]) for which in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        busy.train()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong and min(calls) > 8
    keep = ("loss", "eval_loss", "eval_accuracy", "text_loss")
    logs = [[{k: row[k] for k in keep if k in row} for row in t.state.log_history] for t in (quiet, busy)]
    assert logs[0] == logs[1] and len(logs[0]) > 20


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_a_mode_set_during_evaluation_holds_afterwards(wrapped, mode):
    """transformers 5.0 calls `model.train()` before the first step, whoever is scoring meanwhile."""
    model = grm().train(not mode)
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
        model.train(not mode)
    with evaluating(model):
        other = threading.Thread(target=model.train, args=[mode])
        other.start()
        other.join()
        modules = list((model.get_base_model() if wrapped else model).modules())
        with evaluating(model):
            assert not any(module.training for module in modules)
        assert not any(module.training for module in modules)
    assert {module.training for module in model.modules()} == {mode}
    model.train(not mode)
    assert {module.training for module in model.modules()} == {not mode}


def test_a_step_inside_a_step_and_a_score_inside_a_step_do_not_wait_for_themselves():
    model = grm().train()
    scorer = GRMScorer(model, TOKENIZER)
    with owned(model), owned(model):
        scorer.score(["one two"])
        with evaluating(model), evaluating(model):
            assert not model.training
        assert model.training
        other = threading.Thread(target=scorer.score, args=[["one"]])
        other.start()
        other.join(0.2)
        assert other.is_alive() and model.training  # it waits
    other.join(10)
    assert not other.is_alive() and model.training


# ----------------------------------------------------------------------------------------------------------- the model


def test_the_class_that_comes_with_a_model_scores_like_ours(tmp_path):
    """transformers 5.0 gives it out, with `trust_remote_code=True`, although ours is registered."""
    grm().save_pretrained(tmp_path)
    theirs = get_class_from_dynamic_module("modeling_grm.GRMForSequenceClassification", str(tmp_path))
    assert theirs is not GRMForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = [kind.from_pretrained(tmp_path) for kind in (theirs, GRMForSequenceClassification)]
        scorers = [GRMScorer(model, TOKENIZER) for model in made]
    assert [scorer.layout for scorer in scorers] == ["shared_prefix", "shared_prefix"]
    assert scorers[0].score(jobs(8, 1)[0]) == scorers[1].score(jobs(8, 1)[0])
    chats = [[user("one two"), assistant("three")], [user("one two"), assistant("four")]]
    assert scorers[0].signals(chats, ["head", "judge"]) == scorers[1].signals(chats, ["head", "judge"])


def state(model):
    attention = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    return [m.training for m in model.modules()], attention, model.config.to_dict(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_the_model_is_left_as_it_was(layout):
    model = grm().train()
    model.lm.model.layers[0].eval()
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    scorer = GRMScorer(model, TOKENIZER, layout=layout)
    stream = scorer.stream(a_set_of_chats(), window=2)
    next(stream)
    assert state(model) == before  # also while a stream is open
    list(stream)
    hook = model.lm.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scorer.score(["one two"])
    hook.remove()
    assert state(model) == before
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_does_not_reach_a_score():
    model = grm(attention_dropout=0.5).train()
    assert GRMScorer(model, TOKENIZER).score(["one two three"]) == close(alone(model.eval(), ["one two three"]))


HIDES = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


@pytest.mark.parametrize("what", ["thinking", "tools"])
def test_what_the_template_leaves_out_is_said_once_in_the_words_of_training(what, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = HIDES
    row = {"messages": [user("2 + 2?"), assistant("<think>two and two</think>4" if what == "thinking" else "4")]}
    if what == "tools":
        row["tools"] = [{"type": "function", "function": {"name": "add"}}]
    plain, model = {"messages": [user("2 + 2?"), assistant("4")]}, grm()
    pair = {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [assistant("5")]}
    if what == "tools":
        pair["tools"] = row["tools"]
    counts = prepare_pairs(datasets.Dataset.from_list([pair]), Encoder(tokenizer))[1]
    words = f"whose {what} the chat template leaves out"
    assert f"1 {words}" in str(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = GRMScorer(model, tokenizer).score([plain])
    scorer = GRMScorer(model, tokenizer)
    with pytest.warns(UserWarning) as said:
        scorer.score([plain, row, row])
    assert [str(one.message) for one in said] == [f"There are chats {words}: chat 1, and perhaps others."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        assert scorer.score([row, plain]) == expected * 2
    # Pairs and the command, too.
    with pytest.warns(UserWarning, match=f"{words}: row 0, `chosen`"):
        GRMScorer(model, tokenizer).score_pairs([pair])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(plain)}\n{json.dumps(row)}\n")
    with pytest.warns(UserWarning, match=f"{words}: .*line 2"):
        assert main(["score", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model")]) == 0


def test_a_model_in_memory_needs_its_tokenizer():
    with pytest.raises(ValueError, match="Pass `tokenizer`"):
        GRMScorer(grm())


# -------------------------------------------------------------------------------------------------------------- inputs


def test_errors_name_the_chat():
    scorer = GRMScorer(grm(), TOKENIZER)
    with pytest.raises(ValueError, match="^chat 2: "):
        scorer.score(["one", "two", "", "three"])
    stream = scorer.stream(["one", "two", [user("no answer")], "three"], window=2)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(ValueError, match="^chat 2: "):
        next(stream)
    pair = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    with pytest.raises(ValueError, match="^row 1, `rejected`: "):
        scorer.score_pairs([pair, {**pair, "rejected": [assistant("")]}])
    with pytest.raises(ValueError, match="^row 0, `chosen`: it is missing; the row has"):
        scorer.score_pairs([{"prompt": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="at least 1"):
        GRMScorer(grm(), TOKENIZER, max_tokens_per_batch=0)


def test_one_chat_is_not_several():
    scorer = GRMScorer(grm(), TOKENIZER)
    for chats, words in (
        ("hi", "got one chat. Put a single chat into a list"),
        (b"hi", "got one chat"),
        ({"prompt": "q", "response": "a"}, "got a dict"),
        (None, "got a NoneType"),
        (3, "got a int"),
        ({"hi", "ho"}, "a set has none"),
    ):
        for call in (scorer.score, lambda chats: next(scorer.stream(chats)), scorer.check):
            with pytest.raises(ValueError, match=words):
                call(chats)
    with pytest.raises(ValueError, match="^chat 0: this is a single message"):
        scorer.score([user("a"), assistant("b")])
    with pytest.raises(ValueError, match="^chat 0: int is no chat"):
        scorer.score([3])
    with pytest.raises(ValueError, match="^chat 0: the row has `messages` and `response`"):
        scorer.score([{"messages": [user("a"), assistant("b")], "response": "c"}])
    with pytest.raises(ValueError, match="this takes answers and got one answer"):
        scorer.best_of_n("q", "yes")
    with pytest.raises(ValueError, match="this takes rows and got a dict"):
        scorer.score_pairs({"prompt": "a", "chosen": "b", "rejected": "c"})


def test_tables_are_their_rows():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    scorer = GRMScorer(grm(), TOKENIZER)
    rows = [{"prompt": "a", "response": "b"}, {"text": "c"}, {"messages": [user("d"), assistant("e")]}]
    right = [scorer.score([row])[0] for row in rows]
    table = datasets.Dataset.from_pandas(pandas.DataFrame(rows))
    for chats in (rows, iter(rows), pandas.DataFrame(rows), table, table.to_iterable_dataset(), table.data.table):
        assert scorer.score(chats) == close(right)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    read = pandas.DataFrame({"messages": [np.array(messages, dtype=object)]})  # as pandas reads parquet
    assert scorer.score(read) == scorer.score([messages])
    frame = pandas.DataFrame(rows, index=[5, 5, 7])
    assert scorer.score(frame) == close(right) and scorer.score(pandas.Series(["c", "c"])) == close([right[1]] * 2)
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    assert scorer.score_pairs(pandas.DataFrame(pairs)) == [close(pair) for pair in scorer.score_pairs(pairs)]
    with pytest.raises(ValueError, match="Choose a split"):
        scorer.score(datasets.DatasetDict(train=table))


@pytest.mark.parametrize("chat", [
    {"messages": None, "prompt": "q", "response": "a"},
    {"prompt": "q", "response": "a", "text": None, "tools": None, "chat_template_kwargs": None},
    {"prompt": "q", "response": None, "completion": "a"},
])  # fmt: skip
def test_null_is_absent(chat):
    scorer = GRMScorer(grm(), TOKENIZER)
    assert scorer.encode(chat) == scorer.encode({"prompt": "q", "response": "a"})


def test_a_path_is_taken_wherever_a_string_is(tmp_path):
    model = grm()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    save_golden(model, TOKENIZER, tmp_path)
    assert GRMScorer(tmp_path).score(["a"]) == GRMScorer(str(tmp_path)).score(["a"])
    assert verify(tmp_path) == verify(str(tmp_path))


TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")], "tools": TOOLS},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "tools": TOOLS},
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {"prompt": "Q: a\nA:", "chosen": " b", "rejected": " c"},
        {"chosen": "Q: a\nA: b", "rejected": "Q: a\nA: c"},
    ],
    ids=["messages", "tools", "implicit", "implicit tools", "text prompt", "text", "implicit text"],
)
def test_pairs_are_encoded_as_in_training(row):
    datasets = pytest.importorskip("datasets")
    model = grm()
    prepared, _ = prepare_pairs(datasets.Dataset.from_list([row]), Encoder(TOKENIZER))
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([prepared[0][f"{side}_ids"]])).logits.item()
            for side in ("chosen", "rejected")
        ]
    assert list(GRMScorer(model, TOKENIZER).score_pairs([row])[0]) == close(expected)


def test_best_of_n():
    scorer = GRMScorer(grm(), TOKENIZER)
    answers = ["one", "two three", "four", "one"]
    for prompt in ("which?", [user("which?")]):
        result = scorer.best_of_n(prompt, answers)
        assert result.scores == close(alone(scorer.model, [[user("which?"), assistant(a)] for a in answers]))
        assert result.best == answers[max(range(4), key=lambda i: result.scores[i])]
        assert [result.scores[i] for i in result.order] == sorted(result.scores, reverse=True)
        assert result.scores[0] == result.scores[3] and result.order.index(0) < result.order.index(3)
    with pytest.raises(ValueError, match="nothing to rank"):
        scorer.best_of_n("which?", [])
    with pytest.raises(ValueError, match="^answer 1: "):
        scorer.best_of_n("which?", ["a", " "])
    with torch.no_grad():
        scorer.model.score.out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"2 of 2 rewards are not finite numbers \(answer 0: nan"):
        scorer.best_of_n("which?", ["a", "b"])


def test_probability_is_symmetric_and_does_not_overflow():
    scorer = GRMScorer(grm(), TOKENIZER)
    assert scorer.probability(1e6, 0.0) == 1.0 and scorer.probability(-1e6, 0.0) == 0.0
    assert scorer.probability(0.3, 0.1) + scorer.probability(0.1, 0.3) == pytest.approx(1)
    scorer.model.config.reward_temperature = 2.0
    assert scorer.probability(0.3, 0.1) == pytest.approx(torch.sigmoid(torch.tensor(0.1)).item(), rel=1e-6)


def test_a_progress_bar_counts_chats(capsys):
    GRMScorer(grm(), TOKENIZER, progress=True).score(a_set_of_chats())
    assert f"{len(a_set_of_chats())}/{len(a_set_of_chats())}" in capsys.readouterr().err
    GRMScorer(grm(), TOKENIZER).score(a_set_of_chats())
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------- two processes


def launch(code, folder, processes, port):
    script = folder / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + textwrap.dedent(code), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(folder)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


RANKS = """
    import json

    import conftest
    import test_scoring as t
    from accelerate import Accelerator
    from grm_hf.cli import main
    from torch.distributed.fsdp import fully_shard

    accelerator = Accelerator(cpu=True)
    rank, folder = accelerator.process_index, sys.argv[1]
    model, chats = t.grm(), t.a_set_of_chats(1)
    results = {}
    for layout in ("shared_prefix", "padded", "deterministic"):
        how = {"deterministic": True} if layout == "deterministic" else {"layout": layout}
        scorer = t.GRMScorer(model, t.TOKENIZER, max_tokens_per_batch=300, accelerator=accelerator, **how)
        with t.Seen(model) as rows:
            results[layout] = {"scores": scorer.score(chats), "best": scorer.best_of_n("which?", t.WORDS).scores}
        results[layout]["tokens"] = sum(rows)
    stream = t.GRMScorer(model, t.TOKENIZER, accelerator=accelerator).stream(iter(chats), window=2)
    results["stream"] = [detail.score for detail in stream]
    results["signals"] = t.GRMScorer(model, t.TOKENIZER, accelerator=accelerator).signals(chats, t.SIGNALS)
    try:
        t.GRMScorer(model, t.TOKENIZER, accelerator=accelerator).score(["one", ""])
    except ValueError as error:
        results["error"] = str(error)
    output = f"{folder}/scores.jsonl"
    command = ["score", f"{folder}/chats.jsonl", "--model", f"{folder}/model", "--output", output]
    results["cli"] = [main(command)]
    accelerator.wait_for_everyone()
    results["lines"] = [json.loads(line) for line in open(output)]
    accelerator.wait_for_everyone()
    if rank == 0:
        whole = open(output).read()
        open(output, "w").write(whole[: len(whole) // 2])
    accelerator.wait_for_everyone()
    results["cli"].append(main(command))
    accelerator.wait_for_everyone()
    results["again"] = [json.loads(line) for line in open(output)]

    fully_shard(model, mesh=t.torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    for name, call in {
        "split scorer": lambda: t.GRMScorer(model, t.TOKENIZER, accelerator=accelerator),
        "split golden": lambda: t.save_golden(model, t.TOKENIZER, folder),
    }.items():
        try:
            call()
        except ValueError as error:
            results[name] = str(error)
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump(results, file)
    accelerator.end_training()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("ranks")
    grm().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    write_rows(folder / "chats.jsonl", [{"messages": chat} for chat in a_set_of_chats(1)])
    launch(RANKS, folder, 2, 29621)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_share_the_work_of_signals(two_ranks):
    expected = GRMScorer(grm(), TOKENIZER).signals(a_set_of_chats(1), SIGNALS)
    for one, two, record in zip(*(rank["signals"] for rank in two_ranks), expected, strict=True):
        assert one == two == pytest.approx(record, rel=2e-4, abs=2e-6)


def test_two_processes_share_the_work_and_both_have_all_results(two_ranks):
    one, two = two_ranks
    model, chats = grm(), a_set_of_chats(1)
    expected = alone(model, chats)
    for name in ("shared_prefix", "padded", "deterministic"):
        assert one[name]["scores"] == two[name]["scores"] == close(expected)
        assert (
            one[name]["best"]
            == two[name]["best"]
            == close(alone(model, [[user("which?"), assistant(word)] for word in WORDS]))
        )
        tokens = [rank[name]["tokens"] for rank in two_ranks]
        assert max(tokens) < 0.7 * sum(tokens), name  # neither does it all
    assert one["deterministic"]["scores"] == GRMScorer(model, TOKENIZER, deterministic=True).score(chats)
    assert one["stream"] == two["stream"] == close(expected)
    assert one["error"] == two["error"] and one["error"].startswith("chat 1: ")


def test_the_command_on_two_processes_writes_each_row_once(two_ranks):
    expected = alone(grm(), a_set_of_chats(1))
    for rank in two_ranks:
        assert rank["cli"] == [0, 0]
        for lines in (rank["lines"], rank["again"]):
            assert [line["row"] for line in lines] == list(range(len(expected)))
            assert [line["score"] for line in lines] == close(expected)


def test_a_model_that_is_split_over_processes_is_refused(two_ranks):
    for rank in two_ranks:
        assert "split over the processes" in rank["split scorer"]
        assert "split over processes" in rank["split golden"]


# --------------------------------------------------------------------------------------------------------- golden rows


@pytest.fixture
def saved(tmp_path):
    model = grm()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    save_golden(model, TOKENIZER, folder)
    return folder


def test_golden_rows_hold_what_the_model_gives(saved):
    content = json.loads((saved / "golden_rows.json").read_text(encoding="utf-8"))
    assert content["saved_with"]["dtype"] == "float32" and content["saved_with"]["torch"] == torch.__version__
    assert len(content["rows"]) == len(golden.CHATS) == 4
    chats = [[user(row["prompt"]), assistant(row["response"])] for row in golden.CHATS[:3]]
    chats.append(golden.CHATS[3]["messages"])
    assert [row["ids"] for row in content["rows"]] == [ids_of(chat) for chat in chats]
    assert [row["score"] for row in content["rows"]] == pytest.approx(alone(grm(), chats), rel=1e-6)
    table = verify(saved)
    assert "DIFFERS" not in table and table.count(" equal ") == 4 and "0.0e+00" in table


@pytest.mark.parametrize("change", ["head", "body", "template", "vocabulary", "policy"])
def test_a_change_is_found(saved, change, capsys):
    model = grm()
    if change == "head":
        with torch.no_grad():
            model.score.out.bias += 1e-3
        model.save_pretrained(saved)
    elif change == "body":
        with torch.no_grad():
            model.lm.model.layers[1].self_attn.v_proj.weight *= 1.05
        model.save_pretrained(saved)
    elif change == "template":
        chatml_tokenizer().save_pretrained(saved)
        path = saved / "chat_template.jinja"
        path.write_text(path.read_text().replace("'<|im_end|>\n'", "' <|im_end|>\n'"))
    elif change == "vocabulary":
        chatml_tokenizer(merges=[("a", "n")]).save_pretrained(saved)
    else:
        model.config.max_sequence_length = 40
        model.save_pretrained(saved)
    with pytest.raises(GoldenError, match="do not hold") as found:
        verify(saved)
    tokens = change in ("template", "vocabulary", "policy")
    assert ("token " in str(found.value) or " stored, " in str(found.value)) == tokens
    assert main(["verify", str(saved)]) == 1
    captured = capsys.readouterr()
    assert "DIFFERS" in captured.out and "row  tokens" in captured.out
    assert captured.err.splitlines()[-1].startswith("grm verify: ") and "do not hold" in captured.err


def test_verify_on_the_command_line(saved, capsys):
    assert main(["verify", str(saved)]) == 0
    assert "4" in capsys.readouterr().out
    (saved / "golden_rows.json").unlink()
    assert main(["verify", str(saved)]) == 1
    assert "save_golden" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_golden_rows_remember_the_dtype(tmp_path, dtype):
    model = grm().to(dtype)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    save_golden(model, TOKENIZER, tmp_path)
    assert f"dtype {str(dtype)[6:]}" in verify(tmp_path)


def test_the_tolerance_of_golden_rows_grows_with_the_range_of_the_rewards(saved):
    """A head that gives rewards up to 100 multiplies every rounding by a hundred, also that of a reward near 0."""
    file = saved / "golden_rows.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    near = content["rows"][0]
    near["score"] += 0.5e-4
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "1e-04" in verify(saved)
    near["score"] += 2e-4
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(GoldenError, match=r"golden rows \[0\] of 4"):
        verify(saved)
    model = GRMForSequenceClassification.from_pretrained(saved)
    last = [m for m in model.score.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 1000
        if last.bias is not None:
            last.bias *= 1000
    model.save_pretrained(saved)
    save_golden(model, TOKENIZER, saved)
    content = json.loads(file.read_text(encoding="utf-8"))
    scale = max(abs(row["score"]) for row in content["rows"])
    assert scale > 10
    smallest = min(content["rows"], key=lambda row: abs(row["score"]))
    smallest["score"] += 0.9e-4 * scale
    file.write_text(json.dumps(content), encoding="utf-8")
    verify(saved)
    smallest["score"] += 0.2e-4 * scale
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(GoldenError):
        verify(saved)
    assert golden.scale_of([0.2, -3, float("inf")]) == 3  # a broken reward excuses no other


@pytest.mark.parametrize("column", ["score", "text_logp"])
def test_golden_rows_that_are_no_numbers_do_not_hold(saved, column):
    file = saved / "golden_rows.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for row in content["rows"]:
        row[column] = float("nan")
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(GoldenError, match=r"golden rows \[0, 1, 2, 3\] of 4 do not hold"):
        verify(saved)


def test_golden_rows_of_given_texts_and_without_a_template(tmp_path):
    model, tokenizer = grm(), chatml_tokenizer()
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    save_golden(model, tokenizer, tmp_path)
    assert verify(tmp_path).count(" equal ") == 3
    save_golden(model, tokenizer, tmp_path, ["one two", {"prompt": "a", "response": "b"}])
    assert verify(tmp_path).count(" equal ") == 2
    with pytest.raises(ValueError, match="chat 1: "):
        save_golden(model, tokenizer, tmp_path, ["one two", ""])
    model.config.max_sequence_length, model.config.overlength = 60, "error"
    save_golden(model, tokenizer, tmp_path)  # of its own texts, those that fit
    model.config.max_sequence_length = 2
    with pytest.raises(ValueError, match="no golden row fits"):
        save_golden(model, tokenizer, tmp_path)
    with torch.no_grad():
        model.score.out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="weights are broken"):
        save_golden(model, tokenizer, tmp_path, ["a"])


def test_a_folder_that_is_not_there_is_called_that(tmp_path):
    with pytest.raises(ValueError, match=r"^There is no folder '.*absent'\.$"):
        verify(tmp_path / "absent")


def test_golden_rows_leave_the_model_as_it_was(tmp_path):
    model = grm().train()
    before = state(model)
    save_golden(model, TOKENIZER, tmp_path)
    assert state(model) == before


# --- by the trainer


@pytest.fixture(scope="module")
def training():
    return pytest.importorskip("trainers")


@pytest.mark.trainer
@pytest.mark.parametrize("kind", ["full", "adapter", "bf16", "bf16 adapter", "checkpointing"])
def test_every_save_of_the_trainer_verifies(tmp_path, training, kind):
    run = training.trainer(
        tmp_path,
        peft_config=training.lora() if "adapter" in kind else None,
        bf16="bf16" in kind,
        gradient_checkpointing=kind == "checkpointing",
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.1,
    )
    run.train()
    run.save_model()
    tables = [verify(tmp_path / name) for name in (".", "checkpoint-2", "checkpoint-4")]
    assert all(table.count(" equal ") == 4 for table in tables)
    scores = [
        json.loads((tmp_path / n / golden.FILE).read_text())["rows"][0]["score"]
        for n in ("checkpoint-2", "checkpoint-4")
    ]
    assert abs(scores[0] - scores[1]) > 1e-3  # of other weights
    if "adapter" in kind:
        from grm_hf.training import merge_adapter

        merge_adapter(str(tmp_path), str(tmp_path / "merged"))
        (tmp_path / "merged" / golden.FILE).write_bytes((tmp_path / golden.FILE).read_bytes())
        assert verify(tmp_path / "merged").count(" equal ") == 4


@pytest.mark.trainer
def test_golden_rows_do_not_change_training(tmp_path, training):
    """Dropout draws after a save are those of a run that never saves."""

    def weights(name, **how):
        run = training.trainer(tmp_path / name, training.grm(attention_dropout=0.3), learning_rate=0.1, **how)
        run.train()
        return run.model.state_dict()

    saving, not_saving = weights("a", save_strategy="steps", save_steps=1), weights("b")
    assert (tmp_path / "a" / "checkpoint-1" / golden.FILE).is_file()
    assert all(torch.equal(saving[name], not_saving[name]) for name in saving)


@pytest.mark.trainer
def test_a_run_that_cannot_have_golden_rows_says_so_and_goes_on(tmp_path, training, monkeypatch):
    said = []
    monkeypatch.setattr("grm_hf.training.trainer.logger.warning_once", said.append)
    run = training.trainer(tmp_path)
    (tmp_path / golden.FILE).write_text("an earlier run's")
    monkeypatch.setattr("grm_hf.scoring.golden.is_whole", lambda model: False)
    run.save_model()
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / golden.FILE).exists()
    assert len(said) == 1 and "split over processes" in said[0]


DDP = """
    import conftest
    import trainers as t

    run = t.trainer(sys.argv[1] + "/run", save_strategy="steps", save_steps=2, ddp_backend="gloo", max_steps=2)
    run.train()
    run.save_model()
"""


@pytest.mark.trainer
def test_two_training_processes_write_golden_rows_once(tmp_path, training):
    launch(DDP, tmp_path, 2, 29622)
    for name in (".", "checkpoint-2"):
        assert verify(tmp_path / "run" / name).count(" equal ") == 4


# ----------------------------------------------------------------------------------------------------------- grm score


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = grm()
    model.config.max_sequence_length = 64
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


CHATS = [
    {"messages": [user("one"), assistant("two")], "id": "a\u2028"},
    {"prompt": "one two", "response": "three"},
    {"text": "four five"},
    {"prompt": "x" * 100, "response": "y"},
]


def expected(model_folder):
    scorer = GRMScorer(model_folder)
    chats = [CHATS[0]["messages"], *CHATS[1:2], CHATS[2]["text"], CHATS[3]]
    return [scorer.score([chat])[0] for chat in chats]


def test_score_writes_one_line_a_row(tmp_path, model_folder, capsys):
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    assert main(["score", path, "--model", model_folder]) == 0
    captured = capsys.readouterr()
    found = read_rows(captured.out)
    assert [row["row"] for row in found] == [0, 1, 2, 3] and found[0]["id"] == "a\u2028"
    assert [row["score"] for row in found] == pytest.approx(expected(model_folder), rel=1e-5)
    assert [row["truncated"] for row in found] == [False, False, False, True]
    assert found[3]["tokens"] == 64
    assert "4 rows scored, 1 truncated" in captured.err


def test_score_gives_tools_to_the_template(tmp_path, model_folder, capsys):
    path = write_rows(tmp_path / "chats.jsonl", [{**CHATS[0], "tools": TOOLS}, {**CHATS[1], "tools": TOOLS}])
    assert main(["score", path, "--model", model_folder]) == 0
    plain = [len(ids_of(CHATS[0]["messages"])), len(ids_of([user("one two"), assistant("three")]))]
    system = len(TOKENIZER("<|im_start|>system\n" + json.dumps(TOOLS) + "<|im_end|>\n").input_ids)
    assert [row["tokens"] for row in read_rows(capsys.readouterr().out)] == [min(64, n + system) for n in plain]


def test_score_reads_standard_input(model_folder, capsys, monkeypatch):
    given = "\n".join(json.dumps(row) for row in CHATS[:2]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(["score", "-", "--model", model_folder]) == 0
    assert len(read_rows(capsys.readouterr().out)) == 2


def test_score_resumes_where_it_stopped(tmp_path, model_folder, capsys):
    path, output = write_rows(tmp_path / "chats.jsonl", CHATS), tmp_path / "scores.jsonl"
    assert main(["score", path, "--model", model_folder, "--output", str(output)]) == 0
    whole = output.read_text(encoding="utf-8")
    first_two = "".join(line + "\n" for line in whole.split("\n")[:2])
    for kept in (first_two, whole[: len(whole) // 2], "", whole[:7], whole):
        output.write_text(kept, encoding="utf-8")
        capsys.readouterr()
        assert main(["score", path, "--model", model_folder, "--output", str(output)]) == 0
        again = output.read_text(encoding="utf-8")
        assert again.startswith(kept[: kept.rfind("\n") + 1])  # what was there is not computed again
        assert f"{4 - kept.count(chr(10))} rows scored" in capsys.readouterr().err
        assert [row["row"] for row in read_rows(again)] == [0, 1, 2, 3]
        assert [row["score"] for row in read_rows(again)] == pytest.approx(
            [row["score"] for row in read_rows(whole)], rel=1e-5
        )


@pytest.mark.parametrize("change", ["other model", "other file", "not JSON"])
def test_score_never_mixes_two_runs(tmp_path, model_folder, capsys, change):
    path, output = write_rows(tmp_path / "chats.jsonl", CHATS), tmp_path / "scores.jsonl"
    assert main(["score", path, "--model", model_folder, "--output", str(output)]) == 0
    model = model_folder
    if change == "other model":
        model = str(tmp_path / "other")
        grm(seed=3).save_pretrained(model)
        TOKENIZER.save_pretrained(model)
    elif change == "other file":
        write_rows(tmp_path / "chats.jsonl", [{"text": "six"}])
    else:
        output.write_text("notes of mine\n")
    before = output.read_bytes()
    assert main(["score", path, "--model", model, "--output", str(output)]) == 1
    assert "holds other results" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n', "line 1: a row with keys ['prompt'] cannot be scored"),
        ("{broken\n", "line 1: it is not JSON"),
        ('{"text": "a"}\n\n[1]\n', "line 3: this is list"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: "),
        ('\n{"text": ""}\n', "line 2: "),
    ],
)
def test_score_names_the_bad_line(tmp_path, model_folder, capsys, content, words):
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    assert main(["score", str(path), "--model", model_folder]) == 1
    assert words in capsys.readouterr().err


def test_missing_file_and_wrong_model(tmp_path, model_folder, capsys):
    assert main(["score", str(tmp_path / "none.jsonl"), "--model", model_folder]) == 1
    assert "There is no file" in capsys.readouterr().err
    tiny_lm(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    assert main(["score", path, "--model", str(tmp_path / "base")]) == 1
    assert "from_base" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- grm best-of-n


def test_best_of_n_on_the_command_line(tmp_path, model_folder, capsys, monkeypatch):
    answers = ["two", "three four", "7", 'five\nsix "seven"']
    result = GRMScorer(model_folder).best_of_n("one", answers)
    call = ["best-of-n", "--model", model_folder, "--json", "one"]
    file = tmp_path / "answers.txt"
    file.write_text("three four\n7\n\n" + json.dumps(answers[3]) + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="latin-1"))
    for more in (answers, ["two", "--answers", str(file)], ["two", "--answers", "-"]):
        assert main([*call, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["best"] == result.best and found["order"] == result.order
        assert found["scores"] == pytest.approx(result.scores, rel=1e-5)
    assert main(["best-of-n", "--model", model_folder, "one", "two", "three four"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    better = max(("two", 0), ("three four", 1), key=lambda answer: result.scores[answer[1]])
    assert first == f"1. {result.scores[better[1]]:.4f}  {better[0]}"
    assert main(call) == 1
    assert "no answers" in capsys.readouterr().err
    assert main([*call, "--answers", str(tmp_path / "none")]) == 1
    assert "There is no file" in capsys.readouterr().err
