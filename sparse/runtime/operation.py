"""The unit of execution: one operation of the kernels, with its layer and its values."""

from dataclasses import dataclass, field

from . import bindings
from .arrays import Array
from .layout import Map, Value, Vector
from .lower import Layer
from .windows import Windows


@dataclass(kw_only=True, eq=False)
class Operation:
    """One operation of the kernels, the values that it reads and the value that it writes."""

    kind: int
    """One of the constants of bindings.py, such as `SPARSE_CONV`."""
    source: Value | None
    """The value that is read; None for the image that the caller passes."""
    target: Value | None
    """The value that is written; None for the memory of the logits."""
    residual: Map | None = None
    """The value that is added before the activation."""
    factor: Vector | None = None
    """The vector that multiplies the channels of the source."""
    layer: Layer | None = None
    stride: tuple[int, int] = (1, 1)
    op: bindings.Op = field(default_factory=bindings.Op)
    """What the kernels receive."""
    tables: list[Array] = field(default_factory=list)
    """The arrays to which the pointers of `op` point."""

    def windows(self) -> Windows:
        """Return the windows of an attention."""
        layer, source = self.layer, self.source
        assert layer is not None
        assert isinstance(source, Map)
        size = source.height, source.width
        return Windows(size, layer.window if max(layer.window) else size, layer.shift, layer.spread)

    def num_connections(self) -> int:
        """Return the multiply-accumulates of one image whose weight is not zero."""
        pixels = self.target.height * self.target.width if isinstance(self.target, Map) else 1
        return self.layer.num_active * pixels if self.layer is not None else 0

    def vector_work(self) -> int:
        """Return the multiply-adds of vectors of one image."""
        target = self.target
        vectors = target.rows * target.vectors if isinstance(target, Map) else 1
        return self.layer.num_active * vectors if self.layer is not None else 0

    def inputs(self) -> list[Value]:
        """Return the values that the operation reads."""
        values = (self.source, self.residual, self.factor)
        return [value for value in values if value is not None]

    def maps(self) -> list[Map]:
        """Return the maps that the operation reads and writes."""
        return [value for value in (*self.inputs(), self.target) if isinstance(value, Map)]

    def num_rows(self) -> int:
        """Return the rows of the output, or its channels if the output has no rows.

        An attention has the windows of all heads instead. A norm, a lookup or a quantization of a
        vector is one whole.
        """
        if self.kind in (bindings.VECTOR_NORM, bindings.QUANTIZE_VECTOR):
            return 1
        if self.kind == bindings.ATTENTION:
            assert self.layer is not None
            return self.layer.heads * len(self.windows())
        if isinstance(self.target, Map):
            return self.target.rows
        if self.kind == bindings.QUANT_LOOKUP:
            return 1
        if self.kind == bindings.QUANT_LINEAR:
            assert self.layer is not None
            assert self.layer.weight is not None
            return len(self.layer.weight)
        if self.layer is not None:
            return self.layer.channels
        assert isinstance(self.source, Map)
        return self.source.rows

    def start(self) -> tuple[int, int]:
        """Return the first row and column that a repacking takes."""
        return (0, 0) if self.layer is None else self.layer.start

    def moves_whole(self) -> bool:
        """Tell whether a repacking copies whole vectors, instead of single pixels."""
        source, target = self.source, self.target
        if not (isinstance(source, Map) and isinstance(target, Map)):
            return False
        start, sizes = self.start(), ((source.height, target.height), (source.width, target.width))
        for (size, taken), first, step in zip(sizes, start, self.stride, strict=True):
            # A lane outside the target must be one outside the source.
            if first >= step or taken != -(-(size - first) // step):
                return False
        return source.grid.fits(target.grid.scaled(self.stride))
