"""`/v1/completions` and `/v1/models` in OpenAI's JSON, and the picture of the training curves.

The fields are those of https://platform.openai.com/docs/api-reference/completions; what is not
supported is refused, not ignored. `top_k` is an addition.
"""

import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import gptforge.demo.sessions as limits
from gptforge.demo.sessions import ModelCache
from gptforge.demo.training_tab import CURVES
from gptforge.errors import UserError
from gptforge.inference.detokenizer import StopMatcher
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.inference.validation import as_str_list

MAX_SEQUENCES = 8
"""Prompts times `n`."""
UNSUPPORTED_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "logprobs": (),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
"""OpenAI's fields that are not supported, and the values besides null that have no effect."""


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    include_usage: StrictBool = False


class CompletionRequest(BaseModel):
    """The fields of a request, with their types and limits."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = ""
    prompt: str | list[str] = ""
    max_tokens: int = Field(16, ge=1, le=limits.MAX_NEW_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=0, le=2**31)
    top_p: float = Field(1.0, ge=0.001, le=1)
    n: int = Field(1, ge=1, le=MAX_SEQUENCES)
    stop: str | list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Any = None

    @property
    def prompts(self) -> list[str]:
        """At least one prompt."""
        return as_str_list(self.prompt, "prompt")

    @property
    def params(self) -> SamplingParams:
        """How tokens are sampled."""
        return SamplingParams(self.temperature, self.top_k, self.top_p)


@dataclass
class CompletionChunk:
    """New text of one choice."""

    index: int
    text: str
    finish_reason: str | None = None


Chunks = Generator[CompletionChunk, None, None]


def routes(models: ModelCache, run_dir: Path) -> list[Route]:
    """Endpoints for an ASGI application."""
    slots = threading.BoundedSemaphore(limits.MAX_CONCURRENT)

    async def get_models(_: Request) -> Response:
        fields = {"object": "model", "created": 0, "owned_by": "gptforge"}
        data = [{"id": name, **fields} for name in models.names()]
        return JSONResponse({"object": "list", "data": data})

    async def get_curves(_: Request) -> Response:
        path = run_dir / CURVES
        is_servable = path.is_file() and not path.is_symlink()
        return FileResponse(path) if is_servable else Response(status_code=404)

    async def post_completions(request: Request) -> Response:
        try:
            completion = parse_request(await request.body())
            name = completion.model or models.names()[0]
            model = await run_in_threadpool(models.get, name)
            prompt_tokens = sum(len(model.encode(prompt)) for prompt in completion.prompts)
            for prompt in completion.prompts:
                # Validates all parameters before the first byte of the response.
                model.stream_tokens(
                    prompt, completion.max_tokens, completion.params, seed=completion.seed
                )
        except UserError as error:
            return _error(400, str(error), "invalid_request_error")
        if not await run_in_threadpool(slots.acquire, timeout=10):
            return _error(429, "the server is busy: try again in a minute", "rate_limit")
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        counts = {"prompt_tokens": prompt_tokens * completion.n, "completion_tokens": 0}
        chunks = _release_after(slots, _generate(model, completion, counts))
        if completion.stream:
            include_usage = completion.stream_options.include_usage
            events = _events(chunks, head, counts, include_usage=include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        choices: list[dict[str, Any]] = [
            {"text": "", "index": index, "logprobs": None, "finish_reason": None}
            for index in range(len(completion.prompts) * completion.n)
        ]
        with closing(chunks):
            async for chunk in iterate_in_threadpool(chunks):
                choices[chunk.index]["text"] += chunk.text
                choices[chunk.index]["finish_reason"] = chunk.finish_reason
                if await request.is_disconnected():
                    break
        return JSONResponse({**head, "choices": choices, "usage": _usage(counts)})

    return [
        Route("/v1/models", get_models, methods=["GET"]),
        Route("/v1/completions", post_completions, methods=["POST"]),
        Route(f"/{CURVES}", get_curves, methods=["GET"]),
    ]


def parse_request(body: bytes) -> CompletionRequest:
    """Parse a request's JSON; a UserError names the first field that is wrong."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError("the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, defaults in UNSUPPORTED_DEFAULTS.items():
        if name in fields and fields.pop(name) not in defaults:
            raise UserError(f"{name} is not supported: leave it out")
    try:
        request = CompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]!s:.60}: {first['msg']}") from None
    prompts = request.prompts
    if not 1 <= request.n * len(prompts) <= MAX_SEQUENCES:
        raise UserError(f"prompt: give 1 to {MAX_SEQUENCES} texts at once, times n")
    if (length := max(map(len, prompts))) > limits.MAX_PROMPT_CHARS:
        raise UserError(f"prompt: at most {limits.MAX_PROMPT_CHARS:,} characters, not {length:,}")
    return request


def _generate(model: LanguageModel, request: CompletionRequest, counts: dict[str, int]) -> Chunks:
    """The choices one after the other, within `MAX_SECONDS` for all of them."""
    deadline = time.monotonic() + limits.MAX_SECONDS
    choices = [(prompt, copy) for prompt in request.prompts for copy in range(request.n)]
    for index, (prompt, copy) in enumerate(choices):
        seed = None if request.seed is None else (request.seed + copy) % 2**63
        matcher, count = StopMatcher(as_str_list(request.stop, "stop")), 0
        for token in model.stream_tokens(
            prompt, request.max_tokens, request.params, seed=seed, top_logprobs=0
        ):
            count += 1
            counts["completion_tokens"] += 1
            yield CompletionChunk(index, matcher.add(token.text))
            if matcher.is_stopped or time.monotonic() > deadline:
                break
        is_full = count == request.max_tokens or time.monotonic() > deadline
        reason = "length" if is_full and not matcher.is_stopped else "stop"
        yield CompletionChunk(index, matcher.flush(), reason)


def _release_after(slots: threading.BoundedSemaphore, chunks: Chunks) -> Chunks:
    """Pass the chunks on; release the slot at the end, or when the client disconnects."""
    try:
        yield from chunks
    finally:
        slots.release()


async def _events(
    chunks: Chunks, head: Mapping[str, Any], counts: Mapping[str, int], *, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's format."""
    with closing(chunks):
        async for chunk in iterate_in_threadpool(chunks):
            choice = {"text": chunk.text, "index": chunk.index, "logprobs": None}
            choice["finish_reason"] = chunk.finish_reason
            if chunk.text or chunk.finish_reason:
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        if include_usage:
            usage = {**head, "choices": [], "usage": _usage(counts)}
            yield f"data: {json.dumps(usage)}\n\n"
        yield "data: [DONE]\n\n"


def _usage(counts: Mapping[str, int]) -> dict[str, int]:
    return {**counts, "total_tokens": sum(counts.values())}


def _error(status: int, message: str, kind: str) -> Response:
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=status)
