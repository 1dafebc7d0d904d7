"""The job script of docs/scaling.md: a signal saves, requeues, and the next job continues."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/scaling.md"
SRUN = """#!/bin/bash
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & ranks+=($!)
done
trap 'kill -USR1 "${ranks[@]}"' USR1
trap 'kill -TERM "${ranks[@]}"' TERM
highest=0
for rank in "${ranks[@]}"; do
  while wait "$rank"; status=$?; kill -0 "$rank" 2>/dev/null; do :; done
  (( status > highest )) && highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""
DIFFCORE = """#!/bin/bash
trap 'exit 138' USR1
trap 'exit 143' TERM
echo "$RANK/$LOCAL_RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" > "words $RANK"
touch "ready $RANK"
until [ -e end ]; do sleep 0.05; done
exit "$(cat end)"
"""


@pytest.fixture
def job(tmp_path):
    (script,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "train.slurm").write_text(script)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "diffcore": DIFFCORE}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(*words):
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "20007"}
        variables |= {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        command = ["bash", "train.slurm", *words]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | variables)

    return start


def wait_for_ranks(folder):
    end = time.monotonic() + 60
    while not all((folder / f"ready {rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status", "requeued"),
    [(signal.SIGUSR1, 138, True), (signal.SIGTERM, 143, False)],
)
def test_the_early_warning_alone_returns_the_job_to_the_queue(
    tmp_path, job, number, status, requeued
):
    process = job("digits", "--folder", "a run")
    wait_for_ranks(tmp_path)
    process.send_signal(number)
    assert process.wait(60) == status
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 20007\n"
    words = (tmp_path / "words 1").read_text()
    assert words == "1/1/2 127.0.0.1:20007 train digits --folder a run --resume auto\n"


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_at_its_end_or_with_an_error_is_not_requeued(tmp_path, job, status):
    (tmp_path / "end").write_text(str(status))
    assert job("digits").wait(60) == status
    assert not (tmp_path / "requeued").exists()
