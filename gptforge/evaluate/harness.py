"""Run EleutherAI's lm-evaluation-harness, for the tasks that are not built in.

`lm_eval` is optional and slow to load: it is imported inside the functions.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from gptforge.device import Precision
from gptforge.errors import RunError, UserError, first_line, install_hint
from gptforge.evaluate.tasks import TASKS, loglikelihoods
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.report.console import ProgressMeter, track

BOOTSTRAP_ITERS = 1000  # for metrics that are not means; the harness's 100,000 take minutes
MAX_GEN_TOKS = 256  # the harness's default for tasks that do not say


def load_task_manager(names: Sequence[str], include_path: str) -> Any:
    """Create the harness's task manager, and check that it can load the data of the tasks."""
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        raise UserError(
            f"--tasks {names[0]}: built in are {', '.join(TASKS)}; others need the package "
            f"lm_eval, which is not installed: {install_hint('lm-eval')}"
        ) from None
    manager = TaskManager(include_path=include_path or None)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, [*TASKS, *manager.all_tasks], n=3)
            similar = f"; similar ones are {', '.join(close)}" if close else ""
            raise UserError(
                f"--tasks {name}: neither built in ({', '.join(TASKS)}) nor in lm_eval{similar}"
            )
    for name in names:
        try:
            get_task_dict([name], manager)
        except Exception as error:
            # It downloads data, and may run the task's code: any exception is possible.
            raise UserError(
                f"--tasks {name}: lm_eval cannot load its questions: {first_line(error)}: they "
                "come from the Hugging Face Hub, which needs a network"
            ) from None
    return manager


def run_harness(
    model: LanguageModel, names: Sequence[str], manager: Any, precision: Precision, limit: int
) -> dict[str, dict[str, float]]:
    """Metrics of the harness for each task, on `limit` examples or, if it is 0, on all."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=harness_model(model, precision),
        tasks=list(names),
        limit=limit or None,
        task_manager=manager,
        bootstrap_iters=BOOTSTRAP_ITERS,
        log_samples=False,
    )
    counts = results.get("n-samples", {})
    scores = {}
    for name, metrics in results["results"].items():
        scores[name] = {
            _metric_name(key): float(value)
            for key, value in metrics.items()
            # A missing standard error is "N/A".
            if "," in key and isinstance(value, int | float)
        }
        if name in counts:
            scores[name]["questions"] = counts[name]["effective"]
    return scores


def harness_model(model: LanguageModel, precision: Precision) -> Any:
    """Wrap a model for the harness's `simple_evaluate`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    block_size = model.model.config.block_size

    class HarnessModel(TemplateLM):  # type: ignore[misc]
        """Handles the three kinds of requests of the harness."""

        tokenizer_name = model.tokenizer.name

        @property
        def eot_token_id(self) -> int:
            eot_token = model.tokenizer.eot_token
            return model.encode_prompt("")[-1] if eot_token is None else eot_token

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return model.encode(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            texts = []
            for _strings, context, continuation in requests:
                ids = (context + continuation)[-(block_size + 1) :]
                texts.append((ids, min(len(continuation), len(ids) - 1)))
            with ProgressMeter("evaluating") as meter:
                results = loglikelihoods(model, texts, precision, progress=meter)
            if any(math.isnan(result.loglikelihood) for result in results):
                raise RunError("the log-likelihoods are NaN: the training of this model diverged")
            return list(results)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            parts, counts = [], []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=block_size,
                    context_len=1,
                )
                parts += [("", *make_disjoint_window(window)) for window in windows]
                counts.append(len(parts))
            values = [value for value, _ in self._loglikelihood_tokens(parts)]
            return [sum(values[i:j]) for i, j in pairwise([0, *counts])]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = []
            for request in track(requests, "generating"):
                context, options = request.args
                max_new_tokens = int(options.get("max_gen_toks", MAX_GEN_TOKS))
                stop = options.get("until") or []
                temperature = options.get("temperature") if options.get("do_sample") else 0
                [completion] = model.generate_batch(
                    [_truncate_left(model, context, block_size - max_new_tokens)],
                    max_new_tokens,
                    SamplingParams(float(temperature or 0)),
                    stop=[stop] if isinstance(stop, str) else [text for text in stop if text],
                    seeds=[0],
                )
                texts.append(completion.text)
            return texts

    return HarnessModel()


def _truncate_left(model: LanguageModel, text: str, max_tokens: int) -> str:
    """Cut the start of a context that is too long, as the harness does."""
    ids = model.encode(text)
    return model.decode(ids[-max_tokens:]) if 0 < max_tokens < len(ids) else text


def _metric_name(key: str) -> str:
    """Return `acc` for `acc,none`; other filters stay in the name."""
    metric, _, filter_name = key.partition(",")
    if filter_name == "none":
        return metric
    name = metric.removesuffix("_stderr")
    return f"{name},{filter_name}{metric.removeprefix(name)}"
