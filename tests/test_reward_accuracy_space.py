"""The Space `reward_accuracy`: the metric through `evaluate` gives the library's numbers, its card's examples are run,
and its page is started, called, and fed with bad input."""

import doctest
import importlib.util
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
import torch
import yaml
from pages import imported

from grm_hf import metrics


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "spaces" / "reward_accuracy"
RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(0.5, 1, 40), RNG.normal(0, 1, 40)


def test_the_folder_is_self_contained():
    files = {path.stem for path in SPACE.glob("*.py")}
    assert files == {"app", "calibration", "checks", "guard", "metrics", "reward_accuracy", "tests"}
    allowed = {
        "app": {"calibration", "checks", "gradio", "guard", "metrics", "starlette"},
        "guard": {"gradio"},
        "metrics": {"numpy"},
        "reward_accuracy": {"datasets", "evaluate", ".metrics"},
    }
    for name in files:
        assert imported(SPACE / f"{name}.py") <= allowed.get(name, set())


# ---------------------------------------------------------------------------------------------------------- the metric


@pytest.fixture
def load(tmp_path):
    evaluate = pytest.importorskip("evaluate", reason="needs the extra `eval`")
    return lambda config_name=None: evaluate.load(str(SPACE), config_name, cache_dir=str(tmp_path))


def test_pairs_equal_the_library(load):
    settings = {
        "ties": 0,
        "temperature": 2.0,
        "groups": [f"prompt {i // 2}" for i in range(40)],
        "subsets": ["chat"] * 15 + ["code"] * 25,
        "sections": {"Everything": ["chat", "code"]},
        "chosen_lengths": RNG.integers(1, 100, 40).tolist(),
        "rejected_lengths": RNG.integers(1, 100, 40).tolist(),
        "level": 0.9,
        "resamples": 300,
        "seed": 7,
    }
    result = load().compute(predictions=CHOSEN, references=REJECTED, **settings)
    assert result == metrics.pairwise_metrics(CHOSEN, REJECTED, **settings)
    assert {type(value) for value in result.values()} == {float}
    assert load().compute(predictions=CHOSEN, references=REJECTED) == metrics.pairwise_metrics(CHOSEN, REJECTED)


def test_one_to_many_and_graded_equal_the_library(load):
    rejected = [row.tolist() for row in np.split(RNG.normal(0, 1, 120), np.cumsum(RNG.integers(1, 4, 39)))]
    settings = {"ties": "share", "subsets": ["a"] * 10 + ["b"] * 30, "level": 0.9}
    result = load("one_to_many").compute(predictions=CHOSEN, references=rejected, **settings)
    assert result == metrics.one_to_many_metrics(CHOSEN, rejected, **settings)
    rewards, gold = RNG.normal(0, 1, (2, 6, 5)).tolist()
    settings = {"level": 0.9, "resamples": 300, "seed": 7}
    result = load("graded").compute(predictions=rewards, references=gold, **settings)
    assert result == metrics.graded_metrics(rewards, gold, **settings)


@pytest.mark.parametrize("case", runpy.run_path(str(SPACE / "tests.py"))["test_cases"])
def test_cases_of_the_space(load, case):
    result = load(case.get("config_name")).compute(
        predictions=case["predictions"], references=case["references"], **case.get("arguments", {})
    )
    assert {name: result[name] for name in case["result"]} == pytest.approx(case["result"])


def test_added_in_batches_and_as_tensors(load):
    metric = load()
    metric.add_batch(predictions=torch.tensor([2.0, 1.0], dtype=torch.bfloat16), references=np.float32([1.0, 1.0]))
    metric.add_batch(predictions=torch.tensor([0.5]), references=[1.0])
    metric.add(prediction=3.0, reference=1.0)
    assert metric.compute() == metrics.pairwise_metrics([2.0, 1.0, 0.5, 3.0], [1.0, 1.0, 1.0, 1.0])
    many = load("one_to_many")
    many.add_batch(predictions=torch.tensor([2.0]), references=torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16))
    assert many.compute()["accuracy"] == 0.0


def test_close_rewards_are_no_tie(load):
    assert load().compute(predictions=[1.0 + 1e-12], references=[1.0])["accuracy"] == 1.0


def test_combined_with_others(load):
    evaluate = pytest.importorskip("evaluate", reason="needs the extra `eval`")
    expected = metrics.pairwise_metrics(CHOSEN, REJECTED)
    assert evaluate.combine([load()]).compute(predictions=CHOSEN, references=REJECTED) == expected
    both = evaluate.combine({"one": load(), "other": load()})
    result = both.compute(predictions=CHOSEN, references=REJECTED)
    assert result == {f"{name}_{key}": value for name in ("one", "other") for key, value in expected.items()}


@pytest.mark.parametrize(
    ("config_name", "predictions", "references", "settings", "error", "words"),
    [
        (None, [1.0, math.nan], [0.0, 0.0], {}, ValueError, r"`chosen\[1\]` is nan"),
        (None, [1.0, 2.0], [0.0, None], {}, ValueError, r"`rejected\[1\]` is None"),
        (None, [], [], {}, ValueError, "`chosen` is empty"),
        (None, [1.0, 2.0], [0.0], {}, ValueError, r"predictions \(2\) and references \(1\)"),
        (None, [1.0], [[0.0]], {}, ValueError, "expected format"),
        (None, [1.0], [0.0], {"tie": 0.5}, TypeError, "tie"),
        (None, [1.0], [0.0], {"ties": 2}, ValueError, "`ties` is 2"),
        ("one_to_many", [1.0, 1.0], [[0.0], []], {}, ValueError, r"`rejected\[1\]` is empty"),
        ("one_to_many", [1.0], [[0.0]], {"groups": ["a"]}, ValueError, "'one_to_many' does not use groups"),
        ("graded", [[1.0, 2.0]], [[1.0]], {}, ValueError, r"`rewards\[0\]\[1\]` is the first without"),
    ],
)
def test_bad_input_is_refused_and_forgotten(load, config_name, predictions, references, settings, error, words):
    metric = load(config_name)
    with pytest.raises(error, match=words):
        metric.compute(predictions=predictions, references=references, **settings)
    good = {None: (1.0, 0.0), "one_to_many": (1.0, [0.0]), "graded": ([1.0, 2.0], [1.0, 2.0])}[config_name]
    result = metric.compute(predictions=[good[0]] * 3, references=[good[1]] * 3)
    assert result.get("n", result.get("n_prompts")) == 3.0


def test_unknown_configuration(load):
    with pytest.raises(ValueError, match="No configuration 'pairs'; there are 'default', 'one_to_many', 'graded'"):
        load("pairs")


# ------------------------------------------------------------------------------------------------------------ the card


def test_the_examples_of_the_card_and_of_the_module_are_real(load, monkeypatch):
    evaluate = pytest.importorskip("evaluate", reason="needs the extra `eval`")
    monkeypatch.chdir(ROOT)
    result = doctest.testfile(str(SPACE / "README.md"), module_relative=False)
    assert result.failed == 0 and result.attempted > 10
    text = load().inputs_description
    result = doctest.DocTestRunner().run(
        doctest.DocTestParser().get_doctest(text, {"evaluate": evaluate}, "module", None, 0)
    )
    assert result.failed == 0 and result.attempted == 9


def test_the_card_names_every_output_and_setting():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    lengths = {"chosen_lengths": range(40), "rejected_lengths": range(40, 0, -1)}
    outputs = {
        *metrics.pairwise_metrics(CHOSEN, REJECTED, groups=range(40), **lengths),
        *metrics.one_to_many_metrics(CHOSEN, REJECTED[:, None]),
        *metrics.graded_metrics(CHOSEN.reshape(8, 5), REJECTED.reshape(8, 5)),
        *("accuracy/<subset>", "subset_mean", "section/<section>", "section_mean"),
    }
    settings = {
        name
        for report in (metrics.pairwise_metrics, metrics.one_to_many_metrics, metrics.graded_metrics)
        for name in report.__kwdefaults__
    }
    assert [name for name in outputs if f"`{name}`" not in text] == []
    assert [name for name in settings if f"**{name}**" not in text] == []


def test_the_front_matter_is_what_the_hub_asks_for():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert {"evaluate", "metric"} <= set(front["tags"])
    assert len(front["short_description"]) <= 60
    assert front["title"] and front["description"] and front["sdk_version"] and front["python_version"]


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    ours = ("calibration", "checks", "guard")
    before = {name: sys.modules.pop(name, None) for name in ours}
    sys.modules["metrics"] = metrics  # `import metrics` of the page: the copy, which is equal
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(SPACE))
            spec = importlib.util.spec_from_file_location("reward_accuracy_app", SPACE / "app.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    finally:
        for name in ("metrics", *ours):
            del sys.modules[name]
        sys.modules |= {name: module for name, module in before.items() if module is not None}
    return module


def test_report_shows_the_librarys_numbers(app):
    text = "chosen;rejected;prompt;subset\n" + "\n".join(
        f"{c};{r};{i // 2};{'a' if i < 10 else 'b'}" for i, (c, r) in enumerate(zip(CHOSEN, REJECTED, strict=True))
    )
    page = app.report(text, None, "0.5", 1.0)
    expected = metrics.pairwise_metrics(CHOSEN, REJECTED, groups=[i // 2 for i in range(40)])
    assert f"Accuracy {100 * expected['accuracy']:.1f} % on 40 pairs" in page
    assert f"over 20 prompts: {100 * expected['accuracy']:.1f} %" in page
    for name in ("log_loss", "brier", "ece", "temperature"):
        assert f"{expected[name]:.4f}" in page
    assert page.count("<circle") == 2 + len(metrics.reliability(CHOSEN - REJECTED)) + 2
    assert "a, n=10" in page and "b, n=30" in page
    # The same as a file with a byte order mark, which is used instead of the text.
    assert app.report("", b"\xef\xbb\xbf" + text.encode(), "0.5", 1.0) == page
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        minidom.parseString(plot)  # well-formed


def test_report_knows_rewardbench(app):
    names = [name for members in metrics.REWARDBENCH.values() for name in members]
    page = app.report("chosen,rejected,subset\n" + "\n".join(f"1,0,{name}" for name in names), None, "0", 1.0)
    assert "section/Chat Hard" in page and "RewardBench 1" in page


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing to measure"),
        ("1,2\n3,4", "first line must name the columns"),
        ("chosen,chosen,rejected\n1,2,3", "with one called “chosen”"),
        ("chosen,rejected", "no pairs below it"),
        ("chosen,rejected\n1,2\n\n3", "Line 4 has 1 cells; the first line has 2"),
        ("chosen,rejected\n1,nan", "Line 2, column “rejected”: “nan” is not a finite number"),
        ("chosen,rejected\n1,", "“” is not a finite number"),
        ("chosen,rejected\r1,2\r3", "Line 3 has 1 cells"),
        ("chosen,rejected,chosen_length,rejected_length\n1,2,-3,4", "column “chosen_length”: “-3” is negative"),
        ("chosen,rejected\n1," + "2" * 140_000, "Line 2 is no CSV: field larger than field limit (131072)"),
        ("chosen,rejected,subset,subset\n1,2,a,b", "names the column “subset” more than once"),
        ("x" * 5_000_001, "The table is larger than 5 MB"),
        ("chosen,rejected\n1,2\ud800", "The table has half a character (U+D800)"),
        (["a"], "The table is a list; text is required"),
        ('chosen,rejected,prompt\n1,0,"a\n2,3,b\n', "is no CSV: unexpected end of data"),
        ("chosen,rejected\n1_0,0", "Line 2, column “chosen”: “1_0” is not a finite number"),
        ("chosen,rejected,chosen_length\n1,2,3", "both are required"),
        ("chosen,rejected\n" + "1,2\n" * 50_001, "more than 50,000 pairs"),
        ("chosen,rejected,subset\n" + "".join(f"1,2,{i}\n" for i in range(101)), "names 101 subsets"),
    ],
)
def test_bad_tables_get_a_sentence(app, text, words):
    page = app.report(text, None, "0.5", 1.0)
    assert words in page and 'role="alert"' in page


@pytest.mark.parametrize(
    ("upload", "ties", "temperature", "words"),
    [
        (b"chosen,rejected\n\xff,1", "0.5", 1.0, "not text in UTF-8"),
        (b"1" * 5_000_001, "0.5", 1.0, "larger than 5 MB"),
        (b"chosen,rejected\n1,0", "0.5", 0.0, "The temperature is 0.0; a number from 0.001 to 1000 is required"),
        (b"chosen,rejected\n1,0", "0.5", 1e-320, "The temperature is 1e-320"),
        (b"chosen,rejected\n1,0", "0.5", "1", "The temperature is text"),
        (b"chosen,rejected\n1,0", "0.7", 1.0, "A tie counts 0.5, 0, 1, drop; one of these"),
        (b"chosen,rejected\n1,0", ["0"], 1.0, "A tie counts 0.5, 0, 1, drop; one of these"),
        (b"chosen,rejected\n1,0", "0.5", None, "temperature is empty"),
        (b"chosen,rejected\n1,1", "drop", 1.0, "Every pair is a tie"),
    ],
)
def test_bad_files_and_settings_get_a_sentence(app, upload, ties, temperature, words):
    assert words in app.report("", upload, ties, temperature)


def test_our_own_failure_gets_a_sentence_and_the_old_report_goes(app, monkeypatch, capsys):
    from gradio.exceptions import Error

    monkeypatch.setattr(app.metrics, "pairwise_metrics", lambda *_, **__: 1 / 0)
    assert "This page failed (ZeroDivisionError)" in app.report("chosen,rejected\n1,0", None, "0.5", 1.0)
    with pytest.raises(Error, match="This page failed"):
        app.measure([1.0], [0.0])
    assert "Traceback" in capsys.readouterr().err


def test_tables_by_either_kind_of_line_and_of_one_pair(app):
    pages = [app.report(f"chosen,rejected{end}1,0{end}", None, "0.5", 1.0) for end in ("\n", "\r", "\r\n")]
    assert len(set(pages)) == 1 and "on 1 pair<" in pages[0]


def test_empty_cells_at_the_ends_of_a_table_with_tabs(app):
    columns, unused = app.read_table("\tchosen\trejected\tsubset\n0\t1\t0\ta\n1\t2\t3\t\n")
    assert columns == {"chosen": [1, 2], "rejected": [0, 3], "subset": ["a", ""]} and unused == [""]


def test_pairs_without_a_prompt_are_no_group(app):
    page = app.report("chosen,rejected,prompt,subset\n1,0,,\n2,3,,b\n2,1,a,b\n", None, "0.5", 1.0)
    assert "over 3 prompts" in page and "2 pairs without a prompt" in page and "(none), n=1" in page
    page = app.report("chosen,rejected,prompt\n1,1,a\n2,3,b\n2,1,b\n", None, "drop", 1.0)
    assert "All pairs that count belong to one prompt" in page and "Accuracy 50.0 %" in page
    assert "Every pair is a tie" in app.report("chosen,rejected,prompt\n1,1,a", None, "drop", 1.0)


def test_what_a_visitor_typed_is_escaped(app):
    evil = "<script>alert(1)</script>"
    pages = [
        app.report(f"chosen,rejected,{evil}\n1,0,1", None, "0.5", 1.0),
        app.report(f"{evil},rejected\n1,0", None, "0.5", 1.0),
        app.report(f"chosen,rejected\n1,{evil}", None, "0.5", 1.0),
        app.report(f"chosen,rejected,subset,prompt\n1,0,{evil},{evil}\n1,0,b,p", None, "0.5", 1.0),
    ]
    for page in pages:
        assert "&lt;script&gt;" in page and "<script" not in page


def test_the_page_runs_alone_and_answers(app, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    folder = tmp_path / "space"
    shutil.copytree(SPACE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without grm_hf, as on the Hub.
    start = (
        "import runpy, sys; sys.modules['grm_hf'] = None; sys.path[0] = '.'; "
        "runpy.run_path('app.py', run_name='__main__')"
    )
    env = {
        **os.environ,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-c", start], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path))
        expected = metrics.pairwise_metrics([2.0, 1.0, 0.0], [1.0, 1.0, 1.0], ties=0, groups=["a", "a", "b"])
        result = client.predict([2.0, 1.0, 0.0], [1.0, 1.0, 1.0], "0", 1.0, ["a", "a", "b"], None, api_name="/measure")
        assert result == expected
        with pytest.raises(AppError, match=r"`rejected\[1\]` is the first without a partner"):
            client.predict([1.0], [0.0, 1.0], api_name="/measure")
        assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/measure"]
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert "Traceback" not in (tmp_path / "log").read_text()
