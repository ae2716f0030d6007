"""What the common tests of transformers and the reward-trainer tests of TRL ask of every model, asked of this one.
Where it differs on purpose, the test is named in docs/differences.md."""

import ast
import inspect
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from tiny import assert_same, pad, score, texts, tiny_grm, tiny_lm
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from grm_hf import GRMConfig, GRMForSequenceClassification


ROOT = Path(__file__).resolve().parents[1]
SOME = ("llama", "gpt2", "gemma2", "qwen3", "qwen3_moe")
load = GRMForSequenceClassification.from_pretrained


def batch():
    ids, mask = pad(texts(), left=False)
    return dict(input_ids=ids, attention_mask=mask)


# ------------------------------------------------------------------------------------------------------- as any model


@pytest.mark.parametrize("family", SOME)
def test_a_tuple_holds_what_the_output_holds(family):
    model, options = tiny_grm(family, attn_implementation="eager"), dict(output_hidden_states=True)
    for more in ({}, dict(output_attentions=True), dict(return_lm_logits=True), dict(labels=torch.zeros(4))):
        with torch.no_grad():
            output = model(**batch(), **options, **more)
            as_tuple = model(**batch(), **options, **more, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output.to_tuple())
        flat = [torch.utils._pytree.tree_leaves(item) for item in (as_tuple, output.to_tuple())]
        assert len(flat[0]) == len(flat[1]) > 3
        for ours, theirs in zip(*flat, strict=True):
            assert torch.equal(ours, theirs)
    model.config.return_dict = False
    assert isinstance(model(**batch()), tuple)


@pytest.mark.parametrize("family", SOME)
def test_gradients_reach_every_hidden_state_and_attention(family):
    model = tiny_grm(family, attn_implementation="eager")
    out = model(**batch(), output_hidden_states=True, output_attentions=True)
    inner = [*out.hidden_states[:-1], *out.attentions]
    for tensor in inner:
        tensor.retain_grad()
    out.logits.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in inner)


@pytest.mark.parametrize("family", SOME)
def test_attention_implementations_agree(family):
    if not type(tiny_lm(family))._supports_sdpa:
        pytest.skip("this transformers has one attention for this family")
    found = [score(tiny_grm(family, attn_implementation=name), **renamed(batch())) for name in ("eager", "sdpa")]
    assert_same(*found, tolerance=1e-5)


def renamed(inputs):
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}


@pytest.mark.parametrize("given", ["eager", {"": "sdpa", "text_config": "eager"}])
def test_attention_is_set_for_the_text_model_too(given, tmp_path):
    tiny_grm().save_pretrained(tmp_path)
    model = load(tmp_path, attn_implementation=given)
    assert model.lm.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.config is model.lm.config
    model.set_attn_implementation("sdpa")
    assert model.lm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", SOME)
def test_embeddings_are_got_set_and_resized(family):
    model = tiny_grm(family)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    assert model.get_output_embeddings() is model.lm.get_output_embeddings()
    new = torch.nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new is model.lm.get_input_embeddings()
    model.resize_token_embeddings(90, mean_resizing=False)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 90
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"] % 90
    assert model(**inputs, return_lm_logits=True).lm_logits.shape[-1] == 90


@pytest.mark.parametrize("family", SOME)
def test_seeds_and_calls_repeat(family):
    model = tiny_grm(family)
    assert torch.equal(score(model, **renamed(batch())), score(model, **renamed(batch())))
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        made.append(AutoModelForSequenceClassification.from_config(model.config).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not any(value.isnan().any() for value in made[0].values())


def test_signature_starts_as_that_of_any_model():
    names = list(inspect.signature(GRMForSequenceClassification.forward).parameters)
    assert names[:4] == ["self", "input_ids", "attention_mask", "position_ids"]
    assert GRMForSequenceClassification.main_input_name == "input_ids" and tiny_grm().can_generate()
    assert {"labels", "inputs_embeds", "use_cache", "cache", "past_key_values", "logits_to_keep"} <= set(names)


@pytest.mark.parametrize("how", ["safetensors", "sharded"])
def test_weights_load_from_whatever_save_pretrained_writes(how, tmp_path):
    model = tiny_grm("llama_tied")
    model.save_pretrained(tmp_path, max_shard_size="20kB" if how == "sharded" else "5GB")
    loaded = load(tmp_path)
    theirs = dict(model.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in loaded.named_parameters())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tiny_grm("llama_tied").load_state_dict(state)


def test_a_step_of_training_changes_what_it_should():
    model = tiny_grm().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(**batch(), labels=torch.ones(4)).loss
    first.backward()
    optimizer.step()
    assert model(**batch(), labels=torch.ones(4)).loss < first
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"lm.lm_head.weight"}


def test_peft_sees_the_model_as_it_sees_the_bare_one():
    peft = pytest.importorskip("peft")
    found = []
    for model in (tiny_grm("llama_tied"), tiny_lm("llama_tied")):
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
        found.append(sorted(name.split("lm.")[-1] for name, _ in adapted.named_parameters() if "lora_" in name))
        found[-1] = [name.removeprefix("base_model.model.") for name in found[-1] if "score" not in name]
        assert model.config.tie_word_embeddings is True
    assert found[0] == found[1] and len(found[0]) == 28


# -------------------------------------------------------------------------------- different on purpose, as documented


def test_difference_one_label(tmp_path):
    for refused in (dict(num_labels=2), dict(id2label={0: "a", 1: "b"})):
        with pytest.raises(ValueError, match="one number, found 2 labels"):
            GRMConfig(**refused)
    tiny_lm("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one number, found 2 labels"):
        GRMForSequenceClassification.from_base(tmp_path, num_labels=2)
    GRMForSequenceClassification.from_base(tmp_path, num_labels=1)


def test_difference_reward_head_in_float32(tmp_path):
    tiny_grm().save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.lm.parameters()} == {torch.bfloat16} == {model.dtype}
    assert {p.dtype for p in model.score.parameters()} == {torch.float32} == {model(**batch()).logits.dtype}


def test_difference_lm_head_has_no_gradient_under_labels():
    model = tiny_grm()
    model(**batch(), labels=torch.zeros(4)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["lm.lm_head.weight"]
    tied = tiny_grm("llama_tied")
    tied(**batch(), labels=torch.zeros(4)).loss.backward()
    assert all(p.grad is not None for p in tied.parameters())


def test_difference_missing_and_mismatched_weights_are_refused(tmp_path):
    tiny_grm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another shape"):
        load(tmp_path, vocab_size=99, ignore_mismatched_sizes=True)
    stock = LlamaForSequenceClassification(tiny_lm().config)
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="not a reward model of type 'grm'"):
        load(tmp_path / "stock")


def test_difference_a_classifier_is_no_base(tmp_path):
    LlamaForSequenceClassification(tiny_lm().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a classifier"):
        GRMForSequenceClassification.from_base(tmp_path)


def test_difference_a_batch_without_mask_may_be_refused():
    model = tiny_grm(pad_token_id=None)
    with pytest.raises(ValueError, match="without `attention_mask`"):
        model(batch()["input_ids"])
    assert model(batch()["input_ids"][:1]).logits.shape == (1, 1)


def test_difference_no_cache_unless_asked_for():
    model = tiny_grm()
    assert "cache" not in model(**batch()) and "cache" not in model.model(**batch(), use_cache=False)
    assert list(model(**batch(), use_cache=True))[-1] in ("cache", "past_key_values")


def test_difference_both_names_of_the_cache_are_taken():
    model, ids = tiny_grm(), torch.tensor([[5, 6, 7]])
    for name in ("cache", "past_key_values"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            begun = model(ids[:, :2], use_cache=True)
            held = next(value for key, value in begun.items() if key in ("cache", "past_key_values"))
            out = model(ids[:, 2:], **{name: held}, attention_mask=torch.ones(1, 3))
        assert_same(out.logits, model(ids).logits, tolerance=1e-5)


def test_difference_a_base_brings_no_code(tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for trust in (None, True):
        with pytest.raises(ValueError, match="brings modelling code of its own"):
            GRMForSequenceClassification.from_base(tmp_path, trust_remote_code=trust)


def test_difference_a_packed_row_needs_read_index():
    with pytest.raises(ValueError, match="`read_index`"):
        tiny_grm()(torch.arange(3, 9)[None], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_difference_generation_is_the_bases():
    model = tiny_grm()
    model.generate(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2), max_new_tokens=1)
    assert model.lm.generation_config is model.generation_config


def test_every_difference_is_documented_and_tested():
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", page)
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    here = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert sorted(named) == sorted(name for name in here if name.startswith("test_difference_"))
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) == len(named), "one line a difference"
