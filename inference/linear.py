"""One matrix of a model, dense or packed, and the three things a forward pass does with it.

`x Wᵀ`, the same with one matrix per row chosen from a stack (experts), and rows by index (embedding). For many rows at
once a packed matrix is unpacked first where that is faster: on the CPU `quantized_matmul` runs at 2.3 GFLOP/s, the BLAS
at 193, and unpacking costs as much as 3 rows (affine, 4 bits) to 19 (mxfp4) through `quantized_matmul`; on CUDA its
many-row kernels are compiled when first called, which took minutes a format on an H100. Metal's are ready and fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .backend import BACKEND, mx
from .checkpoint import QuantSpec
from .memory import MOST_PLACES

UNPACK_ROWS = {"cpu": 16, "cuda": 8}.get(BACKEND)  # from this many rows on; None: never

ROOM = 8  # places of an expert come in eights


@dataclass(frozen=True, slots=True)
class Sorting:
    """Rows in the order of their experts, so that each expert's matrix is read once.

    order: [R], the row that comes at each place. Where every expert is given one number of places, with room for the
    busiest, all products are one batched product: rows: [experts · room], the (sorted) row at each of these places, any
    row where none is; places: [R], where each row is. Both None where that does not pay.
    """

    order: mx.array
    rows: mx.array | None = None
    places: mx.array | None = None

    @classmethod
    def of(cls, experts: mx.array, count: int) -> Sorting:
        """experts: [R], of `count`. Waits for the device, which knows how busy the busiest is.

        `gather_mm` takes 4 ms for 16,384 rows of a 35B-A3B on an H100 where a batched product of as many takes 0.3, and
        multiplies row by row on the CPU; Metal's grouped kernels need no help.
        """
        order = mx.argsort(experts)
        rows = experts.size
        if UNPACK_ROWS is None or rows < count:
            return cls(order)
        members = (experts[:, None] == mx.arange(count)).sum(axis=0)
        busiest: int = members.max().item()  # type: ignore[assignment] - of integers
        room = -(-busiest // ROOM) * ROOM
        if room * count > MOST_PLACES * rows:
            return cls(order)
        ordered = experts[order]
        rank = mx.arange(rows) - (mx.cumsum(members) - members)[ordered]
        places = ordered * room + rank
        at = mx.zeros((count * room,), mx.int32)
        at[places] = mx.arange(rows)
        return cls(order, at, places)

    def spread(self, x: mx.array, k: int) -> mx.array:
        """x: [N, H], each row for k experts → [N · k, H], in this order.

        Its derivative adds the k of a row in their own order. That of an index adds them as a GPU comes by, and so gives
        other last bits each time.
        """
        source = self.order // k

        @mx.custom_function
        def spread(x: mx.array) -> mx.array:
            return x[source]

        @spread.vjp
        def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            return cotangent[mx.argsort(self.order)].reshape(*x.shape[:1], k, -1).sum(axis=1)

        return spread(x)  # type: ignore[return-value] - a custom function


@dataclass(frozen=True, slots=True)
class Dense:
    """weight: [out, in], or [experts, out, in]. bias: [out], added by a call (never by `gather`)."""

    weight: mx.array
    bias: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] → [..., out]"""
        if BACKEND == "cpu" and x.size == x.shape[-1]:  # a vector: gemv reads the matrix at twice the speed of gemm
            return _plus((self.weight @ x.reshape(-1)).reshape(*x.shape[:-1], -1), self.bias)
        return _plus(x @ self.weight.T, self.bias)

    def gather(self, x: mx.array, experts: mx.array, sorting: Sorting | None = None) -> mx.array:
        """[..., 1, in], experts broadcastable to [...] → [..., 1, out]; sorting: of rows [R, 1, in] and experts [R]."""
        weight = self.weight.swapaxes(-1, -2)
        if sorting is not None and sorting.places is not None:
            dense = x[:, 0][sorting.rows].reshape(weight.shape[0], -1, x.shape[-1]) @ weight
            return dense.reshape(-1, 1, weight.shape[-1])[sorting.places]
        if sorting is None:
            return mx.gather_mm(x, weight, rhs_indices=experts)
        y = mx.gather_mm(_row_by_row(x), weight, rhs_indices=experts, sorted_indices=True)
        return _row_by_row(y)  # the derivative is another such product, of what comes back through here

    def rows(self, ids: mx.array) -> mx.array:
        """[...] → [..., in]"""
        return self.weight[ids]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class Packed:
    """weight: uint32 codes [out, in · bits / 32], or [experts, ...]; scales and biases [out, in / group_size].

    biases is None for the float formats (mxfp4, mxfp8, nvfp4). dtype is that of the results. bias: as in `Dense`.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    spec: QuantSpec
    dtype: mx.Dtype
    bias: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] → [..., out]"""
        if UNPACK_ROWS is not None and x.size >= UNPACK_ROWS * x.shape[-1]:
            return _plus(x @ self.unpacked().T, self.bias)
        s = self.spec
        y = mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=s.group_size, bits=s.bits, mode=s.mode
        )
        return _plus(y, self.bias)

    def gather(self, x: mx.array, experts: mx.array, sorting: Sorting | None = None) -> mx.array:
        """As for `Dense`."""
        if UNPACK_ROWS is not None and experts.size >= self.weight.shape[0]:
            return Dense(self.unpacked()).gather(x, experts, sorting)
        s = self.spec
        return mx.gather_qmm(
            x, self.weight, self.scales, self.biases, rhs_indices=experts, transpose=True,
            group_size=s.group_size, bits=s.bits, mode=s.mode, sorted_indices=sorting is not None,
        )  # fmt: skip

    def rows(self, ids: mx.array) -> mx.array:
        """[...] → [..., in]"""
        biases = None if self.biases is None else self.biases[ids]
        return self._dequantize(self.weight[ids], self.scales[ids], biases)

    def unpacked(self) -> mx.array:
        return self._dequantize(self.weight, self.scales, self.biases)

    @property
    def nbytes(self) -> int:
        parts = (self.weight, self.scales, self.biases, self.bias)
        return sum(x.nbytes for x in parts if x is not None)

    def _dequantize(self, weight: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
        s = self.spec
        return mx.dequantize(weight, scales, biases, s.group_size, s.bits, mode=s.mode, dtype=self.dtype)


def _row_by_row(x: mx.array) -> mx.array:
    """[R, 1, n], the same with strides (n, n, 1), and so its derivative.

    An axis put in by `[:, None]` has stride 1. The kernels of a sorted `gather_mm` take it for the distance between rows
    (ml-explore/mlx#4253: Metal's until 0.32.1, CUDA's in 0.32.4): all but the first row of each expert come out wrong.
    `contiguous` of the whole keeps these strides, as nothing is out of order.
    """
    return mx.contiguous(x.reshape(-1, x.shape[-1])).reshape(-1, 1, x.shape[-1])


def _plus(y: mx.array, bias: mx.array | None) -> mx.array:
    return y if bias is None else y + bias


Linear = Dense | Packed


class SameInput:
    """Linears that read one input (q, k and v; gate and up), in the order that their outputs are wanted in.

    They are called one by one until `fuse` has put those of one format into one matrix, row below row: fewer and larger
    products, the same numbers.
    """

    def __init__(self, *linears: Linear) -> None:
        self._linears: list[Linear] = list(linears)
        self._places: list[list[int]] = [[i] for i in range(len(linears))]  # of each linear's outputs in the result
        self._ends: list[list[int]] = [[] for _ in linears]  # where to split them

    def __call__(self, x: mx.array) -> list[mx.array]:
        """[..., in] → [..., out] of each"""
        return self._ordered([linear(x) for linear in self._linears])

    def gather(self, x: mx.array, experts: mx.array, sorting: Sorting | None = None) -> list[mx.array]:
        """[..., 1, in], experts broadcastable to [...] → [..., 1, out] of each"""
        return self._ordered([linear.gather(x, experts, sorting) for linear in self._linears])

    def _ordered(self, results: Sequence[mx.array]) -> list[mx.array]:
        out: list[tuple[int, mx.array]] = []
        for y, places, ends in zip(results, self._places, self._ends, strict=True):
            out += zip(places, mx.split(y, ends, axis=-1) if ends else [y], strict=True)
        return [y for _, y in sorted(out, key=lambda item: item[0])]

    def fuse(self) -> None:
        """Join what has one format; evaluated. Needs room for one more copy of the joined matrices while it runs."""
        groups: dict[object, list[int]] = {}
        for i, linear in enumerate(self._linears):
            groups.setdefault(_format(linear), []).append(i)
        linears, ends = [], []
        for members in groups.values():
            parts = [self._linears[i] for i in members]
            rows = [part.weight.shape[-2] for part in parts]
            ends.append([sum(rows[: n + 1]) for n in range(len(rows) - 1)])
            linears.append(_joined(parts))
        self._linears, self._places, self._ends = linears, list(groups.values()), ends


def _format(linear: Linear) -> object:
    """Equal for linears that one matrix can hold."""
    if isinstance(linear, Dense):
        return (linear.weight.dtype, linear.weight.shape[:-2], linear.bias is None)
    biases = None if linear.biases is None else linear.biases.dtype
    return (linear.spec, linear.dtype, linear.scales.dtype, biases, linear.weight.shape[:-2], linear.bias is None)


def _joined(parts: Sequence[Linear]) -> Linear:
    """One linear whose outputs are those of all parts, which have one format, behind each other."""
    if len(parts) == 1:
        return parts[0]

    def rows(name: str, axis: int) -> mx.array | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else mx.concatenate(found, axis=axis)

    names = ("weight",) if isinstance(parts[0], Dense) else ("weight", "scales", "biases")
    fields = {name: rows(name, -2) for name in names} | {"bias": rows("bias", -1)}
    mx.eval([x for x in fields.values() if x is not None])
    return replace(parts[0], **fields)  # type: ignore[arg-type]
