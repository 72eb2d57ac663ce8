"""Score folders by lmms-eval: `run_lmms_eval.py RESULT`, with a job on stdin.

The job has `include` (a folder of tasks), `task`, `folders` (name -> path; of the hf layout, answered by lmms-eval's
own llava_hf), `ours` (name -> path; answered by this package) and `report`. RESULT gets the task's exact_match by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from llava_convert.app.jobs.ask import EvalJob
from llava_convert.core.progress import Silence


def by_llava_hf(folder: str, task: str, include: str) -> float:
    manager = TaskManager("ERROR", include_path=include, model_name="llava_hf")
    arguments = f"pretrained={folder},dtype=float32,device_map=cpu"
    found = simple_evaluate(
        model="llava_hf", model_args=arguments, tasks=[task], task_manager=manager, batch_size=1, device="cpu",
        verbosity="ERROR", bootstrap_iters=0,
    )  # fmt: skip
    return float(found["results"][task]["exact_match,none"])


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    found = {name: by_llava_hf(folder, job["task"], job["include"]) for name, folder in job["folders"].items()}
    for name, source in job["ours"].items():
        asked = EvalJob(
            job["task"], source, include=job["include"], work_dir=f"{name}-eval", device="cpu", report=job["report"]
        )
        result = asked.run(Silence())
        (found[name],) = [one.value for one in result.scores if one.metric == "exact_match"]
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
