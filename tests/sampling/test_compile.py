"""The denoiser compiles with torch.compile; on a GPU the loop never synchronises, and CUDA graphs
capture it.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.samplers import DDIM, AdamsBashforth, AdamsMoulton, DPMSolverPP, UniPC
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Trailing
from tests.helpers.oracles import PREDICTION_TYPES

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
