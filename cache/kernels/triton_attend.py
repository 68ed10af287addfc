"""`minicache::attend` on CUDA: what to launch, and how the work is cut. The device code is in triton_kernels.py.

`load()` registers it, and commit beside it; `attend_triton` has the operator's arguments. No host sync: a row's length is read on the
device, so the cost follows what is filled, and a CUDA graph may hold the launches. Scratch is allocated here, from the graph's pool when
one is captured.
Trap: triton is imported by the first call, not by this module; torch's CUDA wheels bring it.
"""
import bisect
import functools
import sys

import torch
from torch import Tensor

from cache.kernels import library

REGISTERS = 65536 // 32     # of one multiprocessor, for each thread of a warp


@functools.cache
def load() -> bool:
    """Register both operators for CUDA, once. False where triton or a device of capability 8.0 (bf16 in tensor cores) is absent, with a
    warning on stderr if there is a device at all."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    try:
        if torch.cuda.get_device_capability() < (8, 0):
            raise ImportError(f"{torch.cuda.get_device_name()} has no bf16 in tensor cores")
        from cache.kernels.triton_commit import commit_triton
    except ImportError as error:
        print(f"warning: the Triton kernels cannot run ({error}), so the slower reference is used", file=sys.stderr)
        return False
    library.impl("attend", attend_triton, "CUDA")
    library.impl("commit", commit_triton, "CUDA")
    return True


def attend_triton(q: Tensor, k: Tensor, v: Tensor, length: Tensor, threshold: Tensor, k_direction: Tensor, v_direction: Tensor,
                  k_magnitude: Tensor, v_magnitude: Tensor, exact: Tensor, k_retained: Tensor, v_retained: Tensor, retained_pos: Tensor,
                  retained_score: Tensor, score_range: Tensor, overflow: Tensor, k_window: Tensor, v_window: Tensor, rotation: Tensor,
                  k_levels: Tensor, v_levels: Tensor, index: int, sliding_window: int, dtype: torch.dtype) -> Tensor:
    """The operator (see cache/kernels/__init__.py) -> y [B, H, 1, D]. Stored buffers are contiguous."""
    q, k, v = q[:, :, 0].contiguous(), k[:, :, 0].contiguous(), v[:, :, 0]
    v = v if v[0].is_contiguous() else v.contiguous()           # its rows may lie apart, as they were projected
    stored = {"k_stored": k_direction, "v_stored": v_direction, "k_magnitude": k_magnitude, "v_magnitude": v_magnitude,
              "k_retained": k_retained, "v_retained": v_retained, "k_window": k_window, "v_window": v_window}
    tensors = {name: x[index if x.shape[0] > 1 else 0] if x.numel() else x for name, x in stored.items()}
    tensors |= dict(q=q, k=k, v=v, length=length.contiguous(), exact=exact, retained_pos=retained_pos, retained_score=retained_score,
                    threshold=threshold, rotation=rotation, k_levels=k_levels, v_levels=v_levels)
    with torch.cuda.device_of(q):
        plan = launches(tensors, dtype, sliding_window=sliding_window, sms=multiprocessors(q.device))
        for kernel, grid, arguments, options in plan:
            kernel[grid](**arguments, **options)
    y, y_rotated = (plan[-1][2].get(name) for name in ("y", "y_rotated"))
    if y is None:                                           # one program a row, nothing to combine
        return plan[-1][2]["partial"].view(q.shape)[:, :, None]
    if y_rotated is not None and y_rotated.numel():         # not turned yet
        y.view(-1, y.shape[-1]).addmm_(y_rotated.view(-1, y.shape[-1]), rotation.mT)
    return y.to(dtype)[:, :, None]


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1       # 1: the interpreter


def launches(tensors: dict[str, Tensor], dtype: torch.dtype, *, sliding_window: int, sms: int) -> list[tuple]:
    """The launches as (kernel, grid, arguments by name, options), for the operator's tensors of one layer (`index` picked).

    Work for `sms` multiprocessors; on meta tensors it plans only, which is what compiling ahead of time needs.
    """
    from triton import next_power_of_2 as power_of_2

    from cache.kernels import triton_codes as codes
    from cache.kernels import triton_kernels as kernels
    q, k_stored, v_stored = tensors["q"], tensors["k_stored"], tensors["v_stored"]
    (B, H, D), (G, N), R = q.shape, k_stored.shape[1:3], tensors["retained_pos"].shape[-1]
    W = tensors["k_window"].shape[-2] if tensors["k_window"].numel() else 0
    rows, heads = B * G, H // G
    tensors = tensors | {name: tensors["k"] for name in ("k_retained", "v_retained", "k_window", "v_window") if not tensors[name].numel()}
    bits = [x.shape[-1] * 8 // D if x.dtype == torch.uint8 else 16 for x in (k_stored, v_stored)]
    wide = q.dtype == torch.float32
    numbers = [codes.becomes_numbers(b, D, q.dtype) for b in bits]
    slots = [codes.slots(bits[0]), codes.v_slots(D) if numbers[1] else codes.slots(bits[1])]
    widths = [max(32 if numbers[0] else 16, power_of_2(D // slots[0])), max(16, power_of_2(D) // slots[1])]     # int8 takes 32 at a time
    # 1. sizes of a program: one warp and 32 columns for numbers of V, as it loads them for itself (of 16 Triton's products are wrong where
    # a join and an 8-bit load lie behind them); else a warp for every 16 coordinates of a slot of V, so that no two warps do the same; then
    # columns by registers
    warps = 1 if numbers[1] else min(max(widths[1] // 16, 1), 4)
    block, exact_block = (max(16, warps * columns) for columns in (8 if wide else 32 if numbers[1] else 16, 8))
    # 2. registers of a thread: left alone the program takes 155 with 4 query heads a kv head and all 255 with 16; with these more programs
    # are resident, and 2 words a tile spill in the loop over codes (sm_90, 26 with 16 heads), 12 outside of it
    free = wide or D > 128 or heads > 8 or 3 in bits and D % 64
    registers = 255 if free else 168 if heads > 4 or 8 in bits else 144 if 3 in bits else 128
    # 3. how many programs share a row
    resident = max(1, sms * (REGISTERS // registers) // warps)
    tiles = max(-(-N // block), 1), -(-(R + W) // (16 if numbers[1] else 2 * exact_block))
    few = 16 if bits[1] < 16 and D <= 128 else 0         # splits that are combined and turned at once: more take too many registers
    own = R + W == 0 and min(bits) == 16        # no exact columns: the programs of merged ones take the new token
    splits, exact_splits = choose_splits(rows, tiles[0], None, resident, 1) if own else choose_splits(rows, *tiles, resident, few)
    alone = exact_splits + splits == 1          # what it sums up is what is wanted
    partial = torch.empty(rows, exact_splits + splits, heads, D, dtype=dtype if alone else torch.float32, device=q.device)
    lse = torch.empty(rows, exact_splits + splits, heads, device=q.device)
    sizes = dict(N=N, W=W, sliding_window=sliding_window, exact_splits=exact_splits)
    shape = dict(G=G, HEADS=heads, D=D, DP=max(16, power_of_2(D)), BLOCK=block)
    turn = dict(rotation=tensors.pop("rotation"), D=D, DP=shape["DP"], STEP=min((4096 if wide else 16384) // shape["DP"], shape["DP"]),
                WIDE=wide)
    width = slots[0] * widths[0] if numbers[0] else shape["DP"]
    rotated = (rows * heads, 2, width) if numbers[0] else q.shape if bits[0] < 16 else (0,)
    unit, middle = (torch.empty(rows * heads if numbers[0] else 0, dtype=x, device=q.device) for x in (torch.float32, torch.int32))
    split = tensors | sizes | shape | dict(
        q_rotated=torch.empty(rotated, dtype=torch.int8 if numbers[0] else torch.float32, device=q.device), q_unit=unit, q_middle=middle,
        partial=partial, lse=lse, v_row=tensors["v"].stride(0), R=R, HP=max(4 if all(numbers) else 8, power_of_2(heads)),
        HE=max(8, power_of_2(heads)), K_BITS=bits[0], V_BITS=bits[1], K_SLOTS=slots[0], V_SLOTS=slots[1], KP=widths[0], VP=widths[1],
        K_NUMBERS=numbers[0], V_NUMBERS=numbers[1], WHOLE=N >= block, SCALED=tensors["k_magnitude"].numel() > 0,
        MASKED=tensors["exact"].numel() > 0, BY_THRESHOLD=tensors["threshold"].numel() > 0, OWN=own, EXACT_BLOCK=exact_block,
        STAGES=2 if min(bits) == 16 and not wide else 1)
    n_splits, coded = exact_splits + splits, bits[1] < 16
    options = {"num_warps": warps} | ({} if free else {"maxnreg": registers})
    out, grid = [(kernels.attend_splits, (rows, n_splits), split, options)], (-(-rows * heads // 16),)
    if bits[0] < 16:
        rotate = {name: split[name] for name in ("q", "q_rotated", "q_unit", "q_middle", "K_BITS", "K_NUMBERS", "KP")}
        out.insert(0, (kernels.rotate, grid, turn | rotate | dict(count=rows * heads, WIDTH=width), {"num_warps": 8}))
    if alone:
        return out
    y = torch.empty(q.shape, dtype=torch.float32 if coded and n_splits > few else dtype, device=q.device)
    combine = sizes | shape | dict(partial=partial, lse=lse, length=tensors["length"], y=y, n_splits=n_splits, SPLITS=power_of_2(n_splits))
    if n_splits <= few:
        # a program that has a multiprocessor to itself takes registers, so that it waits for few strips of the rotation
        turn["STEP"] = min(turn["STEP"], 64, 256 // combine["SPLITS"] if wide or grid[0] > sms else 64)
        return [*out, (kernels.combine_and_rotate, grid, combine | turn | dict(count=rows * heads), {"num_warps": 8})]
    combine |= dict(y_rotated=torch.empty_like(y if coded else y[:0]), V_CODED=coded, TILE=min(16, power_of_2(n_splits)))
    return [*out, (kernels.combine_splits, (rows, heads), combine, {"num_warps": 1 if n_splits <= 4 else 4})]


@functools.cache
def choose_splits(rows: int, tiles: int, exact_tiles: int | None, resident: int, few: int) -> tuple[int, int]:
    """How many programs share the merged tiles of a full row, and how many its exact tiles, which get no more of them to do (None: none).

    The fewest that take at most 5 % longer than need be, where `resident` programs run at once, first those of exact tiles, and whoever is
    done starts the next one. A tile takes 1; a program's start and end 2 more, or 1 of exact tiles; a launch more, for more than `few`, 4.
    """
    def plan(n: int) -> tuple[int, int, int]:
        each = -(-tiles // n)
        e = 0 if exact_tiles is None else max(1, -(-exact_tiles // each))
        exact, merged = -(-(exact_tiles or 0) // max(e, 1)) + 1, each + 2
        rounds, late = divmod(rows * e, resident)
        start = rounds * exact          # here all but `late` programs at once are free for merged tiles, those `exact` later

        def done(t: int) -> int:
            return (resident - late) * (max(t - start, 0) // merged) + late * (max(t - start - exact, 0) // merged)

        time = max(bisect.bisect_left(range(10 ** 9), rows * n, key=done), start + exact * (late > 0))
        return time + 4 * (n + e > few), n, e

    plans = [plan(n) for n in range(1, tiles + 1)]
    return next(found for found in plans if found[0] <= 1.05 * min(plans)[0])[1:]
