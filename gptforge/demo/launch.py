"""Start the page: an address, a free port, the model and the server."""

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gptforge.builders.export_model import is_of_run, model_title
from gptforge.builders.load_model import limit_threads, load
from gptforge.builders.prompts import suggest_prompts
from gptforge.checkpoint.format import read_checkpoint, read_config
from gptforge.convert.hf import is_hf_dir
from gptforge.errors import RunError, UserError, require_package
from gptforge.estimate import formulas
from gptforge.inference.language_model import LanguageModel
from gptforge.printable import safe_print
from gptforge.report.format import format_count

STATIC = Path(__file__).with_name("static")
CHARACTER_TOKENIZERS = ("char", "byte")
FIRST_PORT = 7860
NUM_PORTS = 100
HOST_HINT = "give 127.0.0.1 for this machine only, 0.0.0.0 to allow others"


def launch(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "auto",
    title: str = "",
    prompts: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve the page until it is interrupted; arguments are the flags of `gptforge demo`.

    Args:
        run: run folder, checkpoint folder or exported model.
        host: address to listen on; 0.0.0.0 is reachable from other machines.
        port: 0: the first free one from 7860.
        device: as for training.
        title: of the page; empty: the name of the run folder.
        prompts: to suggest; empty: from the training text, if it is on this machine.
        allowed_hosts: names under which the page is served, besides this machine's; `*` for any.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the server has stopped.
    """
    for package in ("starlette", "uvicorn", "pydantic"):
        require_package(package, extra="demo")
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    from gptforge.demo import api, run_data
    from gptforge.demo.request_filter import RequestFilter

    listener = listen(host, port)

    def load_model(folder: str) -> LanguageModel:
        model = load(folder, device=device)
        model.warn_on_context_shift = False  # the page says it
        limit_threads(model)
        return model

    title = title or model_title(run)
    models = run_data.ModelCache(load_model, run)
    model = models.get(models.names()[0])
    c = model.model.config
    run_config = None  # an imported model has none
    if not is_hf_dir(Path(run)):
        run_config = read_checkpoint(run, lambda p: read_config(p) if is_of_run(p) else None)
    suggested = prompts or suggest_prompts(run, run_config)
    about = {
        "title": title,
        "about": f"GPT-2 · {format_count(formulas.num_params(c))} parameters · {c.n_layer} layers"
        f" · {model.tokenizer.name} tokenizer · context {c.block_size}",
        "context": c.block_size,
        "prompts": [text for text in suggested if _is_encodable(model, text)],
        "tint": model.tokenizer.name not in CHARACTER_TOKENIZERS,
        "max_prompt_chars": api.MAX_PROMPT_CHARS,
        "max_new_tokens": api.MAX_NEW_TOKENS,
        "max_logprobs": api.MAX_LOGPROBS,
    }
    app = Starlette(
        routes=[
            *api.routes(models, lambda: server.should_exit),
            *run_data.routes(models, Path(run), about=about),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ]
    )
    config = uvicorn.Config(
        RequestFilter(app, allowed_hosts={host, *allowed_hosts}),
        lifespan="off", ws="none", log_level="error", timeout_graceful_shutdown=5,
    )  # fmt: skip
    address, bound_port = listener.getsockname()[:2]
    name = f"[{address}]" if ":" in address else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # Not before: Ctrl-C while asyncio starts would leave a traceback.
            safe_print(f"{title}: http://{name}:{bound_port} (Ctrl-C ends it)")

    server = Server(config)
    asyncio.run(server.serve(sockets=[listener]))


def _is_encodable(model: LanguageModel, text: str) -> bool:
    with suppress(UserError):
        return bool(model.encode(text))
    return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the given port, or for 0 on the first free one from 7860."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: unknown address: {HOST_HINT}") from None
    family, *_, (address, _, *scope) = found[0]
    is_dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    ports = [port] if port else range(FIRST_PORT, FIRST_PORT + NUM_PORTS)
    for candidate in ports:
        try:
            return socket.create_server(
                (address, candidate, *scope), family=family, dualstack_ipv6=is_dual
            )
        except OSError as error:
            # On Windows, EACCES means that another program has the port exclusively.
            if error.errno == errno.EADDRINUSE or (error.errno == errno.EACCES and os.name == "nt"):
                continue
            if error.errno == errno.EACCES:
                raise UserError(
                    f"--port {candidate}: not permitted to listen there: choose one above 1023"
                ) from None
            problem = f"not an address of this machine ({os.strerror(error.errno or 0)})"
            raise UserError(f"--host {host}: {problem}: {HOST_HINT}") from None
    if port:
        raise RunError(f"--port {port}: taken by another program: choose another, or leave it out")
    raise RunError(f"the ports {ports[0]} to {ports[-1]} are all taken: choose another --port")
