"""The recorded scan of an image folder: what is inspected again, and where the record lies."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffcore.io.images import inspection as image_inspection
from diffcore.io.safetensors import read_weights_and_metadata, write_weights
from diffcore.training.data import scan as scan_module
from diffcore.training.data.listing import PackedTexts, find_files, list_files
from diffcore.training.data.scan import record_path, scan_folder, shared_scans
from tests.helpers.image_folders import write

OLD = (1_600_000_000, 1_600_000_000)


def write_old(path: Path, colour: object = 255, **options: object) -> Path:
    """Write an image whose time of the last change is long ago."""
    write(path, colour, **options)
    os.utime(path, OLD)
    return path


@pytest.fixture
def inspected(monkeypatch):
    """Names of the images that are inspected, in order."""
    names: list[str] = []

    def inspect(path):
        names.append(Path(path).name)
        return inspect_image(path)

    inspect_image = image_inspection.inspect_image
    monkeypatch.setattr(image_inspection, "inspect_image", inspect)
    return names


def described(scan) -> list[tuple]:
    """Name, width, height, mode, whether it is grey and hash of each image of a scan."""
    columns = (scan.width, scan.height, scan.mode, scan.is_grey)
    return [
        (name, int(w), int(h), scan.modes[mode], bool(grey), bytes(digest).hex())
        for name, w, h, mode, grey, digest in zip(
            scan.files.names, *columns, scan.sha256.numpy(), strict=True
        )
    ]


def test_a_scan_holds_size_mode_and_hash_of_every_image(tmp_path):
    write(tmp_path / "b/grey.png", size=(5, 7))
    write(tmp_path / "a.tif", (1, 2, 3, 4), "CMYK", (6, 4))
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "grey-palette.png")
    palette.putpalette([0, 0, 0, 9, 8, 9])
    palette.save(tmp_path / "palette.png")
    rows = described(scan_folder(tmp_path))
    assert [row[:5] for row in rows] == [
        ("a.tif", 6, 4, "CMYK", False),
        ("b/grey.png", 5, 7, "L", True),
        ("grey-palette.png", 3, 3, "P", True),
        ("palette.png", 3, 3, "P", False),
    ]
    for name, *_, digest in rows:
        found = subprocess.run(["sha256sum", tmp_path / name], capture_output=True, text=True)
        assert digest == found.stdout.split()[0].lstrip("\\")


def test_a_second_scan_inspects_nothing_and_equals_the_first(tmp_path, inspected):
    for name in ("1.png", "cat/2.png", "dog/3.png"):
        write_old(tmp_path / name)
    first = scan_folder(tmp_path)
    assert inspected == ["1.png", "2.png", "3.png"]
    assert described(scan_folder(tmp_path)) == described(first)
    assert len(inspected) == 3


def test_only_what_is_new_or_changed_is_inspected_again(tmp_path, inspected):
    for name in ("1.png", "2.png", "4.png", "5.png"):
        write_old(tmp_path / name)
    scan_folder(tmp_path)
    inspected.clear()
    write_old(tmp_path / "3.png")  # new, and moves the rows of those after it
    write_old(tmp_path / "4.png", size=(9, 9))  # another size
    write(tmp_path / "5.png", 7)  # another time
    (tmp_path / "1.png").unlink()
    scan = scan_folder(tmp_path)
    assert inspected == ["3.png", "4.png", "5.png"]
    assert [(row[0], row[1]) for row in described(scan)] == [
        ("2.png", 8),
        ("3.png", 8),
        ("4.png", 9),
        ("5.png", 8),
    ]
    (tmp_path / record_path(tmp_path)).unlink()
    assert described(scan_folder(tmp_path)) == described(scan)


def test_an_image_that_changed_a_moment_before_the_scan_is_inspected_again(tmp_path, inspected):
    image = write(tmp_path / "1.png", 1)
    first = scan_folder(tmp_path)
    status = image.stat()
    write(image, 2)
    assert image.stat().st_size == status.st_size
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert described(scan_folder(tmp_path)) != described(first)
    assert inspected == ["1.png", "1.png"]


def test_a_change_without_a_change_of_size_and_time_is_noticed_by_verify_alone(tmp_path):
    image = write_old(tmp_path / "1.png", 1)
    first = described(scan_folder(tmp_path))
    write_old(image, 2)
    assert described(scan_folder(tmp_path)) == first
    verified = described(scan_folder(tmp_path, verify=True))
    assert verified != first
    assert described(scan_folder(tmp_path)) == verified


@pytest.mark.parametrize("link", ["x.png", "sub"])
def test_a_link_that_leads_elsewhere_is_inspected_again(tmp_path, inspected, link):
    for name, colour in (("a", 1), ("b", 2)):
        write_old(tmp_path / name / "x.png", colour)
    data = tmp_path / "data"
    data.mkdir()
    target = "x.png" if link == "x.png" else "."
    (data / link).symlink_to(tmp_path / "a" / target)
    first = described(scan_folder(data))
    (data / link).unlink()
    (data / link).symlink_to(tmp_path / "b" / target)
    assert described(scan_folder(data)) != first
    assert inspected == ["x.png", "x.png"]


def test_a_folder_that_is_moved_with_its_links_keeps_its_record(tmp_path, inspected):
    write_old(tmp_path / "old/a/x.png")
    (tmp_path / "old/b").symlink_to("a")
    scan_folder(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    scan_folder(tmp_path / "new")
    assert inspected == ["x.png", "x.png"]  # by its two names, once each


def test_an_unreadable_image_is_recorded_and_tried_again(tmp_path, inspected):
    (tmp_path / "1.png").write_text("no image")
    os.utime(tmp_path / "1.png", OLD)
    reasons = {0: "it is no image of a known format"}
    assert scan_folder(tmp_path).reasons == reasons
    record = record_path(tmp_path)
    assert not record.exists()  # there is nothing to save
    write_old(tmp_path / "2.png")
    assert scan_folder(tmp_path).reasons == reasons
    before = record.stat().st_mtime_ns
    inspected.clear()
    assert scan_folder(tmp_path).reasons == reasons
    assert inspected == ["1.png"]
    assert record.stat().st_mtime_ns == before  # nothing new to record
    write_old(tmp_path / "1.png")
    assert scan_folder(tmp_path).reasons == {}


def damage(path: Path, kind: str) -> None:
    """Make a file of no use as a record, in one of several ways."""
    tensors, _ = read_weights_and_metadata(path)
    changed = {
        "columns of another length": {"width": tensors["width"][:1]},
        "names beyond their data": {"name.ends": tensors["name.ends"] + 9},
        "names that go backwards": {"name.ends": tensors["name.ends"].flip(0)},
        "modes without names": {"mode": tensors["mode"] + 9},
        "another type": {"sha256": tensors["sha256"].float()},
        "reasons without images": {"unreadable": torch.tensor([0])},
    }
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "a pickle":
        path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    elif kind == "a huge header":
        path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    elif kind == "a missing column":
        write_weights(path, {"width": tensors["width"]}, version=scan_module.VERSION)
    else:
        write_weights(path, tensors | changed[kind], version=scan_module.VERSION)


@pytest.mark.parametrize(
    "kind",
    [
        "torn",
        "a pickle",
        "a huge header",
        "a missing column",
        "columns of another length",
        "names beyond their data",
        "names that go backwards",
        "modes without names",
        "another type",
        "reasons without images",
    ],
)
def test_a_damaged_record_is_made_again_with_a_message(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    for name in ("1.png", "22.png"):
        write_old(tmp_path / "data" / name)
    first = described(scan_folder("data"))
    damage(record_path("data"), kind)
    assert described(scan_folder("data")) == first
    message = capsys.readouterr().err
    assert "is no record of a scan" in message
    assert "the images are scanned again" in message
    assert described(scan_folder("data")) == first
    assert capsys.readouterr().err == ""
    assert sorted(os.listdir()) == ["data"]


def test_the_record_of_a_folder_that_cannot_be_written_is_in_the_cache(
    tmp_path, monkeypatch, inspected
):
    data = write_old(tmp_path / "data/1.png").parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    may_write = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != data and may_write(path, mode))
    assert record_path(data).parent == tmp_path / "cache/diffcore/scans"
    scan_folder(data)
    scan_folder(data)
    assert inspected == ["1.png"]
    assert os.listdir(data) == ["1.png"]
    assert len(os.listdir(tmp_path / "cache/diffcore/scans")) == 1


def test_the_record_beside_the_data_is_read_by_those_who_cannot_write_it(
    tmp_path, monkeypatch, inspected
):
    data = write_old(tmp_path / "data/1.png").parent
    scan_folder(data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    scan_folder(data)
    assert inspected == ["1.png"]


def test_a_scan_that_cannot_be_recorded_is_reported_and_used(tmp_path, monkeypatch, capsys):
    write_old(tmp_path / "data/1.png")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert len(scan_folder(tmp_path / "data").readable) == 1
    assert "the scan cannot be recorded, and is made again next time" in capsys.readouterr().err


def test_an_interrupted_scan_keeps_what_it_has_inspected(tmp_path, monkeypatch, inspected):
    for number in range(130):
        write_old(tmp_path / f"{number:03}.png")

    def interrupt(path):
        if path.endswith("100.png"):
            raise KeyboardInterrupt
        return counted(path)

    counted = image_inspection.inspect_image
    with monkeypatch.context() as patch:
        patch.setattr(image_inspection, "inspect_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scan_folder(tmp_path)
    inspected.clear()
    assert len(scan_folder(tmp_path).readable) == 130
    assert inspected == [f"{number:03}.png" for number in range(64, 130)]  # all but whole chunks


def test_many_images_are_inspected_by_several_interpreters(tmp_path, inspected, monkeypatch):
    monkeypatch.setattr(image_inspection, "PARALLEL", 4)
    monkeypatch.setattr(image_inspection, "CHUNK", 1)
    monkeypatch.setattr(image_inspection, "_processors", lambda: 2)
    names = ["1.png", "2.png", "ü.png", os.fsdecode(b"caf\xe9.png"), "5.png"]
    try:
        for number, name in enumerate(names):
            write_old(tmp_path / name, number)
    except OSError:
        pytest.skip("the file system accepts UTF-8 only")
    (tmp_path / "6.png").write_text("no image")
    scan = scan_folder(tmp_path)
    assert inspected == []  # in this process
    monkeypatch.undo()
    record_path(tmp_path).unlink()
    assert (described(scan), scan.reasons) == (
        described(scan_folder(tmp_path)),
        {3: "it is no image of a known format"},
    )


def test_a_decoder_that_crashes_is_an_error_that_names_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(image_inspection, "PARALLEL", 4)
    monkeypatch.setattr(image_inspection, "_processors", lambda: 2)
    monkeypatch.setattr(image_inspection, "SERVER", "import os; input(); os.abort()")
    for number in range(5):
        write_old(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"ended with status -6 at .*0.png' to '.*4.png'"):
        scan_folder(tmp_path)


def _scan_and_count(folder: str, barrier, counts) -> None:
    barrier.wait()
    original, seen = image_inspection.inspect_image, []
    image_inspection.inspect_image = lambda path: (
        seen.append(path),
        time.sleep(0.05),
        original(path),
    )[2]
    scan_folder(folder)
    counts.put(len(seen))


def test_of_several_ranks_one_inspects_the_images(tmp_path):
    for number in range(6):
        write_old(tmp_path / f"{number}.png")
    context = multiprocessing.get_context("forkserver")
    barrier, counts = context.Barrier(2), context.SimpleQueue()
    ranks = [
        context.Process(target=_scan_and_count, args=(str(tmp_path), barrier, counts))
        for _ in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(counts.get() for _ in ranks) == [0, 6]
    assert sorted(os.listdir(tmp_path))[0] == ".diffcore-scan.safetensors"
    assert len(os.listdir(tmp_path)) == 7  # the lock is gone


def test_the_interpreters_of_a_scan_do_not_import_torch(tmp_path):
    write_old(tmp_path / "1.png")
    script = (
        "import sys; from diffcore.io.images.inspection import serve; serve(sys.stdin, sys.stdout);"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([str(tmp_path / "1.png")]) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout)[0][:4] == [8, 8, "L", True]


def test_packed_texts_are_the_texts():
    texts = ["a", "", "ü/b.png", os.fsdecode(b"caf\xe9"), "e" * 300]
    packed = PackedTexts.pack(texts)
    assert list(packed) == texts == [packed[index] for index in range(5)] == packed[:]
    assert packed[-1] == texts[-1]
    assert packed.equals(PackedTexts.pack(texts))
    assert not packed.equals(PackedTexts.pack(["a", "ü", *texts[2:]]))
    assert PackedTexts.pack(["ab", "c"]).sha256 != PackedTexts.pack(["a", "bc"]).sha256
    assert list(PackedTexts.pack([])) == []
    with pytest.raises(IndexError):
        packed[5]


def test_files_are_listed_by_name_with_their_sizes(tmp_path):
    for name in ("b/1.png", "a/10.png", "a-b/1.PNG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    assert find_files(tmp_path) == ["a-b/1.PNG", "a/10.png", "b/1.png", "notes.txt"]
    files = list_files(tmp_path, (".png",))
    assert dict(zip(files.names, files.bytes.tolist(), strict=True)) == {
        "a-b/1.PNG": 9,
        "a/10.png": 8,
        "b/1.png": 7,
    }


def test_the_start_of_a_run_lists_a_folder_once(tmp_path, monkeypatch):
    write(tmp_path / "cat/1.png")
    listed = []
    list_files = scan_module.list_files
    monkeypatch.setattr(
        scan_module, "list_files", lambda *given: listed.append(given) or list_files(*given)
    )
    with shared_scans():
        first = scan_folder(tmp_path)
        assert scan_folder(str(tmp_path) + "/../" + tmp_path.name) is first
        assert len(listed) == 1
        assert scan_folder(tmp_path, verify=True) is not first
    write(tmp_path / "cat/2.png")
    assert len(scan_folder(tmp_path)) == 2
    assert len(listed) == 3
