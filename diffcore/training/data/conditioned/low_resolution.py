"""The low resolution of each item as a condition: the data of super-resolution."""

from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset

from diffcore.training.data.conditioned.derived import DerivedConditions

__all__ = ["LowResolution"]


class LowResolution(DerivedConditions):
    """A data set whose items have their own low resolution as a condition.

        c(i, j) = 1/f² Σ_{k, l < f} x_0(f i + k, f j + l)

    The mean over the area of each pixel of c, which has the shape (C, H/f, W/f) and the range of
    x_0.

    Args:
        data: data set of images.
        factor: f, at least 2; height and width of x_0 are multiples of it.
        condition: name of the condition in the process.

    Raises:
        ValueError: The factor is below 2, or the data are latents.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = LowResolution(TensorDataset(torch.ones(3, 1, 8, 8)), factor=2)
        >>> x0, _, conditions = data[0]
        >>> conditions["low"].shape
        torch.Size([1, 4, 4])
    """

    def __init__(
        self,
        data: Dataset,  # type: ignore[type-arg]  # jsonargparse reads the bare class
        factor: int = 4,
        condition: str = "low",
    ) -> None:
        super().__init__(data)
        if factor < 2:
            raise ValueError(f"factor is {factor}, expected an integer of at least 2")
        self.factor, self.condition = factor, condition

    def _derive(self, x0: Tensor, seed: int, position: int) -> dict[str, Tensor]:
        if x0.ndim != 3 or any(side % self.factor for side in x0.shape[1:]):
            raise ValueError(
                f"x_0 has the shape {tuple(x0.shape)}, expected (C, H, W) with H and W multiples "
                f"of the factor {self.factor}: resize the images, or set factor"
            )
        return {self.condition: avg_pool2d(x0, self.factor)}

    def _options(self) -> tuple[Any, ...]:
        return self.factor, self.condition
