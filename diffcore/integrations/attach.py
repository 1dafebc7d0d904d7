"""Our guidance in pipelines that hard-code theirs: the network is wrapped so that their arithmetic becomes the identity.

A pipeline with CFG asks its network about 2B rows and makes r + s (c - r) of the halves. The wrapped network is asked by our
rule (about the rows that it needs), and answers the guided output F in both halves: F + s (F - F) = F, bit for bit. The
scheduler is ours, so x, λ, the step's two knots and the prediction type are known, and rules act on exact x_0 and ε.
"""

from typing import Any, Self

from diffusers import DiffusionPipeline

from diffcore.guidance import CFG, GFCG, ClassifierGuidance, Guidance
from diffcore.integrations.configs import config_of
from diffcore.integrations.folder import parts_of
from diffcore.integrations.guided import Guided
from diffcore.integrations.scheduler import DiffcoreScheduler
from diffcore.samplers import DDIM, AlphaBlending, DPMSolverPP, Euler, Sampler
from diffcore.schedules import Grid

UNCONDITIONAL_FIRST = ("StableDiffusion", "PixArt", "Sana")
CONDITIONAL_FIRST = ("DiT",)
FIRST_ORDER = (DDIM(), Euler(), AlphaBlending(1), DPMSolverPP("1"))
"""Samplers whose step is x_s = α_s x_0 + σ_s ε."""


def attach(
    pipe: DiffusionPipeline,
    guidance: Guidance = CFG(1.0),
    sampler: Sampler | None = None,
    grid: Grid | None = None,
) -> "Attachment":
    """Give a pipeline our guidance, sampler and grid until `detach`, or within a `with`.

        with attach(pipe, guidance=Interval(APG(4.0), sigma=(0.19, 1.61)), sampler=DPMSolverPP("2M")):
            images = pipe("a prompt", num_inference_steps=25).images

    StableDiffusion (and XL, 3, their img2img, inpaint and ControlNet forms), DiT, PixArt and Sana. The pipeline's
    `guidance_scale` says only whether it prepares the negative half: leave it above 1 where the rule asks for a reference
    (with CFG(1.0), 1 saves the work). Everything else that is passed to the network goes with the rows of its half.

    Args:
        pipe: the pipeline; its network's forward and its scheduler are replaced.
        guidance: the rule; bounds at which it changes its mode become knots. The reference Unconditional is the pipeline's
            negative prompt or null label.
        sampler: the integrator, DDIM unless the pipeline's scheduler is ours already.
        grid: which levels it visits, those of the pipeline's scheduler by default.

    Raises:
        ValueError: a pipeline or a rule that cannot be guided so; the message has the remedy.
    """
    return Attachment(pipe, guidance, sampler, grid)


def _conditional_first(pipe: DiffusionPipeline) -> bool:
    """Whether the conditional half of the 2B rows comes first."""
    name = type(pipe).__name__
    if not name.startswith((*UNCONDITIONAL_FIRST, *CONDITIONAL_FIRST)):
        raise ValueError(
            f"{name} is not known here, expected one of {', '.join((*UNCONDITIONAL_FIRST, *CONDITIONAL_FIRST))}...: give it a "
            f"DiffcoreScheduler, which any pipeline takes, and guide by its own scale"
        )
    return name.startswith(CONDITIONAL_FIRST)


class Attachment:
    """A pipeline with our guidance; `detach` gives it back as it was."""

    def __init__(self, pipe: Any, guidance: Guidance, sampler: Sampler | None, grid: Grid | None) -> None:
        self.pipe = pipe
        first = _conditional_first(pipe)
        self.network: Any = parts_of(pipe).network
        self._scheduler = self.pipe.scheduler
        self._before = vars(self.network).get("forward")
        if isinstance(self._before, Guided):
            raise ValueError("this pipeline has guidance of ours already: detach it first")
        scheduler = _scheduler(self._scheduler, guidance, sampler, grid)
        self.network.forward = Guided(
            self.network, self.network.forward, scheduler, guidance, first, lambda: _doubles(pipe)
        )
        self.pipe.scheduler = scheduler

    def detach(self) -> None:
        """Give back the network's forward and the pipeline's scheduler; a second time does nothing."""
        if not isinstance(vars(self.network).get("forward"), Guided):
            return
        del self.network.forward
        if self._before is not None:  # another's, such as a hook of accelerate
            self.network.forward = self._before
        self.pipe.scheduler = self._scheduler

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def _doubles(pipe: Any) -> bool | None:
    """Whether the call under way prepares both halves, where the pipeline says so."""
    return getattr(pipe, "do_classifier_free_guidance", None)


def _scheduler(own: Any, guidance: Guidance, sampler: Sampler | None, grid: Grid | None) -> DiffcoreScheduler:
    chosen: dict[str, Any] = {name: part for name, part in (("sampler", sampler), ("grid", grid)) if part is not None}
    scheduler = DiffcoreScheduler.from_config(config_of(own), **chosen)
    settings = scheduler.settings
    if any(isinstance(part, (ClassifierGuidance, GFCG)) for part in guidance.parts()):
        raise ValueError(
            f"{guidance} reads class labels, which a pipeline's condition is not: use CFG, APG or Interval"
        )
    if not guidance.consistent and settings.sampler not in FIRST_ORDER:
        raise ValueError(f"{guidance} breaks x = α x_0 + σ ε, which {settings.sampler} relies on: use DDIM(), or CFG")
    return DiffcoreScheduler.from_config(scheduler.config, levels=guidance.levels(settings.process))
