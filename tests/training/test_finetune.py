"""The recipe finetune-text-to-image on a tiny pipeline: caches, exact resume, and what diffusers makes of the results."""

import hashlib
import json
import math
import shutil
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcore.cli.finetuning import complete_settings
from diffcore.cli.main import main
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline, Latents, PromptNetwork
from diffcore.integrations.diffusers.loading.folder import network_of
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.base_network import ADAPTER
from diffcore.integrations.diffusers.scheduler.scheduler_config import config_of, describe
from diffcore.io.safetensors import read_weights
from diffcore.io.specs import from_spec
from diffcore.run import Run
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Discrete, Flow, Shifted, Trailing, ZeroTerminalSNR
from diffcore.training import checkpoint, loop
from diffcore.training.data.latents import LatentDataset
from diffcore.training.lr import LearningRate
from diffcore.training.trainer import Trainer
from tests.conftest import forget_accelerate
from tests.helpers import text_networks
from tests.helpers.captioned_images import (
    OLD,
    change_json,
    write_image,
    write_images,
    write_pipeline,
)
from tests.helpers.tiny_pipelines import quiet, unet, vae

DISTINCT = ["", "a blue cat", "a dog", "a red cat"]
SHORT = (
    "--steps=4",
    "--batch-size=4",
    "--save-every=2",
    "--log-every=1",
    "--trackers=[]",
    "--lr.peak=1e-2",
    "--lr.warmup=0",
)
PICTURES = ("--sample-every=2", "--sample-steps=2")
LORA = ("--network.lora.rank=2", "--network.lora.alpha=6")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with a pipeline, images, their cache, and a run of each kind."""
    import datasets

    folder, threads = tmp_path_factory.mktemp("finetune"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.chdir(folder)
        write_pipeline(folder / "pipeline")
        write_images(folder / "images")
        assert main(command("runs/full", *PICTURES)) == 0
        forget_accelerate()
        assert main(command("runs/lora", *LORA)) == 0
        forget_accelerate()
        yield folder
    torch.set_num_threads(threads)


def command(folder, *options):
    named = ("--pipeline=pipeline", "--data.folder=images", f"--folder={folder}")
    return ["train", "finetune-text-to-image", *named, *SHORT, *options]


def hashes(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def called(*arguments):
    forget_accelerate()
    return main(list(arguments))


# The run --------------------------------------------------------------------------------------------------------------


def test_the_process_is_the_pipelines_with_zero_terminal_snr_and_a_class_for_each_caption(place):
    process = Process.load(place / "runs/full/process.json")
    schedule = ZeroTerminalSNR(Discrete("scaled_linear", 1000, 0.00085, 0.012))
    assert (process.schedule, process.prediction) == (schedule, "v_prediction")
    assert (process.shape, process.sigma_data, process.classes, process.dropout) == (
        (4, 8, 8),
        1.0,
        4,
        0.1,
    )


def test_a_run_holds_the_pipeline_and_pictures_of_the_captions(place):
    run = place / "runs/full"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "process.json", "ema.safetensors", "metrics.jsonl", "checkpoints", "samples", "pipeline",
    }  # fmt: skip
    assert {path.name for path in (run / "samples").iterdir()} == {
        "step-00000002.png",
        "step-00000004.png",
    }
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("options", [(), LORA], ids=["all weights", "LoRA"])
def test_a_resumed_run_is_the_same_run_to_the_bit_and_encodes_nothing(place, options, monkeypatch):
    monkeypatch.setattr(Latents, "posterior", None)
    monkeypatch.setattr(PipelineIndex, "read_text_pipeline", None)
    name = "lora" if options else "full"
    whole, options = place / f"runs/{name}", (*options, *(() if options else PICTURES))
    save = loop.save

    def crash(state, reporter):
        save(state, reporter)
        if state.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", crash)
        assert called(*command(f"runs/stopped-{name}", *options)) == 130
    assert called(*command(f"runs/stopped-{name}", *options, "--resume=true")) == 0
    stopped, straight = hashes(place / f"runs/stopped-{name}"), hashes(whole)
    assert stopped.keys() == straight.keys()
    different = {file for file in straight if straight[file] != stopped[file]}
    assert different - {ADAPTER} == {"config.yaml"}  # which names the folder
    if options == LORA:  # of its file diffusers' metadata are in no fixed order
        own, other = (
            load_file(place / f"runs/{run}" / ADAPTER) for run in ("lora", "stopped-lora")
        )
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)


def test_its_own_config_makes_the_same_run(place):
    before = hashes(place / "runs/full")
    assert called("train", "--config=runs/full/config.yaml", "--resume=true") == 0
    assert hashes(place / "runs/full") == before


def test_another_set_of_captions_is_another_run(place, capsys):
    shutil.copytree(place / "runs/lora", place / "runs/other")
    shutil.copytree(place / "images", place / "others")
    (place / "others/0.txt").write_text("a fish")
    arguments = command("runs/other", *LORA, "--resume=true")
    assert called(*[word.replace("folder=images", "folder=others") for word in arguments]) == 1
    assert "started with another data" in capsys.readouterr().err
    (place / "runs/other/config.yaml").write_text(
        (place / "runs/other/config.yaml").read_text().replace(": images", ": others")
    )
    assert called(*[word.replace("folder=images", "folder=others") for word in arguments]) == 1
    assert "started with another process.classes" in capsys.readouterr().err


def nudge(path):
    """Change the weights that the adapter is beside."""
    save_file(
        {name: 1.5 * value for name, value in load_file(path).items()}, path, {"format": "pt"}
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "images/1.txt").write_text("a bird"),
        lambda place: (place / "images/1.txt").write_text("a dog"),
        lambda place: write_image(place / "images/1.png", 7),
        lambda place: change_json(place / "pipeline/vae/config.json", scaling_factor=0.5),
        lambda place: nudge(place / "pipeline/unet/diffusion_pytorch_model.safetensors"),
    ],
    ids=["caption", "label", "image", "VAE", "weights"],
)
def test_data_that_changed_where_they_lie_are_other_data(
    place, tmp_path, monkeypatch, capsys, change
):
    """A blue cat is now a bird: as many captions as before."""
    for name in ("images", "pipeline", "cache"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copytree(place / "runs/lora", tmp_path / "runs/lora")
    monkeypatch.chdir(tmp_path)
    resume = command("runs/lora", *LORA, "--resume=true")
    assert called(*resume) == 0
    change(tmp_path)
    if (tmp_path / "images/1.txt").read_text() == "a dog":  # and so another image is the blue cat
        (tmp_path / "images/3.txt").write_text("a blue cat")
    before = hashes(tmp_path / "runs")
    assert called(*resume) == 1
    assert " are not those with which the run in runs/lora was started" in capsys.readouterr().err
    assert hashes(tmp_path / "runs") == before


# What diffusers makes of it -------------------------------------------------------------------------------------------


def ours(run, label):
    """The latents of the run's averaged network for a caption's label, and the noise that they begin with."""
    denoiser = Run(run).denoiser()
    prompts = LatentDataset("images", "pipeline").prompts()
    asked = Denoiser(PromptNetwork(denoiser.network, prompts), denoiser.process)
    made = sample(asked, DDIM(), Trailing(), 4, seeds=[5], condition=[label], guidance=CFG(3.0))
    return made.x, Noise(torch.tensor([5]), (4, 8, 8)).first_sample(made.knots[0], 1.0)


def theirs(pipe, prompt, noise):
    call = {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "latents": noise,
        "output_type": "latent",
    }
    return quiet(pipe)(prompt, **call).images


def test_diffusers_loads_the_pipeline_and_gives_our_samples(place, monkeypatch):
    monkeypatch.chdir(place)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(place / "runs/full/pipeline")
    config = pipe.scheduler.config
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing"
    for label, prompt in enumerate(DISTINCT):
        x, noise = ours(place / "runs/full", label)
        torch.testing.assert_close(
            theirs(pipe, prompt, noise), x, rtol=0, atol=5e-6 * x.abs().max().item()
        )
    average = read_weights(place / "runs/full/ema.safetensors")
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, average[f"network.{name}"]), name
    for part in ("vae", "text_encoder", "tokenizer"):
        assert hashes(place / "runs/full/pipeline" / part) == hashes(place / "pipeline" / part)


def test_diffusers_loads_the_adapter_and_gives_our_samples(place, monkeypatch):
    monkeypatch.chdir(place)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(place / "pipeline")
    pipe.scheduler = diffusers.DDIMScheduler.from_pretrained(place / "runs/lora/scheduler")
    x, noise = ours(place / "runs/lora", 2)
    base = theirs(pipe, "a dog", noise)
    pipe.load_lora_weights(place / "runs/lora")
    found, scale = theirs(pipe, "a dog", noise), x.abs().max().item()
    torch.testing.assert_close(found, x, rtol=0, atol=5e-6 * scale)
    assert (found - base).abs().max() > 1e-3 * scale
    pipe.unload_lora_weights()
    assert torch.equal(theirs(pipe, "a dog", noise), base)


def test_a_run_of_an_adapter_keeps_the_adapter_alone(place):
    run = place / "runs/lora"
    tensors, state = checkpoint.read(run / "checkpoints/step-00000004")
    (group,) = state["groups"]
    assert all(".lora_" in name for name in group["params"])
    for file in ("model.safetensors", "ema.safetensors"):
        assert all(".lora_" in name for name in tensors[file])
        assert (
            len(tensors[file]) == 2 * 4 * 2 * 4
        )  # A and B of four layers, self and cross attention, four blocks
    assert all(".lora_" in name for name in tensors["training.safetensors"] if name != "window")
    assert not (run / "pipeline").exists()
    assert (run / ADAPTER).is_file()


def test_classes_of_latents_leave_a_pipeline_with_the_vae(place, monkeypatch):
    monkeypatch.chdir(place)
    forget_accelerate()
    for label, name in enumerate("ab"):
        write_image(place / f"classes/{name}/1.png", label)
    process = Process(
        shape=(4, 8, 8), low=-math.inf, high=math.inf, sigma_data=1.0, classes=2, dropout=0.1
    )
    network = partial(unet, in_channels=4, out_channels=4, num_class_embeds=3)
    data = LatentDataset("classes", "pipeline")
    options = {
        "lr": LearningRate(1e-3),
        "batch_size": 4,
        "trackers": [],
        "sample_every": 1,
        "sample_steps": 2,
    }
    Trainer(network, data, process, torch.optim.AdamW, place / "runs/classes", 1, **options).train()
    pipe = quiet(DiffcorePipeline.from_pretrained(place / "runs/classes/pipeline"))
    assert (place / "runs/classes/samples/step-00000001.png").is_file()
    (image,) = pipe(class_labels=[1], seeds=[3]).images
    (z,) = pipe(class_labels=[1], seeds=[3], output_type="latent").images
    expected = (data.decode(z[None])[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    assert abs(np.asarray(image) - expected.numpy()).max() < 0.51


def test_latents_of_three_channels_are_decoded_too(tmp_path, monkeypatch):
    """They would pass for pictures."""
    monkeypatch.chdir(tmp_path)
    forget_accelerate()
    process = Process(shape=(3, 8, 8), low=-math.inf, high=math.inf, sigma_data=1.0)
    pipe = DiffcorePipeline.of(Denoiser(unet(), process), vae=vae(latent_channels=3))
    pipe.save_pretrained("run/pipeline")
    process.save(Run(tmp_path / "run").process)
    (tmp_path / "run/config.yaml").write_text("network: mine.Network\n")
    assert called("sample", "run", "--steps=2", "--guidance.scale=1", "--out=x.safetensors") == 0
    assert load_file("x.safetensors")["x"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_is_sampled_by_prompt(place, monkeypatch, name):
    """Prompts need not be captions; the pictures are those of diffusers' pipeline with the run's weights or adapter."""
    monkeypatch.chdir(place)
    out = f"--out={name}.safetensors"
    asked = (
        "--sampler=DDIM",
        "--grid=Trailing",
        "--steps=4",
        "--guidance.scale=3",
        "--prompt=a horse",
        "--seeds=5",
    )
    assert called("sample", f"runs/{name}", *asked, out) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        place / ("runs/full/pipeline" if name == "full" else "pipeline")
    )
    if name == "lora":
        pipe.scheduler = diffusers.DDIMScheduler.from_pretrained(place / "runs/lora/scheduler")
        pipe.load_lora_weights(place / "runs/lora")
    z = theirs(pipe, "a horse", Noise(torch.tensor([5]), (4, 8, 8)).start())
    with torch.no_grad():
        expected = Latents(pipe.vae).decode(z)
    made = read_weights(place / f"{name}.safetensors")["x"]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


OF_ITS_OWN = """
network: {class_path: diffcore.integrations.diffusers.Pretrained}
data: {class_path: diffcore.training.data.latents.LatentDataset, init_args: {folder: images}}
process: {dropout: 0.1}
optimizer: torch.optim.SGD
"""
SD3 = Shifted.by_time_shift(Flow(), 3.0)


@pytest.mark.parametrize(
    ("family", "scheduler", "schedule", "options"),
    [
        (
            "sdxl",
            diffusers.EulerDiscreteScheduler(**OLD),
            Discrete("scaled_linear", 1000, 0.00085, 0.012),
            (),
        ),
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), SD3, ()),
        ("pixart", diffusers.DDIMScheduler(clip_sample=False), Discrete(), ()),
        (
            "flux",
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            SD3,
            ("--data.size=16", "--process.shape=[4,8,8]"),
        ),
    ],
)
def test_other_families_train_on_their_own_process_where_the_file_says_no_other(
    place, monkeypatch, family, scheduler, schedule, options
):
    monkeypatch.chdir(place)
    pipe, run = getattr(text_networks, family)(scheduler), place / f"runs/{family}"
    pipe.save_pretrained(family)
    (place / "own.yaml").write_text(OF_ITS_OWN)
    short = ("--steps=1", "--batch-size=2", "--trackers=[]", f"--folder={run}")
    assert called("train", "own.yaml", f"--pipeline={family}", *short, *options) == 0
    process = Process.load(run / "process.json")
    assert (process.schedule, process.classes) == (schedule, 4)
    loaded = type(pipe).from_pretrained(run / "pipeline")
    assert describe(config_of(loaded.scheduler)).schedule == schedule
    average = read_weights(run / "ema.safetensors")
    for name, value in network_of(loaded).state_dict().items():
        assert torch.equal(value, average[f"network.{name}"]), name
    changed = [
        not torch.equal(value, average[f"network.{name}"])
        for name, value in network_of(pipe).state_dict().items()
    ]
    assert sum(changed) > len(changed) / 2


def test_what_a_file_says_is_kept_and_a_schedule_around_none_is_around_the_pipelines(
    place, monkeypatch
):
    monkeypatch.chdir(place)

    def schedule(said):
        made = complete_settings({"process": {"schedule": said}}, "pipeline")["process"]
        return from_spec(Process, made | {"dropout": 0.0}).schedule

    own = Discrete("scaled_linear", 1000, 0.00085, 0.012)
    assert schedule("Cosine") == Cosine()
    assert schedule({"class_path": "Shifted", "init_args": {"shift": -1.0}}) == Shifted(own, -1.0)
    assert schedule(
        {"class_path": "ZeroTerminalSNR", "init_args": {"inner": "Cosine"}}
    ) == ZeroTerminalSNR(Cosine())
    shutil.copytree("pipeline", "zero")
    change_json(place / "zero/scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    own = complete_settings({"process": {"schedule": "ZeroTerminalSNR"}}, "zero")["process"][
        "schedule"
    ]
    assert own["init_args"]["inner"]["class_path"] == "Discrete"
    parts = complete_settings(
        {
            "data": {"class_path": "LatentDataset", "init_args": {"pipeline": "other"}},
            "network": "mine.Net",
        },
        "pipeline",
    )
    assert (parts["data"]["init_args"], parts["network"]) == ({"pipeline": "other"}, "mine.Net")


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "finetune-text-to-image"],
            "starts from a pipeline: name the folder of one of diffusers, --pipeline FOLDER",
        ),
        (
            ["train", "finetune-text-to-image", "--pipeline=nowhere"],
            "nowhere/model_index.json is missing",
        ),
        (command("runs/no", "--data.folder=nowhere"), "nowhere is not a folder"),
        (command("runs/no", "--data.captions=false"), "the data has no captions and classes is 0"),
        (
            command("runs/no", "--data.size=8"),
            "expected a float tensor of the process's shape (4, 8, 8)",
        ),
        (
            ["train", "runs/full/config.yaml", "--pipeline=other", "--folder=runs/no"],
            "pipeline is other, but runs/full/config.yaml reads pipeline",
        ),
        (["export", "runs/lora", "--out=no"], "pipe.load_lora_weights('runs/lora')"),
        (command("runs/no", "--process.classes=7"), "classes is 7, but the data has 4 captions"),
        (
            command("runs/no", "--network.lora.rank=2", "--network.lora.targets=[to_w]"),
            "ends in to_w",
        ),
        (
            ["sample", "runs/full", "--labels=1", "--out=x.safetensors"],
            "is conditioned on text, not on labels",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    assert called(*arguments) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert line.startswith(f"diffcore {arguments[0]}: error: ")
    assert not (place / "runs/no").exists()


def test_settings_that_are_no_table_are_refused_in_a_line(place, monkeypatch):
    monkeypatch.chdir(place)
    for settings in ({"process": "VP"}, {"network": {"class_path": "Pretrained", "init_args": 3}}):
        with pytest.raises(ValueError, match=r"is .*, expected a table of settings"):
            complete_settings(settings, "pipeline")


def test_a_part_that_could_not_be_copied_is_missed_before_training(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree("pipeline", "partial")
    change_json(
        place / "partial/model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"]
    )
    arguments = [word.replace("=pipeline", "=partial") for word in command("runs/partial")]
    assert called(*arguments) == 1
    assert "partial names feature_extractor in model_index.json" in capsys.readouterr().err
    assert not (place / "runs/partial").exists()
    assert (
        called(*[word.replace("runs/partial", "runs/partial-lora") for word in arguments], *LORA)
        == 0
    )
