"""Masks beside images and in folders; mixtures of data sets; prior preservation."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from diffcore.core.process import Process
from diffcore.io.files import hash_file
from diffcore.training.data import ImageFolder, Mixture, load_batches, scan
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.cache import hash_content
from tests.helpers.captioned_images import latent_dataset, prepared_dataset
from tests.helpers.image_folders import write
from tests.helpers.mixed_images import ramp

PROCESS = Process(shape=(1, 8, 8))


def write_masked(folder, place):
    """An image of 60 x 30 pixels whose mask is white in its right half."""
    folder.mkdir(parents=True, exist_ok=True)
    ramp(60, 30).save(folder / "0.png")
    mask = np.zeros((30, 60), np.uint8)
    mask[:, 30:] = 255
    path = folder / "0.mask.png" if place == "beside" else folder.parent / "masks/0.bmp"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(mask).save(path)
    return "beside" if place == "beside" else str(path.parent)


@pytest.mark.parametrize("place", ["beside", "folder"])
def test_a_mask_is_cropped_and_mirrored_as_its_image(tmp_path, place):
    masks = write_masked(tmp_path / "images", place)
    buckets = Buckets((16,), step=4)
    data = ImageFolder(str(tmp_path / "images"), 16, crop="random", flip=True, masks=masks)
    assert len(data) == 1
    seen = set()
    for position in range(40):
        x0, _, extras = data.item(0, 3, position)
        weight = extras["weight"]
        assert weight.shape == (1, 16, 16)
        x = (x0[0] + 1) * 127.5 / 2 * torch.ones(16, 16)  # x of the source at each pixel
        assert (weight[0][x < 28] == 0).all()
        assert (weight[0][x > 31] == 1).all()
        seen.add(round(float(weight.mean()), 3))
    assert len(seen) > 10
    bucketed = ImageFolder(str(tmp_path / "images"), 16, buckets=buckets, masks=masks)
    assert bucketed[0][2]["weight"].shape[1:] == bucketed[0][0].shape[1:] == (12, 20)
    assert (
        bucketed.content_hash
        != ImageFolder(str(tmp_path / "images"), 16, buckets=buckets).content_hash
    )


def test_a_mask_of_latents_is_the_mean_over_the_area_of_each_latent_pixel(captioned):
    masks = np.random.default_rng(0).integers(0, 256, (16, 18), np.uint8)
    for number in range(5):
        Image.fromarray(masks).save(captioned / f"images/{number}.mask.png")
    data = prepared_dataset(captioned, masks="beside")
    weight = data.item(0, 7, 0)[2]["weight"]
    central = torch.from_numpy(masks[:, 1:17]).double() / 255
    expected = central.reshape(8, 2, 8, 2).mean((1, 3))
    torch.testing.assert_close(weight[0].double(), expected, rtol=0, atol=1e-6)


def test_a_black_pixel_of_a_mask_has_a_weight_of_exactly_zero(tmp_path):
    write_masked(tmp_path / "images", "beside")
    weight = ImageFolder(str(tmp_path / "images"), 16, masks="beside")[0][2]["weight"]
    assert (weight[..., :7] == 0).all()
    assert (weight[..., 9:] == 1).all()


def test_an_image_without_a_mask_or_with_one_of_another_size_is_refused(tmp_path):
    write_masked(tmp_path / "images", "beside")
    write(tmp_path / "images/1.png", mode="RGB", colour=0, size=(20, 20))
    with pytest.raises(
        ValueError, match=r"1 of 2 images have no mask, such as 1.png: expected NAME"
    ):
        ImageFolder(str(tmp_path / "images"), 16, masks="beside")
    write(tmp_path / "images/1.mask.png", size=(9, 20))
    with pytest.raises(ValueError, match=r"the mask .*1.mask.png has 9 x 20 pixels, .* 20 x 20"):
        ImageFolder(str(tmp_path / "images"), 16, masks="beside")
    with pytest.raises(ValueError, match="masks of padded images"):
        ImageFolder(str(tmp_path / "images"), 16, fit="pad", masks="beside")


def test_a_damaged_mask_is_refused_by_name_and_a_png_is_preferred(tmp_path):
    masks = write_masked(tmp_path / "images", "folder")
    write(tmp_path / "masks/0.png", size=(60, 30))
    data = ImageFolder(str(tmp_path / "images"), 16, masks=masks)
    assert (data[0][2]["weight"] == 1).all()
    (tmp_path / "masks/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"the mask .*0.png cannot be read: it is no image"):
        ImageFolder(str(tmp_path / "images"), 16, masks=masks)
    (tmp_path / "masks/0.png").rename(tmp_path / "images/0.mask.png")
    with pytest.raises(ValueError, match=r"the mask .*0.mask.png cannot be read: it is no image"):
        ImageFolder(str(tmp_path / "images"), 16, masks="beside", unreadable="skip")


def test_black_masks_are_reported_by_name_and_refused_if_there_is_no_other(
    tmp_path, capsys, monkeypatch
):
    write_masked(tmp_path / "images", "beside")
    write(tmp_path / "images/1.png", mode="RGB", colour=9, size=(20, 20))
    write(tmp_path / "images/1.mask.png", size=(20, 20), colour=0)
    ImageFolder(str(tmp_path / "images"), 16, masks="beside")
    assert capsys.readouterr().err.endswith(
        f"1 of 2 masks are black ({tmp_path}/images/1.mask.png): their images have no loss and are "
        "not learned\n"
    )
    monkeypatch.setenv("RANK", "1")
    ImageFolder(str(tmp_path / "images"), 16, masks="beside")
    assert capsys.readouterr().err == ""
    (tmp_path / "images/0.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 1 masks are black, such as .*1.mask.png, so that"):
        ImageFolder(str(tmp_path / "images"), 16, masks="beside")


def test_masks_are_read_once_and_then_known_from_the_recorded_scan(tmp_path, monkeypatch):
    masks = write_masked(tmp_path / "images", "folder")
    for path in tmp_path.glob("*/0.*"):
        os.utime(path, (1e9, 1e9))  # a file that changed a moment ago is read again
    first = ImageFolder(str(tmp_path / "images"), 16, masks=masks)
    inspected = []
    monkeypatch.setattr(scan, "inspect_images", lambda paths: inspected.extend(paths) or iter(()))
    again = ImageFolder(str(tmp_path / "images"), 16, masks=masks)
    assert not inspected
    assert again.content_hash == first.content_hash
    assert first.masks.content_hash == hash_content(hash_file(tmp_path / "masks/0.bmp"))


def numbers(first, count):
    """A data set of constant images of 0.01 times their number."""
    values = torch.arange(first, first + count) / 100
    return TensorDataset(values.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone())


def read(data, batch, steps, world=1):
    found = []
    for rank in range(world):
        order = data.order(3, batch, 1, rank, world).steps(0, steps)
        found += list(load_batches(data, order, PROCESS, 0))
    return found


def test_every_batch_has_the_shares_of_the_data_sets_and_their_loss_weights():
    """Prior preservation: half of every batch is the class, with the weight 0.3."""
    data = Mixture([numbers(0, 3), numbers(50, 20)], shares=[1, 1], loss_weights=[1, 0.3])
    for batch in read(data, 4, 30):
        is_class = batch.x0[:, 0, 0, 0] > 0.4
        assert int(is_class.sum()) == 2
        weight = batch.extras["weight"]
        assert weight.shape == (4, 1, 1, 1)
        assert weight.flatten().tolist() == pytest.approx(
            [0.3 if each else 1.0 for each in is_class]
        )


def test_repeats_are_the_visits_of_an_item_in_an_epoch():
    data = Mixture([numbers(0, 4), numbers(50, 10)], repeats=[3, 0.5])
    indices = [i for batch in read(data, 17, 10) for i in batch.index.tolist()]  # 10 epochs
    counts = Counter(indices)
    assert {counts[index] for index in range(4)} <= {29, 30, 31}
    assert {counts[index] for index in range(4, 14)} <= {4, 5, 6}


def test_a_mixture_is_the_same_on_every_number_of_ranks():
    data = Mixture([numbers(0, 4), numbers(50, 10)], shares=[1, 2])

    def by_row(world):
        return sorted(
            (step, row, index)
            for number, batch in enumerate(read(data, 6, 8, world))
            for step, row, index in zip(
                [number % 8] * 6, batch.batch_index.tolist(), batch.index.tolist(), strict=False
            )
        )

    assert by_row(1) == by_row(2) == by_row(3)


def test_a_mixture_of_latents_with_classes_leaves_the_network_as_it_is(captioned):
    mixture = Mixture([latent_dataset(captioned, captions=False)] * 2)
    network = torch.nn.Identity()
    assert mixture.label_wrapper(torch.device("cpu"))(network) is network
    assert mixture.prompts() is None


def test_captions_of_a_mixture_are_joined_in_one_bank(captioned):
    first = latent_dataset(captioned)
    (captioned / "more").mkdir()
    write(captioned / "more/0.png", mode="RGB", colour=(9, 9, 9), size=(16, 16))
    (captioned / "more/0.txt").write_text("a horse")
    write(captioned / "more/1.png", mode="RGB", colour=(90, 9, 9), size=(16, 16))
    (captioned / "more/1.txt").write_text("a dog")
    from diffcore.training.data.latents import LatentDataset

    second = LatentDataset(
        str(captioned / "more"), str(captioned / "pipeline"), cache=str(captioned / "cache")
    )
    data = Mixture([first, second])
    data.prepare(torch.device("cpu"), True)
    assert data.is_ready
    assert data.texts == ("", "a blue cat", "a dog", "a horse", "a red cat")
    assert [data.texts[data.item(i, 7, 0)[1]] for i in (0, 3, 5, 6)] == [
        "a red cat",
        "a dog",
        "a horse",
        "a dog",
    ]
    bank, own = data.prompts(), second.prompts()
    for name, value in bank.tensors.items():
        assert torch.equal(value[3], own.tensors[name][own.texts.index("a horse")])
        assert torch.equal(value[-1], first.prompts().tensors[name][-1])
    assert data.label_wrapper(torch.device("cpu"))(torch.nn.Identity()).prompts.texts == data.texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [1]}, "shares has 1 numbers, expected one for each of 2 data sets"),
        ({"shares": [0, 0]}, "expected positive finite numbers"),
        ({"shares": [1, 1], "repeats": [1, 1]}, "both set the proportions"),
        ({"loss_weights": [1, -1]}, "loss_weights is"),
        ({"repeats": [1, 0]}, "expected positive finite numbers"),
    ],
)
def test_mixtures_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixture([numbers(0, 3), numbers(50, 3)], **options)


def test_the_orientation_of_a_mask_counts(tmp_path):
    ramp(16, 12).save(tmp_path / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees, shown as 16 x 12
    Image.new("L", (12, 16), 255).save(tmp_path / "0.mask.png", exif=exif)
    assert ImageFolder(str(tmp_path), 8, masks="beside")[0][2]["weight"].shape == (1, 8, 8)


def test_mixtures_without_meaning_are_refused():
    data = TensorDataset(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="nothing is trained"):
        Mixture([data, data], loss_weights=[0, 0])
    with pytest.raises(ValueError, match="list all data sets in one mixture"):
        Mixture([Mixture([data, data], shares=[1, 3]), data])


def test_an_index_from_the_end_of_a_mixture_is_that_of_the_last_data_set():
    data = Mixture([numbers(0, 3), numbers(50, 20)])
    for index in (0, 3, 22):
        assert torch.equal(data[index - 23][0], data[index][0])
    assert float(data[-1][0][0, 0, 0]) == pytest.approx(0.69)
    with pytest.raises(IndexError):
        data[23]
