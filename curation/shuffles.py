"""The sums of 4-bit codes, compiled: byte shuffles where the machine has AVX2, the same sums one by one elsewhere.

Codes lie in blocks of 32 rows, (M / 2, 32) uint8, as `quantised` makes them; what they mean is said there. Written in
LLVM's words where numba's own loops over arrays stay scalar.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES = 32
"""Rows in a block of codes: the bytes of an AVX2 register."""
GROUP = 32
"""Pieces summed in one byte, which stops at 255. The bytes of the groups are then averaged."""


@numba.njit(cache=True, nogil=True)
def row_sum(codes: np.ndarray, entries: np.ndarray, lane: int) -> int:
    """The sum of one row: bytes per group of pieces, averaged in pairs with halves rounded up."""
    groups = np.zeros(len(entries) // GROUP, np.int64)
    for piece in range(len(entries)):
        code = (codes[piece // 2, lane] >> (4 * (piece % 2))) & 15
        groups[piece // GROUP] = min(255, groups[piece // GROUP] + entries[piece, code])
    left = len(groups)
    while left > 1:
        for i in range(left // 2):
            groups[i] = (groups[2 * i] + groups[2 * i + 1] + 1) >> 1
        left //= 2
    return int(groups[0])


@numba.njit(cache=True, nogil=True)
def all_sums(codes: np.ndarray, entries: np.ndarray, found: np.ndarray) -> None:
    """found[q, i], (m, blocks * 32) uint8: the sum of every row for every query."""
    for query in range(len(entries)):
        for block in range(len(codes)):
            for lane in range(32):
                found[query, block * 32 + lane] = row_sum(codes[block], entries[query], lane)


@numba.njit(cache=True, nogil=True)
def pair_sums(codes: np.ndarray, entries: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(n,) uint8: the sum of row i for query queries[i] alone. codes: of n rows; queries: (n,) int64."""
    found = np.empty(len(queries), np.uint8)
    for row in range(len(queries)):
        found[row] = row_sum(codes[row // 32], entries[queries[row]], row % 32)
    return found


def has_shuffle() -> bool:
    """Whether this machine has the byte shuffle of AVX2; elsewhere the same sums are taken one by one."""
    return bool(binding.get_host_cpu_features().get("avx2", False))


def shape_of(pieces: int) -> tuple[int, ...] | None:
    """What tells the compiler of `masks_of` how many groups of pieces there are; None: without the shuffle."""
    return (0,) * max(1, pieces // GROUP) if has_shuffle() else None


@numba.njit(cache=True, nogil=True)
def masks_of(
    shape: tuple[int, ...] | None,
    codes: np.ndarray,
    entries: np.ndarray,
    queries: np.ndarray,
    cuts: np.ndarray,
    masks: np.ndarray,
) -> None:
    """masks[i]: bit r is set where row r of the block `codes` (M / 2, 32) reaches the cut of query queries[i]."""
    _masks(shape, codes, entries, queries, cuts, masks)


@numba.njit(cache=True, nogil=True)
def gathered(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(blocks, M / 2, 32) uint8: codes of the chosen rows, (n,) int64, of (m, M / 2); lanes beyond n are zero."""
    found = np.zeros(((len(chosen) + 31) // 32, rows.shape[1], 32), np.uint8)
    for i in range(len(chosen)):
        row = rows[chosen[i]]
        for pair in range(len(row)):
            found[i // 32, pair, i % 32] = row[pair]
    return found


def blocked(rows: np.ndarray) -> np.ndarray:
    """`gathered` of all rows in their order."""
    return gathered(rows, np.arange(len(rows)))  # type: ignore[no-any-return]


@numba.njit(cache=True, nogil=True)
def highest_of(
    shape: tuple[int, ...] | None, codes: np.ndarray, entries: np.ndarray, base: np.ndarray, step: np.ndarray
) -> np.ndarray:
    """(blocks * 32,) int64: the query with the highest base + step * sum, the first of equal ones."""
    found = np.empty(len(codes) * 32, np.int64)
    added = np.empty((4, 32), np.uint8)
    queries = np.empty(4, np.int64)
    best, which = np.empty(32, np.float32), np.empty(32, np.int32)
    for block in range(len(codes)):
        best[:] = -np.inf
        for start in range(0, len(entries), 4):
            asking = min(4, len(entries) - start)
            for i in range(4):
                queries[i] = start + min(i, asking - 1)
            _sums(shape, codes[block], entries, queries, added)
            for i in range(asking):
                query, sums = queries[i], added[i]
                for lane in range(32):
                    score = base[query] + step[query] * np.float32(sums[lane])
                    which[lane] = np.int32(query) if score > best[lane] else which[lane]
                    best[lane] = max(score, best[lane])
        for lane in range(32):
            found[block * 32 + lane] = which[lane]
    return found


def _sums(shape: Any, codes: Any, entries: Any, queries: Any, added: Any) -> None:
    raise NotImplementedError


@overload(_sums)  # type: ignore[untyped-decorator]
def _sums_for(shape: Any, codes: Any, entries: Any, queries: Any, added: Any) -> Any:
    return _plain_sums if isinstance(shape, types.NoneType) else _shuffle_sums


def _plain_sums(shape: Any, codes: Any, entries: Any, queries: Any, added: Any) -> None:
    for i in range(4):
        for lane in range(32):
            added[i, lane] = row_sum(codes, entries[queries[i]], lane)


def _shuffle_sums(shape: Any, codes: Any, entries: Any, queries: Any, added: Any) -> None:
    start, size = entries.ctypes.data, entries.shape[1] * 16
    _sum_kernel(
        shape,
        codes.ctypes.data,
        start + queries[0] * size,
        start + queries[1] * size,
        start + queries[2] * size,
        start + queries[3] * size,
        added.ctypes.data,
    )


def _masks(shape: Any, codes: Any, entries: Any, queries: Any, cuts: Any, masks: Any) -> None:
    raise NotImplementedError


@overload(_masks)  # type: ignore[untyped-decorator]
def _masks_for(shape: Any, codes: Any, entries: Any, queries: Any, cuts: Any, masks: Any) -> Any:
    return _plain_masks if isinstance(shape, types.NoneType) else _shuffle_masks


def _plain_masks(shape: Any, codes: Any, entries: Any, queries: Any, cuts: Any, masks: Any) -> None:
    for i in range(4):
        found = np.uint32(0)
        for lane in range(32):
            if row_sum(codes, entries[queries[i]], lane) >= cuts[queries[i]]:
                found |= np.uint32(1) << np.uint32(lane)
        masks[i] = found


def _shuffle_masks(shape: Any, codes: Any, entries: Any, queries: Any, cuts: Any, masks: Any) -> None:
    start, size = entries.ctypes.data, entries.shape[1] * 16
    _kernel(
        shape,
        codes.ctypes.data,
        start + queries[0] * size,
        start + queries[1] * size,
        start + queries[2] * size,
        start + queries[3] * size,
        masks.ctypes.data,
        cuts[queries[0]],
        cuts[queries[1]],
        cuts[queries[2]],
        cuts[queries[3]],
    )


def _averages(builder: Any, shape: Any, codes: Any, tables: Any) -> list[Any]:
    """A register of 32 sums per table, in LLVM's words: numba has no type for a register of bytes."""
    byte, word, address = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    register, half = ir.VectorType(byte, LANES), ir.VectorType(byte, 16)
    name = "llvm.x86.avx2.pshuf.b"
    shuffle = builder.module.declare_intrinsic(name, (), ir.FunctionType(register, [register, register]))
    add = builder.module.declare_intrinsic("llvm.uadd.sat.v32i8", (), ir.FunctionType(register, [register, register]))

    def constant(value: int) -> ir.Constant:
        return ir.Constant(register, [value] * LANES)

    def number(value: int) -> ir.Constant:
        return ir.Constant(address, value)

    def load(base: Any, offset: Any, kind: Any) -> Any:
        return builder.load(builder.inttoptr(builder.add(base, offset), kind.as_pointer()), align=1)

    def average(one: Any, other: Any) -> Any:
        double = ir.VectorType(ir.IntType(16), LANES)
        ones = ir.Constant(double, [1] * LANES)
        total = builder.add(builder.add(builder.zext(one, double), builder.zext(other, double)), ones)
        return builder.trunc(builder.lshr(total, ones), register)

    def group_sums(group: int) -> list[Any]:
        slots = [cgutils.alloca_once_value(builder, constant(0)) for _ in tables]
        for slot in slots:
            builder.store(constant(0), slot)
        first, last = number(group * GROUP // 2), number((group + 1) * GROUP // 2)
        with cgutils.for_range_slice(builder, first, last, number(1), intp=address) as (pair, _):
            both = load(codes, builder.mul(pair, number(LANES)), register)
            shorts = builder.bitcast(both, ir.VectorType(ir.IntType(16), 16))
            shifted = builder.lshr(shorts, ir.Constant(shorts.type, [4] * 16))
            indices = [
                builder.and_(both, constant(15)),
                builder.and_(builder.bitcast(shifted, register), constant(15)),
            ]
            for slot, table in zip(slots, tables, strict=True):
                total = builder.load(slot)
                for place, index in enumerate(indices):
                    offset = builder.add(builder.mul(pair, number(32)), number(16 * place))
                    entries = load(table, offset, half)
                    twice = ir.Constant(ir.VectorType(word, LANES), [*range(16)] * 2)
                    entries = builder.shuffle_vector(entries, entries, twice)
                    total = builder.call(add, [total, builder.call(shuffle, [entries, index])])
                builder.store(total, slot)
        return [builder.load(slot) for slot in slots]

    groups = [group_sums(g) for g in range(shape.count)]
    found = []
    for query in range(len(tables)):
        parts = [group[query] for group in groups]
        while len(parts) > 1:
            parts = [average(x, y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
        found += parts
    return found


def _place(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(base, ir.Constant(ir.IntType(64), offset)), kind.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def _sum_kernel(typing_context, shape, codes, one, two, three, four, out):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        for query, total in enumerate(_averages(builder, shape, arguments[1], arguments[2:6])):
            builder.store(total, _place(builder, arguments[6], LANES * query, total.type), align=1)
        return context.get_dummy_value()

    return types.void(shape, *[types.intp] * 6), generate


@intrinsic  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    typing_context, shape, codes, one, two, three, four, out, cut_one, cut_two, cut_three, cut_four
):
    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        totals = _averages(builder, shape, arguments[1], arguments[2:6])
        for query, (total, cut) in enumerate(zip(totals, arguments[7:], strict=True)):
            first = builder.insert_element(ir.Constant(total.type, ir.Undefined), cut, ir.Constant(word, 0))
            spread = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(word, LANES), [0] * LANES))
            found = builder.bitcast(builder.icmp_unsigned(">=", total, spread), word)
            builder.store(found, _place(builder, arguments[6], 4 * query, word), align=1)
        return context.get_dummy_value()

    return types.void(shape, *[types.intp] * 6, *[types.uint8] * 4), generate


@intrinsic  # type: ignore[untyped-decorator]
def trailing_zeros(typing_context, value):  # type: ignore[no-untyped-def]
    """Of a uint32 that is not zero: the place of its lowest bit, int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))
        return builder.zext(found, ir.IntType(64))

    return types.int64(types.uint32), generate


STEP = 64
"""Rows whose products are summed come in multiples of so many numbers: a loop without a rest is compiled in place."""


def padded(dimension: int) -> int:
    """The next multiple of STEP."""
    return -(-dimension // STEP) * STEP


@numba.njit(cache=True, nogil=True)
def sum_of_products(shape: tuple[int, ...] | None, left: np.ndarray, i: int, right: np.ndarray, j: int) -> int:
    """Of rows i of (m, w) int16 and j of (n, w) int8, C-contiguous; partial sums fit in 32 bits.

    shape: `shape_of`. w: a multiple of STEP, see `padded`.
    """
    return _products(shape, left, i, right, j)


def _products(shape: Any, left: Any, i: Any, right: Any, j: Any) -> int:
    raise NotImplementedError


@overload(_products)  # type: ignore[untyped-decorator]
def _products_for(shape: Any, left: Any, i: Any, right: Any, j: Any) -> Any:
    return _plain_products if isinstance(shape, types.NoneType) else _paired_products


def _plain_products(shape: Any, left: Any, i: Any, right: Any, j: Any) -> Any:
    total = np.int32(0)
    for k in range(left.shape[1]):
        total = np.int32(total + np.int32(left[i, k]) * np.int32(right[j, k]))
    return total


def _paired_products(shape: Any, left: Any, i: Any, right: Any, j: Any) -> Any:
    return _product_kernel(left, i, right, j)


@intrinsic  # type: ignore[untyped-decorator]
def _product_kernel(typing_context, left, i, right, j):  # type: ignore[no-untyped-def]
    """Sixteen products a step, added in pairs; four sums side by side."""
    word, address = ir.IntType(32), ir.IntType(64)
    shorts, sums = ir.VectorType(ir.IntType(16), 16), ir.VectorType(word, 8)
    bytes_ = ir.VectorType(ir.IntType(8), 16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "llvm.x86.avx2.pmadd.wd"
        paired = builder.module.declare_intrinsic(name, (), ir.FunctionType(sums, [shorts, shorts]))
        none = ir.Constant(sums, [0] * 8)

        def row(array: int, number: int, size: int) -> Any:
            held = context.make_array(signature.args[array])(context, builder, arguments[array])
            width = builder.mul(builder.extract_value(held.shape, 1), ir.Constant(address, size))
            return builder.add(builder.ptrtoint(held.data, address), builder.mul(arguments[number], width))

        def load(base: Any, offset: Any, kind: Any) -> Any:
            return builder.load(builder.inttoptr(builder.add(base, offset), kind.as_pointer()), align=1)

        size = builder.extract_value(context.make_array(signature.args[0])(context, builder, arguments[0]).shape, 1)
        wide, narrow = row(0, 1, 2), row(2, 3, 1)
        slots = [cgutils.alloca_once_value(builder, none) for _ in range(4)]
        for slot in slots:
            builder.store(none, slot)
        first, step = ir.Constant(address, 0), ir.Constant(address, STEP)
        with cgutils.for_range_slice(builder, first, size, step, intp=address) as (at, _):
            for place, slot in enumerate(slots):
                start = builder.add(at, ir.Constant(address, 16 * place))
                x = load(wide, builder.mul(start, ir.Constant(address, 2)), shorts)
                y = builder.sext(load(narrow, start, bytes_), shorts)
                builder.store(builder.add(builder.load(slot), builder.call(paired, [x, y])), slot)
        parts = [builder.load(slot) for slot in slots]
        total = builder.add(builder.add(parts[0], parts[1]), builder.add(parts[2], parts[3]))
        lanes = [builder.extract_element(total, ir.Constant(word, lane)) for lane in range(8)]
        while len(lanes) > 1:
            lanes = [builder.add(x, y) for x, y in zip(lanes[::2], lanes[1::2], strict=True)]
        return lanes[0]

    return types.int32(left, types.intp, right, types.intp), generate
