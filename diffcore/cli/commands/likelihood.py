"""`diffcore likelihood`: the bits per dimension of data under the network of a run or pipeline."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from diffcore.cli.commands.sample import find_device
from diffcore.cli.evaluation.data import read_source
from diffcore.cli.evaluation.likelihood_request import LikelihoodRequest
from diffcore.cli.evaluation.record import (
    default_out,
    environment_facts,
    has_data,
    weights_facts,
    write_record,
)
from diffcore.cli.image_model import PipelineOptions, load_image_model
from diffcore.core.conditions import BatchCondition, batch_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.evaluation.likelihood.bits import Likelihood, bits_per_dimension
from diffcore.evaluation.likelihood.bound import FIXED_VARIANCE, Bound, variational_bound
from diffcore.evaluation.likelihood.density import first_level
from diffcore.evaluation.likelihood.dequantisation import (
    Dequantisation,
    TruncatedNormal,
    check_values,
    detect_bins,
)
from diffcore.io.files import check_writable
from diffcore.io.parser import ComponentParser
from diffcore.io.plain_data import read_json
from diffcore.io.specs import describe_spec, to_spec
from diffcore.run import AVERAGED, Run
from diffcore.sampling.files import hash_networks
from diffcore.training.data.checks import read_item
from diffcore.training.data.source import DataSource

__all__ = ["main"]


class _Data(NamedTuple):
    """The items that are measured.

    Args:
        x0: (N, *shape) clean data.
        condition: their labels or conditions; None if the network has none.
        bins: number of their values; None if they are continuous.
        total: number of items of the data set.
    """

    x0: Tensor
    condition: BatchCondition | None
    bins: int | None
    total: int


def main(argv: Sequence[str]) -> None:
    """Measure the data that the second word names under the model that the first word names.

    Args:
        argv: command-line words after `likelihood`.
    """
    parser = ComponentParser(
        prog="diffcore likelihood",
        usage="diffcore likelihood RUN DATA [--option value ...]",
        description="Measure the bits per dimension of DATA under the network of a run or of a "
        "diffusers pipeline without latents, by its probability flow or by the variational bound "
        "of its steps. DATA is a folder of images, a run (its data), a .npy or .safetensors file, "
        "or a data set such as Digits. The result is written to likelihood.json.",
    )
    parser.add_argument("run", type=str, metavar="RUN", help="folder of a run or of a pipeline")
    parser.add_argument("data", type=str, metavar="DATA", help="data to measure")
    parser.add_class_arguments(LikelihoodRequest)
    arguments = parser.instantiate(parser.parse_args(list(argv))).as_dict()
    folder, data = Path(arguments.pop("run")), arguments.pop("data")
    _measure(folder, data, LikelihoodRequest(**arguments))


def _measure(folder: Path, name: str, request: LikelihoodRequest) -> None:
    """Measure, print and write."""
    if request.threads:
        torch.set_num_threads(request.threads)
    check_writable(path := _record_path(folder, request))
    device = find_device(request.device)
    model = load_image_model(folder, PipelineOptions(), device, request.weights)
    if model.latents is not None or model.is_text_conditioned:
        what = "text" if model.is_text_conditioned else "latents"
        raise ValueError(
            f"the network of {folder} works on {what}, whose likelihood is not that of images: "
            "name a run or pipeline of pixels, with labels or without"
        )
    denoiser = model.denoiser
    data = _read(read_source(name, denoiser.process), denoiser.process, request)
    dequantisation = request.resolve_dequantisation(data.bins)
    result = _evaluate(denoiser, data, dequantisation, request)
    if bad := int((~result.bits.isfinite()).sum()):
        raise ValueError(
            f"the bits of {bad} of {len(result.bits)} items are not finite: check the weights, or "
            "use an adaptive solver, more steps or other levels"
        )
    facts = {
        **_summarize(result),
        "data": f"{name}: {len(data.x0)} of {data.total} items",
        "data_hash": hashlib.sha256(data.x0.contiguous().numpy().tobytes()).hexdigest(),
        **_describe(denoiser.process, data, dequantisation, request),
        **environment_facts(),
        **weights_facts(folder, request.weights),
        "network_hash": hash_networks([denoiser.network]),
        "values": result.bits.tolist(),
    }
    rule = type(dequantisation).__name__ if dequantisation else "density"
    _write(path, ", ".join((request.method, *[rule] * (request.method == "ode"), name)), facts)
    print("\n".join(_table(result)))
    print(f"{facts['data']}; {_explain(denoiser.process, facts)}")
    print(f"{result.evaluations:g} network evaluations for each item; result -> {path}")


def _read(source: DataSource, process: Process, request: LikelihoodRequest) -> _Data:
    """Items spread evenly over the data, with what they condition the network on."""
    if source.is_latent or source.is_stream or source.texts:
        what = "latents" if source.is_latent else "a stream" if source.is_stream else "captions"
        raise ValueError(
            f"the data is or has {what}, expected items of x_0, or x_0 and a label, that can be "
            "read in any order: name the folder of the images, or a file of arrays"
        )
    total = len(source)
    count = min(request.n, total) if request.n else total
    rows = [index * total // count for index in range(count)]
    known = (
        process if request.conditional else replace(process, classes=0, dropout=0, conditions={})
    )
    items = [read_item(partial(source.__getitem__, row), row, known) for row in rows]
    x0, label, extras = default_collate(items)
    condition = batch_condition(known, label, extras)
    if request.bins:
        check_values(process, x0, request.bins)
    return _Data(x0, condition, request.bins or detect_bins(process, x0), total)


def _evaluate(
    denoiser: Denoiser,
    data: _Data,
    dequantisation: Dequantisation | None,
    request: LikelihoodRequest,
) -> Likelihood:
    progress = sys.stderr.isatty()
    if request.method == "bound":
        return variational_bound(
            denoiser,
            data.x0,
            data.bins,
            grid=request.grid,
            steps=request.steps,
            variance=request.variance,
            condition=data.condition,
            seed=request.seed,
            batch_size=request.batch_size,
            progress=progress,
        )
    return bits_per_dimension(
        denoiser,
        data.x0,
        dequantisation,
        draws=request.importance,
        trace=request.resolve_trace(data.x0[0].numel()),
        solver=request.solver,
        steps=request.steps or 1,
        condition=data.condition,
        seed=request.seed,
        batch_size=request.batch_size,
        progress=progress,
    )


def _summarize(result: Likelihood) -> dict[str, Any]:
    """The numbers of a result."""
    parts = {name: float(values.mean()) for name, values in _parts(result).items()}
    return {
        "bits_per_dimension": result.mean,
        "standard_error": result.standard_error if len(result.bits) > 1 else None,
        "spread": result.spread if len(result.bits) > 1 else None,
        **parts,
        "evaluations": result.evaluations,
    }


def _parts(result: Likelihood) -> dict[str, Tensor]:
    """The parts of a bound by name, whose sum it is."""
    if not isinstance(result, Bound):
        return {}
    names = ("prior", "transitions", "decoder", *["latent"] * bool(result.latent.any()))
    return {name: getattr(result, name) for name in names}


def _table(result: Likelihood) -> list[str]:
    """The result as a table: mean, standard error and standard deviation over the items."""
    rows = {"bits per dimension": result.bits, **_parts(result)}
    lines = [f"{'':<20}{'mean':>12}{'standard error':>17}{'spread':>12}"]
    for name, bits in rows.items():
        row = Likelihood(bits, result.evaluations)
        lines.append(f"{name:<20}{row.mean:>12.4f}{row.standard_error:>17.4f}{row.spread:>12.4f}")
    return lines


def _describe(
    process: Process,
    data: _Data,
    dequantisation: Dequantisation | None,
    request: LikelihoodRequest,
) -> dict[str, Any]:
    """Plain data on which the numbers depend, beside the network and the data."""
    common = {
        "method": request.method,
        "bins": data.bins,
        "bins_are_detected": data.bins is not None and not request.bins,
        "conditional": data.condition is not None,
        "seed": request.seed,
        "batch_size": request.batch_size,
    }
    if request.method == "bound":
        is_learned = process.variance == "learned"
        default = "learned" if is_learned else FIXED_VARIANCE
        variance = default if request.variance is None else request.variance
        return common | {"grid": to_spec(request.grid), "variance": variance}
    level = dequantisation.level(process) if dequantisation else first_level(process)
    return common | {
        "dequantisation": None if dequantisation is None else to_spec(dequantisation),
        **_tau(dequantisation, process),
        "importance": request.importance,
        "logsnr": float(level.logsnr),
        "trace": to_spec(request.resolve_trace(data.x0[0].numel())),
        "solver": to_spec(request.solver),
        "steps": request.steps or 1,
    }


def _tau(dequantisation: Dequantisation | None, process: Process) -> dict[str, float]:
    """τ of truncated normal noise at the level of the process."""
    if not isinstance(dequantisation, TruncatedNormal):
        return {}
    return {"tau": dequantisation.effective_tau(process)}


def _explain(process: Process, facts: Mapping[str, Any]) -> str:
    """The values of the data and the method in one line."""
    values = "continuous values, whose density depends on their unit"
    if facts["bins"]:
        origin = "found in the data" if facts["bins_are_detected"] else "as given"
        span = f"from {process.low:g} to {process.high:g}"
        values = f"{facts['bins']} values {span} ({origin})"
    if facts["method"] == "bound":
        return f"{values}; variational bound of {facts['evaluations']:g} steps"
    noise = describe_spec(facts["dequantisation"]) if facts["dequantisation"] else "no noise"
    tau = f", τ = {facts['tau']:.3g}" if "tau" in facts else ""
    return f"{values}; {noise}{tau} at λ = {facts['logsnr']:.2f}; {describe_spec(facts['trace'])}"


def _record_path(folder: Path, request: LikelihoodRequest) -> Path:
    """likelihood.json of the run for its averaged weights, which its report shows."""
    if not request.out and has_data(folder) and request.weights == AVERAGED:
        return Run(folder).likelihood
    return Path(request.out or default_out(folder)) / "likelihood.json"


def _write(path: Path, name: str, facts: dict[str, Any]) -> None:
    """Add a result to those of the same network; results of other weights are left out."""
    results = read_json(path) if path.is_file() else {}
    kept = {
        key: value
        for key, value in results.items()
        if isinstance(value, dict) and value.get("network_hash") == facts["network_hash"]
    }
    write_record(path, {**kept, name: facts})
