"""What the linears of a model read and, on a backward pass, how much each of their outputs matters.

`TappedWeights` stands in for `Weights`: every linear that a layer takes from it reports its input to a `Recorder`
before it computes. Linears that are called with the very same array (q, k and v; gate and up) share one `Reading`:
told by the identity of the array object, which the recorder holds on to, so that its id cannot come up again.

`output_gradients` runs one layer backwards. It adds a zero to the output of every linear; the gradient with respect to
that zero is the gradient of the output. Everything between the linears (attention, the delta rule in its chunked form,
routing) is differentiated by MLX; which experts a token goes to is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from .backend import mx
from .linear import Linear, Sorting


class LinearSource(Protocol):
    """What a layer is built from; `inference.load.Weights`, or that with taps."""

    def linear(self, module: str) -> Linear: ...
    def array(self, name: str) -> mx.array: ...


@dataclass
class Reading:
    """One input and the modules that read it, in the order of their calls.

    x: [..., K]; for stacked experts [..., 1, K] with experts [...] (broadcastable to it): the expert of each row.
    """

    x: mx.array
    experts: mx.array | None
    modules: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first module that read it."""
        return self.modules[0]

    def rows(self) -> tuple[mx.array, mx.array | None]:
        """Rows [R, K] and, for stacked experts, the expert of each [R]."""
        if self.experts is None:
            return self.x.reshape(-1, self.x.shape[-1]), None
        x = mx.broadcast_to(self.x, (*self.experts.shape, 1, self.x.shape[-1]))
        return x.reshape(-1, self.x.shape[-1]), self.experts.reshape(-1)


class Recorder:
    """Collects readings and, where `probes` has something for a module, adds it to the module's output."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}  # shape and type of every linear's output
        self.probes: dict[str, mx.array] = {}
        self._by_id: dict[tuple[int, int], Reading] = {}

    def reset(self, probes: dict[str, mx.array] | None = None) -> None:
        """Forget all readings; the arrays that were held are let go."""
        self.readings, self.outputs, self.probes, self._by_id = [], {}, probes or {}, {}

    def saw(self, module: str, x: mx.array, experts: mx.array | None = None) -> None:
        key = (id(x), id(experts))
        reading = self._by_id.get(key)
        if reading is None:
            reading = self._by_id[key] = Reading(x, experts)
            self.readings.append(reading)
        reading.modules.append(module)

    def gave(self, module: str, y: mx.array) -> mx.array:
        self.outputs[module] = (tuple(y.shape), y.dtype)
        probe = self.probes.get(module)
        return y if probe is None else y + probe


class Tapped:
    """A linear that reports; the same calls as `Dense` and `Packed`."""

    __slots__ = ("linear", "module", "recorder")

    def __init__(self, module: str, linear: Linear, recorder: Recorder) -> None:
        self.module, self.linear, self.recorder = module, linear, recorder

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] → [..., out]"""
        self.recorder.saw(self.module, x)
        return self.recorder.gave(self.module, self.linear(x))

    def gather(self, x: mx.array, experts: mx.array, sorting: Sorting | None = None) -> mx.array:
        """[..., 1, in], experts broadcastable to [...] → [..., 1, out]"""
        self.recorder.saw(self.module, x, experts)
        return self.recorder.gave(self.module, self.linear.gather(x, experts, sorting))

    def rows(self, ids: mx.array) -> mx.array:
        """[...] → [..., in]"""
        return self.linear.rows(ids)

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes


class TappedWeights:
    """`weights` with a tap on every linear that is taken from it."""

    def __init__(self, weights: LinearSource, recorder: Recorder) -> None:
        self._weights, self._recorder = weights, recorder

    def linear(self, module: str) -> Linear:
        return Tapped(module, self._weights.linear(module), self._recorder)  # type: ignore[return-value] - the same calls

    def array(self, name: str) -> mx.array:
        return self._weights.array(name)


@dataclass(frozen=True)
class Gradients:
    """∂ℓ/∂x of a layer's input [B, T, H], ∂ℓ/∂y of every linear's output by module, and what the linears read."""

    x: mx.array
    outputs: dict[str, mx.array]
    readings: list[Reading]


def output_gradients(
    call: Callable[[mx.array], mx.array], recorder: Recorder, x: mx.array, cotangent: mx.array
) -> Gradients:
    """Run `call`, a layer whose linears report to `recorder`, forwards and backwards (lazily).

    x: the layer's input; cotangent: ∂ℓ of its output. `call` must start from an empty cache every time.
    """
    recorder.reset()
    call(x)  # for the shapes of the outputs; nothing of it is ever computed
    shapes = dict(recorder.outputs)
    names = list(shapes)

    def probed(x: mx.array, *probes: mx.array) -> mx.array:
        recorder.reset(dict(zip(names, probes, strict=True)))
        return call(x)

    zeros = [mx.zeros(shape, dtype) for shape, dtype in shapes.values()]
    _, grads = mx.vjp(probed, [x, *zeros], [cotangent])
    readings = recorder.readings
    recorder.reset()
    return Gradients(grads[0], dict(zip(names, grads[1:], strict=True)), readings)
