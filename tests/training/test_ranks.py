"""Three ranks: they stop at the same step, resume bit for bit, and end when one of them is lost."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.training_runs import hashes

SCRIPT = '''
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, {root!r})
from diffcore.training import loop
from diffcore.training.data.source import DataSource
from tests.helpers.training_runs import GREY, LabelRecorder, ListDataset, make_trainer

folder, rank = Path({folder!r}), int(os.environ["RANK"])
torch.set_num_threads(1)
Accelerator.end_training = lambda self: None  # leaves the process group to the next run
options = dict(network=partial(LabelRecorder, dropout=0.2), batch_size=12, keep=1, log_every=4)
options["rank_timeout"] = 6


class SignallingData(ListDataset):
    """The last rank receives SIGTERM within its third step."""

    items_read = 0

    def __getitem__(self, index):
        self.items_read += 1
        if self.items_read == 2 * 4 + 3 and rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


class FailingData(DataSource):
    is_ready = False

    def __len__(self):
        return 1

    def prepare(self, device, is_main_process):
        if is_main_process:
            raise OSError("the disk of the cache is full")


class SlowData(ListDataset):
    """The last rank does not answer in the run, like one that is stopped."""

    items_read = 0

    def __getitem__(self, index):
        self.items_read += 1
        if self.items_read == 3 + 4 and rank == 2:
            time.sleep(8)
        return super().__getitem__(index)


def outcome(action):
    try:
        action()
    except BaseException as error:
        return f"{{type(error).__name__}}: {{error}}"
    return ""


torch.manual_seed(0)
items = [(torch.rand(1, 8, 8) * 2 - 1, label % 10) for label in range(40)]
found = {{}}
make_trainer(folder / "straight", data=ListDataset(*items), **options).train()
stopped = make_trainer(folder / "stopped", data=SignallingData(*items), **options)
found["signal"] = outcome(stopped.train)
found["checkpoints"] = sorted(path.name for path in (folder / "stopped/checkpoints").glob("step-*"))
make_trainer(folder / "stopped", data=ListDataset(*items), resume=True, **options).train()
found["failing"] = outcome(make_trainer(folder / "failing", data=FailingData(), **options).train)
found["slow"] = outcome(make_trainer(folder / "slow", data=SlowData(*items), **options).train)
(folder / f"found {{rank}}.json").write_text(json.dumps(found))
'''


@pytest.mark.slow
def test_ranks_stop_together_resume_bit_for_bit_and_end_when_one_is_lost(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT.format(root=os.getcwd(), folder=str(tmp_path)))
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(
        [*command, "3", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = [json.loads((tmp_path / f"found {rank}.json").read_text()) for rank in range(3)]
    assert [each["signal"] for each in found] == ["SystemExit: 143"] * 3
    (checkpoint,) = found[0]["checkpoints"]
    assert checkpoint in ("step-00000003", "step-00000004")
    assert f"stopped by SIGTERM: step {int(checkpoint[5:])} of 6 is saved" in ended.stderr
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "straight")
    reason = "OSError: the disk of the cache is full"
    others = f"ValueError: the first rank failed: {reason}"
    assert [each["failing"] for each in found] == [reason, others, others]
    for rank in (0, 1):
        message = f"rank {rank} of 3 lost another rank, which ended (see its message) or did not "
        assert message + "answer for 6 s (rank_timeout)" in found[rank]["slow"]
