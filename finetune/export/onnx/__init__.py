"""ONNX through onnxruntime-genai: built, quantised, read and run."""

from __future__ import annotations
