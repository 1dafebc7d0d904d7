"""Thin modules that give named conditions to a network: as channels beside x, or with the time.

A condition that the network's own forward accepts needs none of them: an embedding named
`encoder_hidden_states` goes to the cross-attention of a UNet2DConditionModel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffcore.core.network import NetworkAdapter, class_name, network_config

__all__ = ["ConcatenatedChannels", "EmbeddedVectors"]


class _ConditionedNetwork(NetworkAdapter):
    """A network that receives named conditions through this module.

    Args:
        network: function that builds the network.
        shapes: name of each condition -> shape of its learned absent value, which broadcasts.
        learned: names of the conditions whose absent value is learned.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        shapes: Mapping[str, tuple[int, ...]],
        learned: Sequence[str],
    ) -> None:
        super().__init__()
        if unknown := sorted(set(learned) - set(shapes)):
            raise ValueError(f"learned has {unknown[0]!r}, expected names among {list(shapes)}")
        self.network = network()
        self.config = network_config(self.network)
        self.absent = nn.ParameterDict({name: torch.zeros(shapes[name]) for name in learned})

    def _take(self, arguments: dict[str, Any], name: str) -> Tensor:
        """Remove a condition (B, *shape) from the arguments of a call, its absent value put in."""
        mask: Tensor | None = arguments.pop(f"{name}_absent", None)
        if name not in arguments or (mask is None) != (name not in self.absent):
            raise ValueError(
                f"{type(self).__name__} expects the condition {name}, and with its flags "
                f"{name}_absent if and only if it is in `learned` ({list(self.absent)}): give the "
                "process a condition of this name, whose `absent` is learned in the same case"
            )
        value: Tensor = arguments.pop(name)
        if mask is None:
            return value
        return torch.where(mask.view(-1, *[1] * (value.ndim - 1)), self.absent[name], value)


class ConcatenatedChannels(_ConditionedNetwork):
    """A network that sees images beside x: conditions concatenated to x in channels.

        F = network(concatenate(x, c_1, ..., c_n), time, ...)

    A condition of another size than x is scaled to it by the nearest neighbour: the low resolution
    of super-resolution, a mask of latents.

    Args:
        network: class and options of a network with C + Σ C_i input and C output channels.
        channels: number of channels C_i of each condition, by name, in this order.
        learned: names of the conditions whose absent value is learned, one number a channel.
        widen: true if the network has C input channels: its first convolution `conv_in` then
            receives further input channels of weight 0, so that it starts as the network without
            conditions.

    Raises:
        ValueError: the channels do not fit the network.

    Example:
        >>> class Sum(nn.Module):
        ...     def forward(self, x, timestep):
        ...         return x.sum(1, keepdim=True)
        >>> network = ConcatenatedChannels(Sum, {"mask": 1})
        >>> x, mask = torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 4, 4)
        >>> network(x, torch.zeros(2), mask=mask).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        channels: dict[str, int],
        learned: Sequence[str] = (),
        widen: bool = False,
    ) -> None:
        if not channels or min(channels.values()) < 1:
            raise ValueError(
                f"channels is {channels}, expected the number of channels of each condition by "
                "name, such as {'image': 3}"
            )
        shapes = {name: (count, 1, 1) for name, count in channels.items()}
        super().__init__(network, shapes, learned)
        self.channels, extra = channels, sum(channels.values())
        if widen:
            _widen_input(self.network, extra)
            self.config = network_config(self.network)
        inputs: Any = self.config.get("in_channels")
        outputs: Any = self.config.get("out_channels")
        if None not in (inputs, outputs) and inputs != outputs + extra:
            raise ValueError(
                f"the network has {inputs} input and {outputs} output channels, and {extra} "
                f"channels are concatenated: set in_channels to {outputs + extra}, or widen: true"
            )

    def forward(self, x: Tensor, timestep: Tensor, **arguments: Any) -> Any:
        """The network's output for x and the conditions.

        Args:
            x: noisy samples (B, C, ...).
            timestep: time input (B,).
            **arguments: the conditions (B, C_i, ...) by name, and other arguments of the network.

        Returns:
            The output of the network, of the shape of x.

        Raises:
            ValueError: a condition is missing, or has another number of channels.
        """
        parts = [x]
        for name, count in self.channels.items():
            value = self._take(arguments, name)
            if value.ndim != x.ndim or value.shape[1] != count:
                raise ValueError(
                    f"condition {name} has the shape {tuple(value.shape[1:])}, expected {count} "
                    f"channels and {x.ndim - 2} axes of space: set its shape in the process"
                )
            is_same = value.shape[2:] == x.shape[2:]
            parts.append(value if is_same else interpolate(value, x.shape[2:], mode="nearest"))
        return self.network(torch.cat(parts, 1), timestep, **arguments)


class EmbeddedVectors(_ConditionedNetwork):
    """A network to whose time embedding an embedding of each vector is added.

        e = Σ_i W'_i silu(W_i c_i + b_i) + b'_i,   F = network(x, time, class_labels=e)

    Args:
        network: class and options of a UNet of diffusers with class_embed_type: identity, which
            adds `class_labels` to its time embedding; or any network with such an argument.
        sizes: number of elements of each vector, by name; 1 for a number.
        width: width of the time embedding; 0: as the network's config determines it.
        classes: number of classes, whose embeddings are added too; the null label has its own.
        learned: names of the conditions whose absent value is learned.

    Raises:
        ValueError: the network adds no vector to its time embedding, or the width is unknown.

    Example:
        >>> class Embedded(nn.Module):
        ...     def forward(self, x, time, class_labels):
        ...         return class_labels
        >>> network = EmbeddedVectors(Embedded, {"brightness": 1}, width=16)
        >>> network(torch.zeros(2, 3), torch.zeros(2), brightness=torch.ones(2, 1)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        sizes: dict[str, int],
        width: int = 0,
        classes: int = 0,
        learned: Sequence[str] = (),
    ) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise ValueError(
                f"sizes is {sizes}, expected the number of elements of each vector by name, such "
                "as {'brightness': 1}"
            )
        super().__init__(network, {name: (size,) for name, size in sizes.items()}, learned)
        if "class_embed_type" in self.config and self.config["class_embed_type"] != "identity":
            raise ValueError(
                f"the network has class_embed_type {self.config['class_embed_type']}, expected "
                "identity, with which it adds a vector to its time embedding"
            )
        width = width or self._time_width()
        self.embeddings = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
                for name, size in sizes.items()
            }
        )
        self.labels = nn.Embedding(classes + 1, width) if classes else None

    def _time_width(self) -> int:
        """Width of the time embedding by the config of a UNet of diffusers."""
        blocks = self.config.get("block_out_channels")
        if not blocks:
            raise ValueError(
                f"{class_name(self.network)} has no config with block_out_channels: set width to "
                "the width of its time embedding"
            )
        return int(self.config.get("time_embedding_dim") or 4 * blocks[0])

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **arguments: Any
    ) -> Any:
        """The network's output for x and the conditions.

        Args:
            x: noisy samples (B, *shape).
            timestep: time input (B,).
            class_labels: labels (B,), if the network has classes.
            **arguments: the vectors (B, size) by name, and other arguments of the network.

        Returns:
            The output of the network, of the shape of x.

        Raises:
            ValueError: a condition is missing, or the labels do not fit.
        """
        if (class_labels is None) != (self.labels is None):
            raise ValueError(
                "class labels are "
                f"{'missing' if class_labels is None else 'passed'}: set the option classes of "
                "EmbeddedVectors to the classes of the process"
            )
        terms = [embed(self._take(arguments, name)) for name, embed in self.embeddings.items()]
        if self.labels is not None:
            terms.append(self.labels(class_labels))
        return self.network(x, timestep, class_labels=sum(terms[1:], terms[0]), **arguments)


@torch.no_grad()
def _widen_input(network: Any, extra: int) -> None:
    """Give the first convolution of a UNet further input channels of weight 0.

    Raises:
        ValueError: the network has no convolution `conv_in`, or it has groups.
    """
    owner: Any = network if hasattr(network, "conv_in") else getattr(network, "network", None)
    first: Any = getattr(owner, "conv_in", None)
    if not isinstance(first, nn.Conv2d) or first.groups != 1:
        raise ValueError(
            f"{class_name(network)} has no convolution conv_in of one group to widen: build it "
            "with the input channels of the conditions, and set widen: false"
        )
    count, has_bias = first.in_channels, first.bias is not None
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    options: Any = {name: getattr(first, name) for name in names}
    wide: Any = nn.Conv2d(count + extra, first.out_channels, bias=has_bias, **options)
    wide.weight.zero_()
    wide.weight[:, :count] = first.weight
    if has_bias:
        wide.bias.copy_(first.bias)
    owner.conv_in = wide.to(first.weight)
    if hasattr(owner, "register_to_config"):
        owner.register_to_config(in_channels=count + extra)
