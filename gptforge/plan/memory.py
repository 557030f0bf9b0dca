"""What a configuration takes of a device's memory, and what would fit instead."""

import dataclasses

import torch

from gptforge import costs
from gptforge.build.fitting import kernels_of, memory_of
from gptforge.config import Config
from gptforge.hardware import Precision, usable_memory
from gptforge.plan.figures import Memory
from gptforge.presets import PRESETS, preset
from gptforge.train.micro_batch import HEADROOM, find_micro_batch

LEAST_CONTEXT = 64
"""Tokens of a window below which no shorter one is advised."""


class Need:
    """Memory that a configuration takes on a device, by the formula; nothing is tried out."""

    def __init__(self, config: Config, precision: Precision, device: torch.device) -> None:
        self._config, self._precision, self._device = config, precision, device
        self._free = usable_memory(device)

    def memory(self, windows: int, where: str) -> Memory:
        """What so many windows at a time take, of what there is."""
        parts = self._parts(self._config, windows)
        fits = self._do_fit(self._config, windows)
        return Memory(where, sum(parts.values()), parts, self._free, fits)

    def micro_batch(self) -> int:
        """As training chooses it, before it tries it out on a GPU."""
        return find_micro_batch(
            self._config.batch_size,
            estimate=lambda windows: sum(self._parts(self._config, windows).values()),
            free=self._free,
            fits=lambda windows: True,
            remembered=None,
            key="",
        )

    def remedy(self, windows: int, *, by_hand: bool) -> str:
        """What would fit, of what can be changed; the least first."""
        c, total = self._config, self._config.global_batch
        smaller = [n for n in range(windows - 1, 0, -1) if total % n == 0] if by_hand else []
        for n in smaller:
            if self._do_fit(c, n):
                return (
                    f"micro-batches of {windows} do not fit; --batch_size {n} "
                    f"--gradient_accumulation_steps {total // n} would, and learns the same"
                )
        changes: list[dict[str, bool | int]] = [{"activation_checkpointing": True}]
        changes.append({"activation_checkpointing": True, "loss_chunk": 1024})
        lengths = [c.context_length // 2**n for n in range(1, 20)]
        changes += [{**changes[0], "context_length": n} for n in lengths if n >= LEAST_CONTEXT]
        for change in changes:
            if self._do_fit(dataclasses.replace(c, **change), 1):  # type: ignore[arg-type]
                flags = " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())
                own = " --batch_size 1" if by_hand else ""
                return f"not even one window fits; {flags}{own} would"
        least = sum(self._parts(c, 0).values())
        return (
            f"weights, gradients, optimizer and a snapshot alone take {least / 1e9:.1f} GB; use a "
            f"smaller model{self._smaller_preset()}, or several GPUs that share this one (torchrun)"
        )

    def _smaller_preset(self) -> str:
        here = costs.parameters(self._config.model)
        others = {
            name: dataclasses.replace(preset(name), vocab_size=self._config.vocab_size)
            for name in PRESETS
        }
        sizes = {name: costs.parameters(other.model) for name, other in others.items()}
        fitting = [n for n in others if sizes[n] < here and self._do_fit(others[n], 1)]
        largest = max(fitting, key=lambda name: sizes[name], default="")
        return f" (--preset {largest} would fit)" if largest else ""

    def _do_fit(self, config: Config, windows: int) -> bool:
        needed = sum(self._parts(config, windows).values())
        return self._free is None or needed <= HEADROOM * self._free

    def _parts(self, config: Config, windows: int) -> dict[str, int]:
        kernels = kernels_of(config, self._device, self._precision)
        return memory_of(config, windows, self._precision, kernels)
