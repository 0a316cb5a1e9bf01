"""A pool makes memories: each a handle on pages and a slot of it."""

from dsv4.cache.pages import Pages
from dsv4.cache.sequence import SequenceMemory
from dsv4.errors import UserError


class Pool(Pages):
    """The stores of all layers for many sequences, whose memories come and go."""

    def new(self, capacity: int = 0) -> SequenceMemory:
        """An empty memory, with pages of its own for `capacity` tokens; OutOfPages if there are not so many."""
        if capacity < 0:
            raise UserError(f"capacity={capacity} must not be negative")
        count = self.pages_for(capacity)
        self.provide(count)
        memory = SequenceMemory(self, self.take_slot())
        memory.hold([self.take_page() for _ in range(count)])
        return memory
