"""What a network is run on and how: the flags that every script that runs one takes, and what they mean."""

import torch

from cli import Parser
from layers import ATTENTION_BACKENDS

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device_argument(group) -> None:
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )


def add_machine_arguments(parser: Parser):
    """What a network is run on and how: what every script that runs one takes. Returns the group, for more."""
    group = parser.add_argument_group("machine")
    add_device_argument(group)
    group.add_argument("--precision", choices=PRECISIONS, help="bf16 on a GPU that has it, else fp32")
    group.add_argument(
        "--attention",
        choices=ATTENTION_BACKENDS,
        default="auto",
        help="how attention is computed; auto: PyTorch chooses",
    )
    parser.add_switch(group, "--compile", "auto", "torch.compile each block; auto: on a GPU in bf16")
    return group


def choose_precision(name: str | None, device: torch.device) -> str:
    """`name`, or the fastest safe choice for the device."""
    if name is not None:
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def set_precision(name: str) -> torch.dtype:
    """The dtype of matrix products; `tf32` is fp32 with the matrix units switched over, for the whole process."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"  # convolutions have a switch of their own, which is on by default
    return PRECISIONS[name]
