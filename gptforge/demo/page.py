"""The layout of the page, and what its buttons do. Gradio draws it, wholly from this machine."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gptforge.demo.writing as bounds
from gptforge import costs
from gptforge.demo.curves import training
from gptforge.demo.paper import blank_paper, legend, note, paper
from gptforge.demo.writing import Progress, Writers, write
from gptforge.errors import UserError
from gptforge.generate.sampling import Sampling

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


def build_page(writers: Writers, *, run: str, title: str, total: int) -> Any:
    """The page as a Gradio Blocks, with its queue.

    Args:
        writers: the models of the run.
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
        seed: float | None,
    ) -> Iterator[tuple[str, str]]:
        # A text that a visitor can have again: the seed is told with it.
        chosen = random.randrange(10**6) if seed is None else int(seed)
        yield paper(prompt, [], is_writing=True), note("reading the prompt …")
        try:
            steps = write(
                writers.get(name),
                prompt,
                max_new_tokens=int(length),
                sampling=Sampling(float(temperature), int(top_k), float(top_p)),
                seed=chosen,
            )
            for progress in steps:
                page = paper(prompt, progress.tokens, is_writing=not progress.is_done)
                yield page, note(_told(progress, chosen))
        except UserError as error:
            yield blank_paper(), note(str(error), is_error=True)

    model = writers.get(writers.names()[0])
    c, names = model.model.config, writers.names()
    about = (
        f"GPT-2 · {_parameters(costs.parameters(c))} parameters · {c.n_layer} layers · "
        f"{model.tokenizer.name} tokens · {c.block_size} of context"
    )
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f'<header><div class="mark">g</div><div><h1>{title}</h1><p>{about}</p></div></header>',
            elem_id="head",
        )
        with gr.Tabs():
            with gr.Tab("Write"), gr.Row(elem_id="desk"):
                with gr.Column(scale=4, min_width=300, elem_id="ask"):
                    prompt = gr.Textbox(
                        value=_fitting(model, EXAMPLES)[0],
                        label="Beginning",
                        lines=4,
                        max_lines=10,
                        max_length=bounds.LONGEST_PROMPT,
                        placeholder="Type a few words …",
                        elem_id="prompt",
                    )
                    with gr.Row(elem_id="examples"):
                        for text in _fitting(model, EXAMPLES):
                            label = text.replace("\n", " ")
                            chip = gr.Button(label, size="sm", elem_classes="chip", min_width=0)
                            chip.click(
                                lambda text=text: text, None, prompt, queue=False, api_name=False
                            )
                    with gr.Row(elem_id="go"):
                        start = gr.Button(
                            "Write", variant="primary", elem_id="write", min_width=120
                        )
                        stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    with gr.Accordion("Settings", open=False, elem_id="settings"):
                        which = gr.Dropdown(names, value=names[0], label="Checkpoint")
                        length = gr.Slider(
                            10, bounds.MOST_TOKENS, 300, step=10, label="Length, tokens"
                        )
                        heat = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature")
                        top_k = gr.Slider(
                            0, 200, min(200, model.tokenizer.size), step=1, label="Top-k (0: all)"
                        )
                        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                        seed = gr.Number(
                            None,
                            label="Seed (empty: another text each time)",
                            precision=0,
                            minimum=0,
                        )
                with gr.Column(scale=6, min_width=300, elem_id="sheet"):
                    out = gr.HTML(blank_paper(), elem_id="out")
                    told = gr.HTML("", elem_id="told")
                    with gr.Row(elem_id="below"):
                        gr.HTML(legend(), elem_id="legend")
                        tint = gr.Checkbox(True, label="show", elem_id="tint", min_width=0)
            with gr.Tab("Training"):
                curves = gr.HTML(training(Path(run), total=total), elem_id="curves")
                clock = gr.Timer(3)
                clock.tick(
                    lambda: training(Path(run), total=total),
                    None,
                    curves,
                    queue=False,
                    show_progress="hidden",
                    api_name=False,
                )
        gr.HTML("<footer>Made with GPT-Forge. Nothing you type leaves this machine.</footer>")
        settings = [prompt, which, length, heat, top_k, top_p, seed]
        event = gr.on(
            [start.click, prompt.submit],
            answer,
            settings,
            [out, told],
            concurrency_limit=bounds.AT_ONCE,
            show_progress="hidden",
            trigger_mode="once",
            api_name="write",
        )
        stop.click(_stopped, None, told, cancels=[event], queue=False, api_name=False)
        tint.change(None, tint, None, js=TOGGLE_TINT)
        page.load(lambda: gr.Dropdown(choices=writers.names()), None, which, api_name=False)
    page.queue(max_size=bounds.WAITING, default_concurrency_limit=bounds.AT_ONCE)
    return page


def _stopped() -> str:
    return note("stopped")


def _told(progress: Progress, seed: int) -> str:
    count = len(progress.tokens)
    rate = f"{count / progress.seconds:,.0f} tokens a second" if progress.seconds > 0 else ""
    parts = [f"{count} tokens", rate, f"seed {seed}", progress.remark]
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


def _parameters(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e8 else f"{count / 1e6:,.0f}M"
