"""Other libraries of diffusion models on the same work: samplers on oracles, and training steps.

They are installed in the environment of `make bench` only, without packages that this work does not
need (Makefile). One that cannot be imported is left out, with the reason.

- k-diffusion: samplers of the flow on σ of Karras and exponential spacing.
- azula: samplers of the flow on its schedules. They end at σ/α = 1e-3, and x is denoised there.
- azula's and torchcfm's losses, and the diffusion, loss and average of denoising-diffusion-pytorch,
  around the network of the digits.
"""

import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import LARGEST_SIGMA, Combination, Ends, Problem
from benchmarks.sides.bare_loop import BareLoop

__all__ = ["LOOPS", "SIDES", "available_sides", "import_peer"]

SMALLEST_SIGMA = 0.01
"""Last noisy σ of k-diffusion's spacings, before the clean level."""
UNUSED = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
"""Modules that peers import for images, which this work has none of."""


def import_peer(name: str) -> Any:
    """Import a module of a peer, without the `__init__` of its package.

    `__init__` of k-diffusion and denoising-diffusion-pytorch imports whatever any module of them
    needs, such as trackers and metrics. torchvision stays a module without contents: its builds
    on PyPI do not fit torch's builds for processors.

    Args:
        name: dotted name, such as k_diffusion.sampling.

    Returns:
        The module.

    Raises:
        ImportError: the peer, or a package that it needs, is not installed.
    """
    package = name.partition(".")[0]
    if package not in sys.modules:
        spec = find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{package} is not installed")
        module = types.ModuleType(package)
        module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules[package] = module
    with _placeholders():
        return importlib.import_module(name)


@contextmanager
def _placeholders() -> Iterator[None]:
    """Modules without contents in place of `UNUSED`, while a peer is imported."""
    absent = UNUSED if find_spec(UNUSED[0]) is None else ()
    for name in absent:
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        module.__getattr__ = _placeholder  # type: ignore[method-assign]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _placeholder(name: str) -> object:
    """An attribute of a module without contents, which nothing uses."""
    if name.startswith("__"):
        raise AttributeError(name)
    return types.ModuleType(name)


# Samplers on oracles ------------------------------------------------------------------------------


def k_diffusion_combinations() -> Iterator[Combination]:
    """The samplers of k-diffusion that follow the flow.

    Yields:
        The combinations of sampler and spacing.
    """
    library = import_peer("k_diffusion.sampling")
    grids = {
        "Karras": library.get_sigmas_karras,
        "exponential": library.get_sigmas_exponential,
        "polyexponential": library.get_sigmas_polyexponential,
    }
    samplers = {
        "Euler": (library.sample_euler, 1),
        "Heun": (library.sample_heun, 2),
        "DPM-2": (library.sample_dpm_2, 2),
        "LMS": (library.sample_lms, 1),
        "DPM++ 2M": (library.sample_dpmpp_2m, 1),
    }
    for (method, sampler), (grid, spacing) in product(samplers.items(), grids.items()):
        yield Combination(method, grid, partial(_run_k_diffusion, *sampler, spacing))


def _run_k_diffusion(
    sampler: Callable[..., Tensor],
    stages: int,
    spacing: Callable[..., Tensor],
    problem: Problem,
    count: int,
) -> Ends:
    """x at the end, where x = x_0 + σ ε, and the number of evaluations."""
    calls = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        level = problem.schedule.at(-2 * math.log(float(sigma[0])))
        return problem.oracle(float(level.alpha) * x, level).x0

    steps = (count + stages - 1) // stages
    sigmas = spacing(steps, SMALLEST_SIGMA, LARGEST_SIGMA).double()
    first = problem.schedule.at(-2 * math.log(float(sigmas[0])))
    x = sampler(model, problem.at(first) / float(first.alpha), sigmas, disable=True)
    return x, len(calls)


def azula_combinations() -> Iterator[Combination]:
    """The samplers of azula that follow the flow.

    Yields:
        The combinations of sampler and schedule.
    """
    library, noise = import_peer("azula.sample"), import_peer("azula.noise")
    schedules = {
        "VP": noise.VPSchedule(),
        "cosine": noise.CosineSchedule(),
        "rectified": noise.RectifiedSchedule(),
        "VE": noise.VESchedule(sigma_max=LARGEST_SIGMA),
    }
    samplers = {
        "DDIM": (library.DDIMSampler, 1),
        "Heun": (library.HeunSampler, 2),
        **{
            f"{name} {order}": (partial(getattr(library, f"{name}Sampler"), order=order), 1)
            for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB")
            for order in (2, 3)
        },
    }
    for (method, sampler), (grid, schedule) in product(samplers.items(), schedules.items()):
        yield Combination(method, grid, partial(_run_azula, *sampler, schedule))


def _run_azula(
    sampler: Callable[..., Any], stages: int, schedule: Any, problem: Problem, count: int
) -> Ends | None:
    """x_0 at the end and the number of evaluations, or None if not even one step is possible."""
    steps = (count - 1) // stages
    if not steps:
        return None
    denoiser = _AzulaOracle(problem, schedule)
    run = sampler(denoiser, steps=steps, silent=True, dtype=torch.float64)
    x = denoiser.denoise(run(denoiser.start()), torch.zeros((), dtype=torch.float64))
    return x, denoiser.calls


class _AzulaOracle:
    """The oracle as a denoiser of azula, in the scaling of one of its schedules.

    Args:
        problem: exact denoiser and starts.
        schedule: schedule of azula.
    """

    def __init__(self, problem: Problem, schedule: Any) -> None:
        self.problem, self.schedule, self.calls = problem, schedule, 0

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        return types.SimpleNamespace(mean=self.denoise(x, t))

    def start(self) -> Tensor:
        """(N, *shape) x at t = 1."""
        alpha, sigma = map(float, self.schedule(torch.ones((), dtype=torch.float64)))
        return math.hypot(alpha, sigma) * self.problem.at(
            self.problem.schedule.at(2 * math.log(alpha / sigma))
        )

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """(N, *shape) x_0 at time t."""
        self.calls += 1
        alpha, sigma = map(float, self.schedule(t))
        level = self.problem.schedule.at(2 * math.log(alpha / sigma))
        return self.problem.oracle(x / math.hypot(alpha, sigma), level).x0


SIDES: dict[str, tuple[str, Callable[[], Iterator[Combination]]]] = {
    "k-diffusion": ("k_diffusion.sampling", k_diffusion_combinations),
    "azula": ("azula.sample", azula_combinations),
}
"""Name of a side -> module that it needs, and the function that returns its combinations."""


def available_sides() -> tuple[dict[str, Callable[[], Iterator[Combination]]], list[str]]:
    """The sides that are installed.

    Returns:
        Functions that return the combinations of a side, by name; and why others are left out.
    """
    found, absent = {}, []
    for name, (module, combinations) in SIDES.items():
        try:
            import_peer(module)
        except ImportError as error:
            absent.append(f"{name} ({error})")
        else:
            found[name] = combinations
    return found, absent


# Training steps -----------------------------------------------------------------------------------


class _LabelledNetwork(nn.Module):
    """The network of the digits with the call of a peer.

    Args:
        network: network of diffusers.
    """

    channels = out_dim = 1
    self_condition = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.labels = network, torch.zeros(0, dtype=torch.int64)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        output: Tensor = self.network(x, time, class_labels=self.labels).sample
        return output


class PeerLoop(BareLoop):
    """The bare loop of the digits with the loss of a peer; other losses are 0 of the same shape."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.wrapped = _LabelledNetwork(self.network)

    def losses(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        self.wrapped.labels = labels
        return self.peer_loss(x0, t).expand(len(x0))

    def peer_loss(self, x0: Tensor, t: Tensor) -> Tensor:
        """The loss of the peer, a number.

        Args:
            x0: (B, 1, 8, 8) images.
            t: (B,) times in [0, 1].
        """
        raise NotImplementedError


class AzulaLoop(PeerLoop):
    """Azula's denoiser with EDM preconditioning and its loss, in the bare loop."""

    def __init__(self) -> None:
        super().__init__()
        denoise, noise = import_peer("azula.denoise"), import_peer("azula.noise")
        self.denoiser = denoise.KarrasDenoiser(self.wrapped, noise.CosineSchedule())

    def peer_loss(self, x0: Tensor, t: Tensor) -> Tensor:
        loss: Tensor = self.denoiser.loss(x0, t)
        return loss


class FlowMatchingLoop(PeerLoop):
    """torchcfm's conditional flow matching with the squared error of its velocity."""

    def __init__(self) -> None:
        super().__init__()
        library = import_peer("torchcfm.conditional_flow_matching")
        self.matcher = library.ConditionalFlowMatcher(sigma=0.0)

    def peer_loss(self, x0: Tensor, t: Tensor) -> Tensor:
        t, x, velocity = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x0), x0)
        return (self.wrapped(x, 1000 * t) - velocity).square().mean()


class DenoisingDiffusionLoop(PeerLoop):
    """denoising-diffusion-pytorch: its diffusion, Min-SNR loss and average (of ema-pytorch)."""

    def __init__(self) -> None:
        super().__init__()
        library = import_peer("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
        self.diffusion = library.GaussianDiffusion(
            self.wrapped,
            image_size=8,
            objective="pred_v",
            beta_schedule="cosine",
            auto_normalize=False,
            min_snr_loss_weight=True,
        )
        self.ema = library.EMA(self.network, beta=self.recipe["ema"]["decay"], update_every=1)

    def peer_loss(self, x0: Tensor, t: Tensor) -> Tensor:
        loss: Tensor = self.diffusion(x0)
        return loss

    def average(self) -> None:
        self.ema.update()


LOOPS: dict[str, Callable[[], BareLoop]] = {
    "azula's loss": AzulaLoop,
    "torchcfm's loss": FlowMatchingLoop,
    "denoising-diffusion-pytorch": DenoisingDiffusionLoop,
}
"""Name of the other side -> its loop."""
