"""muP against the numbers of the public code: initial deviations, learning rates, multiplier, five steps of AdamW."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Golden

from base_shapes import base_shapes, read_base_width, write_base_shapes
from cli import UsageError
from configuration import DiTConfig, build_config
from diffusion import GaussianDiffusion
from models import DiT
from optim import build_optimizer, parameter_groups, set_lr
from parametrization import lr_factors, readout_multiplier

WIDTHS = json.loads((GOLDEN / "mup.json").read_text())
TRAINING = json.loads((GOLDEN / "dit_mup_training.json").read_text())["runs"]


def mup(**options) -> DiTConfig:
    return build_config("DiT-muP-4h/2", **(dict(depth=2, input_size=8, num_classes=10) | options))


# --------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("width", [144, 576, 1152])
def test_deviations_and_learning_rates_are_those_of_the_public_code(width):
    golden = WIDTHS["widths"][str(width)]
    config = mup(hidden_size=width, num_heads=width // 72, input_size=32, num_classes=1000)
    model = DiT(config)
    assert readout_multiplier(config) == golden["readout_multiplier"]
    factors = lr_factors(model)
    assert factors.keys() == golden["parameters"].keys() - {"pos_embed"}
    for name, parameter in model.named_parameters():
        expected = golden["parameters"][name]
        assert list(parameter.shape) == expected["shape"]
        assert factors[name] == expected["lr_multiplier"], name
        assert parameter.std(correction=0).item() == pytest.approx(expected["init_std"], rel=0.05), name


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_that_of_the_public_code(name):
    run, golden = TRAINING[name], Golden("dit_mup_training")
    sizes, head = run["config"], run["config"]["head_dim"]
    config = mup(
        patch_size=4,
        hidden_size=run["hidden_size"],
        num_heads=sizes["num_heads"],
        input_size=16,
        base_width=head * sizes["base_num_heads"],
        output_mult=2.0 ** sizes["logstd"],
    )
    model = DiT(config)
    if run["weights"] == "numpy":
        model.load_state_dict(drawn_weights(model, run["seed"]), strict=False)
    else:
        model.load_state_dict(golden.part(f"{name}.model."))
    assert readout_multiplier(config) == pytest.approx(run["readout_forward_multiplier"], rel=1e-15)
    assert lr_factors(model) == pytest.approx(run["lr_multiplier"], rel=1e-15)
    assert read_base_width(GOLDEN / run["bsh"], config) == config.base_width

    x, noise, t, y = (golden[f"{name}.in.{part}"] for part in ("x", "noise", "t", "y"))
    objective = GaussianDiffusion()
    batch = objective.at(x, noise, t)
    optimizer, losses = build_optimizer(model, 1.0, 0.0), []
    assert (model(x, t, y) - golden[f"{name}.out.before"]).abs().max() < 1e-4
    for step in range(6):
        loss = objective.loss(model(batch.x_t, t, y), batch)["loss"].mean()
        losses.append(loss.item())
        if step < 5:
            set_lr(optimizer.param_groups, 2.0 ** run["loglr"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses == pytest.approx(run["losses"], rel=1e-5)
    assert (model(x, t, y) - golden[f"{name}.out.after"]).abs().max() < 1e-3


def drawn_weights(model: DiT, seed: int) -> dict[str, torch.Tensor]:
    """The numbers of the golden runs whose weights are not stored."""
    stream, made = np.random.RandomState(seed), {}
    for name, parameter in sorted(model.named_parameters()):
        std = 1 / parameter[0].numel() ** 0.5
        std = 0.05 if name.endswith("bias") else 1.0 if "table" in name else std * (0.5 if "adaLN" in name else 1)
        values = stream.standard_normal(tuple(parameter.shape)).astype(np.float32) * np.float32(std)
        made[name] = torch.from_numpy(values)
    return made


# --------------------------------------------------------------------------------------------------------- base shapes


@pytest.mark.parametrize("head", [12, 72])
def test_base_shapes_are_written_as_the_public_code_writes_them(head, tmp_path):
    config = mup(patch_size=4, hidden_size=8 * head, num_heads=8, base_width=4 * head)
    write_base_shapes(tmp_path / "ours.bsh", config, config.base_width)

    def without_comments(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if not line.startswith("#")]

    assert without_comments(tmp_path / "ours.bsh") == without_comments(GOLDEN / f"dit_mup_d2_p4_hd{head}.bsh")


@pytest.mark.parametrize("row", ["DiT-S/2", "DiT-XL/2", "Large-DiT-3B/2"])
def test_base_shapes_of_every_family_and_of_mixtures_are_read_again(row, tmp_path):
    config = build_config(row, parametrization="mup", depth=2, num_experts=4)
    width = config.hidden_size // config.num_heads * 4
    write_base_shapes(tmp_path / "x.bsh", config, width)
    assert read_base_width(tmp_path / "x.bsh", config) == width
    names = base_shapes(config, width)
    gate = next(name for name in names if "gate.weight" in name and "experts" not in name)
    assert names[gate] == [None, width]


BAD_SHAPES = {
    "of another depth": ("- 288", "- 288", dict(depth=3), "blocks.2.adaLN_modulation.1.bias is absent in the file"),
    "of another size": ("fc1.bias:\n- 1152", "fc1.bias:\n- 1153", {}, "blocks.0.mlp.fc1.bias is [1153] in the file"),
    "with a program": ("- 288", "- !!python/object/apply:os.getcwd []", {}, "could not determine a constructor"),
    "no list": ("pos_embed:\n- null\n- null\n- 288", "pos_embed: 288", {}, "pos_embed is 288"),
    "no mapping": ("blocks.0", "- blocks.0", {}, "is not a file of base shapes"),
    "without the width": ("x_embedder.proj.bias:\n- 288", "other:\n- 288", {}, "no width for x_embedder.proj.bias"),
    "of no whole heads": (
        "x_embedder.proj.bias:\n- 288",
        "x_embedder.proj.bias:\n- 300",
        {},
        "width 300 is no multiple",
    ),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_base_shapes_that_do_not_fit_are_refused_by_name(case, tmp_path):
    old, new, options, expected = BAD_SHAPES[case]
    path = tmp_path / "x.bsh"
    path.write_text((GOLDEN / "dit_mup_d2_p4_hd72.bsh").read_text().replace(old, new))
    with pytest.raises(UsageError) as error:
        read_base_width(path, mup(patch_size=4, **options))
    assert (expected in str(error.value) and "x.bsh" in str(error.value)) or "width 300" in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- rules


def test_groups_follow_the_rules_and_leave_learning_rate_times_decay_alone():
    config = mup(hidden_size=576, num_heads=8, num_experts=4, moe_layers="1")
    with torch.device("meta"):
        model = DiT(config)
    groups, names = parameter_groups(model, 1e-2, 0.1), {p: name for name, p in model.named_parameters()}
    found = {names[p]: (group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(names)
    assert found["blocks.1.moe.gate.weight"] == found["blocks.1.moe.experts.down_proj"] == (0.5, 0.2)
    assert found["blocks.1.moe.shared_experts.gate_up_proj.weight"] == found["blocks.0.mlp.fc2.weight"] == (0.5, 0.2)
    assert found["x_embedder.proj.weight"] == found["final_layer.linear.weight"] == (1.0, 0.1)
    assert found["y_embedder.embedding_table.weight"] == found["blocks.0.attn.qkv.bias"] == (1.0, 0.0)
    assert all(group["lr"] == 1e-2 * group["lr_factor"] for group in groups)


def test_experts_and_routers_are_drawn_by_the_rules():
    torch.manual_seed(0)
    config = mup(hidden_size=576, num_heads=8, num_experts=8, depth=1)
    moe = DiT(config).blocks[0].moe
    assert moe.gate.weight.std().item() == pytest.approx(1 / 576, rel=0.05)
    assert moe.experts.gate_up_proj.std().item() == pytest.approx(576**-0.5, rel=0.01)
    assert moe.experts.down_proj.std().item() == pytest.approx(config.expert_width**-0.5, rel=0.01)
    assert moe.shared_experts.down_proj.weight.std().item() == pytest.approx(config.shared_width**-0.5, rel=0.01)


def test_the_conditioning_of_a_fixed_width_learns_as_at_the_base():
    with torch.device("meta"):
        model = DiT(build_config("Large-DiT-3B/2", parametrization="mup", depth=1, base_width=1536, qk_norm=True))
    factors = lr_factors(model)
    assert factors["blocks.0.adaLN_modulation.1.weight"] == factors["t_embedder.mlp.2.weight"] == 1.0
    assert factors["blocks.0.attn.qkv.weight"] == factors["blocks.0.mlp.down_proj.weight"] == 0.5
    assert factors["blocks.0.norm1.weight"] == factors["blocks.0.attn.q_norm.weight"] == 1.0


def test_the_usual_base_is_the_smallest_of_the_rows_with_the_same_heads():
    bases = {row: build_config(row, parametrization="mup").base_width for row in ("DiT-L/2", "DiT-XL/2", "DiT-G/2")}
    assert bases == {"DiT-L/2": 384, "DiT-XL/2": 288, "DiT-G/2": 1408}
    assert build_config("DiT-S/2", parametrization="mup", hidden_size=96, num_heads=8).base_width == 48
    assert build_config("DiT-muP-16h/2").base_width == 288
    assert build_config("DiT-muP-16h/2", parametrization="standard") == build_config("DiT-XL/2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(parametrization="standard", base_width=288), "base_width 288 does nothing"),
        (dict(parametrization="standard", output_mult=2.0), "output_mult 2.0 does nothing"),
        (dict(base_width=300), "width 300 is no multiple of 72, the size of a head"),
        (dict(parametrization="sp"), "unknown parametrization 'sp'"),
        (dict(output_mult=0.0), "output_mult must lie between"),
        (dict(num_kv_heads=2, base_width=72), "width 72 is no multiple of 144, the size of 2 heads"),
    ],
)
def test_parametrizations_that_there_are_not_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        mup(**options)
