"""Loading, heads, adapters and the one module that touches distributed internals."""
