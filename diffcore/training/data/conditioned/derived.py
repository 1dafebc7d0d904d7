"""The base of data sets whose items have conditions that are computed from x_0."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from diffcore.training.data.adapters import WrappedSource, as_data_source
from diffcore.training.data.cache import hash_content
from diffcore.training.data.checks import split_item
from diffcore.training.data.order import DataOrder

__all__ = ["DerivedConditions"]


class DerivedConditions(WrappedSource):
    """The items of a data set, with conditions that are functions of (x_0, seed, position).

    An item that is read without a position, such as held-out data, has the conditions of seed 0 at
    its index.

    Args:
        data: data set of images.

    Raises:
        ValueError: The data are latents.
    """

    def __init__(self, data: Dataset[Any]) -> None:
        super().__init__(as_data_source(data))
        name = type(self).__name__
        if self.is_latent:
            raise ValueError(
                f"{name} computes conditions from pixels, but the data are latents: give the "
                "conditions of latents in a folder of images (LatentDataset.conditions)"
            )

    def __getitem__(self, index: int) -> Any:
        return self._with_conditions(self.source[index], index, 0, index)

    def item(self, index: int, seed: int, position: int) -> Any:
        """The item at a position of the run, with its conditions.

        Args:
            index: index of the item.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            x_0, the label, and the extras of the data with the conditions.
        """
        return self._with_conditions(self.source.item(index, seed, position), index, seed, position)

    def order(self, seed: int, batch: int, accumulation: int, rank: int, world: int) -> DataOrder:
        """The order of the data, which may be a stream's own."""
        return self.source.order(seed, batch, accumulation, rank, world)

    def _with_conditions(self, item: Any, index: int, seed: int, position: int) -> Any:
        x0, label, extras = split_item(item, index)
        return x0, label, {**extras, **self._derive(x0, seed, position)}

    def _derive(self, x0: Tensor, seed: int, position: int) -> dict[str, Tensor]:
        """The conditions of x_0 (C, H, W) by name."""
        raise NotImplementedError

    def _options(self) -> tuple[Any, ...]:
        """The options that determine the conditions."""
        raise NotImplementedError

    @property
    def content_hash(self) -> str:
        """Hash of the data and the options; "" if that of the data is unknown."""
        known = self.source.content_hash
        return hash_content(known, type(self).__name__, repr(self._options())) if known else ""
