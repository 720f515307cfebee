"""The drawings of docs/pictures, as SVG that follows the reader's light or dark scheme: python scripts/drawings.py"""

from html import escape
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1d2733; text-anchor: middle }
.small { font-size: 10.5px; fill: #52606d } .left { text-anchor: start } .right { text-anchor: end }
.bold { font-weight: 600 }
rect { fill: #f1f5fa; stroke: #6b7f94; stroke-width: 1.2 }
rect.main { fill: #dbe7ff; stroke: #3557b7 } rect.proof { fill: #e2f3e4; stroke: #2e7d32 }
rect.area { fill: none; stroke-dasharray: 5 4 }
path { fill: none; stroke: #52606d; stroke-width: 1.6 } path.tip { fill: #52606d; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e9f0 } .small { fill: #a9b4c0 }
  rect { fill: #262d38; stroke: #8b9bad }
  rect.main { fill: #23345f; stroke: #8fa8f5 } rect.proof { fill: #1d3a22; stroke: #7cc784 }
  rect.area { fill: none }
  path { stroke: #a9b4c0 } path.tip { fill: #a9b4c0 }
}
"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: str, kind: str = "") -> str:
    """A box with its lines in the middle, the first of them bold."""
    rows = lines.split("\n")
    top = y + height / 2 - 8 * (len(rows) - 1) + 4.5
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{kind}"/>'
    words = [text(x + width / 2, top + 16 * i, row, "small" if i else "bold") for i, row in enumerate(rows)]
    return "\n".join([shape, *words])


def area(x: float, y: float, width: float, height: float, title: str) -> str:
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="area"/>'
    return shape + text(x + 12, y + 19, title, "left bold")


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points, straight up or sideways at its end, with a tip there."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    line = "M" + " L".join(f"{a} {b}" for a, b in (*points[:-1], (x - 6 * dx, y - 6 * dy)))
    tip = f"M{x} {y} L{x - 8 * dx - 4 * dy} {y - 8 * dy - 4 * dx} L{x - 8 * dx + 4 * dy} {y - 8 * dy + 4 * dx} Z"
    return f'<path d="{line}"/><path class="tip" d="{tip}"/>'


def stage() -> str:
    """`backbones.stages.CrossStage`."""
    return svg(760, 190, "A CSP stage: a part of the channels crosses, the rest goes through the blocks", [
        text(5, 96, "[N, cin, H, W]", "small left"), arrow((5, 50), (24, 50)),
        box(24, 22, 96, 56, "conv_down\n3 × 3, stride 2"), arrow((120, 50), (138, 50)),
        box(138, 22, 82, 56, "conv_exp\n1 × 1"), arrow((220, 50), (506, 50)),
        text(363, 40, "cross: γ of the channels", "small"),
        arrow((238, 50), (238, 136), (258, 136)),
        box(258, 108, 74, 56, "blocks\n× depth", "main"), arrow((332, 136), (350, 136)),
        box(350, 108, 136, 56, "conv_transition_b\n1 × 1"), arrow((486, 136), (534, 136), (534, 78)),
        text(246, 100, "the rest", "small left"),
        box(506, 22, 56, 56, "concat"), arrow((562, 50), (580, 50)),
        box(580, 22, 124, 56, "conv_transition\n1 × 1"), arrow((704, 50), (755, 50)),
        text(757, 96, "[N, cout, H/2, W/2]", "small right"),
    ])  # fmt: skip


def line() -> str:
    """From images to production."""
    return svg(760, 220, "From images to production, and one number measured at every place", [
        box(5, 60, 104, 56, "images\nand annotations"), arrow((109, 88), (135, 88)),
        box(135, 60, 124, 56, "checkpoint\ntrained in PyTorch"), arrow((259, 88), (305, 88)),
        text(282, 80, "export", "small"),
        box(305, 60, 136, 56, "one .onnx file\nand its proof", "main"),
        arrow((441, 88), (475, 88)), arrow((373, 60), (373, 26), (690, 26), (690, 60)),
        box(475, 60, 124, 56, "endpoint\nRay Serve, HTTP"), box(628, 60, 124, 56, "batch job\nRay Data, Parquet"),
        *[arrow((x, 116), (x, 164)) for x in (197, 373, 537, 690)],
        *[text(x + 6, 140, "top-1, AP50", "small left") for x in (197, 373, 537)],
        text(684, 140, "top-1, AP50", "small right"),
        box(135, 164, 617, 40, "the same metric code on the same pixels: one number", "proof"),
    ])  # fmt: skip


def architecture() -> str:
    """The packages and what runs of them."""
    return svg(760, 440, "Three packages, the artefact between them, and a running service", [
        area(5, 5, 425, 430, "packages: imports go up"),
        box(20, 40, 395, 90, "backbones\nvariants → stages, blocks → cspnet.create_model\n"
            "preprocess: decode, turn upright, resize\nmetrics, weights, training"),
        arrow((217, 160), (217, 130)),
        box(20, 160, 395, 90, "detection\nbackbone → neck (FPN, EFM) → torchvision’s detectors\n"
            "batched: the same as one tensor function, for export\ncoco_eval, report, training"),
        arrow((217, 280), (217, 250)),
        box(20, 280, 395, 140, "serving"
            "\nexport: from PyTorch, and compared with it"
            "\nquantize: INT8, if it is as accurate and faster"
            "\nevaluate: the packages’ metrics on artefact, endpoint, results"
            "\nwithout PyTorch: artifact, runtime, predictor, app, client, batch"),
        area(455, 5, 300, 430, "a running service"),
        box(475, 40, 260, 36, "clients: curl, Python, the page"), arrow((605, 76), (605, 100)),
        box(475, 100, 260, 36, "HAProxy"), arrow((605, 136), (605, 166)),
        area(475, 166, 260, 172, "replicas of a model"),
        box(495, 198, 220, 32, "decode: a pool of threads"), arrow((605, 230), (605, 246)),
        box(495, 246, 220, 32, "queue: batches as they come"), arrow((605, 278), (605, 294)),
        box(495, 294, 220, 32, "session of a runtime"),
        arrow((605, 370), (605, 326)),
        box(475, 370, 260, 50, "one .onnx file, sealed\nnormalisation, NMS, labels, proof", "main"),
        arrow((415, 395), (475, 395)),
    ])  # fmt: skip


ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path d="M3 12h6l4-6h4M9 12l4 6h4" fill="none"
stroke="#3557b7" stroke-width="2.4"/><circle cx="19" cy="6" r="2.4" fill="#3557b7"/>
<circle cx="19" cy="18" r="2.4" fill="#3557b7"/></svg>
"""

if __name__ == "__main__":
    drawings = {"csp_stage": stage(), "line": line(), "architecture": architecture(), "icon": ICON}
    for name, drawing in drawings.items():
        (PICTURES / f"{name}.svg").write_text(drawing, encoding="utf-8")
