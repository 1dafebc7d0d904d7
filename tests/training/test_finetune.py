"""Fine-tuning of a pipeline: what a run trains on, what it writes, which families it trains."""

import json
import re

import diffusers
import pytest
import torch

from diffcore.core.process import Process
from diffcore.integrations.diffusers.adapters.files import ADAPTER
from diffcore.integrations.diffusers.loading.folder import network_of
from diffcore.integrations.diffusers.scheduler.scheduler_config import (
    describe_process,
    read_scheduler_config,
)
from diffcore.io.safetensors import read_weights
from diffcore.schedules import Discrete, Flow, Shifted, ZeroTerminalSNR
from diffcore.training.checkpoints import checkpoint
from tests.conftest import ROOT, forget_accelerate
from tests.helpers import text_networks
from tests.helpers.captioned_images import OLD
from tests.helpers.finetune_runs import run_command
from tests.helpers.products import thinned

LORA_TENSORS = 2 * 4 * 2 * 4
"""A and B, of four layers, in self- and cross-attention, of four blocks."""


def test_the_process_is_the_pipelines_with_zero_terminal_snr_and_one_class_for_each_caption(
    workspace,
):
    process = Process.load(workspace / "runs/full/process.json")
    schedule = ZeroTerminalSNR(Discrete("scaled_linear", 1000, 0.00085, 0.012))
    assert (process.schedule, process.prediction) == (schedule, "v_prediction")
    assert (process.shape, process.sigma_data) == ((4, 8, 8), 1.0)
    assert (process.classes, process.dropout) == (4, 0.1)


def test_a_run_writes_the_pipeline_and_previews_of_the_captions(workspace):
    run = workspace / "runs/full"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "process.json",
        "ema.safetensors",
        "metrics.jsonl",
        "speed.jsonl",
        "checkpoints",
        "samples",
        "pipeline",
    }
    previews = {path.name for path in (run / "samples").iterdir()}
    assert previews == {"step-00000002.png", "step-00000004.png"}
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)


def test_the_checkpoints_of_an_adapter_hold_only_the_adapter(workspace):
    run = workspace / "runs/lora"
    stored = checkpoint.read(run / "checkpoints/step-00000004")
    tensors = stored.tensors
    (group,) = stored.state["groups"]
    assert all(".lora_" in name for name in group["params"])
    for file in ("model.safetensors", "ema.safetensors"):
        assert all(".lora_" in name for name in tensors[file])
        assert len(tensors[file]) == LORA_TENSORS
    assert all(".lora_" in name for name in tensors["training.safetensors"] if name != "window")
    assert not (run / "pipeline").exists()
    assert (run / ADAPTER).is_file()


FILE_WITHOUT_SCHEDULE = """
network: {class_path: diffcore.integrations.diffusers.PretrainedNetwork}
data: {class_path: diffcore.training.data.latents.LatentDataset, init_args: {folder: images}}
process: {dropout: 0.1}
optimizer: torch.optim.SGD
"""
SD3 = Shifted.by_time_shift(Flow(), 3.0)
FAMILIES = {
    "sdxl": (
        diffusers.EulerDiscreteScheduler(**OLD),
        Discrete("scaled_linear", 1000, 0.00085, 0.012),
        (),
    ),
    "sd3": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), SD3, ()),
    "pixart": (diffusers.DDIMScheduler(clip_sample=False), Discrete(), ()),
    "flux": (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        SD3,
        ("--data.size=16", "--process.shape=[4,8,8]"),
    ),
}


@pytest.mark.parametrize("family", thinned([(name,) for name in FAMILIES], 2))
def test_a_pipeline_trains_on_its_own_process_if_the_file_defines_none(workspace, family):
    scheduler, schedule, options = FAMILIES[family]
    pipe, run = getattr(text_networks, family)(scheduler), workspace / f"runs/{family}"
    pipe.save_pretrained(family)
    (workspace / "own.yaml").write_text(FILE_WITHOUT_SCHEDULE)
    short = ("--steps=1", "--batch-size=2", "--trackers=[]", f"--folder={run}")
    assert run_command("train", "own.yaml", f"--pipeline={family}", *short, *options) == 0
    process = Process.load(run / "process.json")
    assert (process.schedule, process.classes) == (schedule, 4)
    exported = type(pipe).from_pretrained(run / "pipeline")
    assert describe_process(read_scheduler_config(exported.scheduler)).schedule == schedule
    average = read_weights(run / "ema.safetensors")
    for name, value in network_of(exported).state_dict().items():
        assert torch.equal(value, average[f"network.{name}"]), name
    changed = [
        not torch.equal(value, average[f"network.{name}"])
        for name, value in network_of(pipe).state_dict().items()
    ]
    assert sum(changed) > len(changed) / 2


def test_the_recipe_of_a_beta_table_refuses_a_flow_and_names_the_choice_that_keeps_it(
    workspace, capsys
):
    pipe = text_networks.sd3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.save_pretrained("flow")
    run, options = workspace / "runs/flow", ("--pipeline=flow", "--data.folder=images")
    short = ("--steps=1", "--batch-size=2", "--trackers=[]", f"--folder={run}")
    assert run_command("train", "finetune-text-to-image", *options, *short) == 1
    message = capsys.readouterr().err
    assert "the recipe finetune-text-to-image trains Stable Diffusion 1 and 2" in message
    assert "and flow holds Stable Diffusion 3: use finetune" in message
    assert not run.exists()
    assert run_command("train", "finetune-flow", *options, *short) == 0
    process = Process.load(run / "process.json")
    assert (process.schedule, process.prediction) == (SD3, "flow_prediction")
    out = workspace / "flow.safetensors"
    sample = ("sample", str(run), "--prompt=a cat", "--steps=2", f"--out={out}")
    assert run_command(*sample) == 0
    exported = type(pipe).from_pretrained(run / "pipeline")
    assert exported.scheduler.config.shift == 3.0


def test_the_python_example_of_the_documentation_trains_an_adapter(workspace):
    page = (ROOT / "docs/training-text.md").read_text()
    (example,) = re.findall(r"^```py\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert "steps=10_000" in example
    forget_accelerate()
    exec(example.replace("steps=10_000", "steps=1"), {})
    assert (workspace / "runs/python" / ADAPTER).is_file()
