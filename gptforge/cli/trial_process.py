"""The process of a trial: `gptforge train` that stops, and saves, when the sweep is gone.

    python -m gptforge.cli.trial_process TRAIN_FLAGS...

Its standard input is a pipe that only the sweep holds open. A sweep that is killed cannot stop its
trials; without this they would go on, and block their folders for the next sweep.
"""

import os
import signal
import sys
import threading

from gptforge.cli import main

STDIN = 0
STOP = getattr(signal, "SIGHUP", signal.SIGTERM)
"""The sweep may have sent SIGTERM just before it ended: a second one would cut the save short."""


def stop_with_parent() -> None:
    """Stop this process once standard input ends."""
    # Not sys.stdin: its lock would be held when the interpreter exits.
    while os.read(STDIN, 1):
        pass
    os.kill(os.getpid(), STOP)


if __name__ == "__main__":
    signal.signal(STOP, signal.SIG_DFL)  # inherited from nohup, SIG_IGN would ignore it
    threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.exit(main(["train", *sys.argv[1:]]))
