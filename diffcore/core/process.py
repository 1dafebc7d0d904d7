"""The process record: the description of a network's training that its weights do not contain.

It is stored as JSON beside the weights.
"""

import json
import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffcore.core.conditions import LABEL, RESERVED, ConditionRecord
from diffcore.core.estimate import Estimate, check_estimate_of_process
from diffcore.core.prediction import PredictionType
from diffcore.io.files import write_file
from diffcore.io.network_size import check_memory
from diffcore.io.plain_data import hash_data, read_json, without_defaults
from diffcore.io.specs import from_spec, to_spec
from diffcore.schedules import Cosine, Level, LogLinear, Real, Schedule
from diffcore.schedules.base import LEVEL_TOLERANCE

__all__ = ["OPTIONAL", "LevelType", "Process", "TimeConditioning", "TimeVariable", "VarianceType"]

FLOAT32_LOGSNR = 170.0
"""Bound of |λ| within which σ/α and α/σ are normal numbers of float32."""

OPTIONAL: dict[str, Any] = {
    "conditions": {},
    "variance": "fixed",
    "estimate": "posterior_mean",
    "levels": "shared",
}
"""Fields that a record contains only if they differ from these defaults."""

TimeVariable = Literal["index", "t", "blend", "logsnr", "sigma"]

LevelType = Literal["shared", "learned"]
"""Whether the elements of x share one noise level, or each has its own, which is learned."""

VarianceType = Literal["fixed", "learned"]
"""Whether a network also outputs the variance of a step."""


@dataclass(frozen=True)
class TimeConditioning:
    """The number by which a network is conditioned on its noise level.

        index     scale·t - 1       index into a table of `scale` levels (diffusers: 0 .. 999)
        t         scale·t
        blend     scale·a           a = σ/(α+σ) of any schedule (diffusers' flow models: 0 .. 1000)
        logsnr    scale·λ           scale = -1/8 is EDM's c_noise = ln(σ/α)/4
        sigma     scale·σ/α

    Args:
        variable: quantity that the network receives: index, t, blend, logsnr or sigma.
        scale: factor of the quantity, finite and not 0.
        clamp: bound on |λ| for logsnr and sigma; inf, the default, does not clamp, and then these
            two variables cannot express λ = ±inf.

    Raises:
        ValueError: the variable is unknown, or the scale or the clamp is out of range.
    """

    variable: TimeVariable = "index"
    scale: float = 1000.0
    clamp: float = math.inf

    def __post_init__(self) -> None:
        if self.variable not in get_args(TimeVariable):
            raise ValueError(
                f"variable is {self.variable!r}, expected one of "
                f"{', '.join(get_args(TimeVariable))}"
            )
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale is {self.scale}, expected a finite factor other than 0")
        if not self.clamp > 0:
            raise ValueError(f"clamp is {self.clamp}, expected a positive bound on |λ|")

    @property
    def can_express_pure_noise(self) -> bool:
        """Whether the number is finite at λ = -inf."""
        return self.variable in ("index", "t", "blend") or self.clamp < math.inf

    @property
    def can_express_clean(self) -> bool:
        """Whether the number is finite at λ = inf."""
        return self.variable != "logsnr" or self.clamp < math.inf

    def __call__(self, level: Level) -> Real:
        """The conditioning number of a level, of the shape of the level."""
        match self.variable:
            case "index":
                return self.scale * level.t - 1
            case "t":
                return self.scale * level.t
            case "blend":
                return self.scale * level.blend
            case "logsnr":
                return self.scale * self._clamped(level.logsnr)
            case "sigma":
                return self.scale * _exp(self._clamped(level.logsnr) / -2)

    def level(self, schedule: Schedule, number: Real) -> Level:
        """The level of `schedule` with a given conditioning number, of the shape of the number.

        It is the inverse of `__call__` for levels within the clamp.

        Args:
            schedule: schedule of the level.
            number: conditioning number, or a tensor of them.
        """
        number = number.to("cpu", torch.float64) if isinstance(number, Tensor) else number
        value = number / self.scale
        match self.variable:
            case "index":
                return schedule.level((number + 1) / self.scale)
            case "t":
                return schedule.level(value)
            case "blend":
                return schedule.at_blend(value)
            case "logsnr":
                return schedule.at(value)
            case "sigma":
                return schedule.at(_log(value) * -2)

    def _clamped(self, logsnr: Real) -> Real:
        """λ within [-clamp, clamp]."""
        if isinstance(logsnr, Tensor):
            return logsnr.clamp(-self.clamp, self.clamp)
        return min(max(logsnr, -self.clamp), self.clamp)


@dataclass(frozen=True)
class Process:
    """The diffusion process of a network: x = α x_0 + σ ε, its output and its time conditioning.

    Args:
        schedule: noise levels of training.
        prediction: quantity that the network outputs: epsilon, sample, v_prediction,
            flow_prediction or edm.
        time: number by which the network is conditioned on the noise level.
        shape: shape of one x_0, channels first.
        low: lower end of the data's range.
        high: upper end of the data's range.
        sigma_data: standard deviation of the data, for edm and for the scale of the first sample.
        classes: number of class labels, 0 for none; the label `classes` itself is the null label.
        dropout: fraction of training samples whose label is replaced by the null label, in [0, 1].
        conditions: further conditions by name, which is that of the argument of the network's
            forward; each has its own shape, dropout and absent value.
        variance: fixed, or learned if the network has 2C output channels for C channels of x: the
            second half is 2v - 1, with v of the variance β̃^(1-v) β^v of a step (iDDPM's
            learned_range). `Variational` trains it and `DDPM` samples with it.
        estimate: what the pair (x_0, ε) is. posterior_mean: E[x_0 | x] and E[ε | x], as of every
            network that is trained by denoising. consistency: the clean end of the probability flow
            through x, and the ε that makes x with it. mean_velocity: the line through x to the
            point of the flow at a second level, which the network also receives (`Level.end`), so
            that α_s x_0 + σ_s ε is that point; ε - x_0 is the mean of dz/da between both levels, in
            z = x/(α+σ) and a = σ/(α+σ). encoded_mean: x contains an encoded x_0, which depends on
            the level and is learned (`MeanEncoderNetwork`); the pair is that whose ancestral step
            has the mean of the process.
        levels: shared: one level for all elements of x. learned: one for each, between the ends of
            a LogLinear schedule; the network contains them (`LearnedLevelsNetwork`).

    Raises:
        ValueError: a field is out of range, or fields contradict each other; the message states the
            expected value.
    """

    schedule: Schedule = field(default_factory=Cosine)
    prediction: PredictionType = "v_prediction"
    time: TimeConditioning = field(default_factory=TimeConditioning)
    shape: tuple[int, ...] = (1, 8, 8)
    low: float = -1.0
    high: float = 1.0
    sigma_data: float = 0.5
    classes: int = 0
    dropout: float = 0.0
    conditions: dict[str, ConditionRecord] = field(default_factory=dict, hash=False)
    variance: VarianceType = "fixed"
    estimate: Estimate = "posterior_mean"
    levels: LevelType = "shared"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        self._check_fields()
        if self.schedule.steps is not None:  # training draws the table's last level
            self.check_level(self.schedule.level(1.0), "the table's last level")

    def _check_fields(self) -> None:
        kinds = {"prediction": PredictionType, "variance": VarianceType, "estimate": Estimate}
        for name, kind in (kinds | {"levels": LevelType}).items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        if self.levels == "learned":
            self._check_levels()
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"shape is {self.shape}, expected the positive sizes of one x_0, such as (1, 8, 8)"
            )
        check_memory(4 * math.prod(self.shape), f"one x_0 of shape {self.shape}")
        if not self.low < self.high:
            raise ValueError(f"low and high are {self.low} and {self.high}, expected low < high")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(
                f"sigma_data is {self.sigma_data}, expected a positive standard deviation"
            )
        if self.classes < 0:
            raise ValueError(
                f"classes is {self.classes}, expected 0 for none or the number of labels"
            )
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout}, expected a probability within [0, 1]")
        self._check_conditions()
        check_estimate_of_process(self)

    def _check_levels(self) -> None:
        if not isinstance(self.schedule, LogLinear):
            raise ValueError(
                f"levels are learned on {self.schedule}, expected a LogLinear schedule, between "
                "whose ends they are learned"
            )
        if (self.variance, self.estimate) != ("fixed", "posterior_mean"):
            raise ValueError(
                f"levels are learned, and variance is {self.variance} and estimate "
                f"{self.estimate}: expected fixed and posterior_mean, or shared levels"
            )

    def _check_conditions(self) -> None:
        for name in self.conditions:
            if not name.isidentifier() or name in RESERVED:
                raise ValueError(
                    f"a condition is named {name!r}, expected the name of an argument of the "
                    f"network's forward, and none of {', '.join(RESERVED)}"
                )
            if name.removesuffix("_absent") in self.conditions.keys() - {name}:
                raise ValueError(
                    f"a condition is named {name!r}, which are the flags of the condition "
                    f"{name.removesuffix('_absent')}: give it another name"
                )
            shape = self.conditions[name].shape
            check_memory(4 * math.prod(shape), f"one condition {name} of shape {shape}")
        if self.classes and "class_labels" in self.conditions:
            raise ValueError(
                "the process has classes and a condition class_labels, which are one argument of "
                "the network: give the condition another name"
            )

    @cached_property
    def dropouts(self) -> dict[str, float]:
        """Name of each condition -> share of training samples without it; `label` is the class."""
        named = {name: record.dropout for name, record in self.conditions.items()}
        return ({LABEL: self.dropout} if self.classes else {}) | named

    def resized(self, shape: tuple[int, ...]) -> "Process":
        """The process for samples of another size, such as those of a bucket.

        Args:
            shape: shape of one x_0.

        Returns:
            The process with the shape, and conditions of this size (`ConditionRecord.resized`).

        Raises:
            ValueError: a condition has no such size.
        """
        if tuple(shape) == self.shape:
            return self
        conditions = {
            name: record.resized(name, self.shape, shape)
            for name, record in self.conditions.items()
        }
        return replace(self, shape=shape, conditions=conditions)

    def check_level(self, level: Level, name: str = "the first knot") -> None:
        """Raise ValueError if a network of this process cannot be evaluated at a level.

        At λ = -inf, x_0 as a function of the output, the time conditioning and σ must be finite,
        and at finite levels they must not overflow float32. Beyond the noisiest and the cleanest
        level of the schedule, finite on tables and truncated schedules, a level has no time.

        Args:
            level: noise level, or a map of levels.
            name: name of the level in the message.
        """
        noisiest, cleanest = level.logsnr_range
        if cleanest == math.inf:
            self._check_clean(name)
        if noisiest == -math.inf:
            self._check_pure_noise(name)
        self._check_overflow(level, name)
        low, high = self._trained_logsnrs
        is_cleaner = cleanest > high + LEVEL_TOLERANCE
        if is_cleaner or noisiest < low - LEVEL_TOLERANCE:
            raise ValueError(
                f"{name} is at λ = {cleanest if is_cleaner else noisiest:g}, but the network "
                f"was trained on {self.schedule}, from λ = {low:g} to {high:g}: evaluate it within "
                "these levels (the last knot may be cleaner)"
            )

    @cached_property
    def _trained_logsnrs(self) -> tuple[float, float]:
        """λ of the noisiest and of the cleanest level of the schedule."""
        return self.schedule.logsnr(1.0), self.schedule.cleanest.logsnr_range[1]

    def _check_overflow(self, level: Level, name: str) -> None:
        """Raise ValueError if a finite level is beyond the range of float32 for this process."""
        noisiest, cleanest = level.logsnr_range
        is_clean = self.prediction == "sample" and FLOAT32_LOGSNR < cleanest < math.inf
        if is_clean or (-math.inf < noisiest < -FLOAT32_LOGSNR and self._overflows_at_noise):
            raise ValueError(
                f"{name} is at λ = {cleanest if is_clean else noisiest:g}, where float32 overflows "
                f"(prediction {self.prediction}, scaling {self.schedule.scaling}, conditioning on "
                f"{self.time.variable}): use a grid whose noisy knots are within λ = "
                f"±{FLOAT32_LOGSNR:g}, such as Karras or UniformLogSNR"
            )

    @property
    def _overflows_at_noise(self) -> bool:
        """Whether x_0, x or the time conditioning grows as e^(-λ/2) towards pure noise."""
        return (
            self.prediction == "epsilon"
            or self.schedule.scaling == "ve"
            or (self.time.variable == "sigma" and self.time.clamp > FLOAT32_LOGSNR)
        )

    def _check_pure_noise(self, name: str) -> None:
        """Raise ValueError if a network of this process is undefined at λ = -inf."""
        remedy = (
            "train on Truncated levels, or start from a grid whose first level is finite "
            "(Karras, UniformLogSNR)"
        )
        if self.prediction == "epsilon":
            raise ValueError(
                f"{name} is pure noise (α = 0), where a network that predicts epsilon does not "
                f"determine x_0: use v_prediction, sample, flow_prediction or edm, or {remedy}"
            )
        if not self.time.can_express_pure_noise:
            raise ValueError(
                f"{name} is pure noise (λ = -inf), which time conditioning by {self.time.variable} "
                f"cannot express: condition on index, t or blend, set a clamp, or {remedy}"
            )
        if self.schedule.scaling == "ve":
            raise ValueError(
                f"{name} is pure noise (λ = -inf), where the ve scaling has σ = inf: use the "
                f"scaling vp or flow, or {remedy}"
            )

    def _check_clean(self, name: str) -> None:
        """Raise ValueError if a network of this process is undefined at λ = inf."""
        unknown = not self.time.can_express_clean
        if self.prediction == "sample" or unknown:
            why = (
                f"time conditioning by {self.time.variable}"
                if unknown
                else "ε of a network that predicts sample"
            )
            raise ValueError(
                f"{name} is clean (λ = inf), where {why} is undefined: start from a finite λ"
            )

    def save(self, path: str | Path) -> None:
        """Write the record to `path` as JSON, with the SHA-256 of its fields."""
        record = without_defaults(to_spec(self), OPTIONAL)
        content = record | {"sha256": hash_data(record)}
        write_file(path, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Process":
        """The record that `save` wrote to `path`.

        Returns:
            The process, equal to the saved one.

        Raises:
            ValueError: the file is missing, is not JSON, lacks a field, does not describe a
                process, or was changed after it was written.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: weights cannot be sampled without their process record"
            )
        try:
            data = read_json(path)
            written = data.pop("sha256", None)
            process = from_spec(cls, data)
            missing = [f.name for f in fields(cls) if f.name not in {*data, *OPTIONAL}]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}: add these fields as in training")
            if written not in (None, hash_data(data)):
                raise ValueError(
                    "it is not what was written (its SHA-256 differs): resume the run to write it "
                    "again, or delete the entry sha256 if you changed it on purpose"
                )
            return process
        except ValueError as error:
            raise ValueError(f"{path} is not a process record: {error}") from None


def _exp(value: Real) -> Real:
    return (
        value.exp()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64).exp().item()
    )


def _log(value: Real) -> Real:
    return (
        value.log()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64).log().item()
    )
