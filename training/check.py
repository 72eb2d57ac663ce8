"""Whether the data of a recipe are where it looks for them, and how to get what is not.

The sets are those of LLaVA, ShareGPT4V and InternVL's fine-tuning, in the file trees that the recipes expect.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_convert.core.errors import ConvertError, InputError

from .data import read_rows
from .recipe import Recipe

_HF = "https://huggingface.co/datasets"
_SHARE = f"{_HF}/Lin-Chen/ShareGPT4V/resolve/main"
_INTERNVL = "https://huggingface.co/OpenGVLab/InternVL/resolve/main"
# Where each file or folder comes from, by the end of its path.
SOURCES: dict[str, str] = {
    "blip_laion_cc_sbu_558k.json": f"git lfs install && git clone {_HF}/liuhaotian/LLaVA-Pretrain --depth=1",
    "LLaVA-Pretrain/images": f"git clone {_HF}/liuhaotian/LLaVA-Pretrain --depth=1 (git lfs); unzip images.zip",
    "llava_v1_5_mix665k.json": f"git lfs install && git clone {_HF}/liuhaotian/LLaVA-Instruct-150K --depth=1",
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
    ".jsonl": f"wget {_INTERNVL}/playground.zip && unzip playground.zip",
    "ai2d": "https://drive.google.com/file/d/1dqqa3MnrxMXaU_K9JA6C83je32ibwdOY",
    "chartqa": "https://huggingface.co/datasets/ahmed-masry/ChartQA/resolve/main/ChartQA%20Dataset.zip",
    "docvqa": "https://datasets.cvc.uab.es/rrc/DocVQA/train.tar.gz and val.tar.gz",
    "dvqa": "https://drive.google.com/file/d/1iKH2lTi1-QxtNUVRxTUWFvUvRHq6HAsZ",
    "synthdog-en": f"{_INTERNVL}/synthdog-en-images.zip",
    "geoqa+": f"{_INTERNVL}/geoqa%2B_images.zip",
    "llava/llava_pretrain": "a link to LLaVA-Pretrain/images: ln -s ../../../../llava_data/LLaVA-Pretrain/images",
}

_LLAVA = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
_SHARED = ("coco/train2017", "llava/llava_pretrain/images", "sam/images")
_PAINTED = ("share_textvqa/images", "web-celebrity/images", "web-landmark/images", "wikiart/images")
# The folders of pictures that go with a file, below the set's `images`: what a file that is not here yet will ask for.
FOLDERS: dict[str, tuple[str, ...]] = {
    "blip_laion_cc_sbu_558k.json": ("",),
    "llava_v1_5_mix665k.json": _LLAVA,
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


@dataclass(frozen=True)
class SetCheck:
    """What was found of one set: rows, rows about a picture, and pictures that are missing, by their folder.

    Where the file itself is missing, `absent` are the folders of pictures that it will ask for and that are not here
    either.
    """

    name: str
    file: Path
    rows: int
    pictures: int
    missing: dict[str, int]
    problem: str = ""
    absent: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        return not self.problem and not self.missing

    def lines(self) -> Iterator[str]:
        if self.problem:
            yield f"{self.name}: {self.problem}"
            yield from _advice(str(self.file))
            for folder in self.absent:
                yield f"  {folder}: no such folder, or nothing in it"
                yield from _advice(folder)
            return
        gone = sum(self.missing.values())
        yield f"{self.name}: {self.rows:,} rows, {self.pictures:,} about a picture, " + (
            f"{gone:,} pictures missing" if gone else "all pictures there"
        )
        for folder, count in self.missing.items():
            yield f"  {folder}: {count:,} missing"
            yield from _advice(folder)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": str(self.file),
            "rows": self.rows,
            "pictures": self.pictures,
            "missing": self.missing,
            "problem": self.problem,
            "absent": list(self.absent),
        }


def _advice(path: str) -> Iterator[str]:
    path = path.rstrip("/")
    # The longest end that is known: `vg/VG_100K_2` before `vg/VG_100K`, a file before its suffix.
    for end in sorted(SOURCES, key=len, reverse=True):
        if path.endswith(end) or f"/{end}/" in f"{path}/":
            yield f"    get it: {SOURCES[end]}"
            return


def check(recipe: Recipe) -> list[SetCheck]:
    """Look at every file and every picture that a recipe names; opens no picture.

    Folders are listed once each, since asking for a million files one by one takes long on network disks.
    """
    root = Path(recipe.data.root)
    listings: dict[Path, frozenset[str]] = {}
    return [_check_set(one.name, root / one.file, root / one.images, listings) for one in recipe.data.sets]


def _check_set(name: str, file: Path, images: Path, listings: dict[Path, frozenset[str]]) -> SetCheck:
    rows = pictures = 0
    missing: Counter[str] = Counter()
    try:
        for _, row in read_rows(file):
            rows += 1
            image = row.get("image")
            if image is None:
                continue
            pictures += 1
            folder, _, last = str(images / image).rpartition("/")
            if last not in _listed(Path(folder), listings):
                missing[folder] += 1
    except ConvertError as problem:
        gone = [str(place) for place in _expected(file, images) if not _listed(place, listings)]
        return SetCheck(name, file, rows, pictures, {}, problem.message, tuple(gone))
    return SetCheck(name, file, rows, pictures, dict(missing.most_common()))


def _expected(file: Path, images: Path) -> list[Path]:
    """The folders of pictures that a file that cannot be read would name, where the set is a known one."""
    known = next((folders for name, folders in FOLDERS.items() if file.name.startswith(name)), ())
    return [images / folder for folder in known]


def _listed(folder: Path, listings: dict[Path, frozenset[str]]) -> frozenset[str]:
    if folder not in listings:
        try:
            listings[folder] = frozenset(os.listdir(folder))  # noqa: PTH208  # names alone: millions of them
        except OSError:
            listings[folder] = frozenset()
    return listings[folder]


def fix_ocrvqa(folder: Path) -> tuple[int, int]:
    """Give every picture of OCR-VQA a copy that ends in `.jpg`, as the data sets name them; the originals stay.

    Returns how many were copied and how many were there. A copy appears whole or not at all. Raises InputError where
    there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="it is the one with OCR-VQA's pictures: …/ocr_vqa/images")
    copied = there = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".jpg" or path.name.startswith("."):
            continue
        target = path.with_suffix(".jpg")
        if target.exists():
            there += 1
            continue
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(path, partial)
        partial.replace(target)
        copied += 1
    return copied, there
