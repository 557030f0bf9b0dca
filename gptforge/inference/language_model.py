"""A trained model with its tokenizer: text in, text out."""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptforge.errors import UserError
from gptforge.inference import validation
from gptforge.inference.detokenizer import Completion, CompletionBuilder, IncrementalDetokenizer
from gptforge.inference.generate import SampledTokens, TokenGenerator
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, draw_uniforms
from gptforge.model import GPT
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.base import decode as decode_ids

logger = logging.getLogger(__name__)

MAX_TOKENS = 10_000_000
"""Limit of new tokens per call, since their buffers are allocated in advance."""


@dataclass(frozen=True)
class Token:
    """A sampled token."""

    id: int
    text: str  # the characters that it completes; empty inside a multi-byte character
    logprob: float  # natural logarithm of the model's probability, before any sampling parameter
    top_logprobs: tuple[tuple[str, float], ...]  # of the most likely tokens at this position


class LanguageModel:
    """A GPT, in training or not, with its tokenizer; `gptforge.load` returns one.

    Args:
        model: weights are shared with it, or copied if `dtype` differs.
        tokenizer: the one that the model was trained with.
        dtype: compute dtype; None: that of the model.
        frozen: whether the weights no longer change: large weights are then repacked on a CPU, and
            decode steps are replayed as CUDA graphs on a GPU.
        warn_on_context_shift: whether to log that the oldest tokens are forgotten.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype | None = None,
        frozen: bool = False,
        warn_on_context_shift: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.warn_on_context_shift = warn_on_context_shift
        self._dtype, self._frozen = dtype, frozen

    @functools.cached_property
    def generator(self) -> TokenGenerator:
        """Built on first use, since it may copy the weights."""
        model = InferenceModel(
            self.model, vocab_size=self.tokenizer.vocab_size, dtype=self._dtype, frozen=self._frozen
        )
        return TokenGenerator(model, cuda_graph=self._frozen)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; a UserError for a character that the tokenizer does not have."""
        try:
            validation.check_str(text, "the text").encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which undecodable bytes become
            raise UserError(f"the text is not UTF-8 text, at character {error.start}") from None
        return [int(i) for i in self.tokenizer.encode(text)]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, never empty.

        `<|endoftext|>` is the end-of-text token if the tokenizer has one. An empty prompt is that
        token if the model was trained on documents separated by it, else a line break. As in
        training texts, a byte order mark is dropped and CRLF is a line break.
        """
        prompt = validation.normalize_prompt(validation.check_str(prompt, "the prompt"))
        eot = self.tokenizer.eot_token
        if prompt == "":
            return self._empty_prompt()
        if eot is None:
            return self.encode(prompt)
        first, *others = prompt.split(END_OF_TEXT)
        ids = self.encode(first)
        for text in others:
            ids += [eot, *self.encode(text)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; a UserError for one that the tokenizer does not have."""
        ids = validation.as_int_list(ids, "the ids", below=self.tokenizer.vocab_size)
        return decode_ids(self.tokenizer, ids)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each of 1 to block_size ids: (T, tokenizer.vocab_size) fp32, on the CPU."""
        size = self.tokenizer.vocab_size
        ids = validation.as_int_list(ids, "the ids", below=size)
        if not 1 <= len(ids) <= self.model.config.block_size:
            raise UserError(f"give 1 to {self.model.config.block_size} ids, not {len(ids)}")
        was_training = self.model.training
        self.model.eval()
        logits: Tensor = self.model(torch.tensor([ids], device=self.device))[0, :, :size]
        self.model.train(was_training)
        return logits.float().cpu()

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 200,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> str:
        """The continuation of `prompt`; see `stream`."""
        texts = self.stream(
            prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop,
            seed=seed,
        )  # fmt: skip
        return "".join(texts)

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 200,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """The continuation of `prompt` as it is generated, in complete characters.

        Args:
            prompt: text to continue, see `encode_prompt`; empty starts a document or a line.
            max_new_tokens: tokens to generate; an end-of-text token may end the text earlier.
            temperature: below 1 is more predictable, above 1 more random; 0 is greedy.
            top_k: sample from the k most likely tokens; 0 from all.
            top_p: sample from the most likely tokens that have this total probability; 1 from all.
            stop: end before this string, or any of these.
            seed: the same seed gives the same text; None draws a random one.

        Raises:
            UserError: for an argument out of range, or a prompt that cannot be encoded.
        """
        sampling = SamplingParams(temperature, top_k, top_p)
        stop = validation.as_str_list(stop, "stop")
        builder = CompletionBuilder(self.tokenizer, stop, self._eot_ids())
        steps = self._generate([prompt], max_new_tokens, sampling, [seed], None)
        return self._texts(steps, builder)

    def generate_batch(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 200,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008  a frozen value
        *,
        stop: str | Sequence[str] = (),
        stop_token_ids: int | Sequence[int] = (),
        seeds: int | Sequence[int | None] | None = None,
        logprobs: bool = False,
    ) -> list[Completion]:
        """Continuations of several prompts, faster than one at a time.

        A completion depends on its prompt and seed, not on the batch, up to the rounding of larger
        matmuls.

        Args:
            prompts: of any lengths; a string is one prompt.
            max_new_tokens: for each prompt.
            sampling: temperature, top-k and top-p.
            stop: as in `stream`.
            stop_token_ids: end at any of these tokens, besides the end-of-text token.
            seeds: one per prompt; None for random ones.
            logprobs: return the log probability of each token.
        """
        prompts = validation.as_str_list(prompts, "the prompts")
        if not prompts:
            raise UserError("give at least one prompt; an empty one starts a document or a line")
        seeds = validation.as_seed_list(seeds, len(prompts))
        stop = validation.as_str_list(stop, "stop")
        stop_ids = {*validation.as_int_list(stop_token_ids, "stop_token_ids"), *self._eot_ids()}
        builders = [CompletionBuilder(self.tokenizer, stop, stop_ids) for _ in prompts]
        top_logprobs = 0 if logprobs else None
        for step in self._generate(prompts, max_new_tokens, sampling, seeds, top_logprobs):
            rows = zip(builders, step.ids, step.logprobs[:, :, 0].tolist(), strict=True)
            for builder, ids, values in rows:
                for token, logprob in zip(ids, values, strict=True):
                    builder.add(token, logprob)
            if all(builder.is_finished for builder in builders):
                break
        return [builder.completion(logprobs) for builder in builders]

    def stream_tokens(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008  a frozen value
        *,
        seed: int | None = None,
        top_logprobs: int = 5,
    ) -> Iterator[Token]:
        """Tokens as they are sampled, each with its probability and the most likely others."""
        top_logprobs = validation.check_non_negative_int(top_logprobs, "top_logprobs")
        count = min(top_logprobs, self.tokenizer.vocab_size)
        return self._tokens(self._generate([prompt], max_new_tokens, sampling, [seed], count))

    def _generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingParams,
        seeds: Sequence[int | None],
        top_logprobs: int | None,
    ) -> Iterator[SampledTokens]:
        """Check the arguments now rather than with the first token, then generate."""
        count = validation.check_non_negative_int(max_new_tokens, "max_new_tokens")
        if count * len(prompts) > MAX_TOKENS:
            raise UserError(
                f"max_new_tokens {short_repr(count)}: at most {MAX_TOKENS:,} tokens in one call"
            )
        if not isinstance(sampling, SamplingParams):
            raise UserError(
                f"sampling must be SamplingParams(temperature, top_k, top_p), not {sampling}"
            )
        sampling.validate()
        ids = [self.encode_prompt(prompt) for prompt in prompts]
        return self.generator.generate(
            ids, draw_uniforms(seeds, count), sampling, top_logprobs=top_logprobs,
            on_context_shift=self._log_context_shift,
        )  # fmt: skip

    def _texts(self, steps: Iterator[SampledTokens], builder: CompletionBuilder) -> Iterator[str]:
        for token in (token for step in steps for token in step.ids[0]):
            if text := builder.add(token):
                yield text
            if builder.is_finished:
                break
        if text := builder.flush():
            yield text

    def _tokens(self, steps: Iterator[SampledTokens]) -> Iterator[Token]:
        detokenizer, eot_ids = IncrementalDetokenizer(self.tokenizer), self._eot_ids()
        for step in steps:
            rows = (step.ids[0], step.logprobs[0].tolist(), step.top_ids[0].tolist())
            for token, logprobs, top_ids in zip(*rows, strict=True):
                if token in eot_ids:
                    return
                texts = [decode_ids(self.tokenizer, [i]) for i in top_ids]
                top_logprobs = tuple(zip(texts, logprobs[1:], strict=True))
                yield Token(token, detokenizer.add(token), logprobs[0], top_logprobs)

    def _empty_prompt(self) -> list[int]:
        if self.tokenizer.prepends_eot and self.tokenizer.eot_token is not None:
            return [self.tokenizer.eot_token]
        try:
            return self.encode("\n")
        except UserError:
            return [0]

    def _eot_ids(self) -> set[int]:
        eot = self.tokenizer.eot_token
        return set() if eot is None else {eot}

    def _log_context_shift(self) -> None:
        if self.warn_on_context_shift:
            logger.warning(
                f"note: longer than the model's {self.model.config.block_size} tokens of context: "
                "the window shifts, and the oldest tokens are forgotten"
            )
