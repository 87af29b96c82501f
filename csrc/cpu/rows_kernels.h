// Loops of load_rows and save_rows. A "row" is one token of one layer, number layer * tokens + token; calls with
// disjoint ranges [first, end) of rows may run at the same time. `streams`: what is written goes past the processor's
// caches, where its instruction set has whole lines.
#pragma once

#include <cstdint>

#include "params.h"
#include "cpu/isa.h"

namespace vlcache {

VLCACHE_DECLARE(load_rows(const RowsParams& params, int64_t first, int64_t end, bool streams))
VLCACHE_DECLARE(save_rows(const RowsParams& params, int64_t first, int64_t end, bool streams))

}  // namespace vlcache
