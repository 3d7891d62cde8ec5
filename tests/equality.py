"""What each process of test_distributed.py does: steps of 13 images in float64 with still batch norms; it leaves its weights.

torchrun --nproc-per-node 2 tests/equality.py FOLDER
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from repvgg.data import open_source
from repvgg.data.transforms import normalise
from repvgg.train.batches import Feed
from repvgg.train.distributed import joined
from repvgg.train.evaluate import batches, evaluate
from repvgg.train.loop import new_model
from repvgg.train.recipes import Recipe
from repvgg.train.trainer import Trainer

RECIPE = Recipe(batch_size=13, crop="shift", flip=False, precision="fp64", freeze_bn=True, accumulate=2, ema=0.9, erasing=0.2)


def main(out: Path) -> None:
    with joined("cpu") as world:
        source = open_source("digits").limited(241)
        torch.manual_seed(0)
        trainer = Trainer(new_model("repvgg_micro", source, log=str, width=0.25), RECIPE, 10, world=world)
        feed = Feed(source, RECIPE, world=world)
        trainer.train()
        data = feed.epoch(0)
        for step in range(feed.steps):
            parts = [(normalise(x, source.preprocessing), y) for x, y in (next(data), next(data))]
            trainer.step(parts, 0.02, step, feed.batch_size)
        trainer.settle()
        share = batches(source.val, source.preprocessing, 16, world=world)
        accuracy = evaluate(trainer.predict, share, 10, world)
        found = {name: t.contiguous().clone() for name, t in trainer.tensors().items() if name != "figures"}  # its own images'
        found |= {"confusion": accuracy.confusion, "loss": torch.tensor(accuracy.loss, dtype=torch.float64)}
        save_file(found, out / f"{world.rank}-of-{world.size}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
