"""A run's folder: what training leaves and sampling reads.

config.yaml  process.json  ema.safetensors  pipeline/  checkpoints/  samples/  metrics.jsonl
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.io.parser import ComponentParser
from diffcore.io.safetensors import read_weights

OptimizerFactory = Callable[
    [Iterable[nn.Parameter], float], torch.optim.Optimizer
]  # of parameters and learning rate
NetworkFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Run:
    """The folder of a training run.

    Args:
        folder: its path.
    """

    folder: Path

    @property
    def config(self) -> Path:
        """What `diffcore train --config` reads to make the same run."""
        return self.folder / "config.yaml"

    @property
    def process(self) -> Path:
        """The process record."""
        return self.folder / "process.json"

    @property
    def weights(self) -> Path:
        """The averaged weights."""
        return self.folder / "ema.safetensors"

    @property
    def pipeline(self) -> Path:
        """The averaged network as a pipeline of diffusers."""
        return self.folder / "pipeline"

    @property
    def checkpoints(self) -> Path:
        """A folder a checkpoint."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Pictures made along the way."""
        return self.folder / "samples"

    @property
    def metrics(self) -> Path:
        """One line of JSON a report."""
        return self.folder / "metrics.jsonl"

    def settings(self) -> dict[str, Any]:
        """The plain data of config.yaml.

        Raises:
            ValueError: it is missing or not YAML.
        """
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a run's folder: it does not exist")
        if not self.config.is_file():
            raise ValueError(f"{self.config} is missing: without it the network cannot be built")
        try:
            settings = yaml.safe_load(self.config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.config} is not YAML: {error}") from None
        if not isinstance(settings, dict) or "network" not in settings:
            raise ValueError(f"{self.config} names no network")
        return settings

    def network(self) -> nn.Module:
        """A network of this run's architecture, with new weights."""
        parser = ComponentParser(exit_on_error=False)
        parser.add_argument("--network", type=NetworkFactory)
        network: NetworkFactory = parser.instantiate(
            parser.parse_object({"network": self.settings()["network"]})
        ).network
        return network()

    def denoiser(
        self, device: torch.device | str = "cpu", network: nn.Module | None = None
    ) -> Denoiser:
        """The averaged network with its process, ready to sample; a run made in Python, without a
        config, needs its `network`.

        Raises:
            ValueError: the folder is not a run's, or its weights are not what was written or do not
                fit the network.
        """
        network = self.network() if network is None else network
        process = Process.load(self.process)
        tensors = read_weights(self.weights)
        own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        wrong = sorted(
            n for n in {*own, *tensors} if n not in tensors or own.get(n) != tuple(tensors[n].shape)
        )
        if wrong:
            raise ValueError(
                f"{self.weights} does not fit the network of {self.config}: {len(wrong)} tensors "
                "are missing, unknown or "
                f"of another shape, such as {wrong[0]}"
            )
        network.load_state_dict(tensors)
        return Denoiser(network, process).to(device).eval()
