"""Capture of CUDA graphs beside garbage collection, saves and other graphs.

On a CPU, the graph is a stand-in.
"""

import contextlib
import gc
import threading
from unittest.mock import MagicMock

import pytest
import torch

from gptforge.checkpoint import async_saver
from gptforge.cuda_capture import CUDA_CAPTURE_LOCK, cuda_graph_capture


@pytest.fixture(autouse=True)
def clears(monkeypatch) -> MagicMock:
    """Calls that clear cuBLAS's workspaces, which torch lacks without CUDA."""
    name = "_cuda_clearCublasWorkspaces"
    clear = MagicMock(side_effect=getattr(torch._C, name, None))
    monkeypatch.setattr(torch._C, name, clear, raising=False)
    return clear


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_during_a_capture(monkeypatch, enabled) -> None:
    seen = []

    @contextlib.contextmanager
    def graph(graph, capture_error_mode):
        seen.append(gc.isenabled())
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        for error in (None, RuntimeError()):
            with contextlib.suppress(RuntimeError), cuda_graph_capture(None):
                seen.append(gc.isenabled())
                if error:
                    raise error
            assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert seen == [False] * 4


def test_a_graph_does_not_use_the_workspace_of_an_earlier_one(monkeypatch, clears) -> None:
    calls = clears.mock_calls

    @contextlib.contextmanager
    def graph(graph, capture_error_mode):
        assert len(calls) == 1
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with cuda_graph_capture(None):
        pass
    assert len(calls) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_outlives_an_earlier_one_with_matmuls() -> None:
    # Few outputs and a long sum: cuBLAS splits the sum, and needs a workspace.
    a = torch.ones(64, 2**16, device="cuda", dtype=torch.bfloat16)
    expected = a @ a.t()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with cuda_graph_capture(graph):
            product = a @ a.t()
    del graph, graphs[0]
    torch.cuda.empty_cache()
    others = [torch.full((2**20,), 7.0, device="cuda") for _ in range(32)]  # in what became free
    for _ in range(10):
        graphs[0].replay()
    assert torch.equal(product, expected)
    assert all(bool((other == 7).all()) for other in others)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_in_a_reference_cycle_does_not_break_the_capture_of_another() -> None:
    x = torch.zeros(8, device="cuda")
    for _ in range(20):
        garbage = [torch.cuda.CUDAGraph()]
        with cuda_graph_capture(garbage[0]):
            x + 1
        garbage.append(garbage)
        del garbage
        graph, threshold = torch.cuda.CUDAGraph(), gc.get_threshold()
        gc.set_threshold(1)
        try:
            with cuda_graph_capture(graph):
                [[] for _ in range(100)]
                x += 1
        finally:
            gc.set_threshold(*threshold)
        graph.replay()
    assert x.tolist() == [20] * 8


def test_a_capture_and_a_save_wait_for_each_other(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: contextlib.nullcontext())
    for name in ("Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: MagicMock())
    with cuda_graph_capture(None):
        assert CUDA_CAPTURE_LOCK.locked()
    with async_saver._side_stream(MagicMock()):
        assert CUDA_CAPTURE_LOCK.locked()
    assert not CUDA_CAPTURE_LOCK.locked()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_save_in_another_thread_does_not_break_a_capture() -> None:
    x, stop, saves = torch.ones(8, device="cuda"), threading.Event(), []

    def save() -> None:
        while not stop.is_set():
            with async_saver._side_stream(torch.cuda.current_stream().record_event()):
                # Never freed, so that each allocates pinned memory.
                host = torch.empty(2 ** (10 + len(saves) % 6), pin_memory=True)
                host[:8].copy_(x, non_blocking=True)
                torch.cuda.current_stream().synchronize()
            saves.append(host)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(100):
            graph = torch.cuda.CUDAGraph()
            with cuda_graph_capture(graph):
                y = x + 1
            graph.replay()
            assert y.tolist() == [2.0] * 8
    finally:
        stop.set()
        thread.join()
    assert saves
