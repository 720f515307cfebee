"""What others published of the networks: where their weights are, under which protocol they were evaluated and
with what accuracy; no torch here.

Nothing in this table was measured by this project. Sources: timm's model cards and its table of ImageNet results,
mmpretrain's model zoo.
"""

from dataclasses import dataclass

from backbones.preprocess import IMAGENET_MEAN, IMAGENET_STD, ClassifierPreprocess, Interpolation, Triple

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Published:
    """Accuracy that others published, in percent, with the protocol it was measured under."""

    by: str
    preprocess: ClassifierPreprocess
    top1: float
    top5: float


@dataclass(frozen=True)
class Release:
    """Published weights of a network; the first of `figures` is by the weights' publisher."""

    hub: str  # the repository on the Hugging Face hub
    figures: tuple[Published, ...]


def timm(
    top1: float, top5: float, *, resize: int = 288, crop: int = 256, bilinear: bool = False, mean: Triple | None = None
) -> Published:
    """timm's evaluation: `crop` pixels of an image whose short side is floor(crop / crop_pct)."""
    kind: Interpolation = "bilinear" if bilinear else "bicubic"
    preprocess = ClassifierPreprocess(
        resize=resize, crop=crop, interpolation=kind, mean=mean or IMAGENET_MEAN, std=mean or IMAGENET_STD
    )
    return Published("timm", preprocess, top1, top5)


def mmpretrain(top1: float, top5: float, *, resize: int, crop: int) -> Published:
    return Published("mmpretrain", ClassifierPreprocess(resize=resize, crop=crop), top1, top5)


RELEASES: dict[str, Release] = {
    "cspresnet50": Release(
        "timm/cspresnet50.ra_in1k",
        (timm(79.578, 94.698, bilinear=True), mmpretrain(79.55, 94.68, resize=288, crop=256)),
    ),
    "cspresnext50": Release(
        "timm/cspresnext50.ra_in1k",
        (timm(80.548, 95.330, bilinear=True), mmpretrain(79.96, 94.96, resize=256, crop=224)),
    ),
    "cspdarknet50": Release(
        "timm/cspdarknet53.ra_in1k",
        (timm(80.078, 95.060, bilinear=True), mmpretrain(80.05, 95.07, resize=288, crop=256)),
    ),
    "darknet53": Release("timm/darknet53.c2ns_in1k", (timm(80.008, 95.046),)),
    "darknetaa53": Release("timm/darknetaa53.c2ns_in1k", (timm(79.754, 94.904, bilinear=True),)),
    "cs3darknet_m": Release("timm/cs3darknet_m.c2ns_in1k", (timm(76.974, 93.582),)),
    "cs3darknet_l": Release("timm/cs3darknet_l.c2ns_in1k", (timm(80.350, 95.304),)),
    "cs3darknet_x": Release("timm/cs3darknet_x.c2ns_in1k", (timm(81.856, 95.956, resize=269),)),
    "cs3darknet_focus_s": Release("timm/cs3darknet_focus_s.ra4_e3600_r256_in1k", (timm(72.178, 90.830, mean=HALF),)),
    "cs3darknet_focus_m": Release("timm/cs3darknet_focus_m.c2ns_in1k", (timm(76.754, 93.550),)),
    "cs3darknet_focus_l": Release("timm/cs3darknet_focus_l.c2ns_in1k", (timm(80.254, 95.294),)),
    "cs3sedarknet_l": Release("timm/cs3sedarknet_l.c2ns_in1k", (timm(81.208, 95.798),)),
    "cs3sedarknet_x": Release("timm/cs3sedarknet_x.c2ns_in1k", (timm(81.926, 96.022),)),
    "cs3edgenet_x": Release("timm/cs3edgenet_x.c2_in1k", (timm(82.198, 95.956),)),
    "cs3se_edgenet_x": Release(
        "timm/cs3se_edgenet_x.c2ns_in1k",
        (timm(82.768, 96.306, resize=269), timm(83.550, 96.662, resize=320, crop=320)),
    ),
}

PLAIN = "_plain"  # after a network's name: its twin without cross-stage paths

# Two names, one network: timm's and the authors' name counts the convolutions.
ALIASES = {"cspdarknet53": "cspdarknet50"}


def without_alias(name: str) -> str:
    """The table's own name for a network's alias, or for its plain twin's; any other name stays as it is."""
    base = name.removesuffix(PLAIN)
    return ALIASES.get(base, base) + name[len(base) :]


def protocol(model: str) -> ClassifierPreprocess:
    """How a network is evaluated unless a config says otherwise: as its published weights were, else at 256 pixels.

    A plain twin is evaluated as the network it is compared with.
    """
    release = RELEASES.get(without_alias(model).removesuffix(PLAIN))
    return release.figures[0].preprocess if release else ClassifierPreprocess(resize=288, crop=256)


@dataclass(frozen=True)
class PaperRow:
    """The authors' own figures of one network on ImageNet-1k: weights of the convolutions in millions, BFLOPs (twice
    the multiply-adds, in billions, of an image of `size` x `size` pixels), top-1 and top-5 in percent.
    """

    params: float
    bflops: float
    top1: float
    top5: float
    size: int = 256


# By this project's name: the plain network, and the CSP network made of it.
PAPER: dict[str, tuple[PaperRow, PaperRow]] = {
    "cspresnet10_paper": (PaperRow(5.24, 2.273, 63.5, 85.0), PaperRow(2.73, 1.905, 65.3, 86.5)),
    "cspresnet50_paper": (PaperRow(22.73, 9.74, 75.8, 92.9), PaperRow(21.57, 8.97, 76.6, 93.3)),
    "cspresnext50_paper": (PaperRow(22.19, 10.11, 77.8, 94.2), PaperRow(20.50, 7.93, 77.9, 94.0)),
    "cspdarknet53_paper": (PaperRow(41.57, 18.57, 77.2, 93.8), PaperRow(27.61, 13.07, 77.2, 93.6)),
    "cspdensenet201_elastic": (PaperRow(19.48, 8.77, 77.9, 94.0, 224), PaperRow(20.17, 7.13, 77.9, 94.0, 224)),
    "csppeleenet": (PaperRow(2.79, 1.017, 70.7, 90.0, 224), PaperRow(2.83, 0.888, 70.9, 90.2, 224)),
}
