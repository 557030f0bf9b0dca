"""The layout of the page, and what its buttons do. Gradio draws it, wholly from this machine."""

import functools
import math
import random
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gptforge.demo.sessions as bounds
from gptforge.demo.request_limit import EventStreams
from gptforge.demo.sessions import GenerationProgress, ModelCache, generate_with_limits
from gptforge.demo.token_html import (
    render_legend,
    render_placeholder,
    render_status,
    render_tokens,
)
from gptforge.demo.training_tab import render_training
from gptforge.errors import UserError
from gptforge.estimate import formulas
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
# A check box changes how the page looks, not what was written: no need to ask the server.
TOGGLE_TINT = "(on) => { document.getElementById('out').classList.toggle('plain', !on); }"


def build_page(
    models: ModelCache, event_streams: EventStreams, *, run: str, title: str, max_steps: int
) -> Any:
    """The page as a Gradio Blocks, with its queue.

    Args:
        writers: the models of the run.
        listeners: which visitors still fetch what is written for them.
        run: the run folder, for its curves.
        title: what the page is called.
        total: updates that the run is to make.
    """
    import gradio as gr

    def answer(
        prompt: str,
        name: str,
        length: float,
        temperature: float,
        top_k: float,
        top_p: float,
        seed: str,
        request: gr.Request,
    ) -> Iterator[tuple[str, str]]:
        session = request.session_hash
        if not event_streams.wait_until_connected(session):
            return
        try:
            # What a program sends may be of any type.
            prompt = check_str(prompt, "the prompt")
            check_utf8(prompt, "the prompt")
            numbers = [_number(n) for n in (length, temperature, top_k, top_p)]
            yield (
                render_tokens(prompt, [], is_generating=True),
                render_status("reading the prompt …"),
            )
            # A text that a visitor can have again: the seed is told with it.
            chosen = _seed(check_str(seed, "the seed"))
            steps = generate_with_limits(
                models.get(check_str(name, "the checkpoint")),
                prompt,
                max_new_tokens=int(numbers[0]),
                params=SamplingParams(numbers[1], int(numbers[2]), numbers[3]),
                seed=chosen,
            )
            for progress in steps:
                if not event_streams.is_connected(session):
                    return
                page = render_tokens(prompt, progress.tokens, is_generating=not progress.is_done)
                yield page, render_status(_told(progress, chosen))
        except UserError as error:
            yield render_placeholder(), render_status(str(error), kind="error")

    model = models.get(models.names()[0])
    c, names = model.model.config, models.names()
    about = (
        f"GPT-2 · {format_count(formulas.num_params(c))} parameters · {c.n_layer} layers · "
        f"{model.tokenizer.name} tokens · {c.block_size} of context"
    )
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f'<header><div class="mark">g</div><div><h1>{escape(title)}</h1>'
            f"<p>{about}</p></div></header>",
            elem_id="head",
        )
        # Named and chosen: Gradio otherwise shows the first tab that its page happens to hear of.
        with gr.Tabs(selected="write"):
            with gr.Tab("Write", id="write"), gr.Row(elem_id="desk"):
                with gr.Column(scale=4, min_width=300, elem_id="ask"):
                    prompt = gr.Textbox(
                        value=_fitting(model, EXAMPLES)[0],
                        label="Beginning",
                        lines=4,
                        max_lines=10,
                        max_length=bounds.MAX_PROMPT_CHARS,
                        placeholder="Type a few words …",
                        elem_id="prompt",
                    )
                    with gr.Row(elem_id="examples"):
                        for text in filter(None, _fitting(model, EXAMPLES)):
                            label = text.replace("\n", " ")
                            chip = gr.Button(label, size="sm", elem_classes="chip", min_width=0)
                            chip.click(
                                lambda text=text: text,
                                None,
                                prompt,
                                queue=False,
                                api_visibility="private",
                            )
                    with gr.Row(elem_id="go"):
                        start = gr.Button(
                            "Write", variant="primary", elem_id="write", min_width=120
                        )
                        stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    with gr.Accordion("Settings", open=False, elem_id="settings"):
                        which = gr.Dropdown(names, value=names[0], label="Checkpoint")
                        length = gr.Slider(
                            10, bounds.MAX_NEW_TOKENS, 300, step=10, label="Length, tokens"
                        )
                        heat = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature")
                        top_k = gr.Slider(
                            0,
                            200,
                            min(200, model.tokenizer.vocab_size),
                            step=1,
                            label="Top-k (0: all)",
                        )
                        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                        seed = gr.Textbox(
                            "", label="Seed", placeholder="another text each time", max_length=19
                        )
                with gr.Column(scale=6, min_width=300, elem_id="sheet"):
                    out = gr.HTML(render_placeholder(), elem_id="out")
                    told = gr.HTML("", elem_id="told")
                    with gr.Row(elem_id="below"):
                        tint = gr.Checkbox(True, label="Tint", elem_id="tint", min_width=0)
                        gr.HTML(render_legend(), elem_id="legend")
            with gr.Tab("Training", id="training"):
                drawn = functools.partial(_curves, Path(run), max_steps)
                curves = gr.HTML(drawn(), elem_id="curves")
                clock = gr.Timer(3)
                clock.tick(
                    drawn,
                    None,
                    curves,
                    queue=False,
                    show_progress="hidden",
                    api_visibility="private",
                )
        gr.HTML("<footer>Made with GPT-Forge. Nothing you type is kept or passed on.</footer>")
        settings = [prompt, which, length, heat, top_k, top_p, seed]
        event = gr.on(
            [start.click, prompt.submit],
            answer,
            settings,
            [out, told],
            concurrency_limit=bounds.MAX_CONCURRENT,
            show_progress="minimal",
            show_progress_on=told,
            trigger_mode="once",
            api_visibility="private",
        )
        # Told of only when it has stopped, or a last frame would come after and say otherwise.
        stopping = stop.click(
            None, None, None, cancels=[event], queue=False, api_visibility="private"
        )
        stopping.then(
            _stopped, None, told, queue=False, show_progress="hidden", api_visibility="private"
        )
        tint.change(None, tint, None, js=TOGGLE_TINT)
        page.load(
            lambda: gr.Dropdown(choices=models.names()), None, which, api_visibility="private"
        )
    page.queue(max_size=bounds.MAX_QUEUED, default_concurrency_limit=bounds.MAX_CONCURRENT)
    return page


def _curves(run: Path, total: int) -> str:
    """The curves, drawn anew only where the run went on: each open page asks every 3 seconds."""
    try:
        seen = (run / "metrics.jsonl").stat()
    except OSError:
        return render_training(run, max_steps=total)
    return _drawn(run, total, seen.st_mtime_ns, seen.st_size)


@functools.lru_cache(maxsize=1)
def _drawn(run: Path, total: int, when: int, size: int) -> str:
    return render_training(run, max_steps=total)


def _stopped() -> str:
    return render_status("stopped", kind="stopped")


def _seed(text: str) -> int:
    if not text.strip():
        return random.randrange(10**6)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the seed is a whole number, not {text.strip()}") from None


def _number(given: Any) -> float:
    if not is_number(given) or not math.isfinite(given):
        raise UserError("length, temperature, top-k and top-p must be numbers")
    return float(given)


def _told(progress: GenerationProgress, seed: int) -> str:
    count = len(progress.tokens)
    rate = f"{count / progress.seconds:,.0f} tokens a second" if progress.seconds > 0 else ""
    parts = [f"{count} tokens", rate, f"seed {seed}", progress.note]
    return " · ".join(part for part in parts if part)


def _fitting(model: Any, texts: tuple[str, ...]) -> list[str]:
    """The examples that the model's tokenizer can write; a bare line end where there is none."""
    fitting = []
    for text in texts:
        try:
            model.encode(text)
        except UserError:
            continue
        fitting.append(text)
    return fitting or [""]
