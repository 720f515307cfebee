"""The OpenAPI document: whole, and of what the endpoints answer."""

import json
import re

from serving.api.openapi import document, page

SAID = document("1.2.3")


def test_every_reference_leads_somewhere() -> None:
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(SAID))
    assert set(references) == set(SAID["components"]["schemas"])
    assert {"ClassifyAnswer", "DetectAnswer", "Error", "Request"} <= set(references)


def test_answers_are_those_of_the_schemas() -> None:
    schemas = SAID["components"]["schemas"]
    assert set(schemas["DetectAnswer"]["required"]) == {"model", "width", "height", "detections"}
    assert set(schemas["Box"]["required"]) == {"label", "category_id", "score", "box"}  # a mask is of some models


def test_every_refusal_is_an_error_object() -> None:
    for path, methods in SAID["paths"].items():
        for about in methods.values():
            for code, response in about["responses"].items():
                schema = response["content"]["application/json"]["schema"]
                assert code == "200" or schema == {"$ref": "#/components/schemas/Error"}, (path, code)


def test_the_page_names_every_path_and_needs_nothing() -> None:
    text = page(SAID)
    for path in SAID["paths"]:
        assert path in text
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"openapi.json"}


def test_answers_that_are_no_json_are_said() -> None:
    said = {
        path: [*about["post"]["responses"]["200"]["content"]]
        for path, about in SAID["paths"].items()
        if "post" in about
    }
    assert said["/v2/models/{model}/detect"] == ["application/json", "image/png", "image/jpeg"]
    assert said["/v2/models/{model}/infer"] == ["application/json", "application/octet-stream"]
    assert said["/v2/models/{model}/classify"] == ["application/json"]
