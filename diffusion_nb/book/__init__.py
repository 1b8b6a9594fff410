"""The machinery of the book: written by hand, not exported from a notebook."""

import sys

# nbformat's checker of JSON spends three seconds on a grammar of web addresses, if this is there; no field of a notebook needs it.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
