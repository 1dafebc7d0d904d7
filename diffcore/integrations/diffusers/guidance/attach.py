"""Guidance rules of diffcore in pipelines that hard-code classifier-free guidance.

A pipeline with CFG evaluates its network on 2B samples and computes r + s (c - r) from the halves.
The wrapped network evaluates what the guidance rule needs, and returns the guided output F in both
halves, so that F + s (F - F) = F, bit for bit. The scheduler is a DiffcoreScheduler, so x, λ, the
two knots of the step and the prediction type are known, and rules act on exact x_0 and ε.
"""

import logging
from typing import Any, Self

from diffusers import DiffusionPipeline

from diffcore.caches import Cache
from diffcore.caches.cached_network import CacheCounts
from diffcore.core.network import unwrap
from diffcore.guidance import CFG, Guidance
from diffcore.integrations.diffusers.families import ModelFamily, family_of_pipeline
from diffcore.integrations.diffusers.guidance.joint_forward import GuidedForward, check_rule
from diffcore.integrations.diffusers.guidance.sequential_forward import SequentialGuidedForward
from diffcore.integrations.diffusers.loading.folder import network_of, parts_of
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import read_scheduler_config
from diffcore.samplers import DDIM, AlphaBlending, DPMSolverPP, Euler, Sampler
from diffcore.schedules import Grid

__all__ = ["Attachment", "attach", "detach"]

log = logging.getLogger(__name__)

FIRST_ORDER = (DDIM(), Euler(), AlphaBlending(1), DPMSolverPP("1"))
"""Samplers whose step is x_s = α_s x_0 + σ_s ε."""


def attach(
    pipe: DiffusionPipeline,
    guidance: Guidance = CFG(1.0),
    sampler: Sampler | None = None,
    grid: Grid | None = None,
    cache: Cache | None = None,
) -> "Attachment":
    """Give a pipeline a guidance rule, a sampler and a grid within a `with`, or until `detach`.

        rule = Interval(APG(4.0), sigma=(0.19, 1.61))
        with attach(pipe, guidance=rule, sampler=DPMSolverPP("2M")):
            images = pipe("a prompt", num_inference_steps=25).images

    For the pipelines in the records of `diffcore.integrations.diffusers.families.FAMILIES`. The
    pipeline's guidance scale (`guidance_scale`, of Flux `true_cfg_scale`) decides only whether the
    pipeline prepares the negative half: leave it above 1 if the rule needs a reference, and set it
    to 1 with CFG(1.0) to save the work. Its value is not used otherwise: the scale is the rule's.
    Compile a network before, `pipe.unet = torch.compile(pipe.unet)`. `pipe.save_pretrained` saves
    the sampler and the grid, and not the rule.

    Args:
        pipe: the pipeline; the forward of its network and its scheduler are replaced.
        guidance: the rule. Levels where it switches on or off become knots. The reference
            `Unconditional` is the pipeline's negative prompt or null label.
        sampler: the integrator; default: that of the pipeline's DiffcoreScheduler, or DDIM.
        grid: rule that places the knots; default: the one of the pipeline's scheduler.
        cache: rule by which features of the network are reused within a call, such as DeepCache(3);
            `cache_counts` of the handle has the numbers of calls. None: none.

    Returns:
        A handle with `detach`, which is also a context manager; `detach(pipe)` needs no handle.

    Raises:
        ValueError: the pipeline is in no record, or the rule cannot be used in it; the message has
            the remedy.
    """
    return Attachment(pipe, guidance, sampler, grid, cache)


def detach(pipe: DiffusionPipeline) -> None:
    """Restore a pipeline to which guidance was attached; any other pipeline is left as it is.

    Args:
        pipe: the pipeline; its network gets its own forward, and the pipeline its own scheduler.
    """
    if (forward := _guided_forward(network_of(pipe))) is not None:
        forward.detach()


class Attachment:
    """A pipeline with attached guidance; `detach` restores it.

    Args:
        pipe: the pipeline.
        guidance: the rule.
        sampler: the integrator; None: see `attach`.
        grid: rule that places the knots; None: see `attach`.
        cache: rule by which features are reused; None: see `attach`.
    """

    def __init__(
        self,
        pipe: Any,
        guidance: Guidance,
        sampler: Sampler | None,
        grid: Grid | None,
        cache: Cache | None,
    ) -> None:
        self.pipe = pipe
        family = _family(pipe, guidance)
        self.network: Any = parts_of(pipe).network
        self._scheduler = pipe.scheduler
        self._instance_forward = vars(self.network).get("forward")
        if _guided_forward(self.network) is not None:
            raise ValueError(
                "this pipeline has attached guidance already: call "
                "diffcore.integrations.diffusers.detach(pipe) first"
            )
        scheduler = _scheduler(self._scheduler, guidance, sampler, grid)
        is_sequential = family.guidance_batching == "separate calls"
        forward_class = SequentialGuidedForward if is_sequential else GuidedForward
        self._forward = forward_class(
            self.network,
            self.network.forward,
            scheduler,
            guidance,
            family,
            pipe,
            self.detach,
            cache,
        )
        self.network.forward = self._forward
        pipe.scheduler = scheduler
        pipe.save_pretrained = self._save

    @property
    def cache_counts(self) -> CacheCounts:
        """Calls of the network so far that computed all features, and that reused some."""
        return CacheCounts() if self._forward.cached is None else self._forward.cached.counts

    def detach(self) -> None:
        """Restore the network's forward and the pipeline's scheduler; again, it does nothing."""
        if not isinstance(vars(self.network).get("forward"), GuidedForward):
            return
        self._forward.close()
        del self.network.forward
        if self._instance_forward is not None:  # of another library, such as a hook of accelerate
            self.network.forward = self._instance_forward
        self.pipe.scheduler = self._scheduler
        del self.pipe.save_pretrained

    def _save(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's `save_pretrained`, with a warning."""
        log.warning(
            "the sampler and the grid are saved, and the attached guidance is not: attach it again "
            "after loading, or call detach(pipe) before saving to keep the pipeline's own scheduler"
        )
        return type(self.pipe).save_pretrained(self.pipe, *args, **kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def _guided_forward(network: Any) -> GuidedForward | None:
    """The forward that `attach` gave to a network, which may have been compiled since."""
    forwards = (vars(module).get("forward") for module in (network, unwrap(network)))
    return next((forward for forward in forwards if isinstance(forward, GuidedForward)), None)


def _family(pipe: Any, guidance: Guidance) -> ModelFamily:
    """The record of the pipeline's family."""
    if any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__):
        raise ValueError(
            f"{type(pipe).__name__} accepts a guider: "
            f"pipe.update_components(guider=DiffcoreGuider.of({guidance}, pipe.scheduler))"
        )
    return family_of_pipeline(pipe)


def _scheduler(
    pipeline_scheduler: Any, guidance: Guidance, sampler: Sampler | None, grid: Grid | None
) -> DiffcoreScheduler:
    """A DiffcoreScheduler for the pipeline's own scheduler, with the rule's levels as knots."""
    chosen: dict[str, Any] = {
        name: part for name, part in (("sampler", sampler), ("grid", grid)) if part is not None
    }
    scheduler = DiffcoreScheduler.from_config(read_scheduler_config(pipeline_scheduler), **chosen)
    settings = scheduler.settings
    check_rule(guidance)
    if not guidance.is_consistent and settings.sampler not in FIRST_ORDER:
        raise ValueError(
            f"{guidance} breaks x = α x_0 + σ ε, which {settings.sampler} relies on: use DDIM(), "
            f"or CFG"
        )
    return DiffcoreScheduler.from_config(scheduler.config, levels=guidance.levels(settings.process))
