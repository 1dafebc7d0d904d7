"""The pictures of the colour demo, prepared from a tiny archive in the form of the npm package."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import prepare_emoji
import pytest
from PIL import Image
from prepare_emoji import PreparationError, halve_on_white, list_emojis, prepare

from diffcore.training.data.image_folder import ImageFolder

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_emoji.py"


def picture(colour, alpha=255, size=64):
    """A PNG file whose left half is a colour, and whose right half is transparent black."""
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[:, : size // 2] = (*colour, alpha)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def entry(code, category="Food & Drink", **values):
    """An entry of emoji.json."""
    return {
        "short_name": f"name-{code}",
        "image": f"{code}.png",
        "unified": code.upper(),
        "category": category,
        "has_img_twitter": True,
        **values,
    }


def archive(path, entries, pictures):
    """Write an archive with an index and pictures by the name of the file."""
    files = {"package/emoji.json": json.dumps(entries).encode()}
    files |= {f"package/img/twitter/64/{name}": content for name, content in pictures.items()}
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def package(tmp_path):
    """An archive of 60 emojis of two categories, and what is left out of it."""
    entries, pictures = [], {}
    for index in range(60):
        code = f"1f{index:03x}"
        entries.append(entry(code, "Food & Drink" if index % 2 else "Flags"))
        pictures[f"{code}.png"] = picture((index, 4 * index, 200))
    swatch, absent = entry("1f3fb", "Component"), entry("aaaa", has_img_twitter=False)
    copy = entry("ffff", "Objects")
    pictures |= {"1f3fb.png": picture((9, 9, 9)), "ffff.png": pictures["1f007.png"]}
    return archive(tmp_path / "package.tgz", [*entries, swatch, absent, copy], pictures)


def test_transparency_becomes_white_and_pixels_are_averaged():
    pixels = halve_on_white(picture((100, 0, 255), alpha=51))
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].tolist() == [round(0.2 * 100 + 0.8 * 255), round(0.8 * 255), 255]
    assert pixels[0, -1].tolist() == [255, 255, 255]
    grey = np.zeros((64, 64, 4), np.uint8)
    grey[..., 3] = 255
    grey[::2, ::2, :3] = 10  # the mean of 10, 0, 0, 0 is 2.5, and half of 1 is rounded up
    content = io.BytesIO()
    Image.fromarray(grey).save(content, "PNG")
    assert (halve_on_white(content.getvalue()) == 3).all()


def test_each_emoji_is_in_one_part_and_equal_pictures_are_written_once(package, tmp_path):
    content = prepare(package, tmp_path / "emoji")
    assert content["categories"] == ["flags", "food-drink"]  # the copy among objects is left out
    files = sorted(path.relative_to(tmp_path / "emoji") for path in tmp_path.rglob("*.png"))
    assert len({path.name for path in files}) == len(files) == 60
    assert content["train"] + content["test"] == 60
    assert 1 <= content["test"] <= 15
    x0, label = ImageFolder(str(tmp_path / "emoji" / "train"), 32)[0]
    assert x0.shape == (3, 32, 32)
    assert float(x0[:, 0, -1].min()) == 1.0  # white
    assert label == 0
    assert "CC-BY 4.0" in (tmp_path / "emoji" / "ATTRIBUTION.txt").read_text()


def test_the_preparation_is_the_same_each_time_and_states_the_hash_of_its_pixels(package, tmp_path):
    first, second = (prepare(package, tmp_path / name) for name in ("a", "b"))
    assert first == second == json.loads((tmp_path / "a" / "content.json").read_text())
    digest = hashlib.sha256()
    paths = list((tmp_path / "a").rglob("*.png"))
    for path in sorted(paths, key=lambda path: path.relative_to(path.parents[2]).parts[1:]):
        name = path.relative_to(tmp_path / "a").as_posix()
        digest.update(name.encode() + b"\0" + np.asarray(Image.open(path)).tobytes())
    assert first["pixels"] == digest.hexdigest()
    again = prepare(package, tmp_path / "a")
    assert again == first


def test_the_part_of_an_emoji_depends_on_its_code_points_alone():
    entries = [entry(f"1f{index:03x}") for index in range(400)]
    held_out = {emoji.name for emoji in list_emojis(entries) if emoji.is_held_out}
    assert 20 <= len(held_out) <= 60
    fewer = list_emojis(entries[::3])
    assert {emoji.name for emoji in fewer if emoji.is_held_out} == held_out & {
        emoji.name for emoji in fewer
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_name": "../../etc/passwd"}, "which name no files"),
        ({"image": "../x.png"}, "which name no files"),
        ({"image": "bbbb.png"}, "the archive has no file package/img/twitter/64/bbbb.png"),
    ],
)
def test_an_archive_whose_index_names_other_files_is_refused(tmp_path, change, message):
    path = archive(tmp_path / "p.tgz", [entry("aaaa", **change)], {"aaaa.png": picture((1, 2, 3))})
    with pytest.raises(PreparationError, match=message):
        prepare(path, tmp_path / "emoji")
    assert not list(tmp_path.rglob("*.png"))


def test_a_folder_with_something_else_in_it_is_kept(package, tmp_path):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "notes.txt").write_text("mine")
    with pytest.raises(PreparationError, match="holds something else"):
        prepare(package, tmp_path / "mine")
    assert (tmp_path / "mine" / "train" / "notes.txt").read_text() == "mine"


def test_a_picture_of_another_size_is_refused(tmp_path):
    path = archive(tmp_path / "p.tgz", [entry("aaaa")], {"aaaa.png": picture((1, 2, 3), size=32)})
    with pytest.raises(PreparationError, match="expected 64x64"):
        prepare(path, tmp_path / "emoji")


def run(*words, path=None):
    """How the script ends."""
    environment = os.environ | ({} if path is None else {"PATH": path})
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_an_archive_that_is_not_the_published_one_is_refused(package, tmp_path):
    ended = run("--archive", package, "--out", tmp_path / "emoji")
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    assert ended.returncode == 1
    assert f"has the integrity sha512-{digest}, expected {prepare_emoji.INTEGRITY}" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "emoji").exists()


def test_without_npm_the_message_names_the_two_remedies(tmp_path):
    ended = run("--out", tmp_path / "emoji", path=str(tmp_path))
    assert ended.returncode == 1
    assert "npm, which fetches the pictures, is not installed: install Node.js, or" in ended.stderr
    assert "--archive" in ended.stderr


def test_npm_fetches_the_package_from_the_registry_that_it_is_configured_for(package, tmp_path):
    """A command in the place of npm: it gets the name of the package and no address."""
    fake = tmp_path / "npm"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncp {package} x.tgz\n')
    fake.chmod(0o755)
    ended = run("--out", tmp_path / "emoji", path=f"{tmp_path}:/bin:/usr/bin")
    assert "has the integrity" in ended.stderr  # it is not the published one
    words = (tmp_path / "words").read_text().split()
    assert words == ["pack", "--silent", "emoji-datasource-twitter@16.0.0"]
