"""A recipe of several trainings in one YAML: each stage begins with the model of the stage before, and weights may be
extrapolated at the end. HelpSteer2-Preference (2410.01257) is such a recipe.

```yaml
model_name_or_path: Qwen/Qwen3-0.6B     # settings of all stages
output_dir: runs/helpsteer2
stages:
- name: regression                      # its folder in `output_dir`; further keys are settings of this stage alone
  dataset_name: nvidia/HelpSteer2
- name: preference
  pair_loss: scaled
expo:
  a: 0.5                                # or a list, to choose from on the pairs of `dataset_name`
```
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .trainer import _last_complete_checkpoint


FILE = "stages.json"
EXPO = "expo"
EXPO_KEYS = ("a", "dataset_name", "dataset_config", "dataset_test_split")
OF_THE_HUB = ("push_to_hub", "hub_model_id")
OF_THE_CHAIN = ("output_dir", "resume_from_checkpoint")  # are set here, for each stage


@dataclass
class Stage:
    """
    A stage that is to be run.

    Attributes:
        name (`str`): Its name.
        folder (`Path`): Its output folder.
        arguments (`list[str]`): The arguments of `grm train`: a YAML of its own, and the checkpoint to go on from.
        note (`str`): What is particular about it, or `""`.
    """

    name: str
    folder: Path
    arguments: list[str]
    note: str = ""


class Stages:
    """
    A YAML with `stages`, and how far it has been run: `stages.json` in its output folder has the settings of each
    stage that is finished.

    Args:
        path (`str`): The YAML.

    Raises:
        `ValueError`: something in the YAML is missing or has another form.
    """

    def __init__(self, path: str):
        shared = _mapping(path)
        stages, self.expo = shared.pop("stages"), shared.pop(EXPO, None)
        self.shared, self.path = shared, path
        output = shared.get("output_dir")
        if not isinstance(output, str) or not output:
            raise ValueError(f"{path}: `output_dir` is missing; it is the folder of all stages.")
        self.folder = Path(output)
        if "resume_from_checkpoint" in shared:
            raise ValueError(f"{path}: `resume_from_checkpoint` cannot be set: a recipe goes on by itself.")
        if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
            raise ValueError(f"{path}: `stages` must be a list of mappings, each with a `name` and settings.")
        if pushed := [key for settings in (shared, *stages) for key in OF_THE_HUB if key in settings]:
            raise ValueError(
                f"{path}: `{pushed[0]}` cannot be set in a recipe, whose folders are several models. Push the one "
                "that you want when it is done: grm push FOLDER ID."
            )
        self.names = [stage.get("name") for stage in stages]
        self.own = [{key: value for key, value in stage.items() if key != "name"} for stage in stages]
        for name, settings in zip(self.names, self.own, strict=True):
            ours = name in (EXPO, FILE) or str(name).endswith(".yaml")  # files and folders beside those of the stages
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name) or ours:
                raise ValueError(
                    f"{path}: a stage has the name {name!r}; it must name a folder, and not '{EXPO}', '{FILE}' or a "
                    "YAML."
                )
            if wrong := [key for key in (*OF_THE_CHAIN, "stages", EXPO) if key in settings]:
                raise ValueError(
                    f"{path}, stage {name!r}: `{wrong[0]}` cannot be set for a stage; its folder is in `output_dir`, "
                    "and it goes on by itself."
                )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{path}: two stages have the same name, and so the same folder: {self.names}.")
        self._check_expo()

    def _check_expo(self) -> None:
        if self.expo is None:
            return
        if not isinstance(self.expo, dict) or "a" not in self.expo or set(self.expo) - set(EXPO_KEYS):
            raise ValueError(
                f"{self.path}: `{EXPO}` must be a mapping with `a`, and no keys but {', '.join(EXPO_KEYS)}."
            )
        if len(self.names) < 2:
            raise ValueError(f"{self.path}: `{EXPO}` extrapolates from one stage to the next, and there is one stage.")
        if ignored := [key for key in EXPO_KEYS[2:] if key in self.expo and "dataset_name" not in self.expo]:
            raise ValueError(f"{self.path}: `{EXPO}` has `{ignored[0]}` and no `dataset_name`, which it is of.")
        factors = self.expo["a"] if isinstance(self.expo["a"], list) else [self.expo["a"]]
        numbers = all(isinstance(a, (int, float)) and not isinstance(a, bool) and math.isfinite(a) for a in factors)
        if not factors or not numbers:
            raise ValueError(f"{self.path}: `a` of `{EXPO}` is {self.expo['a']!r}; it must be one number, or a list.")
        if len(factors) > 1 and "dataset_name" not in self.expo:
            raise ValueError(
                f"{self.path}: `{EXPO}` has several `a`; to choose one it needs `dataset_name`, of pairs."
            )

    def to_run(self) -> Iterator[Stage]:
        """The stages that are not finished. Each is asked for after the one before it has been run."""
        before = None
        for name, own in zip(self.names, self.own, strict=True):
            folder, note = self.folder / name, ""
            settings = {**self.shared, **own, "output_dir": str(folder)}
            if before is not None:
                settings["model_name_or_path"] = own.get("model_name_or_path", str(before))
                if settings.get("use_peft") and _is_adapter(settings["model_name_or_path"]):
                    settings["use_peft"] = False
                    note = "the adapter of the stage before is trained further; `use_peft` and `lora_*` are its own"
            before = folder
            if not self._is_finished(name, settings):
                yield Stage(name, folder, self._arguments(name, settings, folder), note)
                self._finish(name, settings)

    def extrapolation(self) -> dict[str, Any] | None:
        """The arguments of [`~grm_hf.hub.extrapolate`] but for pairs, if it is asked for and not done."""
        if self.expo is None or self._is_finished(EXPO, self.expo):
            return None
        start, end = (str(self.folder / name) for name in self.names[-2:])
        return {"start": start, "end": end, "output_dir": str(self.folder / EXPO), "a": self.expo["a"]}

    def extrapolated(self) -> None:
        """The extrapolation is done."""
        self._finish(EXPO, self.expo)

    # ------------------------------------------------------------------------------------------------------ the record

    def _finished(self) -> dict[str, Any]:
        path = self.folder / FILE
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}). Remove it to run all stages again.") from None

    def _is_finished(self, name: str, settings: dict) -> bool:
        record = self._finished()
        if name not in record:
            return False
        _require_same(settings, record[name], name, self.folder / name)
        return True

    def _finish(self, name: str, settings: Any) -> None:
        _write(self.folder / FILE, json.dumps({**self._finished(), name: settings}, indent=1, default=str) + "\n")

    def _arguments(self, name: str, settings: dict, folder: Path) -> list[str]:
        """The YAML of a stage, and its last checkpoint if it was interrupted."""
        path = self.folder / f"{name}.yaml"
        checkpoint = _checkpoint(folder)
        if checkpoint is not None and path.is_file():
            _require_same(settings, _mapping(path), name, folder)
        _write(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return ["--config", str(path), *(["--resume_from_checkpoint", checkpoint] if checkpoint else [])]


def has_stages(path: str) -> bool:
    """Whether a YAML has `stages`."""
    return "stages" in _mapping(path)


def _mapping(path: str | Path) -> dict:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of settings.")
    return content


def _require_same(settings: dict, before: dict, name: str, folder: Path) -> None:
    """Refuse to go on with other settings than those that a folder was made with."""
    now = json.loads(json.dumps(settings, default=str))
    before = json.loads(json.dumps(before, default=str))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"stage {name!r} was run in '{folder}' with {key}={before.get(key)!r}, and the YAML now has "
            f"{key}={now.get(key)!r}. Choose another `output_dir`, or remove that folder and '{FILE}'."
        )


def _checkpoint(folder: Path) -> str | None:
    try:
        return _last_complete_checkpoint(folder)
    except ValueError:  # there is none
        return None


def _is_adapter(place: str) -> bool:
    return Path(place, "adapter_config.json").is_file() and not Path(place, "config.json").is_file()


def _write(path: Path, text: str) -> None:
    """All or nothing; several processes may write the same text at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
