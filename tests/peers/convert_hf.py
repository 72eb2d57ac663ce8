"""Run llama.cpp's own convert_hf_to_gguf.py: `convert_hf.py [--pre NAME] ITS-ARGUMENTS…`, inside its environment.

`--pre` names the pre-tokenizer of a tokenizer that was made here. The converter knows tokenizers by a hash of what they
make of one text, so it refuses every vocabulary that it was not told of; a name is all that the hash decides.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

CONVERTER = Path(sys.prefix) / "src" / "convert_hf_to_gguf.py"


def main() -> None:
    """Run the converter."""
    arguments = sys.argv[1:]
    # sentencepiece's own messages want a protobuf that the converter's pins do not allow; transformers has older ones.
    from transformers.utils import sentencepiece_model_pb2_new

    sys.modules["sentencepiece.sentencepiece_model_pb2"] = sentencepiece_model_pb2_new
    sys.path.insert(0, str(CONVERTER.parent))
    if arguments[:1] == ["--pre"]:
        name, arguments = arguments[1], arguments[2:]
        from conversion.base import TextModel

        TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    sys.argv = [str(CONVERTER), *arguments]
    runpy.run_path(str(CONVERTER), run_name="__main__")


if __name__ == "__main__":
    main()
