"""What stands beside the weights: tokenizer, chat template, stop ids, processor, and the ids of the base models.

Half of all "garbage output" comes from these files, so each is made here once, the same for every layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from llava_convert.assets.processor import preprocessor_config
from llava_convert.assets.prompts import ChatTemplates, hf_templates, stop_ids
from llava_convert.assets.tokenizer.files import Tokenizer, has_tokenizer, open_tokenizer
from llava_convert.assets.tokenizer.llava_tokens import AddedToken, plain_files, require_rows, without_tokens
from llava_convert.core.errors import InputError, UsageError
from llava_convert.core.hub_names import is_id, last_name, published_id
from llava_convert.core.text import printable, to_json
from llava_convert.core.values import dataclass
from llava_convert.model.checkpoint import LLM, PART_NAMES, PART_WORDS, VISION
from llava_convert.model.configs import without_stale
from llava_convert.model.options import TargetOptions
from llava_convert.model.recipe import Model
from llava_convert.model.tables.types import read_config
from llava_convert.model.towers import id_by_shape
from llava_convert.storage.remote.origin import published
from llava_convert.storage.sidecars import made_sidecars

# What a generation config says of its writer, and code that it asks for.
_ABOUT = ("transformers_version", "_from_model_config", "_name_or_path", "auto_map", "custom_generate")


@dataclass(frozen=True)
class Artefacts:
    """The files beside the weights of one model, for one set of options."""

    model: Model
    options: TargetOptions

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The language model's tokenizer: the source's own, else the base's; None where neither has one."""
        base = self.model.bases.get(LLM)
        for files in (self.model.checkpoint.parts[LLM].files, base.files if base else None):
            if files is not None and has_tokenizer(files):
                return open_tokenizer(files)
        return None

    def required_tokenizer(self) -> Tokenizer:
        """Raises InputError (exit 3) where there is none."""
        if self.tokenizer is None:
            raise InputError(
                "neither the source nor the base language model holds a tokenizer (tokenizer.json or tokenizer.model)",
                hint="put the tokenizer's files into the folder of the language model",
            )
        return self.tokenizer

    @property
    def template_name(self) -> str | Mapping[str, Any] | None:
        """The prompt template: as asked for, else as trained with (by name, or spelled out); none for a given Jinja."""
        if self.options.chat_template is not None:
            return None
        return self.options.prompt_template or self.model.checkpoint.settings.prompt_template

    @cached_property
    def templates(self) -> ChatTemplates:
        """The chat templates, for string and list content; empty when nothing says what they are."""
        if self.tokenizer is None:
            return ChatTemplates(None, None)
        given = self.options.chat_template
        if self.template_name is None and self.model.checkpoint.default_part == LLM:
            # Of a model that never saw a picture: nothing need be made fit for them.
            return ChatTemplates(given or self.tokenizer.chat_template, None)
        return hf_templates(self.tokenizer, self.template_name, given)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer as the language model's own, with a chat template.

        Where an earlier conversion recorded the tokens that it added, they are taken off and all is as before.
        """
        if self.tokenizer is None:
            return {}
        added = self.model.added
        if added is not None:
            tokens = [AddedToken.of(token) for token in added["tokens"]]
            files = without_tokens(self.tokenizer, tokens, added["tokenizer"])
            if self.options.chat_template is None and self.options.prompt_template is None:
                return files  # the template among them is the one of before
            bare = open_tokenizer(made_sidecars(self.tokenizer.where, lambda: files))
            return plain_files(bare, self.templates.tokenizer)
        require_rows(self.tokenizer, self.model.recipes[self.model.embedding].shape[0])
        return plain_files(self.tokenizer, self.templates.tokenizer)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The base's generation_config with every stop id: its own, the tokenizer's, the template's."""
        files = self.model.files(LLM)
        config = self.model.configs[LLM]
        base: dict[str, Any] = {}
        if files is not None and files.has("generation_config.json"):
            base = read_config(files, "generation_config.json")
        found = {k: v for k, v in base.items() if k not in _ABOUT}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if found.get(key) is None and config.get(key) is not None:
                found[key] = config[key]
        if (asked := self._asked_stops()) is not None:
            found["eos_token_id"] = asked if len(asked) > 1 else asked[0]
        elif self.tokenizer is not None:
            stops = stop_ids(self.tokenizer, found, self.template_name)
            if stops:
                found["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        return dict(sorted(found.items()))

    def _asked_stops(self) -> list[int] | None:
        """The ids that `--stop` names; None where it does not. Raises UsageError for what is no token."""
        if not self.options.stops:
            return None
        size = int(self.model.configs[LLM].get("vocab_size") or 0)
        found: list[int] = []
        for word in self.options.stops:
            if word.isascii() and word.isdigit():
                number: int | None = int(word)
                if size and int(word) >= size:
                    raise UsageError(f"--stop {word}: the vocabulary has {size:,} tokens", hint=f"0 to {size - 1}")
            else:
                number = self.tokenizer.id_of(word) if self.tokenizer is not None else None
            if number is None:
                raise UsageError(
                    f"--stop {printable(word)}: is no token of the model: its text is several tokens, or none",
                    hint="give a token as tokenizer.json spells it (<|eot_id|>, </s>), or its id",
                )
            found.append(number)
        return list(dict.fromkeys(found))

    def preprocessor_config(self, *, for_hf: bool) -> dict[str, Any] | None:
        """How pictures are prepared, or None when the tower is not known."""
        config = self.model.configs.get(VISION)
        if config is None:
            return None
        base: dict[str, Any] | None = None
        for files in (self.model.files(VISION), self.model.checkpoint.beside):
            for name in ("preprocessor_config.json", "processor_config.json"):
                if base is None and files is not None and files.has(name):
                    base = read_config(files, name)
        return preprocessor_config(base, config, kind=self.options.image_processor or "clip", for_hf=for_hf)

    def id_of(self, part: str) -> tuple[str, str | None]:
        """The hub id to write for a part's base model, and a note when it is a mere guess.

        No local path ever reaches an output.
        """
        model = self.model
        asked = self.options.ids.get(part)
        if asked:
            return asked, None
        base, config = model.bases.get(part), model.configs.get(part, {})
        if base is not None and base.id is not None:
            return base.id, None
        # What the source names is not what is written where the user named another.
        named = [config.get("_name_or_path"), model.checkpoint.parts[part].base if base is None else None]
        for name in named:
            if isinstance(name, str) and is_id(name) and not _is_local(name, base):
                return published_id(name), None
        files = model.files(part)
        # A LLaVA's own tower is at none of the addresses that a loader of towers can take.
        own_tower = part == VISION and (base is None or base.held is not None)
        if files is not None and not own_tower and (found := published(files.where).get("repo")) is not None:
            return found, None
        if part == VISION and (by_shape := id_by_shape(config)) is not None:
            return by_shape, None
        last = [last_name(str(n)) for n in (base.asked if base else None, *named) if n]
        name = last[0] if last else (files.where.name if files is not None else PART_WORDS[part])
        return name, (
            f"the hub id of the {PART_NAMES[part]} is unknown, so the config names its folder, {name!r}: "
            f"set the id with --{PART_WORDS[part]}-id"
        )

    def text_config(self, dtype: str, *, rows: int | None = None) -> dict[str, Any]:
        """The language model's config as its own class reads it, with the dtype and vocabulary of the output."""
        config = without_stale(self.model.configs[LLM])
        config["torch_dtype"] = dtype
        if rows is not None:
            config["vocab_size"] = rows
        asked = self._asked_stops()
        if asked is not None and config.get("eos_token_id") not in asked:
            config["eos_token_id"] = asked[0]  # some servers read it here
        config["_name_or_path"] = self.id_of(LLM)[0]
        return config

    def vision_config(self, dtype: str) -> dict[str, Any]:
        config = without_stale(self.model.configs[VISION])
        config["torch_dtype"] = dtype
        config["_name_or_path"] = self.id_of(VISION)[0]
        return config

    def notes(self, *parts: str) -> tuple[str, ...]:
        """What is to be known of the files of these parts, and does no harm."""
        return tuple(guess for part in parts if (guess := self.id_of(part)[1]) is not None)

    def warnings(self, *parts: str) -> tuple[str, ...]:
        """What makes the output worse than a user would think."""
        if LLM not in parts:
            return ()
        if self.tokenizer is None:
            return ("there is no tokenizer beside the language model: the output has none either",)
        if self.templates.tokenizer is None and self.model.checkpoint.default_part != LLM:
            return (
                "nothing says how the model is prompted, so that the output has no chat template: "
                "--prompt-template NAME gives it (vicuna for LLaVA-1.5, llama3_chat for Llama-3)",
            )
        return ()

    def generation_file(self) -> dict[str, bytes]:
        return {"generation_config.json": to_json(self.generation_config)}


def _is_local(name: str, base: Any) -> bool:
    """Whether a name that looks like `org/name` is really the folder that it was found as."""
    return base is not None and str(base.folder).endswith(name)
