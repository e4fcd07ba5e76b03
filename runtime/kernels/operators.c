/* Operators of ONNX Runtime in the domain "kvx", for CPUs: attention of one token, products and lookups.
 *
 * Letters: B rows, G sentences that share them (B = G · k), H heads, D head width (a multiple of 8), E = H · D,
 * T capacity of a row's cache, S source positions, K inputs and N outputs of a product, V vocabulary.
 *
 *   SelfAttention    packed queries, keys, values [B, 3·E], past key, value [B, H, T, D], past lengths [B] int64, a bias
 *                    of scores [B or 1, H, 1, T] or nothing → attended [B, E], present key, value [B, H, T, D], which
 *                    may be the very past: one position of each row is written.
 *   CodedSelfAttention  the same with past and present key, value [B, H, T, D + 4] int8: each in codes of 8 bits, and
 *                    behind them their step, a float32.
 *   SourceAttention  query [B, E], key, value [G, H, S, D], source lengths [G] int64 → attended [B, E].
 *   BytesProduct     x [..., K], weights of 7 bits in panels [N/16, K/4, 16, 4] int8, their sums [N] int32 and scales
 *                    [N], a bias [N] or nothing, a residual [..., N] or nothing, a step or nothing → [..., N]. Each row
 *                    is rounded to 8 bits: in steps by its own largest magnitude, or in the given one.
 *   NibblesProduct   x [..., K], weights of 4 bits in panels and blocks [N/16, K/128, 16, 16, 4] uint8, their scales
 *                    [N/16, K/128, 16], a bias [N] or nothing, a residual [..., N] or nothing → [..., N]. Each block of a
 *                    row is rounded to 8 bits, in steps by its own largest magnitude.
 *   BytesLookup, NibblesLookup  ids [...] int64, weights and scales of a product with [V, E] → its rows
 *                    [..., E].
 *
 * Every row's numbers are the same to the last bit, whoever is beside it and whatever the threads.
 */
#include "onnxruntime.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline))
#define LANES 8
#define CHUNK 512      /* positions of attention at a time */
#define PANEL 16       /* outputs of a product at a time */
#define GROUP 4        /* inputs beside each other */
#define PAIR 8         /* two groups, whose weights of 4 bits share bytes */
#define BLOCK 128      /* inputs with scales of their own where weights have 4 bits */
#define HALF_NIBBLE 8  /* the weight of 4 bits that stands for 0 */
#define TILE_ROWS 4
#define CACHE_LINE 64
#define MOST_FORESEEN 8192 /* bytes of keys, and of values; what is longer the processor foresees */
#define MANY_TILES 8 /* of rows: time enough for weights to come */
#define MOST_CODE 127  /* of a signed code of 8 bits */
#define STEP_BYTES 4   /* of the step behind a key or value in codes */
#define ROUNDING 12582912.0f /* 1.5 · 2^23: what is added to it is rounded to a whole number */
#define WORTH_A_THREAD 300000 /* multiplications below which other threads are not woken */
#define MOST_AXES 8
#define LARGEST 1048576 /* heads, and their width: sizes of them do not overflow */

typedef float floats __attribute__((vector_size(32)));
typedef int32_t words __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(32)));
typedef float loose_floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t loose_words __attribute__((vector_size(32), aligned(4), may_alias));
typedef int8_t loose_codes __attribute__((vector_size(8), aligned(1), may_alias));

#define ALL(x) ((floats){x, x, x, x, x, x, x, x})
#define ALL_WORDS(x) ((words){x, x, x, x, x, x, x, x})
#define ORDER ((words){0, 1, 2, 3, 4, 5, 6, 7})
#define CHOOSE_WORDS(mask, yes, no) (((mask) & (yes)) | (~(mask) & (no)))
#define CHOOSE(mask, yes, no) ((floats)CHOOSE_WORDS((words)(mask), (words)(yes), (words)(no)))
#define LOAD(from) (*(const loose_floats *)(from))
#define LOAD_WORDS(from) (*(const loose_words *)(from))
#define STORE(to, x) (*(loose_floats *)(to) = (x))
#if defined(__clang__)
#define SHUFFLE __builtin_shufflevector
#define SHUFFLE_BYTES __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#define SHUFFLE_BYTES(a, b, ...) __builtin_shuffle(a, b, (bytes){__VA_ARGS__})
#endif
#define BYTES(x, a, b, c, d, e, f, g, h)                                                                             \
    SHUFFLE_BYTES((bytes)(x), (bytes)(x), a, b, c, d, e, f, g, h, a, b, c, d, e, f, g, h, a, b, c, d, e, f, g, h, a, \
                  b, c, d, e, f, g, h)
#define LOWEST_BYTES(x) BYTES(x, 0, 4, 8, 12, 16, 20, 24, 28) /* of each word */
#define EVEN_LOWEST_BYTES(x) BYTES(x, 0, 8, 16, 24, 4, 12, 20, 28)

/* Rows in codes, and what they are multiplied with. */
typedef struct Product {
    const void *weights;
    const float *scales, *bias, *residual;
    const int32_t *sums; /* of each output's weights */
    void *codes;
    float *steps, *result;
    int32_t *code_sums; /* of the codes of each block */
    int64_t rows, inputs, outputs;
    int64_t groups; /* of the inputs, or blocks of them */
    int32_t zero;   /* the code of 0 in the rows */
    bool positive;
} Product;

typedef struct Arithmetic {
    const char *name;
    void (*attend)(const float *, const void *, const void *, const float *, int64_t, int64_t, float *);
    void (*attend_coded)(const float *, const void *, const void *, const float *, int64_t, int64_t, float *);
    float (*peak)(const float *, int64_t);
    void (*quantize)(const float *, int64_t, float, int32_t, int32_t, uint8_t *);
    int32_t (*quantize_block)(const float *, float, int8_t *);
    void (*bytes_panel)(const Product *, int64_t);
    void (*nibbles_panel)(const Product *, int64_t);
} Arithmetic;

#define ARITHMETIC(set, called)                                                                              \
    {                                                                                                        \
        called, attend_##set, attend_coded_##set, peak_##set, quantize_##set, quantize_block_##set,          \
            bytes_panel_##set, nibbles_panel_##set                                                           \
    }

/* One set of instructions after the other; GCC and Clang spell it differently. */
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(set) PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(set) PRAGMA(GCC push_options) PRAGMA(GCC target(set))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define NAME(x) x##_plain
#include "products.inc"
#include "arithmetic.inc"
static const Arithmetic plain = ARITHMETIC(plain, "plain");
#undef NAME

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma")
#define TILE_AVX2
#define NAME(x) x##_avx2
#include "products.inc"
#include "arithmetic.inc"
#undef NAME
#undef TILE_AVX2
END_TARGET
static const Arithmetic avx2 = ARITHMETIC(avx2, "AVX2");

BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")
#define TILE_VNNI
#define NAME(x) x##_vnni
#include "products.inc"
#include "arithmetic.inc"
#undef NAME
#undef TILE_VNNI
END_TARGET
static const Arithmetic vnni = ARITHMETIC(vnni, "AVX-512 VNNI");
#endif

static const Arithmetic *use = NULL; /* by `chosen`, before anything runs */
static const OrtApi *api;

#define TRY(call)                          \
    do {                                   \
        OrtStatus *status = (call);        \
        if (status != NULL) return status; \
    } while (0)

static OrtStatus *refuse(const char *why) { return CreateStatus(INVALID_ARGUMENT, why); }

typedef struct Tensor {
    void *data; /* NULL where an optional input is missing */
    size_t axes;
    int64_t sizes[MOST_AXES];
} Tensor;

static OrtStatus *get_input(OrtKernelContext *context, size_t index, Tensor *tensor) {
    const OrtValue *value = NULL;
    size_t inputs = 0;
    memset(tensor, 0, sizeof *tensor);
    TRY(KernelContext_GetInputCount(context, &inputs));
    if (index >= inputs) return NULL;
    TRY(KernelContext_GetInput(context, index, &value));
    if (value == NULL) return NULL;
    OrtShape *shape = NULL;
    TRY(GetTensorTypeAndShape(value, &shape));
    OrtStatus *status = GetDimensionsCount(shape, &tensor->axes);
    if (status == NULL && tensor->axes > MOST_AXES) status = refuse("kvx: a tensor has more than 8 axes");
    if (status == NULL) status = GetDimensions(shape, tensor->sizes, tensor->axes);
    ReleaseTensorTypeAndShapeInfo(shape);
    if (status == NULL) status = GetTensorMutableData(value, &tensor->data);
    return status;
}

static OrtStatus *get_output(OrtKernelContext *context, size_t index, const int64_t *sizes, size_t axes, void **data) {
    OrtValue *value = NULL;
    TRY(KernelContext_GetOutput(context, index, sizes, axes, &value));
    return GetTensorMutableData(value, data);
}

static int64_t elements(const Tensor *tensor) {
    int64_t count = 1;
    for (size_t axis = 0; axis < tensor->axes; axis++) count *= tensor->sizes[axis];
    return count;
}

/* Does `task` for 0 … count − 1, by several threads of the session where the work is worth waking them. */
static OrtStatus *share(
    OrtKernelContext *context, void (*task)(void *, size_t), int64_t count, double work, void *data
) {
    if (count > 1 && work >= WORTH_A_THREAD) return KernelContext_ParallelFor(context, task, (size_t)count, 0, data);
    for (int64_t i = 0; i < count; i++) task(data, (size_t)i);
    return NULL;
}

static bool is_finite(float peak) { return peak <= 3.4028235e38f; }

/* Attention of each row and head. */

typedef struct Attending {
    const float *query, *bias;
    char *key, *value;
    float *attended;
    const int64_t *lengths;
    int64_t all; /* heads of all rows */
    int64_t heads, width, capacity, query_stride, rows_a_sentence;
    int64_t held;       /* bytes of a key or value in the cache */
    bool caching;       /* the new key and value stand behind the query */
    bool coded;         /* keys and values are in codes */
    bool biased_by_row; /* the bias is not that of all rows */
} Attending;

/* A key or value [width] → what the cache holds of it: the numbers, or codes in steps of the largest magnitude / 127. */
static void hold(const Attending *of, const float *from, char *to) {
    if (!of->coded) {
        memcpy(to, from, (size_t)of->held);
        return;
    }
    const float peak = use->peak(from, of->width);
    const float step = (peak > 0 ? peak : 1.0f) / MOST_CODE, kept = is_finite(peak) ? step : NAN;
    use->quantize(from, of->width, 1.0f / step, MOST_CODE + 1, 1, (uint8_t *)to);
    for (int64_t d = 0; d < of->width; d++) to[d] = (char)(to[d] ^ 0x80); /* the code of 0 is 0 */
    memcpy(to + of->width, &kept, STEP_BYTES);
}

/* Asks for the keys and values of the next head. With room left behind them, the processor does not foresee them itself.
 * Always inline: GCC drops calls that do nothing but ask.
 */
static inline INLINE void foresee_head(const Attending *of, int64_t index) {
    const int64_t sentence = index / of->heads / of->rows_a_sentence, head = index % of->heads;
    const int64_t start = (sentence * of->heads + head) * of->capacity * of->held, size = of->lengths[sentence] * of->held;
    const int64_t asked = size < MOST_FORESEEN ? size : MOST_FORESEEN;
    for (int64_t byte = 0; byte < asked; byte += CACHE_LINE) __builtin_prefetch(of->key + start + byte, 0, 2);
    for (int64_t byte = 0; byte < asked; byte += CACHE_LINE) __builtin_prefetch(of->value + start + byte, 0, 2);
}

static void attend_head(void *data, size_t index) {
    const Attending *of = data;
    if ((int64_t)index + 1 < of->all) foresee_head(of, (int64_t)index + 1);
    const int64_t row = (int64_t)index / of->heads, head = (int64_t)index % of->heads, width = of->width;
    const int64_t sentence = row / of->rows_a_sentence, size = of->heads * width;
    const float *query = of->query + row * of->query_stride + head * width;
    char *key = of->key + (sentence * of->heads + head) * of->capacity * of->held;
    char *value = of->value + (sentence * of->heads + head) * of->capacity * of->held;
    float *attended = of->attended + row * size + head * width;
    int64_t count = of->lengths[sentence];
    if (of->caching) {
        hold(of, query + size, key + count * of->held);
        hold(of, query + 2 * size, value + count * of->held);
        count++;
    }
    const float *bias = NULL;
    if (of->bias) bias = of->bias + ((of->biased_by_row ? row : 0) * of->heads + head) * of->capacity;
    if (count == 0)
        memset(attended, 0, (size_t)width * sizeof(float));
    else
        (of->coded ? use->attend_coded : use->attend)(query, key, value, bias, count, width, attended);
}

static OrtStatus *attend_heads(OrtKernelContext *context, Attending *of, int64_t rows, int64_t sentences) {
    double work = 0;
    for (int64_t i = 0; i < sentences; i++) {
        const int64_t length = of->lengths[i];
        if (length < 0 || length > of->capacity - of->caching) return refuse("kvx: a length beyond the cache");
        work += (double)(length + 1) * of->rows_a_sentence * of->heads * of->width * 2;
    }
    of->all = rows * of->heads;
    return share(context, attend_head, of->all, work, of);
}

typedef struct Kernel {
    int64_t heads, width, rows; /* width of the result, rows of a table */
    int64_t positive_in, positive_out;
} Kernel;

/* Whether key and value are a cache of so many heads; `beside` is how much wider than a head its rows are. */
static bool is_cache(const Tensor *key, const Tensor *value, int64_t heads, int64_t beside) {
    const int64_t width = key->axes == 4 ? key->sizes[3] - beside : 0;
    return width >= LANES && width <= LARGEST && width % LANES == 0 && heads >= 1 && heads <= LARGEST &&
           value->axes == 4 && memcmp(key->sizes, value->sizes, 4 * sizeof(int64_t)) == 0 && key->sizes[1] == heads;
}

static OrtStatus *attend_cached(void *kernel, OrtKernelContext *context, bool coded) {
    const int64_t beside = coded ? STEP_BYTES : 0;
    const int64_t heads = ((Kernel *)kernel)->heads;
    Tensor packed, key, value, lengths, bias;
    TRY(get_input(context, 0, &packed));
    TRY(get_input(context, 1, &key));
    TRY(get_input(context, 2, &value));
    TRY(get_input(context, 3, &lengths));
    TRY(get_input(context, 4, &bias));
    if (!is_cache(&key, &value, heads, beside))
        return refuse("kvx.SelfAttention: the cache is not [B, H, T, D], D a multiple of 8, or [B, H, T, D + 4] in codes");
    const int64_t rows = key.sizes[0], capacity = key.sizes[2], width = key.sizes[3] - beside, size = heads * width;
    if (elements(&packed) != rows * 3 * size || elements(&lengths) != rows)
        return refuse("kvx.SelfAttention: queries, lengths and cache are of different sizes");
    if (bias.data && elements(&bias) != heads * capacity && elements(&bias) != rows * heads * capacity)
        return refuse("kvx.SelfAttention: the bias is not [B or 1, H, 1, T]");
    int64_t sizes[2] = {rows, size};
    void *attended, *present_key, *present_value;
    TRY(get_output(context, 0, sizes, 2, &attended));
    TRY(get_output(context, 1, key.sizes, 4, &present_key));
    TRY(get_output(context, 2, value.sizes, 4, &present_value));
    const int64_t held = coded ? width + STEP_BYTES : width * (int64_t)sizeof(float);
    const size_t all = (size_t)(rows * heads * capacity * held);
    if (present_key != key.data) memcpy(present_key, key.data, all);
    if (present_value != value.data) memcpy(present_value, value.data, all);
    Attending of = {
        .query = packed.data, .bias = bias.data, .key = present_key, .value = present_value, .attended = attended,
        .lengths = lengths.data, .heads = heads, .width = width, .capacity = capacity, .query_stride = 3 * size,
        .rows_a_sentence = 1, .held = held, .caching = true, .coded = coded,
        .biased_by_row = elements(&bias) != heads * capacity,
    };
    return attend_heads(context, &of, rows, rows);
}

static OrtStatus *self_attention(void *kernel, OrtKernelContext *context) {
    return attend_cached(kernel, context, false);
}

static OrtStatus *coded_self_attention(void *kernel, OrtKernelContext *context) {
    return attend_cached(kernel, context, true);
}

static OrtStatus *source_attention(void *kernel, OrtKernelContext *context) {
    const int64_t heads = ((Kernel *)kernel)->heads;
    Tensor query, key, value, lengths;
    TRY(get_input(context, 0, &query));
    TRY(get_input(context, 1, &key));
    TRY(get_input(context, 2, &value));
    TRY(get_input(context, 3, &lengths));
    if (!is_cache(&key, &value, heads, 0))
        return refuse("kvx.SourceAttention: keys are not [G, H, S, D], D a multiple of 8");
    const int64_t sentences = key.sizes[0], width = key.sizes[3], size = heads * width;
    const int64_t rows = size ? elements(&query) / size : 0;
    if (elements(&lengths) != sentences || elements(&query) != rows * size || sentences == 0 || rows % sentences)
        return refuse("kvx.SourceAttention: queries, lengths and keys are of different sizes");
    int64_t sizes[2] = {rows, size};
    void *attended;
    TRY(get_output(context, 0, sizes, 2, &attended));
    Attending of = {
        .query = query.data, .key = key.data, .value = value.data, .attended = attended, .lengths = lengths.data,
        .heads = heads, .width = width, .capacity = key.sizes[2], .query_stride = size,
        .rows_a_sentence = rows / sentences, .held = width * (int64_t)sizeof(float),
    };
    return attend_heads(context, &of, rows, sentences);
}

/* Products. */

typedef struct Multiplying {
    Product product;
    const float *x;
    const float *fixed; /* the step of all rows, or NULL */
} Multiplying;

/* A row in codes: by its own largest magnitude, or in fixed steps. What is not finite makes all its outputs NaN. */
static void quantize_row(void *data, size_t index) {
    const Multiplying *of = data;
    const Product *to = &of->product;
    const float *x = of->x + (int64_t)index * to->inputs;
    const float peak = use->peak(x, to->inputs), levels = to->zero ? MOST_CODE : 255;
    const float step = of->fixed ? *of->fixed : (peak > 0 ? peak : 1.0f) / levels;
    uint8_t *codes = (uint8_t *)to->codes + (int64_t)index * to->groups * GROUP;
    use->quantize(x, to->inputs, 1.0f / step, to->zero, to->zero ? 1 : 0, codes);
    to->steps[index] = is_finite(peak) ? step : NAN;
}

/* A row in signed codes, each block by its own largest magnitude. */
static void quantize_blocks(void *data, size_t index) {
    const Multiplying *of = data;
    const Product *to = &of->product;
    for (int64_t block = 0; block < to->groups; block++) {
        const int64_t place = (int64_t)index * to->groups + block, left = to->inputs - block * BLOCK;
        const float *x = of->x + (int64_t)index * to->inputs + block * BLOCK;
        float filled[BLOCK] = {0};
        if (left < BLOCK) x = memcpy(filled, x, (size_t)left * sizeof(float));
        const float peak = use->peak(x, BLOCK), step = (peak > 0 ? peak : 1.0f) / MOST_CODE;
        to->code_sums[place] = use->quantize_block(x, 1.0f / step, (int8_t *)to->codes + place * BLOCK);
        to->steps[place] = is_finite(peak) ? step : NAN;
    }
}

static void multiply_bytes(void *data, size_t index) {
    use->bytes_panel(&((Multiplying *)data)->product, (int64_t)index);
}

static void multiply_nibbles(void *data, size_t index) {
    use->nibbles_panel(&((Multiplying *)data)->product, (int64_t)index);
}

/* Quantises the rows, and multiplies them with one panel after the other. */
static OrtStatus *multiply(
    OrtKernelContext *context, Multiplying *of, Tensor *x, int64_t codes, int64_t steps,
    void (*quantize)(void *, size_t), void (*panel)(void *, size_t)
) {
    Product *to = &of->product;
    const double work = (double)to->rows * (double)to->inputs;
    x->sizes[x->axes - 1] = to->outputs;
    TRY(get_output(context, 0, x->sizes, x->axes, (void **)&to->result));
    if (to->rows == 0) return NULL;
    to->steps = malloc((size_t)steps * (sizeof(float) + sizeof(int32_t)) + (size_t)codes);
    if (to->steps == NULL) return CreateStatus(FAIL, "kvx: failed to allocate memory for a product");
    to->code_sums = (int32_t *)(to->steps + steps);
    to->codes = to->code_sums + steps;
    OrtStatus *status = share(context, quantize, to->rows, work, of);
    const int64_t panels = (to->outputs + PANEL - 1) / PANEL;
    if (status == NULL) status = share(context, panel, panels, work * (double)to->outputs, of);
    free(to->steps);
    return status;
}

static OrtStatus *bytes_product(void *kernel, OrtKernelContext *context) {
    const Kernel *with = kernel;
    const int64_t outputs = with->width;
    Tensor x, weights, sums, scales, bias, residual, fixed;
    TRY(get_input(context, 0, &x));
    TRY(get_input(context, 1, &weights));
    TRY(get_input(context, 2, &sums));
    TRY(get_input(context, 3, &scales));
    TRY(get_input(context, 4, &bias));
    TRY(get_input(context, 5, &residual));
    TRY(get_input(context, 6, &fixed));
    const int64_t inputs = x.axes ? x.sizes[x.axes - 1] : 0, groups = (inputs + GROUP - 1) / GROUP;
    if (weights.axes != 4 || inputs == 0 || outputs < 1 || weights.sizes[0] != (outputs + PANEL - 1) / PANEL ||
        weights.sizes[1] != groups || weights.sizes[2] != PANEL || weights.sizes[3] != GROUP)
        return refuse("kvx.BytesProduct: the weights are not [N/16, K/4, 16, 4]");
    if (elements(&sums) != outputs || elements(&scales) != outputs || (bias.data && elements(&bias) != outputs))
        return refuse("kvx.BytesProduct: sums, scales or bias are not [N]");
    if (fixed.data && elements(&fixed) != 1) return refuse("kvx.BytesProduct: the step is not one number");
    const int64_t rows = elements(&x) / inputs;
    if (residual.data && elements(&residual) != rows * outputs)
        return refuse("kvx.BytesProduct: the residual is not [..., N]");
    Multiplying of = {
        .product = {
            .weights = weights.data, .sums = sums.data, .scales = scales.data, .bias = bias.data,
            .residual = residual.data, .rows = rows, .inputs = inputs, .outputs = outputs, .groups = groups,
            .zero = with->positive_in ? 0 : MOST_CODE + 1, .positive = with->positive_out,
        },
        .x = x.data, .fixed = fixed.data,
    };
    return multiply(context, &of, &x, rows * groups * GROUP, rows, quantize_row, multiply_bytes);
}

/* Whether weights of 4 bits have the sizes of so many panels and blocks. */
static bool are_nibbles(const Tensor *weights, int64_t panels, int64_t blocks) {
    const int64_t sizes[5] = {panels, blocks, BLOCK / PAIR, PANEL, GROUP};
    return weights->axes == 5 && memcmp(weights->sizes, sizes, sizeof sizes) == 0;
}

static OrtStatus *nibbles_product(void *kernel, OrtKernelContext *context) {
    const Kernel *with = kernel;
    const int64_t outputs = with->width, panels = (outputs + PANEL - 1) / PANEL;
    Tensor x, weights, scales, bias, residual;
    TRY(get_input(context, 0, &x));
    TRY(get_input(context, 1, &weights));
    TRY(get_input(context, 2, &scales));
    TRY(get_input(context, 3, &bias));
    TRY(get_input(context, 4, &residual));
    const int64_t inputs = x.axes ? x.sizes[x.axes - 1] : 0, blocks = (inputs + BLOCK - 1) / BLOCK;
    if (inputs == 0 || outputs < 1 || !are_nibbles(&weights, panels, blocks))
        return refuse("kvx.NibblesProduct: the weights are not [N/16, K/128, 16, 16, 4]");
    if (elements(&scales) != panels * blocks * PANEL || (bias.data && elements(&bias) != outputs))
        return refuse("kvx.NibblesProduct: the scales are not [N/16, K/128, 16], or the bias is not [N]");
    const int64_t rows = elements(&x) / inputs;
    if (residual.data && elements(&residual) != rows * outputs)
        return refuse("kvx.NibblesProduct: the residual is not [..., N]");
    Multiplying of = {
        .product = {
            .weights = weights.data, .scales = scales.data, .bias = bias.data, .residual = residual.data,
            .rows = rows, .inputs = inputs, .outputs = outputs, .groups = blocks, .positive = with->positive_out,
        },
        .x = x.data,
    };
    return multiply(context, &of, &x, rows * blocks * BLOCK, rows * blocks, quantize_blocks, multiply_nibbles);
}

/* Rows of a table. */

typedef struct Table {
    const void *weights;
    const float *scales;
    int64_t rows, width, groups; /* groups of the width, or blocks of it */
} Table;

/* The rows that ids [...] name → [..., E]; `stranger` is the error for an id that names none. */
static OrtStatus *look_up(
    OrtKernelContext *context, const Table *table, Tensor *ids, void (*row)(const Table *, int64_t, float *),
    const char *stranger
) {
    const int64_t count = elements(ids), *id = ids->data;
    float *rows;
    ids->sizes[ids->axes] = table->width;
    TRY(get_output(context, 0, ids->sizes, ids->axes + 1, (void **)&rows));
    for (int64_t i = 0; i < count; i++) {
        if (id[i] < 0 || id[i] >= table->rows) return refuse(stranger);
        row(table, id[i], rows + i * table->width);
    }
    return NULL;
}

static void bytes_row(const Table *table, int64_t id, float *to) {
    const int64_t first = (id / PANEL * table->groups * PANEL + id % PANEL) * GROUP;
    const int8_t *codes = (const int8_t *)table->weights + first;
    for (int64_t k = 0; k < table->width; k++)
        to[k] = codes[k / GROUP * PANEL * GROUP + k % GROUP] * table->scales[id];
}

static void nibbles_row(const Table *table, int64_t id, float *to) {
    for (int64_t k = 0; k < table->width; k++) {
        const int64_t block = id / PANEL * table->groups + k / BLOCK, lane = id % PANEL, within = k % BLOCK;
        const uint8_t *pairs = (const uint8_t *)table->weights + block * BLOCK * PANEL / 2;
        const uint8_t both = pairs[(within / PAIR * PANEL + lane) * GROUP + within % PAIR / 2];
        const int code = (within % 2 ? both >> 4 : both & 15) - HALF_NIBBLE;
        to[k] = (float)code * table->scales[block * PANEL + lane];
    }
}

static OrtStatus *bytes_lookup(void *kernel, OrtKernelContext *context) {
    const int64_t width = ((Kernel *)kernel)->width, groups = (width + GROUP - 1) / GROUP;
    Tensor ids, weights, scales;
    TRY(get_input(context, 0, &ids));
    TRY(get_input(context, 1, &weights));
    TRY(get_input(context, 2, &scales));
    const int64_t known = elements(&scales);
    if (weights.axes != 4 || weights.sizes[2] != PANEL || weights.sizes[3] != GROUP ||
        weights.sizes[0] != (known + PANEL - 1) / PANEL || width < 1 || weights.sizes[1] != groups ||
        ids.axes >= MOST_AXES)
        return refuse("kvx.BytesLookup: the weights are not [V/16, E/4, 16, 4]");
    const Table table = {weights.data, scales.data, known, width, groups};
    return look_up(context, &table, &ids, bytes_row, "kvx.BytesLookup: an id is not of the vocabulary");
}

static OrtStatus *nibbles_lookup(void *kernel, OrtKernelContext *context) {
    const int64_t width = ((Kernel *)kernel)->width, blocks = (width + BLOCK - 1) / BLOCK;
    const int64_t known = ((Kernel *)kernel)->rows, panels = (known + PANEL - 1) / PANEL;
    Tensor ids, weights, scales;
    TRY(get_input(context, 0, &ids));
    TRY(get_input(context, 1, &weights));
    TRY(get_input(context, 2, &scales));
    if (!are_nibbles(&weights, panels, blocks) || width < 1 || known < 1 ||
        elements(&scales) != panels * blocks * PANEL || ids.axes >= MOST_AXES)
        return refuse("kvx.NibblesLookup: the weights are not [V/16, E/128, 16, 16, 4]");
    const Table table = {weights.data, scales.data, known, width, blocks};
    return look_up(context, &table, &ids, nibbles_row, "kvx.NibblesLookup: an id is not of the vocabulary");
}

/* What ONNX Runtime asks about an operator. */

typedef struct Operator {
    OrtCustomOp base;
    const char *name;
    size_t inputs, required, outputs;
    int input_types[7], output_types[3];
} Operator;

static const char *name_of(const OrtCustomOp *op) { return ((const Operator *)op)->name; }
static const char *provider_of(const OrtCustomOp *op) { (void)op; return "CPUExecutionProvider"; }
static int input_type(const OrtCustomOp *op, size_t index) { return ((const Operator *)op)->input_types[index]; }
static size_t input_count(const OrtCustomOp *op) { return ((const Operator *)op)->inputs; }
static int output_type(const OrtCustomOp *op, size_t index) { return ((const Operator *)op)->output_types[index]; }
static size_t output_count(const OrtCustomOp *op) { return ((const Operator *)op)->outputs; }
static int input_kind(const OrtCustomOp *op, size_t index) {
    return index < ((const Operator *)op)->required ? REQUIRED : OPTIONAL;
}
static int output_kind(const OrtCustomOp *op, size_t index) { (void)op; (void)index; return REQUIRED; }
static int memory_of(const OrtCustomOp *op, size_t index) { (void)op; (void)index; return 0; }
static int one(const OrtCustomOp *op) { (void)op; return 1; }

static void read_attribute(const OrtKernelInfo *info, const char *name, int64_t *value) {
    OrtStatus *status = KernelInfoGetAttribute_int64(info, name, value);
    if (status != NULL) ReleaseStatus(status);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *of, const OrtKernelInfo *info, void **made) {
    (void)op, (void)of;
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (kernel == NULL) return CreateStatus(FAIL, "kvx: failed to allocate memory");
    read_attribute(info, "num_heads", &kernel->heads);
    read_attribute(info, "width", &kernel->width);
    read_attribute(info, "rows", &kernel->rows);
    read_attribute(info, "positive_in", &kernel->positive_in);
    read_attribute(info, "positive_out", &kernel->positive_out);
    *made = kernel;
    return NULL;
}

#define OPERATOR(function, called, required_, inputs_, outputs_, ...)                                             \
    {                                                                                                             \
        {OPERATOR_VERSION, NULL, name_of, provider_of, input_type, input_count, output_type, output_count, NULL, free, \
         input_kind, output_kind, memory_of, one, one, one, one, create, function},                               \
            called, inputs_, required_, outputs_, __VA_ARGS__                                                     \
    }

static const Operator operators[] = {
    OPERATOR(self_attention, "SelfAttention", 4, 5, 3, {FLOAT, FLOAT, FLOAT, INT64, FLOAT}, {FLOAT, FLOAT, FLOAT}),
    OPERATOR(coded_self_attention, "CodedSelfAttention", 4, 5, 3, {FLOAT, INT8, INT8, INT64, FLOAT},
             {FLOAT, INT8, INT8}),
    OPERATOR(source_attention, "SourceAttention", 4, 4, 1, {FLOAT, FLOAT, FLOAT, INT64}, {FLOAT}),
    OPERATOR(bytes_product, "BytesProduct", 4, 7, 1, {FLOAT, INT8, INT32, FLOAT, FLOAT, FLOAT, FLOAT}, {FLOAT}),
    OPERATOR(bytes_lookup, "BytesLookup", 3, 3, 1, {INT64, INT8, FLOAT}, {FLOAT}),
    OPERATOR(nibbles_product, "NibblesProduct", 3, 5, 1, {FLOAT, UINT8, FLOAT, FLOAT, FLOAT}, {FLOAT}),
    OPERATOR(nibbles_lookup, "NibblesLookup", 3, 3, 1, {INT64, UINT8, FLOAT}, {FLOAT}),
};

/* Whether products of drawn numbers are those of plain C: sums of whole numbers, and then a scale. */
static bool agrees(const Arithmetic *with) {
    enum { ROWS = TILE_ROWS + 1 };
    uint8_t codes[ROWS * BLOCK], weights[BLOCK * PANEL];
    float scales[PANEL], steps[ROWS], results[2][ROWS * PANEL];
    int32_t sums[PANEL], code_sums[ROWS];
    uint32_t drawn = 1;
    for (int i = 0; i < ROWS * BLOCK; i++) codes[i] = (uint8_t)((drawn = drawn * 1664525u + 1013904223u) >> 24);
    for (int i = 0; i < BLOCK * PANEL; i++)
        weights[i] = (uint8_t)(int8_t)((int)((drawn = drawn * 1664525u + 1013904223u) >> 25) - 63);
    for (int i = 0; i < PANEL; i++) scales[i] = 1.0f + (float)i, sums[i] = i;
    for (int i = 0; i < ROWS; i++) steps[i] = 1.0f + (float)i, code_sums[i] = i;
    Product of = {
        .weights = weights, .scales = scales, .sums = sums, .codes = codes, .steps = steps, .code_sums = code_sums,
        .rows = ROWS, .inputs = BLOCK, .outputs = PANEL, .zero = MOST_CODE + 1,
    };
    for (int nibbles = 0; nibbles < 3; nibbles++) {
        of.groups = nibbles ? 1 : BLOCK / GROUP;
        for (int i = 0; i < ROWS * BLOCK; i++) /* as signed codes from -127 on, and then all of them that */
            codes[i] = nibbles == 2 || (nibbles && codes[i] == 128) ? 129 : codes[i];
        for (int side = 0; side < 2; side++) {
            const Arithmetic *one = side ? with : &plain;
            of.result = results[side];
            (nibbles ? one->nibbles_panel : one->bytes_panel)(&of, 0);
        }
        for (int i = 0; i < ROWS * PANEL; i++)
            if (!(fabsf(results[0][i] - results[1][i]) <= 1e-6f * fabsf(results[0][i]))) return false;
    }
    return true;
}

/* The widest instructions that this machine has, or plain C where the environment variable KVX_KERNELS asks for it. */
static const Arithmetic *widest(void) {
    const char *wanted = getenv("KVX_KERNELS");
    if (wanted != NULL && strcmp(wanted, plain.name) == 0) return &plain;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool widest = wide && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (widest && agrees(&vnni)) return &vnni;
    if (wide && agrees(&avx2)) return &avx2;
#endif
    return &plain;
}

/* What is used in this process: the environment counts when this is first asked. */
static const Arithmetic *chosen(void) {
    if (use == NULL) use = widest();
    return use;
}

#define EXPORTED __attribute__((visibility("default")))

/* The instructions that are used, in words. */
EXPORTED const char *kvx_instructions(void) { return chosen()->name; }

/* What ONNX Runtime calls (SessionOptions.register_custom_ops_library), one call at a time. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static OrtCustomOpDomain *domain = NULL;
    if (domain == NULL) {
        OrtCustomOpDomain *made = NULL;
        api = base->GetApi(API_VERSION);
        if (api == NULL) return NULL; /* a session then says that it does not know the operators */
        TRY(CreateCustomOpDomain("kvx", &made));
        for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
            TRY(CustomOpDomain_Add(made, &operators[i].base));
        chosen();
        domain = made;
    }
    return AddCustomOpDomain(options, domain);
}
