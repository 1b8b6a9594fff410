"""The machinery of the book: written by hand, not exported from a notebook."""
