"""Feature extractors against the networks that they use, and what they refuse."""

import json
import sys
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn
from torchmetrics.multimodal import CLIPScore

from diffcore.evaluation.clip_score import clip_score
from diffcore.evaluation.features import inception, pretrained
from diffcore.evaluation.features.classifier_training import train_classifier
from diffcore.evaluation.features.extractor import resize
from diffcore.evaluation.features.inception import InceptionFeatures
from diffcore.evaluation.features.local_classifier import (
    ClassifierFeatures,
    ClassifierNetwork,
    write_classifier,
)
from diffcore.evaluation.features.pixels import PixelFeatures
from diffcore.evaluation.features.selection import load_features
from diffcore.io.files import hash_file
from diffcore.io.safetensors import write_weights
from tests.helpers.text_networks import clip_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def images(channels=3, size=28, count=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, size, size), generator=generator).byte()


def saved(model, folder):
    model.eval().save_pretrained(folder)
    settings = {"crop_size": {"height": 28, "width": 28}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def normalised(x):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def test_resizing_averages_what_lies_between_the_pixels():
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255).byte()
    small = resize(board.expand(1, 3, 64, 64), 8)
    assert torch.allclose(small, torch.full((1, 3, 8, 8), 127.5), atol=2)
    assert torch.equal(resize(images(), 28), images().float())


def test_features_of_dinov2_are_its_pooled_output(tmp_path):
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, patch_size=14))
    extractor = load_features(saved(model, tmp_path))
    expected = model(pixel_values=normalised(images())).pooler_output
    assert torch.allclose(extractor(images()).features, expected, atol=1e-6)
    grey = images(1)
    assert torch.equal(extractor(grey).features, extractor(grey.expand(-1, 3, -1, -1)).features)
    assert extractor.resizing == "cubic, antialiased, to 28 x 28"


def test_a_model_whose_pooling_was_not_saved_gives_its_first_token(tmp_path):
    config = transformers.ViTConfig(**SIZES, patch_size=14, intermediate_size=16)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    features = load_features(saved(model, tmp_path))(images()).features
    expected = model(pixel_values=normalised(images())).last_hidden_state[:, 0]
    assert torch.allclose(features, expected, atol=1e-6)


def test_a_model_without_a_size_or_with_missing_weights_is_refused(tmp_path):
    config = transformers.Dinov2Config(**SIZES, patch_size=14)
    folder = saved(transformers.Dinov2Model(config), tmp_path)
    state = transformers.Dinov2Model(config).state_dict()
    state.pop("layernorm.weight")
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, such as layernorm"):
        load_features(folder)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no size and no crop_size"):
        load_features(folder)


class FakeInception(nn.Module):
    """The interface of torch-fidelity's network."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]

    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299)
        assert x.dtype == torch.uint8
        return x.float().mean((2, 3)), x.float().amax((2, 3))


def test_inception_needs_the_original_weights(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match=r"are missing: download https://.* to .*weights.pth"):
        load_features(str(file))
    file.write_bytes(b"other")
    with pytest.raises(ValueError, match="expected 6726825d"):
        load_features(str(file))
    monkeypatch.setattr(inception, "HASH", hash_file(file)[:8])
    monkeypatch.setattr(inception, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        InceptionFeatures(file)
    monkeypatch.setattr(inception, "find_spec", lambda _: True)
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = ModuleType(name)
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)
    found = InceptionFeatures(file)(images(1))
    assert found.features.shape == found.logits.shape == (4, 3)


def test_a_written_classifier_gives_the_features_and_logits_of_its_network(tmp_path):
    network = ClassifierNetwork(size=16, channels=3, classes=5, width=4).eval()
    write_classifier(tmp_path / "own.safetensors", network)
    extractor = load_features(str(tmp_path / "own.safetensors"))
    found = extractor(images())
    x = resize(images(), 16) / 127.5 - 1
    assert torch.equal(found.features, network.features(x))
    assert torch.equal(found.logits, network(x))
    assert (found.features.shape, extractor.classes) == ((4, 8), 5)
    assert extractor(images(1)).features.shape == (4, 8)


def test_a_file_that_is_no_classifier_and_colour_for_a_grey_one_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    write_weights(path, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no classifier of features"):
        load_features(str(path))
    network = ClassifierNetwork(size=8, channels=1, classes=2, width=2)
    write_weights(
        path, network.state_dict(), kind="features classifier", **network.options | {"width": 4}
    )
    with pytest.raises(ValueError, match="does not fit the options"):
        load_features(str(path))
    write_classifier(path, network)
    with pytest.raises(ValueError, match="trained on grey images"):
        ClassifierFeatures(path)(images())
    with pytest.raises(ValueError, match="width is 513, expected 1 to 512"):
        ClassifierNetwork(8, 1, 2, 513)


def test_pixels_are_refused_for_large_images():
    assert torch.equal(PixelFeatures()(images(1, 8)).features, images(1, 8).flatten(1) / 255)
    with pytest.raises(ValueError, match="expected at most 4096"):
        PixelFeatures()(images(3, 64))


def test_a_classifier_learns_the_classes_of_its_images():
    labels = torch.arange(60) % 2
    x = (images(1, 8, 60) // 2) + 127 * labels[:, None, None, None].byte()
    trained = train_classifier(x, labels, 8, width=4, steps=40, batch_size=16)
    assert trained.accuracy == 1
    assert trained.held_out == 6
    with pytest.raises(ValueError, match="sort the images of a folder into one sub-folder"):
        train_classifier(x, torch.full((60,), -1), 8)


class Plain(nn.Module):
    """CLIP as torchmetrics knows it: with tensors as results."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens, mask):
        return self.model.get_text_features(tokens, mask).pooler_output


def processor_of(tokenizer):
    """A processor that normalises images as these tests do."""

    def process(text=None, images=None, **_):
        if text is None:
            return {"pixel_values": torch.stack([normalised(image) for image in images])}
        return tokenizer(text, padding=True, return_tensors="pt")

    return process


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_clip_score_of_prompts_equals_that_of_torchmetrics(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "TEXTS", 3)  # of four distinct ones
    tokenizer = clip_tokenizer()
    vision = {**SIZES, "patch_size": 14, "intermediate_size": 16}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    folder = saved(model, tmp_path)
    tokenizer.save_pretrained(folder)
    extractor = load_features(folder)
    x, prompts = images(count=12), ["a cat", "red dog", "b", "a dog at sea"] * 3
    pictures, texts = extractor(x).features, extractor.embed_texts(prompts)
    # torchmetrics clips the mean, and the paper each pair.
    rows = (torch.cosine_similarity(pictures, texts) > 0).nonzero().flatten().tolist()
    assert len(rows) > 1
    outside = CLIPScore(model_name_or_path=lambda: (Plain(model), processor_of(tokenizer)))
    outside.update(x[rows], [prompts[row] for row in rows])
    score = clip_score(pictures[rows], texts[rows])
    assert score == pytest.approx(float(outside.compute()), rel=1e-4)
    assert clip_score(pictures, texts) == pytest.approx(score * len(rows) / 12)
    with pytest.raises(ValueError, match="one text for each image"):
        clip_score(texts[:2], texts)


def test_models_of_images_alone_embed_no_texts():
    assert PixelFeatures().embed_texts(["a cat"]) is None
