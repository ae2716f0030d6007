"""Replaces the code files of a saved model, in a folder or on the Hub, by those of this version. Nothing else changes.

A saved model carries the code it was saved with, and a later transformers may break that code. The golden rows are
scored with the old code and with the new code, each in a process without this package. If they differ, nothing is
written. If the old code no longer runs, the stored golden rows take its place.
"""

import difflib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ..configuration_grm import GRMConfig
from ..folders import readable
from ..scoring.golden import FILE, HALF, RELATIVE_TO, TOLERANCES, GoldenError, scale_of
from ..version import __version__
from . import card
from .publish import CODE, explained


SCORE = """
import json, sys
sys.modules["grm_hf"] = None  # the folder's own code, whatever is installed
import torch
from transformers import AutoModelForSequenceClassification
job = json.load(sys.stdin)
attention = {"attn_implementation": job["attention"]} if job["attention"] in ("eager", "sdpa") else {}
model = AutoModelForSequenceClassification.from_pretrained(
    job["folder"], trust_remote_code=True, dtype=getattr(torch, job["dtype"]), **attention
)
if (kind := torch.accelerator.current_accelerator()) is not None and torch.accelerator.is_available():
    model.to(kind)
scores = []
with torch.no_grad():
    for ids in job["ids"]:
        ids = torch.tensor([ids], device=model.device)
        scores.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
print("SCORES" + json.dumps(scores))
"""


@dataclass
class Refreshed:
    """
    The result of [`refresh`].

    Args:
        changed (`dict[str, str]`):
            Each changed file, and the kind of change.
        table (`str`):
            The golden rows before and after.
        revision (`str`, *optional*):
            Revision of the Hub repository with the new code.
    """

    changed: dict[str, str]
    table: str
    revision: str | None = None


def refresh(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> Refreshed:
    """
    Put this version's code files into a saved reward model. Weights, configuration, tokenizer and golden rows stay. A
    card that grm_hf wrote then names the version of the code.

    Args:
        source (`str` or `Path`):
            Folder or Hub id of a reward model. Its own code is run: refresh models that you trust.
        revision (`str`, *optional*):
            Branch of the Hub repository. Defaults to `main`.
        token (`str` or `bool`, *optional*):
            Defaults to the token of `hf auth login` or `HF_TOKEN`.

    Returns:
        [`Refreshed`]: empty `changed` if the model had this code already.

    Raises:
        [`GoldenError`]: the new code gives other rewards. Nothing was written.
        `ValueError`: not a reward model with code, or no golden rows.
    """
    with readable(source) as place:
        folder = Path(place)
        return _refresh_folder(folder) if folder.is_dir() else _refresh_repository(place, revision, token)


def _refresh_folder(folder: Path) -> Refreshed:
    with tempfile.TemporaryDirectory(prefix="grm_refresh_") as temporary:
        files, done = _tried(folder, Path(temporary))
        partial = {name: folder / f".{name}.new" for name in files}
        try:
            for name, path in partial.items():
                path.write_text(files[name], encoding="utf-8")
            for name, path in partial.items():
                os.replace(path, folder / name)
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)
    return done


def _refresh_repository(repo_id: str, revision: str | None, token: str | bool | None) -> Refreshed:
    api = HfApi(token=token)
    try:
        head = api.model_info(repo_id, revision=revision).sha
        folder = snapshot_download(repo_id, revision=head, token=token, ignore_patterns=["adapter/*", "checkpoint-*"])
        with tempfile.TemporaryDirectory(prefix="grm_refresh_") as temporary:
            files, done = _tried(Path(folder), Path(temporary))
        done.revision = head
        if files:
            done.revision = api.create_commit(
                repo_id,
                [CommitOperationAdd(name, text.encode()) for name, text in files.items()],
                commit_message=f"Code files of grm_hf {__version__}",
                commit_description="\n".join(f"{name}: {how}" for name, how in done.changed.items()),
                revision=revision,
                parent_commit=head,
            ).oid
    except HfHubHTTPError as error:
        raise explained(error, repo_id) from error
    return done


def _tried(folder: Path, temporary: Path) -> tuple[dict[str, str], Refreshed]:
    """The new text of each file that changes, after the golden rows were scored before and after."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' holds an adapter, which carries no code. Refresh the model it was trained on.")
    GRMConfig.get_config_dict(folder)  # refuses other models
    old = {name: _text(folder / name) for name in CODE}
    new = {name: _text(Path(__file__).parents[1] / name) for name in CODE}
    files = {name: new[name] for name in CODE if new[name] != old[name]}
    if not files:
        return {}, Refreshed({}, "The code files are those of this version already.")
    changed = {name: _difference(old[name], new[name]) for name in files}
    if (folder / "README.md").is_file():
        text = _text(folder / "README.md")
        if (said := card.with_code(text)) != text:
            files["README.md"] = said
            changed["README.md"] = f"names grm_hf {__version__} as the version of the code"
    after = temporary / "after"
    after.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name not in files:
            (after / path.name).symlink_to(path.resolve())
    for name, text in files.items():
        (after / name).write_text(text, encoding="utf-8")
    return files, Refreshed(changed, _compared(folder, after, temporary))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _difference(old: str, new: str) -> str:
    if not old:
        return "new"
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0))[2:]
    added, gone = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    return f"{added} lines added, {gone} removed"


def _compared(folder: Path, after: Path, temporary: Path) -> str:
    """A table of the golden rows by the old and the new code; [`GoldenError`] if they differ."""
    if not (folder / FILE).is_file():
        raise ValueError(
            f"'{folder}' has no {FILE}, so nothing would show that the new code gives the same rewards. While the "
            "model is known to be right, call `grm_hf.scoring.save_golden(model, tokenizer, folder)`."
        )
    content = json.loads(_text(folder / FILE))
    saved, rows = content["saved_with"], content["rows"]
    job = {"ids": [row["ids"] for row in rows], "dtype": saved["dtype"], "attention": saved["attn_implementation"]}
    try:
        before, name = _scores(folder, job, temporary), "before"
        note = ""
    except ValueError as error:
        before, name = [row["score"] for row in rows], "stored"
        note = f"Its own code cannot score here, so the stored rewards stand for it. ({error})\n"
    now = _scores(after, job, temporary)
    limit, scale = TOLERANCES.get(saved["dtype"], HALF), scale_of(before)
    lines, wrong = [f"row  tokens {name:>11}       after  difference"], []
    for number, (ids, old, new) in enumerate(zip(job["ids"], before, now, strict=True)):
        difference = abs(new - old) / scale
        holds = math.isfinite(new) and difference <= limit
        mark = "" if holds else "  DIFFERS"
        lines.append(f"{number:3}  {len(ids):6} {old:11.6f} {new:11.6f}     {difference:.1e}{mark}")
        wrong += [] if holds else [number]
    table = f"{note}{chr(10).join(lines)}\na difference, {RELATIVE_TO}, may be {limit:.0e}"
    if wrong:
        raise GoldenError(f"'{folder}': the new code changes golden rows {wrong}; nothing was written.\n{table}")
    return table


def _scores(folder: Path, job: dict, temporary: Path) -> list[float]:
    """Rewards by the code in `folder`, from a separate process; if that fails, `ValueError` with its last line."""
    modules = Path(tempfile.mkdtemp(dir=temporary))  # transformers puts a folder's code there
    done = subprocess.run(
        [sys.executable, "-c", SCORE],
        input=json.dumps({**job, "folder": str(folder)}),
        env={**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    shutil.rmtree(modules, ignore_errors=True)
    if done.returncode or "SCORES" not in done.stdout:
        raise ValueError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.split("SCORES")[1])
