"""ONNX for onnxruntime-genai."""

from __future__ import annotations
