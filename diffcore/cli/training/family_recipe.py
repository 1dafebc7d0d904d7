"""The recipe of a pipeline's model family, and the short options of a fine-tuning.

--data IMAGES        --data.folder IMAGES
--lora RANK          --network.lora.rank RANK, with the learning rate and the steps of an adapter
--text_lora RANK     --network.text_lora.rank RANK --data.text tokens, and those of an adapter
--token WORD=INITIAL --network.word.word WORD --network.word.initial INITIAL --data.text tokens, and
                     those of textual inversion
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
TOKEN_EXPECTED = "a new word and the word that it starts from, such as '<cat>=cat'"
ADAPTER_DEFAULTS = {"lr.peak": "0.0001", "lr.warmup": "100", "steps": "2000", "save_every": "500"}
"""Settings of an adapter that differ from those of all weights in the recipes."""
WORD_DEFAULTS = ADAPTER_DEFAULTS | {"lr.peak": "0.0005"}
"""Settings of textual inversion without an adapter."""


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
    text_ranks, others = extract_option(
        others, "text_lora", "the rank of the text encoders' adapter"
    )
    words_found, others = extract_option(others, "token", TOKEN_EXPECTED)
    expanded = [f"--data{'' if _is_class(value) else '.folder'}={value}" for value in folders]
    expanded += [f"--network.lora.rank={value}" for value in ranks]
    expanded += [f"--data.size={value}" for value in sizes]
    expanded += [f"--network.text_lora.rank={value}" for value in text_ranks]
    expanded += [option for value in words_found for option in _word_options(value)]
    expanded += ["--data.text=tokens"] * bool(_is_positive(text_ranks) or words_found)
    is_adapter = _is_positive(ranks) or _is_positive(text_ranks)
    implied = ADAPTER_DEFAULTS if is_adapter else WORD_DEFAULTS if words_found else {}
    return [*(f"--{name}={value}" for name, value in implied.items()), *expanded, *others]


def _is_positive(ranks: Sequence[str]) -> bool:
    """Whether the last of several ranks is not 0."""
    return bool(ranks) and ranks[-1] != "0"


def _word_options(value: str) -> list[str]:
    """The options of a new word and the word that it starts from."""
    word, equals, initial = value.rpartition("=")
    if not (word and equals and initial):
        raise ValueError(f"--token is {value}, expected {TOKEN_EXPECTED}")
    return [f"--network.word.word={word}", f"--network.word.initial={initial}"]


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
    few = f", of a {process['estimate']} network" if "estimate" in index.process_fields else ""
    lines = {
        "recipe": f"{recipe}, for {family.name} in {index.folder}",
        "process": f"{process['prediction']}, {_name(process['schedule'])}{few}, {origin}",
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
    text_rank, word = given.get("network.text_lora.rank") or 0, given.get("network.word.word") or ""
    lr = given.get("lr.peak", (settings.get("lr") or {}).get("peak"))
    steps = given.get("steps", settings.get("steps"))
    parts = [f"a LoRA of rank {rank} (leave --lora out for all weights)"] * bool(rank)
    parts += [f"a LoRA of rank {text_rank} of the text encoders"] * bool(text_rank)
    parts += [f"the embeddings of {word}"] * bool(word)
    what = " and ".join(parts) or (
        "all weights of the network (--lora 16 for an adapter, which needs less memory)"
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
