"""Measurements: does a device compute what the reference computes, and how fast. Start with gpu_check.py.

Needs torch alone; nothing here runs in a test's verdict on speed.
"""
