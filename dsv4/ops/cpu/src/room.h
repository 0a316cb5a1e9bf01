// Memory that a thread works in.
#pragma once

#include "simd.h"

namespace {

// Room that a thread keeps from call to call, since fresh memory costs more than what is computed in it; what `take` gives
// begins at a cache line.
class Room {
    std::vector<uint8_t> bytes;
    size_t used = 0;

  public:
    // Forget what was taken; there must be room for `size` bytes and 64 for each piece.
    void open(size_t size) {
        if (bytes.size() < size + 64) bytes.resize(size + 64);
        used = 64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64;
    }
    template <class T> T* take(long count) {
        T* out = reinterpret_cast<T*>(bytes.data() + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return out;
    }
};

}  // namespace
