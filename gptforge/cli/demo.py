"""`gptforge demo RUN`: the web page."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.errors import UserError


@dataclass(frozen=True)
class DemoArgs:
    """Serve a web page to generate text with a trained model and to watch its training."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint folder or exported model."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: reachable from other machines."""
    port: int = 0
    """Port; 0: the first free one from 7860 on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    allowed_hosts: str = ""
    """Host names, separated by commas, under which others may reach the page; *: any."""


def main(argv: list[str]) -> int:
    """Serve until interrupted; returns the exit code."""
    args = parse_args(DemoArgs, argv, "gptforge demo")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port must be 0 to 65535, not {args.port}")
    from gptforge.demo.launch import launch

    names = [name for word in args.allowed_hosts.split(",") if (name := word.strip())]
    launch(args.run, host=args.host, port=args.port, device=args.device, allowed_hosts=names)
    return 0
