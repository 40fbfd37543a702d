"""Run the steps of gpu.sh one after the other, each with a time limit, and keep the summary up to date.

A step is a program that appends its measurements to OUT/rows.jsonl (record.py). Nothing here imports torch,
so that what is missing on the machine is reported in the first second. A failed step does not stop the next.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import record

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICK = 570  # seconds of a whole quick run; a call on a lent machine ends after 600
GRACE = 4  # seconds between interrupting a step and killing it
LEAST = 12  # no step begins with fewer seconds left: imports alone take some eight
KEPT = 10  # seconds of a run kept free for what happens between steps

FILES = ("rows.jsonl", "summary.md", "log.txt")  # of a run
PACKAGES = [
    *"torch triton torchvision numpy pandas scipy matplotlib PIL safetensors timm tqdm".split(),
    *"huggingface_hub open_clip ftfy wcwidth regex pytest pytest_benchmark".split(),
]
GOALS = "native or triton or lerp or foreach or _random or (compile and 64M and float32)"
KERNEL_ROWS = f"(64M or 256M) and (float32 or bfloat16) and (interpolate or both) and ({GOALS})"
KERNEL_TESTS = (
    *(f"kernels/test_{name}" for name in ("kernels", "triton", "torch_library")),
    "path/test_path",
    "evaluate/test_graphs",
)
SWEEP_TESTS = (
    "evaluate/test_evaluate",
    "evaluate/test_walk",
    "evaluate/test_stages",
    "evaluate/test_precision",
    "evaluate/test_split",
)


@dataclass(frozen=True)
class Step:
    """One program of a run. limit: its seconds. tool: a program that the machine must have."""

    name: str
    limit: int
    command: tuple[str, ...]
    tool: str = ""


def steps(device: str, quick: bool) -> Iterator[Step]:
    """Yield the steps, the most important first, as a run may be cut off."""
    python, cuda = sys.executable, device != "cpu"

    def script(name: str, *words: str) -> tuple[str, ...]:
        return (python, f"benchmarks/{name}.py", "--device", device, *words)

    def pytest(*words: str) -> tuple[str, ...]:
        # The project's own pytest options are for developers; the number of processes is set here.
        return (python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "gpu_rows",
                "-o", "addopts=--import-mode=importlib", *words)  # fmt: skip

    def tests(*names: str, words: Sequence[str] = ()) -> tuple[str, ...]:
        # Compiling hundreds of variants takes most of the time, and processes can share it.
        spread = ("-n", "8", "--dist", "worksteal") if cuda and importlib.util.find_spec("xdist") else ()
        return pytest(*spread, *words, *(f"tests/{name}.py" for name in names))

    def bench(rows: str) -> tuple[str, ...]:
        return pytest("benchmarks/bench_kernels.py", "--device", device, "-k", rows)

    def limit(quickly: int, fully: int) -> int:
        return quickly if quick else fully

    if not quick and cuda:
        yield Step("build", 400, (python, "setup.py", "build_ext", "--inplace"), "nvcc")
    yield Step("program", limit(45, 200), script("gpu_program", "--host"))
    if not cuda:
        sweep = ("--arch", "tiny", "--samples", "32", "--draws", "2", "--layers", "2", "--rounds", "1")
        yield Step("device", 100, script("bench_sweep", *sweep, "--part", "stages", "graphs", "attention"))
        yield Step("kernels", 100, bench("layer and bfloat16 and both and (native or folded)"))
        yield Step("sweep", 150, script("bench_sweep", *sweep, "--part", "layer-sharpness", "busy"))
        yield Step(
            "tests", 100, tests("kernels/test_kernels", words=("-k", "known_answers or documented_counter"))
        )
        return
    small, large = ("--arch", "ViT-B-32"), ("--arch", "ViT-L-14")
    yield Step(
        "device",
        limit(45, 300),
        script("bench_sweep", "--arch", "tiny", "ViT-B-32", "ViT-L-14",
               "--part", "stages", "graphs", "attention", "--rounds", "2"),
    )  # fmt: skip
    yield Step("kernels", limit(75, 1500), bench(KERNEL_ROWS if quick else "not layer or not compile"))
    few = "--samples 256 --layers 2 --draws 4 --rounds 1 --precisions fp32 bf16".split()
    yield Step(
        "sweep_l",
        limit(125, 900),
        script("bench_sweep", *large, "--part", "layer-sharpness", "busy", *(few if quick else ())),
    )
    if quick:
        yield Step("tests", 110, tests(*KERNEL_TESTS))
    else:
        yield Step("tests", 1200, tests(*KERNEL_TESTS, *SWEEP_TESTS))
    yield Step(
        "memcheck",
        limit(55, 300),
        # Every tensor is a separate allocation, so that an access beyond its end hits unowned memory.
        # API errors that a library provokes and handles are not reported.
        ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", "memcheck",
         "--error-exitcode", "9", "--report-api-errors", "no", *script("gpu_program")),
        "compute-sanitizer",
    )  # fmt: skip
    few = ("--samples", "1024", "--rounds", "1", "--precisions", "fp32", "tf32")
    yield Step(
        "sweep_b",
        limit(90, 900),
        script("bench_sweep", *small, "--part", "layer-sharpness", "streaming", *(few if quick else ())),
    )
    if not quick:
        parts = ("general-sharpness", "layers", "interpolation", "scaling")
        yield Step("growth", 1200, script("bench_sweep", *small, "--part", *parts))
        yield Step("precisions", 900, script("precision"))


class Run:
    """One run: its folder, its clock, and the running step."""

    def __init__(self, out: pathlib.Path, device: str, seconds: float) -> None:
        self.out, self.device = out, device
        self.rows, self.log = out / "rows.jsonl", out / "log.txt"
        self.deadline = time.time() + seconds

    def step(self, step: Step) -> None:
        """Run a step and append a row of kind "step" with its outcome."""
        begun = time.time()
        limit = min(step.limit, self.deadline - begun)
        if step.tool and not shutil.which(step.tool):
            return self.done(step, "not begun", f"{step.tool} is not on the PATH", 0)
        if limit < min(LEAST, step.limit):
            return self.done(step, "not begun", f"too little time: {max(0, limit):.0f} s are left", 0)
        measured = len(self.measured(step))
        with open(self.log, "a") as log:
            log.write(f"\n== {step.name}: {' '.join(step.command)}\n")
            log.flush()
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=self.environment(step, begun + limit),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its workers are killed with it
            )
            ended = self.wait(process, begun + limit)
        found = len(self.measured(step)) - measured
        outcome, why = "done", f"{found} measurements"
        if not ended:
            outcome, why = "cut off", f"at its limit of {limit:.0f} s, after {found} measurements"
        elif process.returncode:
            outcome, why = "failed", f"exit status {process.returncode}: {last_line(self.log)}"
        elif not found:
            outcome, why = "failed", "it measured nothing"
        self.done(step, outcome, why, time.time() - begun)

    def wait(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """Wait for a process, rewriting the summary meanwhile; returns whether it ended by itself."""
        try:
            while time.time() < deadline - GRACE:
                try:
                    process.wait(min(5.0, max(0.1, deadline - GRACE - time.time())))
                    return True
                except subprocess.TimeoutExpired:
                    self.summarize()
            kill(process, signal.SIGINT)
            try:
                process.wait(max(0.1, deadline - time.time()))
            except subprocess.TimeoutExpired:
                pass
            return False
        finally:
            kill(process, signal.SIGKILL)  # the group, as a step that ended may have left workers
            process.wait()

    def environment(self, step: Step, deadline: float) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            "ROWS": str(self.rows),
            "STEP": step.name,
            "DEADLINE": str(deadline - GRACE),
        }

    def measured(self, step: Step) -> list[dict]:
        """Return the rows of a step that are measurements."""
        rows = (row for row in record.read(self.rows) if row["step"] == step.name)
        rows = (row for row in rows if row.get("outcome") != "skipped")  # tests
        return [row for row in rows if row["kind"] not in ("step", "left out")]

    def done(self, step: Step, outcome: str, why: str, seconds: float) -> None:
        facts = {"outcome": outcome, "why": why, "seconds": round(seconds, 1), "limit": step.limit}
        record.append(self.rows, {"step": step.name, "kind": "step", **facts})
        print(f"{step.name:<10} {seconds:5.0f} s  {outcome}: {why}", flush=True)
        self.summarize()

    def summarize(self) -> None:
        """Rewrite summary.md. An error of the report is printed and stops no measurement."""
        import gpu_report

        try:
            text = gpu_report.summary(record.read(self.rows))
            part = self.out / "summary.md.part"
            part.write_text(text)
            os.replace(part, self.out / "summary.md")
        except Exception as error:
            print(f"gpu.sh: summary.md was not rewritten: {error!r}", file=sys.stderr, flush=True)


def kill(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def last_line(log: pathlib.Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def machine(device: str) -> dict[str, object]:
    """Describe the machine, without torch."""
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "device": device,
    }
    if device != "cpu":
        names = "name,driver_version,memory.total,compute_cap,clocks.max.sm"
        query = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts["commit"] = commit.stdout.strip() or "not a git checkout"
    return facts


def problems(options: argparse.Namespace, names: Sequence[str]) -> Iterator[str]:
    """Yield all reasons why this run cannot begin."""
    for name in options.only:
        if name not in names:
            yield f"there is no step {name!r} here; there are {', '.join(names)}"
    if options.seconds < LEAST:
        yield f"--seconds {options.seconds:g}: too little time for any step, which needs {LEAST}"
    if options.out is None:
        yield "name a folder OUT for rows.jsonl, summary.md and log.txt"
    elif there := [name for name in FILES if (options.out / name).exists()]:
        which = "rows.jsonl" if "rows.jsonl" in there else ", ".join(there)
        yield f"{options.out} holds a run already; choose another folder, or move its {which} away"
    elif options.out.exists() and not options.out.is_dir():
        yield f"{options.out} is not a folder"
    if options.device != "cpu" and not shutil.which("nvidia-smi"):
        yield "no NVIDIA GPU: nvidia-smi is not on the PATH; --device cpu tests this script on tiny models"
    elif options.device != "cpu" and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
        yield "no NVIDIA GPU: nvidia-smi -L fails; --device cpu tests this script on tiny models"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        yield (
            f"{sys.executable} lacks {', '.join(missing)}; install them, or carry them as wheels: "
            "bash benchmarks/gpu_carry.sh"
        )
    module = ROOT / "rft_fast" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists() and (options.quick or options.device == "cpu"):
        yield (
            f"{module.name} is not in rft_fast/; carry it (bash benchmarks/gpu_carry.sh), or build it here: "
            f"{pathlib.Path(sys.executable).name} setup.py build_ext --inplace"
        )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument(
        "out", type=pathlib.Path, nargs="?", metavar="OUT", help="a folder that holds no run yet"
    )
    parser.add_argument("--quick", action="store_true", help=f"what matters most, in {QUICK} s at most")
    parser.add_argument("--only", default="", metavar="STEP,...", help="only these steps")
    parser.add_argument("--seconds", type=float, help="end by then; what does not fit is said")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--list", action="store_true", help="the steps, their limits and commands")
    options = parser.parse_args(argv)
    options.only = [name for name in options.only.split(",") if name]
    if options.out is not None:
        options.out = options.out.resolve()
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    os.environ["PATH"] += (
        os.pathsep + "/usr/local/cuda/bin"
    )  # compute-sanitizer and nvcc, if not found otherwise
    listed = list(steps(options.device, options.quick))
    total = sum(step.limit for step in listed) + KEPT
    if options.seconds is None:
        options.seconds = QUICK if options.quick else total
    if options.list:
        for step in listed:
            print(f"{step.name:<10} {step.limit:5} s  {' '.join(step.command)}")
        print(f"{'in all':<10} {total:5} s  with {KEPT} s between the steps")
        return 0
    if why := list(problems(options, [step.name for step in listed])):
        print("\n".join(f"gpu.sh: {problem}" for problem in why), file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu.sh: {options.out} cannot be made: {error}", file=sys.stderr)
        return 2
    run = Run(options.out, options.device, options.seconds - 2)
    record.append(run.rows, {"step": "machine", "kind": "machine", **machine(options.device)})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for step in listed:
            if not options.only or step.name in options.only:
                run.step(step)
    except KeyboardInterrupt:
        run.summarize()
        print("gpu.sh: interrupted; what was measured is in rows.jsonl and summary.md", file=sys.stderr)
        return 130
    print((run.out / "summary.md").read_text())
    outcomes = [row["outcome"] for row in record.read(run.rows) if row["kind"] == "step"]
    return int(any(outcome != "done" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
