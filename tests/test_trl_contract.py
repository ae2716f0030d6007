"""What users of TRL's `RewardTrainer` count on, on our classes; and each documented difference (docs/differences.md).
Written anew after what TRL's own tests of that trainer look at."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from tiny import CHATML, byte_tokenizer, chatml_tokenizer, tiny_lm
from trainers import TOKENIZER, base, grm, logged, lora, pairs, rows, settings, trainer


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset, DatasetDict  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForSequenceClassification, LlamaConfig  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMRewardTrainer  # noqa: E402


pytestmark = pytest.mark.trainer

DIFFERENCES = (Path(__file__).resolve().parents[1] / "docs" / "differences.md").read_text(encoding="utf-8")
KINDS = ["none", "sft"]


def text_rows(count=16):
    texts = [{name: value[0]["content"] for name, value in row.items()} for row in rows(count)]
    return [{"prompt": row["prompt"] + "\n", "chosen": row["chosen"], "rejected": row["rejected"]} for row in texts]


FORMATS = {
    "text": lambda: text_rows(),
    "text, implicit prompt": lambda: [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in text_rows()
    ],
    "messages": lambda: rows(),
    "messages, implicit prompt": lambda: [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows()
    ],
}


def moved(run):
    """Names of the parameters that training changes, and of those that it leaves."""
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    run.train()
    assert run.state.log_history[-1]["train_loss"] is not None
    changed = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    return changed, before.keys() - changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_trains_every_parameter(tmp_path, form, kind):
    run = trainer(tmp_path, data=Dataset.from_list(FORMATS[form]()), regularizer=kind, alpha=0.5)
    _, still = moved(run)
    assert still == ({"lm.lm_head.weight"} if kind == "none" else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing(tmp_path, adapter, reentrant, kind):
    more = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    config = LoraConfig() if adapter else None
    run = trainer(tmp_path, peft_config=config, gradient_checkpointing=True, regularizer=kind, alpha=0.5, **more)
    changed, still = moved(run)
    trained = {name for name, value in run.model.named_parameters() if value.requires_grad}
    # The gradient of a bias of the head may cancel between the two sides.
    rest = {name for name in trained & still if "score." not in name or name.endswith("weight")}
    assert rest == ({"lm.lm_head.weight"} if kind == "none" and not adapter else set())
    assert changed <= trained


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_adapters_on_named_experts(tmp_path, family):
    """`score` among the targets is trained in full, as it always is here."""
    targets = ["gate_proj", "up_proj", "down_proj", "score"] if family == "qwen3_moe" else ["w1", "w2", "w3", "score"]
    model = GRMForSequenceClassification.from_base(tiny_lm(family, vocab_size=len(TOKENIZER)), head_hidden_size=8)
    run = trainer(tmp_path, model, peft_config=LoraConfig(target_modules=targets), max_length=60)
    changed, _ = moved(run)
    assert any("experts" in name and "lora_B" in name for name in changed)
    assert any("score.modules_to_save" in name for name in changed)
    assert all("lora_" in name or "score.modules_to_save" in name for name in changed)


def test_the_old_names_of_tokenised_columns(tmp_path):
    prepared = trainer(tmp_path).train_dataset.remove_columns(["chosen_start", "rejected_start"])
    old = prepared.rename_columns({f"{side}_ids": f"{side}_input_ids" for side in ("chosen", "rejected")})
    for data in (prepared, old):
        run = trainer(tmp_path, data=data, regularizer="none")
        assert run.train_dataset["chosen_ids"][:] == prepared["chosen_ids"][:]
        assert "chosen_input_ids" not in run.train_dataset.column_names
        run.train()


def test_evaluation_sets_of_every_kind(tmp_path):
    data, tested = pairs(), pairs(6, seed=1)
    common = {"eval_strategy": "steps", "eval_steps": 2, "regularizer": "none"}
    one = trainer(tmp_path / "a", data=data, evaluation=tested, **common)
    one.train()
    expected = logged(one, "eval_loss")
    for sets in (DatasetDict(x=tested, y=tested), {"x": tested, "y": tested.to_iterable_dataset()}):
        run = trainer(tmp_path / "b", data=data, evaluation=sets, **common)
        run.train()
        assert logged(run, "eval_x_loss") == logged(run, "eval_y_loss") == expected
    assert one.evaluate(eval_dataset=tested)["eval_loss"] == expected[-1]  # as it was given, not tokenised


def test_own_metrics(tmp_path):
    extra = {"compute_metrics": lambda prediction: {"mine": 0.123}}
    run = trainer(tmp_path, evaluation=pairs(6), eval_strategy="steps", eval_steps=2, extra=extra)
    run.train()
    assert logged(run, "eval_mine") == [0.123, 0.123]


def test_a_template_of_a_file_and_one_of_another_tokenizer(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(CHATML.replace("<|im_start|>", "@"))
    plain = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>", special=["<|im_start|>"])  # no template
    data = pairs()
    run = GRMRewardTrainer(
        model=grm(),
        args=settings(tmp_path / "a", chat_template_path=str(file), save_strategy="steps", save_steps=4, alpha=0.5),
        train_dataset=data,
        processing_class=plain,
    )
    run.train()
    assert (tmp_path / "a" / "checkpoint-4" / "chat_template.jinja").read_text() == file.read_text()
    source = chatml_tokenizer(special=["<|im_start|>", "<|extra|>"])
    source.save_pretrained(tmp_path / "source")
    run = GRMRewardTrainer(
        model=grm(),
        args=settings(tmp_path / "b", chat_template_path=str(tmp_path / "source"), alpha=0.5),
        train_dataset=data,
        processing_class=byte_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>", special=["<|im_start|>"]),
    )
    run.train()
    run.save_model()
    found = GRMForSequenceClassification.from_pretrained(tmp_path / "b")
    assert found.config.vocab_size == len(run.processing_class) > len(TOKENIZER)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_template_whose_new_tokens_the_data_hold(tmp_path, adapter, kind):
    """The tokens that the template writes come with it: the model's embedding grows before the rows are checked."""
    source = chatml_tokenizer(special=["<|im_start|>", "<|role|>"])
    source.chat_template = CHATML.replace("<|im_start|>", "<|role|>")
    source.save_pretrained(tmp_path / "source")
    plain = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>")
    special = {"eos_token_id": plain.eos_token_id, "pad_token_id": plain.pad_token_id}
    model = GRMForSequenceClassification.from_base(tiny_lm(vocab_size=len(plain), **special), head_hidden_size=8)
    run = GRMRewardTrainer(
        model=model,
        args=settings(
            tmp_path / "run",
            chat_template_path=str(tmp_path / "source"),
            max_length=60,
            regularizer=kind,
            alpha=0.5,
        ),
        train_dataset=pairs(),
        eval_dataset=pairs(4, seed=1),
        processing_class=plain,
        peft_config=LoraConfig() if adapter else None,
    )
    used = max(max(run.train_dataset[i]["chosen_ids"]) for i in range(16))
    assert run.processing_class.convert_ids_to_tokens(used) == "<|role|>" and used >= 258
    run.train()
    run.evaluate(pairs(4, seed=2))
    run.save_model()
    assert GRMForSequenceClassification.from_pretrained(tmp_path / "run").config.vocab_size > used


def test_the_tokenizer_of_a_live_model_is_that_of_its_base(tmp_path):
    base().save_pretrained(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    model = GRMForSequenceClassification.from_base(tmp_path / "lm", head_hidden_size=8)
    run = GRMRewardTrainer(model=model, args=settings(tmp_path / "run"), train_dataset=pairs())
    assert run.processing_class.get_vocab() == TOKENIZER.get_vocab()
    run.save_model()
    assert str(tmp_path) not in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize("config", [None, LoraConfig()], ids=["full", "lora"])
def test_tags(tmp_path, config):
    run = trainer(tmp_path, peft_config=config)
    assert {"trl", "reward-trainer"} <= set(run.model.model_tags)


def test_dtype_of_the_body(tmp_path):
    folder = tmp_path / "lm"
    base().save_pretrained(folder)
    args = settings(tmp_path / "run", model_init_kwargs={"dtype": torch.float16}, alpha=0.5)
    run = GRMRewardTrainer(model=folder, args=args, train_dataset=pairs(), processing_class=TOKENIZER)
    assert {parameter.dtype for parameter in run.model.lm.parameters()} == {torch.float16}
    run.train()
    assert {parameter.dtype for parameter in run.model.lm.parameters()} == {torch.float16}


def test_the_command_with_an_adapter(tmp_path, capsys):
    """`--use_peft` names no targets; a YAML of `trl reward` works as it is."""
    from grm_hf.cli import main

    base().save_pretrained(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    pairs().to_json(tmp_path / "pairs.jsonl")
    (tmp_path / "reward.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'lm'}\ndataset_name: {tmp_path / 'pairs.jsonl'}\n"
        f"output_dir: {tmp_path / 'run'}\n"
        "use_peft: true\nmax_steps: 2\nreport_to: none\nuse_cpu: true\nbf16: false\neval_strategy: 'no'\n"
    )
    assert main(["train", "--config", str(tmp_path / "reward.yaml")]) == 0, capsys.readouterr().err
    saved = GRMForSequenceClassification.from_pretrained(tmp_path / "run")
    assert {"q_proj", "v_proj"} == {name.split(".")[-4] for name, _ in saved.named_parameters() if "lora_A" in name}


# --------------------------------------------------------------------------------------------------------- differences


def difference(number, *words):
    """The line of docs/differences.md, section "Trainer", that says this."""
    section = DIFFERENCES.split("## Trainer")[1].split("\n## ")[0]
    line = re.search(rf"^{number}\. .*(\n +.*)*", section, re.M)[0]
    assert all(word in line for word in words), line


def test_the_head_stays_in_float32(tmp_path):
    difference(1, "float32", "reward head")
    model = GRMForSequenceClassification.from_base(base().to(torch.float16), head_hidden_size=8)
    run = trainer(tmp_path, model, learning_rate=1e-4)
    run.train()
    assert {parameter.dtype for parameter in run.model.score.parameters()} == {torch.float32}


def test_the_lm_head_does_not_move_without_text_loss(tmp_path):
    difference(2, "LM head", 'regularizer="none"')
    assert moved(trainer(tmp_path, regularizer="none"))[1] == {"lm.lm_head.weight"}


def test_a_classifier_is_no_base(tmp_path):
    difference(3, "classifier")
    config = LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=1, pad_token_id=TOKENIZER.pad_token_id)  # fmt: skip
    classifier = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="from_base"):
        trainer(tmp_path / "a", classifier)
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a classifier"):
        trainer(tmp_path / "b", tmp_path / "classifier")


def test_long_pairs_are_cut_not_dropped(tmp_path):
    difference(4, "max_length", 'overlength="drop"')
    run = trainer(tmp_path, max_length=24)
    assert len(run.train_dataset) == 16 and run.data_counts["train"].truncated > 0


def test_bad_rows_are_refused(tmp_path):
    difference(5, "index")
    data = Dataset.from_list([*rows(), {**rows(1)[0], "chosen": [{"role": "assistant", "content": " "}]}])
    with pytest.raises(ValueError, match="row 16, `chosen`: the response has no text"):
        trainer(tmp_path, data=data)


def test_tokenised_rows_need_their_starts_for_a_text_loss(tmp_path):
    difference(6, "chosen_start")
    prepared = trainer(tmp_path).train_dataset.remove_columns(["chosen_start", "rejected_start"])
    with pytest.raises(ValueError, match="`chosen_start`"):
        trainer(tmp_path, data=prepared, regularizer="sft")


def test_a_peft_model_must_train_the_head(tmp_path):
    difference(7, 'modules_to_save=["score"]', "peft_config")
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="does not train the reward head"):
        trainer(tmp_path, get_peft_model(grm(), config))
    given = copy.deepcopy(config)
    trainer(tmp_path, peft_config=given)
    assert given.modules_to_save is None  # the user's settings are left alone


def test_a_peft_model_names_its_targets(tmp_path):
    difference(7, "target_modules")
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(grm(), LoraConfig(modules_to_save=["score"]))
    trainer(tmp_path, peft_config=LoraConfig())


def test_predictions_are_two_columns(tmp_path):
    difference(8, "(pairs, 2)")
    run = trainer(tmp_path, evaluation=pairs(6))
    assert run.predict(run.eval_dataset).predictions.shape == (6, 2)


def test_batches_are_read_by_each_process(tmp_path, caplog):
    difference(9, "dispatch_batches", "streaming")
    run = trainer(tmp_path, evaluation=pairs(6).to_iterable_dataset(), accelerator_config={"dispatch_batches": True})
    assert "is ignored" in caplog.text and len(run.eval_dataset) == 6


def test_evaluation_leaves_the_weights_in_their_dtype(tmp_path, caplog):
    difference(14, "bf16_full_eval", "fp16_full_eval", "ignored")
    run = trainer(tmp_path, evaluation=pairs(5), bf16_full_eval=True)
    assert "`bf16_full_eval` is ignored" in caplog.text
    run.evaluate()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_kernels_that_no_layer_gets_are_said(tmp_path, caplog):
    difference(15, "use_liger_kernel", "ignored")
    trainer(tmp_path, use_liger_kernel=True).train()  # Liger itself says so at the level of information
    assert "`use_liger_kernel` is ignored" in caplog.text


def test_inputs_beside_predictions_are_refused(tmp_path):
    difference(15, "include_for_metrics", "refused")
    with pytest.raises(ValueError, match="`include_for_metrics` asks for the inputs.*Read .* `trainer.eval_dataset`"):
        trainer(tmp_path, evaluation=pairs(7), include_for_metrics=["inputs"])


@pytest.mark.parametrize("names", [["mine"], ["default", "other"]])
def test_an_adapter_that_would_be_saved_elsewhere_is_refused(tmp_path, names):
    difference(16, "called `default`")
    model = get_peft_model(grm(), lora(modules_to_save=["score"]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(modules_to_save=["score"]))
        model.set_adapter(name)
    with pytest.raises(ValueError, match=f"The active adapter is '{names[-1]}'.*leave `adapter_name` out"):
        trainer(tmp_path, model)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_folder_of_the_other_kind_is_refused_before_training(tmp_path, adapter):
    difference(16, "`output_dir` with a whole model")
    trainer(tmp_path, peft_config=None if adapter else lora()).save_model()
    with pytest.raises(ValueError, match="No loader takes both: choose another `output_dir`"):
        trainer(tmp_path, peft_config=lora() if adapter else None)


def test_a_checkpoint_without_its_optimizer_is_not_resumed(tmp_path):
    difference(16, "save_only_model")
    given = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer(tmp_path, **given).train()
    with pytest.raises(ValueError, match="without its optimiser .*pass it as `model`"):
        trainer(tmp_path, **given).train(str(tmp_path / "checkpoint-2"))


def test_the_first_saved_folder_is_loaded(tmp_path):
    difference(10, "loaded once")
    run = trainer(tmp_path)
    run.save_model()
    assert run._folder_was_loaded


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_bias_moves_only_with_centred_rewards(tmp_path, kind):
    difference(11, "last bias", "center_rewards_coefficient")
    for coefficient in (None, 0.1):
        run = trainer(tmp_path, regularizer=kind, alpha=0.5, center_rewards_coefficient=coefficient, max_steps=1)
        batch = run.data_collator([run.train_dataset[i] for i in range(4)])
        run.compute_loss(run.model, batch).backward()
        gradient = run.model.score.out.bias.grad.abs().item()
        assert gradient > 1e-4 if coefficient else gradient < 1e-7


def test_earlier_names_of_columns_are_taken_without_a_warning(tmp_path):
    difference(12, "chosen_input_ids")
    prepared = trainer(tmp_path).train_dataset
    old = prepared.rename_columns({f"{side}_ids": f"{side}_input_ids" for side in ("chosen", "rejected")})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer(tmp_path, data=old)
    difference(12, "`label`")
    assert trainer(tmp_path, data=pairs(label=[0.75] * 16)).train_dataset["label"][:] == [0.75] * 16


def test_a_base_with_code_of_its_own_is_refused(tmp_path):
    difference(13, "trust_remote_code")
    base().save_pretrained(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {name: "own.Own" for name in ("AutoConfig", "AutoModelForCausalLM")}}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lm" / "own.py").write_text("import transformers\nclass Own(transformers.LlamaConfig):\n    pass\n")
    for trust in (False, True):
        args = settings(tmp_path / "run", trust_remote_code=trust)
        with pytest.raises(ValueError, match="code" if not trust else "modelling code of its own"):
            GRMRewardTrainer(model=tmp_path / "lm", args=args, train_dataset=pairs(), processing_class=TOKENIZER)


def test_every_difference_has_its_test():
    section = DIFFERENCES.split("## Trainer")[1]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", section, re.M)]
    shown = {int(number) for number in re.findall(r"difference\((\d+),", Path(__file__).read_text(encoding="utf-8"))}
    assert numbers == sorted(shown) == list(range(1, len(numbers) + 1))
