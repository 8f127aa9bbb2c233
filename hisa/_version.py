"""The version: the one place that holds it, readable without torch and without the extension."""

__version__ = "0.1.0"
