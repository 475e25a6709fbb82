"""Image generation: seeded noise, guidance, decoding and files; the flags that all samplers share.

N images · C latent channels · h, w latent size · H, W image size

An image is a function of (seed, its index, its label) alone: its noise comes from a generator of its own, so the
batch it is drawn in, and how many processes draw, change nothing beyond rounding.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import base_shapes
import checkpoint
import cli
import text
from autoencoders import (
    SpaceInfo,
    add_space_arguments,
    load_space,
    place_of_space,
    read_statistics,
    settle_statistics,
    space_info,
)
from cli import (
    Need,
    Parser,
    RunStopped,
    UsageError,
    check_needs,
    first_line,
    natural_int,
    number_in,
    only,
    positive_int,
    warn_once,
)
from compiling import by_itself, choose_compile
from conditions import CHOICES, Captions, Classes
from configuration import (
    DIT_MUP,
    UNSEEN,
    DiTConfig,
    add_mup_arguments,
    add_router_arguments,
    build_config,
    is_row,
    unseen,
    usual_heads,
)
from diffusion import classifier_free_guidance
from families import DiT_models
from layers import check_attention
from machine import add_machine_arguments
from models import DiT
from objectives import SETTINGS, add_objective_arguments, check_against, choose_objective, in_words
from prompts import Prompt, read_prompts

# ---------------------------------------------------------------------------------------------------------------- flags


def add_sampling_arguments(parser: Parser, ckpt: bool = True) -> None:
    """What every script that draws images takes; `ckpt` False: it sets `args.ckpt` on its own."""
    group = parser.add_argument_group("checkpoint")
    if ckpt:
        group.add_argument(
            "--ckpt", required=True, help="checkpoint folder, run folder, or published .pt / .safetensors file"
        )
    parser.add_switch(group, "--use-ema", True, "the averaged weights, not those under training", "--ema")
    group.add_argument("--no-ema", dest="use_ema", action="store_false", help="the weights under training")

    group = parser.add_argument_group("what a published file cannot tell (must agree with a file that can)")
    group.add_argument("--model", help="row of the table of sizes, such as DiT-XL/2")
    group.add_argument("--image-size", type=positive_int, help="256 or 512 for the published models")
    group.add_argument("--num-classes", type=positive_int, help="classes, without the null class")
    group.add_argument("--num_experts", type=natural_int, help="routed experts per MoE layer")
    group.add_argument("--num_experts_per_tok", type=positive_int, help="2 for published files")
    parser.add_switch(group, "--norm-topk-prob", None, "routing weights of a token are divided by their sum")
    group.add_argument("--routed-scaling-factor", type=number_in(1e-6, 1e6), help="then multiplied by this")
    add_router_arguments(group)
    parser.add_switch(
        group,
        "--published-pool",
        False,
        "of router batch-pool, as published: an image depends on the others of its batch",
    )
    add_objective_arguments(parser, group, training=False)
    group.add_argument("--vae-path", "--vae", help="autoencoder: folder, hub name, mse, ema, or none for pixel space")
    add_space_arguments(group)
    text.add_encoder_arguments(group, "of networks that draw from prompts")
    add_mup_arguments(group)
    group.add_argument("--vae-scaling-factor", type=number_in(1e-6, 1e6), help="of latents, in place of its own")
    group.add_argument("--vae-shift-factor", type=number_in(-1e6, 1e6), help="of latents, in place of its own")
    group.add_argument("--pretraining_tp", type=int, help="accepted for published commands; has no effect")
    group.add_argument("--num-gpus", type=only("1", "use torchrun sample_ddp.py for several"), help="1, likewise")

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--seed", "--global-seed", dest="seed", type=natural_int, default=0, help="image i of a seed has its own noise"
    )
    group.add_argument("--cfg-scale", type=number_in(0, 1e3), default=4.0, help="guidance; 1 is off")
    group.add_argument(
        "--guide",
        type=Path,
        metavar="CHECKPOINT",
        help="guide away from this weaker network, not from no label",
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="guide away from it, in place of from no text")
    group.add_argument("--cfg-channels", help="how many channels are guided: a number, or all (ddpm: 3, rf: all)")
    group.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="guide where normalised time is in here; 1 is pure noise",
    )
    group.add_argument("--num-sampling-steps", help="steps; DDPM also takes 10,15,20 or ddim50 (ddpm: 250, rf: 50)")
    group.add_argument(
        "--sampler", help="ddpm, ddim, dpm++, dpm-solver for DDPM; euler, heun, dpm++ for rectified flow"
    )

    group = add_machine_arguments(parser)
    parser.add_switch(
        group, "--cuda-graph", "auto", "record the network's kernels and replay them; auto: on a GPU in bf16"
    )


def add_set_arguments(parser: Parser):
    """How many images, of which classes: what evaluations draw. Returns the group, for more."""
    parser.set_defaults(cfg_scale=1.5)  # as in the published evaluations
    group = parser.add_argument_group("images")
    group.add_argument(
        "--num-fid-samples",
        "--num-samples",
        dest="num_samples",
        type=positive_int,
        default=50_000,
        help="images in all",
    )
    group.add_argument(
        "--labels",
        choices=CHOICES,
        default="random",
        help="random: drawn for each image; balanced: 0, 1, 2, ... in turn, so that all classes come equally often",
    )
    add_prompt_arguments(group)
    group.add_argument("--images-per-prompt", type=positive_int, default=1, help="of each, one after the other")
    return group


def add_prompt_arguments(group) -> None:
    group.add_argument(
        *("--prompts", "--prompt-file"),
        type=Path,
        metavar="FILE",
        help="of networks of texts: .txt, .jsonl, .csv, .json",
    )


@dataclass(frozen=True)
class Asked:
    """What each image of a set is of: a label, or a text by its number."""

    numbers: list[int]
    prompts: list[Prompt] | None = None  # of a network of texts
    each: int = 1  # images of a prompt, one after the other

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, indices: range) -> list[int] | list[str]:
        """What `generate` takes for some images."""
        numbers = self.numbers[indices.start : indices.stop]
        return numbers if self.prompts is None else [self.prompts[number].text for number in numbers]

    def record(self, args) -> dict:
        """What results say of it."""
        if self.prompts is None:
            return {"labels": args.labels}
        texts = "\0".join(prompt.text for prompt in self.prompts).encode(errors="backslashreplace")
        return {"prompts": hashlib.sha256(texts).hexdigest(), "images-per-prompt": self.each}


def choose_images(args, loaded: "Loaded") -> Asked:
    """What the flags of `add_set_arguments` ask for: labels of classes, or the prompts of a list, several of each.

    Raises:
        UsageError: texts for a network of classes, or the reverse.
    """
    if args.prompts is None and loaded.draws_from_texts:
        raise UsageError(f"{loaded.source} draws from texts: --prompts FILE says which")
    if args.prompts is not None and not loaded.draws_from_texts:
        raise UsageError(f"--prompts: {loaded.source} draws from classes")
    if not loaded.draws_from_texts:
        return Asked(loaded.condition.requests(args.num_samples, args.seed, args.labels))
    if "labels" in args.given:
        raise UsageError(f"--labels: {loaded.source} draws from texts; --prompts FILE says what")
    prompts = read_prompts(args.prompts)
    count = len(prompts) * args.images_per_prompt
    count = min(count, args.num_samples) if "num_samples" in args.given else count
    return Asked([index // args.images_per_prompt for index in range(count)], prompts, args.images_per_prompt)


# ----------------------------------------------------------------------------------------------------------- generation


GUIDANCE = Need(
    ("cfg_channels", "cfg_interval", "negative_prompt", "guide"),
    lambda args: args.cfg_scale != 1,
    "guidance: --cfg-scale above 1",
)


@dataclass(frozen=True)
class Settings:
    """How images are drawn; what the name of a result folder should tell."""

    steps: str | int
    sampler: str
    cfg_scale: float = 1.0
    cfg_channels: int | None = None  # None: all
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    guide: str | None = None  # `fingerprint` of the network that guides

    @classmethod
    def from_args(cls, args, objective, in_channels: int) -> "Settings":
        """Raises UsageError for guidance that there is not."""
        check_needs(args, (GUIDANCE,))
        sampler = args.sampler or objective.samplers[0]
        channels = objective.guided_channels(in_channels, sampler)
        if args.cfg_channels is not None:
            number = int(args.cfg_channels) if args.cfg_channels.isdecimal() else 0
            if args.cfg_channels != "all" and not 1 <= number <= in_channels:
                expected = f"a number from 1 to {in_channels}, or all"
                raise UsageError(f"--cfg-channels expects {expected}, got {args.cfg_channels!r}")
            channels = None if args.cfg_channels == "all" else number
        low, high = args.cfg_interval
        if not 0 <= low <= high <= 1:
            raise UsageError(f"--cfg-interval expects 0 <= LOW <= HIGH <= 1, got {low} {high}")
        steps = args.num_sampling_steps or objective.default_steps
        return cls(steps, sampler, args.cfg_scale, channels, (low, high), args.seed)

    def __str__(self) -> str:
        guidance = f"cfg{self.cfg_scale:g}"
        if self.cfg_scale != 1 and self.cfg_channels is not None:
            guidance += f"-channels{self.cfg_channels}"
        if self.guide is not None:
            guidance += f"-guide{self.guide[:8]}"
        if self.cfg_scale != 1 and self.cfg_interval != (0.0, 1.0):
            guidance += "-interval{:g}-{:g}".format(*self.cfg_interval)
        return f"{self.sampler}{self.steps}-{guidance}-seed{self.seed}"


class ImageNoise:
    """Standard normal noise for images `indices`, each from its own generator, whatever the batch.

    The seed's fourth number keeps it apart from the random numbers of training samples, (seed, epoch, index).
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self.generators = [np.random.default_rng([seed, index, 0, 1]) for index in indices]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        """The next draw, (N, C, h, w) fp32."""
        draws = [generator.standard_normal(self.shape, dtype=np.float32) for generator in self.generators]
        return torch.from_numpy(np.stack(draws)).to(self.device)


class BrokenNetwork(RunStopped):
    """A network whose output is not finite, which would be saved as black images."""


class Watched:
    """A `denoise` that remembers, without waiting for the device, which of its answers were finite."""

    def __init__(self, denoise: Callable[[Tensor, float], Tensor]):
        self.denoise, self.finite = denoise, []

    def __call__(self, x: Tensor, t: float) -> Tensor:
        output = self.denoise(x, t)
        self.finite.append(output.isfinite().all())
        return output

    def check(self, images: Tensor) -> None:
        """Raises BrokenNetwork if an answer, or the images in the end, were not."""
        finite = torch.stack([*self.finite, images.isfinite().all()]).tolist()
        if all(finite):
            return
        first, count = finite.index(False), len(self.finite)
        where = f"evaluation {first + 1} of {count} of the network" if first < count else "the autoencoder"
        raise BrokenNetwork(
            f"NaN or infinity, from {where} on: no image is made of that. If the weights are whole, "
            f"another --precision may help (bf16 or fp32 in place of fp16)"
        )


@torch.no_grad()  # not inference mode, which sharded parameters cannot be gathered in
def generate(
    model: DiT,
    objective,
    space,
    labels: Sequence[int],
    settings: Settings,
    *,
    kind: Classes | Captions | None = None,
    guide: DiT | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    progress: Callable | None = None,
    on_evaluation: Callable[[Tensor], None] | None = None,
) -> Iterator[np.ndarray]:
    """Draw one image per label, or per prompt.

    Args:
        model: with weights in the precision to sample with, or under the caller's autocast.
        space: what turns latents into images (`autoencoders.load_space`).
        kind: of condition, where it knows more than the model's own: what encodes prompts.
        guide: a weaker network for the same images, which the model is guided away from in place of its null.
        indices: which image of the seed each one is; 0, 1, ... by default.
        progress: wraps the iterable of sampling steps of each batch.
        on_evaluation: told after each evaluation of the network what it takes the latents (n,C,h,w) for, as previews
            show; what it raises ends the drawing.

    Yields:
        (n, H, W, 3) uint8 for each batch, in the order of the labels.

    Raises:
        UsageError: a label that the model does not know, guidance without a null class.
        BrokenNetwork: it answers with NaN or infinity.
    """
    config, device = model.config, next(model.parameters()).device
    indices = range(len(labels)) if indices is None else indices
    kind = kind or config.condition
    kind.check(labels)
    shape = (config.in_channels, config.input_size, config.input_size)
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        noise = ImageNoise(settings.seed, indices[part], shape, device)
        condition = kind.batch(labels[part], device)
        denoise = classifier_free_guidance(
            model,
            condition,
            kind.null_of(condition),
            settings.cfg_scale,
            channels=settings.cfg_channels,
            interval=settings.cfg_interval,
            time_scale=objective.time_scale,
            guide=guide,
        )
        denoise = watched = Watched(denoise)
        if on_evaluation is not None:
            denoise = telling(watched, objective, on_evaluation)
        latents = objective.sample(denoise, noise(), settings.steps, settings.sampler, randn=noise, progress=progress)
        images = space.decode(latents.float())
        watched.check(images)
        yield to_pixels(images)


def draw(model, objective, space, labels: Sequence, settings: Settings, indices: Sequence[int], **options):
    """(n, H, W, 3) uint8: what `generate` yields for one batch."""
    options |= {"indices": indices, "batch_size": len(labels)}
    return next(generate(model, objective, space, labels, settings, **options))


def telling(denoise: Callable[[Tensor, float], Tensor], objective, on_evaluation: Callable[[Tensor], None]):
    """The same `denoise`, which says after each of its answers what data (N,C,h,w) that means."""

    def tell(x: Tensor, t: float) -> Tensor:
        output = denoise(x, t)
        on_evaluation(objective.estimate(output, x, t))
        return output

    return tell


def to_pixels(images: Tensor) -> np.ndarray:
    """(N, 3, H, W), -1 to 1 -> (N, H, W, 3) uint8."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


class Captured:
    """A network whose kernels are recorded, once per shape of its inputs, as a CUDA graph: a call is one launch.

    For sampling: no gradients, bf16 weights (what autocast casts and keeps would be outside of the graph, and other
    precisions ask the host where experts' segments end), inputs (N, ...) on the GPU. The graph's memory stays taken as
    long as this lives. Stands in for the model in `generate`. What cannot be recorded is said, and runs as it is.
    """

    def __init__(self, model: DiT):
        self.model, self.recorded = model, {}
        self.config, self.parameters = model.config, model.parameters
        self.given_up = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        tensors = tree_leaves(inputs)  # a condition may be several
        key = tuple((each.shape, each.dtype) for each in tensors)
        if key not in self.recorded and not self.given_up:
            try:
                self.recorded[key] = _record(self.model, inputs)
            except RuntimeError as error:
                self.given_up = True
                warn_once(f"no CUDA graph ({first_line(error)}); kernels are launched one by one")
        if key not in self.recorded:
            return self.model(*inputs)
        graph, places, output = self.recorded[key]
        for place, given in zip(tree_leaves(places), tensors, strict=True):
            place.copy_(given)
        graph.replay()
        return output.clone()  # the next call writes into it


def captured(model: DiT) -> "Captured | DiT":
    """`Captured` on a GPU, the model itself elsewhere."""
    return Captured(model) if next(model.parameters()).is_cuda else model


def _record(model: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple:
    """The graph, the tensors it reads, and the one that it writes."""
    places = tree_map(torch.clone, tuple(inputs))
    beside = torch.cuda.Stream()  # a first call sets libraries up and compiles, which must not be recorded
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            model(*places)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(*places)
    return graph, places, output


def fingerprint(model: DiT) -> str:
    """Changes with the weights, not with where their file lies: SHA-256 over some 64 values of each tensor."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        values = tensor.flatten()
        digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_settings(config: DiTConfig, objective, settings: Settings) -> None:
    """Refuse at once what `generate` would refuse at its first batch: it goes through all steps, with no network.

    Raises:
        UsageError: steps, sampler or guidance that this objective and network do not have.
    """

    def silent(x: Tensor, t: Tensor, condition) -> Tensor:
        return x.new_zeros(len(x), config.out_channels, *x.shape[2:])

    x, condition = torch.zeros(1, config.in_channels, 1, 1), config.condition.blank("cpu")
    denoise = classifier_free_guidance(
        silent,
        condition,
        None if config.condition.null is None else condition,
        settings.cfg_scale,
        channels=settings.cfg_channels,
        interval=settings.cfg_interval,
        time_scale=objective.time_scale,
        guide=None if settings.guide is None else silent,
    )
    objective.sample(denoise, x, settings.steps, settings.sampler, randn=lambda: x)


# --------------------------------------------------------------------------------------------------- from a checkpoint


@dataclass
class Loaded:
    """A network ready to draw images, and all that it was trained with."""

    model: DiT
    network: "DiT | Captured"  # what to call: the model, or its graph
    objective: object
    space: object
    image_size: int
    source: Path
    settings: Settings
    condition: Classes | Captions
    guide: "DiT | Captured | None" = None  # what guides, in place of no label

    @property
    def options(self) -> dict:
        """What `generate` and `draw` take besides."""
        return {"kind": self.condition, "guide": self.guide}

    @property
    def name(self) -> str:
        """`<run>-<step>` of a checkpoint of a run, else the file's or folder's own name."""
        path = self.source.absolute()
        return f"{path.parent.parent.name}-{path.name}" if path.name.isdecimal() else path.stem

    @property
    def draws_from_texts(self) -> bool:
        return isinstance(self.condition, Captions)

    def parse(self, texts: Sequence[str]) -> list[int]:
        """What `--class-labels` asks for; one process says what is odd about it. Raises UsageError."""
        if self.draws_from_texts:
            raise UsageError(f"--class-labels: {self.source} draws from texts; give --prompt")
        return self.condition.parse(texts, warn_once if _is_first() else lambda line: None)

    def _beside_the_weights(self) -> dict:
        """What changes the function, where it is not as usual: sets of images of before do not name it."""
        usual = {field.name: field.default for field in fields(DiTConfig)}
        if any(getattr(block.moe.gate, "published_pool", False) for block in self.model.blocks if block.is_moe):
            usual["router"] = None  # it is not a matter of an image alone
        return {name: value for name, value in unseen(self.model.config).items() if value != usual[name]}

    def _of_texts(self) -> dict:
        """What a network of texts reads them with, and what it is guided away from."""
        if not self.draws_from_texts:
            return {}
        usual = self.model.config.condition.nothing
        negative = {} if self.condition.nothing == usual else {"negative_prompt": self.condition.nothing}
        return negative | {"text": {k: v for k, v in self.condition.encode.record().items() if k != "name"}}

    def record(self, precision: str) -> dict:
        """All that images depend on besides index and label."""
        return asdict(self.settings) | {
            "steps": str(self.settings.steps),
            "model": checkpoint.describe(self.model.config),
            "weights": fingerprint(self.model),
            **self._beside_the_weights(),
            **self._of_texts(),
            "objective": self.objective.config(),
            "autoencoder": self.space.config(),
            "precision": precision,
        }


def load_for_sampling(args, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
    """The network, objective and latent space of `--ckpt`, after comparing the flags with what the file says.

    The weights go straight from the (memory-mapped) file to the device, in `dtype`.

    Raises:
        UsageError: flag and file disagree, or neither tells.
    """
    if args.model is not None:
        build_config(args.model)  # an unknown name is said before gigabytes are read
    row = DiT_models.get(args.model, {})
    known = {name: row[name] for name in UNSEEN if name in row}
    known |= base_shapes.known(args) | ({} if args.num_heads is None else {"num_heads": args.num_heads})
    if args.image_size is not None and Path(args.ckpt).is_file():  # for a file without `pos_embed`
        known["input_size"] = args.image_size // space_info(args.vae_path or "mse").downsample
    weights = checkpoint.load_weights(args.ckpt, "ema" if args.use_ema else "model", **known)
    space = _choose_space(args, weights)
    image_size = weights.config.input_size * space.downsample
    _compare_flags(args, weights, image_size)
    base_shapes.fitted(weights.config, args, weights.source)
    objective = choose_objective(args, weights.objective)
    if weights.record is None:
        _say_what_is_assumed(args, weights, objective)

    settings, guide = Settings.from_args(args, objective, weights.config.in_channels), None
    if args.guide is not None:
        guide = load_guide(args, weights, device, dtype)
        settings = replace(settings, guide=fingerprint(guide))
    check_settings(weights.config, objective, settings)

    if args.published_pool and not weights.config.pools_batch:
        raise UsageError(f"--published-pool: {weights.source} has no router batch-pool")
    configs = [weights.config, *([] if guide is None else [guide.config])]
    if any(config.pools_batch for config in configs) and True in (args.compile, args.cuda_graph):
        raise UsageError("router batch-pool asks the host how many tokens there are: no --compile, no --cuda-graph")
    if args.cuda_graph is True and (device.type != "cuda" or dtype != torch.bfloat16):
        raise UsageError("--cuda-graph needs a GPU and --precision bf16")
    graph = args.cuda_graph
    if graph == "auto":
        graph = all(by_itself(config, device, dtype) for config in configs)
    compiles = choose_compile(args.compile, weights.config, device, dtype)
    check_attention(args.attention, device, dtype, weights.config.hidden_size // weights.config.num_heads)
    model = weights.build(device, dtype)
    model.set_attention(args.attention)
    for block in model.blocks if args.published_pool else ():
        if block.is_moe:
            block.moe.gate.published_pool = True
    model.eval().requires_grad_(False)
    model.stack_modulations()
    if compiles:
        say = (lambda line: print(line, file=sys.stderr)) if _is_first() else lambda line: None
        model.compile_blocks(note=say, or_plain=args.compile == "auto")
    network = captured(model) if graph else model
    kind = weights.condition
    if isinstance(kind, Captions):
        kind = replace(kind, encode=_choose_encoder(args, weights).to(device))
        if args.negative_prompt is not None:
            kind = replace(kind, nothing=args.negative_prompt)
    elif args.negative_prompt is not None:
        raise UsageError(f"--negative-prompt: {weights.source} draws from classes")
    if guide is not None and graph:
        guide = captured(guide)
    return Loaded(model, network, objective, space.to(device), image_size, weights.source, settings, kind, guide)


SHARED = ("name", "time_scale", "prediction", "schedule")  # of the objectives of networks that guide each other


def load_guide(args, weights: checkpoint.Weights, device: torch.device, dtype: torch.dtype) -> DiT:
    """The network of `--guide`, which has to speak of the same things.

    Raises:
        UsageError: it is of other latents, labels or texts, or was trained with another objective.
    """
    if args.negative_prompt is not None:
        raise UsageError("--guide and --negative-prompt contradict each other: both stand in for no text")
    guide = checkpoint.load_weights(args.guide, "ema" if args.use_ema else "model")
    fields = ("in_channels", "input_size", "num_classes", "caption_width")
    pairs = {name: (getattr(guide.config, name), getattr(weights.config, name)) for name in fields}
    if guide.record is not None and weights.record is not None:
        pairs |= {f"objective {k}": (guide.objective.get(k), weights.objective.get(k)) for k in SHARED}
        pairs["text"] = (guide.record.get("text", {}).get("kind"), weights.record.get("text", {}).get("kind"))
    for name, (there, here) in pairs.items():
        if there != here:
            raise UsageError(f"--guide {args.guide} has {name} {there}, {weights.source} {here}")
    model = guide.build(device, dtype)
    model.set_attention(args.attention)
    return model.eval().requires_grad_(False)


def _choose_encoder(args, weights: checkpoint.Weights) -> text.TextEncoder:
    """What the network reads texts with: as recorded, or `--text-encoder`.

    Raises:
        UsageError: neither tells, they differ, or its features are of another width.
    """
    recorded = (weights.record or {}).get("text")
    if recorded is not None:
        was, name = recorded["name"], args.text_encoder or recorded["name"]  # a network may have moved
        if text.Words.name in (was, name) and was != name:
            raise UsageError(f"--text-encoder {name} contradicts {weights.source}, trained with {was}")
        said = {} if args.max_text_tokens is None else {"length": args.max_text_tokens}
        return text.open_encoder(**(recorded | {"name": name} | said))
    if args.text_encoder is None:
        raise UsageError(f"{weights.source} reads texts and does not tell with which encoder: --text-encoder")
    text.check_tokenizer(args)
    encoder, width = text.open_encoder(args.text_encoder, weights.config.caption_length), weights.config.caption_width
    if encoder.width != width:
        raise UsageError(
            f"--text-encoder {args.text_encoder} gives {encoder.width} features, the network reads {width}"
        )
    return encoder


def _choose_space(args, weights: checkpoint.Weights) -> SpaceInfo:
    """What turns latents into images: `--vae-path`, or the recorded one, or the usual one for so many channels.

    Raises:
        UsageError: it has another number of channels, or another scale or statistics than were recorded.
    """
    recorded = {} if weights.record is None else weights.record.get("space", {})
    vae_path = place_of_space(args, recorded, weights.config.in_channels)
    measured, space = read_statistics(args.latent_stats), load_space(vae_path)
    if space.channels != weights.config.in_channels:
        raise UsageError(
            f"--vae-path {vae_path} has {space.channels} channels, the network {weights.config.in_channels}: "
            f"another autoencoder, or none for pixel space"
        )
    settle_statistics(space, measured, recorded, weights.source)
    for field in ("scaling_factor", "shift_factor"):
        said, was, own = getattr(args, f"vae_{field}"), recorded.get(field), getattr(space, field)
        flag = f"--vae-{field.replace('_', '-')}"
        if None not in (said, was) and said != was:
            raise UsageError(f"{flag} {said} contradicts {weights.source}, which says {was}")
        if said is None and was not in (None, own):
            raise UsageError(
                f"--vae-path {vae_path} has {field} {own}, {weights.source} was trained with {was}: give the "
                f"autoencoder of its training, or {flag} {was} if this one is it"
            )
        if said is not None:
            setattr(space, field, said)
    if (before := recorded.get("sha256")) and before != space.record().get("sha256") and _is_first():
        print(f"WARNING: {vae_path} has other weights than the autoencoder of the training", file=sys.stderr)
    return space


def _is_first() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _compare_flags(args, weights: checkpoint.Weights, image_size: int) -> None:
    """Flags that describe the network are optional, and must not contradict the file."""
    config = weights.config
    is_so = config.to_dict() | {"image_size": image_size, "dim_heads": config.hidden_size // config.num_heads}
    names = {"num_classes", "num_experts", "image_size", "dim_heads", *DIT_MUP} - set(UNSEEN)
    if weights.record is not None:
        names |= set(UNSEEN)
        check_against(args, weights.objective, weights.source)
    elif args.dim_heads is None:  # then --num_heads was taken at its word
        is_so["num_heads"] = next(iter(usual_heads(config.hidden_size)), config.num_heads)
    said = {name: getattr(args, name) for name in sorted(names)}
    if args.model is not None and not is_row(config, args.model):
        said["model"], is_so["model"] = args.model, checkpoint.describe(config)
    if wrong := [name for name, value in said.items() if value is not None and value != is_so[name]]:
        name = wrong[0]
        flag = cli.said(args, name, said[name])
        raise UsageError(f"{flag} contradicts {weights.source}, which says {is_so[name]}; drop the flag")


def _say_what_is_assumed(args, weights: checkpoint.Weights, objective) -> None:
    """One line for a file that does not describe itself: shapes tell neither objective nor weighting of experts."""
    assumed = [in_words(objective), ", ".join(f"{name} {value}" for name, value in unseen(weights.config).items())]
    said = [args.given[name] for name in ("rf", *SETTINGS, *UNSEEN) if name in args.given]
    if _is_first():
        by_flags = f" (said: {', '.join(said)})" if said else ""
        print(f"{weights.source} does not describe itself; taken for {'; '.join(assumed)}{by_flags}", file=sys.stderr)
