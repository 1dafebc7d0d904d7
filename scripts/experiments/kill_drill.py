"""Whether a run that is killed again and again ends with the bytes of an undisturbed run.

A run of the recipe `digits` is interrupted at seeded random moments and started again by the same
command, with `--resume auto`, until it reaches its end. Every file of its folder is then compared
with that of a run that nothing interrupted. With several ranks, a fault hits one of them.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.table import markdown_table

from diffcore.io.files import hash_file
from diffcore.run import Run

__all__ = [
    "Comparison",
    "Drill",
    "Fault",
    "Hit",
    "compare_files",
    "digits_options",
    "format_report",
    "plan_faults",
    "run_drill",
]

POLL_SECONDS = 0.0005
START_SECONDS = 6.0
"""Time within which a process imports its packages and begins to train."""
LOST = "lost another rank"
WRITTEN = {"checkpoint": ("checkpoints", "step-"), "average": ("", "ema."), "pipeline": ("", "pip")}
"""Kind of a fault -> the folder in the run, and the beginning of the name, of what is written."""
KINDS = {
    "step": "SIGKILL within a step",
    "checkpoint": "SIGKILL while a checkpoint is written",
    "average": "SIGKILL while ema.safetensors is written",
    "pipeline": "SIGKILL while pipeline/ is written",
    "start": "SIGKILL while the process starts or resumes",
    "SIGTERM": "SIGTERM within a step",
}


class Fault(NamedTuple):
    """An interruption of a run.

    Args:
        kind: key of `KINDS`.
        step: optimizer step from which the fault is due.
        rank: rank that it hits.
        delay: share, in [0, 1), of the time from the moment that is waited for to the fault.
    """

    kind: str
    step: int
    rank: int
    delay: float


class Hit(NamedTuple):
    """What a fault met and caused.

    Args:
        fault: the fault.
        step: last step in metrics.jsonl at the fault.
        unfinished: temporary files and folders that the fault left behind.
        statuses: exit status of each rank; -9 after SIGKILL.
        seconds: time from the fault to the end of the last rank.
        is_explained: whether every rank that survived the fault named the lost rank.
    """

    fault: Fault
    step: int
    unfinished: list[str]
    statuses: list[int]
    seconds: float
    is_explained: bool

    @property
    def is_expected(self) -> bool:
        """Whether all ranks ended with the documented status and message."""
        if self.fault.kind == "SIGTERM":
            return set(self.statuses) == {128 + signal.SIGTERM}
        others = [*self.statuses]
        killed = others.pop(self.fault.rank)
        return killed == -signal.SIGKILL and set(others) <= {1} and self.is_explained


class Comparison(NamedTuple):
    """The files of two runs.

    Args:
        count: number of files that were compared.
        differing: paths that are missing, additional or different.
    """

    count: int
    differing: list[str]


@dataclass(frozen=True)
class Drill:
    """Settings of a drill.

    Args:
        folder: folder of both runs, `straight/run` and `killed/run`.
        options: words of `diffcore train`, without folder and resume.
        ranks: number of processes that train together.
        threads: processor threads of each rank.
        timeout: number of seconds after which a process that did not end is an error.
    """

    folder: Path
    options: Sequence[str]
    ranks: int = 1
    threads: int = 1
    timeout: float = 600.0

    def start(self, name: str) -> list[subprocess.Popen[bytes]]:
        """Start or continue a run.

        Args:
            name: name of its folder.

        Returns:
            The process of each rank; its output is in `NAME/rank-N.log`.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        return [self._start_rank(folder, rank, port) for rank in range(self.ranks)]

    def _start_rank(self, folder: Path, rank: int, port: int) -> subprocess.Popen[bytes]:
        variables = {"OMP_NUM_THREADS": str(self.threads), "ACCELERATE_USE_CPU": "true"}
        if self.ranks > 1:  # the variables that torchrun and a SLURM script set
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **address}
            variables["WORLD_SIZE"] = str(self.ranks)
        words = ("train", *self.options, "--folder=run", "--resume=auto")
        with (folder / f"rank-{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "diffcore", *words],
                cwd=folder,
                env=os.environ | variables,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str, rank: int) -> str:
        """The output of the last process of a rank.

        Args:
            name: name of the folder of its run.
            rank: rank of the process.
        """
        return (self.folder / name / f"rank-{rank}.log").read_text("utf-8", "replace")


def digits_options(steps: int) -> list[str]:
    """The words of `diffcore train` for the recipe digits with every kind of output.

    Args:
        steps: number of optimizer steps.

    Returns:
        The words. All checkpoints are kept. TensorBoard writes the time of day, so it is off.
    """
    return [
        "digits",
        "--batch-size=32",  # the recipe has 128
        f"--steps={steps}",
        f"--save-every={max(steps // 10, 1)}",
        "--log-every=1",
        "--keep=100",
        f"--sample-every={max(steps // 2, 1)}",
        "--trackers=[]",
        "--validation.data=Digits",
        "--validation.data.split=test",
        f"--validation.every={max(steps // 5, 1)}",
        "--validation.items=128",
        "--snapshots.lengths=[0.05,0.1]",
        f"--snapshots.every={max(steps // 5, 1)}",
    ]


def plan_faults(kills: int, terms: int, steps: int, ranks: int, seed: int) -> list[Fault]:
    """Draw the faults of a drill.

    Args:
        kills: number of SIGKILLs: a quarter while checkpoints are written, a tenth each while
            averages and pipelines are written and while the process starts, at least one of each
            of the first three; the others within steps.
        terms: number of SIGTERMs.
        steps: number of optimizer steps of the run.
        ranks: number of ranks.
        seed: seed of the draws.

    Returns:
        The faults in the order of their steps.
    """
    draws = random.Random(seed)
    tenth = max(kills // 10, 1)
    writes = ["checkpoint"] * max(kills // 4, 1) + ["average"] * tenth + ["pipeline"] * tenth
    kinds = [*writes, *["start"] * (kills // 10)][:kills]
    kinds += ["step"] * (kills - len(kinds)) + ["SIGTERM"] * terms
    draws.shuffle(kinds)
    due = sorted(draws.randrange(1, int(0.9 * steps)) for _ in kinds)
    return [
        Fault(kind, step, draws.randrange(ranks), draws.random())
        for kind, step in zip(kinds, due, strict=True)
    ]


def run_drill(
    drill: Drill, faults: Sequence[Fault], message: Callable[[str], None]
) -> tuple[list[Hit], Comparison]:
    """Run both runs.

    Args:
        drill: settings of the drill.
        faults: faults of the interrupted run, in order.
        message: prints a line about each fault.

    Returns:
        What each fault met, and the comparison of the files at the end.

    Raises:
        RuntimeError: A run failed, or ended before a fault was due.
    """
    _finish(drill, "straight")
    hits = []
    for fault in faults:
        hits.append(_interrupt(drill, fault))
        message(f"{len(hits)} of {len(faults)}: {hits[-1]}")
    _finish(drill, "killed")
    return hits, compare_files(drill.folder / "straight/run", drill.folder / "killed/run")


def compare_files(straight: Path, killed: Path) -> Comparison:
    """Compare the files of two runs by their hashes.

    Args:
        straight: folder of the undisturbed run.
        killed: folder of the interrupted run; it may have further checkpoints, of SIGTERM.

    Returns:
        Number of files, and which differ.
    """
    expected, found = _hashes(straight), _hashes(killed)
    steps = {path.name for path in (straight / "checkpoints").iterdir()}
    further = {
        str(path.relative_to(killed))
        for folder in (killed / "checkpoints").glob("step-*")
        if folder.name not in steps
        for path in folder.iterdir()
    }
    names = {*expected, *found} - further
    differing = sorted(name for name in names if expected.get(name) != found.get(name))
    return Comparison(len(names), differing)


def format_report(hits: Sequence[Hit], comparison: Comparison) -> str:
    """Format the result of a drill.

    Args:
        hits: what each fault met.
        comparison: comparison of the files of both runs.

    Returns:
        A table as Markdown, and a sentence about the files.
    """
    rows = []
    for kind, text in KINDS.items():
        of_kind = [hit for hit in hits if hit.fault.kind == kind]
        if of_kind:
            rows.append(
                [
                    text,
                    str(len(of_kind)),
                    str(sum(hit.is_expected for hit in of_kind)),
                    str(sum(bool(hit.unfinished) for hit in of_kind)),
                    f"{max(hit.seconds for hit in of_kind):.1f}",
                ]
            )
    header = ["fault", "times", "status as documented", "left something unfinished", "longest end"]
    different = ", ".join(comparison.differing) or "none"
    files = f"{comparison.count} files compared; different: {different}"
    return f"{markdown_table(header, rows)}\n\n{files}"


def _interrupt(drill: Drill, fault: Fault) -> Hit:
    """Start the run again, wait for the moment of a fault, and send its signal to a rank."""
    run, processes = Run(drill.folder / "killed/run"), drill.start("killed")
    try:
        _wait_for_moment(drill, run, fault, processes)
        is_term = fault.kind == "SIGTERM"
        processes[fault.rank].send_signal(signal.SIGTERM if is_term else signal.SIGKILL)
        began = time.monotonic()
        statuses = [process.wait(drill.timeout) for process in processes]
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
    others = [drill.log("killed", rank) for rank in range(drill.ranks) if rank != fault.rank]
    explained = all(LOST in log for log in others)
    return Hit(fault, _last_step(run), _unfinished(run), statuses, seconds, explained)


def _wait_for_moment(
    drill: Drill, run: Run, fault: Fault, processes: Sequence[subprocess.Popen[bytes]]
) -> None:
    if fault.kind == "start":
        time.sleep(fault.delay * START_SECONDS)
        return
    _wait(processes, lambda: "training on" in drill.log("killed", 0))
    first = _last_step(run)
    if fault.kind in WRITTEN:
        parts = int(5 * fault.delay) if fault.kind == "checkpoint" else 0
        _wait(processes, lambda: _is_writing(run, fault.kind, max(fault.step, first), parts))
    else:
        began = time.monotonic()
        _wait(processes, lambda: _last_step(run) > max(fault.step - 1, first))
        taken = max(_last_step(run) - first, 1)
        time.sleep(fault.delay * (time.monotonic() - began) / taken)  # within the next step


def _wait(processes: Sequence[subprocess.Popen[bytes]], condition: Callable[[], bool]) -> None:
    while not condition():
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("the run ended before the fault was due: see its rank-*.log")
        time.sleep(POLL_SECONDS)


def _is_writing(run: Run, kind: str, step: int, parts: int) -> bool:
    """Whether a checkpoint after `step` has `parts` files, or an output after `step` has begun."""
    parent, begin = WRITTEN[kind]
    with suppress(OSError):  # what is written is renamed
        for path in (run.folder / parent).glob(f".{begin}*"):
            if kind == "checkpoint":
                due = int(path.name.removeprefix(".step-").partition(".")[0]) >= step
                return due and len(list(path.iterdir())) >= parts
            return _last_step(run) >= step
    return False


def _unfinished(run: Run) -> list[str]:
    """Names of temporary files and folders in a run, without the lock."""
    paths = [*run.folder.glob(".*"), *run.checkpoints.glob(".*"), *run.snapshots.glob(".*")]
    return sorted(path.name for path in paths if path.name != ".lock")


def _last_step(run: Run) -> int:
    """Number of lines of metrics.jsonl; the drill reports every step."""
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0


def _finish(drill: Drill, name: str) -> None:
    processes = drill.start(name)
    statuses = [process.wait(drill.timeout) for process in processes]
    if any(statuses):
        logs = "\n".join(drill.log(name, rank)[-2000:] for rank in range(drill.ranks))
        raise RuntimeError(f"the run ended with {statuses}: {logs}")


def _hashes(folder: Path) -> dict[str, str]:
    # The speed of the machine is another one each time.
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "speed.jsonl"]
    return {str(path.relative_to(folder)): hash_file(path) for path in paths}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
