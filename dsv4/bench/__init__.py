"""Reports, each a subcommand of `dsv4 bench`: does a device compute what the reference computes, and how fast; what a
decode step costs beside its arithmetic; is what is counted what runs. How things are compared and timed is in
dsv4/measure. Start with gpu_check.py.

Needs torch alone; nothing here runs in a test's verdict on speed.
"""
