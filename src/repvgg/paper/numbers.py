"""Every number of the paper that we set beside our own: RepVGG (Ding et al., CVPR 2021), tables 1 to 8, sections 3 and 4.

Speeds are examples per second on one GTX 1080Ti: fp32, batch 128, 50 warm-up and 50 timed batches, conv+BN of the baselines folded.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSpeed:
    """Table 1: a convolution of 2048 channels to 2048 on 56x56 maps, batch 32, stride 1; average of 10 runs after warm-up.

    A multiply-add is counted twice in tflops, and once in gflops. (The 5x5 row disagrees with itself: its GFLOPs in its time make
    10.06 TFLOPS.)
    """

    kernel_size: int
    gflops: float
    milliseconds: float
    tflops: float


TABLE1 = (
    KernelSpeed(1, 420.9, 84.5, 9.96),
    KernelSpeed(3, 3788.1, 198.8, 38.10),
    KernelSpeed(5, 10522.6, 2092.5, 10.57),
    KernelSpeed(7, 20624.4, 4394.3, 9.38),
)


@dataclass(frozen=True)
class Stage:
    """Table 2: side of the output for images of 224, layers in A and in B, channels as written there."""

    output: int
    layers_a: int
    layers_b: int
    channels: str


TABLE2 = (
    Stage(112, 1, 1, "min(64, 64a)"),
    Stage(56, 2, 4, "64a"),
    Stage(28, 4, 6, "128a"),
    Stage(14, 14, 16, "256a"),
    Stage(7, 1, 1, "512b"),
)


@dataclass(frozen=True)
class Multipliers:
    """Table 3: layers of the five stages, multipliers a and b."""

    model: str
    layers: tuple[int, ...]
    a: float
    b: float


TABLE3 = (
    Multipliers("repvgg_a0", (1, 2, 4, 14, 1), 0.75, 2.5),
    Multipliers("repvgg_a1", (1, 2, 4, 14, 1), 1, 2.5),
    Multipliers("repvgg_a2", (1, 2, 4, 14, 1), 1.5, 2.75),
    Multipliers("repvgg_b0", (1, 4, 6, 16, 1), 1, 2.5),
    Multipliers("repvgg_b1", (1, 4, 6, 16, 1), 2, 4),
    Multipliers("repvgg_b2", (1, 4, 6, 16, 1), 2.5, 5),
    Multipliers("repvgg_b3", (1, 4, 6, 16, 1), 3, 5),
)


@dataclass(frozen=True)
class ModelSpeed:
    """Tables 4 and 5.

    params_m: millions in deploy form, truncated (EfficientNet-B3's 12.1896 alone is rounded); flops_b: billions of MACs, rounded;
    muls_b: billions of multiplications with Winograd F(2x2, 3x3), rounded; None where the paper prints a dash, because no
    convolution of an EfficientNet uses Winograd.
    """

    model: str
    printed: str
    top1: float
    speed: int
    params_m: float
    flops_b: float
    muls_b: float | None


# 120 epochs, simple augmentation.
TABLE4 = (
    ModelSpeed("repvgg_a0", "RepVGG-A0", 72.41, 3256, 8.30, 1.4, 0.7),
    ModelSpeed("resnet18", "ResNet-18", 71.16, 2442, 11.68, 1.8, 1.0),
    ModelSpeed("repvgg_a1", "RepVGG-A1", 74.46, 2339, 12.78, 2.4, 1.3),
    ModelSpeed("repvgg_b0", "RepVGG-B0", 75.14, 1817, 14.33, 3.1, 1.6),
    ModelSpeed("resnet34", "ResNet-34", 74.17, 1419, 21.78, 3.7, 1.8),
    ModelSpeed("repvgg_a2", "RepVGG-A2", 76.48, 1322, 25.49, 5.1, 2.7),
    ModelSpeed("repvgg_b1g4", "RepVGG-B1g4", 77.58, 868, 36.12, 7.3, 3.9),
    ModelSpeed("efficientnet_b0", "EfficientNet-B0", 75.11, 829, 5.26, 0.4, None),
    ModelSpeed("repvgg_b1g2", "RepVGG-B1g2", 77.78, 792, 41.36, 8.8, 4.6),
    ModelSpeed("resnet50", "ResNet-50", 76.31, 719, 25.53, 3.9, 2.8),
    ModelSpeed("repvgg_b1", "RepVGG-B1", 78.37, 685, 51.82, 11.8, 5.9),
    ModelSpeed("regnetx_032", "RegNetX-3.2GF", 77.98, 671, 15.26, 3.2, 2.9),
    ModelSpeed("repvgg_b2g4", "RepVGG-B2g4", 78.50, 581, 55.77, 11.3, 6.0),
    ModelSpeed("resnext50_32x4d", "ResNeXt-50", 77.46, 484, 24.99, 4.2, 4.1),
    ModelSpeed("repvgg_b2", "RepVGG-B2", 78.78, 460, 80.31, 18.4, 9.1),
    ModelSpeed("resnet101", "ResNet-101", 77.21, 430, 44.49, 7.6, 5.5),
    ModelSpeed("vgg16_bn", "VGG-16", 72.21, 415, 138.35, 15.5, 6.9),
    ModelSpeed("resnet152", "ResNet-152", 77.78, 297, 60.11, 11.3, 8.1),
    ModelSpeed("resnext101_32x4d", "ResNeXt-101", 78.42, 295, 44.10, 8.0, 7.9),
)

# 200 epochs, AutoAugment, label smoothing and mixup.
TABLE5 = (
    ModelSpeed("repvgg_b2g4", "RepVGG-B2g4", 79.38, 581, 55.77, 11.3, 6.0),
    ModelSpeed("repvgg_b3g4", "RepVGG-B3g4", 80.21, 464, 75.62, 16.1, 8.4),
    ModelSpeed("repvgg_b3", "RepVGG-B3", 80.52, 363, 110.96, 26.2, 12.9),
    ModelSpeed("regnetx_120", "RegNetX-12GF", 80.55, 277, 46.05, 12.1, 10.9),
    ModelSpeed("efficientnet_b3", "EfficientNet-B3", 79.31, 224, 12.19, 1.8, None),
)

# What "a 3x3 of stride 1 counts 4/9" gives, in billions, where the paper prints something else: it took for Winograd only what was
# significantly faster than a counterpart of stride 2 (footnote 3), and some grouped convolutions of these three were not.
MULS_BY_RULE = {"resnext101_32x4d": 7.73, "regnetx_032": 2.63, "regnetx_120": 9.92}


@dataclass(frozen=True)
class Headline:
    """The paper's claims in words: `fast` runs at `ratio` times the speed of `slow`."""

    fast: str
    slow: str
    ratio: float


HEADLINES = (
    Headline("repvgg_a0", "resnet18", 1.33),
    Headline("repvgg_a1", "resnet34", 1.64),
    Headline("repvgg_a2", "resnet50", 1.83),
    Headline("repvgg_a2", "efficientnet_b0", 1.59),
    Headline("repvgg_b1g4", "resnet101", 2.01),
    Headline("repvgg_b1g2", "resnet152", 2.66),
    Headline("repvgg_b2", "vgg16_bn", 1.10),
    Headline("repvgg_b3", "regnetx_120", 1.31),
)


@dataclass(frozen=True)
class Branching:
    """Table 6: RepVGG-B0 without some of its branches; `speed` is that of the training form. `block` as create_model takes it."""

    block: str
    identity: bool
    pointwise: bool
    top1: float
    speed: int


TABLE6 = (
    Branching("plain", False, False, 72.39, 1810),
    Branching("no_1x1", True, False, 74.79, 1569),
    Branching("no_identity", False, True, 73.15, 1230),
    Branching("repvgg", True, True, 75.14, 1061),
)


@dataclass(frozen=True)
class Variant:
    """Table 7: other ways to build and train RepVGG-B0. `model` and `block` as create_model takes them."""

    model: str
    block: str
    printed: str
    top1: float


TABLE7 = (
    Variant("repvgg_b0", "identity_no_bn", "Identity w/o BN", 74.18),
    Variant("repvgg_b0", "post_bn", "Post-addition BN", 73.52),
    Variant("repvgg_b0", "repvgg", "Full-featured reparam", 75.14),
    Variant("repvgg_b0", "relu_in_branch", "+ReLU in branch", 75.69),
    Variant("repvgg_b0", "dirac", "DiracNet", 73.97),
    Variant("repvgg_b0", "trivial", "Trivial Reparam", 73.51),
    Variant("repvgg_b0", "acb", "ACB", 73.58),
    Variant("repvgg_b0_residual", "plain", "Residual Reorg", 74.56),
)

# Top-1 of ResNet-50 with RepVGG blocks in place of its 3x3 convolutions, and as it is.
RESNET50_WITH_BLOCKS, RESNET50 = 76.34, 76.31


@dataclass(frozen=True)
class SegmentationRow:
    """Table 8: PSPNet on Cityscapes val, 713x713. speed: examples per second at batch 16."""

    model: str
    printed: str
    miou: float
    pixel_accuracy: float
    speed: float


TABLE8 = (
    SegmentationRow("pspnet_repvgg_b1g2_fast", "RepVGG-B1g2-fast", 78.88, 96.19, 10.9),
    SegmentationRow("pspnet_resnet50", "ResNet-50", 77.17, 95.99, 10.4),
    SegmentationRow("pspnet_repvgg_b1g2", "RepVGG-B1g2", 78.70, 96.27, 8.0),
    SegmentationRow("pspnet_repvgg_b2_fast", "RepVGG-B2-fast", 79.52, 96.36, 6.9),
    SegmentationRow("pspnet_resnet101", "ResNet-101", 78.51, 96.30, 6.7),
    SegmentationRow("pspnet_repvgg_b2", "RepVGG-B2", 80.57, 96.50, 4.5),
)

# Section 3.1: fragmented operators (single convolutions or poolings) in one building block, fewest and most.
FRAGMENTS = {"NASNet-A": (13, 13), "ResNet": (2, 3), "RepVGG": (1, 1)}

# Figure 3: activation memory that a block keeps at its peak, in multiples of its input.
PEAK_ACTIVATION = {"residual": 2, "plain": 1}
