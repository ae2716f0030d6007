"""The plan of a laboratory run: units of work that can be resumed. Each unit ends in one file.

grm lab [--output runs/lab] [--quick] [--gold ...] [--model ... --prompts ... --settings ...]
"""

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..devices import quiet
from . import answers, gold, policies, proxies
from .settings import OWN_MODEL_NEEDS, Settings, prompts_of, unit_file


QUICK = {
    "pretrain_steps": 100,
    "sizes": (64, 128),
    "seeds": 2,
    "members": 2,
    "eval_limit": 3,
    "samples": 408,
    "epochs": 1,
    "policy_size": 64,
    "policy_proxies": ("bt", "sft"),
    "policy_steps": 4,
    "policy_batch": 16,
    "generations": 4,
    "evaluations": 2,
    "policy_samples": 4,
}
PACKAGES = ("torch", "transformers", "trl")


@dataclass(frozen=True)
class Unit:
    """A piece of work whose result is one file, `units/NAME.json`. The file is whole or missing."""

    name: str
    function: Callable[..., dict]
    args: tuple = ()


def plan(settings: Settings, algorithms: list[str]) -> list[list[Unit]]:
    """The units in stages: a stage needs the stages before it."""
    seeds = range(settings.seeds)
    cells = [(labels, size) for size in sorted(settings.sizes, reverse=True) for labels in proxies.LABELS]
    members = [(proxies.BASELINE, m) for m in range(1, settings.members)]
    trainings = [(method, 0) for method in proxies.METHODS] + members
    return [
        [Unit("base", answers.prepare_base)],
        [
            *(Unit(f"candidates-{key}", answers.draw_candidates, (key,)) for key in settings.sets),
            *(Unit(f"pairs-{seed}", answers.draw_pairs, (seed,)) for seed in seeds),
        ],
        [
            Unit(proxies.proxy_name(*cell, method, seed, member), proxies.train_proxy, (*cell, method, seed, member))
            for cell in cells
            for seed in seeds
            for method, member in trainings
        ],
        [
            Unit(proxies.proxy_name(*cell, how, seed), proxies.combine_proxies, (*cell, how, seed))
            for cell in cells
            for seed in seeds
            for how in proxies.ENSEMBLES
        ],
        [
            Unit(policies.policy_name(algorithm, proxy, seed), policies.train_policy, (algorithm, proxy, seed))
            for algorithm in algorithms
            for seed in seeds
            for proxy in settings.policy_proxies
        ],
    ]


def make_settings(quick: bool = False, file: str | None = None, **given) -> Settings:
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`):
            Start from the settings of the quick run.
        file (`str`, *optional*):
            JSON file with values of any of [`Settings`].
        **given:
            Further values, which override the file's; `None` is ignored.

    Raises:
        `ValueError`: a name is unknown, a value is invalid, or your own model comes without learning rates.
    """
    values: dict[str, Any] = dict(QUICK) if quick else {}
    own = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    known = {field.name: field.default for field in fields(Settings)}
    if unknown := sorted(set(own) - set(known)):
        raise ValueError(f"{file} has {unknown}; the settings are {sorted(known)}.")
    own |= {name: value for name, value in given.items() if value is not None}
    if own.get("model") and (missing := [name for name in OWN_MODEL_NEEDS if name not in own]):
        raise ValueError(
            f"A model of your own needs {' and '.join(missing)} in --settings FILE (JSON), for example 1e-5 and 1e-6: "
            "the demo's are for a model of 0.2 million parameters and would ruin it."
        )
    values |= own
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    for name in ("prompts", "eval_prompts"):
        if values.get(name) and not os.path.isfile(values[name]):
            raise ValueError(f"`{name}`: there is no file {values[name]!r}.")
    return Settings(**values)


def run(output_dir: str | Path = "runs/lab", settings: Settings | None = None) -> dict:
    """
    Does the remaining units of a run and writes its report.

    Every finished unit of work is a file in `units/`, and an interrupted run goes on after them. An environment with
    the last TRL that has PPO adds its units to those of another environment. Units have one thread each and seed
    themselves, so no number depends on the number of cores. They run in other processes: a script that calls this
    needs `if __name__ == "__main__":`.

    Args:
        output_dir (`str` or `Path`, *optional*, defaults to `"runs/lab"`):
            Folder of the run.
        settings ([`Settings`], *optional*):
            See [`make_settings`]; by default the standard run's.

    Returns:
        `dict`: the content of `results.json`. The CSV files are written beside it, and `report.html` if matplotlib is
        installed.

    Raises:
        `ImportError`: the training extra is missing.
        `ValueError`: the folder has a run with other settings, or a setting is invalid.
    """
    try:
        from ..training import GRMRewardTrainer  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The laboratory needs its extra: pip install 'grm-hf[demo]' ({error}).") from error
    from . import report

    started = time.time()
    settings = settings or Settings()
    output = Path(output_dir)
    _check_folder(output, settings)
    prompts_of(settings)
    gold.load_gold(settings.gold)([("hello", "hello")])  # before anything is computed
    algorithms = policies.available()
    stages = plan(settings, algorithms)
    todo = [[unit for unit in stage if not unit_file(output, unit.name).is_file()] for stage in stages]
    count = sum(map(len, todo))
    # A user's own model on an accelerator has it alone.
    workers = min(4, os.cpu_count() or 1) if answers.device(settings).type == "cpu" else 1
    if count:
        spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used threads may hang
        with (
            ProcessPoolExecutor(workers, mp_context=spawn, initializer=_silent) as pool,
            tqdm(total=sum(map(len, stages)), initial=sum(map(len, stages)) - count, unit="unit") as bar,
        ):
            for stage in todo:
                futures = {pool.submit(finish, unit, output, settings): unit.name for unit in stage}
                try:
                    for future in as_completed(futures):
                        bar.set_description(futures[future].split("-")[0])
                        future.result()  # raises here what the unit raised
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        line = {"units": count, "workers": workers, "seconds": round(time.time() - started, 1), **versions()}
        with open(output / "calls.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report.write(output, settings)


def finish(unit: Unit, output: Path, settings: Settings) -> None:
    """Does a unit and writes its result in one move."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = unit.function(output, settings, *unit.args)
    except ValueError as error:
        raise ValueError(f"{unit.name}: {error}") from error
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    result |= {name: round(value, 2) for name, value in spent.items()} | {"versions": versions()}
    file = unit_file(output, unit.name)
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(result), encoding="utf-8")
    os.replace(partial, file)


def _silent() -> None:
    """The first call of a worker process: it prints nothing. The bar belongs to the run, and errors are raised where
    they are awaited."""
    quiet()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    policies.preload()
    gc.collect()
    gc.freeze()  # trainers collect garbage every step: modules need not be looked through each time


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _check_folder(output: Path, settings: Settings) -> None:
    """Starts a folder, or refuses the folder of another run."""
    file = output / "settings.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in wanted | stored if wanted.get(name) != stored.get(name)]
        if differing:
            said = "; ".join(f"{name}: {stored.get(name)} there, {wanted.get(name)} here" for name in differing)
            raise ValueError(
                f"{output} holds a run of other settings ({said}). Choose another --output, or delete it."
            )
        return
    (output / "units").mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
