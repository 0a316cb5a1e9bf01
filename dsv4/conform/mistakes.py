"""The mistakes that ports of V4 have made: their names, where each shows, and what is right instead.

plain.py makes each of them on demand (`flip`), codecs.py those of the number formats; diagnose.py asks which of them
gives a port's numbers. A public thread is named where the mistake was found in one.
"""

from dataclasses import dataclass

WINDOW, CSA, HCA = "window", "csa", "hca"
EVERY, COMPRESSED = (WINDOW, CSA, HCA), (CSA, HCA)


@dataclass(frozen=True)
class Mistake:
    """kinds: the layers whose output it changes, () for what shows elsewhere; right: what is to be done instead."""

    kinds: tuple[str, ...]
    right: str
    seen: str = ""


def _in(kinds: tuple[str, ...], *rows: tuple[str, ...]) -> dict[str, Mistake]:
    return {name: Mistake(kinds, *rest) for name, *rest in rows}


# What changes the numbers of a layer that routes by score.
LAYER: dict[str, Mistake] = {
    # residual streams
    **_in(
        EVERY,
        ("mixing transposed", "the sum runs over the first index of C: X'_k = sum_j C[j,k] X_j", "NeMo Automodel 2154"),
        ("post not doubled", "post = 2 sigmoid(...)"),
        ("streams not normalised", "the 24 numbers are divided by the RMS of all N streams together"),
        ("one Sinkhorn round", "hc_sinkhorn_iters rounds: a row softmax and a column step, then rows and columns"),
        ("rotation on the first channels", "the last qk_rope_head_dim channels rotate"),
        ("rotation in halves", "channels (2i, 2i+1) are a pair, in the indexer too"),
        ("output not rotated back", "rotate the attention output by minus the query's position, in every layer"),
        ("thetas swapped", "base 10000 in window layers, 160000 in all others"),
        ("no query norm", "every head's query is divided by its RMS, without a gain, before it rotates",
         "transformers 45616"),
        ("query latent not normed", "RMSNorm with q_norm between wq_a and wq_b"),
        ("window without the token itself", "a query sees sliding_window positions, its own included"),
        ("window one wider", "a query sees sliding_window positions, its own included"),
        ("sink missing", "exp(sink_h) is one more term of the denominator, with value zero"),
        ("sink scaled", "the sink is not multiplied by head_dim^-0.5"),
        ("output groups interleaved", "the heads of a group are neighbours"),
        ("bias in the weights", "the bias selects; weights are made of the scores without it"),
        ("weights not normalised", "the chosen scores are divided by their sum"),
        ("route scale missing", "weights sum to routed_scaling_factor"),
        ("sigmoid gate", "score = sqrt(softplus(logit))"),
        ("no clamp in the shared expert", "gate <= swiglu_limit, |up| <= swiglu_limit, as in the routed experts",
         "transformers 46018, mlx-lm 1201, sglang 23776"),
        ("no clamp in the routed experts", "gate <= swiglu_limit, |up| <= swiglu_limit"),
        ("gate clamped on both sides", "the gate is cut on its upper side only"),
        ("gate and up exchanged", "w1 is the gate, w3 is up, w2 is down"),
        ("shared expert missing", "its output is added with weight 1"),
    ),
    "YaRN on window layers": Mistake(
        (WINDOW,), "layers of ratio 0, MTP among them, have base 10000 and no YaRN", "vllm 54815, sglang 34788"
    ),
    **_in(
        COMPRESSED,
        ("YaRN missing", "layers with a ratio have base 160000 with YaRN", "NeMo Automodel 2103"),
        ("YaRN amplitude", "no amplitude factor on cos and sin", "atlas 342, Primus 930"),
        ("YaRN amplitude in the softmax", "the softmax scale is head_dim^-0.5 alone", "Primus 928"),
        ("queries with the window's theta", "one table serves everything in a layer"),
        ("queries and window with the window's theta", "one table serves everything in a layer", "transformers 45910"),
        ("compressed theta 40000", "compress_rope_theta is 160000; 40000 is a placeholder of the released code",
         "Primus"),
        ("entries rotated at the pool index", "entry w rotates at position w * ratio", "Primus 930"),
        ("entries rotated at the last token", "entry w rotates at position w * ratio, its group's first token"),
        ("entries not rotated", "entry w rotates at position w * ratio"),
        ("entries visible a token early", "query t sees entry w if w < floor((t+1) / ratio)"),
        ("entries visible a token late", "query t sees entry w if w < floor((t+1) / ratio)", "tpu-inference 3536"),
        ("entries visible to all", "query t sees entry w if w < floor((t+1) / ratio)", "transformers 45758"),
        ("gate without position", "ape[t mod ratio] is added to the gate before its softmax"),
        ("entries not normed", "RMSNorm follows the pooling"),
    ),
    **_in(
        (CSA,),
        ("overlap lost", "an entry pools the first halves of the group before with the second halves of its own"),
        ("overlap halves swapped", "the first half of a token's channels speaks for the next group"),
        ("indexer not asked", "a query reads the index_topk entries with the best index scores"),
        ("index scores without relu", "score = sum_h weight_h relu(q_h . k)"),
        ("index weights missing", "score = sum_h weight_h relu(q_h . k), weights from weights_proj"),
        ("index keys rotated at the pool index", "index key w rotates at position w * ratio"),
    ),
}  # fmt: skip
# What changes only the numbers of a layer that routes by token id.
HASH = _in(
    (),
    ("experts chosen by score", "the first num_hash_layers read tid2eid[token id]", "SwiftLM 79"),
    ("expert weights all equal", "in hash layers too weights come from the learned scores"),
)
# What shows in the whole model alone.
TOP = _in(
    (),
    ("gain of the norms plus one", "RMSNorm multiplies by the weight as it is"),
    ("head reads the mean of the streams", "hc_head weighs the streams by sigmoids", "maxtext 4788"),
)
MTP = _in(
    (),
    ("MTP reads the collapsed stream", "MTP reads the N streams before hc_head", "vllm-ascend 131"),
    ("MTP embeds its own token", "row t takes the embedding of token t+1"),
    ("MTP with YaRN", "the MTP block is a window layer: base 10000, no YaRN", "vllm 48304"),
    ("MTP with the compressed layers' table", "the MTP block's ratio is the last of compress_ratios: 0", "ds4 411"),
    ("MTP routes by token id", "the MTP block routes by score and bias"),
)
# Right, but in BF16 where the released code has FP32: they show in FP32 ports and in single parts of BF16 ones.
ROUNDING = {
    "router in BF16": Mistake(EVERY, "logits and sqrt(softplus) of the gate are FP32", "NeMo Automodel 2201"),
    "post and mixing in BF16": Mistake(EVERY, "post and C stay FP32; the new streams are cast once"),
    "compressor in BF16": Mistake(COMPRESSED, "a compressor projects and pools in FP32, up to its norm"),
    "cos and sin in BF16": Mistake(EVERY, "the angle is the FP32 product position * frequency, and so is its table"),
    "attention output in FP8": Mistake(EVERY, "the input of wo_a is not quantised"),
    "norms hand on FP32": Mistake(EVERY, "a norm's result is cast to the input's dtype before the product"),
    "SwiGLU in BF16": Mistake(EVERY, "gate and up are FP32 from their clamps to the product"),
    "expert weights after w2": Mistake((), "weights multiply before w2; in BF16 other bits, and no more"),
    "angles in FP64": Mistake((), "the angle is the FP32 product position * frequency"),
}
# What one call has right and two have not.
STREAM = _in(
    (),
    ("overlap lost between calls", "the group before stays in memory until the next one has closed", "omlx 2271"),
    ("state of the sequence before", "a new sequence begins with an empty compressor"),
    ("state not rewound", "a rewind restores the compressor's rows as well", "llama.cpp 26756"),
    ("padding is pooled", "no padding enters a compressor: one sequence a row, without pads", "transformers 45938"),
)
# How rows are kept in a packed memory, and quantised weights read: codecs.py makes these.
MEMORY = _in(
    (),
    ("rows not rounded", "window rows and entries go through e4m3; the first released kernel did not"),
    ("rows truncated", "e4m3 rounds to nearest, ties to even"),
    ("rows without a floor", "a block's largest number counts as at least 1e-4"),
    ("row scales not powers of two", "scale = 2^ceil(log2(largest / 448))"),
    ("row scales rounded down", "scale = 2^ceil(log2(largest / 448))"),
    ("rows in blocks of 128", "64 numbers share a scale"),
    ("rotary channels in FP8", "the last 64 channels stay BF16"),
    ("index rows not rotated", "Hadamard on queries and keys, then FP4", "vllm 55459"),
    ("rotated index rows not rounded", "the rotated row is BF16 before it becomes FP4"),
    ("index rows in FP8", "e2m1 in blocks of 32"),
    ("index rows truncated", "e2m1 rounds to nearest, ties to even"),
    ("Hadamard on queries only", "on queries and keys, or on neither", "ATOM 1507"),
    ("Hadamard on keys only", "on queries and keys, or on neither"),
    ("index ties to the highest entry", "equal scores: the lowest entry first"),
)
WEIGHTS = _in(
    (),
    ("scale bytes read as numbers", "a scale byte b is 2^(b - 127)", "vllm 43416, vllm 51946"),
    ("scales divide", "values are multiplied by their scale, whatever its name"),
    ("scale blocks transposed", "scale (i, j) is that of rows 128 i and columns 128 j"),
    ("codes read as FNUZ", "e4m3fn: bias 7, byte 0x80 is minus zero", "vllm 52109"),
    ("nibbles exchanged", "the even column is in the low nibble"),
    ("FP4 scales per 16 columns", "32 columns share a scale"),
)
# Roundings of which neither is wrong: a port may have either.
HARMLESS = ("query norm in BF16",)
WRONG_DRAFTER = "wrong drafter"
MISTAKES: dict[str, Mistake] = {
    **LAYER, **HASH, **TOP, **MTP, **ROUNDING, **STREAM, **MEMORY, **WEIGHTS,
    WRONG_DRAFTER: Mistake((), "the MTP block must be that of this checkpoint: its predictions have nothing to do with "
                           "the model's"),
}  # fmt: skip
