"""Pushes to the Hub: one commit with everything that a model needs to load by its id, or no commit.

A push always sends a standalone model. An adapter names its base by a path on this machine, so it is first merged into
that base; the adapter itself goes into `adapter/`. The same commit deletes weights of an earlier push that the new one
does not replace, because a loader would prefer them. The card is merged with people's edits, and unchanged files are
not sent again.
"""

import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.utils import logging

from ..configuration_grm import GRMConfig
from ..folders import loaded_weights, readable
from ..modeling_grm import GRMForSequenceClassification
from . import card
from .tokenizer import spell_for_transformers_4


logger = logging.get_logger(__name__)

CODE = ("configuration_grm.py", "heads_grm.py", "modeling_grm.py")
# Not pushed, silently: pickles (they hold the settings of the run with its token, and loading them runs code), files
# that only the run needs, private and hidden files.
KEPT_BACK = (
    *("*.pt", "*.pth", "*.bin", "trainer_state.json", "_*", ".*"),
    *("checkpoint-*", "base", "reference_logps", "runs", "logs"),
)
FOLDERS = (".eval_results", "additional_chat_templates", "adapter")
# Files of one set of weights and of one tokenizer: those of an earlier push would be wrong beside new ones.
OF_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "adapter_config.json",
    "adapter/*",
    "golden_rows.json",
    ".eval_results/grm_hf.yaml",
    card.BENCHMARKS,
)
OF_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
)
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
OF_COMMIT = ("commit_description", "create_pr", "num_threads")
ATTEMPTS = 3  # if somebody else commits between our look at the repository and our commit


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    replace_card: bool = False,
    **commit_kwargs,
) -> CommitInfo:
    r"""
    Push a saved reward model (or an adapter of one, merged) to the Hub, complete: weights, code, tokenizer, card,
    golden rows, results.

    Args:
        folder (`str` or `Path`):
            Folder of `save_pretrained`, a checkpoint or a finished run.
        repo_id (`str`):
            `name` or `namespace/name`. Made if it does not exist.
        private (`bool`, *optional*):
            Whether a new repository is private. An existing one does not change.
        revision (`str`, *optional*):
            Branch, made if it does not exist. Defaults to `main`.
        tag (`str`, *optional*):
            Name for the pushed revision. An existing tag of another revision is never moved.
        token (`str` or `bool`, *optional*):
            Defaults to the token of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, *optional*, defaults to `"Upload reward model"`):
            First line of the commit.
        replace_card (`bool`, *optional*, defaults to `False`):
            Replace the card on the Hub by the folder's, even if somebody has edited it there.
        **commit_kwargs:
            Passed to `HfApi.create_commit` (`commit_description`, `create_pr`).

    Returns:
        [`~huggingface_hub.CommitInfo`]: `.oid` is the revision with the model, even if nothing had changed.

    Raises:
        `ValueError`: the folder is not a complete reward model or holds a token, or the Hub refuses the token or the
        tag.
        `OSError`: the push did not get through; the repository is as it was, and the push can be repeated.
    """
    _refuse_unknown(commit_kwargs)
    with stage(folder, repo_id.split("/")[-1]) as staged:
        return commit(
            staged,
            repo_id,
            private=private,
            revision=revision,
            tag=tag,
            token=token,
            replace_card=replace_card,
            commit_message=commit_message,
            **commit_kwargs,
        )


def push_model(
    model: GRMForSequenceClassification,
    repo_id: str,
    *,
    tokenizer=None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    **kwargs,
) -> CommitInfo:
    r"""
    Push a live reward model, as `model.push_to_hub`.

    Args:
        model ([`GRMForSequenceClassification`]):
            The model.
        repo_id (`str`):
            `name` or `namespace/name`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer to push with it. By default that of the folder or id that the model was loaded from.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
            Size of a weights file.
        tags (`list[str]`, *optional*):
            Further tags of the card.
        **kwargs:
            As for [`push_folder`].
    """
    _refuse_unknown(set(kwargs) - {"private", "revision", "tag", "token", "commit_message", "replace_card"})
    if tokenizer is None and model.name_or_path:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                model.name_or_path, token=kwargs.get("token"), **model.hub_arguments
            )
        except (OSError, ValueError) as error:
            logger.warning(f"'{model.name_or_path}' has no tokenizer that can be loaded: {error}")
    if tokenizer is None:
        logger.warning(f"'{repo_id}' is pushed without tokenizer: pass `tokenizer=...`, or push it by itself.")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not (Path(folder) / "adapter_config.json").is_file():
            name = repo_id.split("/")[-1]
            text = card.card_of_folder(folder, name, [*(model.model_tags or []), *(tags or [])])
            (Path(folder) / "README.md").write_text(text, encoding="utf-8")
        return push_folder(folder, repo_id, **kwargs)


def _refuse_unknown(commit_kwargs):
    """Before anything is saved or sent."""
    if unknown := sorted(set(commit_kwargs) - set(OF_COMMIT)):
        raise ValueError(
            f"A push takes no {', '.join(f'`{name}`' for name in unknown)}. It takes `private`, `revision`, `tag`, "
            f"`token`, `commit_message`, `replace_card` and, for the commit, {', '.join(f'`{n}`' for n in OF_COMMIT)}."
        )


# ------------------------------------------------------------------------------------------------------------- staging


def stage(folder: str | Path, name: str) -> tempfile.TemporaryDirectory:
    """
    A complete, standalone copy for a push. Later changes of the folder do not affect it.

    Args:
        folder (`str` or `Path`):
            Folder of a model or an adapter.
        name (`str`):
            Name of the model, for a new card.
    """
    folder = Path(folder)
    with readable(folder):
        if not folder.is_dir():
            raise ValueError(f"There is no folder '{folder}' to push.")
    staged = tempfile.TemporaryDirectory(prefix="grm_push_")
    try:
        out, left = Path(staged.name), []
        adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
        if adapter:
            _merge(folder, out)
        weights = loaded_weights(folder)
        if len(weights) > 1 or weights != ["model.safetensors"]:
            weights = [*weights, "model.safetensors.index.json"]
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                if path.name in FOLDERS:
                    shutil.copytree(path, out / path.name, copy_function=_link)
                elif not any(fnmatch(path.name, pattern) for pattern in KEPT_BACK):
                    left.append(f"{path.name}/")
            elif any(fnmatch(path.name, pattern) for pattern in KEPT_BACK):
                continue
            elif path.match("model*.safetensors*") and path.name not in weights:
                left.append(path.name)  # of an earlier save: no loader takes them
            elif adapter and path.name.startswith("adapter_"):
                (out / "adapter").mkdir(exist_ok=True)
                if path.name != "adapter_config.json":
                    _link(path, out / "adapter" / path.name)
            elif not (out / path.name).exists():
                _link(path, out / path.name)
        if left:
            logger.warning(f"Not pushed of '{folder}': {left}")
        if adapter:
            _write_adapter_config(folder, out)
        _require_complete(folder, out)
        for code in CODE:
            if not (out / code).is_file():
                shutil.copy(Path(__file__).parents[1] / code, out / code)
        spell_for_transformers_4(out)
        readme = out / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else card.card_of_folder(out, name)
        readme.unlink(missing_ok=True)  # it may be a link to the folder's
        readme.write_text(card.without_paths(text), encoding="utf-8")
        return staged
    except BaseException:
        staged.cleanup()
        raise


def _link(source, target):
    """A hard link if the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _merge(folder, out):
    from .merge import merge_adapter  # only an adapter needs peft

    with torch.random.fork_rng(devices=[]):  # building the adapter draws numbers that a running training would miss
        merge_adapter(str(folder), str(out))


def _write_adapter_config(folder, out):
    """The adapter's settings, without the path on this machine that they give as its base."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if base and (Path(base).is_absolute() or Path(base).exists()):
        settings["base_model_name_or_path"] = None
    (out / "adapter" / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _require_complete(folder, out):
    """Refuse a folder that would not load from the Hub, before anything is sent."""
    if not (out / "config.json").is_file():
        raise ValueError(
            f"'{folder}' holds neither a model (config.json) nor an adapter (adapter_config.json): nothing to push."
        )
    GRMConfig.get_config_dict(out)  # refuses other models
    keys: list[str] = []
    for name in loaded_weights(out):
        if not (out / name).is_file():
            raise ValueError(f"'{folder}' lacks the weights file {name}: save the model there again.")
        try:
            with safe_open(out / name, framework="pt") as file:
                keys += file.keys()
        except Exception as error:  # the error class of safetensors is not a ValueError
            raise ValueError(f"{name} in '{folder}' cannot be read ({error}): save the model there again.") from error
    if not any(key.startswith("score.") for key in keys):
        raise ValueError(f"The weights in '{folder}' have no reward head (`score.`): save a reward model there.")
    if not (out / "tokenizer_config.json").is_file():
        logger.warning(f"'{folder}' has no tokenizer: who loads the model from the Hub will need one from elsewhere.")


# ---------------------------------------------------------------------------------------------------------- committing


def commit(
    staged: str | Path,
    repo_id: str,
    *,
    private=None,
    revision=None,
    tag=None,
    token=None,
    commit_message=None,
    replace_card=False,
    **commit_kwargs,
) -> CommitInfo:
    """Send a staged folder in one commit. Arguments as in [`push_folder`]."""
    staged, api = Path(staged), HfApi(token=token)
    secret = token if isinstance(token, str) else get_token()
    files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    with explaining(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        text = _finished_card(files["README.md"].read_text(encoding="utf-8"), repo_id, api)
        for attempt in range(ATTEMPTS):
            info = api.model_info(repo_id, revision=revision)
            there = {file.rfilename for file in info.siblings or ()}
            merged = text if replace_card or "README.md" not in there else _merged_card(text, repo_id, info.sha, api)
            _refuse_secrets(files, merged, secret)
            operations: list = [
                CommitOperationAdd(name, merged.encode() if name == "README.md" else str(path))
                for name, path in files.items()
            ]
            operations += [CommitOperationDelete(name) for name in sorted(_stale(there, files))]
            try:
                done = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=commit_message or "Upload reward model",
                    revision=revision,
                    parent_commit=info.sha,
                    **commit_kwargs,
                )
                break
            except HfHubHTTPError as error:
                if error.response.status_code != 412 or attempt == ATTEMPTS - 1:
                    raise
        if tag is not None:
            _tag(api, repo_id, tag, done.oid)
    return done


@contextmanager
def explaining(repo_id: str):
    """A context around talk with the Hub, whose errors say what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        raise explained(error, repo_id) from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # that of the HTTP library, another one in other versions of huggingface_hub
        raise OSError(
            f"The push to '{repo_id}' did not get through ({type(error).__name__}: {error}). The repository is as it "
            "was; push again."
        ) from error


def _stale(there, files):
    """Files of an earlier push that this one does not replace and that a loader would take for its own."""
    patterns = [*OF_WEIGHTS, *(OF_TOKENIZER if "tokenizer_config.json" in files else ())]
    return {
        name
        for name in there - set(files)
        # A `*` matches slashes too, and `last-checkpoint/model.safetensors` is another matter.
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    }


def _finished_card(text, repo_id, api):
    """The card under its name on the Hub, with the license of the base."""
    text = card.rename(text, repo_id)
    base = card.metadata(text).get("base_model")
    if isinstance(base, str) and "license" not in card.metadata(text):
        try:
            data = api.model_info(base).card_data
        except Exception as error:  # gated, deleted, offline: the card then names no license
            logger.warning(f"The license of '{base}' could not be looked up ({type(error).__name__}).")
        else:
            for key in ("license", "license_name", "license_link"):
                if value := (data or {}).get(key):
                    text = card.set_field(text, key, value)
    return text


def _merged_card(ours, repo_id, revision, api):
    theirs = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
    here, there = card.edited_lines(ours), card.edited_lines(theirs)
    if there < here:
        return ours  # edited here, and whatever was written there stands here too
    if here - there:
        logger.warning(
            f"The card was edited both here and on the Hub ('{repo_id}'). The text on the Hub stays; not pushed: "
            f"{sorted(here - there)}. To push the card from here instead: `grm push --replace-card`."
        )
    return card.merge_cards(theirs, ours)


def _refuse_secrets(files, text, token):
    for name, path in files.items():
        if path.suffix in (".md", ".json", ".yaml", ".yml", ".txt", ".py", ".jinja", ".csv", ".jsonl"):
            content = text if name == "README.md" else path.read_text(encoding="utf-8", errors="replace")
            if SECRET.search(content) or (token and token in content):
                raise ValueError(f"{name} holds an access token of the Hub. Nothing was pushed: take it out first.")


def _tag(api, repo_id, tag, oid):
    there = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag not in there:
        api.create_tag(repo_id, tag=tag, revision=oid)
    elif there[tag] != oid:
        raise ValueError(
            f"The model was pushed (revision {oid}), but not tagged: the tag '{tag}' names revision {there[tag]} "
            "already. Choose another tag, or delete that one."
        )


def explained(error: HfHubHTTPError, repo_id: str) -> Exception:
    """The meaning of the Hub's answer, in words."""
    status = error.response.status_code
    if status == 401:
        return ValueError(
            "The Hub does not accept the login (401). Run `hf auth login`, or set HF_TOKEN to a token that is valid."
        )
    if status == 403:
        return ValueError(f"The token may not write to '{repo_id}' (403). Log in with one that may: `hf auth login`.")
    return OSError(f"The push to '{repo_id}' did not get through. The repository is as it was; push again. ({error})")
