"""References from altered layers: exactly as published, and restored also after an error."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn
from torch.nn import functional

from diffcore.core.denoiser import Denoiser
from diffcore.guidance import APG, CFG, PerturbedAttention, SkippedLayers, Sum
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction
from tests.helpers.oracles import mixture, process, unet
from tests.helpers.tiny_pipelines import GREY_DIT

RECORD = process(shape=(1, 8, 8), dropout=0.0)
X, LABELS = (
    torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 1]),
)
LEVEL = RECORD.schedule.at(0.0)


class Transformer(nn.Module):
    """DiT, whose forward takes the time and the label as keyword arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dit = DiTTransformer2DModel(**GREY_DIT | {"num_embeds_ada_norm": 3})
        for parameter in self.dit.parameters():  # it begins as the identity, with gates of 0
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x, time, class_labels):
        return self.dit(x, timestep=time.long(), class_labels=class_labels)


NETWORKS = {
    "unet": (unet, "mid_block.*"),
    "dit": (lambda: Transformer().eval(), "dit.transformer_blocks.1.*"),
}
each_network = pytest.mark.parametrize(("make", "layers"), NETWORKS.values(), ids=NETWORKS.keys())


def predict(denoiser, x=X):
    with torch.no_grad():
        return denoiser(x, LEVEL, LABELS)


@each_network
def test_perturbed_attention_is_self_attention_with_the_identity_as_its_map(
    make, layers, monkeypatch
):
    """Compared with diffusers' layers around a scaled_dot_product_attention that returns V."""
    denoiser, rule = Denoiser(make(), RECORD), CFG(3.0, PerturbedAttention((layers,)))
    plain = predict(denoiser)
    with torch.no_grad():
        guided, _, evaluations = guided_prediction(denoiser, rule, X, LEVEL, LABELS, None)
    inside = {
        module
        for name, module in denoiser.network.named_modules()
        if name.startswith(layers.rstrip("*"))
    }
    attentions = [module for module in inside if isinstance(module, Attention)]
    assert len(attentions) == 1
    forward, product = attentions[0].forward, functional.scaled_dot_product_attention

    def only_here(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(
                functional, "scaled_dot_product_attention", lambda query, key, value, **rest: value
            )
            return forward(*args, **kwargs)

    attentions[0].forward = only_here
    perturbed = predict(denoiser)
    assert functional.scaled_dot_product_attention is product
    assert (perturbed.x0 - plain.x0).abs().max() > 1e-4
    torch.testing.assert_close(
        guided.x0, perturbed.x0 + 3 * (plain.x0 - perturbed.x0), rtol=1e-4, atol=1e-5
    )
    assert evaluations == 2


def test_skipped_layers_return_their_input():
    denoiser = Denoiser(Transformer().eval(), RECORD)
    with torch.no_grad():
        guided, _, _ = guided_prediction(
            denoiser, CFG(0.0, SkippedLayers(("dit.transformer_blocks.1",))), X, LEVEL, LABELS, None
        )
    del denoiser.network.dit.transformer_blocks[1]
    torch.testing.assert_close(guided.x0, predict(denoiser).x0, rtol=1e-6, atol=1e-6)


class Attentions(nn.Module):
    """Self-attention with all options of a diffusers layer, and cross-attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        around = {"norm_num_groups": 2, "residual_connection": True, "rescale_output_factor": 1.7}
        self.own = Attention(8, heads=2, dim_head=4, bias=True, **around)
        self.cross = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
        for parameter in self.own.group_norm.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("shape", ((2, 8, 3, 3), (2, 9, 8)), ids=("images", "tokens"))
@torch.no_grad()
def test_around_the_identity_norm_residual_and_scale_stay(shape, monkeypatch):
    network, x = Attentions(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with PerturbedAttention(("*",)).apply(network):
        ours = network.own(x)
    assert not torch.allclose(ours, network.own(x), atol=1e-3)
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda query, key, value, **rest: value
    )
    torch.testing.assert_close(ours, network.own(x))


def test_cross_attention_is_left_alone():
    network, x, text = Attentions(), torch.randn(1, 9, 8), torch.randn(1, 5, 6)
    own, cross = network.own(x), network.cross(x, text)
    with PerturbedAttention(("*",)).apply(network):
        assert not torch.equal(network.own(x), own)
        assert torch.equal(network.cross(x, text), cross)
    with (
        pytest.raises(ValueError, match="finds no such layer"),
        PerturbedAttention(("cross",)).apply(network),
    ):
        pass


@torch.no_grad()
def test_a_skipped_joint_block_returns_both_inputs_in_its_own_order():
    """A block of Stable Diffusion 3 returns (text, image), one of CogVideoX (image, text)."""
    sd3 = JointTransformerBlock(dim=8, num_attention_heads=2, attention_head_dim=4)
    cog = CogVideoXBlock(dim=8, num_attention_heads=2, attention_head_dim=4, time_embed_dim=8)
    image, text, temb = torch.randn(1, 9, 8), torch.randn(1, 5, 8), torch.randn(1, 8)
    for block, expected in ((sd3, (text, image)), (cog, (image, text))):
        network = nn.ModuleDict({"block": block})
        with SkippedLayers(("block",)).apply(network):
            output = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))
        assert not torch.equal(
            block(hidden_states=image, encoder_hidden_states=text, temb=temb)[0], expected[0]
        )


@each_network
@pytest.mark.parametrize("kind", (PerturbedAttention, SkippedLayers))
@pytest.mark.parametrize("fail", (False, True))
def test_the_network_is_restored_also_when_it_fails(make, layers, kind, fail):
    network = make()
    denoiser, before = Denoiser(network, RECORD), None
    before = predict(denoiser)
    pattern = (
        layers
        if kind is PerturbedAttention
        else layers.replace(".*", ".attn*1*" if "dit" in layers else ".attentions.0")
    )
    processors = [m.processor for m in network.modules() if isinstance(m, Attention)]
    if fail:
        last = list(network.modules())[-1]
        hook = last.register_forward_hook(
            lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        with pytest.raises(RuntimeError, match="out of memory"), kind((pattern,)).apply(network):
            predict(denoiser)
        hook.remove()
    else:
        with kind((pattern,)).apply(network):
            assert not torch.equal(predict(denoiser).x0, before.x0)
    assert [m.processor for m in network.modules() if isinstance(m, Attention)] == processors
    assert not any(m._forward_hooks for m in network.modules())
    assert torch.equal(predict(denoiser).x0, before.x0)


def test_perturbed_attention_needs_neither_condition_nor_dropout_and_adds_to_cfg():
    """The unconditional network guides itself; without a condition nothing becomes CFG."""
    arguments = {"steps": 2, "seeds": [1, 2], "batch_size": 2}
    alone = Denoiser(unet(), RECORD)
    made = sample(alone, guidance=CFG(4.0, PerturbedAttention()), **arguments)
    assert made.evaluations == made.planned == 4
    assert not torch.equal(made.x, sample(alone, guidance=CFG(1.0), **arguments).x)
    beside = Denoiser(unet(), process(shape=(1, 8, 8)))
    rule = Sum((CFG(2.0), APG(2.0, PerturbedAttention())))
    assert sample(beside, condition=[0, 1], guidance=rule, **arguments).evaluations == 6


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            PerturbedAttention(("transformer_blocks.*",)),
            r"finds no such layer in UNet2DModel; it could alter .*attentions",
        ),
        (SkippedLayers(("nothing",)), "finds no such layer"),
        (SkippedLayers(("conv_in",)), r"Conv2d maps .* cannot be skipped"),
    ],
)
def test_missing_layers_and_layers_that_change_the_shape_are_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        sample(Denoiser(unet(), RECORD), steps=2, seeds=[1], guidance=CFG(2.0, reference))


def test_an_oracle_has_no_layers():
    with pytest.raises(ValueError, match="needs a network with layers: use Unconditional"):
        sample(mixture(), steps=2, seeds=[1], guidance=CFG(2.0, PerturbedAttention()))


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="layers is empty"):
        SkippedLayers(())


@each_network
def test_two_threads_with_altered_layers_and_one_without_share_a_network(make, layers):
    """Each thread is given the values that it is given alone, and the network is restored."""
    denoiser, calls = Denoiser(make(), RECORD), 12
    rules = (CFG(3.0, PerturbedAttention((layers,))), CFG(5.0, PerturbedAttention((layers,))))

    def evaluate(rule):
        with torch.no_grad():
            return guided_prediction(denoiser, rule, X, LEVEL, LABELS, None)[0].x0

    rules = (*rules, CFG(1.0))
    alone = [evaluate(rule) for rule in rules]
    start = threading.Barrier(len(rules))

    def run(rule):
        start.wait()
        return [evaluate(rule) for _ in range(calls)]

    with ThreadPoolExecutor(len(rules)) as pool:
        together = list(pool.map(run, rules))
    for expected, values in zip(alone, together, strict=True):
        for value in values:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks for module in denoiser.network.modules())


def compiled_in_place(network):
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize(
    ("wrap", "reference"),
    [
        (lambda network: torch.compile(network, backend="eager"), PerturbedAttention()),
        (compiled_in_place, SkippedLayers(("mid_block.attentions.0",))),
    ],
    ids=("compiled", "compiled in place"),
)
@pytest.mark.slow
def test_layers_of_a_compiled_network_are_altered_too(wrap, reference):
    rule = CFG(3.0, reference)

    def evaluate(network):
        denoiser = Denoiser(network, RECORD)
        predict(denoiser)  # compiles, before the layers are altered
        with torch.no_grad():
            return guided_prediction(denoiser, rule, X, LEVEL, LABELS, None)[0].x0

    expected = evaluate(unet())
    torch.testing.assert_close(evaluate(wrap(unet())), expected, rtol=1e-5, atol=1e-5)


def test_the_replicas_of_data_parallel_cannot_be_altered():
    with (
        pytest.raises(ValueError, match="does not reach the replicas of DataParallel"),
        PerturbedAttention().apply(nn.DataParallel(unet())),
    ):
        pass
    with PerturbedAttention().apply(nn.DataParallel(unet()).module):
        pass
