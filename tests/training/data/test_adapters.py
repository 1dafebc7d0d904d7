"""Subsets of data sources provide what the data sources provide; other wrappers are refused."""

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split

from diffcore.training.data import Digits, ImageFolder, as_data_source
from tests.helpers.captioned_images import latent_dataset, prepared_dataset
from tests.helpers.image_folders import write


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("ant/0.png", "bee/1.png", "bee/2.png", "cat/3.png")):
        write(tmp_path / name, 60 * number)
    return ImageFolder(str(tmp_path), 8, "L", flip=True)


def test_a_subset_of_images_mirrors_and_knows_labels_and_classes(tmp_path, folder):
    Image.linear_gradient("L").rotate(90).save(tmp_path / "cat/3.png")
    folder = ImageFolder(str(tmp_path), 8, "L", flip=True)
    data = as_data_source(Subset(folder, [3, 1]))
    assert (len(data), data.class_names, list(data.labels)) == (2, ("ant", "bee", "cat"), [2, 1])
    drawn = [data.item(0, 5, position) for position in range(64)]
    expected = [folder.item(3, 5, position) for position in range(64)]
    assert all(
        torch.equal(ours[0], theirs[0]) for ours, theirs in zip(drawn, expected, strict=True)
    )
    assert 16 < sum(torch.equal(x0, folder[3][0].flip(-1)) for x0, _ in drawn) < 48
    assert {label for _, label in drawn} == {2}


def test_the_hash_of_a_subset_depends_on_the_files_and_the_indices(tmp_path, folder):
    hashes = [as_data_source(Subset(folder, indices)).content_hash for indices in ([0, 1], [0, 2])]
    write(tmp_path / "cat/4.png")
    later = ImageFolder(str(tmp_path), 8, "L", flip=True)
    hashes.append(as_data_source(Subset(later, [0, 1])).content_hash)
    assert len(set(hashes)) == 3
    assert as_data_source(Subset(folder, [0, 1])).content_hash == hashes[0]


def test_a_subset_of_a_subset_and_of_a_plain_data_set_has_its_items(folder):
    nested = as_data_source(Subset(Subset(folder, [3, 2, 1]), torch.tensor([2, 0])))
    assert [label for _, label in (nested[0], nested[1])] == [1, 2]
    plain, _ = random_split(TensorDataset(torch.arange(6.0)[:, None]), [4, 2])
    data = as_data_source(plain)
    assert [float(data[index][0]) for index in range(4)] == list(map(float, plain.indices))


@pytest.mark.usefixtures("one_thread")
def test_a_subset_of_latents_has_captions_wrapper_and_decoder(captioned):
    whole = latent_dataset(captioned)
    data = as_data_source(Subset(whole, [3, 0]))
    assert not data.is_ready
    data.prepare(torch.device("cpu"), True)
    assert data.is_ready
    assert (data.texts, data.is_latent) == (whole.texts, True)
    assert [data.texts[label] for label in data.labels] == ["a dog", "a red cat"]
    z, label, _ = data.item(1, 7, 3)
    assert torch.equal(z, whole.item(0, 7, 3)[0])
    assert label == whole.labels[0]
    assert torch.equal(data.decode(z[None]), whole.decode(z[None]))
    prompts = data.label_wrapper(torch.device("cpu"))(torch.nn.Identity()).prompts
    assert prompts.texts == whole.texts
    assert type(data.vae) is type(whole.vae)


@pytest.mark.parametrize("nested", [False, True])
def test_joined_data_sources_are_refused_until_their_files_are_in_one_folder(tmp_path, nested):
    for name in ("a/cat/1.png", "b/dog/2.png"):
        write(tmp_path / name)
    parts = [ImageFolder(str(tmp_path / name), 8, "L") for name in "ab"]
    joined = ConcatDataset([Subset(parts[0], [0]), parts[1]] if nested else parts)
    with pytest.raises(ValueError, match="ConcatDataset does not pass on what ImageFolder prov"):
        as_data_source(Subset(joined, [0, 1]) if nested else joined)
    (tmp_path / "b/dog").rename(tmp_path / "a/dog")
    assert as_data_source(ImageFolder(str(tmp_path / "a"), 8, "L")).labels.tolist() == [0, 1]


def test_plain_data_sets_can_be_joined():
    parts = [TensorDataset(torch.zeros(2, 3)), TensorDataset(torch.ones(1, 3))]
    data = as_data_source(ConcatDataset(parts))
    assert (len(data), float(data[2][0].sum())) == (3, 3.0)


def test_a_subset_that_changes_its_items_is_not_looked_through():
    class Negative(Subset):
        def __getitem__(self, index):
            x0, label = self.dataset[self.indices[index]]
            return -x0, label

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    with pytest.raises(ValueError, match="Negative does not pass on what Digits provides"):
        as_data_source(Negative(Digits(), [0, 1]))
    plain = TensorDataset(torch.ones(2, 3), torch.tensor([0, 1]))
    assert float(as_data_source(Negative(plain, [1]))[0][0].sum()) == -3


def test_the_autoencoder_of_cached_latents_is_in_evaluation_mode(captioned):
    assert not prepared_dataset(captioned).vae.training
