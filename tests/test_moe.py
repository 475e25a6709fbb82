"""The fast path of the mixture of experts against an obvious loop over tokens, outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from conftest import traces_fp32
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import AddBias, FP32Linear
from models import build_model
from moe import EXPERTS, ExpertsConfig, MoE, load_statistics, router_entropy
from routers import RouterConfig, Routing, Where, load_balancing_loss

every_kind = pytest.mark.parametrize("kind", EXPERTS)


def make_moe(
    experts=4, top_k=2, width=16, hidden=8, shared=16, normalize=False, kind="swiglu", scaling=1.0, seed=0
) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(
        hidden,
        ExpertsConfig(width, RouterConfig(experts, top_k, normalize=normalize, scaling_factor=scaling), shared, kind),
    )
    moe.init_weights()
    for name, parameter in moe.named_parameters():
        if name.endswith("bias"):  # fresh ones are zero, and would hide a mistake
            torch.nn.init.normal_(parameter, std=0.3)
    return moe


def one_expert(experts, index: int, token: torch.Tensor) -> torch.Tensor:
    if "gate_up_proj" in dict(experts.named_parameters()):
        gate, up = (experts.gate_up_proj[index] @ token).chunk(2)
        return experts.down_proj[index] @ (F.silu(gate) * up)
    hidden = experts.fc1_weight[index] @ token + experts.fc1_bias[index]
    return experts.fc2_weight[index] @ F.gelu(hidden, approximate="tanh") + experts.fc2_bias[index]


def per_token(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """The definition: for each token, each chosen expert's output by its weight, plus the shared expert."""
    outputs = []
    for token in x.flatten(0, -2):
        probs = torch.softmax(moe.gate.weight @ token, dim=0)
        chosen = probs.topk(moe.gate.top_k).indices
        total = probs[chosen].sum() if moe.gate.config.normalize else 1.0
        out = 0
        for expert in chosen:
            weight = moe.gate.config.scaling_factor * probs[expert] / total
            out = out + weight * one_expert(moe.experts, expert, token)
        if moe.shared_experts is not None:
            s = moe.shared_experts
            gate, up = (s.gate_up_proj.weight @ token).chunk(2)
            out = out + s.down_proj.weight @ (F.silu(gate) * up)
        outputs.append(out)
    return torch.stack(outputs).view(x.shape)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def send_all_to(moe: MoE, expert: int) -> None:
    """Router weights for which positive tokens all prefer `expert`, the others in order of their number."""
    with torch.no_grad():
        moe.gate.weight.copy_(-torch.arange(len(moe.gate.weight)).float()[:, None].expand_as(moe.gate.weight))
        moe.gate.weight[expert] = 1.0


CASES = {
    "usual": dict(),
    "one of four": dict(top_k=1),
    "all of four": dict(top_k=4),
    "one expert": dict(experts=1, top_k=1),
    "no shared expert": dict(shared=0),
    "normalized": dict(normalize=True),
    "scaled": dict(scaling=2.5),
    "normalized, then scaled": dict(normalize=True, scaling=0.5),
    "more experts than assignments": dict(experts=64),
    "more experts than a byte counts": dict(experts=300, top_k=3),
}


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
@pytest.mark.parametrize("case", CASES)
@every_kind
def test_equals_per_token_loop(kind, case, backend):
    moe = make_moe(kind=kind, **CASES[case])
    moe.experts.backend = backend
    x = torch.randn(2, 7, 8, requires_grad=True)
    weights = torch.randn(2, 7, 8)

    out, _ = moe(x)
    fast = gradients(moe, (out * weights).sum()) | {"x": x.grad.clone()}
    x.grad = None
    expected = per_token(moe, x)
    slow = gradients(moe, (expected * weights).sum()) | {"x": x.grad.clone()}

    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("top_k", [1, 2])
@every_kind
def test_all_tokens_to_one_expert_leaves_the_others_without_gradient(kind, top_k):
    moe = make_moe(top_k=top_k, shared=0, kind=kind)
    send_all_to(moe, 2)
    x = torch.rand(1, 9, 8) + 0.1
    out, routing = moe(x)
    assert routing.tokens_per_expert[2] == 9 and routing.tokens_per_expert.sum() == 9 * top_k
    torch.testing.assert_close(out, per_token(moe, x), rtol=1e-5, atol=1e-6)
    got = gradients(moe, out.square().sum())
    for expert in range(4):
        used = routing.tokens_per_expert[expert] > 0
        for name, _ in moe.experts.named_parameters():
            assert got[f"experts.{name}"][expert].any() == used, name


@every_kind
def test_gradients_in_double_precision(kind):
    """gradcheck compares the hand-written backward of dispatch and combine with finite differences."""
    moe = make_moe(shared=8, kind=kind).double()
    moe.experts.backend = "loop"
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*moe.experts.named_parameters(), strict=True)

    def function(x, *experts):
        state = {f"experts.{n}": p for n, p in zip(names, experts, strict=True)}
        return torch.func.functional_call(moe, state, x)[0]

    # The router works in fp32 by design: here its weights are constant, and the per-token loop checks its gradient.
    moe.gate.weight.data.zero_()
    assert torch.autograd.gradcheck(function, (x, *parameters), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_each_row_and_its_gradient(dtype):
    """Segments of several lengths, none at the start, in the middle and at the end."""
    counts = torch.tensor([0, 3, 0, 1, 12, 0])
    offsets, expert_of_row = counts.cumsum(0).int(), torch.repeat_interleave(torch.arange(6), counts)
    torch.manual_seed(0)
    y = torch.randn(16, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    out = AddBias.apply(y, bias, offsets)
    torch.testing.assert_close(out, y + bias[expert_of_row])
    weights = torch.randn(16, 8, dtype=dtype)
    got = torch.autograd.grad((out * weights).sum(), (y, bias))
    assert torch.equal(got[0], weights)
    exact = torch.zeros(6, 8).index_add_(0, expert_of_row, weights.float())
    torch.testing.assert_close(got[1], exact.to(dtype))


@every_kind
def test_hidden_units_are_views_of_what_belongs_together(kind):
    """Dropping unit f from every view is the same as an expert that never had it."""
    moe = make_moe(kind=kind, width=16)
    for units in moe.experts.hidden_units().values():
        assert units.shape[:2] == (4, 16)
        units[:, 3] = 0  # gelu(0) = 0 and silu(0) * 0 = 0
    narrow = make_moe(kind=kind, width=15)
    narrow.gate, narrow.shared_experts = moe.gate, moe.shared_experts
    for theirs, ours in zip(moe.experts.hidden_units().values(), narrow.experts.hidden_units().values(), strict=True):
        ours.copy_(torch.cat([theirs[:, :3], theirs[:, 4:]], dim=1))
    if kind == "gelu":
        narrow.experts.fc2_bias = moe.experts.fc2_bias
    narrow.experts.backend = "loop"  # grouped products want widths that are multiples of 8
    x = torch.randn(1, 9, 8)
    torch.testing.assert_close(moe(x)[0], narrow(x)[0])


def test_fresh_experts_are_scaled_as_single_linears():
    """Xavier's bound is that of one (F, D) projection, not of the stack."""
    for kind, widths in {"swiglu": 3, "gelu": 2}.items():
        moe = MoE(32, ExpertsConfig(128, RouterConfig(4, 2), kind=kind))
        moe.init_weights()
        bound = (6 / (32 + 128)) ** 0.5
        projections = [units for units in moe.experts.hidden_units().values() if units.shape[2] > 1]
        assert len(projections) == widths
        assert all(0.99 * bound < units.abs().amax(dim=(1, 2)).min() <= bound for units in projections)
        assert not any(p.any() for name, p in moe.experts.named_parameters() if name.endswith("bias"))


def test_routing_describes_the_sorted_order():
    moe = make_moe(experts=5, top_k=2)
    tokens = torch.randn(33, 8)
    routing = moe.gate(tokens, Where(1))
    assert isinstance(routing, Routing)
    probs = torch.softmax(tokens @ moe.gate.weight.T, dim=1)
    torch.testing.assert_close(routing.probs, probs)
    torch.testing.assert_close(routing.weights, probs.gather(1, routing.expert_ids))
    assert torch.equal(routing.tokens_per_expert, torch.bincount(routing.expert_ids.flatten(), minlength=5).int())
    in_order = routing.expert_ids.flatten()[routing.order]
    assert torch.equal(in_order, in_order.sort().values)
    assert torch.equal(routing.order.sort().values, torch.arange(66))


@pytest.mark.parametrize("autocast", [False, True])
def test_router_product_in_fp32(autocast):
    """Whatever autocast says, and with gradients of the dtypes of its inputs."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(4, 8, requires_grad=True)
    grad = torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = FP32Linear.apply(x, weight)
        found = torch.autograd.grad(out, (x, weight), grad)
    assert out.dtype == torch.float32 and torch.equal(out, F.linear(x.float(), weight))
    assert torch.equal(found[0], (grad @ weight).bfloat16()) and torch.equal(found[1], grad.T @ x.float())


@traces_fp32
@every_kind
def test_traces_as_one_graph_without_host_access(kind):
    """A data-dependent host access would break the graph; forward and backward are both one graph."""
    moe = make_moe(kind=kind)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 8, requires_grad=True)
    out, _ = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(out, moe(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@traces_fp32
@every_kind
def test_runs_forward_and_backward_on_fake_tensors(kind, dtype):
    """Fake tensors have shapes but no values: reading one, in either direction, raises."""
    with FakeTensorMode():
        moe = MoE(16, ExpertsConfig(32, RouterConfig(4, 2), 16, kind=kind))
        x = torch.randn(2, 7, 16, requires_grad=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out, routing = moe(x)
            loss = out.float().sum() + load_balancing_loss([routing]).sum()
        loss.backward()
        assert all(p.grad.shape == p.shape for p in moe.parameters())


@every_kind
def test_repeat_runs_are_bit_identical(kind):
    moe = make_moe(experts=8, hidden=32, width=64, kind=kind)
    x = torch.randn(4, 64, 32)
    runs = []
    for _ in range(2):
        out, routing = moe(x)
        loss = out.square().mean() + load_balancing_loss([routing]).sum()
        runs.append(gradients(moe, loss) | {"out": out.detach()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@every_kind
def test_output_of_an_image_does_not_depend_on_its_batch(kind):
    moe = make_moe(experts=8, hidden=32, width=64, kind=kind)
    x = torch.randn(6, 16, 32)
    together = moe(x)[0]
    for i in range(6):
        torch.testing.assert_close(moe(x[i : i + 1])[0][0], together[i], rtol=1e-5, atol=1e-6)


@every_kind
def test_half_precision_stays_near_full_precision(kind):
    """Under autocast and with bf16 weights; the router's decision is fp32 in both."""
    moe = make_moe(hidden=32, width=64, kind=kind)
    x = torch.randn(2, 16, 32)
    exact, routing = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, same = moe(x)
    assert same.probs.dtype == torch.float32 and torch.equal(same.expert_ids, routing.expert_ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 1e-2
    half, routing = moe.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and routing.probs.dtype == torch.float32


def test_balance_loss_is_its_definition():
    moe = make_moe(experts=4, top_k=2)
    x = torch.randn(3, 10, 8)
    _, routing = moe(x)
    f = torch.stack([(routing.expert_ids == e).float().sum() / 60 * 4 for e in range(4)])
    p = routing.probs.mean(0)
    torch.testing.assert_close(load_balancing_loss([routing, routing]), torch.stack([(f * p).sum()] * 2))
    expected = torch.autograd.grad((f * p).sum(), moe.gate.weight, retain_graph=True)[0]
    assert expected.any()
    torch.testing.assert_close(torch.autograd.grad(load_balancing_loss([routing]).sum(), moe.gate.weight)[0], expected)


def test_balance_loss_is_one_when_uniform_and_large_when_collapsed():
    uniform = make_moe(experts=4, top_k=4)
    assert load_balancing_loss([uniform(torch.randn(1, 8, 8))[1]]).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = make_moe(experts=4, top_k=1)
    with torch.no_grad():
        collapsed.gate.weight[:] = -50
        collapsed.gate.weight[1] = 50
    assert load_balancing_loss([collapsed(torch.rand(1, 8, 8) + 1)[1]]).item() == pytest.approx(4.0, abs=1e-5)


def test_balance_loss_over_processes_is_that_of_the_global_batch():
    """Two halves of a batch with summed counts average to the loss and gradient of the whole."""
    moe = make_moe(experts=4)
    x = torch.randn(2, 10, 8)
    whole = moe(x)[1]
    halves = [moe(x[:1])[1], moe(x[1:])[1]]
    counts = sum(h.tokens_per_expert for h in halves).float()[None]
    parts = [load_balancing_loss([h], sum_over_processes=lambda c: counts) for h in halves]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, load_balancing_loss([whole]).sum())
    torch.testing.assert_close(
        torch.autograd.grad(mean, moe.gate.weight)[0],
        torch.autograd.grad(load_balancing_loss([whole]).sum(), moe.gate.weight)[0],
    )


def test_load_statistics_and_entropy():
    statistics = load_statistics(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]))
    assert statistics["load_max_over_mean"] == [1.0, 4.0]
    assert statistics["load_cv"] == pytest.approx([0.0, 3**0.5])
    moe = make_moe(experts=4)
    with torch.no_grad():
        moe.gate.weight.zero_()
    routing = moe(torch.randn(1, 4, 8))[1]
    assert router_entropy([routing]).tolist() == pytest.approx([1.0])
    with torch.no_grad():
        moe.gate.weight[0] = 1e4
    assert router_entropy([moe(torch.rand(1, 4, 8) + 1)[1]]).tolist() == pytest.approx([0.0])


# -------------------------------------------------------------------------------------- what no other test would notice


def test_assignments_of_an_expert_keep_their_order():
    order, offsets = kernels.sort_by_expert(torch.arange(4000).view(-1, 2) % 3, num_experts=3)
    for segment in order.tensor_split(offsets[:-1].tolist()):
        assert torch.equal(segment, segment.sort().values)
    for experts in (256, 257):  # the edge of the narrow keys
        order, offsets = kernels.sort_by_expert(torch.arange(experts).flip(0).view(-1, 1), num_experts=experts)
        assert order.tolist() == list(range(experts))[::-1] and offsets.tolist() == list(range(1, experts + 1))


def test_gradients_of_routing_weights_add_up_in_fp32():
    y, direction = torch.randn(2, 64, 512).bfloat16()
    weights = torch.ones(64, requires_grad=True)
    kernels.Weighted.apply(y, weights).backward(direction)
    exact = (direction * y).double().sum(dim=1)
    assert (weights.grad - exact).abs().max() < 1e-3  # in bf16 it is off by .1

    gate_up, down = torch.randn(64, 1024).bfloat16(), torch.eye(512).bfloat16().unsqueeze(0)
    hidden, weights.grad = kernels.SwiGLU.apply(gate_up), None
    kernels.SwiGLUDown.apply(gate_up, weights, down, torch.tensor([64], dtype=torch.int32)).backward(direction)
    assert (weights.grad - (direction * hidden).double().sum(dim=1)).abs().max() < 1e-3


@pytest.mark.parametrize("frozen", ["experts.down_proj", "experts.gate_up_proj", "gate.weight"])
@pytest.mark.parametrize("count", [5, 0], ids=["tokens", "no tokens"])
def test_frozen_parameters_take_no_gradient_from_the_others(frozen, count):
    moe = MoE(16, ExpertsConfig(16, RouterConfig(3, 2), 16))
    moe.init_weights()
    x, found = torch.randn(1, count, 16), []
    moe.get_parameter(frozen).requires_grad_(False)
    for moe.experts.backend in ("grouped_mm", "loop"):
        moe.zero_grad()
        moe(x)[0].square().sum().backward()
        found.append({name: p.grad for name, p in moe.named_parameters() if p.requires_grad})
    assert moe.get_parameter(frozen).grad is None and len(found[0]) == len(list(moe.parameters())) - 1
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name])


def test_the_precision_of_products_is_that_of_autocast():
    weight, moe = torch.zeros(2, 2), MoE(16, ExpertsConfig(16, RouterConfig(2, 1)))
    moe.init_weights()
    assert kernels.compute_dtype(weight) == torch.float32 and moe(torch.randn(3, 16))[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.compute_dtype(weight) == torch.bfloat16 and moe(torch.randn(3, 16))[0].dtype == torch.bfloat16


def test_compiled_sums_are_not_widened_by_autocast(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    rows, places = torch.randn(4, 8).bfloat16(), torch.tensor([[0, 1], [2, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.gather_sum(rows, places).dtype == torch.bfloat16


def test_widths_of_initial_weights():
    """Xavier's bound of each projection on its own, Kaiming's of the gate: sqrt(6 / (in + out)), 1 / sqrt(in)."""
    moe = MoE(64, ExpertsConfig(128, RouterConfig(4, 2), shared_width=256))
    model = build_model("DiT-Nano/2", num_experts=4)
    moe.init_weights()
    shared = model.blocks[0].moe.shared_experts
    for weights, bound in (
        (moe.gate.weight, 1 / 8),
        (moe.experts.gate_up_proj, (6 / (64 + 128)) ** 0.5),
        (moe.experts.down_proj, (6 / (64 + 128)) ** 0.5),
        (shared.gate_up_proj.weight, (6 / (64 + 128)) ** 0.5),  # two shared experts of width 64
    ):
        assert 0.9 * bound < weights.abs().max() <= bound


def test_entropy_of_one_expert_is_none():
    moe = MoE(16, ExpertsConfig(16, RouterConfig(1, 1)))
    moe.init_weights()
    assert router_entropy([moe(torch.randn(5, 16))[1]]).tolist() == [0]
