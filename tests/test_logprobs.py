"""Log-probabilities of given tokens: against full logits, in value, gradient, memory and arithmetic."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_lm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from grm_hf import GRMForSequenceClassification, logprobs
from grm_hf.logprobs import sequence_logps
from grm_hf.losses import TEXT_LOSSES, text_loss


B = 5
OWNERS = torch.tensor([0] * 3 + [1] * 9 + [2] + [4] * 4 + [5] * 2 + [6] + [8] * 11 + [9] * 2)  # 3 and 7 are empty
PLACES = 40


def model_of(family, dtype=torch.float64, **overrides):
    return GRMForSequenceClassification.from_base(tiny_lm(family, **overrides).to(dtype))


def case(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, PLACES // 2, model._read_width(), generator=generator, dtype=torch.float64)
    index = torch.randint(PLACES, OWNERS.shape, generator=generator)  # with repetitions, as shared prompts give
    targets = torch.randint(model.config.vocab_size, OWNERS.shape, generator=generator)
    return hidden.to(model.lm.dtype).requires_grad_(), index, targets


def loss_of(kind):
    counts = torch.bincount(OWNERS, minlength=2 * B)[:B]
    reference = torch.linspace(-30, -10, 2 * B)

    def loss(sums):
        ref = reference.to(sums.dtype)
        return text_loss(kind, 0.1, sums[:B], counts, sums[B:], ref[:B], ref[B:]).mean()

    return loss


def expected(hidden, model, index, targets):
    """The whole matrix of logits, one token at a time summed up in Python."""
    logps = torch.log_softmax(model.lm_logits(hidden.flatten(0, 1)), -1)
    sums = [logps.new_zeros(()) for _ in range(2 * B)]
    for place, target, owner in zip(index.tolist(), targets.tolist(), OWNERS.tolist(), strict=True):
        sums[owner] = sums[owner] + logps[place, target]
    return torch.stack(sums)


def gradients(value, model, hidden):
    learn = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, [hidden, *learn.values()], allow_unused=True)
    return {n: g for n, g in zip(["hidden", *learn], found, strict=True) if g is not None and g.abs().sum() > 0}


def assert_same(found, right, rtol):
    assert found.keys() == right.keys()
    for name in right:
        difference = (found[name] - right[name]).norm() / right[name].norm()
        assert difference <= rtol, (name, difference)


@pytest.fixture
def linear_chunks(monkeypatch):
    """One entry for each chunk of logits that the way for plain linear heads computes."""
    calls = []
    compute = logprobs._Chunks.compute
    monkeypatch.setattr(logprobs._Chunks, "compute", lambda *args: (calls.append(1), compute(*args))[1])
    return calls


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize("hint", [True, False])
@pytest.mark.parametrize("kind", TEXT_LOSSES)
def test_equal_to_full_logits(kind, hint, rows, monkeypatch):
    monkeypatch.setattr(logprobs, "ROWS", rows)
    model = model_of("llama")
    hidden, index, targets = case(model)
    loss = loss_of(kind)
    right = expected(hidden, model, index, targets)
    found = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss if hint else None)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    assert (found[[3, 7]] == 0).all()
    # the factor stands for alpha, accumulation and loss scaling
    assert_same(gradients(0.3 * loss(found), model, hidden), gradients(0.3 * loss(right), model, hidden), 1e-12)


@pytest.mark.parametrize("family", ["llama_tied", "phi", "gemma2", "cohere", "granite", "opt_projected"])
def test_every_kind_of_head(family, monkeypatch):
    monkeypatch.setattr(logprobs, "ROWS", 8)
    model = model_of(family)
    hidden, index, targets = case(model)
    loss = loss_of("dpo")
    right = expected(hidden, model, index, targets)
    found = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss)
    torch.testing.assert_close(found, right, rtol=1e-6 if family == "gemma2" else 1e-12, atol=0)
    assert_same(gradients(loss(found), model, hidden), gradients(loss(right), model, hidden), 1e-6)


def test_heads_that_scale_are_not_taken_for_plain_ones(linear_chunks):
    for family, linear in {"llama": True, "phi": True, "gemma2": False, "cohere": False, "granite": False}.items():
        model = model_of(family)
        hidden, index, targets = case(model)
        linear_chunks.clear()
        sequence_logps(hidden, model, index, targets, OWNERS, 2 * B)
        assert bool(linear_chunks) == linear, family


def test_adapter_on_the_head(monkeypatch):
    monkeypatch.setattr(logprobs, "ROWS", 8)
    model = model_of("llama")
    get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    hidden, index, targets = case(model)
    loss = loss_of("sft")
    right = expected(hidden, model, index, targets)
    found = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss)
    grads = gradients(loss(right), model, hidden)
    assert sum("lora" in name for name in grads) == 2
    assert_same(gradients(loss(found), model, hidden), grads, 1e-10)


def test_frozen_head_takes_any_loss_without_computing_twice(linear_chunks):
    model = model_of("llama")
    model.lm.lm_head.requires_grad_(False)
    hidden, index, targets = case(model)
    found = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B)
    right = expected(hidden, model, index, targets)
    mixed = lambda sums: sums.pow(2).sum() * sums[0] + sums.prod()  # noqa: E731  not a sum over pairs
    assert_same(gradients(mixed(found + 1), model, hidden), gradients(mixed(right + 1), model, hidden), 1e-12)
    assert len(linear_chunks) == 1


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_wrong_hint_changes_nothing(kind):
    model = model_of("llama")
    hidden, index, targets = case(model)
    found = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss_of("sft_nll"))
    right = expected(hidden, model, index, targets)
    loss = loss_of(kind)
    assert_same(gradients(loss(found), model, hidden), gradients(loss(right), model, hidden), 1e-12)


def test_second_backward():
    model = model_of("llama")
    hidden, index, targets = case(model)
    loss = loss_of("dpo")
    value = loss(sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss))
    weight = model.lm.lm_head.weight
    first = [g.clone() for g in torch.autograd.grad(value, [hidden, weight], retain_graph=True)]
    second = torch.autograd.grad(5 * value, [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(5 * a, b, rtol=1e-10, atol=1e-14)


def test_no_gradient_and_no_tokens():
    model = model_of("llama")
    hidden, index, targets = case(model)
    with torch.no_grad():
        found = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss_of("sft"))
    assert not found.requires_grad
    torch.testing.assert_close(found, expected(hidden, model, index, targets).detach(), rtol=1e-12, atol=0)
    for family in ("llama", "gemma2"):
        model = model_of(family)
        hidden, index, targets = case(model)
        empty = torch.zeros(0, dtype=torch.long)
        sums = sequence_logps(hidden, model, empty, empty, empty, 2 * B, lambda s: s.sum())
        assert sums.tolist() == [0.0] * 2 * B
        if sums.requires_grad:
            grads = torch.autograd.grad(sums.sum(), [hidden, model.lm.lm_head.weight])
            assert all((g == 0).all() for g in grads)


def test_very_unlikely_tokens_are_finite():
    """A probability far below the smallest float32 still has a logarithm."""
    model = model_of("llama", torch.float32)
    hidden, index, targets = case(model)
    with torch.no_grad():
        hidden.mul_(300)
    right = expected(hidden.double(), model.double(), index, targets)
    model.float()
    found = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss_of("sft_nll"))
    assert right.min() < -1000
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16(weights):
    """Autocast over float32 weights, and bfloat16 weights: as near to float64 as full logits are."""
    model = model_of("llama", weights)
    hidden, index, targets = case(model)
    loss = loss_of("dpo_noref")
    exact = model_of("llama").requires_grad_()
    exact.lm.lm_head.weight.data.copy_(model.lm.lm_head.weight)
    hidden_64 = hidden.detach().double().requires_grad_()
    right = gradients(loss(expected(hidden_64, exact, index, targets)), exact, hidden_64)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        sums = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss)
        assert sums.dtype == torch.float32
        value = loss(sums)
    found = gradients(value, model, hidden)
    assert all(found[name].dtype == weights for name in found)
    assert_same({name: g.double() for name, g in found.items()}, right, 2e-2)


class Outputs(TorchDispatchMode):
    """Rows of every result as wide as the vocabulary, the head's weight and its gradient aside."""

    def __init__(self, weight):
        super().__init__()
        self.vocab_size, self.transposed = len(weight), weight.T.shape
        self.rows, self.products = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor) or tensor.shape == self.transposed:
                continue
            if tensor.dim() and tensor.shape[-1] == self.vocab_size:
                self.rows.append(tensor.numel() // self.vocab_size)
                if "mm" in func.__name__:
                    self.products.append(self.rows[-1])
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_only_the_asked_tokens_and_only_a_chunk_at_a_time(family, monkeypatch):
    monkeypatch.setattr(logprobs, "ROWS", 12)
    model = model_of(family, torch.float32)
    hidden, index, targets = case(model)
    loss = loss_of("dpo")
    sequence_logps(hidden, model, index, targets, OWNERS, 2 * B)  # the check of the head happens once
    with Outputs(model.lm.lm_head.weight) as seen:
        sums = sequence_logps(hidden, model, index, targets, OWNERS, 2 * B, loss)
    assert max(seen.rows) <= 12
    assert sum(seen.products) == len(index)
    with Outputs(model.lm.lm_head.weight) as seen:
        loss(sums).backward()
    assert max(seen.rows, default=0) <= 12


def peak_bytes(run):
    """Largest sum of live allocations while `run` runs, as torch's allocator tells it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Head(torch.nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.head = torch.nn.Linear(width, vocab_size, bias=False)
        self.lm_logits = self.head.forward

    def get_output_embeddings(self):
        return self.head


def test_memory_and_arithmetic():
    """N tokens cost 6 N V d operations, forward and backward, and a chunk of logits beside the gradients."""
    width, vocab_size, tokens, pairs = 32, 4096, 1024, 32
    model = Head(vocab_size, width)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    index, targets = torch.arange(tokens), torch.randint(vocab_size, (tokens,))
    owner = index // (tokens // pairs)
    loss = lambda sums: text_loss("sft", 0.1, sums[:pairs]).mean()  # noqa: E731

    def step(hint):
        hidden.grad = model.head.weight.grad = None
        loss(sequence_logps(hidden, model, index, targets, owner, 2 * pairs, hint)).backward()

    step(loss)
    peak = peak_bytes(lambda: step(loss))
    gradients = 4 * (vocab_size * width + tokens * width)
    assert peak - gradients <= 1.1 * 256 * vocab_size * 4 + 4 * tokens * width
    for hint, products in ((loss, 3), (None, 4)):
        with FlopCounterMode(display=False) as counter:
            step(hint)
        assert counter.get_total_flops() == products * 2 * tokens * vocab_size * width
