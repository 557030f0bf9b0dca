"""Starting the page, on this machine alone unless asked otherwise."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from gptforge.builders.export_model import model_title, read_origin
from gptforge.builders.load_model import limit_threads, load
from gptforge.demo.page import STYLE, build_page
from gptforge.demo.port import find_free_port
from gptforge.demo.request_limit import EventStreams, RequestFilter
from gptforge.demo.sessions import ModelCache
from gptforge.errors import RunError, require_package
from gptforge.inference.language_model import LanguageModel
from gptforge.printable import safe_print


def launch(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "auto",
    title: str = "",
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Show the page until it is interrupted.

    Args:
        run: run folder, checkpoint folder or exported model.
        host: address to listen at; 0.0.0.0 lets others in.
        port: 0: the first free one from 7860 on.
        device: auto, cpu, cuda, cuda:N or mps.
        title: what the page is called; empty: as the run folder is.
        allowed_hosts: names that the page may be asked for under, besides this machine's own;
            `*` for any.

    Raises:
        UserError: if there is no model, the host is none of this machine, or Gradio is not
            installed.
        RunError: if the port is taken.
    """
    require_package("gradio", extra="demo")
    port = find_free_port(host, port)
    # Before it is imported: no word about us to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr
    from starlette.middleware import Middleware

    from gptforge.demo.completions import routes

    def open_model(folder: str, say: Callable[[str], None]) -> LanguageModel:
        writer = load(folder, device=device, log=say)
        limit_threads(writer)
        return writer

    origin, title = read_origin(run), title or model_title(run)
    writers, listeners = ModelCache(open_model, run), EventStreams()
    page = build_page(
        writers,
        listeners,
        run=run,
        title=title,
        max_steps=origin.config.max_steps if origin else 0,
    )
    serif = ["Iowan Old Style", "Palatino Linotype", "Palatino", "Georgia", "serif"]
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=sans,
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    style = STYLE.read_text(encoding="utf-8").replace("SERIF", ", ".join(f'"{f}"' for f in serif))
    hosts = {host, *allowed_hosts}
    try:
        _, address, _ = page.launch(
            # An address with colons can stand before a port only in brackets.
            server_name=f"[{host.strip('[]')}]" if ":" in host else host,
            server_port=port,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=style,
            favicon_path=Path(__file__).with_name("favicon.svg"),
            # Mistakes are said by the page itself; what Python says of the rest is for nobody.
            show_error=False,
            app_kwargs={
                "middleware": [
                    Middleware(RequestFilter, allowed_hosts=hosts, event_streams=listeners)
                ],
                "routes": routes(writers),
            },
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        # Somebody was faster.
        raise RunError(
            f"the page cannot be shown at {host}:{port}: try again, or choose another --port "
            f"({error})"
        ) from None
    safe_print(f"{title}: {address} (Ctrl-C ends it)")
    page.block_thread()
