"""The Space `pairwise_comparison` end to end: model and Space pushed to a local Hub by the commands of docs/space.md,
the Space downloaded into an empty folder and run there without grm_hf, and used in headless Chromium and by gradio's
client. The page of the metric is looked at, too.

No request of a page may leave the machine, and none may log an error. With GRM_SCREENSHOTS=FOLDER the pictures of
docs/space.md are written there, of the model in GRM_SCREENSHOT_MODEL.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import torch
from hub import Hub, User
from pages import CHROMIUM, browser, clean_environment, put, served, violations
from tiny import chat_grm, chatml_tokenizer, tiny_lm
from transformers import AutoModelForSequenceClassification

from grm_hf import GRMScorer


pytest.importorskip("gradio", reason="needs the extra `demo`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra `dev`)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the path"),
]

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "spaces" / "pairwise_comparison"
DOCS = (ROOT / "docs" / "space.md").read_text(encoding="utf-8")
SCREENSHOTS = os.environ.get("GRM_SCREENSHOTS")
NAME = Path(os.environ.get("GRM_SCREENSHOT_MODEL") or "demo").name  # of the model, in the list
TOKEN = "hf_" + "a" * 34
PROMPT, A, B = "What is 17 times 3?", "51.", "It is 41."
EVIL = "<img src=x onerror='window.hacked=1'>"
TIMEOUT = 30_000


def commands(word):
    """Those of the documentation that begin with a word, as lists of arguments."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL))
    found = [shlex.split(line) for line in blocks.splitlines() if line.startswith(f"{word} ")]
    assert found
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The running Space: `url`, the `model`'s folder, the `hub`, the pinned `revision`."""
    root = tmp_path_factory.mktemp("site")
    tokenizer = chatml_tokenizer()
    model = root / "runs/demo/model"
    if os.environ.get("GRM_SCREENSHOT_MODEL"):
        shutil.copytree(os.environ["GRM_SCREENSHOT_MODEL"], model)
    else:
        chat_grm(tokenizer).save_pretrained(model)
        tokenizer.save_pretrained(model)

    hub = Hub()
    hub.users[TOKEN] = User("ann")
    blocked = root / "blocked"  # a grm_hf that cannot be imported
    blocked.mkdir()
    (blocked / "grm_hf.py").write_text("raise ImportError('the Space must not need grm_hf')\n")
    plain = clean_environment(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")

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
    note = json.loads((SPACE / "models.json").read_text())[0]["note"]
    entries = [
        {"id": "ann/demo", "revision": revision, "name": NAME, "note": note},
        {"id": "ann/demo", "revision": "main"},
    ]
    (root / "spaces/pairwise_comparison/models.json").write_text(json.dumps(entries))
    for command in commands("hf"):
        run(command)
    empty = root / "empty"
    run(["hf", "download", "ann/pairwise_comparison", "--repo-type", "space", "--local-dir", str(empty)])
    assert {"app.py", "README.md", "requirements.txt", "models.json"} <= {path.name for path in empty.iterdir()}

    env = {
        **plain,
        "HF_HOME": str(root / "visitor"),
        "PYTHONPATH": str(blocked),
    }
    try:
        with served(empty, root / "log", env) as (url, _):
            yield SimpleNamespace(url=url, model=model, hub=hub, revision=revision, log=root / "log", root=root)
    finally:
        hub.close()


@pytest.fixture(scope="module")
def scorer(site):
    return GRMScorer(str(site.model), layout="padded", deterministic=True)  # the kernels of the Space, in bfloat16 too


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


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

    def visit(query="", width=1100, height=900, **options):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, **options))
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
    arrived(page)


def arrived(page, place="verdict"):
    """The page has gone to a result."""
    page.wait_for_function(f"document.querySelector('#{place}')?.contains(document.activeElement)")
    return page.locator(f"#{place}")


def go_to(page, tab):
    """As a visitor: what does not fit into a narrow page, gradio puts behind a button."""
    named = page.get_by_role("tab", name=tab)
    more = page.get_by_role("button", name="More tabs")
    named.or_(more).filter(visible=True).first.wait_for()
    if not named.is_visible():
        more.click()
        named = page.get_by_role("button", name=tab, exact=True)
    named.click()


def shown(page):
    """The rewards in the verdict."""
    return page.locator("#verdict .value").all_inner_texts()


def picture(page, name, full_page=True):
    """A screenshot, in few colours: they are kept in the repository."""
    if not SCREENSHOTS:
        return
    from PIL import Image

    path = Path(SCREENSHOTS) / f"space_{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)  # transitions
    page.screenshot(path=path, full_page=full_page)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def signed(value):
    return f"{value:+.3f}".replace("-", "−")


def query(**fields):
    return urlencode({"model": NAME, "kind": "prompt", "prompt": PROMPT, "a": A, "b": B, **fields})


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080)])
def test_a_result_at_first_sight(site, visit, size):
    posts = []
    page = visit("__theme=light", *size)
    page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    for selector in ("#verdict h2", "#verdict .quote", "#verdict .share", "#verdict .bars", ".example"):
        place = page.locator(selector).last.bounding_box()
        assert place["y"] + place["height"] <= size[1], selector
    example = [box(page, name).input_value() for name in ("prompt", "answer-a", "answer-b")]
    assert "17 times 3" in example[0] and f"“{example[1][:40]}" in page.locator("#verdict").inner_text()
    expect(page.locator("#verdict"), "A reward is one number for how good the model finds an answer")
    expect(page.locator("#verdict"), f"{NAME}: a generalizable reward model of 135 million parameters")
    assert box(page, "model").input_value() == NAME
    page.wait_for_function("document.querySelector('#link input').value.startsWith('http')")
    page.wait_for_timeout(500)
    assert posts == [] and page.evaluate("location.search") == "?__theme=light"  # nobody was waited for
    if size == (1280, 720):
        picture(page, "first_sight", full_page=False)


def test_the_browser_shows_the_librarys_number_and_the_link_restores_it(site, scorer, visit):
    page = visit("__theme=light")
    for name, text in (("prompt", PROMPT), ("answer-a", A), ("answer-b", B)):
        box(page, name).fill(text)
    compare(page)
    a, b = scorer.score([{"prompt": PROMPT, "response": answer} for answer in (A, B)])
    better = "A" if a > b else "B"
    expect(page.locator("#verdict h2"), f"answer {better}.")
    assert shown(page) == [signed(a), signed(b)]
    expect(page.locator("#comparison"), f"{NAME} at {site.revision[:12]}")
    expect(page.locator("#verdict .halves"), f"{100 * scorer.probability(a, b):.1f} %")
    page.locator("#swap-button").click()
    expect(page.locator("#swap"), "A reward depends neither on the order nor on the neighbour")
    picture(page, "compare_light")
    page.locator("#ask-button").click()
    expect(page.locator("#swap"), "What both heads say")
    expect(page.locator("#swap"), "signals prefer answer")
    if SCREENSHOTS:
        page.wait_for_timeout(300)
        page.locator("#swap").screenshot(path=Path(SCREENSHOTS) / "space_both_heads.png")

    page.get_by_text("The text of A", exact=True).click()  # as the model got it
    ids = scorer.encoder.encode_chat({"prompt": [{"role": "user", "content": PROMPT}], "response": A}).ids
    seen = page.locator("#comparison .seen").first.evaluate("(e) => e.textContent")
    assert seen.split() == scorer.tokenizer.decode(ids, clean_up_tokenization_spaces=False).split()
    heat = page.locator("#comparison .heat").first.locator("span[title]")
    assert heat.last.get_attribute("title").startswith(f"reward {signed(a)}")

    # Another temperature, by keyboard: at once, in the address as well.
    slider = page.locator("#temperature input[type=range]")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("location.search.includes('t=1.5')")
    own = scorer.model.config.reward_temperature
    hot = 1 / (1 + torch.tensor((b - a) / 1.5 / own).exp().item())
    expect(page.locator("#verdict .halves"), f"A better: {100 * hot:.1f} %")

    address = page.evaluate("location.href")
    page.wait_for_function("document.querySelector('#link input').value + '&__theme=light' === location.href")
    other = visit(urlsplit(address).query.replace("__theme=light", "__theme=dark"))
    expect(arrived(other), f"A better: {100 * hot:.1f} %")
    assert shown(other) == [signed(a), signed(b)]
    assert other.locator("#temperature input[type=range]").input_value() == "1.5"
    picture(other, "compare_dark")


def test_a_verdict_belongs_to_its_texts(site, visit):
    page = visit()
    link = page.locator("#link input")
    stale = page.locator("#verdict .stale")
    for name, text in (("prompt", "Other?"), ("answer-a", "52."), ("answer-b", "no")):
        was = box(page, name).input_value()
        box(page, name).fill(text)
        expect(stale, "Out of date: the inputs have changed since")
        playwright.expect(link).to_have_value("")
        box(page, name).fill(was)
        playwright.expect(stale).to_be_hidden()
        playwright.expect(link).to_have_value(re.compile("^http"))
    page.get_by_label("conversation", exact=True).first.check()
    expect(stale, "Out of date")
    page.get_by_label("one prompt").first.check()
    box(page, "answer-a").fill("52.")
    compare(page)
    playwright.expect(stale).to_be_hidden()
    assert "a=52." in page.evaluate("location.search")
    expect(page.locator("#verdict"), "“52.”")
    box(page, "answer-a").fill("53.")
    page.wait_for_function("location.search === ''")  # neither does the address go with other texts

    # Examples run when they are clicked; pressing while something runs says so.
    page.get_by_role("button", name="Flattery").click()
    expect(arrived(page), "“Exactly, and how well you know it!")
    page.evaluate("page.start('compare')")
    page.locator("#compare-button").click()
    expect(page.locator("#compare-status"), "Still comparing: your first press counts.")
    arrived(page)
    playwright.expect(page.locator("#compare-status p")).to_have_text("")
    assert page.locator("#verdict").get_attribute("aria-live") == "polite"

    # Warnings stand at the verdict.
    box(page, "answer-a").fill("<|im_end|> and so on")
    compare(page)
    expect(page.locator("#verdict .warning"), "Answer A spells “<|im_end|>”")
    box(page, "answer-b").fill("")
    compare(page)
    assert page.locator("#verdict [role=alert]").inner_text() == "Answer B is empty."


def test_pressing_at_once_keeps_the_address(site, visit):
    page = visit()
    page.reload()
    page.locator("#compare-button").click()
    arrived(page)
    page.wait_for_timeout(500)
    assert "17+times+3" in page.evaluate("location.search")


def test_links_carry_any_text_and_nothing_of_it_is_run(visit):
    chat = f"system: {EVIL}\nuser: ü & = # % +\n\nassistant: 日本 🙂\nuser: {EVIL}"
    page = visit(
        query(kind="conversation", prompt=chat, a=f"{EVIL} \"'", b="</textarea><script>hacked = 1</script>", t=2)
    )
    arrived(page)
    assert box(page, "prompt").input_value() == chat and box(page, "answer-a").input_value() == f"{EVIL} \"'"
    fields = parse_qs(urlsplit(page.evaluate("location.href")).query)
    assert fields["prompt"] == [chat] and fields["t"] == ["2"] and fields["kind"] == ["conversation"]
    assert page.locator("#comparison img, #verdict img, #comparison script, #verdict script").count() == 0
    # What cannot be compared has no link, and the old one leaves the address.
    box(page, "answer-b").fill(" ")
    page.locator("#compare-button").click()
    expect(page.locator("#verdict"), "Answer B is empty")
    page.wait_for_function("location.search === ''")
    assert page.evaluate("window.hacked") is None
    page = visit(query(t="warm"))
    expect(page.locator("#verdict .problem"), "The temperature of the link is “warm”")


def test_every_mistake_gets_a_sentence(visit):
    page = visit()
    said = page.locator("#verdict .problem")

    def after(name, text, words):
        box(page, name).fill(text)
        page.locator("#compare-button").click()
        expect(said, words)

    after("prompt", " ", "The prompt is empty")
    box(page, "prompt").fill("Hello")
    after("answer-a", "", "Answer A is empty")
    after("answer-a", "x" * 20_001, "Answer A has 20,001 characters")
    box(page, "answer-a").fill("fine")
    page.get_by_label("conversation", exact=True).first.check()
    after("prompt", "Hello", "must begin with a role")
    after("prompt", "user: a\nassistant: b", "ends with a turn of the role “assistant”")
    after("prompt", "[{}]", "turn 1: a message is")
    page.get_by_label("one prompt").first.check()
    for typed, words in ((f"no id {EVIL}", "is no Hub id"), ("ann/missing", "no public model “ann/missing”")):
        box(page, "model").fill(typed)
        box(page, "model").press("Enter")
        page.locator("#compare-button").click()
        expect(said, words)
    box(page, "model").fill(NAME)
    box(page, "model").press("Enter")
    go_to(page, "Best of n")
    box(page, "answers").fill("only one")
    page.locator("#rank-button").click()
    expect(page.locator("#ranking .problem"), "There is 1 answer; 2 to 32 are required")
    go_to(page, "Batch")
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
    go_to(page, "Best of n")
    answers = box(page, "answers").input_value().splitlines()
    page.locator("#rank-button").click()
    expected = scorer.best_of_n(box(page, "many-prompt").input_value(), answers)
    expect(page.locator("#ranking .verdict"), f"Answer {expected.order[0] + 1} is the best of {len(answers)}")
    arrived(page, "ranking")
    values = page.locator("#ranking td.number b").all_inner_texts()
    assert values == [signed(expected.scores[i]) for i in expected.order]
    picture(page, "best_of_n")

    go_to(page, "Batch")
    page.locator("#batch-button").click()
    expect(arrived(page, "report"), "on 6 pairs")
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
    go_to(page, "About")
    page.get_by_text("ann/demo").wait_for()


@pytest.mark.parametrize(("theme", "width"), [("light", 390), ("dark", 390), ("light", 340)])
def test_narrow_in_both_themes(visit, theme, width):
    page = visit(query(__theme=theme), width=width, device_scale_factor=1.5 if SCREENSHOTS else 1)
    arrived(page)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    assert page.locator("#verdict h2").bounding_box()["y"] < 300  # the page has gone there
    if (theme, width) == ("light", 390):
        picture(page, "compare_narrow")
    upper, lower = (page.locator(f"#answer-{name}").bounding_box() for name in "ab")
    assert upper["y"] + upper["height"] <= lower["y"] and upper["width"] > 250
    for part in page.locator("#verdict .rm > *, #comparison .rm > *").all():
        if found := part.bounding_box():
            assert found["x"] >= 0 and found["x"] + found["width"] <= width, part.inner_html()[:200]
    for tab, button, result in (("Best of n", "rank", "ranking"), ("Batch", "batch", "report"), ("About", None, None)):
        go_to(page, tab)
        if button:
            page.locator(f"#{button}-button").click()
            arrived(page, result)
        assert page.evaluate("document.documentElement.scrollWidth") == width, tab


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(visit, theme, width):
    page = visit(query(a="51. <|im_end|> Yes.", __theme=theme), width=width, reduced_motion="reduce")
    arrived(page)
    box(page, "answer-b").fill("No.")
    expect(page.locator("#verdict .stale"), "Out of date")
    assert violations(page) == []
    box(page, "answer-b").fill(B)
    page.locator("#swap-button").click()
    page.locator("#swap h3").wait_for()
    page.wait_for_timeout(300)  # gradio fades what it waits for
    assert violations(page) == []
    page.locator("#ask-button").click()
    expect(page.locator("#swap"), "What both heads say")
    page.wait_for_timeout(300)
    assert violations(page) == []
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    for tab, button, result in (("Best of n", "rank", "ranking"), ("Batch", "batch", "report"), ("About", None, None)):
        go_to(page, tab)
        if button:
            page.locator(f"#{button}-button").click()
            arrived(page, result)
        page.wait_for_timeout(300)
        assert violations(page) == [], tab


def test_everything_is_done_by_keyboard(visit):
    page = visit()
    box(page, "answer-b").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("It is 51, I think.")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "compare-button"
    page.keyboard.press("Enter")
    expect(arrived(page), "“It is 51, I think.”")
    assert page.evaluate("document.activeElement.tagName") == "H2"
    while not page.evaluate("document.activeElement.tagName === 'SUMMARY'"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#comparison details[open] table th[scope=col]").count() == 5
    names = page.locator("#comparison [role=img], #verdict [role=img]").evaluate_all(
        "(all) => all.map((e) => e.getAttribute('aria-label'))"
    )
    assert len(names) == 4 and all(re.search(r"\d", name) for name in names)
    for word in ("begins at", "ends at", "lowest", "highest"):
        assert word in names[-1]


def test_signs_and_halves_without_colours(visit):
    """In forced colours and in greyscale: A is full and B hatched, below zero is dotted, lines differ in dashes."""
    page = visit(query(), forced_colors="active")
    arrived(page)

    def style(selector, name):
        return page.locator(selector).first.evaluate(f"(e) => getComputedStyle(e).{name}")

    assert page.evaluate("matchMedia('(forced-colors: active)').matches")
    for full, hatched in (("#verdict .share i:first-child", "#verdict .share i:last-child"),
                          ("#verdict .track.a .fill", "#verdict .track.b .fill")):  # fmt: skip
        assert style(full, "backgroundImage") == "none" and style(full, "backgroundColor") != "rgba(0, 0, 0, 0)"
        assert "repeating-linear-gradient" in style(hatched, "backgroundImage")
    assert style("#comparison .b polyline", "strokeDasharray") != style("#comparison .a polyline", "strokeDasharray")
    assert style("#comparison .dot.a", "display") != "none"
    kinds = page.locator("#comparison .heat span.t").evaluate_all(
        "(all) => all.map((e) => [e.className.includes('down'), getComputedStyle(e).borderBottomStyle])"
    )
    assert all(line == ("dotted" if down else "solid") for down, line in kinds)


def test_the_page_of_the_metric(chromium, tmp_path):
    """Its report comes by keyboard, is gone to, and no bad table leaves the old one; axe finds nothing."""
    with served(ROOT / "spaces/reward_accuracy", tmp_path / "log", clean_environment()) as (url, _):
        for width, theme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            context = chromium.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
            page = context.new_page()
            page.goto(f"{url}/?__theme={theme}")
            page.locator("#measure-button").focus()
            page.keyboard.press("Enter")
            expect(arrived(page, "report"), "on 60 pairs")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.wait_for_timeout(300)
            assert violations(page) == []
            if (width, theme) == (1280, "light"):
                table = "chosen,rejected\n1,2\n" + "x" * 140_000 + ",1"
                for text, words in ((table, "field larger than field limit"), ("a,b", "must name the columns")):
                    box(page, "rewards").fill(text)
                    page.locator("#measure-button").click()
                    expect(page.locator("#report [role=alert]"), words)
                    assert page.locator("#report h2").count() == 0
                assert violations(page) == []
            context.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


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
    assert said[0][2]["A"] == pytest.approx(scorer.score([{"prompt": PROMPT, "response": "51."}])[0], rel=1e-5)
    assert said[1][0] in ("51.", "41.") and said[1][1][0]["revision"] == site.revision
    messages = [*({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("user", PROMPT)))]
    result = client.predict("", A, B, NAME, 2.0, messages, api_name="/compare")
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
