// Stages of work on a row of images, each stage needing all of the one before it on the same image.
//
// All threads work on the same few images, so that an image is still in cache when its next stage comes:
//
//   step 0: stage 0 of image 0;  step 1: stage 0 of image 1, stage 1 of image 0;  step 2: ...
//
// In one parallel_for, without barriers: pieces are claimed in this order, and a piece waits for the stage that it
// needs, which is in earlier, running hands. At a step's distance the wait is mostly over before it starts.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "cpu/parallel.h"

namespace regard::cpu {

constexpr int kMostStages = 4;

// Images in flight, and so sets of buffers: image i may use those of i - kInFlight, whose stages are over by then.
constexpr std::int64_t kInFlight = kMostStages + 1;

// Looks, some 50 us of them, where a piece takes 10. To yield sooner gives the core to another program, if there is one, for
// milliseconds: on a machine with ten times as many busy threads as cores the fastest tenth of calls of 8x256x56x56 took
// 20 ms after 64 looks, and takes 1.75 ms now.
constexpr int kLooksBeforeYield = 1 << 16;

// body(image, stage, piece) for every piece, then finish(image, stage) once, by whoever ends the stage's last piece.
template <class Work, class Finish>
void run_stages(std::int64_t images, int stages, const std::int64_t* pieces, double work, Work&& body, Finish&& finish,
                std::source_location at) {
  struct Progress {
    std::atomic<std::int64_t> left[kMostStages];
    std::atomic<bool> done[kMostStages];
  };
  const auto progress = std::make_unique<Progress[]>(static_cast<std::size_t>(images));
  std::int64_t step = 0;
  for (int s = 0; s < stages; ++s) step += pieces[s];
  for (std::int64_t i = 0; i < images; ++i)
    for (int s = 0; s < stages; ++s) {
      progress[i].left[s].store(pieces[s], std::memory_order_relaxed);
      progress[i].done[s].store(false, std::memory_order_relaxed);
    }

  // False when the call is being stopped.
  const auto wait_for = [&](std::int64_t image, int stage) {
    for (int looks = 1; !progress[image].done[stage].load(std::memory_order_acquire); ++looks) {
      if (looks % 1024 != 0) continue;
      if (stop_requested()) return false;
      if (looks >= kLooksBeforeYield) {
        std::this_thread::yield();
        looks = kLooksBeforeYield - 1024;
      }
    }
    return true;
  };

  const auto one_piece = [&](std::int64_t item) {
    std::int64_t piece = item % step;
    int stage = stages - 1;
    while (piece >= pieces[stage]) piece -= pieces[stage--];
    const std::int64_t image = item / step - stage;
    if (image < 0 || image >= images) return;
    if (stage > 0 ? !wait_for(image, stage - 1) : image >= kInFlight && !wait_for(image - kInFlight, stages - 1)) return;
    body(image, stage, piece);
    if (progress[image].left[stage].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    finish(image, stage);
    progress[image].done[stage].store(true, std::memory_order_release);
  };
  parallel_for((images + stages - 1) * step, work, one_piece, at);
}

}  // namespace regard::cpu
