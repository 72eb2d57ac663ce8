"""The words that the texts of a card leave open (`<<word>>`), each as it is for one output."""

from __future__ import annotations

import json
import shlex

from llava_convert.app.card.facts import Facts
from llava_convert.app.card.prompt import QUESTION
from llava_convert.app.card.tables import size, table
from llava_convert.app.card.traps import lmdeploy_template
from llava_convert.assets.tokenizer.files import TEMPLATE
from llava_convert.assets.tokenizer.llava_tokens import IMAGE_TOKEN
from llava_convert.model.checkpoint import LLM, PART_NAMES, VISION
from llava_convert.model.facts import CLASS_TOKEN

_BASES = {LLM: "BASE_LANGUAGE_MODEL", VISION: "BASE_VISION_TOWER"}


class Words:
    """Each property is a word. Python's end with `py`, the shell's with `sh`."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    # What commands name.

    @property
    def model_py(self) -> str:
        return json.dumps(self._facts.reference, ensure_ascii=False)

    @property
    def model_sh(self) -> str:
        return shlex.quote(self._facts.reference)

    @property
    def model_json(self) -> str:
        """The name in JSON, within a here-document, in which the shell reads backslashes, dollars and back quotes."""
        text = self.model_py.replace("\\", "\\\\")
        return text.replace("$", "\\$").replace("`", "\\`")

    @property
    def folder_py(self) -> str:
        return json.dumps(self._facts.folder, ensure_ascii=False)

    @property
    def folder_sh(self) -> str:
        return shlex.quote(self._facts.folder)

    @property
    def question_py(self) -> str:
        return json.dumps(QUESTION)

    @property
    def question_sh(self) -> str:
        return shlex.quote(QUESTION)

    # In front of all sections.

    @property
    def files(self) -> str:
        if not self._facts.kind.by_file:
            return ""
        rows = [
            (f"`{shard.name}`", ", ".join(sorted({t.dtype for t in shard.tensors})), size(shard.size))
            for shard in self._facts.plan.shards
        ]
        return table(("file", "types", "size"), rows)

    @property
    def download(self) -> str:
        """How the files get here, where commands name files and the output is on a hub."""
        facts = self._facts
        if facts.repo is None:
            return ""
        if facts.on_modelscope:  # which no runtime asks by itself
            command = f"modelscope download {shlex.quote(facts.repo.removeprefix('ms://'))}"
        elif facts.kind.by_file or facts.alone is not None:
            command = f"hf download {self.model_sh}"
        else:
            return ""
        return f"Get the files:\n\n```shell\n{command} --local-dir {shlex.quote(facts.folder)}\n```"

    # The prompt.

    @property
    def prompt_section(self) -> str:
        facts, prompt = self._facts, self._facts.prompt
        if facts.alone not in (None, LLM):
            return ""
        if prompt is None:
            return self._unknown_prompt
        shown = prompt.about_picture if facts.whole else prompt.text("Why is the sky blue?")
        said = ["## The prompt", "This is the format of a question"]
        said[1] += f" (xtuner calls it `{prompt.name}`)" if prompt.name else ""
        said[1] += f". `{IMAGE_TOKEN}` marks the place of the picture:" if facts.whole else ":"
        fence = "`" * max(3, _longest_run(shown) + 1)
        said.append(f"{fence}text\n{shown}\n{fence}")
        if prompt.bos and prompt.added:
            said.append(f"The first token, `{prompt.bos}`, is added by the tokenizer: type only the rest.")
        elif self._facts.made.tokenizer is None:
            said.append("If the tokenizer has a first token (BOS), it goes in front.")
        if prompt.ends:
            ends = " or ".join(f"`{end}`" for end in prompt.ends)
            said.append(f"An answer ends with {ends}.")
        return "\n\n".join(said)

    @property
    def _unknown_prompt(self) -> str:
        facts = self._facts
        if facts.has_chat_template:
            return f"## The prompt\n\nThe format is that of the chat template in {facts.kind.chat_template}."
        return (
            "## The prompt\n\nThe prompt format of this model is not known: neither its training config nor its "
            "tokenizer has it. Without the right format, answers are poor. If you know the format, convert again with "
            "`--prompt-template NAME`: the output then has a chat template."
        )

    @property
    def prompt_py(self) -> str:
        """The raw prompt as Python's literal, without the token that the tokenizer puts in front."""
        prompt = self._facts.prompt
        return json.dumps(prompt.typed if prompt else f"{IMAGE_TOKEN}\n{QUESTION}", ensure_ascii=False)

    @property
    def text_py(self) -> str:
        """What is asked of a language model alone: a chat, or a text to go on with."""
        if self._facts.has_chat_template:
            return '[{"role": "user", "content": "Why is the sky blue?"}]'
        return json.dumps("The sky is blue because")

    @property
    def ask_py(self) -> str:
        """The prompt of transformers, from the chat template where there is one."""
        if not self._facts.has_chat_template:
            return f"prompt = {self.prompt_py}"
        return (
            f'content = [{{"type": "image"}}, {{"type": "text", "text": {self.question_py}}}]\n'
            'messages = [{"role": "user", "content": content}]\n'
            "prompt = processor.apply_chat_template(messages, add_generation_prompt=True)"
        )

    @property
    def pipeline_ask_py(self) -> str:
        """What the pipeline is called with."""
        if not self._facts.has_chat_template:
            return f'images="picture.jpg", text={self.prompt_py}'
        return (
            'text=[{"role": "user", "content": [\n'
            '    {"type": "image", "url": "picture.jpg"},\n'
            f'    {{"type": "text", "text": {self.question_py}}},\n'
            "]}]"
        )

    @property
    def pipeline_version(self) -> str:
        """The pipeline came with 4.47, LlavaImageProcessor, which pads, with 4.52."""
        return "4.52" if self._facts.options.image_processor == "llava" else "4.47"

    @property
    def steps_version(self) -> str:
        """processor_config.json as it is here is read from 4.46 on."""
        return "" if self._facts.options.image_processor == "llava" else ", from 4.46 on"

    # Servers.

    @property
    def vllm_template_sh(self) -> str:
        """vLLM renders the processor's template and adds no token; the tokenizer's template writes the BOS itself."""
        templates = self._facts.made.templates
        if templates.tokenizer is None or templates.tokenizer == templates.processor:
            return ""
        return f" --chat-template {self._facts.file(TEMPLATE)}"

    @property
    def vllm_template_why(self) -> str:
        if not self.vllm_template_sh:
            return ""
        prompt = self._facts.prompt
        token = f"`{prompt.bos}`" if prompt is not None and prompt.bos else "the first token"
        return f"`--chat-template` is needed: vLLM adds no first token to a chat, so the prompt would lack {token}."

    @property
    def vllm_fetch(self) -> str:
        facts = self._facts
        if facts.repo is None or facts.on_modelscope or not self.vllm_template_sh:
            return ""
        return f"```shell\nhf download {self.model_sh} {TEMPLATE} --local-dir {shlex.quote(facts.folder)}\n```"

    @property
    def lmdeploy_template_sh(self) -> str:
        return " --chat-template hf" if lmdeploy_template(self._facts.reference) is not None else ""

    @property
    def lmdeploy_trap(self) -> str:
        taken = lmdeploy_template(self._facts.reference)
        if taken is None:
            return ""
        return (
            f"LMDeploy chooses the prompt format by the model's name. For this name it would use its own `{taken}`, "
            "even if the model was trained on another. With `--chat-template hf` it uses the model's own chat template."
        )

    # The original code.

    @property
    def llava_name_py(self) -> str:
        """What the loader goes by: "llava" must be in it, "mistral" for that class, and neither "lora" nor "mpt"."""
        kind = str(self._facts.model.configs.get(LLM, {}).get("model_type", "llama"))
        return json.dumps("llava-mistral" if kind == "mistral" else "llava-llama")

    @property
    def llava_class(self) -> str:
        return self._facts.llava_class

    @property
    def llava_fork(self) -> str:
        """Where the code of this model is."""
        if self._facts.model.facts.get(CLASS_TOKEN) is False:
            return f"The class of this model (`{self.llava_class}`, with SigLIP) is in https://github.com/LLaVA-VL/LLaVA-NeXT."
        return f"The class of this model (`{self.llava_class}`) is in forks of it."

    @property
    def llava_sizes_py(self) -> str:
        """What the code asks of a picture that it cuts into tiles."""
        cuts = self._facts.model.checkpoint.settings.image_aspect_ratio.startswith("anyres")
        return "    image_sizes=[picture.size],\n" if cuts else ""

    @property
    def official_type(self) -> str:
        return str(self._facts.config().get("model_type"))

    @property
    def llava_tower(self) -> str:
        facts = self._facts
        if VISION in facts.parts:
            return ""
        name = facts.base_id(VISION)
        return (
            "The vision tower was not trained, so it is not in this folder. "
            f"The code loads it from {_named(name, VISION)}."
        )

    # GGUF.

    @property
    def llm_sh(self) -> str:
        return self._facts.file(self._facts.llm_shards[0][0].name)

    @property
    def class_token(self) -> str:
        """What llama.cpp does with a tower's class token; "" for a tower without one."""
        if self._facts.model.facts.get(CLASS_TOKEN) is False:
            return ""
        if self._facts.options.mmproj_for == "stock":
            return (
                "**Only for today's llama.cpp.** llama.cpp (October 2026; ggml-org/llama.cpp#25814) puts the tower's "
                "class token behind the patches, although the model was trained with it in front. This mmproj "
                "(`--mmproj-for stock`) is made for that defect: its position embeddings are in another order, so "
                "every patch gets its own position. Two errors stay: the first patch is lost, and the class token's "
                "features go to the language model. With 192 questions about pictures of tiny-shapes, today's "
                "llama.cpp answered 137 right with such a file and 127 with the standard mmproj. A repaired llama.cpp "
                "answered 189 right with either. Use the standard mmproj there, because with this file every patch "
                "gets its neighbour's position. A conversion without `--mmproj-for` writes the standard mmproj."
            )
        return (
            "**A known defect of the runtime.** llama.cpp (October 2026; ggml-org/llama.cpp#25814) puts the tower's "
            "class token behind the patches, although the model was trained with it in front. Every patch gets its "
            "neighbour's position, the first patch is lost, and the class token's features go to the language model. "
            "Answers about pictures are therefore worse than those of the same model in transformers. How much worse "
            "depends on the model. No file can be right both for a runtime with the defect and for one without it. "
            "These files are right for a repaired llama.cpp, and hold every layer of the tower. `--mmproj-for stock` "
            "writes an mmproj that is only for today's llama.cpp. With 192 questions about pictures of tiny-shapes, "
            "today's llama.cpp answered 137 right with that mmproj and 127 with the standard one. A repaired "
            "llama.cpp answered 189 right with either."
        )

    @property
    def mmproj_sh(self) -> str:
        return self._facts.file(self._facts.mmproj_shards[0].name)

    @property
    def other_types(self) -> str:
        names = [shards[0].name for shards in self._facts.llm_shards[1:]]
        return (
            f"The same options work with the other types: {', '.join(f'`{name}`' for name in names)}." if names else ""
        )

    @property
    def modelfile_sh(self) -> str:
        """Of the type that the other commands name."""
        shards = self._facts.llm_shards[0]
        stem = shards[0].name.removesuffix(".gguf")
        stem = stem.removesuffix(f"-00001-of-{len(shards):05d}") if len(shards) > 1 else stem
        return self._facts.file(f"{stem}.Modelfile")

    @property
    def ollama_sh(self) -> str:
        """Ollama's names are lower case, and of few characters. Of a path the last part."""
        folder = self._facts.folder.rstrip("/").rpartition("/")[2]
        found = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in folder.lower())
        return found.strip("-_.") or "llava"

    @property
    def split(self) -> str:
        """Ollama wants a model in one file."""
        parts = len(self._facts.llm_shards[0])
        if parts == 1:
            return ""
        return (
            f"Ollama needs the language model in one file, but it is in {parts} files here. Convert without "
            "`--max-shard-size`, or join the files with `llama-gguf-split --merge`."
        )

    # xtuner.

    @property
    def xtuner_command(self) -> str:
        """`xtuner chat` for what the folder holds, and for the base models of what it does not hold."""
        facts = self._facts
        llm = self.model_sh if "config.json" in facts.plan.files else shlex.quote(facts.base_id(LLM) or _BASES[LLM])
        lines = [f"xtuner chat {llm} --llava {self.model_sh}"]
        if self._tower_config is None:
            lines.append(f"--visual-encoder {shlex.quote(facts.base_id(VISION) or _BASES[VISION])}")
        prompt = facts.prompt
        template = f"--prompt-template {prompt.name} " if prompt is not None and prompt.name else ""
        return " \\\n  ".join([*lines, f"{template}--image picture.jpg"])

    @property
    def xtuner_holds(self) -> str:
        """What of the model is in the folder, and what `xtuner chat` gets elsewhere."""
        facts = self._facts
        elsewhere = [
            f"the {PART_NAMES[part]} {_named(facts.base_id(part), part)}"
            for part, here in ((LLM, "config.json" in facts.plan.files), (VISION, self._tower_config is not None))
            if not here
        ]
        if not elsewhere:
            return "The whole model is in this folder."
        named = " and ".join(elsewhere)
        return f"Parts that were not fully trained are not in this folder. The command names them: {named}."

    @property
    def xtuner_layer(self) -> str:
        layer = self._facts.model.checkpoint.settings.select_layer
        if layer == -2:
            return ""
        return (
            f"This model reads layer {layer} of its vision tower. `xtuner chat` (0.1.23) always reads layer -2. Its "
            "option `--visual-select-layer` does not help: it treats the number as text, and fails. To use the model, "
            "convert it to another layout."
        )

    @property
    def _tower_config(self) -> str | None:
        """The config of the tower, where the output holds one that is whole."""
        place = self._facts.place_of(VISION)
        name = f"{place}/config.json" if place else "config.json"
        return name if place is not None and name in self._facts.plan.files else None

    # Parts alone.

    @property
    def tower_class_py(self) -> str:
        config = self._facts.config(self._tower_config or "config.json")
        return str((config.get("architectures") or ["CLIPVisionModel"])[0])

    @property
    def tower_py(self) -> str:
        """The folder of a tower alone, which may be one below."""
        return self._place_py(VISION)

    @property
    def tower_processor_py(self) -> str:
        return "SiglipImageProcessor" if self.tower_class_py.startswith("Siglip") else "CLIPImageProcessor"

    @property
    def tower_layer_py(self) -> str:
        return str(self._facts.model.checkpoint.settings.select_layer)

    @property
    def base_llm_py(self) -> str:
        return json.dumps(self._facts.base_id(LLM) or _BASES[LLM])

    @property
    def adapted_py(self) -> str:
        """What an adapter names as its base model, else a word that stands for it."""
        return json.dumps(self._facts.config("adapter_config.json").get("base_model_name_or_path") or "BASE")

    @property
    def base_tower_py(self) -> str:
        return json.dumps(self._facts.base_id(VISION) or _BASES[VISION])

    @property
    def llm_adapter_py(self) -> str:
        return self._place_py(LLM)

    @property
    def tower_adapter_py(self) -> str:
        return self._place_py(VISION)

    def _place_py(self, part: str) -> str:
        """The folder that holds a part, as Python's literal: a library that knows the hub can be given its id."""
        place = self._facts.place_of(part)
        return json.dumps(f"{self._facts.folder}/{place}", ensure_ascii=False) if place else self.model_py

    @property
    def file_py(self) -> str:
        """The one file of weights, as Python's literal."""
        return json.dumps(f"{self._facts.folder}/{self._facts.plan.shards[0].name}", ensure_ascii=False)


def _named(base: str | None, part: str) -> str:
    return (
        f"`{base}`"
        if base
        else f"`{_BASES[part]}` (a placeholder for the base model of the training; its hub id is not known)"
    )


def _longest_run(text: str) -> int:
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
