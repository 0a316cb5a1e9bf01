"""What another implementation of V4 can be held to: so far the whole model once more, in plain float64 (plain.py)."""
