"""Points, signals, volumes and video from the command line: the recipes, pictures and files."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffcore.cli.main import main
from diffcore.cli.training.recipes import find_settings
from diffcore.io.safetensors import read_weights
from tests.conftest import forget_accelerate

pytestmark = pytest.mark.usefixtures("one_thread")
volumes, video = (pytest.param(name, marks=pytest.mark.slow) for name in ("volumes", "video"))
further_video = pytest.param("video", marks=pytest.mark.thorough)
"""Their networks are those of each other; the signals stand for both in the fast tests."""

QUICK = (
    "--steps=2",
    "--batch-size=2",
    "--save-every=2",
    "--log-every=1",
    "--sample-steps=2",
    "--trackers=[]",
)
SMALL = {
    "points": ("--network.width=8", "--network.layers=1", "--data.count=50"),
    "signals": ("--network.block_out_channels=[8,8,8]", "--data.count=50"),
    "volumes": ("--network.widths=[4,4]", "--network.groups=2", "--data.count=50"),
    "video": ("--network.widths=[4,4]", "--network.groups=2", "--data.count=50"),
}
SHAPES = {"points": (2,), "signals": (1, 64), "volumes": (1, 12, 12, 12), "video": (1, 8, 16, 16)}


@pytest.fixture(scope="session")
def points_run(tmp_path_factory):
    """A run of the recipe `points`; not to be changed, copy it."""
    folder = tmp_path_factory.mktemp("runs") / "points"
    words = ["train", "points", *QUICK, *SMALL["points"], f"--folder={folder}", "--sample-every=1"]
    assert main(words) == 0
    forget_accelerate()
    return folder


@pytest.mark.parametrize("recipe", ["signals", volumes, video])
def test_a_recipe_trains_draws_previews_and_samples_pictures_and_arrays(diffcore, recipe):
    options = (*QUICK, *SMALL[recipe], "--folder=run", "--sample-every=2")
    ended = diffcore("train", recipe, *options)
    assert ended.status == 0, ended.err
    with Image.open("run/samples/step-00000002.png") as preview:
        assert preview.width > 100
    ended = diffcore("sample", "run", "--per-label=3", "--out=x.png", "--arrays=x.npy")
    assert ended.status == 0, ended.err
    assert np.load("x.npy").shape == (3, *SHAPES[recipe])
    ended = diffcore("sample", "run", "--per-label=3", "--out=x.gif")
    if recipe == "signals":
        assert ended.status == 1
        assert "(1, 64) have no frames for an animation" in ended.err
    else:
        with Image.open("x.gif") as animation:
            assert animation.n_frames == SHAPES[recipe][1]


def test_points_are_sampled_by_label_into_a_picture_with_arrays_or_a_folder(diffcore, points_run):
    quick = ("--labels=0,1", "--per-label=5", "--steps=2")
    ended = diffcore("sample", points_run, *quick, "--out=x.png", "--arrays=x.safetensors")
    assert ended.status == 0, ended.err
    written = read_weights(Path("x.safetensors"))
    assert written["x"].shape == (10, 2)
    assert written["label"].tolist() == [0] * 5 + [1] * 5
    assert diffcore("sample", points_run, *quick, "--out=folder").status == 0
    for key in range(10):
        x = np.load(f"folder/label-{key // 5}-seed-{key}.npy")
        assert np.allclose(x, written["x"][key], atol=1e-6)
    assert "10 existed, 0 samples" in diffcore("sample", points_run, *quick, "--out=folder").out


def test_the_option_picture_of_a_run_is_the_default_of_sample(diffcore, points_run):
    shutil.copytree(points_run, "run")
    text = Path("run/config.yaml").read_text(encoding="utf-8")
    assert "picture: auto" in text
    Path("run/config.yaml").write_text(text.replace("picture: auto", "picture: lines"))
    sizes = []
    for option in ((), ("--picture=lines",), ("--picture=points",)):
        assert diffcore("sample", "run", "--steps=2", "--out=x.png", *option).status == 0
        with Image.open("x.png") as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1] != sizes[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out=x.png", "--picture=frames"], "expected points or lines, or auto"),
        (["--out=x.npy", "--arrays=y.npy"], "beside x.npy, which is no picture: leave arrays out"),
        (["--out=x.png", "--arrays=y.txt"], "arrays is y.txt, expected a file of suffix"),
        (["--out=x.png", "--image=x.png"], "not images of 1 or 3 channels"),
    ],
)
def test_what_does_not_fit_points_is_refused_in_one_line(diffcore, points_run, options, message):
    ended = diffcore("sample", points_run, "--steps=2", *options)
    assert ended.status == 1
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not any(Path().iterdir())


def test_info_report_doctor_and_export_know_a_run_on_points(diffcore, points_run):
    assert "shape (2,), range [-inf, inf]" in diffcore("info", points_run).out
    ended = diffcore("report", points_run, "--out=report.html")
    assert ended.status == 0, ended.err
    assert Path("report.html").read_text().count("data:image/png") == 2
    ended = diffcore("doctor", points_run, "--count=20")
    assert "Denoising error on 20" in ended.out, ended.err
    ended = diffcore("export", points_run, "--out=pipeline")
    assert ended.status == 1
    assert "Perceptron" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


@pytest.mark.parametrize("recipe", ["points", "signals", volumes, further_video])
def test_the_doctor_finds_nothing_wrong_with_a_recipe(diffcore, recipe):
    ended = diffcore("doctor", recipe, "--quick", "--folder=run")
    assert ended.status == 0, ended.out
    assert " 0 warnings, 0 wrong" in ended.out


def test_latents_train_from_a_file_and_are_drawn_channel_by_channel(diffcore):
    rng = np.random.default_rng(0)
    np.save("latents.npy", rng.normal(size=(8, 4, 8, 8)).astype(np.float32))
    small = ("--network.block_out_channels=[16,32]", "--network.attention_head_dim=8")
    ended = diffcore("train", "latents", *QUICK, *small, "--folder=run", "--sample-every=2")
    assert ended.status == 0, ended.err
    with Image.open("run/samples/step-00000002.png") as preview:
        assert preview.width < 4 * 48  # a row: four channels of one sample
    assert diffcore("sample", "run", "--per-label=2", "--out=x.npy", "--steps=2").status == 0
    assert np.load("x.npy").shape == (2, 4, 8, 8)


@pytest.mark.parametrize("recipe", ["points", "signals", volumes, further_video])
def test_the_comment_of_a_recipe_trains_on_a_file_of_arrays(diffcore, recipe):
    text = find_settings(recipe).read_text(encoding="utf-8")
    command = re.search(r"#     diffcore (train .*(?:\n#         .*)*)", text)[1]
    words = [word.replace("[n]", "[2]") for word in shlex.split(command.replace("#", ""))]
    path = words[words.index("--data.path") + 1]
    np.save(path, np.zeros((8, *SHAPES[recipe]), np.float32))
    small = [option for option in SMALL[recipe] if "data" not in option]
    ended = diffcore(*words, *QUICK, *small, "--folder=run", "--sample-every=0")
    assert ended.status == 0, ended.err
