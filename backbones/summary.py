"""What an evaluation is, and what came of it, in a line each; no torch here."""

from typing import Any

from backbones.config import ClassifierConfig
from backbones.preprocess import ClassifierPreprocess
from backbones.published import RELEASES


def describe(preprocess: ClassifierPreprocess) -> str:
    """A protocol in full; without it a figure is no figure."""
    mean, std = (" ".join(f"{value:g}" for value in triple) for triple in (preprocess.mean, preprocess.std))
    return f"{preprocess}, mean {mean}, std {std}"


def headline(config: ClassifierConfig) -> str:
    """What is going to be measured, in a line."""
    head = f" with a random head, as ignore_head=true asks (seed {config.seed})" if config.ignore_head else ""
    what = f"{config.model}, weights {config.weights}{head}"
    return f"{what}: {describe(config.preprocess)}, decoded by {config.data.decoder}"


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    parts = [
        f"top-1 {100 * result['top1']:.3f}  top-5 {100 * result['top5']:.3f}  "
        f"on {result['images']} images of {len(result['per_class'])} classes"
    ]
    if result.get("real") and result["real"]["top1"] is not None:
        parts.append(f"ReaL {100 * result['real']['top1']:.3f} on {result['real']['images']}")
    if result.get("skipped"):
        parts.append(f"{result['skipped']} skipped that cannot be decoded")
    parts += [
        f"published by {figure['by']} under this protocol: {100 * figure['top1']:.3f}, {100 * figure['top5']:.3f} "
        f"on {figure['images']} images"
        for figure in result.get("published", [])
    ]
    release = RELEASES.get(result.get("model", ""))
    if release and result["weights"] == "timm" and not result["published"] and not result["ignore_head"]:
        figure = release.figures[0]
        parts.append(
            f"no published figure under this protocol; {figure.by}'s is {figure.top1:.3f}, {figure.top5:.3f} "
            f"under {describe(figure.preprocess)}"
        )
    return "; ".join(parts)
