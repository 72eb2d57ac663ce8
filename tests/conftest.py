"""What every test shares: no network, and where the inputs lie."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Set before anything imports transformers, which reads them at import. Without the first, a local folder that lacks an
# optional file makes transformers ask the hub, with retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A process a core: with a thread a core in each of them, small models run several times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Under nohup, or in a shell's background, these are ignored and every child inherits that: tests which send them to a
# child would then test nothing.
for _name, _handler in (
    ("SIGINT", signal.default_int_handler),
    ("SIGHUP", signal.SIG_DFL),
    ("SIGTERM", signal.SIG_DFL),
):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The committed inputs: `llm/`, `vit/`, `picture.png`, and `iter_2.pth`, which names its bases from `fixtures`."""
    return CHECKOUT / "fixtures" / "tiny"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoints which the real tools trained and converted. They lie beside the checkout and are not part of it."""
    folder = CHECKOUT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(
            "the outputs of the real converters are not here: they lie beside the checkout, in ../shared/golden"
        )
    return folder


# Their tests start servers, processes, trainings or other people's runtimes; `-m "not slow"` is a loop without them.
_SLOW = ("hubs", "interop", "remotes", "training")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(CHECKOUT / "tests").parts[0] in _SLOW:
            item.add_marker("slow")
    # A training of minutes comes first: at the end one process would be left alone with it.
    items.sort(key=lambda item: item.path.name != "test_tiny_shapes.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Reports what a default run has left out."""
    deselected = terminalreporter.stats.get("deselected", ())
    if sweeps := [item for item in deselected if item.get_closest_marker("sweep")]:
        terminalreporter.write_line(
            f"left out: {len(sweeps)} tests of every system call, hundreds of kills and many processes: a sample ran; "
            "`make faults` runs them (an hour)"
        )
    left = [item for item in deselected if item.get_closest_marker("peers")]
    if left:
        terminalreporter.write_line(
            f"left out: {len(left)} tests against the real xtuner, DeepSpeed, LLaVA, llama.cpp and older transformers; "
            "`make test-peers` builds their environments and runs them"
        )
    if skipped := [
        report for report in terminalreporter.stats.get("skipped", ()) if "no chromium" in str(report.longrepr)
    ]:
        terminalreporter.write_line(
            f"left out: {len(skipped)} tests of pages in a browser; `apt install chromium` has one"
        )
