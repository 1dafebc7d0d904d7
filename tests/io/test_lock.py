"""The lock on a folder: a second holder is refused, a dead one is replaced."""

import errno
import json
import multiprocessing
import os
import socket

import pytest

from diffcore.io import lock
from diffcore.io.lock import lock_folder


def test_a_second_holder_is_refused_with_the_number_and_the_host_of_the_first(tmp_path):
    expected = rf"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} \(since "
    with lock_folder(tmp_path, pytest.fail):
        with pytest.raises(ValueError, match=expected), lock_folder(tmp_path, pytest.fail):
            pass
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path, pytest.fail):
        pass


def hold_until_killed(folder, connection):
    with lock_folder(folder, print):
        connection.send(os.getpid())
        connection.recv()


def test_the_lock_of_a_killed_process_is_taken_over_and_announced(tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    holder = context.Process(target=hold_until_killed, args=(tmp_path, there))
    holder.start()
    assert here.recv() == holder.pid
    with pytest.raises(ValueError, match=f"process {holder.pid}"), lock_folder(tmp_path, print):
        pass
    holder.kill()
    holder.join()
    messages = []
    with lock_folder(tmp_path, messages.append):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    (message,) = messages
    assert message.startswith(f"process {holder.pid} on {socket.gethostname()} (since ")
    assert message.endswith(f"ended without releasing {tmp_path}: its lock is taken over")


def test_a_folder_that_was_created_for_the_lock_and_is_empty_is_removed(tmp_path):
    for name, content in (("empty", None), ("full", "file")):
        with lock_folder(tmp_path / name, pytest.fail):
            if content:
                (tmp_path / name / content).touch()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_file_system_without_locks_is_announced(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", fail)
    messages = []
    with lock_folder(tmp_path, messages.append):
        pass
    assert messages == [
        f"{tmp_path} cannot be locked (No locks available): start no second run in this folder"
    ]


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_in_place_of_the_lock_is_refused_and_what_it_leads_to_is_kept(tmp_path, inside):
    folder = tmp_path / "run"
    folder.mkdir()
    precious = (folder if inside else tmp_path) / "weights"
    precious.write_text("precious")
    link = folder / ".lock"
    link.symlink_to(precious)
    message = rf"{link} is a link to {precious}, expected a file: remove it"
    with pytest.raises(ValueError, match=message), lock_folder(folder, pytest.fail):
        pass
    assert precious.read_text() == "precious"
    link.unlink()
    with lock_folder(folder, pytest.fail):
        pass


def test_a_lock_without_a_holder_in_it_is_taken_over(tmp_path):
    for content in ("", "[" * 50_000, "null"):
        (tmp_path / ".lock").write_text(content)
        with lock_folder(tmp_path, lambda line: None):
            pass
