"""The recipe of measurements that compare networks with the paper's: `cifar` without what the paper does not have."""

from dataclasses import replace

from repvgg.train.recipes import get_recipe

PLAIN = replace(get_recipe("cifar"), ema=0.0, small_first=0.0, whiten=False, bn_bias_lr=1.0)
