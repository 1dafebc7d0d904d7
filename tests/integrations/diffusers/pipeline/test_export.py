"""A process as a scheduler of diffusers: the samples of its own pipelines are those of our loop, or
it is refused.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process, TimeConditioning
from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.integrations.diffusers.loading.network import mean_network
from diffcore.integrations.diffusers.pipeline.export import (
    build_pipeline,
    export_pipeline,
)
from diffcore.integrations.diffusers.pipeline.parity import (
    check_samples,
    compare_samples,
    find_exact_steps,
)
from diffcore.samplers import DDIM, DDPM, EulerAncestral, Heun
from diffcore.schedules import (
    Cosine,
    Discrete,
    Flow,
    Karras,
    Leading,
    Normal,
    Shifted,
    Trailing,
    Truncated,
    UniformLogSNR,
    ZeroTerminalSNR,
    schedule_from_diffusers,
)
from tests.helpers.products import thinned
from tests.helpers.tiny_pipelines import dit, quiet, unet, vae

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 8, 8)
LABELS = {"classes": 4, "dropout": 0.1}
LEARNED = {"variance": "learned"}
LATENT = {
    "shape": (4, 8, 8),
    "low": -math.inf,
    "high": math.inf,
    "sigma_data": 1.0,
    "classes": 1000,
    "dropout": 0.1,
}
BLEND, C_NOISE = TimeConditioning("blend"), TimeConditioning("logsnr", -1 / 8)
LDM = Discrete("scaled_linear", start=0.00085, end=0.012)


def made(process, sampler=DDIM(), grid=Trailing(), network=None, steps=5, **options):
    network = network or unet(
        **({"num_class_embeds": process.classes + 1} if process.classes else {})
    )
    return quiet(
        DiffcorePipeline.of(
            Denoiser(mean_network(network, process), process), sampler, grid, steps, **options
        )
    )


def process(schedule, prediction, time=TimeConditioning(), **fields):
    return Process(schedule, prediction, time, **{"shape": SHAPE} | fields)


EXPRESSED = {
    "a table": (made, (process(Discrete(), "epsilon"),), "DDIMPipeline", "DDIMScheduler"),
    "drawn": (made, (process(Discrete(), "epsilon"), DDPM()), "DDPMPipeline", "DDPMScheduler"),
    "drawn, another name": (
        made,
        (process(LDM, "v_prediction"), EulerAncestral()),
        "DDPMPipeline",
        "DDPMScheduler",
    ),
    "leading": (
        made,
        (process(LDM, "epsilon"), DDIM(), Leading(1)),
        "DDIMPipeline",
        "DDIMScheduler",
    ),
    "zero terminal": (
        made,
        (process(ZeroTerminalSNR(LDM), "v_prediction"),),
        "DDIMPipeline",
        "DDIMScheduler",
    ),
    "x_0": (made, (process(Discrete("cosine"), "sample"),), "DDIMPipeline", "DDIMScheduler"),
    "sigmoid": (made, (process(Discrete("sigmoid"), "epsilon"),), "DDIMPipeline", "DDIMScheduler"),
    "continuous": (
        made,
        (process(Cosine(), "v_prediction"), Heun()),
        "DDIMPipeline",
        "DDIMScheduler",
    ),
    "continuous, drawn": (
        made,
        (process(Cosine(), "v_prediction"), DDPM()),
        "DDPMPipeline",
        "DDPMScheduler",
    ),
    "of 50 levels": (
        made,
        (process(Cosine(), "v_prediction", TimeConditioning(scale=50)),),
        "DDIMPipeline",
        "DDIMScheduler",
    ),
    "labels": (
        made,
        (process(Shifted(Cosine(), -2.0), "v_prediction", **LABELS),),
        "ConsistencyModelPipeline",
        "DDIMScheduler",
    ),
    "learned variance": (
        made,
        (process(Discrete(), "epsilon", **LEARNED), DDPM(), Leading(), unet(out_channels=6)),
        "DDPMPipeline",
        "DDPMScheduler",
    ),
    "learned variance, labels": (
        made,
        (
            process(LDM, "v_prediction", **LEARNED, **LABELS),
            DDPM(),
            Leading(),
            unet(out_channels=6, num_class_embeds=5),
        ),
        "ConsistencyModelPipeline",
        "DDPMScheduler",
    ),
    "flow": (
        made,
        (process(Flow(), "flow_prediction", BLEND),),
        "DDPMPipeline",
        "FlowMatchEulerDiscreteScheduler",
    ),
    "flow with time t": (
        made,
        (process(Flow(), "flow_prediction", TimeConditioning("t")),),
        "DDPMPipeline",
        "FlowMatchEulerDiscreteScheduler",
    ),
    "flow, shifted": (
        made,
        (process(Shifted.by_time_shift(Flow(), 3.0), "flow_prediction", BLEND),),
        "DDPMPipeline",
        "FlowMatchEulerDiscreteScheduler",
    ),
    "edm": (
        made,
        (process(Normal(2.4, 2.4, scaling="ve"), "edm", C_NOISE), DDIM(), Karras()),
        "ConsistencyModelPipeline",
        "EDMEulerScheduler",
    ),
    "edm, vp, labels": (
        made,
        (process(Normal(2.4, 2.4), "edm", C_NOISE, **LABELS), DDIM(), UniformLogSNR()),
        "ConsistencyModelPipeline",
        "EDMEulerScheduler",
    ),
}


@pytest.mark.parametrize(
    ("make", "arguments", "pipeline", "scheduler"),
    thinned(list(EXPRESSED.values()), 12),
    ids=EXPRESSED,
)
def test_a_stock_pipeline_gives_the_samples_of_our_loop(
    tmp_path, make, arguments, pipeline, scheduler
):
    own = make(*arguments)
    stock = export_pipeline(own)
    assert (type(stock).__name__, type(stock.scheduler).__name__) == (pipeline, scheduler)
    stock.save_pretrained(tmp_path)
    assert check_samples(tmp_path, own) <= 1e-5


def test_the_learned_variance_of_a_dit_is_exported_with_a_sampler_that_does_not_read_it(tmp_path):
    record = process(LDM, "epsilon", **LATENT | LEARNED)
    own = made(record, DDIM(), Leading(), dit(), vae=vae())
    stock = quiet(export_pipeline(own))
    stock.save_pretrained(tmp_path)
    assert check_samples(tmp_path, own) <= 1e-5
    with pytest.raises(ValueError, match="DiTPipeline leaves out the variance"):
        export_pipeline(made(record, DDPM(), Leading(), dit(), vae=vae()))


@pytest.mark.parametrize("network", [dit(), dit(out_channels=4)], ids=["with variance", "without"])
def test_dit_is_exported_with_its_vae(tmp_path, network):
    own = made(process(LDM, "epsilon", **LATENT), network=network, vae=vae(), guidance=CFG(4.0))
    stock = quiet(export_pipeline(own))
    assert isinstance(stock, diffusers.DiTPipeline)
    stock.save_pretrained(tmp_path)
    assert check_samples(tmp_path, own) <= 1e-5
    # guided, by its own argument
    arguments = {"class_labels": [1, 2], "num_inference_steps": 5, "output_type": "np"}
    images = stock(guidance_scale=4.0, generator=torch.Generator().manual_seed(3), **arguments)
    ours = own(generator=torch.Generator().manual_seed(3), **arguments)
    np.testing.assert_allclose(images.images, ours.images, rtol=0, atol=1e-4)


SCHEDULES = [
    Discrete(),
    LDM,
    Discrete("cosine"),
    Discrete("sigmoid"),
    Cosine(),
    Shifted(Cosine(), 1.0),
    Discrete(tuple(0.001 * (i + 1) for i in range(1000))),
    ZeroTerminalSNR(Discrete()),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: repr(s)[:40])
def test_its_config_is_read_as_the_schedule_that_was_written(schedule):
    scheduler = export_pipeline(made(process(schedule, "v_prediction"))).scheduler
    read = schedule_from_diffusers(json.loads(scheduler.to_json_string()))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(read.logsnr(t), schedule.logsnr(t), rtol=1e-9, atol=1e-9)


def test_tables_with_a_name_keep_it():
    config = export_pipeline(made(process(ZeroTerminalSNR(LDM), "v_prediction"))).scheduler.config
    assert (config.beta_schedule, config.rescale_betas_zero_snr, config.trained_betas) == (
        "scaled_linear",
        True,
        None,
    )


DAMAGES = [
    {"prediction_type": "epsilon"},
    {"beta_end": 0.03},
    {"clip_sample": True},
    {"set_alpha_to_one": False},
    {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_another_process_does_not_pass_for_it(tmp_path, damage):
    own = made(process(LDM, "v_prediction"))
    export_pipeline(own).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(
        ValueError,
        match=r"differ from those of diffcore by (nan|inf|[\d.e+-]+) of their largest value",
    ):
        check_samples(tmp_path, own)


def test_steps_that_do_not_divide_the_table_are_not_compared(tmp_path):
    """DDIM of diffusers goes to t - T // n, which is not where its own trailing grid is; 30 steps
    of 1000 are wrong there.
    """
    own = made(process(Discrete(), "epsilon"), steps=30)
    stock = export_pipeline(own)
    assert [find_exact_steps(stock.scheduler, n) for n in (30, 25, 3, 4000)] == [25, 25, 2, 1000]
    stock.save_pretrained(tmp_path)
    assert compare_samples(tmp_path, own) <= 1e-5


REFUSED = [
    (
        made,
        (process(Discrete(), "epsilon", **LEARNED), DDPM(), Trailing(), unet(out_channels=6)),
        "set the grid to Leading",
    ),
    (
        made,
        (process(Discrete(), "epsilon", **LEARNED), DDIM(), Leading(), unet(out_channels=6)),
        r"outputs a variance, .* export the sampler DDPM\(\)",
    ),
    (
        made,
        (
            process(Flow(), "flow_prediction", BLEND, **LEARNED),
            DDPM(),
            *(Leading(), unet(out_channels=6)),
        ),
        "outputs a variance",
    ),
    (made, (process(Cosine(), "epsilon"),), "pure noise"),
    (
        made,
        (process(Cosine(), "v_prediction", TimeConditioning("t")),),
        "has .*variable='t'.*: train with variable index",
    ),
    (
        made,
        (process(Cosine(), "v_prediction", TimeConditioning(scale=10.5)),),
        "network has TimeConditioning",
    ),
    (
        made,
        (process(Cosine(scaling="flow"), "v_prediction"),),
        "keep x of the vp process, and this process has the scaling flow",
    ),
    (
        made,
        (process(Discrete(steps=100), "epsilon"),),
        "has 100 levels, but the time input of the network is an index of 1000",
    ),
    (made, (process(Flow(), "flow_prediction"),), "train with variable blend"),
    (made, (process(Cosine(), "flow_prediction", BLEND),), "keeps x of the flow"),
    (
        made,
        (process(Truncated(Flow(), -8.0, 8.0), "flow_prediction", BLEND),),
        "begins at pure noise",
    ),
    (made, (process(Flow(), "flow_prediction", BLEND, **LABELS),), "accepts no flow scheduler"),
    (
        made,
        (process(Normal(2.4, 2.4), "edm", TimeConditioning("logsnr", 0.5)), DDIM(), Karras()),
        "ln",
    ),
    (
        made,
        (process(Normal(2.4, 2.4), "edm", replace(C_NOISE, clamp=20.0)),),
        "two finite σ/α, and .* sample by Karras",
    ),
    (
        made,
        (process(Cosine(), "v_prediction", low=0.0),),
        r"in \[-1, 1\], and the range of these is \[0, 1\]",
    ),
    (
        made,
        (process(Cosine(), "v_prediction", shape=(3, 16, 16)),),
        "sample_size, 8, and the shape of these is",
    ),
    (
        lambda p: made(p, network=dit()),
        (process(LDM, "epsilon", **LATENT),),
        "has none: export a DiffcorePipeline",
    ),
    (
        lambda p: made(p, network=dit(num_embeds_ada_norm=4), vae=vae()),
        (process(LDM, "epsilon", **LATENT | {"classes": 4}),),
        "null label of DiTPipeline is 1000, and this network has 4",
    ),
    (
        lambda p: made(p, network=dit(out_channels=4), vae=vae()),
        (process(Flow(), "flow_prediction", BLEND, **LATENT),),
        "DiTPipeline accepts no FlowMatchEuler",
    ),
    (
        lambda p: made(p, network=unet(in_channels=4, out_channels=4), vae=vae()),
        (process(LDM, "epsilon", **LATENT | {"classes": 0, "dropout": 0.0}),),
        "decodes the samples of a UNet2DModel",
    ),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED]
)
def test_what_no_stock_pipeline_expresses_is_refused_with_the_reason(make, arguments, message):
    own = make(*arguments)
    with pytest.raises(ValueError, match=message):
        export_pipeline(own)


def test_other_networks_have_no_stock_pipeline():
    with pytest.raises(ValueError, match="samples a Linear alone: export a DiffcorePipeline"):
        build_pipeline(nn.Linear(1, 1), process(Cosine(), "v_prediction"), None, None)


def test_sides_that_differ_are_refused_where_the_pipeline_has_one_size():
    wide = unet(sample_size=(8, 16))
    assert isinstance(
        export_pipeline(made(process(LDM, "epsilon", shape=(3, 8, 16)), network=wide)),
        diffusers.DDIMPipeline,
    )
    own = made(
        process(LDM, "epsilon", shape=(3, 8, 16), **LABELS),
        network=unet(sample_size=(8, 16), num_class_embeds=5),
    )
    with pytest.raises(ValueError, match="sample_size"):
        export_pipeline(own)


# Processes

ELSEWHERE = """
import sys

sys.modules["diffcore"] = None  # as where it is not installed
import diffusers, numpy, torch

torch.set_num_threads(1)


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=[0, 3], num_inference_steps=5, output_type="np", **options).images


stock = diffusers.DiffusionPipeline.from_pretrained("stock")
numpy.save("stock.npy", images(stock, batch_size=2, generator=torch.Generator().manual_seed(7)))
assert not any(name.startswith("diffcore.") for name in sys.modules)

del sys.modules["diffcore"]
from diffcore.integrations.diffusers import DiffcorePipeline

numpy.save("ours.npy", images(DiffcorePipeline.from_pretrained("ours"), seeds=[5, 6]))
"""


@pytest.mark.slow
def test_in_a_new_process_the_samples_are_bit_equal_and_the_stock_pipeline_needs_no_diffcore(
    tmp_path,
):
    own = made(process(Cosine(), "v_prediction", **LABELS), steps=5)
    own.save_pretrained(tmp_path / "ours")
    stock = quiet(export_pipeline(own))
    stock.save_pretrained(tmp_path / "stock")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", ELSEWHERE], cwd=tmp_path, check=True, timeout=300
    )
    arguments = {"class_labels": [0, 3], "num_inference_steps": 5, "output_type": "np"}
    here = stock(batch_size=2, generator=torch.Generator().manual_seed(7), **arguments).images
    assert np.array_equal(np.load(tmp_path / "stock.npy"), here)
    assert np.array_equal(np.load(tmp_path / "ours.npy"), own(seeds=[5, 6], **arguments).images)
    # the stock pipeline and our loop, from one generator: unit noise here, √(α² s² + σ²) of it
    # there, equal at pure noise
    again = own(generator=torch.Generator().manual_seed(7), **arguments).images
    np.testing.assert_allclose(here, again, rtol=0, atol=1e-5)
