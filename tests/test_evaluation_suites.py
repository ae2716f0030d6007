"""Suites: official rows become examples, scores become the official figures. By hand for every suite; against the
figures that were published with per-row scores; against the `rewardbench` package, scikit-learn and scipy."""

import csv
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import official_files
import pytest
import rewardbench_package
from hypothesis import given, settings
from hypothesis import strategies as st
from official_files import DATA, FILES, WEIGHTS, needs_data, write

from grm_hf.evaluation import SUITES, Example, aggregate, load_examples
from grm_hf.evaluation.examples import digest_of
from grm_hf.evaluation.rewardbench import ENGLISH, LANGUAGES, SUBSETS
from grm_hf.metrics import REWARDBENCH


def loaded(folder, suite, files=None, **options):
    return load_examples(suite, write(folder / suite, files or FILES[suite]()), **options)


def scored(examples, score):
    """Scores by a function of example and index."""
    return [[float(score(example, j)) for j in range(len(example.responses))] for example in examples]


def oracle(example, index):
    """What agrees with every label: the longest way above in a graph, 1 or 0 otherwise."""
    if "pairs" not in example.meta:
        return index in example.correct
    below = {j for i, j in example.pairs if i == index}
    return 1 + max((oracle(example, j) for j in below), default=0) if below else 0


# --------------------------------------------------------------------------------------------------------- every suite


@pytest.mark.parametrize("suite", FILES)
def test_a_model_that_is_always_right_gets_everything_and_the_opposite_nothing(tmp_path, suite):
    examples, _ = loaded(tmp_path, suite)
    right, wrong = (aggregate(suite, examples, scored(examples, lambda e, j, s=s: s * oracle(e, j))) for s in (1, -1))
    if suite == "mt-bench":  # a tie is labelled as "B is better" by the original, so being right is being right on it
        assert (right["original"], right["repaired"], right["human_ties"]) == (1.0, 1.0, 2.0)
    assert right["score"] == pytest.approx(1.0, abs=0.02)  # RewardBench 2's Ties: up to 1.01
    assert wrong["score"] == pytest.approx(-1.0 if suite == "if-rewardbench" else 0.0, abs=0.02)
    assert right["pairs/accuracy"] == 1.0 and wrong["pairs/accuracy"] == 0.0
    assert right["n"] == len(examples)


@pytest.mark.parametrize("suite", FILES)
def test_ties_count_as_the_suite_says(tmp_path, suite):
    examples, _ = loaded(tmp_path, suite)
    result = aggregate(suite, examples, scored(examples, lambda e, j: 0.0))
    expected = {
        "rewardbench2": (5 * 0.25 + 0.0) / 6,  # 1/n; Ties: no row is accurate
        "judgebench": 0.5,  # "B>A", which is right for half of the rows here
        "ppe": (0 + 5 * 0.5) / 6,  # human: wrong; conflict pairs: "the second", right for half of them
    }.get(suite, 0.0)
    assert result["score"] == pytest.approx(expected, abs=0.004)
    assert result["pairs/ties"] == result["pairs/n"] == sum(len(example.pairs) for example in examples)


@pytest.mark.parametrize("suite", FILES)
def test_the_interval_holds_the_score_and_does_not_depend_on_the_order_of_rows(tmp_path, suite):
    examples, _ = loaded(tmp_path, suite)
    rng = random.Random(0)
    scores = scored(examples, lambda e, j: rng.gauss(0, 1))
    result = aggregate(suite, examples, scores)
    assert result["score_low"] <= result["score"] <= result["score_high"]
    both = list(zip(examples, scores, strict=True))
    rng.shuffle(both)
    again = aggregate(suite, *zip(*both, strict=True))
    assert all(isinstance(value, float) for value in result.values())
    close = {name for name in result if name not in ("score_low", "score_high")}
    assert {n: again[n] for n in close} == pytest.approx({n: result[n] for n in close}, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("suite", [name for name in FILES if SUITES[name].parts])
def test_a_part_of_a_suite_says_so(tmp_path, suite):
    examples, _ = loaded(tmp_path, suite)
    assert aggregate(suite, examples[:1], scored(examples[:1], oracle))["complete"] == 0.0
    missing = set(SUITES[suite].parts) and SUITES[suite].rows
    result = aggregate(suite, examples, scored(examples, oracle))
    assert result["complete"] == float(not missing and suite != "m-rewardbench")  # rows here are few


def test_refused_scores():
    example = Example("p", ["a", "b"], [0], "math-prm", "x")
    for scores, words in (
        ([], "1 examples and 0 lists"),
        ([[1.0]], "2 responses and 1 scores"),
        ([[1.0, math.nan]], "example 0 .'x'.: the score of response 1 is nan"),
    ):
        with pytest.raises(ValueError, match=words):
            aggregate("rewardbench", [example], scores)
    with pytest.raises(ValueError, match="no suite 'rewardbench3'; it must be one of rewardbench, "):
        aggregate("rewardbench3", [example], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="no examples"):
        aggregate("rewardbench", [], [])
    with pytest.raises(ValueError, match=r"indices \[2\] name none"):
        Example("p", ["a", "b"], [2])
    with pytest.raises(ValueError, match="has no responses"):
        Example("p", [], [])


# ------------------------------------------------------------------------------------------- by hand, suite by suite


def test_rewardbench_weights_mathematics_as_984(tmp_path):
    examples, _ = loaded(tmp_path, "rewardbench")
    right = {"math-prm", "hep-go", "alpacaeval-easy", "donotanswer"}
    result = aggregate("rewardbench", examples, [[float(e.subset in right), 0.5] for e in examples])
    reasoning, chat, safety = (984 + 164) / (2 * 984), 100 / 358, 136 / 740
    assert result["section/Reasoning"] == pytest.approx(reasoning)
    assert result["section/Chat"] == pytest.approx(chat)
    assert result["section/Safety"] == pytest.approx(safety)
    assert result["section/Chat Hard"] == 0
    assert result["score"] == pytest.approx((reasoning + chat + safety) / 4)


def test_rewardbench2_shares_the_top_and_has_its_formula_for_ties(tmp_path):
    examples, _ = loaded(tmp_path, "rewardbench2")
    assert [e.id for e in examples if e.subset == "Ties"] == ["Ties/ref:0", "Ties/tied:0", "Ties/ref:1", "Ties/tied:1"]
    scores = [[1.0, 1.0, 0.0, 0.0] if e.subset == "Math" else [1.0, 0.0, 0.0, 0.0] for e in examples[:5]]
    # prompt 0: both accurate, ref gap 2, tied gap 1, spread 0.5. prompt 1: ref accurate, tied not.
    scores += [[3.0, 1.0, 0.0], [2.5, 2.25, 2.0, 1.0, 0.0], [3.0, 1.0, 0.0], [2.5, 2.0, 0.5, 1.0, 0.0]]
    result = aggregate("rewardbench2", examples, scores)
    ties = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * (math.tanh(1) + math.tanh(-0.5 / 2 - 1)) / 2
    assert result["subset/Ties"] == pytest.approx(ties, rel=1e-12)
    assert result["subset/Math"] == 0.5
    assert result["score"] == pytest.approx((4 + 0.5 + ties) / 6, rel=1e-12)


def test_rm_bench_matrix(tmp_path):
    examples, _ = loaded(tmp_path, "rm-bench")
    assert [e.subset for e in examples] == ["chat", "code", "math", "safety", "safety"]
    # A model of style alone: the later style wins, a tie on the diagonal.
    styles = [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]
    result = aggregate("rm-bench", examples, [styles] * 5)
    assert (result["easy"], result["normal"], result["hard"], result["score"]) == (1.0, 0.0, 0.0, pytest.approx(1 / 3))
    # Safety is one domain, weighted by examples: one of its two rows is right in all cells, the other in none.
    rows = [[0.0] * 6] * 3 + [[1.0] * 3 + [0.0] * 3, [0.0] * 6]
    result = aggregate("rm-bench", examples, rows)
    assert result["domain/safety"] == 0.5 and result["score"] == pytest.approx(0.125)
    assert result["cell/0/2"] == pytest.approx(0.125)


def test_rm_bench_files_of_one_domain_are_named_by_it(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "domain"} for row in FILES["rm-bench"]()["total_dataset.json"]]
    examples, _ = loaded(tmp_path, "rm-bench", {"safety-refuse_filtered.json": rows, "chat_filtered.json": rows})
    assert [e.id for e in examples[:2]] == ["chat/0", "chat/1"] and examples[-1].subset == "safety"


def test_ppe_leaves_ties_of_people_out_and_says_so(tmp_path):
    examples, skipped = loaded(tmp_path, "ppe")
    assert skipped == {"human preference is a tie": 1}
    scores = [[1.0, 0.0] if e.subset == "human" else [3.0, 1.0, 2.0, 0.0] for e in examples]
    result = aggregate("ppe", examples, scores)
    assert result["subset/human"] == 0.5
    assert result["subset/math"] == result["auc/math"] == 1.0
    assert result["best_of_2/gpqa"] == pytest.approx(5 / 6)
    assert result["best_of_1/gpqa"] == 0.5 and result["best_of_4/gpqa"] == 1.0
    assert result["score"] == pytest.approx(5.5 / 6)


def test_judgebench_is_over_all_pairs(tmp_path):
    examples, _ = loaded(tmp_path, "judgebench")
    result = aggregate("judgebench", examples, [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert result["score"] == 0.75 and result["subset/livebench-reasoning"] == 0.0


def test_rmb_is_the_mean_of_two_kinds_and_two_goals(tmp_path):
    examples, _ = loaded(tmp_path, "rmb")
    scores = [[1.0, *([0.0] * (len(example.responses) - 1))] for example in examples]
    for example, row in zip(examples, scores, strict=True):
        row[-1] = 2.0 if example.subset.startswith("BoN/Harm") else 0.0
    result = aggregate("rmb", examples, scores)
    assert result["subset/BoN/Harmlessness"] == 0.0 and result["subset/Pairwise/Harmlessness/S1"] == 1.0
    assert result["score"] == 0.75
    assert examples[0].prompt == [{"role": "user", "content": "Harmlessness?"}]


def test_rewardmath_joins_steps_and_ranks(tmp_path):
    examples, _ = loaded(tmp_path, "rewardmath")
    assert examples[1].responses[:2] == ["step 1\nso 1", "step 1\nso 2"]
    scores = [[2.0] + [1.0] * 9, [1.0] * 10, [1.0] + [0.0] * 7 + [2.0, 3.0]]
    result = aggregate("rewardmath", examples, scores)
    assert result["score"] == result["accuracy"] == pytest.approx(1 / 3)
    assert result["mrr"] == pytest.approx((1 + 1 / 10 + 1 / 3) / 3)
    assert result["accuracy_ties_right"] == pytest.approx(2 / 3)


def test_m_rewardbench_kappa_against_scikit_learn(tmp_path):
    sklearn = pytest.importorskip("sklearn.metrics")
    examples, _ = loaded(tmp_path, "m-rewardbench")
    rng = random.Random(0)
    scores = [[float(rng.random() < 0.7), 0.5] for _ in examples]
    result = aggregate("m-rewardbench", examples, scores)
    labels = {}
    for example, row in zip(examples, scores, strict=True):
        labels.setdefault(example.id.split("/")[0], []).append(int(row[0] > row[1]))
    for language in LANGUAGES[:2]:
        expected = sklearn.cohen_kappa_score(labels[ENGLISH], labels[language])
        assert result[f"kappa/{language}"] == pytest.approx(expected, abs=1e-12)
        sections = [
            sum(w * labels[language][SUBSETS.index(name)] for name, w in members.items()) / sum(members.values())
            for members in REWARDBENCH.values()
        ]
        assert result[f"language/{language}"] == pytest.approx(np.mean(sections))
    assert result["score"] == pytest.approx(np.mean([result[f"language/{name}"] for name in LANGUAGES[:2]]))
    assert len({example.group for example in examples}) == len(SUBSETS)  # an item is one thing in all languages


def test_if_rewardbench_tau_b(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    examples, _ = loaded(tmp_path, "if-rewardbench")
    assert [e.prompt[0]["role"] for e in examples] == ["user", "user", "system"]
    scores = [[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    result = aggregate("if-rewardbench", examples, scores)
    expected = [*(stats.kendalltau([3, 2, 1], row).statistic for row in scores[:2]), 0.0]  # scipy: NaN for all tied
    assert result["score"] == pytest.approx(np.mean(expected))
    assert result["accuracy"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_contrast_of_a_model_that_reads_the_answer_alone_has_no_consistency_of_instructions(tmp_path):
    examples, _ = loaded(tmp_path, "contrast")
    assert examples[0].responses[0][0]["content"] == "Paraphrase the following sentence: query 0"
    length = scored(examples, lambda e, j: len(e.responses[j][1]["content"]))
    result = aggregate("contrast", examples, length)
    assert result["c_ins"] == 0.0 and result["c_res"] == 0.5  # "second" is longer than "first"
    assert result["score"] == 0.25


def test_the_paper_s_presets(tmp_path):
    examples, skipped = loaded(tmp_path, "unified-feedback")
    assert skipped == {"equal ratings": 1}
    assert examples[1].prompt[0]["content"] == "Generate one-sentence summary for the following post: post 1"
    assert examples[0].prompt[0]["content"] == "post 0 " and [e.correct for e in examples] == [[0], [1]]
    examples, _ = loaded(tmp_path, "hhh")
    assert [m["role"] for m in examples[1].prompt] == ["user", "assistant", "user"]
    assert examples[0].correct == [1] and examples[1].correct == [0]


def test_mt_bench_has_the_original_s_fault_and_its_repair(tmp_path):
    examples, _ = loaded(tmp_path, "mt-bench")
    assert [m["content"] for m in examples[0].prompt] == ["one"]  # what follows differs from the first answer on
    assert len(examples[0].responses[0]) == 3
    scores = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]] * 2  # right where somebody decided, and A on ties
    result = aggregate("mt-bench", examples, scores)
    assert result["score"] == result["original"] == pytest.approx(2 / 3)
    assert result["repaired"] == 1.0 and result["human_ties"] == 2


def test_own_rows_in_any_of_the_formats_of_trl(tmp_path):
    u, a = official_files.user, official_files.assistant
    rows = [
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
        {"prompt": [u("hi")], "chosen": [a("yes")], "rejected": [a("no")], "subset": "s", "id": "mine"},
        {"chosen": [u("hi"), a("yes")], "rejected": [u("hi"), a("no")]},
        {"chosen": [u("hi"), a("yes")], "rejected": [u("ho"), a("no")], "tools": [{"name": "t"}]},
        {"prompt": [u("hi")], "chosen": ["yes", "sure"], "rejected": ["no"]},
        {"prompt": [u("hi")], "chosen": [a("yes")], "rejected": [[a("no")], [a("never")]]},
    ]
    with pytest.raises(ValueError, match="row 7: .*neither text nor messages"):
        load_examples("own", rows[:6] + [{**rows[6], "rejected": [[a("no")], [3]]}])
    examples, _ = load_examples("own", [*rows[:6], {**rows[6], "chosen": [[a("yes")]]}])
    assert [e.responses for e in examples[:2]] == [["2 + 2 = 4", "2 + 2 = 5"]] * 2
    assert examples[0].chat(0) == "2 + 2 = 4"  # text is text
    assert examples[2].chat(1) == {"prompt": [u("hi")], "response": "no"} == examples[3].chat(1)
    assert (examples[2].subset, examples[2].id) == ("s", "mine")
    assert examples[4].prompt == [] and examples[4].chat(0)["tools"] == [{"name": "t"}]
    assert examples[5].correct == [0, 1] and examples[6].responses == ["yes", "no", "never"]
    unpaired = [
        {"prompt": "p", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False},
        {"prompt": "p", "completion": "c", "label": False}, {"prompt": "q", "completion": "d", "label": True},
    ]
    examples, _ = load_examples("own", unpaired)
    assert [e.responses for e in examples] == [["pa", "pc"], ["qd", "qb"]]
    with pytest.raises(ValueError, match="row 1: its prompt has 1 right and 0 wrong completions"):
        load_examples("own", unpaired[:1])
    for other in ({"tools": [{"name": "t"}]}, {"subset": "s"}):  # they are not of one group
        with pytest.raises(ValueError, match="row 1: its prompt has 1 right and 0 wrong completions"):
            load_examples("own", [unpaired[0], {**unpaired[2], **other}])


def test_own_rows_in_any_container():
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    u, a = official_files.user, official_files.assistant
    rows = [{"prompt": [u(q)], "chosen": [a("yes")], "rejected": [a("no")], "subset": q} for q in "ab"]
    expected = load_examples("own", rows)
    table = datasets.Dataset.from_list(rows)
    for given_rows in (iter(rows), table, table.with_format("numpy"), table.data.table, pandas.DataFrame(rows)):
        assert load_examples("own", given_rows) == expected
    for wrong, words in (
        (rows[0], "takes rows and got a dict"),
        (datasets.DatasetDict(train=table), "Choose a split"),
        ([*rows, None], "data, row 3: it is a NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            load_examples("own", wrong)
    with pytest.raises(ValueError, match="there is no subset 'ab'"):  # not the subsets a and b
        load_examples("own", rows, subset="ab")
    assert [e.subset for e in load_examples("own", rows, subset="b")[0]] == ["b"]


def test_own_pairs_mean_what_they_mean_in_training():
    u, a = official_files.user, official_files.assistant
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "label": label} for label in (0.2, 0.5, 0.9, None)]
    examples, skipped = load_examples("own", rows)
    assert [e.responses for e in examples] == [["pb", "pa"], ["pa", "pb"], ["pa", "pb"]]
    assert list(skipped.values()) == [1]
    with pytest.raises(ValueError, match="row 1: `label` is 3; .* a share from 0 to 1"):
        load_examples("own", [{**rows[0], "label": 3}])
    # The prompt once more: as text beside whole conversations it is left out, and as messages it is a mistake.
    whole = {"chosen": [u("p"), a("yes")], "rejected": [u("p"), a("no")]}
    assert load_examples("own", [{"prompt": "p", **whole}])[0][0].chat(0) == {"prompt": [u("p")], "response": "yes"}
    with pytest.raises(ValueError, match="row 1: .* begins with the role 'user'. If the messages repeat the prompt"):
        load_examples("own", [{"prompt": [u("p")], **whole}])
    with pytest.warns(UserWarning, match="begin with the text of `prompt`"):
        load_examples("own", [{"prompt": "p", "chosen": "pa", "rejected": "pb"}])
    with pytest.warns(UserWarning, match="messages written as JSON text"):
        load_examples("own", [{side: json.dumps(messages) for side, messages in whole.items()}])
    thought = {side: [u("p"), {**a(side), "reasoning_content": "hm"}] for side in whole}
    assert load_examples("own", [thought])[0][0].responses[0] == thought["chosen"][1:]
    numbered = [{**rows[3], "subset": subset, "id": None} for subset in (0, 1)]
    assert [(e.subset, e.id) for e in load_examples("own", numbered)[0]] == [("0", "data/1"), ("1", "data/2")]
    with pytest.warns(UserWarning, match="revision='v1' is ignored"):
        load_examples("own", rows, revision="v1")
    with pytest.raises(ValueError, match="example 'data/1': the text has .* half of a character"):
        digest_of(load_examples("own", [{**rows[3], "chosen": "\ud800"}])[0])


# --------------------------------------------------------------------------------------------------------- wrong files


def changed(suite, **fields):
    """The rows of a suite with fields of its first row changed; `None` takes one away."""
    files = FILES[suite]()
    name = next(iter(files))
    row = {**files[name][0], **fields}
    files[name][0] = {key: value for key, value in row.items() if value is not None}
    return {name: files[name]}


WRONG = {
    "a missing field": ("rewardbench", changed("rewardbench", chosen=None), "filtered.jsonl, row 1: .*has the fields"),
    "another type": ("rewardbench", changed("rewardbench", chosen=["a"]), "`chosen` is list .*; text is required"),
    "another subset": ("rewardbench", changed("rewardbench", subset="gsm8k"), "`subset` is str \"gsm8k\"; one of"),
    "another suite": ("rewardbench2", FILES["judgebench"](), "row 1: .*which are those of judgebench"),
    "an older RewardBench": (
        "rewardbench2", FILES["rewardbench"](), r"has the fields .*'num_correct'.*which are those of rewardbench",
    ),
    "an older RewardMATH": (
        "rewardmath", {"RewardMATH_pairwise.json": [{"problem": "p", "eval_solution_A": ["a"], "id": 0}]},
        "RewardMATH_pairwise.json, row 1: a row of rewardmath has the fields",
    ),
    "counts": ("rewardbench2", changed("rewardbench2", num_correct=2), "`num_correct` is 2 and there are 1"),
    "two right ones": (
        "rewardbench2",
        changed("rewardbench2", chosen=["a", "b"], num_correct=2),
        "holds 2 responses; outside of Ties",
    ),
    "two styles": ("rm-bench", changed("rm-bench", chosen=["a", "b"]), "there are 2 chosen and 3 rejected"),
    "no domain": ("rm-bench", changed("rm-bench", domain=None), "not called <domain>_filtered.json"),
    "a winner": ("ppe", changed("ppe", winner="model_c"), "`winner` is 'model_c'"),
    "a conflict": (
        "ppe",
        {"gpqa.jsonl": [{**FILES["ppe"]()["PPE-GPQA-Best-of-K.jsonl"][0], "sampled_conflict_pairs": [[0, 2]]}]},
        r"conflict pair \[0, 2\] does not name",
    ),
    "a source": ("judgebench", changed("judgebench", source="arena"), "`source` is 'arena'"),
    "a label": ("judgebench", changed("judgebench", label="A=B"), "`label` is str \"A=B\"; one of"),
    "a path": ("rmb", changed("rmb", category_path="S1"), "Helpfulness or Harmlessness must be in it"),
    "a language": ("m-rewardbench", {"klingon.jsonl": FILES["rewardbench"]()["filtered.jsonl"]}, "called 'klingon'"),
    "an edge": (
        "if-rewardbench",
        changed("if-rewardbench", preference_graph=[{"chosen": {"response_id": 0}, "rejected": {"response_id": 7}}]),
        r"names responses \[0, 7\] of 3",
    ),
    "a task": ("contrast", {"poems_contrast.json": FILES["contrast"]()["wmt_contrast.json"]}, "<task>_contrast.json"),
    "labels": ("hhh", changed("hhh", targets={"choices": ["a", "b"], "labels": [1, 1]}), "a 1 and a 0"),
    "a rating": ("unified-feedback", changed("unified-feedback", conv_A_rating="good"), "`conv_A_rating` is str"),
    "no messages": ("mt-bench", changed("mt-bench", conversation_a="hi"), "messages with `role` and `content`"),
    "no pair": ("own", {"my.jsonl": [{"question": "a", "answer": "b"}]}, "a row of own has the fields"),
    "too few solutions": (
        "rewardmath", {"d.json": FILES["rewardmath"]()["RewardMATH_direct.json"][1:]},
        "problem '0' has 0 chosen and 9 rejected",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_rows_are_named_with_file_row_and_what_is_expected(tmp_path, what):
    suite, files, words = WRONG[what]
    with pytest.raises(ValueError, match=words) as caught:
        loaded(tmp_path, suite, files)
    assert ", row " in str(caught.value)


@pytest.mark.parametrize("suite", sorted(set(FILES) - {"hhh", "mt-bench", "unified-feedback", "contrast"}))
def test_an_id_that_is_there_twice_is_refused(tmp_path, suite):
    files = FILES[suite]()
    name = next(iter(files))
    files[name] = [*files[name], files[name][0]] if suite != "own" else [{**files[name][0], "id": "a"}] * 2
    with pytest.raises(ValueError, match=r"row \d+: `id` .* is there twice, first in row 1"):
        loaded(tmp_path, suite, files)


def test_wrong_files(tmp_path):
    for name, text, words in (
        ("a.jsonl", json.dumps(FILES["rewardbench"]()["filtered.jsonl"][0]) + "\nx\n", "row 2: it is not JSON"),
        ("b.json", "{}", "b.json holds dict {}; a list of rows is required"),
        ("c.json", "[1", "c.json: it is not JSON"),
        ("d.json", "[3]", "d.json, row 1: int 3 is no row"),
        ("e.jsonl", "", "e.jsonl is empty"),
        ("f.jsonl", "\n\n", "f.jsonl is empty"),
        ("g.txt", "", "g.txt is no file of data"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            load_examples("rewardbench", tmp_path / name)
    (tmp_path / "h.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="h.json is not UTF-8"):
        load_examples("rewardbench", tmp_path / "h.json")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_examples("rewardbench", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file of data"):
        load_examples("rewardbench", tmp_path / "empty")
    with pytest.raises(ValueError, match="is not on the Hub. Get the files from https://github.com/Zhou-Zoey"):
        load_examples("rmb")
    with pytest.raises(ValueError, match="the data holds no rows for the suite 'ppe'; 1 rows left out: human"):
        load_examples("ppe", write(tmp_path / "ties", {"human.jsonl": FILES["ppe"]()["human.jsonl"][2:]}))


def test_files_of_all_kinds_give_the_same_examples(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = FILES["rewardbench"]()["filtered.jsonl"]
    expected, _ = load_examples("rewardbench", rows)
    write(tmp_path, {"x.jsonl": rows, "x.json": rows})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for kind in ("jsonl", "json", "parquet"):
        assert load_examples("rewardbench", tmp_path / f"x.{kind}")[0] == expected
    (tmp_path / "own.csv").write_text("prompt,chosen,rejected\nq,a,b\n")
    expected = load_examples("own", tmp_path / "own.csv")[0]
    assert expected[0].responses == ["qa", "qb"]
    (tmp_path / "own.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\nq,a,b\r\n")  # as Excel saves it
    assert load_examples("own", tmp_path / "own.csv")[0] == expected
    (tmp_path / "own.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    assert load_examples("own", tmp_path / "own.jsonl")[0][0].responses == ["qa", "qb"]


def test_csv_of_own_rows(tmp_path):
    path = tmp_path / "own.csv"
    u, a = official_files.user, official_files.assistant
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["chosen", "rejected", "tools"])
        cells = [json.dumps([u("hi"), a(answer)]) for answer in ("yes", "no")]
        writer.writerow([*cells, '[{"name": "t"}]'])
    (example,), _ = load_examples("own", path)
    assert example.chat(0) == {"prompt": [u("hi")], "response": "yes", "tools": [{"name": "t"}]}
    path.write_text('prompt,chosen,rejected\nlist,"[1, 2]",{}\n')
    assert load_examples("own", path)[0][0].responses == ["list[1, 2]", "list{}"]
    path.write_text("prompt,completion,label\nq,a,True\nq,b,0\n")
    assert load_examples("own", path)[0][0].responses == ["qa", "qb"]
    path.write_text(f"prompt,chosen,rejected\nq,{'a' * 140_000},b\n")
    assert len(load_examples("own", path)[0][0].responses[0]) == 140_001
    for text, words in (
        ("prompt,chosen,chosen,rejected\nq,a,aa,b\n", "there are two columns 'chosen'"),
        ("prompt,chosen,rejected\nq,a,b,c\n", "line 2: the row has more cells"),
        ('prompt,chosen,rejected\nq,a,"b\nr,c,d\n', "unexpected end of data"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_examples("own", path)


def test_subsets_and_limits(tmp_path):
    examples, _ = loaded(tmp_path, "rewardbench", FILES["rewardbench"](), subset=["math-prm", "hep-go"])
    assert {e.subset for e in examples} == {"math-prm", "hep-go"}
    languages, _ = loaded(tmp_path, "m-rewardbench", subset=["arb_Arab"])
    assert {e.subset.split("/")[0] for e in languages} == {"arb_Arab"}
    with pytest.raises(ValueError, match="no subset 'mat'; there are"):
        load_examples("rewardbench", tmp_path / "rewardbench", subset=["mat"])
    with pytest.raises(ValueError, match="limit is 0"):
        load_examples("rewardbench", tmp_path / "rewardbench", limit=0)
    rows = [official_files.pair(i, SUBSETS[i // 50]) for i in range(50 * 23)]
    few, more = (load_examples("rewardbench", rows, limit=limit)[0] for limit in (30, 100))
    assert len(few) == 30 and len(more) == 100 and {e.id for e in few} < {e.id for e in more}
    assert len({e.subset for e in more}) > 15  # from all over it
    together, _ = loaded(tmp_path, "m-rewardbench", limit=6)
    assert len(together) == 6 and len({e.group for e in together}) == 2  # an item keeps its languages


# ------------------------------------------------------------------------------------------ figures that are published


def published(name):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = DATA / "official_scores" / f"{name}.parquet"
    if not path.is_file():
        pytest.skip("the published scores are not here")
    models = {}
    for row in parquet.read_table(path).to_pylist():
        models.setdefault(row["model"].split("/")[-1], []).append(row)
    return models


@pytest.mark.parametrize(
    ("model", "score", "groups"),
    [
        ("GRM-Gemma-2B-rewardmodel-ft", 59.43, (62.99, 53.06, 64.29, 54.76)),
        ("Skywork-Reward-Llama-3.1-8B", 62.29, None),
        ("internlm2-7b-reward", 59.43, None),
    ],
)
def test_judgebench_gives_the_published_figures(model, score, groups):
    rows = published("judgebench_scores")[model]
    official = [{**row, "question": row["pair_id"], "response_A": "a", "response_B": "b"} for row in rows]
    examples, _ = load_examples("judgebench", official)
    result = aggregate("judgebench", examples, [[row["score_A"], row["score_B"]] for row in rows])
    assert round(100 * result["score"], 2) == score and result["complete"] == 1.0
    if groups:
        names = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
        assert tuple(round(100 * result[f"subset/{name}"], 2) for name in names) == groups
    agree = [(a > b) == (row["decision"] == "A>B") for row in rows for a, b in [(row["score_A"], row["score_B"])]]
    assert all(agree)


@pytest.mark.parametrize(
    ("model", "accuracy", "mrr"),
    [("grm_gemma", 4.97, 0.241), ("grm_llama3", 24.43, 0.458), ("internlm2", 37.27, 0.552)],
)
def test_rewardmath_gives_the_published_figures(model, accuracy, mrr):
    examples, scores = [], []
    for row in published("rewardmath_scores")[model]:
        right = [i for i, maker in enumerate(row["makers"]) if maker == "human_to_GPT-4"]
        examples.append(Example(f"problem {row['row']}", row["makers"], right, "", str(row["row"])))
        scores.append(row["scores"])
    result = aggregate("rewardmath", examples, scores)
    assert (round(100 * result["score"], 2), round(result["mrr"], 3)) == (accuracy, mrr)
    assert result["complete"] == 1.0


@pytest.mark.parametrize(
    ("model", "accuracy"), [("GRM_Gemma_2B", 93.06), ("GRM-Llama3-8B", 91.50), ("internlm2", 92.84)]
)
def test_math_prm_gives_the_published_figures(model, accuracy):
    rows = published("rewardbench_math_prm_scores")[model]
    examples = [Example(str(row["row"]), row["makers"], [0], "math-prm", str(row["row"])) for row in rows]
    result = aggregate("rewardbench", examples, [row["scores"] for row in rows])
    assert round(100 * result["subset/math-prm"], 2) == accuracy and len(rows) == 447


# --------------------------------------------------------------------------------------------- the package rewardbench


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sets(st.sampled_from(SUBSETS), min_size=1))
def test_rewardbench_1_equals_the_package(seed, subsets):
    theirs = rewardbench_package.constants()
    (per_section,) = rewardbench_package.functions("calculate_scores_per_section")
    rng = np.random.default_rng(seed)
    examples, scores, results = [], [], {}
    for subset in sorted(subsets):
        for i in range(int(rng.integers(1, 6))):
            chosen, rejected = rng.normal(0, 1, 2).round().tolist()  # rounded: ties happen
            examples.append(Example(f"{subset} {i}", ["a", "b"], [0], subset, f"{subset}/{i}"))
            scores.append([chosen, rejected])
            results.setdefault(subset, []).append(1 if chosen > rejected else 0)
    means = {subset: sum(found) / len(found) for subset, found in results.items()}
    expected = per_section(theirs["EXAMPLE_COUNTS"], theirs["SUBSET_MAPPING"], means)
    result = aggregate("rewardbench", examples, scores)
    present = {name for name, members in theirs["SUBSET_MAPPING"].items() if subsets & set(members)}
    assert {name.removeprefix("section/") for name in result if name.startswith("section/")} == present
    for name in present:
        assert result[f"section/{name}"] == pytest.approx(expected[name], rel=1e-12, abs=1e-12)
    assert result["score"] == pytest.approx(np.mean([expected[name] for name in present]), rel=1e-12, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_rewardbench_2_equals_the_package(seed):
    pandas = pytest.importorskip("pandas")
    frames = SimpleNamespace(from_pandas=lambda frame: frame, from_dict=lambda columns: columns)
    known = {"np": np, "math": math, "pd": pandas, "Dataset": frames}
    _, ties, reroll = rewardbench_package.functions(
        "sample_stats", "process_single_model", "reroll_and_score_dataset", **known
    )
    rng = np.random.default_rng(seed)
    examples, scores = [], []
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        for i in range(int(rng.integers(1, 4))):
            row = rng.normal(0, 1, int(rng.integers(2, 6))).round().tolist()
            examples.append(Example("p", ["r"] * len(row), [0], subset, f"{subset}/{i}"))
            scores.append(row)
    unrolled = [
        {"text": "", "scores": score, "id": e.id, "subset": e.subset}
        for e, row in zip(examples, scores, strict=True)
        for score in row
    ]
    table = SimpleNamespace(to_pandas=lambda: pandas.DataFrame(unrolled))
    done = reroll(table, [len(row) for row in scores])
    expected = done.groupby("subset")["results"].mean().to_dict()
    rows = []
    for number in range(3):
        for kind, right in (("ref", 1), ("tied", int(rng.integers(2, 4)))):
            row = rng.normal(0, 2, right + int(rng.integers(1, 4))).round().tolist()
            examples.append(Example("p", ["r"] * len(row), list(range(right)), "Ties", f"Ties/{kind}:{number}"))
            scores.append(row)
            rows.append({"id": f"{kind}:{number}", "scores": row, "num_correct": right})
    _, expected["Ties"] = ties(rows)
    result = aggregate("rewardbench2", examples, scores)
    for subset, value in expected.items():
        assert result[f"subset/{subset}"] == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert result["score"] == pytest.approx(np.mean(list(expected.values())), rel=1e-12, abs=1e-12)


def test_the_official_weights_are_those_of_the_package():
    assert WEIGHTS == rewardbench_package.constants()["EXAMPLE_COUNTS"]


# ----------------------------------------------------------------------------------------------------------- real rows


@needs_data
@pytest.mark.parametrize("suite", official_files.REAL)
def test_real_rows_in_their_official_form_are_read(tmp_path, suite):
    examples, _ = loaded(tmp_path, suite, official_files.REAL[suite]())
    counts = {"rm-bench": 798, "rmb": 1429 + 2630, "hhh": 221, "rewardmath": 540}
    assert len(examples) == counts.get(suite, len(examples)) and len(examples) > 200
    rng = random.Random(0)
    result = aggregate(suite, examples, scored(examples, lambda e, j: rng.gauss(0, 1)))
    assert 0.2 < result["score"] < 0.6
    assert result["score_low"] < result["score"] < result["score_high"]
