"""Deployment of an upper to nodes: manifest, package, cache, transports. `api` is its front."""
