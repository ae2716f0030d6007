"""Push and pull against a local Hub (`hub.py`) over real HTTP, with the official clients.

The client reads its settings when it is imported, and the suite runs offline, so its side runs in processes of its own
that stay alive for the module: a `Client` is told the name of a `do_...` function below and its arguments. `publisher`
has grm_hf; `reader` cannot import it, as whoever loads a model by its id.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hub import Hub, User


pytestmark = pytest.mark.trainer

TOKEN, STRANGER, READ_ONLY = ("hf_" + letter * 34 for letter in "aer")
CHATS = [
    [{"role": "user", "content": "one two"}, {"role": "assistant", "content": f"{answer} good"}]
    for answer in ("three", "four five", "six")
]
MODEL_FILES = {"config.json", "configuration_grm.py", "heads_grm.py", "modeling_grm.py", "README.md"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


class Client:
    """A process that talks to the Hub. Calling it runs `do_NAME(**arguments)` there; what that raises, it raises."""

    def __init__(self, hub, home, token=TOKEN, clean=False):
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.stderr = home, home / "stderr.txt"
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "TRANSFORMERS_VERBOSITY"}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_DEBUG": "0", "no_proxy": "127.0.0.1", "HF_XET_CACHE": str(home)}
        if token:
            env["HF_TOKEN"] = token
        code = "sys.modules['grm_hf'] = None; " if clean else ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; {code}import test_hub; test_hub.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr.open("w"),
            text=True,
            cwd=home,
            env={**env, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).resolve().parents[:2]))},
        )

    def __call__(self, name, **arguments):
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.stderr.read_text()[-3000:]
        answer = json.loads(answer)
        if "error" in answer:
            raise Refused(*answer["error"])
        return answer["result"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


class Refused(Exception):
    """What a client raised: name of the class, message, traceback."""

    def __str__(self):
        return f"{self.args[0]}: {self.args[1]}"


def serve():
    """The other end of a `Client`."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"result": globals()[f"do_{name}"](**arguments)}
        except BaseException as error:
            print(traceback.format_exc(), file=sys.stderr)
            answer = {"error": [type(error).__name__, str(error), traceback.format_exc()]}
        print(json.dumps(answer), file=answers, flush=True)


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.users |= {TOKEN: User("ann", orgs=("lab",)), STRANGER: User("eve"), READ_ONLY: User("ann", role="read")}
    yield hub
    hub.close()


def client(**options):
    @pytest.fixture(scope="module")
    def fixture(hub, tmp_path_factory):
        client = Client(hub, tmp_path_factory.mktemp("client"), **options)
        yield client
        client.close()

    return fixture


publisher = client()
reader = client(clean=True)
anonymous = client(token=None)
plain = client(clean=True)  # of the Hub itself: never imports transformers


# -------------------------------------------------------------------------------- what runs in the client's process


def do_api(method, **arguments):
    """A method of the official client; of what it returns, what JSON can hold."""
    from huggingface_hub import HfApi

    return _jsonable(getattr(HfApi(token=arguments.pop("token", None)), method)(**arguments))


def _jsonable(value):
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "__dict__"):  # some of the client's results are strings with attributes
        value = vars(value)
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def do_commit(repo_id, files, parent=None, repo_type="model"):
    from huggingface_hub import CommitOperationAdd, HfApi

    add = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    return HfApi().create_commit(repo_id, add, commit_message="by hand", parent_commit=parent, repo_type=repo_type).oid


def do_read_range(path, start, end):
    from huggingface_hub import HfFileSystem

    return HfFileSystem().cat_file(path, start=start, end=end).decode()


def do_score(repo_id, revision=None, token=None, auto="AutoModelForSequenceClassification"):
    import torch
    import transformers

    assert sys.modules["grm_hf"] is None
    where = {"revision": revision, "token": token, "trust_remote_code": True}
    model = getattr(transformers, auto).from_pretrained(repo_id, **where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo_id, **where)
    assert type(model).__module__.startswith("transformers_modules.")
    scores = []
    for chat in CHATS:
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            scores.append(model(**inputs).logits.item())
    return scores


def do_save(folder, seed=0):
    """A reward model with its tokenizer in a folder; its scores."""
    import trainers as t

    model = t.grm(seed)
    model.save_pretrained(folder)
    t.TOKENIZER.save_pretrained(folder)
    return scores(model)


def do_push_model(repo_id, seed=0, **arguments):
    import trainers as t

    model = t.grm(seed)
    done = model.push_to_hub(repo_id, tokenizer=t.TOKENIZER, **arguments)
    return {"oid": done.oid, "scores": scores(model)}


def do_train(folder, repo_id, adapter=False, strategy="every_save", base=None, again=False, **arguments):
    """A run that pushes each of its two checkpoints and its end; the scores there and at the end."""
    import trainers as t
    from transformers import TrainerCallback

    found = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            found[str(state.global_step)] = scores(model)
            model.train()

    model = t.grm()
    model.config.base_model = base
    run = t.trainer(
        folder,
        model,
        alpha=0.5,
        save_strategy="steps",
        save_steps=2,
        peft_config=t.lora() if adapter else None,
        evaluation=t.pairs(8, seed=3),
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        extra={"callbacks": [Watch()]},
        push_to_hub=True,
        hub_model_id=repo_id,
        hub_strategy=strategy,
        hub_always_push=True,
        **arguments,
    )
    run.train()
    oid = run.push_to_hub(dataset_name="lab/pairs").oid
    if again:
        assert run.push_to_hub(dataset_name="lab/pairs").oid == oid
    return {"oid": oid, "end": scores(run.model), **found}


def do_grm(*, command):
    """The command line: exit code, standard output, standard error."""
    from grm_hf.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    return [code, out.getvalue(), err.getvalue()]


def do_two_revisions(kind, repo_id, folder):
    """A private repository of language or reward models. The branches `main` and `v2`, and the folder `inner` of `v2`,
    differ in configuration, weights, tokenizer and template. What each holds, by its folder here."""
    import trainers as t
    from huggingface_hub import HfApi
    from tiny import chatml_tokenizer

    api, held = HfApi(), {}
    api.create_repo(repo_id, private=True)
    for number, (branch, inner) in enumerate((("main", ""), ("v2", ""), ("v2", "inner"))):
        place = Path(folder, f"{branch}{inner}")
        tokenizer = chatml_tokenizer(special=["<|im_start|>", *[f"<|{n}|>" for n in range(number)]])
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", f"<|im_end|>{number}")
        model = (t.base if kind == "lm" else t.grm)(number, num_hidden_layers=1 + number)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=place, path_in_repo=inner or None, revision=branch)
        held[f"{branch}{inner}"] = _held(model, tokenizer)
    return held


def _held(model, tokenizer):
    lm = getattr(model, "lm", model)
    weights = sum(float(p.double().abs().sum()) for name, p in lm.named_parameters() if "lora" not in name)
    return [lm.config.num_hidden_layers, round(weights, 3), len(tokenizer), tokenizer.chat_template]


def do_two_ggufs(repo_id, folder):
    """A language model as `weights.gguf` on each of two branches; what they hold."""
    import trainers as t
    from gguf_files import write_gguf
    from huggingface_hub import HfApi
    from tiny import tiny_lm

    api, held = HfApi(), {}
    api.create_repo(repo_id, private=True)
    for number, branch in enumerate(("main", "v2")):
        path = Path(folder, f"{branch}.gguf")
        size = {"vocab_size": len(t.TOKENIZER), "max_position_embeddings": 512, "num_hidden_layers": 1 + number}
        lm = tiny_lm("llama_tied", num_key_value_heads=4, **size)
        write_gguf(path, lm, tokenizer=False)
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        where = {"path_in_repo": "weights.gguf", "repo_id": repo_id, "revision": branch}
        api.upload_file(path_or_fileobj=path, **where)
        held[branch] = _held(lm, t.TOKENIZER)
    return held


def do_load_gguf(how, repo_id, folder, **hub):
    import trainers as t

    if how == "from_base":
        return _held(t.GRMForSequenceClassification.from_base(repo_id, **hub), t.TOKENIZER)
    args = t.settings(folder, model_init_kwargs=hub)
    run = t.GRMRewardTrainer(model=repo_id, args=args, train_dataset=t.pairs(), processing_class=t.TOKENIZER)
    return _held(run.model, run.processing_class)


def do_load(how, repo_id, folder=None, adapter=False, **hub):
    """What a trainer, a scorer or `from_base` loads with these arguments."""
    import trainers as t
    from transformers import AutoTokenizer

    from grm_hf.scoring import GRMScorer, verify

    if how == "trainer":
        run = t.GRMRewardTrainer(
            model=repo_id,
            args=t.settings(folder, model_init_kwargs=hub, max_steps=1),
            train_dataset=t.pairs(),
            peft_config=t.LoraConfig() if adapter else None,
        )
        held = _held(run.model, run.processing_class)
        if adapter:
            run.train()  # and its folder, loaded by itself, gives the same rewards
            run.save_model()
            verify(folder)
        return held
    if how == "scorer":
        scorer = GRMScorer(repo_id, **hub)
        assert scorer.model.hub_arguments == {k: v for k, v in hub.items() if k != "token"}
        return _held(scorer.model, scorer.tokenizer)
    if how == "from_base":
        model = t.GRMForSequenceClassification.from_base(repo_id, **hub)
        return _held(model, AutoTokenizer.from_pretrained(repo_id, **hub))
    assert how == "live"  # loaded by hand: the tokenizer is found by what the model remembers
    kind = t.GRMForSequenceClassification
    model = (kind.from_base if "lm" in repo_id else kind.from_pretrained)(repo_id, **hub)
    run = t.GRMRewardTrainer(model=model, args=t.settings(folder), train_dataset=t.pairs())
    held = _held(run.model, run.processing_class)
    if "lm" not in repo_id:
        assert _held(model, GRMScorer(model).tokenizer) == held
    return held


def do_adapter_of(repo_id):
    """Scores of the adapter that lies beside a pushed model, on the language model it was made from."""
    import trainers as t
    from peft import PeftModel

    return scores(PeftModel.from_pretrained(t.grm(0), repo_id, subfolder="adapter"))


def scores(model):
    import torch
    import trainers as t

    model.eval()
    with torch.no_grad():
        return [
            model(**t.TOKENIZER.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits.item()
            for chat in CHATS
        ]


def close(expected):
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


def files_of(hub, repo_id, revision="main"):
    return set(hub.repos["models", repo_id].find(revision).files) - {".gitattributes"}


def writes(hub, since):
    return hub.calls(r"^(PUT /lfs|POST \S*/commit/)", since)


# ------------------------------------------------------------------------------------------------------ the Hub itself


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_hub_answers_the_official_client(hub, plain, tmp_path, kind):
    repo, where = f"ann/first-{kind}", {"repo_type": kind}
    extra = {"space_sdk": "static"} if kind == "space" else {}
    made = plain("api", method="create_repo", repo_id=repo, **where, **extra)
    assert made["repo_id"] == repo
    with pytest.raises(Refused, match="409"):
        plain("api", method="create_repo", repo_id=repo, **where, **extra)
    assert plain("api", method="create_repo", repo_id=repo, exist_ok=True, **where, **extra)["repo_id"] == repo
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags:\n- mine\n---\nHello\n")
    (folder / "sub" / "notes.txt").write_text("abcdef")
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    oid = plain("api", method="upload_folder", repo_id=repo, folder_path=str(folder), **where)["oid"]
    assert hub.calls("^PUT /lfs/") and hub.calls("objects/verify$")
    prefix = "" if kind == "model" else f"{kind}s/"
    assert plain("read_range", path=f"{prefix}{repo}/sub/notes.txt", start=2, end=5) == "cde"
    assert any(r.status == 206 for r in hub.log)
    before = len(hub.log)
    assert plain("api", method="upload_folder", repo_id=repo, folder_path=str(folder), **where)["oid"] == oid
    assert not writes(hub, before)  # nothing changed
    assert plain("api", method="list_repo_files", repo_id=repo, **where) == [
        ".gitattributes",
        "README.md",
        "sub/notes.txt",
        "weights.bin",
    ]
    info = plain("api", method="get_paths_info", repo_id=repo, paths=["sub", "weights.bin", "sub/notes.txt"], **where)
    assert {row["path"]: row.get("size") for row in info} == {"sub": None, "weights.bin": 256, "sub/notes.txt": 6}
    git = subprocess.run(["git", "hash-object", folder / "sub/notes.txt"], capture_output=True, text=True)
    if git.returncode == 0:
        assert next(row for row in info if row["path"] == "sub/notes.txt")["blob_id"] == git.stdout.strip()
    plain("api", method="create_branch", repo_id=repo, branch="feature/x", **where)
    plain("api", method="create_tag", repo_id=repo, tag="v1", revision=oid, **where)
    with pytest.raises(Refused, match="409"):
        plain("api", method="create_tag", repo_id=repo, tag="v1", **where)
    refs = plain("api", method="list_repo_refs", repo_id=repo, **where)
    assert {ref["name"]: ref["target_commit"] for ref in refs["branches"]} == {"main": oid, "feature/x": oid}
    assert [ref["name"] for ref in refs["tags"]] == ["v1"]
    newer = plain("commit", repo_id=repo, files={"a.txt": "new"}, parent=oid, repo_type=kind)
    with pytest.raises(Refused, match="412"):
        plain("commit", repo_id=repo, files={"a.txt": "stale"}, parent=oid, repo_type=kind)
    commits = plain("api", method="list_repo_commits", repo_id=repo, **where)
    assert [c["commit_id"] for c in commits][:2] == [newer, oid]
    for revision, has in (("v1", False), ("main", True), ("feature/x", False), (oid, False)):
        got = plain("api", method="snapshot_download", repo_id=repo, revision=revision, **where)
        assert (Path(got) / "a.txt").exists() == has
        assert (Path(got) / "weights.bin").read_bytes() == bytes(range(256))
    seen = plain("api", method="repo_info", repo_id=repo, **where)
    assert seen["sha"] == newer and seen["tags"] == ["mine"]
    assert repo in [row["id"] for row in plain("list_all", kind=kind)]
    plain("api", method="delete_file", path_in_repo="a.txt", repo_id=repo, **where)
    assert "a.txt" not in hub.repos[f"{kind}s", repo].find("HEAD").files
    if kind == "space":
        assert plain("api", method="get_space_runtime", repo_id=repo)["stage"] == "RUNNING"
    plain("api", method="delete_repo", repo_id=repo, **where)
    with pytest.raises(Refused, match="RepositoryNotFoundError"):
        plain("api", method="repo_info", repo_id=repo, **where)


def do_list_all(kind):
    from huggingface_hub import HfApi

    return [{"id": row.id} for row in getattr(HfApi(), f"list_{kind}s")(author="ann", filter="mine")]


def test_hub_refuses_as_the_hub_does(hub, plain):
    plain("api", method="create_repo", repo_id="ann/closed", private=True)
    plain("commit", repo_id="ann/closed", files={"a.txt": "a"})
    download = {"method": "hf_hub_download", "repo_id": "ann/closed", "filename": "a.txt"}
    assert Path(plain("api", **download)).read_text() == "a"
    look = {"method": "get_hf_file_metadata", "url": f"{hub.url}/ann/closed/resolve/main/a.txt"}
    for token in (STRANGER, False):
        with pytest.raises(Refused, match="RepositoryNotFoundError"):
            plain("api", **look, token=token)
    with pytest.raises(Refused, match="RevisionNotFoundError"):
        plain("api", **download, revision="nowhere")
    with pytest.raises(Refused, match="EntryNotFoundError"):
        plain("api", **{**download, "filename": "b.txt"})
    with pytest.raises(Refused, match="Invalid user token"):
        plain("api", method="whoami", token="hf_nobody")
    assert hub.log[-1].status == 401
    assert plain("api", method="whoami")["name"] == "ann"
    with pytest.raises(Refused, match="403"):
        plain("api", method="create_repo", repo_id="ann/other", token=STRANGER)
    with pytest.raises(Refused, match="403"):
        plain("api", method="create_repo", repo_id="ann/other", token=READ_ONLY)
    plain("api", method="update_repo_settings", repo_id="ann/closed", gated="auto", private=False)
    with pytest.raises(Refused, match="GatedRepoError"):
        plain("api", **look, token=STRANGER)
    hub.repos["models", "ann/closed"].readers.add("eve")
    assert plain("api", **look, token=STRANGER)["size"] == 1


JAVASCRIPT = """
const hub = require("@huggingface/hub");
const [hubUrl, accessToken] = process.argv.slice(2);
const repo = {type: "model", name: "ann/js"}, at = {repo, hubUrl, accessToken};
const text = (found) => found === null ? null : found.text();
(async () => {
  const out = {};
  out.me = (await hub.whoAmI({hubUrl, accessToken})).name;
  await hub.createRepo({...at, private: false});
  out.twice = await hub.createRepo(at).catch((error) => error.statusCode);
  await hub.uploadFiles({...at, files: [
    {path: "folder/a.txt", content: new Blob(["hello world"])},
    {path: "b.bin", content: new Blob([new Uint8Array(300)])},
  ], useXet: false});
  out.files = [];
  for await (const file of hub.listFiles({...at, recursive: true})) out.files.push([file.type, file.path, file.size]);
  out.part = await (await hub.downloadFile({...at, path: "folder/a.txt"})).slice(6, 11).text();
  out.size = (await hub.downloadFile({...at, path: "b.bin"})).size;
  out.none = await hub.downloadFile({...at, path: "none.txt"});
  out.info = (await hub.modelInfo({...at, name: "ann/js", additionalFields: ["sha"]})).sha;
  const paths = await hub.pathsInfo({...at, paths: ["b.bin"]});
  out.lfs = paths[0].lfs.oid;
  await hub.createBranch({...at, branch: "dev"});
  out.there = await hub.fileExists({...at, path: "b.bin", revision: "dev"});
  await hub.deleteFile({...at, path: "b.bin"});
  out.gone = await hub.fileExists({...at, path: "b.bin"});
  out.commits = [];
  for await (const commit of hub.listCommits(at)) out.commits.push(commit.oid);
  await hub.deleteRepo(at);
  console.log(JSON.stringify(out));
})().catch((error) => { console.error(error); process.exit(1); });
"""


def test_hub_answers_the_javascript_client(hub, tmp_path):
    """An independent reading of the protocol. `npm install @huggingface/hub`, and NODE_PATH to its node_modules."""
    node = shutil.which("node")
    found = node and subprocess.run([node, "-e", "require.resolve('@huggingface/hub')"], capture_output=True)
    if not node or found.returncode:
        pytest.skip("needs node and its package @huggingface/hub (NODE_PATH)")
    script = tmp_path / "client.cjs"
    script.write_text(JAVASCRIPT)
    done = subprocess.run([node, script, hub.url, TOKEN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["me"] == "ann" and out["twice"] == 409 and out["none"] is None
    assert ["file", "folder/a.txt", 11] in out["files"] and ["file", "b.bin", 300] in out["files"]
    assert out["part"] == "world" and out["size"] == 300
    import hashlib

    assert out["lfs"] == hashlib.sha256(bytes(300)).hexdigest()
    assert out["there"] is True and out["gone"] is False
    assert len(out["commits"]) == 3 and out["info"] in out["commits"]
    assert ("models", "ann/js") not in hub.repos


# ------------------------------------------------------------------------------------------------------------- pushing


def test_a_live_model_pushes_complete_and_only_what_changed(hub, publisher, reader):
    first = publisher("push_model", repo_id="ann/live")
    assert files_of(hub, "ann/live") >= MODEL_FILES | TOKENIZER_FILES | {"model.safetensors"}
    for auto in ("AutoModelForSequenceClassification", "AutoModel"):
        assert reader("score", repo_id="ann/live", auto=auto) == close(first["scores"])
    card = hub.read("models", "ann/live", "README.md").decode()
    assert 'from_pretrained("ann/live", trust_remote_code=True)' in card

    before = len(hub.log)
    assert publisher("push_model", repo_id="ann/live")["oid"] == first["oid"]
    assert not writes(hub, before)

    # Other weights, in shards: a loader would take the single file of the first push, were it left there.
    second = publisher("push_model", repo_id="ann/live", seed=1, max_shard_size="10KB")
    there = files_of(hub, "ann/live")
    assert "model.safetensors" not in there and sum("-of-" in name for name in there) > 1
    assert reader("score", repo_id="ann/live") == close(second["scores"])
    assert second["scores"] != close(first["scores"])
    assert reader("score", repo_id="ann/live", revision=first["oid"]) == close(first["scores"])
    publisher("push_model", repo_id="ann/live", commit_message="Back again")
    assert not any("-of-" in name or name.endswith("index.json") for name in files_of(hub, "ann/live"))
    assert reader("score", repo_id="ann/live") == close(first["scores"])
    assert hub.repos["models", "ann/live"].find("main").title == "Back again"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_every_pushed_checkpoint_loads_by_id(hub, publisher, reader, tmp_path, adapter):
    repo, folder = f"ann/run-{'lora' if adapter else 'full'}", tmp_path / "run"
    found = publisher(
        "train", folder=str(folder), repo_id=repo, adapter=adapter, hub_private_repo=True, hub_token=TOKEN, again=True
    )
    history = list(hub.repos["models", repo].history(hub.repos["models", repo].find("main")))
    titles = {commit.title: commit.sha for commit in history}
    assert set(titles) == {
        "initial commit",
        "Training in progress, step 2",
        "Training in progress, step 4",
        "End of training",
    }
    assert found["oid"] == titles["End of training"]
    for title, expected in {"step 2": found["2"], "step 4": found["4"], "End of training": found["end"]}.items():
        sha = next(sha for name, sha in titles.items() if name.endswith(title))
        assert files_of(hub, repo, sha) >= MODEL_FILES | TOKENIZER_FILES | {"model.safetensors"}
        assert reader("score", repo_id=repo, revision=sha) == close(expected)
    assert found["2"] != close(found["end"])
    for token in (STRANGER, False):
        with pytest.raises(Refused, match="OSError"):
            reader("score", repo_id=repo, token=token)

    adapters = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert adapters & files_of(hub, repo) == (adapters if adapter else set())
    if adapter:
        assert publisher("adapter_of", repo_id=repo) == close(found["end"])
    assert "golden_rows.json" in files_of(hub, repo)
    code, out, err = grm(publisher, "verify", repo)
    assert code == 0, err
    for sha in titles.values():
        for name in files_of(hub, repo, sha):
            content = hub.read("models", repo, name, sha)
            assert str(tmp_path).encode() not in content and TOKEN.encode() not in content, name
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files_of(hub, repo))
    config = json.loads(hub.read("models", repo, "config.json"))
    assert config["max_sequence_length"] == 1024 and config["reward_std"] != 1.0
    card = hub.read("models", repo, "README.md").decode()
    assert f"# {repo}\n" in card and "- lab/pairs\n" in card
    assert ("## Training" in card) and ("adapter/" in card) == adapter
    assert b"lab/pairs" in hub.read("models", repo, ".eval_results/grm_hf.yaml")


def test_whole_checkpoints_go_along_when_asked(hub, publisher, reader, tmp_path):
    found = publisher(
        "train", folder=str(tmp_path / "run"), repo_id="ann/whole", strategy="checkpoint", hub_token=TOKEN
    )
    there = files_of(hub, "ann/whole")
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/model.safetensors"} <= there
    assert "last-checkpoint/training_args.bin" not in there  # a pickle with the token in it
    assert reader("score", repo_id="ann/whole") == close(found["end"])
    code, out, err = grm(publisher, "verify", "ann/whole")
    assert code == 0, err


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(publisher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, publisher("save", folder=str(folder))


def grm(publisher, *command):
    return publisher("grm", command=[str(part) for part in command])


def test_grm_push(hub, publisher, reader, folder):
    folder, expected = folder
    (folder / "golden_rows.json").write_text("[]")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-5").mkdir(exist_ok=True)
    (folder / "plots").mkdir(exist_ok=True)
    code, out, err = grm(publisher, "push", folder, "lab/cli", "--private", "--tag", "v1", "--message", "First")
    assert code == 0, err
    assert "Not pushed of" in err and "['plots/']" in err and "checkpoint-5" not in err
    oid = hub.repos["models", "lab/cli"].branches["main"]
    assert out == (
        f"pushed: {hub.url}/lab/cli (revision {oid})\n"
        "load:   AutoModelForSequenceClassification.from_pretrained('lab/cli', trust_remote_code=True)\n"
    )
    assert hub.repos["models", "lab/cli"].private
    assert files_of(hub, "lab/cli") == MODEL_FILES | TOKENIZER_FILES | {
        "model.safetensors",
        "golden_rows.json",
        "generation_config.json",
    }
    assert reader("score", repo_id="lab/cli", revision="v1") == close(expected)
    before = len(hub.log)
    code, again, _ = grm(publisher, "push", folder, "lab/cli", "--tag", "v1")  # the tag names this revision: fine
    assert (code, again) == (0, out) and not writes(hub, before)

    code, out, err = grm(publisher, "push", folder, "lab/cli", "--revision", "feature/x")
    assert code == 0 and hub.repos["models", "lab/cli"].branches["feature/x"] == oid
    (folder / "golden_rows.json").unlink()
    (folder / "plots").rmdir()
    code, out, err = grm(publisher, "push", folder, "lab/cli", "--tag", "v1")
    last = err.splitlines()[-1]
    assert code == 1 and last.startswith("grm push: The model was pushed") and "Choose another tag" in last
    assert hub.repos["models", "lab/cli"].tags["v1"] == oid  # never moved
    assert "golden_rows.json" not in files_of(hub, "lab/cli")  # of other weights, for all we know
    assert "golden_rows.json" in files_of(hub, "lab/cli", "feature/x")


def test_grm_push_mistakes_are_one_line(hub, publisher, folder, tmp_path):
    folder, _ = folder
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "none", "There is no folder"), (tmp_path / "empty", "holds neither a model")):
        code, out, err = grm(publisher, "push", source, "ann/mistake")
        assert (code, out) == (1, "") and words in err and err.count("\n") == 1
    code, _, err = grm(publisher, "push", folder, "eve/mistake")
    assert code == 1 and "may not write to 'eve/mistake' (403)" in err and err.count("\n") == 1
    with_wrong_token = publisher("push_with", folder=str(folder), repo_id="ann/mistake", token="hf_" + "x" * 34)
    assert "(401). Run `hf auth login`" in with_wrong_token and "x" * 34 not in with_wrong_token
    assert not [repo for _, repo in hub.repos if "mistake" in repo]


def do_push_with(folder, repo_id, **arguments):
    """The message that `push_folder` ends with."""
    from grm_hf.hub import push_folder

    try:
        push_folder(folder, repo_id, **arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return "pushed"


# -------------------------------------------------------------------------------------- interruptions, other people


@pytest.mark.parametrize(
    "fault",
    [("PUT", "^/lfs/", 400), ("POST", "/commit/", 500), ("POST", "/commit/", 0)],
    ids=["upload", "commit", "connection"],
)
def test_an_interrupted_push_leaves_the_old_revision_and_can_be_repeated(hub, publisher, reader, tmp_path, fault):
    repo = f"ann/cut-{fault[2]}-{fault[0].lower()}"
    old = publisher("push_model", repo_id=repo)
    new = publisher("save", folder=str(tmp_path / "new"), seed=7)
    hub.faults.append(fault)
    message = publisher("push_with", folder=str(tmp_path / "new"), repo_id=repo)
    assert "did not get through" in message and "push again" in message and not hub.faults
    assert hub.repos["models", repo].branches["main"] == old["oid"]
    if fault[0] == "PUT":
        assert reader("score", repo_id=repo) == close(old["scores"])
    assert publisher("push_with", folder=str(tmp_path / "new"), repo_id=repo) == "pushed"
    assert len(hub.repos["models", repo].commits) == 3
    if fault[0] == "PUT":
        assert reader("score", repo_id=repo) == close(new)


def test_somebody_else_commits_meanwhile(hub, publisher, tmp_path):
    old = publisher("push_model", repo_id="ann/busy")
    publisher("save", folder=str(tmp_path / "new"), seed=7)
    before = len(hub.log)
    hub.faults.append(("POST", "/commit/", 412))
    assert publisher("push_with", folder=str(tmp_path / "new"), repo_id="ann/busy") == "pushed"
    assert [r.status for r in hub.calls("/commit/", before)] == [412, 200]
    assert hub.repos["models", "ann/busy"].branches["main"] != old["oid"]


def test_a_card_edited_on_the_hub_is_merged(hub, publisher, tmp_path):
    publisher("push_model", repo_id="ann/edited")
    text = hub.read("models", "ann/edited", "README.md").decode()
    theirs = text.replace("## Usage", "A word from Ann.\n\n## Usage").replace("---\n\n", "license: mit\n---\n\n", 1)
    hub.write("models", "ann/edited", "README.md", theirs.encode())
    publisher("save", folder=str(tmp_path / "new"), seed=3)
    assert publisher("push_with", folder=str(tmp_path / "new"), repo_id="ann/edited") == "pushed"
    merged = hub.read("models", "ann/edited", "README.md").decode()
    assert "A word from Ann." in merged and "license: mit" in merged

    (tmp_path / "new" / "README.md").write_text("A card of my own.\n")
    code, _, err = grm(publisher, "push", tmp_path / "new", "ann/edited")
    assert code == 0 and hub.read("models", "ann/edited", "README.md").decode() == merged
    assert "edited both here and on the Hub" in err and "A card of my own." in err
    code, _, err = grm(publisher, "push", tmp_path / "new", "ann/edited", "--replace-card")
    assert code == 0 and hub.read("models", "ann/edited", "README.md") == b"A card of my own.\n"


def test_a_gated_model_says_so(hub, publisher, reader):
    pushed = publisher("push_model", repo_id="ann/gated")
    hub.repos["models", "ann/gated"].gated = "auto"
    for token in (STRANGER, False):
        with pytest.raises(Refused, match="gated repo"):
            reader("score", repo_id="ann/gated", token=token)
    hub.repos["models", "ann/gated"].readers.add("eve")
    assert reader("score", repo_id="ann/gated", token=STRANGER) == close(pushed["scores"])
    publisher("push_model", repo_id="ann/gated", seed=1)  # its owner still can
    assert hub.repos["models", "ann/gated"].gated == "auto"


def test_the_license_of_the_base_is_looked_up(hub, publisher, plain, tmp_path):
    plain("api", method="create_repo", repo_id="lab/base")
    plain("commit", repo_id="lab/base", files={"README.md": "---\nlicense: apache-2.0\n---\nA base.\n"})
    publisher("train", folder=str(tmp_path / "run"), repo_id="ann/licensed", base="lab/base", strategy="end")
    card = hub.read("models", "ann/licensed", "README.md").decode()
    assert "license: apache-2.0\n" in card and "base_model: lab/base\n" in card


def test_no_token_was_printed(publisher, reader):
    """Last: of everything above."""
    for client in (publisher, reader):
        text = client.stderr.read_text()
        assert text and not any(token in text for token in (TOKEN, STRANGER, READ_ONLY))


# ------------------------------------------------------------------------------------------------------------ staging


def test_what_would_not_load_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from trainers import TOKENIZER, base, grm

    from grm_hf.hub.publish import stage

    grm().save_pretrained(tmp_path / "whole", max_shard_size="10KB")
    TOKENIZER.save_pretrained(tmp_path / "whole")
    with stage(tmp_path / "whole", "name") as staged:
        assert (Path(staged) / "README.md").is_file()
    assert not Path(staged).exists()

    def broken(name):
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / name))

    shard = sorted(broken("shard").glob("model-*"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, which model.safetensors.index.json names"):
        stage(tmp_path / "shard", "name")
    shard = sorted(broken("torn").glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="is incomplete"):
        stage(tmp_path / "torn", "name")
    base().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="not a reward model of type 'grm'"):
        stage(tmp_path / "base", "name")
    grm().save_pretrained(tmp_path / "headless")
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("score.")}
    save_file(kept, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="have no reward head"):
        stage(tmp_path / "headless", "name")
    for code in broken("bare").glob("*_grm.py"):
        code.unlink()
    with stage(tmp_path / "bare", "name") as staged:  # the code belongs to the package: put back
        assert (Path(staged) / "modeling_grm.py").is_file()


def test_a_staged_adapter_is_independent_of_its_folder_and_of_chance(tmp_path):
    """It is staged while a run goes on, which draws random numbers and deletes old checkpoints."""
    import torch
    from trainers import lora, trainer

    from grm_hf import GRMForSequenceClassification
    from grm_hf.hub.publish import stage

    run = trainer(tmp_path / "run", alpha=0.5, peft_config=lora())
    run.train()
    run.model.get_base_model().config.reward_std = 2.5
    run.save_model()
    before = torch.get_rng_state()
    staged = stage(tmp_path / "run", "name")
    assert torch.equal(torch.get_rng_state(), before)
    expected = scores(run.model)
    shutil.rmtree(tmp_path / "run")
    with staged:
        merged = GRMForSequenceClassification.from_pretrained(staged.name)
    assert scores(merged) == close(expected) and merged.config.reward_std == 2.5


def test_a_folder_that_holds_a_token_is_refused(hub, publisher, tmp_path):
    publisher("save", folder=str(tmp_path / "model"))
    (tmp_path / "model" / "notes.txt").write_text(f"login with {STRANGER}")
    message = publisher("push_with", folder=str(tmp_path / "model"), repo_id="ann/leak")
    assert "notes.txt holds an access token" in message and STRANGER not in message
    assert files_of(hub, "ann/leak") == set()


# -------------------------------------------------------------------------------------------------------- new code


def do_golden(repo_id, folder):
    """Push a model that has golden rows; its scores."""
    import trainers as t

    from grm_hf.hub import push_folder
    from grm_hf.scoring import save_golden

    model = t.grm(0)
    model.save_pretrained(folder)
    t.TOKENIZER.save_pretrained(folder)
    save_golden(model, t.TOKENIZER, folder)
    push_folder(folder, repo_id)
    return scores(model)


@pytest.mark.slow
def test_a_repository_gets_new_code_in_one_commit_and_nothing_else(hub, publisher, reader, plain, tmp_path):
    repo, old = "ann/refreshed", Path(__file__).parent / "data" / "shipped-0.1.0"
    rewards = publisher("golden", repo_id=repo, folder=str(tmp_path / "model"))
    stale = plain("commit", repo_id=repo, files={path.name: path.read_text() for path in old.glob("*.py")})
    code, out, err = publisher("grm", command=["refresh", repo])
    assert code == 0, err
    main = hub.repos["models", repo].find("main")
    before = hub.repos["models", repo].commits[stale]
    assert main.parent == stale and main.title.startswith("Code files of grm_hf ")
    changed = {name for name in main.files if main.files[name] != before.files.get(name)}
    import grm_hf

    package = Path(grm_hf.__file__).parent
    code_files = {path.name for path in old.glob("*.py") if path.read_bytes() != (package / path.name).read_bytes()}
    assert changed == code_files and main.files.keys() == before.files.keys()
    assert f"refreshed: {repo} (revision {main.sha})" in out and "changed: modeling_grm.py" in out
    assert reader("score", repo_id=repo) == close(rewards)
    since = len(hub.log)
    code, out, _ = publisher("grm", command=["refresh", repo])
    assert code == 0 and "those of this version already" in out and not writes(hub, since)
    code, _, err = publisher("grm", command=["refresh", "ann/nowhere"])
    assert code == 1 and "ann/nowhere" in err


# ----------------------------------------------------------------------------------------- where a model is taken from


@pytest.fixture(scope="module")
def revisions(hub, publisher, tmp_path_factory):
    """What each place of two repositories holds."""
    folder = tmp_path_factory.mktemp("revisions")
    return {
        kind: publisher("two_revisions", kind=kind, repo_id=f"ann/{kind}-revisions", folder=str(folder / kind))
        for kind in ("lm", "grm")
    }


WAYS = [("trainer", "lm"), ("trainer", "grm"), ("scorer", "grm"), ("from_base", "lm")]


@pytest.mark.parametrize("how, kind", WAYS, ids=["-".join(way) for way in WAYS])
def test_every_hub_argument_reaches_configuration_weights_and_tokenizer(
    hub, revisions, publisher, anonymous, tmp_path, how, kind
):
    repo, held = f"ann/{kind}-revisions", revisions[kind]
    assert len({json.dumps(one) for one in held.values()}) == 3
    commit = hub.repos["models", repo].find("v2").sha
    for where, place in (
        ({}, "main"),
        ({"revision": "v2"}, "v2"),
        ({"revision": commit}, "v2"),
        ({"revision": "v2", "subfolder": "inner"}, "v2inner"),
    ):
        found = publisher("load", how=how, repo_id=repo, folder=str(tmp_path / place), **where)
        assert found == held[place], where
    # The repository is private, and this process knows the token only by the argument.
    where = {"revision": "v2", "subfolder": "inner", "cache_dir": str(tmp_path / "cache"), "token": TOKEN}
    assert anonymous("load", how=how, repo_id=repo, folder=str(tmp_path / "a"), **where) == held["v2inner"]
    assert [path.name for path in (tmp_path / "cache").glob("models--*")] == [f"models--ann--{kind}-revisions"]
    assert not list(anonymous.home.glob(f"hub/models--ann--{kind}-revisions/snapshots/*/*"))
    with pytest.raises(Refused):
        anonymous("load", how=how, repo_id=repo, folder=str(tmp_path / "b"), revision="v2")


@pytest.mark.parametrize("kind", ["lm", "grm"])
@pytest.mark.parametrize("place", ["main", "v2", "v2inner"])
def test_a_model_that_is_loaded_by_hand_finds_its_own_tokenizer(revisions, publisher, tmp_path, kind, place):
    where = {"main": {}, "v2": {"revision": "v2"}, "v2inner": {"revision": "v2", "subfolder": "inner"}}[place]
    repo = f"ann/{kind}-revisions"
    assert publisher("load", how="live", repo_id=repo, folder=str(tmp_path), **where) == revisions[kind][place]


@pytest.mark.parametrize("kind", ["lm", "grm"])
def test_an_adapter_on_another_revision_loads_by_itself(revisions, publisher, tmp_path, kind):
    where = {"revision": "v2", "subfolder": "inner"}
    repo = f"ann/{kind}-revisions"
    found = publisher("load", how="trainer", repo_id=repo, folder=str(tmp_path), adapter=True, **where)
    assert found[0] == 3 and found[2:] == revisions[kind]["v2inner"][2:]


@pytest.mark.parametrize("how", ["from_base", "trainer"])
def test_a_gguf_file_of_a_revision(publisher, anonymous, tmp_path, how):
    pytest.importorskip("gguf")
    repo = f"ann/gguf-{how}"
    held = publisher("two_ggufs", repo_id=repo, folder=str(tmp_path))
    where = {"gguf_file": "weights.gguf", "token": TOKEN, "cache_dir": str(tmp_path / "cache")}
    for revision in held:
        found = anonymous(
            "load_gguf", how=how, repo_id=repo, folder=str(tmp_path / "run"), revision=revision, **where
        )
        assert found == held[revision]
