"""What a replica does when another version fails it; test_serving_rollout.py has the versions on Ray itself."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.serve.exceptions import RayServeException

from serving.api.protocol import Refusal
from serving.service.versions import MOST_COPIES, Handed, Route, Versions, read_path

ROUTES = [Route("1", "m", 3), Route("2", "m@2", 1), Route("3", "m@3", 0, shadow=0.5)]
PATHS = {"": "/v2/models/m/classify", "2": "/v2/models/m/versions/2/classify"}


def versions(answer, counted=None) -> Versions:
    """Those of version 1's replica, whose neighbours `answer`."""
    found = Versions("m", "1", ROUTES, 0.2, counted or (lambda *_: None))
    found._handles = {name: SimpleNamespace(answer_handed=SimpleNamespace(remote=answer)) for name in "23"}
    return found


def handed(named: str = "", method: str = "POST", body: bytes = b"image") -> Handed:
    return Handed(method, PATHS[named], b"top_k=1", [(b"content-length", b"%d" % len(body))], body)


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("/v2/models/m", (None, "")),
        ("/v2/models/m/classify", (None, "classify")),
        ("/v2/models/m/versions/2", ("2", "")),
        ("/v2/models/m/versions/2/ready/", ("2", "ready")),
        ("/v2/models/m/versions", ("", "")),
        ("/v2/models/m/versionsx", (None, "versionsx")),
    ],
)
def test_paths(path, read):
    assert read_path(path, "m") == read


async def _answers(request: Handed) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    asked = request.request()
    return 200, [(b"x-model-version", b"2")], await asked.body() + asked.url.query.encode()


async def _fails(_: Handed) -> None:
    raise RayServeException("no replica")


async def _is_slow(_: Handed) -> None:
    await asyncio.sleep(5)


def test_an_answer_comes_as_it_was_given():
    reply = asyncio.run(versions(_answers).ask("2", handed(), named=False))
    assert reply == (200, [(b"x-model-version", b"2")], b"imagetop_k=1")


@pytest.mark.parametrize("answer", [_fails, _is_slow])
def test_chance_finds_no_version_that_fails(answer):
    assert asyncio.run(versions(answer).ask("2", handed(), named=False)) is None


def test_a_version_that_was_named_is_not_stood_in_for():
    with pytest.raises(Refusal) as caught:
        asyncio.run(versions(_fails).ask("2", handed("2"), named=True))
    assert caught.value.status == 503 and "Retry-After" in caught.value.response().headers
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(versions(_is_slow).ask("2", handed("2"), named=True))


def test_who_answers_and_who_listens():
    found = versions(_answers)
    drawn = Counter(found.choose(None, infers=True) for _ in range(2000))
    assert set(drawn) == {"1", "2"} and abs(drawn["2"] - 500) < 5 * (2000 * 3 / 16) ** 0.5
    assert {found.choose("2", infers=True) for _ in range(50)} == {"2"}
    assert {found.choose(None, infers=False) for _ in range(50)} == {"1"}
    copies = sum(len(found.shadows(None, infers=True)) for _ in range(2000))
    assert abs(copies - 1000) < 5 * (2000 / 4) ** 0.5
    assert not any(found.shadows("2", infers=True) for _ in range(50))


def test_copies_are_bounded_and_counted():
    counted: list[tuple[str, str]] = []

    async def send(answer) -> None:
        found = versions(answer, lambda *row: counted.append(row))
        for _ in range(MOST_COPIES + 3):
            found.copy(ROUTES[2], handed())
        while len(counted) < MOST_COPIES + 3:
            await asyncio.sleep(0.01)
        assert not found._copies

    asyncio.run(asyncio.wait_for(send(_answers), 10))
    assert Counter(counted) == {("3", "dropped"): 3, ("3", "answered"): MOST_COPIES}
    counted.clear()
    asyncio.run(asyncio.wait_for(send(_is_slow), 10))
    assert Counter(counted) == {("3", "dropped"): 3, ("3", "failed"): MOST_COPIES}
