"""The service of continuous batching: equality of bits, throughput, latency, and bad requests.

The network is that of the digits recipe with its initial weights, whose cost is that of the trained
one.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor

from benchmarks.training_speed import digits_state
from diffcore.cli.commands.serve import listen
from diffcore.cli.image_model import ImageModel
from diffcore.core.denoiser import Denoiser
from diffcore.guidance import APG, CFG, Interval
from diffcore.samplers import DDIM, AdamsMoulton, DPMSolverPP, Heun
from diffcore.sampling import sample
from diffcore.serving import SamplingLimits, SamplingRequest, SamplingService

__all__ = ["ServingFacts", "measure_serving"]

SAMPLERS = (DDIM(), DDIM(1.0), AdamsMoulton(3), DPMSolverPP("2M"), Heun())
RULES = (CFG(1.0), CFG(2.0), CFG(4.0), APG(3.0), Interval(CFG(3.0), 0.3, 3.0))
LOADS = (0.5, 0.8)
"""Arrival rates at which latencies are measured, as shares of the measured throughput."""
BAD = (
    {"seeds": []},
    {"seeds": [1.5]},
    {"seeds": [2**63], "labels": [0]},
    {"seeds": [1], "labels": [11]},
    {"seeds": [1], "labels": [1, 2]},
    {"seeds": [1], "steps": 0},
    {"seeds": [1], "steps": 10**6},
    {"seeds": [1], "sampler": "NoSampler()"},
    {"seeds": [1], "guidance": "CFG(2)"},
    {"seeds": [1], "labels": [1], "guidance": "AutoGuidance(2.0, '/etc')"},
)


class ServingFacts(NamedTuple):
    """What was measured of the service.

    Args:
        equal: number of mixed requests with the bits that they get alone, of `requests`.
        requests: number of mixed requests.
        samples: number of their samples.
        rows: rows of each call of the network.
        seconds: seconds of all requests by the way of serving them.
        used: share of the rows of all calls that a sample needed, in the mixed service.
        latencies: requests a second, and p50 and p99 of the seconds, at each load.
        statuses: number of bad HTTP requests by status.
        unchanged: whether a good request beside the bad ones has the bits that it had before.
    """

    equal: int
    requests: int
    samples: int
    rows: int
    seconds: dict[str, float]
    used: float
    latencies: list[tuple[float, float, float]]
    statuses: dict[int, int]
    unchanged: bool


def measure_serving(requests: int = 200, rows: int = 16, bad: int = 100) -> ServingFacts:
    """Measure the service on mixed requests.

    Args:
        requests: number of mixed requests.
        rows: rows of each call of the network.
        bad: number of bad requests over HTTP.

    Returns:
        The facts.
    """
    with TemporaryDirectory() as folder:
        denoiser = digits_state(Path(folder) / "run").denoiser.eval()
    mixed = _mixed_requests(requests)
    seconds: dict[str, float] = {}
    sample(denoiser, DDIM(), steps=2, seeds=[0], batch_size=rows)  # the first call is slower
    serve_alone = partial(_serve_alone, denoiser, mixed, rows)
    alone = _timed(seconds, "one at a time, equal rows", serve_alone)
    _timed(seconds, "one at a time, `sample` without padding", partial(_sample, denoiser, mixed))
    with SamplingService(denoiser, rows) as service:
        together = _timed(seconds, "together", partial(_serve_together, service, mixed))
        values = service.counters.values({})
    used = values['rows_total{use="used"}'] / (rows * values["batches_total"])
    equal = sum(map(torch.equal, alone, together))
    capacity = requests / seconds["together"]
    latencies = [_measure_latency(denoiser, mixed, rows, load * capacity) for load in LOADS]
    statuses, unchanged = _send_bad(denoiser, rows, bad)
    samples = sum(len(request.seeds) for request in mixed)
    return ServingFacts(
        equal, requests, samples, rows, seconds, used, latencies, statuses, unchanged
    )


def _mixed_requests(count: int) -> list[SamplingRequest]:
    """Requests of 1 to 4 samples, different labels, samplers, steps and guidance."""
    draw = random.Random(0)
    sizes = [draw.choice((1, 1, 1, 2, 4)) for _ in range(count)]
    return [
        SamplingRequest(
            [draw.getrandbits(60) for _ in range(size)],
            [draw.randrange(10) for _ in range(size)],
            draw.choice(SAMPLERS),
            steps=draw.choice((5, 8, 12)),
            guidance=draw.choice(RULES),
        )
        for size in sizes
    ]


def _timed(seconds: dict[str, float], name: str, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    begin = time.perf_counter()
    results = call()
    seconds[name] = time.perf_counter() - begin
    return results


def _serve_alone(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], rows: int
) -> list[Tensor]:
    with SamplingService(denoiser, rows) as service:
        return [service.submit(request).result().x for request in requests]


def _serve_together(service: SamplingService, requests: Sequence[SamplingRequest]) -> list[Tensor]:
    futures = [service.submit(request) for request in requests]
    return [future.result().x for future in futures]


def _sample(denoiser: Denoiser, requests: Sequence[SamplingRequest]) -> list[Tensor]:
    return [
        sample(
            denoiser,
            request.sampler,
            request.grid,
            request.steps,
            seeds=request.seeds,
            condition=request.condition,
            guidance=request.guidance,
            batch_size=len(request.seeds),
        ).x
        for request in requests
    ]


def _measure_latency(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], rows: int, rate: float
) -> tuple[float, float, float]:
    """The rate, and p50 and p99 of the latency of requests that arrive as a Poisson process."""
    draw, latencies = random.Random(1), []
    with SamplingService(denoiser, rows) as service:
        futures = []
        for request in requests:
            time.sleep(draw.expovariate(rate))
            begin = time.perf_counter()
            future = service.submit(request)
            future.add_done_callback(
                lambda _, begin=begin: latencies.append(time.perf_counter() - begin)
            )
            futures.append(future)
        for future in futures:
            future.result()
    p50, p99 = np.quantile(latencies, (0.5, 0.99))
    return rate, float(p50), float(p99)


def _send_bad(denoiser: Denoiser, rows: int, count: int) -> tuple[dict[int, int], bool]:
    """Statuses of bad requests, and whether a good one among them keeps its bits."""
    good = {"seeds": [1, 2], "labels": [3, 4], "steps": 5, "guidance": "CFG(2)", "format": "npy"}
    with _web_service(denoiser, rows) as url:
        before = _send(url, good)
        statuses, others = Counter[int](), set()
        for index in range(count):
            statuses[_send(url, BAD[index % len(BAD)])[0]] += 1
            if index % 20 == 0:
                others.add(_send(url, good))
    return dict(statuses), others == {before} and before[0] == 200


@contextmanager
def _web_service(denoiser: Denoiser, rows: int) -> Iterator[str]:
    import uvicorn

    from diffcore.cli.serving.application import ServedModel, create_application
    from diffcore.cli.serving.messages import RequestDefaults

    listener = listen("127.0.0.1", 0)
    with listener, SamplingService(denoiser, rows, SamplingLimits()) as service:
        served = ServedModel("digits", ImageModel(denoiser), service, RequestDefaults(), 300.0)
        application = create_application(served)
        web = uvicorn.Server(
            uvicorn.Config(application, log_level="error", lifespan="off", ws="none")
        )
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        web.should_exit = True
        thread.join()


def _send(url: str, message: dict[str, Any]) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    try:
        with urlopen(Request(f"{url}/generate", json.dumps(message).encode(), headers)) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        with error:
            return error.code, error.read()
