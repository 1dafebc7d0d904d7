"""`diffcore train`: a recipe or a YAML file, with any of its options overridden."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from diffcore.cli.arguments import normalized, trusted
from diffcore.cli.finetune import filled
from diffcore.io.parser import ComponentParser
from diffcore.training.trainer import Trainer

RECIPES = files("diffcore.recipes")
PIPELINE = "folder of a diffusers pipeline, which says what a file leaves open of network, data and process"


def main(argv: Sequence[str]) -> None:
    """Train as the arguments say."""
    parser = ComponentParser(
        prog="diffcore train",
        usage="diffcore train [RECIPE | FILE.yaml] [--option value ...]",
        description=f"Train a network. Recipes: {', '.join(recipes())}. Options override what the recipe or file says.",
        epilog="--trust MODULE lets the configuration name classes of a module of yours, found from the current folder.",
    )
    if not argv:
        raise ValueError(f"name a recipe ({', '.join(recipes())}) or a YAML file, or see --help")
    parser.add_argument(
        "--config", action="config", help="a YAML file; options given besides it override it"
    )
    parser.add_argument("--pipeline", default=None, help=PIPELINE)  # dumped as null: none
    parser.add_class_arguments(Trainer, skip={"config"})
    settings = parser.parse_args(filled(_config_first(trusted(normalized(argv)))))
    config = parser.dump(settings.clone().update(False, "resume"))
    arguments = parser.instantiate(settings).as_dict() | {"config": config}
    del arguments["pipeline"]
    trainer: Trainer = Trainer(**arguments)
    trainer.train()


def recipes() -> list[str]:
    """The names of the recipes that come with diffcore."""
    return sorted(Path(path.name).stem for path in RECIPES.iterdir() if path.name.endswith(".yaml"))


def _config_first(argv: list[str]) -> list[str]:
    """The arguments with the recipe or file in front, so that options override it wherever they stand."""
    if argv and not argv[0].startswith("-"):
        return ["--config", resolved(argv[0]), *argv[1:]]
    for place, word in enumerate(argv):
        if word == "--config":
            _check_yaml(Path("".join(argv[place + 1 : place + 2])))
            return [*argv[place : place + 2], *argv[:place], *argv[place + 2 :]]
        if word.startswith("--config="):
            _check_yaml(Path(word.partition("=")[2]))
            return [word, *argv[:place], *argv[place + 1 :]]
    return argv


def resolved(name: str) -> str:
    """The path of a recipe or of a YAML file."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        _check_yaml(path)
        return name
    if name not in recipes():
        raise ValueError(
            f"there is no recipe {name!r}: expected a YAML file or one of {', '.join(recipes())}"
        )
    return str(RECIPES / f"{name}.yaml")


def _check_yaml(path: Path) -> None:
    """Name the file that is not YAML; the parser's own message does not."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: expected a YAML file or a recipe ({', '.join(recipes())})"
        )
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: expected lines such as `steps: 800`")
