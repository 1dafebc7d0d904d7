"""Two ranks train on a bucketed folder as one: each step has the losses of the same images."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from diffcore.core.process import Process
from diffcore.integrations.diffusers.pipeline.pretrained_network import PretrainedNetwork
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.latents import LatentDataset
from tests.helpers import text_networks
from tests.helpers.mixed_images import ramp
from tests.helpers.training_runs import make_trainer, read_reports

IMAGES = ((60, 20), (45, 15), (20, 60), (16, 16), (60, 24), (30, 62))


def trainer(folder, run):
    """A run of Stable Diffusion XL on the latents of crops in buckets."""
    data = LatentDataset(
        str(folder / "images"),
        str(folder / "pipeline"),
        cache=str(folder / "cache"),
        buckets=Buckets((16,), step=4, aspect=2.0),
        crops=3,
        flip=True,
    )
    return make_trainer(
        folder / run,
        network=partial(PretrainedNetwork, str(folder / "pipeline")),
        data=data,
        process=Process(shape=(4, 8, 8), low=-math.inf, high=math.inf, dropout=0.2),
        batch_size=4,
        steps=4,
    )


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_on_a_bucketed_folder(tmp_path, one_thread):
    text_networks.sdxl(text_networks.ddim()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "images").mkdir()
    for number, size in enumerate(IMAGES):
        ramp(*size).save(tmp_path / f"images/{number}.png")
        (tmp_path / f"images/{number}.txt").write_text("abc"[number % 3])
    trainer(tmp_path, "one").train()
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [*command, "2", __file__, str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    one, two = (
        [line["loss"] for line in read_reports(tmp_path / run) if "loss" in line]
        for run in ("one", "two")
    )
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer(Path(sys.argv[1]), "two").train()
