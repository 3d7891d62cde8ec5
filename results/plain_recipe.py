"""The recipe of measurements that compare networks with the paper's: `cifar` without what the paper does not have."""

from dataclasses import replace

from repvgg.train.recipes import get_recipe

_USUAL = replace(get_recipe("cifar"), batch_size=128, weight_decay=5e-4, label_smoothing=0.1, shift=1 / 8, border="black")
PLAIN = replace(_USUAL, optimizer="sgd", ema=0.0, small_first=0.0, whiten=False, bn_bias_lr=1.0)
