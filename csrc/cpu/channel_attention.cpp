// CBAM's channel attention: out = x * gate(MLP(mean(x)) + MLP(maximum(x))), channel by channel.
// Woo, Park, Lee & Kweon, "CBAM: Convolutional Block Attention Module" (2018), section 3.

#include "cpu/map_attention.h"

namespace regard::cpu {

void channel_attention(const ChannelProblem& problem) { map_attention<true, false>(problem); }

}  // namespace regard::cpu
