"""Where a runtime takes a model's prompt from its name instead of from the model.

LMDeploy goes through its templates in this order and takes the first whose rule the path meets, before it looks at the
model's own chat template (`match` of each class in lmdeploy/model.py; the same in 0.13.0 and 0.18.0). Texts that must
be in the lower-case path, then texts that must not.
"""

from __future__ import annotations

_LMDEPLOY: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("cogvlm", ("cogvlm",), ("cogvlm2",)),
    ("vicuna", ("vicuna",), ("llava",)),
    ("vicuna", ("wizardlm",), ()),
    ("llava-v1", ("llava", "v1"), ("v1.6-34b", "mistral")),
    ("llava-v1", ("llava-1.5",), ()),
    ("llama2", ("llama-2",), ()),
    ("llama2", ("llama2",), ()),
    ("codellama", ("codellama",), ()),
    ("chatglm", ("chatglm2",), ()),
    ("mistral", ("instruct", "mistral"), ()),
    ("mistral", ("llava", "mistral"), ()),
    ("mixtral", ("instruct", "mixtral"), ()),
    ("mixtral", ("llava", "mixtral"), ()),
    ("internvl-zh", ("internvl-chat", "v1-1"), ()),
    ("deepseek-vl", ("deepseek-vl", "chat"), ()),
    ("deepseek-vl2", ("deepseek-vl2",), ()),
    ("llava-chatml", ("llava", "v1.6-34b"), ()),
)


def lmdeploy_template(path: str) -> str | None:
    """The template that LMDeploy gives a model of this path, None where it takes the model's own."""
    low = path.lower()
    for name, wanted, unwanted in _LMDEPLOY:
        if all(text in low for text in wanted) and not any(text in low for text in unwanted):
            return name
    return None
