from dataclasses import replace

import pytest
import timm
import torch

from backbones.blocks import ConvNormAct, DarkBlock, leaky_relu
from backbones.cspnet import create_model, get_variant
from backbones.errors import InputError
from backbones.published import ALIASES, PAPER, RELEASES, protocol, without_alias
from backbones.stages import Blocks, CrossStage, Resolution
from backbones.variants import VARIANTS

OURS = {"cspresnet10", "cspresnext10", "cspdarknet10"}
TIMM = [name for name in VARIANTS if name not in OURS and name not in PAPER]
EXACT = {"cspresnet50": 21_616_168, "cspresnext50": 20_569_896, "cspdarknet50": 27_642_184}
MILLIONS = {  # the model cards'
    "darknet53": 41.61, "darknetaa53": 36.02, "cs3darknet_m": 9.31, "cs3darknet_focus_m": 9.30, "cs3darknet_l": 21.16,
    "cs3darknet_focus_l": 21.15, "cs3darknet_x": 35.05, "cs3sedarknet_l": 21.91, "cs3sedarknet_x": 35.40,
    "cs3edgenet_x": 47.82, "cs3se_edgenet_x": 50.72, "cs3darknet_focus_s": 3.27,
}  # fmt: skip


def timm_name(name):
    return {ours: theirs for theirs, ours in ALIASES.items()}.get(name, name)


def randomize(model):
    """Weights and running statistics such that every layer matters; timm zeroes the last BatchNorm of a block."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_table_has_timms_whole_family():
    assert {timm_name(name) for name in TIMM} == set(timm.list_models(module="cspnet"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
@torch.inference_mode()
def test_logits_equal_timm(name):
    reference = randomize(timm.create_model(timm_name(name)))
    model = create_model(name).eval()
    model.load_state_dict(reference.state_dict())
    for size in ((224, 224), (250, 190)):
        x = torch.randn(1, 3, *size)
        expected = reference(x)
        assert (model(x) - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
    reference.load_state_dict(model.state_dict())  # and the other way


@pytest.mark.parametrize(
    "name", ["cspresnet50d", "cspdarknet50", "darknetaa53", "cs3darknet_focus_s", "cs3sedarknet_xdw"]
)
@pytest.mark.parametrize("output_stride", [8, 16])
@torch.inference_mode()
def test_dilated_logits_equal_timm(name, output_stride):
    reference = randomize(timm.create_model(timm_name(name), output_stride=output_stride))
    model = create_model(name, output_stride=output_stride).eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 64, 96)
    expected = reference(x)
    assert (model(x) - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def test_published_parameters():
    with torch.device("meta"):
        for name, count in EXACT.items():
            assert parameters(create_model(name)) == count
        for name, millions in MILLIONS.items():
            assert parameters(create_model(name)) / 1e6 == pytest.approx(millions, abs=0.005), name


def test_the_plain_twin_of_cspdarknet_is_timms_darknet53():
    with torch.device("meta"):
        twin = create_model("cspdarknet53", plain=True)
        shapes = {key: value.shape for key, value in timm.create_model("darknet53").state_dict().items()}
    assert twin.name == "cspdarknet50_plain"
    assert {key: value.shape for key, value in twin.state_dict().items()} == shapes


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("cs")])
def test_every_csp_network_has_a_plain_twin_from_the_same_blocks(name):
    with torch.device("meta"):
        csp, twin = create_model(name), create_model(name, plain=True)
    assert twin.name == f"{csp.name}_plain"
    assert csp.strides == twin.strides
    assert twin.variant.plain is None
    kinds = [{type(block) for stage in net.stages for block in stage.blocks} for net in (csp, twin)]
    assert kinds[0] == kinds[1]
    assert not any(isinstance(stage, CrossStage) for stage in twin.stages)
    # Where the one does not downsample by a convolution, nor does the other.
    extra = [i for i, stage in enumerate(twin.stages) if isinstance(getattr(stage, "conv_down", None), ConvNormAct)]
    assert all(csp.variant.strides[i] != 1 for i in extra)
    assert protocol(twin.name) == protocol(csp.name)


def test_one_convolution_and_a_split_equal_the_authors_two():
    stage = randomize(create_model("cspresnet50_paper", 2)).stages[0]
    assert (stage.cross, stage.through) == (128, 64)  # their first stage's uneven split
    x = torch.randn(1, 64, 16, 16)
    conv, norm = stage.conv_exp.conv.weight, stage.conv_exp.bn
    for rows, part in ((slice(0, 128), 0), (slice(128, 192), 1)):
        alone = torch.nn.functional.batch_norm(
            torch.nn.functional.conv2d(x, conv[rows]), norm.running_mean[rows], norm.running_var[rows],
            norm.weight[rows], norm.bias[rows],
        )  # fmt: skip
        expected = torch.nn.functional.leaky_relu(alone, 0.1)
        torch.testing.assert_close(stage.conv_exp(x).split((128, 64), dim=1)[part], expected)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("fusion", ["both", "first", "last"])
def test_gamma_and_fusion_of_a_stage(fusion, gamma):
    blocks = Blocks(DarkBlock, width := 32 - round(32 * gamma), 16, 1, leaky_relu, None, [0.0, 0.0])
    cout = 32 if fusion == "last" else 40
    stage = CrossStage(
        8, cout, Resolution(2), blocks, expand=32, gamma=gamma, fusion=fusion, down=True, average_down=False,
        grow_first=False, linear_expand=False,
    ).eval()  # fmt: skip
    x = torch.randn(2, 8, 16, 16)
    assert stage(x).shape == (2, cout, 8, 8)
    convolutions = {
        name: module.weight.shape[:2] for name, module in stage.named_modules() if isinstance(module, torch.nn.Conv2d)
    }
    assert convolutions["blocks.0.conv1.conv"] == (16, width)
    assert ("conv_transition_b.conv" in convolutions) == (fusion != "first")
    assert ("conv_transition.conv" in convolutions) == (fusion != "last")
    if fusion == "last":  # what crosses comes out as it went in
        expanded = stage.conv_exp(stage.conv_down(x))
        torch.testing.assert_close(stage(x)[:, : round(32 * gamma)], expanded[:, : round(32 * gamma)])


def test_a_stage_that_cannot_be_is_refused():
    blocks = Blocks(DarkBlock, 16, 8, 1, leaky_relu, None, [0.0])
    with pytest.raises(InputError, match="gamma=1.0"):
        replace(VARIANTS["cspresnet10"], gamma=1.0).build_stage(0, 32, Resolution(1), [0.0])
    with pytest.raises(InputError, match="fusion=last gives 16 \\+ 16 channels, not 64"):
        CrossStage(
            8, 64, Resolution(1), blocks, expand=32, gamma=0.5, fusion="last", down=False, average_down=False,
            grow_first=False, linear_expand=False,
        )  # fmt: skip


def test_without_classes_the_head_gives_features():
    assert create_model("cspresnet10", num_classes=0).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


def test_aliases_and_unknown_names():
    assert create_model("cspdarknet53", 2).name == ALIASES["cspdarknet53"] == "cspdarknet50"
    for name in ("cspdarknet53_plain", *ALIASES, *VARIANTS):
        assert without_alias(name) == get_variant(name)[0]
    assert without_alias("cspdarknet53_paper_plain") == "cspdarknet53_paper_plain"
    assert without_alias("cspdarknet53_plain") == "cspdarknet50_plain"
    with pytest.raises(InputError, match="unknown model 'cspresnet5': did you mean 'cspresnet50'?"):
        create_model("cspresnet5")
    with pytest.raises(InputError, match="darknet53 is plain itself"):
        create_model("darknet53", plain=True)


def test_published_names_are_networks():
    assert set(RELEASES) | set(PAPER) | set(ALIASES.values()) <= set(VARIANTS)
