"""The section on loading images and predicting whole data sets of docs/results.md, from data.json."""

from typing import Any

from layout import many, table

Record = dict[str, Any]
STAGES = ("read", "decode", "augment", "collate", "to device", "batches", "validation")


def data(r: Record) -> str:
    """Loading by stage, now and as it was first; a whole data set predicted alone and on Ray; memory; saved states."""
    said = (("photos", _photos), ("cifar10", _small), ("prediction", _predicted), ("memory", _bounded), ("state", _saved))
    return "\n\n".join(words(r[part]) for part, words in said if part in r)


def per_core(stages: Record) -> float:
    """Return the images a second that one core reads, decodes, augments and collates."""
    return 1 / sum(1.0 / float(stages[stage]) for stage in ("read", "decode", "augment", "collate") if stage in stages)


def _stages(r: Record) -> str:
    rows = [
        [f"{name}, {when}", *(f"{s[stage]:,.0f}" if stage in s else "" for stage in STAGES)]
        for name, both in r["stages"].items()
        for when, s in both.items()
    ]
    used = [i for i in range(len(STAGES)) if any(row[i + 1] for row in rows)]
    return table(["", *(STAGES[i] for i in used)], [[row[0], *(row[i + 1] for i in used)] for row in rows])


def _photos(r: Record) -> str:
    ratios = {name: per_core(both["now"]) / per_core(both["earlier"]) for name, both in r["stages"].items()}
    said = ", ".join(f"{ratio:.2f} times as many in the {name}" for name, ratio in ratios.items())
    return (
        f"Photos by the recipe light: JPEGs of 500 x 375 pixels and {r['bytes'] / 1000:.0f} kB, and of 4000 x 3000 and "
        f'{r["bytes of 12 megapixels"] / 1e6:.1f} MB. Images a second by stage, one process each; "batches" is what '
        f"{many(r['workers'], 'worker')} give together. Medians of {many(r['rounds'], 'round')}; of the 12-megapixel photos "
        "1 round. *Earlier*: Pillow decodes every pixel, in planar order. *Now*: simplejpeg decodes the same pixels to within 2 of "
        "255, interleaved. "
        "Very large photos are decoded, by Pillow, at 1/2, 1/4 or 1/8 of their size, as long as the smallest crop still has enough "
        "pixels. "
        f"All stages together, one core loads {said}.\n\n{_stages(r)}"
    )


def _small(r: Record) -> str:
    seconds = r["seconds to decode once"]
    return (
        f"CIFAR-10 by the recipe cifar, kept on the device once its {r['images']:,} images have been decoded, in {seconds:.0f} s; "
        f"earlier, one by one, without workers, which were slower.\n\n{_stages(r)}"
    )


def _predicted(r: Record) -> str:
    alone, ray = r["alone"], r["ray"]
    return (
        f"`repvgg predict` of {alone['images']:,} CIFAR-10 images by {r['model']}: {alone['steady']:,.0f} images/s alone and "
        f"{ray['steady']:,.0f} with `--ray auto` on the same cores once all have started, {r['ratio']:.2f} times as many; "
        f"{alone['whole']:,.0f} and {ray['whole']:,.0f} with starting. All processes together hold {alone['gigabytes']:.1f} and "
        f"{ray['gigabytes']:.1f} GB at most. {r['same_labels']:,} labels are the same."
    )


def _bounded(r: Record) -> str:
    return (
        f"`repvgg predict --ray auto --concurrency 1,1` of {r['images']:,} rows of 5,000 bytes, no images: {r['gigabytes']:.1f} GB "
        "at most in all processes together."
    )


def _saved(r: Record) -> str:
    waited, written = r["seconds waited"], r["seconds written"]
    return (
        f"Training of {r['model']} waits {waited:.2f} s for a state, which is written beside it in {written:.2f} s: 2% of an epoch "
        f"that takes {50 * waited:.0f} s, and less of a longer one."
    )
