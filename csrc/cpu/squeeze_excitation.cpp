// Squeeze-and-excitation: out = x * gate(W_expand act(W_reduce mean(x) + b_reduce) + b_expand), channel by channel.
// Hu, Shen & Sun, "Squeeze-and-Excitation Networks" (2018). ECA (Wang et al., "ECA-Net", 2020) has a convolution over
// channels in the two matrices' place.

#include "cpu/map_attention.h"

namespace regard::cpu {

void squeeze_excitation(const ChannelProblem& problem) { map_attention<false, false>(problem); }

}  // namespace regard::cpu
