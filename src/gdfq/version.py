"""The version, in one place; hatchling reads it from here."""

__version__ = "0.2.0.dev0"
