#include "cpu/tile_simd.h"

namespace regard::cpu {

template void multiply<float, Left::depth_contiguous>(const float*, std::int64_t, const float*, std::int64_t, float*, std::int64_t, int,
                                                      int, int, const Vec<float>*, NothingAhead);
template void multiply<float, Left::rows_contiguous>(const float*, std::int64_t, const float*, std::int64_t, float*, std::int64_t, int, int,
                                                     int, const Vec<float>*, NothingAhead);
template void multiply<double, Left::depth_contiguous>(const double*, std::int64_t, const double*, std::int64_t, double*, std::int64_t, int,
                                                       int, int, const Vec<double>*, NothingAhead);
template void multiply<double, Left::rows_contiguous>(const double*, std::int64_t, const double*, std::int64_t, double*, std::int64_t, int,
                                                      int, int, const Vec<double>*, NothingAhead);

}  // namespace regard::cpu
