"""Every router of the field: against its public code, against a loop over tokens, and by the same scripts."""

import pytest
import torch
from conftest import Golden

import families
from configuration import DiTConfig, infer_config
from models import DiT
from routers import ROUTERS

SMALL = dict(depth=2, hidden_size=32, num_heads=2, input_size=8, patch_size=2, moe_layers="1", num_experts=4)
PUBLIC = {  # golden file: fields of the model
    "router_promoe_tc": dict(
        router="prototypes",
        num_experts_per_tok=1,
        expert_ratio=2.0,
        expert_mlp="gelu",
        num_shared_experts=1,
        shared_expert_ratio=2.0,
        shared_mlp="gelu",
    ),
    "router_promoe_ec": dict(
        router="prototypes-expert-choice",
        num_experts_per_tok=1,
        expert_ratio=2.0,
        expert_mlp="gelu",
        num_shared_experts=1,
        shared_expert_ratio=2.0,
        shared_mlp="gelu",
    ),
    "router_ecdit": dict(
        router="expert-choice", num_experts_per_tok=1, expert_ratio=4.0, expert_mlp="gelu", num_shared_experts=0
    ),
    "router_diffmoe": dict(
        router="batch-pool", num_experts_per_tok=1, expert_ratio=4.0, expert_mlp="gelu", num_shared_experts=0
    ),
    "router_dsmoe": dict(
        router="sigmoid",
        router_bias=True,
        router_groups=2,
        router_kept_groups=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        num_experts_per_tok=2,
        expert_ratio=2.0,
        num_shared_experts=1,
        shared_expert_ratio=2.0,
        positions="rope2d-half",
        mlp="silu",
    ),
}


def load(name: str) -> tuple[Golden, DiT]:
    golden = Golden(name)
    model = DiT(DiTConfig(**SMALL, **PUBLIC[name]))
    model.load_state_dict(golden.part("model."))
    return golden, model


@pytest.mark.parametrize("name", PUBLIC)
def test_outputs_losses_and_gradients_are_those_of_the_public_code(name):
    golden, model = load(name)
    inputs = [golden[f"in.{key}"] for key in ("x", "t", "y")]
    gate = model.blocks[1].moe.gate
    if name == "router_diffmoe":
        gate.published_pool = True
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs), golden["out.eval"], rtol=0, atol=1e-5)
        alone = model(*(each[:1] for each in inputs))
        torch.testing.assert_close(alone, golden["out.eval_first_alone"], rtol=0, atol=1e-5)
    out, (routing,) = model.train()(*inputs, return_routing=True)
    torch.testing.assert_close(out, golden["out.train"], rtol=0, atol=1e-5)
    loss = (out * golden["in.out_weight"]).mean()
    for key, value in routing.losses.items():
        assert value.item() == pytest.approx(golden[f"train.{key}_loss"].item(), rel=1e-5)
        loss = loss + value
    loss.backward()
    named = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    gradients = families.to_published(named, config=model.config)
    for key, expected in golden.part("grad.").items():
        found = gradients.get(key, torch.zeros_like(expected))
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-9, key
    after = golden.part("after.")
    if after:
        gate.after_step(routing.tokens_per_expert, routing.observed)
        torch.testing.assert_close(gate.expert_threshold, after["blocks.1.mlp.expert_threshold"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PUBLIC)
def test_published_names_are_read_and_written(name):
    golden, model = load(name)
    theirs = golden.part("model.")
    family = families.family_of(theirs)
    assert families.family_for(model.config) is family
    written = families.to_published(model.state_dict(), config=model.config)
    assert written.keys() == theirs.keys() and all(torch.equal(written[key], theirs[key]) for key in theirs)
    shapes = {key: tuple(value.shape) for key, value in families.from_published(theirs).items()}
    known = family.KNOWN | {"num_heads": 2, "input_size": 8, "router": model.config.router}
    assert infer_config(shapes, **known).to_dict() == model.config.to_dict()


def options(kind: str, **more) -> dict:
    return SMALL | dict(router=kind, num_experts_per_tok=2, expert_ratio=1.0, moe_layers="all") | more


def randomized(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("kind", ROUTERS)
def test_an_image_does_not_depend_on_the_others(kind):
    model = randomized(DiTConfig(**options(kind))).eval()
    x, t, y = torch.randn(32, 4, 8, 8), torch.linspace(0, 999, 32), torch.arange(32) % 11 * 100
    with torch.no_grad():
        together, alone = (
            model(x, t, y),
            torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(32)]),
        )
    assert 1000 in y  # of nothing
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_the_fast_path_is_the_sum_over_chosen_experts(kind, training):
    """Outputs and every gradient, of all experts by their dense weights."""
    moe = randomized(DiTConfig(**options(kind))).blocks[0].moe.train(training)
    x, null = torch.randn(4, 16, 32, requires_grad=True), torch.tensor([False, True, False, False])
    out, routing = moe(x, null)
    assert routing.chosen.sum() == (routing.dense_weights != 0).sum()
    assert torch.equal(routing.chosen.sum(dim=0) <= routing.tokens_per_expert, torch.ones(moe_count(moe)).bool())
    assert torch.allclose(routing.probs.sum(dim=1), torch.ones(64))
    tokens = x.flatten(0, 1)
    each = []
    for expert in range(moe_count(moe)):
        ends = torch.zeros(moe_count(moe), dtype=torch.int32)
        ends[expert:] = len(tokens)
        each.append(moe.experts(tokens, ends))
    dense = (torch.stack(each, dim=1) * routing.dense_weights.unsqueeze(-1)).sum(dim=1)
    expected = moe.shared_experts(tokens, dense).view(x.shape)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    parameters = [x, *(p for name, p in moe.named_parameters() if "capacity" not in name)]
    weight = torch.randn(out.shape)
    ours, theirs = (torch.autograd.grad((o * weight).sum(), parameters, retain_graph=True) for o in (out, expected))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def moe_count(moe) -> int:
    return moe.gate.config.experts + moe.gate.extra_experts
