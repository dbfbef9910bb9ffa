// The fused kernel's barriers, run as state machines in random order: the producers and the two
// consumer warpgroups of every block of a cluster, with loads that arrive late and products that
// read late. Nobody may wait for ever, overwrite a stage that is still read, or read another
// sample's. The steps are those of csrc/cuda/hopper/pipeline.cuh.
#include "hopper/ring.cuh"

#include <functional>
#include <vector>

#include "check.h"
#include "hopper/traits.cuh"

using namespace gradstats::cuda::hopper;

namespace {

// PTX ISA, mbarrier: a phase is over when no arrival and no byte is pending; the next one begins.
struct Barrier {
  int expected, pending, bytes = 0;
  int64_t phase = 0;  // phases that are over
  explicit Barrier(int arrivals) : expected(arrivals), pending(arrivals) {}
  void settle() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = expected;
    }
  }
  void arrive(int more_bytes = 0) {
    CHECK(pending > 0, "more arrivals than the phase expects");
    bytes += more_bytes;
    --pending;
    settle();
  }
  void complete(int done) {
    bytes -= done;  // may run ahead of what this block expects: the arrival is still pending
    settle();
  }
  // try_wait.parity: true if the phase of that parity is the one that was over last.
  bool over(uint32_t parity) const { return (phase & 1) != int64_t(parity); }
};

struct Load {  // on its way
  int block, stage, bytes, tag, part;
};

template <typename Traits>
class Cluster {
 public:
  Cluster(int samples, int blocks, uint64_t seed)
      : samples_(samples), blocks_(blocks), short_first_(seed % 2 == 1), random_(seed) {
    for (int rank = 0; rank < Traits::kCluster; ++rank) blocks_of_cluster_.emplace_back();
  }

  void run() {
    int idle = 0;
    while (!done()) {
      const int who = random_.below(3 * Traits::kCluster + 1);
      bool moved = false;
      if (who == 3 * Traits::kCluster) {
        moved = deliver();
      } else if (who % 3 == 0) {
        moved = produce(who / 3);
      } else {
        moved = consume(who / 3, who % 3 - 1);
      }
      idle = moved ? 0 : idle + 1;
      CHECK(idle < 10000, "nobody can go on: %d samples of %d blocks", samples_, blocks_);
    }
    for (const Block& block : blocks_of_cluster_) {
      for (int turn : block.turn) CHECK(turn == 0, "an arrival at a named barrier is left over");
      CHECK(block.consumer[0].turns == block.consumer[1].turns, "as many turns");
    }
    CHECK(loads_.empty(), "a load outlives its block");
  }

 private:
  static constexpr int kParts = 1 + Traits::kCluster;  // of a stage: g, and each block's share of x

  struct Consumer {
    int sample = 0, block = 0, turns = 0;
    int state = 0, count = 0, inside = 0;
    bool started = false, finished = false;
    Ring<Traits::kStages> ring, read;
  };
  struct Producer {
    int sample = 0, block = 0;
    Ring<Traits::kStages> ring;
  };
  struct Block {
    std::vector<Barrier> full, empty;
    std::vector<std::vector<int>> tag;  // what each part of a stage holds
    std::vector<int> readers;           // products under way
    int turn[2] = {0, 0};               // warpgroups that arrived at the named barriers
    int next = 0;                       // whose turn it has to be
    Producer producer;
    Consumer consumer[2];
    Block()
        : full(Traits::kStages, Barrier(1)),
          empty(Traits::kStages, Barrier(Traits::kCluster * kConsumers)),
          tag(Traits::kStages, std::vector<int>(kParts, -1)),
          readers(Traits::kStages, 0) {}
  };

  bool done() const {
    for (const Block& block : blocks_of_cluster_) {
      if (block.producer.sample < samples_ && blocks_ > 0) return false;
      if (!block.consumer[0].finished || !block.consumer[1].finished) return false;
    }
    return loads_.empty();
  }

  bool produce(int rank) {
    Block& me = blocks_of_cluster_[rank];
    Producer& p = me.producer;
    if (blocks_ == 0 || p.sample == samples_) return false;
    const int stage = p.ring.stage;
    if (!me.empty[stage].over(p.ring.writer_parity())) return false;
    const int tag = p.sample * blocks_ + p.block, share = 1000 / Traits::kCluster;
    me.full[stage].arrive(500 + share * Traits::kCluster);
    loads_.push_back({rank, stage, 500, tag, 0});
    for (int to = 0; to < Traits::kCluster; ++to) {
      loads_.push_back({to, stage, share, tag, 1 + rank});
    }
    p.ring.advance();
    if (++p.block == blocks_) {
      p.block = 0;
      ++p.sample;
    }
    return true;
  }

  bool deliver() {
    if (loads_.empty()) return false;
    const int pick = random_.below(static_cast<int>(loads_.size()));
    const Load load = loads_[pick];
    loads_.erase(loads_.begin() + pick);
    Block& to = blocks_of_cluster_[load.block];
    CHECK(to.readers[load.stage] == 0, "a load overwrites a stage that is read");
    to.tag[load.stage][load.part] = load.tag;
    to.full[load.stage].complete(load.bytes);
    return true;
  }

  // One step of warpgroup `who`: waits return false until they are over.
  bool consume(int rank, int who) {
    Block& me = blocks_of_cluster_[rank];
    Consumer& c = me.consumer[who];
    if (c.finished) return false;
    if (!c.started) {
      c.started = true;
      if (who == 1) ++me.turn[0];
      return true;
    }
    if (c.sample == samples_ || blocks_ == 0) {  // warpgroup 0 takes the arrival that is left over
      if (who == 0) {
        if (me.turn[0] == 0) return false;
        --me.turn[0];
      }
      return c.finished = true;
    }
    if (c.state == 0) {  // named_wait(turn(me))
      CHECK(me.turn[who] <= 1, "a named barrier was passed twice");
      if (me.turn[who] == 0) return false;
      --me.turn[who];
      CHECK(me.next == who, "the turns alternate");
      me.next = 1 - who;
      c.count = turn_blocks<Traits::kTurnBlocks>(c.block, blocks_, short_first_);
      c.read = c.ring;
      c.inside = 0;
      c.state = 1;
      return true;
    }
    if (c.state == 1) {  // wait_for(full), multiply
      const int stage = c.read.stage;
      if (!me.full[stage].over(c.read.reader_parity())) return false;
      for (int tag : me.tag[stage]) {
        const int wanted = c.sample * blocks_ + c.block + c.inside;
        CHECK(tag == wanted, "stage %d holds %d, not %d", stage, tag, wanted);
      }
      ++me.readers[stage];
      c.read.advance();
      if (++c.inside == c.count) {
        ++me.turn[1 - who];  // named_arrive
        ++c.turns;
        c.inside = 0;
        c.state = 2;
      }
      return true;
    }
    const int stage = c.ring.stage;  // wgmma_wait of one more group is over at some later time
    for (int tag : me.tag[stage]) {
      CHECK(tag == c.sample * blocks_ + c.block + c.inside, "overwritten while it is read");
    }
    --me.readers[stage];
    for (Block& to : blocks_of_cluster_) to.empty[stage].arrive();
    c.ring.advance();
    if (++c.inside < c.count) return true;
    c.block += c.count;
    c.state = 0;
    if (c.block == blocks_) {
      c.block = 0;
      ++c.sample;
    }
    return true;
  }

  int samples_, blocks_;
  bool short_first_;
  Random random_;
  std::vector<Block> blocks_of_cluster_;
  std::vector<Load> loads_;
};

template <typename Traits>
void all() {
  for (int samples = 0; samples < 12; ++samples) {
    for (int blocks : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13}) {
      for (uint64_t seed = 1; seed <= 12; ++seed) Cluster<Traits>(samples, blocks, seed).run();
    }
  }
  Cluster<Traits>(101, 1, 99).run();
  Cluster<Traits>(3, 64, 98).run();
}

}  // namespace

int main() {
  all<Traits<false, 1>>();
  all<Traits<false, 2>>();
  all<Traits<false, 2, kNarrow>>();
  all<Traits<true, 1>>();
  all<Traits<true, 2>>();
  std::printf("ring ok\n");
}
