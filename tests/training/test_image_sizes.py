"""Stable Diffusion XL receives the sizes and the crop of each image in training."""

import math
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch
from torch.utils.data import Subset

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.integrations.diffusers import PromptNetwork, Prompts, encode_prompts
from diffcore.integrations.diffusers.families.text_conditions import PixArtText
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.pretrained_network import PretrainedNetwork
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.objective import Objective
from diffcore.sampling.generation import sample
from diffcore.training.construction import build_state
from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.latents import LatentDataset
from diffcore.training.data.mixture import Mixture
from diffcore.training.data.order.batches import Batch
from diffcore.training.reports.validation import Validation, validate
from tests.helpers import text_networks
from tests.helpers.mixed_images import ramp
from tests.helpers.text_networks import ddim
from tests.helpers.training_runs import make_trainer

BUCKETS = Buckets((16,), step=4, aspect=2.0)
IMAGES = ((60, 20), (45, 15), (20, 60), (16, 16))
PROCESS = Process(shape=(4, 8, 8), low=-math.inf, high=math.inf)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pipeline of Stable Diffusion XL and captioned images of several sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    text_networks.sdxl(ddim()).save_pretrained(folder / "pipeline")
    (folder / "images").mkdir()
    for number, size in enumerate(IMAGES):
        ramp(*size).save(folder / f"images/{number}.png")
        (folder / f"images/{number}.txt").write_text("abc"[number % 3])
    return folder


def data_of(folder, **options):
    names = (str(folder / name) for name in ("images", "pipeline"))
    data = LatentDataset(*names, cache=str(folder / "cache"), **options)
    data.prepare(torch.device("cpu"), True)
    return data


def state_of(folder, run, data, **options):
    network = partial(PretrainedNetwork, str(folder / "pipeline"))
    options = {"process": PROCESS, "batch_size": 2} | options
    return build_state(make_trainer(run, network=network, data=data, **options))


def recorded_time_ids(state, compute):
    """The `time_ids` (B, 6) of each call of the UNet, and what a computation returns."""
    network, seen = state.network.network, []

    def record(module, args, kwargs):
        seen.append(kwargs["added_cond_kwargs"]["time_ids"].clone())

    handle = network.register_forward_pre_hook(record, with_kwargs=True)
    result = compute()
    handle.remove()
    return seen, result


def batch_and_draw(state, rows, shape):
    items = [state.settings.source.item(row, 7, position) for position, row in enumerate(rows)]
    x0 = torch.stack([item[0] for item in items])
    names = items[0][2]
    extras = {name: torch.stack([item[2][name] for item in items]) for name in names}
    index = torch.arange(len(rows))
    batch = Batch(x0, torch.tensor([item[1] for item in items]), index, index, extras)
    key = state.sample_key(0, index)
    return batch, state.settings.objective.draw(replace(PROCESS, shape=shape), key)


def test_two_crops_of_a_batch_have_the_time_ids_of_diffusers(folder, tmp_path):
    state = state_of(folder, tmp_path, data_of(folder, buckets=BUCKETS, crops=3))
    source = state.settings.source
    assert source.inputs == {"sizes": (6,)}
    batch, draw = batch_and_draw(state, (0, 1), (4, 6, 10))
    (ids,), _ = recorded_time_ids(state, lambda: state.losses(batch, draw))
    pipe = PipelineIndex(folder / "pipeline").read_text_pipeline()
    for row, (width, height) in enumerate(((60, 20), (45, 15))):
        left = float(batch.extras["sizes"][row, 3])
        theirs = pipe._get_add_time_ids(
            (height, width), (0, left), (12, 20), torch.float32, text_encoder_projection_dim=8
        )
        assert torch.equal(ids[row : row + 1], theirs)
    assert not torch.equal(ids[0], ids[1])


def test_the_network_is_evaluated_as_by_its_own_arguments():
    pipe = text_networks.sdxl(ddim())
    bank = replace(
        encode_prompts(pipe, ("a", "b")),
        size_arguments=lambda sizes: {"added_cond_kwargs.time_ids": sizes},
    )
    x, time = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)), torch.tensor([10, 900])
    labels = torch.tensor([1, 2])
    sizes = torch.tensor([[20.0, 60, 0, 7.5, 12, 20], [30, 45, 2, 0, 16, 16]])
    states = bank.tensors["encoder_hidden_states"][labels]
    added = {
        "text_embeds": bank.tensors["added_cond_kwargs.text_embeds"][labels],
        "time_ids": sizes,
    }
    with torch.no_grad():
        theirs = pipe.unet(x, time, states, added_cond_kwargs=added).sample
        network = PromptNetwork(pipe.unet, bank)
        ours = network(x, time, labels, sizes=sizes).sample
        default = network(x, time, labels).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert float((ours - default).abs().max()) > 1e-4


def test_the_sizes_of_held_out_images_condition_the_validation_loss(folder, tmp_path):
    data = data_of(folder, buckets=BUCKETS)
    held_out = Validation(data, every=1, items=4, bins=2)
    state = state_of(folder, tmp_path, data, validation=held_out)
    seen, _ = recorded_time_ids(state, lambda: validate(state))
    expected = {tuple(data[index][2]["sizes"].tolist()) for index in range(len(data))}
    assert len(expected) == 4
    assert {tuple(row) for ids in seen for row in ids.tolist()} == expected


def test_sampling_has_the_requested_size_without_a_crop(folder, tmp_path):
    state = state_of(folder, tmp_path, data_of(folder, buckets=BUCKETS))
    denoiser = Denoiser(state.label_wrapper(state.network).eval(), state.settings.process)
    draw = partial(sample, steps=2, seeds=[0], condition=[1])
    seen, ours = recorded_time_ids(state, lambda: draw(denoiser).x)
    assert {tuple(row) for ids in seen for row in ids.tolist()} == {(16, 16, 0, 0, 16, 16)}
    bank = replace(state.settings.source.prompts(), size_arguments=None)
    plain = Denoiser(PromptNetwork(state.network, bank).eval(), state.settings.process)
    assert torch.equal(ours, draw(plain).x)


def test_squares_without_crops_are_trained_at_the_size_of_the_data(folder, tmp_path):
    state = state_of(folder, tmp_path, data_of(folder))
    assert state.settings.source.inputs == {}
    batch, draw = batch_and_draw(state, (0, 1), (4, 8, 8))
    (ids,), losses = recorded_time_ids(state, lambda: state.losses(batch, draw))
    assert ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    by_label = state.settings.objective(state.denoiser, batch.x0, batch.label, draw)
    assert torch.equal(losses, by_label)


def test_a_run_in_buckets_writes_a_pipeline_of_diffusers(folder, tmp_path):
    trainer = state_of(folder, tmp_path, data_of(folder, buckets=BUCKETS), steps=2).settings
    trainer.train()
    exported = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline")
    assert exported.unet.config.addition_embed_type == "text_time"
    assert Process.load(tmp_path / "process.json").conditions == {}


def test_mixtures_and_subsets_pass_the_sizes_on(folder):
    data = data_of(folder, crops=2)
    mixture = Mixture([data_of(folder), data])
    sizes = torch.rand(1, 6)
    for source in (as_data_source(Subset(data, [1])), mixture):
        assert source.inputs == {"sizes": (6,)}
        found = source.prompts().arguments(torch.tensor([0]), sizes=sizes)
        assert torch.equal(found["added_cond_kwargs"]["time_ids"], sizes)
    assert all("sizes" in mixture[index][2] for index in range(len(mixture)))


def test_pixart_receives_the_size_of_the_bucket():
    network = text_networks.pixart(
        ddim(), use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24
    ).transformer
    sizes = torch.tensor([[20.0, 60, 0, 7.5, 12, 20]])
    found = PixArtText().size_arguments(network, sizes)
    assert found["added_cond_kwargs.resolution"].tolist() == [[12, 20]]
    assert found["added_cond_kwargs.aspect_ratio"].tolist() == [[pytest.approx(0.6)]]
    assert PixArtText().size_arguments(text_networks.pixart(ddim()).transformer, sizes) == {}


def test_noise_is_not_exchanged_among_images_of_different_sizes(folder, tmp_path):
    data = data_of(folder, buckets=BUCKETS)
    coupled = Objective(coupling=OptimalTransport(2))
    with pytest.raises(ValueError, match="use IndependentCoupling with the conditions sizes"):
        state_of(folder, tmp_path, data, objective=coupled)


def test_prompts_without_a_function_refuse_sizes():
    bank = Prompts({"states": torch.zeros(2, 3)}, ("a",))
    with pytest.raises(ValueError, match="the prompts have no function for them"):
        bank.arguments(torch.tensor([0]), sizes=torch.zeros(1, 6))
