"""The server's own description, from the fields that it reads."""

from __future__ import annotations

from smoe.runtime.serve.bodies import SCHEMAS
from smoe.runtime.serve.fields import Json

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSALS = (400, 401, 403, 404, 405, 408, 413, 500, 503)
POSTS = {
    "/v1/chat/completions": ("Chat", "Go on with a conversation"),
    "/v1/completions": ("Completion", "Go on with texts"),
    "/tokenize": ("Tokenize", "Token ids of a text"),
}
GETS = {
    "/v1/models": "The model",
    "/tokenizer_info": "Texts of its control tokens, and its chat template",
    "/v1/residency": "Experts in memory, by layer and level",
    "/health": "Whether the thread that generates is there",
    "/metrics": "Counts, for Prometheus",
}


def page(version: str) -> Json:
    """OpenAPI 3.1."""
    posts = {path: {"post": _post(*about)} for path, about in POSTS.items()}
    gets = {path: {"get": _answers(said)} for path, said in GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "smoe", "version": version},
        "paths": posts | gets,
        "components": {"schemas": SCHEMAS | {"Error": ERROR}},
    }


def _post(name: str, said: str) -> Json:
    schema = {"$ref": f"#/components/schemas/{name}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body} | _answers(said)


def _answers(said: str) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {str(status): {"description": "refused", "content": error} for status in REFUSALS}
    return {"summary": said, "responses": {"200": {"description": said}} | refused}
