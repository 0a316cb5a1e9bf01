"""What a configuration costs, counted from its fields alone: parameters and FLOPs of one forward token."""

from dsv4.cost.flops import flops_by_component, flops_per_token
from dsv4.cost.params import parameters

__all__ = ["flops_by_component", "flops_per_token", "parameters"]
