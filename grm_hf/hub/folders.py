"""A folder to write into, all or nothing."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, or nothing: no half of one is ever left there."""
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
