"""Further turns of a conversation: the ids that are stored stay as they are, so that the cache can be kept."""

import pytest
from test_chat import CHATML, chat, copy_with, load, shared, small


@pytest.mark.parametrize("family", ["llama2", "llama3", "phi3", "mistral/v0.3", "small"])
def test_turns_keep_the_ids(family, tmp_path):
    """Guards: a reply tokenized again, which would throw the cache away; the tail that the template adds."""
    folder = small(tmp_path, CHATML) if family == "small" else shared(family)
    if family == "llama2":
        folder = copy_with(tmp_path, folder / "tokenizer.model", config={"model_type": "llama"})
    tokenizer, template = load(folder)
    # "Hello" spelt letter by letter: ids that no encoder gives back, as a model may sample them.
    odd = [id for letter in "Hello" for id in tokenizer.encode_with_special(letter, continues=True)]
    messages, prompt_ids = chat("Hi"), template.encode(chat("Hi"))
    for content in ("Why?", " More\n", "日本"):
        messages = [*messages, *chat("", "Hello")[1:], *chat(content)]
        ids = template.turn(messages, prompt_ids, odd)
        assert ids[: len(prompt_ids) + len(odd)] == [*prompt_ids, *odd]
        fresh = template.encode(messages)
        tail = ids[len(prompt_ids) + len(odd) :]
        assert fresh[-len(tail) :] == tail
        prompt_ids = ids
    assert prompt_ids != fresh


def test_turn_after_a_plain_reply_equals_encode():
    """Guards: a missing or doubled end token or space around a reply that was tokenized as the template would."""
    tokenizer, template = load(shared("mistral/v0.3"))
    first, reply = chat("Hi"), tokenizer.encode("Hello there.", bos=False)
    messages = chat("Hi", "Hello there.", "Why?")
    assert template.turn(messages, template.encode(first), reply) == template.encode(messages)


def test_turn_with_another_history(tmp_path):
    """Guards: Mistral v0.3's system message, which moves to the last user message: nothing cached fits any more."""
    _, template = load(shared("mistral/v0.3"))
    first, messages = chat("Hi", system="S"), chat("Hi", "Hello", "Why?", system="S")
    assert template.turn(messages, template.encode(first), [23325]) == template.encode(messages)


def test_turn_with_a_reply_left_out(tmp_path):
    """Guards: a template that drops or repeats the assistant's text: no place to put the generated ids."""
    users_only = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    for source in (users_only, "{{ messages }}{{ messages }}"):
        _, template = load(small(tmp_path, source))
        messages = chat("Hi", "Hello", "Why?")
        assert template.turn(messages, template.encode(chat("Hi")), [300]) == template.encode(messages)
    with pytest.raises(ValueError, match="end with user, assistant, user"):
        template.turn(chat("Hi"), [1], [2])
