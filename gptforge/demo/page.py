"""The page's layout and event handlers, in Gradio; nothing is loaded from other servers."""

import functools
import math
import random
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import gptforge.demo.sessions as limits
from gptforge.demo.request_limit import EventStreams
from gptforge.demo.sessions import GenerationProgress, ModelCache, generate_with_limits
from gptforge.demo.token_html import render_legend, render_placeholder, render_status, render_tokens
from gptforge.demo.training_tab import training_tab
from gptforge.errors import UserError
from gptforge.estimate import formulas
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.inference.validation import check_str, check_utf8, is_number
from gptforge.report.format import format_count

EXAMPLES = (
    "ROMEO:\nBut soft, what light",
    "HAMLET:\nTo be, or not to be,",
    "LADY MACBETH:\nOut, damned spot!",
    "KING LEAR:\nBlow, winds,",
    "Shall I compare thee",
)
STYLE = Path(__file__).with_name("style.css")
# In the browser: toggling the tint needs no request.
TOGGLE_TINT = "(on) => { document.getElementById('out').classList.toggle('plain', !on); }"


def build_page(
    models: ModelCache, event_streams: EventStreams, *, run: str, title: str, max_steps: int
) -> Any:
    """The page as Gradio Blocks with a queue; `max_steps` are those of the complete run."""
    import gradio as gr

    def generate(
        prompt: str, checkpoint: str, length: float, temperature: float, top_k: float,
        top_p: float, seed: str, request: gr.Request,
    ) -> Iterator[tuple[str, str]]:  # fmt: skip
        session = request.session_hash
        if not event_streams.wait_until_connected(session):
            return
        try:
            # API clients may send values of any type.
            prompt = check_str(prompt, "the prompt")
            check_utf8(prompt, "the prompt")
            length, temperature, top_k, top_p = map(_number, (length, temperature, top_k, top_p))
            status = render_status("reading the prompt …")
            yield render_tokens(prompt, [], is_generating=True), status
            # Shown with the text, so that it can be generated again.
            used_seed = _seed(check_str(seed, "the seed"))
            for progress in generate_with_limits(
                models.get(check_str(checkpoint, "the checkpoint")),
                prompt,
                max_new_tokens=int(length),
                params=SamplingParams(temperature, int(top_k), top_p),
                seed=used_seed,
            ):
                if not event_streams.is_connected(session):
                    return
                output = render_tokens(prompt, progress.tokens, is_generating=not progress.is_done)
                yield output, render_status(_status(progress, used_seed))
        except UserError as error:
            yield render_placeholder(), render_status(str(error), kind="error")

    names = models.names()
    model = models.get(names[0])
    c = model.model.config
    about = (
        f"GPT-2 · {format_count(formulas.num_params(c))} parameters · {c.n_layer} layers · "
        f"{model.tokenizer.name} tokenizer · context {c.block_size}"
    )
    examples = [text for text in EXAMPLES if _is_encodable(model, text)]
    # For events that only change the page: not in the queue, nor in Gradio's API.
    direct: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    heading = f"<div><h1>{escape(title)}</h1><p>{about}</p></div>"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f'<header><div class="mark">g</div>{heading}</header>', elem_id="head")
        # With an id and selected: otherwise Gradio shows whichever tab the browser loads first.
        with gr.Tabs(selected="write"):
            with gr.Tab("Write", id="write"), gr.Row(elem_id="desk"):
                with gr.Column(scale=4, min_width=300, elem_id="ask"):
                    prompt = gr.Textbox(
                        next(iter(examples), ""), label="Prompt", lines=4, max_lines=10,
                        max_length=limits.MAX_PROMPT_CHARS, placeholder="Type a few words …",
                        elem_id="prompt",
                    )  # fmt: skip
                    with gr.Row(elem_id="examples"):
                        for text in examples:
                            label = text.replace("\n", " ")
                            chip = gr.Button(label, size="sm", elem_classes="chip", min_width=0)
                            chip.click(lambda text=text: text, None, prompt, **direct)
                    with gr.Row(elem_id="go"):
                        start = gr.Button(
                            "Write", variant="primary", elem_id="write", min_width=120
                        )
                        stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    with gr.Accordion("Settings", open=False, elem_id="settings"):
                        checkpoint = gr.Dropdown(names, value=names[0], label="Checkpoint")
                        longest = limits.MAX_NEW_TOKENS
                        length = gr.Slider(10, longest, 300, step=10, label="Length, tokens")
                        temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature")
                        max_k = min(200, model.tokenizer.vocab_size)
                        top_k = gr.Slider(0, 200, max_k, step=1, label="Top-k (0: all)")
                        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                        seed = gr.Textbox("", label="Seed", placeholder="random", max_length=19)
                with gr.Column(scale=6, min_width=300, elem_id="sheet"):
                    out = gr.HTML(render_placeholder(), elem_id="out")
                    status = gr.HTML("", elem_id="status")
                    with gr.Row(elem_id="below"):
                        tint = gr.Checkbox(True, label="Tint", elem_id="tint", min_width=0)
                        gr.HTML(render_legend(), elem_id="legend")
            with gr.Tab("Training", id="training"):
                update = functools.partial(training_tab, Path(run), max_steps=max_steps)
                training = gr.HTML(update(), elem_id="curves")
                gr.Timer(3).tick(update, None, training, show_progress="hidden", **direct)
        gr.HTML("<footer>Made with GPT-Forge. Your input is not stored or shared.</footer>")
        event = gr.on(
            [start.click, prompt.submit],
            generate,
            [prompt, checkpoint, length, temperature, top_k, top_p, seed],
            [out, status],
            concurrency_limit=limits.MAX_CONCURRENT,
            show_progress="minimal",
            show_progress_on=status,
            trigger_mode="once",
            api_visibility="private",
        )
        # Say so only after the cancellation: a last update could otherwise overwrite it.
        stopped, hidden = render_status("stopped", kind="stopped"), {"show_progress": "hidden"}
        cancellation = stop.click(None, None, None, cancels=[event], **direct)
        cancellation.then(lambda: stopped, None, status, **hidden, **direct)
        tint.change(None, tint, None, js=TOGGLE_TINT)
        private = {"api_visibility": "private"}
        page.load(lambda: gr.Dropdown(choices=models.names()), None, checkpoint, **private)
    page.queue(max_size=limits.MAX_QUEUED, default_concurrency_limit=limits.MAX_CONCURRENT)
    return page


def _seed(text: str) -> int:
    if not text.strip():
        return random.randrange(10**6)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the seed is a whole number, not {text.strip()}") from None


def _number(value: Any) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise UserError("length, temperature, top-k and top-p must be numbers")
    return float(value)


def _status(progress: GenerationProgress, seed: int) -> str:
    count = len(progress.tokens)
    speed = f"{count / progress.seconds:,.0f} tokens per second" if progress.seconds > 0 else ""
    parts = [f"{count} tokens", speed, f"seed {seed}", progress.note]
    return " · ".join(part for part in parts if part)


def _is_encodable(model: LanguageModel, text: str) -> bool:
    with suppress(UserError):
        return bool(model.encode(text))
    return False
