"""Attributes: heads and combiners against their formulas, ratings as data, and whole training steps against an
independent computation in float64."""

import copy
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import CONSTANT, consecutive, descend
from hypothesis import given
from hypothesis import strategies as st
from tiny import chatml_tokenizer, tiny_llama

from grm_hf import GRMConfig, GRMForSequenceClassification, losses
from grm_hf.heads_grm import COMBINERS
from grm_hf.pairs import Encoder, prepare_pairs


TOKENIZER = chatml_tokenizer()
NAMES = ["help", "short"]
GAP = math.nan
numbers = st.floats(-20, 20, allow_nan=False)
ratings = st.one_of(st.just(GAP), st.floats(-5, 5))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def model_of(head_type="mlp", **attributes):
    settings = {"head_hidden_size": 8} if head_type == "mlp" else {}
    base = tiny_llama(TOKENIZER, 0)
    attributes = {"attribute_names": NAMES, **attributes}
    return GRMForSequenceClassification.from_base(base, head_type, **settings, **attributes).eval()


def measured(config):
    """Puts measures of rewards into a configuration."""
    config.reward_mean, config.reward_std, config.reward_temperature, config.signals = 5.0, 3.0, 7.0, {"names": []}


def of_rewards(config):
    return config.reward_mean, config.reward_std, config.reward_temperature, config.signals


def outputs(model, seed=0):
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))


# ----------------------------------------------------------------------------------------------------------- combiners


BY_HAND = {
    "sum": lambda a, w: sum(w * a),
    "geometric": lambda a, w: (1 if all(a > 0) else -1) * np.prod(np.abs(np.tanh(a)) ** (w / sum(w))),
    "harmonic": lambda a, w: sum(w) / sum(w / np.logaddexp(0, a)),
}
WEIGHTS = {"sum": [0.5, -2.0, 1.5], "geometric": [0.5, 2.0, 1.5], "harmonic": [0.5, 2.0, 1.5]}


def combined(name, attributes, weights):
    weights = tensor(weights)
    if not COMBINERS[name].negative:
        weights = weights / weights.sum()
    return COMBINERS[name].function(attributes, weights)


@pytest.mark.parametrize("name", list(COMBINERS))
@given(st.lists(st.floats(-15, 15), min_size=3, max_size=3))
def test_combiners_are_their_formulas(name, values):
    (found,) = combined(name, tensor(values), WEIGHTS[name]).tolist()
    expected = BY_HAND[name](np.array(values), np.array(WEIGHTS[name]))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", list(COMBINERS))
def test_combiners_have_finite_values_and_gradients_everywhere(name):
    extremes = [0.0, 1.0, -1.0, 1e-30, 200.0, -200.0, 1e4, -1e4]
    values = torch.cartesian_prod(*[torch.tensor(extremes)] * 3).requires_grad_()
    for weights in (torch.full((3,), 1 / 3), torch.tensor([1.0, 0.0, 0.0])):
        rewards = COMBINERS[name].function(values, weights)
        (gradient,) = torch.autograd.grad(rewards.sum(), values)
        assert rewards.shape == (len(values), 1)
        assert rewards.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ["geometric", "harmonic"])
@pytest.mark.parametrize("other", [-3e38, -200.0, 0.0, 200.0, 3e38])
def test_an_attribute_without_weight_counts_nothing_however_extreme_it_is(name, other):
    """In float32, whose smallest weight is far above the softplus of -200."""
    function, weights = COMBINERS[name].function, torch.tensor([0.75, 0.0, 0.25])
    found = function(torch.tensor([1.0, other, -2.0]), weights)
    torch.testing.assert_close(found, function(torch.tensor([1.0, -2.0]), torch.tensor([0.75, 0.25])))


@given(st.lists(st.floats(0.01, 5), min_size=3, max_size=3), st.integers(0, 2))
def test_means_do_not_depend_on_the_scale_of_weights_nor_on_attributes_without_weight(values, place):
    for name in ("geometric", "harmonic"):
        weights = [1.0, 2.0, 3.0]
        one, ten = (combined(name, tensor(values), [scale * w for w in weights]) for scale in (1, 10))
        torch.testing.assert_close(one, ten, rtol=1e-12, atol=0)
        weights[place], other = 0.0, list(values)
        other[place] = -7.0
        torch.testing.assert_close(
            combined(name, tensor(values), weights), combined(name, tensor(other), weights), rtol=1e-12, atol=0
        )
    positive = torch.nn.functional.softplus(tensor(values))
    assert combined("harmonic", tensor(values), [1.0, 2.0, 3.0]) <= (positive * tensor([1, 2, 3])).sum() / 6 + 1e-12
    assert combined("geometric", tensor(values), [1.0, 1.0, 1.0]) > 0


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("head_type", ["mlp", "linear"])
@pytest.mark.parametrize(
    ("weights", "combiner"),
    [
        *((None, "sum"), ([0.7, -0.3], "sum"), ([0.7, 0.3], "geometric"), ([1, 2], "harmonic")),
        *(("gate", combiner) for combiner in COMBINERS),
    ],
)
def test_logits_are_the_combination_of_the_attributes(head_type, weights, combiner, tmp_path):
    model = model_of(head_type, attribute_weights=weights, attribute_combiner=combiner)
    states = torch.randn(4, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    rewards, attributes = model.score(states, return_attributes=True)
    assert rewards.shape == (4, 5, 1) and attributes.shape == (4, 5, 2)
    assert torch.equal(model.score(states), rewards)  # as TRL's PPO calls it
    if weights is None:
        assert torch.equal(rewards, model.score.reward(states))
    else:
        shares = np.broadcast_to(np.array(weights, dtype=float), (4, 5, 2)) if weights != "gate" else None
        if weights == "gate":
            scores = model.score.mixture(states).double().exp()
            shares = (scores / scores.sum(-1, keepdim=True)).detach().numpy()
        by_hand = [
            BY_HAND[combiner](a, w)
            for a, w in zip(attributes.detach().double().view(-1, 2).numpy(), shares.reshape(-1, 2), strict=True)
        ]
        np.testing.assert_allclose(rewards.detach().flatten().numpy(), by_hand, rtol=1e-4, atol=1e-6)
    out = outputs(model)
    assert out.logits.shape == (3, 1) and out.attributes.shape == (3, 2)
    model.save_pretrained(tmp_path)
    again = GRMForSequenceClassification.from_pretrained(tmp_path)
    assert (again.config.attribute_names, again.config.attribute_combiner) == (NAMES, combiner)
    for name in ("logits", "attributes"):
        assert torch.equal(outputs(again)[name], out[name])


def test_attributes_compute_in_float32_in_a_bfloat16_body():
    model = GRMForSequenceClassification.from_base(
        tiny_llama(TOKENIZER, 0).bfloat16(), head_hidden_size=8, attribute_names=NAMES, attribute_weights="gate"
    )
    out = outputs(model.eval())
    assert out.logits.dtype == out.attributes.dtype == torch.float32
    assert {p.dtype for p in model.score.parameters()} == {torch.float32}


def test_a_model_without_attributes_is_as_before():
    model = GRMForSequenceClassification.from_base(tiny_llama(TOKENIZER, 0), head_hidden_size=8).eval()
    assert "attributes" not in outputs(model) and list(model.score.state_dict()) == [
        "dense.0.weight", "dense.0.bias", "out.weight", "out.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attribute_names": NAMES, "head_type": "bnrm"}, "A BNRM head has no attributes: set head_type='mlp'"),
        ({"attribute_names": []}, "list of different names, at least one"),
        ({"attribute_names": ["a", "a"]}, "list of different names"),
        ({"attribute_names": "ab"}, "list of different names"),
        ({"attribute_weights": [1.0]}, "set `attribute_names`"),
        ({"attribute_names": NAMES, "attribute_weights": [1.0]}, "finite number for each of 2 attributes"),
        ({"attribute_names": NAMES, "attribute_weights": [1.0, GAP]}, "finite number for each"),
        ({"attribute_names": NAMES, "attribute_weights": "fixed"}, "'gate'"),
        ({"attribute_names": NAMES, "attribute_weights": np.ones(2)}, "finite number for each"),
        ({"attribute_names": NAMES, "attribute_combiner": "sum_of"}, "must be one of .*geometric"),
        ({"attribute_names": NAMES, "attribute_combiner": "harmonic"}, "has no weights"),
        (
            {"attribute_names": NAMES, "attribute_weights": [1, -1], "attribute_combiner": "geometric"},
            "takes weights of at least 0",
        ),
        (
            {"attribute_names": NAMES, "attribute_weights": [0, 0], "attribute_combiner": "harmonic"},
            "takes weights of at least 0, and one above 0",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        GRMConfig(**settings)


# ------------------------------------------------------------------------------------------------------ the loss alone


@given(st.lists(st.tuples(*[numbers] * 4, *[ratings] * 4), min_size=1, max_size=6))
def test_the_loss_is_the_mean_over_the_ratings_of_a_row(rows):
    table = np.array(rows)
    attributes, given_ = (table[:, part].reshape(-1, 2, 2).transpose(1, 0, 2) for part in (slice(0, 4), slice(4, 8)))
    found = losses.attribute_loss(tensor(attributes.reshape(-1, 2)), tensor(given_.reshape(-1, 2)))
    for i, loss in enumerate(found.tolist()):
        errors = [
            (a - r) ** 2
            for a, r in zip(attributes[:, i].flatten(), given_[:, i].flatten(), strict=True)
            if not np.isnan(r)
        ]
        assert loss == pytest.approx(np.mean(errors) if errors else 0.0, rel=1e-9, abs=1e-12)
    swapped = losses.attribute_loss(*(tensor(v[::-1].reshape(-1, 2).copy()) for v in (attributes, given_)))
    shifted = losses.attribute_loss(tensor(attributes.reshape(-1, 2)) + 3, tensor(given_.reshape(-1, 2)) + 3)
    torch.testing.assert_close(swapped, found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shifted, found, rtol=1e-7, atol=1e-7)


def test_a_gap_has_no_gradient():
    attributes = torch.ones(4, 2, requires_grad=True)
    losses.attribute_loss(attributes, torch.tensor([[GAP, 2.0], [GAP, GAP], [GAP, GAP], [5.0, GAP]])).sum().backward()
    assert attributes.grad.tolist() == [[0.0, -2.0], [0.0, 0.0], [0.0, 0.0], [-8.0, 0.0]]


# ----------------------------------------------------------------------------------------------------- rows of ratings


USER = [{"role": "user", "content": "one"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def pair(**columns):
    return {"prompt": USER, "chosen": said("two"), "rejected": said("three four"), **columns}


def rated(text="five", **columns):
    return {"prompt": USER, "completion": said(text), **columns}


def dataset(rows):
    """Rows of two kinds: the columns of the other kind are empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return pytest.importorskip("datasets").Dataset.from_list([{**columns, **row} for row in rows])


def prepared(rows, names=NAMES, stream=False, **kwargs):
    data = dataset(rows)
    encoder = kwargs.pop("encoder", Encoder(TOKENIZER))
    return prepare_pairs(data.to_iterable_dataset() if stream else data, encoder, attributes=names, **kwargs)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", ["pair", "rated"])
def test_pairs_and_rated_completions_mix(stream, first):
    rows = [pair(margin=2.0, chosen_help=1), rated(help=3, short=GAP), pair(margin=1.0, rejected_short=-1.5)]
    order = [0, 1, 2] if first == "pair" else [1, 0, 2]
    data, counts = prepared([rows[i] for i in order], stream=stream)
    found = dict(zip(order, data, strict=True))
    np.testing.assert_equal(found[0]["chosen_ratings"], [1.0, GAP])
    np.testing.assert_equal(found[0]["rejected_ratings"], [GAP, GAP])
    np.testing.assert_equal(found[2]["rejected_ratings"], [GAP, -1.5])
    assert [found[i]["is_pair"] for i in range(3)] == [True, False, True]
    assert [found[i]["margin"] for i in range(3)] == [2.0, 0.0, 1.0]
    completion = Encoder(TOKENIZER).encode(USER, said("five"))
    np.testing.assert_equal(found[1]["chosen_ratings"], [3.0, GAP])
    assert found[1]["chosen_ids"] == completion.ids and found[1]["rejected_ids"] == completion.ids[:1]
    assert (counts.rows, counts.rated, counts.pairs) == (3, 1, 2) and not counts.changed
    assert str(counts).endswith(", 1 kept as rated completions")


def test_sides_with_ratings_are_turned_round_together():
    """Swap symmetry: a pair and the exchanged pair are the same row."""
    one = pair(label=0.25, chosen_help=1.0, rejected_help=2.0)
    other = pair(label=0.75, chosen_help=2.0, rejected_help=1.0)
    other["chosen"], other["rejected"] = other["rejected"], other["chosen"]
    (first,), _ = prepared([one], ["help"])
    (second,), _ = prepared([other], ["help"])
    assert first == second and first["chosen_ratings"] == [2.0]


def test_rated_texts_and_cut_and_dropped_ones():
    text = {"prompt": "one two", "completion": " three", "help": 1}
    (row,), _ = prepared([text])
    assert row["chosen_ids"] == Encoder(TOKENIZER).encode("one two", " three").ids
    long = [rated("six " * 40, help=1), rated(help=2)]
    data, counts = prepared(long, encoder=Encoder(TOKENIZER, 48, "drop"))
    assert (len(data), counts.dropped, counts.rated) == (1, 1, 1) and "1 dropped" in str(counts)
    data, counts = prepared(long, encoder=Encoder(TOKENIZER, 48))
    assert (len(data), counts.truncated, counts.rated) == (2, 1, 2)


@pytest.mark.parametrize(
    ("rows", "words", "names"),
    [
        ([pair(), rated(help=1)], "row 1: .*so it is a rated one.*Make the model with `attribute_names`", None),
        ([rated(help=1)], "row 0: .*so it is a rated one", None),
        ([rated(help=1, short=2), rated(help=None, short=GAP)], "row 1: it has none of the ratings `help`", NAMES),
        ([rated(helpful=1)], "row 0: it has none of the ratings `help`, `short`; found .*`helpful`", NAMES),
        ([rated(help="high")], "row 0: `help` is 'high'; it must be a finite number", NAMES),
        ([pair(chosen_help=True)], "row 0: `chosen_help` is True; it must be a finite", NAMES),
        ([rated(help=1.0), rated(help=math.inf)], "row 1: `help` is inf; it must be a finite", NAMES),
        ([rated(help=1e300, short=2)], "row 0: `help` is 1e.300; it must be a finite number, of at most", NAMES),
        ([{"completion": "a", "help": 1}], "a rated `completion` needs its `prompt`", NAMES),
        ([{"prompt": "a", "completion": said("b"), "help": 1}], "text and messages are mixed", NAMES),
        (
            [rated(help=1), pair(margin=1.0), pair()],
            "row 2: this row is messages with a prompt, no margin; row 1 is messages with a prompt, margin",
            NAMES,
        ),
    ],
)
def test_rows_that_cannot_be_used(rows, words, names):
    with pytest.raises(ValueError, match=words):
        prepared(rows, names)


def test_columns_of_numbers_that_nobody_reads_are_named():
    with pytest.warns(UserWarning, match="numbers that are ignored: chosen_score, length. The model's attributes are"):
        prepared([pair(chosen_score=1.0, chosen_help=2), rated(help=1, length=7)])


def test_a_rating_of_a_pair_without_a_side_is_named_and_a_gap_is_none():
    with pytest.warns(UserWarning, match="that are ignored: help. .*a pair `chosen_` and `rejected_` before them"):
        prepared([pair(help=3.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared([pair(chosen_help=3.0, help=GAP), rated(help=1.0)])


def test_an_endless_stream_of_pairs_is_not_read_for_rated_completions():
    from datasets import IterableDataset

    def endless(limit=None):
        number = 0
        while True:
            assert number < 5000, "a stream is read without an end"
            yield pair(chosen_help=1.0)
            number += 1

    stream, _ = prepare_pairs(IterableDataset.from_generator(endless), Encoder(TOKENIZER), attributes=["help"])
    assert next(iter(stream))["chosen_ratings"] == [1.0]


def test_a_stream_whose_first_rows_are_of_one_kind():
    from datasets import IterableDataset

    from grm_hf.pairs import LOOKAHEAD

    def stream(first, then):
        columns = {**dict.fromkeys({**first, **then}), "help": None}
        rows = [{**columns, **row} for row in [*[first] * LOOKAHEAD, then]]
        return prepare_pairs(
            IterableDataset.from_generator(lambda: iter(rows)), Encoder(TOKENIZER), attributes=["help"]
        )[0]

    found = list(stream(pair(margin=2.0), rated(help=1.0)))[-1]
    assert (found["is_pair"], found["chosen_ratings"], found["margin"]) == (False, [1.0], 0.0)
    assert list(stream(rated(help=1.0), pair()))[-1]["is_pair"]
    with pytest.raises(ValueError, match=f"row {LOOKAHEAD}: this pair has margin, and the first {LOOKAHEAD} rows"):
        list(stream(rated(help=1.0), pair(margin=2.0)))


# ------------------------------------------------------------------------------------------------------------ training


# For each of 14 rows: a rated completion, or a pair with or without ratings; the second batch of four has no pair.
KINDS = "PRPQRRRRQPRPRP"


def mixed_rows(kinds=KINDS, label=True, mean=0.0):
    from trainers import rows

    generator, made = np.random.default_rng(3), []
    for number, (kind, row) in enumerate(zip(kinds, rows(len(kinds), 2), strict=True)):
        values = [float(value) for value in generator.normal(mean, size=4).round(2)]
        row = {**row, "label": 0.5 + 0.1 * (number % 6)} if label else row
        if kind == "R":
            row = {"prompt": row["prompt"], "completion": row["chosen"], "help": values[0]}
            row["short"] = values[1] if number % 2 else None
        if kind == "Q":
            row |= {"chosen_help": values[0], "rejected_short": values[1], "chosen_short": values[2]}
        made.append(row)
    return made


def run_of(folder, model, rows, **kwargs):
    """A run that takes its rows in their order."""
    from trainers import trainer

    run = trainer(folder, model, dataset(rows), **{"alpha": 0.5, **CONSTANT, **kwargs})
    run._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(run.train_dataset)
    return run


def by_hand(run, steps, gamma, zero=0.0):
    """Plain gradient descent on the whole objective, for each step a list of batches of rows. Reads the texts from the
    prepared data, and attributes by the head's own modules."""
    model, data, alpha = copy.deepcopy(run.model).train(), run.train_dataset, run.args.alpha
    text = run.args.text_loss != "none"
    for batches in steps:
        rewards_of_pairs, loss = [], 0.0
        for members in batches:
            of_rows = []
            for row in (data[i] for i in members):
                of_row, errors = 0.0, []
                for side in ("chosen", "rejected"):
                    if side == "rejected" and not row["is_pair"]:
                        continue
                    ids = torch.tensor([row[f"{side}_ids"]])
                    hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
                    attributes = model.score.attributes(hidden)
                    wanted = torch.tensor(row[f"{side}_ratings"], dtype=torch.float64)
                    errors += [(a - r) ** 2 for a, r in zip(attributes, wanted, strict=True) if not torch.isnan(r)]
                    head, weights = model.score, model.config.attribute_weights
                    if weights is None:
                        reward = head.reward(hidden)[0]
                    elif weights == "gate":
                        shares = head.mixture(hidden).exp()
                        reward = (shares / shares.sum() * attributes).sum()
                    else:
                        reward = sum(w * a for w, a in zip(weights, attributes, strict=True))
                    if row["is_pair"]:
                        rewards_of_pairs.append(reward)
                if row["is_pair"]:
                    d, p = rewards_of_pairs[-2] - rewards_of_pairs[-1], row["label"]
                    of_row = -p * d.sigmoid().log() - (1 - p) * (-d).sigmoid().log()
                    of_row = of_row + 0.2 * (rewards_of_pairs[-2] + rewards_of_pairs[-1]) ** 2
                    if text:
                        ids = torch.tensor([row["chosen_ids"]])
                        logps = model.lm(input_ids=ids).logits[0, :-1].log_softmax(-1)
                        likelihood = logps.gather(1, ids[0, 1:, None])[row["chosen_start"] - 1 :].sum()
                        of_row = (1 - alpha) * of_row - alpha * (run.args.beta * likelihood).sigmoid().log()
                if errors:
                    of_row = of_row + gamma * sum(errors) / len(errors)
                of_rows.append(of_row)
            loss = loss + sum(of_rows) / len(members) / len(batches)
        if rewards_of_pairs:
            loss = loss + (1 - alpha if text else 1) * zero * torch.stack(rewards_of_pairs).mean() ** 2
        descend(model, loss)
    return dict(model.named_parameters())


WAYS = {
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
}


@pytest.mark.trainer
@pytest.mark.parametrize(
    ("weights", "kind", "layout", "way"),
    [
        (None, "none", "padded", "whole"),
        (None, "sft", "shared_prefix", "both"),
        ([0.7, -0.3], "sft", "padded", "accumulated"),
        ([0.7, -0.3], "none", "packed", "budget"),
        ("gate", "sft", "packed", "whole"),
        ("gate", "sft", "shared_prefix", "budget"),
        ("gate", "none", "padded", "both"),
        ([0.7, -0.3], "sft", "shared_prefix", "short"),
    ],
)
def test_steps_over_mixed_rows_are_those_by_hand(tmp_path, double, weights, kind, layout, way):
    """Two steps over 14 rows, whose batches hold pairs, rated completions, or both, with every other term on."""
    settings, steps = WAYS[way]
    run = run_of(
        tmp_path, model_of(attribute_weights=weights).double(), mixed_rows(), regularizer=kind, layout=layout,
        attribute_loss_weight=0.3, center_rewards_coefficient=0.2, batch_sum_to_zero=0.7, max_steps=2, **settings,
    )  # fmt: skip
    expected, without = by_hand(run, steps, 0.3, 0.7), by_hand(run, steps, 0.0, 0.7)
    run.train()
    moved = 0.0
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-8, atol=1e-10, msg=name)
        moved += (parameter - without[name]).abs().sum()
    assert moved > 1e-3


@pytest.mark.trainer
@pytest.mark.parametrize("text", ["none", "sft", "sft_token_mean", "dpo_noref", "dpo"])
def test_rated_completions_change_no_other_term(tmp_path, double, text):
    """With gamma 0, rated completions between pairs are rows that cost nothing: of 8 rows 4, of 4 rows none."""
    gradients = {}
    for name, kinds in {"alone": "PPPP", "mixed": "PRPRPRPR"}.items():
        rows = [row for row, kind in zip(mixed_rows("PRPRPRPR"), "PRPRPRPR", strict=True) if kind in kinds]
        run = run_of(
            tmp_path / name, model_of().double(), rows, regularizer=text, attribute_loss_weight=0.0, layout="padded",
            per_device_train_batch_size=8, max_steps=1, center_rewards_coefficient=0.1,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        factor = 2 if name == "mixed" else 1  # a mean over 8 rows, half of which count nothing
        gradients[name] = {n: factor * (p.detach() - before[n]) for n, p in run.model.named_parameters()}
        line = [row for row in run.state.log_history if "accuracy" in row][0]
        gradients[name]["logged"] = torch.tensor(
            [line[n] for n in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "pair_loss")]
        )
    for name, gradient in gradients["alone"].items():
        torch.testing.assert_close(gradients["mixed"][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.trainer
def test_gamma_zero_changes_no_bit(tmp_path):
    """Of a run on pairs that have ratings."""
    from trainers import grm, pairs, trainer

    plain, data = grm(), pairs(chosen_help=[3.0] * 16, rejected_short=[-2.0] * 16)
    runs = {}
    for name, model in {"plain": plain, "attributes": model_of(), "gamma": model_of()}.items():
        if name != "plain":
            model.lm.load_state_dict(plain.lm.state_dict())
            model.score.reward.load_state_dict(plain.score.state_dict())
        runs[name] = trainer(
            tmp_path / name, copy.deepcopy(model), data, pairs(6, seed=1), regularizer="sft", max_steps=8,
            gradient_accumulation_steps=2, attribute_loss_weight=float(name == "gamma"), batch_sum_to_zero=0.5,
        )  # fmt: skip
        runs[name].train()
    rated = dict(runs.pop("gamma").model.named_parameters())
    one, other = (dict(run.model.named_parameters()) for run in runs.values())
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name.replace("score.", "score.reward.")]), name
    assert not torch.equal(rated["score.reward.out.weight"], other["score.reward.out.weight"])
    plain_log, log = (run.state.log_history for run in runs.values())
    for before, after in zip(plain_log, log, strict=True):
        for name in before.keys() - {"tokens_per_second", "train_runtime", "total_flos"}:
            assert "per_second" in name or after[name] == before[name], name
    found = [run.evaluate() for run in runs.values()]
    assert found[0]["eval_loss"] == found[1]["eval_loss"]


@pytest.mark.trainer
@pytest.mark.parametrize("weights", [None, "gate"])
def test_ratings_are_learned_and_logged_in_training_and_evaluation(tmp_path, weights):
    from trainers import trainer

    evaluation = dataset(mixed_rows("PRQRQ", label=False))
    run = trainer(
        tmp_path, model_of(attribute_weights=weights), dataset(mixed_rows(label=False, mean=3.0)), evaluation,
        regularizer="sft", max_steps=30, per_device_train_batch_size=7, attribute_loss_weight=2.0,
    )  # fmt: skip
    run.train()
    lines = [row for row in run.state.log_history if "mse_help" in row]
    for name in ("mse_help", "mse_short", "attribute_loss"):
        first, last = (np.mean([line[name] for line in part]) for part in (lines[:4], lines[-4:]))
        assert last < 0.5 * first, name
    found = run.evaluate()
    model, data = run.model.eval(), run.eval_dataset
    errors = {name: [] for name in NAMES}
    pair_rewards, of_rows = [], []
    for row in data:
        own = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row[f"{side}_ids"]])
            with torch.no_grad():
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            for name, value, rating in zip(NAMES, out.attributes[0].tolist(), row[f"{side}_ratings"], strict=True):
                if not math.isnan(rating):
                    errors[name].append((value - rating) ** 2)
                    own.append(errors[name][-1])
            if row["is_pair"]:
                pair_rewards.append(out.logits.item())
        of_rows.append(np.mean(own) if own else 0.0)
    for name in NAMES:
        assert found[f"eval_mse_{name}"] == pytest.approx(np.mean(errors[name]), rel=1e-4)
    assert found["eval_attribute_loss"] == pytest.approx(np.mean(of_rows), rel=1e-4)
    rewards = np.array(pair_rewards)
    assert found["eval_mean_reward"] == pytest.approx(rewards.mean(), rel=1e-4, abs=1e-6)
    assert found["eval_min_reward"] == pytest.approx(rewards.min(), rel=1e-4, abs=1e-6)
    assert model.config.reward_std == pytest.approx(rewards.std(), rel=1e-3, abs=2e-3)
    assert found["eval_accuracy"] == np.mean(rewards[::2] > rewards[1::2])
    pair_rows = sum(data["is_pair"])
    whole = found["eval_pair_loss"] * pair_rows * 0.99 + 0.01 * found["eval_text_loss"] * pair_rows
    assert found["eval_loss"] == pytest.approx(whole / len(data) + 2 * found["eval_attribute_loss"], rel=1e-4)
    (seen,) = [rows for (_, step), rows in run.eval_pairs.items() if step == 30]
    assert len(seen) == pair_rows
    predictions = run.predict(run.eval_dataset).predictions
    assert np.isnan(predictions[:, 1]).tolist() == [not is_pair for is_pair in data["is_pair"]]


@pytest.mark.trainer
def test_a_run_on_rated_completions_alone(tmp_path):
    """HelpSteer2's regression: no pair, no pair metric."""
    from trainers import lora, trainer

    rows = mixed_rows("R" * 8, label=False)
    model = model_of(attribute_weights=[1, 0])
    run = trainer(tmp_path, model, dataset(rows), dataset(rows[:3]), batch_sum_to_zero=1.0)
    run.train()
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(found["eval_attribute_loss"], rel=1e-5)
    assert "eval_accuracy" not in found and "eval_mean_reward" not in found
    assert run.model.config.reward_std == 1.0 and run.data_counts["train"].pairs == 0
    run.create_model_card()
    assert "Loss: `1 * mean_i (a_i - rating_i)^2`" in (tmp_path / "README.md").read_text()
    again = trainer(tmp_path / "dpo", model_of(), dataset(rows), peft_config=lora(), regularizer="dpo", max_steps=1)
    again.train()  # a text loss has nothing to do, and does not mind


@pytest.mark.trainer
def test_a_stream_of_mixed_rows_trains_as_the_same_rows_in_memory(tmp_path):
    from trainers import trainer

    weights = []
    for stream in (False, True):
        data = dataset(mixed_rows())
        run = trainer(
            tmp_path / str(stream), model_of(), data.to_iterable_dataset() if stream else data, regularizer="sft",
            max_steps=2, per_device_train_batch_size=4,
        )  # fmt: skip
        run._get_train_sampler = lambda *_, run=run: torch.utils.data.SequentialSampler(run.train_dataset)
        run.train()
        assert run.data_counts["train"].rated >= 5
        weights.append(list(run.model.parameters()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.trainer
def test_an_attribute_without_any_rating_and_ratings_that_do_not_count(tmp_path):
    from trainers import pairs, settings, trainer

    rows = [{**row, "short": None} for row in mixed_rows("RRR", label=False)]
    with pytest.raises(ValueError, match="from row 0 to row 2, rates short, which the model has"):
        trainer(tmp_path, model_of(), dataset(rows))
    with pytest.warns(UserWarning, match="ratings in the data are ignored: attribute_loss_weight is 0"):
        trainer(tmp_path, model_of(), dataset(mixed_rows()), attribute_loss_weight=0.0)
    with pytest.raises(ValueError, match="row 4: .*so it is a rated one"):
        trainer(tmp_path, data=dataset([*pairs(4), *rows]))
    with pytest.raises(ValueError, match="`attribute_loss_weight` is -1; it is a weight"):
        settings(tmp_path, attribute_loss_weight=-1)


@pytest.mark.trainer
def test_attributes_that_nothing_trains_and_a_weight_of_nothing_are_named(tmp_path, caplog):
    from trainers import pairs, trainer

    with pytest.warns(UserWarning, match="Nothing trains the attributes help, short: no row"):
        trainer(tmp_path, model_of(), pairs(4))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Nothing trains")
        trainer(tmp_path, model_of(attribute_weights="gate"), pairs(4))
    assert "`attribute_loss_weight` is ignored" not in caplog.text
    trainer(tmp_path, data=pairs(4), attribute_loss_weight=0.5)
    assert "`attribute_loss_weight` is ignored: the model has no attributes" in caplog.text


@pytest.mark.trainer
@pytest.mark.parametrize("metric", ["mse_help", "eval_perplexity", "attribute_loss", "accuracy"])
def test_the_best_checkpoint_has_the_smallest_error(tmp_path, metric):
    from trainers import logged, trainer

    data = dataset(mixed_rows())
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "regularizer": "sft"}
    run = trainer(tmp_path, model_of(), data, data, **steps, **best)
    run.train()
    values = logged(run, f"eval_{metric.removeprefix('eval_')}")
    assert len(values) == 4 and run.state.best_metric == (max if metric == "accuracy" else min)(values)


@pytest.mark.trainer
def test_the_stored_mean_is_that_of_the_best_checkpoint(tmp_path):
    from trainers import logged, trainer

    data = dataset(mixed_rows())
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mean_reward", "greater_is_better": False}

    def finished(resume=None):
        run = trainer(tmp_path, model_of(), data, data, max_steps=3, learning_rate=0.03, **steps, **best)
        run.train(resume_from_checkpoint=resume)
        config = run.model.config
        assert config.reward_mean == pytest.approx(run.state.best_metric, rel=1e-6)
        return run.state.best_global_step, logged(run, "eval_mean_reward"), (config.reward_mean, config.reward_std)

    step, means, moments = finished()
    if step == 3:  # then the other end is the best one
        best["greater_is_better"] = True
        step, means, moments = finished()
    assert step < 3 and moments[0] != pytest.approx(means[-1], rel=1e-2)
    assert finished(str(tmp_path / f"checkpoint-{step + 1}"))[2] == moments
    assert finished(str(tmp_path / "checkpoint-3"))[2] == moments


@pytest.mark.trainer
def test_a_model_that_is_trained_further_forgets_its_rewards(tmp_path):
    from trainers import pairs, trainer

    model = model_of(attribute_weights="gate")
    measured(model.config)
    trainer(tmp_path, model, pairs(8), max_steps=1).train()
    assert of_rewards(model.config) == (0.0, 1.0, 1.0, None)


@pytest.mark.trainer
def test_the_settings_of_a_recipe_make_the_model(tmp_path):
    from trainers import base, trainer

    base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    init = {"head_hidden_size": 8, "attribute_names": NAMES, "attribute_weights": [0.5, 0.5]}
    run = trainer(tmp_path / "run", str(tmp_path / "base"), dataset(mixed_rows()), model_init_kwargs=init)
    assert run.model.config.attribute_names == NAMES and run.model.config.attribute_weights == [0.5, 0.5]


@pytest.mark.trainer
@pytest.mark.parametrize("weights", [None, [0.7, -0.3], "gate"])
def test_adapters_train_save_load_and_merge_attributes(tmp_path, weights):
    from trainers import lora, trainer

    from grm_hf.hub.merge import merge_adapter
    from grm_hf.scoring import verify

    run = trainer(
        tmp_path, model_of(attribute_weights=weights), dataset(mixed_rows()), peft_config=lora(), regularizer="dpo",
        max_steps=3,
    )  # fmt: skip
    run.train()
    run.save_model()
    expected = outputs(run.model.eval())
    assert expected.attributes.shape == (3, 2)
    verify(tmp_path)
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path)
    merged = merge_adapter(tmp_path, tmp_path / "merged")
    verify(tmp_path / "merged")
    for model in (loaded, merged.eval()):
        for name in ("logits", "attributes"):
            torch.testing.assert_close(outputs(model)[name], expected[name], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ scoring, golden rows

CHATS = [
    {"prompt": f"Say {word}.", "response": " ".join([word] * count)}
    for count, word in enumerate(["a", "bee", "sea"], 1)
]


def by_forward(model, chats=CHATS):
    """Reward and attributes of each chat, one at a time."""
    encoder, found = Encoder.from_config(TOKENIZER, model.config), []
    for chat in chats:
        ids = torch.tensor([encoder.encode([{"role": "user", "content": chat["prompt"]}], chat["response"]).ids])
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        found.append([out.logits.item(), dict(zip(NAMES, out.attributes[0].tolist(), strict=True))])
    return found


@pytest.mark.parametrize(
    "settings", [{"deterministic": True}, *({"layout": n} for n in ("padded", "packed", "shared_prefix"))]
)
def test_the_scorer_gives_attributes_by_their_names(settings):
    from grm_hf import GRMScorer

    model = model_of(attribute_weights="gate")
    scorer = GRMScorer(model, TOKENIZER, **settings)
    exact = {"rel": 0, "abs": 0} if "deterministic" in settings else {"rel": 1e-4, "abs": 1e-5}
    expected = by_forward(model)
    for found, (_, attributes) in zip(scorer.attributes([*CHATS, CHATS[0]]), [*expected, expected[0]], strict=True):
        assert found == pytest.approx(attributes, **exact)
    for result, (reward, attributes) in zip(scorer.stream(CHATS), expected, strict=True):
        assert (result.score, result.attributes) == (
            pytest.approx(reward, **exact),
            pytest.approx(attributes, **exact),
        )
    row = {"prompt": USER, "chosen": said("two"), "rejected": said("three four")}
    sides = by_forward(model, [{"prompt": "one", "response": text} for text in ("two", "three four")])
    (found,) = scorer.attributes_of_pairs([row])
    for side, (_, attributes) in zip(found, sides, strict=True):
        assert side == pytest.approx(attributes, **exact)


def test_a_scorer_without_attributes_says_so():
    from grm_hf import GRMScorer

    scorer = GRMScorer(GRMForSequenceClassification.from_base(tiny_llama(TOKENIZER, 0)).eval(), TOKENIZER)
    with pytest.raises(ValueError, match="no attributes: its configuration has no `attribute_names`"):
        scorer.attributes(CHATS)
    assert [result.attributes for result in scorer.stream(CHATS)] == [None] * 3


def test_golden_rows_hold_attributes_and_notice_their_change(tmp_path):
    from grm_hf.scoring import GoldenError, save_golden, verify

    model = model_of(attribute_weights=None)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    save_golden(model, TOKENIZER, tmp_path, CHATS)
    verify(tmp_path)
    with torch.no_grad():
        model.score.attributes.out.bias[1] += 0.5  # no reward changes
    model.save_pretrained(tmp_path)
    with pytest.raises(GoldenError, match=r"DIFFERS: attributes \['short'\]"):
        verify(tmp_path)


def test_grm_score_prints_attributes(tmp_path, capsys):
    import json

    from grm_hf.cli import main

    model = model_of(attribute_weights=[1.0, 2.0])
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    main(["score", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, (reward, attributes) in zip(lines, by_forward(model), strict=True):
        assert line["score"] == pytest.approx(reward, abs=1e-4)
        assert line["attributes"] == pytest.approx(attributes, abs=1e-4)


def test_several_heads_as_one_leave_the_attributes_out():
    from grm_hf.rewards import ensemble_heads

    members = [model_of(attribute_weights="gate") for _ in range(2)]
    with torch.no_grad():
        members[1].score.attributes.out.bias += 1
    expected = sum(outputs(model).logits for model in members) / 2
    measured(members[0].config)
    found = outputs(ensemble_heads(members[0], [model.score for model in members]))
    torch.testing.assert_close(found.logits, expected)
    assert of_rewards(members[0].config) == (0.0, 1.0, 1.0, None)
    assert found.attributes is None


# ------------------------------------------------------------------------------------------------------ fitted weights


class Rated:
    """What [`fit_attribute_weights`] asks of a scorer, over attributes that are given."""

    def __init__(self, model, table):
        self.model, self.table = model, table

    def attributes_of_pairs(self, pairs):
        return [tuple(dict(zip(NAMES, side, strict=True)) for side in row) for row in self.table]


def test_fitted_weights_are_those_of_logistic_regression():
    """Against gradient descent in numpy, on 300 pairs with soft labels among them."""
    from grm_hf.scoring import fit_attribute_weights

    generator = np.random.default_rng(0)
    table = generator.normal(size=(300, 2, 2)) * [1.0, 30.0]
    x = table[:, 0] - table[:, 1]
    better = generator.random(300) < 1 / (1 + np.exp(-x @ [1.0, -0.02]))
    labels = np.where(generator.random(300) < 0.3, generator.random(300), better)
    model = model_of(attribute_weights="gate")
    measured(model.config)
    pairs = [{} if label == 1.0 else {"label": label} for label in labels]
    fitted = fit_attribute_weights(Rated(model, table), pairs)
    weights = np.zeros(2)
    for _ in range(20000):
        gradient = x.T @ (1 / (1 + np.exp(-x @ weights)) - labels)
        weights -= gradient * [1e-2, 1e-5]
    assert np.abs(x.T @ (1 / (1 + np.exp(-x @ weights)) - labels)).max() < 1e-6
    assert list(fitted.values()) == pytest.approx(weights.tolist(), rel=1e-6)
    assert model.config.attribute_weights == list(fitted.values()) and list(fitted) == NAMES
    assert of_rewards(model.config) == (0.0, 1.0, 1.0, None)  # they were those of the gate's reward
    out = outputs(model)
    torch.testing.assert_close(out.logits[:, 0], out.attributes @ torch.tensor(weights, dtype=torch.float32))


@pytest.mark.parametrize("weights", [None, [0.3, 0.3], "gate"])
def test_a_model_with_fitted_weights_saves_and_scores(tmp_path, weights):
    from grm_hf import GRMScorer
    from grm_hf.scoring import fit_attribute_weights, save_golden, verify

    model = model_of(attribute_weights=weights)
    rows = [
        {"prompt": USER, "chosen": said(f"two {'x' * (i % 5)}"), "rejected": said(f"{'three ' * (i % 3)} y{i}")}
        for i in range(12)
    ]
    rows += [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:5]]  # contradictions
    fitted = fit_attribute_weights(GRMScorer(model, TOKENIZER), rows)
    for before, (chosen, rejected) in zip(rows, GRMScorer(model, TOKENIZER).score_pairs(rows), strict=True):
        ((a, b),) = GRMScorer(model, TOKENIZER).attributes_of_pairs([before])
        difference = sum(weight * (a[name] - b[name]) for name, weight in fitted.items())
        assert chosen - rejected == pytest.approx(difference, rel=1e-3, abs=1e-4)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    save_golden(model, TOKENIZER, tmp_path)
    verify(tmp_path)
    again = GRMForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.attribute_weights == list(fitted.values())


def test_fitting_warns_of_pairs_that_separate_and_refuses_what_it_cannot_fit():
    from grm_hf.scoring import fit_attribute_weights

    table = np.array([[[1.0, 5.0], [0.0, 4.0]], [[2.0, 1.0], [1.5, 3.0]]])
    model = model_of(attribute_weights=None)
    with pytest.warns(UserWarning, match="separate chosen from rejected"):
        fitted = fit_attribute_weights(Rated(model, table), [{}, {}])
    assert fitted["help"] > 0 and all(map(math.isfinite, fitted.values()))
    with pytest.raises(ValueError, match="the same in every pair"):
        fit_attribute_weights(Rated(model, table[:, [0, 0]]), [{}, {}])
    with pytest.raises(ValueError, match="Every pair is a tie"):
        fit_attribute_weights(Rated(model, table), [{"label": 0.5}, {"label": 0.5}])
    with pytest.raises(ValueError, match="no pairs"):
        fit_attribute_weights(Rated(model, table[:0]), [])
    for label in (3.0, -1, GAP, "yes", True):
        with pytest.raises(ValueError, match="fitting dataset, row 1: `label` is .* from 0 to 1"):
            fit_attribute_weights(Rated(model, table), [{"label": 0.5}, {"label": label}])
    with pytest.raises(ValueError, match="fitted for attribute_combiner='sum'.*'harmonic'"):
        fit_attribute_weights(
            Rated(model_of(attribute_weights="gate", attribute_combiner="harmonic"), table), [{}, {}]
        )


def test_weights_of_an_adapter_are_not_fitted():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model_of(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    )
    with pytest.raises(ValueError, match="Merge an adapter first"):
        adapted.fix_attribute_weights([1.0, 1.0])
    with pytest.raises(ValueError, match="finite number for each of 2"):
        model_of().fix_attribute_weights([1.0])


# ------------------------------------------------------------------------------------------------------ other programs


@pytest.mark.parametrize("weights", [None, [0.7, -0.3]])
@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_an_export_has_the_rewards_and_leaves_the_attributes_behind(tmp_path, head_type, weights, caplog):
    from grm_hf.hub import export
    from grm_hf.scoring import save_golden, verify

    model = model_of(head_type, attribute_weights=weights)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    save_golden(model, TOKENIZER, tmp_path / "model")
    exported = export(tmp_path / "model", tmp_path / "export")
    assert (
        exported.architecture == {"linear": "LlamaForSequenceClassification", "mlp": "Qwen2ForRewardModel"}[head_type]
    )
    assert exported.difference < 1e-5
    verify(tmp_path / "export")


@pytest.mark.parametrize(
    ("weights", "combiner"), [("gate", "sum"), ([1.0, 2.0], "harmonic"), ([1.0, 2.0], "geometric")]
)
def test_no_export_of_what_no_engine_computes(tmp_path, weights, combiner):
    from grm_hf.hub import export

    model_of("linear", attribute_weights=weights, attribute_combiner=combiner).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no fixed sum of the attributes .*; or fix the weights by"):
        export(tmp_path / "model", tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.trainer
def test_the_card_states_the_objective_and_the_attributes(tmp_path):
    from trainers import trainer

    run = trainer(
        tmp_path, model_of(attribute_weights=[0.7, -0.3]), dataset(mixed_rows(label=False)),
        dataset(mixed_rows("PRQ", label=False)), regularizer="sft", attribute_loss_weight=0.5,
    )  # fmt: skip
    run.train()
    run.evaluate()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert (
        "0.99 * -log sigmoid(r_c - r_r) + 0.01 * -log sigmoid(beta * s_c) + 0.5 * mean_i (a_i - rating_i)^2`" in text
    )
    assert "help, short; the reward is `sum_i w_i a_i` with weights 0.7, -0.3" in text
    assert "squared error of short" in text and "2 pairs" in text


@pytest.mark.trainer
def test_the_card_of_an_evaluation_on_rated_completions_alone(tmp_path):
    from trainers import logged, trainer

    run = trainer(tmp_path, model_of(), dataset(mixed_rows()), dataset(mixed_rows("RRR", label=False)))
    run.train()
    run.evaluate()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "Evaluation set of the run, 3 rated completions, at step 4." in text and "model-index" not in text
    assert f"| squared error of help | {logged(run, 'eval_mse_help')[-1]:.3f} |" in text


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "attributes.md").read_text(encoding="utf-8")


def test_the_page_lists_the_combiners_of_the_code():
    shown = re.findall(r'^\| `"(\w+)"` \| `(.+)` \| (.+?) \|$', PAGE, re.MULTILINE)
    assert [(name, formula.replace("\\|", "|"), source) for name, formula, source in shown] == [
        (name, combiner.formula, combiner.source) for name, combiner in COMBINERS.items()
    ]


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore:The attributes separate")
def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    from grm_hf.scoring import verify

    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    tiny_llama(TOKENIZER, 0).save_pretrained(tmp_path / "Qwen/Qwen3-0.6B")
    TOKENIZER.save_pretrained(tmp_path / "Qwen/Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    code = code.replace(
        "attribute_loss_weight=0.5,",
        "attribute_loss_weight=0.5, max_steps=1, bf16=False, use_cpu=True, report_to='none', save_strategy='no',",
    )
    exec(compile(code, "attributes.md", "exec"), {})
    assert "'helpfulness': " in capsys.readouterr().out
    verify("qwen3-fitted")
