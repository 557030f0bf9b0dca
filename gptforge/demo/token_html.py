"""Generated tokens as HTML, each tinted by its probability."""

from collections.abc import Sequence
from html import escape
from math import exp
from typing import Literal

from gptforge.inference.language_model import Token
from gptforge.printable import printable_text

PROBABILITY_BINS = (0.05, 0.15, 0.35, 0.65, 0.9)
"""Boundaries of the six tints, the first for the least likely tokens."""
BAR_WIDTH = 12


def render_tokens(prompt: str, tokens: Sequence[Token], *, is_generating: bool) -> str:
    """The prompt, the tokens, and a caret while there are more to come."""
    spans = "".join(_span(token) for token in tokens)
    caret = '<span class="caret"></span>' if is_generating else ""
    return f'<div class="output"><span class="prompt">{_html(prompt)}</span>{spans}{caret}</div>'


def render_placeholder() -> str:
    """The output before any text is generated."""
    return (
        '<div class="output blank"><p>Generated text appears here.</p>'
        "<p>Point at a word, or tap it, to see its probability and the most likely alternatives."
        "</p></div>"
    )


def render_legend() -> str:
    """The tints in order."""
    boxes = "".join(f'<i class="s{n}"></i>' for n in range(len(PROBABILITY_BINS) + 1))
    return f'<div class="legend"><span>unlikely</span>{boxes}<span>certain</span></div>'


def render_status(text: str, *, kind: Literal["", "error", "stopped"] = "") -> str:
    """A line below the output."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<div class="note {kind}"{role}>{escape(text)}</div>'


def _span(token: Token) -> str:
    probability = exp(token.logprob)
    tint = sum(probability >= bound for bound in PROBABILITY_BINS)
    text = _html(token.text).replace("\n", '<b class="line">↵</b>\n')
    tip = escape(_tip(token, probability), quote=True)
    return f'<span class="t s{tint}" tabindex="0" data-tip="{tip}">{text}</span>'


def _tip(token: Token, probability: float) -> str:
    """The probabilities of the token and of the most likely ones, with bars."""
    names = [_visible(text) for text, _ in token.top_logprobs]
    width = max(map(len, names), default=0)
    lines = [f"{_visible(token.text)}  probability {probability:.1%}", ""]
    for name, (_, logprob) in zip(names, token.top_logprobs, strict=True):
        p = exp(logprob)
        lines.append(f"{name:<{width}} {p:>6.1%} {'█' * round(p * BAR_WIDTH)}".rstrip())
    return "\n".join(lines)


def _visible(text: str) -> str:
    """A token with visible spaces and line breaks."""
    symbols = {"": "…", "\n": "↵", " ": "␣"}
    return symbols.get(text) or printable_text(text).replace("\n", "↵").replace(" ", "␣")


def _html(text: str) -> str:
    """Escaped text, without control characters such as those that reverse the direction."""
    return escape(printable_text(text))
