"""Weights of samples and pixels in the loss, and levels shifted by the size of a batch."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import target
from diffcore.core.process import Process, TimeConditioning
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.objectives.weighting import MinSNR
from diffcore.schedules import Cosine, Discrete, Flow, Shifted, Truncated

PROCESS = Process(shape=(2, 4, 4), schedule=Cosine())
KEY = SampleKey(3, 5, torch.arange(4), 4)


class Pixelwise(nn.Module):
    """One parameter for each element of the output, so that each has a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.output = nn.Parameter(torch.zeros(4, 2, 4, 4))

    def forward(self, x, time):
        return self.output + 0 * x


@pytest.fixture
def setup():
    torch.manual_seed(0)
    objective = Objective(MinSNR())
    return (
        Denoiser(Pixelwise(), PROCESS),
        objective,
        torch.rand(4, 2, 4, 4),
        objective.draw(PROCESS, KEY),
    )


def test_the_gradient_outside_a_mask_is_exactly_zero_and_inside_that_of_the_plain_loss(setup):
    denoiser, objective, x0, draw = setup
    mask = (torch.rand(4, 1, 4, 4) > 0.5).float()
    (plain,) = torch.autograd.grad(
        objective(denoiser, x0, None, draw).sum(), denoiser.network.parameters()
    )
    masked = objective(denoiser, x0, None, draw, None, mask)
    (gradient,) = torch.autograd.grad(masked.sum(), denoiser.network.parameters())
    inside = mask.bool().expand_as(gradient)
    assert (gradient[~inside] == 0).all()
    assert torch.equal(gradient[inside], plain[inside])
    assert (plain != 0).all()


def test_a_masked_loss_is_the_loss_weight_times_the_mean_of_mask_times_error(setup):
    denoiser, objective, x0, draw = setup
    mask = torch.rand(4, 1, 4, 4)
    level = draw.level.to(x0)
    error = (0 - target("v_prediction", x0, draw.noise, level, 0.5)) ** 2
    weight = objective.weight.target_weight("v_prediction", draw.level.logsnr, 0.5).flatten()
    expected = [float(weight[i]) * float((mask[i] * error[i]).sum()) / 32 for i in range(4)]
    losses = objective(denoiser, x0, None, draw, None, mask)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_prior_preservation_is_the_weighted_sum_by_hand(setup):
    """Two samples of the subject and two of the class with weight 0.3, loss and gradient."""
    denoiser, objective, x0, draw = setup
    weight = torch.tensor([1.0, 0.3, 1.0, 0.3]).view(4, 1, 1, 1)
    plain = objective(denoiser, x0, None, draw)
    by_hand = (plain[0] + plain[2] + 0.3 * (plain[1] + plain[3])) / 4
    weighted = objective(denoiser, x0, None, draw, None, weight).mean()
    torch.testing.assert_close(weighted, by_hand)
    parameters = list(denoiser.network.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(weighted, parameters)[0], torch.autograd.grad(by_hand, parameters)[0]
    )


def test_with_uncertainty_a_weight_multiplies_the_whole_loss_of_a_sample(setup):
    denoiser, _, x0, draw = setup
    objective = Objective(MinSNR(), uncertainty=Uncertainty())
    u = objective.uncertainty.module()
    nn.init.normal_(next(u.parameters()))
    weight = torch.tensor([1.0, 0.3, 0.0, 2.0]).view(4, 1, 1, 1)
    plain = objective(denoiser, x0, None, draw, u)
    weighted = objective(denoiser, x0, None, draw, u, weight)
    torch.testing.assert_close(weighted, plain * weight.flatten())


def test_a_batch_of_another_size_is_drawn_from_the_shifted_schedule():
    objective = Objective(reference_size=4)
    wide = replace(PROCESS, shape=(2, 8, 32))  # side 16
    plain, shifted = Objective().draw(wide, KEY).level, objective.draw(wide, KEY).level
    torch.testing.assert_close(shifted.logsnr, plain.logsnr + 2 * math.log(4 / 16))
    torch.testing.assert_close(wide.schedule.logsnr(shifted.t), shifted.logsnr)
    assert torch.equal(
        objective.draw(PROCESS, KEY).level.logsnr, Objective().draw(PROCESS, KEY).level.logsnr
    )
    assert objective.schedule(wide) == Shifted.by_resolution(Cosine(), 16, 4)


def test_the_time_conditioning_of_a_shifted_level_is_that_of_its_signal_to_noise_ratio():
    process = replace(PROCESS, schedule=Flow(), time=TimeConditioning("blend"), shape=(2, 16, 16))
    level = Objective(reference_size=4).draw(process, KEY).level
    torch.testing.assert_close(
        process.time(level), 1000 * level.sigma / (level.alpha + level.sigma)
    )


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (replace(PROCESS, schedule=Discrete()), "has no number"),
        (replace(PROCESS, schedule=Truncated(Cosine(), -5, 5)), "has no number"),
        (replace(PROCESS, shape=(8,)), "levels of images"),
    ],
)
def test_a_shift_without_time_conditioning_is_refused(process, message):
    with pytest.raises(ValueError, match=message):
        Objective(MinSNR(), reference_size=4).check(process)
