"""A folder that is not whole, or that holds code or pickles, is refused before it is built."""

import json
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.integrations.diffusers import DiffcorePipeline
from tests.helpers.damaged_folders import UnpicklingBomb
from tests.helpers.tiny_pipelines import PLAIN, PROCESS, unet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copy(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value != "gone"}))


def index(**changes):
    return lambda folder: edit(folder / "model_index.json", **changes)


def change_scheduler(**changes):
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **changes)


def pickled(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(UnpicklingBomb(), folder / "unet" / "diffusion_pytorch_model.bin")


def remote(folder):
    for place in (folder, folder / "unet"):
        (place / "mine.py").write_text("raise SystemExit('the code was run')")
    edit(folder / "model_index.json", unet=["mine", "Net"])


def remote_pipeline(folder):
    (folder / "mine.py").write_text("raise SystemExit('the code was run')")
    edit(folder / "model_index.json", _class_name=["mine", "Pipe"])


BROKEN = [
    (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    (lambda f: (f / "model_index.json").write_text("{"), "is not JSON"),
    (
        index(_class_name="DDPMPipeline"),
        r"holds a DDPMPipeline, expected .* by diffcore.integrations.diffusers.from_diffusers",
    ),
    (
        index(shape="gone", dropout="gone"),
        "lacks shape, dropout, and a guess would sample another model",
    ),
    (index(scheduler=["diffusers", "DDIMScheduler"]), "as scheduler, expected a DiffcoreScheduler"),
    (index(unet=[None, None]), "pass either unet or transformer"),
    (index(guidance={"class_path": "CGF"}), "did you mean"),
    (index(guidance={"class_path": "os.system", "init_args": {"command": "false"}}), "guidance"),
    (index(classes=-1), "classes is -1"),
    (index(unet=["diffusers", "loaders"]), "is no model of diffusers"),
    (
        remote,
        "names mine.Net as unet, which is no model of diffusers: code that lies beside weights is "
        "not executed",
    ),
    (remote_pipeline, "expected a DiffcorePipeline"),
    (pickled, "pickled weights are not opened, convert them first"),
    (lambda f: (f / "unet" / "config.json").unlink(), "each part needs its config and safetensors"),
    (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "each part needs its config"),
    (change_scheduler(prediction_type="velocity"), "prediction_type"),
    (
        change_scheduler(
            prediction_type="epsilon",
            schedule={
                "class_path": "ZeroTerminalSNR",
                "init_args": {"inner": {"class_path": "Discrete"}},
            },
        ),
        "pure noise",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_a_folder_that_is_not_whole_or_not_data_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        DiffcorePipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "option",
    [{"trust_remote_code": True}, {"custom_pipeline": "x"}, {"use_safetensors": False}],
    ids=str,
)
def test_options_that_run_code_or_open_pickles_are_refused(folder, option):
    with pytest.raises(
        ValueError,
        match=r"code that lies beside weights is not executed|pickled weights are not opened",
    ):
        DiffcorePipeline.from_pretrained(folder, **option)


class Net(diffusers.UNet2DModel):
    """A network of the user's own."""


def test_a_network_of_ones_own_is_imported_and_given(monkeypatch, tmp_path):
    monkeypatch.setitem(
        sys.modules, "own.nets", SimpleNamespace(Net=Net, ModelMixin=diffusers.ModelMixin)
    )
    monkeypatch.setattr(Net, "__module__", "own.nets")
    network = Net.from_config(unet().config)
    DiffcorePipeline.of(Denoiser(network, PLAIN)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import it, load it yourself and pass unet="):
        DiffcorePipeline.from_pretrained(tmp_path)
    given = Net.from_pretrained(tmp_path / "unet")
    assert DiffcorePipeline.from_pretrained(tmp_path, unet=given).unet is given


def test_a_pipeline_of_a_hub_is_loaded_from_where_it_is_downloaded_to(folder, monkeypatch):
    downloads = []
    monkeypatch.setattr(
        DiffcorePipeline,
        "download",
        classmethod(lambda cls, name, **options: downloads.append((name, options)) or str(folder)),
    )
    assert DiffcorePipeline.from_pretrained("someone/digits").process == PROCESS
    assert downloads == [("someone/digits", {"use_safetensors": True})]
