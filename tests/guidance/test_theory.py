"""The theory of classifier-free guidance on Gaussians."""

import numpy as np
import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.oracle import GaussianMixture
from diffcore.core.prediction import Prediction
from diffcore.guidance import CFG
from diffcore.samplers import AlphaBlending
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.schedules import Cosine, Flow, Trailing
from tests.helpers.oracles import Pair, covariance, process

MEANS = torch.tensor([[1.0, 0.3], [-0.4, 0.8]], dtype=torch.float64)
COVARIANCES = torch.stack([covariance(0.9, 0.3, 0.5), covariance(0.7, 0.5, -0.8)])


class Linear:
    """Class 0 is one Gaussian and the null label another, so both predictions are affine in x."""

    def __init__(self, scaling):
        self.process = process(Cosine(scaling=scaling), classes=1)
        self.parts = [
            GaussianMixture(MEANS[i : i + 1], COVARIANCES[i : i + 1], process=self.process)
            for i in (0, 1)
        ]

    def __call__(self, x, level, condition=None):
        null = (condition == 1)[:, None]
        conditional, reference = (part(x, level) for part in self.parts)
        return Prediction(
            *(torch.where(null, r, c) for c, r in zip(conditional, reference, strict=True))
        )


@pytest.mark.parametrize("w", (0.0, 2.0, 5.0))
@pytest.mark.parametrize("u", (0.3, 1.0, 4.0))
@pytest.mark.parametrize("scaling", ("vp", "ve", "flow"))
def test_the_mean_shift_and_the_contrastive_components_of_linear_cfg(scaling, u, w):
    """Li, Wang & Qu 2025 (2505.19210), in u = σ/α and y = x/α, S = C (C + u² I)⁻¹ of each model:

        D - D_c = (w - 1) [ (S_c - S_ref)(y - m_c) + (I - S_ref)(m_c - m_ref) ]

    which are the contrastive principal components (S_c - S_ref has eigenvalues of both signs) and
    the mean shift. Both are read from the guided prediction, an affine map, and compared to NumPy.
    """
    model = Linear(scaling)
    level = model.process.schedule.at(-2 * np.log(u))
    y = MEANS[0] + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.zeros(3, dtype=torch.int64)
    change = guided_prediction(model, CFG(w), level.alpha * y, level, labels, None)[0].x0
    change = (change - model(level.alpha * y, level, labels).x0).numpy()
    C_c, C_ref = COVARIANCES.numpy()
    S_c, S_ref = (C @ np.linalg.inv(C + u**2 * np.eye(2)) for C in (C_c, C_ref))
    shift = (np.eye(2) - S_ref) @ (MEANS[0] - MEANS[1]).numpy()
    contrast = (change[1:] - change[0]).T
    np.testing.assert_allclose(change[0], (w - 1) * shift, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(contrast, (w - 1) * (S_c - S_ref), rtol=1e-9, atol=1e-10)
    eigenvalues = np.linalg.eigvalsh(S_c - S_ref)
    assert eigenvalues[0] < 0 < eigenvalues[1]  # features to weaken, and features to strengthen


@pytest.mark.parametrize("w", (2.0, 3.0))
def test_cfg_does_not_sample_the_powered_density(w):
    """With p_c = N(0, 1), p = N(0, 2): p^(1-w) p_c^w is N(0, 2/(w+1)); CFG ends at 2^(1-w)."""
    noise, labels = (
        Noise(torch.arange(3), (1,), dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
    )
    x, _ = integrate(
        Pair(),
        AlphaBlending(2),
        noise.start(),
        Trailing().knots(Flow(), 200),
        noise,
        CFG(w),
        labels,
    )
    variance = ((x / noise.start()) ** 2).mean().item()
    assert variance == pytest.approx(2 ** (1 - w), rel=1e-3)
    assert abs(variance - 2 / (w + 1)) > 0.1
