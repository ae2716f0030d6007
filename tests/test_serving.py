"""`grm serve` on loopback: each route as its trainer calls it, the client, and what must not stop the server."""

import asyncio
import base64
import copy
import http.client
import importlib
import json
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from client import close, post, refused
from tiny import OTHER_HEADS, bare_tokenizer, chat_grm, chatml_tokenizer, llama_tokenizer, tiny_lm, with_head
from transformers import AutoTokenizer

from grm_hf import GRMForSequenceClassification, GRMScorer
from grm_hf.cli import main
from grm_hf.configuration_grm import save_policies
from grm_hf.rewards import grm_reward_func
from grm_hf.scoring import GoldenError, save_golden


pytest.importorskip("fastapi", reason="needs the extra `serve`")
import uvicorn  # noqa: E402

from grm_hf.rewards.remote import PROTOCOLS, RemoteScorer  # noqa: E402
from grm_hf.serving.routes import ROUTES, sentence  # noqa: E402
from grm_hf.serving.server import Batcher, Limits, is_loopback, make_app, serve  # noqa: E402
from grm_hf.serving.tokens import inexact_forms  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "serving.md"
PAGE_TEXT = PAGE.read_text(encoding="utf-8")
QUESTION = [{"role": "user", "content": "Name a river."}]
ANSWERS = ["The Danube.", "Rhine", "I do not know of any river, sorry.", ""]


def saved(folder, tokenizer, seed=0, **config):
    model = chat_grm(tokenizer, seed=seed, head_hidden_size=40)
    with torch.no_grad():
        for part in model.score.parameters():
            part += 0.3 * torch.randn_like(part)
    for name, value in {"reward_mean": 0.25, "reward_std": 2.0, "max_sequence_length": 400, **config}.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_golden(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "grm", llama_tokenizer())


@pytest.fixture(scope="module")
def scorer(folder):
    return GRMScorer(folder)


@contextmanager
def running(scorer, **settings):
    """A server on a free port of this machine; gives its application and its address."""
    app = make_app(scorer, "grm", **settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield app, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(scorer):
    with running(scorer) as (_, url):
        yield url


def chat(answer):
    return [*QUESTION, {"role": "assistant", "content": answer}]


def rendered(scorer, answer):
    return scorer.tokenizer.apply_chat_template(chat(answer), tokenize=False)


@pytest.fixture(scope="module")
def rewards(scorer):
    return scorer.score([chat(answer) for answer in ANSWERS[:3]])


# -------------------------------------------------------------------------------------------------- trainers' requests


CLIENTS = Path(os.environ.get("GRM_CLIENTS") or ROOT / ".venv/clients")


@pytest.fixture
def client(monkeypatch):
    """A trainer's own module by its name. What it imports and a request does not need is empty: a trainer installs a
    cluster's software."""

    def load(name, *unneeded):
        file = CLIENTS.joinpath(*name.split(".")).with_suffix(".py")
        if not file.is_file():
            pytest.skip(f"needs {file.relative_to(CLIENTS)}: `make .venv/clients.done`, or GRM_CLIENTS")
        before = set(sys.modules)
        for parent in (name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)):
            package = ModuleType(parent)  # without its __init__, which imports all of the trainer
            package.__path__ = [str(CLIENTS.joinpath(*parent.split(".")))]
            monkeypatch.setitem(sys.modules, parent, package)
        for other in unneeded:
            monkeypatch.setitem(sys.modules, other, MagicMock())
        loaded = importlib.import_module(name)
        for added in set(sys.modules) - before:
            monkeypatch.delitem(sys.modules, added)
        return loaded

    return load


def test_the_client_of_openrlhf(served, scorer, rewards, client):
    executor = client("openrlhf.utils.agent").SingleTurnAgentExecutor([f"{served}/get_reward"] * 2)
    queries = [rendered(scorer, answer) for answer in ANSWERS[:3]]
    shards = asyncio.run(executor._fetch_rewards_via_http(queries, ["p"] * 3, [None] * 3))
    assert [reward for shard in shards for reward in shard["rewards"]] == close(rewards)
    assert [set(shard) for shard in shards] == [{"rewards", "scores", "extra_logs"}] * 2


def test_the_client_of_llama_factory(served, scorer, rewards, client):
    ask = client("llamafactory.train.ppo.ppo_utils").get_rewards_from_server
    found = ask(f"{served}/v1/score/evaluation", [rendered(scorer, answer) for answer in ANSWERS[:3]])
    assert found.tolist() == close(rewards)


def test_the_client_of_verl(served, scorer, rewards, client):
    unneeded = ["ray", "ray.actor", "omegaconf", "tensordict", "verl.experimental.reward_loop.reward_model"]
    unneeded += ["verl.protocol", "verl.single_controller", "verl.single_controller.ray"]
    unneeded += ["verl.single_controller.ray.base", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.reward"]
    unneeded += ["verl.utils", "verl.utils.fs", "verl.utils.ray_utils"]
    worker_type = client("verl.experimental.reward_loop.reward_loop", *unneeded).RewardLoopWorker
    worker = worker_type.__new__(worker_type)
    reward_model = SimpleNamespace(rollout=SimpleNamespace(name="vllm"), model_path="grm")
    worker.config = SimpleNamespace(reward=SimpleNamespace(reward_model=reward_model))
    worker.input_tokenizer = worker.reward_model_tokenizer = scorer.tokenizer
    worker.reward_router_address = served.removeprefix("http://")

    def sample(answer):
        ids = torch.tensor(scorer.tokenizer(answer, add_special_tokens=False).input_ids)
        batch = {"responses": ids, "attention_mask": torch.ones_like(ids)}
        row = SimpleNamespace(non_tensor_batch={"raw_prompt": QUESTION}, batch=batch)
        return MagicMock(__len__=lambda _: 1, __getitem__=lambda _, index: row)

    found = [asyncio.run(worker.compute_score_disrm(sample(answer)))["reward_score"] for answer in ANSWERS[:3]]
    assert found == close(rewards)


def test_the_settings_of_trainers_that_the_page_names():
    """They are in the sources of the trainers' newest releases."""
    read = {"openrlhf": "cli/train_ppo_ray.py", "llamafactory": "hparams/finetuning_args.py"}
    read["verl"] = "trainer/config/reward/reward.yaml"
    if not all(CLIENTS.joinpath(name, path).is_file() for name, path in read.items()):
        pytest.skip("needs the clients of the trainers: `make .venv/clients.done`, or GRM_CLIENTS")
    text = {name: CLIENTS.joinpath(name, path).read_text(encoding="utf-8") for name, path in read.items()}
    assert "`--reward.remote_url http://" in PAGE_TEXT and '"--reward.remote_url"' in text["openrlhf"]
    assert "`reward_model_type: api`" in PAGE_TEXT and re.search(r"reward_model_type: .*\"api\"", text["llamafactory"])
    settings = yaml.safe_load(text["verl"])
    recipe = (ROOT / "examples/recipes/verl_reward.py").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<!\+)\breward\.([a-z_.]+)[=`]", PAGE_TEXT + recipe))
    assert {"reward_model.enable", "custom_reward_function.path", "custom_reward_function.name"} < named
    for name in named:
        part = settings
        for key in name.split("."):
            assert key in part, name
            part = part[key]
    assert '"VERL_USE_EXTERNAL_MODULES"' in CLIENTS.joinpath("verl/__init__.py").read_text(encoding="utf-8")
    # Transformers then knows the type of the folder.
    code = "import sys, transformers, grm_hf; transformers.AutoConfig.for_model('grm')"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_recipe_of_verl_asks_a_server(served, rewards):
    recipe = runpy.run_path(str(ROOT / "examples/recipes/verl_reward.py"))
    given = dict(data_source="chat", ground_truth=None, extra_info={"prompt": QUESTION}, model=served)
    found = [recipe["compute_score"](solution_str=answer, **given) for answer in ANSWERS[:3]]
    assert found == close(rewards)


def test_openrlhf(served, scorer, rewards):
    """As its `remote_rm_fn` posts and its actors read."""
    queries = [rendered(scorer, answer) for answer in ANSWERS[:3]]
    reply = post(f"{served}/get_reward", {"query": queries, "prompts": ["p"] * 3, "labels": [None] * 3})
    assert torch.tensor(reply["rewards"]).tolist() == close(rewards)
    assert reply["scores"] == close([1 / (1 + math.exp(-reward)) for reward in rewards])
    assert reply["extra_logs"] == {}


def test_a_policy_that_did_not_end_its_turn(served, scorer, rewards):
    query = rendered(scorer, ANSWERS[0]).removesuffix("<|eot|>")
    assert post(f"{served}/get_reward", {"query": [query]})["rewards"] == close(rewards[:1])


def test_llama_factory(served, scorer, rewards):
    messages = [rendered(scorer, answer) for answer in ANSWERS[:3]]
    reply = post(f"{served}/v1/score/evaluation", {"model": "model", "messages": messages})
    assert reply["scores"] == close(rewards) and reply["object"] == "score.evaluation" and reply["model"] == "model"
    cut = post(f"{served}/v1/score/evaluation", {"messages": messages, "max_length": 16})["scores"]
    ids = [scorer.encode(chat(answer)).ids for answer in ANSWERS[:3]]
    assert cut == close(scorer.rewards_of_ids([[row[0], *row[-15:]] for row in ids]))


def test_slime(served, scorer, rewards):
    start = rendered(scorer, ANSWERS[0]).split(ANSWERS[0])[0]
    assert post(f"{served}/slime", {"prompt": start, "response": ANSWERS[0], "label": "x"}) == close(rewards[0])
    assert post(f"{served}/slime", {"prompt": QUESTION, "response": ANSWERS[1], "label": None}) == close(rewards[1])


def test_tei(served, scorer, rewards):
    texts = [rendered(scorer, answer).removeprefix("<s>") for answer in ANSWERS[:3]]
    one = post(f"{served}/predict", {"inputs": texts[0], "raw_scores": True})
    assert one == [{"score": close(rewards[0]), "label": "REWARD"}]
    many = post(f"{served}/predict", {"inputs": [[text] for text in texts], "raw_scores": True, "truncate": True})
    assert [row[0]["score"] for row in many] == close(rewards)
    squashed = post(f"{served}/predict", {"inputs": texts[0]})[0]["score"]  # as TEI without `raw_scores`
    assert squashed == close(1 / (1 + math.exp(-rewards[0])))
    assert refused(f"{served}/predict", {"inputs": [["a", "b"]]})[1].startswith("a pair of texts")
    long = {"inputs": "x" * 500}
    assert "`truncate`" in refused(f"{served}/predict", long)[1]
    assert "cuts the answer" in refused(f"{served}/predict", {**long, "truncate": True})[1]
    left = post(f"{served}/predict", {**long, "truncate": True, "truncation_direction": "Left", "raw_scores": True})
    assert left[0]["score"] == close(scorer.score(["x" * 500])[0])


def test_verl_and_the_rest_of_classify(served, scorer, rewards):
    """verl posts one rendered text without its BOS, and reads the last of `probs`."""
    text = rendered(scorer, ANSWERS[0]).removeprefix("<s>")
    reply = post(f"{served}/classify", {"model": "grm", "input": text, "use_activation": False})
    assert reply["data"][-1]["probs"][-1] == close(rewards[0])
    assert reply["data"][0] == {"index": 0, "label": "REWARD", "probs": [close(rewards[0])], "num_classes": 1}
    ids = [list(scorer.encode(chat(answer)).ids) for answer in ANSWERS[:3]]
    assert reply["usage"]["prompt_tokens"] == len(ids[0])
    for given in (ids, [rendered(scorer, answer) for answer in ANSWERS[:3]]):  # a BOS that is there is not doubled
        reply = post(f"{served}/classify", {"input": given})
        assert [row["probs"][0] for row in reply["data"]] == close(rewards)
    assert post(f"{served}/classify", {"input": ids[1]})["data"][0]["probs"] == close(rewards[1:2])
    assert post(f"{served}/classify", {"messages": chat(ANSWERS[2])})["data"][0]["probs"] == close(rewards[2:])
    pooled = post(f"{served}/pooling", {"input": ids, "task": "classify"})
    assert [row["data"][0] for row in pooled["data"]] == close(rewards) and pooled["data"][2]["index"] == 2


@pytest.mark.parametrize("path", ["/classify", "/predict"])
@pytest.mark.parametrize(("add_bos", "policy"), [(False, "single"), (False, "double"), (True, "double")])
def test_text_without_the_bos_of_its_template(tmp_path, path, add_bos, policy):
    """verl takes it off because most tokenizers add it. This one may not, or training may have had two."""
    scorer = GRMScorer(saved(tmp_path / "grm", llama_tokenizer(add_bos=add_bos), bos_policy=policy))
    ids, text = list(scorer.encode(chat("Rhine")).ids), rendered(scorer, "Rhine")
    assert ids[:2].count(scorer.tokenizer.bos_token_id) == 1 + (add_bos and policy == "double")
    expected, plain = scorer.rewards_of_ids([ids])[0], scorer.score(["plain text"])[0]
    assert scorer.rewards_of_ids([ids[1:]])[0] != close(expected)

    def ask(text):
        reply = post(f"{url}{path}", {"inputs" if path == "/predict" else "input": text, **raw})
        return reply[0]["score"] if path == "/predict" else reply["data"][-1]["probs"][-1]

    raw = {"raw_scores": True} if path == "/predict" else {}
    with running(scorer) as (_, url):
        assert [ask(text.removeprefix("<s>")), ask(text)] == close([expected] * 2)
        assert ask("plain text") == close(plain)


def test_score(served, scorer, rewards):
    given = [
        chat(ANSWERS[0]),
        {"prompt": QUESTION[0]["content"], "response": ANSWERS[1]},
        {"messages": chat(ANSWERS[2])},
        "plain text",
        {"prompt": "plain ", "completion": "text"},  # of a data set: text is text
        {"prompt": QUESTION, "completion": ""},  # a policy that learns writes nothing now and then
        {"ids": list(scorer.encode(chat(ANSWERS[0])).ids)[:-1]},
        "y" * 500,
    ]
    reply = post(f"{served}/score", {"chats": given})
    assert reply["rewards"][:3] == close(rewards) and reply["rewards"][6] == close(rewards[0])
    assert reply["rewards"][3] == close(reply["rewards"][4]) == close(scorer.score(["plain text"])[0])
    assert reply["truncated"] == [False] * 7 + [True] and reply["tokens"][7] == 400
    assert reply["unread"] == [[]] * 8


CUTS_THINKING = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n"
    "{{ m.content.split('</think>')[-1] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n{% endif %}"
)


def test_what_the_template_leaves_out_is_said(tmp_path):
    """By the reply and once in the log of the server, and by the client, whatever the route."""
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = CUTS_THINKING
    thinks = saved(tmp_path / "grm", tokenizer)
    scorer = GRMScorer(thinks)
    chats = [chat(ANSWERS[0]), chat(f"<think>hm</think>{ANSWERS[0]}")]
    with pytest.warns(UserWarning, match="whose thinking the chat template leaves out"):
        expected = scorer.score(chats)
    with running(scorer) as (app, url):
        with pytest.warns(UserWarning, match="whose thinking the chat template leaves out"):
            reply = post(f"{url}/score", {"chats": chats})
        assert reply["rewards"] == close(expected) and reply["unread"] == [[], ["thinking"]]
        assert post(f"{url}/score", {"chats": ["y" * 500]})["truncated"] == [True]
        assert "grm_truncated_texts 1.0" in urllib.request.urlopen(f"{url}/metrics").read().decode()
        for route in PROTOCOLS:
            with pytest.warns(UserWarning, match="whose thinking the chat template leaves out") as said:
                assert RemoteScorer(url + route, thinks).score(chats * 2) == close(expected * 2)
            assert any(warning.filename.endswith("remote.py") for warning in said)


def test_transforms_by_name(served, scorer, rewards):
    given = {"chats": [chat(answer) for answer in ANSWERS[:3]]}
    z = [(reward - 0.25) / 2.0 for reward in rewards]
    assert post(f"{served}/score?transform=standardize", given)["rewards"] == close(z)
    expected = [-math.log1p(math.exp(0.1 - reward)) for reward in rewards]
    assert post(f"{served}/score?transform=log_sigmoid&reference=0.1", given)["rewards"] == close(expected)
    assert "must be one of" in refused(f"{served}/score?transform=square", given)[1]
    assert "apply it in the trainer" in refused(f"{served}/score?transform=length_residual", given)[1]
    assert "reference: " in refused(f"{served}/score?transform=clip&reference=x", given)[1]


# ---------------------------------------------------------------------------------------------------------- the client


@pytest.mark.parametrize("path", ["", *PROTOCOLS])
def test_the_client_scores_through_every_route(served, folder, scorer, path):
    """As a function of TRL's trainers: what `grm_reward_func` gives with the model in this process."""
    tokenizer = None if path in ("", "/score") else folder
    remote, local = grm_reward_func(served + path, tokenizer), grm_reward_func(folder)
    prompts = [QUESTION] * 4 + ["plain "]
    completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS] + ["text"]
    assert remote(prompts, completions) == close(local(prompts, completions))
    assert remote.__name__ == ("grm" if path == "" else path.rpartition("/")[2]) or path == ""


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_every_head_is_served(head):
    tokenizer = llama_tokenizer()
    model = with_head(head, tokenizer)
    chats = [chat(answer) for answer in ANSWERS[:3]]
    ids = [tokenizer.apply_chat_template(one, return_tensors="pt", return_dict=True)["input_ids"] for one in chats]
    with torch.no_grad():
        by_hand = [model(row).logits.item() for row in ids]
    assert max(by_hand) - min(by_hand) > 1e-3
    with running(GRMScorer(model, tokenizer)) as (_, url):
        found = grm_reward_func(url)([QUESTION] * 3, [[one[-1]] for one in chats])
    assert found == close(by_hand)


def test_transforms_of_the_client(served, folder):
    prompts, completions = [QUESTION], [[{"role": "assistant", "content": "Rhine"}]]
    expected = grm_reward_func(folder, transform="standardize")(prompts, completions)
    remote = grm_reward_func(f"{served}/classify", folder, transform="standardize")
    assert remote(prompts, completions) == close(expected)
    assert grm_reward_func(f"{served}/score?transform=standardize")(prompts, completions) == close(expected)
    # It needs the number of tokens of each text, which at /score the server knows.
    prompts, completions = [QUESTION] * 4, [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    expected = grm_reward_func(folder, transform="length_residual")(prompts, completions)
    assert expected != close(grm_reward_func(folder)(prompts, completions))
    for path in PROTOCOLS:
        remote = grm_reward_func(served + path, folder, transform="length_residual")
        assert remote(prompts, completions) == close(expected)


def test_several_addresses_share_the_work_and_order_is_kept(scorer, served):
    chats = [{"prompt": QUESTION, "response": "x" * (number % 97 + 1)} for number in range(300)]
    expected = scorer.score(chats)
    with running(scorer) as (app, second):
        assert RemoteScorer([served, second]).score(chats) == close(expected)
        assert 0 < app.state.engine.scored_texts < 300
    # One of them is gone, one goes in the midst of its work: the other does their part.
    goes = Flaky((None, ""), (None, ""))
    assert RemoteScorer([second, goes.url, served]).score(chats) == close(expected)
    goes.join(60)
    assert not goes.is_alive()
    with pytest.raises(ConnectionError, match="gave no reward in 2 attempts"):
        RemoteScorer(second, retries=1).score(chats[:1])
    with pytest.raises(ValueError, match="`retries` is -1"):
        RemoteScorer(served, retries=-1)


class Flaky(threading.Thread):
    """A server that answers each connection by the next of `replies`, and then goes."""

    def __init__(self, *replies):
        super().__init__(daemon=True)
        self.replies, self.listener = replies, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self):
        with self.listener:
            for status, body in self.replies:
                connection, _ = self.listener.accept()
                with connection:
                    connection.recv(65536)
                    if status:
                        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                        connection.sendall(head.encode() + body.encode())


GOOD = '{"rewards": [1.5], "tokens": [3], "truncated": [true], "unread": [[]]}'


def test_retries_and_replies_that_are_none():
    flaky = Flaky((503, "busy"), (None, ""), (200, '{"rewards": [1'), (200, GOOD))
    [score] = RemoteScorer(flaky.url).stream(["a"])
    assert (score.score, score.tokens, score.truncated) == (1.5, 3, True)
    for body, words in (
        ('{"rewards": [1, 2]}', "2 rewards for 1 texts"),
        ('{"rewards": [NaN]}', "not numbers"),
        ('{"scores": [1]}', "another reply than /score has"),
        ('{"rewards": [1]}', "another reply than /score has"),
        ('{"rewards": ["x"]}', "another reply than /score has"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            RemoteScorer(Flaky((200, body)).url).score(["a"])
    with pytest.raises(ValueError, match="answers 400: no such thing"):
        RemoteScorer(Flaky((400, '{"error": {"message": "no such thing"}}')).url).score(["a"])


def test_the_client_outlasts_a_restart(monkeypatch):
    waits = []
    monkeypatch.setattr("grm_hf.rewards.remote.time.sleep", waits.append)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ConnectionError):
        RemoteScorer(url).score(["a"])
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 16, 16, 16]


def test_settings_of_a_model_loaded_here_are_refused_for_an_address():
    for setting in ({"max_tokens_per_batch": 100}, {"check": False}):
        with pytest.raises(ValueError, match="are for a model that is loaded here"):
            grm_reward_func("http://127.0.0.1:9", **setting)


def test_the_client_takes_what_the_scorer_takes(served, scorer):
    pandas = pytest.importorskip("pandas")
    row = {"prompt": QUESTION, "response": "Rhine"}
    remote, expected = RemoteScorer(served), scorer.score([row])
    assert remote.score(pandas.DataFrame([row])) == close(expected)
    assert remote.score(row for _ in range(1)) == close(expected)
    for none in ("Rhine", row):
        for one in (remote, scorer):
            with pytest.raises(ValueError, match="this takes chats and got"):
                one.score(none)
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        remote.score([{**row, "margin": torch.tensor(1.0)}])
    with pytest.raises(ValueError, match=r"text 2: the last message has role 'user'.*Its text 0 is chat 64"):
        remote.score([row] * 66 + [QUESTION])


def test_a_server_that_never_answers_is_left_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="timed out"):
            RemoteScorer(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3, retries=1).score(["a"])
        assert time.monotonic() - start < 10


def test_an_address_that_hangs_is_waited_for_once(monkeypatch):
    """As a machine that is gone: each wait is the whole time limit. Later it is asked again."""
    asked = []

    def post(url, *_):
        asked.append(url)
        if url == "http://gone/score":
            raise TimeoutError("timed out")
        return json.loads(GOOD)

    remote = RemoteScorer(["http://gone", "http://there"])
    monkeypatch.setattr(remote, "_post", post)
    for rest, expected in ((300.0, ["gone", "there"]), (300.0, ["there"]), (0.0, ["gone", "there"])):
        monkeypatch.setattr("grm_hf.rewards.remote.REST", rest)
        asked.clear()
        assert remote.score(["a"]) == [1.5]
        assert asked == [f"http://{host}/score" for host in expected]


def test_addresses_that_are_none(folder):
    for urls, words in (
        ("ftp://host", "is no address"),
        ("http://", "is no address"),
        ([], "There is no address"),
        ("http://host/v2", "the routes"),
        (["http://a/score", "http://b/slime"], "the routes"),
        ("http://host/classify", "pass `tokenizer`"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            RemoteScorer(urls)
    with pytest.raises(ValueError, match="no message before"):
        RemoteScorer("http://host/classify", folder).score([[{"role": "assistant", "content": "a"}]])


# ----------------------------------------------------------------------------------------- what must not stop a server


BAD = {
    "no JSON": (b"{", 400, "JSON"),
    "nothing": (b"", 400, "Field required"),
    "a list": ([], 400, ""),
    "no chats": ({}, 400, "chats: Field required"),
    "none": ({"chats": []}, 400, "chats"),
    "a number": ({"chats": [3]}, 400, "chats.0: it must be a text that is not empty, a list of messages, or a row"),
    "an empty text": ({"chats": [""]}, 400, "chats.0: it must be a text that is not empty"),
    "an unknown field": ({"chats": ["a"], "temperature": 1}, 400, "temperature: Extra inputs"),
    "no answer": ({"chats": ["a", QUESTION]}, 400, "text 1: the last message has role 'user'"),
    "no role": ({"chats": [[{"content": "a"}]]}, 400, "text 0: message 0 has no role"),
    "a row of nothing": ({"chats": [{"a": 1}]}, 400, "text 0: a row with keys ['a']"),
    "a completion that is a number": ({"chats": [{"prompt": QUESTION, "completion": 3}]}, 400, "text 0"),
    "a completion of numbers": ({"chats": [{"prompt": QUESTION, "completion": [3]}]}, 400, "text 0"),
    "no template settings": ({"chats": [{"messages": chat("a"), "chat_template_kwargs": 3}]}, 400, "text 0"),
    "ids beyond the vocabulary": ({"chats": [{"ids": [10**6]}]}, 400, "whole numbers from 0 to"),
    "ids that are none": ({"chats": [{"ids": "abc"}]}, 400, "whole numbers from 0 to"),
    "half a character": ({"chats": [chat("\ud83d")]}, 400, "text 0: the text has '\\ud83d', half of a character"),
    "half a role": ({"chats": [[{"role": "\ud83d", "content": "a"}, chat("b")[1]]]}, 400, "text 0: "),
    "a completion without its prompt": ({"chats": [{"completion": "a"}]}, 400, "text 0: a row with keys"),
    "a blank completion of a number": ({"chats": [{"prompt": 3, "completion": ""}]}, 400, "text 0: the prompt is int"),
    "a blank completion of texts": ({"chats": [{"prompt": ["a"], "completion": ""}]}, 400, "text 0: message 0"),
    "a blank completion without a prompt": ({"chats": [{"prompt": [], "completion": ""}]}, 400, "no message before"),
    "tools of a blank completion": (
        {"chats": [{"prompt": QUESTION, "completion": "", "tools": "{"}]},
        400,
        "text 0: `tools` is not JSON",
    ),
    "settings of a completion": (
        {"chats": [{"prompt": QUESTION, "completion": "a", "chat_template_kwargs": 3}]},
        400,
        "must be a dictionary",
    ),
    "tools among the settings": (
        {"chats": [{"messages": chat("a"), "chat_template_kwargs": {"tools": []}}]},
        400,
        "belongs beside it",
    ),
    "nested": (
        b'{"chats": [[{"role": "user", "content": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}]]}",
        400,
        "recursion",
    ),
    "too many": ({"chats": ["a"] * 1025}, 413, "at most 1024"),
    "too large": (b"[" + b" " * (17 * 2**20), 413, "larger than"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(served, case):
    body, status, words = BAD[case]
    code, message = refused(f"{served}/score", body)
    assert code == status and words in message
    assert post(f"{served}/score", {"chats": ["a"]})["rewards"]


OTHER_BAD = {
    "/get_reward": ({}, {"query": "a"}, {"query": []}, {"query": [3]}, {"query": [""]}, {"query": ["\ud83d"]}),
    "/v1/score/evaluation": ({}, {"messages": "a"}, {"messages": [None]}, {"messages": ["a"], "max_length": 1}),
    "/slime": ({}, {"prompt": "a"}, {"prompt": 3, "response": "a"}, {"prompt": [{}], "response": "a"}),
    "/predict": ({}, {"inputs": 3}, {"inputs": []}, {"inputs": [[]]}, {"inputs": "a", "raw_scores": "perhaps"}),
    "/classify": ({}, {"input": [10**6]}, {"input": "a", "messages": []}, {"messages": [{"role": "user"}]}),
    "/pooling": ({}, {"input": "a", "task": "embed"}, {"messages": []}, {"messages": QUESTION}),
}


@pytest.mark.parametrize("path", OTHER_BAD)
def test_bad_input_of_every_route_gets_one_sentence(served, path):
    for body in (b"{", [], *OTHER_BAD[path]):
        status, message = refused(served + path, body)
        assert status == 400 and message, (body, message)
    assert refused(served + path, b" " * (17 * 2**20))[0] == 413
    assert {"/score", *OTHER_BAD} == {route.path for route in ROUTES.values()}


def test_a_template_of_a_request_is_not_run(served):
    """It is a program, and this one would not end."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    kwargs = {"chat_template_kwargs": {"chat_template": endless}}
    for path, body in (
        ("/score", {"chats": [{"messages": chat("a"), **kwargs}]}),
        ("/score", {"chats": [{"prompt": QUESTION, "completion": "a", **kwargs}]}),
        ("/score", {"chats": [{"prompt": QUESTION, "completion": "", **kwargs}]}),
        ("/classify", {"messages": chat("a"), **kwargs}),
    ):
        status, message = refused(served + path, body)
        assert status == 400 and "has a `chat_template`" in message and message.startswith("text 0: ")


def test_what_is_sent_without_its_type_or_with_unknown_settings(served):
    request = urllib.request.Request(f"{served}/score", b'{"chats": ["a"]}')  # as a form
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert "Content-Type: application/json" in json.load(caught.value)["error"]["message"]
    given = {"chats": ["a"]}
    assert "tranform: Extra inputs" in refused(f"{served}/score?tranform=standardize", given)[1]
    for number in ("nan", "inf"):
        status, message = refused(f"{served}/score?transform=clip&reference={number}", given)
        assert status == 400 and "must be a finite number" in message
    reply = {"model": "\ud83d", "messages": ["a"]}
    assert refused(f"{served}/v1/score/evaluation", reply)[0] == 400
    assert "half of a character" in refused(f"{served}/slime", {"prompt": "\ud83d", "response": "a"})[1]


def test_texts_with_more_positions_than_the_model_has():
    """Refused as by the scorer; on a GPU the index would end the process."""
    tokenizer = llama_tokenizer()
    model = GRMForSequenceClassification.from_base(tiny_lm("gpt2", vocab_size=len(tokenizer))).eval()
    scorer, chats = GRMScorer(model, tokenizer), ["a", "y" * 100]
    with pytest.raises(ValueError, match="an embedding for 64 positions"):
        scorer.score(chats)
    with running(scorer) as (_, url):
        status, message = refused(f"{url}/score", {"chats": chats})
        assert status == 400 and message.startswith("text 1: ") and "an embedding for 64 positions" in message
        assert post(f"{url}/score", {"chats": chats[:1]})["rewards"] == close(scorer.score(chats[:1]))


def test_bad_ids_for_classify(served):
    assert "at most 400 are read" in refused(f"{served}/classify", {"input": [1] * 401})[1]
    assert refused(f"{served}/classify", {"input": [1] * 401})[0] == 413
    assert "either `input`" in refused(f"{served}/classify", {})[1]
    for none in ([], [[]], "", [""], [-1], ["a", [1]], {"input_ids": [1]}):
        status, message = refused(f"{served}/classify", {"input": none})
        assert status == 400 and message.startswith("input: it must be a text, texts, token ids, or lists")
    assert "is for `messages`" in refused(f"{served}/classify", {"input": "a", "chat_template_kwargs": {}})[1]
    cut = {"input": "a", "truncate_prompt_tokens": 3}
    assert "truncate_prompt_tokens: Extra" in refused(f"{served}/classify", cut)[1]
    assert refused(f"{served}/nowhere", {})[0] == 404


def test_a_body_that_grows_beyond_the_limit(served):
    """Sent in chunks, without its length."""
    connection = http.client.HTTPConnection(served.removeprefix("http://"))
    chunk = b" " * 2**20
    connection.request("POST", "/score", iter([chunk] * 17), {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    assert post(f"{served}/score", {"chats": ["a"]})["rewards"]


def test_bodies_that_wait_are_bounded_together(scorer, monkeypatch):
    """Also those that no thread has tokenised yet. What was answered or refused is let go of."""
    monkeypatch.setattr("grm_hf.serving.server.AT_ONCE", 2)
    started, let_go = threading.Event(), threading.Event()

    class Slow:
        def __getattr__(self, name):
            return getattr(scorer, name)

        def rewards_of_ids(self, ids):
            started.set()
            assert let_go.wait(60)
            return scorer.rewards_of_ids(ids)

    body = {"chats": ["a" * 700]}
    with running(Slow(), limits=Limits(body=1000)) as (app, url), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, f"{url}/score", body)]
        assert started.wait(60)
        waiting.append(pool.submit(post, f"{url}/score", body))
        until = time.monotonic() + 60
        while app.state.engine.queued < 1 and time.monotonic() < until:
            time.sleep(0.01)
        status, message = refused(f"{url}/score", body)
        assert status == 503 and message.endswith("bytes of other requests wait already.")
        assert refused(f"{url}/score", {"chats": ["a" * 1001]})[0] == 413
        let_go.set()
        assert all(len(future.result()["rewards"]) == 1 for future in waiting)
        assert len(post(f"{url}/score", body)["rewards"]) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_the_server_keeps_the_memory_of_freed_tensors(tmp_path):
    """In every thread, up to a bound."""
    code = """
import ctypes, resource, sys, threading
from pathlib import Path
import torch
from grm_hf.serving.server import keep_memory

if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit("no mallopt")
if sys.argv[1] == "keep":
    keep_memory()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def use_and_free():
    before = resident()
    tensors = [torch.ones(16, 2**18) for _ in range(4)]
    del tensors
    print(resident() - before)

thread = threading.Thread(target=use_and_free)
thread.start()
thread.join()
"""

    def run(word):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, timeout=120)
        if "no mallopt" in done.stderr:
            pytest.skip("this C library has no mallopt")
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert run("keep") > 60  # MiB, of 4 times 16
    assert run("as it is") < 20


def test_two_hundred_at_once_among_cancelled_and_bad_ones(scorer):
    """Nothing is lost, nobody else is stopped, and texts that arrive together are computed together."""
    answers = [f"{'river ' * (number % 7)}{number}" for number in range(200)]
    expected = scorer.score([chat(answer) for answer in answers])
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(scorer, name)

        def rewards_of_ids(self, ids):
            calls.append(len(ids))
            return scorer.rewards_of_ids(ids)

    def cancelled(url, number):
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps({"chats": [f"gone {number}, {n}" for n in range(20)]})
        connection.request("POST", "/score", body, {"Content-Type": "application/json"})
        connection.close()

    with running(Counting()) as (app, url):
        with ThreadPoolExecutor(240) as pool:
            noise = [pool.submit(cancelled, url, number) for number in range(20)]
            noise += [pool.submit(refused, f"{url}/score", {"chats": [[]]}) for _ in range(20)]
            got = list(pool.map(lambda a: post(f"{url}/score", {"chats": [chat(a)]})["rewards"][0], answers))
            for future in noise:
                future.result()
        assert got == close(expected)
        assert len(calls) < 200 and app.state.engine.queued == 0
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    counts = dict(re.findall(r'grm_requests_total{route="/score",status="(\d+)"} (\d+)', metrics))
    assert counts.keys() == {"200", "400", "499"} and sum(map(int, counts.values())) == 240 and counts["400"] == "20"
    assert "grm_queued_texts 0.0" in metrics and "grm_request_seconds_sum" in metrics


def test_a_cancelled_request_is_not_computed_and_a_full_queue_says_so(scorer):
    async def check():
        engine = Batcher(scorer, "grm", Limits(queue=3))
        first = asyncio.create_task(engine.rewards([[1, 2], [3]]))
        await asyncio.sleep(0)
        second = asyncio.create_task(engine.rewards([[4]]))
        await asyncio.sleep(0)
        assert engine.queued == 3
        with pytest.raises(Exception, match="503.*3 texts wait already"):
            await engine.rewards([[5]])
        first.cancel()
        await asyncio.sleep(0)
        assert engine.queued == 1
        work = asyncio.create_task(engine.run())
        assert await second == close(scorer.rewards_of_ids([[4]])) and engine.scored_texts == 1
        work.cancel()
        engine.close()

    asyncio.run(check())


def test_a_large_request_holds_up_nobody_and_ends_with_its_sender(scorer):
    """It is computed in parts: others have their turn in between, and what its sender no longer waits for is left."""
    small = GRMScorer(scorer.model, scorer.tokenizer, max_tokens_per_batch=8)
    ids = [[5 + n % 7, *range(n % 5), n] for n in range(40)]

    async def check():
        engine = Batcher(small, "grm")
        large, gone = (asyncio.create_task(engine.rewards(ids)) for _ in range(2))
        await asyncio.sleep(0)
        late = asyncio.create_task(engine.rewards([[3]]))
        work = asyncio.create_task(engine.run())
        assert await late == close(scorer.rewards_of_ids([[3]]))
        assert 0 < engine.scored_texts < 20
        gone.cancel()
        assert await large == close(scorer.rewards_of_ids(ids))
        assert engine.scored_texts < 60 and engine.queued == 0
        work.cancel()
        engine.close()

    asyncio.run(check())


def test_a_request_that_never_fits_the_queue_is_not_asked_to_come_again(scorer):
    with running(scorer, limits=Limits(queue=3)) as (app, url):
        assert refused(f"{url}/score", {"chats": ["a"] * 4}) == (
            413,
            "the request has 4 texts; at most 3 are taken at once.",
        )
        assert len(post(f"{url}/score", {"chats": ["a"] * 3})["rewards"]) == 3


def test_one_that_cannot_be_computed_does_not_spoil_the_others(scorer):
    class Touchy:
        def __getattr__(self, name):
            return getattr(scorer, name)

        def rewards_of_ids(self, ids):
            if [7] in ids:
                raise RuntimeError("out of\nmemory")
            return scorer.rewards_of_ids(ids)

    async def check():
        engine = Batcher(Touchy(), "grm")
        tasks = [asyncio.create_task(engine.rewards([[n]])) for n in (5, 7, 9)]
        await asyncio.sleep(0)
        work = asyncio.create_task(engine.run())
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [found[0][0], found[2][0]] == close(scorer.rewards_of_ids([[5], [9]]))
        assert sentence(found[1]) == "out of memory"
        work.cancel()
        engine.close()

    asyncio.run(check())


REQUESTS = {
    "one": [[5] * 5000],
    "two": [[5] * 4000, [6] * 4192],
    "long": [[5] * 9000],
    "many": [[n] * 4000 for n in (5, 6, 7, 8)],
    "shared": [[5] * 4000, [5] * 4000 + [6], [5] * 4000 + [7]],
}


def test_a_model_that_is_broken_is_not_healthy(scorer):
    """A cluster then starts another one. The request is not to blame, so the reply is no 400."""
    broken = copy.deepcopy(scorer.model)
    whole = broken.score.out.weight.data.clone()
    with running(GRMScorer(broken, scorer.tokenizer)) as (_, url):
        broken.score.out.weight.data.fill_(float("nan"))
        code, message = refused(f"{url}/score", {"chats": ["a"]})
        assert code == 500 and "rewards are not finite numbers" in message
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/health")
        broken.score.out.weight.data.copy_(whole)
        assert len(post(f"{url}/score", {"chats": ["a"]})["rewards"]) == 1
        assert urllib.request.urlopen(f"{url}/health").status == 200


def test_the_token_budget(scorer):
    async def check():
        engine = Batcher(scorer, "grm")
        tasks = [asyncio.create_task(engine.rewards(ids)) for ids in REQUESTS.values()]
        await asyncio.sleep(0)
        names = dict(zip(map(id, engine.waiting), REQUESTS, strict=True))
        batches = []
        while batch := engine._next_batch():
            batches.append([(names[id(item)], part) for item, part in batch])
        assert batches == [
            [("one", [0])],  # the next does not fit
            [("two", [0, 1])],
            [("long", [0])],  # longer than the budget
            [("many", [0, 1])],  # its third has no room, and others have their turn
            [("shared", [0, 1, 2]), ("many", [2])],  # what they share counts once, so there is room
            [("many", [3])],
        ]
        for task in tasks:
            task.cancel()
        engine.close()

    asyncio.run(check())


# --------------------------------------------------------------------------------------------------------- the command


def test_other_addresses_need_a_key(folder, capsys, monkeypatch):
    monkeypatch.delenv("GRM_API_KEY", raising=False)
    assert is_loopback("127.0.0.1") and is_loopback("localhost")
    for host in ("0.0.0.0", "", "192.0.2.1"):
        assert not is_loopback(host)
    assert main(["serve", folder, "--host", "0.0.0.0"]) == 1
    assert "an API key is required" in capsys.readouterr().err
    assert main(["serve", folder, "--route", "fly"]) == 1
    assert "there is no route 'fly'; the routes are score, openrlhf" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no address of this machine"):
        serve(folder, host="no.such.host.invalid")


def test_the_key_is_asked_for(scorer):
    with running(scorer, api_key="sesame", routes=("score",)) as (_, url):
        body = {"chats": ["a"]}
        assert refused(f"{url}/score", body)[0] == 401
        assert refused(f"{url}/score", body, Authorization="Bearer sesam")[0] == 401
        assert refused(f"{url}/score", body, Authorization="Basic !")[0] == 401
        assert urllib.request.urlopen(f"{url}/health").status == 200
        expected = scorer.score(["a"])
        assert post(f"{url}/score", body, Authorization="Bearer sesame")["rewards"] == close(expected)
        basic = base64.b64encode(b"any:sesame").decode()  # what http://any:sesame@host becomes in a trainer's client
        assert post(f"{url}/score", body, Authorization=f"Basic {basic}")["rewards"] == close(expected)
        assert RemoteScorer(url, api_key="sesame").score(["a"]) == close(expected)
        assert RemoteScorer(url.replace("http://", "http://:sesame@")).score(["a"]) == close(expected)
        assert refused(f"{url}/slime", {}, Authorization="Bearer sesame")[0] == 404


def test_models_health_and_documentation(served):
    [model] = json.load(urllib.request.urlopen(f"{served}/v1/models"))["data"]
    assert model["id"] == "grm" and model["max_model_len"] == 400
    paths = json.load(urllib.request.urlopen(f"{served}/openapi.json"))["paths"]
    assert {route.path for route in ROUTES.values()} <= set(paths)


def test_verify_asks_the_server(served, folder, tmp_path, capsys):
    assert main(["verify", folder, "--url", served]) == 0
    assert "0.0e+00" in (out := capsys.readouterr().out) or "e-0" in out
    for route in PROTOCOLS:
        assert main(["verify", folder, "--url", served + route]) == 0, capsys.readouterr().err
    other = saved(tmp_path / "other", llama_tokenizer(), seed=3)
    capsys.readouterr()
    assert main(["verify", other, "--url", served]) == 1
    assert "do not hold" in (found := capsys.readouterr()).err and "DIFFERS" in found.out
    assert main(["verify", folder, "--api-key", "x"]) == 1
    with pytest.raises(GoldenError):
        from grm_hf.serving.verify import verify_served

        verify_served(other, served)
    with running(GRMScorer(folder, dtype="bfloat16")) as (_, rounded):  # as vLLM does of itself
        capsys.readouterr()
        assert main(["verify", folder, "--url", rounded]) == 1
        assert "half precision, as vLLM does without `--dtype float32`" in capsys.readouterr().out


def test_an_adapter_is_served_and_verified(folder, tmp_path, capsys):
    """Its folder has no config.json: that of its base counts, with the adapter's own policies."""
    peft = pytest.importorskip("peft", reason="needs the extra `train`")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"], init_lora_weights=False)
    wrapped = peft.get_peft_model(GRMForSequenceClassification.from_pretrained(folder), lora)
    config = wrapped.get_base_model().config
    config.max_sequence_length, config.reward_mean = 300, 0.5
    adapter = str(tmp_path / "adapter")
    wrapped.save_pretrained(adapter)
    save_policies(config, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(adapter)
    save_golden(wrapped, tokenizer, adapter)
    with running(GRMScorer(adapter)) as (_, url):
        for route in ("", "/classify", "/get_reward"):
            assert main(["verify", adapter, "--url", url + route]) == 0, capsys.readouterr().err
        remote = grm_reward_func(f"{url}/classify", tokenizer=adapter, transform="standardize")
    assert remote.transform.mean == 0.5 and remote.scorer.rollouts.encoder.max_length == 300


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "dtype"), [(signal.SIGTERM, "float32"), (signal.SIGINT, "bfloat16")])
def test_the_command_serves_and_stops_gracefully(folder, stop, dtype):
    expected = GRMScorer(folder, dtype=dtype).score(["a"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "grm_hf.cli", "serve", folder, "--port", str(port), "--dtype", dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        answers = RemoteScorer(url, retries=30).score(["a"])
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(post, f"{url}/score", {"chats": [f"{n} " * 150 for n in range(500)]})
            while "grm_scored_texts 1.0" not in urllib.request.urlopen(f"{url}/metrics").read().decode():
                time.sleep(0.05)
            time.sleep(0.3)
            process.send_signal(stop)
            assert len(work.result()["rewards"]) == 500  # what was in work is answered
        assert answers == close(expected) and process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.slow
def test_a_port_that_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "grm_hf.cli", "serve", folder, "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "grm serve: " in done.stderr and "in use" in done.stderr


def test_what_an_engine_makes_other_ids_of():
    config = GRMForSequenceClassification.from_base(tiny_lm("llama", vocab_size=300)).config
    assert not inexact_forms(llama_tokenizer(), config) and not inexact_forms(chatml_tokenizer(), config)
    assert inexact_forms(bare_tokenizer(), config) == ["messages", "text"]  # no end of turn, and training adds EOS
    assert inexact_forms(llama_tokenizer(add_bos=False), config) == ["text"]  # the template alone writes BOS
    bare = llama_tokenizer()
    bare.chat_template = None
    assert inexact_forms(bare, config) == ["messages"]
    config.bos_policy = "double"
    assert inexact_forms(llama_tokenizer(), config) == ["messages", "text"]


EXAMPLE = re.compile(r"```text\nPOST (\S+)\n(.*?)\n```\n```json\n(.*?)\n```", re.DOTALL)


def as_printed(value):
    """A reply with numbers of four digits, and without what differs from one request to the next."""
    if isinstance(value, dict):
        fixed = {key: f"{item.split('-')[0]}-..." if key == "id" else item for key, item in value.items()}
        return {key: 0 if key == "created" else as_printed(item) for key, item in fixed.items()}
    if isinstance(value, list):
        return [as_printed(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def test_each_request_of_the_page_gets_the_reply_below_it(served):
    """GRM_WRITE=1 writes the replies."""
    text = PAGE.read_text(encoding="utf-8")
    examples = EXAMPLE.findall(text)
    assert {path for path, _, _ in examples} == {route.path for route in ROUTES.values()}
    for path, request, expected in examples:
        reply = as_printed(post(served + path, json.loads(request)))
        if os.environ.get("GRM_WRITE"):
            between = f"{request}\n```\n```json\n"
            text = text.replace(f"{between}{expected}\n", f"{between}{json.dumps(reply)}\n")
        else:
            assert alike(reply, json.loads(expected)), (path, json.dumps(reply))
    if os.environ.get("GRM_WRITE"):
        PAGE.write_text(text, encoding="utf-8")


def alike(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == pytest.approx(other, abs=1e-3) if isinstance(one, float) else one == other


def test_the_page_names_what_there_is(capsys):
    import tomllib

    text = PAGE.read_text(encoding="utf-8")
    with open(PAGE.parents[1] / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    plugins = project["entry-points"]["vllm.endpoint_plugins"]
    table = re.findall(r"^\| (?:name|route) \| (.*) \|$", text, re.MULTILINE)
    names, paths = ([cell.strip("` ") for cell in row.split("|")] for row in table[-2:])
    assert sorted(names) == sorted(plugins)
    assert paths == [ROUTES[name.removeprefix("grm_")].path for name in names]
    assert {"serve", "vllm"} <= project["optional-dependencies"].keys()
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    options = capsys.readouterr().out
    for option in ("--host", "--port", "--route", "--api-key", "--dtype", "--max-body", "--max-texts", "--max-queue"):
        assert option in options and option in text
