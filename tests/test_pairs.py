"""Ids, boundaries, terminators and policies of `grm_hf.pairs`, against sequences written out by hand and TRL's."""

import json
import os.path
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import BARE, CHATML, bare_tokenizer, byte_tokenizer, chatml_tokenizer, llama_tokenizer, word_tokenizer
from transformers import ByT5Tokenizer

from grm_hf import GRMConfig
from grm_hf.encoding import _message
from grm_hf.pairs import Counts, Encoded, Encoder, OverlengthError, prepare_pairs


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHATS = {"chatml": chatml_tokenizer, "llama": llama_tokenizer, "bare": bare_tokenizer}
ENDS = {"chatml": "<|im_end|>\n", "llama": "<|eot|>", "bare": "</s>"}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


USER, GOOD, BAD = say("user", "2+2?"), say("assistant", "4"), say("assistant", "5")
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXT = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}


def shown(encoder, encoded):
    """Prompt and response of a sequence as text."""
    decode = encoder.tokenizer.decode
    return decode(encoded.ids[: encoded.start]), decode(encoded.ids[encoded.start :])


@pytest.fixture(scope="module")
def chatml():
    return Encoder(chatml_tokenizer())


def prepare(rows, encoder, **kwargs):
    return prepare_pairs(datasets.Dataset.from_list(rows), encoder, **kwargs)


def test_multi_turn_masks_by_hand():
    words = ["system", "user", "assistant", "tool", "be", " brief", "what", " is", " two", " three", "a", " number"]
    encoder = Encoder(word_tokenizer([*words, "an", " odd", " one", "nothing", '[{"name":', ' "f"}]']))
    unk, im_end, pad, im_start, newline = range(5)
    assert encoder.tokenizer.convert_ids_to_tokens([1, 3, 4, 5, 16]) == [
        "<|im_end|>", "<|im_start|>", "\n", "system", " number",
    ]  # fmt: skip
    system, user, assistant, tool, be, brief, what, is_, two, three, a, number, an, odd, one, nothing, name, f = range(
        5, 23
    )

    messages = [
        say("system", "be brief"),
        say("user", "what is two"),
        say("assistant", "a number"),
        say("user", "what is three"),
        say("assistant", "an odd one"),
    ]
    prompt = [
        *[im_start, system, newline, be, brief, im_end, newline],
        *[im_start, user, newline, what, is_, two, im_end, newline],
        *[im_start, assistant, newline, a, number, im_end, newline],
        *[im_start, user, newline, what, is_, three, im_end, newline],
        *[im_start, assistant, newline],
    ]
    answer, other = [an, odd, one, im_end, newline], [a, number, im_end, newline]
    assert encoder.encode(messages[:-1], messages[-1]) == Encoded([*prompt, *answer], start=33)
    assert encoder.encode(messages[:-1], "an odd one") == encoder.encode_chat(messages)
    # However many of the turns a dataset puts into `chosen`, the text loss covers the last one.
    for turns in (0, 1, 4):
        row = {"prompt": messages[:turns], "chosen": messages[turns:]} if turns else {"chosen": messages}
        row["rejected"] = [*row["chosen"][:-1], say("assistant", "a number")]
        if turns == 1:  # what follows an explicit prompt is the assistant's
            with pytest.raises(ValueError, match="remove the prompt"):
                prepare([row], encoder)
            continue
        expected = {"chosen_ids": [*prompt, *answer], "rejected_ids": [*prompt, *other]}
        assert prepare([row], encoder)[0][0] == {**expected, "chosen_start": 33, "rejected_start": 33}

    # An agent's episode: the call, what the tool said and the answer are in `chosen`; only the answer is learnt.
    episode = [messages[1], say("assistant", "a"), say("tool", "nothing"), messages[2]]
    prompt = [
        *[im_start, system, newline, name, f, im_end, newline],
        *[im_start, user, newline, what, is_, two, im_end, newline],
        *[im_start, assistant, newline, a, im_end, newline],
        *[im_start, tool, newline, nothing, im_end, newline],
        *[im_start, assistant, newline],
    ]
    expected = Encoded([*prompt, *other], start=30)
    tools = [{"name": "f"}]
    for given_tools in (tools, json.dumps(tools)):
        assert encoder.encode(episode[:1], episode[1:], tools=given_tools) == expected
        assert encoder.encode_chat({"messages": episode, "tools": given_tools}) == expected
    without = Encoded(expected.ids[7:], start=23)
    assert encoder.encode(episode[:1], episode[1:], tools=[]) == without == encoder.encode(episode[:3], episode[3])


def test_bos():
    tokenizer = llama_tokenizer()
    single, double = Encoder(tokenizer), Encoder(tokenizer, bos="double")
    body = "<|header|>user<|/header|>\n2+2?<|eot|><|header|>assistant<|/header|>\n"
    assert shown(single, single.encode([USER], [GOOD])) == ("<s>" + body, "4<|eot|>")
    assert shown(double, double.encode([USER], [GOOD])) == ("<s><s>" + body, "4<|eot|>")
    # What the original code does, word for word: text first, then the tokenizer with its special tokens.
    text = tokenizer.apply_chat_template([USER, GOOD], tokenize=False)
    assert double.encode([USER], [GOOD]).ids == tokenizer(text)["input_ids"]
    # Plain text gets the one that the tokenizer adds, also if it already says so itself.
    for prompt in ("2+2?", "<s>2+2?"):
        assert shown(single, single.encode(prompt, " 4")) == ("<s>2+2?", " 4</s>")
    assert shown(double, double.encode("<s>2+2?", " 4"))[0] == "<s><s>2+2?"
    for response in ("4", "<s>4"):
        assert single.encode("", response) == Encoded(tokenizer("4</s>")["input_ids"], start=1)
    shortest = replace(double, max_length=2).encode([USER], [GOOD])
    assert tokenizer.decode(shortest.ids) == "<s><|eot|>" and shortest.response_cut
    # Without a BOS in the template there is none, as in TRL.
    tokenizer.chat_template = CHATML
    assert shown(single, single.encode([USER], [GOOD]))[0].startswith("<|im_start|>")


def test_from_config():
    config = GRMConfig(bos_policy="double", max_sequence_length=20, overlength="error")
    encoder = Encoder.from_config(llama_tokenizer(), config)
    assert (encoder.bos, encoder.max_length, encoder.overlength) == ("double", 20, "error")


def test_eos_is_not_doubled_either():
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    encoder = Encoder(byte_tokenizer(add_bos=True, add_eos=True, **tokens))
    for response in (" 4", " 4</s>"):
        assert shown(encoder, encoder.encode("2+2?", response)) == ("<s>2+2?", " 4</s>")
    # The same string for both, and for padding, as GPT-2 has it.
    encoder = Encoder(byte_tokenizer(**dict.fromkeys(["bos_token", "eos_token", "pad_token", "unk_token"], "<|e|>")))
    assert shown(encoder, encoder.encode("2+2?", " 4")) == ("2+2?", " 4<|e|>")
    with pytest.raises(ValueError, match="nothing of the response is left"):
        encoder.encode("2+2?", "<|e|>")


@pytest.mark.parametrize("chat", CHATS)
def test_the_sequence_ends_like_a_finished_turn(chat):
    encoder = Encoder(CHATS[chat]())
    for content in ("4", ">", "4 </tool>"):
        assert shown(encoder, encoder.encode([USER], content))[1] == content + ENDS[chat]
    full = encoder.encode([USER], "4")
    for max_length in range(2, len(full.ids)):
        cut = replace(encoder, max_length=max_length).encode([USER], "4")
        assert len(cut.ids) == max_length and cut.ids[-1] == full.ids[-1] and 0 <= cut.start < max_length


def test_a_special_token_inside_the_response_is_no_end_of_turn():
    encoder = Encoder(bare_tokenizer(special=["<|call|>"]))
    assert shown(encoder, encoder.encode([USER], "see <|call|>"))[1] == "see <|call|></s>"
    assert shown(encoder, encoder.encode([USER], "see </s>"))[1] == "see </s>"


def test_truncation_by_hand():
    encoder = Encoder(byte_tokenizer(add_bos=True, bos_token="<s>", eos_token="</s>"), max_length=6)
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    a, b, c, d, e, f = encoder.tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    assert encoder.encode("ab", "cd") == Encoded([bos, a, b, c, d, eos], 3)
    assert encoder.encode("abc", "de") == Encoded([bos, b, c, d, e, eos], 3, cut=1)
    assert encoder.encode("ab", "cdef") == Encoded([bos, c, d, e, f, eos], 1, cut=2)
    assert encoder.encode("a", "bcdef") == Encoded([bos, c, d, e, f, eos], 1, cut=2, response_cut=True)
    assert encoder.encode("", "abcde") == Encoded([bos, b, c, d, e, eos], 1, cut=1, response_cut=True)
    assert replace(encoder, max_length=2).encode("a", "b") == Encoded([bos, eos], 1, cut=2, response_cut=True)
    bare = Encoder(byte_tokenizer(eos_token="</s>"), max_length=3)
    eos = bare.tokenizer.eos_token_id
    assert bare.encode("ab", "cd") == Encoded([c, d, eos], 0, cut=2)
    assert bare.encode("ab", "cdef") == Encoded([e, f, eos], 0, cut=4, response_cut=True)
    for overlength in ("error", "drop"):
        with pytest.raises(OverlengthError, match="5 tokens, more than max_length=3"):
            replace(bare, overlength=overlength).encode("ab", "cd")


# --------------------------------------------------------------------------------------------------- the boundary


def test_tokens_that_reach_over_the_boundary_are_response():
    encoder = Encoder(byte_tokenizer(eos_token="</s>", merges=[("a", "b"), ("Ġ", "ab"), ("Ġab", "c")]))
    tokens = encoder.tokenizer.convert_ids_to_tokens
    for prompt, response, split in [
        ("x a", "bc", (["x"], ["Ġabc", "</s>"])),
        ("x", " abc", (["x"], ["Ġabc", "</s>"])),
        ("x ab", "d", (["x", "Ġab"], ["d", "</s>"])),
        ("xa", "c", (["x", "a"], ["c", "</s>"])),
    ]:
        encoded = encoder.encode(prompt, response)
        assert (tokens(encoded.ids[: encoded.start]), tokens(encoded.ids[encoded.start :])) == split
    # The line break of the header and the one that the response begins with are one token.
    encoder = Encoder(chatml_tokenizer(merges=[("Ċ", "Ċ")]))
    assert shown(encoder, encoder.encode([USER], "\n4"))[1] == "\n\n4<|im_end|>\n"
    assert shown(encoder, encoder.encode([USER], "4"))[1] == "4<|im_end|>\n"


# Keeps the thinking of the last answer only: the prompt alone, and the prompt under an answer, are different texts.
THINKING = (
    "{%- set last = messages | selectattr('role', 'eq', 'assistant') | list | last %}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}{{- m.content if m == last else m.content.split('</think>')[-1] }}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Opens the thinking for the model, and writes none in a finished conversation.
OPENS = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# Knows no generation prompt.
PLAIN = CHATML.replace("add_generation_prompt", "false")
# Only shows what comes after the thinking.
HIDES = CHATML.replace("message.content or ''", "(message.content or '').split('</think>')[-1]")


@pytest.mark.parametrize("template", [CHATML, THINKING, OPENS, PLAIN], ids=["chatml", "rewrites", "opens", "plain"])
@pytest.mark.parametrize("answer", ["four", "<b>four</b>", "<think>2, 4</think>four", "  four", "two"])
def test_boundary_whatever_the_template_does_to_the_prompt(template, answer):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer)
    messages = [say("user", "1+1?"), say("assistant", "<think>1, 2</think>two"), say("user", "and twice?")]
    before, after = shown(encoder, encoder.encode(messages, answer))
    assert after == answer + "<|im_end|>\n"
    assert before.endswith("and twice?<|im_end|>\n<|im_start|>assistant\n")
    assert ("<think>" in before) == (template != THINKING)


def test_response_that_the_template_drops():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = HIDES
    encoder = Encoder(tokenizer)
    assert shown(encoder, encoder.encode([USER], "<think>hm</think>4"))[1] == "4<|im_end|>\n"
    with pytest.raises(ValueError, match="nothing of the response is left"):
        encoder.encode([USER], "<think>hm</think>")


def test_response_that_is_one_unknown_word_or_only_calls_a_tool(chatml):
    encoder = Encoder(word_tokenizer(["user", "assistant"]))
    assert encoder.encode([say("user", "user")], "🙂").ids[-3:] == [0, 1, 4]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    expected = '<tool_call>{"name": "f"}</tool_call><|im_end|>\n'
    assert shown(chatml, chatml.encode([USER], call))[1] == expected
    # Beside a row that calls a tool, Arrow gives every message the key, with null.
    rows = [{**PAIR, "chosen": [call]}, PAIR]
    prepared, _ = prepare(rows, chatml)
    assert prepared[1]["chosen_ids"] == chatml.encode([USER], GOOD).ids
    assert _message(0, {**USER, "tool_calls": None}) == USER  # not left to transformers, which did not always do it


def test_content_in_parts(chatml):
    template = CHATML.replace("message.content or ''", "message.content[0].text + ''")  # a string would raise
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    parts = [say(m["role"], [{"type": "text", "text": m["content"]}]) for m in (USER, GOOD)]
    assert Encoder(tokenizer).encode_chat(parts) == chatml.encode_chat([USER, GOOD])
    tokenizer.chat_template = template.replace("add_generation_prompt", "false")
    assert Encoder(tokenizer).encode_chat(parts) == chatml.encode_chat([USER, GOOD])


def test_common_beginning_of_two_texts(chatml):
    cases = [
        ("Q: 2+2? A: yes", "Q: 2+2? A: yep", "Q: 2+2? A:"),
        ("Q: 2+2? A: 4", "Q: 2+2? A: 5", "Q: 2+2? A:"),
        ("\n\nHuman: a\n\nAssistant:\nYes", "\n\nHuman: a\n\nAssistant:\nNo", "\n\nHuman: a\n\nAssistant:"),
        ("Q A: yes", "Q A: yes, sir", "Q A:"),
        ("Q A: yes.", "Q A: yes. Or no", "Q A:"),
        ("问：好吗？答：是的", "问：好吗？答：不是", "问：好吗？答："),
        ("问：好吗？答：好的", "问：好吗？答：好吧", "问：好吗？答：好"),
        ("yes", "no", ""),
        ("yes", "yes, sir", ""),
    ]
    for chosen, rejected, prompt in cases:
        row = prepare([{"chosen": chosen, "rejected": rejected}], chatml)[0][0]
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            encoded = Encoded(row[f"{side}_ids"], row[f"{side}_start"])
            assert shown(chatml, encoded) == (prompt, text[len(prompt) :] + "<|im_end|>")


def test_slow_tokenizer():
    tokenizer = ByT5Tokenizer(bos_token="<s>")
    tokenizer.chat_template = BARE
    encoder = Encoder(tokenizer)
    assert not tokenizer.is_fast
    assert shown(encoder, encoder.encode("2+2?", " 4")) == ("2+2?", " 4</s>")
    assert shown(encoder, encoder.encode([USER], "4")) == ("\nuser: 2+2?\nassistant: ", "4</s>")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, st.integers(2, 60), st.sampled_from(sorted(CHATS)), st.booleans())
@example("a", "ba", 3, "llama", True)
def test_any_text(prompt, response, max_length, chat, plain):
    assume(response.strip())
    tokenizer = TOKENIZERS[chat]
    encoder = Encoder(tokenizer)
    encode = partial(Encoder.encode, prompt=prompt if plain else [say("user", prompt)], response=response)
    encoded = encode(encoder)
    assert shown(encoder, encoded)[1] == response + (tokenizer.eos_token if plain else ENDS[chat])
    assert not encoded.truncated and not encoded.response_cut
    if not plain:  # TRL's own way to find the boundary: the tokens that both renderings begin with
        alone = tokenizer.apply_chat_template([say("user", prompt)], add_generation_prompt=True)["input_ids"]
        assert encoded.start == len(os.path.commonprefix([alone, encoded.ids]))

    cut = encode(replace(encoder, max_length=max_length))
    head = [tokenizer.bos_token_id] * (chat == "llama")
    if len(encoded.ids) <= max_length:
        assert cut == encoded
        return
    rest = encoded.ids[len(encoded.ids) - max_length + len(head) :]
    assert cut.ids == head + rest and len(cut.ids) == max_length
    assert cut.cut == len(encoded.ids) - max_length
    kept = cut.ids[cut.start :]
    assert kept == encoded.ids[encoded.start :][-len(kept) :] and kept
    assert cut.response_cut == (len(kept) < len(encoded.ids) - encoded.start)


# The boundary falls between "a" and "b", which are one token: then it is the token that counts, see above.
TOKENIZERS = {chat: make(merges=[("z", "z"), ("Ġ", "zz")]) for chat, make in CHATS.items()}


# ------------------------------------------------------------------------------------------------------- datasets


def test_every_format_gives_the_same_rows(chatml):
    extra = {"margin": 0.5, "id": "x", "score_chosen": 3.0}
    explicit, counts = prepare([{**PAIR, **extra}], chatml, name="eval")
    assert explicit.column_names == ["chosen_ids", "rejected_ids", "chosen_start", "rejected_start", "margin"]
    assert counts == Counts("eval", rows=1) and counts.kept == 1
    row = explicit[0]
    assert row["margin"] == 0.5
    assert (row["chosen_ids"], row["chosen_start"]) == (chatml.encode([USER], [GOOD]).ids, 23)
    implicit = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert prepare([{**implicit, **extra}], chatml)[0][0] == row
    # The prompt once more, as text, beside whole conversations.
    assert prepare([{**implicit, "prompt": "2+2?", **extra}], chatml)[0][0] == row
    # Already tokenised, for instance prepared twice.
    assert prepare_pairs(explicit, chatml)[0][0] == row
    assert prepare_pairs(explicit.with_format("torch"), chatml)[0][0] == row
    references = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    assert prepare([{**row, **references}], chatml)[0][0] == {**row, **references}
    # A transform of the user's is applied.
    raw = datasets.Dataset.from_list([{"question": "2+2?"}] * 2)
    raw.set_transform(lambda batch: {key: [value] * len(batch["question"]) for key, value in PAIR.items()})
    from_transform, _ = prepare_pairs(raw, chatml)
    assert from_transform["rejected_ids"][:] == [row["rejected_ids"]] * 2
    # A column of nulls is no margin.
    assert "margin" not in prepare([{**PAIR, "margin": None}], chatml)[0].column_names
    # Tools and settings of the template, in columns.
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = (
        "{{ 'note' if note is defined else '' }}{{ 'no tools' if tools is defined and tools == [] else '' }}" + CHATML
    )
    columns = [
        {**PAIR, "tools": t, "chat_template_kwargs": k}
        for t, k in [("[]", {"x": 1}), ('[{"name": "f"}]', {"note": "x"})]
    ]
    prepared, _ = prepare(columns, Encoder(tokenizer))
    assert prepared[0]["chosen_ids"] == row["chosen_ids"]
    text = tokenizer.decode(prepared[1]["chosen_ids"])
    assert text.startswith('note<|im_start|>system\n[{"name": "f"}]<|im_end|>\n<|im_start|>user')


def test_counts_and_overlength(chatml):
    def row(prompt, chosen):
        return {**TEXT, "prompt": "p" * prompt, "chosen": "c" * chosen}

    rows = [row(2, 3), row(9, 3), row(2, 9), row(1, 20), row(4, 5)]
    assert [len(r) for r in prepare(rows, chatml)[0]["chosen_ids"]] == [6, 13, 12, 22, 10]
    prepared, counts = prepare(rows, replace(chatml, max_length=10))
    assert counts == Counts("train", rows=5, truncated=3, response_cut=1)
    assert str(counts) == "train: 5 rows, 0 dropped, 3 truncated (1 of them inside the response)"
    assert [len(r) for r in prepared["chosen_ids"]] == [6, 10, 10, 10, 10]
    assert prepared["chosen_start"][:] == [2, 6, 0, 0, 4]

    dropped, counts = prepare(rows, replace(chatml, max_length=10, overlength="drop"), name="eval")
    assert str(counts) == "eval: 5 rows, 3 dropped, 0 truncated" and counts.kept == 2
    assert dropped["chosen_start"][:] == [2, 4] and dropped.column_names == prepared.column_names
    # Too long on one side does not excuse the other.
    with pytest.raises(ValueError, match="row 1, `rejected`: the response has no text"):
        prepare([rows[0], {**rows[3], "rejected": " "}], replace(chatml, max_length=10, overlength="drop"))
    with pytest.raises(ValueError, match="Every row of the train dataset .5. was dropped"):
        prepare(rows, replace(chatml, max_length=3, overlength="drop"))
    with pytest.raises(OverlengthError, match="eval dataset, row 1, `chosen`: the sequence has 13 tokens, more than"):
        prepare(rows, replace(chatml, max_length=10, overlength="error"), name="eval")
    # Two answers that differ only in what is cut away have nothing left to compare.
    rows = [TEXT, {"prompt": "", "chosen": "a" + "c" * 20, "rejected": "b" + "c" * 20}]
    prepared, counts = prepare(rows, replace(chatml, max_length=10))
    assert counts == Counts("train", rows=2, dropped=1) and len(prepared) == 1
    references = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    with pytest.raises(ValueError, match="reference log-probabilities, which belong to the uncut text"):
        prepare([{**prepare([TEXT], chatml)[0][0], **references}], replace(chatml, max_length=3))


BAD_ROWS = {
    "no chosen": ({"prompt": "a", "rejected": "b"}, "no `chosen`; found `prompt`, `rejected`.*rename"),
    "null rejected": ({**TEXT, "rejected": None}, r"no `rejected`; found .*`rejected` \(null\)"),
    "number": ({**TEXT, "chosen": 4}, "`chosen` is int 4; it must be a string or a list of messages"),
    "one message": ({**PAIR, "chosen": GOOD}, "`chosen` is dict .*list of messages"),
    "prompt is a number": ({**TEXT, "prompt": 4}, "`prompt` is int 4"),
    "text beside messages": ({**PAIR, "chosen": "4"}, "text and messages are mixed: `chosen` is text, `rejected` is"),
    "prompt of messages": ({**TEXT, "prompt": [USER]}, "mixed.*Write all of them the same way"),
    "no prompt for the answers": ({**PAIR, "prompt": "2+2?"}, "`chosen`: there is no message before"),
    "no conversation": ({**PAIR, "chosen": []}, "`chosen`: the response holds no message"),
    "empty prompt": ({**PAIR, "prompt": []}, "there is no message before the response. Give the prompt"),
    "wrong role": ({**PAIR, "rejected": [say("user", "5")]}, "`rejected`: the last message has role 'user'.*rename"),
    "prompt repeated": ({**PAIR, "chosen": [USER, GOOD]}, "role 'user', though there is a prompt.*remove the prompt"),
    "prompt ends with an answer": ({**PAIR, "prompt": [USER, BAD]}, "two turns of the assistant.*Join"),
    "other keys": ({**PAIR, "prompt": [{"from": "human", "value": "?"}]}, "message 0 has no role.*`from`.*rename"),
    "no content": ({**PAIR, "prompt": [{"role": "user"}]}, r"message 0 \(user\) has content that is not text"),
    "content is a number": ({**PAIR, "chosen": [say("assistant", 4)]}, r"message 1 \(assistant\).*int 4"),
    "an image": ({**PAIR, "chosen": [say("assistant", [{"type": "image"}])]}, "content that is not text"),
    "message is text": ({**PAIR, "chosen": ["4"]}, "message 1 has no role: found str '4'"),
    "empty": ({**TEXT, "chosen": ""}, "`chosen`: the response has no text.*Remove"),
    "white space": ({**TEXT, "rejected": " \n"}, "`rejected`: the response has no text"),
    "only the end": ({**TEXT, "chosen": "<|im_end|>"}, "nothing of the response is left"),
    "empty message": ({**PAIR, "chosen": [say("assistant", " ")]}, "no text and no tool calls"),
    "equal": ({**TEXT, "chosen": " 5"}, "`chosen` and `rejected` are equal.*Remove"),
    "equal messages": ({**PAIR, "chosen": [BAD]}, "`chosen` and `rejected` are equal"),
    "tools": ({**PAIR, "tools": "{"}, "`tools` is not JSON"),
    "tools of another type": ({**PAIR, "tools": '{"a": 1}'}, "`tools` is dict"),
    "template settings": ({**PAIR, "chat_template_kwargs": "x"}, "`chat_template_kwargs` is str 'x'"),
}


def stream(rows):
    """Rows as the Python objects they are: Arrow has no column that holds, for instance, text and messages."""
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case, chatml):
    bad, message = BAD_ROWS[case]
    first = TEXT if "2+2?" == bad.get("prompt") and case != "text beside messages" else PAIR
    if case == "no prompt for the answers":
        first = {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    prepared, _ = prepare_pairs(stream([first, bad]), chatml, name="eval")
    with pytest.raises(ValueError, match=f"(?s)^eval dataset, row 1[,:] .*{message}"):
        list(prepared)


MARGINS = [float("nan"), float("inf"), True, "1", 1e300, -1e19]


@pytest.mark.parametrize("margin", MARGINS)
def test_bad_margin(margin, chatml):
    prepared, _ = prepare_pairs(stream([{**TEXT, "margin": -1}, {**TEXT, "margin": margin}]), chatml)
    with pytest.raises(ValueError, match="row 1: `margin` is .* it must be a finite number"):
        list(prepared)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "one, other",
    [
        (TEXT, PAIR),
        (TEXT, {"chosen": "a b", "rejected": "a c"}),
        (PAIR, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        ({**TEXT, "margin": 1.0}, {**TEXT, "margin": None}),
        (TEXT, {"chosen_ids": [1], "rejected_ids": [2], "chosen_start": 0, "rejected_start": 0}),
    ],
    ids=["text", "prompt of text", "prompt of messages", "margin", "tokens"],
)
def test_mixed_rows(one, other, reverse, chatml):
    prepared, _ = prepare_pairs(stream([other, one] if reverse else [one, other]), chatml)
    with pytest.raises(ValueError, match="row 1: this row is .*; row 0 is .* fill in what is missing"):
        list(prepared)


TOKENS = {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 4], "chosen_start": 1, "rejected_start": 1}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chosen_ids": []}, "`chosen_ids`: found empty; it must be a non-empty list of token ids from 0 to 258"),
        ({"chosen_ids": [1, 259]}, "must be a non-empty list of token ids from 0 to 258"),
        ({"chosen_ids": [1.0]}, "must be a non-empty list of token ids"),
        ({"chosen_start": 3}, "`chosen_start` is 3; it must be the index of one of the 3 tokens"),
        ({"rejected_start": None}, "`rejected_ids`: there is no `rejected_start`.*Add the columns"),
        ({"rejected_ids": [1, 2, 3]}, "the two responses are the same tokens"),
    ],
)
def test_bad_tokenised_rows(change, message, chatml):
    prepared, _ = prepare_pairs(stream([TOKENS, {**TOKENS, **change}]), chatml)
    with pytest.raises(ValueError, match=f"train dataset, row 1.*{message}"):
        list(prepared)


def test_tokenised_rows_without_starts(chatml):
    rows = [{"chosen_ids": [1, 2, 3], "rejected_ids": [1, 4]}]
    with pytest.raises(ValueError, match="tokens that the text loss needs are unknown"):
        prepare(rows, chatml)
    row = prepare(rows, chatml, starts_required=False)[0][0]
    assert row == {**rows[0], "chosen_start": 0, "rejected_start": 0}
    cut, counts = prepare([TOKENS], replace(chatml, max_length=2))
    assert cut[0] == {"chosen_ids": [2, 3], "rejected_ids": [1, 4], "chosen_start": 0, "rejected_start": 1}
    assert str(counts) == "train: 1 rows, 0 dropped, 1 truncated (0 of them inside the response)"


def test_streaming(chatml, tmp_path):
    rows = [{**TEXT, "chosen": " c" * n, "margin": float(n), "id": n} for n in range(1, 9)]
    encoder = replace(chatml, max_length=15, overlength="drop")
    expected, expected_counts = prepare(rows, encoder)
    datasets.Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    from_file = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True)
    for source in (from_file, stream(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        prepared, counts = prepare_pairs(source, encoder)
        assert counts == Counts("train")
        for _ in range(2):  # each reading counts for itself
            assert list(prepared) == list(expected)
            assert counts == expected_counts == Counts("train", rows=8, dropped=3)
        assert prepared.column_names == expected.column_names
    # A first row that is bad, or none, is said before anything is read.
    with pytest.raises(ValueError, match="row 0, `chosen`: the response has no text"):
        prepare_pairs(stream([{**TEXT, "chosen": ""}, TEXT]), chatml)
    for empty in (stream([]), datasets.Dataset.from_list([])):
        with pytest.raises(ValueError, match="The train dataset has no rows"):
            prepare_pairs(empty, chatml)


def test_processes_and_cache(tmp_path):
    rows = [{**PAIR, "chosen": [say("assistant", str(n))]} for n in range(10, 30)]
    file = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(file)

    def load():
        return datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))

    encoder = Encoder(chatml_tokenizer(), max_length=25)
    one, counts = prepare_pairs(load(), encoder)
    assert pickle.loads(pickle.dumps(encoder)).encode([USER], "4") == encoder.encode([USER], "4")
    # The encoder has been used by now, and the other one is new: the cache must know both for the same.
    again, _ = prepare_pairs(load(), Encoder(chatml_tokenizer(), max_length=25))
    assert again.cache_files == one.cache_files != []
    assert prepare_pairs(load(), replace(encoder, max_length=29))[0].cache_files != one.cache_files
    two, counts_of_two = prepare_pairs(load(), encoder, num_proc=2)
    assert two.to_list() == one.to_list() and counts_of_two == counts == Counts("train", rows=20, truncated=20)

    datasets.Dataset.from_list([*rows[:15], {**rows[0], "rejected": [say("assistant", "")]}]).to_parquet(file)
    with pytest.raises(ValueError, match="train dataset, row 15, `rejected`: the response has no text"):
        prepare_pairs(load(), encoder, num_proc=2)


# ------------------------------------------------------------------------------------------------ settings, scoring


def test_settings_are_checked():
    tokenizer = chatml_tokenizer()
    for max_length in (1, 0, -5, True, 2.5):
        with pytest.raises(ValueError, match="whole number of at least 2"):
            Encoder(tokenizer, max_length=max_length)
    with pytest.raises(ValueError, match="`overlength` is 'truncate'"):
        Encoder(tokenizer, overlength="truncate")
    with pytest.raises(ValueError, match="`bos` is 'none'"):
        Encoder(tokenizer, bos="none")
    with pytest.raises(ValueError, match="no EOS token.*Set `tokenizer.eos_token`"):
        Encoder(byte_tokenizer(pad_token="<pad>"))
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer)
    assert encoder.encode("2+2?", " 4").start == 4
    with pytest.raises(ValueError, match="has no chat template. Set `tokenizer.chat_template`"):
        encoder.encode([USER], "4")
    tokenizer.chat_template = "{{ raise_exception('only cats may talk') }}"
    with pytest.raises(ValueError, match="train dataset, row 0, `chosen`: the chat template refuses.*only cats"):
        prepare([PAIR], encoder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    with pytest.warns(UserWarning, match="today's date"):
        Encoder(tokenizer)


def test_encode_chat(chatml):
    expected = chatml.encode([USER], [GOOD])
    for chat in (
        [USER, GOOD],
        {"prompt": [USER], "response": "4"},
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": [USER], "response": GOOD, "tools": None, "chat_template_kwargs": {"x": None}},
        {"messages": [USER, GOOD]},
    ):
        assert chatml.encode_chat(chat) == expected
    assert chatml.encode_chat("2+2? 4") == chatml.encode("", "2+2? 4") == Encoded(chatml.encode("2+2?", " 4").ids, 0)
    assert chatml.encode_chat({"prompt": "2+2?", "response": " 4"}) == chatml.encode("2+2?", " 4")
    for bad, message in [
        ({"prompt": "a"}, "keys .'prompt'. cannot be scored: it needs `prompt` and `response`"),
        ({"prompt": "2+2?", "response": [GOOD]}, "the prompt is str '2.2.'.*Give two strings, or"),
        (4, "the response is int 4"),
        ([GOOD], "no message before the response"),
        ([USER], "the last message has role 'user'"),
        ([], "holds no message"),
    ]:
        with pytest.raises(ValueError, match=message):
            chatml.encode_chat(bad)


# ------------------------------------------------------------------------------------------------------ against TRL


def from_trl(dataset, tokenizer, max_length=None):
    from trl import RewardTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    prepared = RewardTrainer._prepare_dataset(None, dataset, tokenizer, args, "train")
    return [(row["chosen_ids"], row["rejected_ids"]) for row in prepared]


@pytest.mark.trainer
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("chat", ["chatml", "llama"])
def test_ids_are_those_of_trl(chat, streaming):
    tokenizer = CHATS[chat](merges=[("a", "b"), ("Ċ", "Ċ")])
    tokenizer.chat_template = "{{ note or '' }}" + tokenizer.chat_template
    system, turns = say("system", "be brief"), [say("user", "a"), say("assistant", "b"), say("user", "ab?\n")]
    agent = [say("assistant", "call"), say("tool", "4"), GOOD]
    formats = [
        [PAIR, {**PAIR, "prompt": [system, USER]}, {**PAIR, "prompt": [system, *turns]}, {**PAIR, "chosen": agent}],
        [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}],
        [TEXT, {"prompt": "xa", "chosen": "b", "rejected": "c" + tokenizer.eos_token}],
        [{"chosen": "a b c", "rejected": "a b d"}, {"chosen": "a", "rejected": "é🙂"}],
        [{**PAIR, "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"note": "x"}}],
    ]
    for rows in formats:
        dataset = datasets.Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        ours = [(row["chosen_ids"], row["rejected_ids"]) for row in prepare_pairs(dataset, Encoder(tokenizer))[0]]
        assert ours == from_trl(dataset, tokenizer) and len(ours) == len(rows)
        # And with a limit, as long as TRL's way to meet it is chosen.
        limit = max(len(ids) for ids in ours[0])
        kept, counts = prepare_pairs(dataset, Encoder(tokenizer, max_length=limit, overlength="drop"))
        kept = [(row["chosen_ids"], row["rejected_ids"]) for row in kept]
        assert kept == from_trl(dataset, tokenizer, limit) and counts.dropped == len(rows) - len(kept)
    # The difference: a turn that the template does not end.
    dataset, tokenizer = datasets.Dataset.from_list([PAIR]), bare_tokenizer()
    row, theirs = prepare_pairs(dataset, Encoder(tokenizer))[0][0], from_trl(dataset, tokenizer)[0]
    assert row["chosen_ids"] == [*theirs[0], tokenizer.eos_token_id]


# -------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("chat", ["chatml", "llama"])
@pytest.mark.parametrize("file", ["hh_helpful_base_eval", "dpo_demo"])
def test_real_pairs(file, chat):
    path = DATA / f"{file}.parquet"
    if not path.exists():
        pytest.skip(f"{path.name} is not in shared/data beside the repository")
    dataset = datasets.Dataset.from_parquet(str(path))
    tokenizer, max_length = CHATS[chat](), 700
    prepared, counts = prepare_pairs(dataset, Encoder(tokenizer, max_length=max_length), name=file)

    def length(text):  # a token is a byte, or one of the markers
        for token in map(str, tokenizer.added_tokens_decoder.values()):
            text = text.replace(token, "x")
        return len(text.encode())

    too_long = response_too_long = 0
    for row, original in zip(prepared, dataset, strict=True):
        cut = response_cut = False
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(original["prompt"] + original[side], tokenize=False)
            expected = original[side][0]["content"] + ENDS[chat]
            response = tokenizer.decode(row[f"{side}_ids"][row[f"{side}_start"] :])
            assert len(row[f"{side}_ids"]) == min(length(whole), max_length)
            if length(expected) + (chat == "llama") > max_length:
                response_cut = True
                assert response.endswith(expected[-100:])
            else:
                assert response == expected
            cut = cut or length(whole) > max_length
        too_long += cut
        response_too_long += response_cut
    assert counts == Counts(file, rows=len(dataset), truncated=too_long, response_cut=response_too_long)
    assert 0 < response_too_long < too_long < len(dataset)


# ------------------------------------------------------------------------- what the template does to what was written


def with_template(template, **options):
    tokenizer = chatml_tokenizer(**options)
    tokenizer.chat_template = template
    return Encoder(tokenizer)


def parts(text, *more):
    return [{"type": "text", "text": part} for part in (text, *more)]


STRINGS_ONLY = {
    "nothing": CHATML.replace("message.content or ''", "message.content if message.content is string else ''"),
    "a Python list": CHATML.replace("message.content or ''", "message.content | trim"),
    "JSON": CHATML.replace(
        "message.content or ''", "message.content if message.content is string else message.content | tojson"
    ),
    "an error": CHATML.replace("message.content or ''", "'' + message.content"),
}
READS_PARTS = CHATML.replace(
    "{{ message.content or '' }}",
    "{%- if message.content is string %}{{ message.content }}{%- else %}"
    "{%- for part in message.content or [] %}{{ '[' + part.text + ']' }}{%- endfor %}{%- endif %}",
)


@pytest.mark.parametrize("template", STRINGS_ONLY.values(), ids=STRINGS_ONLY)
def test_text_parts_are_joined_where_the_template_reads_strings(template):
    encoder = with_template(template)
    strings = encoder.encode_chat([say("user", "two and two?"), say("assistant", "four")])
    listed = [say("user", parts("two ", "and two?")), say("assistant", parts("four"))]
    assert encoder.encode_chat(listed) == strings
    assert encoder.encode(listed[:1], "four") == strings
    row = {"prompt": listed[:1], "chosen": listed[1:], "rejected": [say("assistant", parts("five"))]}
    assert prepare([row], encoder)[0][0]["chosen_ids"] == strings.ids


def test_a_template_that_reads_parts_is_given_parts():
    encoder = with_template(READS_PARTS)
    listed = [say("user", parts("two ", "and two?")), say("assistant", parts("four"))]
    assert shown(encoder, encoder.encode_chat(listed))[0].startswith("<|im_start|>user[two ][and two?]<|im_end|>")


NO_SYSTEM = CHATML.replace("in messages %}<|im", "in messages if message.role != 'system' %}<|im")
LAST_TURNS = CHATML.replace("in messages %}<|im", "in messages[-2:] %}<|im")
SHORTENS = CHATML.replace("message.content or ''", "(message.content or '')[:5]")
NO_CALLS = CHATML.replace("message.tool_calls or []", "[]")


def test_text_that_the_template_drops_is_refused():
    long = [say("system", "be brief"), say("user", "a"), say("assistant", "b"), USER, GOOD]
    call = say("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    for template, messages, words in [
        (NO_SYSTEM, long, r"message 0 \(system\) has the text str 'be brief', and the chat template leaves it out"),
        (LAST_TURNS, long, r"message 0 \(system\)"),
        # "a" stands in the text all the same, as a part of "assistant".
        (LAST_TURNS, [say("user", "a"), GOOD, USER, GOOD], r"message 0 \(user\) has the text str 'a'"),
        (SHORTENS, [say("user", "a long question"), GOOD], r"message 0 \(user\)"),
        (SHORTENS, [USER, say("assistant", "a long answer")], r"message 1 \(assistant\)"),
        (NO_CALLS, [USER, call, say("tool", "4"), GOOD], "message 1 .* has tool calls, and the chat template"),
    ]:
        encoder = with_template(template)
        with pytest.raises(ValueError, match=words):
            encoder.encode_chat(messages)
        rows = [PAIR, {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [say("assistant", "no")]}]
        with pytest.raises(ValueError, match=f"train dataset, row 1, `(chosen|rejected)`: {words}"):
            list(prepare_pairs(stream(rows), encoder)[0])
    # White space that the template takes away, and text that it writes as JSON, are there.
    stripped = with_template(CHATML.replace("message.content or ''", "(message.content or '') | trim"))
    spaced = [say("user", " \n2+2? "), say("assistant", " 4\n")]
    assert stripped.encode_chat(spaced) == stripped.encode_chat([USER, GOOD])
    as_json = with_template(CHATML.replace("message.content or ''", "message.content | tojson"))
    assert '"a \\"b\\"\\n"' in shown(as_json, as_json.encode_chat([say("user", 'a "b"\n'), GOOD]))[0]


def test_thinking_that_the_template_cuts_is_said():
    encoder = with_template(HIDES)
    thinks = [say("assistant", "<think>hm</think>4")]
    assert encoder.encode([USER], thinks).unread == ("thinking",)
    assert encoder.encode([USER], [GOOD]).unread == ()
    assert encoder.encode([USER], thinks).ids == encoder.encode([USER], [GOOD]).ids
    assert Encoder(chatml_tokenizer()).encode([USER], thinks).unread == ()
    beside = [say("assistant", "4", reasoning_content="two and two")]
    assert encoder.encode([USER], beside).unread == ("thinking",)
    for rows in ([PAIR, {**PAIR, "chosen": thinks}], [{**PAIR, "chosen": beside}, PAIR]):
        prepared, counts = prepare(rows, encoder)
        assert (len(prepared), counts.thinking) == (2, 1) and counts.changed
        assert str(counts) == "train: 2 rows, 0 dropped, 0 truncated, 1 whose thinking the chat template leaves out"
    with pytest.raises(ValueError, match="row 0: the two responses differ in their thinking only"):
        prepare([{**PAIR, "chosen": thinks, "rejected": [GOOD]}], encoder)
    # Text that is not thinking, but gone with it, is refused.
    with pytest.raises(ValueError, match="leaves it out or changes it"):
        encoder.encode([USER], "so: <think>hm</think>4")
    # Tools that no template shows.
    llama = Encoder(llama_tokenizer())
    assert llama.encode([USER], [GOOD], tools=[{"name": "f"}]).unread == ("tools",)
    assert prepare([{**PAIR, "tools": '[{"name": "f"}]'}], llama)[1].tools == 1


CHARACTERS = st.text("ab <>\"'\n{}[]4é🙂", min_size=1, max_size=12)
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.lists(CHARACTERS, min_size=1, max_size=3),
        st.booleans(),  # in parts
        st.booleans(),  # thinks
    ),
    min_size=1,
    max_size=5,
)
TEMPLATES = {
    **STRINGS_ONLY,
    **{"chatml": CHATML, "bare": BARE, "hides": HIDES, "thinking": THINKING, "parts": READS_PARTS},
    **{"no system": NO_SYSTEM, "last turns": LAST_TURNS, "shortens": SHORTENS},
}


@settings(max_examples=200, deadline=None)
@given(MESSAGES, CHARACTERS, st.sampled_from(sorted(TEMPLATES)))
def test_whatever_is_written_is_read_or_refused(turns, answer, template):
    """Random conversations: every text stands in the ids, in its order of messages, or the conversation is refused."""
    assume(answer.strip())
    messages = []
    for role, texts, in_parts, thinks in turns:
        texts = (["<think>why</think>"] if thinks and role == "assistant" else []) + texts
        messages.append(say(role, parts(*texts) if in_parts else "".join(texts)))
    if messages[-1]["role"] == "assistant":
        messages.append(USER)
    encoder = TEMPLATE_ENCODERS[template]
    try:
        encoded = encoder.encode(messages, answer)
    except ValueError as error:
        assert template in ("no system", "last turns", "shortens", "hides", "thinking"), error
        return
    written = "".join(encoder.tokenizer.decode(encoded.ids).split())
    for message in [*messages, say("assistant", answer)]:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        for text in ["".join(text.split()) for text in texts]:
            cut = text.split("</think>")[-1]
            as_json = "".join(json.dumps(text, ensure_ascii=False)[1:-1].split())
            assert text in written or as_json in written or ("thinking" in encoded.unread and cut in written)


TEMPLATE_ENCODERS = {name: with_template(template) for name, template in TEMPLATES.items()}


# --------------------------------------------------------------------------------------------- Arrow, bad rows, limits


def call(name, arguments):
    function = {"name": name, "arguments": arguments}
    return [say("assistant", "", tool_calls=[{"type": "function", "function": function}])]


def test_what_arrow_adds_is_taken_away_in_training_and_in_scoring(chatml):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
    other = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int", "minimum": 0}}}}]
    rows = [
        {"prompt": [USER], "chosen": call("weather", {"city": "Rome"}), "rejected": call("weather", {"city": "Oslo"}),
         "tools": tools, "chat_template_kwargs": {"x": {"y": 1}}},
        {"prompt": [USER], "chosen": call("add", {"a": 1}), "rejected": call("add", {"a": 2}),
         "tools": other, "chat_template_kwargs": {"x": {"z": 1}}},
    ]  # fmt: skip
    dataset = datasets.Dataset.from_list(rows)
    assert "null" in json.dumps(dataset[0])  # Arrow's
    encoder = with_template("{{ x | tojson if x is defined else '' }}" + CHATML)
    prepared, _ = prepare_pairs(dataset, encoder)
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            right = encoder.encode(row["prompt"], row[side], row["tools"], **row["chat_template_kwargs"]).ids
            text = encoder.tokenizer.decode(right)
            arguments = json.dumps(row[side][0]["tool_calls"][0]["function"]["arguments"])
            assert "null" not in text and f'"arguments": {arguments}' in text
            assert prepared[i][f"{side}_ids"] == right
            stored = dataset[i]  # what a data set gives to a scorer
            scored = {"prompt": stored["prompt"], "response": stored[side], "tools": stored["tools"],
                      "chat_template_kwargs": stored["chat_template_kwargs"]}  # fmt: skip
            assert encoder.encode_chat(scored).ids == right


def test_all_bad_rows_are_named(chatml):
    rows = [{**TEXT, "chosen": " " if i % 2 else f" {i}"} for i in range(60)]
    with pytest.raises(ValueError) as caught:
        prepare(rows, chatml, name="eval")
    lines = str(caught.value).splitlines()
    assert lines[0] == "30 rows of the eval dataset cannot be used, the first 20 of them:"
    expected = "eval dataset, row {}, `chosen`: the response has no text. Remove the row, or give the response."
    assert lines[1:] == [expected.format(i) for i in range(1, 41, 2)]
    with pytest.raises(ValueError, match="2 rows of the train dataset cannot be used, namely:\n.*row 1.*\n.*row 3"):
        prepare(rows[:4], chatml)
    with pytest.raises(ValueError, match="30 rows.*row 1.*row 39"):  # a stream that is read to its end
        try:
            prepare_pairs(stream(rows), chatml, whole=True)
        except ValueError as error:
            raise ValueError(str(error).replace("\n", " ")) from None
    with pytest.raises(OverlengthError, match="2 rows"):
        prepare([{**TEXT, "chosen": "c" * 20}] * 2, replace(chatml, max_length=10, overlength="error"))


def test_a_stream_read_to_its_end_is_a_dataset(chatml):
    rows = [{**TEXT, "chosen": " c" * n, "margin": float(n)} for n in range(1, 9)]
    encoder = replace(chatml, max_length=15, overlength="drop")
    whole, counts = prepare_pairs(stream(rows), encoder, whole=True)
    expected, expected_counts = prepare(rows, encoder)
    assert isinstance(whole, datasets.Dataset) and whole.to_list() == expected.to_list()
    assert whole.features == expected.features and counts == expected_counts


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_counts_are_true_whoever_reads(workers, chatml):
    from torch.utils.data import DataLoader

    rows = [{**TEXT, "chosen": " c" * (n % 9 + 1), "id": n} for n in range(40)]
    encoder = replace(chatml, max_length=15, overlength="drop")
    _, expected = prepare(rows, encoder)
    source = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    prepared, counts = prepare_pairs(source, encoder)
    loader = DataLoader(prepared, batch_size=4, num_workers=workers, collate_fn=list)
    for _ in range(2):
        assert sum(map(len, loader)) == counts.kept == expected.kept
        assert counts == expected
    next(iter(loader))  # a reading that was given up says less
    assert counts == expected


def test_ids_and_positions_outside_of_the_model_are_refused(chatml):
    size = len(chatml.tokenizer)
    assert prepare([PAIR], chatml, embeddings=size)
    end = chatml.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=rf"row 0, `chosen`: it has the token {size - 1} .* has {size - 1} rows"):
        prepare([PAIR], chatml, embeddings=size - 1)
    with pytest.raises(ValueError, match=rf"row 1, `rejected_ids`: it has the token {end} .'<.im_end.>'."):
        prepare([TOKENS, {**TOKENS, "rejected_ids": [1, end]}], chatml, embeddings=end)
    length = len(chatml.encode([USER], [GOOD]).ids)
    assert prepare([PAIR], chatml, positions=length)
    with pytest.raises(ValueError, match=f"has {length} tokens, and the model has an embedding for {length - 1} pos"):
        prepare([PAIR], chatml, positions=length - 1)


def test_texts_that_are_probably_a_mistake_are_said(chatml):
    as_json = {name: json.dumps(value) for name, value in PAIR.items()}
    with pytest.warns(UserWarning, match="messages written as JSON text"):
        prepare([as_json], chatml)
    with pytest.warns(UserWarning, match="begin with the text of `prompt`"):
        prepare([{"prompt": "2+2?", "chosen": "2+2? 4", "rejected": "2+2? 5"}], chatml)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare([TEXT, {**TEXT, "prompt": "[1, 2]"}], chatml)
        prepare([PAIR], chatml)
