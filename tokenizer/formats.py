"""The families' own chat formats, for checkpoints that bring no template: jinja sources like a checkpoint's.

Chosen by the special tokens that the vocabulary has, then by config.json's model_type; never by the folder's name.
Trap: these are what the models were trained on, to the space: "[INST] x [/INST]" (Llama 2, first Mistral) and
"[INST] x[/INST]" (control tokens, Mistral v3) are different formats.
"""

from collections.abc import Container

# `system` goes into the first user message; a conversation that does not alternate was never seen in training.
_SYSTEM_INTO_USER = r"""
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = SYSTEM %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('after an optional system message, roles must alternate user/assistant/user/...') }}
{%- endif %}
{%- set content = (system if loop.first else '') + message['content'] %}
{{- USER if message['role'] == 'user' else ASSISTANT }}
{%- endfor %}"""


def _instruct(*, system: str, user: str, assistant: str) -> str:
    source = _SYSTEM_INTO_USER.replace("SYSTEM", system)
    return source.replace("USER", user).replace("ASSISTANT", assistant)


LLAMA_2 = _instruct(
    system=r"'<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n'",
    user="bos_token + '[INST] ' + content | trim + ' [/INST]'",
    assistant="' ' + content | trim + ' ' + eos_token",
)
MISTRAL_V1 = "{{ bos_token }}" + _instruct(
    system=r"messages[0]['content'] + '\n\n'",
    user="'[INST] ' + content + ' [/INST]'",
    assistant="' ' + content | trim + eos_token",
)
MISTRAL_V3 = MISTRAL_V1.replace("' [/INST]'", "'[/INST]'")

LLAMA_3 = r"""{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"""

PHI_3 = r"""{{- bos_token }}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}
{%- endfor %}
{{- '<|assistant|>\n' }}"""

CHATML = r"""{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}"""


def built_in_format(special_tokens: Container[str], model_type: str | None) -> str:
    """The jinja source of the family's format. ValueError if nothing tells the family."""
    for token, source in (
        ("<|start_header_id|>", LLAMA_3),
        ("<|im_start|>", CHATML),
        ("<|user|>", PHI_3),
        ("[INST]", MISTRAL_V3),
    ):
        if token in special_tokens:
            return source
    try:
        return {"llama": LLAMA_2, "mistral": MISTRAL_V1, "mixtral": MISTRAL_V1}[model_type]
    except KeyError:
        raise ValueError(
            f"no chat template in the checkpoint and no built-in one for model_type {model_type!r}: "
            "put a chat_template.jinja beside its config.json"
        ) from None
