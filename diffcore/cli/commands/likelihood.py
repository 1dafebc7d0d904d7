"""`diffcore likelihood`: the bits per dimension of data under the network of a run or pipeline."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffcore.cli.commands.sample import find_device, read_rank
from diffcore.cli.evaluation.likelihood_data import LikelihoodData, read_data
from diffcore.cli.evaluation.likelihood_request import LikelihoodRequest
from diffcore.cli.evaluation.record import (
    default_out,
    environment_facts,
    has_data,
    weights_facts,
    write_record,
)
from diffcore.cli.evaluation.samples import end_ranks, start_ranks
from diffcore.cli.image_model import PipelineOptions, load_image_model
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.evaluation.likelihood.bits import Likelihood, bits_per_dimension, join_likelihoods
from diffcore.evaluation.likelihood.bound import FIXED_VARIANCE, Bound, variational_bound
from diffcore.evaluation.likelihood.density import first_level
from diffcore.evaluation.likelihood.dequantisation import (
    Dequantisation,
    TruncatedNormal,
)
from diffcore.io.files import check_writable
from diffcore.io.parser import ComponentParser
from diffcore.io.plain_data import read_json
from diffcore.io.specs import describe_spec, to_spec
from diffcore.run import AVERAGED, Run
from diffcore.sampling.files import hash_networks

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Measure the data that the second word names under the model that the first word names.

    Args:
        argv: command-line words after `likelihood`.
    """
    parser = ComponentParser(
        prog="diffcore likelihood",
        usage="diffcore likelihood RUN DATA [--option value ...]",
        description="Measure the bits per dimension of DATA under the network of a run or of a "
        "diffusers pipeline without text, by its probability flow or by the variational bound "
        "of its steps; the bits per latent dimension if the network works on latents. DATA is a "
        "folder of images, a run (its data), a .npy or .safetensors file, or a data set such as "
        "Digits. The ranks of a launcher share the items. The result is written to "
        "likelihood.json.",
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
    start_ranks(read_rank()[1])
    device = find_device(request.device)
    model = load_image_model(folder, PipelineOptions(), device, request.weights)
    if model.is_text_conditioned:
        raise ValueError(
            f"the network of {folder} is conditioned on text, and the likelihood of an image "
            "depends on its prompt: name a run or pipeline with labels or without"
        )
    denoiser = model.denoiser
    data = read_data(name, model, request)
    dequantisation = request.resolve_dequantisation(data.bins)
    result = _gather(_evaluate_chunks(denoiser, data, dequantisation, request))
    if result is None:
        return
    if bad := int((~result.bits.isfinite()).sum()):
        raise ValueError(
            f"the bits of {bad} of {len(result.bits)} items are not finite: check the weights, or "
            "use an adaptive solver, more steps or other levels"
        )
    facts = {
        **_summarize(result),
        "dimensions": _dimensions(data),
        "data": f"{name}: {data.origin}",
        "data_hash": hashlib.sha256(data.x0.contiguous().numpy().tobytes()).hexdigest(),
        **_describe(denoiser.process, data, dequantisation, request),
        **environment_facts(),
        **weights_facts(folder, request.weights),
        "network_hash": hash_networks([denoiser.network]),
        "values": result.bits.tolist(),
    }
    rule = type(dequantisation).__name__ if dequantisation else "density"
    words = (request.method, *[rule] * (request.method == "ode"), *["latents"] * data.is_latent)
    _write(path, ", ".join((*words, name)), facts)
    print("\n".join(_table(result, f"bits per {_dimensions(data)}")))
    print(f"{facts['data']}; {_explain(denoiser.process, facts)}")
    print(f"{result.evaluations:g} network evaluations for each item; result -> {path}")


def _evaluate_chunks(
    denoiser: Denoiser,
    data: LikelihoodData,
    dequantisation: Dequantisation | None,
    request: LikelihoodRequest,
) -> list[Likelihood]:
    """The likelihoods of the chunks of `batch_size` items that this rank measures."""
    rank, ranks = read_rank()
    chunks = torch.arange(len(data.x0)).split(request.batch_size)[rank::ranks]
    found = []
    is_shown = sys.stderr.isatty() and not rank
    with tqdm(total=sum(map(len, chunks)), unit="sample", disable=not is_shown) as bar:
        for rows in chunks:
            found.append(_evaluate(denoiser, data, rows, dequantisation, request))
            bar.update(len(rows))
    return found


def _evaluate(
    denoiser: Denoiser,
    data: LikelihoodData,
    rows: Tensor,
    dequantisation: Dequantisation | None,
    request: LikelihoodRequest,
) -> Likelihood:
    """The likelihood of one chunk of consecutive items."""
    condition = None if data.condition is None else data.condition[rows]
    if request.method == "bound":
        return variational_bound(
            denoiser,
            data.x0[rows],
            data.bins,
            grid=request.grid,
            steps=request.steps,
            variance=request.variance,
            condition=condition,
            seed=request.seed,
            first=int(rows[0]),
            batch_size=request.batch_size,
        )
    return bits_per_dimension(
        denoiser,
        data.x0[rows],
        dequantisation,
        draws=request.importance,
        trace=request.resolve_trace(data.x0[0].numel()),
        solver=request.solver,
        steps=request.steps or 1,
        condition=condition,
        seed=request.seed,
        first=int(rows[0]),
        batch_size=request.batch_size,
    )


def _gather(own: list[Likelihood]) -> Likelihood | None:
    """The likelihood of all items on the first rank, in their order; None on the others."""
    rank, ranks = read_rank()
    if ranks == 1:
        return join_likelihoods(own)
    shares: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(shares, own)
    end_ranks(ranks)
    if rank:
        return None
    rounds = zip_longest(*shares)  # chunk k is that of rank k modulo the number of ranks
    return join_likelihoods([part for each in rounds for part in each if part is not None])


def _dimensions(data: LikelihoodData) -> str:
    """The dimensions of which a result has bits."""
    return "latent dimension" if data.is_latent else "dimension"


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


def _table(result: Likelihood, title: str) -> list[str]:
    """The result as a table: mean, standard error and standard deviation over the items."""
    rows = {title: result.bits, **_parts(result)}
    lines = [f"{'':<26}{'mean':>12}{'standard error':>17}{'spread':>12}"]
    for name, bits in rows.items():
        row = Likelihood(bits, result.evaluations)
        lines.append(f"{name:<26}{row.mean:>12.4f}{row.standard_error:>17.4f}{row.spread:>12.4f}")
    return lines


def _describe(
    process: Process,
    data: LikelihoodData,
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
    if facts["dimensions"] == "latent dimension":
        values = (
            "latents as the network sees them; their density says nothing of the decoder, and is "
            "not comparable with bits of pixels or of another encoder"
        )
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
