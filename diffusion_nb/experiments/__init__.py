"""The experiments whose tables the book prints; no part of the library."""
