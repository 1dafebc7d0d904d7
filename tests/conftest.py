"""What several test files share: one tiny run of the command line, and a clean accelerate after
each test.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from diffcore.cli.main import main
from diffcore.io.extras import EXTRAS, has_extra

ROOT = Path(__file__).parents[1]
TINY = (
    "--network.init_args.block_out_channels=[8,8]",
    "--network.init_args.norm_num_groups=4",
    "--network.init_args.attention_head_dim=8",
    "--batch-size=8",
    "--sample-every=0",
    "--trackers=[]",
)

ABSENT = [
    package
    for package, extra in EXTRAS.items()
    if extra not in ("optimizers", "ui") and not has_extra(package)
]
"""Optional dependencies that are not installed: in the environment `core` of CI, all of them.

Tests of optional optimizers and of the page of the playground are skipped one by one.
"""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the test modules that import a package that is not installed, or whose
    fixtures do.
    """
    if not ABSENT or collection_path.suffix != ".py" or collection_path.parent == ROOT / "tests":
        return None
    imported = rf"^\s*(from|import) ({'|'.join(ABSENT)})\b"
    needed = (
        rf"{imported}|diffcore\.integrations\.diffusers|\b(digits|Digits|trained|tiny|unet)\b"
        r"|tests\.helpers\.(captioned_images|diffusers_schedulers|finetune_runs|text_networks"
        r"|tiny_pipelines|training_runs)"
    )
    if {"integrations", "scripts"} & set(collection_path.relative_to(ROOT).parts):
        return True
    return bool(re.search(needed, collection_path.read_text(), re.MULTILINE)) or None


def forget_accelerate() -> None:
    """accelerate keeps one state a process: without this a second trainer would get the first one's
    precision.
    """
    if "accelerate" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def _clean_accelerate():
    yield
    forget_accelerate()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """A write is not waited for: no test sees what a disk holds after a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


@pytest.fixture
def one_thread():
    """Bits depend on the number of threads, and on arrays this small two cost more than
    they bring.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options that shrink the recipe `digits`."""
    return TINY


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two checkpoints; not to be changed, copy it."""
    import torch

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert (
        main(
            [
                "train",
                "digits",
                *TINY,
                f"--folder={folder}",
                "--steps=4",
                "--save-every=2",
                "--log-every=1",
            ]
        )
        == 0
    )
    torch.set_num_threads(before)
    forget_accelerate()
    return folder


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def diffcore(capsys, tmp_path, monkeypatch) -> Callable[..., Ended]:
    """Run a command in this process, in an empty current folder."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*argv: object) -> Ended:
        capsys.readouterr()
        try:
            status = main([str(word) for word in argv])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return Ended(status, *capsys.readouterr())

    return run
