import sys

import pytest
import torch
from timm.scheduler import StepLRScheduler
from torch import nn

from backbones.config import ClassifierTraining
from backbones.errors import InputError
from backbones.optim import create_optimizer, warmup_cosine, warmup_multistep, warmup_poly, warmup_step
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


def test_steps_by_hand():
    rates = [warmup_step(step, 2, 4, rate=0.5) for step in range(13)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.125])
    steps = plan(epochs=9, lr=0.1, warmup_epochs=1, schedule="step", decay_epochs=2.4, decay_rate=0.97)
    rates = [rate for epoch in range(9) for rate in steps.lrs(epoch)]
    assert rates[9:] == pytest.approx([0.1 * 10 / 11] + [0.1 * 0.97 ** (step // 24) for step in range(10, 90)])


def test_steps_are_timms():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = StepLRScheduler(optimizer, decay_t=2.4, decay_rate=0.97, warmup_t=3, warmup_prefix=False)
    ours = plan(epochs=20, lr=0.1, warmup_epochs=3, schedule="step", decay_epochs=2.4, decay_rate=0.97)
    for epoch in range(3, 20):
        scheduler.step(epoch)
        assert ours.lrs(epoch)[0] == pytest.approx(optimizer.param_groups[0]["lr"])  # at an epoch's start


def test_milestones_are_torchs():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22], gamma=0.1)
    ours = plan(epochs=26, lr=0.1, warmup_epochs=0.5, schedule="multistep", milestones=(22, 16), decay_rate=0.1)
    for epoch in range(26):
        assert ours.lrs(epoch)[-1] == pytest.approx(optimizer.param_groups[0]["lr"])
        assert len({*ours.lrs(epoch)}) == (6 if epoch == 0 else 1)
        optimizer.step()
        scheduler.step()
    rates = [warmup_multistep(step, 3, [2, 4], rate=0.5) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.375, 0.5, 0.25, 0.25])  # a milestone within the warm-up


@pytest.mark.parametrize("milestones", [(), (8, 12), (0, 8), (16, 22)])
def test_milestones_lie_within_the_run(milestones):
    with pytest.raises(
        InputError, match=r"train.milestones=\[.*give epochs that lie within train.epochs=12, such as \[8\]"
    ):
        plan(epochs=12, schedule="multistep", milestones=milestones)


def test_a_single_epoch_warms_up_for_half_of_it():
    single = plan(epochs=1, lr=1, warmup_epochs=5)
    rates = single.lrs(0)
    assert rates.index(max(rates)) == 5
    assert max(rates) == 1
    assert rates[-1] < 0.2
    assert "after 0.5 epochs" in single.describe()


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


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsprop"])
@pytest.mark.parametrize("everything", [False, True])
def test_only_weights_are_decayed_unless_all_are_to_be(name, everything):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    create_optimizer(model, name, lr=0.1, momentum=0.9, weight_decay=0.5, decay_norms=everything).step()
    conv, norm = model
    assert (conv.weight < 1).all()
    assert all(((parameter < 1) == everything).all() for parameter in (conv.bias, norm.weight, norm.bias))


@pytest.mark.parametrize(("nesterov", "second"), [(False, 1 + 0.5), (True, 1 + 0.5 * (1 + 0.5))])
def test_momentum_by_hand(nesterov, second):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = create_optimizer(layer, "sgd", lr=1.0, momentum=0.5, weight_decay=0, nesterov=nesterov)
    moved = []
    for _ in range(2):
        layer.weight.grad = torch.ones(1, 1)
        before = layer.weight.item()
        optimizer.step()
        moved.append(before - layer.weight.item())
    assert moved == pytest.approx([1.5 if nesterov else 1, second])


@pytest.mark.parametrize(("name", "module"), [("lamb", "lamb"), ("rmsprop", "rmsprop_tf")])
def test_what_is_timms_names_the_extra_without_it(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, f"timm.optim.{module}", None)
    with pytest.raises(InputError, match=rf"train.optimizer={name} needs timm: pip install 'cspnet\[timm\]'"):
        create_optimizer(nn.Linear(1, 1), name, lr=0.1, momentum=0.9, weight_decay=0)


def test_rmsprop_is_tensorflows():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.full_like(layer.weight, 2.0)
    create_optimizer(layer, "rmsprop", lr=0.1, momentum=0.9, weight_decay=0).step()
    # mean square from 1, of which the gradient's takes a tenth; the small number is added under the root
    assert layer.weight.item() == pytest.approx(-0.1 * 2 / (0.9 * 1 + 0.1 * 4 + 0.001) ** 0.5)
