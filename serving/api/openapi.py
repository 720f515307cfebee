"""The endpoints as an OpenAPI document, and as a page to read; no Ray, no torch here."""

import html
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from serving.api import oip_json
from serving.api.schemas import MAX_TOP_K, PICTURES, ClassifyAnswer, DetectAnswer

_REFUSALS = {
    "400": "the request is not one that is taken: the error names what and the remedy",
    "401": "no API key, where the service asks for one",
    "404": "no such model, version or action",
    "408": "no answer within the model's time limit",
    "413": "the body is too large",
    "415": "a kind of multipart body that is not read",
    "422": "no image, a broken one, or one of too many pixels",
    "429": "the API key is over its rate limit: try again after Retry-After seconds",
    "503": "overloaded or not ready: try again after Retry-After seconds",
}
_FOR_IMAGES = ("400", "404", "408", "413", "415", "422", "503")
_OCTETS = ("application/octet-stream",)  # of binary tensors
_STRING = {"type": "string"}
_MODEL = {"name": "model", "in": "path", "required": True, "schema": _STRING}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": _STRING}
_SCORE = {"type": "number", "minimum": 0, "maximum": 1}
_TOP_K = {"type": "integer", "minimum": 1, "maximum": MAX_TOP_K}
_CLASSES = ("classes", _STRING, "labels or indices to keep, comma-separated")


class Error(TypedDict):
    """Why a request failed, and what would help."""

    error: str


class Entry(TypedDict):
    """What became of one image of several: an answer, or an error."""

    name: str
    error: NotRequired[str]


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 of the service, whose version it carries."""
    components: dict[str, Any] = {}
    answers = {
        name: _schema(kind, components) for name, kind in (("classify", ClassifyAnswer), ("detect", DetectAnswer))
    }
    error = _schema(Error, components)
    request = _schema(oip_json.Request, components)

    def operation(
        summary: str, answer: dict[str, Any] | None = None, *refusals: str, binary: Sequence[str] = (), **more: Any
    ) -> dict[str, Any]:
        content = _json(answer or {"type": "object"}) | {key: {} for key in binary}
        good = {"description": "OK", "content": content}
        bad = {code: {"description": _REFUSALS[code], "content": _json(error)} for code in ("401", *refusals, "429")}
        return {"summary": summary, "responses": {"200": good, **bad}, **more}

    def images(action: str, summary: str, *query: tuple[str, dict[str, Any], str], **more: Any) -> dict[str, Any]:
        one, several = answers[action], {"type": "array", "items": _schema(Entry, components)}
        answer = {"anyOf": [one, {"type": "object", "properties": {"results": several}, "required": ["results"]}]}
        parameters = [_MODEL, *map(_query, query)]
        return operation(summary, answer, *_FOR_IMAGES, requestBody=_BODY, parameters=parameters, **more)

    one_model: dict[str, Any] = {"parameters": [_MODEL]}
    paths = {
        "/v2": {"get": operation("The server and its extensions")},
        "/v2/health/live": {"get": operation("Whether the server runs")},
        "/v2/health/ready": {"get": operation("Whether every model answers", None, "503")},
        "/v2/repository/index": {
            "post": operation(
                "The models and their states", {"type": "array"}, "400", "413",
                requestBody={"content": _json(_schema(oip_json.IndexRequest, components))},
            )
        },
        "/v2/models/{model}": {"get": operation("What a model takes and answers", None, "404", **one_model)},
        "/v2/models/{model}/ready": {"get": operation("Whether a model answers", None, "404", "503", **one_model)},
        "/v2/models/{model}/infer": {
            "post": operation(
                "Tensors to tensors, by the Open Inference Protocol", None, *_FOR_IMAGES, **one_model, binary=_OCTETS,
                requestBody={"required": True, "content": _json(request) | {key: {} for key in _OCTETS}},
            )
        },
        "/v2/models/{model}/classify": {
            "post": images("classify", "The best classes of an image", ("top_k", _TOP_K, "how many"), _CLASSES)
        },
        "/v2/models/{model}/detect": {
            "post": images(
                "detect", "The detections in an image",
                ("score_threshold", _SCORE, "the least score, not below the model's own"), _CLASSES,
                ("annotate", _STRING | {"enum": PICTURES}, "png or jpeg: answer the picture with its boxes"),
                ("classify", _STRING, "a classifier, asked about the same picture: its answer is `classification`"),
                ("top_k", _TOP_K, "how many classes of that"),
                binary=[f"image/{kind}" for kind in PICTURES],
            )
        },
    }  # fmt: skip
    of_models = {path: methods for path, methods in paths.items() if "{model}" in path}
    for path, methods in of_models.items():
        versioned = path.replace("{model}", "{model}/versions/{version}")
        paths[versioned] = {
            method: about | {"parameters": [about["parameters"][0], _VERSION, *about["parameters"][1:]]}
            for method, about in methods.items()
        }
    keys = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "cspnet", "version": version, "summary": "Classification and detection on CSP networks"},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": keys}},
        "security": [{}, {"key": []}],
    }


_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
        },
        "application/json": {
            "schema": {
                "oneOf": [
                    {"type": "object", "required": ["image"], "properties": {"image": {"type": "string"}}},
                    {"type": "object", "required": ["images"], "properties": {"images": {"type": "array"}}},
                ],
                "description": "encoded images in base64",
            }
        },
    },
}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _query(parameter: tuple[str, dict[str, Any], str]) -> dict[str, Any]:
    name, schema, description = parameter
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _schema(kind: Any, components: dict[str, Any]) -> dict[str, Any]:
    """A reference to a type's schema, which is put among the components with all that it refers to."""
    schema = TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")
    components |= schema.pop("$defs", {})
    components[schema["title"]] = schema
    return {"$ref": f"#/components/schemas/{schema['title']}"}


def page(said: dict[str, Any]) -> str:
    """An OpenAPI document to read, of this module's form."""
    parts = []
    for path, methods in said["paths"].items():
        for method, about in methods.items():
            rows = [
                (f"{p['name']} ({p['in']})", f"{p['schema']['type']} {p.get('description', '')}")
                for p in about.get("parameters", ())
            ]
            rows += [("body", ", ".join(about["requestBody"]["content"]))] if "requestBody" in about else []
            rows += [(code, answer["description"]) for code, answer in about["responses"].items()]
            table = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
            heading = f"{method.upper()} {html.escape(path)}"
            parts.append(f"<h2><code>{heading}</code></h2><p>{html.escape(about['summary'])}</p><table>{table}</table>")
    return _PAGE.format(title=html.escape(said["info"]["title"]), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}: API</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
h2 {{ margin: 2.5rem 0 0; font-size: 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top; font-weight: normal; }}
th {{ white-space: nowrap; opacity: .75; }}
</style>
<h1>{title}</h1>
<p>For programs: <a href="openapi.json">openapi.json</a>. Every answer but 2xx is <code>{{"error": "…"}}</code>.</p>
{body}
</html>
"""
