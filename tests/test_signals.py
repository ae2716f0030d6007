"""Signals of both heads: each against an independent computation in float64, antisymmetry, what they share and cost,
agreement, the choice on a validation file, and the commands."""

import argparse
import hashlib
import importlib.util
import json
import math
import re
import shlex
import shutil
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from flops import flops
from tiny import assistant, bare_tokenizer, chatml_tokenizer, llama_tokenizer, tiny_lm, user

from grm_hf import GRMForSequenceClassification
from grm_hf.cli import command_line, main
from grm_hf.evaluation import SignalReport, store_choice
from grm_hf.evaluation.report import signals_text
from grm_hf.metrics import compare_confidences, fit_temperature, risk_coverage, selective_accuracy, wilson_interval
from grm_hf.scoring import GRMScorer
from grm_hf.signals import FOLLOW_UPS, SIGNALS, Settings, Wording, divergence


TOKENIZER = chatml_tokenizer()
WORDING = Wording(
    follow_ups={
        "truth": {"positive": ["Right.", "That is so."], "negative": ["Wrong!"]},
        "tone": {"positive": ["Nice"], "negative": ["Rude", "Dull", "Cold"]},
    },
    question="Good?",
    pair="1: {a} 2: {b}",
    which="Which?",
    letters=("1", "2"),
    critique="Say why.",
)
PLAIN = [name for name in SIGNALS if name not in ("implicit", "critique")]
CHATS = [  # two answers to one prompt, a longer history, another prompt
    [user("Count from one."), assistant("one two three four")],
    [user("Count from one."), assistant("one two, and so on")],
    [user("Count from one."), assistant("one two, and so on"), user("Go on."), assistant("five six")],
    [user("What is two and two?"), assistant("four")],
]


def grm(family="llama", seed=0, tokenizer=TOKENIZER, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    lm = tiny_lm(family, **{"vocab_size": len(tokenizer), "max_position_embeddings": 2048, **config})
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return GRMForSequenceClassification.from_base(lm, head_hidden_size=8).eval().to(dtype)


def near(expected, rel=1e-9):
    return pytest.approx(expected, rel=rel, abs=1e-9)


# -------------------------------------------------------------------------------------------- theirs: the plainest way


def render(messages, opening=""):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + opening


@torch.no_grad()
def full_logits(model, ids):
    return model.lm(input_ids=torch.tensor([ids])).logits[0]


def tokens(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def said(model, before, text, tokenizer=TOKENIZER):
    """Log-probabilities of the tokens of `text` behind `before`."""
    first, ids = len(tokens(before, tokenizer)), tokens(before + text, tokenizer)
    logps = full_logits(model, ids).log_softmax(-1)
    return [logps[i - 1, ids[i]].item() for i in range(first, len(ids))]


def before_and_answer(chat):
    before = render(chat[:-1], "<|im_start|>assistant\n")
    return before, render(chat).removeprefix(before)


def theirs(model, chat, beta=0.1, alpha=1.0, wording=WORDING, draws=32):
    before, answer = before_and_answer(chat)
    logps = said(model, before, answer)
    ids, first = tokens(before + answer), len(tokens(before))
    logits = full_logits(model, ids)
    soft = alpha * torch.logsumexp(logits / alpha, -1)
    endogenous = sum(  # step by step: Q(s, a) - V(s')
        logits[i - 1, ids[i]].item() - soft[i].item() for i in range(first, len(ids))
    )
    sets = {}
    for name, both in wording.follow_ups.items():
        opening = render(chat, "<|im_start|>user\n")
        means = {side: np.mean([np.mean(said(model, opening, text)) for text in both[side]]) for side in both}
        sets[name] = means["positive"] - means["negative"]
    asked = render([*chat, user(wording.question)], "<|im_start|>assistant\n")
    with torch.no_grad():
        state = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        kept = torch.rand(draws, len(state), generator=torch.Generator().manual_seed(0)) >= 0.1
        under_dropout = model.score((state * kept / 0.9).double()).squeeze(-1)
        reward = model(input_ids=torch.tensor([ids])).logits.item()
    return {
        "head": reward,
        "likelihood": np.mean(logps),
        "likelihood/sum": sum(logps),
        "implicit_free": beta * sum(logps),
        "endogenous": endogenous,
        "judge": math.exp(sum(said(model, asked, wording.yes))),
        "judge/no": math.exp(sum(said(model, asked, wording.no))),
        "follow_up": np.mean(list(sets.values())),
        **{f"follow_up/{name}": value for name, value in sets.items()},
        "dropout": under_dropout.mean().item(),
        "dropout/spread": under_dropout.std().item(),
    }


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *(("llama", {"layout": layout}) for layout in ("padded", "packed", "shared_prefix")),
        # Caps its logits. Its own attention is float32, where padding in a float64 model is no number.
        ("gemma2", {"deterministic": True}),
    ],
)
def test_each_signal_is_what_an_independent_computation_gives(family, how):
    model = grm(family)
    scorer = GRMScorer(model, TOKENIZER, **how)
    assert scorer.layout == how.get("layout", "padded")
    for record, chat in zip(scorer.signals(CHATS, PLAIN, wording=WORDING), CHATS, strict=True):
        expected = theirs(model, chat)
        assert set(record) == {"tokens", "truncated", *expected}
        assert {name: record[name] for name in expected} == near(expected, 1e-6 if family == "gemma2" else 1e-9)


def test_settings_reach_the_formulas():
    model = grm()
    (record,) = GRMScorer(model, TOKENIZER).signals(CHATS[:1], PLAIN, wording=WORDING, alpha=0.7, beta=2, draws=5)
    expected = theirs(model, CHATS[0], beta=2, alpha=0.7, draws=5)
    assert {name: record[name] for name in expected} == near(expected)


def test_the_endogenous_reward_has_the_closed_form_of_its_steps():
    """alpha * sum log pi + V(first) - V(last), the soft policy at temperature alpha."""
    model, alpha = grm(), 1.7
    (record,) = GRMScorer(model, TOKENIZER).signals(CHATS[:1], ["endogenous"], alpha=alpha)
    before, answer = before_and_answer(CHATS[0])
    ids, first = tokens(before + answer), len(tokens(before))
    logits = full_logits(model, ids)
    values = alpha * torch.logsumexp(logits / alpha, -1)
    log_pi = (logits / alpha).log_softmax(-1)
    total = alpha * sum(log_pi[i - 1, ids[i]].item() for i in range(first, len(ids)))
    assert record["endogenous"] == near(total + (values[first - 1] - values[-1]).item())


def test_the_judge_of_a_pair_is_asked_in_both_orders():
    model = grm()
    prompt, a, b = [user("One or two?")], "one {b}", "two"
    found = GRMScorer(model, TOKENIZER).compare(prompt, a, b, ["judge"], wording=WORDING)

    def letters(first, second):
        turns = [*prompt, assistant(f"1: {first} 2: {second}"), user("Which?")]
        before = render(turns, "<|im_start|>assistant\n")
        return [sum(said(model, before, letter)) for letter in "12"]

    (one, two), (one_swapped, two_swapped) = letters(a, b), letters(b, a)
    odds = 1 / (1 + math.exp(two - one)), 1 / (1 + math.exp(one_swapped - two_swapped))
    assert found.probabilities["judge"] == near(sum(odds) / 2)
    assert (found.details["judge/when_first"], found.details["judge/when_second"]) == near(odds)
    assert found.details["judge/letters"] == near(
        sum(map(math.exp, (one, two, one_swapped, two_swapped))) / 2
    )


def test_a_critique_is_greedy_and_the_reward_is_read_behind_it():
    model = grm()
    of_a_chat_model = {"do_sample": True, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    for name, value in of_a_chat_model.items():
        setattr(model.generation_config, name, value)  # as a chat model brings them; a critique heeds none
    chat = CHATS[0]
    (record,) = GRMScorer(model, TOKENIZER).signals(
        [chat], ["critique"], wording=WORDING, generate=True, max_new_tokens=12
    )
    ids, new = tokens(render([*chat, user("Say why.")], "<|im_start|>assistant\n")), []
    for _ in range(12):
        best = int(full_logits(model, ids + new)[-1].argmax())
        if best == TOKENIZER.eos_token_id:
            break
        new.append(best)
    text = TOKENIZER.decode(new, skip_special_tokens=True).strip()
    assert record["critique/text"] == text and text
    behind = tokens(render([*chat, user("Say why."), assistant(text)]))
    with torch.no_grad():
        assert record["critique"] == near(model(input_ids=torch.tensor([behind])).logits.item(), 1e-7)


def test_a_critique_ends_where_positions_do():
    """A model that embeds 100 positions writes up to them, and what cannot be read behind that is said."""
    scorer = GRMScorer(grm("gpt2", max_position_embeddings=100), TOKENIZER)
    with pytest.raises(ValueError, match="the model has an embedding for 100 positions"):
        scorer.signals(CHATS[:1], ["critique"], wording=WORDING, generate=True, max_new_tokens=60)
    (record,) = scorer.signals(CHATS[:1], ["critique"], wording=WORDING, generate=True, max_new_tokens=2)
    assert math.isfinite(record["critique"])


def test_a_critique_without_text_leaves_the_reward_as_it_is(monkeypatch):
    model = grm()
    monkeypatch.setattr(
        GRMForSequenceClassification, "generate",
        lambda self, input_ids, **_: torch.cat([input_ids, torch.tensor([[TOKENIZER.eos_token_id]])], 1),
    )
    (record,) = GRMScorer(model, TOKENIZER).signals(CHATS[:1], ["critique", "head"], generate=True)
    assert record["critique"] == record["head"] and record["critique/text"] == ""


# ----------------------------------------------------------------------------------------------------------- reference


def adapted(dtype=torch.float64, **lora):
    peft = pytest.importorskip("peft")
    model = grm(dtype=dtype)
    start = grm(dtype=dtype)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["score"], r=4, **lora)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return wrapped.eval(), start


def test_the_adapter_switched_off_is_a_second_model():
    model, start = adapted()
    scorer = GRMScorer(model, TOKENIZER)
    before = scorer.score(CHATS)
    off = scorer.signals(CHATS, ["implicit", "likelihood", "head"], beta=0.3)
    second = scorer.signals(CHATS, ["implicit"], reference=start, beta=0.3)
    third = scorer.signals(CHATS, ["implicit"], reference=start.lm, beta=0.3)
    for record, other, bare, chat in zip(off, second, third, CHATS, strict=True):
        expected = sum(said(start, *before_and_answer(chat)))
        assert record["implicit/reference_logp"] == near(expected)
        assert record["implicit"] == near(0.3 * (record["likelihood/sum"] - expected), 1e-7)
        assert other["implicit"] == near(record["implicit"], 1e-7) == bare["implicit"]
        assert abs(record["implicit"]) > 1e-3
    assert scorer.score(CHATS) == before  # the adapter is on again


def test_an_adapter_that_was_loaded_is_switched_off_too(tmp_path):
    model, start = adapted()
    start.save_pretrained(tmp_path / "start")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "adapter")
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert vars(loaded)["_adapted"] is not None
    live = GRMScorer(model, TOKENIZER).signals(CHATS[:2], ["implicit"])
    for record, other in zip(GRMScorer(loaded, TOKENIZER).signals(CHATS[:2], ["implicit"]), live, strict=True):
        assert record["implicit"] == near(other["implicit"], 1e-7) and abs(record["implicit"]) > 1e-3


def test_stored_log_probabilities_and_folders_serve_as_the_reference(tmp_path):
    model, start = adapted()
    scorer = GRMScorer(model, TOKENIZER)
    off = scorer.signals(CHATS, ["implicit"])
    stored = [record["implicit/reference_logp"] for record in off]
    assert scorer.signals(CHATS, ["implicit"], reference=stored) == off
    start.save_pretrained(tmp_path / "grm")
    start.lm.save_pretrained(tmp_path / "lm")
    for folder in ("grm", "lm"):
        found = scorer.signals(CHATS[:2], ["implicit"], reference=tmp_path / folder)
        assert [r["implicit"] for r in found] == near([r["implicit"] for r in off[:2]], 1e-6)
    with pytest.raises(ValueError, match="`reference` holds nan for chat 3; give finite numbers"):
        scorer.signals(CHATS, ["implicit"], reference=[*stored[:3], math.nan])
    for wrong in (stored[:-1], [*stored, 0.0]):
        with pytest.raises(ValueError, match="`reference` holds .* log-probabilities; there are"):
            scorer.signals(CHATS, ["implicit"], reference=wrong)


# -------------------------------------------------------------------------------------------------------- antisymmetry


def test_swapping_the_sets_changes_the_sign_of_follow_up():
    swapped = {name: dict(zip(both, reversed(both.values()), strict=True)) for name, both in FOLLOW_UPS.items()}
    scorer = GRMScorer(grm(), TOKENIZER)
    one = scorer.signals(CHATS[:3], ["follow_up"])
    other = scorer.signals(CHATS[:3], ["follow_up"], wording=Wording(follow_ups=swapped))
    for a, b in zip(one, other, strict=True):
        assert {k: a[k] for k in a if "follow" in k} == near({k: -b[k] for k in b if "follow" in k})


def test_swapping_the_answers_swaps_every_probability():
    model, _ = adapted()
    scorer = GRMScorer(model, TOKENIZER)
    names = [*PLAIN, "implicit", "critique"]
    settings = dict(wording=WORDING, generate=True, max_new_tokens=4)
    ab = scorer.compare("Count.", "one two", "three", names, **settings)
    ba = scorer.compare("Count.", "three", "one two", names, **settings)
    assert {name: 1 - p for name, p in ab.probabilities.items()} == near(ba.probabilities)
    assert (ab.a, ab.b) == (near_record(ba.b), near_record(ba.a))
    assert {ab.winner, ba.winner} == {"a", "b"}
    assert ab.agreement == ba.agreement and ab.divergence == near(ba.divergence)
    texts = ["one", "two", "three four", "five, six", "seven!", "8", "nine"]
    pairs = [[{"prompt": "Count.", "response": text}] * 2 for text in texts]
    for same in scorer.comparisons(pairs, names, **settings):
        assert same.winner == "tie" and same.agreement == 0 and set(same.probabilities.values()) == {0.5}


class near_record:  # noqa: N801
    def __init__(self, record):
        self.record = record

    def __eq__(self, other):
        numbers = {k: v for k, v in self.record.items() if not isinstance(v, str)}
        return other.keys() == self.record.keys() and {k: other[k] for k in numbers} == near(numbers)


# -------------------------------------------------------------------------------------------------------- independence


def test_a_signal_does_not_depend_on_what_it_is_computed_with():
    model, _ = adapted()
    scorer = GRMScorer(model, TOKENIZER)
    names = [*PLAIN, "implicit"]
    together = scorer.signals(CHATS, names, wording=WORDING)
    for name in names:
        for chat, whole in zip(CHATS[:3], together, strict=False):
            (record,) = scorer.signals([chat], [name], wording=WORDING)
            assert {k: whole[k] for k in record} == near(record, 1e-8)
    assert [record["head"] for record in together] == near(scorer.score(CHATS))
    assert together == list(scorer.stream_signals(CHATS, names, window=1000, wording=WORDING))
    in_windows = list(scorer.stream_signals(iter(CHATS), names, window=2, wording=WORDING))
    assert all(near_record(a) == b for a, b in zip(together, in_windows, strict=True))


def test_deterministic_signals_have_the_same_bits_whatever_they_are_computed_with():
    model, _ = adapted(torch.float32)
    scorer = GRMScorer(model, TOKENIZER, deterministic=True)
    names = [*PLAIN, "implicit", "critique"]
    settings = dict(wording=WORDING, generate=True, max_new_tokens=4)
    together = scorer.signals(CHATS[:3], names, **settings)
    for name in names:
        for chat, whole in zip(CHATS, together, strict=False):
            (record,) = scorer.signals([chat], [name], **settings)
            assert {k: whole[k] for k in record} == record
    assert [record["head"] for record in together] == scorer.score(CHATS[:3])
    batched = GRMScorer(model, TOKENIZER).signals(CHATS[:3], names, **settings)
    for a, b in zip(together, batched, strict=True):
        assert {k: v for k, v in a.items() if k != "critique/text"} == pytest.approx(
            {k: v for k, v in b.items() if k != "critique/text"}, rel=1e-3, abs=1e-4
        )


def test_the_bits_of_a_likelihood_do_not_depend_on_the_value_behind_it():
    """Wide enough that the bits of a product depend on its number of rows: an answer of three tokens."""
    model = grm(dtype=torch.float32, hidden_size=576, vocab_size=2048, num_hidden_layers=1)
    scorer = GRMScorer(model, TOKENIZER, deterministic=True)
    chats = [[user("Q"), assistant(letter)] for letter in "ABCDEFGH"]
    together = scorer.signals(chats, ["likelihood", "endogenous"])
    assert [r["likelihood"] for r in together] == [r["likelihood"] for r in scorer.signals(chats, ["likelihood"])]
    assert [r["endogenous"] for r in together] == [r["endogenous"] for r in scorer.signals(chats, ["endogenous"])]


def test_nothing_is_left_behind():
    model, _ = adapted()
    model.train()
    before = [m.training for m in model.modules()], torch.get_rng_state().tolist()
    GRMScorer(model, TOKENIZER).signals(CHATS[:1], [*PLAIN, "implicit", "critique"], generate=True, max_new_tokens=2)
    assert ([m.training for m in model.modules()], torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(
    ("tokenizer", "end"), [(llama_tokenizer(), ""), (bare_tokenizer(), "</s>")], ids=["llama", "bare"]
)
def test_other_templates(tokenizer, end):
    """The text of the next turn, and nothing else, is what counts: its tokens are those of its bytes. The answer
    counts with its end of turn, which is EOS where the template writes none."""
    model = grm(tokenizer=tokenizer)
    scorer = GRMScorer(model, tokenizer)
    chat = [{"role": "system", "content": "Be brief."}, user("zero"), assistant("half"), user("one"), assistant("t")]

    def render(messages, **opening):
        return tokenizer.apply_chat_template(messages, tokenize=False, **opening)

    before = render(chat[:-1], add_generation_prompt=True)
    answer = said(model, before, render(chat).removeprefix(before) + end, tokenizer)
    assert len(answer) == 2  # one token and the end
    behind = render([*chat, user("?")]).split("?")[0]
    word = lambda text: np.mean(said(model, behind, text, tokenizer))  # noqa: E731
    asked = render([*chat, user("Good?")], add_generation_prompt=True)
    encoded = scorer.encoder.encode_open([*chat, user("Nice")])
    assert tokenizer.decode(encoded.ids[encoded.start :]) == "Nice"
    assert encoded.ids[: len(encoded.ids) - 4].count(tokenizer.bos_token_id or -1) <= 1
    (record,) = scorer.signals([chat], ["likelihood", "follow_up", "judge"], wording=WORDING)
    assert record["likelihood"] == near(np.mean(answer)) and record["likelihood/sum"] == near(sum(answer))
    assert record["judge"] == near(math.exp(sum(said(model, asked, "Yes", tokenizer))))
    truth = (word("Right.") + word("That is so.")) / 2 - word("Wrong!")
    tone = word("Nice") - (word("Rude") + word("Dull") + word("Cold")) / 3
    assert record["follow_up"] == near((truth + tone) / 2) and record["follow_up/tone"] == near(tone)


def test_a_longer_conversation_is_cut_as_scores_are():
    model = grm()
    model.config.max_sequence_length = 40
    scorer = GRMScorer(model, TOKENIZER)
    (record,) = scorer.signals(CHATS[:1], PLAIN, wording=WORDING)
    assert record["truncated"] and record["tokens"] == 40
    assert record["head"] == near(scorer.score(CHATS[:1])[0])


# ---------------------------------------------------------------------------------------------------------------- cost


# As a model of 7 billion parameters (Qwen2.5-7B): 28 layers, an LM head of 8 % of the body. The answer is two fifths
# of the tokens, as in hhh_alignment; docs/signals.md says what other proportions cost.
SIZE = dict(hidden_size=64, intermediate_size=340, num_hidden_layers=28, vocab_size=2840)


def costly():
    model = grm(dtype=torch.float32, **SIZE)
    return model, model.lm.lm_head.weight.numel() / sum(p.numel() for p in model.model.layers.parameters())


def the_formula(model, chats):
    """What docs/signals.md says: LM head and last layer work on the answers, beside one pass over everything."""
    encoded = [GRMScorer(model, TOKENIZER).encode(chat) for chat in chats]
    part = sum(len(e.ids) - e.start for e in encoded) / sum(len(e.ids) for e in encoded)
    body = sum(p.numel() for p in model.model.layers.parameters())
    return 1 + part * (model.lm.lm_head.weight.numel() / body + 1 / model.config.num_hidden_layers)


def long_chats(n=8, prompt=120, answer=80):
    letters = np.random.default_rng(0)
    text = lambda k: "".join(letters.choice(list("abcdefgh "), k)).strip().ljust(k, "x")  # noqa: E731
    return [[user(text(prompt)), assistant(text(answer))] for _ in range(n)]


def test_four_signals_cost_little_more_than_one():
    peft = pytest.importorskip("peft")
    model, share = costly()
    assert 0.08 < share < 0.09
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], r=2)
    ).eval()
    scorer, chats = GRMScorer(wrapped, TOKENIZER), long_chats()
    alone = flops(lambda: scorer.score(chats))
    without = flops(lambda: scorer.signals(chats, ["head", "likelihood", "implicit_free", "endogenous"]))
    with_reference = flops(lambda: scorer.signals(chats, ["head", "likelihood", "endogenous", "implicit"]))
    assert 1.0 < without / alone <= 1.25
    assert 1.8 < with_reference / alone <= 2.1
    expected = the_formula(model, chats)
    assert without / alone == pytest.approx(expected, abs=0.03)
    assert with_reference / alone == pytest.approx(2 * expected, abs=0.06)
    assert flops(lambda: scorer.signals(chats, ["head"])) == alone  # the LM head is not run for nothing


def test_follow_ups_cost_their_tokens():
    model, _ = costly()
    scorer, chats = GRMScorer(model, TOKENIZER), long_chats(4)
    alone = flops(lambda: scorer.score(chats))
    both = flops(lambda: scorer.signals(chats, ["head", "follow_up"]))
    texts = [text for sets in FOLLOW_UPS.values() for side in sets.values() for text in side]
    own = sum(len(tokens("<|im_start|>user\n" + text)) for text in texts)
    answer = len(tokens(before_and_answer(chats[0])[1]))
    assert 1.0 < both / alone <= 1 + own / answer


def test_what_signals_have_in_common_is_computed_once():
    """Together they cost what each adds to the reward, and the prompt of a pair is computed once for both answers,
    the verdicts on each and the verdict on both."""
    model, _ = costly()
    scorer, chats = GRMScorer(model, TOKENIZER), long_chats(4)
    names = ["likelihood", "endogenous", "judge", "follow_up", "dropout"]
    alone = flops(lambda: scorer.score(chats))
    added = [flops(lambda name=name: scorer.signals(chats, ["head", name], wording=WORDING)) - alone for name in names]
    together = flops(lambda: scorer.signals(chats, ["head", *names], wording=WORDING))
    assert together < 1.01 * (alone + sum(added)) and together < 2 * alone
    prompt = "x" * 800
    pair = [{"prompt": prompt, "response": answer} for answer in ("one two", "three")]
    both = flops(lambda: scorer.compare(prompt, "one two", "three", ["judge"], wording=WORDING))
    assert both < 1.4 * flops(lambda: scorer.score(pair))


# ----------------------------------------------------------------------------------------------------------- agreement


def test_divergence_is_that_of_two_distributions():
    def jensen_shannon(*ps):
        two = np.array([[p, 1 - p] for p in ps])
        mean = two.mean(0)
        return np.mean([sum(x * np.log2(x / m) for x, m in zip(row, mean, strict=True) if x) for row in two])

    for ps in ((0.2, 0.9, 0.4), (0.5, 0.5), (1.0, 0.25), (1e-12, 0.3)):
        assert divergence(ps) == pytest.approx(jensen_shannon(*ps), abs=1e-12)
    assert divergence([0.3] * 7) == 0 and divergence([0.0, 1.0]) == 1


def test_agreement_is_the_share_on_the_winners_side_and_abstains_below_the_threshold():
    scorer = GRMScorer(grm(), TOKENIZER)
    names = ["likelihood", "judge", "dropout", "follow_up"]
    for a, b in (("one", "two three"), ("ten nine", "eight"), ("six", "five four")):
        found = scorer.compare("Count.", a, b, names, wording=WORDING)
        assert list(found.probabilities) == ["head", *names]
        side = found.winner == "a"
        assert found.agreement == sum((p > 0.5) is side for p in found.probabilities.values()) / 5
        assert found.probabilities["head"] == near(scorer.probability(found.a["head"], found.b["head"]))
        assert not found.abstain and found.threshold is None
        assert scorer.compare("Count.", a, b, names, threshold=1.0, wording=WORDING).abstain is (found.agreement < 1)
    with pytest.raises(ValueError, match="the head is alone"):  # it always agrees with itself
        scorer.compare("Count.", a, b, threshold=0.9)
    assert scorer.compare("Count.", "one", "two").probabilities.keys() == {"head"}  # nothing else by default


def test_many_comparisons_are_those_of_each():
    scorer = GRMScorer(grm(), TOKENIZER)
    rows = [("Count.", "one", "two"), ([user("Sing.")], "la", "li lo")]
    pairs = [[{"prompt": prompt, "response": answer} for answer in answers] for prompt, *answers in rows]
    for row, found in zip(rows, scorer.comparisons(pairs, PLAIN, wording=WORDING), strict=True):
        single = scorer.compare(*row, PLAIN, wording=WORDING)
        assert single.probabilities == near(found.probabilities) and single.winner == found.winner


# -------------------------------------------------------------------------------------------------------------- errors


def test_mistakes_are_one_sentence():
    scorer = GRMScorer(grm(), TOKENIZER)
    ask = lambda names, chats=CHATS[:1], **settings: scorer.signals(chats, names, **settings)  # noqa: E731
    for call, message in (
        (lambda: ask("head"), r"give a list of names, \['head'\]"),
        (lambda: ask(["heads"]), "there is no signal 'heads'; the signals are head, likelihood"),
        (lambda: ask(["head"], temperature=1), "`temperature` is no setting of signals; there are"),
        (lambda: ask(["critique"]), "ask for it by generate=True"),
        (lambda: ask(["implicit"]), "no adapter to switch off. Pass it as `reference`"),
        (lambda: ask(["head"], reference=[1.0]), "none of the signals .* needs one"),
        (lambda: ask(["judge"], ["some text"]), "chat 0, signal 'judge': this is text"),
        (lambda: ask(["head"], [CHATS[0], [user("x")]]), "chat 1: "),
        (lambda: ask(["head"], alpha=0), "`alpha` is 0; it must be a positive number"),
        (lambda: ask(["dropout"], draws=1), "a spread needs at least 2"),
        (lambda: ask(["dropout"], dropout=1.0), "`dropout` is 1.0; it must lie between 0 and 1"),
        (lambda: ask(["head"], max_new_tokens=0), "`max_new_tokens` is 0"),
        (lambda: Wording(follow_ups={}), "`follow_ups` is empty"),
        (lambda: Wording(follow_ups={"x": {"positive": ["a"]}}), "no list of sentences for 'x', 'negative'"),
        (lambda: Wording(pair="{a}"), "must hold {a} and {b}"),
        (lambda: Wording(yes="No"), "must differ"),
        (lambda: ask(["follow_up"], wording=Wording(follow_ups={"x": {"positive": [" "], "negative": ["b"]}})),
         "chat 0, signal 'follow_up': the chat template does not write the text"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert ask(["likelihood"], ["some text"])[0]["likelihood"] < 0  # text has a likelihood


def test_broken_weights_are_said():
    model = grm()
    with torch.no_grad():
        model.lm.lm_head.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        GRMScorer(model, TOKENIZER).signals(CHATS[:1], ["likelihood"])


def test_every_row_of_the_table_says_what_it_is():
    assert list(SIGNALS)[:3] == ["head", "likelihood", "implicit"]
    for name, signal in SIGNALS.items():
        assert signal.sentence.endswith(".") and signal.needs in ("", "messages", "reference", "generate"), name
    assert len(FOLLOW_UPS) == 6 and Settings().wording.follow_ups is FOLLOW_UPS


# ------------------------------------------------------------------------------------------- evaluation, configuration


def a_report(n=60, seed=0):
    """Pairs on which `follow_up` is a copy of the head that is right where the head is, `judge` a coin."""
    rng = np.random.default_rng(seed)
    head = rng.normal(0.8, 1, n)
    noise = rng.normal(0, 1, n)
    margins = {
        "head": head.tolist(),
        "likelihood": (head + rng.normal(0.6, 0.8, n)).tolist(),
        "dropout": noise.tolist(),
        "follow_up": (-np.abs(noise)).tolist(),
    }
    probabilities = {name: (1 / (1 + np.exp(-np.array(values)))).tolist() for name, values in margins.items()}
    return SignalReport("own", margins, probabilities, [str(i // 2) for i in range(n)], 0, {})


def test_the_report_is_what_is_counted_by_hand():
    report = a_report()
    found = report.summary(threshold=0.75)
    margins = {name: np.array(values) for name, values in report.margins.items()}
    right = margins["head"] > 0
    for name, values in margins.items():
        assert found["signals"][name]["accuracy"] == pytest.approx((values > 0).mean())
        assert found["signals"][name]["difference"] == pytest.approx((values > 0).mean() - right.mean())
    assert found["signals"]["likelihood"]["verdict"] == "better than chance"
    assert found["signals"]["dropout"]["verdict"] == "at chance"
    assert found["signals"]["follow_up"]["verdict"] == "worse than chance"
    agreement = np.mean([(values > 0) == right for values in margins.values()], 0)
    assert report.agreement() == pytest.approx(agreement.tolist())
    agreed = agreement >= 0.75
    assert found["agreed"]["coverage"] == pytest.approx(agreed.mean())
    assert found["agreed"]["accuracy"] == pytest.approx(right[agreed].mean())
    assert found["agreed"]["difference"] == pytest.approx(right[agreed].mean() - right.mean())
    order = np.argsort(-np.abs(margins["head"]))
    by_hand = np.mean((~right[order]).cumsum() / np.arange(1, 61))
    assert found["risk_coverage"]["margin"]["area"] == pytest.approx(by_hand)
    printed = signals_text(found)
    assert "worse than chance" in printed and "60 pairs of 30 prompts" in printed


def test_a_signal_that_prefers_neither_response_is_at_chance():
    """A judge whose verdicts follow the place of an answer ties, and so does the implicit reward of an LM head that
    training has not moved. Neither is wrong."""
    report, n = a_report(), 60
    report.margins["judge"] = [0.0] * 24 + [0.1, -0.1] * 18
    report.margins["implicit"] = [0.0] * n
    for name in ("judge", "implicit"):
        report.probabilities[name] = [0.5 + margin for margin in report.margins[name]]
    found = report.summary()["signals"]
    assert {found[name]["accuracy"] for name in ("judge", "implicit")} == {0.5}
    assert {found[name]["verdict"] for name in ("judge", "implicit")} == {"at chance"}
    assert (found["judge"]["ties"], found["implicit"]["ties"], found["head"]["ties"]) == (0.4, 1.0, 0.0)


@pytest.mark.parametrize(("prompts", "verdict"), [(9, "too few prompts"), (12, "better than chance")])
def test_pairs_that_are_all_right_are_not_certainty(prompts, verdict):
    margins = {"head": [1.0] * prompts, "likelihood": [1.0] * prompts}
    probabilities = dict.fromkeys(margins, [0.7] * prompts)
    report = SignalReport("own", margins, probabilities, list(map(str, range(prompts))), 0, {})
    summary = report.summary()
    found = summary["signals"]["likelihood"]
    assert found["accuracy"] == 1.0 and found["verdict"] == verdict
    ends = [found["low"], found["high"]] if prompts > 9 else [math.nan] * 2
    assert ends == pytest.approx(wilson_interval(prompts, prompts) if prompts > 9 else ends, nan_ok=True)
    assert math.isnan(summary["risk_coverage"]["agreement"]["difference_low"]) is (prompts < 10)
    assert summary["risk_coverage"]["margin"]["area"] == 0 and "nan" not in signals_text(summary)
    assert report.choice()["threshold"] is None


def test_only_what_helped_on_the_file_is_chosen():
    report = a_report(400)
    chosen = report.choice()
    assert chosen["names"] == ["likelihood"] and chosen["threshold"] == 1.0
    assert chosen["scales"] == {"likelihood": fit_temperature(report.margins["likelihood"])[0]}
    copy = a_report(400)
    copy.margins = {"head": copy.margins["head"], "likelihood": copy.margins["head"]}
    found = copy.choice()
    assert found["names"] == [] and found["threshold"] is None and list(found["scales"]) == ["likelihood"]
    coins = a_report(40)
    coins.margins = {"head": coins.margins["head"], "dropout": coins.margins["dropout"]}
    assert coins.choice() == {"names": [], "scales": {}, "threshold": None, "pairs": 40}


def test_risk_and_coverage():
    found = risk_coverage([1, -1, 1, -1], [4, 3, 2, 1])
    assert found["risk"] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2]) and found["coverage"] == [0.25, 0.5, 0.75, 1]
    assert found["area"] == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 1 / 2]))
    tied = risk_coverage([1, -1, 1, -1], [1, 1, 1, 1])
    assert tied["risk"] == [0.5] and tied["area"] == pytest.approx(0.5)  # in random order
    margins = [1] * 8 + [-1] * 2
    best, tied, worst = (risk_coverage(margins, [s * (i < 8) for i in range(10)])["area"] for s in (1, 0, -1))
    assert tied == pytest.approx(0.2) and best < tied < worst
    for call, message in (
        (lambda: risk_coverage([1.0], [1.0, 2.0]), "confidences"),
        (lambda: selective_accuracy([1.0, -1.0], [1.0, 0.0], 0.5, ["a", "a"]), "at least two groups"),
        (lambda: compare_confidences([1.0, -1.0], [1, 2], [2, 1], ["a", "a"]), "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for groups, answered in ((12, 9), (12, 10)):  # one answered pair, and a right one, is no evidence
        found = selective_accuracy(
            [1.0] * answered + [-1.0] * (groups - answered), [1.0] * answered + [0.0] * (groups - answered), 0.5
        )
        assert found["accuracy"] == 1.0 and math.isnan(found["difference_low"]) is (answered < 10)
    nothing = selective_accuracy([1.0, -1.0], [0.0, 0.0], 0.5)
    assert nothing["coverage"] == 0 and math.isnan(nothing["accuracy"]) and math.isnan(nothing["difference_low"])


def test_the_interval_of_two_confidences_holds_what_is_true():
    rng = np.random.default_rng(1)
    margins = rng.normal(0.5, 1, 300)
    good, bad = (margins > 0) + 0.5 * rng.normal(size=300), rng.normal(size=300)
    found = compare_confidences(margins, good, bad)
    areas = [risk_coverage(margins, confidence)["area"] for confidence in (good, bad)]
    assert found["difference"] == pytest.approx(areas[0] - areas[1])
    assert found["difference_low"] < found["difference"] < found["difference_high"] < 0
    same = compare_confidences(margins, good, good)
    assert same["difference"] == same["difference_low"] == same["difference_high"] == 0


def test_the_configuration_keeps_the_choice(tmp_path):
    model = grm(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert before.get("signals") is None
    before.pop("signals", None)  # a model of an earlier version
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert GRMForSequenceClassification.from_pretrained(tmp_path).config.signals is None
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    stored = store_choice(tmp_path, a_report(400), tmp_path / "pairs.jsonl")
    assert stored["file_sha256"] == hashlib.sha256(b"{}\n").hexdigest()
    assert not list(tmp_path.glob("*.partial"))
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.signals == stored
    loaded.save_pretrained(tmp_path / "again")
    assert GRMForSequenceClassification.from_pretrained(tmp_path / "again").config.signals == stored
    after = json.loads((tmp_path / "config.json").read_text())
    assert {**after, "signals": None} == {**before, "signals": None}  # and nothing else has changed
    plain, scorer = GRMScorer(model, TOKENIZER), GRMScorer(loaded, TOKENIZER)
    assert scorer.score(CHATS) == plain.score(CHATS)
    found = scorer.compare("Count.", "one", "two three")
    assert list(found.probabilities) == ["head", "likelihood"] and found.threshold == 1.0
    assert found.abstain is (found.agreement < 1)
    scaled = (found.a["likelihood"] - found.b["likelihood"]) / stored["scales"]["likelihood"]
    assert found.probabilities["likelihood"] == pytest.approx(1 / (1 + math.exp(-scaled)))
    assert scorer.compare("Count.", "one", "two", ["judge"]).threshold is None  # of other signals it says nothing
    with pytest.raises(ValueError, match="there is no file"):
        store_choice(tmp_path, a_report(), tmp_path / "none.jsonl")


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("signals")
    grm(dtype=torch.float32).save_pretrained(place / "model")
    TOKENIZER.save_pretrained(place / "model")
    grm(seed=3, dtype=torch.float32).lm.save_pretrained(place / "base")
    rows = [
        {"prompt": [user(f"Question {i}")], "chosen": [assistant(f"one two {i}")], "rejected": [assistant("three")]}
        for i in range(12)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": f"Question {i}", "response": "one two", "id": i} for i in range(5)]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (place / "wording.json").write_text(json.dumps({"question": "Gut?", "yes": "Ja", "no": "Nein"}))
    return place


def test_grm_score_writes_signals_beside_the_score_and_goes_on(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    command = ["score", str(folder / "chats.jsonl"), "--model", str(folder / "model"), "--output", str(output)]
    options = ["--signals", "likelihood,implicit,judge", "--reference-model", str(folder / "base")]
    assert main([*command, *options, "--wording", str(folder / "wording.json")]) == 0
    whole = output.read_bytes()
    scorer = GRMScorer(str(folder / "model"))
    chats = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    expected = scorer.signals(
        chats, ["head", "likelihood", "implicit", "judge"], reference=str(folder / "base"),
        wording=Wording(question="Gut?", yes="Ja", no="Nein"),
    )
    for line, record in zip(map(json.loads, whole.splitlines()), expected, strict=True):
        assert line["score"] == pytest.approx(record["head"]) and line["tokens"] == record["tokens"]
        assert line["signals"] == pytest.approx(
            {k: record[k] for k in record if k.split("/")[0] in ("likelihood", "implicit", "judge")}, rel=1e-5
        )
    output.write_bytes(whole[: len(whole) // 2])
    assert main([*command, *options, "--wording", str(folder / "wording.json")]) == 0
    assert output.read_bytes() == whole
    assert main([*command, "--signals", "likelihood"]) == 1  # these are no results of other signals
    assert "holds other results" in capsys.readouterr().err and output.read_bytes() == whole


def test_grm_compare_explains(folder, capsys):
    command = ["compare", "Count.", "one two", "three", "--model", str(folder / "model")]
    assert main([*command, "--explain"]) == 0
    out = capsys.readouterr().out
    for name, signal in SIGNALS.items():
        assert (signal.sentence in out) is (signal.needs in ("", "messages")), name
    assert "signals agree; their divergence is" in out and "grm eval --choose" in out
    assert main([*command, "--signals", "likelihood,critique", "--generate", "--max-new-tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["probabilities"]) == ["head", "likelihood", "critique"] and "critique/text" in found["a"]
    assert f"A: no {found_no(folder, 'one two'):.4f}" in out and "when_first 0." in out and "letters 0.0" in out
    signals = ["likelihood", "judge", "follow_up"]
    for threshold, said in (("1", "Abstain: fewer agree than --threshold asks for (1.00)."), ("0.1", None)):
        assert main([*command, "--signals", ",".join(signals), "--threshold", threshold]) == 0
        out = capsys.readouterr().out
        assert said in out if said else "Abstain" not in out and "Nothing says" not in out


def found_no(folder, answer):
    (record,) = GRMScorer(str(folder / "model")).signals([{"prompt": "Count.", "response": answer}], ["judge"])
    return record["judge/no"]


def test_grm_compare_says_what_the_validation_file_showed(folder, tmp_path, capsys):
    command = ["compare", "Count.", "one two", "three", "--explain", "--model", str(tmp_path / "model")]
    shutil.copytree(folder / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    for names, threshold, said in (
        ([], None, "On the validation file no signal helped"),
        (["likelihood", "judge", "follow_up"], 1.0, "fewer agree than on the validation file was enough (1.00)"),
    ):
        values["signals"] = {"names": names, "scales": {}, "threshold": threshold}
        config.write_text(json.dumps(values))
        assert main(command) == 0
        out = capsys.readouterr().out
        assert said in out and ("endogenous" in out) is (not names)


def test_grm_eval_reports_signals_and_stores_what_helps(folder, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    command = ["eval", str(model), "--data", str(folder / "pairs.jsonl"), "--signals", "likelihood,judge"]
    assert main([*command, "--output", str(tmp_path / "out"), "--choose"]) == 0
    out = capsys.readouterr().out
    assert "12 pairs of 12 prompts" in out and "area under the risk-coverage curve by agreement" in out
    (summary,) = json.loads((tmp_path / "out" / "signals.json").read_text())
    report = (tmp_path / "out" / "report.html").read_text()
    assert f"<td>likelihood</td><td>{100 * summary['signals']['likelihood']['accuracy']:.2f}</td>" in report
    (chart,) = re.findall(r"<svg[^>]*Wrong pairs among those answered.*?</svg>", report)
    lines = {line.get("stroke"): line.get("points").split() for line in ElementTree.fromstring(chart).iter("polyline")}
    assert [len(points) for points in lines.values()] == [
        len(curve["risk"]) for curve in summary["risk_coverage"].values()
    ]
    assert all(points[-1].startswith("470.0,") for points in lines.values())  # all pairs, at the right edge
    stored = GRMForSequenceClassification.from_pretrained(model).config.signals
    helped = [n for n, row in summary["signals"].items() if row["verdict"] == "better than chance" and n != "head"]
    assert stored["names"] == (helped if stored["threshold"] is not None else [])
    assert f"chosen: {', '.join(stored['names']) or 'no signal'}" in out
    assert stored["file_sha256"] == hashlib.sha256((folder / "pairs.jsonl").read_bytes()).hexdigest()
    margins = [GRMScorer(str(model)).comparisons(
        [({"prompt": [user(f"Question {i}")], "response": f"one two {i}"},
          {"prompt": [user(f"Question {i}")], "response": "three"})], ["likelihood"])[0].lean("likelihood")
        for i in range(12)]
    assert summary["signals"]["likelihood"]["accuracy"] == np.mean([m > 0 for m in margins])
    choice = {"names": ["judge"], "scales": {}, "threshold": 0.5, "pairs": 12}
    monkeypatch.setattr(SignalReport, "choice", lambda self: choice)  # of pairs on which something helps
    assert main([*command, "--output", str(tmp_path / "out"), "--choose"]) == 0
    assert "chosen: judge; threshold: 0.5" in capsys.readouterr().out
    stored = GRMForSequenceClassification.from_pretrained(model).config.signals
    assert stored == {**choice, "suite": "own", "file_sha256": stored["file_sha256"]}
    # the same model still takes up its own results: no score depends on the choice
    assert main([*command, "--output", str(tmp_path / "out")]) == 0


def test_commands_say_what_is_missing(folder, capsys):
    model = str(folder / "model")
    score = ["score", str(folder / "chats.jsonl"), "--model", model]
    evaluation = ["eval", model, "--data", str(folder / "pairs.jsonl")]
    bad = folder / "bad.json"
    bad.write_text('{"ask": "?"}')
    for command, message in (
        ([*score, "--signals", "heads"], "there is no signal 'heads'"),
        ([*score, "--signals", "critique"], "generate=True"),
        ([*score, "--signals", "implicit"], "no adapter to switch off"),
        ([*score, "--generate"], "no signals: name some by --signals"),
        ([*score, "--signals", "judge", "--wording", str(bad)], "is no JSON object with any of follow_ups, question"),
        ([*score, "--model", model, "--signals", "judge"], "those of a single model"),
        ([*evaluation, "--choose"], "--choose needs --signals"),
        ([*evaluation, "--choose", "--signals", "judge", "--suite", "own,hhh"], "of one suite, and there are several"),
        (["eval", str(folder), *evaluation[2:], "--choose", "--signals", "judge"], "Make an adapter a whole model by"),
        ([*evaluation, "--signals", "implicit"], "no adapter to switch off"),
        ([*evaluation, "--signals", "judge", "--threshold", "75"], "it is a share of the signals, from 0 to 1"),
        ([*score, "--signals", ""], "there is no signal ''"),
        ([*score, "--signals", "judge", "--reference-model", model], "none of the signals ['head', 'judge']"),
        ([*evaluation, "--threshold", "0.5"], "name some by --signals"),
        ([*evaluation, "--member", model, "--trust-remote-code"], "--member makes an ensemble of GRMs"),
        (["compare", "a", "b", "c", "--model", model, "--signals", ""], "there is no signal ''"),
        (["compare", "a", "b", "c", "--model", model, "--threshold", "1"], "add --explain"),
        (["compare", "a", "b", "c", "--model", model, "--explain", "--threshold", "2"], "`threshold` is 2.0"),
    ):
        assert main(command) == 1
        said = capsys.readouterr()
        assert message in said.err and "Traceback" not in said.err, command
        assert not said.out, command  # before the work, not behind it


def test_a_setting_that_no_signal_depends_on_is_said():
    read = {setting for signal in SIGNALS.values() for setting in signal.reads}
    assert read == set(Settings.__dataclass_fields__)
    scorer, chats = GRMScorer(grm(), TOKENIZER), [{"prompt": "Count.", "response": "one"}]
    for name, settings in (("likelihood", {"beta": 2.0}), ("implicit_free", {"alpha": 2.0}), ("judge", {"draws": 9})):
        expected = scorer.signals(chats, [name])
        with pytest.warns(UserWarning, match=f"`{next(iter(settings))}` is ignored: none of the signals {name}"):
            assert scorer.signals(chats, [name], **settings) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scorer.signals(chats, ["implicit_free"], beta=2.0) != scorer.signals(chats, ["implicit_free"])
        assert scorer.signals(chats, ["endogenous"], alpha=2.0) != scorer.signals(chats, ["endogenous"])


def test_the_commands_name_every_signal():
    for command in ("score", "eval", "compare"):
        words = " ".join(subcommand(command).format_help().split())
        assert ", ".join(name for name in SIGNALS if name != "head") in words


def subcommand(name):
    (commands,) = (a for a in command_line()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


# ---------------------------------------------------------------------------------------------------------------- docs


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "signals.md").read_text(encoding="utf-8")


def test_the_page_has_a_row_for_every_signal():
    rows = [line.split("`")[1] for line in PAGE.split("## The table")[1].splitlines() if line.startswith("| `")]
    assert rows[: len(SIGNALS)] == list(SIGNALS)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_python_blocks_of_the_page_run(folder, code, capsys):
    exec(compile(code.replace("runs/demo/model", str(folder / "model")), "signals.md", "exec"), {})
    assert "nan" not in capsys.readouterr().out


def test_commands_of_the_page_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    shutil.copy(folder / "pairs.jsonl", folder / "my_pairs.jsonl")
    for line in re.findall(r"^grm (.*)$", PAGE, re.M):
        assert main([str(folder / "model") if w == "runs/demo/model" else w for w in shlex.split(line)]) == 0, line
    assert '"endogenous"' in capsys.readouterr().out


def test_the_example_runs(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("signals_example", ROOT / "examples" / "signals.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (command,) = re.findall(r"^    python examples/signals.py (.*)$", example.__doc__, re.M)
    given = {"grm": str(folder / "model"), "pairs.jsonl": str(folder / "pairs.jsonl")}
    choice = example.main([given.get(word, word) for word in shlex.split(command)])
    assert set(choice["names"]) <= {"likelihood", "judge", "follow_up"}
    assert "first half: 6 pairs of 6 prompts" in capsys.readouterr().out
    monkeypatch.setattr(SignalReport, "choice", lambda self: {"names": ["judge"], "threshold": 0.5})
    example.main([given.get(word, word) for word in shlex.split(command)])
    assert "on the second half: {'coverage':" in capsys.readouterr().out
    # Both pairs of a prompt are in one half; a line separator in a text is no end of a line.
    rows = [{"prompt": p, "chosen": f"yes\u2028{i}", "rejected": "no"} for i, p in enumerate("abba")]
    file = folder / "few.jsonl"
    file.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    first, second = example.halves(example.read(str(file)))
    assert [[e.prompt for e in half] for half in (first, second)] == [["a", "a"], ["b", "b"]]
