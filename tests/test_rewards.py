"""Transformations, ensembles and labels against their defining properties; reward functions and PPO's reward model
against the encoder and the model's own forward, without any trainer."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import (
    ANSWERS,
    CHATML,
    PROMPTS,
    TOKENIZERS,
    alone,
    completions,
    expected,
    grm,
    read_by_ppo,
    rollout,
)
from tiny import OTHER_HEADS, byte_tokenizer, chatml_tokenizer, with_head

from grm_hf.configuration_grm import save_policies
from grm_hf.pairs import Encoder
from grm_hf.rewards import (
    RewardEnsemble,
    Transform,
    center,
    clip,
    combine,
    delta,
    ensemble_heads,
    factor_thresholds,
    grm_reward_func,
    hierarchical_pairs,
    length_residual,
    log_sigmoid,
    logical_and,
    ppo_reward_model,
    reference_reward,
    standardize,
)
from grm_hf.scoring import GRMScorer


REAL = st.floats(-20, 20, allow_nan=False)
rewards_lists = st.lists(REAL, min_size=1, max_size=8)


# ----------------------------------------------------------------------------------------------------- transformations


@settings(deadline=None, max_examples=40)
@given(rewards_lists, REAL)
def test_log_sigmoid(values, reference):
    u = log_sigmoid(values, reference)
    for value, changed in zip(values, u.tolist(), strict=True):
        assert changed == pytest.approx(-math.log1p(math.exp(-(value - reference))), abs=1e-12)
    assert (u <= 0).all()
    assert log_sigmoid([reference], reference).item() == pytest.approx(-math.log(2))
    assert (log_sigmoid(sorted(values), reference).diff() >= 0).all()
    shifted = log_sigmoid([value + 3 for value in values], reference + 3)  # Bradley-Terry knows rewards up to a shift
    torch.testing.assert_close(shifted, u)


def test_log_sigmoid_slope_saturates_above_the_reference():
    rewards = torch.tensor([-10.0, 0.0, 1.0, 12.0], dtype=torch.float64, requires_grad=True)
    log_sigmoid(rewards, 1.0).sum().backward()
    torch.testing.assert_close(rewards.grad, torch.sigmoid(1.0 - rewards.detach()))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(REAL, REAL), min_size=1, max_size=6), REAL, REAL)
def test_logical_and_is_the_probability_of_both(pairs, first, second):
    together = logical_and(torch.tensor(pairs, dtype=torch.float64).T, [first, second])
    for (a, b), u in zip(pairs, together.tolist(), strict=True):
        odds = 1 / (1 + math.exp(first - a)) * 1 / (1 + math.exp(second - b))
        assert math.exp(u) == pytest.approx(odds, rel=1e-9, abs=1e-300)


def test_logical_and_takes_a_reference_per_reward_and_refuses_other_shapes():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    references = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    by_hand = [log_sigmoid(1.0, 0.0) + log_sigmoid(3.0, 2.0), log_sigmoid(2.0, 1.0) + log_sigmoid(4.0, 5.0)]
    torch.testing.assert_close(logical_and(rewards, references), torch.stack(by_hand).float())
    with pytest.raises(ValueError, match=r"\(2, 2\) and `references` \(3,\)"):
        logical_and(rewards, [1.0, 2.0, 3.0])


def test_reference_reward_is_a_quantile_per_prompt():
    samples = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [10.0, 10.0, 10.0, 10.0, 10.0]])
    torch.testing.assert_close(reference_reward(samples, 0.75), torch.tensor([3.0, 10.0]))


@settings(deadline=None, max_examples=40)
@given(rewards_lists, REAL)
def test_clip_earns_nothing_above_the_threshold(values, threshold):
    clipped = clip(values, threshold)
    assert clipped.tolist() == pytest.approx([value - threshold if value < threshold else 0.0 for value in values])
    assert (clipped <= 0).all()


@settings(deadline=None, max_examples=40)
@given(rewards_lists)
def test_delta_telescopes(values):
    changed = delta(values)
    assert changed[-1] == 0
    returns = changed.flip(0).cumsum(0).flip(0)
    assert returns[:-1].tolist() == pytest.approx(values[:-1], abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(REAL, min_size=2, max_size=6), st.integers(1, 5))
def test_repeating_a_good_step_earns_nothing(values, times):
    """Steps in front of the answer are repeated: the return of the whole stays that of its first step."""
    best = max(values[:-1])
    repeated = [*values[:-1], *[best] * times, values[-1]]
    assert delta(repeated).sum().item() == pytest.approx(delta(values).sum().item(), abs=1e-9)
    assert clip(repeated, best).sum() <= clip(values, best).sum() + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(REAL, st.integers(1, 50), st.integers(0, 2)), min_size=3, max_size=20), REAL)
def test_length_residual(rows, slope):
    rewards, lengths = (torch.tensor(column, dtype=torch.float64) for column in list(zip(*rows, strict=True))[:2])
    groups = [group for _, _, group in rows]
    flat, moved = (
        length_residual(rewards, lengths, groups),
        length_residual(rewards + slope * lengths, lengths, groups),
    )
    covariance, spread = 0.0, 0.0
    for group in set(groups):
        own = torch.tensor(groups) == group
        x, y, mean = lengths[own], flat[own], rewards[own].mean()
        covariance, spread = covariance + ((x - x.mean()) * y).sum(), spread + x.var(correction=0)
        assert y.mean().item() == pytest.approx(mean.item(), abs=1e-9)
        # Whatever length adds to a reward goes, but for the mean.
        torch.testing.assert_close(moved[own], y + slope * x.mean(), atol=1e-6, rtol=1e-6)
    if spread:
        assert covariance == pytest.approx(0, abs=1e-6)
    else:
        assert torch.equal(flat, rewards)
    torch.testing.assert_close(length_residual(flat, lengths, groups), flat)  # a second time changes nothing


def test_length_residual_removes_a_slope_and_only_that():
    rewards, lengths = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1, 1, 3, 3])
    torch.testing.assert_close(length_residual(rewards + 0.5 * lengths, lengths), rewards + 1.0)
    assert length_residual([1.0, 2.0], [5, 5]).tolist() == [1.0, 2.0]
    # Between groups length may go with quality: that is no bias of an answer over another to the same prompt.
    assert length_residual([0.0, 0.0, 9.0, 9.0], [1, 2, 8, 9], "aabb").tolist() == [0.0, 0.0, 9.0, 9.0]
    with pytest.raises(ValueError, match=r"\(2,\) rewards and \(3,\) lengths"):
        length_residual([1.0, 2.0], [1, 2, 3])


def test_center_and_standardize():
    values = [1.0, 3.0, 8.0]
    mean, std = 4.0, torch.tensor(values).std(correction=0).item()
    assert center(values, mean).tolist() == [-3.0, -1.0, 4.0]
    done = standardize(values, mean, std)
    assert done.mean().item() == pytest.approx(0) and done.std(correction=0).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="greater than 0"):
        standardize(values, 0.0, 0.0)


def test_transform_by_name_is_the_function_with_stored_statistics():
    config = grm().config
    config.reward_mean, config.reward_std = 2.0, 4.0
    values, lengths = [1.0, 6.0, 2.0], [3, 9, 4]
    for how, reference, by_hand in [
        (None, None, values),
        ("center", None, center(values, 2.0)),
        ("standardize", None, standardize(values, 2.0, 4.0)),
        ("log_sigmoid", None, log_sigmoid(values, 2.0)),
        ("log_sigmoid", 5.0, log_sigmoid(values, 5.0)),
        ("clip", 3.0, clip(values, 3.0)),
        ("length_residual", None, length_residual(values, lengths)),
        (torch.tanh, None, torch.tensor(values).double().tanh()),
    ]:
        done = Transform(how, config, reference)(values, lengths)
        torch.testing.assert_close(done, torch.as_tensor(by_hand, dtype=torch.float64))
    per_row = Transform("log_sigmoid", config)(values, reference=[0.0, 1.0, 2.0])
    torch.testing.assert_close(per_row, log_sigmoid(values, [0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("how", "reference", "says"),
    [
        ("sigmoid", None, "one of"),
        ("standardize", None, "the model stores none"),
        ("center", None, "the model stores none"),
        ("log_sigmoid", None, "needs `reference`"),
        ("clip", None, "needs `reference`"),
        ("center", 1.0, "leave it out"),
        (None, 1.0, "leave it out"),
    ],
)
def test_transform_refuses_what_would_do_nothing(how, reference, says):
    with pytest.raises(ValueError, match=says):
        Transform(how, grm().config, reference)


def test_transform_refuses_a_function_that_drops_rewards():
    with pytest.raises(ValueError, match="must keep their number"):
        Transform(lambda rewards: rewards[:1])([1.0, 2.0])


# ----------------------------------------------------------------------------------------------------------- ensembles


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 10_000), st.floats(0, 3), st.floats(0, 1))
def test_combinations(members, n, seed, k, weight):
    rewards = torch.randn(members, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns = rewards.T.tolist()
    mean, low, high = (combine(rewards, how) for how in ("mean", "min", "median"))
    assert mean.tolist() == pytest.approx([sum(c) / members for c in columns])
    assert low.tolist() == [min(c) for c in columns]
    middle = [(sorted(c)[(members - 1) // 2] + sorted(c)[members // 2]) / 2 for c in columns]
    assert high.tolist() == pytest.approx(middle)
    spread = [(sum((x - sum(c) / members) ** 2 for x in c) / members) ** 0.5 for c in columns]
    careful = combine(rewards, "mean_minus_std", k=k)
    assert careful.tolist() == pytest.approx([m - k * s for m, s in zip(mean.tolist(), spread, strict=True)])
    assert (low <= mean).all() and (mean <= rewards.amax(0)).all() and (careful <= mean).all()

    mixed = combine(rewards, "nominal_min", weight=weight, nominal=1)
    assert mixed.tolist() == pytest.approx([weight * c[1] + (1 - weight) * min(c) for c in columns])
    assert (mixed <= rewards[1] + 1e-12).all() and (mixed >= low - 1e-12).all()
    sigmas = torch.rand(members, n, generator=torch.Generator().manual_seed(seed + 1))
    trusted = combine(rewards, "nominal_min", weight=1.0, nominal=sigmas.argmin(0))
    assert trusted.tolist() == [columns[j][int(sigmas[:, j].argmin())] for j in range(n)]

    shuffled = rewards[random.Random(seed).sample(range(members), members)]
    for how in ("mean", "median", "min", "mean_minus_std"):
        torch.testing.assert_close(combine(shuffled, how), combine(rewards, how))


def test_combine_refuses_unknown_settings():
    for settings_, says in [
        ({"how": "max"}, "one of"),
        ({"weight": 1.5}, "between 0 and 1"),
        ({"k": -1}, "0 or more"),
    ]:
        with pytest.raises(ValueError, match=says):
            combine([[1.0], [2.0]], **settings_)


def test_ensemble_standardises_members_and_plugs_in():
    one, two = grm(seed=1), grm(seed=2)
    statistics = [(0.5, 2.0), (-1.0, 3.0)]
    ensemble = RewardEnsemble([one, two], [CHATML, CHATML], how="min", statistics=statistics)
    by_member = [expected(model, CHATML) for model in (one, two)]
    by_hand = [[(r - mean) / std for r in rewards] for rewards, (mean, std) in zip(by_member, statistics, strict=True)]
    chats = [[*p, *c] for p, c in zip(PROMPTS, completions(), strict=True)]
    torch.testing.assert_close(ensemble.member_scores(chats), torch.tensor(by_hand).double(), atol=1e-5, rtol=1e-5)
    lowest = [min(pair) for pair in zip(*by_hand, strict=True)]
    assert ensemble.score(chats) == pytest.approx(lowest, abs=1e-5)
    assert grm_reward_func(ensemble)(PROMPTS, completions()) == pytest.approx(lowest, abs=1e-5)

    # The statistics that members store give the same.
    for model, (mean, std) in zip((one, two), statistics, strict=True):
        model.config.reward_mean, model.config.reward_std = mean, std
    stored = RewardEnsemble([one, two], [CHATML, CHATML], how="min")
    assert stored.score(chats) == pytest.approx(lowest, abs=1e-5)


def test_ensemble_refuses_identical_and_incomparable_members():
    one, two = grm(seed=1), grm(seed=2)
    with pytest.raises(ValueError, match="Members 0 and 1 are identical"):
        RewardEnsemble([one, grm(seed=1)], [CHATML] * 2, statistics=None)
    with pytest.raises(ValueError, match="Members 0 and 1 are identical"):
        RewardEnsemble([one, one], [CHATML] * 2, statistics=None)
    with pytest.raises(ValueError, match=r"Members \[0, 1\] store no mean"):
        RewardEnsemble([one, two], [CHATML] * 2)
    with pytest.raises(ValueError, match="at least two members, found 1"):
        RewardEnsemble([one], [CHATML])
    with pytest.raises(ValueError, match="standard deviation 0.0"):
        RewardEnsemble([one, two], [CHATML] * 2, statistics=[(0, 1), (0, 0)])
    with pytest.raises(ValueError, match="for each of 2 members"):
        RewardEnsemble([one, two], [CHATML] * 2, statistics=[(0, 1)])


def test_ensemble_of_heads_is_one_reward_model():
    model = grm(seed=1)
    heads = [grm(seed=seed).score for seed in (1, 2, 3)]
    apart = []
    for head in heads:
        model.score = head
        apart.append(expected(model, CHATML))
    whole = ensemble_heads(model, heads, how="mean_minus_std", k=0.5)
    by_hand = combine(apart, "mean_minus_std", k=0.5).tolist()
    assert expected(whole, CHATML) == pytest.approx(by_hand, abs=1e-5)
    assert grm_reward_func(whole, CHATML)(PROMPTS, completions()) == pytest.approx(by_hand, abs=1e-5)
    with pytest.raises(ValueError, match="identical"):
        ensemble_heads(model, [heads[0], heads[0]])


def test_ensemble_of_adapters_shares_the_body(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False)
    apart = []
    for index in range(2):
        torch.manual_seed(10 + index)
        member = peft.get_peft_model(grm(), config)
        with torch.no_grad():
            member.get_base_model().score.modules_to_save["default"].out.weight += index
        member.save_pretrained(tmp_path / str(index))
        apart.append(expected(member.eval(), CHATML))
    assert apart[0] != pytest.approx(apart[1], abs=1e-3)

    folders = [str(tmp_path / str(index)) for index in range(2)]
    ensemble = RewardEnsemble.from_adapters(grm(), folders, CHATML, statistics=None)
    mean = [(a + b) / 2 for a, b in zip(*apart, strict=True)]
    assert grm_reward_func(ensemble)(PROMPTS, completions()) == pytest.approx(mean, abs=1e-5)
    assert ensemble.member_scores([[*PROMPTS[0], *completions()[0]]])[:, 0].tolist() == pytest.approx(
        [a[0] for a in apart], abs=1e-5
    )
    with pytest.raises(ValueError, match="identical"):
        RewardEnsemble.from_adapters(grm(), [folders[0], folders[0]], CHATML, statistics=None)

    base = grm()
    base.config.reward_mean, base.config.reward_std = 7.0, 9.0  # of the base's own head, which no member has
    stored = [(0.5, 2.0), (-1.0, 0.25)]
    for folder, (base.config.reward_mean, base.config.reward_std) in zip(folders, stored, strict=True):
        save_policies(base.config, folder)
    ensemble = RewardEnsemble.from_adapters(grm(), folders, CHATML)
    assert ensemble.settings["statistics"] == stored
    by_hand = [sum((a - m) / s for a, (m, s) in zip(row, stored, strict=True)) / 2 for row in zip(*apart, strict=True)]
    assert grm_reward_func(ensemble)(PROMPTS, completions()) == pytest.approx(by_hand, abs=1e-4)
    base.config.max_sequence_length = 33
    save_policies(base.config, folders[1])
    with pytest.raises(ValueError, match=r"`max_sequence_length` is one of \[33, None\]. Merge them"):
        RewardEnsemble.from_adapters(grm(), folders, CHATML)


# -------------------------------------------------------------------------------------------------------------- labels


ORDER = ["correct", "style", "short"]
ratings_lists = st.lists(st.fixed_dictionaries({factor: st.floats(-5, 5) for factor in ORDER}), min_size=2, max_size=6)


@settings(deadline=None, max_examples=40)
@given(ratings_lists, st.floats(0, 2))
def test_hierarchical_pairs_are_lexicographic(ratings, multiplier):
    thresholds = factor_thresholds(ratings, ORDER, multiplier)
    pairs, skipped = hierarchical_pairs(ratings, ORDER, thresholds)
    assert len(pairs) + len(skipped) == len(ratings) * (len(ratings) - 1) // 2
    for chosen, rejected, factor in pairs:
        for higher in ORDER[: ORDER.index(factor)]:
            assert abs(ratings[chosen][higher] - ratings[rejected][higher]) <= thresholds[higher]
        assert ratings[chosen][factor] - ratings[rejected][factor] > thresholds[factor]
    for a, b in skipped:
        assert all(abs(ratings[a][factor] - ratings[b][factor]) <= thresholds[factor] for factor in ORDER)


def test_hierarchical_pairs_by_hand():
    ratings = [
        {"correct": 1, "style": 0, "short": 0},
        {"correct": 0, "style": 9, "short": 0},
        {"correct": 0, "style": 9, "short": 5},
    ]
    exact = dict.fromkeys(ORDER, 0.0)
    assert hierarchical_pairs(ratings, ORDER, exact)[0] == [(0, 1, "correct"), (0, 2, "correct"), (2, 1, "short")]
    assert hierarchical_pairs(ratings, ["style", "correct", "short"], exact)[0][0] == (1, 0, "style")
    # In another unit, with thresholds of standard deviations, nothing changes.
    scaled = [{**rating, "style": 100 * rating["style"]} for rating in ratings]
    for multiplier in (0.0, 0.5, 3.0):
        here = hierarchical_pairs(ratings, ORDER, factor_thresholds(ratings, ORDER, multiplier))
        assert here == hierarchical_pairs(scaled, ORDER, factor_thresholds(scaled, ORDER, multiplier))
    assert hierarchical_pairs(ratings, ORDER, dict.fromkeys(ORDER, 10.0)) == ([], [(0, 1), (0, 2), (1, 2)])


def test_hierarchical_pairs_name_what_is_missing():
    with pytest.raises(ValueError, match=r"answer 1 has no rating for \['style'\]"):
        hierarchical_pairs([{"style": 1}, {"short": 1}], ["style"], {"style": 0})
    with pytest.raises(ValueError, match=r"none for \['style'\]"):
        hierarchical_pairs([{"style": 1}, {"style": 2}], ["style"], {})


# ----------------------------------------------------------------------------------------------------- reward function


@pytest.mark.parametrize("name", TOKENIZERS)
def test_reward_function_gives_the_number_of_the_model(name):
    tokenizer = TOKENIZERS[name]
    model = grm(tokenizer)
    reward = grm_reward_func(model, tokenizer)
    assert reward(prompts=PROMPTS, completions=completions(), completion_ids=[[1]] * 3, trainer_state=None) == (
        pytest.approx(expected(model, tokenizer), abs=1e-5)
    )
    assert grm_reward_func(model, tokenizer, max_tokens_per_batch=1)(PROMPTS, completions()) == pytest.approx(
        expected(model, tokenizer), abs=1e-5
    )


def test_reward_function_takes_text_as_text():
    model = grm()
    texts = [("one ", "two"), ("three ", "")]
    end = CHATML.eos_token
    by_hand = [alone(model, CHATML(prompt + answer + end).input_ids) for prompt, answer in texts]
    found = grm_reward_func(model, CHATML)([p for p, _ in texts], [a for _, a in texts])
    assert found == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("answer", ["", "  \n", "<|im_end|>"])
def test_an_answer_without_text_has_a_reward(answer):
    model = grm()
    text = CHATML.apply_chat_template([*PROMPTS[0], {"role": "assistant", "content": answer}], tokenize=False)
    if answer == "<|im_end|>":  # what the policy says is not the end of its turn
        text += CHATML.eos_token
    by_hand = alone(model, CHATML(text, add_special_tokens=False).input_ids)
    assert grm_reward_func(model, CHATML)([PROMPTS[0]], completions([answer])) == [pytest.approx(by_hand, abs=1e-5)]


@pytest.mark.parametrize("said", ["", None])
def test_a_policy_that_says_nothing_after_its_tool_has_a_reward(said):
    model, call = grm(), {"type": "function", "function": {"name": "f", "arguments": {}}}
    calls, result = {"content": "", "tool_calls": [call]}, {"role": "tool", "name": "f", "content": "3"}
    called = [{"role": "assistant", **calls}, result]
    turns = [*PROMPTS[0], *called, {"role": "assistant", "content": ""}]
    text = CHATML.apply_chat_template(turns, tokenize=False)
    by_hand = alone(model, CHATML(text, add_special_tokens=False).input_ids)
    answer = [*called, {"role": "assistant", "content": said}]
    assert grm_reward_func(model, CHATML)([PROMPTS[0]], [answer]) == [pytest.approx(by_hand, abs=1e-5)]
    with pytest.raises(ValueError, match="chat 0: the prompt is str"):  # not its Python list, as text
        grm_reward_func(model, CHATML)(["one"], [[{"role": "assistant", "content": ""}]])


def test_what_a_blank_answer_thought_is_not_lost_silently():
    answer = [{"role": "assistant", "content": "", "reasoning_content": "hm"}]
    with pytest.warns(UserWarning, match="thinking the chat template leaves out"):
        grm_reward_func(grm(), CHATML)([PROMPTS[0]], [answer])


@pytest.mark.parametrize("broken", [math.nan, None, math.inf, [1.0]])
def test_a_reference_that_is_no_number_is_refused(broken):
    # TRL counts NaN as 0, the best that "log_sigmoid" can give.
    reward = grm_reward_func(grm(), CHATML, transform="log_sigmoid", reference="floor")
    with pytest.raises(ValueError, match="column 'floor', .* a finite number is required"):
        reward(PROMPTS, completions(), floor=[0.0, broken, 1.0])
    with pytest.raises(ValueError, match="has 1 values for 3 prompts"):
        reward(PROMPTS, completions(), floor=[0.0])


def test_length_residual_of_one_reward_says_that_it_does_nothing():
    with pytest.warns(UserWarning, match="changes nothing of one reward"):
        grm_reward_func(grm(), CHATML, transform="length_residual")(PROMPTS[:1], completions(ANSWERS[:1]))


def test_a_transform_that_makes_no_number_is_refused():
    reward = grm_reward_func(grm(), CHATML, transform=lambda rewards: rewards / 0 * 0)
    with pytest.raises(ValueError, match="made nan of the reward"):
        reward(PROMPTS, completions())


@pytest.mark.parametrize(
    ("answer", "columns", "words"),
    [
        ("\ud800", {}, "chat 0: the text has .* half of a character"),
        ("a", {"chat_template_kwargs": ["{}"]}, "it must be a dictionary"),
        ("a", {"chat_template_kwargs": [{"tools": [1]}]}, "has 'tools', which belongs beside it"),
        ("a", {"tools": [None, None]}, "1 prompts, and `tools` or `chat_template_kwargs` of 2"),
    ],
)
def test_columns_and_texts_that_cannot_be_read_are_named(answer, columns, words):
    with pytest.raises(ValueError, match=words):
        grm_reward_func(grm(), CHATML)([PROMPTS[0]], completions([answer]), **columns)


def test_statistics_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="`k` is nan"):
        combine([[1.0], [2.0]], "mean_minus_std", k=math.nan)
    ratings = [{"a": 1.0}, {"a": math.nan}]
    with pytest.raises(ValueError, match="answer 1 has no rating for .* that is a finite number"):
        factor_thresholds(ratings, ["a"])
    with pytest.raises(ValueError, match="answer 1 has no rating for .* that is a finite number"):
        hierarchical_pairs(ratings, ["a"], {"a": 0.0})
    for threshold in (math.nan, -1.0):  # it would decide nothing, or everything
        with pytest.raises(ValueError, match="the threshold of 'a'"):
            hierarchical_pairs(ratings[:1] * 2, ["a"], {"a": threshold})
    with pytest.raises(ValueError, match="2 groups for 3 rewards"):
        length_residual([1.0, 2.0, 3.0], [1, 2, 3], ["p", "q"])
    groups = torch.tensor([0, 0, 1, 1])
    values = [1.0, 2.0, 5.0, 3.0], [1, 2, 3, 4]
    torch.testing.assert_close(length_residual(*values, groups.numpy()), length_residual(*values, groups.tolist()))


def test_two_prompts_of_one_text_are_not_told_apart_by_ppo():
    rows = [{"prompt": PROMPTS[0], "input_ids": [5, 6]}, {"prompt": PROMPTS[2], "input_ids": [5, 6]}]
    with pytest.raises(ValueError, match="row 1 of `prompts` has the `input_ids` of an earlier row"):
        ppo_reward_model(grm(), CHATML, CHATML, prompts=rows)
    ppo_reward_model(grm(), CHATML, CHATML, prompts=[rows[0], rows[0]])


def test_an_answer_that_is_an_image_is_refused_and_not_taken_for_a_blank_one():
    answer = [{"role": "assistant", "content": [{"type": "image"}]}]
    with pytest.raises(ValueError, match="content that is not text"):
        grm_reward_func(grm(), CHATML)([PROMPTS[0]], [answer])


def test_a_malformed_conversation_is_named():
    prompts = [PROMPTS[0], [{"role": "robot"}]]
    with pytest.raises(ValueError, match="chat 1: .*content"):
        grm_reward_func(grm(), CHATML)(prompts, completions(["a", "b"]))
    with pytest.raises(ValueError, match="1 prompts and 2 completions"):
        grm_reward_func(grm(), CHATML)(PROMPTS[:1], completions(["a", "b"]))


def test_reward_function_transforms_and_reads_columns():
    model = grm()
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    raw = expected(model, CHATML)
    by_name = grm_reward_func(model, CHATML, transform="standardize")(PROMPTS, completions())
    assert by_name == pytest.approx([(r - 0.25) / 2 for r in raw], abs=1e-5)

    column = grm_reward_func(model, CHATML, transform="log_sigmoid", reference="floor")
    found = column(PROMPTS, completions(), floor=[0.0, 1.0, 2.0])
    assert found == pytest.approx(log_sigmoid(raw, [0.0, 1.0, 2.0]).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="no column 'floor'"):
        column(PROMPTS, completions())
    with pytest.raises(ValueError, match="does not use"):
        grm_reward_func(model, CHATML, transform="center", reference="floor")

    tools = [[{"type": "function", "function": {"name": "f"}}], None, None]
    with_tools = grm_reward_func(model, CHATML)(PROMPTS, completions(), tools=tools)
    ids = Encoder(CHATML).encode(PROMPTS[0], ANSWERS[0], tools[0]).ids
    assert with_tools == pytest.approx([alone(model, ids), *raw[1:]], abs=1e-5)


def test_reward_function_from_a_folder_is_named_after_it(tmp_path):
    model = grm()
    folder = tmp_path / "my-grm"
    model.save_pretrained(folder)
    CHATML.save_pretrained(folder)
    reward = grm_reward_func(str(folder))
    assert reward.__name__ == "my-grm"
    assert grm_reward_func(folder, name="quality").__name__ == "quality"
    assert reward(PROMPTS, completions()) == pytest.approx(expected(model, CHATML), abs=1e-5)
    assert grm_reward_func(GRMScorer(model, CHATML))(PROMPTS, completions([*ANSWERS[:2], ""]))[:2] == pytest.approx(
        expected(model, CHATML)[:2], abs=1e-5
    )
    half = grm_reward_func(str(folder), dtype=torch.bfloat16)
    assert half.scorer.model.lm.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="cannot be applied"):
        grm_reward_func(model, CHATML, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="LlamaForCausalLM, not a GRM"):
        grm_reward_func(model.lm, CHATML)
    with pytest.raises(ValueError, match="have their tokenizers"):
        grm_reward_func(RewardEnsemble([model, grm(seed=1)], [CHATML] * 2, statistics=None), CHATML)
    with pytest.raises(ValueError, match="is function"):
        grm_reward_func(test_an_answer_without_text_has_a_reward)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("cut", ["whole", "at eos", "before the end of turn"])
def test_rendered_texts_are_read_where_training_reads(name, cut):
    """Generation stops at EOS, in front of the line break that ChatML writes behind it, or at its length limit."""
    tokenizer = TOKENIZERS[name]
    model = grm(tokenizer)
    texts = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) + answer
        if cut == "at eos":
            text += str(tokenizer.eos_token)
        elif cut == "whole":
            text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
        texts.append(text)
    found = grm_reward_func(model, tokenizer).rendered(texts)
    assert found == pytest.approx(expected(model, tokenizer), abs=1e-5)


def test_rendered_text_without_a_turn_ends_with_eos():
    model = grm()
    reward = grm_reward_func(model, CHATML)
    by_hand = alone(model, CHATML("one two" + CHATML.eos_token).input_ids)
    assert reward.rendered(["one two", "one two<|im_end|>"]) == pytest.approx([by_hand] * 2, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- PPO, by contract


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ppo_reads_the_number_of_the_model(name, end):
    tokenizer = TOKENIZERS[name]
    model = grm(tokenizer, attention_dropout=0.5).train()
    ids, context, _ = rollout(tokenizer, end=end)
    wrapped = ppo_reward_model(model, tokenizer, tokenizer)
    found = read_by_ppo(wrapped, ids, tokenizer.pad_token_id, context).tolist()
    assert found == pytest.approx(expected(model.eval(), tokenizer), abs=1e-5)
    assert wrapped.config.hidden_size == 16


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_every_head_gives_ppo_and_reward_functions_its_number(head, tmp_path):
    """In memory, where the model may be in training mode, and from a folder."""
    model = with_head(head, CHATML)
    by_hand = expected(model, CHATML)
    assert max(by_hand) - min(by_hand) > 1e-3
    model.save_pretrained(tmp_path)
    CHATML.save_pretrained(tmp_path)
    ids, context, _ = rollout(CHATML)
    for source in (model.train(), str(tmp_path)):
        wrapped = ppo_reward_model(source, CHATML, CHATML if source is model else None)
        found = read_by_ppo(wrapped, ids, CHATML.pad_token_id, context).tolist()
        assert found == pytest.approx(by_hand, abs=1e-5)
        function = grm_reward_func(source, CHATML if source is model else None)
        assert function(PROMPTS, completions()) == pytest.approx(by_hand, abs=1e-5)
        model.train()


def test_ppo_with_another_tokenizer_renders_anew():
    policy, tokenizer = CHATML, TOKENIZERS["llama"]
    model = grm(tokenizer)
    prompts, answers = [*PROMPTS, "plain text "], [*ANSWERS, "answer"]
    ids, context, rows = rollout(policy, prompts, answers)
    wrapped = ppo_reward_model(model, policy, tokenizer, prompts=rows)
    found = read_by_ppo(wrapped, ids, policy.pad_token_id, context).tolist()
    assert found == pytest.approx(expected(model, tokenizer, prompts, answers), abs=1e-5)

    with pytest.raises(ValueError, match="none of `prompts`; it begins"):
        read_by_ppo(ppo_reward_model(model, policy, tokenizer, prompts=rows[:1]), ids, policy.pad_token_id, context)
    with pytest.raises(ValueError, match="row 0 of `prompts` has"):
        ppo_reward_model(model, policy, tokenizer, prompts=[{"prompt": "a"}])
    with pytest.raises(ValueError, match="row 0 of `prompts` is a str; it needs `prompt`"):
        ppo_reward_model(model, policy, tokenizer, prompts=["a"])


def test_ppo_takes_the_longest_prompt_that_fits():
    model = grm()
    short, longer = "one", "one two"
    _, _, rows = rollout(CHATML, [short, longer], ["", ""])
    wrapped = ppo_reward_model(model, CHATML, CHATML, prompts=rows)
    ids, context, _ = rollout(CHATML, [longer], [" three"])
    found = read_by_ppo(wrapped, ids, CHATML.pad_token_id, context).tolist()
    assert found == pytest.approx([alone(model, CHATML("one two three<|im_end|>").input_ids)], abs=1e-5)
    assert wrapped.model._rollout(ids[0].tolist()).prompt == longer


def test_ppo_transforms():
    model = grm()
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    ids, context, _ = rollout(CHATML)
    wrapped = ppo_reward_model(model, CHATML, CHATML, transform="standardize")
    found = read_by_ppo(wrapped, ids, CHATML.pad_token_id, context).tolist()
    assert found == pytest.approx([(r - 0.25) / 2 for r in expected(model, CHATML)], abs=1e-5)


def test_ppo_takes_an_ensemble():
    models = [grm(seed=1), grm(seed=2)]
    ids, context, rows = rollout(CHATML)
    ensemble = RewardEnsemble(models, [CHATML, CHATML], statistics=None)
    mean = [(a + b) / 2 for a, b in zip(*(expected(model, CHATML) for model in models), strict=True)]
    found = read_by_ppo(ppo_reward_model(ensemble, CHATML), ids, CHATML.pad_token_id, context).tolist()
    assert found == pytest.approx(mean, abs=1e-5)

    llama = TOKENIZERS["llama"]
    mixed = RewardEnsemble([models[0], grm(llama)], [CHATML, llama], statistics=None)
    with pytest.raises(ValueError, match="pass `prompts`"):
        ppo_reward_model(mixed, CHATML)
    wrapped = ppo_reward_model(mixed, CHATML, prompts=rows)
    mean = [(a + b) / 2 for a, b in zip(expected(models[0], CHATML), expected(grm(llama), llama), strict=True)]
    assert read_by_ppo(wrapped, ids, CHATML.pad_token_id, context).tolist() == pytest.approx(mean, abs=1e-5)


def test_ppo_refuses_what_would_misread():
    same_pad = chatml_tokenizer(pad_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"policy's tokenizer uses its EOS token '<\|im_end\|>' as padding.*resize"):
        ppo_reward_model(grm(same_pad), same_pad, same_pad)
    with pytest.raises(ValueError, match="reward model's tokenizer uses its EOS"):
        ppo_reward_model(grm(same_pad), CHATML, same_pad)
    without = byte_tokenizer(eos_token="</s>")
    with pytest.raises(ValueError, match="policy's tokenizer has no padding token"):
        ppo_reward_model(grm(), without, CHATML)
    with pytest.raises(ValueError, match="different vocabularies: .*Pass `prompts`"):
        ppo_reward_model(grm(), TOKENIZERS["llama"], CHATML)
    # A padding token that only the policy has does no harm.
    base, padded = chatml_tokenizer(pad_token="<|endoftext|>"), chatml_tokenizer(pad_token="<|endoftext|>")
    padded.add_special_tokens({"pad_token": "<|new|>"})
    model = grm(base)
    ids, context, _ = rollout(padded)
    wrapped = ppo_reward_model(model, padded, base)
    assert read_by_ppo(wrapped, ids, padded.pad_token_id, context).tolist() == pytest.approx(
        expected(model, base), abs=1e-5
    )
