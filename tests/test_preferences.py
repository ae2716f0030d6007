"""`load_preferences`: rows by hand in the official fields of each data set, and what becomes of each."""

import gzip
import json
import logging
import math
import re
from pathlib import Path

import pytest


datasets = pytest.importorskip("datasets", reason="needs the extra `train`")

from official_files import DATA, needs_data  # noqa: E402
from tiny import chatml_tokenizer, write_rows  # noqa: E402

from grm_hf.encoding import Encoder  # noqa: E402
from grm_hf.pairs import prepare_pairs  # noqa: E402
from grm_hf.preferences import DATA_SETS, load_preferences  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]

TURNS = "Name a river.\n<extra_id_1>Assistant\nThe Danube.\n<extra_id_1>User\nWhere does it end?"
MESSAGES = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Danube."},
    {"role": "user", "content": "Where does it end?"},
]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def vote(strength):
    return {"statement": "@Response 1 is better.", "elaboration": "It is.", "strength": strength}


def preference(strength, votes=(1,), split="train", **fields):
    row = {"split": split, "prompt": "c#", "response_1": "one", "response_2": "two", "preference_strength": strength}
    row |= {"preference_statement": "...", "preference_elaboration": "..."}
    return row | {"three_most_similar_preferences": [vote(v) for v in votes], **fields}


def rating(response="C# is a language.", prompt="c#", **fields):
    values = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": prompt, "response": response, **values, **fields}


def comparison(overall, scores=(), **fields):
    row = {"domain": "general", "language": "english", "context": MESSAGES, "response1": "one", "response2": "two"}
    votes = [{"score": score, "reasoning": "..."} for score in scores]
    return row | {"overall_preference": overall, "individual_preference": votes, **fields}


def completion(response, ratings="5555", **annotations):
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    given = {name: {"Rating": value, "Rationale": "..."} for name, value in zip(aspects, ratings, strict=True)}
    return {
        "model": "alpaca-7b",
        "principle": "helpfulness",
        "custom_system_prompt": "Be kind.",
        "response": response,
        "annotations": given | annotations,
    }


def instruction(*completions, text="Say hello."):
    return {"source": "flan", "instruction": text, "models": ["alpaca-7b"], "completions": list(completions)}


@pytest.fixture(params=["jsonl", "json", "jsonl.gz", "parquet"])
def file(request, tmp_path):
    """Writes rows as each form of file."""

    def write(rows, name="rows"):
        path = tmp_path / f"{name}.{request.param}"
        if request.param == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif request.param == "json":
            path.write_text(json.dumps(rows))
        else:
            write_rows(tmp_path / f"{name}.jsonl", rows)
            if request.param == "jsonl.gz":
                path.write_bytes(gzip.compress((tmp_path / f"{name}.jsonl").read_bytes()))
                (tmp_path / f"{name}.jsonl").unlink()
        return path

    return write


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("grm_hf.preferences")]


# ----------------------------------------------------------------------------------------------------------- HelpSteer


def test_the_preferences_of_helpsteer2(file, caplog):
    rows = [
        preference(-3),
        preference(1, prompt=TURNS),
        preference(0),
        preference(2, response_2="one"),
        preference(2, response_1=" "),
        preference(-3),
        preference(2, prompt="Hi\n<extra_id_1>Assistant\nHello"),
        preference(2, prompt="Hi\n<extra_id_1>System\nHello"),
        preference(-100),
        preference(-2, split="val"),
    ]
    found = load_preferences("nvidia/HelpSteer2", path=file(rows))
    assert found.to_list() == [
        {"prompt": user("c#"), "chosen": assistant("one"), "rejected": assistant("two"), "margin": 3.0},
        {"prompt": MESSAGES, "chosen": assistant("two"), "rejected": assistant("one"), "margin": 1.0},
    ]
    assert said(caplog) == [
        "nvidia/HelpSteer2 (preference, train): 9 rows read, 2 pairs kept; left out: 1 pairs whose preference is 0, "
        "1 pairs of two equal responses, 1 pairs with an empty response, 1 repeated rows, "
        "2 rows whose prompt does not alternate between user and assistant, or does not end with the user, "
        "1 pairs whose preference is not from -3 to 3."
    ]
    (row,) = load_preferences("nvidia/HelpSteer2", "preference", "validation", path=file(rows))
    assert row["margin"] == 2.0


def test_the_votes_of_helpsteer2_are_shares(file):
    rows = [
        preference(-1, [-1, -2, 1]),
        preference(1, [1, 0, 3], prompt="b"),
        preference(0, [0, 1, -1], prompt="c"),
        preference(0, [], prompt="d"),
    ]
    found = load_preferences("nvidia/HelpSteer2", "labels", path=file(rows)).to_list()
    assert [row["chosen"] for row in found] == [assistant("one"), assistant("two"), assistant("one")]
    assert [row["label"] for row in found] == pytest.approx([2 / 3, 5 / 6, 0.5])
    assert all("margin" not in row for row in found)


def test_the_ratings_of_helpsteer2_keep_their_gaps(file, caplog):
    gaps = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"))
    rows = [rating(), rating(verbosity=None, prompt=TURNS), rating(**gaps), rating(response="")]
    found = load_preferences("nvidia/HelpSteer2", "ratings", path=file(rows))
    assert found.column_names == ["prompt", "completion", *gaps]
    assert found.to_list() == [
        {"prompt": user("c#"), "completion": assistant("C# is a language."), "helpfulness": 3.0, "correctness": 4.0}
        | {"coherence": 4.0, "complexity": 2.0, "verbosity": 1.0},
        {"prompt": MESSAGES, "completion": assistant("C# is a language."), "helpfulness": 3.0, "correctness": 4.0}
        | {"coherence": 4.0, "complexity": 2.0, "verbosity": None},
    ]
    (line,) = said(caplog)
    assert line.endswith("2 rows kept; left out: 1 responses without a rating, 1 responses without text.")


def test_the_preferences_and_votes_of_helpsteer3(file, caplog):
    rows = [
        comparison(-2, [-2, -1, 1]),
        comparison(1, [0, 1], response1="three"),
        comparison(0, [1, -1], response1="four"),
        comparison(3, [], response1="five"),
    ]
    path = file(rows)
    found = load_preferences("nvidia/HelpSteer3", path=path).to_list()
    assert [(row["chosen"][0]["content"], row["margin"]) for row in found] == [
        ("one", 2.0),
        ("two", 1.0),
        ("two", 3.0),
    ]
    assert all(row["prompt"] == MESSAGES for row in found)
    found = load_preferences("nvidia/HelpSteer3", "labels", path=path).to_list()
    assert [row["chosen"][0]["content"] for row in found] == ["one", "two", "four"]
    assert [row["label"] for row in found] == pytest.approx([2 / 3, 0.75, 0.5])
    assert [line.split("left out: ")[1] for line in said(caplog)] == [
        "1 pairs whose preference is 0.",
        "1 pairs without votes.",
    ]
    answered = write_rows(path.with_name("answered.jsonl"), [comparison(1, [1], context=MESSAGES[:2]), rows[0]])
    for config in ("preference", "labels"):
        assert len(load_preferences("nvidia/HelpSteer3", config, path=answered)) == 1
        assert said(caplog)[-1].endswith("left out: 1 rows whose context does not end with the user.")


# ------------------------------------------------------------------------------------------------------- UltraFeedback


def test_the_pairs_of_ultrafeedback_are_all_that_differ(file, caplog):
    rows = [
        instruction(
            completion("a", "5444"), completion("b", "3344"), completion("c", "4445"), completion("d", "55N5")
        ),
        instruction(completion("a"), text="Alone."),
    ]
    for row in rows:  # "N" stands for "N/A" in the short form above
        for done in row["completions"]:
            for given in done["annotations"].values():
                given["Rating"] = "N/A" if given["Rating"] == "N" else given["Rating"]
    path = file(rows)
    found = load_preferences("openbmb/UltraFeedback", path=path).to_list()
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in found] == [
        (assistant("a"), assistant("b"), 0.75),
        (assistant("c"), assistant("b"), 0.75),
    ]
    assert found[1]["prompt"] == user("Say hello.")
    assert (found[1]["chosen_helpfulness"], found[1]["rejected_helpfulness"]) == (5.0, 4.0)
    assert (found[1]["chosen_instruction_following"], found[1]["rejected_honesty"]) == (4.0, 3.0)
    assert said(caplog)[0].endswith(
        "2 rows read, 2 pairs kept; left out: 1 completions without all four ratings, 1 pairs whose mean ratings are "
        "equal, 1 rows with fewer than two rated completions."
    )
    found = load_preferences("openbmb/UltraFeedback", "ratings", path=path).to_list()
    assert [row["completion"][0]["content"] for row in found] == ["a", "b", "c", "d", "a"]
    assert (found[3]["truthfulness"], found[3]["honesty"]) == (None, 5.0)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("HuggingFaceH4/ultrafeedback_binarized", "score_chosen", "score_rejected"),
        ("argilla/ultrafeedback-binarized-preferences-cleaned", "chosen-rating", "rejected-rating"),
    ],
)
def test_the_binarized_sets(file, tmp_path, caplog, name, better, worse):
    def row(*scores, **fields):
        sides = {"chosen": MESSAGES + assistant("good"), "rejected": MESSAGES + assistant("bad")}
        return {"prompt": "Where does it end?", **sides, better: scores[0], worse: scores[1], **fields}

    (found,) = load_preferences(name, path=file([row(8.5, 7.0), row(7.0, 7.0)])).to_list()
    assert found == {
        "prompt": MESSAGES,
        "chosen": assistant("good"),
        "rejected": assistant("bad"),
        "margin": 1.5,
    }
    assert "left out: 1 pairs whose chosen response is not rated higher" in said(caplog)[0]
    odd = [row(8.5, 7.0), row(math.nan, 7.0), row(9.0, 7.0, chosen=MESSAGES + user("good"))]
    assert len(load_preferences(name, path=write_rows(tmp_path / "odd.jsonl", odd))) == 1
    assert said(caplog)[1].endswith(
        "left out: 1 pairs whose chosen response is not rated higher, 1 pairs whose last message is not the "
        "assistant's."
    )
    with pytest.raises(ValueError, match=r"rows\.\S+, row 1: `chosen` and `rejected` do not share the messages"):
        load_preferences(name, path=file([row(8.5, 7.0, rejected=user("else") + assistant("bad"))]))


# ---------------------------------------------------------------------------------------------------- files and splits


@pytest.mark.parametrize(
    ("name", "config", "rows", "words"),
    [
        (
            "nvidia/HelpSteer2",
            "ratings",
            [preference(1)],
            "rows.jsonl, row 1: there is no field `coherence`, `complexity`, `correctness`, `helpfulness`, "
            "`response`, `verbosity`, which nvidia/HelpSteer2 (ratings) has; the row has ['preference_elaboration', ",
        ),
        ("nvidia/HelpSteer2", "ratings", [preference(1)], "it is a row of the configuration 'preference'."),
        (
            "nvidia/HelpSteer2",
            "ratings",
            [rating(), rating(verbosity="4")],
            'rows.jsonl, row 2: `verbosity` is str "4"; a number or null is required.',
        ),
        (
            "nvidia/HelpSteer2",
            None,
            [preference(1, split="test")],
            "`split` is str \"test\"; one of ['train', 'val', 'validation'] is required.",
        ),
        (
            "nvidia/HelpSteer3",
            None,
            [comparison("1")],
            'rows.jsonl, row 1: `overall_preference` is str "1"; a number is required.',
        ),
        (
            "nvidia/HelpSteer3",
            None,
            [comparison(1, context="Hi")],
            'row 1: `context` is str "Hi"; messages with `role` and `content` is required.',
        ),
        (
            "openbmb/UltraFeedback",
            None,
            [instruction(completion("a", ["5", "5", "5", "good"]))],
            'row 1: `Rating` is str "good"; a rating from "1" to "5", "N/A" or null is required.',
        ),
        (
            "openbmb/UltraFeedback",
            None,
            [instruction({"response": "a"})],
            "row 1: there is no field `annotations` (a mapping); it has ['response'].",
        ),
        (
            "nvidia/HelpSteer3",
            None,
            [comparison(0)],
            "1 rows read, 0 pairs kept; left out: 1 pairs whose preference is 0",
        ),
        (
            "nvidia/HelpSteer3",
            "ratings",
            [],
            "nvidia/HelpSteer3 has no configuration 'ratings'; it has preference, labels.",
        ),
        (
            "nvidia/HelpSteer",
            None,
            [],
            "there is no reader for 'nvidia/HelpSteer'; there are readers for nvidia/HelpSteer2,",
        ),
    ],
)
def test_a_wrong_file_gets_one_sentence(tmp_path, name, config, rows, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_preferences(name, config, path=write_rows(tmp_path / "rows.jsonl", rows))


def test_torn_files_and_missing_ones(tmp_path):
    whole = gzip.compress(json.dumps(comparison(1)).encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz is no whole gzip file"):
        load_preferences("nvidia/HelpSteer3", path=tmp_path / "torn.jsonl.gz")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_preferences("nvidia/HelpSteer3", path=tmp_path / "nowhere.jsonl")


def test_the_files_of_a_split_are_named_after_it(tmp_path, caplog):
    folder = tmp_path / "preference"
    folder.mkdir()
    for split, strength in (("train", 1), ("validation", 2)):
        text = json.dumps(comparison(strength)).encode()
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text))
    for split, margin in (("train", 1.0), ("validation", 2.0)):
        assert load_preferences("nvidia/HelpSteer3", split=split, path=folder)["margin"][:] == [margin]
    with pytest.raises(ValueError, match="has no split 'test': in a folder, the files"):
        load_preferences("nvidia/HelpSteer3", split="test", path=folder)
    with pytest.raises(ValueError, match="has no split 'validation'"):
        load_preferences("nvidia/HelpSteer3", split="validation", path=folder / "train.jsonl.gz")
    several = tmp_path / "ultrafeedback"
    several.mkdir()
    for name in ("flan", "sharegpt"):
        rows = [instruction(completion("a"), completion("b", "4444"), text=name)]
        write_rows(several / f"{name}.jsonl", rows)
    assert len(load_preferences("openbmb/UltraFeedback", path=several)) == 2
    load_preferences("openbmb/UltraFeedback", path=several, revision="main")
    assert said(caplog)[-1] == f"revision='main' is ignored: the rows are those of {several}."


def test_a_copy_of_a_repository_gives_the_rows_of_the_split_on_the_hub(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train_prefs", "train_gen", "test_prefs", "test_sft"):
        sides = {side: MESSAGES + assistant(f"{side} of {split}") for side in ("chosen", "rejected")}
        rows = datasets.Dataset.from_list([{**sides, "score_chosen": 8.0, "score_rejected": 5.0}])
        rows.to_parquet(data / f"{split}-00000-of-00001.parquet")
    for split in ("train", "test"):
        for path in (tmp_path, data):
            pairs = load_preferences("HuggingFaceH4/ultrafeedback_binarized", split=split, path=path)
            assert [row[0]["content"] for row in pairs["chosen"]] == [f"chosen of {split}_prefs"]


def test_other_splits_and_other_files_are_no_part_of_train(tmp_path):
    for name in ("mine", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [rating(response=name)])
    (tmp_path / "train_notes.md").write_text("Nothing to read.")
    for split, name in (("train", "mine"), ("validation", "validation")):
        rated = load_preferences("nvidia/HelpSteer2", "ratings", split=split, path=tmp_path)
        assert [row[0]["content"] for row in rated["completion"]] == [name]


def test_the_hub_is_asked_for_the_pinned_commit_and_folder(monkeypatch, caplog):
    asked = []

    def load_dataset(repo, config, **kwargs):
        asked.append((repo, config, kwargs))
        return [preference(1)] if "Steer2" in repo else [comparison(1)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("grm_hf.preferences.loading.commits_of", lambda sources: {"nvidia/HelpSteer3": "c" * 40})
    pinned = DATA_SETS["nvidia/HelpSteer2"].revision
    assert re.fullmatch("[0-9a-f]{40}", pinned)
    load_preferences("nvidia/HelpSteer2")
    load_preferences("nvidia/HelpSteer2", revision="main")
    assert not said(caplog)
    load_preferences("nvidia/HelpSteer3", split="validation")
    assert asked == [
        ("nvidia/HelpSteer2", None, {"split": "train", "revision": pinned, "data_dir": "preference"}),
        ("nvidia/HelpSteer2", None, {"split": "train", "revision": "main", "data_dir": "preference"}),
        ("nvidia/HelpSteer3", "preference", {"split": "validation", "revision": "c" * 40}),
    ]
    assert said(caplog) == [f"nvidia/HelpSteer3: no revision is pinned here, so the newest is read, {'c' * 40}."]
    with pytest.raises(ValueError, match="nvidia/HelpSteer3 has no split 'test'; it has train, validation."):
        load_preferences("nvidia/HelpSteer3", split="test")


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_are_what_training_takes(tmp_path, name):
    """Every configuration goes through the checks of the trainer: no row is refused, and its numbers arrive."""
    tokenizer = chatml_tokenizer()
    official = {
        "nvidia/HelpSteer2": [preference(1, [1, 0, -1]), preference(2, prompt=TURNS)],
        "nvidia/HelpSteer3": [comparison(1, [1, 0, -1]), comparison(2, [1], response1="other")],
        "openbmb/UltraFeedback": [instruction(completion("a"), completion("b", "1234"), completion("c", "4321"))],
    }
    whole = [{"role": "user", "content": "Hi"}]
    sides = {"prompt": "Hi", "chosen": whole + assistant("good"), "rejected": whole + assistant("bad")}
    scores = {"score_chosen": 3, "score_rejected": 1, "chosen-rating": 3.0, "rejected-rating": 1.0}
    path = write_rows(tmp_path / "rows.jsonl", official.get(name, [{**sides, **scores}]))
    for config, reading in DATA_SETS[name].configurations.items():
        if config == "ratings":
            if name == "nvidia/HelpSteer2":  # its ratings lie in files of their own
                path = write_rows(tmp_path / "ratings.jsonl", [rating(), rating(prompt=TURNS, verbosity=None)])
            data, names = load_preferences(name, config, path=path), reading.numbers
        else:
            data, names = load_preferences(name, config, path=path), ()
            prepared, counts = prepare_pairs(data, Encoder(tokenizer))
            assert counts.kept == counts.rows == len(data) > 0 and not counts.swapped
            assert prepared[reading.numbers[0]][:] == data[reading.numbers[0]][:]
            if name == "openbmb/UltraFeedback":
                names = [column.removeprefix("chosen_") for column in reading.numbers if column.startswith("chosen_")]
        if not names:
            continue
        prepared, counts = prepare_pairs(data, Encoder(tokenizer), attributes=names)
        assert counts.kept == len(data) and counts.rated == (len(data) if config == "ratings" else 0)
        for row, found in zip(data, prepared, strict=True):
            for side in ("chosen",) if config == "ratings" else ("chosen", "rejected"):
                columns = names if config == "ratings" else [f"{side}_{column}" for column in names]
                expected = [math.nan if row[column] is None else row[column] for column in columns]
                assert found[f"{side}_ratings"] == pytest.approx(expected, nan_ok=True)


@needs_data
def test_a_sample_of_helpsteer2_in_its_official_fields(tmp_path):
    """71 real pairs, written back into the official fields. The prompts there hold all turns as one text."""
    sample = datasets.Dataset.from_parquet(str(DATA / "helpsteer2_sample.parquet"), cache_dir=str(tmp_path / "cache"))
    rows, expected = [], []
    for i, row in enumerate(sample):
        texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
        sign = -1 if i % 2 else 1
        fields = dict(zip(("response_1", "response_2"), texts[::-sign], strict=True))
        rows.append(preference(sign * row["margin"], prompt=row["prompt"][0]["content"], **fields))
        expected.append((*texts, row["margin"]))
    found = load_preferences("nvidia/HelpSteer2", path=write_rows(tmp_path / "rows.jsonl", rows)).to_list()
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"], r["margin"]) for r in found] == expected
    lengths = {len(row["prompt"]) for row in found}
    assert 1 in lengths and max(lengths) >= 3 and all(length % 2 for length in lengths)
    assert not any("<extra_id_1>" in message["content"] for row in found for message in row["prompt"])
    data = datasets.Dataset.from_list(found)
    assert prepare_pairs(data, Encoder(chatml_tokenizer()))[1].kept == len(found)


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.WARNING)


# ---------------------------------------------------------------------------------------------------------------- docs


def test_the_table_of_the_docs_is_the_table_of_the_code():
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    expected = []
    for name, data in DATA_SETS.items():
        for config, reading in data.configurations.items():
            expected.append(
                f"| `{name}` | `{config}` | {reading.gives} | {', '.join(reading.splits)} | {data.licence} |"
            )
    assert rows == expected


def test_the_code_of_the_docs_runs(monkeypatch):
    def load_dataset(repo, config, split, revision, data_dir=None):
        if "Steer3" in repo:
            return [comparison(1, [1])]
        return [preference(1)] if data_dir else [rating()]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("grm_hf.preferences.loading.commits_of", lambda sources: {})
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "preferences.md").read_text("utf-8"), re.DOTALL)
    found = {}
    exec(code, found)
    assert found["pairs"][0]["margin"] == 1.0 and found["shares"][0]["label"] == 1.0
    assert found["rated"][0]["helpfulness"] == 3.0


@pytest.mark.trainer
def test_the_yaml_of_the_docs_trains(tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the extra `train`")
    from trainers import TOKENIZER, base

    from grm_hf.cli import main

    base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    rows = [preference(i % 7 - 3, prompt=f"number {i}", split="val" if i % 5 == 0 else "train") for i in range(40)]
    data = write_rows(tmp_path / "preference.jsonl", rows)
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "preferences.md").read_text("utf-8"), re.DOTALL)
    text = text.replace("dataset_name: nvidia/HelpSteer2 ", f"dataset_name: nvidia/HelpSteer2={data} ")
    text += (
        f"model_name_or_path: {tmp_path / 'base'}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\npair_loss: scaled\n"
    )
    text += "eval_strategy: steps\neval_steps: 1\nbf16: false\nuse_cpu: true\nreport_to: none\n"
    (tmp_path / "reward.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "reward.yaml")]) == 0
    out = capsys.readouterr().out
    assert "train: 27 rows, 0 dropped" in out and "eval: 7 rows, 0 dropped" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "-margin * log sigmoid(r_c - r_r)" in card and "datasets/nvidia/HelpSteer2" in card
