"""`diffcore serve`: samples over HTTP, and a clear response to each bad request."""

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import load

from diffcore.cli.commands.serve import listen
from diffcore.cli.image_model import ImageModel
from diffcore.cli.serving.application import ServedModel, create_application
from diffcore.cli.serving.messages import RequestDefaults
from diffcore.core.denoiser import Denoiser
from diffcore.guidance import CFG
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Trailing
from diffcore.serving import SamplingLimits, SamplingService
from tests.helpers.oracles import process, unet

NETWORK = Denoiser(unet(), process(shape=(1, 8, 8), low=-1.0, high=1.0)).eval()
DEFAULTS = RequestDefaults(DDIM(), Trailing(), 2, CFG(1.0))
LIMITS = SamplingLimits(samples=8, steps=100, evaluations=300, queue=16)
OK = {"seeds": [1], "labels": [0]}


class Reply:
    """A response: status, body and headers."""

    def __init__(self, status, body, headers):
        self.status, self.body, self.headers = status, body, headers

    @property
    def data(self):
        return json.loads(self.body)


class Server:
    """A running service, and its address."""

    def __init__(self, url, service):
        self.url, self.service = url, service

    def send(self, path, body=None, **headers):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | headers if data is not None else headers
        try:
            with urlopen(Request(self.url + path, data, given), timeout=60) as reply:
                return Reply(reply.status, reply.read(), reply.headers)
        except HTTPError as error:
            with error:
                return Reply(error.code, error.read(), error.headers)

    def generate(self, **fields):
        return self.send("/generate", OK | fields)


@pytest.fixture(scope="module")
def server():
    listener = listen("127.0.0.1", 0)
    with listener, SamplingService(NETWORK, 4, LIMITS) as service:
        application = create_application(
            ServedModel("tiny", ImageModel(NETWORK), service, DEFAULTS, 60.0)
        )
        config = uvicorn.Config(application, log_level="error", lifespan="off", ws="none")
        web = uvicorn.Server(config)
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        web.should_exit = True
        thread.join()


def expected(seeds, labels, steps=2, guidance=CFG(1.0)):
    return sample(
        NETWORK,
        DDIM(),
        Trailing(),
        steps,
        seeds=seeds,
        condition=labels,
        guidance=guidance,
        batch_size=1,
        micro_batch=4,
    ).x


def test_health_describes_the_model(server):
    data = server.send("/health").data
    assert data["status"] == "ok"
    assert (data["model"], data["shape"], data["classes"]) == ("tiny", [1, 8, 8], 2)
    assert data["limits"]["samples"] == 8
    assert data["defaults"]["steps"] == "2"


def test_arrays_are_the_samples_of_the_request(server):
    reply = server.generate(
        seeds=[5, 6], labels=[1, 0], steps=3, guidance="CFG(2)", format="safetensors"
    )
    tensors = load(reply.body)
    torch.testing.assert_close(tensors["x"], expected([5, 6], [1, 0], 3, CFG(2.0)))
    assert tensors["seed"].tolist() == [5, 6]
    assert tensors["label"].tolist() == [1, 0]
    assert reply.headers["X-Evaluations"] == "6"
    spec = {"class_path": "CFG", "init_args": {"scale": 2}}
    again = server.generate(seeds=[5, 6], labels=[1, 0], steps=3, guidance=spec, format="npy")
    assert np.array_equal(np.load(BytesIO(again.body)), tensors["x"])


def test_one_sample_is_a_picture_and_several_are_a_sheet(server):
    picture = Image.open(BytesIO(server.generate().body))
    assert picture.size == (8, 8)
    reply = server.generate(seeds=[1, 2, 3], labels=[0, 1, 0])
    assert reply.headers["Content-Type"] == "image/png"
    assert Image.open(BytesIO(reply.body)).width > 3 * 40
    data = server.generate(seeds=[1, 2], labels=[0, 1], format="json").data
    assert data["seeds"] == [1, 2]
    first = Image.open(BytesIO(base64.b64decode(data["samples"][0])))
    assert first.tobytes() == picture.tobytes()


BAD = {
    "no JSON": b"{",
    "no object": b"[1]",
    "not UTF-8": b"\xff\xfe",
    "no seeds": {"labels": [0]},
    "empty seeds": OK | {"seeds": [], "labels": []},
    "seeds of text": OK | {"seeds": ["1"]},
    "fractional seed": OK | {"seeds": [1.5]},
    "seed beyond 64 bits": OK | {"seeds": [2**63]},
    "too many seeds": {"seeds": [1] * 9},
    "label out of range": OK | {"labels": [3]},
    "negative label": OK | {"labels": [-1]},
    "wrong number of labels": OK | {"labels": [0, 1]},
    "unknown field": OK | {"step": 3},
    "no steps": OK | {"steps": 0},
    "too many steps": OK | {"steps": 101},
    "true for a number": OK | {"steps": True},
    "too many evaluations": OK | {"steps": 100, "sampler": "RungeKutta(4)"},
    "unknown sampler": OK | {"sampler": "Euler2()"},
    "sampler of another kind": OK | {"sampler": "CFG(2)"},
    "refused option": OK | {"sampler": "DDIM(eta=-1)"},
    "unknown option": OK | {"sampler": "DDIM(et=1)"},
    "repetitions": OK | {"sampler": "Restart(DDIM(), ((0.1, 0.5, 2, 1000000000),))"},
    "code": OK | {"sampler": "__import__('os').system('true')"},
    "foreign class": OK | {"guidance": {"class_path": "os.system", "init_args": {}}},
    "file": OK | {"guidance": "/etc/passwd"},
    "network of a folder": OK | {"guidance": "AutoGuidance(2.0, '/etc')"},
    "function": OK | {"guidance": {"class_path": "CFG", "init_args": {"scale": "os.getcwd"}}},
    "infinite scale": OK | {"guidance": "CFG(inf)"},
    "guidance without a condition": {"seeds": [1], "guidance": "CFG(2)"},
    "nested": OK | {"guidance": "Interval(" * 90 + "CFG(2)" + ")" * 90},
    "long text": OK | {"guidance": "CFG(" + "1" * 1000 + ")"},
    "unknown format": OK | {"format": "gif"},
    "no time": OK | {"timeout": 0},
    "layers that are not there": OK | {"guidance": "CFG(2, SkippedLayers(('x',)))"},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_clear_422(server, name):
    reply = server.send("/generate", BAD[name])
    assert reply.status == 422, reply.body
    message = reply.data["error"]
    assert 10 < len(message) < 1000
    assert "Traceback" not in message


def test_other_mistakes_have_statuses_of_their_own(server):
    assert server.send("/generate", OK, **{"Content-Type": "text/plain"}).status == 415
    assert server.send("/generate", b" " * (2**16 + 1)).status == 413
    assert server.send("/generate").status == 405
    assert server.send("/nothing").status == 404
    assert "error" in server.send("/nothing").data
    assert server.generate(timeout=1e-9, steps=50).status == 504


def test_requests_beyond_the_queue_are_sent_away_until_later(server):
    slow = {"seeds": list(range(8)), "labels": [0] * 8, "steps": 15}
    with ThreadPoolExecutor(5) as pool:
        replies = list(pool.map(lambda _: server.send("/generate", slow), range(5)))
    statuses = {reply.status for reply in replies}
    assert statuses == {200, 503}
    refused = next(reply for reply in replies if reply.status == 503)
    assert refused.headers["Retry-After"] == "1"
    assert server.generate().status == 200


def test_bad_requests_among_good_ones_change_nothing_else(server):
    before = server.generate(seeds=[7, 8], labels=[0, 1], format="npy").body
    bodies = [OK | {"seeds": [7, 8], "labels": [0, 1], "format": "npy"}, *BAD.values()]
    order = [bodies[0] if i % 4 == 0 else bodies[1 + i % len(BAD)] for i in range(40)]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda body: server.send("/generate", body), order))
    for body, reply in zip(order, replies, strict=True):
        if body is bodies[0]:
            assert reply.body == before
        else:
            assert reply.status == 422


def test_metrics_count_the_requests(server):
    before = server.service.counters.values({})['requests_total{outcome="completed"}']
    server.generate()
    reply = server.send("/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain")
    line = f'diffcore_requests_total{{outcome="completed"}} {before + 1}'
    assert line in reply.body.decode().splitlines()


def test_the_command_serves_the_run_on_loopback(diffcore, trained, monkeypatch):
    served = []

    def answer(self, sockets):
        served.append((self.config.app, sockets[0].getsockname()[0]))

    monkeypatch.setattr(uvicorn.Server, "run", answer)
    ended = diffcore("serve", trained, "--port=0", "--rows=4", "--limits.samples=3")
    assert ended.status == 0, ended.err
    assert f"serving {trained} at http://127.0.0.1:" in ended.out
    application, host = served[0]
    assert host == "127.0.0.1"
    assert {"/generate", "/health", "/metrics"} <= {route.path for route in application.routes}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port=70000"], "port is 70000"),
        (["--timeout=0"], "timeout is 0"),
        (["--rows=0"], "rows is 0"),
        (["--limits.queue=0"], "limit of queue is 0"),
        (["--host=192.0.2.1", "--port=0"], "cannot listen on port 0 of 192.0.2.1"),
    ],
)
def test_bad_options_are_one_line(diffcore, trained, words, message):
    ended = diffcore("serve", trained, *words)
    assert ended.status in (1, 2)
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_port_in_use_is_named():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}"):
            listen("127.0.0.1", port)
