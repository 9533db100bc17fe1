"""Serve a model with its adapters: requests in, tokens out, over HTTP and gRPC."""
