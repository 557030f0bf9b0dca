"""Saves and restores model, optimizer and random generators as named tensors.

Names are those of the model's parameters, so no file depends on an order.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.distributed.dtensor import copy_from_rank0, gather_full_tensor
from gptforge.errors import UserError, parsing
from gptforge.model import GPT
from gptforge.optim.optimizer import Optimizer
from gptforge.printable import MAX_NAME, printable

StateDict = dict[str, Tensor]

TIED_WEIGHT = "lm_head.weight"
"""Shares its storage with the token embedding and is stored once, under that name."""

RAW_WEIGHT = "raw_weight"
"""Key of a weight that is trained, in the state of an optimizer with an EMA."""

_DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
_CHUNK_BYTES = 16 * 2**20


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a safetensors file without blocking other threads.

    safetensors' own writer holds the GIL until the last byte is written, more than a second for
    GPT-2, during which training would stand still. The format is the length of the header (8 bytes,
    little endian), the header (JSON, padded with spaces to a multiple of 8) and the tensors.
    Returns size in bytes and SHA-256 of the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        dtype, offsets = _DTYPES[tensor.dtype], [offset, offset + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for chunk in _chunks(text, tensors):
            # Hashing and writing release the GIL.
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _chunks(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file; a chunk is valid until the next one is requested."""
    yield len(header).to_bytes(8, "little") + header
    pinned = None
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for chunk in flat.split(_CHUNK_BYTES):
            if chunk.device.type == "cuda":
                # Into pinned memory, chunk by chunk: one large copy from pageable memory would
                # keep training from launching kernels until it is complete.
                if pinned is None:
                    pinned = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
                host = pinned[: len(chunk)]
                host.copy_(chunk, non_blocking=True)
                torch.cuda.current_stream(chunk.device).synchronize()
                chunk = host
            yield chunk.cpu().numpy().data


def model_state_dict(model: GPT, comm: Comm = SINGLE_PROCESS) -> StateDict:
    """Copies of the fp32 weights on rank 0, on their device (on the CPU if they were sharded).

    Copies, as training changes the originals while they are being saved.
    """
    return gather_on_rank0(untied_state_dict(model), comm)


def load_model_state_dict(
    model: GPT, tensors: Mapping[str, Tensor], *, source: str, comm: Comm = SINGLE_PROCESS
) -> None:
    """Load rank 0's `tensors` into the model of every rank; other ranks pass none.

    A UserError names `source` and the first tensor that is missing, unknown or misshapen.
    """
    _load(untied_state_dict(model), tensors, source, comm)


def optimizer_state_dict(
    model: GPT,
    optimizer: Optimizer,
    comm: Comm = SINGLE_PROCESS,
    raw_weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> StateDict:
    """Optimizer state as '<parameter>.<key>', such as 'transformer.wte.weight.exp_avg'.

    `raw_weights` are what the optimizer trains where the model has an average of them.
    """
    return gather_on_rank0(_optimizer_tensors(model, optimizer, raw_weights), comm)


def load_optimizer_state_dict(
    model: GPT,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    comm: Comm = SINGLE_PROCESS,
    raw_weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Restore the state that `optimizer_state_dict` saved; see `load_model_state_dict`.

    Learning rates and weight decay are not part of it: they come from the configuration.
    """
    optimizer.init_state()
    _load(_optimizer_tensors(model, optimizer, raw_weights), tensors, source, comm)


def _optimizer_tensors(
    model: GPT, optimizer: Optimizer, raw_weights: Mapping[str, Tensor]
) -> StateDict:
    state = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return state | {f"{name}.{RAW_WEIGHT}": weight for name, weight in raw_weights.items()}


def rng_state_dict(device: torch.device, comm: Comm = SINGLE_PROCESS) -> StateDict:
    """State of the random generators that training draws from, on all ranks.

    Keys are 'cpu' and 'cuda' for rank 0, 'cpu.3' and 'cuda.3' for rank 3.
    """
    return {
        f"{kind}.{rank}" if rank else kind: state
        for kind, local in _rng_states(device).items()
        for rank, state in enumerate(comm.all_gather(local))
    }


def load_rng_state_dict(
    tensors: Mapping[str, Tensor],
    device: torch.device,
    comm: Comm = SINGLE_PROCESS,
    *,
    source: str = "a checkpoint",
) -> None:
    """Restore the generators; a device or rank that was not saved keeps its state."""
    names = comm.broadcast_from_rank0(lambda: sorted(tensors))
    if comm.is_main:
        _check_rng_states(tensors, device, source)
    for kind, current in _rng_states(device).items():
        for rank in range(comm.world_size):
            name = f"{kind}.{rank}" if rank else kind
            if name in names:
                state = current.clone()
                copy_from_rank0(state, tensors.get(name), comm)
                if rank == comm.rank:
                    _set_rng_state(kind, state, device)


def _check_rng_states(tensors: Mapping[str, Tensor], device: torch.device, source: str) -> None:
    """Raise a UserError for a state that no generator accepts, before any is changed."""
    current = _rng_states(device)
    for name, state in tensors.items():
        kind = name.partition(".")[0]
        if kind not in current:
            continue
        with parsing(f"{source}: '{printable(name, MAX_NAME)}'", "a random generator's state"):
            if state.dtype != current[kind].dtype or state.shape != current[kind].shape:
                raise ValueError(f"{state.dtype} of shape {tuple(state.shape)}")
            if kind == "cpu":
                torch.Generator().set_state(state)


def _rng_states(device: torch.device) -> StateDict:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_rng_state(kind: str, state: Tensor, device: torch.device) -> None:
    if kind == "cpu":
        torch.set_rng_state(state)
    elif kind == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)


def untied_state_dict(model: GPT) -> StateDict:
    """The weights under their names, the tied one once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != TIED_WEIGHT}


def gather_on_rank0(tensors: StateDict, comm: Comm) -> StateDict:
    """Full copies of sharded tensors on rank 0, an empty dict on the others; a collective."""
    copies = {name: gather_full_tensor(tensor, comm) for name, tensor in tensors.items()}
    return {name: copy for name, copy in copies.items() if copy is not None}


def check_shapes(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], source: str) -> None:
    """Raise a UserError for the first tensor that is missing, unknown or misshapen."""
    if unknown := sorted(tensors.keys() - targets.keys()):
        name = printable(unknown[0], MAX_NAME)
        raise UserError(f"{source}: this model has no tensor '{name}'")
    for name, target in targets.items():
        if (tensor := tensors.get(name)) is None:
            raise UserError(f"{source}: the tensor '{name}' is missing")
        if tensor.shape != target.shape:
            shapes = f"{tuple(tensor.shape)}, this model's {tuple(target.shape)}"
            raise UserError(f"{source}: '{name}' has shape {shapes}")


def _load(
    targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str, comm: Comm
) -> None:
    if comm.is_main:  # check all of them before any is changed
        check_shapes(tensors, targets, source)
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise UserError(f"{source}: '{name}' is {tensor.dtype}, not torch.float32")
    for name, target in targets.items():
        copy_from_rank0(target, tensors.get(name), comm)
