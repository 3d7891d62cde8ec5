"""What a layer costs, counted: multiplications, and a guess at the time of each algorithm that leaves out the hopeless ones."""

from collections.abc import Sequence

from repvgg_engine.layers import Conv, Layer, MaxPool, Pool

Size = tuple[int, int]

# In multiplications of the micro-kernel: moving one number in a tile's transforms, and reading one weight from memory. Both grow
# with the width of the vectors, for memory does not get faster with them. Guesses: what they rank close together is measured.
TRANSFORM = {"avx512": 24.0, "avx2": 14.0, "portable": 8.0}
WEIGHT = {"avx512": 16.0, "avx2": 8.0, "portable": 3.0}
# By precision, times float32's: a multiplication, moving a number (integers are rounded after the transform), reading a weight.
PRECISION = {"": (1.0, 1.0, 1.0), "bf16": (0.5, 1.0, 0.5), "int16": (0.5, 1.8, 0.5), "int8": (0.25, 1.6, 0.25)}


def output_size(layer: Layer, size: Size) -> Size:
    """Return the height and width of what a layer makes of a map of that size."""
    if isinstance(layer, Pool):
        return 1, 1
    if not isinstance(layer, Conv | MaxPool):
        return size
    kernel, dilation = (layer.weight.shape[2:], layer.dilation) if isinstance(layer, Conv) else (layer.kernel, (1, 1))
    pairs = zip(size, kernel, layer.stride, layer.padding, dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in pairs)
    return height, width


def macs(layers: Sequence[Layer], size: Size) -> int:
    """Return the multiply-adds of one image."""
    total = 0
    for layer in layers:
        size = output_size(layer, size)
        if isinstance(layer, Conv):
            total += layer.weight.size * size[0] * size[1]
    return total


def estimated_cost(layer: Conv, size: Size, algorithm: str, images: int, isa: str) -> float:
    """Return a guess at the time of a layer for so many images, in multiplications of the micro-kernel."""
    rows, columns = output_size(layer, size)
    name, _, precision = algorithm.partition(" ")
    multiply, move, read = PRECISION[precision]
    if name == "direct":
        return multiply * images * layer.weight.size * rows * columns + read * WEIGHT[isa] * layer.weight.size
    outputs, stride = int(name[1:]), layer.stride[0]
    products = (outputs + 2 if stride == 1 else 2 * outputs + 1) ** 2
    tiles = ceil_div(rows, outputs) * ceil_div(columns, outputs)
    kernels = layer.weight.size // 9
    moved = layer.in_channels + layer.out_channels
    work = multiply * kernels + move * TRANSFORM[isa] * moved
    return images * tiles * products * work + read * WEIGHT[isa] * kernels * products


def ceil_div(n: int, of: int) -> int:
    """Return how many times `of` fits n, rounded up."""
    return -(-n // of)
