"""Rescaling of any schedule to zero terminal SNR, λ(1) = -inf."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffcore.schedules.base import Level
from diffcore.schedules.transforms import ScheduleWrapper

__all__ = ["ZeroTerminalSNR"]


@dataclass(frozen=True)
class ZeroTerminalSNR(ScheduleWrapper):
    """α' = (α - α_T) α_0 / (α_0 - α_T) in the vp scaling, so that λ'(1) = -inf and α'_0 = α_0.

    Lin et al. 2023 (2305.08891, Algorithm 1). α_T is the terminal level. α_0 is the first entry of
    a table, whose cleaner levels are unchanged, or α(0) of a continuous schedule.

    Args:
        inner: any schedule; one that ends at λ = -inf is unchanged.
    """

    @cached_property
    def _ends(self) -> tuple[Level, Level]:
        """The level that is unchanged (α_0) and the level that is mapped to α = 0 (α_T)."""
        return self.inner.cleanest, self.inner.level(1.0)

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α_0, 1 - α_0, α_T and the slope c = dα/dα' = (α_0 - α_T) / α_0."""
        logsnr = torch.tensor([level.logsnr for level in self._ends], dtype=torch.float64)
        (alpha_0, alpha_t), (rest_0, _) = _alpha(logsnr)
        return alpha_0, rest_0, alpha_t, (alpha_0 - alpha_t) / alpha_0

    def _logsnr(self, t: Tensor) -> Tensor:
        logsnr = self.inner.logsnr(t)
        alpha_0, rest_0, alpha_t, c = self._constants
        alpha, rest = _alpha(logsnr)
        scaled = _from_alpha((alpha - alpha_t) / c, (rest - rest_0 * alpha_t / alpha_0) / c)
        return torch.where(
            self._is_cleaner(logsnr), logsnr, torch.where(t == 1, -torch.inf, scaled)
        )

    def _time(self, logsnr: Tensor) -> Tensor:
        return torch.where(logsnr == -torch.inf, 1.0, self.inner.time(self._inner(logsnr)))

    def _density(self, logsnr: Tensor) -> Tensor:
        inner, c = self._inner(logsnr), self._constants[-1]
        slope = c * _alpha_rate(logsnr) / _alpha_rate(inner)  # dλ/dλ'
        density = self.inner.density(inner) * torch.where(self._is_cleaner(logsnr), 1.0, slope)
        return density.masked_fill(logsnr == -torch.inf, 0.0)

    def _inner(self, logsnr: Tensor) -> Tensor:
        """λ of the inner schedule from λ'."""
        alpha_0, rest_0, alpha_t, c = self._constants
        alpha, rest = _alpha(logsnr)
        inner = _from_alpha(alpha * c + alpha_t, rest * c + rest_0 * alpha_t / alpha_0)
        return torch.where(self._is_cleaner(logsnr), logsnr, inner)

    def _is_cleaner(self, logsnr: Tensor) -> Tensor:
        return logsnr >= self._ends[0].logsnr


def _alpha(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """α = √sigmoid(λ) and 1 - α = σ² / (1 + α), without cancellation."""
    alpha = logsnr.sigmoid().sqrt()
    return alpha, (-logsnr).sigmoid() / (1 + alpha)


def _from_alpha(alpha: Tensor, rest: Tensor) -> Tensor:
    """λ from α and 1 - α: ln α² - ln((1-α)(1+α))."""
    return 2 * alpha.log() - (rest * (1 + alpha)).log()


def _alpha_rate(logsnr: Tensor) -> Tensor:
    """2 dα/dλ = α σ² in the vp scaling."""
    return logsnr.sigmoid().sqrt() * (-logsnr).sigmoid()
