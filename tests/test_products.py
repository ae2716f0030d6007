"""Matrix products on oneDNN: equal up to rounding, for one thread, for nobody else, and only where it helps."""

import copy
import pickle
import threading

import pytest
import torch
from tiny import chat_grm, llama_tokenizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grm_hf import GRMScorer
from grm_hf import products as module
from grm_hf.products import PACK_AFTER, PACK_BYTES, PackedWeights, mkl_is_slow, quick_products


CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def on_amd(monkeypatch):
    monkeypatch.setattr(module, "mkl_is_slow", lambda: True)


def active():
    return any(isinstance(mode, module._OneDNN) for mode in torch.overrides._get_current_function_mode_stack())


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 64), (3, 100, 64), (1, 64)])
def test_products_are_equal_up_to_rounding(on_amd, bias, shape):
    layer, x = nn.Linear(64, 96, bias=bias), torch.randn(shape)
    expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad(), quick_products(CPU, 300):
        assert active()
        found = layer(x)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5


@needs_onednn
def test_operations_are_counted_alike(on_amd):
    layer, x = nn.Linear(64, 96), torch.randn(2, 150, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, quick_products(CPU, 300):
        layer(x)
    assert counter.get_total_flops() == 2 * 300 * 64 * 96


@needs_onednn
def test_other_dtypes_gradients_and_short_batches_are_left_alone(on_amd):
    called = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: called.append(given[0].dtype))
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            layer, x = nn.Linear(8, 4).to(dtype), torch.randn(5, 8, dtype=dtype)
            expected = layer(x)
            with quick_products(CPU, 300):
                found = layer(x)
            assert dtype == torch.float32 or torch.equal(found, expected)
    assert called == [torch.float32]
    with torch.no_grad(), quick_products(CPU, 255):
        assert not active()
    with quick_products(CPU, 300):
        assert not active()  # gradients are wanted
    with torch.no_grad(), quick_products(torch.device("cuda"), 300):
        assert not active()


@needs_onednn
def test_autocast_decides_about_the_dtype(on_amd):
    layer, x = nn.Linear(64, 96), torch.randn(300, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with quick_products(CPU, 300, PackedWeights()):
            found = layer(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.fixture
def packed(monkeypatch, on_amd):
    """Packs at once; it has the shapes that were packed."""
    packed, pack = PackedWeights(), torch.ops.mkldnn._reorder_linear_weight
    packed.tokens, packed.shapes = PACK_AFTER, []
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_reorder_linear_weight",
        lambda weight, *rest: packed.shapes.append(tuple(weight.shape)) or pack(weight, *rest),
    )
    return packed


def packed_linear(layer, x, packed):
    with torch.no_grad(), quick_products(CPU, 300, packed):
        return layer(x)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_give_the_same_numbers(packed, dtype, threads, bias):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer, x = nn.Linear(192, 96, bias=bias).to(dtype), torch.randn(3, 100, 192).to(dtype)
        exact = nn.functional.linear(x.double(), *(part.detach().double() for part in layer.parameters()))
        plain = (packed_linear(layer, x, None) - exact).abs().max()
        for _ in range(2):
            assert (packed_linear(layer, x, packed) - exact).abs().max() <= 1.5 * plain + 1e-7
    finally:
        torch.set_num_threads(before)
    assert packed.shapes == [(96, 192)] and packed.bytes == layer.weight.nbytes
    with torch.no_grad(), FlopCounterMode(display=False) as counter, quick_products(CPU, 300, packed):
        layer(x)
    assert counter.get_total_flops() == 2 * 300 * 192 * 96


@needs_onednn
def test_a_weight_that_changed_is_packed_again(packed):
    layer, x = nn.Linear(64, 8, bias=False), torch.randn(300, 64)
    packed_linear(layer, x, packed)

    def trained():
        layer(x).sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()

    def merged():
        layer.weight.data += 1

    def loaded():
        layer.load_state_dict({"weight": torch.randn(8, 64)})

    for number, change in enumerate((trained, merged, loaded, lambda: layer.to(torch.bfloat16)), start=2):
        change()
        found = packed_linear(layer, x.to(layer.weight.dtype), packed)
        expected = layer(x.to(layer.weight.dtype))
        assert torch.allclose(found, expected, atol=1e-5 if number < 5 else 0.1) and len(packed.shapes) == number
    assert packed.bytes == 8 * 64 * 4
    with torch.inference_mode():
        unversioned = torch.randn(8, 64)
    assert packed.of(unversioned) is None


@needs_onednn
def test_packing_waits_and_has_a_limit(packed, monkeypatch):
    layer, x = nn.Linear(64, 8), torch.randn(300, 64)
    packed.tokens = PACK_AFTER - 300
    packed_linear(layer, x, packed)
    assert not packed.shapes and packed.tokens == PACK_AFTER
    packed_linear(layer, x, packed)
    assert packed.shapes == [(8, 64)]
    monkeypatch.setattr(module, "PACK_BYTES", packed.bytes + 10)
    packed_linear(nn.Linear(64, 16), x, packed)
    assert packed.shapes == [(8, 64)] and PACK_BYTES == 2**30
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert (copied.tokens, copied.bytes) == (0, 0)


@needs_onednn
def test_a_scorer_packs_what_it_loaded(packed, monkeypatch, tmp_path):
    tokenizer = llama_tokenizer()
    model = chat_grm(tokenizer, head_hidden_size=16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(module, "MIN_TOKENS", 1)
    monkeypatch.setattr(module, "PACK_AFTER", 100)
    chats = [{"prompt": "one " * 20, "response": "two " * n} for n in range(1, 9)]
    expected = GRMScorer(model, tokenizer).score(chats)
    assert GRMScorer(str(tmp_path), deterministic=True).score(chats) == pytest.approx(expected, abs=2e-6)
    assert not packed.shapes  # a live model, and one text alone
    scorer = GRMScorer(str(tmp_path))
    state = {name: tensor.clone() for name, tensor in scorer.model.state_dict().items()}
    found = [scorer.score(chats) for _ in range(3)]
    assert len(packed.shapes) == len(set(scorer.packed._copies)) > 7
    for rewards in found:
        assert rewards == pytest.approx(expected, abs=2e-6)
    assert all(torch.equal(tensor, state[name]) for name, tensor in scorer.model.state_dict().items())
    several = []
    threads = [threading.Thread(target=lambda: several.append(scorer.score(chats))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(several) == 4 and all(rewards == pytest.approx(expected, abs=2e-6) for rewards in several)


def test_other_processors_are_left_alone(monkeypatch):
    monkeypatch.setattr(module.Path, "read_text", lambda *_, **__: "vendor_id\t: GenuineIntel\n")
    assert not mkl_is_slow.__wrapped__()
    monkeypatch.setattr(module, "mkl_is_slow", mkl_is_slow.__wrapped__)
    with torch.no_grad(), quick_products(CPU, 10**6):
        assert not active()


@needs_onednn
def test_other_threads_and_the_model_are_left_alone(on_amd):
    layer, x, seen = nn.Linear(64, 8), torch.randn(300, 64), []
    state = dict(layer.__dict__)
    with torch.no_grad(), quick_products(CPU, 300):
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
        layer(x)
    assert seen == [False] and not active() and layer.__dict__ == state
    with torch.no_grad():
        layer.weight.data.zero_()  # nothing was kept of the weights
        with quick_products(CPU, 300):
            assert torch.equal(layer(x), layer.bias.expand(300, 8))


@needs_onednn
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_scores(on_amd, monkeypatch, layout):
    tokenizer = llama_tokenizer()
    model = chat_grm(tokenizer, head_hidden_size=16)
    chats = [{"prompt": "one " * 20, "response": "two " * n} for n in range(1, 9)]
    scorer = GRMScorer(model, tokenizer, layout=layout)
    seen = []
    hook = model.model.register_forward_pre_hook(lambda *_: seen.append(active()))
    monkeypatch.setattr(module, "MIN_TOKENS", 1)
    found = scorer.score(chats)
    hook.remove()
    assert seen and all(seen)
    monkeypatch.setattr(module, "mkl_is_slow", lambda: False)
    expected = scorer.score(chats)
    assert found == pytest.approx(expected, abs=2e-6)


def test_a_scorer_in_bfloat16(tmp_path):
    tokenizer = llama_tokenizer()
    model = chat_grm(tokenizer, head_hidden_size=16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = GRMScorer(str(tmp_path), dtype="bfloat16")
    assert scorer.model.lm.dtype == torch.bfloat16
    assert {part.dtype for part in scorer.model.score.parameters()} == {torch.float32}
    chats = [{"prompt": "one", "response": "two " * n} for n in range(1, 5)]
    exact, found = GRMScorer(str(tmp_path)).score(chats), scorer.score(chats)
    assert found != exact and found == pytest.approx(exact, abs=5e-2)
    with pytest.raises(ValueError, match="live one, so .'dtype'. cannot be applied"):
        GRMScorer(model, tokenizer, dtype="bfloat16")
