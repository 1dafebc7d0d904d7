"""The page of the playground: pictures and commands on the left, controls on the right.

Everything that the page shows is computed by the modules beside this one; here it is only arranged.
The browser fetches nothing from other machines.
"""

import base64
import html
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from diffcore.cli.commands.playground.controls import (
    AS_CONFIGURED,
    GRIDS,
    RULES,
    SAMPLERS,
    SCHEDULES,
    Controls,
)
from diffcore.cli.commands.playground.drawing import Drawing, draw
from diffcore.cli.commands.playground.model import load_model
from diffcore.cli.commands.playground.panels import draw_panels
from diffcore.cli.commands.playground.request import parse_request
from diffcore.cli.commands.playground.snippets import command_line, python_code
from diffcore.io.extras import import_extra
from diffcore.io.mistakes import is_mistake, one_line
from diffcore.io.specs import describe_component

__all__ = ["Address", "Answer", "answer_controls", "build_page", "serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STYLE = files("diffcore.cli.commands.playground") / "page.css"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Fonts of the reader's machine: the default theme fetches others from a server."""
POINTS_SHOWN = 512
"""Largest number of samples for each label that the slider offers."""


@dataclass(frozen=True)
class Address:
    """Where the page is served.

    Args:
        host: address of this machine that the page is served on; 0.0.0.0 makes it reachable for
            other machines.
        port: port of the page; 0: any free one.
        open: whether to open the page in the browser of this machine.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    open: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}, expected 1 to 65535, or 0 for any free one")


class Answer(NamedTuple):
    """What the page shows for values of its controls.

    Args:
        pictures: HTML with the pictures and the number of evaluations, or with the problem.
        command: command line that writes the samples; empty if there is a problem.
        code: Python code that draws the samples; empty if there is a problem.
    """

    pictures: str
    command: str
    code: str


def answer_controls(controls: Controls, models: Sequence[str], device: torch.device) -> Answer:
    """Draw the picture for values of the controls.

    Args:
        controls: values of the controls.
        models: models that the page offers; a request with another one need not come from the page.
        device: device of the network.

    Returns:
        The parts of the page; a wrong value is explained in place of the pictures.
    """
    try:
        _check_offered(controls.model, models)
        drawing = draw(controls.model, parse_request(controls.model, controls.words), device)
    except Exception as error:
        if not is_mistake(error, []):
            raise
        message = html.escape(one_line(str(error)))
        return Answer(f'<p class="problem" role="alert">{message}</p>', "", "")
    return Answer(_pictures(drawing), command_line(drawing), python_code(drawing))


def _check_offered(model: str, models: Sequence[str]) -> None:
    """Raise ValueError if the command did not name a model."""
    if model not in models:
        raise ValueError(f"the model is {model!r}, expected one of {', '.join(models)}")


def _pictures(drawing: Drawing) -> str:
    """HTML of the pictures, which contains them."""
    figures = [
        f"<figure><figcaption>{html.escape(panel.title)}</figcaption>"
        f'<img alt="{html.escape(panel.text)}" '
        f'src="data:image/png;base64,{base64.b64encode(panel.png).decode()}"></figure>'
        for panel in draw_panels(drawing)
    ]
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in drawing.facts.items()
    ]
    return (
        f'<div class="panels">{"".join(figures)}</div><table class="facts">{"".join(rows)}</table>'
    )


def build_page(models: Sequence[str], first: Controls, device: torch.device) -> Any:
    """Arrange the page, with the picture of the first values in it.

    Args:
        models: names of distributions, and folders of runs and pipelines; no others can be chosen.
        first: values of the controls at the start.
        device: device of the networks.

    Returns:
        The `Blocks` of gradio.
    """
    gr = import_extra("gradio", "The playground")
    answer = answer_controls(first, models, device)
    with gr.Blocks(title="diffcore playground", analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column(scale=3, min_width=320, elem_id="answer"):
                outputs = _build_outputs(gr, answer)
            with gr.Column(scale=1, min_width=280):
                controls = _build_controls(gr, models, first, device)

        def update(*values: Any) -> list[str]:
            """The parts of the page for values of the controls."""
            return list(answer_controls(Controls(*values), models, device))

        def choose(model: str) -> list[Any]:
            """The controls with the settings of a model."""
            _check_offered(model, models)
            values = Controls.of(model, parse_request(model, []))
            return [gr.update(**settings) for settings in _control_settings(values, device)[1:]]

        # Values that `choose` sets do not count as input, so that they are drawn once.
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        model, *others = controls
        gr.on(
            [control.input for control in others],
            update,
            controls,
            outputs,
            trigger_mode="always_last",
            **options,
        )
        model.input(choose, model, others, **options).then(update, controls, outputs, **options)
    return page


def _build_outputs(gr: Any, answer: Answer) -> list[Any]:
    """The pictures, the command and the code, in the order of `Answer`."""
    shell = {"language": "shell", "label": "The same samples as files", "wrap_lines": True}
    python = {"language": "python", "label": "The same samples in Python"}
    return [
        gr.HTML(answer.pictures, elem_id="pictures"),
        gr.Code(answer.command, lines=2, **shell),
        gr.Code(answer.code, **python),
    ]


def _build_controls(
    gr: Any, models: Sequence[str], first: Controls, device: torch.device
) -> list[Any]:
    """The controls in the order of `Controls`."""
    schedules, samplers, grids = (
        {"choices": [describe_component(choice) for choice in group], "allow_custom_value": True}
        for group in (SCHEDULES, SAMPLERS, GRIDS)
    )
    fixed: list[tuple[Any, dict[str, Any]]] = [
        (gr.Dropdown, {"label": "model", "choices": list(models)}),
        (gr.Dropdown, {"label": "schedule (of a distribution)", **schedules}),
        (gr.Dropdown, {"label": "sampler", **samplers}),
        (gr.Dropdown, {"label": "grid of knots", **grids}),
        (gr.Slider, {"label": "steps", "minimum": 1, "step": 1, "elem_id": "steps"}),
        (gr.Dropdown, {"label": "guidance rule"}),
        (gr.Slider, {"label": "guidance scale w", "minimum": 0, "step": 0.1, "elem_id": "scale"}),
        (gr.Number, {"label": "guidance down to σ/α (0: to the end)", "minimum": 0}),
        (gr.Number, {"label": "guidance from σ/α (0: from the start)", "minimum": 0}),
        (gr.Dropdown, {"label": "labels (none: unconditional)", "multiselect": True}),
        (gr.Textbox, {"label": "prompts, one a line", "lines": 2}),
        (gr.Slider, {"label": "samples for each label", "minimum": 1, "step": 1}),
        (gr.Number, {"label": "seed of the first sample", "minimum": 0, "precision": 0}),
    ]
    settings = _control_settings(first, device)
    return [build(**a, **b) for (build, a), b in zip(fixed, settings, strict=True)]


def _control_settings(values: Controls, device: torch.device) -> list[dict[str, Any]]:
    """The values of the controls, and what of them depends on the model, in their order."""
    request = parse_request(values.model, values.words)
    model = load_model(values.model, request.schedule, request.prompt, device)
    is_plain, rules = values.rule != AS_CONFIGURED, list(RULES)
    settings: list[dict[str, Any]] = [{"value": value} for value in values]
    dependent: dict[str, dict[str, Any]] = {
        "schedule": {"interactive": model.oracle is not None},
        "steps": {"maximum": max(60, request.steps)},
        "rule": {"choices": rules if is_plain else [*rules, AS_CONFIGURED]},
        "scale": {"maximum": max(10.0, values.scale)},
        "labels": {"choices": list(range(model.denoiser.process.classes))},
        "prompt": {"visible": model.is_text_conditioned},
        "per_label": {"maximum": max(POINTS_SHOWN, request.per_label)},
    }
    if model.is_text_conditioned:  # a prompt stands in place of a label
        dependent["labels"] = {"choices": [], "visible": False}
    for name, extra in dependent.items():
        settings[Controls._fields.index(name)] |= extra
    return settings


def serve(models: Sequence[str], first: Controls, device: torch.device, address: Address) -> None:
    """Serve the page until the user interrupts the command.

    Args:
        models: names of distributions, and folders of runs and pipelines.
        first: values of the controls at the start.
        device: device of the networks.
        address: where the page is served.

    Raises:
        ValueError: the port is in use, or the host is not an address of this machine.
    """
    gr = import_extra("gradio", "The playground")
    port = _free_port(address)
    page = build_page(models, first, device)
    page.launch(
        server_name=address.host,
        server_port=port,
        share=False,
        inbrowser=address.open,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        css=STYLE.read_text("utf-8"),
        theme=gr.themes.Base(**FONTS),
    )
    print(f"diffcore playground: http://{address.host}:{port} (Ctrl-C ends it)", flush=True)
    if address.host not in LOOPBACK:
        print("Every machine that reaches this address can use the playground.", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _free_port(address: Address) -> int:
    """The port, or a free one for port 0."""
    try:
        with socket.create_server((address.host, address.port)) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise ValueError(
            f"port {address.port} of {address.host} cannot be used ({error.strerror}): choose "
            "another --port, 0 for any free one, or another --host"
        ) from None
