"""`/v1/completions` and `/v1/models` in OpenAI's JSON, for programs and for the page itself.

The fields are those of https://platform.openai.com/docs/api-reference/completions; what is not
supported is refused, not ignored. `top_k` is an addition. A streamed response begins with comments,
`: queue 2`, while it waits for its turn.
"""

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gptforge.demo.generation_queue import GenerationQueue
from gptforge.demo.run_data import ModelCache
from gptforge.errors import UserError
from gptforge.inference.detokenizer import StopMatcher
from gptforge.inference.language_model import LanguageModel, Token
from gptforge.inference.sampling import SamplingParams
from gptforge.inference.validation import as_str_list

MAX_PROMPT_CHARS = 4000
MAX_NEW_TOKENS = 1000
MAX_SECONDS = 60.0  # for all texts of a request
MAX_SEQUENCES = 8  # prompts times `n`
MAX_LOGPROBS = 5
FRAME_SECONDS = 0.05  # between events of a stream; tokens that are generated meanwhile share one
UNSUPPORTED_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "best_of": (1,),
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
    max_tokens: int = Field(16, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=0, le=2**31)
    top_p: float = Field(1.0, ge=0.001, le=1)
    n: int = Field(1, ge=1, le=MAX_SEQUENCES)
    stop: str | list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
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
    tokens: Sequence[Token]
    """With `text`; or those whose text is held back, since a stop string may begin with it."""
    finish_reason: str | None = None


def routes(models: ModelCache, is_stopping: Callable[[], bool]) -> list[Route]:
    """Endpoints for an ASGI application; see `GenerationQueue`."""
    queue = GenerationQueue(is_stopping)

    async def get_models(_: Request) -> Response:
        fields = {"object": "model", "created": 0, "owned_by": "gptforge"}
        data = [{"id": name, **fields} for name in models.names()]
        return JSONResponse({"object": "list", "data": data})

    async def post_completions(request: Request) -> Response:
        try:
            completion = parse_request(await request.body())
            name = completion.model or models.names()[0]
            model = await run_in_threadpool(models.get, name)
            prompt_tokens = sum(len(model.encode_prompt(prompt)) for prompt in completion.prompts)
            for prompt in completion.prompts:
                # Validates all parameters before the first byte of the response.
                model.stream_tokens(
                    prompt, completion.max_tokens, completion.params, seed=completion.seed
                )
        except UserError as error:
            return _error(400, str(error), "invalid_request_error")
        if queue.is_full:
            return _error(429, "many visitors are waiting: try again in a minute", "rate_limit")
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
        chunks = queue.run(_generate(model, completion, counts))
        if completion.stream:
            return StreamingResponse(
                _events(chunks, head, counts, completion), media_type="text/event-stream"
            )
        results: list[list[CompletionChunk]] = [
            [] for _ in range(len(completion.prompts) * completion.n)
        ]
        async with aclosing(chunks):
            async for chunk in chunks:
                if isinstance(chunk, CompletionChunk):
                    results[chunk.index].append(chunk)
                if await request.is_disconnected():
                    break
        choices = [_choice(parts, completion) for parts in results if parts]
        return JSONResponse({**head, "choices": choices, "usage": _usage(counts)})

    return [
        Route("/v1/models", get_models, methods=["GET"]),
        Route("/v1/completions", post_completions, methods=["POST"]),
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
        name = str(*first["loc"][:1]) or "the name of a field"  # which is not UTF-8 text
        raise UserError(f"{name:.60}: {first['msg']}") from None
    prompts = request.prompts
    if not 1 <= request.n * len(prompts) <= MAX_SEQUENCES:
        raise UserError(f"prompt: give 1 to {MAX_SEQUENCES} texts at once, times n")
    if (length := max(map(len, prompts))) > MAX_PROMPT_CHARS:
        raise UserError(f"prompt: at most {MAX_PROMPT_CHARS:,} characters, not {length:,}")
    return request


def _generate(
    model: LanguageModel, request: CompletionRequest, counts: dict[str, int]
) -> Generator[CompletionChunk]:
    """The choices one after the other, within `MAX_SECONDS` for all of them."""
    deadline = time.monotonic() + MAX_SECONDS
    choices = [(prompt, copy) for prompt in request.prompts for copy in range(request.n)]
    for index, (prompt, copy) in enumerate(choices):
        seed = None if request.seed is None else (request.seed + copy) % 2**63
        matcher = StopMatcher(as_str_list(request.stop, "stop"))
        tokens: list[Token] = []
        count, text, last_frame = 0, "", 0.0
        for token in model.stream_tokens(
            prompt, request.max_tokens, request.params, seed=seed,
            top_logprobs=request.logprobs or 0,
        ):  # fmt: skip
            count += 1
            counts["completion_tokens"] += 1
            tokens.append(token)
            text += matcher.add(token.text)
            now = time.monotonic()
            if matcher.is_stopped or now > deadline:
                break
            if now - last_frame > FRAME_SECONDS:
                yield CompletionChunk(index, text, tokens)
                text, tokens, last_frame = "", [], now
        is_full = count == request.max_tokens or time.monotonic() > deadline
        reason = "length" if is_full and not matcher.is_stopped else "stop"
        yield CompletionChunk(index, text + matcher.flush(), tokens, reason)


async def _events(
    chunks: AsyncGenerator[CompletionChunk | int],
    head: Mapping[str, Any],
    counts: Mapping[str, int],
    request: CompletionRequest,
) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's format."""
    num_chars = [0] * len(request.prompts) * request.n
    async with aclosing(chunks):
        async for chunk in chunks:
            if isinstance(chunk, int):
                yield f": queue {chunk}\n\n"
                continue
            choice = _choice([chunk], request, num_chars[chunk.index])
            num_chars[chunk.index] += sum(len(token.text) for token in chunk.tokens)
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
    if request.stream_options.include_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(counts)})}\n\n"
    yield "data: [DONE]\n\n"


def _choice(
    chunks: Sequence[CompletionChunk], request: CompletionRequest, num_chars: int = 0
) -> dict[str, Any]:
    """A choice in OpenAI's format, from its chunks so far, or from one after `num_chars`."""
    index, logprobs = chunks[0].index, None
    if request.logprobs is not None:
        tokens = [token for chunk in chunks for token in chunk.tokens]
        start = num_chars + len(request.prompts[index // request.n])
        offsets = accumulate((len(token.text) for token in tokens), initial=start)
        logprobs = {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top_logprobs) for token in tokens],
            "text_offset": [offset for offset, _ in zip(offsets, tokens, strict=False)],
        }
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "index": index,
        "logprobs": logprobs,
        "finish_reason": chunks[-1].finish_reason,
    }


def _usage(counts: Mapping[str, int]) -> dict[str, int]:
    return {**counts, "total_tokens": sum(counts.values())}


def _error(status: int, message: str, kind: str) -> Response:
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=status)
