"""A small engine for RepVGGs in deploy form on CPUs, without PyTorch.

import repvgg_engine
net = repvgg_engine.load("a0.safetensors")
logits = net(images)                      # float32 [N, 3, H, W] -> float32 [N, classes]
"""

from repvgg_engine.library import EngineError as EngineError
from repvgg_engine.library import instruction_sets as instruction_sets
from repvgg_engine.loader import load as load
from repvgg_engine.loader import plan as plan
from repvgg_engine.net import Net as Net
from repvgg_engine.plans import Plan as Plan

__version__ = "0.1.0"
__all__ = ["EngineError", "Net", "Plan", "instruction_sets", "load", "plan"]
