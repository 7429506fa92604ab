"""The version. Written by `python scripts/derive.py` from the newest heading of CHANGELOG.md."""

__version__ = "0.1.0.dev0"
