"""A trained model with its tokenizer: text in, text out."""

import codecs
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptforge.errors import UserError
from gptforge.generate.sampling import pick
from gptforge.model import GPT
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import decode as decode_ids


class LanguageModel:
    """What `gptforge.load` gives."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [int(i) for i in self.tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return decode_ids(self.tokenizer, ids)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Float32 logits behind each id: (T, vocab) on the CPU.

        Raises:
            UserError: for no ids, or more than the model's positions.
        """
        if not 1 <= len(ids) <= self.model.config.block_size:
            raise UserError(f"give 1 to {self.model.config.block_size} ids, not {len(ids)}")
        was_training = self.model.training
        self.model.eval()
        logits: Tensor = self.model(torch.tensor([ids], device=self.device))[0].float().cpu()
        self.model.train(was_training)
        return logits

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 200,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> str:
        """The continuation of `prompt`, in one piece; see `stream`."""
        return "".join(
            self.stream(
                prompt,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop=stop,
                seed=seed,
            )
        )

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 200,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """The continuation of `prompt`, piece by piece, no piece ending inside a character.

        Args:
            prompt: text to go on from; empty starts at a line's beginning.
            max_new_tokens: tokens to write.
            temperature: below 1 is tamer, above 1 wilder; 0 always takes the likeliest.
            top_k: draw among the k likeliest tokens; 0 among all.
            top_p: draw among the likeliest tokens that hold this much probability; 1 among all.
            stop: end before any of these texts.
            seed: the same seed writes the same text; None rolls fresh dice.

        Raises:
            UserError: for settings out of range or a prompt the tokenizer cannot write.
        """
        _check_settings(max_new_tokens, temperature, top_k, top_p)
        if seed is not None and not 0 <= seed < 2**63:
            raise UserError(f"--seed must be 0 or more and below 2**63, not {seed}")
        ids = self.encode(prompt) if prompt else self._opening()
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        pieces = self._pieces(ids, max_new_tokens, temperature, top_k, top_p, generator)
        return _until(pieces, [text for text in stop if text])

    @torch.inference_mode()
    def _next_logits(self, ids: list[int]) -> Tensor:
        """Logits behind the last id, (1, V), on the device."""
        was_training = self.model.training
        self.model.eval()
        logits: Tensor = self.model(torch.tensor([ids], device=self.device))[:, -1]
        self.model.train(was_training)
        return logits

    def _opening(self) -> list[int]:
        try:
            return self.encode("\n")
        except UserError:
            return [0]

    def _pieces(
        self,
        ids: list[int],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator,
    ) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for _ in range(max_new_tokens):
            ids = ids[-self.model.config.block_size :]
            # The rows behind the tokenizer's ids pad the table: they mean nothing.
            logits = self._next_logits(ids)[:, : self.tokenizer.size]
            choice = pick(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            ids.append(int(choice))
            yield decoder.decode(self.tokenizer.decode_bytes(ids[-1:]))
        yield decoder.decode(b"", final=True)


def _check_settings(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 0:
        raise UserError(f"--max_new_tokens must be 0 or more, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature must be 0 or more, not {temperature}")
    if top_k < 0:
        raise UserError(f"--top_k must be 0 or more, not {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p must be above 0 and at most 1, not {top_p}")


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first stop text; what may be its beginning is held back until settled."""
    held = ""
    reach = max((len(text) for text in stop), default=1) - 1
    for piece in pieces:
        held += piece
        ends = [at + len(text) for text in stop if (at := held.find(text)) >= 0]
        if ends:
            # The one that is complete first; of several that end there, the longest.
            written = held[: min(ends)]
            yield min((written.removesuffix(text) for text in stop), key=len)
            return
        settled = len(held) - reach
        if settled > 0:
            yield held[:settled]
            held = held[settled:]
    if held:
        yield held
