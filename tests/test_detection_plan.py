import bisect
from itertools import pairwise

import pytest

from backbones.plan import Plan
from detection.config import DetectorTraining
from detection.plan import GroupedPlan, group_ratios

RATIOS = [0.4, 0.6, 0.75, 0.75, 1.0, 4 / 3, 4 / 3, 4 / 3, 1.5, 2.5]


def plan(ratios: list[float], batch: int, groups: int = 3, **settings) -> GroupedPlan:
    return GroupedPlan(DetectorTraining(**settings), ratios, batch, 0, groups)


def batches(order: list[int], batch: int) -> list[list[int]]:
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def test_groups_are_torchvisions():
    bounds = [2 ** (i / 3) for i in range(-3, 4)]
    assert group_ratios(RATIOS, 3) == [bisect.bisect_right(bounds, ratio) for ratio in RATIOS]
    assert group_ratios([0.49, 0.51, 0.99, 1.0, 1.99, 2.0], 1) == [0, 1, 1, 2, 2, 3]
    assert set(group_ratios(RATIOS, 0)) == {0}


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_epoch_takes_every_image_once_and_mixes_groups_only_for_the_rest(batch):
    ratios = RATIOS * 10 + [0.3]
    grouped = plan(ratios, batch)
    order = grouped.order(0)
    assert len(order) == len(set(order)) == len(ratios) // batch * batch
    assert order != grouped.order(1)
    assert order == plan(ratios, batch).order(0)
    mixed = [{grouped.groups[image] for image in images} for images in batches(order, batch)]
    assert sum(len(groups) > 1 for groups in mixed) <= len(set(grouped.groups)) * (batch - 1) / batch
    left = sorted((sorted(groups) for groups in mixed if len(groups) > 1), key=min)
    assert all(one[-1] <= other[0] for one, other in pairwise(left))  # neighbours: the rest lies side by side


def test_what_is_left_out_is_drawn_whatever_its_group():
    grouped = plan([1.4] * 18 + [0.5], batch=4, groups=1)  # 19 images, 16 of them an epoch
    out = [set(range(19)) - {*grouped.order(epoch)} for epoch in range(200)]
    rare = sum(18 in images for images in out)
    assert 10 < rare < 60  # 3 of 19 is 31.6 of 200


def test_one_group_is_no_group(monkeypatch):
    settings = DetectorTraining(accumulate=2)
    plain = Plan(settings, 40, 3, seed=0)
    for ratios, groups in (([1.5] * 40, 3), ([1.5, 0.5] * 20, 0)):
        assert GroupedPlan(settings, ratios, 3, 0, groups).order(2) == plain.order(2)


def test_processes_share_an_epochs_batches(monkeypatch):
    ratios = [0.7, 1.4, 1.4] * 15
    whole = batches(plan(ratios, 2, accumulate=4).order(5), 2)
    monkeypatch.setattr("backbones.plan.world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("backbones.plan.rank", lambda rank=rank: rank)
        parts.append(batches(plan(ratios, 2, accumulate=2).order(5), 2))
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == whole


def test_batches_of_a_rare_group_are_not_all_last():
    ratios = [1.4] * 60 + [0.5] * 2
    places = []
    for epoch in range(20):
        grouped = plan(ratios, 2, groups=1)
        places += [i for i, images in enumerate(batches(grouped.order(epoch), 2)) if {60, 61} & {*images}]
    assert min(places) < 10
    assert max(places) > 15


def test_the_plan_says_its_groups():
    assert plan(RATIOS, 2, groups=1).describe().splitlines()[-1] == "images by aspect ratio: 1, 3, 5, 1"
