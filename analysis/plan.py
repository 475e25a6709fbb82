"""What a training run takes, before it is started: parameters, FLOPs, memory, communication, time.

python -m analysis.plan --model DiT-XL/2 --num_experts 8 --batch-size 32 --data-parallel fsdp --gpus 8 --gpu h100
python -m analysis.plan --table                       # the README's table of sizes

T tokens per image · D hidden width · h heads · W MLP width · E experts · K experts per token · F expert width
S width of the shared expert

All of it is arithmetic on shapes; nothing runs, and the model has no memory (meta device). Parameters are counted,
FLOPs equal FlopCounterMode's, and activations are the tensors that autograd saves for `models.DiT` as it is written
(`tests/test_plan.py` measures them); times are lower bounds. GB is 1e9 bytes, TFLOP 1e12 operations, of which a
multiply-add is two. Not counted: the autoencoder that encodes images while training (0.3 GB), what the CUDA context,
NCCL and fragmentation take (a card holds some 6 % more than its datasheet's GB of 1e9 bytes, which is meant for them),
uneven expert parallelism, and losses that a router brings along. Activations are those of routers by softmax.
"""

import bisect
import functools
import json
from dataclasses import asdict, dataclass, replace

import torch

import cli
from cli import UsageError, number_in, positive_int, unknown_name
from configuration import MODEL_FLAGS, DiTConfig, add_model_arguments, build_config, fields_said, row_said
from expert_parallel import check_expert_parallel
from models import CHECKPOINTING, DiT, count_parameters

# ------------------------------------------------------------------------------------------------------------ hardware


@dataclass(frozen=True)
class GPU:
    """Datasheet facts. Sustained rates are lower: large bf16 products reach some 80 %, copies some 90 % of them."""

    memory: float  # GB
    bandwidth: float  # of the memory, TB/s
    link: float  # NVLink in one direction, GB/s
    tflops: dict[str, float]  # of dense products (no 2:4 sparsity), by precision


GPUS = {  # NVIDIA's datasheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024)
    "a100": GPU(80, 2.0, 300, {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    "h100": GPU(80, 3.35, 450, {"bf16": 989, "fp16": 989, "tf32": 494.5, "fp32": 67}),
    "h200": GPU(141, 4.8, 450, {"bf16": 989, "fp16": 989, "tf32": 494.5, "fp32": 67}),
}
GPUS_PER_NODE = 8
MOST_IMAGES = 2**20  # where the search for the largest batch ends
NETWORK = 50  # GB/s between nodes for each GPU: an adapter of 400 Gbit/s

# ---------------------------------------------------------------------------------------------------- sharding, in rows


@dataclass(frozen=True)
class Strategy:
    """What each GPU keeps only its share of, and how the model computes."""

    weights: bool = False
    gradients: bool = False
    optimizer: bool = False  # moments, and the EMA with them
    reshards: bool = False  # are weights gathered for a block at a time, in forward and backward, or for a whole step?
    deepspeed: bool = False  # the model is in the compute precision, and fp32 masters lie with the optimizer


STRATEGIES = {
    "ddp": Strategy(),
    "sdp": Strategy(weights=True, gradients=True, optimizer=True),  # FSDP2, reshard_after_forward=False
    "fsdp": Strategy(weights=True, gradients=True, optimizer=True, reshards=True),
    "zero1": Strategy(optimizer=True, deepspeed=True),  # ZeRO: arXiv 1910.02054
    "zero2": Strategy(gradients=True, optimizer=True, deepspeed=True),
    "zero3": Strategy(weights=True, gradients=True, optimizer=True, reshards=True, deepspeed=True),
}
DEEPSPEED_BUCKETS = 1_000_000_000  # elements of its reduce and all-gather buckets, by default
DEEPSPEED_LIVE = 1_500_000_000  # ZeRO-3, by default: stage3_max_live_parameters and the reduce bucket


@dataclass(frozen=True)
class Precision:
    """Bytes per element."""

    compute: int  # of matrix products: weights, inputs and outputs
    stream: int  # of the residual stream and its norms, which autocast leaves in fp32
    stored: int = 4  # of the weights as they are kept

    @property
    def casts(self) -> bool:
        """Do weights and gradients have another precision than products?"""
        return self.compute < self.stored


PRECISIONS = {"bf16": Precision(2, 4), "fp16": Precision(2, 4), "tf32": Precision(4, 4), "fp32": Precision(4, 4)}


def precision_of(name: str, strategy: Strategy, residual_dtype: str = "fp32") -> Precision:
    """DeepSpeed casts the whole model, other engines use autocast.

    Raises:
        UsageError: a residual stream in bf16 between products that are not.
    """
    precision = PRECISIONS[name]
    if residual_dtype == "bf16" and name != "bf16":
        raise UsageError(f"--residual-dtype bf16 needs --precision bf16, got {name}")
    if strategy.deepspeed:
        return replace(precision, stream=precision.compute, stored=precision.compute)
    return replace(precision, stream=precision.compute) if residual_dtype == "bf16" else precision


# ---------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameters:
    """How many of them there are."""

    total: int  # with the fixed pos_embed, as published counts have it
    activated: int  # of the total, what one token uses
    trained: int
    routed: int  # of the trained: experts
    products: int  # of the trained: what autocast casts, the matrices of all products but the router's
    block: int  # trained ones of the largest block
    block_routed: int

    def on_one_gpu(self, expert_parallel: int) -> "Parameters":
        """The same where each GPU has its share of the experts; total and activated stay those of the model."""
        elsewhere = self.routed - self.routed // expert_parallel
        block_elsewhere = self.block_routed - self.block_routed // expert_parallel
        return replace(
            self,
            trained=self.trained - elsewhere,
            routed=self.routed - elsewhere,
            products=self.products - elsewhere,
            block=self.block - block_elsewhere,
            block_routed=self.block_routed - block_elsewhere,
        )


@functools.cache
def parameter_counts(config: DiTConfig) -> Parameters:
    """Counted on a model without memory."""
    with torch.device("meta"):
        model = DiT(config)
    total, activated = count_parameters(model)
    blocks = [dict(block.named_parameters()) for block in model.blocks]
    sizes = [sum(p.numel() for p in block.values()) for block in blocks]
    routed = [sum(p.numel() for name, p in block.items() if ".experts." in name) for block in blocks]
    largest = max(range(config.depth), key=sizes.__getitem__)
    not_cast = ("gate.weight", "embedding_table.weight", "bias")
    named = model.named_parameters()
    products = sum(p.numel() for name, p in named if p.ndim > 1 and not name.endswith(not_cast))
    trained = sum(p.numel() for p in model.parameters())
    return Parameters(total, activated, trained, sum(routed), products, sizes[largest], routed[largest])


# --------------------------------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class Flops:
    """Operations for one image."""

    linear: int  # forward, linear layers only
    forward: int  # with the attention products
    training: int  # forward and backward
    checkpointed: int  # training, with every block computed twice


def flops(config: DiTConfig) -> Flops:
    """Closed form. The backward of a product is two of its size: for its input (if that needs one) and its weight.

    Attention does not keep its T x T scores: beside its four products, its backward computes one of the forward again.
    """
    D, T, E, K = config.hidden_size, tokens_per_image(config), config.num_experts, config.num_experts_per_tok
    F, S, W, c = config.expert_width, config.shared_width, config.mlp_width, config.modulation_width
    moe, depth, patch = len(config.moe_indices), config.depth, config.patch_size**2

    attention = depth * 2 * T * T * D  # multiply-adds, from here on
    projections = depth * (T * D * (2 * D + 2 * kv_width(config)) + 6 * D * c)  # q, out, k, v; modulation
    router = E + (D + E if config.router == "batch-pool" else 0)  # with its predictor
    sparse = moe * T * D * (router + K * MATRICES[config.expert_mlp] * F + MATRICES[config.shared_mlp] * S)
    dense = (depth - moe) * T * D * MATRICES[config.mlp] * W
    first = T * D * patch * config.in_channels + 256 * c  # patch and time embedding, whose inputs need no gradient
    rest = c * c + 2 * D * c + T * D * patch * config.out_channels  # time embedding; final layer
    blocks = projections + sparse + dense
    linear = first + blocks + rest
    training = 3 * linear - first + 7 * attention // 2
    counts = (linear, linear + attention, training, training + blocks + attention)
    return Flops(*(2 * count for count in counts))


MATRICES = {"swiglu": 3, "gelu": 2, "silu": 2}  # of a feed-forward, dense or an expert


def tokens_per_image(config: DiTConfig) -> int:
    return config.side**2


def kv_width(config: DiTConfig) -> int:
    """Of the keys, and of the values, of all heads."""
    return config.hidden_size // config.num_heads * config.kv_heads


# --------------------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Activations:
    """Bytes for one image that are live when the backward begins."""

    plain: int
    kept: int  # with full checkpointing, when the forward ends: the blocks' inputs, and all that is not in a block
    final: int  # of these, what the final layer has freed when the first block is computed again
    block: int  # what the largest block then saves
    products: int  # with selective checkpointing, beside `kept`: results of products and attention in all blocks
    block_products: int  # those of that block
    passing: int  # gradients on their way, in any case: the residual stream's and a hidden layer's


def activations(config: DiTConfig, precision: Precision) -> Activations:
    """Bytes of what autograd saves; copies of weights in the compute precision are not among them."""
    D, T, kv, width = config.hidden_size, tokens_per_image(config), kv_width(config), config.modulation_width
    c, s = precision.compute, precision.stream
    norm = T * s * D  # a norm's input
    sample = config.in_channels * config.input_size**2
    embeddings = c * (sample + 256 + 2 * width) + s * width + 8  # latent, time, label: inputs of each layer
    final = norm + c * (T * D + width + 2 * D)  # input of the linear; modulation: silu(c), shift and scale

    # Inputs of the linears; q, k, v; output; log-sum-exp.
    attention = norm + T * (c * (4 * D + 2 * kv) + 4 * config.num_heads)
    if config.qk_norm != "none" or config.positions != "sincos":
        attention += T * c * (D + kv)  # q and k, normed and turned
    if config.qk_norm != "none":
        attention += T * (8 * (config.num_heads + config.kv_heads) if config.qk_norm == "head" else 16)  # statistics
    modulation = c * (width + 6 * D)  # silu(c); shifts, scales, gates
    # Input, hidden (of SwiGLU both halves and their product, else before and after), output.
    dense = attention + modulation + norm + T * c * (2 * D + MATRICES[config.mlp] * config.mlp_width)
    routing = routing_bytes(config)
    sparse = attention + modulation + norm + moe_activations(config, precision)

    moe = len(config.moe_indices)
    outside = embeddings + final
    kept = outside + config.depth * T * s * D + moe * routing  # routings are returned, for the balance loss and the log
    # qkv, attention with log-sum-exp, out; modulation.
    results = T * (c * (3 * D + 2 * kv) + 4 * config.num_heads) + c * 6 * D
    up = (MATRICES[config.mlp] - 1) * config.mlp_width
    sparse_results, dense_results = results + moe_products(config, precision), results + T * c * (up + D)
    products = moe * sparse_results + (config.depth - moe) * dense_results
    largest = sparse - routing >= dense if 0 < moe < config.depth else moe > 0
    block = (sparse - routing if largest else dense) - T * s * D
    block_products = sparse_results if largest else dense_results
    hidden = config.num_experts_per_tok * config.expert_width if moe else config.mlp_width
    if moe and config.expert_mlp == "swiglu":  # its gradient, its input's of twice the width, its output's
        hidden = config.num_experts_per_tok * (3 * config.expert_width + D)
    passing = T * (2 * s * D + c * hidden)
    plain = outside + moe * sparse + (config.depth - moe) * dense
    return Activations(plain, kept, final, block, products, block_products, passing)


def moe_activations(config: DiTConfig, precision: Precision) -> int:
    """Those of one MoE layer, its input and output included."""
    D, T, K = config.hidden_size, tokens_per_image(config), config.num_experts_per_tok
    F, S, c = config.expert_width, config.shared_width, precision.compute
    router = c * D + 8 * K  # input, which is the shared expert's, too; inverse permutation
    router += 4 * (K + 1) if config.norm_topk_prob else 0  # weights before they are divided by their sum
    hidden = D + 2 * F  # input; gate and up, or before and after GELU
    if config.expert_mlp != "swiglu":
        hidden += D  # output: for the gradients of the routing weights
    routed = K * (c * hidden + 4)  # and these weights, by place
    shared = c * 3 * S  # hidden
    output = c * D  # for the gradient of the gate
    return T * (router + routed + shared + output) + routing_bytes(config)


def moe_products(config: DiTConfig, precision: Precision) -> int:
    """Results of one MoE layer's products, for one image: the router's, both of the experts, both of the shared one."""
    D, K, F, S = config.hidden_size, config.num_experts_per_tok, config.expert_width, config.shared_width
    hidden = (MATRICES[config.expert_mlp] - 1) * F
    wide = K * (hidden + D) + 2 * S + (D if S else 0)
    return tokens_per_image(config) * (4 * config.num_experts + precision.compute * wide)


def routing_bytes(config: DiTConfig) -> int:
    """`moe.Routing` of one layer: probabilities, experts and weights of each token, order. For one image."""
    return tokens_per_image(config) * (4 * config.num_experts + (8 + 4 + 8) * config.num_experts_per_tok)


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Job:
    """What memory, communication and time depend on, but for activation checkpointing and the kind of GPU."""

    config: DiTConfig
    parameters: Parameters
    strategy: Strategy
    precision: Precision
    gpus: int
    expert_parallel: int  # GPUs over which a layer's experts are dealt out
    batch_size: int  # images per GPU and micro-batch
    accum_iter: int

    @property
    def local(self) -> Parameters:
        """Those that one GPU computes with."""
        return self.parameters.on_one_gpu(self.expert_parallel)

    @property
    def reduces_last(self) -> bool:
        """Do gradients add up whole, to be sharded in the last of several micro-batches? FSDP's do."""
        return self.accum_iter > 1 and not self.strategy.deepspeed

    def share(self, sharded: bool) -> float:
        """How many parameters a GPU keeps something of, if that is sharded: experts over the GPUs that have them."""
        return self.parameters.trained / self.gpus if sharded else self.local.trained

    @property
    def ring(self) -> float:
        """How many parameters' worth a GPU sends where each GPU gives its share of what it computes with to the others.

        Experts that are dealt out travel between the GPUs that have the same ones.
        """
        routed, replicas = self.local.routed, self.gpus // self.expert_parallel
        return (self.local.trained - routed) * (self.gpus - 1) / self.gpus + routed * (replicas - 1) / replicas


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the peak of a step, which is where the backward begins: from there on it frees as it goes.

    Gradients are counted as if they were there already, as DDP's buckets are, and those that accumulate. For others the
    total is an upper bound: 6 to 21 % above the peak of FSDP.
    """

    weights: float  # fp32 (DeepSpeed: compute precision)
    working: float  # weights as products take them, cast or gathered, and gradients on their way to the shards
    gradients: float
    optimizer: float  # moments of AdamW (DeepSpeed: and fp32 masters)
    ema: float
    activations: float
    total: float


def memory(job: Job, checkpointing: str) -> Memory:
    strategy = job.strategy
    stored = job.precision.compute if strategy.deepspeed else 4
    saved = activations(job.config, job.precision)
    again = saved.kept - saved.final + saved.block  # when the last block has been computed again
    live = {"none": saved.plain, "selective": again + saved.products - saved.block_products, "full": again}
    parts = {
        "weights": stored * job.share(strategy.weights),
        "working": working_bytes(job, checkpointing),
        "gradients": stored * job.share(strategy.gradients and not job.reduces_last),
        "optimizer": (12 if strategy.deepspeed else 8) * job.share(strategy.optimizer),
        "ema": 4 * job.share(strategy.optimizer),
        "activations": job.batch_size * (live[checkpointing] + saved.passing),
    }
    return Memory(**parts, total=sum(parts.values()))


def working_bytes(job: Job, checkpointing: str) -> float:
    """Weights in the form in which products take them, where they are not kept in that form, and what goes with it."""
    local, c, casts = job.local, job.precision.compute, job.precision.casts
    if job.strategy.deepspeed:
        return c * min(2 * local.trained, DEEPSPEED_LIVE if job.strategy.weights else DEEPSPEED_BUCKETS)
    if not job.strategy.weights:
        if not casts:
            return 0
        if checkpointing == "none":  # autograd saves autocast's copies of all weights
            return c * local.products
        # It saves those of one block; but when the forward ends, with no block saved yet, the copies that autocast
        # caches are still there: all but experts, which are cast by hand.
        saved = activations(job.config, job.precision)
        return max(c * local.block, c * (local.products - local.routed) - job.batch_size * saved.block)
    gathered = 2 * local.block if job.strategy.reshards else local.trained  # one in use, one on its way
    reducing = (c + 4 if casts else c) * local.block  # a block's gradients, and what of them is sent
    return c * gathered + reducing


# ------------------------------------------------------------------------------------------------- communication, time


@dataclass(frozen=True)
class Communication:
    """Bytes that each GPU sends in a step (ring algorithms: (n-1)/n of a tensor for each of its n GPUs)."""

    gradients: float
    weights: float
    tokens: float  # exchanged by expert parallelism
    total: float


def communication(job: Job, checkpointing: str) -> Communication:
    """Gradients travel in fp32, in the last micro-batch (DeepSpeed: compute precision; ZeRO-2 and 3: in every one)."""
    config, strategy, c = job.config, job.strategy, job.precision.compute
    reductions = 1 if job.reduces_last or not strategy.gradients else job.accum_iter
    rings = 1 if strategy.optimizer else 2  # an all-reduce is a reduce-scatter and an all-gather
    gradients = (c if strategy.deepspeed else 4) * job.ring * rings * reductions

    if strategy.weights:
        gathers = job.accum_iter * (2 if strategy.reshards else 1)  # for the forward; for the backward
    else:
        gathers = 1 if strategy.deepspeed else 0  # of the updated weights
    weights = c * job.ring * gathers

    journeys = 4 if checkpointing == "none" else 6  # to the experts and back, in forward and backward
    others = (job.expert_parallel - 1) / job.expert_parallel
    tokens = job.batch_size * tokens_per_image(config) * config.num_experts_per_tok * others * job.accum_iter
    tokens *= len(config.moe_indices) * journeys * config.hidden_size * c
    return Communication(gradients, weights, tokens, gradients + weights + tokens)


@dataclass(frozen=True)
class Time:
    """Seconds of a step if every kernel ran at the GPU's peak rates, one after another."""

    products: float  # matrix products and attention
    elementwise: float  # memory traffic of what lies between products, were it perfectly fused
    casts: float  # memory traffic of weights and gradients between fp32 and the compute precision
    update: float  # memory traffic of clipping, AdamW and EMA
    communication: float
    hidden: float  # the step, communication behind computation but for exchanged tokens
    exposed: float  # the step, no communication behind computation


UPDATE_BYTES = 12 + 28 + 12  # per parameter: the gradient's norm and factor; AdamW, 4 reads and 3 writes; EMA, 2 and 1


def step_time(job: Job, checkpointing: str, gpu: GPU, peak: float) -> Time:
    """`peak` in TFLOP/s. Products take the longer of their arithmetic and of reading their weights."""
    local, c, work, sent = job.local, job.precision.compute, flops(job.config), communication(job, checkpointing)
    bandwidth, passes = gpu.bandwidth * 1e12, 3 if checkpointing == "none" else 4
    operations, products_passes = (work.checkpointed, 4) if checkpointing == "full" else (work.training, 3)
    arithmetic = job.batch_size * operations / (peak * 1e12)
    products = job.accum_iter * max(arithmetic, products_passes * c * local.products / bandwidth)
    between = job.batch_size * passes * elementwise_bytes(job.config, job.precision)
    elementwise = job.accum_iter * between / bandwidth
    cast = (4 + c) * (job.share(job.strategy.weights) + local.trained) if job.precision.casts else 0
    casts = job.accum_iter * cast / bandwidth
    update = UPDATE_BYTES * job.share(job.strategy.optimizer) / bandwidth
    busy = products + elementwise + casts + update
    tokens, others = sent.tokens / (gpu.link * 1e9), (sent.gradients + sent.weights) / (gpu.link * 1e9)
    hidden, exposed = max(busy, others) + tokens, busy + others + tokens
    return Time(products, elementwise, casts, update, others + tokens, hidden, exposed)


def elementwise_bytes(config: DiTConfig, precision: Precision) -> int:
    """Forward traffic for one image outside of products, if every chain of elementwise operations were one kernel.

    Read and write, in D elements a token: norm and modulate 2, twice; gated residual 3, twice; dispatch 2K; combine
    K + 1, and 1 for the shared expert; and what each activation function takes and gives.
    """
    D, K, S = config.hidden_size, config.num_experts_per_tok, config.shared_width
    experts = MATRICES[config.expert_mlp] * K * config.expert_width
    sparse = (10 + 2 * K + K + 1 + (S > 0)) * D + experts + 3 * S
    dense = 10 * D + MATRICES[config.mlp] * config.mlp_width
    moe = len(config.moe_indices)
    return precision.compute * tokens_per_image(config) * (moe * sparse + (config.depth - moe) * dense)


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Outlook:
    """A run with one kind of activation checkpointing."""

    memory: Memory
    fits: bool
    largest_batch: int  # images per GPU and micro-batch
    communication: Communication
    time: Time
    images_per_second: float  # of all GPUs, at best: `time.hidden`


@dataclass(frozen=True)
class Plan:
    """All that `plan` found out, and what it was asked."""

    model: str
    config: DiTConfig
    image_size: int
    batch_size: int  # images per GPU and micro-batch
    accum_iter: int
    precision: str
    data_parallel: str
    gpus: int
    expert_parallel: int
    gpu: str
    hardware: GPU
    peak_tflops: float
    parameters: Parameters
    flops: Flops
    none: Outlook
    selective: Outlook | None  # not where weights are gathered inside each block
    full: Outlook
    residual_dtype: str = "fp32"


def plan(
    model: str = "DiT-S/2",
    image_size: int = 256,
    batch_size: int = 32,
    accum_iter: int = 1,
    precision: str = "bf16",
    data_parallel: str = "ddp",
    gpus: int = 1,
    expert_parallel: int = 1,
    gpu: str = "h100",
    gpu_memory: float | None = None,
    peak_tflops: float | None = None,
    bandwidth: float | None = None,
    link: float | None = None,
    pixels: bool = False,
    residual_dtype: str = "fp32",
    **options,
) -> Plan:
    """What training takes on `gpus` GPUs.

    Args:
        batch_size: images per GPU and micro-batch.
        gpu_memory, peak_tflops, bandwidth, link: GB, TFLOP/s, TB/s, GB/s; None: the datasheet's of `gpu`.
        residual_dtype: of what passes from block to block, fp32 or bf16.
        pixels: no autoencoder; else latents of 4 channels with an eighth of the image's side.
        options: fields of `DiTConfig`.

    Raises:
        UsageError: a name that is in no table, sizes that do not divide, options that contradict each other.
    """
    for kind, name, known in (
        ("precision", precision, PRECISIONS),
        ("data-parallel choice", data_parallel, STRATEGIES),
        ("GPU", gpu, GPUS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    if not pixels and image_size % 8:
        raise UsageError(f"image size {image_size} must be a multiple of 8, by which the autoencoder divides it")
    latent = {"in_channels": 3, "input_size": image_size} if pixels else {"input_size": image_size // 8}
    config = build_config(model, **(latent | options))
    if config.caption_width:
        raise UsageError(f"{model} reads texts, whose cost is not counted yet; plan the same sizes without")
    check_expert_parallel(expert_parallel, gpus, data_parallel, config)

    sheet = GPUS[gpu]
    hardware = replace(
        sheet,
        memory=gpu_memory or sheet.memory,
        bandwidth=bandwidth or sheet.bandwidth,
        link=link or (sheet.link if gpus <= GPUS_PER_NODE else NETWORK),
    )
    peak = peak_tflops or sheet.tflops[precision]
    parameters, strategy = parameter_counts(config), STRATEGIES[data_parallel]
    if gpus == 1 and not strategy.deepspeed:
        strategy = STRATEGIES["ddp"]  # as train.py does it: nothing to shard
    widths = precision_of(precision, strategy, residual_dtype)
    job = Job(config, parameters, strategy, widths, gpus, expert_parallel, batch_size, accum_iter)

    def outlook(checkpointing: str) -> Outlook:
        def needed(images: int) -> float:
            return memory(replace(job, batch_size=images), checkpointing).total

        largest = bisect.bisect_right(range(1, MOST_IMAGES + 1), hardware.memory * 1e9, key=needed)
        time = step_time(job, checkpointing, hardware, peak)
        return Outlook(
            memory(job, checkpointing),
            largest >= batch_size,
            largest,
            communication(job, checkpointing),
            time,
            gpus * batch_size * accum_iter / time.hidden,
        )

    return Plan(
        model,
        config,
        image_size,
        batch_size,
        accum_iter,
        precision,
        data_parallel,
        gpus,
        expert_parallel,
        gpu,
        hardware,
        peak,
        parameters,
        flops(config),
        none=outlook("none"),
        selective=None if strategy.weights else outlook("selective"),
        full=outlook("full"),
        residual_dtype=residual_dtype,
    )


PUBLISHED = (
    ("DiT-S/2", 8),  # experts; 0: dense
    ("DiT-S/2", 16),
    ("DiT-B/2", 8),
    ("DiT-L/2", 8),
    ("DiT-XL/2", 8),
    ("DiT-G/2", 16),
    ("Large-DiT-600M/2", 0),
    ("Large-DiT-3B/2", 0),
    ("Large-DiT-7B/2", 0),
)


def size_table() -> list[dict]:
    """The published sizes, at 256x256."""
    rows = []
    for model, experts in PUBLISHED:
        config = build_config(model, num_experts=experts)
        counts, work = parameter_counts(config), flops(config)
        rows.append(
            {
                "model": model,
                "num_experts": experts,
                "qk_norm": config.qk_norm,
                "layers": config.depth,
                "width": config.hidden_size,
                "heads": config.num_heads,
                "parameters": counts.total,
                "activated": counts.activated,
                "forward_gmacs": work.forward / 2e9,
                "forward_gmacs_linear": work.linear / 2e9,
            }
        )
    return rows


# -------------------------------------------------------------------------------------------------------------- report


def markdown(rows: list[dict]) -> str:
    """The README's table of sizes; GMACs include the attention products."""
    lines = [
        "| model | layers, width, heads | parameters | activated per token | forward GMACs |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"`{row['model']}`" + (f", {row['num_experts']} experts" if row["num_experts"] else "")
        name += ", QK-norm" if row["qk_norm"] != "none" else ""
        shape = f"{row['layers']}, {row['width']}, {row['heads']}"
        counts = f"{row['parameters']:,} | {row['activated']:,} | {row['forward_gmacs']:.2f}"
        lines.append(f"| {name} | {shape} | {counts} |")
    return "\n".join(lines)


def report(p: Plan) -> str:
    """The plan as text."""
    config, work = p.config, p.flops
    experts = f", {config.num_experts} experts, {config.num_experts_per_tok} per token" if config.num_experts else ""
    experts += ", QK-norm" if config.qk_norm != "none" else ""
    sizes = f"{p.batch_size} images per GPU"
    sizes += f" x {p.accum_iter} micro-batches" if p.accum_iter > 1 else ""
    stream = " between blocks too" if p.residual_dtype == "bf16" else ""
    across = f", experts over {p.expert_parallel}" if p.expert_parallel > 1 else ""
    lines = [
        f"{p.model}{experts}; {p.image_size}x{p.image_size} images, {tokens_per_image(config)} tokens each",
        f"  parameters  {p.parameters.total:,}, activated per token {p.parameters.activated:,}",
        f"  forward     {work.forward / 1e9:,.1f} GFLOP per image, {work.linear / 1e9:,.1f} without attention products",
        f"  training    {work.training / 1e9:,.1f} GFLOP per image, {work.checkpointed / 1e9:,.1f} fully checkpointed",
        "",
        f"{p.data_parallel} on {p.gpus} {p.gpu}{across}; {p.precision}{stream}, {sizes}, "
        f"{p.gpus * p.batch_size * p.accum_iter} per step",
        f"  at datasheet rates unless told otherwise: {p.hardware.memory:g} GB, {p.peak_tflops:g} TFLOP/s, "
        f"{p.hardware.bandwidth:g} TB/s, links {p.hardware.link:g} GB/s; sustained rates are lower",
        "",
    ]

    def line(title: str, *values) -> None:
        lines.append(f"{title:<44}" + "".join(f"{value:>16}" for value in values))

    def each(title: str, show) -> None:
        outlooks = (getattr(p, name) for name in CHECKPOINTING)
        line(title, *("-" if outlook is None else show(outlook) for outlook in outlooks))

    def quantities(part: str, scale: float, titles: dict[str, str]) -> None:
        for name, title in titles.items():
            each(f"  {title}", lambda o, name=name: f"{getattr(getattr(o, part), name) / scale:,.1f}")

    line("activation checkpointing", *CHECKPOINTING)
    lines.append("memory per GPU, GB")
    quantities("memory", 1e9, MEMORY_TITLES)
    each(f"  fits in {p.hardware.memory:g} GB", lambda o: "yes" if o.fits else "NO")
    each("  largest batch per GPU that fits", lambda o: str(o.largest_batch))
    if p.gpus > 1:
        lines.append("sent per GPU and step, GB")
        quantities("communication", 1e9, COMMUNICATION_TITLES)
    lines.append("time per step at peak rates, ms")
    quantities("time", 1e-3, TIME_TITLES)
    each("images/s of all GPUs, at most", lambda o: f"{o.images_per_second:,.0f}")
    return "\n".join(lines)


MEMORY_TITLES = {
    "weights": "weights",
    "working": "weights cast or gathered for products",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "EMA",
    "activations": "activations",
    "total": "total",
}
COMMUNICATION_TITLES = {"gradients": "gradients", "weights": "weights", "tokens": "tokens", "total": "total"}
TIME_TITLES = {
    "products": "matrix products and attention",
    "elementwise": "elementwise, perfectly fused",
    "casts": "casts of weights and gradients",
    "update": "clipping, AdamW, EMA",
    "communication": "communication",
    "hidden": "step, communication hidden",
    "exposed": "step, communication exposed",
}


def alternatives(settings: dict) -> str:
    """The largest batch under each data-parallel choice, all else equal."""
    lines = [f"{'largest batch on the same GPUs':<44}" + "".join(f"{it:>16}" for it in ("state, GB", *CHECKPOINTING))]
    for name in STRATEGIES:
        if name not in ("sdp", "fsdp") and settings["expert_parallel"] > 1:
            continue
        other = plan(**(settings | {"data_parallel": name}))
        held = other.none.memory
        state = (held.weights + held.gradients + held.optimizer + held.ema) / 1e9
        outlooks = (getattr(other, kind) for kind in CHECKPOINTING)
        batches = "".join(f"{'-' if outlook is None else outlook.largest_batch:>16}" for outlook in outlooks)
        lines.append(f"  {name:<42}{state:>16.1f}{batches}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- script


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="analysis.plan", description=__doc__.partition("\n")[0])
    positive = number_in(1e-6, 1e6)

    group = add_model_arguments(parser)
    group.add_argument("--image-size", type=positive_int, default=256, help="side of the images, in pixels")
    group.add_argument("--vae-path", "--vae", default="mse", help="none: pixels; all else: latents of an eighth")

    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images per GPU and micro-batch")
    group.add_argument("--accum_iter", type=positive_int, default=1, help="micro-batches of a step")
    group.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of matrix products")
    group.add_argument(
        "--residual-dtype", choices=("fp32", "bf16"), default="fp32", help="of what passes between blocks"
    )
    group.add_argument("--data-parallel", choices=STRATEGIES, default="ddp", help="what GPUs keep a share of")
    group.add_argument("--expert-parallel", type=positive_int, default=1, help="GPUs that share a layer's experts")

    group = parser.add_argument_group("machine")
    group.add_argument("--gpus", type=positive_int, default=1, help="on all nodes together")
    group.add_argument("--gpu", choices=GPUS, default="h100", help="row of the table of datasheets")
    group.add_argument("--gpu-memory", type=positive, metavar="GB", help="default: the datasheet's")
    group.add_argument("--peak-tflops", type=positive, metavar="TFLOP/S", help="likewise; an H200 sustains some 790")
    group.add_argument("--bandwidth", type=positive, metavar="TB/S", help="of GPU memory, likewise")
    group.add_argument(
        "--link", type=positive, metavar="GB/S", help=f"per GPU, one way; default: NVLink, {NETWORK} between nodes"
    )

    group = parser.add_argument_group("output")
    parser.add_switch(group, "--table", False, "the published sizes as a Markdown table, and nothing else")
    parser.add_switch(group, "--json", False, "everything as JSON; bytes, seconds, FLOPs")
    return parser


def main(args) -> None:
    if args.table:
        rows = size_table()
        print(json.dumps(rows, indent=2) if args.json else markdown(rows))
        return
    settings = {name: value for name, value in cli.values(args).items() if value is not None}
    for name in ("table", "json", *MODEL_FLAGS, "dim_heads", "load_base_shapes"):
        settings.pop(name, None)
    settings |= {"model": row_said(args)} | fields_said(args, like=build_config(row_said(args)))
    settings["pixels"] = settings.pop("vae_path") == "none"
    made = plan(**settings)
    if args.json:
        print(json.dumps(asdict(made), indent=2))
    else:
        print(report(made))
        if made.gpus > 1:
            print(f"\n{alternatives(settings)}")


if __name__ == "__main__":
    cli.run(main, get_parser())
