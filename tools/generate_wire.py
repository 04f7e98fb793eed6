"""Generates common/cosilo_common/rpc from proto/ (`make proto`), or says whether it is up to date (`make check`).

protoc runs with `-I proto`, and the proto files lie under proto/cosilo_common/rpc/, so the generated imports are right
as they are written.
"""

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto"
PACKAGE_ROOT = ROOT / "common"
GENERATED = Path("cosilo_common/rpc")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def main() -> int:
    """Exit code 0 if the generated code is now, or was already, what proto/ says; 1 if --check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is committed and write nothing")
    check = parser.parse_args().check
    protos = sorted(path.relative_to(SOURCES) for path in SOURCES.rglob("*.proto"))
    if not protos:
        print(f"error: generate: no .proto file under {SOURCES}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(protos, fresh)
        expected = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
        present = {path.relative_to(PACKAGE_ROOT) for suffix in SUFFIXES for path in (PACKAGE_ROOT / GENERATED).rglob("*" + suffix)}
        stale = [path for path in sorted(expected) if not same(fresh / path, PACKAGE_ROOT / path)]
        orphans = sorted(present - expected)
        if check:
            for path in stale:
                print(f"error: generated code: {path} is not what proto/ says; run make proto", file=sys.stderr)
            for path in orphans:
                print(f"error: generated code: {path} has no .proto file any more; run make proto", file=sys.stderr)
            return 1 if stale or orphans else 0
        for path in stale:
            (PACKAGE_ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (PACKAGE_ROOT / path).write_bytes((fresh / path).read_bytes())
        for path in orphans:
            (PACKAGE_ROOT / path).unlink()
        print(f"{len(expected)} files generated, {len(stale)} changed, {len(orphans)} removed")
    return 0


def generate(protos: list[Path], out: Path) -> None:
    """Run protoc on `protos` (relative to proto/): the messages, the services' stubs and the types of both."""
    plugins = str(Path(sys.executable).parent)  # mypy-protobuf's plugins are found through PATH
    environment = dict(os.environ, PATH=plugins + os.pathsep + os.environ.get("PATH", ""))
    kinds = [f"--{kind}={out}" for kind in ("python_out", "grpc_python_out")]
    kinds += [f"--{kind}=quiet:{out}" for kind in ("mypy_out", "mypy_grpc_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(SOURCES), *kinds, *map(str, protos)]
    subprocess.run(command, check=True, env=environment, cwd=SOURCES)


def same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


if __name__ == "__main__":
    sys.exit(main())
