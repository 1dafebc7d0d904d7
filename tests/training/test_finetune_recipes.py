"""`diffcore train finetune`: the recipe of each family trains, samples, and says what it chose."""

import diffusers
import pytest
import torch
import yaml

from diffcore.core.process import Process
from diffcore.integrations.diffusers.adapters.files import ADAPTER, read_adapters, write_adapters
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.folder import merge_into_pipeline
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from diffcore.schedules import Discrete, Flow, Shifted
from tests.helpers import text_networks
from tests.helpers.captioned_images import OLD, write_image
from tests.helpers.finetune_runs import run_command
from tests.helpers.tiny_pipelines import dit, vae

SHORT = ("--steps=2", "--batch-size=2", "--trackers=[]", "--log-every=1")
TABLE = Discrete("scaled_linear", 1000, 0.00085, 0.012)
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
MU = 0.5 + 0.65 * (16 - 4) / (64 - 4)
"""μ of the 16 tokens of Flux at 16 pixels."""
FAMILIES = {
    "sd": (text_networks.sd, lambda: diffusers.PNDMScheduler(**OLD), (TABLE, "epsilon")),
    "sdxl": (
        text_networks.sdxl,
        lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", **OLD),
        (TABLE, "v_prediction"),
    ),
    "sd3": (
        text_networks.sd3,
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        (Shifted.by_time_shift(Flow(), 3.0), "flow_prediction"),
    ),
    "flux": (
        text_networks.flux,
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        (Shifted.by_time_shift(Flow(), torch.tensor(MU).double().exp().item()), "flow_prediction"),
    ),
}

SOME_FAMILIES = [
    pytest.param(name, marks=() if name in ("sd", "flux") else pytest.mark.slow)
    for name in FAMILIES
]
"""One family of a table and one of a flow are fast tests."""


@pytest.fixture(scope="module")
def pipelines(_finetune_folder):
    """Pipelines of all families in the folder of the captioned images."""
    for name, (make, scheduler, _) in FAMILIES.items():
        make(scheduler()).save_pretrained(_finetune_folder / f"tiny-{name}")
    diffusers.DiTPipeline(
        dit(num_embeds_ada_norm=2), vae(), diffusers.DDIMScheduler(clip_sample=False)
    ).save_pretrained(_finetune_folder / "tiny-dit")


def command(family, *options):
    size = ("--resolution=16",) if family == "flux" else ()
    inputs = (f"--pipeline=tiny-{family}", "--data", "images", *size)
    return ["train", "finetune", *inputs, f"--folder=runs/auto-{family}", *SHORT, *options]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_the_chosen_recipe_trains_an_adapter_of_the_pipelines_process_and_samples_it(
    workspace, pipelines, capsys, family
):
    assert run_command(*command(family, "--lora=2")) == 0
    lines = capsys.readouterr().err
    schedule, prediction = FAMILIES[family][2]
    assert f"recipe     finetune-{family}, for " in lines
    assert f"process    {prediction}, " in lines
    assert "trains     a LoRA of rank 2 " in lines
    assert "2 steps at learning rate 0.0001" in lines
    run = workspace / f"runs/auto-{family}"
    process = Process.load(run / "process.json")
    t = torch.linspace(0.01, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(process.schedule.logsnr(t), schedule.logsnr(t))
    assert (process.prediction, process.shape) == (prediction, (4, 8, 8))
    assert (run / ADAPTER).is_file()
    assert Run(run).settings()["lr"]["peak"] == 0.0001
    out = workspace / f"{family}.safetensors"
    prompt = ("--prompt=a cat", "--steps=2", "--sampler=DDIM", "--grid=Trailing")
    prompt = (*prompt, "--guidance.scale=1")
    size = ("--height=16", "--width=16") if family == "flux" else ()
    words = ("sample", str(run), *prompt, *size, f"--out={out}")
    assert run_command(*words) == 0, capsys.readouterr().err
    assert all(value.isfinite().all() for value in read_weights(out).values())
    from_pipeline = workspace / f"{family}-lora.safetensors"
    lora = (f"--lora={run}", f"--out={from_pipeline}")
    words = ("sample", f"tiny-{family}", *prompt, *size, *lora)
    assert run_command(*words) == 0, capsys.readouterr().err
    expected, found = read_weights(out), read_weights(from_pipeline)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    trained = diffusers.DiffusionPipeline.from_pretrained(workspace / f"tiny-{family}")
    trained.load_lora_weights(str(run))


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_trained_adapter_is_the_same_in_diffusers_in_every_format_and_merged(
    workspace, pipelines, tmp_path, family
):
    run, index = workspace / f"runs/auto-{family}", PipelineIndex(workspace / f"tiny-{family}")
    if not run.exists():
        assert run_command(*command(family, "--lora=2")) == 0
    expected = adapters = read_adapters(run, index)
    changes = expected[index.network_name]
    # Two steps change little: the largest element of the changes becomes 1.
    strength = 1 / max(float(change.delta().abs().max()) for change in changes.values())

    pipe = diffusers.DiffusionPipeline.from_pretrained(index.folder)
    pipe.load_lora_weights(str(run), adapter_name="default")
    network, averaged = getattr(pipe, index.network_name), read_weights(run / "ema.safetensors")
    loaded = {f"network.{name}": value for name, value in network.named_parameters()}
    assert averaged.keys() == {name for name in loaded if ".lora_" in name}
    assert all(torch.equal(loaded[name], value) for name, value in averaged.items())

    for form in ("kohya", "comfyui", "diffusers"):
        file = tmp_path / f"{form}.safetensors"
        write_adapters(file, adapters, index, form)
        adapters = read_adapters(file, index)
        assert adapters.keys() == expected.keys()
        assert adapters[index.network_name].keys() == changes.keys()
        for name, change in adapters[index.network_name].items():
            delta = changes[name].delta()
            close = {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(strength * change.delta(), strength * delta, **close)

    pipe.set_adapters("default", strength)
    merge_into_pipeline(tmp_path / "merged", index, [(adapters, strength)])
    merged = PipelineIndex(tmp_path / "merged").read(index.network_name)
    for name, change in changes.items():
        linear, layer = merged.get_submodule(name), network.get_submodule(name)
        x = torch.randn(3, linear.in_features)
        torch.testing.assert_close(linear(x), layer(x), rtol=1e-5, atol=1e-5, msg=name)
        assert change.delta().any()


def test_the_scheduler_of_a_flow_stays_that_of_the_pipeline_with_its_dynamic_shift(
    workspace, pipelines
):
    if not (workspace / "runs/auto-flux").exists():
        assert run_command(*command("flux", "--lora=2")) == 0
    found = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        workspace / "runs/auto-flux/scheduler"
    )
    assert found.config.use_dynamic_shifting
    assert found.config.max_image_seq_len == 64


def test_a_class_conditional_network_is_trained_on_sub_folders(workspace, pipelines, capsys):
    for number in range(4):
        write_image(workspace / f"classes/{'ab'[number % 2]}/{number}.png", number)
    words = command("dit", "--data=classes", "--lr.peak=1e-2")
    assert run_command(*words) == 0, capsys.readouterr().err
    assert "finetune-classes, for DiT" in capsys.readouterr().err
    run = workspace / "runs/auto-dit"
    process = Process.load(run / "process.json")
    assert (process.classes, process.dropout, process.prediction) == (2, 0.1, "epsilon")
    assert process.schedule == Discrete()
    sample = ("sample", str(run), "--labels=0,1", "--steps=2", "--out=dit.safetensors")
    assert run_command(*sample) == 0, capsys.readouterr().err
    assert run_command(*command("dit", "--data=classes", "--lora=2", "--folder=runs/no")) == 1
    assert "diffusers loads no LoRA into a DiTPipeline" in capsys.readouterr().err
    assert run_command(*command("dit", "--data=classes", "--process.classes=3")) == 1
    message = "process.classes is 3, but the network in tiny-dit embeds 2 classes"
    assert message in capsys.readouterr().err


def test_print_config_shows_the_whole_choice(workspace, pipelines, capsys):
    with pytest.raises(SystemExit):
        run_command(*command("sdxl", "--lora=16", "--resolution=32", "--print_config"))
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["network"]["init_args"]["lora"]["rank"] == 16
    assert settings["data"]["init_args"]["size"] == 32
    assert settings["process"]["shape"] == [4, 16, 16]
    assert settings["process"]["prediction"] == "v_prediction"
    assert settings["objective"]["init_args"]["weight"]["class_path"].endswith("MinSNR")
    assert settings["compute"]["checkpointing"] is True
    assert (settings["lr"]["peak"], settings["steps"]) == (0.0001, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune"], "finetune chooses the recipe of a pipeline's family: name the pipeline"),
        (["finetune", "--pipeline=nowhere"], "nowhere/model_index.json is missing"),
        (
            ["finetune-sdxl", "--pipeline=tiny-flux"],
            "the recipe finetune-sdxl trains Stable Diffusion XL, and tiny-flux holds Flux: use "
            "finetune, which chooses finetune-flux for it",
        ),
        (
            ["finetune-flow", "--pipeline=tiny-sd"],
            "and tiny-sd holds Stable Diffusion 1 and 2: use finetune",
        ),
        (
            ["finetune", "--pipeline=tiny-sd", "--resolution=17"],
            "height and width are 17 and 17, expected multiples of 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_training(
    workspace, pipelines, capsys, words, message
):
    assert run_command("train", *words, "--folder=runs/no") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert not (workspace / "runs/no").exists()


def test_labels_are_dropped_by_the_process_and_not_by_the_network(workspace, pipelines):
    from diffcore.integrations.diffusers import PretrainedNetwork

    network = PretrainedNetwork("tiny-dit").train()
    x, time = torch.randn(64, 4, 8, 8), torch.full((64,), 7.0)
    label = torch.full((64,), 1)
    outputs = [network(x, time, class_labels=label) for _ in range(2)]
    assert torch.equal(*outputs)
