"""Every public function that takes a path takes a string too."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

from diffcore.core.process import Process
from diffcore.integrations.diffusers.loading.folder import read_folder, sampling_defaults
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.loading.prompts import Prompts
from diffcore.io.files import verify_folder, write_folder
from diffcore.io.plain_data import read_json
from diffcore.io.safetensors import read_weights, write_weights
from diffcore.run import Run
from diffcore.sampling.files import FolderWriter
from diffcore.sampling.images import load_image, save_image, to_image
from diffcore.training.averages.power_ema import find_snapshots, reconstruct, write_snapshot
from diffcore.training.checkpoints import checkpoint
from diffcore.training.data.cache import Cache
from diffcore.training.data.captions import read_captions
from diffcore.training.reports.metrics import Metrics
from tests.helpers.training_runs import make_trainer
from tests.test_public_names import modules


def callables() -> Iterator[tuple[str, Callable]]:
    """Every public function, class and method, once, where it is defined."""
    for name in modules():
        module = importlib.import_module(name)
        for attribute in getattr(module, "__all__", ()):
            value = getattr(module, attribute)
            if getattr(value, "__module__", None) != name or not callable(value):
                continue
            yield f"{name}.{attribute}", value
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{attribute}.{method}", function


def paths_alone() -> dict[str, Callable]:
    """The callables with a parameter that is a Path by its annotation, and not a string."""
    found = {}
    for name, value in callables():
        try:
            parameters = inspect.signature(value).parameters.values()
        except (TypeError, ValueError):
            continue
        for annotation in (inspect.formatannotation(each.annotation) for each in parameters):
            if "Path" in annotation and "str" not in annotation and "Callable" not in annotation:
                found[name] = value
    return found


def test_parameters_that_are_paths_may_be_strings():
    """A record converts the string: its attribute is always a Path."""
    functions = {name for name, value in paths_alone().items() if not is_dataclass(value)}
    assert functions == set()
    records = {name.rpartition(".")[2] for name in paths_alone()}
    assert records == {"FolderWriter", "PipelineIndex", "Run", "Trainer"}


def test_records_convert_a_string_to_a_path(trained):
    pipeline = str(trained / "pipeline")
    assert make_trainer(str(trained)).folder == Run(str(trained)).folder == trained
    assert FolderWriter(str(trained), Process(), "", {}).folder == trained
    assert PipelineIndex(pipeline).folder == Path(pipeline)


def test_files_are_written_and_read_by_strings(tmp_path):
    folder, path = str(tmp_path), str(tmp_path / "file")
    process = Process(shape=(1, 8, 8))
    process.save(path)
    assert Process.load(path) == process
    prompts = Prompts({"states": torch.zeros(2, 3)}, ("a cat",))
    prompts.save(path)
    assert Prompts.load(path).texts == prompts.texts
    write_weights(path, {"a": torch.ones(1)})
    assert read_weights(path)["a"] == 1
    save_image(to_image(torch.zeros(8, 8, 1).byte().numpy()), path)
    assert load_image(path, process).shape == (1, 8, 8)
    write_snapshot(folder, 0.1, 3, {"a": torch.ones(1)})
    assert reconstruct([str(each) for each in find_snapshots(folder)], 0.1)[0]["a"] == 1
    Metrics(str(tmp_path / "metrics.jsonl")).write({"step": 1})
    assert Cache(folder).shards
    assert read_captions(folder, []) == []


def test_folders_are_written_and_read_by_strings(trained, tmp_path):
    folder = str(tmp_path / "folder")
    write_folder(folder, Path.mkdir)
    verify_folder(folder)
    state = {"step": 3}
    checkpoint.write(str(tmp_path / "step-00000003"), checkpoint.Checkpoint({}, state))
    assert checkpoint.read(str(tmp_path / "step-00000003")).state == state
    checkpoint.set_aside(str(tmp_path), 3)
    checkpoint.prune(str(tmp_path), 1)
    assert checkpoint.newest(str(tmp_path), pytest.fail).state == state
    pipeline = str(trained / "pipeline")
    assert read_folder(pipeline).process_fields["classes"] == 10
    assert sampling_defaults(pipeline)["sample_steps"] == 25
    assert read_json(f"{pipeline}/model_index.json")
