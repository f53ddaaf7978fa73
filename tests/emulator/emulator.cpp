// Runs one kernel source (PQ_SOURCE) block after block on fibers; loaded by tests/test_kernels.py.
#define PQ_EMULATOR
#include PQ_SOURCE

namespace emulator {
Fiber* now;
ucontext_t scheduler;
std::vector<Warp> warps;
Gate block_gate;
std::map<u32, Gate> barriers;
std::vector<uint4> memory;
Block block, grid;
}  // namespace emulator
using namespace emulator;

static PQ_ARGS arguments;
static long num_look_ups, num_wavefronts;

static void thread_main() {
    PQ_ENTRY(arguments);
    now->done = true;
    swapcontext(&now->context, &scheduler);
}

// Shared memory serves 32 banks of 4 bytes at a time: a warp of words at once, of 8 bytes by halves, of 16 by quarters.
static void count_conflicts() {
    for (Warp& w : warps) {
        const size_t n = w.look_ups[0].size();
        for (size_t i = 0; i < n; i++) {
            const int words = w.look_ups[0][i].words, together = 32 / words;
            for (int first = 0; first < 32; first += together) {
                std::vector<u32> banks[32];
                size_t worst = 0;
                for (int l = first; l < first + together; l++) {
                    const u32 word = w.look_ups[l][i].address / 4;
                    for (u32 x = word; x < word + words; x++) {
                        auto& bank = banks[x % 32];
                        if (std::find(bank.begin(), bank.end(), x) == bank.end()) bank.push_back(x);
                        worst = std::max(worst, bank.size());
                    }
                }
                num_wavefronts += worst;
            }
            num_look_ups += words;
        }
    }
}

extern "C" double emulate(const void* args, int args_bytes, int grid_x, int grid_y, int grid_z, int threads,
                          int shared_bytes) {
    if (args_bytes != (int)sizeof(PQ_ARGS)) return -1;
    memcpy(&arguments, args, sizeof(PQ_ARGS));
    grid = {grid_x, grid_y, grid_z};
    num_look_ups = num_wavefronts = 0;
    std::vector<Fiber> fibers(threads);
    for (Fiber& f : fibers) f.stack.reset(new char[STACK]);
    for (int index = 0; index < grid_x * grid_y * grid_z; index++) {
        block = {index % grid_x, index / grid_x % grid_y, index / grid_x / grid_y};
        memory.assign(shared_bytes / 16 + 1, uint4{0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u});
        warps.clear();
        barriers.clear();
        warps.resize(threads / 32);
        for (Warp& w : warps) w.gate.size = 32;
        block_gate = Gate();
        block_gate.size = threads;
        int left = threads;
        for (int i = 0; i < threads; i++) {
            Fiber& f = fibers[i];
            f.index = i, f.done = false, f.waits = nullptr;
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = nullptr;
            makecontext(&f.context, thread_main, 0);
        }
        while (left) {
            int ran = 0;
            for (Fiber& f : fibers) {
                if (f.done || (f.waits && f.waits->generation == f.generation)) continue;
                f.waits = nullptr, now = &f, ran++;
                swapcontext(&scheduler, &f.context);
                left -= f.done;
            }
            if (!ran) return -2;  // a barrier that not all threads reach
        }
        count_conflicts();
    }
    return num_look_ups ? (double)num_wavefronts / num_look_ups : 0;
}
