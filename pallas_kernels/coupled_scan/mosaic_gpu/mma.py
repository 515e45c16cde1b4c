"""The tensor cores' instruction for products of small matrices, and what its factors are built of (inside Pallas).

A thread's part of a factor or a result depends on its place among 32: lane l has row l // 4 (of B column l // 4) and,
of the inner index, l % 4; of a result column 2 (l % 4) and the next.
"""

from typing import Any

from pallas_kernels.coupled_scan.mosaic_gpu import warp


def mma(a: list[Any], b: list[Any], acc: list[Any] | None = None, kind: str = "tf32") -> list[Any]:
    """A [16, k] B [k, 8] + acc, k = 4 or 8 (bf16: 8 or 16); a, b list a thread's words in the instruction's order."""
    ir, arith, llvm, _ = warp.dialects()
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    acc = acc or [arith.constant(f32, 0.0)] * 4
    inputs = [v if v.type == i32 else arith.bitcast(i32, v) for v in [*a, *b]]
    places = iter(range(4, 8 + len(inputs)))
    groups = ["{" + ", ".join(f"${next(places)}" for _ in group) + "}" for group in (a, b, acc)]
    shape = f"m16n8k{len(b) * (4 if kind == 'tf32' else 8)}"
    code = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {', '.join(groups)};"
    constraints = ",".join(["=f"] * 4 + ["r"] * len(inputs) + ["f"] * 4)
    result_type = llvm.StructType.get_literal([f32] * 4)
    out = llvm.inline_asm(result_type, [*inputs, *acc], code, constraints, has_side_effects=False)
    return [llvm.extractvalue(f32, out, [k]) for k in range(4)]


def lane() -> Any:
    """Of the thread in its warp."""
    return warp.dialects()[1].andi(warp.thread(), warp.constant(31))


def own_warp() -> Any:
    """Of the thread in its warpgroup."""
    return warp.dialects()[1].shrui(warp.thread(), warp.constant(5))


def within_four() -> Any:
    """Of the thread among its four neighbours."""
    return warp.dialects()[1].andi(warp.thread(), warp.constant(3))


def equals(value: Any, number: int) -> Any:
    """Whether an integer is a number."""
    arith = warp.dialects()[1]
    return arith.cmpi(arith.CmpIPredicate.eq, value, warp.constant(number))


def where(condition: Any, yes: Any, no: Any = None) -> Any:
    """One of two numbers; `no` is zero if not given."""
    arith = warp.dialects()[1]
    zero = warp.constant(0) if str(yes.type) == "i32" else arith.constant(yes.type, 0.0)
    return arith.select(condition, yes, zero if no is None else no)


def ones(one: int, column: int) -> Any:
    """A thread's word of a factor [k, 8] that has ones in one column."""
    arith = warp.dialects()[1]
    return where(equals(arith.shrui(lane(), warp.constant(2)), column), warp.constant(one))
