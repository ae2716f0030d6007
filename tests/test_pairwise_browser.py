"""The Space `pairwise_comparison` end to end: model and Space pushed to a local Hub by the commands of docs/space.md,
the Space downloaded into an empty folder and run there without grm_hf, and used in headless Chromium and by gradio's
client.

No request of a page may leave the machine, and none may log an error. With GRM_SCREENSHOTS=FOLDER the pictures of
docs/space.md are written there, of the model in GRM_SCREENSHOT_MODEL.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import torch
from hub import File, Hub, Repo, User
from tiny import chatml_tokenizer, tiny_lm
from transformers import AutoModelForSequenceClassification

from grm_hf import GRMForSequenceClassification, GRMScorer


pytest.importorskip("gradio", reason="needs the extra `demo`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra `dev`)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the path"),
]

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "spaces" / "pairwise_comparison"
DOCS = (ROOT / "docs" / "space.md").read_text(encoding="utf-8")
SCREENSHOTS = os.environ.get("GRM_SCREENSHOTS")
TOKEN = "hf_" + "a" * 34
PROMPT, A, B = (
    "what does the truck run on?",
    "happy to help. the truck runs on wind.",
    "what a silly question. the truck runs on coal.",
)
EVIL = "<img src=x onerror='window.hacked=1'>"
TIMEOUT = 30_000


def commands(word):
    """Those of the documentation that begin with a word, as lists of arguments."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL))
    found = [shlex.split(line) for line in blocks.splitlines() if line.startswith(f"{word} ")]
    assert found
    return found


def put(hub, repo_id, folder):
    """A repository as if its owner had pushed it."""
    repo = hub.repos["models", repo_id] = Repo("models", repo_id)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repo.commit("main", {name: File(hub.add_blob(data), len(data)) for name, data in files.items()}, "files")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The running Space: `url`, the `model`'s folder, the `hub`, the pinned `revision`."""
    root = tmp_path_factory.mktemp("site")
    tokenizer = chatml_tokenizer()
    torch.manual_seed(0)
    model = root / "runs/demo/model"
    if os.environ.get("GRM_SCREENSHOT_MODEL"):
        shutil.copytree(os.environ["GRM_SCREENSHOT_MODEL"], model)
    else:
        lm = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
        GRMForSequenceClassification.from_base(lm, head_hidden_size=8).save_pretrained(model)
        tokenizer.save_pretrained(model)

    hub = Hub()
    hub.users[TOKEN] = User("ann")
    blocked = root / "blocked"  # a grm_hf that cannot be imported
    blocked.mkdir()
    (blocked / "grm_hf.py").write_text("raise ImportError('the Space must not need grm_hf')\n")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GRM_", "GRADIO_"))}
    plain |= {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
    }

    def run(command):
        command = [part.replace("NAMESPACE", "ann").replace("NAME", "demo") for part in command]
        command[0] = str(Path(sys.executable).with_name(command[0]))
        env = {**plain, "HF_HOME": str(root / "ann"), "HF_TOKEN": TOKEN}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    (push,) = commands("grm")
    revision = re.search("revision ([0-9a-f]{40})", run(push))[1]
    shutil.copytree(SPACE, root / "spaces/pairwise_comparison", ignore=shutil.ignore_patterns("__pycache__"))
    entries = [{"id": "ann/demo", "revision": revision, "name": "demo"}, {"id": "ann/demo", "revision": "main"}]
    (root / "spaces/pairwise_comparison/models.json").write_text(json.dumps(entries))
    for command in commands("hf"):
        run(command)
    empty = root / "empty"
    run(["hf", "download", "ann/pairwise_comparison", "--repo-type", "space", "--local-dir", str(empty)])
    assert {"app.py", "README.md", "requirements.txt", "models.json"} <= {path.name for path in empty.iterdir()}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**plain, "HF_HOME": str(root / "visitor"), "PYTHONPATH": str(blocked), "GRADIO_ANALYTICS_ENABLED": "False"}
    env |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(root / "temp")}
    with open(root / "log", "wb") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=empty, env=env, stdout=log, stderr=log)
    try:
        for _ in range(960):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (root / "log").read_text()
            time.sleep(0.25)
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", model=model, hub=hub, revision=revision, log=root / "log", root=root
        )
    finally:
        server.terminate()
        server.wait(timeout=20)
        hub.close()


@pytest.fixture(scope="module")
def scorer(site):
    return GRMScorer(str(site.model))


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield browser
        browser.close()


@pytest.fixture
def visit(site, chromium):
    """Opens a page of the Space. Nothing may leave the machine, and the browser's console stays free of errors."""
    outside, errors, contexts = [], [], []

    def guard(route):
        address = route.request.url
        if address.startswith((site.url, "data:", "blob:")):
            route.continue_()
        else:
            outside.append(address)
            route.abort()

    def visit(query="", width=1100, **options):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.route("**/*", guard)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{site.url}/?{query}")
        page.locator("#compare-button").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert outside == [] and errors == []


def expect(locator, words):
    playwright.expect(locator).to_contain_text(words, timeout=TIMEOUT)


def box(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first


def compare(page):
    page.locator("#compare-button").click()
    page.locator("#swap h3").wait_for()


def picture(page, name):
    """A screenshot of the whole page, in few colours: they are kept in the repository."""
    if not SCREENSHOTS:
        return
    from PIL import Image

    path = Path(SCREENSHOTS) / f"space_{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.mouse.move(0, 0)
    page.evaluate("document.querySelector('#notices').style.display = 'none'")
    page.wait_for_timeout(500)  # transitions
    page.screenshot(path=path, full_page=True)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def signed(value):
    return f"{value:+.3f}".replace("-", "−")


def query(**fields):
    return urlencode({"model": "demo", "kind": "prompt", "prompt": PROMPT, "a": A, "b": B, **fields})


# --------------------------------------------------------------------------------------------------------------- tests


def test_the_browser_shows_the_librarys_number_and_the_link_restores_it(site, scorer, visit):
    a, b = scorer.score([{"prompt": PROMPT, "response": answer} for answer in (A, B)])
    better = "A" if a > b else "B"
    page = visit("__theme=light")
    expect(page.locator("#notices .problem"), "Entry 2 of “models.json” was left out")
    assert box(page, "prompt").input_value() == PROMPT
    compare(page)
    expect(page.locator("#comparison .verdict"), f"answer {better}.")
    assert page.locator("#comparison .value").all_inner_texts() == [signed(a), signed(b)]
    expect(page.locator("#comparison"), f"demo at {site.revision[:12]}")
    expect(page.locator("#comparison"), f"{100 * scorer.probability(a, b):.1f} %")
    expect(page.locator("#swap"), "A reward depends neither on the order nor on the neighbour")
    picture(page, "compare_light")

    page.locator("#comparison summary").first.click()  # the text as the model got it
    ids = scorer.encoder.encode_chat({"prompt": [{"role": "user", "content": PROMPT}], "response": A}).ids
    seen = page.locator("#comparison .seen").first.evaluate("(e) => e.textContent")
    assert seen.split() == scorer.tokenizer.decode(ids, clean_up_tokenization_spaces=False).split()
    heat = page.locator("#comparison .heat").first.locator("span[title]")
    assert heat.last.get_attribute("title").startswith(f"reward {signed(a)}")

    # Another temperature: at once, in the address as well.
    slider = page.locator("input[type=range]").first
    size = slider.bounding_box()
    slider.click(position={"x": 0.4 * size["width"], "y": size["height"] / 2})
    page.wait_for_function("!location.search.includes('t=1&') && location.search.includes('t=')")
    t = float(parse_qs(urlsplit(page.evaluate("location.href")).query)["t"][0])
    assert 3 < t < 5
    expect(page.locator("#comparison"), f"over the temperature, {t:g}")

    address = page.evaluate("location.href")
    page.wait_for_function("document.querySelector('#link textarea').value + '&__theme=light' === location.href")
    other = visit(urlsplit(address).query.replace("__theme=light", "__theme=dark"))
    other.locator("#swap h3").wait_for()
    assert other.locator("#comparison .value").all_inner_texts() == [signed(a), signed(b)]
    expect(other.locator("#comparison"), f"over the temperature, {t:g}")
    assert other.locator("input[type=range]").first.input_value() == f"{t:g}"
    picture(other, "compare_dark")


def test_links_carry_any_text_and_nothing_of_it_is_run(visit):
    chat = f"system: {EVIL}\nuser: ü & = # % +\n\nassistant: 日本 🙂\nuser: {EVIL}"
    page = visit(
        query(kind="conversation", prompt=chat, a=f"{EVIL} \"'", b="</textarea><script>hacked = 1</script>", t=2)
    )
    page.locator("#swap h3").wait_for()
    assert box(page, "prompt").input_value() == chat and box(page, "answer-a").input_value() == f"{EVIL} \"'"
    fields = parse_qs(urlsplit(page.evaluate("location.href")).query)
    assert fields["prompt"] == [chat] and fields["t"] == ["2"] and fields["kind"] == ["conversation"]
    assert page.locator("#comparison img").count() == page.locator("#comparison script").count() == 0
    # What cannot be compared has no link, and the old one leaves the address.
    box(page, "answer-b").fill(" ")
    page.locator("#compare-button").click()
    expect(page.locator("#comparison"), "Answer B is empty")
    page.wait_for_function("location.search === ''")
    assert page.evaluate("window.hacked") is None
    page = visit(query(t="warm"))
    expect(page.locator("#comparison .problem"), "The link says temperature “warm”")


def test_every_mistake_gets_a_sentence(visit):
    page = visit()
    shown = page.locator("#comparison .problem")

    def after(name, text, words):
        box(page, name).fill(text)
        page.locator("#compare-button").click()
        expect(shown, words)

    after("prompt", " ", "The prompt is empty")
    box(page, "prompt").fill("Hello")
    after("answer-a", "", "Answer A is empty")
    after("answer-a", "x" * 20_001, "Answer A has 20,001 characters")
    box(page, "answer-a").fill("fine")
    page.get_by_label("conversation", exact=True).first.check()
    after("prompt", "Hello", "must begin with a role")
    after("prompt", "user: a\nassistant: b", "two turns of the assistant")
    after("prompt", "[{}]", "turn 1: a message is")
    page.get_by_label("one prompt").first.check()
    for typed, words in ((f"no id {EVIL}", "is no Hub id"), ("ann/missing", "no public model “ann/missing”")):
        box(page, "model").fill(typed)
        box(page, "model").press("Enter")
        page.locator("#compare-button").click()
        expect(shown, words)
    box(page, "model").fill("demo")
    box(page, "model").press("Enter")
    page.get_by_role("tab", name="Best of n").click()
    box(page, "answers").fill("only one")
    page.locator("#rank-button").click()
    expect(page.locator("#ranking .problem"), "There are 1 answers; 2 to 32 are required")
    page.get_by_role("tab", name="Batch").click()
    for text, words in (
        ("", "nothing to score"),
        (f"a,{EVIL}", "The first line must name the columns"),
        ("prompt,chosen,rejected\na,b", "Line 2 has 2 cells"),
    ):
        box(page, "pairs").fill(text)
        page.locator("#batch-button").click()
        expect(page.locator("#report .problem"), words)
    assert not page.locator("#download").is_visible()
    assert page.evaluate("window.hacked") is None


def test_ranking_and_table(scorer, visit, tmp_path):
    page = visit("__theme=light")
    page.get_by_role("tab", name="Best of n").click()
    answers = box(page, "answers").input_value().splitlines()
    page.locator("#rank-button").click()
    expected = scorer.best_of_n(PROMPT, answers)
    expect(page.locator("#ranking .verdict"), f"Answer {expected.order[0] + 1} is the best of {len(answers)}")
    values = page.locator("#ranking td.number b").all_inner_texts()
    assert values == [signed(expected.scores[i]) for i in expected.order]
    picture(page, "best_of_n")

    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-button").click()
    expect(page.locator("#report .verdict"), "on 4 pairs")
    picture(page, "batch")
    rows = [{"prompt": PROMPT, "chosen": A, "rejected": B}, {"prompt": PROMPT, "chosen": EVIL, "rejected": "no"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.locator("#upload input[type=file]").set_input_files(file)
    playwright.expect(page.locator("#upload")).to_contain_text("pairs", timeout=TIMEOUT)
    page.locator("#batch-button").click()
    expect(page.locator("#report .verdict"), "on 2 pairs")
    with page.expect_download() as found:
        page.locator("#download").click()
    saved = [json.loads(line) for line in Path(found.value.path()).read_text().splitlines()]
    scores = scorer.score(
        [{"prompt": row["prompt"], "response": row[s]} for row in rows for s in ("chosen", "rejected")]
    )
    assert [row[f"{s}_reward"] for row in saved for s in ("chosen", "rejected")] == pytest.approx(scores, rel=1e-4)
    assert page.evaluate("window.hacked") is None and page.locator("#report img").count() == 0
    page.get_by_role("tab", name="About").click()
    page.get_by_text("ann/demo").wait_for()


# The smallest contrast of text with what lies behind it (WCAG 2), over the elements that a selector finds.
CONTRAST = """(selector) => {
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const own = (e) => parse(getComputedStyle(e).backgroundColor);
  const behind = (e) => e ? over(own(e), behind(e.parentElement)) : [255, 255, 255];
  return Math.min(...[...document.querySelectorAll(selector)].map((e) => {
    const below = behind(e), style = getComputedStyle(e), [r, g, b] = parse(style.color);
    const [x, y] = [light(over([r, g, b, Number(style.opacity)], below)), light(below)];
    return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  }));
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_narrow_and_legible_in_both_themes(visit, theme):
    page = visit(query(__theme=theme), width=390, device_scale_factor=1.5 if SCREENSHOTS else 1)
    page.locator("#swap h3").wait_for()
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    if theme == "light":
        picture(page, "compare_narrow")
    upper, lower = (page.locator(f"#answer-{name}").bounding_box() for name in "ab")
    assert upper["y"] + upper["height"] <= lower["y"] and upper["width"] > 250
    for part in page.locator("#comparison .rm > *, #swap .rm > *").all():
        found = part.bounding_box()
        assert found["x"] >= 0 and found["x"] + found["width"] <= 390, part.inner_html()[:200]
    for selector in (".rm .verdict", ".rm .verdict span", ".rm .quiet", ".rm .heat span", ".rm .bars .name span",
                     ".rm .share div", ".rm .plot .end", ".rm .plot .y", ".rm td", ".rm summary"):  # fmt: skip
        assert page.evaluate(CONTRAST, f"#comparison {selector}") >= 4.5, selector
    for tab, button, result in (("Best of n", "rank", "ranking"), ("Batch", "batch", "report"), ("About", None, None)):
        page.get_by_role("tab", name=tab).click()
        if button:
            page.locator(f"#{button}-button").click()
            page.locator(f"#{result} .verdict").wait_for()
            assert page.evaluate(CONTRAST, f"#{result} .quiet, #{result} td, #{result} .verdict") >= 4.5
        assert page.evaluate("document.documentElement.scrollWidth") == 390, tab


def test_the_api_and_ids_that_are_not_on_the_list(site, scorer, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(site.url, verbose=False, download_files=str(tmp_path))
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/compare", "/rank", "/models"}
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names = {"Client": lambda _: client}
    said = []
    exec(code.replace("from gradio_client import Client\n", ""), {**names, "print": lambda *args: said.append(args)})
    assert said[0][2]["A"] == pytest.approx(
        scorer.score([{"prompt": PROMPT, "response": "the truck runs on wind."}])[0], rel=1e-5
    )
    assert said[1][0] in ("wind.", "coal.") and said[1][1][0]["revision"] == site.revision
    messages = [*({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("user", PROMPT)))]
    result = client.predict("", A, B, "demo", 2.0, messages, api_name="/compare")
    expected = scorer.score([{"prompt": messages, "response": answer} for answer in (A, B)])
    assert list(result["rewards"].values()) == pytest.approx(expected, rel=1e-5)
    assert result["probability_a"] == pytest.approx(
        1 / (1 + torch.tensor((expected[1] - expected[0]) / 2 / scorer.model.config.reward_temperature).exp().item())
    )
    with pytest.raises(AppError, match="Answer B is empty"):
        client.predict(PROMPT, A, " ", api_name="/compare")

    tokenizer = chatml_tokenizer()
    lm = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    lm.config.pad_token_id = tokenizer.pad_token_id

    def classifier(name, labels):
        lm.config.num_labels = labels
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_config(lm.config)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        put(site.hub, f"eve/{name}", tmp_path / name)
        return model.eval()

    model = classifier("stock", 1)
    result = client.predict(PROMPT, A, B, "eve/stock", api_name="/compare")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": A}],
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        assert result["rewards"]["A"] == pytest.approx(model(**text).logits.item(), rel=1e-4)
    assert result["heads"] is None and result["revision"] == site.hub.repos["models", "eve/stock"].branches["main"]

    classifier("labels", 2)
    lm.save_pretrained(tmp_path / "language")
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "stock/config.json", tmp_path / "pickled")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    shutil.copytree(tmp_path / "stock", tmp_path / "headless")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "stock/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"},
        tmp_path / "headless/model.safetensors",
        {"format": "pt"},
    )
    evil = tmp_path / "evil"
    shutil.copytree(site.model, evil)
    (evil / "configuration_grm.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in ("language", "pickled", "adapter", "headless", "evil"):
        put(site.hub, f"eve/{name}", tmp_path / name)
    put(site.hub, "eve/closed", tmp_path / "stock")
    site.hub.repos["models", "eve/closed"].gated = "auto"
    for name, words in (
        ("eve/labels", "with 2 labels; required is a ...ForSequenceClassification with one"),
        ("eve/language", "found LlamaForCausalLM"),
        ("eve/pickled", "no model with safetensors weights"),
        ("eve/adapter", "is an adapter"),
        ("eve/headless", "lacks 1 weights"),
        ("eve/evil", "This page runs the code of models on its list only"),
        ("ann/demo", "This page runs the code of models on its list only"),  # its name on the list is "demo"
        ("eve/stock@nowhere", "has no revision “nowhere”"),
        ("eve/closed", "“eve/closed” is gated"),
        ("eve/nothing", "no public model “eve/nothing”"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(PROMPT, A, B, name, api_name="/compare")
    assert not (tmp_path / "ran").exists()


def test_the_log_holds_no_traceback_and_no_token(site):
    """Last: of everything above."""
    text = site.log.read_text()
    assert "Running on local URL" in text and TOKEN not in text
    assert "Traceback" not in text
