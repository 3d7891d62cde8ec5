"""PyTorch as it is, recorded once as a CUDA graph and replayed: no operator waits for Python, as those of small batches do."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.eager import in_precision, place

WARMUP = 3  # runs before recording: cuDNN chooses its algorithms in them


@dataclass(frozen=True)
class _Recorded:
    """A recorded network. The graph knows the weights by their addresses alone, so the network must live as long as it does."""

    network: nn.Module
    graph: torch.cuda.CUDAGraph
    taken: Tensor
    """Where the graph reads its images."""
    given: Tensor
    """Where it leaves its logits."""

    def __call__(self, images: Tensor) -> Tensor:
        self.taken.copy_(images)
        self.graph.replay()
        return self.given


def build(model: nn.Module, options: Options) -> Engine:
    """Return an engine for batches of `options.batch_size`. Raises ValueError for a device without graphs."""
    device = torch.device(options.device)
    if device.type != "cuda":
        raise ValueError(f"the engine cudagraphs runs on CUDA alone, not on {options.device}")
    network, prepare = place(model, options)
    call = in_precision(network, options)
    with torch.cuda.device(device):
        taken = prepare(torch.zeros(options.batch_size, *options.input_size))
        aside, main = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                call(taken)
        main.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given: Tensor = call(taken)
    return Engine(prepare, _Recorded(network, graph, taken, given), lambda logits: logits.float().cpu(), options.batch_size)
