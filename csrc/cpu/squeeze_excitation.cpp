// Squeeze-and-excitation: out = x * gate(W_expand act(W_reduce mean(x) + b_reduce) + b_expand), channel by channel.
// Hu, Shen & Sun, "Squeeze-and-Excitation Networks" (2018). ECA (Wang et al., 2020) puts a convolution over channels
// in the network's place.

#include "cpu/channel_rescale.h"

namespace regard::cpu {

void squeeze_excitation(const ChannelProblem& problem) { channel_rescale<false>(problem); }

}  // namespace regard::cpu
