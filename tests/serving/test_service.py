"""Requests that share the evaluations of one network get the samples that they get alone."""

import random
import threading
from concurrent.futures import CancelledError

import pytest
import torch

from diffcore.core.denoiser import Denoiser, DenoiserWrapper
from diffcore.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    AutoGuidance,
    Interval,
    PerturbedAttention,
)
from diffcore.samplers import DDIM, AdamsMoulton, AdaptiveRungeKutta, Heun, Restart
from diffcore.sampling.generation import sample
from diffcore.schedules import Flow, Trailing
from diffcore.serving import SamplingLimits, SamplingRequest, SamplingService
from diffcore.serving.request import QueueFullError
from tests.helpers.oracles import mixture, process, unet
from tests.helpers.recording_network import small_denoiser

ROWS = 6
NETWORK = Denoiser(unet(), process(shape=(1, 8, 8))).eval()
RULES = (
    CFG(1.0),
    CFG(3.0),
    Interval(CFG(4.0), 0.3, 3.0),
    APG(3.0),
    AdaptiveGuidance(CFG(3.0), 0.9),
    CFG(2.0, PerturbedAttention(("*.attentions.*",))),
)
SAMPLERS = (DDIM(), DDIM(1.0), Heun(), AdamsMoulton(3), AdaptiveRungeKutta(rtol=0.2, atol=0.2))


class Calls(DenoiserWrapper):
    """A denoiser that records the number of rows and of different levels of each call."""

    def __init__(self, inner):
        super().__init__(inner)
        self.rows, self.levels = [], []

    def __call__(self, x, level, condition=None):
        self.rows.append(len(x))
        self.levels.append(torch.as_tensor(level.logsnr).flatten().tolist())
        return self.inner(x, level, condition)


def mixed_requests(count, seed=0):
    """Requests of different sizes, labels, samplers, steps and guidance."""
    draw = random.Random(seed)
    return [
        SamplingRequest(
            [draw.getrandbits(60) for _ in range(size)],
            [draw.randrange(2) for _ in range(size)],
            draw.choice(SAMPLERS),
            Trailing(),
            draw.choice((2, 3, 5)),
            draw.choice(RULES),
        )
        for size in (draw.choice((1, 1, 2, 4)) for _ in range(count))
    ]


def run(service):
    """Work until nothing is left, and return the number of calls of the network."""
    calls = 0
    while service.work():
        calls += 1
    return calls


def alone(request, denoiser=NETWORK, rows=ROWS):
    service = SamplingService(denoiser, rows)
    future = service.submit(request)
    run(service)
    return future.result()


def test_mixed_requests_have_the_bits_that_each_has_alone():
    requests = mixed_requests(7)
    service = SamplingService(NETWORK, ROWS)
    futures = [service.submit(request) for request in requests]
    run(service)
    for request, future in zip(requests, futures, strict=True):
        expected, result = alone(request), future.result()
        assert torch.equal(result.x, expected.x)
        assert result.evaluations == expected.evaluations


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_samples_are_those_of_sample_to_rounding(rule):
    sampler = SAMPLERS[RULES.index(rule) % len(SAMPLERS)]
    request = SamplingRequest([5, 9], [1, 0], sampler, Trailing(), 4, rule)
    result = alone(request)
    expected = sample(
        NETWORK,
        sampler,
        Trailing(),
        4,
        seeds=[5, 9],
        condition=[1, 0],
        guidance=rule,
        batch_size=1,
        micro_batch=ROWS,
    )
    torch.testing.assert_close(result.x, expected.x, rtol=0, atol=2e-5)
    assert result.evaluations == expected.evaluations
    assert result.planned == expected.planned
    assert result.knots == expected.knots


def test_samples_are_those_of_sample_in_double_precision():
    """Rounding apart, the arithmetic is the same: an exact denoiser shows it to the last digits."""
    oracle = mixture()
    request = SamplingRequest([3, 4, 8], [0, 1, 2], DDIM(1.0), steps=9, guidance=CFG(2.0))
    service = SamplingService(oracle, 4, dtype=torch.float64)
    future = service.submit(request)
    run(service)
    expected = sample(
        oracle,
        DDIM(1.0),
        steps=9,
        seeds=[3, 4, 8],
        condition=[0, 1, 2],
        guidance=CFG(2.0),
        dtype=torch.float64,
    )
    torch.testing.assert_close(future.result().x, expected.x, rtol=0, atol=1e-12)


def test_rows_of_different_levels_and_requests_fill_batches_of_one_size():
    calls = Calls(small_denoiser())
    service = SamplingService(calls, 4)
    steps = (3, 5, 7, 9)
    for seed, count in enumerate(steps):
        service.submit(SamplingRequest([seed], [0], DDIM(), Trailing(), count, CFG(2.0)))
    run(service)
    assert set(calls.rows) == {4}
    assert sum(len(set(levels)) > 1 for levels in calls.levels) > 5
    used = 2 * sum(steps)
    values = service.counters.values(service.gauges)
    assert values['rows_total{use="used"}'] == used
    assert values["batches_total"] == len(calls.rows)
    assert len(calls.rows) <= -(-used // 4) + 4  # full batches, but for those of the last sample


def test_a_request_of_few_steps_does_not_wait_for_slower_ones():
    service = SamplingService(small_denoiser(), 8)
    slow = [service.submit(SamplingRequest([i], [0], DDIM(), Trailing(), 40)) for i in range(3)]
    service.work()
    quick = service.submit(SamplingRequest([9], [1], DDIM(), Trailing(), 2))
    service.work()
    service.work()
    assert quick.done()
    assert not any(future.done() for future in slow)


def test_a_small_request_does_not_wait_for_a_large_one_before_it():
    service = SamplingService(small_denoiser(), 4)
    large = service.submit(SamplingRequest(range(40), [0] * 40, DDIM(), Trailing(), 5))
    small = service.submit(SamplingRequest([99], [0], DDIM(), Trailing(), 5))
    for _ in range(5):
        service.work()
    assert small.done()
    assert not large.done()
    run(service)
    assert large.result().x.shape == (40, 2)


def test_references_to_another_network_are_rows_of_its_own_calls():
    weaker = Calls(small_denoiser(classes=2))
    rule = AutoGuidance(2.0, weaker)
    request = SamplingRequest([1, 2, 3], [0, 1, 1], DDIM(), Trailing(), 3, rule)
    denoiser = small_denoiser()
    result = alone(request, denoiser, 4)
    expected = sample(
        denoiser, DDIM(), Trailing(), 3, seeds=[1, 2, 3], condition=[0, 1, 1], guidance=rule
    )
    assert weaker.rows[:3] == [4, 4, 4]
    torch.testing.assert_close(result.x, expected.x)


def test_a_cancelled_request_leaves_the_others_unchanged():
    first, second = mixed_requests(2, seed=4)
    service = SamplingService(NETWORK, ROWS)
    cancelled, kept = service.submit(first), service.submit(second)
    service.work()
    assert cancelled.cancel()
    run(service)
    with pytest.raises(CancelledError):
        cancelled.result()
    assert torch.equal(kept.result().x, alone(second).x)
    values = service.counters.values(service.gauges)
    assert values['requests_total{outcome="cancelled"}'] == 1
    assert values["unfinished_samples"] == values["active_samples"] == 0


def test_a_request_is_given_up_when_its_time_is_over():
    service = SamplingService(small_denoiser(), 4)
    late = service.submit(SamplingRequest([1], [0]), timeout=0.0)
    kept = service.submit(SamplingRequest([1], [0]), timeout=60.0)
    run(service)
    with pytest.raises(TimeoutError, match="within 0 seconds"):
        late.result()
    assert kept.result().x.isfinite().all()
    assert service.counters.values({})['requests_total{outcome="timed_out"}'] == 1


def test_a_failing_network_ends_its_requests_and_not_the_service():
    denoiser = small_denoiser()
    service = SamplingService(denoiser, 4)
    denoiser.network.fails = True
    failed = service.submit(SamplingRequest([1], [0]))
    run(service)
    denoiser.network.fails = False
    kept = service.submit(SamplingRequest([1], [0]))
    run(service)
    with pytest.raises(RuntimeError, match="the network failed"):
        failed.result()
    assert kept.done()
    assert service.gauges == {"unfinished_samples": 0, "active_samples": 0}


def test_an_adaptive_sampler_is_bounded_in_evaluations():
    limits = SamplingLimits(evaluations=20)
    service = SamplingService(mixture(), 4, limits, torch.float64)
    endless = service.submit(
        SamplingRequest([1], [0], AdaptiveRungeKutta(rtol=1e-12, atol=1e-12), steps=4)
    )
    kept = service.submit(SamplingRequest([1], [0], DDIM(), steps=20))
    run(service)
    with pytest.raises(ValueError, match="not done after 20"):
        endless.result()
    assert kept.done()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, "seeds are 0, expected 1 to 64"),
        ({"seeds": range(65)}, "seeds are 65"),
        ({"seeds": [1.5]}, "seeds has 1.5"),
        ({"condition": [7]}, "out of range"),
        ({"condition": [0, 1]}, "expected one label for each"),
        ({"steps": 0}, "step"),
        ({"steps": 251}, "contains the number 251"),
        ({"sampler": Restart(DDIM(), ((0.1, 0.5, 2, 10**9),))}, "contains the number 1000000000"),
        ({"sampler": Restart(DDIM(), ((0.1, 0.5, 250, 250),))}, "more than 1000"),
        ({"condition": None, "guidance": CFG(2.0)}, "needs a condition"),
        ({"guidance": AutoGuidance(2.0, "runs/other")}, "names the run"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_computed(arguments, message):
    calls = Calls(small_denoiser())
    service = SamplingService(calls, 4)
    with pytest.raises(ValueError, match=message):
        service.submit(SamplingRequest(**({"seeds": [1], "condition": [0]} | arguments)))
    assert not service.work()
    assert calls.rows == []
    assert service.counters.values({})['requests_total{outcome="refused"}'] == 1


def test_requests_beyond_the_queue_are_refused_until_samples_are_done():
    service = SamplingService(small_denoiser(), 4, SamplingLimits(queue=3))
    service.submit(SamplingRequest([1, 2], [0, 0], steps=3))
    with pytest.raises(QueueFullError, match="2 samples are unfinished and 2 were requested"):
        service.submit(SamplingRequest([3, 4], [0, 0], steps=3))
    service.submit(SamplingRequest([3], [0], steps=3))
    run(service)
    assert service.submit(SamplingRequest([3, 4], [0, 0], steps=3))


def test_threads_submit_to_one_service():
    requests = mixed_requests(3, seed=1)
    results = {}
    with SamplingService(NETWORK, ROWS) as service:

        def draw(index):
            results[index] = service.submit(requests[index]).result(60).x

        threads = [threading.Thread(target=draw, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[i], alone(requests[i]).x) for i in range(3))


def test_a_closed_service_cancels_its_requests_and_accepts_no_more():
    with SamplingService(small_denoiser(), 4) as service:
        endless = service.submit(SamplingRequest(range(64), [0] * 64, Heun(), steps=250))
    assert endless.cancelled() or endless.done()
    with pytest.raises(RuntimeError, match="closed"):
        service.submit(SamplingRequest([1], [0]))


def test_the_text_of_the_counters_is_that_of_prometheus():
    service = SamplingService(small_denoiser(), 4)
    service.submit(SamplingRequest([1], [0], steps=3))
    run(service)
    lines = service.counters.text(service.gauges).splitlines()
    assert 'diffcore_requests_total{outcome="completed"} 1' in lines
    assert 'diffcore_rows_total{use="padding"} 9' in lines
    assert "# TYPE diffcore_latency_seconds summary" in lines
    assert "diffcore_latency_seconds_count 1" in lines
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


class TwoTimes(torch.nn.Module):
    """A network whose output depends on the level and on the end of the step."""

    def forward(self, x, time, end_time):
        return x * (1 + time - end_time / 2)[:, None] / 1000


def test_a_network_of_two_times_receives_the_end_of_each_rows_step():
    record = process(Flow(), classes=0, prediction="flow_prediction", estimate="mean_velocity")
    denoiser = Denoiser(TwoTimes(), record)
    service = SamplingService(denoiser, 3)
    requests = [SamplingRequest([seed], None, DDIM(), Trailing(), seed) for seed in (2, 3, 4)]
    futures = [service.submit(request) for request in requests]
    run(service)
    for seed, future in zip((2, 3, 4), futures, strict=True):
        expected = sample(denoiser, DDIM(), Trailing(), seed, seeds=[seed])
        torch.testing.assert_close(future.result().x, expected.x)
