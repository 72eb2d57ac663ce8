"""Training data as the real xtuner builds them of a config: `read_data.py RESULT`, {"config": …, "seed": …} on stdin.

Every random state is set by mmengine first, as its Runner does. RESULT gets, sample by sample, the token ids, the
labels, every 97th number of the picture, and the length that its sampler sorts by.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import set_random_seed
from xtuner.registry import BUILDER


def main() -> None:
    job = json.load(sys.stdin)
    config = Config.fromfile(job["config"])
    set_random_seed(job["seed"])
    data = BUILDER.build(config.train_dataloader.dataset)
    found = [
        {"ids": one["input_ids"], "labels": one["labels"], "pixels": one["pixel_values"].flatten()[::97].tolist()}
        for one in (data[i] for i in range(len(data)))
    ]
    parts = getattr(data, "datasets", [data])
    lengths = [length for part in parts for length in part.modality_length]
    Path(sys.argv[1]).write_text(json.dumps({"samples": found, "lengths": lengths}))


if __name__ == "__main__":
    main()
