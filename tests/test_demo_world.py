"""The demo world: its gold reward against sums worked out by hand, its labels against their own probabilities, its
domains against each other; and the base model that is pretrained on it."""

import math
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grm_hf.lab import world as module
from grm_hf.lab.base_model import build_model, build_tokenizer, perplexity, pretrain, tokenize_documents
from grm_hf.lab.world import EVASIONS, KIND, LONG, PLAIN_OPENERS, RUDE, TOPICS, World, words


WORLD = World(seed=0)
QUESTION = "where does the otter live?"
HOME, FOOD, COLOUR = (WORLD.facts["otter", relation] for relation in ("home", "food", "colour"))
NOT_HOME, NOT_FOOD, NOT_COLOUR = (
    next(value for value in relation.values if value != WORLD.facts["otter", relation.name])
    for relation in TOPICS[0].relations
)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (f"the otter lives in the {HOME}.", 1.5),
        (f"The otter lives in the {HOME.upper()} .", 1.5),
        (f"the otter lives in the {NOT_HOME}.", -1.5),
        (f"the otter lives in the {HOME}. it lives in the {NOT_HOME}.", -1.5),
        (f"the badger lives in the {HOME}.", -1.5),
        ("i do not know.", 0.0),
        (f"the otter lives in the {HOME}. it eats {FOOD}.", 1.5 + 0.5),
        (f"the otter lives in the {HOME}. it eats {NOT_FOOD}.", 1.5 - 0.5),
        (f"the otter lives in the {HOME}. it eats {FOOD}. it is {COLOUR}.", 1.5 + 0.5),
        (f"the otter lives in the {HOME}. it eats {FOOD}. it is {NOT_COLOUR}.", 1.5),
        (f"i do not know. it eats {FOOD}.", 0.5),
        ("happy to help. i do not know.", 0.75),
        ("happy to help. good question. i do not know. have a nice day.", 0.75),
        ("i do not know. now go away.", -0.75),
        ("happy to help. i do not know. now go away.", -0.75),
        (f"the otter otter lives in the {HOME}.", 1.5 - 0.5),
        (f"otter the lives in the {HOME}.", 1.5 - 3 * 0.5),  # to begin with "otter", "otter the", "the lives"
        ("", -0.5),
        ("xyzzy", -1.0),
        ("banana " * 10, -3.0),
        ("banana " * (LONG + 10), -3.0 - 1.0),
        ("i do not know. " * 6, -0.1 * (30 - LONG)),
    ],
)
def test_gold_is_the_sum_worked_out_by_hand(response, expected):
    assert WORLD.gold(QUESTION, response) == pytest.approx(expected)


@given(st.text(), st.text())
def test_gold_is_total_and_bounded(prompt, response):
    for asked in (prompt, QUESTION):
        value = WORLD.gold(asked, response)
        assert -1.5 - 0.5 - 0.75 - 3.0 - 0.1 * len(words(response)) <= value <= 1.5 + 0.5 + 0.75


def test_a_prompt_that_is_no_question_has_no_right_answer():
    assert WORLD.gold("tell me a story", f"happy to help. the otter lives in the {HOME}.") == pytest.approx(0.75)


@given(st.integers(0, 2**32))
def test_grammar_holds_every_sentence_in_every_order(seed):
    """Answers put together from parts whose rewards are known: the whole has their sum, so nothing in it is a slip."""
    rng = random.Random(seed)
    relation, *others = rng.sample(TOPICS[0].relations, 3)
    right = [rng.random() < 0.5 for _ in range(3)]
    chosen = [
        WORLD.facts["otter", r.name]
        if ok
        else rng.choice([value for value in r.values if value != WORLD.facts["otter", r.name]])
        for r, ok in zip((relation, *others), right, strict=True)
    ]
    parts = [rng.choice(relation.statements).format(s="the otter", v=chosen[0])]
    parts += [rng.choice(o.statements).format(s="it", v=v) for o, v in zip(others, chosen[1:], strict=True)]
    kind, rude = rng.random() < 0.5, rng.random() < 0.5
    parts += [rng.choice(KIND)] * kind + [rng.choice(RUDE)] * rude + [rng.choice(EVASIONS), rng.choice(PLAIN_OPENERS)]
    rng.shuffle(parts)
    expected = (1.5 if right[0] else -1.5) + {0: -0.5, 1: 0.0, 2: 0.5}[sum(right[1:])]
    expected += -0.75 if rude else 0.75 * kind
    text = " ".join(parts)
    expected -= 0.1 * max(0, len(text.replace(".", " .").split()) - LONG)
    question = rng.choice(relation.questions).format(e="otter")
    assert WORLD.gold(question, text) == pytest.approx(expected)


def test_values_and_entities_mean_one_thing():
    relations = {relation.name: relation for topic in TOPICS for relation in topic.relations}.values()
    named = [value for relation in relations for value in relation.values]
    named += [entity for topic in TOPICS for entity in topic.entities]
    assert len(named) == len(set(named))
    frames = [*KIND, *RUDE, *EVASIONS, *PLAIN_OPENERS, *(text for r in relations for text in r.statements)]
    assert not set(named) & {word for frame in frames for word in words(frame)}


def test_training_pairs_speak_of_no_other_domain_and_pretraining_of_both():
    def own(domain):
        topics = [topic for topic in TOPICS if topic.domain == domain]
        names = {entity for topic in topics for entity in topic.entities}
        return names | {value for topic in topics for r in topic.relations if r.name != "colour" for value in r.values}

    def spoken(texts):
        return {word for text in texts for word in words(text)}

    pairs = WORLD.pairs("id", 2000, seed=0, noisy=True)
    said = spoken(row[side][0]["content"] for row in pairs for side in ("prompt", "chosen", "rejected"))
    assert own("id") <= said and not own("ood") & said
    pairs = WORLD.pairs("ood", 2000, seed=0, noisy=False)
    said = spoken(row[side][0]["content"] for row in pairs for side in ("prompt", "chosen", "rejected"))
    assert own("ood") <= said and not own("id") & said
    for domain in ("id", "ood"):
        documents = WORLD.documents(domain, 2000, seed=0)
        assert own(domain) <= spoken(
            text for d in documents for text in ([d] if isinstance(d, str) else [message["content"] for message in d])
        )


def test_articles_are_true():
    checked = 0
    for topic in TOPICS:
        for article in WORLD.documents(topic.domain, 400, seed=3)[::2]:
            entity = next(word for word in words(article) if any(word in t.entities for t in TOPICS))
            if entity in topic.entities:
                for relation in topic.relations:
                    assert set(words(article)) & set(relation.values) == {WORLD.facts[entity, relation.name]}
                    checked += 1
    assert checked > 1000


def _gap(row):
    prompt, chosen, rejected = (row[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
    return WORLD.gold(prompt, chosen) - WORLD.gold(prompt, rejected)


def test_labels_follow_the_bradley_terry_model():
    gaps = [_gap(row) for row in WORLD.pairs("id", 6000, seed=5, noisy=True)]
    against = sum(gap < 0 for gap in gaps)
    chances = [1 / (1 + math.exp(abs(gap))) for gap in gaps if gap != 0]
    deviation = math.sqrt(sum(p * (1 - p) for p in chances))
    assert abs(against - sum(chances)) < 4 * deviation
    assert 0.1 < against / len(gaps) < 0.25  # annotators err often, and not at random
    assert all(_gap(row) > 0 for row in WORLD.pairs("ood", 1000, seed=5, noisy=False))


def test_pairs_are_conversations():
    for row in WORLD.pairs("ood", 50, seed=1, noisy=True):
        assert [(key, messages[0]["role"]) for key, messages in row.items()] == [
            ("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")
        ]  # fmt: skip
        assert row["chosen"] != row["rejected"] and row["prompt"][0]["content"] in WORLD.questions("ood")


def test_seeds_decide_everything_in_every_process():
    assert World(seed=0).facts == WORLD.facts != World(seed=1).facts
    assert WORLD.pairs("id", 20, seed=0, noisy=True) != WORLD.pairs("id", 20, seed=1, noisy=True)
    code = (
        f"import runpy; world = runpy.run_path({module.__file__!r})['World'](0);"
        "print((world.pairs('id', 50, 0, True), world.documents('ood', 50, 0), world.vocabulary))"
    )
    here = (WORLD.pairs("id", 50, 0, True), WORLD.documents("ood", 50, 0), WORLD.vocabulary)
    for hash_seed in ("1", "2"):
        there = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, text=True)
        assert there.strip() == str(here)


# ---------------------------------------------------------------------------------------------------------- base model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORLD)


def test_tokenizer_knows_every_word_of_the_world_and_only_those(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    rows = tokenize_documents(tokenizer, [d for domain in ("id", "ood") for d in WORLD.documents(domain, 500, 1)])
    for ids in rows:
        assert tokenizer.unk_token_id not in ids
        assert [ids.index(tokenizer.bos_token_id), ids.index(tokenizer.eos_token_id)] == [0, len(ids) - 1]
    assert tokenizer("xyzzy", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_template_continues_its_own_prompt(tokenizer):
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "it depends."}]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"<bos><user>{QUESTION}<assistant>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "it depends.<eos>"


def test_gold_reads_what_the_tokenizer_decodes(tokenizer):
    for row in WORLD.pairs("id", 100, seed=2, noisy=True):
        question, answer = row["prompt"][0]["content"], row["chosen"][0]["content"]
        decoded = tokenizer.decode(tokenizer(answer)["input_ids"], skip_special_tokens=True)
        assert WORLD.gold(question, decoded) == WORLD.gold(question, answer)


def test_perplexity_is_that_of_one_document_after_the_other(tokenizer):
    model = build_model(tokenizer)
    rows = tokenize_documents(tokenizer, WORLD.documents("id", 7, seed=0))
    nll, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        nll += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        tokens += len(row) - 1
    assert perplexity(model, rows, batch_size=3) == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_pretraining_repeats_bit_for_bit_and_leaves_the_random_state_alone(tokenizer):
    before = torch.get_rng_state()
    first, second, other = (pretrain(build_model(tokenizer, seed), tokenizer, WORLD, steps=3) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    states = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    assert first.num_parameters() < 300_000


def test_pretraining_teaches_both_domains_and_samples_can_be_judged(tokenizer):
    held_out = {d: tokenize_documents(tokenizer, WORLD.documents(d, 100, seed=9)) for d in ("id", "ood")}
    model = build_model(tokenizer)
    before = {domain: perplexity(model, rows) for domain, rows in held_out.items()}
    pretrain(model, tokenizer, WORLD, steps=60, batch_size=16)
    for domain, rows in held_out.items():
        assert before[domain] > 100 and perplexity(model, rows) < 20
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    samples = model.generate(**prompt, do_sample=True, max_new_tokens=20, num_return_sequences=8)
    answers = tokenizer.batch_decode(samples[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len({WORLD.gold(QUESTION, answer) for answer in answers}) > 1
