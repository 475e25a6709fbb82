"""The planner: closed forms against counted FLOPs, saved tensors and simulated peaks; arithmetic; report."""

import dataclasses
import json
import re
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, traces_fp32
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import cli
from analysis import plan as planner
from analysis.plan import PRECISIONS, STRATEGIES, Precision, activations, flops, parameter_counts, plan
from cli import UsageError
from configuration import build_config
from models import CHECKPOINTING, DiT
from routers import load_balancing_loss

PUBLISHED = [  # COMPAT: experts, total, activated, forward GMAC of linear layers, with attention products
    ("DiT-S/2", 8, 199_307_552, 71_905_568, "15.43", "16.03"),
    ("DiT-S/2", 16, 369_213_728, 71_942_432, "15.44", "16.04"),
    ("DiT-B/2", 8, 795_861_536, 286_253_600, "61.68", "62.89"),
    ("DiT-L/2", 8, 2_823_764_000, 1_011_824_672, "219.26", "222.48"),
    ("DiT-XL/2", 8, 4_168_172_192, 1_492_730_528, "323.74", "327.97"),
    ("DiT-G/2", 16, 16_503_731_232, 3_181_573_152, "690.94", "698.33"),
    ("Large-DiT-600M/2", 0, 609_738_272, 609_738_272, "116.14", "119.36"),
    ("Large-DiT-3B/2", 0, 4_237_430_816, 4_237_430_816, "928.36", "941.25"),
    ("Large-DiT-7B/2", 0, 7_293_295_648, 7_293_295_648, "1658.72", "1675.90"),
]
LARGE = dict(norm="rms", positions="rope", mlp="swiglu", attention_bias=False, condition_width=32)
VARIANTS = {
    "dense": dict(),
    "dense, QK-norm": dict(qk_norm=True),
    "sparse": dict(num_experts=4),
    "sparse, QK-norm": dict(num_experts=4, qk_norm=True),
    "no shared expert": dict(num_experts=4, num_experts_per_tok=3, num_shared_experts=0, norm_topk_prob=True),
    "every second block": dict(num_experts=8, num_experts_per_tok=1, moe_layers="every-2", expert_ratio=2.0),
    "upcycled": dict(num_experts=4, expert_mlp="gelu", routed_scaling_factor=2.0),
    "patch 4, 3 channels": dict(num_experts=4, patch_size=4, in_channels=3),
    "Large-DiT": LARGE | dict(qk_norm="full"),
    "Large-DiT, sparse, fewer keys": LARGE | dict(num_experts=4, num_kv_heads=2, norm="layer", positions="rope2d"),
}


def config_of(variant: str, name: str = "DiT-Nano/2", **options):
    return build_config(name, **(dict(input_size=16, num_classes=3) | VARIANTS[variant] | options))


def inputs(config, batch: int, device: str = "cpu"):
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device)
    return x, torch.rand(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)


def total_loss(out, routings):
    loss = out.float().square().mean()
    return loss + load_balancing_loss(routings).sum() if routings else loss


# ------------------------------------------------------------------------------------------------------ sizes and FLOPs


def test_published_sizes():
    rows = [
        (
            *(row[key] for key in ("model", "num_experts", "parameters", "activated")),
            *(f"{row[key]:.2f}" for key in ("forward_gmacs_linear", "forward_gmacs")),
        )
        for row in planner.size_table()
    ]
    assert rows == PUBLISHED


def test_table_is_the_readmes():
    def counts(text):
        rows = re.findall(
            r"^\| `([\w-]+/2)`(?:, (\d+) experts)?[^|]*\| ([\d, ]+) \| ([\d,]+) \| ([\d,]+) \|", text, re.M
        )
        return sorted(rows)

    table = counts(planner.markdown(planner.size_table()))
    assert len(table) == len(PUBLISHED) and table == counts((ROOT / "README.md").read_text())


def grouped_mm_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """(P, I) x (E, I, O) -> (P, O), and (O, P) x (P, I) -> (E, O, I) in segments of P: each row meets one matrix."""
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def flash_on_cpu(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def counted_flops(config, batch: int, backward: bool, checkpointed: bool = False) -> float:
    """FlopCounterMode's, for one image; no numbers are computed."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops})
    with FakeTensorMode():
        model = DiT(config)
        model.set_checkpointing("full" if checkpointed else "none")
        for block in model.blocks:
            block.attn.backend = flash_on_cpu
        x, t, y = inputs(config, batch)
        with counter:
            out, routings = model(x, t, y, return_routing=True)
            if backward:
                total_loss(out, routings).backward()
    return counter.get_total_flops() / batch


@traces_fp32
@pytest.mark.parametrize("row", ["DSMoE-S/2", "DiffMoE-S/2", "EC-DiT-L/2", "ProMoE-S/2"])
def test_flops_of_other_routers_are_those_counted(row):
    """Forward; every expert is given what it can take, as capacities are rounded down."""
    config = build_config(row, depth=2, input_size=32, num_experts=8)
    assert counted_flops(config, 2, backward=False) == flops(config).forward + contrastive(config)


def contrastive(config) -> int:
    """Of prototypes in training: means of tokens, and of these the cosines with centres; for one of two images."""
    if config.router != "prototypes":
        return 0
    experts, width = config.num_experts, config.hidden_size
    return 2 * experts * width * planner.tokens_per_image(config) + 2 * experts**2 * width // 2


@traces_fp32
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_counted(variant):
    config = config_of(variant)
    expected = flops(config)
    assert counted_flops(config, 2, backward=False) == expected.forward
    if config.expert_mlp == "gelu":  # the gradient of its biases runs as a product with 8 equal columns of ones
        extra = 2 * 8 * (config.expert_width + config.hidden_size) * config.depth
        expected = dataclasses.replace(
            expected,
            training=expected.training + extra * planner.tokens_per_image(config) * config.num_experts_per_tok,
            checkpointed=expected.checkpointed + extra * planner.tokens_per_image(config) * config.num_experts_per_tok,
        )
    assert counted_flops(config, 2, backward=True) == expected.training
    assert counted_flops(config, 2, backward=True, checkpointed=True) == expected.checkpointed


@traces_fp32
@pytest.mark.parametrize(
    ("name", "options"),
    [("DiT-S/2", dict(num_experts=8)), ("DiT-B/4", {}), ("DiT-XL/2", dict(num_experts=8, depth=2))],
)
def test_flops_of_real_sizes(name, options):
    config = build_config(name, **options)
    assert counted_flops(config, 1, backward=False) == flops(config).forward
    assert counted_flops(config, 1, backward=True) == flops(config).training


# ---------------------------------------------------------------------------------------------------------- activations


def saved_bytes(module, forward) -> tuple[int, int]:
    """Distinct storages that autograd saves in `forward`, or it returns: (activations, copies of weights)."""
    parameters = list(module.parameters())
    own = {tensor.untyped_storage()._cdata for tensor in (*parameters, *module.buffers())}
    shapes = {p.shape for p in parameters} | {p.mT.shape for p in parameters if p.ndim > 1}
    seen = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            is_copy = tensor.dtype != torch.float32 and tensor.shape in shapes
            seen.setdefault(storage._cdata, (storage, is_copy))  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        routings = forward()
    for routing in routings:
        for tensor in (each for each in routing if isinstance(each, torch.Tensor)):
            note(tensor)
    activations = sum(storage.nbytes() for storage, is_copy in seen.values() if not is_copy)
    return activations, sum(storage.nbytes() for storage, is_copy in seen.values() if is_copy)


def bytes_of_copies(config) -> int:
    """Of products: all but the first of the time embedding, whose input needs no gradient; of QK-norm."""
    head = config.hidden_size // config.num_heads
    width = {"none": 0, "head": 2 * head, "full": config.hidden_size + head * config.kv_heads}[config.qk_norm]
    norms = config.depth * 2 * width
    return 2 * (parameter_counts(config).products - 256 * config.modulation_width + norms)


BATCH = 5  # unlike any width, so that no activation has the shape of a weight


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["fp32", "bf16 autocast", "bf16 weights"])
def test_saved_tensors_on_a_cpu(variant, mode):
    """Within 2 %; what is left is scalars, offsets and the like."""
    config = config_of(variant)
    precision = {"fp32": Precision(4, 4), "bf16 autocast": Precision(2, 4), "bf16 weights": Precision(2, 2, 2)}[mode]
    expected = activations(config, precision)
    tokens = planner.tokens_per_image(config)
    dtype = torch.bfloat16 if mode == "bf16 weights" else torch.float32
    model = DiT(config).to(dtype)
    batch = inputs(config, BATCH)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast"):
            return model(*batch, return_routing=True)[1]

    saved, copies = saved_bytes(model, forward)
    assert saved / BATCH == pytest.approx(expected.plain, rel=0.02)
    if mode == "bf16 autocast":
        assert copies == bytes_of_copies(config)

    model.set_checkpointing("full")
    kept, _ = saved_bytes(model, forward)
    assert kept / BATCH == pytest.approx(expected.kept, rel=0.02)

    model.set_checkpointing("none")
    x = torch.randn(BATCH, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    c = torch.randn(BATCH, config.modulation_width, dtype=dtype, requires_grad=True)
    rotation = model._rotation(x.device)

    def again(block):
        def forward():
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast"):
                return [routing for routing in (block(x, c, rotation)[1],) if routing is not None]

        saved, _ = saved_bytes(block, forward)
        return saved - x.nbytes - c.nbytes - BATCH * block.is_moe * planner.routing_bytes(config)

    largest = max(again(block) for block in model.blocks)
    assert largest / BATCH == pytest.approx(expected.block, rel=0.02)


def flash_on_cuda(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def efficient_on_cuda(q, k, v):
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


@traces_fp32
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_saved_tensors_under_cudas_autocast(variant, name):
    """Fake tensors are dispatched as those of a GPU would be, without one."""
    config = config_of(variant)
    with FakeTensorMode(), torch.device("cuda"):
        model = DiT(config)
        for block in model.blocks:
            block.attn.backend = flash_on_cuda if name == "bf16" else efficient_on_cuda
        batch = inputs(config, BATCH, "cuda")

        def forward():
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_enabled("cuda", name == "bf16")  # torch.autocast would ask for a GPU
            torch.autocast_increment_nesting()
            try:
                return model(*batch, return_routing=True)[1]
            finally:
                torch.set_autocast_enabled("cuda", False)
                torch.autocast_decrement_nesting()
                torch.clear_autocast_cache()

        saved, copies = saved_bytes(model, forward)
        model.set_checkpointing("full")
        kept, _ = saved_bytes(model, forward)
    expected = activations(config, PRECISIONS[name])
    assert saved / BATCH == pytest.approx(expected.plain, rel=0.02)
    assert kept / BATCH == pytest.approx(expected.kept, rel=0.02)
    if name == "bf16":
        assert copies == bytes_of_copies(config)


@traces_fp32
@pytest.mark.parametrize("options", [dict(num_experts=8), {}], ids=["sparse", "dense"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 throughout"])
def test_peak_of_a_step(options, checkpointing, precision):
    """Everything that is live, at S's width and 16 images: the peak of forward and backward, without numbers."""
    config = build_config("DiT-S/2", depth=4, **options)
    precision, _, throughout = precision.partition(" ")
    narrow = {"residual_dtype": "bf16"} if throughout else {}
    made = plan("DiT-S/2", batch_size=16, precision=precision, depth=4, **narrow, **options)
    expected = getattr(made, checkpointing).memory
    with FakeTensorMode():
        model = DiT(config)
        model.set_checkpointing(checkpointing)
        model.residual_dtype = torch.bfloat16 if throughout else None
        for block in model.blocks:
            block.attn.backend = flash_on_cpu
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # DDP's buckets are there all the time
            optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        batch = inputs(config, 16)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out, routings = model(*batch, return_routing=True)
            total_loss(out, routings).backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    assert peak == pytest.approx(expected.total - expected.ema, rel=0.03)


@pytest.fixture
def eight_pretended_processes():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(("data_parallel", "accum_iter"), [("sdp", 1), ("fsdp", 1), ("fsdp", 2)])
def test_peak_of_a_sharded_step(data_parallel, accum_iter, checkpointing, eight_pretended_processes):
    """An upper bound: shards of gradients grow while activations shrink, and gathering seldom overlaps reducing."""
    settings = dict(num_experts=8, depth=4)
    made = plan("DiT-B/2", batch_size=32, gpus=8, data_parallel=data_parallel, accum_iter=accum_iter, **settings)
    expected = getattr(made, checkpointing).memory
    options = {"mesh": eight_pretended_processes, "reshard_after_forward": data_parallel == "fsdp"}
    options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    with FakeTensorMode():
        model = DiT(build_config("DiT-B/2", **settings))
        model.set_checkpointing(checkpointing)
        for block in model.blocks:
            block.attn.backend = flash_on_cpu
            fully_shard(block, **options)
        fully_shard(model, **options)
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(())
        batch = inputs(model.config, 32)
        with tracker:
            for micro in range(accum_iter):
                model.set_requires_gradient_sync(micro == accum_iter - 1)
                with torch.autocast("cpu", torch.bfloat16):
                    out, routings = model(*batch, return_routing=True)
                total_loss(out, routings).backward()
                tracker.reset_mod_stats()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    assert peak <= expected.total - expected.ema <= 1.22 * peak


# ------------------------------------------------------------------------------------------ sharding, traffic and time


def xl(**settings):
    return plan("DiT-XL/2", **(dict(num_experts=8, gpus=8, gpu="h200") | settings))


def test_state_of_each_strategy():
    """XL/2-8E on 8 GPUs, in bytes a parameter: weights, gradients, optimizer, EMA."""
    n = parameter_counts(build_config("DiT-XL/2", num_experts=8)).trained
    expected = {
        "ddp": (4, 4, 8, 4),
        "sdp": (4 / 8, 4 / 8, 8 / 8, 4 / 8),
        "fsdp": (4 / 8, 4 / 8, 8 / 8, 4 / 8),
        "zero1": (2, 2, 12 / 8, 4 / 8),
        "zero2": (2, 2 / 8, 12 / 8, 4 / 8),
        "zero3": (2 / 8, 2 / 8, 12 / 8, 4 / 8),
    }
    assert expected.keys() == STRATEGIES.keys()
    for name, per_parameter in expected.items():
        held = xl(data_parallel=name).none.memory
        found = (held.weights / n, held.gradients / n, held.optimizer / n, held.ema / n)
        assert found == pytest.approx(per_parameter), name
        assert held.total == pytest.approx(sum(dataclasses.astuple(held)[:-1]))


def test_state_under_ddp_is_what_the_readme_says():
    """22 bytes a parameter with autocast's copies, whatever the number of GPUs; 20 in fp32."""
    n = parameter_counts(build_config("DiT-XL/2", num_experts=8)).trained
    for gpus in (1, 8):
        held = xl(gpus=gpus).none.memory
        assert (held.total - held.activations) / n == pytest.approx(22, rel=1e-3)
        held = xl(gpus=gpus, precision="fp32").none.memory
        assert held.total - held.activations == 20 * n


def test_gathered_weights():
    parameters = parameter_counts(build_config("DiT-XL/2", num_experts=8))
    reducing = 6 * parameters.block  # a block's gradients in bf16, and cast to fp32
    assert xl(data_parallel="fsdp").none.memory.working == 4 * parameters.block + reducing
    assert xl(data_parallel="sdp").none.memory.working == 2 * parameters.trained + reducing
    assert xl(data_parallel="fsdp", precision="fp32").none.memory.working == (8 + 4) * parameters.block
    accumulating = xl(data_parallel="fsdp", accum_iter=2).none.memory  # gradients stay whole until they meet
    assert accumulating.gradients == 4 * parameters.trained
    assert xl(accum_iter=2).none.memory == xl().none.memory


def test_traffic_of_three_micro_batches():
    n = parameter_counts(build_config("DiT-XL/2", num_experts=8)).trained
    for name, gradients, weights in (
        ("ddp", 2 * 4, 0),
        ("sdp", 4, 2 * 3),
        ("fsdp", 4, 2 * 2 * 3),
        ("zero1", 2, 2),
        ("zero2", 2 * 3, 2),
        ("zero3", 2 * 3, 2 * 2 * 3),
    ):
        sent = xl(data_parallel=name, accum_iter=3).none.communication
        found = (sent.gradients / n * 8 / 7, sent.weights / n * 8 / 7, sent.tokens)
        assert found == pytest.approx((gradients, weights, 0)), name
    assert xl(gpus=1).none.communication.total == 0


def test_expert_parallelism():
    """Experts: one of 8 in each of 8 GPUs. 16 GPUs: two have the same one, half of it each. All else as without."""
    p = parameter_counts(build_config("DiT-XL/2", num_experts=8))
    other = p.trained - p.routed
    made, without = (xl(data_parallel="fsdp", gpus=16, expert_parallel=n) for n in (8, 1))
    held, sent = made.none.memory, made.none.communication
    assert held.weights == without.none.memory.weights == pytest.approx(4 * p.trained / 16)
    assert held.optimizer == 2 * held.weights == 2 * held.gradients == 2 * held.ema
    assert sent.gradients == pytest.approx(4 * (other * 15 / 16 + p.routed / 8 / 2))
    assert sent.weights == pytest.approx(2 * 2 * (other * 15 / 16 + p.routed / 8 / 2))
    assert sent.tokens == 28 * 4 * 32 * 256 * 2 * 1152 * 2 * 7 / 8  # layers, journeys, images, tokens, K, D, bf16
    assert made.full.communication.tokens == 1.5 * sent.tokens
    assert held.working < without.none.memory.working / 2  # a gathered block has one expert, not eight
    assert made.parameters == p


def test_largest_batch_is_the_largest_that_fits():
    everywhere = ("none", "full")
    for settings, kinds in (
        (dict(), CHECKPOINTING),
        (dict(data_parallel="fsdp"), everywhere),
        (dict(data_parallel="zero3", precision="fp32"), everywhere),
    ):
        assert (xl(**settings).selective is None) == ("selective" not in kinds)
        for which in kinds:
            largest = getattr(xl(**settings), which).largest_batch
            room = xl(**settings).hardware.memory * 1e9
            for more in (0, 1):
                outlook = getattr(xl(batch_size=largest + more, **settings), which)
                assert outlook.fits == (outlook.memory.total <= room) == (not more)


def test_what_does_not_fit():
    outlook = xl(gpu="a100", gpus=1).none
    assert outlook.largest_batch == 0 and not outlook.fits and outlook.memory.total > 80e9
    assert xl(gpu="a100", gpu_memory=200).none.fits


def test_elementwise_traffic():
    """With K = 2, SwiGLU experts of 4 D and a shared one of 2 D: 30 D of activation functions, 18 D of all else."""
    config = build_config("DiT-XL/2", num_experts=8)
    assert planner.elementwise_bytes(config, PRECISIONS["bf16"]) == 48 * 1152 * 2 * 256 * 28


def test_time():
    made = xl(peak_tflops=500, bandwidth=4, gpus=1, link=100)
    time, n = made.none.time, made.parameters.trained
    assert time.products == pytest.approx(32 * made.flops.training / 500e12)
    assert time.update == pytest.approx(52 * n / 4e12) and time.casts == pytest.approx(2 * 6 * n / 4e12)
    assert time.hidden == time.exposed == pytest.approx(sum(dataclasses.astuple(time)[:5]))
    assert made.none.images_per_second == pytest.approx(32 / time.hidden)
    checkpointed = made.full.time
    assert checkpointed.products == pytest.approx(32 * made.flops.checkpointed / 500e12)
    assert checkpointed.elementwise == pytest.approx(4 / 3 * time.elementwise)

    twice = xl(peak_tflops=500, bandwidth=4, gpus=1, accum_iter=2).none.time
    assert twice.products == 2 * time.products and twice.update == time.update
    slow = xl(link=0.1).none.time
    assert slow.hidden == slow.communication < slow.exposed
    one = xl(batch_size=1, gpus=1, bandwidth=0.1).none.time  # reading the weights takes longer than using them
    assert one.products == pytest.approx(3 * 2 * made.parameters.products / 0.1e12)


def test_links():
    assert xl(gpus=8).hardware.link == planner.GPUS["h200"].link
    assert xl(gpus=16).hardware.link == planner.NETWORK
    assert xl(gpus=16, link=100).hardware.link == 100


# -------------------------------------------------------------------------------------------------------- command line


def run_script(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["analysis.plan", *arguments])
    cli.run(planner.main, planner.get_parser())
    return capsys.readouterr().out


def test_report(monkeypatch, capsys):
    flags = ["--model", "DiT-XL/2", "--num_experts", "8", "--gpus", "8", "--data-parallel", "fsdp", "--gpu", "h100"]
    text = run_script(monkeypatch, capsys, *flags)
    for wanted in ("4,168,172,192", "1,492,730,528", "655.9 GFLOP", "fits in 80 GB", *STRATEGIES):
        assert wanted in text
    assert max(map(len, text.splitlines())) <= 120
    assert "sent per GPU" not in run_script(monkeypatch, capsys)


def test_json(monkeypatch, capsys):
    flags = ["--model", "DiT-S/2", "--num-experts=8", "--image-size", "512", "--qk-norm", "--moe_layers", "every-2"]
    made = json.loads(run_script(monkeypatch, capsys, *flags, "--json"))
    expected = plan("DiT-S/2", num_experts=8, image_size=512, qk_norm=True, moe_layers="every-2")
    assert made == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert made["config"]["input_size"] == 64 and made["none"]["memory"]["total"] > 0
    pixels = json.loads(run_script(monkeypatch, capsys, "--vae-path", "none", "--image-size", "32", "--json"))
    assert (pixels["config"]["input_size"], pixels["config"]["in_channels"]) == (32, 3)
    rows = json.loads(run_script(monkeypatch, capsys, "--table", "--json"))
    assert [row["parameters"] for row in rows] == [row[2] for row in PUBLISHED]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model DiT-XXL/2", "unknown model"),
        ("--image-size 250", "multiple of 8"),
        ("--num_experts 4 --num_experts_per_tok 5", "num_experts_per_tok must lie"),
        ("--moe-layers none --num_experts 4", "moe_layers"),
        ("--expert-parallel 4 --gpus 4 --data-parallel fsdp", "number of experts, 0"),
        ("--expert-parallel 4 --num_experts 8 --gpus 6 --data-parallel fsdp", "number of processes, 6"),
        ("--expert-parallel 4 --num_experts 6 --gpus 4 --data-parallel fsdp", "number of experts, 6"),
        ("--expert-parallel 4 --num_experts 8 --gpus 4 --data-parallel zero3", "not with zero3"),
        ("--data-parallel zero4", "zero4"),
        ("--gpu b200", "b200"),
        ("--gpus 0", "at least 1"),
        ("--gpu-memory -3", "expected a number"),
    ],
)
def test_wrong_input(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, capsys, *flags.split())
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in error[-1]
    assert len([line for line in error if not line.startswith("usage:")]) == 1


def test_wrong_names_from_python():
    for wrong in (dict(gpu="v100"), dict(precision="int8"), dict(data_parallel="zero4")):
        with pytest.raises(UsageError, match="unknown"):
            plan(**wrong)
