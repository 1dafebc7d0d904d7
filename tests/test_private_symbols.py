"""Private symbols of other packages: each still exists, and pyproject.toml bounds its package."""

import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYMBOLS = [
    # (dotted path, module that uses it, upper bound in pyproject.toml)
    (
        "jsonargparse._typehints.discard_init_args_on_class_path_change",
        "diffcore/io/parser.py",
        "jsonargparse<4.54",
    ),
    *(
        (f"jsonargparse.{path}", "diffcore/io/trust.py", "jsonargparse<4.54")
        for path in (
            "_actions.import_object",
            "_stubs_resolver.StubsResolver",
            "_stubs_resolver.stubs_resolver",
            "_common.ImportDenied",
            "_typehints.NestedArg",
            "_typehints.adapt_typehints",
            "_typehints.callable_origin_types",
            "_typehints.get_callable_return_type",
            "_typehints.get_subclass_types",
            "_typehints.get_typehint_origin",
            "_typehints.import_object",
            "_typehints.is_protocol",
            "_util.canonical_import_paths",
            "_util.import_object",
        )
    ),
    (
        "jsonargparse._actions._ActionHelpClassPath._help_types",
        "diffcore/io/parser.py",
        "jsonargparse<4.54",
    ),
    (
        "jsonargparse.DefaultHelpFormatter._expand_help",
        "diffcore/io/parser.py",
        "jsonargparse<4.54",
    ),
    (
        "accelerate.state.AcceleratorState._reset_state",
        "diffcore/training/ranks/accelerator.py",
        "accelerate<2",
    ),
    (
        "accelerate.state.AcceleratorState._shared_state",
        "diffcore/training/ranks/accelerator.py",
        "accelerate<2",
    ),
    (
        "torch.utils._pytree.tree_map",
        "diffcore/integrations/diffusers/guidance/pipeline_denoiser.py",
        "torch<3",
    ),
    ("torch.nn.Module._compiled_call_impl", "guidance/perturbation.py", "torch<3"),
    *(
        (f"diffusers.{path}", f"diffcore/integrations/diffusers/{user}", "diffusers<0.43")
        for path, user in (
            ("guiders.guider_utils.BaseGuidance._enabled", "guidance/guider.py"),
            ("guiders.guider_utils.BaseGuidance._input_predictions", "guidance/guider.py"),
            ("guiders.guider_utils.BaseGuidance._prepare_batch", "guidance/guider.py"),
            (
                "guiders.guider_utils.BaseGuidance._prepare_batch_from_block_state",
                "guidance/guider.py",
            ),
            (
                "modular_pipelines.modular_pipeline_utils.ComponentSpec._diffusers_load_id",
                "guidance/guider.py",
            ),
            ("DiffusionPipeline._execution_device", "families/text_conditions.py"),
            ("DiffusionPipeline._execution_device", "pipeline/pipeline.py"),
            ("DiffusionPipeline._optional_components", "pipeline/pipeline.py"),
            ("PNDMScheduler._timesteps", "scheduler/scheduler_grid.py"),
            ("SchedulerMixin._compatibles", "scheduler/scheduler.py"),
        )
    ),
]


def exists(path):
    """Whether a dotted path leads to an object, or its last name to an attribute of instances."""
    owner, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    return hasattr(owner, name) or name in inspect.getsource(owner)


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    return [*project["dependencies"], *(item for extra in optional for item in extra)]


@pytest.mark.parametrize(
    ("path", "user", "bound"), SYMBOLS, ids=[f"{path} in {user}" for path, user, _ in SYMBOLS]
)
def test_a_private_symbol_exists_and_its_package_is_bounded(path, user, bound):
    assert exists(path)
    assert path.rpartition(".")[2] in (ROOT / user).read_text()
    package, version = re.fullmatch(r"([\w-]+)(<[\d.]+)", bound).groups()
    found = [text for text in requirements() if re.match(rf"{package}\b", text)]
    assert found
    assert all(text.endswith(version) for text in found)
