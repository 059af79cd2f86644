/* Group norm, modulated, SiLU and dropout in one pass, for features in channels-last order: float if FLOAT32 is
 * defined, else bfloat16.
 *
 *     h = (x + added - mean) / sqrt(variance + eps)
 *     z = h * gain + offset,  gain = weight * (1 + scale),  offset = bias * (1 + scale) + shift
 *     y = z * sigmoid(z), or z;  with dropout p, y = y / (1 - p) with probability 1 - p, else 0
 *
 * Features are [samples, pixels, channels]. `added` [samples, channels] or `scale_shift` [samples, 2 channels], of
 * the same type, may be null. What lies in between is float, and sums over more than BLOCK pixels are double. Each
 * sample and channel is computed in the same order for any number of threads.
 */
#include <math.h>
#include <stdint.h>

#define BLOCK 1024

#ifdef FLOAT32

typedef float real;

static inline float widen(real value) { return value; }
static inline real narrow(float value) { return value; }

#else

typedef uint16_t real;

static inline float widen(real value) {
    union { uint32_t bits; float number; } word = {(uint32_t)value << 16};
    return word.number;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline real narrow(float value) {
    union { float number; uint32_t bits; } word = {value};
    real rounded = (real)((word.bits + 0x7fff + ((word.bits >> 16) & 1)) >> 16);
    return value == value ? rounded : 0x7fc0;
}

#endif

/* exp(x) by 2^n exp(r), with |r| <= log(2) / 2 and a Taylor polynomial of degree 6: relative error 2e-7.
 * x is limited to [-87, 87], and NaN becomes -87. */
static inline float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 87.0f ? x : 87.0f;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log(2) in two parts */
    float p = 1 / 120.0f + r * (1 / 720.0f);
    p = 1.0f + r * (1.0f + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * p))));
    union { uint32_t bits; float number; } power = {(uint32_t)((int32_t)n + 127) << 23};
    return p * power.number;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

typedef struct {
    int64_t samples, pixels, channels, groups;
    int64_t threads, parts; /* the groups of a sample are divided in parts, so that few samples keep all threads busy */
    uint64_t seed;          /* of the dropout */
    float eps, dropout;
    int32_t activation;
} Arguments;

/* The finalizer of MurmurHash3 for 64 bits: equally distributed words from a counter. */
static inline uint64_t hashed(uint64_t word) {
    word = (word ^ (word >> 33)) * 0xff51afd7ed558ccdu;
    word = (word ^ (word >> 33)) * 0xc4ceb9fe1a85ec53u;
    return word ^ (word >> 33);
}

/* Multiply the features of a pixel by 0 or 1 / (1 - p). The mask is a function of seed, sample, pixel and channel,
 * so that the backward pass computes it again. */
static inline void drop(const Arguments *call, int64_t sample, int64_t pixel, int64_t first, int64_t last,
                        float *restrict row) {
    const uint64_t key = hashed(hashed(call->seed + (uint64_t)sample) + (uint64_t)pixel);
    const uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    const uint32_t limit = (uint32_t)(call->dropout * 4294967296.0);
    const float factor = 1.0f / (1.0f - call->dropout);
    for (int64_t c = first; c < last; c++) {
        uint32_t word = ((uint32_t)c * 0x9e3779b9u) ^ low;
        word = (word ^ (word >> 16)) * 0x7feb352du + high;
        word = (word ^ (word >> 15)) * 0x846ca68bu;
        word ^= word >> 16;
        row[c] *= word < limit ? 0.0f : factor;
    }
}

/* Add sums of a block to the totals, and set them to zero. */
static inline void collect(float *restrict sums, double *restrict totals, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; c++) {
        totals[c] += sums[c];
        sums[c] = 0.0f;
    }
}

static inline int64_t end_of_block(int64_t start, int64_t pixels) {
    return start + BLOCK < pixels ? start + BLOCK : pixels;
}

/* Coefficients of channels first..last - 1 of a sample: h = (x - mean) * rate, z = h * gain + offset. */
static inline void coefficients(const Arguments *call, int64_t sample, int64_t first, int64_t last,
                                const float *weight, const float *bias, const real *added, const real *scale_shift,
                                const float *stats, float *restrict mean, float *restrict rate,
                                float *restrict gain, float *restrict offset) {
    const int64_t channels = call->channels, size = channels / call->groups;
    for (int64_t c = first; c < last; c++) {
        const float *of_group = stats + 2 * (sample * call->groups + c / size);
        mean[c] = of_group[0] - (added ? widen(added[sample * channels + c]) : 0.0f);
        rate[c] = of_group[1];
        float scale = scale_shift ? widen(scale_shift[2 * sample * channels + c]) : 0.0f;
        float shift = scale_shift ? widen(scale_shift[(2 * sample + 1) * channels + c]) : 0.0f;
        gain[c] = weight[c] * (1.0f + scale);
        offset[c] = bias[c] * (1.0f + scale) + shift;
    }
}

/* Writes y, and `stats` [samples, groups, 2]: mean and 1 / sqrt(variance + eps) of each group. */
static void part_forward(const Arguments *call, int64_t sample, int64_t first, int64_t last, const real *restrict x,
                         const float *weight, const float *bias, const real *added, const real *scale_shift,
                         real *restrict y, float *stats) {
    const int64_t channels = call->channels, pixels = call->pixels, size = channels / call->groups;
    const double count = (double)pixels * size;
    float sum[channels], mean[channels], rate[channels], gain[channels], offset[channels];
    double total[channels];
    for (int64_t c = first; c < last; c++) sum[c] = 0.0f, total[c] = 0.0;
    for (int64_t block = 0; block < pixels; block += BLOCK) {
        for (int64_t p = block; p < end_of_block(block, pixels); p++)
            for (int64_t c = first; c < last; c++) sum[c] += widen(x[p * channels + c]);
        collect(sum, total, first, last);
    }
    for (int64_t g = first / size; g < last / size; g++) {
        double of_group = 0.0;
        for (int64_t c = g * size; c < (g + 1) * size; c++)
            of_group += total[c] + (added ? (double)pixels * widen(added[sample * channels + c]) : 0.0);
        float centre = stats[2 * (sample * call->groups + g)] = (float)(of_group / count);
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            mean[c] = centre - (added ? widen(added[sample * channels + c]) : 0.0f);
            total[c] = 0.0;
        }
    }
    /* A second pass: E[x^2] - E[x]^2 would cancel. */
    for (int64_t block = 0; block < pixels; block += BLOCK) {
        for (int64_t p = block; p < end_of_block(block, pixels); p++)
            for (int64_t c = first; c < last; c++) {
                float centred = widen(x[p * channels + c]) - mean[c];
                sum[c] += centred * centred;
            }
        collect(sum, total, first, last);
    }
    for (int64_t g = first / size; g < last / size; g++) {
        double of_group = 0.0;
        for (int64_t c = g * size; c < (g + 1) * size; c++) of_group += total[c];
        const float variance = (float)(of_group / count);
        /* A sum beyond float must not look like a norm: 1 / sqrt(infinity) is 0. */
        stats[2 * (sample * call->groups + g) + 1] = variance < INFINITY ? 1.0f / sqrtf(variance + call->eps) : NAN;
    }
    coefficients(call, sample, first, last, weight, bias, added, scale_shift, stats, mean, rate, gain, offset);
    for (int64_t c = first; c < last; c++) gain[c] *= rate[c];
    float *restrict row = sum;
    for (int64_t p = 0; p < pixels; p++) {
        for (int64_t c = first; c < last; c++) row[c] = (widen(x[p * channels + c]) - mean[c]) * gain[c] + offset[c];
        if (call->activation)
            for (int64_t c = first; c < last; c++) row[c] *= sigmoid(row[c]);
        if (call->dropout > 0.0f) drop(call, sample, p, first, last, row);
        for (int64_t c = first; c < last; c++) y[p * channels + c] = narrow(row[c]);
    }
}

/* Writes dx; and for each channel of the sample the sums of dz * h and dz, and of dx if `added`. */
static void part_backward(const Arguments *call, int64_t sample, int64_t first, int64_t last, const real *restrict x,
                          const real *restrict dy, const float *weight, const float *bias, const real *added,
                          const real *scale_shift, const float *stats, real *restrict dx, float *dgain, float *doffset,
                          real *dadded) {
    const int64_t channels = call->channels, pixels = call->pixels, size = channels / call->groups;
    const double count = (double)pixels * size;
    float mean[channels], rate[channels], gain[channels], offset[channels], row[channels], of_dz[channels];
    float of_dz_h[channels];
    double total_dz[channels], total_dz_h[channels];
    coefficients(call, sample, first, last, weight, bias, added, scale_shift, stats, mean, rate, gain, offset);
    for (int64_t c = first; c < last; c++) of_dz[c] = of_dz_h[c] = 0.0f, total_dz[c] = total_dz_h[c] = 0.0;
    for (int64_t block = 0; block < pixels; block += BLOCK) {
        for (int64_t p = block; p < end_of_block(block, pixels); p++) {
            for (int64_t c = first; c < last; c++) row[c] = widen(dy[p * channels + c]);
            if (call->dropout > 0.0f) drop(call, sample, p, first, last, row);
            if (call->activation)
                for (int64_t c = first; c < last; c++) {
                    float z = (widen(x[p * channels + c]) - mean[c]) * rate[c] * gain[c] + offset[c];
                    float s = sigmoid(z);
                    row[c] *= s * (1.0f + z * (1.0f - s));
                }
            /* dz is kept in the place of dx, rounded, so that the second pass needs no exponentials. */
            for (int64_t c = first; c < last; c++) {
                real rounded = narrow(row[c]);
                float dz = widen(rounded);
                of_dz_h[c] += dz * ((widen(x[p * channels + c]) - mean[c]) * rate[c]);
                of_dz[c] += dz;
                dx[p * channels + c] = rounded;
            }
        }
        collect(of_dz, total_dz, first, last);
        collect(of_dz_h, total_dz_h, first, last);
    }
    float *restrict slope = of_dz;
    for (int64_t g = first / size; g < last / size; g++) {
        double of_group = 0.0, of_group_h = 0.0;
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            of_group += gain[c] * total_dz[c];
            of_group_h += gain[c] * total_dz_h[c];
        }
        /* dx = rate * (gain * dz - mean(gain * dz) - h * mean(gain * dz * h)),
         * as (x - mean) * slope + offset + dz * gain. */
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            dgain[c] = (float)total_dz_h[c];
            doffset[c] = (float)total_dz[c];
            slope[c] = -rate[c] * rate[c] * (float)(of_group_h / count);
            offset[c] = -rate[c] * (float)(of_group / count);
            gain[c] *= rate[c];
            row[c] = 0.0f;
            total_dz[c] = 0.0;
        }
    }
    for (int64_t block = 0; block < pixels; block += BLOCK) {
        for (int64_t p = block; p < end_of_block(block, pixels); p++)
            for (int64_t c = first; c < last; c++) {
                float dz = widen(dx[p * channels + c]);
                float value = dz * gain[c] + ((widen(x[p * channels + c]) - mean[c]) * slope[c] + offset[c]);
                row[c] += value;
                dx[p * channels + c] = narrow(value);
            }
        collect(row, total_dz, first, last);
    }
    if (dadded)
        for (int64_t c = first; c < last; c++) dadded[sample * channels + c] = narrow((float)total_dz[c]);
}

static inline int64_t boundary(const Arguments *call, int64_t part) {
    return part * call->groups / call->parts * (call->channels / call->groups);
}

void group_norm_forward(const Arguments *call, const real *x, const float *weight, const float *bias,
                        const real *added, const real *scale_shift, real *y, float *stats) {
    const int64_t size = call->pixels * call->channels;
#pragma omp parallel for schedule(static) num_threads(call->threads)
    for (int64_t unit = 0; unit < call->samples * call->parts; unit++) {
        const int64_t sample = unit / call->parts, part = unit % call->parts;
        part_forward(call, sample, boundary(call, part), boundary(call, part + 1), x + sample * size, weight, bias,
                     added, scale_shift, y + sample * size, stats);
    }
}

/* `sums` [2, samples, channels] holds dgain and doffset of each sample. */
void group_norm_backward(const Arguments *call, const real *x, const real *dy, const float *weight, const float *bias,
                         const real *added, const real *scale_shift, const float *stats, real *dx, float *dweight,
                         float *dbias, real *dadded, real *dscale_shift, float *sums) {
    const int64_t channels = call->channels, size = call->pixels * channels;
    float *dgains = sums, *doffsets = sums + call->samples * channels;
#pragma omp parallel for schedule(static) num_threads(call->threads)
    for (int64_t unit = 0; unit < call->samples * call->parts; unit++) {
        const int64_t sample = unit / call->parts, part = unit % call->parts;
        part_backward(call, sample, boundary(call, part), boundary(call, part + 1), x + sample * size,
                      dy + sample * size, weight, bias, added, scale_shift, stats, dx + sample * size,
                      dgains + sample * channels, doffsets + sample * channels, dadded);
    }
    for (int64_t c = 0; c < channels; c++) dweight[c] = dbias[c] = 0.0f;
    for (int64_t sample = 0; sample < call->samples; sample++) {
        const float *dgain = dgains + sample * channels, *doffset = doffsets + sample * channels;
        for (int64_t c = 0; c < channels; c++) {
            float factor = 1.0f + (scale_shift ? widen(scale_shift[2 * sample * channels + c]) : 0.0f);
            dweight[c] += factor * dgain[c];
            dbias[c] += factor * doffset[c];
            if (dscale_shift) {
                dscale_shift[2 * sample * channels + c] = narrow(weight[c] * dgain[c] + bias[c] * doffset[c]);
                dscale_shift[(2 * sample + 1) * channels + c] = narrow(doffset[c]);
            }
        }
    }
}
