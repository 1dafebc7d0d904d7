"""What is read from a network beside its output: its config, its dtype, its blocks.

Optional capabilities of a network are export to another library, a hash of frozen weights, and
learned noise levels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from diffcore.core.process import Process
from diffcore.schedules import Level, Schedule

__all__ = [
    "ExportableNetwork",
    "LabelWrapper",
    "Latent",
    "LearnedLevels",
    "NetworkAdapter",
    "class_name",
    "evaluation_dtype",
    "find_blocks",
    "find_learned_levels",
    "frozen_hash",
    "keep_trained_state",
    "leave_label_dropout",
    "network_config",
    "unwrap",
    "without_labels",
]

LabelWrapper = Callable[[nn.Module], nn.Module]
"""Wraps a network so that it accepts the labels of the data."""

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Modules that evaluate the network in their attribute `module`."""


class Latent(NamedTuple):
    """A draw of z for each sample.

    Args:
        z: (B, L) latents; None for levels that do not depend on the data.
        divergence: (B,) KL(q(z | x_0) || N(0, I)) in nats; 0 without z.
    """

    z: Tensor | None
    divergence: Tensor


class LearnedLevels(nn.Module):
    """A network that contains the learned noise levels of its process, one for each element of x.

    It is evaluated at maps of levels (`process.levels`).

    Args:
        shape: shape of one x_0.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def spread(self, schedule: Schedule, t: Tensor, z: Tensor | None) -> tuple[Level, Tensor]:
        """The levels of the elements at times of the schedule.

        Args:
            schedule: schedule of the process, a `LogLinear`.
            t: (B, 1, ..., 1) or (1, 1, ..., 1) times in [0, 1], of the dtype of the result.
            z: (B, L) latents; None without them.

        Returns:
            A map of levels that broadcasts against (B, *shape), on the device of t, and dτ/dt of
            each element: -dλ_i/dt over the range of λ. Both have the gradient of parameters and z.
        """
        raise NotImplementedError

    def sample_latent(self, seeds: Tensor) -> Tensor | None:
        """z ~ N(0, I) of samples.

        Args:
            seeds: (B,) 64-bit seeds.

        Returns:
            (B, L) latents, or None without them.
        """
        raise NotImplementedError

    def encode(self, x0: Tensor, seed: int, position: Tensor) -> Latent:
        """z ~ q(z | x_0) of clean data, with the gradient of the encoder.

        Args:
            x0: (B, *shape) clean data on the device of the network.
            seed: 64-bit seed.
            position: (B,) position of each sample; its z is a function of it.

        Returns:
            The latents, and their divergence from N(0, I).
        """
        raise NotImplementedError

    @torch.no_grad()
    def knots(self, knots: tuple[Level, ...], z: Tensor | None) -> tuple[Level, ...]:
        """The levels of the elements at knots of the schedule.

        Args:
            knots: levels of the schedule of the process.
            z: (B, L) latents; None without them.

        Returns:
            One map of levels for each knot, float64 on the host, without gradient. A knot that is
            cleaner than the schedule stays as it is.
        """
        one = torch.ones(1, *[1] * len(self.shape), dtype=torch.float64)
        return tuple(
            knot if knot.is_beyond_training else self.spread(knot.schedule, knot.t * one, z)[0]
            for knot in knots
        )


class ExportableNetwork(nn.Module):
    """A network that can be exported in another library's format, such as a diffusers pipeline."""

    @property
    def content_hash(self) -> str:
        """Hash of the weights outside the state dict, such as those under an adapter; "" if none.

        Training is resumed only if this hash is unchanged.
        """
        return ""

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """Parameter name -> factor of its learning rate; 1 for a parameter without an entry."""
        return {}

    @property
    def described_network(self) -> nn.Module:
        """The network of the other library whose config and arguments this one has."""
        return self

    @property
    def exported_names(self) -> tuple[str, ...]:
        """Names of the files and folders that `export` writes."""
        return ("pipeline",)

    @property
    def facts(self) -> dict[str, str]:
        """What `diffcore info` prints about the network, by the name of the fact."""
        return {}

    def tokenize(self, texts: Sequence[str], negative: str, size: int) -> Any:
        """Tokenise prompts for a network that contains its text encoders and trains them.

        Args:
            texts: K prompts.
            negative: text of the null condition; "": the empty prompt.
            size: height and width of the images in pixels.

        Returns:
            The bank of tokens (`Prompts`) that labels index; None if the network takes encoded
            prompts.
        """
        return None

    def check_captions(self, texts: Sequence[str]) -> None:
        """Raise ValueError if captions do not fit what is trained; by default they do.

        Args:
            texts: captions of the training data; none if it has no captions.
        """
        return

    def export(self, folder: str | Path, process: Process) -> None:
        """Write the network into a folder, in the format of the other library.

        Args:
            folder: folder of the run.
            process: process that the network was trained on.

        Raises:
            ValueError: the format cannot express the process; the message states the reason.
        """
        raise NotImplementedError

    def exported_parts(self, folder: str | Path) -> Any:
        """The parts of the exported pipeline, with this network as one of them.

        Args:
            folder: folder that `export` has written to.

        Returns:
            The network and the other parts of the pipeline, ready for sampling.
        """
        raise NotImplementedError


class NetworkAdapter(nn.Module):
    """A network around another one, its submodule `network`, which it gives further inputs.

    A run that trains it can start from the weights of the other network alone; its own weights then
    stay at their initial values.
    """

    network: nn.Module


def find_learned_levels(network: nn.Module | None) -> LearnedLevels | None:
    """The part of a network that contains learned levels.

    Args:
        network: network of a denoiser, possibly inside wrappers.

    Returns:
        The module, or None for shared levels.
    """
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return next((each for each in modules if isinstance(each, LearnedLevels)), None)


def frozen_hash(network: nn.Module) -> str:
    """Hash of the frozen weights of a network.

    Returns:
        The network's `content_hash`, or "" if it is not an `ExportableNetwork`.
    """
    network = unwrap(network)
    return network.content_hash if isinstance(network, ExportableNetwork) else ""


def keep_trained_state(network: nn.Module) -> None:
    """Leave frozen parameters and all buffers out of the state_dict of a network.

    Args:
        network: network whose frozen weights come from elsewhere. It then loads a state without
            them.
    """
    network.register_state_dict_post_hook(_drop_frozen)
    network.register_load_state_dict_post_hook(_accept_missing_frozen)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    """Remove the frozen weights from a state_dict."""
    for name in _frozen(module):
        state.pop(prefix + name, None)


def _accept_missing_frozen(module: nn.Module, keys: Any) -> None:
    """After loading a state without frozen weights, do not report them as missing."""
    frozen = tuple(_frozen(module))
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(frozen)]


def _frozen(module: nn.Module) -> list[str]:
    """Names of the parameters that are not trained, and of all buffers."""
    parameters = [name for name, value in module.named_parameters() if not value.requires_grad]
    return parameters + [name for name, _ in module.named_buffers()]


def leave_label_dropout(network: nn.Module) -> None:
    """Let the label embeddings of a DiT drop no labels: the process drops them, by key.

    They would drop a second share of them, which `Process.dropout` does not record. The DiT of
    diffusers and that of Peebles & Xie (2212.09748) drop labels in `token_drop`, with the share
    `dropout_prob`; the row of the null label stays.

    Args:
        network: any module; changed in place.
    """
    each: Any
    for each in network.modules():
        if hasattr(each, "token_drop") and hasattr(each, "dropout_prob"):
            each.dropout_prob = 0.0


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside of `torch.compile`, DataParallel and DistributedDataParallel.

    Args:
        network: any module.

    Returns:
        The module of the user's class, which shares its weights with `network`.
    """
    while True:
        if isinstance(network, WRAPPERS):
            network = network.module
        elif (compiled := network._modules.get("_orig_mod")) is not None:
            network = compiled
        else:
            return network


def without_labels(network: nn.Module) -> nn.Module:
    """The `LabelWrapper` that leaves a network as it is.

    Returns:
        The network itself.
    """
    return network


def class_name(network: nn.Module) -> str:
    """The name of a network's class, for messages; not that of its wrapper (`unwrap`)."""
    return type(unwrap(network)).__name__


def find_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network: the units that are compiled, checkpointed or sharded one by one.

    They are the children with parameters of the outermost `nn.ModuleList` and `nn.ModuleDict`; in
    a network without one, of the outermost `nn.Sequential`. A list of lists is one list. What lies
    between the lists, such as an embedding of the time, belongs to no block.

    Args:
        network: any module, which may be wrapped (`unwrap`).

    Returns:
        The blocks by their name in the unwrapped network, in its order; empty if the network has
        no such container.

    Example:
        >>> network = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.SiLU()])})
        >>> list(find_blocks(network))
        ['layers.0']
    """
    network = unwrap(network)
    for containers in ((nn.ModuleList, nn.ModuleDict), (nn.Sequential,)):
        found = dict(_children_of_containers(network, containers, "", type(network) in containers))
        if found:
            return found
    return {}


def _children_of_containers(
    module: nn.Module, containers: tuple[type, ...], prefix: str, is_inside: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the blocks below a module; `is_inside` a container each child is one."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if type(child) in containers:  # a subclass with a forward of its own is a block
            yield from _children_of_containers(child, containers, f"{path}.", True)
        elif not is_inside:
            yield from _children_of_containers(child, containers, f"{path}.", False)
        elif next(child.parameters(), None) is not None:
            yield path, child


def network_config(network: nn.Module) -> Mapping[str, Any]:
    """The config of a network of diffusers.

    Args:
        network: any module, which may be wrapped (`unwrap`).

    Returns:
        A mapping, which is empty if the network has no config.
    """
    config = getattr(unwrap(network), "config", None)
    return config if isinstance(config, Mapping) else {}


_LARGEST: WeakKeyDictionary[nn.Module, ref[nn.Parameter]] = WeakKeyDictionary()
"""Network -> its largest parameter that is not quantised, whose present dtype is read."""


def evaluation_dtype(network: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype in which a network is evaluated.

    It is that of the largest floating-point parameter of at least 16 bits: quantised weights
    (integers, float8) are converted before they are used, and a table or a norm may be kept in
    float32 beside weights in half precision. If diffusers casts the weights layer by layer
    (`enable_layerwise_casting`), it is the dtype to which it casts them.

    Args:
        network: any module.
        default: dtype for a network without such a parameter.

    Returns:
        The dtype to which the network's input is converted.
    """
    if not network._parameters and not network._modules:
        return default
    is_compiling = torch.compiler.is_compiling()  # then this is evaluated once, and needs no cache
    reference = None if is_compiling else _LARGEST.get(network)
    largest = None if reference is None else reference()
    if largest is None or not _is_unquantised(largest):
        if (computed := _layerwise_dtype(network)) is not None:
            return computed
        largest = _largest_parameter(network)
        if largest is None:
            return default
        if not is_compiling:
            _LARGEST[network] = ref(largest)
    return largest.dtype


def _largest_parameter(network: nn.Module) -> nn.Parameter | None:
    """The largest parameter that is not quantised, or None."""
    largest = None
    for parameter in network.parameters():
        if _is_unquantised(parameter) and (largest is None or parameter.numel() > largest.numel()):
            largest = parameter
    return largest


def _is_unquantised(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.itemsize >= 2


def _layerwise_dtype(network: nn.Module) -> torch.dtype | None:
    """The dtype to which diffusers converts stored weights before a layer uses them, or None."""
    for module in network.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None and (hook := hooks.get_hook("layerwise_casting")) is not None:
            return hook.compute_dtype
    return None
