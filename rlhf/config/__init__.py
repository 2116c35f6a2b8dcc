"""Typed configuration: schema, loading, provenance. Imports no torch."""
