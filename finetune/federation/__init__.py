"""Federated learning: the updates of several parties, clipped by each party and averaged by a server."""
