import pytest

from detection.__main__ import main
from detection.profile import profile, table
from detection.published import WEIGHTS


@pytest.mark.parametrize("name", WEIGHTS)
def test_costs_are_torchvisions(name):
    """Its figures are of a canvas of 800 x 800; its Mask R-CNN found nothing there, so that no mask was counted."""
    meta = WEIGHTS[name].meta
    cost = profile(name, [(800, 800)], detections=0 if name == "maskrcnn_resnet50_fpn" else 100)
    assert cost.gmacs[0] == pytest.approx(meta["_ops"], abs=1e-3)
    frozen = 0 if name.endswith("_v2") else 53_120  # torchvision counts no weights of frozen BatchNorm
    assert round(cost.params * 1e6) == meta["num_params"] + frozen


def test_table(capsys):
    names = ["fcos_cspdarknet53_efm", "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"]
    main(["models", *names])
    printed = capsys.readouterr().out.splitlines()
    assert printed == "\n".join(table(names)).splitlines()
    assert "on its canvas of 800×1344 or 512×512" in printed[0]
    assert printed[-3].startswith("fcos_cspdarknet50_efm ")
    assert printed[-2].split() == ["fasterrcnn_resnet50_fpn", "41.81", "215.99", "63.52", "box", "37.0"]
    assert printed[-1].endswith("box 37.9  mask 34.6")
    with pytest.raises(SystemExit, match="2"):
        main(["models", "--all", *names])
