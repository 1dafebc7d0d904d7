"""Schedules given as a curve of γ = α² (vp) or of a = σ/(α+σ) (flow) in t, with their densities.

Where a formula subtracts neighbouring values (the ends of a normalised curve), the difference is
written as a product, so that both tails keep their digits. An inverse without a closed form is a
bracketed root in logit t.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffcore.schedules.base import Scaling
from diffcore.schedules.distributions import Distribution
from diffcore.schedules.roots import invert_in_logit_time

__all__ = ["Beta", "Mode", "PowerCosine", "Sigmoid"]

HALF_PI = math.pi / 2


@dataclass(frozen=True)
class Sigmoid(Distribution):
    """γ(t) = (S(e/τ) - S(x/τ)) / (S(e/τ) - S(s/τ)), x = s + t(e-s), S the logistic function.

    With w = (e-s)/2τ and c = ln cosh(s/2τ) - ln cosh(e/2τ),

        λ(t) = ln sinh((1-t)w) - ln sinh(tw) + c
        p(λ) = 1 / w(coth(tw) + coth((1-t)w))

    Chen 2023 (2301.10972, Algorithm 1) without its clipping at 1e-9.

    Args:
        start: s, the argument x of the logistic function at t = 0.
        end: e > s, the argument x of the logistic function at t = 1.
        tau: τ > 0, the temperature; a larger value is closer to γ = 1 - t.
        scaling: vp, ve or flow.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_span(self.start, self.end, self.tau)
        if self._w > 300:
            raise ValueError(
                f"(end - start) / tau is {2 * self._w:g}, expected at most 600: a "
                "larger value is a step function of t"
            )

    @property
    def _w(self) -> float:
        return (self.end - self.start) / (2 * self.tau)

    @property
    def _c(self) -> float:
        return _log_cosh(self.start / (2 * self.tau)) - _log_cosh(self.end / (2 * self.tau))

    def _logsnr(self, t: Tensor) -> Tensor:
        return _log_sinh((1 - t) * self._w) - _log_sinh(t * self._w) + self._c

    def _time(self, logsnr: Tensor) -> Tensor:
        return _solve_sinh_ratio(logsnr - self._c, self._w).clamp(max=1)

    def _density(self, logsnr: Tensor) -> Tensor:
        z, w = logsnr - self._c, self._w
        t, rest = _solve_sinh_ratio(z, w), _solve_sinh_ratio(-z, w)  # rest = 1 - t, with its digits
        coth = 1 / (w * t).tanh() + 1 / (w * rest).tanh()
        return 1 / (w * coth)


@dataclass(frozen=True)
class PowerCosine(Distribution):
    """γ(t) = (y(x) - y(e)) / (y(s) - y(e)), y(x) = cos(πx/2)^2τ, x = s + t(e-s).

    p(λ) = γ(1-γ) / |dγ/dt|. Chen 2023 (2301.10972, Algorithm 1) without its clipping at 1e-9. The
    defaults s = 0, e = 1, τ = 1 are the schedule Cosine.

    Args:
        start: s within [0, e); the angle at t = 0 is πs/2.
        end: e within (s, 1]; the angle at t = 1 is πe/2.
        tau: τ > 0, half of the exponent.
        scaling: vp, ve or flow.
    """

    start: float = 0.0
    end: float = 1.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_span(self.start, self.end, self.tau)
        if not (self.start >= 0 and self.end <= 1):
            raise ValueError(
                f"start and end are {self.start} and {self.end}, expected numbers within [0, 1]"
            )

    @property
    def _width(self) -> float:
        return HALF_PI * (self.end - self.start)

    @property
    def _cos_s(self) -> float:
        return math.sin(HALF_PI * (1 - self.start))

    @property
    def _log_ratio(self) -> Tensor:
        """ln y(e) - ln y(s)."""
        width = torch.tensor(self._width, dtype=torch.float64)
        cos = math.sin(HALF_PI * (1 - self.end)) / self._cos_s
        if cos > 0.5:
            return self._log_y(width)
        return torch.full_like(width, 2 * self.tau * math.log(cos) if cos else -math.inf)

    def _logsnr(self, t: Tensor) -> Tensor:
        past, left = t * self._width, (1 - t) * self._width  # angles from s and to e
        below = -self._log_y(past).expm1()  # (y(s) - y(x)) / y(s)
        if self.end == 1:
            return 2 * self.tau * (left.sin() / self._cos_s).log() - below.log()
        slope = 1 / math.tan(HALF_PI * (1 - self.end))
        rise = 2 * self.tau * (slope * left.sin() - 2 * (left / 2).sin() ** 2).log1p()
        return self._log_ratio + rise + (-(-rise).expm1()).log() - below.log()

    def _log_y(self, past: Tensor) -> Tensor:
        """ln y(x) - ln y(s) at the angle `past` beyond πs/2."""
        fall = (
            2 * (past / 2).sin() ** 2 + math.tan(HALF_PI * self.start) * past.sin()
        )  # 1 - cos(πx/2) / cos(πs/2)
        return 2 * self.tau * (-fall).clamp(min=-1).log1p()

    def _time(self, logsnr: Tensor) -> Tensor:
        cos_s, sin_s = self._cos_s, math.sin(HALF_PI * self.start)
        cos_x, sin_x, fall = self._angle(self._log_y_of(logsnr))
        sin_past = fall * (cos_s + cos_x) / (sin_x * cos_s + cos_x * sin_s)
        past = torch.atan2(sin_past, cos_x * cos_s + sin_x * sin_s)
        return torch.where(fall == 0, 0.0, past / self._width).clamp(max=1)

    def _density(self, logsnr: Tensor) -> Tensor:
        log_y = self._log_y_of(logsnr)
        cos_x, sin_x, _ = self._angle(log_y)
        share = (self._log_gamma_span(logsnr) - log_y).exp()  # (y(x) - y(e)) / y(x)
        density = (-logsnr).sigmoid() * share * cos_x / (2 * self.tau * self._width * sin_x)
        return density.masked_fill(logsnr.isinf() | (sin_x == 0), 0.0)

    def _log_gamma_span(self, logsnr: Tensor) -> Tensor:
        """ln(y(x) - y(e)) - ln y(s)."""
        return torch.nn.functional.logsigmoid(logsnr) + (-self._log_ratio.expm1()).log()

    def _log_y_of(self, logsnr: Tensor) -> Tensor:
        """ln y(x) - ln y(s) at the level λ."""
        clean = ((-logsnr).sigmoid() * self._log_ratio.expm1()).log1p()
        noisy = torch.logaddexp(self._log_gamma_span(logsnr), self._log_ratio)
        return torch.where(logsnr > 0, clean, noisy)

    def _angle(self, log_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cos(πx/2), sin(πx/2) and cos(πs/2) - cos(πx/2), from ln y(x) - ln y(s)."""
        fall = -self._cos_s * (log_y / (2 * self.tau)).expm1()
        cos_x = self._cos_s * (log_y / (2 * self.tau)).exp()
        versine = 2 * math.sin(HALF_PI * self.start / 2) ** 2 + fall  # 1 - cos(πx/2)
        return cos_x, (versine * (1 + cos_x)).sqrt(), fall


@dataclass(frozen=True)
class Mode(Distribution):
    """σ/(α+σ) = a(t) = t - s(sin²(πt/2) - t), the mode sampling of SD3.

    λ(t) = 2 ln((1-a)/a), p(λ) = a(1-a) / 2a'(t). Esser et al. 2024 (2403.03206, eq. 20, with
    1 - u = t).

    Args:
        scale: s within [-1, 2/(π-2)], where a(t) is monotone: a is uniform for s = 0, denser in the
            middle for s > 0 and at the ends for s < 0; 1.29 is one of the values of the paper.
        scaling: vp, ve or flow.
    """

    scale: float = 1.29
    scaling: Scaling = field(default="flow", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"scale is {self.scale}, expected within [-1, {2 / (math.pi - 2):.4f}]: for "
                "other values a(t) is not monotone"
            )

    def _logsnr(self, t: Tensor) -> Tensor:
        return self._logsnr_of(t, 1 - t)

    def _time(self, logsnr: Tensor) -> Tensor:
        return invert_in_logit_time(self._logsnr_of, logsnr)

    def _density(self, logsnr: Tensor) -> Tensor:
        t = self._time(logsnr.abs())  # the density is symmetric, and t near 0 keeps its digits
        a, rest = (-logsnr / 2).sigmoid(), (logsnr / 2).sigmoid()
        slope = 1 + self.scale - self.scale * HALF_PI * (math.pi * t).sin()
        return (a * rest / (2 * slope)).masked_fill(a * rest == 0, 0.0)

    def _logsnr_of(self, t: Tensor, rest: Tensor) -> Tensor:
        return 2 * (self._blend(rest) / self._blend(t)).log()  # a(1-t) = 1 - a(t)

    def _blend(self, t: Tensor) -> Tensor:
        return t * (1 + self.scale) - self.scale * (HALF_PI * t).sin() ** 2


@dataclass(frozen=True)
class Beta(Distribution):
    """a = σ/(α+σ) ~ Beta(p, q): t is the distribution function of a, λ = 2 ln((1-a)/a).

    p(λ) = a^p (1-a)^q / 2B(p, q). p = q = 1 is Flow. Beta(1.5, 1) draws more noisy levels, as π0
    does (Black et al. 2024, 2410.24164, appendix B, without its cut-off).

    Args:
        p: exponent at the clean end, > 0; a larger value draws fewer clean levels.
        q: exponent at the noisy end, > 0; a larger value draws fewer noisy levels.
        scaling: vp, ve or flow.
    """

    p: float = 1.5
    q: float = 1.0
    scaling: Scaling = field(default="flow", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.p < math.inf and 0 < self.q < math.inf):
            raise ValueError(
                f"p and q are {self.p} and {self.q}, expected positive finite exponents"
            )

    def _logsnr(self, t: Tensor) -> Tensor:
        from scipy.special import betainccinv, betaincinv, betaln

        a = torch.as_tensor(betaincinv(self.p, self.q, t.numpy()))
        rest = torch.as_tensor(betainccinv(self.q, self.p, t.numpy()))  # 1 - a
        # t = a^p / pB(p, q) to rounding for a below e^-40, where scipy's inverse may be NaN.
        log_a = (t.log() + math.log(self.p) + float(betaln(self.p, self.q))) / self.p
        return torch.where(log_a < -40, -2 * log_a, 2 * (rest / a).log())

    def _time(self, logsnr: Tensor) -> Tensor:
        from scipy.special import betainc, betaincc

        a, rest = ((sign * logsnr / 2).sigmoid().numpy() for sign in (-1, 1))
        clean, noisy = (
            torch.as_tensor(betainc(self.p, self.q, a)),
            torch.as_tensor(betaincc(self.q, self.p, rest)),
        )
        return torch.where(logsnr > 0, clean, noisy)

    def _density(self, logsnr: Tensor) -> Tensor:
        from scipy.special import betaln

        log_a, log_rest = (torch.nn.functional.logsigmoid(sign * logsnr / 2) for sign in (-1, 1))
        return (self.p * log_a + self.q * log_rest - float(betaln(self.p, self.q))).exp() / 2


def _solve_sinh_ratio(z: Tensor, w: float) -> Tensor:
    """Solve ln sinh((1-t)w) - ln sinh(tw) = z for t: 2tw = ln(1 + 2 sinh w / (e^z + e^-w))."""
    return (2 * math.sinh(w) / (z.exp() + math.exp(-w))).log1p() / (2 * w)


def _log_sinh(x: Tensor) -> Tensor:
    return x + (-(-2 * x).expm1() / 2).log()


def _log_cosh(x: float) -> float:
    return abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)


def _check_span(start: float, end: float, tau: float) -> None:
    if not -math.inf < start < end < math.inf:
        raise ValueError(
            f"start and end are {start} and {end}, expected finite numbers with start < end"
        )
    if not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau}, expected a positive finite number")
