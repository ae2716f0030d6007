"""Unlisted models, in a separate process. This file is also that process:

    python apart.py

Everything that such an id brings is read only there: its configuration, its tokenizer and the text of its tokens, its
chat template, its weights. The process runs no code of a model, has no token of the page, gets limited time and
memory, and answers in JSON. The page ends it when it takes too long. It holds one model at a time and deletes its
files with it.
"""

import gc
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jobs
from huggingface_hub.utils import HFValidationError, validate_repo_id


MAX_GIGABYTES = 5  # of the weights
MAX_FILES = 2000
MAX_FILE = 40_000_000  # bytes of any other file that is read
MAX_CONFIGURATION = 2_000_000  # bytes of config.json and tokenizer_config.json
MAX_ANSWER = 16_000_000  # bytes that come back
READ = re.compile(r"[^/]+\.(?:json|model|txt|jinja|safetensors)")
SECONDS = 20  # for anything but weights: configuration, tokenizer, texts
OPEN_SECONDS = 300  # for a model, download included
ROOM = 2**30  # bytes beside the weights
# All that the process gets of the page's: no token, no secret, and no folder that one is kept in.
ENVIRONMENT = (
    *("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "OMP_NUM_THREADS", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE"),
)
FREE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)

# ------------------------------------------------------------------------------------------------------------ the page


def check_id(name: str) -> None:
    if not FREE.fullmatch(name):
        raise ValueError(
            f"“{name[:100]}” is not on the list of this page and is no Hub id. An id is namespace/name, or "
            "namespace/name@revision."
        )
    try:
        validate_repo_id(name.partition("@")[0])
    except HFValidationError:
        raise ValueError(
            f"“{name[:100]}” is no Hub id: the Hub takes letters, digits, single - and . and _, 96 of them at most."
        ) from None


class Apart:
    """The page's handle of the separate process."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.folder: str | None = None
        self.name: str | None = None
        self._lock = threading.Lock()

    def run(self, name: str, task: str, *arguments):
        """
        The result of a function of `reward_models` for a model.

        Raises:
            `ValueError`: with a sentence for the visitor.
        """
        check_id(name)
        with self._lock:
            if self.process is not None and self.process.poll() is not None:  # the system may have ended it
                self.end()
            if self.name != name:
                self._clear()
                if self.process is None:
                    self._start()
                self.folder = tempfile.mkdtemp(prefix="apart_")
                self._ask(name, {"open": name, "folder": self.folder}, OPEN_SECONDS)
                self.name = name
            return self._ask(name, {"task": task, "arguments": arguments}, None)

    def _start(self):
        self.home = tempfile.mkdtemp(prefix="apart_home_")
        kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, "HOME": self.home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        )

    def _ask(self, name, request, seconds):
        try:
            self.process.stdin.write(json.dumps({**request, "seconds": SECONDS}).encode() + b"\n")
            self.process.stdin.flush()
            said = self._answer(seconds)
            outcome, result = json.loads(said)
        except (OSError, ValueError) as error:
            self.end()
            if isinstance(error, jobs.Stopped):
                raise
            raise ValueError(
                f"“{name}” could not be read here. Its configuration, tokenizer, chat template or weights are broken, "
                f"or take more than {SECONDS} seconds or {ROOM / 2**30:g} GB beside the weights. Shorten the texts, "
                "or choose another model."
            ) from None
        if outcome == "refused":
            if "open" in request:
                self._clear()
            raise ValueError(result)
        return result

    def _answer(self, seconds) -> bytes:
        """One line. A job that is stopped meanwhile ends the process."""
        pipe, said = self.process.stdout.fileno(), bytearray()
        last = None if seconds is None else time.monotonic() + seconds
        while not said.endswith(b"\n"):
            jobs.check()
            if last is not None and time.monotonic() > last:
                raise OSError("too slow")
            if select.select([pipe], [], [], 0.2)[0]:
                part = os.read(pipe, 2**20)
                said += part
                if not part or len(said) > MAX_ANSWER:
                    raise OSError("the process has ended, or says too much")
        return bytes(said)

    def _clear(self):
        self.name = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):  # of what it has not read
                    pipe.close()
            self.process = None
            shutil.rmtree(self.home, ignore_errors=True)
        self._clear()


# ----------------------------------------------------------------------------------------------------------- the other


def find(name: str):
    """
    The commit of a public reward model and the files to read, as the Hub reports them before anything is loaded.

    Returns:
        The repository, the commit, the names of the files, and the bytes of its weights.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    repo, _, revision = name.partition("@")
    api = HfApi(token=False)
    try:
        info = api.model_info(repo, revision=revision or None)
        tree = api.list_repo_tree(repo, revision=info.sha, recursive=True)
        sizes = {f.path: f.size for f in islice(tree, MAX_FILES) if isinstance(f, RepoFile)}
    except RevisionNotFoundError as error:
        raise ValueError(f"“{repo}” has no revision “{revision}”.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"There is no public model “{repo}” on the Hub.") from error
    except Exception as error:
        raise ValueError(
            f"“{name}” is not on the list of this page, and the Hub cannot be asked for it now "
            f"({type(error).__name__}). Try again later, or choose a model of the list."
        ) from error
    if info.gated:
        raise ValueError(f"“{repo}” is gated: this page loads public models only.")
    if len(sizes) == MAX_FILES:
        raise ValueError(f"“{repo}” has {MAX_FILES:,} files or more: this page takes smaller repositories.")
    weights = sum(size for path, size in sizes.items() if path.endswith(".safetensors"))
    if "adapter_config.json" in sizes:
        raise ValueError(f"“{repo}” is an adapter. Merge it into its base and push the model you get.")
    if "config.json" not in sizes or not weights:
        raise ValueError(f"“{repo}” is no model with safetensors weights: this page loads no other.")
    if weights > MAX_GIGABYTES * 1e9:
        raise ValueError(
            f"The weights of “{repo}” have {weights / 1e9:.1f} GB, those in subfolders included; this page takes "
            f"{MAX_GIGABYTES}. Run it on a machine of your own, with the model on its list."
        )
    read = [path for path in sizes if READ.fullmatch(path)]
    for path in read:
        most = MAX_CONFIGURATION if path in ("config.json", "tokenizer_config.json") else MAX_FILE
        if sizes[path] > most and not path.endswith(".safetensors"):
            raise ValueError(
                f"The file {path} of “{repo}” has {sizes[path] / 1e6:.1f} MB; this page takes {most / 1e6:g} of it."
            )
    return repo, info.sha, read, weights


def open_model(name: str, folder: str, seconds: int):
    """A model in safetensors that transformers knows without further code, from the Hub into a folder and memory."""
    import torch
    from huggingface_hub import snapshot_download
    from reward_models import load
    from transformers import AutoConfig, AutoModelForSequenceClassification

    repo, sha, files, weights = find(name)

    def download(names):
        try:
            snapshot_download(repo, revision=sha, allow_patterns=names, local_dir=folder, token=False, max_workers=1)
        except Exception as error:
            raise ValueError(
                f"The files of “{repo}” did not come from the Hub ({type(error).__name__}). Try again later."
            ) from error

    download(["config.json"])
    signal.alarm(seconds)
    limit(ROOM)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"“{repo}” needs code of its own, or a newer transformers. This page runs the code of models on its list "
            "only, where each is pinned to a revision that its owner has looked at."
        ) from error
    architecture = str((config.architectures or ["no architecture"])[0])
    if not architecture.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ValueError(
            f"“{repo}” is no reward model: found {architecture[:80]} with {config.num_labels} labels; required is a "
            "...ForSequenceClassification with one."
        )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = parameters * (config.dtype.itemsize if isinstance(config.dtype, torch.dtype) else 2)
    if size > MAX_GIGABYTES * 1e9 or parameters > weights:  # weights without a file take memory too
        raise ValueError(
            f"“{repo}” would have {parameters:,} parameters by its config.json, {size / 1e9:.1f} GB, and its files "
            f"have {weights / 1e9:.1f} GB. This page takes {MAX_GIGABYTES} GB and files with at least a byte for each."
        )
    signal.alarm(OPEN_SECONDS)
    limit(ROOM + 2 * max(size, weights))
    download(files)
    return replace(load(name, folder, None, trust_remote_code=False), revision=sha)


def limit(room: int) -> None:
    """Limits the memory that this process may take in addition."""
    import resource  # not on Windows

    now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, resource.RLIM_INFINITY))


def main():
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries is not an answer
    import reward_models

    loaded, brought = None, {name: getattr(reward_models, name) for name in ("encode", "pieces", "control_words")}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "open" in request:
                loaded = None
                gc.collect()
                loaded = open_model(request["open"], request["folder"], request["seconds"])
                for name, function in brought.items():
                    setattr(reward_models, name, in_time(function, request["seconds"]))
                answer = "done", None
            else:
                limit(ROOM)
                answer = "done", getattr(reward_models, request["task"])(loaded, *request["arguments"])
            answer = json.dumps(answer, allow_nan=False)
        except ValueError as error:
            answer = json.dumps(["refused", str(error)])
        except BaseException as error:  # out of memory, a panic of a tokenizer: this process cannot go on
            print(f"A model that is not on the list failed: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            os._exit(1)
        signal.alarm(0)
        answers.write(answer.encode() + b"\n")
        answers.flush()


def end_with(page: int) -> None:
    # The system's own signal for this comes when the starting thread ends, not when the page ends.
    while os.getppid() == page:
        time.sleep(1)
    os._exit(1)


def in_time(function, seconds: int):
    """A function with a time limit: after some seconds the system ends the process, because a model's tokenizer or
    template may run for ever."""

    def bounded(*arguments):
        signal.alarm(seconds)
        try:
            return function(*arguments)
        finally:
            signal.alarm(0)

    return bounded


if __name__ == "__main__":
    main()
