"""What a model costs, counted from its configuration alone: parameters, FLOPs, cache bytes, machines, comparisons.

params.py and flops.py and kv_bytes.py count; hardware.py divides by what accelerators can do; compare.py sets V4 beside
V3.2 and Llama. That the counts are what runs is measured by dsv4/bench/cost.py.
"""

from dsv4.cost.flops import decode, flops_by_component, flops_per_token, prefill, train, weighted
from dsv4.cost.params import parameters

__all__ = ["decode", "flops_by_component", "flops_per_token", "parameters", "prefill", "train", "weighted"]
