"""README.md of an output: true, short, and without a trace of this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

import llava_convert
from llava_convert._version import __version__
from llava_convert.app import convert as engine
from llava_convert.app.card import card
from llava_convert.app.card.facts import Facts
from llava_convert.app.card.front_matter import _scalar
from llava_convert.app.card.origin import datasets_of
from llava_convert.app.card.quickstarts import CONDITIONS
from llava_convert.app.card.tables import size, table
from llava_convert.app.card.traps import lmdeploy_template
from llava_convert.app.card.words import Words
from llava_convert.app.jobs.publish import ReleaseJob
from llava_convert.app.options import Options
from llava_convert.app.planning import prepare
from llava_convert.app.publish.release import plan as plan_release
from llava_convert.layouts.info import TARGETS
from llava_convert.storage.remote.session import Session
from tests.interop.card_blocks import block, blocks
from tests.interop.wide_models import PUBLISHED, WIDES, make_wide

Make = Callable[..., str]
TEXTS = Path(llava_convert.__file__).parent / "app" / "card" / "texts"
IDS = {"llm_id": "meta/tiny", "visual_encoder_id": "openai/tiny"}


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    def go(to: str, source: Path | None = None, **options: Any) -> str:
        llava_convert.convert(source or tiny / "iter_2.pth", to=to, out=tmp_path / "my-llava", force=True, **options)
        return (tmp_path / "my-llava" / "README.md").read_text(encoding="utf-8")

    return go


def metadata(text: str) -> dict[str, Any]:
    """The front matter, by the hub's own library."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


# Front matter.


@pytest.mark.parametrize(
    ("to", "library", "tags"),
    [
        ("hf", "transformers", ["llava", "multimodal", "vision", "llama", "xtuner"]),
        ("xtuner", "xtuner", ["llava", "multimodal", "vision", "llama", "xtuner"]),
        ("official", "llava", ["llava", "multimodal", "vision", "llama", "xtuner"]),
        ("gguf", "gguf", ["llava", "multimodal", "vision", "llama", "gguf", "llama.cpp", "ollama", "xtuner"]),
    ],
)
def test_front_matter_against_the_hub_library(make: Make, to: str, library: str, tags: list[str]) -> None:
    text = make(to, **IDS)
    assert metadata(text) == {
        "pipeline_tag": "image-text-to-text",
        "library_name": library,
        "base_model": ["meta/tiny", "openai/tiny"],
        "base_model_relation": "finetune",
        "tags": tags,
    }
    assert ModelCard(text).text.strip().startswith("# my-llava")


@pytest.mark.parametrize(
    ("to", "part", "task", "library", "bases", "relation"),
    [
        ("hf", "llm", "text-generation", "transformers", ["meta/tiny"], "finetune"),
        ("official", "llm", "text-generation", "transformers", ["meta/tiny"], "finetune"),
        ("hf", "visual-encoder", "image-feature-extraction", "transformers", ["openai/tiny"], "finetune"),
        ("xtuner", "visual-encoder", "image-feature-extraction", "transformers", ["openai/tiny"], "adapter"),
        ("official", "projector", "image-text-to-text", "llava", ["meta/tiny", "openai/tiny"], "finetune"),
        ("gguf", "llm", "text-generation", "gguf", ["meta/tiny"], "finetune"),
        ("gguf", "visual-encoder", "image-feature-extraction", "gguf", ["openai/tiny"], "finetune"),
    ],
)
def test_front_matter_of_one_part(
    make: Make, to: str, part: str, task: str, library: str, bases: list[str], relation: str
) -> None:
    data = metadata(make(to, part=part, **IDS))
    assert (data["pipeline_tag"], data["library_name"]) == (task, library)
    assert (data["base_model"], data["base_model_relation"]) == (bases, relation)
    assert ("vision" in data["tags"]) == (part != "llm")


def test_folder_names_are_no_base_models(make: Make) -> None:
    data = metadata(make("hf"))
    assert "base_model" not in data and "base_model_relation" not in data


def test_a_hubs_model_in_another_layout_is_its_own_base(make: Make, tmp_path: Path) -> None:
    """A change of layout alone is none of the hub's relations; a quantisation is one."""
    make("official", **IDS)
    cached = tmp_path / "models--org--a-llava" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    (tmp_path / "my-llava").rename(cached)
    plain, quantised = make("hf", cached), make("gguf", cached, outtype="q8_0")
    assert metadata(plain)["base_model"] == metadata(quantised)["base_model"] == ["org/a-llava"]
    assert "base_model_relation" not in metadata(plain)
    assert metadata(quantised)["base_model_relation"] == "quantized"
    assert "from [org/a-llava](https://huggingface.co/org/a-llava), the layout of the original LLaVA code." in plain


@given(st.from_regex(r"[\w.-]{1,8}/[\w.-]{1,8}", fullmatch=True) | st.sampled_from(["on", "No", "null", "1e3", "1.0"]))
def test_texts_are_read_back_from_yaml_as_texts(text: str) -> None:
    assert yaml.safe_load(f"key: {_scalar(text)}\nlist:\n- {_scalar(text)}\n") == {"key": text, "list": [text]}


def test_ids_that_look_like_yaml(make: Make) -> None:
    data = metadata(make("hf", llm_id="7e5/1.0", visual_encoder_id="null/no"))
    assert data["base_model"] == ["7e5/1.0", "null/no"]


# License and data: told only where something says them.


def with_readme(folder: Path, front: str) -> None:
    (folder / "README.md").write_text(f"---\n{front}---\n\n# A model\n", encoding="utf-8")


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the base models, to put cards into."""
    for part in ("llm", "vit"):
        shutil.copytree(tiny / part, tmp_path / "bases" / part)
    return tmp_path / "bases"


def test_no_license_is_made_up(make: Make) -> None:
    text = make("hf", **IDS)
    assert "license" not in metadata(text) and "datasets" not in metadata(text) and "## License" not in text


def test_license_of_the_base_models_card(make: Make, copied: Path) -> None:
    """The language model's, whatever the tower's is; a link within the repository becomes one to it."""
    with_readme(
        copied / "llm", "license: other\nlicense_name: tiny-1\nlicense_link: LICENSE\nextra: |\n  ---\n  text\n"
    )
    with_readme(copied / "vit", "license: mit\n")
    bases = {"llm": str(copied / "llm"), "visual_encoder": str(copied / "vit")}
    text = make("hf", **bases, **IDS)
    data = metadata(text)
    link = "https://huggingface.co/meta/tiny/blob/main/LICENSE"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny-1", link)
    assert f"[other]({link}): the license of the language model meta/tiny." in text
    assert "license" not in metadata(make("hf", part="visual-encoder", visual_encoder=bases["visual_encoder"]))


@pytest.mark.parametrize(
    "front",
    ["license: [mit]\n", "license: 'a b'\n", "license: <b>\n", "- a list\n", "a: [\n", "license: &a [*a]\n", "!!x y\n"],
)
def test_a_card_that_says_no_license(make: Make, copied: Path, front: str) -> None:
    with_readme(copied / "llm", front)
    assert "license" not in metadata(make("hf", llm=str(copied / "llm")))


@pytest.mark.parametrize(
    ("base", "license", "link"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", None),
        ("lmsys/vicuna-7b-v1.5", "llama2", None),
        (
            "microsoft/Phi-3-mini-4k-instruct",
            "mit",
            "https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/resolve/main/LICENSE",
        ),
    ],
)
def test_license_of_a_published_language_model(make: Make, base: str, license: str, link: str | None) -> None:
    text = make("hf", llm_id=base, visual_encoder_id="openai/tiny")
    data = metadata(text)
    assert (data["license"], data.get("license_link")) == (license, link)
    assert f": the license of the language model {base}." in text


@pytest.mark.slow
def test_what_the_sources_own_card_says_goes_on(make: Make, tmp_path: Path) -> None:
    make("official", llm_id="meta-llama/Meta-Llama-3-8B-Instruct")
    source = (tmp_path / "my-llava").rename(tmp_path / "source")
    with_readme(source, "license: apache-2.0\ndatasets: [org/pictures, not an id]\nlanguage: [en, zh, English]\n")
    text = make("hf", source)
    data = metadata(text)
    assert (data["license"], data["datasets"], data["language"]) == ("apache-2.0", ["org/pictures"], ["en", "zh"])
    assert "`apache-2.0`: the license of the converted model." in text


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["./data/llava_data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"], ["liuhaotian/LLaVA-Pretrain"]),
        (["D:\\data\\LLaVA-Instruct-150K\\llava_v1_5_mix665k.json"], ["liuhaotian/LLaVA-Instruct-150K"]),
        (["x/share-captioner_coco_lcs_sam_1246k_1107.json"], ["Lin-Chen/ShareGPT4V"]),
        (["x/geoqa+.jsonl", "x/ai2d_train_12k.jsonl"], ["OpenGVLab/InternVL-Chat-V1-2-SFT-Data"]),
        (["my-LLaVA-Pretrain/train.json", "LLaVA-Pretrain-mine/a.json", "train.json"], []),
    ],
)
def test_data_sets_by_whole_parts_of_paths(paths: list[str], ids: list[str]) -> None:
    assert list(datasets_of(paths)) == ids


def test_data_sets_of_the_training_config(make: Make, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        "root = './data/'\n"
        "model = dict(type='LLaVAModel', llm=dict(pretrained_model_name_or_path='llm'),\n"
        "             visual_encoder=dict(pretrained_model_name_or_path='vit'),\n"
        "             visual_encoder_lora=dict(type='LoraConfig', r=8, lora_alpha=16))\n"
        "one = dict(data_path=root + 'LLaVA-Pretrain/x.json')\n"
        "two = dict(data_path=root + 'sharegpt4v_instruct_gpt4-vision_cap100k.json')\n"
        "train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[one, two, dict(data_path=None)]))\n"
    )
    bases = {"llm": str(tiny / "llm"), "visual_encoder": str(tiny / "vit")}
    data = metadata(make("hf", config=config, **bases))
    assert data["datasets"] == ["Lin-Chen/ShareGPT4V", "liuhaotian/LLaVA-Pretrain"]


# The prompt.


@pytest.mark.parametrize("template", ["llama3_chat", "vicuna", "internlm2_chat", "phi3_chat", "mistral", "chatglm3"])
@pytest.mark.parametrize("to", ["hf", "official"])
def test_the_prompt_is_what_the_tokenizer_renders(make: Make, tmp_path: Path, to: str, template: str) -> None:
    text = make(to, prompt_template=template)
    shown = block(tmp_path / "my-llava", "The prompt", "text")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-llava")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]}]
    assert shown == tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + "\n"
    assert f"xtuner calls it `{template}`" in text and shown.count("<image>") == 1


@pytest.mark.parametrize("to", ["hf", "gguf", "xtuner"])
def test_the_prompt_is_known_again_from_an_earlier_output(make: Make, tmp_path: Path, to: str) -> None:
    make("official", prompt_template="internlm2_chat")
    source = (tmp_path / "my-llava").rename(tmp_path / "source")
    text = make(to, source)
    assert "xtuner calls it `internlm2_chat`" in text and "An answer ends with `<|im_end|>`." in text


def test_a_template_of_someone_else_is_not_run(make: Make, tmp_path: Path) -> None:
    make("official")
    source = (tmp_path / "my-llava").rename(tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('never rendered') }}"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    text = make("hf", source)
    assert "The format is that of the chat template in the tokenizer's files." in text
    assert "apply_chat_template" in text and [b for b in blocks(tmp_path / "my-llava") if b.language == "text"] == []


def test_without_a_template_it_is_said(make: Make, tmp_path: Path) -> None:
    make("official")
    source = (tmp_path / "my-llava").rename(tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    text = make("hf", source)
    assert "`--prompt-template NAME`" in text and "apply_chat_template" not in text and "--chat-template" not in text


# What LMDeploy makes of a name. Each was given to lmdeploy 0.18.0's own get_chat_template.


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("llava-llama-3-8b-v1_1-transformers", "llava-v1"),
        ("org/LLaVA-v1.5-7b", "llava-v1"),
        ("llava-1.5-7b-hf", "llava-v1"),
        ("llava-v1.6-mistral-7b-hf", "mistral"),
        ("llava-v1.6-34b-hf", "llava-chatml"),
        ("vicuna-7b", "vicuna"),
        ("my-llama2-llava", "llama2"),
        ("llava-llama-3-8b", None),
        ("my-model-v1", None),
    ],
)
def test_templates_that_lmdeploy_takes_from_the_name(path: str, name: str | None) -> None:
    assert lmdeploy_template(path) == name


def test_the_trap_is_told_only_to_names_that_fall_into_it(make: Make) -> None:
    plain, trapped = make("hf"), make("hf", name="llava-llama-3-8b-v1_1")
    assert "\nlmdeploy serve api_server my-llava\n" in plain and "LMDeploy chooses the prompt" not in plain
    assert "\nlmdeploy serve api_server llava-llama-3-8b-v1_1 --chat-template hf\n" in trapped
    assert "it would use its own `llava-v1`" in trapped
    assert "lmdeploy serve api_server llava-v1.5 --chat-template hf\n" in make("official", name="llava-v1.5")


# Names.


def written(tiny: Path, to: str, name: str, repo: str | None = None) -> str:
    """A card alone, of a plan that is not run."""
    options = Options(to=to, out=Path(name), llm_id="meta/tiny", visual_encoder_id="openai/tiny")
    ready = prepare(tiny / "iter_2.pth", options, Session())
    return card(Facts(ready.plan, ready.target, ready.model, name, ready.options, repo), verified="full")


@pytest.mark.parametrize("to", ["hf", "official", "xtuner", "gguf"])
def test_commands_name_the_repository(tiny: Path, to: str) -> None:
    text = written(tiny, to, "local", repo="org/pushed")
    commands = [b.code for b in blocks_of(text) if b.language in ("shell", "python") and "verify" not in b.code]
    assert not any("local/" in code or '"local"' in code or " local " in code for code in commands)
    assert any("org/pushed" in code for code in commands)
    assert ("hf download org/pushed --local-dir pushed\n" in text) == (to == "gguf")
    if to == "gguf":
        assert "-m pushed/local-f16.gguf \\\n  --mmproj pushed/local-mmproj-f16.gguf" in text
    if to == "hf":
        fetch = text.index("hf download org/pushed chat_template.jinja --local-dir pushed\n")
        assert fetch < text.index("vllm serve org/pushed --chat-template pushed/chat_template.jinja\n")


def test_what_is_going_to_be_pushed_is_named_by_its_repository(tiny: Path, tmp_path: Path) -> None:
    """Or by the folder that a download from ModelScope leaves, since no runtime asks there by itself."""
    engine.convert(tiny / "iter_2.pth", Options(to="official", out=tmp_path / "out", push="org/pushed"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'load_pretrained_model(\n    "org/pushed", None, "llava-llama"\n)' in text and text.count("# out\n") == 1
    for hub, repo in (("huggingface", "org/tiny-transformers"), ("modelscope", "ms://org/tiny-transformers")):
        release = ReleaseJob(tiny / "iter_2.pth", name="org/tiny", hub=hub, only=("hf",), out=tmp_path / hub)
        assert [item.options.repo for item in plan_release(release)] == [repo]


def blocks_of(text: str) -> list[Any]:
    class Folder:
        def __truediv__(self, name: str) -> Folder:
            return self

        def read_text(self, encoding: str) -> str:
            return text

    return blocks(Folder())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "hi"', "a|b", "$HOME`x`", "ä\\ö", "two\nlines", "<b>x</b>", "![x](http:a)"]
)
def test_names_are_quoted_for_whoever_reads_them(tiny: Path, tmp_path: Path, name: str) -> None:
    text = written(tiny, "hf", name)
    heading = MarkdownIt().render(ModelCard(text).text.strip().splitlines()[0])
    assert "<" not in heading.removeprefix("<h1>").removesuffix("</h1>\n")
    assert unescape(heading) == f"<h1>{' '.join(name.split())}</h1>\n"
    python = next(b.code for b in blocks_of(text) if b.language == "python")
    assert python.count(json.dumps(name, ensure_ascii=False)) == 1
    compile(python, "card", "exec")
    shell = next(b.code for b in blocks_of(text) if b.code.startswith("vllm serve"))
    printed = subprocess.run(
        ["sh", "-c", shell.replace("vllm", "printf '%s\\0'", 1)], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split("\0")[1] == name
    request = next(b.code for b in blocks_of(text) if b.code.startswith("curl"))
    (tmp_path / "picture.jpg").write_bytes(b"ABC")
    command = "cat <<EOF" + request.partition("<<EOF")[2]
    shown = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    asked = json.loads(shown.stdout)
    assert asked["model"] == name
    assert asked["messages"][0]["content"][0]["image_url"]["url"] == "data:image/jpeg;base64,QUJD"


# How it was made.


def test_what_it_says_of_hf(make: Make) -> None:
    text = make("hf", **IDS)
    assert 'from_pretrained(\n    "my-llava", torch_dtype="auto", device_map="auto"\n)' in text
    assert "Rows 512 to 575 of the vocabulary were added" in text
    assert "`--image-processor llava` pads" in text
    assert f"llava-convert {__version__} made this from a training checkpoint of xtuner (`.pth`)." in text
    assert "| language model | the converted checkpoint | 21 | float16 | 295.6\u00a0kB |" in text
    tower = "the base model `openai/tiny`, with a trained LoRA merged into 18 tensors"
    assert f"| vision tower | {tower} | 55 | float16 | 90.3\u00a0kB |" in text
    assert "(`--verify quick`)" in text and "| all, in 1 file | 80 |" in text
    assert "| LoRA merged in float64, rounded once | 18 |" in text
    assert "| cast to float16, rounded to nearest | 62 |" in text
    assert "| added to the vocabulary | 64 rows |" in text
    assert "llava-convert verify SOURCE my-llava" in text


def test_what_it_does_not_say(make: Make) -> None:
    text = make("hf", image_processor="llava", verify="full", name="Other name")
    assert "`--image-processor llava` pads" not in text and "With transformers 4.52 or later" in text
    assert "# Other name\n" in text and "my-llava" not in text
    assert "every byte was read back" in text and "(`--verify full`)" in text


def test_official(make: Make) -> None:
    text = make("official", verify="off")
    assert 'load_pretrained_model(\n    "my-llava", None, "llava-llama"\n)' in text and "Rows " not in text
    assert "Nothing was checked after writing (`--verify off`)." in text


def test_kinds_of_tensors_are_counted(make: Make, tmp_path: Path) -> None:
    make("official")
    source = (tmp_path / "my-llava").rename(tmp_path / "source")
    text = make("hf", source)
    assert "| copied bit for bit | 78 |" in text
    assert "| same values, in another order or with rows added | 2 |" in text
    assert "| widened to float32, exactly | " in make("hf", source, dtype="float32")
    assert "| quantised | 16 |" in make("gguf", source, outtype="q8_0")


def test_what_xtuner_leaves_elsewhere(make: Make, tmp_path: Path) -> None:
    text = make("xtuner", **IDS)
    assert "The command names them: the vision tower `openai/tiny`." in text
    assert "| vision tower | a trained LoRA adapter for the base model `openai/tiny` | 36 |" in text
    tower = "--visual-encoder openai/tiny \\\n  --prompt-template llama3_chat --image picture.jpg\n"
    assert block(tmp_path / "my-llava", "xtuner", "shell") == f"xtuner chat my-llava --llava my-llava \\\n  {tower}"
    pretrained = make("xtuner", part="projector", **IDS)
    assert "the projector of a LLaVA in xtuner's layout" in pretrained
    assert "the language model `meta/tiny` and the vision tower `openai/tiny`." in pretrained
    assert block(tmp_path / "my-llava", "xtuner", "shell") == f"xtuner chat meta/tiny --llava my-llava \\\n  {tower}"
    assert "`BASE_VISION_TOWER` (a placeholder" in make("xtuner")


def test_a_layer_that_xtuner_chat_cannot_be_told(make: Make, tiny: Path, tmp_path: Path) -> None:
    """Its `--visual-select-layer` has no type (xtuner 0.1.23, tools/chat.py): the index of a tuple is a text then."""
    (tmp_path / "config.py").write_text(
        "model = dict(type='LLaVAModel', visual_select_layer=-3, visual_encoder_lora=dict(type='LoraConfig', r=8))\n"
    )
    bases = {"llm": str(tiny / "llm"), "visual_encoder": str(tiny / "vit")}
    assert "reads layer -3 of its vision tower" in make("xtuner", config=tmp_path / "config.py", **bases)
    assert "of its vision tower. `xtuner chat`" not in make("xtuner")


@pytest.mark.parametrize("to", ["hf", "official", "xtuner", "gguf"])
def test_no_path_and_the_same_bytes_again(make: Make, tmp_path: Path, to: str) -> None:
    text = make(to)
    assert str(tmp_path) not in text and "fixtures" not in text and str(Path.home()) + "/" not in text
    assert make(to, threads=1) == text


def test_one_part_is_not_called_a_whole_model(make: Make) -> None:
    for to in ("hf", "official", "xtuner"):
        text = make(to, part="llm")
        assert "LlavaForConditionalGeneration" not in text and "It reads" not in text
        assert 'pipeline("text-generation", model="my-llava"' in text


# The texts.


def test_every_text_is_used_and_every_word_known() -> None:
    cards = [
        card
        for target in TARGETS.values()
        for card in (target.whole, target.language_model, target.vision_tower, target.projector)
        if card is not None
    ]
    named = {f"{text}.md" for card in cards for text in card.quickstarts}
    assert named == {file.name for file in TEXTS.iterdir()}
    assert {f"{text}.md" for text in CONDITIONS} <= named
    for file in TEXTS.iterdir():
        text = file.read_text(encoding="utf-8")
        words = [piece.partition(">>")[0] for piece in text.split("<<")[1:] if ">>" in piece.partition("\n")[0]]
        assert [word for word in words if not isinstance(getattr(Words, word, None), property)] == []


def test_tables_and_sizes() -> None:
    assert table(("a", "b"), [("1|2", "3")]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"
    assert [size(n) for n in (7, 1500, 2_300_000, 16_060_000_000)] == [
        "7\u00a0B",
        "1.5\u00a0kB",
        "2.3\u00a0MB",
        "16.06\u00a0GB",
    ]


@pytest.mark.slow
def test_nothing_heavy_is_imported_for_a_card(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys, llava_convert\n"
        f"llava_convert.convert({str(tiny / 'iter_2.pth')!r}, to='official', out={str(tmp_path / 'out')!r})\n"
        "print([n for n in ('huggingface_hub', 'yaml', 'jinja2', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch, which the merge needs, brings jinja2 along on some paths of its own.
    assert done.stdout.strip() in ("[]", "['jinja2']")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "known"), [("mistral", "llava-mistral"), ("qwen2", None), ("phi3", None)])
def test_the_original_code_has_two_classes(tiny: Path, tmp_path: Path, name: str, known: str | None) -> None:
    family = next(key for key, wide in WIDES.items() if wide.family == name and wide.tokenizer not in PUBLISHED)
    source = make_wide(family, tmp_path, tiny)
    llava_convert.convert(source, to="official", out=tmp_path / "out", name="llava")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (f'None, "{known}"' in text) == ("lmdeploy<0.14" in text) == (known is not None)
    assert ("is in forks of it" in text) == (known is None)
