"""Requests of programs over HTTP: limits and validation."""

import http.client
import itertools
import json
import os
import re
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.demo.serving import SLOW, server, start_demo
from tests.demo.serving import folder as folder

pytest.importorskip("uvicorn", reason="uvicorn is not installed")


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    allowed = ("--allowed_hosts", "demo.example, other.example")
    with server(folder, "-m", "gptforge", "demo", "run", *allowed) as address:
        yield address


def send(address: str, method: str, path: str, body: object = None, **headers: str):
    """Status and body of the response."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(
        method, path, body=data, headers={"content-type": "application/json"} | headers
    )
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_the_server_with_the_exit_code_of_all_commands(
    folder, number, code, message
) -> None:
    process = start_demo(folder)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (code, f"{message}\n")


def complete(address: str, **fields: object):
    status, text = send(address, "POST", "/v1/completions", fields)
    return status, json.loads(text)


def test_the_size_of_a_chunked_body_is_limited(address) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", "10")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        for _ in range(1000):
            connection.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            sent += 10_000
    except OSError:
        pass
    else:
        pytest.fail(f"{sent:,} bytes were accepted")
    assert sent < 5_000_000


def test_a_small_chunked_body_is_accepted(address) -> None:
    body = iter([b'{"prompt": "RO', b'MEO:", "max_tokens": 3}'])
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    connection.request("POST", "/v1/completions", body=body, encode_chunked=True)
    assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "", "[::1"]
)
@pytest.mark.parametrize("path", ["/", "/run.json", "/v1/models"])
def test_dns_rebinding_is_refused(address, host, path) -> None:
    assert send(address, "GET", path, host=host)[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "[::1]:7860", "192.168.1.7"])
def test_names_and_addresses_of_this_machine_are_allowed(address, host) -> None:
    assert send(address, "GET", "/v1/models", host=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example", "http://[::1"]
)
def test_cross_origin_requests_are_refused(address, origin) -> None:
    assert send(address, "POST", "/v1/completions", {"prompt": "R"}, origin=origin)[0] == 403


@pytest.mark.parametrize("path", ["/", "/run.json", "/upload"])
def test_other_paths_take_no_requests(address, path) -> None:
    assert send(address, "POST", path, {"data": []})[0] in (404, 405)


@pytest.mark.parametrize("path", ["/../launch.py", "/%2e%2e/launch.py", "/nothing.js"])
def test_only_files_of_the_page_are_served(address, path) -> None:
    assert send(address, "GET", path)[0] == 404


def test_a_large_body_is_refused(address) -> None:
    assert send(address, "POST", "/v1/completions", b"x" * 70_000)[0] == 413


def test_the_run_is_sent_again_only_when_it_has_changed(address, folder) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    etags = []
    for _ in range(3):
        connection.request("GET", "/run.json", headers={"if-none-match": (etags or [""])[-1]})
        response = connection.getresponse()
        content = response.read()
        etags.append(response.getheader("etag"))
        assert response.status == (304 if etags[:-1] == etags[-1:] else 200)
        if len(etags) == 2:
            # As a resume with more steps does.
            config = folder / "run" / "config.toml"
            text = re.sub(r"max_steps = \d+", "max_steps = 77", config.read_text())
            config.write_text(text)
            with (folder / "run" / "metrics.jsonl").open("a") as file:
                file.write("\n")
    assert etags[0] == etags[1] != etags[2]
    run = json.loads(content)
    assert run["tiles"][0][2] == "of 77"
    # The text has one speaker, so it has no dialogue.
    assert run["prompts"] == ["But soft, what light"]
    assert [name for name, _ in run["checkpoints"]] == [
        "best",
        "last",
        "step-000010",
        "step-000001",
    ]


def test_a_completion_has_openais_format(address) -> None:
    status, response = complete(address, prompt="ROMEO:", max_tokens=7, seed=1, temperature=0.7)
    assert status == 200
    (choice,) = response["choices"]
    assert (response["object"], choice["index"], choice["finish_reason"]) == (
        "text_completion", 0, "length",
    )  # fmt: skip
    assert len(choice["text"]) == 7
    assert response["usage"] == {"prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13}
    again = complete(address, prompt="ROMEO:", max_tokens=7, seed=1, temperature=0.7)[1]
    assert again["choices"] == response["choices"]


def test_choices_are_in_the_order_of_the_prompts(address) -> None:
    response = complete(address, prompt=["ROMEO", "But"], n=2, max_tokens=4, seed=3)[1]
    assert [choice["index"] for choice in response["choices"]] == [0, 1, 2, 3]
    single = complete(address, prompt="But", max_tokens=4, seed=3)[1]["choices"][0]
    assert response["choices"][2]["text"] == single["text"]
    # As in OpenAI's API, a prompt counts once, whatever `n` is.
    assert response["usage"] == {"prompt_tokens": 8, "completion_tokens": 16, "total_tokens": 24}


def test_a_stop_string_ends_a_completion(address) -> None:
    full = complete(address, prompt="ROMEO:", max_tokens=60, seed=1)[1]["choices"][0]["text"]
    stop = full[10:12]
    choice = complete(address, prompt="ROMEO:", max_tokens=60, seed=1, stop=stop)[1]["choices"][0]
    assert choice["text"] == full[: full.find(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_stream_adds_up_to_the_completion(address) -> None:
    fields = {"prompt": "ROMEO:", "max_tokens": 9, "seed": 2}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    completion = complete(address, **fields)[1]
    text = send(address, "POST", "/v1/completions", fields | options)[1]
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert (
        "".join(c["text"] for e in events for c in e["choices"]) == completion["choices"][0]["text"]
    )
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"] == completion["usage"]


def test_log_probabilities_have_openais_format(address) -> None:
    fields = {"prompt": ["But", "RO"], "max_tokens": 9, "seed": 2, "logprobs": 3}
    first, second = complete(address, **fields)[1]["choices"]
    for choice, start in ((first, 3), (second, 2)):
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["text_offset"] == list(range(start, start + 9))
        assert all(len(top) == 3 for top in logprobs["top_logprobs"])
        for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            assert value <= max(top.values()) <= 0
            assert list(top.values()) == sorted(top.values(), reverse=True)
    # A stream has the same, in chunks.
    text = send(address, "POST", "/v1/completions", fields | {"stream": True})[1]
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line[:7] == "data: {"]
    chunks = [choice for line in lines for choice in json.loads(line)["choices"]]
    for name, values in first["logprobs"].items():
        parts = [choice["logprobs"][name] for choice in chunks if choice["index"] == 0]
        assert list(itertools.chain(*parts)) == values


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": 5}, "prompt:"),
        ({"prompt": []}, "prompt:"),
        ({"prompt": [[1, 2]]}, "prompt:"),
        ({"prompt": "x" * 4001}, "at most 4,000 characters"),
        ({"prompt": "\ud800"}, "not UTF-8"),
        ({"max_tokens": 0}, "max_tokens:"),
        ({"max_tokens": True}, "max_tokens:"),
        ({"max_tokens": 10**9}, "max_tokens:"),
        ({"temperature": float("nan")}, "temperature:"),
        ({"temperature": "hot"}, "temperature:"),
        ({"top_p": 0}, "top_p:"),
        ({"n": 9}, "n:"),
        ({"stop": ["a"] * 5}, "stop:"),
        ({"seed": -1}, "seed:"),
        ({"model": "gpt-4"}, "gpt-4"),
        ({"model": 4}, "model:"),
        ({"logprobs": 6}, "logprobs:"),
        ({"echo": True}, "echo is not supported"),
        ({"stream": "yes"}, "stream:"),
        ({"messages": []}, "messages:"),
    ],
)
def test_an_invalid_completion_request_is_refused(address, fields, words) -> None:
    status, response = complete(address, **({"prompt": "R"} | fields))
    assert status == 400
    assert words in response["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 50_000, b'{"\\ud800": 1}'])
def test_a_body_that_is_not_an_object_of_fields_is_refused(address, body) -> None:
    status, text = send(address, "POST", "/v1/completions", body)
    assert status == 400
    assert "error" in json.loads(text)


def test_openais_client(address) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert "best" in [model.id for model in client.models.list()]
    response = client.completions.create(model="best", prompt="ROMEO:", max_tokens=5, seed=1)
    chunks = client.completions.create(
        model="best", prompt="ROMEO:", max_tokens=5, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == response.choices[0].text
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="best", prompt="R", max_tokens=-1)


@pytest.mark.parametrize("host", ["demo.example", "other.example"])
def test_allowed_hosts(address, host) -> None:
    assert send(address, "GET", "/v1/models", host=host)[0] == 200


def request_long_text(address: str, *, stream: bool) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    body = {"prompt": ["ROMEO:"] * 8, "max_tokens": 1000, "stream": stream}
    connection.request("POST", "/v1/completions", body=json.dumps(body).encode())
    return connection


def test_texts_of_disconnected_clients_are_not_generated(folder) -> None:
    with server(folder, "-c", SLOW, "24") as address:
        for stream in (True, False) * 5:
            request_long_text(address, stream=stream).close()
        # The first of them alone would have taken longer than this waits for its turn.
        assert complete(address, prompt="ROMEO:", max_tokens=10)[0] == 200


def test_the_server_ends_while_it_generates(folder) -> None:
    with server(folder, "-c", SLOW, "24") as address:
        connections = [request_long_text(address, stream=True) for _ in range(4)]
        assert connections[0].getresponse().read(10)
