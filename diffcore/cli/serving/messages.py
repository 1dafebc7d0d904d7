"""The message of a request for samples, and how its fields become a request."""

import json
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffcore.cli.run_defaults import spell_calls
from diffcore.guidance import CFG, Guidance, load_weaker_networks
from diffcore.io.specs import from_spec
from diffcore.samplers import Sampler
from diffcore.sampling import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.schedules import Grid
from diffcore.serving import SamplingRequest

__all__ = ["Format", "GenerateMessage", "RequestDefaults", "read_message", "read_request"]

Format = Literal["png", "npy", "safetensors", "json"]
Component = Annotated[str, Field(max_length=1000)] | dict[str, Any]
"""A component as a call, such as "CFG(3)", or as its spec {class_path, init_args}."""

MAXIMUM_DEPTH, MAXIMUM_PARTS = 4, 12
"""Tables inside of each other, and tables in all, in the spec of a component: the time that
jsonargparse takes doubles with each one inside of another.
"""

_PARSING = threading.Lock()
"""Held while a component is parsed: the settings of jsonargparse are global."""


@dataclass(frozen=True)
class RequestDefaults:
    """What a request that names no sampler, grid, steps or guidance is drawn with.

    Args:
        sampler: numerical integrator.
        grid: rule that places the knots.
        steps: number of steps.
        guidance: guidance rule.
    """

    sampler: Sampler = DEFAULT_SAMPLER
    grid: Grid = DEFAULT_GRID
    steps: int = 25
    guidance: Guidance = CFG(1.0)


class GenerateMessage(BaseModel):
    """The body of POST /generate."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seeds: Annotated[list[int], Field(min_length=1, description="One integer for each sample.")]
    labels: Annotated[
        list[int] | None,
        Field(description="One class label, or index of a prompt, for each sample."),
    ] = None
    steps: Annotated[int | None, Field(description="Number of sampler steps.")] = None
    sampler: Annotated[
        Component | None, Field(description='Integrator, such as "DDIM()" or "Heun()".')
    ] = None
    grid: Annotated[
        Component | None, Field(description='Grid of noise levels, such as "Trailing()".')
    ] = None
    guidance: Annotated[
        Component | None, Field(description='Guidance rule, such as "CFG(3)" or "APG(4)".')
    ] = None
    path: Annotated[bool, Field(description="Noise of steps from one Brownian path a seed.")] = (
        False
    )
    format: Annotated[
        Format,
        Field(description="png: one sheet; npy: x; safetensors: x, seed, label; json: base64."),
    ] = "png"
    timeout: Annotated[
        float | None, Field(gt=0, description="Seconds after which the request is given up.")
    ] = None


def read_message(body: bytes) -> GenerateMessage:
    """Read the body of a request.

    Args:
        body: JSON.

    Returns:
        The message.

    Raises:
        ValueError: it is no JSON object of these fields; the message names the field.
    """
    try:
        return GenerateMessage.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place + ': ' if place else ''}{first['msg']}") from None


def read_request(message: GenerateMessage, defaults: RequestDefaults) -> SamplingRequest:
    """The request of a message.

    Args:
        message: the message.
        defaults: components of a message that names none.

    Returns:
        The request.

    Raises:
        ValueError: a component does not exist, refuses its options, or names a network.
    """
    sampler, grid, guidance = (
        getattr(defaults, name) if value is None else _read_component(name, json.dumps(value))
        for name, value in (
            ("sampler", message.sampler),
            ("grid", message.grid),
            ("guidance", message.guidance),
        )
    )
    steps = defaults.steps if message.steps is None else message.steps
    labels = message.labels
    return SamplingRequest(message.seeds, labels, sampler, grid, steps, guidance, message.path)


@lru_cache(maxsize=256)
def _read_component(name: str, text: str) -> Any:
    """A component from JSON: a call or a spec. Requests repeat a few of them."""
    value = json.loads(text)
    try:
        with _PARSING:
            if isinstance(value, str):
                value = _parse_call(value)
            _check_nesting(name, value)
            component = getattr(from_spec(RequestDefaults, {name: value}), name)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    return load_weaker_networks(component, _refuse_network)


def _check_nesting(name: str, spec: Any) -> None:
    """Raise ValueError if a spec has too many components, or too many inside of each other."""
    layer, depth, parts = [spec], 0, 0
    while layer:
        found = [value for value in layer if isinstance(value, dict) and "class_path" in value]
        depth, parts = depth + bool(found), parts + len(found)
        if depth > MAXIMUM_DEPTH or parts > MAXIMUM_PARTS:
            raise ValueError(
                f"{name} has too many components, expected at most {MAXIMUM_DEPTH} inside of each "
                f"other and {MAXIMUM_PARTS} in all"
            )
        layer = [
            item
            for value in layer
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]


def _parse_call(text: str) -> Any:
    """The spec of a component that is spelled as a call, or as the name of its class."""
    (spelled,) = spell_calls([text])
    return json.loads(spelled) if spelled != text else text


def _refuse_network(folder: str) -> NoReturn:
    raise ValueError(f"guidance names the network {folder!r}: a server loads none for a request")
