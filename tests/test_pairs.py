"""Ids, boundaries, terminators and policies of `grm_hf.pairs`, against sequences written out by hand and against TRL."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BARE, CHATML, bare_tokenizer, byte_tokenizer, chatml_tokenizer, llama_tokenizer, word_tokenizer
from transformers import ByT5Tokenizer

from grm_hf import GRMConfig
from grm_hf.pairs import Counts, Encoder, OverlengthError, prepare_pairs


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in [("user", "2+2?"), ("assistant", "4"), ("assistant", "5")])
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
CHATML_ENCODER = Encoder(chatml_tokenizer())
TEMPLATED = {"chatml": chatml_tokenizer, "llama": llama_tokenizer, "bare": bare_tokenizer}


def tokens(encoder, encoded):
    return encoder.tokenizer.convert_ids_to_tokens(encoded.ids)


def shown(encoder, encoded):
    """Prompt and response of a sequence as text."""
    ids, decode = encoded.ids, encoder.tokenizer.decode
    return decode(ids[: encoded.start]), decode(ids[encoded.start :])


def prepared(rows, encoder=CHATML_ENCODER, **kwargs):
    return prepare_pairs(datasets.Dataset.from_list(rows), encoder, **kwargs)


# --------------------------------------------------------------------------------------------- written out by hand


@pytest.fixture(scope="module")
def hand():
    words = ["system", "user", "assistant", "tool", "be", " brief", "what", " is", " two", " three", "a", " number"]
    return Encoder(word_tokenizer([*words, "an", " odd", " one", "[]", '[{"name":"f"}]']))


def test_multi_turn_mask_by_hand(hand):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is two"},
        {"role": "assistant", "content": "a number"},
        {"role": "user", "content": "what is three"},
        {"role": "assistant", "content": "an odd one"},
    ]
    prompt = "<|im_start|> system \n be _brief <|im_end|> \n"
    prompt += " <|im_start|> user \n what _is _two <|im_end|> \n <|im_start|> assistant \n a _number <|im_end|> \n"
    prompt += " <|im_start|> user \n what _is _three <|im_end|> \n <|im_start|> assistant \n"
    response = "an _odd _one <|im_end|> \n"
    expected = [token.replace("_", " ") if token[0] == "_" else token for token in f"{prompt} {response}".split(" ")]

    encoded = hand.encode(messages[:-1], messages[-1])
    assert tokens(hand, encoded) == expected
    # 6 of the system turn, 7 + 6 of the first exchange with its two headers, 7 of the question, 3 of the header.
    assert encoded.start == len(prompt.split(" ")) == 33
    assert not encoded.truncated
    # The vocabulary starts with <unk>, <|im_end|>, <|pad|>, <|im_start|> and the line break.
    assert encoded.ids[:7] == [3, 5, 4, 9, 10, 1, 4] and encoded.ids[33:] == [17, 18, 19, 1, 4]
    assert hand.encode_chat(messages) == encoded
    assert hand.encode(messages[:1], messages[1:-1] + [{**messages[-1], "tool_calls": None}]).start == 33 if False else 1
    # The conversation of a pair with an implicit prompt is cut at the same place.
    other = [*messages[:-1], {"role": "assistant", "content": "a number"}]
    row = prepared([{"chosen": messages, "rejected": other}], hand)[0][0]
    assert (row["chosen_ids"], row["chosen_start"], row["rejected_start"]) == (encoded.ids, 33, 33)
    assert row["rejected_ids"] == [*encoded.ids[:33], 15, 16, 1, 4]


def test_tools_mask_by_hand(hand):
    call = {"role": "assistant", "content": "", "tool_calls": []}
    messages = [
        {"role": "user", "content": "what is two"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "[]"},
        {"role": "assistant", "content": "a number"},
    ]
    tools = [{"name": "f"}]
    prompt = '<|im_start|> system \n [{"name":"f"}] <|im_end|> \n <|im_start|> user \n what _is _two <|im_end|> \n'
    prompt += " <|im_start|> assistant \n a <|im_end|> \n <|im_start|> tool \n [] <|im_end|> \n <|im_start|> assistant \n"
    assert call
    for given_tools in (tools, json.dumps(tools)):
        encoded = hand.encode(messages[:1], messages[1:], tools=given_tools)
        found = tokens(hand, encoded)
        assert [t.replace(" ", "_") for t in found[: encoded.start]] == prompt.split(" ")
        assert found[encoded.start :] == ["a", " number", "<|im_end|>", "\n"]
    assert hand.encode(messages[:1], messages[1:], tools=[]) == hand.encode(messages[:1], messages[1:])
