"""What the tests of the two Spaces share: a page in a process of its own, models on a Hub of this machine, a Chromium
whose network ends at this machine, and axe, where they can be had."""

import ast
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub import File, Repo


ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("GRM_AXE") or ROOT / ".venv/axe/node_modules/axe-core/axe.min.js")


def imported(file):
    """The modules that a file imports, without those of Python: `.name` for one beside it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names)


def put(hub, repo_id, folder):
    """A repository as if its owner had pushed it, subfolders included."""
    repo = hub.repos["models", repo_id] = Repo("models", repo_id)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repo.commit("main", {name: File(hub.add_blob(data), len(data)) for name, data in files.items()}, "files")


def clean_environment(**extra):
    """Of a process that is nobody's on any Hub, and has the network of this machine only."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GRM_", "GRADIO_"))}
    return {**plain, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*", **extra}


@contextmanager
def served(folder, log, env, start=("app.py",)):
    """A page in its own process: its address, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**env, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with open(log, "wb") as out:
        server = subprocess.Popen([sys.executable, *start], cwd=folder, env=env, stdout=out, stderr=out)
    try:
        for _ in range(960):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, Path(log).read_text()
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        server.wait(timeout=20)


@contextmanager
def browser():
    """A headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra `dev`)")
    if CHROMIUM is None:
        pytest.skip("needs a chromium on the path")
    with api.sync_playwright() as driver:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield chromium
        chromium.close()


def violations(page):
    """What axe finds on a page against WCAG 2.2, levels A and AA, as sentences."""
    if not AXE.is_file():
        pytest.skip("needs axe-core: npm install --prefix .venv/axe axe-core, or GRM_AXE")
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    found = page.evaluate("async (tags) => (await axe.run(document, { runOnly: tags })).violations", tags)
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found for node in rule["nodes"]]
