"""What was written, as HTML: each token tinted by how sure the model was of it."""

from collections.abc import Sequence
from html import escape
from math import exp
from typing import Literal

from gptforge.inference.language_model import Token
from gptforge.printable import printable_text

PROBABILITY_BINS = (0.05, 0.15, 0.35, 0.65, 0.9)
"""Probabilities at which the tint changes: six of them, the first is the least sure."""
BAR = 12


def render_tokens(prompt: str, tokens: Sequence[Token], *, is_generating: bool) -> str:
    """The prompt, the tokens, and a caret while there are more to come."""
    spans = "".join(_span(token) for token in tokens)
    caret = '<span class="caret"></span>' if is_generating else ""
    return f'<div class="paper"><span class="prompt">{_html(prompt)}</span>{spans}{caret}</div>'


def render_placeholder() -> str:
    """The page before anything is written."""
    return (
        '<div class="paper blank"><p>What the model writes appears here.</p>'
        "<p>Point at a word, or tap it, to see how sure the model was, and what else it had "
        "in mind.</p></div>"
    )


def render_legend() -> str:
    """The tints in order, with what they mean."""
    boxes = "".join(f'<i class="s{n}"></i>' for n in range(len(PROBABILITY_BINS) + 1))
    return f'<div class="legend"><span>guessing</span>{boxes}<span>certain</span></div>'


def render_status(text: str, *, kind: Literal["", "error", "stopped"] = "") -> str:
    """A line below the page."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<div class="note {kind}"{role}>{escape(text)}</div>'


def _span(token: Token) -> str:
    sure = exp(token.logprob)
    tint = sum(sure >= step for step in PROBABILITY_BINS)
    text = _html(token.text).replace("\n", '<b class="line">↵</b>\n')
    tip = escape(_tip(token, sure), quote=True)
    return f'<span class="t s{tint}" tabindex="0" data-tip="{tip}">{text}</span>'


def _tip(token: Token, sure: float) -> str:
    """Its own probability, then those of the likeliest, with bars."""
    names = [_shown(text) for text, _ in token.top_logprobs]
    wide = max(map(len, names), default=0)
    lines = [f"{_shown(token.text)}  was given {sure:.1%}", ""]
    for name, (_, logprob) in zip(names, token.top_logprobs, strict=True):
        share = exp(logprob)
        lines.append(f"{name:<{wide}} {share:>6.1%} {'█' * round(share * BAR)}".rstrip())
    return "\n".join(lines)


def _shown(text: str) -> str:
    """A token that can be seen: spaces and line ends too."""
    named = {"": "…", "\n": "↵", " ": "␣"}
    return named.get(text) or printable_text(text).replace("\n", "↵").replace(" ", "␣")


def _html(text: str) -> str:
    """Text for a page: no mark-up in it, and nothing that turns the page's own text around."""
    return escape(printable_text(text))
