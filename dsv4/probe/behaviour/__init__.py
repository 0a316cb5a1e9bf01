"""How a model, or any server with the usual interface, behaves under attack: it refuses, it leaks, it obeys whom?

run.py is the whole of it; runners.py measures; docs/behaviour.md says what is measured, what not, and how to read it.
These are measuring tools for who deploys a model: no harmful text is shipped, data sets are fetched when asked for.
"""
