import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_backbones_cspnet import randomize

from backbones.cspnet import create_model
from backbones.errors import InputError
from backbones.weights import load_weights, read_weights, save_weights

SEEDS = {"cspresnet50": "cspresnet50", "cspresnext50": "cspresnext50", "cspdarknet50": "cspdarknet53"}  # ours, timm's


def mmpretrain_keys(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """timm's state dict under the parameter names of mmpretrain's CSPNet."""
    resnet = name != "cspdarknet50"
    renamed = {}
    for key, value in state.items():
        new = key if key.startswith("head") else f"backbone.{key}"
        new = new.replace("stem.conv1.", "stem.0." if resnet else "stem.")
        new = new.replace("conv_down", "downsample_conv").replace("conv_exp", "expand_conv")
        new = new.replace("conv_transition_b", "atfer_blocks_conv").replace("conv_transition", "final_conv")
        if resnet and ".blocks." in new:
            for i in "123":
                new = new.replace(f".conv{i}.conv.", f".conv{i}.").replace(f".conv{i}.bn.", f".bn{i}.")
        renamed[new] = value
    assert len(renamed) == len(state)
    return renamed


@pytest.mark.parametrize("name", SEEDS)
@torch.inference_mode()
def test_timm_and_mmpretrain_weights_load_by_content(name, tmp_path):
    reference = randomize(timm.create_model(SEEDS[name]))
    state = reference.state_dict()
    files = {kind: tmp_path / f"weights.{kind}" for kind in ("safetensors", "pth", "mm")}
    save_file(state, files["safetensors"])
    torch.save(state, files["pth"])
    torch.save({"state_dict": mmpretrain_keys(state, name), "meta": {"epoch": 1}}, files["mm"])
    x = torch.randn(1, 3, 96, 96)
    expected = reference(x)
    for path in files.values():
        assert torch.allclose(create_model(name, weights=path).eval()(x), expected, atol=1e-5), path


def test_ours_carry_metadata_and_their_model(tmp_path):
    model = create_model("cspresnet10", 3)
    save_weights(tmp_path / "w.safetensors", model, {"model": "cspresnet10", "classes": ["a", "b", "c"]})
    other = create_model("cspresnet10", 3)
    metadata = load_weights(other, tmp_path / "w.safetensors")
    assert metadata["classes"] == ["a", "b", "c"]
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    with pytest.raises(InputError, match="holds weights of cspresnet10, not of cspdarknet10: set model=cspresnet10"):
        create_model("cspdarknet10", 3, tmp_path / "w.safetensors")


def test_head_is_left_out_only_when_asked_for(tmp_path):
    state = create_model("cspresnet10", 5).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"head.fc.weight is \[5, 512\], not \[3, 512\].*ignore_head=true"):
        create_model("cspresnet10", 3, tmp_path / "w.pth")
    model = create_model("cspresnet10", 3, tmp_path / "w.pth", ignore_head=True)
    assert torch.equal(model.state_dict()["stem.conv1.conv.weight"], state["stem.conv1.conv.weight"])
    body = create_model("cspresnet10", 0, tmp_path / "w.pth")
    assert torch.equal(body.state_dict()["stem.conv1.conv.weight"], state["stem.conv1.conv.weight"])


def test_wrappers_of_trainers_are_opened(tmp_path):
    state = create_model("cspresnet10", 2).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pth")
    loaded, metadata = read_weights(tmp_path / "w.pth")
    assert set(loaded) == set(state)
    assert metadata == {}


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_bad_files_are_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").touch()
    torch.save({"loss": 1.0}, tmp_path / "log.pth")
    save_file({"a": torch.zeros(10)}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    for name in ("evil.pth", "evil2.pth", "text.pth", "empty.pth", "log.pth", "cut.safetensors", "missing.pth", "."):
        with pytest.raises(InputError) as error:
            create_model("cspresnet10", 2, tmp_path / name)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_architecture(tmp_path):
    torch.save(create_model("cspresnet10", 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not hold weights of cspdarknet10: it lacks"):
        create_model("cspdarknet10", 2, tmp_path / "w.pth")


def test_published_weights_are_fetched_once_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def download(url, target):
        asked.append(url)
        save_file(create_model("cspresnet50").state_dict(), target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    create_model("cspresnet50", weights="timm")
    create_model("cspresnet50", weights="timm")
    assert asked == ["https://huggingface.co/timm/cspresnet50.ra_in1k/resolve/main/model.safetensors"]
    with pytest.raises(InputError, match="timm has no published weights of"):
        create_model("cspresnet10", weights="timm")


def test_half_a_download_does_not_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_file(create_model("cspresnet10", 2).state_dict(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    bodies = iter((whole[:-100], whole))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, to: Path(to).write_bytes(next(bodies)))
    with pytest.raises(InputError, match="broken safetensors file"):
        create_model("cspresnet10", 2, "http://127.0.0.1/w.safetensors?v=1")
    create_model("cspresnet10", 2, "http://127.0.0.1/w.safetensors?v=1")


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, target: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.raises(InputError, match="cannot download http://127.0.0.1/w.pth .no route.: fetch it elsewhere"):
        create_model("cspresnet10", weights="http://127.0.0.1/w.pth")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
