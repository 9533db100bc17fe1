"""GGUF for llama.cpp and Ollama."""

from __future__ import annotations
