"""The example of diffusers, beside which training is measured, trains the network of the recipe."""

import torch
from benchmarks.sides.bare_loop import BareLoop
from benchmarks.sides.diffusers_loop import DiffusersLoop


def test_the_example_trains_the_same_network_with_the_same_batch():
    example, bare = DiffusersLoop(), BareLoop(torch.device("cpu"))
    shapes = [value.shape for value in example.network.parameters()]
    assert shapes == [value.shape for value in bare.network.parameters()]
    assert example.loader.total_batch_size == bare.batch
    before = [value.detach().clone() for value in example.network.parameters()]
    averaged = [value.clone() for value in example.average.shadow_params]
    for _ in range(2):  # the warm-up begins with a learning rate of 0
        example.step()
    pairs = zip(example.network.parameters(), before, strict=True)
    assert any(not torch.equal(value, past) for value, past in pairs)
    moved = zip(example.average.shadow_params, averaged, strict=True)
    assert any(not torch.equal(value, past) for value, past in moved)
    assert example.average.optimization_step == 2
