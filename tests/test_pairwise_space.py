"""The Space `pairwise_comparison` without a browser: its numbers are the library's, its trace is the reward of each
prefix, bad input gets a sentence, what visitors type is escaped, links restore what they were made from."""

import asyncio
import html
import importlib
import inspect
import json
import math
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from xml.dom import minidom

import pytest
import torch
import yaml
from hub import File, Hub
from pages import imported, put
from safetensors.torch import load_file, save_file
from tiny import (
    CHATML,
    FAMILIES,
    OTHER_HEADS,
    bare_tokenizer,
    byte_tokenizer,
    chat_grm,
    chatml_tokenizer,
    llama_tokenizer,
    tiny_lm,
    with_head,
    word_tokenizer,
)
from tokenizers import decoders
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from grm_hf import GRMForSequenceClassification, GRMScorer, metrics
from grm_hf.evaluation import Example, aggregate
from grm_hf.hub import export
from grm_hf.signals import SIGNALS, Wording


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "spaces" / "pairwise_comparison"
NAMES = (
    *("app", "apart", "calibration", "checks", "drawing", "encoding", "guard", "jobs", "metrics", "reward_models"),
    *("signals", "tables"),
)
PROMPT, A, B = "What is 2 + 2?", "It is 4.", "Maybe 5, or not?"
EVIL = "<img src=x onerror=alert(1)>"
BERT = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
TOKENIZERS = {"chatml": chatml_tokenizer(), "llama": llama_tokenizer(), "bare": bare_tokenizer()}


def grm(tokenizer, family="llama", **config):
    model = chat_grm(tokenizer, family)
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The modules of the Space, imported as `python app.py` does, with a list of one model."""
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    folder = tmp_path_factory.mktemp("space")
    grm(TOKENIZERS["chatml"], reward_temperature=2.0).save_pretrained(folder / "model")
    TOKENIZERS["chatml"].save_pretrained(folder / "model")
    entries = [{"folder": str(folder / "model"), "name": "tiny", "note": f"two layers {EVIL}"}]
    (folder / "list.json").write_text(json.dumps(entries))
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRM_SPACE_MODELS", str(folder / "list.json"))
        patch.syspath_prepend(str(SPACE))
        modules = SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES}, folder=folder)
        modules.page = Page(modules.app)
    for name, module in before.items():
        sys.modules.pop(name)
        if module is not None:
            sys.modules[name] = module
    return modules


class Page:
    """The functions of the page, called as its own jobs and without a server."""

    def __init__(self, app):
        self.app = app

    def __getattr__(self, name):
        function = getattr(self.app, name)
        assert inspect.iscoroutinefunction(function)
        return lambda *args, **kwargs: asyncio.run(function(*args, **kwargs))


def loaded(space, model, tokenizer):
    encoder = space.reward_models.Encoder.from_config(tokenizer, model.config)
    return space.reward_models.Loaded("live", None, "grm", model, tokenizer, encoder)


def close(expected):
    return pytest.approx(expected, rel=1e-4, abs=2e-6)


# ---------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_is_self_contained():
    files = {path.stem for path in SPACE.glob("*.py")}
    assert files == set(NAMES)
    others = {"anyio", "gradio", "huggingface_hub", "jinja2", "numpy", "spaces", "starlette", "torch", "transformers"}
    type_checking = {"encoding": {".configuration_grm"}, "signals": {".encoding"}}
    for name in files:
        allowed = others | files | type_checking.get(name, set())
        assert imported(SPACE / f"{name}.py") <= allowed, name


def test_the_front_matter_is_what_the_hub_asks_for():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert len(front["short_description"]) <= 60 and front["title"] and front["python_version"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={front['sdk_version']}\n" in pins


def test_the_pictures_of_the_documentation_are_there():
    names = re.findall(r"\((images/[^)]*)\)", (ROOT / "docs" / "space.md").read_text(encoding="utf-8"))
    assert len(names) == 7 and all((ROOT / "docs" / name).is_file() for name in names)


def test_the_list_that_is_shipped_is_honest(space):
    listed, problems = space.reward_models.read_list(SPACE / "models.json")
    assert listed and all(re.match("Entry 1 .* there is no model in the folder", text) for text in problems)
    for entry in listed.values():  # code runs only where it is pinned, or lies here
        assert not entry.trusted or re.fullmatch("[0-9a-f]{40}", entry.revision or "") or Path(entry.source).is_dir()


def test_lists_of_models(space, tmp_path):
    file, sha = tmp_path / "list.json", "a" * 40
    here = tmp_path / "here"
    here.mkdir()
    (here / "config.json").write_text("{}")
    entries = [
        {"id": "ann/first", "revision": sha},
        {"id": "ann/second", "revision": "main"},
        {"id": "ann/third"},
        {"folder": "none"},
        {"id": "ann/other", "revision": sha, "name": "ann/first"},
        {"folder": "here", "id": "ann/here", "revision": sha, "note": "mine", "name": "here"},
        {"folder": "none", "id": "ann/there", "revision": sha},
        "ann/text",
    ]
    file.write_text(json.dumps(entries))
    listed, problems = space.reward_models.read_list(file)
    assert {name: (m.source, m.revision, m.note, m.trusted) for name, m in listed.items()} == {
        "ann/first": ("ann/first", sha, "", True),
        "ann/third": ("ann/third", None, "", False),
        "here": (str(here), None, "mine", True),
        "ann/there": ("ann/there", sha, "", True),
    }
    assert [re.match(r"Entry (\d)", problem)[1] for problem in problems] == ["2", "4", "5", "8"]
    assert "all 40 digits" in problems[0] and "no model in the folder" in problems[1] and "another one" in problems[2]
    listed, problems = space.reward_models.read_list(tmp_path)  # a model's folder
    assert list(listed) == [tmp_path.name] and not problems
    (tmp_path / "demo/model").mkdir(parents=True)
    assert list(space.reward_models.read_list(tmp_path / "demo/model")[0]) == ["demo model"]
    for text, words in (("{}", "no JSON list"), ("[", "cannot be read")):
        file.write_text(text)
        assert words in space.reward_models.read_list(file)[1][0]
    assert "cannot be read" in space.reward_models.read_list(tmp_path / "none.json")[1][0]


def test_a_page_without_models_says_so(space, monkeypatch):
    monkeypatch.setattr(space.app.MODELS, "listed", {})
    monkeypatch.setattr(space.app.MODELS, "problems", [f"Entry 1 {EVIL}"])
    said = space.app.notices()
    assert "No model is on the list" in said and "GRM_SPACE_MODELS" in said and "Entry 1 &lt;img" in said
    page = space.page.show_comparison("", "prompt", PROMPT, A, B, 1.0)[0]
    assert "No model is chosen" in page
    assert space.app.build() is not None


# --------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reading_is_the_reward_of_every_prefix_and_the_language_models_own_probabilities(space, family):
    tokenizer = TOKENIZERS["chatml"]
    model = grm(tokenizer, family)
    this = loaded(space, model, tokenizer)
    reading = space.reward_models.read(this, space.reward_models.encode(this, PROMPT, A))
    scorer = GRMScorer(model, tokenizer, layout="padded")
    assert reading.reward == close(scorer.score([{"prompt": PROMPT, "response": A}])[0])
    ids = torch.tensor([reading.ids])
    with torch.no_grad():
        prefixes = [model(input_ids=ids[:, : t + 1]).logits.item() for t in range(len(reading.ids))]
        logprobs = model.lm(input_ids=ids).logits[0].float().log_softmax(-1)
    assert reading.rewards == close(prefixes) and reading.reward == close(prefixes[-1])
    expected = [logprobs[t - 1, reading.ids[t]].item() for t in range(reading.start, len(reading.ids))]
    assert reading.logprobs == close(expected)
    assert "".join(reading.pieces) == tokenizer.decode(reading.ids)


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_every_head_is_read(space, head, tmp_path):
    """From the files of the model, as the page does, token by token."""
    tokenizer = TOKENIZERS["chatml"]
    model = with_head(head, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    this = space.reward_models.Models(tmp_path).load(tmp_path.name)
    reading = space.reward_models.read(this, space.reward_models.encode(this, PROMPT, A))
    ids = torch.tensor([reading.ids])
    with torch.no_grad():
        assert reading.rewards == close([model(ids[:, : t + 1]).logits.item() for t in range(len(reading.ids))])
    compared = space.reward_models.compare(this, PROMPT, A, B)["rewards"].values()
    expected = GRMScorer(model, tokenizer).score([{"prompt": PROMPT, "response": answer} for answer in (A, B)])
    assert list(compared) == close(expected)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": PROMPT},
]


@pytest.mark.parametrize("template", TOKENIZERS)
@pytest.mark.parametrize(
    "policies", [{}, {"bos_policy": "double"}, {"max_sequence_length": 24}, {"max_sequence_length": 6}]
)
def test_rewards_are_the_librarys_under_the_policies_stored_in_the_model(space, template, policies):
    tokenizer = TOKENIZERS[template]
    model = grm(tokenizer, **policies)
    this, scorer = loaded(space, model, tokenizer), GRMScorer(model, tokenizer)
    for prompt in (PROMPT, CONVERSATION):
        result = space.reward_models.compare(this, prompt, A, B)
        details = list(scorer.stream([{"prompt": prompt, "response": answer} for answer in (A, B)]))
        assert list(result["rewards"].values()) == close([detail.score for detail in details])
        for answer, detail in zip(result["answers"].values(), details, strict=True):
            seen = answer["seen"]
            assert (seen["tokens"], seen["cut"] > 0) == (detail.tokens, detail.truncated)
            assert len(seen["prompt"]) + len(answer["tokens"]) == detail.tokens
            assert answer["reward"] == close(answer["tokens"][-1]["reward"])
    assert seen["answer_cut"] == (policies.get("max_sequence_length") == 6)
    end = {"chatml": "<|im_end|>", "llama": "<|eot|>", "bare": "</s>"}[template]
    assert seen["end"] == end


def test_a_model_is_loaded_with_its_policies(space, tmp_path):
    tokenizer = TOKENIZERS["llama"]
    grm(tokenizer, bos_policy="double", max_sequence_length=24).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    this = space.reward_models.Models(tmp_path).load(tmp_path.name)
    (expected,) = GRMScorer(str(tmp_path)).stream([{"prompt": CONVERSATION, "response": A}])
    encoded = space.reward_models.encode(this, CONVERSATION, A)
    assert (len(encoded.ids), space.reward_models.reward_of(this, encoded)) == (24, close(expected.score))
    assert this.encoder.bos == "double"


def test_a_tokenizer_without_template_gets_plain_text(space):
    tokenizer = byte_tokenizer(eos_token="</s>", pad_token="<pad>")
    model = grm(tokenizer)
    this = loaded(space, model, tokenizer)
    expected = GRMScorer(model, tokenizer).score([{"prompt": PROMPT, "response": A}])
    assert space.reward_models.reward_of(this, space.reward_models.encode(this, PROMPT, A)) == close(expected[0])
    with pytest.raises(ValueError, match="no chat template"):
        space.reward_models.encode(this, CONVERSATION, A)


def test_a_comparison(space):
    tokenizer = TOKENIZERS["chatml"]
    model = grm(tokenizer, reward_temperature=2.0, reward_mean=0.5, reward_std=0.1)
    this, scorer = loaded(space, model, tokenizer), GRMScorer(model, tokenizer)
    result = space.reward_models.compare(this, PROMPT, A, B)
    a, b = result["rewards"].values()
    assert result["probability_a"] == close(scorer.probability(a, b))
    assert space.reward_models.compare(this, PROMPT, A, B, 3.0)["probability_a"] == close(
        1 / (1 + math.exp((b - a) / 6))
    )
    assert result["preferred"] == ("A" if a > b else "B") and f"answer {result['preferred']}." in result["verdict"]
    swapped = space.reward_models.compare(this, PROMPT, B, A)
    assert swapped["probability_a"] == close(1 - result["probability_a"])
    assert result["answers"]["A"]["standardised"] == close((a - 0.5) / 0.1)
    tie = space.reward_models.compare(this, PROMPT, A, A)
    assert (tie["preferred"], tie["probability_a"], tie["heads"]["agree"]) == (None, 0.5, True)
    answer = result["answers"]["A"]
    values = [token["logprob"] for token in answer["tokens"]]
    assert answer["mean_logprob"] == close(sum(values) / len(values))
    assert answer["perplexity"] == close(math.exp(-answer["mean_logprob"]))
    json.dumps(result, allow_nan=False)
    check = space.reward_models.swap_check(this, PROMPT, A, B)
    assert set(check["rewards"]) == {"alone", "AB", "BA"} and check["largest"] < 1e-5
    assert check["rewards"]["BA"] == {"A": close(a), "B": close(b)}


def test_the_swap_check_sees_a_model_that_looks_at_its_neighbour(space):
    tokenizer = TOKENIZERS["chatml"]
    model = grm(tokenizer)
    model.register_forward_hook(lambda m, a, out: setattr(out, "logits", out.logits + 0.01 * len(out.logits)))
    check = space.reward_models.swap_check(loaded(space, model, tokenizer), PROMPT, A, B)
    assert check["largest"] == close(0.01)
    assert "More than float32 rounds" in space.drawing.swap(check)


@pytest.mark.parametrize(
    ("probability", "how"), [(0.99, "clearly prefers"), (0.2, " prefers"), (0.65, "slightly"), (0.45, "barely")]
)
def test_verdicts(space, probability, how):
    name = "A" if probability > 0.5 else "B"
    said = space.reward_models.verdict(name, probability)
    assert how in said and said.endswith(f"answer {name}.")


def test_where_the_heads_part(space):
    def token(reward, logprob, text="x", special=False):
        return {"reward": reward, "logprob": logprob, "text": text, "special": special}

    tokens = [
        *[token(0.1 * i, -1.0) for i in range(6)],
        token(-2.0, -0.01, "expected, and falls"),
        token(1.0, -9.0, "unexpected, and rises"),
        token(1.1, -1.0),
        token(-9.0, -0.01, "<end>", special=True),
    ]
    found = space.reward_models.disagreements(0.0, tokens)
    assert [row["text"] for row in found] == ["unexpected, and rises", "expected, and falls"]
    assert found[1]["step"] == close(-2.5) and found[1]["probability"] == close(math.exp(-0.01))
    assert space.reward_models.disagreements(0.0, [token(1.0, -1.0)] * 5) == []


def test_pieces_of_characters_that_take_several_tokens(space):
    tokenizer = TOKENIZERS["chatml"]
    for text in ("naïve 日本 🙂 end", "a\ufffdb", "🙂"):
        ids = tokenizer(text)["input_ids"]
        found = space.reward_models.pieces(tokenizer, ids)
        assert "".join(found) == text and len(found) == len(ids)
    assert [p for p in space.reward_models.pieces(tokenizer, tokenizer("é!")["input_ids"])] == ["", "é", "!"]


def test_a_classifier_of_transformers(space):
    tokenizer = TOKENIZERS["chatml"]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    encoder = space.reward_models.encoder_of_a_classifier("x/y", model, tokenizer)
    this = space.reward_models.Loaded("x/y", "a" * 40, "classifier", model, tokenizer, encoder)
    result = space.reward_models.compare(this, PROMPT, A, B)
    for answer, text in zip(result["answers"].values(), (A, B), strict=True):
        ids = torch.tensor([space.reward_models.encode(this, PROMPT, text).ids])
        with torch.no_grad():
            assert (
                answer["reward"] == close(model(input_ids=ids).logits.item()) == close(answer["tokens"][-1]["reward"])
            )
        assert answer["mean_logprob"] is None and answer["disagreements"] == []
    assert result["heads"] is None and "no LM head" in space.drawing.details(result)
    assert space.reward_models.swap_check(this, PROMPT, A, B)["largest"] < 1e-5
    model.config.pad_token_id = None
    check = space.reward_models.swap_check(this, PROMPT, A, B)
    assert check["largest"] is None and "no padding token" in space.drawing.swap(check)
    model.config.pad_token_id = tokenizer("\n")["input_ids"][0]  # then the reward is read before the final line break
    reading = space.reward_models.read(this, space.reward_models.encode(this, PROMPT, A))
    assert reading.read_at == len(reading.ids) - 2 and reading.reward == close(reading.rewards[-2])
    with pytest.raises(ValueError, match="no head `score`"):
        space.reward_models.encoder_of_a_classifier("x/y", BertForSequenceClassification(BERT), tokenizer)


def test_a_ranking_and_a_table_are_the_librarys(space):
    scorer = GRMScorer(str(space.folder / "model"))
    answers = [A, B, "No idea.", A]
    expected = scorer.best_of_n(PROMPT, answers)
    result = space.page.rank(PROMPT, answers)
    assert (result["rewards"], result["order"]) == (close(expected.scores), expected.order)
    assert result["best"] == expected.best and sum(result["share"]) == close(1.0)
    assert result["model_temperature"] == 2.0
    assert "over the temperature, 1 × 2 (the model’s own)" in space.drawing.ranking(result, answers)
    assert result["share"][0] == close(
        math.exp(expected.scores[0] / 2) / sum(math.exp(score / 2) for score in expected.scores)
    )
    rows = [
        {"prompt": f"{i} + 1?", "chosen": f"{i + 1}.", "rejected": "1, 2", "subset": "xy"[i % 2]} for i in range(9)
    ]
    rows[0]["prompt"] = CONVERSATION
    rows.append({"chosen": [*CONVERSATION, say(A)], "rejected": [*CONVERSATION, say(B)], "subset": "x"})
    rows.append({"prompt": PROMPT, "chosen": A, "rejected": A, "subset": "y"})  # a tie is wrong, as in `grm eval`
    lines = "\n".join(json.dumps(row) for row in rows)
    page, saved = space.page.show_batch("tiny", lines, None, progress=Quiet())
    written = [json.loads(line) for line in Path(saved.value["path"] if isinstance(saved.value, dict) else saved.value)
               .read_text(encoding="utf-8").splitlines()]  # fmt: skip
    chats = [
        {"messages": row[s]} if "prompt" not in row else {"prompt": row["prompt"], "response": row[s]}
        for row in rows
        for s in ("chosen", "rejected")
    ]
    scores = scorer.score(chats)
    assert [r for row in written for r in (row["chosen_reward"], row["rejected_reward"])] == close(scores)
    assert [{k: v for k, v in row.items() if k in rows[0]} for row in written] == rows
    pairs = list(zip(scores[::2], scores[1::2], strict=True))
    examples = [Example("", ["chosen", "rejected"], [0], subset=row["subset"]) for row in rows]
    evaluated = aggregate("own", examples, pairs)
    assert f"Accuracy {100 * evaluated['score']:.1f} % on 11 pairs" in page
    for subset in "xy":
        assert f"{evaluated[f'subset/{subset}']:.4f}" in page
    reported = metrics.pairwise_metrics(*zip(*pairs, strict=True), temperature=2.0)
    for name in ("log_loss", "brier", "ece"):
        assert f"{reported[name]:.4f}" in page
    for plot in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        minidom.parseString(plot)
    csv = "prompt;chosen;rejected\n" + '"a;b";"say ""x""";no\n'
    _, saved = space.page.show_batch("tiny", "", csv.encode("utf-8-sig"), progress=Quiet())
    assert saved.visible is True
    text = next(path for path in space.app.DOWNLOADS.iterdir() if path.suffix == ".csv").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "prompt,chosen,rejected,chosen_reward,rejected_reward,margin,probability,cut_tokens"
    assert text.splitlines()[1].startswith('a;b,"say ""x""",no,')


def Quiet():
    return lambda *_, **__: None


def say(text):
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": ""}, "No model is chosen"),
        ({"name": "../../etc/passwd"}, "not on the list of this page and is no Hub id"),
        ({"name": "/tmp"}, "no Hub id"),
        ({"name": EVIL}, "&lt;img"),
        ({"name": "ann/other"}, "the Hub cannot be asked for it now"),  # the suite is offline
        ({"prompt": "  "}, "The prompt is empty"),
        ({"a": ""}, "Answer A is empty"),
        ({"b": None}, "Answer B is empty"),
        ({"b": "x" * 20_001}, "Answer B has 20,001 characters"),
        ({"prompt": "x" * 600}, "Answer A and the prompt have"),
        ({"temperature": 0}, "The temperature is 0"),
        ({"temperature": 1e-320}, "The temperature is 1e-320; a number from 0.1 to 10 is required"),
        ({"temperature": "1"}, "The temperature is “1”; a number"),
        ({"temperature": True}, "The temperature is true or false; a number"),
        ({"temperature": 10**400}, "The temperature is a number; a number from 0.1 to 10"),
        ({"name": "a/b--c"}, "“a/b--c” is no Hub id: the Hub takes"),
        ({"name": ["a"]}, "The model is a list; text is required"),
        ({"a": "half \ud83d"}, "Answer A has half a character (U+D83D)"),
        ({"prompt": "\udc00"}, "The prompt has half a character"),
        ({"a": 7}, "Answer A is a number; text is required"),
        ({"temperature": None}, "The temperature is null; a number from 0.1 to 10 is required"),
        ({"kind": "conversation", "prompt": f"{EVIL}hello"}, "must begin with a role"),
        ({"kind": "conversation", "prompt": "user: a\nuser:"}, "turn 2 (user) is empty"),
        ({"kind": "conversation", "prompt": "user: a\nassistant: b"}, "ends with a turn of the role “assistant”"),
        ({"kind": "conversation", "prompt": "[1"}, "begins like JSON and is no JSON"),
        ({"kind": "conversation", "prompt": "[1]"}, "turn 1: a message is"),
        ({"kind": "conversation", "prompt": "[]"}, "has 0 messages; 1 to 20 are required"),
        ({"kind": "conversation", "prompt": "user: a\nassistant: b\n" * 11}, "has 22 messages; 1 to 20"),
        ({"kind": "conversation", "prompt": "[" * 100_000}, "is nested too deeply"),
        ({"kind": "conversation", "prompt": "user: a\nuser: b"}, "turn 2: two turns of the user follow each other"),
        (
            {"kind": "conversation", "prompt": "user: a\nsystem: b\nuser: c"},
            "a system message stands at the beginning",
        ),
        ({"kind": "conversation", "prompt": "system: b"}, "ends with a turn of the role “system”"),
        ({"kind": "conversation", "prompt": '[{"role": "robot", "content": "x"}]'}, "its role is “robot”; “system”"),
        ({"kind": "conversation", "prompt": '[{"role": 3, "content": "x"}]'}, "turn 1: its role is a number"),
        ({"kind": "conversation", "prompt": '[{"role": "user", "content": null}]'}, "turn 1 (user) is null; text"),
    ],
)
def test_bad_input_gets_a_sentence(space, capsys, changed, words):
    given = {"name": "tiny", "kind": "prompt", "prompt": PROMPT, "a": A, "b": B, "temperature": 1.0, **changed}
    page, *rest = space.page.show_comparison(*given.values())
    assert words in page and 'role="alert"' in page and "Traceback" not in page and "<img" not in page
    assert rest == [None, "", "", ""]


def test_our_own_failure_gets_a_sentence_and_a_log(space, capsys, monkeypatch):
    monkeypatch.setattr(space.reward_models, "compare", lambda *_: 1 / 0)
    page = space.page.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)[0]
    assert "This page failed (ZeroDivisionError)" in page and "Traceback" not in page
    assert "Traceback" in capsys.readouterr().err


def test_a_model_that_overflows_is_named(space):
    tokenizer = TOKENIZERS["chatml"]
    model = grm(tokenizer)
    with torch.no_grad():
        model.score.out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="gives nan"):
        space.reward_models.compare(loaded(space, model, tokenizer), PROMPT, A, B)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing to score"),
        ("prompt,chosen\na,b", "with one called “rejected”"),
        ("prompt,chosen,rejected", "no pairs below it"),
        ("prompt,chosen,rejected,id,ID\na,b,c,1,2", "names the column “id” more than once"),
        ("prompt,chosen,rejected,Margin\na,b,c,1", "The first line has “margin”, which this page writes itself"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "cut_tokens": 1}', "Line 1 has “cut_tokens”"),
        ("prompt,chosen,rejected\na,b", "Line 2 has 2 cells; the first line has 3"),
        ("prompt,chosen,rejected\na,,c", "Line 2: “chosen” is empty"),
        ('prompt,chosen,rejected\na,"b"x,c', "is no CSV"),
        ("prompt,chosen,rejected\n" + "a,b,c\n" * 201, "has more than 200 pairs"),
        ('{"prompt": "a"', "Line 1 is no JSON"),
        ('{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}', "JSON: “chosen” is there twice"),
        ('{"prompt": "a", "chosen": "b"}', "Line 1 needs"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "“chosen” is text, “rejected” is a number"),
        ('{"chosen": "b", "rejected": "c"}', "Line 1 needs a “prompt”, unless both"),
        (
            '{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}',
            "“prompt” is text, so both answers must be text: “chosen” is a list",
        ),
        (
            '{"prompt": "a", "chosen": [{"from": "x"}], "rejected": "c"}',
            "so both answers must be text: “chosen” is a list, “rejected” is text",
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"from": "x"}], "rejected": "c"}',
            "turn 1: a message",
        ),
        ('{"prompt": [{"role": "user", "content": "a"}], "chosen": 3, "rejected": "c"}', "“chosen” is a number"),
        (
            '{"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "a"}]}',
            "“chosen” has no turn before the answer",
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "user", "content": "b"}], '
            '"rejected": "c"}',
            "“chosen” ends with a turn of the role “user”",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "n": NaN}', "NaN is no number"),
        ('{"prompt": "a", "chosen": "b", "rejected": "\\ud800"}', "Line 1 has half a character"),
        ('{"prompt": "a", "chosen": "b", "rejected": ' + "[" * 100_000, "Line 1 is nested too deeply"),
        ('{"prompt": "a", "chosen": null, "rejected": "c"}', "“chosen” is not there"),
        ('[{"prompt": "a", "chosen": "b", "rejected": "c"}]', "Line 1 is a list. Each line is one pair"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n7', "Line 2 is a number; an object"),
        ("prompt,chosen,rejected\r" + "a,b\r", "Line 2 has 2 cells"),
        ("prompt,chosen,rejected\na,b," + "c" * 140_000, "Line 2 is no CSV: field larger than field limit"),
        ("x" * 2_000_001, "The table is larger than 2 MB"),
        ('prompt,chosen,rejected\n"[{""role"": ""user""}]",a,b', "Line 2: “prompt” holds messages as JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{}]}', "Line 1 has “tools”, which this page does"),
        (7, "The table is a number; text is required"),
        (f"prompt,chosen,rejected\n{EVIL},a,{'x' * 600}", "Pair 1, “rejected” and the prompt have"),
    ],
)
def test_bad_tables_get_a_sentence(space, text, words):
    page, saved = space.page.show_batch("tiny", text, None, progress=Quiet())
    assert words in page and 'role="alert"' in page and saved.visible is False


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_download_can_be_read_again(space, form):
    rows = [{"prompt": "a\u2028b\x85\u2029c\x0b", "chosen": "x\ry", "rejected": 'n"o\n', "id": "7\r\n8"}] * 2
    scores = [dict.fromkeys(space.tables.SCORES, "1")] * 2
    text = space.tables.write_pairs(rows, scores, form)
    again, found = space.tables.read_pairs("", text.encode())
    assert (found, again) == (form, [{**row, **score} for row, score in zip(rows, scores, strict=True)])
    assert space.tables.write_pairs(again, scores, form) == text
    assert space.tables.read_pairs(text.replace("\n", "\r\n"), None)[0] == again or form == "csv"


def test_cells_that_look_empty_or_like_json(space):
    read = space.tables.read_pairs
    row = {"": "0", "prompt": "q", "chosen": "[1]", "rejected": "{}", "subset": ""}
    assert read("\tprompt\tchosen\trejected\tsubset\n0\tq\t[1]\t{}\t\n", None) == ([row], "csv")


def test_what_a_template_may_read_of_a_message_is_kept(space):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "q", "id": 7},
        {"role": "assistant", "content": "a", "tool_calls": [call], "reasoning_content": "hm", "name": None},
        {"role": "user", "content": "r"},
    ]
    read = space.tables.check_prompt(messages, "x")
    assert read == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "user", "content": "r"},
    ]


def test_scores_of_a_download_are_replaced_and_that_is_said(space):
    lines = json.dumps({"prompt": PROMPT, "chosen": A, "rejected": B})
    page, _ = space.page.show_batch("tiny", lines, None, progress=Quiet())
    (row,) = space.tables.read_pairs(lines, None)[0]
    again = json.dumps({**row, **dict.fromkeys(space.tables.SCORES, 99.0)})
    other, _ = space.page.show_batch("tiny", again, None, progress=Quiet())
    note = '<p class="quiet">The table had scores of this page: the new ones took their places.</p>'
    assert note not in page and other.replace(note, "") == page


def test_an_empty_prompt_beside_whole_conversations_is_none(space):
    row = {"prompt": "", "chosen": [*CONVERSATION, say(A)], "rejected": [*CONVERSATION, say(B)]}
    page, _ = space.page.show_batch("tiny", json.dumps(row), None, progress=Quiet())
    assert "on 1 pair<" in page


def test_a_table_of_too_many_tokens_gets_a_sentence(space, monkeypatch):
    monkeypatch.setattr(space.app, "MAX_TABLE_TOKENS", 60)
    page, _ = space.page.show_batch("tiny", space.app.PAIRS, None, progress=Quiet())
    assert re.search(r"The table has \d+ tokens; this page takes 60", page)


def test_bad_files_get_a_sentence(space):
    for upload, words in ((b"\xff\xfe", "not text in UTF-8"), (b"x" * 2_000_001, "larger than 2 MB")):
        assert words in space.page.show_batch("tiny", "", upload, progress=Quiet())[0]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("one", "There is 1 answer; 2 to 32 are required"),
        ("", "There are 0 answers"),
        ("x\n" * 33, "There are 33 answers"),
        (["a", "b"], "The list of answers is a list; text is required"),
    ],
)
def test_bad_rankings_get_a_sentence(space, answers, words):
    assert words in space.page.show_ranking("tiny", "prompt", PROMPT, answers, 1.0)


def test_answers_by_lines_or_by_dashes(space):
    assert space.tables.read_answers("a\n\n b \nc - d") == ["a", "b", "c - d"]
    assert space.tables.read_answers("a\nb\n---\nc\n----\n") == ["a\nb", "c"]
    assert space.tables.read_answers("a\r\nb\r\n---\r\nc\r\n") == ["a\r\nb", "c"]
    assert space.tables.read_answers("a\u2028b\x85c\x0bd\r\ne") == ["a\u2028b\x85c\x0bd", "e"]


def test_conversations(space):
    text = "System: be brief\nuser: hi\nthere: you\nassistant: hello\n\nuser: and:\n1. this"
    assert space.tables.read_prompt("conversation", text) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi\nthere: you"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and:\n1. this"},
    ]
    assert space.tables.read_prompt("conversation", json.dumps(CONVERSATION)) == CONVERSATION
    assert space.tables.read_prompt("prompt", "user: hi") == "user: hi"


def test_the_api_says_sentences(space):
    from gradio.exceptions import Error

    with pytest.raises(Error, match="Answer A is empty"):
        space.page.compare(PROMPT, "", B)
    with pytest.raises(Error, match="The prompt is empty"):
        space.page.compare("", A, B)
    with pytest.raises(Error, match="`messages`, turn 1"):
        space.page.compare("", A, B, messages=[{"role": "user"}])
    for changed, words in (
        ({"prompt": 3}, "`prompt` is a number; text is required"),
        ({"answer_a": None}, "`answer_a` is null; text is required"),
        ({"answer_b": ["x"]}, "`answer_b` is a list; text is required"),
        ({"temperature": "1"}, "`temperature` is “1”; a number from 0.1 to 10 is required"),
        ({"temperature": 1e-320}, "`temperature` is 1e-320"),
        ({"temperature": math.nan}, "`temperature` is nan"),
        ({"model": 5}, "`model` is a number; text is required"),
        ({"messages": CONVERSATION}, "`prompt` and `messages` are both given; one"),
        ({"prompt": "", "messages": "hi"}, "`messages` is text; a list of 1 to 20 messages is required"),
        ({"prompt": "", "messages": []}, "`messages` has 0 messages"),
        ({"prompt": "", "messages": [*CONVERSATION, say("x")]}, "`messages` ends with a turn of the role “assistant”"),
    ):
        with pytest.raises(Error, match=words):
            space.page.compare(**{"prompt": PROMPT, "answer_a": A, "answer_b": B, **changed})
    for answers, words in (("ab", "`answers` is text; a list of 2 to 32 texts"), ([A, 3], "Answer 2 is a number")):
        with pytest.raises(Error, match=words):
            space.page.rank(PROMPT, answers)
    result = space.page.compare("", A, B, messages=CONVERSATION)
    expected = GRMScorer(str(space.folder / "model")).score([{"prompt": CONVERSATION, "response": A}])
    assert result["rewards"]["A"] == close(expected[0]) and result["model"] == "tiny"
    assert space.page.models() == [{"name": "tiny", "revision": None, "note": f"two layers {EVIL}"}]


def test_only_the_last_models_are_kept(space, monkeypatch, capsys):
    this = space.reward_models.Models(SPACE / "models.json")
    this.listed = dict.fromkeys("abc", space.reward_models.Listed(str(space.folder / "model")))
    first = this.load("a")
    assert this.load("a") is first
    this.load("b"), this.load("a"), this.load("c")
    assert list(this._kept) == ["a", "c"]
    load, counts = space.reward_models.load, []
    monkeypatch.setattr(
        space.reward_models, "load", lambda *args, **kw: (counts.append(len(this._kept)), load(*args, **kw))[1]
    )
    this.load("b")
    assert counts == [space.reward_models.KEPT - 1]  # room is made before another one is loaded
    this.listed["d"] = space.reward_models.Listed(str(space.folder))
    with pytest.raises(ValueError, match="“d” could not be loaded"):
        this.load("d")


# ---------------------------------------------------------------------------------------------------------------- jobs


def test_a_job_has_a_deadline_and_a_client_and_waits_for_its_turn(space, monkeypatch):
    jobs, model = space.jobs, grm(TOKENIZERS["chatml"])
    layers, here = [], {"ann"}
    model.lm.model.layers[1].register_forward_hook(lambda *_: layers.append(time.monotonic()))
    monkeypatch.setattr(space.guard, "listening", lambda session: session in here)
    monkeypatch.setattr(jobs, "ALONE_SECONDS", 0.3)
    ids = torch.ones(1, 8, dtype=torch.long)

    def endless():
        while True:
            model(input_ids=ids)

    async def run(session, seconds, task, kind=None, line=None):
        async with (kind or jobs.Kind("jobs", 1, seconds)).job(session) as job:
            return await job.run(line or asyncio.Lock(), task)

    with pytest.raises(jobs.Stopped, match="took more than 0.5 seconds, which is what one visitor gets"):
        asyncio.run(run(None, 0.5, endless))
    with pytest.raises(jobs.Stopped, match="Nobody waits for this result"):  # nothing is computed for nobody
        asyncio.run(run("eve", 9, lambda: layers.append("computed")))
    assert "computed" not in layers
    leave = threading.Timer(0.5, here.clear)
    leave.start()
    with pytest.raises(jobs.Stopped, match="Nobody waits"):  # in the middle of it
        asyncio.run(run("ann", 60, endless))
    done = len(layers)
    time.sleep(0.2)
    assert len(layers) == done

    async def crowd():
        kind, line = jobs.Kind("tables", 3, 9), asyncio.Lock()
        order = []
        first = [run(None, 9, lambda i=i: order.append(i), kind, line) for i in range(5)]
        return await asyncio.gather(*first, return_exceptions=True), order, kind.taken, line.locked()

    results, order, taken, locked = asyncio.run(crowd())
    assert order == [0, 1, 2] and taken == 0 and not locked
    assert [str(error) for error in results[3:]] == [
        "3 tables wait already, and this page takes no more. Try again later."
    ] * 2

    async def gives_up():
        """One whose client leaves while it waits for its turn: the line is free for the next."""
        line = asyncio.Lock()
        await line.acquire()
        here.add("bob")
        asyncio.get_running_loop().call_later(0.2, here.clear)
        with pytest.raises(jobs.Stopped, match="Nobody waits"):
            await run("bob", 9, lambda: None, line=line)
        line.release()
        return await asyncio.wait_for(run(None, 9, lambda: "next", line=line), 5)

    assert asyncio.run(gives_up()) == "next"


# --------------------------------------------------------------------------------------------- what models are refused


def classifier(**changed):
    torch.manual_seed(0)
    tokenizer = TOKENIZERS["chatml"]
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **changed}
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def others(space, tmp_path_factory):
    """The process for ids that are not on the list, and a Hub on this machine: `store` puts a folder there and returns
    its id, `load` has it read by that process or as a model of the list."""
    hub, folder = Hub(), tmp_path_factory.mktemp("others")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("no_proxy", "*")
        patch.setenv("HF_TOKEN", "hf_" + "a" * 34)
        apart = space.apart.Apart()
        names = iter(f"eve/m{i}" for i in range(99))

        def new(model=None, tokenizer=TOKENIZERS["chatml"]):
            where = folder / next(names)
            (classifier() if model is None else model).save_pretrained(where)
            tokenizer.save_pretrained(where)
            return where

        def store(where):
            put(hub, f"eve/{where.name}", where)
            return f"eve/{where.name}"

        def load(how, where):
            if how == "listed":
                return space.reward_models.Models(where).load(where.name)
            return apart.run(store(where), "measure", [])

        yield SimpleNamespace(apart=apart, hub=hub, new=new, store=store, load=load)
        apart.end()
        hub.close()


def test_an_export_is_read_by_the_policies_it_stores(space, tmp_path, others):
    tokenizer = TOKENIZERS["chatml"]
    torch.manual_seed(0)
    lm = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    model = GRMForSequenceClassification.from_base(lm, head_type="linear").eval()
    model.config.max_sequence_length = 24
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "export")
    (expected,) = GRMScorer(str(tmp_path / "model")).stream([{"prompt": CONVERSATION, "response": A}])
    assert expected.truncated
    this = others.load("listed", tmp_path / "export")
    encoded = space.reward_models.encode(this, CONVERSATION, A)
    assert (this.kind, len(encoded.ids)) == ("classifier", 24)
    assert space.reward_models.reward_of(this, encoded) == close(expected.score)
    name = others.store(tmp_path / "export")
    result = others.apart.run(name, "compare", CONVERSATION, A, B, 1.0)
    assert (result["rewards"]["A"], result["answers"]["A"]["seen"]["tokens"]) == (close(expected.score), 24)
    assert result["revision"] == others.hub.repos["models", name].branches["main"] and result["heads"] is None
    local = space.reward_models.compare(this, CONVERSATION, A, B, 1.0)
    assert {**local, "model": 0, "revision": 0, "seconds": 0} == {**result, "model": 0, "revision": 0, "seconds": 0}
    this.model.config.max_sequence_length = 100_000
    assert space.reward_models.encoder_of_a_classifier("x", this.model, tokenizer).max_length == 512
    this.model.config.max_sequence_length = "long"
    with pytest.raises(ValueError, match="“x” cannot be used: `max_length` is 'long'"):
        space.reward_models.encoder_of_a_classifier("x", this.model, tokenizer)


@pytest.mark.parametrize("how", ["free", "listed"])
def test_models_whose_files_do_not_fit_are_refused(others, how, capsys):
    folder = others.new()
    weights = load_file(folder / "model.safetensors")

    def put(extra=(), without=()):
        again = others.new()
        kept = {name: tensor for name, tensor in weights.items() if name not in without}
        save_file({**kept, **dict(extra)}, again / "model.safetensors", {"format": "pt"})
        return again

    assert others.load(how, put({"lm_head.weight": torch.zeros(1, 16)}))
    with pytest.raises(ValueError, match="1 weights that LlamaForSequenceClassification does not use .value.weight"):
        others.load(how, put({"value.weight": torch.zeros(1, 16)}))
    with pytest.raises(ValueError, match="lacks 1 weights .score.weight"):
        others.load(how, put(without=["score.weight"]))
    with pytest.raises(ValueError, match="2 labels"):
        others.load(how, others.new(classifier(num_labels=2)))
    changed = others.new()
    values = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**values, "reward_temperature": 1e-320}))
    with pytest.raises(ValueError, match="its `reward_temperature` is 1e-320, no positive number"):
        others.load(how, changed)


def test_a_language_model_on_the_list_is_refused(others):
    with pytest.raises(ValueError, match="lacks 1 weights .score.weight"):
        others.load("listed", others.new(tiny_lm("llama", vocab_size=len(TOKENIZERS["chatml"]))))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_listed_model_with_code_of_another_repository_is_refused(space, others, file):
    folder = others.new()
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": ["own.Slow", None]}}))
    space.reward_models.check_code("x", str(folder), None)
    (folder / file).write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": ["eve/code--tok.Slow", None]}}))
    with pytest.raises(ValueError, match=f"another repository .*auto_map` of its {file}"):
        others.load("listed", folder)


@pytest.mark.parametrize("how", ["free", "listed"])
def test_an_adapter_beside_a_model_is_refused(others, how):
    folder = others.new()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "eve/other"}')
    with pytest.raises(ValueError, match="is an adapter"):
        others.load(how, folder)


def test_the_size_of_a_free_id_is_that_of_all_its_files(space, others, monkeypatch):
    def refused(name, size, words):
        folder = others.new()
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / name, "ab") as file:
            file.truncate(size)
        monkeypatch.setattr(others.hub, "add_blob", add_blob)
        with pytest.raises(ValueError, match=words):
            others.load("free", folder)

    add_blob = others.hub.add_blob
    refused("tokenizer_config.json", 60_000_000, "tokenizer_config.json of .* has 60.0 MB; this page takes 2 of it")
    refused("config.json", 2_000_001, "The file config.json of .* has 2.0 MB")
    refused("vocab.txt", 40_000_001, "The file vocab.txt .* has 40.0 MB; this page takes 40 of it")
    # A large subfolder: the Hub's own word for its size is all that is asked.
    folder = others.new()
    (folder / "more").mkdir()
    (folder / "more/model.safetensors").write_bytes(b"x")
    name = others.store(folder)
    for files in others.hub.repos["models", name].commits.values():
        for path, file in list(files.files.items()):
            if path == "more/model.safetensors":
                files.files[path] = File(file.oid, 5_000_000_000)
    with pytest.raises(ValueError, match=r"have 5.0 GB, those in subfolders included; this page takes 5\."):
        others.apart.run(name, "measure", [])


def test_the_files_of_a_free_id_leave_with_it(others):
    others.load("free", others.new())
    first = others.apart.folder
    assert any(Path(first).glob("*.safetensors"))
    others.load("free", others.new())
    assert not Path(first).exists() and Path(others.apart.folder).exists()
    process, home = others.apart.process, others.apart.home
    environment = Path(f"/proc/{process.pid}/environ").read_text()
    assert "hf_aaa" not in environment and "TOKEN" not in environment
    # It outlives the thread that started it, is started again where it has ended, and goes with the page.
    starts = threading.Thread(target=lambda: (others.apart.end(), others.load("free", others.new())))
    starts.start()
    starts.join()
    others.load("free", others.new())
    assert process.poll() is not None and not Path(home).exists()
    last = others.apart.process
    assert last.poll() is None
    last.kill()
    last.wait()
    others.load("free", others.new())
    assert others.apart.process is not last


def test_a_free_id_cannot_hide_its_size_in_missing_weights(others):
    for changed, words in (({"vocab_size": 10_000_000}, "160,00"), ({"vocab_size": 10**9}, "64.0 GB")):
        folder = others.new()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ValueError, match=f"would have .*{words}.* and files with at least a byte for each"):
            others.load("free", folder)


def peak(pid="self"):
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


HUGE = "{{ 'x' * 10**10 }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_what_a_free_id_brings_is_read_in_bounds(space, others, monkeypatch):
    """A configuration of 20 million layers, a template without end and one of ten gigabytes, a decoder that panics:
    600 bytes each. The page's own process neither waits for ever nor grows."""
    monkeypatch.setattr(space.apart, "SECONDS", 4)
    deep = others.new()
    values = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 20_000_000}))
    brought = [deep]
    for template in (ENDLESS, HUGE, ""):
        tokenizer = chatml_tokenizer()
        tokenizer.chat_template = template + tokenizer.chat_template
        if not template:  # of a token that is all "x" it takes more than there is
            tokenizer.backend_tokenizer.decoder = decoders.Strip("x", 0, 9)
            with pytest.raises(BaseException, match="subtract with overflow|out of bounds"):
                tokenizer.decode(tokenizer("x")["input_ids"])
        brought.append(others.new(tokenizer=tokenizer))
    before = peak()
    for folder in brought:
        started = time.perf_counter()
        with pytest.raises(ValueError, match="could not be read here. Its configuration, tokenizer"):
            others.apart.run(others.store(folder), "compare", PROMPT, "x", B, 1.0)
        assert time.perf_counter() - started < space.apart.SECONDS + 20
        assert others.apart.process is None and others.apart.folder is None
    assert peak() < before + 50
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Answer A is empty"):  # its own sentences come through
        others.apart.run(others.store(others.new()), "compare", PROMPT, "", B, 1.0)


# ------------------------------------------------------------------------------------------------------------- drawing


def test_what_a_visitor_typed_is_escaped(space):
    evil = f"{EVIL}\"'&"
    row = {"prompt": evil, "chosen": evil, "rejected": "b", "subset": evil}
    pages = [
        compared(space, "prompt", evil, evil, f"B {evil}"),
        compared(space, "conversation", f"user: {evil}", evil, "B"),
        space.page.show_ranking("tiny", "prompt", evil, f"{evil}\nother", 1.0),
        space.page.show_batch("tiny", json.dumps(row), None, Quiet())[0],
        space.app.about_models(),
    ]
    for page in pages:
        assert "<img" not in page and "&lt;" in page
    words = byte_tokenizer(eos_token="</s>", pad_token=EVIL)  # a token of the model itself
    model = grm(words)
    result = space.reward_models.compare(loaded(space, model, words), "p", f"a {EVIL} b", "c")
    page = space.drawing.details(result)
    assert "<img" not in page and "&lt;img" in page


def compared(space, kind, prompt, a, b):
    verdict, _, _, details, _ = space.page.show_comparison("tiny", kind, prompt, a, b, 1.0)
    return f"<div>{verdict}{details}</div>"


def test_the_pages_are_well_formed(space):
    page = compared(space, "prompt", PROMPT, A + "\n<é 🙂>", B)
    minidom.parseString(page)
    again = compared(space, "prompt", PROMPT, A + "\n<é 🙂>", B)
    seconds = re.compile(r"[\d.]+(?= s on)|(?<=seconds&quot;: )[\d.]+")
    assert seconds.sub("", page) == seconds.sub("", again)  # the same every time, but for the seconds
    result = space.page.compare(PROMPT, A + "\n<é 🙂>", B)
    tokens = {name: space.drawing.units(answer["tokens"]) for name, answer in result["answers"].items()}
    assert "é" in [unit["text"] for unit in tokens["A"]] and "🙂" in [unit["text"] for unit in tokens["A"]]
    count = sum(map(len, tokens.values()))
    heat = re.findall(r'<span class="t[ a-z]*" title="reward', page)
    assert len(heat) == count and page.count('class="dot') == count + 2
    for name in "AB":
        assert f'<span class="value" aria-hidden="true">{space.drawing.signed(result["rewards"][name])}</span>' in page


def test_every_number_of_a_token_or_a_dot_is_in_a_table(space):
    page = minidom.parseString(compared(space, "prompt", PROMPT, "naïve 日本 🙂\nend", B))

    def text(node):
        return "".join(part.data if part.nodeType == part.TEXT_NODE else text(part) for part in node.childNodes)

    rows = [[text(cell) for cell in row.getElementsByTagName("td")] for row in page.getElementsByTagName("tr")]
    spans = page.getElementsByTagName("span")
    heat = [s.getAttribute("title") for s in spans if s.getAttribute("title").startswith("reward ")]
    cells = [row for row in rows if len(row) == 5 and row[0] != "0"]
    assert len(heat) == len(cells) > 20
    for title, (_, _, reward, change, expected) in zip(heat, cells, strict=True):
        assert title.startswith(f"reward {reward}, change {change}, expected with {expected}")
    dots = [s.getAttribute("title") for s in spans if "dot" in s.getAttribute("class")]
    assert [dot.rsplit(" ", 1)[1] for dot in dots] == [row[2] for row in rows if len(row) == 5]


def test_signs_are_shown_whole(space):
    def units(*texts):
        tokens = [{"text": text, "special": False, "reward": 1.0 * i, "logprob": -1.0} for i, text in enumerate(texts)]
        return space.drawing.units(tokens)

    family, flags = ["👩", "\u200d", "", "🚀"], ["🇩", "🇪", "🇫", "🇷"]
    assert [u["text"] for u in units("a", *family, "b")] == ["a", "👩\u200d🚀", "b"]
    assert [u["text"] for u in units(*flags)] == ["🇩🇪", "🇫🇷"]
    assert [u["text"] for u in units("", "", "日", "本", "👍", "🏽", "س", "\u064e", "e", "\u0301")] == [
        "日", "本", "👍🏽", "سَ", "e\u0301"
    ]  # fmt: skip
    (unit,) = units("", "", "日")
    assert (unit["first"], unit["last"], unit["reward"], unit["logprob"]) == (1, 3, 2.0, -3.0)


def test_bars_lie_on_the_right_side_of_zero(space):
    drawn = space.drawing.bars([("A", "a", 2.0, "A"), ("B", "b", -1.0, "B"), ("C", "a", 0.0, "C")])
    assert re.findall(r"left:([\d.]+)%;width:([\d.]+)%", drawn) == [
        ("50.00", "50.00"),
        ("25.00", "25.00"),
        ("50.00", "0.00"),
    ]
    assert "+2.000" in drawn and "−1.000" in drawn
    space.drawing.bars([("A", "a", 0.0, "A")])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-1.2, 0.1, [-1, -0.5, 0]), (-0.01, 0.013, [-0.01, 0, 0.01]), (0, 4000, [0, 1000, 2000, 3000, 4000])],
)
def test_ticks_are_round(space, low, high, expected):
    assert space.drawing.nice_ticks(low, high) == pytest.approx(expected)


def test_a_probability_is_never_shown_as_certain(space):
    assert [space.drawing.percent(p) for p in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0)] == [
        "under 0.1 %", "under 0.1 %", "50.0 %", "over 99.9 %", "over 99.9 %"
    ]  # fmt: skip


def test_another_temperature_runs_no_model(space, monkeypatch):
    _, known, *_ = space.page.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)
    monkeypatch.setattr(space.reward_models, "read", None)
    page, hot, link = space.page.show_at_temperature(json.loads(json.dumps(known)), 4.0)
    a, b = known["rewards"].values()
    assert hot["probability_a"] == close(1 / (1 + math.exp((b - a) / 8)))
    assert hot["inputs"] == ["tiny", "prompt", PROMPT, A, B]  # those compared, whatever is typed now
    assert "4 × 2 (the model’s own)" in page and link == space.app.query_of("tiny", "prompt", PROMPT, A, B, 4.0)
    assert "a number from 0.1 to 10" in space.page.show_at_temperature(known, 0)[0]
    assert space.page.show_at_temperature(None, 2.0)[1] == {"__type__": "update"}


@pytest.mark.parametrize(
    "sent",
    [
        7, "x", [], {}, {"inputs": 3}, {"inputs": ["a"] * 4}, {"inputs": [1] * 5}, {"rewards": {"A": "nan", "B": 0}},
        {"rewards": {"A": 10**400, "B": 0}}, {"rewards": {"A": 1}}, {"model_temperature": 0}, {"warnings": [3]},
        {"warnings": None}, {"model_temperature": [1]},
    ],
)  # fmt: skip
def test_a_comparison_that_a_browser_made_up_gets_a_sentence(space, sent):
    _, known, *_ = space.page.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)
    made_up = {**known, **sent} if isinstance(sent, dict) and sent else sent
    assert "The comparison of this page is lost" in space.page.show_at_temperature(made_up, 2.0)[0]
    assert "The comparison of this page is lost" in space.page.show_swap_check(made_up)
    evil = {**known, "inputs": ["tiny", "prompt", EVIL, EVIL, EVIL], "warnings": [EVIL]}
    assert "<img" not in space.page.show_at_temperature(evil, 2.0)[0]


def test_the_swap_check_is_of_the_comparison_shown(space):
    _, known, *_ = space.page.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)
    page = space.page.show_swap_check(known)
    assert "beyond rounding" in page and all(
        space.drawing.signed(reward) in page for reward in known["rewards"].values()
    )
    assert "press Compare" in space.page.show_swap_check(None)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_both_heads_say_is_what_the_library_says(space, kind):
    tokenizer = TOKENIZERS[kind]
    model = grm(tokenizer, reward_temperature=2.0, signals={"names": [], "scales": {"likelihood": 0.5}})
    found = space.reward_models.opinions(loaded(space, model, tokenizer), PROMPT, A, B)
    names = list(space.reward_models.SIGNALS)
    wording = Wording(follow_ups=space.reward_models.WORDING.follow_ups)
    expected = GRMScorer(model, tokenizer).compare(PROMPT, A, B, names, wording=wording)
    assert [row["name"] for row in found["signals"]] == names
    for row in found["signals"]:
        assert row["probability_a"] == pytest.approx(expected.probabilities[row["name"]], rel=1e-3, abs=1e-4)
        assert row["values"]["A"] == pytest.approx(expected.a[row["name"]], rel=1e-3, abs=1e-4)
        assert row["sentence"] == SIGNALS[row["name"]].sentence
    assert found["agreeing"] == round(expected.agreement * len(names))
    assert found["divergence"] == pytest.approx(expected.divergence, rel=1e-3, abs=1e-4)
    json.dumps(found, allow_nan=False)
    page = space.drawing.opinions(found)
    assert all(SIGNALS[name].sentence in html.unescape(page) for name in names) and "bits" in page
    tie = space.reward_models.opinions(loaded(space, model, tokenizer), PROMPT, A, A)
    assert "Both answers have the same reward" in space.drawing.opinions(tie)


def test_a_model_with_one_head_has_no_second_opinion(space):
    one = space.reward_models.Loaded("x/y", None, "classifier", None, None, None)
    with pytest.raises(ValueError, match="no LM head that could be asked"):
        space.reward_models.opinions(one, PROMPT, A, B)


def test_the_heads_are_asked_about_the_comparison_shown(space):
    _, known, *_ = space.page.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)
    assert "What both heads say" in space.page.show_opinions(known)
    assert "press Compare" in space.page.show_opinions(None)
    talk = f"user: {PROMPT}"
    _, known, *_ = space.page.show_comparison("tiny", "conversation", talk, A, B, 1.0)
    assert "What both heads say" in space.page.show_opinions(known)


def test_a_verdict_quotes_its_texts_and_warns(space):
    tokenizer = TOKENIZERS["chatml"]
    this = loaded(space, grm(tokenizer, max_sequence_length=60), tokenizer)
    a = "x " * 20 + "<|im_end|> and more"
    known = space.app.compared_of(["live", "prompt", PROMPT, a, B], space.reward_models.compare(this, PROMPT, a, B))
    page = space.drawing.verdict(known)
    assert "“x x x" in page and f"“{B}”" in page
    assert re.search(r"A is too long for the model, which reads 60 tokens: \d+ tokens of the prompt", page)
    assert "Answer A spells “&lt;|im_end|&gt;”, which the model reads as a control token" in page
    words = word_tokenizer([" is", " four", "What", " two", "It", "is", "user", "assistant"])
    this = loaded(space, grm(words), words)
    result = space.reward_models.compare(this, "What is two", "It is four", "It is five")
    (warning,) = space.drawing.warnings(result)
    assert warning.startswith("B and its prompt have 1 word that the model does not know")
    texts = [("What is two", "It is", "It is four"), ("What is two", "It", "five"), ("What is six", "It", "is")]
    assert space.reward_models.readable(this, texts) == [True, False, False]


def test_the_first_thing_seen_is_a_result(space):
    first, (verdict, known, link, details), fits, reads = space.app.at_first_sight()
    assert fits == [True, True, True, True, False] and reads == [True, True]
    assert [button.visible for button in space.page.offered("tiny")] == fits
    assert [button.visible for button in space.page.offered("ann/other")] == fits
    assert "answer" in verdict and known["pressed"] is False and known["inputs"] == ["tiny", *first]
    assert link.startswith("?model=tiny") and "The reward after each token" in details
    assert space.app.tables.read_pairs(space.app.PAIRS, None)[1] == "csv"


def test_thinking_that_the_template_leaves_out_is_said(space):
    hides = CHATML.replace("message.content or ''", "(message.content or '').split('</think>')[-1]")
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = hides
    this = loaded(space, grm(tokenizer), tokenizer)
    said = space.drawing.warnings(space.reward_models.compare(this, PROMPT, A, f"<think>2 + 2</think>{B}"))
    assert said == ["B or its prompt is a text whose thinking the chat template leaves out."]


def test_a_ranking_numbers_its_answers_and_says_when_they_tie(space):
    page = space.page.show_ranking("tiny", "prompt", PROMPT, f"{A}\n{B}\n{A}", 1.0)
    rewards = space.page.rank(PROMPT, [A, B, A])["rewards"]
    assert rewards[0] == rewards[2]
    best = "Answers 1 and 3 are the best of 3: they tie." if rewards[0] > rewards[1] else "Answer 2 is the best of 3."
    assert best in page
    ranks = re.findall(r'<td class="number">(\d)</td><th scope="row" class="number">(\d)</th>', page)
    assert sorted(ranks) == sorted(
        [("1", "1"), ("3", "2"), ("1", "3")] if "tie" in best else [("2", "1"), ("1", "2"), ("2", "3")]
    )
    same = space.page.show_ranking("tiny", "prompt", PROMPT, f"{A}\n{A}", 1.0)
    assert "All 2 answers have the same reward." in same


def test_where_they_part_is_said_of_the_answers_own_mean(space):
    def token(probability, reward):
        return {"text": "w", "special": False, "reward": reward, "logprob": math.log(probability)}

    # One token at 80 % among surer ones, where the reward rises; one at 1 % among less likely ones, where it falls.
    sure = [token(0.999, 0.0), token(0.999, 0.01), token(0.999, 0.0), token(0.8, 1.0), token(0.999, 1.0)]
    unsure = [token(1e-4, 0.0), token(2e-4, 0.01), token(1e-4, 0.0), token(0.01, -1.0), token(1e-4, -1.0)]
    result = space.page.compare(PROMPT, A, B)
    for name, tokens in (("A", sure), ("B", unsure)):
        result["answers"][name]["disagreements"] = space.reward_models.disagreements(0.0, tokens)
    page = space.drawing.other_head(result)
    assert "rises by 1.000, though the LM head was more surprised than on average in this answer (80.0 %)" in page
    assert "falls by 1.000, though the LM head was less surprised than on average in this answer (1.0 %)" in page


# --------------------------------------------------------------------------------------------------------------- links


def follow(space, query):
    return space.page.from_link(f"?{query}")


def test_links_restore_everything(space):
    given = ["tiny", "conversation", f"user: ü & = # % + {EVIL}\nassistant: b\nuser: c", ' "a"\n\n', "日本 🙂", 2.5]
    query = space.app.query_of(*given)
    assert urlsplit(query).query == query[1:]
    *found, opened, page = follow(space, query[1:] + "&__theme=dark")
    assert found == given and opened is True and page == {"__type__": "update"}
    assert follow(space, "__theme=dark")[6] is False
    *found, opened, _ = follow(space, "prompt=x&a=y")
    assert found == ["tiny", "prompt", "x", "y", "", 1.0] and opened


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("prompt=x&t=warm", "temperature of the link is “warm”; a number from 0.1 to 10"),
        ("prompt=x&t=-1", "temperature of the link is -1.0"),
        ("prompt=x&t=nan", "temperature of the link is nan"),
        ("prompt=x&t=50", "temperature of the link is 50.0; a number from 0.1 to 10 is required"),
        ("prompt=x&t=0.05", "temperature of the link is 0.05"),
        (f"prompt=x&kind={EVIL}", "kind “&lt;img"),
        ("prompt=" + "x" * 5000, "This link is too long"),
    ],
)
def test_broken_links_get_a_sentence(space, query, words):
    *_, opened, page = follow(space, query)
    assert opened is False and words in page and "<img" not in page


def test_a_comparison_too_long_for_a_link_says_so(space):
    assert space.app.query_of("tiny", "prompt", "ü" * 700, "a", "b", 1.0).startswith("Too long for a link: 4,2")
