"""Where the data of LLaVA, ShareGPT4V and InternVL's fine-tuning come from, and the file trees that recipes expect."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

_HF = "https://huggingface.co/datasets"
_SHARE = f"{_HF}/Lin-Chen/ShareGPT4V/resolve/main"
_INTERNVL = "https://huggingface.co/OpenGVLab/InternVL/resolve/main"
# Where each file or folder comes from, by the end of its path.
SOURCES: dict[str, str] = {
    "blip_laion_cc_sbu_558k.json": f"git lfs install && git clone {_HF}/liuhaotian/LLaVA-Pretrain --depth=1",
    "LLaVA-Pretrain/images": f"git clone {_HF}/liuhaotian/LLaVA-Pretrain --depth=1 (git lfs); unzip images.zip",
    "llava_v1_5_mix665k.json": f"git lfs install && git clone {_HF}/liuhaotian/LLaVA-Instruct-150K --depth=1",
    "RefCOCOJson/train.json": "refcoco, refcoco+ and refcocog of https://github.com/lichengunc/refer ; then xtuner's "
    "xtuner/tools/data_preprocess/convert_refcoco.py --ann-path ANNOTATIONS --image-path COCO/train2017 --save-path "
    "{folder}",
    "coco/train2017": "http://images.cocodataset.org/zips/train2017.zip",
    "gqa/images": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    "ocr_vqa/images": "download script: https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_ ; "
    "then llava-convert data fix-ocrvqa FOLDER",
    "textvqa/train_images": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "vg/VG_100K": "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    "vg/VG_100K_2": "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
    "share-captioner_coco_lcs_sam_1246k_1107.json": f"wget {_SHARE}/share-captioner_coco_lcs_sam_1246k_1107.json",
    "sharegpt4v_instruct_gpt4-vision_cap100k.json": f"wget {_SHARE}/sharegpt4v_instruct_gpt4-vision_cap100k.json",
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": (
        f"wget {_SHARE}/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"
    ),
    "sam/images": "https://drive.google.com/file/d/1dKumdOKSXtV7lIXdrG7jsIK_z2vZv2gs",
    "share_textvqa/images": "https://drive.google.com/file/d/1f4v_3e1OJtyYqam1CEp6RenCNTU5_mG2",
    "web-celebrity/images": "https://drive.google.com/file/d/1-SB71C3j1mVg0kDDXwj2IWGEoBoRUD-J",
    "web-landmark/images": "https://drive.google.com/file/d/1JpJkN7ZMA50xAhMx9O-rVb5yLhfGm3_o",
    "wikiart/images": "https://drive.google.com/file/d/1FxB2Nw-vWUcTUSI_dBpPIykb-uGYoEqV",
    # The archive has folders of its own, and the files belong beside each other, where the recipe names them.
    ".jsonl": f"wget {_INTERNVL}/playground.zip && unzip -j playground.zip '*.jsonl' -d {{folder}}",
    "ai2d": "https://drive.google.com/file/d/1dqqa3MnrxMXaU_K9JA6C83je32ibwdOY",
    "chartqa": "https://huggingface.co/datasets/ahmed-masry/ChartQA/resolve/main/ChartQA%20Dataset.zip",
    "docvqa": "https://datasets.cvc.uab.es/rrc/DocVQA/train.tar.gz, val.tar.gz and test.tar.gz",
    "dvqa": "https://drive.google.com/file/d/1iKH2lTi1-QxtNUVRxTUWFvUvRHq6HAsZ",
    "synthdog-en": f"{_INTERNVL}/synthdog-en-images.zip",
    "geoqa+": f"{_INTERNVL}/geoqa%2B_images.zip",
}

_LLAVA = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
_SHARED = ("coco/train2017", "llava/llava_pretrain/images", "sam/images")
_PAINTED = ("share_textvqa/images", "web-celebrity/images", "web-landmark/images", "wikiart/images")
# The folders of pictures that go with a file, below the set's `images`: what a file that is not here yet will ask for.
FOLDERS: dict[str, tuple[str, ...]] = {
    "blip_laion_cc_sbu_558k.json": ("",),
    "llava_v1_5_mix665k.json": _LLAVA,
    "RefCOCOJson/train.json": ("coco/train2017",),
    "share-captioner_coco_lcs_sam_1246k_1107.json": _SHARED,
    "sharegpt4v_instruct_gpt4-vision_cap100k": (*_SHARED, *_PAINTED),
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k": (*_SHARED, *_PAINTED, *_LLAVA[1:]),
    "llava_instruct_150k_zh.jsonl": ("train2017",),
    "dvqa_train_200k.jsonl": ("images",),
    "chartqa_train_18k.jsonl": ("train", "val", "test"),
    "ai2d_train_12k.jsonl": ("abc_images", "images"),
    "docvqa_train_10k.jsonl": ("train", "val", "test"),
    "geoqa+.jsonl": ("images",),
    "synthdog_en.jsonl": ("images",),
}

_FROM_LLAVA = {name: f"../../llava_data/llava_images/{name}" for name in ("coco", "gqa", "ocr_vqa", "textvqa", "vg")}
_FROM_LLAVA["llava/llava_pretrain/images"] = "../../../../llava_data/LLaVA-Pretrain/images"
_FROM_SHARE = ("sam", "share_textvqa", "web-celebrity", "web-landmark", "wikiart")
# What the trees have as links: the place below the tree's root, and what the link says.
LINKS: dict[str, dict[str, str]] = {
    "sharegpt4v": {f"data/{name}": target for name, target in _FROM_LLAVA.items()},
    "internvl_sft": {f"data/{name}": target for name, target in _FROM_LLAVA.items()}
    | {f"data/{name}": f"../../sharegpt4v/data/{name}" for name in _FROM_SHARE},
}


def advice(path: str, root: Path) -> Iterator[str]:
    """How to get a file or a folder of pictures of a tree: a link where what it leads to is there, else an address."""
    path = path.rstrip("/")
    link = _link(path, root)
    if link is not None:
        place, target = link
        if Path(os.path.normpath(place.parent / target)).exists():
            yield f"    link it: {_link_command(place, target)}"
            return
    # The longest end that is known: `vg/VG_100K_2` before `vg/VG_100K`, a file before its suffix.
    for end in sorted(SOURCES, key=len, reverse=True):
        if path.endswith(end) or f"/{end}/" in f"{path}/":
            yield f"    get it: {SOURCES[end].format(folder=shlex.quote(str(Path(path).parent)))}"
            break
    else:
        if link is not None:  # LLaVA's first set, by its place in another tree
            yield f"    get it: {SOURCES['LLaVA-Pretrain/images']}"
    if link is not None:
        yield f"    it belongs to {os.path.normpath(link[0].parent / link[1])}; then {_link_command(*link)}"


def _link(path: str, root: Path) -> tuple[Path, str] | None:
    """The link that a path goes through, where its tree has one there, and what it says."""
    for place, target in LINKS.get(root.resolve().name, {}).items():
        link = root / place
        if Path(path) == link or link in Path(path).parents:
            return link, target
    return None


def _link_command(place: Path, target: str) -> str:
    words = shlex.join(["ln", "-sfn", target, str(place)])
    return words if place.parent.is_dir() else f"{shlex.join(['mkdir', '-p', str(place.parent)])} && {words}"


def expected(file: Path, images: Path) -> list[Path]:
    """The folders of pictures that a file that cannot be read would name, where the set is a known one."""
    names = file.name, f"{file.parent.name}/{file.name}"  # a name like train.json says something in its folder alone
    known = next((folders for name, folders in FOLDERS.items() if any(n.startswith(name) for n in names)), ())
    return [images / folder for folder in known]
