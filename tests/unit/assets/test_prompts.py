"""Chat templates against what xtuner 0.1.23 itself makes of a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from llava_convert.assets.prompts import (
    chat_template,
    hf_templates,
    prompt_template,
    prompt_templates,
    stop_ids,
    wrap_chat_template,
)
from llava_convert.assets.tokenizer.files import open_tokenizer
from llava_convert.core.errors import UsageError
from llava_convert.storage.sidecars import folder_sidecars

# Two turns put through xtuner's template_map_fn and joined as its encode_fn joins them, <BOS> and <EOS> for the ids
# that it puts in. minicpm has no system text.
TRAINED = {
    "default": (
        "<BOS><|System|>:Be brief.\n<|User|>:<image>\nWhat?\n<|Bot|>:A cat.<EOS>\n"
        "<BOS><|User|>:Sure?\n<|Bot|>:Yes.<EOS>\n"
    ),
    "zephyr": (
        "<BOS><|system|>\nBe brief.\n<|user|>\n<image>\nWhat?\n<|assistant|>\nA cat.<EOS>\n"
        "<BOS><|user|>\nSure?\n<|assistant|>\nYes.<EOS>\n"
    ),
    "internlm_chat": (
        "<BOS><|System|>:Be brief.\n<|User|>:<image>\nWhat?<eoh>\n<|Bot|>:A cat.<eoa>\n"
        "<|User|>:Sure?<eoh>\n<|Bot|>:Yes.<eoa>\n"
    ),
    "internlm2_chat": (
        "<BOS><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n"
        "What?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\n"
        "Sure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    ),
    "moss_sft": (
        "<BOS>Be brief.\n<|Human|>: <image>\nWhat?<eoh>\nA cat.<EOS>\n<BOS><|Human|>: "
        "Sure?<eoh>\nYes.<EOS>\n"
    ),
    "llama2_chat": (
        "<BOS>[INST] <<SYS>>\n You are a helpful, respectful and honest assistant. Always "
        "answer as helpfully as possible, while being safe. Your answers should not "
        "include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
        "content. Please ensure that your responses are socially unbiased and positive "
        "in nature.\nBe brief.\n<</SYS>>\n [/INST] [INST] <image>\nWhat? [/INST]A cat.<EOS>\n"
        "<BOS>[INST] Sure? [/INST]Yes.<EOS>\n"
    ),
    "code_llama_chat": (
        "<BOS>Be brief.\n[INST] <image>\nWhat? [/INST]A cat.<EOS><BOS>[INST] Sure? "
        "[/INST]Yes.<EOS>"
    ),
    "chatglm2": (
        "<BOS>Be brief.\n[Round 1]\n\n问：<image>\nWhat?\n\n答：A cat.<EOS>\n\n<BOS>[Round 2]\n\n"
        "问：Sure?\n\n答：Yes.<EOS>\n\n"
    ),
    "chatglm3": (
        "<BOS><|system|>\nBe brief.<|user|>\n<image>\nWhat?<|assistant|>\nA cat.<EOS>\n"
        "<BOS><|user|>\nSure?<|assistant|>\nYes.<EOS>\n"
    ),
    "qwen_chat": (
        "<BOS><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n"
        "What?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\n"
        "Sure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    ),
    "baichuan_chat": (
        "<BOS>Be brief.\n<reserved_102><image>\nWhat?<reserved_103>A cat.<EOS>\n"
        "<BOS><reserved_102>Sure?<reserved_103>Yes.<EOS>\n"
    ),
    "baichuan2_chat": (
        "<BOS>Be brief.\n<reserved_106><image>\nWhat?<reserved_107>A cat.<EOS>\n"
        "<BOS><reserved_106>Sure?<reserved_107>Yes.<EOS>\n"
    ),
    "wizardlm": (
        "<BOS>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's "
        "questions. Be brief.\n USER: <image>\nWhat? ASSISTANT:A cat.<EOS>\n<BOS>USER: "
        "Sure? ASSISTANT:Yes.<EOS>\n"
    ),
    "wizardcoder": (
        "<BOS>Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\nBe brief.\n ### Instruction:\n<image>\n"
        "What?\n\n### Response:A cat.<EOS>\n\n<BOS>### Instruction:\nSure?\n\n### "
        "Response:Yes.<EOS>\n\n"
    ),
    "vicuna": (
        "<BOS>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's "
        "questions. Be brief.\n USER: <image>\nWhat? ASSISTANT:A cat.<EOS>\n<BOS>USER: "
        "Sure? ASSISTANT:Yes.<EOS>\n"
    ),
    "deepseek_coder": (
        "<BOS>You are an AI programming assistant, utilizing the DeepSeek Coder model, "
        "developed by DeepSeekCompany, and you only answer questions related to computer "
        "science. For politically sensitive questions, security and privacy issues, and "
        "other non-computer science questions, you will refuse to answer. Be brief.\n### "
        "Instruction:\n<image>\nWhat?\n### Response:\nA cat.<EOS>\n<BOS>### Instruction:\n"
        "Sure?\n### Response:\nYes.<EOS>\n"
    ),
    "deepseekcoder": (
        "<BOS>You are an AI programming assistant, utilizing the DeepSeek Coder model, "
        "developed by DeepSeekCompany, and you only answer questions related to computer "
        "science. For politically sensitive questions, security and privacy issues, and "
        "other non-computer science questions, you will refuse to answer. Be brief.\n### "
        "Instruction:\n<image>\nWhat?\n### Response:\nA cat.<EOS>\n<BOS>### Instruction:\n"
        "Sure?\n### Response:\nYes.<EOS>\n"
    ),
    "deepseek_moe": (
        "<BOS>[INST] Be brief. [/INST]\n[INST] <image>\nWhat? [/INST]A cat.<EOS>\n"
        "<BOS>[INST] Sure? [/INST]Yes.<EOS>\n"
    ),
    "deepseek_v2": (
        "<BOS>Be brief.\n\nUser: <image>\nWhat?\n\nAssistant: A cat.<｜end▁of▁sentence｜>User: "
        "Sure?\n\nAssistant: Yes.<｜end▁of▁sentence｜>"
    ),
    "mistral": (
        "<BOS>[INST] Be brief. [/INST]\n[INST] <image>\nWhat? [/INST]A cat.<EOS>\n"
        "<BOS>[INST] Sure? [/INST]Yes.<EOS>\n"
    ),
    "mixtral": (
        "<BOS>[INST] Be brief. [/INST]\n[INST] <image>\nWhat? [/INST]A cat.<EOS>\n"
        "<BOS>[INST] Sure? [/INST]Yes.<EOS>\n"
    ),
    "minicpm": (
        "<BOS><用户> <image>\nWhat? <AI>A cat.<EOS>\n<BOS><用户> Sure? <AI>Yes.<EOS>\n"
    ),
    "gemma": (
        "<BOS><start_of_turn>system\nBe brief.<end_of_turn>\n<start_of_turn>user\n<image>\n"
        "What?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn><EOS>\n"
        "<BOS><start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n"
        "Yes.<end_of_turn><EOS>\n"
    ),
    "cohere_chat": (
        "<BOS><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be "
        "brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>\n"
        "What?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A "
        "cat.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Sure?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Yes.<|END_OF_TURN_TOKEN|>"
    ),
    "llama3_chat": (
        "<BOS><|start_header_id|>system<|end_header_id|>\n\nBe "
        "brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n"
        "What?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA "
        "cat.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Sure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    ),
    "phi3_chat": (
        "<BOS><|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\nA "
        "cat.<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\nYes.<|end|>\n"
    ),
}  # fmt: skip

# Llama-3-Instruct's own, of April 2024: string content only.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PICTURE_LAST = [{"type": "text", "text": " What?"}, {"type": "image"}]


def render(template: str, messages: list[dict[str, Any]], **values: Any) -> str:
    """As transformers renders: in its immutable sandbox, with its settings of white space."""
    rendered = _compile_jinja_template(template).render(messages=messages, eos_token="<EOS>", **values)
    assert isinstance(rendered, str)
    return rendered


def conversation(name: str, picture: Any) -> list[dict[str, Any]]:
    system = [] if name == "minicpm" else [{"role": "system", "content": "Be brief."}]
    return [
        *system,
        {"role": "user", "content": picture},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]


def test_every_name_of_xtuner_is_known() -> None:
    assert set(prompt_templates()) == set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(
    "picture", ["<image>\nWhat?", [{"type": "image"}, {"type": "text", "text": "What?"}], PICTURE_LAST]
)
def test_renders_the_training_text(name: str, picture: Any) -> None:
    messages = conversation(name, picture)
    assert render(chat_template(name, bos_token="<BOS>"), messages) == TRAINED[name]
    # The first BOS is the tokenizer's then; those of later turns are still the template's.
    assert "<BOS>" + render(chat_template(name, bos_token="<BOS>", first_bos=False), messages) == TRAINED[name]
    assert render(chat_template(name, bos_token=None), messages) == TRAINED[name].replace("<BOS>", "")


@pytest.mark.parametrize("name", TRAINED)
def test_the_generation_prompt_ends_where_the_answer_began(name: str) -> None:
    messages = conversation(name, "<image>\nWhat?")
    first = messages[: next(i for i, m in enumerate(messages) if m["role"] == "assistant")]
    template = chat_template(name, bos_token="<BOS>")
    assert render(template, first, add_generation_prompt=True) == TRAINED[name].partition("A cat.")[0]
    assert render(template, [*first, messages[len(first)]], add_generation_prompt=False) == (
        TRAINED[name][: TRAINED[name].index("A cat.")] + "A cat." + _ending(name)
    )


def _ending(name: str) -> str:
    row = prompt_template(name)
    return row.suffix + ("" if row.suffix_is_eos else "<EOS>") + row.sep


def test_text_parts_are_joined_and_left_as_they_are_without_a_picture() -> None:
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": "b "}]
    template = chat_template("default", bos_token=None)
    assert render(template, [{"role": "user", "content": parts}]) == "<|User|>: a b \n"


def test_a_picture_alone_has_no_line_break() -> None:
    # llava_map_fn strips the text after it has put the picture in front.
    template = chat_template("llama3_chat", bos_token=None)
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    assert render(template, [{"role": "user", "content": [{"type": "image"}]}]) == user + "<image><|eot_id|>"


def test_what_a_template_cannot_say_is_refused() -> None:
    refused: list[str] = []

    def raise_exception(message: str) -> None:
        refused.append(message)

    for messages in (
        [{"role": "system", "content": "Be brief."}],
        [{"role": "tool", "content": "1"}],
        [{"role": "user", "content": [{"type": "video"}]}],
    ):
        template = _compile_jinja_template(chat_template("minicpm", bos_token=None))
        template.environment.globals["raise_exception"] = raise_exception
        template.globals["raise_exception"] = raise_exception
        template.render(messages=messages)
    assert refused == [
        "the prompt template minicpm has no system message",
        "unknown role tool",
        "only image and text can be in a message, not video",
    ]


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError) as caught:
        prompt_template("llama4_chat")
    assert "llama3_chat" in str(caught.value.hint)


def test_wrapped_template_renders_strings_as_before_and_lists_like_strings() -> None:
    wrapped = wrap_chat_template(LLAMA3)
    strings = [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A cat."},
    ]
    lists = [
        {"role": "system", "content": [{"type": "text", "text": "  Be brief. "}]},
        {"role": "user", "content": PICTURE_LAST},
        {"role": "assistant", "content": "A cat."},
    ]
    for generate in (False, True):
        before = render(LLAMA3, strings, bos_token="<BOS>", add_generation_prompt=generate)
        assert before.startswith("<BOS><|start_header_id|>system")
        assert render(wrapped, strings, bos_token="<BOS>", add_generation_prompt=generate) == before
        assert render(wrapped, lists, bos_token="<BOS>", add_generation_prompt=generate) == before
        silent = wrap_chat_template(LLAMA3, writes_bos=False)
        assert "<BOS>" + render(silent, lists, bos_token="<BOS>", add_generation_prompt=generate) == before


@pytest.mark.parametrize("start", ["", "\n", "  \n\n", "  {% if true %}x{% endif %}\n", "{# c #}\n"])
def test_wrapping_keeps_white_space_at_the_start(start: str) -> None:
    existing = start + "{{ messages[0]['content'] }}"
    messages = [{"role": "user", "content": "Hi"}]
    for writes_bos in (True, False):
        wrapped = wrap_chat_template(existing, writes_bos=writes_bos)
        assert render(wrapped, messages, bos_token="") == render(existing, messages, bos_token="")


def test_a_template_that_knows_pictures_is_not_wrapped_again() -> None:
    assert wrap_chat_template(wrap_chat_template(LLAMA3)) == wrap_chat_template(LLAMA3)
    ours = chat_template("vicuna", bos_token="<s>")
    assert wrap_chat_template(ours) == ours


def test_messages_keep_their_other_keys_when_wrapped() -> None:
    existing = "{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}"
    assert render(wrap_chat_template(existing), [{"role": "user", "name": "Ann", "content": "Hi"}]) == "Ann:Hi"


def _tokenizer_folder(folder: Path, post_processor: Any, **config: Any) -> Path:
    vocab = {"a": 0, "<BOS>": 1, "<EOS>": 2, "<|eot_id|>": 3, "<eoc>": 4}
    tokenizer = {"added_tokens": [], "post_processor": post_processor, "model": {"type": "BPE", "vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<BOS>", "eos_token": "<EOS>"} | config))
    return folder


ADDS_BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<BOS>"}}, {"Sequence": {"id": "A"}}]}


def test_the_processor_leaves_the_first_bos_to_a_tokenizer_that_adds_it(tmp_path: Path) -> None:
    folder = _tokenizer_folder(tmp_path, {"type": "Sequence", "processors": [ADDS_BOS]}, chat_template=LLAMA3)
    tokenizer = open_tokenizer(folder_sidecars(folder))
    assert tokenizer.adds_bos
    for name in ("llama3_chat", None):
        templates = hf_templates(tokenizer, name)
        assert templates.tokenizer is not None
        assert templates.processor is not None
        messages = [{"role": "user", "content": "Hi"}]
        written = render(templates.tokenizer, messages, bos_token="<BOS>")
        assert written.startswith("<BOS><|start_header_id|>user")
        assert "<BOS>" + render(templates.processor, messages, bos_token="<BOS>") == written


def test_the_processor_writes_the_bos_for_a_tokenizer_that_does_not(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder_sidecars(_tokenizer_folder(tmp_path, None)))
    assert not tokenizer.adds_bos
    templates = hf_templates(tokenizer, "llama3_chat")
    assert templates.processor == templates.tokenizer
    assert hf_templates(tokenizer, None).tokenizer is None


def test_qwen_was_trained_without_bos(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder_sidecars(_tokenizer_folder(tmp_path, None, tokenizer_class="Qwen2Tokenizer")))
    assert hf_templates(tokenizer, "qwen_chat").tokenizer == chat_template("qwen_chat", bos_token=None)


def test_stop_ids_are_ordered_and_unique(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder_sidecars(_tokenizer_folder(tmp_path, None)))
    assert stop_ids(tokenizer, {"eos_token_id": 7}, "llama3_chat") == [7, 2, 3]
    assert stop_ids(tokenizer, {"eos_token_id": [3, 2]}, "llama3_chat") == [3, 2]
    assert stop_ids(tokenizer, {}, None) == [2]
    # <eom> is no token of this vocabulary: a stop word of several tokens cannot be an id.
    assert stop_ids(tokenizer, {"eos_token_id": None}, "moss_sft") == [2, 4]
