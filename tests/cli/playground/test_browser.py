"""The page of the playground in headless Chromium; skipped without gradio or a browser.

`apt-get install chromium` brings the browser on Debian.
"""

import os
import re
import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

from diffcore.io.extras import has_extra
from tests.helpers.browser import find_browser, open_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not has_extra("gradio") or find_browser() is None, reason="needs gradio and Chromium"
    ),
]

PICTURE = "[...document.querySelectorAll('#pictures img')].map(x => x.complete && x.src).join()"
CODE = "[...document.querySelectorAll('.cm-content')].map(x => x.innerText).join('\\n')"
ALERT = "document.querySelector('#pictures [role=alert]')?.innerText"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of `diffcore playground` in a browser."""
    command = [sys.executable, "-W", "error", "-m", "diffcore", "playground", "--port=0"]
    # What the user's environment holds for gradio must not open the page to other machines.
    environment = os.environ | {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = server.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line
        with open_browser(tmp_path_factory.mktemp("browser")) as browser:
            browser.open(address[0])
            browser.wait_for(PICTURE)
            browser.server = server
            yield browser
    finally:
        server.send_signal(signal.SIGINT)
        with server:
            assert server.wait(30) == 130


def wait_for_other(page, expression, before):
    """The value of an expression as soon as it differs from an earlier one."""
    end = time.monotonic() + 60
    while (value := page.evaluate(expression)) == before or not value:
        assert time.monotonic() < end, "nothing has changed"
        time.sleep(0.05)
    return value


def test_a_slider_changes_picture_and_commands(page):
    page.wait_for(f"{CODE}.includes('    10,')")  # the picture can be drawn before the code is
    before = page.evaluate(PICTURE)
    page.evaluate("document.querySelector('#steps input[type=range]').focus()")
    page.press("ArrowRight", 39)
    wait_for_other(page, PICTURE, before)
    page.wait_for(f"{CODE}.includes('    11,')")
    assert "--steps 11" in page.evaluate(CODE).replace("\n", " ")
    facts = page.evaluate("document.querySelector('#pictures .facts').innerText")
    assert "22 (22 planned)" in facts


def choose(page, label, text):
    """Type a text into the drop-down list of a label."""
    box = f"document.querySelector('input[aria-label=\"{label}\"]')"
    page.evaluate(f"(box => {{box.focus(); box.select();}})({box})")
    page.call("Input.insertText", text=text)
    page.press("Enter", 13)


def test_a_model_and_a_sampler_are_chosen_from_lists_and_a_wrong_one_is_explained(page):
    before = page.evaluate(PICTURE)
    choose(page, "model", "points")
    before = wait_for_other(page, PICTURE, before)
    page.wait_for(f"{CODE}.includes('plane_distribution(\\'points\\'')")
    choose(page, "sampler", "Heun()")
    wait_for_other(page, PICTURE, before)
    choose(page, "sampler", "Hoin()")
    assert "Hoin" in str(page.wait_for(ALERT))
    choose(page, "sampler", "DDIM()")
    page.wait_for(PICTURE)


def test_the_browser_requests_nothing_from_other_machines(page):
    hosts = {urlsplit(url).hostname for url in page.requests if not url.startswith("data:")}
    assert hosts <= {"127.0.0.1", None}
    assert len(page.requests) > 5


def test_the_page_is_served_on_the_loopback_address_alone(page):
    with open(f"/proc/{page.server.pid}/net/tcp", encoding="ascii") as table:
        lines = [line.split() for line in table.readlines()[1:]]
    inodes = set()
    for name in os.listdir(f"/proc/{page.server.pid}/fd"):
        try:
            target = os.readlink(f"/proc/{page.server.pid}/fd/{name}")
        except OSError:
            continue
        inodes |= set(re.findall(r"^socket:\[(\d+)\]$", target))
    listening = [fields[1] for fields in lines if fields[3] == "0A" and fields[9] in inodes]
    assert listening
    assert all(address.startswith("0100007F:") for address in listening)
