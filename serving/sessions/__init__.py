"""What an artefact runs in: onnxruntime and OpenVINO, their providers and the graphs they keep."""
