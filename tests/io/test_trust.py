"""Settings name classes of a closed list; modules are trusted by name, and for one call only."""

import functools
import importlib
import inspect
import pkgutil
import sys
import typing
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

import diffcore
from diffcore.core.process import Process
from diffcore.guidance import CFG, AutoGuidance, ClassifierGuidance
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import from_spec
from diffcore.io.trust import trust
from diffcore.run import NetworkFactory, OptimizerFactory, Run

OBJECTS = [
    "torch.load",
    "torch.hub.load",
    "torch.nn.Identity",
    "torch.distributed.launcher.api.elastic_launch",
    "transformers.AutoModel.from_pretrained",
    "diffusers.DiffusionPipeline",
    "accelerate.Accelerator",
    "builtins.eval",
]
"""Callables of which each does something when it is called."""
FACTORIES = {"network", "encoder", "wrap", "build", "label_wrapper"}
"""Fields that hold a function from nothing or a network to a network: these accept a class."""


@functools.cache
def field_types() -> dict[object, set[str]]:
    """The type of every argument of every class of the package -> the arguments that have it."""
    found: dict[object, set[str]] = {}
    for info in pkgutil.walk_packages(diffcore.__path__, "diffcore."):
        if info.name == "diffcore.__main__":
            continue
        module = importlib.import_module(info.name)
        for cls in filter(inspect.isclass, vars(module).values()):
            if cls.__module__ == info.name and "__init__" in vars(cls):
                for name, kind in types_of(cls).items():
                    found.setdefault(kind, set()).add(name)
    return found


def types_of(cls: type) -> dict[str, object]:
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:  # of a class whose types are imported for type checkers only
        return {}
    return {name: kind for name, kind in hints.items() if name != "return"}


@functools.cache
def parser_of(kind: object) -> ComponentParser:
    """A parser with one argument of a type."""
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


@pytest.mark.parametrize("path", OBJECTS)
def test_no_argument_of_any_class_accepts_a_callable_of_a_library(path):
    kinds = field_types()
    assert len(kinds) > 100
    for kind, names in kinds.items():
        for value in (path, {"class_path": path, "init_args": {}}):
            try:
                parser = parser_of(kind)
                built = parser.instantiate(parser.parse_object({"value": value})).value
            except ValueError:
                continue
            is_factory = path == "torch.nn.Identity" and names <= FACTORIES
            assert is_factory or isinstance(built, (str, Path, dict, Namespace)), names


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (NetworkFactory, "diffusers.DDPMPipeline"),
        (NetworkFactory, "torch.jit.ScriptModule"),
        (NetworkFactory, "torch.nn.parallel.DistributedDataParallel"),
        (NetworkFactory, "torch.distributed.nn.api.remote_module.RemoteModule"),
        (NetworkFactory, "torch.optim.AdamW"),
        (NetworkFactory, "torch.nn.modules.module.warnings.warn"),
        (OptimizerFactory, "torch.nn.Linear"),
        (OptimizerFactory, "torch.optim.lr_scheduler.LambdaLR"),
    ],
)
def test_a_field_accepts_classes_of_its_own_type_in_a_closed_list_of_modules(kind, path):
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    with pytest.raises(ValueError, match=r"is not allowed|to be a subclass of"):
        parser.parse_object({"value": path})


def test_a_scale_that_names_a_callable_is_refused_with_the_field_and_the_remedy_in_python():
    path = "torch.distributed.launcher.api.elastic_launch"
    with pytest.raises(ValueError, match=r"^scale: ") as caught:
        from_spec(CFG, {"scale": {"class_path": path, "init_args": {"entrypoint": "x.sh"}}})
    assert "with diffcore.io.trust.trust('torch.distributed.launcher.api')" in str(caught.value)
    assert "--trust" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_network_that_a_rule_compares_with_is_not_built_from_a_file():
    with pytest.raises(ValueError, match="a network is given in Python, but 'Denoiser' was named"):
        from_spec(AutoGuidance, {"weaker": {"class_path": "Denoiser"}, "scale": 2.0})


MODULE = """
import torch
from os import system
from diffcore.schedules import Cosine

class Mine(Cosine):
    '''A schedule.'''

def classify(x, level):
    return x.flatten(1)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, time, class_labels=None):
        return self.scale * x
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "own_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "own_module"
    sys.modules.pop("own_module", None)


def test_trust_ends_with_its_block(own_module):
    spec, path = {"schedule": {"class_path": "own_module.Mine"}}, list(sys.path)
    with trust(own_module):
        assert type(from_spec(Process, spec).schedule).__name__ == "Mine"
    assert sys.path == path
    with pytest.raises(ValueError, match=r"schedule: importing 'own_module.Mine' is not allowed"):
        from_spec(Process, spec)


def test_a_trusted_module_provides_functions_but_not_those_that_it_imports(own_module):
    with trust(own_module):
        rule = from_spec(ClassifierGuidance, {"classifier": "own_module.classify"})
        assert rule.classifier.__name__ == "classify"
        with pytest.raises(ValueError, match=r"'own_module.system' is not allowed"):
            from_spec(ClassifierGuidance, {"classifier": "own_module.system"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_module.py", "is the name of a file, .*: trust 'own_module'"),
        ("./nets/own_module.py", "trust 'nets.own_module'"),
        ("nowhere_module", "no module is named 'nowhere_module': .*current folder"),
        ("nowhere.module", "no module is named 'nowhere.module'"),
    ],
)
def test_what_is_no_module_cannot_be_trusted(own_module, name, message):
    with pytest.raises(ValueError, match=message), trust(name):
        pass


def test_a_module_of_the_current_folder_is_found_for_a_configuration_in_another_folder(
    diffcore, monkeypatch
):
    Path("own_module.py").write_text(MODULE)
    options = {
        "network": "own_module.Net",
        "data": "Digits",
        "optimizer": "torch.optim.AdamW",
        "folder": str(Path("runs/own").absolute()),
        "process": {"classes": 10},
        "batch_size": 4,
        "trackers": [],
    }
    Path("elsewhere").mkdir()
    Path("elsewhere/own.yaml").write_text(yaml.safe_dump(options))
    train = ("train", "elsewhere/own.yaml", "--steps=1")
    refused = diffcore(*train)
    assert refused.status != 0
    assert "network: importing 'own_module.Net' is not allowed" in refused.err
    assert refused.err.endswith("add --trust own_module\n")
    assert diffcore(*train, "--trust=own_module").status == 0
    resumed = diffcore(
        "train", "--config=runs/own/config.yaml", "--resume=true", "--trust=own_module"
    )
    assert resumed.status == 0, resumed.err
    assert diffcore("info", "runs/own").status == 1  # trust has ended
    with trust("own_module"):
        assert type(Run(Path("runs/own")).network()).__name__ == "Net"
    sys.modules.pop("own_module")
    assert diffcore(*train, "--trust=own_module.py").err.endswith("trust 'own_module'\n")
