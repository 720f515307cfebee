from dataclasses import replace
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.cspnet import LEVELS, CSPNet
from backbones.dense import (
    CSP_DENSENET201_ELASTIC,
    CSP_PELEENET,
    DenseLayer,
    DenseStage,
    DenseVariant,
    Elastic,
    relu,
    transition,
)

VARIANTS = {
    "csppeleenet": CSP_PELEENET,
    "csppeleenet_plain": CSP_PELEENET.plain,
    "cspdensenet201_elastic": CSP_DENSENET201_ELASTIC,
    "cspdensenet201_elastic_plain": CSP_DENSENET201_ELASTIC.plain,
}


def small(name: str, num_classes: int = 3, **options) -> CSPNet:
    return CSPNet(name, replace(VARIANTS[name], depths=(1, 1, 1, 1)), num_classes, **options)


def randomize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@cache
def cost(variant: DenseVariant) -> dict[str, float]:
    """Millions of parameters and of the convolutions' weights; BFLOPs at 224 x 224 of the convolutions and the
    classifier, and as Elastic's authors count: 2 for each number out of BatchNorm, 1 of ReLU, 4 of a 2x2 average too.
    """
    with torch.device("meta"):
        model, image = CSPNet("model", variant, 1000).eval(), torch.empty(1, 3, 224, 224)
    other = {nn.BatchNorm2d: 2, nn.ReLU: 1, nn.AvgPool2d: 4}
    extra = 0

    def count(module, _, output):
        nonlocal extra
        extra += other[type(module)] * output.numel()

    for module in model.modules():
        if type(module) in other:
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as flops:
        model(image)
    parameters = list(model.parameters())
    return {
        "params": sum(p.numel() for p in parameters) / 1e6,
        "weights": sum(p.numel() for p in parameters if p.dim() > 1) / 1e6,
        "bflops": flops.get_total_flops() / 1e9,
        "elastic_bflops": (flops.get_total_flops() + 2 * extra) / 1e9,
    }


@pytest.mark.parametrize(
    ("name", "params", "bflops"), [("csppeleenet_plain", 2.79, 1.017), ("csppeleenet", 2.83, 0.888)]
)
def test_peleenet_costs_what_was_published(name, params, bflops):
    ours = cost(VARIANTS[name])
    assert ours["params"] == pytest.approx(params, rel=0.01)
    assert ours["weights"] == pytest.approx(params, abs=0.005)  # Darknet counts these alone: equal in all digits
    assert ours["bflops"] == pytest.approx(bflops, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params", "bflops", "convolutions"),
    [("cspdensenet201_elastic_plain", 19.48, 8.77, 8.532), ("cspdensenet201_elastic", 20.17, 7.13, 6.962)],
)
def test_densenet_elastic_costs_what_was_published(name, params, bflops, convolutions):
    ours = cost(VARIANTS[name])
    assert ours["params"] == pytest.approx(params, rel=0.01)
    assert ours["elastic_bflops"] == pytest.approx(bflops, rel=0.005)
    # Convolutions alone, as all other networks are counted, are 2.7% and 2.4% below the published figures.
    assert ours["bflops"] == pytest.approx(convolutions, abs=0.0005)


@pytest.mark.parametrize(
    ("change", "published"),
    [
        ({"fusion": ("first",) * 4}, -0.26),
        ({"fusion": ("first", "last", "last", "last")}, -0.21),
        ({}, -0.13),
        ({"gamma": 0.25}, -0.03),
    ],
)
def test_fusion_and_gamma_save_what_the_paper_says(change, published):
    plain = cost(CSP_PELEENET.plain)["bflops"]
    assert cost(replace(CSP_PELEENET, **change))["bflops"] / plain - 1 == pytest.approx(published, abs=0.015)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(250, 190), (64, 96), (33, 47)])
@torch.inference_mode()
def test_maps_have_the_stated_channels_and_strides_at_any_size(name, size):
    model = small(name, levels=LEVELS).eval()
    features = model.forward_features(torch.randn(1, 3, *size))
    for level, stride in zip(LEVELS, (2, 4, 8, 16, 32), strict=True):
        assert model.strides[level] == stride
        height, width = (-(-side // stride) for side in size)  # rounded up
        assert features[level].shape == (1, model.channels[level], height, width)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(name, checkpointing):
    model = small(name, drop_path=0.1, checkpointing=checkpointing)
    model(torch.randn(3, 3, 64, 64)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_dilation_keeps_the_weights_and_enlarges_the_maps(name):
    strided, dilated = small(name), small(name, output_stride=8).eval()
    dilated.load_state_dict(strided.state_dict())
    features = dilated.forward_features(torch.randn(1, 3, 72, 88))
    assert [features[level].shape[-2:] for level in ("c3", "c4", "c5")] == [(9, 11)] * 3


def stage(gamma: float, cin: int = 8) -> DenseStage:
    def layer(channels: int) -> nn.Module:
        return nn.Conv2d(channels, 4, 3, padding=1)

    return DenseStage(
        cin, layer, [0.0, 0.0], growth=4, gamma=gamma, opening=nn.Sequential(), closing=nn.Sequential()
    )  # fmt: skip


@pytest.mark.parametrize(("gamma", "cross"), [(0.25, 2), (0.5, 4), (0.75, 6)])
def test_gamma_is_the_share_that_the_block_never_sees(gamma, cross):
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    out = stage(gamma)(x)
    assert out.shape == (1, 8 + 2 * 4, 5, 5)
    assert torch.equal(out[:, :cross], x[:, :cross])
    (gradient,) = torch.autograd.grad(out[:, 8:].sum(), x)  # of the new channels
    assert not gradient[:, :cross].any()
    assert all(channel.any() for channel in gradient[0, cross:])


@torch.inference_mode()
def test_gamma_zero_is_densenets_own_block():
    x, block = torch.randn(1, 8, 5, 5), stage(0.0)
    dense = x
    for layer in block.blocks:
        dense = torch.cat((dense, layer.layer(dense)), dim=1)
    assert torch.equal(block(x), dense)
    plain = replace(CSP_PELEENET, gamma=0.0, fusion=("first",) * 4, pool=("after",) * 4)
    assert cost(plain) == cost(CSP_PELEENET.plain)


@pytest.mark.parametrize("pool", ["before", "between", "after"])
@pytest.mark.parametrize(
    ("fusion", "weights", "channels"), [("first", 10 * 7, 7), ("last", 6 * 3, 4 + 3), ("both", 6 * 3 + 7 * 7, 7)]
)
@torch.inference_mode()
def test_fusion_says_which_transitions_there_are(fusion, weights, channels, pool):
    def conv(cin: int, cout: int, kernel: int) -> nn.Module:
        return nn.Conv2d(cin, cout, kernel, bias=False)

    steps = transition(4, 6, 3, 7, fusion=fusion, pool=pool, stride=2, conv=conv)
    assert sum(p.numel() for p in steps.parameters()) == weights
    x = torch.randn(1, 10, 5, 8)
    out = steps(x)
    assert out.shape == (1, channels, 3, 4)
    # A linear transition and an average change places without effect: only the cost depends on where the pool is.
    averaged = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
    unpooled = nn.Sequential(*(step for step in steps if not isinstance(step, nn.AvgPool2d)))
    torch.testing.assert_close(out, unpooled(averaged))
    assert torch.equal(unpooled(averaged)[:, :4], averaged[:, :4]) == (fusion == "last")


@torch.inference_mode()
def test_elastic_sums_a_sharp_and_a_blurred_view():
    layer = randomize(Elastic(6, growth=4, hidden=8, dilation=1, act=relu))
    layer.norm = nn.Identity()
    x = torch.randn(1, 6, 6, 10)
    detail = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(3, 5)  # averages to nothing over 2 x 2
    assert not torch.allclose(layer.high(x), layer.high(x + detail), atol=1e-3)
    blurred, with_detail = layer(x) - layer.high(x), layer(x + detail) - layer.high(x + detail)
    assert blurred.abs().max() > 0.01
    torch.testing.assert_close(blurred, with_detail, rtol=1e-4, atol=1e-5)


def test_drop_path_leaves_out_a_samples_new_channels():
    layer = DenseLayer(nn.Conv2d(3, 2, 1), drop_path=0.5).train()
    torch.manual_seed(0)
    x = torch.randn(64, 3, 2, 2)
    out = layer(x)
    assert torch.equal(out[:, :3], x)
    new = out[:, 3:]
    dropped = (new == 0).all(dim=(1, 2, 3))
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(new[~dropped], 2 * layer.layer(x[~dropped]))
    assert torch.equal(layer.eval()(x)[:, 3:], layer.layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["csppeleenet", "cspdensenet201_elastic"])
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    model = randomize(small(name))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 75, 58)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's remarks on its own internals
def test_onnx_gives_the_same_at_every_size(tmp_path):
    model = randomize(small("cspdensenet201_elastic", num_classes=0, levels=["c3"]))  # two stages are quicker
    free = {"x": {0: torch.export.Dim("N"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.zeros(2, 3, 75, 58),), path, dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=free
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((75, 58), (64, 96)):
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            expected = model(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, atol=1e-5 * np.ptp(expected))
