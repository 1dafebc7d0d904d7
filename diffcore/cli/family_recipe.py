"""The recipe of a pipeline's model family, and the short options of a fine-tuning.

--data IMAGES        --data.folder IMAGES
--lora RANK          --network.lora.rank RANK, with the learning rate and the steps of an adapter
--resolution PIXELS  --data.size PIXELS
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcore.cli.arguments import extract_option

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.families import ModelFamily
    from diffcore.integrations.diffusers.loading.index import PipelineIndex

__all__ = ["CHOICE", "check_recipe", "choose_recipe", "expand_options", "report_choice"]

CHOICE = "finetune"
"""Name in place of a recipe's: the recipe of the pipeline's family."""
PIPELINE = "the folder of a diffusers pipeline"
ADAPTER_DEFAULTS = {"lr.peak": "0.0001", "lr.warmup": "100", "steps": "2000", "save_every": "500"}
"""Settings of an adapter that differ from those of all weights in the recipes."""


def choose_recipe(words: Sequence[str]) -> str:
    """Choose the recipe of the family of the pipeline that an option names.

    Args:
        words: command-line words after `finetune`, with `--pipeline`.

    Returns:
        The name of the recipe.

    Raises:
        ValueError: no pipeline is named, its folder holds none, or no recipe trains its family.
    """
    from diffcore.integrations.diffusers.loading.index import PipelineIndex

    folders, _ = extract_option(words, "pipeline", PIPELINE)
    if not folders:
        raise ValueError(
            f"{CHOICE} chooses the recipe of a pipeline's family: name the pipeline, "
            "--pipeline FOLDER"
        )
    index = PipelineIndex(Path(folders[-1]))
    recipes = index.family.recipes
    if not recipes:
        raise ValueError(
            f"{folders[-1]} holds a {index.family.name} network, which no recipe of fine-tuning "
            f"trains: start a training of yours from its weights, --init {folders[-1]}"
        )
    return recipes[0]


def expand_options(words: Sequence[str]) -> list[str]:
    """Spell the short options of a fine-tuning in full.

    Args:
        words: command-line words after the recipe.

    Returns:
        The words; the settings that an adapter implies come first, so that options override them.

    Raises:
        ValueError: an option has no value.
    """
    others = list(words)
    folders, others = extract_option(others, "data", "the folder of your images")
    ranks, others = extract_option(others, "lora", "the rank of the adapter")
    sizes, others = extract_option(others, "resolution", "the size of the images in pixels")
    expanded = [f"--data{'' if _is_class(value) else '.folder'}={value}" for value in folders]
    expanded += [f"--network.lora.rank={value}" for value in ranks]
    expanded += [f"--data.size={value}" for value in sizes]
    implied = ADAPTER_DEFAULTS if ranks and ranks[-1] != "0" else {}
    return [*(f"--{name}={value}" for name, value in implied.items()), *expanded, *others]


def _is_class(value: str) -> bool:
    """Whether the value of `--data` names a class, and not a folder."""
    return value.rpartition(".")[2][:1].isupper() and "/" not in value and not Path(value).is_dir()


def check_recipe(recipe: str, index: "PipelineIndex") -> None:
    """Check that a recipe of fine-tuning is made for the family of a pipeline.

    Args:
        recipe: name of the recipe, or path of a file, which may train any family.
        index: pipeline.

    Raises:
        ValueError: the recipe is made for other families.
    """
    from diffcore.integrations.diffusers.families import FAMILIES

    family = index.family
    made_for = [other.name for other in FAMILIES if recipe in other.recipes]
    if made_for and recipe not in family.recipes:
        remedy = (
            f"use {CHOICE}, which chooses {family.recipes[0]} for it"
            if family.recipes
            else f"start a training of yours from its weights, --init {index.folder}"
        )
        raise ValueError(
            f"the recipe {recipe} trains {', '.join(made_for)}, and {index.folder} holds "
            f"{family.name}: {remedy}"
        )


def report_choice(
    recipe: str, index: "PipelineIndex", settings: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Print on stderr what was chosen for a pipeline, and why; on the first rank only.

    Args:
        recipe: name of the recipe.
        index: pipeline.
        settings: completed settings.
        given: settings of further files and of the command line by dotted name.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    process, family = settings["process"], index.family
    scheduler = index.scheduler.get("_class_name")
    is_kept = (
        "schedule" not in given and process["prediction"] == index.process_fields["prediction"]
    )
    origin = f"as {scheduler} of the pipeline describes" if is_kept else "as the settings define"
    lines = {
        "recipe": f"{recipe}, for {family.name} in {index.folder}",
        "process": f"{process['prediction']}, {_name(process['schedule'])}, {origin}",
        "condition": _condition(family),
        "trains": _trained(settings, given),
        "images": _images(index, process["shape"], given),
    }
    print(
        *(f"diffcore: {name:<10} {text}" for name, text in lines.items()), sep="\n", file=sys.stderr
    )
    print("diffcore: --print_config prints all settings, and options change them", file=sys.stderr)


def _condition(family: "ModelFamily") -> str:
    return family.condition.summary if family.condition else "nothing"


def _trained(settings: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    rank = given.get("network.lora.rank") or 0
    lr = given.get("lr.peak", (settings.get("lr") or {}).get("peak"))
    steps = given.get("steps", settings.get("steps"))
    what = (
        f"a LoRA of rank {rank} (leave --lora out for all weights)"
        if rank
        else "all weights of the network (--lora 16 for an adapter, which needs less memory)"
    )
    return f"{what}, {steps} steps at learning rate {lr}"


def _images(index: "PipelineIndex", shape: Sequence[int], given: Mapping[str, Any]) -> str:
    size = given.get("data.size")
    origin = (
        "as given" if size else "the size that the network was made for; --resolution changes it"
    )
    return f"{size or index.image_size} pixels, {origin}; latents {' x '.join(map(str, shape))}"


def _name(component: Any) -> str:
    """A component's class, and of a wrapper also that of the inner one."""
    path = component.get("class_path", "") if isinstance(component, Mapping) else component
    inner = (component.get("init_args") or {}).get("inner") if isinstance(component, Mapping) else 0
    name = str(path).rpartition(".")[2]
    return f"{name} of {_name(inner)}" if inner else name
