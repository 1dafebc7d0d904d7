"""Atomic writes of files and folders, and hashes of files."""

import hashlib

import pytest

from diffcore.io.files import hash_file, write_file, write_folder


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
    def write(text):
        def create(folder):
            folder.mkdir()
            (folder / text).write_text(text)

        return create

    def fail(folder):
        folder.mkdir()
        raise ZeroDivisionError

    write_folder(tmp_path / "folder", write("old"))
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "folder", fail)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["old"]
    write_folder(tmp_path / "folder", write("new"))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
