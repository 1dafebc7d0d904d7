"""README and docs: every Python block runs, and every `diffcore` line does, on a tiny run."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffcore.cli.main import main
from tests.helpers.image_folders import write

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LONG_PAGES = [page for page in PAGES if page.parent.name not in ("tutorials", "how-to", "concepts")]
"""Pages whose commands are no sequence; those of all others run in tests/test_tutorials.py."""
TINY = (
    "--steps 1 --batch_size 4 --trackers [] --save_every 1 --log_every 1 "
    "--network.init_args.block_out_channels=[16,16] "
    "--network.init_args.attention_head_dim=8"
)


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("page", LONG_PAGES, ids=lambda page: page.name)
def test_python_examples_run(page):
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_the_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(ROOT / "README.md", "console") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("diffcore ")]
    assert [words[0] for words in commands] == ["train", "sample", "plot", "info", "export"]
    for words in commands:
        assert main([*words, *(shlex.split(TINY) if words[0] == "train" else [])]) == 0, (
            capfd.readouterr().err
        )
    assert {"grid.png", "schedules.png", "runs", "mine"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_command_that_trains_on_images_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("ant", "bee", "cat"):
        write(tmp_path / "images" / name / "1.jpg", mode="RGB", size=(40, 30))
    block, *_ = blocks(ROOT / "docs/training-data.md", "sh")
    words = shlex.split(block)[1:]
    tiny = "--data.size 16 --network.layers_per_block 1 --network.attention_head_dim 16"
    rest = "--steps 1 --batch_size 3 --trackers [] --workers 0 --sample-every 0"
    assert main([*words, *shlex.split(f"{tiny} {rest}")]) == 0, capfd.readouterr().err
    assert (tmp_path / "runs/images/pipeline").is_dir()


def test_the_commands_that_train_on_arrays_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    np.save("train.npy", images.numpy())
    np.save("labels.npy", labels.numpy())
    (tmp_path / "shards").mkdir()
    save_file({"x0": images, "label": labels}, "shards/train-0.safetensors")
    (block,) = (
        text for text in blocks(ROOT / "docs/training-data.md", "sh") if "--data Arrays" in text
    )
    for line in block.strip().splitlines():
        words = [*shlex.split(line)[1:], *shlex.split(TINY), "--folder", f"runs/{len(line)}"]
        assert main(words) == 0, capfd.readouterr().err


OWN = ROOT / "docs/own-network-and-data.md"


@pytest.fixture
def own_classes(tmp_path, monkeypatch):
    """The current folder with the module and the settings of the page on own classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(blocks(OWN, "python")[0])
    (tmp_path / "mine.yaml").write_text(blocks(OWN, "yaml")[0])
    yield tmp_path
    sys.modules.pop("mine", None)


def test_the_commands_with_an_own_network_and_own_data_run(own_classes, capfd):
    (block,) = blocks(OWN, "sh")
    for words in map(shlex.split, block.splitlines()):
        assert main(words[1:]) == 0, capfd.readouterr().err
    assert (own_classes / "mine.png").is_file()


@pytest.mark.parametrize(
    ("message", "old", "new", "words"),
    [
        ("importing 'mine.MyNetwork' is not allowed", "", "", ()),
        ("no module is named 'mine'", "", "", ("--trust", "mine", "gone")),
        ("item 0 of the data is torch.float32 of shape (3, 8, 8)", "(1, self", "(3, self", None),
        ("item 0 of the data lies in [0, 255]", "0.5 if label else -0.5", "LOW", None),
        ("item 0 of the data has label 2, expected 0 .. 1", "index % 2", "index % 2 + 2", None),
        (
            "the network cannot be evaluated for x of shape (2, 1, 8, 8)",
            "= 1, width",
            "= 2, width",
            None,
        ),
    ],
)
def test_the_common_errors_are_those_of_the_page(own_classes, capfd, message, old, new, words):
    assert message in OWN.read_text()
    module = own_classes / "mine.py"
    text = module.read_text().replace(old, new) if old else module.read_text()
    if new == "LOW":
        text = text.replace("torch.full((1, self.size, self.size), LOW)", RAMP)
    module.write_text(text)
    if words and "gone" in words:
        module.unlink()
    options = ["--trust", "mine"] if words is None else list(words[:2])
    printed = ""
    try:
        assert main(["train", "mine.yaml", *options]) == 1
    except SystemExit:  # of the parser, for an untrusted module
        pass
    except ValueError as error:  # it passed through the module, and keeps its traceback
        printed = str(error)
    assert message in printed + capfd.readouterr().err


RAMP = "torch.arange(64.0).view(1, 8, 8) * 255 / 63"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [
        link
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in link
    ]
    assert [link for link in targets if not (page.parent / link).exists()] == []
