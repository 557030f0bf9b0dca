"""From a Config to what a benchmark times: an update as a run would make it, without the run."""

from collections.abc import Callable, Collection

from gptforge.build.step import train_step
from gptforge.build.training import seed_everything
from gptforge.build.warm_up import WarmUp
from gptforge.checkpoint.run_folder import Opening
from gptforge.config import Config, check
from gptforge.hardware import choose_device, choose_precision
from gptforge.model import GPT
from gptforge.train.step import TrainStep


def build_step(config: Config, given: Collection[str], say: Callable[[str], None]) -> TrainStep:
    """Model, optimizer and kernels, chosen as for training; writes nothing anywhere.

    Raises:
        UserError: for anything the user can mend.
    """
    check(config)
    device, note = choose_device(config.device)
    precision = choose_precision(config.dtype, device)
    say(f"device: {device} ({note}), {precision.name}: {precision.reason}")
    seed_everything(config)
    # Behind what cuBLAS reads when it starts.
    warm_up = WarmUp(device, config, precision)
    opening = Opening("new", config)
    return train_step(config, opening, device, precision, given=given, say=say, ready=warm_up.wait)


def build_model(config: Config, say: Callable[[str], None]) -> GPT:
    """A model with random weights, on its device, to write with.

    Raises:
        UserError: for anything the user can mend.
    """
    check(config)
    device, note = choose_device(config.device)
    say(f"device: {device} ({note})")
    seed_everything(config)
    with device:
        return GPT(config.model).initialize().eval()
