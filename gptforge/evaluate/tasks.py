"""HellaSwag and LAMBADA: which ending a model finds likeliest, and whether it knows the last word.

Asked and scored as EleutherAI's lm-evaluation-harness does with `hellaswag` and `lambada_openai`
and no examples, so that figures can be compared with published ones.

HellaSwag: Zellers et al., 2019. LAMBADA: Paperno et al., 2016, in the form of Radford et al., 2019.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptforge.device import Precision, autocast
from gptforge.inference.language_model import LanguageModel

MAX_BATCH_TOKENS = 8192
"""That go through the model together, padding and all."""


@dataclass(frozen=True)
class Example:
    """A beginning and its possible endings, one of which is right."""

    context: str
    choices: tuple[str, ...]
    """Each with the blank before it."""
    label: int = 0


@dataclass(frozen=True)
class LogLikelihood:
    """How likely the model finds an ending."""

    loglikelihood: float
    """Of all its tokens, in nats."""
    is_greedy: bool
    """Whether each token is the one that the model would have taken."""


@dataclass(frozen=True)
class Task:
    """A kind of question: how a row of its data reads, and what the answers come to."""

    parse: Callable[[Mapping[str, Any]], Example]
    score: Callable[[Sequence[Example], Sequence[Sequence[LogLikelihood]]], dict[str, float]]


def parse_hellaswag(row: Mapping[str, Any]) -> Example:
    """A row of HellaSwag's; those without a label are the test that nobody may know."""
    second = str(row["ctx_b"])
    context = f"{row['ctx_a']} {second[:1].upper()}{second[1:].lower()}"
    beginning = _cleaned(f"{row['activity_label']}: {context}")
    endings = tuple(f" {_cleaned(ending)}" for ending in row["endings"])
    right = int(row["label"])
    if not 0 <= right < len(endings):
        raise ValueError(f"label {right}")
    return Example(beginning, endings, right)


def parse_lambada(row: Mapping[str, Any]) -> Example:
    """A row of LAMBADA's: the last word is the ending."""
    beginning, blank, word = str(row["text"]).rpartition(" ")
    if not word or not beginning:
        raise ValueError("no last word")
    return Example(beginning, (blank + word,))


def score_hellaswag(
    examples: Sequence[Example], results: Sequence[Sequence[LogLikelihood]]
) -> dict[str, float]:
    """Shares that were answered rightly, by likelihood and by likelihood a character."""
    plain, by_length = [], []
    for question, given in zip(examples, results, strict=True):
        sums = [answer.loglikelihood for answer in given]
        # The blank before an ending is none of its characters.
        lengths = [max(1, len(ending) - 1) for ending in question.choices]
        each = [total / length for total, length in zip(sums, lengths, strict=True)]
        plain.append(sums.index(max(sums)) == question.label)
        by_length.append(each.index(max(each)) == question.label)
    return {**_share("acc", plain), **_share("acc_norm", by_length)}


def score_lambada(
    examples: Sequence[Example], results: Sequence[Sequence[LogLikelihood]]
) -> dict[str, float]:
    """Share of last words that the model would have written, and its perplexity over all."""
    known = [given[0].is_greedy for given in results]
    mean = sum(given[0].loglikelihood for given in results) / len(results)
    return {**_share("acc", known), "perplexity": math.exp(min(-mean, 700.0))}


TASKS = {
    "hellaswag": Task(parse_hellaswag, score_hellaswag),
    "lambada": Task(parse_lambada, score_lambada),
}


def score_choices(
    model: LanguageModel,
    examples: Sequence[Example],
    precision: Precision,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[LogLikelihood]]:
    """What the model makes of each question's endings.

    Args:
        writer: model and tokenizer.
        questions: in any order.
        precision: of the products.
        asked: told behind each batch how many endings are done, of how many.

    Raises:
        UserError: for characters that the tokenizer does not have.
    """
    pairs = [
        _encoded(model, question.context, ending)
        for question in examples
        for ending in question.choices
    ]
    found = iter(loglikelihoods(model, pairs, precision, progress=progress))
    return [[next(found) for _ in question.choices] for question in examples]


@torch.inference_mode()
def loglikelihoods(
    model: LanguageModel,
    requests: Sequence[tuple[list[int], int]],
    precision: Precision,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LogLikelihood]:
    """How likely endings are, each the last ids of a text: its ids, and how many are the ending's.

    A text has at most one id more than the model has places for.
    """
    # Of like lengths together, the longest first: memory runs out at once or not at all.
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    found: dict[int, LogLikelihood] = {}
    model.model.eval()
    while order:
        width = len(requests[order[0]][0]) - 1
        size = max(1, MAX_BATCH_TOKENS // width)
        batch, order = order[:size], order[size:]
        found |= zip(batch, _batch(model, [requests[i] for i in batch], precision), strict=True)
        progress(len(found), len(requests))
    return [found[number] for number in range(len(requests))]


def _batch(
    writer: LanguageModel, pairs: Sequence[tuple[list[int], int]], precision: Precision
) -> list[LogLikelihood]:
    """Answers to endings, each the last ids of a text, so many of them."""
    width = max(len(ids) for ids, _ in pairs) - 1
    inputs = torch.zeros(len(pairs), width, dtype=torch.long)
    asked, targets = torch.zeros(len(pairs), width, dtype=torch.bool), torch.zeros_like(inputs)
    for row, (ids, count) in enumerate(pairs):
        length = len(ids) - 1
        # What lies behind a text's end, nothing before it sees.
        inputs[row, :length], targets[row, :length] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        asked[row, length - count : length] = True
    device = writer.device
    with autocast(device, precision):
        hidden = writer.model.forward_hidden(inputs.to(device))[asked.to(device)]
    # In float32: rounded to bfloat16, the likeliest token is often one of several. The table may
    # have more rows than there are ids.
    table = writer.model.lm_head.weight[: writer.tokenizer.vocab_size]
    logits: Tensor = hidden.float() @ table.float().t()
    wanted = targets[asked].to(device)
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu()
    likeliest = (logits.argmax(-1) == wanted).cpu()
    counts = [count for _, count in pairs]
    return [
        LogLikelihood(float(known.sum()), bool(is_first.all()))
        for known, is_first in zip(chosen.split(counts), likeliest.split(counts), strict=True)
    ]


def _encoded(writer: LanguageModel, beginning: str, ending: str) -> tuple[list[int], int]:
    """The ids of both, as many as the model has places for, and how many are the ending's.

    Blanks at the end of the beginning belong to the ending: they are a part of its first token. An
    empty beginning is that of an empty prompt.
    """
    whole = writer.encode(beginning + ending)
    known = writer.encode(beginning.rstrip())
    count = max(1, len(whole) - len(known))
    if not known:
        whole = [*writer.encode_prompt(""), *whole]
    whole = whole[-(writer.model.config.block_size + 1) :]
    return whole, min(count, len(whole) - 1)


def _cleaned(text: str) -> str:
    """Without the marks that WikiHow's texts have kept."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _share(name: str, right: Sequence[bool]) -> dict[str, float]:
    """A share with its standard error."""
    share = sum(right) / len(right)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(1, len(right) - 1))}
