"""ONNX through onnxruntime-genai: built, quantized, read and run."""

from __future__ import annotations
