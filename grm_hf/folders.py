"""Checks a folder (or Hub id) before a model is loaded from it, with one sentence for each fault; writes a folder all
or nothing."""

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LFS = b"version https://git-lfs"
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


@contextmanager
def readable(place: str | os.PathLike) -> Iterator[str]:
    """
    A context that gives a folder or Hub id to load from, as a string. Every command and [`GRMScorer`] load this way.

    Raises:
        `ValueError`: there is no such folder; it is a file; a file in it is a git-lfs pointer or incomplete; it holds
            two sets of weights; or the repository cannot be reached.
    """
    place = os.fspath(place)
    if os.path.isdir(place):
        check_files(place)
        if (base := _base_of(place)) is not None:
            check_files(base)
    elif os.path.exists(place):
        raise ValueError(f"'{place}' is a file. Give the folder that it is in.")
    elif not HUB_ID.fullmatch(place):
        raise ValueError(f"There is no folder '{place}'.")
    try:
        yield place
    except (OSError, HFValidationError) as error:
        if os.path.isdir(place):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"There is no folder '{place}', and it could not be loaded from the Hub either: {reason}"
        ) from error


def check_files(folder: str | Path) -> None:
    """Refuse a folder with git-lfs pointers, files cut short, or two sets of weights."""
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            start = file.read(len(LFS))
        if start == LFS:
            raise ValueError(
                f"'{path}' is a git-lfs pointer, not the file that it stands for. Fetch it (`git lfs pull` in "
                "the folder, or `hf download`)."
            )
        loaded = path.suffix in WEIGHTS or path.name.startswith("tokenizer")
        if loaded and (wrong := _cut(path)) is not None:
            raise ValueError(f"'{path}' is incomplete: {wrong}. Copy or download it again.")
    for single in ("model.safetensors", "pytorch_model.bin"):
        shards = _shards(folder, single)
        missing = [shard for shard in shards if not (Path(folder) / shard).is_file()]
        if (Path(folder) / single).is_file():
            if len(missing) < len(shards):
                raise ValueError(
                    f"'{folder}' holds two sets of weights, {single} and the shards that {single}.index.json names. "
                    "Only the first would be loaded, which may be the older one. Remove the set that does not belong "
                    "there."
                )
        elif missing:
            raise ValueError(f"'{folder}' lacks {missing[0]}, which {single}.index.json names. Copy it again.")


def _base_of(folder: str | Path) -> str | None:
    """The folder of the model that an adapter was trained on, if it is on this machine."""
    path = Path(folder, "adapter_config.json")
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None  # no adapter; or the loader says what is wrong with the file
    return base if isinstance(base, str) and os.path.isdir(base) else None


def require_base(
    base: str | None, adapter: str | os.PathLike, remedy: str = "write its place into adapter_config.json"
) -> None:
    """`ValueError` if an adapter names no base, or a folder that is not there: loaders would take it for a Hub id."""
    if not base:
        raise ValueError(f"The adapter '{adapter}' does not say which model it was trained on: {remedy}.")
    if not os.path.isdir(base) and not HUB_ID.fullmatch(base):
        raise ValueError(
            f"The adapter '{adapter}' says that it was trained on '{base}', and there is no such folder. Put it "
            f"there, or {remedy}."
        )


def loaded_weights(folder: str | Path) -> list[str]:
    """The safetensors files that `from_pretrained` reads from a folder: the single file, or the shards of the
    index."""
    single = "model.safetensors"
    return [single] if (Path(folder) / single).is_file() else _shards(folder, single) or [single]


def _shards(folder: str | Path, single: str) -> list[str]:
    index = Path(folder) / f"{single}.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"'{index}' is no index of weights ({error!r}). Copy or download it again.") from None


def _cut(path: Path) -> str | None:
    """What says that a file was not written or copied to its end."""
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length) if 8 + length <= size else b"")
                ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            except (ValueError, TypeError, KeyError, AttributeError):
                return "its header cannot be read"
            expected = 8 + length + max(ends, default=0)
            return None if size == expected else f"it has {size} bytes, and its header describes {expected}"
        if path.suffix in (".bin", ".pt"):  # a zip archive, with its directory at the end
            return None if file.read(2) != b"PK" or zipfile.is_zipfile(path) else "its directory is missing"
        if path.suffix == ".json":
            file.seek(max(0, size - 64))
            return None if file.read().rstrip()[-1:] in (b"}", b"]") else "its last brace is missing"
    return None


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A context with a folder to write into. It becomes `output` at the end; after an error nothing is left."""
    path = Path(output).resolve()  # a link to an empty folder stays one
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"'{output}' exists and is not an empty folder. Choose another one; nothing is overwritten.")
    if path == Path.cwd():
        raise ValueError(f"'{output}' is the working directory, which cannot be replaced. Name a new folder in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
