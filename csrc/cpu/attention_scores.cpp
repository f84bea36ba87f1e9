#include "cpu/attention_scores.h"

namespace regard::cpu {

template class ScoreTiles<float>;
template class ScoreTiles<double>;

}  // namespace regard::cpu
