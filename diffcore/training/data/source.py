"""The data protocol of training: what a data set must provide, and what it may provide.

Any map-style torch `Dataset` whose items are x_0 or (x_0, label) is a data set: `as_data_source`
adapts it. A data set that augments, encodes, or has captions derives from `DataSource` and
overrides the members that it needs.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffcore.training.data.buckets.groups import Groups

if TYPE_CHECKING:
    from diffcore.training.data.order import DataOrder

__all__ = ["NOISE", "SIZES", "WEIGHT", "DataSource"]

WEIGHT = "weight"
"""Name of the extra that is the weight of the loss of a sample or of its pixels."""


NOISE = "noise"
"""Name of the extra that is the noise ε which the data pairs with x_0."""


SIZES = "sizes"
"""Name of the extra that holds the sizes and the crop of an image (`Crop.sizes`)."""


class DataSource(Dataset[Any]):
    """A map-style data set for training. Its items are x_0, (x_0, label) or (x_0, label, extras).

    x_0 is a float tensor of the shape and range of the process, or of the shape of its bucket in
    `groups`; the label is an integer in 0 .. classes - 1, or -1 for none. Extras are tensors by
    name, the same names in every item. The extra "weight" multiplies the loss: of shape (1, 1, 1)
    for the whole sample, or (1, H, W) for its pixels, a mask. The extra "noise", of the shape of
    x_0, is the ε of the sample in place of independent noise. The named conditions of the process
    are extras too. A subclass implements `__len__` and
    `__getitem__`; every other member has a default.
    """

    texts: tuple[str, ...] = ()
    """Captions; a label is an index into them. Empty: labels are classes, or there are none."""

    class_names: tuple[str, ...] | None = None
    """Names of the classes that labels index; () if there are none, None if unknown."""

    labels: Sequence[int] | Tensor | None = None
    """Label of each item, if known without reading the items. They are checked before the run."""

    groups: Groups | None = None
    """Buckets of items that share batches, and rates at which parts are read; None for neither."""

    inputs: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """Names and shapes of extras that the network which `label_wrapper` wraps receives in training.

    They are no conditions of the process: they have a default, with which the network is sampled.
    """

    is_stream: bool = False
    """True if items are read only in `order`; a subset or a mixture has another one."""

    has_masks: bool = False
    """True if the extra `weight` of each item has one number for each pixel of x_0."""

    has_noise: bool = False
    """True if the extra `noise` of each item is its ε (`FlowPairs`)."""

    is_latent: bool = False
    """True if x_0 are latents; a data set of latents also overrides `decode`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def item(self, index: int, seed: int, position: int) -> Any:
        """The item at a position of the run, with its augmentation.

        Args:
            index: index of the item in the data set.
            seed: seed of the run.
            position: number of samples of the run before this one; the key of everything random.

        Returns:
            x_0, (x_0, label) or (x_0, label, extras); by default `self[index]`.
        """
        return self[index]

    def order(self, seed: int, batch: int, accumulation: int, rank: int, world: int) -> "DataOrder":
        """The order in which a run reads the items.

        Args:
            seed: seed of the run.
            batch: size of the global batch.
            accumulation: number of micro-batches of a rank in a step.
            rank: index of the rank that reads.
            world: number of ranks.

        Returns:
            By default a keyed permutation of all items in every epoch, or that of their `groups`. A
            data set whose items cannot be read in any order returns an order of its own.
        """
        from diffcore.training.data.order import DataOrder

        return DataOrder(len(self), seed, batch, accumulation, rank, world, self.groups)

    @property
    def vae(self) -> Any:
        """Decoder of the latents, which a run writes into its pipeline; None without one."""
        return None

    @property
    def content_hash(self) -> str:
        """Hash of everything that the items are made of; "" if unknown.

        A run is not resumed on data with another hash.
        """
        return ""

    @property
    def encoder_hash(self) -> str:
        """Hash of the encoders of x_0 and of captions; "" without encoders."""
        return ""

    def prompts(self) -> Any:
        """Read the encoded captions.

        Returns:
            The bank (`Prompts`) that labels index; None without captions, or if the network
            encodes them.
        """
        return None

    @property
    def is_ready(self) -> bool:
        """True if items can be read; otherwise `prepare` makes them readable."""
        return True

    def prepare(self, device: torch.device, is_main_process: bool) -> None:
        """Make the items readable, before the network is built.

        The trainer calls it on one rank, which does the work, and then on the others.

        Args:
            device: device on which encoders run.
            is_main_process: True on the rank that does the work; on the others the work is done.
        """

    def label_wrapper(self, device: torch.device) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a network so that it accepts the labels of this data set.

        Args:
            device: device of the network.

        Returns:
            By default the identity. A data set with captions returns a wrapper that looks up the
            text embedding of a label. Only the wrapped network is trained and saved.
        """
        return lambda network: network

    def prompt_wrapper(
        self, prompts: Sequence[str], negative: str, device: torch.device
    ) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a text-conditioned network so that its labels are prompts.

        Args:
            prompts: K texts; prompt k is label k, and K the null label.
            negative: text of the null condition; "": the empty prompt.
            device: device of the network.

        Returns:
            The function. A data set with captions overrides this member.

        Raises:
            ValueError: The data has no captions.
        """
        raise ValueError(
            f"{type(self).__name__} has no captions and encodes no prompts: use labels in place of "
            "prompts"
        )

    def decode(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of x_0 (N, *shape); by default x_0 itself."""
        return x
