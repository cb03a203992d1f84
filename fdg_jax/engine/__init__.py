"""Engines: interpreters of a schedule."""
