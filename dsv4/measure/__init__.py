"""What is compared, and how it is timed: under bench, the tests, and whatever else asks whether two things agree.

Subjects (random lively models), choices kept and replayed, cases, parity, executed FLOPs, clocks. Needs torch alone.
"""
