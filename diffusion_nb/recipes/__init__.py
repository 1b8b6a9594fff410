"""Settings by name, and what they describe."""
