// What the machine can do at most, measured: the figures that kernels are judged against.
#pragma once

#include <cstdint>

namespace regard::cpu {

// Multiply-adds in registers on all set threads for about `seconds`: GFLOP/s of float, two operations each.
double measure_fma(double seconds);

// Whether this build has a matrix unit, and bfloat16 products on it likewise, in its registers: GFLOP/s. Only where it has one.
bool has_tiles();
double measure_tiles(double seconds);

// Exponentials as the softmax takes them, of values in registers: 1e9 a second of float, on all set threads.
double measure_exp(double seconds);

// Reads `bytes` of memory, shared out among the set threads, over and over for about `seconds`: GB/s (1e9). Bytes that
// fit a cache measure that cache. Throws std::bad_alloc.
double measure_read(std::int64_t bytes, double seconds);

// The date, yyyymm, of the OpenMP specification that the threads behind all this follow.
int openmp_date();

}  // namespace regard::cpu
