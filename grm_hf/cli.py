"""The `grm` command. Its exit code is 0 (done), 1 (failed) or 2 (wrong usage). An error before the work starts is one
line. An error after that has its traceback and a line that says how to go on."""

import argparse
import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from .version import __version__


DEFAULT_MODEL = "(default: models/grm-smollm2-135m of the checkout)"
WINDOW = 1024  # chats for each process that `grm score` computes at a time
FILE_FORMATS = {
    **{".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"},
    **{".json.gz": "json", ".jsonl.gz": "json", ".csv.gz": "csv"},
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = command_line()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as files, whatever the locale
    try:
        args.run(args, rest) if args.run is _train else args.run(args)
    except _Begun as begun:
        if isinstance(begun.__cause__, KeyboardInterrupt):
            print(f"grm {args.command}: interrupted. {begun}", file=sys.stderr)
        else:
            traceback.print_exception(begun.__cause__)
            print(f"grm {args.command}: {begun}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"grm {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"grm {args.command}: interrupted", file=sys.stderr)
        return 1
    return 0


class _Begun(Exception):
    """Something went wrong after the work had begun; the message says how to go on."""


@contextlib.contextmanager
def _work(how_to_go_on: Callable[[], str]):
    """A context around long work, after all checks."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        raise _Begun(how_to_go_on()) from error


_SAME = "To go on where this stopped, run the same command again."


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands. docs/cli.md is written from it."""
    parser = argparse.ArgumentParser(
        prog="grm", description="Generalizable Reward Models: train, score, compare.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"grm_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train a reward model",
        description="Train a reward model. Takes what `trl reward` takes, from a YAML file (--config) or as options, "
        "and GRM's own settings (--regularizer, --alpha, --beta, ...). `grm train --help-all` lists every option. A "
        "YAML with `stages` is a recipe of several trainings (docs/staged.md); run again, it goes on where it was.",
        add_help=True,
        allow_abbrev=False,
    )
    train.add_argument("--help-all", action="store_true", help="list every option")
    train.set_defaults(run=_train)

    score = commands.add_parser(
        "score",
        help="score the chats of a file",
        description="Score each row of a file: {'messages': [...]}, {'prompt': ..., 'response': ...} or "
        "{'text': ...}. Writes one line a row: row, score, tokens, truncated (and the row's id). With --output an "
        "interrupted run goes on where it stopped, and a row or a model that has changed is scored again. Several "
        "processes: `accelerate launch -m grm_hf.cli score`.",
    )
    score.add_argument("file", help="JSONL, JSON, CSV or parquet file, each also .gz, or - for standard input (JSONL)")
    score.add_argument(
        "--model",
        required=True,
        action="append",
        help="Hub id or folder of a reward model; several times: an ensemble",
    )
    score.add_argument(
        "--ensemble",
        default="mean",
        help="how members combine, standardized: mean (default), median, min, mean_minus_std, nominal_min",
    )
    score.add_argument("--transform", help="transform of the reward: center, standardize, log_sigmoid or clip")
    score.add_argument("--reference", type=float, help="reference reward of log_sigmoid, threshold of clip")
    score.add_argument("--output", help="JSONL file to write (default: standard output)")
    _add_signals(score)
    score.set_defaults(run=_score)

    evaluation = commands.add_parser(
        "eval",
        help="evaluate a reward model on benchmarks, or on your own pairs",
        description="Score one or more suites with a reward model (a GRM, an adapter of one, or any sequence "
        "classifier with one label) and give the official figures. Suites: docs/evaluation.md. With --output an "
        "interrupted evaluation goes on where it stopped. Several processes: `accelerate launch -m grm_hf.cli eval`.",
    )
    evaluation.add_argument("model", help="Hub id or folder of a reward model or an adapter")
    evaluation.add_argument(
        "--suite", help="names, with commas between them (default: own, the pairs or lists in --data)"
    )
    evaluation.add_argument("--data", help="file or folder in the official format, or Hub id (default: the suite's)")
    evaluation.add_argument("--subset", action="append", help="subset to keep; several times: several")
    evaluation.add_argument("--limit", type=int, help="largest number of rows of each suite, spread over it")
    evaluation.add_argument("--output", help="folder for rows, report.html, results.csv and results.json")
    evaluation.add_argument(
        "--compare", nargs="+", default=[], metavar="RESULTS", help="outputs of other models on the same rows"
    )
    evaluation.add_argument("--member", action="append", default=[], help="a further member: an ensemble (their mean)")
    evaluation.add_argument(
        "--card", action="store_true", help="put the results on the card in the model's folder, beside what is there"
    )
    _add_signals(evaluation)
    evaluation.add_argument(
        "--threshold",
        type=float,
        help="least agreement of the pairs that are reported as agreed on (default: 1)",
    )
    evaluation.add_argument(
        "--choose",
        action="store_true",
        help="store in the model's folder which of the signals help on the file --data, and from which agreement on",
    )
    evaluation.add_argument("--revision", help="branch, tag or commit of the data on the Hub")
    evaluation.add_argument("--trust-remote-code", action="store_true", help="run code of a model that is no GRM")
    evaluation.set_defaults(run=_eval)

    compare = commands.add_parser(
        "compare",
        help="compare two answers to one prompt",
        description="Compare two answers to one prompt by the reward head. With --explain, by the signals of the LM "
        "head too: what each says, and how far they agree. Signals: docs/signals.md.",
    )
    compare.add_argument("prompt")
    compare.add_argument("answer_a")
    compare.add_argument("answer_b")
    compare.add_argument("--model", help=f"Hub id or folder of a reward model {DEFAULT_MODEL}")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--explain", action="store_true", help="by every signal that the model has, or --signals")
    compare.add_argument("--threshold", type=float, help="abstain where fewer of the signals agree with the head")
    _add_signals(compare)
    compare.set_defaults(run=_compare)

    best = commands.add_parser(
        "best-of-n",
        help="rank any number of answers to one prompt",
        description="Rank answers to one prompt, best first. The prompt is computed once.",
    )
    best.add_argument("prompt")
    best.add_argument("answers", nargs="*", metavar="answer")
    best.add_argument(
        "--answers", dest="file", help="file with further answers, or -: one a line, as text or as a JSON string"
    )
    best.add_argument("--model", help=f"Hub id or folder of a reward model {DEFAULT_MODEL}")
    best.add_argument("--json", action="store_true", help="print JSON")
    best.set_defaults(run=_best_of_n)

    verify = commands.add_parser(
        "verify",
        help="score a model's golden rows again and compare",
        description="Tokenise and score the golden rows again: the texts that are stored beside the weights. "
        "Ends with 1 if token ids differ, or if a reward differs by more than rounding.",
    )
    verify.add_argument("model", help="Hub id or folder of a reward model or an adapter")
    verify.add_argument("--url", help="ask the server at this address instead of loading the weights")
    verify.add_argument("--api-key", help="API key of that server")
    verify.set_defaults(run=_verify)

    serve = commands.add_parser(
        "serve",
        help="serve a reward model over HTTP to trainers and engines' clients",
        description="Serve a reward model on the routes of docs/serving.md, without vLLM: /score, /classify, "
        "/pooling, /get_reward (OpenRLHF), /v1/score/evaluation (LLaMA-Factory), /slime, /predict (TEI), /health, "
        "/metrics, /v1/models. Texts that arrive together are scored together. At Ctrl-C or SIGTERM it answers the "
        "requests in work and stops.",
    )
    serve.add_argument("model", help="Hub id or folder of a reward model or an adapter")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument("--route", action="append", metavar="NAME", help="offer this route; repeatable (default: all)")
    serve.add_argument("--name", help="what the model is called in replies (default: as given)")
    serve.add_argument("--api-key", help="key that requests must send; required beyond loopback (or GRM_API_KEY)")
    serve.add_argument("--max-tokens-per-batch", type=int, default=8192, help="most tokens of a batch (default: 8192)")
    serve.add_argument("--dtype", help="dtype of the body, such as bfloat16 (default: as saved)")
    serve.add_argument("--max-body", type=int, default=16 * 2**20, help="most bytes of a request (default: 16 MiB)")
    serve.add_argument("--max-texts", type=int, default=1024, help="most texts of a request (default: 1024)")
    serve.add_argument("--max-queue", type=int, default=8192, help="most texts that wait (default: 8192)")
    serve.set_defaults(run=_serve)

    merge = commands.add_parser("merge", help="merge an adapter into a standalone reward model")
    merge.add_argument("adapter", help="folder of an adapter (a checkpoint of a LoRA run)")
    merge.add_argument("output", help="folder to write")
    merge.set_defaults(run=_merge)

    expo = commands.add_parser(
        "expo",
        help="extrapolate the weights of a training run",
        description="Write the reward model END + a (END - START), weight by weight: START is what a run began with, "
        "END what it ended with (ExPO, docs/staged.md). Adapters are merged first. Of several --a the one with the "
        "best accuracy on --data is used.",
    )
    expo.add_argument("start", help="folder or Hub id of the reward model that the run began with, or its adapter")
    expo.add_argument("end", help="folder or Hub id of the one that it ended with")
    expo.add_argument("output", help="folder to write")
    expo.add_argument("--a", type=float, nargs="+", required=True, help="factor: 0 gives END, -1 gives START")
    expo.add_argument("--data", help="file of validation pairs, or what dataset_name of `grm train` takes")
    expo.add_argument("--split", help="split of published data (default: validation)")
    expo.set_defaults(run=_expo)

    push = commands.add_parser(
        "push",
        help="push a reward model to the Hub",
        description="Push the folder of a reward model, a checkpoint or an adapter (merged into its base, the "
        "adapter beside it) to the Hub in one commit: weights, code, tokenizer, card, results. Unchanged files are "
        "not sent again; a card that somebody has edited is merged. Log in first: `hf auth login`, or HF_TOKEN.",
    )
    push.add_argument("folder", help="folder of a model, a checkpoint or an adapter")
    push.add_argument("repo_id", help="NAME or NAMESPACE/NAME; made if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", help="branch, made if it does not exist (default: main)")
    push.add_argument("--tag", help="name for the pushed revision")
    push.add_argument("--message", help="first line of the commit")
    push.add_argument(
        "--replace-card", action="store_true", help="replace the card on the Hub, also where somebody edited it there"
    )
    push.set_defaults(run=_push)

    refresh = commands.add_parser(
        "refresh",
        help="put this version's code files into a saved model",
        description="Replace the code files of a model that an earlier grm_hf saved, and nothing else. Scores its "
        "golden rows with the old code (refresh only models that you trust) and with the new code, and writes nothing "
        "if they differ. A Hub repository gets one commit.",
    )
    refresh.add_argument("model", help="folder or Hub id of a reward model")
    refresh.add_argument("--revision", help="branch of the Hub repository (default: main)")
    refresh.set_defaults(run=_refresh)

    convert = commands.add_parser(
        "convert",
        help="make a reward model of a checkpoint of another layout",
        description="Convert a checkpoint with a value head (the GRM authors', TRL's, LLaMA-Factory's), a stock "
        "sequence classifier, an exported model or a LoRA adapter with such a head. The weights decide what "
        "it is; none of its code is run. Layouts and policies: docs/formats.md.",
    )
    convert.add_argument("source", help="Hub id or folder of the checkpoint or adapter")
    convert.add_argument("output", help="folder to write")
    convert.add_argument("--base", help="Hub id or folder of the language model below (adapters; untied LM heads)")
    convert.add_argument("--bos-policy", choices=["single", "double"], help="how its training read chats")
    convert.add_argument("--max-length", type=int, help="longest sequence to score (default: its tokenizer's)")
    convert.add_argument("--revision", help="branch, tag or commit of the source")
    convert.set_defaults(run=_convert)

    export = commands.add_parser(
        "export",
        help="write a reward model in a layout that transformers, vLLM and SGLang know",
        description="Write a linear head as the native sequence classifier of its body, an MLP head on a Llama or "
        "Qwen body as the engines' reward model. The result is the same function, checked on the golden rows, or the "
        "export is refused. The LM head stays behind. The card in the folder says how to serve it.",
    )
    export.add_argument("model", help="Hub id or folder of a reward model")
    export.add_argument("output", help="folder to write")
    export.add_argument("--revision", help="branch, tag or commit of the model")
    export.set_defaults(run=_export)

    demo = commands.add_parser(
        "demo", help="train a Bradley-Terry model and GRM on real pairs, and compare what they learned and still say"
    )
    demo.add_argument("--output", default="runs/demo", help="folder for results (default: runs/demo)")
    demo.add_argument("--pairs", type=int, default=160, help="pairs to train on (default: 160)")
    demo.set_defaults(run=_demo)

    lab = commands.add_parser(
        "lab",
        help="over-optimisation of proxies of a known gold reward: best-of-n, PPO, GRPO",
        description="Train proxies of a known gold reward and push a policy towards them: best-of-n, GRPO, and PPO "
        "where TRL has it. Goes on where an interrupted run stopped. See docs/overoptimization.md.",
    )
    lab.add_argument("--output", default="runs/lab", help="folder of the run (default: runs/lab)")
    lab.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    lab.add_argument("--gold", help="gold reward: module:function of (prompt, response), or a reward model")
    lab.add_argument("--model", help="folder or Hub id of a causal language model: policy, and base of the proxies")
    lab.add_argument("--prompts", help="JSONL file with a `prompt` in each row")
    lab.add_argument("--eval-prompts", help="the same, to measure on (default: the last quarter of --prompts)")
    lab.add_argument("--settings", help="JSON file with any of the settings in grm_hf/lab/settings.py")
    lab.set_defaults(run=_lab)
    return parser


# --------------------------------------------------------------------------------------------------------------- train


def _train(args, rest):
    from .training.stages import Stages, has_stages

    rest = [part for word in rest for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if rest[-1:] == ["--config"]:
        raise ValueError("--config needs a file: --config recipe.yaml.")
    if args.help_all:
        _parser().print_help()
    elif "--config" in rest[:-1] and has_stages(path := rest[rest.index("--config") + 1]):
        if len(rest) > 2:
            raise ValueError(f"{path} has stages, so all settings are in it, and no option is taken beside --config.")
        _train_stages(Stages(path))
    else:
        _train_once(rest)


def _train_stages(stages):
    from .hub import extrapolate

    main = int(os.environ.get("RANK", 0)) == 0
    for stage in stages.to_run():
        if main:
            print("\n" + f"stage {stage.name}: {stage.folder}" + (f" ({stage.note})" if stage.note else ""))
        _train_once(stage.arguments, lambda: _SAME)
    arguments = stages.extrapolation()
    if arguments is not None and main:
        with _work(lambda: _SAME):
            done = extrapolate(**arguments, pairs=_pairs(**stages.expo))
            stages.extrapolated()
        print("\n" + _extrapolated(done, arguments["output_dir"]))
    elif main:
        print(f"all stages are done: {stages.folder}")


def _pairs(a=None, dataset_name=None, dataset_config=None, dataset_test_split="validation"):
    """Validation pairs by the keys of `expo` in a recipe; `None` if there are none."""
    if dataset_name is None:
        return None
    from trl import DatasetMixtureConfig, ScriptArguments

    script = ScriptArguments(dataset_name, dataset_config=dataset_config, dataset_train_split=dataset_test_split)
    dataset = _dataset(script, DatasetMixtureConfig(), [dataset_test_split])
    if dataset_test_split not in dataset:
        raise ValueError(f"the data has no split {dataset_test_split!r}; it has {sorted(dataset)}.")
    return dataset[dataset_test_split]


def _expo(args):
    from .hub import extrapolate

    if args.split is not None and args.data is None:
        raise ValueError("--split is of --data, which is missing.")
    pairs = _pairs(dataset_name=args.data, dataset_test_split=args.split or "validation")
    done = extrapolate(args.start, args.end, args.output, args.a, pairs)
    print(_extrapolated(done, args.output))


def _extrapolated(done, folder):
    lines = [f"a = {a:g}: accuracy {accuracy:.4f}" for a, accuracy in sorted(done.accuracies.items())]
    return "\n".join([*lines, f"extrapolated with a = {done.a:g}: {folder}"])


def _parser():
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from .training import GRMRewardConfig

    return TrlParser((ScriptArguments, GRMRewardConfig, ModelConfig, DatasetMixtureConfig), prog="grm train")


def _train_once(rest, how_to_go_on=None):
    """A training run from its arguments to its card."""
    from trl import get_peft_config
    from trl import get_quantization_config as quantization

    from .folders import readable
    from .training import GRMRewardTrainer

    parser = _parser()
    script, training, model, mixture = parser.parse_args_and_config(rest, fail_with_unknown_args=True)
    if not model.model_name_or_path:
        raise ValueError("no model: pass --model_name_or_path (a causal language model or a reward model).")
    given = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    training.model_init_kwargs = {**given, **(training.model_init_kwargs or {})}
    resume = str(training.resume_from_checkpoint).lower()
    if resume in ("true", "false"):  # as an option it is text
        training.resume_from_checkpoint = resume == "true"
    if not model.use_peft:
        names = [name for name in type(model).__dataclass_fields__ if name.startswith(("lora_", "use_rs", "use_do"))]
        if ignored := [name for name in names if getattr(model, name) != getattr(type(model)(), name)]:
            print(f"grm train: without --use_peft, {', '.join(ignored)} is ignored", file=sys.stderr)
    with readable(model.model_name_or_path):
        pass
    train_split, test_split = script.dataset_train_split, script.dataset_test_split
    splits = [train_split] + ([test_split] if training.eval_strategy != "no" else [])
    dataset = _dataset(script, mixture, splits)
    for split in splits:
        if split not in dataset:
            option = f"--dataset_{'train' if split == train_split else 'test'}_split"
            raise ValueError(f"the data has no split {split!r}; it has {sorted(dataset)}. See {option}.")
    trainer = GRMRewardTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=dataset[train_split],
        eval_dataset=dataset[test_split] if training.eval_strategy != "no" else None,
        quantization_config=quantization(model),
        peft_config=get_peft_config(model),
    )
    with _work(how_to_go_on or (lambda: _after_checkpoint(training.output_dir))):
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model(training.output_dir)
    with _work(lambda: f"The model is complete: {training.output_dir}. To push it: grm push {training.output_dir} ID"):
        data = (script.dataset_name or "").partition("=")[0] or None
        trainer.create_model_card(dataset_name=data)
        if training.push_to_hub:
            trainer.push_to_hub(dataset_name=data)
    if trainer.is_world_process_zero():
        print(summary(trainer))
    trainer.accelerator.wait_for_everyone()  # the folder is whole when the next stage reads it
    trainer.accelerator.free_memory()


def _after_checkpoint(output):
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(output) if os.path.isdir(output) else None
    if checkpoint is None:
        return f"There is no checkpoint in '{output}' yet (--save_steps says when one is saved): training starts over."
    return f"To go on from the last checkpoint, add: --resume_from_checkpoint {checkpoint}"


def _dataset(script, mixture, splits):
    """The data that `trl reward` would load, local files by their path, and published data in its official form."""
    from datasets import load_dataset
    from trl import get_dataset

    from .preferences import DATA_SETS, load_preferences

    if mixture.datasets:
        if script.dataset_name:
            print("grm train: `datasets` is given, so `dataset_name` is ignored", file=sys.stderr)
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError("no data: pass --dataset_name (a Hub id or a file) or `datasets` in the YAML.")
    name, _, path = script.dataset_name.partition("=")  # NAME=PATH: a file or folder in the form of NAME
    if name in DATA_SETS and (path or script.dataset_config or not DATA_SETS[name].trl_rows):
        if script.dataset_streaming:
            print("grm train: `dataset_streaming` is ignored: this data is read as a whole", file=sys.stderr)
        return {split: load_preferences(name, script.dataset_config, split, path or None) for split in splits}
    path = script.dataset_name
    suffix = next((suffix for suffix in FILE_FORMATS if path.endswith(suffix)), None)
    if suffix is not None:
        if not os.path.isfile(path):
            raise ValueError(f"There is no file {path}.")
        return load_dataset(
            FILE_FORMATS[suffix], data_files={script.dataset_train_split: path}, streaming=script.dataset_streaming
        )
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def summary(trainer) -> str:
    """A training run in a few lines: rows, accuracies, the model's folder and how to load it."""
    lines = ["", *(str(counts) for counts in trainer.data_counts.values())]
    for name, label in (("accuracy", "reward head"), ("implicit_accuracy", "LM head")):
        for prefix, where in (("eval_", "evaluation"), ("", "training (last log line)")):
            values = [row[prefix + name] for row in trainer.state.log_history if prefix + name in row]
            if values:
                lines.append(f"accuracy of the {label}, {where}: {values[-1]:.3f}")
                break
    folder = trainer.args.output_dir
    lines.append(f"model: {folder}")
    lines.append(f"load:  AutoModelForSequenceClassification.from_pretrained({folder!r}, trust_remote_code=True)")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- score


def _add_signals(parser):
    signals = parser.add_argument_group("signals", "what the LM head says besides (docs/signals.md)")
    signals.add_argument(
        "--signals",
        metavar="NAMES",
        help="with commas between them, of likelihood, implicit, implicit_free, endogenous, judge, follow_up, "
        "critique, dropout",
    )
    signals.add_argument("--reference-model", metavar="MODEL", help="for `implicit` (default: the adapter is off)")
    signals.add_argument("--generate", action="store_true", help="let the LM head write, which `critique` needs")
    signals.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of a critique (default: 128)")
    signals.add_argument("--wording", metavar="FILE", help="JSON file: what is said to the LM head, in your language")


def _signals(args, default=()):
    """Names of the signals that were asked for, and their settings; a `ValueError` for a setting without signals."""
    from .signals import Settings, Wording, checked

    settings = {"reference": args.reference_model, "max_new_tokens": args.max_new_tokens}
    settings = {name: value for name, value in settings.items() if value is not None}
    if args.generate:
        settings["generate"] = True
    if args.wording:
        try:
            fields = json.loads(Path(args.wording).read_text(encoding="utf-8"))
            settings["wording"] = Wording(**fields)
        except (json.JSONDecodeError, TypeError) as error:
            known = ", ".join(Wording.__dataclass_fields__)
            raise ValueError(f"{args.wording} is no JSON object with any of {known} ({error}).") from None
    names = list(default) if args.signals is None else [name.strip() for name in args.signals.split(",")]
    if settings and not names:
        raise ValueError("settings of signals are given, and no signals: name some by --signals.")
    return checked(names, Settings.of(settings)), settings


def _score(args):
    from .evaluation.signals import ready
    from .scoring.files import Results, digest, line_of, model_digest, read_file

    names, settings = _signals(args)
    accelerator = _accelerator()
    if accelerator is not None and not os.path.isfile(args.file):
        raise ValueError("standard input and pipes have one reader, and there are several processes. Give a file.")
    is_main = accelerator is None or accelerator.is_main_process
    rows = read_file(args.file)
    if names and len(args.model) > 1:
        raise ValueError("--signals are those of a single model, and there are several.")
    scorer, transform, depends = _scorer(args, accelerator)
    if names:
        depends = [depends, names, repr({name: value for name, value in settings.items() if name != "reference"})]
        _, settings = ready(scorer, names, settings)
        if "reference" in settings:
            depends.append(model_digest(settings["reference"]))
    results, todo, missing = None, range(len(rows)), set(range(len(rows)))
    if args.output:
        model = model_digest(scorer)
        results = Results(args.output, [digest(row.content, model, depends) for row in rows], write=is_main)
        missing = set(results.missing)
        # Texts share a beginning within a window, which affects rounding: so the windows stay the same.
        window = WINDOW * (1 if accelerator is None else accelerator.num_processes)
        begun = {i // window for i in missing}
        todo = [i for i in todo if i // window in begun]
    chats, places = [rows[i].content for i in todo], [rows[i].place for i in todo]
    scorer.check(chats, places)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # all have read the output before it changes
    if len(missing) < len(rows) and is_main:
        print(f"grm score: {len(rows) - len(missing)} of {len(rows)} rows are done already", file=sys.stderr)
    truncated = 0
    with _work(lambda: _SAME if args.output else "With --output, an interrupted run goes on where it stopped."):
        with contextlib.nullcontext() if results is None else results:
            scored = scorer.stream(chats, WINDOW, places)
            if names:
                scored = scorer.stream_signals(chats, ["head", *names], WINDOW, places, **settings)
            for i, result in zip(todo, scored, strict=True):
                if i not in missing:
                    continue
                line = _line(result, names, transform)
                if "id" in rows[i].content:
                    line["id"] = rows[i].content["id"]
                truncated += line["truncated"]
                if results is not None:
                    results.add(i, line)
                elif is_main:
                    sys.stdout.write(line_of({"row": i, **line}))
                    sys.stdout.flush()
    if is_main:
        print(f"grm score: {len(missing)} rows scored, {truncated} truncated", file=sys.stderr)


def _line(result, names, transform):
    """A line of output from a score, or from the record of signals."""
    if not names:
        line = {"score": transform([result.score]).item(), "tokens": result.tokens, "truncated": result.truncated}
        return line if result.attributes is None else {**line, "attributes": result.attributes}
    signals = {name: value for name, value in result.items() if name.split("/")[0] in names}
    line = {name: result[name] for name in ("tokens", "truncated")}
    return {"score": transform([result["head"]]).item(), **line, "signals": signals}


def _scorer(args, accelerator):
    """The scorer, the transform of each score, and the settings that the result depends on besides the weights."""
    from .rewards import RewardEnsemble, Transform
    from .scoring import GRMScorer

    if args.transform == "length_residual":
        raise ValueError("length_residual needs all rewards at once: use grm_hf.rewards.length_residual.")
    if len(args.model) > 1 and accelerator is not None:
        raise ValueError("an ensemble scores in one process, and there are several.")
    if len(args.model) == 1:
        if args.ensemble != "mean":
            raise ValueError(f"--ensemble {args.ensemble} combines several models, and there is one --model.")
        scorer = GRMScorer(args.model[0], progress=True, accelerator=accelerator)
    else:
        scorer = RewardEnsemble(args.model, how=args.ensemble)
    transform = Transform(args.transform, getattr(scorer.model, "config", None), args.reference)
    depends = None
    if args.transform or len(args.model) > 1:
        configs = [member.model.config for member in getattr(scorer, "members", [scorer])]
        depends = [[c.reward_mean, c.reward_std, c.reward_temperature] for c in configs]
        depends += [args.transform, args.reference, args.ensemble if len(args.model) > 1 else None]
    return scorer, transform, depends


def _accelerator():
    """The processes that `accelerate launch` or `torchrun` started; None for one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    from accelerate import Accelerator
    from torch.accelerator import is_available

    return Accelerator(cpu=not is_available())  # by itself it does not see several processes on CPUs


# ----------------------------------------------------------------------------------------------------- compare, others


def _model(args) -> str:
    """The model that was named, or the one of this project."""
    from .base import published

    return args.model or str(published())


def _compare(args):
    from .scoring import GRMScorer

    if args.explain or args.signals is not None:
        _explain(args)
        return
    _signals(args)
    if args.threshold is not None:
        raise ValueError("--threshold is of the agreement of signals: add --explain.")
    scorer = GRMScorer(_model(args))
    result = scorer.best_of_n(args.prompt, [args.answer_a, args.answer_b])
    reward_a, reward_b = result.scores
    probability = scorer.probability(reward_a, reward_b)
    if args.json:
        print(json.dumps({"reward_a": reward_a, "reward_b": reward_b, "probability_a": probability}))
        return
    if reward_a == reward_b:
        print(f"Tie: both answers have reward {reward_a:.4f}.")
        return
    winner, chance = ("A", probability) if reward_a > reward_b else ("B", 1 - probability)
    print(f"{winner} wins with probability {chance:.3f} (rewards: A {reward_a:.4f}, B {reward_b:.4f}).")


def _explain(args):
    from dataclasses import asdict

    from .scoring import GRMScorer
    from .signals import SIGNALS, check_threshold

    check_threshold(args.threshold)
    scorer = GRMScorer(_model(args))
    stored = scorer.model.config.signals
    chosen = None if args.signals is not None or not (stored and stored["names"]) else stored
    everything = [name for name, signal in SIGNALS.items() if signal.needs in ("", "messages")]
    if not scorer.tokenizer.chat_template:
        everything = [name for name in everything if not SIGNALS[name].needs]
    extra = ["implicit"] * bool(args.reference_model) + ["critique"] * args.generate
    names, settings = _signals(args, [*chosen["names"], *extra] if chosen else [*everything, *extra])
    threshold = args.threshold
    if threshold is None and chosen and not extra:
        threshold = chosen["threshold"]
    found = scorer.compare(args.prompt, args.answer_a, args.answer_b, names, threshold, **settings)
    if args.json:
        print(json.dumps(asdict(found), ensure_ascii=False))
        return
    for name, probability in found.probabilities.items():
        print(f"{name:<14}A {found.a[name]:>10.4f}   B {found.b[name]:>10.4f}   A is better: {probability:.3f}")
        print(f"{'':<14}{SIGNALS[name].sentence}")
        for side, record in (("A: ", found.a), ("B: ", found.b), ("", found.details)):
            if said := _details(record, name):
                print(f"{'':<14}{side}{said}")
    if found.winner == "tie":
        print("Tie: both answers have the same reward.")
        return
    agree = f"{round(found.agreement * len(found.probabilities))} of {len(found.probabilities)} signals agree"
    print(f"{found.winner.upper()} wins by the reward head. {agree}; their divergence is {found.divergence:.3f} bits.")
    if found.threshold is None and stored and not stored["names"]:
        print("On the validation file no signal helped: nothing says from which agreement on to trust this.")
    elif found.threshold is None:
        print("Nothing says from which agreement on to trust this: see `grm eval --choose`.")
    elif found.abstain:
        least = "--threshold asks for" if args.threshold is not None else "on the validation file was enough"
        print(f"Abstain: fewer agree than {least} ({found.threshold:.2f}).")


def _details(record, name):
    """What belongs to a signal in a record, in words."""
    found = {key.split("/", 1)[1]: value for key, value in record.items() if key.startswith(f"{name}/")}
    return ", ".join(value if key == "text" else f"{key} {value:.4f}" for key, value in found.items())


def _best_of_n(args):
    from .scoring import GRMScorer
    from .scoring.files import lines_of

    answers = list(args.answers)
    if args.file:
        answers += map(_answer, lines_of(args.file))
    if not answers:
        raise ValueError("no answers: give them behind the prompt, or in a file by --answers.")
    result = GRMScorer(_model(args)).best_of_n(args.prompt, answers)
    if args.json:
        print(json.dumps({"best": result.best, "order": result.order, "scores": result.scores}, ensure_ascii=False))
        return
    for place, i in enumerate(result.order, 1):
        print(f"{place}. {result.scores[i]:.4f}  {answers[i]}")


def _answer(line):
    """The answer in a line: the line itself, or the JSON string in it (which may hold line breaks)."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return line
    return value if isinstance(value, str) else line


def _eval(args):
    from .evaluation import compare, evaluate, read_results, signal_report, store_choice
    from .evaluation.report import terminal, write_report
    from .evaluation.scorers import as_scorer
    from .evaluation.signals import ready
    from .rewards import RewardEnsemble
    from .signals import check_threshold

    names, settings = _signals(args)
    check_threshold(args.threshold)
    if args.choose and not (names and args.data and Path(args.data).is_file() and Path(args.model).is_dir()):
        raise ValueError("--choose needs --signals, a file of pairs (--data) and a model in a folder.")
    if args.choose and not Path(args.model, "config.json").is_file():
        raise ValueError(
            f"--choose writes into a model's config.json, and {args.model!r} has none. Make an adapter a whole model "
            "by `grm merge`."
        )
    if not args.suite and not args.data:
        raise ValueError("nothing to evaluate on: pass --suite, or your own pairs by --data.")
    if args.threshold is not None and not names:
        raise ValueError("--threshold is of the agreement of signals: name some by --signals.")
    suites = list(dict.fromkeys((args.suite or "own").split(",")))
    if args.choose and len(suites) > 1:
        raise ValueError("--choose is made on the pairs of one suite, and there are several.")
    if args.compare and not args.output:
        raise ValueError("--compare needs --output: rows are compared one by one, and they are kept there.")
    if args.card and not Path(args.model).is_dir():
        raise ValueError(f"--card writes into a folder, and {args.model!r} is not a folder.")
    accelerator = _accelerator()
    if args.member and args.trust_remote_code:
        raise ValueError("--trust-remote-code is for a model that is no GRM, and --member makes an ensemble of GRMs.")
    if args.member:
        scorer = RewardEnsemble([args.model, *args.member])
    else:
        scorer = as_scorer(args.model, accelerator=accelerator, trust_remote_code=args.trust_remote_code)
    if names:
        names, settings = ready(scorer, names, settings)
    runs, comparisons, reports = [], [], []
    for suite in suites:
        results = evaluate(
            scorer, suite, args.data, subset=args.subset, limit=args.limit, output=args.output,
            accelerator=accelerator, progress=True, revision=args.revision,
        )
        others = [read_results(path, results) for path in args.compare]
        runs += [results, *others]
        comparisons += [compare(results, other) for other in others]
        if names:
            reports.append(signal_report(scorer, results, names, **settings))
    if accelerator is not None and not accelerator.is_main_process:
        return
    summaries = [report.summary(1.0 if args.threshold is None else args.threshold) for report in reports]
    if args.output:
        write_report(args.output, runs, comparisons, summaries)
    print(terminal(runs, comparisons, summaries))
    if args.choose:
        (report,) = reports
        chosen = store_choice(args.model, report, args.data)
        print(f"chosen: {', '.join(chosen['names']) or 'no signal'}; threshold: {chosen['threshold']}")
    if args.output:
        print(f"\nreport: {Path(args.output) / 'report.html'}")
    if args.card:
        _evaluated(args.model, runs[:: 1 + len(args.compare)])


def _evaluated(folder, runs):
    """Put results on the card of a model's folder, and print that."""
    from .evaluation.report import card_rows
    from .hub.card import add_results

    rows, left_out = card_rows(runs)
    if left_out:
        print(f"not on the card, being no whole benchmark: {', '.join(left_out)}")
    if rows:
        for suite in add_results(folder, rows):
            print(f"not on the card, where somebody has written another result: {suite}")
        print(f"card: {Path(folder) / 'README.md'}")


def _verify(args):
    from .scoring import GoldenError, verify

    try:
        if args.url is None:
            if args.api_key is not None:
                raise ValueError("--api-key belongs to --url.")
            print(verify(args.model))
        else:
            from .serving.verify import verify_served

            print(verify_served(args.model, args.url, args.api_key))
    except GoldenError as error:
        summary, table = str(error).split("\n", 1)
        print(table)
        raise ValueError(summary) from error


def _serve(args):
    try:
        from .serving.server import ROUTES, Limits, serve
    except ImportError as error:
        raise ImportError(f"`grm serve` needs the extra: pip install 'grm-hf[serve]' ({error})") from error

    if unknown := sorted(set(args.route or ()) - set(ROUTES)):
        raise ValueError(f"there is no route {unknown[0]!r}; the routes are {', '.join(ROUTES)}.")
    _check_place(args.model)
    serve(
        args.model,
        host=args.host,
        port=args.port,
        routes=args.route or tuple(ROUTES),
        api_key=args.api_key or os.environ.get("GRM_API_KEY"),
        name=args.name,
        limits=Limits(body=args.max_body, texts=args.max_texts, queue=args.max_queue),
        max_tokens_per_batch=args.max_tokens_per_batch,
        dtype=args.dtype,
    )


def _refresh(args):
    from .hub import refresh
    from .scoring import GoldenError

    try:
        done = refresh(args.model, revision=args.revision)
    except GoldenError as error:
        summary, table = str(error).split("\n", 1)
        print(table)
        raise ValueError(summary) from error
    print(done.table)
    for name, how in done.changed.items():
        print(f"changed: {name} ({how})")
    if done.changed:
        print(f"refreshed: {args.model}" + (f" (revision {done.revision})" if done.revision else ""))


def _merge(args):
    from .hub.merge import merge_adapter

    merge_adapter(args.adapter, args.output)
    print(f"merged model: {args.output}")


def _push(args):
    from .hub import push_folder

    done = push_folder(
        args.folder, args.repo_id, private=args.private, revision=args.revision, tag=args.tag,
        commit_message=args.message, replace_card=args.replace_card,
    )
    repo_id = done.repo_url.repo_id
    print(f"pushed: {done.repo_url} (revision {done.oid})")
    print(f"load:   AutoModelForSequenceClassification.from_pretrained({repo_id!r}, trust_remote_code=True)")


def _convert(args):
    from .hub import convert

    done = convert(
        args.source, args.output, args.base, bos_policy=args.bos_policy, max_length=args.max_length,
        revision=args.revision,
    )
    config = done.model.config
    print(f"found: {done.layout}; LM head: {done.lm_head}")
    print(f"bos_policy: {config.bos_policy}; max_sequence_length: {config.max_sequence_length}")
    print(f"converted model: {args.output}")


def _export(args):
    from .hub import export

    done = export(args.model, args.output, revision=args.revision)
    print(f"exported as {done.architecture}: {args.output} (largest difference on golden rows {done.difference:.1e})")


def _demo(args):
    from .demo.run import run

    with _work(lambda: "To start over, run the same command again."):
        run(args.output, args.pairs)


def _check_place(place):
    """One sentence for a mistyped or broken folder, before anything is loaded."""
    from .folders import readable

    with readable(place):
        pass


def _lab(args):
    from .lab.run import make_settings, run

    for place in (args.model, args.gold if ":" not in (args.gold or ":") else None):
        if place:
            _check_place(place)
    settings = make_settings(
        args.quick, args.settings, gold=args.gold, model=args.model, prompts=args.prompts,
        eval_prompts=args.eval_prompts,
    )
    with _work(lambda: _SAME):
        run(args.output, settings)


if __name__ == "__main__":
    sys.exit(main())
