"""Typed, frozen configuration of every stage: the schema, loading from YAML with overrides, and the origin of every
value. It holds no algorithm and imports no torch."""
