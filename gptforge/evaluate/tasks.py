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

from gptforge.generate.language_model import LanguageModel
from gptforge.hardware import Precision, autocast

TOKENS_AT_ONCE = 8192
"""That go through the model together, padding and all."""


@dataclass(frozen=True)
class Question:
    """A beginning and its possible endings, one of which is right."""

    beginning: str
    endings: tuple[str, ...]
    """Each with the blank before it."""
    right: int = 0


@dataclass(frozen=True)
class Answer:
    """How likely the model finds an ending."""

    logprob: float
    """Of all its tokens, in nats."""
    is_likeliest: bool
    """Whether each token is the one that the model would have taken."""


@dataclass(frozen=True)
class Task:
    """A kind of question: how a row of its data reads, and what the answers come to."""

    read: Callable[[Mapping[str, Any]], Question]
    score: Callable[[Sequence[Question], Sequence[Sequence[Answer]]], dict[str, float]]


def read_hellaswag(row: Mapping[str, Any]) -> Question:
    """A row of HellaSwag's; those without a label are the test that nobody may know."""
    second = str(row["ctx_b"])
    context = f"{row['ctx_a']} {second[:1].upper()}{second[1:].lower()}"
    beginning = _cleaned(f"{row['activity_label']}: {context}")
    endings = tuple(f" {_cleaned(ending)}" for ending in row["endings"])
    right = int(row["label"])
    if not 0 <= right < len(endings):
        raise ValueError(f"label {right}")
    return Question(beginning, endings, right)


def read_lambada(row: Mapping[str, Any]) -> Question:
    """A row of LAMBADA's: the last word is the ending."""
    beginning, blank, word = str(row["text"]).rpartition(" ")
    if not word or not beginning:
        raise ValueError("no last word")
    return Question(beginning, (blank + word,))


def score_hellaswag(
    questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Shares that were answered rightly, by likelihood and by likelihood a character."""
    plain, by_length = [], []
    for question, given in zip(questions, answers, strict=True):
        sums = [answer.logprob for answer in given]
        # The blank before an ending is none of its characters.
        lengths = [max(1, len(ending) - 1) for ending in question.endings]
        each = [total / length for total, length in zip(sums, lengths, strict=True)]
        plain.append(sums.index(max(sums)) == question.right)
        by_length.append(each.index(max(each)) == question.right)
    return {**_share("acc", plain), **_share("acc_norm", by_length)}


def score_lambada(
    questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Share of last words that the model would have written, and its perplexity over all."""
    known = [given[0].is_likeliest for given in answers]
    mean = sum(given[0].logprob for given in answers) / len(answers)
    return {**_share("acc", known), "perplexity": math.exp(min(-mean, 700.0))}


TASKS = {
    "hellaswag": Task(read_hellaswag, score_hellaswag),
    "lambada": Task(read_lambada, score_lambada),
}


def answer(
    writer: LanguageModel,
    questions: Sequence[Question],
    precision: Precision,
    *,
    asked: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Answer]]:
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
        _encoded(writer, question.beginning, ending)
        for question in questions
        for ending in question.endings
    ]
    found = iter(likelihoods(writer, pairs, precision, asked=asked))
    return [[next(found) for _ in question.endings] for question in questions]


@torch.inference_mode()
def likelihoods(
    writer: LanguageModel,
    pairs: Sequence[tuple[list[int], int]],
    precision: Precision,
    *,
    asked: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """How likely endings are, each the last ids of a text: its ids, and how many are the ending's.

    A text has at most one id more than the model has places for.
    """
    # Of like lengths together, the longest first: memory runs out at once or not at all.
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
    found: dict[int, Answer] = {}
    writer.model.eval()
    while order:
        width = len(pairs[order[0]][0]) - 1
        size = max(1, TOKENS_AT_ONCE // width)
        batch, order = order[:size], order[size:]
        found |= zip(batch, _batch(writer, [pairs[i] for i in batch], precision), strict=True)
        asked(len(found), len(pairs))
    return [found[number] for number in range(len(pairs))]


def _batch(
    writer: LanguageModel, pairs: Sequence[tuple[list[int], int]], precision: Precision
) -> list[Answer]:
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
        hidden = writer.model.hidden(inputs.to(device))[asked.to(device)]
    # In float32: rounded to bfloat16, the likeliest token is often one of several. The table may
    # have more rows than there are ids.
    table = writer.model.lm_head.weight[: writer.tokenizer.size]
    logits: Tensor = hidden.float() @ table.float().t()
    wanted = targets[asked].to(device)
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu()
    likeliest = (logits.argmax(-1) == wanted).cpu()
    counts = [count for _, count in pairs]
    return [
        Answer(float(known.sum()), bool(is_first.all()))
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
        whole = [*writer.prompt_ids(""), *whole]
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
