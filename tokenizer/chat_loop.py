"""The loop of a chat: lines in, replies out, /reset and /exit, and the ids of the conversation so far.

Contract: it knows no engine. `reply(ids) -> (new ids, finish reason)` continues a conversation and shows the text as it comes.
The ids of a further turn begin with those of the turn before and its reply, so that a cache keeps what it holds.
Trap: Ctrl-C during a reply is `reply`'s to handle; one that arrives here came while a line was typed.
"""

import sys
from collections.abc import Callable
from contextlib import suppress

from tokenizer.base import Tokenizer
from tokenizer.chat import ChatTemplate


class ChatLoop:
    """A conversation in a terminal: its lines, its messages, and the ids that stand for them so far."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        reply: Callable[[list[int]], tuple[list[int], str]],
        capacity: int,
        system: str | None = None,
    ):
        """capacity: the most tokens that a conversation may have. ValueError if the template drops the system message."""
        if system is not None and not template.takes_system():
            raise ValueError(
                "--system: the checkpoint's chat template has no place for a system message; put it into the first message"
            )
        self._template, self._tokenizer, self._reply, self._capacity = template, tokenizer, reply, capacity
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        self._messages = list(self._opening)
        self._prompt_ids: list[int] = []
        self._reply_ids: list[int] = []

    def run(self) -> None:
        """Read lines from stdin until /exit or its end. A prompt sign and hints only where a person types."""
        if sys.stdin is None:  # closed by the caller
            return
        terminal = sys.stdin.isatty()
        if terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 (gives input() line editing and a history)
            notice(f"room for {self._capacity} tokens; /reset starts over, /exit ends, Ctrl-C ends a reply")
        while True:
            try:
                line = input("> " if terminal else "").strip()
                if line == "/exit":
                    return
                if line == "/reset":
                    self.reset()
                elif line.startswith("/") and len(line.split()) == 1:
                    notice(f"{line} is no command: there are /reset and /exit")
                elif line:
                    self.turn(line)
            except EOFError:
                if terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print()
                notice("/exit or Ctrl-D ends the chat")

    def turn(self, text: str) -> None:
        """One message and its reply. A message that cannot be sent is dropped and the conversation stays as it was."""
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            if self._prompt_ids:
                ids = self._template.turn(messages, self._prompt_ids, self._reply_ids)
            else:
                ids = self._template.encode(messages)
        except ValueError as error:
            return notice(str(error))
        if len(ids) > self._capacity:
            return notice(
                f"with this message the conversation has {len(ids)} tokens, the capacity is {self._capacity}: "
                "/reset starts a new one"
            )
        reply_ids, reason = self._reply(ids)
        reply = {"role": "assistant", "content": self._tokenizer.decode(reply_ids)}
        self._messages, self._prompt_ids, self._reply_ids = [*messages, reply], ids, reply_ids
        if reason == "capacity":
            notice(f"the conversation has reached the capacity of {self._capacity} tokens: /reset starts a new one")
        elif reason == "length":
            notice(f"cut after {len(reply_ids)} tokens, see --max-new-tokens")
        elif reason == "interrupted":
            notice("interrupted")


def notice(text: str) -> None:
    """What is not part of the conversation goes to stderr, in brackets."""
    print(f"[{text}]", file=sys.stderr, flush=True)
