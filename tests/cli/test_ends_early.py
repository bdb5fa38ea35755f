"""Commands that end before their time: Ctrl-C at any moment, output that is not read, a Hub that cannot be reached."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from peft_sparse import sparsity_report
from peft_sparse.cli import _hub
from peft_sparse.cli.main import CHECK_FAILED, DONE, FAILED, INTERRUPTED, TERMINATED, main

SOURCE = Path(__file__).resolve().parents[2] / "src"
# As the console script does. What comes before is Python's own start, in which Ctrl-C is Python's too.
START = """
import os, sys
from peft_sparse_cli import main
os.close({started})
sys.exit(main())
"""
# Where a command is when Ctrl-C comes: the name of a module that is being imported, or of a function that runs.
IN_IMPORT = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:  # as some of what is imported does
                pass
sys.meta_path.insert(0, Finder())
"""


def run(arguments, before="", interrupt_after=None, **environment):
    """(status, stdout, stderr) of a process of its own, in which Ctrl-C is not ignored as in a background job."""
    settings = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"} | environment
    waiting, started = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", before + START.format(started=started), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings, pass_fds=[started],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(started)
    if interrupt_after is not None:
        assert os.read(waiting, 1) == b""  # the process has closed its end
        time.sleep(interrupt_after)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    os.close(waiting)
    return process.returncode, out, err


@pytest.mark.parametrize("module", ["torch", "numpy", "transformers", "peft_sparse.tuners.spp"])
def test_an_interrupt_while_the_package_is_imported(module, tmp_path):
    status, out, err = run(["report", tmp_path], before=IN_IMPORT.format(module=module))
    assert (status, out, err.strip()) == (INTERRUPTED, "", "interrupted")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1, 2, 3, 5, 8])
def test_an_interrupt_at_any_moment(seconds, llama_dir, tmp_path):
    """Whatever it meets: one line, and nothing half-written; the whole model if it came after the last file."""
    arguments = ["prune", llama_dir, tmp_path / "out", "--method", "magnitude", "--quiet"]
    status, out, err = run(arguments, interrupt_after=seconds)
    # The last of them is what a shell reports as 130: the interpreter was ending, and has no handlers any more.
    assert status in (INTERRUPTED, DONE, -signal.SIGINT) and "Traceback" not in err and "ignored" not in err
    if status == INTERRUPTED:
        assert err.strip() == "interrupted"
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["out"] or (left == [] and status == INTERRUPTED and not out)
    if left:
        assert sparsity_report(tmp_path / "out").total_sparsity == pytest.approx(0.5, abs=1e-3)


def test_an_interrupt_that_a_library_turns_into_another_error(monkeypatch, capsys, llama_dir):
    def turned(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("a worker died") from error

    monkeypatch.setattr("peft_sparse.evaluation.sparsity_report", turned)
    of_tests = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a background job
    try:
        assert main(["report", str(llama_dir)]) == INTERRUPTED
        assert capsys.readouterr().err.strip() == "interrupted"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, of_tests)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("command", ["prune", "pack"])
def test_sigterm_is_tidied_up_after(command, monkeypatch, capsys, llama_dir, tmp_path):
    """It came while the result was being written, in a folder that nobody would find."""

    def terminated(self, folder, *_, **__):
        assert Path(folder).parent.name != "out"  # what is left would be hidden
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", terminated)
    more = ["--method", "magnitude"] if command == "prune" else []
    assert main([command, str(llama_dir), str(tmp_path / "out"), *more, "--quiet"]) == TERMINATED
    assert capsys.readouterr().err.strip() == "terminated" and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_sigterm_ends_a_forked_worker_without_a_word(monkeypatch, capfd, llama_dir):
    """Pools of processes end theirs by it."""

    def forking(*_):
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == TERMINATED
        raise ValueError("the command goes on")

    monkeypatch.setattr("peft_sparse.evaluation.sparsity_report", forking)
    assert main(["report", str(llama_dir)]) == FAILED
    assert capfd.readouterr().err.strip() == "error: the command goes on"


@pytest.mark.parametrize("number", ["2", "16"])
def test_sigterm_ends_one_process_of_several_at_once(number, monkeypatch, llama_dir):
    """A handler would not run while it waits for the others."""
    monkeypatch.setenv("WORLD_SIZE", number)

    def looking(*_):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        raise ValueError

    monkeypatch.setattr("peft_sparse.evaluation.sparsity_report", looking)
    assert main(["report", str(llama_dir)]) == FAILED


# The Hub


@pytest.fixture
def closed_port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "owner/model", "--data", "TEXT"],
        ["prune", "LLAMA", "NEW", "--data", "owner/data"],
        ["report", "owner/model"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_hub_that_cannot_be_reached_is_given_up_soon(arguments, closed_port, llama_dir, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "text.txt").write_text("a text")
    places = {"TEXT": tmp_path / "text.txt", "LLAMA": llama_dir, "NEW": tmp_path / "new"}
    start = time.monotonic()
    status, out, err = run(
        [places.get(word, word) for word in arguments],
        HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{closed_port}", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert status == FAILED and out == "" and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ") and "owner/" in err.splitlines()[-1]
    assert time.monotonic() - start < 120  # also where others compute


class Line:
    """Stands for `huggingface_hub`'s client: each request ends as the next item of a list says."""

    def __init__(self, ends, hooks=()):
        self.ends, self.event_hooks, self.limits = list(ends), hooks, []

    def send(self, request):
        self.limits.append(request.extensions["timeout"])
        if isinstance(end := self.ends.pop(0), Exception):
            raise end
        return end


class Request:
    def __init__(self, **timeout):
        self.extensions = {"timeout": timeout}


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(_hub, "SECONDS", 0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_three_failures_without_an_answer_are_the_last(at_once):
    client = _hub._Line().watch(Line([OSError("no route")] * 3))
    for _ in range(2):
        with pytest.raises(OSError):
            client.send(Request())
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(OSError), pytest.warns(UserWarning, match=r"cannot be reached \(no route\); from here on only"):
        client.send(Request())
    assert huggingface_hub.is_offline_mode()


def test_an_answer_of_any_kind_means_that_there_is_a_hub(at_once):
    client = _hub._Line().watch(Line([OSError("slow"), "404", *[OSError("slow")] * 5]))
    for _ in range(7):
        try:
            client.send(Request())
        except OSError as error:
            assert str(error) == "slow"
    assert not constants.HF_HUB_OFFLINE


def test_three_failures_in_one_moment_are_not_enough(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client = _hub._Line().watch(Line([OSError("a blink")] * 3))
    for _ in range(3):
        with pytest.raises(OSError):
            client.send(Request())
    assert not constants.HF_HUB_OFFLINE


def test_connecting_has_a_limit_and_reading_keeps_its_own():
    client = Line(["200", "200", "200"])
    watched = _hub._Line().watch(client)
    for timeout in ({}, {"connect": None, "read": None}, {"connect": 3, "read": 100}):
        watched.send(Request(**timeout))
    limit = constants.HF_HUB_ETAG_TIMEOUT
    assert client.limits == [{"connect": limit}, {"connect": limit, "read": None}, {"connect": 3, "read": 100}]


def test_afterwards_all_is_as_before(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    kind = type(huggingface_hub.get_session())
    with _hub.no_long_wait():
        assert "watched" in huggingface_hub.get_session().send.__qualname__
        constants.HF_HUB_OFFLINE = True
    assert not constants.HF_HUB_OFFLINE
    assert type(huggingface_hub.get_session()) is kind
    assert "watched" not in huggingface_hub.get_session().send.__qualname__


def unread(stream, *arguments):
    """The status of a process whose stdout or stderr nobody reads."""
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_sparse", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    getattr(process, stream).close()
    other = process.stderr if stream == "stdout" else process.stdout
    text = other.read().decode()
    return process.wait(timeout=300), text


def test_the_status_does_not_depend_on_who_reads_the_output(llama_dir, tmp_path):
    """`verify ... | true` has failed if a zero was lost; what cannot tell how it goes is not done."""
    pruned, broken = tmp_path / "pruned", tmp_path / "broken"
    assert unread("stdout", "prune", llama_dir, pruned, "--method", "magnitude", "--quiet") == (DONE, "")
    status, shown = unread("stdout", "verify", llama_dir, "--reference", pruned, "--quiet")
    assert (status, shown) == (CHECK_FAILED, "")
    status, shown = unread("stderr", "prune", llama_dir, broken, "--method", "magnitude")
    assert (status, shown) == (FAILED, "") and not broken.exists()
