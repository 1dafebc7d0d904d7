"""The records of model families: their names exist in diffusers, and each is found."""

import diffusers
import pytest
import torch
from torch import nn

from diffcore.integrations.diffusers.families import (
    FAMILIES,
    GENERIC,
    family_of,
    family_of_class,
    family_of_pipeline,
    register_family,
)
from diffcore.integrations.diffusers.families.packing import PackedTransformer
from tests.helpers import text_networks
from tests.helpers.tiny_pipelines import dit, dit_pipeline, unet, unet_2d_condition, xl_unet

PIPELINES = [(family.name, pipeline) for family in FAMILIES for pipeline in family.pipelines]


def ddim():
    return diffusers.DDIMScheduler(clip_sample=False)


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler()


def in_diffusers(name):
    """The class, or a skip that names it: an older or newer diffusers may lack it."""
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return cls


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_network_class_of_a_record_is_a_model_of_diffusers(family):
    assert issubclass(in_diffusers(family.network), diffusers.ModelMixin)


@pytest.mark.parametrize(("family", "pipeline"), PIPELINES)
def test_the_pipeline_classes_of_a_record_are_pipelines_of_diffusers(family, pipeline):
    cls = in_diffusers(pipeline)
    assert issubclass(cls, diffusers.DiffusionPipeline)
    assert family_of_pipeline(cls.__new__(cls)).name == family


def test_no_pipeline_and_no_name_is_in_two_records():
    assert len({name for _, name in PIPELINES}) == len(PIPELINES)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_records_of_one_network_class_exclude_each_other():
    for network in {family.network for family in FAMILIES}:
        selections = [family.config for family in FAMILIES if family.network == network]
        assert all(
            any(a.get(key, ...) != b.get(key, ...) for key in a)
            for i, a in enumerate(selections)
            for b in selections[:i]
        )


NETWORKS = {
    "UNet2DModel": unet,
    "DiT": dit,
    "Stable Diffusion 1 and 2": unet_2d_condition,
    "Stable Diffusion XL": xl_unet,
    "Stable Diffusion 3": lambda: text_networks.sd3(flow()).transformer,
    "Flux": lambda: text_networks.flux(flow()).transformer,
    "PixArt": lambda: text_networks.pixart(ddim()).transformer,
    "Sana": lambda: text_networks.sana(flow()).transformer,
}


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def network(request):
    return request.param, NETWORKS[request.param]()


def test_a_network_is_found_by_its_class_and_config(network):
    name, module = network
    family = family_of(module)
    assert family.name == name
    assert family_of_class(type(module).__name__).network == family.network


def test_a_subclass_of_a_network_belongs_to_the_family():
    class Finetuned(diffusers.UNet2DModel):
        pass

    assert family_of(Finetuned.from_config(unet().config)).name == "UNet2DModel"


def test_shape_tokens_and_time_are_those_of_the_network(network):
    name, module = network
    family = family_of(module)
    shape = {"Flux": (4, 128, 128), "UNet2DModel": (3, 8, 8)}.get(name, (4, 8, 8))
    assert family.shape(module) == shape
    tokens = {"DiT": 16, "Stable Diffusion 3": 64, "Flux": 4096, "PixArt": 16, "Sana": 64}
    assert family.token_count(module, shape) == tokens.get(name)
    assert family.time_scale(module) == {"Flux": 0.001, "Sana": 0.5}.get(name, 1.0)


def test_only_flux_is_wrapped(network):
    name, module = network
    assert isinstance(family_of(module).wrap(module), PackedTransformer) == (name == "Flux")


def test_a_module_without_a_record_is_generic_unless_it_is_conditioned_on_text():
    assert family_of(nn.Linear(2, 2)) is GENERIC
    conditioned = nn.Linear(2, 2)
    conditioned.config = {"cross_attention_dim": 8}
    with pytest.raises(
        ValueError, match=r"describes a Linear, conditioned by cross_attention_dim; known are UNet"
    ):
        family_of(conditioned)


OTHERS = {
    "WanTransformer3DModel": {"num_attention_heads": 1, "attention_head_dim": 12},
    "CogVideoXTransformer3DModel": {"num_attention_heads": 1, "attention_head_dim": 16},
    "Lumina2Transformer2DModel": {"axes_dim_rope": (4, 2, 2), "hidden_size": 24},
    "HunyuanVideoTransformer3DModel": {"num_attention_heads": 1, "attention_head_dim": 128},
    "PriorTransformer": {"num_attention_heads": 1, "attention_head_dim": 8},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_of_another_text_family_is_refused_with_its_name(name):
    with torch.device("meta"):
        other = getattr(diffusers, name)(num_layers=1, **OTHERS[name])
    with pytest.raises(ValueError, match=f"describes a {name}, conditioned by .*; known are"):
        family_of(other)


WRAPPERS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda module: torch.compile(nn.DataParallel(module), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_belongs_to_the_family_of_the_network_inside(network, wrap):
    name, module = network
    family = family_of(wrap(module))
    assert family.name == name
    assert family.shape(wrap(module)) == family.shape(module)
    assert family.time_scale(wrap(module)) == family.time_scale(module)


def test_a_config_that_no_record_selects_is_refused_with_the_value():
    network = unet_2d_condition(addition_embed_type="image", encoder_hid_dim=4)
    with pytest.raises(ValueError, match=r"addition_embed_type 'image'.*add a record"):
        family_of(network)


def test_a_subclass_of_a_pipeline_belongs_to_the_family():
    class Custom(diffusers.DiTPipeline):
        pass

    assert family_of_pipeline(Custom(**dit_pipeline(ddim()).components)).name == "DiT"


def test_an_unknown_pipeline_is_refused_with_the_known_families():
    pipeline = diffusers.DDPMPipeline(unet(), ddim())
    with pytest.raises(ValueError, match=r"DDPMPipeline is in no record .* of DiT, Stable .* Sana"):
        family_of_pipeline(pipeline)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="a family named 'Flux' is known already"):
        register_family(next(family for family in FAMILIES if family.name == "Flux"))


def test_packed_latents_are_unpacked_in_their_order():
    class Tokens(nn.Module):
        def forward(self, tokens, timestep, encoder_hidden_states, img_ids, txt_ids, return_dict):
            return (tokens,)

    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(PackedTransformer(Tokens())(x, torch.zeros(2), torch.zeros(2, 5, 8)), x)
