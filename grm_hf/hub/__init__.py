"""What goes to the Hub: complete models (`publish.py`) and their cards (`card.py`)."""

from .publish import push_folder, push_model


__all__ = ["push_folder", "push_model"]
