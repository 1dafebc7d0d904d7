"""Rescaling of any schedule to zero terminal SNR, λ(1) = -inf."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
    def _constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """ln α_T, ln((1-α_0) α_T / α_0) and ln c, c = dα/dα' = (α_0 - α_T) / α_0."""
        logsnr = torch.tensor([level.logsnr for level in self._ends], dtype=torch.float64)
        (alpha_0, alpha_t), (rest_0, _) = _log_alpha(logsnr)
        return alpha_t, rest_0 + alpha_t - alpha_0, (-(alpha_t - alpha_0).expm1()).log()

    def _logsnr(self, t: Tensor) -> Tensor:
        logsnr = self.inner.logsnr(t)
        alpha_t, rest_t, c = self._constants
        alpha, rest = _log_alpha(logsnr)
        scaled = _from_log_alpha(
            alpha + (-(alpha_t - alpha).exp()).log1p() - c,
            rest + (-(rest_t - rest).exp()).log1p() - c,
        )
        return torch.where(
            self._is_cleaner(logsnr), logsnr, torch.where(t == 1, -torch.inf, scaled)
        )

    def _time(self, logsnr: Tensor) -> Tensor:
        return torch.where(logsnr == -torch.inf, 1.0, self.inner.time(self._inner(logsnr)))

    def _density(self, logsnr: Tensor) -> Tensor:
        inner, c = self._inner(logsnr), self._constants[-1]
        slope = (c + _log_alpha_rate(logsnr) - _log_alpha_rate(inner)).exp()  # dλ/dλ'
        density = self.inner.density(inner) * torch.where(self._is_cleaner(logsnr), 1.0, slope)
        return density.masked_fill(logsnr == -torch.inf, 0.0)

    def _inner(self, logsnr: Tensor) -> Tensor:
        """λ of the inner schedule from λ'."""
        alpha_t, rest_t, c = self._constants
        alpha, rest = _log_alpha(logsnr)
        inner = _from_log_alpha(
            torch.logaddexp(alpha + c, alpha_t), torch.logaddexp(rest + c, rest_t)
        )
        return torch.where(self._is_cleaner(logsnr), logsnr, inner)

    def _is_cleaner(self, logsnr: Tensor) -> Tensor:
        return logsnr >= self._ends[0].logsnr


def _log_alpha(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """ln α = ln √sigmoid(λ) and ln(1 - α) = ln(σ² / (1 + α)), finite at every finite λ."""
    alpha = logsigmoid(logsnr) / 2
    return alpha, logsigmoid(-logsnr) - alpha.exp().log1p()


def _from_log_alpha(alpha: Tensor, rest: Tensor) -> Tensor:
    """λ from ln α and ln(1 - α): ln α² - ln((1-α)(1+α))."""
    return 2 * alpha - rest - alpha.exp().log1p()


def _log_alpha_rate(logsnr: Tensor) -> Tensor:
    """ln 2 dα/dλ = ln α σ² in the vp scaling."""
    return logsigmoid(logsnr) / 2 + logsigmoid(-logsnr)
