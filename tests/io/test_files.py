"""Atomic writes of files and folders, and hashes of files."""

import errno
import hashlib
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from diffcore.io import files
from diffcore.io.files import (
    HASHES,
    CorruptFileError,
    WriteError,
    check_links,
    check_writable,
    hash_file,
    remove_leftovers,
    verify_folder,
    write_file,
    write_folder,
)
from tests.helpers.file_faults import fault, full_disk


def creator(text):
    """A function that writes a folder of two files with this text."""

    def create(folder):
        folder.mkdir()
        (folder / "sub").mkdir()
        (folder / "first").write_text(text)
        (folder / "sub/second").write_text(text)

    return create


def read_texts(folder):
    """The texts in a folder that `creator` wrote, after a check of its hashes."""
    assert (folder / HASHES).is_file()
    verify_folder(folder)
    return {(folder / name).read_text() for name in ("first", "sub/second")}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_hash_is_sha256_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "file", b"old")
    monkeypatch.setattr("diffcore.io.files.os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_is_replaced_once_the_new_one_is_complete(tmp_path):
    def fail(folder):
        folder.mkdir()
        raise ZeroDivisionError

    write_folder(tmp_path / "folder", creator("old"))
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "folder", fail)
    assert read_texts(tmp_path / "folder") == {"old"}
    write_folder(tmp_path / "folder", creator("new"))
    assert read_texts(tmp_path / "folder") == {"new"}
    assert names(tmp_path) == {"folder"}


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_a_folder_is_complete_after_a_fault_of_any_operation(tmp_path, monkeypatch, swaps, killed):
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    folder, position, missing = tmp_path / "folder", 0, 0
    write_folder(folder, creator("0"))
    while True:
        before = read_texts(folder)
        with fault(position, killed) as faults, suppress(WriteError):
            write_folder(folder, creator(str(position + 1)))
        if not faults.happened:
            break
        missing += not folder.exists()
        remove_leftovers(tmp_path, "folder")
        assert read_texts(folder) in (before, {str(position + 1)})
        assert names(tmp_path) == {"folder"}
        position += 1
    assert position > 20
    assert missing == (killed and not swaps)  # between two renames


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    with subprocess.Popen(["true"]) as process:
        pass
    dead, alive = process.pid, os.getppid()
    for name in (f".config.yaml.{dead}", f".config.yaml.{alive}", ".config.yaml.mine", ".x.1"):
        (tmp_path / name).touch()
    (tmp_path / f".pipeline.{dead}/unet").mkdir(parents=True)
    (tmp_path / f".lost.{dead}.old/unet").mkdir(parents=True)
    remove_leftovers(tmp_path, r"config\.yaml", "pipeline", "lost")
    assert names(tmp_path) == {f".config.yaml.{alive}", ".config.yaml.mine", ".x.1", "lost"}
    assert names(tmp_path / "lost") == {"unet"}


@pytest.mark.parametrize("name", ["first", "sub/second", HASHES])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_of_a_folder_is_named(tmp_path, name, damage):
    folder = tmp_path / "folder"
    write_folder(folder, creator("text"))
    content = (folder / name).read_bytes()
    changed = {"flip": bytes([content[0] ^ 1]) + content[1:], "truncate": content[:-1]}
    if damage == "delete":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(changed[damage])
    if (name, damage) == (HASHES, "delete"):
        verify_folder(folder)  # such as a folder of another program
        return
    with pytest.raises(CorruptFileError, match=f"folder/{name}"):
        verify_folder(folder)


def test_the_hashes_of_a_folder_do_not_lead_out_of_it(tmp_path):
    write_folder(tmp_path / "folder", creator("text"))
    (tmp_path / "folder" / HASHES).write_text(json.dumps({"../other": "0"}))
    with pytest.raises(
        CorruptFileError, match=r"names \.\./other, which is not a file of its folder"
    ):
        verify_folder(tmp_path / "folder")


def test_a_folder_that_is_replaced_while_it_is_read_is_not_corrupt(tmp_path, monkeypatch):
    folder, replaced = tmp_path / "folder", []
    write_folder(folder, creator("old"))

    def hash_after_replacement(path):
        if not replaced:
            replaced.append(path)
            write_folder(folder, creator("new"))
        return hash_file(path)

    monkeypatch.setattr(files, "hash_file", hash_after_replacement)
    verify_folder(folder)
    assert replaced


def test_a_link_is_not_replaced(tmp_path):
    creator("old")(tmp_path / "target")
    (tmp_path / "folder").symlink_to("target")
    with pytest.raises(WriteError, match="folder is a link, which is not replaced: remove it"):
        write_folder(tmp_path / "folder", creator("new"))
    assert (tmp_path / "folder/first").read_text() == "old"
    (tmp_path / "folder").unlink()
    write_folder(tmp_path / "folder", creator("new"))
    assert read_texts(tmp_path / "folder") == {"new"}


def test_on_a_full_disk_the_old_file_is_kept_and_the_error_names_it(tmp_path):
    write_file(tmp_path / "file", b"old")
    with (
        full_disk(1000),
        pytest.raises(WriteError, match=r"/file cannot be written \(.+\): an old"),
    ):
        write_file(tmp_path / "file", bytes(2000))
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_read_only_folder_is_refused_before_the_result_is_computed(tmp_path, monkeypatch):
    check_writable(tmp_path / "new/folder/result.json")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anyway
    with pytest.raises(WriteError, match=rf"new/result.json cannot .*{tmp_path} is read-only"):
        check_writable(tmp_path / "new/result.json")
    (tmp_path / "own").mkdir()
    check_writable(tmp_path / "own/result.json")


def test_an_error_names_the_file_where_nothing_can_be_removed_either(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", "a temporary name")

    monkeypatch.setattr(files, "write_and_sync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(WriteError, match=r"^\S*a\.png cannot be written \(Read-only"):
        files.write_file(tmp_path / "a.png", b"")


def test_a_link_to_itself_leads_out_of_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    check_links(tmp_path)
    (tmp_path / "out").symlink_to(tmp_path.parent)
    with pytest.raises(ValueError, match=f"{tmp_path}/out is a link to {tmp_path.parent}"):
        check_links(tmp_path)
