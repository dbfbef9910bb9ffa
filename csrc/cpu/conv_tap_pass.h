// The walk over a convolution's weight gradient tap by tap, for samples with few positions.
//
// Samples are taken in chunks whose operands are packed once, for all threads. Each thread owns
// units of the gradient: it walks a chunk's samples past a unit in runs that stay in its L1 cache,
// so the gradient is summed in registers and L1 and written once per chunk.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "conv_samples.h"
#include "conv_tap_tile.h"
#include "sample_stats.h"
#include "scratch.h"

namespace gradstats::cpu::conv {

constexpr int64_t kRunBytes = int64_t{32} << 10;

template <typename T>
class TapPass {
 public:
  // What is read of one sample for one unit.
  static int64_t bytes_at_once(const Geometry& geo) {
    const int64_t pixels = geo.in[0] * geo.in[1] * geo.in[2];
    const int64_t positions = geo.out[0] * geo.out[1] * geo.out[2];
    return (pixels * kTapRows + positions * lanes_of(geo)) * static_cast<int64_t>(sizeof(T));
  }

  TapPass(const Geometry& geo, Mode mode, const Tensor& x, const Tensor& g)
      : mode_(mode),
        taps_(geo),
        units_(geo, lanes_of(geo), rows_of(mode)),
        x_(x),
        g_(g),
        chunk_(
            std::clamp<int64_t>(kChunkBytes / sample_bytes(), 1, std::max<int64_t>(1, geo.batch))),
        tasks_(std::min<int64_t>(kTasks, units_.count())) {}

  // dw and, with moments, m2: (O, I/groups, *kernel); sq: (B), null where there are no norms.
  void run(T* dw, T* m2, double* sq) {
    const int64_t batch = taps_.geo.batch;
    const bool moments = mode_ == Mode::kMoments || mode_ == Mode::kResident;
    const bool keep = batch > chunk_;  // sums outlive a chunk
    const auto options = x_.options();
    const Tensor xs = at::empty({chunk_ * x_size()}, options);
    const Tensor gs = at::empty({chunk_ * g_size()}, options);
    const int64_t size = unit_size(units_.row(0), units_.in);
    const int64_t panels = units_.groups * units_.panels;
    Tensor sums = at::empty({keep ? panels * size * (moments ? 2 : 1) : 0}, options);
    std::vector<double> part(sq == nullptr ? 0 : tasks_ * chunk_);
    weigh(batch);
    for (int64_t b = 0; b < batch; b += chunk_) {
      const int64_t count = std::min(chunk_, batch - b);
      pack_all(b, count, xs.data_ptr<T>(), gs.data_ptr<T>());
      std::fill(part.begin(), part.end(), 0.0);
      at::parallel_for(0, tasks_, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> of_local, of_squares;
        T* const local = keep ? nullptr : at_line(of_local, 2 * unit_size(0, kTapRows));
        T* const squares = sq == nullptr ? nullptr : at_line(of_squares, run_length() * kLanes);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t last = split(units_.count(), tasks_, task + 1);
          for (int64_t u = split(units_.count(), tasks_, task); u < last; ++u) {
            const int64_t panel = u / units_.blocks, block = u % units_.blocks;
            const int64_t rows = unit_size(units_.row(block), units_.row(block + 1));
            T* sum =
                keep ? sums.data_ptr<T>() + panel * size + unit_size(0, units_.row(block)) : local;
            T* spread = !moments ? nullptr : keep ? sum + panels * size : sum + rows;
            if (b == 0) {
              std::fill_n(sum, rows, T(0));
              if (moments) std::fill_n(spread, rows, T(0));
            }
            unit(panel, block, b, count, xs.const_data_ptr<T>(), gs.const_data_ptr<T>(), sum,
                 spread, squares, sq == nullptr ? nullptr : part.data() + task * chunk_);
            if (b + count < batch) continue;
            unpack(panel, block, sum, dw);
            if (moments) unpack(panel, block, spread, m2);
          }
        }
      });
      if (sq == nullptr) continue;
      for (int64_t s = 0; s < count; ++s) {
        for (int64_t task = 0; task < tasks_; ++task) sq[b + s] += part[task * chunk_ + s];
      }
    }
  }

 private:
  static constexpr int64_t kLanes = at::vec::Vectorized<T>::size();
  static constexpr int64_t kChunkBytes = int64_t{2} << 20;
  static constexpr int64_t kTasks = 64;  // fixed, so that sums do not depend on the threads

  static int64_t lanes_of(const Geometry& geo) {
    return geo.out_channels / geo.groups <= kLanes ? kLanes : 2 * kLanes;
  }
  int64_t x_size() const { return taps_.pixels * taps_.geo.in_channels; }
  int64_t g_size() const { return taps_.positions * units_.groups * units_.panels * units_.lanes; }
  int64_t sample_bytes() const {
    return std::max<int64_t>(1, (x_size() + g_size()) * static_cast<int64_t>(sizeof(T)));
  }
  int64_t unit_size(int64_t row, int64_t end) const {
    return (end - row) * taps_.count * units_.lanes;
  }
  int64_t run_length() const { return std::max<int64_t>(1, kRunBytes / bytes_at_once(taps_.geo)); }

  void weigh(int64_t batch) {
    for (int64_t n = 0; n < batch; ++n) {
      const double count = static_cast<double>(n);
      inverse_.push_back(static_cast<T>(n > 0 ? 1 / count : 0));
      weight_.push_back(static_cast<T>(count / (count + 1)));
    }
  }

  // x to (group, block, sample, pixel, rows of the block), g to (group, panel, sample, position,
  // lanes).
  void pack_all(int64_t b, int64_t count, T* xs, T* gs) const {
    const int64_t xn = units_.groups * units_.blocks, gn = units_.groups * units_.panels;
    const int64_t work = (x_size() + g_size()) / std::max<int64_t>(1, xn + gn);
    const int64_t grain = at::ceil_div<int64_t>(1 << 13, std::max<int64_t>(1, work));
    at::parallel_for(0, (xn + gn) * count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t k = item / count, s = item % count;
        if (k < xn) {
          const int64_t block = k % units_.blocks, height = units_.height(block);
          const int64_t channel = k / units_.blocks * units_.in + units_.row(block);
          pack_positions(x_, b + s, taps_.geo.in, channel, height,
                         xs + (channel * count + s * height) * taps_.pixels, height);
        } else {
          const int64_t panel = k - xn, lane = panel % units_.panels * units_.lanes;
          const int64_t channels = std::min(units_.lanes, units_.out - lane);
          T* dst = gs + (panel * count + s) * taps_.positions * units_.lanes;
          if (channels < units_.lanes) {
            std::fill_n(dst, taps_.positions * units_.lanes, T(0));
          }
          pack_positions(g_, b + s, taps_.geo.out, panel / units_.panels * units_.out + lane,
                         channels, dst, units_.lanes);
        }
      }
    });
  }

  static void pack_positions(const Tensor& t, int64_t b, const Dims& size, int64_t channel,
                             int64_t channels, T* dst, int64_t ld) {
    const Dims strides = spatial_strides(t);
    const T* src = t.const_data_ptr<T>() + b * t.stride(0) + channel * t.stride(1);
    // Rows that touch are packed as one.
    int64_t length = size[2], rows = size[1], images = size[0];
    if (rows == 1 || strides[1] == length * strides[2]) {
      length *= std::exchange(rows, 1);
      if (images == 1 || strides[0] == length * strides[2]) length *= std::exchange(images, 1);
    }
    for (int64_t d = 0; d < images; ++d) {
      for (int64_t h = 0; h < rows; ++h, dst += length * ld) {
        pack(src + d * strides[0] + h * strides[1], t.stride(1), strides[2], channels, length, dst,
             ld);
      }
    }
  }

  void unit(int64_t panel, int64_t block, int64_t b, int64_t count, const T* xs, const T* gs,
            T* sum, T* m2, T* squares, double* sq) const {
    const int64_t height = units_.height(block), ld = taps_.count * units_.lanes;
    const int64_t channel = panel / units_.panels * units_.in + units_.row(block);
    const TapTile<T> tile = tap_tile_of<T>(mode_, height, units_.lanes > kLanes);
    TapRun<T> run{};
    run.x_step = taps_.pixels * height;
    run.g_step = taps_.positions * units_.lanes;
    run.ld = ld;
    run.squares = squares;
    for (int64_t s = 0; s < count; s += run.samples) {
      run.samples = std::min(run_length(), count - s);
      run.x = xs + channel * count * taps_.pixels + s * run.x_step;
      run.g = gs + (panel * count + s) * run.g_step;
      run.inverse = inverse_.data() + b + s;
      run.weight = weight_.data() + b + s;
      if (sq != nullptr) std::fill_n(squares, run.samples * kLanes, T(0));
      for (int64_t k = 0; k < taps_.count; ++k) {
        run.begin = taps_.pairs.data() + taps_.begin[k];
        run.end = taps_.pairs.data() + taps_.begin[k + 1];
        run.sum = sum + k * units_.lanes;
        run.m2 = m2 == nullptr ? nullptr : m2 + k * units_.lanes;
        tile(run);
      }
      if (sq == nullptr) continue;
      for (int64_t i = 0; i < run.samples; ++i) {
        sq[s + i] += sum_lanes(at::vec::Vectorized<T>::loadu(squares + i * kLanes));
      }
    }
  }

  // (channels x taps, lanes) to (lanes, channels x taps)
  void unpack(int64_t panel, int64_t block, const T* src, T* dst) const {
    const int64_t lane = panel % units_.panels * units_.lanes, ld = units_.in * taps_.count;
    const int64_t o = panel / units_.panels * units_.out + lane;
    pack(src, units_.lanes, 1, units_.height(block) * taps_.count,
         std::min(units_.lanes, units_.out - lane), dst + o * ld + units_.row(block) * taps_.count,
         ld);
  }

  Mode mode_;
  Taps taps_;
  Units units_;
  const Tensor x_, g_;
  int64_t chunk_, tasks_;
  std::vector<T> inverse_, weight_;
};

}  // namespace gradstats::cpu::conv
