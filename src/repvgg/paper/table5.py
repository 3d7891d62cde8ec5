"""Table 5: the heavier models, trained for 200 epochs with AutoAugment, label smoothing and mixup."""

from repvgg.paper.numbers import TABLE5
from repvgg.paper.result import PaperSettings, Result
from repvgg.paper.table4 import speed_tables


def run(settings: PaperSettings) -> Result:
    why = (
        "These are wide networks: most of their time goes into multiplications, so that the differences between them are "
        "mostly those of the libraries. RegNetX-12GF puts its multiply-adds into 1x1 and grouped 3x3 convolutions, B3 into "
        "dense 3x3 ones, more than twice as many; it is the faster of the two only where Winograd or the grouped "
        "convolutions' low rate makes up for that. EfficientNet-B3, on images of 300 pixels, has few multiply-adds, most of "
        "them in depthwise convolutions whose cost is memory access. B3g4 against B3 shows what groups give back of the "
        "multiply-adds they save."
    )
    return speed_tables("Table 5: models trained for 200 epochs", TABLE5, why, settings)
