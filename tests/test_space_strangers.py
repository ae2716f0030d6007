"""The two Spaces as strangers meet them, on this machine: floods, clients that leave, bodies that are too large, and
what five hundred visits leave behind. No browser is needed."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from pages import ROOT, clean_environment, served
from tiny import chat_grm, chatml_tokenizer


pytest.importorskip("gradio", reason="needs the extra `demo`")
pytestmark = pytest.mark.slow

PROMPT, A, B = "What is 2 + 2?", "It is 4.", "Maybe 5, or not?"
LONG = "x" * 2000  # tokens of the tiny model, two of them fit its 4,096 with a prompt


JSON = {"content-type": "application/json"}
# Of the API: how many arguments must be given, and what the others are.
DEFAULTS = {"compare": (3, ("", 1.0, None)), "rank": (2, ("", 1.0, None)), "measure": (2, ("0.5", 1.0, None, None))}


class Site:
    """A page and its API, without gradio's client."""

    def __init__(self, url, process):
        self.url, self.pid = url, process.pid
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        config = self.http.get("/config").json()
        ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        clicks = {tuple(target): d["id"] for d in config["dependencies"] if d["backend_fn"] for target in d["targets"]}
        names = [name for name in ("compare", "rank", "batch", "swap") if f"{name}-button" in ids]
        self.functions = {name: clicks[ids[f"{name}-button"], "click"] for name in names}

    def resident(self):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[1]) / 1024

    def busy(self):
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def post(self, name, *data):
        """Posts a call of the API and leaves: the id of its event. What is not given has its default."""
        least, rest = DEFAULTS.get(name, (0, ()))
        data += rest[len(data) - least :]
        body = json.dumps({"data": data}).encode()  # with half characters, where there are some
        answer = self.http.post(f"/gradio_api/call/{name}", content=body, headers=JSON)
        assert answer.status_code == 200, answer.text
        return answer.json()["event_id"]

    def call(self, name, *data):
        """A call of the API: whether it went well, and what came."""
        answer = self.http.get(f"/gradio_api/call/{name}/{self.post(name, *data)}")
        event, said = re.search(r"event: (complete|error)\ndata: (.*)", answer.text).groups()
        return event == "complete", json.loads(said)

    def join(self, session, function, *data):
        """Presses a button of the page."""
        body = {"data": data, "fn_index": self.functions[function], "session_hash": session}
        return self.http.post("/gradio_api/queue/join", json=body)

    def press(self, session, function, *data):
        """What a button's function gives the page."""
        joined = self.join(session, function, *data)
        assert joined.status_code == 200, joined.text
        for line in self.http.get("/gradio_api/queue/data", params={"session_hash": session}).text.splitlines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                assert message["success"], message
                return message["output"]["data"]
        raise AssertionError("no answer")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers")


@pytest.fixture(scope="module")
def pairwise(root):
    tokenizer = chatml_tokenizer()
    chat_grm(tokenizer, max_position_embeddings=4096).save_pretrained(root / "tiny")
    tokenizer.save_pretrained(root / "tiny")
    env = clean_environment(GRM_SPACE_MODELS=str(root / "tiny"), HF_HUB_OFFLINE="1", HF_HOME=str(root / "home"))
    with served(ROOT / "spaces/pairwise_comparison", root / "pairwise.log", env) as (url, process):
        yield Site(url, process)
    assert "Traceback" not in (root / "pairwise.log").read_text()


@pytest.fixture(scope="module")
def accuracy(root):
    with served(ROOT / "spaces/reward_accuracy", root / "accuracy.log", clean_environment()) as (url, process):
        yield Site(url, process)
    assert "Traceback" not in (root / "accuracy.log").read_text()


def table(rows, text):
    return "prompt,chosen,rejected\n" + f"{PROMPT},{text} yes,{text} no\n" * rows


@pytest.mark.parametrize("page", ["pairwise", "accuracy"])
def test_bodies_are_refused_before_they_are_parsed(page, request):
    site = request.getfixturevalue(page)
    before = site.resident()
    name = {"pairwise": "compare", "accuracy": "measure"}[page]
    numbers = b'{"data": [[' + b"1.5," * 3_000_000 + b"1], [1]]}"  # 12 MB, and a gigabyte as Python objects
    for path in (f"call/{name}", f"call/v2/{name}", "queue/join", "upload", "component_server", "cancel", "nothing"):
        answer = site.http.post(f"/gradio_api/{path}", content=numbers, headers=JSON)
        assert answer.status_code == 413 and "this page takes no more at once" in answer.json()["detail"]

    def drip():  # without a length beforehand
        for _ in range(40):
            yield b"1.5," * 100_000

    assert site.http.post(f"/gradio_api/call/{name}", content=drip()).status_code == 413
    for body in (
        b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"data": ["' + b'\\"' * 500_000,
    ):
        answer = site.http.post(f"/gradio_api/call/{name}", content=body, headers=JSON)
        assert answer.status_code in (400, 422), answer.text
    assert site.resident() < before + 60
    assert site.http.get("/").status_code == 200


def test_a_flood_of_tables_by_clients_that_leave(pairwise):
    """33 tables: a few wait, the others are told so, nobody else waits for them, and nobody computes them."""
    text, rows = "y" * 200, 200
    busy = pairwise.busy()
    for i in range(33):
        assert pairwise.join(f"left{i}", "batch", "tiny", table(rows, text), None).status_code == 200
    started = time.perf_counter()
    assert pairwise.http.get("/").status_code == 200
    assert pairwise.call("models")[1] == [[{"name": "tiny", "revision": None, "note": ""}]]
    fine, (result,) = pairwise.call("compare", PROMPT, A, B)
    assert fine and set(result["rewards"]) == {"A", "B"}
    assert time.perf_counter() - started < 8
    # One that a client waits for, which then leaves in the middle of it.
    joined = pairwise.join("stays", "batch", "tiny", table(rows, text), None)
    assert joined.status_code == 200
    with pairwise.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "stays"}) as stream:
        for line in stream.iter_lines():
            if "progress" in line or "completed" in line:
                break
    time.sleep(8)
    then = pairwise.busy()
    time.sleep(2)
    assert pairwise.busy() - then < 0.5  # all is quiet
    assert then - busy < 20  # 34 of these tables take more than a minute
    report, _ = pairwise.press("later", "batch", "tiny", table(2, "z"), None)
    assert "on 2 pairs" in report  # there is room again


def test_tables_have_few_places_and_comparisons_come_between(pairwise):
    with ThreadPoolExecutor(8) as pool:
        tables = [
            pool.submit(pairwise.press, f"many{i}", "batch", "tiny", table(200, "y" * 200), None) for i in range(6)
        ]
        time.sleep(1)
        started = time.perf_counter()
        assert pairwise.call("compare", PROMPT, A, B)[0]
        waited = time.perf_counter() - started
        reports = [future.result()[0] for future in tables]
    assert sum("4 tables wait already, and this page takes no more" in report for report in reports) == 2
    assert sum("on 200 pairs" in report for report in reports) == 4
    assert waited < 5


def test_sentences_for_what_no_page_would_send(pairwise):
    for changed, words in (
        ({0: 7}, "`prompt` is a number; text is required"),
        ({1: None}, "`answer_a` is null"),
        ({2: "\ud83d"}, "`answer_b` has half a character (U+D83D)"),
        ({4: "1"}, "`temperature` is “1”; a number from 0.1 to 10 is required"),
        ({4: 1e-320}, "`temperature` is 1e-320"),
        ({3: "a/b--c"}, "“a/b--c” is no Hub id"),
        ({0: "", 5: [{"role": "robot", "content": "x"}]}, "`messages`, turn 1: its role is “robot”"),
        ({0: "", 5: [[[[["x"]]]]]}, "`messages`, turn 1: a message is"),
    ):
        given = {0: PROMPT, 1: A, 2: B, 3: "", 4: 1.0, 5: None, **changed}
        fine, said = pairwise.call("compare", *given.values())
        assert not fine and words in said["error"], said
    fine, said = pairwise.call("rank", PROMPT, "ab")
    assert not fine and "`answers` is text; a list of 2 to 32 texts is required" in said["error"]


@pytest.mark.parametrize("page", ["pairwise", "accuracy"])
def test_a_call_with_too_few_or_too_many_values(page, request):
    site = request.getfixturevalue(page)
    name, named = {
        "pairwise": ("compare", "6 values (prompt, answer_a, answer_b, model, temperature, messages)"),
        "accuracy": ("measure", "6 values (chosen, rejected, ties, temperature, prompts, subsets)"),
    }[page]
    for count in (0, 2, 7):
        posted = site.http.post(f"/gradio_api/call/{name}", json={"data": ["x"] * count})
        said = site.http.get(f"/gradio_api/call/{name}/{posted.json()['event_id']}").text
        assert f"`/{name}` takes {named}, and {count} came." in said


def patiently(request, *data):
    """A request again where the page says that too many wait: visitors before may have left work that still runs."""
    for _ in range(600):
        answer = request(*data)
        if "wait already" not in str(answer):
            return answer
        time.sleep(0.1)
    raise AssertionError(answer)


def test_five_hundred_visits_leave_nothing(pairwise, tmp_path):
    site = pairwise
    site.call("compare", PROMPT, LONG, LONG)
    before, sizes = site.resident(), []
    for i in range(500):
        session, kind = f"visit{i}", i % 10
        if kind == 0:
            assert site.http.get("/").status_code == site.http.get("/config").status_code == 200
        elif kind == 1:
            assert patiently(site.call, "compare", f"{PROMPT} {i}", A, B)[0]
        elif kind == 2:
            assert not site.call("compare", PROMPT, "", B)[0]
        elif kind == 3:
            assert patiently(site.call, "rank", PROMPT, [A, B, f"{i}"])[0]
        elif kind == 4:
            data = ("tiny", "prompt", PROMPT, f"{A} {i}", B, 1.0)
            verdict, compared, *_ = patiently(site.press, session, "compare", *data)
            assert "swap" in patiently(site.press, session, "swap", compared)[0].lower()
        elif kind == 5:
            assert "on 3 pairs" in patiently(site.press, session, "batch", "tiny", table(3, str(i)), None)[0]
        elif kind == 6:  # posted, and gone
            site.join(session, "compare", "tiny", "prompt", PROMPT, LONG[:1000], f"{i}", 1.0)
            site.post("rank", PROMPT, [A] * 32)
        elif kind == 7:  # refused, and large
            data = ("tiny", "prompt", PROMPT, "x" * 900_000, B, 1.0)
            assert "20,000" in patiently(site.press, session, "compare", *data)[0]
        elif kind == 8:
            assert "more than 200" in patiently(site.press, session, "batch", "tiny", table(300, LONG), None)[0]
        elif i % 50 == 9:  # as long as a text may be
            page = patiently(site.press, session, "compare", "tiny", "prompt", f"{i}", LONG * 2, LONG * 2 + "y", 1.0)
            sizes.append(len(page[3]))
        else:
            files = {"files": ("pairs.csv", table(50, LONG).encode(), "text/csv")}
            assert site.http.post("/gradio_api/upload", files=files).status_code == 200
    after = site.resident()
    assert len(sizes) == 10 and min(sizes) > 500_000
    assert after < before + 150, (before, after)


def test_refused_lists_of_the_metric_leave_nothing(accuracy):
    site = accuracy
    assert site.call("measure", [1.0, 2.0], [0.0, 3.0])[1][0]["accuracy"] == 0.5
    before = site.resident()
    for i in range(15):
        body = {"data": [[1.5] * 600_000, [1.5] * 600_000, "0.5", 1.0, None, None]}
        answer = site.http.post("/gradio_api/call/measure", json=body)
        assert answer.status_code == 413 and "more than 201,000 values" in answer.text
        assert "more than 50,000 pairs" in site.call("measure", [1.5] * 90_000, [1.5] * 90_000)[1]["error"]
        fine, said = site.call("measure", [1.5] * 40_000, [1.5 + i] * 40_001)
        assert not fine and "without a partner" in said["error"]
    assert site.resident() < before + 150
    for given, words in (
        (([1.0, None], [1.0, 2.0]), r"`chosen[1]` is null; a finite number is required"),
        (([1.0, "2"], [1.0, 2.0]), r"`chosen[1]` is text"),
        (("ab", [1.0, 2.0]), "`chosen` is text; a list of numbers is required"),
        (([1.0], [2.0], 0.5), "`ties` is a number; one of 0.5, 0, 1, drop is required, as text"),
        (([1.0], [2.0], "0.5", "1"), "`temperature` is text; a number from 0.001 to 1000"),
        (([1.0], [2.0], "0.5", 1e-320), "`temperature` is 1e-320"),
        (([1.0], [2.0], "0.5", 1.0, ["\ud800"]), "`prompts[0]` has half a character"),
        (([1.0], [2.0], "0.5", 1.0, "a"), "`prompts` is text; a list of texts is required"),
        (([1.0], [2.0], "0.5", 1.0, None, [3]), "`subsets[0]` is a number; text is required"),
    ):
        fine, said = site.call("measure", *given)
        assert not fine and words in said["error"], said


def test_more_bodies_at_one_time_than_fit(root):
    """The middleware alone: bodies that are being read together stay within a bound, slow ones are given up."""
    import asyncio
    import importlib.util

    spec = importlib.util.spec_from_file_location("guard_alone", ROOT / "spaces/reward_accuracy/guard.py")
    guard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(guard)
    guard.MAX_TOGETHER, guard.MAX_SECONDS, guard.MAX_OPEN, guard.MAX_UPLOADS = 250, 1, 5, 1000
    (root / "uploads").mkdir()
    reached = []

    async def app(scope, receive, send):
        reached.append((await receive())["body"])

    this = guard.Guard(app, most=100, values=5, uploads=root / "uploads")

    async def visit(*parts, path="/x", slow=0.0, method="POST"):
        async def receive():
            await asyncio.sleep(slow)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message):
            said.append(message)

        left, said = list(parts), []
        await this({"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}, receive, send)
        return said[0]["status"] if said else 200

    async def all_of(*visits):
        return await asyncio.gather(*visits)

    assert asyncio.run(visit(b"[", b"1]")) == 200 and reached == [b"[1]"]
    assert asyncio.run(visit(b"x" * 60, b"x" * 60)) == 413
    assert asyncio.run(visit(b'["1,2,3,4,5,6", 1]')) == 200 and asyncio.run(visit(b"[1,2,3,4,5,6]")) == 413
    assert asyncio.run(visit(b"1", b"1", b"1", slow=0.6)) == 408
    together = [visit(b"1" * 90, b"1", slow=0.2) for _ in range(4)]
    assert sorted(asyncio.run(all_of(*together))) == [200, 200, 503, 503]
    assert this.together == 0 and this.open == 0
    open_ones = [visit(b"1", slow=0.2) for _ in range(7)]
    assert sorted(asyncio.run(all_of(*open_ones))) == [200] * 5 + [503] * 2
    (root / "uploads/a").write_bytes(b"x")
    assert asyncio.run(visit(b"1", path="/gradio_api/upload")) == 507
    assert asyncio.run(visit(b"[" * 40 + b"]" * 40)) == 400
    scope = SimpleNamespace(path="/gradio_api/queue/data", query=b"session_hash=me")
    asked = {"method": "GET", "path": scope.path, "query_string": scope.query}
    assert guard.session_of(asked) == "me" and not guard.listening("me")
    assert guard.session_of({**asked, "path": "/gradio_api/call/compare/abc"}) == "abc"
    assert guard.session_of({**asked, "path": "/gradio_api/call/v2/compare/abc"}) == "abc"
    assert guard.session_of({**asked, "path": "/config"}) is None
