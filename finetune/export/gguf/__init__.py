"""GGUF for llama.cpp and Ollama: numbers, names and tokenizer as its readers expect them, and the readers."""

from __future__ import annotations
