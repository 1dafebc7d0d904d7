"""README and docs: every Python block runs, and every `diffcore` line does, on a tiny run."""

import re
import shlex
from pathlib import Path

import pytest

from diffcore.cli.main import main
from tests.helpers.image_folders import write

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TINY = (
    "--steps 1 --batch_size 4 --trackers [] --save_every 1 --log_every 1 "
    "--network.init_args.block_out_channels=[16,16] "
    "--network.init_args.attention_head_dim=8"
)


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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
    (block,) = blocks(ROOT / "docs/training-data.md", "sh")
    words = shlex.split(block)[1:]
    tiny = "--data.size 16 --network.layers_per_block 1 --network.block_out_channels [32,32,32]"
    rest = "--steps 1 --batch_size 3 --trackers [] --workers 0 --sample-every 0"
    assert main([*words, *shlex.split(f"{tiny} {rest}")]) == 0, capfd.readouterr().err
    assert (tmp_path / "runs/images/pipeline").is_dir()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [
        link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link
    ]
    assert [link for link in targets if not (page.parent / link).exists()] == []
