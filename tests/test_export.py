"""`grm export`: what others load is the same function, token for token, or it is refused; and it comes back."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from originals import IDS, TOKENIZER, VOCABULARY, body, named, theirs, value_head, write
from safetensors.torch import load_file, save_file
from tiny import BARE, FAMILIES, bare_tokenizer, byte_tokenizer, chatml_tokenizer, llama_tokenizer
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from grm_hf import GRMForSequenceClassification, GRMScorer
from grm_hf.chats import as_messages
from grm_hf.cli import main
from grm_hf.hub import convert, export, load_export
from grm_hf.pairs import Encoder
from grm_hf.scoring import GoldenError, verify
from grm_hf.scoring.golden import CHATS


MODULE = importlib.import_module("grm_hf.hub.export")  # `grm_hf.hub.export` is the function
ROWS = [[256, 7, 91, 33, 250, 2, 14, 261], [256, 5, 5, 80, 261], list(range(40, 75))]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def saved(folder, lm=None, tokenizer=TOKENIZER, head_type="linear", **config):
    """A reward model in a folder, whose head is no small noise; `config` is set after it is made."""
    width = config.pop("head_hidden_size", 24)
    layers = config.pop("head_num_layers", 1)
    lm = lm or body()
    torch.manual_seed(5)
    model = GRMForSequenceClassification.from_base(
        lm, head_type=head_type, head_hidden_size=width, head_num_layers=layers
    )
    with torch.no_grad():
        for part in model.score.parameters():
            part += 0.3 * torch.randn_like(part)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.eval().save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def rewards(model):
    return [model(input_ids=torch.tensor([ids])).logits.item() for ids in ROWS]


def padded(pad):
    width = max(map(len, ROWS))
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in ROWS])
    return torch.tensor([ids + [pad] * (width - len(ids)) for ids in ROWS]), mask


# -------------------------------------------------------------------------------------------------------- linear heads


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_heads_of_every_family(tmp_path, family):
    model = saved(tmp_path / "grm", body(family))
    if type(model.config.text_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with pytest.raises(ValueError, match=f"no sequence classifier for bodies of type '{family}'"):
            export(tmp_path / "grm", tmp_path / "out")
        return
    done = export(tmp_path / "grm", tmp_path / "out")
    native, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    # SGLang's classifiers have a bias, which would stay random: zeros are there for it, and for nobody else.
    assert set(info["unexpected_keys"]) == ({"score.bias"} if family in ("qwen2", "qwen3") else set())
    assert type(native).__module__.startswith("transformers.models.") and type(native).__name__ == done.architecture
    expected = pytest.approx(rewards(model), rel=1e-5, abs=2e-6)
    assert rewards(native.eval()) == expected
    ids, mask = padded(native.config.get_text_config().pad_token_id)
    with torch.no_grad():
        assert native(input_ids=ids, attention_mask=mask).logits[:, 0].tolist() == expected
    assert native.config.num_labels == 1 and native.config.problem_type == "regression"
    names = load_file(tmp_path / "out/model.safetensors")
    assert "score.bias" not in names or not names["score.bias"].any()
    assert not any("lm_head" in name or name.startswith("lm.") for name in names)
    assert done.difference < 1e-5
    verify(tmp_path / "out")


def test_the_pipeline_gives_the_reward(tmp_path):
    from transformers import pipeline

    model = saved(tmp_path / "grm")
    export(tmp_path / "grm", tmp_path / "out")
    [found] = pipeline("text-classification", str(tmp_path / "out"))("one two")
    ids = TOKENIZER("one two", return_tensors="pt")
    with torch.no_grad():
        assert found["score"] == pytest.approx(model(**ids).logits.item(), abs=1e-5) and found["label"] == "REWARD"


def test_bfloat16_bodies_keep_the_head_in_float32_in_the_file(tmp_path):
    """vLLM computes a head in float32 from it; transformers rounds it when it loads."""
    saved(tmp_path / "grm", body().to(torch.bfloat16))
    done = export(tmp_path / "grm", tmp_path / "out")
    state = load_file(tmp_path / "out/model.safetensors")
    assert state["score.weight"].dtype == torch.float32
    assert {t.dtype for name, t in state.items() if name != "score.weight"} == {torch.bfloat16}
    assert 0 < done.difference < 5e-2
    model = GRMForSequenceClassification.from_pretrained(tmp_path / "grm").eval()
    native = load_export(tmp_path / "out")
    with torch.no_grad():
        for ids in ROWS:
            hidden = native.model(torch.tensor([ids])).last_hidden_state[:, -1].float()
            exact = nn.functional.linear(hidden, state["score.weight"]).item()
            assert exact == pytest.approx(model(torch.tensor([ids])).logits.item(), rel=1e-6)
    verify(tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- MLP heads


class Theirs(nn.Module):
    """The reward model of vLLM and SGLang, from their description: Qwen2, Linear, ReLU, Linear, at the last token."""

    def __init__(self, folder):
        super().__init__()
        config = Qwen2Config.from_pretrained(folder)  # they take what they need by name, whatever `model_type` says
        self.model, width = Qwen2Model(config), config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.load_state_dict(load_file(folder / "model.safetensors"))  # strict
        self.eval()

    def forward(self, input_ids):
        return self.score(self.model(input_ids).last_hidden_state)[:, -1, 0]


BODIES = {
    "llama": lambda: body(),
    "llama tied": lambda: body("llama_tied"),
    "llama 3 rope": lambda: body(rope_parameters=LLAMA3),
    "llama theta": lambda: body(rope_parameters={"rope_type": "default", "rope_theta": 123456.0}),
    "qwen2": lambda: body("qwen2"),
    "grouped": lambda: body(num_key_value_heads=1, rms_norm_eps=1e-3),
}


@pytest.mark.parametrize(("kind", "width"), [*((kind, 24) for kind in BODIES), ("llama", 32)])
def test_mlp_heads_become_the_reward_model_of_vllm_and_sglang(tmp_path, kind, width):
    model = saved(tmp_path / "grm", BODIES[kind](), head_type="mlp", head_hidden_size=width)
    done = export(tmp_path / "grm", tmp_path / "out")
    assert done.architecture == "Qwen2ForRewardModel" and done.difference < 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == kind[:5].replace("group", "llama") and config["tie_word_embeddings"] is False
    assert config["architectures"] == ["Qwen2ForRewardModel"]
    theirs = Theirs(tmp_path / "out")
    with torch.no_grad():
        found = [theirs(torch.tensor([ids])).item() for ids in ROWS]
    assert found == pytest.approx(rewards(model), rel=1e-6, abs=2e-6)
    verify(tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_factors_of_the_hidden_state_itself_are_such_a_layer(tmp_path, kind):
    """A BNRM head in use is an MLP head, and becomes one on the way back."""
    model = saved(tmp_path / "grm", BODIES[kind](), head_type="bnrm", head_num_layers=0)
    assert (model.score.out.weight < 0).any()
    assert export(tmp_path / "grm", tmp_path / "out").architecture == "Qwen2ForRewardModel"
    theirs = Theirs(tmp_path / "out")
    with torch.no_grad():
        found = [theirs(torch.tensor([ids])).item() for ids in ROWS]
    assert found == pytest.approx(rewards(model), rel=1e-6, abs=2e-6)
    verify(tmp_path / "out")
    again = convert(tmp_path / "out", tmp_path / "again", base=str(tmp_path / "grm")).model
    assert rewards(again.eval()) == pytest.approx(rewards(model), abs=2e-6) and again.config.head_type == "mlp"


class TheirsOnQwen3(Theirs):
    """SGLang's, from its description."""

    def __init__(self, folder):
        nn.Module.__init__(self)
        config = Qwen3Config.from_pretrained(folder)
        self.model, width = Qwen3Model(config), config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.load_state_dict(load_file(folder / "model.safetensors"))  # strict
        self.eval()


@pytest.mark.parametrize("width", [24, 32])
def test_mlp_heads_on_qwen3_become_the_reward_model_of_sglang(tmp_path, width):
    model = saved(tmp_path / "grm", body("qwen3"), head_type="mlp", head_hidden_size=width)
    done = export(tmp_path / "grm", tmp_path / "out")
    assert done.architecture == "Qwen3ForRewardModel" and done.difference < 1e-5
    with torch.no_grad():
        found = [TheirsOnQwen3(tmp_path / "out")(torch.tensor([ids])).item() for ids in ROWS]
    assert found == pytest.approx(rewards(model), rel=1e-6, abs=2e-6)
    verify(tmp_path / "out")
    again = convert(tmp_path / "out", tmp_path / "again", base=str(tmp_path / "grm")).model
    assert rewards(again.eval()) == pytest.approx(rewards(model), abs=2e-6) and again.config.head_hidden_size == width
    card = (tmp_path / "out/README.md").read_text()
    assert "vllm serve" not in card and "It serves the GRM that this was made from" in card
    assert "sglang.launch_server" in card


@pytest.mark.parametrize("rope", [None, LLAMA3])
def test_engines_with_transformers_4_rotate_alike(tmp_path, rope):
    """transformers 5 writes `rope_parameters`, which 4 does not know: the names of 4 stand beside it."""
    lm = body(rope_parameters=rope or {"rope_type": "default", "rope_theta": 777.0})
    saved(tmp_path / "grm", lm, head_type="mlp")
    export(tmp_path / "grm", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["rope_theta"] == (500000.0 if rope else 777.0)
    assert (config["rope_scaling"] or {}).get("factor") == (8.0 if rope else None)
    again = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert again["rope_theta"] == config["rope_theta"] and again["rope_type"] == ("llama3" if rope else "default")


# ------------------------------------------------------------------------------------------------------------ refusals


REFUSALS = {
    "too wide": (dict(head_type="mlp", head_hidden_size=33), None, "head_hidden_size=33"),
    "too deep": (dict(head_type="mlp", head_num_layers=2), None, "one hidden layer"),
    "factors and a layer": (dict(head_type="bnrm"), None, "has 2, its factors included.*plugin.*head_num_layers=0"),
    "another body": (dict(head_type="mlp"), lambda: body("gemma2"), "this one is 'gemma2'.*grm serve"),
    "head_dim": (dict(head_type="mlp"), lambda: body(head_dim=16), "head_dim=16"),
    "attention bias": (dict(head_type="mlp"), lambda: body(attention_bias=True), "biases"),
    "mlp bias": (dict(head_type="mlp"), lambda: body(mlp_bias=True), "biases"),
    "activation": (dict(head_type="mlp"), lambda: body(hidden_act="gelu"), "'gelu'"),
    "rope": (
        dict(head_type="mlp"),
        lambda: body(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "not known to rotate",
    ),
    "window": (
        dict(head_type="mlp"),
        lambda: body("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "sliding window",
    ),
    "no tokenizer": (dict(tokenizer=None), None, "has no tokenizer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_and_nothing_left(tmp_path, case):
    settings, lm, words = REFUSALS[case]
    saved(tmp_path / "grm", lm and lm(), **settings)
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "grm", tmp_path / "out")
    assert os.listdir(tmp_path) == ["grm"]


def test_adapters_are_merged_first(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tmp_path / "grm")
    model = GRMForSequenceClassification.from_pretrained(tmp_path / "grm")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="grm merge"):
        export(tmp_path / "adapter", tmp_path / "out")


def test_a_padding_token_that_ends_texts(tmp_path):
    """Native classifiers skip it and would read the token before; the remedy that the message names works."""
    tokenizer = chatml_tokenizer(pad_token="<|im_end|>", special=["<|im_start|>", "<|spare|>"])
    saved(tmp_path / "grm", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' also ends texts.*<\|spare\|>"):
        export(tmp_path / "grm", tmp_path / "out")
    tokenizer.pad_token = "<|spare|>"
    tokenizer.save_pretrained(tmp_path / "grm")
    export(tmp_path / "grm", tmp_path / "out")
    native = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    scorer = GRMScorer(str(tmp_path / "grm"))
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "b c d")]
    batch = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        chats, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        assert native(**batch).logits[:, 0].tolist() == pytest.approx(scorer.score(chats), abs=1e-5)


def test_an_mlp_head_does_not_mind_the_padding_token(tmp_path):
    saved(tmp_path / "grm", tokenizer=chatml_tokenizer(pad_token="<|im_end|>"), head_type="mlp")
    export(tmp_path / "grm", tmp_path / "out")
    verify(tmp_path / "out")


def test_without_padding_token_one_at_a_time(tmp_path):
    model = saved(tmp_path / "grm", body(pad_token_id=None), tokenizer=chatml_tokenizer(pad_token=None))
    export(tmp_path / "grm", tmp_path / "out")
    native = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert rewards(native) == pytest.approx(rewards(model), abs=1e-5)
    with pytest.raises(ValueError, match="no padding token"):
        native(torch.zeros(2, 3, dtype=torch.long))
    assert "one text at a time" in (tmp_path / "out/README.md").read_text()


def test_a_wrong_export_does_not_appear(tmp_path, monkeypatch):
    saved(tmp_path / "grm", head_type="mlp")
    real = MODULE._reward_model

    def wrong(*args):
        native = real(*args)
        with torch.no_grad():
            native.score[2].bias += 0.01
        return native

    monkeypatch.setattr(MODULE, "_reward_model", wrong)
    with pytest.raises(GoldenError, match="the export scores"):
        export(tmp_path / "grm", tmp_path / "out")
    assert os.listdir(tmp_path) == ["grm"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        export(tmp_path / "grm", tmp_path / "out")


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_verify_sees_changed_and_missing_weights(tmp_path, head_type):
    saved(tmp_path / "grm", head_type=head_type)
    export(tmp_path / "grm", tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.startswith("score."))
    save_file({**state, name: state[name] + 0.01}, path, {"format": "pt"})
    with pytest.raises(GoldenError, match="do not hold"):
        verify(tmp_path / "out")
    del state[name]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="does not fit its config.json"):
        verify(tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- tokens


def plain_ids(folder):
    """What an engine makes of messages: the folder's tokenizer and its template, nothing of this package."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return [tokenizer.apply_chat_template(as_messages(chat), return_dict=True)["input_ids"] for chat in CHATS]


TOKENS = {
    "llama": (TOKENIZER, "single"),
    "llama, double BOS": (TOKENIZER, "double"),
    "chatml": (chatml_tokenizer(), "single"),
    "turns without end": (bare_tokenizer(), "single"),
    "turns without end, line break": (bare_tokenizer(), "single"),
    "BOS that only the tokenizer adds": (
        byte_tokenizer(BARE, add_bos=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>"),
        "double",
    ),
}
TOKENS["turns without end, line break"][0].chat_template = BARE + "{{- '' }}\n"


@pytest.mark.parametrize("case", TOKENS)
def test_the_template_writes_the_ids_of_training(tmp_path, case):
    tokenizer, bos = TOKENS[case]
    model = saved(tmp_path / "grm", tokenizer=tokenizer, bos_policy=bos)
    expected = [Encoder.from_config(tokenizer, model.config).encode_chat(as_messages(chat)).ids for chat in CHATS]
    export(tmp_path / "grm", tmp_path / "out")
    assert plain_ids(tmp_path / "out") == expected
    # Back again: the ids stay, though the template changed.
    back = convert(tmp_path / "out", tmp_path / "back", base=tmp_path / "grm").model
    again = AutoTokenizer.from_pretrained(tmp_path / "back", trust_remote_code=True)
    encoder = Encoder.from_config(again, back.config)
    assert [encoder.encode_chat(as_messages(chat)).ids for chat in CHATS] == expected


def test_a_template_that_cannot_be_mended_is_said(tmp_path):
    """One that ends some last turns and not others."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = BARE + "{% if messages|length > 2 %}<|im_end|>{% endif %}"
    saved(tmp_path / "grm", tokenizer=tokenizer)
    export(tmp_path / "grm", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    card = (tmp_path / "out/README.md").read_text()
    assert "Token ids, as `grm_hf` makes them" in card and '"input": [[' in card and '"messages"' not in card
    verify(tmp_path / "out")


def test_the_tokenizer_is_loaded_as_it_was(tmp_path):
    """Beside a configuration of type `qwen2`, transformers may make another tokenizer of it. A Llama's never stands
    there; a Qwen2 body with a tokenizer that is not Qwen2's is refused where that would happen."""
    tokenizer = llama_tokenizer(merges=[("1", "2")])
    lm = body(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    saved(tmp_path / "grm", lm, tokenizer=tokenizer, head_type="mlp")
    export(tmp_path / "grm", tmp_path / "out")
    text = "12345 it's"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == tokenizer(text)

    lm = body("qwen2", vocab_size=len(tokenizer) + 1)
    lm.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    saved(tmp_path / "foreign", lm, tokenizer=tokenizer, head_type="mlp")
    if AutoTokenizer.from_pretrained(tmp_path / "plain")(text) != tokenizer(text):
        with pytest.raises(ValueError, match="splits texts differently"):
            export(tmp_path / "foreign", tmp_path / "other")
        assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------------- round trip


POLICIES = dict(reward_mean=0.5, reward_std=2.0, reward_temperature=1.5, max_sequence_length=300, overlength="error")


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_out_and_in_again(tmp_path, head_type, family):
    model = saved(tmp_path / "grm", body(family), head_type=head_type, **POLICIES)
    export(tmp_path / "grm", tmp_path / "out")
    done = convert(tmp_path / "out", tmp_path / "back", base=tmp_path / "grm" if family == "llama" else None)
    back = GRMForSequenceClassification.from_pretrained(tmp_path / "back").eval()
    assert rewards(back) == pytest.approx(rewards(model), rel=1e-6, abs=2e-6)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        torch.testing.assert_close(back.lm(ids).logits, model.lm(ids).logits, rtol=1e-5, atol=1e-5)
    assert {name: getattr(back.config, name) for name in POLICIES} == POLICIES
    assert (back.config.head_type, back.config.head_hidden_size) == (head_type, 24 if head_type == "mlp" else 1024)
    assert back.config.text_config.model_type == "llama"
    assert back.config.text_config.tie_word_embeddings == (family == "llama_tied")
    assert done.lm_head == (f"of the base '{tmp_path / 'grm'}'" if family == "llama" else "tied to the embeddings")
    export(tmp_path / "back", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_authors_checkpoint_to_vllm_and_sglang(tmp_path):
    """Their MLP layout in, Qwen2ForRewardModel out: the original's arithmetic at both ends."""
    lm, head = body(), value_head()
    convert(write(tmp_path / "source", lm, named(head)), tmp_path / "grm")
    export(tmp_path / "grm", tmp_path / "out")
    engine = Theirs(tmp_path / "out")
    with torch.no_grad():
        found = [engine(torch.tensor([ids])).item() for ids in IDS]
    assert found == pytest.approx(theirs(lm, head), rel=1e-6, abs=2e-6)


# ---------------------------------------------------------------------------------------------------------------- card


def curls(card):
    """The bodies of the requests in a card."""
    commands = [line for line in card.splitlines() if line.startswith("curl")]
    return [json.loads(words[words.index("-d") + 1]) for words in map(shlex.split, commands)]


@pytest.mark.parametrize("bos", ["single", "double"])
@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_the_card_says_what_the_engines_need(tmp_path, head_type, bos):
    saved(tmp_path / "grm", head_type=head_type, max_sequence_length=300, bos_policy=bos, base_model="org/base")
    export(tmp_path / "grm", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    row = json.loads((tmp_path / "out/golden_rows.json").read_text())["rows"][0]
    vllm, sglang = curls(card)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert vllm["model"] == sglang["model"] == "out"
    assert tokenizer.apply_chat_template(vllm["messages"], return_dict=True)["input_ids"] == row["ids"]
    assert tokenizer(sglang["text"][0])["input_ids"] == row["ids"]  # the engine adds special tokens to text
    assert "vllm serve out --runner pooling --max-model-len 300" in card
    assert "sglang.launch_server --model-path out --is-embedding" in card
    assert ("localhost:8000/classify" in card and vllm["use_activation"] is False) == (head_type == "linear")
    assert ("localhost:8000/pooling" in card and "data[0].data[-1]" in card) == (head_type == "mlp")
    assert "run this layout in vLLM on a CPU" in card and "was not run" in card and "base_model: org/base" in card
    assert f"{row['score']:.4f}" in card


@pytest.mark.parametrize("template", [True, False])
def test_the_cards_example_runs_where_grm_hf_is_not(tmp_path, template):
    tokenizer = chatml_tokenizer()
    if not template:
        tokenizer.chat_template = None
    saved(tmp_path / "grm", tokenizer=tokenizer)
    export(tmp_path / "grm", tmp_path / "out")
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    code = "import sys\nsys.modules['grm_hf'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((tmp_path / "out/golden_rows.json").read_text())["rows"][0]
    assert float(done.stdout) == pytest.approx(row["score"], abs=1e-5)
    assert f"It prints about {float(done.stdout):.4f}" in (tmp_path / "out/README.md").read_text()


def test_families_that_sglang_lacks(tmp_path):
    saved(tmp_path / "grm", body("phi3"))
    export(tmp_path / "grm", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "no sequence classifier for bodies of type 'phi3'" in card and "sglang.launch_server" not in card


# ------------------------------------------------------------------------------------------------------------- command


def test_command(tmp_path, capsys):
    saved(tmp_path / "grm", head_type="mlp")
    output = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "grm"), output]) == 0
    assert "exported as Qwen2ForRewardModel" in capsys.readouterr().out
    assert main(["verify", output]) == 0
    assert main(["export", str(tmp_path / "grm"), output]) == 1
    err = capsys.readouterr().err
    assert "not an empty folder" in err and "Traceback" not in err
    assert VOCABULARY == len(AutoTokenizer.from_pretrained(output))


def test_the_documentation(tmp_path, monkeypatch, capsys):
    """Each command and each line of Python in docs/formats.md runs, in its order; the table of families holds."""
    text = (Path(__file__).parents[1] / "docs/formats.md").read_text()
    write(tmp_path / "checkpoint", body(), named(value_head()))
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert [shlex.split(command)[1] for command in commands] == ["convert", "export", "verify"]
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0, capsys.readouterr().err
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, {})
    assert load_file("native/model.safetensors").keys() == load_file("native-again/model.safetensors").keys()
    options = set(re.findall(r"\[(--[\w-]+)", text))
    for command in ("convert", "export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options -= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert not options
    assert all(f"`{rope}`" in text for rope in MODULE.ROPES)
    assert "Llama, Qwen2, Qwen3 and Gemma 2" in text and MODULE.SGLANG == ("llama", "qwen2", "qwen3", "gemma2")
