"""Caches of diffusers, by the hooks that `enable_cache` gives to a network."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from diffcore.caches.base import Cache, CachedEvaluation
from diffcore.caches.forwards import Replacement, replace_forwards
from diffcore.caches.integration import LevelPlan
from diffcore.core.network import class_name
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["DiffusersCache", "HookStream", "InstalledHooks"]

CONFIGS = ("FirstBlockCacheConfig", "TaylorSeerCacheConfig", "MagCacheConfig")
"""Caches whose state is one for each named context, so that conditions do not share it."""
ATTRIBUTES = ("forward", "_diffusers_hook", "_cache_config")
"""Attributes of modules that diffusers sets."""


@dataclass(frozen=True)
class DiffusersCache(Cache):
    """A cache of diffusers, which its networks enable for the length of each integration.

        transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=3))      in diffusers

    It works on the networks of diffusers that have `enable_cache`, such as Flux. The hooks are
    active only in evaluations of the integration that installed them; the network is unchanged at
    all other times and afterwards, also after an error. Each group of samples under one condition
    has a state of its own, which is empty at the start of an integration.

    TaylorSeerCacheConfig and MagCacheConfig count evaluations as steps, so they need a sampler that
    evaluates each level once and in order. MagCacheConfig reads one ratio for each step, so its
    `num_inference_steps` is the number of evaluations, and guidance must act from the first level
    to the last. FasterCacheConfig and PyramidAttentionBroadcastConfig are refused: they keep one
    state for all calls of the network, and the former replaces the reference of guidance.

    Args:
        config: name and options of a config of diffusers: FirstBlockCacheConfig(threshold=0.1),
            TaylorSeerCacheConfig(cache_interval=3, max_order=1, taylor_factors_dtype="float32"), or
            MagCacheConfig(mag_ratios=[...]). A dtype is given by its name.
    """

    config: str = "FirstBlockCacheConfig()"

    def __post_init__(self) -> None:
        name, _ = parse_config(self.config)
        if name not in CONFIGS:
            raise ValueError(f"config names {name!r}, expected one of {', '.join(CONFIGS)}")

    def check(self, network: nn.Module) -> None:
        with self._install(network, None):
            pass

    @contextmanager
    def start(self, network: nn.Module, plan: LevelPlan) -> Iterator["InstalledHooks"]:
        levels = None if self.config.startswith("FirstBlock") else _require_steps(plan(), self)
        with self._install(network, levels) as hooks:
            yield hooks

    def evaluate(
        self,
        network: nn.Module,
        call: Callable[[], Prediction],
        level: Level,
        memory: "InstalledHooks | HookStream",
    ) -> CachedEvaluation:
        stream = memory if isinstance(memory, HookStream) else self._new_stream(memory, level)
        hooks, computed = stream.hooks, list[bool]()

        def record(original: Any, *args: Any, **kwargs: Any) -> Any:
            computed.append(True)
            return original(*args, **kwargs)

        active = {**hooks.replacements, **dict.fromkeys(hooks.probes, record)}
        with replace_forwards(active), hooks.network.cache_context(stream.name):
            prediction = call()
        return CachedEvaluation(prediction, stream, not computed)

    def _new_stream(self, hooks: "InstalledHooks", level: Level) -> "HookStream":
        """A stream with an empty state; the ratios of MagCache begin at the first level."""
        is_late = hooks.levels is not None and level != hooks.levels[0]
        if is_late and self.config.startswith("MagCache"):
            raise ValueError(
                f"{self} counts from the first evaluation, and the rows or conditions change at "
                "a later one: use guidance at all levels, or another cache"
            )
        return HookStream(hooks, f"diffcore {next(hooks.numbers)}")

    @contextmanager
    def _install(
        self, network: nn.Module, levels: Sequence[Level] | None
    ) -> Iterator["InstalledHooks"]:
        """Enable the cache of a network, and keep its hooks outside of the network."""
        cacheable = _find_cacheable(network, self)
        config = self._build(None if levels is None else len(levels))
        before = {module: dict(vars(module)) for module in cacheable.modules()}
        try:
            forwards = _enable(cacheable, config, before)
            probes = _find_probes(cacheable, forwards, self)
            yield InstalledHooks(cacheable, _replacements(forwards), probes, levels, count())
        finally:
            if cacheable.is_cache_enabled:
                cacheable.disable_cache()
            _restore(before, ATTRIBUTES)

    def _build(self, steps: int | None) -> Any:
        """The config of diffusers, for a number of evaluations if it is known."""
        from diffusers import hooks

        name, options = parse_config(self.config)
        for option, value in options.items():
            if option.endswith("dtype") and isinstance(value, str):
                options[option] = getattr(torch, value, value)
        if name == "MagCacheConfig" and steps is not None:
            given = options.setdefault("num_inference_steps", steps)
            if given != steps:
                raise ValueError(
                    f"{self} is for {given} evaluations, and the sampler makes {steps}: leave "
                    "num_inference_steps out"
                )
        try:
            return getattr(hooks, name)(**options)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"diffusers does not accept {self.config}: {reason}") from None


class InstalledHooks(NamedTuple):
    """The hooks of a cache for one integration.

    Args:
        network: the network with `enable_cache`.
        replacements: module -> its forward with the hook.
        probes: layers that are evaluated only if the features are computed.
        levels: levels of the evaluations; None if the cache does not count them.
        numbers: numbers of the streams.
    """

    network: Any
    replacements: Mapping[nn.Module, Replacement]
    probes: Sequence[nn.Module]
    levels: Sequence[Level] | None
    numbers: Iterator[int]


class HookStream(NamedTuple):
    """The evaluations of some samples under one condition.

    Args:
        hooks: hooks of the integration.
        name: name of the context in which diffusers keeps their state.
    """

    hooks: InstalledHooks
    name: str


def parse_config(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in the text of a constructor call with literal values.

    Returns:
        The name, and option -> value.

    Raises:
        ValueError: the text is no such call.
    """
    try:
        call: Any = ast.parse(text, mode="eval").body
        options = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
        name = call.func.id
    except (SyntaxError, ValueError, AttributeError):
        name, call, options = "", None, {}
    if call is None or call.args or "None" in options:
        raise ValueError(
            f"config is {text!r}, expected a name and options such as "
            "FirstBlockCacheConfig(threshold=0.1)"
        )
    return name, options


def _find_cacheable(network: nn.Module, rule: object) -> Any:
    """The part of a network that has caches of diffusers, in which none is enabled."""
    for module in network.modules():
        if any(base.__name__ == "CacheMixin" for base in type(module).__mro__):
            found: Any = module
            if found.is_cache_enabled:
                raise ValueError(
                    f"{rule} cannot be enabled on {class_name(module)}, where a cache is enabled "
                    "already: call its disable_cache(), and sample in one thread at a time"
                )
            return found
    raise ValueError(
        f"{rule} needs a network of diffusers with enable_cache, which {class_name(network)} has "
        "not: use FirstBlockCache or DeepCache"
    )


def _require_steps(levels: Sequence[Level] | None, rule: object) -> Sequence[Level]:
    """The levels of the evaluations, if each is evaluated once and in order."""
    logsnrs = [] if levels is None else [float(level.logsnr) for level in levels]
    pairs = list(pairwise(logsnrs))
    if levels is None or not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise ValueError(
            f"{rule} counts evaluations as steps, and the sampler evaluates a level twice, goes "
            "back, or decides from the samples: use a sampler such as DPMSolverPP('2M'), or "
            "FirstBlockCacheConfig"
        )
    return levels


def _enable(network: Any, config: object, before: Mapping[nn.Module, dict[str, Any]]) -> Any:
    """Enable a cache, and take the forwards with hooks out of the network.

    Returns:
        Module -> its forward with the hook.
    """
    network.enable_cache(config)
    forwards = {
        module: vars(module)["forward"]
        for module, old in before.items()
        if vars(module).get("forward") is not old.get("forward")
    }
    _restore(before, ("forward",))
    return forwards


def _restore(before: Mapping[nn.Module, dict[str, Any]], names: Sequence[str]) -> None:
    """Restore attributes of modules to what they were, or were not, before."""
    for module, old in before.items():
        for name in names:
            if name in old:
                vars(module)[name] = old[name]
            else:
                vars(module).pop(name, None)


def _replacements(forwards: Mapping[nn.Module, Callable[..., Any]]) -> dict[nn.Module, Replacement]:
    """Replacements that call forwards with hooks, which contain the original forward."""

    def replace(hooked: Callable[..., Any]) -> Replacement:
        return lambda original, *args, **kwargs: hooked(*args, **kwargs)

    return {module: replace(hooked) for module, hooked in forwards.items()}


def _find_probes(
    network: nn.Module, hooked: Mapping[nn.Module, object], rule: object
) -> list[nn.Module]:
    """The linear layers inside the last module with a hook that contains any."""
    probes: list[nn.Module] = []
    for module in network.modules():
        if module in hooked:
            linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
            probes = [part for part in linear if part is not module] or probes
    if not probes:
        raise ValueError(
            f"{rule} finds no layer in {class_name(network)} whose output it could reuse: name "
            "the layers in cache_identifiers"
        )
    return probes
