// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The ascend_direct authors
//
// Copies pages between their fragments and one contiguous block, in host memory.
//
// Owns the copying: no keys, no bounds beyond those given. C ABI, no dependencies; setup.py builds
// it into the package, ascend_direct/store/page_packer.py calls it without the GIL.

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <thread>
#include <vector>

namespace {

struct Pages {
    const std::int64_t *addresses; // [rows, spans], start of each fragment
    const std::int64_t *lengths;   // [spans], bytes, the same for every row
    const std::int64_t *places;    // [rows], which page of the block a row is
    std::int64_t spans;
    std::int64_t page_bytes;
    unsigned char *block;
    bool to_block;
};

// Fragments [begin, end) of all rows, counted row by row.
void move(const Pages &pages, const std::vector<std::int64_t> &offsets, std::int64_t begin,
          std::int64_t end)
{
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t row = i / pages.spans, span = i % pages.spans;
        auto *fragment = reinterpret_cast<unsigned char *>(pages.addresses[i]);
        auto *packed = pages.block + pages.places[row] * pages.page_bytes + offsets[span];
        std::memcpy(pages.to_block ? packed : fragment, pages.to_block ? fragment : packed,
                    pages.lengths[span]);
    }
}

} // namespace

// Returns 0, or -1 when memory or threads could not be had; then the pages may be half moved.
extern "C" int ad_move_pages(const std::int64_t *addresses, const std::int64_t *lengths,
                             const std::int64_t *places, std::int64_t rows, std::int64_t spans,
                             void *block, int to_block, int threads) noexcept
try {
    std::vector<std::int64_t> offsets(spans);
    std::int64_t page_bytes = 0;
    for (std::int64_t span = 0; span < spans; ++span) {
        offsets[span] = page_bytes;
        page_bytes += lengths[span];
    }
    const Pages pages{addresses,  lengths, places, spans, page_bytes, static_cast<unsigned char *>(block),
                      to_block != 0};
    const std::int64_t total = rows * spans;
    const std::int64_t share = threads > 1 ? (total + threads - 1) / threads : total;
    std::vector<std::thread> helpers;
    helpers.reserve(threads > 1 ? threads : 0);
    std::int64_t begin = share; // the first share is this thread's
    try {
        for (; begin < total; begin += share)
            helpers.emplace_back(move, std::cref(pages), std::cref(offsets), begin,
                                 begin + share < total ? begin + share : total);
    } catch (const std::exception &) {
        move(pages, offsets, begin, total);  // no more threads: the rest is this thread's too
    }
    move(pages, offsets, 0, share < total ? share : total);
    for (std::thread &helper : helpers)
        helper.join();
    return 0;
} catch (const std::bad_alloc &) {
    return -1;
}
