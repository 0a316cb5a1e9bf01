"""Adapters for what is at hand: this package, transformers, and any server with the completions interface."""
