"""Each sample depends only on its seed and label; the network receives batches of one size."""

import math

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.guidance import CFG
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.schedules import (
    Trailing,
)
from tests.helpers.oracles import (
    process,
    unet,
)
from tests.helpers.recording_network import LABELS, SEEDS, small_denoiser

DENOISER = Denoiser(unet(), process(shape=(1, 8, 8))).eval()


def draw(seeds, labels, batch_size=4, guidance=CFG(2.0)):
    """Samples of a U-Net with fresh noise and guidance."""
    return sample(
        DENOISER,
        DDIM(1.0),
        Trailing(),
        4,
        seeds=seeds,
        condition=labels,
        guidance=guidance,
        batch_size=batch_size,
    ).x


def test_a_sample_does_not_depend_on_the_other_seeds_or_their_order():
    """This includes the noise of the steps and the reference of guidance."""
    images = draw(SEEDS, LABELS)
    order = (3, 0, 6, 5, 1, 4, 2)
    assert torch.equal(
        draw([SEEDS[i] for i in order], [LABELS[i] for i in order]), images[list(order)]
    )
    for i in (0, 4, 6):
        assert torch.equal(draw([SEEDS[i]], [LABELS[i]]), images[i : i + 1])
    more = draw([*SEEDS, 100, 101], [*LABELS, 1, 1])
    assert torch.equal(more[:7], images)
    assert len({image.sum().item() for image in more}) == 9


def test_samples_of_another_batch_size_agree_to_rounding():
    """The last bits of a network's output depend on the batch size."""
    torch.testing.assert_close(
        draw(SEEDS, LABELS, batch_size=3), draw(SEEDS, LABELS), rtol=0, atol=1e-4
    )


def test_each_seed_is_sampled_with_its_label():
    images = draw(SEEDS, LABELS)
    assert not torch.equal(draw(SEEDS, [0] * 7)[1], images[1])
    assert torch.equal(draw(SEEDS, [0] * 7)[0], images[0])


def test_without_a_condition_the_null_label_is_used():
    assert torch.equal(
        draw(SEEDS, None, guidance=CFG(1.0)), draw(SEEDS, [2] * 7, guidance=CFG(1.0))
    )


@pytest.mark.parametrize(
    ("guidance", "network_batch"), [(CFG(1.0), 4), (CFG(0.0), 8), (CFG(2.0), 8)]
)
@pytest.mark.parametrize("sampler", (DDIM(), AlphaBlending(2)), ids=str)
@pytest.mark.parametrize("count", (1, 4, 7))
def test_the_network_always_receives_full_batches_and_evaluations_are_counted(
    count, sampler, guidance, network_batch
):
    denoiser = small_denoiser()
    result = sample(
        denoiser,
        sampler,
        steps=5,
        seeds=SEEDS[:count],
        condition=LABELS[:count],
        guidance=guidance,
        batch_size=4,
    )
    assert set(denoiser.network.batch_sizes) == {network_batch}
    assert result.x.shape == (count, 2)
    assert result.evaluations == sampler.evaluations(result.knots) * network_batch // 4
    assert sum(denoiser.network.batch_sizes) == result.evaluations * 4 * math.ceil(count / 4)


def test_the_progress_bar_counts_samples_without_padding(capsys):
    sample(small_denoiser(), steps=2, seeds=SEEDS, batch_size=4, progress=True)
    assert "7/7" in capsys.readouterr().err
    sample(small_denoiser(), steps=2, seeds=SEEDS, batch_size=4)
    assert capsys.readouterr().err == ""
