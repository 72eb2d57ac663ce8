"""TrainingConfig from configs as people write them and as mmengine dumps them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.layouts.training_config import load_training_config, parse_training_config
from llava_convert.model.training import LoraSettings, TrainingConfig

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden" / "cases"

WRITTEN = """
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CLIPVisionModel
from xtuner.dataset import ConcatDataset, LLaVADataset
from xtuner.dataset.map_fns import template_map_fn_factory
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm_path = 'org/llm'
prompt_template = PROMPT_TEMPLATE.vicuna
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_path,
        torch_dtype=torch.float16,
        quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path='org/' + 'vit'),
    llm_lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.05, task_type='CAUSAL_LM'),
    visual_select_layer=-1,
    projector_depth=3,
    max_position_embeddings=2**12)
dataset = dict(
    type=LLaVADataset,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    pad_image_to_square=True)
train_dataloader = dict(dataset=dict(type=ConcatDataset, datasets=[dataset, dataset]))
"""

DUMPED = """
dataset = dict(
    pad_image_to_square=True,
    template_map_fn=dict(
        template='xtuner.utils.PROMPT_TEMPLATE.vicuna', type='xtuner.dataset.map_fns.template_map_fn_factory'),
    type='xtuner.dataset.LLaVADataset')
model = dict(
    freeze_llm=True,
    llm=dict(
        pretrained_model_name_or_path='org/llm',
        quantization_config=dict(load_in_4bit=True, type='transformers.BitsAndBytesConfig'),
        torch_dtype='torch.float16',
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    llm_lora=dict(lora_alpha=16, lora_dropout=0.05, r=64, task_type='CAUSAL_LM', type='peft.LoraConfig'),
    max_position_embeddings=4096,
    projector_depth=3,
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path='org/vit', type='transformers.CLIPVisionModel.from_pretrained'),
    visual_select_layer=-1)
prompt_template = 'xtuner.utils.PROMPT_TEMPLATE.vicuna'
train_dataloader = dict(
    dataset=dict(
        datasets=[
            dict(
                pad_image_to_square=True,
                template_map_fn=dict(template='xtuner.utils.PROMPT_TEMPLATE.vicuna'),
                type='xtuner.dataset.LLaVADataset'),
        ],
        type='xtuner.dataset.ConcatDataset'))
"""


def read(text: str) -> TrainingConfig:
    return parse_training_config(text, "my.py")


def model(rest: str = "", before: str = "", after: str = "") -> TrainingConfig:
    return read(f"{before}\nmodel = dict(type='LLaVAModel', {rest})\n{after}")


@pytest.mark.parametrize("text", [WRITTEN, DUMPED], ids=["written", "dumped"])
def test_both_forms(text: str) -> None:
    assert read(text) == TrainingConfig(
        llm="org/llm",
        visual_encoder="org/vit",
        llm_dtype="float16",
        freeze_llm=True,
        freeze_visual_encoder=False,
        llm_lora=LoraSettings(r=64, lora_alpha=16, other={"lora_dropout": 0.05}),
        visual_encoder_lora=None,
        pretrained_pth=None,
        prompt_template="vicuna",
        visual_select_layer=-1,
        projector_depth=3,
        max_position_embeddings=4096,
        quantized_llm=True,
        pad_image_to_square=True,
    )


def test_a_silent_config_has_the_defaults_of_llavamodel() -> None:
    assert model() == TrainingConfig(llm=None, visual_encoder=None)
    defaults = model()
    assert (defaults.freeze_llm, defaults.freeze_visual_encoder) == (False, False)
    assert (defaults.visual_select_layer, defaults.projector_depth) == (-2, 2)
    assert defaults.require("llm") is None


def test_lora_with_every_setting() -> None:
    config = model(
        "visual_encoder_lora=dict(type=LoraConfig, r=4, lora_alpha=8.5, use_rslora=True, use_dora=True, "
        "bias='lora_only', rank_pattern={'q_proj': 2}, alpha_pattern={r'v\\d': 3}, target_modules={'v_proj', 'q_proj'},"
        "modules_to_save=['head'], task_type=TaskType.FEATURE_EXTRACTION, fan_in_fan_out=True,"
        "init_lora_weights='gaussian', peft_type='LORA', layers_to_transform=[1])",
        before="from peft import LoraConfig, TaskType",
    )
    assert config.visual_encoder_lora == LoraSettings(
        r=4, lora_alpha=8.5, use_rslora=True, use_dora=True, bias="lora_only", rank_pattern={"q_proj": 2},
        alpha_pattern={r"v\d": 3}, target_modules=("q_proj", "v_proj"), modules_to_save=("head",),
        fan_in_fan_out=True, init_lora_weights="gaussian", peft_type="LORA",
        other={"layers_to_transform": [1]},
    )  # fmt: skip
    assert config.llm_lora is None


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ("None", None),
        ("dict(type=LoraConfig)", LoraSettings()),
        ("LoraConfig(r=2, target_modules='.*proj')", LoraSettings(r=2, target_modules=".*proj")),
        ("dict(type='peft.LoraConfig', init_lora_weights=False)", LoraSettings(init_lora_weights=False)),
        ("dict(type='peft.tuners.lora.config.LoraConfig')", LoraSettings()),
    ],
)
def test_lora_spellings(lora: str, expected: LoraSettings | None) -> None:
    assert model(f"llm_lora={lora}", before="from peft import LoraConfig").llm_lora == expected


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("llm_lora=dict(type='peft.IA3Config')", "model.llm_lora is peft.IA3Config"),
        ("llm_lora=dict(r=8)", "model.llm_lora is of no type"),
        ("llm_lora=dict(type='LoraConfig', peft_type='LOHA')", "only LoRA"),
        ("llm_lora=dict(type='LoraConfig', r=nowhere)", "my.py:2: model.llm_lora.r depends on nowhere"),
        ("llm_lora=dict(type='LoraConfig', r=2.5)", "model.llm_lora.r has an unexpected value: 2.5"),
        ("llm_lora=dict(type='LoraConfig', lora_alpha='8')", "model.llm_lora.lora_alpha has an unexpected value: '8'"),
        ("llm_lora=dict(type='LoraConfig', target_modules=[1])", "model.llm_lora.target_modules"),
        ("llm_lora=dict(type='LoraConfig', rank_pattern=[1])", "model.llm_lora.rank_pattern"),
        ("llm_lora=dict(type='LoraConfig', init_lora_weights=3)", "init_lora_weights"),
        ("llm_lora=True", "model.llm_lora has an unexpected value: True"),
        ("llm_lora=make_lora(8)", "model.llm_lora comes from calling make_lora"),
        ("freeze_llm=nowhere", "my.py:2: model.freeze_llm depends on nowhere, which the config does not define"),
        ("freeze_llm='yes'", "model.freeze_llm has an unexpected value: 'yes'"),
        ("projector_depth=os.getenv('D')", "my.py:2: model.projector_depth comes from calling os.getenv"),
        ("visual_select_layer=os.sep", "model.visual_select_layer is os.sep, whose value is not in the config"),
    ],
)
def test_settings_which_cannot_be_guessed(rest: str, told: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        model(rest, before="import os")
    assert told in caught.value.message
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "model = dict(type='xtuner.model.SupervisedFinetune')",
            "a language model alone (xtuner.model.SupervisedFinetune)",
        ),
        ("from xtuner.model import InternVL_V1_5\nmodel = dict(type=InternVL_V1_5)", "xtuner.model.InternVL_V1_5"),
        ("model = dict(llm=1)", "of no type"),
        ("model = build()", "the model is build;"),
        ("model = nowhere", "my.py:1: model depends on nowhere"),
    ],
)
def test_other_models(text: str, told: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(text)
    assert told in caught.value.message


@pytest.mark.parametrize("text", ["", "a = 1", "model = None"])
def test_no_model(text: str) -> None:
    with pytest.raises(InputError, match="no `model`"):
        read(text)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sd('Org/X')", "ms://Org/X"),
        ("sd(model_id='Org/X', cache_dir=nowhere)", "ms://Org/X"),
        ("sd('Org/X', revision='v2')", "ms://Org/X@v2"),
        ("hf(repo_id='org/x')", "org/x"),
    ],
)
def test_downloads_name_their_id(path: str, expected: str) -> None:
    before = "from modelscope import snapshot_download as sd\nfrom huggingface_hub import snapshot_download as hf"
    config = model(f"llm=dict(pretrained_model_name_or_path={path})", before=before)
    assert config.require("llm") == config.llm == expected


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere", "my.py:2: model.llm.pretrained_model_name_or_path depends on nowhere"),
        ("os.environ['LLM']", "is os.environ.LLM, whose value is not in the config"),
        ("os.getenv('LLM') + '/x'", "my.py:2: model.llm.pretrained_model_name_or_path depends on a value that"),
        ("hf(repo_id='org/x', revision='v2')", "comes from calling huggingface_hub.snapshot_download"),
        ("'{{$LLM:org/x}}'", "depends on the placeholder {{$LLM:org/x}}"),
        ("['a']", "has an unexpected value: a list"),
    ],
)
def test_a_path_that_code_makes_complains_only_when_needed(path: str, told: str) -> None:
    before = "import os; from huggingface_hub import snapshot_download as hf"
    config = model(f"llm=dict(pretrained_model_name_or_path={path}), freeze_llm=True", before=before)
    assert config.llm is None
    assert config.freeze_llm is True
    assert config.require("visual_encoder") is None
    with pytest.raises(UnsupportedError) as caught:
        config.require("llm")
    assert told in caught.value.message
    assert caught.value.hint == "give it with --llm PATH|ID"


def test_models_given_as_calls() -> None:
    config = model(
        "llm=M.from_pretrained('a', torch_dtype='auto', load_in_8bit=True), visual_encoder=V.from_pretrained("
        "pretrained_model_name_or_path='b')",
        before="from transformers import AutoModelForCausalLM as M, CLIPVisionModel as V",
    )
    assert config.llm == "a"
    assert config.visual_encoder == "b"
    assert config.quantized_llm is True


DICT = "dict(SYSTEM='S', INSTRUCTION='{input}', SUFFIX_AS_EOS=True, STOP_WORDS=['</s>'])"


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("prompt_template = PROMPT_TEMPLATE.llama3_chat", "llama3_chat"),
        ("prompt_template = PROMPT_TEMPLATE['llama3_chat']", "llama3_chat"),
        ("prompt_template = 'xtuner.utils.PROMPT_TEMPLATE.llama3_chat'", "llama3_chat"),
        ("prompt_template = 'xtuner.utils.templates.PROMPT_TEMPLATE.llama3_chat'", "llama3_chat"),
        ("prompt_template = 'llama3_chat'", "llama3_chat"),
        (
            f"prompt_template = {DICT}",
            {"SYSTEM": "S", "INSTRUCTION": "{input}", "SUFFIX_AS_EOS": True, "STOP_WORDS": ["</s>"]},
        ),
        ("train_dataloader = dict(dataset=dict(template_map_fn=dict(template=PROMPT_TEMPLATE.vicuna)))", "vicuna"),
        ("train_dataset = [dict(template_map_fn=f(template=PROMPT_TEMPLATE.vicuna))]", "vicuna"),
        ("llava_dataset = dict(template_map_fn=dict(template='xtuner.utils.PROMPT_TEMPLATE.vicuna'))", "vicuna"),
        ("pass", None),
    ],
)
def test_prompt_templates(after: str, expected: object) -> None:
    config = model(before="from xtuner.utils import PROMPT_TEMPLATE", after=after)
    assert config.require("prompt_template") == config.prompt_template == expected


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ("from mine import MINE\nprompt_template = MINE", "prompt_template is mine.MINE, whose value is not in"),
        ("prompt_template = nowhere", "my.py:3: prompt_template depends on nowhere"),
        ("prompt_template = 'mine.templates.MINE'", "prompt_template has an unexpected value: 'mine.templates.MINE'"),
        ("prompt_template = dict(SEP='x')", "prompt_template has an unexpected value: a dict"),
        (
            "prompt_template = PROMPT_TEMPLATE.vicuna\n"
            "train_dataloader = dict(dataset=dict(template_map_fn=dict(template=PROMPT_TEMPLATE.phi3_chat)))",
            "more than one prompt template: vicuna, phi3_chat",
        ),
    ],
)
def test_prompt_templates_that_are_left_to_the_user(after: str, told: str) -> None:
    config = model(before="from xtuner.utils import PROMPT_TEMPLATE", after=after)
    assert config.prompt_template is None
    with pytest.raises(UnsupportedError) as caught:
        config.require("prompt_template")
    assert told in caught.value.message
    assert caught.value.hint == "give it with --prompt-template NAME"


@pytest.mark.parametrize(
    ("datasets", "expected"),
    [
        ("[dict(pad_image_to_square=True), dict(pad_image_to_square=True)]", True),
        ("[dict(pad_image_to_square=False), dict()]", False),
        ("[dict(pad_image_to_square=True), dict()]", None),
        ("[]", None),
    ],
)
def test_pad_image_to_square(datasets: str, expected: bool | None) -> None:
    after = f"train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets={datasets}))"
    assert model(after=after).pad_image_to_square is expected


def test_base_configs_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.py").write_text(WRITTEN)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.py").write_text("_base_ = '../base/model.py'\nmodel = dict(pretrained_pth='x.pth')")
    (tmp_path / "mine" / "b.py").write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from ..base.model import *\n"
        "model.pretrained_pth = 'x.pth'"
    )
    for name in ("a.py", "b.py"):
        config = load_training_config(tmp_path / "mine" / name)
        assert (config.llm, config.pretrained_pth) == ("org/llm", "x.pth")


class _Inert:
    """Stands in for every class within the golden pickles."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __call__(self, *args: object) -> _Inert:
        return self


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert, *([dict] if name == "OrderedDict" else [])), {})

    def persistent_load(self, pid: object) -> None:
        return None


def _dumped(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(name) as stream:
            text = _Reader(stream).load()["meta"]["cfg"]
    assert isinstance(text, str)
    return text


VIT_LORA = LoraSettings(r=8, lora_alpha=16, other={"lora_dropout": 0.05})
LLM_LORA = LoraSettings(r=8, lora_alpha=16, other={"lora_dropout": 0.1})


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoints are not here")
@pytest.mark.parametrize(
    ("case", "frozen", "loras", "pretrained"),
    [
        ("a_full_vitlora", (False, True), (None, VIT_LORA), True),
        ("b_llmlora_vitlora", (True, True), (LLM_LORA, VIT_LORA), True),
        ("c_pretrain", (True, True), (None, None), False),
        ("d_full_fullvit", (False, False), (None, None), True),
    ],
)
def test_golden(case: str, frozen: object, loras: object, pretrained: bool) -> None:
    written = load_training_config(GOLDEN / case / "config.py")
    assert parse_training_config(_dumped(GOLDEN / case / "pth" / "iter_2.pth"), "meta.cfg") == written
    assert (written.freeze_llm, written.freeze_visual_encoder) == frozen
    assert (written.llm_lora, written.visual_encoder_lora) == loras
    assert written.pretrained_pth == ("golden/c_pretrain/pth/iter_2.pth" if pretrained else None)
    assert (written.llm, written.visual_encoder) == ("parts/plain/llm", "parts/plain/vit")
    assert written.prompt_template == "llama3_chat"
    assert written.unresolved == {}
