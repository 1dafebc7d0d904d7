"""Beta tables as continuous schedules: ᾱ_i = Π_{j≤i} (1 - β_j), α = √ᾱ, i = 0 .. T-1.

Index i is at t = (i+1)/T, so that t = 0 is clean and t = 1 is the last entry. λ is exact at the
indices and linear in t between them. From the clean end to index 0, σ/α is linear in t. If the last
entry is ᾱ = 0, α/σ is linear in t between the last two indices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from diffcore.schedules.base import Scaling, Schedule, check_scaling

__all__ = ["Discrete"]

MAXIMUM_LEVELS = 1_000_000
"""Largest table: a file that declares a larger one takes no memory."""

Form = Literal["linear", "scaled_linear", "cosine", "sigmoid"]


@dataclass(frozen=True)
class Discrete(Schedule):
    """λ_i = ln ᾱ_i - ln(1 - ᾱ_i) of a beta table, ᾱ_i = Π_{j≤i} (1 - β_j).

    The betas are given one by one or by a form:

    - linear: β from `start` to `end` (DDPM, 2006.11239: 1e-4 to 0.02).
    - scaled_linear: √β linear (LDM, 2112.10752: 0.00085 to 0.012).
    - sigmoid: β = start + (end - start) sigmoid(linspace(-6, 6, T)) (GeoDiff, 2203.02923).
    - cosine: ᾱ(t) = cos²(π/2 (t+s)/(1+s)) with s = 0.008 and β ≤ 0.999 (iDDPM, 2102.09672, eq. 17);
      `start` and `end` have no effect.

    A last β of 1 is zero terminal SNR: λ(1) = -inf, and between the last two indices α/σ decreases
    linearly to 0, the mirror image of the clean end. Such a table describes a network that was
    trained on it; `ZeroTerminalSNR` transforms any other table to one.

    Args:
        betas: form of the table (linear, scaled_linear, cosine or sigmoid), or its β_i, each within
            (0, 1); the last may be 1.
        steps: number of entries T, at least 2; None: 1000 for a form, else the number of betas.
        start: first β of linear and scaled_linear, lower asymptote of sigmoid; within (0, end].
        end: last β of linear and scaled_linear, upper asymptote of sigmoid; within [start, 1).
        scaling: vp, ve or flow.

    Raises:
        ValueError: The form is unknown, a β is out of bounds or too small to lower ᾱ, or `steps`
            contradicts the table.
    """

    betas: Form | tuple[float, ...] = "linear"
    steps: int | None = None
    start: float = 1e-4
    end: float = 0.02
    scaling: Scaling = field(default="vp", kw_only=True)

    def __post_init__(self) -> None:
        check_scaling(self.scaling)
        if isinstance(self.betas, str):
            self._check_form()
            object.__setattr__(self, "steps", 1000 if self.steps is None else self.steps)
        else:
            object.__setattr__(self, "betas", tuple(map(float, self.betas)))
            object.__setattr__(self, "steps", len(self.betas) if self.steps is None else self.steps)
            self._check_betas(self.betas)
        self._check_length()
        self._check_decreasing()

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Sequence[float] | Tensor, scaling: Scaling = "vp"
    ) -> "Discrete":
        """Build the table with the given ᾱ: β_i = (ᾱ_{i-1} - ᾱ_i) / ᾱ_{i-1}, ᾱ_{-1} = 1.

        λ_i is that of the given ᾱ_i to 1e-12. The precision of ᾱ itself limits λ further: 1 - ᾱ is
        known to 3e-8 in float32, which is an error of 3e-8 / (1 - ᾱ) in λ (3e-4 at the first level
        of DDPM), and of 1e-16 / (1 - ᾱ) in float64. Betas keep their digits at every level: prefer
        them where they exist.

        Args:
            alphas_cumprod: (T,) ᾱ_i within [0, 1), strictly decreasing; the last may be 0.
            scaling: vp, ve or flow.

        Returns:
            A table of T levels.

        Raises:
            ValueError: An ᾱ is out of bounds or does not decrease; the message contains its index.
        """
        bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        if (bad := ~((bar >= 0) & (bar < before))).any():
            i = int(bad.int().argmax())
            raise ValueError(
                f"alphas_cumprod[{i}] is {bar[i].item()} after {before[i].item()}, expected ᾱ that "
                "decrease strictly from below 1 to at least 0"
            )
        return cls(tuple(((before - bar) / before).tolist()), scaling=scaling)

    def _check_form(self) -> None:
        if self.betas not in get_args(Form):
            raise ValueError(
                f"betas is {self.betas!r}, expected one of {', '.join(get_args(Form))}, or a tuple "
                "of β"
            )
        if not 0 < self.start <= self.end < 1:
            raise ValueError(
                f"start and end are {self.start} and {self.end}, expected 0 < start ≤ end < 1"
            )

    def _check_betas(self, betas: tuple[float, ...]) -> None:
        if self.steps != len(betas):
            raise ValueError(
                f"steps is {self.steps}, but betas has {len(betas)} entries: leave steps out"
            )
        for i, beta in enumerate(betas):
            if not (0 < beta < 1 or (beta == 1 and i == len(betas) - 1)):
                raise ValueError(
                    f"betas[{i}] is {beta}, expected 0 < β < 1; only the last may be 1 "
                    "(ZeroTerminalSNR transforms a table to one that ends there)"
                )

    def _check_length(self) -> None:
        if self.steps is None or self.steps < 2:
            raise ValueError(f"steps is {self.steps}, expected a table of at least 2 levels")
        if self.steps > MAXIMUM_LEVELS:
            raise ValueError(f"steps is {self.steps}, expected at most {MAXIMUM_LEVELS:,} levels")

    def _check_decreasing(self) -> None:
        if (flat := self._table.diff() >= 0).any():
            i = int(flat.int().argmax()) + 1
            raise ValueError(
                f"betas[{i}] is {self._betas()[i].item()}, too small to decrease ᾱ in float64: "
                "give a larger one"
            )

    @cached_property
    def _table(self) -> Tensor:
        """λ_i of the T indices."""
        log_alpha_bar = torch.log1p(-self._betas()).cumsum(0)
        return log_alpha_bar - (-torch.expm1(log_alpha_bar)).log()

    @cached_property
    def _finite(self) -> Tensor:
        """The finite λ_i, between which λ is linear: all T, or T-1 if the last is -inf."""
        return self._table if self._table[-1] > -torch.inf else self._table[:-1]

    def _betas(self) -> Tensor:
        T = cast("int", self.steps)
        match self.betas:
            case "linear":
                return torch.linspace(self.start, self.end, T, dtype=torch.float64)
            case "scaled_linear":
                return torch.linspace(self.start**0.5, self.end**0.5, T, dtype=torch.float64) ** 2
            case "sigmoid":
                share = torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()
                return self.start + (self.end - self.start) * share
            case "cosine":
                t = torch.arange(T + 1, dtype=torch.float64) / T
                alpha_bar = ((t + 0.008) / 1.008 * (torch.pi / 2)).cos() ** 2
                return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        return torch.tensor(self.betas, dtype=torch.float64)

    def _logsnr(self, t: Tensor) -> Tensor:
        table, T = self._finite, len(self._table)
        x = _snap(t * T)
        i = x.floor().clamp(1, len(table) - 1).long()  # between indices i-1 and i
        inside = torch.lerp(table[i - 1], table[i], x - i)
        inside = torch.where(x > len(table), table[-1] + 2 * (T - x).log(), inside)
        return torch.where(x < 1, table[0] - 2 * x.log(), inside)

    def _time(self, logsnr: Tensor) -> Tensor:
        table, T, i = self._finite, len(self._table), self._segment(logsnr)
        inside = i + (table[i - 1] - logsnr) / (table[i - 1] - table[i])
        inside = torch.where(logsnr < table[-1], T - self._beyond(logsnr), inside)
        return torch.where(logsnr >= table[0], ((table[0] - logsnr) / 2).exp(), inside) / T

    def _density(self, logsnr: Tensor) -> Tensor:
        table, T, i = self._finite, len(self._table), self._segment(logsnr)
        inside = 1 / (table[i - 1] - table[i])
        inside = torch.where(logsnr < table[-1], self._beyond(logsnr) / 2, inside)
        return torch.where(logsnr >= table[0], ((table[0] - logsnr) / 2).exp() / 2, inside) / T

    def _beyond(self, logsnr: Tensor) -> Tensor:
        """T - tT below the finite levels: α/σ relative to the last of them; 0 if all are finite."""
        table, T = self._finite, len(self._table)
        return (T - len(table)) * ((logsnr - table[-1]) / 2).exp()

    def _segment(self, logsnr: Tensor) -> Tensor:
        """Index i such that λ is between entries i-1 and i of the table."""
        above = torch.searchsorted(-self._finite, -logsnr.contiguous(), right=True)
        return above.clamp(1, len(self._finite) - 1)


def _snap(x: Tensor) -> Tensor:
    """Remove rounding errors near integers k ≥ 1: (k/T)·T becomes k, where the table is exact."""
    return torch.where(((x - x.round()).abs() < 1e-9) & (x > 0.5), x.round(), x)
