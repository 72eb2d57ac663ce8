"""A model of ours as lmms-eval drives it (0.7.3): its tasks, prompts and metrics, our loader, template and stops.

Its own `llava_hf` loads one layout, crops where training padded, and stops at the tokenizer's EOS alone: of a model
whose turns end with another token the share of right answers fell from 0.979 to 0.271.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_convert.app.ask.prompts import IMAGE
from llava_convert.app.ask.runtimes import Runtime
from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.core.values import dataclass

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Asked:
    """A question of a task, as it was put, with its pictures and the answer."""

    task: str
    text: str
    pictures: list[Image]
    answer: str


_LIMIT = 1024  # tokens, where a task names no limit, as lmms-eval's models have it


def evaluate(
    runtime: Runtime,
    tasks: Sequence[str],
    *,
    include: Path | None,
    limit: int | None,
    advance: Callable[[int], Callable[[int], None]],
    keep: Callable[[Asked], None],
) -> dict[str, Any]:
    """lmms-eval's results of these tasks. `advance` makes the progress of a number of requests; `keep` gets each one.

    Raises UsageError where it is not installed or does not know a task, InputError where a data set cannot be had.
    """
    with redirect_stdout(sys.stderr):  # where it talks; ours is data
        return _evaluate(runtime, tasks, include=include, limit=limit, advance=advance, keep=keep)


def _evaluate(
    runtime: Runtime,
    tasks: Sequence[str],
    *,
    include: Path | None,
    limit: int | None,
    advance: Callable[[int], Callable[[int], None]],
    keep: Callable[[Asked], None],
) -> dict[str, Any]:
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as problem:
        raise UsageError(
            f"eval TASKS needs lmms-eval, which cannot be imported: {problem}",
            hint="pip install lmms-eval 'llava-convert[eval]'",
        ) from problem
    manager = TaskManager("ERROR", include_path=None if include is None else str(include), model_name="llava_convert")
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(
            f"lmms-eval has no task {', '.join(unknown)}",
            hint="its documentation lists them; --include adds tasks of your own",
        )
    try:
        found: dict[str, Any] = simple_evaluate(
            model=_model(runtime, advance, keep),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            batch_size=1,
            verbosity="ERROR",
            bootstrap_iters=0,
        )
    except (OSError, ConnectionError, ValueError) as problem:
        raise InputError(
            f"lmms-eval cannot run {', '.join(tasks)}: {problem}",
            hint="its data sets come from the hub: check that they can be downloaded",
        ) from problem
    return found


def _model(runtime: Runtime, advance: Callable[[int], Callable[[int], None]], keep: Callable[[Asked], None]) -> Any:
    """A runtime as an object of lmms-eval's interface, which is a class of its own."""
    from lmms_eval.api.model import lmms

    class Model(lmms):  # type: ignore[misc]
        is_simple = True

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            step, answers = advance(len(requests)), []
            for request in requests:
                context, settings, to_visual, doc_id, task, split = request.args
                visuals = to_visual(self.task_dict[task][split][doc_id]) or []
                asked = _answer(runtime, task, context, visuals, settings)
                keep(asked)
                answers.append(asked.answer)
                step(1)
            return answers

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise _unfit("asks in several rounds")

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise _unfit("scores likelihoods")

    return Model()


def _unfit(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"a benchmark that {why} cannot be run: answers are generated, one to a question",
        hint="take another benchmark, or run lmms-eval itself on the hf layout",
    )


def _answer(runtime: Runtime, task: str, context: str, visuals: Sequence[Any], settings: Mapping[str, Any]) -> Asked:
    """As lmms-eval's llava_hf asks: pictures in front, where the task's text has no place for them."""
    pictures = [picture.convert("RGB") for picture in visuals]
    if IMAGE not in context and pictures:
        context = " ".join([IMAGE] * len(pictures)) + f"\n{context}"
    limit = int(settings.get("max_new_tokens") or _LIMIT)
    answer = runtime.answer([{"role": "user", "content": context}], pictures, limit=limit).text
    return Asked(task, context, pictures, answer)
