"""`grm convert`: each published layout, written here as its makers write it, scores as their arithmetic does."""

import copy
import importlib
import json
import logging
import os
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from originals import IDS, TOKENIZER, VOCABULARY, body, configure, named, theirs, value_head, write
from safetensors.torch import load_file, save_file
from tiny import chatml_tokenizer, llama_tokenizer, tiny_lm
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from grm_hf import GRMForSequenceClassification
from grm_hf.cli import main
from grm_hf.folders import new_folder
from grm_hf.hub import convert
from grm_hf.pairs import Encoder
from grm_hf.scoring import verify


MODULE = importlib.import_module("grm_hf.hub.convert")  # `grm_hf.hub.convert` is the function
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@torch.no_grad()
def ours(folder):
    model = GRMForSequenceClassification.from_pretrained(folder).eval()
    return model, [model(input_ids=torch.tensor([ids])).logits.item() for ids in IDS]


def as_bin(folder, shards=1):
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    names = sorted(state)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in names[i::shards]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_shards(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    weight_map = {}
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: state[name] for name in sorted(state)[i::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def check(source, output, lm, head, **options):
    """Convert, and compare the folder with the original's arithmetic, the LM head included."""
    done = convert(source, output, **options)
    model, rewards = ours(output)
    assert rewards == pytest.approx(theirs(lm, head), rel=1e-6, abs=2e-6)
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        torch.testing.assert_close(model.lm(ids).logits.double(), lm(ids).logits.double(), rtol=1e-4, atol=1e-5)
    verify(output)
    assert "auto_map" not in model.config.text_config.to_dict()
    return done, model


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("files", ["one", "shards", "bin", "bin shards", "wrapper names"])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_authors_layout(tmp_path, family, files):
    lm, head = body(family), value_head()
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling.AutoModelForCausalLMWithValueHead"},
        "vhead_layer_type": "mlp",
        "vhead_num_neurons": 1024,
        "vhead_num_layers": 1,
        "summary_dropout_prob": 0.2,
    }
    source = write(tmp_path / "source", lm, named(head), settings)
    if files == "wrapper names":
        state = load_file(source / "model.safetensors")
        state = {name if name.startswith("v_head") else f"pretrained_model.{name}": t for name, t in state.items()}
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    elif files == "shards":
        as_shards(source)
    elif files != "one":
        as_bin(source, shards=1 if files == "bin" else 2)
    done, model = check(source, tmp_path / "grm", lm, head)
    config = model.config
    assert (config.head_type, config.head_hidden_size, config.head_num_layers) == ("mlp", 24, 1)
    assert (config.bos_policy, config.head_dropout) == ("double", 0.2)
    assert done.layout == "GRM authors, MLP head"
    assert done.lm_head == ("its own" if family == "llama" else "tied to the embeddings")
    assert not any(name.startswith("vhead") for name in config.text_config.to_dict())


def test_a_deeper_head(tmp_path):
    lm, head = body(), value_head(layers=2)
    _, model = check(write(tmp_path / "source", lm, named(head)), tmp_path / "grm", lm, head)
    assert model.config.head_num_layers == 2


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2", "mixtral"])
def test_other_families(tmp_path, family):
    lm, head = body(family), value_head()
    check(write(tmp_path / "source", lm, named(head)), tmp_path / "grm", lm, head)


@pytest.mark.parametrize("bias", ["none", "zero", "some"])
def test_trl_value_head(tmp_path, bias):
    lm, head = body(), value_head(layers=0, bias=bias != "none")
    if bias == "zero":
        head.bias.data.zero_()
    done, model = check(write(tmp_path / "source", lm, named(head)), tmp_path / "grm", lm, head)
    assert done.layout == "value head (TRL, LLaMA-Factory), linear head"
    assert model.config.bos_policy == "single"
    # Our linear head has no bias: with one it becomes two units, relu(z) - relu(-z) + b.
    assert model.config.head_type == ("mlp" if bias == "some" else "linear")
    assert model.config.head_hidden_size == 2 or bias != "some"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_llama_factory(tmp_path, suffix):
    lm, head = body(), value_head(layers=0)
    source = write(tmp_path / "source", lm)
    if suffix == ".bin":
        torch.save(named(head), source / "value_head.bin")
    else:
        save_file(named(head), source / "value_head.safetensors")
    check(source, tmp_path / "grm", lm, head)


def classifier(folder, lm, head, auto=AutoModelForSequenceClassification, settings=None):
    """A stock classifier with the body of `lm`."""
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    stock = auto.from_config(config)
    stock.base_model.load_state_dict(lm.base_model.state_dict())
    stock.score.load_state_dict(head.state_dict())
    stock.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    configure(folder, **(settings or {}))
    return stock.eval()


def test_stock_classifier_with_tied_embeddings(tmp_path):
    lm, head = body("llama_tied"), value_head(layers=0, bias=False)
    classifier(tmp_path / "source", lm, head)
    done, model = check(tmp_path / "source", tmp_path / "grm", lm, head)
    assert (done.layout, done.lm_head) == ("classifier, linear head", "tied to the embeddings")
    assert (model.config.head_type, model.config.bos_policy) == ("linear", "single")


@pytest.mark.parametrize("base", ["plain", "authors", "grm"])
def test_stock_classifier_takes_the_text_head_of_its_base(tmp_path, base):
    lm, head = body(), value_head(layers=0, bias=False)
    # What the authors' `-ft` models say of themselves: an MLP. The weights say linear.
    classifier(tmp_path / "source", lm, head, settings={"vhead_layer_type": "mlp", "vhead_num_neurons": 1024})
    with pytest.raises(ValueError, match="no LM head.*--base"):
        convert(tmp_path / "source", tmp_path / "grm")
    assert not (tmp_path / "grm").exists()
    folder = write(tmp_path / "base", lm, named(value_head()) if base == "authors" else None)
    if base == "grm":
        GRMForSequenceClassification.from_base(body(), head_hidden_size=4).save_pretrained(tmp_path / "own")
        folder = tmp_path / "own"
    done, model = check(tmp_path / "source", tmp_path / "grm", lm, head, base=folder)
    assert done.lm_head == f"of the base '{folder}'"
    assert (model.config.head_type, model.config.bos_policy) == ("linear", "double")


def test_embeddings_are_a_text_head_only_where_the_base_ties_them(tmp_path):
    """Here the base has no matrix of its own: its config.json decides, and the source itself is no way out."""
    lm, head = body(), value_head(layers=0, bias=False)
    source = tmp_path / "source"
    classifier(source, lm, head)
    with pytest.raises(ValueError, match=r"no LM head \(\['lm_head.weight'\]\).*not a classifier.*--base"):
        convert(source, tmp_path / "grm", base=source)
    assert os.listdir(tmp_path) == ["source"]
    tied = body("llama_tied")
    tied.save_pretrained(tmp_path / "tied")
    GRMForSequenceClassification.from_base(tied, head_hidden_size=4).save_pretrained(tmp_path / "own")
    for base in ("tied", "own"):
        made = convert(source, tmp_path / f"of {base}", base=tmp_path / base).model
        assert torch.equal(made.lm.lm_head.weight, tied.lm_head.weight)


def test_nothing_is_reported_of_a_text_head_that_the_base_gives(tmp_path, caplog):
    lm, head = body(), value_head(layers=0, bias=False)
    classifier(tmp_path / "source", lm, head)
    lm.save_pretrained(tmp_path / "base")
    caplog.set_level(logging.WARNING, "transformers")
    loading = logging.getLogger("transformers")
    loading.addHandler(caplog.handler)
    try:
        convert(tmp_path / "source", tmp_path / "grm", base=tmp_path / "base")
        assert "MISSING" not in caplog.text
        type(lm).from_pretrained(tmp_path / "source")
        assert "MISSING" in caplog.text  # for others it is
    finally:
        loading.removeHandler(caplog.handler)


def test_token_classifier_has_a_bias(tmp_path):
    lm, head = body("llama_tied"), value_head(layers=0)
    classifier(tmp_path / "source", lm, head, AutoModelForTokenClassification)
    check(tmp_path / "source", tmp_path / "grm", lm, head)


def test_a_config_that_says_tied_about_two_matrices(tmp_path):
    lm, head = body(), value_head()
    source = write(tmp_path / "source", lm, named(head), {"tie_word_embeddings": True})
    _, model = check(source, tmp_path / "grm", lm, head)
    assert model.config.text_config.tie_word_embeddings is False


# ------------------------------------------------------------------------------------------------------------ adapters


RANK, ALPHA, TARGETS = 4, 8, ("q_proj", "v_proj")


def adapter(folder, lm, head, base, layout):
    """A LoRA adapter as four programs write it, and the model with the same update added in float64."""
    torch.manual_seed(3)
    updates = {}
    for name, module in lm.named_modules():
        if name.endswith(TARGETS):
            a, b = torch.randn(RANK, module.in_features) / 4, torch.randn(module.out_features, RANK) / 4
            updates[name] = (a, b)
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if layout == "authors" else "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": list(TARGETS),
        "modules_to_save": ["v_head"] if layout == "peft" else None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    TOKENIZER.save_pretrained(folder)
    if layout == "authors":
        state = {f"{n}.lora_{x}.default.weight": t for n, ab in updates.items() for x, t in zip("AB", ab, strict=True)}
        save_file({**state, **named(head)}, folder / "model.safetensors", metadata={"format": "pt"})
        lm.config.save_pretrained(folder)
    else:
        inner = "base_model.model.pretrained_model." if layout == "peft" else "base_model.model."
        state = {f"{inner}{n}.lora_{x}.weight": t for n, ab in updates.items() for x, t in zip("AB", ab, strict=True)}
        if layout == "peft":
            state.update(named(head, "base_model.model.v_head.summary"))
        elif layout == "trl":
            torch.save(named(head), folder / "pytorch_model.bin")
        else:
            save_file(named(head), folder / "value_head.safetensors")
        save_file(state, folder / "adapter_model.safetensors")
    lm = lm.double()
    for name, (a, b) in updates.items():
        lm.get_submodule(name).weight.data += ALPHA / RANK * (b.double() @ a.double())
    return lm


@pytest.mark.parametrize("layout", ["authors", "peft", "trl", "llama-factory"])
def test_adapters_with_a_value_head(tmp_path, layout):
    pytest.importorskip("peft")
    head = value_head() if layout in ("authors", "peft") else value_head(layers=0)
    base = write(tmp_path / "base", body())
    lm = adapter(tmp_path / "source", body(), head, base, layout)
    done, model = check(tmp_path / "source", tmp_path / "grm", lm, head)
    assert done.layout.endswith("LoRA adapter") and done.lm_head == f"of the base '{base}'"
    assert model.config.bos_policy == ("double" if layout in ("authors", "peft") else "single")
    assert not (tmp_path / "grm" / "adapter_config.json").exists()


def test_adapters_need_a_base_that_fits(tmp_path):
    pytest.importorskip("peft")
    adapter(tmp_path / "source", body(), value_head(), None, "authors")
    with pytest.raises(ValueError, match="does not say which model it was trained on.*--base"):
        convert(tmp_path / "source", tmp_path / "grm")
    write(tmp_path / "base", body(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no place in a reward model.*layers\.1\.self_attn"):
        convert(tmp_path / "source", tmp_path / "grm", base=tmp_path / "base")
    write(tmp_path / "deep", body(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"lacks weights.*layers\.2\.self_attn"):
        convert(tmp_path / "source", tmp_path / "grm", base=tmp_path / "deep")


def test_the_authors_padding_token_gets_a_row(tmp_path):
    """The base lacks the row of `[PAD]`; one of a token that texts have is refused."""
    pytest.importorskip("peft")
    head = value_head()
    base = write(tmp_path / "base", tiny_lm(vocab_size=VOCABULARY), tokenizer=None)
    lm = adapter(tmp_path / "source", tiny_lm(vocab_size=VOCABULARY), head, base, "authors")
    tokenizer = llama_tokenizer(pad_token=None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<new>"] * (VOCABULARY - len(tokenizer)))
    assert len(tokenizer) == VOCABULARY
    tokenizer.add_special_tokens({"pad_token": "[PAD2]"})
    tokenizer.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "grm")
    model, rewards = ours(tmp_path / "grm")
    assert model.config.vocab_size == VOCABULARY + 1
    assert rewards == pytest.approx(theirs(lm, head), rel=1e-6, abs=2e-6)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="<more>"):
        convert(tmp_path / "source", tmp_path / "other")


@pytest.mark.parametrize("way", ["modules_to_save", "save_embedding_layers"])
def test_an_adapter_that_brings_embeddings_of_its_own_tokens(tmp_path, caplog, way):
    """A classifier brings no rows of the LM head."""
    peft = pytest.importorskip("peft")
    base, tokenizer = write(tmp_path / "base", body()), llama_tokenizer()
    tokenizer.add_tokens(["<new>", "<more>"])
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    stock.resize_token_embeddings(len(tokenizer))
    saved = ["embed_tokens"] if way == "modules_to_save" else None
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=saved)
    model = peft.get_peft_model(stock, lora)
    model.save_pretrained(tmp_path / "source", save_embedding_layers=way == "save_embedding_layers" or "auto")
    tokenizer.save_pretrained(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "grm").model
    assert "no rows for the last 2 tokens" in caplog.text
    ids = torch.tensor([[7, VOCABULARY, 91, VOCABULARY + 1]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits.item()
        assert made(input_ids=ids).logits.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(made.lm.lm_head.weight[:VOCABULARY], body().lm_head.weight)
    tokenizer.add_tokens(["<unknown>"])
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"neither its base nor the adapter has a row for: \['<unknown>'\]"):
        convert(tmp_path / "source", tmp_path / "other")


# ------------------------------------------------------------------------------------------------------------ policies


def test_the_bos_policy_of_the_authors(tmp_path):
    """Their code renders the chat, then tokenises the text with special tokens."""
    source = write(tmp_path / "source", body(), named(value_head()))
    model = convert(source, tmp_path / "grm").model
    original = TOKENIZER(TOKENIZER.apply_chat_template(CHAT, tokenize=False))["input_ids"]
    assert original[:2] == [TOKENIZER.bos_token_id] * 2
    assert Encoder.from_config(TOKENIZER, model.config).encode_chat(CHAT).ids == original
    single = convert(source, tmp_path / "single", bos_policy="single").model
    assert Encoder.from_config(TOKENIZER, single.config).encode_chat(CHAT).ids == original[1:]


def test_the_maximum_length_is_the_tokenizers(tmp_path):
    source = write(tmp_path / "source", body(), named(value_head()), tokenizer=None)
    tokenizer = llama_tokenizer()
    tokenizer.model_max_length = 48
    tokenizer.save_pretrained(source)
    assert convert(source, tmp_path / "a").model.config.max_sequence_length == 48
    assert convert(source, tmp_path / "b", max_length=32).model.config.max_sequence_length == 32
    TOKENIZER.save_pretrained(source)
    assert convert(source, tmp_path / "c").model.config.max_sequence_length is None
    for length in (0, -5):
        with pytest.raises(ValueError, match=f"`max_length` is {length}; .* at least 1"):
            convert(source, tmp_path / "d", max_length=length)


def test_without_tokenizer(tmp_path):
    source = write(tmp_path / "source", body(), named(value_head()), tokenizer=None)
    convert(source, tmp_path / "grm")
    assert not (tmp_path / "grm" / "golden_rows.json").exists()
    assert ours(tmp_path / "grm")[1] == pytest.approx(theirs(body(), value_head()), rel=1e-6, abs=2e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


def spoil(change):
    """A change of the tensors of the authors' layout."""

    def apply(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})

    return apply


def second_head(folder):
    save_file(
        {**named(value_head()), "v_head.summary.0.bias": torch.ones(24)},
        folder / "value_head.safetensors",
    )


REFUSALS = {
    "no head": (spoil(lambda s: [s.pop(k) for k in list(s) if "v_head" in k]), "no reward head"),
    "left over": (spoil(lambda s: s.update(extra=torch.zeros(2))), r"no place in a reward model: \['extra'\]"),
    "other value head": (spoil(lambda s: s.update({"v_head.linear_k.weight": torch.zeros(2)})), "linear_k"),
    "missing body": (
        spoil(lambda s: s.pop("model.layers.0.mlp.up_proj.weight")),
        r"lacks weights.*layers\.0\.mlp\.up_proj",
    ),
    "another shape": (
        spoil(lambda s: s.update({"model.norm.weight": torch.ones(31)})),
        r"model\.norm\.weight \(31,\), not \(32,\)",
    ),
    "missing in head": (spoil(lambda s: s.pop("v_head.summary.0.weight")), "no v_head.summary.0.weight"),
    "gap in head": (
        spoil(lambda s: s.update({k.replace("y.2", "y.4"): s.pop(k) for k in list(s) if "summary.2" in k})),
        "an unknown form",
    ),
    "another activation": (
        lambda f: configure(f, vhead_activation="gelu"),
        r"has 'gelu' between two layers \(`vhead_activation` in config.json\); the head of a GRM has ReLU",
    ),
    "layers of an unknown class": (
        spoil(lambda s: s.update({k.replace("v_head.summary", "score"): s.pop(k) for k in list(s) if "v_head" in k})),
        r"score\.0\.bias.*nothing says what stands between two.*name one of Qwen2ForRewardModel",
    ),
    "two heads": (spoil(lambda s: s.update({"score.weight": torch.zeros(1, 32)})), "more than one reward head"),
    "two outputs": (
        spoil(lambda s: s.update({"v_head.summary.2.weight": torch.zeros(2, 24)})),
        "gives 2 numbers",
    ),
    "wrong width": (
        spoil(lambda s: s.update({"v_head.summary.0.weight": torch.zeros(24, 16)})),
        "reads 16 numbers, the language model gives 32",
    ),
    "two versions": (second_head, r"v_head\.summary\.0\.bias twice"),
    "own code": (lambda f: configure(f, model_type="internlm2"), "code that comes with a model is never run"),
    "quantised": (lambda f: configure(f, quantization_config={"quant_method": "bitsandbytes"}), "is quantised"),
    "no config": (lambda f: (f / "config.json").unlink(), "neither config.json nor adapter_config.json"),
    "torn": (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 40), "is incomplete"),
    "torn pickle": (lambda f: (f / "value_head.bin").write_bytes(b"\x80"), "is torn"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_and_nothing_left(tmp_path, case):
    change, words = REFUSALS[case]
    change(write(tmp_path / "source", body(), named(value_head())))
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "source", tmp_path / "grm")
    assert os.listdir(tmp_path) == ["source"]


def test_a_grm_is_not_converted(tmp_path):
    GRMForSequenceClassification.from_base(body(), head_hidden_size=4).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="already"):
        convert(tmp_path / "source", tmp_path / "grm")


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, monkeypatch):
    source = write(tmp_path / "source", body(), named(value_head()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(source, tmp_path / "full")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, "save_golden", stop)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "grm")
    assert sorted(os.listdir(tmp_path)) == ["full", "source"]
    monkeypatch.undo()
    (tmp_path / "grm").mkdir()  # empty: fine
    convert(source, tmp_path / "grm")
    assert ours(tmp_path / "grm")


def test_where_the_output_may_be(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_folder(tmp_path / "link") as out:
        (out / "file").touch()
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "empty") == ["file"]
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"'\.' is the working directory"), new_folder("."):
        raise AssertionError("before the work")
    with new_folder("new") as out:
        (out / "file").touch()
    assert os.listdir("new") == ["file"] and sorted(os.listdir(tmp_path)) == ["empty", "here", "link"]


def test_no_code_of_the_source_is_run(tmp_path):
    """Neither the code files beside the weights, nor what a pickle would call."""
    trace = tmp_path / "trace"
    source = write(tmp_path / "source", body(), named(value_head()))
    configure(source, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (source / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    convert(source, tmp_path / "grm")

    class Evil:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save({"v_head.summary.0.weight": Evil()}, source / "value_head.bin")
    with pytest.raises(ValueError, match="holds more than weights"):
        convert(source, tmp_path / "other")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.safetensors", "value_head.bin", "pytorch_model.bin"], ["value_head.bin"]),
        (["model.safetensors", "value_head.safetensors", "value_head.bin"], []),
        (["adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (["adapter_model.bin", "value_head.bin"], ["adapter_model.bin", "value_head.bin"]),
        (["pytorch_model-00001-of-00001.bin"], ["pytorch_model-00001-of-00001.bin"]),
    ],
)
def test_a_pickle_is_downloaded_only_without_its_safetensors_twin(tmp_path, monkeypatch, there, fetched):
    def download(repo_id, revision, allow_patterns):
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(MODULE, "snapshot_download", download)
    MODULE._local("some/model", None)
    safe = [name for name in there if name.endswith(".safetensors")]
    assert sorted(os.listdir(tmp_path)) == sorted(safe + fetched)


# ------------------------------------------------------------------------------------------------------------- command


def test_command(tmp_path, capsys):
    source = write(tmp_path / "source", body(), named(value_head()), tokenizer=None)
    chatml_tokenizer().save_pretrained(source)
    output = str(tmp_path / "grm")
    assert main(["convert", str(source), output, "--bos-policy", "single", "--max-length", "32"]) == 0
    out = capsys.readouterr().out
    assert "GRM authors, MLP head" in out and "LM head: its own" in out and "bos_policy: single" in out
    assert main(["verify", output]) == 0
    assert main(["convert", str(source), output]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    shutil.rmtree(source)
    assert main(["convert", str(source), str(tmp_path / "x")]) == 1


def test_a_source_that_is_not_there_is_called_that(tmp_path):
    with pytest.raises(ValueError, match="There is no folder '.*absent'"):
        convert(tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()
