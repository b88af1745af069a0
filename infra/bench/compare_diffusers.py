"""Kiln's engine against diffusers: the same weights, the same machine, in turns.

    cargo build --release
    python infra/bench/compare_diffusers.py --json sd15.json

Each side is a process of its own that has loaded before anything is timed. In each round every side does one run while the others wait,
so that a slow minute of the machine hits all; diffusers runs with channels last and without, and the faster of both is what we are
compared with. At the end the sides' pictures are compared, so that a fast wrong answer is noticed. See README.md."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = "kiln"
# How the libraries below torch call the instruction sets that we can be kept to.
LIMITS = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
VECTORS = ["amx_bf16", "avx512_bf16", "avx512f", "avx2"]


def arguments() -> argparse.Namespace:
    target = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parents[1] / "target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kiln", type=Path, default=target / "release/kiln", help="our binary, a release build [%(default)s]")
    parser.add_argument("--checkpoint", type=Path, help="a folder in diffusers layout [default: random weights of SD 1.5's size, made once]")
    parser.add_argument("--precision", nargs="+", choices=["f32", "bf16"], default=["bf16", "f32"])
    parser.add_argument("--part", nargs="+", choices=["unet", "vae", "picture"], default=["unet", "vae"])
    parser.add_argument("--layout", nargs="+", choices=["nhwc", "nchw"], default=["nhwc", "nchw"], help="diffusers': channels last or not")
    parser.add_argument("--size", type=int, default=512, help="width and height in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of --part picture")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--threads", type=int, default=2, help="of either side")
    parser.add_argument("--instructions", choices=list(LIMITS), help="keep both sides to a lesser processor's")
    parser.add_argument("--alone", action="store_true", help="one side after the other, each alone in memory and without a run to warm up: for models that fit only once")
    parser.add_argument("--no-pictures", action="store_true", help="do not compare what comes out")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    args = parser.parse_args()
    if not args.kiln.exists():
        parser.error(f"--kiln must be our release binary, but there is no `{args.kiln}`; `cargo build --release` makes it")
    for name in ("rounds", "batch", "threads", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}")
    return args


class Side:
    """One process that runs when it is told to."""

    def __init__(self, name: str, command: list, environment: dict | None = None):
        self.name, self.samples = name, []
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})},
        )
        self.ready = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} has ended with status {self.process.wait()}")
        return json.loads(line)

    def run(self) -> float:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.answer()["seconds"]

    def peak_mib(self) -> float | None:
        """The most memory that the process has held, mapped files included."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)

    def end(self) -> None:
        self.peak = self.peak_mib()
        self.process.stdin.close()
        self.process.wait()


def ours(args, precision: str, part: str, **more) -> Side:
    command = [
        args.kiln, "bench", "engine", "--on-demand", "--model", args.checkpoint, "--dtype", precision, "--part", part, "--size", args.size,
        "--batch", more.get("batch", args.batch), "--steps", more.get("steps", args.steps), *(["--out", more["out"]] if "out" in more else []),
        *(["--instructions", args.instructions] if args.instructions else []),
    ]
    return Side(OURS, command, {"RAYON_NUM_THREADS": str(args.threads)})


def theirs(args, precision: str, part: str, layout: str, **more) -> Side:
    command = [
        sys.executable, HERE / "diffusers_worker.py", "--checkpoint", args.checkpoint, "--precision", precision, "--layout", layout,
        "--part", part, "--size", args.size, "--batch", more.get("batch", args.batch), "--steps", more.get("steps", args.steps),
        "--threads", args.threads, *(["--out", more["out"]] if "out" in more else []),
    ]
    return Side(f"diffusers {layout}", command, LIMITS.get(args.instructions))


def compare(args, precision: str, part: str) -> dict:
    """Lets the sides take turns, or follow each other."""
    starts = [lambda: ours(args, precision, part), *(lambda layout=layout: theirs(args, precision, part, layout) for layout in args.layout)]
    before = os.getloadavg()
    sides = one_by_one(starts, args.rounds) if args.alone else in_turns([start() for start in starts], args.rounds)
    after = os.getloadavg()
    peaks = {side.name: side.peak for side in sides}
    samples = {side.name: side.samples for side in sides}
    return {
        "part": part, "precision": precision, "size": args.size, "batch": args.batch, "steps": args.steps if part == "picture" else None,
        "samples": samples, **ratios(samples), "peak_mib": peaks, "load_seconds": {side.name: side.ready.get("load_seconds") for side in sides}, "load_average_before": before, "load_average_after": after, "kiln": sides[0].ready,
    }


def in_turns(sides: list[Side], rounds: int) -> list[Side]:
    for side in sides:
        side.run()
    for number in range(rounds):
        # Nobody always comes after the same one.
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            side.samples.append(side.run())
    for side in sides:
        side.end()
    return sides


def one_by_one(starts: list, rounds: int) -> list[Side]:
    sides = []
    for start in starts:
        side = start()
        side.samples = [side.run() for _ in range(rounds)]
        side.end()
        sides.append(side)
    return sides


def ratios(samples: dict[str, list[float]]) -> dict:
    """How many times as fast we are as the faster layout of diffusers, by its median; round by round."""
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    best = min((name for name in samples if name != OURS), key=lambda name: medians[name])
    per_round = [there / here for there, here in zip(samples[best], samples[OURS])]
    return {
        "medians": medians, "best": best, "ratio": medians[best] / medians[OURS], "ratio_min": min(per_round), "ratio_max": max(per_round),
    }


def compare_pictures(args) -> list[dict]:
    """Two steps of the same job in every number format on both sides, against diffusers in f32: our error should not exceed diffusers'."""
    import numpy
    from PIL import Image

    wanted, rows = dict.fromkeys(["f32", *args.precision]), []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "picture.png"

        def picture(side: Side) -> "numpy.ndarray":
            side.run()
            side.end()
            return numpy.asarray(Image.open(out), dtype=numpy.float64)

        only = {"steps": 2, "batch": 1, "out": out}
        reference = None
        for precision in wanted:
            there = picture(theirs(args, precision, "picture", args.layout[0], **only))
            reference = there if reference is None else reference
            here = picture(ours(args, precision, "picture", **only))
            rows.append({
                "precision": precision, "kiln_to_f32": difference(here, reference), "diffusers_to_f32": difference(there, reference),
                "kiln_to_diffusers": difference(here, there), "deviation": float(reference.std()),
            })
    return rows


def difference(a, b) -> dict:
    """Of two pictures with values up to 255."""
    import numpy

    error = float(((a - b) ** 2).mean())
    return {"psnr_db": None if error == 0 else float(10 * numpy.log10(255**2 / error)), "max": float(abs(a - b).max())}


def machine() -> dict:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()), "vectors": [name for name in VECTORS if name in flags], "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "diffusers", "transformers")}}


def show(report: dict) -> None:
    host, used = report["machine"], report["versions"]
    print(f"{report['date']}: {host['cpu']}, {host['cores']} cores, {' '.join(host['vectors'])}, {host['system']}")
    kernels = next((row["kiln"].get("instructions") for row in report["comparisons"]), None)
    print(f"{report['threads']} threads each; kiln's kernels {kernels}; torch {used['torch']}, diffusers {used['diffusers']}; {report['rounds']} rounds in turns\n")
    print(f"{'':40} {'kiln, s':>9} {'diffusers, s':>13} {'layout':>7} {'times as fast':>22} {'peak MiB, kiln / diffusers':>28} {'load':>12}")
    for row in report["comparisons"]:
        name = f"{row['part']} {row['precision']}, {row['size']}², {row['batch']} at once" + (f", {row['steps']} steps" if row["steps"] else "")
        spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        peaks = " / ".join(f"{row['peak_mib'][side] or 0:.0f}" for side in (OURS, row["best"]))
        load = f"{row['load_average_before'][0]:.1f} → {row['load_average_after'][0]:.1f}"
        print(
            f"{name:40} {row['medians'][OURS]:>9.3f} {row['medians'][row['best']]:>13.3f} {row['best'].split()[-1]:>7} {spread:>22} "
            f"{peaks:>28} {load:>12}"
        )
    if report["pictures"]:
        print("\nthe same picture after two steps; PSNR in dB and the largest difference of 255")
        print(f"{'':6} {'kiln to diffusers f32':>24} {'diffusers to its f32':>24} {'kiln to diffusers':>24}")
        cell = lambda value: f"{'identical' if value['psnr_db'] is None else format(value['psnr_db'], '.1f')}, {value['max']:.0f}"
        for row in report["pictures"]:
            cells = [cell(row[key]) for key in ("kiln_to_f32", "diffusers_to_f32", "kiln_to_diffusers")]
            print(f"{row['precision']:6} {cells[0]:>24} {cells[1]:>24} {cells[2]:>24}")


def main() -> None:
    args = arguments()
    if args.checkpoint is None:
        import sd15

        args.checkpoint = sd15.ensure(sd15.default_folder())
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "machine": machine(), "versions": versions(),
        "threads": args.threads, "rounds": args.rounds, "comparisons": [], "pictures": [],
    }
    # After each part: what took long should not be lost with what follows.
    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(report) + "\n")

    for part in args.part:
        for precision in args.precision:
            print(f"{part} {precision}", file=sys.stderr)
            report["comparisons"].append(compare(args, precision, part))
            save()
    if not args.no_pictures:
        print("pictures", file=sys.stderr)
        report["pictures"] = compare_pictures(args)
        save()
    show(report)


if __name__ == "__main__":
    main()
