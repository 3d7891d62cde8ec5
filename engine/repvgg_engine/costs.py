"""What a layer costs, counted: multiplications, and a guess at the time of each algorithm that leaves out the hopeless ones."""

from collections.abc import Sequence

from repvgg_engine.layers import Conv, Layer

Size = tuple[int, int]

# In multiplications of the micro-kernel: moving one number in a tile's transforms, and reading one weight from memory. Both grow
# with the width of the vectors, for memory does not get faster with them. Guesses: what they rank close together is measured.
TRANSFORM = {"avx512": 24.0, "avx2": 14.0, "portable": 8.0}
WEIGHT = {"avx512": 16.0, "avx2": 8.0, "portable": 3.0}


def output_size(layer: Conv, size: Size) -> Size:
    """Return the height and width of what a convolution makes of a map of that size."""
    pairs = zip(size, layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in pairs)
    return height, width


def macs(layers: Sequence[Layer], size: Size) -> int:
    """Return the multiply-adds of one image."""
    total = 0
    for layer in layers:
        if isinstance(layer, Conv):
            size = output_size(layer, size) if min(size) > 1 else size
            total += layer.weight.size * size[0] * size[1]
    return total


def estimated_cost(layer: Conv, size: Size, algorithm: str, images: int, isa: str) -> float:
    """Return a guess at the time of a layer for so many images, in multiplications of the micro-kernel."""
    rows, columns = output_size(layer, size)
    name = algorithm.split()[0]
    if name == "direct":
        return images * layer.weight.size * rows * columns + WEIGHT[isa] * layer.weight.size
    outputs, stride = int(name[1:]), layer.stride[0]
    products = (outputs + 2 if stride == 1 else 2 * outputs + 1) ** 2
    tiles = ceil_div(rows, outputs) * ceil_div(columns, outputs)
    kernels = layer.weight.size // 9
    moved = layer.in_channels + layer.out_channels
    return images * tiles * products * (kernels + TRANSFORM[isa] * moved) + WEIGHT[isa] * kernels * products


def ceil_div(n: int, of: int) -> int:
    """Return how many times `of` fits n, rounded up."""
    return -(-n // of)
