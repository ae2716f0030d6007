"""The model: every family's language model survives untouched, and a text has one reward, whatever it is batched with.

Expected rewards are computed from the base alone: its own forward on the unpadded text, then the head written out as
matrix products.
"""

import copy
import inspect
import pickle
import shutil

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import read_by_ppo
from tiny import (
    BFLOAT16,
    FAMILIES,
    FLOAT32,
    LENGTHS,
    ODD_FAMILIES,
    alone,
    assert_same,
    byte_tokenizer,
    multimodal,
    pad,
    score,
    texts,
    tiny_grm,
    tiny_lm,
)
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    pipeline,
)

from grm_hf import GRMConfig, GRMForSequenceClassification
from grm_hf.heads_grm import GRMLinearHead, GRMMLPHead
from grm_hf.modeling_grm import CACHE, CACHE_NAMES, GRMOutput


HEADS = ("mlp", "linear", "bnrm")


def head_by_hand(model, hidden):
    weights = {name: tensor.double() for name, tensor in model.score.state_dict().items()}
    hidden = hidden.double()
    if "weight" in weights:
        return linear(hidden, weights["weight"]).squeeze(-1)
    for i in range(sum(name.startswith("dense.") for name in weights) // 2):
        hidden = linear(hidden, weights[f"dense.{i}.weight"], weights[f"dense.{i}.bias"]).clamp(min=0)
    out = weights["out.weight"].clamp(min=0) if "out.shapes" in weights else weights["out.weight"]
    return linear(hidden, out, weights["out.bias"]).squeeze(-1)


def expected(lm, model, rows):
    """The rewards of texts, from the base's own forward."""
    with torch.no_grad():
        last = [lm(row[None], output_hidden_states=True).hidden_states[-1][0, -1] for row in rows]
        return head_by_hand(model, torch.stack(last))


# ----------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_the_base(family):
    theirs, ours = tiny_lm(family), tiny_grm(family)
    ids, mask = pad(texts(), left=False)
    with torch.no_grad():
        base = theirs(ids, attention_mask=mask, output_hidden_states=True)
        out = ours(ids, attention_mask=mask, return_lm_logits=True, output_hidden_states=True)
        kept = ours(ids, attention_mask=mask, return_lm_logits=True, logits_to_keep=2).lm_logits
        real = mask.bool()
        torch.testing.assert_close(out.lm_logits[real], base.logits[real], rtol=0, atol=1e-6)
        torch.testing.assert_close(kept, out.lm_logits[:, -2:], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.lm_logits(base.hidden_states[-1]), base.logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(out.hidden_states[-1][real], base.hidden_states[-1][real], rtol=0, atol=1e-6)
    assert base.logits[real].abs().max() > 0.3, "the logits are too small for a lost scale to show"
    assert ours.lm_head_is_exact()
    options = dict(attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(texts()[0][None], **options), theirs.generate(texts()[0][None], **options))


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_text_has_one_reward(family, head_type):
    model, rows = tiny_grm(family, head_type), texts()
    wanted = expected(tiny_lm(family), model, rows)
    assert wanted.std() > 0.01, "rewards too close to tell apart"

    tolerance = 2 * FLOAT32  # Gemma 3 rounds more often than others
    assert_same(alone(model, rows), wanted, tolerance)
    for side in (True, False, [True, False, False, True]):
        ids, mask = pad(rows, side, width=12)
        for dtype in (torch.bool, torch.int64, torch.float32):
            assert_same(score(model, ids, mask.to(dtype)), wanted, tolerance)
        assert_same(score(model, ids, mask, return_lm_logits=True), wanted, tolerance)
        assert_same(score(model, ids, mask, output_hidden_states=True, use_cache=True), wanted, tolerance)
    assert_same(score(model, ids[[2, 0]], mask[[2, 0]]), wanted[[2, 0]], tolerance)


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_model(family, head_type, tmp_path):
    model = tiny_grm(family, head_type)
    model.save_pretrained(tmp_path)
    loaded, info = GRMForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids, mask = pad(texts(), left=True)
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask, return_lm_logits=True) for m in (loaded, model))
    assert_same(ours.logits, theirs.logits)
    assert_same(ours.lm_logits, theirs.lm_logits)
    for config in (loaded.config, model.config):  # what loading itself writes: the path, the dtype it chose
        config._name_or_path, config.text_config.dtype = "", None
    assert loaded.config.to_dict() == model.config.to_dict()
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == model.config.text_config.tie_word_embeddings


@pytest.mark.parametrize("family", ODD_FAMILIES)
def test_odd_families_keep_their_language_model(family, tmp_path):
    """Where the body lies and what the head does is asked of the model: `base_model_prefix` that names nothing (Llama
    4), multipliers and caps of other names, `hidden_states[-1]` that is no last hidden state (Gemma 3n)."""
    theirs, ours, ids = tiny_lm(family), tiny_grm(family), texts()[0][None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        base = theirs(ids, attention_mask=mask, use_cache=False).logits
        others = [theirs(ids, attention_mask=mask).logits for _ in range(2)]
        if not torch.allclose(torch.stack(others), base, atol=1e-6):
            pytest.skip(f"in this transformers, {type(theirs).__name__} gives one text several outputs")
        out = ours(ids, attention_mask=mask, return_lm_logits=True)
        torch.testing.assert_close(out.lm_logits, base, rtol=0, atol=1e-6)
        last = theirs.model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(ours.lm_logits(last), base, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.lm_logits(last[0, 2:4]), base[0, 2:4], rtol=0, atol=1e-6)
        assert_same(out.logits.squeeze(-1), head_by_hand(ours, last[:, -1]))
        own = (theirs.get_output_embeddings()(last) - base).abs().max() > 0.01  # beyond the matrix product
        assert own == (family in ("falcon_h1", "gemma3n_text", "recurrent_gemma"))
    assert ours.lm_head_is_exact() and base.abs().max() > 0.3
    padded, right = pad([ids[0], ids[0, :4]], left=False)
    assert_same(score(ours, padded, right)[:1], out.logits.squeeze(-1), 2 * FLOAT32)
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    theirs.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids, attention_mask=mask).logits
    if not torch.allclose(reloaded, base, atol=1e-6):
        pytest.skip(f"this transformers loads another {type(theirs).__name__} than it saved")
    ours.save_pretrained(tmp_path)
    loaded, info = GRMForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        again = loaded(ids, attention_mask=mask, return_lm_logits=True)
    assert_same(again.lm_logits, out.lm_logits)
    assert_same(again.logits, out.logits)


def test_lm_head_that_a_plain_matrix_product_misses_is_noticed():
    model = tiny_grm("granite")
    assert model.lm_head_is_exact()
    inner = model.lm.forward
    model.lm.forward = lambda *a, **k: _scaled(inner(*a, **k), 1.02)
    assert not model.lm_head_is_exact()


def _scaled(out, factor):
    out.logits = out.logits * factor
    return out


# ------------------------------------------------------------------------------- any batch, any padding: property test


MODELS = {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "qwen3_moe"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_score_is_the_same_in_any_batch_with_any_padding(family, data):
    model = MODELS.setdefault(family, tiny_grm(family))
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=6))
    rows = texts(lengths, seed=data.draw(st.integers(0, 2**16)))
    left = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    extra = data.draw(st.integers(0, 5))
    filler = data.draw(st.integers(0, 100))  # whatever stands in the padding
    ids, mask = pad(rows, left, width=max(lengths) + extra, token=filler)
    assert_same(score(model, ids, mask), alone(model, rows))


def test_bfloat16_stays_within_the_published_tolerance():
    model, rows = tiny_grm(dtype=torch.bfloat16), texts(range(1, 24), seed=3)
    ids, mask = pad(rows, left=True, width=30)
    batched, single = score(model, ids, mask), alone(model, rows)
    assert batched.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert_same(batched, single, BFLOAT16)


# ------------------------------------------------------------------------------------------------- where it is read


@pytest.mark.parametrize("head_type", HEADS)
def test_padding_id_equal_to_end_of_sequence_keeps_the_end(head_type):
    model, rows = tiny_grm(head_type=head_type), [torch.cat([row, torch.tensor([2])]) for row in texts()]
    wanted = expected(tiny_lm(), model, rows)
    model.config.pad_token_id = 2
    for left in (True, False):
        ids, mask = pad(rows, left, token=2)
        assert_same(score(model, ids, mask), wanted)
    assert_same(torch.cat([score(model, row[None]) for row in rows]), wanted)
    with pytest.raises(ValueError, match="nothing tells padding from text.*Pass the `attention_mask`"):
        model(ids)


@pytest.mark.parametrize("ends", [dict(pad_token_id=None), dict(pad_token_id=1), dict(eos_token_id=[5, 0])])
def test_batch_without_mask_is_refused_when_ids_cannot_tell(ends):
    model = tiny_grm()
    for name, value in ends.items():
        setattr(model.config, name, value)
    ids, _ = pad(texts(), left=False)
    with pytest.raises(ValueError, match="4 rows without `attention_mask`"):
        model(ids)
    assert score(model, ids[:1]).shape == (1,)  # a row alone is unpadded
    with pytest.raises(ValueError, match="without `attention_mask`"):
        tiny_grm()(inputs_embeds=torch.zeros(2, 3, 32))


def test_without_mask_padding_ids_at_either_end_are_padding_and_those_inside_are_text():
    model, rows = tiny_grm(), texts()
    rows[0][3] = 0  # the unknown token of many tokenizers is also their padding
    wanted = expected(tiny_lm(), model, rows)
    for left in (True, False):
        ids, _ = pad(rows, left, width=11)
        assert_same(score(model, ids), wanted)
        assert_same(torch.cat([score(model, row[None]) for row in ids]), wanted)  # a padded row alone, too


def test_first_bit_of_the_mask_zeroed_on_right_padded_rows():
    """What rewardbench does to a doubled beginning-of-sequence token."""
    for family in ("llama", "gpt2"):
        model, rows = tiny_grm(family), texts()
        once = [torch.cat([torch.tensor([1]), row]) for row in rows]
        ids, mask = pad([torch.cat([torch.tensor([1]), row]) for row in once], left=False)
        mask[:, 0] = 0
        assert_same(score(model, ids, mask), expected(tiny_lm(family), model, once))


def test_batches_that_have_nothing_to_read_are_refused_or_empty():
    model = tiny_grm()
    ids, mask = pad(texts(), left=False)
    assert model(ids[:0], attention_mask=mask[:0]).logits.shape == (0, 1)
    assert model(ids[:0]).logits.dtype == torch.float32
    mask[2] = 0
    with pytest.raises(ValueError, match="Row 2 of the batch has no token"):
        model(ids, attention_mask=mask)
    for call in (
        lambda: model(torch.zeros(2, 5, dtype=torch.long)),
        lambda: model(ids[:1, :0]),
        lambda: model(ids[:, :0], attention_mask=mask[:, :0]),
    ):
        with pytest.raises(ValueError, match="Row 0 of the batch has no token"):
            call()
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        model()


def test_masks_that_do_not_fit_the_batch_are_refused():
    model = tiny_grm()
    ids, mask = pad(texts(), left=False)
    with pytest.raises(ValueError, match=r"is \(4, 8\); the batch.*\(4, 9\)"):
        model(ids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match=r"is \(1, 9\); the batch.*\(4, 9\)"):
        model(ids, attention_mask=mask[:1])
    with pytest.raises(ValueError, match="4 dimensions.*`read_index`"):
        model(ids, attention_mask=torch.ones(4, 1, 9, 9))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("left", [True, False])
def test_reward_of_a_continuation_of_cached_prompts(family, left):
    model, prompts, responses = tiny_grm(family), texts((5, 3)), texts((2, 4), seed=1)
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    prompt_ids, prompt_mask = pad(prompts, left=True)
    ids, mask = pad(responses, left)
    with torch.no_grad():
        cache = model(prompt_ids, attention_mask=prompt_mask, use_cache=True)[CACHE]
        for name in ("cache", "past_key_values"):  # its names since, and before, transformers 5.24
            found = score(model, ids, torch.cat([prompt_mask, mask], 1), **{name: copy.deepcopy(cache)})
            assert_same(found, expected(tiny_lm(family), model, whole))
            with pytest.raises(ValueError, match="cached tokens included"):
                model(ids, attention_mask=mask, **{name: copy.deepcopy(cache)})
            with pytest.raises(ValueError, match="without `attention_mask`"):
                model(ids, **{name: copy.deepcopy(cache)})
            one = model(prompts[0][None], **{name: DynamicCache(config=model.config.text_config)})[CACHE]
            assert_same(score(model, responses[0][None], **{name: one}), found[:1])
        with pytest.raises(ValueError, match="two names of one argument"):
            model(ids, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_score_as_their_ids(family):
    model, rows = tiny_grm(family), texts()
    ids, mask = pad(rows, left=True)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
    assert torch.equal(embedded.squeeze(-1), score(model, ids, mask))


def test_several_texts_in_a_row_are_read_where_read_index_says():
    model, rows = tiny_grm(), texts()
    ids = torch.cat(rows)[None]
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(LENGTHS))
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    block = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    found = score(model, ids, block[None, None], position_ids=position_ids, read_index=ends)
    assert_same(found, expected(tiny_lm(), model, rows))
    padded, mask = pad(rows, left=False)
    last = torch.arange(len(rows)) * padded.shape[1] + torch.tensor(LENGTHS) - 1
    assert torch.equal(score(model, padded, mask, read_index=last), score(model, padded, mask))


def test_lm_fn_gets_the_hidden_states_and_the_model():
    model = tiny_grm()
    ids, mask = pad(texts(), left=False)
    out = model(ids, attention_mask=mask, lm_fn=lambda hidden, m: m.lm_logits(hidden[:, :1]))
    assert torch.equal(out.lm_output, model(ids, attention_mask=mask, return_lm_logits=True).lm_logits[:, :1])
    assert model(ids, attention_mask=mask).lm_output is None


def test_hidden_states_and_attentions_are_those_that_were_asked_for():
    model, theirs = tiny_grm(attn_implementation="eager"), tiny_lm(attn_implementation="eager")
    ids, mask = pad(texts(), left=False)
    inputs, real = dict(input_ids=ids, attention_mask=mask), mask.bool()
    for options in ({}, dict(return_lm_logits=True), dict(return_lm_logits=True, logits_to_keep=1)):
        out = model(**inputs, **options)
        assert out.hidden_states is None and out.attentions is None and out.get(CACHE) is None
        out = model(**inputs, **options, output_hidden_states=True, output_attentions=True)
        wanted = theirs(**inputs, output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == 3 and len(out.attentions) == 2
        torch.testing.assert_close(out.hidden_states[1][real], wanted.hidden_states[1][real], rtol=0, atol=1e-6)
        torch.testing.assert_close(out.attentions[1][3], wanted.attentions[1][3], rtol=0, atol=1e-6)
    assert tuple(model(**inputs, use_cache=True)[CACHE].layers[0].keys.shape) == (4, 2, 9, 8)


def test_a_list_of_layers_is_obeyed():
    model, theirs, ids = tiny_grm(), tiny_lm(), texts()[0][None]
    wanted = theirs(ids, output_hidden_states=[0, -1]).hidden_states
    if all(state is not None for state in wanted):
        pytest.skip("this transformers takes no list of layers")
    for options in ({}, dict(return_lm_logits=True)):
        found = model(ids, output_hidden_states=[0, -1], **options).hidden_states
        assert [state is None for state in found] == [state is None for state in wanted] == [False, True, False]
        torch.testing.assert_close(found[0], wanted[0])


@pytest.mark.parametrize("where", ["top", "text"])
def test_outputs_that_the_configuration_asks_for(where, tmp_path):
    model, ids = tiny_grm(attn_implementation="eager"), texts()[0][None]
    config = model.config if where == "top" else model.config.text_config
    config.output_hidden_states = config.output_attentions = True
    for ours in (model, saved_and_loaded(model, tmp_path, attn_implementation="eager")):
        for options in ({}, dict(return_lm_logits=True)):
            out = ours(ids, **options)
            assert len(out.hidden_states) == 3 and len(out.attentions) == 2
            out = ours(ids, output_hidden_states=False, output_attentions=False, **options)
            assert out.hidden_states is None and out.attentions is None
    loaded = GRMForSequenceClassification.from_pretrained(
        tmp_path, output_hidden_states=False, output_attentions=False
    )
    assert loaded(ids).hidden_states is None and loaded(ids).attentions is None
    kept = GRMForSequenceClassification.from_base(tiny_lm(), head_hidden_size=4)
    kept.save_pretrained(tmp_path / "plain")
    asked = dict(output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path / "plain", **asked)
    assert len(loaded(ids).hidden_states) == 3 and len(loaded(ids).attentions) == 2


def saved_and_loaded(model, folder, **kwargs):
    model.save_pretrained(folder)
    return GRMForSequenceClassification.from_pretrained(folder, **kwargs)


def test_one_packed_row_without_mask_is_refused_or_read_where_read_index_says():
    model, rows = tiny_grm(), texts()
    ids, position_ids = torch.cat(rows)[None], torch.cat([torch.arange(length) for length in LENGTHS])[None]
    for padding in (0, None):
        model.config.pad_token_id = padding
        for options in ({}, dict(return_lm_logits=True)):
            with pytest.raises(ValueError, match="not consecutive.*several texts needs `read_index`"):
                model(ids, position_ids=position_ids, **options)
        ends = torch.tensor(LENGTHS).cumsum(0) - 1
        with torch.no_grad():
            out = model(ids, position_ids=position_ids, read_index=ends, return_lm_logits=True)
            assert_same(out.logits.squeeze(-1), expected(tiny_lm(), model, rows))
            wanted = torch.cat([tiny_lm()(row[None]).logits[0] for row in rows])
        torch.testing.assert_close(out.lm_logits[0], wanted, rtol=0, atol=1e-6)
        plain = score(model, ids[:, :7], position_ids=position_ids[:, :7])
        assert_same(plain, expected(tiny_lm(), model, rows[:1]))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="not consecutive"):
        compiled(ids, position_ids=position_ids)
    torch.compiler.reset()


def test_continuous_batching_generates_as_generate_does():
    if not hasattr(GRMForSequenceClassification, "generate_batch") or not hasattr(
        transformers, "ContinuousBatchingConfig"
    ):
        pytest.skip("this transformers has no continuous batching")
    model, prompts = tiny_grm(), [[5, 6, 7], [8, 9]]
    settings_ = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)  # or it takes all memory
    found = model.generate_batch(prompts, generation_config=settings_, continuous_batching_config=small)
    for prompt, out in zip(prompts, found.values(), strict=True):
        wanted = model.generate(torch.tensor([prompt]), generation_config=settings_)[0, len(prompt) :].tolist()
        assert out.generated_tokens == wanted and len(wanted) == 5
    with model.continuous_batching_context_manager(
        generation_config=settings_, continuous_batching_config=small
    ) as manager:
        assert manager.model is model.lm


def test_read_index_of_continuous_batching_goes_on_to_the_decoder(monkeypatch):
    model, ids = tiny_grm(), texts()[0][None]
    seen = {}
    inner = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kw: inner(**kw | {"read_index": seen.update(kw)}))
    given = [torch.tensor([1, 2])]
    assert model(ids, read_index=given).logits.shape == (1, 1) and seen["read_index"] is given


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_auxiliary_loss_is_the_familys_own(family, tmp_path):
    model, theirs = tiny_grm(family), tiny_lm(family)
    ids, mask = pad(texts(), left=False)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=torch.zeros(4))
    wanted = theirs(ids, attention_mask=mask, output_router_logits=True)
    plain = model(**inputs)
    assert plain.aux_loss is None and plain.router_logits is None
    for options in (dict(output_router_logits=True), dict(output_router_logits=True, return_lm_logits=True)):
        out = model(**inputs, **options)
        torch.testing.assert_close(out.aux_loss, wanted.aux_loss)
        assert len(out.router_logits) == 2 and out.aux_loss.requires_grad
        weight = theirs.config.router_aux_loss_coef
        assert model.router_aux_loss_coef == weight > 0
        torch.testing.assert_close(out.loss, plain.loss + weight * wanted.aux_loss)
    model.config.text_config.output_router_logits = True
    torch.testing.assert_close(model(**inputs).aux_loss, wanted.aux_loss)
    loaded = saved_and_loaded(tiny_grm(family), tmp_path, output_router_logits=True)
    torch.testing.assert_close(loaded(**inputs).aux_loss, wanted.aux_loss)
    with pytest.raises(ValueError, match="no `router_aux_loss_coef`"):
        tiny_grm().router_aux_loss_coef  # noqa: B018


def test_labels_give_the_mean_squared_error():
    model = tiny_grm()
    ids, mask = pad(texts(), left=False)
    labels = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - labels) ** 2).mean())
    assert torch.equal(out.loss, model(ids, attention_mask=mask, labels=labels[:, None]).loss)
    assert model(ids, attention_mask=mask, return_dict=False)[0].shape == (4, 1)


def test_nothing_but_nan_comes_out_of_a_body_that_overflows():
    model = tiny_grm()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    assert score(model, texts()[0][None]).isnan().all()


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("head_type", HEADS)
def test_head_stays_float32_under_a_bfloat16_body(head_type, tmp_path):
    tiny_lm(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = GRMForSequenceClassification.from_base(tmp_path / "base", head_type, head_hidden_size=16)
    model.save_pretrained(tmp_path)
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path)
    upcast = GRMForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    built = GRMForSequenceClassification(loaded.config)
    from_config = AutoModelForSequenceClassification.from_config(loaded.config)
    for ours in (model, loaded, built, from_config):
        assert {p.dtype for p in ours.lm.parameters()} == {torch.bfloat16} == {ours.dtype}
        assert {p.dtype for p in ours.score.parameters()} == {torch.float32}
    assert {p.dtype for p in upcast.parameters()} == {torch.float32}
    ids, mask = pad(texts(), left=True)
    assert_same(score(loaded, ids, mask), score(model, ids, mask))
    with torch.no_grad():
        hidden = model.model(ids, attention_mask=mask).last_hidden_state[:, -1]
    # Right to float32's precision, which bfloat16 anywhere in the head would not be.
    torch.testing.assert_close(model.score(hidden)[:, 0].double(), head_by_hand(model, hidden), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("how", ["autocast", "to", "half"])
def test_head_computes_in_float32_whatever_the_user_does(head_type, how, tmp_path):
    # GPT-2: where positions rotate, `.to()` rounds their frequencies too, and the folder holds none of that.
    model, hidden = tiny_grm("gpt2", head_type), torch.randn(5, 32).bfloat16()
    if how == "to":
        model = model.to(torch.bfloat16)
    elif how == "half":
        model = model.half()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rewards = model.score(hidden)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards[:, 0].double(), head_by_hand(model, hidden), rtol=1e-6, atol=1e-6)
    ids, mask = pad(texts(), left=False)
    model.save_pretrained(tmp_path)
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path)
    assert_same(score(loaded, ids, mask), score(model, ids, mask))


def test_float64_stays_float64():
    model = tiny_grm().double()
    assert score(model, texts()[0][None]).dtype == torch.float64


# ------------------------------------------------------------------------------------------ the head's initial weights


def test_head_is_drawn_from_the_seed_as_torch_draws_it():
    def drawn(seed):
        torch.manual_seed(seed)
        return GRMForSequenceClassification.from_base(tiny_lm(hidden_size=64), head_hidden_size=512).score.state_dict()

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    for name, fan_in in (("dense.0.weight", 64), ("out.weight", 512), ("dense.0.bias", 64)):
        bound = fan_in**-0.5  # uniform, and not normal with the base's deviation of 0.02
        assert 0.9 * bound < first[name].abs().max() <= bound
        assert abs(first[name].std() - bound / 3**0.5) < 0.15 * bound


def test_head_is_built_as_the_configuration_says():
    model = GRMForSequenceClassification.from_base(tiny_lm(), head_hidden_size=8, head_num_layers=3, head_dropout=0.1)
    assert isinstance(model.score, GRMMLPHead) and [tuple(d.weight.shape) for d in model.score.dense] == [
        (8, 32),
        (8, 8),
        (8, 8),
    ]
    linear_head = tiny_grm("opt_projected", "linear").score
    assert isinstance(linear_head, GRMLinearHead) and linear_head.weight.shape == (1, 16) and linear_head.bias is None


def test_weights_of_a_modified_base_survive():
    """`post_init` draws new weights for modules without a mark: a layer that the user replaced has none."""
    lm, ids = tiny_lm(), texts()[0][None]
    layer = torch.nn.Linear(32, 101, bias=False)
    lm.lm_head = layer
    weight, logits = layer.weight.detach().clone(), lm(ids).logits
    model = GRMForSequenceClassification.from_base(lm)
    assert torch.equal(model.get_output_embeddings().weight, weight)
    assert torch.equal(model(ids, return_lm_logits=True).lm_logits, logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_live_base_keeps_its_attention_and_its_causal_mask(attention):
    lm, ids = tiny_lm(attn_implementation=attention), texts()[0][None]
    logits = lm(ids).logits
    config = GRMConfig(lm.config)
    assert torch.equal(lm(ids).logits, logits) and lm.config._attn_implementation == attention
    assert config.text_config is not lm.config and config.text_config._attn_implementation == attention
    model = GRMForSequenceClassification.from_base(lm)
    assert torch.equal(lm(ids).logits, logits)
    changed = ids.clone()
    changed[0, -1] += 1
    assert torch.equal(model(changed, return_lm_logits=True).lm_logits[:, :-1], logits[:, :-1])


@pytest.mark.parametrize("made", ["from_base", "config", "loaded"])
def test_one_configuration_reaches_every_layer(made, tmp_path):
    model = tiny_grm()
    if made == "config":
        model = GRMForSequenceClassification(model.config)
    elif made == "loaded":
        model.save_pretrained(tmp_path)
        model = GRMForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.text_config is model.lm.config is model.model.config
    assert model.model.layers[0].self_attn.config is model.config.text_config
    model.set_attn_implementation("eager")
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"
    assert model(texts()[0][None], output_attentions=True).attentions[0].shape == (1, 4, 7, 7)
    model.config.pad_token_id = 9
    assert model.config.get_text_config().pad_token_id == model.lm.config.pad_token_id == 9


# --------------------------------------------------------------------------------------------------- the configuration


def test_text_settings_are_read_and_written_through(tmp_path):
    tiny_grm("llama_tied").save_pretrained(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 77.0}
    load = GRMForSequenceClassification.from_pretrained
    for auto in (GRMForSequenceClassification, AutoModelForSequenceClassification):
        model = auto.from_pretrained(tmp_path, attention_dropout=0.25, rope_parameters=rope)
        assert model.lm.config.attention_dropout == model.model.layers[0].self_attn.attention_dropout == 0.25
        assert model.model.rotary_emb.inv_freq[1] == pytest.approx(77.0**-0.25)
    assert load(tmp_path).config.tie_word_embeddings is True is load(tmp_path).lm.config.tie_word_embeddings
    assert tiny_grm("llama").config.tie_word_embeddings is False
    config = GRMConfig.from_pretrained(tmp_path)
    config.tie_word_embeddings = False
    assert config.text_config.tie_word_embeddings is False
    assert GRMConfig(tiny_lm("llama_tied").config, tie_word_embeddings=False).text_config.tie_word_embeddings is False
    assert "tie_word_embeddings" not in {k for k in config.to_dict() if k != "text_config"}
    with pytest.raises(TypeError, match="nonsense"):
        load(tmp_path, nonsense=1)
    config, unused = GRMConfig.from_pretrained(tmp_path, nonsense=1, sliding_window=3, return_unused_kwargs=True)
    assert unused == {"nonsense": 1, "sliding_window": 3}  # a llama has no window


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_implementation_is_passed_on(implementation, tmp_path):
    model = tiny_grm("qwen3_moe")
    if not hasattr(model.lm, "set_experts_implementation"):
        pytest.skip("this transformers has no choice of experts")
    model.save_pretrained(tmp_path)
    model.lm.save_pretrained(tmp_path / "base")
    ids, mask = pad(texts(), left=False)
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path, experts_implementation=implementation)
    torch.manual_seed(1)
    made = GRMForSequenceClassification.from_base(
        tmp_path / "base", head_hidden_size=16, experts_implementation=implementation
    )
    default = tiny_lm("qwen3_moe").config._experts_implementation
    assert model.config._experts_implementation == model.lm.config._experts_implementation == default
    for ours in (loaded, made):
        assert ours.config._experts_implementation == ours.lm.config._experts_implementation == implementation
        assert_same(score(ours, ids, mask), score(model, ids, mask))
    for wanted in (implementation, {"": default, "text_config": implementation}, {"": implementation}):
        model.set_experts_implementation(default)
        model.set_experts_implementation(wanted)
        assert model.config._experts_implementation == model.lm.config._experts_implementation == implementation
    dense, bare = tiny_grm(), tiny_lm()
    with pytest.raises(ValueError, match="LlamaForCausalLM does not support"):
        dense.set_experts_implementation("grouped_mm")
    for ours in (dense, bare):  # both leave what they have no experts for
        ours.set_experts_implementation(implementation)
    assert dense.config._experts_implementation == dense.lm.config._experts_implementation
    assert dense.config._experts_implementation == bare.config._experts_implementation
    with pytest.raises(ValueError, match="LlamaForCausalLM does not support"):
        tiny_grm().save_pretrained(tmp_path / "dense")
        GRMForSequenceClassification.from_pretrained(tmp_path / "dense", experts_implementation="grouped_mm")


def test_configuration_makes_a_round_trip(tmp_path):
    config = GRMConfig(
        LlamaConfig(hidden_size=32, vocab_size=50, pad_token_id=3),
        head_type="linear",
        head_dropout=0.25,
        bos_policy="double",
        max_sequence_length=77,
        overlength="error",
        reward_mean=-1.5,
        reward_std=2.0,
        reward_temperature=0.5,
        base_model="someone/some-model",
    )
    config.save_pretrained(tmp_path)
    loaded = GRMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() == GRMConfig.from_dict(config.to_dict()).to_dict()
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert isinstance(loaded.text_config, LlamaConfig) and loaded.head_dropout == 0.25 and loaded.num_labels == 1
    assert GRMConfig.from_dict(GRMConfig().to_dict()).to_dict() == GRMConfig().to_dict()
    assert GRMConfig().text_config.model_type == "llama" and GRMConfig().id2label == {0: "REWARD"}


@pytest.mark.parametrize("family", FAMILIES)
def test_top_level_names_that_other_libraries_read_and_write(family):
    config = tiny_grm(family).config
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    assert [getattr(config, name) for name in names] == [101, 32, 2, 4]
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert getattr(config, "max_position_embeddings", None) == getattr(
        config.text_config, "max_position_embeddings", None
    )
    config.pad_token_id = 7
    config.use_cache = False
    assert config.get_text_config().pad_token_id == 7 and config.text_config.use_cache is False
    assert "pad_token_id" not in {k for k in config.to_dict() if k != "text_config"}


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        (dict(head_type="mlp2"), "head_type.*'mlp2'.*one of"),
        (dict(bos_policy="triple"), "bos_policy.*'triple'.*one of"),
        (dict(overlength="drop"), "overlength.*'drop'.*truncate_left"),
        (dict(head_num_layers=0), "head_type='linear'"),
        (dict(head_type="bnrm", head_num_layers=-1), "no negative number of layers"),
        (dict(head_type="bnrm", head_hidden_size=0), "at least one factor"),
        (dict(num_labels=2), "one number, found 2 labels"),
        (dict(id2label={0: "a", 1: "b"}), "one number, found 2 labels"),
        (dict(text_config={"hidden_size": 4}), "no `model_type`"),
    ],
)
def test_settings_that_make_no_reward_model_are_refused(settings_, words):
    with pytest.raises(ValueError, match=words):
        GRMConfig(**settings_)


def test_configuration_of_another_repository_names_the_files_beside_it():
    config = GRMConfig(auto_map={"AutoModel": "someone/model--modeling_grm.X", "AutoTokenizer": "tok.Tok"})
    assert config.auto_map["AutoModel"] == "modeling_grm.GRMForSequenceClassification"
    assert config.auto_map["AutoTokenizer"] == "tok.Tok"


# -------------------------------------------------------------------------------------- life inside other libraries


def test_train_and_eval_and_dropout(tmp_path):
    model = GRMForSequenceClassification.from_base(
        tiny_lm("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), head_hidden_size=16, head_dropout=0.5
    )
    assert not model.training  # as the base was
    model.save_pretrained(tmp_path)
    loaded, ids = GRMForSequenceClassification.from_pretrained(tmp_path), texts()[0][None]
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(score(loaded, ids), score(loaded, ids))
    assert_same(score(loaded, ids), score(model, ids))
    loaded.train()
    assert not torch.equal(score(loaded, ids), score(loaded, ids))
    loaded.lm.eval()
    assert not torch.equal(score(loaded, ids), score(loaded, ids)), "the head has a dropout of its own"
    assert loaded.lm_head_is_exact() and loaded.training and not loaded.lm.training
    for module in loaded.modules():  # what TRL's `disable_dropout` does
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_same(score(loaded, ids), score(model, ids))


def test_generating_changes_no_score():
    model, ids = tiny_grm(), texts()[0][None]
    before = score(model, ids)
    model.generation_config.max_new_tokens = 3
    options = dict(attention_mask=torch.ones_like(ids), do_sample=True)
    assert model.generate(ids, **options).shape[1] <= 10 and model.lm.generation_config is model.generation_config
    assert torch.equal(score(model, ids), before) and not model.training


def test_copies_and_pickles():
    model, ids = tiny_grm("llama_tied"), texts()[0][None]
    before = score(model, ids)
    for ours in (pickle.loads(pickle.dumps(tiny_grm("llama_tied"))), copy.deepcopy(model)):
        assert torch.equal(score(ours, ids), before)
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
        with torch.no_grad():
            ours.score.out.bias += 1
    assert torch.equal(score(model, ids), before)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "phi"])
def test_new_tokens_in_the_vocabulary(family, tmp_path):
    model, ids = tiny_grm(family), texts()[0][None]
    with torch.no_grad():
        before = model(ids, return_lm_logits=True)
        model.resize_token_embeddings(120, mean_resizing=False)
        after = model(ids, return_lm_logits=True)
    torch.testing.assert_close(after.lm_logits[..., :101], before.lm_logits, rtol=0, atol=1e-6)
    assert_same(after.logits, before.logits)
    assert model.config.vocab_size == 120 == after.lm_logits.shape[-1]
    model.save_pretrained(tmp_path)
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path)
    new = torch.tensor([[5, 119, 103]])
    with torch.no_grad():
        ours, theirs = loaded(new, return_lm_logits=True), model(new, return_lm_logits=True)
    assert_same(ours.logits, theirs.logits)
    assert_same(ours.lm_logits, theirs.lm_logits)


@pytest.mark.parametrize("head_type", HEADS)
def test_gradient_checkpointing_changes_memory_and_nothing_else(head_type):
    def gradients(checkpointing):
        model = tiny_grm(head_type=head_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        ids, mask = pad(texts(), left=False)
        model(ids, attention_mask=mask, lm_fn=lambda h, m: m.lm_logits(h).sum()).lm_output.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys() and len(plain) > 15
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name])


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama_tied", True), ("gpt2", True)])
def test_only_an_untied_language_model_head_is_frozen(family, tied):
    model = tiny_grm(family)
    model.freeze_lm_head()
    assert model.get_output_embeddings().weight.requires_grad is tied
    assert model.get_input_embeddings().weight.requires_grad
    model(texts()[0][None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # what DDP asks for


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_compiled_model_gives_the_same_rewards_in_one_graph(family):
    model, rows = tiny_grm(family, num_hidden_layers=1), texts()
    ids, mask = pad(rows, left=True)
    compiled = torch.compile(model, backend="aot_eager" if family == "llama" else "eager", fullgraph=True)
    with torch.no_grad():
        for options in ({}, dict(return_lm_logits=True, logits_to_keep=2)):
            wanted, found = [m(ids, attention_mask=mask, **options) for m in (model, compiled)]
            assert_same(found.logits, wanted.logits, tolerance=1e-5)
            if "return_lm_logits" in options:
                assert_same(found.lm_logits, wanted.lm_logits, tolerance=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's CPU backend needs a C++ compiler")
def test_compiled_to_machine_code_gives_the_same_rewards():
    model, rows = tiny_grm(num_hidden_layers=1), texts()
    ids, mask = pad(rows, left=True)
    assert_same(score(torch.compile(model), ids, mask), score(model, ids, mask), tolerance=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    pytest.importorskip("accelerate")
    model, ids = tiny_grm("gpt2"), texts()[0][None]
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path, device_map=device_map)
    assert_same(score(loaded, ids), score(model, ids))
    model.lm.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    made = GRMForSequenceClassification.from_base(tmp_path / "base", head_hidden_size=16, device_map=device_map)
    assert_same(score(made, ids), score(model, ids))


@pytest.mark.parametrize("part", ["h.1", "wte"])
@pytest.mark.parametrize("family", ["gpt2", "gpt2_untied"])
def test_device_map_with_parts_on_disk(part, family, tmp_path):
    pytest.importorskip("accelerate")
    from grm_hf.devices import is_whole

    model, rows = tiny_grm("gpt2", tie_word_embeddings=family == "gpt2"), texts()
    model.save_pretrained(tmp_path / "model")
    model.lm.save_pretrained(tmp_path / "base")
    parts = [*(f"transformer.{name}" for name in ("wte", "wpe", "h.0", "h.1", "ln_f")), "lm_head"]
    on_disk = {f"transformer.{part}", *(["lm_head"] if part == "wte" and family == "gpt2" else [])}
    places = {name: "disk" if name in on_disk else "cpu" for name in parts}
    ids, mask = pad(rows, left=True)  # the hooks must not hide that the decoder takes position ids
    try:
        options = dict(device_map=places, offload_folder=tmp_path / "offload0")
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)(ids)
    except KeyError as error:
        pytest.skip(f"this transformers cannot offload tied embeddings: {error}")
    loaded = GRMForSequenceClassification.from_pretrained(
        tmp_path / "model",
        device_map={"score": "cpu", **{f"lm.{name}": place for name, place in places.items()}},
        offload_folder=tmp_path / "offload",
    )
    torch.manual_seed(1)
    made = GRMForSequenceClassification.from_base(
        tmp_path / "base", head_hidden_size=16, device_map=places, offload_folder=tmp_path / "offload2"
    )
    for ours in (loaded, made):
        assert any(p.is_meta for p in ours.parameters()) and not any(p.is_meta for p in ours.score.parameters())
        assert ours.device.type == "cpu" and is_whole(ours) and ours.lm_head_is_exact()
        with torch.no_grad():
            found, wanted = (m(ids, attention_mask=mask, return_lm_logits=True) for m in (ours, model))
        assert_same(found.logits, wanted.logits)
        assert_same(found.lm_logits, wanted.lm_logits)


def test_quantisers_leave_both_heads_alone():
    """Without this, int8 takes the layers of the reward head: only the last parameter is kept by default."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    for family, head_type in (("llama", "mlp"), ("llama_tied", "linear"), ("gpt2", "mlp")):
        model = tiny_grm(family, head_type)
        for skip in (None, ["lm_head"]):
            kept = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
            converted = {name for name, _ in model.named_modules() if should_convert_module(name, kept)}
            assert not [name for name in converted if name.startswith(("score", "lm.lm_head"))]
            assert [name for name in converted if "attn" in name]


def test_no_name_in_the_head_is_a_renaming_target():
    model = GRMForSequenceClassification.from_base(tiny_lm("mixtral"), head_num_layers=2, head_hidden_size=8)
    parts = {part for name, _ in model.score.named_parameters() for part in name.split(".")}
    assert parts == {"dense", "0", "1", "out", "weight", "bias"}


def test_trainer_evaluation_gathers_rewards_and_no_logits(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = tiny_grm()
    data = [dict(input_ids=row.tolist() + [0] * (9 - len(row)), labels=0.5) for row in texts()]
    for row in data:
        row["attention_mask"] = [int(i != 0) for i in row["input_ids"]]
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=2)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    model.forward = _with_lm_logits(model.forward)
    found = trainer.predict(data)
    assert found.predictions.shape == (4, 1) and not trainer.model_accepts_loss_kwargs
    fields = set(GRMOutput.__dataclass_fields__) - {"loss", "logits"}
    assert set(GRMConfig.keys_to_ignore_at_inference) >= fields | set(CACHE_NAMES)


def _with_lm_logits(forward):
    def wrapped(*args, **kwargs):
        return forward(*args, return_lm_logits=True, **kwargs)

    wrapped.__signature__ = inspect.signature(forward)
    return wrapped


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("head_type", HEADS)
def test_text_classification_pipeline_returns_the_raw_reward(head_type, tmp_path):
    tokenizer = byte_tokenizer(eos_token="</s>", pad_token="<pad>")
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model = tiny_grm(head_type=head_type, **tokens)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter *= 30  # far outside what a sigmoid could return
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inputs = ["good", "a much longer answer", "bad answer"]
    rows = [torch.tensor(tokenizer(text).input_ids) for text in inputs]
    wanted = expected(model.lm, model, rows)
    assert wanted.abs().max() > 1.5
    by_path = pipeline("text-classification", model=str(tmp_path))
    by_object = pipeline("text-classification", model=model, tokenizer=tokenizer)
    for pipe in (by_path, by_object):
        for options in ({}, dict(batch_size=3), dict(batch_size=2, function_to_apply="none")):
            found = pipe(inputs, **options)
            assert {row["label"] for row in found} == {"REWARD"}
            # A head that is 30 times as steep in each layer makes more of the rounding before it.
            assert_same(torch.tensor([row["score"] for row in found]), wanted, 10 * FLOAT32)
    assert_same(torch.tensor([pipe("bad answer")[0]["score"]]), wanted[2:], 10 * FLOAT32)


# ---------------------------------------------------------------------------------- PPO reads by itself: same number


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_ppo_reads_the_reward_that_forward_gives(family, head_type):
    model, pad_token = tiny_grm(family, head_type), 100  # a padding id that is neither 0 nor the end of a text
    queries, responses = ([row % 97 + 3 for row in texts(lengths)] for lengths in ((5, 2, 6), (3, 4, 1)))
    left, _ = pad(queries, left=True, token=pad_token)
    right, _ = pad(responses, left=False, token=pad_token)
    ids = torch.cat([left, right], 1)
    found = read_by_ppo(model, ids, pad_token, context_length=6)
    assert_same(found, score(model, ids, ids != pad_token))
    whole = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
    assert_same(found, expected(tiny_lm(family), model, whole))


# ---------------------------------------------------------------------------------------------- bases that are none


def test_live_bases_without_a_language_model_head_are_refused():
    from transformers import AutoModel, BertConfig, BertLMHeadModel, GPT2Config, T5Config, T5ForConditionalGeneration

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    seq2seq = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=9)
    classifier = AutoModelForSequenceClassification.from_config(LlamaConfig(**small))
    body = AutoModel.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    for base, words in (
        (classifier, "LlamaForSequenceClassification has no LM head.*AutoModelForCausalLM"),
        (body, "GPT2Model has no LM head.*AutoModelForCausalLM"),
        (BertLMHeadModel(BertConfig(**small)), r"\(bert\) is no decoder.*causal language model"),
        (T5ForConditionalGeneration(seq2seq), r"\(t5\) is no decoder.*causal language model"),
        (tiny_grm(), "is a reward model already.*`.lm`"),
    ):
        with pytest.raises(ValueError, match=words):
            GRMForSequenceClassification.from_base(base)
    with pytest.raises(ValueError, match="live model, so .'dtype'. cannot be applied"):
        GRMForSequenceClassification.from_base(tiny_lm(), dtype=torch.bfloat16)
    assert GRMForSequenceClassification.from_base(tiny_grm().lm).score is not None


def test_a_base_with_an_adapter_must_be_merged_first():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_lm(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for base in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="carries an adapter.*merge_and_unload"):
            GRMForSequenceClassification.from_base(base)
    GRMForSequenceClassification.from_base(adapted.merge_and_unload())


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_multimodal_base_is_refused_and_what_the_message_says_works(kind):
    from transformers import AutoModelForCausalLM

    full, ids = multimodal(kind), texts()[0][None]
    with pytest.raises(ValueError, match="multimodal.*copy its text model out") as error:
        GRMForSequenceClassification.from_base(full)
    with pytest.raises(ValueError, match="`text_config`.*multimodal"):
        GRMForSequenceClassification(GRMConfig(full.config))
    steps = [part for part in str(error.value).split("`") if part.startswith(("lm = ", "lm."))]
    assert len(steps) == 3
    names = dict(full=full, AutoModelForCausalLM=AutoModelForCausalLM)
    for step in steps:
        exec(step, names)
    model = GRMForSequenceClassification.from_base(names["lm"].eval())
    torch.testing.assert_close(model(ids, return_lm_logits=True).lm_logits, full(ids).logits)


def test_left_padding_of_recurrent_decoders_is_skipped_or_refused():
    ids, mask = torch.tensor([[2, 7, 3]]), torch.tensor([[0, 0, 1, 1, 1]])
    padded = torch.tensor([[0, 0, 2, 7, 3]])
    hybrid = GRMForSequenceClassification.from_base(tiny_lm("falcon_h1"), head_hidden_size=8).eval()
    theirs = hybrid(input_ids=ids).logits.item()
    if transformers.__version__ == "5.0.0":  # there Falcon-H1 reads padding too
        with pytest.raises(ValueError, match="FalconH1Model is recurrent.*Pad on the right"):
            hybrid(input_ids=padded, attention_mask=mask)
    else:
        assert hybrid(input_ids=padded, attention_mask=mask).logits.item() == pytest.approx(theirs, rel=1e-5)
        again = GRMForSequenceClassification.from_base(tiny_lm("falcon_h1"), head_hidden_size=8).eval()
        with torch.autocast("cpu", torch.bfloat16):  # the two runs round by bfloat16, though they give float32
            again(input_ids=padded, attention_mask=mask)
    recurrent = GRMForSequenceClassification.from_base(tiny_lm("recurrent_gemma"), head_hidden_size=8).eval()
    with pytest.raises(ValueError, match="RecurrentGemmaModel is recurrent.*Pad on the right"):
        recurrent(input_ids=padded, attention_mask=mask)
    theirs = recurrent(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    right = recurrent(input_ids=padded.flip(1)[:, [2, 1, 0, 3, 4]], attention_mask=mask.flip(1)).logits.item()
    assert right == pytest.approx(theirs, rel=1e-5)
