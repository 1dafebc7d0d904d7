"""The perceptron of the studies of claims, and its training."""

from functools import partial

import torch
from experiments.claims.arms import ARMS
from experiments.claims.network import Perceptron, TrainingData, batch_loss, digits_data, train

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


def test_a_batch_of_the_digits_has_its_labels():
    data = digits_data()
    assert data.labels is not None
    assert len(data.labels) == len(data.x0) == 1500
    process = ARMS["cosine, v"].process
    trained = train(Perceptron, process, Objective(MSE("v_prediction")), data, 0, [1])
    assert next(trained)[1].network.label is not None
