"""Child processes forked from a server that has imported torch and this package.

They start in hundredths of a second instead of seconds. A fork of the process that runs the tests
would inherit autograd's threads half dead.
"""

import multiprocessing
import threading
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

import pytest

from tests.environment import python_path

_starting = threading.Lock()


def get_context() -> BaseContext:
    """The server's context, or one that starts new processes where there are no forks.

    A process has one server, so all its tests share what `fork_preload` imports.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    with _starting, pytest.MonkeyPatch.context() as patch:
        # The server ignores a module that it does not find.
        patch.setenv("PYTHONPATH", python_path())
        # More threads than cores make tiny models many times slower.
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload(["tests.fork_preload"])
        forkserver.ensure_running()
    return context
