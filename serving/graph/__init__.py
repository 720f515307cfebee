"""What is done to an ONNX graph: float16, ranges of activations, quantize-dequantize pairs."""
