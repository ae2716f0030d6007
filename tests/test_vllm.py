"""In the real vLLM, on a CPU (`make vllm`): a GRM folder as it is gives the rewards of GRMScorer, and its server has
the routes of grm_hf. One process for all engines, and one server."""

import contextlib
import gc
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


vllm = pytest.importorskip("vllm", reason="runs in the environment of `make vllm`")

from client import close, post, refused  # noqa: E402
from tiny import bare_tokenizer, chatml_tokenizer, llama_tokenizer, tiny_lm  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMScorer  # noqa: E402
from grm_hf.base import folder as folder_of_smollm2  # noqa: E402
from grm_hf.cli import main  # noqa: E402
from grm_hf.hub import export  # noqa: E402
from grm_hf.rewards import grm_reward_func  # noqa: E402
from grm_hf.rewards.remote import PROTOCOLS  # noqa: E402
from grm_hf.scoring import save_golden  # noqa: E402
from grm_hf.serving.vllm_plugin import ARCHITECTURE, register  # noqa: E402


pytestmark = pytest.mark.vllm
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(SETTINGS)
# The command `vllm`, which asks for its own version under a name that the build for CPUs does not have.
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
BF16 = 5e-2

PROMPT = "Here is what I know about rivers. " + "They flow to the sea. " * 12
ANSWERS = ["The Danube.", "Rhine", "I do not know.", "It is " + "far, far " * 9 + "away.", "the Volga"]
CHATS = [[{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}] for answer in ANSWERS]
CHATS.append([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def model(family="llama", tokenizer=None, **head):
    """A tiny model whose dimensions vLLM's kernels take."""
    tokenizer = tokenizer or llama_tokenizer()
    more = {"head_dim": 32} if family in ("qwen3", "gemma2", "gemma3_text") else {}
    sizes = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128)
    lm = tiny_lm(family, vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **more)
    torch.manual_seed(1)
    grm = GRMForSequenceClassification.from_base(lm, **head).eval()
    with torch.no_grad():
        for part in grm.score.parameters():
            part += 0.2 * torch.randn_like(part)
    return grm, tokenizer


def write(folder, grm, tokenizer):
    grm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_golden(grm, tokenizer, folder)
    return str(folder)


@pytest.fixture
def said(caplog, monkeypatch):
    """What the plugin logs. Its own logger is below vLLM's, which passes nothing on."""
    monkeypatch.setattr("grm_hf.serving.vllm_plugin.logger", logging.getLogger("said"))
    return caplog


@contextlib.contextmanager
def engine(folder, **settings):
    from vllm.distributed import cleanup_dist_env_and_memory

    logging.getLogger("vllm").setLevel(logging.WARNING)
    given = dict(runner="pooling", dtype="float32", max_num_seqs=4, enforce_eager=True, disable_log_stats=True)
    llm = None
    try:
        llm = vllm.LLM(str(folder), **{**given, **settings})
        yield llm
    finally:  # a traceback may hold the engine, which would tear down the next one's groups when it goes
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm, ids):
    prompts = [{"prompt_token_ids": list(row)} for row in ids]
    return [output.outputs.probs[0] for output in llm.classify(prompts, use_tqdm=False)]


# Bodies of each family with a head of each kind; the body is 64 wide.
MODELS = {
    "llama, wider": ("llama", dict(head_hidden_size=200)),
    "qwen2, linear": ("qwen2", dict(head_type="linear")),
    "qwen3, equal": ("qwen3", dict(head_hidden_size=64)),
    "gemma2, two layers": ("gemma2", dict(head_hidden_size=48, head_num_layers=2)),
    "mistral, narrower": ("mistral", dict(head_hidden_size=24)),
    "gpt2, linear": ("gpt2", dict(head_type="linear")),
    "llama, factors": ("llama", dict(head_type="bnrm", head_hidden_size=48)),
    "qwen3, a gate": ("qwen3", dict(attribute_names=["a", "b"], attribute_weights="gate", head_hidden_size=16)),
    "llama, attributes beside": ("llama", dict(attribute_names=["a"], head_type="linear")),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_folder_as_it_is(tmp_path, case):
    """Single, batched, behind a long common prompt that is cached, in pieces; ids and chats."""
    family, head = MODELS[case]
    grm, tokenizer = model(family, **head)
    folder = write(tmp_path / "grm", grm, tokenizer)
    scorer = GRMScorer(grm, tokenizer)
    expected, ids = scorer.score(CHATS), [scorer.encode(chat).ids for chat in CHATS]
    assert max(map(len, ids)) > 256  # more than one piece, and many blocks of the cache
    with engine(folder, max_num_batched_tokens=128) as llm:
        config = llm.llm_engine.vllm_config
        assert config.cache_config.enable_prefix_caching and config.scheduler_config.enable_chunked_prefill
        for _ in range(2):  # the second time everything is in the cache
            assert ask(llm, ids) == close(expected)
        assert [ask(llm, [row])[0] for row in ids] == close(expected)
        rendered = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in CHATS]
        assert ask(llm, rendered) == close(expected)
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
        assert all(text.startswith("<s>") for text in texts)  # which vLLM adds
        texts = [text.removeprefix("<s>") for text in texts]
        assert [output.outputs.probs[0] for output in llm.classify(texts, use_tqdm=False)] == close(expected)
        if case == "llama, wider":
            raw = llm.encode([{"prompt_token_ids": list(ids[0])}], pooling_task="classify", use_tqdm=False)
            assert raw[0].outputs.data.tolist() == close(expected[:1])


def test_bfloat16(tmp_path):
    grm, tokenizer = model("llama", head_hidden_size=200)
    folder = write(tmp_path / "grm", grm, tokenizer)
    scorer = GRMScorer(folder)
    with engine(folder, dtype="bfloat16") as llm:
        found = ask(llm, [scorer.encode(chat).ids for chat in CHATS])
        head = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.score
        assert {part.dtype for part in head.parameters()} == {torch.float32}
    expected = scorer.score(CHATS)
    for ours, theirs in zip(expected, found, strict=True):
        assert abs(ours - theirs) <= BF16 * max(1.0, abs(ours))
    assert found != expected


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float16), ("gemma2", torch.bfloat16)])
def test_the_dtype_that_vllm_chooses_is_said(tmp_path, said, family, dtype):
    """For a folder in float32 it takes float16, in which Gemma 2 cannot be computed."""
    grm, tokenizer = model(family)
    folder = write(tmp_path / "grm", grm, tokenizer)
    scorer = GRMScorer(grm, tokenizer)
    with engine(folder, dtype="auto") as llm:
        found = ask(llm, [scorer.encode(chat).ids for chat in CHATS])
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert {part.dtype for part in runner.model.lm.parameters()} == {dtype}
    assert found == pytest.approx(scorer.score(CHATS), abs=BF16, rel=BF16) and found != close(scorer.score(CHATS))
    assert f"is computed in {str(dtype).removeprefix('torch.')}" in said.text
    assert "`--dtype float32` gives those of GRMScorer" in said.text
    assert ("cannot be computed in float16" in said.text) == (family == "gemma2")


def test_what_verl_does_to_a_model_before_it_asks(tmp_path):
    """Its reward loop starts vLLM itself and patches what it serves: verl.workers.rollout.vllm_rollout.utils, and
    verl.utils.vllm.patch for models with experts."""
    grm, tokenizer = model("qwen3", head_hidden_size=48)
    folder = write(tmp_path / "grm", grm, tokenizer)
    scorer = GRMScorer(grm, tokenizer)
    with engine(folder) as llm:
        served = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        original = served.compute_logits
        served.compute_logits = lambda *args: original(*args)
        assert len(served.model.layers) == 2 and type(served.model).__name__ == "Qwen3Model"
        assert ask(llm, [scorer.encode(chat).ids for chat in CHATS]) == close(scorer.score(CHATS))


def test_the_longest_text_is_trainings(tmp_path):
    grm, tokenizer = model()
    grm.config.max_sequence_length = 200
    folder = write(tmp_path / "grm", grm, tokenizer)
    with engine(folder) as llm:
        assert llm.llm_engine.vllm_config.model_config.max_model_len == 200
        with pytest.raises(Exception, match="maximum context length is 200"):
            ask(llm, [[5] * 201])


def test_a_head_that_is_missing(tmp_path):
    grm, tokenizer = model()
    folder = Path(write(tmp_path / "grm", grm, tokenizer))
    state = load_file(folder / "model.safetensors")
    left_out = {name: tensor for name, tensor in state.items() if not name.startswith("score.out")}
    save_file(left_out, folder / "model.safetensors", {"format": "pt"})
    words = r"lacks \['score.out.bias', 'score.out.weight'\] of its reward head.*grm merge"
    with pytest.raises(Exception, match=words):
        with engine(folder):
            pass


@pytest.mark.parametrize("family", ["xglm", "jamba"])
def test_a_family_that_vllm_lacks_or_that_keeps_a_state(tmp_path, family):
    from transformers import AutoConfig

    from grm_hf import GRMConfig

    sizes = dict(vocab_size=300, hidden_size=64, num_hidden_layers=1)
    more = dict(d_model=64, ffn_dim=64, attention_heads=2) if family == "xglm" else dict(num_attention_heads=2)
    config = GRMConfig(AutoConfig.for_model(family, **sizes, **more))
    config.architectures = [ARCHITECTURE]
    config.save_pretrained(tmp_path)
    llama_tokenizer().save_pretrained(tmp_path)
    words = "vLLM has no XGLMForCausalLM.*grm serve" if family == "xglm" else "keeps a state.*grm serve"
    with pytest.raises(ValueError, match=words):
        vllm.LLM(str(tmp_path), runner="pooling", enforce_eager=True)


def test_templates_that_are_not_enough(tmp_path, said):
    """A folder whose template does not end a turn: ids are exact, and the plugin says to send them."""
    grm, tokenizer = model("llama", bare_tokenizer())
    folder = write(tmp_path / "grm", grm, tokenizer)
    with engine(folder) as llm:
        scorer = GRMScorer(grm, tokenizer)
        assert ask(llm, [scorer.encode(chat).ids for chat in CHATS]) == close(scorer.score(CHATS))
    assert "Of messages and text, vLLM does not make the token ids of training" in said.text


def test_adapters_are_merged_first(tmp_path):
    """vLLM's LoRA would leave out the head that the adapter brings, and refuses this class."""
    grm, tokenizer = model()
    folder = write(tmp_path / "grm", grm, tokenizer)
    with pytest.raises(Exception, match="does not support LoRA"):
        with engine(folder, enable_lora=True):
            pass
    with pytest.raises(Exception, match="Invalid repository ID or local directory"):  # as the page says
        with engine(Path(__file__).parents[1] / "models/grm-smollm2-135m"):
            pass


def test_registering_twice_changes_nothing():
    from vllm import ModelRegistry

    register()
    before = ModelRegistry.models[ARCHITECTURE]
    register()
    assert ModelRegistry.models[ARCHITECTURE] is before


def test_the_api_key_of_vllm_guards_what_the_page_says():
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    from grm_hf.serving.routes import ROUTES

    guarded = [route.path for route in ROUTES.values() if route.path.startswith(GUARDED_PREFIX)]
    assert guarded == ["/v1/score/evaluation"]


@pytest.mark.parametrize(
    ("family", "head_type"), [("qwen2", "linear"), ("qwen3", "linear"), ("llama", "mlp"), ("qwen2", "mlp")]
)
def test_exports(tmp_path, family, head_type):
    """What `grm export` writes, without the plugin's class: a native classifier, and the model of vLLM's own."""
    grm, tokenizer = model(family, head_type=head_type, head_hidden_size=48)
    folder = write(tmp_path / "grm", grm, tokenizer)
    export(folder, tmp_path / "native")
    scorer = GRMScorer(grm, tokenizer)
    expected, ids = scorer.score(CHATS), [scorer.encode(chat).ids for chat in CHATS]
    with engine(tmp_path / "native") as llm:
        if head_type == "linear":
            assert ask(llm, ids) == close(expected)
        else:
            prompts = [{"prompt_token_ids": list(row)} for row in ids]
            found = llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
            assert [output.outputs.data[-1].item() for output in found] == close(expected)


def test_a_real_small_model(tmp_path):
    """SmolLM2 with 135 million weights."""
    try:
        base = folder_of_smollm2()
    except OSError as error:
        pytest.skip(f"the real base cannot be had: {error}")
    grm = GRMForSequenceClassification.from_base(base, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = write(tmp_path / "grm", grm, tokenizer)
    scorer = GRMScorer(grm, tokenizer)
    with engine(folder, max_model_len=1024) as llm:
        assert ask(llm, [scorer.encode(chat).ids for chat in CHATS[::2]]) == close(scorer.score(CHATS[::2]))


# ---------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`vllm serve FOLDER`, with the routes of grm_hf named; gives the folder and the address."""
    grm, tokenizer = model("llama", chatml_tokenizer(), head_hidden_size=200)
    grm.config.reward_mean, grm.config.reward_std, grm.config.max_sequence_length = 0.25, 2.0, 400
    folder = write(tmp_path_factory.mktemp("served") / "grm", grm, tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = "grm,grm_score,grm_openrlhf,grm_llamafactory,grm_slime,grm_tei"
    environment = {**os.environ, "VLLM_PLUGINS": names, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-c", VLLM, "serve", folder, "--runner", "pooling"]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    log = open(Path(folder).with_name("log"), "w+")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health")
                break
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            time.sleep(1)
        yield folder, url
    finally:
        process.terminate()
        process.wait(60)
        log.close()


QUESTION = [{"role": "user", "content": "Name a river."}]


@pytest.mark.parametrize("path", PROTOCOLS)
def test_the_client_and_every_route(server, path):
    folder, url = server
    tokenizer = None if path == "/score" else folder
    prompts = [QUESTION] * 5 + ["plain "]
    completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS] + ["text"]
    expected = grm_reward_func(folder)(prompts, completions)
    assert grm_reward_func(url + path, tokenizer)(prompts, completions) == close(expected)


def test_messages_and_verls_text(server):
    folder, url = server
    scorer = GRMScorer(folder)
    chat = [*QUESTION, {"role": "assistant", "content": "Rhine"}]
    [expected] = scorer.score([chat])
    text = scorer.tokenizer.apply_chat_template(chat, tokenize=False)
    for given in ({"messages": chat}, {"input": text}):
        assert post(f"{url}/classify", {**given, "use_activation": False})["data"][-1]["probs"][-1] == close(expected)
    pooled = post(f"{url}/pooling", {"messages": chat})["data"][0]["data"]
    assert pooled == close([expected])
    z = post(f"{url}/get_reward?transform=standardize", {"query": [text]})["rewards"][0]
    assert z == close((expected - 0.25) / 2.0)


def test_golden_rows_of_the_server(server, capsys):
    folder, url = server
    assert main(["verify", folder, "--url", url]) == 0
    assert "DIFFERS" not in capsys.readouterr().out


def test_bad_input_and_many_at_once(server):
    from concurrent.futures import ThreadPoolExecutor

    folder, url = server
    assert "text 1: the last message" in refused(f"{url}/score", {"chats": ["a", QUESTION]})[1]
    for path, body in (("/score", b"{"), ("/score", {"chats": []}), ("/classify", {"input": [1] * 5000})):
        with pytest.raises(urllib.error.HTTPError, match="400"):  # said in vLLM's own words
            post(url + path, body)
    template = {
        "messages": [*QUESTION, {"role": "assistant", "content": "a"}],
        "chat_template_kwargs": {"chat_template": ""},
    }
    assert "has a `chat_template`" in refused(f"{url}/score", {"chats": [template]})[1]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(f"{url}/score?tranform=center", {"chats": ["a"]})
    assert "4097 texts; at most 4096" in refused(f"{url}/score", {"chats": ["a"] * 4097})[1]
    chats = [[*QUESTION, {"role": "assistant", "content": f"{'river ' * (n % 7)}{n}"}] for n in range(200)]

    def cancelled(number):
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps({"chats": [f"gone {number}, {n}" for n in range(20)]})
        connection.request("POST", "/score", body, {"Content-Type": "application/json"})
        connection.close()

    with ThreadPoolExecutor(200) as pool:
        noise = [pool.submit(cancelled, number) for number in range(20)]
        found = list(pool.map(lambda chat: post(f"{url}/score", {"chats": [chat]})["rewards"][0], chats))
        for future in noise:
            future.result()
    assert found == close(GRMScorer(folder).score(chats))
    assert json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"] == folder
