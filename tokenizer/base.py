"""What every tokenizer does, whatever file it came from: special tokens, BOS, decoding, streaming.

A backend gives two things, `_encode_segment` (text without special tokens -> ids) and `_piece` (id -> bytes).
Decoding works on bytes, so one incremental UTF-8 decoder serves all formats: linear in time, never half a character.
Trap: special tokens are split here, not in the backend; a backend must be set up to know none.
"""

import codecs
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from tokenizer.settings import PrefixRule, Settings, SpecialToken


class Tokenizer:
    """vocab_size: 1 + largest id. special_tokens: text -> id, all of them. bos_id, eos_id: None where there is none."""

    def __init__(
        self,
        settings: Settings,
        *,
        n_pieces: int,
        special: Iterable[SpecialToken] = (),
        names: Mapping[str, str] = MappingProxyType({}),
        strip_space: bool = False,
    ):
        """special, names ("bos_token" -> text): the model file's own, where those beside it say nothing else."""
        by_id = {token.id: token for token in special} | settings.added
        self._special = by_id
        self._n_pieces = n_pieces
        self._strip_space = strip_space
        self._prefix: PrefixRule = settings.prefix
        self.vocab_size: int = max([n_pieces, *(id + 1 for id in by_id)])
        self.special_tokens: dict[str, int] = {token.text: token.id for token in by_id.values()}
        self.names: dict[str, str] = {**names, **settings.names}  # chat templates use them
        self.bos_id: int | None = self.special_tokens.get(self.names.get("bos_token"))
        self.eos_id: int | None = self.special_tokens.get(self.names.get("eos_token"))
        self._add_bos = settings.add_bos
        # One group per token tells which one matched; the longest text first, as alternation takes the first that fits.
        self._split_order = sorted(by_id.values(), key=lambda token: len(token.text), reverse=True)
        alternatives = (r"\s*" * t.lstrip + f"({re.escape(t.text)})" + r"\s*" * t.rstrip for t in self._split_order)
        self._split = re.compile("|".join(alternatives) or r"(?!)")

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Plain text to ids. A special token's text in it stays text. BOS comes first where this tokenizer adds one."""
        ids = self._encode_plain(text, self._prefix.start)
        return [self.bos_id, *ids] if bos and self._add_bos and self.bos_id is not None else ids

    def encode_with_special(
        self, text: str, *, literals: Mapping[str, str] | None = None, continues: bool = False
    ) -> list[int]:
        """A rendered template to ids: the special tokens in it become special. Adds no BOS of its own.

        literals: single characters that stand for strings which must stay plain text (what a user wrote).
        continues: the text goes on after other ids, so its first word gets no dummy prefix.
        """
        table, ids, end = str.maketrans(dict(literals or {})), [], 0
        for match in [*self._split.finditer(text), None]:
            if segment := text[end : match.start() if match else len(text)].translate(table):
                prefix = self._prefix.inside if end else self._prefix.start and not continues
                ids += self._encode_plain(segment, prefix)
            if match:
                ids.append(self._split_order[match.lastindex - 1].id)
                end = match.end()
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD, ids that the tokenizer does not know become nothing.

        continues: the ids go on after other text, so a leading space is theirs and not the dummy prefix.
        """
        stream = StreamDecoder(self, skip_special=skip_special, continues=continues)
        return "".join([stream.put(id) for id in ids]) + stream.flush()

    def stream(self, *, continues: bool = False) -> "StreamDecoder":
        return StreamDecoder(self, continues=continues)

    def token_bytes(self, id: int, *, skip_special: bool = True) -> bytes:
        """The bytes that one id adds to the text. Models pad their vocabulary, so an id without a token is b""."""
        if token := self._special.get(id):
            return b"" if skip_special and token.hidden else token.text.encode()
        return self._piece(id) if 0 <= id < self._n_pieces else b""

    def _encode_plain(self, text: str, prefix: bool) -> list[int]:
        # A lone surrogate (an undecodable byte of the command line) has no UTF-8: U+FFFD, as tiktoken does.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode_segment(text, prefix and (self._prefix.double or not text.startswith((" ", "\u2581"))))

    def _encode_segment(self, text: str, prefix: bool) -> list[int]:
        raise NotImplementedError

    def _piece(self, id: int) -> bytes:
        raise NotImplementedError


class StreamDecoder:
    """Ids one at a time to text: the concatenation of all `put` and the last `flush` is `decode` of the ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer._strip_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, id: int) -> str:
        """The text that became complete with this id: "" in the middle of a character."""
        return self._out(self._utf8.decode(self._tokenizer.token_bytes(id, skip_special=self._skip_special)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else ""."""
        return self._out(self._utf8.decode(b"", final=True))

    def _out(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text
