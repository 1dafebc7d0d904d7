"""A folder of condition images beside a folder of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.core.conditions import ConditionRecord
from diffcore.core.process import Process
from diffcore.run import without_locations
from diffcore.training.data import ImageFolder, load_batches
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.conditioned.image_pairs import ConditionFolder
from tests.helpers.captioned_images import latent_dataset, prepared_dataset
from tests.helpers.image_folders import write
from tests.helpers.mixed_images import ramp

EXIF_ROTATED = 6  # stored on its side: viewers turn it by 90 degrees clockwise


def save_rotated(image, path):
    """Save an image on its side, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = EXIF_ROTATED
    path.parent.mkdir(parents=True, exist_ok=True)
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.fixture
def folder(tmp_path):
    """Three images of a class, and their depth: the same grey values, in other files."""
    for number, (width, height) in enumerate([(60, 30), (20, 44), (32, 32)]):
        image = ramp(width, height).convert("L")
        path = tmp_path / f"images/cats/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        save_rotated(image, tmp_path / f"depth/cats/{number}.tiff")
    write(tmp_path / "depth/unused.png", size=(9, 9))
    return tmp_path


def paired(folder, channels="L", **options):
    conditions = {"depth": ConditionFolder(str(folder / "depth"), channels)}
    defaults = {"size": 16, "channels": "L", "conditions": conditions}
    return ImageFolder(str(folder / "images"), **(defaults | options))


@pytest.mark.parametrize("options", [{"crop": "random"}, {"fit": "pad"}, {}])
def test_a_condition_is_cropped_padded_and_mirrored_as_its_image(folder, options):
    data = paired(folder, flip=True, **options)
    seen = set()
    for position in range(12):
        x0, label, conditions = data.item(position % 3, 5, position)
        assert label == 0
        assert torch.equal(conditions["depth"], x0)
        seen.add(float((x0[0] * torch.arange(16)).sum()))
    assert len(seen) > 3  # both orientations of each image


def test_a_condition_has_its_own_channels_and_the_range_of_pixels(folder):
    Image.new("RGB", (32, 32), (255, 0, 0)).save(folder / "depth/cats/2.tiff")
    depth = paired(folder, "RGB")[2][2]["depth"]
    assert depth.shape == (3, 16, 16)
    assert depth.flatten(1).unique(dim=1).tolist() == [[1], [-1], [-1]]


def test_a_missing_an_ambiguous_and_an_unfitting_partner_are_refused_by_name(folder):
    (folder / "depth/cats/1.tiff").rename(folder / "depth/cats/1.other.tiff")
    with pytest.raises(ValueError, match=r"1 of 3 images have no condition depth, such as cats/1"):
        paired(folder)
    (folder / "depth/cats/1.other.tiff").rename(folder / "depth/cats/1.tiff")
    ramp(32, 32).save(folder / "depth/cats/2.png")
    with pytest.raises(ValueError, match=r"two conditions depth of one image, cats/2.*cats/2"):
        paired(folder)
    (folder / "depth/cats/2.png").unlink()
    save_rotated(ramp(30, 60), folder / "depth/cats/0.tiff")
    with pytest.raises(ValueError, match=r"1 of 3 .*s/0.tiff: it has 30 x 60 pixels.* 60 x 30, "):
        paired(folder)


def test_a_folder_inside_the_images_is_refused(folder):
    inside = {"depth": ConditionFolder(str(folder / "images/cats"))}
    with pytest.raises(ValueError, match="is inside that of the images"):
        paired(folder, conditions=inside)


def test_in_buckets_a_condition_has_the_size_and_the_crop_of_its_image(folder):
    record = ConditionRecord((1, 16, 16), -1, 1)
    process = Process(shape=(1, 16, 16), conditions={"depth": record})
    data = paired(folder, flip=True, crop="random", buckets=Buckets((16,), step=4))
    order = data.order(3, 3, 1, 0, 1).steps(0, 8)
    shapes = set()
    for batch in load_batches(data, order, process, 0):
        assert torch.equal(batch.extras["depth"], batch.x0)
        shapes.add(tuple(batch.x0.shape[1:]))
    assert len(shapes) > 1


def test_the_hash_has_contents_names_and_channels_of_conditions_but_no_folder(folder):
    plain, before = paired(folder, conditions=None).content_hash, paired(folder).content_hash
    hashes = {plain, before, paired(folder, "RGB").content_hash}
    renamed = {"edges": ConditionFolder(str(folder / "depth"), "L")}
    hashes.add(paired(folder, conditions=renamed).content_hash)
    assert len(hashes) == 4
    (folder / "depth").rename(folder / "moved")
    moved = {"depth": ConditionFolder(str(folder / "moved"), "L")}
    assert paired(folder, conditions=moved).content_hash == before
    save_rotated(ramp(32, 32), folder / "moved/cats/2.tiff")
    assert paired(folder, conditions=moved).content_hash != before


def test_workers_read_what_the_main_process_reads(folder):
    process = Process(shape=(1, 16, 16), conditions={"depth": ConditionRecord((1, 16, 16), -1, 1)})
    data = paired(folder, flip=True, crop="random")
    found = [
        [batch.extras["depth"] for batch in load_batches(data, order, process, workers)]
        for workers in (0, 1)
        for order in [data.order(3, 2, 1, 0, 1).steps(0, 4)]
    ]
    assert len(found[0]) == 4
    assert all(map(torch.equal, *found))


def test_the_condition_of_latents_is_an_image_of_the_crop_in_pixels(captioned):
    for number in range(5):
        source = captioned / f"images/{number}.png"
        target = captioned / f"depth/{number}.png"
        target.parent.mkdir(exist_ok=True)
        Image.open(source).convert("L").save(target)
    conditions = {"depth": ConditionFolder(str(captioned / "depth"), "L")}
    data = prepared_dataset(captioned, conditions=conditions, flip=True)
    assert data.content_hash != latent_dataset(captioned, flip=True).content_hash
    grey = np.asarray(Image.open(captioned / "depth/1.png"), np.float32)[:, 1:17] / 127.5 - 1
    seen = set()
    for position in range(6):
        depth = data.item(1, 7, position)[2]["depth"].numpy()
        is_mirrored = not np.array_equal(depth[0], grey)
        np.testing.assert_array_equal(depth[0], grey[:, ::-1] if is_mirrored else grey)
        seen.add(is_mirrored)
    assert seen == {False, True}


def test_a_run_whose_masks_and_conditions_were_moved_is_the_same_run():
    def spec(root):
        arguments = {"folder": root, "masks": root, "size": 8}
        arguments["conditions"] = {"depth": {"folder": root, "channels": "L"}}
        images = {"class_path": "ImageFolder", "init_args": arguments}
        return {"class_path": "Mixture", "init_args": {"data": [images, images], "shares": [1, 1]}}

    assert without_locations(spec("a")) == without_locations(spec("b"))
    kept = without_locations(spec("a"))["init_args"]
    assert kept["data"][0]["init_args"] == {"size": 8}
    assert kept["shares"] == [1, 1]
