"""Start the report of a run: its first files, written once nothing can be refused any more."""

import platform
import re

import torch
from torch import nn

from gptforge import __version__, files
from gptforge.builders.build_train_step import attention_backend
from gptforge.builders.resolve_run import ResolvedRun
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.async_saver import SavedCheckpoint
from gptforge.checkpoint.run_dir import OpenedRun
from gptforge.config import Config
from gptforge.config_file import to_toml
from gptforge.data.dataloader import sequences_per_epoch
from gptforge.data.dataset import Dataset
from gptforge.estimate.formulas import num_params
from gptforge.evaluate.val_loss import num_predicted
from gptforge.model import GPT
from gptforge.report.console import Console
from gptforge.report.format import format_epochs
from gptforge.report.run_report import RunReport
from gptforge.training.state import TrainState
from gptforge.training.train_step import TrainStep

RULE, THIN_RULE = "=" * 50, "-" * 50


def config_toml(run: ResolvedRun) -> str:
    """The text of config.toml, with the versions and the command that made the run."""
    return to_toml(run.config, {**_versions(), "command": run.start.command})


def start_report(
    run: ResolvedRun, opened: OpenedRun, step_fn: TrainStep, state: TrainState, *, is_teacher: bool
) -> RunReport:
    """Create the run folder, or truncate the logs to the checkpoint that is resumed.

    Ranks other than 0 get a report that writes nothing.
    """
    config, dataset, is_main = run.config, run.dataset, run.comm.is_main
    report = RunReport(
        config,
        title=f"{config.preset or 'GPT-2'} on {dataset.path.name}",
        program=run.start.program,
        split_hint=dataset.split_hint,
        is_teacher=is_teacher,
        enabled=is_main,
    )
    if not is_main:
        return report
    report.run_dir.mkdir(parents=True, exist_ok=True)
    files.atomic_write(report.run_dir / checkpoints.CONFIG, config_toml(run))
    facts = {
        "command": run.start.command,
        "max_steps": config.max_steps,
        "parameters": num_params(config.model),
        "device": str(step_fn.device),
        "dtype": step_fn.precision.name,
        "compiled": step_fn.is_compiled,
        "attention": attention_backend(step_fn, config),
        "micro_batch": step_fn.micro_batch_size,
        "ranks": run.comm.world_size,
        **_versions(),
    }
    if opened.checkpoint is None:
        # On the meta device: the step's model may be sharded.
        with torch.device("meta"):
            report.start(model_summary(GPT(config.model)), facts)
    else:
        is_best = state.best_step == state.step
        checkpoint = SavedCheckpoint(state.step, opened.checkpoint.name, is_best)
        best = state.best_step, state.best_loss
        report.resume(checkpoint, opened.state["file_sizes"], best=best, facts=facts)
    report.console = Console(config.max_steps, state.step)
    return report


def _versions() -> dict[str, str]:
    return {
        "gptforge": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def model_summary(model: GPT) -> str:
    """Parameter counts and module tree of a GPT, as text."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = _count(model)
    lines = [
        f"{RULE}\n\nTotal Parameters: {total:,}",
        f"Trainable Parameters: {trainable:,}",
        f"Non-trainable Parameters: {total - trainable:,}",
        f"\nLayer Details:\n{THIN_RULE}",
    ]
    for name, child in model.named_children():
        lines.append(f"{name}: {type(child).__name__} ({_count(child):,} parameters)")
        for layer, module in child.items() if isinstance(child, nn.ModuleDict) else ():
            kind = type(module).__name__
            lines.append(f"  └─{layer}: {kind} ({_count(module):,} parameters)")
            if isinstance(module, nn.ModuleList):
                lines.append("    └─Transformer Blocks:")
                for index, block in enumerate(module):
                    lines.append(f"      └─Block {index}: ({_count(block):,} parameters)")
    # Later versions of torch add whether a LayerNorm has a bias.
    tree = re.sub(r"(LayerNorm\(.*), bias=True\)", r"\1)", repr(model))
    lines += ["", "Model Architecture:", THIN_RULE, tree, RULE]
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe_dataset(dataset: Dataset, config: Config) -> str:
    """Describe the text in one line: size, split, and the epochs that training will take."""
    train, val = len(dataset.train), len(dataset.val)
    sequences = sequences_per_epoch(
        train, config.context_length, random_offset=config.random_offset
    )
    epochs = config.max_steps * config.global_batch_size / sequences
    split = f"{val:,} held out" if val else "none held out"
    if val:
        evaluated = num_predicted(val, config.context_length, config.eval_tokens)
        if evaluated < val - 1:
            split += f", {evaluated:,} of them evaluated during training, evenly spaced"
    documents = f" in {dataset.documents:,} documents" if dataset.documents > 2 else ""
    size = f", {dataset.characters:,} characters{documents}" if dataset.characters else ""
    return (
        f"{dataset.path.as_posix()}{size}; {train:,} {dataset.tokenizer.name} tokens to train on, "
        f"{split}; about {format_epochs(epochs)} epochs"
    )
