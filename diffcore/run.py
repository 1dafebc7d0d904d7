"""The folder of a training run, which training writes and sampling reads.

config.yaml  process.json  ema.safetensors  pipeline/  checkpoints/  samples/  metrics.jsonl
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.io.files import check_links
from diffcore.io.network_size import BoundedFactory
from diffcore.io.parser import ComponentParser, SpecError
from diffcore.io.plain_data import hash_data, read_yaml
from diffcore.io.safetensors import read_weights_and_metadata

__all__ = ["NetworkFactory", "OptimizerFactory", "Run", "hash_options", "without_locations"]

OptimizerFactory = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
"""Builds an optimizer from the parameters and the learning rate."""
NetworkFactory = Callable[[], nn.Module]
"""Builds a network with newly initialised weights."""

LOCATIONS = {
    "ImageFolder": {"folder", "verify"},
    "LatentDataset": {"folder", "pipeline", "cache", "verify"},
    "PretrainedNetwork": {"pipeline"},
}
"""Class -> its arguments that name folders whose content is hashed, and which may move.

`verify` is an argument of how the content is hashed.
"""


def without_locations(spec: Any) -> Any:
    """The spec of a component without its arguments that name folders which may move.

    Args:
        spec: plain data {class_path, init_args}, or the name of a class.

    Returns:
        The spec with the other arguments.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("init_args"), dict):
        return spec
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
    def validation(self) -> Path:
        """The losses on held-out data, one JSON object per line."""
        return self.folder / "validation.jsonl"

    @property
    def evaluation(self) -> Path:
        """The results of the last evaluation of the averaged weights, if there was one."""
        return self.folder / "evaluation.json"

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

    def denoiser(
        self,
        device: torch.device | str = "cpu",
        network: nn.Module | None = None,
        weights: str | Path = "",
    ) -> Denoiser:
        """The denoiser with the averaged weights, in evaluation mode.

        Args:
            device: device of the network.
            network: network of the run's architecture, needed if config.yaml is missing or empty,
                as for a `Trainer` built in Python; by default it is built from config.yaml.
            weights: file of other weights, such as one that `diffcore ema` reconstructed; "": the
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
        path = Path(weights) if weights else self.weights
        tensors, metadata = read_weights_and_metadata(path)
        own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        wrong = sorted(
            n for n in {*own, *tensors} if n not in tensors or own.get(n) != tuple(tensors[n].shape)
        )
        if wrong:
            raise ValueError(
                f"{path} does not fit the network of {origin}: {len(wrong)} tensors "
                f"are missing, unknown or of another shape, such as {wrong[0]}"
            )
        if expected is not None and metadata.get("network", expected) != expected:
            raise ValueError(
                f"{path} was trained with other options of the network than {self.config} has: "
                f"restore them; diffcore train --config {self.config} --resume true names them"
            )
        if any(value.is_meta for value in network.state_dict().values()):
            network = factory()
        network.load_state_dict(tensors)
        return Denoiser(network, process).to(device).eval()


def _without_memory(factory: NetworkFactory) -> nn.Module:
    """The network of a factory, on the meta device if its class is one of torch or diffusers."""
    return factory.without_memory() if isinstance(factory, BoundedFactory) else factory()
