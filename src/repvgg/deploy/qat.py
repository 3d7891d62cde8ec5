"""Quantization-aware training: convolutions that round as an INT8 file will. (Jacob et al., CVPR 2018.)

round_convolutions(model)        # a plain training form; then train it. Its files and its fold stay what they were
"""

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import Branches
from repvgg.models.repvgg import Layer


class RoundedConv(nn.Conv2d):
    """Computes with weights and images rounded to 8 bits; gradients pass the rounding as if it were not there.

    Weights have a scale for each output channel, which is why a batch norm that is later folded into them changes nothing; images
    have one for the whole batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(rounded(x.float()), rounded_weight(self.weight), self.bias)
        return out


def round_convolutions(model: nn.Module) -> None:
    """Let every convolution of a network in training form round. Its parameters and their names stay.

    Raises `ReparamError` for a block with branches, which an INT8 file rounds once they are folded.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Layer) and not (isinstance(layer.block, Branches) and len(layer.block._modules) == 1):
            raise ReparamError("has other branches than one convolution with batch norm: fold the model, then insert_bn", path)
    for path, conv in list(model.named_modules()):
        if type(conv) is nn.Conv2d:
            kind = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            new = RoundedConv(*kind, bias=False)  # type: ignore[arg-type]
            new.weight, new.bias = conv.weight, conv.bias
            model.set_submodule(path, new.train(conv.training))


def rounded(x: Tensor) -> Tensor:
    """Return `x` rounded to 256 levels from the smallest number (zero at most) to the largest; zero, which pads, is one of them."""
    low, high = x.detach().aminmax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = _step((high - low) / 255)
    return torch.fake_quantize_per_tensor_affine(x, step, (-low / step).round().int(), 0, 255)


def rounded_weight(weight: Tensor) -> Tensor:
    """Return a weight [out, in, kh, kw] rounded to 255 levels, zero in their middle, for each of the output channels."""
    step = _step(weight.detach().abs().amax((1, 2, 3)) / 127)
    return torch.fake_quantize_per_channel_affine(weight, step, torch.zeros_like(step, dtype=torch.int32), 0, -127, 127)


def _step(size: Tensor) -> Tensor:
    """One that can be divided by, for zeros as well."""
    return size.clamp(min=torch.finfo(size.dtype).tiny)
