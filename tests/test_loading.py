"""Loading: the folder alone gives the same score in a process that has never heard of us, and a folder that would give
another one is refused, in words that say what is missing and what to do."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_same, byte_tokenizer, multimodal, pad, score, texts, tiny_grm, tiny_lm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.dynamic_module_utils import get_imports

import grm_hf
from grm_hf import GRMConfig, GRMForSequenceClassification


PACKAGE = Path(grm_hf.__file__).parent
SHIPPED = ("configuration_grm", "heads_grm", "modeling_grm")
OLDEST = os.environ.get("GRM_OLDEST_PYTHON")
IDS, MASK = pad(texts(), left=[True, False, True, False])


@pytest.fixture
def folder(tmp_path):
    """A saved reward model, and the scores it gave before it was saved."""
    model = tiny_grm()
    model.save_pretrained(tmp_path / "grm")
    return tmp_path / "grm", score(model, IDS, MASK)


def rewrite(folder, change):
    """Change the weights of a folder: `change` gets the dictionary of tensors."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, **kwargs):
    return GRMForSequenceClassification.from_pretrained(folder, **kwargs)


def lora(model, folder, base_path, **settings):
    """Train nothing, but make every new weight non-zero, and save the adapter as trainers do."""
    peft = pytest.importorskip("peft")
    options = dict(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"], r=2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**options, **settings}))
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.eval().save_pretrained(folder)
    if base_path is not None:
        reconfigure_adapter(folder, base_path)
    return adapted


def reconfigure_adapter(folder, base_path):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base_path)}))


# --------------------------------------------------------------------------------------- processes without the package

STRANGER = """
import json, sys
sys.modules["grm_hf"] = None  # whoever imports it fails
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
job = json.load(open(sys.argv[1]))
ids, mask = torch.tensor(job["ids"]), torch.tensor(job["mask"])
out = {"transformers": transformers.__version__}
for folder in job["untrusted"]:
    for auto in (AutoConfig, AutoModel, AutoModelForSequenceClassification):
        try:
            auto.from_pretrained(folder, trust_remote_code=False)
            out[folder] = "loaded without trust"
        except Exception as error:
            out.setdefault(folder, str(error))
for key, name, folder, again in job["loads"]:
    auto = {"AutoModel": AutoModel, "AutoModelForSequenceClassification": AutoModelForSequenceClassification}[name]
    config = AutoConfig.from_pretrained(job["config"], trust_remote_code=True)
    assert config.model_type == "grm" and config.num_labels == 1
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert not model.training and not info["missing_keys"], info
    with torch.no_grad():
        out[key] = model(ids, attention_mask=mask).logits.squeeze(-1).tolist()
    if again:
        model.save_pretrained(again)
        again = auto.from_pretrained(again, trust_remote_code=True)
        with torch.no_grad():
            out[key + " again"] = again(ids, attention_mask=mask).logits.squeeze(-1).tolist()
print("RESULT" + json.dumps(out))
"""


def stranger(tmp_path, loads, config, untrusted=(), python=sys.executable):
    """Scores from another process, by name: `loads` are (name, Auto class, folder, folder to save to or None)."""
    job = tmp_path / "job.json"
    rows = [[*map(str, row[:3]), row[3] and str(row[3])] for row in loads]
    job.write_text(
        json.dumps(
            dict(
                ids=IDS.tolist(),
                mask=MASK.tolist(),
                loads=rows,
                config=str(config),
                untrusted=[str(path) for path in untrusted],
            )
        )
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-P", "-c", STRANGER, str(job)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT")[1])


PYTHONS = [
    sys.executable,
    pytest.param(
        OLDEST,
        marks=pytest.mark.skipif(
            not OLDEST, reason="GRM_OLDEST_PYTHON names no interpreter with the oldest transformers we declare"
        ),
        id="oldest",
    ),
]


@pytest.mark.parametrize("python", PYTHONS)
def test_a_process_without_the_package_gives_the_same_scores(python, tmp_path):
    wanted, loads = {}, []
    gate = {"attribute_names": ["a", "b"], "attribute_weights": "gate", "attribute_combiner": "geometric"}
    kinds = [("llama", "mlp", {}), ("gpt2", "linear", {}), ("gemma2", "bnrm", {}), ("opt", "mlp", gate)]
    for family, head_type, settings in kinds:
        model = tiny_grm(family, head_type, **settings)
        path = tmp_path / family
        model.save_pretrained(path)
        for auto in ("AutoModel", "AutoModelForSequenceClassification"):
            key = f"{family} {auto}"
            wanted[key] = score(model, IDS, MASK)
            loads.append((key, auto, path, tmp_path / key.replace(" ", "_")))
    adapted = lora(load(tmp_path / "llama"), tmp_path / "adapter", None)
    wanted["adapter"] = score(adapted, IDS, MASK)
    assert (wanted["adapter"] - wanted["llama AutoModel"]).abs().max() > 1e-3
    loads.append(("adapter", "AutoModelForSequenceClassification", tmp_path / "adapter", None))

    out = stranger(tmp_path, loads, tmp_path / "llama", untrusted=[tmp_path / "llama"], python=python)
    assert "trust_remote_code" in out[str(tmp_path / "llama")]
    same_version = python == sys.executable
    for key, rewards in wanted.items():
        for name in (key, f"{key} again"):
            if name == "adapter again":
                continue
            found = torch.tensor(out[name])
            if same_version:
                assert torch.equal(found, rewards), name
            else:  # an older library may add in another order
                torch.testing.assert_close(found, rewards, rtol=1e-6, atol=1e-6)

    # What the other process saved: it has its code again, and loads here and in a third process.
    copies = [row for row in loads if row[3]]
    for key, _, _, path in copies:
        assert {f"{name}.py" for name in SHIPPED} <= set(os.listdir(path))
        assert json.loads((path / "config.json").read_text())["auto_map"] == dict(GRMConfig().auto_map)
        torch.testing.assert_close(score(load(path), IDS, MASK), wanted[key], rtol=1e-6, atol=1e-6)
    third = stranger(tmp_path, [(key, auto, path, None) for key, auto, _, path in copies[:2]], copies[0][3])
    for key, *_ in copies[:2]:
        torch.testing.assert_close(torch.tensor(third[key]), wanted[key], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(
    not OLDEST, reason="GRM_OLDEST_PYTHON names no interpreter with the oldest transformers we declare"
)
def test_oldest_interpreter_has_the_oldest_transformers_we_declare():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    declared = re.search(r"transformers>=(\d+\.\d+)", project).group(1)
    code = "import transformers; print(transformers.__version__)"
    found = subprocess.run([OLDEST, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found.startswith(declared + "."), f"{found} is not {declared}"


def test_after_importing_the_package_no_trust_is_needed_and_our_class_wins(folder):
    path, wanted = folder
    assert isinstance(AutoConfig.from_pretrained(path), GRMConfig)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        for options in ({}, dict(trust_remote_code=True), dict(num_labels=1, dtype=torch.float32)):
            model = auto.from_pretrained(path, **options)
            # The oldest transformers prefers the folder's code when it is trusted; the score is the same.
            assert type(model) is GRMForSequenceClassification or options.get("trust_remote_code")
            assert torch.equal(score(model, IDS, MASK), wanted)
    with pytest.raises(ValueError, match="one number, found 2 labels"):
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    with pytest.raises(ValueError, match="GRMConfig"):
        AutoModelForCausalLM.from_pretrained(path)


def test_folder_says_what_the_auto_classes_and_the_pipeline_need(folder):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["GRMForSequenceClassification"] and config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "REWARD"} and config["model_type"] == "grm"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSequenceClassification"}
    for name in SHIPPED:
        assert (path / f"{name}.py").read_text() == (PACKAGE / f"{name}.py").read_text()
    weights = set(load_file(path / "model.safetensors"))
    assert {key for key in weights if not key.startswith("lm.")} == {
        "score.dense.0.weight",
        "score.dense.0.bias",
        "score.out.weight",
        "score.out.bias",
    }


@pytest.mark.parametrize("head_type", ["mlp", "linear", "bnrm"])
def test_no_path_of_this_machine_is_written(head_type, tmp_path):
    tiny_lm().save_pretrained(tmp_path / "base")
    model = GRMForSequenceClassification.from_base(tmp_path / "base", head_type, head_hidden_size=8)
    assert model.config.base_model is None and not model.name_or_path
    model.save_pretrained(tmp_path / "grm")
    load(tmp_path / "grm").save_pretrained(tmp_path / "again")
    lora(model, tmp_path / "adapter", None)
    for name in ("grm", "again", "adapter"):
        for file in (tmp_path / name).iterdir():
            if file.suffix in (".json", ".jinja"):
                assert str(tmp_path) not in file.read_text(), file
    assert GRMConfig(base_model="org/name").to_dict()["base_model"] == "org/name"


def test_tokenizer_saved_beside_the_model_is_the_bases(tmp_path):
    tokenizer = byte_tokenizer(add_bos=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_grm().save_pretrained(tmp_path / "grm")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "grm")
    text = " a  text\nwith ünïcode </s> and spaces "
    for options in ({}, dict(trust_remote_code=True)):
        loaded = AutoTokenizer.from_pretrained(tmp_path / "grm", **options)
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.pad_token_id == tokenizer.pad_token_id


# ------------------------------------------------------------------------------------------------ checkpoints that lie


def without(prefix):
    def change(weights):
        found = [key for key in weights if key.startswith(prefix)]
        assert found
        for key in found:
            del weights[key]

    return change


def renamed(old, new):
    def change(weights):
        for key in [key for key in weights if key.startswith(old)]:
            weights[key.replace(old, new)] = weights.pop(key)

    return change


def reshaped(key):
    def change(weights):
        weights[key] = weights[key][:-1].contiguous()

    return change


def extra(weights):
    weights["score.dense.1.weight"] = torch.zeros(16, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("score."), r"head lacks \['score.dense.0.bias', .*'score.out.weight'\].*`allow_missing_head=True`"),
        (without("score.out.bias"), r"head lacks \['score.out.bias'\].*`allow_missing_head=True`"),
        (renamed("score.", "v_head."), r"head lacks .*no place for: \['v_head.dense.0.bias'.*renamed\?.*Restore"),
        (without("lm.model.norm"), r"language model lacks \['lm.model.norm.weight'\].*random.*Restore the files"),
        (without("lm.lm_head"), r"language model lacks \['lm.lm_head.weight'\]"),
        (without("lm.model.layers"), "language model lacks .* and more"),
        (renamed("lm.model.layers.1.", "lm.model.layers.7."), r"layers.1.*no place for: .*layers.7.* and more"),
        (reshaped("score.dense.0.weight"), r"another shape.*score.dense.0.weight \(15, 32\), not \(16, 32\).*Restore"),
        (reshaped("lm.lm_head.weight"), r"another shape.*lm.lm_head.weight \(100, 32\), not \(101, 32\)"),
        (extra, r"no place for: \['score.dense.1.weight'\]"),
    ],
)
@pytest.mark.parametrize("auto", [GRMForSequenceClassification, AutoModel, AutoModelForSequenceClassification])
def test_weights_that_do_not_fit_are_refused(change, words, auto, folder):
    path, _ = folder
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"'{re.escape(str(path))}' does not fit its config.json.*{words}"):
        auto.from_pretrained(path)
    if change is not extra and "head lacks" not in words:
        with pytest.raises(ValueError, match=words.replace(".*`allow_missing_head=True`", "")):
            load(path, allow_missing_head=True)


def test_missing_head_is_accepted_on_request_and_drawn_from_the_seed(folder):
    path, _ = folder
    body = {key: value.clone() for key, value in load(path).lm.state_dict().items()}
    rewrite(path, without("score."))

    def head(seed):
        torch.manual_seed(seed)
        model, info = load(path, allow_missing_head=True, output_loading_info=True)
        assert all(torch.equal(value, body[key]) for key, value in model.lm.state_dict().items())
        assert {key.split(".")[0] for key in info["missing_keys"]} == {"score"}
        assert {p.dtype for p in model.score.parameters()} == {torch.float32}
        return model.score.dense[0].weight

    assert torch.equal(head(5), head(5)) and not torch.equal(head(5), head(6))
    assert head(5).abs().max() > 0.15  # torch's own deviation, not the base's 0.02


@pytest.mark.parametrize(
    "changes",
    [
        dict(head_type="linear"),
        dict(head_hidden_size=8),
        dict(head_num_layers=2),
        dict(head_num_layers=1, text_config=dict(num_hidden_layers=1)),
        dict(text_config=dict(hidden_size=64)),
        dict(text_config=dict(vocab_size=90)),
    ],
)
def test_configuration_that_is_not_that_of_the_weights_is_refused(changes, folder):
    path, _ = folder
    text_config = json.loads((path / "config.json").read_text())["text_config"]
    reconfigure(path, **{**changes, "text_config": {**text_config, **changes.get("text_config", {})}})
    with pytest.raises(ValueError, match="does not fit its config.json"):
        load(path)


def test_a_head_with_more_layers_than_the_configuration_says_is_not_cut_short(tmp_path):
    model = GRMForSequenceClassification.from_base(tiny_lm(), head_hidden_size=16, head_num_layers=2)
    model.save_pretrained(tmp_path)
    reconfigure(tmp_path, head_num_layers=1)
    with pytest.raises(ValueError, match=r"no place for: \['score.dense.1.bias', 'score.dense.1.weight'\]"):
        load(tmp_path)


def test_sharded_checkpoints(tmp_path):
    model = tiny_grm()
    model.save_pretrained(tmp_path, max_shard_size="30kB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(score(load(tmp_path), IDS, MASK), score(model, IDS, MASK))
    held = tmp_path / "held"
    shards[1].rename(held)
    with pytest.raises((OSError, ValueError), match=re.escape(shards[1].name)):
        load(tmp_path)
    # The shard left out of the index as well, as an interrupted upload leaves it.
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != shards[1].name}
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not fit its config.json.*would be random"):
        load(tmp_path)


def test_configuration_without_its_text_part_is_refused_before_anything_is_built(folder, never_built):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    del config["text_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no `text_config`"):
        load(path)


# ------------------------------------------------------------------------------------ folders that hold something else


@pytest.fixture
def never_built(monkeypatch):
    """Whatever builds a model fails the test: a default text configuration is one of 7 billion weights."""

    def built(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(GRMForSequenceClassification, "__init__", built)
    monkeypatch.setattr("transformers.LlamaModel.__init__", built)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", built)


def test_a_base_is_refused_before_anything_is_built(tmp_path, never_built):
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    words = rf"type 'llama', not a reward model.*no reward head.*from_base\('{re.escape(str(tmp_path))}'\)"
    with pytest.raises(ValueError, match=words):
        load(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path), config=GRMConfig())
    with pytest.raises(ValueError, match=words):
        GRMConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(tmp_path, allow_missing_head=True)


def test_reward_models_are_not_bases(folder, never_built):
    path, _ = folder
    with pytest.raises(ValueError, match=r"\(grm\) is a reward model already.*`from_pretrained`"):
        GRMForSequenceClassification.from_base(path)


SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: multimodal("llava"), r"\(llava\) is multimodal.*text-only.*copy its text model out.*from_base"),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), r"\(bert\) is no decoder.*causal language model"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=9)
            ),
            r"\(t5\) is no decoder.*causal language model",
        ),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=9, max_position_embeddings=8)
            ),
            r"\(bart\) is no decoder.*causal language model",
        ),
        (
            lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, tie_word_embeddings=True, pad_token_id=0)),
            "holds a classifier .LlamaForSequenceClassification.*AutoModelForCausalLM",
        ),
    ],
    ids=["llava", "bert", "t5", "bart", "classifier"],
)
def test_folders_that_are_no_base_are_refused_before_anything_is_built(make, words, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr(GRMForSequenceClassification, "__init__", None)
    with pytest.raises(ValueError, match=words):
        GRMForSequenceClassification.from_base(tmp_path)
    with pytest.raises(ValueError, match="not a reward model of type 'grm'"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_multimodal_folder_gives_its_text_model_where_the_auto_class_knows_it(kind, tmp_path):
    """AutoModelForCausalLM gives a text-only class for Qwen 3.5, and for Gemma 3 the complete model."""
    full = multimodal(kind)
    full.save_pretrained(tmp_path / "base")
    model = GRMForSequenceClassification.from_base(tmp_path / "base", head_hidden_size=16).eval()
    assert model.config.text_config is model.lm.config is model.model.config
    assert model.config.text_config.model_type == full.config.get_text_config().model_type
    with torch.no_grad():
        wanted = full(IDS, attention_mask=MASK).logits
        out = model(IDS, attention_mask=MASK, return_lm_logits=True)
        torch.testing.assert_close(out.lm_logits[MASK.bool()], wanted[MASK.bool()], rtol=0, atol=1e-5)
    assert model.lm_head_is_exact() and not any("vision" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path / "grm")
    assert_same(score(load(tmp_path / "grm"), IDS, MASK), out.logits.squeeze(-1))


def test_base_with_code_of_its_own_is_refused_in_one_true_sentence(tmp_path):
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    (tmp_path / "code.py").write_text(
        code + "class C(LlamaConfig):\n    model_type = 'own'\nclass M(LlamaForCausalLM): ...\n"
    )
    tiny_lm().save_pretrained(tmp_path)
    reconfigure(tmp_path, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    assert GRMForSequenceClassification.from_base(tmp_path).lm_head_is_exact()  # a llama, by transformers' own code
    with pytest.raises(ValueError, match="code of its own.*knows the type 'llama': leave `trust_remote_code` out"):
        GRMForSequenceClassification.from_base(tmp_path, trust_remote_code=True)
    reconfigure(tmp_path, model_type="own")
    for trust in (None, True):
        with pytest.raises(ValueError, match="modelling code of its own.*does not know the type 'own': pass a base"):
            GRMForSequenceClassification.from_base(tmp_path, trust_remote_code=trust)


def test_every_hub_argument_reaches_configuration_and_weights(tmp_path, monkeypatch):
    """`subfolder` shows it on disk; what goes to the Hub is asked of the two calls that go there."""
    tiny_lm().save_pretrained(tmp_path / "part")
    tiny_lm("gpt2").save_pretrained(tmp_path)
    assert GRMForSequenceClassification.from_base(tmp_path, subfolder="part").lm.config.model_type == "llama"
    asked = {}
    hub = dict(revision="abc", subfolder="part", cache_dir=str(tmp_path / "c"), token="t", local_files_only=True)
    monkeypatch.setattr("grm_hf.modeling_grm.find_adapter_config_file", lambda path, **kw: asked.update(adapter=kw))
    monkeypatch.setattr(
        "grm_hf.modeling_grm.PretrainedConfig.get_config_dict", lambda path, **kw: (asked.update(fields=kw) or {}, {})
    )
    config = lambda path, **kw: asked.update(config=kw) or LlamaConfig(**SMALL)  # noqa: E731
    weights = lambda path, **kw: asked.update(weights=kw) or (tiny_lm(), {"missing_keys": []})  # noqa: E731
    monkeypatch.setattr("grm_hf.modeling_grm.AutoConfig.from_pretrained", config)
    monkeypatch.setattr("grm_hf.modeling_grm.AutoModelForCausalLM.from_pretrained", weights)
    for gguf in ({}, {"gguf_file": "weights.gguf"}):
        asked.clear()
        GRMForSequenceClassification.from_base("someone/some-model", **hub, **gguf)
        assert asked["config"] == hub | gguf
        assert asked["weights"] == hub | gguf | {"output_loading_info": True} and asked["adapter"] == hub
        assert ("fields" in asked) is not bool(gguf)


def test_gguf_file_makes_an_ordinary_folder(tmp_path):
    gguf_files = pytest.importorskip("gguf_files", reason="needs gguf")
    lm = tiny_lm("llama_tied", hidden_size=32, num_key_value_heads=4)
    gguf_files.write_gguf(tmp_path / "weights.gguf", lm, tokenizer=False)
    model = GRMForSequenceClassification.from_base(tmp_path, gguf_file="weights.gguf", head_hidden_size=16).eval()
    with torch.no_grad():
        wanted = lm(IDS, attention_mask=MASK).logits
        out = model(IDS, attention_mask=MASK, return_lm_logits=True)
    torch.testing.assert_close(out.lm_logits[MASK.bool()], wanted[MASK.bool()], rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "grm")
    assert "quantization_config" not in (tmp_path / "grm" / "config.json").read_text()
    assert_same(score(load(tmp_path / "grm"), IDS, MASK), out.logits.squeeze(-1))
    model.lm.save_pretrained(tmp_path / "base")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base") is not None


def test_a_subclass_is_saved_with_the_code_of_this_class(tmp_path, monkeypatch):
    """transformers would copy the subclass's file and what it imports, and stops at `from ..`."""
    package = tmp_path / "theirs" / "models"
    package.mkdir(parents=True)
    (tmp_path / "theirs" / "__init__.py").touch()
    (tmp_path / "theirs" / "names.py").write_text("NAME = 'theirs'\n")
    (package / "__init__.py").touch()
    (package / "reward.py").write_text(
        "from grm_hf import GRMConfig, GRMForSequenceClassification\nfrom ..names import NAME\n"
        "class Config(GRMConfig): ...\n"
        "class Reward(GRMForSequenceClassification):\n    config_class = Config\n    name = NAME\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from theirs.models.reward import Config, Reward

    model = Reward(Config(tiny_lm().config, head_hidden_size=16), lm=tiny_lm()).eval()
    model.save_pretrained(tmp_path / "grm")
    assert {f"{name}.py" for name in SHIPPED} <= set(os.listdir(tmp_path / "grm"))
    assert "reward.py" not in os.listdir(tmp_path / "grm")
    wanted = score(model, IDS, MASK)
    assert torch.equal(score(Reward.from_pretrained(tmp_path / "grm"), IDS, MASK), wanted)
    assert torch.equal(score(load(tmp_path / "grm"), IDS, MASK), wanted)
    out = stranger(tmp_path, [("grm", "AutoModel", tmp_path / "grm", None)], tmp_path / "grm")
    assert torch.equal(torch.tensor(out["grm"]), wanted)
    with pytest.raises(ValueError, match="is a subclass. Save it to a folder, and push that folder"):
        model.save_pretrained(tmp_path / "grm", push_to_hub=True)


def test_base_that_lacks_weights_is_refused(tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    rewrite(tmp_path, without("model.layers.1.mlp.up_proj"))
    with pytest.raises(ValueError, match=r"lacks 1 weights.*'model.layers.1.mlp.up_proj.weight'.*random"):
        GRMForSequenceClassification.from_base(tmp_path)
    tiny_lm().model.save_pretrained(tmp_path)  # a decoder without its head
    with pytest.raises(ValueError, match=r"lacks 1 weights.*'lm_head.weight'.*complete causal language model"):
        GRMForSequenceClassification.from_base(tmp_path)


def test_missing_folders_say_so(tmp_path):
    for call in (load, GRMForSequenceClassification.from_base):
        with pytest.raises((OSError, ValueError), match="nowhere"):
            call(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("auto", [GRMForSequenceClassification, AutoModelForSequenceClassification])
@pytest.mark.parametrize("head_type", ["mlp", "linear", "bnrm"])
def test_adapter_folder_loads_with_its_head(auto, head_type, tmp_path):
    tiny_grm(head_type=head_type).save_pretrained(tmp_path / "grm")
    adapted = lora(load(tmp_path / "grm"), tmp_path / "adapter", None, lora_dropout=0.5)
    wanted = score(adapted, IDS, MASK)
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is GRMForSequenceClassification and not any(m.training for m in loaded.modules())
    assert_same(score(loaded, IDS, MASK), wanted)
    assert (score(load(tmp_path / "grm"), IDS, MASK) - wanted).abs().min() > 1e-4
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(score(load(tmp_path / "merged"), IDS, MASK), wanted, rtol=1e-6, atol=1e-6)


def test_peft_may_ask_whether_layers_are_checkpointed(recwarn):
    model = tiny_grm()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert not [str(w.message) for w in recwarn if "is_gradient_checkpointing" in str(w.message)]


def test_every_linear_layer_but_the_heads_gets_an_adapter(tmp_path):
    tiny_grm().save_pretrained(tmp_path)
    adapted = lora(load(tmp_path), tmp_path / "adapter", None, target_modules="all-linear")
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert len(names) == 14 and not any("score" in name or "lm_head" in name for name in names)
    assert torch.equal(score(load(tmp_path / "adapter"), IDS, MASK), score(adapted, IDS, MASK))


@pytest.mark.parametrize("auto", [GRMForSequenceClassification, AutoModelForSequenceClassification])
def test_adapter_whose_reward_model_lacks_weights_is_refused(auto, tmp_path):
    """transformers reports on the adapter only: a body with random weights would go unnoticed."""
    tiny_grm().save_pretrained(tmp_path / "grm")
    lora(load(tmp_path / "grm"), tmp_path / "adapter", None)
    rewrite(tmp_path / "grm", without("lm.model.layers.1.mlp.up_proj"))
    with pytest.raises(ValueError, match="language model lacks .'lm.model.layers.1.mlp.up_proj.weight'"):
        auto.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("part", ["score", "layers.1.self_attn.q_proj.lora_A"])
def test_adapter_that_lacks_weights_is_refused(part, tmp_path):
    tiny_grm().save_pretrained(tmp_path / "grm")
    lora(load(tmp_path / "grm"), tmp_path / "adapter", None)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    kept = {key: value for key, value in weights.items() if part not in key}
    assert 0 < len(kept) < len(weights)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s)adapter' does not fit.*lacks.*{re.escape(part)}.*Restore"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("head_type", ["mlp", "linear", "bnrm"])
def test_adapter_on_a_raw_base_is_refused(head_type, tmp_path):
    tiny_lm().save_pretrained(tmp_path / "base")
    model = GRMForSequenceClassification.from_base(tmp_path / "base", head_type, head_hidden_size=8)
    lora(model, tmp_path / "adapter", None)
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not recorded, "naming the raw base would load a stock classifier without the adapter"
    with pytest.raises(
        ValueError, match="adapter.*does not say.*`from_pretrained`, then the adapter with `peft.PeftModel"
    ):
        load(tmp_path / "adapter")
    with pytest.raises((ValueError, OSError, TypeError, AttributeError)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    reconfigure_adapter(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ValueError, match="adapter.*trained on '.*base', which is no reward model.*`peft.PeftModel"):
        load(tmp_path / "adapter")
    reconfigure_adapter(tmp_path / "adapter", tmp_path / "gone")
    with pytest.raises(ValueError, match="adapter.*trained on '.*gone', which is no reward model.*`peft.PeftModel"):
        load(tmp_path / "adapter")


def test_what_the_adapter_message_says_works(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_grm().save_pretrained(tmp_path / "grm")
    adapted = lora(load(tmp_path / "grm"), tmp_path / "adapter", tmp_path / "gone")
    model = peft.PeftModel.from_pretrained(load(tmp_path / "grm"), tmp_path / "adapter")
    assert torch.equal(score(model.eval(), IDS, MASK), score(adapted, IDS, MASK))


def test_loaded_adapter_is_saved_and_loaded_as_an_adapter(tmp_path):
    tiny_grm().save_pretrained(tmp_path / "grm")
    wanted = score(lora(load(tmp_path / "grm"), tmp_path / "adapter", None), IDS, MASK)
    model, info = load(tmp_path / "adapter", output_loading_info=True)
    assert not any(info.values()) and not any("lora" in n and p.requires_grad for n, p in model.named_parameters())
    model.save_pretrained(tmp_path / "again")
    assert "model.safetensors" not in os.listdir(tmp_path / "again")
    reconfigure_adapter(tmp_path / "again", tmp_path / "grm")
    assert torch.equal(score(load(tmp_path / "again"), IDS, MASK), wanted)


def test_adapter_of_a_bfloat16_model(tmp_path):
    tiny_grm("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path / "grm")
    adapted = lora(load(tmp_path / "grm"), tmp_path / "adapter", None, target_modules=["c_attn"], fan_in_fan_out=True)
    loaded = load(tmp_path / "adapter")
    assert loaded.dtype == torch.bfloat16 and {p.dtype for p in loaded.score.parameters()} == {torch.float32}
    assert_same(score(loaded, IDS, MASK), score(adapted, IDS, MASK))


def test_folder_with_a_model_and_an_adapter_is_refused(tmp_path):
    tiny_grm().save_pretrained(tmp_path / "grm")
    lora(load(tmp_path / "grm"), tmp_path / "adapter", None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, tmp_path / "grm" / name)
    for auto in (GRMForSequenceClassification, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match="both a model and an adapter"):
            auto.from_pretrained(tmp_path / "grm")


def test_an_adapter_is_no_base(tmp_path):
    tiny_lm().save_pretrained(tmp_path / "base")
    peft = pytest.importorskip("peft")
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(target_modules=["q_proj"], r=2)
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter.*merge_and_unload"):
        GRMForSequenceClassification.from_base(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, tmp_path / "base" / name)
    with pytest.raises(ValueError, match="both a model and an adapter.*move one away"):
        GRMForSequenceClassification.from_base(tmp_path / "base")


# ---------------------------------------------------------------------------------------------- rules of shipped files


def imports(path):
    """`(level, module)` of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_torch_transformers_and_each_other(name):
    for level, module in imports(PACKAGE / f"{name}.py"):
        if level:
            assert level == 1 and module in SHIPPED, f"from {'.' * level}{module}: flat, by name, and shipped"
        else:
            top = module.split(".")[0]
            assert top in {"torch", "transformers", "peft"} or top in sys.stdlib_module_names, module
    # What transformers demands before it loads the file: not peft, which is imported in a `try`, where it is needed.
    assert set(get_imports(PACKAGE / f"{name}.py")) - sys.stdlib_module_names <= {"torch", "transformers"}


@pytest.mark.parametrize("name", SHIPPED)
def test_no_other_line_of_a_shipped_file_looks_like_a_relative_import(name):
    """transformers finds them by pattern, in docstrings too, and fails the save when the file does not exist."""
    text = (PACKAGE / f"{name}.py").read_text()
    looks_like = re.findall(r"^\s*(?:from\s+\.(\S*)\s+import|import\s+\.(\S+))", text, flags=re.MULTILINE)
    real = [module for level, module in imports(PACKAGE / f"{name}.py") if level]
    assert sorted(a or b for a, b in looks_like) == sorted(real)


def test_public_names_import_and_heavy_ones_come_late():
    code = (
        "import sys, grm_hf\n"
        "heavy = {'trl', 'peft', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(grm_hf.__all__) <= set(dir(grm_hf)), set(grm_hf.__all__) - set(dir(grm_hf))\n"
        "try:\n    grm_hf.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
