"""How a model of this architecture bends and breaks: one file a question, every answer a `Record`.

record.py is what an answer is, table.py lists the probes, runner.py runs them and goes on where it was stopped,
report.py makes the page. Each probe's file opens with what it covers and what it does not.
"""
