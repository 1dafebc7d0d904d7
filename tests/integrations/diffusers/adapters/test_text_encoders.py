"""Text encoders that are trained with a network: their encoding is that of the pipeline, and
diffusers loads what is written.
"""

import shutil
from functools import partial

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcore.core.process import Process
from diffcore.integrations.diffusers import LoRA, PretrainedNetwork, encode_prompts
from diffcore.integrations.diffusers.adapters.adapted_parts import adapt_parts
from diffcore.integrations.diffusers.adapters.files import read_adapters
from diffcore.integrations.diffusers.adapters.lora import TextLoRA
from diffcore.integrations.diffusers.adapters.textual_inversion import NewWord, add_word
from diffcore.integrations.diffusers.loading.folder import read_folder
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.folder import merge_into_pipeline
from diffcore.schedules import Discrete, Flow
from diffcore.training.data import Mixture
from tests.helpers import text_networks
from tests.helpers.captioned_images import (
    latent_dataset,
    prepared_dataset,
    write_images,
)

WORD = NewWord("<cat>", "c", vectors=2)
BOTH = {"text_lora": TextLoRA(rank=2, alpha=3, ranks={"q_proj": 3}), "word": WORD}
PIPELINES = {
    "sd": (text_networks.sd, {}),
    "sdxl": (text_networks.sdxl, {}),
    "sdxl without zeros": (text_networks.sdxl, {"force_zeros_for_empty_prompt": False}),
    "sd3": (text_networks.sd3, {}),
    "flux": (text_networks.flux, {}),
}
FLOWS = ("sd3", "flux")
X, TIME = torch.randn(3, 4, 8, 8), torch.tensor([3.0, 500.0, 900.0])
LABELS = torch.arange(3)
PROCESS = Process(Discrete(), shape=(4, 8, 8), prediction="epsilon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pipelines by the names in `PIPELINES`, and one of another family."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, (make, options) in PIPELINES.items():
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        if name in FLOWS:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = make(scheduler)
        if options:
            pipe.register_to_config(**options)
        pipe.save_pretrained(folder / name)
    pixart = text_networks.pixart(diffusers.DPMSolverMultistepScheduler())
    pixart.save_pretrained(folder / "pixart")
    return folder


def trained(folder, **options):
    """A network whose trained weights have moved."""
    torch.manual_seed(0)
    made = PretrainedNetwork(folder, **{"lora": LoRA(rank=2), **options})
    made.load_state_dict({k: 0.3 * torch.randn_like(v) for k, v in made.state_dict().items()})
    return made


def assert_equal_arguments(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal_arguments(found[name], value, **tolerances)
        else:
            torch.testing.assert_close(found[name], value, **tolerances)


@pytest.mark.parametrize("name", PIPELINES)
def test_encoded_tokens_are_what_the_pipeline_encodes(folder, name):
    made = PretrainedNetwork(folder / name, LoRA(rank=2), text_lora=TextLoRA(rank=2))
    texts = ["a red cat", "a b c d e f g h i j k l m n o p"]  # the second is too long
    pipeline = PipelineIndex(folder / name).read_text_pipeline()
    for negative in ("", "bad"):
        expected = encode_prompts(pipeline, texts, negative, (16, 16)).arguments(LABELS)
        bank = made.tokenize(texts, negative, 16)
        assert_equal_arguments(made._encoded(bank.arguments(LABELS)), expected, rtol=0, atol=1e-6)
    assert bank.texts == tuple(texts)


def test_prompts_are_tokenised_once_and_other_ones_anew(folder):
    made = PretrainedNetwork(folder / "sd", word=WORD)
    made.tokenize(["forgotten"], "", 16)
    expected = made.tokenize(["a <cat>"], "", 16).tensors
    for text in "abc":
        made.tokenize([text], "", 16)
    made.text_encoders.tokenizers["text_encoder"] = None
    assert_equal_arguments(made.tokenize(["a <cat>"], "", 16).tensors, expected, rtol=0, atol=0)
    with pytest.raises(AttributeError, match="model_max_length"):  # there is no tokenizer
        made.tokenize(["a <cat>"], "bad", 16)
    with pytest.raises(AttributeError, match="model_max_length"):
        made.tokenize(["forgotten"], "", 16)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_diffusers_loads_the_adapters_and_the_new_word_and_gives_the_same_outputs(
    folder, tmp_path, name
):
    made, index = trained(folder / name, **BOTH), PipelineIndex(folder / name)
    made.export(tmp_path, PROCESS)
    assert {path.name for path in tmp_path.iterdir()} == set(made.exported_names)
    pipe = index.pipeline_class.from_pretrained(folder / name)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    if name == "sd":
        pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    else:
        learned = load_file(tmp_path / "learned_embeds.safetensors")
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = {part: getattr(pipe, part + end) for part in ("text_encoder", "tokenizer")}
            pipe.load_textual_inversion(learned[key], token="<cat>", **parts)
    texts = ["a red <cat>", "<cat> dog"]
    expected = encode_prompts(pipe, texts, "", (16, 16)).arguments(LABELS)
    tokens = made.tokenize(texts, "", 16).arguments(LABELS)
    assert_equal_arguments(made._encoded(tokens), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        output = made(X, TIME, **tokens)
        torch.testing.assert_close(
            output, pipe.unet(X, TIME, **expected).sample, rtol=1e-5, atol=1e-5
        )
    build = made.exported_parts(tmp_path).pipeline
    own = encode_prompts(build(), texts, "", (16, 16)).arguments(LABELS)
    assert_equal_arguments(own, expected, rtol=1e-5, atol=1e-5)
    adapted = adapt_parts(read_folder(folder / name), folder / name, [str(tmp_path)]).pipeline
    own = encode_prompts(adapted(), texts, "", (16, 16)).arguments(LABELS)
    assert_equal_arguments(own, expected, rtol=1e-5, atol=1e-5)
    merge_into_pipeline(tmp_path / "merged", index, [(read_adapters(tmp_path, index), 1.0)])
    merged = PipelineIndex(tmp_path / "merged").read_text_pipeline()
    pipe = index.pipeline_class.from_pretrained(folder / name)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    prompts = (["a red cat", "dog"], "", (16, 16))
    expected = encode_prompts(pipe, *prompts).arguments(LABELS)
    assert_equal_arguments(
        encode_prompts(merged, *prompts).arguments(LABELS), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", FLOWS)
def test_the_adapters_of_clip_beside_t5_are_read_by_diffusers_and_by_a_merge(
    folder, tmp_path, name
):
    made, index = trained(folder / name, text_lora=TextLoRA(2)), PipelineIndex(folder / name)
    made.export(tmp_path, Process(Flow(), shape=(4, 8, 8), prediction="flow_prediction"))
    pipe = index.pipeline_class.from_pretrained(folder / name)
    before = encode_prompts(pipe, ["a red cat"], "", (16, 16)).tensors
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    prompts = (["a red cat", "dog"], "bad", (16, 16))
    expected = encode_prompts(pipe, *prompts).arguments(LABELS)
    bank = made.tokenize(*prompts[:2], 16)
    found = made._encoded(bank.arguments(LABELS))
    expected.pop("guidance", None), found.pop("guidance", None)  # of Flux alone
    assert_equal_arguments(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected["pooled_projections"][:1], before["pooled_projections"][:1])
    merge_into_pipeline(tmp_path / "merged", index, [(read_adapters(tmp_path, index), 1.0)])
    merged = PipelineIndex(tmp_path / "merged").read_text_pipeline()
    own = encode_prompts(merged, *prompts).arguments(LABELS)
    own.pop("guidance", None)
    assert_equal_arguments(own, expected, rtol=1e-5, atol=1e-5)
    found["pooled_projections"].square().mean().backward()
    read = [n for n, p in made.text_encoders.named_parameters() if p.requires_grad]
    without = [n for n in read if made.text_encoders.get_parameter(n).grad is None]
    assert without == []


def test_text_encoders_that_are_replaced_are_not_read_again(folder, tmp_path):
    shutil.copytree(folder / "sdxl", tmp_path / "pipeline")
    made = PretrainedNetwork(tmp_path / "pipeline", word=WORD)
    shutil.copytree(folder / "sdxl/scheduler", tmp_path / "run/scheduler")
    for path in (tmp_path / "pipeline").glob("text_encoder*/*.safetensors"):
        path.unlink()
    pipe = made.exported_parts(tmp_path / "run").pipeline()
    assert pipe.text_encoder_2 is made.text_encoders.text_encoder_2
    assert "<cat>_1" in pipe.tokenizer_2.get_vocab()


def test_a_word_without_an_adapter_is_added_to_its_pipeline_and_to_no_other(folder, tmp_path):
    made = trained(folder / "sd", word=WORD, lora=LoRA())
    (tmp_path / "run").mkdir()
    made.export(tmp_path / "run", PROCESS)
    adapted = adapt_parts(read_folder(folder / "sd"), folder / "sd", [str(tmp_path / "run")])
    own = encode_prompts(adapted.pipeline(), ["a <cat>", "dog"], "", (16, 16)).arguments(LABELS)
    tokens = made.tokenize(["a <cat>", "dog"], "", 16).arguments(LABELS)
    assert_equal_arguments(own, made._encoded(tokens), rtol=0, atol=1e-6)
    other = PipelineIndex(folder / "sdxl").read_text_pipeline()
    with pytest.raises(ValueError, match=r"holds <cat>, expected the embeddings .* for 2 text"):
        add_word(other, tmp_path / "run/learned_embeds.safetensors")
    save_file({"<cat>": torch.zeros(1, 3)}, tmp_path / "a.safetensors", {"word": "<cat>"})
    with pytest.raises(ValueError, match=r"of shape \(1, 3\), expected \(vectors, 8\)"):
        add_word(adapted.pipeline(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_only_the_rows_of_the_new_word_are_trained(folder, name):
    made = PretrainedNetwork(folder / name, word=WORD).train()
    before = {name: value.clone() for name, value in made.named_parameters()}
    plain = made.tokenize(["a red cat", "dog"], "", 16).arguments(LABELS)
    tokens = made.tokenize(["<cat>", "a <cat>"], "", 16).arguments(LABELS)
    output, count = made(X, TIME, **plain), len(made.text_encoders.names)
    optimizer = torch.optim.AdamW([v for v in made.parameters() if v.requires_grad], 0.1)
    made(X, TIME, **tokens).square().mean().backward()
    optimizer.step()
    changed = {n for n, value in made.named_parameters() if not torch.equal(value, before[n])}
    assert changed == set(made.state_dict())
    assert len(changed) == count
    assert all(name.endswith("token_embedding.new") for name in changed)
    for name in changed:
        base = before[name.removesuffix("new") + "base.weight"]
        c = made.text_encoders.tokenizers["text_encoder"].convert_tokens_to_ids("c</w>")
        assert torch.equal(before[name], base[[c, c]])
        moved = made.get_parameter(name) != before[name]
        assert moved.any(1).all()
    assert torch.equal(made(X, TIME, **plain), output)
    assert made.exported_names == ("learned_embeds.safetensors", "scheduler")


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_trained_weight_has_a_gradient(folder, name):
    # Ranks that exchange gradients wait for each of them.
    made = trained(folder / name, **BOTH).train()
    tokens = made.tokenize(["a <cat>", "dog"], "", 16).arguments(LABELS)
    made(X, TIME, **tokens).square().mean().backward()
    assert [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None] == []
    last = [name for name in made.state_dict() if "text_encoder.encoder.layers.2." in name]
    assert bool(last) == (name == "sd")  # XL reads the states before the last layer


def test_a_mixture_of_tokens_has_the_prompts_of_all_its_data_sets(folder, tmp_path):
    sources = []
    for part, captions in (("a", ("a <cat>", "dog")), ("b", ("fish", "dog"))):
        write_images(tmp_path / part / "images", captions)
        (tmp_path / part / "pipeline").symlink_to(folder / "sd")
        sources.append(latent_dataset(tmp_path / part, text="tokens"))
    mixture = Mixture(sources)
    made = PretrainedNetwork(folder / "sd", word=WORD)
    wrapped = mixture.label_wrapper(torch.device("cpu"))(made)
    assert wrapped.prompts.texts == mixture.texts == ("a <cat>", "dog", "fish")
    expected = made.tokenize(["fish"], "", 16).tensors["tokens.text_encoder"][0]
    assert torch.equal(wrapped.prompts.tensors["tokens.text_encoder"][2], expected)


def test_the_ratio_of_lora_plus_is_that_of_each_adapter(folder):
    text_lora = TextLoRA(rank=2, lr_ratio=4.0)
    made = PretrainedNetwork(folder / "sd", LoRA(rank=2, lr_ratio=16.0), text_lora=text_lora)
    factors = made.learning_rate_factors
    names = {name for name, _ in made.named_parameters() if ".lora_B." in name}
    assert factors.keys() == names
    assert {name.partition(".")[0]: factor for name, factor in factors.items()} == {
        "network": 16.0,
        "text_encoders": 4.0,
    }


@pytest.mark.slow
def test_a_base_in_fewer_bits_keeps_the_text_encoders_in_float32(folder, tmp_path):
    made = trained(folder / "sd", **BOTH, base="bf16")
    exact = trained(folder / "sd", **BOTH)
    tokens = made.tokenize(["a <cat>", "dog"], "", 16).arguments(LABELS)
    assert_equal_arguments(made._encoded(tokens), exact._encoded(tokens), rtol=0, atol=0)
    difference = (made(X, TIME, **tokens) - exact(X, TIME, **tokens)).norm()
    assert 1e-4 < difference / exact(X, TIME, **tokens).norm() < 0.02
    for own in (made, PretrainedNetwork(folder / "sd", word=WORD, base="bf16")):
        expected = exact.network if own is made else PipelineIndex(folder / "sd").read("unet")
        own.export(tmp_path, PROCESS)
        sampled = own.exported_parts(tmp_path).network
        states = torch.zeros(3, 12, 8)
        assert torch.equal(sampled(X, TIME, states).sample, expected(X, TIME, states).sample)


def test_the_frozen_hash_contains_the_text_encoders_that_are_trained(folder):
    index = PipelineIndex(folder / "sd")
    made = PretrainedNetwork(folder / "sd", LoRA(2), text_lora=TextLoRA(2))
    assert made.content_hash == index.weights_hash("unet", "text_encoder")
    assert PretrainedNetwork(folder / "sd", LoRA(2)).content_hash == index.weights_hash("unet")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(TextLoRA, 2, kind="lokr"), "does not load into text encoders"),
        (partial(NewWord, "<cat>"), "word is '<cat>' and initial is '', expected both"),
        (partial(NewWord, "my cat", "c"), "word is 'my cat', expected one without white space"),
        (partial(NewWord, "<cat>", "c", 0), "vectors is 0"),
    ],
)
def test_options_without_meaning_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "pixart",
            {"text_lora": TextLoRA(2)},
            "holds PixArt, whose text encoders are not trained",
        ),
        ("sd3", {"word": WORD}, "whose T5 is not trained and would not know a new word"),
        ("sd", {"word": NewWord("<cat>", "cat")}, "which the tokenizer splits into 3 tokens"),
        ("sd", {"word": NewWord("b</w>", "c")}, "which the tokenizer has as a token"),
        ("sd", {"text_lora": TextLoRA(99)}, "rank is 99, but the largest adapted layer has 8"),
    ],
)
def test_what_does_not_fit_the_pipeline_is_refused(folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        PretrainedNetwork(folder / name, **options)


def test_tokens_and_embeddings_are_not_confused(folder, tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "pipeline").symlink_to(folder / "sd")
    adapted = PretrainedNetwork(folder / "sd", LoRA(2))
    data = latent_dataset(tmp_path, text="tokens")
    with pytest.raises(ValueError, match=r"data\.text is tokens, but the network trains no text"):
        data.label_wrapper(torch.device("cpu"))(adapted)
    assert data.prompts() is None
    with pytest.raises(ValueError, match="captions as text: tokens, and others as embeddings"):
        Mixture([data, prepared_dataset(tmp_path)]).prompts()
    trained_text = PretrainedNetwork(folder / "sd", text_lora=TextLoRA(2))
    with pytest.raises(ValueError, match=r"takes tokens in place .*: set text: tokens"):
        trained_text(X, TIME, encoder_hidden_states=torch.zeros(3, 12, 8))
    with pytest.raises(ValueError, match="text is 'words', expected embeddings or tokens"):
        latent_dataset(tmp_path, text="words")
