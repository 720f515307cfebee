"""What the endpoints read and write: the Open Inference Protocol, uploads, answers, OpenAPI; no Ray in it."""
