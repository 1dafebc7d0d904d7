"""Named conditions from a configuration to samples, on the command line."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffcore.cli.condition_files import NamedValues
from diffcore.cli.main import main
from diffcore.core.conditions import ConditionRecord
from diffcore.core.process import Process
from diffcore.io.safetensors import write_weights

UNET = {
    "class_path": "diffusers.UNet2DModel",
    "init_args": {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 1,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": False,
        "class_embed_type": "identity",
    },
}
PROCESS = Process(
    shape=(1, 8, 8),
    conditions={
        "low": ConditionRecord((1, 4, 4), low=-1.0, high=1.0, dropout=0.5),
        "number": ConditionRecord((2,)),
    },
)


def values(given):
    return NamedValues.read(given, PROCESS).values


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on arrays, with an image and a vector as conditions."""
    folder = tmp_path_factory.mktemp("conditions")
    generator = np.random.default_rng(0)
    for name, shape in (("x0", (6, 1, 8, 8)), ("low", (6, 1, 4, 4)), ("number", (6, 2))):
        np.save(folder / f"{name}.npy", generator.uniform(-1, 1, shape).astype(np.float32))
    network = {
        "class_path": "diffcore.core.conditioned_networks.EmbeddedVectors",
        "init_args": {
            "network": {
                "class_path": "diffcore.core.conditioned_networks.ConcatenatedChannels",
                "init_args": {"network": UNET, "channels": {"low": 1}},
            },
            "sizes": {"number": 2},
        },
    }
    conditions = {name: str(folder / f"{name}.npy") for name in ("low", "number")}
    settings = {
        "network": network,
        "data": {
            "class_path": "Arrays",
            "init_args": {"path": str(folder / "x0.npy"), "conditions": conditions},
        },
        "process": {
            "shape": [1, 8, 8],
            "conditions": {
                "low": {"shape": [1, 4, 4], "low": -1, "high": 1, "dropout": 0.5},
                "number": {"shape": [2]},
            },
        },
        "optimizer": "torch.optim.AdamW",
        "folder": str(folder / "run"),
        "steps": 2,
        "batch_size": 4,
        "sample_every": 2,
        "sample_steps": 2,
        "trackers": [],
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert not main(["train", str(folder / "settings.yaml")])
    return folder / "run"


def test_a_run_records_its_conditions_and_draws_previews(run):
    assert Process.load(run / "process.json") == PROCESS
    assert list((run / "samples").glob("*.png"))


def test_samples_follow_the_values_of_files(run, tmp_path):
    def draw(name, *options):
        words = ["--steps=2", "--condition.number=0.5,-1", *options, f"--out={tmp_path / name}"]
        main(["sample", str(run), *words])
        return np.load(tmp_path / name)

    lows = np.load(run.parent / "low.npy")[:3]
    np.save(tmp_path / "low.npy", lows)
    np.save(tmp_path / "one.npy", lows[1])
    three = draw("three.npy", f"--condition.low={tmp_path / 'low.npy'}", "--per-label=2")
    assert len(three) == 6
    one = draw("second.npy", f"--condition.low={tmp_path / 'one.npy'}", "--seeds=2,3")
    assert np.array_equal(one, three[2:4])
    absent = draw("absent.npy", "--seeds=2,3")
    assert not np.array_equal(absent, one)


def test_a_folder_has_one_image_for_each_value_and_its_settings(run, tmp_path):
    low, out = tmp_path / "low.npy", tmp_path / "out"
    np.save(low, np.zeros((2, 1, 4, 4), np.float32))
    options = [f"--condition.low={low}", "--condition.number=0,1", "--steps=2", f"--out={out}"]
    main(["sample", str(run), *options])
    names = {path.name for path in out.glob("*.png")}
    assert names == {"value-0-seed-0.png", "value-1-seed-1.png"}
    recorded = json.loads((out / "sampling.json").read_text())["conditions"]
    assert recorded["number"] == "0,1"
    np.save(low, np.ones((2, 1, 4, 4), np.float32))
    assert main(["sample", str(run), *options]) == 1


def test_a_condition_that_training_always_had_is_demanded(run, tmp_path, capsys):
    assert main(["sample", str(run), f"--out={tmp_path / 'x.npy'}", "--steps=2"]) == 1
    assert "condition number is missing" in capsys.readouterr().err


def test_values_of_each_kind_of_file(tmp_path):
    low = torch.arange(32.0).view(2, 1, 4, 4) / 32
    write_weights(tmp_path / "both.safetensors", {"low": low, "number": torch.ones(2, 2)})
    Image.fromarray(np.array([[255, 0, 0, 0]] * 4, np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "bytes.npy", np.full((1, 4, 4), 255, np.uint8)[None])
    path = str(tmp_path / "both.safetensors")
    found = values({"low": path, "number": path})
    assert torch.equal(found["low"], low)
    assert torch.equal(found["number"], torch.ones(2, 2))
    image = values({"low": str(tmp_path / "a.png")})["low"]
    assert image[0, 0, 2].tolist() == [1, -1, -1, -1]
    assert values({"low": str(tmp_path / "bytes.npy")})["low"].unique() == 1
    assert values({"number": "0.5,-1"})["number"].tolist() == [[0.5, -1]]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("depth", "1", "--condition.depth was given, but the network has low, number"),
        ("number", "1", "has 1 numbers, expected those of a value of shape"),
        ("number", "dark", "expected an .npy or .safetensors file, an image, or numbers"),
        ("number", "missing.npy", "names no .npy file"),
        ("number", "a.png", "pass an .npy file"),
        ("low", "range.npy", r"in \[0, 2\], expected within the range \[-1, 1\]"),
        ("low", "shape.npy", r"low of shape \(1, 1, 3, 3\), expected .* \(1, 4, 4\)"),
    ],
)
def test_values_are_checked(tmp_path, monkeypatch, name, value, message):
    monkeypatch.chdir(tmp_path)
    low = np.zeros((1, 1, 4, 4), np.float32)
    low[0, 0, 0, 0] = 2
    np.save("range.npy", low)
    np.save("shape.npy", low[:, :, :3, :3])
    with pytest.raises(ValueError, match=message):
        values({name: value})


def test_conditions_of_several_values_have_equally_many(tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((2, 1, 4, 4), np.float32))
    np.save(tmp_path / "three.npy", np.zeros((3, 2), np.float32))
    files = {"low": str(tmp_path / "two.npy"), "number": str(tmp_path / "three.npy")}
    with pytest.raises(ValueError, match="expected equally many, or one for all"):
        values(files)
