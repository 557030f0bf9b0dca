"""Between live objects and named tensors: model, optimizer, random generators.

Names are those of the model's parameters, so that no file depends on an order.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

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
"""The output layer: the token table under another name, so it is stored once, as the table."""


_DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
_PIECE = 16 * 2**20


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a safetensors file; gives its bytes and their SHA-256.

    The library's own writer keeps Python from running anything else until the last byte is out, a
    second and more for GPT-2; training beside it would stand still. Format: length of the header (8
    bytes, little endian), the header (JSON, padded by spaces to a multiple of 8), the tensors.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        kind, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for piece in _pieces(text, tensors):
            # Both let other threads run meanwhile.
            digest.update(piece)
            file.write(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _pieces(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A file's bytes in order, a few megabytes at a time; a piece is gone when the next comes."""
    yield len(header).to_bytes(8, "little") + header
    landing = None
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in flat.split(_PIECE):
            if piece.device.type == "cuda":
                # Into memory that the GPU writes by itself: a plain copy of a gigabyte would keep
                # training from handing over its work until it is through.
                if landing is None:
                    landing = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
                landed = landing[: len(piece)]
                landed.copy_(piece, non_blocking=True)
                torch.cuda.current_stream(piece.device).synchronize()
                piece = landed
            yield piece.cpu().numpy().data


def model_state_dict(model: GPT, comm: Comm = SINGLE_PROCESS) -> StateDict:
    """Copies of the weights, float32, on their device or where they were put together: on rank 0.

    Copies, for training goes on and would change the originals under the saver's hands.
    """
    return _on_first(((n, t) for n, t in model.state_dict().items() if n != TIED_WEIGHT), comm)


def load_model_state_dict(
    model: GPT, tensors: Mapping[str, Tensor], *, source: str, comm: Comm = SINGLE_PROCESS
) -> None:
    """Fill a model; a UserError names the first tensor that is missing, strange or misshapen.

    With several ranks, `tensors` are rank 0's; the others give none.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name != TIED_WEIGHT}
    if comm.is_main:
        _check_shapes(own, tensors, source)
    for name, tensor in own.items():
        copy_from_rank0(tensor, tensors.get(name), comm)


def optimizer_state_dict(
    model: GPT, optimizer: Optimizer, comm: Comm = SINGLE_PROCESS
) -> StateDict:
    """The optimizer's state as '<parameter>.<slot>', such as 'transformer.wte.weight.exp_avg'."""
    state = (
        (f"{name}.{slot}", value)
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    )
    return _on_first(state, comm)


def _on_first(named: Iterable[tuple[str, Tensor]], ranks: Comm) -> StateDict:
    copies = ((name, gather_full_tensor(tensor, ranks)) for name, tensor in named)
    return {name: copy for name, copy in copies if copy is not None}


def load_optimizer_state_dict(
    model: GPT,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    comm: Comm = SINGLE_PROCESS,
) -> None:
    """Restore what `optimizer_tensors` took down.

    Only the state travels: rates and decays come from the configuration.
    """
    wanted = {
        f"{name}.{slot}": torch.zeros(()) if slot == "step" else parameter
        for name, parameter in model.named_parameters()
        for slot in optimizer.state_keys(parameter)
    }
    if comm.is_main:
        _check_shapes(wanted, tensors, source)
    optimizer.init_state()
    for name, parameter in model.named_parameters():
        for slot in optimizer.state_keys(parameter):
            copy_from_rank0(optimizer.state[parameter][slot], tensors.get(f"{name}.{slot}"), comm)


def rng_state_dict(device: torch.device, comm: Comm = SINGLE_PROCESS) -> StateDict:
    """State of the random number generators that training draws from.

    Rank 0's are called after their device, those of rank 3 'cpu.3' and 'cuda.3'.
    """
    return {
        f"{kind}.{rank}" if rank else kind: state
        for kind, own in _generators(device).items()
        for rank, state in enumerate(comm.all_gather(own))
    }


def load_rng_state_dict(
    tensors: Mapping[str, Tensor],
    device: torch.device,
    comm: Comm = SINGLE_PROCESS,
    *,
    source: str = "a checkpoint",
) -> None:
    """Restore the generators. A device or a rank that the run did not have before keeps its own."""
    names = comm.broadcast_from_rank0(lambda: sorted(tensors))
    if comm.is_main:
        _check_generators(tensors, device, source)
    for kind, own in _generators(device).items():
        for rank in range(comm.world_size):
            name = f"{kind}.{rank}" if rank else kind
            if name in names:
                state = own.clone()
                copy_from_rank0(state, tensors.get(name), comm)
                if rank == comm.rank:
                    _set_generator(kind, state, device)


def _check_generators(tensors: Mapping[str, Tensor], device: torch.device, source: str) -> None:
    """Raise a UserError for a state that no generator takes, before any rank is given one."""
    own = _generators(device)
    for name, state in tensors.items():
        kind = name.partition(".")[0]
        if kind not in own:
            continue
        with parsing(f"{source}: '{printable(name, MAX_NAME)}'", "a random generator's state"):
            if state.dtype != own[kind].dtype or state.shape != own[kind].shape:
                raise ValueError(f"{state.dtype} of shape {tuple(state.shape)}")
            if kind == "cpu":
                torch.Generator().set_state(state)


def _generators(device: torch.device) -> StateDict:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_generator(kind: str, state: Tensor, device: torch.device) -> None:
    if kind == "cpu":
        torch.set_rng_state(state)
    elif kind == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)


def _check_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    strangers = sorted(given.keys() - own.keys())
    if strangers:
        name = printable(strangers[0], MAX_NAME)
        raise UserError(f"{source}: this model has no tensor '{name}'")
    for name, tensor in own.items():
        if name not in given:
            raise UserError(f"{source}: the tensor '{name}' is missing")
        if given[name].shape != tensor.shape:
            shapes = f"{tuple(given[name].shape)}, this model's {tuple(tensor.shape)}"
            raise UserError(f"{source}: '{name}' has shape {shapes}")
        if given[name].dtype != torch.float32:
            raise UserError(f"{source}: '{name}' is {given[name].dtype}, not torch.float32")
