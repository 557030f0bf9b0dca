"""A trained model with its tokenizer: text in, text out."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptforge.errors import UserError
from gptforge.inference.detokenizer import (
    Completion,
    CompletionBuilder,
    IncrementalDetokenizer,
    truncate_at_stop,
)
from gptforge.inference.generate import SampledTokens, TokenGenerator
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, draw_uniforms
from gptforge.inference.validation import (
    as_int_list,
    as_seed_list,
    as_str_list,
    check_non_negative_int,
    check_str,
    check_utf8,
)
from gptforge.model import GPT
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import decode as decode_ids
from gptforge.tokenizers.base import END_OF_TEXT

MAX_TOKENS = 10_000_000
"""Of a call: their dice and ids are laid out beforehand."""


@dataclass(frozen=True)
class Token:
    """One token that was written."""

    id: int
    text: str
    """The characters that it completes; empty inside a character of several bytes."""
    logprob: float
    """Natural logarithm of the probability that the model gave it, before any sampling setting."""
    top_logprobs: tuple[tuple[str, float], ...]
    """The likeliest tokens there, each with its log probability."""


class LanguageModel:
    """What `gptforge.load` gives.

    Args:
        model: any weights, in training or not.
        tokenizer: the one it was trained with.
        dtype: type to write in; None: the model's own. Weights are copied if it is another one.
        settled: the weights no longer change, and much will be written: they may be laid out anew
            on a CPU, and steps are replayed as CUDA graphs on a GPU.
        say: told when the window slides.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype | None = None,
        frozen: bool = False,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.log = log
        self._dtype, self._settled = dtype, frozen

    @functools.cached_property
    def generator(self) -> TokenGenerator:
        """What writes; made when it is first needed, for it may copy the weights."""
        engine = InferenceModel(
            self.model,
            vocab_size=self.tokenizer.vocab_size,
            dtype=self._dtype,
            frozen=self._settled,
        )
        return TokenGenerator(engine, cuda_graph=self._settled)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            UserError: for a character that the tokenizer cannot write, or half of one.
        """
        text = check_str(text, "the text")
        check_utf8(text, "the text")
        return [int(i) for i in self.tokenizer.encode(text)]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt, never none.

        `<|endoftext|>` is the mark between documents, where the tokenizer has one. An empty prompt
        stands for the beginning of a document if the model was trained on documents with that mark
        between them, else for the beginning of a line.

        Raises:
            UserError: for a character that the tokenizer cannot write, or half of one.
        """
        mark = self.tokenizer.eot_token
        if prompt == "":
            return self._opening()
        if mark is None:
            return self.encode(prompt)
        first, *others = check_str(prompt, "the prompt").split(END_OF_TEXT)
        ids = self.encode(first)
        for part in others:
            ids += [mark, *self.encode(part)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids.

        Raises:
            UserError: for an id that the tokenizer does not have.
        """
        return decode_ids(
            self.tokenizer, as_int_list(ids, "the ids", below=self.tokenizer.vocab_size)
        )

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Float32 logits behind each id: (T, vocab) on the CPU.

        vocab is the tokenizer's size: rows that only pad the embedding are left out, so that a
        softmax gives the probabilities that sampling and evaluation use.

        Raises:
            UserError: for no ids, more than the model's positions, or one that is not a token.
        """
        size = self.tokenizer.vocab_size
        ids = as_int_list(ids, "the ids", below=size)
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
        """The continuation of `prompt`, in one piece; see `stream`."""
        sampling = SamplingParams(temperature, top_k, top_p)
        prompt = check_str(prompt, "the prompt")
        [writing] = self.generate_batch([prompt], max_new_tokens, sampling, stop=stop, seeds=[seed])
        return writing.text

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
        """The continuation of `prompt`, piece by piece, no piece ending inside a character.

        Args:
            prompt: text to go on from, see `prompt_ids`; empty starts a document, or else a line.
            max_new_tokens: tokens to write; a model that knows an end-of-text mark may end earlier.
            temperature: below 1 is tamer, above 1 wilder; 0 always takes the likeliest.
            top_k: draw among the k likeliest tokens; 0 among all.
            top_p: draw among the likeliest tokens that hold this much probability; 1 among all.
            stop: end before this text, or any of these.
            seed: the same seed writes the same text; None rolls fresh dice.

        Raises:
            UserError: for settings out of range or a prompt the tokenizer cannot write.
        """
        sampling = SamplingParams(temperature, top_k, top_p)
        chosen = self._chosen([prompt], max_new_tokens, sampling, [seed], None)
        return truncate_at_stop(self._pieces(chosen), as_str_list(stop, "stop"))

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
        """Continuations of several prompts at once, which is faster than one after the other.

        What a prompt becomes depends on its own seed, not on its neighbours, as far as products of
        larger batches round alike.

        Args:
            prompts: of any lengths, see `prompt_ids`; an empty one starts a document, or else a
                line; a text alone is one.
            max_new_tokens: tokens to write for each.
            sampling: how tokens are chosen.
            stop: end before this text, or any of these.
            stop_ids: end at any of these tokens, besides an end-of-text mark.
            seeds: one a prompt; None rolls fresh dice.
            logprobs: note the probability of each token; else `Writing.logprobs` are empty.

        Raises:
            UserError: for settings out of range or a prompt the tokenizer cannot write.
        """
        prompts = as_str_list(prompts, "the prompts")
        if not prompts:
            raise UserError("give one prompt at least; an empty one starts a document or a line")
        seeds = as_seed_list(seeds, len(prompts))
        stop, stop_token_ids = as_str_list(stop, "stop"), as_int_list(stop_token_ids, "stop_ids")
        rows = [
            CompletionBuilder(self.tokenizer, stop, self._stop_ids(stop_token_ids)) for _ in prompts
        ]
        alternatives = 0 if logprobs else None
        for chosen in self._chosen(prompts, max_new_tokens, sampling, seeds, alternatives):
            for number, row in enumerate(rows):
                row.add(chosen.ids[number], chosen.logprobs[number, :, 0].tolist())
            if all(row.is_finished for row in rows):
                break
        return [row.completion(logprobs) for row in rows]

    def stream_tokens(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008  a frozen value
        *,
        seed: int | None = None,
        top_logprobs: int = 5,
    ) -> Iterator[Token]:
        """What is written token by token, with how likely each was and what else might have been.

        Raises:
            UserError: for settings out of range or a prompt the tokenizer cannot write.
        """
        top_logprobs = min(
            check_non_negative_int(top_logprobs, "alternatives"), self.tokenizer.vocab_size
        )
        chosen = self._chosen([prompt], max_new_tokens, sampling, [seed], top_logprobs)
        return self._tokens(chosen)

    def _chosen(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingParams,
        seeds: Sequence[int | None],
        alternatives: int | None,
    ) -> Iterator[SampledTokens]:
        """Checks everything now, not when the first token is asked for."""
        max_new_tokens = check_non_negative_int(max_new_tokens, "--max_new_tokens")
        if max_new_tokens * len(prompts) > MAX_TOKENS:
            raise UserError(
                f"--max_new_tokens {max_new_tokens}: a call writes {MAX_TOKENS:,} tokens at most"
            )
        if not isinstance(sampling, SamplingParams):
            raise UserError(f"sampling must be Sampling(temperature, top_k, top_p), not {sampling}")
        sampling.validate()
        ids = [self.encode_prompt(prompt) for prompt in prompts]
        dice = draw_uniforms(seeds, max_new_tokens)
        return self.generator.generate(
            ids, dice, sampling, top_logprobs=alternatives, on_context_shift=self._tell_of_sliding
        )

    def _pieces(self, steps: Iterator[SampledTokens]) -> Iterator[str]:
        unfinished, stop_ids = IncrementalDetokenizer(self.tokenizer), self._stop_ids(())
        for chosen in steps:
            for token in chosen.ids[0]:
                if token in stop_ids:
                    yield unfinished.flush()
                    return
                yield unfinished.add(token)
        yield unfinished.flush()

    def _tokens(self, steps: Iterator[SampledTokens]) -> Iterator[Token]:
        unfinished, stop_ids = IncrementalDetokenizer(self.tokenizer), self._stop_ids(())
        for chosen in steps:
            logprobs, likeliest = chosen.logprobs[0].tolist(), chosen.top_ids[0].tolist()
            for token, known, others in zip(chosen.ids[0], logprobs, likeliest, strict=True):
                if token in stop_ids:
                    return
                spelled = [decode_ids(self.tokenizer, [other]) for other in others]
                pairs = tuple(zip(spelled, known[1:], strict=True))
                yield Token(token, unfinished.add(token), known[0], pairs)

    def _opening(self) -> list[int]:
        if self.tokenizer.prepends_eot and self.tokenizer.eot_token is not None:
            return [self.tokenizer.eot_token]
        try:
            return self.encode("\n")
        except UserError:
            return [0]

    def _stop_ids(self, more: Sequence[int]) -> set[int]:
        end_of_text = getattr(self.tokenizer, "eot_token", None)
        return {*more} if end_of_text is None else {*more, int(end_of_text)}

    def _tell_of_sliding(self) -> None:
        self.log(
            f"note: longer than the model's {self.model.config.block_size} tokens of context: the "
            "window slides, and what it leaves behind is forgotten"
        )
