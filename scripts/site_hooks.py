"""What mkdocs.yml asks for besides docs/: the files of the tree that pages link to, and the published figures."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from backbones.published import RELEASES

BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "deploy/grafana.json", "deploy/rayservice.yaml", "deploy/Dockerfile")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files beside docs/, at the site's top."""
    root = Path(config.docs_dir).parent
    for name in BESIDE:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ and into it, which hold in the tree, made to hold in the site."""
    if page.file.src_uri in BESIDE:
        markdown = markdown.replace("](docs/", "](")
    for name in BESIDE:
        markdown = markdown.replace(f"](../{name}", f"]({name}").replace(f"](../../{name}", f"](../{name}")
    return markdown.replace("<!-- published -->", published())


def published() -> str:
    """`backbones.published` as a table."""
    lines = ["| model | top-1 | top-5 | published by | protocol |", "|---|---|---|---|---|"]
    for name, release in RELEASES.items():
        for figure in release.figures:
            lines.append(f"| {name} | {figure.top1:g} | {figure.top5:g} | {figure.by} | {figure.preprocess} |")
    return "\n".join(lines)
