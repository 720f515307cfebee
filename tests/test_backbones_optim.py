import sys

import pytest
import torch
from torch import nn

from backbones.config import ClassifierTraining
from backbones.errors import InputError
from backbones.optim import create_optimizer, warmup_cosine, warmup_poly
from backbones.plan import Plan


def plan(images: int = 100, batch: int = 10, **settings) -> Plan:
    return Plan(ClassifierTraining(**settings), images, batch, seed=0)


def test_cosine_by_hand():
    rates = [warmup_cosine(step, 12, 3) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1]
    assert rates[6] == pytest.approx(0.75)  # a third of the way: (1 + cos 60°) / 2
    assert rates[9] == pytest.approx(0.25)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_poly_by_hand():
    assert [warmup_poly(step, 12, 2, power=4) for step in (0, 1, 2, 7)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5**4])
    assert warmup_poly(7, 12, 2, power=1) == pytest.approx(0.5)


def test_a_plan_runs_through_the_whole_schedule():
    rates = [
        rate
        for epoch in range(3)
        for rate in plan(epochs=3, lr=0.5, warmup_epochs=0.5, schedule="poly", poly_power=2).lrs(epoch)
    ]
    assert len(rates) == 30
    assert rates[5] == 0.5
    assert rates[29] == pytest.approx(0.5 * (1 / 25) ** 2)


def test_the_learning_rate_is_scaled_to_the_images_of_a_step():
    assert plan(lr=0.1).lr == 0.1
    scaled = plan(lr=0.1, lr_batch=80, accumulate=4)
    assert scaled.lr == pytest.approx(0.1 * 40 / 80)
    assert "learning rate 0.05 = 0.1 x 40 / 80" in scaled.describe()


def test_an_epoch_takes_no_image_twice_and_says_what_it_leaves_out():
    small = plan(images=47, batch=5, accumulate=2)
    first, second = small.order(0), small.order(1)
    assert len(first) == len(set(first)) == 40
    assert set(first) < set(range(47))
    assert first != second
    assert "4 steps" in small.describe()
    assert "left out of each epoch: 7" in small.describe()
    with pytest.raises(InputError, match="9 images to train on are fewer than a step's 10"):
        plan(images=9)


def test_a_step_is_of_the_same_images_however_it_is_divided(monkeypatch):
    whole = plan(images=50, batch=12).order(3)
    assert plan(images=50, batch=3, accumulate=4).order(3) == whole
    parts = []
    monkeypatch.setattr("backbones.plan.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("backbones.plan.rank", lambda rank=rank: rank)
        parts.append(plan(images=50, batch=3, accumulate=2).order(3))
    for step in range(4):
        half = slice(6 * step, 6 * step + 6)
        assert {*parts[0][half], *parts[1][half]} == set(whole[12 * step : 12 * step + 12])
        assert not {*parts[0][half]} & {*parts[1][half]}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_only_weights_are_decayed(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    create_optimizer(model, name, lr=0.1, momentum=0.9, weight_decay=0.5).step()
    conv, norm = model
    assert (conv.weight < 1).all()
    assert all((parameter == 1).all() for parameter in (conv.bias, norm.weight, norm.bias))


def test_lamb_without_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim.lamb", None)
    with pytest.raises(InputError, match=r"pip install 'cspnet\[lamb\]'"):
        create_optimizer(nn.Linear(1, 1), "lamb", lr=0.1, momentum=0.9, weight_decay=0)
