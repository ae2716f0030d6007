"""The version of the package: below everything, so that every room can name it."""

__version__ = "0.2.0"
