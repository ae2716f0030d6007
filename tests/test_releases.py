"""Alive on every release: no line of ours uses a name that a library has deprecated, nothing holds a library back, and
what the suite has passed with is said where people look."""

import logging
import re
import tomllib
import warnings
from pathlib import Path

import pytest
import tested
import torch
import transformers
from tiny import ODD_FAMILIES, chatml_tokenizer, pad, score, texts, tiny_grm, tiny_lm

from grm_hf import GRMForSequenceClassification, GRMScorer
from grm_hf.modeling_grm import CACHE


ROOT = Path(__file__).resolve().parents[1]
UNPINNED = ("transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub", "gradio", "evaluate")
# Lines of other libraries: peft 0.21 and TRL 1.16 use names of their own time.
THEIRS = re.compile(r"/(peft|trl|accelerate|torch)/")


@pytest.fixture
def strict(monkeypatch):
    """Whatever transformers says about a deprecated name becomes an error, however it says it."""

    def refuse(self, message, *args, **kwargs):
        if "deprecat" in str(message).lower():
            raise AssertionError(f"{self.name}: {message}")

    for name in ("warning", "warning_once"):
        monkeypatch.setattr(logging.Logger, name, refuse)
    inner = warnings.showwarning

    def show(message, category, filename, *rest):
        if issubclass(category, (FutureWarning, DeprecationWarning)) and not THEIRS.search(filename):
            raise AssertionError(f"{filename}: {message}")
        inner(message, category, filename, *rest)

    monkeypatch.setattr(warnings, "showwarning", show)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def test_the_check_itself_sees_both_kinds(strict):
    with pytest.raises(AssertionError, match="is deprecated"):
        transformers.utils.logging.get_logger("transformers").warning_once("`x` is deprecated")
    with pytest.raises(AssertionError, match="is deprecated"):
        warnings.warn("`x` is deprecated", FutureWarning, stacklevel=1)
    if CACHE == "cache":
        with pytest.raises(AssertionError, match="deprecated"):
            tiny_lm()(texts()[0][None], use_cache=True).past_key_values  # noqa: B018


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "qwen3_moe", *ODD_FAMILIES])
def test_a_models_life_uses_no_deprecated_name(family, strict, tmp_path):
    model = tiny_grm(family)
    ids, mask = pad(texts(), left=False)
    inputs = dict(input_ids=ids, attention_mask=mask)
    model(**inputs, return_lm_logits=True, output_hidden_states=True, use_cache=True)
    model(**inputs, return_dict=False)
    model(**inputs, labels=torch.zeros(4), lm_fn=lambda hidden, m: m.lm_logits(hidden)).loss.backward()
    assert model.lm_head_is_exact()
    if family in ("llama", "gpt2", "opt"):
        for name in ("cache", "past_key_values"):  # whichever name the caller uses
            prompt = model(**inputs, use_cache=True)[CACHE]
            model(ids, attention_mask=torch.cat([mask, mask], 1), **{name: prompt})
    model.generate(ids[:1, :4], attention_mask=mask[:1, :4], max_new_tokens=2)
    model.resize_token_embeddings(104, mean_resizing=False)
    model.save_pretrained(tmp_path)
    score(GRMForSequenceClassification.from_pretrained(tmp_path), ids, mask)


def test_scoring_uses_no_deprecated_name(strict):
    tokenizer = chatml_tokenizer()
    model = tiny_grm(vocab_size=len(tokenizer), max_position_embeddings=512)
    scorer = GRMScorer(model, tokenizer)
    chats = [{"prompt": "one two three four five", "response": answer} for answer in ("six", "seven", "nine ten")]
    assert len(scorer.score(chats)) == 3 and scorer.best_of_n("one", ["two", "three"]).best in ("two", "three")


@pytest.mark.trainer
@pytest.mark.parametrize("regularizer", ["sft", "dpo_noref"])
def test_training_uses_no_deprecated_name(regularizer, strict, tmp_path):
    pytest.importorskip("trl", reason="needs the extra `train`")
    from trainers import grm, pairs, trainer

    run = trainer(tmp_path, grm(0), alpha=0.5, regularizer=regularizer, evaluation=pairs(4, seed=3))
    run.train()
    run.evaluate()
    run.save_model()


# ------------------------------------------------------------------------------------------------ what is held back


def test_nothing_holds_a_library_back():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for name, lines in extras.items() if name != "ppo" for line in lines)]
    for line in asked:
        name = re.split(r"[\[<>=~!; ]", line)[0].lower().replace("-", "_")
        assert name not in UNPINNED or not re.search(r"<|==|~=|!=", line), line
    pins = (ROOT / "constraints-test.txt").read_text()
    assert re.search(r"^torch==", pins, re.M)
    assert not [name for name in UNPINNED if re.search(rf"^{name}\b", pins, re.M | re.I)]
    makefile = (ROOT / "Makefile").read_text()
    gating = makefile.split(".venv/dev-$(TODAY).done:")[1].split("\n\n")[0]
    assert "--upgrade" in gating and set(re.findall(r"constraints\S*\.txt", gating)) == {"constraints-test.txt"}
    for name in UNPINNED:  # the demo's libraries stay what they were
        assert re.search(rf"^{name}==", (ROOT / "constraints.txt").read_text(), re.M), name


# ------------------------------------------------------------------------------------------------ what is said


def test_readme_has_the_range_that_passed():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(tested.MARK)]
    assert lines == [tested.line(tested.recorded())]
    for name in UNPINNED:
        assert f"{name} " in lines[0]


def test_the_line_goes_from_the_oldest_to_the_newest():
    record = {"transformers": ["5.9.0", "4.57.6", "5.10.0", "4.51.0"], "trl": ["1.16.0"]}
    assert tested.line(record) == (
        "Tested with transformers 5.9.0 to 5.10.0 (saved models load on 4.57.6 and 4.51.0), trl 1.16.0 "
        "(`make test` writes this line)."
    ).replace("4.57.6 and 4.51.0", "4.51.0 and 4.57.6")


def test_a_release_that_is_newer_is_called_by_its_name(monkeypatch, tmp_path):
    (tmp_path / "tested.json").write_text('{"transformers": ["5.9.0"], "trl": ["99.0.0"]}')
    monkeypatch.setattr(tested, "RECORD", tmp_path / "tested.json")
    monkeypatch.setattr(tested, "installed", lambda: {"transformers": "5.10.0", "trl": "1.2.0", "peft": "0.21.2"})
    assert tested.newer() == [
        "transformers 5.10.0 (the suite last passed with 5.9.0)",
        "peft 0.21.2 (the suite last passed with 0)",
    ]


def test_what_passed_is_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tested, "RECORD", tmp_path / "tested.json")
    monkeypatch.setattr(tested, "README", tmp_path / "README.md")
    (tmp_path / "tested.json").write_text('{"transformers": ["5.0.0"]}')
    (tmp_path / "README.md").write_text("a\nTested with nothing.\nb\n")
    (tmp_path / ".venv-rewardbench" / "transformers-4").mkdir(parents=True)
    here = {"": {"transformers": "5.24.0", "trl": "1.16.0"}, "old": {"transformers": "4.57.6", "trl": "0.24.0"}}
    monkeypatch.setattr(tested, "installed", lambda python, path: here["old" if "rewardbench" in python else ""])
    tested.main([str(tmp_path / ".venv"), str(tmp_path / ".venv-rewardbench")])
    wanted = (
        "Tested with transformers 5.0.0 to 5.24.0 (saved models load on 4.57.6), trl 1.16.0 "
        "(`make test` writes this line)."
    )
    assert (tmp_path / "README.md").read_text() == f"a\n{wanted}\nb\n" and wanted in capsys.readouterr().out
    assert tested.recorded() == {"transformers": ["4.57.6", "5.0.0", "5.24.0"], "trl": ["1.16.0"]}
