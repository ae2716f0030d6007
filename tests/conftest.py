"""What every test runs under: one thread, no network, no telemetry."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest  # noqa: E402
import tested  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_report_header():
    """What this run got from the index."""
    return ", ".join(f"{name} {version}" for name, version in tested.installed().items())


def pytest_terminal_summary(terminalreporter):
    """A release that breaks the suite is called by its name."""
    failed = terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])
    if failed and (newer := tested.newer()):
        terminalreporter.section("newer than any release the suite has passed with")
        for line in newer:
            terminalreporter.line(line)


@pytest.fixture
def double(monkeypatch):
    """Everything that a trainer rounds to float32 stays in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
