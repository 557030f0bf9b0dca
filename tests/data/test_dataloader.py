import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.data.dataloader import DataLoader, count_sequences
from gptforge.errors import UserError

CPU = torch.device("cpu")


def loader(
    tokens=101, *, length=10, batch=4, shuffle=True, device=CPU, stagger=False
) -> DataLoader:
    return DataLoader(
        np.arange(tokens, dtype=np.uint16),
        context_length=length,
        global_batch=batch,
        seed=7,
        shuffle=shuffle,
        device=device,
        random_offset=stagger,
    )


def test_the_plain_order_is_the_seeds() -> None:
    plain = loader(shuffle=False)
    for start in (0, 40, 80):
        inputs, targets = plain.next_batch()
        # The third batch reaches into the second epoch.
        expected = (torch.arange(start, start + 40) % 100).view(4, 10)
        assert torch.equal(inputs, expected)
        assert torch.equal(targets, expected + 1)


@settings(deadline=None)
@given(st.integers(12, 300), st.integers(1, 11), st.integers(1, 9))
def test_an_epoch_holds_each_window_once_and_no_partial_one(tokens, length, batch) -> None:
    many = loader(tokens, length=length, batch=batch)
    windows = count_sequences(tokens, length)
    assert many.num_sequences == windows == (tokens - 1) // length
    seen = torch.cat([many.next_batch()[0] for _ in range(-(-windows // batch))])[:windows]
    assert sorted(seen[:, 0].tolist()) == [i * length for i in range(windows)]


def test_targets_lie_one_further_on(device) -> None:
    inputs, targets = loader(device=device).next_batch()
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.device.type == device.type
    assert torch.equal(inputs + 1, targets)


def test_the_position_brings_back_the_stream(device) -> None:
    straight, cut = loader(device=device), loader(device=device)
    for _ in range(5):
        straight.next_batch()
        cut.next_batch()
    resumed = loader(device=device)
    resumed.load_state_dict(cut.state_dict())
    for _ in range(30):
        assert torch.equal(straight.next_batch()[0], resumed.next_batch()[0])
    assert straight.epoch == resumed.epoch == 35 * 4 / 10


def test_a_batch_that_was_sent_early_is_the_one_that_follows(device) -> None:
    early, plain = loader(device=device), loader(device=device)
    for position in (0, 8):
        for one in (early, plain):
            one.load_state_dict({"position": position})
        for _ in range(12):
            assert torch.equal(early.next_batch()[0], plain.next_batch()[0])
            early.prefetch_to_device()
            early.prefetch_to_device()
            assert early.state_dict() == plain.state_dict()


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("at_once", [1, 5, 4000])
def test_how_many_windows_are_looked_up_at_once_changes_nothing(
    monkeypatch, at_once, stagger
) -> None:
    plain = loader(stagger=stagger)
    expected = [plain.next_batch()[0] for _ in range(40)]
    monkeypatch.setattr("gptforge.data.dataloader.PLACED_AT_ONCE", at_once)
    other = loader(stagger=stagger)
    assert torch.equal(
        torch.stack([other.next_batch()[0] for _ in range(40)]), torch.stack(expected)
    )
    if not stagger:
        starts = [
            window for position in range(0, 160, 4) for window in plain.sequence_ids_at(position)
        ]
        assert torch.stack(expected)[..., 0].flatten().tolist() == [10 * w for w in starts]


def test_how_a_batch_is_cut_does_not_change_what_comes() -> None:
    big, small = loader(batch=12), loader(batch=3)
    together = torch.cat([small.next_batch()[0] for _ in range(4)])
    assert torch.equal(big.next_batch()[0], together)


class Recorded:
    """A stream that remembers which stretches were read."""

    def __init__(self, n: int) -> None:
        self.tokens = np.arange(n, dtype=np.uint32)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: slice) -> np.ndarray:
        self.read.append(where.start)
        return self.tokens[where]


def ranks(world_size: int, *, batch: int, shuffle: bool = True) -> list[DataLoader]:
    return [
        DataLoader(
            np.arange(1001, dtype=np.uint16),
            context_length=10,
            global_batch=batch,
            seed=3,
            shuffle=shuffle,
            device=CPU,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 8), st.booleans())
def test_ranks_share_each_global_batch_whatever_their_number(world_size, more, shuffle) -> None:
    batch = world_size + more
    alone, *_ = ranks(1, batch=batch, shuffle=shuffle)
    shared = ranks(world_size, batch=batch, shuffle=shuffle)
    for _ in range(3):
        position = alone.position
        whole = alone.next_batch()
        parts = [loader.next_batch() for loader in shared]
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
        assert all(len(part[0]) >= batch // world_size for part in parts)
        assert {loader.position for loader in shared} == {position + batch}
        assert all(
            loader.sequence_ids_at(position) == alone.sequence_ids_at(position) for loader in shared
        )


def test_another_number_of_ranks_goes_on_with_the_same_batches() -> None:
    two, three = ranks(2, batch=6), ranks(3, batch=6)
    for _ in range(4):
        for loader in two:
            loader.next_batch()
    for loader in three:
        loader.load_state_dict(two[1].state_dict())
    together = torch.cat([loader.next_batch()[0] for loader in three])
    assert torch.equal(together, torch.cat([loader.next_batch()[0] for loader in two]))


def test_a_jump_to_a_far_place_reads_nothing_on_the_way() -> None:
    tokens = Recorded(100_001)
    far = DataLoader(tokens, context_length=10, global_batch=4, seed=1, shuffle=True, device=CPU)
    far.load_state_dict({"position": 10**12})
    far.next_batch()
    while far._read._begun:
        # Until all that was begun is there, nothing more is read.
        far._read._begun.popleft()[1].result()
    # The batch itself, the one that set out, and those read beforehand.
    assert len(tokens.read) <= 4 * 6
    assert far.sequence_ids_at(10**12) == [start // 10 for start in tokens.read[:4]]


def test_an_error_of_the_reader_reaches_the_trainer() -> None:
    class Broken(Recorded):
        def __getitem__(self, where: slice) -> np.ndarray:
            raise UserError("token id 9 is outside the vocabulary of 5")

    broken = DataLoader(
        Broken(101), context_length=10, global_batch=4, seed=1, shuffle=True, device=CPU
    )
    with pytest.raises(UserError, match="outside the vocabulary"):
        broken.next_batch()


@settings(deadline=None)
@given(st.integers(24, 300), st.integers(2, 11))
def test_staggered_each_epoch_holds_windows_side_by_side_from_another_place(tokens, length) -> None:
    windows = (tokens - length) // length
    many = loader(tokens, length=length, batch=windows, stagger=True)
    assert many.num_sequences == windows
    begun = []
    for _ in range(12):
        inputs, targets = many.next_batch()
        assert torch.equal(inputs + 1, targets)
        starts = sorted(inputs[:, 0].tolist())
        assert starts == [starts[0] + i * length for i in range(windows)]
        assert 0 <= starts[0] < length and starts[-1] + length < tokens
        begun.append(starts[0])
    # Twelve times the same by chance: one in two thousand at worst, and the seed is fixed.
    assert len(set(begun)) > 1


def test_staggered_the_position_brings_back_the_stream() -> None:
    straight, resumed = loader(stagger=True), loader(stagger=True)
    for _ in range(20):
        straight.next_batch()
    resumed.load_state_dict(straight.state_dict())
    for _ in range(20):
        assert torch.equal(straight.next_batch()[0], resumed.next_batch()[0])
