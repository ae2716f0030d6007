"""Parity of the losses with the paper's formulas (research notes A2, A9.1, A9.2): `ours` against `theirs`, which is
written a second time here, with numpy and plain loops, in float64."""

import math

import numpy as np
import pytest
import torch

from grm_hf import losses


B = 7
GENERATOR = torch.Generator().manual_seed(0)


def draw(scale=1.0):
    return torch.randn(B, generator=GENERATOR, dtype=torch.float64) * scale


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def their_pair_loss(kind, chosen, rejected, margin, smoothing):
    values = []
    for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True):
        z = c - r - (m if kind == "margin" else 0)
        value = -(1 - smoothing) * math.log(sigmoid(z)) - smoothing * math.log(sigmoid(-z))
        values.append(m * value if kind == "scaled" else value)
    return values


@pytest.mark.parametrize("kind", losses.PAIR_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pair_losses_equal_theirs(kind, smoothing):
    chosen, rejected, margin = draw(), draw(), draw().abs()
    ours = losses.pair_loss(chosen, rejected, margin, kind, smoothing)
    assert ours.tolist() == pytest.approx(their_pair_loss(kind, chosen, rejected, margin, smoothing), rel=1e-12)


def test_scaled_with_unit_margin_is_bradley_terry():
    chosen, rejected = draw(), draw()
    assert torch.equal(
        losses.pair_loss(chosen, rejected, torch.ones(B, dtype=torch.float64), "scaled"),
        losses.pair_loss(chosen, rejected),
    )


@pytest.mark.parametrize("kind", ["margin", "scaled"])
def test_a_margin_is_required_where_the_loss_uses_it(kind):
    with pytest.raises(ValueError, match="no `margin` column"):
        losses.pair_loss(draw(), draw(), None, kind)


def their_text_loss(kind, beta, c, r, ref_c, ref_r, tokens):
    if kind == "sft":
        return -math.log(sigmoid(beta * c))
    if kind == "sft_nll":
        return -c
    if kind == "sft_token_mean":
        return -c / tokens
    if kind == "dpo_noref":
        return -math.log(sigmoid(beta * (c - r)))
    assert kind == "dpo", kind
    return -math.log(sigmoid(beta * ((c - r) - (ref_c - ref_r))))


@pytest.mark.parametrize("kind", losses.TEXT_LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_text_losses_equal_theirs(kind, beta):
    c, r, ref_c, ref_r = (-draw(30).abs() for _ in range(4))
    tokens = torch.arange(1, B + 1)
    ours = losses.text_loss(kind, beta, c, tokens, r, ref_c, ref_r)
    theirs = [
        their_text_loss(kind, beta, *values)
        for values in zip(*(x.tolist() for x in (c, r, ref_c, ref_r, tokens)), strict=True)
    ]
    assert ours.tolist() == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("kind", losses.TEXT_LOSSES)
@pytest.mark.parametrize("alpha", [0.0, 0.01, 1.0])
def test_the_whole_loss_from_logits_equals_theirs(kind, alpha):
    """A9.1: from random logits, rewards and labels to one number, the official formula line by line."""
    from grm_hf.logprobs import sequence_logps

    beta, vocabulary, width, length = 0.1, 11, 5, 6
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2 * B, length, width, generator=generator, dtype=torch.float64)
    head = torch.nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (2 * B, length), generator=generator)
    starts = torch.randint(1, length, (2 * B,), generator=generator)
    rewards = torch.randn(2 * B, generator=generator, dtype=torch.float64)
    ref = torch.cat([draw(10), draw(10)])

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def get_output_embeddings(self):
            return self.head

        def lm_logits(self, rows):
            return self.head(rows)

    index, targets, owner = [], [], []
    for row in range(2 * B):
        for column in range(int(starts[row]), length):
            index.append(row * length + column - 1)
            targets.append(int(labels[row, column]))
            owner.append(row)
    sums = sequence_logps(hidden, Model(), *(torch.tensor(x) for x in (index, targets, owner)), 2 * B)
    counts = torch.bincount(torch.tensor(owner), minlength=2 * B)
    text = losses.text_loss(kind, beta, sums[:B], counts[:B], sums[B:], ref[:B], ref[B:])
    pair = losses.pair_loss(rewards[:B], rewards[B:])
    ours = losses.total_loss(pair.mean(), text.mean(), alpha).item()

    # theirs: full logits, log-softmax by numpy, sums over response tokens with the labels shifted by one
    logits = (hidden @ head.weight.T).detach().numpy()
    log_z = np.log(np.exp(logits).sum(-1))
    s = [
        sum(
            logits[row, column - 1, int(labels[row, column])] - log_z[row, column - 1]
            for column in range(int(starts[row]), length)
        )
        for row in range(2 * B)
    ]
    reward_loss = np.mean([-math.log(sigmoid(float(rewards[i] - rewards[B + i]))) for i in range(B)])
    regularisation = np.mean(
        [
            their_text_loss(kind, beta, s[i], s[B + i], float(ref[i]), float(ref[B + i]), length - int(starts[i]))
            for i in range(B)
        ]
    )
    theirs = reward_loss if alpha == 0 else (1 - alpha) * reward_loss + alpha * regularisation
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_alpha_zero_is_the_very_same_tensor():
    pair, text = draw().mean(), draw().mean()
    assert losses.total_loss(pair, text, 0) is pair
    assert losses.total_loss(pair, None, 0.5) is pair


def test_centering_is_the_square_of_the_sum():
    chosen, rejected = draw(), draw()
    assert losses.centering(chosen, rejected).tolist() == pytest.approx(
        [(c + r) ** 2 for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    )


def test_losses_stay_finite_far_out():
    far = torch.tensor([-1e4, 0.0, 1e4], dtype=torch.float32)
    assert torch.isfinite(losses.pair_loss(far, torch.zeros(3), label_smoothing=0.1)).all()
    for kind in losses.TEXT_LOSSES:
        zeros = torch.zeros(3)
        assert torch.isfinite(losses.text_loss(kind, 0.1, far, torch.ones(3), zeros, zeros, zeros)).all()
