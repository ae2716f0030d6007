"""What a user gives to a training run (settings, adapters, evaluation sets) is obeyed, refused before the first step,
or said to be ignored; and what the run says of itself is so."""

import json
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from official_files import FILES, write
from trainers import TOKENIZER, grm, logged, lora, pairs, rated_between, rows, settings, trainer


pytest.importorskip("trl", reason="needs the extra `train`")

from huggingface_hub import HfApi  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import EarlyStoppingCallback, Trainer  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMRewardConfig  # noqa: E402
from grm_hf.cli import main  # noqa: E402
from grm_hf.layouts import PairCollator  # noqa: E402
from grm_hf.training import merge_adapter  # noqa: E402


pytestmark = pytest.mark.trainer

GROUPED = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in GRMRewardConfig.__dataclass_fields__
    else {"group_by_length": True}
)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"regularizer": "none", "alpha": 0.3}, "`alpha=0.3` is ignored: regularizer='none'"),
        ({"regularizer": "none", "beta": 0.5}, "`beta=0.5` is ignored: regularizer='none'"),
        ({"regularizer": "sft_nll", "beta": 0.5}, "`beta=0.5` is ignored: regularizer='sft_nll'"),
        ({"alpha": 0.0, "beta": 0.5}, "`beta=0.5` is ignored: regularizer='sft' with alpha=0.0"),
        ({"alpha": 1.0}, "the reward head is not trained"),
    ],
)
def test_weights_of_a_loss_that_is_not_there_are_said(tmp_path, given, words):
    with pytest.warns(UserWarning, match=words):
        settings(tmp_path, **given)


@pytest.mark.parametrize("given", [{}, {"regularizer": "none"}, {"regularizer": "dpo", "beta": 0.5}, {"alpha": 0.0}])
def test_settings_that_are_read_are_not_said(tmp_path, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        settings(tmp_path, **given)


def test_dropout_that_is_switched_off_is_said(tmp_path, caplog):
    trainer(tmp_path / "a", peft_config=lora(lora_dropout=0.2), disable_dropout=False)
    trainer(tmp_path / "b", peft_config=lora())
    assert "dropout" not in caplog.text
    model = grm()
    model.config.head_dropout = 0.1
    run = trainer(tmp_path / "c", model, peft_config=lora(lora_dropout=0.2))
    assert {module.p for module in run.model.modules() if isinstance(module, torch.nn.Dropout)} == {0}
    assert "`head_dropout=0.1` is ignored" in caplog.text and "`lora_dropout=0.2` is ignored" in caplog.text


def test_a_collator_of_the_users_own_leaves_the_layout_out(tmp_path, caplog):
    extra = {"data_collator": PairCollator(TOKENIZER.pad_token_id, text="chosen")}
    trainer(tmp_path / "a", extra=extra)
    assert "data_collator" not in caplog.text
    trainer(tmp_path / "b", extra=extra, layout="packed", pad_to_multiple_of=8)
    assert "layout, pad_to_multiple_of is ignored: a `data_collator`" in caplog.text


def test_noise_on_embeddings_is_that_of_padded_rows(tmp_path, caplog):
    run = trainer(tmp_path / "a", neftune_noise_alpha=5.0)
    assert run.layout == "padded" and "neftune" not in caplog.text
    run = trainer(tmp_path / "b", neftune_noise_alpha=5.0, layout="packed")
    assert run.layout == "packed" and "`neftune_noise_alpha` is less noise" in caplog.text


def test_evaluation_sets_are_grouped_by_length_too(tmp_path):
    plain = trainer(tmp_path / "a", evaluation=pairs(9, seed=1)).evaluate()
    run = trainer(tmp_path / "b", evaluation=pairs(9, seed=1), **GROUPED)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert run.evaluate(pairs(9, seed=1))["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


@pytest.mark.skipif(not hasattr(Trainer, "_track_num_input_tokens"), reason="an earlier transformers counts elsewhere")
@pytest.mark.parametrize("given", [{"layout": "padded"}, {}, {"max_tokens_per_batch": 64}, {"pad_to_multiple_of": 16}])
def test_tokens_seen_are_those_of_the_texts(tmp_path, given):
    run = trainer(tmp_path, include_num_input_tokens_seen="non_padding", **given)
    run.train()
    data = run.train_dataset
    right = sum(len(row[f"{side}_ids"]) for row in data for side in ("chosen", "rejected"))
    assert logged(run, "num_input_tokens_seen")[-1] == logged(run, "num_tokens")[-1] == right


# ------------------------------------------------------------------------------------------------------------ adapters


def test_a_frozen_backbone_takes_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="trains the reward head alone: leave `peft_config` out"):
        trainer(tmp_path, peft_config=lora(), regularizer="none", freeze_backbone=True)


def test_settings_of_a_saved_adapter_are_trained(tmp_path):
    run = trainer(tmp_path, peft_config=lora(inference_mode=True), gradient_checkpointing=True)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in moved) and any("score" in name for name in moved)


def test_an_adapter_of_another_name_is_not_saved_where_nothing_looks(tmp_path):
    run = trainer(tmp_path / "run", peft_config=lora())
    run.save_model()
    model = GRMForSequenceClassification.from_pretrained(tmp_path / "run", adapter_name="mine")
    with pytest.raises(ValueError, match="called 'mine'.*without `adapter_name`"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_inside_of_an_adapter_is_refused(tmp_path):
    model = grm()
    get_peft_model(model, lora(modules_to_save=["score"]))
    with pytest.raises(ValueError, match="is not the PeftModel. Pass what get_peft_model"):
        trainer(tmp_path, model)


def test_a_base_that_was_changed_in_memory_is_explained(tmp_path):
    grm().save_pretrained(tmp_path / "base")
    model = GRMForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    run = trainer(tmp_path / "run", model, peft_config=lora())
    with pytest.raises(RuntimeError, match="An adapter is saved without its base .*save it .* to a folder of its own"):
        run.save_model()


def test_an_adapter_that_peft_cannot_merge_is_one_sentence(tmp_path):
    trainer(tmp_path / "run", peft_config=lora(lora_bias=True)).save_model()  # the layers below have no bias
    with pytest.raises(ValueError, match="peft cannot merge the adapter"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")


def test_an_adapter_names_its_base_wherever_it_is_loaded(tmp_path, monkeypatch):
    grm().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        trainer("run", "base", peft_config=lora()).save_model()
    loaded = GRMForSequenceClassification.from_pretrained(tmp_path / "run")
    assert torch.equal(loaded.lm.get_output_embeddings().weight, grm().lm.get_output_embeddings().weight)


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_sets_do_not_pass_for_others(tmp_path):
    run = trainer(tmp_path / "a", data=pairs(12), evaluation={"train": pairs(3, seed=1), "test": pairs(5, seed=2)})
    run.evaluate()
    run.create_model_card()
    assert {name: counts.rows for name, counts in run.data_counts.items()} == {"train": 12, "eval_train": 3, "test": 5}
    assert "Evaluation sets of the run, train: 3 pairs, test: 5 pairs" in (tmp_path / "a" / "README.md").read_text()

    run = trainer(tmp_path / "b", data=pairs(12), evaluation=pairs(4, seed=1))
    run.evaluate()
    run.evaluate(pairs(6, seed=2), metric_key_prefix="held_out")
    run.evaluate({"one": pairs(2), "two": pairs(3)})
    rows = {"train": 12, "eval": 4, "held_out": 6, "one": 2, "two": 3}
    assert {name: counts.rows for name, counts in run.data_counts.items()} == rows
    run.create_model_card()
    assert "Evaluation set of the run, 4 pairs" in (tmp_path / "b" / "README.md").read_text()


def test_references_of_a_set_called_train_have_a_file_of_their_own(tmp_path):
    trainer(tmp_path, evaluation={"train": pairs(3, seed=1)}, regularizer="dpo")
    files = {path.name for path in (tmp_path / "reference_logps").iterdir()}
    assert files == {"train.safetensors", "eval_train.safetensors"}


def test_pairs_are_predicted_as_they_are_evaluated(tmp_path):
    tested = pairs(5, seed=1)
    run = trainer(tmp_path, evaluation=tested)
    expected = run.predict(run.eval_dataset).predictions
    assert np.array_equal(run.predict(tested).predictions, expected) and expected.shape == (5, 2)


def test_rated_completions_are_evaluated_again(tmp_path):
    names = {"attribute_names": ["help", "short"]}
    run = trainer(tmp_path, grm(**names), rated_between(pairs(12)), rated_between(pairs(12, seed=3)))
    first, again = run.evaluate(), run.evaluate(run.eval_dataset)
    assert again["eval_mse_help"] == first["eval_mse_help"] and again["eval_accuracy"] == first["eval_accuracy"]
    assert run.predict(run.eval_dataset).predictions.shape == (12, 2)


def test_a_callback_sees_the_figures_of_suites(tmp_path, caplog):
    write(tmp_path / "hhh", FILES["hhh"]())
    run = trainer(
        tmp_path / "out",
        evaluation=pairs(4, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=12,
        learning_rate=0.0,  # the score stays
        eval_suites=[f"hhh={tmp_path / 'hhh'}"],
        eval_suite_limit=4,
        metric_for_best_model="eval_hhh/score",
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        extra={"callbacks": [EarlyStoppingCallback(2)]},
    )
    run.train()
    assert run.state.global_step == 3 and "early stopping is disabled" not in caplog.text
    assert "eval_hhh/score" in run.evaluate()


# ------------------------------------------------------------------------------------------ what a run says of itself


def test_tokens_are_counted_on_after_a_resume(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    resumed = trainer(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "num_tokens") == logged(run, "num_tokens")


def test_another_training_counts_anew(tmp_path):
    run = trainer(tmp_path)
    run.train()
    first = logged(run, "num_tokens")
    run.train()
    assert logged(run, "num_tokens") == first


def test_a_model_is_saved_before_the_hub_is_asked(tmp_path, monkeypatch):
    class Unreachable(Exception):
        """That of an HTTP library."""

    def refuse(*args, **kwargs):
        raise Unreachable("no route")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    run = trainer(tmp_path / "run")
    with pytest.raises(OSError, match="The push to 'run' did not get through .Unreachable: no route"):
        run.push_to_hub(private=True)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    with pytest.raises(OSError, match="The push to 'ann/model' did not get through"):
        trainer(tmp_path / "b", push_to_hub=True, hub_model_id="ann/model")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_of_another_kind_is_not_resumed(tmp_path, adapter):
    trainer(tmp_path / "a", peft_config=lora() if adapter else None, save_strategy="steps", save_steps=2).train()
    run = trainer(tmp_path / "b", peft_config=None if adapter else lora())
    with pytest.raises(ValueError, match="and this run has .*Resume with the model and the `peft_config` of that run"):
        run.train(str(tmp_path / "a" / "checkpoint-2"))


def test_the_rate_of_tokens_is_that_of_training(tmp_path, monkeypatch):
    run = trainer(tmp_path, evaluation=pairs(4), eval_strategy="steps", eval_steps=1, max_steps=2)
    loop = run.evaluation_loop
    monkeypatch.setattr(run, "evaluation_loop", lambda *args, **kwargs: (time.sleep(2), loop(*args, **kwargs))[1])
    time.sleep(2)
    run.train()
    tokens = np.diff([0, *logged(run, "num_tokens")])
    assert all(np.array(logged(run, "tokens_per_second")) > tokens / 1.5)


def test_the_card_has_the_batch_size_that_was_found(tmp_path, monkeypatch):
    run = trainer(tmp_path, layout="padded", auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=2)
    step = run.training_step

    def small(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 8:  # four pairs
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(run, "training_step", small)
    run.train()
    run.create_model_card()
    assert "| pairs a step | 4 |" in (tmp_path / "README.md").read_text()


def test_the_card_has_the_optimiser_that_was_given(tmp_path):
    def card(folder, model, extra):
        run = trainer(tmp_path / folder, model, extra=extra)
        run.train()
        run.create_model_card()
        return (tmp_path / folder / "README.md").read_text()

    model = grm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    text = card("a", model, {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))})
    assert "| learning rate | 0.125, ConstantLR |" in text and "| optimiser | SGD |" in text
    text = card("b", grm(), {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.25})})
    assert "| learning rate | 0.25, linear |" in text and "| optimiser | SGD |" in text


def test_results_of_other_weights_do_not_stay(tmp_path):
    results, benchmarks = (tmp_path / ".eval_results" / name for name in ("grm_hf.yaml", "grm_eval.yaml"))

    def train(seed, **kwargs):
        run = trainer(tmp_path, grm(seed), **kwargs)
        run.train()
        return run

    run = train(0, evaluation=pairs(4), eval_strategy="steps", eval_steps=2)
    run.save_model()
    run.create_model_card(dataset_name="ann/pairs")
    benchmarks.write_text("- of `grm eval --card`\n", encoding="utf-8")
    run.save_model()  # the same weights
    run.create_model_card()
    assert results.is_file() and benchmarks.is_file()
    run = train(1)
    run.save_model()
    run.create_model_card()
    assert not results.is_file() and not benchmarks.is_file()


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_resumes_by_a_word_and_says_what_it_ignores(tmp_path, capsys):
    grm().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    Path(tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows())), encoding="utf-8")
    options = {
        **{"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data.jsonl"},
        **{"output_dir": tmp_path / "run", "max_steps": 2, "save_steps": 1, "bf16": "false", "use_cpu": "true"},
        "report_to": "none",
    }
    command = ["train", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    assert main([*command, "--lora_r", "4", "--resume_from_checkpoint", "false"]) == 0
    assert "without --use_peft, lora_r is ignored" in capsys.readouterr().err
    before = (tmp_path / "run" / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns
    assert main([*command, "--max_steps", "3", "--resume_from_checkpoint", "True"]) == 0
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == before
    assert "is ignored" not in capsys.readouterr().err
    assert main([*command, "--eval_strategy", "steps"]) == 1
    assert "no split 'test'; it has ['train']. See --dataset_test_split." in capsys.readouterr().err
