"""Adapters of every kind: what they aim at, what their base is, merging, going on from one, the reference of dpo; and
what a run begins with, by id or folder."""

import json
import math
import re

import pytest
import torch
from tiny import chatml_tokenizer, tiny_lm
from trainers import (
    TOKENIZER,
    base,
    grm,
    logged,
    lora,
    pairs,
    scores_here,
    settings,
    trainer,
)


pytest.importorskip("trl", reason="needs the extra `train`")

import peft  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMRewardTrainer, GRMScorer  # noqa: E402
from grm_hf.configuration_grm import ADAPTER_POLICIES as FILE  # noqa: E402
from grm_hf.configuration_grm import POLICIES  # noqa: E402
from grm_hf.scoring import verify  # noqa: E402
from grm_hf.training import merge_adapter  # noqa: E402


pytestmark = pytest.mark.trainer

FAST = {"max_steps": 2, "alpha": 0.5, "learning_rate": 1e-1}
TARGETS = ["q_proj", "down_proj"]


def lm_logits(model):
    ids = torch.tensor([[3, 5, 100, 7, 8, 9, 200]])
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), return_lm_logits=True).lm_logits


def fit(folder, model=None, config=None, **kwargs):
    run = trainer(folder, model, peft_config=config, **{**FAST, **kwargs})
    run.train()
    run.save_model()
    return run


def assert_merges(run, folder):
    """Adapter by its folder, merged model, merged model by its folder: rewards and LM logits of the live one."""
    found = [
        GRMForSequenceClassification.from_pretrained(run.args.output_dir),
        merge_adapter(run.args.output_dir, folder),
        GRMForSequenceClassification.from_pretrained(folder),
    ]
    for model in found:
        assert scores_here(model) == pytest.approx(scores_here(run.model), abs=1e-5)
        torch.testing.assert_close(lm_logits(model), lm_logits(run.model), rtol=1e-5, atol=1e-5)
    assert not hasattr(found[1], "peft_config") and found[1].name_or_path == str(folder)
    verify(str(folder))


METHODS = {
    "LoRA by default": lambda: LoraConfig(),
    "without task_type": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "DoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "pissa": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "IA3 by default": lambda: peft.IA3Config(),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "OFT": lambda: peft.OFTConfig(target_modules=TARGETS, r=0, oft_block_size=4),
    "VB-LoRA": lambda: peft.VBLoRAConfig(vector_length=8, num_vectors=8, topk=1, target_modules=["q_proj", "v_proj"]),
    "LNTuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_loads_and_merges(tmp_path, method):
    config = METHODS[method]()
    before = json.dumps(config.to_dict(), default=str, sort_keys=True)
    run = fit(tmp_path / "run", config=config)
    assert json.dumps(config.to_dict(), default=str, sort_keys=True) == before  # the user's object is left alone
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and "score" in saved["modules_to_save"]
    assert_merges(run, tmp_path / "merged")


# What peft is told about the two ends of the model, tied or not.
ENDS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 100]},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("what", ENDS)
def test_adapters_on_embeddings_and_head_merge_exactly(tmp_path, what, tie):
    run = fit(tmp_path / "run", grm(tie_word_embeddings=tie), LoraConfig(r=4, **ENDS[what]))
    assert_merges(run, tmp_path / "merged")


def policies(model):
    return {name: getattr(model.config, name) for name in POLICIES}


def test_how_an_adapter_reads_and_scales_is_saved_with_it(tmp_path):
    """The base does not know what training sets: `max_sequence_length`, mean and standard deviation of the reward."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run = fit(tmp_path / "run", config=lora(), evaluation=pairs(8, seed=3), max_length=48, **steps, **best)
    config = run.model.get_base_model().config
    config.reward_temperature, config.overlength = 1.7, "error"
    checkpoint = json.loads((tmp_path / "run" / f"checkpoint-{run.state.best_global_step}" / FILE).read_text())
    assert config.reward_std == checkpoint["reward_std"] not in (0.0, 1.0)
    run.save_model()
    expected = policies(run.model)
    assert expected["max_sequence_length"] == 48 and expected["reward_mean"] == checkpoint["reward_mean"] != 0.0
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path / "run")
    assert policies(loaded) == expected
    assert GRMScorer(loaded, TOKENIZER).probability(1.0, 0.0) == pytest.approx(1 / (1 + math.exp(-1 / 1.7)))
    assert policies(AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")) == expected
    assert policies(merge_adapter(tmp_path / "run", tmp_path / "merged")) == expected
    loaded.save_pretrained(tmp_path / "again")
    assert policies(GRMForSequenceClassification.from_pretrained(tmp_path / "again")) == expected

    (tmp_path / "run" / FILE).write_text('{"bos_pol')
    with pytest.raises(ValueError, match=f"{FILE}' cannot be read .* Copy it again"):
        GRMForSequenceClassification.from_pretrained(tmp_path / "run")
    (tmp_path / "run" / FILE).unlink()  # an adapter of an earlier release, or one that peft saved
    assert policies(GRMForSequenceClassification.from_pretrained(tmp_path / "run"))["reward_temperature"] == 1.0


def test_what_cannot_be_merged_leaves_nothing(tmp_path, monkeypatch):
    run = fit(tmp_path / "run", config=lora())
    from grm_hf.hub import merge

    calls = []
    original = merge._outputs
    monkeypatch.setattr(merge, "_outputs", lambda m: [x + len(calls) for x in (calls.append(0), *original(m))[1:]])
    with pytest.raises(ValueError, match="has other rewards .they differ by .*Nothing was written"):
        merge_adapter(run.args.output_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not an empty folder"):
        merge_adapter(run.args.output_dir, run.args.output_dir)


def test_what_bfloat16_would_round_away_is_merged_in_float32(tmp_path, monkeypatch, caplog):
    run = fit(tmp_path / "run", config=lora())
    from grm_hf.hub import merge

    seen = []
    original = merge._outputs

    def rounded(model):
        """As if rewards of a merged model in another dtype than float32 were other ones."""
        seen.append(model.dtype)
        off = model.dtype != torch.float32 and len(seen) > 1
        return [x + off for x in original(model)]

    monkeypatch.setattr(merge, "_outputs", rounded)
    adapter = run.args.output_dir
    with pytest.raises(ValueError, match="has other rewards"):
        merge_adapter(adapter, tmp_path / "asked", dtype=torch.bfloat16)
    assert not (tmp_path / "asked").exists()
    seen.clear()
    kind = merge.GRMForSequenceClassification
    load = kind.from_pretrained.__func__

    def stored(cls, *args, dtype="auto", **kwargs):
        return load(cls, *args, dtype=torch.bfloat16 if dtype == "auto" else dtype, **kwargs)

    monkeypatch.setattr(kind, "from_pretrained", classmethod(stored))
    merged = merge_adapter(adapter, tmp_path / "merged")
    assert merged.dtype == torch.float32 and "The merged model is in float32." in caplog.text
    monkeypatch.undo()
    verify(tmp_path / "merged")


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(tmp_path, kind):
    config = getattr(peft, kind)(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="virtual tokens"):
        trainer(tmp_path, peft_config=config)
    if kind == "PromptTuningConfig":
        with pytest.raises(ValueError, match="virtual tokens"):
            trainer(tmp_path, get_peft_model(grm(), config))


def test_a_peft_model_whose_head_is_frozen_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not train the reward head"):
        trainer(tmp_path, get_peft_model(grm(), LoraConfig(target_modules=TARGETS)))


def adapted(model):
    return sorted({name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A" in name})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_targets_are_those_that_peft_knows_for_the_body(tmp_path, family):
    lm = tiny_lm(family, vocab_size=len(TOKENIZER))
    expected = adapted(get_peft_model(tiny_lm(family, vocab_size=len(TOKENIZER)), LoraConfig()))
    run = trainer(tmp_path, GRMForSequenceClassification.from_base(lm), peft_config=LoraConfig(), max_length=60)
    assert [name.replace("base_model.model.lm.", "base_model.model.") for name in adapted(run.model)] == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_get_adapters_as_on_the_bare_model(tmp_path, family):
    make = lambda: tiny_lm(family, vocab_size=len(TOKENIZER))  # noqa: E731
    expected = adapted(get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear")))
    run = fit(tmp_path / "run", GRMForSequenceClassification.from_base(make()), lora(), max_length=60, max_steps=1)
    found = [name.replace("base_model.model.lm.", "base_model.model.") for name in adapted(run.model)]
    assert found == [name for name in expected if "lm_head" not in name]
    assert_merges(run, tmp_path / "merged")


# -------------------------------------------------------------------------------------------------- going on, starting


@pytest.mark.parametrize("how", ["folder", "loaded", "peft"])
def test_training_goes_on_from_an_adapter(tmp_path, how):
    first = fit(tmp_path / "first", config=lora())
    folder = tmp_path / "first"
    start = scores_here(first.model)
    model = {
        "folder": lambda: folder,
        "loaded": lambda: GRMForSequenceClassification.from_pretrained(folder),
        "peft": lambda: PeftModel.from_pretrained(
            GRMForSequenceClassification.from_pretrained(folder / "base"), folder, is_trainable=True
        ),
    }[how]()
    run = trainer(tmp_path / "second", model, **FAST)
    assert scores_here(run.model) == pytest.approx(start, abs=1e-6)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".lora_B." in name for name in moved) and any(".score." in name for name in moved)
    assert not [name for name in moved if ".lora_" not in name and ".score." not in name]
    run.save_model()
    assert_merges(run, tmp_path / "merged")
    other = trainer(tmp_path / "other", folder, **FAST)
    other.train()
    assert logged(run, "loss") == pytest.approx(logged(other, "loss"), rel=1e-5)


def test_a_base_that_was_moved_is_named(tmp_path, capsys):
    """A run's adapter names `base` by its path; a Hub client would call that no valid id."""
    from grm_hf import cli

    folder = tmp_path / "run"
    fit(folder, config=lora())
    (folder / "base").rename(tmp_path / "elsewhere")
    pairs().to_json(tmp_path / "pairs.jsonl")
    said = rf"says that it was trained on '{folder / 'base'}', and there is no such folder\. Put it there, or write"
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path / "second", folder, **FAST)
    for words in (
        ["merge", folder, tmp_path / "merged"],
        ["push", folder, "ann/name"],
        ["eval", folder, "--data", tmp_path / "pairs.jsonl"],
        ["expo", folder, folder, tmp_path / "expo", "--a", "0.5"],
    ):
        assert cli.main([*map(str, words)]) == 1
        assert re.search(said, capsys.readouterr().err), words
    assert not (tmp_path / "merged").exists()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it was trained on"):
        merge_adapter(folder, tmp_path / "merged")


def with_chat_tokens(folder):
    """A tokenizer folder whose template uses tokens of its own."""
    tokenizer = chatml_tokenizer(special=["<|im_start|>", "<|role|>", "<|/role|>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|role|>")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_template_with_new_tokens_and_an_adapter(tmp_path, tie):
    template = with_chat_tokens(tmp_path / "template")
    run = GRMRewardTrainer(
        model=grm(tie_word_embeddings=tie),
        args=settings(tmp_path / "run", chat_template_path=template, **FAST),
        train_dataset=pairs(),
        processing_class=chatml_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )
    size = run.model.get_input_embeddings().weight.shape[0]
    assert size > len(TOKENIZER) and run.args.chat_template_path == template
    assert "<|role|>" in run.processing_class.decode(run.train_dataset[0]["chosen_ids"])
    run.train()
    run.save_model()
    assert GRMForSequenceClassification.from_pretrained(tmp_path / "run" / "base").config.vocab_size == size
    assert_merges(run, tmp_path / "merged")


@pytest.mark.parametrize("start", ["base", "grm"])
def test_hub_arguments_reach_configuration_weights_and_tokenizer(tmp_path, start, monkeypatch):
    """A repository with two folders: the other one, at the top, has other weights and another template."""
    other = chatml_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_start|>", "other")
    make = base if start == "base" else grm
    for place, seed, tokenizer in ((tmp_path / "repo", 0, other), (tmp_path / "repo" / "v2", 1, TOKENIZER)):
        make(seed).save_pretrained(place)
        tokenizer.save_pretrained(place)
    run = GRMRewardTrainer(
        model=tmp_path / "repo",
        args=settings(tmp_path / "run", model_init_kwargs={"subfolder": "v2"}, **FAST),
        train_dataset=pairs(),
        peft_config=lora(),
    )
    right = (make(1) if start == "base" else grm(1).lm).state_dict()
    found = {name.replace(".base_layer", ""): p for name, p in run.model.get_base_model().lm.state_dict().items()}
    assert all(torch.equal(found[name], right[name]) for name in right)
    assert run.processing_class.chat_template == TOKENIZER.chat_template
    run.train()
    run.save_model()
    assert_merges(run, tmp_path / "merged")  # the base that the adapter names is that of the subfolder


@pytest.mark.parametrize("name", ["revision", "cache_dir", "token", "subfolder", "gguf_file"])
def test_each_hub_argument_is_passed_on(name, monkeypatch, tmp_path):
    from grm_hf.training import loading

    seen = {}

    def record(what, result):
        def call(path, **kwargs):
            seen[what] = kwargs
            return result

        return call

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", record("configuration", base().config))
    monkeypatch.setattr(loading.GRMForSequenceClassification, "from_base", record("weights", grm()))
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", record("tokenizer", TOKENIZER))
    monkeypatch.setattr(loading, "find_adapter_config_file", lambda path, **kwargs: seen.update(adapter=kwargs))
    args = settings(tmp_path, model_init_kwargs={name: "x"})
    loading.load_model("somewhere", args)
    loading.load_tokenizer("somewhere", args, loading.hub_arguments(args.model_init_kwargs))
    assert {what: kwargs.get(name) for what, kwargs in seen.items()} == dict.fromkeys(seen, "x")
    assert {"configuration", "weights", "tokenizer"} <= set(seen)


# ---------------------------------------------------------------------------------------------------- reference of dpo


REFERENCES = {
    "LoRA": (lambda: LoraConfig(r=4, target_modules=TARGETS), "adapter_off"),
    "pissa": (lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"), "precompute"),
    "olora": (lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"), "precompute"),
    "bias": (lambda: LoraConfig(r=4, target_modules=TARGETS, bias="all"), "precompute"),
}


@pytest.mark.parametrize("what", REFERENCES)
def test_the_reference_is_the_start(tmp_path, what, caplog):
    config, expected = REFERENCES[what]
    model = lambda: grm(attention_bias=True)  # noqa: E731
    run = trainer(tmp_path / "a", model(), peft_config=config(), **{**FAST, "regularizer": "dpo", "max_steps": 3})
    assert run._reference == expected and ("computed beforehand" in caplog.text) == (expected == "precompute")
    start = scores_here(run.model)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    before = run.response_logps(run.model, batch)
    run.train()
    assert logged(run, "text_loss")[0] == pytest.approx(0.693147, abs=2e-6)
    assert scores_here(run.model) != pytest.approx(start, abs=1e-4)
    torch.testing.assert_close(run._reference_logps(run.model, batch), before, rtol=1e-6, atol=1e-5)
    if expected == "precompute":
        with pytest.raises(ValueError, match="is not this model at the start of training"):
            trainer(tmp_path / "b", model(), peft_config=config(), regularizer="dpo", reference="adapter_off")


def test_the_reference_of_a_trained_adapter_is_that_adapter(tmp_path):
    fit(tmp_path / "first", config=lora())
    run = trainer(tmp_path / "second", tmp_path / "first", **{**FAST, "regularizer": "dpo"})
    assert run._reference == "precompute"
    run.train()
    assert logged(run, "text_loss")[0] == pytest.approx(0.693147, abs=2e-6)


@pytest.mark.parametrize("config", [None, lora(lora_dropout=0.5)], ids=["full", "lora"])
def test_the_reference_is_never_noisy(tmp_path, config):
    model = GRMForSequenceClassification.from_base(
        tiny_lm("opt", vocab_size=len(TOKENIZER), dropout=0.5, max_position_embeddings=128)
    )
    common = {"regularizer": "dpo", "disable_dropout": False, "alpha": 0.5, "max_length": 100}
    run = trainer(tmp_path, model, peft_config=config, reference=None if config else "model", **common)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    run.model.train()
    live = [run.response_logps(run.model, batch) for _ in range(2)]
    found = [run._reference_logps(run.model, batch) for _ in range(2)]
    assert not torch.equal(*live) and torch.equal(*found)
    run.model.eval()
    torch.testing.assert_close(found[0], run.response_logps(run.model, batch))


def test_golden_rows_see_the_lm_head(tmp_path):
    """An error in the LM head alone leaves every reward as it is."""
    run = fit(tmp_path / "run", grm(tie_word_embeddings=False))
    verify(str(tmp_path / "run"))
    row = json.loads((tmp_path / "run" / "golden_rows.json").read_text())["rows"][0]
    run.model.eval()
    logps = run.model(torch.tensor([row["ids"]]), return_lm_logits=True).lm_logits[0].log_softmax(-1)
    expected = sum(logps[i - 1, row["ids"][i]].item() for i in range(max(row["start"], 1), len(row["ids"])))
    assert row["text_logp"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        run.model.lm.lm_head.weight += 0.1 * torch.randn_like(run.model.lm.lm_head.weight)
    golden = (tmp_path / "run" / "golden_rows.json").read_text()
    run.model.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "golden_rows.json").write_text(golden)
    with pytest.raises(ValueError, match="rows .0, 1, 2, 3. of 4 do not hold(.|\n)*log-probability of the response"):
        verify(str(tmp_path / "run"))
