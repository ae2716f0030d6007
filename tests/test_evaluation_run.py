"""`evaluate`: what scores, once and exactly; results that are taken up again to the same bytes; comparisons, reports,
cards, and the command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import official_files
import pytest
import torch
from official_files import FILES, assistant, needs_data, user, write
from tiny import bare_tokenizer, byte_tokenizer, chatml_tokenizer, llama_tokenizer, tiny_lm
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from grm_hf import GRMForSequenceClassification, GRMScorer, cli
from grm_hf.evaluation import SUITES, Example, compare, evaluate, read_results
from grm_hf.evaluation.report import WORST, as_csv, page, sentence, terminal, write_report
from grm_hf.evaluation.scorers import ClassifierScorer
from grm_hf.hub import card


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
TOKENIZER = chatml_tokenizer()


def grm(seed=0, tokenizer=TOKENIZER, max_length=None, **config):
    torch.manual_seed(seed)
    special = {
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    lm = tiny_lm(vocab_size=len(tokenizer), **special, **{**sizes, **config})
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model = GRMForSequenceClassification.from_base(lm, head_hidden_size=8).eval()
    model.config.max_sequence_length = max_length
    return model


def saved(folder, seed=0):
    model = grm(seed)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "second", seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    for suite, files in FILES.items():
        write(place / suite, files())
    return place


def classifier(tokenizer=TOKENIZER, **config):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id, **config)
    )
    return model.eval()


# ------------------------------------------------------------------------------------------------------ what it scores


@pytest.mark.parametrize("suite", FILES)
def test_scores_are_those_of_the_scorer_in_the_order_of_the_rows(folder, data, suite):
    results = evaluate(folder, suite, data / suite)
    scorer = GRMScorer(folder)
    for example, row in zip(results.examples, results.rows, strict=True):
        for j, score in enumerate(row["scores"]):
            chat = example.chat(j)
            if isinstance(chat, dict) and chat["response"] == "":
                continue  # an answer without text, which GRMScorer refuses: see below
            assert score == pytest.approx(scorer.score([chat])[0], abs=1e-6)
    assert [row["id"] for row in results.rows] == [example.id for example in results.examples]
    assert results.summary["n"] == len(results.rows)


def test_an_answer_without_text_counts_as_it_does_in_training_by_reinforcement(folder, data):
    from grm_hf.rewards.adapters import policy_scorer
    from grm_hf.rewards.rollouts import Rollout

    results = evaluate(folder, "rmb", data / "rmb")
    example = next(e for e in results.examples if "" in e.responses)
    j = example.responses.index("")
    expected = policy_scorer(folder).score([Rollout(example.prompt, [assistant("")])])[0]
    assert results.scores[results.examples.index(example)][j] == pytest.approx(expected, abs=1e-6)


def test_every_text_is_computed_once(folder, monkeypatch):
    """Rows of one prompt, and equal texts, wherever they are; windows do not part the rows of a prompt."""
    rows = [{"prompt": [user(f"q{i % 3}")], "chosen": [f"a{i}"], "rejected": ["same"]} for i in range(9)]
    seen = []
    stream = GRMScorer.stream

    def watched(self, chats, window=1024):
        seen.extend(json.dumps(chat) for chat in chats)
        return stream(self, chats, window)

    monkeypatch.setattr(GRMScorer, "stream", watched)
    results = evaluate(folder, "own", rows, window=4)
    assert len(seen) == len(set(seen)) == 9 + 3
    assert [row["row"] for row in results.rows] == list(range(9))
    prompts = [json.loads(chat)["prompt"][0]["content"] for chat in seen]
    assert prompts == sorted(prompts)


def test_live_models_folders_scorers_adapters_and_ensembles(folder, second, data, tmp_path):
    from peft import LoraConfig, get_peft_model

    from grm_hf.rewards import RewardEnsemble

    file = data / "own"
    expected = evaluate(folder, "own", file).scores
    live = GRMForSequenceClassification.from_pretrained(folder)
    live.train()
    for model, tokenizer in ((live, TOKENIZER), (GRMScorer(live, TOKENIZER), None), (Path(folder), None)):
        assert evaluate(model, "own", file, tokenizer=tokenizer).scores == expected
    assert live.training  # as it was
    adapter = get_peft_model(
        GRMForSequenceClassification.from_pretrained(folder),
        LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["score"], init_lora_weights=False),
    )
    adapter.save_pretrained(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    found = evaluate(adapter, "own", file, tokenizer=TOKENIZER).scores
    assert found != expected
    again = evaluate(str(tmp_path / "adapter"), "own", file).scores
    assert sum(found, []) == pytest.approx(sum(again, []), abs=1e-5)
    ensemble = RewardEnsemble([folder, second], statistics=[(0.0, 1.0), (0.0, 1.0)])
    both = evaluate(ensemble, "own", file)
    members = [evaluate(path, "own", file).scores for path in (folder, second)]
    mean = [(a + b) / 2 for row in zip(*members, strict=True) for a, b in zip(*row, strict=True)]
    assert sum(both.scores, []) == pytest.approx(mean, abs=1e-6)
    assert both.model == "RewardEnsemble"

    class Length:
        def score(self, chats):
            return [len(str(chat)) for chat in chats]

    assert evaluate(Length(), "own", file).model == "Length"
    with pytest.raises(ValueError, match="Length has no `model`"):
        evaluate(Length(), "own", file, output=tmp_path)
    with pytest.raises(ValueError, match="int is nothing that scores"):
        evaluate(3, "own", file)
    with pytest.raises(ValueError, match="`tokenizer` is given, and GRMScorer has its own"):
        evaluate(GRMScorer(live, TOKENIZER), "own", file, tokenizer=TOKENIZER)


@pytest.mark.parametrize("make", [chatml_tokenizer, llama_tokenizer])
def test_any_classifier_with_one_label_scores_as_its_authors_example_does(tmp_path, data, make):
    tokenizer = make()
    classifier(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    results = evaluate(str(tmp_path), "hhh", data / "hhh")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for example, row in zip(results.examples, results.rows, strict=True):
        for j, score in enumerate(row["scores"]):
            chat = [*example.prompt, assistant(example.responses[j])]
            inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                assert score == model(**inputs).logits.item()
            assert row["tokens"][j] == inputs["input_ids"].shape[1]


def test_a_cross_encoder_takes_prompt_and_response_as_a_pair(data):
    tokenizer = byte_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, num_labels=1)
    model = BertForSequenceClassification(config).eval()
    results = evaluate(model, "judgebench", data / "judgebench", tokenizer=tokenizer)
    example = results.examples[0]
    inputs = tokenizer(example.prompt, example.responses[0], return_tensors="pt")
    inputs = {name: inputs[name] for name in tokenizer.model_input_names if name in inputs}
    with torch.no_grad():
        assert results.scores[0][0] == model(**inputs).logits.item()
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        evaluate(model, "hhh", data / "hhh", tokenizer=tokenizer)


def test_a_text_that_is_too_long_loses_its_beginning_and_is_counted(tmp_path, data):
    tokenizer = llama_tokenizer()
    model = classifier(tokenizer, max_position_embeddings=24)
    results = evaluate(model, "judgebench", data / "judgebench", tokenizer=tokenizer)
    assert results.truncated == 8 and set(results.rows[0]["tokens"]) == {24}
    chat = [user("question 0"), assistant("yes")]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[ids[0], *ids[-23:]]])).logits.item()
    assert results.scores[0][0] == expected
    assert "8 responses were longer" in terminal([results])
    ours = evaluate(grm(max_length=24), "judgebench", data / "judgebench", tokenizer=TOKENIZER)
    assert ours.truncated == 8


def test_a_cross_encoder_whose_positions_begin_behind_the_padding_is_cut_in_time():
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=22, num_labels=1, pad_token_id=1)
    scorer = ClassifierScorer(RobertaForSequenceClassification(config), tokenizer)
    assert [(s.tokens, s.truncated) for s in scorer.stream(["a" * 20, "a" * 21])] == [(20, False), (20, True)]


def test_a_classifier_reads_what_the_rows_mean():
    scorer, tools = ClassifierScorer(classifier(), TOKENIZER), [{"name": "f"}]
    row = {"prompt": [user("q")], "response": "a"}
    for same, other in (
        (row, {**row, "prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}),
        (row, {**row, "tools": [], "chat_template_kwargs": {"x": None}}),
        ({**row, "tools": tools}, {**row, "tools": json.dumps(tools)}),
        ({**row, "tools": tools}, {**row, "tools": [{"name": "f", "x": None}]}),
    ):
        expected, found = scorer.stream([same, other])
        assert found == expected
    with pytest.raises(ValueError, match="content that is not text"):
        list(scorer.stream([{**row, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}]))


def test_what_is_no_reward_model_is_refused(tmp_path, data):
    model = classifier()
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
        evaluate(model, "own", data / "own", tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="its tokenizer is not known"):
        evaluate(classifier(), "own", data / "own")
    lm = tiny_lm(vocab_size=len(TOKENIZER))
    lm.config.num_labels = 1
    lm.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights for .*score.weight.*its scores would be random"):
        evaluate(str(tmp_path), "own", data / "own")
    bare = grm(tokenizer=bare_tokenizer())
    tokenizer = byte_tokenizer(eos_token="</s>", pad_token="<pad>")
    with pytest.raises(ValueError, match="rows 0 to 1 cannot be scored: chat 0: .*no chat template"):
        evaluate(bare, "hhh", data / "hhh", tokenizer=tokenizer, subset=["harmless"])


# ---------------------------------------------------------------------------------------------------- taken up again


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_are_taken_up_again_from_any_byte_to_the_same_bytes(folder, data, tmp_path):
    whole = evaluate(folder, "rm-bench", data / "rm-bench", output=tmp_path, window=12)
    path = tmp_path / "rm-bench.jsonl"
    content = path.read_bytes()
    assert len(content.splitlines()) == 1 + 5
    for size in [*range(0, len(content), 97), len(content) - 1, len(content)]:
        path.write_bytes(content[:size])
        again = evaluate(folder, "rm-bench", data / "rm-bench", output=tmp_path, window=12)
        assert path.read_bytes() == content
        assert again.summary == whole.summary and again.rows == whole.rows


def test_results_name_the_commit_of_their_data_and_go_on_with_it(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra `eval`")
    hub = pytest.importorskip("huggingface_hub")
    (rows,) = FILES["judgebench"]().values()
    commits, asked = {"main": "a" * 40, "v1": "b" * 40}, []

    def load_dataset(repo, config, split, revision):
        asked.append((repo, revision))
        return rows

    monkeypatch.setattr(
        hub.HfApi, "dataset_info", lambda self, repo, revision=None: SimpleNamespace(sha=commits[revision or "main"])
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    repo = "ScalerLab/JudgeBench"
    found = evaluate(folder, "judgebench", output=tmp_path / "main")
    assert found.revisions == {repo: "a" * 40} == json.loads(found.to_json())["revisions"]
    commits["main"] = "c" * 40  # the data goes on; this evaluation does not
    assert evaluate(folder, "judgebench", output=tmp_path / "main").revisions == {repo: "a" * 40}
    assert evaluate(folder, "judgebench", revision="v1", output=tmp_path / "v1").revisions == {repo: "b" * 40}
    assert evaluate(folder, "judgebench", "lab/copy").revisions == {"lab/copy": "c" * 40}
    assert asked == [(repo, "a" * 40), (repo, "a" * 40), (repo, "b" * 40), ("lab/copy", "c" * 40)]

    def offline(self, repo, revision=None):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.HfApi, "dataset_info", offline)
    with pytest.warns(UserWarning, match=f"cannot be asked for the commit of {repo} .ConnectionError."):
        assert evaluate(folder, "judgebench", revision="v1").revisions == {}
    assert asked[-1] == (repo, "v1")


def test_finished_results_are_read_and_not_computed(folder, data, tmp_path, monkeypatch):
    first = evaluate(folder, "own", data / "own", output=tmp_path)
    monkeypatch.setattr(GRMScorer, "stream", lambda *args, **kwargs: pytest.fail("scored again"))
    assert evaluate(folder, "own", data / "own", output=tmp_path).scores == first.scores


def test_results_of_another_model_or_of_other_rows_are_refused(folder, second, data, tmp_path):
    evaluate(folder, "own", data / "own", output=tmp_path)
    path = tmp_path / "own.jsonl"
    content = path.read_bytes()
    with pytest.raises(ValueError, match="own.jsonl holds results of another model"):
        evaluate(second, "own", data / "own", output=tmp_path)
    with pytest.raises(ValueError, match="holds results of other rows"):
        evaluate(folder, "own", data / "own", output=tmp_path, limit=1)
    assert path.read_bytes() == content
    for text, words in (
        ("my notes\n", "is no file of results"),
        ("[1]\n", "is no file of results"),
        ("my notes", "no file of results"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            evaluate(folder, "own", data / "own", output=tmp_path)
        assert path.read_text() == text
    path.write_bytes(content.splitlines(keepends=True)[0] + b'{"row": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not the row that belongs there"):
        evaluate(folder, "own", data / "own", output=tmp_path)


def test_the_digest_of_a_model_knows_weights_policies_tokenizer_and_combination(folder, second):
    from grm_hf.evaluation.scorers import as_scorer, digest_of
    from grm_hf.rewards import RewardEnsemble

    reference = digest_of(as_scorer(folder))
    live = GRMForSequenceClassification.from_pretrained(folder)
    assert digest_of(as_scorer(live, TOKENIZER)) == reference  # the same model, loaded or live
    with torch.no_grad():
        live.lm.get_input_embeddings().weight[5, 3] += 1e-6
    changed = digest_of(as_scorer(live, TOKENIZER))
    shorter = GRMForSequenceClassification.from_pretrained(folder)
    shorter.config.max_sequence_length = 20
    other_template = chatml_tokenizer()
    other_template.chat_template += " "
    same = GRMForSequenceClassification.from_pretrained(folder)
    found = [changed, digest_of(as_scorer(shorter, TOKENIZER)), digest_of(as_scorer(same, other_template))]
    statistics = [(0.0, 1.0)] * 2
    found += [digest_of(RewardEnsemble([folder, second], how=how, statistics=statistics)) for how in ("mean", "min")]
    assert len({reference, *found}) == 6


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("suite", official_files.REAL)
def test_real_rows_killed_in_the_middle_and_taken_up_again(folder, tmp_path, suite):
    """A process that is killed (SIGKILL) while it writes, on real rows in their official form."""
    place = write(tmp_path / "data", official_files.REAL[suite]())
    options = {"limit": {"rm-bench": 16, "rmb": 32}.get(suite, 48), "window": 16}
    whole = evaluate(folder, suite, place, output=tmp_path / "whole", **options)
    expected = (tmp_path / "whole" / f"{suite}.jsonl").read_bytes()
    path = tmp_path / "cut" / f"{suite}.jsonl"
    code = (
        "import sys; from grm_hf.evaluation import evaluate\n"
        f"evaluate(*sys.argv[1:4], output=sys.argv[4], **{options})"
    )
    arguments = [sys.executable, "-c", code, folder, suite, str(place), str(path.parent)]
    killed = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while (not path.is_file() or path.stat().st_size < len(expected) // 4) and killed.poll() is None:
        assert time.time() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    if path.stat().st_size == len(expected):  # it was quicker than we
        path.write_bytes(expected[: len(expected) // 2])
    again = evaluate(folder, suite, place, output=path.parent, **options)
    assert path.read_bytes() == expected and again.summary == whole.summary
    assert again.summary["complete"] == 0.0 and "a part of the suite" in terminal([again])
    assert again.summary["score_low"] < again.summary["score"] < again.summary["score_high"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder, data, tmp_path):
    command = [
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29671", "-m", "grm_hf.cli", "eval", folder,
        "--suite", "rm-bench", "--data", str(data / "rm-bench"), "--output", str(tmp_path / "two"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(2):  # the second time, from a file that lost its end
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("rm-bench (first)") == 1  # one of them speaks
        path = tmp_path / "two" / "rm-bench.jsonl"
        rows = jsonl(path)[1:]
        one = evaluate(folder, "rm-bench", data / "rm-bench", output=tmp_path / "one")
        for ours, theirs in zip(sorted(rows, key=lambda row: row["row"]), one.rows, strict=True):
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)
        path.write_bytes(path.read_bytes()[:-20])


# --------------------------------------------------------------------------------------------------------- comparisons


def test_a_comparison_is_paired_and_says_when_it_shows_nothing(folder, data):
    rows = [{"prompt": [user(f"q{i}")], "chosen": ["a"], "rejected": ["b"]} for i in range(200)]

    class Fixed:
        def __init__(self, right):
            self.right = right

        def score(self, chats):
            numbers = [int(chat["prompt"][0]["content"][1:]) for chat in chats]
            return [float((chat["response"] == "a") == self.right(n)) for n, chat in zip(numbers, chats, strict=True)]

    def results(right, name):
        found = evaluate(Fixed(right), "own", rows)
        found.model = name
        return found

    good, better = results(lambda n: n % 5 > 0, "good"), results(lambda n: n % 10 > 0, "better")
    other = results(lambda n: n % 5 > 1 or n % 5 == 0, "other")  # as good as the first, on other rows
    found = compare(better, good)
    assert found["difference"] == pytest.approx(0.1) and found["verdict"] == "better is better"
    # Paired: both are right or wrong on nine rows of ten, so the interval is far narrower than that of two samples.
    assert found["high"] - found["low"] < 0.09
    assert compare(good, better)["verdict"] == "better is better"
    same = compare(good, other)
    assert same["difference"] == pytest.approx(0) and same["verdict"] == "no difference shown"
    assert same["low"] < 0 < same["high"]
    assert "no difference shown" in sentence(same) and "+0.00" in sentence(same)
    for count, words in ((1, "no difference shown"), (5, "no difference shown"), (6, "Fixed is better")):
        one = [evaluate(Fixed(lambda n, s=s: s), "own", rows[:count]) for s in (True, False)]
        found = compare(*one)
        assert (found["difference"], found["differing"], found["verdict"]) == (1.0, count, words)
    with pytest.raises(ValueError, match="equal rows are required"):
        compare(good, one[0])


def test_results_of_others_are_read_from_their_folder(folder, second, data, tmp_path):
    ours = evaluate(folder, "rewardbench", data / "rewardbench", output=tmp_path / "a")
    theirs = evaluate(second, "rewardbench", data / "rewardbench", output=tmp_path / "b")
    found = read_results(tmp_path / "b", ours)
    assert found.summary == theirs.summary and found.model == "second"
    assert compare(ours, found)["difference"] == pytest.approx(ours.summary["score"] - theirs.summary["score"])
    path = tmp_path / "b" / "rewardbench.jsonl"
    content = path.read_bytes()
    for change, words in (
        (content[: len(content) // 2], r"is not finished: \d+ of 23 rows"),
        (content.replace(ours.rows_digest.encode(), b"0" * 64), "results of other rows"),
    ):
        path.write_bytes(change)
        with pytest.raises(ValueError, match=words):
            read_results(tmp_path / "b", ours)
    with pytest.raises(ValueError, match="there are no results of rewardbench in"):
        read_results(tmp_path / "c", ours)


# -------------------------------------------------------------------------------------------------------------- report


def test_results_as_json_frame_and_csv(folder, data):
    pytest.importorskip("pandas")
    results = evaluate(folder, "rewardbench2", data / "rewardbench2")
    found = json.loads(results.to_json())
    assert found["summary"] == results.summary and len(found["rows"]) == len(results.rows)
    assert len(found["rows_digest"]) == 64
    frame = results.to_frame()
    assert list(frame["id"]) == [example.id for example in results.examples]
    lines = as_csv([results]).splitlines()
    assert lines[0] == "suite,model,figure,value" and f"rewardbench2,first,score,{results.summary['score']}" in lines


@pytest.mark.parametrize("suite", FILES)
def test_the_report_is_one_file_that_loads_nothing(folder, second, data, tmp_path, suite):
    runs = [evaluate(model, suite, data / suite, output=tmp_path / Path(model).name) for model in (folder, second)]
    write_report(tmp_path / "report", runs, [compare(*runs)])
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|https?://(?!www\.w3\.org)|url\(", text)
    assert text.count("<svg") == text.count("</svg>") >= 5
    assert ("right: concise" in text) == (suite == "rm-bench")
    assert sentence(compare(*runs)).split(":")[-1].strip() in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.html", "results.csv", "results.json", f"{suite}.json",
    }
    table = terminal(runs, [compare(*runs)])
    assert suite in table and "95 % interval" in table


def test_the_report_escapes_what_it_shows():
    rows = [{"prompt": [user("<script>alert(1)</script>")], "chosen": ["<b>a</b>"], "rejected": ["b & c"]}]

    class Wrong:
        def score(self, chats):
            return [float(chat["response"].startswith("b")) for chat in chats]

    text = page([evaluate(Wrong(), "own", rows * 3)])
    assert "<script" not in text and "&lt;b&gt;a&lt;/b&gt;" in text and "b &amp; c" in text
    assert text.count("<details>") == min(3, WORST)


# ---------------------------------------------------------------------------------------------------------------- card


def whole(suite, value=0.8125):
    return {"suite": suite, "dataset": SUITES[suite].hub[0].repo, "value": value, "headline": SUITES[suite].headline}


def test_results_go_onto_the_card_and_a_person_s_words_stay(tmp_path, folder):
    place = Path(saved(tmp_path / "model"))
    assert card.add_results(place, [whole("hhh")]) == []
    readme, file = place / "README.md", place / ".eval_results" / "grm_eval.yaml"
    index = card.metadata(readme.read_text())["model-index"][0]["results"]
    assert [r["metrics"][0]["value"] for r in index] == [0.8125]
    assert "task_id: hhh" in file.read_text() and "value: 0.8125" in file.read_text()
    # Ours to replace; the rest stays, and so does what a person writes around it.
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    assert card.add_results(place, [whole("hhh", 0.9), whole("rewardbench")]) == []
    assert "My own words." in readme.read_text()
    index = card.metadata(readme.read_text())["model-index"][0]["results"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in index] == [("hhh", 0.9), ("rewardbench", 0.8125)]
    assert file.read_text().count("dataset:") == 2 and "value: 0.9\n" in file.read_text()
    # A person edits both: their numbers stay, and what is new is added.
    for path in (readme, file):
        path.write_text(path.read_text().replace("value: 0.9\n", "value: 0.77\n"))
    assert card.add_results(place, [whole("hhh", 0.5), whole("rm-bench", 0.6)]) == ["hhh"]
    index = card.metadata(readme.read_text())["model-index"][0]["results"]
    assert {r["dataset"]["name"]: r["metrics"][0]["value"] for r in index} == {
        "hhh": 0.77, "rewardbench": 0.8125, "rm-bench": 0.6,
    }
    assert "value: 0.77\n" in file.read_text() and "value: 0.5\n" not in file.read_text()
    assert not file.read_text().startswith("#")
    assert card.add_results(place, [whole("rm-bench", 0.7)]) == ["rm-bench"]


def test_a_card_of_a_person_keeps_its_words_and_numbers(tmp_path):
    place = Path(saved(tmp_path / "model"))
    text = "---\nlicense: mit\n---\n\n# Mine\n\nWords.\n"
    (place / "README.md").write_text(text)
    card.add_results(place, [whole("hhh")])
    found = (place / "README.md").read_text()
    assert found.endswith("# Mine\n\nWords.\n") and card.metadata(found)["license"] == "mit"
    assert card.metadata(found)["model-index"][0]["results"][0]["dataset"]["name"] == "hhh"
    assert card.add_results(place, [whole("hhh", 0.1)]) == ["hhh"]  # by now it is theirs


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_compares_and_reports(folder, second, data, tmp_path, capsys):
    own = data / "own" / "my_pairs.jsonl"
    for model, name in ((second, "second"), (folder, "third")):
        assert cli.main(["eval", model, "--data", str(own), "--output", str(tmp_path / name)]) == 0
    assert cli.main(
        ["eval", folder, "--data", str(own), "--output", str(tmp_path / "first"), "--compare",
         str(tmp_path / "second"), str(tmp_path / "third")]
    ) == 0
    printed = capsys.readouterr().out
    assert "no difference shown" in printed and f"report: {tmp_path / 'first' / 'report.html'}" in printed
    found = json.loads((tmp_path / "first" / "results.json").read_text())
    assert len(found["results"]) == 3
    assert [c["verdict"] for c in found["comparisons"]] == ["no difference shown"] * 2
    assert found["comparisons"][1]["difference"] == 0


def test_the_command_s_errors_are_one_line(folder, data, tmp_path, capsys):
    own = str(data / "own" / "my_pairs.jsonl")
    for arguments, words in (
        ([folder], "pass --suite, or your own pairs by --data"),
        ([folder, "--suite", "rewardbench3", "--data", own], "no suite 'rewardbench3'"),
        ([folder, "--suite", "rewardbench", "--data", own], "my_pairs.jsonl, row 1: a row of rewardbench has the"),
        ([folder, "--data", own, "--compare", "x"], "--compare needs --output"),
        (["org/model", "--data", own, "--card"], "--card writes into a folder"),
        ([folder, "--data", own, "--subset", "x"], "no subset 'x'"),
        ([folder, "--data", str(tmp_path / "none.jsonl")], "no such file or folder"),
    ):
        assert cli.main(["eval", *arguments]) == 1
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_command_writes_whole_results_onto_the_card(tmp_path, data, capsys, monkeypatch):
    model = saved(tmp_path / "model")
    monkeypatch.setitem(SUITES, "hhh", SUITES["hhh"].__class__(**{**vars(SUITES["hhh"]), "rows": (8,)}))
    hhh, rows = str(data / "hhh"), str(data / "rewardbench")
    assert cli.main(["eval", model, "--suite", "hhh", "--data", hhh, "--card"]) == 0
    assert f"card: {Path(model) / 'README.md'}" in capsys.readouterr().out
    index = card.metadata((Path(model) / "README.md").read_text())["model-index"][0]["results"]
    assert [entry["dataset"]["name"] for entry in index] == ["hhh"]
    assert cli.main(["eval", model, "--suite", "rewardbench", "--data", rows, "--card"]) == 0
    assert "not on the card, being no whole benchmark: rewardbench" in capsys.readouterr().out


def test_an_ensemble_on_the_command_line(folder, second, data, capsys):
    own = str(data / "own" / "my_pairs.jsonl")
    for path in (folder, second):
        config = json.loads((Path(path) / "config.json").read_text())
        (Path(path) / "config.json").write_text(json.dumps({**config, "reward_mean": 0.5, "reward_std": 2.0}))
    assert cli.main(["eval", folder, "--member", second, "--data", own]) == 0
    assert "RewardEnsemble" in capsys.readouterr().out


def test_importing_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('trl', 'datasets', 'pandas', 'matplotlib', 'peft', 'evaluate', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "from grm_hf.evaluation import SUITES, Example, aggregate, evaluate\n"
        "import grm_hf.evaluation.report\n"
        "print(aggregate('own', [Example('p', ['a', 'b'], [0])], [[1.0, 0.0]])['score'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr[-2000:]


def test_an_example_is_plain_data():
    example = Example(prompt="p", responses=["a", "b"], correct=[0])
    assert (example.subset, example.id, example.meta, example.pairs) == ("", "", {}, [(0, 1)])
    assert example.chat(1) == {"prompt": "p", "response": "b"}


def test_the_benchmark_of_speed_works_and_its_sides_agree(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["evaluation.py", "--small"])
    import evaluation

    evaluation.main()
    printed = capsys.readouterr().out
    assert "| best of 4 (4) | 16 |" in printed
    assert "benchmarks/evaluation.py" in (ROOT / "Makefile").read_text()


def test_a_scorer_that_forgets_a_chat_is_named():
    class Short:
        def score(self, chats):
            return [1.0] * (len(chats) - 1)

    with pytest.raises(ValueError, match=r"Short.score gives 1 scores for 2 chats"):
        evaluate(Short(), "own", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
