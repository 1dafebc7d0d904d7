"""The recipes of images: what `images` reads from a folder, what is refused, and CIFAR-10."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from diffcore.cli.image_settings import NETWORKS, are_incomplete, complete_settings
from tests.helpers.image_folders import write

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"data": {"class_path": "ImageFolder", "init_args": {"size": 0}}}


def completed(folder: Path, **given) -> dict:
    """The settings that a folder completes; `given` are names with __ for a dot."""
    options = {name.replace("__", "."): value for name, value in given.items()}
    return complete_settings(
        SETTINGS, {"data": "ImageFolder", "data.folder": str(folder)} | options
    )


def chosen(folder: Path, **given) -> tuple:
    """Shape, classes, dropout, and null label plus one of the network."""
    settings = completed(folder, **given)
    process, network = settings["process"], settings["network"]["init_args"]
    assert network["in_channels"] == network["out_channels"] == process["shape"][0]
    assert network["sample_size"] == process["shape"][1] == process["shape"][2]
    assert settings["data"]["init_args"]["size"] == network["sample_size"]
    return (
        tuple(process["shape"]),
        process["classes"],
        process["dropout"],
        network["num_class_embeds"],
    )


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "channels"),
    [
        ("L", 7, "png", 1),
        ("1", 1, "png", 1),
        ("LA", (7, 9), "png", 1),
        ("I;16", 700, "png", 1),
        ("RGB", (1, 2, 3), "png", 3),
        ("RGBA", (1, 2, 3, 4), "png", 3),
        ("P", 1, "png", 3),
        ("CMYK", (1, 2, 3, 4), "jpg", 3),
    ],
)
def test_the_channels_are_those_of_the_modes(tmp_path, mode, colour, suffix, channels):
    image = Image.new(mode, (40, 33), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 51])
    image.save(tmp_path / f"1.{suffix}")
    assert chosen(tmp_path) == ((channels, 32, 32), 0, 0.0, None)
    write(tmp_path / "2.png", (1, 2, 3), "RGB", (40, 33))
    assert chosen(tmp_path)[0] == (3, 32, 32)


@pytest.mark.parametrize("given", [True, False])
def test_a_learned_variance_doubles_the_outputs_of_the_network(tmp_path, given):
    write(tmp_path / "1.png", (1, 2, 3), "RGB", (40, 33))
    options = {"data": "ImageFolder", "data.folder": str(tmp_path)}
    record = {} if given else {"process": {"variance": "learned"}}
    options |= {"process.variance": "learned"} if given else {}
    network = complete_settings(SETTINGS | record, options)["network"]["init_args"]
    assert (network["in_channels"], network["out_channels"]) == (3, 6)


def test_arguments_of_a_recipe_replace_those_of_the_network_that_the_folder_defines(
    tmp_path, capsys
):
    for kind in ("a", "b"):
        write(tmp_path / kind / "1.png", (1, 2, 3), "RGB", (40, 33))
    small = {"block_out_channels": [16, 32], "layers_per_block": 1}
    settings = SETTINGS | {"network": {"init_args": small}, "batch_size": 8}
    assert are_incomplete(settings)
    assert not are_incomplete(settings | {"network": {"class_path": "mine.Network"}})
    given = {"data": "ImageFolder", "data.folder": str(tmp_path), "data.size": 32}
    found = complete_settings(settings, given)
    network = found["network"]["init_args"]
    assert network | small == network
    assert network["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]
    assert (network["num_class_embeds"], found["batch_size"]) == (3, 8)
    assert "batch size 8, UNet2DModel of channels [16, 32]" in capsys.readouterr().err
    complete_settings(settings, given | {"batch-size": 4})
    assert "batch size 4," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("1.png",), 0),
        (("1.png", "2.png"), 0),
        (("only/1.png",), 1),
        (("a/1.png", "b/2.png", "b/3.png"), 2),
        (("a/x/1.png", "a/y/2.png", "b/z/w/3.png"), 2),
    ],
)
def test_the_classes_are_the_sub_folders(tmp_path, names, classes):
    for name in names:
        write(tmp_path / name)
    expected = ((1, 8, 8), classes, 0.1, classes + 1) if classes else ((1, 8, 8), 0, 0.0, None)
    assert chosen(tmp_path) == expected
    guidance = completed(tmp_path)["guidance"]["init_args"]["scale"]
    assert guidance == (1.5 if classes else 1.0)
    assert chosen(tmp_path, process__classes=0) == ((1, 8, 8), 0, 0.0, None)


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ([(3, 5)], 8),  # smaller than every size: enlarged
        ([(20, 90)], 16),
        ([(32, 32)], 32),
        ([(63, 63), (63, 64), (300, 200)], 32),
        ([(64, 70), (65, 64), (10, 10)], 64),
        ([(1000, 300)], 256),
    ],
)
def test_the_size_is_at_most_the_median_shorter_side(tmp_path, sizes, size):
    for number, pixels in enumerate(sizes):
        write(tmp_path / f"{number}.png", size=pixels)
    assert chosen(tmp_path)[0] == (1, size, size)
    settings = completed(tmp_path)
    assert settings["batch_size"] == NETWORKS[size][1]
    schedule = settings["process"]["schedule"]
    if size > 64:
        assert schedule["init_args"]["shift"] == pytest.approx(-2.7726, abs=1e-4)  # 2 ln(64/256)
    else:
        assert schedule == "Cosine"


def test_the_deviation_is_that_of_the_images(tmp_path):
    write(tmp_path / "1.png", 0)
    write(tmp_path / "2.png", 255)
    assert completed(tmp_path)["process"]["sigma_data"] == 1.0  # half at -1, half at 1
    (tmp_path / "2.png").unlink()
    assert completed(tmp_path)["process"]["sigma_data"] == 0.01  # one colour: at least 0.01


def test_a_size_that_the_network_cannot_halve_is_refused_with_one_that_it_can(tmp_path):
    write(tmp_path / "1.png", size=(100, 100))
    with pytest.raises(ValueError, match=r"data.size is 100, .* a multiple of 8, such as 96, or"):
        completed(tmp_path, data__size=100)
    assert chosen(tmp_path, data__size=96)[0] == (1, 96, 96)
    assert "network" not in completed(tmp_path, data__size=100, network="mine.Network")


def test_the_networks_have_the_declared_sizes():
    """Each level halves the size, and the last one is 4 or 8 pixels wide."""
    for size, (widths, _) in NETWORKS.items():
        assert size >> (len(widths) - 1) in (4, 8)


def printed(diffcore, *words) -> dict:
    ended = diffcore("train", "images", *words, "--print_config")
    assert ended.status == 0, ended.err
    return yaml.safe_load(ended.out)


def test_every_chosen_setting_is_printed_and_can_be_overridden(diffcore):
    for name in ("a/1.png", "b/2.png"):
        write(Path("photos") / name, (9, 8, 7), "RGB", (40, 33))
    settings = printed(diffcore, "--data.folder=photos")
    assert settings["process"]["shape"] == [3, 32, 32]
    assert settings["data"]["init_args"]["folder"] == "photos"
    assert settings["network"]["init_args"]["num_class_embeds"] == 3
    other = printed(
        diffcore,
        "--data.init_args.folder",
        "photos",
        "--data.size=16",
        "--data.channels",
        "L",
        "--process.classes=0",
        "--process.sigma-data=0.3",
        "--batch-size=4",
        "--network.layers_per_block=1",
    )
    network = other["network"]["init_args"]
    assert other["process"]["shape"] == [1, 16, 16]
    assert (other["process"]["classes"], other["process"]["dropout"]) == (0, 0.0)
    assert (other["process"]["sigma_data"], other["batch_size"]) == (0.3, 4)
    assert (network["num_class_embeds"], network["layers_per_block"]) == (None, 1)
    assert network["in_channels"] == 1


def test_a_folder_is_all_that_training_needs_and_its_run_resumes(diffcore):
    for name in ("a/1.png", "b/2.png"):
        write(Path("photos") / name, (9, 8, 7), "RGB", (20, 9))
    words = ("--steps=1", "--trackers=[]", "--workers=0", "--batch-size=2", "--sample-every=0")
    first = diffcore("train", "images", "--data.folder=photos", *words)
    assert first.status == 0, first.err
    assert "2 images, median shorter side 9 pixels: shape [3, 8, 8], 2 classes" in first.err
    again = diffcore("train", "images", "--data.folder=photos", *words, "--resume=true")
    assert again.status == 0, again.err
    config = yaml.safe_load(Path("runs/images/config.yaml").read_text())
    assert config["process"]["shape"] == [3, 8, 8]
    resumed = diffcore("train", "--config=runs/images/config.yaml", "--resume=true")
    assert resumed.status == 0, resumed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "this training reads a folder of images: name it, --data.folder FOLDER"),
        (("--data.folder=nowhere",), "nowhere is not a folder"),
        (("--data.folder=empty",), "empty holds no images"),
        (("--data.folder=photos", "--process.classes=3"), "set process.classes: 2"),
        (("--data.folder=photos", "--process.shape=[1,8,8]"), "set process.shape: [3, 8, 8]"),
        (("--data.folder=photos", "--network.in_channels=1"), "network cannot be evaluated"),
        (("--data.folder=photos", "--process.classes=0", "--process.dropout=0.1"), "dropout: 0"),
        (("--data.folder=photos", "--data.fit=exact"), "has 20 x 9 pixels, expected exactly 8"),
        (("--data.folder=photos", "--data.size=4"), "data.size is 4"),
    ],
)
def test_what_contradicts_the_folder_is_refused_before_training(diffcore, words, message):
    Path("empty").mkdir()
    for name in ("a/1.png", "b/2.png"):
        write(Path("photos") / name, (9, 8, 7), "RGB", (20, 9))
    ended = diffcore("train", "images", *words, "--trackers=[]")
    assert ended.status == 1
    assert message in ended.err
    assert not Path("runs/images/checkpoints").exists()


@pytest.mark.parametrize(
    ("recipe", "network"),
    [
        ("emoji", ["--network.block_out_channels=[16,16,16]", "--network.attention_head_dim=8"]),
        pytest.param(
            "emoji-gpu",
            ["--network.block_out_channels=[32,32,32]", "--network.attention_head_dim=8"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "cifar10",
            ["--network.block_out_channels=[16,16,16]", "--network.attention_head_dim=8"],
            marks=pytest.mark.slow,
        ),
        ("cifar10-dit", ["--network.num_layers=1", "--network.num_attention_heads=1"]),
    ],
)
def test_a_recipe_of_32_pixels_trains_on_a_folder_for_each_class(diffcore, recipe, network):
    for part in ("train", "test"):
        for label in range(9 if recipe.startswith("emoji") else 10):
            write(Path(part, f"{label}", "0.png"), (label, 2, 3), "RGB", (32, 32))
    data = ("--data.folder=train", "--validation.data.folder=test", "--workers=0", "--folder=run")
    quick = ("--steps=1", "--batch_size=2", "--sample_every=0", "--trackers=[]")
    ended = diffcore("train", recipe, *data, *quick, *network)
    assert ended.status == 0, ended.err
    assert len(Path("run/validation.jsonl").read_text().splitlines()) == 1
