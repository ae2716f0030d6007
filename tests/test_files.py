"""Files of rows in, files of results out: every format gives the same rows, an interruption at any byte costs nothing,
and nothing stale stays; folders that are not what they seem; and what the `grm` command says about all of it."""

import csv
import datetime
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assistant, chat_grm, chatml_tokenizer, user

from grm_hf import GRMForSequenceClassification, cli
from grm_hf.cli import main
from grm_hf.folders import check_files, loaded_weights, new_folder, readable
from grm_hf.scoring import GRMScorer
from grm_hf.scoring.files import Results, digest, line_of, model_digest, read_file


ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = chatml_tokenizer()
grm = partial(chat_grm, TOKENIZER)
ROWS = [
    {"prompt": "one\ntwo", "response": "café 🙏\u2028", "id": "a"},
    {"messages": [user("one"), assistant("two")]},
    {"text": 'three, "four"'},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    grm().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def jsonl(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def as_csv(rows, end="\r\n"):
    names = ["id", "prompt", "response", "messages", "text"]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, lineterminator=end)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return file.getvalue().encode()


def as_parquet(rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    names = sorted({name for row in rows for name in row})
    parquet.write_table(pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), file)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- reading

FORMATS = {
    "rows.jsonl": jsonl,
    "crlf.jsonl": lambda rows: jsonl(rows, "\r\n"),
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "blank.jsonl": lambda rows: b"\n" + jsonl(rows, "\n\n"),
    "nulls.jsonl": lambda rows: jsonl({"messages": None, "tools": None, **row} for row in rows),
    "noname": jsonl,
    "lines.json": jsonl,
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows.csv": as_csv,
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows, "\n"),
    "rows.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FORMATS[name](ROWS))
    rows = read_file(path)
    assert [row.content for row in rows] == ROWS
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.content for row in read_file(packed)] == ROWS
    assert all(row.place.startswith(f"{path}, ") for row in rows)


def test_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[gzip.compress(jsonl(ROWS))])
    writer.start()
    assert [row.content for row in read_file(tmp_path / "pipe")] == ROWS
    writer.join()


def test_an_answer_that_is_json_is_text(tmp_path):
    (tmp_path / "json.csv").write_text('prompt,response\nq,"[1, 2]"\nq,"{""a"": 1}"\nq,[]\n')
    answers = ["[1, 2]", '{"a": 1}', "[]"]
    assert [row.content["response"] for row in read_file(tmp_path / "json.csv")] == answers


def test_nan_is_null_and_infinity_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "response": "a", "id": NaN}\n')
    assert read_file(path)[0].content == {"prompt": "q", "response": "a"}
    path.write_text('{"prompt": "q", "response": "a", "id": -Infinity}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 1: it holds Infinity"):
        read_file(path)


def test_an_id_that_json_has_no_form_for_is_text(folder, tmp_path, capsys):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet([{"text": "a", "id": datetime.date(2026, 11, 29)}]))
    assert main(["score", str(path), "--model", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "2026-11-29"


def test_a_cell_above_the_limit_of_csv(tmp_path):
    (tmp_path / "long.csv").write_text(f'text\n"{"x" * 140_000}"\n')
    usual = csv.field_size_limit()
    assert len(read_file(tmp_path / "long.csv")[0].content["text"]) == 140_000
    assert csv.field_size_limit() == usual  # it is the whole process's


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{broken\n', "a.jsonl, line 3: it is not JSON"),
        ("a.jsonl", b'{"text": "hi \\ud83d there"}\n', r"a.jsonl, line 1: it holds \ud83d, half of a pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl, line 2: it is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: this is list"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: it is not JSON"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: it is not JSON: an object has the name 'text' twice"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json, item 2: this is int"),
        ("a.json", b'[{"text": "a"}', "a.json: it is not JSON"),
        ("a.csv", b"text\na,b\n", "a.csv, line 2: the row has more cells"),
        ("a.csv", b'text\n"a\n', "a.csv, line 1: "),
        ("a.csv", b"text,id,text\na,1,b\n", "a.csv, line 1: there are two columns 'text'"),
        ("a.gz", gzip.compress(jsonl(ROWS))[:-9], "a.gz is no whole gzip file"),
        ("a.parquet", b"PAR1 torn", "a.parquet is no whole parquet file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a.jsonl is a git-lfs pointer"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as found:
        read_file(tmp_path / name)
    assert words in str(found.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        read_file(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_file(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_standard_input_and_output_are_utf8_in_any_locale(folder, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    row = {"text": "café 🙏", "id": "é🙏"}
    done = subprocess.run(
        [sys.executable, "-m", "grm_hf.cli", "score", "-", "--model", str(folder)],
        input=jsonl([row]), capture_output=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = map(json.loads, done.stdout.decode("utf-8").splitlines())
    assert result["id"] == row["id"]
    assert result["score"] == pytest.approx(GRMScorer(folder).score([row])[0], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- results


def run(path, digests, fail_at=None):
    """A run over all rows: the results that had to be computed."""
    computed = []
    with Results(path, digests) as results:
        for row in results.missing:
            if row == fail_at:
                raise ZeroDivisionError
            computed.append(row)
            results.add(row, {"score": f"é🙏 {digests[row]}"})
    assert [results.kept[row]["score"] for row in range(len(digests))] == [f"é🙏 {d}" for d in digests]
    return computed


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_interruption_and_any_change_cost_what_they_must(tmp_path_factory, data):
    """Cut at any byte, some lines ended by CRLF, a BOM, rows changed, added, removed, moved: what is valid is kept,
    what is not is computed, and the file is the one of a run from the beginning."""
    path = tmp_path_factory.mktemp("results") / "out.jsonl"
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8))
    old = [digest(name) for name in names]
    run(path, old)
    whole = path.read_bytes()
    content = whole[: data.draw(st.integers(0, len(whole)))]
    if data.draw(st.booleans()):
        content = content.replace(b"\n", b"\r\n", data.draw(st.integers(0, len(names))))
    if content and data.draw(st.booleans()):
        content = b"\xef\xbb\xbf" + content
    path.write_bytes(content)
    there = {json.loads(line)["digest"] for line in content.decode("utf-8-sig", "ignore").split("\n")[:-1]}
    if content[-1:] == b"}":  # whole but for its end
        there.add(json.loads(content.rsplit(b"\n", 1)[-1].removeprefix(b"\xef\xbb\xbf"))["digest"])

    new = list(old)
    for _ in range(data.draw(st.integers(0, 3))):
        row = data.draw(st.integers(0, len(new) - 1))
        kind = data.draw(st.sampled_from(["change", "add", "remove", "move"]))
        if kind == "change":
            new[row] = digest(data.draw(st.integers()))
        elif kind == "add":
            new.insert(row, digest(data.draw(st.integers())))
        elif kind == "remove" and len(new) > 1:
            del new[row]
        else:
            new.append(new.pop(row))
    if there and not there & set(new):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="holds other results"):
            run(path, new)
        assert path.read_bytes() == before
        return
    fail_at = data.draw(st.sampled_from([None, *range(len(new))]))
    wanted = [row for row, key in enumerate(new) if key not in there]
    try:
        assert run(path, new, fail_at) == wanted
    except ZeroDivisionError:
        got = {new[row] for row in wanted if row < fail_at}
        assert run(path, new) == [row for row in wanted if row >= fail_at and new[row] not in got]
    fresh = path.with_name("fresh.jsonl")
    run(fresh, new)
    assert path.read_bytes() == fresh.read_bytes()
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    for content in ("notes of mine\n", "notes", '{"row": 0, "score": 1.0}\n', "[1]\n"):
        (tmp_path / "out").write_text(content)
        with pytest.raises(ValueError, match="exists and holds other results"):
            Results(tmp_path / "out", [digest("a")])
        assert (tmp_path / "out").read_text() == content
    with pytest.raises(ValueError, match="JSON compliant"):
        line_of({"row": 0, "score": float("nan")})


def test_one_writes_and_others_know(tmp_path):
    digests = [digest(name) for name in "abc"]
    run(tmp_path / "out", digests)
    before = (tmp_path / "out").read_bytes()
    with Results(tmp_path / "out", [*digests[:2], digest("d")], write=False) as results:
        assert results.missing == [2]
        results.add(2, {"score": 1})
    assert (tmp_path / "out").read_bytes() == before and len(results.kept) == 3


def test_a_link_stays_a_link_and_modes_stay(tmp_path):
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "out").symlink_to(tmp_path / "real")
    run(tmp_path / "out", [digest("a")])
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("change", ["head", "one weight", "template", "policy", "dtype", "nothing"])
def test_the_digest_of_a_model_tells_models_apart(change):
    model, tokenizer = grm(), chatml_tokenizer()
    before = model_digest(GRMScorer(model, tokenizer))
    with torch.no_grad():
        if change == "head":
            model.score.out.bias += 1e-6
        elif change == "one weight":
            model.model.layers[0].mlp.up_proj.weight[3, 4] += 1e-3
        elif change == "template":
            tokenizer.chat_template += " "
        elif change == "policy":
            model.config.max_sequence_length = 40
        elif change == "dtype":
            model.to(torch.bfloat16)
    assert (model_digest(GRMScorer(model, tokenizer)) == before) == (change == "nothing")


# ----------------------------------------------------------------------------------------------------------- grm score


CHATS = [{"prompt": f"question {i}", "response": f"answer {i * i}"} for i in range(7)]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_score_resumes_to_the_same_bytes(folder, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("score")
    (path / "in.jsonl").write_bytes(jsonl(CHATS))
    command = ["score", str(path / "in.jsonl"), "--model", str(folder), "--output", str(path / "out.jsonl")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "WINDOW", 3)
        assert main(command) == 0
        whole = (path / "out.jsonl").read_bytes()
        (path / "out.jsonl").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        assert main(command) == 0
    assert (path / "out.jsonl").read_bytes() == whole
    scores = [json.loads(line)["score"] for line in whole.splitlines()]
    assert scores == pytest.approx(GRMScorer(folder).score(CHATS), rel=1e-5)


def test_a_changed_row_is_scored_again_and_no_other(folder, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(CHATS))
    command = ["score", str(source), "--model", str(folder), "--output", str(output)]
    assert main(command) == 0
    old = output.read_bytes().splitlines()
    changed = [*CHATS]
    changed[1] = {"prompt": "another", "response": "one"}
    source.write_bytes(jsonl(changed))
    capsys.readouterr()
    assert main(command) == 0
    assert "6 of 7 rows are done already" in capsys.readouterr().err
    new = output.read_bytes().splitlines()
    assert [i for i in range(7) if new[i] != old[i]] == [1]
    assert json.loads(new[1])["score"] == pytest.approx(GRMScorer(folder).score(changed)[1], rel=1e-5)


def test_bad_rows_are_all_named_before_anything_is_scored_also_after_a_resume(folder, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(CHATS))
    command = ["score", str(source), "--model", str(folder), "--output", str(output)]
    assert main(command) == 0
    before = output.read_bytes()
    source.write_bytes(b"\n" + jsonl([*CHATS, {"prompt": "a"}, {"text": "b"}, {"messages": [user("hi")]}]))
    capsys.readouterr()
    assert main(command) == 1
    err = capsys.readouterr().err
    assert f"{source}, line 9: " in err and f"{source}, line 11: " in err and "line 10" not in err
    assert "Traceback" not in err and output.read_bytes() == before


def test_a_text_beyond_the_learned_positions_and_ids_beyond_the_embedding():
    scorer = GRMScorer(grm("gpt2", max_position_embeddings=128), TOKENIZER)
    with pytest.raises(ValueError, match="^chat 1: it has 5.. tokens, and .* embedding for 128 positions"):
        scorer.score(["a", {"prompt": "hello", "response": "x" * 500}])
    scorer = GRMScorer(grm(vocab_size=200), TOKENIZER)
    with pytest.raises(ValueError, match="^chat 0: it has the token .* embedding has 200 rows"):
        scorer.score(["é"])
    assert GRMScorer(grm(max_position_embeddings=64), TOKENIZER).score(["x" * 100])  # rotary


@pytest.fixture
def broken(tmp_path):
    model = grm()
    with torch.no_grad():
        model.score.out.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    TOKENIZER.save_pretrained(tmp_path / "nan")
    return str(tmp_path / "nan")


def test_rewards_that_are_no_numbers_are_refused_everywhere(broken, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(jsonl(CHATS))
    (tmp_path / "golden_rows.json").write_text("{}")
    for command in (
        ["score", str(tmp_path / "in.jsonl"), "--model", broken, "--output", str(tmp_path / "out.jsonl")],
        ["score", str(tmp_path / "in.jsonl"), "--model", broken],
        ["compare", "a", "b", "c", "--model", broken],
        ["best-of-n", "a", "b", "c", "--model", broken],
    ):
        assert main(command) == 1
        captured = capsys.readouterr()
        assert "not finite numbers" in captured.err and captured.out == ""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match="row 0, `chosen`: nan"):
        GRMScorer(broken).score_pairs([pair])


def test_after_the_work_has_begun_an_error_has_its_traceback_and_how_to_go_on(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes(jsonl(CHATS))
    command = ["score", str(tmp_path / "in.jsonl"), "--model", str(folder), "--output", str(tmp_path / "out.jsonl")]
    right = GRMScorer.in_batches
    calls = []

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return right(self, *args)

    monkeypatch.setattr(cli, "WINDOW", 3)
    for problem, words in ((ValueError("deep inside"), "Traceback"), (KeyboardInterrupt(), "interrupted. ")):
        error = problem
        calls.clear()
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(GRMScorer, "in_batches", fails)
            assert main(command) == 1
        err = capsys.readouterr().err
        assert words in err and "run the same command again" in err.splitlines()[-1]
        assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 3
    assert main(command) == 0
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 7


# ------------------------------------------------------------------------------------------------------------- folders


def copy(folder, to):
    return shutil.copytree(folder, to)


TRAIN = ["train", "--use_cpu", "--bf16", "false", "--report_to", "none"]


def commands(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(jsonl(CHATS[:1]))
    return [
        ["score", str(rows), "--model", model],
        ["score", str(rows), "--model", model, "--model", model],
        ["compare", "a", "b", "c", "--model", model],
        ["best-of-n", "a", "b", "c", "--model", model],
        ["verify", model],
        ["merge", model, str(tmp_path / "merged")],
        ["export", model, str(tmp_path / "exported")],
        ["convert", model, str(tmp_path / "converted")],
        ["push", model, "somebody/model"],
        ["refresh", model],
        ["serve", model, "--port", "1"],
        ["eval", model, "--data", str(rows), "--output", str(tmp_path / "evaluated")],
        ["lab", "--quick", "--gold", model, "--output", str(tmp_path / "lab")],
        ["lab", "--quick", "--model", model, "--output", str(tmp_path / "lab")],
        [*TRAIN, "--model_name_or_path", model, "--dataset_name", str(rows), "--output_dir", str(tmp_path / "run")],
    ]


KINDS = ["absent", "a file", "lfs", "lfs configuration", "torn weights", "torn tokenizer", "two sets", "a shard less"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_says_the_same_sentence(folder, tmp_path, capsys, kind):
    place = tmp_path / "runs" / "demo" / "model"
    words = f"There is no folder '{place}'."
    if kind == "a file":
        place.parent.mkdir(parents=True)
        place.write_text("")
        words = f"'{place}' is a file."
    elif kind != "absent":
        copy(folder, place)
        weights = place / "model.safetensors"
        if kind == "lfs":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
            words = f"'{weights}' is a git-lfs pointer"
        elif kind == "lfs configuration":
            path = place / "config.json"
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
            words = f"'{path}' is a git-lfs pointer"
        elif kind == "torn weights":
            weights.write_bytes(weights.read_bytes()[:-100])
            words = f"'{weights}' is incomplete"
        elif kind == "torn tokenizer":
            path = place / "tokenizer.json"
            path.write_bytes(path.read_bytes()[:-100])
            words = f"'{path}' is incomplete"
        else:
            single = weights.read_bytes()
            weights.unlink()
            grm(seed=4).save_pretrained(place, max_shard_size="50KB")
            if kind == "two sets":
                weights.write_bytes(single)  # copied over
                words = "holds two sets of weights"
            else:
                (place / loaded_weights(place)[1]).unlink()
                words = "which model.safetensors.index.json names"
    for command in commands(str(place), tmp_path):
        capsys.readouterr()
        assert main(command) == 1, command
        err = capsys.readouterr().err
        assert words in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, (command, err)
    written = ("merged", "exported", "converted", "evaluated", "lab", "run")
    assert not any((tmp_path / name).exists() for name in written)


def test_every_command_looks_at_the_base_of_an_adapter(folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base, adapter = copy(folder, tmp_path / "base"), tmp_path / "adapter"
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    peft.get_peft_model(GRMForSequenceClassification.from_pretrained(base), config).save_pretrained(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter)
    assert main(["compare", "a", "b", "c", "--model", str(adapter)]) == 0
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in commands(str(adapter), tmp_path):
        capsys.readouterr()
        assert main(command) == 1, command
        err = capsys.readouterr().err
        assert f"'{weights}' is incomplete" in err and len(err.strip().splitlines()) == 1, (command, err)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10**6))
def test_weights_cut_at_any_byte(folder, tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    whole = (folder / "model.safetensors").read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(ValueError, match="is incomplete"):
        check_files(path.parent)
    path.write_bytes(whole)
    check_files(path.parent)


def test_a_name_that_could_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="There is no folder 'some/model', and it could not be loaded from the Hub"):
        GRMScorer("some/model")
    for place in ("a/b/c", "./model", "../model", "~/model", "model/"):
        with pytest.raises(ValueError, match="^There is no folder '"), readable(place):
            pass


def test_the_loader_takes_what_push_and_verify_look_at(folder, tmp_path):
    from grm_hf.hub.publish import stage

    both = copy(folder, tmp_path / "both")
    scores = lambda model: GRMScorer(model, TOKENIZER).score(CHATS)  # noqa: E731
    for seed, size, files in ((4, "50KB", 4), (5, "5GB", 1), (6, "100KB", 2), (7, "30KB", 5)):  # one over the other
        model = grm(seed=seed)
        model.save_pretrained(both, max_shard_size=size)
        assert len(list(both.glob("*.safetensors"))) == len(loaded_weights(both)) >= files
        assert scores(GRMForSequenceClassification.from_pretrained(both)) == scores(model)
        with stage(both, "name") as staged:
            assert scores(GRMForSequenceClassification.from_pretrained(staged)) == scores(model)
    (both / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="two sets of weights"):
        GRMForSequenceClassification.from_pretrained(both)
    with pytest.raises(ValueError, match="two sets of weights"):
        stage(both, "name")


def test_a_new_folder_is_all_or_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as out:
        (out / "half").write_text("")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_offloaded_model_scores(folder, tmp_path):
    right = GRMScorer(folder).score(CHATS)
    model = GRMForSequenceClassification.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=str(tmp_path / "disk")
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    assert model.get_input_embeddings().weight.is_meta
    for layout in ("shared_prefix", "padded"):
        assert GRMScorer(model, TOKENIZER, layout=layout).score(CHATS) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("output", ["itself", "a file", "a full folder"])
def test_merge_writes_into_a_new_folder_or_not_at_all(folder, tmp_path, capsys, output):
    peft = pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    peft.get_peft_model(GRMForSequenceClassification.from_pretrained(folder), config).save_pretrained(adapter)
    TOKENIZER.save_pretrained(adapter)
    target = {"itself": adapter, "a file": tmp_path / "file", "a full folder": tmp_path / "full"}[output]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["merge", str(adapter), str(target)]) == 1
    assert f"'{target}' exists and is not an empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert main(["merge", str(adapter), str(tmp_path / "new")]) == 0
    assert GRMScorer(tmp_path / "new").score(CHATS) == pytest.approx(GRMScorer(adapter).score(CHATS), rel=1e-5)


@pytest.mark.parametrize("name", ["safe_serialization", "comit_message", "use_temp_dir", "run_as_future"])
def test_a_push_refuses_unknown_arguments_before_anything_is_sent(folder, monkeypatch, name):
    from grm_hf.hub import push_folder, push_model

    model = GRMForSequenceClassification.from_pretrained(folder)
    monkeypatch.setattr("grm_hf.hub.publish.HfApi", None)
    for push in (lambda **k: model.push_to_hub("a/b", **k), lambda **k: push_model(model, "a/b", **k),
                 lambda **k: push_folder(folder, "a/b", **k)):  # fmt: skip
        with pytest.raises(ValueError, match=f"A push takes no `{name}`"):
            push(**{name: True})

