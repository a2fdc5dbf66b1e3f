"""Batches: files of requests that run where interactive ones leave room, at half the price. It knows no HTTP server."""
