"""A denoiser gives the same (x_0, ε) for every prediction type and time conditioning."""

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffcore.core.conditions import null_condition
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.process import TimeConditioning, TimeVariable
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Discrete, Explicit
from tests.helpers.oracles import (
    PREDICTION_TYPES,
    SCALINGS,
    ExactNetwork,
    mixture,
    process,
    time_conditioning,
    unet,
)

X = torch.tensor([[0.3, -0.2], [1.4, 0.9], [-2.0, 1.0], [4.0, -5.0]], dtype=torch.float64)
NOISE = Noise(torch.arange(4), (2,), dtype=torch.float64)
KNOTS = Explicit((-9.0, -4.0, -1.0, 0.5, 2.0, 5.0, 9.0, math.inf))


class Recorder(nn.Module):
    """Records its inputs and returns x; a parameter defines its dtype."""

    def __init__(self, dtype=torch.float64, wrap=lambda x: x):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.wrap, self.inputs = wrap, None

    def forward(self, x, time, **arguments):
        self.inputs = (x, time, arguments)
        return self.wrap(x * self.weight)


def exact(prediction_type, scaling, **fields):
    record = process(Cosine(scaling=scaling), prediction=prediction_type, **fields)
    return Denoiser(ExactNetwork(mixture(record), record), record)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("logsnr", (-8.0, -1.0, 0.0, 2.0, 8.0))
def test_every_prediction_type_gives_the_prediction_of_the_oracle(logsnr, prediction_type, scaling):
    """In float64; x_0 of epsilon and ε of sample lose a factor e^(|λ|/2) = 55 at |λ| = 8."""
    denoiser = exact(prediction_type, scaling)
    level = denoiser.process.schedule.at(logsnr)
    labels = torch.tensor([0, 1, 2, 1])
    prediction, truth = denoiser(X, level, labels), mixture()(X, level, labels)
    torch.testing.assert_close(prediction.x0, truth.x0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prediction.eps, truth.eps, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sampler", (DDIM(), DDIM(1.0), AlphaBlending(2)), ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_in_every_scaling_takes_the_same_trajectory(
    prediction_type, scaling, sampler
):
    """All start at the same x/√(α²+σ²) at λ = -9.

    The network receives t and the oracle λ, so the inverse of λ(t) is tested as well.
    """
    denoiser, truth = exact(prediction_type, scaling), mixture()
    knots, vp = (KNOTS.knots(p.schedule, 7) for p in (denoiser.process, truth.process))
    scale = (knots[0].alpha ** 2 + knots[0].sigma ** 2) ** 0.5
    x, evaluations = integrate(denoiser, sampler, scale * NOISE.start(), knots, NOISE)
    expected, _ = integrate(truth, sampler, NOISE.start(), vp, NOISE)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    assert evaluations == len(denoiser.network.calls)


@pytest.mark.parametrize(
    "prediction_type", [name for name in PREDICTION_TYPES if name != "epsilon"]
)
@pytest.mark.parametrize("variable", get_args(TimeVariable))
def test_the_prediction_is_exact_under_every_time_conditioning(variable, prediction_type):
    denoiser = exact(prediction_type, "flow", time=time_conditioning(variable))
    level = denoiser.process.schedule.at(-1.5)
    torch.testing.assert_close(
        denoiser(X, level).x0, mixture()(X, level).x0, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("i", (0, 1, 499, 999))
def test_a_network_of_a_table_receives_the_index(i):
    record = process(Discrete(), time=TimeConditioning("index", 1000))
    network = Recorder()
    Denoiser(network, record)(X, record.schedule.level((i + 1) / 1000))
    assert network.inputs[1].tolist() == pytest.approx([i] * 4, abs=1e-9)


@pytest.mark.parametrize(
    ("time", "value"),
    [
        (
            TimeConditioning("t", 1.0),
            2 / math.pi * math.atan(math.exp(1.5)),
        ),  # cosine: tan(πt/2) = σ/α
        (TimeConditioning("logsnr", 1.0), -3.0),
        (
            TimeConditioning("logsnr", -0.125),
            math.log(math.exp(1.5)) / 4,
        ),  # EDM's c_noise = ln(σ/α)/4
        (TimeConditioning("sigma", 1.0), math.exp(1.5)),
        (TimeConditioning("sigma", 1.0, clamp=2.0), math.exp(1.0)),
        (TimeConditioning("logsnr", 1.0, clamp=2.0), -2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_network_receives_one_conditioning_number_per_sample(scaling, time, value):
    record, network = process(Cosine(scaling=scaling), time=time), Recorder()
    Denoiser(network, record)(X, record.schedule.at(-3.0))
    assert network.inputs[1].tolist() == pytest.approx([value] * 4, rel=1e-12)


def test_a_clamped_time_conditioning_is_finite_at_pure_noise():
    record, network = process(time=TimeConditioning("logsnr", 1.0, clamp=20.0)), Recorder()
    Denoiser(network, record)(X, record.schedule.level(1.0))
    assert network.inputs[1].tolist() == [-20.0] * 4


def test_samples_of_a_batch_may_have_different_levels():
    """As in training: the levels are float64 columns, which are cast to the dtype of x."""
    record = process(prediction="edm")
    network, logsnrs = Recorder(), torch.tensor([-3.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    level = record.schedule.at(logsnrs[:, None]).to(X)
    prediction = Denoiser(network, record)(X, level)
    assert network.inputs[1].tolist() == pytest.approx(
        (1000 * record.schedule.time(logsnrs) - 1).tolist()
    )
    for i, logsnr in enumerate(logsnrs.tolist()):
        alone = Denoiser(network, record)(X[i : i + 1], record.schedule.at(logsnr))
        torch.testing.assert_close(prediction.x0[i], alone.x0[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "wrap", (lambda x: x, lambda x: (x, "more"), lambda x: SimpleNamespace(sample=x))
)
def test_a_network_may_return_a_tensor_a_tuple_or_an_object_with_a_sample(wrap):
    denoiser = Denoiser(Recorder(wrap=wrap), process(prediction="sample"))
    assert torch.equal(denoiser(X, denoiser.process.schedule.at(0.0)).x0, X)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("logsnr", (-6.0, 0.0, 6.0))
@pytest.mark.parametrize("s", (0.5, 1.7))
def test_edm_is_the_preconditioning_of_karras_et_al(s, logsnr, scaling):
    """2206.00364, Table 1, in its own variables: x/α and σ/α."""
    record, network = process(Cosine(scaling=scaling), prediction="edm", sigma_data=s), Recorder()
    level = record.schedule.at(logsnr)
    prediction = Denoiser(network, record)(X, level)
    x, sigma = X / level.alpha, level.sigma / level.alpha
    c_skip, c_out, c_in = (
        s**2 / (sigma**2 + s**2),
        sigma * s / (sigma**2 + s**2) ** 0.5,
        1 / (sigma**2 + s**2) ** 0.5,
    )
    torch.testing.assert_close(network.inputs[0], c_in * x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        prediction.x0, c_skip * x + c_out * network.inputs[0], rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(
        level.alpha * prediction.x0 + level.sigma * prediction.eps, X, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("prediction_type", [name for name in PREDICTION_TYPES if name != "edm"])
def test_the_input_of_other_networks_is_not_scaled(prediction_type):
    network, record = Recorder(), process(prediction=prediction_type)
    Denoiser(network, record)(X, record.schedule.at(-2.0))
    assert torch.equal(network.inputs[0], X)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("parameters", (torch.bfloat16, torch.float32))
def test_the_input_has_the_dtype_of_the_network_and_the_prediction_that_of_x(
    parameters, dtype, prediction_type
):
    network, record = Recorder(parameters), process(prediction=prediction_type)
    prediction = Denoiser(network, record)(X.to(dtype), record.schedule.at(0.3))
    assert network.inputs[0].dtype == parameters
    assert prediction.x0.dtype == prediction.eps.dtype == dtype


def test_low_precision_samples_do_not_round_the_time():
    """bfloat16 has 8 significant bits and would round index 750 to 752."""
    record, network = process(Discrete()), Recorder(torch.bfloat16)
    Denoiser(network, record)(X.bfloat16(), record.schedule.level(0.751))
    assert network.inputs[1].tolist() == pytest.approx([750] * 4, abs=1e-3)


class Quantised(nn.Module):
    """Weights as a quantiser stores them: integers or float8, and a norm beside them."""

    def __init__(self, stored, norm):
        super().__init__()
        self.stored = nn.Parameter(torch.full((8,), 3).to(stored), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(2, dtype=norm)) if norm else None
        self.seen = None

    def forward(self, x, time):
        self.seen = x.dtype
        return x * self.stored[0].to(x.dtype)


@pytest.mark.parametrize(
    ("stored", "norm", "expected"),
    [
        (torch.uint8, torch.float16, torch.float16),
        (torch.int8, None, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, None, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),  # most weights in half precision
    ],
    ids=str,
)
def test_x_is_never_converted_to_the_dtype_of_quantised_weights(stored, norm, expected):
    network, record = Quantised(stored, norm), process(prediction="sample", classes=0)
    x = X.float()
    prediction = Denoiser(network, record)(x, record.schedule.at(0.3))
    assert network.seen == expected
    torch.testing.assert_close(prediction.x0, 3 * x, rtol=1e-2, atol=0)


def test_the_dtype_of_the_input_follows_a_conversion_of_the_network():
    network, record = Recorder(torch.float32), process()
    denoiser, level = Denoiser(network, record), record.schedule.at(0.3)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        network.to(dtype)
        denoiser(X, level)
        assert network.inputs[0].dtype == dtype


def test_a_network_with_layerwise_casting_is_evaluated_in_its_compute_dtype():
    network = unet()
    denoiser = Denoiser(network, process(shape=(1, 8, 8)))
    x, level = torch.randn(2, 1, 8, 8), denoiser.process.schedule.at(0.3)
    with torch.no_grad():
        expected = denoiser(x, level).x0
        network.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        actual = denoiser(x.double(), level).x0
    assert network.mid_block.resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.2)


def test_labels_are_passed_by_keyword_and_none_is_the_null_label():
    network, record = Recorder(), process()
    level, labels = record.schedule.at(0.0), torch.tensor([0, 1, 2, 0])
    Denoiser(network, record)(X, level, labels)
    assert network.inputs[2] == {"class_labels": labels}
    Denoiser(network, record)(X, level)
    assert network.inputs[2]["class_labels"].tolist() == [record.classes] * len(X)
    unlabelled = process(classes=0)
    Denoiser(network, unlabelled)(X, level)
    assert network.inputs[2] == {}


def test_the_null_condition_is_the_label_after_the_last():
    assert null_condition(process(classes=2), 3).tolist() == [2, 2, 2]
    assert null_condition(process(classes=0), 3) is None


def test_a_diffusers_unet_is_conditioned_on_the_class():
    network = unet()
    record = process(shape=(1, 8, 8))
    denoiser, level, x = (
        Denoiser(network, record),
        record.schedule.level(0.4),
        torch.randn(3, 1, 8, 8),
    )
    with torch.no_grad():
        prediction = denoiser(x, level, torch.tensor([0, 1, 2]))
        F = network(
            x, torch.full((3,), 1000 * 0.4 - 1), class_labels=torch.tensor([0, 1, 2])
        ).sample
        torch.testing.assert_close(
            prediction.x0, level.alpha * x - level.sigma * F, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            prediction.eps, level.sigma * x + level.alpha * F, rtol=1e-5, atol=1e-5
        )
        assert (
            denoiser(x, level, torch.tensor([1, 1, 1])).x0[0] - prediction.x0[0]
        ).abs().max() > 1e-3


@pytest.mark.parametrize("wrap", (lambda x: x, lambda x: torch.compile(x, backend="eager")))
@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        ({"num_class_embeds": 3}, 3, "embeds 3 labels, .* 3 classes, which need 4"),
        ({"num_class_embeds": 3}, 0, "embeds 3 labels, .* at most 2"),
        ({}, 4, "embeds no labels: set its num_class_embeds to 5, the classes and the null label"),
    ],
)
def test_a_network_that_does_not_embed_the_classes_and_the_null_label_is_refused(
    config, classes, message, wrap
):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(
        sample_size=8, norm_num_groups=4, block_out_channels=(8,), **blocks, **config
    )
    with pytest.raises(ValueError, match=message):
        Denoiser(wrap(network), process(shape=(3, 8, 8), classes=classes))
    fitting = process(shape=(3, 8, 8), classes=config.get("num_class_embeds", 1) - 1)
    Denoiser(wrap(network), fitting)


class Embedding(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.table = nn.Embedding(count, 2)

    def forward(self, x, time, class_labels):
        return x + self.table(class_labels)


def test_a_missing_embedding_of_the_null_label_is_named_with_the_shape():
    record = process()
    denoiser, level = Denoiser(Embedding(record.classes), record), record.schedule.at(0.0)
    denoiser(X, level, torch.tensor([0, 0, 0, 0]))
    message = rf"shape \(4, 2\) .* {record.classes} classes and the null label {record.classes}"
    with pytest.raises(ValueError, match=message):
        denoiser(X, level)
    Denoiser(Embedding(record.classes + 1), record)(X, level)


@pytest.mark.parametrize(("levels", "size"), [(2, 15), (3, 30), (4, 28)])
def test_a_size_that_a_unet_cannot_halve_is_refused(levels, size):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(
        sample_size=size,
        norm_num_groups=4,
        layers_per_block=1,
        block_out_channels=(8,) * levels,
        **{name: kind * levels for name, kind in blocks.items()},
    )
    expected = (
        f"halves height and width {levels - 1} times: expected multiples of {2 ** (levels - 1)}"
    )
    with pytest.raises(ValueError, match=expected):
        Denoiser(network, process(shape=(3, size, size), classes=0))
    fitting = 2**levels
    denoiser = Denoiser(network, process(shape=(3, fitting, fitting), classes=0))
    with torch.no_grad():
        denoiser(torch.zeros(1, 3, fitting, fitting), denoiser.process.schedule.at(0.0))


class TwoHalves(nn.Module):
    """Outputs 0.5 x, and x + 1 as the second half of the channels."""

    def __init__(self, channels=2):
        super().__init__()
        self.config = {"out_channels": channels}

    def forward(self, x, time):
        return torch.cat([0.5 * x, x + 1], 1)


def test_the_second_half_of_the_channels_is_2v_minus_1_if_the_variance_is_learned():
    learned = process(classes=0, shape=(1, 2), prediction="sample", variance="learned")
    x, level = torch.randn(3, 1, 2), learned.schedule.level(0.4)
    denoiser = Denoiser(TwoHalves(), learned)
    prediction = denoiser(x, level)
    assert torch.equal(prediction.x0, 0.5 * x)
    assert torch.allclose(prediction.variance, x / 2 + 1)
    assert torch.equal(denoiser.output(x, level), 0.5 * x)


def test_output_channels_that_do_not_fit_the_variance_are_refused_with_the_remedy():
    fixed, learned = (process(classes=0, shape=(1, 2), variance=v) for v in ("fixed", "learned"))
    x, level = torch.ones(3, 1, 2), learned.schedule.level(0.4)
    with pytest.raises(ValueError, match=r"set its out_channels to 2, or .* to fixed"):
        Denoiser(TwoHalves(channels=1), learned)
    with pytest.raises(ValueError, match=r"expected \(3, 2, 2\), since the variance .* learned"):
        Denoiser(Recorder(torch.float32), learned)(x, level)
    with pytest.raises(ValueError, match="or the process's variance to learned if half"):
        Denoiser(TwoHalves(), fixed)(x, level)
