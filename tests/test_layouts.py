"""Layouts: the same numbers and gradients as padded rows, whatever the pairs look like, and nothing seen that should
not be."""

import copy
import inspect
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flops import flops
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import chatml_tokenizer, tiny_lm
from transformers import AttentionInterface
from trl.trainer.reward_trainer import DataCollatorForPreference

from grm_hf import GRMForSequenceClassification, attention, layouts
from grm_hf.attention import serve_segments
from grm_hf.layouts import PairCollator, model_kwargs, plant, resolve_layout
from grm_hf.logprobs import sequence_logps
from grm_hf.losses import pair_loss, text_loss
from grm_hf.scoring import GRMScorer


ONE_ROW = ("packed", "shared_prefix")
OWN = {"phi3": dict(sliding_window=4), "gpt2": dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), "opt": dict(dropout=0)}


def grm(family="llama", dtype=torch.float32, **overrides):
    lm = tiny_lm(family, **{**OWN.get(family, {}), **overrides})
    torch.manual_seed(0)
    return GRMForSequenceClassification.from_base(lm.to(dtype)).to(dtype).train()


def pair(prompt, chosen, rejected, **more):
    ids = {"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected]}
    return {**ids, "chosen_start": len(prompt), "rejected_start": len(prompt), **more}


def some_pairs(seed=0, vocab_size=101):
    draw = lambda n: [generator.randrange(3, vocab_size) for _ in range(n)]  # noqa: E731
    generator = random.Random(seed)
    long, common = draw(20), draw(9)
    return [
        pair(long, draw(7), draw(12)),
        pair(long, draw(1), draw(3)),  # the prompt of the pair before
        pair([], draw(4), draw(6)),  # no prompt
        pair(draw(11), common + draw(2), common + draw(3)),  # responses that begin alike
        pair(draw(12), common, common + draw(4)),  # one the beginning of the other
        pair(draw(2), draw(5), draw(5)),  # a prompt too short to share
    ]


def step(model, pairs, layout, text="both", alpha=0.5, **collator):
    """Loss, rewards, log-probabilities and all gradients of one training step."""
    batch = PairCollator(0, layout, text, **collator)(pairs)
    n = len(pairs)
    lm_fn = None
    if text != "none":

        def text_part(sums):
            return text_loss("sft" if text == "chosen" else "dpo_noref", 0.1, sums[:n], rejected_logps=sums[n:]).mean()

        tokens = batch["text_index"], batch["text_targets"], batch["text_owner"]
        lm_fn = lambda hidden, m: sequence_logps(hidden, m, *tokens, 2 * n, text_part)  # noqa: E731
    model.zero_grad()
    if layout != "padded":
        serve_segments(model)
    out = model(**model_kwargs(batch), lm_fn=lm_fn)
    chosen, rejected = out.logits.squeeze(-1).chunk(2)
    loss = pair_loss(chosen, rejected).mean()
    if lm_fn is not None:
        loss = (1 - alpha) * loss + alpha * text_part(out.lm_output)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), out.logits.detach(), out.lm_output if lm_fn is None else out.lm_output.detach(), grads


def assert_same(found, right, rtol):
    for a, b in zip(found[:3], right[:3], strict=True):
        if b is not None:
            assert (a - b).norm() <= rtol * b.norm()
    assert found[3].keys() == right[3].keys()
    scale = torch.stack([g.norm() for g in right[3].values()]).norm()
    # Some are zero but for rounding: a bias that shifts both rewards, all where responses are equal.
    floor = 1e-2 * scale.clamp(min=1e-2)
    for name, b in right[3].items():
        assert (found[3][name] - b).norm() <= rtol * (b.norm() + floor), name


FAMILIES = """llama qwen2 qwen3 mistral gemma2 gemma3_text gpt_neox phi phi3 gpt2 olmo2 granite cohere opt mixtral
qwen3_moe""".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_padded(family):
    model = grm(family)
    assert resolve_layout("auto", model, pytest.fail) == "shared_prefix"
    right = step(model, some_pairs(), "padded")
    for layout in ONE_ROW:
        assert_same(step(model, some_pairs(), layout), right, 1e-5)


@pytest.fixture
def all_in_float64(monkeypatch):
    """Norms that compute in float32 whatever they are given would hide what happens beyond its seventh digit."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox", "phi3", "gpt2"])
def test_equal_to_padded_in_float64(family, all_in_float64):
    model = grm(family, torch.double)
    right = step(model, some_pairs(), "padded")
    for layout in ONE_ROW:
        assert_same(step(model, some_pairs(), layout), right, 1e-10)


@pytest.mark.parametrize("text", ["none", "chosen"])
def test_equal_to_padded_for_each_text_loss(text):
    model = grm()
    right = step(model, some_pairs(), "padded", text)
    for layout in ONE_ROW:
        assert_same(step(model, some_pairs(), layout, text), right, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing(family, reentrant):
    right = step(grm(family), some_pairs(), "padded")
    model = grm(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for layout in ONE_ROW:
        assert_same(step(model, some_pairs(), layout), right, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing):
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=["score"], init_lora_weights=False
    )
    model = get_peft_model(grm(), config)
    right = step(model, some_pairs(), "padded")
    assert sum("lora" in name for name in right[3]) > 20
    assert resolve_layout("auto", model, pytest.fail) == "shared_prefix"
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layout in ONE_ROW:
        assert_same(step(model, some_pairs(), layout), right, 1e-5)


def test_autocast():
    """bfloat16 rounds at other places in each layout: both are as near to float32."""
    model = grm()
    right = step(model, some_pairs(), "padded")
    errors = {}
    for layout in layouts.LAYOUTS:
        with torch.autocast("cpu", torch.bfloat16):
            found = step(model, some_pairs(), layout)
        errors[layout] = sum((found[3][name] - g).norm() ** 2 for name, g in right[3].items()) ** 0.5
    assert 0 < max(errors.values()) <= 1.5 * errors["padded"]


tokens = st.lists(st.integers(3, 8), max_size=12)  # few different tokens: prefixes meet by chance
some = st.lists(st.integers(3, 8), min_size=1, max_size=12)


@st.composite
def batches(draw):
    prompts = draw(st.lists(tokens, min_size=1, max_size=2))
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        chosen, rejected = draw(some), draw(some)
        kind = draw(st.sampled_from(["free", "common start", "prefix", "equal"]))
        if kind == "common start":
            start = draw(some)
            chosen, rejected = start + chosen, start + rejected
        elif kind == "prefix":
            rejected = chosen + rejected
        elif kind == "equal":
            rejected = chosen
        if draw(st.booleans()):
            chosen, rejected = rejected, chosen
        pairs.append(pair(draw(st.sampled_from(prompts)), chosen, rejected))
    return pairs


@pytest.mark.parametrize("shared_from", [1, 8])
def test_equal_to_padded_whatever_the_lengths(shared_from, monkeypatch, all_in_float64):
    monkeypatch.setattr(layouts, "MIN_SHARED", shared_from)
    models = [grm(family, torch.double) for family in ("gpt_neox", "mistral")]

    @settings(max_examples=40, deadline=None)
    @given(batches(), st.sampled_from(models), st.sampled_from([None, 8]))
    def check(pairs, model, multiple):
        right = step(model, pairs, "padded")
        for layout in ONE_ROW:
            assert_same(step(model, pairs, layout, pad_to_multiple_of=multiple), right, 1e-10)

    check()


# ---------------------------------------------------------------------------------------------------------- collator


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("margin", [False, True])
def test_padded_is_byte_for_byte_trls(multiple, margin):
    pairs = [p | ({"margin": i / 3} if margin else {}) for i, p in enumerate(some_pairs())]
    wanted = DataCollatorForPreference(pad_token_id=7, pad_to_multiple_of=multiple)(pairs)
    found = PairCollator(7, pad_to_multiple_of=multiple)(pairs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name])


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_indices_name_the_right_tokens(layout):
    pairs = [p | {"ref_chosen_logps": -i, "ref_rejected_logps": -10.0 - i} for i, p in enumerate(some_pairs())]
    batch = PairCollator(0, layout, "both", pad_to_multiple_of=16)(pairs)
    assert batch["input_ids"].shape[1] % 16 == 0
    flat = batch["input_ids"].flatten().tolist()
    sequences = [p["chosen_ids"] for p in pairs] + [p["rejected_ids"] for p in pairs]
    starts = [p["chosen_start"] for p in pairs] + [p["rejected_start"] for p in pairs]
    if layout != "padded":
        assert [flat[i] for i in batch["read_index"]] == [ids[-1] for ids in sequences]
        positions = batch["position_ids"].flatten()[batch["read_index"]]
        assert positions.tolist() == [len(ids) - 1 for ids in sequences]
    for i, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        mine = batch["text_owner"] == i
        # the first token of a response without prompt has nothing to be predicted from
        assert batch["text_targets"][mine].tolist() == ids[max(start, 1) :]
        assert [flat[j] for j in batch["text_index"][mine]] == ids[max(start, 1) - 1 : -1]
    assert batch["text_owner"].tolist() == sorted(batch["text_owner"].tolist())
    assert batch["ref_logps"].tolist() == [-i for i in range(6)] + [-10.0 - i for i in range(6)]
    chosen = PairCollator(0, layout, "chosen")(pairs)
    assert set(chosen["text_owner"].tolist()) == set(range(6))


def test_a_prefix_stands_once():
    a, b, c, d = [1] * 10, [2] * 9, [3] * 5, [4] * 7
    forest = plant([a + b + c, a + b + d, a + c, d, a + b])
    assert len(forest.ids) == len(a) + len(b) + len(c) + len(d) + len(c) + len(d)
    assert len(plant([a + b + c, a + b + d, a + c, d, a + b], share=False).ids) == 24 + 26 + 15 + 7 + 19


def test_prompts_are_not_read_by_the_language_model_head():
    pairs = some_pairs()
    responses = sum(len(p["chosen_ids"]) - max(p["chosen_start"], 1) for p in pairs)
    for layout in layouts.LAYOUTS:
        assert len(PairCollator(0, layout, "chosen")(pairs)["text_index"]) == responses


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_batches_of_so_many_tokens(layout):
    """In order, as many pairs as fit, each exactly once; a pair that does not fit is alone."""
    generator = random.Random(0)
    draw = lambda n: [generator.randrange(3, 10_000) for _ in range(n)]  # noqa: E731
    sizes = [(10, 5, 5), (12, 3, 9), (40, 20, 30), (8, 2, 1), (9, 4, 4), (16, 8, 2), (8, 1, 1), (8, 1, 1)]
    pairs = [pair(draw(p), draw(c), draw(r), margin=float(i)) for i, (p, c, r) in enumerate(sizes)]

    def tokens(part):
        if layout == "padded":
            return 2 * len(part) * max(p + max(c, r) for p, c, r in part)
        return sum((1 if layout == "shared_prefix" else 2) * p + c + r for p, c, r in part)

    collator = PairCollator(0, layout, "both")
    parts = PairCollator(0, layout, "both", max_tokens=64)(pairs)["parts"]
    counts = [len(part["margin"]) for part in parts]
    assert torch.cat([part["margin"] for part in parts]).tolist() == list(range(len(pairs)))
    at = 0
    for part, count in zip(parts, counts, strict=True):
        assert part["input_ids"].numel() == tokens(sizes[at : at + count])
        assert tokens(sizes[at : at + count]) <= 64 or count == 1
        assert tokens(sizes[at : at + count + 1]) > 64 or at + count == len(sizes)
        for name, value in collator(pairs[at : at + count]).items():
            assert torch.equal(part[name], value)
        at += count
    assert len({*counts}) > 1 and tokens(sizes[2:3]) > 64
    (whole,) = PairCollator(0, layout, "both", max_tokens=10**6)(pairs)["parts"]
    assert all(torch.equal(whole[name], value) for name, value in collator(pairs).items())


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_batch_that_is_full_enough_takes_only_texts_that_share_its_beginning(layout):
    prompt = list(range(100, 100 + layouts.MIN_SHARED))
    texts = [[1, i] * 8 for i in range(6)] + [[*prompt, i] for i in range(9)]
    texts = sorted([i, *text] if i < 6 else text for i, text in enumerate(texts))
    batches = layouts.LAYOUTS[layout].batches(texts, 10**6, 1, 40)
    assert sorted(i for members in batches for i in members) == list(range(15))
    sizes = [len(members) for members in batches]
    if layout == "padded":
        widths = [max(len(texts[i]) for i in members) for members in batches]
        assert all(count == 1 or count * width <= 40 for count, width in zip(sizes, widths, strict=True))
    elif layout == "shared_prefix":
        assert sizes == [3, 3, 9]  # 17 tokens each; then the prompt once and 9 tokens
    else:
        assert sizes == [3, 3, 5, 4]
    (whole,) = layouts.LAYOUTS[layout].batches(texts, 10**6, 1)
    assert len(whole) == 15


def test_unknown_names():
    with pytest.raises(ValueError, match="layout='rows'"):
        PairCollator(0, layout="rows")
    with pytest.raises(ValueError, match="layout='auto'"):
        PairCollator(0, layout="auto")
    with pytest.raises(ValueError, match="text='all'"):
        PairCollator(0, text="all")
    with pytest.raises(ValueError, match="layout='rows'"):
        resolve_layout("rows", None)


# ------------------------------------------------------------------------------------------------------- silent traps


def run(model, batch):
    serve_segments(model)
    inputs = model_kwargs(batch)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    return model(inputs_embeds=embeddings, **inputs).logits.squeeze(-1), embeddings


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("layout", ONE_ROW)
def test_chosen_is_not_seen_by_rejected(layout, family):
    """Bit for bit, and with gradients that are exactly zero; but the prompt is seen by both."""
    model = grm(family)
    prompt, chosen, rejected = list(range(10, 20)), list(range(20, 26)), list(range(30, 35))
    first, second = pair(prompt, chosen, rejected), pair(list(range(40, 50)), [50, 51], [52])
    changed = pair(prompt, [*chosen[:2], 60, *chosen[3:]], rejected)
    collator = PairCollator(0, layout)
    before, embeddings = run(model, collator([first, second]))
    after, _ = run(model, collator([changed, second]))
    assert after[0] != before[0]
    assert torch.equal(after[1:], before[1:])

    forest = plant([p[k] for k in ("chosen_ids", "rejected_ids") for p in (first, second)], layout == "shared_prefix")
    for i, path in enumerate(forest.paths):
        (grad,) = torch.autograd.grad(before[i], embeddings, retain_graph=True)
        seen = grad[0].abs().sum(-1) > 0
        others = torch.ones_like(seen)
        others[path] = False
        assert not seen[others].any()
        # a window of 4 in each of 2 layers reaches back 7 tokens
        assert seen[path[-6:]].all()


def test_caching_does_not_join_sequences():
    """`use_cache` left on makes transformers give up the separation of packed sequences; it must not ours."""
    model = grm()
    batch = PairCollator(0, "shared_prefix")(some_pairs())
    serve_segments(model)
    alone = model(**model_kwargs(batch)).logits
    cached = model(**model_kwargs(batch), use_cache=True).logits
    assert torch.equal(alone, cached)


@pytest.mark.parametrize(
    ("attention", "family"), [("sdpa", "llama"), ("eager", "llama"), ("sdpa", "gpt2"), ("eager", "gemma2")]
)
def test_every_attention_serves_both_kinds_of_batch(attention, family):
    """Padded ones by what was there, to the last bit; also where the attention is set after the layout."""
    model = grm(family)
    resolve_layout("auto", model)
    model.set_attn_implementation(attention)
    serve_segments(model)
    right = step(model, some_pairs(), "padded")
    for layout in ONE_ROW:
        assert_same(step(model, some_pairs(), layout), right, 1e-5)
    assert model.config._attn_implementation == attention


def unserved(monkeypatch):
    """transformers as it is where nothing of ours was called."""
    from transformers.models.llama import modeling_llama

    functions = AttentionInterface._global_mapping
    monkeypatch.setitem(functions, "sdpa", inspect.unwrap(functions["sdpa"]))
    eager = inspect.unwrap(modeling_llama.eager_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batches_keep_their_bits(attention, monkeypatch):
    batch = PairCollator(0)(some_pairs())
    with monkeypatch.context() as patch:
        unserved(patch)
        model = grm()
        model.set_attn_implementation(attention)
        before = model(**model_kwargs(batch)).logits
        with pytest.raises(RuntimeError):  # a table is no mask, and this is not silent
            model(**model_kwargs(PairCollator(0, "shared_prefix")(some_pairs())))
        serve_segments(model)
        model(**model_kwargs(PairCollator(0, "shared_prefix")(some_pairs())))
        assert torch.equal(model(**model_kwargs(batch)).logits, before)


def test_dropped_rows_are_those_that_nobody_reads():
    """Where the output is read it is the same with and without `output_rows`."""
    model = grm()
    batch = PairCollator(0, "shared_prefix", "both")(some_pairs())
    inputs = model_kwargs(batch)
    read = lambda hidden, _: hidden.flatten(0, 1)[batch["text_index"]]  # noqa: E731
    serve_segments(model)
    part = model(**inputs, lm_fn=read)
    inputs.pop("output_rows")
    whole = model(**inputs, lm_fn=read)
    torch.testing.assert_close(part.logits, whole.logits)
    torch.testing.assert_close(part.lm_output, whole.lm_output)


# ------------------------------------------------------------------------------------------------- which layout, when


FALLBACK = {"bloom": "AttentionInterface", "falcon": "AttentionInterface"}


@pytest.mark.parametrize("family", FALLBACK)
def test_one_warning_and_padded(family):
    messages = []
    assert resolve_layout("auto", grm(family), messages.append) == "padded"
    assert len(messages) == 1 and FALLBACK[family] in messages[0] and "shared_prefix" in messages[0]
    assert resolve_layout("padded", grm(family), pytest.fail) == "padded"
    with pytest.warns(UserWarning, match="'packed' is not exact"):
        assert resolve_layout("packed", grm(family)) == "padded"


def test_an_attention_that_does_more_falls_back(monkeypatch):
    """A decoder that hands down an argument we do not know, and one whose window we would not be told."""
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mistral.modeling_mistral import MistralAttention

    messages = []
    forward = LlamaAttention.forward
    with monkeypatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", lambda self, *a, **k: forward(self, *a, s_aux=torch.ones(4), **k))
        assert resolve_layout("auto", grm(), messages.append) == "padded"
    assert "s_aux" in messages.pop()

    model = grm("mistral")
    forward_mistral = MistralAttention.forward

    def without_window(self, *args, **kwargs):
        config, self.config = self.config, type(self.config)(**{**self.config.to_dict(), "sliding_window": None})
        self.config._attn_implementation = config._attn_implementation
        try:
            return forward_mistral(self, *args, **kwargs)
        finally:
            self.config = config

    monkeypatch.setattr(MistralAttention, "forward", without_window)
    assert resolve_layout("auto", model, messages.append) == "padded"
    assert "sliding window" in messages.pop()


def test_a_wrong_attention_is_found_out(monkeypatch):
    """The trial run is not a formality."""
    right = attention._Plan.mask

    def everything(self, queries, keys, window, like):
        return torch.zeros_like(right(self, queries, keys, window, like))

    monkeypatch.setattr(attention._Plan, "mask", everything)
    messages = []
    assert resolve_layout("shared_prefix", grm(), messages.append) == "padded"
    assert "hidden states differed" in messages[0]


def test_resolving_leaves_no_trace():
    model = grm()
    model.lm.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    resolve_layout("auto", model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == model.lm.config._attn_implementation == "sdpa"


def hooks(model):
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]


def test_nothing_of_it_is_saved(tmp_path):
    model, other = grm(), grm()
    config = model.config.to_dict()
    resolve_layout("auto", model)
    assert model.config.to_dict() == config
    once = hooks(model)
    serve_segments(model)
    assert hooks(model) == once  # installed once
    model.save_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    right = step(other, some_pairs(), "padded")
    assert_same(step(copied, some_pairs(), "shared_prefix"), right, 1e-5)


def test_an_error_in_the_last_layer_leaves_nothing_behind():
    model = grm()
    resolve_layout("auto", model)
    mlp = model.model.layers[-1].mlp
    batch = PairCollator(0, "shared_prefix")(some_pairs())
    hidden = torch.randn(1, batch["input_ids"].shape[1], 32)
    right = mlp(hidden)
    hook = mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**model_kwargs(batch))
    hook.remove()
    assert torch.equal(mlp(hidden), right)


def test_an_adapter_on_a_model_that_served_before():
    """The adapter wraps parts of the last layer that have their hooks already."""
    model = grm()
    resolve_layout("auto", model)
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=["score"], init_lora_weights=False
    )
    model = get_peft_model(model, config)
    right = step(model, some_pairs(), "padded")
    serve_segments(model)
    assert_same(step(model, some_pairs(), "shared_prefix"), right, 1e-5)


# ------------------------------------------------------------------------------------------------- one row of a table


def test_a_new_layout_is_one_row_of_the_table(monkeypatch):
    """A layout that nobody has heard of trains and scores by its own row, and by no other one's."""

    class Wide(layouts.Padded):
        """Rows of a multiple of 24 tokens, two texts to a batch."""

        def lay_out(self, sequences, pad_token_id, multiple):
            return super().lay_out(sequences, pad_token_id, 24)

        def batches(self, texts, max_tokens, ranks, enough):
            return [list(range(i, min(i + 2, len(texts)))) for i in range(0, len(texts), 2)]

    monkeypatch.setitem(layouts.LAYOUTS, "wide", Wide())
    model = grm(vocab_size=400, max_position_embeddings=512)
    assert resolve_layout("wide", model) == "wide"
    assert_same(step(model, some_pairs(), "wide"), step(model, some_pairs(), "padded"), 1e-6)
    assert PairCollator(0, "wide")(some_pairs())["input_ids"].shape == (2 * len(some_pairs()), 48)
    shapes = []
    forward = GRMForSequenceClassification.forward

    def watched(self, input_ids=None, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    texts = ["one", "two three", "four"]
    expected = GRMScorer(model, chatml_tokenizer(), layout="padded").score(texts)
    monkeypatch.setattr(GRMForSequenceClassification, "forward", watched)
    assert GRMScorer(model, chatml_tokenizer(), layout="wide").score(texts) == pytest.approx(expected, abs=1e-6)
    assert shapes == [(2, 24), (1, 24)]


def test_no_other_file_compares_the_name_of_a_layout():
    names = rf"""["']({"|".join(layouts.LAYOUTS)})["']"""
    compared = re.compile(rf"[!=]= {names}|{names} [!=]=|in \([^()]*{names}")
    assert compared.search('layout == "packed"') and compared.search('layout not in ("auto", "padded")')
    files = (path for path in Path(layouts.__file__).parent.rglob("*.py") if path.name != "layouts.py")
    assert not [path for path in files if compared.search(path.read_text(encoding="utf-8"))]


# --------------------------------------------------------------------------------------- kernels on ragged batches


@pytest.mark.parametrize("window", [None, 4])
def test_ragged_form_is_the_same_attention(window):
    """What a CUDA kernel gets, run by a kernel of a few lines with the semantics of flash-attn's."""
    torch.manual_seed(0)
    batch = PairCollator(0, "shared_prefix")(some_pairs())
    count = batch["input_ids"].shape[1]
    query, key, value = (torch.randn(1, heads, count, 8) for heads in (4, 2, 2))
    mask = batch["segments"][None, None]
    right, _ = attention.segment_attention(torch.nn.Module(), query, key, value, mask, sliding_window=window)

    def kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, softmax_scale, causal, window_size, **_):
        assert causal and longest_q == ends_q.diff().max() and longest_k == ends_k.diff().max()
        left, _ = window_size
        out = torch.empty_like(q)
        for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
            for i in range(a, b):
                at = d - b + i  # lower right: the last query meets the last key
                first = c if left < 0 else max(c, at - left)
                for head in range(q.shape[1]):
                    scores = k[first : at + 1, head // 2] @ q[i, head] / 8**0.5
                    out[i, head] = scores.softmax(0) @ v[first : at + 1, head // 2]
        return out

    ragged = attention.plan_of(mask).ragged(query.device)
    found = attention._flash_attn(kernel, query, key, value, ragged, None, 0.0, window, None)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- blocks of queries

SEGMENTS = [[0, 150, 0, 0], [150, 140, 0, 130], [290, 70, 0, 0], [360, 90, 1, 200]]  # start, length, parent, shared


def attention_by_hand(query, key, value, sliding_window=None, softcap=None, scaling=None):
    """Query by query, in float64: `(1, tokens, heads, head_dim)`."""
    out, places = [], []
    for start, length, parent, shared in SEGMENTS:
        path = ([*places[parent]] if shared else [])[:shared]
        places.append([*path, *range(start, start + length)])
        for i in range(length):
            seen = places[-1][: len(path) + i + 1][-(sliding_window or 10**9) :]
            k, v = (x[0, :, seen].repeat_interleave(2, 0) for x in (key, value))  # (heads, seen, head_dim)
            scores = torch.einsum("hd,hsd->hs", query[0, :, start + i], k) * (scaling or query.shape[-1] ** -0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), v))
    return torch.stack(out)[None]


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 50}, {"softcap": 2.0}, {"scaling": 0.6}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), ("autocast", 2e-2)]
)
def test_blocks_of_queries_are_the_same_attention(dtype, tolerance, settings):
    """Segments longer than a block, with a prefix of a prefix: outputs and gradients."""
    torch.manual_seed(0)
    table = torch.tensor(SEGMENTS)[None, None]
    low = torch.bfloat16 if dtype == "autocast" else dtype
    exact = [torch.randn(1, heads, 450, 8).to(low).double().requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(1, 450, 4, 8).to(low).double()
    ours = [x.detach().to(torch.float32 if dtype == "autocast" else dtype).requires_grad_() for x in exact]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        found, _ = attention.segment_attention(torch.nn.Module(), *ours, table, **settings)
    right = attention_by_hand(*exact, **settings)
    assert found.dtype == low
    (found * weight.to(low)).sum().backward()
    (right * weight).sum().backward()
    for a, b in [(found, right), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_long_texts_in_bfloat16_keep_no_weights_for_the_backward(monkeypatch):
    calls = []
    products = attention._products
    monkeypatch.setattr(attention, "_products", lambda *args: calls.append(args[1].shape[2]) or products(*args))
    monkeypatch.setattr(attention, "PRODUCTS_KEYS", 160)
    table = torch.tensor(SEGMENTS)[None, None]
    given = [torch.randn(1, heads, 450, 8, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    kept, _ = attention.segment_attention(torch.nn.Module(), *given, table)
    assert calls == [128, 150, 70]
    calls.clear()
    with torch.no_grad():
        scored, _ = attention.segment_attention(torch.nn.Module().eval(), *given, table)
    assert calls == []  # torch's kernel is as fast where there is no backward, and rounds less
    torch.testing.assert_close(kept, scored, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_in_bfloat16_are_not_rounded(autocast):
    """Keys with a large bias, as Qwen2 has, add the same to every score: rounded to bfloat16, 200.4 is 200."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 64) for _ in range(3))
    query[..., 0], key[..., 0] = 20.0, 80.0
    exact = [x.bfloat16().double().requires_grad_() for x in (query, key, value)]
    ours = [x.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for x in exact]
    table = torch.tensor([[0, 300, 0, 0]])[None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = attention.segment_attention(torch.nn.Module(), *ours, table)
    right = F.scaled_dot_product_attention(*exact, is_causal=True).transpose(1, 2)
    assert found.dtype == torch.bfloat16
    assert (found.double() - right).norm() / right.norm() < 5e-3
    weight = torch.randn_like(found)
    found.backward(weight)
    right.backward(weight.double())
    for a, b in zip(ours, exact, strict=True):
        a, b = a.grad[..., 1:], b.grad[..., 1:]  # the gradient of the bias is a sum that cancels
        assert (a.double() - b).norm() / b.norm() < 2e-2


def test_checkpointing_drops_the_same_weights_twice():
    """The reentrant form runs the first pass without gradients, and a long text in bfloat16 has two ways then."""
    table = torch.tensor([[0, attention.PRODUCTS_KEYS + 100, 0, 0]])[None, None]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, attention.PRODUCTS_KEYS + 100, 8, dtype=torch.bfloat16) for _ in range(3))
    value.requires_grad_()

    def attend(value):
        return attention.segment_attention(torch.nn.Module(), query, key, value, table, dropout=0.5)[0]

    found = torch.utils.checkpoint.checkpoint(attend, value, use_reentrant=True)
    weight = torch.randn_like(found)
    found.backward(weight)  # attention is linear in the values
    through = (value.grad.double() * value.double()).sum().item()
    assert through == pytest.approx((found.double() * weight.double()).sum().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 900}, {"softcap": 2.0}], ids=str)
def test_memory_of_masks_grows_with_the_text_not_with_its_square(dtype, settings):
    tokens = attention.CAUSAL_KEYS + 200
    table = torch.tensor([[0, tokens, 0, 0], [tokens, 300, 0, tokens]])[None, None]
    given = [torch.randn(1, heads, tokens + 300, 8, dtype=dtype) for heads in (4, 2, 2)]
    attention.segment_attention(torch.nn.Module().eval(), *given, table, **settings)
    masks = attention.plan_of(table).masks.values()
    assert sum(mask.numel() for mask in masks) <= 2 * attention.PRODUCTS_BLOCK * (tokens + 300)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 1025), (torch.bfloat16, 600)], ids=str)
def test_long_causal_text_is_one_call(dtype, tokens, monkeypatch):
    """Torch's kernel leaves out what a long causal text does not see, and is faster than blocks then."""
    calls = []
    kernel = F.scaled_dot_product_attention
    spy = lambda q, *args, **kw: calls.append(q.shape[2]) or kernel(q, *args, **kw)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    table = torch.tensor([[0, tokens, 0, 0]])[None, None]
    given = [torch.randn(1, heads, tokens, 8, dtype=dtype) for heads in (4, 2, 2)]
    found, _ = attention.segment_attention(torch.nn.Module(), *given, table)
    assert calls == [tokens]
    exact = kernel(*(x.double() for x in given), is_causal=True, enable_gqa=True).transpose(1, 2)
    assert (found.double() - exact).norm() / exact.norm() < {torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]


# ------------------------------------------------------------------------------------------------------- arithmetic


def expected_flops(model, segments, read, head_tokens):
    """By hand: 6 operations a weight and token, forward and backward; attention over what each segment sees."""
    c = model.config.text_config
    head_dim = c.hidden_size // c.num_attention_heads
    keys_values = 2 * c.hidden_size * head_dim * c.num_key_value_heads
    others = 2 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size
    tokens = sum(length for _, length, _, _ in segments)
    last, before = keys_values * tokens + others * read, (keys_values + others) * tokens
    # 4 forward, 10 backward (scores are computed again); a block of queries meets the keys up to its last
    pairs = 0.0
    for _, length, _, shared in segments:
        for start in range(0, length, attention.BLOCK):
            end = min(start + attention.BLOCK, length)
            pairs += (end - start) * (shared + end) / (2 if shared + start == 0 else 1)
    seen = 14 * c.hidden_size * pairs * c.num_hidden_layers
    layers = last + before * (c.num_hidden_layers - 1)
    score = sum(p.numel() for p in model.score.parameters() if p.dim() == 2)
    return 6 * layers + seen + 6 * c.hidden_size * c.vocab_size * head_tokens, 6 * score


@pytest.mark.parametrize("text", ["none", "chosen", "both"])
def test_arithmetic_of_a_step(text):
    """No token twice, no padding; the last layer whole only where it is read; the head only on response tokens."""
    model = grm(vocab_size=500, max_position_embeddings=512)
    generator = random.Random(0)
    draw = lambda n: [generator.randrange(3, 500) for _ in range(n)]  # noqa: E731
    pairs = [pair(draw(n), draw(40), draw(30)) for n in (40, 60, 90, 90, 120, 140)]
    responses = {"none": 0, "chosen": 6 * 40, "both": 6 * 70}[text]
    cost = {}
    for layout in layouts.LAYOUTS:
        cost[layout] = flops(lambda layout=layout: step(model, pairs, layout, text))
    for layout in ONE_ROW:
        batch = PairCollator(0, layout, text)(pairs)
        read = len(batch["output_rows"])
        layers, score = expected_flops(model, batch["segments"].tolist(), read, responses)
        assert cost[layout] == pytest.approx(layers + 12 * score, rel=0.01)
    assert cost["shared_prefix"] < cost["packed"] < cost["padded"]
