"""The scheduler classes of the installed diffusers, and their configs as diffusers writes them."""

import importlib
import inspect
import json
import pkgutil
import sys
from types import ModuleType
from unittest.mock import patch

from diffusers import ConfigMixin, schedulers


def scheduler_classes() -> dict[str, type]:
    """All scheduler classes by name, including those that need torchsde to sample."""
    classes: dict[str, type] = {}
    torchsde = sys.modules.get("torchsde", ModuleType("torchsde"))
    with patch.dict(sys.modules, torchsde=torchsde):
        for entry in pkgutil.walk_packages(schedulers.__path__, f"{schedulers.__name__}."):
            for name, value in vars(importlib.import_module(entry.name)).items():
                is_scheduler = inspect.isclass(value) and issubclass(value, ConfigMixin)
                if is_scheduler and value.__module__ == entry.name:
                    classes[name] = value
    return classes


CLASSES = scheduler_classes()


def config(scheduler: ConfigMixin) -> dict:
    """The content of scheduler_config.json."""
    return json.loads(scheduler.to_json_string())
