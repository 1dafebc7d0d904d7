"""The folder of a training run, which training writes and sampling reads.

config.yaml  process.json  ema.safetensors  pipeline/  checkpoints/  samples/  metrics.jsonl
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.io.files import check_links
from diffcore.io.manifest import checkpoint_folders, is_sharded, read_manifest, read_part
from diffcore.io.network_size import BoundedFactory
from diffcore.io.parser import ComponentParser, SpecError
from diffcore.io.plain_data import hash_data, read_yaml
from diffcore.io.safetensors import read_step, read_weights_and_metadata

__all__ = [
    "AVERAGED",
    "FILES",
    "RAW",
    "NetworkFactory",
    "NetworkWeights",
    "OptimizerFactory",
    "Run",
    "hash_options",
    "read_checkpoint_weights",
    "without_locations",
]

OptimizerFactory = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
"""Builds an optimizer from the parameters and the learning rate."""
NetworkFactory = Callable[[], nn.Module]
"""Builds a network with newly initialised weights."""

AVERAGED = "averaged"
RAW = "raw"
"""Names of the exponential moving average of the weights, and of the trained weights themselves."""
FILES = {AVERAGED: "ema.safetensors", RAW: "model.safetensors"}
"""Their files in a checkpoint."""

LOCATIONS = {
    "Arrays": {"path", "labels", "conditions"},
    "HuggingFaceData": {"path"},
    "HuggingFaceStream": {"path"},
    "ImageFolder": {"folder", "masks", "conditions", "verify"},
    "FlowPairs": {"folder"},
    "LatentDataset": {"folder", "pipeline", "masks", "conditions", "cache", "verify"},
    "PipelineTeacher": {"pipeline"},
    "PretrainedNetwork": {"pipeline"},
    "RunTeacher": {"folder"},
    "TarShards": {"path"},
    "TarStream": {"paths"},
    "Tensors": {"path"},
}
"""Class -> its arguments that name folders whose content is hashed, and which may move.

`verify` is an argument of how the content is hashed.
"""


def without_locations(spec: Any) -> Any:
    """The spec of a component without its arguments that name folders which may move.

    Args:
        spec: plain data {class_path, init_args}, the name of a class, or a list of them.

    Returns:
        The spec with the other arguments.
    """
    if isinstance(spec, list):
        return [without_locations(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    if not isinstance(spec.get("init_args"), dict):
        return {name: without_locations(value) for name, value in spec.items()}
    locations = LOCATIONS.get(str(spec.get("class_path")).rpartition(".")[2], set())
    arguments = {
        name: without_locations(value)
        for name, value in spec["init_args"].items()
        if name not in locations
    }
    return spec | {"init_args": arguments}


def hash_options(spec: Any) -> str:
    """SHA-256 of the arguments of a component, without the folders that may move.

    Args:
        spec: plain data {class_path, init_args}, or the name of a class.

    Returns:
        The hash, 64 hexadecimal digits.
    """
    options = without_locations(spec).get("init_args") if isinstance(spec, dict) else None
    return hash_data(options or {})


class NetworkWeights(NamedTuple):
    """Weights of a network, and where they come from.

    Args:
        tensors: tensors by name.
        origin: path of their file.
        options: hash of the options of their network (`hash_options`); None if unknown.
    """

    tensors: dict[str, Tensor]
    origin: str | Path
    options: str | None = None


def read_checkpoint_weights(folder: str | Path, weights: str = AVERAGED) -> NetworkWeights:
    """Read the averaged or the raw weights of a checkpoint, and verify every byte.

    Args:
        folder: folder of the checkpoint, gathered or sharded.
        weights: averaged or raw.

    Returns:
        The weights, without those of an uncertainty that was trained beside the network.

    Raises:
        CorruptFileError: a file is missing, truncated or changed.
    """
    folder, file = Path(folder), FILES[weights]
    manifest = read_manifest(folder)
    tensors = read_part(folder, manifest, Path(file).stem)
    settings = manifest["state"].get("settings") or {}
    objective = settings.get("objective") or {}
    if weights == RAW and (objective.get("init_args") or objective).get("uncertainty"):
        own = {name for name in tensors if name.startswith("network.")}
        tensors = {name.removeprefix("network."): tensors[name] for name in own}
    options = hash_options(settings["network"]) if "network" in settings else None
    origin = folder if is_sharded(manifest) else folder / file
    return NetworkWeights(tensors, origin, options)


@dataclass(frozen=True)
class Run:
    """The folder of a training run.

    Args:
        folder: path of the folder; a string becomes a Path.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def config(self) -> Path:
        """The configuration from which `diffcore train --config` repeats the run."""
        return self.folder / "config.yaml"

    @property
    def process(self) -> Path:
        """The process record."""
        return self.folder / "process.json"

    @property
    def weights(self) -> Path:
        """The exponential moving average of the weights."""
        return self.folder / "ema.safetensors"

    @property
    def pipeline(self) -> Path:
        """The averaged network as a diffusers pipeline."""
        return self.folder / "pipeline"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, one subfolder each."""
        return self.folder / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """The folder of the averages from which one of any length can be reconstructed."""
        return self.folder / "snapshots"

    @property
    def samples(self) -> Path:
        """The folder of the preview samples."""
        return self.folder / "samples"

    @property
    def metrics(self) -> Path:
        """The training metrics, one JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def speed(self) -> Path:
        """Images per second and memory, one JSON object per line; they depend on the machine."""
        return self.folder / "speed.jsonl"

    @property
    def wandb(self) -> Path:
        """Project and id of the run of Weights & Biases, if it is a tracker."""
        return self.folder / "wandb.json"

    @property
    def non_finite(self) -> Path:
        """The samples of the steps that were not finite, one JSON object per step."""
        return self.folder / "non-finite.jsonl"

    @property
    def validation(self) -> Path:
        """The losses on held-out data, one JSON object per line."""
        return self.folder / "validation.jsonl"

    @property
    def evaluation(self) -> Path:
        """The results of the last evaluation of the averaged weights, if there was one."""
        return self.folder / "evaluation.json"

    @property
    def comparison(self) -> Path:
        """The results of the last comparison of samplers, beside its pictures, if there was one."""
        return self.folder / "comparison" / "comparison.json"

    @property
    def likelihood(self) -> Path:
        """The bits per dimension of data under the averaged weights, by method and data."""
        return self.folder / "likelihood.json"

    def settings(self) -> dict[str, Any]:
        """The contents of config.yaml as plain data.

        Returns:
            The settings by name.

        Raises:
            ValueError: the file is missing or empty, is not YAML, or does not define a network.
        """
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a run's folder: it does not exist")
        check_links(self.folder)
        if not self.config.is_file():
            raise ValueError(f"{self.config} is missing: without it the network cannot be built")
        if not self.config.stat().st_size:
            raise ValueError(
                f"{self.config} is empty, as for a Trainer built in Python: sample the run "
                "in Python by Run(folder).denoiser(network=...), with a network of its architecture"
            )
        settings = read_yaml(self.config)
        if "network" not in settings:
            raise ValueError(f"{self.config} has no entry `network`: add the class of the network")
        return settings

    def network(self) -> nn.Module:
        """A network of the architecture in config.yaml.

        Returns:
            The network with newly initialised weights.

        Raises:
            ValueError: the configuration is missing, does not define a network, or defines one that
                is too large for this machine.
        """
        return self._factory(self.settings())()

    def architecture(self) -> nn.Module:
        """The network of config.yaml without weights; one of torch or diffusers takes no memory.

        Returns:
            The network on the meta device, or one with newly initialised weights if its class is
            another one.

        Raises:
            ValueError: as `network`.
        """
        return _without_memory(self._factory(self.settings()))

    def _factory(self, settings: dict[str, Any]) -> NetworkFactory:
        parser = ComponentParser(exit_on_error=False)
        parser.add_argument("--network", type=NetworkFactory)
        try:
            parsed = parser.parse_object({"network": settings["network"]})
            return parser.instantiate(parsed).network
        except SpecError as error:
            raise ValueError(f"{self.config}: {error}") from None

    def weight_names(self) -> list[str]:
        """What `read_weights` accepts besides files: averaged, raw, and the checkpoints."""
        steps = [path.name for path in checkpoint_folders(self.checkpoints)]
        averaged = [AVERAGED] if steps or self.weights.is_file() else []
        return averaged + ([RAW] if steps else []) + steps

    def resolve_weights(self, weights: str = AVERAGED) -> str:
        """Replace the name of the averaged weights by that of a checkpoint, if it is newer.

        Args:
            weights: name of weights, see `read_weights`.

        Returns:
            The name of the newest checkpoint, if `weights` is averaged or "" and the run has not
            written the averaged weights of this checkpoint to their own file; else `weights`, where
            "" is averaged.
        """
        if weights not in ("", AVERAGED):
            return weights
        newest = max((path.name for path in checkpoint_folders(self.checkpoints)), default="")
        if not newest or not self.weights.is_file():
            return newest or AVERAGED
        step = read_step(self.weights)
        return AVERAGED if step is None or newest <= f"step-{step:08d}" else newest

    def read_weights(self, weights: str = AVERAGED) -> NetworkWeights:
        """Read weights of the run.

        Args:
            weights: averaged: those that the run wrote last, see `resolve_weights`. raw: the
                trained weights in the newest checkpoint. step-00000400 or step-00000400/raw: the
                averaged or the raw weights in that checkpoint. Otherwise a safetensors file, such
                as one that `diffcore ema` wrote. "": averaged.

        Returns:
            The weights.

        Raises:
            ValueError: there are none of this name, or their file is missing or corrupt.
        """
        weights = self.resolve_weights(weights)
        if weights == AVERAGED:
            return self._read_file(self.weights)
        step, _, part = weights.partition("/")
        checkpoints = {path.name: path for path in checkpoint_folders(self.checkpoints)}
        if weights == RAW and checkpoints:
            return read_checkpoint_weights(max(checkpoints.values()), RAW)
        if step in checkpoints and part in ("", *FILES):
            return read_checkpoint_weights(checkpoints[step], part or AVERAGED)
        if weights != RAW and Path(weights).is_file():
            return self._read_file(Path(weights))
        names = ", ".join(self.weight_names()) or "none"
        raise ValueError(
            f"weights is {weights!r}, which {self.folder} does not hold: expected a safetensors "
            f"file, or one of {names} (a checkpoint's raw weights are named step-00000400/raw)"
        )

    def _read_file(self, path: Path) -> NetworkWeights:
        tensors, metadata = read_weights_and_metadata(path)
        return NetworkWeights(tensors, path, metadata.get("network"))

    def denoiser(
        self,
        device: torch.device | str = "cpu",
        network: nn.Module | None = None,
        weights: str | Path = "",
    ) -> Denoiser:
        """The denoiser with weights of the run, in evaluation mode.

        Args:
            device: device of the network.
            network: network of the run's architecture, needed if config.yaml is missing or empty,
                as for a `Trainer` built in Python; by default it is built from config.yaml.
            weights: averaged, raw, the name of a checkpoint, or a file, see `read_weights`; "": the
                run's average.

        Returns:
            The denoiser of the network and the saved process.

        Raises:
            ValueError: a file of the run is missing or corrupt, the weights do not fit the
                network, or config.yaml has other options of the network than in training.
        """
        if network is None:
            settings, origin = self.settings(), str(self.config)
            factory = self._factory(settings)
            network, expected = _without_memory(factory), hash_options(settings["network"])
        else:
            check_links(self.folder)
            given = network
            origin, expected, factory = "the argument `network`", None, lambda: given
        process = Process.load(self.process)
        found = self.read_weights(str(weights))
        own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        wrong = sorted(
            name
            for name in {*own, *found.tensors}
            if name not in found.tensors or own.get(name) != tuple(found.tensors[name].shape)
        )
        if wrong:
            raise ValueError(
                f"{found.origin} does not fit the network of {origin}: {len(wrong)} tensors "
                f"are missing, unknown or of another shape, such as {wrong[0]}"
            )
        if None not in (expected, found.options) and found.options != expected:
            raise ValueError(
                f"{found.origin} was trained with other options of the network than {self.config} "
                f"has: restore them; diffcore train --config {self.config} --resume true names them"
            )
        if any(value.is_meta for value in network.state_dict().values()):
            network = factory()
        network.load_state_dict(found.tensors)
        return Denoiser(network, process).to(device).eval()


def _without_memory(factory: NetworkFactory) -> nn.Module:
    """The network of a factory, on the meta device if its class is one of torch or diffusers."""
    return factory.without_memory() if isinstance(factory, BoundedFactory) else factory()
