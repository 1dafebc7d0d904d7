"""Tar files: samples, indices, keyed order, hostile and damaged files, streams, servers."""

import io
import json
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from torch.utils.data import Subset

from diffcore.io.images.pixels import as_pixels
from diffcore.training.data import LowResolution, Mixture, TarShards, TarStream, as_data_source
from diffcore.training.data.collections import tar_index, tar_stream
from tests.helpers.grey_images import encoded, flat, labels_of
from tests.helpers.training_runs import (
    PROCESS,
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
    train,
)


def add(archive, name, content, **options):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for option, value in options.items():
        setattr(member, option, value)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path, values, mode="w"):
    """A shard of images whose grey value is the label."""
    with tarfile.open(path, mode) as archive:
        for value in values:
            stem = f"train/{value:04d}"
            add(archive, f"{stem}.png", encoded(value))
            add(archive, f"{stem}.cls", str(value).encode())
            add(archive, f"{stem}.json", json.dumps({"text": f"grey {value % 3}"}).encode())
    return path


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 4 and 6 images with the labels 0 .. 14."""
    values = iter(range(15))
    for shard, count in enumerate((5, 4, 6)):
        write_tar(tmp_path / f"s{shard}.tar", [next(values) for _ in range(count)])
    return tmp_path


def test_shards_are_read_where_they_lie_in_a_keyed_order(shards):
    data = TarShards(str(shards), 2, "L")
    assert len(data) == 15
    assert data.labels.tolist() == list(range(15))
    for index in (0, 4, 5, 14):
        x0, label = data[index]
        assert label == index
        assert torch.equal(x0, as_pixels(encoded(index), 2, "L", "crop"))
    with pytest.raises(IndexError):
        data[15]
    whole = labels_of(data, (0, 15), batch=5)
    assert all(sorted(flat(whole[e : e + 3])) == list(range(15)) for e in (0, 3, 6))
    assert whole[:3] != whole[3:6]
    assert labels_of(data, (4, 9), 1, 5, batch=5) == whole[4:9]
    assert labels_of(data, (4, 6), workers=2, batch=5) == whole[4:6]


def test_captions_and_entries_of_json_are_read(shards):
    data = TarShards(str(shards), 2, "L", label="", caption="json.text")
    assert data.texts == ("grey 0", "grey 1", "grey 2")
    assert data.labels.tolist() == [value % 3 for value in range(15)]
    assert TarShards(str(shards), 2, "L", label="").class_names == ()


def test_an_index_is_recorded_once_and_made_again_for_another_file_or_member(shards, monkeypatch):
    first = TarShards(str(shards), 2, "L")
    made = []
    make = tar_index._make_index
    monkeypatch.setattr(
        tar_index, "_make_index", lambda path, fields: made.append(path.name) or make(path, fields)
    )
    assert TarShards(str(shards), 2, "L").content_hash == first.content_hash
    assert not made
    write_tar(shards / "s1.tar", [50, 51])
    changed = TarShards(str(shards), 2, "L")
    assert made == ["s1.tar"]
    assert changed.labels.tolist() == [0, 1, 2, 3, 4, 50, 51, *range(9, 15)]
    assert changed.content_hash != first.content_hash
    record = shards / ".s0.tar.diffcore-index.safetensors"
    record.write_bytes(record.read_bytes()[:-9])
    assert TarShards(str(shards / "s0.tar"), 2, "L").labels.tolist() == [0, 1, 2, 3, 4]
    TarShards(str(shards / "s0.tar"), 2, "L", label="")
    assert made == ["s1.tar", "s0.tar", "s0.tar"]


def read_all(path, is_stream):
    """Read every sample of a stream, or the index of a shard."""
    if is_stream:
        return list(TarStream([str(path)], 2, "L")._read_shard(0))
    return TarShards(str(path), 2, "L")


def hostile(path, change):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.png", encoded(1))
        add(archive, "a.cls", b"1")
        change(archive)


def patch_size(path, field):
    """Overwrite the size of the first member, with a right checksum."""
    content = bytearray(path.read_bytes())
    content[124:136] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)


HOSTILE = {
    "absolute": (lambda a: add(a, "/etc/b.png", b""), r"member /etc/b.png lies outside"),
    "above": (lambda a: add(a, "x/../../b.png", b""), r"member x/../../b.png lies outside"),
    "backslash": (lambda a: add(a, "x\\..\\b.png", b""), r"lies outside"),
    "symbolic link": (
        lambda a: add(a, "b.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "member b.png is a link, a device or a sparse file",
    ),
    "hard link": (lambda a: add(a, "b.png", b"", type=tarfile.LNKTYPE, linkname="a"), "is a link"),
    "device": (lambda a: add(a, "b.png", b"", type=tarfile.CHRTYPE), "is a link, a device"),
    "not UTF-8": (lambda a: add(a, "b\udcff.png", b""), r"'b\\udcff.png' has a name that is not"),
    "no image": (lambda a: add(a, "b.cls", b"1"), "sample b has no image among 'cls'"),
    "two images": (
        lambda a: (add(a, "b.png", b"1"), add(a, "b.jpg", b"1")),
        "sample b has 2 images",
    ),
    "twice": (lambda a: (add(a, "b.png", b""), add(a, "b.png", b"")), "two members .png"),
    "no label": (lambda a: add(a, "b.png", b""), r"sample b has no member .cls"),
    "label": (
        lambda a: (add(a, "b.png", b""), add(a, "b.cls", b"cat\n1")),
        r"has the label 'cat\\n1', expected an integer",
    ),
    "long name": (lambda a: add(a, "b" * 2**21, b""), "it has a header of .* bytes"),
    "negative size in pax": (
        lambda a: add(a, "b.png", b"", pax_headers={"size": "-512"}),
        "negative|has -512 bytes|cannot be read",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("is_stream", [False, True])
def test_hostile_members_are_refused_by_name_in_one_line(tmp_path, kind, is_stream):
    change, message = HOSTILE[kind]
    hostile(tmp_path / "bad.tar", change)
    with pytest.raises(ValueError, match=message) as error:
        read_all(tmp_path / "bad.tar", is_stream)
    assert "bad.tar is refused: it" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".tar", ".lock"}


@pytest.mark.parametrize("cut", [700, 1600, 2048, 2000, 4608])
@pytest.mark.parametrize("is_stream", [False, True])
def test_truncated_files_are_refused_and_never_read_as_shorter_ones(tmp_path, cut, is_stream):
    path = write_tar(tmp_path / "a.tar", [1, 2, 3])
    content = path.read_bytes()
    assert cut < 9 * 1024
    path.write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"a\.tar (is refused|cannot be read)"):
        read_all(path, is_stream)


@pytest.mark.parametrize("field", [b"77777777777\0", b"\xff" * 11 + b"\0", b"\x80" + b"\xff" * 11])
@pytest.mark.parametrize("is_stream", [False, True])
def test_impossible_sizes_are_refused(tmp_path, field, is_stream):
    path = write_tar(tmp_path / "a.tar", [1])
    patch_size(path, field)
    with pytest.raises(ValueError, match=r"a\.tar is refused: it"):
        read_all(path, is_stream)


def test_a_compressed_file_is_refused_as_a_shard_and_read_as_a_stream(tmp_path):
    path = write_tar(tmp_path / "a.tar", [1, 2], "w:gz")
    with pytest.raises(ValueError, match=r"a\.tar is refused: it"):
        TarShards(str(path), 2, "L")
    assert [s.label for s in TarStream([str(path)], 2, "L")._read_shard(0)] == [1, 2]


def stream_of(shards, **options):
    given = {"window": 4, "lanes": 3, "turn": 2} | options
    return TarStream([str(shards)], 2, "L", **given)


def test_a_stream_is_the_same_for_every_split_and_continues_exactly(shards):
    whole = labels_of(stream_of(shards), (0, 12))
    assert labels_of(stream_of(shards), (0, 12), accumulation=2, world=2) == whole
    assert labels_of(stream_of(shards), (5, 12)) == whole[5:]
    assert labels_of(stream_of(shards), (7, 10), workers=2) == whole[7:10]
    assert labels_of(stream_of(shards, lanes=1, window=15), (0, 12)) != whole


def test_an_epoch_of_a_stream_reads_every_sample_once_in_another_order(shards):
    labels = flat(labels_of(stream_of(shards, lanes=1, window=15), (0, 9), batch=5))
    epochs = [labels[first : first + 15] for first in (0, 15, 30)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len(set(map(tuple, [*epochs, range(15)]))) == 4
    # Each lane of two shards or one cycles through its own.
    labels = flat(labels_of(stream_of(shards, lanes=3, window=1), (0, 5), batch=6))
    own = [label for position, label in enumerate(labels) if position // 2 % 3 == 1]
    assert own == [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]


def test_a_renewed_stream_begins_new_epochs_where_it_is_resumed(shards):
    data = stream_of(shards, restart="renew", lanes=1, window=15)
    first = flat(labels_of(data, (0, 3), batch=5))
    again = flat(labels_of(data, (3, 6), batch=5))
    assert sorted(first) == sorted(again) == list(range(15))
    assert first != again
    assert flat(labels_of(data, (3, 6), 1, 5, batch=5)) == again
    exact = flat(labels_of(stream_of(shards, lanes=1, window=15), (0, 3), batch=5))
    assert exact == first


def test_the_first_samples_of_a_stream_are_read_by_index(shards):
    data = stream_of(shards)
    assert len(data) == 4
    assert [data[index][1] for index in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="the first shard has 5 samples: set window"):
        stream_of(shards, window=8)[5]


def test_a_part_of_a_stream_and_a_mixture_with_one_are_refused(shards):
    """Either would read the first samples of the stream again and again."""
    stream = stream_of(shards)
    with pytest.raises(ValueError, match="TarStream is read only in its own order, which a Subset"):
        as_data_source(Subset(stream, [0, 1]))
    for data in (stream, LowResolution(stream, 2)):
        with pytest.raises(ValueError, match="in a mixture is read only in its own order"):
            Mixture([TarShards(str(shards), 2, "L"), data])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"turn": 0}, "turn is 0, expected at least 1"),
        ({"lanes": 4}, "lanes is 4, expected 1 .. 3, the number of shards"),
        ({"restart": "skip"}, "restart is 'skip', expected one of reread, renew"),
    ],
)
def test_options_of_a_stream_out_of_range_are_refused(shards, options, message):
    with pytest.raises(ValueError, match=message):
        stream_of(shards, **options)


@pytest.mark.parametrize("path", ["pipe:touch x", "file:///etc/a.tar", "gs://x/a.tar"])
def test_an_address_that_is_not_of_a_web_server_is_refused(path):
    with pytest.raises(ValueError, match=r"paths contains .*https:// or http://"):
        TarStream([path], 2)


class BrokenServer(SimpleHTTPRequestHandler):
    """Serves files, and closes the connection in the midst of every second answer."""

    count = 0

    def copyfile(self, source, outputfile):
        type(self).count += 1
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.count % 2 else content)

    def log_message(self, *args):
        pass


def test_a_remote_stream_reads_on_after_a_lost_connection(shards, monkeypatch):
    monkeypatch.setattr(tar_stream, "WAIT", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(BrokenServer, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        paths = [f"{address}/s{shard}.tar" for shard in range(3)]
        data = TarStream(paths, 2, "L", window=4, lanes=3, turn=2)
        assert labels_of(data, (0, 6)) == labels_of(stream_of(shards), (0, 6))
        assert BrokenServer.count > 3
        with pytest.raises(ValueError, match=r"none\.tar cannot be read: HTTP Error 404"):
            TarStream([f"{address}/none.tar"], 2)[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", [TarShards, TarStream])
def test_a_run_on_moved_tar_files_is_resumed_as_the_same_run(shards, tmp_path, kind):
    def options(folder):
        name, path = ("path", str(folder)) if kind is TarShards else ("paths", [str(folder)])
        arguments = {name: path, "size": 8, "channels": "L"}
        if kind is TarStream:
            arguments |= {"window": 4, "lanes": 3, "turn": 2}
        config = {"data": {"class_path": kind.__name__, "init_args": arguments}}
        process = replace(PROCESS, classes=15)
        return {
            "network": partial(LabelRecorder, 15),
            "data": kind(**arguments),
            "process": process,
            "config": yaml.safe_dump(config),
            "save_every": 2,
        }

    data = tmp_path / "first"
    data.mkdir()
    for path in shards.glob("*.tar"):
        path.rename(data / path.name)
    train(tmp_path / "straight", **options(data))
    crash_after(make_trainer(tmp_path / "resumed", **options(data)), 2)
    data.rename(tmp_path / "second")
    train(tmp_path / "resumed", **options(tmp_path / "second"), resume=True)
    whole, resumed = hashes(tmp_path / "straight"), hashes(tmp_path / "resumed")
    assert {name for name in whole if whole[name] != resumed[name]} == {"config.yaml"}
