"""Start the page."""

import os
from collections.abc import Sequence
from pathlib import Path

from gptforge.builders.export_model import model_title, read_origin
from gptforge.builders.load_model import limit_threads, load
from gptforge.demo.port import find_free_port
from gptforge.demo.sessions import ModelCache
from gptforge.errors import RunError, require_package
from gptforge.inference.language_model import LanguageModel
from gptforge.printable import safe_print

SERIF = ("Iowan Old Style", "Palatino Linotype", "Palatino", "Georgia", "serif")
SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def launch(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "auto",
    title: str = "",
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve the page until it is interrupted.

    Args:
        run: run folder, checkpoint folder or exported model.
        host: address to listen on; 0.0.0.0 is reachable from other machines.
        port: 0: the first free one from 7860.
        device: auto, cpu, cuda, cuda:N or mps.
        title: of the page; empty: the name of the run folder.
        allowed_hosts: names under which the page is served, besides this machine's; `*` for any.

    Raises:
        UserError: for a missing model or package, or a host that is no address of this machine.
        RunError: if the port is taken.
    """
    require_package("gradio", extra="demo")
    port = find_free_port(host, port)
    # Before the import: no telemetry.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr
    from starlette.middleware import Middleware

    from gptforge.demo.api import routes
    from gptforge.demo.page import STYLE, build_page
    from gptforge.demo.request_limit import EventStreams, RequestFilter

    def load_model(folder: str) -> LanguageModel:
        model = load(folder, device=device)
        model.warn_on_context_shift = False  # the page says it
        limit_threads(model)
        return model

    origin, title = read_origin(run), title or model_title(run)
    models, event_streams = ModelCache(load_model, run), EventStreams()
    max_steps = origin.config.max_steps if origin else 0
    page = build_page(models, event_streams, run=run, title=title, max_steps=max_steps)
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=SANS,
        font_mono=MONOSPACE,
    )
    serif = ", ".join(f'"{font}"' for font in SERIF)
    middleware = Middleware(
        RequestFilter, allowed_hosts={host, *allowed_hosts}, event_streams=event_streams
    )
    try:
        _, address, _ = page.launch(
            # An IPv6 address before a port needs brackets.
            server_name=f"[{host.strip('[]')}]" if ":" in host else host,
            server_port=port,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=STYLE.read_text(encoding="utf-8").replace("SERIF", serif),
            favicon_path=Path(__file__).with_name("favicon.svg"),
            # The page shows user errors itself; Python's messages are not for visitors.
            show_error=False,
            app_kwargs={"middleware": [middleware], "routes": routes(models, Path(run))},
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        # The port was taken meanwhile.
        raise RunError(
            f"the page cannot be served at {host}:{port}: try again, or choose another --port "
            f"({error})"
        ) from None
    safe_print(f"{title}: {address} (Ctrl-C ends it)")
    page.block_thread()
