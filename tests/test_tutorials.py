"""Tutorials, how-to pages and concepts: programs and commands run in the order of their page."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diffcore.cli.main import main
from tests.helpers.image_folders import write

ROOT = Path(__file__).parents[1]
FOLDERS = ("tutorials", "how-to", "concepts")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / "docs" / folder).glob("*.md"))]
FENCE = re.compile(
    r'^``` ?(?:(?P<language>[a-z]+)|\{\.python title="(?P<file>[\w.]+)"\})\n(?P<text>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)
NOT_RUN = ("pip install ", "diffcore doctor ")
"""Beginnings of commands that other tests cover, or that need the network."""
TINY = "--batch_size 4 --trackers [] --log_every 1 --sample_every 0 --save_every 2 --workers 0"
SMALL_NETWORK = (
    "--network.init_args.block_out_channels=[16,16] --network.init_args.attention_head_dim=8"
)
TINY_OPTIONS = {
    "digits": f"{TINY} {SMALL_NETWORK}",
    "images": f"{TINY} --data.size 8 --network.layers_per_block 1 --network.attention_head_dim 16",
    "images-small": TINY,
    "finetune": TINY,
}
"""Name of a recipe -> options that make a training take a moment."""


class Block(NamedTuple):
    """A fenced block of a page.

    Args:
        language: language of the block; python for a program with a file name.
        file: name of the file that the reader saves it as, or "".
        text: content, with included files in place of their names.
    """

    language: str
    file: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    for fence in FENCE.finditer(page.read_text("utf-8")):
        text = re.sub(r'^--8<-- "(.*)"$', included, fence["text"], flags=re.MULTILINE)
        yield Block(fence["language"] or "python", fence["file"] or "", text)


def included(line: re.Match) -> str:
    return (ROOT / line[1]).read_text("utf-8")


def run_command(line: str) -> None:
    """Run a line of a console block; a training is made tiny by options at its end."""
    words = shlex.split(line)
    if line.startswith(NOT_RUN):
        return
    if words[0] == "python":
        run_program(words[1], [*words[1:2], *(["3"] if len(words) > 2 else words[2:])])
        return
    assert words[0] == "diffcore", line
    try:
        status = main([*words[1:], *tiny_options(words)])
    except SystemExit as ended:  # --print_config
        status = ended.code
    assert status == 0, line


def tiny_options(words: list[str]) -> list[str]:
    if words[1] == "evaluate":
        return shlex.split("--n 70 --steps 1 --force --out scores")
    if words[1] == "distil":
        return shlex.split(f"{TINY} --training-steps 2")
    if words[1] != "train" or words[2] not in TINY_OPTIONS:
        return []
    steps = [] if "--steps" in words else ["--steps", "2"]
    batch = TINY_OPTIONS[words[2]]
    if "--accumulation" in words or "--batch-size" in words:
        batch = batch.replace("--batch_size 4 ", "")
    return [*steps, *shlex.split(batch)]


def run_program(file: str, arguments: list[str]) -> None:
    before, sys.argv = sys.argv, arguments
    try:
        runpy.run_path(file, run_name="__main__")
    finally:
        sys.argv = before


def parameter(page: Path) -> Any:
    """A page as a parameter of a test, which is slow if it trains."""
    text = page.read_text("utf-8")
    marks = [pytest.mark.slow] if "\ndiffcore train " in text or "_loop.py" in text else []
    return pytest.param(page, id=f"{page.parent.name}/{page.stem}", marks=marks)


@pytest.mark.parametrize("page", list(map(parameter, PAGES)))
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_everything_on_the_page_runs_in_its_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("cats", "dogs"):
        for index in range(3):
            write(tmp_path / "photos" / kind / f"{index}.jpg", mode="RGB", size=(20, 16))
    names: dict = {}
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        elif block.language == "console":
            for line in block.text.splitlines():
                run_command(line)


@pytest.mark.slow
def test_lightning_trains_with_the_objective(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    run_program(str(ROOT / "docs/examples/lightning_loop.py"), ["lightning_loop.py", "2"])
