"""What detectors and segmenters ask of a backbone, on a variant of every family."""

import copy
from dataclasses import replace

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth

from backbones.cspnet import LEVELS, create_model
from backbones.dense import DenseVariant
from backbones.errors import InputError
from backbones.variants import VARIANTS

FAMILIES = [
    "cspresnet50", "cspresnet50_plain", "cspresnet50d", "cspresnext50", "cspdarknet50", "cspdarknet50_plain",
    "sedarknet21", "darknetaa53", "cs3darknet_l", "cs3darknet_l_plain", "cs3darknet_focus_l", "cs3sedarknet_l",
    "cs3sedarknet_xdw", "cs3edgenet_x", "cspresnet10_paper", "cspresnet10_paper_plain", "cspresnet50_paper",
    "cspdensenet201_elastic", "cspdensenet201_elastic_plain", "csppeleenet", "csppeleenet_plain",
]  # fmt: skip
SIZE = (64, 96)


def small(variant):
    """The same structure, shallow and a quarter as wide."""
    plain = small(variant.plain) if variant.plain else None
    if isinstance(variant, DenseVariant):
        return replace(variant, depths=(2, 2, 2, 2), growth=8, plain=plain)
    groups = variant.groups if isinstance(variant.groups, tuple) else (variant.groups,) * len(variant.depths)
    return replace(
        variant,
        stem=replace(variant.stem, channels=tuple(c // 4 for c in variant.stem.channels)),
        channels=tuple(c // 4 for c in variant.channels),
        depths=tuple(min(depth, 2) for depth in variant.depths),
        groups=tuple(max(1, n // 4) for n in groups),
        plain=plain,
    )


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name in {name.removesuffix("_plain") for name in FAMILIES}:
        monkeypatch.setitem(VARIANTS, name, small(VARIANTS[name]))


def build(name, **options):
    """A network of which every layer matters: fresh blocks are the identity."""
    torch.manual_seed(0)
    model = create_model(name, **{"num_classes": 3} | options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_features_have_the_stated_channels_and_strides(name, images):
    model = build(name, levels=LEVELS).eval()
    features = model.forward_features(images)
    assert list(features) == list(model.channels) == list(model.strides) == list(LEVELS)
    assert list(model.strides.values()) == [2, 4, 8, 16, 32]
    for level, feature in features.items():
        stride = model.strides[level]
        assert feature.shape == (2, model.channels[level], SIZE[0] // stride, SIZE[1] // stride)
    # One class gives both: the logits are the head on the last map.
    torch.testing.assert_close(model(images), model.head(features["c5"]))
    assert model(images).shape == (2, 3)
    assert list(create_model(name).channels) == ["c2", "c3", "c4", "c5"]


@pytest.mark.parametrize("levels", [("c4", "c1"), ("c1",)])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_subset_of_levels_builds_and_loads_no_more_than_it_needs(name, levels, images, tmp_path):
    whole = build(name, levels=LEVELS).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    part = create_model(name, 0, tmp_path / "weights.pt", levels=levels).eval()
    assert list(part.channels) == sorted(levels)
    highest = max(levels)
    assert len(part.stages) == sum(stride <= whole.strides[highest] for stride in stage_strides(whole))
    expected = whole.forward_features(images)
    for level, feature in part.forward_features(images).items():
        torch.testing.assert_close(feature, expected[level])


def stage_strides(model):
    stride = model.variant.stem_stride
    return [stride := stride * own for own in model.variant.strides]


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_dilation_computes_what_strides_would_and_more(name, output_stride, images):
    """Every second cell of a dilated map is the strided map's (à trous), unless something averages over cells."""
    strided, dilated = build(name).eval(), build(name, output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    assert dilated.strides == {level: min(stride, output_stride) for level, stride in strided.strides.items()}
    expected, features = strided.forward_features(images), dilated.forward_features(images)
    pools = any(isinstance(m, torch.nn.AvgPool2d | SqueezeExcitation) for m in strided.modules())
    for level, feature in features.items():
        assert feature.shape[2:] == (SIZE[0] // dilated.strides[level], SIZE[1] // dilated.strides[level])
        # timm dilates the strided convolution itself only from the second such stage on.
        every = strided.strides[level] // dilated.strides[level]
        if every <= 2 and not pools:
            spread = expected[level].max() - expected[level].min()
            assert (feature[:, :, ::every, ::every] - expected[level]).abs().max() < 1e-4 * spread


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_stages_do_not_change(name, images):
    model = build(name, levels=LEVELS, frozen="c3")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    frozen_stages = len(model.stages) - 2
    assert not any(key.startswith("stem.") for key in changed)
    stages = {int(key.split(".")[1]) for key in changed if key.startswith("stages.")}
    assert stages == set(range(frozen_stages, len(model.stages)))
    assert "head.fc.weight" in changed


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_frozen_and_synchronised_batchnorm_keep_the_logits(name, images, tmp_path):
    reference = build(name)
    reference(images)  # running statistics of their own
    torch.save(reference.state_dict(), tmp_path / "weights.pt")
    expected = reference.eval()(images)
    frozen = create_model(name, 3, tmp_path / "weights.pt", batchnorm="frozen").train()
    torch.testing.assert_close(frozen(images), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in frozen.modules())
    synced = create_model(name, 3, tmp_path / "weights.pt", batchnorm="sync").eval()
    torch.testing.assert_close(synced(images), expected)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synced.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_gives_the_same_gradients_and_statistics(name, images):
    plain, saving = (build(name, drop_path=0.5, checkpointing=on) for on in (False, True))
    for model in (plain, saving):
        torch.manual_seed(0)
        model(images).square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, key=key: f"{key}: {text}")
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[key], value)


def kept_bytes(model, images):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model(images)
    return sum(t.nbytes for t in kept.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_keeps_less(name, images):
    assert kept_bytes(build(name, checkpointing=True), images) < 0.9 * kept_bytes(build(name), images)


STRUCTURES = [  # one of each kind of code
    "cspresnet50", "cspresnet50_plain", "cspdarknet50", "sedarknet21", "cs3darknet_l", "cspresnet10_paper",
    "cspdensenet201_elastic", "csppeleenet",
]  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_compiles_in_one_graph(name, images):
    torch._dynamo.reset()
    model = build(name).eval()
    with torch.inference_mode():
        for call in (model.forward, model.forward_features):
            torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(images), call(images))


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_channels_last_and_half_precision(name, images):
    model = build(name).train()
    model(images)  # running statistics that fit the weights
    model.eval()
    expected = model(images)
    spread = expected.max() - expected.min()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    features = last.forward_features(images.contiguous(memory_format=torch.channels_last))
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features.values())
    assert (last(images) - expected).abs().max() < 1e-4 * spread
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = copy.deepcopy(model).to(dtype)(images.to(dtype))
        assert half.dtype == dtype
        assert (half - expected).abs().max() < tolerance * spread


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_path_drops_in_training_alone(name, images):
    model = build(name, drop_path=0.9)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), build(name).eval()(images))
        model.train()
        assert not torch.equal(model(images), model(images))
    rates = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    blocks = sum(model.variant.depths)
    assert rates == pytest.approx([0.9 * i / (blocks - 1) for i in range(1, blocks)])  # of the first it is 0


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_parameter(name, images):
    model = build(name)
    model(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.slow
def test_training_with_checkpointing_compiles_in_one_graph(images):
    torch._dynamo.reset()
    reference, saving = build("cspresnet50"), build("cspresnet50", checkpointing=True)
    compiled = torch.compile(saving, fullgraph=True, backend="aot_eager")
    for model in (reference, compiled):
        model(images).square().sum().backward()
    for (key, a), b in zip(reference.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, key=key: f"{key}: {text}")
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[key], value)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="frozen=c4 is above"):
        create_model("cspresnet50", 0, levels=("c2",), frozen="c4")
    with pytest.raises(InputError, match="unknown batchnorm 'forzen': did you mean 'frozen'"):
        create_model("cspresnet50", 0, batchnorm="forzen")
    with pytest.raises(InputError, match="c6"):
        create_model("cspresnet10", 0, levels=("c6",))
    with pytest.raises(InputError, match="output_stride=4"):
        create_model("cspresnet10", 0, output_stride=4)
