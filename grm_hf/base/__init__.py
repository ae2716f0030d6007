"""The real base of this project, SmolLM2-135M-Instruct, as a folder that needs no network; and real pairs."""

from .shipped import load_pairs
from .smollm2 import MODEL_ID, folder, origin


__all__ = ["MODEL_ID", "folder", "load_pairs", "origin"]
