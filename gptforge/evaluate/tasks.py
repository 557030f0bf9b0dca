"""HellaSwag (Zellers et al., 2019) and LAMBADA (Paperno et al., 2016, as in Radford et al., 2019).

Examples and scores are those of EleutherAI's lm-evaluation-harness, tasks `hellaswag` and
`lambada_openai`, zero-shot, so that scores can be compared with published ones.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gptforge.device import Precision, autocast
from gptforge.inference.language_model import LanguageModel

MAX_BATCH_TOKENS = 8192  # in a forward pass, with padding


@dataclass(frozen=True)
class Example:
    """A context and its possible continuations, each with its leading blank; `label` is right."""

    context: str
    choices: tuple[str, ...]
    label: int = 0


class LogLikelihood(NamedTuple):
    """How likely a model finds a choice."""

    loglikelihood: float  # of all its tokens, in nats
    is_greedy: bool  # whether each token is the most likely one


Results = Sequence[Sequence[LogLikelihood]]  # of the choices of each example


@dataclass(frozen=True)
class Task:
    """How to parse a row of a task's data, and how to score the results of all examples."""

    parse: Callable[[Mapping[str, Any]], Example]
    score: Callable[[Sequence[Example], Results], dict[str, float]]


def parse_hellaswag(row: Mapping[str, Any]) -> Example:
    """Parse a row of HellaSwag; those of the test split have no label and raise ValueError."""
    second = str(row["ctx_b"])
    context = f"{row['ctx_a']} {second[:1].upper()}{second[1:].lower()}"
    choices = tuple(f" {_clean_wikihow(ending)}" for ending in row["endings"])
    label = int(row["label"])
    if not 0 <= label < len(choices):
        raise ValueError(f"label {label}")
    return Example(_clean_wikihow(f"{row['activity_label']}: {context}"), choices, label)


def parse_lambada(row: Mapping[str, Any]) -> Example:
    """Parse a row of LAMBADA: the last word is the only choice."""
    context, blank, word = str(row["text"]).rpartition(" ")
    if not word or not context:
        raise ValueError("no last word")
    return Example(context, (blank + word,))


def score_hellaswag(examples: Sequence[Example], results: Results) -> dict[str, float]:
    """Return the accuracy by log-likelihood, and by log-likelihood per character."""
    correct, correct_norm = [], []
    for example, choices in zip(examples, results, strict=True):
        sums = [choice.loglikelihood for choice in choices]
        # The harness does not count the leading blank.
        lengths = [max(1, len(choice) - 1) for choice in example.choices]
        means = [total / length for total, length in zip(sums, lengths, strict=True)]
        correct.append(sums.index(max(sums)) == example.label)
        correct_norm.append(means.index(max(means)) == example.label)
    return {**_accuracy("acc", correct), **_accuracy("acc_norm", correct_norm)}


def score_lambada(examples: Sequence[Example], results: Results) -> dict[str, float]:
    """Return the share of last words that greedy decoding gives, and their perplexity."""
    mean = sum(choice.loglikelihood for [choice] in results) / len(results)
    correct = [choice.is_greedy for [choice] in results]
    return {**_accuracy("acc", correct), "perplexity": math.exp(min(-mean, 700.0))}


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
    """Return the log-likelihood of every choice of every example."""
    requests = [
        _encode_choice(model, example.context, choice)
        for example in examples
        for choice in example.choices
    ]
    results = iter(loglikelihoods(model, requests, precision, progress=progress))
    return [[next(results) for _ in example.choices] for example in examples]


@torch.inference_mode()
def loglikelihoods(
    model: LanguageModel,
    requests: Sequence[tuple[list[int], int]],
    precision: Precision,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LogLikelihood]:
    """Return the log-likelihood of the last ids of texts.

    A request is the ids of a text, at most block_size + 1, and how many of the last to score.
    `progress` is called after each batch with the requests done, and all.
    """
    # Sorted by length, to pad little; the longest first, so that memory runs out at once or never.
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    results: dict[int, LogLikelihood] = {}
    model.model.eval()
    while order:
        width = len(requests[order[0]][0]) - 1
        size = max(1, MAX_BATCH_TOKENS // width)
        batch, order = order[:size], order[size:]
        scores = _score_batch(model, [requests[i] for i in batch], precision)
        results |= zip(batch, scores, strict=True)
        progress(len(results), len(requests))
    return [results[i] for i in range(len(requests))]


def _score_batch(
    model: LanguageModel, requests: Sequence[tuple[list[int], int]], precision: Precision
) -> list[LogLikelihood]:
    # Padding on the right: attention is causal, so no scored position sees it.
    ids = pad_sequence([torch.tensor(ids) for ids, _ in requests], batch_first=True)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    ends = torch.tensor([[len(ids) - 1] for ids, _ in requests])  # (B, 1)
    counts = [count for _, count in requests]
    positions = torch.arange(targets.size(1))
    is_scored = (positions < ends) & (positions >= ends - torch.tensor(counts)[:, None])
    device = model.device
    with autocast(device, precision):
        hidden = model.model.forward_hidden(inputs.to(device))[is_scored.to(device)]
    # Logits in float32: rounded to bfloat16, several tokens would often share the maximum. Padding
    # rows of the embedding are left out.
    lm_head = model.model.lm_head.weight[: model.tokenizer.vocab_size]
    logits: Tensor = hidden.float() @ lm_head.float().t()
    labels = targets[is_scored].to(device)
    logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0].double().cpu()
    is_greedy = (logits.argmax(-1) == labels).cpu()
    return [
        LogLikelihood(float(values.sum()), bool(greedy.all()))
        for values, greedy in zip(logprobs.split(counts), is_greedy.split(counts), strict=True)
    ]


def _encode_choice(model: LanguageModel, context: str, choice: str) -> tuple[list[int], int]:
    """Return the last block_size + 1 ids of context and choice, and how many are the choice's.

    As in the harness, blanks at the end of the context belong to the choice: they are part of its
    first token. An empty context is an empty prompt.
    """
    ids = model.encode(context + choice)
    context_ids = model.encode(context.rstrip())
    count = max(1, len(ids) - len(context_ids))
    if not context_ids:
        ids = [*model.encode_prompt(""), *ids]
    ids = ids[-(model.model.config.block_size + 1) :]
    return ids, min(count, len(ids) - 1)


def _clean_wikihow(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _accuracy(name: str, correct: Sequence[bool]) -> dict[str, float]:
    share = sum(correct) / len(correct)
    stderr = math.sqrt(share * (1 - share) / max(1, len(correct) - 1))
    return {name: share, f"{name}_stderr": stderr}
