"""Beta tables: ᾱ_i = Π_{j≤i} (1 - β_j), α = √ᾱ, for indices i = 0 .. T-1, made continuous.

Index i stands at t = (i+1)/T, so t = 0 is clean and t = 1 the last entry. λ is exact at the indices and linear in t
between them; from the clean end to index 0, σ/α is linear in t.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffcore.schedules.base import Scaling, Schedule, check_scaling

Betas = Literal["linear", "scaled_linear", "cosine"]


@dataclass(frozen=True)
class Discrete(Schedule):
    """λ_i = ln ᾱ_i - ln(1 - ᾱ_i) of a beta table.

    linear: β from `start` to `end` (DDPM, 2006.11239: 1e-4 to 0.02); scaled_linear: √β linear (LDM, 2112.10752:
    0.00085 to 0.012); cosine: ᾱ(t) = cos²(π/2 (t+s)/(1+s)) with s = 0.008 and β ≤ 0.999 (iDDPM, 2102.09672, eq. 17).

    Args:
        betas: the form of the table.
        steps: T, at least 2.
        start: first β of the linear forms.
        end: last β of the linear forms.
        scaling: vp, ve or flow.
    """

    betas: Betas = "linear"
    steps: int = 1000
    start: float = 1e-4
    end: float = 0.02
    scaling: Scaling = field(default="vp", kw_only=True)

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, expected a table of at least 2 levels")
        if not 0 < self.start <= self.end < 1:
            raise ValueError(f"start and end are {self.start} and {self.end}, expected 0 < start ≤ end < 1")
        check_scaling(self.scaling)
        self._table  # an unknown form fails here

    @cached_property
    def _table(self) -> Tensor:
        log_alpha_bar = torch.log1p(-self._betas()).cumsum(0)
        return log_alpha_bar - (-torch.expm1(log_alpha_bar)).log()

    def _betas(self) -> Tensor:
        match self.betas:
            case "linear":
                return torch.linspace(self.start, self.end, self.steps, dtype=torch.float64)
            case "scaled_linear":
                return torch.linspace(self.start**0.5, self.end**0.5, self.steps, dtype=torch.float64) ** 2
            case "cosine":
                t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
                alpha_bar = ((t + 0.008) / 1.008 * (torch.pi / 2)).cos() ** 2
                return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        raise ValueError(f"betas is {self.betas!r}, expected linear, scaled_linear or cosine")

    def _logsnr(self, t: Tensor) -> Tensor:
        table, x = self._table, _snap(t * self.steps)
        i = x.floor().clamp(1, self.steps - 1).long()  # between indices i-1 and i
        inside = torch.lerp(table[i - 1], table[i], x - i)
        return torch.where(x < 1, table[0] - 2 * x.log(), inside)

    def _time(self, logsnr: Tensor) -> Tensor:
        table, i = self._table, self._segment(logsnr)
        left, right = table[i - 1], table[i]
        inside = i + ((left - logsnr) / (left - right)).clamp(max=1)
        return torch.where(logsnr > table[0], ((table[0] - logsnr) / 2).exp(), inside) / self.steps

    def _density(self, logsnr: Tensor) -> Tensor:
        table, i = self._table, self._segment(logsnr)
        inside = torch.where(logsnr < table[-1], 0.0, 1 / (table[i - 1] - table[i]))
        return torch.where(logsnr > table[0], ((table[0] - logsnr) / 2).exp() / 2, inside) / self.steps

    def _segment(self, logsnr: Tensor) -> Tensor:
        """I such that λ lies between indices i-1 and i of the table."""
        above = torch.searchsorted(-self._table, -logsnr.contiguous(), right=True)
        return above.clamp(1, self.steps - 1)


def _snap(x: Tensor) -> Tensor:
    """X with rounding errors around integers removed: (k/T)·T is k, and the table is exact there."""
    return torch.where((x - x.round()).abs() < 1e-9, x.round(), x)
