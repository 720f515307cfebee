"""Both models as ONNX artefacts: export, run, serve on Ray, run in batch. Start at `artifact.py`."""
