"""`gptforge demo RUN`: the web page."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from gptforge.cli.flags import parse_args
from gptforge.errors import UserError


@dataclass(frozen=True)
class DemoArgs:
    """Show a page to write with a trained model and to watch it learn."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint folder or exported model."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets others in."""
    port: int = 0
    """Port; 0: the first free one from 7860 on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    allowed_hosts: str = ""
    """Names, separated by commas, under which others reach the page; * for any."""


def demo(args: list[str]) -> int:
    """Parse, show until interrupted; returns the exit code."""
    asked = parse_args(DemoArgs, args, "gptforge demo")
    if not 0 <= asked.port < 65536:
        raise UserError(f"--port must be 0 to 65535, not {asked.port}")
    from gptforge.demo.launch import launch

    names = [name for word in asked.allowed_hosts.split(",") if (name := word.strip())]
    launch(asked.run, host=asked.host, port=asked.port, device=asked.device, allowed_hosts=names)
    return 0
