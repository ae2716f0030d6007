"""The Space `pairwise_comparison` without a browser: its numbers are the library's, its trace is the reward of each
prefix, bad input gets a sentence, what visitors type is escaped, links restore what they were made from."""

import ast
import importlib
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from xml.dom import minidom

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, bare_tokenizer, byte_tokenizer, chatml_tokenizer, llama_tokenizer, tiny_lm
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from grm_hf import GRMForSequenceClassification, GRMScorer, metrics
from grm_hf.hub import export


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "spaces" / "pairwise_comparison"
NAMES = ("app", "drawing", "encoding", "metrics", "reward_models", "tables")
PROMPT, A, B = "What is 2 + 2?", "It is 4.", "Maybe 5, or not?"
EVIL = "<img src=x onerror=alert(1)>"
BERT = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
TOKENIZERS = {"chatml": chatml_tokenizer(), "llama": llama_tokenizer(), "bare": bare_tokenizer()}


def grm(tokenizer, family="llama", **config):
    torch.manual_seed(0)
    lm = tiny_lm(family, vocab_size=len(tokenizer), max_position_embeddings=512)
    model = GRMForSequenceClassification.from_base(lm, head_hidden_size=8).eval()
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
    for name, module in before.items():
        sys.modules.pop(name)
        if module is not None:
            sys.modules[name] = module
    return modules


def loaded(space, model, tokenizer):
    encoder = space.reward_models.Encoder.from_config(tokenizer, model.config)
    return space.reward_models.Loaded("live", None, "grm", model, tokenizer, encoder, 0.0)


def close(expected):
    return pytest.approx(expected, rel=1e-4, abs=2e-6)


# ---------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_is_self_contained():
    files = {path.stem for path in SPACE.glob("*.py")}
    assert files == set(NAMES)
    others = {"gradio", "huggingface_hub", "jinja2", "numpy", "spaces", "torch", "transformers"}
    type_checking = {".configuration_grm"}  # of encoding.py
    for name in files:
        imported = set()
        for node in ast.walk(ast.parse((SPACE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or "").split(".")[0])
        allowed = others | files | (type_checking if name == "encoding" else set())
        assert imported - set(sys.stdlib_module_names) <= allowed, name


def test_the_front_matter_is_what_the_hub_asks_for():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert len(front["short_description"]) <= 60 and front["title"] and front["python_version"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={front['sdk_version']}\n" in pins


def test_the_pictures_of_the_documentation_are_there():
    names = re.findall(r"\((images/[^)]*)\)", (ROOT / "docs" / "space.md").read_text(encoding="utf-8"))
    assert len(names) == 5 and all((ROOT / "docs" / name).is_file() for name in names)


def test_the_list_that_is_shipped_is_honest(space):
    listed, problems = space.reward_models.read_list(SPACE / "models.json")
    assert problems == []
    assert all(re.fullmatch("[0-9a-f]{40}", entry.revision) for entry in listed.values())


def test_lists_of_models(space, tmp_path):
    file, sha = tmp_path / "list.json", "a" * 40
    entries = [
        {"id": "ann/first", "revision": sha},
        {"id": "ann/second", "revision": "main"},
        {"id": "ann/third"},
        {"folder": str(tmp_path / "none")},
        {"id": "ann/other", "revision": sha, "name": "ann/first"},
        {"folder": str(tmp_path), "name": "here", "note": "mine"},
        "ann/text",
    ]
    file.write_text(json.dumps(entries))
    listed, problems = space.reward_models.read_list(file)
    assert {name: (entry.source, entry.revision, entry.note) for name, entry in listed.items()} == {
        "ann/first": ("ann/first", sha, ""),
        "here": (str(tmp_path), None, "mine"),
    }
    assert [re.match(r"Entry (\d)", problem)[1] for problem in problems] == ["2", "3", "4", "5", "7"]
    assert "all 40 digits" in problems[0] and "no folder" in problems[2] and "another one" in problems[3]
    listed, problems = space.reward_models.read_list(tmp_path)  # a model's folder
    assert list(listed) == [tmp_path.name] and not problems
    for text, words in (("{}", "no JSON list"), ("[", "cannot be read")):
        file.write_text(text)
        assert words in space.reward_models.read_list(file)[1][0]
    assert "cannot be read" in space.reward_models.read_list(tmp_path / "none.json")[1][0]


def test_a_page_without_models_says_so(space, monkeypatch):
    monkeypatch.setattr(space.app.MODELS, "listed", {})
    monkeypatch.setattr(space.app.MODELS, "problems", [f"Entry 1 {EVIL}"])
    said = space.app.notices()
    assert "No model is on the list" in said and "GRM_SPACE_MODELS" in said and "Entry 1 &lt;img" in said
    page = space.app.show_comparison("", "prompt", PROMPT, A, B, 1.0)[0]
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
    encoder = space.reward_models._encoder_of_a_classifier("x/y", model, tokenizer)
    this = space.reward_models.Loaded("x/y", "a" * 40, "classifier", model, tokenizer, encoder, 0.0)
    result = space.reward_models.compare(this, PROMPT, A, B)
    for answer, text in zip(result["answers"].values(), (A, B), strict=True):
        ids = torch.tensor([space.reward_models.encode(this, PROMPT, text).ids])
        with torch.no_grad():
            assert (
                answer["reward"] == close(model(input_ids=ids).logits.item()) == close(answer["tokens"][-1]["reward"])
            )
        assert answer["mean_logprob"] is None and answer["disagreements"] == []
    assert result["heads"] is None and "no language-model head" in space.drawing.comparison(result)
    assert space.reward_models.swap_check(this, PROMPT, A, B)["largest"] < 1e-5
    model.config.pad_token_id = None
    check = space.reward_models.swap_check(this, PROMPT, A, B)
    assert check["largest"] is None and "no padding token" in space.drawing.swap(check)
    model.config.pad_token_id = tokenizer("\n")["input_ids"][0]  # then the reward is read before the final line break
    reading = space.reward_models.read(this, space.reward_models.encode(this, PROMPT, A))
    assert reading.read_at == len(reading.ids) - 2 and reading.reward == close(reading.rewards[-2])
    with pytest.raises(ValueError, match="no head `score`"):
        space.reward_models._encoder_of_a_classifier("x/y", BertForSequenceClassification(BERT), tokenizer)


def test_a_ranking_and_a_table_are_the_librarys(space):
    scorer = GRMScorer(str(space.folder / "model"))
    answers = [A, B, "No idea.", A]
    expected = scorer.best_of_n(PROMPT, answers)
    result = space.app.rank(PROMPT, answers)
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
    lines = "\n".join(json.dumps(row) for row in rows)
    page, saved = space.app.show_batch("tiny", lines, None, progress=Quiet())
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
    reported = metrics.pairwise_metrics(
        scores[::2], scores[1::2], temperature=2.0, subsets=[row["subset"] for row in rows]
    )
    assert f"Accuracy {100 * reported['accuracy']:.1f} % on 10 pairs" in page
    for name in ("log_loss", "brier", "ece", "accuracy/x", "accuracy/y"):
        assert f"{reported[name]:.4f}" in page
    for plot in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        minidom.parseString(plot)
    csv = "prompt;chosen;rejected\n" + '"a;b";"say ""x""";no\n'
    _, saved = space.app.show_batch("tiny", "", csv.encode("utf-8-sig"), progress=Quiet())
    assert saved.visible is True
    text = next(path for path in space.app.DOWNLOADS.iterdir() if path.suffix == ".csv").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "prompt,chosen,rejected,chosen_reward,rejected_reward,margin,probability,cut_tokens"
    assert text.splitlines()[1].startswith('a;b,"say ""x""",no,')


class Quiet:
    def tqdm(self, rows, **_):
        return rows


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
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": None}, "temperature is None"),
        ({"kind": "conversation", "prompt": f"{EVIL}hello"}, "must begin with a role"),
        ({"kind": "conversation", "prompt": "user: a\nuser:"}, "turn 2 (user) is empty"),
        ({"kind": "conversation", "prompt": "user: a\nassistant: b"}, "two turns of the assistant"),
        ({"kind": "conversation", "prompt": "[1"}, "begins like JSON and is none"),
        ({"kind": "conversation", "prompt": "[1]"}, "turn 1: a message is"),
        ({"kind": "conversation", "prompt": "[]"}, "a list of 1 to 20 messages"),
        ({"kind": "conversation", "prompt": "user: a\nassistant: b\n" * 11}, "a list of 1 to 20 messages"),
    ],
)
def test_bad_input_gets_a_sentence(space, capsys, changed, words):
    given = {"name": "tiny", "kind": "prompt", "prompt": PROMPT, "a": A, "b": B, "temperature": 1.0, **changed}
    page, *rest = space.app.show_comparison(*given.values())
    assert words in page and 'role="alert"' in page and "Traceback" not in page and "<img" not in page
    assert rest == [None, None, "", ""]


def test_our_own_failure_gets_a_sentence_and_a_log(space, capsys, monkeypatch):
    monkeypatch.setattr(space.reward_models, "compare", lambda *_: 1 / 0)
    page = space.app.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)[0]
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
        ("prompt,chosen,rejected\n" + "a,b,c\n" * 201, "has 201 pairs; this page takes 200"),
        ('{"prompt": "a"', "Line 1 is no JSON"),
        ('{"prompt": "a", "chosen": "b"}', "Line 1 needs"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "“rejected” must be text or a list of messages"),
        ('{"chosen": "b", "rejected": "c"}', "“prompt” must be text"),
        ('{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}', "are mixed"),
        ('{"prompt": "a", "chosen": [{"from": "x"}], "rejected": "c"}', "“chosen”, turn 1: a message is"),
        (f"prompt,chosen,rejected\n{EVIL},a,{'x' * 600}", "Pair 1, “rejected” and the prompt have"),
    ],
)
def test_bad_tables_get_a_sentence(space, text, words):
    page, saved = space.app.show_batch("tiny", text, None, progress=Quiet())
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


def test_scores_of_a_download_are_replaced_and_that_is_said(space):
    lines = json.dumps({"prompt": PROMPT, "chosen": A, "rejected": B})
    page, _ = space.app.show_batch("tiny", lines, None, progress=Quiet())
    (row,) = space.tables.read_pairs(lines, None)[0]
    again = json.dumps({**row, **dict.fromkeys(space.tables.SCORES, 99.0)})
    other, _ = space.app.show_batch("tiny", again, None, progress=Quiet())
    note = '<p class="quiet">The table had scores of this page: the new ones took their places.</p>'
    assert note not in page and other.replace(note, "") == page


def test_an_empty_prompt_beside_whole_conversations_is_none(space):
    row = {"prompt": "", "chosen": [*CONVERSATION, say(A)], "rejected": [*CONVERSATION, say(B)]}
    page, _ = space.app.show_batch("tiny", json.dumps(row), None, progress=Quiet())
    assert "on 1 pairs" in page


def test_a_table_of_too_many_tokens_gets_a_sentence(space, monkeypatch):
    monkeypatch.setattr(space.app, "MAX_TABLE_TOKENS", 60)
    page, _ = space.app.show_batch("tiny", space.app.PAIRS, None, progress=Quiet())
    assert re.search(r"The table has \d+ tokens; this page takes 60", page)


def test_bad_files_get_a_sentence(space):
    for upload, words in ((b"\xff\xfe", "not text in UTF-8"), (b"x" * 2_000_001, "larger than 2 MB")):
        assert words in space.app.show_batch("tiny", "", upload, progress=Quiet())[0]


@pytest.mark.parametrize(
    ("answers", "words"), [("one", "There are 1 answers"), ("", "There are 0"), ("x\n" * 33, "There are 33 answers")]
)
def test_bad_rankings_get_a_sentence(space, answers, words):
    assert words in space.app.show_ranking("tiny", "prompt", PROMPT, answers, 1.0)


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
        space.app.compare(PROMPT, "", B)
    with pytest.raises(Error, match="The prompt is empty"):
        space.app.compare("", A, B)
    with pytest.raises(Error, match="`messages`, turn 1"):
        space.app.compare("", A, B, messages=[{"role": "user"}])
    result = space.app.compare("", A, B, messages=CONVERSATION)
    expected = GRMScorer(str(space.folder / "model")).score([{"prompt": CONVERSATION, "response": A}])
    assert result["rewards"]["A"] == close(expected[0]) and result["model"] == "tiny"
    assert space.app.models() == [{"name": "tiny", "revision": None, "note": f"two layers {EVIL}"}]


def test_only_the_last_models_are_kept(space, monkeypatch):
    this = space.reward_models.Models(SPACE / "models.json")
    this.listed = dict.fromkeys("abc", space.reward_models.Listed(str(space.folder / "model"), None))
    first = this.load("a")
    assert this.load("a") is first
    this.load("b"), this.load("a"), this.load("c")
    assert list(this._kept) == ["a", "c"]
    load, counts = space.reward_models._load, []
    monkeypatch.setattr(
        space.reward_models, "_load", lambda *args, **kw: (counts.append(len(this._kept)), load(*args, **kw))[1]
    )
    this.load("b")
    assert counts == [space.reward_models.KEPT - 1]  # room is made before another one is loaded
    this.listed["d"] = space.reward_models.Listed(str(space.folder), None)
    with pytest.raises(ValueError, match="“d” could not be loaded"):
        this.load("d")


# --------------------------------------------------------------------------------------------- what models are refused


def classifier(**changed):
    torch.manual_seed(0)
    tokenizer = TOKENIZERS["chatml"]
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **changed}
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture
def stored(space, tmp_path, monkeypatch):
    """Stores a model as if it were ann/x of the Hub: the working directory stands for it."""

    class Api:
        def __init__(self, token):
            assert token is False

        def model_info(self, repo, revision):
            return SimpleNamespace(sha="a" * 40, gated=False)

        def list_repo_tree(self, repo, revision):
            return [SimpleNamespace(path=file.name, size=file.stat().st_size) for file in Path(repo).iterdir()]

    monkeypatch.setattr(space.reward_models, "HfApi", Api)
    monkeypatch.chdir(tmp_path)

    def store(model, tokenizer=TOKENIZERS["chatml"]):
        model.save_pretrained("ann/x")
        tokenizer.save_pretrained("ann/x")
        return Path("ann/x")

    return store


def either(space, how):
    """Loads ann/x as a free id, or as a model of the list."""
    if how == "free":
        return space.reward_models.Models(SPACE / "models.json").load("ann/x")
    return space.reward_models.Models(Path("ann/x")).load("x")


def test_an_export_is_read_by_the_policies_it_stores(space, tmp_path, stored):
    tokenizer = TOKENIZERS["chatml"]
    torch.manual_seed(0)
    lm = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    model = GRMForSequenceClassification.from_base(lm, head_type="linear").eval()
    model.config.max_sequence_length = 24
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "ann/x")
    (expected,) = GRMScorer(str(tmp_path / "model")).stream([{"prompt": CONVERSATION, "response": A}])
    assert expected.truncated
    for how in ("listed", "free"):
        this = either(space, how)
        (encoded,) = space.reward_models.encode_all(this, [(CONVERSATION, A)])
        assert (this.kind, len(encoded.ids)) == ("classifier", 24)
        assert space.reward_models.reward_of(this, encoded) == close(expected.score)
    this.model.config.max_sequence_length = 100_000
    assert space.reward_models._encoder_of_a_classifier("x", this.model, tokenizer).max_length == 512
    this.model.config.max_sequence_length = "long"
    with pytest.raises(ValueError, match="“x” cannot be used: `max_length` is 'long'"):
        space.reward_models._encoder_of_a_classifier("x", this.model, tokenizer)


@pytest.mark.parametrize("how", ["free", "listed"])
def test_models_whose_files_do_not_fit_are_refused(space, stored, how, capsys):
    folder = stored(classifier())
    weights = load_file(folder / "model.safetensors")

    def put(extra=(), without=()):
        kept = {name: tensor for name, tensor in weights.items() if name not in without}
        save_file({**kept, **dict(extra)}, folder / "model.safetensors", {"format": "pt"})

    put({"lm_head.weight": torch.zeros(1, 16)})
    assert either(space, how).kind == "classifier"
    put({"value.weight": torch.zeros(1, 16)})
    with pytest.raises(ValueError, match="1 weights that LlamaForSequenceClassification does not use .value.weight"):
        either(space, how)
    put(without=["score.weight"])
    with pytest.raises(ValueError, match="lacks 1 weights .score.weight"):
        either(space, how)
    stored(classifier(num_labels=2))
    with pytest.raises(ValueError, match="2 labels"):
        either(space, how)


def test_a_language_model_on_the_list_is_refused(space, stored):
    stored(tiny_lm("llama", vocab_size=len(TOKENIZERS["chatml"])))
    with pytest.raises(ValueError, match="lacks 1 weights .score.weight"):
        either(space, "listed")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_listed_model_with_code_of_another_repository_is_refused(space, stored, file):
    path = stored(classifier()) / file
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": ["own.Slow", None]}}))
    space.reward_models._check_code("x", "ann/x", None)
    path.write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": ["eve/code--tok.Slow", None]}}))
    with pytest.raises(ValueError, match=f"another repository .*auto_map` of its {file}"):
        either(space, "listed")


def test_a_free_id_with_an_adapter_beside_its_model_is_refused(space, stored):
    (stored(classifier()) / "adapter_config.json").write_text('{"base_model_name_or_path": "eve/other"}')
    with pytest.raises(ValueError, match="is an adapter"):
        either(space, "free")


def test_a_free_id_cannot_hide_its_size_in_missing_weights(space, stored, monkeypatch):
    folder = stored(classifier())
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(space.reward_models, "_load", None)
    for vocabulary, words in ((10_000_000, "160,00"), (10**9, "64.0 GB")):
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}))
        with pytest.raises(ValueError, match=f"would have .*{words}.* and files with at least a byte for each"):
            either(space, "free")


@pytest.mark.parametrize(
    "template",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}"],
)
def test_the_template_of_a_free_id_runs_in_bounds(space, stored, monkeypatch, template):
    stored(classifier())
    this = either(space, "free")
    this.tokenizer.chat_template = template + TOKENIZERS["chatml"].chat_template
    monkeypatch.setattr(space.reward_models, "APART_SECONDS", 1)
    started = time.perf_counter()
    for task, arguments in (("compare", (A, B)), ("rank", ([A, B],))):
        with pytest.raises(ValueError, match="took more than 1 seconds"):
            getattr(space.reward_models, task)(this, PROMPT, *arguments)
    with pytest.raises(ValueError, match="took more than 1 seconds"):
        space.app.score_pairs(this, [{"prompt": PROMPT, "chosen": A, "rejected": B}], Quiet())
    assert time.perf_counter() - started < 20
    with pytest.raises(ValueError, match="Answer A is empty"):  # its own sentences come through
        space.reward_models.compare(this, PROMPT, "", B)


# ------------------------------------------------------------------------------------------------------------- drawing


def test_what_a_visitor_typed_is_escaped(space):
    evil = f"{EVIL}\"'&"
    row = {"prompt": evil, "chosen": evil, "rejected": "b", "subset": evil}
    pages = [
        space.app.show_comparison("tiny", "prompt", evil, evil, f"B {evil}", 1.0)[0],
        space.app.show_comparison("tiny", "conversation", f"user: {evil}", evil, "B", 1.0)[0],
        space.app.show_ranking("tiny", "prompt", evil, f"{evil}\nother", 1.0),
        space.app.show_batch("tiny", json.dumps(row), None, Quiet())[0],
        space.app.about_models(),
    ]
    for page in pages:
        assert "<img" not in page and "&lt;" in page
    words = byte_tokenizer(eos_token="</s>", pad_token=EVIL)  # a token of the model itself
    model = grm(words)
    result = space.reward_models.compare(loaded(space, model, words), "p", f"a {EVIL} b", "c")
    page = space.drawing.comparison(result)
    assert "<img" not in page and "&lt;img" in page


def test_the_pages_are_well_formed(space):
    page, _, result, *_ = space.app.show_comparison("tiny", "prompt", PROMPT, A + "\n<é 🙂>", B, 1.0)
    minidom.parseString(page.replace("<wbr>", "<wbr/>"))
    assert (
        space.app.show_comparison("tiny", "prompt", PROMPT, A + "\n<é 🙂>", B, 1.0)[0].split("both answers in")[0]
        == (page.split("both answers in")[0])
    )  # the same every time, but for the seconds
    tokens = sum(len(answer["tokens"]) for answer in result["answers"].values())
    heat = re.findall(r'<span class="(?:special)?" title="reward', page)
    assert len(heat) == tokens and page.count('class="dot') == tokens + 2
    for name in "AB":
        assert f'<span class="value">{space.drawing.signed(result["rewards"][name])}</span>' in page


def test_bars_lie_on_the_right_side_of_zero(space):
    drawn = space.drawing.bars([("A", "a", 2.0), ("B", "b", -1.0), ("C", "a", 0.0)])
    assert re.findall(r"left:([\d.]+)%;width:([\d.]+)%", drawn) == [
        ("50.00", "50.00"),
        ("25.00", "25.00"),
        ("50.00", "0.00"),
    ]
    assert "+2.000" in drawn and "−1.000" in drawn
    space.drawing.bars([("A", "a", 0.0)])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-1.2, 0.1, [-1, -0.5, 0]), (-0.01, 0.013, [-0.01, 0, 0.01]), (0, 4000, [0, 1000, 2000, 3000, 4000])],
)
def test_ticks_are_round(space, low, high, expected):
    assert space.drawing.nice_ticks(low, high) == pytest.approx(expected)


def test_a_probability_is_never_shown_as_certain(space):
    assert [space.drawing.percent(p) for p in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0)] == [
        "< 0.1 %", "< 0.1 %", "50.0 %", "> 99.9 %", "> 99.9 %"
    ]  # fmt: skip


def test_another_temperature_runs_no_model(space, monkeypatch):
    _, state, result, *_ = space.app.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)
    monkeypatch.setattr(space.reward_models, "read", None)
    page, kept, hot, link = space.app.show_at_temperature(state, 4.0)
    a, b = result["rewards"].values()
    assert hot["probability_a"] == close(1 / (1 + math.exp((b - a) / 8)))
    assert kept == {"inputs": ["tiny", "prompt", PROMPT, A, B], "result": hot}  # those compared, whatever is typed now
    assert "4 × 2 (the model’s own)" in page and link == space.app.query_of("tiny", "prompt", PROMPT, A, B, 4.0)
    assert "positive number" in space.app.show_at_temperature(state, 0)[0]


def test_the_swap_check_is_of_the_result_shown(space):
    _, state, result, *_ = space.app.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)
    page = space.app.show_swap_check(state)
    assert "beyond rounding" in page and all(
        space.drawing.signed(reward) in page for reward in result["rewards"].values()
    )
    assert space.app.show_swap_check(None) == ""


def test_where_they_part_is_said_of_the_answers_own_mean(space):
    def token(probability, reward):
        return {"text": "w", "special": False, "reward": reward, "logprob": math.log(probability)}

    # One token at 80 % among surer ones, where the reward rises; one at 1 % among less likely ones, where it falls.
    sure = [token(0.999, 0.0), token(0.999, 0.01), token(0.999, 0.0), token(0.8, 1.0), token(0.999, 1.0)]
    unsure = [token(1e-4, 0.0), token(2e-4, 0.01), token(1e-4, 0.0), token(0.01, -1.0), token(1e-4, -1.0)]
    _, _, result, *_ = space.app.show_comparison("tiny", "prompt", PROMPT, A, B, 1.0)
    for name, tokens in (("A", sure), ("B", unsure)):
        result["answers"][name]["disagreements"] = space.reward_models.disagreements(0.0, tokens)
    page = space.drawing.other_head(result)
    assert (
        "rises by 1.000, though the language model was more surprised than on average in this answer (80.0 %)" in page
    )
    assert (
        "falls by 1.000, though the language model was less surprised than on average in this answer (1.0 %)" in page
    )


# --------------------------------------------------------------------------------------------------------------- links


def follow(space, query):
    from starlette.datastructures import QueryParams

    return space.app.from_link(SimpleNamespace(query_params=QueryParams(query)))


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
        ("prompt=x&t=warm", "temperature “warm”"),
        ("prompt=x&t=-1", "temperature “-1”"),
        ("prompt=x&t=nan", "temperature “nan”"),
        ("prompt=x&t=50", "temperature “50”; a number from 0.1 to 10 is required"),
        ("prompt=x&t=0.05", "temperature “0.05”"),
        (f"prompt=x&kind={EVIL}", "kind “&lt;img"),
        ("prompt=" + "x" * 5000, "This link is too long"),
    ],
)
def test_broken_links_get_a_sentence(space, query, words):
    *_, opened, page = follow(space, query)
    assert opened is False and words in page and "<img" not in page


def test_a_comparison_too_long_for_a_link_says_so(space):
    assert space.app.query_of("tiny", "prompt", "ü" * 700, "a", "b", 1.0).startswith("Too long for a link: 4,2")
