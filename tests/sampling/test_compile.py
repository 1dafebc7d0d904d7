"""The denoiser compiles with torch.compile; on a GPU the loop never synchronises, and CUDA graphs
capture it.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore.core.denoiser import Denoiser, DenoiserWrapper
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.guidance import APG, CFG, Interval, Label, LinearScale, Rescale, WeakerNetwork
from diffcore.samplers import DDIM, AdamsBashforth, AdamsMoulton, DPMSolverPP, Heun, UniPC
from diffcore.sampling.compiled import CompiledDenoiser
from diffcore.sampling.generation import sample
from diffcore.sampling.graph import LoopGraph, check_graph
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Cosine, Trailing, Truncated
from tests.helpers.oracles import PREDICTION_TYPES, process

NOISE = Noise(torch.arange(4), (2,))
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DETERMINISTIC = (DDIM(), DPMSolverPP("2M"), UniPC(2), AdamsBashforth(4), AdamsMoulton(3))


class Network(nn.Module):
    """A small network with a time input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, time):
        return self.layer(torch.cat((x, time[:, None] / 1000), 1))


def denoiser(prediction="v_prediction"):
    torch.manual_seed(0)
    return Denoiser(Network(), Process(Cosine(), prediction, shape=(2,))).eval()


@pytest.mark.parametrize("prediction", [name for name in PREDICTION_TYPES if name != "epsilon"])
def test_the_denoiser_compiles_once_and_again_when_the_level_first_changes(prediction):
    """Arithmetic and network are one graph, of which α, σ and the time become inputs."""
    torch._dynamo.reset()
    counter, plain = CompileCounter(), denoiser(prediction)
    compiled = torch.compile(plain, fullgraph=True, backend=counter)
    compiled.process = plain.process
    for steps in (20, 13):
        knots = Trailing().knots(Cosine(), steps)
        with torch.no_grad():
            x, evaluations = integrate(compiled, DDIM(), NOISE.start(), knots, NOISE)
            assert torch.equal(x, integrate(plain, DDIM(), NOISE.start(), knots, NOISE)[0])
        assert evaluations == steps
    assert counter.frame_count <= 2


def test_a_compiled_network_alone_is_compiled_once():
    """The time is a tensor, so a new level needs no new graph."""
    torch._dynamo.reset()
    counter, plain = CompileCounter(), denoiser()
    compiled = Denoiser(
        torch.compile(plain.network, fullgraph=True, backend=counter), plain.process
    )
    with torch.no_grad():
        integrate(compiled, DDIM(), NOISE.start(), Trailing().knots(Cosine(), 20), NOISE)
    assert counter.frame_count == 1


@ON_GPU
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=str)
def test_the_loop_does_not_synchronise_with_the_gpu(sampler):
    noise, model = Noise(torch.arange(4), (2,), torch.device("cuda")), denoiser().cuda()
    x, knots = noise.start(), Trailing().knots(Cosine(), 10)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            integrate(model, sampler, x, knots, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=str)
def test_a_cuda_graph_captures_the_loop(sampler):
    noise, model = Noise(torch.arange(4), (2,), torch.device("cuda")), denoiser().cuda()
    x, knots = noise.start(), Trailing().knots(Cosine(), 10)

    def loop():
        with torch.no_grad():
            return integrate(model, sampler, x, knots, noise)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries create their handles before the capture
        expected = loop()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop()
    x.copy_(x + 1)
    moved = loop()
    graph.replay()
    torch.testing.assert_close(captured, moved)
    assert not torch.allclose(captured, expected)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_a_compiled_denoiser_is_one_graph_for_all_levels_and_numbers_of_steps(prediction):
    torch._dynamo.reset()
    counter = CompileCounter()
    plain = denoiser(prediction)
    compiled = CompiledDenoiser(plain, backend=counter)
    schedule = Truncated(Cosine(), -8.0, 8.0)  # at α = 0 a network of ε cannot be evaluated
    with torch.no_grad():
        for steps in (11, 7):
            knots = Trailing().knots(schedule, steps)
            x, count = integrate(compiled, DDIM(), NOISE.start(), knots, NOISE)
            expected = integrate(plain, DDIM(), NOISE.start(), knots, NOISE)[0]
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
            assert count == steps
    assert counter.frame_count == 1


def test_guidance_adds_one_graph_of_twice_as_many_rows():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = CompiledDenoiser(Denoiser(ClassNetwork(), process(classes=2)).eval(), counter)
    rule = Interval(CFG(3.0), logsnr=(-1.0, 2.0))
    sample(compiled, DDIM(), steps=9, seeds=range(4), condition=[0, 1, 1, 0], guidance=rule)
    assert counter.frame_count == 2


RULES = {
    "CFG": (CFG(3.0), 1),
    "APG": (APG(3.0, momentum=-0.5, threshold=2.0), 1),
    "negative label": (CFG(2.0, Label(1)), 1),
    "varying scale": (APG(LinearScale(2.0, 5.0)), 1),
    "interval": (Interval(CFG(3.0), logsnr=(-1.0, 2.0)), 2),
    "APG in an interval": (Interval(APG(LinearScale(2.0, 5.0)), logsnr=(-1.0, 2.0)), 2),
}
"""Rule -> number of graphs."""
LABELS = torch.tensor([0, 1, 1, 0])


def class_denoiser():
    torch.manual_seed(0)
    return Denoiser(ClassNetwork(), process(classes=2)).eval()


def guided_samples(denoiser, rule, steps, **options):
    knots = Trailing().knots(Cosine(), steps)
    knots = insert_levels(knots, rule.levels(denoiser.process))
    with torch.no_grad():
        return integrate(denoiser, DDIM(), NOISE.start(), knots, NOISE, rule, LABELS, **options)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("CFG", "APG", "interval") else ())
        for name in RULES
    ],
)
def test_the_rule_is_part_of_one_graph_for_all_steps(name):
    torch._dynamo.reset()
    counter, plain = CompileCounter(), class_denoiser()
    compiled, (rule, graphs) = CompiledDenoiser(plain, counter), RULES[name]
    for steps in (9, 14):
        x, count = guided_samples(compiled, rule, steps)
        expected, expected_count = guided_samples(plain, rule, steps)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
        assert count == expected_count
    assert counter.frame_count == graphs
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_the_graph_contains_network_and_rule():
    torch._dynamo.reset()
    operations = []

    def backend(graph, inputs):
        operations.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    guided_samples(CompiledDenoiser(class_denoiser(), backend), RULES["APG"][0], 3)
    (names,) = operations
    assert any("linear" in name for name in names)
    assert {"clamp", "nan_to_num"} <= set(names)  # of APG's bound


@pytest.mark.parametrize("name", ("Rescale", "weaker network"))
def test_other_rules_combine_compiled_predictions(name):
    torch._dynamo.reset()
    counter, plain = CompileCounter(), class_denoiser()
    weaker = WeakerNetwork(class_denoiser())
    rule = Rescale(CFG(3.0)) if name == "Rescale" else CFG(3.0, weaker)
    x, _ = guided_samples(CompiledDenoiser(plain, counter), rule, 6)
    torch.testing.assert_close(x, guided_samples(plain, rule, 6)[0], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_parts_of_a_batch_are_compiled_once():
    torch._dynamo.reset()
    counter, plain = CompileCounter(), class_denoiser()
    compiled, rule = CompiledDenoiser(plain, counter), CFG(3.0)
    x, _ = guided_samples(compiled, rule, 6, micro_batch=2)
    torch.testing.assert_close(x, guided_samples(plain, rule, 6)[0], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch itself
def test_inductor_compiles_a_network_with_its_rule():
    torch._dynamo.reset()
    plain = class_denoiser()
    rule = Interval(APG(3.0, momentum=-0.5), logsnr=(-1.0, 2.0))
    options = {"seeds": [1, 2], "condition": [0, 1], "guidance": rule, "batch_size": 2}
    expected = sample(plain, DPMSolverPP("2M"), steps=6, **options).x
    found = sample(CompiledDenoiser(plain), DPMSolverPP("2M"), steps=6, **options).x
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class ClassNetwork(nn.Module):
    """A small network with labels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, time, class_labels):
        return self.layer(torch.cat((x, (time / 1000 + class_labels)[:, None]), 1))


class NoReading(TorchDispatchMode):
    """Raises an error if the host reads the value of a tensor, for which it would wait on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert func not in reads, f"{func} reads a value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("sampler", (*DETERMINISTIC, Heun(), DDIM(1.0)), ids=str)
def test_no_step_of_the_loop_reads_a_value_of_the_samples(sampler, is_compiled):
    """A double for a GPU: the schedule's own values, on the host, are computed before.

    Operations inside of a compiled graph are not dispatched, so its code runs eagerly here.
    """
    torch._dynamo.reset()
    model = Denoiser(ClassNetwork(), process(classes=2)).eval()
    model = CompiledDenoiser(model, "eager") if is_compiled else model
    knots, labels = Trailing().knots(Cosine(), 6), torch.tensor([0, 1, 1, 0])
    x = NOISE.start()
    states = []

    def callback(step, state, prediction):
        states.append((state, prediction))

    with torch.no_grad():
        rule = APG(2.0) if is_compiled else CFG(2.0)
        integrate(model, sampler, x, knots, NOISE, rule, labels, callback=callback)
        z = {state.step: NOISE.step(state.step) for state, _ in states}
        drawn = _DrawnNoise(NOISE.seeds, NOISE.shape, drawn=z)
        with torch.compiler.set_stance("force_eager"), NoReading():
            for state, _ in states:
                prediction = guided_prediction(model, rule, state.x, state.level, labels, None)[0]
                sampler.advance(state, prediction, drawn)


@dataclass(frozen=True)
class _DrawnNoise(Noise):
    """Noise that was drawn before, on the host."""

    drawn: dict = field(default_factory=dict)

    def step(self, index):
        return self.drawn[index]


def eager_capture(calls):
    """A double of a CUDA graph: a replay repeats the call and writes into its first result."""

    def capture(call):
        result, count = call()
        calls.append("capture")

        def replay():
            calls.append("replay")
            result.copy_(call()[0])

        return (result, count), replay

    return capture


def test_a_captured_loop_is_replayed_on_the_values_of_each_batch():
    model = Denoiser(ClassNetwork(), process(classes=2)).eval()
    knots, calls = Trailing().knots(Cosine(), 4), []

    def loop(x, labels):
        return integrate(model, DDIM(), x, knots, NOISE, CFG(2.0), labels)

    graph = LoopGraph(loop, eager_capture(calls))
    with torch.no_grad():
        batches = [(torch.randn(4, 2), torch.tensor(labels)) for labels in ([0, 1, 1, 0], [1] * 4)]
        found = [graph(*batch) for batch in batches]
        for batch, (x, count) in zip(batches, found, strict=True):
            assert torch.equal(x, loop(*batch)[0])
            assert count == 8
    assert calls == ["capture", "replay", "replay"]


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match="the network is on cpu: a CUDA graph needs"):
        sample(denoiser(), DDIM(), steps=3, seeds=[1], graph=True)


@pytest.mark.parametrize(
    ("sampler", "has_callback", "message"),
    [(DDIM(1.0), False, "draws noise"), (DDIM(), True, "calls no callback")],
)
def test_a_graph_needs_a_loop_that_is_always_the_same(sampler, has_callback, message):
    class OnCuda(DenoiserWrapper):
        device = torch.device("cuda")

    knots = Trailing().knots(Cosine(), 3)
    with pytest.raises(ValueError, match=message):
        check_graph(OnCuda(denoiser()), sampler, knots, has_callback)


@ON_GPU
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=str)
def test_samples_by_a_cuda_graph_are_those_of_the_loop(sampler):
    model = Denoiser(ClassNetwork(), process(classes=2)).eval().cuda()
    options = {"seeds": range(10), "condition": [0, 1] * 5, "guidance": CFG(2.0), "batch_size": 4}
    expected = sample(model, sampler, steps=8, **options)
    found = sample(model, sampler, steps=8, graph=True, **options)
    torch.testing.assert_close(found.x, expected.x)
    assert found.evaluations == expected.evaluations
