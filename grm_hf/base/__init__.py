"""The real base model of this project, SmolLM2-135M-Instruct, as a folder that needs no network."""

from .smollm2 import MODEL_ID, folder, origin


__all__ = ["MODEL_ID", "folder", "origin"]
