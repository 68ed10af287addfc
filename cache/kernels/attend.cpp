// One new token per row against a row's stored tokens, on CPU. The operator: cache/kernels/__init__.py; the buffers: cache/split.py.
//
// What a query may see is a list of columns: a K row, a V row and their scales, wherever they lie. Masked columns never enter the list, so
// no arithmetic knows a mask. The list of one kv head is cut into tasks: up to TASKS of merged columns, TASK or more in each, and all exact
// ones (retained, window, the new token). A task goes through a block of columns at a time (block.h), for the H / G query heads of its kv
// head together:
//     K rows -> scratch -> scores -> online softmax -> V rows -> the same scratch -> y += p V
// and leaves (y, maximum, total) per head; the tasks of a kv head are then joined by log-sum-exp. Queries are rotated before the tasks,
// sums of codes are rotated back when joined. Where tasks start depends on the row's own length alone, so a row's result depends neither on
// its neighbours nor on the number of threads.
#include "block.h"

namespace {

constexpr int TASK = 512, TASKS = 4;        // long ones are fetched ahead, short ones keep cores busy

struct Args : State {       // filled by cache/kernels/cpp.py in this order, eight bytes each
    const char *q, *k, *v; const int64_t* length; const float* threshold; float* y;
    int64_t B, H, index, sliding_window, threads;
};

struct Task { int64_t b, g, first, last; bool exact; };     // columns first .. last of the merged ones, or of retained + window + new token

// One thread's state, and how it turns a task into `out`: y [heads, P], maximum [heads], total [heads].
struct Worker {
    const Args& a;
    const Format &k_codes, &v_codes, plain;
    const Format *k_format = nullptr, *v_format = nullptr;      // of the task at hand
    const int heads, D, P;
    const float* rotated;                   // queries in the basis of the codes [B, H, D]
    int n = 0;                              // columns in the block
    const char *k[BLOCK], *v[BLOCK];
    float k_scale[BLOCK], v_scale[BLOCK];
    Scratch scratch;
    std::vector<float> q, s, k_by, v_by, middle;                // middle: what BYTES add to a score for not being signed
    std::vector<int32_t> q_bytes, p_pairs;
    float *y = nullptr, *top = nullptr, *total = nullptr;

    Worker(const Args& a, const Format& k_codes, const Format& v_codes, int P, const float* rotated)
        : a(a), k_codes(k_codes), v_codes(v_codes), plain((Type)a.dtype, 16, nullptr, FLOATS), heads(a.H / a.G), D(a.D), P(P),
          rotated(rotated), scratch(D, P), q(heads * P), s(heads * BLOCK), k_by(heads), v_by(heads), middle(heads), q_bytes(heads * P / 4),
          p_pairs(heads * BLOCK) {}

    void run(const Task& task, float* out) {
        y = out, top = y + heads * P, total = top + heads;
        std::fill(y, total + heads, 0.f);
        std::fill(top, total, -1e30f);      // finite: exp(-inf - maximum) is 0, never nan
        k_format = task.exact ? &plain : &k_codes, v_format = task.exact ? &plain : &v_codes;
        for (int h = 0; h < heads; h++) {
            const int64_t at = task.b * a.H + task.g * heads + h;
            if (k_format->bits < 16) widen((const char*)(rotated + at * D), F32, D, P, &q[h * P]);
            else widen(a.q + at * plain.bytes(D), plain.type, D, P, &q[h * P]);
            k_by[h] = 1 / std::sqrt((float)D);
            middle[h] = 0;
            if (k_format->form == BYTES) pack_q(h);
        }
        task.exact ? exact_columns(task) : merged_columns(task);
    }

    void merged_columns(const Task& task) {
        const int64_t head = (task.b * a.G + task.g) * a.N, layer = a.index * a.B * a.G * a.N;
        const int64_t k_row = k_codes.bytes(D), v_row = v_codes.bytes(D);
        const char *k_from = a.k_direction + a.k_own * layer * k_row, *v_from = a.v_direction + a.v_own * layer * v_row;
        for (int64_t c = head + task.first, end = head + task.last; c < end; c += BLOCK) {
            const int some = std::min<int64_t>(end - c, BLOCK);
            magnitudes(a.k_magnitude, layer + c, some, k_scale);
            magnitudes(a.v_magnitude, layer + c, some, v_scale);
            int kept = 0;
            if (!a.exact) for (; kept < some; kept++) k[kept] = k_from + (c + kept) * k_row, v[kept] = v_from + (c + kept) * v_row;
            else for (int i = 0; i < some; i++) {
                k[kept] = k_from + (c + i) * k_row, v[kept] = v_from + (c + i) * v_row;
                k_scale[kept] = k_scale[i], v_scale[kept] = v_scale[i], kept += !a.exact[c + i];
            }
            if ((n = kept)) flush();
        }
    }

    void exact_columns(const Task& task) {
        const int64_t head = task.b * a.G + task.g, layer = a.index * a.B * a.G, length = a.length[task.b], row = plain.bytes(D);
        const int64_t from = a.sliding_window ? length - a.sliding_window + 1 : 0;      // first position that is seen
        for (int64_t i = task.first; i < task.last; i++) {
            if (i < a.R) {
                const int64_t slot = head * a.R + i, at = (layer * a.R + slot) * row;
                if (a.retained_score[slot] > (a.threshold ? a.threshold[head] : -INFINITY) && a.retained_pos[slot] >= from)
                    push(a.k_retained + at, a.v_retained + at);
            } else if (i < a.R + a.W) {     // the ring's slot w holds the newest position p < length with p mod W = w
                const int64_t w = i - a.R, at = ((layer + head) * a.W + w) * row;
                if (w < length && length - 1 - (length - 1 - w) % a.W >= from) push(a.k_window + at, a.v_window + at);
            } else {
                push(a.k + head * row, a.v + head * row);
            }
        }
        if (n) flush();
    }

    void magnitudes(const char* of, int64_t at, int some, float* out) const {
        if (!of) std::fill(out, out + some, 1.f);
        else if (a.half_magnitude) widen(of + 2 * at, F16, some, some, out);
        else memcpy(out, of + 4 * at, 4 * some);
    }

    void push(const char* k_row, const char* v_row) {
        k[n] = k_row, v[n] = v_row, k_scale[n] = v_scale[n] = 1;
        if (++n == BLOCK) flush();
    }

    void flush() {      // the block joins (y, maximum, total)
        const float* words = scratch.words.data();
        const auto integers = (const int32_t*)words;
        scratch.fill(k, n, *k_format);
        for (int h = 0; h < heads; h += 8) {
            const int more = std::min(heads - h, 8) - 1;
            if (k_format->form == BYTES) Loops<int32_t>::scores[more](&q_bytes[h * P / 4], integers, n, P / 4, &s[h * BLOCK]);
            else Loops<float>::scores[more](&q[h * P], words, n, P, &s[h * BLOCK]);
        }
        for (int c = n; c < BLOCK; c++) k_scale[c] = 1, v_scale[c] = 0, v[c] = v[0];
        softmax();
        scratch.fill(v, n, *v_format);
        for (int h = 0; h < heads; h += 8) {
            const int more = std::min(heads - h, 8) - 1;
            const int some = std::min(n, BLOCK / 2);
            if (v_format->form == PAIRS) Loops<int32_t>::adds[more](&p_pairs[h * BLOCK], integers, some, P, &v_by[h], y + h * P);
            else Loops<float>::adds[more](&s[h * BLOCK], words, n, P, &v_by[h], y + h * P);
        }
        n = 0;
    }

    // Scores of the block -> probabilities times v_scale, relative to the maximum so far. Three loops, so that the heads' chains overlap.
    void softmax() {
        for (int h = 0; h < heads; h++) {
            float* p = &s[h * BLOCK];
            std::fill(p + n, p + BLOCK, -INFINITY);
            vf most = all(top[h]);
            for (int c = 0; c < BLOCK; c += LANES) {
                const vf x = (load(p + c) - middle[h]) * (load(k_scale + c) * k_by[h]);
                store(p + c, x), most = larger(most, x);
            }
            const float maximum = largest(most);
            if (maximum > top[h]) {
                const float fade = std::exp(top[h] - maximum);
                for (int i = 0; i < P; i++) y[h * P + i] *= fade;
                total[h] *= fade, top[h] = maximum;
            }
        }
        for (int h = 0; h < heads; h++) {
            float* p = &s[h * BLOCK];
            vf part = {}, bound = {};
            for (int c = 0; c < BLOCK; c += LANES) {
                const vf e = exponential(load(p + c) - top[h]), x = e * load(v_scale + c);
                store(p + c, x), part += e, bound = larger(bound, larger(x, -x));
            }
            total[h] += sum(part);
            v_by[h] = v_format->form == PAIRS ? std::max(largest(bound), 1e-30f) / INT_MAX_V : 1;
        }
        if (v_format->form != PAIRS) return;
        for (int h = 0; h < heads; h++) {
            const float *p = &s[h * BLOCK], by = 1 / v_by[h];
            for (int c = 0; c < BLOCK / 2; c += LANES)
                store(&p_pairs[h * BLOCK + c], pair(nearest(load(p + c) * by), nearest(load(p + c + BLOCK / 2) * by)));
            v_by[h] *= v_format->unit;
        }
    }

    void pack_q(int h) {
        typedef int8_t narrow __attribute__((vector_size(LANES)));
        const float* x = &q[h * P];
        vf bound = all(1e-30f);
        for (int i = 0; i < P; i += LANES) bound = larger(bound, larger(load(x + i), -load(x + i)));
        const float unit = largest(bound) / Q_MAX, by = 1 / unit;
        vi total = {};
        for (int i = 0; i < P; i += LANES) {
            const vi n = nearest(load(x + i) * by);
            total += n, store((int8_t*)&q_bytes[h * P / 4] + i, __builtin_convertvector(n, narrow));
        }
        middle[h] = MIDDLE * sum(to_float(total));
        k_by[h] *= unit * k_format->unit;
    }
};

// The tasks of one kv head joined: each counts by exp(its maximum - the largest). What the codes of V give is summed apart, where the
// rotated queries have served, and rotated back.
void join(const Args& a, const Task* task, int64_t n, const float* partial, int64_t size, int P, float* rotated) {
    const int heads = a.H / a.G, D = a.D;
    std::vector<float> back(D);
    for (int h = 0; h < heads; h++) {
        const int64_t at = (task->b * a.H + task->g * heads + h) * D;
        float *y = a.y + at, *of_codes = rotated + at, most = -1e30f, total = 0;
        std::fill(y, y + D, 0.f), std::fill(of_codes, of_codes + D, 0.f);
        for (int64_t t = 0; t < n; t++) most = std::max(most, partial[t * size + heads * P + h]);
        for (int64_t t = 0; t < n; t++) {
            const float *part = partial + t * size, by = std::exp(part[heads * P + h] - most);
            float* to = !task[t].exact && a.v_bits < 16 ? of_codes : y;
            for (int i = 0; i < D; i++) to[i] += by * part[h * P + i];
            total += by * part[heads * P + heads + h];
        }
        if (a.v_bits < 16) score<float, 1>(of_codes, a.rotation, D, D, &back[0]);       // of_codes @ rotation^T
        for (int i = 0; i < D; i++) y[i] = (y[i] + back[i]) / total;
    }
}

}  // namespace

extern "C" void attend(const Args* args) {
    const Args& a = *args;
    const int P = (a.D + 31) / 32 * 32;
    const Format k_codes((Type)a.dtype, a.k_bits, a.k_levels, BYTES), v_codes((Type)a.dtype, a.v_bits, a.v_levels, PAIRS);
    std::vector<Task> tasks;
    std::vector<size_t> first;      // of each kv head
    for (int64_t b = 0; b < a.B; b++) {
        const int64_t length = a.length[b], end = std::clamp<int64_t>(length - a.W, 0, a.N), exact = a.R + a.W + 1;
        const int64_t start = a.sliding_window ? std::max<int64_t>(length - a.sliding_window + 1, 0) : 0;
        const int64_t task = std::max<int64_t>((end - start + TASKS - 1) / TASKS, TASK);
        for (int64_t g = 0; g < a.G; g++) {
            first.push_back(tasks.size());
            for (int64_t c = start; c < end; c += task) tasks.push_back({b, g, c, std::min(c + task, end), false});
            for (int64_t c = 0; c < exact; c += TASK) tasks.push_back({b, g, c, std::min(c + TASK, exact), true});
        }
    }
    first.push_back(tasks.size());
    const int64_t size = a.H / a.G * (P + 2), n_tasks = tasks.size(), n_heads = a.B * a.G;
    static thread_local std::vector<float> partial;     // kept between calls: fresh pages cost more than the arithmetic on them
    const int64_t need = size * n_tasks + a.B * a.H * a.D;
    if ((int64_t)partial.size() < need) partial.resize(need);
    float *out = partial.data(), *rotated = out + size * n_tasks;
#pragma omp parallel num_threads((int)std::min(a.threads, n_tasks))
    {
        Worker worker(a, k_codes, v_codes, P, rotated);
#pragma omp for
        for (int64_t i = 0; i < (a.k_bits < 16 ? a.B * a.H : 0); i++) {
            widen(a.q + i * worker.plain.bytes(a.D), worker.plain.type, a.D, P, &worker.q[0]);
            rotate(&worker.q[0], a.rotation, a.D, 1, rotated + i * a.D);
        }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < n_tasks; t++) worker.run(tasks[t], out + t * size);
#pragma omp for
        for (int64_t i = 0; i < n_heads; i++)
            join(a, &tasks[first[i]], first[i + 1] - first[i], out + first[i] * size, size, P, rotated);
    }
}
