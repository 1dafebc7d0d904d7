"""diffcore: diffusion-model training and sampling.

The names below are imported when they are first used (PEP 562), so that `import diffcore` imports
no torch:

    import diffcore
    images = diffcore.sample(diffcore.Run("runs/digits").denoiser(), seeds=range(16)).x
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffcore import (
        core,
        editing,
        evaluation,
        guidance,
        integrations,
        io,
        objectives,
        samplers,
        sampling,
        schedules,
        training,
    )
    from diffcore.core.denoiser import Denoiser
    from diffcore.core.process import Process
    from diffcore.integrations.diffusers import (
        DiffcorePipeline,
        DiffcoreScheduler,
        attach,
        from_diffusers,
    )
    from diffcore.objectives.objective import Objective
    from diffcore.run import Run
    from diffcore.sampling import sample
    from diffcore.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "DiffcorePipeline",
    "DiffcoreScheduler",
    "Objective",
    "Process",
    "Run",
    "Trainer",
    "attach",
    "core",
    "editing",
    "evaluation",
    "from_diffusers",
    "guidance",
    "integrations",
    "io",
    "objectives",
    "sample",
    "samplers",
    "sampling",
    "schedules",
    "training",
]

_MODULE_OF = {
    "Denoiser": "core.denoiser",
    "DiffcorePipeline": "integrations.diffusers",
    "DiffcoreScheduler": "integrations.diffusers",
    "Objective": "objectives.objective",
    "Process": "core.process",
    "Run": "run",
    "Trainer": "training.trainer",
    "attach": "integrations.diffusers",
    "from_diffusers": "integrations.diffusers",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'diffcore' has no attribute {name!r}")
    module = import_module(f"diffcore.{_MODULE_OF.get(name, name)}")
    value = getattr(module, name) if name in _MODULE_OF else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__})
