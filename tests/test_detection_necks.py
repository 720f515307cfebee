import itertools

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from detection.config import LEVELS
from detection.families import FAMILIES
from detection.models import create_detector
from detection.necks import EXTRA_LEVELS, BackboneWithNeck, ExactFusion, ResNet50

CHOICES = [
    (LEVELS[first:last], extra)
    for first, last in itertools.combinations(range(5), 2)
    for extra in EXTRA_LEVELS
]  # fmt: skip


class Maps(nn.Module):
    """A backbone without weights."""

    def __init__(self):
        super().__init__()
        self.channels = dict.fromkeys(LEVELS, 8)
        self.strides = {level: 4 << i for i, level in enumerate(LEVELS)}

    def forward_features(self, x):
        return {
            level: x.new_zeros(len(x), 8, *(side // s for side in x.shape[2:])) for level, s in self.strides.items()
        }


@pytest.mark.parametrize("family", ["fasterrcnn", "maskrcnn", "retinanet", "fcos"])
def test_anchors_and_pooling_follow_any_levels(family):
    for levels, extra in CHOICES:
        with torch.device("meta"):
            model = FAMILIES[family].build(BackboneWithNeck(Maps(), levels, 64, extra), 4, False, {})
            maps = model.backbone(torch.empty(1, 3, 256, 384))
        strides = [4 << i for i in range(LEVELS.index(levels[0]), LEVELS.index(levels[-1]) + 1 + EXTRA_LEVELS[extra])]
        assert model.backbone.strides == strides
        assert [256 // m.shape[2] for m in maps.values()] == [384 // m.shape[3] for m in maps.values()] == strides
        two_stage = isinstance(model, FasterRCNN)
        generator = (model.rpn if two_stage else model).anchor_generator
        features = [torch.zeros(m.shape) for m in maps.values()]
        (anchors,) = generator(ImageList(torch.zeros(1, 3, 256, 384), [(256, 384)]), features)
        a = {"retinanet": 9, "fcos": 1}.get(family, 3)
        assert len(anchors) == sum(a * (256 // s) * (384 // s) for s in strides)
        scale = {"retinanet": 4, "fcos": 1}.get(family, 8)
        assert [sizes[0] for sizes in generator.sizes] == [scale * s for s in strides]
        if two_stage:
            heads = model.roi_heads
            for pool in [heads.box_roi_pool, *([heads.mask_roi_pool] if family == "maskrcnn" else [])]:
                assert pool.featmap_names == list(levels)
                assert pool.scales == [1 / s for s in strides[: len(levels)]]
                sides = 56.0 * torch.tensor([1, 2, 4, 8])  # of regions that belong to c2, c3, c4 and c5
                regions = torch.stack((sides * 0, sides * 0, sides, sides), 1)
                wanted = [min(max(i, 0), len(levels) - 1) for i in range(-LEVELS.index(levels[0]), 4)][:4]
                assert pool.map_levels([regions]).tolist() == wanted


def test_backbone_stops_at_the_highest_level():
    for name in ("fcos_cspresnet10_fpn", "fcos_resnet50_fpn"):
        with torch.device("meta"):
            whole, short = (create_detector(name, 4, levels=levels) for levels in (("c3", "c4", "c5"), ("c3", "c4")))
            assert list(short.backbone(torch.empty(1, 3, 128, 128))) == ["c3", "c4", "p6", "p7"]
        assert len(list(short.backbone.body.parameters())) < len(list(whole.backbone.body.parameters()))


@pytest.mark.parametrize("frozen", ["stem", "c2", "c4"])
def test_resnet50_keeps_what_is_frozen(frozen):
    with torch.device("meta"):
        body = ResNet50(LEVELS, frozen).train()
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    still = children[: {"stem": 4, "c2": 5, "c4": 7}[frozen]]
    for child, module in body.items():
        assert all(m.training != (child in still) for m in module.modules())
        assert all(p.requires_grad != (child in still) for p in module.parameters())


def test_exact_fusion_sees_each_level_and_its_neighbours_alone():
    neck = ExactFusion([8, 16, 24, 32], 32)
    sizes = [(37, 50), (19, 25), (10, 13), (5, 7)]  # rounded up, as strided convolutions do
    maps = {f"c{i + 2}": torch.randn(2, 8 * (i + 1), *size, requires_grad=True) for i, size in enumerate(sizes)}
    outputs = neck(maps)
    assert {level: tuple(x.shape) for level, x in outputs.items()} == {
        f"c{i + 2}": (2, 32, *size) for i, size in enumerate(sizes)
    }
    for i, output in enumerate(outputs.values()):
        grads = torch.autograd.grad(output.sum(), list(maps.values()), retain_graph=True, allow_unused=True)
        assert [grad is not None for grad in grads] == [abs(i - j) <= 1 for j in range(4)]


def test_exact_fusion_by_hand():
    """Maxout of x and -x is |x|; a region's largest of the finer level, the own value, and the coarser one's."""
    neck = ExactFusion([1, 1, 1], 1)
    with torch.no_grad():
        for module in neck.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.fill_(1.0) if module.kernel_size == (1, 1) else module.weight.zero_()
        for pieces, block in zip(neck.pieces, neck.layer_blocks, strict=True):
            pieces[0].weight[1] = -1.0
            block[0].weight[..., 1, 1] = 1.0  # the middle of 3x3
        fine = torch.zeros(1, 1, 4, 4)
        fine[0, 0, 3, 3] = -100.0
        own, coarse = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]]]]), torch.tensor([[[[-10.0]]]])
        result = neck({"c2": fine, "c3": own, "c4": coarse})["c3"]
    assert result.tolist() == [[[[11.0, 12.0], [13.0, 114.0]]]]
