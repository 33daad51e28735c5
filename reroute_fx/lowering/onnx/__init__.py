"""Programs on ONNX Runtime."""
