// How work on rows is shared out between threads.
#pragma once

#include <cstdint>

namespace vlcache {

constexpr int64_t kBytesPerThread = 128 * 1024;  // less takes as long to hand to another thread as to move

// The fewest rows of `row_nbytes` > 0 that are worth a thread.
inline int64_t grain(int64_t row_nbytes) { return 1 + (kBytesPerThread - 1) / row_nbytes; }

}  // namespace vlcache
