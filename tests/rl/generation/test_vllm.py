"""The server's protocol, spoken over real HTTP by a small server in this process."""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moekit.rl.generation import vllm
from moekit.rl.generation.generator import Generator, SampleRequest
from moekit.rl.generation.settings import SamplingSettings
from moekit.rl.generation.vllm import VllmEngine, VllmGenerator, VllmServer

from .models import model_of

SETTINGS = SamplingSettings(max_new_tokens=5, top_p=0.9, top_k=4, min_p=0.1, stop=("END",))
REQUESTS = [
    SampleRequest(prompt_ids=(7, 8), num_samples=3, seed=11),
    SampleRequest(prompt_ids=(9,), num_samples=1, seed=12),
]


def answer(body: dict) -> dict:
    """Says the seed, the number of the sample and the prompt's length; choices in the wrong order."""
    choices = [
        {
            "index": index,
            "text": "",
            "token_ids": [body["seed"], index, len(body["prompt"])],
            "logprobs": {"token_logprobs": [-1.0, -2.0, -0.5 * index]},
            "finish_reason": "length" if index == 1 else "stop",
        }
        for index in range(body["n"])
    ]
    return {"choices": choices[::-1]}


@contextmanager
def serving(reply=answer, status: int = 200):
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, body))
            said = reply(body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", received
        finally:
            server.shutdown()
            thread.join()


def generate(url: str, settings=SETTINGS, **options):
    return VllmGenerator(VllmServer(url, "policy", timeout=5.0, **options)).generate(REQUESTS, settings)


def test_samples_come_in_order_with_their_logprobs():
    with serving() as (url, received):
        groups = generate(url)
    assert [[sample.ids for sample in group] for group in groups] == [
        [(11, 0, 2), (11, 1, 2), (11, 2, 2)],
        [(12, 0, 1)],
    ]
    assert [sample.is_finished for sample in groups[0]] == [True, False, True]
    torch.testing.assert_close(groups[0][2].logprobs, torch.tensor([-1.0, -2.0, -1.0]))
    path, body = min(received, key=lambda pair: pair[1]["seed"])
    assert path == "/v1/completions"
    wanted = {"model": "policy", "prompt": [7, 8], "n": 3, "seed": 11, "max_tokens": 5, "temperature": 1.0}
    wanted |= {"top_p": 0.9, "top_k": 4, "min_p": 0.1, "stop": ["END"], "logprobs": 0}
    wanted |= {"return_token_ids": True, "skip_special_tokens": False}
    assert body == wanted


def test_greedy_is_temperature_zero():
    with serving() as (url, received):
        generate(url, SamplingSettings(max_new_tokens=3, greedy=True))
    assert {body["temperature"] for _, body in received} == {0.0}


def edited(change):
    def reply(body):
        said = answer(body)
        change(said)
        return said

    return reply


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda said: said["choices"].append(said["choices"][0]), r"returned \d choices for n="),
        (lambda said: said.pop("choices"), "returned no choices"),
        (lambda said: said["choices"][0].pop("token_ids"), "no token_ids"),
        (lambda said: said["choices"][0].update(token_ids=[]), "no token_ids"),
        (lambda said: said["choices"][0].update(logprobs=None), "0 log-probs for 3 tokens"),
        (lambda said: said["choices"][0]["logprobs"]["token_logprobs"].pop(), "2 log-probs for 3 tokens"),
        (
            lambda said: said["choices"][0]["logprobs"].update(token_logprobs=[0.0, float("nan"), 0.0]),
            "not finite",
        ),
        (lambda said: said["choices"][0]["logprobs"].update(token_logprobs=[0.0, None, 0.0]), "not finite"),
        (lambda said: said["choices"][0].update(finish_reason="abort"), "unknown reason, 'abort'"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(change, match):
    with serving(edited(change)) as (url, _), pytest.raises(ValueError, match=match):
        generate(url)


def test_errors_of_the_server_are_passed_on():
    refusal = pytest.raises(ValueError, match=r"refused the request \(404\).*no such model")
    with serving(lambda body: {"message": "no such model"}, 404) as (url, _), refusal:
        generate(url)
    with serving(lambda body: b"<html>") as (url, _), pytest.raises(ValueError, match="not a vLLM server"):
        generate(url)
    with serving(lambda body: []) as (url, _), pytest.raises(ValueError, match="returned no choices"):
        generate(url)


def test_a_server_that_is_down_is_named():
    with serving() as (url, _):
        pass
    with pytest.raises(
        ValueError, match=rf"{url}v1/completions is not a vLLM server .* does `vllm serve` run"
    ):
        generate(url)
    with pytest.raises(ValueError, match="must begin with http"):
        VllmServer("localhost:8000", "policy")


@pytest.mark.parametrize(
    ("mode", "options", "match"),
    [
        ("raw_logprobs", {"temperature": 0.7}, "need 'processed_logprobs'"),
        ("processed_logprobs", {"top_p": 0.5}, "need 'raw_logprobs'"),
        ("processed_logprobs", {"greedy": True}, "need 'raw_logprobs'"),
        ("processed_logprobs", {"temperature": 0.7, "top_k": 3}, "temperature=0.7 with"),
        ("raw_logprobs", {"temperature": 0.7, "greedy": True}, "temperature=0.7 with"),
        ("processed_logprobs", {"temperature": 0.7}, None),
        ("processed_logprobs", {}, None),
        ("raw_logprobs", {}, None),
    ],
)
def test_logprobs_of_another_distribution_are_refused(mode, options, match):
    settings = SamplingSettings(max_new_tokens=3, **options)
    with serving() as (url, received):
        if match is None:
            assert len(generate(url, settings, logprobs_mode=mode)) == 2
            return
        with pytest.raises(ValueError, match=match):
            generate(url, settings, logprobs_mode=mode)
        assert received == []


def test_a_missing_vllm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="pip install 'vllm>="):
        VllmEngine("somewhere")


def output(*ids: int) -> SimpleNamespace:
    logprobs = [{token: SimpleNamespace(logprob=-1.0 - place)} for place, token in enumerate(ids)]
    return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop")


class FakeLLM:
    """What `VllmEngine` calls of ``vllm.LLM``."""

    def __init__(self, **options):
        self.options, self.calls = options, []

    def generate(self, prompts, parameters, use_tqdm):
        pairs = zip((prompt["prompt_token_ids"] for prompt in prompts), parameters, strict=True)
        return [SimpleNamespace(outputs=[output(ids[0], k) for k in range(p["n"])]) for ids, p in pairs]

    def collective_rpc(self, method, kwargs):
        files = sorted(path.name for path in Path(kwargs["weights_path"]).iterdir())
        self.calls.append((method, files))

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache", []))


def engine(monkeypatch) -> VllmEngine:
    fake = SimpleNamespace(LLM=FakeLLM, SamplingParams=dict)
    monkeypatch.setattr(vllm, "import_module", lambda name: fake)
    return VllmEngine("folder", dtype="bfloat16")


def test_the_engine_in_this_process_answers_alike(monkeypatch):
    made = engine(monkeypatch)
    assert made.engine.options == {"model": "folder", "logprobs_mode": "raw_logprobs", "dtype": "bfloat16"}
    generator = VllmGenerator(made)
    assert isinstance(generator, Generator)
    groups = generator.generate(REQUESTS, SETTINGS)
    assert [[sample.ids for sample in group] for group in groups] == [[(7, 0), (7, 1), (7, 2)], [(9, 0)]]
    torch.testing.assert_close(groups[0][1].logprobs, torch.tensor([-1.0, -2.0]))


def test_the_engine_takes_stock_weights_only(monkeypatch):
    made = engine(monkeypatch)
    made.load_weights(model_of("olmoe"))
    assert [name for name, _ in made.engine.calls] == ["reload_weights", "reset_prefix_cache"]
    assert {"config.json", "model.safetensors"} <= set(made.engine.calls[0][1])
    with pytest.raises(ValueError, match="stock models only"):
        made.load_weights(model_of("merged"))
