"""The perceptron of the studies of claims, and its training."""

from functools import partial

import torch
from experiments.claims.arms import ARMS
from experiments.claims.network import Perceptron, TrainingData, batch_loss, digits_data, train
from torch.nn.utils import parameters_to_vector

from diffcore.core.process import Process
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE


def test_only_a_perceptron_with_time_input_depends_on_time():
    x, early, late = torch.randn(4, 1, 8, 8), torch.full((4,), 10.0), torch.full((4,), 900.0)
    with_time, without = Perceptron(), Perceptron(uses_time=False)
    assert not torch.equal(with_time(x, early), with_time(x, late))
    assert torch.equal(without(x, early), without(x, late))
    labels = torch.arange(4)
    assert not torch.equal(without(x, early, labels), without(x, early, labels + 1))


def test_training_lowers_the_loss_and_is_a_function_of_the_seed():
    data = TrainingData(torch.tensor([[1.0, 0.5], [-0.5, 1.0]]))
    process = Process(prediction="v_prediction", shape=(2,))
    network, objective = partial(Perceptron, 2, 0, width=16), Objective(MSE("v_prediction"))
    runs = []
    for seed in (0, 0, 1):
        losses = []
        for _, denoiser in train(network, process, objective, data, seed, [1, 100]):
            with torch.no_grad():
                batches = [batch_loss(denoiser, objective, data, 7, step) for step in range(5)]
            losses.append(float(sum(batches)))
        runs.append(losses)
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][1] < 0.95 * runs[0][0]


def test_the_average_keeps_its_share_of_the_weights_before():
    """average = 0.995 average + 0.005 weights; the first step sets it."""
    data = TrainingData(torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=torch.float64))
    process = Process(prediction="v_prediction", shape=(2,))
    network, objective = Perceptron(2, 0, width=16).double(), Objective(MSE("v_prediction"))
    found = []
    for _, denoiser in train(lambda: network, process, objective, data, 0, [1, 2]):
        pair = (denoiser.network, network)
        found.append([parameters_to_vector(each.parameters()).detach().clone() for each in pair])
    (average, weights), (new_average, new_weights) = found
    torch.testing.assert_close(average, weights, rtol=0, atol=0)
    moved = 0.995 * average + 0.005 * new_weights
    torch.testing.assert_close(new_average, moved, rtol=0, atol=1e-14)
    assert (new_weights - weights).abs().max() > 1e-5


def test_a_batch_of_the_digits_has_its_labels():
    data = digits_data()
    assert data.labels is not None
    assert len(data.labels) == len(data.x0) == 1500
    process = ARMS["cosine, v"].process
    trained = train(Perceptron, process, Objective(MSE("v_prediction")), data, 0, [1])
    assert next(trained)[1].network.label is not None
