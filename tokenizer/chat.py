"""Conversations to ids: the checkpoint's own chat template, else the family's built-in format.

Templates are untrusted: they run in jinja2's immutable sandbox. Ids equal apply_chat_template of transformers for
messages without special tokens in them; with such, ours stay plain text: no message can end its own turn.
Trap: a reply is never tokenized again. `turn` appends to the ids that were fed and generated: a cache keeps its rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenizer.base import Tokenizer
from tokenizer.formats import built_in_format
from tokenizer.settings import read_json

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}


class ChatTemplate:
    """A checkpoint's chat template, or its family's built-in one: messages in, ids out."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        """source: a jinja2 template as transformers takes it. ValueError if it is not valid jinja2."""
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a TemplateError, or Python's own about the code that jinja2 made of it
            raise ValueError(f"the chat template is not valid jinja2: {_one_line(error)}") from error

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path | str, tokenizer: Tokenizer) -> "ChatTemplate":
        """chat_template.jinja, else chat_template of tokenizer_config.json, else the family's built-in format."""
        folder = Path(checkpoint_dir)
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), tokenizer)
            except UnicodeDecodeError:
                raise ValueError(f"{path} is not UTF-8: download it again") from None
        source = read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(source, list):  # several, named: [{"name": ..., "template": ...}]
            named = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
            if "default" not in named:
                raise ValueError(f"the chat templates in {folder} are {sorted(named)}: none is named default")
            source = named["default"]
        if source is None:
            model_type = read_json(folder / "config.json").get("model_type")
            source = built_in_format(tokenizer.special_tokens, model_type)
        if not source or not isinstance(source, str):
            raise ValueError(f"chat_template in {folder} is {source!r:.40}, expected a text")
        return cls(source, tokenizer)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation and the generation prompt. ValueError: unknown role, or the template fails."""
        shielded, literals, _ = self._shield(messages)
        return self._tokenizer.encode_with_special(self._render(shielded), literals=literals)

    def turn(self, messages: Sequence[Message], prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> list[int]:
        """The ids of a conversation that goes on: prompt_ids + reply_ids + what the template adds after the reply.

        messages: [..., user, assistant, user]; prompt_ids were fed for those before the assistant's, reply_ids came
        back (without the stop id). Where the template renders the earlier messages differently now that more follow
        (Mistral v0.3 moves the system message to the last user message), all is encoded anew: then the result does
        not start with prompt_ids.
        """
        if len(messages) < 3 or messages[-2].get("role") != "assistant":
            raise ValueError("a further turn needs messages that end with user, assistant, user")
        shielded, literals, free = self._shield(messages)
        *history, reply, message = shielded
        prompt, marker = self._render(history), next(free)
        before, _, after = self._render([*history, reply | {"content": marker}, message]).partition(marker)
        # White space between the generation prompt and the reply is the reply's own, if it has any.
        if not after or marker in after or not before.startswith(prompt) or before[len(prompt) :].strip():
            return self.encode(messages)
        return [*prompt_ids, *reply_ids, *self._tokenizer.encode_with_special(after, literals=literals, continues=True)]

    def takes_system(self) -> bool:
        """Whether a system message reaches the prompt: Phi-3's published template drops it in silence."""
        marker = "\U00100000"
        try:
            return marker in self._render([{"role": "system", "content": marker}, {"role": "user", "content": "x"}])
        except ValueError:
            return False

    def _shield(self, messages: Sequence[Message]) -> tuple[list[dict], dict[str, str], Iterator[str]]:
        """Messages with special tokens' texts replaced by private characters, what those stand for, further ones."""
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise ValueError(f"role {role!r}, content {content!r:.40}: the role is one of {ROLES}, content is text")
        said = "".join(message["content"] for message in messages)
        free = (mark for mark in map(chr, range(0x100000, 0x10FFFE)) if mark not in said)
        present = sorted((text for text in self._tokenizer.special_tokens if text in said), key=len, reverse=True)
        literals = {next(free): text for text in present}
        shielded = []
        for message in messages:
            content = message["content"]
            for mark, text in literals.items():
                content = content.replace(text, mark)
            shielded.append({**message, "content": content})
        return shielded, literals, free

    def _render(self, messages: list[dict]) -> str:
        names = {"bos_token": "", "eos_token": ""} | self._tokenizer.names
        try:
            known = {"add_generation_prompt": True, "tools": None, "documents": None}
            return self._template.render(names | known, messages=messages)
        except Exception as error:  # a template is foreign code and may raise anything
            raise ValueError(f"the chat template refused the conversation: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # unlike jinja2's, keeps < > & as they are


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
