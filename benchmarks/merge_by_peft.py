"""What peft's pages say to do: `merge_by_peft.py BASE ADAPTER OUT`."""

import sys

from peft import PeftModel
from transformers import LlavaForConditionalGeneration

base, adapter, out = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
