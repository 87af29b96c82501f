// Loop of shift_rows; calls with disjoint ranges [first, end) of tokens may run at the same time.
#pragma once

#include <cstdint>

#include "params.h"
#include "cpu/isa.h"

namespace vlcache {

VLCACHE_DECLARE(shift_rows(const ShiftParams& params, int64_t first, int64_t end))

}  // namespace vlcache
