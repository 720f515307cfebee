"""What an evaluation is, and what came of it, in a line each; no torch here."""

from collections.abc import Mapping
from typing import Any

from detection.config import DetectorConfig


def headline(config: DetectorConfig) -> str:
    """What is going to be measured, in a line."""
    return f"{config.model}, weights {config.weights}: {config.preprocess}"


def summary(result: Mapping[str, Any]) -> str:
    """A result in a line."""
    parts = []
    for what, values in (("", result), ("masks ", result.get("segm"))):
        if values:
            parts.append(what + "  ".join(f"{name} {values[name]:.4f}" for name in ("AP", "AP50", "AP75", "AR100")))
    parts[-1] += f"  on {result['images']} images, {result['detections']} detections"
    if result.get("foreign"):
        parts.append(f"{result['foreign']} of them of categories that the annotations do not have, left out")
    if result.get("segm", {}).get("boxes_as_masks"):
        parts.append(f"{result['segm']['boxes_as_masks']} objects without a mask have their box for one")
    known = result.get("published")
    if known:
        masks = f", of masks {known['mask_AP']:.3f}" if "mask_AP" in known else ""
        how = "resized as tensors" + ("" if known["same_settings"] else ", with other settings than these")
        parts.append(f"published by {known['by']}: AP {known['AP']:.3f}{masks} on {known['images']} images, {how}")
    return "; ".join(parts)
