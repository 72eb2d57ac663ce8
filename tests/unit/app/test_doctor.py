"""`doctor` finds and repairs each planted fault; the consumer's own code trips before, and does not after."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_convert
from llava_convert.cli import app
from llava_convert.core.errors import InputError, OutputError, UsageError
from tests.doctor_faults import FAULTS, LASTING, edit, planted

QUESTION = "What is in this picture?"


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "hf"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out, dtype="float32")
    return out


@pytest.mark.parametrize("consumer", ["transformers", "transformers@4.46", "vllm"])
def test_our_own_output_is_sound(good: Path, consumer: str) -> None:
    assert llava_convert.doctor(good, consumer=consumer).troubles == ()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_repaired(good: Path, tmp_path: Path, fault: str) -> None:
    folder = planted(good, tmp_path / "o", fault)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    weights = (folder / "model.safetensors").stat()
    found = llava_convert.doctor(folder, consumer="transformers")
    assert not found and FAULTS[fault][1] in {t.rule for t in found.troubles}
    assert all(t.fixable and not t.fixed and t.source for t in found.troubles)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    repaired = llava_convert.doctor(folder, consumer="transformers", fix=True)
    assert repaired and repaired.changed and repaired.backup == str(tmp_path / "o.before-doctor")
    assert llava_convert.doctor(folder, consumer="transformers").troubles == ()
    after = (folder / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    assert {p.name: p.read_bytes() for p in Path(repaired.backup).iterdir()} == before
    changed = {p.name for p in folder.iterdir() if before.get(p.name) != p.read_bytes()}
    assert changed == set(repaired.changed)
    assert {p.name for p in tmp_path.iterdir()} == {"o", "o.before-doctor"}
    if fault != "template for text":  # that one had another template before, and has now
        assert llava_convert.verify(good, folder).same


def test_versions_bound_the_rules(good: Path, tmp_path: Path) -> None:
    folder = planted(good, tmp_path / "o", "TokenizersBackend")
    assert llava_convert.doctor(folder, consumer="transformers@4.57").left
    assert not llava_convert.doctor(folder, consumer="transformers@5.0").left
    assert not llava_convert.doctor(folder, consumer="transformers@5").left


@pytest.mark.parametrize(
    ("consumer", "said"),
    [
        ("transformers@99.0", "transformers 99.0 is judged by the rules of 5.23, the newest that is known"),
        ("vllm@0.11", "the rules for vllm are the same for every version, so 0.11 has no effect"),
        ("transformers@5.0", ""),
    ],
)
def test_what_a_version_is_judged_by(good: Path, consumer: str, said: str) -> None:
    found = CliRunner().invoke(app, ["doctor", str(good), "--for", consumer])
    assert found.exit_code == 0 and " ".join(found.stderr.split()) == said


@pytest.mark.parametrize("base", [None, "org/base"])
def test_an_adapter_is_told_with_its_merge(tiny: Path, tmp_path: Path, base: str | None) -> None:
    adapter = tmp_path / "adapter"
    llava_convert.convert(tiny / "iter_2.pth", to="peft", part="visual-encoder", out=adapter)
    edit(adapter, "adapter_config.json", lambda c: c.update(base_model_name_or_path=base))
    diagnosis = llava_convert.doctor(adapter, consumer="vllm")
    (trouble,) = diagnosis.troubles
    assert trouble.what == "it is a LoRA adapter, which vllm does not load as a model" + (
        f"; its base is {base}" if base else ""
    )
    assert diagnosis.command(trouble) == f"llava-convert merge {base or 'BASE'} {adapter} --to hf -o OUT"


@pytest.mark.slow
def test_transformers_trips_over_the_processor(good: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = planted(good, tmp_path / "o", "no processor")
    picture = Image.new("RGB", (56, 56))
    with pytest.raises(TypeError):
        AutoProcessor.from_pretrained(folder)(text="<image>", images=picture)
    llava_convert.doctor(folder, consumer="transformers@5.23", fix=True)
    ids = AutoProcessor.from_pretrained(folder)(text="<image>", images=picture)["input_ids"][0]
    assert list(ids).count(513 if 513 in ids else max(ids)) == 16


@pytest.mark.slow
def test_transformers_trips_over_list_content(good: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = planted(good, tmp_path / "o", "template for text")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    with pytest.raises((TypeError, ValueError)):
        AutoProcessor.from_pretrained(folder).apply_chat_template(talk)
    llava_convert.doctor(folder, consumer="transformers", fix=True)
    assert f"<image>\n{QUESTION}<|eot_id|>" in AutoProcessor.from_pretrained(folder).apply_chat_template(talk)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["one stop", "another eos"])
def test_an_answer_ends_again(good: Path, tiny: Path, tmp_path: Path, fault: str) -> None:
    """As generate() stops by itself, and as lmms-eval's llava_hf stops, at the tokenizer's EOS over all else."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = planted(good, tmp_path / "o", fault)

    def length() -> int:
        processor = AutoProcessor.from_pretrained(folder)
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        given = processor(text=text, images=Image.open(tiny / "picture.png").convert("RGB"), return_tensors="pt")
        eos = {"eos_token_id": processor.tokenizer.eos_token_id} if fault == "another eos" else {}
        with torch.inference_mode():
            written = model.generate(**given, do_sample=False, max_new_tokens=24, **eos)
        return int(written.shape[1] - given["input_ids"].shape[1])

    assert length() == 24
    llava_convert.doctor(folder, consumer="transformers", fix=True)
    assert length() == 14


def test_what_only_a_conversion_helps(good: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(good, mixed)
    tensors = load_file(mixed / "model.safetensors")
    tensors["multi_modal_projector.linear_1.bias"] = tensors["multi_modal_projector.linear_1.bias"].half()
    save_file(
        {n.replace("language_model.model.", "model.language_model."): t for n, t in tensors.items()},
        mixed / "model.safetensors",
        {"format": "pt"},
    )
    (mixed / "adapter_config.json").write_text("{}")
    found = llava_convert.doctor(mixed, consumer="vllm", fix=True)
    assert {t.rule for t in found.left} == {"dtypes", "adapters", "names"} and not found.changed
    assert all(not t.fixable and "llava-convert convert DIR" in t.hint for t in found.left)


@pytest.mark.parametrize("fault", LASTING)
def test_the_command_that_is_printed_mends_it(good: Path, tmp_path: Path, fault: str) -> None:
    """What no small file can mend is said to be so, with or without --fix; the conversion is typed as it stands."""
    folder = planted(good, tmp_path / "o", fault)
    diagnosis = llava_convert.doctor(folder, consumer="transformers@5.0")
    (trouble,) = [t for t in diagnosis.troubles if t.rule == LASTING[fault][1]]
    assert not trouble.fixable
    repaired = llava_convert.doctor(folder, consumer="transformers@5.0", fix=True)
    assert [t.rule for t in repaired.left] == [LASTING[fault][1]]
    words = shlex.split(diagnosis.command(trouble).partition(" writes ")[0])
    assert words[0] == "llava-convert" and words[-1] == "OUT"
    ran = CliRunner().invoke(app, [*words[1:-1], str(tmp_path / "new")])
    assert ran.exit_code == 0, ran.output
    assert llava_convert.doctor(tmp_path / "new", consumer="transformers@5.0").troubles == ()


def answered(folder: Path) -> None:
    """Load a folder and show it a picture, as its users do with transformers."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    given = AutoProcessor.from_pretrained(folder)(
        text="<image>", images=Image.new("RGB", (56, 56)), return_tensors="pt"
    )
    model(**given)


@pytest.mark.slow
def test_transformers_trips_over_another_vocab_size(good: Path, tmp_path: Path) -> None:
    folder = planted(good, tmp_path / "o", "vocab_size of another")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        answered(folder)
    llava_convert.doctor(folder, consumer="transformers", fix=True)
    answered(folder)


@pytest.mark.slow
def test_transformers_trips_over_ids_without_rows(good: Path, tmp_path: Path) -> None:
    folder = planted(good, tmp_path / "o", "ids without rows")
    with pytest.raises(IndexError):
        answered(folder)
    llava_convert.convert(folder, to="hf", out=tmp_path / "new", vocab="tokens", max_shard_size="5GB")
    answered(tmp_path / "new")


def test_gguf(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "g"
    llava_convert.convert(tiny / "iter_2.pth", to="gguf", out=out)
    assert llava_convert.doctor(out, consumer="ollama").troubles == ()
    for name in [p for p in out.iterdir() if p.suffix == ".Modelfile" or "mmproj" in p.name]:
        name.unlink()
    assert {t.rule for t in llava_convert.doctor(out, consumer="ollama").left} == {"mmproj", "modelfile"}
    assert {t.rule for t in llava_convert.doctor(out, consumer="llama.cpp").left} == {"mmproj"}


@pytest.mark.parametrize(("part", "name"), [("llm", "language model"), ("vit", "vision tower")])
def test_a_part_is_left_as_it_is(tiny: Path, tmp_path: Path, part: str, name: str) -> None:
    folder = tmp_path / part
    shutil.copytree(tiny / part, folder)
    with pytest.raises(InputError, match=f"is a {name} alone"):
        llava_convert.doctor(folder, consumer="vllm", fix=True)
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tiny / part).iterdir()}


def test_the_command_in_an_error_has_the_folder(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    shutil.copytree(good, folder)
    (folder / "adapter_config.json").write_text("{}")
    ran = CliRunner().invoke(app, ["doctor", str(folder), "--for", "vllm"])
    command = f"llava-convert convert '{folder}' --adapter '{folder}' --to hf -o OUT"
    assert (ran.exit_code, ran.stdout.count(command), ran.stderr.count(command)) == (7, 1, 1), ran.output
    assert "1 problem would make" in ran.stderr


def test_another_layout_is_one_trouble(good: Path) -> None:
    (trouble,) = llava_convert.doctor(good, consumer="llama.cpp").troubles
    assert trouble.what == "llama.cpp does not load the hf layout" and "--to gguf" in trouble.hint


def test_errors(good: Path, tmp_path: Path) -> None:
    for word, message in (
        ("tgi", "consumer='tgi': the choices are transformers, vllm"),
        ("transformers@new", "new is not a version"),
        ("transformers@4.37", r"from 4\.46 to 5\.23"),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            llava_convert.doctor(good, consumer=word)
        assert "transformers" in (refused.value.hint or refused.value.message)
    with pytest.raises(InputError, match="not a folder"):
        llava_convert.doctor(good / "config.json", consumer="vllm")
    folder = planted(good, tmp_path / "o", "one stop")
    (tmp_path / "o.before-doctor").mkdir()
    before = (folder / "generation_config.json").read_bytes()
    with pytest.raises(OutputError, match="is there already"):
        llava_convert.doctor(folder, consumer="vllm", fix=True)
    assert (folder / "generation_config.json").read_bytes() == before


def test_the_command(good: Path, tmp_path: Path) -> None:
    folder = planted(good, tmp_path / "o", "one stop")
    found = CliRunner().invoke(app, ["doctor", str(folder), "--for", "vllm"])
    assert found.exit_code == 7 and "stops (fixable): generation_config.json" in found.stdout
    assert "--fix repairs 1 of them" in found.stderr
    repaired = CliRunner().invoke(app, ["doctor", str(folder), "--for", "vllm", "--fix", "--json"])
    assert repaired.exit_code == 0 and json.loads(repaired.stdout)["changed"] == ["generation_config.json"]
