"""nvcc compiles every kernel for every default architecture, with warnings and spills as errors, and no
kernel takes more registers or shared memory than tests/cuda_resources.json says.

`python tests/test_cuda_build.py --update` measures the pins anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests" / "cuda_resources.json"
# kernel -> architecture -> what ptxas says of it
Resources = dict[str, dict[str, dict[str, int]]]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spilled>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def nvcc() -> str | None:
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def nvcc_release(compiler: str) -> str:
    return re.search(r"release ([\d.]+)", subprocess.check_output([compiler, "--version"], text=True))[1]


def compile_all(compiler: str, folder: Path, architectures: str = "") -> str:
    """CMake's own compilation of the kernels, from nothing; its output holds ptxas's -v lines."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "NOISYSEG_CUDA")}
    environment["CUDACXX"] = compiler
    if architectures:
        environment["TORCH_CUDA_ARCH_LIST"] = architectures
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DNOISYSEG_PYTHON=OFF", "-DNOISYSEG_CUDA=1", *generator]
    output = ""
    for command in (configure, ["cmake", "--build", folder, "--target", "noisyseg_cuda", "--parallel", "2"]):
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if re.search(r"error|warning", line, re.I)]
            raise RuntimeError("\n".join([f"{' '.join(map(str, command))} failed:", *said[:40]]))
        output += done.stdout
    return output


def short_names(mangled: list[str]) -> list[str]:
    """region_sums<float> for noisyseg::cuda::(anonymous namespace)::region_sums<float>(...)."""
    text = "\n".join(mangled)
    names = []
    for name in subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|noisyseg::|cuda::|^void ", "", name)
        depth = 0
        for i, c in enumerate(name):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                name = name[:i]
                break
        names.append(name)
    return names


def parse(output: str) -> Resources:
    entries = list(ENTRY.finditer(output))
    found: Resources = {}
    for name, entry in zip(short_names([e["name"] for e in entries]), entries, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        used = {
            "registers": int(entry["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(entry["stack"]),
            "spilled": int(entry["spilled"]),
        }
        seen = found.setdefault(name, {}).setdefault(entry["arch"], used)
        for key, value in used.items():  # overloads of one name share a pin: the larger one's
            seen[key] = max(seen[key], value)
    return found


def pinned(found: Resources) -> dict[str, dict[str, list[int]]]:
    """kernel -> architecture -> [registers, static shared bytes], sorted."""
    return {
        name: {arch: [use["registers"], use["shared"]] for arch, use in sorted(archs.items())}
        for name, archs in sorted(found.items())
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Resources]:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc on PATH: the kernels' real compilation is not tested")
    wanted = os.environ.get("NOISYSEG_TEST_ARCHS", "")  # some of the default ones, where time is short
    return nvcc_release(compiler), parse(compile_all(compiler, tmp_path_factory.mktemp("cuda"), wanted))


def test_no_spills_and_no_stack(compiled: tuple[str, Resources]) -> None:
    _, found = compiled
    uses = [(f"{name} {arch}", use) for name, archs in found.items() for arch, use in archs.items()]
    bad = [name for name, use in uses if use["spilled"] or use["stack"]]
    assert not bad, f"registers spill or arrays lie in local memory: {bad}"


def test_every_kernel_is_compiled_for_every_architecture(compiled: tuple[str, Resources]) -> None:
    _, found = compiled
    sources = "".join(p.read_text() for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert bool(found) == ("__global__" in sources), "ptxas's output was not understood"
    architectures = {arch for archs in found.values() for arch in archs}
    assert all(set(archs) == architectures for archs in found.values())


def test_resources_stay_within_the_pins(compiled: tuple[str, Resources]) -> None:
    release, found = compiled
    pins = json.loads(PINS.read_text())
    if pins["nvcc"] != release:
        pytest.skip(f"the pins are nvcc {pins['nvcc']}'s and this is nvcc {release}")
    now, then = pinned(found), pins["kernels"]
    problems = [f"{name}: gone" for name in then.keys() - now.keys()]
    for name, archs in now.items():
        for arch, use in archs.items():
            allowed = then.get(name, {}).get(arch)
            if allowed is None:
                problems.append(f"{name} {arch}: not pinned")
            elif any(u > a for u, a in zip(use, allowed, strict=True)):
                problems.append(f"{name} {arch}: [registers, shared] {use}, pinned {allowed}")
    assert not problems, "\n".join([*problems, "if that is meant: python tests/test_cuda_build.py --update"])


def update() -> None:
    compiler = nvcc()
    if compiler is None:
        sys.exit("no nvcc on PATH: the pins cannot be measured")
    with tempfile.TemporaryDirectory() as folder:
        found = pinned(parse(compile_all(compiler, Path(folder))))
    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(archs)}" for name, archs in found.items())
    PINS.write_text(f'{{"nvcc": "{nvcc_release(compiler)}", "kernels": {{\n{body}\n}}}}\n')
    print(f"{PINS}: {len(found)} kernels")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update()
