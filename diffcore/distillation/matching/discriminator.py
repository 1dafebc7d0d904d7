"""Discriminators: ln p/q of noisy samples, from features of a network or by a network of its own.

    L_D = softplus(-D(x)) + softplus(D(x̃)) + γ/2 |∇_x D(x)|²     x of the data, x̃ of the student
    L_G = softplus(-D(x̃))

The best D is ln p/q of both distributions (Goodfellow et al. 2014, 1406.2661); γ is the R1 penalty
of Mescheder et al. (2018, 1801.04406).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from diffcore.core.condition_values import SEED_BYTES, process_without, without_value
from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import Denoiser, DenoiserProtocol
from diffcore.core.network import class_name, find_blocks
from diffcore.core.process import Process
from diffcore.distillation.matching.network_training import NetworkTraining
from diffcore.objectives.networks import Networks
from diffcore.run import NetworkFactory
from diffcore.schedules import Level

__all__ = [
    "DISCRIMINATOR",
    "Discriminator",
    "FeatureDiscriminator",
    "FeatureHeads",
    "NetworkDiscriminator",
    "capture_features",
    "discriminator_losses",
    "generator_losses",
]

DISCRIMINATOR = "discriminator"
"""Name of the network in a run."""
DEFAULT_BLOCKS = 3
"""Number of blocks, evenly spaced, whose features are used if none is named."""


@dataclass(frozen=True)
class Discriminator(ABC):
    """A discriminator of noisy samples at a noise level.

    Args:
        r1: factor γ of the R1 penalty on data; 0 for none.
        training: optimizer and number of updates.

    Raises:
        ValueError: `r1` is negative.
    """

    r1: float = 0.0
    training: NetworkTraining = field(default_factory=lambda: NetworkTraining(betas=(0.0, 0.99)))

    def __post_init__(self) -> None:
        if not self.r1 >= 0:
            raise ValueError(f"discriminator.r1 is {self.r1}, expected at least 0")

    @property
    def fake_weight(self) -> float:
        """Factor of the discriminator's loss in that of the fake network; 0 unless it reads its
        features.
        """
        return 0.0

    @property
    def reads_fake(self) -> bool:
        """Whether the logits are computed from features of the fake network."""
        return False

    @abstractmethod
    def module(self, backbones: Mapping[str, DenoiserProtocol], process: Process) -> nn.Module:
        """Build the trained part with initial weights, on the host.

        Args:
            backbones: denoisers by name whose features are available: teacher, fake.
            process: process of the noisy samples.

        Returns:
            The module, which `logits` evaluates.

        Raises:
            ValueError: there are no features to discriminate by; the message has the remedy.
        """

    @abstractmethod
    def logits(
        self,
        networks: Networks,
        process: Process,
        x: Tensor,
        level: Level,
        condition: BatchCondition | None,
    ) -> Tensor:
        """ln p/q of noisy samples, of shape (B,), differentiable in x.

        Args:
            networks: networks of the objective, with the module under the name `DISCRIMINATOR`.
            process: process of the noisy samples.
            x: noisy samples (B, *shape).
            level: noise level of the samples.
            condition: conditions of the samples.
        """

    def losses(
        self,
        networks: Networks,
        process: Process,
        x: tuple[Tensor, Tensor],
        level: Level,
        condition: BatchCondition | None,
        observe: Callable[[Tensor], object] = lambda logits: None,
    ) -> Tensor:
        """The losses (B,) of the discriminator, with the R1 penalty.

        Args:
            networks: networks of the objective.
            process: process of the noisy samples.
            x: noisy data and noisy samples of the student, each (B, *shape).
            level: noise level of both.
            condition: conditions of both.
            observe: receives the logits (B,) of the data.

        Returns:
            The losses.
        """
        real, fake = x
        real = real.detach().requires_grad_(bool(self.r1))
        # The fast kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.r1 else nullcontext():
            true = self.logits(networks, process, real, level, condition)
        observe(true)
        false = self.logits(networks, process, fake, level, condition)
        return discriminator_losses(true, false, real if self.r1 else None, self.r1)


@dataclass(frozen=True)
class NetworkDiscriminator(Discriminator):
    """A discriminator with a network of its own: the logit is the mean of its output.

    Args:
        network: class and options of the network, which takes x, the time conditioning and the
            conditions as a denoiser's network does. Its output has any shape (B, ...).
        r1: factor γ of the R1 penalty on data; 0 for none.
        training: optimizer and number of updates.

    Raises:
        ValueError: `network` is missing.
    """

    network: NetworkFactory | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network is None:
            raise ValueError(
                "discriminator.network is missing: name a network class, or use "
                "FeatureDiscriminator, which reads features of the teacher"
            )

    def module(self, backbones: Mapping[str, DenoiserProtocol], process: Process) -> nn.Module:
        assert self.network is not None
        return self.network()

    def logits(
        self,
        networks: Networks,
        process: Process,
        x: Tensor,
        level: Level,
        condition: BatchCondition | None,
    ) -> Tensor:
        network = networks.label_wrapper(networks.module(DISCRIMINATOR))
        # A discriminator does not know what is random in the student.
        denoiser = Denoiser(network, process_without(process, SEED_BYTES))
        output = denoiser.raw_output(x, level, without_value(condition, SEED_BYTES))
        return output.flatten(1).mean(1)


@dataclass(frozen=True)
class FeatureDiscriminator(Discriminator):
    """Heads on features of blocks of the teacher or of the fake network.

    A head is a normalisation over channels, two linear maps, and a mean over positions; the logit
    is the mean of all heads. The backbone is not trained by the discriminator's loss unless
    `backbone_weight` is set: DMD2 trains the fake network by the sum of its denoising loss and of
    this one (Yin et al. 2024, 2405.14867, section 4.3).

    Args:
        backbone: network whose features are read: teacher or fake.
        blocks: names of its modules; none: three blocks, evenly spaced (`find_blocks`).
        width: number of hidden features of a head.
        backbone_weight: factor of the discriminator's loss in the loss of the fake network whose
            features it reads: 0.01 in the authors' code for Stable Diffusion; 0: that network
            remains a denoiser alone.
        r1: factor γ of the R1 penalty on data; 0 for none.
        training: optimizer and number of updates.

    Raises:
        ValueError: `width` is below 1, or `backbone_weight` is negative or for another backbone.
    """

    backbone: Literal["teacher", "fake"] = "teacher"
    blocks: tuple[str, ...] = ()
    width: int = 64
    backbone_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.width < 1:
            raise ValueError(f"discriminator.width is {self.width}, expected at least 1")
        if not self.backbone_weight >= 0 or (self.backbone_weight and self.backbone != "fake"):
            raise ValueError(
                f"discriminator.backbone_weight is {self.backbone_weight} and backbone is "
                f"{self.backbone}: expected at least 0, and 0 for the teacher, which is frozen"
            )

    @property
    def fake_weight(self) -> float:
        return self.backbone_weight

    @property
    def reads_fake(self) -> bool:
        return self.backbone == "fake"

    @torch.no_grad()
    def module(self, backbones: Mapping[str, DenoiserProtocol], process: Process) -> nn.Module:
        denoiser = backbones.get(self.backbone)
        network = None if denoiser is None else denoiser.network
        if denoiser is None or network is None:
            raise ValueError(
                f"discriminator.backbone is {self.backbone}, which is no network and has no "
                "features: use the other backbone, or NetworkDiscriminator"
            )
        blocks = self._blocks(network)
        x = torch.zeros(2, *process.shape, device=denoiser.device)
        with capture_features(network, blocks) as features:
            _unguided(denoiser)(x, process.schedule.level(0.5))
        sizes = [_channels_last(feature, process).shape[-1] for feature in features]
        return FeatureHeads(sizes, self.width)

    def logits(
        self,
        networks: Networks,
        process: Process,
        x: Tensor,
        level: Level,
        condition: BatchCondition | None,
    ) -> Tensor:
        denoiser = networks.teacher
        if self.backbone == "fake":
            denoiser = networks.denoiser("fake", process)
        assert denoiser is not None
        assert denoiser.network is not None
        with capture_features(denoiser.network, self._blocks(denoiser.network)) as features:
            _unguided(denoiser)(x, level, condition)
        heads: Tensor = networks.module(DISCRIMINATOR)(
            *(_channels_last(feature, process) for feature in features)
        )
        return heads

    def _blocks(self, network: nn.Module) -> list[nn.Module]:
        """The modules of the backbone whose output is read."""
        if not self.blocks:
            found = list(find_blocks(network).values())
            if not found:
                raise ValueError(
                    f"the {self.backbone} is a {class_name(network)} without blocks, so that there "
                    "are no features to discriminate by: name modules in discriminator.blocks, or "
                    "use NetworkDiscriminator"
                )
            count = min(DEFAULT_BLOCKS, len(found))
            return [found[(2 * i + 1) * len(found) // (2 * count)] for i in range(count)]
        modules = dict(network.named_modules())
        chosen = []
        for name in self.blocks:
            matches = [key for key in modules if key == name or key.endswith(f".{name}")]
            if len(matches) != 1:
                raise ValueError(
                    f"discriminator.blocks names {name}, which is "
                    f"{'no module' if not matches else 'several modules'} of the {self.backbone}: "
                    f"its blocks are {', '.join(find_blocks(network)) or 'none'}"
                )
            chosen.append(modules[matches[0]])
        return chosen


class FeatureHeads(nn.Module):
    """One head for each feature; the output is the mean of their logits.

    Args:
        sizes: number of channels of each feature.
        width: number of hidden features of a head.
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(size), nn.Linear(size, width), nn.SiLU(), nn.Linear(width, 1)
            )
            for size in sizes
        )

    def forward(self, *features: Tensor) -> Tensor:
        """The logits (B,).

        Args:
            *features: features (B, ..., channels), one for each head.
        """
        logits = [
            head(feature.float()).flatten(1).mean(1)
            for head, feature in zip(self.heads, features, strict=True)
        ]
        return torch.stack(logits).mean(0)


@contextmanager
def capture_features(network: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Context in which the outputs of blocks of a network are collected.

    A compiled network is evaluated without its compilation, which would leave the hooks out.

    Args:
        network: network, which is evaluated once inside.
        blocks: modules of the network.

    Yields:
        The list that receives the features, in the order of the blocks.
    """
    found: dict[int, Tensor] = {}
    features: list[Tensor] = []

    def hook(index: int) -> Any:
        def collect(_module: nn.Module, _arguments: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            found[index] = value
            if len(found) == len(blocks):
                features[:] = [found[key] for key in sorted(found)]

        return collect

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield features
    finally:
        for handle in handles:
            handle.remove()


def _channels_last(feature: Tensor, process: Process) -> Tensor:
    """A feature (B, ..., channels): that of a convolution has its channels first."""
    is_convolution = feature.ndim > 2 and feature.ndim == len(process.shape) + 1
    return feature.movedim(1, -1) if is_convolution else feature


def _unguided(denoiser: DenoiserProtocol) -> DenoiserProtocol:
    """The denoiser inside of guidance, which evaluates each sample once."""
    from diffcore.distillation.guided_denoiser import GuidedDenoiser

    while isinstance(denoiser, GuidedDenoiser):
        denoiser = denoiser.inner
    return denoiser


def generator_losses(logits: Tensor) -> Tensor:
    """softplus(-D(x̃)), of shape (B,).

    Args:
        logits: D of samples of the student, of shape (B,).

    Returns:
        The losses of the student.
    """
    return softplus(-logits)


def discriminator_losses(
    real: Tensor, fake: Tensor, x: Tensor | None = None, r1: float = 0.0
) -> Tensor:
    """softplus(-D(x)) + softplus(D(x̃)) + γ/2 |∇_x D(x)|², of shape (B,).

    Args:
        real: D of noisy data, of shape (B,).
        fake: D of noisy samples of the student, of shape (B,).
        x: noisy data (B, *shape) that require a gradient, from which `real` is computed; None
            without R1.
        r1: γ.

    Returns:
        The losses of the discriminator.
    """
    losses = softplus(-real) + softplus(fake)
    if x is None or not r1:
        return losses
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    return losses + r1 / 2 * gradient.flatten(1).square().sum(1)
