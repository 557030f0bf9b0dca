import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.data.dataloader import DataLoader, count_sequences, replace_tokens
from gptforge.errors import UserError

CPU = torch.device("cpu")


def make_loader(tokens=101, *, length=10, batch=4, **options) -> DataLoader:
    if isinstance(tokens, int):
        tokens = np.arange(tokens, dtype=np.uint16)
    options = {"seed": 7, "shuffle": True, "device": CPU, **options}
    return DataLoader(tokens, context_length=length, global_batch_size=batch, **options)


def test_unshuffled_batches() -> None:
    loader = make_loader(shuffle=False)
    for start in (0, 40, 80):
        inputs, targets = loader.next_batch()
        # The third batch spans two epochs.
        expected = (torch.arange(start, start + 40) % 100).view(4, 10)
        assert torch.equal(inputs, expected)
        assert torch.equal(targets, expected + 1)


@given(st.integers(12, 300), st.integers(1, 11), st.integers(1, 9))
def test_epoch_has_each_full_sequence_once(tokens, length, batch) -> None:
    loader = make_loader(tokens, length=length, batch=batch)
    n = count_sequences(tokens, length)
    assert loader.num_sequences == n == (tokens - 1) // length
    seen = torch.cat([loader.next_batch()[0] for _ in range(-(-n // batch))])[:n]
    assert sorted(seen[:, 0].tolist()) == [i * length for i in range(n)]


def test_targets_are_shifted_by_one(device) -> None:
    inputs, targets = make_loader(device=device).next_batch()
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.device.type == device.type
    assert torch.equal(inputs + 1, targets)


@pytest.mark.parametrize("random_offset", [False, True])
def test_resume_from_state_dict(device, random_offset) -> None:
    options = {"device": device, "random_offset": random_offset}
    loader, resumed = make_loader(**options), make_loader(**options)
    for _ in range(5):
        loader.next_batch()
    resumed.load_state_dict(loader.state_dict())
    for _ in range(30):
        assert torch.equal(loader.next_batch()[0], resumed.next_batch()[0])
    assert loader.epoch == resumed.epoch == 35 * 4 / loader.num_sequences


def test_prefetch_to_device_changes_no_batch(device) -> None:
    prefetched, plain = make_loader(device=device), make_loader(device=device)
    for position in (0, 8):
        for loader in (prefetched, plain):
            loader.load_state_dict({"position": position})
        for _ in range(12):
            assert torch.equal(prefetched.next_batch()[0], plain.next_batch()[0])
            prefetched.prefetch_to_device()
            prefetched.prefetch_to_device()
            assert prefetched.state_dict() == plain.state_dict()


@pytest.mark.parametrize("random_offset", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 4000])
def test_index_chunk_changes_no_batch(monkeypatch, chunk, random_offset) -> None:
    loader = make_loader(random_offset=random_offset)
    expected = [loader.next_batch()[0] for _ in range(40)]
    monkeypatch.setattr("gptforge.data.dataloader.INDEX_CHUNK", chunk)
    other = make_loader(random_offset=random_offset)
    assert all(torch.equal(other.next_batch()[0], batch) for batch in expected)
    if not random_offset:
        ids = [i for position in range(0, 160, 4) for i in loader.sequence_ids_at(position)]
        assert torch.stack(expected)[..., 0].flatten().tolist() == [10 * i for i in ids]


def test_batch_size_changes_no_sequence() -> None:
    large, small = make_loader(batch=12), make_loader(batch=3)
    together = torch.cat([small.next_batch()[0] for _ in range(4)])
    assert torch.equal(large.next_batch()[0], together)


def make_ranks(world_size: int, *, batch: int, shuffle: bool = True) -> list[DataLoader]:
    return [
        make_loader(1001, batch=batch, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 8), st.booleans())
def test_ranks_share_each_global_batch(world_size, more, shuffle) -> None:
    batch = world_size + more
    single, *_ = make_ranks(1, batch=batch, shuffle=shuffle)
    ranks = make_ranks(world_size, batch=batch, shuffle=shuffle)
    for _ in range(3):
        position = single.position
        full = single.next_batch()
        parts = [loader.next_batch() for loader in ranks]
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts]), full[i])
        assert all(len(part[0]) >= batch // world_size for part in parts)
        assert {loader.position for loader in ranks} == {position + batch}
        ids = single.sequence_ids_at(position)
        assert all(loader.sequence_ids_at(position) == ids for loader in ranks)


def test_resume_with_another_number_of_ranks() -> None:
    two, three = make_ranks(2, batch=6), make_ranks(3, batch=6)
    for _ in range(4):
        for loader in two:
            loader.next_batch()
    for loader in three:
        loader.load_state_dict(two[1].state_dict())
    together = torch.cat([loader.next_batch()[0] for loader in three])
    assert torch.equal(together, torch.cat([loader.next_batch()[0] for loader in two]))


class RecordingTokens:
    """Records the starts of all slices that are read."""

    def __init__(self, n: int) -> None:
        self.tokens = np.arange(n, dtype=np.uint32)
        self.starts: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: slice) -> np.ndarray:
        self.starts.append(where.start)
        return self.tokens[where]


def test_jump_reads_nothing_in_between() -> None:
    tokens = RecordingTokens(100_001)
    loader = make_loader(tokens)
    loader.load_state_dict({"position": 10**12})
    loader.next_batch()
    for batch in loader._prefetched.values():
        batch.result()
    # The batch and the prefetched ones.
    assert len(tokens.starts) <= 4 * 6
    assert loader.sequence_ids_at(10**12) == [start // 10 for start in tokens.starts[:4]]


def test_error_in_the_prefetch_thread_is_raised() -> None:
    class Broken(RecordingTokens):
        def __getitem__(self, where: slice) -> np.ndarray:
            raise UserError("token id 9 is outside the vocabulary of 5")

    with pytest.raises(UserError, match="outside the vocabulary"):
        make_loader(Broken(101)).next_batch()


@given(st.integers(24, 300), st.integers(2, 11))
def test_random_offset_shifts_all_sequences_of_an_epoch(tokens, length) -> None:
    n = (tokens - length) // length
    loader = make_loader(tokens, length=length, batch=n, random_offset=True)
    assert loader.num_sequences == n
    offsets = set()
    for _ in range(12):
        inputs, targets = loader.next_batch()
        assert torch.equal(inputs + 1, targets)
        starts = sorted(inputs[:, 0].tolist())
        assert starts == [starts[0] + i * length for i in range(n)]
        assert 0 <= starts[0] < length and starts[-1] + length < tokens
        offsets.add(starts[0])
    # Twelve equal offsets have a probability of 1 in 2000 at most, and the seed is fixed.
    assert len(offsets) > 1


def test_replaced_tokens_come_from_the_batch() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[3, 3, 7, 9]]).repeat(64, 64)
    replaced = replace_tokens(tokens, 0.2)
    assert set(replaced.unique().tolist()) == {3, 7, 9}
    # A replacement differs from the token in 5 of 8 cases: the chances of the other two, averaged.
    rate = (replaced != tokens).double().mean().item()
    assert rate == pytest.approx(0.2 * 0.625, abs=0.015)
    assert torch.equal(replace_tokens(tokens, 0), tokens)


def test_closing_ends_the_thread() -> None:
    before = set(threading.enumerate())
    loader = make_loader(range(100))
    loader.next_batch()
    [thread] = set(threading.enumerate()) - before
    loader.close()
    thread.join(timeout=120)
    assert not thread.is_alive()
