"""Steelyard: data -> train -> compress -> evaluate -> serve, one checkpoint all the way."""

__version__ = "0.1.0"
