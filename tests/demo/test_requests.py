"""What programs send to the page, over real HTTP: bounded, checked, and nothing kept."""

import http.client
import json
import time
from collections.abc import Iterator

import pytest

from tests.demo.serving import folder as folder
from tests.demo.serving import server

pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with server(folder, "-m", "gptforge", "demo", "run", "--port", "PORT") as address:
        yield address


def send(address: str, method: str, path: str, body: object = None, **headers: str):
    """Status and body of a request; a header that is None is left out."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(
        method, path, body=data, headers={"content-type": "application/json"} | named
    )
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def complete(address: str, **fields: object):
    status, text = send(address, "POST", "/v1/completions", fields)
    return status, json.loads(text)


def test_a_chunked_body_is_measured_whatever_its_length_says(address) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
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
        pytest.fail(f"{sent:,} bytes were taken")
    assert sent < 5_000_000


def test_a_chunked_body_that_is_small_is_read(address) -> None:
    body = iter([b'{"prompt": "RO', b'MEO:", "max_tokens": 3}'])
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/completions", body=body, encode_chunked=True)
    assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", ""]
)
@pytest.mark.parametrize("path", ["/", "/config", "/v1/models"])
def test_a_rebound_name_is_turned_away(address, host, path) -> None:
    assert send(address, "GET", path, host=host)[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "[::1]:7860", "192.168.1.7"])
def test_this_machines_names_and_addresses_are_served(address, host) -> None:
    assert send(address, "GET", "/v1/models", host=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example"]
)
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/v1/completions"])
def test_another_sites_page_may_not_ask(address, origin, path) -> None:
    assert send(address, "POST", path, {"prompt": "R"}, origin=origin)[0] == 403


@pytest.mark.parametrize(
    "path", ["call/write", "call/false", "run/write", "api/false", "upload", "vibe-edit"]
)
def test_gradios_other_doors_are_shut(address, path) -> None:
    assert send(address, "POST", f"/gradio_api/{path}", {"data": []})[0] == 403


def test_no_endpoint_is_called_false(address) -> None:
    status, text = send(address, "GET", "/gradio_api/info")
    assert status == 200
    assert json.loads(text)["named_endpoints"] == {}
    assert "false" not in json.loads(send(address, "GET", "/config")[1])["title"]


def answer_number(address: str) -> int:
    """Gradio's number of the function behind the button Write."""
    config = json.loads(send(address, "GET", "/config")[1])
    return next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 7)


def ask_the_queue(address: str, data: list, session: str) -> str:
    """All that the queue answers to one request of the page."""
    body = {"fn_index": answer_number(address), "session_hash": session, "data": data}
    raw = json.dumps(body).encode()
    assert send(address, "POST", "/gradio_api/queue/join", raw)[0] == 200
    return send(address, "GET", f"/gradio_api/queue/data?session_hash={session}")[1]


GOOD = ["ROMEO:", "best", 10, 0.8, 0, 1.0, "1"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, None),
        (0, ["x"]),
        (0, {"a": 1}),
        (0, "\ud800"),
        (1, None),
        (1, 7),
        (2, None),
        (2, float("nan")),
        (2, "ten"),
        (3, float("inf")),
        (3, {}),
        (5, None),
        (6, None),
        (6, "1e3"),
        (6, "9" * 6000),
    ],
)
def test_odd_values_never_end_in_a_python_error(address, place, value) -> None:
    data = [*GOOD[:place], value, *GOOD[place + 1 :]]
    said = ask_the_queue(address, data, f"odd{place}{ascii(value)[1:5].strip()!a}".encode().hex())
    for word in ("Traceback", "TypeError", "ValueError", "NoneType", "Internal", "codec"):
        assert word not in said
    assert "process_completed" in said


def test_a_good_request_of_the_page_is_answered(address) -> None:
    said = ask_the_queue(address, GOOD, "good1")
    assert "10 tokens" in said and "seed 1" in said


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"fn_index": null}', b"\xff\xfe"])
def test_odd_bodies_of_the_queue_are_refused(address, body) -> None:
    status, said = send(address, "POST", "/gradio_api/queue/join", body)
    assert status in (400, 422)
    assert "Traceback" not in said


def test_texts_that_nobody_fetches_are_not_written(address) -> None:
    number, before = answer_number(address), time.monotonic()
    for n in range(10):
        data = ["ROMEO:", "best", 1000, 0.8, 0, 1.0, "1"]
        body = {"fn_index": number, "session_hash": f"gone{n}", "data": data}
        assert send(address, "POST", "/gradio_api/queue/join", body)[0] in (200, 503)
    # The queue is free again as soon as it is seen that nobody listens.
    said = ask_the_queue(address, GOOD, "after")
    assert "10 tokens" in said
    # Far from the minute that each of them could have taken.
    assert time.monotonic() - before < 60
    assert "10 tokens" not in send(address, "GET", "/gradio_api/queue/data?session_hash=gone1")[1]


def test_a_completion_has_openais_form(address) -> None:
    status, answer = complete(address, prompt="ROMEO:", max_tokens=7, seed=1, temperature=0.7)
    assert status == 200
    (choice,) = answer["choices"]
    assert (answer["object"], choice["index"], choice["finish_reason"]) == (
        "text_completion", 0, "length",
    )  # fmt: skip
    assert len(choice["text"]) == 7
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13}
    again = complete(address, prompt="ROMEO:", max_tokens=7, seed=1, temperature=0.7)[1]
    assert again["choices"] == answer["choices"]


def test_several_prompts_and_copies_keep_their_order(address) -> None:
    answer = complete(address, prompt=["ROMEO", "But"], n=2, max_tokens=4, seed=3)[1]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    single = complete(address, prompt="But", max_tokens=4, seed=3)[1]["choices"][0]
    assert answer["choices"][2]["text"] == single["text"]


def test_a_stop_text_ends_a_completion(address) -> None:
    whole = complete(address, prompt="ROMEO:", max_tokens=60, seed=1)[1]["choices"][0]["text"]
    stop = whole[10:12]
    choice = complete(address, prompt="ROMEO:", max_tokens=60, seed=1, stop=stop)[1]["choices"][0]
    assert choice["text"] == whole[: whole.find(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_stream_adds_up_to_the_whole(address) -> None:
    fields = {"prompt": "ROMEO:", "max_tokens": 9, "seed": 2}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    whole = complete(address, **fields)[1]
    text = send(address, "POST", "/v1/completions", fields | options)[1]
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert "".join(c["text"] for e in events for c in e["choices"]) == whole["choices"][0]["text"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": 5}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [[1, 2]]}, "prompt must be"),
        ({"prompt": "x" * 4001}, "at most 4,000 characters"),
        ({"prompt": "\ud800"}, "not UTF-8"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"max_tokens": 10**9}, "max_tokens must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"top_p": 0}, "top_p must be"),
        ({"n": 9}, "n must be"),
        ({"stop": ["a"] * 5}, "stop must be"),
        ({"seed": -1}, "seed must be"),
        ({"model": "gpt-4"}, "gpt-4"),
        ({"model": 4}, "model must be"),
        ({"logprobs": 3}, "logprobs is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"stream": "yes"}, "stream must be"),
        ({"messages": []}, "unknown field"),
    ],
)
def test_a_wrong_completion_says_what_is_wrong(address, fields, words) -> None:
    status, answer = complete(address, **({"prompt": "R"} | fields))
    assert status == 400
    assert words in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 50_000])
def test_a_body_that_is_no_object_is_refused(address, body) -> None:
    status, text = send(address, "POST", "/v1/completions", body)
    assert status == 400
    assert "error" in json.loads(text)


def test_openais_own_client_is_served(address) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert "best" in [model.id for model in client.models.list()]
    answer = client.completions.create(model="best", prompt="ROMEO:", max_tokens=5, seed=1)
    pieces = client.completions.create(
        model="best", prompt="ROMEO:", max_tokens=5, seed=1, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="best", prompt="R", max_tokens=-1)


def test_allowed_hosts_open_the_page_to_a_proxys_name(folder) -> None:
    more = ("--allowed_hosts", "demo.example, other.example")
    with server(folder, "-m", "gptforge", "demo", "run", "--port", "PORT", *more) as address:
        assert send(address, "GET", "/v1/models", host="demo.example")[0] == 200
        assert send(address, "GET", "/v1/models", host="evil.example")[0] == 403
