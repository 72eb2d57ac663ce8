"""A folder loaded and saved again in float16: `save_by_transformers.py SOURCE OUT`."""

import sys

from transformers import AutoProcessor, LlavaForConditionalGeneration

source, out = sys.argv[1:]
LlavaForConditionalGeneration.from_pretrained(source, dtype="float16").save_pretrained(out)
AutoProcessor.from_pretrained(source).save_pretrained(out)
