"""A model as EleutherAI's lm-evaluation-harness asks it, for the tasks that are not built in.

`lm_eval` is optional and slow to load: it is imported inside the functions.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from gptforge.device import Precision
from gptforge.errors import RunError, UserError, install_hint
from gptforge.evaluate.tasks import TASKS, loglikelihoods
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams

BOOTSTRAP_ITERS = 1000
"""For standard errors of figures that are no means; the harness's 100,000 take minutes."""
MAX_GEN_TOKS = 256
"""Written where a task does not say how much: the harness's own default."""


def load_task_manager(names: Sequence[str], include_path: str) -> Any:
    """The harness's task manager, after checking that it knows the names and has their questions.

    Raises:
        UserError: if lm_eval is not installed, a name is unknown, or questions cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        raise UserError(
            f"--tasks {names[0]}: built in are {', '.join(TASKS)}; others are asked by the package "
            f"lm_eval, which is not installed: {install_hint('lm-eval')}"
        ) from None
    manager = TaskManager(include_path=include_path or None)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, [*TASKS, *manager.all_tasks], n=3)
            like = f"; like it are {', '.join(close)}" if close else ""
            raise UserError(
                f"--tasks {name}: neither built in ({', '.join(TASKS)}) nor known to lm_eval{like}"
            )
    for name in names:
        try:
            get_task_dict([name], manager)
        except Exception as error:
            # A task fetches its questions here, and may run code of its own to read them.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--tasks {name}: lm_eval cannot load its questions: {first}: they come from the "
                "Hugging Face Hub, which takes a network"
            ) from None
    return manager


def run_harness(
    model: LanguageModel, names: Sequence[str], manager: Any, precision: Precision, limit: int
) -> dict[str, dict[str, float]]:
    """Each task's figures, by their names in the harness; `questions` is how many were asked.

    Args:
        writer: model and tokenizer.
        names: tasks that `harness_tasks` knew.
        manager: what it returned.
        precision: of the products.
        limit: ask the first so many of each task; 0: all.
    """
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=harness_model(model, precision),
        tasks=list(names),
        limit=limit or None,
        task_manager=manager,
        bootstrap_iters=BOOTSTRAP_ITERS,
        log_samples=False,
    )
    counts = found.get("n-samples", {})
    scores = {}
    for name, figures in found["results"].items():
        scores[name] = {
            _metric_name(key): float(value)
            for key, value in figures.items()
            # Its standard errors are "N/A" where there is none.
            if "," in key and isinstance(value, int | float)
        }
        if name in counts:
            scores[name]["questions"] = counts[name]["effective"]
    return scores


def harness_model(model: LanguageModel, precision: Precision) -> Any:
    """The model as one of the harness's own, for its `simple_evaluate`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):  # type: ignore[misc]
        """Answers the three kinds of requests that tasks make."""

        tokenizer_name = model.tokenizer.name

        @property
        def eot_token_id(self) -> int:
            end = model.tokenizer.eot_token
            return model.encode_prompt("")[-1] if end is None else end

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return model.encode(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs = []
            for _texts, context, ending in requests:
                ids = (context + ending)[-(model.model.config.block_size + 1) :]
                pairs.append((ids, min(len(ending), len(ids) - 1)))
            found = loglikelihoods(model, pairs, precision)
            if any(math.isnan(one.loglikelihood) for one in found):
                raise RunError("the answers are NaN: the training of this model broke down")
            return [(one.loglikelihood, one.is_greedy) for one in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=model.model.config.block_size,
                    context_len=1,
                )
                parts = [("", *make_disjoint_window(window)) for window in windows]
                sums.append(sum(known for known, _ in self._loglikelihood_tokens(parts)))
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            written = []
            for request in requests:
                context, how = request.args
                count = int(how.get("max_gen_toks", MAX_GEN_TOKS))
                stop = how.get("until") or []
                draws = SamplingParams(
                    float(how.get("temperature") or 0) if how.get("do_sample") else 0
                )
                [one] = model.generate_batch(
                    [_last(model, context, model.model.config.block_size - count)],
                    count,
                    draws,
                    stop=[stop] if isinstance(stop, str) else [text for text in stop if text],
                    seeds=[0],
                )
                written.append(one.text)
            return written

    return HarnessModel()


def _last(writer: LanguageModel, text: str, room: int) -> str:
    """The end of a text that leaves room for what is to be written, as the harness cuts it."""
    ids = writer.encode(text)
    return writer.decode(ids[-room:]) if 0 < room < len(ids) else text


def _metric_name(key: str) -> str:
    """`acc` of `acc,none`; another filter than none stays in the name."""
    metric, _, filtered = key.partition(",")
    if filtered == "none":
        return metric
    plain = metric.removesuffix("_stderr")
    return f"{plain},{filtered}" + "_stderr" * (plain != metric)
