"""Training: data, losses, optimisers, schedules and the loop that joins them."""
