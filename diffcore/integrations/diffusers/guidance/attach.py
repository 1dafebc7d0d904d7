"""Our guidance in pipelines that hard-code theirs: the network is wrapped so that their arithmetic becomes the identity.

A pipeline with CFG asks its network about 2B rows and makes r + s (c - r) of the halves. The wrapped network is asked by our
rule (about the rows that it needs), and answers the guided output F in both halves: F + s (F - F) = F, bit for bit. The
scheduler is ours, so x, λ, the step's two knots and the prediction type are known, and rules act on exact x_0 and ε.
"""

from typing import Any, Self

from diffusers import DiffusionPipeline

from diffcore.guidance import CFG, Guidance
from diffcore.integrations.diffusers.families import ModelFamily, family_of_pipeline
from diffcore.integrations.diffusers.guidance.joint_forward import Guided, check_rule
from diffcore.integrations.diffusers.guidance.sequential_forward import InTurn
from diffcore.integrations.diffusers.loading.folder import parts_of
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import config_of
from diffcore.samplers import DDIM, AlphaBlending, DPMSolverPP, Euler, Sampler
from diffcore.schedules import Grid

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

    StableDiffusion (and XL, 3, their img2img, inpaint and ControlNet forms), DiT, PixArt, Sana, and Flux with its true CFG.
    The pipeline's `guidance_scale` (Flux: `true_cfg_scale`) says only whether it prepares the negative half: leave it above 1
    where the rule asks for a reference (with CFG(1.0), 1 saves the work). Everything else that is passed to the network
    goes with the rows of its half.

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


def _family(pipe: Any, guidance: Guidance) -> ModelFamily:
    """The record of the pipeline's family."""
    if any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__):
        raise ValueError(
            f"{type(pipe).__name__} accepts a guider: "
            f"pipe.update_components(guider=DiffcoreGuider.of({guidance}, pipe.scheduler))"
        )
    return family_of_pipeline(pipe)


class Attachment:
    """A pipeline with our guidance; `detach` gives it back as it was."""

    def __init__(
        self, pipe: Any, guidance: Guidance, sampler: Sampler | None, grid: Grid | None
    ) -> None:
        self.pipe = pipe
        family = _family(pipe, guidance)
        self.network: Any = parts_of(pipe).network
        self._scheduler = self.pipe.scheduler
        self._before = vars(self.network).get("forward")
        if isinstance(self._before, Guided):
            raise ValueError("this pipeline has guidance of ours already: detach it first")
        scheduler = _scheduler(self._scheduler, guidance, sampler, grid)
        kind = InTurn if family.guidance_batching == "separate calls" else Guided
        self.network.forward = kind(
            self.network,
            self.network.forward,
            scheduler,
            guidance,
            family,
            lambda: getattr(pipe, "do_classifier_free_guidance", None),
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


def _scheduler(
    own: Any, guidance: Guidance, sampler: Sampler | None, grid: Grid | None
) -> DiffcoreScheduler:
    chosen: dict[str, Any] = {
        name: part for name, part in (("sampler", sampler), ("grid", grid)) if part is not None
    }
    scheduler = DiffcoreScheduler.from_config(config_of(own), **chosen)
    settings = scheduler.settings
    check_rule(guidance)
    if not guidance.consistent and settings.sampler not in FIRST_ORDER:
        raise ValueError(
            f"{guidance} breaks x = α x_0 + σ ε, which {settings.sampler} relies on: use DDIM(), or CFG"
        )
    return DiffcoreScheduler.from_config(scheduler.config, levels=guidance.levels(settings.process))
