"""artifacts.py's detector with masks, or with raw heads."""

from pathlib import Path

import numpy as np
from artifacts import BOXES, write_detector
from onnx import TensorProto, helper, numpy_helper

from serving.artifact import read_whole, write_artifact

SIDE = 28
# In the upper left quarter of the first box, and in the lower half of the second.
GRIDS = np.zeros((len(BOXES), SIDE, SIDE), np.float32)
GRIDS[0, : SIDE // 2, : SIDE // 2] = 0.9
GRIDS[1, SIDE // 2 :] = 0.7


def write_masks(path: Path) -> Path:
    """Answers `GRIDS` as masks, too."""
    _, model, artifact, _ = read_whole(write_detector(path))
    model.graph.initializer.append(numpy_helper.from_array(GRIDS[None], "grids"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(GRIDS.shape, np.int64), "grids_shape"))
    model.graph.node.extend(
        [
            helper.make_node("Concat", ["n", "grids_shape"], ["masks_shape"], axis=0),
            helper.make_node("Expand", ["grids", "masks_shape"], ["masks"]),  # [N, K, 28, 28]
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("masks", TensorProto.FLOAT, ["N", *GRIDS.shape]))
    write_artifact(model, artifact.model_copy(update={"masks": True}), path)
    return path


def write_raw(path: Path) -> Path:
    """Says that its outputs are raw heads."""
    _, model, artifact, _ = read_whole(write_detector(path))
    del model.graph.output[2:]
    write_artifact(model, artifact.model_copy(update={"nms": False}), path)
    return path
