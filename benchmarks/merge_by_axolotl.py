"""axolotl's merge by shards: `merge_by_axolotl.py BASE ADAPTER OUT`, in the environment that has it."""

import sys
from importlib.util import find_spec
from types import ModuleType

# The packages around the function import axolotl's training, whose libraries need a GPU; the function does not.
for name in ("axolotl.cli", "axolotl.cli.utils"):
    spec = find_spec("axolotl")
    assert spec is not None and spec.submodule_search_locations is not None
    package = ModuleType(name)
    package.__path__ = ["/".join([place, *name.split(".")[1:]]) for place in spec.submodule_search_locations]
    sys.modules[name] = package

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient  # noqa: E402

base, adapter, out = sys.argv[1:]
merge_lora_sharded_efficient(base, adapter, out)
