"""Signals end a run after a checkpoint, and a folder in use is refused."""

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial

import pytest

from diffcore.io import signals
from diffcore.io.lock import lock_folder
from diffcore.training import loop
from tests.conftest import TINY
from tests.helpers.training_runs import LabelRecorder, hashes, make_trainer, train
from tests.training.test_command_runs import finish, start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def signal_in_step(monkeypatch):
    """Send a signal to this process within a step of a run."""
    advance = loop.advance

    def install(number, step, times=1):
        def advance_and_signal(state, batches):
            if state.step + 1 == step:
                for _ in range(times):
                    signal.raise_signal(number)
            advance(state, batches)

        monkeypatch.setattr(loop, "advance", advance_and_signal)

    return install


@pytest.mark.parametrize(
    ("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138), ("SIGINT", 130)]
)
def test_a_signal_saves_after_the_step_and_the_remedy_continues_the_run(
    tmp_path, diffcore, signal_in_step, name, status
):
    options = (*TINY, "--steps=3", "--log-every=2")
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "advance", loop.advance)
        signal_in_step(getattr(signal, name), 2)
        ended = diffcore("train", "digits", *options, "--folder=run")
        patch.setattr(loop, "advance", loop.advance)
    assert ended.status == status
    assert {number: signal.getsignal(number) for number in before} == before
    message = (
        rf"stopped by {name}: step 2 of 3 is saved in run/checkpoints/step-00000002; "
        r"continue with (--config run/config.yaml --resume true)\n"
    )
    remedy = re.search(message, ended.err).group(1)
    if name != "SIGTERM":  # the checkpoint and the remedy are the same
        return
    continued = diffcore("train", *shlex.split(remedy))
    assert continued.status == 0, continued.err
    assert "resumed at step 2" in continued.err


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, signal_in_step):
    options = {"network": partial(LabelRecorder, dropout=0.2), "keep": 1, "log_every": 4}
    train(tmp_path / "straight", **options)
    signal_in_step(signal.SIGTERM, 3)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "resumed", **options)
    assert ended.value.code == 143
    train(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch, signal_in_step):
    signal_in_step(signal.SIGINT, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "one")  # a launcher passes on what the terminal sent: one Ctrl-C
    assert (tmp_path / "one/checkpoints/step-00000002").exists()
    monkeypatch.setattr(signals, "REPEAT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "two")
    assert list((tmp_path / "two/checkpoints").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_does_not_change_how_a_run_ends(tmp_path, signal_in_step):
    signal_in_step(signal.SIGTERM, 2)
    assert train(tmp_path, steps=2).step == 2


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
        assert interruption.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_another_thread_leaves_the_signals_alone(tmp_path):
    thread = threading.Thread(target=train, args=(tmp_path,), kwargs={"steps": 1})
    thread.start()
    thread.join(60)
    assert (tmp_path / "checkpoints/step-00000001").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    with lock_folder(tmp_path, print), pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        make_trainer(tmp_path).train()
    assert list(tmp_path.iterdir()) == []


def read_children(parent: int) -> list[int]:
    """Numbers of all processes that descend from a process."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in out.stdout.splitlines()]
    direct = [pid for pid, ppid in pairs if ppid == parent]
    return direct + [pid for child in direct for pid in read_children(child)]


def wait_for(condition) -> bool:
    """Whether a condition becomes true within two minutes."""
    for _ in range(1200):
        if condition():
            return True
        time.sleep(0.1)
    return False


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError), open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")")[1].split()[0] != "Z"
    return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_workers_end_with_their_run(tmp_path, number):
    options = ("config.yaml", "--workers=2", "--steps=1000000", "--save-every=1000000")
    process = start(tmp_path, *options)
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        assert wait_for(lambda: metrics.exists() or process.poll() is not None)
        children = read_children(process.pid)
        assert len(children) >= 3  # the fork server and two workers
        for pid in children if number == signal.SIGTERM else []:
            os.kill(pid, number)  # as a job scheduler does
        process.send_signal(number)
        status, err = finish(process)
    finally:
        process.kill()
    assert status == (143 if number == signal.SIGTERM else -number), err
    assert ("stopped by SIGTERM: step" in err) == (number == signal.SIGTERM)
    assert wait_for(lambda: not any(map(is_running, children)))
