"""The check of the built documentation finds missing names, requests and unresolved links."""

import check_site
import pytest

PAGE = '<h2 id="diffcore.core.noise.Noise"></h2><h2 id="diffcore.core.noise"></h2>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/core.html").write_text(PAGE)
    (tmp_path / "index.html").write_text('<a href="https://example.org">link</a><code>a][b</code>')
    (tmp_path / "site.css").write_text("a { background: url(data:x) }")
    return tmp_path


def test_a_complete_site_has_no_defects(site):
    names = ["diffcore.core.noise.Noise", "diffcore.Noise"]
    assert list(check_site.missing_names(site, names)) == []
    assert list(check_site.defects(site)) == []


def test_a_name_without_an_entry_is_found(site):
    (line,) = check_site.missing_names(site, ["diffcore.core.noise.Other"])
    assert line == "diffcore.core.noise.Other is in no page of the reference"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.html", '<script src="https://cdn.example.org/x.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//fonts.example.org/css">'),
        ("a.html", "<p>see [here][there]</p>"),
        ("a.css", "@import 'https://fonts.example.org/css';"),
    ],
)
def test_a_request_or_an_unresolved_link_is_found(site, file, text):
    (site / file).write_text(text)
    (line,) = check_site.defects(site)
    assert line.startswith(file)
