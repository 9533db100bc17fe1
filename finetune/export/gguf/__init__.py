"""GGUF for llama.cpp and Ollama."""
