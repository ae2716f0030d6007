"""Terms and labels beyond the paper's: soft labels, and the batch-wise sum to zero. Each against an independent
computation in float64."""

import copy
import re

import numpy as np
import pytest
import torch
from by_hand import CONSTANT, consecutive, descend
from hypothesis import given
from hypothesis import strategies as st
from tiny import chatml_tokenizer

from grm_hf import losses
from grm_hf.pairs import Encoder, prepare_pairs


TOKENIZER = chatml_tokenizer()
numbers = st.floats(-20, 20, allow_nan=False)
shares = st.floats(0, 1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- the formulas


@given(numbers, numbers, shares, st.floats(0, 0.49), st.floats(-3, 3))
def test_a_soft_label_is_the_cross_entropy_of_shares(chosen, rejected, label, smoothing, margin):
    right = label * (1 - smoothing) + (1 - label) * smoothing
    for name, shift, scale in (("bt", 0, 1), ("margin", margin, 1), ("scaled", 0, margin)):
        (found,) = losses.pair_loss(
            tensor(chosen), tensor(rejected), tensor(margin), name, smoothing, tensor(label)
        ).tolist()
        z = chosen - rejected - shift
        expected = scale * (right * np.logaddexp(0, -z) + (1 - right) * np.logaddexp(0, z))
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(numbers, numbers, shares, st.floats(0, 0.49), numbers)
def test_swapped_sides_and_shifted_rewards_change_nothing(chosen, rejected, label, smoothing, shift):
    one = losses.pair_loss(tensor(chosen), tensor(rejected), None, "bt", smoothing, tensor(label))
    other = losses.pair_loss(tensor(rejected), tensor(chosen), None, "bt", smoothing, 1 - tensor(label))
    moved = losses.pair_loss(tensor(chosen + shift), tensor(rejected + shift), None, "bt", smoothing, tensor(label))
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", list(losses.PAIR_LOSSES))
def test_label_one_is_the_hard_loss_to_the_last_bit(name, smoothing):
    generator = torch.Generator().manual_seed(0)
    values, gradients = [], []
    rewards = 3 * torch.randn(3, 64, generator=generator)
    for label in (None, torch.ones(64)):
        chosen, rejected, margin = rewards.clone().requires_grad_().unbind(0)
        chosen.retain_grad()
        loss = losses.pair_loss(chosen, rejected, margin, name, smoothing, label)
        loss.mean().backward()
        values.append(loss)
        gradients.append(chosen.grad)
    assert torch.equal(*values) and torch.equal(*gradients)


@pytest.mark.parametrize("name", ["dpo", "dpo_noref"])
def test_a_soft_label_of_the_text_losses_that_compare(name):
    sums = tensor([-3.0, -1.0], [-2.0, -2.0], [-2.5, -1.5], [-2.0, -1.0])
    label, beta = tensor(0.7, 0.5), 0.3
    found = losses.text_loss(name, beta, sums[0], None, sums[1], sums[2], sums[3], label)
    reference = (sums[2] - sums[3]).numpy() if name == "dpo" else 0
    z = beta * ((sums[0] - sums[1]).numpy() - reference)
    expected = label.numpy() * np.logaddexp(0, -z) + (1 - label.numpy()) * np.logaddexp(0, z)
    assert found.numpy() == pytest.approx(expected, rel=1e-12)
    hard = [
        losses.text_loss(name, beta, *sums[:1], None, *sums[1:], given) for given in (None, torch.ones_like(label))
    ]
    assert torch.equal(*hard)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), st.data())
def test_the_shares_of_a_sum_to_zero_add_up(rewards, data):
    """Over any split into batches: value and gradient of the squared mean."""
    values = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)
    (values.mean() ** 2).backward()
    expected = values.grad.clone()
    values.grad = None
    mean = values.detach().mean()
    cut = data.draw(st.integers(0, len(rewards)))
    shares = [losses.sum_to_zero(*part.unbind(1), mean) for part in (values[:cut], values[cut:])]
    term = torch.cat(shares).mean()
    term.backward()
    assert term.item() == pytest.approx(mean.item() ** 2, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(values.grad, expected, rtol=1e-9, atol=1e-12)
    alone = losses.sum_to_zero(*values.detach().unbind(1)).mean().item()
    assert alone == pytest.approx(mean.item() ** 2, rel=1e-9, abs=1e-9)


# ------------------------------------------------------------------------------------------------------ labels of data


def row(**columns):
    return {
        "prompt": [{"role": "user", "content": "one"}],
        "chosen": [{"role": "assistant", "content": "two"}],
        "rejected": [{"role": "assistant", "content": "three four"}],
        **columns,
    }


def prepared(rows, **kwargs):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    return prepare_pairs(
        data.to_iterable_dataset() if kwargs.pop("stream", False) else data, Encoder(TOKENIZER), **kwargs
    )


@pytest.mark.parametrize("stream", [False, True])
def test_rows_whose_label_prefers_rejected_are_turned_round_and_counted(stream):
    data, counts = prepared([row(label=share) for share in (1.0, 0.25, 0.5, 0.0)], stream=stream)
    data = list(data)
    straight, turned = data[0], data[1]
    assert [pair["label"] for pair in data] == [1.0, 0.75, 0.5, 1.0]
    assert (turned["chosen_ids"], turned["rejected_ids"]) == (straight["rejected_ids"], straight["chosen_ids"])
    assert data[3]["chosen_ids"] == turned["chosen_ids"] and data[2]["chosen_ids"] == straight["chosen_ids"]
    assert counts.swapped == 2 and counts.changed
    assert "2 with chosen and rejected exchanged, since their label is below 0.5" in str(counts)


def test_tokens_with_references_are_turned_round_together():
    tokens = {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8], "chosen_start": 1, "rejected_start": 1}
    (pair,), counts = prepared([{**tokens, "label": 0.25, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}])
    assert (pair["chosen_ids"], pair["rejected_ids"], pair["label"]) == ([5, 8], [5, 6, 7], 0.75)
    assert (pair["ref_chosen_logps"], pair["ref_rejected_logps"]) == (-2.0, -1.0) and counts.swapped == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(label=1.0), row(label=1.5)], "row 1: `label` is 1.5; beside `chosen` and `rejected` it is the share"),
        ([row(label="A")], "`label` is 'A'.*Rename the column if it means something else"),
        ([row(label=True)], "`label` is True"),
        ([row(label=float("nan"))], "`label` is nan"),
        ([row(label=1.0), row(label=None)], "row 1: this row is messages with a prompt, no margin; row 0 is .*label"),
        ([row(label=0.2, margin=1.0)], "`label` is 0.2, so `rejected` is preferred, and `margin` says"),
    ],
)
def test_wrong_labels(rows, words):
    with pytest.raises(ValueError, match=words):
        prepared(rows)


# ------------------------------------------------------------------------------------------------------------ training


LABELS = [1.0, 0.5, 0.75, 1.0, 0.9, 0.6, 1.0]


def run_of(folder, count, **kwargs):
    """A run that takes its pairs in their order."""
    from trainers import grm, pairs, trainer

    label = (LABELS * 3)[:count]
    run = trainer(folder, grm().double(), pairs(count, label=label), **{"alpha": 0.5, **CONSTANT, **kwargs})
    run._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(run.train_dataset)
    return run


def by_hand(run, steps, coefficient):
    """Plain gradient descent on the whole objective, for each step a list of batches of pairs."""
    model, data, alpha = copy.deepcopy(run.model).train(), run.train_dataset, run.args.alpha
    text = run.args.text_loss != "none"
    for batches in steps:
        everything, loss = [], 0.0
        for members in batches:
            pair_losses, text_losses = [], []
            for pair in (data[i] for i in members):
                sides = [torch.tensor([pair[f"{side}_ids"]]) for side in ("chosen", "rejected")]
                chosen, rejected = (model(input_ids=ids).logits.squeeze() for ids in sides)
                everything += [chosen, rejected]
                d, p = chosen - rejected, pair["label"]
                pair_losses.append(-p * d.sigmoid().log() - (1 - p) * (-d).sigmoid().log())
                if text:
                    logps = model.lm(input_ids=sides[0]).logits[0, :-1].log_softmax(-1)
                    likelihood = logps.gather(1, sides[0][0, 1:, None])[pair["chosen_start"] - 1 :].sum()
                    text_losses.append(-(run.args.beta * likelihood).sigmoid().log())
            mean = sum(pair_losses) / len(members)
            if text:
                mean = (1 - alpha) * mean + alpha * sum(text_losses) / len(members)
            loss = loss + mean / len(batches)
        zero = coefficient * torch.stack(everything).mean() ** 2
        loss = loss + (1 - alpha if text else 1) * zero
        descend(model, loss)
    return dict(model.named_parameters())


@pytest.mark.trainer
@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("kind", ["none", "sft"])
@pytest.mark.parametrize("way", ["whole", "budget", "accumulated", "both", "short"])
def test_steps_are_those_by_hand(tmp_path, double, kind, layout, way):
    """Two steps of a run over 14 pairs, whose last batches have fewer. With `short` the second step has one batch of
    two pairs, the first three of four."""
    settings, steps = {
        "whole": ({"per_device_train_batch_size": 8}, [consecutive(8), consecutive(8, 6)[1:]]),
        "budget": (
            {"per_device_train_batch_size": 8, "max_tokens_per_batch": 150},
            [consecutive(8), consecutive(8, 6)[1:]],
        ),
        "accumulated": (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            [consecutive(4, 4), consecutive(4, 4, 4, 2)[2:]],
        ),
        "both": (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 100},
            [consecutive(4, 4), consecutive(4, 4, 4, 2)[2:]],
        ),
        "short": (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
            [consecutive(4, 4, 4), consecutive(12, 2)[1:]],
        ),
    }[way]
    run = run_of(tmp_path, 14, regularizer=kind, layout=layout, batch_sum_to_zero=0.7, max_steps=2, **settings)
    expected = by_hand(run, steps, 0.7)
    without = by_hand(run, steps, 0.0)
    run.train()
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-8, atol=1e-10, msg=name)
    moved = run.model.score.out.bias - without["score.out.bias"]  # the term alone moves it
    assert moved.abs() > 1e-4


@pytest.mark.trainer
@pytest.mark.parametrize("kind", ["none", "sft", "dpo_noref", "dpo"])
def test_a_run_with_label_one_is_the_run_without_labels_to_the_last_bit(tmp_path, kind):
    from trainers import pairs, trainer

    found = []
    for columns in ({}, {"label": [1.0] * 16}):
        run = trainer(
            tmp_path / str(len(columns)), data=pairs(16, **columns), regularizer=kind, alpha=0.3, label_smoothing=0.1
        )
        run.train()
        found.append(list(run.model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.trainer
def test_the_mean_beforehand_has_the_dropout_of_the_step(tmp_path, double):
    from trainers import grm, pairs, trainer

    run = trainer(
        tmp_path, grm(attention_dropout=0.5).double(), pairs(8), layout="padded", batch_sum_to_zero=1.0, max_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, disable_dropout=False,
    )  # fmt: skip
    seen, means = [], []
    right = run._sum_to_zero

    def watched(chosen, rejected):
        seen.append(torch.cat([chosen, rejected]).detach())
        means.append(run._step[0])
        return right(chosen, rejected)

    run._sum_to_zero = watched
    run.train()
    assert len(seen) == 4 and len(set(map(float, means))) == 1
    torch.testing.assert_close(torch.cat(seen).mean(), means[0], rtol=1e-12, atol=1e-14)
    run.model.eval()
    assert not run.model.training


@pytest.mark.trainer
def test_a_weight_of_nothing_changes_no_bit_and_the_term_pulls_the_mean(tmp_path):
    """With 1e-300 everything is computed, the forward beforehand with its dropout too, and the term rounds to 0."""
    from trainers import grm, trainer

    runs = {}
    for name, weight in {
        "default": {},
        "nothing": {"batch_sum_to_zero": 1e-300},
        "some": {"batch_sum_to_zero": 5.0},
    }.items():
        model = grm(attention_dropout=0.3)
        with torch.no_grad():
            model.score.out.bias += 2
        runs[name] = trainer(
            tmp_path / name, model, gradient_accumulation_steps=2, max_steps=8, disable_dropout=False, **weight
        )
        runs[name].train()
    for one, other in zip(runs["default"].model.parameters(), runs["nothing"].model.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = {
        name: [row["mean_reward"] for row in run.state.log_history if "mean_reward" in row]
        for name, run in runs.items()
    }
    assert abs(logs["some"][-1]) < abs(logs["default"][-1]) - 0.3


@pytest.mark.trainer
@pytest.mark.parametrize("budget", [None, 60])
def test_a_loss_by_hand_takes_its_batch_for_the_step(tmp_path, double, budget):
    """Before training and after it, which leaves nothing of its own steps behind."""
    from trainers import grm, pairs, trainer

    settings = {"gradient_accumulation_steps": 2, "max_tokens_per_batch": budget, "max_steps": 1}
    run = trainer(tmp_path, grm().double(), pairs(8), batch_sum_to_zero=0.7, regularizer="none", **settings)
    batch = next(iter(run.get_train_dataloader()))
    for _ in range(2):
        rewards = {}
        for weight in (0.7, 0.0):
            run.args.batch_sum_to_zero = weight
            loss, outputs = run.compute_loss(run.model, batch, return_outputs=True)
            rewards[weight] = loss, outputs["logits"]
        term = 0.7 * rewards[0.0][1].mean() ** 2
        assert term > 1e-6
        torch.testing.assert_close(rewards[0.7][0] - rewards[0.0][0], term, rtol=1e-9, atol=1e-12)
        run.args.batch_sum_to_zero = 0.7
        run.train()


@pytest.mark.trainer
def test_evaluation_counts_no_tie_as_right_or_wrong_and_leaves_the_term_out(tmp_path):
    from trainers import pairs, trainer

    evaluation = pairs(6, seed=1, label=[1.0, 0.5, 1.0, 0.5, 0.75, 1.0])
    losses_of = {}
    for weight in (0.0, 9.0):
        run = trainer(tmp_path / str(weight), evaluation=evaluation, regularizer="dpo_noref", batch_sum_to_zero=weight)
        losses_of[weight] = run.evaluate()
    found = losses_of[9.0]
    assert {k: v for k, v in found.items() if "second" not in k and "time" not in k} == {
        k: v for k, v in losses_of[0.0].items() if "second" not in k and "time" not in k
    }
    (seen,) = run.eval_pairs.values()
    assert len(seen) == 4
    rewards = run.predict(run.eval_dataset).predictions[[0, 2, 4, 5]]
    assert found["eval_accuracy"] == np.mean(rewards[:, 0] > rewards[:, 1])
    assert found["eval_implicit_accuracy"] in {i / 4 for i in range(5)}


@pytest.mark.trainer
def test_the_card_states_the_objective(tmp_path):
    from trainers import trainer

    run = trainer(tmp_path, regularizer="sft", batch_sum_to_zero=0.5, center_rewards_coefficient=0.1)
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert (
        "0.99 * (-log sigmoid(r_c - r_r) + 0.1 * (r_c + r_r)^2 + 0.5 * (mean reward of a step)^2)"
        " + 0.01 * -log sigmoid(beta * s_c)" in text
    )


@pytest.mark.trainer
@pytest.mark.parametrize("label", [None, 0.75])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("pair_loss", "text"), [("bt", "dpo_noref"), ("margin", "none"), ("scaled", "sft")])
def test_the_formula_of_the_card_is_the_loss(tmp_path, pair_loss, text, label, smoothing):
    """The formula, computed as it is written in the card, is the logged loss of a step on one pair."""
    from trainers import pairs, trainer

    columns = {} if label is None else {"label": [label]}
    run = trainer(
        tmp_path, data=pairs(1, margin=[2.0], **columns), pair_loss=pair_loss, regularizer=text, alpha=0.25,
        label_smoothing=smoothing, max_steps=1, layout="padded",
    )  # fmt: skip
    seen = {"label": label, "margin": 2.0, "beta": run.args.beta}
    part = run._loss_of_part

    def watched(model, inputs):
        loss, of_pairs = part(model, inputs)
        sums = run.response_logps(model, inputs).tolist() if text != "none" else [0.0, 0.0]
        seen.update(loss=loss.item(), r_c=of_pairs["chosen"].item(), r_r=of_pairs["rejected"].item())
        seen.update(s_c=sums[0], s_r=sums[-1])
        return loss, of_pairs

    run._loss_of_part = watched
    run.train()
    run.create_model_card()
    (formula,) = re.findall(r"^Loss: `(.+)`$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert ("label" in formula) == (label is not None)
    written = formula.replace("log sigmoid(", "log_sigmoid(")
    found = eval(written, {"log_sigmoid": lambda z: -np.logaddexp(0, -z)}, seen)
    assert found == pytest.approx(seen["loss"], rel=1e-5)


@pytest.mark.trainer
@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_weight_that_is_none(tmp_path, weight):
    from trainers import settings

    with pytest.raises(ValueError, match="`batch_sum_to_zero` is .*; it is a weight and must be at least 0"):
        settings(tmp_path, batch_sum_to_zero=weight)
