"""Heat maps of what the experts do: by class, by patch, by sampling step, by layer.

    python -m analysis.heatmaps results/routing/000-....npz --by class
    python -m analysis.heatmaps results/routing/000-....npz                # all of them

Reads what `analysis.expert_data` wrote. The map by layer has curves of load, router entropy, information and overlap.
"""

from pathlib import Path

from analysis import plots
from analysis.routing import HALVES, RoutingData
from cli import Parser, UsageError, positive_int, run
from files import replacing


def get_parser() -> Parser:
    parser = Parser(prog="python -m analysis.heatmaps", description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help=".npz of python -m analysis.expert_data")
    maps = [*plots.MAPS, *plots.MAPS_OF_TEXTS]
    parser.add_argument("--by", choices=maps, nargs="+", help="which maps to draw (default: all that there are)")
    parser.add_argument("--half", choices=HALVES, default="conditional", help="of the guided batch")
    parser.add_argument(
        "--of",
        choices=plots.QUANTITIES,
        default="load",
        help="tokens sent to an expert, or its mean router probability",
    )
    parser.add_argument("--output", type=Path, help="folder (default: beside the data)")
    parser.add_argument("--formats", nargs="+", choices=("png", "pdf", "svg"), default=["png", "pdf"])
    parser.add_argument("--dpi", type=positive_int, default=200, help="of PNG files")
    return parser


def main(args) -> None:
    data = RoutingData.load(args.data)
    data.half(args.half)  # complains where it was not recorded
    folder = args.output or args.data.parent
    there = plots.maps_of(data)
    for by in args.by or there:
        if by not in there:
            raise UsageError(f"--by {by}: {args.data} is of classes, or its prompts share no words")
        figure = plots.draw(by, data, args.half, args.of)
        for suffix in args.formats:
            half = HALVES[0] if by == "layer" else args.half  # that figure shows both
            path = folder / f"{args.data.stem}-{file_name(by, half, args.of)}.{suffix}"
            write(figure, path, args.dpi)
            print(path)


def file_name(by: str, half: str, of: str) -> str:
    """What is not as usual stands in it."""
    return f"by-{by}" + (f"-{half}" if half != HALVES[0] else "") + (f"-{of}" if of != "load" else "")


def write(figure, path: Path, dpi: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=dpi, metadata=DATELESS.get(path.suffix))
    except OSError as error:
        raise UsageError(f"--output {path.parent} cannot be written: {error.strerror or error}") from None


DATELESS = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # the same data gives the same bytes


if __name__ == "__main__":
    run(main, get_parser())
