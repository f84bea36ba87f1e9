// CBAM: y = x * channel weights; out = y * gate(k x k convolution of y's mean and maximum over channels). y is never
// written: its statistics and out are computed from x, in three passes. Spatial attention is the same with weights of 1.
// Woo, Park, Lee & Kweon, "CBAM: Convolutional Block Attention Module" (2018).

#include "cpu/map_attention.h"

namespace regard::cpu {

void cbam(const ChannelProblem& problem) { map_attention<true, true>(problem); }

void spatial_attention(const ChannelProblem& problem) { map_attention<false, true>(problem); }

}  // namespace regard::cpu
