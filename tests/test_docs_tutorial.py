"""docs/tutorial.md, command by command, in an empty folder; its trainings are cut to an epoch each, so that figures and
boxes differ from the page's: numbers may be others, and classes; where the page has `…` there may be anything.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving.shapes import CLASSES

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
FENCE = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FREE = {"number": r"-?\d+(?:\.\d+)?(?:e-?\d+)?", "name": "|".join(CLASSES), "any": "…"}
FREE_PARTS = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in FREE.items()))
END = "--- end of the command ---"


def shortened(page: str, port: int) -> str:
    page, trainings = re.subn(r"^  epochs: \d+$", "  epochs: 1", page, flags=re.MULTILINE)
    assert trainings == 2
    page = page.replace("score_threshold=0.5", "score_threshold=0.2")  # the lowest that the artefact has
    return page.replace("port: 8000", f"port: {port}").replace("127.0.0.1:8000", f"127.0.0.1:{port}")


def script_of(page: str) -> tuple[str, list[str]]:
    """One script, since a command asks the service that an earlier one started; and what each command should print."""
    script, printed = ["set -eu -o pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"], []
    for kind, title, text in FENCE.findall(page):
        if title:
            script.append(f"cat > {title} <<'END_OF_FILE'\n{text}END_OF_FILE")
        elif kind == "bash":
            script.append(f"{text}echo; echo '{END}'")
            printed.append("")
        elif kind == "text":
            assert not printed[-1], "two outputs of one command"
            printed[-1] = text
    return "\n".join(script), printed


def pattern_of(text: str) -> str:
    pattern, at = "", 0
    for part in FREE_PARTS.finditer(text.strip()):
        assert part.lastgroup
        free = ".*" if part.lastgroup == "any" else f"(?:{FREE[part.lastgroup]})"
        pattern += re.escape(text.strip()[at : part.start()]) + free
        at = part.end()
    return pattern + re.escape(text.strip()[at:])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl")
def test_every_command_does_what_the_page_says(tmp_path):
    script, printed = script_of(shortened(PAGE.read_text(encoding="utf-8"), free_port()))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = [output.strip() for output in done.stdout.split(END)]
    for output, page in zip(outputs[:-1], printed, strict=True):
        assert re.fullmatch(pattern_of(page), output, re.DOTALL), f"the page:\n{page}\nhere:\n{output}"
    figures = re.findall(r"  AP50 (\S+)", done.stdout)
    assert len(figures) == 3 and len(set(figures)) == 1, figures  # the checkpoint, the artefact, the endpoint
    assert float(figures[0]) > 0
