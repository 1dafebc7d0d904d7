"""Runs that train text encoders: they resume exactly, and diffusers samples what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from diffcore.core.noise import Noise
from diffcore.integrations.diffusers import Latents
from diffcore.integrations.diffusers.adapters.files import ADAPTER
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from tests.helpers import text_networks
from tests.helpers.captioned_images import OLD
from tests.helpers.finetune_runs import (
    STEPS_PER_CHECKPOINT,
    diffusers_sample,
    finetune_command,
    run_command,
)
from tests.helpers.training_runs import crash_at_checkpoint, hashes

TEXT = ("--lora=2", "--text_lora=2", "--token=<cat>=c", "--network.word.vectors=2")
SHORT = ("--steps=4", "--lr.peak=1e-2", "--lr.warmup=0", "--save-every=2")


@pytest.fixture
def captions(workspace):
    """The images with captions that contain the new word."""
    folder = Path("word-images")
    if not folder.exists():
        folder.mkdir()
        for path in Path("images").iterdir():
            data = path.read_bytes()
            (folder / path.name).write_bytes(data.replace(b"cat", b"<cat>"))
    return str(folder)


def command(folder, captions, *options):
    return finetune_command(folder, *TEXT, *SHORT, f"--data.folder={captions}", *options)


def run_once(captions):
    """Train the network, its text encoder and a new word, unless another test has."""
    if not Path("runs/text").exists():
        assert run_command(*command("runs/text", captions)) == 0


def test_diffusers_samples_what_a_run_with_trained_text_encoders_wrote(workspace, captions, capsys):
    run_once(captions)
    run = workspace / "runs/text"
    state = read_weights(run / "ema.safetensors")
    kinds = ("network.", ".lora_B.", "token_embedding.new")
    assert all(any(kind in name for name in state) for kind in kinds)
    assert all(value.any() for name, value in state.items() if ".lora_B." in name)
    out = workspace / "text.safetensors"
    options = ("--sampler=DDIM", "--grid=Trailing", "--steps=4", "--guidance.scale=3")
    prompt = ("--prompt=a <cat> here", "--seeds=5", f"--out={out}")
    assert run_command("sample", "runs/text", *options, *prompt) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("pipeline")
    pipe.scheduler = diffusers.DDIMScheduler.from_pretrained("runs/text/scheduler")
    noise = Noise(torch.tensor([5]), (4, 8, 8)).start()
    before = diffusers_sample(pipe, "a <cat> here", noise)
    pipe.load_lora_weights("runs/text", weight_name=ADAPTER)
    pipe.load_textual_inversion("runs/text/learned_embeds.safetensors")
    z = diffusers_sample(pipe, "a <cat> here", noise)
    assert (z - before).abs().max() > 1e-3 * z.abs().max()
    with torch.no_grad():
        expected = Latents(pipe.vae).decode(z)
    images = read_weights(out)["x"]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert run_command("info", "runs/text") == 0
    assert "LoRA of rank 2, alpha 2, 2 embeddings of <cat>, " in capsys.readouterr().out
    assert Run(run).settings()["data"]["init_args"]["text"] == "tokens"


def test_a_run_with_trained_text_encoders_resumes_exactly(workspace, captions):
    run_once(captions)
    with crash_at_checkpoint(STEPS_PER_CHECKPOINT):
        assert run_command(*command("runs/text-stopped", captions)) == 130
    assert run_command(*command("runs/text-stopped", captions, "--resume=true")) == 0
    straight, stopped = workspace / "runs/text", workspace / "runs/text-stopped"
    expected, result = hashes(straight), hashes(stopped)
    different = {file for file in expected if expected[file] != result.get(file)}
    assert different - {ADAPTER, "checkpoints/outputs.json"} == {"config.yaml"}
    expected, result = load_file(straight / ADAPTER), load_file(stopped / ADAPTER)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_textual_inversion_trains_the_embeddings_alone_without_cached_captions(
    workspace, captions, monkeypatch
):
    cache = ("--data.cache=word-cache", "--sample-every=1", "--sample-steps=1")
    words = ("--token=<cat>=c", *SHORT, f"--data.folder={captions}", *cache, "--steps=1")
    assert run_command(*finetune_command("runs/word", *words)) == 0
    state = read_weights(workspace / "runs/word/ema.safetensors")
    assert list(state) == ["text_encoders.text_encoder.embeddings.token_embedding.new"]
    assert set(load_file("runs/word/learned_embeds.safetensors")) == {"<cat>"}
    assert not (workspace / "word-cache/embeddings").exists()
    assert (workspace / "runs/word/samples/step-00000001.png").is_file()
    common = ("--prompt=a <cat>", "--steps=2", "--seeds=3", "--sampler=DDIM", "--grid=Trailing")
    assert run_command("sample", "runs/word", *common, "--out=word.safetensors") == 0
    added = ("--lora=runs/word", "--guidance.scale=5", "--out=word-added.safetensors")
    assert run_command("sample", "pipeline", *common, *added) == 0
    images = [read_weights(f"{name}.safetensors")["x"] for name in ("word", "word-added")]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--token=<cat>",), "--token is <cat>, expected a new word and the word that it starts"),
        (("--lora=2", "--data.text=tokens"), "the network trains no text encoder"),
        (("--token=<dog>=c",), "the new word is <dog>, which none of the 4 captions contains"),
        (("--network.text_lora.rank=2",), "takes tokens in place of text embeddings"),
        (
            (
                "--text_lora=2",
                "--validation.data=LatentDataset",
                "--validation.data.folder=images",
                "--validation.data.pipeline=pipeline",
                "--validation.every=2",
            ),
            "takes tokens in place of text embeddings",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(workspace, capsys, words, message):
    assert run_command(*finetune_command("runs/no", *words)) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_train_the_text_encoders_as_one_rank_does(workspace, captions):
    """The first encoder of XL has a layer that nothing reads, whose gradient ranks would await."""
    scheduler = diffusers.EulerDiscreteScheduler(**OLD)
    text_networks.sdxl(scheduler).save_pretrained("text-xl")
    inputs = ("--pipeline=text-xl", f"--data.folder={captions}", "--batch-size=4", "--trackers=[]")
    words = ("train", "finetune", *inputs, *TEXT, *SHORT, "--log-every=1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = {"one": (), "two": (), "sharded": ("--sharding.strategy=full",)}
    root = str(Path(__file__).parents[2])
    environment, found = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}, {}
    for name, own in options.items():
        start = [sys.executable] if name == "one" else launch
        line = [*start, "-m", "diffcore", *words, *own, f"--folder=runs/text-{name}"]
        subprocess.run(line, check=True, env=environment, timeout=240)
        lines = Path(f"runs/text-{name}/metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["loss"] for line in lines]
    assert len(found["one"]) == 4
    assert found["two"] == pytest.approx(found["one"], rel=1e-5)
    assert found["sharded"] == pytest.approx(found["one"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [text_networks.sd3, text_networks.flux])
def test_a_flow_with_t5_trains_its_clip_encoders_and_is_sampled_with_them(workspace, make):
    name = make.__name__
    make(diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(f"pipeline-{name}")
    inputs = (f"--pipeline=pipeline-{name}", "--data.folder=images", "--trackers=[]")
    words = ("train", "finetune", *inputs, *SHORT, "--lora=2", "--text_lora=2", "--batch-size=4")
    words = (*words, "--resolution=16")
    assert run_command(*words, f"--folder=runs/{name}") == 0
    state = read_weights(Path(f"runs/{name}/ema.safetensors"))
    trained = [key for key in state if "text_encoder" in key and ".lora_B." in key]
    assert trained
    assert all(state[key].any() for key in trained)
    options = ("--prompt=a cat", "--seeds=5", "--sampler=DDIM", "--grid=Trailing", "--steps=2")
    samples = []
    scale = "3" if name == "sd3" else "1"  # Flux is trained without dropped captions
    size = ("--height=16", "--width=16", f"--guidance.scale={scale}")
    for adapters in (
        (f"runs/{name}", *size),
        (f"pipeline-{name}", "--lora", f"runs/{name}", *size),
    ):
        out = Path(f"{name}.safetensors")
        assert run_command("sample", *adapters, *options, f"--out={out}") == 0
        samples.append(read_weights(out)["x"])
    torch.testing.assert_close(*samples, rtol=0, atol=1e-5)
