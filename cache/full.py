"""The yardstick: every token's K and V as they are, [B, G, S, D] in the model's dtype, one layer a group."""
from collections.abc import Iterator

import torch
from torch import Tensor

from cache.base import Columns, LayerGroup, attend_exact, column_blocks, put


class FullLayer(LayerGroup):
    """k, v [B, G, S, D]. A token at position p sits in column p; columns are masked by position."""

    def __init__(self, layer: int, *, batch: int, n_kv_head: int, max_seq_len: int, head_dim: int, dtype: torch.dtype,
                 device: torch.device | str, sliding_window: int | None) -> None:
        super().__init__()
        self.layers = (layer,)
        self.sliding_window = sliding_window
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(batch, n_kv_head, max_seq_len, head_dim, dtype=dtype, device=device), persistent=False)
        none, slots = torch.empty(0, device=device), torch.empty(batch, n_kv_head, 0, device=device)
        columns = self.k.new_empty(1, batch, n_kv_head, 0, head_dim)
        # what a split group has and this one has not: no columns; magnitudes to overflow; tables. See `as_split`
        self.absent = ((columns,) * 2, (columns, columns, slots.bool(), columns, columns, slots.int(), slots, slots, slots.int()),
                       (none,) * 3)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor, rows: Tensor | None) -> Tensor:
        """The operator, or: write first, then SDPA over all columns, the step's own token being a column like the others."""
        if self.form != "reference" and q.shape[2] == 1 and rows is None:
            y = self.attend_fast(index, q, k, v, input_pos[:, 0])
            if self.form == "triton":       # one launch; on a CPU what the compiler makes of `write` costs less than a call
                self.write_fast(k, v, input_pos[:, 0], valid[:, 0])
            else:
                self.write(k, v, input_pos, valid, rows)
            return y
        self.write(k, v, input_pos, valid, rows)
        S = self.k.shape[2]
        seen = input_pos.clamp_max(S - 1)           # a padded query may stand past the end; it must still see something
        column = torch.arange(S, device=q.device)
        mask = (column <= seen[..., None]) & self.in_window(column[None, None], seen)
        keys, values = (self.k, self.v) if rows is None else (self.k[rows], self.v[rows])
        return attend_exact(q, keys, values, mask[:, None])

    def attend_fast(self, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        return torch.ops.minicache.attend(q, k, v, length, self.absent[2][0], *self.as_split(window=False), 0, self.sliding_window or 0,
                                          q.dtype)

    def write_fast(self, k: Tensor, v: Tensor, length: Tensor, valid: Tensor) -> None:
        """One new token a row, valid [B], by the operator commit: the cache as a window that no token leaves."""
        torch.ops.minicache.commit(k[None], v[None], length, valid, None, *self.as_split(window=True), 0, "norm", 0.0, "topk", 0.0, 0)

    def as_split(self, *, window: bool) -> tuple[Tensor, ...]:
        """The buffers of a split group, as both operators take them: K and V are its directions, of 16 bits, or its window."""
        (nothing, rest, tables), whole = self.absent, (self.k[None], self.v[None])
        return (*nothing, *rest, *whole, *tables) if window else (*whole, *rest, *nothing, *tables)

    def columns(self, index: int, length: Tensor, input_pos: Tensor, rows: Tensor | None,
                limit: int | None = None) -> Iterator[Columns]:
        for at in column_blocks(self.k.shape[2], limit):
            column = torch.arange(at.start, at.stop, device=length.device)
            mask = (column < length[:, None])[:, None] & self.in_window(column[None, None], input_pos)
            k, v = (x[:, :, at] if rows is None else x[rows, :, at] for x in (self.k, self.v))
            yield Columns(k, v, mask[:, None])

    def commit(self, k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, rows: Tensor | None = None) -> None:
        i = torch.arange(k.shape[3], device=k.device)
        self.write(k[0], v[0], length[:, None] + i, i < n_new[:, None], rows)

    def write(self, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor, rows: Tensor | None) -> None:
        """k, v [B', G, T, D] at input_pos [B', T]; a lane that is not valid writes back what is there."""
        B, G, S, _ = self.k.shape
        b = (torch.arange(B, device=k.device) if rows is None else rows)[:, None, None]
        g = torch.arange(G, device=k.device)[:, None]
        at = (b, g, (input_pos % S)[:, None])       # modulo: T <= S lanes stay distinct, so no padded lane hits a valid one
        for buffer, x in ((self.k, k), (self.v, v)):
            buffer[at] = torch.where(valid[:, None, :, None], x.to(buffer.dtype), buffer[at])

    def reset(self, rows: Tensor | None = None) -> None:
        put(self.k, 0, rows, 0)
        put(self.v, 0, rows, 0)

    def read(self, index: int, length: Tensor) -> tuple[Tensor, Tensor]:
        stored = (torch.arange(self.k.shape[2], device=length.device) < length[:, None])[:, None, :, None]
        return self.k * stored, self.v * stored
