"""Settings of a training that starts from a diffusers pipeline, which completes them."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from diffcore import schedules
from diffcore.cli.arguments import extract_option
from diffcore.cli.training.family_recipe import check_recipe, report_choice
from diffcore.io.specs import to_spec

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.loading.index import PipelineIndex

__all__ = [
    "complete_settings",
    "find_pipeline",
    "localize_pipeline",
    "make_pipelines_absolute",
    "trains_pipeline",
]

READERS = {"network": "PretrainedNetwork", "data": "LatentDataset"}
"""Setting -> class of the component that reads a pipeline's folder."""


def trains_pipeline(settings: Mapping[str, Any]) -> bool:
    """Whether settings train the network of a pipeline.

    Args:
        settings: content of a settings file.

    Returns:
        True if their network is a `PretrainedNetwork`.
    """
    return _class_name(settings.get("network")) == READERS["network"]


def localize_pipeline(words: Sequence[str]) -> list[str]:
    """Name the folder of a pipeline in place of a single checkpoint or of its id on a hub.

    Args:
        words: command-line words; `--pipeline_config` names the folder with the configs of a
            checkpoint.

    Returns:
        The words with `--pipeline FOLDER`.

    Raises:
        ValueError: the checkpoint cannot be converted, or the hub cannot be reached.
    """
    configs, others = extract_option(words, "pipeline_config", "the folder of a pipeline")
    named, rest = extract_option(others, "pipeline", "the folder of a diffusers pipeline")
    source = named[-1] if named else ""
    if not configs and not Path(source).is_file() and "/" not in source:
        return others
    from diffcore.integrations.diffusers.loading import single_file

    if Path(source).is_file():
        if not configs:
            raise ValueError(
                f"pipeline is the file {source}, whose tensors alone describe no pipeline: name a "
                "folder with configs and tokenizers of its kind, --pipeline_config FOLDER"
            )
        folder = single_file.convert_single_file(source, configs[-1])
    elif configs:
        raise ValueError(
            f"--pipeline_config is {configs[-1]}, but --pipeline is "
            f"{source or 'missing'}, expected a .safetensors file: leave --pipeline_config out"
        )
    elif single_file.is_hub_id(source):
        folder = single_file.download_pipeline(source)
    else:
        return others
    return [f"--pipeline={folder}", *rest]


def find_pipeline(settings: dict[str, Any], option: str, file: str) -> str:
    """Find the folder of the pipeline that a training starts from.

    Args:
        settings: content of the settings file.
        option: folder given as `--pipeline`, or "".
        file: name of the settings file, for messages.

    Returns:
        The folder, or "" if the training starts from no pipeline.

    Raises:
        ValueError: the training needs a pipeline and none is named, or two are.
    """
    folder = option or str(settings.get("pipeline") or "")
    readers = {name for name, cls in READERS.items() if _class_name(settings.get(name)) == cls}
    if not folder and any(not _pipeline_of(settings[name]) for name in readers):
        raise ValueError(
            "this training starts from a pipeline: name the folder of one of diffusers, "
            "--pipeline FOLDER"
        )
    named = {_pipeline_of(settings.get(name)) for name in READERS} - {""}
    read = [path for path in named if Path(path).absolute() != Path(folder).absolute()]
    if option and read:
        raise ValueError(
            f"pipeline is {folder}, but {file} reads {read.pop()}: leave --pipeline out, or begin "
            "with the recipe"
        )
    return folder


def complete_settings(
    settings: dict[str, Any],
    folder: str,
    given: Mapping[str, Any] = MappingProxyType({}),
    recipe: str = "",
) -> dict[str, Any]:
    """Fill in the settings that a training's file leaves to a pipeline: process and folder.

    A schedule that wraps another one (ZeroTerminalSNR, Shifted) and names none wraps the
    pipeline's.

    Args:
        settings: content of the settings file; it takes precedence over the pipeline.
        folder: folder of the pipeline.
        given: settings of further files and of the command line by dotted name, which override
            both; the size of the images (`data.size`) determines the shape of the latents.
        recipe: name of the recipe that the settings are, or "".

    Returns:
        The completed settings.

    Raises:
        ValueError: the folder holds no pipeline, the recipe is made for another family, a setting
            is not a table, or the settings change the prediction type of a flow.
    """
    from diffcore.integrations.diffusers.loading.folder import sampling_defaults
    from diffcore.integrations.diffusers.loading.index import PipelineIndex

    index = PipelineIndex(Path(folder))
    if trains_pipeline(settings):
        index.check_pretrained()
    check_recipe(recipe, index)
    own = _table(settings.get("process"), "process")
    fields = index.process_fields_of(*_size(settings, own, given)) | _label_fields(index)
    found = {name: to_spec(value) for name, value in fields.items()}
    process = found | own
    if (count := given.get("process.classes", process.get("classes"))) != fields.get(
        "classes", count
    ):
        raise ValueError(
            f"process.classes is {count}, but the network in {folder} embeds {fields['classes']} "
            "classes and the null label: give the images one sub-folder for each of them"
        )
    if found["prediction"] == "flow_prediction" != process["prediction"]:
        raise ValueError(
            f"process.prediction is {process['prediction']}, but the network in {folder} predicts "
            "flow_prediction, which fine-tuning keeps: use the recipe finetune-flow, or leave "
            "prediction and schedule out of process"
        )
    _check_estimate(index, found, given.get("process.estimate", process.get("estimate")))
    process["schedule"] = _wrap_schedule(process["schedule"], found["schedule"])
    arguments: dict[str, dict[str, Any]] = {name: {"pipeline": folder} for name in READERS}
    if given.get("process.variance", process.get("variance")) == "learned":
        arguments["network"]["variance"] = "learned"
    readers = {
        name: _with_arguments(settings[name], arguments[name])
        for name, cls in READERS.items()
        if _class_name(settings.get(name)) == cls
    }
    completed = settings | readers | {"pipeline": folder, "process": process}
    if "estimate" in found:  # a recipe samples denoisers
        sampling = sampling_defaults(folder)
        completed = completed | sampling if recipe else sampling | completed
    if recipe:
        report_choice(recipe, index, completed, given)
    return completed


def _check_estimate(index: "PipelineIndex", found: Mapping[str, Any], estimate: Any) -> None:
    """Raise ValueError if settings make a denoiser of a pipeline's network of few steps."""
    if found.get("estimate", estimate) != estimate:
        raise ValueError(
            f"process.estimate is {estimate}, but the {index.scheduler['_class_name']} in "
            f"{index.folder} samples a {found['estimate']} network, which training by denoising "
            "would destroy: leave process.estimate out, or fine-tune the pipeline that it was "
            "distilled from"
        )


def _size(
    settings: Mapping[str, Any], process: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[int, Any]:
    """Size of the images in pixels, and shape of x_0, as far as the settings define them."""
    data = settings.get("data")
    arguments = data.get("init_args") if isinstance(data, dict) else None
    size = given.get("data.size", (arguments or {}).get("size"))
    shape = given.get("process.shape", process.get("shape"))
    # The parser of the command refuses values of another type.
    return size if isinstance(size, int) else 0, shape if isinstance(shape, list) else None


def _label_fields(index: "PipelineIndex") -> dict[str, Any]:
    """The fields of the condition that a class-conditional network's config determines."""
    from diffcore.integrations.diffusers.families import ClassCondition

    condition = index.family.condition
    if not isinstance(condition, ClassCondition) or condition.null_label is None:
        return {}
    count = condition.class_count(index.config(index.network_name), {})
    return {} if count is None else {"classes": count, "dropout": index.family.dropout}


def make_pipelines_absolute(settings: Namespace) -> None:
    """Make the paths of pipelines in parsed settings absolute, so that a run finds them from
    every folder.

    Args:
        settings: parsed settings of a training; changed in place.
    """
    keys = ["pipeline"]
    for name, cls in READERS.items():
        if _class_name(settings.get(f"{name}.class_path")) == cls:
            keys.append(f"{name}.init_args.pipeline")
    for key in keys:
        if path := settings.get(key):
            settings[key] = str(Path(path).absolute())


def _wrap_schedule(schedule: Any, inner: dict[str, Any]) -> Any:
    """A schedule around the pipeline's, unless it names its inner schedule or has none."""
    cls = getattr(schedules, _class_name(schedule), None)
    if cls is None or "inner" not in signature(cls).parameters:
        return schedule
    if _class_name(inner) == cls.__name__ == "ZeroTerminalSNR":
        inner = inner["init_args"]["inner"]
    return _with_arguments(schedule, {"inner": inner})


def _with_arguments(component: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The spec of a component whose arguments have other defaults."""
    spec = {"class_path": component} if isinstance(component, str) else component
    return spec | {"init_args": defaults | _table(spec.get("init_args"), "init_args")}


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name} is {value!r}, expected a table of settings")
    return value or {}


def _pipeline_of(component: Any) -> str:
    """The folder of the pipeline that the spec of a component names itself, or ""."""
    arguments = component.get("init_args") if isinstance(component, dict) else None
    return str(arguments.get("pipeline") or "") if isinstance(arguments, dict) else ""


def _class_name(component: Any) -> str:
    """The name of a component's class without its module."""
    path = component.get("class_path", "") if isinstance(component, dict) else component
    return str(path).rpartition(".")[2]
