"""How good are generated images? FID, sFID, Inception Score, precision and recall; FD-DINOv2; numbers for small images;
how far they are what prompts ask for: CLIP score, GenEval.

python calculate_metrics.py eval samples.npz --ref VIRTUAL_imagenet256_labeled.npz
torchrun --nproc_per_node=8 calculate_metrics.py eval results/000-DiT-S-2-8E2A-rf --ref ref.npz --cfg-scale 1.5
torchrun --nproc_per_node=8 calculate_metrics.py ref imagenet/train --image-size 256 --output ref.npz
python calculate_metrics.py eval samples.npz --features pixels --ref digits/held-out --train digits/train

torchrun --nproc_per_node=8 calculate_metrics.py clip samples/coco --clip-weights openai/clip-vit-base-patch32
torchrun --nproc_per_node=8 calculate_metrics.py geneval samples/geneval --output results.jsonl

Samples are an `.npz` file (arr_0 uint8 NHWC, labels), a folder of images, or a checkpoint, from which they are drawn
first. The reference is a file of `calculate_metrics.py ref` or of ADM's, an `.npz` of images, or a folder.
"""

from importlib.metadata import version
from pathlib import Path

import torch

import checkpoint
import clip_score
import distributed
import evaluation
import geneval
import machine
import sampling
from cli import Parser, RunStopped, UsageError, positive_int, run, values
from evaluation import DrawnImages, Evaluator, Images, Statistics, measure, measure_reference, open_images
from extractors import EXTRACTORS, Extractor, load_extractor
from files import replace_json, replace_lines


def get_parser() -> Parser:
    parser = Parser(prog="calculate_metrics.py", description=__doc__.partition("\n")[0], usage="%(prog)s COMMAND ...")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="calculate_metrics.py")

    command = commands.add_parser("eval", help="compare samples with a reference")
    command.set_defaults(command=evaluate, ckpt=None)
    command.add_argument("samples", type=Path, help="an .npz file, a folder of images, or a checkpoint to draw from")
    group = command.add_argument_group("comparison")
    group.add_argument("--ref", type=Path, required=True, help="statistics, an .npz file or a folder of real images")
    group.add_argument(
        "--train", type=Path, help="with --features pixels: training images, none of them in the reference"
    )
    add_feature_arguments(group)
    group.add_argument("--output", type=Path, help="JSON file for the results")
    sampling.add_sampling_arguments(command, ckpt=False)
    sampling.add_set_arguments(command)

    command = commands.add_parser("ref", help="make the statistics of real images, to compare with again and again")
    command.set_defaults(command=make_reference)
    command.add_argument("images", type=Path, help="a folder of images (of folders of classes), or an .npz file")
    group = command.add_argument_group("statistics")
    group.add_argument("--output", type=Path, required=True, help=".npz file to write")
    group.add_argument("--image-size", type=positive_int, help="cut the images of a folder to it, as training does")
    add_feature_arguments(group)
    machine.add_device_argument(group)

    command = commands.add_parser("clip", help="how near images are to their captions, 100 times the cosine of CLIP's")
    command.set_defaults(command=score_captions)
    command.add_argument("images", type=Path, help="folder of images with captions, as sample_ddp.py leaves it")
    group = command.add_argument_group("score")
    group.add_argument("--clip-weights", default="ViT-B/32", help=f"folder, hub name, or {', '.join(clip_score.NAMES)}")
    command.add_switch(group, "--names-are-captions", False, "images are called by their captions")
    group.add_argument("--output", "--save-path", type=Path, help="CSV file for the score of each image")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images a process takes at once")
    machine.add_device_argument(group)

    command = commands.add_parser("geneval", help="whether the objects that GenEval's prompts ask for are there")
    command.set_defaults(command=judge_objects)
    command.add_argument("images", type=Path, help="folder of sample_ddp.py --layout geneval")
    group = command.add_argument_group("networks")
    group.add_argument("--detector", default="mask2former", help="Mask2Former on COCO instances: folder or hub name")
    group.add_argument("--clip-weights", default="ViT-L/14", help="reads colours: folder, hub name, or a name as above")
    group.add_argument("--output", "--outfile", type=Path, help="JSON lines, an image each")
    machine.add_device_argument(group)
    return parser


def add_feature_arguments(group) -> None:
    group.add_argument(
        "--features", choices=EXTRACTORS, default="inception", help="what images are compared in; pixels: small images"
    )
    group.add_argument("--inception-weights", type=Path, help="weights-inception-2015-12-05-6726825d.pth")
    group.add_argument("--dinov2-weights", type=Path, help="dinov2_vitl14_pretrain.pth")
    group.add_argument(
        "--batch-size", "--per-proc-batch-size", type=positive_int, default=32, help="images a process takes at once"
    )


def main(args) -> None:
    processes = distributed.start(args.device)
    try:
        args.command(args, processes)
    except torch.OutOfMemoryError:
        raise RunStopped("out of GPU memory: use a smaller --batch-size") from None
    finally:
        distributed.stop()


# ------------------------------------------------------------------------------------------------------------- commands


def evaluate(args, processes: distributed.Processes) -> None:
    processes.on_main(lambda: check_paths(args))
    extractor = choose_extractor(args, processes)
    images = processes.together(lambda: open_samples(args, processes.device))
    reference = measure_reference(args.ref, extractor, processes, args.batch_size, args.image_size)
    training = None
    if args.train is not None:
        training = processes.together(lambda: open_images(args.train, args.image_size))
        training = measure(training, extractor, processes, args.batch_size, title=f"features of {args.train.name}")
    evaluator = processes.together(lambda: Evaluator(reference, extractor, processes.device, training))
    processes.together(lambda: evaluator.check(images.size, images.count, str(args.samples)))
    samples = measure(images, extractor, processes, args.batch_size, title="samples")
    results = processes.on_main(lambda: compare(evaluator, samples))
    if processes.is_main:
        print(table(results))
        if args.output is not None:
            write(lambda: replace_json(args.output, results), args.output)


def make_reference(args, processes: distributed.Processes) -> None:
    processes.on_main(lambda: check_folder(args.output))
    extractor = choose_extractor(args, processes)
    statistics = measure_reference(args.images, extractor, processes, args.batch_size, args.image_size)
    if processes.is_main:
        write(lambda: statistics.save(args.output), args.output)
        print(f"{args.output}: statistics of {args.features} features, {describe(vars(statistics))}")


def score_captions(args, processes: distributed.Processes) -> None:
    if args.output is not None:
        processes.on_main(lambda: check_folder(args.output))
    root, pairs = processes.together(lambda: clip_score.open_pairs(args.images, args.names_are_captions))
    clip = processes.together(lambda: clip_score.CLIP(args.clip_weights, processes.device))
    scores = clip_score.clip_scores(clip, root, pairs, processes, args.batch_size)
    if processes.is_main:
        print(f"CLIP score {scores.mean():.4f} of {len(scores)} images with captions ({clip.place})")
        if args.output is not None:
            write(lambda: clip_score.write_scores(args.output, pairs, scores), args.output)


def judge_objects(args, processes: distributed.Processes) -> None:
    if args.output is not None:
        processes.on_main(lambda: check_folder(args.output))
    samples = processes.together(lambda: geneval.open_samples(args.images))
    detector = processes.together(lambda: geneval.Detector(args.detector, processes.device))
    colours = processes.together(lambda: geneval.ColourReader(clip_score.CLIP(args.clip_weights, processes.device)))
    mine = samples[processes.rank :: processes.world_size]
    rows = [geneval.evaluate(path, clip_score.read_image(path), metadata, detector, colours) for path, metadata in mine]
    rows = sorted((row for part in processes.gather(rows) for row in part), key=lambda row: row["filename"])
    if processes.is_main:
        print(table_of_tasks(geneval.summary(rows)))
        if args.output is not None:
            write(lambda: replace_lines(args.output, rows), args.output)


def table_of_tasks(found: dict) -> str:
    lines = [f"{'images':<16}{found['images']:>8}", f"{'prompts':<16}{found['prompts']:>8}"]
    lines += [f"{name.replace('_', ' '):<16}{found[name]:>8.2%}" for name in ("correct_images", "correct_prompts")]
    lines += [f"{tag:<16}{share:>8.2%}" for tag, share in found["tasks"].items()]
    return "\n".join([*lines, f"{'overall':<16}{found['overall']:>8.5f}"])


def check_paths(args) -> None:
    """What would otherwise be noticed after an hour."""
    if not args.samples.exists():
        raise UsageError(f"{args.samples} does not exist; expected an .npz file, a folder of images or a checkpoint")
    if args.train is not None and args.features != "pixels":
        raise UsageError(f"--train is for --features pixels; {args.features} features do not use training images")
    if args.output is not None:
        check_folder(args.output)


def check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder; expected the name of a file")


def write(function, path: Path) -> None:
    try:
        function()
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror or error}") from None


def choose_extractor(args, processes: distributed.Processes) -> Extractor:
    weights = {"inception": args.inception_weights, "dinov2": args.dinov2_weights}.get(args.features)
    return load_extractor(args.features, weights, f"--{args.features}-weights", processes)


# ----------------------------------------------------------------------------------------------------------- evaluation


def open_samples(args, device: torch.device) -> Images:
    """The images there are, or those that the checkpoint will draw."""
    path = args.samples
    is_folder_of_weights = path.is_dir() and (
        checkpoint.is_checkpoint(path) or (path / "checkpoints").is_dir() or checkpoint.sharded_files(path)
    )
    if not is_folder_of_weights and (path.is_dir() or path.suffix == ".npz"):
        if useless := [flag for name, flag in args.given.items() if name in drawing_flags()]:
            raise UsageError(f"{useless[0]} does nothing for images that are there already: drop it")
        return open_images(path, args.image_size)
    args.ckpt = path
    precision = machine.choose_precision(args.precision, device)
    loaded = sampling.load_for_sampling(args, device, machine.set_precision(precision))
    asked = sampling.choose_images(args, loaded)
    record = {"source": str(loaded.source), "settings": loaded.record(precision) | asked.record(args)}
    parts = loaded.network, loaded.objective, loaded.space, asked, loaded.settings
    return DrawnImages(*parts, loaded.image_size, record, loaded.options)


def drawing_flags() -> set[str]:
    """The flags that only drawing listens to."""
    parser = Parser()
    sampling.add_sampling_arguments(parser, ckpt=False)
    sampling.add_set_arguments(parser)
    return set(values(parser.parse_args([]))) - {"device", "image_size"}


def compare(evaluator: Evaluator, samples: Statistics) -> dict:
    """The results, as JSON holds them."""
    reference, training = evaluator.reference, evaluator.training
    sets = {"samples": samples, "reference": reference} | ({"training": training} if training is not None else {})
    versions = {name: version(name) for name in ("torch", "numpy")}
    return {
        "metrics": evaluator.compare(samples),
        **{name: {"count": s.count, "size": s.size} | s.images for name, s in sets.items()},
        "evaluator": {"version": evaluation.VERSION, "extractor": samples.extractor, "versions": versions},
        "warnings": evaluator.warnings(samples),
    }


def table(results: dict) -> str:
    """Metrics, one a line; what was compared with what, and how; warnings."""
    width = max(len(evaluation.TITLES[name]) for name in results["metrics"])
    lines = [f"{evaluation.TITLES[name]:<{width}}  {value:10.4f}" for name, value in results["metrics"].items()]
    lines.append(f"samples    {describe(results['samples'])}: {results['samples']['source']}")
    if settings := results["samples"].get("settings"):
        told = {key: settings.get(key) for key in ("sampler", "steps", "cfg_scale", "seed", "labels", "precision")}
        lines.append(f"settings   {', '.join(f'{key} {value}' for key, value in told.items() if value is not None)}")
    reference, evaluator = results["reference"], results["evaluator"]
    lines.append(f"reference  {describe(reference)}: {reference['source']} (sha256 {reference['sha256'][:16]})")
    if "training" in results:
        lines.append(f"training   {describe(results['training'])}: {results['training']['source']}")
    lines.append(f"evaluator  version {evaluator['version']}, {evaluator['extractor']['name']} features")
    return "\n".join([*lines, *(f"WARNING: {warning}" for warning in results["warnings"])])


def describe(images: dict) -> str:
    """`50000 images of 256x256`, as far as that is known."""
    size = f" of {images['size']}x{images['size']}" if images["size"] else ""
    return f"{images['count'] or 'unknown number of'} images{size}"


if __name__ == "__main__":
    run(main, get_parser())
