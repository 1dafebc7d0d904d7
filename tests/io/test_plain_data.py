"""Files of plain data: their size is bounded, and an error is one line with the file's name."""

import json

import pytest
import yaml

from diffcore.core.process import Process
from diffcore.io.plain_data import MAXIMUM_BYTES, read_json, read_yaml
from diffcore.training.reports.metrics import Metrics

READERS = {"x.json": read_json, "x.yaml": read_yaml}
TABLE = {"a": [1, {"b": None}], "ü": ".inf"}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_reads_back(tmp_path, encoding):
    json_file = write(tmp_path, "x.json", json.dumps(TABLE).encode(encoding))
    yaml_file = write(tmp_path, "x.yaml", yaml.safe_dump(TABLE, allow_unicode=True).encode())
    assert read_json(json_file) == read_yaml(yaml_file) == TABLE


def test_an_alias_of_yaml_stands_for_its_entry(tmp_path):
    path = write(tmp_path, "x.yaml", "a: &first {b: 1}\nc: *first\nd: {<<: *first, e: 2}\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30)
)
HOSTILE = [
    ("x.yaml", ALIASES, "aliases stand for more than 100,000 entries"),
    ("x.yaml", MERGES, "aliases stand for more than 100,000 entries"),
    ("x.yaml", "a: &a [*a]", "nested more than 64 deep"),
    ("x.yaml", "a: " + "[" * 500_000, "is not YAML"),
    ("x.yaml", "a: " + "[" * 100 + "]" * 100, "nested more than 64 deep"),
    ("x.yaml", "a" * 1_100_000, "has 1,100,000 bytes, expected at most 1,048,576"),
    ("x.yaml", "a: !!python/object/apply:os.system [touch pwned]", "is not YAML: could not"),
    ("x.yaml", "a: !!python/name:os.system", "is not YAML: could not"),
    ("x.yaml", "a: [1,", "is not YAML"),
    ("x.yaml", "[1, 2]", "holds a list, expected a table"),
    ("x.yaml", "", "holds null, expected a table"),
    ("x.yaml", "a: " + "9" * 5000, "is not YAML"),
    ("x.yaml", "a: b".encode("utf-16"), "is not UTF-8 text .*: save it as UTF-8"),
    ("x.yaml", "a: b".encode("utf-16-le"), "is not YAML"),
    ("x.json", "{", "is not JSON"),
    ("x.json", "[1]", "holds a list, expected an object"),
    ("x.json", "null", "holds null, expected an object"),
    ("x.json", "{}".encode("utf-16"), "is not UTF-8 text .*: save it as UTF-8"),
    ("x.json", "{}".encode("utf-32-be"), "is not JSON"),
    ("x.json", '{"a": ' + "[" * 1_000_000, "is not JSON"),
    ("x.json", '{"a": ' + "[" * 100 + "]" * 100 + "}", "nested more than 64 deep"),
    ("x.json", '{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ("x.json", " " * (MAXIMUM_BYTES + 1), "expected at most 16,777,216"),
]


@pytest.mark.parametrize(("name", "content", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_table_is_refused_in_one_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=f"{name} {message}|{name} .*{message}") as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_file_that_is_missing_is_named(tmp_path):
    for name, read in READERS.items():
        with pytest.raises(ValueError, match=f"{name} is missing"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "content", ['{"step": 1}\n'.encode("utf-16"), b'{"step": 1}\n\xff\n'], ids=["utf-16", "byte"]
)
def test_metrics_that_are_not_utf8_are_named_and_not_deleted(tmp_path, content):
    path = write(tmp_path, "metrics.jsonl", content)
    with pytest.raises(ValueError, match=r"metrics.jsonl is not UTF-8 text .*: save it as UTF-8"):
        Metrics(path).rewind(1)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}".encode("utf-16")], ids=repr)
def test_a_process_record_that_is_no_object_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"process.json is not a process record: .*process.json"):
        Process.load(write(tmp_path, "process.json", content))
