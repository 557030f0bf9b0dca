"""`/v1/completions` and `/v1/models`: the page's model for programs, in OpenAI's JSON.

The fields are those of https://platform.openai.com/docs/api-reference/completions; what this model
cannot do is refused, not ignored. `top_k` is an addition.
"""

import json
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import gptforge.demo.sessions as bounds
from gptforge.demo.sessions import ModelCache
from gptforge.errors import UserError
from gptforge.inference.detokenizer import StopMatcher
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.inference.validation import is_int, is_number

MAX_SEQUENCES = 8
"""Prompts times `n`."""
MAX_STOP_STRINGS = 4
UNSUPPORTED_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "best_of": (None, 1),
    "logprobs": (None,),
    "suffix": (None, ""),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
}
"""Fields of OpenAI's that are not supported, and the values at which they ask for nothing."""
KNOWN_FIELDS = {
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
}
KNOWN_FIELDS |= {"stream", "stream_options", "user", *UNSUPPORTED_DEFAULTS}


@dataclass(frozen=True)
class CompletionRequest:
    """A request, checked."""

    model: str
    prompts: list[str]
    max_tokens: int
    params: SamplingParams
    n: int
    stop: list[str]
    seed: int | None
    stream: bool
    include_usage: bool


@dataclass
class CompletionChunk:
    """A piece of text of one sequence, and how it ended if it did."""

    index: int
    text: str
    finish_reason: str | None = None


def routes(writers: ModelCache) -> list[Route]:
    """The two endpoints for an ASGI application."""
    places = threading.BoundedSemaphore(bounds.MAX_CONCURRENT)

    async def models(request: Request) -> Response:
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "gptforge"}
            for name in writers.names()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def completions(request: Request) -> Response:
        try:
            asked = parse_request(await request.body(), writers.names()[0])
            model = await run_in_threadpool(writers.get, asked.model)
            prompt_tokens = sum(len(model.encode(prompt)) for prompt in asked.prompts) * asked.n
            for prompt in asked.prompts:
                # Checks every setting before the first byte of an answer.
                model.stream_tokens(prompt, asked.max_tokens, asked.params, seed=asked.seed)
        except UserError as error:
            return _error(400, str(error), "invalid_request_error")
        if not await run_in_threadpool(places.acquire, timeout=10):
            return _error(429, "others are being served: try again in a minute", "rate_limit")
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
        pieces = _held(places, _write(model, asked, counts))
        if asked.stream:
            events = _events(pieces, head, counts, with_usage=asked.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        choices: list[dict[str, Any]] = [
            {"text": "", "index": index, "logprobs": None, "finish_reason": None}
            for index in range(len(asked.prompts) * asked.n)
        ]
        try:
            async for piece in iterate_in_threadpool(pieces):
                choices[piece.index]["text"] += piece.text
                choices[piece.index]["finish_reason"] = piece.finish_reason
                if await request.is_disconnected():
                    break
        finally:
            pieces.close()
        return JSONResponse({**head, "choices": choices, "usage": _usage(counts)})

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]


def parse_request(body: bytes, default_model: str) -> CompletionRequest:
    """A request's JSON, checked.

    Raises:
        UserError: for what is no JSON object, has fields of other types or out of range, or asks
            for something that is not supported.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError("the body must be a JSON object")
    if unknown := sorted(set(given) - KNOWN_FIELDS):
        raise UserError(f"unknown field {unknown[0]!r:.60}")
    for name, neutral in UNSUPPORTED_DEFAULTS.items():
        if given.get(name) not in neutral:
            raise UserError(f"{name} is not supported: leave it out")
    prompt = given.get("prompt", "")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise UserError("prompt must be a string or a list of strings")
    if (longest := max(map(len, prompts))) > bounds.MAX_PROMPT_CHARS:
        raise UserError(f"prompt: at most {bounds.MAX_PROMPT_CHARS:,} characters, not {longest:,}")
    stop = given.get("stop") or []
    stop = stop if isinstance(stop, list) else [stop]
    if len(stop) > MAX_STOP_STRINGS or not all(isinstance(one, str) and one for one in stop):
        raise UserError(f"stop must be a string or a list of at most {MAX_STOP_STRINGS}")
    model = given.get("model") or default_model
    if not isinstance(model, str):
        raise UserError("model must be a string: /v1/models lists them")
    n = _whole(given, "n", 1, 1, MAX_SEQUENCES)
    if n * len(prompts) > MAX_SEQUENCES:
        raise UserError(f"at most {MAX_SEQUENCES} texts at once, not {n * len(prompts)}")
    options = given.get("stream_options") or {}
    if not isinstance(options, dict):
        raise UserError("stream_options must be an object")
    seed = None if given.get("seed") is None else _whole(given, "seed", 0, 0, 2**63 - 1)
    return CompletionRequest(
        model=model,
        prompts=prompts,
        max_tokens=_whole(given, "max_tokens", 16, 1, bounds.MAX_NEW_TOKENS),
        params=SamplingParams(
            _number(given, "temperature", 1.0, 0, 2),
            _whole(given, "top_k", 0, 0, 2**31),
            _number(given, "top_p", 1.0, 0.001, 1),
        ),
        n=n,
        stop=stop,
        seed=seed,
        stream=_switch(given, "stream"),
        include_usage=_switch(options, "include_usage"),
    )


def _write(
    model: LanguageModel, asked: CompletionRequest, counts: dict[str, int]
) -> Iterator[CompletionChunk]:
    """One sequence after the other, in pieces; all together take `MOST_SECONDS` at most."""
    deadline = time.monotonic() + bounds.MAX_SECONDS
    numbered = [(prompt, copy) for prompt in asked.prompts for copy in range(asked.n)]
    for index, (prompt, copy) in enumerate(numbered):
        seed = None if asked.seed is None else (asked.seed + copy) % 2**63
        ending, count = StopMatcher(asked.stop), 0
        tokens = model.stream_tokens(
            prompt, asked.max_tokens, asked.params, seed=seed, top_logprobs=0
        )
        for token in tokens:
            count += 1
            counts["completion_tokens"] += 1
            yield CompletionChunk(index, ending.add(token.text))
            if ending.is_stopped or time.monotonic() > deadline:
                break
        is_full = count == asked.max_tokens or time.monotonic() > deadline
        reason = "length" if is_full and not ending.is_stopped else "stop"
        yield CompletionChunk(index, "" if ending.is_stopped else ending.flush(), reason)


def _held(places: threading.BoundedSemaphore, pieces: Iterator[CompletionChunk]) -> Any:
    """The pieces; the place is given back at the end, or when the client is gone."""
    try:
        yield from pieces
    finally:
        places.release()


async def _events(
    pieces: Any, head: Mapping[str, Any], counts: Mapping[str, int], *, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI's clients read them."""
    try:
        async for piece in iterate_in_threadpool(pieces):
            choice = {"text": piece.text, "index": piece.index, "logprobs": None}
            choice["finish_reason"] = piece.finish_reason
            if piece.text or piece.finish_reason:
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        if with_usage:
            usage = {**head, "choices": [], "usage": _usage(counts)}
            yield f"data: {json.dumps(usage)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        pieces.close()


def _usage(counts: Mapping[str, int]) -> dict[str, int]:
    return {**counts, "total_tokens": sum(counts.values())}


def _error(status: int, message: str, kind: str) -> Response:
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=status)


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = default if given.get(name) is None else given[name]
    if not is_int(value) or not low <= value <= high:
        raise UserError(f"{name} must be a whole number from {low} to {high}")
    return int(value)


def _number(given: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = default if given.get(name) is None else given[name]
    if not is_number(value) or not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}")
    return float(value)


def _switch(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false")
    return value
