// The benchmarks, registered by main() after it has seen that the machine has the instruction set: static
// registration would run wide instructions before that.
#pragma once

namespace regard::bench {

void register_attention();
void register_excitation();
void register_linear();
void register_tile_engine();
void register_vector_math();

}  // namespace regard::bench
