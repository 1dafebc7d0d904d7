"""The search of the built documentation in headless Chromium, which `make docs` runs."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.helpers.browser import find_browser, open_browser

SITE = Path(__file__).parents[2] / "build/site"
RESULTS = "[...document.querySelectorAll('.md-search-result__item a')].map(x => x.pathname).join()"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SITE / "index.html").is_file() or find_browser() is None,
        reason="needs a site built by `make docs`, and Chromium",
    ),
]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Print no line for each request."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The first page of the site, served on the loopback address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with open_browser(tmp_path_factory.mktemp("browser")) as browser:
            browser.open(f"http://127.0.0.1:{server.server_port}/")
            browser.wait_for("document.readyState === 'complete'")
            yield browser
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("resume a run", "/how-to/resume/"),
        ("own images", "/how-to/own-images/"),
        ("MinSNR", "/reference/objectives/"),
        ("distil", "/tutorials/few-step/"),
    ],
)
def test_a_query_finds_its_page(page, query, expected):
    box = "document.querySelector('.md-search__input')"
    page.evaluate("document.querySelector('#__search').checked = true")
    page.evaluate(f"{box}.value = ''; {box}.focus()")
    page.call("Input.insertText", text=query)
    page.press("End", 35)  # the search listens to keys
    assert page.wait_for(f"{RESULTS}.split(',').includes('{expected}') && {RESULTS}", 15)


def test_the_site_requests_nothing_from_other_machines(page):
    hosts = {urlsplit(url).hostname for url in page.requests if not url.startswith("data:")}
    assert hosts <= {"127.0.0.1", None}
    assert len(page.requests) > 3
