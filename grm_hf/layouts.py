"""A batch of preference pairs as padded rows, as one packed row, or as one row of trees in which every common prefix
stands once; and the attention that the last two need.

`shared_prefix` is the padded computation without its repetitions: a token's hidden state depends on the tokens before it
and on its position, so two sequences that begin alike share the states of what they share. Each token is computed once
and keeps the position it has in its own sequence; a branch attends to its prefix and to itself.

Which tokens a branch attends to is said by an explicit table, never inferred from position ids. It travels in the place of
the attention mask, as a `(1, 1, segments, 4)` integer tensor that transformers hands to the attention function as it
is, and that any other attention function refuses.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig


LAYOUTS = ("auto", "padded", "packed", "shared_prefix")
ATTENTION = "grm_segments"
MIN_SHARED = 8  # tokens: below that, a branch's mask and copied keys cost more than what it saves
