"""Two processes against one (gloo, CPU): DDP through the trainer, one real FSDP2 step on the model and its losses, and
the accelerate configuration files."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


pytest.importorskip("trl", reason="needs the extra `train`")

pytestmark = pytest.mark.trainer

TESTS = Path(__file__).resolve().parent


def run(code, processes, port, folder):
    """Run `code` on `processes` ranks; returns what rank 0 printed after RESULT, as JSON."""
    script = folder / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + textwrap.dedent(code), encoding="utf-8")
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), str(folder), str(processes)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT", 1)[1].splitlines()[0])


# Two processes are given a streaming evaluation set in the runs named so, and asked to dispatch in others.
RUNS = {
    "none": ("none", "full", "padded"),
    "none-stream": ("none", "full", "padded"),
    "sft": ("sft", "full", "shared_prefix"),
    "sft-tokens": ("sft", "full", "shared_prefix"),
    "sft-zero": ("sft", "full", "padded"),
    "sft-tokens-zero": ("sft", "full", "shared_prefix"),
    "dpo-lora-zero": ("dpo", "lora", "shared_prefix"),
    "none-attributes": ("none", "full", "padded"),
    "sft-attributes-zero": ("sft", "full", "packed"),
    "sft-tokens-attributes-zero": ("sft", "full", "shared_prefix"),
    "dpo-lora-attributes": ("dpo", "lora", "shared_prefix"),
    "sft-bnrm": ("sft", "full", "padded"),
    "sft-tokens-bnrm": ("sft", "lora", "shared_prefix"),
    "sft-stream": ("sft", "full", "shared_prefix"),
    "sft-dispatch": ("sft", "full", "packed"),
    "dpo": ("dpo", "full", "padded"),
    "dpo-lora": ("dpo", "lora", "auto"),
}
TRAIN = f"""
    import json

    import conftest
    import torch
    import trainers as t

    torch.Tensor.exponential_ = lambda self: self.fill_(0.7)  # what a BNRM head draws, on every process

    folder, processes = sys.argv[1], int(sys.argv[2])
    results = {{}}
    for key, (text_loss, adapter, layout) in {RUNS!r}.items():
        tested, many = t.pairs(7, seed=1), processes > 1
        model = t.grm(head_type="bnrm" if key.endswith("bnrm") else "mlp")
        trained = t.pairs(16, label=[1.0, 0.5, 0.75, 0.9] * 4) if key.endswith("zero") else t.pairs(16)
        if "attributes" in key:  # among them batches of ranks that have no pair, and an evaluation of 7 rows
            model = t.grm(attribute_names=["help", "short"], attribute_weights="gate")
            trained, tested = t.rated_between(trained), t.rated_between(tested)
        run = t.trainer(
            f"{{folder}}/{{key}}",
            model.double(),
            trained,
            tested.to_iterable_dataset() if key.endswith("stream") and many else tested,
            regularizer=text_loss,
            accelerator_config={{"dispatch_batches": True}} if key.endswith("dispatch") and many else {{}},
            alpha=0.5,
            **({{"kl_weight": 0.02}} if key.endswith("bnrm") else {{}}),
            batch_sum_to_zero=2.0 if key.endswith("zero") else 0.0,
            layout=layout,
            optim="sgd",
            max_steps=3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4 // processes,
            per_device_eval_batch_size=2,
            gradient_checkpointing=True,
            attribute_loss_weight=0.5,
            max_tokens_per_batch=100 if "tokens" in key and processes > 1 else None,
            ddp_backend="gloo" if processes > 1 else None,
            peft_config=t.lora() if adapter == "lora" else None,
        )
        run.train()
        results[key] = {{
            "logged": [row for row in run.state.log_history if "loss" in row],
            "eval": run.evaluate(),
            "weights": sum(p.double().abs().sum().item() for p in run.model.parameters()),
        }}
    if run.is_world_process_zero():
        print("RESULT", json.dumps(results), flush=True)
"""
TIMES = ("tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    return [run(TRAIN, n, 29611, tmp_path_factory.mktemp(f"ddp{n}")) for n in (1, 2)]


@pytest.mark.parametrize("key", RUNS)
def test_ddp_on_two_processes_equals_one(one_and_two, key):
    one, two = (results[key] for results in one_and_two)
    lines = [(one["eval"], two["eval"]), *zip(one["logged"], two["logged"], strict=True)]
    assert len(lines) == 4
    assert ("text_loss" in lines[1][0]) == (not key.startswith("none")) and "accuracy" in lines[1][0]
    assert ("mse_short" in lines[1][0]) == ("eval_mse_help" in lines[0][0]) == ("attributes" in key)
    assert ("kl" in lines[1][0]) == key.endswith("bnrm")
    for expected, found in lines:
        assert expected.keys() == found.keys()
        for name in expected.keys() - set(TIMES):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-7)


FSDP = """
    import json

    import conftest
    import trainers as t
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from grm_hf import losses
    from grm_hf.attention import serve_segments
    from grm_hf.layouts import PairCollator, model_kwargs
    from grm_hf.logprobs import sequence_logps

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    data = t.trainer(f"{sys.argv[1]}/{rank}", regularizer="none", use_cpu=True).train_dataset
    examples = [data[i] for i in range(4)]

    def loss_of(network, pairs, layout):
        batch = PairCollator(t.TOKENIZER.pad_token_id, layout, "both")(pairs)
        text = [batch[key] for key in ("text_index", "text_targets", "text_owner")]
        lm_fn = lambda hidden, model: sequence_logps(hidden, model, *text, 2 * len(pairs))
        if layout != "padded":
            serve_segments(network)
        out = network(**model_kwargs(batch), use_cache=False, lm_fn=lm_fn)
        chosen, rejected = out.logits.squeeze(-1).chunk(2)
        s = out.lm_output.chunk(2)
        text = losses.text_loss("dpo_noref", 0.1, s[0], None, s[1]).mean()
        loss = losses.total_loss(losses.pair_loss(chosen, rejected).mean(), text, 0.5)
        loss.backward()
        return loss.item()

    results = {}
    for layout in ("padded", "shared_prefix"):
        for tied in (True, False):
            base = lambda: t.GRMForSequenceClassification.from_base(
                t.base(tie_word_embeddings=tied), head_hidden_size=8
            )
            model, plain = base(), base()
            plain.load_state_dict(model.state_dict())
            for module in model.modules():
                if type(module).__name__ in model._no_split_modules:
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            sharded, whole = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, plain))
            found, expected = [], []
            for step in range(2):
                sharded.zero_grad()
                whole.zero_grad()
                mine = torch.tensor(loss_of(model, examples[2 * rank : 2 * rank + 2], layout))
                dist.all_reduce(mine)
                found.append(mine.item() / 2)
                expected.append(loss_of(plain, examples, layout))
                sharded.step()
                whole.step()
            results[f"{layout}-{'tied' if tied else 'untied'}"] = [found, expected]
    if rank == 0:
        print("RESULT", json.dumps(results), flush=True)
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded_steps(tmp_path_factory):
    return run(FSDP, 2, 29612, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("case", ["padded-tied", "padded-untied", "shared_prefix-tied", "shared_prefix-untied"])
def test_fsdp2_steps_equal_one_process(sharded_steps, case):
    """Sharded over two ranks, each with half of the pairs: the loss of both steps is that of one process with all."""
    found, expected = sharded_steps[case]
    assert expected[0] != expected[1]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_configurations_are_accepted(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = TESTS.parent / "examples" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys it does not know
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[name]
    assert name != "fsdp2" or config.fsdp_config["fsdp_version"] == 2
    assert name != "zero3" or config.deepspeed_config["zero_stage"] == 3
