"""`head_type="bnrm"` (2602.10623): the distributions against torch's own and against numerical integration in float64,
the head in training and in use, and what the trainer makes of both."""

import copy
import math

import pytest
import torch
from by_hand import CONSTANT, descend
from hypothesis import given
from hypothesis import strategies as st
from tiny import FLOAT32, assert_same, chatml_tokenizer, pad, score, texts, tiny_grm, tiny_lm
from torch.distributions import Gamma, Weibull

from grm_hf import GRMForSequenceClassification, heads_grm
from grm_hf.heads_grm import GRMBNRMHead, GRMMLPHead, weibull_kl, weibull_sample
from grm_hf.losses import TEXT_LOSSES


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def theirs(mean, shape):
    """torch's distribution with this mean."""
    return Weibull(mean / torch.lgamma(1 + 1 / shape).exp(), shape)


@pytest.fixture
def one_draw(monkeypatch):
    """Every draw is at the same quantile, so that a run is the same however its batches are made."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(0.7))


# --------------------------------------------------------------------------------------------------- the distributions


@pytest.mark.parametrize("mean", [1e-6, 0.01, 0.5, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("shape", [1.0, 1.01, 1.7, 4.0, 50.0, 1e4])
def test_the_divergence_is_the_integral(mean, shape):
    mean, shape = doubles(mean), doubles(shape)
    weibull, prior = theirs(mean, shape), Gamma(doubles(1.0), doubles(1.0))
    # Over t, where x = scale * exp(t / shape): the density of t is exp(t - exp(t)).
    t = torch.linspace(-50, 6, 20001, dtype=torch.float64)
    x = weibull.scale * torch.exp(t / shape)
    inside = torch.exp(t - t.exp()) * (weibull.log_prob(x) - prior.log_prob(x))
    assert weibull_kl(mean, shape).item() == pytest.approx(torch.trapezoid(inside, t).item(), rel=1e-9, abs=1e-9)


def test_the_divergence_is_zero_at_the_prior_alone():
    mean, shape = doubles(1.0).requires_grad_(), doubles(1.0).requires_grad_()
    kl = weibull_kl(mean, shape)
    assert kl.item() == 0
    # By hand: 1 - 1 / mean, and 1 / k - (digamma(1 + 1 / k) + c) / k^2.
    slopes = [slope.item() for slope in torch.autograd.grad(kl, (mean, shape))]
    assert slopes == pytest.approx([0.0, 0.0], abs=1e-15)
    assert weibull_kl(torch.ones(1), torch.ones(1)).item() == pytest.approx(0.0, abs=1e-6)


@given(st.floats(1e-6, 1e4), st.floats(1, 1e4))
def test_the_divergence_is_positive_elsewhere(mean, shape):
    assert weibull_kl(doubles(mean), doubles(shape)).item() >= -1e-15


@pytest.mark.parametrize("shape", [1.0, 1.7, 6.0])
def test_samples_have_the_distribution(shape):
    torch.manual_seed(0)
    mean, shape = torch.full((100_000,), 0.4).double(), torch.full((100_000,), shape).double()
    samples = weibull_sample(mean, shape).sort().values
    below = theirs(mean, shape).cdf(samples)
    steps = torch.linspace(0, 1, len(below), dtype=torch.float64)
    assert (below - steps).abs().max() < 1.63 / len(below) ** 0.5  # Kolmogorov's bound at 1 %
    assert samples.mean().item() == pytest.approx(0.4, rel=0.01)


def test_the_gradient_of_a_sample():
    def drawn(mean, shape):
        torch.manual_seed(3)
        return weibull_sample(mean, shape)

    inputs = doubles(0.2, 1.0, 5.0).requires_grad_(), doubles(1.0, 2.0, 9.0).requires_grad_()
    assert torch.autograd.gradcheck(drawn, inputs)


@pytest.mark.parametrize("noise", [0.0, 1e-45, 1e-30, 1.0, 100.0])
def test_extreme_shapes_means_and_draws_are_finite(monkeypatch, noise):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(noise))
    grid = torch.cartesian_prod(torch.tensor([0.0, 1e-30, 1.0, 1e4]), torch.tensor([1.0, 1.5, 1e4, 1e30]))
    mean, shape = (column.clone().requires_grad_() for column in grid.T)
    for values in (weibull_sample(mean, shape), weibull_kl(mean, shape)):
        slopes = torch.autograd.grad(values.sum(), (mean, shape))
        assert values.isfinite().all() and all(slope.isfinite().all() for slope in slopes)
    sampled = weibull_sample(mean, shape)
    assert (sampled >= 0).all() and (sampled[mean == 0] == 0).all()
    torch.testing.assert_close(sampled[shape == 1e30], mean[shape == 1e30])


# ------------------------------------------------------------------------------------------------------------ the head


def head(width=24, layers=1, **kwargs):
    torch.manual_seed(1)
    return GRMBNRMHead(16, width, layers, **kwargs)


HIDDEN = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_in_use_it_is_an_mlp_head_to_the_last_bit(layers):
    ours, mlp = head(layers=layers).eval(), GRMMLPHead(16, 24, layers + 1)
    with torch.no_grad():
        ours.out.weight[0, ::3] *= -1  # factors that are switched off
    state = {name: value for name, value in ours.state_dict().items() if "shapes" not in name}
    mlp.load_state_dict(state | {"out.weight": state["out.weight"].relu()})
    assert torch.equal(ours(HIDDEN), mlp(HIDDEN))
    for one in (ours, mlp):
        one(HIDDEN).square().sum().backward()
    for name, parameter in mlp.named_parameters():
        found = ours.get_parameter(name).grad
        wanted = parameter.grad * (ours.out.weight > 0) if name == "out.weight" else parameter.grad
        assert torch.equal(found, wanted), name
    assert all(p.grad is None for name, p in ours.named_parameters() if "shapes" in name)


def test_the_mean_of_samples_is_the_reward_in_use():
    ours = head()
    with torch.no_grad():
        draws = torch.stack([ours(HIDDEN) for _ in range(4000)])
        wanted = ours.eval()(HIDDEN)
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all() and ((draws.mean(0) - wanted).abs() < 4 * error).all()


def test_each_state_has_factors_of_its_own_and_all_have_the_same_weights(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda self: (shapes.append(tuple(self.shape)), self.fill_(1.0))[1]
    )
    head()(HIDDEN)
    assert shapes == [(5, 24), (1, 24)]
    head()(HIDDEN.view(5, 1, 16).expand(5, 3, 16))
    assert shapes[2:] == [(5, 3, 24), (1, 24)]


def test_nothing_else_is_drawn_in_use_and_no_number_is_taken():
    ours = head(dropout=0.5).eval()
    torch.manual_seed(0)
    first = ours(HIDDEN)
    assert torch.equal(ours(HIDDEN), first) and torch.rand(()) == torch.rand((), generator=torch.manual_seed(0))


def test_dropout_is_a_choice_beside_the_draws(one_draw):
    torch.manual_seed(0)
    ours = head(dropout=0.5)
    one, other = ours(HIDDEN), ours(HIDDEN)
    assert not torch.equal(one, other)
    ours.dropout.p = 0.0
    assert torch.equal(ours(HIDDEN), ours(HIDDEN))


def test_a_head_at_the_prior_has_no_divergence():
    ours = head().double()
    with torch.no_grad():
        ours.dense[-1].weight.zero_()
        ours.dense[-1].bias.fill_(1)
        ours.shapes[-1].weight.zero_()
        ours.shapes[-1].bias.fill_(-200)
        ours.out.weight.fill_(1)
        ours.out.shapes.fill_(-200)
    _, kl = ours(HIDDEN.double(), return_kl=True)
    assert torch.equal(kl, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("how", ["autocast", "half"])
def test_training_computes_in_float32_whatever_the_user_does(one_draw, how):
    ours, hidden = head(), HIDDEN.bfloat16()
    if how == "half":
        ours = ours.half()
    exact = copy.deepcopy(ours).double()(hidden.double(), return_kl=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = ours(hidden, return_kl=True)
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def kl_by_hand(weights, hidden):
    """Divergence of each state, and that of the weights, from the state dictionary of a head in float64."""

    def stack(name, x):
        depth = sum(key.startswith(f"{name}.") for key in weights) // 2
        for i in range(depth):
            x = (x.relu() if i else x) @ weights[f"{name}.{i}.weight"].T + weights[f"{name}.{i}.bias"]
        return x

    def divergence(mean, raw):
        k = 1 + (1 + raw.exp()).log()
        mean = mean.clamp(min=1e-6)
        scale = mean / torch.special.gammaln(1 + 1 / k).exp()
        entropy = 0.5772156649015329 * (1 - 1 / k) + (scale / k).log() + 1
        return mean - entropy

    of_states = divergence(stack("dense", hidden).relu(), stack("shapes", hidden)).sum(-1)
    return of_states, divergence(weights["out.weight"].relu(), weights["out.shapes"]).sum()


def test_the_divergence_of_a_head():
    ours = head(layers=2).double()
    with torch.no_grad():
        ours.out.weight[0, 3] = -1
    for mode in (True, False):
        _, kl = ours.train(mode)(HIDDEN.double(), return_kl=True)
        of_states, of_weights = kl_by_hand(ours.state_dict(), HIDDEN.double())
        torch.testing.assert_close(kl, of_states + of_weights, rtol=1e-12, atol=1e-12)


def test_weights_begin_at_zero_or_above_and_come_from_the_seed(tmp_path):
    def drawn(seed):
        torch.manual_seed(seed)
        return GRMForSequenceClassification.from_base(tiny_lm(), "bnrm", head_hidden_size=512)

    first, again, other = drawn(3).score.out, drawn(3).score.out, drawn(4).score.out
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert first.weight.min() >= 0 and 0.9 * 512**-0.5 < first.weight.max() <= 512**-0.5
    assert (first.shapes == 0).all()

    tiny_grm(head_type="linear").save_pretrained(tmp_path)
    config = tiny_grm(head_type="bnrm").config
    config.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    body = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("score.")}
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"reward head lacks \['score.dense.0.bias'.*'score.out.shapes'"):
        GRMForSequenceClassification.from_pretrained(tmp_path)
    new = GRMForSequenceClassification.from_pretrained(tmp_path, allow_missing_head=True).score
    assert new.out.weight.min() >= 0 and new.out.weight.max() <= 0.25 and (new.out.shapes == 0).all()
    assert all(0 < p.abs().max() < 1 for name, p in new.named_parameters() if name != "out.shapes")


def test_the_model_gives_the_divergence_in_training_alone():
    model, (ids, mask) = tiny_grm(head_type="bnrm"), pad(texts(), left=True)
    assert model(ids, attention_mask=mask).kl is None and "kl" in model.config.keys_to_ignore_at_inference
    out = model.double().train()(ids, attention_mask=mask, output_hidden_states=True)
    of_states, of_weights = kl_by_hand(model.score.state_dict(), out.hidden_states[-1][:, -1])
    torch.testing.assert_close(out.kl, of_states + of_weights, rtol=1e-9, atol=1e-9)
    assert tiny_grm().train()(ids, attention_mask=mask).kl is None
    assert model(ids[:0]).logits.shape == (0, 1)


def test_a_scorer_takes_the_means_in_every_layout():
    from tiny import chat_grm

    from grm_hf.layouts import LAYOUTS
    from grm_hf.scoring import GRMScorer

    tokenizer = chatml_tokenizer()
    other = chat_grm(tokenizer)
    torch.manual_seed(0)
    model = GRMForSequenceClassification.from_base(other.lm, "bnrm", head_hidden_size=8)
    chats = [[{"role": "user", "content": "one"}, {"role": "assistant", "content": text}] for text in "abc"]
    encoded = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats]
    wanted = torch.cat([score(model.eval(), row["input_ids"], row["attention_mask"]) for row in encoded])
    assert wanted.std() > 1e-3
    for how in ({"deterministic": True}, *({"layout": layout} for layout in LAYOUTS)):
        model.train()
        found = torch.tensor(GRMScorer(model, tokenizer, **how).score(chats))
        assert_same(found, wanted, 4 * FLOAT32)


# ------------------------------------------------------------------------------------------------------------ training




def run_of(folder, count, **kwargs):
    """A run that takes its pairs in their order."""
    from trainers import grm, pairs, trainer

    model = grm(head_type="bnrm").double()
    run = trainer(folder, model, pairs(count), **{"alpha": 0.5, "kl_weight": 0.02, **CONSTANT, **kwargs})
    run._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(run.train_dataset)
    return run


def reward_by_hand(weights, hidden):
    """The reward of one state, every draw at the quantile of `one_draw`."""

    def drawn(mean, raw):
        k = 1 + (1 + raw.exp()).log()
        return mean / torch.special.gammaln(1 + 1 / k).exp() * 0.7 ** (1 / k)

    factors, shapes = hidden, hidden
    for i in (0, 1):
        factors = (weights[f"dense.{i}.weight"] @ factors + weights[f"dense.{i}.bias"]).relu()
        shapes = weights[f"shapes.{i}.weight"] @ (shapes.relu() if i else shapes) + weights[f"shapes.{i}.bias"]
    of_weights = drawn(weights["out.weight"][0].relu(), weights["out.shapes"][0])
    return (drawn(factors, shapes) * of_weights).sum() + weights["out.bias"][0]


def by_hand(run, steps):
    """Plain gradient descent on the whole objective, for each step a list of batches of pairs."""
    model, data, args = copy.deepcopy(run.model), run.train_dataset, run.args
    text, alpha = args.text_loss != "none", args.alpha
    for batches in steps:
        loss = 0.0
        for members in batches:
            for pair in (data[i] for i in members):
                sides = [torch.tensor([pair[f"{side}_ids"]]) for side in ("chosen", "rejected")]
                hidden = [model.model(input_ids=ids).last_hidden_state[0, -1] for ids in sides]
                weights = dict(model.score.named_parameters())
                chosen, rejected = (reward_by_hand(weights, state) for state in hidden)
                own = -(chosen - rejected).sigmoid().log()
                if text:
                    logps = model.lm(input_ids=sides[0]).logits[0, :-1].log_softmax(-1)
                    likelihood = logps.gather(1, sides[0][0, 1:, None])[pair["chosen_start"] - 1 :].sum()
                    own = (1 - alpha) * own - alpha * (args.beta * likelihood).sigmoid().log()
                of_states, of_weights = kl_by_hand(weights, torch.stack(hidden))
                own = own + args.kl_weight * (of_states.mean() + of_weights)
                loss = loss + own / len(members) / len(batches)
        descend(model, loss)
    return dict(model.named_parameters())


WAYS = {
    "whole": {"per_device_train_batch_size": 8},
    "budget": {"per_device_train_batch_size": 8, "max_tokens_per_batch": 150},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "both": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 100},
}


@pytest.mark.trainer
@pytest.mark.parametrize("kind", ["none", "sft"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_by_hand(tmp_path, double, one_draw, kind, way):
    """Two steps of a run over 14 pairs, whose last batches have fewer: a divergence counts as much as the loss of its
    pair."""
    layout = "shared_prefix" if way in ("budget", "accumulated") else "padded"
    run = run_of(tmp_path, 14, regularizer=kind, layout=layout, max_steps=2, **WAYS[way])
    size = WAYS[way]["per_device_train_batch_size"]
    batches = [list(range(i, min(i + size, 14))) for i in range(0, 14, size)]
    each = len(batches) // 2
    steps = [batches[:each], batches[each:]]
    expected, start = by_hand(run, steps), copy.deepcopy(dict(run.model.named_parameters()))
    run.args.kl_weight = 0.0
    without = by_hand(run, steps)
    run.args.kl_weight = 0.02
    run.train()
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-8, atol=1e-10, msg=name)
    for name in ("score.out.weight", "score.out.shapes", "score.shapes.1.bias", "score.dense.0.weight"):
        assert (expected[name] - without[name]).abs().max() > 1e-5, name
        assert (expected[name] - start[name]).abs().max() > 1e-5, name


@pytest.mark.trainer
def test_weight_zero_is_the_loss_without_the_term(tmp_path, double, one_draw):
    run = run_of(tmp_path, 8, max_steps=1, kl_weight=0.0, **WAYS["whole"])
    expected = by_hand(run, [[list(range(8))]])
    run.train()
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-8, atol=1e-10, msg=name)
    first = next(row for row in run.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(0.5 * first["pair_loss"] + 0.5 * first["text_loss"], rel=1e-3)
    assert first["kl"] > 0


@pytest.mark.trainer
def test_the_logged_loss_is_the_objective(tmp_path):
    from trainers import grm, trainer

    run = trainer(tmp_path, grm(head_type="bnrm"), alpha=0.25, kl_weight=0.5, max_steps=3)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    for row in rows:
        objective = 0.75 * row["pair_loss"] + 0.25 * row["text_loss"] + 0.5 * row["kl"]
        assert row["loss"] == pytest.approx(objective, rel=1e-3)
    assert len(rows) == 3


@pytest.mark.trainer
def test_swapped_sides_have_the_same_loss(tmp_path, one_draw):
    from trainers import grm, pairs, trainer

    data = pairs(4)
    runs = []
    for name, rows, label in (
        ("straight", data, 0.75),
        ("swapped", data.rename_columns({"chosen": "rejected", "rejected": "chosen"}), 0.25),
    ):
        model = grm(head_type="bnrm").train()
        run = trainer(tmp_path / name, model, pairs(4), regularizer="none", kl_weight=0.5, layout="padded")
        chats = [[[*row["prompt"], *row[side]] for row in rows] for side in ("chosen", "rejected")]
        encoder = run.processing_class
        ids = [encoder.apply_chat_template(chat, return_dict=True)["input_ids"] for side in chats for chat in side]
        padded, mask = pad([torch.tensor(row) for row in ids], left=False)
        inputs = {"input_ids": padded, "attention_mask": mask, "label": torch.full((4,), label)}
        runs.append(run.compute_loss(run.model, inputs))
    assert_same(runs[0][None], runs[1][None].detach(), 10 * FLOAT32)


@pytest.mark.trainer
@pytest.mark.parametrize("budget", [None, 100])
def test_the_mean_beforehand_has_the_draws_of_the_step(tmp_path, double, budget):
    from trainers import grm, pairs, trainer

    run = trainer(
        tmp_path, grm(head_type="bnrm").double(), pairs(8), layout="padded", batch_sum_to_zero=1.0, max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_tokens_per_batch=budget,
    )  # fmt: skip
    seen, means, right = [], [], run._sum_to_zero

    def watched(chosen, rejected):
        seen.append(torch.cat([chosen, rejected]).detach())
        means.append(run._step[0])
        return right(chosen, rejected)

    run._sum_to_zero = watched
    run.train()
    assert len(seen) == (2 if budget is None else 8) and len(set(map(float, means))) == 1
    torch.testing.assert_close(torch.cat(seen).mean(), means[0], rtol=1e-12, atol=1e-14)


@pytest.mark.trainer
def test_evaluation_takes_means_and_leaves_the_divergence_out(tmp_path):
    from trainers import grm, pairs, trainer

    run = trainer(tmp_path, grm(head_type="bnrm"), evaluation=pairs(6, seed=1), regularizer="none", kl_weight=9.0)
    first, again = run.evaluate(), run.evaluate()
    rewards = torch.tensor(run.predict(run.eval_dataset).predictions)
    assert torch.equal(rewards, torch.tensor(run.predict(run.eval_dataset).predictions))
    assert first["eval_loss"] == again["eval_loss"] and "eval_kl" not in first
    wanted = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    assert first["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.trainer
@pytest.mark.parametrize("kind", ["none", *TEXT_LOSSES])
def test_every_text_loss_moves_the_head(tmp_path, kind):
    from trainers import grm, lora, trainer

    adapter = lora() if kind in ("dpo", "sft") else None  # dpo: the reference is the model without adapter
    run = trainer(
        tmp_path, grm(head_type="bnrm"), regularizer=kind, peft_config=adapter, gradient_checkpointing=kind == "sft"
    )
    heads = {name: p for name, p in run.model.named_parameters() if ".score." in f".{name}" and p.requires_grad}
    start = {name: p.detach().clone() for name, p in heads.items()}
    run.train()
    assert len(heads) == 11 and all(not torch.equal(p, start[name]) for name, p in heads.items() if "bias" not in name)
    for row in (row for row in run.state.log_history if "loss" in row):
        assert math.isfinite(row["loss"]) and row["kl"] > 0 and ("text_loss" in row) == (kind != "none")


@pytest.mark.trainer
@pytest.mark.parametrize("adapter", [False, True])
def test_it_learns_its_training_pairs(tmp_path, adapter):
    from trainers import grm, lora, pairs, trainer

    data = pairs(32)
    run = trainer(
        tmp_path, grm(2, head_type="bnrm"), data, data, max_steps=60, peft_config=lora() if adapter else None,
        per_device_train_batch_size=8, seed=3,
    )  # fmt: skip
    before = run.evaluate()["eval_accuracy"]
    run.train()
    after = run.evaluate()
    assert before < 0.6 and after["eval_accuracy"] >= 0.95 and after["eval_margin"] > 1


@pytest.mark.trainer
def test_an_adapter_is_saved_loaded_and_merged_with_its_head(tmp_path):
    from trainers import grm, lora, scores_here, trainer

    from grm_hf.scoring import verify
    from grm_hf.training import merge_adapter

    run = trainer(tmp_path / "run", grm(head_type="bnrm"), peft_config=lora(), learning_rate=0.1, max_steps=2)
    run.train()
    run.save_model()
    verify(str(tmp_path / "run"))
    wanted = scores_here(run.model)
    for model in (
        GRMForSequenceClassification.from_pretrained(run.args.output_dir),
        merge_adapter(run.args.output_dir, tmp_path / "merged"),
        GRMForSequenceClassification.from_pretrained(tmp_path / "merged"),
    ):
        assert scores_here(model) == pytest.approx(wanted, abs=1e-5)
    verify(str(tmp_path / "merged"))


@pytest.mark.trainer
def test_a_run_from_a_base_has_the_head_that_is_asked_for_and_its_card_says_so(tmp_path):
    from trainers import TOKENIZER, base, pairs, settings

    from grm_hf import GRMRewardTrainer

    base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    run = GRMRewardTrainer(
        model=str(tmp_path / "base"),
        args=settings(tmp_path / "run", model_init_kwargs={"head_type": "bnrm", "head_hidden_size": 8}),
        train_dataset=pairs(),
    )
    assert isinstance(run.model.score, GRMBNRMHead)
    run.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert (
        "0.99 * -log sigmoid(r_c - r_r) + 0.01 * -log sigmoid(beta * s_c)"
        " + 1e-05 * KL(factors and weights || Gamma(1, 1))" in text
    )
    assert "BNRM (2602.10623), 1 x 8 before 8 non-negative factors" in text


@pytest.mark.trainer
def test_a_weight_that_is_none_and_one_that_is_ignored(tmp_path, caplog):
    from trainers import grm, settings, trainer
    from transformers.utils import logging

    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`kl_weight` is .*; it is a weight and must be at least 0"):
            settings(tmp_path, kl_weight=weight)
    logging.enable_propagation()
    try:
        trainer(tmp_path, kl_weight=1e-4)
        assert "`kl_weight` is ignored: the reward head is 'mlp', not 'bnrm'." in caplog.text
        caplog.clear()
        trainer(tmp_path)
        trainer(tmp_path, grm(head_type="bnrm"), kl_weight=1e-4)
        assert "kl_weight" not in caplog.text
    finally:
        logging.disable_propagation()


def test_the_smallest_mean_is_of_the_divergence_alone():
    mean, shape = torch.tensor([0.0, heads_grm.SMALLEST_MEAN]), torch.tensor([2.0, 2.0])
    assert weibull_kl(mean, shape)[0] == weibull_kl(mean, shape)[1]
    assert weibull_sample(mean, shape)[0] == 0
