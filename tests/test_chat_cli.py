"""generate.py --chat: the loop over lines, commands and Ctrl-C, and that a turn prefills only what it adds.

The loop is driven with a reply function in place of a model; the whole program runs on the embedded checkpoint.
"""
import io
import re
import signal
import sys

import pytest

import generate
from engine import Engine
from tokenizer import ChatTemplate, Tokenizer, load_tokenizer
from tokenizer.chat_loop import ChatLoop
from weights import EMBEDDED

CHAT = ["--chat", "--temperature", "0", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EMBEDDED)


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def run_loop(tokenizer: Tokenizer, *, reason: str = "stop", capacity: int = 1000, system: str | None = None,
             template: ChatTemplate | None = None) -> list[list[int]]:
    """Every reply is the ids of "yes" -> the ids that each turn asked to continue."""
    asked = []

    def reply(ids: list[int]) -> tuple[list[int], str]:
        asked.append(ids)
        return tokenizer.encode("yes", bos=False), reason
    template = template or ChatTemplate.from_checkpoint(EMBEDDED, tokenizer)
    ChatLoop(template, tokenizer, reply=reply, capacity=capacity, system=system).run()
    return asked


# ---- the loop

def test_a_turn_continues_the_ids_before_it(monkeypatch, tokenizer):
    """Guards a reply that is tokenized again, which would throw the cache away, and blank lines sent as messages."""
    type_lines(monkeypatch, "Hello.", "", "  ", "Who are you?", "Go on.")
    first, second, third = run_loop(tokenizer)
    yes = tokenizer.encode("yes", bos=False)
    assert second[:len(first) + len(yes)] == first + yes and third[:len(second) + len(yes)] == second + yes
    assert "Who are you?" in tokenizer.decode(second) and "Go on." in tokenizer.decode(third)


def test_reset_forgets_all_but_the_system_message(monkeypatch, tokenizer, tmp_path):
    type_lines(monkeypatch, "Hello.", "/reset", "Hello.", "/exit", "Never sent.")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{% for m in messages %}{{ m[\'content\'] }} {% endfor %}"}')
    first, second = run_loop(tokenizer, system="Be kind.", template=ChatTemplate.from_checkpoint(tmp_path, tokenizer))
    assert first == second and "Be kind." in tokenizer.decode(first)


def test_a_mistyped_command_is_not_sent(monkeypatch, tokenizer, capsys):
    type_lines(monkeypatch, "/rest", "/usr/bin is what?")
    assert len(run_loop(tokenizer)) == 1
    assert "/rest is no command" in capsys.readouterr().err


def test_a_message_beyond_the_capacity_is_dropped_and_the_conversation_stays(monkeypatch, tokenizer, capsys):
    """Guards an engine error that ends the program, and a history that keeps what was never sent."""
    type_lines(monkeypatch, "Hello.", "long " * 200, "Go on.")
    first, second = run_loop(tokenizer, capacity=100)
    assert second[:len(first)] == first and "long" not in tokenizer.decode(second)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the capacity is 100" in err and "/reset" in err


@pytest.mark.parametrize("reason, says", [("stop", ""), ("interrupted", "interrupted"), ("length", "--max-new-tokens"),
                                          ("capacity", "/reset")])
def test_a_cut_reply_says_why(monkeypatch, tokenizer, capsys, reason, says):
    type_lines(monkeypatch, "Hello.")
    run_loop(tokenizer, reason=reason)
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == (reason != "stop")


def test_a_message_that_the_template_refuses_does_not_end_the_chat(monkeypatch, tokenizer, capsys):
    source = "{% if messages[-1].content == 'no' %}{{ raise_exception('never say no') }}{% endif %}{{ messages[-1].content }}"
    type_lines(monkeypatch, "no", "yes")
    assert len(run_loop(tokenizer, template=ChatTemplate(source, tokenizer))) == 1
    assert "never say no" in capsys.readouterr().err


def test_a_system_message_that_the_template_drops_is_refused(tokenizer):
    """Phi-3's published template drops it in silence: guards a user who believes that it was heard."""
    with pytest.raises(ValueError, match="--system"):
        run_loop(tokenizer, template=ChatTemplate("{{ messages[-1].content }}", tokenizer), system="Be kind.")


def test_ctrl_c_while_typing_drops_the_line_and_ctrl_d_ends(monkeypatch, tokenizer, capsys):
    """Guards a chat that is lost with one Ctrl-C too many."""
    typed = iter([KeyboardInterrupt, "Hello.", KeyboardInterrupt, KeyboardInterrupt, "Go on.", EOFError])

    def type_next(prompt: str) -> str:
        assert prompt == "> "
        event = next(typed)
        if isinstance(event, str):
            return event
        raise event
    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert len(run_loop(tokenizer)) == 2
    assert capsys.readouterr().err.count("/exit or Ctrl-D") == 3


# ---- the program

def turns(err: str) -> list[tuple[int, int, int]]:
    """(tokens prefilled, tokens of the conversation, tokens of the reply) of each turn, from --stats."""
    return [tuple(map(int, found)) for found in re.findall(r"prefilled (\d+) of (\d+) tokens.* (\d+) new", err)]


def test_three_turns_prefill_only_what_is_new(monkeypatch, capsys):
    """Guards the cache between turns: a turn prefills what the conversation gained less the reply, whose last token may not be stored."""
    type_lines(monkeypatch, "Tell me a story about a dog.", "Go on.", "Go on.")
    assert generate.main([*CHAT, "--stats"]) == 0
    out, err = capsys.readouterr()
    first, *further = turns(err)
    assert first[0] == first[1] and len(further) == 2
    for (_, before, reply), (fed, total, _) in zip([first, *further], further, strict=False):
        assert fed - (total - before - reply) in (0, 1) and fed < total
    assert len(out.splitlines()) >= 3 and ">" not in out


def test_replies_do_not_depend_on_the_cache_being_kept(monkeypatch, capsys):
    """Guards a kept cache that is out of step with the ids: dropping it before each turn must give the same text."""
    lines = ("Tell me a story about a dog.", "Go on.", "And then?")
    type_lines(monkeypatch, *lines)
    assert generate.main(CHAT) == 0
    kept = capsys.readouterr().out
    original = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, prompts, params, reuse: original(self, prompts, params))
    type_lines(monkeypatch, *lines)
    assert generate.main([*CHAT, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == kept and all(fed == total for fed, total, _ in turns(err))


def test_reset_starts_from_nothing(monkeypatch, capsys):
    type_lines(monkeypatch, "Hello.", "/reset", "Hello.")
    assert generate.main([*CHAT, "--stats"]) == 0
    out, err = capsys.readouterr()
    first, second = turns(err)
    assert first == second and first[0] == first[1]
    lines = out.splitlines()
    assert lines[:len(lines) // 2] == lines[len(lines) // 2:], "the same message after /reset, the same reply"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_reply_and_not_the_chat(monkeypatch, capsys, times):
    """Guards status and cache after an interrupted reply: the next turn continues from the part that came."""
    original, calls = Engine.generate, []

    def interrupted_once(self, *args, **kwargs):
        calls.append(None)
        for n, step in enumerate(original(self, *args, **kwargs), 1):
            yield step
            if len(calls) == 1 and n == 3:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Engine, "generate", interrupted_once)
    type_lines(monkeypatch, "Tell me a story about a dog.", "Go on.")
    assert generate.main([*CHAT, "--stats"]) == 0
    err = capsys.readouterr().err
    assert err.count("[interrupted]") == 1
    (_, before, reply), (fed, total, _) = turns(err)
    assert reply == 3 and fed == total - before - 2, "3 tokens came, 2 of them are stored"


def test_a_full_conversation_says_so(monkeypatch, capsys, tokenizer):
    """Guards a chat that ends with an error, or answers nothing, when the capacity is reached."""
    S = len(ChatTemplate.from_checkpoint(EMBEDDED, tokenizer).encode([{"role": "user", "content": "Hello."}])) + 1
    type_lines(monkeypatch, "Hello.", "Go on.", "/reset", "Hello.")
    assert generate.main([*CHAT, "--stats", "--max-seq-len", str(S)]) == 0
    err = capsys.readouterr().err
    assert err.count(f"has reached the capacity of {S} tokens: /reset") == 2 and f"the capacity is {S}: /reset" in err
    assert len(turns(err)) == 2


def test_no_input_is_no_error(monkeypatch, capsys):
    type_lines(monkeypatch)
    assert generate.main(CHAT) == 0
    assert capsys.readouterr() == ("", "")
