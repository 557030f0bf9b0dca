"""When training stops before its last step, since the held-out loss no longer improves."""

import math

from gptforge.config import Config
from gptforge.errors import UserError

AUTO_PATIENCE = 5  # evaluations without a better held-out loss after which training stops
AUTO_FRACTION = 0.2
"""These evaluations cover at least this fraction of max_steps: loss curves have plateaus."""
MAX_REPEATS = 4.0  # up to about 4 epochs are as good as new text (Muennighoff et al., 2023)


def resolve_patience(config: Config, *, train_tokens: int, has_val: bool) -> int:
    """Evaluations without a better held-out loss after which to stop; 0: never."""
    if config.patience > 0 and not has_val:
        raise UserError(
            f"--patience {config.patience} compares held-out losses, and no text is held out: "
            "leave it out, or hold out text with --val_fraction"
        )
    if config.patience >= 0:
        return config.patience
    epochs = config.max_steps * config.tokens_per_step / train_tokens
    if not has_val or epochs <= MAX_REPEATS or config.preset.startswith("gpt2"):
        return 0
    return max(AUTO_PATIENCE, math.ceil(AUTO_FRACTION * config.max_steps / config.eval_every))
