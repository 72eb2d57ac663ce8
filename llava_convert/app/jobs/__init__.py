"""The jobs: for each command a class that holds all that it can be told, and runs it.

`cli` makes a command of each, `api` a function. A field without a Flag is for Python alone. Nothing heavy is imported
before a job runs, since the help of a command reads its class, and a command imports the module of its own job alone.
"""

from __future__ import annotations

from llava_convert.core.flags import Flag

SOURCE = Flag(
    "A file, a folder, a training work_dir; a hub's model (ORG/NAME, hf://…, ms://…), or a URL (s3://…).",
    argument=True,
)
